"""Eight virtual CPU devices for every test, and compilations that are kept."""

import os
import pathlib
import platform
import sys

import pytest

# Each sets the environment of a process of its own. pytest, which looks for
# doctests, would import them into this one.
collect_ignore = ['kernels/gpu.py', 'kernels/tpu.py', 'kernels/tpu_rounded.py']

os.environ['JAX_PLATFORMS'] = 'cpu'
_DEVICES = '--xla_force_host_platform_device_count=8'
if _DEVICES not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_DEVICES}'
# A CPU device waits for the others on a thread of one pool, which has a thread
# for each device. A step has collectives that wait for nothing but the batch:
# with eight of these at once the one that all need finds no thread.
os.environ.setdefault('PJRT_NPROC', '32')
_CACHE = pathlib.Path(__file__).parents[1] / '.cache' / 'jax'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHE))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')


def pytest_runtest_setup(item):
  """Leaves out what no package exists for; where one does it must be there."""
  here = sys.platform, platform.machine()
  if item.get_closest_marker('libtpu') and here != ('linux', 'x86_64'):
    pytest.skip('libtpu exists for Linux on x86-64 alone')
