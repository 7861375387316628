"""The invariants of encoder-decoders, on the models of parity/t5_cases.py: a decoder sees no later
token and no other document, an encoder its whole document; packing, remat and blocks of queries
change nothing. In float32 at matmul precision highest.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t5_models
import tiny_model
from safetensors.numpy import save_file
from tiny_model import place, tokens_at

from ftjax.families import table
from ftjax.hf import load
from ftjax.models import counts, kinds, relative_bias
from ftjax.models.mixer_spec import RelativeBias
from ftjax.planning import known_models
from ftjax.runtime import trees
from ftjax.runtime.errors import DataError

ROWS, SOURCE, TARGET, VOCAB = 2, 32, 24, 67
# In row 0 three documents and padding, in row 1 one document: tokens of encoder and decoder.
LENGTHS = ((17, 5, 8), (9, 7, 3))
NAME = 't5_v1_1'


def segments(width, lengths):
  found = np.ones((ROWS, width), np.int32)
  found[0] = np.repeat([1, 2, 3, 0], [*lengths, width - sum(lengths)])
  return found


def packed():
  """(source, its segments, labels, their segments)."""
  source = tiny_model.ids(ROWS, SOURCE, 0, VOCAB)
  labels = tiny_model.ids(ROWS, TARGET, 1, VOCAB)
  return [source, segments(SOURCE, LENGTHS[0]), labels, segments(TARGET, LENGTHS[1])]


@functools.cache
def params(name):
  return t5_models.params(name)


def logits(rows, name=NAME):
  return np.asarray(t5_models._logits(t5_models.architecture(name), params(name), rows))


def gradient(rows, remat='none'):
  arch = t5_models.architecture(NAME)
  loss, found = t5_models.loss_and_gradient(arch, params(NAME), rows, remat)
  return float(loss), {n: np.asarray(g) for n, g in trees.flatten(found).items()}


def same(found, expected, limit=2e-6):
  assert found[0] == pytest.approx(expected[0], rel=1e-6)
  apart = sum(((found[1][n] - g) ** 2).sum() for n, g in expected[1].items())
  size = sum((g**2).sum() for g in expected[1].values())
  assert size > 0 and apart <= limit**2 * size
  assert all(g.any() for g in expected[1].values())


def alone(rows, d):
  """Document d of row 0 in row 1 of another batch, and where: other tokens stand around it."""
  out, at = [], []
  for k in (0, 2):
    width, begin = rows[k].shape[1], sum(LENGTHS[k // 2][:d])
    length = LENGTHS[k // 2][d]
    tokens, inside = tiny_model.ids(ROWS, width, 9, VOCAB), np.zeros((ROWS, width), np.int32)
    start = (width - length) // 2
    inside[1, start : start + length] = 1
    tokens[1, start : start + length] = rows[k][0, begin : begin + length]
    out += [tokens, inside]
    at.append((slice(begin, begin + length), slice(start, start + length)))
  return out, at[1]


def test_a_decoder_sees_no_later_token_and_its_encoder_the_whole_document():
  rows = packed()
  before = logits(t5_models.batch(*rows))
  changed = [*rows]
  changed[2] = np.where(np.arange(TARGET) == 4, (rows[2] + 1) % VOCAB, rows[2])
  after = logits(t5_models.batch(*changed))
  # The label at 4 is the token at 5.
  np.testing.assert_array_equal(after[:, :5], before[:, :5])
  assert (after[1, 5:] != before[1, 5:]).any(-1).all()
  changed = [*rows]
  changed[0] = rows[0].copy()
  changed[0][1, -1] = (rows[0][1, -1] + 1) % VOCAB
  assert (logits(t5_models.batch(*changed))[1] != before[1]).any(-1).all()


def test_a_document_changes_no_other_exactly():
  """Through the encoder, the decoder or both; nor does what stands on padding."""
  rows = packed()
  before = logits(t5_models.batch(*rows))
  assert np.isfinite(before).all()
  for d in range(4):
    for sides in ((0,), (2,), (0, 2)):
      changed = [*rows]
      for k in sides:
        inside = rows[k + 1] == d
        inside[1] = False
        changed[k] = np.where(inside, (rows[k] + 1) % VOCAB, rows[k])
      after = logits(t5_models.batch(*changed))
      kept = rows[3] != d
      kept[1] = True
      kept &= rows[3] > 0
      np.testing.assert_array_equal(after[kept], before[kept])
      assert not d or (after[~kept & (rows[3] > 0)] != before[~kept & (rows[3] > 0)]).any()


def test_packed_is_padded_in_logits_loss_and_gradient():
  rows = packed()
  together, parts = logits(t5_models.batch(*rows))[0], []
  for d in range(3):
    other, (here, there) = alone(rows, d)
    got = logits(t5_models.batch(*other))[1, there]
    np.testing.assert_allclose(together[here], got, rtol=0, atol=1e-5 * np.abs(got).max())
    parts.append(gradient(t5_models.batch(*other)))
  first = [r.copy() for r in rows]
  first[1][1], first[3][1] = 0, 0
  summed = sum(p[0] for p in parts), {n: sum(p[1][n] for p in parts) for n in parts[0][1]}
  same(summed, gradient(t5_models.batch(*first)))


def test_gradients_cross_no_border_exactly():
  """Of the loss of a row without a decoder's token: zero, and finite."""
  rows = packed()
  rows[3] = np.zeros_like(rows[3])
  loss, found = gradient(t5_models.batch(*rows))
  assert loss == 0 and not any(g.any() for g in found.values())
  rows = packed()
  rows[1][0] = 0  # padding on the side of the encoder alone
  loss, found = gradient(t5_models.batch(*rows))
  assert np.isfinite(loss) and all(np.isfinite(g).all() for g in found.values())


