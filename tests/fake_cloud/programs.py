"""The fake gcloud, kubectl, ssh and scp: `programs.py PROGRAM ARGUMENT ...`, with their state in
$FAKE_CLOUD.

A queued resource, a node, an instance and a group of instances become ready after a few looks.
"""

import os
import sys

import kubernetes
import machines

STAGES = {
  'queued-resources': ['WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE'],
  'tpu-vm': ['CREATING', 'READY'],
  'instances': ['PROVISIONING', 'RUNNING'],
  'managed': ['PROVISIONING', 'RUNNING'],
}


def split(words):
  """(positional, flags) of a gcloud command."""
  flags = {}
  for word in (w for w in words if w.startswith('--')):
    name, _, value = word[2:].partition('=')
    flags[name] = value
  return [w for w in words if not w.startswith('--')], flags


def missing(name):
  print(f'ERROR: (gcloud) NOT_FOUND: Resource {name} was not found', file=sys.stderr)
  return 1


def tpu_environments(count):
  """What a host of a TPU slice has in its environment; see jax._src.clusters."""
  port = os.environ.get('FAKE_CLOUD_PORT', '18482')
  for i in range(count):
    yield {
      'JAX_FORCE_TPU_INIT': '1',
      'JAX_PLATFORMS': '',  # there is no libtpu, so jax takes the CPU
      'TPU_WORKER_ID': str(i),
      'TPU_WORKER_HOSTNAMES': ','.join(['localhost'] * count),
      'MEGASCALE_NUM_SLICES': '1',
      'MEGASCALE_SLICE_ID': '0',
      'MEGASCALE_COORDINATOR_ADDRESS': 'localhost',
      'JAX_COORDINATOR_PORT': port,
    }


def instance(group, i):
  """The name of a machine of a group; for trainings, an address of this machine."""
  is_address = os.environ.get('FAKE_CLOUD_ADDRESSES')
  return f'127.0.0.{i + 1}' if is_address else f'{group}-{"xzab"[i]}'


