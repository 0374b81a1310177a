"""Loss at equal tokens against bytes of optimizer state: the picture.

    python research/studies/pareto.py research/studies/logs

WORKDIR has a benchmark.json, as the one that ships. Writes pareto.png there and
prints the points: of each method the final loss, mean over seeds that its
choice was not made by, and all bytes of its state, embedding and head included.
On the front lies what no other method beats in both. `frugal` is what
studies/search.py found, `ours` the combination that it began with.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from studies import harness, search, seeds
from studies.workloads import WORKLOADS


@dataclasses.dataclass(frozen=True)
class Point:
  """A method: its bytes, and its loss with half of the 95 % interval.

  Attributes:
    name: as tables have it.
    state_bytes: of all parameters.
    loss: the mean over seeds.
    half: of the interval.
    commits: of its trials, and of the runs that judge.
  """

  name: str
  state_bytes: int
  loss: float
  half: float
  commits: str = '-'


def points(bench: harness.Benchmark, workload: str) -> list[Point]:
  """Of every method whose runs are all there, and ended."""
  found = []
  for name in bench.methods:
    finals = bench.finals(workload, name)
    if finals.size and np.isfinite(finals).all():
      size = bench.study(workload, name, 0)[0].state_bytes
      commits = '/'.join(map(bench.commits, bench.ran(workload, name)))
      found.append(
        Point(search.label(name), size, *seeds.interval(finals), commits)
      )
  return found


def front(all_points: Sequence[Point]) -> list[Point]:
  """Those that no other beats in bytes and loss, by growing bytes.

  Examples:
    >>> a, b = Point('a', 10, 2.0, 0.0), Point('b', 20, 1.0, 0.0)
    >>> [p.name for p in front([b, Point('c', 20, 2.5, 0.0), a])]
    ['a', 'b']
  """
  found: list[Point] = []
  for point in sorted(all_points, key=lambda p: (p.state_bytes, p.loss)):
    if not found or point.loss < found[-1].loss:
      found.append(point)
  return found


def table(all_points: Sequence[Point]) -> str:
  """A row a method, by growing bytes; a star is on the front."""
  best = front(all_points)
  wide = max((len(p.name) for p in all_points), default=0) + 4
  lines = [f'{"":{wide}}{"state bytes":>12}{"loss":>9}{"+-":>8}    commits']
  for p in sorted(all_points, key=lambda p: p.state_bytes):
    lines.append(
      f'{p.name:{wide}}{p.state_bytes:12,}{p.loss:9.4f}{p.half:8.4f}'
      f' {"*" if p in best else " "}  {p.commits}'
    )
  return '\n'.join(lines)


def picture(path: pathlib.Path, all_points: Sequence[Point], title: str):
  """Draws them, the front as a line."""
  from matplotlib import figure

  fig = figure.Figure(figsize=(9, 6), dpi=130, layout='constrained')
  ax = fig.subplots()
  best = front(all_points)
  sizes = [p.state_bytes for p in all_points]
  middle = (min(sizes) * max(sizes)) ** 0.5
  ax.step(
    [p.state_bytes for p in best],
    [p.loss for p in best],
    where='post',
    color='#bbbbbb',
    zorder=0,
  )
  for p in all_points:
    color = '#1f5fa8' if p in best else '#888888'
    ax.errorbar(
      p.state_bytes, p.loss, p.half, fmt='o', color=color, elinewidth=0.6
    )
    # Towards the middle, so that no name runs over the frame.
    right = p.state_bytes <= middle
    ax.annotate(
      p.name,
      (p.state_bytes, p.loss),
      xytext=(5 if right else -5, 4),
      ha='left' if right else 'right',
      textcoords='offset points',
      fontsize=8,
      color=color,
    )
  ax.set_xscale('log')
  ax.set_xlabel('bytes of optimizer state, all parameters')
  ax.set_ylabel('validation loss, nats a token')
  ax.set_title(title, loc='left', fontsize=10)
  ax.grid(color='#e4e4e4', linewidth=0.7)
  fig.savefig(path)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('workdir', type=pathlib.Path)
  parser.add_argument('--workload', choices=tuple(WORKLOADS), default='packed')
  args = parser.parse_args()
  bench = search.with_candidates(args.workdir, train=False)
  found = points(bench, args.workload)
  if not found:
    parser.error(
      f'{args.workdir}/benchmark.json has no method whole on {args.workload};'
      ' run studies/benchmark.py first'
    )
  own = WORKLOADS[args.workload]
  print(table(found))
  picture(
    args.workdir / 'pareto.png',
    found,
    f'workload {args.workload}: {own.steps * own.slots:,} tokens; mean and 95 %'
    f' interval of {len(harness.FRESH)} seeds',
  )


if __name__ == '__main__':
  main()
