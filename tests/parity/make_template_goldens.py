"""Makes tests/parity/golden/templates.json with transformers, in the parity environment (make
parity), from the repository's root:

  PYTHONPATH=tests .venv-parity/bin/python tests/parity/make_template_goldens.py FOLDER

Per template and conversation: ids and assistant mask of the conversation up to each of its
assistant turns, as `apply_chat_template` of a copy with generation tags gives them, the ids of the
prompt of the last turn, and which texts no rendering contains.
"""

import datetime
import hashlib
import json
import sys
from pathlib import Path

import template_cases as cases

REASONING = ('reasoning_content', 'reasoning', 'thinking')


class FixedDate(datetime.datetime):
  """The date that ftjax's `strftime_now` sees."""

  @classmethod
  def now(cls, tz=None):
    return cls(2024, 7, 26)


def digest(ids) -> str:
  return hashlib.sha256(json.dumps(list(map(int, ids))).encode()).hexdigest()[:10]


def runs(mask) -> str:
  """'4-7 12-15' of a mask."""
  padded = [0, *mask, 0]
  edges = [i for i in range(len(mask) + 1) if padded[i] != padded[i + 1]]
  return ' '.join(f'{a}-{b}' for a, b in zip(edges[::2], edges[1::2], strict=True))


def convert_call(call, form):
  function = dict(call['function'])
  if form == 'object' and isinstance(function['arguments'], str):
    function['arguments'] = json.loads(function['arguments'])
  if form == 'text' and not isinstance(function['arguments'], str):
    function['arguments'] = json.dumps(function['arguments'], ensure_ascii=False)
  return call | {'function': function}


def convert(messages, tools, settings):
  """A conversation in the form that its template reads, by what was read in the template."""
  out = []
  for message in messages:
    message = dict(message)
    content = message['content']
    if isinstance(content, list):
      message['content'] = ''.join(part['text'] for part in content)
    elif content is None:
      message['content'] = ''
    if message['role'] == 'developer':
      message['role'] = settings.developer
    thought = next((message.pop(k) for k in REASONING if k in message), None)
    if thought is not None and settings.reasoning == 'parts':
      text = [{'type': 'text', 'text': message['content']}] if message['content'] else []
      message['content'] = [{'type': 'thinking', 'thinking': thought}, *text]
    elif thought is not None:
      message[settings.reasoning or 'reasoning'] = thought
    if 'tool_calls' in message:
      message['tool_calls'] = [convert_call(c, settings.arguments) for c in message['tool_calls']]
    out.append(message)
  if tools and settings.tools == 'function':
    tools = [t if 'function' in t else {'type': 'function', 'function': t} for t in tools]
  if tools and settings.tools == 'bare':
    tools = [t.get('function', t) for t in tools]
  return out, tools


def lost(value, text) -> bool:
  words = cases.leaf_words(value)
  return any(w not in text and json.dumps(w)[1:-1] not in text for w in words)


def vanished(messages, tools, texts) -> list[str]:
  """Places whose texts no rendering contains: 'messages[1].reasoning_content', 'tools[0]'."""
  found = []
  text = '\n'.join(texts)
  for i, message in enumerate(messages):
    for key, value in message.items():
      if key == 'tool_calls':
        value = [c['function'] for c in value]
        value = [[f['name'], f['arguments']] for f in value]
      elif key in ('role', 'tool_call_id', 'name'):
        continue
      elif isinstance(value, list):  # thinking and text parts
        value = [p.get('thinking', p.get('text')) for p in value]
      if lost(value, text):
        found.append(f'messages[{i}].{key}')
  for i, tool in enumerate(tools or []):
    f = tool.get('function', tool)
    properties = f['parameters']['properties']
    facts = [f['name'], f['description'], list(properties)]
    facts += [[p.get('description', ''), p.get('enum', [])] for p in properties.values()]
    if lost(facts, text):
      found.append(f'tools[{i}]')
  return found


def cell(tokenizer, name, conversation):
  messages, tools, kwargs = conversation
  messages, tools = convert(messages, tools, cases.SETTINGS[name])
  tagged, plain = cases.source(name, True), cases.source(name)
  common = {'tools': tools, 'return_dict': True, **(kwargs or {})}
  ends = [k + 1 for k, m in enumerate(messages) if m['role'] == 'assistant']
  prefixes, texts = [], []
  try:
    for end in ends:
      found = tokenizer.apply_chat_template(
        messages[:end], chat_template=tagged, return_assistant_tokens_mask=True, **common
      )
      bare = tokenizer.apply_chat_template(messages[:end], chat_template=plain, **common)
      assert found['input_ids'] == bare['input_ids'], name
      ids, mask = found['input_ids'], list(found['assistant_masks'])
      twice = len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id
      ids, mask = ids[twice:], mask[twice:]
      prefixes.append([digest(ids), runs(mask)])
      texts.append(tokenizer.decode(bare['input_ids']))
    prompt = tokenizer.apply_chat_template(
      messages[: ends[-1] - 1], chat_template=plain, add_generation_prompt=True, **common
    )['input_ids']
  except Exception as error:  # what the template or jinja says
    return {'error': str(error)[:60]}
  return {
    'turns': prefixes,
    'prompt': digest(prompt[twice:]),
    'lost': vanished(messages, tools, texts),
  }


def main(target: Path) -> None:
  # Here, so that the tests can use `digest` and `runs` without transformers.
  import transformers
  from tokenizers import Tokenizer
  from transformers.utils import chat_template_utils

  chat_template_utils.datetime = FixedDate
  out = {}
  for name, settings in cases.SETTINGS.items():
    tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=Tokenizer.from_str(cases.files(name)['tokenizer.json'].decode()),
      bos_token=settings.bos,
      eos_token=settings.eos,
      clean_up_tokenization_spaces=False,
    )
    out[name] = {k: cell(tokenizer, name, c) for k, c in cases.CONVERSATIONS.items()}
  lines = [f' {json.dumps(n)}: {json.dumps(c, separators=(",", ":"))}' for n, c in out.items()]
  (target / 'templates.json').write_text('{\n' + ',\n'.join(lines) + '\n}\n')
  cells = [c for t in out.values() for c in t.values()]
  print(transformers.__version__, len(cells), 'cells', sum('error' in c for c in cells), 'refused')


if __name__ == '__main__':
  main(Path(sys.argv[1]))
