"""Names the extra that a missing package of a metric belongs to."""

import importlib.util

from ftjax.runtime.errors import ConfigError


def need(package: str, what: str, extra: str = 'eval') -> None:
  """Raises ConfigError with the extra to install if a package is missing.

  Args:
    package: as it is imported: 'sacrebleu'.
    what: needs it: 'the metric bleu'.
  """
  if importlib.util.find_spec(package) is None:
    raise ConfigError(f'{what} needs the package {package}; pip install "ftjax[{extra}]"')
