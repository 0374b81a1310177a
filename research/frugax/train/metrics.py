"""Metrics: where they are written, how time is counted, what the chip could do.

WORKDIR/metrics.jsonl is the record of a run: one JSON object a line, `step`
(completed steps) first, then `loss` or `eval_loss` and whatever else was
measured at that step. TensorBoard and Weights & Biases get copies.
"""

import contextlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from frugax import names

# Dense peaks in TFLOP/s of one JAX device by the first words of its kind:
# bfloat16, float8, int8; None where it has no such unit. The vendors' data
# sheets, without their sparsity factor of 2. The first match counts.
_DTYPES = ('bfloat16', 'float8_e4m3fn', 'int8')
_PEAKS = (
  ('TPU v4 lite', (137, None, None)),
  ('TPU v4', (275, None, 275)),
  ('TPU v5 lite', (197, None, 394)),
  ('TPU v5e', (197, None, 394)),
  ('TPU v5', (459, None, 918)),
  ('TPU v5p', (459, None, 918)),
  ('TPU v6 lite', (918, None, 1836)),
  ('TPU v6e', (918, None, 1836)),
  # A chip is two JAX devices: half of the chip's 2307 and 4614.
  ('TPU7x', (1153.5, 2307, None)),
  ('NVIDIA A100', (312, None, 624)),
  ('NVIDIA H100 PCIe', (756, 1513, 1513)),
  ('NVIDIA H100 NVL', (835, 1671, 1671)),
  ('NVIDIA H100', (989, 1979, 1979)),
  ('NVIDIA H200', (989, 1979, 1979)),
  ('NVIDIA GH200', (989, 1979, 1979)),
  ('NVIDIA B200', (2250, 4500, 4500)),
  ('NVIDIA L4', (121, 242, 242)),
)


class MetricWriter:
  """Appends the metrics of a run to its folder.

  Every row is flushed as it is written, so a killed run loses at most half a
  line. When a run is resumed from the checkpoint of step k, the rows of later
  steps go: the run will take these steps again and the file has each one once.

  JSON has no number for NaN and the infinities: they are written as the strings
  'nan', 'inf' and '-inf', which Python's and numpy's `float` read back.

  Args:
    workdir: the run's folder; made if missing.
    resume_step: the completed steps the run goes on from; 0 for a new run,
      which begins with an empty file.
    tensorboard: also write event files to WORKDIR/tensorboard.
    wandb: project in Weights & Biases to log to as well; None or '' for none.
    active: False writes nothing at all (processes other than the first).
    config: the resolved config; Weights & Biases stores it with the run.

  Raises:
    ValueError: metrics.jsonl has a broken line that is not its last, or
      `wandb` names a project and the package is not installed.

  Examples:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as workdir:
    ...   with MetricWriter(workdir, tensorboard=False) as writer:
    ...     writer.write(1, {'loss': 5.5, 'tokens': 64})
    ...     writer.write(1, {'eval_loss': math.nan})
    ...   print(pathlib.Path(workdir, 'metrics.jsonl').read_text())
    {"step": 1, "loss": 5.5, "tokens": 64}
    {"step": 1, "eval_loss": "nan"}
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    resume_step: int = 0,
    tensorboard: bool = True,
    wandb: str | None = None,
    active: bool = True,
    config: Mapping[str, Any] | None = None,
  ):
    self._file = self._tensorboard = self._wandb = None
    if not active:
      return
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / 'metrics.jsonl'
    if wandb:
      self._wandb = _wandb_run(workdir, wandb, resume_step, config)
    _drop_rows_after(path, resume_step)
    if tensorboard:
      self._tensorboard = _TensorBoard(workdir / 'tensorboard', resume_step)
    self._file = path.open('a', encoding='utf-8')

  def write(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Writes one row.

    Args:
      step: completed steps.
      scalars: numbers by name, as Python, numpy or JAX scalars; the last are
        fetched from the device here. None, not measured, is left out.

    Raises:
      ValueError: a value is not a scalar number.
    """
    if self._file is None:
      return
    scalars = {k: _number(k, v) for k, v in scalars.items() if v is not None}
    row = {'step': int(step)} | {k: _json(v) for k, v in scalars.items()}
    self._file.write(json.dumps(row, allow_nan=False) + '\n')
    self._file.flush()
    if self._tensorboard is not None:
      self._tensorboard.write(int(step), scalars)
    if self._wandb is not None:
      self._wandb.log(scalars, step=int(step))

  def close(self) -> None:
    """Closes the files; a second call does nothing."""
    if self._file is not None:
      self._file.close()
    if self._tensorboard is not None:
      self._tensorboard.close()
    if self._wandb is not None:
      self._wandb.finish()
    self._file = self._tensorboard = self._wandb = None

  def __enter__(self) -> 'MetricWriter':
    return self

  def __exit__(self, *_) -> None:
    self.close()


