"""The language of texts: by script, by frequent words, and by py3langid where it is installed.

A text counts as of another language than the set's only if two signs agree: py3langid is sure, and
hardly a frequent word of the set's language is in it. Names, code and short texts mislead each of
the two alone.
"""

import functools
import importlib.util
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from ftjax.audit.finding import Finding
from ftjax.audit.rows import Row, found
from ftjax.evaluation import ngrams

UNKNOWN = '?'
_FEWEST_WORDS, _FEWEST_LETTERS = 8, 40  # of a text whose language is looked at
_USUAL = 0.05  # share of the texts of a language that belongs to the set
_SURE = 0.99  # probability by py3langid
_FREQUENT = {
  'en': 'the of and to a in is that it for on with as are this was be by an or from at not can '
  'you which have has it its',
  'de': 'der die das und in zu den mit von ist für auf ein eine nicht im dem des sich auch es als '
  'an werden wird oder sie',
  'fr': 'le la les de des et un une du en est pour que dans qui sur par pas au avec ce il sont '
  'plus ou vous cette',
  'es': 'el la los las de y en que un una es por con para del se al no como su más este o lo',
  'it': 'il la di e un una che per in del della con non è si le dei da sono al nel come o',
  'pt': 'o a os as de e em que um uma do da para com por não no na se é mais como dos ou',
  'nl': 'de het een en van in is op te dat die voor met zijn niet aan er om ook als of',
  'sv': 'och i att det som en på är av för med till den har inte om ett de kan',
  'da': 'og i at det som en på er af for med til den har ikke om et de kan der',
  'pl': 'i w na z do się nie to jest że o jak po za od dla lub przez są',
  'cs': 'a v na se je s z do to že o k pro za od by nebo jako jsou',
  'tr': 've bir bu için ile da de olarak çok en daha gibi olan',
  'fi': 'ja on ei se että oli hän ovat joka tai kun mutta voi',
  'ro': 'și de în a la cu pe o un este nu din pentru care sau',
  'hu': 'a az és egy hogy nem is van ez vagy meg de',
  'id': 'yang dan di dari untuk ini dengan adalah pada tidak itu atau',
  'vi': 'và của là có không cho được các một trong với những',
}  # fmt: skip
_FREQUENT_SETS = {name: frozenset(text.split()) for name, text in _FREQUENT.items()}
_LEAST_SHARE = 0.08  # frequent words among the words of a text of a language
# Scripts of few languages, by the first word of the names of their letters.
_SCRIPTS = {
  'CYRILLIC': 'ru', 'GREEK': 'el', 'HEBREW': 'he', 'ARABIC': 'ar', 'DEVANAGARI': 'hi',
  'BENGALI': 'bn', 'TAMIL': 'ta', 'THAI': 'th', 'HANGUL': 'ko', 'HIRAGANA': 'ja',
  'KATAKANA': 'ja', 'CJK': 'zh', 'GEORGIAN': 'ka', 'ARMENIAN': 'hy',
}  # fmt: skip

# text -> (language, probability).
Detector = Callable[[str], tuple[str, float]]


def has_langid() -> bool:
  """Returns whether py3langid is installed."""
  return importlib.util.find_spec('py3langid') is not None


@functools.cache
def _langid() -> Detector:
  from py3langid.langid import MODEL_FILE, LanguageIdentifier

  model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
  return lambda text: (lambda found: (str(found[0]), float(found[1])))(model.classify(text))


def _script(text: str) -> str:
  """Returns the language of a text in a script of few languages; '' for Latin and for a mixture."""
  letters = [c for c in text[:400] if c.isalpha()]
  if not letters or text.isascii():
    return ''
  counts = Counter(unicodedata.name(c, 'LATIN').partition(' ')[0] for c in letters)
  if counts['HIRAGANA'] + counts['KATAKANA'] > 0.1 * len(letters):
    return 'ja'
  name, number = counts.most_common(1)[0]
  return _SCRIPTS.get(name, '') if number > 0.6 * len(letters) else ''


def _frequent_share(words: Sequence[str], language: str) -> float:
  known = _FREQUENT_SETS.get(language, frozenset())
  return sum(word in known for word in words) / max(len(words), 1)


def detect(text: str) -> str:
  """Returns the language of a text as a code of ISO 639-1; UNKNOWN for short and unclear ones."""
  script = _script(text)
  words = ngrams.words(text)
  if script:
    return script if sum(c.isalpha() for c in text) >= 10 else UNKNOWN
  if len(words) < _FEWEST_WORDS or sum(map(len, words)) < _FEWEST_LETTERS:
    return UNKNOWN
  shares = {name: _frequent_share(words, name) for name in _FREQUENT_SETS}
  by_words = max(shares, key=shares.__getitem__)
  if not has_langid():
    return by_words if shares[by_words] >= 2 * _LEAST_SHARE else UNKNOWN
  language, probability = _langid()(text)
  if probability < _SURE:
    return UNKNOWN
  if language not in _FREQUENT_SETS:
    return language if shares[by_words] < _LEAST_SHARE else UNKNOWN
  return language if shares[language] >= max(_LEAST_SHARE, shares[by_words] / 2) else UNKNOWN


def find(rows: Sequence[Row]) -> tuple[list[Finding], dict[str, dict[str, int]]]:
  """Finds questions and answers of another language than those of the set.

  A language belongs to the set if at least a twentieth of the texts whose language is known have
  it. Questions are compared with questions, answers with answers: a set of translations has two
  languages.

  Returns:
    (findings, {'question' or 'answer': {language: texts}}).
  """
  out: dict[int, Finding] = {}
  mix: dict[str, dict[str, int]] = {}
  for name in ('question', 'answer'):
    texts = [row.content if name == 'question' else row.answer for row in rows]
    found_languages = {text: detect(text) for text in dict.fromkeys(texts)}
    languages = [found_languages[text] for text in texts]
    counts = Counter(x for x in languages if x != UNKNOWN)
    if not counts:
      continue
    total = sum(counts.values())
    mix[name] = dict(counts.most_common())
    usual = {x for x, n in counts.items() if n >= _USUAL * total} or {counts.most_common(1)[0][0]}
    for i, language in enumerate(languages):
      if language == UNKNOWN or language in usual:
        continue
      words = ngrams.words(texts[i])
      if any(_frequent_share(words, x) >= _LEAST_SHARE for x in usual) and not _script(texts[i]):
        continue
      detail = f'{name} in {language!r}, the others are in {", ".join(sorted(usual))}'
      out.setdefault(i, found('language', rows, i, texts[i], detail))
  return [out[i] for i in sorted(out)], mix
