"""Models and tasks that lm-eval's own backend and ftjax's are compared on: make_lm_eval_goldens.py
has the former's numbers, test_lm_eval.py compares. Imports neither torch nor jax.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import tiny_tokenizer
from safetensors.numpy import save_file

# {name: settings}: whether the tokenizer puts BOS before a text, add_bos, the most tokens read.
TINY = {
  'plain': {'adds_bos': False, 'add_bos': None, 'max_length': 64},
  'bos': {'adds_bos': True, 'add_bos': None, 'max_length': 64},
  'no_bos': {'adds_bos': True, 'add_bos': False, 'max_length': 40},
}
TASKS = ('ftjax_choose', 'ftjax_judge', 'ftjax_last', 'ftjax_read', 'ftjax_write')
READ = 'ftjax_read'  # of whole texts
SMOLLM2 = Path('.cache/smollm2')
SMOLLM2_LENGTH = 384  # the most tokens read
_CONFIG = {
  'architectures': ['LlamaForCausalLM'],
  'model_type': 'llama',
  'vocab_size': 384,
  'hidden_size': 32,
  'intermediate_size': 64,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 8,
  'rms_norm_eps': 1e-5,
  'max_position_embeddings': 128,
  'tie_word_embeddings': True,
  'bos_token_id': 1,
  'eos_token_id': 2,
}

_QUESTIONS = [
  ('The quick brown fox jumps over the lazy', [' dog', ' capital of France', ' 144'], 0),
  ('What is the capital of France? It is ', ['Paris', 'hello', 'x'], 0),
  ('Grüße aus Zürich – 東京は ', ['晴れ', 'Ünïcödé', '🙂'], 1),  # noqa: RUF001
  ('1 + 1 = 2, 12 times 12 is', [' 144.', ' 2', ' of course! I can help you with that'], 0),
  ('hello hello world world ' * 12, ['hello', 'world', ' again'], 1),  # longer than is read
  ('a\n\n', ['b', '\nb', ' b'], 2),
  ('<|im_start|>begins with BOS', [' yes', ' no', '<|im_end|>'], 0),
  ('tabs\tand  two  spaces  ', ['end', '  end', '\tend'], 0),
]
_TEXTS = [
  'The quick brown fox jumps over the lazy dog.',
  'What is the capital of France? It is Paris. ' * 4,
  'x',
  'Grüße, 東京 🙂\n\n  def f(x):\n  return x * x',
]


def sums(count: int) -> list[dict[str, str]]:
  """Word problems with answers in the form of GSM8K's."""
  names, things = ('Ann', 'Bob', 'Eve', 'Tom'), ('apples', 'coins', 'books')
  rows = []
  for i in range(count):
    a, b, c = 3 + 7 * i % 19, 2 + 5 * i % 11, 1 + i % 3
    name, thing = names[i % 4], things[i % 3]
    rows.append(
      {
        'question': f'{name} has {a} {thing}, buys {b} more and gives {c} away. '
        f'How many {thing} does {name} have now?',
        'answer': f'{name} has {a} + {b} = {a + b} {thing}. Then {a + b} - {c} = {a + b - c} are '
        f'left.\n#### {a + b - c}',
      }
    )
  return rows


_HEAD = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/{name}.jsonl
    train: {folder}/{name}.jsonl
  cache_dir: {folder}/cache
test_split: test
fewshot_split: train
metadata:
  version: 1.0
"""
_BODIES = {
  'ftjax_choose': """output_type: multiple_choice
doc_to_text: text
doc_to_target: label
doc_to_choice: choices
target_delimiter: ""
num_fewshot: 0
metric_list:
  - metric: acc
  - metric: acc_norm
  - metric: mcc
  - metric: brier_score
""",
  'ftjax_judge': """output_type: multiple_choice
doc_to_text: text
doc_to_target: label
doc_to_choice: [" no", " yes"]
target_delimiter: ""
num_fewshot: 2
metric_list:
  - metric: f1
  - metric: acc
""",
  'ftjax_last': """output_type: loglikelihood
doc_to_text: text
doc_to_target: label
target_delimiter: ""
num_fewshot: 0
metric_list:
  - metric: perplexity
  - metric: acc
""",
  'ftjax_read': """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
""",
  # Filters, stop texts and metric of lm-eval's gsm8k.
  'ftjax_write': """output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: false
    regexes_to_ignore:
      - ","
      - "\\\\$"
      - "(?s).*#### "
      - "\\\\.$"
generation_kwargs:
  until:
    - "Question:"
    - "</s>"
    - "<|im_end|>"
  do_sample: false
  temperature: 0.0
  max_gen_toks: MAX_TOKENS
