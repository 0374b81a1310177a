"""What quantised and low-rank state saves of Adam's, from real state trees.

    python research/studies/state_savings.py

The states of LLaMA-1b and LLaMA-7b are made in the abstract, so nothing is
allocated, and each of their leaves is counted with the parameter that its path
names: the linear layers of attention and feed-forward, the embedding, the head,
and the rest, which is norms and counters. The baseline is Adam in the dtype of
the parameters, the papers' being bfloat16. Ranks are the papers': 512 for 1b,
1024 for 7b.

GaLore, COAP and Q-GaLore leave embedding and head to Adam, in 8 bits where the
moments of the layers are; adam_sn and snsm compress the head too. 8-bit GaLore
and 8-bit COAP keep the projector as it was computed, in the parameters' dtype,
as the released codes do; the rows with `int8 P` store it in 8 bits. 8-bit COAP
has its authors' blocks of 4096.

The bars are published figures, read on the linear layers, in every setting that
might be meant. GaLore's 82.5 % agrees with the 4.9 GB that its paper tells for
7b beside 28 GB, two bfloat16 moments of nominally 7e9 numbers; what the
released code holds is the row `8-bit galore`. COAP's 81 % is said of LLaVA-7B;
the 5380.51 MiB that its authors measured for LLaMA-7b are, to a thousandth, the
row `8-bit coap` with embedding and head.
"""

import collections
from typing import NamedTuple

import jax
import optax

from frugax import optim, quant
from frugax.models import llama
from frugax.optim import state as state_lib
from frugax.train import metrics

RANKS = {'1b': 512, '7b': 1024}
GROUPS = ('linear', 'embedding', 'head', 'rest')
_LR = 1e-3  # any: only the states are looked at
_BASELINE = 'adamw'


class Bar(NamedTuple):
  """A published figure, and the settings in which it may be read.

  Attributes:
    text: what is claimed of the state of the linear layers.
    size: of the model.
    saved: the least saving.
    readings: pairs of a dtype of parameters, gradients and Adam, and a row.
  """

  text: str
  size: str
  saved: float
  readings: tuple[tuple[str, str], ...]


BARS = (
  Bar(
    "8-bit GaLore saves at least 82.5 % of Adam's",
    '7b',
    0.825,
    (
      ('bfloat16', '8-bit galore'),
      ('bfloat16', '8-bit galore, int8 P'),
      ('bfloat16', 'q_galore'),
      ('float32', '8-bit galore'),
    ),
  ),
  Bar(
    "8-bit COAP saves at least 81 % of Adam's",
    '7b',
    0.81,
    (
      ('bfloat16', '8-bit coap'),
      ('bfloat16', '8-bit coap, int8 P'),
      ('float32', '8-bit coap'),
    ),
  ),
  Bar(
    "snsm holds at most 20 % of Adam's, saves at least 80 %",
    '1b',
    0.80,
    (('bfloat16', 'snsm'),),
  ),
)


def optimizers(rank, axes, axes_with_head):
  """The transformation of each row."""
  low = {'rank': rank, 'axes': axes}

  def galore(**arguments):
    return optim.galore(_LR, codec='dynamic8', **low, **arguments)

  def coap(**arguments):
    codec = quant.Codec('dynamic8', block=4096, signed=True)
    return optim.coap(_LR, codec=codec, **low, **arguments)

  return {
    _BASELINE: optax.adamw(_LR),
    '8-bit adamw': optim.quantize_state(optax.adamw(_LR), 'dynamic8'),
    'galore': optim.galore(_LR, **low),
    '8-bit galore': galore(),
    '8-bit galore, int8 P': galore(projector_dtype='int8'),
    'q_galore': optim.q_galore(_LR, **low),
    'coap': optim.coap(_LR, **low),
    '8-bit coap': coap(),
    '8-bit coap, int8 P': coap(projector_dtype='int8'),
    'adam_sn': optim.adam_sn(_LR, axes=axes_with_head),
    'snsm': optim.snsm(_LR, rank=rank, axes=axes_with_head),
  }


def bytes_by_group(tx, params, axes):
  """Bytes of the state by group of parameters."""
  sizes, shared = state_lib.parameter_bytes(tx, params)
  found = collections.Counter(rest=shared)
  specs = jax.tree.structure(sizes).flatten_up_to(axes)
  leaves = jax.tree.leaves_with_path(sizes)
  for (path, size), spec in zip(leaves, specs, strict=True):
    group = {'embed': 'embedding', 'lm_head': 'head'}.get(path[0].key)
    found[group or ('rest' if spec is None else 'linear')] += size
  return {group: found[group] for group in GROUPS}


def table(size, dtype='bfloat16', rank=None):
  """Bytes by row and group for a model with parameters in this dtype."""
  model = llama.Llama(llama.config(size, param_dtype=dtype))
  params = jax.eval_shape(model.init, jax.random.key(0))
  axes = optim.matrix_axes(model.axes(), whole=('vocab',))
  with_head = axes | {'lm_head': optim.matrix_axes(model.axes())['lm_head']}
  made = optimizers(rank or RANKS[size], axes, with_head)
  return {name: bytes_by_group(tx, params, axes) for name, tx in made.items()}


def saved(rows, name, groups=('linear',)):
  """Share of Adam's bytes that a row does without."""
  ours, adam = (sum(rows[n][g] for g in groups) for n in (name, _BASELINE))
  return 1 - ours / adam


def verdict(share, bar):
  """What a line about a bar ends with."""
  return f'{share:7.2%}  {"kept" if share >= bar.saved else "missed"}'


def main():
  info = metrics.run_info()
  print(
    f'commit {info["commit"]}{" (changed)" * bool(info["dirty"])},'
    f' jax {info["jax"]}'
  )
  tables = {}
  for size, dtype in (
    ('1b', 'bfloat16'),
    ('7b', 'bfloat16'),
    ('7b', 'float32'),
  ):
    rows = tables[size, dtype] = table(size, dtype)
    print(
      f'\nLLaMA-{size} in {dtype}, rank {RANKS[size]}: MB (1e6 bytes) of state,'
      f" and the saving of {_BASELINE}'s"
    )
    columns = ''.join(f'{group:>11}' for group in (*GROUPS, 'all'))
    print(f'{"":20}{columns}{"of linear":>12}{"of all":>9}')
    for name, sizes in rows.items():
      figures = (*sizes.values(), sum(sizes.values()))
      print(
        f'{name:20}{"".join(f"{x / 1e6:11.2f}" for x in figures)}'
        f'{saved(rows, name):12.2%}{saved(rows, name, GROUPS):9.2%}'
      )
  for bar in BARS:
    print(f'\n{bar.text}: LLaMA-{bar.size}, linear layers')
    for dtype, name in bar.readings:
      share = saved(tables[bar.size, dtype], name)
      print(f'  {name:20} beside Adam in {dtype:8} {verdict(share, bar)}')


if __name__ == '__main__':
  main()
