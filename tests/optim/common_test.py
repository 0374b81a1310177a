"""The invariants that every optimizer must keep, ours and optax's, in a table.

One row an optimizer, one test an invariant. To add an optimizer, add its row.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from frugax import optim


def last_two(params):
  """Every array's last two axes are its matrix, all others its batch."""
  axes = optim.MatrixAxes((-2,), (-1,))
  return jax.tree.map(lambda p: axes if p.ndim > 1 else None, params)


@dataclasses.dataclass(frozen=True)
class Row:
  """One optimizer and what is known about it.

  Attributes:
    make: `make(learning_rate=..., **arguments)`.
    arguments: its other arguments.
    static: those that optax.inject_hyperparams must leave alone.
    equivariant: updating a stack of layers equals stacking the updates of each.
      Some of optax's treat an array as one tensor or matrix.
    separable: what a leaf gets depends on no other leaf.
  """

  make: Callable[..., optax.GradientTransformation]
  arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
  static: tuple[str, ...] = ()
  equivariant: bool = True
  separable: bool = True

  def tx(self, learning_rate: Any = 0.05) -> optax.GradientTransformation:
    return self.make(learning_rate=learning_rate, **self.arguments)


def low_rank(learning_rate, inner, options):
  """A chain as a user writes it."""
  return optax.chain(
    optim.low_rank(inner, 2, 2, axes=last_two, **options),
    optim.step_and_decay(learning_rate),
  )


def low_rank_row(inner, **options):
  return Row(low_rank, {'inner': inner, 'options': options})


def alias_row(make, static=(), **arguments):
  arguments = {'rank': 2, 'update_interval': 2, 'axes': last_two, **arguments}
  return Row(make, arguments, ('rank', 'update_interval', 'axes', *static))


def galore_row(**arguments):
  return alias_row(optim.galore, **arguments)


def sn_row(make, **arguments):
  arguments = {'axes': last_two, 'subset': 'heuristic', **arguments}
  return Row(make, arguments, ('axes', 'subset', 'reduction'))


def limited_sgd(learning_rate):
  return optax.chain(
    optim.limit_norm_growth(axes=last_two),
    optim.step_and_decay(learning_rate),
  )


def adam_hf(learning_rate, weight_decay):
  return optax.chain(
    optim.scale_by_adam_hf(),
    optim.step_and_decay(learning_rate, weight_decay),
  )


def quantized(learning_rate, inner, options):
  return optax.chain(
    optim.quantize_state(inner, min_size=0, axes=last_two, **options),
    optax.scale_by_learning_rate(learning_rate),
  )


def quantized_row(inner, codec, **options):
  return Row(
    quantized, {'inner': inner, 'options': {'codec': codec, **options}}
  )


