"""Every field of a row, in every container, for every algorithm: the same tokens."""

import csv
import io
import json
import zipfile

import pyarrow as pa
import pytest
from test_token_cache import build
from tiny_tokenizer import tiny_files

from ftjax.data import (
  containers,
  encode,
  formats,
  hub_dataset,
  labeled_examples,
  preference_rows,
  prompts,
  sources,
)
from ftjax.data.sources import Spec
from ftjax.data.tokenizer import Tokenizer
from ftjax.evaluation import tasks
from ftjax.runtime.errors import DataError

datasets = pytest.importorskip('datasets')
datasets.disable_progress_bars()

TEMPLATE = (
  '{% if tools %}<|im_start|>tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n'
  '{% endif %}{% if style is defined %}<|im_start|>style\n{{ style }}<|im_end|>\n{% endif %}'
  '{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.name %}[{{ m.name }}] {% endif %}'
  '{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}'
  '{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}'
  '{% endfor %}<|im_end|>\n{% endfor %}'
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
TOKENIZER = Tokenizer(tiny_files(TEMPLATE))

USER = {'role': 'user', 'content': 'Weather in Paris?'}
ANSWER = {'role': 'assistant', 'content': 'Sunny.'}
WORSE = {'role': 'assistant', 'content': 'No idea.'}
WEATHER = {
  'type': 'function',
  'function': {
    'name': 'weather',
    'parameters': {'type': 'object', 'properties': {'city': {'type': 'string'}}},
  },
}
CLOCK = {
  'type': 'function',
  'function': {'name': 'clock', 'parameters': {'type': 'object', 'properties': {}}},
}
CALL = {'name': 'weather', 'arguments': {'city': 'Paris'}}
CALLS = [{'type': 'function', 'function': CALL}]
RESULT = {'role': 'tool', 'content': '21 C'}


def call(**more):
  return {'role': 'assistant', 'content': ''} | more


# name: (messages before the answer, further columns). Names that begin alike read alike.
FIELDS = {
  'plain': ([USER], {}),
  'plain as parts': ([USER | {'content': [{'type': 'text', 'text': USER['content']}]}], {}),
  'system': ([{'role': 'system', 'content': 'Be brief.'}, USER], {}),
  'system as a column': ([USER], {'system': 'Be brief.'}),
  'tools': ([USER], {'tools': [WEATHER, CLOCK]}),
  'tools as text': ([USER], {'tools': json.dumps([WEATHER, CLOCK])}),
  'tools as functions': ([USER], {'functions': [WEATHER['function'], CLOCK['function']]}),
  'tools as functions in the newer form': ([USER], {'functions': [WEATHER, CLOCK]}),
  'style': ([USER], {'chat_template_kwargs': {'style': 'dry'}}),
  'style as text': ([USER], {'chat_template_kwargs': '{"style": "dry"}'}),
  'call': ([USER, call(tool_calls=CALLS), RESULT], {'tools': [WEATHER]}),
  'call as function_call': (
    [USER, call(function_call=CALL), RESULT | {'role': 'function'}],
    {'tools': [WEATHER]},
  ),
  'reason': ([USER, call(reasoning_content='First ask.', tool_calls=CALLS), RESULT], {}),
  'reason as thinking': ([USER, call(thinking='First ask.', tool_calls=CALLS), RESULT], {}),
  'reason as reasoning': ([USER, call(reasoning='First ask.', tool_calls=CALLS), RESULT], {}),
  'weight': ([USER, ANSWER | {'weight': 0}, USER | {'name': 'Ann'}], {'id': 'x7'}),
}
SHAREGPT = (
  [
    {'from': 'human', 'value': USER['content']},
    {'from': 'function_call', 'value': json.dumps(CALL)},
    {'from': 'observation', 'value': '21 C'},
  ],
  {'tools': json.dumps([WEATHER])},
)


def rows_of(algorithm):
  """A row of each field as the data of an algorithm has it."""
  out = []
  for before, columns in FIELDS.values():
    row = dict(columns)
    if algorithm == 'sft':
      row |= {'messages': [*before, ANSWER]}
    elif algorithm == 'dpo':
      row |= {'prompt': before, 'chosen': [ANSWER], 'rejected': [WORSE]}
    elif algorithm == 'kto':
      row |= {'messages': [*before, ANSWER], 'label': True}
    elif algorithm == 'reward_model':
      row |= {'prompt': before, 'completion': [ANSWER], 'score': 0.5}
    else:
      row |= {'messages': before, 'answer': 'Sunny.'}
    out.append(row)
  return out


def sharegpt_rows(algorithm):
  turns, columns = SHAREGPT
  answer = {'from': 'gpt', 'value': 'Sunny.'}
  more = {
    'sft': {'conversations': [*turns, answer]},
    'dpo': {'conversations': turns, 'chosen': answer, 'rejected': {'from': 'gpt', 'value': 'No.'}},
    'kto': {'conversations': [*turns, answer], 'kto_tag': True},
    'reward_model': {'conversations': [*turns, answer], 'score': 0.5},
    'grpo': {'conversations': turns, 'answer': 'Sunny.'},
    'eval': {'conversations': turns, 'answer': 'Sunny.'},
  }
  return [columns | more[algorithm]]


def lines(rows):
  return ''.join(json.dumps(r) + '\n' for r in rows).encode()


def cells(rows):
  """CSV: lists and objects as JSON text, what a row does not have as an empty cell."""
  names = list(dict.fromkeys(k for r in rows for k in r))
  out = io.StringIO()
  writer = csv.DictWriter(out, names)
  writer.writeheader()
  for row in rows:
    is_text = {k: isinstance(v, str) for k, v in row.items()}
    writer.writerow({k: v if is_text[k] else json.dumps(v) for k, v in row.items()})
  return out.getvalue().encode()


def data_set(rows):
  names = dict.fromkeys(k for r in rows for k in r)  # the library looks at the first row's alone
  return datasets.Dataset.from_list(
    [{k: r.get(k) for k in names} for r in rows], on_mixed_types='use_json'
  )


def write(container, rows, folder, monkeypatch):
  """The name of a source of these rows."""
  path = folder / {'zst': 'a.jsonl.zst', 'arrow': 'saved'}.get(container, f'a.{container}')
  if container in ('jsonl', 'zst'):
    text = lines(rows)
    path.write_bytes(text if container == 'jsonl' else pa.compress(text, 'zstd', asbytes=True))
  elif container == 'json':
    path.write_text(json.dumps(rows))
  elif container == 'csv':
    path.write_bytes(cells(rows))
  elif container == 'zip':
    with zipfile.ZipFile(path, 'w') as archive:
      archive.writestr('rows.csv', cells(rows))
  elif container == 'parquet':
    data_set(rows).to_parquet(path)
  elif container == 'arrow':
    data_set(rows).save_to_disk(path)
  else:
    data_set(rows).to_parquet(folder / 'a.parquet')
    found = (containers.File(folder / 'a.parquet'),)
    monkeypatch.setattr(hub_dataset, 'list_files', lambda path: found)
    return 'org/rows'
  return str(path)


CONTAINERS = ('jsonl', 'zst', 'json', 'csv', 'zip', 'parquet', 'arrow', 'hub')


def side(encoded, end):
  """(ids of the prompt, ids of the answer) of an example up to `end`."""
  first = int(encoded.supervised.argmax())
  return encoded.tokens[:first].tolist(), encoded.tokens[first:end].tolist()


def read(algorithm, source):
  """[(ids of the prompt, what else the algorithm sees of the row)]."""
  spec = Spec(source)
  if algorithm == 'grpo':
    found = prompts.read(spec, TOKENIZER, 999, 'error')
    return [(p.ids, p.columns['answer']) for p in found.rows]
  if algorithm == 'eval':
    task = tasks.load_task('t', 'match', source)
    return [(encode.encode_prompt(r.asked, TOKENIZER), r.answer) for r in task.rows]
  rows = [row for _, row in sources.rows(spec)]
  if algorithm == 'sft':
    parsed = [formats.parse(r, formats.detect(r), True) for r in rows]
    found = encode.encode(parsed, TOKENIZER, 'completion')
  else:
    shape = {'dpo': 'pair', 'kto': 'label', 'reward_model': 'score'}[algorithm]
    found = labeled_examples.encode(
      [preference_rows.parse(r, shape, None) for r in rows], TOKENIZER
    )
  assert not [f for f in found if isinstance(f, formats.Bad)]
  out = []
  for (one,) in found:
    assert not one.unrendered
    prompt, answer = side(one, one.boundary or len(one.tokens))
    out.append((prompt, (answer, one.value, one.tokens[one.boundary :].tolist())))
  return out


@pytest.fixture(scope='module')
def wanted():
  """Prompt ids of each field, by the first field whose name begins alike."""
  out, known = [], {}
  for name, (before, columns) in FIELDS.items():
    row = formats.chat(columns, [formats.Part('messages', before)])
    ids = known.setdefault(name.split()[0], encode.encode_prompt(row, TOKENIZER))
    out.append(ids)
  assert len({tuple(i) for i in out}) == len(known)  # each field shows
  return out


@pytest.mark.parametrize('algorithm', ['sft', 'dpo', 'kto', 'reward_model', 'grpo', 'eval'])
def test_a_field_means_the_same_in_every_container(algorithm, wanted, tmp_path, monkeypatch):
  found = {}
  for container in CONTAINERS:
    found[container] = read(algorithm, write(container, rows_of(algorithm), tmp_path, monkeypatch))
    for name, ids, (prompt, _) in zip(FIELDS, wanted, found[container], strict=True):
      assert prompt == ids, f'{container}: {name}: {TOKENIZER.decode(prompt, skip_special=False)}'
    assert found[container] == found['jsonl'], container


@pytest.mark.parametrize('algorithm', ['sft', 'dpo', 'kto', 'reward_model', 'grpo', 'eval'])
def test_sharegpt_is_read_by_every_algorithm(algorithm, wanted, tmp_path, monkeypatch):
  ids = wanted[list(FIELDS).index('call')]
  for container in CONTAINERS:
    source = write(container, sharegpt_rows(algorithm), tmp_path, monkeypatch)
    assert [prompt for prompt, _ in read(algorithm, source)] == [ids], container


KTO_ROWS = [
  {'prompt': 'Why?', 'completion': ' So.', 'label': True},
  {'prompt': 'Why?', 'completion': ' No.', 'label': False},
]


@pytest.mark.parametrize('container', ['jsonl', 'csv', 'parquet'])
def test_labeled_rows_are_trained_on_as_plain_ones_only_with_a_named_format(
  container, tmp_path, monkeypatch
):
  source = write(container, KTO_ROWS, tmp_path, monkeypatch)
  with pytest.raises(DataError, match=r"'label' is .*algorithm='dpo' with dpo\.loss='kto'"):
    build(tmp_path, Spec(source))
  with pytest.raises(DataError, match=r'2 of 2 rows'):
    build(tmp_path, Spec(source))
  assert len(build(tmp_path, Spec(source, 'prompt_completion'))) == 2
  assert [build(tmp_path, Spec(source), shape='label').value(i) for i in (0, 1)] == [1.0, 0.0]


def test_a_labeled_row_after_plain_ones_is_detected(tmp_path, monkeypatch):
  plain = {'prompt': 'Why?', 'completion': ' So.'}
  source = write('jsonl', [plain, plain, KTO_ROWS[1]], tmp_path, monkeypatch)
  with pytest.raises(DataError, match=r"a\.jsonl:3: 'label' is False"):
    build(tmp_path, Spec(source))
  with pytest.raises(DataError, match=r"a\.jsonl:1: .* which is for algorithm='sft' \(2 rows"):
    build(tmp_path, Spec(source), shape='pair')


def test_columns_that_are_not_read_are_listed_for_every_algorithm(tmp_path, monkeypatch):
  row = {'prompt': [USER], 'chosen': [ANSWER], 'rejected': [WORSE], 'source': 'x', 'tools': None}
  source = write('jsonl', [row, row | {'id': 3}], tmp_path, monkeypatch)
  found = build(tmp_path, Spec(source), shape='pair').counts.unread_columns
  assert sorted(entry['reason'] for entry in found) == ['id', 'source']


def test_a_conversation_that_begins_with_the_assistant_is_named(tmp_path, monkeypatch):
  """S12: on a template that wants a user turn first."""
  wants = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with user') }}{% endif %}"
  turns = [{'from': 'gpt', 'value': 'Welcome'}, {'from': 'human', 'value': 'q'}]
  rows = [
    {'conversations': [*turns[1:], {'from': 'gpt', 'value': 'a'}]},
    {'conversations': [*turns, {'from': 'gpt', 'value': 'a'}]},
  ]
  source = write('jsonl', rows, tmp_path, monkeypatch)
  with pytest.raises(DataError, match=r'a\.jsonl:2: .*user'):
    build(tmp_path, Spec(source), tokenizer=Tokenizer(tiny_files(wants + TEMPLATE)))
