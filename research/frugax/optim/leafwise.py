"""Run a function of whole trees leaf by leaf, where its leaves do not mix.

A transformation is traced once. The trace tells which results depend on which
leaves; if none mixes two, those of one leaf can be computed alone, and if they
are elementwise, in parts. Nothing else must be known of the transformation.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from frugax.optim.declared import by_layer

# Each element of the result comes from the same element of the operands.
ELEMENTWISE = frozenset(
  getattr(jax.lax, f'{name}_p').name
  for name in (
    ['abs', 'add', 'and', 'cbrt', 'ceil', 'clamp', 'convert_element_type']
    + ['copy', 'div', 'eq', 'erf', 'exp', 'exp2', 'expm1', 'floor', 'ge', 'gt']
    + ['integer_pow', 'is_finite', 'le', 'log', 'log1p', 'logistic', 'lt']
    + ['max', 'min', 'mul', 'ne', 'neg', 'not', 'or', 'pow', 'rem', 'round']
    + ['reduce_precision', 'rsqrt', 'select_n', 'sign', 'sqrt', 'square']
    + ['sub', 'tanh', 'xor']
  )
)
# From one scalar to an array, all of whose elements are it.
_SPREADING = frozenset(('broadcast_in_dim', 'reshape'))
SHARED = -1  # the owner of what belongs to no leaf


class _Constant(NamedTuple):
  value: Any


class _Step(NamedTuple):
  """An equation of a jaxpr, with the constants or numbers of its values."""

  jaxpr: Any
  eqn: Any
  inputs: tuple[int | _Constant, ...]
  outputs: tuple[int, ...]

  @property
  def name(self):
    return self.eqn.primitive.name

  @property
  def scalar(self):
    # A sum over an array of one number depends on how large a part is.
    atoms = (*self.eqn.invars, *self.eqn.outvars)
    return all(atom.aval.shape == () for atom in atoms)

  def run(self, values):
    operands = {
      variable: _read(value, values)
      for variable, value in zip(self.eqn.invars, self.inputs, strict=True)
      if not isinstance(variable, jex.Literal)
    }
    one = self.jaxpr.replace(
      constvars=[],
      invars=list(operands),
      outvars=self.eqn.outvars,
      eqns=[self.eqn],
    )
    found = jex.jaxpr_as_fun(jex.ClosedJaxpr(one, ()))(*operands.values())
    values.update(zip(self.outputs, found, strict=True))


class _Cond(NamedTuple):
  """What a cond computes for one leaf.

  Attributes:
    branches: by index; their owners are positions among the operands.
    picks: the outputs of a branch that are computed.
    places: the operands that those take.
    inputs: the index, and those operands.
    outputs: the numbers of the results.
  """

  branches: tuple['Program', ...]
  picks: list[int]
  places: list[int]
  inputs: tuple[int | _Constant, ...]
  outputs: tuple[int, ...]
  name = 'cond'
  scalar = False

  def run(self, values):
    def branch(program):
      def run(*operands):
        return program.run(
          self.picks, dict(zip(self.places, operands, strict=True))
        )

      return run

    index, *operands = (_read(value, values) for value in self.inputs)
    found = jax.lax.switch(index, [*map(branch, self.branches)], *operands)
    values.update(zip(self.outputs, found, strict=True))


class _Barrier(NamedTuple):
  """A barrier, as far as it concerns one leaf."""

  inputs: tuple[int | _Constant, ...]
  outputs: tuple[int, ...]
  name = 'optimization_barrier'
  scalar = False

  def run(self, values):
    found = jax.lax.optimization_barrier(
      [_read(value, values) for value in self.inputs]
    )
    values.update(zip(self.outputs, found, strict=True))


class Program:
  """A traced function from arrays to a list of arrays.

  Args:
    function: takes the inputs, returns a list.
    inputs: shapes and dtypes.
    owners: the leaf that each input belongs to, or SHARED.
  """

  def __init__(
    self,
    function: Callable[..., list[jax.Array]],
    inputs: list[jax.ShapeDtypeStruct],
    owners: list[int],
  ):
    closed = jax.make_jaxpr(function)(*inputs)
    self._steps: list[_Step | _Cond | _Barrier] = []
    self._inputs = list(zip(inputs, owners, strict=True))
    self._owners = [frozenset({i} - {SHARED}) for i in owners]
    self._outputs = self._inline(closed, range(len(inputs)))

  def _inline(self, closed, inputs):
    """Number a jaxpr's values, with those of the jitted functions in it."""
    jaxpr = closed.jaxpr
    constants = map(_Constant, closed.consts)
    values = dict(zip(jaxpr.constvars, constants, strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom):
      literal = isinstance(atom, jex.Literal)
      return _Constant(atom.val) if literal else values[atom]

    for eqn in jaxpr.eqns:
      operands = tuple(map(read, eqn.invars))
      name = eqn.params.get('name')
      if eqn.primitive.name == 'jit' and name != by_layer.__name__:
        outputs = self._inline(eqn.params['jaxpr'], operands)
      elif eqn.primitive.name == 'cond':
        outputs = self._cond(eqn, operands)
      elif eqn.primitive.name == 'optimization_barrier':
        outputs = self._barrier(operands)
      else:
        outputs = self._number([self._union(operands)] * len(eqn.outvars))
        self._steps.append(_Step(jaxpr, eqn, operands, tuple(outputs)))
      values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]

  def _barrier(self, operands):
    return self._by_owner(
      [self._owners_of(value) for value in operands],
      lambda picks, new: _Barrier(_at(operands, picks), new),
    )

  def _cond(self, eqn, operands):
    """A cond for each owner, of what the branches compute for it."""
    index, *operands = operands
    places = list(range(len(operands)))
    avals = [variable.aval for variable in eqn.invars[1:]]
    branches = tuple(
      Program(jex.jaxpr_as_fun(branch), avals, places)
      for branch in eqn.params['branches']
    )
    needed = [
      frozenset().union(*(b.owners_of_output(i) for b in branches))
      for i in range(len(eqn.outvars))
    ]

    def step(picks, new):
      own = sorted(frozenset().union(*_at(needed, picks)))
      inputs = (index, *_at(operands, own))
      return _Cond(branches, picks, own, inputs, new)

    return self._by_owner(
      [self._union([index, *_at(operands, own)]) for own in needed], step
    )

  def _by_owner(self, owners, step):
    """Numbers of outputs, from a step for all those of the same owners."""
    outputs = self._number(owners)
    for one in dict.fromkeys(owners):
      picks = [i for i, owner in enumerate(owners) if owner == one]
      self._steps.append(step(picks, _at(outputs, picks)))
    return outputs

  def _number(self, owners):
    first = len(self._owners)
    self._owners += owners
    return range(first, len(self._owners))

  def _union(self, values):
    return frozenset().union(*map(self._owners_of, values))

  def _owners_of(self, value):
    return frozenset() if isinstance(value, _Constant) else self._owners[value]

  def owners_of_output(self, i: int) -> frozenset[int]:
    """The leaves that an output depends on."""
    return self._owners_of(self._outputs[i])

  def _needed(self, outputs):
    """The steps to some of the outputs, in their order."""
    wanted, steps = {self._outputs[i] for i in outputs}, []
    for step in reversed(self._steps):
      if wanted.intersection(step.outputs):
        steps.append(step)
        wanted.update(v for v in step.inputs if not isinstance(v, _Constant))
    return steps[::-1]

  def separates(self, owners: list[int]) -> bool:
    """Whether no output depends on another leaf than its owner."""
    return all(
      self.owners_of_output(i) <= {owner} for i, owner in enumerate(owners)
    )

  def names(self, outputs: list[int]) -> list[str]:
    """The primitives that some of the outputs take."""
    return [step.name for step in self._needed(outputs)]

  def elementwise(self, outputs: list[int], shape: tuple[int, ...]) -> bool:
    """Whether an output's elements come from those of arrays of this shape."""
    uniform, alike = set(), set()
    for i, (x, owner) in enumerate(self._inputs):
      if owner == SHARED and x.shape == ():
        uniform.add(i)
      elif owner != SHARED and x.shape == shape:
        alike.add(i)

    def among(value, known):
      if isinstance(value, _Constant):
        return jnp.ndim(value.value) == 0
      return value in known

    for step in self._needed(outputs):
      # What is made of numbers alone, such as a schedule, is the same for all.
      if all(among(value, uniform) for value in step.inputs) and (
        step.name in ELEMENTWISE | _SPREADING or step.scalar
      ):
        uniform.update(step.outputs)
      elif step.name in ELEMENTWISE and all(
        among(value, uniform | alike) for value in step.inputs
      ):
        alike.update(step.outputs)
      else:
        return False
    return all(among(self._outputs[i], uniform | alike) for i in outputs)

  def run(self, outputs: list[int], inputs: dict[int, jax.Array]) -> list[Any]:
    """Some of the outputs, from the inputs that they depend on."""
    values = dict(inputs)
    for step in self._needed(outputs):
      step.run(values)
    return [_read(self._outputs[i], values) for i in outputs]


