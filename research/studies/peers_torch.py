"""One PyTorch optimizer, stepped on request: what bench_peers.py times.

Runs in an environment of its own. Reads a line of JSON with the optimizer and
the shapes of its tensors, then answers each further line with the seconds that
one step took.
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
  package = importlib.import_module(job['package'])
  optimizer = getattr(package, job['name'])(groups, lr=1e-2, **job['arguments'])
  for _ in sys.stdin:
    start = time.perf_counter()
    optimizer.step()
    print(time.perf_counter() - start, flush=True)


if __name__ == '__main__':
  main()
