"""Collects what the model card of a run says, from the files of its workdir: config.json,
manifest.json, eval/summary.json. So the run itself, ftjax.evaluate and ftjax.convert write the same
card; the text is in hf/model_card.py.
"""

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from ftjax.audit.finding import KINDS
from ftjax.cluster import processes
from ftjax.config import keys, section
from ftjax.data import hub_dataset, sources
from ftjax.evaluation.comparison import TUNED
from ftjax.experiment import data_audit, label_names
from ftjax.experiment.model import Model
from ftjax.hf import export, model_card, model_folder, run_export
from ftjax.reporting import markdown
from ftjax.runtime import redaction
from ftjax.storage import files, hub

log = logging.getLogger(__name__)

# Keys of the machine and of the log, which change no weights.
_OWN = ('data.cache', 'data.workers', 'compile_cache', 'log.', 'profile.', 'watchdog.')
_SNAPSHOT = re.compile(r'.*/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})/?')


def build(
  workdir: str,
  model: Model,
  step: int,
  *,
  has_results: bool,
  is_adapter: bool,
  folder: str = 'export',
) -> str:
  """Returns README.md for the weights of a run.

  Args:
    workdir: of the run.
    model: its model, as `open_model` returned it.
    step: of the weights.
    has_results: whether eval/summary.json compares these weights with the base.
    is_adapter: whether the folder holds an adapter alone.
    folder: the folder of the workdir that the card is written into; '': one elsewhere.
  """
  config, manifest = _read(workdir, 'config.json'), _read(workdir, 'manifest.json')
  config = redaction.redact(config)
  found = _read(workdir, 'eval/summary.json') if has_results else {}
  devices = manifest.get('devices', {})
  return model_card.render(
    model_card.Card(
      algorithm=model_card.public(config.get('algorithm', '')),
      is_reward=bool(model.arch.num_labels) and label_names.is_reward(config),
      task=_task(model, config),
      num_labels=model.arch.num_labels,
      has_template=model.tokenizer.template is not None,
      step=step,
      base=_base(model, manifest),
      continues=bool(config.get('init_from')),
      is_adapter=is_adapter,
      merge='' if is_adapter else _merge(workdir, config, folder),
      sources=_sources(config, manifest),
      config=model_card.config_file(_changed(config)),
      evaluation=markdown.evaluation(found),
      scores=_scores(found),
      versions=_versions(manifest),
      devices=f'{devices["count"]} x {devices["kind"]}' if devices else '',
      audit=_audit(_read(workdir, data_audit.FILE)),
    )
  )


def _task(model: Model, config: Mapping[str, Any]) -> str:
  """Returns what the model gives, see model_card.Card."""
  if model.arch.task:
    return model.arch.task
  head = label_names.saved_head(config) if config.get('algorithm') else None
  return model_card.EMBEDDING if head is not None and head.is_embedding else ''


def _audit(found: Mapping[str, Any]) -> str:
  """Returns what an audit found in one sentence, by the names of the kinds; '' without an audit."""
  if found.get('version') != 1:
    return ''
  part = '' if found.get('is_whole', True) else 'the first '
  known = [k for k in found['kinds'] if k['kind'] in KINDS]
  named = ', '.join(f'{KINDS[k["kind"]].title}: {k["count"]}' for k in known)
  return f'An audit of {part}{found["rows"]} training rows found {named or "no fault"}.'


