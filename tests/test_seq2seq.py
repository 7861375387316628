"""Encoder-decoders trained and evaluated as a user does it: seq2seq and span_corruption, adapters,
tasks, and what is refused.
"""

import json

import pytest
import tiny_run
from safetensors.numpy import load_file


def keys(**changes):
  words = {'steps': 2, 'batch_size': 4, 'eval.every': 0, 'eval.prompts': '()', 'seed': 1}
  words |= {'optim.warmup_steps': 0} | changes
  return [f'--config.{k.replace("__", ".")}={v}' for k, v in words.items()]


def train(workdir, *words, config='tiny_seq2seq', **changes):
  return tiny_run.run(
    'train', [f'--config={config}', f'--workdir={workdir}', *keys(**changes), *words]
  )


@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
  """A run of a few steps with a task, whose answers a beam search writes."""
  folder = tmp_path_factory.mktemp('tuned')
  rows = [{'prompt': f'{a} + 5 =', 'answer': str(a + 5)} for a in range(6)]
  choices = [{'prompt': f'{a} + 5 =', 'choices': ['5', '12'], 'label': 0} for a in range(3)]
  for name, own in (('rows', rows), ('choices', choices)):
    (folder / f'{name}.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in own))
  tasks = (f'sums=translation:{folder}/rows.jsonl', f'best=choice:{folder}/choices.jsonl')
  code, printed = train(
    folder / 'run', steps=3, eval__tasks=repr(tasks), eval__max_tokens=4, eval__every=2
  )
  assert code == 0, printed
  return folder / 'run', printed


def test_a_run_with_a_task(tuned):
  workdir, printed = tuned
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  losses = [r['loss'] for r in rows if r['split'] == 'train']
  assert len(losses) == 3 and losses[0] > 2
  assert [r['step'] for r in rows if r['split'] == 'eval' and 'perplexity' in r] == [2, 3]
  assert all((workdir / 'eval' / f'{n}.jsonl').exists() and n in printed for n in ('sums', 'best'))
  config = json.loads((workdir / 'export' / 'config.json').read_text())
  assert config['model_type'] == 't5' and config['is_encoder_decoder']
  generation = json.loads((workdir / 'export' / 'generation_config.json').read_text())
  assert generation['decoder_start_token_id'] == 0
  names = load_file(workdir / 'export' / 'model.safetensors')
  assert 'lm_head.weight' in names
  assert 'decoder.block.1.layer.1.EncDecAttention.k.weight' in names


@pytest.mark.full
def test_text_of_a_tuned_model(tuned, tmp_path):
  """A prompt, rows of prompts by beams, and a checkpoint of the run."""
  workdir, _ = tuned
  asked = ['--prompt=7 + 5 =', '--max_tokens=4', '--num_beams=2', '--length_penalty=0.5']
  texts = [tiny_run.run('generate', [f'--model={m}', *asked]) for m in (workdir, f'{workdir}@last')]
  assert texts[0] == texts[1] and texts[0][0] == 0, texts
  (tmp_path / 'prompts').write_text('1 + 1 =\n2 + 2 =\n')
  code, printed = tiny_run.run(
    'generate', [f'--model={workdir}', f'--prompts={tmp_path}/prompts', '--max_tokens=3']
  )
  assert code == 0 and printed.count('completion') == 2, printed


@pytest.mark.full
def test_an_adapter_trains_and_is_merged(tuned, tmp_path):
  workdir, _ = tuned
  words = keys(lora__rank=2, lora__merge_kl=10.0, model__random='{}')
  command = ['--config=tiny_seq2seq', f'--workdir={tmp_path}/a', *words]
  code, printed = tiny_run.run('train', [*command, f'--config.model.path={workdir}/export'])
  assert code == 0, printed
  before, after = (
    load_file(f / 'model.safetensors') for f in (workdir / 'export', tmp_path / 'a' / 'merged')
  )
  name = 'decoder.block.0.layer.1.EncDecAttention.q.weight'
  assert before.keys() == after.keys() and (before[name] != after[name]).any()


T5 = "{'model_type':'t5','d_model':16,'d_kv':4,'d_ff':16,'num_heads':2,'num_layers':1}"
LLAMA = "{'hidden_size':16,'num_hidden_layers':1,'num_attention_heads':2,'intermediate_size':16}"
REFUSED = [
  ('tiny_sft', {'model.random': T5}, ('algorithm=sft', 'encoder-decoder', 'algorithm=seq2seq')),
  ('tiny_dpo', {'model.random': T5}, ('algorithm=dpo', 'encoder-decoder')),
  ('tiny_reward_model', {'model.random': T5}, ("'t5' takes neither labels nor a score",)),
  ('tiny_grpo', {'model.random': T5}, ('algorithm=grpo', 'encoder-decoder')),
  ('tiny_seq2seq', {'model.random': LLAMA, 'eval.num_beams': 1}, ('trains encoder-decoders',)),
  ('tiny_sft', {'eval.num_beams': 2}, ('eval.num_beams=2', 'beam search')),
  ('tiny_seq2seq', {'loss.neftune': 5.0}, ('loss.neftune', 'seq2seq')),
  ('tiny_seq2seq', {'eval.num_beams': 0}, ('eval.num_beams',)),
  ('tiny_seq2seq', {'eval.temperature': 1.0}, ('eval.num_beams=2', 'eval.temperature')),
  ('tiny_seq2seq', {'data.train': 'texts:40'}, ('algorithm=span_corruption',)),
  ('tiny_seq2seq', {'seq2seq.source_len': 8}, ('seq2seq.source_len',)),
  ('tiny_span_corruption', {'span_corruption.density': 1.5}, ('span_corruption.density',)),
  ('tiny_span_corruption', {'data.train': 'sums:40'}, ('column "text"',)),
  (
    'tiny_span_corruption',
    {'model.add_special_tokens': '()'},
    ('<extra_id_0>', 'model.add_special_tokens'),
  ),
]


@pytest.mark.parametrize(
  ('config', 'changes', 'words'),
  [
    pytest.param(*row, marks=[pytest.mark.full] * (i not in (0, 4, 9)))
    for i, row in enumerate(REFUSED)
  ],
)
def test_what_is_refused(config, changes, words, tmp_path):
  code, printed = train(tmp_path, config=config, **changes)
  assert code in (2, 3), printed
  assert all(w in printed for w in words), printed


@pytest.mark.full
def test_beams_are_part_of_what_scores_depend_on(tuned):
  """Greedy answers are not taken for those of a beam search, whose scores are kept."""
  workdir, _ = tuned
  rows = workdir.parent
  tasks = (f'sums=translation:{rows}/rows.jsonl',)
  words = keys(steps=3, eval__tasks=repr(tasks), eval__max_tokens=4, eval__every=2)
  command = ['--config=tiny_seq2seq', f'--workdir={workdir}', *words]
  kept = {p.name for p in (workdir / 'eval' / 'base').glob('sums.*')}
  assert len(kept) == 1
  for beams, count in ((2, 1), (1, 2)):
    code, printed = tiny_run.run('evaluate', [*command, f'--config.eval.num_beams={beams}'])
    assert code == 0, printed
    assert len(list((workdir / 'eval' / 'base').glob('sums.*'))) == count
