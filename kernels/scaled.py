"""Products of prompts in fp8: x is rounded to e4m3 with a scale a row, and PyTorch multiplies it by an fp8 weight's codes.

Owns the rounding (alone, or with the RMSNorm or SiLU x up before it, so that x is not written and read again), the operator of
the product, and when a linear takes this path. Does not know the model.
Letters: N rows (tokens), K features that go in, O features that come out, F intermediate features.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels._common import Setting, capability, launch_options, pdl_trigger, pdl_wait, runs_kernels, to_cache
from kernels._matmul import rms_norm_ref
from kernels.formats import LARGEST, Weight, saturated

FP8 = torch.float8_e4m3fn
LEAST_SCALE = tl.constexpr(2.0**-126)  # float32's smallest normal number: its inverse is finite
STEP = 16  # what PyTorch's fp8 products want K and O to be multiples of

_rounding = Setting(False)


class QuantizedRows(NamedTuple):
    """Rows x [N, K], rounded: codes * scale."""

    codes: torch.Tensor  # float8_e4m3fn [N, K]
    scale: torch.Tensor  # float32 [N, 1]


# ---------------------------------------------------------------- reference


def quantize_rows_ref(x) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x if x.dtype == torch.float64 else x.float()
    largest = wide.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, (largest / LARGEST["fp8"]).clamp(min=LEAST_SCALE.value), 1.0)
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    return saturated(wide * (1 / scale), FP8), scale.float()


def scaled_mm_ref(codes, scale, weight, weight_scale, dtype) -> torch.Tensor:
    return ((codes.float() @ weight.float().T) * scale * weight_scale.T).to(dtype)


# ---------------------------------------------------------------- kernels


@triton.jit
def _store_row(x, mask, row, k, K, codes_ptr, scale_ptr):
    """One row of float32 values, 0 where it ends, as codes and their scale: NaN, if there is NaN or infinity in it."""
    largest = tl.max(tl.where(x == x, tl.abs(x), float("inf")), 0)
    scale = tl.where(largest > 0, tl.maximum(largest / 448.0, LEAST_SCALE), 1.0)
    scale = tl.where(largest < float("inf"), scale, float("nan"))
    tl.store(codes_ptr + row * K + k, to_cache(x * (1.0 / scale), codes_ptr), mask=mask)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _quantize_rows_kernel(x_ptr, weight_ptr, codes_ptr, scale_ptr, K, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One row, normed first where there is a gain."""
    pdl_trigger(PDL)
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    if weight_ptr is not None:
        gain = tl.load(weight_ptr + k, mask=k < K, other=0).to(tl.float32)
    pdl_wait(PDL)
    x = tl.load(x_ptr + row * K + k, mask=k < K, other=0).to(tl.float32)
    if weight_ptr is not None:
        x = x * tl.rsqrt(tl.sum(x * x, 0) / K + eps) * gain
    _store_row(x, k < K, row, k, K, codes_ptr, scale_ptr)


