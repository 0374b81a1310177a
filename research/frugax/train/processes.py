"""Several processes, one program: joining them."""

import os
from collections.abc import Mapping

import jax

# What a launcher sets for each process of several: the number of processes.
_COUNTS = ('JAX_NUM_PROCESSES', 'SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')


def several(environ: Mapping[str, str] = os.environ) -> bool:
  """Whether the environment is that of one process among several.

  Slurm's srun, Open MPI and TPU pods are recognised by what they set; by hand
  set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

  Examples:
    >>> several({}), several({'SLURM_STEP_NUM_TASKS': '4'})
    (False, True)
    >>> several({'TPU_WORKER_HOSTNAMES': 'localhost'})
    False
  """
  if ',' in environ.get('TPU_WORKER_HOSTNAMES', ''):
    return True
  return any(int(environ.get(name) or 1) > 1 for name in _COUNTS)


def join() -> None:
  """Joins the other processes, if there are any; before JAX is used.

  Without it each process would train a run of its own in the same folder.
  """
  if not several():
    return
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  by_hand = {}
  if 'JAX_PROCESS_ID' in os.environ:
    by_hand['num_processes'] = int(os.environ['JAX_NUM_PROCESSES'])
    by_hand['process_id'] = int(os.environ['JAX_PROCESS_ID'])
  jax.distributed.initialize(**by_hand)
