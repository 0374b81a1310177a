"""The largest batch, the cheapest remat policy, the best mesh that fits."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from frugax.models import llama
from frugax.plan import compile as fx_compile
from frugax.plan import topologies
from frugax.train import layerwise
from frugax.train import mesh as fx_mesh

KINDS = ('batch', 'remat', 'mesh')
_MESHES = 6  # how many are compiled, of those that look best


class Tried(NamedTuple):
  """A setting and the plan that it has."""

  name: str
  config: Any
  plan: fx_compile.Plan


Planner = Callable[[Any], fx_compile.Plan]


def changed(config, **values):
  """A copy of a config with other values; a__b is value b of section a."""
  config = copy.deepcopy(config)
  for name, value in values.items():
    *sections, last = name.split('__')
    node = config
    for section in sections:
      node = node[section]
    with node.unlocked():
      node[last] = value
  return config


def search(
  kind: str, config, topology: str, planner: Planner
) -> tuple[list[Tried], Tried | None]:
  """Tries settings until the best that fits is known.

  Args:
    kind: 'batch', 'remat' or 'mesh'.
    config: the run's config; the rest of it stays.
    topology: the devices, of which the number is asked.
    planner: config -> plan.

  Returns:
    All that was tried, and the best of them; None if nothing fits.

  Raises:
    ValueError: no mesh on which the config can run.
  """
  if kind == 'batch':
    return _batch(config, topology, planner)
  if kind == 'remat':
    found = [
      Tried(
        f'remat={policy}',
        c := changed(config, model__remat=policy),
        planner(c),
      )
      for policy in policies(config)
    ]
  else:
    found = [
      Tried(f'mesh={spec}', c := changed(config, mesh=spec), planner(c))
      for spec in _some_meshes(config, len(topologies.devices(topology)))
    ]
  fitting = [t for t in found if t.plan.fits]
  return found, min(fitting, key=_price, default=None)


def policies(config) -> list[str]:
  """Remat policies with programs of their own, of the config's step."""
  if config.step != 'layerwise':
    return list(llama.REMAT)
  return [p for p in layerwise.REMAT if p != 'none']  # which is 'full' there


def _price(tried):
  """Seconds, if the chip's rates are known, and the operations."""
  seconds = tried.plan.seconds.get('step', 0.0)
  return seconds, sum(tried.plan.flops.values()), tried.plan.needed


def _batch(config, topology, planner):
  """The largest multiple of the least batch, to a sixteenth of it."""
  sizes = fx_mesh.parse_mesh(config.mesh, len(topologies.devices(topology)))
  unit = sizes['data'] * sizes['fsdp'] * config.accumulation
  found: dict[int, Tried] = {}

  def fits(n):
    if n not in found:
      size = n * unit
      c = changed(config, batch_size=size)
      found[n] = Tried(f'batch_size={size}', c, planner(c))
    return found[n].plan.fits

  high = 1
  while fits(high):
    high *= 2
  low = high // 2  # fits, or is 0
  while high - low > max(1, low // 16):
    # What two sizes need tells nearly where the end is.
    middle = _guess(found, low, high)
    if fits(middle):
      low = middle
    else:
      high = middle
  tried = [found[n] for n in sorted(found)]
  return tried, found.get(low)


def _guess(found, low, high):
  """A size between both: where a line through two that fit meets the end."""
  fitting = sorted(n for n in found if found[n].plan.fits)[-2:]
  middle = (low + high) // 2
  if len(fitting) == 2:
    (a, b), plans = fitting, [found[n].plan for n in fitting]
    slope = (plans[1].needed - plans[0].needed) / (b - a)
    if slope > 0:
      middle = b + int((plans[1].capacity - plans[1].needed) / slope)
  return min(max(middle, low + 1), high - 1)


def meshes(config, devices: int) -> list[str]:
  """Meshes on which a config can run, those first that look cheap.

  The order is by what a formula says that each device sends in a step: with
  fsdp the weights of a layer three times (forward, backward, gradients), with
  data their gradients, with tensor the activations four times a layer.
  Whether they fit does not count: that is what compiling tells.

  Args:
    config: the run's config.
    devices: how many there are.

  Returns:
    Mesh specs such as 'fsdp=4,tensor=2'.
  """
  model = _model(config)
  rows = config.batch_size // config.accumulation
  weights = 4 * llama.param_count(model)

  def sent(data, fsdp, tensor):
    own = weights / tensor
    tokens = config.batch_size * config.data.sequence_length / (data * fsdp)
    activations = 4 * model.n_layers * 2 * tokens * model.dim * 2
    return (
      3 * own / 2 * (fsdp - 1) / fsdp * config.accumulation
      + 2 * own / fsdp * (data - 1) / data
      + activations * (tensor - 1) / tensor
    )

  found = []
  for data, fsdp, tensor in _factors(devices):
    if rows % (data * fsdp) or model.n_kv_heads % tensor:
      continue
    found.append((sent(data, fsdp, tensor), (data, fsdp, tensor)))
  found.sort()
  names = ('data', 'fsdp', 'tensor')
  return [
    ','.join(f'{n}={s}' for n, s in zip(names, sizes, strict=True) if s > 1)
    or 'fsdp=1'
    for _, sizes in found
  ]


def _some_meshes(config, devices):
  """Those to be compiled."""
  found = meshes(config, devices)[:_MESHES]
  if not found:
    heads = _model(config).n_kv_heads
    least = config.accumulation * devices // math.gcd(devices, heads)
    raise ValueError(
      f'no mesh of {devices} devices: data x fsdp must divide the micro-batch'
      f' (batch_size={config.batch_size}, accumulation={config.accumulation})'
      f' and tensor the n_kv_heads={heads}; use a batch_size that is a multiple'
      f' of {least}, or plan a mesh with a context axis without --search'
    )
  return found


def _model(config):
  fields = config.model.to_dict()
  return llama.config(fields.pop('size'), **fields)


def _factors(n: int) -> Iterator[tuple[int, int, int]]:
  """All (data, fsdp, tensor) whose product is n."""
  divisors = [d for d in range(1, n + 1) if n % d == 0]
  for data, fsdp in itertools.product(divisors, divisors):
    if n % (data * fsdp) == 0:
      yield data, fsdp, n // math.prod((data, fsdp))
