"""Models under test for evaluation without JAX: a small numpy language model on characters, and one
that responds what a test wants.
"""

import numpy as np

from ftjax.evaluation.model import Completion, Likelihood

VOCAB, STOP = 30, 1


def text_of(prompt):
  """A prompt as one text."""
  return prompt if isinstance(prompt, str) else '|'.join(m['content'] for m in prompt.messages)


def encode(text):
  return [2 + ord(c) % (VOCAB - 2) for c in text]


def _log_softmax(x):
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


class TextModel:
  """A causal model that sees everything before: logits = (discounted sum of embeddings) @ head.

  calls: [(method, rows)], for tests of what is asked.
  """

  def __init__(self, seed=0):
    rng = np.random.default_rng(seed)
    self.embed, self.head = rng.normal(size=(VOCAB, 8)), rng.normal(size=(8, VOCAB))
    self.calls = []

  def logp(self, tokens):
    """[T] -> [T, V], of the token after each."""
    state, out = np.zeros(8), []
    for row in self.embed[np.array(tokens, int)]:
      state = 0.7 * state + row
      out.append(_log_softmax(state @ self.head))
    return np.array(out)

  def likelihood(self, prompt, ids):
    logp = self.logp(prompt + ids)
    total = sum(logp[len(prompt) + i - 1, token] for i, token in enumerate(ids))
    return Likelihood(float(total), len(ids))

  def complete(self, prompts, places, draw, done):
    self.calls.append(('complete', len(prompts)))
    out = []
    for prompt in map(text_of, prompts):
      own = []
      for sample in range(draw.samples):
        ids, new = encode(prompt), []
        rng = np.random.default_rng([draw.seed, sample, len(prompt), *ids[-3:]])
        while len(new) < draw.max_tokens and new[-1:] != [STOP]:
          logp = self.logp(ids + new)[-1]
          noise = rng.gumbel(size=VOCAB) * draw.temperature
          new.append(int((logp + noise).argmax()))
        text = ''.join(chr(ord('a') + i % 26) for i in new if i != STOP)
        own.append(Completion(text, prompt, len(new), new[-1:] != [STOP]))
      out.append(own)
      done(draw.samples)
    return out

  def score(self, prompts, responses, places, done):
    self.calls.append(('score', len(prompts)))
    out = []
    for prompt, own in zip(map(text_of, prompts), responses, strict=True):
      out.append(tuple(self.likelihood(encode(prompt), [*encode(r), STOP]) for r in own))
      done(1)
    return out

  def score_texts(self, texts, places, done):
    self.calls.append(('score_texts', len(texts)))
    found = [self.likelihood([STOP], encode(text)) for text in texts]
    done(len(texts))
    return found


class Says:
  """A model that completes each prompt with a text of the test.

  texts: {prompt: text, or texts of its samples}, or a function of the prompt.
  """

  def __init__(self, texts):
    self._find = texts if callable(texts) else texts.__getitem__

  def complete(self, prompts, places, draw, done):
    out = []
    for prompt in map(text_of, prompts):
      found = self._find(prompt)
      found = [found] * draw.samples if isinstance(found, str) else found
      out.append([Completion(t, prompt, len(t.split()) + 1, False) for t in found])
      done(draw.samples)
    return out

  def score(self, prompts, responses, places, done):
    raise AssertionError('asked for log-probabilities')

  score_texts = score
