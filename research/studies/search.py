"""Which combination of parts is best for its bytes: how `frugal` was chosen.

    python research/studies/search.py runs/benchmark | tee search.log

Every combination of studies/methods.CANDIDATES, which change one part of a
first one, gets the four trials of the first study on the benchmark's packed
documents. Those that hold at most a tenth of Adam's state for the linears of
the layers are ranked by their least final loss; the best of them, and the first
one, get the other two studies, so that the choice is judged on seeds and
hyper-parameters that it was not made by.
"""

import pathlib

import jax

from frugax import config as fx_config
from frugax.models import llama
from frugax.optim import state as state_lib
from frugax.train import optimizer as fx_optimizer
from studies import harness, sweep
from studies.claims import claim
from studies.methods import CANDIDATES
from studies.recipes import orders

LIMIT = 0.1
FIRST = 'ours'
WORKLOAD = 'packed'


def share(run: sweep.Run) -> float:
  """State of the layers' linears over that of Adam in float32 for them."""
  config = fx_config.load(f'{sweep.ROOT}/configs/llama.py:{run.arguments}')
  for key, value in run.values.items():
    fx_config.override(config, key, str(value))
  fields = config.model.to_dict()
  model = llama.Llama(llama.config(fields.pop('size'), **fields))
  shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0))
  tx, _ = fx_optimizer.make_optimizer(config, shapes, model.axes())
  own, _ = state_lib.parameter_bytes(tx, shapes)
  held = adam = 0
  for (path, x), size in zip(
    jax.tree.leaves_with_path(shapes), jax.tree.leaves(own), strict=True
  ):
    names = [key.key for key in path]
    if 'layers' in names and names[-1] == 'kernel':
      held += size
      adam += 8 * x.size
  return held / adam


def main():
  args = claim.parser(__doc__.splitlines()[0]).parse_args()
  bench = harness.Benchmark(
    pathlib.Path(args.workdir), args.data_dir, args.jobs, not args.report
  )
  bench.get(WORKLOAD, CANDIDATES, studies=[0])
  steps = harness.WORKLOADS[WORKLOAD].steps
  found = {}
  for name in CANDIDATES:
    trials = bench.study(WORKLOAD, name, 0)
    if len(trials) == harness.TRIALS:
      least = min(r.final(steps) for r in trials)
      found[name] = (least, share(bench.run((WORKLOAD, name, 0, 0))))
  print('\n'.join(bench.origins()))
  print(f'\n{"":18}{"loss":>9}{"of Adam":>9}  first study')
  for name, (least, held) in sorted(found.items(), key=lambda item: item[1]):
    over = ' more than a tenth' if held > LIMIT else ''
    print(f'{name:18}{least:9.4f}{held:9.1%}{over}')
  allowed = {n: least for n, (least, held) in found.items() if held <= LIMIT}
  if not allowed:
    return
  best = min(allowed, key=allowed.get)
  chosen = dict.fromkeys([best, FIRST])
  bench.get(WORKLOAD, [*chosen, harness.BASE])
  if not all(bench.whole(WORKLOAD, n) for n in [*chosen, harness.BASE]):
    print(f'\n{best} is best; its other studies are missing')
    return
  base = bench.finals(WORKLOAD, harness.BASE)
  print()
  for name in chosen:
    finals = bench.finals(WORKLOAD, name)
    mean, half = orders.difference(finals, base)
    print(
      f'{name}: {mean:+.4f} +- {half:.4f} nats a token over tuned'
      f' {harness.BASE}, three studies'
    )


if __name__ == '__main__':
  main()
