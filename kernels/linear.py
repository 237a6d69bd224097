"""Linear layers of the decode step: one kernel each, from the RMSNorm before it to the activation or cache append behind it.

Owns `linear` (plain, or SiLU x up; bias; residual), `linear_folding` (which begins the next RMSNorm) and `qkv_rope_append`
(bias, qk-norm, RoPE, append to the KV cache), for 1 to MAX_ROWS rows. Does not know the model; _matmul.py does the
multiplying, tiles.py chooses the tiles.
Letters: B sequences, T query tokens a sequence, M = B * T rows (row r is token r % T of sequence r // T), K input features,
N output features, F = N / 2 for SiLU x up, Hq/Hkv heads, D head size, S cache rows; R weight rows of a tile, MP padded M.

Two rows that an epilogue combines (gate and up; the halves of a RoPE pair) are in one program: the first members of its pairs
are one vector of rows, the second members another.
"""

import dataclasses
import math

import torch
import triton
import triton.language as tl

from kernels._common import hold, num_sms, pdl_trigger, pdl_wait, permute_columns, permuted, to_cache
from kernels._matmul import (
    MAX_ROWS,
    FoldedNorm,
    Operand,
    append_ref,
    apply_norm_ref,
    arrive,
    check_matmul,
    fma_again,
    fold_norm_ref,
    interleave,
    load_folded,
    matmul_arguments,
    members,
    merge,
    multiply,
    norm_factor,
    preload,
    reads_permuted,
    rms_factor,
    rms_norm_ref,
    rope_factors,
    rotate_ref,
    scratch,
    split_norm,
    tile_of,
    token_positions,
    uses_kernel,
    x_scale,
)
from kernels._packed import multiply_packed, preload_packed, unit_starts
from kernels._packed_ring import described_by, launch_packed_ring, launch_packed_ring_qkv
from kernels._ring import launch_ring, launch_ring_qkv, ring_serves_qkv, tma_reads
from kernels.formats import Weight
from kernels.tiles import Tile, fold_block

__all__ = ["MAX_ROWS", "linear", "linear_folding", "linear_ref", "qkv_rope_append", "qkv_rope_append_ref"]


# ---------------------------------------------------------------- reference


def linear_ref(x, weight, bias=None, norm=None, eps=0.0, activation="none", residual=None, squares=None):
    """activation(rmsnorm(x) @ weight.T + bias) + residual."""
    h = apply_norm_ref(x, norm, squares, eps)
    y = torch.nn.functional.linear(h, weight, bias)
    if activation == "silu_mul":
        gate, up = y.chunk(2, dim=-1)
        y = torch.nn.functional.silu(gate) * up
    return y if residual is None else y + residual


