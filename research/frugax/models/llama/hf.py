"""LLaMA folders of Hugging Face: config.json and safetensors, both ways.

Everything streams. Reading, each device takes the rows and columns of its own
shard out of the memory-mapped files; writing, one tensor at a time leaves the
devices.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import struct
import uuid

import jax
import jax.numpy as jnp
import numpy as np

from frugax import lowbit, names
from frugax.models.llama import hf_layout as layout
from frugax.models.llama import model
from frugax.models.llama.config import LlamaConfig

_INDEX = 'model.safetensors.index.json'
_SINGLE = 'model.safetensors'


def read_config(path: str | os.PathLike, **overrides) -> LlamaConfig:
  """The configuration of a Hugging Face LLaMA folder, without its weights.

  Enough to build the model, and from its `axes` the shardings for `from_hf`.

  Args:
    path: a folder with a `config.json`.
    **overrides: fields of `LlamaConfig` to set otherwise.

  Returns:
    A `LlamaConfig`.

  Raises:
    ValueError: no such folder, or a model that `Llama` cannot represent.
  """
  file = pathlib.Path(path) / 'config.json'
  if not file.is_file():
    raise ValueError(f'{file} does not exist: not a Hugging Face folder.')
  fields = layout.fields_from_json(file, json.loads(file.read_text()))
  valid = [field.name for field in dataclasses.fields(LlamaConfig)]
  for name in overrides:
    if name not in valid:
      raise names.unknown('LLaMA field', name, valid)
  return LlamaConfig(**(fields | overrides))


def from_hf(
  path: str | os.PathLike, *, shardings=None, **overrides
) -> tuple[LlamaConfig, model.Params]:
  """Reads a Hugging Face LLaMA folder into our parameters.

  Streams: beyond the result, host memory holds about one parameter (a stack of
  layers), and with `shardings` only one device's part of it. Kernels are
  transposed from (out, in) to (in, out) and layers stacked on the way.

  Args:
    path: a folder with `config.json` and `model.safetensors`, or its shards
      `model-0000i-of-0000n.safetensors` with their index; float32, bfloat16 or
      float16.
    shardings: a tree of `jax.sharding.Sharding` with the structure of
      `Llama.init`; each device gets its own part alone. `read_config` tells the
      model beforehand. None: the default device holds everything.
    **overrides: fields of `LlamaConfig`. `param_dtype` converts the parameters;
      without it they keep the dtype of the files. `dtype` is, as ever, the
      computation's.

  Returns:
    The configuration and the parameters.

  Raises:
    ValueError: the folder, one of its files or a tensor is missing, a tensor
      has another shape or dtype than it should, the model is not one that
      `Llama` can represent, or the weights are pickles.

  Examples:
    >>> import tempfile
    >>> from frugax.models import llama
    >>> config = llama.config('tiny', n_layers=2)
    >>> params = llama.Llama(config).init(jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   llama.to_hf(f'{folder}/model', config, params)
    ...   read, copy = llama.from_hf(f'{folder}/model')
    >>> read == config
    True
    >>> bool((copy['lm_head']['kernel'] == params['lm_head']['kernel']).all())
    True

  References:
    Hugging Face, safetensors, https://github.com/huggingface/safetensors, 2022.
  """
  path = pathlib.Path(path)
  config = read_config(path, **overrides)
  with contextlib.ExitStack() as stack:
    tensors = _open(path, stack)
    if 'param_dtype' not in overrides:
      dtype = _common_dtype(path, tensors)
      config = dataclasses.replace(config, param_dtype=dtype)
    shapes = model.shapes(config)
    leaves = layout.flat(shapes)
    _check_tensors(path, config, tensors, leaves)
    if shardings is None:
      here = jnp.zeros(()).sharding
      shardings = jax.tree.map(lambda _: here, shapes)
    shardings = layout.flat(shardings)
    if shardings.keys() != leaves.keys():
      wrong = sorted(shardings.keys() ^ leaves.keys())
      raise ValueError(
        'shardings must have the structure of the parameters; they differ at '
        f'{", ".join(wrong)}.'
      )
    arrays = [
      jax.make_array_from_callback(
        leaf.shape,
        shardings[name],
        functools.partial(_read, tensors, layout.ENTRIES[name], leaf),
      )
      for name, leaf in leaves.items()
    ]
  return config, jax.tree.unflatten(jax.tree.structure(shapes), arrays)


def _open(path, stack) -> dict:
  """All tensors of a folder by name, as slices that read nothing yet."""
  # Here, as models train on machines that have jax and flax alone.
  import safetensors

  if (path / _INDEX).is_file():
    index = json.loads((path / _INDEX).read_text())
    files = sorted(set(index['weight_map'].values()))
  elif (path / _SINGLE).is_file():
    files = [_SINGLE]
  elif any(path.glob('*.bin')):
    raise ValueError(
      f'{path} holds its weights as .bin pickles, which run code when read: '
      'convert them with transformers (from_pretrained, then save_pretrained).'
    )
  else:
    raise ValueError(f'{path} has neither {_SINGLE} nor {_INDEX}.')
  tensors = {}
  for file in files:
    if not (path / file).is_file():
      raise ValueError(f'{path / file} is missing, but {_INDEX} names it.')
    try:
      reader = safetensors.safe_open(path / file, framework='numpy')
    except safetensors.SafetensorError as error:
      raise ValueError(f'{path / file} is damaged: {error}.') from error
    stack.enter_context(reader)
    for name in reader.keys():  # noqa: SIM118, it is not iterable itself
      # Constants that older files keep, in a dtype of their own.
      if not name.endswith('rotary_emb.inv_freq'):
        tensors[name] = reader.get_slice(name)
  if not tensors:
    raise ValueError(f'{path} holds no tensors.')
  return tensors


def _common_dtype(path, tensors) -> str:
  found = sorted({tensor.get_dtype() for tensor in tensors.values()})
  if len(found) > 1:
    raise ValueError(
      f'{path} holds several dtypes ({", ".join(found)}): say which one the '
      "parameters shall have, as in param_dtype='float32'."
    )
  _check_dtype(path, 'every tensor', found[0])
  return layout.DTYPES[found[0]]


def _check_dtype(path, name, dtype):
  if dtype not in layout.DTYPES:
    valid = ', '.join(layout.DTYPES)
    raise ValueError(f'{path}: {name} is {dtype}; valid are {valid}.')


def _check_tensors(path, config, tensors, leaves):
  expected = {
    name: layout.ENTRIES[key].stored(leaf.shape)
    for key, leaf in leaves.items()
    for name in layout.ENTRIES[key].tensors(leaf.shape)
  }
  for name, shape in expected.items():
    if name not in tensors:
      raise ValueError(f'{path} has no tensor {name}.')
    found = tuple(tensors[name].get_shape())
    if found != shape:
      raise ValueError(
        f'{path}: {name} has shape {found}; by config.json it is {shape}.'
      )
    _check_dtype(path, name, tensors[name].get_dtype())
  # Some files keep a tied head a second time.
  known = {'lm_head.weight'} if config.tie_embeddings else set()
  strange = sorted(tensors.keys() - expected.keys() - known)
  if strange:
    raise ValueError(
      f'{path} has {len(strange)} tensors that are not in the model of its '
      f'config.json, such as {strange[0]}.'
    )


def _read(tensors, entry, leaf, index) -> np.ndarray:
  """The part of a parameter that one device needs."""
  if not entry.stacked:
    part = _read_layer(tensors[entry.name], entry, leaf.shape, index)
    return part.astype(leaf.dtype, copy=False)
  part_shape = [
    len(range(*one.indices(size)))
    for one, size in zip(index, leaf.shape, strict=True)
  ]
  part = np.empty(part_shape, leaf.dtype)
  for row, layer in enumerate(range(*index[0].indices(leaf.shape[0]))):
    tensor = tensors[entry.name.format(layer)]
    part[row] = _read_layer(tensor, entry, leaf.shape[1:], index[1:])
  return part


def _read_layer(tensor, entry, shape, index) -> np.ndarray:
  n = entry.n_in
  if not n:
    return tensor[index]
  rows, row_axes, row_index = _span(shape[n:], index[n:])
  columns, column_axes, column_index = _span(shape[:n], index[:n])
  matrix = tensor[rows, columns].T
  return matrix.reshape(column_axes + row_axes)[column_index + row_index]


def _span(shape, index):
  """One slice of a matrix axis that covers an index into its parts.

  Args:
    shape: the axes that the matrix axis is made of, outermost first.
    index: a slice for each.

  Returns:
    The slice, the axes of what it reads, and the index into those.
  """
  start, stop, _ = index[0].indices(shape[0])
  inner = math.prod(shape[1:])
  axes = (stop - start, *shape[1:])
  return slice(start * inner, stop * inner), axes, (slice(None), *index[1:])


def to_hf(
  path: str | os.PathLike,
  config: LlamaConfig,
  params: model.Params,
  *,
  max_shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes parameters as a folder that Hugging Face's LLaMA loads.

  The folder is written under a temporary name beside `path` and renamed when
  complete: a crash leaves nothing at `path`. Values and dtype are kept, so
  `from_hf` returns them bit for bit. Tokenizer files are the caller's to add.

  Args:
    path: the folder to make; it must not exist, or be empty.
    config: the model.
    params: as from `Llama.init`, sharded or not, in `config.param_dtype`; every
      shard must be addressable from this process. Weights that are stored in
      few bits are written as arrays.
    max_shard_bytes: the tensors of one file take at most this much; a tensor
      larger than that gets a file of its own.

  Raises:
    ValueError: the folder holds something, the parameters have not the
      structure, shapes or dtype of the model, or are spread over several
      processes.
  """
  path = pathlib.Path(path)
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise ValueError(f'{path} exists and is not empty: choose another folder.')
  leaves = layout.flat(lowbit.load_weights(params))
  _check_params(layout.flat(model.shapes(config)), leaves)
  files = _plan(leaves, max_shard_bytes)
  path.parent.mkdir(parents=True, exist_ok=True)
  # Beside the target: a rename is atomic on one file system only.
  partial = path.with_name(f'.{path.name}.{uuid.uuid4().hex}')
  partial.mkdir()
  try:
    for file, tensors in files.items():
      _write(partial / file, tensors, leaves)
    if len(files) > 1:
      _write_json(partial / _INDEX, _index(files, leaves))
    _write_json(partial / 'config.json', layout.config_to_json(config))
    partial.rename(path)
  except BaseException:
    shutil.rmtree(partial)
    raise


def _check_params(shapes, leaves):
  if shapes.keys() != leaves.keys():
    wrong = sorted(shapes.keys() ^ leaves.keys())
    raise ValueError(
      f'the parameters are not those of the config; they differ at '
      f'{", ".join(wrong)}.'
    )
  for name, leaf in leaves.items():
    want = shapes[name]
    if (leaf.shape, leaf.dtype) != (want.shape, want.dtype):
      raise ValueError(
        f'{name} is {leaf.dtype}{list(leaf.shape)}, but the config makes it '
        f'{want.dtype}{list(want.shape)}.'
      )
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      raise ValueError(
        f'{name} is spread over several processes: gather it first, or save a '
        'checkpoint and convert that in one process.'
      )


def _plan(leaves, max_shard_bytes) -> dict:
  """Which tensors go to which file: {file: [(tensor, parameter, layer)]}."""
  groups, room = [], 0
  for key, leaf in leaves.items():
    entry = layout.ENTRIES[key]
    size = _bytes(entry, leaf)
    for layer, name in enumerate(entry.tensors(leaf.shape)):
      if not groups or size > room:
        groups.append([])
        room = max_shard_bytes
      groups[-1].append((name, key, layer))
      room -= size
  if len(groups) == 1:
    return {_SINGLE: groups[0]}
  n = len(groups)
  return {
    f'model-{i:05d}-of-{n:05d}.safetensors': group
    for i, group in enumerate(groups, 1)
  }


def _bytes(entry, leaf) -> int:
  return math.prod(entry.stored(leaf.shape)) * leaf.dtype.itemsize


def _index(files, leaves) -> dict:
  total = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves.values())
  return {
    'metadata': {'total_size': total},
    'weight_map': {
      name: file for file, tensors in files.items() for name, _, _ in tensors
    },
  }


