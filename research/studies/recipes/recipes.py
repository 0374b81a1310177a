"""What training with each low-bit recipe costs in loss, and in which order.

    python -m frugax.train.corpus --data_dir=data
    python research/studies/recipes/recipes.py runs/recipes | tee recipes.log

LLaMA `tiny` (1.2 M parameters, bytes) on the standard library's source: bf16
and 34 recipes, one or more of each family of `frugax.lowbit.recipe`, with AdamW
and with Stable-SPAM, three seeds, runs of 200 steps: about an hour on two CPU
cores. recipes.log: seeds differ by as much as most recipes cost, so that at
this size not one link of an order is decided. Not run by us yet: --size=10m and
--size=60m, on one GPU with --jobs=1. Interrupted, the same command goes on;
--report trains nothing and tells of the runs that are done. WORKDIR gets one
folder a run, recipes.json, recipes.png.

What is equal: model, data and their order (by seed), tokens, warm-up over a
tenth of the steps and cosine to a tenth. AdamW is that of QuEST's runs (decays
0.9 and 0.95, weight decay 0.1, gradients clipped at norm 1), Stable-SPAM that
of its paper for 4 bits (0.9 and 0.999, neither; moments reset every fifth of
the run). Each has the learning rate, among steps of a factor of two, at which
bf16 has the least mean loss of the three seeds: the search goes on until that
is not the last rate tried. No recipe was given a rate of its own, so a gap is
what one loses who changes the recipe alone. On CPUs what is not rounded is
float32, in bf16's row, too; head and embedding always are.

A gap is a recipe's validation loss less that of bf16 with the same optimizer,
rate and seed; +- is half of the 95 % interval of its mean (Student's t, three
seeds). What the papers say is put as links: "A < B" holds if the whole interval
of B's loss less A's is above 0, and is contradicted if it is below; "A ~ B"
holds if it lies within 0.02, half of what QuEST's W4A16 loses, and is
contradicted if it lies outside; all else is undecided.
- QuEST (arXiv 2502.05003): W8A8 ~ bf16 < W4A16 < W4A4 < W4A4 without Hadamard.
- The scaling law of floating-point formats (2501.02423): what E exponent and M
  mantissa bits cost falls as (E + 0.5)^3.1926 (M + 0.5)^2.9543: within each
  width, and from the best of one width to the best of the next.
- Stable-SPAM (2502.17055): 4 bits lose less with it than with AdamW, and end
  below AdamW in bf16.
A run that diverged counts as an infinite loss.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from studies import sweep
from studies.recipes import orders
from studies.recipes.orders import Link, difference
from studies.seeds import SEEDS

OPTIMIZERS = ('adamw', 'stable_spam')
BASE = 'bf16'
RATES = (1e-3, 2e-3, 4e-3)  # the first to try


@dataclasses.dataclass(frozen=True)
class Size:
  """How long a run of one size is, and on what it is judged."""

  steps: int
  batch: int
  length: int
  eval_tokens: int


SIZES = {
  'tiny': Size(200, 2, 128, 30_000),
  '10m': Size(1000, 64, 256, 200_000),
  '60m': Size(2000, 128, 256, 200_000),
}

# What each rounds: weights, activations, gradients of results, in bits. In the
# order in which they are trained.
RECIPES = {
  BASE: '',
  'quest8': 'W8 A8',
  'quest4_weights': 'W4',
  'quest4': 'W4 A4',
  'quest4_plain': 'W4 A4, no Hadamard',
  'stable_spam_int4': 'W4 A4',
  'stable_spam_fp4': 'W4 A4',
  'e2m1': 'W4, A4 of dW',
  'e1m2': 'W4, A4 of dW',
  'e3m0': 'W4, A4 of dW',
  'int8': 'W8 A8 G8',
  'int4': 'W4 A4 G8',
  'fp8': 'W8 A8 G8',
  'nvfp4': 'W4 A4 G4',
  'mxfp4': 'W4 A4 G4',
  'halo0': 'W8 A8 G8',
  'halo2': 'W8 A8 G8',
  'b1.58': 'W1.58 A8',
  'trilm': 'W1.58',
  'w8': 'W8, no copy',
  'quest1': 'W1 A1',
  'quest2': 'W2 A2',
  'quest_fp4': 'W4 A4',
  'jetfire': 'W8 A8 G8, results',
  'e2m2': 'W5, A5 of dW',
  'e3m1': 'W5, A5 of dW',
  'e3m2': 'W6, A6 of dW',
  'e2m3': 'W6, A6 of dW',
  'e4m3': 'W8, A8 of dW',
  'e5m2': 'W8, A8 of dW',
  'masked_e8m3': 'W12 A12 G12',
  'int16': 'W16 A16 G16',
  'mxfp8': 'W8 A8 G8',
  'fp8_block': 'W8 A8 G8',
  'coat': 'W8 A8 G8, norms',
}


def folder(args) -> str:
  """Of one table."""
  return f'{args.size}-{args.steps}'


def run(args, key: sweep.Key) -> sweep.Run:
  recipe, optimizer, rate, seed = key
  size = SIZES[args.size]
  steps = args.steps
  own = {
    'adamw': {'b2': 0.95, 'weight_decay': 0.1},
    'stable_spam': {
      'b2': 0.999,
      'weight_decay': 0.0,
      'reset_interval': max(steps // 5, 1),
      'total_steps': steps,
    },
  }[optimizer]
  own |= {'learning_rate': rate, 'b1': 0.9}
  values = {
    'steps': steps,
    'seed': seed,
    'batch_size': size.batch,
    'clip_norm': 1.0 if optimizer == 'adamw' else 0.0,
    'schedule.warmup_steps': steps // 10,
    'data.data_dir': args.data_dir,
    'data.sequence_length': size.length,
    'data.seed': seed,
    'eval.every': 0,
    'eval.batch_size': 8 * size.batch if args.size == 'tiny' else size.batch,
    'eval.tokens': size.eval_tokens,
    'checkpoint.every': 0,
    'log.tensorboard': False,
  } | {f'optimizer.{k}': v for k, v in own.items()}
  matmul = recipe
  if recipe == BASE and args.size == 'tiny':
    matmul = 'f32'  # as is all that the other recipes do not round
  return sweep.Run(
    f'{folder(args)}/{recipe}-{optimizer}-{rate:g}-seed{seed}',
    f'size={args.size},data=stdlib,matmul={matmul},opt={optimizer}',
    values,
  )


def losses(
  args, results: sweep.Results, recipe: str, optimizer: str, rate: float
) -> np.ndarray:
  """Of the seeds, inf where one diverged; empty if one of them is missing."""
  found = [results.of.get((recipe, optimizer, rate, seed)) for seed in SEEDS]
  if None in found:
    return np.zeros(0)
  return np.array(
    [r.eval_loss[-1] if args.steps in r.eval_step else math.inf for r in found]
  )


def tune(
  args, results: sweep.Results, optimizer: str
) -> tuple[float, dict[float, float]]:
  """The rate of the least mean loss of bf16, and the mean losses of all."""
  rates = list(RATES)
  while True:
    keys = [(BASE, optimizer, r, seed) for r in rates for seed in SEEDS]
    results.get(keys, train=not args.report)
    tried = {r: losses(args, results, BASE, optimizer, r) for r in rates}
    means = {r: own.mean() for r, own in tried.items() if own.size}
    best = min(means, key=means.get, default=math.nan)
    if rates[0] < best < rates[-1] or len(means) < len(rates):
      return best, means
    rates = sorted([*rates, best / 2 if best == rates[0] else best * 2])


QUEST = (
  Link(BASE, 'quest8', '~'),
  Link(BASE, 'quest4_weights'),
  Link('quest4_weights', 'quest4'),
  Link('quest4', 'quest4_plain'),
)


@dataclasses.dataclass(frozen=True)
class Table:
  """All losses at the rates of the optimizers.

  Attributes:
    losses: of the seeds, by recipe and optimizer, where all seeds are there.
  """

  losses: dict[tuple[str, str], np.ndarray]

  def gap(self, recipe: str, optimizer: str) -> tuple[float, float]:
    return difference(
      self.losses[recipe, optimizer], self.losses[BASE, optimizer]
    )

  def rows(self) -> list[str]:
    """One line a recipe."""
    lines = [f'{"recipe":16} {"rounded to":20}', f'{"":37}']
    for optimizer in OPTIMIZERS:
      lines[0] += f'  {optimizer:34}'
      lines[1] += f'  {"loss":>8} {"gap":>9} {"+-":>7}{"":8}'
    for recipe, rounded in RECIPES.items():
      line = f'{recipe:16} {rounded:20}'
      for optimizer in OPTIMIZERS:
        line += f'  {self._cell(recipe, optimizer):34}'
      lines.append(line.rstrip())
    return lines

  def _cell(self, recipe, optimizer):
    losses = self.losses.get((recipe, optimizer))
    if losses is None:
      return 'not all seeds yet'
    if lost := int(np.isinf(losses).sum()):
      return f'{lost} of {len(losses)} diverged'
    cell = f'{losses.mean():8.4f}'
    if recipe != BASE and (BASE, optimizer) in self.losses:
      mean, half = self.gap(recipe, optimizer)
      said = ('worse' if mean > 0 else 'better') if abs(mean) > half else ''
      cell += f' {mean:+9.4f} {half:7.4f} {said}'
    return cell

  def judged(
    self, links: Sequence[Link], optimizer: str, confidence: float = 0.95
  ) -> list[tuple[str, str]]:
    """Of each link whether it holds, or 'missing', and the line on it."""
    found = []
    for link in links:
      pair = [self.losses.get((x, optimizer)) for x in (link.right, link.left)]
      if any(losses is None for losses in pair):
        found.append(('missing', f'{link!s:32} not all seeds yet'))
        continue
      mean, half = difference(*pair, confidence)
      judgement = link.judge(mean, half)
      found.append(
        (judgement, f'{link!s:32} {mean:+.4f} +- {half:.4f} {judgement}')
      )
    return found

  def chain(
    self, name: str, links: tuple[Link, ...], optimizer: str
  ) -> list[str]:
    """The lines on one paper's order."""
    judgements, lines = zip(*self.judged(links, optimizer), strict=True)
    return [
      f'{name}, {optimizer}: {orders.verdict(judgements)}',
      *(f'  {line}' for line in lines),
    ]

  def pairs(self, optimizer: str) -> str:
    """How many pairs of formats stand in the law's order, by mean loss."""
    names = [n for n, o in self.losses if o == optimizer]
    formats = [n for own in orders.law(names).values() for n in own]
    formats.sort(key=orders.resolution, reverse=True)
    judged, right = [], 0
    for better, worse in itertools.combinations(formats, 2):
      gap = difference(
        self.losses[worse, optimizer], self.losses[better, optimizer]
      )
      right += gap[0] > 0
      judged.append(Link(better, worse).judge(*gap))
    return (
      f'scaling law, {optimizer}: of all {len(judged)} pairs of its'
      f" {len(formats)} formats {right} have means in the law's order;"
      f' {judged.count("holds")} are shown,'
      f' {judged.count("contradicted")} contradicted'
    )

  def stable_spam(self) -> list[str]:
    """What its paper promises of 4 bits."""
    lines = []
    for recipe in ('stable_spam_int4', 'stable_spam_fp4'):
      needed = [(r, o) for r in (recipe, BASE) for o in OPTIMIZERS]
      if not all(key in self.losses for key in needed):
        lines.append(f'Stable-SPAM, {recipe}: not all seeds yet')
        continue
      adamw, spam, base, base_spam = (self.losses[key] for key in needed)
      for said, right, left in (
        ('loses less with it than with AdamW', adamw - base, spam - base_spam),
        ('ends with it below AdamW in bf16', base, spam),
      ):
        mean, half = difference(right, left)
        judgement = Link('it', 'adamw').judge(mean, half)
        lines.append(
          f'Stable-SPAM, {recipe} {said}: by {mean:+.4f} +- {half:.4f},'
          f' {judgement}'
        )
    return lines


