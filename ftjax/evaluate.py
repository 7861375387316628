"""python -m ftjax.evaluate --config=FILE --workdir=DIR [--config.KEY=VALUE ...]

Evaluates the base model of a config and the tuned model in DIR/export on eval.tasks, and compares
them: confidence intervals, paired tests, DIR/report.html.

  --compare DIR DIR ...   compares the results of several runs, and writes comparison.html
  --watch --workdir=DIR   shows a run while it trains
"""

import json

from absl import flags

from ftjax import cli
from ftjax.config import validation
from ftjax.runtime.errors import ConfigError

cli.define_config(is_required=False)
cli.define_processes()
_WORKDIR = flags.DEFINE_string('workdir', None, 'The folder of a run.')
_COMPARE = flags.DEFINE_list('compare', [], 'The workdirs that are compared: --compare DIR DIR ...')
_OUTPUT = flags.DEFINE_string(
  'output', 'comparison', 'With --compare: OUTPUT.html and OUTPUT.json.'
)
_WATCH = flags.DEFINE_boolean('watch', False, 'Shows the metrics of --workdir while it trains.')


def main() -> None:
  """Evaluates a run; compares several; or watches one."""
  if _COMPARE.value:
    _compare(_COMPARE.value)
    return
  if not _WORKDIR.value:
    raise ConfigError('--workdir is missing: the folder of a run; see --help')
  if _WATCH.value:
    from ftjax.reporting.watch import watch

    watch(_WORKDIR.value)
    return
  if flags.FLAGS.config is None:
    raise ConfigError('--config is missing: the config of the run, a file or a shipped name')
  _evaluate(_WORKDIR.value)


def _compare(workdirs: list[str]) -> None:
  from ftjax.experiment import compare_runs
  from ftjax.storage import files

  summary, found = compare_runs.compare(workdirs)
  text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False)
  files.write_text(f'{_OUTPUT.value}.json', text + '\n')
  files.write_text(f'{_OUTPUT.value}.html', found.page)
  print(f'\n{found.text}\n\n  report     {_OUTPUT.value}.html', flush=True)


def _evaluate(workdir: str) -> None:
  """Loads the export and evaluates it; results of the base model are cached."""
  c = flags.FLAGS.config
  validation.validate(c)
  from ftjax.evaluation import gate
  from ftjax.experiment import compare, fit, run_card
  from ftjax.experiment import run as experiment
  from ftjax.hf import run_export
  from ftjax.storage import files

  cli.join()
  if not (c.eval.tasks or c.eval.general):
    raise ConfigError(
      'eval.tasks is empty; give tasks, for example '
      '--config.eval.tasks="(\'mine=choice:rows.jsonl\',)"'
    )
  export = run_export.find(workdir)
  if export is None:
    raise ConfigError(
      f'--workdir={workdir}: it has no export/, which is written when training ends'
    )
  run = experiment.start(c, workdir, with_data=False)
  manifest = files.join(workdir, 'manifest.json')
  made_of = json.loads(files.read_text(manifest))['fingerprints'] if files.exists(manifest) else {}
  own = {'model': run.model.fingerprint, 'tokenizer': run.model.tokenizer.fingerprint}
  if other := [k for k in own if made_of.get(k, own[k]) != own[k]]:
    raise ConfigError(
      f'--workdir={workdir} was trained from another {other[0]} than model.path='
      f'{c.model.path}; base and tuned model would not be comparable'
    )
  evaluator = compare.Evaluator(run)
  found = evaluator.tuned(run.load_params(export, c.model.param_dtype))
  run_card.refresh(run.workdir, run.model)
  fit.write_report(run)
  gate.enforce(found['gate'], 'The export of the run stays as it is.')


if __name__ == '__main__':
  cli.run(main)
