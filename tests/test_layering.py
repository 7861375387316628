"""The rules of the house that a parser can check: who imports whom, and what nobody does."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1] / 'ftjax'
FILES = sorted(ROOT.rglob('*.py'))

# DESIGN section 3: a file imports from lower layers or its own folder.
FOLDERS = {
  'runtime': 0,
  'losses': 0,
  'data': 1,
  'models': 2,
  'hf': 3,
  'rollout': 3,
  'training': 4,
  'evaluation': 4,
  'planning': 4,
}
ENTRIES = {'train', 'evaluate', 'generate', 'convert', 'plan', 'preview', 'supervise', 'command'}
# Layer 5 in the order in which its files may import each other: data, wiring, training, algorithms.
WIRING = (
  'config_hints',
  'config_section',
  'algorithm_config',
  'config',
  'config_file',
  'config_overrides',
  'algorithms',
  'forward',
  'examples',
  'experiment',
  'resume',
  'data_check',
  'compare',
  'trainer',
  'summary',
  'fit',
  'forecast',
  'pairs',
  'preference_loss',
  'reference_cache',
  'rollout_files',
  'sampled',
  'trained_reward',
  'episodes',
  'policy_gradient',
  'saved_model',
  'terminal_chat',
  'generator',
)
DRAWERS = {'utils', 'util', 'common', 'base', 'core', 'helpers', 'misc', 'inspect'}


def name_of(path):
  return path.relative_to(ROOT).with_suffix('').as_posix()


def layer(name):
  """Of `training/step`, `sft`, `train`."""
  folder, _, rest = name.partition('/')
  if rest:
    return FOLDERS[folder]
  return 6 if folder in ENTRIES else 5


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
      for end in (2, 3):
        name = '/'.join(parts[1:end])
        if name in known:
          out.add(name)
  return out


def test_the_test_sees_the_house():
  names = {name_of(p) for p in FILES}
  assert {'training/step', 'models/transformer', 'sft', 'train', 'config'} <= names
  assert 'training/step' in own_imports(ROOT / 'fit.py')
  assert 'ml_collections' in {m.split('.')[0] for m in imports(ROOT / 'config.py')}


def is_downward(name, other):
  """Whether a file may import another one."""
  same_folder = '/' in name and name.split('/')[0] == other.split('/')[0]
  if same_folder or other == name:
    return True
  if name in ENTRIES and other in ('command', 'config'):
    return True
  if layer(name) == layer(other) == 5:
    # An algorithm may import the wiring, the wiring what stands before it; no algorithm another.
    return other in WIRING[: WIRING.index(name) if name in WIRING else len(WIRING)]
  return layer(other) < layer(name)


def test_imports_go_down():
  files = [p for p in FILES if p.name != '__init__.py']
  pairs = [(name_of(path), other) for path in files for other in own_imports(path)]
  assert [f'{a} imports {b}' for a, b in pairs if not is_downward(a, b)] == []


def test_nobody_imports_what_the_product_does_without():
  for path in FILES:
    tops = {m.split('.')[0] for m in imports(path)}
    banned = {'torch', 'transformers', 'pickle', 'dill', 'cloudpickle', 'tensorflow', 'tests'}
    assert not tops & banned, path
    if path.parent.name == 'data':
      assert not tops & {'jax', 'jaxlib', 'flax', 'optax'}, f'{path}: data/ is host code'


def test_a_config_never_goes_below_layer_five():
  for path in (p for p in FILES if layer(name_of(p)) < 5):
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
    if name_of(path) != 'data/chat':
      assert not any(m.split('.')[0] == 'jinja2' for m in imports(path)), path
  tree = ast.parse((ROOT / 'data' / 'chat.py').read_text())
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
      # config.default is a list of keys.
      if isinstance(node, ast.FunctionDef) and name_of(path) != 'config':
        assert node.end_lineno - node.lineno < 80, f'{path}:{node.lineno} {node.name}'
