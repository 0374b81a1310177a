r"""Moment policies: what becomes of the inner state when the basis turns.

After a refresh the numbers in the inner state belong to directions that are no
longer there. A policy is a function `(first, second, turn) -> (first, second)`
on the moments of one leaf, lists of float32 arrays with the subspace's axis
second to last; `turn` has both bases. Where both sides are projected it is
called twice, for the rows and then for the columns. The names that
`low_rank(moments=...)` knows are in `POLICIES`, besides 'keep' and 'reset',
which need no basis.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from frugax import names
from frugax.optim.adam import wide
from frugax.optim.axes import path_name
from frugax.quant.codecs import Coded, decode, encode


class Turn(NamedTuple):
  """A change of basis.

  Attributes:
    old: the basis before, (*batch, m, r), in float32.
    new: the basis after.
    steps: updates that the moments have seen, an int32 scalar.
    rows: whether the rows of the gradient are projected, so that the moments
      lie as the policy gets them; else they are handed to it transposed.
  """

  old: jax.Array
  new: jax.Array
  steps: jax.Array
  rows: bool = True

  @property
  def matrix(self) -> jax.Array:
    r"""The matrix :math:`C = P_{new}^T P_{old}`, (*batch, r, r)."""
    with jax.default_matmul_precision('highest'):
      return jnp.swapaxes(self.new, -1, -2) @ self.old


Arrays = list[jax.Array]
PolicyFn = Callable[[Arrays, Arrays, Turn], tuple[Arrays, Arrays]]

# Fields of optimizer states that are linear in past gradients.
FIRST = ('mu', 'm', 'm1', 'm2', 'trace', 'ema', 'momentum', 'acc_grads')
# Fields that are quadratic in them, and never negative.
SECOND = ('nu', 'v', 'nu_max', 'sum_of_squares', 'sum_of_squared_grads')


def is_coded(x: Any) -> bool:
  """Whether it is an array in few bits, one leaf of an inner state."""
  return isinstance(x, Coded)


def flatten(state: Any) -> tuple[list[Any], jax.tree_util.PyTreeDef]:
  """Leaves and structure of an inner state; an array in few bits is a leaf."""
  return jax.tree.flatten(state, is_leaf=is_coded)


def load(moment: jax.Array | Coded) -> jax.Array:
  """A moment as it is computed with, in at least float32."""
  return decode(moment) if is_coded(moment) else wide(moment)


def store(x: jax.Array, like: jax.Array | Coded) -> jax.Array | Coded:
  """The inverse of `load`: in the dtype, or the codec and blocks, of `like`."""
  if is_coded(like):
    return encode(x, like.codec, x.ndim - like.merged)
  return x.astype(like.dtype)


def zero(first: Arrays, second: Arrays, turn: Turn) -> tuple[Arrays, Arrays]:
  """Forget the moments of projected leaves; all else, counters too, stays."""
  del turn
  return [0 * m for m in first], [0 * v for v in second]


def sign(first: Arrays, second: Arrays, turn: Turn) -> tuple[Arrays, Arrays]:
  r"""Keep the numbers, but flip those whose vector now points the other way.

  .. math::
    M_i \leftarrow \mathrm{sign}\langle p^{new}_i, p^{old}_i \rangle \, M_i
  """
  along = jnp.sum(turn.new * turn.old, axis=-2)[..., None]
  return [jnp.where(along < 0, -m, m) for m in first], second


def rotate(first: Arrays, second: Arrays, turn: Turn) -> tuple[Arrays, Arrays]:
  r"""Express the moments in the new basis.

  .. math::
    M \leftarrow C M, \qquad V \leftarrow (C \circ C) V, \qquad
    C = P_{new}^T P_{old}

  The second is exact for coordinates that are uncorrelated, and never
  negative. Nothing depends on the signs of the basis vectors any more.
  """
  c = turn.matrix
  with jax.default_matmul_precision('highest'):
    return [c @ m for m in first], [(c * c) @ v for v in second]


def ldadam(
  b1: jax.typing.ArrayLike = 0.9, b2: jax.typing.ArrayLike = 0.999
) -> PolicyFn:
  r"""LDAdam's estimate: turn mean and variance, not the second moment.

  .. math::
    \hat M &= \frac{M}{1-b_1^t}, \quad \hat V = \frac{V}{1-b_2^t}, \qquad
    M \leftarrow C M \\
    V &\leftarrow (1-b_2^t) \left| (C \circ C) (\hat V - \hat M^2)
      + (C \hat M)^2 \right|

  Args:
    b1: decay of the first moment, the same as the inner transformation's.
    b2: decay of the second moment.

  Returns:
    A policy, for inner states with one first moment beside each second.

  References:
    Robert et al., `LDAdam: Adaptive Optimization from Low-Dimensional Gradient
    Statistics <https://arxiv.org/abs/2410.16103>`_, 2024
  """

  def policy(first, second, turn):
    if second and len(first) != 1:
      raise ValueError(
        f"moments='ldadam' found {len(first)} first moments beside a second "
        "one: it needs exactly one; use 'rotate'"
      )
    c = turn.matrix
    t = turn.steps.astype(jnp.float32)
    # Before the first update there is nothing to correct, and nothing to turn.
    bias1, bias2 = (jnp.where(t > 0, 1 - b**t, 1.0) for b in (b1, b2))
    with jax.default_matmul_precision('highest'):
      turned = [c @ m for m in first]
      variances = [
        (c * c) @ (v / bias2 - jnp.square(first[0] / bias1)) for v in second
      ]
    return turned, [
      bias2 * jnp.abs(x + jnp.square(turned[0] / bias1)) for x in variances
    ]

  return policy


POLICIES: dict[str, PolicyFn] = {
  'zero': zero,
  'sign': sign,
  'rotate': rotate,
  'ldadam': ldadam(),
}
NAMES = ('keep', 'reset', *POLICIES)


@dataclasses.dataclass(frozen=True)
class Moments:
  """A moment policy and which parts of the inner state are moments.

  A leaf of the inner state is one of a parameter's moments if the parameter's
  path is part of its own path and it has the shape of the small matrix; the
  name of the field above says of which order. One that belongs to a projected
  parameter, holds more than a number a matrix and is none of these is refused,
  since to leave it as it is would be wrong without a word.

  Args:
    policy: a name or a function.
    first: fields that hold first moments, linear in past gradients.
    second: fields that hold second moments.
    keep: fields to leave as they are.

  Raises:
    ValueError: an unknown policy.

  Examples:
    >>> Moments('rotate', keep=('v_row', 'v_col')).policy
    'rotate'
  """

  policy: str | PolicyFn
  first: tuple[str, ...] = FIRST
  second: tuple[str, ...] = SECOND
  keep: tuple[str, ...] = ()

  def __post_init__(self):
    if not callable(self.policy) and self.policy not in NAMES:
      raise names.unknown('moments policy', self.policy, NAMES)

  @property
  def turns(self) -> PolicyFn | None:
    """The function that turns moments; None for 'keep' and 'reset'."""
    return (
      POLICIES.get(self.policy) if isinstance(self.policy, str) else self.policy
    )

  def turning(self, groups: list['Group'], leaves: int) -> list[int]:
    """Which leaves of the flat inner state a refresh changes."""
    if self.policy == 'reset':
      return list(range(leaves))
    if not self.turns:
      return []
    return [i for group in groups for i in group.first + group.second]


def by_name(moments: str | PolicyFn | Moments) -> Moments:
  """The policy of a name or function, with the usual names of fields."""
  return moments if isinstance(moments, Moments) else Moments(moments)


def for_adam(
  moments: str | PolicyFn | Moments,
  b1: jax.typing.ArrayLike,
  b2: jax.typing.ArrayLike,
) -> str | PolicyFn | Moments:
  """The policy with an Adam's own decays, where 'ldadam' is given by name."""
  policy = by_name(moments)
  if policy.policy != 'ldadam':
    return moments
  return dataclasses.replace(policy, policy=ldadam(b1, b2))


