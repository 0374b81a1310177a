"""The loss on a mesh, of vocabularies that its tensor axis does not divide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax import kernels
from frugax.plan import cost, hlo
from frugax.train import mesh

_B, _T, _D = 4, 6, 32


def _operands(vocabulary, layout):
  keys = jax.random.split(jax.random.key(vocabulary), 4)
  x = jax.random.normal(keys[0], (_B, _T, _D))
  w = jax.random.normal(keys[1], (_D, vocabulary)) / _D**0.5
  labels = jax.random.randint(keys[2], (_B, _T), 0, vocabulary)
  # Tokens that do not count, and both ends of the vocabulary.
  labels = labels.at[0, :3].set(jnp.array([-1, 0, vocabulary - 1]))
  weights = jax.random.normal(keys[3], (2, _B, _T))
  return x, w if layout == 'NN' else w.T, labels, weights


def _function(loss, layout):
  """What training needs of it: all results, and gradients of both."""

  def total(x, w, labels, weights):
    found = loss(x, w, labels, layout=layout, return_lse=True)
    return sum(jnp.vdot(*p) for p in zip(found, weights, strict=True)), found

  return jax.grad(total, (0, 1), has_aux=True)


def _compiled(spec, vocabulary, layout):
  layout_of = mesh.make_layout(spec)
  names = ('embed', 'vocab')[:: 1 if layout == 'NN' else -1]
  x, w, labels, weights = _operands(vocabulary, layout)
  rows = ('batch', 'sequence')
  shardings = [
    layout_of.sharding((*rows, 'act_embed'), x.shape),
    layout_of.sharding(names, w.shape),
    layout_of.sharding(rows, labels.shape),
    layout_of.sharding((None, *rows), weights.shape),
  ]
  gradients = shardings[0], shardings[1]
  function = jax.jit(
    _function(layout_of.cross_entropy, layout),
    in_shardings=shardings,
    out_shardings=(gradients, None),
  )
  arrays = jax.device_put((x, w, labels, weights), tuple(shardings))
  with jax.set_mesh(layout_of.mesh):
    return function.lower(*arrays).compile(), arrays


@pytest.mark.parametrize(
  ('spec', 'vocabulary', 'layout'),
  [
    ('fsdp=2,tensor=4', 50257, 'NN'),
    ('fsdp=2,tensor=4', 35, 'NT'),
    ('data=2,tensor=4', 5, 'NN'),
    ('tensor=8', 7, 'NT'),  # fewer than devices: each computes them all
    ('tensor=8', 63, 'NT'),
  ],
)
def test_any_vocabulary_is_cut(spec, vocabulary, layout):
  program, arrays = _compiled(spec, vocabulary, layout)
  found = program(*arrays)
  operands = _operands(vocabulary, layout)
  expected = jax.jit(_function(kernels.linear_cross_entropy, layout))(*operands)
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max())


@pytest.mark.parametrize(
  'options',
  [
    {'z_loss': 0.1, 'softcap': 2.0},
    {'ignore_index': -100, 'z_loss': 0.1},
    {'ignore_index': 3},
  ],
  ids=lambda options: '-'.join(options),
)
def test_a_vocabulary_in_two_has_the_options_of_one(options):
  x, w, labels, weights = _operands(35, 'NN')
  # One that counts in neither case, and ones that are none of the vocabulary.
  labels = labels.at[0, :2].set(options.get('ignore_index', -1))
  labels = labels.at[1, :3].set(jnp.array([-7, 35, 34]))
  rows = ~((labels < -1) & (labels != -100) | (labels > 34))
  arrays = x, w, labels, weights

  def function(loss):
    def total(x, w, labels, weights):
      found = loss(x, w, labels, layout='NN', return_lse=True, **options)
      kept = (jnp.where(rows, a, 0) for a in found)
      return sum(map(jnp.vdot, kept, weights)), found

    return jax.jit(jax.grad(total, (0, 1), has_aux=True))

  layout = mesh.make_layout('fsdp=2,tensor=4')
  with jax.set_mesh(layout.mesh):
    found = function(layout.cross_entropy)(*arrays)
  expected = function(kernels.linear_cross_entropy)(*arrays)
  assert np.isnan(expected[1][0]).sum() >= 2
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)


def test_no_device_computes_all_logits():
  """Products are those of a device's columns, and of the one that is left."""
  program, _ = _compiled('fsdp=2,tensor=4', 50257, 'NT')
  flops = sum(cost.count(hlo.parse(program.as_text())).flops.values())
  # Of a column: forward, again, and two gradients.
  column = 4 * 2 * (_B // 2) * _T * _D
  assert flops <= column * (50256 // 4 + 1)
