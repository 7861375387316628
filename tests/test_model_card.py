"""README.md of an export: what the hub reads in it, hostile names, edits, and the card of a run."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import tiny_model
from huggingface_hub import ModelCard
from test_saved_model import tiny, train

from ftjax import convert
from ftjax.config import config_file, section
from ftjax.data import synthetic
from ftjax.experiment import run_card
from ftjax.hf import export, model_card, model_folder
from ftjax.reporting import markdown
from ftjax.runtime.errors import DataError
from ftjax.storage import files

HOSTILE = (
  'a\n---\nb: [',
  '```\n# title\n<script>alert(1)</script>',
  '| x | `y` |',
  '`',
  '"\' \\ : # {} %',
  '\U0001f600 \u2028 \x85 \x7f \x00 \ud800',
  '<!-- ftjax: step 1, sha256 of the text above ' + '0' * 64 + ' -->\n',
  'x' * 5000,
)
COMMIT = 'c0ffee' * 6 + 'abcd'


def interval(value):
  return {'value': value, 'low': value - 0.1, 'high': value + 0.1}


def summary_of(name):
  """eval/summary.json of one task, as evaluation/comparison.py makes it."""
  metric = {'name': 'accuracy', 'title': 'accuracy', 'better': 'higher', 'form': 'fraction'}
  test = {'metric': 'accuracy', 'name': 'exact McNemar', 'p': 0.125, 'p_holm': 0.25}
  difference = {
    'first': 'base',
    'second': 'tuned',
    'metrics': {'accuracy': interval(0.25) | {'p': 0.0, 'effect': 0.5}},
    'test': test | {'only_first_right': 1, 'only_second_right': 6},
    'smallest_difference': 0.2,
    'rows_needed': None,
    'is_too_small': False,
    'outcome': 'undecided',
    'verdict': f'nothing is known of {name}.',
  }
  task = {
    'task': name,
    'kind': 'choice',
    'group': 'task',
    'n': 20,
    'prompts': 20,
    'samples': 1,
    'metrics': [metric | {'is_primary': True, 'is_detail': False}],
    'scores': {m: {'accuracy': interval(v)} for m, v in (('base', 0.5), ('tuned', 0.75))},
    'differences': [difference],
  }
  verdict = [f'{name}: {difference["verdict"]}']
  return {'version': 2, 'models': ['base', 'tuned'], 'verdict': verdict, 'tasks': {name: task}}


def card(text='org/base', **changes):
  base = model_card.Base(text, 'org/base', COMMIT, 'f' * 64, {'license': 'apache-2.0'})
  fields = dict(
    algorithm='sft',
    is_reward=False,
    task='',
    num_labels=0,
    has_template=True,
    step=7,
    base=base,
    continues=False,
    is_adapter=False,
    merge='',
    sources=[model_card.Source('train', text, 'org/rows', 90, 10, 'e' * 64)],
    config=model_card.config_file({'data.train': text}),
    evaluation=markdown.evaluation(summary_of(text)),
    scores={text: {'accuracy': 0.75}},
    versions={'ftjax': '0.1.0', 'jax': '0.10.2'},
    devices=text,
  )
  return model_card.Card(**(fields | changes))


def rendered(*words, **changes):
  return model_card.render(card(*words, **changes)).encode()


def loaded(content, folder):
  (folder / 'README.md').write_bytes(content)
  return ModelCard.load(folder / 'README.md')


@pytest.mark.parametrize(
  ('changes', 'wanted'),
  [
    ({}, ('finetune', 'transformers', 'text-generation', ['ftjax', 'sft'])),
    ({'is_adapter': True}, ('adapter', 'peft', 'text-generation', ['ftjax', 'sft', 'lora'])),
    (
      {'is_reward': True, 'task': 'sequence', 'algorithm': 'reward_model'},
      (
        'finetune',
        'transformers',
        'text-classification',
        ['ftjax', 'reward_model', 'reward-model'],
      ),
    ),
    ({'base': None}, (None, 'transformers', 'text-generation', ['ftjax', 'sft'])),
  ],
)
def test_the_hub_reads_the_header(tmp_path, changes, wanted):
  found = loaded(rendered(**changes), tmp_path)
  data = found.data.to_dict()
  keys = ('base_model_relation', 'library_name', 'pipeline_tag', 'tags')
  assert tuple(data.get(k) for k in keys) == wanted
  assert data.get('base_model') == ('org/base' if wanted[0] else None)
  assert data.get('license') == ('apache-2.0' if wanted[0] else None)
  assert data['datasets'] == ['org/rows']
  (result,) = found.data.eval_results
  assert (result.dataset_name, result.metric_type, result.metric_value) == (
    'org/base',
    'accuracy',
    0.75,
  )
  assert '0.500 [0.400, 0.600] | 0.750 [0.650, 0.850] |' in found.content
  assert '+0.250 [+0.150, +0.350] | 0.12 | 0.25 | 0.200 | undecided |' in found.content


@pytest.mark.parametrize('text', HOSTILE)
def test_no_name_breaks_the_card(tmp_path, text):
  usual = rendered('org/base').decode().splitlines()
  content = rendered(text)
  found = loaded(content, tmp_path)
  assert found.data.base_model == 'org/base'
  assert found.data.eval_results[0].dataset_name == ' '.join(model_card._clean(text).split())
  lines = content.decode().splitlines()
  assert len(lines) == len(usual), 'no line more'
  for a, b in zip(lines, usual, strict=True):
    if b.startswith('|'):
      assert a.startswith('|') and unescaped(a) == unescaped(b), 'no cell more'
    if b.startswith(('#', '```', '---')):
      assert a == b or (b == '# base, sft' and a.startswith('# ')), 'no block more'
  outside = ''.join(outside_of_code(content.decode().partition('\n---\n')[2]))
  assert '<script' not in outside and outside.count('<!--') == 1
  assert model_card.is_unchanged(content) and model_card.step_of(content) == 7


def unescaped(line):
  return line.replace('\\|', '').count('|')


def outside_of_code(markdown):
  """The lines of a card without its fenced blocks and its code spans."""
  fenced = False
  for line in markdown.splitlines():
    if line.startswith('```'):
      fenced = not fenced
    elif not fenced:
      while (start := line.find('`')) >= 0 and (start == 0 or line[start - 1] != '\\'):
        ticks = len(line[start:]) - len(line[start:].lstrip('`'))
        end = line.find('`' * ticks, start + ticks)
        while end >= 0 and line[end + ticks : end + ticks + 1] == '`':
          run = len(line[end:]) - len(line[end:].lstrip('`'))
          end = line.find('`' * ticks, end + run)
        assert end > 0, f'an open code span: {line}'
        line = line[:start] + line[end + ticks :]
      yield line


@pytest.mark.parametrize(
  ('text', 'wanted'),
  [
    ('/srv/me/rows.jsonl', 'rows.jsonl'),
    ('/srv/me/my rows/a b.jsonl::messages@2', 'a b.jsonl::messages@2'),
    ('~/rows.jsonl,~me/x/b.jsonl', 'rows.jsonl,b.jsonl'),
    ('gs://bucket/data/rows.jsonl, /srv/me/c.jsonl', 'rows.jsonl, c.jsonl'),
    ('mine=choice:/srv/me/rows.jsonl', 'mine=choice:rows.jsonl'),
    ('file:///srv/me/rows.jsonl', 'rows.jsonl'),
    ('data/rows.jsonl', 'data/rows.jsonl'),
    ('../rows.jsonl', '../rows.jsonl'),
    ('org/rows@main:train', 'org/rows@main:train'),
    ('sums:400:20', 'sums:400:20'),
    ('7 / 5 = 1.4, 3/4', '7 / 5 = 1.4, 3/4'),
    ('open "/srv/me/a.py" and stop', 'open "a.py" and stop'),
  ],
)
def test_folders_of_this_machine_are_not_told(text, wanted):
  assert model_card.public(text) == wanted


@pytest.mark.parametrize(
  ('header', 'wanted'),
  [
    ('license: mit', {'license': 'mit'}),
    ('license: "apache-2.0"\r\ntags: [a]', {'license': 'apache-2.0'}),
    (
      'license: other\nlicense_name: llama3\nlicense_link: https://x.org/a\n',
      {'license': 'other', 'license_name': 'llama3', 'license_link': 'https://x.org/a'},
    ),
    ('license: other\nlicense_link: LICENSE', {'license': 'other'}),
    ('license: [mit, x]', {}),
    ('license: a b', {}),
    ('x:\n  license: mit', {}),
    ('license: |\n  mit', {}),
    ('tags: [a]', {}),
  ],
)
def test_the_license_of_the_base(header, wanted):
  assert model_card.license_of(f'---\n{header}\n---\n# x\n') == wanted
  assert model_card.license_of(header) == {}
  assert model_card.license_of(f'# x\n---\n{header}\n---\n') == {}


def test_a_readme_of_the_base_that_cannot_be_read_costs_nothing(tmp_path):
  base = tmp_path / 'base'
  base.mkdir()
  assert model_folder.readme(base) == b''
  (tmp_path / 'secret').write_bytes(b'---\nlicense: mit\n---\n')
  (base / 'README.md').symlink_to('../secret')
  assert model_folder.readme(base) == b''
  (base / 'README.md').unlink()
  (base / 'README.md').mkdir()
  assert model_folder.readme(base) == b''
  (base / 'README.md').rmdir()
  (base / 'README.md').write_bytes(b'x' * (5 << 20))
  assert model_folder.readme(base) == b''


def test_edits_are_seen():
  content = rendered()
  assert model_card.is_card(content) and model_card.is_unchanged(content)
  for other in (content + b'more\n', content.replace(b'sft', b'SFT', 1), b'x' + content):
    assert model_card.is_card(other) and not model_card.is_unchanged(other)
  for foreign in (b'', b'# A model\n', b'\xff\xfe'):
    assert not model_card.is_card(foreign) and model_card.step_of(foreign) is None


def write(folder, content):
  export.write_model(folder, {}, None, {'config.json': b'{}', 'README.md': content})


def test_a_card_that_somebody_edited_is_kept_and_a_foreign_one_stops_the_export(tmp_path, caplog):
  out = tmp_path / 'out'
  first, second = (rendered(step=step) for step in (1, 2))
  write(out, first)
  write(out, second)
  assert (out / 'README.md').read_bytes() == second and not caplog.text
  (out / 'README.md').write_bytes(second + b'My words.\n')
  write(out, first)
  assert (out / 'README.md').read_bytes() == second + b'My words.\n'
  assert 'README.md was edited since ftjax wrote it: it is kept' in caplog.text
  (out / 'README.md').write_bytes(b'# Not of ftjax\n')
  with pytest.raises(DataError, match=r'holds README.md'):
    write(out, first)
  assert (out / 'README.md').read_bytes() == b'# Not of ftjax\n'


# The card of a run

ARCH = dataclasses.replace(tiny_model.TINY, vocab_size=synthetic.VOCAB_SIZE, max_len=256)
SECRET = 'hf_' + 'A1b2C3d4' * 4


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A workdir with an export that was compared with its base, and the config."""
  home = tmp_path_factory.mktemp('home')
  base = Path(tiny_model.write_folder(home / 'private' / 'tiny-base', ARCH))
  for name, content in synthetic.byte_tokenizer().items():
    (base / name).write_bytes(content)
  (base / 'README.md').write_text('---\nlicense: mit\n---\n# Of the base\n')
  rows = [
    {'prompt': f'{a} + 1 =', 'choices': [str(a + 1), '0'], 'label': str(a + 1)} for a in range(1, 9)
  ]
  (home / 'private' / 'test.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
  c = tiny('sft', **{
    'model.path': str(base),
    'model.random': {},
    'steps': 2,
    'checkpoint.every': 1,
    'eval.every': 0,
    'eval.tasks': (f'sums=choice:{home}/private/test.jsonl',),
    'data.cache': str(home / 'cache'),
  })  # fmt: skip
  return train(c, home / 'run'), c


def test_the_card_of_a_run_says_where_it_comes_from(trained, tmp_path):
  workdir, c = trained
  found = ModelCard.load(workdir / 'export' / 'README.md')
  manifest = json.loads((workdir / 'manifest.json').read_text())
  summary = json.loads((workdir / 'eval' / 'summary.json').read_text())['tasks']['sums']
  assert found.data.license == 'mit' and found.data.base_model is None, 'no hub name is known'
  assert found.data.model_name == 'tiny-base, sft'
  assert found.data.eval_results[0].metric_value == pytest.approx(
    summary['scores']['tuned']['accuracy']['value']
  )
  for text in (
    manifest['fingerprints']['model'],
    manifest['fingerprints']['data 0'],
    manifest['code'].get('commit', ''),
    f'| train | `sums:400:20` | {manifest["data"]["data 0"]["examples_used"]} | 0 |',
    '1 x cpu' if manifest['devices']['count'] == 1 else f'{manifest["devices"]["count"]} x cpu',
    '{value:.3f} [{low:.3f}, {high:.3f}]'.format(**summary['scores']['base']['accuracy']),
    'add_generation_prompt=True',
  ):
    assert text in found.content, text
  for text in ('private', str(workdir.parent)):
    assert text not in found.content, text
  (tmp_path / 'config.py').write_text(
    found.content.partition('```python\n')[2].partition('\n```')[0]
  )
  again, first = (section.plain(x) for x in (config_file.load(str(tmp_path / 'config.py')), c))
  differ = {k for k in first if again[k] != first[k]}
  assert differ == {'model.path', 'eval.tasks', 'data.cache', 'compile_cache'}
  assert again['model.path'] == 'tiny-base' and again['eval.tasks'] == ['sums=choice:test.jsonl']


def test_a_conversion_has_the_card_of_its_step(trained, tmp_path):
  workdir, _ = trained
  own = (workdir / 'export' / 'README.md').read_bytes()
  for source in (workdir, f'{workdir}@2', workdir / 'export'):
    convert.convert(str(source), str(tmp_path / 'out'), 'bfloat16')
    assert (tmp_path / 'out' / 'README.md').read_bytes() == own
  convert.convert(f'{workdir}@1', str(tmp_path / 'out'), None)
  other = (tmp_path / 'out' / 'README.md').read_bytes()
  assert model_card.step_of(other) == 1 and b'## Evaluation' not in other
  assert b'model-index' in own and b'## Evaluation' in own


def test_new_results_come_into_the_card_but_not_into_an_edited_one(
  trained, tmp_path, caplog, monkeypatch
):
  workdir, c = trained
  copy = shutil.copytree(workdir, tmp_path / 'run')
  model = run_card_model(c)
  path = copy / 'export' / 'README.md'
  own = path.read_bytes()
  run_card.refresh(str(copy), model)
  assert path.read_bytes() == own, 'the same results give the same bytes'
  summary = json.loads((copy / 'eval' / 'summary.json').read_text())
  summary['tasks']['sums']['n'] = 4321
  (copy / 'eval' / 'summary.json').write_text(json.dumps(summary))
  run_card.refresh(str(copy), model)
  assert b'4,321' in path.read_bytes()
  own, replaced = path.read_bytes(), Path.replace
  monkeypatch.setattr(Path, 'replace', lambda *_: 1 / 0)  # a process that ends there
  with pytest.raises(ZeroDivisionError):
    run_card.refresh(str(copy), model)
  assert all(export.is_ours(p) for p in path.parent.iterdir()) and path.read_bytes() == own
  monkeypatch.setattr(Path, 'replace', replaced)
  path.write_bytes(own + b'mine\n')
  run_card.refresh(str(copy), model)
  assert path.read_bytes() == own + b'mine\n' and 'is not as ftjax wrote it' in caplog.text


def run_card_model(c):
  from ftjax.experiment.model import open_model

  return open_model(c.model.path, {}, c.seed)


def test_a_workdir_without_its_records_still_gives_a_card(trained, tmp_path):
  _, c = trained
  for name in ('', 'x', '[]'):
    empty = tmp_path / f'run{name}'
    empty.mkdir()
    for file in ('config.json', 'manifest.json') if name else ():
      (empty / file).write_text(name)
    content = run_card.build(
      str(empty), run_card_model(c), 3, has_results=True, is_adapter=False
    ).encode()
    assert model_card.step_of(content) == 3 and b'tiny-base' in content


def test_sources_are_named_as_the_config_names_them(trained, tmp_path):
  _, c = trained
  config = {
    'algorithm': 'sft',
    'data.train': 'some-org/rows@main:train@2,data/a b.jsonl::messages,/srv/me/c.jsonl',
    'data.eval': '',
  }
  counts = {'name': '/srv/me/cache/x', 'dropped': 1, 'bad': 2, 'identical': 4}
  manifest = {
    'data': {
      f'{kind} {i}': counts | ({'prompts': 7} if i == 1 else {'examples_used': 5})
      for kind in ('data', 'eval')
      for i in range(4)
    },
    'fingerprints': {'data 0': 'd' * 64},
  }
  for name, content in (('config', config), ('manifest', manifest)):
    (tmp_path / f'{name}.json').write_text(json.dumps(content))
  text = run_card.build(str(tmp_path), run_card_model(c), 3, has_results=False, is_adapter=False)
  (tmp_path / 'README.md').write_text(text)
  assert ModelCard.load(tmp_path / 'README.md').data.datasets == ['some-org/rows']
  for use in ('train', 'eval'):
    assert f'| {use} | `some-org/rows@main:train` | 5 | 7 |' in text
    assert f'| {use} | `data/a b.jsonl` | 7 | 7 |' in text
    assert f'| {use} | `c.jsonl` | 5 | 7 |' in text
    assert f'| {use} | `x` | 5 | 7 |' in text, 'a config that has changed since'
  assert 'd' * 64 in text and '/srv' not in text


def test_a_secret_in_a_config_is_not_told(trained, tmp_path):
  workdir, c = trained
  config = json.loads((workdir / 'config.json').read_text())
  config |= {'eval.prompts': [f'say {SECRET}'], 'data.train': f'https://me:{SECRET}@x.org/a.jsonl'}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  content = run_card.build(str(tmp_path), run_card_model(c), 3, has_results=False, is_adapter=False)
  assert SECRET not in content and 'x.org' not in content
  assert "c.eval.prompts = ('say <redacted>',)" in content and "c.data.train = 'a.jsonl'" in content


def test_a_model_in_the_hubs_cache_is_named_by_its_hub_name(trained, tmp_path):
  workdir, c = trained
  cache = tmp_path / 'models--org--base' / 'snapshots' / COMMIT
  shutil.copytree(Path(c.model.path), cache)
  model = dataclasses.replace(run_card_model(c), source=str(cache))
  (tmp_path / 'README.md').write_text(
    run_card.build(str(workdir), model, 2, has_results=True, is_adapter=False)
  )
  found = ModelCard.load(tmp_path / 'README.md')
  assert found.data.base_model == 'org/base' and f'| commit | `{COMMIT}` |' in found.content


def test_the_card_in_a_bucket_is_replaced(bucket):
  write('gs://bucket/out', rendered(step=1))
  export.replace_card('gs://bucket/out', rendered(step=2).decode())
  assert files.read_bytes('gs://bucket/out/README.md') == rendered(step=2)
  write('gs://bucket/out', rendered(step=3))
  assert files.read_bytes('gs://bucket/out/README.md') == rendered(step=3)
  assert not [n for n in bucket.names() if 'card' in n or 'partial' in n]


@pytest.mark.full
def test_a_merged_model_has_the_scores_of_its_adapter(trained, tmp_path):
  """And its distance from the adapter; so has a conversion, without the distance."""
  _, c = trained
  c = c.copy_and_resolve_references()
  c.lora.update({'rank': 2, 'alpha': 4.0, 'merge_kl': 1.0})
  workdir = train(c, tmp_path / 'run')
  convert.convert(str(workdir), str(tmp_path / 'out'), None)
  folders = workdir / 'export', workdir / 'merged', tmp_path / 'out'
  adapter, merged, converted = ((f / 'README.md').read_text() for f in folders)
  assert all('## Evaluation' in text for text in (adapter, merged, converted))
  assert 'after merging' not in adapter and 'after merging.' in converted
  kl = json.loads((workdir / 'merge.json').read_text())['kl']
  assert f'after merging: {kl:.3g} nats per token' in merged
  summary = json.loads((workdir / 'eval' / 'summary.json').read_text())
  summary['tasks']['sums']['n'] = 4321
  (workdir / 'eval' / 'summary.json').write_text(json.dumps(summary))
  run_card.refresh(str(workdir), run_card_model(c))
  assert all('4,321' in (f / 'README.md').read_text() for f in folders[:2])
  # Those of another step's adapter it has not: merged/ is written after the scores.
  model, path = run_card_model(c), str(workdir)
  more = {'has_results': False, 'is_adapter': False, 'folder': 'merged'}
  export.replace_card(str(workdir / 'merged'), run_card.build(path, model, 1, **more))
  run_card.refresh(path, model)
  assert '4,321' not in (workdir / 'merged' / 'README.md').read_text()
