"""One PyTorch optimizer, stepped on request: what bench_peers.py times.

Runs in an environment of its own. Reads a line of JSON with the optimizer and
the shapes of its tensors, does a first step and answers with a line of JSON:
why the optimizer does not run, or why it runs without being compiled, or
nothing. Then answers each further line with the seconds that one step took.
"""

import importlib
import json
import sys
import time

import torch


def main():
  job = json.loads(sys.stdin.readline())
  torch.set_num_threads(job['threads'])
  torch.manual_seed(0)

  def tensors(shapes):
    made = [torch.nn.Parameter(0.02 * torch.randn(s)) for s in shapes]
    for p in made:
      p.grad = 1e-3 * torch.randn_like(p)
    return made

  groups = [
    {'params': tensors(job['matrices']), **job['group']},
    {'params': tensors(job['others'])},
  ]
  try:
    package = importlib.import_module(job['package'])
    optimizer = getattr(package, job['name'])(
      groups, lr=1e-2, **job['arguments']
    )
    eager = first_step(optimizer)
  except Exception as error:
    print(json.dumps({'error': in_a_line(error)}), flush=True)
    return
  print(json.dumps({'eager': eager}), flush=True)
  for _ in sys.stdin:
    start = time.perf_counter()
    optimizer.step()
    print(time.perf_counter() - start, flush=True)


def first_step(optimizer):
  """Steps once; says why without compilation, if it only runs so."""
  try:
    optimizer.step()
  except Exception as error:
    # Some compile their step, for which there may be no C++ compiler.
    torch.compiler.set_stance('force_eager')
    optimizer.step()
    return in_a_line(error)
  return None


def in_a_line(error):
  first, *_ = str(error).strip().splitlines() or ['']
  return f'{type(error).__name__}: {first}'


if __name__ == '__main__':
  main()
