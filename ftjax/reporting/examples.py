"""Arranges example answers of the models side by side, with the words marked that differ.

A page holds at most MOST examples of a task, those first whose models differ, and as many bytes of
them as it was given; it states how many it left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.reporting import word_diff
from ftjax.reporting.figures import clean, is_finite, name, number, title

MOST = 200  # examples of a task
_HEAD = 500  # characters of a text that are shown at first
_WHOLE = 6000  # characters of a text that are in the page

Text = dict[str, Any]


def build(tasks: Sequence[Mapping[str, Any]], models: Sequence[str], most_bytes: int) -> list[Text]:
  """Returns the examples of each task that has some.

  Args:
    tasks: of the summary.
    models: in order; the words of each are compared with those of the first that answered.
    most_bytes: of the texts of all tasks, shared equally.
  """
  with_some = [t for t in tasks if t.get('examples')]
  return [_task(t, models, most_bytes // len(with_some)) for t in with_some]


def _task(task: Mapping[str, Any], models: Sequence[str], most_bytes: int) -> Text:
  found = task['examples']
  changes = [_change(e, models) for e in found]
  order = sorted(range(len(found)), key=lambda i: (-abs(changes[i] or 0.0), i))
  kept, size = [], 0
  for i in order[:MOST]:
    item = _example(found[i], models, changes[i])
    size += item.pop('size')
    if kept and size > most_bytes:
      break
    kept.append((i, item))
  kept.sort(key=lambda pair: pair[0])
  metric = next((m for m in task.get('metrics') or [] if m.get('is_primary')), {})
  sign = -1 if metric.get('better') == 'lower' else 1
  total = max(len(found), task.get('prompts') or 0)  # the summary has not all of them
  rows = []
  for place, (_, item) in enumerate(kept):
    gain = sign * (item['change'] or 0.0)
    item |= {'place': place, 'gain': f'{gain:.6g}', 'state': _state(gain, item['change'])}
    rows.append(item)
  return {'task': name(task['task']), 'rows': rows, 'left_out': total - len(rows)}


def _state(gain: float, change: float | None) -> str:
  if change is None:
    return ''
  return 'better' if gain > 0 else 'worse' if gain < 0 else 'same'


def _change(example: Mapping[str, Any], models: Sequence[str]) -> float | None:
  """Returns last minus first value of the primary metric; None without two of them."""
  values = example.get('values') or {}
  found = [float(values[m]) for m in models if is_finite(values.get(m))]
  return found[-1] - found[0] if len(found) > 1 else None


def _example(example: Mapping[str, Any], models: Sequence[str], change: float | None) -> Text:
  responses = {m: str(t) for m, t in (example.get('responses') or {}).items() if t is not None}
  predictions, values = example.get('predictions') or {}, example.get('values') or {}
  given = [m for m in models if m in responses]
  marked: dict[str, word_diff.Pieces] = {m: [(responses[m], False)] for m in given}
  if len(given) > 1:
    for model in given[1:]:
      first, marked[model] = word_diff.diff(_cut(responses[given[0]]), _cut(responses[model]))
      marked[given[0]] = first  # compared with the last model
  answers = []
  for model in models:
    text = responses.get(model)
    shown = None if text is None else folded(marked[model], len(text))
    prediction = predictions.get(model)
    prediction = None if prediction is None or prediction == text else _line(prediction)
    answers.append({'model': title(model), 'text': shown, 'prediction': prediction})
    answers[-1]['value'] = number(values.get(model))
  prompt, label = str(example.get('prompt', '')), example.get('label')
  size = sum(
    len(t.encode('utf-8', 'replace')) for t in (_cut(prompt), *map(_cut, responses.values()))
  )
  return {
    'id': _line(example.get('id', '')),
    'prompt': folded([(prompt, False)], len(prompt)),
    'label': None if label is None else _line(label),
    'answers': answers,
    'change': change,
    'size': size + 1200,
  }


def _cut(text: str) -> str:
  return text[:_WHOLE]


def _line(value: Any) -> str:
  text = str(value)
  return text if len(text) <= _HEAD else f'{text[:_HEAD]} ... ({len(text):,} characters)'


def folded(pieces: word_diff.Pieces, length: int) -> Text:
  """Returns a text for the page: "head" and "rest" in pieces (text, is marked), and "cut", how many
  of its `length` characters are not in the page.
  """
  head: word_diff.Pieces = []
  rest: word_diff.Pieces = []
  room, whole = _HEAD, _WHOLE
  if length <= _HEAD * 1.2:  # no fold for a few words
    room = length
  for text, mark in pieces:
    text = text[:whole]
    whole -= len(text)
    if room > 0:
      head.append((text[:room], mark))
      if text[room:]:
        rest.append((text[room:], mark))
      room -= len(text)
    elif text:
      rest.append((text, mark))
  cut = max(0, length - _WHOLE)
  more = sum(len(clean(t)) for t, _ in rest)
  return {'head': head, 'rest': rest, 'cut': cut, 'more': more, 'is_empty': length == 0}
