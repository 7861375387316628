"""What a run prints: text from numbers, nothing else."""

import math

import pytest

from ftjax.config import keys
from ftjax.experiment import summary
from ftjax.telemetry import console
from ftjax.telemetry.console import Console, Headline

PAIRS = Headline(('loss', 'rewards/accuracy'), ('accuracy', 'margin', 'loss'), larger=True)
REWARDS = Headline(('reward', 'length'), ('reward',), larger=True, from_rollouts=True)


def values(loss=1.0, signal=True, no_signal=0, **rest):
  return {
    'loss': loss,
    'tokens': 100,
    'has_signal': signal,
    'no_signal': no_signal,
    'skipped': 0,
  } | rest


@pytest.mark.parametrize(
  ('got', 'text'),
  [
    (console.count(11397), '11,397'),
    (console.size(900), '900 B'),
    (console.size(7 * 2**20), '7 MiB'),
    (console.size(1.25 * 2**30), '1.25 GiB'),
    (console.size(1001 * 2**20), '0.978 GiB'),
    (console.duration(12.34), '12.3 s'),
    (console.duration(59.99), '1 min 00 s'),
    (console.duration(185), '3 min 05 s'),
    (console.duration(7500), '2 h 05 min'),
    (console.parameters(90_624), '90,624'),
    (console.parameters(135_000_000), '135.00 M'),
    (console.parameters(1_240_000_000), '1.24 B'),
    (console.figure('loss', 1.23456), '1.2346'),
    (console.figure('loss', 1e-5), '1e-05'),
    (console.figure('eval/accuracy', 0.975), '97.5 %'),
    (console.change('loss', 1.0, 1.25), '-0.2500'),
    (console.change('accuracy', 0.98, 0.95), '+3.0'),
    (console.visible('a\nb\r\nc\td\x1b[31m'), 'a⏎b⏎c d [31m'),
    (console.visible('x' * 200, 10), 'xxxxxxx...'),
    (console.sample(20, '7 + 5 =', '12\n\n'), 'sample  step 20  7 + 5 = -> 12⏎⏎'),
    (console.sample(20, 'say\nit', ''), 'sample  step 20  say⏎it -> (empty)'),
    (console.not_updated(0, 0), ''),
    (console.devices('cpu', 8, 1, {'data': 1, 'fsdp': 8}), '8 x cpu; mesh: fsdp=8'),
    (console.devices('TPU v5e', 1, 1, {'data': 1}), '1 x TPU v5e; mesh: one device'),
  ],
)
def test_numbers_as_people_read_them(got, text):
  assert got == text


def test_a_block_has_no_empty_rows_and_no_repeated_labels():
  rows = [('data', 'one'), ('data', ''), ('data', 'two'), ('steps', 'three')]
  assert console.block('training', rows).split('\n') == [
    'training',
    '  data       one',
    '             two',
    '  steps      three',
  ]


def test_the_start_shows_data_steps_and_model():
  data = console.Data(367, 11335, 1058, 184, 'packed sequences', 0.963, 64, 33, 1010, 12)
  assert [text for _, text in data.rows()] == [
    'train: 367 examples, 11,335 tokens (9.3% supervised); 12 left out',
    '184 packed sequences of 64 tokens per epoch, 96.3% token utilization',
    'eval: 33 examples, 1,010 tokens',
  ]
  prompts = console.Data(400, 11121, None, 400, 'prompts', None, 64, 0, 0, 0)
  assert [text for _, text in prompts.rows()] == [
    'train: 400 prompts, 11,121 tokens',
    '',
    'eval: none',
  ]
  plan = console.Plan('sft', 600, 40, 184, 8, 'packed sequences', 2, 512)
  assert [text for _, text in plan.rows()] == [
    'sft: 600 steps = 26.09 epochs of 23 steps; 40 of them are done',
    'batch: 8 packed sequences per step over all devices, at most 512 tokens, in 2 micro-batches',
  ]
  plan = console.Plan('ppo', 48, 0, 400, 8, 'prompts', 1, 8192, updates=2, completions=16)
  assert plan.rows()[1][1] == 'batch: 8 prompts x 16 completions per rollout, 2 steps on each'
  model = console.Model('m', 'llama', 2, 1000, 24, 'float32', 'bfloat16', ('a value model',))
  assert model.text() == (
    'm: llama, 2 layers; 1,000 parameters trained, 24 frozen; float32 parameters, bfloat16 '
    'compute; with a value model'
  )


def test_the_line_of_the_compiled_step():
  assert console.compiled(6.2, '0 hits, 1 misses', None, None) == (
    'step compiled in 6.2 s; compile cache: 0 hits, 1 misses'
  )
  told = console.compiled(90, '1 hits', 3 * 2**30, 16 * 2**30)
  assert told.endswith('expected peak memory of a step: 3 GiB per device of 16 GiB')