OURS = {
  'adam_hf': Row(adam_hf, {'weight_decay': 0.1}),
  'galore': galore_row(),
  'galore_decay': galore_row(
    weight_decay=0.1, mask={'stack': True, 'w': False, 'b': False}
  ),
  'galore_sketch_long': galore_row(projector='sketch', side='long'),
  'galore_random': galore_row(projector='random', moments='reset'),
  'galore_rotate': galore_row(moments='rotate'),
  'galore_ldadam_random': galore_row(moments='ldadam', projector='random'),
  'q_galore': alias_row(
    optim.q_galore,
    static=('min_size',),
    weight_decay=0.1,
    moments='rotate',
    min_size=0,
  ),
  'fira': alias_row(optim.fira),
  'frugal': alias_row(
    optim.frugal, static=('min_size',), min_size=0, weight_decay=0.1
  ),
  'fira_sketch_sign': alias_row(
    optim.fira, projector='sketch', moments='sign', residual_uses_alpha=False
  ),
  'apollo': alias_row(optim.apollo),
  'apollo_svd_decay': alias_row(
    optim.apollo, projector='svd', weight_decay=0.1
  ),
  'apollo_mini': alias_row(optim.apollo_mini, rank=1),
  'subspace_momentum': alias_row(optim.subspace_momentum),
  'flora': alias_row(optim.flora, weight_decay=0.1),
  'ldadam': alias_row(optim.ldadam, update_interval=1, weight_decay=0.1),
  'ldadam_without_feedback': alias_row(optim.ldadam, error_feedback=False),
  'ldadam_sketch': alias_row(optim.ldadam, first_projector='sketch'),
  'grad_norm_lorp': alias_row(
    optim.grad_norm_lorp, weight_decay=0.1, scale=1.0
  ),
  'adam_sn': sn_row(optim.adam_sn),
  'adamw_sn_groups': sn_row(optim.adamw_sn, subset=12, weight_decay=0.1),
  'adam_sn_mean': sn_row(optim.adam_sn, subset=-2, reduction='mean'),
  'adagrad_sn': sn_row(optim.adagrad_sn),
  'snsm': alias_row(optim.snsm, update_interval=3),
  'snsm_sketch_rotate': alias_row(
    optim.snsm, projector='sketch', moments='rotate', weight_decay=0.1
  ),
  'sgd_sai': Row(
    optim.sgd_sai, {'axes': last_two, 'weight_decay': 0.1}, ('axes',)
  ),
  'lamb_per_layer': Row(optim.lamb, {'axes': last_two}, ('axes', 'subset')),
  'lamb_sn': sn_row(optim.lamb, subset='heuristic', weight_decay=0.1),
  # One layer of the stack rests at every step; of a bare layer, so do rows.
  'lisa': Row(
    optim.lisa,
    {
      'active': 1,
      'update_interval': 2,
      'weight_decay': 0.1,
      'stacked': {'stack': True, 'w': False, 'b': False},
    },
    ('active', 'update_interval'),
    equivariant=False,
  ),
  'spam': Row(
    optim.spam,
    {'threshold': 2.0, 'reset_interval': 3, 'warmup_steps': 2, 'guard': 2},
    ('density', 'reset_interval', 'warmup_steps', 'guard'),
  ),
  'spam_kept_entries': Row(
    optim.spam,
    {
      'density': 0.5,
      'reset_interval': 2,
      'guard': 1,
      'algorithm': 'paper',
      'weight_decay': 0.1,
      'axes': last_two,
    },
    ('density', 'reset_interval', 'warmup_steps', 'guard', 'axes'),
  ),
  'stable_spam': Row(
    optim.stable_spam,
    {'reset_interval': 2, 'total_steps': 4, 'axes': last_two},
    ('reset_interval', 'total_steps', 'axes'),
  ),
  'stable_spam_paper': Row(
    optim.stable_spam,
    {
      'reset_interval': 2,
      'algorithm': 'paper',
      'weight_decay': 0.1,
      'axes': last_two,
    },
    ('reset_interval', 'axes'),
  ),
  'adaptive_adam': Row(
    lambda learning_rate: optax.chain(
      optim.clip_spikes(threshold=2.0, guard=2),
      optim.adaptive_clip(axes=last_two),
      optim.adaptive_norm(axes=last_two),
      optim.reset_moments(optim.scale_by_adam_hf(), every=2, warmup=1),
      optim.step_and_decay(learning_rate),
    )
  ),
  'limit_norm_growth': Row(limited_sgd),
  'low_rank_frugal': low_rank_row(
    optax.scale_by_adam(), residual='sign', moments='zero'
  ),
  'low_rank_adamw': low_rank_row(optax.adamw(1.0, weight_decay=0.1)),
  'low_rank_sketch_lion': low_rank_row(
    optax.scale_by_lion(), projector='sketch'
  ),
  'low_rank_both_rotate': low_rank_row(
    # Where R is diagonal Adam makes ones of rounding errors, but for its eps.
    optim.scale_by_adam_hf(eps=1e-3),
    side='both',
    moments='rotate',
  ),
  # A layer's step in the interval depends on how many others there are. (The
  # two of the stack share theirs here, so that the stack is as its layers.)
  'low_rank_staggered_sketch': dataclasses.replace(
    low_rank_row(
      optim.scale_by_adam_hf(),
      projector='sketch',
      moments='rotate',
      refresh='staggered',
    ),
    separable=False,
  ),
  'low_rank_lazy_int4': low_rank_row(
    optim.scale_by_adam_hf(), projector_dtype='int4', refresh='lazy'
  ),
  'low_rank_reset': low_rank_row(optax.scale_by_adam(), moments='reset'),
  'adam_8bit': quantized_row(optax.scale_by_adam(), 'dynamic8'),
  'adam_linear8_sqrt': quantized_row(
    optax.scale_by_adam(), 'linear8', block=16, sqrt=True
  ),
  'adam_4bit': quantized_row(optim.scale_by_adam_hf(), 'dynamic4', block=16),
  'adam_fp8': quantized_row(optax.scale_by_adam(), 'fp8_e4m3'),
  'adam_bf16_stochastic': quantized_row(
    optax.scale_by_adam(), 'bf16_stochastic'
  ),
  'lion_8bit': quantized_row(optax.scale_by_lion(), 'dynamic8'),
  'low_rank_8bit': low_rank_row(
    optim.quantize_state(optim.scale_by_adam_hf(), min_size=0)
  ),
  'quantized_low_rank': quantized_row(
    optim.low_rank(optax.scale_by_adam(), 2, 2, axes=last_two), 'linear8'
  ),
}
OPTAX = {
  'adamw': Row(optax.adamw),
  'sgd': Row(optax.sgd, {'momentum': 0.9}),
  'lion': Row(optax.lion),
  'adafactor': Row(
    optax.adafactor,
    {'min_dim_size_to_factor': 2},
    ('min_dim_size_to_factor',),
    equivariant=False,
  ),
  'lamb': Row(optax.lamb, equivariant=False),
  'rmsprop': Row(optax.rmsprop),
  'adagrad': Row(optax.adagrad),
  'novograd': Row(optax.novograd, equivariant=False),
  'yogi': Row(optax.yogi),
  'nadamw': Row(optax.nadamw),
  'muon': Row(
    optax.contrib.muon, {}, ('ns_steps', 'ns_coeffs'), equivariant=False
  ),
}
ROWS = OURS | OPTAX

