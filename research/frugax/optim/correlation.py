"""COAP's two ways to a new subspace: a sketch, and a step down a loss."""

import jax
import jax.numpy as jnp

from frugax.optim.linalg import left_vectors, orthonormal, unit


def svd_sketch(g: jax.Array, start: jax.Array) -> jax.Array:
  r"""The leading left singular vectors of a gradient within a sketch.

  .. math::
    Q = \mathrm{qr}(G^T \Omega), \qquad P \Sigma V^T = G Q

  One step of orthogonal iteration from :math:`\Omega`, ordered by singular
  value.

  Args:
    g: gradient matrices (*batch, m, n).
    start: :math:`\Omega`, (*batch, m, r) or (m, r).

  Returns:
    P, (*batch, m, r), with the largest entry of each vector positive.

  Examples:
    >>> g = jnp.outer(jnp.array([3.0, 4.0]), jnp.ones(5))
    >>> p = svd_sketch(g, jnp.ones((2, 1)))
    >>> print(jnp.allclose(p, jnp.array([[0.6], [0.8]])))
    True

  References:
    Halko, Martinsson and Tropp, `Finding structure with randomness
    <https://arxiv.org/abs/0909.4061>`_, 2009
  """
  g = unit(g)
  with jax.default_matmul_precision('highest'):
    image = g @ orthonormal(g.mT @ start)
  return left_vectors(image)


def correlation_loss(
  p: jax.Array, g: jax.Array, moment: jax.Array, axis: int = -2
) -> jax.Array:
  r"""What COAP's step on the projector descends.

  .. math::
    L(P) = \mathrm{mean} \left( (P P^T G - G)^2 \right)
      \left( 1 - \mathrm{mean}_j \cos(P M_j, G_j) \right)

  Args:
    p: projectors (*batch, m, r).
    g: gradients (*batch, m, n).
    moment: first moments (*batch, r, n).
    axis: the cosines are of vectors along this axis of g, -2 or -1. The
      released code takes the kernel's input axis whichever side it projects.

  Returns:
    A loss for each matrix, (*batch,).

  Examples:
    >>> p, g = jnp.eye(3)[:, :2], jnp.eye(3)
    >>> print(correlation_loss(p, g, jnp.eye(3)[:2]).round(4))  # 1/9 * (1-2/3)
    0.037
  """
  with jax.default_matmul_precision('highest'):
    error = p @ (p.mT @ g) - g
    grown = p @ moment

  def norm(x):
    # The floor keeps the root differentiable where a vector is zero.
    return jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis), 1e-16))

  cosine = jnp.sum(grown * g, axis) / (norm(grown) * norm(g))
  return jnp.mean(error * error, (-2, -1)) * (1 - jnp.mean(cosine, -1))


def _slope(p, g, moment, axis):
  """Gradient of the loss of each matrix in P."""
  return jax.grad(lambda p: correlation_loss(p, g, moment, axis).sum())(p)


def _frobenius(x):
  return jnp.sqrt(jnp.sum(x * x, (-2, -1), keepdims=True))


def correlation_step(
  p: jax.Array,
  g: jax.Array,
  moment: jax.Array,
  axis: int = -2,
  step_size: jax.typing.ArrayLike = 0.1,
) -> jax.Array:
  r"""COAP's step on the projector, as the released code takes it.

  .. math::
    P \leftarrow P - 0.1 \, \frac{D}{\max(\|D\|, 1)}, \qquad
    D = \nabla L(P)

  The loss is a mean over squared gradient entries, and the norm of D is only
  ever made smaller, so the step is as small as the gradient squared: at the
  1e-5 entries of language models it is below float32's rounding of P, and P
  stays what it was. `scale_free_step` does not depend on the gradient's size.

  Args:
    p: projectors (*batch, m, r).
    g: gradients (*batch, m, n).
    moment: first moments (*batch, r, n).
    axis: as in `correlation_loss`.
    step_size: factor of D.

  Returns:
    The new P; not orthonormal.

  References:
    Xiao et al., `COAP: Memory-Efficient Training with Correlation-Aware
    Gradient Projection <https://arxiv.org/abs/2412.00071>`_, 2024
  """
  slope = _slope(p, g, moment, axis)
  # torch's clip_grad_norm_ adds 1e-6 to the norm.
  return p - step_size * slope * jnp.minimum(
    1.0, 1 / (_frobenius(slope) + 1e-6)
  )


def scale_free_step(
  p: jax.Array,
  g: jax.Array,
  moment: jax.Array,
  axis: int = -2,
  step_size: jax.typing.ArrayLike = 0.1,
) -> jax.Array:
  r"""The step on the projector whatever the size of the gradient.

  .. math::
    P \leftarrow \mathrm{qr} \left( P - 0.1 \, \sqrt{r} \, \frac{D}{\|D\|}
      \right), \qquad D = \nabla L(P)
      \;\text{at}\; \frac{G}{\mathrm{rms}(G)}, \frac{M}{\mathrm{rms}(M)}

  The basis turns by the same part of its norm at each step, and stays
  orthonormal. A zero gradient leaves it as it is.

  Args:
    p: projectors (*batch, m, r).
    g: gradients (*batch, m, n).
    moment: first moments (*batch, r, n).
    axis: as in `correlation_loss`.
    step_size: part of P's norm that it moves by.

  Returns:
    The new P, orthonormal.
  """
  slope = _slope(p, _normalized(g), _normalized(moment), axis)
  norm = _frobenius(slope)
  direction = slope / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)
  return orthonormal(p - step_size * p.shape[-1] ** 0.5 * direction)


def _normalized(x):
  x = unit(x)  # Squares of 1e-20 would vanish in float32.
  mean = jnp.mean(x * x, (-2, -1), keepdims=True)
  return x / jnp.sqrt(jnp.where(mean == 0, 1, mean))
