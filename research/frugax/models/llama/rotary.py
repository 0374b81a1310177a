"""Rotary position embedding."""

import jax.numpy as jnp
import numpy as np


def rotate(x_BxTxHxK, positions, theta):
  """Rotary position embedding of queries or keys.

  Dimension `i` and dimension `i + K/2` form a pair, turned by the angle
  `position * theta^(-2i/K)`: the half-split order of Hugging Face's LLaMA, so
  its weights need no permutation (Meta's original interleaves the pairs).

  Args:
    x_BxTxHxK: queries or keys; K is even.
    positions: integers, (B, T) or (T,).
    theta: base of the angles.

  Returns:
    The rotated array in the input's dtype; computed in float32.

  Examples:
    >>> x = jnp.ones((1, 2, 1, 2))
    >>> rotate(x, jnp.array([0, 1]), 10000.0)[0, :, 0].round(3).tolist()
    [[1.0, 1.0], [-0.30..., 1.38...]]

  References:
    Su et al., RoFormer, https://arxiv.org/abs/2104.09864, 2021.
  """
  half = x_BxTxHxK.shape[-1] // 2
  # float64 until the last rounding: an error here grows with the position.
  frequency = (float(theta) ** (-np.arange(half) / half)).astype(np.float32)
  angle = positions[..., None, None].astype(jnp.float32) * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  x, y = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([x * cos - y * sin, y * cos + x * sin], axis=-1)
  return turned.astype(x_BxTxHxK.dtype)
