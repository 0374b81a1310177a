"""Stable-SPAM trains at learning rates at which Adam is lost."""

from studies.claims import claim
from studies.seeds import SEEDS
from studies.stability import stability

_STEPS = stability.SCHEDULES['tiny'][0]


def judge(lab: claim.Lab) -> claim.Finding:
  args = lab.arguments(size='tiny', matmul='fp4_sim', steps=_STEPS)
  results, keys = stability.collect(args, ('adamw', 'stable_spam'))
  if not all(key in results.of for key in keys):
    raise claim.Missing('runs of studies/stability are missing')
  grid = stability.Grid(results.of, _STEPS, stability.entropy(args))
  tried = _rates(stability.FACTORS)
  kept, lines = {}, []
  for name in ('adamw', 'stable_spam'):
    factors = [
      f for f in stability.FACTORS if grid.fates(name, f)[''] == len(SEEDS)
    ]
    kept[name] = max(factors, default=0)
    best = grid.mean(name, grid.best(name)) if factors else float('nan')
    lines.append(
      f'{name}: no seed lost at {_rates(factors)} of {tried}; best mean loss'
      f' {best:.4f}'
    )
  ratio = kept['stable_spam'] / kept['adamw'] if kept['adamw'] else 0
  verdict = claim.HOLDS if ratio > 1 else claim.NOT
  lines.append(
    f'the greatest rate of Stable-SPAM is {ratio:g} times that of Adam:'
    f' {verdict} (by counts of three seeds, without an interval)'
  )
  return claim.Finding(verdict, lines)


def _rates(factors):
  """Multiples of the least rate, which is 0.001 for both."""
  return ', '.join(f'{f / 1e3:g}' for f in factors)


CLAIM = claim.Claim(
  title='Stable-SPAM trains at learning rates at which Adam is lost',
  paper='Huang et al., arXiv 2502.17055, 2025',
  says='in 4 bits it stays stable over rates at which Adam and SPAM diverge',
  setting=(
    f'LLaMA tiny, simulated FP4, {_STEPS} steps, eight rates a factor of three'
    ' apart, three seeds; lost: diverged, or no better than the entropy of the'
    ' bytes (studies/stability)'
  ),
  judge=judge,
)

if __name__ == '__main__':
  claim.main(CLAIM)
