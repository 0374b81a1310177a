"""What parts of a transformation declare to `dependence` and `leafwise`."""

from collections.abc import Callable
from typing import Any

import jax


@jax.jit
def only_saves_work(predicate: jax.Array) -> jax.Array:
  """A predicate on which no result depends, as it is.

  What is done where it is true leaves unchanged whatever need not be done: it
  may look at all leaves without making one depend on the others.
  """
  return predicate


def by_layer(function: Callable[..., Any]) -> Callable[..., Any]:
  """Declares that a function mixes no layers, where that is hard to see.

  A loop that takes layers, or rows of them, in any order and puts each where it
  was. Its results have the layers where its arguments have them.

  Args:
    function: of trees of arrays.
  """

  def apart(*args):
    return function(*args)

  apart.__name__ = by_layer.__name__
  return jax.jit(apart)
