"""Every kind of recipe under jit, scan, remat and vmap, and what is never NaN.

Three small recipes share a compilation, which is what such a test costs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from frugax import lowbit

# Those that differ in code: other widths of the same would be the same code.
NAMES = (
  *('int8', 'int4', 'int16', 'fp8', 'fp8_block', 'mxfp8', 'jetfire'),
  *('mxfp4', 'nvfp4', 'quest1', 'quest4'),
  *('quest_fp4_sparse', 'halo2', 'b1.58', 'b1.58_median', 'trilm'),
  *('stable_spam_int4', 'stable_spam_fp4', 'e3m2', 'masked_e8m3'),
)
GROUPS = [NAMES[i : i + 3] for i in range(0, len(NAMES), 3)]
DIMS = (((2,), (0,)), ((), ()))


def normal(*shape, seed=0):
  x = np.random.default_rng(seed).standard_t(5, size=shape)
  return jnp.asarray(x, jnp.float32)


def vjp(dot):
  def value(x, w, g):
    y, back = jax.vjp(lambda x, w: dot(x, w, DIMS), x, w)
    return y, *back(g)

  return value


HARD = normal(2, 5, 37, seed=3).at[0, 0].set(0).at[0, 1].set(1e-41)
HARD = HARD.at[0, 2].set(0.3).at[0, 3].set(-2.5).at[0, 4, 0].set(1e15)


@pytest.mark.parametrize('names', GROUPS, ids='-'.join)
def test_jit_scan_remat_and_vmap_give_the_same_and_no_nan(names):
  """Zeros, subnormals, constant and one-signed rows, and a great outlier."""
  dots = [lowbit.dot_general(lowbit.recipe(name)) for name in names]
  x, w, g = normal(2, 2, 5, 37), normal(2, 37, 6, seed=1), normal(2, 2, 5, 6)
  x, g = x.at[1].set(HARD), g.at[1, 0].set(0)

  @jax.jit
  def all_ways(x, w, g):
    out = []
    for dot in dots:
      value = vjp(dot)
      remat = vjp(jax.checkpoint(dot, static_argnums=2))

      def body(_, item, remat=remat):
        return None, remat(*item)

      scanned = lax.scan(body, None, (x, w, g))[1]
      out.append((value(x[1], w[1], g[1]), scanned, jax.vmap(value)(x, w, g)))
    return out

  def check(a, b, name):
    atol = 2e-5 * np.abs(b).max()
    np.testing.assert_allclose(a, b, atol=atol, err_msg=name)

  for name, results in zip(names, all_ways(x, w, g), strict=True):
    for one, scanned, mapped in zip(*results, strict=True):
      assert np.isfinite(one).all(), name
      check(scanned[1], one, name)
      for i in range(2):  # which have numbers of different sizes
        check(mapped[i], scanned[i], name)
