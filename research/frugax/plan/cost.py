"""What a program multiplies, reads and sends, with loops counted as they run.

XLA's own cost analysis counts the body of a loop once, and so one layer of a
model whose layers are a loop. These are static counts of the optimized program
on one device; `roofline` turns them into an estimate of its time.
"""

import collections
import dataclasses
import json
import math
import re

import numpy as np

from frugax.plan import chips, hlo

COLLECTIVES = (
  *('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all'),
  *('ragged-all-to-all', 'collective-permute', 'collective-broadcast'),
)
# No traffic of their own; loops, calls and branches count by what they run.
_FREE = {
  *('parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast'),
  *('after-all', 'partition-id', 'replica-id', 'opt-barrier', 'iota'),
  *('while', 'conditional', 'call', 'async-update', 'domain'),
}
_GEMM = re.compile(r'^__(?:cublas|triton)')
_GROUPS = re.compile(
  r'replica_groups=(?:mesh\[([^\]]*)\] *\{([^}]*)\}|\[(\d+),(\d+)\]'
  r'|\{\{([\d,]*)\})'
)
_CHAIN = re.compile(r'chain_id="(\d+)"')
_CHANNEL = re.compile(r'channel_id=(\d+)')
_ESTIMATE = re.compile(r'"cost_estimate":(\{[^{}]*\})')


@dataclasses.dataclass
class Collective:
  """All collectives of one kind.

  Attributes:
    count: how many are run in a step.
    bytes: of the arrays that a device gets of them, or gives to be reduced.
    sent: bytes that a device sends, if each goes around a ring.
  """

  count: float = 0.0
  bytes: float = 0.0
  sent: float = 0.0


@dataclasses.dataclass
class Cost:
  """What a device does in a step.

  Attributes:
    flops: kind of operands -> operations of matrix products, a multiply and an
      add being two. All else (norms, softmax, Adam) is not counted.
    bytes: to and from memory, each fusion reading its operands and writing its
      results once.
    collectives: kind -> what is sent.
    unknown_loops: loops whose length the text does not tell; they count once.
    unknown_kernels: custom kernels without an estimate of their operations.
  """

  flops: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  bytes: float = 0.0
  collectives: dict[str, Collective] = dataclasses.field(default_factory=dict)
  unknown_loops: int = 0
  unknown_kernels: int = 0

  def add(self, other: 'Cost', times: float = 1) -> None:
    """Adds another cost, so many times."""
    for kind, n in other.flops.items():
      self.flops[kind] += n * times
    self.bytes += other.bytes * times
    for kind, c in other.collectives.items():
      self.send(kind, c.count * times, c.bytes * times, c.sent * times)
    self.unknown_loops += other.unknown_loops
    self.unknown_kernels += other.unknown_kernels

  def send(self, kind: str, count: float, size: float, sent: float) -> None:
    """Adds collectives."""
    found = self.collectives.setdefault(kind, Collective())
    found.count += count
    found.bytes += size
    found.sent += sent

  @property
  def total_flops(self) -> float:
    """Operations of all kinds."""
    return sum(self.flops.values())

  @property
  def sent(self) -> float:
    """Bytes sent by all collectives."""
    return sum(c.sent for c in self.collectives.values())


def count(module: hlo.Module, dear: bool = False) -> Cost:
  """Counts what a program does.

  Args:
    module: the optimized program of one device.
    dear: of branches (a subspace is found anew, or not) count the one with the
      most operations; else the one with the fewest, which most steps take.

  Returns:
    The cost of a step.
  """
  return _Counter(module, dear).computation(module.entry)


