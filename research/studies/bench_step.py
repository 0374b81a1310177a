"""What the training step costs over one written by hand.

    make bench

Both steps have the same model and optimizer and are jitted and donated; by
hand means value_and_grad, tx.update and apply_updates, nothing else: no norms,
no clipping, no counters. Steps alternate, one each, in an order drawn anew for
every pair; the figures are medians in one run, and the ratio's interval is that
of a bootstrap over the pairs.
"""

import argparse
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from frugax import config as fx_config
from frugax.train import metrics, step

_CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'llama.py'


def by_hand(model, tx):
  """The shortest step of the same model and optimizer."""

  def loss_fn(params, batch):
    logits = model.apply(
      params,
      batch['tokens'],
      segment_ids=batch['segment_ids'],
      positions=batch['positions'],
    )
    labels = batch['labels']
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, jnp.maximum(labels, 0)
    )
    return jnp.sum(jnp.where(labels >= 0, losses, 0)) / jnp.sum(labels >= 0)

  def train_step(state, batch):
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss

  return jax.jit(train_step, donate_argnums=0)


def _batch(config):
  draw = np.random.default_rng(0)
  shape = (config.batch_size, config.data.sequence_length)
  tokens = draw.integers(0, 259, shape, dtype=np.int32)
  return {
    'tokens': tokens,
    'labels': np.roll(tokens, -1, 1),
    'segment_ids': np.ones(shape, np.int32),
    'positions': np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
  }


def alternate(runs: list[list], pairs: int) -> np.ndarray:
  """Seconds of steps that are taken in turns, in an order drawn each time.

  Args:
    runs: [step, state, batch] each; they end with other states.
    pairs: how many steps of each.

  Returns:
    (pairs, runs)
  """

  def timed(run):
    start = time.perf_counter()
    run[1], _ = jax.block_until_ready(run[0](run[1], run[2]))
    return time.perf_counter() - start

  for run in runs * 3:  # compile, and warm up
    timed(run)
  seconds = np.zeros((pairs, len(runs)))
  order = np.random.default_rng(0)
  for i in range(pairs):
    for j in order.permutation(len(runs)):
      seconds[i, j] = timed(runs[j])
  return seconds


def ready(config) -> tuple[step.Program, list]:
  """The program of a config, and what `alternate` takes of it."""
  program = step.build(config, jax.devices()[:1])
  state = program.init(jax.random.PRNGKey(0))
  return program, [program.train_step, state, program.put(_batch(config))]


def compare(arguments: str, pairs: int) -> tuple[np.ndarray, np.ndarray]:
  """Seconds of `pairs` alternating steps of ours and of the one by hand."""
  program, ours = ready(fx_config.load(f'{_CONFIG}:{arguments}'))
  state = jax.tree.map(jnp.copy, (ours[1].params, ours[1].opt_state))
  hand = [by_hand(program.model, program.tx), state, ours[2]]
  seconds = alternate([ours, hand], pairs)
  return seconds[:, 0], seconds[:, 1]


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--pairs', type=int, default=100)
  args = parser.parse_args()
  info = metrics.run_info()
  print(
    f'commit {info["commit"]}{" (changed)" * bool(info["dirty"])},'
    f' jax {info["jax"]}, {info["hardware"]}'
  )
  print(f'{"config":24} {"ours":>9} {"by hand":>9} {"ratio":>7}  95 % interval')
  for arguments in ('size=tiny,opt=adamw', 'size=tiny,opt=galore'):
    ours, hand = compare(arguments, args.pairs)
    draw = np.random.default_rng(0)
    picks = draw.integers(0, args.pairs, (2000, args.pairs))
    ratios = np.median(ours[picks], 1) / np.median(hand[picks], 1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    a, b = np.median(ours), np.median(hand)
    print(
      f'{arguments:24} {a * 1e3:6.1f} ms {b * 1e3:6.1f} ms {a / b:7.3f}'
      f'  {low:.3f} to {high:.3f}'
    )


if __name__ == '__main__':
  main()