class Gcloud:
  def __init__(self, cloud, words):
    self.cloud = cloud
    self.words, self.flags = split(words)

  def main(self):
    w = self.words
    if w[:3] == ['compute', 'tpus', 'accelerator-types']:
      print(os.environ.get('FAKE_CLOUD_TYPES', 'v5litepod-16').replace(',', '\n'))
      return 0
    if w[:2] == ['compute', 'machine-types']:
      print(self.flags['filter'].partition('=')[2])
      return 0
    if w[:2] in (['compute', 'ssh'], ['compute', 'scp']):
      return self.reach(w[1], w[2:])
    kinds = [k for k in (*STAGES, 'resource-policies', 'instance-templates') if k in w]
    kind = kinds[-1]
    verb, *names = w[w.index(kind) + 1 :]
    if kind == 'resource-policies' and verb == 'create':
      names = names[1:]  # create workload-policy NAME
    if verb in ('ssh', 'scp'):
      return self.reach(verb, names)
    return getattr(self, verb.replace('-', '_'))(kind, names[0])

  def key(self, kind, name):
    places = [
      self.flags[n] for n in ('zone', 'region', 'instance-template-region') if n in self.flags
    ]
    return f'{kind}/{name}/{places[0]}'

  def create(self, kind, name):
    if os.environ.get('FAKE_CLOUD_QUOTA') == '0':
      print('ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota exceeded', file=sys.stderr)
      return 1
    with self.cloud.state() as state:
      key = self.key(kind, name)
      if key in state:
        print(f'ERROR: (gcloud) ALREADY_EXISTS: {name}', file=sys.stderr)
        return 1
      state[key] = {'looks': 0, 'flags': self.flags, 'lost': ''}
      if kind == 'managed':
        state[key]['size'] = int(self.flags['size'])
    return 0

  def look(self, state, key, kind):
    row = state[key]
    stages = STAGES.get(kind, ['READY'])
    stage = row['lost'] or stages[min(row['looks'], len(stages) - 1)]
    row['looks'] += 1
    if kind == 'queued-resources' and stage == 'ACTIVE':
      flags = row['flags']
      node = f'tpu-vm/{flags["node-id"]}/{flags["zone"]}'
      state.setdefault(node, {'looks': 0, 'flags': flags, 'lost': ''})
    return stage

  def describe(self, kind, name):
    with self.cloud.state() as state:
      key = self.key(kind, name)
      if key not in state:
        return missing(name)
      print(self.look(state, key, kind))
    return 0

  def list_instances(self, kind, name):
    with self.cloud.state() as state:
      key = self.key(kind, name)
      if key not in state:
        return missing(name)
      stage = self.look(state, key, kind)
      for i in range(state[key]['size']):
        column = 'name' if self.flags['format'] == 'value(name)' else 'status'
        print(instance(name, i) if column == 'name' else stage)
    return 0

  def resize(self, kind, name):
    with self.cloud.state() as state:
      row = state[self.key(kind, name)]
      hosts = [instance(name, i) for i in range(row['size'])]
      row |= {'size': int(self.flags['size']), 'looks': 0, 'lost': ''}
    self.cloud.power_off(hosts)
    return 0

  def delete(self, kind, name):
    with self.cloud.state() as state:
      key = self.key(kind, name)
      if key not in state:
        return missing(name)
      row = state.pop(key)
      hosts = [f'{name}-{i}' for i in range(4)]
      if kind == 'queued-resources':
        state.pop(f'tpu-vm/{name}/{row["flags"]["zone"]}', None)
      if kind == 'managed':
        hosts = [instance(name, i) for i in range(row['size'])]
      if kind == 'instances':
        hosts = [name]
    if kind in STAGES:
      self.cloud.power_off(hosts)
    return 0

  def reach(self, verb, names):
    """ssh and scp."""
    name = names[-1].partition(':')[0]
    if 'worker' in self.flags:
      count = int(os.environ.get('FAKE_CLOUD_HOSTS', '2'))
      hosts, environments = [f'{name}-{i}' for i in range(count)], [*tpu_environments(count)]
      with self.cloud.state() as state:
        row = state.get(self.key('tpu-vm', name))
      if self.flags['worker'] != 'all':
        i = int(self.flags['worker'])
        hosts, environments = hosts[i : i + 1], environments[i : i + 1]
    else:
      hosts, environments = [name], [{}]
      with self.cloud.state() as state:
        groups = [r for k, r in state.items() if k.startswith('managed/')]
      row = {'lost': any(r['lost'] for r in groups)}
    if row is None or row['lost']:
      print(f'ERROR: {name} cannot be reached', file=sys.stderr)
      return 255
    if verb == 'scp':
      return self.cloud.copy(names[:-1], hosts, names[-1].partition(':')[2])
    return self.cloud.run(hosts, self.flags['command'], environments)


def ssh(cloud, words):
  while words[0] == '-o':
    words = words[2:]
  host, command = words
  return cloud.run([host.rpartition('@')[2]], command, [{}])


def scp(cloud, words):
  kept = []
  while words:
    word = words.pop(0)
    if word == '-o':
      words.pop(0)
    elif not word.startswith('-'):
      kept.append(word)
  host, _, folder = kept[-1].partition(':')
  return cloud.copy(kept[:-1], [host.rpartition('@')[2]], folder)


def main():
  cloud = machines.Cloud(os.environ['FAKE_CLOUD'])
  program, *words = sys.argv[1:]
  cloud.called(program, words)
  if program == 'gcloud':
    return Gcloud(cloud, words).main()
  return {'ssh': ssh, 'scp': scp, 'kubectl': kubernetes.kubectl}[program](cloud, words)


if __name__ == '__main__':
  sys.exit(main())
