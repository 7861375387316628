"""Writes and recognizes README.md of an exported model: the model card, as the Hugging Face hub
reads it.

A card is a function of its values alone, without dates and paths of this machine: the same run has
the same bytes. Its last line holds the step of the weights and a SHA-256 of the text above it, so
that a card which somebody edited is recognized and is not overwritten.

Names, paths and tasks are texts of users. In the YAML they are JSON strings, in Markdown code
spans, and what cannot be printed becomes a blank: none of them ends a line, a cell or the header.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

FILE = 'README.md'

_LONGEST = 300  # characters of a user's text
_MARK = re.compile(rb'<!-- ftjax: step (\d+), sha256 of the text above ([0-9a-f]{64}) -->\n')
_LICENSE = re.compile(r'^(license(?:_name|_link)?):[ \t]*(\S+)[ \t]*$', re.MULTILINE)
_LICENSE_ID = re.compile(r'[A-Za-z0-9][\w.+-]{0,99}')
_LINK = re.compile(r'https://[\w./%~+-]{1,300}')
# A local or remote path from its root to its last '/': a text that is one, with blanks perhaps, and
# one in other text.
_ROOTED = re.compile(r'(^|[=:\s\'"(\[])(?:[A-Za-z][\w+.-]*:/)?[/~][^\s,;\'")\]]*/(?=[^/\s])')
_WHOLE = re.compile(r'^(\s*(?:[\w.-]+=(?:\w+:)?)?)(?:[A-Za-z][\w+.-]*:/|~[\w.-]*)?/.*/(?=[^/])')


@dataclasses.dataclass(frozen=True)
class Base:
  """The model that a run started from.

  Attributes:
    name: as the config names it, cleaned by `public`.
    hub_id: 'org/name' on the hub; '' for any other model.
    commit: of the hub model; '' where it is not known.
    fingerprint: SHA-256 of the weights' content and of the architecture; '' where not known.
    license: license, license_name and license_link, as `license_of` found them.
  """

  name: str
  hub_id: str
  commit: str
  fingerprint: str
  license: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Source:
  """A data source of a run.

  Attributes:
    use: 'train' or 'eval'.
    name: as the config names it, cleaned by `public`.
    hub_id: 'org/name' of a data set on the hub; '' for any other source.
    used: examples, or prompts.
    left_out: rows that were not used.
    fingerprint: SHA-256 of the tokenized rows, or of the prompts.
  """

  use: str
  name: str
  hub_id: str
  used: int
  left_out: int
  fingerprint: str


@dataclasses.dataclass(frozen=True)
class Card:
  """What a model card says.

  Attributes:
    algorithm: of the run.
    is_reward: whether it is a reward model.
    task: what its labels are given to, 'sequence' (also of a reward model), 'token' or 'span';
      EMBEDDING for vectors; '' for a language model.
    num_labels: how many labels it gives; 0 for a language model.
    has_template: whether its tokenizer has a chat template.
    step: optimizer steps behind the weights.
    base: None for a model that began with random weights.
    continues: whether training began with the export of another run (init_from).
    is_adapter: whether the folder holds an adapter for the base.
    merge: of a model with a merged adapter, how far it is from base and adapter, with which its
      scores were measured; '' for others.
    sources: of the data.
    config: the config as Python code; see `config_file`.
    evaluation: Markdown that compares base and tuned model; '' where they were not evaluated.
    scores: {task: {metric: value}} of the tuned model.
    versions: {'ftjax': version, 'commit': of its checkout, 'jax': version, ...}.
    devices: such as '8 x TPU v5e'.
    audit: a sentence on the faults found in the training data; '' where they were not looked for.
  """

  algorithm: str
  is_reward: bool
  task: str
  num_labels: int
  has_template: bool
  step: int
  base: Base | None
  continues: bool
  is_adapter: bool
  merge: str
  sources: Sequence[Source]
  config: str
  evaluation: str
  scores: Mapping[str, Mapping[str, float]]
  versions: Mapping[str, str]
  devices: str
  audit: str = ''


def public(text: str) -> str:
  """Returns a text of a config without the folders of this machine or bucket: an absolute path is
  cut to its last part. Relative paths and hub names stay.
  """
  parts = (_WHOLE.sub(r'\1', part) for part in text.split(','))
  return ','.join(_ROOTED.sub(r'\1', part) for part in parts)


def license_of(readme: str) -> dict[str, str]:
  """Returns the license keys in the YAML header of a model card, only of plain form; {} if none."""
  readme = readme.replace('\r\n', '\n')
  header = re.match(r'---\n(.*?)^---[ \t]*$', readme, re.DOTALL | re.MULTILINE)
  found = dict(_LICENSE.findall(header[1])) if header else {}
  found = {k: v.strip('\'"') for k, v in found.items()}
  right = {'license': _LICENSE_ID, 'license_name': _LICENSE_ID, 'license_link': _LINK}
  found = {k: v for k, v in found.items() if right[k].fullmatch(v)}
  return found if 'license' in found else {}


def is_card(content: bytes) -> bool:
  """Returns whether README.md was written here, perhaps edited since."""
  return bool(_MARK.search(content))


def is_unchanged(content: bytes) -> bool:
  """Returns whether README.md is as it was written here."""
  found = list(_MARK.finditer(content))
  if not found or found[-1].end() != len(content):
    return False
  return hashlib.sha256(content[: found[-1].start()]).hexdigest().encode() == found[-1][2]


def has_results(content: bytes) -> bool:
  """Returns whether a card has scores."""
  return b'\n## Evaluation\n' in content


def step_of(content: bytes) -> int | None:
  """Returns the step of the weights that a card describes; None for another README.md."""
  found = list(_MARK.finditer(content))
  return int(found[-1][1]) if found else None


def config_file(changed: Mapping[str, Any]) -> str:
  """Returns a config file for ftjax.train that sets these keys, {dotted key: JSON value}."""
  lines = ['from ftjax import config', '', '', 'def get_config():', '  c = config.default()']
  lines += [f'  c.{key} = {_python(value)}' for key, value in changed.items()]
  return '\n'.join([*lines, '  return c'])


def _python(value: Any) -> str:
  """Returns a JSON value as a Python literal in one line; lists become tuples."""
  if isinstance(value, str):
    return repr(public(value))
  if isinstance(value, list):
    return f'({", ".join(map(_python, value))}{"," if len(value) == 1 else ""})'
  if isinstance(value, Mapping):
    return f'{{{", ".join(f"{k!r}: {_python(v)}" for k, v in value.items())}}}'
  return repr(value)


def render(card: Card) -> str:
  """Returns README.md: YAML header, base, data, algorithm and config, evaluation, reproduction,
  loading.
  """
  parts = [
    _header(card),
    f'# {_escaped(_title(card))}',
    _summary(card),
    _base(card),
    _data(card),
    _training(card),
    _evaluation(card),
    _loading(card),
  ]
  text = '\n\n'.join(part for part in parts if part) + '\n\n'
  digest = hashlib.sha256(text.encode()).hexdigest()
  return text + f'<!-- ftjax: step {card.step}, sha256 of the text above {digest} -->\n'


def _clean(text: str) -> str:
  """Returns a text in one line of printable characters, not too long."""
  line = ' '.join(''.join(c if c.isprintable() else ' ' for c in text).split())
  return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + '...'


def _escaped(text: str) -> str:
  """Returns a user's text for Markdown outside of code."""
  text = re.sub(r'([\\`*_\[\]|~#$])', r'\\\1', _clean(text))
  return text.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')


