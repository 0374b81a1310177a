"""Does the step that trains 7b on one chip train as well as the ordinary one?

    python -m frugax.train.corpus --data_dir=data
    python research/studies/layerwise_tiny.py runs/layerwise_tiny

LLaMA `tiny` (1.2 M parameters, bytes) on the standard library's source, 1,000
steps of 4 x 256 bytes, q_galore, bfloat16 matmuls, 32 seeds of weights and
data:

- ordinary: weights in bfloat16, rounded stochastically, the whole gradient,
  clipped to its norm;
- layer-wise: as configs/llama.py:size=7b,opt=q_galore,matmul=w8 trains one v5e
  chip: weights in int8, each layer updated in the backward pass, its gradient
  clipped to the norm of the layer alone.

One layer-wise run is stopped halfway by SIGTERM, in a folder of its own, and
goes on: all that it logs must be what the run beside it logs, to the last bit.
Interrupted, the same command goes on.
"""

import signal
import subprocess
import time

import numpy as np

from frugax import report
from studies import seeds, sweep

STEPS = 1000
# The difference of a pair has a standard deviation of about 1 %: with these the
# mean is known to 0.4 %.
SEEDS = 32
# name: arguments and values of the config
KINDS = {
  'ordinary': ('', {'rounding': 'stochastic'}),
  'layerwise': (
    ',matmul=w8',
    {'step': 'layerwise', 'layerwise.clip': 'layer'},
  ),
}
# What a metrics line says of the training itself.
_EXACT = ('loss', 'grad_norm', 'update_norm', 'param_norm')


def run(kind: str, seed: int, args, name: str = '') -> sweep.Run:
  arguments, own = KINDS[kind]
  values = {
    'steps': args.steps,
    'seed': seed,
    'batch_size': 4,
    'model.dtype': 'bfloat16',
    'model.param_dtype': 'bfloat16',
    'data.data_dir': args.data_dir,
    'data.seed': seed,
    'eval.every': 0,
    'checkpoint.every': 0,
    'log.tensorboard': False,
  }
  return sweep.Run(
    name or f'{kind}-seed{seed}',
    f'size=tiny,data=stdlib,opt=q_galore{arguments}',
    values | own,
  )


def stop_halfway(chosen: sweep.Run, args) -> int:
  """Starts a run, and stops it by SIGTERM; the step it stopped after."""
  folder = args.workdir / chosen.name
  folder.mkdir(parents=True, exist_ok=True)
  stopped = folder / 'stopped.txt'
  if stopped.exists():
    return int(stopped.read_text())
  with (folder / 'first.txt').open('w') as log:
    process = subprocess.Popen(chosen.command(args.workdir), stdout=log)
    while process.poll() is None and _steps(folder) < args.steps // 2:
      time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    if process.wait():
      raise SystemExit(f'{chosen.name} did not stop well: see {log.name}')
  steps = _steps(folder)
  if not 0 < steps < args.steps:
    raise SystemExit(f'{chosen.name} was to stop halfway, not at {steps}')
  stopped.write_text(f'{steps}\n')
  return steps


def _steps(folder):
  try:
    return int(max(report.read_run(folder).train['step'], default=0))
  except (KeyError, ValueError):
    return 0


def differing(a: report.Run, b: report.Run) -> list[str]:
  """What two runs log differently."""
  names = [
    key for key in _EXACT if not np.array_equal(a.train[key], b.train[key])
  ]
  if a.summary['eval_loss'] != b.summary['eval_loss']:
    names.append('eval_loss')
  return names


def table(results: sweep.Results, steps: int, count: int) -> str:
  """Losses of the seeds of which both runs are there, beside each other."""
  found = [
    seed
    for seed in range(count)
    if all((kind, seed) in results.of for kind in KINDS)
  ]
  losses = np.array(
    [[results.of[kind, seed].eval_loss[-1] for kind in KINDS] for seed in found]
  ).reshape(-1, len(KINDS))
  more = losses[:, 1] / losses[:, 0] - 1
  mean, half = seeds.interval(more)
  lines = [
    f'size tiny, {steps} steps',
    *results.origins((kind, seed) for seed in found for kind in KINDS),
    *([f'NOT COMPLETE: {len(found)} of {count} seeds'] * (len(found) < count)),
    '\nvalidation loss in nats a byte',
    f'seed{"".join(f"{kind:>12}" for kind in KINDS)}{"more":>10}',
    *(
      f'{name:>4}{"".join(f"{loss:12.4f}" for loss in pair)}{x:+10.2%}'
      for name, pair, x in [
        *zip(found, losses, more, strict=True),
        ('mean', losses.mean(0), mean),
      ]
    ),
    f'\nmore, mean of {len(found)} seeds: {mean:+.2%} +- {half:.2%}, half of'
    f' its 95 % interval; standard deviation {more.std(ddof=1):.2%}',
  ]
  return '\n'.join(lines)


def main():
  parser = sweep.parser(__doc__)
  parser.add_argument('--steps', type=int, default=STEPS)
  parser.add_argument('--seeds', type=int, default=SEEDS, help='2 or more')
  args = parser.parse_args()
  sweeper = sweep.Sweep(args.workdir, args.jobs)
  results = sweep.Results(
    args.workdir / 'layerwise_tiny.json',
    ('kind', 'seed'),
    lambda key: run(*key, args),
    sweeper,
  )
  results.get(
    [(kind, seed) for seed in range(args.seeds) for kind in KINDS],
    train=not args.report,
  )
  print(table(results, args.steps, args.seeds))
  if args.report:
    return

  again = run('layerwise', 0, args, 'layerwise-resumed')
  (steps,) = sweeper.each(lambda chosen: stop_halfway(chosen, args), [again])
  names = differing(*sweeper.train([run('layerwise', 0, args), again]))
  told = (
    f'differs in {", ".join(names)}' if names else 'the same to the last bit'
  )
  print(f'\nstopped after step {steps} and resumed: {told}')


if __name__ == '__main__':
  main()
