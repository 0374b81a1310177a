"""How research/studies/claims judge, and what RESULTS.md makes of it."""

import json
import subprocess
import sys

import pytest

from studies import harness, pareto, results, search
from studies.claims import claim, fira, galore, subset_norm
from studies.claims.__main__ import ALL
from studies.methods import CANDIDATES


def _lab(folder, ends):
  """Runs that ended so; ends: (workload, method) -> the studies' losses."""
  rows = []
  for (workload, method), finals in ends.items():
    steps = harness.WORKLOADS[workload].steps
    for study, final in enumerate(finals):
      for n in range(harness.TRIALS):
        rows.append(
          {
            'workload': workload,
            'method': method,
            'study': study,
            'trial': n,
            'origin': 'a commit',
            'eval_step': [steps / 2, steps],
            'eval_loss': [3.0, final + 0.1 * n],
            'eval_compat': [2.9, final],
            'eval_tokens': [10, 20],
            'eval_seconds': [1.0, 2.0],
            'flops_per_token': 6,
            'state_bytes': 100,
            'adam_bytes': 400,
          }
        )
  (folder / 'benchmark.json').write_text(json.dumps(rows))
  return claim.Lab(folder, train=False)


_ADAM = (2.0, 2.1, 2.2)


@pytest.mark.parametrize(
  ('over', 'verdict'),
  [
    ((0.0, 0.001, 0.002), claim.HOLDS),
    ((-0.3, -0.31, -0.32), claim.HOLDS),  # better is as good
    ((0.2, 0.201, 0.202), claim.NOT),
    ((-0.2, 0.0, 0.2), claim.OPEN),
  ],
)
def test_as_good_as_adam(over, verdict, tmp_path):
  ends = [a + x for a, x in zip(_ADAM, over, strict=True)]
  lab = _lab(tmp_path, {('packed', 'adamw'): _ADAM, ('packed', 'galore'): ends})
  finding = galore.judge(lab)
  assert finding.verdict == verdict
  text = claim.told(galore.CLAIM, finding)
  for said in ('34.88 against 34.06', '600 steps of 4 x 128', '+-', verdict):
    assert said in text


def test_a_part_of_a_claim(tmp_path):
  lab = _lab(
    tmp_path,
    {
      ('packed', 'adamw'): _ADAM,
      ('half', 'adam_sn'): [x + 0.3 for x in _ADAM],
      ('half', 'snsm'): [x - 0.3 for x in _ADAM],
    },
  )
  finding = subset_norm.judge(lab)
  assert finding.verdict == claim.PART
  assert '+0.3000' in finding.lines[0] and '-0.3000' in finding.lines[1]


def test_what_is_missing_is_named(tmp_path):
  lab = _lab(tmp_path, {('packed', 'fira'): _ADAM})
  with pytest.raises(claim.Missing, match='packed: trials of galore'):
    fira.judge(lab)


def test_a_seed_that_diverged_decides(tmp_path):
  lost = [2.0, float('inf'), 2.1]
  ends = {('packed', 'adamw'): _ADAM, ('packed', 'galore'): lost}
  assert galore.judge(_lab(tmp_path, ends)).verdict == claim.NOT


def test_each_claim_is_a_command():
  folder = results.LOGS.parent / 'claims'
  files = {f.stem for f in folder.glob('[a-z]*.py')} - {'claim'}
  assert files == set(ALL)
  script = folder / 'galore.py'
  told = subprocess.run(
    [sys.executable, script, '--help'], capture_output=True, text=True
  )
  assert told.returncode == 0 and 'workdir' in told.stdout, told.stderr


def test_results_say_what_did_not_work(tmp_path):
  lab = _lab(
    tmp_path,
    {
      (w, m): [x + over for x in _ADAM]
      for w in harness.DEFAULT
      for m, over in (('adamw', 0.0), ('galore', 0.5), ('muon', -0.5))
    },
  )
  (tmp_path / 'bytes.json').write_text('{"packed/adamw": 1000}')
  finding = galore.judge(lab)
  (tmp_path / 'claims.json').write_text(
    json.dumps(
      {
        'galore': {
          'verdict': finding.verdict,
          'lines': finding.lines,
          'origin': 'commit abc',
        }
      }
    )
  )
  text = results.text(tmp_path)
  assert '- Claim `galore`' in text and 'commit abc' in text
  assert '`galore` ends 0.5000 +- 0.0000 nats a token above tuned' in text
  assert '`muon` ends' not in text and 'Not tried yet: `q_galore`' in text
  assert results.text(tmp_path) == text
  own = pareto.points(lab.bench, 'packed')
  assert [p.name for p in pareto.front(own)] == ['muon']
  pareto.picture(tmp_path / 'pareto.png', own, 'a title')
  assert (tmp_path / 'pareto.png').stat().st_size > 10_000


def test_shares_of_the_candidates(tmp_path):
  bench = harness.Benchmark(tmp_path, train=False)
  shares = {
    name: search.share(bench.run(('packed', name, 0, 0)))
    for name in (*CANDIDATES, 'adamw', 'adamw_8bit')
  }
  assert shares['adamw'] == 1.0 and 0.25 < shares['adamw_8bit'] < 0.26
  # A fourth of the moments in a byte each, and the projector in one.
  assert 0.06 < shares['ours'] <= search.LIMIT < shares['ours_f32']
  assert shares['ours_4bit'] < shares['ours']
  allowed = [n for n in CANDIDATES if shares[n] <= search.LIMIT]
  assert len(allowed) > 8, shares
