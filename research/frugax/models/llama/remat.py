"""What the backward pass of a layer finds in memory, by name."""

import jax

from frugax.models.llama import linears

_policies = jax.checkpoint_policies

# Of `jax.checkpoint` around a layer; the other names in `config.REMAT` have
# none.
POLICIES = {
  'full': _policies.nothing_saveable,
  'dots': _policies.checkpoint_dots,
  'dots_no_batch': _policies.checkpoint_dots_with_no_batch_dims,
  'linears': _policies.save_only_these_names(linears.SAVED),
  'offload': _policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[linears.SAVED],
    offload_src='device',
    offload_dst='pinned_host',
  ),
}
