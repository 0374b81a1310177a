"""Tokenizers: lossless bytes, and files trained here."""

import json
from multiprocessing.reduction import ForkingPickler

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from frugax.train import tokenizer as tokenizer_lib

TEXTS = [
  'the quick brown fox jumps over the lazy dog',
  'a frugal optimizer keeps a fraction of the state of another',
  'naïve café, Größe, 東京',
] * 20


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """Paths of small trained tokenizers: name -> path, in a spaced directory."""
  import sentencepiece
  import tokenizers

  folder = tmp_path_factory.mktemp('token izers')
  for name, kwargs in {
    'llama': dict(byte_fallback=True, vocab_size=330, bos_id=1, eos_id=2),
    't5': dict(vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1),
    'no_eos': dict(vocab_size=60, eos_id=-1),
  }.items():
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(TEXTS),
      model_prefix=str(folder / name),
      model_type='bpe' if name == 'llama' else 'unigram',
      hard_vocab_limit=False,
      minloglevel=2,
      **kwargs,
    )
  for name, specials in {
    'gpt': ['<|endoftext|>'],
    'padded': ['<pad>', '<s>', '</s>'],
    'no_end': ['<pad>'],
  }.items():
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=300,
      special_tokens=specials,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    )
    model.train_from_iterator(TEXTS, trainer)
    model.enable_truncation(4)
    model.enable_padding(length=16)
    model.save(str(folder / f'{name}.json'))
  return folder


@hypothesis.given(st.text(st.characters(exclude_categories=())))
def test_bytes_are_lossless_on_any_string(text):
  tok = tokenizer_lib.tokenizer('bytes')
  ids = tok.encode(text)
  assert ids.dtype == np.int32
  assert tok.decode(ids) == text
  assert tok.bytes_per_id()[ids].sum() == len(ids)
  assert ids.size == 0 or (ids.min() >= 3 and ids.max() < tok.vocab_size)


@hypothesis.given(st.binary())
def test_bytes_pass_bytes_through(raw):
  tok = tokenizer_lib.tokenizer('bytes')
  ids = tok.encode(raw)
  assert (ids - 3).astype(np.uint8).tobytes() == raw
  assert isinstance(tok.decode(ids), str)  # whatever a model may sample


def test_bytes_layout():
  tok = tokenizer_lib.tokenizer('bytes')
  assert (tok.name, tok.vocab_size) == ('bytes', 259)
  assert (tok.pad_id, tok.bos_id, tok.eos_id) == (0, 1, 2)
  assert tok.encode('A\x00').tolist() == [68, 3]
  assert tok.encode('').shape == (0,)
  assert tok.decode([1, 68, 2, 0, 0]) == 'A'
  assert tok.decode([0xFF + 3]) == '�'
  np.testing.assert_array_equal(tok.bytes_per_id(), [0] * 3 + [1] * 256)


def test_sentencepiece(files):
  tok = tokenizer_lib.tokenizer(str(files / 'llama.model'))
  assert (tok.bos_id, tok.eos_id, tok.pad_id) == (1, 2, 2)
  for text in (*TEXTS[:3], 'not seen: ∑ß'):
    ids = tok.encode(text)
    assert ids.dtype == np.int32
    assert ids.max() < tok.vocab_size
    assert tok.decode(ids) == text
    np.testing.assert_array_equal(tok.encode(text.encode()), ids)
    # SentencePiece puts one space before the text.
    assert tok.bytes_per_id()[ids].sum() == len(text.encode()) + 1
  assert tok.bytes_per_id()[[0, 1, 2]].tolist() == [0, 0, 0]
  assert not np.isin(tok.encode('</s>'), [1, 2]).any()


def test_sentencepiece_of_t5_has_no_bos(files):
  tok = tokenizer_lib.tokenizer(str(files / 't5.model'))
  assert (tok.pad_id, tok.eos_id, tok.bos_id) == (0, 1, None)


def test_hugging_face(files):
  tok = tokenizer_lib.tokenizer(str(files / 'padded.json'))
  assert (tok.pad_id, tok.bos_id, tok.eos_id) == (0, 1, 2)
  for text in (*TEXTS[:3], 'not seen: ∑ß', 'x</s>y'):
    ids = tok.encode(text)  # neither truncated nor padded by the file
    assert ids.dtype == np.int32
    assert tok.decode(ids) == text
    np.testing.assert_array_equal(tok.encode(text.encode()), ids)
    assert tok.bytes_per_id()[ids].sum() == len(text.encode())
    assert not np.isin(ids, [0, 1, 2]).any()
  assert tok.vocab_size == 300
  assert tok.bytes_per_id()[:3].tolist() == [0, 0, 0]


def test_hugging_face_with_one_special_token(files):
  tok = tokenizer_lib.tokenizer(str(files / 'gpt.json'))
  assert (tok.pad_id, tok.bos_id, tok.eos_id) == (0, None, 0)


def test_hugging_face_word_pieces(tmp_path):
  import tokenizers

  vocab = {'<pad>': 0, '</s>': 1, 'caf': 2, '##é': 3, '▁東': 4, '<0x41>': 5}
  model = tokenizers.models.WordPiece(vocab, unk_token='<pad>')
  wrapped = tokenizers.Tokenizer(model)
  wrapped.add_special_tokens(['<pad>', '</s>'])
  wrapped.save(str(tmp_path / 'words.json'))
  tok = tokenizer_lib.tokenizer(str(tmp_path / 'words.json'))
  assert tok.encode('café').tolist() == [2, 3]
  assert tok.bytes_per_id().tolist() == [0, 0, 3, 2, 4, 1]


@pytest.mark.parametrize('name', ['bytes', 'llama.model', 'padded.json'])
def test_travels_to_workers_as_its_spec(files, name):
  spec = name if name == 'bytes' else str(files / name)
  tok = tokenizer_lib.tokenizer(spec)
  sent = ForkingPickler.dumps(tok)
  assert len(sent) < 1000
  copy = ForkingPickler.loads(sent)
  assert copy.name == spec
  np.testing.assert_array_equal(copy.encode('a dog'), tok.encode('a dog'))


def test_errors(files, tmp_path):
  for name, match in {
    'byte': "unknown tokenizer 'byte': did you mean 'bytes'",
    str(tmp_path / 'x.model'): 'does not exist',
    str(tmp_path / 'x.json'): 'does not exist',
    str(files / 'no_eos.model'): 'no end-of-sentence piece',
    str(files / 'no_end.json'): 'no end token: none of </s>',
  }.items():
    with pytest.raises(ValueError, match=match):
      tokenizer_lib.tokenizer(name)
  (tmp_path / 'bad.model').write_text('not a model')
  with pytest.raises(ValueError, match='not a SentencePiece model'):
    tokenizer_lib.tokenizer(str(tmp_path / 'bad.model'))
  (tmp_path / 'bad.json').write_text('{')
  with pytest.raises(ValueError, match='not a JSON file'):
    tokenizer_lib.tokenizer(str(tmp_path / 'bad.json'))
  (tmp_path / 'config.json').write_text(json.dumps({'hidden_size': 8}))
  with pytest.raises(ValueError, match=r'tokenizer\.json'):
    tokenizer_lib.tokenizer(str(tmp_path / 'config.json'))
