"""Reward functions as people write them for TRL run unchanged; wrong results are refused by name.

`TRL` is a module of a user; all its functions run in one set of workers, on conversations.
"""

import textwrap

import numpy as np
import pytest

from ftjax.grading import worker
from ftjax.grading.reward_batch import Batch
from ftjax.grading.rewards import Rewards, parse
from ftjax.runtime.errors import ConfigError

TRL = '''
import asyncio, functools, math, re
import numpy as np

def accuracy_reward(completions: list[list[dict[str, str]]], solution: list[str], **kwargs):
  """None where the solution cannot be parsed."""
  rewards = []
  contents = [completion[0]["content"] for completion in completions]
  for content, sol in zip(contents, solution, strict=True):
    found = re.findall(r"\\\\boxed\\{([^{}]*)\\}", content)
    gold = re.fullmatch(r"-?[0-9]+", sol.strip())
    rewards.append(None if gold is None else float(bool(found) and found[-1] == gold.group()))
  return rewards

def format_reward(completions, **kwargs):
  pattern = r"^<think>.*?</think>\\s*<answer>.*?</answer>$"
  contents = [completion[0]["content"] for completion in completions]
  return [1.0 if re.match(pattern, c, re.DOTALL) else 0.0 for c in contents]

def soft_format(prompts, completions, **kwargs) -> list[float]:
  responses = [completion[0]['content'] for completion in completions]
  return [0.5 if "<answer>" in r else 0.0 for r in responses]

def length_reward(completion_ids, **kwargs):
  return [-float(len(ids)) for ids in completion_ids]

def character_length(completions, **kwargs):
  return [float(len(c[-1]["content"])) for c in completions]

def correctness_reward_func(prompts, completions, answer, **kwargs) -> list[float]:
  q = prompts[0][-1]['content']
  assert prompts[0][0]['role'] == 'system' and q == 'What is 60 + 12?', prompts
  return [2.0 if a in c[0]['content'] else 0.0 for c, a in zip(completions, answer)]

def count_xml(text) -> float:
  return 0.125 * sum(text.count(t) == 1 for t in ("<think>", "</think>", "<answer>", "</answer>"))

def xmlcount_reward_func(completions, **kwargs) -> list[float]:
  return [count_xml(c[0]["content"]) for c in completions]

def by_kwargs(**kwargs):
  rows = zip(kwargs["completions"], kwargs["answer"], kwargs["difficulty"])
  return [d if a in c[0]["content"] else 0 for c, a, d in rows]

def all_columns(completions, **kwargs):
  assert {'answer', 'solution', 'difficulty', 'task'} <= set(kwargs), kwargs
  assert 'token_counts' not in kwargs
  return [len(kwargs['task'])] * len(completions)

async def async_reward(completions, **kwargs):
  async def one(content):
    await asyncio.sleep(0)
    return float(len(content) > 20)
  return await asyncio.gather(*[one(c[0]["content"]) for c in completions])

def get_cosine_scaled_reward(max_len=100, top=1.0):
  def cosine_scaled_reward(completions, solution, **kwargs):
    return [top * math.cos(min(len(c[0]["content"]) / max_len, 1) * math.pi) for c in completions]
  return cosine_scaled_reward

cosine = get_cosine_scaled_reward(max_len=1e9)

def ngram_penalty(completions, ngram_size, max_penalty, **kwargs):
  return [max_penalty * ngram_size] * len(completions)

repetition = functools.partial(ngram_penalty, ngram_size=3, max_penalty=-1.0)

class Evaluator:
  __name__ = "judge"
  def __init__(self, bonus):
    self.bonus = bonus
  def __call__(self, prompts, completions, **kwargs):
    return np.array([self.bonus] * len(completions))
  def method(self, completions, **kwargs):
    return tuple(self.bonus for _ in completions)

judge = Evaluator(0.25)

class AsyncJudge:
  async def __call__(self, completions, **kwargs):
    return [7] * len(completions)

async_judge = AsyncJudge()

def of_one_task(completions, task, **kwargs):
  """For rows of several tasks: None where it does not apply."""
  return [1.0 if t == "math" else None for t in task]

def curriculum(completions, trainer_state=None, **kwargs):
  return [trainer_state.global_step / trainer_state.max_steps] * len(completions)

def logs(completions, answer, log_extra=None, log_metric=None, **kwargs):
  if log_extra:
    log_extra("gold", list(answer))
  if log_metric:
    log_metric("accuracy", 0.5)
    log_metric("accuracy", 1.0)
  return [True, False, np.float32(0.5), np.int64(1)]
'''
# The thought of the last is in no tags.
TEXTS = (
  '<think>60 + 12</think><answer>\\boxed{72}</answer>',
  '<answer>\\boxed{71}</answer>',
  '72',
  '',
)
WANTED = {
  'accuracy_reward': [1, 0, None, 0],
  'format_reward': [1, 0, 0, 0],
  'soft_format': [0.5, 0.5, 0, 0],
  'length_reward': [-4, -3, -2, -1],
  'character_length': [len(t) for t in TEXTS],
  'correctness_reward_func': [2, 0, 2, 0],
  'xmlcount_reward_func': [0.5, 0.25, 0, 0],
  'by_kwargs': [1, 0, 3, 0],
  'all_columns': [4] * 4,
  'async_reward': [1, 1, 0, 0],
  'cosine': [1] * 4,
  'repetition': [-3] * 4,
  'judge': [0.25] * 4,
  'judge.method': [0.25] * 4,
  'async_judge': [7] * 4,
  'of_one_task': [1, 1, None, None],
  'curriculum': [0.25] * 4,
  'logs': [1, 0, 0.5, 1],
}


