"""From the config's names to one optax transformation and its schedule."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from frugax import names, optim

# Keys of a section that are no arguments of the optimizer.
_RESERVED = ('name', 'match', 'state_codec', 'state_min_size')


def path_name(path) -> str:
  """The path of a leaf as text: 'layers/attn/q/kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _constant(peak, steps, warmup_steps=0, final_fraction=1.0):
  del steps, final_fraction  # it has no decay to end
  return _warmup(peak, warmup_steps, optax.constant_schedule(peak))


def _linear(peak, steps, warmup_steps=0, final_fraction=0.0):
  decay = max(steps - warmup_steps, 1)
  after = optax.linear_schedule(peak, final_fraction * peak, decay)
  return _warmup(peak, warmup_steps, after)


def _cosine(peak, steps, warmup_steps=0, final_fraction=0.1):
  decay = max(steps - warmup_steps, 1)
  after = optax.cosine_decay_schedule(peak, decay, final_fraction)
  return _warmup(peak, warmup_steps, after)


def _warmup(peak, steps, after):
  if not steps:
    return after
  rise = optax.linear_schedule(0.0, peak, steps)
  return optax.join_schedules([rise, after], [steps])


def _wsd(
  peak,
  steps,
  warmup_steps=0,
  decay_steps=None,
  final_fraction=0.1,
  decay='linear',
):
  if decay_steps is None:
    begin = max(steps - max(steps // 10, 1), warmup_steps)
    decay_steps = max(steps - begin, 1)
  else:
    begin = max(steps - decay_steps, 0)
  return optim.wsd_schedule(
    peak, warmup_steps, begin, decay_steps, final_fraction * peak, decay
  )


def _infinite(
  peak,
  steps,
  warmup_steps=0,
  cooldown_steps=None,
  constant_fraction=0.25,
  anneal_steps=0,
  final_fraction=0.01,
  cooldown='cosine',
):
  if cooldown_steps is None:
    cooldown_steps = 3 * warmup_steps
  return optim.infinite_schedule(
    peak,
    constant_fraction * peak,
    warmup_steps,
    cooldown_steps,
    steps - anneal_steps if anneal_steps else None,
    anneal_steps,
    final_fraction * peak,
    cooldown,
  )


def _rewarm(
  peak, steps, warmup_steps=0, begin=0, start_fraction=0.1, final_fraction=0.1
):
  decay = max(steps - begin - warmup_steps, 1)
  start, final = start_fraction * peak, final_fraction * peak
  return optim.rewarm_schedule(peak, begin, warmup_steps, decay, start, final)


SCHEDULES = {
  'constant': _constant,
  'linear': _linear,
  'cosine': _cosine,
  'wsd': _wsd,
  'infinite': _infinite,
  'rewarm': _rewarm,
}


def make_schedule(
  config: Mapping[str, Any], peak: float, steps: int
) -> optax.Schedule:
  """The learning-rate schedule of a config section.

  The warm-up is linear from 0, so the first update is 0; then what is named,
  until `steps`. Rates are given as fractions of the peak:

  - 'constant';
  - 'linear' and 'cosine', to `final_fraction` at the end;
  - 'wsd', constant, then a `decay` of the last `decay_steps` (a tenth of all);
  - 'infinite', down to `constant_fraction` within `cooldown_steps` (three times
    the warm-up), and at the end `anneal_steps` (none) down to `final_fraction`;
  - 'rewarm', from step `begin` up from `start_fraction` and down again.

  A run of 'wsd' or 'infinite' can be given more `steps` when it is resumed
  before its last phase, on which alone they have an influence.

  Args:
    config: name and that schedule's arguments: warmup_steps, final_fraction and
      those above.
    peak: the highest learning rate.
    steps: the length of the run.

  Returns:
    step -> learning rate.

  Raises:
    ValueError: an unknown name or argument, with the nearest valid one.

  Examples:
    >>> cosine = {'name': 'cosine', 'warmup_steps': 10}
    >>> schedule = make_schedule(cosine, 1.0, 110)
    >>> [round(float(schedule(step)), 3) for step in (0, 5, 10, 60, 110)]
    [0.0, 0.5, 1.0, 0.55, 0.1]
  """
  arguments = dict(config)
  name = arguments.pop('name')
  if name not in SCHEDULES:
    raise names.unknown('schedule', name, SCHEDULES)
  make = SCHEDULES[name]
  warmup_steps = arguments.get('warmup_steps', 0)
  if not isinstance(warmup_steps, int) or warmup_steps < 0:
    raise ValueError(
      f'schedule.warmup_steps must be an int of 0 or more, got {warmup_steps!r}'
    )
  valid = [a for a in inspect.signature(make).parameters][2:]
  for argument in arguments:
    if argument not in valid:
      raise names.unknown(f'argument of the {name} schedule', argument, valid)
  return make(peak, steps, **arguments)


def find_optimizer(name: str) -> Callable[..., optax.GradientTransformation]:
  """The optimizer of this name in frugax.optim, optax or optax.contrib.

  Args:
    name: the name of a function that takes a learning rate.

  Returns:
    The function.

  Raises:
    ValueError: there is none, with the nearest valid name.

  Examples:
    >>> find_optimizer('galore').__module__
    'frugax.optim.galore'
    >>> find_optimizer('lion').__module__
    'optax._src.alias'
  """
  modules = (optim, optax, optax.contrib)
  for module in modules:
    if _is_optimizer(module, name):
      return getattr(module, name)
  valid = {n for m in modules for n in dir(m) if _is_optimizer(m, n)}
  raise names.unknown('optimizer', name, valid)


def _is_optimizer(module, name) -> bool:
  """An alias takes the learning rate first; parts of chains do not count."""
  make = getattr(module, name, None)
  # The weights of schedule-free methods are not those to be evaluated.
  if name.startswith(
    ('_', 'scale_by_', 'schedule_free')
  ) or not inspect.isfunction(make):
    return False
  return next(iter(inspect.signature(make).parameters), '') == 'learning_rate'


def make_optimizer(
  config, params, axes
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Builds the run's optimizer: one transformation, or one for each group.

  A section with a `state_codec` ('dynamic8', say) keeps that optimizer's state
  as `optim.quantize_state` does, whichever optimizer it is; `state_min_size` is
  its `min_size`.

  Args:
    config: the run's config (sections optimizer, groups, schedule; steps,
      projected, decayed).
    params: the parameters or their shapes.
    axes: their logical axis names.

  Returns:
    The transformation and the schedule of the main group's learning rate.

  Raises:
    ValueError: an unknown optimizer, argument or schedule, with the nearest
      valid name; a regular expression that matches no parameter.
  """

  def build(section):
    arguments = {k: v for k, v in section.items() if k not in _RESERVED}
    peak = arguments.pop('learning_rate')
    schedule = make_schedule(config.schedule, peak, config.steps)
    make = find_optimizer(section['name'])
    valid = inspect.signature(make).parameters
    for argument in arguments:
      if argument not in valid:
        raise names.unknown(
          f'argument of {section["name"]}', argument, set(valid)
        )
    known = {**_defaults(config, params, axes, valid), **arguments}
    try:
      tx = make(schedule, **known)
      if 'state_codec' in section:
        stacks = _axes(config, params, axes)
        sizes = {}
        if 'state_min_size' in section:
          sizes['min_size'] = section['state_min_size']
        codec = section['state_codec']
        tx = optim.quantize_state(tx, codec, axes=stacks, **sizes)
      # Traced once here, where an argument of the wrong type can be named.
      state = jax.eval_shape(tx.init, params)
      extra = {'value': jnp.zeros([]), 'key': jax.random.PRNGKey(0)}
      update = optax.with_extra_args_support(tx).update
      jax.eval_shape(lambda s, p: update(p, s, p, **extra), state, params)
    except (TypeError, ValueError, AttributeError) as e:
      raise ValueError(
        f'optimizer {section["name"]} cannot run with the arguments'
        f' {arguments}: {e}'
      ) from e
    return tx, schedule

  main = config.optimizer.to_dict()
  tx, schedule = build(main)
  groups = config.groups.to_dict()
  if not groups:
    return tx, schedule
  labels = jax.tree.map(lambda _: '', params)
  for label, group in groups.items():
    if 'match' not in group:
      raise ValueError(
        f'groups.{label} has no `match`, the regular expression of its'
        f' parameters; set --config.groups.{label}.match=REGEX'
      )
    matched = _matches(group['match'], params, f'groups.{label}.match')
    labels = jax.tree.map(
      lambda hit, old, new=label: new if hit and not old else old,
      matched,
      labels,
    )
  transforms = {'': tx}
  for label, group in groups.items():
    # A group of the main optimizer inherits its arguments, one with another
    # name only its learning rate.
    same = group.get('name', main['name']) == main['name']
    base = main if same else {'learning_rate': main['learning_rate']}
    transforms[label] = build({**base, **group})[0]
  return optax.partition(transforms, labels), schedule


def _defaults(config, params, axes, valid) -> dict[str, Any]:
  """What the run knows and the optimizer has an argument for."""
  arguments = {}
  for name in ('mask', 'weight_decay_mask'):
    if name in valid:
      arguments[name] = _matches(config.decayed, params, 'decayed')
  if 'axes' in valid:
    arguments['axes'] = _axes(config, params, axes)
  projected = _matches(config.projected, params, 'projected')
  matrices = jax.tree.map(
    lambda hit, a: a if hit else None, projected, optim.matrix_axes(axes)
  )
  if 'muon_weight_dimension_numbers' in valid:
    arguments['muon_weight_dimension_numbers'] = jax.tree.map(
      lambda a: optax.contrib.MuonDimensionNumbers(a.rows, a.cols), matrices
    )
  return arguments


def _axes(config, params, axes):
  """The matrix axes of what is projected, else the names of the axes."""
  # The names tell what is a stack where there is no matrix to tell it.
  return jax.tree.map(
    lambda hit, a, own: a if hit and a else own,
    _matches(config.projected, params, 'projected'),
    optim.matrix_axes(axes),
    axes,
  )


def _matches(pattern: str, params, what: str):
  """Tree of booleans: does the regular expression match the leaf's path?"""
  try:
    regex = re.compile(pattern)
  except re.error as e:
    raise ValueError(f'{what}={pattern!r} is no regular expression: {e}') from e
  matched = jax.tree_util.tree_map_with_path(
    lambda path, _: bool(regex.search(path_name(path))), params
  )
  if pattern and not any(jax.tree.leaves(matched)):
    paths = [path_name(p) for p, _ in jax.tree.leaves_with_path(params)]
    raise ValueError(
      f'{what}={pattern!r} matches no parameter; there are: {", ".join(paths)}'
    )
  return matched
