"""The environment of the TPU's compiler, on machines that have no TPU.

A module without JAX, so that a script can set the variables before it imports
what may load a driver:

  import os
  from frugax.plan import environment
  os.environ |= environment.TPU
"""

# libtpu is asked for a chip it does not have, and to write no logs, which
# unchecked have filled disks. JAX itself computes on the CPU.
TPU = {
  'JAX_PLATFORMS': 'cpu',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  # Else one process at a time holds a lock file.
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_LOG_DIR': 'disabled',
  'TPU_MIN_LOG_LEVEL': '3',
  'TPU_STDERR_LOG_LEVEL': '3',
}

# A GPU that is not there: nothing to time alternatives on.
GPU = {'JAX_PLATFORMS': 'cpu', 'TF_CPP_MIN_LOG_LEVEL': '2'}
GPU_FLAGS = '--xla_gpu_autotune_level=0'
