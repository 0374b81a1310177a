"""What share of a TPU's memory bandwidth `hadamard_quantize` can use: a table.

  python research/studies/bench_hadamard.py [--chips v5e,v6e] [--size 4096]

Static estimates: no TPU is there, and no time is measured. The compiler's
schedule gives the cycles of the kernel if memory never lets it wait; bytes over
the nominal bandwidth give those that memory needs. What is slower of both is
the estimate, and the share is that of memory in it. Needs libtpu, whose profile
aborts on some kernels that compile without it.
"""

import argparse
import json
import subprocess
import sys

import static_cycles  # before jax

# isort: split

import jax
import jax.numpy as jnp

from frugax.kernels import Copy, hadamard_quantize
from frugax.quant import Scaling

# Bytes a second, nominal, for one core.
BANDWIDTH = {
  'v5e': 819e9,
  'v5p': 2765e9 / 2,
  'v6e': 1640e9,
  'tpu7x': 7380e9 / 2,
}
QUEST = Scaling(statistic='rms', factor=2.51393, eps=1e-8)
CASES = {
  'int8, not rotated': (Copy(along='none'), None),
  'int8': (Copy(), None),
  'int8, stochastic': (Copy(stochastic=True), None),
  'int4': (Copy('int4'), None),
  'QuEST, 4 bits, trust mask': (
    Copy('rise4', scaling=QUEST, mask='trust', sums=True),
    None,
  ),
  'fp8_e4m3': (Copy('fp8_e4m3'), None),
  'int8 by columns': (None, Copy()),
  'int8 by rows and by columns': (Copy(), Copy()),
}


def estimate(chip, name, size):
  """Cycles of the schedule and of memory, of one core."""
  rows, columns = CASES[name]

  def fn(x):
    return hadamard_quantize(x, rows, columns, key=jax.random.key(0))

  shape = (size, size)
  found = static_cycles.cycles(fn, chip, (shape, jnp.bfloat16))
  cycles = max(n for op, n in found.items() if 'hadamard' in op)
  nbytes = 2 * size * size
  for copy in (rows, columns):
    if copy:
      bits = jnp.iinfo(copy.dtype).bits if copy.element.dtype == 'int8' else 8
      nbytes += size * size * (bits + (copy.mask != 'none')) / 8
  memory = nbytes / BANDWIDTH[chip] * static_cycles.CLOCK_HZ[chip]
  return cycles, memory


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--chips', default=','.join(BANDWIDTH))
  parser.add_argument('--cases', default=None, help='separated by semicolons')
  parser.add_argument('--size', type=int, default=4096)
  parser.add_argument('--one', action='store_true', help=argparse.SUPPRESS)
  args = parser.parse_args()
  cases = args.cases.split(';') if args.cases else list(CASES)
  if args.one:
    print(json.dumps(estimate(args.chips, cases[0], args.size)))
    return
  print(f'static estimate, not measured; bfloat16 of {args.size} x {args.size}')
  print(f'{"":36}{"schedule":>10}{"memory":>10}{"share":>7}  (cycles)')
  for chip in args.chips.split(','):
    for case in cases:
      # The compiler ends the process on what it does not like.
      command = [sys.executable, __file__, '--one', f'--chips={chip}']
      command += [f'--cases={case}', f'--size={args.size}']
      done = subprocess.run(command, capture_output=True, text=True)
      label = f'{chip:6} {case}'
      if done.returncode:
        print(f'{label:36} the profile of the schedule aborts', flush=True)
        continue
      cycles, memory = json.loads(done.stdout.splitlines()[-1])
      share = memory / max(cycles, memory)
      print(f'{label:36}{cycles:10,}{memory:10,.0f}{share:7.0%}', flush=True)


if __name__ == '__main__':
  main()
