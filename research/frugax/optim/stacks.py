"""Where the layers of a stack are after an operation of a traced function."""

import math
from collections.abc import Sequence
from typing import Any

from frugax.optim.leafwise import ELEMENTWISE

# Along no axis: the array is of one layer, that of a scan over the stack. One
# of a scan within is below it.
ROW = -1

REDUCING = frozenset(
  f'reduce_{name}' for name in ('sum', 'max', 'min', 'prod', 'and', 'or', 'xor')
)
_LINALG = frozenset(
  ['svd', 'qr', 'eigh', 'cholesky', 'lu', 'geqrf', 'householder_product']
  + ['triangular_solve']
)
# As elementwise ones, but that some change the width or the rank of a type.
_ALIKE = ELEMENTWISE | {
  *('add_any', 'bitcast_convert_type', 'copy_p', 'sharding_constraint'),
  'stop_gradient',
  *('shift_left', 'shift_right_logical', 'shift_right_arithmetic'),
  *('population_count', 'clz', 'nextafter', 'erf_inv', 'erfc', 'lgamma'),
  *('sin', 'cos', 'tan', 'atan2', 'sinh', 'cosh', 'asin', 'acos', 'atan'),
  *('asinh', 'acosh', 'atanh', 'real', 'imag', 'conj', 'digamma'),
}


def after(eqn: Any, axes: Sequence[int | None], layers: int) -> int | None:
  """The axis of the layers in the results of an equation of a jaxpr.

  Layer l of a result depends on layer l of each operand that has an axis, and
  on no other layer. An axis may hold several entries a layer, those of the
  first layer first.

  Args:
    eqn: the equation; one with no jaxpr in it.
    axes: of its operands: an axis, `ROW` or below, or None for those that do
      not depend on a stack. One at least is not None.
    layers: the height of the stacks.

  Returns:
    The axis; None if layers are mixed, or might be.
  """
  own = [k for k, axis in enumerate(axes) if axis is not None]
  axis = axes[own[0]]
  same = all(axes[k] == axis for k in own)
  if any(axes[k] <= ROW for k in own):
    return axis if same else None
  if not same and eqn.primitive.name not in ('dot_general', 'gather'):
    return None
  shapes = [atom.aval.shape for atom in eqn.invars]
  out = eqn.outvars[0].aval.shape
  return _after(eqn, shapes, out, own, axis, axes, layers)


def _after(eqn, shapes, out, own, axis, axes, layers):
  name, params = eqn.primitive.name, eqn.params
  shape = shapes[own[0]]
  size = shape[axis]
  kept = None
  if name in _ALIKE:
    kept = axis if axis < len(out) and out[axis] == size else None
  elif name in REDUCING or name in ('argmax', 'argmin'):
    if axis not in params['axes']:
      kept = axis - sum(a < axis for a in params['axes'])
  elif name.startswith('cum'):
    kept = axis if axis != params['axis'] else None
  elif name == 'sort':
    kept = axis if axis != params['dimension'] else None
  elif name == 'top_k':
    along = params.get('axis', -1) % len(shape)
    kept = axis if axis != along else None
  elif name == 'rev':
    kept = axis if axis not in params['dimensions'] else None
  elif name == 'concatenate':
    # The rest may be empty.
    kept = axis if axis != params['dimension'] or out[axis] == size else None
  elif name == 'stack':
    kept = axis + (params['axis'] <= axis)
  elif name == 'unstack':
    kept = axis - (params['axis'] < axis) if axis != params['axis'] else None
  elif name == 'split':
    kept = axis if axis != params['axis'] else None
  elif name == 'pad':
    whole = not any(params['padding_config'][axis])
    kept = axis if whole and own == [0] else None
  elif name == 'slice':
    step = (params['strides'] or [1] * len(shape))[axis]
    whole = params['limit_indices'][axis] - params['start_indices'][axis]
    kept = axis if step == 1 and whole == size else None
  elif name == 'dynamic_slice':
    kept = axis if params['slice_sizes'][axis] == size else None
  elif name == 'dynamic_update_slice':
    kept = axis if shapes[1][axis] == shapes[0][axis] else None
  elif name == 'broadcast_in_dim':
    kept = params['broadcast_dimensions'][axis]
  elif name == 'transpose':
    kept = params['permutation'].index(axis)
  elif name == 'squeeze':
    gone = [d % len(shape) for d in params['dimensions']]
    kept = None if axis in gone else axis - sum(d < axis for d in gone)
  elif name == 'reshape':
    kept = _reshaped(shape, out, axis, layers)
  elif name == 'dot_general':
    kept = _multiplied(params, shapes, axes)
  elif name in _LINALG:
    kept = axis if axis < len(shapes[0]) - 2 else None
  elif name == 'gather':
    kept = _gathered(params, shapes, out, axes)
  elif name.startswith('scatter'):
    numbers = params['dimension_numbers']
    batched = axis in numbers.operand_batching_dims and own == [0]
    kept = axis if batched else None
  return kept


def _reshaped(shape, out, axis, layers):
  """An axis before which there is as much, and that the layers divide."""
  before = math.prod(shape[:axis])
  for k, size in enumerate(out):
    if math.prod(out[:k]) == before and size % layers == 0:
      return k
  return None


def _multiplied(params, shapes, axes):
  contracting, batch = params['dimension_numbers']
  places = set()
  free = len(batch[0])
  for axis, shape, gone, common in zip(
    axes, shapes, contracting, batch, strict=True
  ):
    left = [k for k in range(len(shape)) if k not in {*gone, *common}]
    if axis is not None:
      if axis in gone:
        return None
      both = axis in common
      places.add(common.index(axis) if both else free + left.index(axis))
    free += len(left)
  return places.pop() if len(places) == 1 else None


def _gathered(params, shapes, out, axes):
  """Of an axis of what is looked up, of the places, or of both."""
  numbers = params['dimension_numbers']
  batches = [k for k in range(len(out)) if k not in numbers.offset_dims]
  places = set()
  axis, at = axes
  if at is not None:
    places.add(batches[at])
  if axis in numbers.operand_batching_dims:
    k = numbers.operand_batching_dims.index(axis)
    places.add(batches[numbers.start_indices_batching_dims[k]])
  elif axis is not None:
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    if axis in gone or params['slice_sizes'][axis] != shapes[0][axis]:
      return None
    left = [k for k in range(len(shapes[0])) if k not in gone]
    places.add(numbers.offset_dims[left.index(axis)])
  return places.pop() if len(places) == 1 else None
