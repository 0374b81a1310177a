"""A second moment in bfloat16 can hardly shrink, which costs Adam loss."""

from studies.claims import claim


def judge(lab: claim.Lab) -> claim.Finding:
  verdicts, lines = zip(
    # By how much the float32 state ends lower, which is to be more than 0.
    claim.versus(
      lab, ('adamw_999', 'packed'), ('adamw_bf16_999', 'packed'), 0.0
    ),
    # Tuned, b2 avoids it.
    claim.versus(
      lab, ('adamw_bf16', 'packed'), ('adamw', 'packed'), claim.SAME
    ),
    strict=True,
  )
  return claim.Finding(claim.all_of(verdicts), lines)


CLAIM = claim.Claim(
  title="Adam's state in bfloat16 costs loss unless b2 is tuned",
  paper='our own reading of the published tables; tests/optim/ratchet_test.py',
  says=(
    'with b2 = 0.999 a step shrinks the second moment by less than half of the'
    ' spacing of bfloat16, so that it never falls'
  ),
  setting=claim.setting('packed'),
  judge=judge,
)

if __name__ == '__main__':
  claim.main(CLAIM)
