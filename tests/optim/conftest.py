"""The traces of published code that several tests compare with."""

import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax.optim import projection, projectors


def reference_problem(m, n, steps=12):
  """Weight and gradients of the traces, in torch's (out, in) layout."""
  i, j = np.arange(m)[:, None], np.arange(n)[None, :]
  grads = [
    np.sin(0.7 * (i + 1) * t + 0.3 * (j + 1) * (t + 1))
    + 0.5 * np.cos(i * j + t)
    + 0.3 * np.sin(0.9 * (i + 1) * (j + 2) + t)
    for t in range(1, steps + 1)
  ]
  return 0.1 * np.cos(i + 2 * j), grads


def run_trace(tx: optax.GradientTransformation, shape: str) -> np.ndarray:
  """Rows of the golden file: our kernels are (in, out), so all is turned."""
  m, n = map(int, shape.split('x'))
  w0, grads = reference_problem(m, n)
  w0 = jnp.asarray(w0.T, jnp.float32)
  params, state, update = {'w': w0}, tx.init({'w': w0}), jax.jit(tx.update)
  rows = []
  for g in grads:
    g = jnp.asarray(g.T, jnp.float32)
    updates, state = update({'w': g}, state, params)
    params = optax.apply_updates(params, updates)
    d = np.asarray(params['w'] - w0)
    rows.append([np.linalg.norm(d), d.sum(), d[0, 0], d[-1, -1]])
  return np.array(rows)


def svd_with_signs(signs: list[list[int]]) -> projection.ProjectorFn:
  """The SVD projector, its vectors multiplied by signs[refresh]."""

  def build(shape, rank, side, dtype):
    svd = projectors.svd(shape, rank, side, dtype)

    def refresh(g, state, context):
      basis = svd.refresh(g, state['basis'], context)
      flips = jnp.array(signs, dtype)[state['refreshes']]
      flips = flips[:, None] if basis.shape[0] == rank else flips
      return {'basis': basis * flips, 'refreshes': state['refreshes'] + 1}

    return projection.Projector(
      init=lambda: {
        'basis': svd.init(),
        'refreshes': jnp.zeros([], jnp.int32),
      },
      refresh=refresh,
      project=lambda g, state: svd.project(g, state['basis']),
      back=lambda r, state: svd.back(r, state['basis']),
      basis=lambda state: svd.basis(state['basis']),
    )

  return build


@pytest.fixture(name='with_signs')
def _with_signs() -> Callable[[list[list[int]]], projection.ProjectorFn]:
  return svd_with_signs


@pytest.fixture(name='trace')
def _trace() -> Callable[[optax.GradientTransformation, str], np.ndarray]:
  return run_trace


@pytest.fixture(name='golden', scope='session')
def _golden() -> dict[str, list[list[float]]]:
  return json.loads((pathlib.Path(__file__).parent / 'golden.json').read_text())
