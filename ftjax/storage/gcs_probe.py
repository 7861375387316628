"""Tests the permissions that a run needs on a bucket, in under five seconds, at its start.

An error names the account, the bucket, the permission and the command that grants it.
"""

import os
import re
import socket
import threading
from collections.abc import Callable
from typing import Any

from ftjax.runtime.errors import ConfigError
from ftjax.storage import gcs

SECONDS = 4.0  # for all requests together
_ROLES = {'storage.buckets.get': 'roles/storage.legacyBucketReader'}
_ROLE = 'roles/storage.objectUser'  # create, get, list, update, delete objects
_EMAIL = r"[\w.+'-]+@[\w.-]+\w"


def probe(workdir: str | os.PathLike) -> None:
  """Creates, reads, lists and deletes an object below `workdir`, and reads the bucket's properties.

  Raises:
    ConfigError: an operation was refused or took too long, or there is no such bucket.
  """
  gcs.client()
  path = gcs.GcsPath(workdir) / f'.probe.{socket.gethostname()}.{os.getpid()}'
  doing, failed = ['start'], []

  def work():
    try:
      for permission, attempt in _attempts(path):
        doing[0] = permission
        attempt()
    except BaseException as error:
      failed.append(error)

  # In a thread, which is abandoned when it is late: it also fetches tokens, by code whose retries
  # have no limit that we could set.
  thread = threading.Thread(target=work, name='probe', daemon=True)
  thread.start()
  thread.join(SECONDS)
  if thread.is_alive():
    raise ConfigError(
      f'--workdir={os.fspath(workdir)}: no answer within {SECONDS:.0f} s while trying '
      f'{doing[0]}. Can this machine reach storage.googleapis.com, and its metadata server for a '
      'token?'
    )
  if failed:
    raise _explain(os.fspath(workdir), path.bucket, doing[0], failed[0]) from failed[0]


def _attempts(path: gcs.GcsPath) -> list[tuple[str, Callable[[], Any]]]:
  """Returns permissions, each with a request that needs it and is not retried."""
  bucket, blob = gcs.client().bucket(path.bucket), path.blob()
  limits: dict[str, Any] = {'retry': None, 'timeout': (2, 2)}

  def listing():
    names = [b.name for b in gcs.client().list_blobs(path.bucket, prefix=path.key, **limits)]
    if path.key not in names:
      raise ConfigError(f'{path}: was written, but the listing does not show it')

  return [
    ('storage.objects.create', lambda: blob.upload_from_string(b'probe', **limits)),
    ('storage.objects.get', lambda: blob.download_as_bytes(**limits)),
    ('storage.objects.list', listing),
    ('storage.objects.delete', lambda: blob.delete(**limits)),
    # Orbax 0.12 asks, at every listing of checkpoints, whether the bucket is hierarchical.
    ('storage.buckets.get', lambda: bucket.reload(**limits)),
  ]


def _explain(workdir: str, bucket: str, permission: str, error: BaseException) -> Exception:
  from google.api_core import exceptions
  from google.auth.exceptions import GoogleAuthError

  start = f'--workdir={workdir}: '
  if isinstance(error, ConfigError):
    return error
  if isinstance(error, exceptions.Forbidden):
    return ConfigError(start + _refusal(bucket, permission, str(error)))
  if isinstance(error, exceptions.NotFound):
    return ConfigError(
      f'{start}there is no bucket {bucket}, or this account may not know of it; '
      f'gcloud storage buckets create gs://{bucket}'
    )
  if isinstance(error, exceptions.Unauthorized | GoogleAuthError):
    return ConfigError(
      f'{start}Google did not accept the credentials ({type(error).__name__}): '
      'gcloud auth application-default login'
    )
  if isinstance(error, OSError | exceptions.GoogleAPIError):
    return ConfigError(
      f'{start}{permission} could not be tried: {type(error).__name__}. Can this machine reach '
      'storage.googleapis.com?'
    )
  return error if isinstance(error, Exception) else RuntimeError(str(error))


def _refusal(bucket: str, permission: str, answer: str) -> str:
  """Returns the message for a refusal: only names and permissions come from the server's answer."""
  named = re.search(r"[Pp]ermission '?(storage\.\w+\.\w+)", answer)
  missing = named[1] if named else permission
  who = _principal(answer)
  if re.search(r'SCOPE_INSUFFICIENT|insufficient authentication scopes', answer):
    return (
      f'{who or "the service account of this VM"} lacks {missing} on gs://{bucket}, because the '
      'VM was made without that access scope: stop it, then gcloud compute instances '
      'set-service-account NAME --scopes=cloud-platform (a TPU VM: create it again with '
      '--scopes=cloud-platform)'
    )
  kind = 'serviceAccount' if who.endswith('gserviceaccount.com') else 'user'
  member = f'{kind}:{who}' if '@' in who else 'MEMBER'
  unknown = '' if '@' in who else ' (MEMBER: your account, see gcloud auth list)'
  return (
    f'{who or "the account of these credentials"} lacks {missing} on gs://{bucket}. Grant it: '
    f'gcloud storage buckets add-iam-policy-binding gs://{bucket} --member={member} '
    f'--role={_ROLES.get(missing, _ROLE)}{unknown}'
  )


def _principal(answer: str) -> str:
  """Returns the account, from the server's answer or else the credentials; '' if unknown."""
  if found := re.search(rf'({_EMAIL}) does not have', answer):
    return found[1]
  if 'Anonymous caller' in answer:
    return 'an anonymous caller (no credentials)'
  credentials = gcs.client()._credentials  # the client has no public name for them
  for name in ('service_account_email', 'signer_email', 'account'):
    account = getattr(credentials, name, None)
    if isinstance(account, str) and re.fullmatch(_EMAIL, account):
      return account
  return ''
