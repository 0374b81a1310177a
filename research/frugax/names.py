"""Errors for names that do not exist: one sentence, with the way out."""

import difflib
from collections.abc import Iterable


def unknown(kind: str, name: object, valid: Iterable[str]) -> ValueError:
  """The error for `name` not being one of `valid`; the caller raises it.

  Args:
    kind: what the name stands for, in the words of the caller ('projector').
    name: the value that was given.
    valid: the names that exist.

  Returns:
    A ValueError that names the value, its nearest valid name and all of them.

  Examples:
    >>> raise unknown('projector', 'svdd', ('svd', 'sketch'))
    Traceback (most recent call last):
    ...
    ValueError: unknown projector 'svdd': did you mean 'svd'? Valid: sketch, svd
  """
  valid = sorted(valid)
  near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
  hint = f': did you mean {near[0]!r}?' if near else '.'
  return ValueError(f'unknown {kind} {name!r}{hint} Valid: {", ".join(valid)}')
