"""ftjax ENTRY [--flag=value ...]

Runs an entry: `ftjax train ...` and `python -m ftjax.train ...` are the same program. Imports
neither jax nor the config before an entry is chosen."""

import difflib
import importlib
import sys

import ftjax

# Each entry and what it does, in the order of `ftjax --help`.
ENTRIES = {
  'train': 'Trains a model by a config, evaluates it and exports it; resumes a stopped run.',
  'preview': 'Shows the tokenized examples that a config would train on.',
  'plan': "Compiles a config's training step for hardware that is not attached: memory and cost.",
  'evaluate': 'Evaluates the exported model of a run and its base model, and compares them.',
  'generate': 'Generates from a model: one prompt, a file of prompts, or a chat.',
  'convert': 'Converts a GGUF file, a run or a model of the hub to a Hugging Face folder.',
  'study': 'Searches, cross-validates or measures a learning curve: many runs of one config.',
  'teacher': "Writes a teacher's likeliest tokens over training data, for distillation.",
  'supervise': 'Runs a command, and runs it again after a crash or preemption.',
  'lm_eval': "Runs EleutherAI's lm-eval, with ftjax models as --model ftjax.",
}
_OWN_ARGUMENTS = ('lm_eval',)  # entries that read their arguments themselves
_HELP = ('--help', '-help', '-h', '--h', '-?', 'help')
_BAD_USAGE = 2  # the exit code of ConfigError in runtime/errors.py


def usage() -> str:
  """Returns what `ftjax --help` prints."""
  width = max(map(len, ENTRIES))
  lines = [f'  {name:<{width}}  {text}' for name, text in ENTRIES.items()]
  return '\n'.join(
    [
      'Usage: ftjax ENTRY [--flag=value ...]',
      '',
      *lines,
      '',
      'ftjax ENTRY --help lists the flags of an entry; ftjax --version prints version and commit.',
    ]
  )


def main() -> None:
  """Runs the entry that the first argument names, with the arguments after it."""
  name = sys.argv[1] if len(sys.argv) > 1 else ''
  if name == 'help' and len(sys.argv) > 2 and sys.argv[2] in ENTRIES:
    name, sys.argv[1:] = sys.argv[2], [sys.argv[2], '--help']
  if name in _HELP:
    print(usage())
  elif name == '--version':
    from ftjax.runtime import build_commit

    print(f'ftjax {ftjax.__version__}, {build_commit.find().text()}')
  elif name in ENTRIES:
    sys.argv = [f'ftjax {name}', *sys.argv[2:]]
    entry = importlib.import_module(f'ftjax.{name}')
    # Imported late: it imports the config.
    from ftjax import cli

    cli.run(entry.main, has_flags=name not in _OWN_ARGUMENTS)
  else:
    print(f'error: {_unknown(name)}', file=sys.stderr)
    sys.exit(_BAD_USAGE)


def _unknown(name: str) -> str:
  """Returns the message for a first argument that is no entry; '' means there is none."""
  names = ', '.join(ENTRIES)
  if not name:
    return f'an entry is missing: ftjax ENTRY [--flag=value ...]; entries: {names}'
  if name.startswith('-'):
    return f'{name}: an entry comes first: ftjax ENTRY {name}; entries: {names}'
  near = difflib.get_close_matches(name.lower(), ENTRIES, n=1, cutoff=0.5)
  hint = f'; did you mean {near[0]}?' if near else ''
  return f'{name}: there is no such entry; entries: {names}{hint}'


if __name__ == '__main__':
  main()