@pytest.mark.parametrize(
  ('headline', 'row', 'bar'),
  [
    (Headline(), values(0.5), {'loss': '0.5000'}),
    (
      PAIRS,
      values(0.5) | {'rewards/accuracy': 0.75, 'rewards/margin': 0.3},
      {'loss': '0.5000', 'accuracy': '75.0%'},
    ),
  ],
)
def test_the_bar_shows_what_counts_for_the_algorithm(headline, row, bar):
  assert Console(headline).bar(row) == bar


def test_the_bar_of_rollouts_shows_their_reward_not_the_loss():
  c = Console(REWARDS)
  assert c.bar(values(0.1)) == {}
  c.rollout({'reward': 0.25, 'length': 9.5})
  assert c.bar(values(0.1)) == {'reward': '0.2500', 'length': '9.5000'}


def evaluations(c, key, numbers):
  return [c.evaluation(10 * i, {key: x}) for i, x in enumerate(numbers, 1)]


def test_an_evaluation_shows_its_change_and_the_best_so_far():
  lines = [line for line, _ in evaluations(Console(Headline()), 'loss', [2.0, 1.5, 1.75, 1.5])]
  assert lines == [
    'eval  step 10  loss 2.0000',
    'eval  step 20  loss 1.5000 (-0.5000); best so far',
    'eval  step 30  loss 1.7500 (+0.2500); best 1.5000 at step 20',
    'eval  step 40  loss 1.5000 (-0.2500); equal to the best, of step 20',
  ]


def test_of_pairs_accuracy_counts_and_larger_is_better():
  c = Console(PAIRS)
  row = {'accuracy': 0.9, 'accuracy_low': 0.8, 'accuracy_high': 0.95, 'margin': 1.0, 'loss': 0.4}
  assert c.evaluation(10, row)[0] == (
    'eval  step 10  accuracy 90.0 % [80.0, 95.0], margin 1.0000, loss 0.4000'
  )
  assert c.evaluation(20, row | {'accuracy': 0.95})[0].endswith('best so far')
  assert 'best 95.0 % at step 20' in c.evaluation(30, row)[0]


def test_the_watched_metric_decides_what_is_best():
  c = Console(PAIRS, 'eval/loss', 'min')
  c.evaluation(10, {'accuracy': 0.9, 'loss': 0.5})
  assert c.evaluation(20, {'accuracy': 0.8, 'loss': 0.4})[0].endswith('best so far')


def test_nothing_measured_is_no_line():
  assert Console(Headline()).evaluation(10, {}) == ('', [])


@pytest.mark.parametrize(
  ('metric', 'remedy'),
  [('', 'set checkpoint.best_metric=eval/loss'), ('eval/loss', 'will be exported')],
)
def test_a_rising_eval_loss_is_warned_of_once(metric, remedy):
  found = evaluations(Console(Headline(), metric), 'loss', [2, 1, 1.2, 1.1, 1.3, 1.4, 1.5])
  warnings = [text for _, texts in found for text in texts]
  assert len(warnings) == 1 and remedy in warnings[0]
  assert 'for 3 evaluations in a row' in warnings[0] and warnings[0].startswith('step 50')


@pytest.mark.parametrize('losses', [[2, 1, 1.2, 1.1, 0.9, 1.2, 1.1], [3, 2, 2, 2, 2, 2], [1]])
def test_a_loss_that_recovers_is_not_warned_of(losses):
  assert not any(texts for _, texts in evaluations(Console(Headline()), 'loss', losses))


def test_nan_is_never_the_best():
  found = evaluations(Console(Headline()), 'loss', [math.nan, 1.0, math.nan])
  assert 'nan' in found[0][1][0] and 'best' not in found[1][0]
  assert 'best 1.0000 at step 20' in found[2][0]


def test_a_spike_of_the_loss_is_warned_of_once():
  c = Console(Headline())
  losses = [2 - i / 50 + 0.05 * (-1) ** i for i in range(50)] + [9.0, 8.0, *[1.0] * 9]
  told = [text for i, x in enumerate(losses, 1) for text in c.step(i, values(x))]
  assert len(told) == 1 and told[0].startswith('step 51: loss 9.0000') and 'optim.lr' in told[0]


@pytest.mark.parametrize(
  'losses', [[5 / (i + 1) for i in range(80)], [0.5 + i % 2 for i in range(80)]]
)
def test_a_usual_loss_is_no_spike(losses):
  c = Console(Headline())
  assert not [text for i, x in enumerate(losses, 1) for text in c.step(i, values(x))]


