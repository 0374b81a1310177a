"""Which inputs of a traced function its outputs depend on; what it draws."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex

from frugax.optim.leafwise import ELEMENTWISE

_REDUCING = ('reduce_sum', 'reduce_max', 'reduce_min', 'reduce_prod')
_CALLS = ('jit', 'closed_call', 'custom_jvp_call', 'custom_vjp_call', 'remat2')
# Those of random numbers, or of keys, from one key.
_DRAWS = ('random_bits', 'random_split', 'rng_bit_generator')


class Facts(NamedTuple):
  """What is known of a value.

  Attributes:
    needs: a bit for each input that it depends on.
    mixes: a bit for each input over whose layers it sums, or the like.
    axis: along which of its axes the layers lie, if that is known.
  """

  needs: int = 0
  mixes: int = 0
  axis: int | None = None

  def __or__(self, other):
    return Facts(self.needs | other.needs, self.mixes | other.mixes)


@jax.jit
def only_saves_work(predicate: jax.Array) -> jax.Array:
  """A predicate on which no result depends, as it is.

  What is done where it is true leaves unchanged whatever need not be done: it
  may look at all leaves without making one depend on the others.
  """
  return predicate


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
    for inner in jax.tree.leaves(eqn.params, is_leaf=_is_jaxpr):
      if _is_jaxpr(inner):
        found += draws(getattr(inner, 'jaxpr', inner))
  return found


def _is_jaxpr(x):
  return isinstance(x, jex.Jaxpr | jex.ClosedJaxpr)


def find(jaxpr: jex.Jaxpr, axes: Sequence[int | None]) -> list[Facts]:
  """The inputs that outputs depend on, by data and not by name.

  Branches, loops and jitted functions are looked into. That a sum goes over the
  layers of a stack is found where the axis of the layers can be followed:
  through elementwise operations, reshapes, transpositions, products and
  reductions. A dependence that is found may be one by zeros; none is missed.

  Args:
    jaxpr: of `trace`.
    axes: for each input the axis of its layers, or None.

  Returns:
    Facts of each output.

  Examples:
    >>> x = jax.ShapeDtypeStruct((3, 2), 'float32')
    >>> jaxpr = trace(lambda a, b: [a + 1, a * b.sum(), a], [x, x])
    >>> found = find(jaxpr, [0, 0])
    >>> [bin(f.needs) for f in found], [bin(f.mixes) for f in found]
    (['0b1', '0b11', '0b1'], ['0b0', '0b10', '0b0'])

    A predicate that is declared harmless is not followed:

    >>> def skip(a, b):
    ...   due = only_saves_work((b > 0).any())
    ...   return [jax.lax.cond(due, lambda a: 1 * a, lambda a: a, a)]
    >>> bin(find(trace(skip, [x, x]), [0, 0])[0].needs)
    '0b1'
  """
  facts = [Facts(1 << i, 0, axis) for i, axis in enumerate(axes)]
  return _walk(jaxpr, facts)


def _walk(jaxpr, inputs) -> list[Facts]:
  known: dict[Any, Facts] = dict(zip(jaxpr.invars, inputs, strict=True))

  def read(atom):
    return (
      Facts() if isinstance(atom, jex.Literal) else known.get(atom, Facts())
    )

  for eqn in jaxpr.eqns:
    operands = [read(atom) for atom in eqn.invars]
    known.update(zip(eqn.outvars, _equation(eqn, operands), strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _equation(eqn, operands):
  name, params = eqn.primitive.name, eqn.params
  if name == 'cond':
    index, *operands = operands
    found = [_walk(b.jaxpr, operands) for b in params['branches']]
    return [
      _any([index._replace(axis=None), *xs]) for xs in zip(*found, strict=True)
    ]
  if name == 'while':
    n, m = params['cond_nconsts'], params['body_nconsts']
    tests, consts, carry = operands[:n], operands[n : n + m], operands[n + m :]

    def once(carry):
      (test,) = _walk(params['cond_jaxpr'].jaxpr, [*tests, *carry])
      return [
        test | x for x in _walk(params['body_jaxpr'].jaxpr, consts + carry)
      ]

    return _settle(once, carry)
  if name == 'scan':
    n, m = _counts(params)
    consts, carry = operands[:n], operands[n : n + m]
    # Of what is walked along one axis less is known than of the whole.
    rows = [x._replace(axis=None) for x in operands[n + m :]]
    body = params['jaxpr'].jaxpr

    def once(carry):
      return _walk(body, [*consts, *carry, *rows])[:m]

    carry = _settle(once, carry)
    outputs = _walk(body, [*consts, *carry, *rows])[m:]
    return carry + [x._replace(axis=None) for x in outputs]
  if name == 'optimization_barrier':
    return operands
  if params.get('name') == only_saves_work.__name__:
    return [Facts()]
  inner = _inner(params) if name in _CALLS else None
  if inner is not None and len(inner.invars) == len(operands):
    return _walk(inner, operands)
  return [_simple(eqn, operands)] * len(eqn.outvars)


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
      (a | b)._replace(axis=a.axis if a.axis == b.axis else None)
      for a, b in zip(carry, once(carry), strict=True)
    ]
    if new == carry:
      return carry
    carry = new


def _any(facts):
  """Of a value that depends on several; the axis is that of those with one."""
  axes = {x.axis for x in facts if x.axis is not None}
  total = Facts()
  for x in facts:
    total = total | x
  return total._replace(axis=axes.pop() if len(axes) == 1 else None)


def _simple(eqn, operands):
  name, params = eqn.primitive.name, eqn.params
  total = _any(operands)
  shapes = [atom.aval.shape for atom in eqn.invars]
  out = eqn.outvars[0].aval
  axis = total.axis
  if axis is None or name in ELEMENTWISE:
    return total
  if name in _REDUCING:
    if axis in params['axes']:
      mixes = total.mixes
      for x, shape in zip(operands, shapes, strict=True):
        # A single layer is summed with nothing.
        mixes |= x.needs if x.axis is not None and shape[x.axis] > 1 else 0
      return Facts(total.needs, mixes)
    return total._replace(axis=axis - sum(a < axis for a in params['axes']))
  if name == 'broadcast_in_dim':
    return total._replace(axis=params['broadcast_dimensions'][axis])
  if name == 'transpose':
    return total._replace(axis=params['permutation'].index(axis))
  if name == 'squeeze':
    gone = [d % len(shapes[0]) for d in params['dimensions']]
    left = None if axis in gone else axis - sum(d < axis for d in gone)
    return total._replace(axis=left)
  if name == 'reshape':
    shape = shapes[0]
    same = shape[: axis + 1] == out.shape[: axis + 1]
    return total._replace(axis=axis if same else None)
  if name == 'dot_general':
    return total._replace(
      axis=None, mixes=total.mixes | _contracted(params, operands)
    )
  return total._replace(axis=None)


def _contracted(params, operands):
  """The inputs over whose layers a product sums."""
  contracting, _ = params['dimension_numbers']
  mixes = 0
  for x, dimensions in zip(operands, contracting, strict=True):
    if x.axis in dimensions:
      mixes |= x.needs
  return mixes
