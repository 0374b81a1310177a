"""HALO's levels: more Hadamard transforms lose less."""

from studies.claims import claim
from studies.recipes import recipes
from studies.recipes.orders import Link


def judge(lab: claim.Lab) -> claim.Finding:
  links = (Link(recipes.BASE, 'halo2', '~'), Link('halo2', 'halo0'))
  return claim.order(lab, links)


CLAIM = claim.Claim(
  title='HALO in int8: level 2 as 16 bits, level 0 worse',
  paper='Ashkboos et al., arXiv 2501.02625, 2025',
  says=(
    'fine-tuning on GSM8K in int8, level 2 is within about 1 % of BF16 and'
    ' level 0 loses about 40 %; from scratch int8 diverged at 1.1B'
  ),
  setting=f'{claim.RECIPES_SETTING}; from scratch, where theirs fine-tunes',
  judge=judge,
)

if __name__ == '__main__':
  claim.main(CLAIM)
