"""Documents to rows: what is one row of tokens, labels, segments, positions.

With x the tokens of a document, bos and eos included as far as the tokenizer
has them, labels[i] = x[i + 1] and the last label is -1: it does not count.
"""

from typing import Any

import numpy as np

IGNORE = -1  # a label that does not count

Row = dict[str, np.ndarray]


def packable(tok, text_field: str, example: dict[str, Any]) -> Row:
  """A whole document, to be concatenated with others and cut into rows.

  Its labels travel beside its tokens, so that the last token before a cut keeps
  the label that lies behind the cut.

  Args:
    tok: a `Tokenizer`.
    text_field: where the text is.
    example: the document, as TFDS gives it.

  Returns:
    tokens and labels, int32[tokens of the document].
  """
  tokens = _with_specials(tok, tok.encode(example[text_field]))
  return {'tokens': tokens, 'labels': _next_tokens(tokens)}


def one_row(tok, text_field: str, length: int, example: dict[str, Any]) -> Row:
  """A document as one row, cut or padded, as GaLore's C4 harness has it.

  A text that is cut ends with eos all the same: that is what the T5 tokenizer
  does when it truncates.

  Args:
    tok: a `Tokenizer`.
    text_field: where the text is.
    length: tokens of a row.
    example: the document, as TFDS gives it.

  Returns:
    tokens, labels, segment_ids and positions, int32[length].

  References:
    Zhao et al., GaLore, https://arxiv.org/abs/2403.03507 (2024).
  """
  room = max(length - 1 - (tok.bos_id is not None), 0)
  tokens = _with_specials(tok, tok.encode(example[text_field])[:room])
  return fit(tokens[:length], length, tok.pad_id)


def fit(tokens: np.ndarray, length: int, pad_id: int) -> Row:
  """A row that holds `tokens` and then padding, which counts for nothing.

  Examples:
    >>> row = fit(np.array([7, 8, 9]), length=5, pad_id=0)
    >>> row['tokens'].tolist(), row['labels'].tolist()
    ([7, 8, 9, 0, 0], [8, 9, -1, -1, -1])
    >>> row['segment_ids'].tolist(), row['positions'].tolist()
    ([1, 1, 1, 0, 0], [0, 1, 2, 0, 0])
  """
  n = len(tokens)
  row = {
    'tokens': np.full(length, pad_id, np.int32),
    'labels': np.full(length, IGNORE, np.int32),
    'segment_ids': np.zeros(length, np.int32),
    'positions': np.zeros(length, np.int32),
  }
  row['tokens'][:n] = tokens
  row['labels'][:n] = _next_tokens(tokens)
  row['segment_ids'][:n] = 1
  row['positions'][:n] = np.arange(n)
  return row


def from_grain(pad_id: int, packed: Row) -> Row:
  """A row under our names, from what grain's packer makes of `packable`.

  What the packer left empty, at the end of a data set, is masked.
  """
  segment_ids = packed['tokens_segment_ids']
  empty = segment_ids == 0
  return {
    'tokens': np.where(empty, np.int32(pad_id), packed['tokens']),
    'labels': np.where(empty, np.int32(IGNORE), packed['labels']),
    'segment_ids': segment_ids,
    'positions': packed['tokens_positions'],
  }


def _with_specials(tok, ids: np.ndarray) -> np.ndarray:
  bos = [] if tok.bos_id is None else [tok.bos_id]
  return np.concatenate([bos, ids, [tok.eos_id]]).astype(np.int32)


def _next_tokens(tokens: np.ndarray) -> np.ndarray:
  labels = np.full_like(tokens, IGNORE)
  labels[:-1] = tokens[1:]
  return labels
