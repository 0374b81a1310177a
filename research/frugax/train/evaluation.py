"""What an evaluation comes to."""

from collections.abc import Sequence

import numpy as np


def means(
  sums: Sequence[dict[str, np.ndarray]], compat: bool
) -> dict[str, float]:
  """Means over an evaluation set from the sums of its batches.

  Args:
    sums: one result of the evaluation step for each batch.
    compat: also give the value that the published C4 harness prints: the mean
      of the N batches' means, divided by N + 1 instead of N.

  Returns:
    eval_loss (nats per token), eval_perplexity, bits_per_byte, eval_tokens
    and, if asked for, eval_loss_compat.

  Examples:
    >>> sums = [{'loss': 6.0, 'tokens': 2, 'bytes': 2},
    ...         {'loss': 2.0, 'tokens': 2, 'bytes': 2}]
    >>> row = means(sums, compat=True)
    >>> row['eval_loss'], round(row['eval_loss_compat'], 3)
    (2.0, 1.333)
  """
  loss, tokens, n_bytes = (
    float(sum(float(s[k]) for s in sums)) for k in ('loss', 'tokens', 'bytes')
  )
  row = {
    'eval_loss': loss / tokens,
    'eval_perplexity': float(np.exp(loss / tokens)),
    'bits_per_byte': loss / np.log(2.0) / n_bytes if n_bytes else None,
    'eval_tokens': int(tokens),
  }
  if compat:
    each = [float(s['loss']) / float(s['tokens']) for s in sums if s['tokens']]
    row['eval_loss_compat'] = sum(each) / (len(each) + 1)
  return row