@pytest.mark.parametrize('remat', ['dots', pytest.param('full', marks=pytest.mark.full)])
def test_remat_changes_no_loss_and_no_gradient(remat):
  rows = t5_models.batch(*packed())
  same(gradient(rows, remat), gradient(rows))


def test_blocks_of_queries_and_rows_in_any_order_have_the_same_scores():
  """512 tokens in blocks of 256, on the matrix of diagonals and on a look-up of each distance."""
  length, bias = 512, RelativeBias('', 8, 100)
  rng = np.random.default_rng(0)
  q, k, v = (
    place(np.float32(rng.normal(size=(1, length, 2, 4))), 'batch', 'seq', 'heads', None)
    for _ in range(3)
  )
  table_ = place(np.float32(rng.normal(size=(8, 2))), 'position', 'heads')
  where = tokens_at(np.repeat([[1, 2, 0]], [300, 200, 12], axis=1))
  other = tokens_at(where.segments)

  @functools.partial(jax.jit, static_argnums=(5, 6))
  def loss(q, k, v, table_, places, causal, is_ordered):
    query, key = places
    values = relative_bias.by_distance(table_, length, bias, causal)
    query = key if is_ordered else query
    out = relative_bias.attend(q, k, v, values, query, key, causal)
    return jnp.where(key.segments[..., None, None] > 0, out, 0).sum(), out

  for causal in (False, True):
    found = [
      jax.grad(loss, (0, 1, 2, 3), has_aux=True)(q, k, v, table_, (other, where), causal, ordered)
      for ordered in (True, False)
    ]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_a_config_is_read_as_its_files_are(tmp_path):
  """transformers 5 writes tie_word_embeddings=true whatever the head is; see hf/stored_head.py."""
  t5_models.write_folder(NAME, tmp_path / 'a')
  written = json.loads((tmp_path / 'a' / 'config.json').read_text())
  assert written['tie_word_embeddings'] and written['scale_decoder_outputs'] is False
  arch = table.architecture(load.read_config(tmp_path / 'a'))
  assert not arch.tied and arch.logit_scale == 1
  del written['scale_decoder_outputs']  # as older files are
  (tmp_path / 'a' / 'config.json').write_text(json.dumps(written | {'tie_word_embeddings': False}))
  assert table.architecture(load.read_config(tmp_path / 'a')) == arch
  t5_models.write_folder('t5', tmp_path / 'b')
  arch = table.architecture(load.read_config(tmp_path / 'b'))
  assert arch.tied and arch.logit_scale == 24**-0.5
  old = {k: v for k, v in t5_models.config('t5').items() if not k.startswith(('tie_', 'scale_'))}
  assert table.architecture(old) == arch


