"""python -m ftjax.evaluate --config=FILE --workdir=DIR [--config.KEY=VALUE ...]

Evaluates the base model of a config and the tuned model in DIR/export on eval.tasks, and compares
them: confidence intervals, paired tests."""

import json

from absl import flags

from ftjax import cli
from ftjax.config import validation

cli.define_config()
cli.define_processes()
_WORKDIR = flags.DEFINE_string('workdir', None, 'The folder of a finished run.', required=True)


def main() -> None:
  """Loads the export and evaluates it; results of the base model are cached."""
  c = flags.FLAGS.config
  validation.validate(c)
  from ftjax.experiment import compare, run_card
  from ftjax.experiment import run as experiment
  from ftjax.hf import run_export
  from ftjax.runtime.errors import ConfigError
  from ftjax.storage import files

  cli.join()
  if not c.eval.tasks:
    raise ConfigError(
      'eval.tasks is empty; give tasks, for example '
      '--config.eval.tasks="(\'mine=choice:rows.jsonl\',)"'
    )
  export = run_export.find(_WORKDIR.value)
  if export is None:
    raise ConfigError(
      f'--workdir={_WORKDIR.value}: it has no export/, which is written when training ends'
    )
  run = experiment.start(c, _WORKDIR.value, with_data=False)
  manifest = files.join(_WORKDIR.value, 'manifest.json')
  made_of = json.loads(files.read_text(manifest))['fingerprints'] if files.exists(manifest) else {}
  own = {'model': run.model.fingerprint, 'tokenizer': run.model.tokenizer.fingerprint}
  if other := [k for k in own if made_of.get(k, own[k]) != own[k]]:
    raise ConfigError(
      f'--workdir={_WORKDIR.value} was trained from another {other[0]} than model.path='
      f'{c.model.path}; base and tuned model would not be comparable'
    )
  evaluator = compare.Evaluator(run)
  evaluator.tuned(run.load_params(export, c.model.param_dtype))
  run_card.refresh(run.workdir, run.model)


if __name__ == '__main__':
  cli.run(main)
