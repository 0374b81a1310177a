"""Stable-SPAM trains at learning rates at which Adam is lost."""

from studies.claims import claim
from studies.seeds import SEEDS
from studies.stability import stability

_STEPS = stability.SCHEDULES['tiny'][0]


_OTHERS = ('adamw', 'spam')


def judge(lab: claim.Lab) -> claim.Finding:
  args = lab.arguments(size='tiny', matmul='fp4_sim', steps=_STEPS)
  results, keys = stability.collect(args, (*_OTHERS, 'stable_spam'))
  if missing := [key for key in keys if key not in results.of]:
    raise claim.Missing(f'studies/stability: {len(missing)} runs are missing')
  lab.origins += results.origins(keys)
  grid = stability.Grid(results.of, _STEPS, stability.entropy(args))
  first, lines = {}, []
  for name in (*_OTHERS, 'stable_spam'):
    lost = [
      f for f in stability.FACTORS if grid.fates(name, f)[''] < len(SEEDS)
    ]
    # The least rate, of those tried, at which a seed is lost.
    first[name] = min(lost, default=float('inf'))
    lines.append(
      f'{name}: a seed of {len(SEEDS)} is lost from {first[name] / 1e3:g} on'
    )
  verdicts = [
    claim.HOLDS if first['stable_spam'] > first[name] else claim.NOT
    for name in _OTHERS
  ]
  lines.append('by counts of seeds at eight rates, without an interval')
  return claim.Finding(claim.all_of(verdicts), lines)


CLAIM = claim.Claim(
  title='Stable-SPAM trains at learning rates at which Adam and SPAM are lost',
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