def _at(values, places):
  return tuple(values[i] for i in places)


def _read(value, values):
  return value.value if isinstance(value, _Constant) else values[value]


class Parts(NamedTuple):
  """A division of an array's first axes into equal parts.

  Attributes:
    count: how many.
    rows: how many first axes are divided, flattened.
    shape: of a part, with as many axes as the array.
  """

  count: int
  rows: int
  shape: tuple[int, ...]

  def split(self, x: jax.Array) -> jax.Array:
    """(rows..., rest...) to (count, rows of a part, rest...), ready for `put`.

    Numbers in bfloat16 become their bits: XLA would replace a part of them on a
    CPU by converting the whole array to float32 and back.
    """
    # Axes of size 1 should be free, but for some XLA copies the array.
    height = tuple(n for n in self.shape[: self.rows] if n > 1)
    return _bits(x.reshape(self.count, *height, *x.shape[self.rows :]))

  def at(self, x: jax.Array, like: jax.Array, i: jax.Array) -> jax.Array:
    """Part i of an array that was `like` before it was split."""
    x = jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
    if x.dtype != like.dtype:
      x = jax.lax.bitcast_convert_type(x, like.dtype)
    return x.reshape(*self.shape[: self.rows], *like.shape[self.rows :])

  def put(self, x: jax.Array, part: jax.Array, i: jax.Array) -> jax.Array:
    """The array that was split with part i replaced."""
    part = _bits(part).reshape(x.shape[1:])
    return jax.lax.dynamic_update_index_in_dim(x, part, i, 0)

  def join(self, x: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `split`."""
    if x.dtype != like.dtype:
      x = jax.lax.bitcast_convert_type(x, like.dtype)
    return x.reshape(like.shape)


def _bits(x):
  if x.dtype != jnp.bfloat16:
    return x
  return jax.lax.bitcast_convert_type(x, jnp.uint16)


def cut(
  shape: tuple[int, ...], rows: int, size: int, tile: int = 1
) -> Parts | None:
  """Parts of about `size` elements; None if there is no such division.

  Args:
    shape: of the array.
    rows: how many first axes may be divided.
    size: elements a part, met within a factor of 16.
    tile: what the flattened rows of a part are a multiple of.

  Returns:
    The division.

  Examples:
    >>> cut((8, 512, 1376), 2, 2**16)
    Parts(count=64, rows=2, shape=(1, 64, 1376))
  """
  height = math.prod(shape[:rows])
  ideal = math.prod(shape) / size
  if not rows or ideal <= 1 or height % tile:
    return None
  tiles = height // tile
  counts = [n for n in range(1, tiles + 1) if tiles % n == 0]
  count = min(counts, key=lambda n: abs(math.log(n / ideal)))
  if not 1 / 16 < count / ideal < 16:
    return None
  part = (*[1] * (rows - 1), height // count, *shape[rows:])
  return Parts(count, rows, part)
