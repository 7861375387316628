"""The settings of tokenizing that the tokens of a row depend on."""

import dataclasses
from typing import Any, Self

from ftjax.data import augment, formats
from ftjax.data.annotated_rows import Annotation

# Shapes of examples whose rows are in the forms of formats.py: one text; what an encoder reads and
# a decoder writes; documents of which spans are cut out.
TEXT_SHAPES = ('text', 'source_target', 'document')


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
  source_len: int = 0
  annotation: Annotation = Annotation()  # noqa: RUF009 - frozen

  @property
  def is_text(self) -> bool:
    """Whether rows are in the forms of formats.py, and not those of preference data or labels."""
    return self.shape in TEXT_SHAPES

  def facts(self) -> dict[str, Any]:
    """Returns the settings for a fingerprint, as values that `marshal` writes."""
    return dataclasses.asdict(self)

  @classmethod
  def from_plain(cls, values: dict[str, Any]) -> Self:
    """Returns the policy of which `facts` made these values."""
    return cls(**(values | {'annotation': Annotation(**values['annotation'])}))

  def copies(self, example: formats.Example) -> list[formats.Example]:
    """Returns the altered copies of an example; none without augmentation.

    Raises:
      ValueError: a document, which has no prompt to alter.
    """
    if not self.augment:
      return []
    settings = (self.augment, self.augment_templates, self.augment_seed)
    return [augment.copy(example, number, *settings) for number in range(self.augment_copies)]