def report(table: Table, tuned: dict) -> str:
  """The table and what it says of the papers."""
  lines = ['bf16, mean validation loss by learning rate']
  for optimizer, (rate, tried) in tuned.items():
    means = (f'{r:g}: {tried[r]:.4f}' for r in sorted(tried))
    lines.append(f'{optimizer:12} {", ".join(means)}; taken: {rate:g}')
  lines += ['', *table.rows()]
  lines += [
    'loss: validation, nats a token, mean of the seeds; gap, +-: to bf16 at'
    ' equal seed,\nhalf of its 95 % interval; worse or better: the interval'
    ' leaves out 0',
    '',
  ]
  for optimizer in OPTIMIZERS:
    lines += table.chain('QuEST', QUEST, optimizer)
  for optimizer in OPTIMIZERS:
    links = orders.law_links(RECIPES)
    lines += table.chain('scaling law', links, optimizer)
    lines.append(table.pairs(optimizer))
  lines += table.stable_spam()
  return '\n'.join(lines)


def picture(path: pathlib.Path, table: Table, title: str):
  """The gaps, from the recipe that costs least."""
  from matplotlib import figure

  gaps = {
    key: table.gap(*key)
    for key in table.losses
    if key[0] != BASE and (BASE, key[1]) in table.losses
  }
  gaps = {key: gap for key, gap in gaps.items() if math.isfinite(gap[0])}
  names = sorted(
    {recipe for recipe, _ in gaps},
    key=lambda r: max(gaps[k][0] for k in gaps if k[0] == r),
  )
  fig = figure.Figure(figsize=(8, 8), dpi=130, layout='constrained')
  ax = fig.subplots()
  for i, optimizer in enumerate(OPTIMIZERS):
    at = [j for j, r in enumerate(names) if (r, optimizer) in gaps]
    own = [gaps[names[j], optimizer] for j in at]
    ax.errorbar(
      [mean for mean, _ in own],
      [j + 0.2 * (2 * i - 1) for j in at],
      xerr=[half for _, half in own],
      fmt='os'[i],
      markersize=4,
      linewidth=0.8,
      label=optimizer,
    )
  # Few bits lose a hundred times what many lose.
  ax.set_xscale('symlog', linthresh=0.05)
  ax.axvline(0, color='#888888', linewidth=0.8)
  ax.set_yticks(range(len(names)), [f'{r}  ({RECIPES[r]})' for r in names])
  ax.set_xlabel('validation loss less that of bf16, nats a token')
  ax.set_title(title, loc='left', fontsize=10)
  ax.legend(frameon=False)
  ax.grid(color='#e4e4e4', linewidth=0.7)
  fig.savefig(path)


