"""Optimized HLO as text, parsed: computations, shapes, how often loops run."""

import dataclasses
import functools
import re

# Bits of an element; what is not here (token, opaque) takes none.
_BITS = {'pred': 8, 'c64': 64, 'c128': 128, 'f64': 64, 'f32': 32, 'f16': 16}
_NUMBER = re.compile(r'(?:s|u|bf|f)(\d+)')
_SHAPE = re.compile(r'\b([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s*(ROOT )?%?([\w.\-]+) = (.*)$')
_OPCODE = re.compile(r' ?([a-z][\w\-]*)\(')
_NAME = re.compile(r'%([\w.\-]+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_MEMORY = re.compile(r'S\((\d+)\)')


@dataclasses.dataclass(frozen=True)
class Shape:
  """An array: its element type, dimensions, and whether it lies in HBM."""

  dtype: str
  dims: tuple[int, ...]
  hbm: bool = True

  @property
  def size(self) -> int:
    """Number of elements."""
    n = 1
    for d in self.dims:
      n *= d
    return n

  @property
  def nbytes(self) -> float:
    """Bytes without padding; elements of 4 bits count as half a byte."""
    bits = _BITS.get(self.dtype)
    if bits is None:
      number = _NUMBER.match(self.dtype)
      bits = int(number[1]) if number else 0
    return self.size * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of HLO.

  Attributes:
    name: without the percent sign.
    shapes: the arrays it gives: one, or those of a tuple.
    opcode: as in 'dot'.
    operands: names.
    attributes: the rest of the line.
    argument: what the parentheses hold, for constants and parameters.
    root: whether the computation gives what it gives.
  """

  name: str
  shapes: tuple[Shape, ...]
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  argument: str
  root: bool

  def called(self, *keys: str) -> list[str]:
    """The computations that attributes name, in their order."""
    found = []
    for key in keys:
      match = re.search(rf'\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)', self.attributes)
      if match:
        found += [
          n.strip('%{} ') for n in match[1].split(',') if n.strip('%{} ')
        ]
    return found


@dataclasses.dataclass(frozen=True)
class Computation:
  """A named list of instructions."""

  name: str
  instructions: tuple[Instruction, ...]

  @functools.cached_property
  def by_name(self) -> dict[str, Instruction]:
    """The instructions by their names."""
    return {i.name: i for i in self.instructions}

  @functools.cached_property
  def root(self) -> Instruction:
    """What the computation gives."""
    return next(i for i in self.instructions if i.root)

  @functools.cached_property
  def parameters(self) -> dict[str, int]:
    """Parameter name -> its number."""
    return {
      i.name: int(i.argument)
      for i in self.instructions
      if i.opcode == 'parameter'
    }


@dataclasses.dataclass(frozen=True)
class Module:
  """A program: computations by name, and where it begins."""

  computations: dict[str, Computation]
  entry: str


def shapes(text: str) -> tuple[Shape, ...]:
  """The arrays in a type.

  Examples:
    >>> shapes('(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, s32[])')
    (Shape(dtype='bf16', dims=(8, 128), hbm=False),
     Shape(dtype='s32', dims=(), hbm=True))
  """
  return tuple(
    Shape(
      dtype,
      tuple(int(d.lstrip('<=')) for d in dims.split(',') if d),
      not _MEMORY.search(layout or ''),
    )
    for dtype, dims, layout in _SHAPE.findall(text)
  )


def parse(text: str) -> Module:
  """Reads the text of an optimized program.

  Args:
    text: what `compiled.as_text()` gives.

  Returns:
    The module.

  Raises:
    ValueError: there is no entry computation in it.

  Examples:
    >>> module = parse('''
    ... ENTRY %main (x: f32[2,3]) -> f32[2,3] {
    ...   %x = f32[2,3]{1,0} parameter(0)
    ...   ROOT %y = f32[2,3]{1,0} add(%x, %x)
    ... }
    ... ''')
    >>> module.computations[module.entry].root.operands
    ('x', 'x')
  """
  computations, entry, name, lines = {}, None, None, []
  for line in text.splitlines():
    if name is None:
      if header := _HEADER.match(line):
        name, lines = header[2], []
        entry = name if header[1] else entry
    elif line.startswith('}'):
      computations[name] = Computation(name, tuple(lines))
      name = None
    elif match := _INSTRUCTION.match(line):
      lines.append(_instruction(*match.groups()))
  if entry is None:
    raise ValueError('the text has no ENTRY computation: it is no HLO module')
  return Module(computations, entry)


def _instruction(root, name, rest):
  end = _balanced(rest, 0) if rest.startswith('(') else rest.find(' ')
  kind, rest = rest[:end], rest[end:]
  match = _OPCODE.match(rest)
  if match is None:
    raise ValueError(f'HLO instruction {name!r} has no opcode: {rest[:80]!r}')
  start = match.end() - 1
  end = _balanced(rest, start)
  inside = rest[start + 1 : end - 1]
  return Instruction(
    name=name,
    shapes=shapes(kind),
    opcode=match[1],
    operands=tuple(_NAME.findall(inside)),
    attributes=rest[end:],
    argument=inside,
    root=bool(root),
  )


def _balanced(text, start):
  """The end of what the parenthesis at `start` opens."""
  depth = 0
  for match in re.compile(r'[()]').finditer(text, start):
    depth += 1 if match[0] == '(' else -1
    if depth == 0:
      return match.end()
  return len(text)


def trip_count(
  module: Module, loop: Instruction, inside: Computation, outer=None
) -> int | None:
  """How often the body of a loop runs; None if the text does not tell.

  CPU and GPU programs say so. Of TPU programs it is read from the condition,
  `i < n`, and from what i and n are when the loop begins.

  Args:
    module: the program.
    loop: a `while` instruction.
    inside: the computation that it stands in.
    outer: the loop whose body that is, and the computation of that one.

  Returns:
    The number, or None.
  """
  if known := _TRIPS.search(loop.attributes):
    return int(known[1])
  condition = module.computations[loop.called('condition')[0]]
  root = condition.root
  operands = [condition.by_name[n] for n in root.operands]
  attributes = root.attributes
  if root.opcode == 'fusion':
    fused = module.computations[root.called('calls')[0]]
    by_number = {i: operands[i] for i in range(len(operands))}
    attributes = fused.root.attributes
    root, operands = (
      fused.root,
      [
        by_number[fused.parameters[n]]
        if n in fused.parameters
        else fused.by_name[n]
        for n in fused.root.operands
      ],
    )
  if root.opcode != 'compare' or 'direction=LT' not in attributes:
    return None

  def begins_with(instruction):
    if instruction.opcode == 'get-tuple-element':
      return _element(module, loop, inside, _index(instruction), outer)
    return _constant(module, inside, instruction, outer)

  first, limit = (begins_with(i) for i in operands)
  if operands[0].opcode != 'get-tuple-element' or None in (first, limit):
    return None
  step = _step(module, loop, _index(operands[0]))
  return -(-max(limit - first, 0) // step) if step else None


def _step(module, loop, index):
  """What a round adds to the counter: more than 1 if it is unrolled in part."""
  body = module.computations[loop.called('body')[0]]
  if body.root.opcode != 'tuple':
    return None
  step, at = 0, body.by_name[body.root.operands[index]]
  while at.opcode != 'get-tuple-element':
    if at.opcode in ('copy', 'bitcast', 'convert'):
      at = body.by_name[at.operands[0]]
      continue
    operands, operation = [body.by_name[n] for n in at.operands], at
    if at.opcode == 'fusion':
      operation = module.computations[at.called('calls')[0]].root
      fused = module.computations[at.called('calls')[0]]
      operands += [i for i in fused.instructions if i.opcode == 'constant']
    added = [
      n for i in operands if (n := _constant(module, body, i, None)) is not None
    ]
    rest = [i for i in operands if _constant(module, body, i, None) is None]
    if operation.opcode != 'add' or len(added) != 1 or len(rest) != 1:
      return None
    step, at = step + added[0], rest[0]
  return step if _index(at) == index and step > 0 else None


def _index(instruction):
  return int(re.search(r'index=(\d+)', instruction.attributes)[1])


def _element(module, loop, inside, index, outer):
  """The number that an element of a loop's tuple begins with."""
  start = inside.by_name[loop.operands[0]]
  while start.opcode in ('copy', 'opt-barrier', 'bitcast'):
    start = inside.by_name[start.operands[0]]
  if start.opcode != 'tuple':
    return None
  return _constant(module, inside, inside.by_name[start.operands[index]], outer)


def _constant(module, inside, instruction, outer):
  """The integer that an instruction gives, if it is always the same."""
  while instruction.opcode in ('copy', 'bitcast', 'convert'):
    instruction = inside.by_name[instruction.operands[0]]
  if instruction.opcode == 'constant':
    try:
      return int(instruction.argument)
    except ValueError:
      return None
  if instruction.opcode != 'get-tuple-element' or outer is None:
    return None
  source = inside.by_name[instruction.operands[0]]
  if source.opcode != 'parameter':
    return None
  # An element of an outer loop that its body hands on as it is.
  index, (loop, around, further) = _index(instruction), outer
  handed = inside.root
  if handed.opcode != 'tuple':
    return None
  same = inside.by_name[handed.operands[index]]
  if same.opcode != 'get-tuple-element' or _index(same) != index:
    return None
  return _element(module, loop, around, index, further)
