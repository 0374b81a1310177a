"""At which learning rates 4-bit training diverges, with which optimizer.

    python -m frugax.train.corpus --data_dir=data
    python research/studies/stability/stability.py runs/stability \
      | tee stability.log

LLaMA `tiny` (1.2 M parameters, bytes) on the standard library's source, with
the 4-bit weights and activations of the Stable-SPAM paper, simulated
(matmul=fp4_sim, or --matmul=int4_sim or f32): five optimizers at five learning
rates with three seeds, 75 runs of 200 steps. Not run by us yet: --size=10m and
--size=60m, on one GPU with --jobs=1. Interrupted, the same command goes on.
WORKDIR gets a folder with one folder a run, stability.json and stability.png.

What is equal: model, data and their order (by seed), tokens, batch, warm-up
over a tenth of the steps and cosine to a tenth, no weight decay, no clipping of
the gradient's norm, b1=0.9, b2=0.999. Rates are multiples of each method's own:
subset norms sum the squares that Adam averages, so their step is smaller and
their published rates ten times larger.

Of 20,000 steps the papers reset the moments every 500; here it is every fifth
of the run, since a fortieth would be 5 steps, and SPAM's warm-up after a reset
is 3/10 of the interval, as theirs. The other arguments are the papers' for 4
bits.

A run has diverged if its loss is not finite, or ends (mean of the last tenth of
the steps) more than 0.5 above the least mean that any tenth had.
"""

import argparse
import json
import math
import pathlib

import numpy as np

from frugax import report
from frugax.models import llama
from studies import sweep

# steps, batch size; a tenth of the steps is warm-up
SCHEDULES = {'tiny': (200, 4), '10m': (1000, 64), '60m': (2000, 128)}
SEEDS = (0, 1, 2)
FACTORS = (1, 3, 10, 30, 100)
RISE = 0.5  # nats


# The lowest learning rate of each.
RATES = {
  'adamw': 1e-3,
  'spam': 1e-3,
  'stable_spam': 1e-3,
  'adam_sn': 1e-2,
  'snsm': 1e-2,
}