def collect(
  args, recipes=tuple(RECIPES), optimizers=OPTIMIZERS
) -> tuple[sweep.Results, dict, list[sweep.Key], Table]:
  """Trains what is missing of the runs of recipes, unless args.report.

  Returns:
    All results; of each optimizer the rate and the means of those tried; the
    keys of the runs that were asked for; their table.
  """
  results = sweep.Results(
    args.workdir / folder(args) / 'recipes.json',
    ('recipe', 'optimizer', 'learning_rate', 'seed'),
    lambda key: run(args, key),
    sweep.Sweep(args.workdir, args.jobs),
  )
  tuned = {o: tune(args, results, o) for o in optimizers}
  # Two runs at a time then compile different programs, and each but once.
  keys = [
    (recipe, optimizer, tuned[optimizer][0], seed)
    for recipe in recipes
    for seed in SEEDS
    for optimizer in optimizers
  ]
  results.get(keys, train=not args.report)
  cells = {
    (recipe, optimizer): losses(args, results, recipe, optimizer, rate)
    for recipe in recipes
    for optimizer, (rate, _) in tuned.items()
  }
  table = Table({key: own for key, own in cells.items() if own.size})
  return results, tuned, keys, table


def main():
  parser = sweep.parser(__doc__)
  parser.add_argument('--size', choices=tuple(SIZES), default='tiny')
  parser.add_argument(
    '--steps', type=int, default=0, help='0: that of the size'
  )
  args = parser.parse_args()
  args.steps = args.steps or SIZES[args.size].steps
  results, tuned, keys, table = collect(args)
  size, there = SIZES[args.size], [key for key in keys if key in results.of]
  print(
    f'{args.size}, {args.steps} steps of {size.batch} x {size.length} tokens,'
    f' {len(SEEDS)} seeds'
  )
  print('\n'.join(results.origins(there)))
  if missing := len(keys) - len(there):
    print(f'NOT COMPLETE: {missing} of {len(keys)} runs are missing')
  print(f'\n{report(table, tuned)}')
  picture(
    args.workdir / folder(args) / 'recipes.png',
    table,
    f'{args.size}, {args.steps} steps; mean and 95 % interval of'
    f' {len(SEEDS)} seeds',
  )


if __name__ == '__main__':
  main()
