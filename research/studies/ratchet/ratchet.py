"""Is part of what beats "Adam" owed to Adam's state in bfloat16?

    python -m frugax.train.corpus --data_dir=data
    python research/studies/ratchet/ratchet.py runs/ratchet | tee ratchet.log

The published tables of low-memory optimizers have weights, gradients and state
in bfloat16. With b2=0.999 Adam's second moment cannot shrink there (see
tests/optim/ratchet_test.py), so its steps are too small once gradients fall;
SPAM forgets the second moment every few hundred steps, and subset norms and the
like have another one. Here Adam and SPAM train with the state rounded in
different ways and all else alike: what SPAM gains over Adam in bfloat16, less
what it gains in float32, is owed to the rounding.

LLaMA `tiny` (1.2 M parameters, bytes) on the standard library's source: eight
variants at two learning rates with three seeds, 48 runs of 1,500 steps. The
steps are many and small (2 x 128 bytes), as b2's memory is 1,000 steps.
Interrupted, the same command goes on. WORKDIR gets one folder a run and
ratchet.json.

What is equal: model, data and their order (by seed), warm-up over a tenth of
the steps and cosine to a tenth, b1=0.9, b2=0.999, no weight decay, no clipping.
"""

import argparse
import json
import math
import pathlib

import numpy as np

from studies import seeds, sweep
from studies.seeds import SEEDS

RATES = (5e-4, 2e-3)
STEPS, BATCH, LENGTH = 1500, 2, 128

_SPAM = {'optimizer.reset_interval': 250, 'optimizer.warmup_steps': 75}
_STOCHASTIC = {'optimizer.state_codec': 'bf16_stochastic'}
# optimizer, dtype of the weights, values of the config. Without a codec the
# state has the dtype of the weights, and all that is rounded is to nearest.
VARIANTS = {
  'adam, all float32': ('adamw', 'float32', {}),
  'adam, bfloat16': ('adamw', 'bfloat16', {}),
  'adam, state float32': (
    'adamw',
    'bfloat16',
    {'optimizer.state_codec': 'f32'},
  ),
  'adam, state stochastic': ('adamw', 'bfloat16', _STOCHASTIC),
  'adam, all stochastic': (
    'adamw',
    'bfloat16',
    {**_STOCHASTIC, 'rounding': 'stochastic'},
  ),
  'adam, state dynamic8': (
    'adamw',
    'bfloat16',
    {'optimizer.state_codec': 'dynamic8'},
  ),
  'spam, bfloat16': ('spam', 'bfloat16', _SPAM),
  'spam, state float32': (
    'spam',
    'bfloat16',
    {**_SPAM, 'optimizer.state_codec': 'f32'},
  ),
}
BASE, ROUNDED = 'adam, state float32', 'adam, bfloat16'


def run(args, variant: str, rate: float, seed: int) -> sweep.Run:
  optimizer, dtype, own = VARIANTS[variant]
  values = {
    'steps': args.steps,
    'seed': seed,
    'batch_size': BATCH,
    'clip_norm': 0.0,
    'schedule.warmup_steps': args.steps // 10,
    'optimizer.learning_rate': rate,
    'optimizer.b1': 0.9,
    'optimizer.b2': 0.999,
    'optimizer.weight_decay': 0.0,
    'model.param_dtype': dtype,
    'data.data_dir': args.data_dir,
    'data.seed': seed,
    'data.sequence_length': LENGTH,
    'eval.every': 0,
    'eval.batch_size': 16,
    'eval.tokens': 50_000,
    'checkpoint.every': 0,
    'log.tensorboard': False,
  }
  name = variant.replace(', ', '-').replace(' ', '-')
  return sweep.Run(
    f'{name}-{rate:g}-seed{seed}',
    f'size=tiny,data=stdlib,opt={optimizer}',
    {**values, **own},
  )


def interval(differences: np.ndarray) -> str:
  """Mean and half width of the 95 % interval."""
  mean, half = seeds.interval(differences)
  return f'{mean:+.4f} +- {half:.4f}'


def tables(losses: dict[tuple[str, float], np.ndarray]) -> str:
  """All that is printed; inf is a run that diverged."""
  rates = sorted({rate for _, rate in losses})
  lines = [
    'validation loss in nats a byte: mean and deviation of the seeds, and its'
    f' difference to "{BASE}"',
    f'{"":24}' + ''.join(f'{f"rate {r:g}":>42}' for r in rates),
  ]
  for variant in VARIANTS:
    line = f'{variant:24}'
    for rate in rates:
      own = losses[variant, rate]
      cell = 'diverged'
      if np.isfinite(own).all():
        cell = f'{own.mean():.4f} {own.std(ddof=1):.4f}'
        if variant != BASE:
          cell += f'  {interval(own - losses[BASE, rate])}'
      line += f'{cell:>42}'
    lines.append(line)
  lines.append('')
  for rate in rates:
    rounded = losses[ROUNDED, rate] - losses['spam, bfloat16', rate]
    exact = losses[BASE, rate] - losses['spam, state float32', rate]
    lines.append(
      f'rate {rate:g}: SPAM gains {interval(rounded)} over Adam in bfloat16 and'
      f' {interval(exact)} with state in float32;\n'
      f'  owed to the rounding of the baseline: {interval(rounded - exact)}'
    )
  lines.append('+-: half of the 95 % interval of the mean over seeds')
  return '\n'.join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('workdir', type=pathlib.Path)
  parser.add_argument('--data_dir', default='data')
  parser.add_argument('--steps', type=int, default=STEPS)
  parser.add_argument('--rates', type=float, nargs='+', default=RATES)
  parser.add_argument(
    '--jobs', type=int, default=2, help='runs at a time, each on its own cores'
  )
  args = parser.parse_args()
  cells = [(variant, rate) for rate in args.rates for variant in VARIANTS]
  runs = [run(args, *cell, seed) for cell in cells for seed in SEEDS]
  results = list(sweep.Sweep(args.workdir, args.jobs).train(runs))
  found = iter(r.summary.get('eval_loss') or math.inf for r in results)
  losses = {cell: np.array([next(found) for _ in SEEDS]) for cell in cells}
  print(f'size tiny, {args.steps} steps, {sweep.origin(results)}\n')
  print(tables(losses))
  rows = [
    {
      'variant': variant,
      'learning_rate': rate,
      'eval_loss': [x if math.isfinite(x) else None for x in own.tolist()],
    }
    for (variant, rate), own in losses.items()
  ]
  (args.workdir / 'ratchet.json').write_text(json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__':
  main()
