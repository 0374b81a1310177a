"""Training by hand against a run."""

import itertools

import jax
import numpy as np
from running import rows

from frugax.models import llama
from frugax.train import data, loop, step, tokenizer
from frugax.train.fit import fit


def test_its_steps_are_those_of_a_run(make_config, tmp_path):
  config = make_config(mesh='data=1')
  loop.train(config, tmp_path, devices=jax.devices()[:1])
  expected = [row['loss'] for row in rows(tmp_path).values()]
  assert len(expected) == config.steps
  program = step.build(config, jax.devices()[:1])
  batches = data.train_batches(
    config.data, tokenizer.tokenizer('bytes'), batch_size=config.batch_size
  )
  steps = fit(
    llama.Llama(program.model.config),
    program.tx,
    itertools.islice(batches, config.steps),
    seed=config.seed,
    clip_norm=config.clip_norm,
  )
  states, metrics = zip(*steps, strict=True)
  batches.close()
  np.testing.assert_allclose(
    [float(m['loss']) for m in metrics], expected, rtol=1e-5
  )
  # Those before the last are still there to be looked at.
  assert [int(state.step) for state in states] == [*range(1, config.steps + 1)]