class Clock:
  """Counts training time, without what happens inside `paused()`.

  Two figures come from it. `seconds` is what the run has cost so far:
  compilation included, evaluation and checkpoints excluded; store it with the
  checkpoint and hand it back. `rates` are the speed since the last call,
  without the first step of this process, which compiles.

  A step is dispatched, not awaited: fetch the metrics of the last step before
  pausing, or its computation is counted as part of the pause.

  Args:
    seconds: training seconds of earlier processes, from the checkpoint.
    now: returns the time in seconds.

  Examples:
    >>> ticks = iter([0, 9, 11, 31, 32, 32])
    >>> clock = Clock(now=lambda: next(ticks))  # starts at 0
    >>> clock.step(tokens=64)  # done at 9: it compiled
    >>> clock.step(tokens=64)
    >>> with clock.paused():  # from 11 to 31
    ...   pass
    >>> clock.step(tokens=64)  # done at 32
    >>> clock.rates()
    {'tokens_per_second': 42.666..., 'step_seconds': 1.5}
    >>> clock.seconds
    12.0
  """

  def __init__(
    self, seconds: float = 0.0, *, now: Callable[[], float] = time.perf_counter
  ):
    self._now = now
    self._banked = float(seconds)  # up to the start of the running stretch
    self._since: float | None = now()  # its start; None while paused
    self._window_start: float | None = None  # in `seconds`; None: not compiled
    self._steps = self._tokens = 0

  @property
  def seconds(self) -> float:
    """Training seconds of all processes of this run."""
    running = 0.0 if self._since is None else self._now() - self._since
    return self._banked + running

  def step(self, tokens: int) -> None:
    """Counts a step; call it after each one."""
    if self._window_start is None:
      self._window_start = self.seconds
      return
    self._steps += 1
    self._tokens += tokens

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Stops the clock for evaluation, checkpoints and the like."""
    if self._since is None:  # the outer pause ends it
      yield
      return
    self._banked, self._since = self.seconds, None
    try:
      yield
    finally:
      self._since = self._now()

  def rates(self) -> dict[str, float]:
    """The speed since the last call; starts a new window.

    Returns:
      tokens_per_second and step_seconds; empty if no step was counted.
    """
    if not self._steps:
      return {}
    end = self.seconds
    elapsed = end - self._window_start
    rates = {
      'tokens_per_second': self._tokens / elapsed,
      'step_seconds': elapsed / self._steps,
    }
    self._window_start, self._steps, self._tokens = end, 0, 0
    return rates


def peak_flops(device_kind: str, dtype: str = 'bfloat16') -> float | None:
  """The dense matmul peak of one JAX device in FLOP/s.

  Args:
    device_kind: as `jax.Device.device_kind` says it.
    dtype: of the matmul's operands: bfloat16, float8_e4m3fn or int8.

  Returns:
    The data sheet's figure; None if the device is not known (a CPU, say) or
    has no unit for `dtype`.

  Raises:
    ValueError: a dtype that is not in the table.

  Examples:
    >>> peak_flops('TPU v5 lite')
    197000000000000.0
    >>> peak_flops('NVIDIA H100 80GB HBM3', 'int8')
    1979000000000000.0
    >>> peak_flops('cpu') is None
    True

  References:
    Google Cloud, TPU architecture pages (v4, v5e, v5p, v6e, TPU7x), 2025.
    https://cloud.google.com/tpu/docs/system-architecture-tpu-vm
    NVIDIA, H100 Tensor Core GPU data sheet, 2024.
    https://www.nvidia.com/en-us/data-center/h100
  """
  if dtype not in _DTYPES:
    raise names.unknown('matmul dtype', dtype, _DTYPES)
  if ' MIG ' in device_kind:  # a slice of a GPU has less
    return None
  for kind, peaks in _PEAKS:
    if re.match(rf'{kind}\b', device_kind):
      peak = peaks[_DTYPES.index(dtype)]
      return None if peak is None else peak * 1e12
  return None


def model_flops_utilization(
  tokens_per_second: float,
  flops_per_token: float,
  devices: Sequence[jax.Device],
) -> float | None:
  """The share of the devices' bfloat16 peak that the model's FLOPs come to.

  MFU = tokens/s x FLOPs/token / (sum of the devices' peaks). FLOPs are those
  that the model needs, forward and backward; recomputed ones do not count.

  Args:
    tokens_per_second: of the whole mesh.
    flops_per_token: of one training step; about 6 x parameters + attention.
    devices: the mesh's devices.

  Returns:
    A number from 0 to 1; None if the peak of a device is not known.

  References:
    Chowdhery et al., PaLM, appendix B, https://arxiv.org/abs/2204.02311, 2022.
  """
  peaks = [peak_flops(device.device_kind) for device in devices]
  if None in peaks:
    return None
  return tokens_per_second * flops_per_token / sum(peaks)


def device_memory() -> dict[str, int]:
  """Bytes that this process's fullest device holds now, and held at its peak.

  Returns:
    device_bytes_in_use and device_peak_bytes; empty where the platform does
    not count (CPU).
  """
  stats = [device.memory_stats() for device in jax.local_devices()]
  if not all(stats):
    return {}
  return {
    'device_bytes_in_use': max(s['bytes_in_use'] for s in stats),
    'device_peak_bytes': max(s['peak_bytes_in_use'] for s in stats),
  }


def run_info() -> dict[str, Any]:
  """What a result depends on beside its config: code, versions, hardware.

  Returns:
    commit (None if the code is not in a git repository, or git is missing),
    dirty (whether tracked files differ from it), the versions of python, jax,
    flax and optax, and hardware: platform, device_kind, devices, processes.
  """
  device = jax.devices()[0]
  commit, dirty = _git_state(pathlib.Path(__file__).resolve())
  return {
    'commit': commit,
    'dirty': dirty,
    'python': platform.python_version(),
    **{p: importlib.metadata.version(p) for p in ('jax', 'flax', 'optax')},
    'hardware': {
      'platform': device.platform,
      'device_kind': device.device_kind,
      'devices': jax.device_count(),
      'processes': jax.process_count(),
    },
  }


class _TensorBoard:
  """TensorBoard scalars, without TensorFlow."""

  def __init__(self, folder: pathlib.Path, resume_step: int):
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer import event_file_writer

    self._event, self._summary = event_pb2.Event, summary_pb2.Summary
    self._writer = event_file_writer.EventFileWriter(str(folder), flush_secs=30)
    # A session that starts at a step makes TensorBoard hide what earlier
    # event files have from that step on.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    first = resume_step + 1 if resume_step else 0
    self._add(first, session_log=start)

  def _add(self, step, **what):
    self._writer.add_event(
      self._event(wall_time=time.time(), step=step, **what)
    )

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    values = [
      self._summary.Value(tag=tag, simple_value=value)
      for tag, value in scalars.items()
    ]
    self._add(step, summary=self._summary(value=values))

  def close(self) -> None:
    self._writer.close()


def _wandb_run(workdir, project, resume_step, config):
  try:
    import wandb
  except ImportError as error:
    raise ValueError(
      f'logging to the Weights & Biases project {project!r} needs its package:'
      " pip install 'frugax[wandb]', or name no project"
    ) from error
  id_file = workdir / 'wandb_id.txt'
  resumed = resume_step > 0 and id_file.exists()
  run = wandb.init(
    project=project,
    name=workdir.resolve().name,
    id=id_file.read_text().strip() if resumed else None,
    resume='allow',
    dir=str(workdir),
    config=None if config is None else dict(config),
  )
  id_file.write_text(run.id + '\n')
  return run


def _drop_rows_after(path: pathlib.Path, step: int) -> None:
  """Keeps the rows of metrics.jsonl up to `step`; none if `step` is 0."""
  if not path.exists():
    return
  lines = path.read_bytes().splitlines() if step else []
  kept = []
  for i, line in enumerate(lines):
    try:
      keep = json.loads(line)['step'] <= step
    except (ValueError, KeyError, TypeError) as error:
      if i == len(lines) - 1:  # the run was killed while it wrote this line
        break
      raise ValueError(
        f'{path}, line {i + 1} is not a row of metrics: {line[:60]!r};'
        ' remove the line to resume the run'
      ) from error
    if keep:
      kept.append(line + b'\n')
  partial = path.with_name(path.name + '.partial')
  partial.write_bytes(b''.join(kept))
  partial.replace(path)


def _number(key: str, value: Any) -> int | float:
  """A JAX, numpy or Python scalar as a Python number."""
  try:
    value = value.item() if hasattr(value, 'item') else value
    return int(value) if isinstance(value, int) else float(value)
  except (TypeError, ValueError) as error:
    raise ValueError(f'metric {key!r} is not one number: {value!r}') from error


def _json(value: int | float) -> int | float | str:
  return value if math.isfinite(value) else str(value)


def _git_state(file: pathlib.Path) -> tuple[str | None, bool | None]:
  """The commit that `file` is part of and whether the files differ from it."""

  def git(*arguments):
    return subprocess.run(
      ('git', '-C', str(file.parent), *arguments),
      # Reading the state must not lock a repository that others work in.
      env=os.environ | {'GIT_OPTIONAL_LOCKS': '0'},
      check=True,
      capture_output=True,
      text=True,
      timeout=20,
    ).stdout.strip()

  try:
    # A package installed inside some other project's folder is not its code.
    git('ls-files', '--error-unmatch', file.name)
    commit = git('rev-parse', 'HEAD')
    return commit, bool(git('status', '--porcelain', '--untracked-files=no'))
  except (OSError, subprocess.SubprocessError):
    return None, None
