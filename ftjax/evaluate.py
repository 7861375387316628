"""python -m ftjax.evaluate --config=FILE --workdir=DIR [--config.KEY=VALUE ...]

Scores the base model of a config and the tuned one that DIR/export holds on eval.tasks, and
compares them: intervals, paired tests."""

import json

from absl import flags

from ftjax import cli
from ftjax.config import validation

cli.define_config()
cli.define_processes()
_WORKDIR = flags.DEFINE_string('workdir', None, 'The folder of a finished run.', required=True)


def main() -> None:
  """Loads the export and judges it; base results are cached."""
  c = flags.FLAGS.config
  validation.validate(c)
  from ftjax.experiment import compare
  from ftjax.experiment import run as experiment
  from ftjax.hf import load
  from ftjax.runtime.errors import ConfigError
  from ftjax.storage import files

  cli.join()
  if not c.eval.tasks:
    raise ConfigError(
      'eval.tasks is empty; give tasks, for example '
      '--config.eval.tasks="(\'mine=choice:rows.jsonl\',)"'
    )
  export = load.exported(_WORKDIR.value)
  if export is None:
    raise ConfigError(
      f'--workdir={_WORKDIR.value}: there is no export/ in it; it is written when training ends'
    )
  run = experiment.start(c, _WORKDIR.value, with_data=False)
  manifest = files.join(_WORKDIR.value, 'manifest.json')
  made_of = json.loads(files.read_text(manifest))['fingerprints'] if files.exists(manifest) else {}
  own = {'model': run.model.fingerprint, 'tokenizer': run.model.tokenizer.fingerprint}
  if other := [k for k in own if made_of.get(k, own[k]) != own[k]]:
    raise ConfigError(
      f'--workdir={_WORKDIR.value} was trained from another {other[0]} than model.path='
      f'{c.model.path}; base and tuned would not belong together'
    )
  judge = compare.Evaluator(run)
  judge.tuned(run.load_params(export, c.model.param_dtype))


if __name__ == '__main__':
  cli.run(main)
