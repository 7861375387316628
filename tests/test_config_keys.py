"""docs/config_keys.md, and the table of names that other tools use."""

import collections
import pathlib
import runpy

import pytest

from ftjax.config import hints, keys, section

ROOT = pathlib.Path(__file__).resolve().parents[1]
MADE = runpy.run_path(str(ROOT / 'docs' / 'make_config_keys.py'))
KEYS = list(section.flat(keys.default()))
NAMES = [name for names, _, _ in hints.ROWS for name in names]


def test_the_table_of_keys_is_up_to_date():
  """Run python docs/make_config_keys.py."""
  assert (ROOT / 'docs' / 'config_keys.md').read_text() == MADE['document']()


def test_every_key_has_a_meaning_and_one_row():
  meanings, text = MADE['described'](), MADE['document']()
  for key in KEYS:
    assert len(meanings[key]) > 5, key
    assert text.count(f'\n| `{key}` | ') == 1, key


def test_comments_belong_to_their_keys():
  text = (
    'def default():\n'
    '  # of the section\n'
    '  c.a = Section()\n'
    '  c.a.x = 1  # at the end\n'
    '  # above,\n'
    '  # two lines\n'
    '  c.a.y = 2\n'
    '  c.a.z = (\n'
    '    3  # inside\n'
    '  )\n'
    '  c.a.none = 4\n'
  )
  assert MADE['comments'](text) == {
    'c.a': 'of the section',
    'c.a.x': 'at the end',
    'c.a.y': 'above, two lines',
    'c.a.z': 'inside',
    'c.a.none': '',
  }


def test_every_name_of_another_tool_leads_to_a_key_that_exists():
  assert len(hints.ROWS) >= 80
  assert not [name for name, n in collections.Counter(NAMES).items() if n > 1]
  assert not set(NAMES) & set(KEYS)
  for names, key, note in hints.ROWS:
    assert names and (key in KEYS if key else note), names


@pytest.mark.parametrize(
  ('typed', 'key'),
  [
    ('optim.learning_rate', 'optim.lr'),
    ('max_steps', 'steps'),
    ('per_device_train_batch_size', 'batch_size'),
    ('gradient_accumulation_steps', 'grad_accum'),
    ('model.name', 'model.path'),
    ('num_train_epochs', 'epochs'),
    ('warmup_ratio', 'optim.warmup_steps'),
    ('lr_scheduler_type', 'optim.schedule'),
    ('reduce_lr_on_plateau', 'optim.plateau_factor'),
    ('lr_patience', 'optim.plateau_patience'),
    ('model_name_or_path', 'model.path'),
    ('trainer.max_steps', 'steps'),
    ('train.learning-rate', 'optim.lr'),
    ('numTrainEpochs', 'epochs'),
    ('optim.beta1', 'optim.b1'),
    ('cutoff_len', 'seq_len'),
    ('sequence_len', 'seq_len'),
    ('dataset_name', 'data.train'),
    ('bf16', 'model.compute_dtype'),
    ('save_total_limit', 'checkpoint.keep'),
    ('logging_steps', 'log.every'),
    ('report_to', 'log.sinks'),
    ('num_generations', 'rollout.group'),
    ('max_completion_length', 'rollout.max_tokens'),
    ('grpo.beta', 'policy.kl_coef'),
    ('beta', 'dpo.beta'),
    ('ici_fsdp_parallelism', 'mesh.fsdp'),
    ('gradient_checkpointing', 'remat'),
    ('packing', 'data.packing'),
    ('max_grad_norm', 'optim.clip_norm'),
    ('optimizer.lr', 'optim.lr'),
    ('training.batch_size', 'batch_size'),
    ('evaluation.batch_size', 'eval.batch_size'),
    ('optimizer.weight_decay', 'optim.weight_decay'),
  ],
)
def test_a_name_of_another_tool_leads_to_its_key(typed, key):
  hint = section.hint(typed, keys.default())
  assert hint.startswith(f'; did you mean {key}?')


@pytest.mark.parametrize(
  ('typed', 'note'),
  [
    ('lora.r', '0 trains the model itself'),
    ('peft.anything', 'adapters are set by the section lora'),
    ('lora_alpha', 'alpha / rank'),
    ('output_dir', 'the flag --workdir=DIR'),
    ('dcn_anything_parallelism', 'the axes are mesh.data'),
    ('load_in_4bit', 'the frozen base under an adapter'),
    ('per_device_train_batch_size', 'It is global'),
    ('gradient_accumulation_steps', 'does not multiply it'),
    ('warmup_ratio', 'It counts updates'),
    ('lr_scheduler_type', 'reduce_lr_on_plateau is optim.plateau_factor'),
    ('lr_patience', '1 is patience=0 there'),
  ],
)
def test_a_difference_in_meaning_is_stated(typed, note):
  assert note in section.hint(typed, keys.default())


def test_a_misspelt_key_is_not_taken_for_a_name_of_another_tool():
  """Every known name answers by the table, every other one by likeness."""
  usual = keys.default()
  for name in NAMES:
    assert section.hint(name, usual) == hints.find(name) != ''
  assert hints.find('optim.lrr') == hints.find('stepz') == ''
