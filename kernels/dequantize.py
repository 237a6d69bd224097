"""Widening a packed weight: where x has more rows than the small-batch kernels take, cuBLAS multiplies a plain weight.

Owns the operators behind `Weight.dequantized` and `Weight.fp8_codes` of a tiled weight (formats.py; _packed.py reads the
tiles). Does not know the products. Letters as in _packed.py: N rows, K columns, U units of columns, W warps, L = 32 W threads,
S steps of 32 columns.

A thread's 16 bytes of codes are 8 neighbouring columns of each step: 16 bytes of a row of the result. Nothing passes from one
thread to another; the four threads of a row fill 64 bytes of it, the next step the other half of a cache line.
"""

import torch
import triton
import triton.language as tl

from kernels._common import INTERPRET, INTERPRETED, NVIDIA, launch_options, pdl_trigger, pdl_wait, runs_kernels
from kernels._packed import load_unit, pieces, weight_rows
from kernels.formats import UNIT_COLUMNS, dequantize_tiled, untile_codes

COLUMNS = tl.constexpr(256)  # of 8 rows, a warp's work: its loads are all in flight at once
WARPS = 64 if INTERPRET else 4  # the interpreter takes as long for many as for few
LANES = 1024  # of a program that puts codes in order: at 4 warps, 16 loads of 8 bytes a thread in flight


# ---------------------------------------------------------------- kernel


