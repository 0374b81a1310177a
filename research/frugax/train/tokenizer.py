"""Text to token ids and back: bytes, SentencePiece or Hugging Face files."""

import json
import os
from collections.abc import Iterable

import numpy as np

from frugax import names

_SPECIALS = 3  # pad, bos and eos come before the 256 bytes

# Hugging Face files do not say which token plays which part; these names do.
_PAD = ('<pad>', '[PAD]', '<|pad|>', '<|padding|>', '<|finetune_right_pad_id|>')
_BOS = ('<s>', '<bos>', '[BOS]', '<|begin_of_text|>', '<|startoftext|>')
_EOS = ('</s>', '<eos>', '[EOS]', '<|end_of_text|>', '<|endoftext|>')


class Tokenizer:
  """What the data pipeline asks of a tokenizer; `tokenizer(spec)` makes one.

  Attributes:
    name: the spec it was made from: 'bytes' or the path of its file.
    vocab_size: ids are in [0, vocab_size).
    pad_id: fills what is masked; the end token where the file has no pad.
    bos_id: begins a document; None where the file has none (T5).
    eos_id: ends a document.
  """

  def __init__(
    self, name: str, vocab_size: int, pad_id: int, bos_id: int | None,
    eos_id: int,
  ):  # fmt: skip
    self.name = name
    self.vocab_size = vocab_size
    self.pad_id = pad_id
    self.bos_id = bos_id
    self.eos_id = eos_id

  def __repr__(self) -> str:
    return f'tokenizer({self.name!r})'

  # Data workers are given the spec and read the file themselves.
  def __reduce__(self):
    return tokenizer, (self.name,)

  def encode(self, text: str | bytes) -> np.ndarray:
    """The int32 ids of `text`, no bos or eos added."""
    raise NotImplementedError

  def decode(self, ids: Iterable[int]) -> str:
    """The text of `ids`; pad, bos and eos stand for nothing."""
    raise NotImplementedError

  def bytes_per_id(self) -> np.ndarray:
    """The UTF-8 bytes that each id stands for, int32[vocab_size].

    Bits per byte of a model are sum(loss) / log(2) / sum(bytes_per_id[labels]),
    sums over the counted labels. The count is exact for bytes; SentencePiece
    adds a space before each document, and unknown tokens count as nothing.
    """
    raise NotImplementedError


class _Bytes(Tokenizer):
  """Byte b is id b + 3; every string has an encoding."""

  def __init__(self):
    super().__init__('bytes', 256 + _SPECIALS, pad_id=0, bos_id=1, eos_id=2)

  def encode(self, text: str | bytes) -> np.ndarray:
    # Bytes from disk pass as they are. A lone surrogate is legal in a str and
    # has no UTF-8; 'surrogatepass' keeps it as the three bytes it would have.
    raw = text if isinstance(text, bytes) else _to_bytes(text)
    return np.frombuffer(raw, np.uint8).astype(np.int32) + _SPECIALS

  def decode(self, ids: Iterable[int]) -> str:
    ids = np.asarray(ids, np.int64)
    raw = (ids[ids >= _SPECIALS] - _SPECIALS).astype(np.uint8).tobytes()
    try:
      return raw.decode('utf-8', 'surrogatepass')
    except UnicodeDecodeError:  # what a model samples need not be UTF-8
      return raw.decode('utf-8', 'replace')

  def bytes_per_id(self) -> np.ndarray:
    return (np.arange(self.vocab_size) >= _SPECIALS).astype(np.int32)


class _SentencePiece(Tokenizer):
  """A SentencePiece model file."""

  def __init__(self, path: str):
    import sentencepiece

    try:
      self._model = sentencepiece.SentencePieceProcessor(model_file=path)
    except RuntimeError as e:
      raise ValueError(f'{path!r} is not a SentencePiece model: {e}') from e
    pad, bos, eos = (
      None if id < 0 else id
      for id in (
        self._model.pad_id(), self._model.bos_id(), self._model.eos_id()
      )
    )  # fmt: skip
    if eos is None:
      raise ValueError(
        f'{path!r} has no end-of-sentence piece: train it with eos_id >= 0'
      )
    pad = eos if pad is None else pad
    super().__init__(path, self._model.get_piece_size(), pad, bos, eos)

  def encode(self, text: str | bytes) -> np.ndarray:
    return np.asarray(self._model.encode(_to_str(text)), np.int32)

  def decode(self, ids: Iterable[int]) -> str:
    return self._model.decode([int(i) for i in ids])

  def bytes_per_id(self) -> np.ndarray:
    sp = self._model

    def size(i: int) -> int:
      if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
        return 0
      return 1 if sp.is_byte(i) else _surface_bytes(sp.id_to_piece(i))

    return np.array([size(i) for i in range(self.vocab_size)], np.int32)


