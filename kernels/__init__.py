"""The public operators: what the model calls, whatever the device."""

from kernels._common import runs_kernels
from kernels.flash_decode import flash_decode

MAX_ROWS = 64

__all__ = ["MAX_ROWS", "flash_decode", "runs_kernels"]