def _write(file, tensors, leaves):
  """A safetensors file: length of the header, header, then the bytes.

  Written by hand as the library's writer wants all tensors of a file at once.
  """
  codes = {dtype: code for code, dtype in layout.DTYPES.items()}
  header, end = {'__metadata__': {'format': 'pt'}}, 0
  for name, key, _ in tensors:
    entry, leaf = layout.ENTRIES[key], leaves[key]
    start, end = end, end + _bytes(entry, leaf)
    header[name] = {
      'dtype': codes[leaf.dtype.name],
      'shape': entry.stored(leaf.shape),
      'data_offsets': [start, end],
    }
  encoded = json.dumps(header).encode()
  encoded += b' ' * (-len(encoded) % 8)  # aligns the data
  with open(file, 'wb') as f:
    f.write(struct.pack('<Q', len(encoded)) + encoded)
    for _, key, layer in tensors:
      entry, leaf = layout.ENTRIES[key], leaves[key]
      array = _layer(leaf, layer) if entry.stacked else np.asarray(leaf)
      if entry.n_in:
        out_in = entry.stored(leaf.shape)
        array = array.reshape(out_in[::-1]).T
      # As bytes: numpy's buffers do not know bfloat16.
      f.write(np.ascontiguousarray(array).view(np.uint8))
    os.fsync(f.fileno())


def _layer(leaf, layer) -> np.ndarray:
  """One layer of a stack, on the host."""
  if not isinstance(leaf, jax.Array):
    return np.asarray(leaf[layer])
  # Shard by shard: indexing a sharded array would gather on the devices, and
  # on a mesh with explicit axes it is not defined.
  array = np.empty(leaf.shape[1:], leaf.dtype)
  for shard in leaf.addressable_shards:
    layers = range(*shard.index[0].indices(leaf.shape[0]))
    if shard.replica_id == 0 and layer in layers:
      array[shard.index[1:]] = shard.data[layers.index(layer)]
  return array


def _write_json(file, value):
  file.write_text(json.dumps(value, indent=2) + '\n')
