"""What lies in a chip's memory, from the compiler's own buffer assignment."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

_ALLOCATION = re.compile(r'^allocation \d+: size (\d+), (.*)')
_VALUE = re.compile(
  r'^ value: .*\(size=(\d+),offset=(\d+)\): (\w+)\[([\d,]*)\]'
)
# Of the compiler's refusal: what it needs, and of how much.
_NEEDS = (
  re.compile(r'Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm'),
  re.compile(
    r'HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM'
    r' \(([\d.]+)([KMGT]?)\)'
  ),
)
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


class Temporaries(NamedTuple):
  """Bytes of temporary memory, told apart by the shapes of what lies there.

  Attributes:
    total: of all.
    activations: that arrays with a leading axis of layers take, which is what
      a layer keeps for its backward pass.
    gradients: besides, those of arrays with as many elements as a parameter has
      on a chip: gradients, updates and weights in another dtype.
    rest: logits, what one layer computes with, and gaps.
    largest: the largest arrays, and their bytes.
  """

  total: int = 0
  activations: int = 0
  gradients: int = 0
  rest: int = 0
  largest: tuple[tuple[str, int], ...] = ()


def temporaries(
  assignment: str, layers: Iterable[int], parameters: Iterable[int]
) -> Temporaries:
  """Reads the text of a buffer assignment.

  The same place holds one array after another. It counts for the first of the
  classes that any array in it has, so that the classes add up to the total.

  Args:
    assignment: the text, as XLA dumps it.
    layers: the leading axes of stacks of layers.
    parameters: the number of elements of each parameter on a chip.

  Returns:
    The bytes.

  Examples:
    >>> text = '''allocation 5: size 1000, preallocated-temp:
    ...  value: <7 x @0> (size=400,offset=0): f32[5,20]{1,0}
    ...  value: <8 g @0> (size=800,offset=200): f32[20,10]{1,0}
    ... '''
    >>> temporaries(text, layers=[5], parameters=[200])[:4]
    (1000, 400, 600, 0)
  """
  layers, parameters = set(layers), set(parameters)
  total, counts, base = 0, False, 0
  stacks, others, arrays = [], [], {}
  for line in assignment.splitlines():
    if allocation := _ALLOCATION.match(line):
      # Other memories than HBM have colors.
      counts = 'preallocated-temp' in allocation[2] and (
        'color' not in allocation[2]
      )
      if counts:
        base, total = total, total + int(allocation[1])
    elif counts and (match := _VALUE.match(line)):
      size, offset, dtype, shape = match.groups()
      dims = tuple(int(d) for d in shape.split(',') if d)
      place = (base + int(offset), base + int(offset) + int(size))
      arrays.setdefault(place, f'{dtype}[{shape}]')
      if len(dims) > 1 and math.prod(dims) in parameters:
        others.append(place)
      elif len(dims) > 1 and dims[0] in layers:
        stacks.append(place)
  activations = _covered(stacks)
  gradients = _covered([*stacks, *others]) - activations
  largest = sorted(arrays.items(), key=lambda a: a[0][0] - a[0][1])[:8]
  return Temporaries(
    total,
    activations,
    gradients,
    total - activations - gradients,
    tuple((name, stop - start) for (start, stop), name in largest),
  )


def _covered(places):
  """Length of the union of intervals."""
  total, end = 0, 0
  for start, stop in sorted(places):
    total += max(stop - max(start, end), 0)
    end = max(end, stop)
  return total


def needed(message: str) -> tuple[int, int] | None:
  """What a compiler that refused a program says of its memory.

  Args:
    message: of the error.

  Returns:
    The bytes needed and those available; None if the message is another.

  Examples:
    >>> needed('Ran out of memory on HBM, the total memory required for HLO'
    ...   ' temporaries (30.00G) exceeds available HBM (15.75G).')
    (32212254720, 16911433728)
  """
  for pattern in _NEEDS:
    if match := pattern.search(message):
      need, unit, have, other = match.groups()
      return int(float(need) * _UNITS[unit]), int(float(have) * _UNITS[other])
  return None
