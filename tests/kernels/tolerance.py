"""Tolerances derived from a float64 run, for kernels that compute in 16 bits with float32 sums.

The yardstick is the error, against float64, of the same computation in plain PyTorch in the working dtype. A kernel keeps more
in float32 than that, so it may err as much (1.5x: another order of summation), plus once the rounding of its output.
"""

import torch

from kernels._common import INTERPRET


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding; Triton's interpreter truncates to bfloat16, which errs by up to twice that."""
    return torch.finfo(dtype).eps / (1 if INTERPRET and dtype == torch.bfloat16 else 2)


def assert_within(actual: torch.Tensor, working: torch.Tensor, exact: torch.Tensor):
    """`actual` errs no more than `working` does, both against `exact` (float64), in the mean square and at worst."""
    assert actual.shape == exact.shape, f"found {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.isfinite().all(), "found NaN or infinity"
    error, allowed = (actual.double() - exact).abs(), (working.double() - exact).abs()
    roundoff = unit_roundoff(actual.dtype)
    for name, measure in (("RMS", lambda t: t.square().mean().sqrt()), ("largest", lambda t: t.abs().max())):
        limit = 1.5 * measure(allowed) + roundoff * measure(exact)
        assert measure(error) <= limit, f"{name} error: found {measure(error):.3e}, expected at most {limit:.3e}"
