"""Checks texts that end a completion, converts them to token ids, and cuts completions at them."""

from collections.abc import Sequence

from ftjax.data.tokenizer import Tokenizer
from ftjax.runtime.errors import ConfigError


def check(texts: Sequence[str], tokenizer: Tokenizer, max_tokens: int, key: str) -> None:
  """Checks that completions can contain the texts.

  Args:
    texts: the texts that end a completion.
    tokenizer: the model's tokenizer.
    max_tokens: the length of the longest completion.
    key: the name of the setting in messages: 'rollout.stop' or '--stop'.

  Raises:
    ConfigError: a text that is empty, that has a character which no token of the vocabulary can
      produce, or that is longer than max_tokens tokens can be.
  """
  for text in texts:
    if not text:
      raise ConfigError(f'{key} has an empty text, which would end every completion; leave it out')
    if missing := _unproducible(text, tokenizer):
      raise ConfigError(
        f'{key}: {text!r} cannot occur: no token of {tokenizer.name} produces {missing!r}; '
        'expected a text of characters that the model can write'
      )
    if len(tokenizer.encode(text)) > max_tokens:
      longest = max(len(t) for t in _tokens(tokenizer))
      if len(text) > max_tokens * longest:
        raise ConfigError(
          f'{key}: {text[:40]!r}.. cannot occur: it has {len(text)} characters, and {max_tokens} '
          f'tokens of at most {longest} make fewer; shorten it or allow longer completions'
        )


def _tokens(tokenizer: Tokenizer) -> list[str]:
  return [tokenizer.token(i) for i in range(tokenizer.vocab_size)]


def _unproducible(text: str, tokenizer: Tokenizer) -> str:
  """Returns the first character of a text that no token contains; '' without one."""
  # Decoding may strip a space at either end.
  ids = tokenizer.encode(f'a{text}a')
  if text in tokenizer.decode(ids, skip_special=False):
    return ''
  texts = _tokens(tokenizer)
  # Tokens of single bytes make every character.
  if any('\ufffd' in t for t in texts) or '<0x41>' in texts:
    return ''
  known = set(''.join(texts))
  return next((char for char in text if char not in known), '')


def token_ids(texts: Sequence[str], tokenizer: Tokenizer) -> tuple[int, ...]:
  """Returns the ids of texts that are one special token each.

  These end a completion on the device, as the model's own stop tokens.
  """
  found = [tokenizer.encode(text) for text in texts]
  return tuple(ids[0] for ids in found if len(ids) == 1 and ids[0] in tokenizer.special_ids)


def text_before(ids: Sequence[int], texts: Sequence[str], tokenizer: Tokenizer) -> str:
  """Returns the text of a completion before the first of `texts`, or the whole without one.

  `texts` may be special tokens; other special tokens are removed.
  """
  whole = tokenizer.decode(ids, skip_special=False)
  if not any(text in whole for text in texts):
    return tokenizer.decode(ids)
  # The smallest number of tokens whose text has a stop text.
  low, high = 0, len(ids)
  while high - low > 1:
    middle = (low + high) // 2
    text = tokenizer.decode(ids[:middle], skip_special=False)
    low, high = (low, middle) if any(t in text for t in texts) else (middle, high)
  text = tokenizer.decode(ids[:high])
  places = [text.find(t) for t in texts if t in text]
  return text[: min(places)] if places else tokenizer.decode(ids[:low])
