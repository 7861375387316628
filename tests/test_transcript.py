"""Special tokens that carry content reach the rewards; stop texts stop, or are refused."""

import json

import pytest
import tokenizers
from tiny_tokenizer import CHATML, tiny_files

from ftjax.data import encode, stop_texts
from ftjax.data.formats import Chat
from ftjax.data.prompts import Prompt
from ftjax.data.tokenizer import Tokenizer
from ftjax.experiment.transcript import Transcripts
from ftjax.generation.completion import Completion, stops
from ftjax.grading.verifiers import build
from ftjax.runtime.errors import ConfigError

TAGS = ('<think>', '</think>', '<answer>', '</answer>', '<tool_call>', '<|eot|>', '<pad>')
THINKS = CHATML.replace('assistant\n', 'assistant\n<think>\n')


def tokenizer(template=CHATML, tags=TAGS):
  return Tokenizer(tiny_files(template, extra_special=tags))


def text_of(tokenizer, written, stops=()):
  ids = tokenizer.encode(written)
  return Transcripts(tokenizer, (*tokenizer.stop_ids, *stops)).completion(ids)


def test_special_tags_stay_and_turn_tokens_go():
  t = tokenizer()
  written = '<think>a b</think>\n<answer>1</answer><|im_end|>'
  assert set(TAGS) <= {t.token(i) for i in t.special_ids}
  assert text_of(t, written) == '<think>a b</think>\n<answer>1</answer>'
  assert build('format', 'think,answer').score(text_of(t, written)) == 1
  assert text_of(t, '<tool_call>{}<|im_start|>x<|endoftext|>') == '<tool_call>{}x<|endoftext|>'
  assert text_of(t, 'a<|eot|>', t.encode('<|eot|>')) == 'a', 'a stop token of its own'
  assert text_of(t, 'a</answer>', t.encode('</answer>')) == 'a</answer>', 'a stop that is content'


@pytest.mark.parametrize('tags', [TAGS, ()])
def test_the_prompts_thought_is_seen_whether_its_tag_is_special_or_not(tags):
  t = tokenizer(THINKS, tags)
  messages = [{'role': 'user', 'content': '60 + 12?'}]
  prompt = Prompt(
    encode.encode_prompt(Chat(tuple(messages), None), t), {'answer': '72'}, 'a:1', messages
  )
  written = ['so 72', 'so 72.\n</think>\n<answer>72</answer><|im_end|>']
  pairs = [(prompt, Completion(t.encode(w), None, False)) for w in written]
  batch = Transcripts(t, t.stop_ids).batch(pairs, {})
  assert batch.prompts[0].endswith('<think>\n') and batch.as_given('prompts') == [messages] * 2
  assert batch.as_given('completions')[1] == [
    {'role': 'assistant', 'content': 'so 72.\n</think>\n<answer>72</answer>'}
  ]
  m, f = build('math', 'symbolic=off'), build('format', 'think,answer')
  rows = list(zip(batch.completions, batch.prompts, batch.values('answer'), strict=True))
  assert [m.score(*row) for row in rows] == [f.score(*row[:2]) for row in rows] == [0, 1]


def test_columns_that_not_every_row_has_are_none():
  t = tokenizer()
  prompts = [Prompt([5], columns, f'a:{i}', 'q') for i, columns in enumerate(({'x': 1}, {'y': 2}))]
  pairs = [(p, Completion([7], None, False)) for p in prompts]
  batch = Transcripts(t, t.stop_ids).batch(pairs, {})
  assert batch.values('x') == [1, None] and batch.values('y') == [None, 2]
  assert batch.as_given('prompts') == ['q', 'q'] and batch.as_given('completions')[0] == t.token(7)


@pytest.mark.parametrize(
  ('text', 'written', 'kept'),
  [('<|eot|>', 'a b<|eot|>c', 'a b'), ('</answer>', '1</answer>2', '1'), ('b c', 'a b c d', 'a '),
   ('fox', 'a quick brown foxes', 'a quick brown '), ('\n\n', 'a\n\nb', 'a')],
)  # fmt: skip
def test_a_stop_text_stops_where_it_stands(text, written, kept):
  t = tokenizer()
  ended, ids = stops((text,), t), t.encode(written)
  first = next(n for n in range(1, len(ids) + 1) if ended(ids[:n]))
  assert text in t.decode(ids[:first], skip_special=False)
  assert not ended(ids[: first - 1])
  assert stop_texts.text_before(ids, (text, 'never'), t) == kept
  assert stop_texts.text_before(ids, ('never',), t) == t.decode(ids)
  stop_texts.check((text,), t, 8, 'rollout.stop')


def test_stops_of_one_special_token_end_a_completion_on_the_device():
  t = tokenizer()
  found = stop_texts.token_ids(('<|eot|>', '\n', '<|eot|>x', '</answer>'), t)
  assert [t.token(i) for i in found] == ['<|eot|>', '</answer>']


def words_only():
  """A tokenizer that writes lower-case words and nothing else."""
  model = tokenizers.models.WordLevel({'[UNK]': 0, 'a': 1, 'stop': 2, '</s>': 3}, unk_token='[UNK]')
  tokens = tokenizers.Tokenizer(model)
  tokens.normalizer = tokenizers.normalizers.Lowercase()
  tokens.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokens.add_special_tokens(['</s>'])
  config = json.dumps({'eos_token': '</s>'}).encode()
  return Tokenizer({'tokenizer.json': tokens.to_str().encode(), 'tokenizer_config.json': config})


@pytest.mark.parametrize(
  ('make', 'text', 'match'),
  [(tokenizer, '', 'empty text'), (words_only, 'STOP', "produces 'S'"),
   (words_only, 'stop\n', r"produces '\\n'"), (words_only, '停', '停'),
   (tokenizer, 'x1' * 400, '800 characters')],
)  # fmt: skip
def test_a_stop_that_cannot_occur_is_refused(make, text, match):
  with pytest.raises(ConfigError, match=match) as e:
    stop_texts.check(('a', text), make(), 8, '--stop')
  assert str(e.value).startswith('--stop')


def test_stops_that_can_occur_are_taken():
  stop_texts.check(('stop', '</s>', 'a'), words_only(), 1, '--stop')
  stop_texts.check(('停', '🙂', '\n', ' ', '</answer>', 'STOP'), tokenizer(), 64, '--stop')
