"""Kernels run on a GPU, or in Triton's interpreter, which must be chosen before Triton is imported."""

import os

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/kernels: found no CUDA GPU; run them in Triton's interpreter, with TRITON_INTERPRET=1")
