"""Pre-train a LLaMA: `configs/llama.py:size=60m,opt=galore,matmul=bf16`.

tiny (`make train`): byte-level, the Python standard library's own source.
  python -m frugax.train.corpus --data_dir=data
  python -m frugax.train --config=configs/llama.py --workdir=runs/tiny
  README.md shows what a run of it gives and how long that takes.

10m .. 7b: the GaLore papers' protocol on C4 (512 x 256 slots a step, cosine to
a tenth, no packing), from a prepared TFDS directory of C4 and a SentencePiece
or Hugging Face tokenizer file. Not run by us yet at these sizes; the published
perplexities are 34.06 / 25.08 / 18.80 / 15.56 (Adam) and 34.88 / 25.36 / 18.95
/ 15.64 (GaLore) for 60m / 130m / 350m / 1b (Zhao et al., arXiv 2403.03507).
  python -m frugax.train --workdir=runs/60m \
    --config=configs/llama.py:size=60m,opt=galore,data=c4 \
    --config.data.data_dir=DIR_OF_c4_en --config.data.tokenizer=spiece.model
"""

from ml_collections import ConfigDict

from frugax import config as fx_config

# size: steps, warm-up, GaLore's rank, batch size
_SCHEDULES = {
  'tiny': (1200, 60, 32, 8),
  '10m': (10_000, 1_000, 64, 512),
  '60m': (10_000, 1_000, 128, 512),
  '130m': (20_000, 2_000, 256, 512),
  '350m': (60_000, 6_000, 256, 512),
  '1b': (100_000, 10_000, 512, 512),
  '3b': (120_000, 12_000, 512, 512),
  '7b': (150_000, 15_000, 1024, 512),
  '13b': (150_000, 15_000, 1024, 512),
  '70b': (150_000, 15_000, 1024, 512),
}

# The arguments with which each optimizer starts; any other name gets a
# learning rate and what `--config.optimizer.ARGUMENT=VALUE` adds.
_OPTIMIZERS = {
  'adamw': {'learning_rate': 2e-3, 'b1': 0.9, 'b2': 0.95, 'weight_decay': 0.1},
  'galore': {
    'learning_rate': 1e-2,
    'rank': 128,
    'update_interval': 200,
    'scale': 0.25,
    'projector': 'sketch',  # the authors' svd gathers sharded gradients
    'weight_decay': 0.0,
  },
  'q_galore': {
    'learning_rate': 1e-2,
    'rank': 128,
    'update_interval': 200,
    'scale': 0.25,
    'projector': 'sketch',
  },
  'frugal': {'learning_rate': 1e-2},
  'adam_sn': {'learning_rate': 5e-2},
  'snsm': {'learning_rate': 5e-2, 'rank': 128, 'update_interval': 100},
}
# Methods whose authors compress the head like all linear layers.
_WITH_HEAD = ('adam_sn', 'adamw_sn', 'adagrad_sn', 'snsm')

# Low-bit recipes for the linears of the layers: see frugax.lowbit.recipe.
_LOW_BIT = (
  *('int8', 'int4', 'int16', 'fp8', 'fp8_block', 'coat', 'jetfire', 'w8'),
  *('mxfp8', 'mxfp4', 'mxfp4_nearest', 'nvfp4'),
  *('quest', 'quest_fp4', 'quest_fp4_sparse', 'b1.58', 'b1.58_median', 'trilm'),
  *(
    f'quest{n}{x}'
    for n in (1, 1.58, *range(2, 9))
    for x in ('', '_weights', '_plain')
  ),
  *(f'halo{n}{x}' for n in range(3) for x in ('', '_fp8', '_fp6')),
  *('stable_spam_int4', 'stable_spam_fp4', 'int4_sim', 'fp4_sim'),
  *(f'e{e}m{m}' for e in range(1, 8) for m in range(8 - e)),
  *(f'masked_e8m{m}' for m in range(7)),
  *(f'masked_e{e}m7' for e in range(4, 8)),
)


