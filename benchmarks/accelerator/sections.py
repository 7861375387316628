"""The sections of accelerator_check.py, the most important first. Nothing here imports jax."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of the check that runs in a process of its own.

  name: of its files and for --only. title: of its table. module: its file. limit: most seconds.
  least: with fewer seconds left it is not begun. named: arguments of the module's `run`.
  shares_device: several processes use the device at once. wants_platform: `run` is given is_gpu.
  """

  name: str
  title: str
  module: str
  limit: float
  least: float
  named: tuple[tuple[str, object], ...] = ()
  shares_device: bool = False
  wants_platform: bool = False

  def arguments(self, attached: str) -> dict:
    """Returns the arguments of `run`; attached: 'gpu', 'tpu' or 'cpu'."""
    more = {'is_gpu': attached == 'gpu'} if self.wants_platform else {}
    return dict(self.named) | more


def _training(name: str, model: str, method: str, rows: int, *remats: str, limit: float) -> Section:
  named = (('model', model), ('method', method), ('rows', rows), ('remats', list(remats)))
  title = f'Training step: {method}, {model} shape, rows of 4,096 tokens'
  return Section(name, title, 'accelerator.training', limit, 35, named)


def _decoding(name: str, model: str, *slots: int) -> Section:
  named = (('model', model), ('slots', list(slots)))
  title = f'Decoding, {model} shape: 128 prompt tokens, 256 sampled'
  return Section(name, title, 'accelerator.decoding', 90, 30, named)


SECTIONS = (
  Section('device', 'Device', 'accelerator.device', 60, 10),
  Section(
    'attention',
    'Attention, the kernel that is chosen here',
    'accelerator.attention',
    150,
    30,
    (('own', True),),
  ),
  _training('sft_0.6b', 'Qwen3-0.6B', 'sft', 8, 'dots', 'full', limit=90),
  Section('head', 'Cross-entropy head against dense logits', 'accelerator.head', 70, 20),
  _training('lora_8b', 'Qwen3-8B', 'lora', 4, 'dots', 'full', limit=120),
  Section(
    'grouped',
    'Grouped products of mixtures of experts',
    'accelerator.layers',
    70,
    20,
    (('part', 'products'),),
  ),
  _decoding('decode_0.6b', 'Qwen3-0.6B', 64, 256),
  Section(
    'bitwise',
    'Two runs, bit by bit',
    'accelerator.bitwise',
    130,
    50,
    wants_platform=True,
  ),
  Section(
    'models',
    'Whole models of a few layers',
    'accelerator.layers',
    170,
    40,
    (('part', 'models'),),
  ),
  Section('peers', 'Beside torch on this card', 'accelerator.peers', 120, 60, shares_device=True),
  _training('sft_1.7b', 'Qwen3-1.7B', 'sft', 4, 'dots', 'full', limit=90),
  _training('qlora_8b', 'Qwen3-8B', 'qlora', 4, 'full', limit=120),
  _decoding('decode_1.7b', 'Qwen3-1.7B', 64, 256),
  Section(
    'attention_rest',
    'Attention, the other kernels',
    'accelerator.attention',
    120,
    30,
    (('own', False),),
  ),
  Section('blocks', 'Block sizes of the GPU attention kernel', 'accelerator.blocks', 60, 20),
)
