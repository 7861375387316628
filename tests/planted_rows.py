"""Faults that are planted into good rows, one of each kind or several: what an audit must find."""

import dataclasses
import random

from ftjax.audit.rows import Row

PERSONAL = {
  'email': ('Write to jane.doe@company-mail.com', 'ask m.schulz+list@uni-koeln.de about it'),
  'phone': ('call +49 221 470 1234', 'my number is (212) 867-5309 at home'),
  'iban': ('pay to DE89 3704 0044 0532 0130 00', 'account GB82WEST12345698765432 in London'),
  'credit_card': ('card 4111 1111 1111 1111 was used', 'with 5555-5555-5555-4444 as always'),
  'ip_address': ('from 93.184.216.34 at night', 'host 2606:2800:220:1:248:1893:25c8:1946 answers'),
  'api_key': (
    'key AKIAIOSFODNN7EXAMPLA for the bucket',
    'token ghp_16C7e42F292c6912E7710c838347Ae178B4a works',
    'password: hT7#kq92LmXw now',
  ),
  'private_key': (
    '-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA',
    '-----BEGIN PRIVATE KEY-----',
  ),
}
LEAKS = (
  '<|im_start|>', '<|eot_id|>', '[INST]', '<end_of_turn>', '</s>', '\n### Response:\n', '<<SYS>>',
)  # fmt: skip
PHRASES = (
  'As an AI language model, I have no opinion.', "I'm sorry, but I cannot help with that.",
  'My knowledge cutoff is September 2021.',
)  # fmt: skip
BROKEN = ('caf\ufffd', 'a\x00b', '\ue000', '\x1b[0m', 'x9Qa' * 60, '#$%&*@!?/+=' * 12)
LOOPS = ('very ' * 12, 'haaaaaaaaaaaaaaaaaaaaaaaa', 'the same line here\n' * 8)


class Planter:
  """Copies rows with faults to the end, and remembers what was planted.

  Attributes:
    rows: with the faults. wanted: {(kind, index of the row)}. touched: indices of rows that an
      audit may name for a planted fault.
  """

  def __init__(self, rows, seed=0):
    self.rows, self.wanted, self.touched = list(rows), set(), set()
    self._random, self._next = random.Random(seed), len(rows)
    self._good = list(range(len(rows)))

  def take(self, fits=lambda row: True):
    """The index of a good row that is not used yet."""
    at = next(i for i in self._random.sample(self._good, len(self._good)) if fits(self.rows[i]))
    self._good.remove(at)
    return at

  def put(self, kind, at, **changes):
    """Changes the row in place."""
    self.rows[at] = dataclasses.replace(self.rows[at], **changes)
    self.wanted.add((kind, at))
    self.touched.add(at)

  def add(self, kind, row, *others):
    """Appends a row; `others` are indices of rows that the audit may name too."""
    self.rows.append(dataclasses.replace(row, line=len(self.rows) + 1))
    self.wanted.add((kind, len(self.rows) - 1))
    self.touched |= {len(self.rows) - 1, *others}

  # Faults of any row

  def exact(self, number):
    for _ in range(number):
      at = self.take()
      row = self.rows[at]
      question = f'  {row.question.upper()}  ' if self._random.random() < 0.5 else row.question
      self.add('exact_duplicate', dataclasses.replace(row, prompt=(*row.prompt[:-1], question)), at)

  def personal(self):
    for kind, texts in PERSONAL.items():
      for text in texts:
        at = self.take()
        self.put(kind, at, prompt=(*self.rows[at].prompt[:-1], f'{self.rows[at].question} {text}'))

  def in_question(self, kind, texts):
    for text in texts:
      at = self.take()
      self.put(kind, at, prompt=(*self.rows[at].prompt[:-1], f'{self.rows[at].question} {text}'))

  def mojibake(self, texts):
    for text in texts:
      at = self.take()
      wrong = text.encode('utf-8').decode('cp1252', errors='ignore')
      self.put(
        'mojibake', at, prompt=(*self.rows[at].prompt[:-1], f'{self.rows[at].question} {wrong}')
      )

  # Faults of rows with long answers

  def near(self, number):
    for _ in range(number):
      at = self.take(lambda row: len(row.content.split()) >= 60)
      words = self.rows[at].question.split(' ')
      words[-20] = 'altogether'
      prompt = (*self.rows[at].prompt[:-1], ' '.join(words))
      self.add('near_duplicate', dataclasses.replace(self.rows[at], prompt=prompt), at)

  def overlap(self, evaluation, number):
    long = [row for row in evaluation if len(row.content.split()) >= 20]
    for row in self._random.sample(long, number):
      self.add('eval_overlap', row)

  def empty(self):
    for text in ('', '  \n ', '...', '-'):
      self.put('empty_answer', self.take(), answers=(text,))

  def cut(self, number):
    for _ in range(number):
      at = self.take(lambda row: len(row.answer.split()) >= 28)
      words = self.rows[at].answer.split()
      end = next(k for k in range(22, len(words)) if words[k][-1].isalpha())
      self.put('truncated_answer', at, answers=(' '.join(words[: end + 1]),))

  def over_length(self, number):
    for _ in range(number):
      self.put('over_length', self.take(), tokens=2000, most_tokens=1024)

  def outliers(self, number):
    for _ in range(number):
      at = self.take(lambda row: row.answer[-1] == '.')
      texts = self._random.sample([row.answer for row in self.rows if len(row.answer) > 20], 150)
      self.put('length_outlier', at, answers=('\n'.join([*texts, self.rows[at].answer]),))

  def phrases(self):
    for text in PHRASES:
      self.put('assistant_phrase', self.take(), answers=(text,))

  def repeated(self, number):
    for _ in range(number):
      at = self.take(lambda row: len(row.question.split()) > 6)
      row = self.rows[at]
      self.put('prompt_repeated', at, answers=(f'{row.question}\n{row.answer}',))

  # Faults of rows with labels

  def conflicts(self, other, number):
    """`other`: {label: another one}."""
    for _ in range(number):
      at = self.take()
      row = self.rows[at]
      self.add('conflicting_labels', dataclasses.replace(row, answers=(other[row.answer],)), at)
      self.wanted.add(('conflicting_labels', at))

  def rare(self, label, number):
    taken = sorted(self.take() for _ in range(number))
    for at in taken:
      self.rows[at] = dataclasses.replace(self.rows[at], answers=(label,))
      self.touched.add(at)
    self.wanted.add(('rare_label', taken[0]))

  def language(self, questions):
    for text in questions:
      at = self.take()
      instruction = self.rows[at].question.rpartition('\n\n')[0]
      self.put('language', at, prompt=(*self.rows[at].prompt[:-1], f'{instruction}\n\n{text}'))

  # The verdict

  def missed(self, findings):
    return sorted(self.wanted - {(f.kind, f.row) for f in findings})


def as_rows(objects, source):
  """Rows of `{"messages": [...]}` objects, or of tasks with an answer or a label."""
  out = []
  for line, row in enumerate(objects, 1):
    texts = [m['content'] for m in row['messages']]
    answer = texts.pop() if row['messages'][-1]['role'] == 'assistant' else row.get('answer')
    answer = row.get('label') if answer is None else answer
    out.append(Row(source, line, tuple(texts), (answer,), source=source))
  return out