class _HuggingFace(Tokenizer):
  """A `tokenizer.json` of the Hugging Face `tokenizers` package."""

  def __init__(self, path: str):
    import tokenizers

    with open(path, encoding='utf-8') as f:
      text = f.read()
    try:
      self._json = json.loads(text)
    except json.JSONDecodeError as e:
      raise ValueError(f'{path!r} is not a JSON file: {e}') from e
    if not isinstance(self._json, dict) or 'model' not in self._json:
      raise ValueError(
        f"{path!r} is not a file of the 'tokenizers' package: it has no "
        "'model'; the file to name is usually called tokenizer.json"
      )
    self._model = tokenizers.Tokenizer.from_str(text)
    # A file may carry the truncation of the task it was saved for, and would
    # read '</s>' inside a document as its end.
    self._model.no_truncation()
    self._model.no_padding()
    self._model.encode_special_tokens = True
    pad, bos, eos = map(self._find, (_PAD, _BOS, _EOS))
    if eos is None:
      raise ValueError(
        f'{path!r} has no end token: none of {", ".join(_EOS)} is in its '
        'vocabulary'
      )
    pad = eos if pad is None else pad
    size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
    super().__init__(path, size, pad, bos, eos)

  def _find(self, candidates: tuple[str, ...]) -> int | None:
    ids = (self._model.token_to_id(name) for name in candidates)
    return next((id for id in ids if id is not None), None)

  def encode(self, text: str | bytes) -> np.ndarray:
    encoding = self._model.encode(_to_str(text), add_special_tokens=False)
    return np.asarray(encoding.ids, np.int32)

  def decode(self, ids: Iterable[int]) -> str:
    return self._model.decode([int(i) for i in ids])

  def bytes_per_id(self) -> np.ndarray:
    # Byte-level vocabularies (GPT-2's) write each byte as one character.
    byte_level = any(
      '"ByteLevel"' in json.dumps(self._json.get(part))
      for part in ('decoder', 'pre_tokenizer')
    )
    added = self._model.get_added_tokens_decoder()
    sizes = np.zeros(self.vocab_size, np.int32)
    for token, i in self._model.get_vocab(with_added_tokens=True).items():
      if i in added:
        sizes[i] = 0 if added[i].special else len(_to_bytes(token))
      else:
        sizes[i] = len(token) if byte_level else _surface_bytes(token)
    return sizes


def tokenizer(spec: str) -> Tokenizer:
  """The tokenizer that `spec` names.

  'bytes' needs no file: id 0 pads, 1 begins and 2 ends a document, and byte b
  is id b + 3, so that every text of every language has an encoding and bits
  per byte are exact.

  Args:
    spec: 'bytes', the path of a SentencePiece model (*.model) or of a Hugging
      Face `tokenizers` file (*.json).

  Returns:
    A `Tokenizer`.

  Raises:
    ValueError: no such tokenizer, no such file, or a file of another kind.

  Examples:
    >>> tok = tokenizer('bytes')
    >>> tok.encode('hé')
    array([107, 198, 172], dtype=int32)
    >>> tok.decode([tok.bos_id, 107, 198, 172, tok.eos_id])
    'hé'
    >>> int(tok.bytes_per_id()[tok.encode('hé')].sum())
    3

  References:
    Kudo and Richardson, SentencePiece, https://arxiv.org/abs/1808.06226 (2018);
    Xue et al., ByT5, https://arxiv.org/abs/2105.13626 (2021), for the byte ids.
  """
  spec = os.fspath(spec)
  if spec == 'bytes':
    return _Bytes()
  kinds = {'.model': _SentencePiece, '.json': _HuggingFace}
  kind = kinds.get(os.path.splitext(spec)[1])
  if kind is None:
    raise names.unknown('tokenizer', spec, ('bytes', 'PATH.model', 'PATH.json'))
  if not os.path.isfile(spec):
    raise ValueError(
      f'tokenizer file {spec!r} does not exist (looked in {os.getcwd()!r}); '
      "give its path, or 'bytes' for the built-in one"
    )
  return kind(spec)


def _to_bytes(text: str) -> bytes:
  return text.encode('utf-8', 'surrogatepass')


def _to_str(text: str | bytes) -> str:
  # The C++ and Rust tokenizers take valid UTF-8 only.
  raw = text if isinstance(text, bytes) else _to_bytes(text)
  return raw.decode('utf-8', 'replace')


def _surface_bytes(piece: str) -> int:
  """Bytes of a piece of SentencePiece's, or another word-piece, alphabet."""
  if len(piece) == 6 and piece.startswith('<0x') and piece.endswith('>'):
    return 1
  return len(_to_bytes(piece.replace('▁', ' ').removeprefix('##')))