def roofline(cost: Cost, chip: chips.Chip) -> dict[str, float]:
  """Seconds that a step takes at least; an estimate, nothing is measured.

  Args:
    cost: what a device does.
    chip: what it can do.

  Returns:
    'compute', 'memory' and 'network', each as if there were no other, and
    'step', the longest of them, which assumes that they overlap perfectly.
    Empty if the chip's rates are not known.

  Examples:
    >>> cost = Cost(bytes=819e9)
    >>> roofline(cost, chips.CHIPS['v5e'])['step']
    1.0
  """
  if not chip.flops:
    return {}
  seconds = {
    'compute': sum(n / chip.flops[kind] for kind, n in cost.flops.items()),
    'memory': cost.bytes / chip.bandwidth,
    'network': cost.sent / chip.link,
  }
  return {**seconds, 'step': max(seconds.values())}


class _Counter:
  """Walks a program from its entry; each computation is counted once."""

  def __init__(self, module, dear):
    self.module, self.dear, self.known = module, dear, {}

  def computation(self, name, outer=None, around=frozenset()) -> Cost:
    """The cost of a computation.

    Args:
      name: its name.
      outer: the loop whose body it is, and the computation of that one.
      around: chains of collectives that run while it does, counted there.
    """
    if name in self.known:
      return self.known[name]
    cost, seen = Cost(), set(around)
    inside = self.module.computations[name]
    around = around | self._chains(inside)
    for instruction in inside.instructions:
      self._instruction(cost, instruction, inside, outer, seen, around)
    self.known[name] = cost
    return cost

  def _chains(self, inside):
    """The chains of which a computation has a part, loops left out."""
    found = set()
    for i in inside.instructions:
      if i.opcode == 'fusion':
        found |= self._chains(self.module.computations[i.called('calls')[0]])
      elif chain := _chain(i):
        found.add(chain)
    return found

  def _instruction(self, cost, i, inside, outer, seen, around):
    if i.opcode == 'while':
      trips = hlo.trip_count(self.module, i, inside, outer)
      if trips is None:
        cost.unknown_loops += 1
      body = self.computation(i.called('body')[0], (i, inside, outer), around)
      cost.add(body, 1 if trips is None else trips)
      return
    if i.opcode == 'conditional':
      names = i.called(
        'branch_computations', 'true_computation', 'false_computation'
      )
      branches = [self.computation(n) for n in names]
      pick = max if self.dear else min
      cost.add(pick(branches, key=lambda c: (c.total_flops, c.bytes)))
      return
    if i.opcode in ('call', 'async-start'):
      for name in i.called('to_apply', 'calls'):
        cost.add(self.computation(name))
      return
    if i.opcode == 'fusion':
      self._fused(cost, i.called('calls')[0], i, seen)
    else:
      self._leaf(cost, i, inside, i, seen)
    cost.bytes += self._traffic(i, inside)

  def _fused(self, cost, name, caller, seen):
    """Products and collectives inside of a fusion."""
    inside = self.module.computations[name]
    for i in inside.instructions:
      if i.opcode == 'fusion':
        self._fused(cost, i.called('calls')[0], caller, seen)
      else:
        self._leaf(cost, i, inside, caller, seen)

  def _leaf(self, cost, i, inside, caller, seen):
    kind = i.opcode.removesuffix('-start')
    if i.opcode == 'dot':
      cost.flops[_kind(i, inside)] += _dot_flops(i, inside)
    elif i.opcode == 'convolution':
      cost.flops[_kind(i, inside)] += _convolution_flops(i, inside)
    elif i.opcode == 'custom-call':
      self._custom_call(cost, i, inside)
    elif kind in COLLECTIVES:
      _collective(cost, kind, i, inside, caller, seen)

  def _custom_call(self, cost, i, inside):
    target = re.search(r'custom_call_target="([^"]*)"', i.attributes)
    target = target[1] if target else ''
    if _GEMM.match(target):
      contracted = re.search(
        r'"lhs_contracting_dimensions":\["?(\d+)', i.attributes
      )
      if contracted:
        left = inside.by_name[i.operands[0]].shapes[0]
        n = 2 * i.shapes[0].size * left.dims[int(contracted[1])]
        cost.flops[_kind(i, inside)] += n
    elif target in ('tpu_custom_call', 'mosaic_gpu_v2', '__gpu$xla.gpu.triton'):
      estimate = _ESTIMATE.search(i.attributes)
      if estimate:
        numbers = json.loads(estimate[1])
        cost.flops[_kind(i, inside)] += float(numbers.get('flops', 0))
      else:
        cost.unknown_kernels += 1

  def _traffic(self, i, inside):
    """Bytes between the chip and its memory."""
    if i.opcode in _FREE or i.opcode.endswith('-done'):
      return 0
    written = [s.nbytes for s in i.shapes if s.hbm]
    if i.opcode == 'custom-call' and re.search(
      r'"(AllocateBuffer|ConcatBitcast|AsyncCollective\w+)"', i.attributes
    ):
      return 0
    if i.opcode == 'fusion':
      return self._fusion_traffic(i, inside)
    if i.opcode.endswith('-start'):
      # A tuple of operand and result; one of the two is counted as read.
      return sum(sorted(written)[-2:])
    read = _operand_bytes(i, inside)
    if i.opcode in ('dynamic-slice', 'slice', 'gather'):
      return 2 * sum(written)
    if i.opcode in ('dynamic-update-slice', 'scatter'):
      position = 1 if i.opcode == 'dynamic-update-slice' else 2
      return 2 * read[position] if len(read) > position else sum(read)
    return sum(written) + sum(read)

  def _fusion_traffic(self, i, inside):
    fused = self.module.computations[i.called('calls')[0]]
    users = collections.defaultdict(list)
    for j in fused.instructions:
      for position, operand in enumerate(j.operands):
        users[operand].append((position, j))

    def uses(name):
      """Uses of a parameter, through what only renames it."""
      for position, j in users[name]:
        if j.opcode in ('bitcast', 'copy', 'reshape'):
          yield from uses(j.name)
        else:
          yield position, j

    total, read = 0.0, _operand_bytes(i, inside)
    for name, number in fused.parameters.items():
      size = read[number] if number < len(read) else 0
      found = list(uses(name))
      if found and all(
        p == 0 and j.opcode in ('dynamic-slice', 'slice', 'gather')
        for p, j in found
      ):
        size = min(size, sum(j.shapes[0].nbytes for _, j in found))
      elif found and all(
        p == 0 and j.opcode == 'dynamic-update-slice' for p, j in found
      ):
        size = 0  # updated in place
      total += size
    ends = [fused.root]
    if fused.root.opcode == 'tuple':
      ends = [fused.by_name[n] for n in fused.root.operands]
    for shape, end in zip(i.shapes, ends, strict=False):
      while end.opcode in ('bitcast', 'copy', 'reshape'):
        end = fused.by_name[end.operands[0]]
      if end.opcode == 'dynamic-update-slice':
        update = fused.by_name[end.operands[1]].shapes[0]
        total += min(update.nbytes, shape.nbytes) if shape.hbm else 0
      elif end.opcode != 'parameter':
        total += shape.nbytes if shape.hbm else 0
    return total


