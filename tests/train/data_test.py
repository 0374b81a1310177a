"""Batches: what is in them, in which order, and that they resume exactly."""

import itertools
import json
import random
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import ml_collections
import numpy as np
import pytest

from frugax.train import data, datasets
from frugax.train import tokenizer as tokenizer_lib

TOK = tokenizer_lib.tokenizer('bytes')
LENGTH = 8
FEATURES = ('tokens', 'labels', 'segment_ids', 'positions')


def make_texts(n, seed):
  rng = random.Random(seed)
  sizes = [rng.randrange(1, 40) for _ in range(n)]
  sizes[::4] = [LENGTH - 2] * len(sizes[::4])  # with bos and eos: just a row
  letters = 'abcdefghij é'
  return [f'{i}' + ''.join(rng.choices(letters, k=k)) for i, k in
          enumerate(sizes)]  # fmt: skip


TRAIN, VALIDATION = make_texts(23, 0), make_texts(11, 1)


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp('prepared data'))
  datasets.prepare(
    'tiny',
    {
      'train': lambda: ({'text': t} for t in TRAIN),
      'validation': lambda: ({'text': t} for t in VALIDATION),
    },
    folder,
  )
  return folder


@pytest.fixture
def cfg(data_dir):
  return ml_collections.ConfigDict(
    dict(
      name='tiny', data_dir=data_dir, train_split='train',
      eval_split='validation', text_field='text', mode='packed',
      sequence_length=LENGTH, seed=0, num_workers=0, repeat=True,
      shuffle_rows=0, streams=0,
    )
  )  # fmt: skip


class WithoutBos(tokenizer_lib.Tokenizer):
  """The special tokens of T5: pad, eos, no bos."""

  def __init__(self):
    super().__init__('t5', 258, pad_id=0, bos_id=None, eos_id=1)

  def encode(self, text):
    return TOK.encode(text) - 1


def in_memory(texts):
  """The data module with documents from a list instead of a directory."""
  documents = [{'text': text} for text in texts]
  return mock.patch.object(datasets, 'documents', lambda *_: documents)


def assert_same(batches, expected):
  batches, expected = list(batches), list(expected)
  assert len(batches) == len(expected)
  for a, b in zip(batches, expected, strict=True):
    assert a.keys() == b.keys() == set(FEATURES)
    for key in FEATURES:
      assert a[key].dtype == np.int32
      np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def take(cfg, n, batch_size=2, state=None, **kwargs):
  batches = data.train_batches(cfg, TOK, batch_size=batch_size, **kwargs)
  if state is not None:
    batches.set_state(state)
  out = list(itertools.islice(batches, n))
  batches.close()
  return out


def texts_of(batches):
  """The documents of packed or one-row batches, in order; whole ones only."""
  tokens = np.concatenate([b['tokens'].ravel() for b in batches])
  texts, current = [], None
  for token in tokens:
    if token == TOK.bos_id:
      current = []
    elif token == TOK.eos_id:
      texts.append(TOK.decode(current))
    elif token != TOK.pad_id and current is not None:
      current.append(token)
  return texts


def ids(text):
  return [ord(c) + 3 for c in text]


def test_packing_by_hand(cfg):
  cfg.sequence_length = 5
  a, b, c, d, e, f = ids('abcdef')
  with in_memory(['abc', 'd', 'ef']):
    (batch,) = data.eval_batches(cfg, TOK, batch_size=3)
  expected = {
    'tokens': [[1, a, b, c, 2], [1, d, 2, 1, e], [f, 2, 0, 0, 0]],
    'labels': [[a, b, c, 2, -1], [d, 2, -1, e, f], [2, -1, -1, -1, -1]],
    'segment_ids': [[1, 1, 1, 1, 1], [1, 1, 1, 2, 2], [1, 1, 0, 0, 0]],
    'positions': [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1], [0, 1, 0, 0, 0]],
  }
  assert_same(
    [batch], [{k: np.array(v, np.int32) for k, v in expected.items()}]
  )


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
  texts=st.lists(st.text(max_size=9), min_size=1, max_size=12),
  length=st.integers(1, 9),
  rows=st.integers(1, 3),
  hosts=st.integers(1, 2),
  tok=st.sampled_from([TOK, WithoutBos()]),
)
def test_packing_loses_and_invents_nothing(texts, length, rows, hosts, tok):
  cfg = data.DataConfig(sequence_length=length)
  with in_memory(texts):
    shares = [
      list(
        data.eval_batches(
          cfg,
          tok,
          batch_size=rows * hosts,
          process_index=i,
          process_count=hosts,
        )
      )
      for i in range(hosts)
    ]
  assert len({len(share) for share in shares}) == 1
  batch = {
    key: np.concatenate(
      [host[key] for step in zip(*shares, strict=True) for host in step]
    )
    for key in FEATURES
  }
  assert batch['tokens'].shape[1] == length
  real = batch['segment_ids'] > 0

  bos = [] if tok.bos_id is None else [tok.bos_id]
  documents = [[*bos, *tok.encode(t).tolist(), tok.eos_id] for t in texts]
  tokens = [t for d in documents for t in d]
  labels = [t for d in documents for t in (*d[1:], -1)]
  assert batch['tokens'][real].tolist() == tokens
  assert batch['labels'][real].tolist() == labels
  assert (batch['labels'][~real] == -1).all()
  assert (batch['tokens'][~real] == tok.pad_id).all()

  # Segments and positions say where a document begins, or goes on, in a row.
  start = iter([i for d in documents for i in range(len(d))])
  for row in range(len(real)):
    segment, position = 0, 0
    for column in range(int(real[row].sum())):
      new = next(start) == 0 or column == 0
      segment, position = segment + new, 0 if new else position + 1
      assert batch['segment_ids'][row, column] == segment
      assert batch['positions'][row, column] == position
  assert (np.diff(real.astype(int), axis=1) <= 0).all()  # padding is at the end


