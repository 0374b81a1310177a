"""At which learning rates 4-bit training diverges, with which optimizer.

    python -m frugax.train.corpus --data_dir=data
    python research/studies/stability/stability.py runs/stability \
      | tee stability.log

LLaMA `tiny` (1.2 M parameters, bytes) on the standard library's source, with
the 4-bit weights and activations of the Stable-SPAM paper, simulated
(matmul=fp4_sim, or --matmul=int4_sim or f32): five optimizers at eight learning
rates with three seeds, 120 runs of 200 steps, an hour on two CPU cores. Not run
by us yet: --size=10m and --size=60m, on one GPU with --jobs=1.

WORKDIR gets a folder with one folder a run, stability.json and stability.png.
Interrupted, the same command goes on; --report tells of the runs that are done.
Runs that stability.json tells of are not
trained again, whatever commit they are of: copy the one beside this file there
to add to it. The table says which commits its runs are of.

What is equal: model, data and their order (by seed), tokens, batch, warm-up
over a tenth of the steps and cosine to a tenth, no weight decay, no clipping of
the gradient's norm, b1=0.9, b2=0.999. Rates are multiples of each method's own:
subset norms sum the squares that Adam averages, so their step is smaller and
their published rates ten times larger.

Of 20,000 steps the papers reset the moments every 500; here it is every fifth
of the run, since a fortieth would be 5 steps, and SPAM's warm-up after a reset
is 3/10 of the interval, as theirs. The other arguments are the papers' for 4
bits.

What becomes of a run, by its validation losses at every tenth of the steps:
- it diverged if the loss stopped being finite, if the last one is above ln(320)
  = 5.77, the loss of guessing among all 320 tokens, where every run starts, or
  if the last one is more than 0.5 above the least;
- else it learned nothing if the last one is not below the entropy of the bytes
  that are predicted, as a model that looks at no context could do as well.
The five lower rates had been run, and judged by the rise of the training loss
alone, when this was written; the three upper ones had not.
"""

import collections
import math
import pathlib

import numpy as np

from frugax.models import llama
from frugax.train import data, tokenizer
from studies import sweep
from studies.seeds import SEEDS

# steps, batch size; a tenth of the steps is warm-up
SCHEDULES = {'tiny': (200, 4), '10m': (1000, 64), '60m': (2000, 128)}
FACTORS = (1, 3, 10, 30, 100, 300, 1000, 3000)
RISE = 0.5  # nats
VOCABULARY = 320  # of data=stdlib in configs/llama.py
EVAL_TOKENS = {'tiny': 10_000, '10m': 200_000, '60m': 200_000}
DIVERGED, NOTHING = 'diverged', 'learned nothing'

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


def fate(result: sweep.Result, steps: int, entropy: float) -> str:
  """DIVERGED, NOTHING or '', by the rules at the top of the file."""
  if not result.eval_step or result.eval_step[-1] < steps:
    return DIVERGED
  last, least = result.eval_loss[-1], min(result.eval_loss)
  if last > math.log(VOCABULARY) or last > least + RISE:
    return DIVERGED
  return NOTHING if last >= entropy else ''


def steps_to(result: sweep.Result, loss: float) -> float:
  """Step at which the validation loss first is as low; NaN if never."""
  steps, losses = np.array(result.eval_step), np.array(result.eval_loss)
  below = np.flatnonzero(losses <= loss)
  if not below.size:
    return math.nan
  i = below[0]
  if not i:
    return float(steps[0])
  return float(np.interp(-loss, -losses[i - 1 : i + 1], steps[i - 1 : i + 1]))


def folder(args) -> str:
  """Of one heat map."""
  return f'{args.size}-{args.matmul}-{args.steps}'


def learning_rate(name: str, factor: float) -> float:
  return float(f'{RATES[name] * factor:.4g}')


def run(args, key: sweep.Key) -> sweep.Run:
  name, rate, seed = key
  steps, batch = args.steps, SCHEDULES[args.size][1]
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
    'eval.tokens': EVAL_TOKENS[args.size],
    'checkpoint.every': 0,
    'log.every': 1,
    'log.tensorboard': False,
  } | {f'optimizer.{k}': v for k, v in optimizer.items()}
  return sweep.Run(
    f'{folder(args)}/{name}-{rate:g}-seed{seed}',
    f'size={args.size},data=stdlib,matmul={args.matmul},opt={name}',
    values,
  )


