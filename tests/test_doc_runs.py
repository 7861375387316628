"""The commands of README and docs that take longer, executed as they stand, one after another."""

import collections
import json
import shlex
import shutil
import subprocess

import pytest
import tiny_run
from doc_commands import ROOT, all_commands, kind, of_kind, saved, write_rows


def shell_script(page):
  """The lines of shell of a page's blocks, in order; other commands are left out."""
  kept = collections.defaultdict(list)
  for command in all_commands():
    if command.page == page and not command.is_span and kind(command) == 'shell':
      kept[command.line].append(command.text)
  return '\n'.join(' && '.join(parts) for _, parts in sorted(kept.items()))


@pytest.mark.full
@pytest.mark.skipif(not (ROOT / '.git').exists(), reason='no git checkout to clone')
def test_checkouts_and_environments_are_made(tmp_path):
  pages = {command.page for command in all_commands() if kind(command) == 'shell'}
  assert 'README.md' in pages
  for page in pages:
    (folder := tmp_path / page).mkdir(parents=True)
    text = shell_script(page).replace('REPOSITORY', str(ROOT))
    if 'sha256sum' in text:
      (folder / 'a').write_bytes(b'a')
      sums = subprocess.run(['sha256sum', 'a'], cwd=folder, capture_output=True, check=True).stdout
      (folder / 'SHA256SUMS').write_bytes(sums)
      text = text.replace('sha256sum --check', f'cd {shlex.quote(str(folder))}; sha256sum --check')
    done = subprocess.run(
      ['bash', '-euc', f'{text}\ncommand -v python'],
      cwd=folder,
      capture_output=True,
      text=True,
      stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, (page, text, done.stderr)
    if 'venv' in text:
      assert done.stdout.splitlines()[-1].startswith(str(folder))
    if 'git clone' in text:
      assert (folder / 'ftjax/pyproject.toml').exists()


def tiny_runs():
  """{workdir: [words]} of the commands that train a config of random weights, and what follows."""
  found = collections.defaultdict(list)
  for words in dict.fromkeys(command.words for command in of_kind('entry')):
    if words[2:3] == ('ftjax.train',) and any(w.startswith('--config=tiny_') for w in words):
      (workdir,) = [w.partition('=')[2] for w in words if w.startswith('--workdir=')]
      found[workdir].append(words)
  return found


@pytest.mark.full
@pytest.mark.parametrize('workdir', sorted(tiny_runs()))
def test_tiny_runs_of_the_docs_end_as_shown(workdir, tmp_path):
  for words in tiny_runs()[workdir]:
    # A tenth of the long one shows the same.
    arguments = [w.replace('--config.steps=4000', '--config.steps=400') for w in words[3:]]
    code, log = tiny_run.run('train', arguments, folder=tmp_path)
    # The page shows that the loss is not finite.
    assert code == (4 if workdir == 'runs/nan' else 0), log
    shutil.rmtree(tmp_path / workdir)


@pytest.mark.full
def test_the_commands_of_the_readme_work_one_after_another(tmp_path):
  """On rows and a model of random weights in place of the reader's own."""
  arguments = ['--config=tiny_sft', f'--workdir={tmp_path}/runs/tiny', '--config.steps=20']
  assert tiny_run.run('train', arguments, folder=tmp_path)[0] == 0
  (tmp_path / '.cache').mkdir()
  shutil.copytree(tmp_path / 'runs/tiny/export', tmp_path / '.cache/smollm2')
  shape = tmp_path / '.cache/smollm2/config.json'  # seq_len of the page's config is 512
  shape.write_text(json.dumps(json.loads(shape.read_text()) | {'max_position_embeddings': 512}))
  (tmp_path / 'my_config.py').write_text(saved('README.md')['my_config.py'])
  rows = [
    {'messages': [{'role': 'user', 'content': f'{i} + 1 ='}, {'role': 'assistant', 'content': 'x'}]}
    for i in range(2000)
  ]
  write_rows(tmp_path / 'train.jsonl', rows)
  asked = [{'messages': row['messages'][:1], 'answer': 'x'} for row in rows[:6]]
  write_rows(tmp_path / 'test.jsonl', asked)
  done = []
  for command in all_commands():
    is_mine = any('runs/mine' in w or 'my_config.py' in w for w in command.words)
    # --push needs the hub, --topology a compiler for it; --watch does not end where epochs are set;
    # the tokenizer of a tiny model has no merges, which a GGUF file must have.
    left_out = ('--push', '--topology', '--watch', '--target=gguf')
    is_left_out = any(w.startswith(left_out) for w in command.words)
    if command.page != 'README.md' or kind(command) != 'entry' or not is_mine or is_left_out:
      continue
    if any('runs/other' in w for w in command.words):
      shutil.copytree(tmp_path / 'runs/mine', tmp_path / 'runs/other')
    entry = command.words[2].removeprefix('ftjax.')
    code, log = tiny_run.run(entry, list(command.words[3:]), folder=tmp_path)
    assert code == 0, (str(command), log)
    done.append(entry)
  assert done[:3] == ['preview', 'train', 'evaluate'] and done[-1] == 'convert'
  for file in ('runs/mine/report.html', 'comparison.html', 'models/mine/config.json'):
    assert (tmp_path / file).stat().st_size, file
