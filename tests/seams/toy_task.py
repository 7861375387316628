"""A toy evaluation task outside of ftjax: rows {"question", "result"}, where a completion is right
if it has at least as many characters as the result."""

from ftjax.evaluation.tasks import Kind


def read(row):
  return {'id': row['number'], 'prompt': row['question'], 'answer': row['result']}


def is_right(completion, prompt, answer):
  assert prompt
  return len(completion) >= len(answer)


def check_answer(answer):
  if len(answer) > 9:
    raise ValueError(f'{answer!r} is too long')


AS_LONG = Kind(is_right, read, check_answer)