# Rows that differ from another one by an option of it.
VARIANTS = (
  *('galore_decay', 'galore_sketch_long', 'galore_ldadam_random'),
  *('fira_sketch_sign', 'apollo_svd_decay', 'ldadam_without_feedback'),
  *('adamw_sn_groups', 'adam_sn_mean', 'snsm_sketch_rotate', 'lamb_sn'),
  *('spam_kept_entries', 'stable_spam_paper', 'adam_linear8_sqrt'),
  *('adam_4bit', 'adam_fp8', 'lion_8bit'),
)

PARAMS = {'stack': (2, 8, 24), 'w': (16, 8), 'b': (8,)}
SPECS = {'stack': P(None, None, 'fsdp'), 'w': P('fsdp'), 'b': P('fsdp')}
STEPS = 3


def tree(seed):
  rng = np.random.default_rng(seed)
  return {
    k: jnp.asarray(rng.normal(size=shape), jnp.float32)
    for k, shape in PARAMS.items()
  }


def grads(step):
  return tree(step + 1)


def run(update, params, state, steps=range(STEPS), of=grads):
  for step in steps:
    updates, state = update(of(step), state, params)
    params = optax.apply_updates(params, updates)
  return params, state


@functools.cache
def jitted(name):
  """The update of a row, compiled once for all tests; it donates the state."""
  return jax.jit(ROWS[name].tx().update, donate_argnums=1)


@functools.cache
def plain(name):
  """The plain jitted run of a row: initial state, final parameters, state."""
  init = ROWS[name].tx().init(tree(0))
  return init, *run(jitted(name), tree(0), copied(init))


def copied(state):
  """To be donated: buffers of its own for each leaf."""
  return jax.tree.map(jnp.copy, state)


def assert_close(got, want):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5),
    got,
    want,
  )


def specs_of(x):
  return jax.tree.map(lambda a: (jnp.shape(a), jnp.result_type(a)), x)


@pytest.fixture(
  params=[
    pytest.param(name, marks=pytest.mark.slow if name in VARIANTS else ())
    for name in ROWS
  ],
  name='name',
)
def _name(request):
  return request.param


def test_jit_equals_eager(name):
  tx = ROWS[name].tx()
  init, want, _ = plain(name)
  got, _ = run(tx.update, tree(0), init)
  assert_close(got, want)


def test_state_is_arrays_that_never_change_shape_or_dtype(name):
  init, params, final = plain(name)
  abstract = jax.eval_shape(ROWS[name].tx().init, tree(0))
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(init))
  assert jax.tree.structure(abstract) == jax.tree.structure(init)
  assert specs_of(abstract) == specs_of(init) == specs_of(final)
  assert specs_of(params) == specs_of(tree(0))


def test_bfloat16_state_never_changes_dtype(name):
  """Traced only: gradients in float32 for parameters in bfloat16."""
  tx = ROWS[name].tx()
  low = jax.eval_shape(
    lambda: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree(0))
  )
  # Adam of optax takes the dtype of its first gradients; ours does not.
  ours = name in OURS and ROWS[name].make is not low_rank
  for g in (low, tree(1)) if ours else (low,):
    state = jax.eval_shape(tx.init, low)
    updates, new = jax.eval_shape(tx.update, g, state, low)
    assert specs_of(updates) == specs_of(g)
    assert specs_of(new) == specs_of(state)


def test_saved_and_restored_state_continues_identically(name):
  update = jitted(name)
  init, want, final = plain(name)
  params, state = run(update, tree(0), copied(init), range(2))
  leaves, treedef = jax.tree.flatten((params, state))
  saved = [np.array(x) for x in leaves]
  params, state = treedef.unflatten([jnp.asarray(x) for x in saved])
  got = run(update, params, state, range(2, STEPS))
  jax.tree.map(np.testing.assert_array_equal, got, (want, final))


