"""A ternary model needs twice the width to train as well."""

from studies.claims import claim


def judge(lab: claim.Lab) -> claim.Finding:
  wide = claim.versus(
    lab, ('adamw', 'ternary_wide'), ('adamw', 'packed'), claim.SAME
  )
  # That the width is needed is the other half of the claim.
  same, line = claim.versus(lab, ('adamw', 'ternary'), ('adamw', 'packed'), 0.0)
  needed = {claim.HOLDS: claim.NOT, claim.NOT: claim.HOLDS}.get(same, same)
  return claim.headed(
    wide, (needed, f'{line} (so that the width is needed {needed})')
  )


CLAIM = claim.Claim(
  title='With twice the width ternary weights train as well as 16 bits',
  paper='Nielsen and Schneider-Kamp, arXiv 2407.09527, 2024',
  says='small language models of ternary weights match 16 bits at twice the'
  ' hidden size, and not at the same',
  setting=f'{claim.setting("ternary")}; b1.58 against float32',
  judge=judge,
)

if __name__ == '__main__':
  claim.main(CLAIM)
