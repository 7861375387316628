"""Makes a CycloneDX bill of materials of a wheel from the locks of requirements/.

Nothing in it depends on the time or the machine: its serial number and timestamp come from the
wheel's sha256 and the commit's date.
"""

import collections
import dataclasses
import datetime
import pathlib
import re
import uuid

from cyclonedx import model
from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import bom as cdx_bom
from cyclonedx.model import component as cdx
from cyclonedx.output import json as cdx_json
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# The locks that ftjax runs from; 'test' and 'build' hold tools besides.
LOCKS = ('cpu', 'tpu', 'cuda', 'plan')
_NAMESPACE = uuid.UUID('4e6f3a52-0d0c-5c1e-9a53-0f6d2a4b7c11')  # drawn once; any constant serves
_VIA_PROJECT = 'ftjax'


@dataclasses.dataclass(frozen=True)
class Pin:
  """A package of a lock.

  Attributes:
    requirement: name, extras, the exact version and the marker.
    hashes: sha256 of each of its files, hexadecimal.
    via: canonical names of the packages that depend on it; 'ftjax' for the project's own.
  """

  requirement: Requirement
  hashes: tuple[str, ...]
  via: tuple[str, ...]

  @property
  def name(self) -> str:
    """The canonical name."""
    return canonicalize_name(self.requirement.name)

  @property
  def version(self) -> str:
    """The exact version."""
    return str(self.requirement.specifier).removeprefix('==')

  @property
  def marker(self) -> str:
    """The condition under which it is installed; '' for always."""
    return str(self.requirement.marker or '')


def read_lock(text: str) -> list[Pin]:
  """Returns the pins of a lock as uv writes them, in its order.

  Raises:
    ValueError: a line that is neither a pin with hashes nor one of uv's comments.
  """
  pins = []
  for block in re.split(r'\n(?=\S)', text.strip()):
    head, _, rest = block.partition(' \\\n')
    hashes = re.findall(r'--hash=sha256:([0-9a-f]{64})\b', rest)
    requirement = Requirement(head)
    if not hashes or not re.fullmatch(r'==[^*,]+', str(requirement.specifier)):
      raise ValueError(f'expected NAME==VERSION with hashes, got {head!r}; make lock writes these')
    comment = '\n'.join(line for line in rest.split('\n') if '--hash=' not in line)
    words = re.findall(r'^ *# +(?:via )?(\S.*)$', comment.replace('# via\n', '\n'), re.MULTILINE)
    via = {canonicalize_name(w.split(' ')[0]) for w in words if not w.startswith('-')}
    pins.append(Pin(requirement, tuple(sorted(hashes)), tuple(sorted(via))))
  return pins


def build(
  wheel: pathlib.Path,
  sha256: str,
  locks: pathlib.Path,
  epoch: int,
  commit: str,
  is_modified: bool = False,
) -> str:
  """Returns the bill of materials as JSON of CycloneDX 1.6.

  A component is one version of a package; its hashes are those of all its files, of which an
  installation takes one. Its properties name the locks that hold it, and when it is installed.

  Args:
    wheel: the file that it describes; its name holds the version.
    sha256: of the wheel.
    locks: the folder of the locks.
    epoch: seconds since 1970 of the commit.
    commit: that the wheel was built from.
    is_modified: whether its sources differ from the commit.
  """
  name, version = wheel.name.split('-')[:2]
  properties = [model.Property(name='ftjax:commit', value=commit)]
  if is_modified:
    properties.append(model.Property(name='ftjax:modified', value='true'))
  root = cdx.Component(
    name=name,
    version=version,
    type=cdx.ComponentType.APPLICATION,
    bom_ref=f'{name}=={version}',
    purl=PackageURL('pypi', None, name, version),
    licenses=[LicenseFactory().make_from_string('Apache-2.0')],
    hashes=[_hash(sha256)],
    properties=properties,
  )
  components, edges = _components(locks)
  made = cdx_bom.Bom(
    components=components.values(),
    serial_number=uuid.uuid5(_NAMESPACE, sha256),
    metadata=cdx_bom.BomMetaData(
      component=root, timestamp=datetime.datetime.fromtimestamp(epoch, datetime.UTC)
    ),
  )
  of_name = collections.defaultdict(list)
  for component in components.values():
    of_name[component.name].append(component)
  for parent, children in edges.items():
    for user in [root] if parent == _VIA_PROJECT else of_name[parent]:
      made.register_dependency(user, [c for n in sorted(children) for c in of_name[n]])
  return cdx_json.JsonV1Dot6(made).output_as_string(indent=2) + '\n'


def _components(
  locks: pathlib.Path,
) -> tuple[dict[tuple[str, str], cdx.Component], dict[str, set[str]]]:
  """Returns the components by name and version, and for each name the names it depends on."""
  components, edges = {}, collections.defaultdict(set)
  for lock in LOCKS:
    for pin in read_lock((locks / f'{lock}.txt').read_text(encoding='utf-8')):
      for parent in pin.via:
        edges[parent].add(pin.name)
      key = (pin.name, pin.version)
      if key not in components:
        components[key] = cdx.Component(
          name=pin.name,
          version=pin.version,
          bom_ref='=='.join(key),
          purl=PackageURL('pypi', None, *key),
          hashes=[_hash(h) for h in pin.hashes],
        )
      properties = components[key].properties
      properties.add(model.Property(name='ftjax:lock', value=lock))
      if pin.marker:
        properties.add(model.Property(name='ftjax:installed-if', value=pin.marker))
  return components, edges


def _hash(sha256: str) -> model.HashType:
  return model.HashType(alg=model.HashAlgorithm.SHA_256, content=sha256)
