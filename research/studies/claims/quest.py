"""QuEST in 4 bits comes close to 16, and its parts are needed."""

from studies.claims import claim
from studies.recipes import recipes


def judge(lab: claim.Lab) -> claim.Finding:
  return claim.order(lab, recipes.QUEST)


CLAIM = claim.Claim(
  title='QuEST: 8 bits as 16, then 4-bit weights, 4 bits, 4 without Hadamard',
  paper='Panferov et al., arXiv 2502.05003, 2025',
  says='W8A8 ~ bf16 < W4A16 < W4A4 < W4A4 without Hadamard',
  setting=claim.RECIPES_SETTING,
  judge=judge,
)

if __name__ == '__main__':
  claim.main(CLAIM)