def _code(text: str) -> str:
  """Returns a user's text as a code span, which can stand in a table."""
  text = _clean(text)
  if not text:
    return ''
  fence = '`' * (1 + max(map(len, re.findall('`+', text)), default=0))
  room = ' ' if text.startswith('`') or text.endswith('`') else ''
  return f'{fence}{room}{text}{room}{fence}'.replace('|', '\\|')


def _yaml(value: Any, indent: int) -> str:
  """Returns a value of the header in block style; scalars are written as JSON, which is YAML."""
  room = ' ' * indent
  if isinstance(value, Mapping):
    return '\n'.join(
      f'{room}{k}:\n{_yaml(v, indent + 2)}'
      if isinstance(v, Mapping | list)
      else f'{room}{k}: {_scalar(v)}'
      for k, v in value.items()
    )
  return '\n'.join(
    f'{room}- {_yaml(item, indent + 2).lstrip()}'
    if isinstance(item, Mapping)
    else f'{room}- {_scalar(item)}'
    for item in value
  )


def _scalar(value: Any) -> str:
  return json.dumps(_clean(value) if isinstance(value, str) else value, ensure_ascii=False)


def _title(card: Card) -> str:
  name = card.base.name.rstrip('/').rpartition('/')[2] if card.base else 'random initialization'
  return f'{_clean(name)}, {card.algorithm}'


