"""Stable-SPAM in 4 bits ends below Adam in 16."""

from studies.claims import claim


def judge(lab: claim.Lab) -> claim.Finding:
  return claim.headed(
    claim.versus(lab, ('stable_spam', 'int4'), ('adamw', 'packed'), 0.0)
  )


CLAIM = claim.Claim(
  title='Stable-SPAM in 4 bits ends below Adam in 16',
  paper='Huang et al., arXiv 2502.17055, 2025',
  says=(
    'INT4 24.33 / 17.76 / 17.42 against BF16 24.53 / 21.38 / 19.73 at 130M,'
    ' 350M, 1B, 20,000 steps each'
  ),
  setting=(
    f'{claim.setting("int4")}; Adam there multiplies in float32, which on a'
    ' CPU stands for bfloat16'
  ),
  judge=judge,
)

if __name__ == '__main__':
  claim.main(CLAIM)