def entropy(args) -> float:
  """That of the bytes which the validation predicts, in nats a byte."""
  eval_set = data.eval_batches(
    data.DataConfig(data_dir=args.data_dir, sequence_length=256),
    tokenizer.tokenizer('bytes'),
    batch_size=8,
    tokens=EVAL_TOKENS[args.size],
  )
  labels = np.concatenate([batch['labels'].ravel() for batch in eval_set])
  shares = np.bincount(labels[labels >= 0]) / np.count_nonzero(labels >= 0)
  shares = shares[shares > 0]
  return float(-(shares * np.log(shares)).sum())


class Grid:
  """All results as rows of optimizers and columns of rates."""

  def __init__(
    self, results: dict[sweep.Key, sweep.Result], steps: int, entropy: float
  ):
    self.steps, self.entropy = steps, entropy
    self.cells = {
      (name, factor): [
        results[key]
        for seed in SEEDS
        if (key := (name, learning_rate(name, factor), seed)) in results
      ]
      for name in RATES
      for factor in FACTORS
    }

  def fates(self, name: str, factor: float) -> collections.Counter:
    return collections.Counter(
      fate(result, self.steps, self.entropy)
      for result in self.cells[name, factor]
    )

  def mean(self, name: str, factor: float) -> float:
    """Mean last loss of the seeds that did not diverge."""
    kept = [
      r.eval_loss[-1]
      for r in self.cells[name, factor]
      if fate(r, self.steps, self.entropy) != DIVERGED
    ]
    return float(np.mean(kept)) if kept else math.nan

  def best(self, name: str) -> float | None:
    """The factor of the least mean among those where no seed was lost."""
    whole = [f for f in FACTORS if self.fates(name, f)[''] == len(SEEDS)]
    return min(whole, key=lambda f: self.mean(name, f), default=None)

  def first(self, name: str, fates: tuple[str, ...], seeds: int) -> str:
    """The lowest rate at which so many seeds had such a fate."""
    for factor in FACTORS:
      found = self.fates(name, factor)
      if sum(found[fate] for fate in fates) >= seeds:
        return f'{learning_rate(name, factor):g}'
    return 'none'


def tables(grid: Grid) -> str:
  """What becomes of the runs, and the best of them."""
  steps = grid.steps
  lines = [
    'validation loss in nats a byte, mean of the seeds that did not diverge;'
    ' of the seeds,\nhow many diverged (d) and how many learned nothing (n):'
    f' no less than {grid.entropy:.4f}',
    f'{"x its own rate":18}' + ''.join(f'{f:>13g}' for f in FACTORS),
  ]
  for name, rate in RATES.items():
    cells = []
    for factor in FACTORS:
      fates, mean = grid.fates(name, factor), grid.mean(name, factor)
      said = '' if math.isnan(mean) else f'{mean:.4f}'
      lost = f'{fates[DIVERGED]}d' if fates[DIVERGED] else ''
      lost += f'{fates[NOTHING]}n' if fates[NOTHING] else ''
      cells.append(f'{said} {lost:>4}')
    lines.append(f'{name:12}{rate:6g}' + ''.join(f'{c:>13}' for c in cells))

  lines += ['', f'{"lowest rate at which":20}']
  lines[-1] += f'{"a seed":>12} {"diverged, all":>14}'
  lines[-1] += f'{"a seed":>12} {"was lost (either), all":>23}'
  lost = (DIVERGED, NOTHING)
  for name in RATES:
    line = f'{name:20}'
    line += f'{grid.first(name, (DIVERGED,), 1):>12}'
    line += f' {grid.first(name, (DIVERGED,), len(SEEDS)):>14}'
    line += f'{grid.first(name, lost, 1):>12}'
    line += f' {grid.first(name, lost, len(SEEDS)):>23}'
    lines.append(line)

  lines += ['', f'{"best rate":12} {"loss":>8} {"std":>7} {"- adamw":>8}']
  lines[-1] += f' {"steps to the final loss of adamw":>34}'
  target = grid.best('adamw')
  for name, rate in RATES.items():
    factor = grid.best(name)
    if factor is None:
      lines.append(f'{name:12} was lost at every rate')
      continue
    group = grid.cells[name, factor]
    losses = np.array([r.eval_loss[-1] for r in group])
    line = f'{name:12} {losses.mean():8.4f} {losses.std(ddof=1):7.4f}'
    if target is not None:
      line += f' {losses.mean() - grid.mean("adamw", target):+8.4f}'
      needed = [
        steps_to(r, t.eval_loss[-1])
        for r, t in zip(group, grid.cells['adamw', target], strict=True)
      ]
      shares = ', '.join(
        'never' if math.isnan(n) else f'{n:.0f}' for n in needed
      )
      line += f'  {shares} of {steps}'
    lines.append(f'{line}  at {rate * factor:g}')
  lines.append(
    'steps: by seed, from validation losses at every tenth of the run,'
    ' straight lines between; a whole run of its own schedule'
  )
  return '\n'.join(lines)