def test_training_sees_every_document_once_an_epoch(cfg):
  cfg.repeat = False
  seen = texts_of(take(cfg, 1000, batch_size=1))
  assert sorted(seen) == sorted(TRAIN)
  assert seen != TRAIN


@pytest.mark.parametrize(
  ('mode', 'shuffle_rows'), [('packed', 0), ('packed', 7), ('c4_protocol', 0)]
)
def test_resumes_exactly_at_every_step(cfg, mode, shuffle_rows):
  cfg.mode, cfg.shuffle_rows = mode, shuffle_rows
  n = 60  # more than an epoch
  batches = data.train_batches(cfg, TOK, batch_size=2)
  states, expected = [], []
  for _ in range(n):
    states.append(batches.get_state())
    expected.append(next(batches))
  batches.close()
  for k, state in enumerate(states[:-2]):
    assert_same(take(cfg, 3, state=state), expected[k : k + 3])


def test_shuffled_rows_are_the_same_rows(cfg):
  cfg.repeat = False

  def rows():
    batches = take(cfg, None, batch_size=1)
    return [tuple(b[key].ravel().tolist()) for b in batches for key in FEATURES]

  plain = rows()
  cfg.shuffle_rows = 10
  shuffled = rows()
  assert shuffled != plain and sorted(shuffled) == sorted(plain)
  cfg.shuffle_rows = 10_000  # more than there are
  assert sorted(rows()) == sorted(plain)


def test_going_back_in_the_same_iterator(cfg):
  batches = data.train_batches(cfg, TOK, batch_size=2)
  next(batches)
  state = batches.get_state()
  expected = list(itertools.islice(batches, 5))
  batches.set_state(state)
  assert_same(itertools.islice(batches, 5), expected)
  batches.close()


def test_workers_change_nothing_and_resume(cfg):
  expected = take(cfg, 45)
  batches = data.train_batches(cfg, TOK, batch_size=2)
  states = []
  for _ in range(10):
    states.append(batches.get_state())
    next(batches)
  batches.close()
  cfg.num_workers = 2
  batches = data.train_batches(cfg, TOK, batch_size=2)
  assert_same(itertools.islice(batches, 45), expected)
  own = batches.get_state()
  after = list(itertools.islice(batches, 3))
  for k in (0, 5, 9):
    batches.set_state(states[k])  # of the run without workers
    assert_same(itertools.islice(batches, 8), expected[k : k + 8])
  batches.set_state(own)
  assert_same(itertools.islice(batches, 3), after)
  batches.close()
  cfg.num_workers = 0
  assert_same(take(cfg, 3, state=own), after)


def joined(parts):
  """The batches of several hosts, side by side."""
  return [
    {k: np.concatenate([part[k] for part in step]) for k in FEATURES}
    for step in zip(*parts, strict=True)
  ]


def on_hosts(cfg, n, hosts, batch_size, states=None):
  """n batches of so many hosts, and the position of all of them after these."""
  parts, state = [], {}
  for i in range(hosts):
    batches = data.train_batches(
      cfg, TOK, batch_size=batch_size, process_index=i, process_count=hosts
    )
    if states:
      batches.set_state(states)
    parts.append(list(itertools.islice(batches, n)))
    state |= json.loads(json.dumps(batches.get_state()))
    batches.close()
  return joined(parts), state


