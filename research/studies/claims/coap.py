"""COAP trains as Adam does, and costs 2 % of time."""

import numpy as np

from frugax import config as fx_config
from studies import bench_step, sweep
from studies.claims import claim

_GAP = 0.004  # nats: 15.62 against 15.56
_OVERHEAD = 1.02
_CYCLE = 160  # steps: five refreshes, one of which decomposes


def overhead() -> tuple[float, float, float]:
  """Time of COAP's training step over AdamW's, over a whole cycle.

  Returns:
    The ratio of the means and its 95 % interval, by a bootstrap over steps.
  """
  runs = []
  for name in ('coap', 'adamw'):
    config = fx_config.load(
      f'{sweep.ROOT}/configs/llama.py:size=10m,opt={name},matmul=f32'
    )
    fx_config.override(config, 'batch_size', '8')
    if name == 'coap':
      with config.optimizer.unlocked():
        config.optimizer.rank = 64
    runs.append(bench_step.ready(config)[1])
  seconds = bench_step.alternate(runs, _CYCLE)
  draw = np.random.default_rng(0).integers(0, _CYCLE, (2000, _CYCLE))
  ratios = seconds[draw, 0].mean(1) / seconds[draw, 1].mean(1)
  low, high = np.quantile(ratios, (0.025, 0.975))
  return seconds[:, 0].mean() / seconds[:, 1].mean(), low, high


def judge(lab: claim.Lab) -> claim.Finding:
  same, line = claim.versus(lab, ('coap', 'packed'), ('adamw', 'packed'), _GAP)
  ratio, low, high = overhead()
  fast = claim.at_most(ratio, high - ratio, _OVERHEAD)
  if low > _OVERHEAD:
    fast = claim.NOT
  return claim.Finding(
    claim.all_of([same, fast]),
    [
      line,
      f'time of a step over AdamW {ratio:.3f} [{low:.3f}, {high:.3f}], at most'
      f' {_OVERHEAD}: {fast}',
    ],
  )


CLAIM = claim.Claim(
  title='COAP trains as Adam does, and costs 2 % of time',
  paper='Xiao et al., arXiv 2412.00071, 2024',
  says='LLaMA-1B: perplexity 15.62 against 15.56, 2 % more time',
  setting=(
    f'{claim.setting("packed")}; time: LLaMA 10m, rank 64, 8 x 256 tokens a'
    f' step, {_CYCLE} steps of each in turns, which is a cycle of its'
    ' refreshes, on the cores at hand: a step with more tokens has less of it'
  ),
  judge=judge,
)

if __name__ == '__main__':
  claim.main(CLAIM)
