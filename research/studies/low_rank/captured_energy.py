"""How much of a real gradient the sketch captures, and how fast.

    python -m frugax.train.corpus --data_dir=data
    python research/studies/low_rank/captured_energy.py \
      | tee research/studies/low_rank/captured_energy.log

Trains one layer as wide as LLaMA-1b's (2048 and 5461, 32 heads, bytes) with
AdamW on the standard library's source, 2,048 tokens a step, and at every tenth
step takes the gradients of the two 2048 x 5461 kernels as `low_rank` would see
them. On each it refreshes the projectors at rank 512, those of the sketch
starting from their bases of ten steps before. The three take turns, so that
their times compare on a busy machine too.

To pass: captured energy within 2 % of the best subspace's (the SVD's) at every
refresh, in at most 1/20 of the SVD's time. With 2,048 bytes a step the gradient
has little outside of 512 dimensions, so that a subspace of 64 is tried as well:
the column `best` says what share of the energy the best one has.
"""

import argparse
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from frugax import config as fx_config
from frugax.models import llama
from frugax.optim import projection, projectors
from frugax.train import data, metrics, step, tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[3]
KERNELS = ('gate', 'up')
RANKS, INTERVAL = (512, 64), 10
SKETCHES = ('sketch', 'sketch2')
ENERGY_BAR, TIME_BAR = 0.98, 1 / 20


def keep_gradients() -> optax.GradientTransformation:
  """Changes nothing; its state is the last gradients of `KERNELS`."""

  def kernels(tree):
    return {name: tree['layers']['mlp'][name]['kernel'] for name in KERNELS}

  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, kernels(params)),
    lambda updates, state, params=None: (updates, kernels(updates)),
  )


def gradients(data_dir: str, steps: int):
  """Yields (step, loss, gradients) at steps 0, INTERVAL, 2 INTERVAL, ..."""
  config = fx_config.load(f'{ROOT}/configs/llama.py:size=tiny,data=stdlib')
  config.data.data_dir = data_dir
  config.data.sequence_length = 128
  tok = tokenizer.tokenizer(config.data.tokenizer)
  model = llama.Llama(llama.config('1b', n_layers=1, vocab_size=320))
  data.check(config.data, tok, model.config.vocab_size)
  rate = optax.warmup_constant_schedule(0.0, 1e-3, INTERVAL)
  tx = optax.chain(
    keep_gradients(), optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.1)
  )
  train_step = jax.jit(
    step.make_train_step(model, tx, clip_norm=1.0), donate_argnums=0
  )
  state = jax.jit(lambda key: step.init_state(model, tx, key))(
    jax.random.PRNGKey(0)
  )
  batches = data.train_batches(config.data, tok, batch_size=16)
  for done in range(steps + 1):
    state, row = train_step(state, jax.tree.map(jnp.asarray, next(batches)))
    if done % INTERVAL == 0:
      kept = state.opt_state[0]
      yield done, float(row['loss']), {name: kept[name][0] for name in KERNELS}
  batches.close()


def refresher(name: str, rank: int, g):
  """A function that refreshes from a gradient: its seconds, and P^T G."""
  p = projectors.PROJECTORS[name](g.shape, rank, 'short', g.dtype)
  states = {kernel: p.init() for kernel in KERNELS}

  def refresh(g, state, count):
    key = jax.random.fold_in(jax.random.key(0), count)
    context = projection.Context(key, count, count * INTERVAL)
    return p.refresh(g, state, context)

  compiled = jax.jit(refresh).lower(g, p.init(), 0).compile()

  def timed(kernel, g, count):
    start = time.perf_counter()
    states[kernel] = jax.block_until_ready(compiled(g, states[kernel], count))
    seconds = time.perf_counter() - start
    return seconds, p.project(g, states[kernel])

  return timed


def energy(x) -> float:
  return float(jnp.sum(jnp.square(x)))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data_dir', default='data')
  parser.add_argument('--steps', type=int, default=30)
  args = parser.parse_args()
  info = metrics.run_info()
  print(
    f'commit {info["commit"]}{" (changed)" * bool(info["dirty"])},'
    f' jax {info["jax"]}, {info["hardware"]["device_kind"]},'
    f' {os.cpu_count()} cores'
  )
  print(
    f'{"step":>4} {"loss":>6} kernel {"rank":>4} {"best":>8}'
    f' {"sketch":>8} {"sketch2":>8}'
    f' {"svd, s":>10} {"sketch, s":>10} {"sketch2, s":>10}',
    flush=True,
  )
  svd, sketches = None, {}
  energies = {rank: [] for rank in RANKS}
  seconds = []
  found = gradients(args.data_dir, args.steps)
  for count, (at, loss, kernels) in enumerate(found):
    for kernel, g in kernels.items():
      if svd is None:
        svd = refresher('svd', RANKS[0], g)
        sketches = {
          rank: [refresher(name, rank, g) for name in SKETCHES]
          for rank in RANKS
        }
      svd_seconds, small = svd(kernel, g, count)
      for rank in RANKS:
        # The leading singular vectors come first.
        best = energy(small[:rank])
        times, smalls = zip(
          *(sketch(kernel, g, count) for sketch in sketches[rank]), strict=True
        )
        captured = [energy(x) / best for x in smalls]
        energies[rank].append(captured)
        text = f'{at:4d} {loss:6.3f} {kernel:6} {rank:4d}'
        text += f' {best / energy(g):8.5f}'
        text += ''.join(f' {x:8.5f}' for x in captured)
        if rank == RANKS[0]:
          seconds.append((svd_seconds, *times))
          text += ''.join(f' {x:10.3f}' for x in seconds[-1])
        print(text, flush=True)
  print(
    "best: share of the energy in the best subspace; sketch: over the best's"
  )
  seconds = np.array(seconds)
  ratios = np.median(seconds[:, 1:] / seconds[:, :1], axis=0)
  for rank in RANKS:
    for name, captured in zip(
      SKETCHES, np.transpose(energies[rank]), strict=True
    ):
      held = 'within' if captured.min() >= ENERGY_BAR else 'NOT within'
      print(
        f'{name} at rank {rank}: captures at least {captured.min():.4f} of the'
        f' best, median {np.median(captured):.4f}: {held} 2 %'
      )
  for name, ratio in zip(SKETCHES, ratios, strict=True):
    held = 'at most' if ratio <= TIME_BAR else 'MORE than'
    print(
      f'{name} at rank {RANKS[0]}: takes 1/{1 / ratio:.1f} of the time of the'
      f' SVD, median: {held} 1/20'
    )


if __name__ == '__main__':
  main()
