"""Rows of the tutorials: python demo/tutorial_rows.py TARGET_DIR

A made-up bicycle shop answers its customers. No data set is read, and the same rows are written
every time.

  chat.jsonl            {"messages"}: questions and the shop's answers, for chat SFT
  chat_test.jsonl       {"messages", "answer"}: questions of the same kind about other goods
  tickets.jsonl         {"messages"}: a message of a customer and its class, for classification
  tickets_test.jsonl    {"messages", "choices", "label"}
  pairs.jsonl           {"prompt", "chosen", "rejected"}: a short and a long answer, for DPO
  pairs_test.jsonl      the same
  style_test.jsonl      {"messages", "chosen", "rejected"}: the same for eval.tasks
  prompts.jsonl         {"prompt", "item"}: requests for a slogan, for GRPO"""

import json
import pathlib
import sys

GOODS = (
  ('city bike', 18), ('tandem', 35), ('cargo bike', 42), ('e-bike', 39), ('mountain bike', 29),
  ('child seat', 6), ('helmet', 4), ('trailer', 15), ('folding bike', 21), ('road bike', 33),
  ('touring bike', 27), ('kick scooter', 9), ('pannier', 5), ('pump', 2), ('lock', 3),
  ('repair kit', 7), ('rain cape', 8), ('bike rack', 11), ('unicycle', 13), ('recumbent', 44),
)  # fmt: skip
TEST_GOODS = (('gravel bike', 31), ('basket', 3), ('balance bike', 10), ('tool bag', 6))
QUESTIONS = (
  'What does a {item} cost per day?',
  'How much is it to rent a {item} for one day?',
  'Price of a {item}, please.',
  'I would like a {item} for today. What do I pay?',
)
TICKETS = {
  'billing': (
    'You charged me twice for the {item}.',
    'I need an invoice for the {item}.',
    'My card was declined when I paid for the {item}.',
    'When do I get the deposit for the {item} back?',
  ),
  'repair': (
    'The {item} makes a noise and does not run well.',
    'A part of the {item} broke on the way.',
    'The {item} that I have is damaged.',
    'Something is loose on my {item}.',
  ),
  'booking': (
    'Can I reserve a {item} for Saturday?',
    'I want to keep the {item} one day longer.',
    'Please cancel my {item} for tomorrow.',
    'Is a {item} free next week?',
  ),
}


def chat(item: str, price: int, question: str) -> tuple[list[dict], str]:
  """Returns a conversation without its answer, and the answer."""
  answer = f'A {item} costs {price} euros per day. Ride safely!'
  return [{'role': 'user', 'content': question.format(item=item)}], answer


def ticket(item: str, text: str) -> list[dict]:
  """Returns the request to classify a message of a customer."""
  ask = 'Class of this message: billing, repair or booking?\n\n'
  return [{'role': 'user', 'content': ask + text.format(item=item)}]


def pair(item: str, price: int, question: str) -> dict:
  """Returns a short answer that is preferred to one with the same price and filler."""
  chosen = f'{price} euros per day.'
  rejected = (
    f'Thank you so much for your question about the {item}! Here at our shop we are always happy '
    f'to help. The price that you asked about is {price} euros, and that is for one day.'
  )
  return {
    'prompt': [{'role': 'user', 'content': question.format(item=item)}],
    'chosen': [{'role': 'assistant', 'content': chosen}],
    'rejected': [{'role': 'assistant', 'content': rejected}],
  }


def rows(goods: tuple[tuple[str, int], ...]) -> dict[str, list[dict]]:
  """Returns the rows about some goods by the stem of their file."""
  out = {'chat': [], 'tickets': [], 'pairs': [], 'prompts': []}
  for item, price in goods:
    for question in QUESTIONS:
      messages, answer = chat(item, price, question)
      out['chat'].append({'messages': messages, 'answer': answer})
      out['pairs'].append(pair(item, price, question))
    for label, texts in TICKETS.items():
      for text in texts:
        row = {'messages': ticket(item, text), 'choices': list(TICKETS), 'label': label}
        out['tickets'].append(row)
    request = [{'role': 'user', 'content': f'Write a slogan for our {item}, in one line.'}]
    out['prompts'].append({'prompt': request, 'item': item})
  return out


def with_answer(messages: list[dict], answer: str) -> dict:
  """Returns a training row."""
  return {'messages': [*messages, {'role': 'assistant', 'content': answer}]}


def as_task(row: dict) -> dict:
  """Returns a pair as the kind `preference` of eval.tasks reads it."""
  texts = {side: row[side][0]['content'] for side in ('chosen', 'rejected')}
  return {'messages': row['prompt'], **texts}


def main(target: pathlib.Path) -> None:
  target.mkdir(parents=True, exist_ok=True)
  train, test = rows(GOODS), rows(TEST_GOODS)
  files = {
    'chat': [with_answer(r['messages'], r['answer']) for r in train['chat']],
    'chat_test': test['chat'],
    'tickets': [with_answer(r['messages'], r['label']) for r in train['tickets']],
    'tickets_test': test['tickets'],
    'pairs': train['pairs'],
    'pairs_test': test['pairs'],
    'style_test': [as_task(row) for row in test['pairs']],
    'prompts': train['prompts'],
  }
  for name, found in files.items():
    text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in found)
    (target / f'{name}.jsonl').write_text(text, encoding='utf-8')
  print('\n'.join(f'{target / name}.jsonl: {len(found)} rows' for name, found in files.items()))


if __name__ == '__main__':
  if len(sys.argv) != 2 or sys.argv[1].startswith('-'):
    raise SystemExit(__doc__)
  main(pathlib.Path(sys.argv[1]))