def picture(path: pathlib.Path, grid: Grid, title: str):
  """The heat map."""
  from matplotlib import figure

  shape = len(RATES), len(FACTORS)
  fig = figure.Figure(figsize=(10, 4.5), dpi=130, layout='constrained')
  ax = fig.subplots()
  means = np.array([[grid.mean(n, f) for f in FACTORS] for n in RATES])
  for i, name in enumerate(RATES):
    for j, factor in enumerate(FACTORS):
      fates = grid.fates(name, factor)
      lines = [] if math.isnan(means[i, j]) else [f'{means[i, j]:.3f}']
      for fate in (DIVERGED, NOTHING):
        if fates[fate]:
          lines.append(f'{fates[fate]} of {len(SEEDS)}\n{fate}')
      ax.text(j, i, '\n'.join(lines), ha='center', va='center', fontsize=7)
  ax.set_facecolor('#999999')  # of cells where all diverged
  image = ax.imshow(
    np.ma.masked_invalid(means),
    cmap='YlOrRd',
    aspect='auto',
    alpha=0.6,
    vmax=grid.entropy,
  )
  fig.colorbar(image, label='validation loss, nats a byte', extend='max')
  ax.set_yticks(
    range(shape[0]), [f'{n} ({rate:g})' for n, rate in RATES.items()]
  )
  ax.set_xticks(range(shape[1]), [f'{f:g}' for f in FACTORS])
  ax.set_xlabel('learning rate, as a multiple of the one in brackets')
  ax.set_title(
    f'{title}; mean loss of the seeds that did not diverge',
    loc='left',
    fontsize=10,
  )
  fig.savefig(path)


def collect(args, names=tuple(RATES)) -> tuple[sweep.Results, list[sweep.Key]]:
  """Trains what is missing of the runs of optimizers, unless args.report.

  Returns:
    All results, and the keys of those that were asked for.
  """
  to = args.workdir / folder(args)
  results = sweep.Results(
    to / 'stability.json',
    ('optimizer', 'learning_rate', 'seed'),
    lambda key: run(args, key),
    sweep.Sweep(args.workdir, args.jobs),
  )
  keys = [
    (name, learning_rate(name, factor), seed)
    for factor in FACTORS
    for name in names
    for seed in SEEDS
  ]
  results.get(keys, train=not args.report)
  return results, keys


def main():
  parser = sweep.parser(__doc__)
  parser.add_argument('--size', choices=tuple(SCHEDULES), default='tiny')
  parser.add_argument('--matmul', default='fp4_sim')
  parser.add_argument(
    '--steps', type=int, default=0, help='0: that of the size'
  )
  args = parser.parse_args()
  args.steps = args.steps or SCHEDULES[args.size][0]
  to = args.workdir / folder(args)
  results, keys = collect(args)
  keys, wanted = [key for key in keys if key in results.of], len(keys)
  grid = Grid(results.of, args.steps, entropy(args))
  title = f'{args.size}, {args.matmul}, {args.steps} steps'
  print('\n'.join([title, *results.origins(keys)]), end='\n\n')
  if missing := wanted - len(keys):
    print(f'NOT COMPLETE: {missing} of {wanted} runs are missing\n')
  print(tables(grid))
  picture(to / 'stability.png', grid, title)


if __name__ == '__main__':
  main()
