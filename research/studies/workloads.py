"""What the benchmark trains: models on data, and for how long.

    python research/studies/workloads.py --data_dir=data

writes the data sets. `stdlib` is the standard library's source, a file a
document. `blocks` is the same source cut at empty lines: documents of some
hundred bytes, of which half are shorter than a row, so that padding counts.
"""

import argparse
import dataclasses
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any

from frugax.models import llama
from frugax.train import corpus, datasets


@dataclasses.dataclass(frozen=True)
class Workload:
  """A model on data, and how long it is trained.

  Attributes:
    steps: of a run; a tenth of them are warm-up.
    batch: sequences of a step.
    length: tokens of a sequence.
    target: the workload that sets the target: it is this one but for fewer
      steps, and AdamW's loss there is what is to be reached.
    data: the data set.
    mode: of the data: packed, or c4_protocol, where each sequence is one
      document, cut or padded.
    size: the model, of configs/llama.py.
    matmul: how its layers multiply, likewise.
    model: fields of the model that are otherwise.
    eval_tokens: of each evaluation along a trial.
    last_tokens: of the one evaluation of a run that is judged by its end.
  """

  steps: int
  batch: int
  length: int
  target: str = ''
  data: str = 'stdlib'
  mode: str = 'packed'
  size: str = 'tiny'
  matmul: str = 'f32'
  model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  eval_tokens: int = 8_192
  last_tokens: int = 300_000

  @property
  def dim(self) -> int:
    """The model's dimension."""
    return llama.config(self.size, **self.model).dim

  @property
  def layers(self) -> int:
    """The model's layers."""
    return llama.config(self.size, **self.model).n_layers

  @property
  def slots(self) -> int:
    """Tokens of a step, padding counted."""
    return self.batch * self.length


# A model of a sixth of `tiny`, so that a run gets beyond the unigrams.
_SMALL = types.MappingProxyType(
  {'dim': 64, 'ffn': 176, 'n_layers': 3, 'n_heads': 2, 'n_kv_heads': 2}
)
_WIDE = types.MappingProxyType(
  {'dim': 128, 'ffn': 352, 'n_layers': 3, 'n_heads': 4, 'n_kv_heads': 4}
)
_PACKED = Workload(500, 4, 128, target='packed_short', model=_SMALL)
_PADDED = dataclasses.replace(
  _PACKED, target='padded_short', data='blocks', mode='c4_protocol'
)
_HALF = dataclasses.replace(_PACKED, steps=250, target='')
_TERNARY = dataclasses.replace(_PACKED, matmul='b1.58', target='')
_INT4 = 'stable_spam_int4'

WORKLOADS = {
  'packed': _PACKED,
  'packed_short': dataclasses.replace(_PACKED, steps=375, target=''),
  'padded': _PADDED,
  'padded_short': dataclasses.replace(_PADDED, steps=375, target=''),
  'half': _HALF,
  'long': dataclasses.replace(_PACKED, steps=1500, target=''),
  'int4': dataclasses.replace(_PACKED, matmul=_INT4, target=''),
  'int4_half': dataclasses.replace(_HALF, matmul=_INT4),
  'ternary': _TERNARY,
  'ternary_wide': dataclasses.replace(_TERNARY, model=_WIDE),
  # For one GPU: an epoch of the standard library, and C4 as the papers have it.
  '10m': Workload(
    580, 64, 256, '10m_short', size='10m', matmul='bf16', eval_tokens=200_000
  ),
  '10m_short': Workload(
    435, 64, 256, size='10m', matmul='bf16', eval_tokens=200_000
  ),
  **{
    f'{size}{short}': Workload(
      steps if not short else steps * 3 // 4,
      *(512, 256, '' if short else f'{size}_short', 'c4/en', 'c4_protocol'),
      size=size,
      matmul='bf16',
      eval_tokens=1_000_000,
      last_tokens=10_000_000,
    )
    for size, steps in (('60m', 10_000), ('130m', 20_000))
    for short in ('', '_short')
  },
}


def blocks(*, validation: bool) -> Iterator[dict[str, str]]:
  """What lies between the empty lines of the standard library's source.

  Examples:
    >>> texts = [d['text'] for d in blocks(validation=True)]
    >>> len(texts) > 1000, any('\\n\\n' in text for text in texts)
    (True, False)
  """
  for document in corpus.documents(validation=validation):
    for text in re.split(r'\n[ \t]*(?:\n[ \t]*)+', document['text']):
      if text.strip():
        yield {'text': text}


def build(data_dir: str) -> None:
  """Writes the data sets that are not there yet."""
  corpus.build(data_dir)
  datasets.prepare(
    'blocks',
    {
      'train': lambda: blocks(validation=False),
      'validation': lambda: blocks(validation=True),
    },
    data_dir,
    description='Source of the standard library between its empty lines.',
  )


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data_dir', default='data')
  build(parser.parse_args().data_dir)
