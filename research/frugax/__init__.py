"""Frugal LLM training in JAX: `import frugax as fx`.

Subpackages load on first use, so that `fx.optim` works on a machine that has
only jax, flax and optax.
"""

import importlib

__version__ = '0.1.0'

__all__ = [
  'config',
  'kernels',
  'lowbit',
  'models',
  'optim',
  'plan',
  'quant',
  'report',
  'train',
]


def __getattr__(name):
  if name in __all__:
    return importlib.import_module(f'frugax.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
  return [*globals(), *__all__]
