"""Words that docs, messages, docstrings and comments do not use: ours, where the field has another.

The left-hand column of the project's glossary, and what readers stumbled over.
"""

import re

WORDS = (
  r'episodes?', r'teach(es)?', r'lessons?', r'speak(s|ers?)?', r'models? says?',
  r'says (nothing|so|what|who)', r'said', r'tells?', r'told', r'paid', r'(?<!-)pays?',
  r'earn(s|ed)?', r'charge[sd]', r'judg(e|ed|es)', r'straddled', r'readout', r'owed', r'owes',
  r'islands?', r'kin', r'laid', r'lays', r'mend(s|ed)?', r'from nothing', r'or its like',
  r'the very', r'hands? on', r'brings? to', r'goes? on', r'went on', r'gives? way',
  r'of its own words', r'peers', r'spread of', r'beside the (model|state)',
)  # fmt: skip
FORBIDDEN = re.compile(rf'\b({"|".join(WORDS)})\b', re.IGNORECASE)