num_fewshot: SHOTS
filter_list:
  - name: "strict-match"
    filter:
      - function: "regex"
        regex_pattern: "#### (\\\\-?[0-9\\\\.\\\\,]+)"
      - function: "take_first"
  - name: "flexible-extract"
    filter:
      - function: "regex"
        group_select: -1
        regex_pattern: "(-?[$0-9.,]{2,})|(-?[0-9]+)"
      - function: "take_first"
""",
}


def write_model(folder: Path, adds_bos: bool) -> str:
  """Writes a HF folder of a random model that prefers some tokens clearly; returns its path."""
  folder.mkdir(parents=True)
  rng = np.random.default_rng(7)

  def drawn(*shape):
    return (rng.normal(size=shape) * shape[-1] ** -0.5 * 2).astype(np.float32)

  c = _CONFIG
  dim, ffn = c['hidden_size'], c['intermediate_size']
  heads, kv = (c['head_dim'] * c[k] for k in ('num_attention_heads', 'num_key_value_heads'))
  weights = {
    'model.embed_tokens.weight': drawn(c['vocab_size'], dim) * 1.5,
    'model.norm.weight': 1 + drawn(dim) / 4,
  }
  for i in range(c['num_hidden_layers']):
    shapes = {
      'self_attn.q_proj': (heads, dim),
      'self_attn.k_proj': (kv, dim),
      'self_attn.v_proj': (kv, dim),
      'self_attn.o_proj': (dim, heads),
      'mlp.gate_proj': (ffn, dim),
      'mlp.up_proj': (ffn, dim),
      'mlp.down_proj': (dim, ffn),
    }
    weights |= {f'model.layers.{i}.{n}.weight': drawn(*s) for n, s in shapes.items()}
    for norm in ('input_layernorm', 'post_attention_layernorm'):
      weights[f'model.layers.{i}.{norm}.weight'] = 1 + drawn(dim) / 4
  save_file(weights, folder / 'model.safetensors')
  (folder / 'config.json').write_text(json.dumps(_CONFIG))
  for name, content in tiny_tokenizer.tiny_files(adds_bos=adds_bos).items():
    if name == 'tokenizer_config.json':
      content = json.dumps(json.loads(content) | {'tokenizer_class': 'PreTrainedTokenizerFast'})
      content = content.encode()
    (folder / name).write_bytes(content)
  return str(folder)


def write_tasks(folder: Path, real: bool = False) -> str:
  """Writes YAML tasks and their rows; returns the folder's path.

  Args:
    folder: to write into.
    real: rows for SmolLM2: reviews of the demo's test set, and more problems; else some that try
      the borders.
  """
  folder.mkdir(parents=True)
  questions = [{'text': t, 'choices': c, 'label': k} for t, c, k in _QUESTIONS]
  texts = [{'text': t} for t in _TEXTS]
  if real:
    lines = Path('.cache/data/sentiment/test.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    asked = [r['messages'][-1]['content'] for r in rows]
    questions = [
      {
        'text': f'{a}\nAnswer: ',
        'choices': [*r['choices']],
        'label': r['choices'].index(r['label']),
      }
      for a, r in zip(asked[:40], rows, strict=False)
    ]
    # The last one is longer than what is read at once.
    bounds = [*range(40, 84, 4), 100]
    texts = [{'text': '\n'.join(asked[a:b])} for a, b in itertools.pairwise(bounds)]
  rows = {
    'ftjax_choose': questions,
    'ftjax_judge': [{'text': f'{q["text"]}?', 'label': i % 2} for i, q in enumerate(questions)],
    'ftjax_last': [{'text': q['text'], 'label': q['choices'][q['label']]} for q in questions],
    'ftjax_read': texts,
    'ftjax_write': sums(32 if real else 5),
  }
  most, shots = (24, 1) if real else (12, 1)
  for name, own in rows.items():
    text = _HEAD.format(name=name, folder=folder) + _BODIES[name]
    text = text.replace('MAX_TOKENS', str(most)).replace('SHOTS', str(shots))
    (folder / f'{name}.yaml').write_text(text)
    lines = ''.join(json.dumps(row) + '\n' for row in own)
    (folder / f'{name}.jsonl').write_text(lines)
  return str(folder)


def numbers(found: dict) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
  """What lm-eval's `evaluate` returned, by task: log-likelihoods and greedy flags float64[n, 2]
  (of whole texts float64[n, 1]), and figures float64[k] in the order of their names; and texts.
  """
  arrays, texts = {}, {}
  for task, samples in found['samples'].items():
    figures = found['results'][task]
    names = sorted(k for k in figures if ',' in k and '_stderr' not in k)
    arrays[f'{task}/figures'] = np.array([figures[n] for n in names], np.float64)
    first = samples[0]['filter']
    resps = [r for s in samples if s['filter'] == first for rs in s['resps'] for r in rs]
    if isinstance(resps[0], str):
      texts[task] = resps
    else:
      arrays[f'{task}/answers'] = np.array(resps, np.float64).reshape(len(resps), -1)
  return arrays, texts
