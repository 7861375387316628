"""Distillation: a student learns the teacher's distribution of every supervised token, beside the
token itself (Hinton et al. 2015; Kim and Rush 2016 on sequences).

The teacher is computed in the step, with parameters under `teacher/` of the state; the head of both
models is in chunks, so that no logits of whole rows exist. Without distill.teacher the model that
training starts from is the teacher, which keeps the student near it. With distill.file no teacher
is held: its likeliest tokens come with the batches, from the files of data/teacher_file.py. With
distill.on_policy a share of the batches holds completions of the student, and the teacher scores
them in the step as it does the answers of rows (Agarwal et al. 2023)."""

import dataclasses

import ml_collections

from ftjax.algorithms import token_loss
from ftjax.data import teacher_file
from ftjax.experiment import fit, teacher_writer
from ftjax.experiment.run import Run
from ftjax.losses.distillation import Distillation
from ftjax.models.architecture import Architecture
from ftjax.models.forward import Forward
from ftjax.rl import on_policy_rows
from ftjax.runtime.errors import ConfigError
from ftjax.training.step import LossFn


def make_loss(
  forward: Forward, c: ml_collections.ConfigDict, teacher: Architecture | None = None
) -> LossFn:
  """Returns loss(params, batch, keys) -> (sum of the loss, supervised tokens, {'nll': sums,
  'divergence': sums}).

  teacher: architecture; None: that of the student.
  """
  terms = Distillation(*(c.distill[f.name] for f in dataclasses.fields(Distillation)))
  untrained = forward.untrained()
  other = untrained if teacher is None else dataclasses.replace(untrained, arch=teacher)

  def loss(params, batch, keys):
    student = forward.with_dropout(keys)
    if c.distill.file:
      total, nll, divergence = student.distillation_from_top(params, batch, terms)
    else:
      weights = other.find_params(params, 'teacher')
      total, nll, divergence = student.distillation(params, batch, other, weights, terms)
    weight = batch['weights'].sum()
    return total, weight, {'nll': (nll, weight), 'divergence': (divergence, weight)}

  return loss


def read_tokens(run: Run) -> None:
  """Opens the teacher's likeliest tokens of all training corpora of a run.

  Raises:
    ConfigError: they are of another tokenizer, teacher, temperature, number or vocabulary than the
      config's.
    DataError: they are missing or damaged.
  """
  c = run.config
  teacher_writer.check_size(c, run.arch.vocab_size)
  own = {
    'tokenizer': run.model.tokenizer.fingerprint,
    'temperature': c.distill.temperature,
    'top_k': c.distill.top_k,
    'vocab': run.arch.vocab_size,
  }
  own |= {'teacher': c.distill.teacher} if c.distill.teacher else {}
  for corpus in run.data.corpora:
    found = teacher_file.TopTokens(c.distill.file, corpus)
    written = dataclasses.asdict(found.facts)
    if other := [f'{k}: {written[k]!r}, here {own[k]!r}' for k in own if written[k] != own[k]]:
      raise ConfigError(
        f'distill.file={c.distill.file} was written with other settings: {"; ".join(other)}. Run '
        'ftjax.teacher with this config and another folder'
      )
    corpus.top_tokens = found


def build(run: Run) -> fit.Parts:
  """Returns loss and evaluation of a run; the evaluation is that of supervised fine-tuning."""
  teacher = None
  if run.config.distill.file:
    read_tokens(run)
  else:
    teacher = run.auxiliary.find('teacher').architecture()
  share = run.config.distill.on_policy
  source = on_policy_rows.OnPolicyRows(run, share) if share else None
  return fit.Parts(make_loss(run.forward, run.config, teacher), token_loss.evaluation(run), source)
