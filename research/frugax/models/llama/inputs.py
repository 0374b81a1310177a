"""What a batch of tokens must look like."""

import jax.numpy as jnp


def check(tokens, segment_ids=None, positions=None) -> None:
  """Raises ValueError where one is not of integers or not of its shape."""
  shape = jnp.shape(tokens)
  for name, value in (
    ('tokens', tokens),
    ('segment_ids', segment_ids),
    ('positions', positions),
  ):
    if value is None:
      continue
    dtype = jnp.result_type(value)
    if not jnp.issubdtype(dtype, jnp.integer):
      raise ValueError(f'{name} must be integers, not {dtype}.')
    if len(shape) != 2 or jnp.shape(value) != shape:
      want = '(batch, sequence)' if name == 'tokens' else f'{shape}, as tokens'
      raise ValueError(
        f'{name} have shape {jnp.shape(value)}, but must have {want}.'
      )
