"""Low-bit linears beside qwix's: their error, and what a step holds of them.

    make bench-peers

Error: of one Dense of 1024 x 1024 on 2048 tokens, its result and both
gradients, in float32 but for the rounding, against float64: the norm of the
difference over the norm. Activations are normal with one feature in a hundred
thirty times larger, as in language models; weights and gradients are normal.
Memory: the temporaries of the gradients of eight such layers with a GELU
between them, 65536 tokens in bfloat16, compiled for one v5e chip and not run:
what stays for the backward pass is most of it, and no VMEM holds it.

qwix has scales by channel as ours, reuses the forward pass's codes backward as
ours, and rounds gradients at random only if asked to, which it is here.
"""

import os

from frugax.plan import environment

# Before jax.
os.environ |= environment.TPU

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import linen as nn

from frugax import lowbit
from frugax.plan import topologies

WIDTH, TOKENS, LAYERS, HELD = 1024, 2048, 8, 65536
CHIP = 'v5e:1x1'
# Our recipe; qwix's types of weights, of activations and of gradients.
PAIRS = {
  'int8': ('int8', 'int8', 'int8'),
  'int4': ('int4', 'int4', 'int8'),
  'fp8': ('float8_e4m3fn', 'float8_e4m3fn', 'float8_e5m2'),
}


class Layers(nn.Module):
  """Dense layers with a GELU between them.

  Attributes:
    n: how many.
    dot_general: what multiplies.
  """

  n: int
  dot_general: object = None

  @nn.compact
  def __call__(self, x):
    for i in range(self.n):
      if i:
        x = nn.gelu(x)
      x = nn.Dense(
        WIDTH,
        use_bias=False,
        dtype=x.dtype,
        dot_general=self.dot_general or jax.lax.dot_general,
      )(x)
    return x


def models(recipe: str, n: int) -> dict[str, nn.Module]:
  """Ours and qwix's of a recipe."""
  weights, activations, gradients = PAIRS[recipe]
  rule = qwix.QtRule(
    weight_qtype=weights,
    act_qtype=activations,
    bwd_qtype=gradients,
    bwd_stochastic_rounding='uniform',
  )
  return {
    'ours': Layers(n, lowbit.dot_general(lowbit.recipe(recipe))),
    'qwix': qwix.quantize_model(Layers(n), qwix.QtProvider([rule])),
  }


def gradients(model: nn.Module):
  """x, parameters, the gradient of the result -> result and both gradients."""

  def step(params, x, g):
    rngs = {'stochastic_rounding': jax.random.key(0)}
    y, pull = jax.vjp(lambda p, x: model.apply(p, x, rngs=rngs), params, x)
    return y, *pull(g)

  return step


def errors(model: nn.Module) -> list[float]:
  """Relative errors of y, dx and dw."""
  draw = np.random.default_rng(0)
  x = draw.normal(size=(TOKENS, WIDTH))
  x[:, ::100] *= 30
  w, g = draw.normal(size=(WIDTH, WIDTH)), draw.normal(size=(TOKENS, WIDTH))
  params = {'params': {'Dense_0': {'kernel': jnp.asarray(w, jnp.float32)}}}
  y, dw, dx = jax.jit(gradients(model))(
    params, jnp.asarray(x, jnp.float32), jnp.asarray(g, jnp.float32)
  )
  dw = dw['params']['Dense_0']['kernel']
  truth = (x @ w, g @ w.T, x.T @ g)
  return [
    float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))
    for a, b in zip((y, dx, dw), truth, strict=True)
  ]


def temporaries(model: nn.Module) -> int:
  """Bytes, compiled for the chip."""
  device = topologies.devices(CHIP)[0]
  mesh = jax.sharding.Mesh(np.array([device]), ('x',))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=whole)

  params = {
    'params': {
      f'Dense_{i}': {'kernel': array(WIDTH, WIDTH)} for i in range(LAYERS)
    }
  }
  x = array(HELD, WIDTH)
  with jax.set_mesh(mesh):
    compiled = jax.jit(gradients(model)).lower(params, x, x).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def main():
  argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
  topologies.prepare(CHIP)
  print(f'jax {jax.__version__}, qwix {qwix.__version__}')
  print(f'{"":6}{"":6}{"y":>9}{"dx":>9}{"dw":>9}{"temporaries, MB":>17}')
  notes = []
  plain = temporaries(Layers(LAYERS)) / 1e6
  print(f'{"bf16":6}{"":6}{"":9}{"":9}{"":9}{plain:17.1f}')
  for recipe in PAIRS:
    one, several = models(recipe, 1), models(recipe, LAYERS)
    for name in one:
      try:
        row = ''.join(f'{e:9.2e}' for e in errors(one[name]))
      except jax.errors.JaxRuntimeError as error:
        row = f'{"does not run on a CPU":>27}'
        notes.append(f'{recipe}, {name}: {str(error).splitlines()[0]}')
      held = temporaries(several[name]) / 1e6
      print(f'{recipe:6}{name:6}{row}{held:17.1f}', flush=True)
  print('\n'.join(notes))


if __name__ == '__main__':
  main()
