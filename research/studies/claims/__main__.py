"""All claims, one after the other.

    python -m frugax.train.corpus --data_dir=data
    python -m studies.claims runs/benchmark | tee claims.log

Interrupted, the same command goes on with the runs that are missing. What came
of each is kept in WORKDIR/claims.json, with the code and the machine it ran on.
"""

import dataclasses
import json
import os

from frugax.train import metrics
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
  parser = claim.parser('All claims.')
  parser.add_argument('--only', nargs='*', choices=tuple(ALL), default=())
  args = parser.parse_args()
  lab = claim.lab_of(args)
  path = args.workdir / 'claims.json'
  info = metrics.run_info()
  origin = (
    f'commit {info["commit"][:12]}{" (changed)" * bool(info["dirty"])}, jax'
    f' {info["jax"]}, {info["hardware"]["device_kind"]}, {os.cpu_count()} cores'
  )
  for name in args.only or ALL:
    try:
      finding = ALL[name].judge(lab)
    except claim.Missing as missing:
      print(f'{ALL[name].title}\n  not told: {missing}\n', flush=True)
      continue
    print(claim.told(ALL[name], finding), end='\n\n', flush=True)
    if not args.report:
      known = json.loads(path.read_text()) if path.exists() else {}
      known[name] = dataclasses.asdict(finding) | {'origin': origin}
      path.write_text(json.dumps(known, indent=1) + '\n')


if __name__ == '__main__':
  main()
