"""A second moment in bfloat16 can hardly shrink, which costs Adam loss."""

from studies import harness
from studies.claims import claim
from studies.recipes import orders

_CHOICE = (5e-4, 0.999)  # the rate at which weights are sensitive to it


def judge(lab: claim.Lab) -> claim.Finding:
  exact = lab.finals('adamw', 'long', _CHOICE)
  rounded = lab.finals('adamw_bf16', 'long', _CHOICE)
  mean, half = orders.difference(exact, rounded)
  costs = claim.at_most(mean, half, 0.0)
  line = (
    f'rate 5e-4, b2 = 0.999: state in float32 {exact.mean():.4f}, in bfloat16'
    f' {rounded.mean():.4f}: {mean:+.4f} +- {half:.4f}, at most 0: {costs}'
  )
  tuned, tuned_line = claim.versus(
    lab, ('adamw_bf16', 'packed'), ('adamw', 'packed'), claim.SAME
  )
  return claim.headed((costs, line), (tuned, f'tuned: {tuned_line}'))


CLAIM = claim.Claim(
  title="Adam's state in bfloat16 costs loss unless b2 is tuned",
  paper='our own reading of the published tables; tests/optim/ratchet_test.py',
  says=(
    'with b2 = 0.999 a step shrinks the second moment by less than half of the'
    ' spacing of bfloat16, so that it never falls'
  ),
  setting=(
    f'1,500 steps (workload long) of one choice, {len(harness.FRESH)} seeds;'
    f' and {claim.setting("packed")}'
  ),
  judge=judge,
)

if __name__ == '__main__':
  claim.main(CLAIM)
