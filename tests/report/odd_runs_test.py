"""One odd run among others hides none of them."""

import json

import pytest

from frugax.report import __main__ as cli

_ROW = {'step': 5, 'loss': 2.5, 'tokens': 64, 'seconds': 1.0}


def _run(folder, row=_ROW, **summary):
  folder.mkdir()
  (folder / 'metrics.jsonl').write_text(json.dumps(row) + '\n')
  (folder / 'summary.json').write_text(json.dumps({'steps': 5} | summary))
  return str(folder)


@pytest.mark.parametrize(
  ('summary', 'shown'),
  [
    ({'train_loss': 'high'}, "train_loss is 'high', not a number"),
    ({'optimizer': 8}, 'odd   8 '),
    ({'optimizer': ['adam', 'w']}, "['adam', 'w']"),
  ],
)
def test_an_odd_summary(tmp_path, capsys, summary, shown):
  good = _run(tmp_path / 'good', optimizer='galore')
  odd = _run(tmp_path / 'odd', **summary)
  assert cli.main([good, odd, f'--out={tmp_path / "out"}']) == 0
  told = capsys.readouterr().out
  assert 'good  galore' in told and shown in told
  assert len(list((tmp_path / 'out').glob('*.png'))) == 2


def test_a_run_without_times(tmp_path, capsys):
  """Its curves by tokens are drawn, and those of the others by time."""
  row = {k: v for k, v in _ROW.items() if k != 'seconds'}
  odd = _run(tmp_path / 'odd', row)
  good = _run(tmp_path / 'good', optimizer='galore')
  out = tmp_path / 'out'
  assert cli.main([odd, good, f'--out={out}']) == 0
  told = capsys.readouterr().out
  assert f"without {odd}, whose rows do not record 'seconds'" in told
  assert told.count('whose rows') == 1
  names = {path.name for path in out.iterdir()}
  assert names == {'loss_by_tokens.png', 'loss_by_time.png', 'report.json'}
