"""The names of the axes of every parameter of a LLaMA."""


def axes(config) -> dict:
  """See `Llama.axes`."""

  def kernel(*names):
    return {'kernel': ('layers', *names)}

  out = {
    'embed': {'embedding': ('vocab', 'embed')},
    'layers': {
      'attn_norm': {'scale': ('layers', 'norm')},
      'attn': {
        'q': kernel('embed', 'heads', 'head_dim'),
        'k': kernel('embed', 'kv_heads', 'head_dim'),
        'v': kernel('embed', 'kv_heads', 'head_dim'),
        'o': kernel('heads', 'head_dim', 'embed'),
      },
      'mlp_norm': {'scale': ('layers', 'norm')},
      'mlp': {
        'gate': kernel('embed', 'mlp'),
        'up': kernel('embed', 'mlp'),
        'down': kernel('mlp', 'embed'),
      },
    },
    'final_norm': {'scale': ('norm',)},
  }
  if not config.tie_embeddings:
    out['lm_head'] = {'kernel': ('embed', 'vocab')}
  return out


def of_linear(config, path: str) -> tuple[str, ...]:
  """The names of the axes of one linear's weights, 'attn/q' or 'lm_head'."""
  tree = axes(config)
  if path == 'lm_head':
    if config.tie_embeddings:
      return tree['embed']['embedding']
    return tree['lm_head']['kernel']
  module, name = path.split('/')
  return tree['layers'][module][name]['kernel'][1:]
