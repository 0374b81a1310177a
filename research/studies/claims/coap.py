"""COAP trains as Adam does, and costs 2 % of time."""

import math

import numpy as np

from frugax import config as fx_config
from studies import bench_step, sweep
from studies.claims import claim

# Of its paper's losses, 15.62 against 15.56.
_SHARE = math.log(15.62) / math.log(15.56) - 1
_OVERHEAD = 1.02
_CYCLE = 160  # steps: five refreshes of its defaults, one of which decomposes


def overhead() -> list[float]:
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
  means = seconds.mean(0)
  return [float(means[0] / means[1]), float(low), float(high)]


def judge(lab: claim.Lab) -> claim.Finding:
  same = claim.versus(lab, ('coap', 'packed'), ('adamw', 'packed'), _SHARE)
  ratio, low, high = lab.measured('coap', overhead)
  middle = (low + high) / 2
  fast = claim.at_most(middle, high - middle, _OVERHEAD)
  line = (
    f'time of a step over AdamW {ratio:.3f} [{low:.3f}, {high:.3f}], at most'
    f' {_OVERHEAD}: {fast}'
  )
  return claim.all_of([same, (fast, line)])


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
