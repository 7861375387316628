"""The models that an OpenAI-compatible server has, by name.

A name that the server does not list is no proof: some servers answer for any name, or for an alias.
So it is asked for one token, and what it refuses is an error.
"""

import logging
from collections.abc import Mapping, Sequence

from ftjax.evaluation.http_client import Client, RefusedError
from ftjax.runtime.errors import ConfigError, RunError

log = logging.getLogger(__name__)

_SHOWN = 10  # names of models in a message
_PROBES = (
  ('chat/completions', {'messages': [{'role': 'user', 'content': 'Hi'}]}),
  ('completions', {'prompt': 'Hi'}),
)


def names(client: Client) -> list[str]:
  """Returns the names of the server's models, none where it does not list them."""
  try:
    found = client.get('models').get('data')
  except (RefusedError, RunError):
    return []
  found = found if isinstance(found, list) else []
  return [str(m.get('id')) for m in found if isinstance(m, Mapping)]


def unknown(where: str, name: str, reason: object, known: Sequence[str]) -> ConfigError:
  """Returns the error for a model that the server does not have.

  Args:
    where: URL.
    name: of the model.
    reason: of the server.
    known: the names that it lists.
  """
  more = f' and {len(known) - _SHOWN} more' if len(known) > _SHOWN else ''
  return ConfigError(
    f'eval.models: {where}: no model {name!r}: {reason}; the server has '
    f'{", ".join(map(repr, known[:_SHOWN]))}{more}'
  )


def check(client: Client, name: str) -> None:
  """Checks that a server answers for a model, as far as that is known now: a server that cannot be
  reached, or does not list its models, is logged.

  Raises:
    ConfigError: it lists others, and refuses this one.
  """
  known = names(client)
  if not known:
    log.warning(
      'eval.models: %s lists no models now: whether it has %r shows when it is asked',
      *(client.url, name),
    )
    return
  if name in known:
    return
  refused: RefusedError | None = None
  for path, body in _PROBES:
    try:
      client.post(path, body | {'model': name, 'max_tokens': 1})
    except RefusedError as error:
      refused = error
    except RunError as error:
      log.warning('eval.models: whether %s has %r is not known: %s', client.url, name, error)
      return
    else:
      return
  raise unknown(client.url, name, refused, known)
