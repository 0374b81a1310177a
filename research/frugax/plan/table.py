"""Plans as text: one in full, several as the rows of a table."""

from collections.abc import Sequence

from frugax.plan.compile import Plan

_GIB = 2**30


def size(n: float) -> str:
  """Bytes in words.

  Examples:
    >>> size(12.5 * 2**30), size(3e6), size(80)
    ('12.50 GiB', '2.86 MiB', '80 B')
  """
  for unit, bound in (('GiB', 2**30), ('MiB', 2**20), ('KiB', 2**10)):
    if n >= bound:
      return f'{n / bound:,.2f} {unit}'
  return f'{n:.0f} B'


def duration(seconds: float) -> str:
  """Seconds in words.

  Examples:
    >>> duration(1.25), duration(0.0123)
    ('1.25 s', '12.3 ms')
  """
  return f'{seconds:.2f} s' if seconds >= 1 else f'{seconds * 1e3:.1f} ms'


def verdict(plan: Plan) -> str:
  """'fits' or 'does not fit', and by how much."""
  if plan.fits:
    return f'fits: {size(plan.capacity - plan.needed)} are left'
  return f'does not fit: {size(plan.needed - plan.capacity)} too much'


def one(plan: Plan, model_flops: float | None = None) -> str:
  """A plan in full.

  Args:
    plan: the plan.
    model_flops: operations of a device's share of a step that the model needs,
      without what is computed again.

  Returns:
    Lines of text.
  """
  mesh = ', '.join(f'{k}={v}' for k, v in plan.mesh.items() if v > 1)
  rows, length = plan.batch
  lines = [
    f'{plan.topology}: {plan.devices} devices'
    f'{f" ({mesh})" if mesh else ""}, batch {rows} x {length}; per device:',
    '',
    'memory, in the order in which it is counted',
  ]

  def line(name, n, how=''):
    lines.append(f'  {name:34s}{size(n):>14s}{f"  {how}" if how else ""}')

  for name, n in plan.state.items():
    line(name, n)
  if plan.arguments is None:
    line('a gradient of every weight', plan.gradients, 'if held at once')
    line('needed, as the compiler says', plan.needed, 'it gave up')
  else:
    padding = plan.arguments - sum(plan.state.values())
    line('padding and layout', padding)
    line('arguments', plan.arguments, 'compiler, exact')
    t = plan.temporaries
    line('activations kept for backward', t['activations'], 'by shape')
    line('gradients, copies of weights', t['gradients'], 'by shape')
    line('other temporaries', t['rest'])
    line('temporaries', t['total'], 'compiler, exact')
    line('outputs beside the state', plan.outputs)
    line('program', plan.code)
    line('needed', plan.needed, 'the sum')
    line('peak, as memory_analysis has it', plan.peak)
  line('capacity', plan.capacity)
  lines.append(f'  {verdict(plan)}')
  held = sum(
    n for name, n in plan.state.items() if name.startswith('optimizer')
  )
  lines.append(f'  optimizer state {size(held)}')
  for dtype, parts in plan.adamw.items():
    detail = ', '.join(f'{name} {size(n)}' for name, n in parts.items())
    lines.append(
      f'  adamw in {dtype} would hold {size(sum(parts.values()))} ({detail})'
    )
  if plan.arguments is None:
    return '\n'.join([*lines, '', f'  {plan.refused}'])
  lines += ['', 'largest temporaries']
  lines += [
    f'  {name:34s}{size(n):>14s}' for name, n in plan.temporaries['largest']
  ]
  return '\n'.join([*lines, '', *_cost(plan, model_flops)])


def _cost(plan, model_flops):
  flops = sum(plan.flops.values())
  kinds = ', '.join(f'{k} {n:.3g}' for k, n in plan.flops.items())
  lines = ['a step, counted in the program (loops as often as they run)']
  lines.append(f'  products                  {flops:.4g} FLOPs ({kinds})')
  if model_flops:
    lines.append(
      f'                            {flops / model_flops:.2f} times what the'
      ' model needs'
    )
  lines.append(f'  read and written          {size(plan.bytes)}')
  for kind, c in sorted(plan.collectives.items()):
    lines.append(
      f'  {kind:26s}{c["count"]:.0f}, {size(c["bytes"])}'
      f' (a device sends {size(c["sent"])})'
    )
  dear = sum(plan.dear['flops'].values())
  if dear > 1.01 * flops or plan.dear['bytes'] > 1.01 * plan.bytes:
    lines.append(
      f'  with the dearest branches {dear:.4g} FLOPs,'
      f' {size(plan.dear["bytes"])} read and written'
    )
    if n := plan.dear['unknown']:
      lines.append(f'    ({n} loops of unknown length in them count once)')
  for what, n in plan.unknown.items():
    if n:
      lines.append(f'  {n} {what} of unknown cost, counted once or not at all')
  if plan.seconds:
    lines += ['', 'time of a step: an ESTIMATE from peak rates, not measured']
    for name, seconds in plan.seconds.items():
      lines.append(f'  {name:26s}{duration(seconds)}')
    lines.append(f'  bottleneck: {bottleneck(plan)}')
  lines.append(f'compiled in {plan.compile_seconds:.0f} s by {_by(plan)}')
  return lines


def _by(plan):
  return ', '.join(f'{name} {v}' for name, v in plan.versions.items())


def bottleneck(plan: Plan) -> str:
  """What takes longest in the estimate."""
  parts = {k: v for k, v in plan.seconds.items() if k != 'step'}
  return max(parts, key=parts.get)


def many(plans: Sequence[tuple[str, Plan]]) -> str:
  """Several plans, a row each.

  Args:
    plans: pairs of a name and a plan.

  Returns:
    Lines of text; in GiB on each device.
  """
  width = max(len(name) for name, _ in plans)
  lines = [
    f'{"GiB on each device":{max(width, 18)}s} weights optim. gradients'
    '   needed     peak capacity  fits   estimate'
  ]
  width = max(width, 18)
  for name, p in plans:
    weights = sum(n for k, n in p.state.items() if k.startswith('weights'))
    state = sum(n for k, n in p.state.items() if k.startswith('optimizer'))
    peak = f'{p.peak / _GIB:9.2f}' if p.peak is not None else f'{"-":>9s}'
    seconds = (p.seconds or {}).get('step')
    estimate = f'{duration(seconds)}, {bottleneck(p)}' if seconds else '-'
    lines.append(
      f'{name:{width}s}{weights / _GIB:8.2f}{state / _GIB:7.2f}'
      f'{p.gradients / _GIB:10.2f}{p.needed / _GIB:9.2f}{peak}'
      f'{p.capacity / _GIB:9.2f}  {"yes" if p.fits else "no":5s} {estimate}'
    )
  return '\n'.join(lines)
