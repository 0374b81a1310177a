"""Run a transformation on one part of the parameters, or one layer, a time."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from frugax.optim import dependence, stacks
from frugax.optim.axes import path_name
from frugax.optim.counts import add_count

STACK = 'layers'
_COMMON = 'what layers have in common'  # a key, say; none of them is its source


def _together(by):
  """What an operation does to layers, in words."""
  if by in (*stacks.REDUCING, 'dot_general'):
    return 'sums over all'
  return f'takes together by `{by}`, or may, the'


class NotSeparable(ValueError):
  """A transformation that cannot be taken apart; the message says why."""


class Separate:
  r"""A transformation, taken apart: its state is that of the whole.

  The parameters are a dict; a part is some of its keys, and the layers stacked
  below 'layers' are a part of which one layer is updated at a time. All parts
  of a step get the state from before it, so counters tick once a step, and

  .. math:: \mathrm{update}(G, S) =
    (\mathrm{update}(G_a, S_a), \mathrm{update}(G_b, S_b), \dots)

  to the last bit, but for the order of sums. What a part does not hold is
  hidden from the transformation as `optax.masked` hides it.

  A leaf of the state is

  - of one part, as moments are. One of the layers has an axis of layers, found
    by comparing the states of stacks of L and L + 1 layers;
  - or shared: a counter, a key. Where it is a count of what happened in the
    parts (a field that ends in `_count`), they add to it.

  Args:
    tx: any optax transformation.
    params: arrays or ShapeDtypeStructs.
    parts: name -> keys of `params`; 'layers' must be alone in its part, which
      is called 'layers', too.

  Raises:
    NotSeparable: the update of one part, or of one layer, depends on another: a
      clip by the global norm, a draw of layers. The message names both. So does
      that of an operation which is not known to keep layers apart (`stacks`).
      Or it looks at how many layers there are or at their numbers, as rates
      that fall from layer to layer do. Or it draws the random numbers of all
      layers from one key, as noise on gradients is: a draw that they share, as
      that of a random subspace, is none.

  Examples:
    >>> params = {'layers': jnp.ones((3, 2)), 'head': jnp.ones(2)}
    >>> parts = {'head': ('head',), 'layers': ('layers',)}
    >>> separate = Separate(optax.adam(0.1), params, parts)
    >>> [separate.paths[i] for i in separate.shared]
    ['0/count']
    >>> Separate(optax.lamb(0.1), params, parts)
    Traceback (most recent call last):
    ...
    frugax.optim.separate.NotSeparable: the update of layers sums over all
    layers of layers
  """

  def __init__(
    self,
    tx: optax.GradientTransformation,
    params: Mapping[str, Any],
    parts: Mapping[str, Sequence[str]],
  ):
    self._tx = optax.with_extra_args_support(tx)
    self._params = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(params)
    )
    self._parts = parts
    found, self._treedef = jax.tree.flatten_with_path(self._init(self._params))
    self.paths = [path_name(path) for path, _ in found]
    self._structs = [x for _, x in found]
    index = {path: i for i, (path, _) in enumerate(found)}
    self._treedefs, self.indices = {}, {}
    for part in parts:
      self._add_part(part, index)
    held = [i for indices in self.indices.values() for i in indices]
    self.shared = sorted({i for i in held if held.count(i) > 1})
    own = set(self.indices[STACK]) - set(self.shared)
    self.axes = self._find_axes(own)
    self._check()

  def _init(self, params):
    return jax.eval_shape(self._tx.init, params)

  def _add_part(self, part, index):
    hidden = self.hide(self._layer() if part == STACK else self._params, part)
    try:
      state = self._init(hidden)
    except (ValueError, TypeError) as e:
      raise NotSeparable(f'of {part} alone there is no state: {e}') from e
    found, self._treedefs[part] = jax.tree.flatten_with_path(state)
    missing = [path_name(path) for path, _ in found if path not in index]
    if missing:
      raise NotSeparable(
        f'the state of {part} alone has {missing[0]}, which that of all '
        'parameters has not'
      )
    self.indices[part] = [index[path] for path, _ in found]
    if part == STACK:
      self._sizes = {index[path]: x.shape for path, x in found}

  def _count(self):
    return jax.tree.leaves(self._params[STACK])[0].shape[0]

  def _layer(self, layers=1):
    """The parameters with a stack of so many layers."""
    return self._params | {
      STACK: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((layers, *x.shape[1:]), x.dtype),
        self._params[STACK],
      )
    }

  def hide(self, tree: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The whole tree with an empty node for what is of another part."""
    return {
      key: tree[key]
      if key in self._parts[part]
      else jax.tree.map(lambda _: optax.MaskedNode(), below)
      for key, below in self._params.items()
    }

  def _find_axes(self, own):
    """Index of a leaf of the layers' state -> (axis, entries of a layer)."""
    layers = self._count()
    higher = jax.tree.leaves(self._init(self._layer(layers + 1)))
    axes = {}
    for i in own:
      shape, more = self._structs[i].shape, higher[i].shape
      grown = [k for k, n in enumerate(shape) if n != more[k]]
      if not grown:
        continue
      size = more[grown[0]] - shape[grown[0]]
      one = tuple(size if k in grown else n for k, n in enumerate(shape))
      if len(grown) > 1 or one != self._sizes[i] or shape[grown[0]] % layers:
        raise NotSeparable(
          f'its state {self.paths[i]} has the shape {shape}, that of one layer '
          f'{self._sizes[i]}: it is no stack'
        )
      axes[i] = grown[0], size
    return axes

  def _check(self):
    params, treedef = jax.tree.flatten_with_path(self._params)
    names = [path_name(path) for path, _ in params]
    parts = {key: part for part, keys in self._parts.items() for key in keys}
    of_params = [parts[path[0].key] for path, _ in params]
    of_state = {
      i: part if part != STACK or i in self.axes else _COMMON
      for part, indices in self.indices.items()
      for i in indices
      if i not in self.shared
    }
    n, m = len(params), len(self._structs)
    jaxpr = self._trace(self._params, treedef)
    try:
      higher = self._trace(self._layer(self._count() + 1), treedef)
    except (ValueError, TypeError) as e:
      raise NotSeparable(
        f'it works with {self._count()} layers and not with one more: {e}'
      ) from e
    self._check_draws(jaxpr, higher)
    stacked = [0 if part == STACK else None for part in of_params]
    facts = dependence.find(
      jaxpr,
      [
        *(2 * stacked),
        *(self.axes.get(i, (None, 0))[0] for i in range(m)),
        *(None, None),
      ],
      self._count(),
    )
    labels = [*of_params, *of_params, *(of_state.get(i) for i in range(m))]
    names = [*names, *names, *self.paths]
    self.counted = []

    def other(needs, part):
      """An input of another part."""
      own = {None, part, _COMMON if part == STACK else part}
      found = (
        names[k]
        for k, x in enumerate(labels)
        if needs >> k & 1 and x not in own
      )
      return next(found, None)

    for what, part, x in zip(names[:n], of_params, facts[:n], strict=True):
      if found := other(x.needs, part):
        raise NotSeparable(f'the update of {what} depends on {found}')
      if x.mixes:
        k = (x.mixes & -x.mixes).bit_length() - 1
        raise NotSeparable(
          f'the update of {what} {_together(x.by)} layers of {names[k]}'
        )
    for i, x in enumerate(facts[n:]):
      part, what = of_state.get(i), self.paths[i]
      found = other(x.needs, part)
      if found and part is None and self._is_count(i):
        self.counted.append(i)
      elif found:
        raise NotSeparable(f'its state {what} depends on {found}')
      elif x.mixes and i in self.axes:
        raise NotSeparable(f'its state {what} {_together(x.by)} layers')
    if found := dependence.difference(jaxpr, higher):
      raise NotSeparable(
        f'it looks at how many layers there are, or at their numbers ({found}):'
        ' of one layer it cannot know'
      )

  def _trace(self, params, treedef):
    """An update of all parts, by data: leaves in, leaves out."""
    whole = jax.tree.leaves(params)
    state, state_treedef = jax.tree.flatten(self._init(params))
    n, m = len(whole), len(state)

    def function(*inputs):
      updates, state = self._tx.update(
        treedef.unflatten(inputs[:n]),
        state_treedef.unflatten(inputs[2 * n : 2 * n + m]),
        treedef.unflatten(inputs[n : 2 * n]),
        value=inputs[-2],
        key=inputs[-1],
      )
      return treedef.flatten_up_to(updates) + state_treedef.flatten_up_to(state)

    key = jax.eval_shape(lambda: jax.random.PRNGKey(0))
    value = jax.ShapeDtypeStruct((), jnp.float32)
    return dependence.trace(function, [*whole, *whole, *state, value, key])

  def _check_draws(self, *traces):
    """Raises if more layers make it draw more from one key."""
    drawn, more = (collections.Counter(dependence.draws(x)) for x in traces)
    if drawn != more:
      shape = next(iter((drawn - more) or (more - drawn)))
      raise NotSeparable(
        f'it draws random numbers of the shape {shape} for all layers from one '
        'key: each layer alone would draw the same'
      )

  def _is_count(self, i):
    x = self._structs[i]
    return (
      self.paths[i].endswith('_count')
      and x.shape == ()
      and jnp.issubdtype(x.dtype, jnp.integer)
    )

  def flatten(self, state: Any) -> list[jax.Array]:
    """The leaves of the whole state, which `update` takes."""
    return self._treedef.flatten_up_to(state)

  def unflatten(self, leaves: Sequence[jax.Array]) -> Any:
    """The inverse of `flatten`."""
    return self._treedef.unflatten(leaves)

  def layer(self, leaves: Mapping[int, jax.Array], at: jax.Array):
    """One layer of the leaves that `axes` names."""
    return {
      i: jax.lax.dynamic_slice_in_dim(x, at * self.axes[i][1], *self._cut(i))
      for i, x in leaves.items()
    }

  def put(self, leaves, new, at):
    """The inverse of `layer`."""
    return {
      i: jax.lax.dynamic_update_slice_in_dim(
        x, new[i], at * self.axes[i][1], self.axes[i][0]
      )
      for i, x in leaves.items()
    }

  def _cut(self, i):
    axis, size = self.axes[i]
    return size, axis

  def update(
    self,
    part: str,
    grads: Mapping[str, Any],
    leaves: Mapping[int, jax.Array],
    params: Mapping[str, Any],
    **extra_args: Any,
  ) -> tuple[dict[str, Any], dict[int, jax.Array]]:
    """The update of one part, or of one layer as a stack of height 1.

    Args:
      part: which.
      grads: those of the part's keys.
      leaves: the part's state by index, that of one layer from `layer`.
      params: those of the part's keys.
      **extra_args: for the transformation.

    Returns:
      The updates of the part's keys and its new state by index; of what parts
      add to, `counted`, it is what this one added.
    """
    indices = self.indices[part]
    updates, state = self._tx.update(
      self.hide(grads, part),
      self._treedefs[part].unflatten([leaves[i] for i in indices]),
      self.hide(params, part),
      **extra_args,
    )
    new = self._treedefs[part].flatten_up_to(state)
    new = dict(zip(indices, new, strict=True))
    for i in self.counted:
      if i in new:
        new[i] = new[i] - leaves[i]
    return {key: updates[key] for key in self._parts[part]}, new

  def add(self, old: jax.Array, added: jax.Array) -> jax.Array:
    """A count with what parts added to it."""
    return add_count(old, added)
