"""One PyTorch optimizer, stepped on request: what bench_peers.py times.

Runs in an environment of its own. Reads a line of JSON with the optimizer and
the shapes of its tensors, does a first step and answers with a line of JSON:
`versions`, and `error`, why the optimizer does not run, or `compiled`, how many
graphs of its step are; `eager`, why it only runs without that; the `bytes` of
its state and its `losses` on peers_problem.py. Then answers each further line
with the seconds that one step took.
"""

import functools
import importlib
import importlib.metadata
import json
import sys
import time

import peers_problem
import torch
from torch._dynamo.utils import counters


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
  said = {'versions': {}}
  try:
    for name in ('torch', job['package'].split('.')[0]):
      said['versions'][name] = importlib.metadata.version(name)
    package = importlib.import_module(job['package'])
    make = functools.partial(
      getattr(package, job['name']), lr=job['rate'], **job['arguments']
    )
    optimizer = make(groups)
    said['eager'] = first_step(optimizer)
    said['compiled'] = counters['stats']['unique_graphs']
    said['bytes'] = sum(
      x.numel() * x.element_size() for x in held(optimizer.state).values()
    )
    said['losses'] = losses(lambda own: make([{'params': own, **job['small']}]))
  except Exception as error:
    print(json.dumps(said | {'error': in_a_line(error)}), flush=True)
    return
  print(json.dumps(said), flush=True)
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
    counters.clear()
    optimizer.step()
    return in_a_line(error)
  return None


def held(x):
  """All tensors below an object, by their place in memory."""
  if isinstance(x, torch.Tensor):
    inner = [getattr(x, n, None) for n in getattr(x, 'tensor_attrs', ())]
    # A tensor of another package is a wrapper of what it names.
    return held(inner) if inner else {x.data_ptr(): x}
  if isinstance(x, dict):
    x = list(x.values())
  elif not isinstance(x, (list, tuple)):
    x = list(getattr(x, '__dict__', {}).values())
  return {at: tensor for item in x for at, tensor in held(item).items()}


def losses(make):
  """Of the problem, every so many steps and at last."""
  problem = peers_problem.regressions()
  weights = [torch.nn.Parameter(torch.tensor(r.weight)) for r in problem]
  data = [(torch.tensor(r.inputs), torch.tensor(r.labels)) for r in problem]
  optimizer = make(weights)
  found = []
  for step in range(peers_problem.STEPS + 1):
    optimizer.zero_grad()
    loss = sum(
      ((x @ w.T - y) ** 2).mean()
      for w, (x, y) in zip(weights, data, strict=True)
    )
    if step % peers_problem.EVERY == 0:
      found.append(loss.item())
    loss.backward()
    optimizer.step()
  return found


def in_a_line(error):
  first, *_ = str(error).strip().splitlines() or ['']
  return f'{type(error).__name__}: {first}'


if __name__ == '__main__':
  main()
