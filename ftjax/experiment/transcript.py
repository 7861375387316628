"""Texts of prompts and completions, as reward functions get them.

Special tokens that carry content (<think>, <answer>, <tool_call>) stay; padding, BOS, EOS, stop
tokens and the tokens that a chat template puts around turns are left out of completions. TRL leaves
out every special token.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.data import encode
from ftjax.data.formats import Chat
from ftjax.data.prompts import Prompt
from ftjax.data.tokenizer import Tokenizer
from ftjax.generation.completion import Completion
from ftjax.grading.reward_batch import Batch

# They stay where a template renders them too; all others in a plain conversation mark turns.
_CONTENT = re.compile(
  r'</?(?:think|thinking|thought|reasoning|answer|solution|response|output|tool_call|tool_response'
  r'|tools?|function|code|seed:think)>|\[/?(?:THINK|TOOL_CALLS|TOOL_RESULTS)\]'
  r'|<\|(?:START|END)_(?:THINKING|RESPONSE|ACTION)\|>|<\|(?:channel|message|tool_call)\|>'
)
_CONVERSATION = (
  {'role': 'system', 'content': 'a'},
  {'role': 'user', 'content': 'b'},
  {'role': 'assistant', 'content': 'c'},
  {'role': 'user', 'content': 'd'},
)


def hidden_ids(tokenizer: Tokenizer, stop_ids: Sequence[int]) -> frozenset[int]:
  """Returns the special tokens that are left out of a completion's text.

  Args:
    tokenizer: of the model.
    stop_ids: tokens that end a completion.
  """
  special = tokenizer.special_ids
  ends = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id} & special
  found = ends | set(stop_ids)
  for messages in (_CONVERSATION, _CONVERSATION[1:], _CONVERSATION[1:2]):
    if tokenizer.template is None:
      break
    try:
      found |= special.intersection(encode.encode_prompt(Chat(messages, None), tokenizer))
    except ValueError:  # a template without system messages, or of single turns
      continue
  return frozenset(i for i in found if i in ends or not _CONTENT.fullmatch(tokenizer.token(i)))


class Transcripts:
  """Texts of one model's prompts and completions.

  Args:
    tokenizer: of the model.
    stop_ids: tokens that end a completion.
  """

  def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int]):
    self._tokenizer, self._hidden = tokenizer, hidden_ids(tokenizer, stop_ids)

  def prompt(self, prompt: Prompt) -> str:
    """Returns everything that the model reads, special tokens included."""
    return self._tokenizer.decode(prompt.ids, skip_special=False)

  def given(self, prompt: Prompt) -> str | list[dict[str, Any]]:
    """Returns the prompt in the form of its row: a text, or messages."""
    return prompt.text or self.prompt(prompt)

  def completion(self, ids: Sequence[int]) -> str:
    """Returns the text of a completion, without `hidden_ids`."""
    kept = [i for i in ids if i not in self._hidden]
    return self._tokenizer.decode(kept, skip_special=False)

  def batch(self, pairs: Sequence[tuple[Prompt, Completion]], state: Mapping[str, float]) -> Batch:
    """Returns the inputs of reward functions, for each prompt with one completion.

    A column that not every row has is None elsewhere.
    """
    texts = {p.place: self.prompt(p) for p, _ in pairs}
    names = set().union(*(p.columns for p, _ in pairs))
    return Batch(
      prompts=[texts[p.place] for p, _ in pairs],
      completions=[self.completion(c.tokens) for _, c in pairs],
      prompt_ids=[p.ids for p, _ in pairs],
      token_ids=[c.tokens for _, c in pairs],
      is_truncated=[c.truncated for _, c in pairs],
      columns={n: [p.columns.get(n) for p, _ in pairs] for n in names},
      given=[self.given(p) for p, _ in pairs],
      state=state,
    )