@triton.jit
def _rounded(values, DTYPE: tl.constexpr):
    """float32 values in DTYPE, to the nearest even, which is not what the interpreter's cast to bfloat16 does."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = values.to(tl.int32, bitcast=True)
        out = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        out = values.to(DTYPE)
    return out


@triton.jit
def _product(a, b):
    """a * b in float32. Of a product of two bf16 values that is rounded to bf16 next, LLVM makes one bf16 instruction; on the
    card the results below bf16's normal range then differed from PyTorch's."""
    if NVIDIA:
        out = tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)
    else:
        out = a * b
    return out


@triton.jit(do_not_specialize=["N", "U", "warps_of_row"])
def _dequantize_kernel(
    w_ptr, scale_ptr, zero_ptr, out_ptr, N, K, U, warps_of_row,
    FORMAT: tl.constexpr, UNIT: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[n, k] = (code - zero) * scale in float32, rounded once: of 8 rows, COLUMNS columns a warp."""
    pdl_trigger(PDL)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    INT4: tl.constexpr = FORMAT == "int4"
    S: tl.constexpr = UNIT // 32
    UNITS: tl.constexpr = COLUMNS // UNIT
    lane = tl.arange(0, 32 * W)
    warp = tl.program_id(0) * W + lane // 32
    half = (warp // warps_of_row).to(tl.int64)
    unit = warp % warps_of_row * UNITS
    row = half * 8 + lane % 32 // 4
    left = tl.where(row < N, U - unit, 0)
    loaded = ()
    for i in tl.static_range(UNITS):
        loaded = loaded + load_unit(w_ptr, scale_ptr, zero_ptr, (half * U + unit,), i, left, GROUPS, True, True)
    zero = tl.full([32 * W, 1], 8, tl.int32)
    if not INT4:
        scale = tl.load(scale_ptr + row, mask=row < N, other=0)[:, None]
    pdl_wait(PDL)  # a kernel before this one may still read what `out` was allocated from
    EACH: tl.constexpr = len(loaded) // UNITS
    for i in tl.static_range(UNITS):
        words = pieces(loaded[i * EACH], S)
        if INT4:
            scales = pieces(loaded[i * EACH + 1], GROUPS)
        if zero_ptr is not None:
            zeros = pieces(loaded[i * EACH + 2].to(tl.int32), GROUPS)
        for s in tl.static_range(S):
            if INT4:
                scale = scales[s * GROUPS // S].to(tl.float32)
            if zero_ptr is not None:
                zero = zeros[s * GROUPS // S]
            codes = weight_rows(words[s], scale, zero, FORMAT, False, DTYPE)  # less their zeros: [L, 1, kl, b, kh]
            codes = codes.permute(0, 1, 4, 3, 2).reshape([32 * W, 8]).to(tl.float32)
            k = ((unit + i) * UNIT + 32 * s + lane % 4 * 8)[:, None] + tl.arange(0, 8)[None, :]
            tl.store(
                out_ptr + (row * K)[:, None] + k, _rounded(_product(codes, scale), DTYPE), mask=(row < N)[:, None] & (k < K)
            )


@triton.jit(do_not_specialize=["N", "U"])
def _untile_fp8_kernel(w_ptr, out_ptr, N, K, U, LANES: tl.constexpr, PDL: tl.constexpr):
    """out[n, k] = code, in 32-bit words of four columns; K a multiple of 4. A lane has 8 columns of each 32 of a row's unit."""
    pdl_trigger(PDL)
    lane = (tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES))[:, None, None]
    step, high = tl.arange(0, 2)[None, :, None], tl.arange(0, 2)[None, None, :]
    row = lane // (32 * U) * 8 + lane % 32 // 4
    word = lane // 32 % U * 16 + step * 8 + lane % 4 * 2 + high  # of the row
    tiled = tl.load(w_ptr + lane * 4 + step * 2 + high, mask=row < N, other=0)
    # bytes 1, 3, 0, 2 of a tiled word are columns 0 to 3: one instruction, prmt
    plain = (tiled >> 8 & 0xFF) | (tiled >> 16 & 0xFF00) | (tiled & 0xFF) << 16 | (tiled & 0xFF0000) << 8
    pdl_wait(PDL)  # a kernel before this one may still read what `out` was allocated from
    tl.store(out_ptr + row * (K // 4) + word, plain, mask=(row < N) & (word < K // 4))


# ---------------------------------------------------------------- operators


def _plain(weight, scale, zero, format, rows, columns, dtype):
    if format not in UNIT_COLUMNS:
        raise ValueError(f"format: found {format!r:.50}, expected one of {', '.join(UNIT_COLUMNS)}")
    shape = [-(-rows // 8), -(-columns // UNIT_COLUMNS[format]), 32, 4]
    if list(weight.shape) != shape or weight.dtype != torch.int32:
        raise ValueError(f"weight: found {weight.dtype} {list(weight.shape)}, expected int32 {shape} for {rows} x {columns}")
    for name, t in (("weight", weight), ("scale", scale), ("zero", zero)):
        if t is not None and not t.is_contiguous():
            raise ValueError(f"{name}: found strides {t.stride()}, expected a contiguous tensor")
        expected = [*shape[:2], 8, scale.shape[-1]] if format == "int4" else [rows, 1]
        if t is not None and name != "weight" and list(t.shape) != expected:
            raise ValueError(f"{name}: found {list(t.shape)}, expected {expected}")
    return weight.new_empty(rows, columns, dtype=dtype)


@torch.library.custom_op("rooflama::dequantize", mutates_args=())
def _dequantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    format: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """A weight in the kernels' order -> [rows, columns] in dtype. ValueError: a shape that does not fit."""
    out = _plain(weight, scale, zero, format, rows, columns, dtype)
    if not runs_kernels(weight) or dtype not in (torch.bfloat16, torch.float16):
        return dequantize_tiled(weight, scale, zero, format, rows, columns).to(dtype)
    warps_of_row = triton.cdiv(columns, COLUMNS.value)
    _dequantize_kernel[(triton.cdiv(weight.shape[0] * warps_of_row, WARPS),)](
        weight, scale, zero, out, rows, columns, weight.shape[1], warps_of_row,
        FORMAT=format, UNIT=UNIT_COLUMNS[format], GROUPS=scale.shape[-1] if format == "int4" else 0, W=WARPS,
        num_warps=4, **launch_options(weight),
    )  # fmt: skip
    return out


@_dequantize.register_fake
def _(weight, scale, zero, format, rows, columns, dtype):
    return _plain(weight, scale, zero, format, rows, columns, dtype)


def _codes(weight, rows, columns):
    if columns % 4:
        raise ValueError(f"columns: found {columns}, expected a multiple of 4")
    shape = [-(-rows // 8), -(-columns // UNIT_COLUMNS["fp8"]), 32, 4]
    if list(weight.shape) != shape or weight.dtype != torch.int32 or not weight.is_contiguous():
        raise ValueError(f"weight: found {weight.dtype} {list(weight.shape)}, expected int32 {shape}, contiguous")
    return weight.new_empty(rows, columns, dtype=torch.float8_e4m3fn)


@torch.library.custom_op("rooflama::untile_fp8", mutates_args=())
def _untile_fp8(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The codes [rows, columns] of an fp8 weight in the kernels' order. ValueError: a shape that does not fit."""
    out = _codes(weight, rows, columns)
    if not runs_kernels(weight):
        return untile_codes(weight, "fp8", rows, columns)
    grid = (triton.cdiv(weight.numel() // 4, LANES),)
    _untile_fp8_kernel[grid](
        weight, out.view(torch.int32), rows, columns, weight.shape[1], LANES=LANES, num_warps=4, **launch_options(weight)
    )
    return out


@_untile_fp8.register_fake
def _(weight, rows, columns):
    return _codes(weight, rows, columns)
