"""What stands between the matrix products of a forward of many rows, where cuBLAS does the products: a kernel each; and what
may stand before the first product of a forward of few rows.

Owns `rms_norm`, `silu_mul` and `rope_append` (qk-norm, RoPE, append to the KV cache), and `fold_norm`. Does not know the model.
Letters: N rows (tokens), K features, F intermediate features, Hq/Hkv heads, D head size, S rows of a cache slot.
"""

import torch
import triton
import triton.language as tl

from kernels._common import launch_options, pdl_trigger, pdl_wait, permute_columns, permuted, runs_kernels, to_cache
from kernels._matmul import FoldedNorm, append_ref, fold_norm_ref, rms_norm_ref, rotate_ref, uses_kernel, x_scale
from kernels.tiles import fold_block

FOLD_COLUMNS = 1024  # of a row in a program of fold_norm: 16 bytes for each of 128 threads; 64 rows of 4,096 are 256 programs

# ---------------------------------------------------------------- reference


def silu_mul_ref(x):
    gate, up = x.chunk(2, dim=-1)
    wide = gate.float() if gate.dtype in (torch.bfloat16, torch.float16) else gate
    return (wide * torch.sigmoid(wide) * up).to(x.dtype)


def rope_append_ref(qkv, cos, sin, position, slot, k_cache, v_cache, q_norm, k_norm, eps, num_heads):
    """qk-norm, rotation, append; the arguments as in `rope_append`. No step waits for the host."""
    Hkv, D = k_cache.shape[1], k_cache.shape[3]
    q, k, v = qkv.unflatten(1, (-1, D)).split([num_heads, Hkv, Hkv], dim=1)
    if q_norm is not None:
        q, k = rms_norm_ref(q, q_norm, eps), rms_norm_ref(k, k_norm, eps)
    at = position.clamp(min=0)
    angles = [t[at].unsqueeze(1) for t in (cos, sin)]
    q, k = rotate_ref(q, *angles), rotate_ref(k, *angles)
    append_ref((k_cache, v_cache), (k, v), slot, at, position)
    return q.contiguous(), k.contiguous()