def conversations(**columns):
  messages = [
    {'role': 'system', 'content': 'Add.'},
    {'role': 'user', 'content': 'What is 60 + 12?'},
  ]
  return Batch(
    prompts=['<|im_start|>..'] * 4,
    completions=TEXTS,
    prompt_ids=[[1]] * 4,
    token_ids=[[1] * n for n in (4, 3, 2, 1)],
    is_truncated=[False] * 4,
    columns=columns,
    given=[messages] * 4,
    state={'global_step': 2, 'max_steps': 8, 'epoch': 0.5},
  )


COLUMNS = {
  'answer': ['72'] * 4,
  'solution': ['72', '72', 'x = y', '72'],
  'difficulty': [1, 2, 3, 4],
  'task': ['math', 'math', 'code', None],
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('functions')
  (folder / 'trl_rewards.py').write_text(TRL)
  return folder


@pytest.fixture(autouse=True)
def on_the_path(folder, monkeypatch):
  monkeypatch.syspath_prepend(str(folder))


def test_functions_written_for_trl_run_unchanged():
  batch = conversations(**COLUMNS)
  with Rewards(parse([f'trl_rewards:{name}' for name in WANTED]), tuple(COLUMNS)) as rewards:
    scores = rewards.score(batch)
  assert not any(scores.failures.values()), scores.reasons
  for column, (name, wanted) in zip(scores.parts.T, WANTED.items(), strict=True):
    expected = np.float32([np.nan if x is None else x for x in wanted])
    np.testing.assert_allclose(column, expected, atol=1e-6, err_msg=name)
  # None is left out of a completion's sum; 3 of 4 completions have an accuracy, of which one is 1.
  np.testing.assert_allclose(scores.total, np.nansum(scores.parts.astype(np.float64), 1), rtol=1e-5)
  metrics = scores.metrics()
  assert metrics['reward/accuracy_reward'] == pytest.approx(1 / 3)
  assert metrics['reward/accuracy_reward/skipped'] == 0.25
  assert metrics['reward/logs/accuracy'] == 0.75 and scores.extra == {'gold': ['72'] * 4}


OTHERS = """
def completions_are_texts(prompts, completions, **kwargs):
  return [float(p == 'question' and isinstance(c, str)) for p, c in zip(prompts, completions)]
def ours(completions, token_ids, token_counts, is_truncated, level=5):
  return [len(i) + n + t + level for i, n, t in zip(token_ids, token_counts, is_truncated)]
def nothing(completions, **kwargs): return [None] * len(completions)
def generates(completions): return (float(len(c)) for c in completions)
def yields(completions):
  for c in completions:
    yield 1.0
def generates_too_few(completions): return (1.0 for _ in completions[1:])
def is_a_dict(completions): return {0: 1.0, 1: 2.0}
def is_a_set(completions): return {1.0, 2.0}
def keys(completions): return {1.0: 'a', 2.0: 'b'}.keys()
def is_a_text(completions): return '12'
def is_bytes(completions): return b'12'
def holds_texts(completions): return ['1', '2']
def is_a_matrix(completions):
  import numpy as np
  return np.zeros((2, 1))
def is_nested(completions): return [[1.0], [2.0]]
def is_a_number(completions): return 1.0
async def never_ends(completions):
  return {1.0, 2.0}
def positional(completions, /): return [1.0, 1.0]
def is_huge(completions): return [10**400] * 2
def has_lines(completions): raise RuntimeError('first\\nsecond\\x1b[31m')
def logs_nan(completions, log_extra):
  log_extra('margin', [float('nan'), float('-inf')])
  return [1, 2]
def logs_too_few(completions, log_extra):
  log_extra('margin', [1.0])
  return [1, 2]
def logs_a_known_name(completions, log_extra):
  log_extra('reward', [1.0, 2.0])
  return [1, 2]
"""


@pytest.fixture
def others(folder):
  (folder / 'other_rewards.py').write_text(textwrap.dedent(OTHERS))


def run(name, **values):
  function = worker.Function(f'other_rewards:{name}')
  return function.run({'completions': ['a', 'bcd']} | values, 2, {})['scores']


@pytest.mark.parametrize(
  ('name', 'match'),
  [('is_a_dict', 'returned dict'), ('is_a_set', 'returned set'), ('keys', 'returned dict_keys'),
   ('is_a_text', "returned str '12'"), ('is_bytes', 'returned bytes'),
   ('holds_texts', "returned '1' for completion 0"), ('is_a_matrix', r'the shape \(2, 1\)'),
   ('is_nested', 'for completion 0'), ('is_a_number', 'returned float'),
   ('is_huge', 'returned .10000+'),
   ('generates_too_few', '1 scores for 2 completions'), ('never_ends', 'returned set')],
)  # fmt: skip
def test_what_is_no_list_of_numbers_is_refused(others, name, match):
  with pytest.raises(worker.Wrong, match=match):
    run(name)


def test_forms_of_results_that_are_taken(others):
  assert run('generates') == [1, 3] and run('yields') == [1, 1]
  assert run('nothing') == [None, None]
  with pytest.raises(worker.Wrong, match='taken by name'):
    run('positional')


def test_a_failure_is_one_line(others):
  with pytest.raises(worker.Failed) as error:
    run('has_lines')
  assert str(error.value).startswith('RuntimeError: first⏎second [31m (')


def test_extra_columns_are_json_and_never_vanish(others):
  """Samples are JSON lines, which have no NaN."""
  function = worker.Function('other_rewards:logs_nan')
  found = function.run({'completions': ['a', 'b']}, 2, {})
  assert found['extra'] == {'margin': ['nan', '-inf']}
  for name, match in (('logs_too_few', '1 values for 2'), ('logs_a_known_name', 'rename it')):
    with pytest.raises(worker.Failed, match=match):
      run(name)


def test_text_prompts_come_as_texts_and_our_own_names_stay(others):
  columns = {'answer': ['1', '2'], 'when': [{1}, {2}]}
  batch = Batch(
    prompts=['<s>question'] * 2,
    completions=['a', 'bcd'],
    prompt_ids=[[1]] * 2,
    token_ids=[[1], [1, 2, 3]],
    is_truncated=[False, True],
    columns=columns,
    given=['question'] * 2,
  )
  spec = ['completions_are_texts', 'ours', 'nothing']
  with Rewards(parse([f'other_rewards:{s}' for s in spec]), tuple(columns)) as rewards:
    scores = rewards.score(batch)
  np.testing.assert_array_equal(scores.parts[:, 0], [1, 1])
  np.testing.assert_array_equal(scores.parts[:, 1], [7, 12])
  assert np.isnan(scores.parts[:, 2]).all() and np.isfinite(scores.total).all()


def test_a_dict_ends_the_run_with_the_functions_name(others):
  refused = pytest.raises(ConfigError, match='other_rewards:is_a_dict returned dict')
  with Rewards(parse('other_rewards:is_a_dict'), ()) as rewards, refused:
    rewards.score(conversations())


def test_a_total_of_none_is_no_number():
  scores = Rewards(parse('trl_rewards:of_one_task'), ('task',))
  with scores:
    found = scores.score(conversations(task=['code', 'code', 'math', None]))
  assert np.isnan(found.total[[0, 1, 3]]).all() and found.total[2] == 1
  assert found.metrics()['reward'] == 1
