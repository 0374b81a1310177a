"""GaLore trains as well as Adam in as many steps."""

import math

from studies.claims import claim

# What its paper lost at 60M, as a share of the loss.
_SHARE = math.log(34.88) / math.log(34.06) - 1


def judge(lab: claim.Lab) -> claim.Finding:
  return claim.headed(
    claim.versus(lab, ('galore', 'packed'), ('adamw', 'packed'), _SHARE)
  )


CLAIM = claim.Claim(
  title='GaLore trains as well as Adam in as many steps',
  paper='Zhao et al., arXiv 2403.03507, 2024',
  says=(
    'perplexity on C4 34.88 against 34.06 at 60M, 15.64 against 15.56 at 1B: a'
    f' loss {_SHARE:.1%} higher at most'
  ),
  setting=claim.setting('packed'),
  judge=judge,
)

if __name__ == '__main__':
  claim.main(CLAIM)