def test_copies_of_the_embedding_are_passed_over(tmp_path):
  """As old files have them, with a table that nothing reads and a head that equals the embedding; a
  head that differs is one of its own.
  """
  tensors = {n: np.zeros(s, np.float32) for n, s in t5_models.shapes('t5').items()}
  tensors['shared.weight'][1] = 1
  name = 'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'
  more = dict.fromkeys(
    ('lm_head.weight', 'encoder.embed_tokens.weight', 'decoder.embed_tokens.weight'),
    tensors['shared.weight'],
  )
  tensors |= more | {name: np.zeros((12, 6), np.float32)}
  folder = tmp_path / 'a'
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(t5_models.config('t5')))
  save_file(tensors, folder / 'model.safetensors')
  arch = table.architecture(load.read_config(folder))
  assert arch.tied and arch.logit_scale == 24**-0.5
  load.check_tensors(load.open_model_source(folder, arch), arch)
  tensors['lm_head.weight'] = tensors['shared.weight'] + 1
  save_file(tensors, folder / 'model.safetensors')
  arch = table.architecture(load.read_config(folder))
  assert not arch.tied and arch.logit_scale == 24**-0.5
  assert table.architecture(table.config(arch)) == arch


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'feed_forward_proj': 'gated-sine'}, 'feed_forward_proj'),
    ({'feed_forward_proj': 'geglu-relu'}, 'feed_forward_proj'),
    ({'is_gated_act': True}, 'is_gated_act'),
    ({'relative_attention_num_buckets': 6}, 'relative_attention_num_buckets'),
    ({'relative_attention_max_distance': 3}, 'relative_attention_max_distance'),
    ({'is_encoder_decoder': False}, 'is_encoder_decoder'),
    ({'num_layers': 'two'}, 'num_layers'),
    ({'architectures': ['T5ForSequenceClassification']}, 'ForConditionalGeneration'),
    ({'position_scale': 2.0}, 'position_scale'),
  ],
)
def test_a_config_that_is_not_computed_is_refused_by_its_key(change, words):
  with pytest.raises(DataError, match=words):
    table.architecture(t5_models.config('t5') | change)


def test_counts_follow_from_what_is_declared():
  """By hand: a table of 67 x 24 counted once, two of 12 buckets x 6 heads, six attentions."""
  arch = t5_models.architecture('t5')
  attention, mlp = 4 * 24 * 60, 2 * 24 * 40
  blocks = 3 * (attention + mlp + 2 * 24) + 2 * (2 * attention + mlp + 3 * 24)
  assert counts.num_params(arch) == 67 * 24 + 2 * 12 * 6 + blocks + 2 * 24
  assert counts.matmul_params(arch) == 67 * 24 + 7 * attention + 5 * mlp
  found = {n for n in kinds.linear_maps(arch) if '/cross/' in n}
  assert found == {f'stack1/block0/cross/{m}' for m in 'qkvo'}


@pytest.mark.parametrize(
  ('name', 'params'),
  [
    ('t5-small', 60_506_624),
    ('t5-base', 222_903_552),
    ('flan-t5-base', 247_577_856),
    ('flan-t5-xl', 2_849_757_184),
    ('mt5-small', 300_176_768),
  ],
)
def test_known_shapes_have_the_published_numbers_of_parameters(name, params):
  assert counts.num_params(table.architecture(known_models.SHAPES[name])) == params
