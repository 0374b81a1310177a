"""The order of floating-point formats that the scaling law gives."""

from studies.claims import claim
from studies.recipes import orders, recipes


def judge(lab: claim.Lab) -> claim.Finding:
  return claim.order(lab, orders.law_links(recipes.RECIPES))


CLAIM = claim.Claim(
  title='Floating-point formats stand in the order of their scaling law',
  paper='Sun et al., arXiv 2501.02423, 2025',
  says='what a format costs falls as (E + 0.5)^3.1926 (M + 0.5)^2.9543',
  setting=claim.RECIPES_SETTING,
  judge=judge,
)

if __name__ == '__main__':
  claim.main(CLAIM)