def _operand_bytes(i, inside):
  found = (inside.by_name.get(n) for n in i.operands)
  return [
    sum(s.nbytes for s in j.shapes if s.hbm) if j is not None else 0
    for j in found
  ]


def _kind(i, inside):
  """Which rate a product has: that of its wider operand.

  A kernel that rounds its first operand has that of the second.
  """
  rank = ('int4', 'float8', 'int8', 'bfloat16', 'float32')
  kinds = ['int4']
  rounds = i.opcode == 'custom-call' and i.name.startswith('quantize_matmul')
  for name in i.operands[rounds:2]:
    dtype = inside.by_name[name].shapes[0].dtype if i.operands else ''
    if dtype in ('s4', 'u4', 's2', 'u2'):
      kinds.append('int4')
    elif dtype in ('s8', 'u8'):
      kinds.append('int8')
    elif dtype.startswith(('f8', 'f4')):
      kinds.append('float8')
    elif dtype in ('bf16', 'f16'):
      kinds.append('bfloat16')
    else:
      kinds.append('float32')
  return max(kinds, key=rank.index)


def _dot_flops(i, inside):
  left = inside.by_name[i.operands[0]].shapes[0].dims
  match = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', i.attributes)
  axes = [int(d) for d in match[1].split(',') if d] if match else []
  return 2 * i.shapes[0].size * math.prod(left[a] for a in axes)