def _header(card: Card) -> str:
  library = 'peft' if card.is_adapter else 'transformers'
  library = 'sentence-transformers' if card.task == EMBEDDING else library
  kinds = [*(['reward-model'] if card.is_reward else []), *(['lora'] if card.is_adapter else [])]
  meta: dict[str, Any] = {
    'library_name': library,
    'pipeline_tag': _PIPELINES[card.task],
    'tags': ['ftjax', card.algorithm, *kinds],
  }
  if card.base and card.base.hub_id:
    relation = 'adapter' if card.is_adapter else 'finetune'
    meta |= {'base_model': card.base.hub_id, 'base_model_relation': relation}
  if card.base:
    meta |= card.base.license
  if names := list(dict.fromkeys(s.hub_id for s in card.sources if s.hub_id)):
    meta['datasets'] = names
  if card.scores:
    results = [_result(_PIPELINES[card.task], task, scores) for task, scores in card.scores.items()]
    meta['model-index'] = [{'name': _title(card), 'results': results}]
  return f'---\n{_yaml(meta, 0)}\n---'


def _result(pipeline: str, task: str, scores: Mapping[str, float]) -> dict[str, Any]:
  """Returns the scores of the tuned model as an entry of the header's model-index."""
  return {
    'task': {'type': pipeline},
    'dataset': {'name': task, 'type': task},
    'metrics': [{'type': score, 'value': round(value, 6)} for score, value in scores.items()],
  }


def _summary(card: Card) -> str:
  if card.base is None:
    start = 'random weights'
  elif card.continues:
    start = f"another run's export of {_code(card.base.name)}"
  else:
    start = _code(card.base.name)
  what = 'An adapter' if card.is_adapter else 'A model'
  return (
    f'{what} trained with ftjax by {_code(card.algorithm)} from '
    f'{start}, {card.step} optimizer steps.'
  )