class Group(NamedTuple):
  """Positions in the flat inner state of moments that belong together."""

  leaf: int
  first: list[int]
  second: list[int]


def find(
  moments: Moments,
  state: Any,
  smalls: dict[tuple[Any, ...], tuple[int, ...] | None],
) -> list[Group]:
  """The moments of projected leaves in an inner state, by names and shapes.

  Args:
    moments: the names; unknown leaves are refused if its policy turns moments.
    state: the inner state.
    smalls: by the path of each parameter, in their order, the shape of the
      small matrices; None where it is left whole.

  Returns:
    One group for each parameter and each transformation that has its moments.

  Raises:
    ValueError: a leaf of which the policy cannot know what it is.
  """
  paths = list(smalls)
  index = {path: i for i, path in enumerate(paths)}
  groups: dict[Any, Group] = {}
  leaves = jax.tree.leaves_with_path(state, is_leaf=is_coded)
  for at, (path, x) in enumerate(leaves):
    prefix, i = _owner(path, index)
    small = None if i is None else smalls.get(paths[i])
    if small is None:
      continue
    field = _field(prefix)
    shape = x.shape if is_coded(x) else jnp.shape(x)
    known = shape == small and field in moments.first + moments.second
    if known and (
      is_coded(x) or jnp.issubdtype(jnp.result_type(x), jnp.floating)
    ):
      group = groups.setdefault((i, prefix[:-1]), Group(i, [], []))
      (group.first if field in moments.first else group.second).append(at)
    elif (
      moments.turns
      and field not in moments.keep
      and (shape == small or math.prod(shape) > math.prod(small[:-2]))
    ):
      raise ValueError(
        f'{path_name(path)} of the inner state, {shape}, belongs to a '
        f'projected parameter, but {field!r} says not how it turns with the '
        f'basis: pass moments=Moments({moments.policy!r}, first=..., '
        "second=..., keep=...) with its name in one of them, or 'keep' or "
        "'reset'"
      )
  return list(groups.values())


