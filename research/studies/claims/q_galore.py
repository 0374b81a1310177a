"""Q-GaLore's subspaces settle, so that most refreshes can be left out."""

import jax
import numpy as np

from frugax.optim import refreshes
from frugax.train import data, step, tokenizer
from studies import harness, sweep
from studies.claims import claim
from studies.methods import REFRESHES
from studies.workloads import WORKLOADS

_SAVED = 0.6
_WORKLOAD = 'packed'


def left_out(run: sweep.Run, steps: int) -> float:
  """The share of the refreshes at fixed intervals that a run leaves out."""
  config = run.config()
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

  def is_memory(x):
    return isinstance(x, refreshes.LazyMemory)

  memories = jax.tree.leaves(state.opt_state, is_leaf=is_memory)
  counts = np.concatenate(
    [np.ravel(x.refreshes) for x in memories if is_memory(x)]
  )
  return float(1 - counts.mean() / REFRESHES)


def judge(lab: claim.Lab) -> claim.Finding:
  names = ('q_galore', 'galore')
  seldom = claim.versus(lab, *((n, _WORKLOAD) for n in names), claim.SAME)
  choices = [lab.bench.best(_WORKLOAD, n) for n in names]
  often = claim.versus(
    lab, *((f'{n}_often', _WORKLOAD) for n in names), claim.SAME, choices
  )
  steps = WORKLOADS[_WORKLOAD].steps

  def measure():
    key = (_WORKLOAD, 'q_galore_often', *choices[0])
    return [
      left_out(lab.bench.run((*key, seed)), steps) for seed in harness.FRESH[:3]
    ]

  saved = lab.measured('q_galore', measure)
  fewer = claim.HOLDS if min(saved) >= _SAVED else claim.NOT
  shares = ', '.join(f'{x:.0%}' for x in saved)
  return claim.all_of(
    [
      seldom,
      often,
      (
        fewer,
        f'refreshes that q_galore_often leaves out, three seeds: {shares}, at'
        f' least 60 %: {fewer}',
      ),
    ]
  )


CLAIM = claim.Claim(
  title='Q-GaLore trains as GaLore does and leaves out most of its refreshes',
  paper='Zhang et al., arXiv 2407.08296, 2024',
  says=(
    'more than 60 % of the decompositions saved; perplexity 34.88 against 34.88'
    ' at 60M, 25.53 against 25.36 at 130M'
  ),
  setting=(
    f'{claim.setting(_WORKLOAD)}; often: the same choices with subspaces found'
    f' anew {REFRESHES} times a run, as in their runs at 60M'
  ),
  judge=judge,
)

if __name__ == '__main__':
  claim.main(CLAIM)