@triton.jit
def _silu_mul_rows_kernel(x_ptr, codes_ptr, scale_ptr, F, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One row, whole: its scale is known when all of it is."""
    pdl_trigger(PDL)
    row = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, BLOCK)
    pdl_wait(PDL)
    gate = tl.load(x_ptr + 2 * row * F + f, mask=f < F, other=0).to(tl.float32)
    up = tl.load(x_ptr + 2 * row * F + F + f, mask=f < F, other=0).to(tl.float32)
    _store_row(gate / (1.0 + tl.exp(-gate)) * up, f < F, row, f, F, codes_ptr, scale_ptr)


# ---------------------------------------------------------------- operators


def _rows(x: torch.Tensor, gated: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scale, empty, of x [N, K], or [N, 2 K] where `gated`."""
    if x.dim() != 2 or not x.shape[1] or x.shape[1] % (1 + gated):
        raise ValueError(f"x: found {list(x.shape)}, expected [N, {'2 F' if gated else 'K'}]")
    if not x.is_contiguous():
        raise ValueError(f"x: found strides {x.stride()}, expected a contiguous tensor")
    codes = x.new_empty(x.shape[0], x.shape[1] // (1 + gated), dtype=FP8)
    return codes, x.new_empty(x.shape[0], 1, dtype=torch.float32)


def _launch(kernel, codes, scale, before: tuple, after: tuple = ()) -> None:
    """A program a row; `before` and `after`: the kernel's arguments on either side of codes and scale."""
    N, K = codes.shape
    if N:
        block = triton.next_power_of_2(K)
        warps = max(1, min(16, block // 1024))  # a row of 16,384, gate and up of the 8B: 32 of each a thread
        kernel[(N,)](*before, codes, scale, K, *after, BLOCK=block, num_warps=warps, **launch_options(codes))


def _quantize_outputs(x, weight):
    if weight is not None and (weight.shape != x.shape[-1:] or not weight.is_contiguous()):
        raise ValueError(f"weight: found {list(weight.shape)}, expected [{x.shape[-1]}], contiguous")
    return _rows(x)


@torch.library.custom_op("rooflama::quantize_rows", mutates_args=())
def _quantize_rows(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = _quantize_outputs(x, weight)
    if not runs_kernels(x):
        return quantize_rows_ref(x if weight is None else rms_norm_ref(x.float(), weight.float(), eps))
    _launch(_quantize_rows_kernel, codes, scale, (x, weight), (eps,))
    return codes, scale


@_quantize_rows.register_fake
def _(x, weight, eps):
    return _quantize_outputs(x, weight)


@torch.library.custom_op("rooflama::silu_mul_rows", mutates_args=())
def _silu_mul_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = _rows(x, gated=True)
    if not runs_kernels(x):
        gate, up = x.float().chunk(2, dim=-1)
        return quantize_rows_ref(gate * torch.sigmoid(gate) * up)
    _launch(_silu_mul_rows_kernel, codes, scale, (x,))
    return codes, scale


@_silu_mul_rows.register_fake
def _(x):
    return _rows(x, gated=True)


def _product(codes, scale, weight, weight_scale, dtype):
    (N, K), O = codes.shape, weight.shape[0]
    given = {"codes": (codes, FP8, [N, K]), "weight": (weight, FP8, [O, K]), "scale": (scale, torch.float32, [N, 1])}
    given |= {"weight_scale": (weight_scale, torch.float32, [O, 1])}
    for name, (t, expected, shape) in given.items():
        if t.dtype != expected or list(t.shape) != shape or not t.is_contiguous():
            raise ValueError(f"{name}: found {t.dtype} {list(t.shape)}, expected {expected} {shape}, contiguous")
    if K % STEP or O % STEP:
        raise ValueError(f"weight: found {[O, K]}, expected multiples of {STEP}")
    return codes.new_empty(N, O, dtype=dtype)


@torch.library.custom_op("rooflama::scaled_mm", mutates_args=())
def _scaled_mm(
    codes: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """codes [N, K], weight [O, K] e4m3 -> (codes @ weight.T) * scale * weight_scale.T [N, O] in dtype.

    No bias: cuBLAS has no algorithm that adds one for every shape (not for 70 x 14,336 times 14,336 x 32).
    """
    _product(codes, scale, weight, weight_scale, dtype)
    if not codes.is_cuda:
        return scaled_mm_ref(codes, scale, weight, weight_scale, dtype)
    functional = torch.nn.functional
    by_row = functional.ScalingType.RowWise
    # Fast accumulation: sums stay in the tensor cores' registers, which have fewer bits than float32, for all of K. Products of
    # the 8B's shapes are 0.002 to 0.003 off by it, 0.0017 (bf16's rounding) without, and take 7 to 20% less time (H200).
    return functional.scaled_mm(
        codes, weight.T, scale, by_row, weight_scale.T, by_row, output_dtype=dtype, use_fast_accum=True
    )  # fmt: skip


@_scaled_mm.register_fake
def _(codes, scale, weight, weight_scale, dtype):
    return _product(codes, scale, weight, weight_scale, dtype)


# ---------------------------------------------------------------- what the model calls


def quantize_rows(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 0.0) -> QuantizedRows:
    """x [N, K] to e4m3, each row divided by its largest magnitude / 448; a row of zeros keeps a scale of 1. The scale of
    a row with NaN or infinity is NaN, and so is every product with it. weight [K]: the gain of an RMSNorm before that, whose
    result is not rounded in between. ValueError: another shape."""
    return QuantizedRows(*torch.ops.rooflama.quantize_rows(x.contiguous(), weight, eps))


def silu_mul_rows(x: torch.Tensor) -> QuantizedRows:
    """`quantize_rows` of silu(gate) * up of x [N, 2 F], gate beside up, which is not rounded in between."""
    return QuantizedRows(*torch.ops.rooflama.silu_mul_rows(x.contiguous()))


def scaled_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """True where `scaled_linear` gives results in dtype: bfloat16 on NVIDIA cards with fp8 units (Ada on); any on a CPU,
    slowly. (In float16 PyTorch's product has given bfloat16's bits: pytorch#187569.)"""
    return device.type == "cpu" or (dtype == torch.bfloat16 and capability(device.index or 0) >= (8, 9))


def rounding_activations(enabled: bool = True):
    """Products with fp8 weights round x within this block: that of a prompt's forward."""
    return _rounding.set_to(enabled)


def takes_scaled(weight: Weight) -> bool:
    """True where the product with this weight rounds x: in a block that says so, an fp8 weight of sizes that PyTorch takes.
    However many rows: a row's codes do not depend on what it shares a forward with."""
    return _rounding.value and weight.format == "fp8" and weight.in_features % STEP == weight.out_features % STEP == 0


def scaled_linear(
    x: torch.Tensor | QuantizedRows, weight: Weight, *, norm=None, eps=0.0, activation="none", residual=None, y_rounded=False
) -> torch.Tensor | QuantizedRows:
    """x [N, K] -> [N, out], as model.linear has it, x rounded after the norm. y_rounded: what "silu_mul" gives is rounded for
    the next product."""
    if not isinstance(x, QuantizedRows):
        x = quantize_rows(x, norm, eps)
    y = torch.ops.rooflama.scaled_mm(*x, weight.fp8_codes(), weight.scale, weight.dtype)
    if weight.bias is not None:
        y.add_(weight.bias)
    if activation == "silu_mul":
        return silu_mul_rows(y) if y_rounded else torch.ops.rooflama.silu_mul(y)  # rows.py
    return y if residual is None else y.add_(residual)
