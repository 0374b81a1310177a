"""Fira ends below GaLore."""

from studies.claims import claim


def judge(lab: claim.Lab) -> claim.Finding:
  return claim.headed(
    claim.versus(lab, ('fira', 'packed'), ('galore', 'packed'), 0.0)
  )


CLAIM = claim.Claim(
  title='Fira ends below GaLore',
  paper='Chen et al., arXiv 2410.01623, 2024',
  says=(
    'perplexity on C4 31.06 against 34.88 at 60M, 14.31 against 15.64 at 1B;'
    ' the scripts print losses times N / (N + 1), which flatters the 1B row by'
    ' some 2 %'
  ),
  setting=claim.setting('packed'),
  judge=judge,
)

if __name__ == '__main__':
  claim.main(CLAIM)