def _scores(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
  """Returns {task: {metric: value}} of the tuned model from eval/summary.json."""
  out = {}
  for name, task in found.get('tasks', {}).items():
    main = [m['name'] for m in task['metrics'] if not m.get('is_detail')]
    own = task['scores'].get(TUNED, {})
    out[name] = {m: own[m]['value'] for m in main if own.get(m, {}).get('value') is not None}
  return {name: scores for name, scores in out.items() if scores}


def _merge(workdir: str, config: Mapping[str, Any], folder: str) -> str:
  """Returns how the weights of a folder were merged; '' where no adapter was."""
  if not config.get('lora.rank'):
    return ''
  kl = _read(workdir, run_export.MERGE_REPORT).get('kl') if folder == run_export.MERGED else None
  distance = (
    '' if kl is None else f': {kl:.3g} nats per token (KL divergence) from base and adapter'
  )
  return f'These are the weights after merging{distance}.'


def refresh(workdir: str, model: Model) -> None:
  """Writes eval/summary.json, just made of export/, into the cards of export/ and of merged/, if
  that is of the same step; one that somebody edited stays. All processes may call this.
  """
  if processes.is_main():
    step = _refresh(workdir, 'export', model, None)
    _refresh(workdir, run_export.MERGED, model, step)


def _refresh(workdir: str, name: str, model: Model, expected: int | None) -> int | None:
  """Returns the step of a folder's card; None without a card of ftjax.

  expected: the step of the scores; None: that of the card.
  """
  folder = files.join(workdir, name)
  path = files.join(folder, model_card.FILE)
  if not files.exists(path):  # of an older ftjax
    return None
  known = files.read_bytes(path)
  step = model_card.step_of(known)
  if expected is not None and step not in (None, expected):
    return step  # merged/ is not written yet again
  if step is None or not model_card.is_unchanged(known):
    log.warning('%s is not as ftjax wrote it; the new results are not added to it', path)
    return step
  is_adapter = not files.exists(files.join(folder, 'config.json'))
  text = build(workdir, model, step, has_results=True, is_adapter=is_adapter, folder=name)
  export.replace_card(folder, text)
  return step


def of_checkpoint(workdir: str, model: Model, step: int) -> bytes:
  """Returns README.md of a whole model for a checkpoint: the export's own where that is a whole
  model of the same step.
  """
  folder = files.join(workdir, 'export')
  path = files.join(folder, model_card.FILE)
  known = files.read_bytes(path) if run_export.find(workdir) and files.exists(path) else b''
  is_same = model_card.step_of(known) == step
  if is_same and files.exists(files.join(folder, 'config.json')):
    return known
  has_results = is_same and model_card.has_results(known)
  found = build(workdir, model, step, has_results=has_results, is_adapter=False, folder='')
  return found.encode()


def _read(workdir: str, name: str) -> dict[str, Any]:
  """Returns a JSON file of a workdir; {} where it is not there or is no JSON object."""
  path = files.join(workdir, *name.split('/'))
  try:
    found = json.loads(files.read_text(path)) if files.exists(path) else {}
  except ValueError:  # a damaged one costs the card a section
    return {}
  return found if isinstance(found, dict) else {}


def _changed(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the keys of a config that differ from the defaults and may change the weights."""
  usual = section.plain(keys.default())
  return {
    k: v for k, v in config.items() if not k.startswith(_OWN) and (k not in usual or usual[k] != v)
  }


def _base(model: Model, manifest: Mapping[str, Any]) -> model_card.Base | None:
  path = model.source
  if not path:
    return None
  name, commit = hub.split(path) if hub.is_name(path) else ('', '')
  if found := _SNAPSHOT.fullmatch(path):
    name, commit = f'{found[1]}/{found[2]}', found[3]
  return model_card.Base(
    name=name or model_card.public(redaction.redact_text(path)),
    hub_id=name,
    commit=commit,
    fingerprint=manifest.get('fingerprints', {}).get('model', ''),
    license=model_card.license_of(model_folder.readme(path).decode('utf-8', 'replace')),
  )


def _sources(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[model_card.Source]:
  """Returns the data sources that the manifest counted, named as the config names them."""
  named = {
    kind: [s.path for s in sources.parse_specs(config.get(key) or '')]
    for kind, key in (('data', 'data.train'), ('eval', 'data.eval'))
  }
  out = []
  for key, counts in manifest.get('data', {}).items():
    kind, _, number = key.partition(' ')
    # Without data.eval the evaluation rows are split off the training sources.
    paths = named[kind] or named['data']
    path = paths[int(number)] if int(number) < len(paths) else counts['name']
    is_hub = hub_dataset.is_name(path)
    out.append(
      model_card.Source(
        use='train' if kind == 'data' else 'eval',
        name=model_card.public(path),
        hub_id=hub_dataset.repository(path) if is_hub else '',
        used=counts.get('examples_used', counts.get('prompts', 0)),
        left_out=sum(counts.get(k, 0) for k in ('dropped', 'unsupervised', 'bad', 'identical')),
        fingerprint=manifest['fingerprints'].get(key, ''),
      )
    )
  return out


def _versions(manifest: Mapping[str, Any]) -> dict[str, str]:
  code = manifest.get('code', {})
  commit = code.get('commit', '') + (' with local changes' if code.get('modified') else '')
  return {
    'ftjax': manifest.get('ftjax', ''),
    'commit of ftjax': commit,
    'python': manifest.get('python', ''),
    **manifest.get('packages', {}),
  }