def test_buffers_can_be_donated(name):
  # Aliased buffers (a state that holds the parameters) cannot be donated.
  state = copied(plain(name)[0])
  before = jax.tree.leaves(state)
  got, _ = run(jitted(name), tree(0), state)
  # Adafactor carries scalars in place of what it does not use.
  assert all(x.is_deleted() for x in before if x.size > 1)
  assert_close(got, plain(name)[1])


def test_accumulates_with_multi_steps(name):
  """Two half-steps of the same gradient are one step."""
  tx = optax.MultiSteps(ROWS[name].tx(), every_k_schedule=2)
  update = jax.jit(tx.update)
  got, state = run(
    update, tree(0), tx.init(tree(0)), range(2 * STEPS), lambda i: grads(i // 2)
  )
  assert state.gradient_step == STEPS
  assert_close(got, plain(name)[1])


def test_hyperparameters_can_be_injected(name):
  row = ROWS[name]
  make = optax.inject_hyperparams(row.make, static_args=row.static)
  tx = make(learning_rate=0.5, **row.arguments)
  state = tx.init(tree(0))
  state.hyperparams['learning_rate'] = jnp.float32(0.05)
  got, _ = run(jax.jit(tx.update), tree(0), state)
  assert_close(got, plain(name)[1])


def test_learning_rate_can_be_a_schedule(name):
  tx = ROWS[name].tx(lambda count: jnp.where(count == 0, 0.0, 0.05))
  update = jax.jit(tx.update)
  params, state = run(update, tree(0), tx.init(tree(0)), range(1))
  jax.tree.map(np.testing.assert_array_equal, params, tree(0))
  moved, _ = run(update, params, state, range(1, 2))
  assert all(
    jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), moved, params))
  )


def test_composes_in_masked_partition_and_chain(name):
  """What a mask hides goes through; the rest is as without it."""
  labels = {'stack': 'ours', 'w': 'sgd', 'b': 'ours'}
  # A partition is a chain of masked transformations.
  tx = optax.chain(
    optax.partition({'ours': ROWS[name].tx(), 'sgd': optax.sgd(0.1)}, labels),
    optax.masked(optax.scale(2.0), {'stack': False, 'w': True, 'b': False}),
  )
  got, _ = run(jax.jit(tx.update), tree(0), tx.init(tree(0)))
  want = plain(name)[1]
  equal = np.allclose(got['stack'], want['stack'], atol=1e-5, rtol=1e-5)
  assert equal == ROWS[name].separable
  assert_close(got['b'], want['b'])
  sgd = tree(0)['w'] - 0.2 * sum(grads(i)['w'] for i in range(STEPS))
  np.testing.assert_allclose(got['w'], sgd, atol=1e-5)


def test_updating_a_stack_is_stacking_the_updates(name):
  tx, update, layers = ROWS[name].tx(), jitted(name), []

  def layer(x, i):
    return x | {'stack': x['stack'][i]}

  for i in range(PARAMS['stack'][0]):
    params = layer(tree(0), i)
    got, _ = run(
      update,
      params,
      copied(tx.init(params)),
      of=lambda step: layer(grads(step), i),  # noqa: B023
    )
    layers.append(got['stack'])
  want = plain(name)[1]['stack']
  equal = np.allclose(np.stack(layers), want, atol=1e-5, rtol=1e-5)
  assert equal == ROWS[name].equivariant


def test_sharded_equals_one_device(name):
  tx = ROWS[name].tx()
  mesh = jax.make_mesh(
    (8,), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  shardings = {k: NamedSharding(mesh, spec) for k, spec in SPECS.items()}
  of_state = optim.state_shardings(tx, tree(0), shardings)
  params = jax.device_put(tree(0), shardings)
  state = jax.jit(tx.init, out_shardings=of_state)(params)
  update = jax.jit(tx.update, out_shardings=(shardings, of_state))
  got, state = run(
    update, params, state, of=lambda i: jax.device_put(grads(i), shardings)
  )
  _, want, want_state = plain(name)
  assert_close(got, want)
  assert_close(state, want_state)
  for path, leaf in jax.tree.leaves_with_path(state):
    key = getattr(path[-1], 'key', None)
    if key in PARAMS and leaf.shape == PARAMS[key]:
      assert leaf.sharding.spec == SPECS[key]
    elif key == 'stack' and leaf.shape[-1:] == (24,) and leaf.ndim == 3:
      assert leaf.sharding.spec == P(None, None, 'fsdp')
