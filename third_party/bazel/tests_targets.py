"""The target of a test file: pytest's run of it, and what it needs."""

import starlark

# What each pytest_test has; see pytest.bzl.
_OF_ALL = {'//:pyproject.toml', '//tests:conftest', '@pypi//pytest'}


def of_file(project, path: str) -> starlark.Call:
  """Returns the pytest_test of a file."""
  folder, _, file = path.rpartition('/')
  return starlark.Call(
    'pytest_test',
    name=file.removesuffix('.py'),
    size=_size(project, path),
    src=file,
    data=starlark.labels(data(project, path), folder),
    shard_count=project.targets['shards'].get(path, []),
    deps=starlark.labels(_deps(project, path), folder),
  )


def _deps(project, path: str) -> set[str]:
  found = project.deps(path)
  return (found | {project.label(f) for f in project.runtime(path)}) - _OF_ALL


def data(project, path: str) -> set[str]:
  """Returns labels of what a test and the tests' modules that it imports read."""
  if path in project.targets['whole_project']['files']:
    return {'//:all_files'}
  return set().union(*(project.data(file) for file in modules(project, path))) - _OF_ALL


def modules(project, path: str) -> set[str]:
  """Returns a test and what it imports outside of ftjax/, directly or through others."""
  todo, seen = [path], set()
  while todo:
    current = todo.pop()
    if current not in seen and not current.startswith('ftjax/'):
      seen.add(current)
      todo += [*project.sources.imported(current)[0], *project.sources.named(current)]
  return seen


def _size(project, path: str) -> str:
  sizes = project.targets.get('sizes', {})
  return next((size for size, files in sizes.items() if path in files), 'small')
