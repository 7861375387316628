"""Distillation: a student learns the teacher's distribution of every supervised token, beside the
token itself (Hinton et al. 2015; Kim and Rush 2016 on sequences).

The teacher is computed in the step, with parameters under `teacher/` of the state; the head of both
models is in chunks, so that no logits of whole rows exist. Without distill.teacher the model that
training starts from is the teacher, which keeps the student near it."""

import dataclasses

import ml_collections

from ftjax.algorithms import token_loss
from ftjax.experiment import fit
from ftjax.experiment.run import Run
from ftjax.losses.distillation import Distillation
from ftjax.models.architecture import Architecture
from ftjax.models.forward import Forward
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
    weights = other.find_params(params, 'teacher')
    student = forward.with_dropout(keys)
    total, nll, divergence = student.distillation(params, batch, other, weights, terms)
    weight = batch['weights'].sum()
    return total, weight, {'nll': (nll, weight), 'divergence': (divergence, weight)}

  return loss


def build(run: Run) -> fit.Parts:
  """Returns loss and evaluation of a run; the evaluation is that of supervised fine-tuning."""
  teacher = run.auxiliary.find('teacher').architecture()
  return fit.Parts(make_loss(run.forward, run.config, teacher), token_loss.evaluation(run))
