"""A toy reward outside of ftjax: the share of vowels in a completion."""


def vowels(completions, **kwargs):
  texts = [messages[-1]['content'] for messages in completions]
  return [sum(c in 'aeiou' for c in text) / max(1, len(text)) for text in texts]