def get_config(arg=None):
  args = fx_config.arguments(
    arg, size='tiny', opt='galore', matmul='auto', data='stdlib'
  )
  for name, valid in (
    ('size', tuple(_SCHEDULES)),
    ('matmul', ('auto', 'f32', 'bf16', *_LOW_BIT)),
    ('data', ('stdlib', 'c4')),
  ):
    fx_config.check_choice(name, args[name], valid)
  tiny = args.size == 'tiny'
  steps, warmup, rank, batch_size = _SCHEDULES[args.size]
  # CPUs multiply float32 faster than bfloat16; accelerators the reverse.
  matmul = args.matmul
  if matmul == 'auto' or matmul in _LOW_BIT:
    matmul = 'f32' if tiny else 'bf16'

  c = ConfigDict()
  c.steps = steps
  c.seed = 0
  c.batch_size = batch_size  # sequences a step, over all devices
  c.accumulation = 1  # micro-batches that a step's gradient is summed over
  c.mesh = 'fsdp=-1'  # data, fsdp, tensor, context; -1: all that is left
  # ordinary, or layerwise: each layer is updated inside of the backward pass
  # and its gradient dropped.
  c.step = 'ordinary'
  # The memory of the optimizer's state: device, or pinned_host, the host's. The
  # layer-wise step fetches one layer's at a time, the ordinary one all, which
  # takes more of the device than to keep it there.
  c.opt_state = 'device'
  c.layerwise = ConfigDict()
  # What clip_norm bounds: global, by a second backward pass; or layer, the norm
  # of each layer's gradient.
  c.layerwise.clip = 'global'
  # The memory that keeps the inputs of the layers for each micro-batch: device,
  # or pinned_host, the host's.
  c.layerwise.inputs = 'device'
  c.clip_norm = 1.0  # global norm of the gradient; 0: no clipping
  c.z_loss = 0.0
  # Blocks of logits without a label and with no probability above this, say
  # 1e-4, add nothing to the gradient of the activations before the head, which
  # saves time on Hopper GPUs. 0: exact.
  c.filter_eps = 0.0
  c.compat_eval = False  # also log the published harness's N/(N+1) value
  # Leave out steps whose loss or gradient is not finite; the ordinary step also
  # those whose update is not.
  c.skip_nonfinite = False
  # Of weights in bfloat16 or int8: nearest, which loses small updates, or
  # stochastic.
  c.rounding = 'stochastic' if args.matmul == 'w8' else 'nearest'
  # The part of the steps that is taken in high precision before matmuls are
  # those of model.matmul: 0, a fraction, or optimal, which depends on the
  # tokens, the weights and their bits.
  c.matmul_switch = '0'

  c.model = ConfigDict()  # open: any field of LlamaConfig
  c.model.size = args.size
  c.model.dtype = {'f32': 'float32', 'bf16': 'bfloat16'}[matmul]
  c.model.param_dtype = 'float32'
  if args.matmul in _LOW_BIT:
    c.model.matmul = args.matmul
  c.model.remat = 'none' if args.size in ('tiny', '10m', '60m') else 'full'
  if args.data == 'stdlib':
    c.model.vocab_size = 320

  c.optimizer = ConfigDict(_OPTIMIZERS.get(args.opt, {'learning_rate': 1e-3}))
  c.optimizer.name = args.opt  # of frugax.optim, optax or optax.contrib
  if 'rank' in c.optimizer:
    c.optimizer.rank = rank
  if tiny and args.opt in ('galore', 'q_galore'):
    c.optimizer.learning_rate = 2e-2  # better than 1e-2 in a short comparison
  c.schedule = ConfigDict()  # open: any argument of the named schedule
  c.schedule.name = 'cosine'  # constant, linear, wsd, infinite, rewarm
  c.schedule.warmup_steps = warmup
  c.schedule.final_fraction = 0.1
  # Regular expressions over parameter paths such as layers/attn/q/kernel.
  c.projected = r'attn/|mlp/'  # matrices that low-rank methods compress
  if args.opt in _WITH_HEAD:
    c.projected += '|lm_head/'
  c.decayed = r'kernel|embedding'  # parameters that weight decay applies to
  # Groups of parameters with an optimizer of their own, e.g.
  # --config.groups.head.match=lm_head --config.groups.head.learning_rate=1e-3
  c.groups = ConfigDict()

  c.data = ConfigDict()
  c.data.name = {'stdlib': 'stdlib', 'c4': 'c4/en'}[
    args.data
  ]  # TFDS name or a directory
  c.data.data_dir = 'data'
  c.data.train_split = 'train'
  c.data.eval_split = 'validation'
  c.data.text_field = 'text'
  c.data.tokenizer = 'bytes'  # or a file: .model (SentencePiece), .json (HF)
  c.data.mode = 'packed' if args.data == 'stdlib' else 'c4_protocol'
  c.data.sequence_length = 256
  c.data.seed = 0
  c.data.shuffle_rows = 4096 if args.data == 'stdlib' else 0  # see DataConfig
  c.data.num_workers = 0  # processes that read and tokenize; 0: this one
  c.data.repeat = True  # go through the data again and again
  c.data.streams = 0  # of documents, that a batch is dealt from; 0: up to 16

  c.eval = ConfigDict()
  c.eval.every = 300 if tiny else 1000  # steps; 0: only at the end
  c.eval.tokens = 100_000 if tiny else 10_000_000
  c.eval.batch_size = batch_size

  c.checkpoint = ConfigDict()
  # Steps; a kill may cost two times as many, a signal to stop none.
  c.checkpoint.every = 300 if tiny else 1000
  c.checkpoint.keep = 2  # latest ones; the best is kept besides

  c.log = ConfigDict()
  c.log.every = 10
  # Steps between two measurements of what rounding does to the activations,
  # weights and gradients of every linear; 0: none.
  c.log.quantization = 0
  c.log.tensorboard = True
  c.log.wandb = ''  # a Weights & Biases project
  return c