def qkv_rope_append_ref(
    x, weight, bias, norm, eps, q_norm, k_norm, qk_eps, cos, sin, lengths, table, k_cache, v_cache,
    page_size, num_heads, num_kv_heads, head_dim, squares=None,
):  # fmt: skip
    """rmsnorm -> projection + bias -> qk-norm -> RoPE -> append. No step waits for the host, so that it can be captured."""
    M, B, D = x.shape[0], lengths.numel(), head_dim
    T = M // B
    qkv = linear_ref(x, weight, bias, norm, eps, squares=squares).view(M, num_heads + 2 * num_kv_heads, D)
    q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_norm is not None:
        q, k = rms_norm_ref(q, q_norm, qk_eps), rms_norm_ref(k, k_norm, qk_eps)
    row = torch.arange(M, device=x.device)
    position = lengths.long()[row // T] - T + row % T
    at = position.clamp(min=0)
    angles = [t[at].unsqueeze(1) for t in (cos, sin)]
    q, k = rotate_ref(q, *angles), rotate_ref(k, *angles)
    append_ref((k_cache, v_cache), (k, v), table.long()[row // T, at // page_size], at % page_size, position)
    return q.contiguous()


# ---------------------------------------------------------------- kernels


@triton.jit
def _linear_rows(tile, F, R: tl.constexpr, SILU_MUL: tl.constexpr):
    """The weight rows of a tile, as a tuple of vectors; the first one's are also the output features that it computes."""
    if SILU_MUL:
        gate = tile * (R // 2) + tl.arange(0, R // 2)
        rows = (gate, gate + F)
    else:
        rows = (tile * R + tl.arange(0, R),)
    return rows


@triton.jit
def _loaded_rows(rows, R: tl.constexpr):
    """What a tile loads: one vector of all its rows."""
    return interleave(rows[0], rows[1], R) if len(rows) == 2 else rows[0]


@triton.jit
def _add_bias(sums, bias_ptr, rows, N, MASK_N: tl.constexpr):
    if bias_ptr is not None:
        if MASK_N:
            sums += tl.load(bias_ptr + rows, mask=rows < N, other=0).to(tl.float32)[:, None]
        else:
            sums += tl.load(bias_ptr + rows).to(tl.float32)[:, None]
    return sums


@triton.jit
def _linear_gain(gain_ptr, features, F, X_SCALE: tl.constexpr):
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + features, mask=features < F, other=0).to(tl.float32) * X_SCALE
    else:
        gain = 1.0
    return gain


@triton.jit
def _linear_residual(residual_ptr, features, m, M, F):
    if residual_ptr is not None:
        mask = (features < F)[:, None] & (m < M)[None, :]
        residual = tl.load(residual_ptr + m[None, :] * F + features[:, None], mask=mask, other=0)
    else:
        residual = None
    return residual


@triton.jit
def _linear_epilogue(
    sums, factor, bias_ptr, residual, y_ptr, gain, scaled_ptr, sum_ptr, rows, m, M, N, F,
    SILU_MUL: tl.constexpr, MASK_N: tl.constexpr, BLOCK: tl.constexpr, PERMUTE: tl.constexpr,
):  # fmt: skip
    """Norm factor, bias, activation, residual, store; and where there is a `gain`, what FoldedNorm has of the tile. PERMUTE:
    the columns of that, or else of y, for the packed linear that reads it."""
    y = _add_bias(sums[0] * factor, bias_ptr, rows[0], N, MASK_N)
    if SILU_MUL:
        y = y / (1.0 + tl.exp(-y)) * _add_bias(sums[1] * factor, bias_ptr, rows[1], N, MASK_N)
    if residual is not None:
        if y.shape[1] >= 16:  # else it changes to y's layout as soon as it has arrived, and x's loads wait behind that
            residual = hold(residual)
        y += residual.to(tl.float32)
    y = y.to(y_ptr.dtype.element_ty)
    mask = (rows[0] < F)[:, None] & (m < M)[None, :]
    offset = m[None, :] * F + rows[0][:, None]
    next_offset = m[None, :] * F + permuted(rows[0])[:, None] if PERMUTE else offset
    tl.store(y_ptr + (next_offset if sum_ptr is None else offset), y, mask=mask)
    if sum_ptr is not None:
        R: tl.constexpr = y.shape[0]
        wide = y.to(tl.float32)
        if MASK_N:
            wide = tl.where((rows[0] < F)[:, None], wide, 0.0)
        tl.store(scaled_ptr + next_offset, (wide * gain[:, None]).to(y.dtype), mask=mask)
        blocks = tl.sum((wide * wide).reshape([R // BLOCK, BLOCK, y.shape[1]]), 1)
        block, P = tl.min(rows[0], 0) // BLOCK + tl.arange(0, R // BLOCK), tl.cdiv(F, BLOCK)
        tl.store(sum_ptr + m[None, :] * P + block[:, None], blocks, mask=(block < P)[:, None] & (m < M)[None, :])


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, norm_ptr, folded_ptr, bias_ptr, residual_ptr, y_ptr, gain_ptr, scaled_ptr, sum_ptr,
    partial_ptr, squares_ptr, counter_ptr,
    M, N, F, K, columns, eps,
    SILU_MUL: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr, PERMUTE: tl.constexpr, FOLDED: tl.constexpr,
    DTYPE: tl.constexpr, DOT: tl.constexpr, M_FMA: tl.constexpr, MP: tl.constexpr, R: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, PRELOAD: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
    GRID: tl.constexpr, MASK_N: tl.constexpr, MASK_K: tl.constexpr,
    STREAM: tl.constexpr, X_SCALE: tl.constexpr,
    FORMAT: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr, BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y[m, tile] = activation(rmsnorm(x[m]) @ W[tile].T + bias) + residual; with a gain, y's FoldedNorm. `columns` is K in
    units of w_ptr and x_ptr."""
    pdl_trigger(PDL)
    tile, part = tl.program_id(0) // SPLIT, tl.program_id(0) % SPLIT
    k0 = part * (CHUNKS * CHUNK)
    m = tl.arange(0, MP)
    NORM: tl.constexpr = norm_ptr is not None
    rows = _linear_rows(tile, F, R, SILU_MUL)
    loaded = _loaded_rows(rows, R)
    PACKED: tl.constexpr = FORMAT != "plain"
    if PACKED:
        starts, left = unit_starts(
            tile * (R // (8 * len(rows))), F // 8, k0, columns, tl.cdiv(N, 8), WARPS, PARTS, BLOCKS, CHUNKS, SILU_MUL, MASK_N
        )
        tiles = preload_packed(w_ptr, scale_ptr, zero_ptr, starts, left, PARTS, GROUPS, PRELOAD, MASK_K, STREAM)
    else:
        tiles, norms = preload(w_ptr, norm_ptr, loaded, k0, N, columns, CHUNK, PRELOAD, NORM, MASK_N, MASK_K, STREAM)
    gain = _linear_gain(gain_ptr, rows[0], F, X_SCALE)
    pdl_wait(PDL)

    folded = load_folded(folded_ptr, M, FOLDED, 1 if M_FMA == 1 else MP)
    residual = _linear_residual(residual_ptr, rows[0], m, M, F)
    if PACKED:
        sums, squares = multiply_packed(
            tiles, x_ptr, w_ptr, norm_ptr, scale_ptr, zero_ptr, starts, left, rows, k0, N, K, M,
            FORMAT, GROUPS, WARPS, PARTS, BLOCKS, MP, CHUNKS, PRELOAD, SILU_MUL, M_FMA == 1, NORM, MASK_N, MASK_K, STREAM,
            X_SCALE, DTYPE,
        )  # fmt: skip
    else:
        sums, squares, widened = multiply(
            tiles, norms, x_ptr, w_ptr, norm_ptr, loaded, k0, N, columns, M, residual if ADD else None, SILU_MUL, DOT, M_FMA,
            MP, R, CHUNK, CHUNKS, PRELOAD, STAGES, NORM, MASK_N, MASK_K, STREAM, X_SCALE, DTYPE,
        )  # fmt: skip
    if ADD:
        residual = None
    if SPLIT > 1:
        SETS: tl.constexpr = len(rows)
        if arrive(sums, squares, partial_ptr, squares_ptr, counter_ptr, tile, part, SPLIT, R // SETS, MP, NORM):
            all_sums, all_squares = merge(partial_ptr, squares_ptr, tile, SETS, 1, SPLIT, R // SETS, MP, NORM)
            factor = norm_factor(all_squares, folded, K, eps, NORM, FOLDED, X_SCALE)
            _linear_epilogue(
                all_sums, factor, bias_ptr, residual, y_ptr, gain, scaled_ptr, sum_ptr, rows, m, M, N, F,
                SILU_MUL, MASK_N, BLOCK, PERMUTE,
            )  # fmt: skip
    else:
        factor = norm_factor(squares, folded, K, eps, NORM, FOLDED, X_SCALE)
        _linear_epilogue(
            sums, factor, bias_ptr, residual, y_ptr, gain, scaled_ptr, sum_ptr, rows, m, M, N, F,
            SILU_MUL, MASK_N, BLOCK, PERMUTE,
        )  # fmt: skip
        if GRID:
            for later in tl.range(tile + tl.num_programs(0), tl.cdiv(N, R), tl.num_programs(0), num_stages=STAGES):
                later_rows = _linear_rows(later, F, R, SILU_MUL)
                later_loaded = _loaded_rows(later_rows, R)
                later_sums = fma_again(
                    widened, w_ptr, later_loaded, N, columns, M_FMA, MP, CHUNK, CHUNKS, MASK_N, MASK_K, STREAM, DTYPE
                )
                pair = members(later_sums, SILU_MUL, R, MP)
                later_residual = _linear_residual(residual_ptr, later_rows[0], m, M, F)
                _linear_epilogue(
                    pair, factor, bias_ptr, later_residual, y_ptr, gain, None, None, later_rows, m, M, N, F,
                    SILU_MUL, MASK_N, BLOCK, PERMUTE,
                )  # fmt: skip


@triton.jit
def _head_norm(a, b, weight_ptr, pair, eps, HALF: tl.constexpr):
    """RMSNorm over a whole head, given as the halves of its pairs."""
    factor = rms_factor(tl.sum(a * a, 0) + tl.sum(b * b, 0), 2 * HALF, eps)[None, :]
    a *= factor * tl.load(weight_ptr + pair).to(tl.float32)[:, None]
    b *= factor * tl.load(weight_ptr + HALF + pair).to(tl.float32)[:, None]
    return a, b


@triton.jit
def _qkv_epilogue(
    sums, factor, bias_ptr, q_norm_ptr, k_norm_ptr, qk_eps, cos, sin, position, page, q_ptr, k_ptr, v_ptr,
    head, pair, m, M, page_size, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Norm factor, bias, qk-norm, RoPE; a query head to q, a key or value head to the row of the cache that is its position."""
    HALF: tl.constexpr = D // 2
    a = _add_bias(sums[0] * factor, bias_ptr, head * D + pair, 0, False)
    b = _add_bias(sums[1] * factor, bias_ptr, head * D + HALF + pair, 0, False)
    if q_norm_ptr is not None:
        if head < HQ:
            a, b = _head_norm(a, b, q_norm_ptr, pair, qk_eps, HALF)
        elif head < HQ + HKV:
            a, b = _head_norm(a, b, k_norm_ptr, pair, qk_eps, HALF)
    rotated_a, rotated_b = a * cos - b * sin, b * cos + a * sin
    if head < HQ:
        address = q_ptr + (m * HQ + head)[None, :].to(tl.int64) * D + pair[:, None]
        mask = (m < M)[None, :]
        tl.store(address, rotated_a.to(q_ptr.dtype.element_ty), mask=mask)
        tl.store(address + HALF, rotated_b.to(q_ptr.dtype.element_ty), mask=mask)
    else:
        writes = (m < M) & (position >= 0)
        kv_head = (head - HQ) % HKV
        row = (page * HKV + kv_head) * page_size + position % page_size
        offset = row[None, :] * D + pair[:, None]
        mask = writes[None, :]
        if head < HQ + HKV:
            tl.store(k_ptr + offset, to_cache(rotated_a, k_ptr), mask=mask)
            tl.store(k_ptr + offset + HALF, to_cache(rotated_b, k_ptr), mask=mask)
        else:
            tl.store(v_ptr + offset, to_cache(a, v_ptr), mask=mask)
            tl.store(v_ptr + offset + HALF, to_cache(b, v_ptr), mask=mask)


@triton.jit(do_not_specialize=["M", "T", "P"])
def _qkv_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, norm_ptr, folded_ptr, bias_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, lengths_ptr,
    table_ptr, q_ptr, k_ptr, v_ptr, partial_ptr, squares_ptr, counter_ptr,
    M, T, P, N, K, columns, eps, qk_eps, page_size,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr, FOLDED: tl.constexpr,
    DTYPE: tl.constexpr, DOT: tl.constexpr, M_FMA: tl.constexpr, MP: tl.constexpr, R: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, PRELOAD: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
    MASK_N: tl.constexpr, MASK_K: tl.constexpr, STREAM: tl.constexpr, X_SCALE: tl.constexpr,
    FORMAT: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr, BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One tile of pairs of one head. TILES tiles of a head and SPLIT parts of K form a group that its last arrival merges:
    TILES is 1, or with qk-norm, which needs the whole head, D / R."""
    pdl_trigger(PDL)
    HALF: tl.constexpr = D // 2
    NORM: tl.constexpr = norm_ptr is not None
    tile, part = tl.program_id(0) // SPLIT, tl.program_id(0) % SPLIT
    k0 = part * (CHUNKS * CHUNK)
    m = tl.arange(0, MP)
    head = tile // (D // R)
    first_pair = tile % (D // R) * (R // 2)
    pair = first_pair + tl.arange(0, R // 2)
    rows = (head * D + pair, head * D + HALF + pair)
    loaded = _loaded_rows(rows, R)
    PACKED: tl.constexpr = FORMAT != "plain"
    if PACKED:
        first = (head * D + first_pair) // 8
        starts, left = unit_starts(first, HALF // 8, k0, columns, 0, WARPS, PARTS, BLOCKS, CHUNKS, True, False)
        tiles = preload_packed(w_ptr, scale_ptr, zero_ptr, starts, left, PARTS, GROUPS, PRELOAD, MASK_K, STREAM)
    else:
        tiles, norms = preload(w_ptr, norm_ptr, loaded, k0, N, columns, CHUNK, PRELOAD, NORM, False, MASK_K, STREAM)
    # Constant during a step: lengths, table, cos and sin. Behind a barrier, because ptxas else moves their loads, each of which
    # waits for the one before it, ahead of the weights' loads.
    tl.debug_barrier()
    position, page = token_positions(lengths_ptr, table_ptr, m, M, T, P, page_size)
    if TILES == 1:
        cos, sin = rope_factors(cos_ptr, sin_ptr, pair, position, HALF)
    pdl_wait(PDL)

    folded = load_folded(folded_ptr, M, FOLDED, 1 if M_FMA == 1 else MP)
    if PACKED:
        sums, squares = multiply_packed(
            tiles, x_ptr, w_ptr, norm_ptr, scale_ptr, zero_ptr, starts, left, rows, k0, N, K, M,
            FORMAT, GROUPS, WARPS, PARTS, BLOCKS, MP, CHUNKS, PRELOAD, True, M_FMA == 1, NORM, False, MASK_K, STREAM,
            X_SCALE, DTYPE,
        )  # fmt: skip
    else:
        sums, squares, _ = multiply(
            tiles, norms, x_ptr, w_ptr, norm_ptr, loaded, k0, N, columns, M, None, True, DOT, M_FMA, MP, R,
            CHUNK, CHUNKS, PRELOAD, STAGES, NORM, False, MASK_K, STREAM, X_SCALE, DTYPE,
        )  # fmt: skip
    if TILES * SPLIT > 1:
        group = tile // TILES
        member = tile % TILES * SPLIT + part
        if arrive(sums, squares, partial_ptr, squares_ptr, counter_ptr, group, member, TILES * SPLIT, R // 2, MP, NORM):
            all_sums, all_squares = merge(partial_ptr, squares_ptr, group, 2, TILES, SPLIT, R // 2, MP, NORM)
            factor = norm_factor(all_squares, folded, K, eps, NORM, FOLDED, X_SCALE)
            if TILES > 1:  # the whole head
                all_pairs = tl.arange(0, HALF)
                all_cos, all_sin = rope_factors(cos_ptr, sin_ptr, all_pairs, position, HALF)
            else:
                all_pairs, all_cos, all_sin = pair, cos, sin
            _qkv_epilogue(
                all_sums, factor, bias_ptr, q_norm_ptr, k_norm_ptr, qk_eps, all_cos, all_sin, position, page,
                q_ptr, k_ptr, v_ptr, head, all_pairs, m, M, page_size, HQ, HKV, D,
            )  # fmt: skip
    else:
        factor = norm_factor(squares, folded, K, eps, NORM, FOLDED, X_SCALE)
        _qkv_epilogue(
            sums, factor, bias_ptr, q_norm_ptr, k_norm_ptr, qk_eps, cos, sin, position, page,
            q_ptr, k_ptr, v_ptr, head, pair, m, M, page_size, HQ, HKV, D,
        )  # fmt: skip


# ---------------------------------------------------------------- operators


def _linear_output(x, w: Operand, bias, norm, squares, activation, residual, y_permuted):
    check_matmul(x, w, bias, norm, squares)
    if activation not in ("none", "silu_mul"):
        raise ValueError(f"activation: found {activation!r}, expected 'none' or 'silu_mul'")
    if activation == "silu_mul" and w.is_packed and w.rows % 16:
        raise ValueError(f"weight: found {w.rows} packed rows, expected a multiple of 16 for silu_mul")
    y = x.new_empty(x.shape[0], w.rows // (2 if activation == "silu_mul" else 1))
    if y_permuted and y.shape[1] % 32:
        raise ValueError(f"weight: found {y.shape[1]} outputs, expected a multiple of 32 where columns are permuted")
    if residual is not None and (residual.shape != y.shape or residual.dtype != y.dtype or not residual.is_contiguous()):
        raise ValueError(
            f"residual: found {residual.dtype} {list(residual.shape)}, expected {y.dtype} {list(y.shape)}, contiguous"
        )
    return y


def _adds_residual_first(x, tile: Tile, norm, activation: str) -> bool:
    """Whether the residual is the first of a thread's products, and so loaded beside x: else ptxas loads it after the products,
    and waits again. With more than two chunks, though, ptxas then takes the registers from x, and loads x in two turns."""
    alone = len(x) == 1 and not tile.dot and tile.split == 1
    return alone and norm is None and activation == "none" and x.shape[1] <= 2 * tile.chunk


def _launch_linear(
    x, w: Operand, bias, norm, squares, eps, activation, residual, y, x_permuted, y_permuted, gain=None, folded=None, block=0
):  # fmt: skip
    """The kernel that fills y, and of a `gain` the FoldedNorm `folded` of y."""
    op = activation if activation == "silu_mul" else "linear"
    if w.is_packed:
        tile = tile_of(op, x, w, rings=x_permuted and bias is norm is None and tma_reads(x, *described_by(w)))
    else:
        serves = bias is gain is squares is None and not x_permuted and not y_permuted
        tile = tile_of(op, x, w, rings=serves and tma_reads(x, w.weight, norm))
    if tile.ring and w.is_packed:
        launch_packed_ring(x, w, squares, eps, op == "silu_mul", residual, y, y_permuted, tile, gain, folded)
        return
    if tile.ring:
        launch_ring(x, w, norm, eps, op == "silu_mul", residual, y, tile)
        return
    if x_permuted:
        x = permute_columns(x)
    if gain is not None and (tile.rows % block or tile.grid):
        raise ValueError(f"Tile.rows: found {tile.rows}, expected a multiple of {block} (and no grid) where a norm is folded")
    arguments, options = matmul_arguments(tile, x, w, norm, squares)
    if gain is not None:
        arguments["X_SCALE"] = x_scale(x.dtype)
    tiles = triton.cdiv(w.rows, tile.rows)
    programs = min(tile.grid * num_sms(x.device.index or 0), tiles) if tile.grid else tiles * tile.split
    _linear_kernel[(programs,)](
        bias_ptr=bias,
        residual_ptr=residual,
        y_ptr=y,
        gain_ptr=gain,
        scaled_ptr=folded and folded.scaled,
        sum_ptr=folded and folded.squares,
        F=y.shape[1],
        eps=eps,
        SILU_MUL=activation == "silu_mul",
        ADD=_adds_residual_first(x, tile, norm, activation),
        BLOCK=block,
        PERMUTE=y_permuted,
        GRID=tile.grid,
        SPLIT=tile.split,
        **arguments,
        **scratch(x, programs, tile, arguments["MP"], programs if tile.grid else tiles),
        **options,
    )


@torch.library.custom_op("rooflama::linear", mutates_args=())
def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    format: str,
    rows: int,
    bias: torch.Tensor | None,
    norm: torch.Tensor | None,
    squares: torch.Tensor | None,
    eps: float,
    activation: str,
    residual: torch.Tensor | None,
    x_permuted: bool,
    y_permuted: bool,
) -> torch.Tensor:
    w = Operand(weight, scale, zero, format, rows)
    y = _linear_output(x, w, bias, norm, squares, activation, residual, y_permuted)
    if not uses_kernel(x):
        x = permute_columns(x) if x_permuted else x
        y = linear_ref(x, w.plain(x), bias, norm, eps, activation, residual, squares)
        return permute_columns(y) if y_permuted else y
    _launch_linear(x, w, bias, norm, squares, eps, activation, residual, y, x_permuted, y_permuted)
    return y


@_linear.register_fake
def _(x, weight, scale, zero, format, rows, bias, norm, squares, eps, activation, residual, x_permuted, y_permuted):
    return _linear_output(x, Operand(weight, scale, zero, format, rows), bias, norm, squares, activation, residual, y_permuted)


def linear(
    x: torch.Tensor,
    weight: Weight,
    *,
    norm: torch.Tensor | FoldedNorm | None = None,
    eps: float = 0.0,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    x_permuted: bool = False,
    y_permuted: bool = False,
) -> torch.Tensor:
    """activation(rmsnorm(x) @ weight.T + bias) + residual, in x.dtype.

    x [M, K], M of 1 to MAX_ROWS; norm: the gain [K], or x's FoldedNorm, or None for no RMSNorm; residual [M, N].
    activation "none" gives [M, N]; "silu_mul" gives silu(gate) * up [M, N / 2] of a weight whose first half is gate.
    x_permuted: x's columns (a FoldedNorm says so itself) are in the order that `reads_permuted` is about; y_permuted: the
    result's are to be. ValueError: a shape, dtype or activation that does not fit.
    """
    x, gain, squares, x_permuted = split_norm(x, norm, x_permuted)
    return torch.ops.rooflama.linear(
        x, *Operand.of(weight), weight.bias, gain, squares, eps, activation, residual, x_permuted, y_permuted
    )  # fmt: skip


def _folding_output(x, w: Operand, bias, residual, gain, block, y_permuted) -> tuple[torch.Tensor, FoldedNorm]:
    y = _linear_output(x, w, bias, None, None, "none", residual, y_permuted)
    if gain.shape != y.shape[1:] or gain.dtype != x.dtype:
        raise ValueError(f"gain: found {gain.dtype} {list(gain.shape)}, expected {x.dtype} [{w.rows}]")
    return y, FoldedNorm(torch.empty_like(y), y.new_empty(y.shape[0], -(-w.rows // block), dtype=torch.float32))


@torch.library.custom_op("rooflama::linear_folding", mutates_args=())
def _linear_folding(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    format: str,
    rows: int,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    gain: torch.Tensor,
    block: int,
    x_permuted: bool,
    y_permuted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    w = Operand(weight, scale, zero, format, rows)
    y, folded = _folding_output(x, w, bias, residual, gain, block, y_permuted)
    if not uses_kernel(x):
        x = permute_columns(x) if x_permuted else x
        y = linear_ref(x, w.plain(x), bias, residual=residual)
        scaled, squares, _ = fold_norm_ref(y, gain, block)
        return y, permute_columns(scaled) if y_permuted else scaled, squares
    _launch_linear(x, w, bias, None, None, 0.0, "none", residual, y, x_permuted, y_permuted, gain, folded, block)
    return y, folded.scaled, folded.squares


@_linear_folding.register_fake
def _(x, weight, scale, zero, format, rows, bias, residual, gain, block, x_permuted, y_permuted):
    y, folded = _folding_output(x, Operand(weight, scale, zero, format, rows), bias, residual, gain, block, y_permuted)
    return y, folded.scaled, folded.squares


def linear_folding(
    x: torch.Tensor,
    weight: Weight,
    *,
    residual: torch.Tensor,
    gain: torch.Tensor,
    x_permuted: bool = False,
    y_permuted: bool = False,
) -> tuple[torch.Tensor, FoldedNorm]:
    """y = x @ weight.T + bias + residual [M, N], and the FoldedNorm of y for a norm of this gain [N]: what the operators that
    read y take as their `norm`. Pays where tiles.folds_norm says so.

    x [M, K], M of 1 to MAX_ROWS; residual [M, N]. x_permuted, y_permuted: as for `linear`, but that y's own columns stay in
    order, and what the FoldedNorm holds is permuted. ValueError: a shape or dtype that does not fit.
    """
    ring = x_permuted and reads_permuted("linear", x, weight)
    block = fold_block(x.shape[0], weight.packed, ring)
    y, *folded = torch.ops.rooflama.linear_folding(
        x, *Operand.of(weight), weight.bias, residual, gain, block, x_permuted, y_permuted
    )
    return y, FoldedNorm(*folded, y_permuted)


def _qkv_output(
    x, w: Operand, bias, norm, squares, q_norm, k_norm, cos, sin, lengths, table, k_cache, v_cache, page_size, Hq, Hkv, D
):  # fmt: skip
    check_matmul(x, w, bias, norm, squares)
    M, B = x.shape[0], lengths.numel()
    if w.rows != (Hq + 2 * Hkv) * D or D % 16:
        raise ValueError(f"weight: found {w.rows} rows, expected ({Hq} + 2 * {Hkv}) heads of {D}, a multiple of 16")
    if lengths.dim() != 1 or lengths.dtype != torch.int32 or M % B:
        raise ValueError(f"lengths: found {lengths.dtype} {list(lengths.shape)}, expected int32 [B], B dividing {M} rows")
    if table.dim() != 2 or table.dtype != torch.int32 or table.shape[0] != B:
        raise ValueError(f"table: found {table.dtype} {list(table.shape)}, expected int32 [{B}, P]")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 4 or cache.shape[1:] != (Hkv, page_size, D):
            raise ValueError(f"{name}: found {list(cache.shape)}, expected [pages, {Hkv}, {page_size}, {D}]")
    for name, t in (("cos", cos), ("sin", sin)):
        if t.dim() != 2 or t.shape[1] != D // 2 or t.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name}: found {t.dtype} {list(t.shape)}, expected float32 [max_positions, {D // 2}]")
    for name, t in (("q_norm", q_norm), ("k_norm", k_norm)):
        if t is not None and (t.shape != (D,) or t.dtype != x.dtype):
            raise ValueError(f"{name}: found {t.dtype} {list(t.shape)}, expected {x.dtype} [{D}]")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm: found one, expected both or neither")
    contiguous = {"lengths": lengths, "table": table, "k_cache": k_cache, "v_cache": v_cache, "cos": cos, "sin": sin}
    for name, t in contiguous.items():
        if not t.is_contiguous():
            raise ValueError(f"{name}: found strides {t.stride()}, expected a contiguous tensor")
    return x.new_empty(M, Hq, D)


@torch.library.custom_op("rooflama::qkv_rope_append", mutates_args=("k_cache", "v_cache"))
def _qkv_rope_append(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    format: str,
    rows: int,
    bias: torch.Tensor | None,
    norm: torch.Tensor | None,
    squares: torch.Tensor | None,
    eps: float,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    qk_eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    lengths: torch.Tensor,
    table: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    x_permuted: bool,
) -> torch.Tensor:
    Hq, Hkv, D = num_heads, num_kv_heads, head_dim
    w = Operand(weight, scale, zero, format, rows)
    q = _qkv_output(
        x, w, bias, norm, squares, q_norm, k_norm, cos, sin, lengths, table, k_cache, v_cache, page_size, Hq, Hkv, D
    )  # fmt: skip
    if not uses_kernel(x):
        x = permute_columns(x) if x_permuted else x
        return qkv_rope_append_ref(
            x, w.plain(x), bias, norm, eps, q_norm, k_norm, qk_eps, cos, sin, lengths, table, k_cache, v_cache,
            page_size, Hq, Hkv, D, squares,
        )  # fmt: skip
    serves = ring_serves_qkv(D, q_norm is not None)
    if w.is_packed:
        tile = tile_of("qkv", x, w, rings=serves and x_permuted and norm is None and tma_reads(x, *described_by(w)))
    else:
        tile = tile_of("qkv", x, w, rings=serves and squares is None and not x_permuted and tma_reads(x, w.weight, norm))
    if tile.ring:
        launch, of_norm = (launch_packed_ring_qkv, squares) if w.is_packed else (launch_ring_qkv, norm)
        launch(
            x, w, bias, of_norm, eps, q_norm, k_norm, qk_eps, cos, sin, lengths, table, q, k_cache, v_cache,
            page_size, Hkv, tile,
        )  # fmt: skip
        return q
    if x_permuted:
        x = permute_columns(x)
    tile = fit_to_head(tile, D)
    if q_norm is not None and D & (D - 1):
        raise ValueError(f"head_dim: found {D}, expected a power of two where queries and keys are normalised")
    tiles_of_head = D // tile.rows if q_norm is not None else 1
    arguments, options = matmul_arguments(tile, x, w, norm, squares)
    tiles = rows // tile.rows
    programs = tiles * tile.split
    _qkv_kernel[(programs,)](
        bias_ptr=bias,
        q_norm_ptr=q_norm,
        k_norm_ptr=k_norm,
        cos_ptr=cos,
        sin_ptr=sin,
        lengths_ptr=lengths,
        table_ptr=table,
        q_ptr=q,
        k_ptr=k_cache,
        v_ptr=v_cache,
        T=x.shape[0] // lengths.numel(),
        P=table.shape[1],
        eps=eps,
        qk_eps=qk_eps,
        page_size=page_size,
        HQ=Hq,
        HKV=Hkv,
        D=D,
        TILES=tiles_of_head,
        SPLIT=tile.split,
        **arguments,
        **scratch(x, programs, tile, arguments["MP"], tiles // tiles_of_head),
        **options,
    )
    return q


@_qkv_rope_append.register_fake
def _(
    x, weight, scale, zero, format, rows, bias, norm, squares, eps, q_norm, k_norm, qk_eps, cos, sin, lengths, table,
    k_cache, v_cache, page_size, num_heads, num_kv_heads, head_dim, x_permuted,
):  # fmt: skip
    Hq, Hkv, D, w = num_heads, num_kv_heads, head_dim, Operand(weight, scale, zero, format, rows)
    return _qkv_output(
        x, w, bias, norm, squares, q_norm, k_norm, cos, sin, lengths, table, k_cache, v_cache, page_size, Hq, Hkv, D
    )  # fmt: skip


def fit_to_head(tile: Tile, head_dim: int) -> Tile:
    """The tile with its rows cut down so that whole tiles make a head, and without a persistent grid, which has no use here."""
    rows = max(2, math.gcd(tile.rows, head_dim))
    return dataclasses.replace(tile, rows=rows, grid=0)


def qkv_rope_append(
    x: torch.Tensor,
    weight: Weight,
    *,
    norm: torch.Tensor | FoldedNorm,
    eps: float,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    qk_eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    lengths: torch.Tensor,
    table: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> torch.Tensor:
    """Queries [M, Hq, D] of x [M, K]; keys and values are appended to the cache.

    RMSNorm (norm: the gain [K], or x's FoldedNorm), projection with `weight` [(Hq + 2 Hkv) D, K] and its bias, RMSNorm of each
    query and key head (q_norm, k_norm [D] or None), RoPE (rotate-half) with cos and sin [max_positions, D / 2] float32, append.
    Token t of sequence b is at position p = lengths[b] - T + t; it goes to row p % page_size of page table[b, p // page_size]
    of k_cache and v_cache [pages, Hkv, page_size, D], in their dtype: x's, or float8_e4m3fn, which saturates at +-448. Nothing
    is written where p is below 0. lengths [B], table [B, P] int32.
    ValueError: a shape or dtype that does not fit.
    """
    x, gain, squares, x_permuted = split_norm(x, norm)
    return torch.ops.rooflama.qkv_rope_append(
        x, *Operand.of(weight), weight.bias, gain, squares, eps, q_norm, k_norm, qk_eps, cos, sin, lengths, table,
        k_cache, v_cache, page_size, num_heads, num_kv_heads, head_dim, x_permuted,
    )  # fmt: skip
