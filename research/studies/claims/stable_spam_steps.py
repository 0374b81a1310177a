"""In 4 bits Stable-SPAM needs half of Adam's steps."""

from studies.claims import claim


def judge(lab: claim.Lab) -> claim.Finding:
  return claim.headed(
    claim.versus(lab, ('stable_spam', 'int4_half'), ('adamw', 'int4'), 0.0)
  )


CLAIM = claim.Claim(
  title="In 4 bits Stable-SPAM reaches Adam's loss in half the steps",
  paper='Huang et al., arXiv 2502.17055, 2025',
  says='the loss of Adam in INT4 in about half the steps',
  setting=(
    f'{claim.setting("int4")}; Stable-SPAM has half the steps, a schedule of'
    ' its own'
  ),
  judge=judge,
)

if __name__ == '__main__':
  claim.main(CLAIM)