# ---------------------------------------------------------------- kernels


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, K, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One row."""
    pdl_trigger(PDL)
    row = tl.program_id(0).to(tl.int64) * K
    k = tl.arange(0, BLOCK)
    mask = k < K
    weight = tl.load(weight_ptr + k, mask=mask, other=0).to(tl.float32)
    pdl_wait(PDL)
    x = tl.load(x_ptr + row + k, mask=mask, other=0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, 0) / K + eps)
    tl.store(out_ptr + row + k, (x * factor * weight).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fold_norm_kernel(
    x_ptr, gain_ptr, scaled_ptr, sum_ptr, K,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PERMUTE: tl.constexpr, X_SCALE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """COLUMNS features of one row: what a FoldedNorm has of them. PERMUTE: the columns of `scaled`."""
    pdl_trigger(PDL)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k = part * COLUMNS + tl.arange(0, COLUMNS)
    gain = tl.load(gain_ptr + k, mask=k < K, other=0).to(tl.float32) * X_SCALE
    pdl_wait(PDL)
    x = tl.load(x_ptr + row * K + k, mask=k < K, other=0).to(tl.float32)
    target = row * K + k
    if PERMUTE:  # of words of two; said of what `permuted` returns, that would be lost when it is inlined
        target = tl.max_contiguous(tl.multiple_of(row * K + permuted(k), 2), 2)
    tl.store(scaled_ptr + target, (x * gain).to(scaled_ptr.dtype.element_ty), mask=k < K)
    squares = tl.sum((x * x).reshape([COLUMNS // BLOCK, BLOCK]), 1)
    block, P = part * (COLUMNS // BLOCK) + tl.arange(0, COLUMNS // BLOCK), tl.cdiv(K, BLOCK)
    tl.store(sum_ptr + row * P + block, squares, mask=block < P)


@triton.jit
def _silu_mul_kernel(x_ptr, out_ptr, F, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """BLOCK features of one row."""
    pdl_trigger(PDL)
    row = tl.program_id(0).to(tl.int64) * F
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = f < F
    pdl_wait(PDL)
    gate = tl.load(x_ptr + 2 * row + f, mask=mask, other=0).to(tl.float32)
    up = tl.load(x_ptr + 2 * row + F + f, mask=mask, other=0).to(tl.float32)
    tl.store(out_ptr + row + f, (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rope_append_kernel(
    qkv_ptr, cos_ptr, sin_ptr, position_ptr, slot_ptr, k_cache_ptr, v_cache_ptr, q_norm_ptr, k_norm_ptr, q_ptr, k_ptr, S, eps,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """All heads of one row, as pairs (a, b) of element i and element i + D / 2 of a head: [HEADS, PAIRS] each."""
    pdl_trigger(PDL)
    HALF: tl.constexpr = D // 2
    row = tl.program_id(0).to(tl.int64)
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, PAIRS)[None, :]
    mask = (head < HQ + 2 * HKV) & (pair < HALF)
    source = qkv_ptr + row * ((HQ + 2 * HKV) * D) + head * D + pair
    pdl_wait(PDL)
    position, slot = tl.load(position_ptr + row), tl.load(slot_ptr + row).to(tl.int64)
    turn = tl.maximum(position, 0).to(tl.int64) * HALF + pair
    cos = tl.load(cos_ptr + turn, mask=pair < HALF, other=0.0)
    sin = tl.load(sin_ptr + turn, mask=pair < HALF, other=0.0)
    a = tl.load(source, mask=mask, other=0).to(tl.float32)
    b = tl.load(source + HALF, mask=mask, other=0).to(tl.float32)
    rotated_a, rotated_b = a, b
    if q_norm_ptr is not None:
        factor = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
        is_q, is_k = mask & (head < HQ), mask & (head >= HQ)
        gain_a = tl.load(q_norm_ptr + pair + head * 0, mask=is_q, other=0) + tl.load(
            k_norm_ptr + pair + head * 0, mask=is_k, other=0
        )
        gain_b = tl.load(q_norm_ptr + HALF + pair + head * 0, mask=is_q, other=0) + tl.load(
            k_norm_ptr + HALF + pair + head * 0, mask=is_k, other=0
        )
        rotated_a, rotated_b = a * factor * gain_a.to(tl.float32), b * factor * gain_b.to(tl.float32)
    rotated_a, rotated_b = rotated_a * cos - rotated_b * sin, rotated_b * cos + rotated_a * sin

    q_mask = mask & (head < HQ)
    q_at = q_ptr + row * (HQ * D) + head * D + pair
    tl.store(q_at, rotated_a.to(q_ptr.dtype.element_ty), mask=q_mask)
    tl.store(q_at + HALF, rotated_b.to(q_ptr.dtype.element_ty), mask=q_mask)
    k_mask = mask & (head >= HQ) & (head < HQ + HKV)
    k_at = k_ptr + row * (HKV * D) + (head - HQ) * D + pair
    tl.store(k_at, rotated_a.to(k_ptr.dtype.element_ty), mask=k_mask)
    tl.store(k_at + HALF, rotated_b.to(k_ptr.dtype.element_ty), mask=k_mask)
    if position >= 0:
        kv_head = tl.maximum(head - HQ, 0) % HKV
        cached = ((slot * HKV + kv_head) * S + position) * D + pair
        tl.store(k_cache_ptr + cached, to_cache(rotated_a, k_cache_ptr), mask=k_mask)
        tl.store(k_cache_ptr + cached + HALF, to_cache(rotated_b, k_cache_ptr), mask=k_mask)
        v_mask = mask & (head >= HQ + HKV)
        tl.store(v_cache_ptr + cached, to_cache(a, v_cache_ptr), mask=v_mask)
        tl.store(v_cache_ptr + cached + HALF, to_cache(b, v_cache_ptr), mask=v_mask)


# ---------------------------------------------------------------- operators


def _contiguous(**tensors):
    for name, t in tensors.items():
        if not t.is_contiguous():
            raise ValueError(f"{name}: found strides {t.stride()}, expected a contiguous tensor")


@torch.library.custom_op("rooflama::rms_norm", mutates_args=())
def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: found {list(weight.shape)}, expected [{x.shape[-1]}]")
    _contiguous(x=x, weight=weight)
    if not runs_kernels(x):
        return rms_norm_ref(x, weight, eps)
    out, K = torch.empty_like(x), x.shape[-1]
    if x.numel():
        block = triton.next_power_of_2(K)
        _rms_norm_kernel[(x.numel() // K,)](
            x, weight, out, K, eps, BLOCK=block, num_warps=max(1, min(8, block // 512)), **launch_options(x)
        )
    return out


@_rms_norm.register_fake
def _(x, weight, eps):
    return torch.empty_like(x)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., K] / sqrt(mean(x^2) + eps) * weight [K], in float32, rounded once. ValueError: a shape that does not fit."""
    return torch.ops.rooflama.rms_norm(x.contiguous(), weight, eps)


