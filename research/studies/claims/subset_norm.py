"""Subset norms reach Adam's loss in about half the tokens."""

from studies.claims import claim


def judge(lab: claim.Lab) -> claim.Finding:
  return claim.all_of(
    [
      claim.versus(lab, (name, 'half'), ('adamw', 'packed'), 0.0)
      for name in ('adam_sn', 'snsm')
    ]
  )


CLAIM = claim.Claim(
  title="Subset norms (adam_sn, snsm) reach Adam's loss in half the tokens",
  paper='Nguyen and Nguyen, arXiv 2411.07120, 2024',
  says=(
    "snsm reaches Adam's perplexity at 1B with 6.8B instead of 13.1B tokens,"
    ' with a fifth of its memory'
  ),
  setting=(
    f'{claim.setting("packed")}; theirs have half the steps, a schedule of'
    ' their own'
  ),
  judge=judge,
)

if __name__ == '__main__':
  claim.main(CLAIM)
