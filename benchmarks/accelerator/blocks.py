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


def run(record: Record, tiny: bool) -> None:
  """Times rows of packed documents with each block size; on other platforms nothing."""
  from accelerator import measuring

  measuring.one_device()
  if measuring.platform() == 'tpu':
    return
  from ftjax.models.kernels import triton

  cases = attention.TINY_CASES[:1] if tiny else (attention.CASES[0], attention.CASES[1])
  for case in cases:
    for size in SIZES[:2] if tiny else SIZES:
      with record.row(f'{case.name}, block {size}') as row:
        row['kernel'] = 'triton'
        triton.BLOCK = size
        call = attention.program('triton', case, measuring.platform() == 'cpu')
        attention.time_kernel(row, case, 256 if tiny else 4096, False, call)
