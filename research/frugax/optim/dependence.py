"""What a traced function's outputs depend on, and what it draws at random."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import numpy as np

from frugax.optim import stacks
from frugax.optim.declared import by_layer, only_saves_work

_CALLS = ('jit', 'closed_call', 'custom_jvp_call', 'custom_vjp_call', 'remat2')
# Those of random numbers, or of keys, from one key.
_DRAWS = ('random_bits', 'random_split', 'rng_bit_generator')


class Facts(NamedTuple):
  """What is known of a value.

  Attributes:
    needs: a bit for each input that it depends on.
    mixes: a bit for each stack of which it takes layers together, or may.
    axis: along which of its axes the layers lie, if it depends on a stack and
      on none whose layers were mixed; see `stacks`.
    by: what mixed them first.
  """

  needs: int = 0
  mixes: int = 0
  axis: int | None = None
  by: str = ''

  def mixed(self, by: str) -> 'Facts':
    """What is known once layers are mixed."""
    lost = self.needs if self.axis is not None else 0
    return Facts(self.needs, self.mixes | lost, None, self.by or by)


def trace(
  function: Callable[..., Sequence[jax.Array]],
  inputs: Sequence[jax.ShapeDtypeStruct],
) -> jex.Jaxpr:
  """What `find` and `draws` look at: a function of arrays to a list of them."""
  return jax.make_jaxpr(function)(*inputs).jaxpr


def draws(jaxpr: jex.Jaxpr) -> list[tuple[int, ...]]:
  """The shapes of what a traced function draws at random, each from one key.

  Of draws from a stack of keys, it is the shape that each of them gives.

  Args:
    jaxpr: of `trace`.

  Examples:
    >>> def noise(key, keys):
    ...   each = jax.vmap(lambda key: jax.random.bits(key, (2,)))(keys)
    ...   return [jax.random.bits(key, (5, 2)), each]
    >>> key = jax.ShapeDtypeStruct((2,), 'uint32')
    >>> keys = jax.ShapeDtypeStruct((5, 2), 'uint32')
    >>> draws(trace(noise, [key, keys]))
    [(2,), (5, 2)]
  """
  found = []
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in _DRAWS:
      found.append(tuple(eqn.params['shape']))
    for inner in _jaxprs(eqn.params):
      found += draws(inner)
  return found


def difference(one: jex.Jaxpr, other: jex.Jaxpr) -> str | None:
  """What two traces of a function, of other shapes, compute otherwise.

  Args:
    one: of `trace`.
    other: likewise.

  Returns:
    The name of an operation, or None.

  Examples:
    >>> x, y = (jax.ShapeDtypeStruct((n, 2), 'float32') for n in (3, 4))
    >>> def compare(function):
    ...   return difference(trace(function, [x]), trace(function, [y]))
    >>> compare(lambda x: [2 * x.sum(0)]), compare(lambda x: [x / x.size])
    (None, 'div')
  """
  if len(one.eqns) != len(other.eqns):
    return 'a loop in Python'
  for own, others in zip(one.eqns, other.eqns, strict=True):
    name, params = own.primitive.name, own.params
    if own.primitive is not others.primitive or _differ(own, others):
      return name
    if params.get('name') == by_layer.__name__:
      continue
    inner = zip(_jaxprs(params), _jaxprs(others.params), strict=True)
    found = next(filter(None, (difference(*pair) for pair in inner)), None)
    if found:
      return found
  return None


def _differ(own, others):
  """Whether two equations of a kind have other numbers in them."""
  if own.primitive.name == 'iota':
    along = own.params['dimension']
    return own.params['shape'][along] != others.params['shape'][along]
  return any(
    isinstance(x, jex.Literal)
    and isinstance(y, jex.Literal)
    and not np.array_equal(x.val, y.val, equal_nan=x.val != x.val)
    for x, y in zip(own.invars, others.invars, strict=True)
  )


def _jaxprs(params):
  leaves = jax.tree.leaves(params, is_leaf=_is_jaxpr)
  return [getattr(x, 'jaxpr', x) for x in leaves if _is_jaxpr(x)]


def _is_jaxpr(x):
  return isinstance(x, jex.Jaxpr | jex.ClosedJaxpr)


def find(
  jaxpr: jex.Jaxpr, axes: Sequence[int | None], layers: int
) -> list[Facts]:
  """The inputs that outputs depend on, by data and not by name.

  Branches, loops and jitted functions are looked into. A dependence that is
  found may be one by zeros, and layers that are said to be mixed may be those
  of an operation that `stacks` does not know; none is missed.

  Args:
    jaxpr: of `trace`.
    axes: for each input the axis of its layers, or None.
    layers: how many there are.

  Returns:
    Facts of each output.

  Examples:
    >>> x = jax.ShapeDtypeStruct((3, 2), 'float32')
    >>> jaxpr = trace(lambda a, b: [a + 1, a * b.sum(), a], [x, x])
    >>> found = find(jaxpr, [0, 0], layers=3)
    >>> [bin(f.needs) for f in found], [bin(f.mixes) for f in found]
    (['0b1', '0b11', '0b1'], ['0b0', '0b10', '0b0'])

    A predicate that is declared harmless is not followed:

    >>> def skip(a, b):
    ...   due = only_saves_work((b > 0).any())
    ...   return [jax.lax.cond(due, lambda a: 1 * a, lambda a: a, a)]
    >>> bin(find(trace(skip, [x, x]), [0, 0], layers=3)[0].needs)
    '0b1'
  """
  # A single layer is mixed with nothing.
  axes = axes if layers > 1 else [None] * len(axes)
  facts = [Facts(1 << i, 0, axis) for i, axis in enumerate(axes)]
  held = sum(1 << i for i, axis in enumerate(axes) if axis is not None)
  return _Walk(layers, held).through(jaxpr, facts)


class _Walk:
  """Follows facts through a jaxpr."""

  def __init__(self, layers, held):
    self._layers, self._stacks = layers, held

  def through(self, jaxpr, inputs) -> list[Facts]:
    known: dict[Any, Facts] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom):
      return (
        Facts() if isinstance(atom, jex.Literal) else known.get(atom, Facts())
      )

    for eqn in jaxpr.eqns:
      operands = [read(atom) for atom in eqn.invars]
      known.update(zip(eqn.outvars, self._equation(eqn, operands), strict=True))
    return [read(atom) for atom in jaxpr.outvars]

  def _equation(self, eqn, operands):
    name, params = eqn.primitive.name, eqn.params
    if name == 'cond':
      index, *operands = operands
      branches = [self.through(b.jaxpr, operands) for b in params['branches']]
      return [_any([index, *xs], name) for xs in zip(*branches, strict=True)]
    if name == 'while':
      return self._while(params, operands)
    if name == 'scan':
      return self._scan(params, operands)
    if name == 'optimization_barrier':
      return operands
    if params.get('name') == only_saves_work.__name__:
      return [Facts()]
    inner = _inner(params) if name in _CALLS else None
    if inner is None or len(inner.invars) != len(operands):
      return [self._simple(eqn, operands)] * len(eqn.outvars)
    if params.get('name') != by_layer.__name__:
      return self.through(inner, operands)
    whole = _any(operands, name)
    # Which depends on which is looked up; where the layers are is declared.
    found = self.through(inner, [x._replace(axis=None) for x in operands])
    return [
      whole._replace(needs=x.needs) if x.needs & self._stacks else x
      for x in found
    ]

  def _while(self, params, operands):
    n, m = params['cond_nconsts'], params['body_nconsts']
    tests, consts, carry = operands[:n], operands[n : n + m], operands[n + m :]

    def once(carry):
      (test,) = self.through(params['cond_jaxpr'].jaxpr, [*tests, *carry])
      new = self.through(params['body_jaxpr'].jaxpr, consts + carry)
      return [_any([test, x], 'while') for x in new]

    return _settle(once, carry)

  def _scan(self, params, operands):
    n, m = _counts(params)
    consts, carry, xs = operands[:n], operands[n : n + m], operands[n + m :]
    row = min([stacks.ROW + 1, *(x.axis for x in operands if _held(x))]) - 1

    def of_row(x):
      if not _held(x) or x.axis < 0:
        return x
      return x._replace(axis=x.axis - 1 if x.axis else row)

    def of_rows(x):
      if not _held(x) or (x.axis < 0 and x.axis != row):
        return x
      return x._replace(axis=0 if x.axis == row else x.axis + 1)

    def body(carry):
      return self.through(
        params['jaxpr'].jaxpr, [*consts, *carry, *map(of_row, xs)]
      )

    def once(carry):
      # What is carried from row to row mixes them.
      return [x.mixed('scan') if x.axis == row else x for x in body(carry)[:m]]

    carry = _settle(once, carry)
    return carry + [of_rows(x) for x in body(carry)[m:]]

  def _simple(self, eqn, operands):
    name = eqn.primitive.name
    # Of nothing there is nothing to depend on.
    operands = [
      Facts() if 0 in atom.aval.shape else x
      for atom, x in zip(eqn.invars, operands, strict=True)
    ]
    axes = [x.axis for x in operands]
    if not any(_held(x) for x in operands):
      return _any(operands, name)
    axis = stacks.after(eqn, axes, self._layers)
    if axis is None:
      return _any([x.mixed(name) for x in operands], name)
    return _any(
      [x._replace(axis=axis if _held(x) else None) for x in operands], name
    )


def _held(x):
  return x.axis is not None


def _counts(params):
  """How many constants a scan has, and how many arrays its carry."""
  if 'ft_in' in params:  # since jax 0.11
    consts, carry, _ = params['ft_in'].unpack()
    return len(list(consts)), len(list(carry))
  return params['num_consts'], params['num_carry']


def _inner(params):
  for key in ('jaxpr', 'call_jaxpr', 'fun_jaxpr'):
    if key in params:
      return getattr(params[key], 'jaxpr', params[key])
  return None


def _settle(once, carry):
  """What is known of a loop's carry after any number of rounds."""
  while True:
    new = [
      _any([a, b], 'loop') for a, b in zip(carry, once(carry), strict=True)
    ]
    if new == carry:
      return carry
    carry = new


def _any(facts, by):
  """Of a value that depends on several."""
  axes = {x.axis for x in facts if _held(x)}
  by = next((x.by for x in facts if x.mixes), by)
  if len(axes) > 1:
    facts = [x.mixed(by) for x in facts]
  needs = mixes = 0
  for x in facts:
    needs |= x.needs
    mixes |= x.mixes
  if mixes:  # It is refused, wherever else its layers are.
    return Facts(needs, mixes, by=by)
  return Facts(needs, 0, *axes)
