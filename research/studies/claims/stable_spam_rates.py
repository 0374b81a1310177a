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
  lab.uses({key: results.of[key] for key in keys})
  entropy, *_ = lab.measured('entropy', lambda: [stability.entropy(args)])
  grid = stability.Grid(results.of, _STEPS, entropy)
  parts = []
  for what, fates in (
    ('diverges', (stability.DIVERGED,)),
    ('is lost', (stability.DIVERGED, stability.NOTHING)),
  ):
    first = {n: grid.first(n, fates, 1) for n in (*_OTHERS, 'stable_spam')}
    for name in _OTHERS:
      later = _rate(first['stable_spam']) > _rate(first[name])
      verdict = claim.HOLDS if later else claim.NOT
      line = ', '.join(f'{n} {first[n]}' for n in (name, 'stable_spam'))
      parts.append((verdict, f'first rate at which a seed {what}: {line}'))
  return claim.all_of([(v, f'{line}: {v}') for v, line in parts])


def _rate(text):
  return float('inf') if text == 'none' else float(text)


CLAIM = claim.Claim(
  title='Stable-SPAM trains at learning rates at which Adam and SPAM are lost',
  paper='Huang et al., arXiv 2502.17055, 2025',
  says='in 4 bits it stays stable over rates at which Adam and SPAM diverge',
  setting=(
    f'LLaMA tiny, simulated FP4, {_STEPS} steps, eight rates a factor of three'
    f' apart, {len(SEEDS)} seeds; diverges: ends above guessing, or 0.5 nats'
    ' above its least loss; is lost: diverges, or ends no better than the'
    ' entropy of the bytes (studies/stability). By counts of seeds, without an'
    ' interval; from one commit to the next single losses differed by up to'
    ' 0.04'
  ),
  judge=judge,
)

if __name__ == '__main__':
  claim.main(CLAIM)