def _convolution_flops(i, inside):
  """Products with what padding and dilation put between are not counted."""
  left, right, out = re.search(
    r'dim_labels=(\w+)_(\w+)->(\w+)', i.attributes
  ).groups()
  lhs, rhs = (inside.by_name[n].shapes[0].dims for n in i.operands[:2])
  dims = i.shapes[0].dims
  n = 2 * dims[out.index('b')] * dims[out.index('f')] * rhs[right.index('i')]
  window = re.search(r'window=\{([^}]*)\}', i.attributes)
  fields = dict(f.split('=') for f in window[1].split()) if window else {}

  def field(name, axis, default):
    return fields[name].split('x')[axis] if name in fields else default

  for axis in range(len(out) - 2):
    label = str(axis)
    n *= _positions(
      lhs[left.index(label)],
      rhs[right.index(label)],
      dims[out.index(label)],
      stride=int(field('stride', axis, 1)),
      pad=int(field('pad', axis, '0_0').split('_')[0]),
      base=int(field('lhs_dilate', axis, 1)),
      dilation=int(field('rhs_dilate', axis, 1)),
    )
  return n


def _positions(size, kernel, out, *, stride, pad, base, dilation):
  """Pairs of an output and a kernel position that meet an element."""
  o, k = np.ogrid[:out, :kernel]
  at = o * stride + k * dilation - pad
  return int(np.sum((at >= 0) & (at % base == 0) & (at // base < size)))


def group_size(attributes: str) -> int:
  """How many devices take part in a collective.

  Examples:
    >>> group_size('replica_groups={{0,1},{2,3}}, x')
    2
    >>> group_size("replica_groups=mesh['a'=4,'b'=2] {'a'}, x")
    4
    >>> group_size('replica_groups=[2,4]<=[8], x')
    4
  """
  match = _GROUPS.search(attributes)
  if match is None:
    return 2
  mesh, axes, _, size, listed = match.groups()
  if mesh is not None:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
    return math.prod(int(sizes[a]) for a in re.findall(r"'(\w+)'", axes))
  return int(size) if size else len(listed.split(','))


def _chain(i):
  """What all parts of a collective that runs beside others have in common.

  It is written once for each of what it runs beside, in loops, too.
  """
  chain, channel = _CHAIN.search(i.attributes), _CHANNEL.search(i.attributes)
  return chain and (chain[1], channel and channel[1])


def _collective(cost, kind, i, inside, caller, seen):
  chain = _chain(i)
  if chain in seen:
    return
  if chain:
    seen.add(chain)
  shapes = i.shapes
  if i.opcode.endswith('-start') and len(shapes) > 1:
    # Operands, then results; a permute's tuple also holds what it waits with.
    shapes = (
      shapes[1:2]
      if kind == 'collective-permute'
      else (shapes[len(shapes) // 2 :])
    )
  size = sum(s.nbytes for s in shapes)
  n = group_size(i.attributes)
  if n < 2 and kind != 'collective-permute':
    return
  if kind == 'all-reduce' and caller.name.startswith('all-reduce-scatter'):
    kind = 'reduce-scatter'  # a fusion that keeps a part of the sum
  elif kind == 'reduce-scatter':
    size *= n
  share = {'collective-permute': 1.0, 'all-reduce': 2 * (n - 1) / n}
  sent = size * share.get(kind, (n - 1) / n)
  cost.send(kind, 1, size, sent)