def test_a_loss_of_exactly_zero_is_warned_of():
  c = Console(PAIRS)
  told = [c.step(i, values(0.0)) for i in range(1, 9)]
  assert [bool(t) for t in told] == [False] * 4 + [True] + [False] * 3
  assert 'exactly 0 for 5 steps' in told[4][0]


def test_steps_without_signal_are_warned_of_at_powers_of_ten():
  c = Console(REWARDS)
  told = [c.step(i, values(0.0, signal=False, no_signal=i)) for i in range(1, 12)]
  assert [i for i, t in enumerate(told, 1) if t] == [1, 10]
  assert 'the weights are not updated' in told[0][0] and c.state['no_signal'] == 11


def test_a_step_that_is_not_finite():
  row = values(math.nan) | {'grad_norm': math.inf, 'bad_streak': 2, 'skipped': 5}
  assert Console(Headline()).not_finite(7, row, 3) == (
    'step 7: loss nan, gradient norm inf: not finite, the update is skipped (2 in a row; '
    'max_bad_steps=3 end the run)'
  )


def test_the_end_shows_the_best_step_and_the_final_metrics():
  c = Console(PAIRS)
  c.step(30, values(0.02) | {'rewards/accuracy': 1.0})
  c.evaluation(10, {'accuracy': 0.98, 'loss': 0.5})
  c.evaluation(20, {'accuracy': 0.95, 'loss': 0.5})
  assert c.final() == 'train loss 0.0200, accuracy 100.0 %; eval accuracy 95.0 %, loss 0.5000'
  assert c.best(20, 20) == (
    'step 20, the last one; the best eval accuracy was 98.0 % at step 10 '
    '(checkpoint.best_metric=eval/accuracy with checkpoint.best_mode=max would export that)'
  )
  watched = Console(PAIRS, 'eval/accuracy', 'max')
  watched.restore(c.state)
  assert watched.best(10, 20) == 'step 10, of the best eval/accuracy (98.0 %)'
  c.evaluation(30, {'accuracy': 0.99, 'loss': 0.5})
  assert c.best(30, 30) == 'step 30, the last one'


def test_the_end_of_rollouts_shows_the_reward():
  c = Console(REWARDS)
  for reward in (-0.9, -0.5, 0.25):
    c.rollout({'reward': reward})
  assert c.final() == 'reward 0.2500 (first -0.9000)'
  assert Console(Headline()).final() == ''  # exported again, without a step


def test_a_resumed_run_compares_with_earlier_values():
  first, second = Console(Headline()), Console(Headline())
  first.evaluation(10, {'loss': 1.0})
  first.step(10, values())
  second.restore(dict(first.state))
  assert second.evaluation(20, {'loss': 1.5})[0] == (
    'eval  step 20  loss 1.5000 (+0.5000); best 1.0000 at step 10'
  )
  second.step(20, values())
  assert second.state['tokens'] == 200


def test_the_prompt_of_the_next_command_is_one_line():
  assert summary.typed_prompt(('a\n\nb', 'a b')) == "'a b'"
  assert summary.typed_prompt(('a\nb',)) == 'Hello' and summary.typed_prompt(()) == ''


def test_the_next_commands():
  flags = ['--config=tiny_sft', '--workdir=w']
  assert console.next_commands('w', '', "'a b'", flags, True) == [
    ('next', "python -m ftjax.generate --model=w --prompt='a b'"),
    ('next', 'python -m ftjax.evaluate --config=tiny_sft --workdir=w'),
  ]
  ((_, text),) = console.next_commands('w', 'w/export', '', flags, False)
  assert 'rollout.reward_model=w/export' in text
  ((_, text),) = console.next_commands('a run', '', '', flags, False)
  assert text == "python -m ftjax.generate --model='a run'"


@pytest.mark.parametrize(
  ('changes', 'evaluation', 'larger'),
  [
    ({}, 'loss', False),
    ({'algorithm': 'dpo'}, 'accuracy', True),
    ({'algorithm': 'dpo', 'dpo.loss': 'kto'}, 'loss', False),
    ({'algorithm': 'reward_model'}, 'accuracy', True),
    ({'algorithm': 'reward_model', 'reward_model.objective': 'scores'}, 'loss', False),
    ({'algorithm': 'grpo'}, 'reward', True),
    ({'algorithm': 'online_dpo'}, 'reward', True),
  ],
)
def test_the_headline_of_an_algorithm(changes, evaluation, larger):
  c = keys.default()
  c.update_from_flattened_dict(changes)
  found = summary.headline(c)
  assert (found.evaluation[0], found.larger) == (evaluation, larger)
