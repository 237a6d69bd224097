"""Kernels run on a GPU, or in Triton's interpreter, which must be chosen before Triton is imported."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/kernels: found no CUDA GPU; run them in Triton's interpreter, with TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def poison():
    """Memory that an operator allocates and does not fill holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # with it comes fill_uninitialized_memory
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def few_sms(monkeypatch):
    """A GPU of three multiprocessors, so that a persistent grid has more tiles than programs."""
    for module in ("kernels._matmul", "kernels.linear"):
        monkeypatch.setattr(sys.modules[module], "num_sms", lambda index=0: 3)


@pytest.fixture
def few_programs(monkeypatch):
    """For tests of how kernels are wired, which need no particular tile: the interpreter, where a program takes as long as an
    operator of PyTorch a hundred times, gets tiles as for eight multiprocessors. A GPU has its own."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        for module in ("_matmul", "linear", "head", "choose"):
            monkeypatch.setattr(sys.modules[f"kernels.{module}"], "num_sms", lambda index=0: 8)
