"""The modules of a user that a config names by 'module:object'."""

import ml_collections

from ftjax.config import algorithms, choices, section, task_specs
from ftjax.runtime import named_object
from ftjax.runtime.digest import digest


def fingerprints(c: ml_collections.ConfigDict) -> dict[str, str]:
  """Returns fingerprints of the code of a user's modules that a validated config names, by config
  key: algorithm, model.family, eval.tasks and the keys of choices.OBJECTS.
  """
  names = {key: section.flat(c)[key] for key in ('model.family', *choices.OBJECTS)}
  found = {key: [name] for key, name in names.items() if named_object.is_named(name)}
  if named_object.is_named(c.algorithm):
    found['algorithm'] = [c.algorithm, algorithms.of(c).module]
  kinds = [task_specs.own_object(spec.kind) for spec in task_specs.parse_all(c.eval.tasks)]
  if own := sorted(name for name in kinds if name is not None):
    found[task_specs.KEY] = own
  return {key: digest(list(map(named_object.fingerprint, own))) for key, own in found.items()}