def _fold_norm_outputs(x, gain, permuted) -> FoldedNorm:
    if x.dim() != 2 or not x.shape[1]:
        raise ValueError(f"x: found {list(x.shape)}, expected [N, K]")
    if gain.shape != x.shape[1:] or gain.dtype != x.dtype:
        raise ValueError(f"gain: found {gain.dtype} {list(gain.shape)}, expected {x.dtype} [{x.shape[1]}]")
    if permuted and x.shape[1] % 32:
        raise ValueError(f"x: found {x.shape[1]} columns, expected a multiple of 32 where they are permuted")
    _contiguous(x=x, gain=gain)
    blocks = -(-x.shape[1] // fold_block(x.shape[0], None))
    return FoldedNorm(torch.empty_like(x), x.new_empty(x.shape[0], blocks, dtype=torch.float32), permuted)


@torch.library.custom_op("rooflama::fold_norm", mutates_args=())
def _fold_norm(x: torch.Tensor, gain: torch.Tensor, permuted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    scaled, squares, _ = _fold_norm_outputs(x, gain, permuted)
    (N, K), block = x.shape, fold_block(x.shape[0], None)
    if not uses_kernel(x):
        scaled, squares, _ = fold_norm_ref(x, gain, block)
        return permute_columns(scaled) if permuted else scaled, squares
    columns = max(block, min(FOLD_COLUMNS, triton.next_power_of_2(K)))
    if N:
        _fold_norm_kernel[(N, triton.cdiv(K, columns))](
            x, gain, scaled, squares, K, COLUMNS=columns, BLOCK=block, PERMUTE=permuted, X_SCALE=x_scale(x.dtype),
            num_warps=max(1, columns // 256), **launch_options(x),
        )  # fmt: skip
    return scaled, squares


@_fold_norm.register_fake
def _(x, gain, permuted):
    return _fold_norm_outputs(x, gain, permuted)[:2]


def fold_norm(x: torch.Tensor, gain: torch.Tensor, permuted: bool) -> FoldedNorm:
    """The FoldedNorm of x [N, K] for a norm of this gain [K], by blocks of 64: for a first linear, before which none can fold.

    permuted: the order of its columns, which the reader's `reads_permuted` is about. ValueError: a shape or dtype that does not
    fit.
    """
    return FoldedNorm(*torch.ops.rooflama.fold_norm(x, gain, permuted), permuted)


@torch.library.custom_op("rooflama::silu_mul", mutates_args=())
def _silu_mul(x: torch.Tensor) -> torch.Tensor:
    if x.dim() != 2 or x.shape[1] % 2:
        raise ValueError(f"x: found {list(x.shape)}, expected [N, 2 F]")
    _contiguous(x=x)
    if not runs_kernels(x):
        return silu_mul_ref(x)
    N, F = x.shape[0], x.shape[1] // 2
    out = x.new_empty(N, F)
    if N:
        _silu_mul_kernel[(N, triton.cdiv(F, 1024))](x, out, F, BLOCK=1024, num_warps=4, **launch_options(x))
    return out


@_silu_mul.register_fake
def _(x):
    return x.new_empty(x.shape[0], x.shape[1] // 2)


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """x [N, 2 F], gate beside up -> silu(gate) * up [N, F], in float32, rounded once. ValueError: another shape."""
    return torch.ops.rooflama.silu_mul(x)


def _rope_append_outputs(qkv, cos, sin, position, slot, k_cache, v_cache, q_norm, k_norm, num_heads):
    _, Hkv, _, D = k_cache.shape
    N = qkv.shape[0]
    if k_cache.shape != v_cache.shape or qkv.shape != (N, (num_heads + 2 * Hkv) * D):
        raise ValueError(
            f"qkv and caches: found {list(qkv.shape)}, {list(k_cache.shape)}, {list(v_cache.shape)}, expected "
            f"[N, (Hq + 2 Hkv) D] and twice [slots, Hkv, S, D], Hq {num_heads}"
        )
    for name, t in (("position", position), ("slot", slot)):
        if t.shape != (N,) or t.dtype != torch.int32:
            raise ValueError(f"{name}: found {t.dtype} {list(t.shape)}, expected int32 [{N}]")
    for name, t, dim in (("cos", cos, 1), ("sin", sin, 1), ("q_norm", q_norm, 0), ("k_norm", k_norm, 0)):
        if t is not None and t.shape[dim] != D // (1 + dim):
            raise ValueError(f"{name}: found {list(t.shape)}, expected {D // (1 + dim)} columns")
    _contiguous(qkv=qkv, cos=cos, sin=sin, position=position, slot=slot, k_cache=k_cache, v_cache=v_cache)
    return qkv.new_empty(N, num_heads, D), qkv.new_empty(N, Hkv, D)


@torch.library.custom_op("rooflama::rope_append", mutates_args=("k_cache", "v_cache"))
def _rope_append(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position: torch.Tensor,
    slot: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    num_heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = _rope_append_outputs(qkv, cos, sin, position, slot, k_cache, v_cache, q_norm, k_norm, num_heads)
    if not runs_kernels(qkv):
        return rope_append_ref(qkv, cos, sin, position, slot, k_cache, v_cache, q_norm, k_norm, eps, num_heads)
    _, Hkv, S, D = k_cache.shape
    heads, pairs = triton.next_power_of_2(num_heads + 2 * Hkv), triton.next_power_of_2(D // 2)
    if len(qkv):
        _rope_append_kernel[(len(qkv),)](
            qkv, cos, sin, position, slot, k_cache, v_cache, q_norm, k_norm, q, k, S, eps,
            HQ=num_heads, HKV=Hkv, D=D, HEADS=heads, PAIRS=pairs,
            num_warps=max(1, min(8, heads * pairs // 512)), **launch_options(qkv),
        )  # fmt: skip
    return q, k


@_rope_append.register_fake
def _(qkv, cos, sin, position, slot, k_cache, v_cache, q_norm, k_norm, eps, num_heads):
    return _rope_append_outputs(qkv, cos, sin, position, slot, k_cache, v_cache, q_norm, k_norm, num_heads)


def rope_append(
    qkv, *, cos, sin, position, slot, k_cache, v_cache, q_norm=None, k_norm=None, eps=0.0, num_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """qk-norm (if q_norm) and RoPE of qkv [N, (Hq + 2 Hkv) D]; k and v go to the cache. Returns q [N, Hq, D], k [N, Hkv, D].

    cos, sin [positions, D / 2] float32; position, slot [N] int32: which row of which slot of k_cache, v_cache
    [slots, Hkv, S, D] a token takes; none below 0. q_norm, k_norm [D]. ValueError: a shape or dtype that does not fit.
    """
    return torch.ops.rooflama.rope_append(
        qkv, cos, sin, position, slot, k_cache, v_cache, q_norm, k_norm, eps, num_heads
    )  # fmt: skip
