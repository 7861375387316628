"""Finds models and data sets on the Hugging Face hub, `org/name[@revision]`, and downloads files.

huggingface_hub does the work, with settings of its own: the cache is in HF_HOME, the token is that
of `hf auth login` or HF_TOKEN, HF_HUB_OFFLINE=1 keeps to the cache, HF_ENDPOINT names a mirror. It
downloads a file once per cache: other processes wait for its lock. Files that an interrupted
download finished are not fetched again. The library is imported when a name is used, not before.
"""

import functools
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ftjax.runtime.errors import ConfigError, DataError, RunError

log = logging.getLogger(__name__)

_PART = r'[A-Za-z0-9][\w.-]*'
_NAME = re.compile(rf'({_PART}/{_PART})(?:@(\w[\w./-]*))?')
_COMMIT = re.compile('[0-9a-f]{40}')
# What huggingface_hub raises where a proxy or a login page answers in place of the hub.
STRANGE = (KeyError, TypeError, AttributeError)


def is_name(path: str | os.PathLike) -> bool:
  """Returns whether the path of a model is meant as `org/name[@revision]` on the hub.

  A local path wins. So does a local folder `org`, in which a name was misspelt; but not over
  `org/name@COMMIT`: a run may have made its workdir in a folder of that name.
  """
  text = os.fspath(path)
  found = _NAME.fullmatch(text)
  if not found or text.endswith('.gguf') or '..' in text:
    return False
  is_pinned_name = found[2] is not None and _COMMIT.fullmatch(found[2])
  is_local = os.path.isdir(text.partition('/')[0]) and not is_pinned_name
  return not os.path.exists(text) and not is_local


def is_pinned(path: str | os.PathLike) -> bool:
  """Returns whether a path is `org/name@COMMIT`, as the configs of runs hold it."""
  return is_name(path) and bool(_COMMIT.fullmatch(split(os.fspath(path))[1]))


def split(text: str) -> tuple[str, str]:
  """Returns ('org/name', revision) of a name; the revision is '' where none is given."""
  found = _NAME.fullmatch(text)
  if found is None:
    raise ValueError(f'{text!r} is no name on the hub')
  return found[1], found[2] or ''


@functools.cache
def pin(text: str, kind: str = 'model') -> str:
  """Returns `org/name@COMMIT`: what a name, branch or tag stands for now, and for this process.

  Where the hub cannot be reached, the commit that the cache knows under this name is taken.

  Args:
    text: the name.
    kind: 'model' or 'dataset'.

  Raises:
    ConfigError: there is no such name or revision.
    DataError: no permission; or no network, and the cache does not know the name.
  """
  repo, revision = split(text)
  if _COMMIT.fullmatch(revision):
    return text
  from huggingface_hub import HfApi
  from huggingface_hub.errors import HTTPError, RevisionResolutionError

  try:
    found = HfApi(library_name='ftjax').resolve_revision(
      repo, repo_type=kind, revision=revision or None
    )
  except (HTTPError, RevisionResolutionError, OSError, ValueError, *STRANGE) as error:
    raise explain(text, error, kind) from error
  return f'{repo}@{found.resolved}'


def download(text: str, patterns: Sequence[str], is_shown: bool, kind: str = 'model') -> Path:
  """Downloads those files that the cache lacks; returns the folder of its snapshot.

  Args:
    text: `org/name@COMMIT`, as `pin` returns it.
    patterns: of the names of the files, as in fnmatch.
    is_shown: whether progress bars are drawn.
    kind: 'model' or 'dataset'.

  Raises:
    ConfigError, DataError: see `pin`.
  """
  repo, commit = split(text)
  from huggingface_hub import snapshot_download
  from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
  from huggingface_hub.utils import tqdm

  class Quiet(tqdm):
    def __init__(self, *args, **settings):
      super().__init__(*args, **(settings | {'disable': True}))

  try:
    return Path(
      snapshot_download(
        repo,
        repo_type=kind,
        revision=commit,
        allow_patterns=list(patterns),
        library_name='ftjax',
        tqdm_class=None if is_shown else Quiet,
      )
    )
  except (HTTPError, OfflineModeIsEnabled, OSError, ValueError, *STRANGE) as error:
    raise explain(text, error, kind) from error


