"""The mixers of a block as data, one class for each kind; see architecture.py, where they are put
together. Imports no jax.
"""

import dataclasses

from ftjax.models.rope_spec import Rope
from ftjax.runtime.errors import DataError


@dataclasses.dataclass(frozen=True)
class Norm:
  """A normalization.

  eps: added to the mean square. kind: 'rms', or 'layer', which subtracts the mean first. offset:
  the scale is `offset + weight`; with 1 the weight is stored around 0. bias: one is added.
  """

  eps: float = 1e-6
  kind: str = 'rms'
  offset: float = 0.0
  bias: bool = False


@dataclasses.dataclass(frozen=True)
class Kept:
  """An array that a mixer keeps of each sequence from one step of decoding to the next.

  sizes, axes: of the axes after those of layers and batch, and their logical names. dtype: its
  name; '' for the compute dtype. grows: the array has an entry for each token; its axis, 'seq',
  comes before `sizes`. What does not grow is a state, which each token changes.
  """

  sizes: tuple[int, ...]
  axes: tuple[str | None, ...]
  dtype: str = ''
  grows: bool = False


@dataclasses.dataclass(frozen=True)
class RelativeBias:
  """Numbers that are added to scores by the distance from the query to the key, of each head
  (Raffel et al. 2020, "T5", section 2.1); see models/relative_bias.py.

  name: of the table, which all layers that name it share: `relative_bias/NAME`. buckets: its rows.
  longest: the distance from which on all share the last bucket.
  """

  name: str
  buckets: int
  longest: int

  def __post_init__(self):
    if self.buckets < 4 or self.buckets % 4 or self.longest <= self.buckets // 2:
      raise DataError(
        f'config.json: relative_attention_num_buckets={self.buckets}, '
        f'relative_attention_max_distance={self.longest}; expected a multiple of 4, and a distance '
        'above half of it'
      )


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
  """Grouped-query attention.

  rope: None rotates nothing. qkv_bias, out_bias: the projections to queries, keys and values, and
  the output projection, add a bias. window: tokens that a query sees, itself and those just before
  it; None: all. scale: factor of the scores; None: 1 / sqrt(head_dim). soft_cap: largest size of a
  score. qk_norm: normalization of queries and keys before the rotation, of each head, or with
  qk_norm_width='all' of all heads together. gate: the output of each head is multiplied with the
  sigmoid of a projection of the layer's input. causal: False: a query sees tokens after it too, and
  of a window as many on either side. relative: what is added to the scores; None: nothing.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope: Rope | None = Rope()  # noqa: RUF009 - frozen
  qkv_bias: bool = False
  out_bias: bool = False
  window: int | None = None
  scale: float | None = None
  soft_cap: float | None = None
  qk_norm: Norm | None = None
  qk_norm_width: str = 'head'
  gate: bool = False
  causal: bool = True
  relative: RelativeBias | None = None

  def __post_init__(self):
    if self.qk_norm_width not in ('head', 'all'):
      raise ValueError(f'qk_norm_width={self.qk_norm_width!r}; expected head or all')
    if self.num_heads % self.num_kv_heads:
      raise DataError(
        f'config.json: num_attention_heads={self.num_heads} is no multiple of '
        f'num_key_value_heads={self.num_kv_heads}'
      )
    if self.rope is not None:
      self.rope.check(self.head_dim)

  @property
  def split_heads(self) -> int:
    """Heads that `mesh.tensor` must divide."""
    return self.num_kv_heads

  def query_fan_in(self, model_dim: int) -> int:
    """Returns the numbers that set the initial variance of the queries' weights: where scores are
    not divided by sqrt(head_dim) (T5), random queries are as much smaller.
    """
    is_t5 = self.scale == 1.0 and self.rope is None
    return model_dim * self.head_dim if is_t5 else model_dim

  @property
  def inner(self) -> int:
    """Numbers of a token between the projections."""
    return (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim

  def kept(self) -> dict[str, Kept]:
    """Returns what decoding keeps: the rotated keys, and the values."""
    entry = Kept((self.num_kv_heads, self.head_dim), ('kv_heads', None), grows=True)
    return {'keys': entry, 'values': entry}


@dataclasses.dataclass(frozen=True)
class DeltaNetSpec:
  """A gated delta net (Yang et al. 2025, "Gated delta networks"): linear attention whose state is
  decayed and corrected at each token; see models/delta_net.py.

  num_key_heads, key_dim: heads of queries and of keys, and their size. num_value_heads, value_dim:
  of values; each key head serves the same number of neighbouring value heads. conv_width: tokens
  that the convolution sees, itself and those just before it. eps: of the norm of a head's output.
  """

  num_key_heads: int
  key_dim: int
  num_value_heads: int
  value_dim: int
  conv_width: int = 4
  eps: float = 1e-6

  def __post_init__(self):
    if self.num_value_heads % self.num_key_heads:
      raise DataError(
        f'config.json: linear_num_value_heads={self.num_value_heads} is no multiple of '
        f'linear_num_key_heads={self.num_key_heads}'
      )

  @property
  def channels(self) -> int:
    """Channels of a key head in the convolution: its query, its key and its values."""
    return 2 * self.key_dim + self.num_value_heads // self.num_key_heads * self.value_dim

  @property
  def split_heads(self) -> int:
    """Heads that `mesh.tensor` must divide."""
    return self.num_key_heads

  @property
  def inner(self) -> int:
    """Numbers of a token between the projections: around the convolution, gate and output."""
    return 2 * self.num_key_heads * self.channels + 2 * self.num_value_heads * self.value_dim

  @property
  def state_size(self) -> int:
    """Numbers of the state of a sequence."""
    return self.num_value_heads * self.key_dim * self.value_dim

  def kept(self) -> dict[str, Kept]:
    """Returns what decoding keeps: the last inputs of the convolution, and the state."""
    return {
      'inputs': Kept(
        (self.conv_width - 1, self.num_key_heads, self.channels), (None, 'kv_heads', None)
      ),
      'state': Kept(
        (self.num_value_heads, self.key_dim, self.value_dim), ('heads', None, None), 'float32'
      ),
    }


@dataclasses.dataclass(frozen=True)
class DisentangledSpec:
  """Disentangled attention over the whole text (He et al. 2021, "DeBERTa"); see
  models/disentangled.py. Its table of relative positions is Architecture.relative_positions.

  span: buckets of distances on each side. longest: distance that the last bucket begins at; 0: each
  distance up to span has its own. has_c2p, has_p2c: the scores have terms of content to position,
  and of position to content. shares_maps: the table is projected by the maps of queries and keys,
  else by its own.
  """

  num_heads: int
  head_dim: int
  span: int
  longest: int = 0
  has_c2p: bool = True
  has_p2c: bool = True
  shares_maps: bool = True

  @property
  def split_heads(self) -> int:
    """Heads that `mesh.tensor` must divide."""
    return self.num_heads

  @property
  def inner(self) -> int:
    """Numbers of a token between the projections."""
    return 4 * self.num_heads * self.head_dim

  def kept(self) -> dict[str, Kept]:
    """Returns what decoding keeps: nothing, no text is generated."""
    return {}
