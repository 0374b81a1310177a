"""All claims, one after the other.

    python research/studies/workloads.py --data_dir=data
    python -m studies.claims runs/benchmark | tee claims.log

Interrupted, the same command goes on with the runs that are missing.
"""

from studies import sweep
from studies.claims import (
  claim,
  coap,
  exmy,
  fira,
  galore,
  halo,
  q_galore,
  quest,
  ratchet,
  stable_spam_16bit,
  stable_spam_rates,
  stable_spam_steps,
  subset_norm,
  svd,
  ternary,
)

ALL = {
  module.__name__.rsplit('.', 1)[-1]: module.CLAIM
  for module in (
    *(galore, q_galore, coap, fira, subset_norm, stable_spam_steps),
    *(stable_spam_rates, stable_spam_16bit, ratchet, halo, quest, ternary),
    *(exmy, svd),
  )
}


def main():
  parser = sweep.parser(__doc__)
  parser.add_argument('--only', nargs='*', choices=tuple(ALL), default=())
  args = parser.parse_args()
  lab = claim.lab_of(args)
  for name in args.only or ALL:
    try:
      print(claim.told(ALL[name], lab)[1], end='\n\n', flush=True)
    except claim.Missing as missing:
      print(f'{ALL[name].title}\n  not told: {missing}\n', flush=True)


if __name__ == '__main__':
  main()
