"""What an adapter run leaves: the adapter in export/, as a PEFT folder, and the merged model in
merged/, as a Hugging Face folder, where it computes the same.

The merged weights are rounded to the dtype of the base, which may change what the model computes.
So before merged/ is written the KL divergence from the adapter's distribution of the next token to
the merged model's is measured on held-out rows.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.cluster import processes
from ftjax.experiment import adapters, label_names
from ftjax.experiment.data import PromptData
from ftjax.experiment.run import Run
from ftjax.families import multimodal
from ftjax.hf import export as hf_export
from ftjax.hf import load, peft_export, run_export
from ftjax.models import kinds
from ftjax.models.forward import Forward
from ftjax.models.layers import rounded
from ftjax.runtime import trees
from ftjax.runtime.errors import CheckError
from ftjax.storage import files
from ftjax.training.prefetch import place

log = logging.getLogger(__name__)

TOKENS = 4096  # held-out tokens of the comparison


@dataclasses.dataclass(frozen=True)
class Comparison:
  """How far a merged model is from its adapter.

  kl: mean over tokens of the KL divergence from adapter to merged model, in nats; of a reward model
  None. score: of a reward model, the mean over tokens of the difference of the scores, in absolute
  value; else None. states: of a model of vectors, the mean over tokens of 1 - the cosine of the two
  states; else None. tokens: of the comparison. held_out: whether they are of evaluation rows, else
  of training rows. dtype: of the merged weights.
  """

  kl: float | None
  score: float | None
  states: float | None
  tokens: int
  held_out: bool
  dtype: str

  def text(self) -> str:
    """Returns the comparison in words."""
    rows = 'held-out' if self.held_out else 'training'
    end = f'on {self.tokens:,} {rows} tokens, with {self.dtype} weights'
    if self.states is not None:
      return f'1 - cosine of the states of adapter and merged model: {self.states:.3g}, {end}'
    if self.kl is None:
      return f'its scores differ from the adapter by {self.score:.3g} on average, {end}'
    return f'KL from adapter to merged model: {self.kl:.3g} nats per token, {end}'


def check(run: Run) -> None:
  """Raises ConfigError, before anything is trained, where the adapter has no form as a PEFT folder;
  warns where PEFT will not load it.
  """
  if run.arch.adapter is not None:
    peft_export.check(run.arch)


def export(run: Run, params: dict, card: bytes) -> None:
  """Writes the adapter to export/.

  Args:
    run: of the adapter.
    params: of base and adapter, nested dict of sharded arrays.
    card: README.md.

  Raises:
    NonFiniteError: a tensor holds NaN or infinity.
  """
  model = run.model
  peft_export.export(
    params,
    run.arch,
    files.join(run.workdir, 'export'),
    base=run.first_source,
    sha256=run.first_hash(),
    modules=_modules(run),
    source_config=model.config,
    tokenizer_files=model.files,
    stop_ids=model.stop_ids,
    card=card,
  )


def _modules(run: Run) -> str:
  """Returns what begins the names of layers in the class that opens the base; see peft_export."""
  source = run.first_source
  found = load.module_prefix(source) if source else multimodal.MODULES
  return '' if _is_bare(run) and found == multimodal.MODULES else found


def _is_bare(run: Run) -> bool:
  """Returns whether the model gives vectors, and has no head."""
  head = label_names.head(run.config)
  return head is not None and head.is_embedding


def export_merged(run: Run, params: dict, card: Callable[[], bytes]) -> None:
  """Writes the merged model to merged/, after comparing it with the adapter.

  Args:
    run: of the adapter.
    params: of base and adapter, nested dict of sharded arrays.
    card: returns README.md; called after the report of the comparison is written.

  Raises:
    CheckError: it is further from the adapter than lora.merge_kl; merged/ is not written, and an
      older one is removed.
    NonFiniteError: a tensor holds NaN or infinity.
  """
  folder, most = files.join(run.workdir, run_export.MERGED), run.config.lora.merge_kl
  dtype = adapters.merged_dtype(run.config.lora.base)
  found = compare(run, params, dtype)
  is_close = found.kl is None or found.kl <= most
  if processes.is_main():
    report = dataclasses.asdict(found) | {'is_written': is_close}
    files.write_text(
      files.join(run.workdir, run_export.MERGE_REPORT), json.dumps(report, indent=1) + '\n'
    )
  if not is_close:
    processes.from_main(lambda: files.remove_tree(folder))
    raise CheckError(
      f'{folder} is not written: {found.text()}; the limit is lora.merge_kl={most}. Use the '
      f'adapter in {run.workdir}/export, or set a larger lora.merge_kl and run the same command '
      'again'
    )
  log.info('%s: %s', folder, found.text())
  hf_export.export(
    params,
    kinds.with_merged(run.arch, dtype),
    folder,
    source_config=run.model.config,
    tokenizer_files=run.model.files,
    dtype=np.dtype(jnp.dtype(dtype)),
    stop_ids=run.model.stop_ids,
    card=card(),
  )


def remove_merged(run: Run) -> None:
  """Removes the merged model of an earlier export, which is not that of the adapter in export/."""
  folder = files.join(run.workdir, run_export.MERGED)

  def remove():
    if files.exists(files.join(folder, 'config.json')):
      log.warning('%s was merged from an earlier adapter of this run and is removed', folder)
      files.remove_tree(folder)

  processes.from_main(remove)


def compare(run: Run, params: dict, dtype: str) -> Comparison:
  """Returns how far the model after merging into weights of `dtype` is from base and adapter."""
  ours, is_bare = run.forward.without_remat(), _is_bare(run)
  merged = Forward(kinds.with_merged(run.arch, dtype), ours.dtype)
  merged_params = _rounded(run, params, dtype)

  @jax.jit
  def measure(params, merged_params, batch):
    batch = batch | {'weights': (batch['segments'] > 0).astype(jnp.float32)}
    if is_bare:
      gap = _unit(ours.hidden_states(params, batch)) - _unit(
        merged.hidden_states(merged_params, batch)
      )
      total = (jnp.square(gap).sum(-1) / 2 * batch['weights']).sum()
    elif run.arch.num_labels:
      gap = ours.label_logits(params, batch) - merged.label_logits(merged_params, batch)
      total = (jnp.abs(gap).mean(-1) * batch['weights']).sum()
    else:
      total = ours.divergence_from(params, merged, merged_params, batch)
    return total, batch['weights'].sum()

  total = count = 0.0
  held_out = bool(run.data.evaluation)
  for batch in _rows(run):
    more, tokens = map(float, measure(params, merged_params, batch))
    total, count = total + more, count + tokens
    if count >= TOKENS:
      break
  mean = max(total / max(count, 1.0), 0.0)  # rounding may leave a tiny negative sum
  found = {'kl': None, 'score': None, 'states': None}
  found['states' if is_bare else 'score' if run.arch.num_labels else 'kl'] = mean
  return Comparison(**found, tokens=int(count), held_out=held_out, dtype=dtype)


def _unit(x: jax.Array) -> jax.Array:
  """Returns states [B, T, D] of length 1, float32."""
  x = x.astype(jnp.float32)
  return x / jnp.maximum(jnp.sqrt(jnp.square(x).sum(-1, keepdims=True)), 1e-12)


def _rounded(run: Run, params: dict, dtype: str) -> dict:
  """Returns the parameters with those that are trained whole rounded as merged/ holds them."""
  trained = run.arch.adapter.trained

  def one(name, leaf):
    is_whole = name in trained or name.startswith('score/')
    return rounded(leaf, dtype).astype(leaf.dtype) if is_whole else leaf

  return trees.map_named(one, params)


def _rows(run: Run) -> Iterator[dict[str, jax.Array]]:
  """Yields batches [B, T] of evaluation rows, or of training rows where there are none."""
  if not isinstance(run.data, PromptData):
    yield from run.batches_of(run.data.evaluation or run.data.corpora)
    return
  where, c = run.batch_shardings(micro=False), run.config
  found = [p.ids for s in run.data.evaluation or run.data.sources for p in s.rows]
  for begin in range(0, len(found), c.eval.batch_size):
    batch = _prompt_rows(found[begin : begin + c.eval.batch_size], c.eval.batch_size, c.seq_len)
    yield place(batch, {k: where[k] for k in batch})


def _prompt_rows(prompts: list[list[int]], size: int, length: int) -> dict[str, np.ndarray]:
  """Returns arrays int32[size, length] of prompts, one in each row."""
  batch = {k: np.zeros((size, length), np.int32) for k in ('tokens', 'segments', 'positions')}
  for row, ids in enumerate(prompts):
    ids = ids[:length]
    batch['tokens'][row, : len(ids)] = ids
    batch['segments'][row, : len(ids)] = 1
    batch['positions'][row, : len(ids)] = range(len(ids))
  return batch