def turn(
  moments: Moments,
  groups: list[Group],
  arrays: dict[int, jax.Array],
  turns: tuple[Turn, ...],
) -> dict[int, jax.Array]:
  """The moments of a leaf after a change of its bases.

  Args:
    moments: the policy, one that turns moments.
    groups: the groups of the leaf, from `find`.
    arrays: its moments by their positions.
    turns: the change of basis, one for each side that is projected.

  Returns:
    The new moments by their positions.
  """
  new = dict(arrays)
  for group in groups:
    at = group.first + group.second
    for change in turns:

      def lay(x, rows=change.rows):
        return x if rows else jnp.swapaxes(x, -1, -2)

      first, second = moments.turns(
        *([lay(load(new[i])) for i in part] for part in group[1:]), change
      )
      for i, x in zip(at, [*first, *second], strict=True):
        # Before the first basis there is no turn, and no moment that had one.
        new[i] = jax.tree.map(
          functools.partial(jnp.where, change.steps > 0),
          store(lay(x), arrays[i]),
          arrays[i],
        )
  return new


def _owner(path, index):
  """What precedes the last parameter's path in `path`, and which it is."""
  for end in range(len(path), -1, -1):
    for start in range(end + 1):
      if path[start:end] in index:
        return path[:start], index[path[start:end]]
  return path, None


def _field(prefix):
  """The last name above a leaf: of a NamedTuple's field or a dictionary's."""
  for key in reversed(prefix):
    name = getattr(key, 'name', getattr(key, 'key', None))
    if isinstance(name, str):
      return name
  return ''
