"""The settings of tokenizing that the tokens of a row depend on."""

import dataclasses

from ftjax.data import augment, formats


@dataclasses.dataclass(frozen=True)
class Policy:
  """Settings of tokenizing, see `token_cache.Source`. JSON values."""

  format: str | None
  seq_len: int
  loss_on: str
  on_overlength: str
  on_unrendered: str
  shape: str
  augment: tuple[str, ...] = ()
  augment_templates: tuple[str, ...] = ()
  augment_copies: int = 0
  augment_seed: int = 0

  def copies(self, example: formats.Example) -> list[formats.Example]:
    """Returns the altered copies of an example; none without augmentation.

    Raises:
      ValueError: a document, which has no prompt to alter.
    """
    if not self.augment:
      return []
    settings = (self.augment, self.augment_templates, self.augment_seed)
    return [augment.copy(example, number, *settings) for number in range(self.augment_copies)]
