"""python -m ftjax.teacher --config=FILE [--config.KEY=VALUE ...]

Writes a teacher's likeliest tokens over the training data of a config with algorithm=distill: for
every supervised position the distill.top_k likeliest tokens of distill.teacher and their log-probs,
to the folder distill.file. Training by the same config then reads them and holds no teacher. What
is there already is not computed again; a run that was stopped is continued by the same command."""

from absl import flags

from ftjax import cli
from ftjax.config import algorithms, validation
from ftjax.runtime.errors import ConfigError

cli.define_config()
cli.define_processes()


def main() -> None:
  """Checks the config, then writes what is missing."""
  c = flags.FLAGS.config
  validation.validate(c)
  if 'distill' not in algorithms.of(c).reads:
    raise ConfigError(f'algorithm={c.algorithm} has no teacher; expected algorithm=distill')
  cli.join()
  from ftjax.experiment import teacher_writer

  teacher_writer.write(c)


if __name__ == '__main__':
  cli.run(main)
