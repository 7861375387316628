"""The targets of a test file: pytest's run of it, and what it needs."""

import starlark


def of_file(project, path: str) -> list[starlark.Call]:
  """Returns the pytest_test of a file, and a py_library where other files import it."""
  folder, _, file = path.rpartition('/')
  name = file.removesuffix('.py')
  calls = []
  if any(path in project.sources.imported(f)[0] for f in project.sources.files):
    calls.append(
      starlark.Call(
        'py_library',
        name=f'{name}_module',
        srcs=[file],
        deps=starlark.labels(project.deps(path), folder),
      )
    )
  test = starlark.Call(
    'pytest_test',
    name=name,
    size=_size(project, path),
    src=file,
    data=starlark.labels(data(project, path), folder),
    shard_count=project.targets['shards'].get(path, []),
    deps=starlark.labels(_deps(project, path), folder),
  )
  return [*calls, test]


def _deps(project, path: str) -> set[str]:
  found = project.deps(path)
  return found | {project.label(f) for f in project.runtime(path)}


def data(project, path: str) -> set[str]:
  """Returns labels of what a test and the tests' modules that it imports read."""
  todo, seen, found = [path], set(), set()
  while todo:
    current = todo.pop()
    if current in seen or current.startswith('ftjax/'):
      continue
    seen.add(current)
    found |= project.data(current)
    todo += project.sources.imported(current)[0]
  if path in project.targets['whole_project']['files']:
    return {'//:all_files'}
  return found


def _size(project, path: str) -> str:
  sizes = project.targets.get('sizes', {})
  return next((size for size, files in sizes.items() if path in files), 'small')