def has_all(text: str, names: Sequence[str], kind: str) -> bool:
  """Returns whether the cache has all these files of `org/name@COMMIT`."""
  from huggingface_hub import try_to_load_from_cache

  repo, commit = split(text)
  found = (try_to_load_from_cache(repo, n, revision=commit, repo_type=kind) for n in names)
  return all(isinstance(path, str) for path in found)


def list_files(text: str) -> list[str]:
  """Returns the names of all files of `org/name@COMMIT` on the hub. Raises as `pin`."""
  repo, commit = split(text)
  from huggingface_hub import HfApi
  from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

  try:
    return sorted(HfApi(library_name='ftjax').list_repo_files(repo, revision=commit))
  except (HTTPError, OfflineModeIsEnabled, OSError, ValueError, *STRANGE) as error:
    raise explain(text, error) from error


def _status(error: BaseException) -> int | None:
  """Returns the HTTP status that the hub answered with; None where it did not answer."""
  from huggingface_hub.errors import HfHubHTTPError

  return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def explain(text: str, error: BaseException, kind: str = 'model') -> RunError:
  """Returns the error for a name that could not be used: which of name, revision, permission and
  network it was, and the remedy.

  Args:
    text: the name, as the user gave it.
    error: what huggingface_hub raised.
    kind: 'model' or 'dataset'.
  """
  from huggingface_hub import constants, get_token
  from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
  )

  place, status = f'{text}: there is no such local path, and on the hub', _status(error)
  repo, has_token = text.partition('@')[0].partition(':')[0], bool(get_token())
  login = 'log in with `hf auth login`, or set HF_TOKEN'
  if isinstance(error, GatedRepoError):
    page = f'{constants.ENDPOINT}/{"datasets/" if kind == "dataset" else ""}{repo}'
    whose = 'the account of your token' if has_token else f'an account, then {login}'
    return DataError(
      f'{place} this {kind} is gated (HTTP {status}): accept its terms at {page} with {whose}'
    )
  if isinstance(error, RevisionNotFoundError):
    return ConfigError(f'{place} {repo} has no such revision; give a branch, a tag or a commit')
  if isinstance(error, RepositoryNotFoundError):
    hint = (
      'check the name, and whether your token may read it'
      if has_token
      else f'check the name; if it is private, {login}'
    )
    return ConfigError(f'{place} there is no such {kind} (HTTP {status}): {hint}')
  if status in (401, 403):
    hint = 'your token is not valid or may not read it' if has_token else login
    return DataError(f'{place} permission was refused (HTTP {status}): {hint}')
  if isinstance(error, HFValidationError):
    return ConfigError(f'{place} this is no valid name: {error}')
  if isinstance(error, OfflineModeIsEnabled) or constants.is_offline_mode():
    return DataError(
      f'{place} it was not looked up (HF_HUB_OFFLINE is set); the cache {constants.HF_HUB_CACHE} '
      'has not all its files. Run once with a network, or unset HF_HUB_OFFLINE'
    )
  if status is not None:
    return DataError(f'{place} the answer was HTTP {status}: try again later')
  cause, wrappers = error.__cause__, LocalEntryNotFoundError | RevisionResolutionError
  if isinstance(error, wrappers) and isinstance(cause, HTTPError | OSError):
    return explain(text, cause, kind)
  if isinstance(error, wrappers | HTTPError | ConnectionError | TimeoutError):
    reason = (str(error).splitlines() or [''])[0][:200]
    return DataError(
      f'{place} nothing was found, since {constants.ENDPOINT} cannot be reached '
      f'({type(error).__name__}: {reason}). Check the network, HF_ENDPOINT and proxies; finished '
      'files of a download are kept'
    )
  if isinstance(error, (json.JSONDecodeError, *STRANGE)):
    return DataError(
      f'{place} nothing was found: {constants.ENDPOINT} did not answer as the hub does '
      f'({type(error).__name__}: {error}). Check HF_ENDPOINT, '
      'proxies and login pages of the network'
    )
  return DataError(f'{place} the download failed: {error}')