def _base(card: Card) -> str:
  if card.base is None:
    return ''
  rows = [
    ('name', _code(card.base.name)),
    ('hub', _code(card.base.hub_id)),
    ('commit', _code(card.base.commit)),
    ('SHA-256 of weights and architecture', _code(card.base.fingerprint)),
    ('license', _code(card.base.license.get('license', ''))),
  ]
  if card.continues:
    rows.append(('training started from', 'the export of another run (`init_from`) of this model'))
  return '## Base model\n\n' + _table(('', ''), [row for row in rows if row[1]])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a Markdown table of cells that are Markdown."""
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _data(card: Card) -> str:
  if not card.sources:
    return ''
  rows = [
    (s.use, _code(s.name), str(s.used), str(s.left_out), _code(s.fingerprint)) for s in card.sources
  ]
  table = _table(('use', 'source', 'used', 'left out', 'SHA-256'), rows)
  return f'## Data\n\n{table}' + (f'\n\n{card.audit}' if card.audit else '')


def _training(card: Card) -> str:
  versions = [(_code(name), _code(version)) for name, version in card.versions.items() if version]
  versions += [('devices', _code(card.devices))] if card.devices else []
  table = '\n\n' + _table(('', 'of the run'), versions) if versions else ''
  return (
    '## Training\n\nThe config, as far as it differs from the defaults. To reproduce the run, save '
    'this as `config.py` in the folder that the relative paths start from (absolute ones are cut '
    f'to their last part), and run the command below.\n\n```python\n{card.config}\n```\n\n'
    f'```bash\npython -m ftjax.train --config=config.py --workdir=runs/again\n```{table}'
  )


def _evaluation(card: Card) -> str:
  if not card.evaluation:
    return ''
  merge = f'The scores are those of the adapter on its base. {card.merge}\n\n' if card.merge else ''
  return f'## Evaluation\n\n{merge}{card.evaluation}'


_LOAD = """path = 'PATH'  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(path)"""
_USES = {
  '': 'print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))',
  'reward': 'print(model(**inputs).logits[0, 0])  # the score',
  'sequence': 'print(model(**inputs).logits[0])  # by label, see id2label of config.json',
  'token': 'print(model(**inputs).logits[0].argmax(-1))  # labels of the tokens, see id2label',
  'span': 'print(model(**inputs))  # where the answer begins and ends',
}
_LABELED = 'A text is read as it stands, with the special tokens that the tokenizer adds.'
# Of tasks: transformers' classes, and the hub's names.
EMBEDDING = 'embedding'  # task of a model of vectors
_CLASSES = {
  '': 'CausalLM',
  'sequence': 'SequenceClassification',
  'token': 'TokenClassification',
  'span': 'QuestionAnswering',
}
_PIPELINES = {
  '': 'text-generation',
  'sequence': 'text-classification',
  'token': 'token-classification',
  'span': 'question-answering',
  EMBEDDING: 'sentence-similarity',
}
_VECTORS = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer('PATH')  # this folder, or its name on the hub
print(model.encode(['A text', 'Another text']))  # vectors of length 1"""


def _loading(card: Card) -> str:
  if card.is_adapter and card.base is None:
    return (
      '## Loading\n\nThe base has random weights, which no folder holds: load the merged model '
      '(`merged/` of the run), or make one with `python -m ftjax.convert --source=WORKDIR`.'
    )
  if card.task == EMBEDDING:
    return f'## Loading\n\n```python\n{_VECTORS}\n```'
  prefix = 'AutoPeftModelFor' if card.is_adapter else 'AutoModelFor'
  name = f'{prefix}{_CLASSES[card.task]}'
  imports = f'from transformers import {name}, AutoTokenizer'
  if card.is_adapter:
    imports = f'from peft import {name}\nfrom transformers import AutoTokenizer'
  if card.task and not card.is_reward:
    inputs, note = "inputs = tokenizer('A text', return_tensors='pt')", _LABELED
  elif card.has_template:
    answer = ", {'role': 'assistant', 'content': 'Hi'}" if card.is_reward else ''
    options = "return_dict=True, return_tensors='pt'"
    options = options if card.is_reward else f'add_generation_prompt=True, {options}'
    inputs = f"""messages = [{{'role': 'user', 'content': 'Hello'}}{answer}]
inputs = tokenizer.apply_chat_template(messages, {options})"""
    note = "The tokenizer's chat template renders messages as in training."
  else:
    inputs = "inputs = tokenizer('Once', return_tensors='pt')"
    note = 'The tokenizer has no chat template: the model was trained on plain text.'
  use = _USES['reward' if card.is_reward else card.task]
  # The base's own config.json has no number of labels, and transformers would make two.
  labels = f', num_labels={card.num_labels}' if card.is_adapter and card.task else ''
  lines = [imports, '', _LOAD, f'model = {name}.from_pretrained(path{labels})', inputs, use]
  return '## Loading\n\n```python\n' + '\n'.join(lines) + f'\n```\n\n{note}'
