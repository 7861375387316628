"""Times of the GPU attention kernel with other block sizes, for its tuning.

The kernel's BLOCK is the one in models/kernels/triton.py; here it is set for this process alone.
"""

from accelerator import attention
from accelerator.record import Record

COLUMNS = (
  ('kernel', 'kernel', ''),
  ('ms', 'forward and backward, ms', '.3f'),
  ('tflops', 'model TFLOP/s', '.1f'),
)
SIZES = (64, 128, 32)
# A block of 128 keys of size 256 needs more shared memory than an H200 has.
_LARGEST = 128 * 128


def run(record: Record, tiny: bool) -> None:
  """Times rows of packed documents with each block size; on other platforms nothing."""
  from accelerator import measuring

  measuring.one_device()
  if measuring.platform() == 'tpu':
    return
  from ftjax.models.kernels import triton

  cases = attention.TINY_CASES[:1] if tiny else (attention.CASES[0], attention.CASES[1])
  for case in cases:
    sizes = [n for n in SIZES if n * case.head_dim <= _LARGEST]
    for size in sizes[:2] if tiny else sizes:
      with record.row(f'{case.name}, block {size}') as row:
        row['kernel'] = 'triton'
        triton.BLOCK = size
        call = attention.program('triton', case, measuring.platform() == 'cpu')
        attention.time_kernel(row, case, 256 if tiny else 4096, False, call)