def arguments(name: str, steps: int, dim: int) -> dict:
  """What an optimizer gets beside its rate, in a run of so many steps."""
  interval = max(steps // 5, 1)
  # The released SPAM warms up over 150 of 500 steps after a reset.
  return {
    'adamw': {},
    'spam': {'reset_interval': interval, 'warmup_steps': 3 * interval // 10},
    'stable_spam': {'reset_interval': interval, 'total_steps': steps},
    'adam_sn': {},
    'snsm': {'rank': dim // 4, 'update_interval': interval},
  }[name]


def folder(args) -> str:
  """Of one heat map."""
  return f'{args.size}-{args.matmul}-{args.steps}'


def run(args, name: str, factor: float, seed: int) -> sweep.Run:
  steps, batch = args.steps, SCHEDULES[args.size][1]
  rate = f'{RATES[name] * factor:.4g}'
  optimizer = {'learning_rate': rate, 'b1': 0.9, 'b2': 0.999}
  optimizer |= {'weight_decay': 0.0}
  optimizer |= arguments(name, steps, llama.config(args.size).dim)
  values = {
    'steps': steps,
    'seed': seed,
    'batch_size': batch,
    'clip_norm': 0.0,
    'schedule.warmup_steps': steps // 10,
    'data.data_dir': args.data_dir,
    'data.seed': seed,
    'eval.every': max(steps // 10, 1),
    'eval.batch_size': 2 * batch,
    'eval.tokens': 10_000 if args.size == 'tiny' else 200_000,
    'checkpoint.every': 0,
    'log.every': 1,
    'log.tensorboard': False,
  } | {f'optimizer.{k}': v for k, v in optimizer.items()}
  return sweep.Run(
    f'{folder(args)}/{name}-{rate}-seed{seed}',
    f'size={args.size},data=stdlib,matmul={args.matmul},opt={name}',
    values,
  )


def diverged(result: report.Run, steps: int) -> bool:
  """By the rule at the top of the file."""
  loss = result.train['loss']
  if not np.isfinite(loss).all() or result.summary['steps'] < steps:
    return True
  tenths = [part.mean() for part in np.array_split(loss, 10)]
  return bool(tenths[-1] > min(tenths) + RISE)


def cell(group: list[report.Run], steps: int) -> tuple[float, int]:
  """Mean loss of the seeds that did not diverge, and how many did."""
  kept = [r.summary['eval_loss'] for r in group if not diverged(r, steps)]
  return np.mean(kept) if kept else math.nan, len(group) - len(kept)


def steps_to(curve: report.Run, loss: float) -> float:
  """Step at which the validation loss first is as low; NaN if never."""
  steps, losses = curve.eval['step'], curve.eval['eval_loss']
  below = np.flatnonzero(losses <= loss)
  if not below.size:
    return math.nan
  i = below[0]
  if not i:
    return float(steps[0])
  return float(np.interp(-loss, -losses[i - 1 : i + 1], steps[i - 1 : i + 1]))


def tables(args, results, steps) -> str:
  """All that is printed."""
  lines = [
    f'size {args.size}, matmul {args.matmul}, {steps} steps,'
    f' {len(SEEDS)} seeds, {args.jobs} runs at a time,'
    f' {sweep.origin([r for rs in results.values() for r in rs])}',
    '',
    'validation loss in nats a byte, mean of the seeds that did not diverge,'
    ' and how many did',
    f'{"x its own rate":18}' + ''.join(f'{f:>16g}' for f in FACTORS),
  ]
  best = {}
  for name, rate in RATES.items():
    cells = []
    for factor in FACTORS:
      mean, lost = cell(results[name, factor], steps)
      if not lost and mean < best.get(name, (math.inf,))[0]:
        best[name] = mean, factor
      said = '' if math.isnan(mean) else f'{mean:.4f}'
      cells.append(f'{said} {f"{lost} of {len(SEEDS)}" if lost else "":>7}')
    lines.append(f'{name:12}{rate:6g}' + ''.join(f'{c:>16}' for c in cells))

  lines += ['', f'{"best rate":12} {"loss":>8} {"std":>7} {"- adamw":>8}']
  lines[-1] += f' {"steps to the final loss of adamw":>34}'
  target = results['adamw', best['adamw'][1]] if 'adamw' in best else []
  for name, (mean, factor) in best.items():
    group = results[name, factor]
    losses = np.array([r.summary['eval_loss'] for r in group])
    line = f'{name:12} {mean:8.4f} {losses.std(ddof=1):7.4f}'
    if target:
      line += f' {mean - best["adamw"][0]:+8.4f}'
      needed = [
        steps_to(r, t.summary['eval_loss'])
        for r, t in zip(group, target, strict=True)
      ]
      shares = ', '.join(
        'never' if math.isnan(n) else f'{n:.0f}' for n in needed
      )
      line += f'  {shares} of {steps}'
    lines.append(f'{line}  at {RATES[name] * factor:g}')
  lines.append(
    'steps: by seed, from validation losses at every tenth of the run,'
    ' straight lines between; a whole run of its own schedule'
  )
  return '\n'.join(lines)


def picture(path, args, results, steps):
  """The heat map."""
  from matplotlib import figure

  shape = len(RATES), len(FACTORS)
  fig = figure.Figure(figsize=(8, 4), dpi=130, layout='constrained')
  ax = fig.subplots()
  grid = np.full(shape, np.nan)
  for i, name in enumerate(RATES):
    for j, factor in enumerate(FACTORS):
      grid[i, j], lost = cell(results[name, factor], steps)
      lines = [] if math.isnan(grid[i, j]) else [f'{grid[i, j]:.3f}']
      if lost:
        lines.append(f'{lost} of {len(SEEDS)}\ndiverged')
      ax.text(j, i, '\n'.join(lines), ha='center', va='center', fontsize=8)
  image = ax.imshow(
    np.ma.masked_invalid(grid),
    cmap='YlOrRd',
    aspect='auto',
    alpha=0.6,
    vmax=np.nanmin(grid) + 1 if np.isfinite(grid).any() else None,
  )
  fig.colorbar(image, label='validation loss, nats a byte')
  ax.set_yticks(
    range(shape[0]), [f'{n} ({rate:g})' for n, rate in RATES.items()]
  )
  ax.set_xticks(range(shape[1]), [f'{f:g}' for f in FACTORS])
  ax.set_xlabel('learning rate, as a multiple of the one in brackets')
  ax.set_title(
    f'{args.size}, {args.matmul}, {steps} steps', loc='left', fontsize=10
  )
  fig.savefig(path)


def save(path, results, steps):
  """Every run's losses."""
  rows = [
    {
      'optimizer': name,
      'learning_rate': float(f'{RATES[name] * factor:.4g}'),
      'seed': seed,
      'diverged': diverged(r, steps),
      'eval_step': r.eval.get('step', np.array([])).tolist(),
      'eval_loss': [
        round(x, 5) if math.isfinite(x) else None
        for x in r.eval.get('eval_loss', np.array([])).tolist()
      ],
    }
    for (name, factor), group in results.items()
    for seed, r in zip(SEEDS, group, strict=True)
  ]
  path.write_text(json.dumps(rows, indent=1) + '\n')


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('workdir', type=pathlib.Path)
  parser.add_argument('--size', choices=tuple(SCHEDULES), default='tiny')
  parser.add_argument('--matmul', default='fp4_sim')
  parser.add_argument('--data_dir', default='data')
  parser.add_argument(
    '--steps', type=int, default=0, help='0: that of the size'
  )
  parser.add_argument(
    '--jobs', type=int, default=2, help='runs at a time, each on its own cores'
  )
  args = parser.parse_args()
  steps = args.steps = args.steps or SCHEDULES[args.size][0]
  cells = [(name, factor) for factor in FACTORS for name in RATES]
  runs = [run(args, *cell, seed) for cell in cells for seed in SEEDS]
  found = iter(sweep.Sweep(args.workdir, args.jobs).train(runs))
  results = {cell: [next(found) for _ in SEEDS] for cell in cells}
  print(tables(args, results, steps))
  to = args.workdir / folder(args)
  save(to / 'stability.json', results, steps)
  picture(to / 'stability.png', args, results, steps)


if __name__ == '__main__':
  main()
