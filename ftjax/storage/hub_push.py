"""Uploads files to a model on the Hugging Face hub, as one commit.

huggingface_hub does the work, with the token of `hf auth login` or HF_TOKEN. Large files are sent
before the commit; one that the hub has already is not sent again. Before the commit nothing of a
model changes on the hub, so an upload that fails leaves the model there as it was.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from ftjax.runtime import redaction
from ftjax.runtime.errors import ConfigError, DataError, RunError
from ftjax.storage import hub

log = logging.getLogger(__name__)

_NAME = re.compile(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*')


def check(name: str) -> None:
  """Checks what can be known about an upload before there is anything to upload.

  Raises:
    ConfigError: a name that is not 'org/name', no token, or HF_HUB_OFFLINE.
  """
  from huggingface_hub import constants, get_token
  from huggingface_hub.errors import HFValidationError
  from huggingface_hub.utils import validate_repo_id

  if not _NAME.fullmatch(name):
    raise ConfigError(f'--push={name}: expected org/name, the name of a model on the hub')
  try:
    validate_repo_id(name)
  except HFValidationError as error:
    raise ConfigError(f'--push={name}: this is no valid name: {error}') from error
  if constants.is_offline_mode():
    raise ConfigError(f'--push={name}: HF_HUB_OFFLINE is set; unset it to upload')
  if not get_token():
    raise ConfigError(
      f'--push={name}: no token; log in with `hf auth login`, or set HF_TOKEN to one that may write'
    )


def push(
  name: str, files: Mapping[str, Path | bytes], is_public: bool, is_stale: Callable[[str], bool]
) -> str:
  """Makes a model on the hub hold these files, and returns the address of the commit.

  Args:
    name: 'org/name'; created if it is not there.
    files: {name in the repository: local file, or its content}.
    is_public: whether everybody may read it. A private upload into a public repository is refused.
    is_stale: whether another file of this name, which is in the repository, is removed.

  Raises:
    ConfigError: a name without a place on the hub, or a public repository without `is_public`.
    DataError: no permission or no network, or the hub refused the files.
  """
  from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
  from huggingface_hub.errors import HTTPError

  api = HfApi(library_name='ftjax')
  try:
    api.create_repo(name, private=not is_public, exist_ok=True)
    found = api.model_info(name)
    if not is_public and not found.private:
      raise ConfigError(
        f'--push={name}: this model is public on the hub; add --public to upload there, or give '
        'another name'
      )
    if is_public and found.private:
      log.warning(
        '%s was private before and stays so: change that in its settings on the hub', name
      )
    known = (file.rfilename for file in found.siblings or ())
    stale = sorted(path for path in known if path not in files and is_stale(path))
    done = api.create_commit(
      name,
      [
        *(
          CommitOperationAdd(path, file if isinstance(file, bytes) else os.fspath(file))
          for path, file in files.items()
        ),
        *(CommitOperationDelete(path) for path in stale),
      ],
      commit_message='Model written by ftjax',
    )
  # hf_xet, which sends large files, has no errors of its own.
  except (HTTPError, OSError, ValueError, RuntimeError, *hub.STRANGE) as error:
    raise _explain(name, error) from error
  return done.commit_url


def _explain(name: str, error: BaseException) -> RunError:
  """Returns the error for an upload that failed: the reason and the remedy, without a secret."""
  from huggingface_hub import constants
  from huggingface_hub.errors import HfHubHTTPError, HTTPError

  if isinstance(error, RunError):
    return error
  text, reason = (
    f'--push={name}:',
    redaction.redact_text((str(error).splitlines() or [''])[0][:300]),
  )
  if isinstance(error, HfHubHTTPError):
    status = error.response.status_code
    reason = redaction.redact_text((error.server_message or '').partition('\n')[0][:300])
    answer = f'HTTP {status}: {reason}' if reason else f'HTTP {status}'
    if status == 401:
      return DataError(
        f'{text} your token is not valid ({answer}); log in with `hf auth login`, or set HF_TOKEN'
      )
    if status == 403:
      return DataError(
        f'{text} your token may not write there ({answer}); take one with the right to write, of '
        f'an account that belongs to {name.partition("/")[0]}'
      )
    if status == 404:
      return ConfigError(f'{text} the hub has no such place ({answer}); check org and name')
    return DataError(f'{text} the hub refused the upload ({answer}); the model there is unchanged')
  if isinstance(error, (json.JSONDecodeError, *hub.STRANGE)):
    return DataError(
      f'{text} {constants.ENDPOINT} did not answer as the hub does ({type(error).__name__}). Check '
      'HF_ENDPOINT, proxies and login pages of the network'
    )
  if isinstance(error, HTTPError | ConnectionError | TimeoutError):
    return DataError(
      f'{text} {constants.ENDPOINT} cannot be reached ({type(error).__name__}: {reason}). Check '
      'the network, HF_ENDPOINT and proxies; files that were sent are not sent again'
    )
  return DataError(f'{text} the upload failed ({type(error).__name__}: {reason})')
