"""The card of TPU names, read by the planner and by the launchers."""

import math
import subprocess

import pytest
from launchers import ROOT

from ftjax.planning import topology, tpu_names
from ftjax.runtime.errors import ConfigError


@pytest.mark.parametrize(
  'name, expected',
  [
    ('v5litepod-16', 'v5e:4x4'),
    ('v5e-16', 'v5e:4x4'),
    ('v6e-8', 'v6e:2x4'),
    ('v5p-8', 'v5p:2x2x1'),  # cores: four chips
    ('v4-32', 'v4:2x2x4'),
    ('tpu7x-8', 'tpu7x:2x2x1'),
    ('ct6e-standard-4t', 'v6e:2x2'),
    ('ct5lp-hightpu-8t', 'v5e:2x4'),
    ('tpu7x-standard-1t', 'tpu7x:1x1x1'),
    ('2xv5litepod-256', '2xv5e:16x16'),
  ],
)
def test_names_of_google_cloud_are_topologies(name, expected):
  assert topology.parse(name) == topology.parse(expected)
  assert topology.parse(name).name == expected


@pytest.mark.parametrize(
  'name, message',
  [
    ('v5litepod-17', 'no v5litepod slice of 17 chips; near it are v5litepod-4, v5litepod-8, v5li'),
    ('v5p-7', 'no v5p slice of 7 cores; near it are v5p-8'),
    ('v5litpod-16', 'did you mean v5litepod-16?'),
    ('ct6e-standard-2t', 'did you mean ct6e-standard-'),
    ('v2-8', 'v2 can be launched, but its shapes are not known'),
    ('', 'expected [SLICESx]KIND:SHAPE'),
  ],
)
def test_a_wrong_name_is_refused_with_the_nearest(name, message):
  with pytest.raises(ConfigError) as error:
    topology.parse(name)
  assert message in str(error.value)


def test_shapes_have_the_dimensions_of_their_chip_and_whole_hosts():
  for kind, row in tpu_names.generations().items():
    for machine, (chips, shapes) in row.hosts.items():
      assert machine.endswith(f'-{chips}t')
      for shape in shapes:
        sizes = [int(n) for n in shape.split('x')]
        assert len(sizes) == topology.CHIPS[kind].dims, (kind, shape)
        assert math.prod(sizes) % chips == 0, (kind, shape)


def test_the_launchers_read_the_card_as_the_planner_does():
  """Every name of the card."""
  names = []
  for row in tpu_names.generations().values():
    names += [*row.hosts, *(f'{row.prefix}-{n}' for n in tpu_names._sizes(row))]
  script = f"""
    set -euo pipefail
    . {ROOT}/launch/lib.sh
    flag accelerator '' ''
    for name in "$@"; do
      VALUE[accelerator]=$name
      read_card gke
      echo "$name $GEN:$TOPOLOGY $HOSTS $CHIPS_PER_HOST"
    done"""
  done = subprocess.run(['bash', '-c', script, 'x', *names], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  lines = done.stdout.split('\n')[:-1]
  assert len(lines) == len(names) > 200
  for line in lines:
    name, shape, hosts, per_host = line.split()
    assert topology.parse(name).name == shape
    assert int(hosts) * int(per_host) == math.prod(topology.parse(name).shape)
