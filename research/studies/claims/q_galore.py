"""Q-GaLore's subspaces settle, so that most refreshes can be left out."""

import jax
import numpy as np

from frugax import config as fx_config
from frugax.optim import refreshes
from frugax.train import data, step, tokenizer
from studies import harness, sweep
from studies.claims import claim

_SAVED = 0.6


def refreshes_done(run: sweep.Run, steps: int) -> tuple[int, int]:
  """How many layers a run refreshed, and how often fixed intervals would."""
  config = fx_config.load(f'{sweep.ROOT}/configs/llama.py:{run.arguments}')
  for key, value in run.values.items():
    fx_config.override(config, key, str(value))
  program = step.build(config, jax.devices()[:1])
  state = program.init(jax.random.PRNGKey(config.seed))
  batches = data.train_batches(
    config.data,
    tokenizer.tokenizer(config.data.tokenizer),
    batch_size=config.batch_size,
    streams=data.stream_count(config.data, config.batch_size),
  )
  with jax.set_mesh(program.layout.mesh):
    for _ in range(steps):
      state, _ = program.train_step(state, program.put(next(batches)))
  batches.close()
  memories = [
    x
    for x in jax.tree.leaves(
      state.opt_state, is_leaf=lambda x: isinstance(x, refreshes.LazyMemory)
    )
    if isinstance(x, refreshes.LazyMemory)
  ]
  counts = np.concatenate([np.ravel(x.refreshes) for x in memories])
  fixed = -(-steps // config.optimizer.update_interval)
  return int(counts.sum()), fixed * counts.size


def judge(lab: claim.Lab) -> claim.Finding:
  verdict, line = claim.versus(
    lab, ('q_galore', 'packed'), ('galore', 'packed'), claim.SAME
  )
  steps = harness.WORKLOADS['packed'].steps
  saved = []
  for study in range(harness.STUDIES):
    n = lab.bench.best_trial('packed', 'q_galore', study)
    run = lab.bench.run(('packed', 'q_galore', study, n))
    done, fixed = refreshes_done(run, steps)
    saved.append(1 - done / fixed)
  fewer = claim.HOLDS if min(saved) >= _SAVED else claim.NOT
  shares = ', '.join(f'{x:.0%}' for x in saved)
  return claim.Finding(
    claim.all_of([verdict, fewer]),
    [line, f'refreshes left out in the best trials: {shares}: {fewer}'],
  )


CLAIM = claim.Claim(
  title='Q-GaLore trains as GaLore does and leaves out most of its refreshes',
  paper='Zhang et al., arXiv 2407.08296, 2024',
  says=(
    'more than 60 % of the decompositions saved; perplexity 34.88 against 34.88'
    ' at 60M, 25.53 against 25.36 at 130M'
  ),
  setting=f'{claim.setting("packed")}; of 50 refreshes a layer',
  judge=judge,
)

if __name__ == '__main__':
  claim.main(CLAIM)
