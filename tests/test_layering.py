"""The rules of the house that a parser can check: who imports whom, and what nobody does."""

import ast
import pathlib
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1] / 'ftjax'
FILES = sorted(ROOT.rglob('*.py'))

_TABLE = tomllib.loads((ROOT.parent / 'layers.toml').read_text())
IMPORTS, CONFIG_READERS = _TABLE['imports'], _TABLE['config_readers']
ENTRIES = {'train', 'evaluate', 'generate', 'convert', 'plan', 'preview', 'supervise', 'study'}
ENTRIES |= {'lm_eval', 'teacher'}
TOP = ENTRIES | {'cli', '__init__', '__main__'}
TRANSFORMERS = {'runtime/transformers_library'}  # the file that imports it, in a function
DRAWERS = {'utils', 'util', 'common', 'base', 'core', 'helpers', 'misc', 'inspect'}


def name_of(path):
  return path.relative_to(ROOT).with_suffix('').as_posix()


def folder_of(name):
  """The folder of a file like `training/step`; '' for an entry."""
  return name.rpartition('/')[0].split('/')[0]


def imports(path):
  """Dotted modules that a file imports, at whatever depth; `from a import b` gives a.b."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path}: relative imports hide the layer'
      found |= {f'{node.module}.{alias.name}' for alias in node.names}
  return found


def own_imports(path):
  """Names like `training/step` of our files that a file imports."""
  known = {name_of(p) for p in FILES}
  out = set()
  for module in imports(path):
    parts = module.split('.')
    if parts[0] == 'ftjax':
      longest = ('/'.join(parts[1:end]) for end in range(len(parts), 1, -1))
      out |= set([name for name in longest if name in known][:1])
  return out


def test_the_test_sees_the_house():
  names = {name_of(p) for p in FILES}
  assert {'training/step', 'models/transformer', 'algorithms/sft', 'train'} <= names
  assert 'training/step' in own_imports(ROOT / 'experiment' / 'fit.py')
  assert 'ml_collections' in {m.split('.')[0] for m in imports(ROOT / 'config' / 'keys.py')}


def test_the_table_names_every_folder_from_the_ground_up():
  folders = {folder_of(name_of(p)) for p in FILES if p.read_text().strip()} - {''}
  assert folders == set(IMPORTS)
  for i, (folder, others) in enumerate(IMPORTS.items()):
    assert set(others) <= set(list(IMPORTS)[:i]), f'{folder} imports a row below it'


def test_files_outside_of_folders_are_entries():
  assert {p.stem for p in ROOT.glob('*.py')} <= TOP


def test_folders_import_what_the_table_allows():
  wrong = []
  for path in FILES:
    name = name_of(path)
    mine = folder_of(name)
    for other in own_imports(path) - {'__init__'}:
      theirs = folder_of(other)
      allowed = theirs == mine or theirs in IMPORTS.get(mine, ()) or other == 'cli'
      if not allowed and name not in TOP:
        wrong.append(f'{name} imports {other}')
  assert not wrong


def test_the_table_allows_only_what_is_used():
  files = [p for p in FILES if p.read_text().strip() and folder_of(name_of(p))]
  used = {folder_of(name_of(p)): set() for p in files}
  for path in files:
    used[folder_of(name_of(path))].update(map(folder_of, own_imports(path)))
  unused = {f: sorted((set(IMPORTS[f]) & used.keys()) - others) for f, others in used.items()}
  assert not {folder: others for folder, others in unused.items() if others}


def test_no_files_import_each_other_in_a_circle():
  files = {name_of(p): own_imports(p) - {name_of(p)} for p in FILES if p.name != '__init__.py'}
  while ready := [name for name, others in files.items() if not others & files.keys()]:
    for name in ready:
      del files[name]
  assert not files, f'a circle among {sorted(files)}'


def test_nobody_imports_what_the_product_does_without():
  for path in FILES:
    tops = {m.split('.')[0] for m in imports(path)}
    banned = {'torch', 'transformers', 'pickle', 'dill', 'cloudpickle', 'tensorflow', 'tests'}
    banned -= {'transformers'} if name_of(path) in TRANSFORMERS else set()
    assert not tops & banned, path
    if path.parent.name == 'data':
      assert not tops & {'jax', 'jaxlib', 'flax', 'optax'}, f'{path}: data/ is host code'


def test_a_config_is_read_by_its_readers_alone():
  readers = {'', *CONFIG_READERS}
  for path in (p for p in FILES if folder_of(name_of(p)) not in readers):
    assert 'ml_collections' not in {m.split('.')[0] for m in imports(path)}, path
    assert 'ConfigDict' not in path.read_text(), path


def dotted(node):
  parts = []
  while isinstance(node, ast.Attribute):
    parts.append(node.attr)
    node = node.value
  return '.'.join([*([node.id] if isinstance(node, ast.Name) else []), *reversed(parts)])


def called(tree):
  """Names of what is called in a file."""
  return [dotted(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)]


def test_banned_names():
  nnx = ('jit', 'grad', 'value_and_grad', 'scan', 'vmap', 'Optimizer', 'sow', 'Rngs')
  for path in FILES:
    tree = ast.parse(path.read_text())
    used = {dotted(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert not used & {f'nnx.{n}' for n in nnx}, path
    assert not set(called(tree)) & {'eval', 'exec', 'hasattr', 'pickle.loads', 'yaml.load'}, path


def test_nobody_swallows_every_error():
  """But `errors.caught`, which hands it to its caller."""
  for path in (p for p in FILES if name_of(p) != 'runtime/errors'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.ExceptHandler):
        raised = isinstance(node.body[-1], ast.Raise)  # under another name
        narrow = node.type is not None and dotted(node.type) != 'Exception'
        assert narrow or raised, f'{path}:{node.lineno}'


def test_templates_render_in_the_sandbox_of_one_file():
  for path in FILES:
    if name_of(path) == 'reporting/page':  # its template is a file of the package
      assert 'from_string' not in path.read_text() and 'Template(' not in path.read_text()
    elif name_of(path) not in ('data/chat_template', 'data/template_sandbox'):
      assert not any(m.split('.')[0] == 'jinja2' for m in imports(path)), path
  tree = ast.parse((ROOT / 'data' / 'template_sandbox.py').read_text())
  bases = [dotted(b) for n in ast.walk(tree) if isinstance(n, ast.ClassDef) for b in n.bases]
  assert any('Sandboxed' in n for n in called(tree) + bases)
  plain = {'Environment', 'Template', 'NativeEnvironment'}
  assert not [n for n in called(tree) if n.split('.')[-1] in plain]


def test_test_files_have_names_of_their_own():
  """pytest imports those outside of packages by these alone."""
  tests = pathlib.Path(__file__).parent
  outside = [p.name for p in tests.rglob('test_*.py') if not (p.parent / '__init__.py').exists()]
  assert len(outside) == len(set(outside))


def test_no_drawers():
  for path in FILES:
    assert not {p.lower() for p in path.relative_to(ROOT).with_suffix('').parts} & DRAWERS, path


def test_human_sizes():
  for path in FILES:
    text = path.read_text()
    assert text.count('\n') <= 450, path
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.FunctionDef):
        assert node.end_lineno - node.lineno < 80, f'{path}:{node.lineno} {node.name}'


def test_the_rest_of_the_program_asks_the_model_kind():
  """A model is reached through models/kinds.py, whatever computes it."""
  wrong = [name_of(p) for p in FILES if 'models/transformer' in own_imports(p)]
  assert wrong == ['models/kinds']
