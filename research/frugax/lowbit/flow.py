"""Norms and activation functions that keep their inputs in few bits."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from frugax import names
from frugax.lowbit.keys import content_key
from frugax.lowbit.operands import Operand
from frugax.quant import Scaling, dequantize_tiles, quantize_tiles

_AS_IT_IS = Operand()


@dataclasses.dataclass(frozen=True)
class Flow:
  """How an operation between linear layers treats its arrays.

  Args:
    saved: how the inputs are rounded that stay for the backward pass; without a
      format they stay as they are.
    gradient: how the gradient of the result is rounded as it comes in.
    exact: the result is that of the inputs as they are, and only the gradient
      is taken at the rounded ones; else both are those of the rounded ones.

  Raises:
    ValueError: an operand with a mask, a source or zeros put in, or of a format
      that has no codes to be kept.
  """

  saved: Operand = _AS_IT_IS
  gradient: Operand = _AS_IT_IS
  exact: bool = False

  def __post_init__(self):
    for operand in (self.saved, self.gradient):
      fields = (operand.mask, operand.source, operand.keep)
      if fields != ('none', 'array', 'all') or operand.simulated:
        raise ValueError(
          f'{operand} between linear layers: it has a format of '
          'frugax.quant.ELEMENTS, a scaling and a rounding alone'
        )


def _all():
  groups = Scaling((1, 16), floor=448e-10)
  blocks = Scaling((32, 32))
  yield 'none', Flow()
  yield (
    'coat',
    Flow(
      Operand('fp8_e4m3', groups),
      Operand('fp8_e5m2', dataclasses.replace(groups, floor=57344e-10)),
    ),
  )
  yield (
    'jetfire',
    Flow(Operand('int8', blocks), Operand('int8', blocks, stochastic=True)),
  )
  yield 'fp8', Flow(Operand('fp8_e4m3', Scaling((1, 16))), exact=True)
  yield 'int8', Flow(Operand('int8', Scaling((1, 128))), exact=True)
  yield 'int4', Flow(Operand('int4', Scaling((1, 32))), exact=True)


FLOWS: dict[str, Flow] = dict(_all())


def flow(name: str) -> Flow:
  """The flow of a name.

  - 'none': the inputs stay as they are.
  - 'coat': inputs in E4M3, gradients in E5M2, in groups of 16 along the last
    axis; the operation sees the rounded inputs.
  - 'jetfire': both in int8 in blocks of 32 x 32, gradients stochastically.
  - 'fp8', 'int8', 'int4': the operation is exact, and what it keeps has these
    bits, in groups of 16, 128 and 32.

  Args:
    name: one of these.

  Returns:
    The flow.

  Raises:
    ValueError: an unknown name, with the nearest valid one.

  Examples:
    >>> flow('coat').saved.format
    'fp8_e4m3'

  References:
    Xi et al., `COAT: Compressing Optimizer States and Activation for
    Memory-Efficient FP8 Training <https://arxiv.org/abs/2410.19313>`_, 2024

    Xi et al., `Jetfire: Efficient and Accurate Transformer Pretraining with
    INT8 Data Flow and Per-Block Quantization
    <https://arxiv.org/abs/2403.12422>`_, 2024

    Pan et al., `Mesa: A Memory-saving Training Framework for Transformers
    <https://arxiv.org/abs/2111.11124>`_, 2021
  """
  if name not in FLOWS:
    raise names.unknown('flow', name, FLOWS)
  return FLOWS[name]


def keep_in_few_bits(
  function: Callable[..., jax.Array],
  flow: Flow,
  key: jax.Array | None = None,
) -> Callable[..., jax.Array]:
  """An operation whose backward pass finds its inputs in few bits.

  Once more in the backward pass, the operation is computed from them: nothing
  else stays in memory. Made for what costs little beside a product: norms,
  activation functions, sums and products of elements.

  Args:
    function: of arrays `*inputs, *others`, gives an array.
    flow: from `flow(name)`.
    key: a typed key for stochastic rounding; None takes it from the bits of the
      array, as in `dot_general`.

  Returns:
    A function of the same inputs, a tuple, and of others, a tuple as well: the
    latter, such as the scale of a norm, stay as they are.

  Examples:
    >>> from frugax import lowbit
    >>> square = lowbit.keep_in_few_bits(jnp.square, lowbit.flow('int4'))
    >>> x = jnp.array([7., 3.3])
    >>> jax.grad(lambda x: square((x,)).sum())(x)
    Array([14.,  6.], dtype=float32)

  References:
    See `flow`.
  """
  if flow == Flow():
    return lambda inputs, others=(): function(*inputs, *others)

  # The key is an operand: what a custom_vjp closes over must not be traced.
  def forward(inputs, others, key):
    coded = tuple(_coded(flow.saved, x, None, key) for x in inputs)
    seen = inputs if flow.exact else _arrays(coded, inputs)
    # Arrays of no elements bring the dtypes along.
    like = tuple(jnp.zeros((0,), x.dtype) for x in inputs)
    return function(*seen, *others), (coded, others, like, key)

  @jax.custom_vjp
  def operation(inputs, others, key):
    return forward(inputs, others, key)[0]

  def backward(residuals, g):
    coded, others, like, key = residuals
    g = _arrays((_coded(flow.gradient, g, 1, key),), (g,))[0]
    inputs = _arrays(coded, like)
    back = jax.vjp(function, *inputs, *others)[1](g)
    return back[: len(inputs)], back[len(inputs) :], None

  operation.defvjp(forward, backward)
  return lambda inputs, others=(): operation(tuple(inputs), tuple(others), key)


def _coded(operand, x, index, key):
  if operand.format is None:
    return x
  k = None
  if operand.stochastic:
    k = content_key(x) if key is None else key
    k = jax.random.fold_in(k, index or 0)
  return quantize_tiles(x, operand.format, operand.scaling, key=k)


def _arrays(coded, like):
  return tuple(
    q if isinstance(q, jax.Array) else dequantize_tiles(q, x.dtype)
    for q, x in zip(coded, like, strict=True)
  )