@pytest.mark.parametrize(
  ('mode', 'shuffle_rows'), [('packed', 0), ('packed', 24), ('c4_protocol', 0)]
)
def test_batches_are_the_same_on_any_number_of_hosts(cfg, mode, shuffle_rows):
  """And go on on any other: in streams of their own, halves of one, or two."""
  cfg.mode, cfg.shuffle_rows, n = mode, shuffle_rows, 8
  for streams, hosts in ((0, 2), (0, 12), (1, 3), (6, 4)):
    cfg.streams = streams
    want, _ = on_hosts(cfg, n, 1, batch_size=12)
    got, state = on_hosts(cfg, 3, hosts, batch_size=12)
    assert_same(got, want[:3])
    assert len(state) == (streams or 4)
    for others in (1, 6):
      assert_same(on_hosts(cfg, n - 3, others, 12, state)[0], want[3:])


def test_streams_share_out_every_epoch(cfg):
  cfg.mode, cfg.sequence_length, cfg.streams = 'c4_protocol', 50, 4
  seen = texts_of(take(cfg, len(TRAIN), batch_size=4))
  assert len(seen) == 4 * len(TRAIN)
  # Each gives a row in turn, so the epochs come one after the other.
  epochs = [seen[i : i + len(TRAIN)] for i in range(0, len(seen), len(TRAIN))]
  assert [sorted(epoch) for epoch in epochs] == [sorted(TRAIN)] * 4


def test_workers_serve_all_streams_alike(cfg):
  cfg.streams = 4
  expected = take(cfg, 6, batch_size=8)
  cfg.num_workers = 2
  assert_same(take(cfg, 6, batch_size=8), expected)


def test_resumed_streams_read_few_documents_again(cfg):
  """Not all that the run has seen, though streams are at different ones."""
  cfg.streams = 4
  batches = data.train_batches(cfg, TOK, batch_size=8)
  seen = sum((b['tokens'] == TOK.bos_id).sum() for b in itertools.islice(
    batches, 150))  # fmt: skip
  state = batches.get_state()
  batches.close()
  fresh = data.train_batches(cfg, TOK, batch_size=8)
  with mock.patch.object(
    type(TOK), 'encode', autospec=True, side_effect=type(TOK).encode
  ) as encoded:
    fresh.set_state(state)
    next(fresh)
    fresh.close()
  assert encoded.call_count < seen / 4


def test_deterministic_and_seeded(cfg):
  first = take(cfg, 20)
  assert_same(take(cfg, 20), first)
  cfg.seed = 1
  other = take(cfg, 20)
  assert any(
    (a['tokens'] != b['tokens']).any()
    for a, b in zip(first, other, strict=True)
  )


def test_each_epoch_has_its_own_order(cfg):
  cfg.mode, cfg.sequence_length = 'c4_protocol', 50
  seen = texts_of(take(cfg, 3 * len(TRAIN), batch_size=1))
  epochs = [seen[i : i + len(TRAIN)] for i in range(0, len(seen), len(TRAIN))]
  assert [sorted(epoch) for epoch in epochs] == [sorted(TRAIN)] * 3
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def counted(batches):
  """(token, label, position) of what counts, in order."""
  rows = []
  for batch in batches:
    columns = np.stack([batch[k] for k in ('tokens', 'labels', 'positions')])
    rows += columns[:, batch['labels'] != -1].T.tolist()
  return rows


@pytest.mark.parametrize('mode', ['packed', 'c4_protocol'])
def test_evaluation_set_is_fixed(cfg, mode):
  cfg.mode = mode
  everything = counted(data.eval_batches(cfg, TOK, batch_size=1))
  if mode == 'packed':
    assert len(everything) == sum(len(t.encode()) + 1 for t in VALIDATION)
  for tokens in (1, 7, 50, len(everything) - 1, len(everything), 10**6, None):
    for batch_size in (1, 2, 6):
      whole = data.eval_batches(cfg, TOK, batch_size=batch_size, tokens=tokens)
      batches = list(whole)
      assert_same(whole, batches)  # again
      assert {b['tokens'].shape for b in batches} == {(batch_size, LENGTH)}
      assert counted(batches) == everything[:tokens]
      if batch_size % 2 == 0:
        halves = [
          data.eval_batches(
            cfg,
            TOK,
            batch_size=batch_size,
            tokens=tokens,
            process_index=i,
            process_count=2,
          )
          for i in range(2)
        ]
        joined = [
          {k: np.concatenate([a[k], b[k]]) for k in FEATURES}
          for a, b in zip(*halves, strict=True)
        ]
        assert_same(joined, batches)


def test_c4_protocol_by_hand(cfg):
  cfg.mode, cfg.sequence_length = 'c4_protocol', 4
  a, b, c, d = (i - 1 for i in ids('abcd'))
  with in_memory(['a', 'abc', 'abcd', '']):
    (batch,) = data.eval_batches(cfg, WithoutBos(), batch_size=4)
    one = next(data.train_batches(cfg, TOK, batch_size=1))
  expected = {
    'tokens': [[a, 1, 0, 0], [a, b, c, 1], [a, b, c, 1], [1, 0, 0, 0]],
    'labels': [[1, -1, -1, -1], [b, c, 1, -1], [b, c, 1, -1], [-1] * 4],
    'segment_ids': [[1, 1, 0, 0], [1] * 4, [1] * 4, [1, 0, 0, 0]],
    'positions': [[0, 1, 0, 0], [0, 1, 2, 3], [0, 1, 2, 3], [0] * 4],
  }
  assert d not in batch['tokens']
  assert_same(
    [batch], [{k: np.array(v, np.int32) for k, v in expected.items()}]
  )
  assert one['tokens'][0, 0] == TOK.bos_id  # where the tokenizer has one


@pytest.mark.parametrize('length', [1, 2])
def test_c4_protocol_of_very_short_rows(cfg, length):
  cfg.mode, cfg.sequence_length = 'c4_protocol', length
  (batch,) = take(cfg, 1)
  assert batch['tokens'].shape == (2, length)
  assert (batch['tokens'][:, 0] == TOK.bos_id).all()


def test_text_may_be_str_or_bytes(cfg):
  with in_memory(['añ', b'a\xc3\xb1']):
    cfg.mode = 'c4_protocol'
    (batch,) = data.eval_batches(cfg, TOK, batch_size=2)
  np.testing.assert_array_equal(batch['tokens'][0], batch['tokens'][1])


@pytest.mark.parametrize(
  'change, match',
  [
    ({'name': 'tinny'}, "data set 'tinny' is neither"),
    ({'train_split': 'trian', 'eval_split': 'trian'}, "did you mean 'train'"),
    (
      {'train_split': 'train[:0]', 'eval_split': 'train[:0]'},
      r"split 'train\[:0\]' of data set 'tiny' is empty",
    ),
    ({'text_field': 'body'}, r"'body' .* does not exist; its fields: text"),
    ({'sequence_length': 0}, 'sequence_length must be 1 or more, got 0'),
    ({'mode': 'c4'}, "unknown data mode 'c4'. Valid: c4_protocol, packed"),
  ],
)
def test_a_bad_config_is_refused_at_once(cfg, change, match):
  cfg.update(change)
  with pytest.raises(ValueError, match=match):
    data.train_batches(cfg, TOK, batch_size=2)
  with pytest.raises(ValueError, match=match):
    data.eval_batches(cfg, TOK, batch_size=2)
  with pytest.raises(ValueError, match=match):
    data.check(cfg, TOK, 259)


def test_batches_that_cannot_be_are_refused_at_once(cfg):
  for streams in (3, -1, 24):
    cfg.streams = streams
    with pytest.raises(ValueError, match=f'{streams} streams cannot deal'):
      data.train_batches(cfg, TOK, batch_size=8)
  with pytest.raises(ValueError, match='a batch_size of 16 or a multiple of'):
    data.train_batches(cfg, TOK, batch_size=8, streams=16)
  cfg.streams, cfg.repeat = 2, False
  with pytest.raises(ValueError, match='repeat=false with 2 streams'):
    data.train_batches(cfg, TOK, batch_size=8)
  cfg.streams, cfg.repeat = 0, True
  for batch_size in (0, -2, 3):
    for make in (data.train_batches, data.eval_batches):
      with pytest.raises(ValueError, match='positive multiple of the 2 hosts'):
        make(cfg, TOK, batch_size=batch_size, process_count=2)
  with pytest.raises(ValueError, match='tokens must be 1 or more'):
    data.eval_batches(cfg, TOK, batch_size=2, tokens=0)
  cfg.num_workers = -1
  with pytest.raises(ValueError, match='num_workers must be 0 or more, got -1'):
    data.train_batches(cfg, TOK, batch_size=2)


def test_ids_beyond_the_model_are_refused(cfg):
  data.check(cfg, TOK, 259)
  data.check(cfg, TOK, 300)
  with pytest.raises(
    ValueError, match="'bytes' has 259 ids, the model only 256"
  ):
    data.check(cfg, TOK, 256)
  liar = WithoutBos()
  liar.vocab_size = 40  # its ids are beyond what it says
  with pytest.raises(ValueError, match=r'outside the vocabulary \[0, 40\)'):
    data.check(cfg, liar, 40)


def test_closed_batches_say_so(cfg):
  batches = data.train_batches(cfg, TOK, batch_size=2)
  next(batches)
  batches.close()
  batches.close()
  with pytest.raises(ValueError, match='closed'):
    next(batches)
