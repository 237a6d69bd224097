# ruff: noqa: RUF005 (Triton knows no star in a tuple)
"""Linears of 2 to 64 rows on Hopper: weights stream by TMA through a ring of shared memory, and wgmma multiplies from there.

Owns the kernels that `linear` and `qkv_rope_append` launch for plain weights and a tile with `ring` (tiles.py), written in
Gluon, their launch, and what _packed_ring.py shares with them. Does not know the model. Needs a GPU of compute capability 9.0:
there is no interpreter for it, so tests compile it anywhere and run it on a card.
Letters: M rows of x, MP padded (wgmma's N: 8 for up to 8 rows), K input features, N weight rows, F output features, S stages;
of qkv: T query tokens a sequence, P pages of a table, D head size, H = D / 2, PER = 64 / H heads a tile.

A program owns two boxes of 64 weight rows and K / SPLIT columns: gate and up of the same 64 features, the first and second
halves of PER heads, or 128 neighbouring rows. What an epilogue combines is so in one thread. A stage of its ring holds both
boxes, x and the norm's gain for CHUNK columns. Weights and gain, which no kernel writes, are asked for before the dependency
wait, x after it: 150 to 200 KB are on their way while the kernel before ends.
Both boxes are one TMA load of [2, PER, H, CHUNK]: for all of them W is described as [2, groups of H rows, H, K], where only the
strides differ (but for qkv, PER is 1 and H 64).
Loops over stages are not unrolled: their code would be 6 KB that every program fetches before its first load.
"""

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels._common import arrives_last, launch_options, pdl_trigger, pdl_wait, to_cache
from kernels._matmul import Operand, rms_factor, rope_factors, scratch, token_positions, x_scale
from kernels.tiles import RING_ROWS, Tile, ring_padded

# ---------------------------------------------------------------- sums


@gluon.constexpr_function
def sums_layout(MP, W):
    """Of a program's sums [ROWS, MP], of W warps."""
    return gl.NVMMADistributedLayout([3, 0], [W, 1], [16, MP, 16])


@gluon.constexpr_function
def _x_layout(MP):
    """Of x [MP, CHUNK]: 16 bytes a thread."""
    across = 8 if MP >= 16 else 16  # lanes along the longer side of what a warp holds
    return gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])


@gluon.constexpr_function
def box_layout(HALF, MP, W):
    """Of a box's sums and outputs [HALF, MP]: neighbouring features of a row of x a thread."""
    across = min(4, max(1, MP // W))  # lanes along the rows of x
    return gl.BlockedLayout([HALF * across // 32, 1], [32 // across, across], [1, W], [0, 1])


@gluon.jit
def _expect_weights(w_desc, gain_desc, bar, pred):
    if gain_desc is not None:
        mbarrier.expect(bar, w_desc.block_type.nbytes + gain_desc.block_type.nbytes, pred=pred)
    else:
        mbarrier.expect(bar, w_desc.block_type.nbytes, pred=pred)


@gluon.jit
def _load_weights(w_desc, gain_desc, w_smem, gain_smem, bar, slot, group, k, pred):
    """Both boxes of W, and the gain, at column k into a stage."""
    tma.async_copy_global_to_shared(w_desc, [0, group, 0, k], bar, w_smem.index(slot), pred=pred)
    if gain_desc is not None:
        tma.async_copy_global_to_shared(gain_desc, [k], bar, gain_smem.index(slot), pred=pred)


@gluon.jit
def _begin(w_desc, x_desc, gain_desc, group, k0, first, S: gl.constexpr, PDL: gl.constexpr):
    """A ring whose first stages are on their way: weights and gain, and behind the dependency wait x. group: of W's, the first.

    first: stages that are filled; not a constant, for LLVM would unroll the loops over it.
    """
    DTYPE: gl.constexpr = w_desc.dtype
    MP: gl.constexpr = x_desc.block_type.shape[0]
    CHUNK: gl.constexpr = x_desc.block_type.shape[1]
    PER: gl.constexpr = w_desc.block_type.shape[1]
    w_smem = gl.allocate_shared_memory(DTYPE, [S, 2, PER, 64 // PER, CHUNK], w_desc.layout)
    x_smem = gl.allocate_shared_memory(DTYPE, [S, MP, CHUNK], x_desc.layout)
    w_bars = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    x_bars = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    ring = (w_smem, x_smem, w_bars, x_bars)
    gain_smem = None
    if gain_desc is not None:
        scaled_smem = gl.allocate_shared_memory(DTYPE, [2, MP, CHUNK], x_desc.layout)
        gain_smem = gl.allocate_shared_memory(DTYPE, [S, CHUNK], gain_desc.layout)
        ring = ring + (gain_smem, scaled_smem)

    for i in range(first):  # a stage after the other, so that the first load is out at once
        w_bar, x_bar = w_bars.index(i), x_bars.index(i)
        mbarrier.init(w_bar, count=1)
        mbarrier.init(x_bar, count=1)
        fence_async_shared()
        _expect_weights(w_desc, gain_desc, w_bar, True)
        mbarrier.expect(x_bar, x_desc.block_type.nbytes)
        tl.debug_barrier()
        _load_weights(w_desc, gain_desc, w_smem, gain_smem, w_bar, i, group, k0 + i * CHUNK, True)
    pdl_wait(PDL)
    for i in range(first):
        tma.async_copy_global_to_shared(x_desc, [0, k0 + i * CHUNK], x_bars.index(i), x_smem.index(i))
    return ring


@gluon.jit
def _multiply(ring, w_desc, x_desc, gain_desc, group, k0, CHUNKS: gl.constexpr, S: gl.constexpr, X_SCALE: gl.constexpr):
    """Of a program's CHUNKS chunks the sums [128, MP], and where there is a gain the sums of x^2 [MP]."""
    w_smem, x_smem, w_bars, x_bars = ring[0], ring[1], ring[2], ring[3]
    gain_smem = None
    if gain_desc is not None:
        gain_smem, scaled_smem = ring[4], ring[5]
    MP: gl.constexpr = x_desc.block_type.shape[0]
    CHUNK: gl.constexpr = x_desc.block_type.shape[1]
    X: gl.constexpr = _x_layout(MP)
    sums = gl.zeros([128, MP], gl.float32, sums_layout(MP, 4))
    squares = gl.zeros([MP, CHUNK], gl.float32, X)
    slot = 0
    phase = 0
    for c in range(CHUNKS):
        mbarrier.wait(x_bars.index(slot), phase)
        mbarrier.wait(w_bars.index(slot), phase)
        if gain_desc is not None:
            x = x_smem.index(slot).load(X).to(gl.float32)
            gain = gain_smem.index(slot).load(gl.SliceLayout(0, X)).to(gl.float32)
            squares += x * x
            operand = scaled_smem.index(c & 1)  # its last reader, chunk c - 2, has been waited for
            operand.store((x * (gain * X_SCALE)[None, :]).to(w_desc.dtype))
            fence_async_shared()
            tl.debug_barrier()
        else:
            operand = x_smem.index(slot)
        w = w_smem.index(slot).reshape([128, CHUNK])
        sums = warpgroup_mma(w, operand.permute((1, 0)), sums, is_async=True)
        sums = warpgroup_mma_wait(1, deps=(sums,))  # chunk c - 1 has been multiplied: its stage is free
        free = gl.where(slot == 0, S - 1, slot - 1)
        more = (c >= 1) & (c < CHUNKS - S + 1)
        k = k0 + (c + S - 1) * CHUNK
        w_bar, x_bar = w_bars.index(free), x_bars.index(free)
        _expect_weights(w_desc, gain_desc, w_bar, more)
        mbarrier.expect(x_bar, x_desc.block_type.nbytes, pred=more)
        tl.debug_barrier()  # every warp has multiplied
        _load_weights(w_desc, gain_desc, w_smem, gain_smem, w_bar, free, group, k, more)
        tma.async_copy_global_to_shared(x_desc, [0, k], x_bar, x_smem.index(free), pred=more)
        wraps = slot == S - 1
        phase = gl.where(wraps, phase ^ 1, phase)
        slot = gl.where(wraps, 0, slot + 1)
    sums = warpgroup_mma_wait(0, deps=(sums,))
    tl.debug_barrier()  # the compiler's own shared memory lies in the ring: not before every warp has multiplied
    return sums, gl.sum(squares, 1)


@gluon.jit
def _normed(a, b, squares, eps, K: gl.constexpr, X_SCALE: gl.constexpr):
    """A tile's sums by the factors of their rows' norm."""
    factor = (rms_factor(squares, K, eps) / X_SCALE)[None, :]
    return a * factor, b * factor


@gluon.jit
def boxes(sums):
    """A program's sums [ROWS, MP] as each box's, [ROWS / 2, MP]: both in the same thread."""
    HALF: gl.constexpr = sums.shape[0] // 2
    MP: gl.constexpr = sums.shape[1]
    Y: gl.constexpr = box_layout(HALF, MP, gl.num_warps())
    a, b = gl.split(gl.permute(gl.reshape(gl.convert_layout(sums, Y), [2, HALF, MP]), (1, 2, 0)))
    return gl.convert_layout(a, Y, assert_trivial=True), gl.convert_layout(b, Y, assert_trivial=True)


@gluon.jit
def _own(sums, squares, eps, NORM: gl.constexpr, K: gl.constexpr, X_SCALE: gl.constexpr, MP: gl.constexpr):
    """A tile's sums, [64, MP] of each box, in the one program that it has."""
    Y: gl.constexpr = box_layout(64, MP, 4)
    a, b = boxes(sums)
    if NORM:
        a, b = _normed(a, b, gl.convert_layout(squares, gl.SliceLayout(0, Y)), eps, K, X_SCALE)
    return a, b


# ---------------------------------------------------------------- programs that share a tile


@gluon.jit
def store_part(sums, partial_ptr, tile, part, SPLIT: gl.constexpr):
    """Stores this program's sums [ROWS, MP] as [m, row]."""
    ROWS: gl.constexpr = sums.shape[0]
    MP: gl.constexpr = sums.shape[1]
    MMA: gl.constexpr = sums_layout(MP, gl.num_warps())
    r = gl.arange(0, ROWS, gl.SliceLayout(1, MMA))[:, None]
    m = gl.arange(0, MP, gl.SliceLayout(0, MMA))[None, :]
    gl.store(partial_ptr + (tile * SPLIT + part) * (ROWS * MP) + m * ROWS + r, sums)


@gluon.jit
def _arrive(
    sums, squares, partial_ptr, squares_ptr, counter_ptr, tile, part,
    NORM: gl.constexpr, SPLIT: gl.constexpr, MP: gl.constexpr,
):  # fmt: skip
    """Stores this program's sums, and its squares; True in the program that arrives last."""
    store_part(sums, partial_ptr, tile, part, SPLIT)
    if NORM:
        gl.store(squares_ptr + (tile * SPLIT + part) * MP + gl.arange(0, MP, gl.SliceLayout(1, _x_layout(MP))), squares)
    return arrives_last(counter_ptr + tile, SPLIT)


@gluon.jit
def load_parts(pointers, step, SPLIT: gl.constexpr):
    """What SPLIT programs have stored, `step` apart. Other multiprocessors wrote it: never from L1."""
    parts = ()
    for s in gl.static_range(SPLIT):
        parts = parts + (gl.load(pointers + s * step, cache_modifier=".cg"),)
    return parts


@gluon.jit
def add_parts(parts):
    """In a fixed order."""
    total = parts[0]
    for s in gl.static_range(1, len(parts)):
        total += parts[s]
    return total


@gluon.jit
def load_boxes(partial_ptr, tile, SPLIT: gl.constexpr, HALF: gl.constexpr, MP: gl.constexpr):
    """The parts of a tile's sums that its programs have stored, [HALF, MP] each: of the first box, and of the second."""
    Y: gl.constexpr = box_layout(HALF, MP, gl.num_warps())
    r = gl.arange(0, HALF, gl.SliceLayout(1, Y))[:, None]
    m = gl.arange(0, MP, gl.SliceLayout(0, Y))[None, :]
    box = partial_ptr + tile * (SPLIT * 2 * HALF * MP) + m * (2 * HALF) + r
    return load_parts(box, 2 * HALF * MP, SPLIT), load_parts(box + HALF, 2 * HALF * MP, SPLIT)


@gluon.jit
def _merge(
    ring, partial_ptr, squares_ptr, tile, eps,
    NORM: gl.constexpr, K: gl.constexpr, CHUNKS: gl.constexpr, S: gl.constexpr, SPLIT: gl.constexpr, MP: gl.constexpr,
    X_SCALE: gl.constexpr,
):  # fmt: skip
    """A tile's sums, [64, MP] of each box, from what its programs have stored.

    ptxas, to save registers, would load a few parts, add them, and load the next ones, a trip to L2 each time. It moves
    nothing over a loop, though, and a wait is one, for a phase that is over: what stands before it is in flight at once, where
    there are registers.
    """
    parts_a, parts_b = load_boxes(partial_ptr, tile, SPLIT, 64, MP)
    if NORM:
        m = gl.arange(0, MP, gl.SliceLayout(0, box_layout(64, MP, 4)))
        parts = load_parts(squares_ptr + tile * (SPLIT * MP) + m, MP, SPLIT)
    if MP * SPLIT <= 128:
        FILLS: gl.constexpr = (CHUNKS + S - 1) // S  # of the first stage
        mbarrier.wait(ring[3].index(0), (FILLS - 1) & 1)
    a, b = add_parts(parts_a), add_parts(parts_b)
    if NORM:
        a, b = _normed(a, b, add_parts(parts), eps, K, X_SCALE)
    return a, b


# ---------------------------------------------------------------- linear


@gluon.jit
def _outputs(f0, F, M, MP: gl.constexpr):
    """Of 64 outputs' [64, MP] that begin at f0: offsets into y [M, F], and which are there."""
    Y: gl.constexpr = box_layout(64, MP, 4)
    f = f0 + gl.arange(0, 64, gl.SliceLayout(1, Y))[:, None]
    m = gl.arange(0, MP, gl.SliceLayout(0, Y))[None, :]
    return m * F + f, m < M


@gluon.jit
def _load_residuals(residual_ptr, f0, F, M, SILU_MUL: gl.constexpr, MP: gl.constexpr):
    """Of the first box's outputs, and where the second one has its own of those; () without a residual."""
    residuals = ()
    if residual_ptr is not None:
        offset, there = _outputs(f0, F, M, MP)
        residuals = (gl.load(residual_ptr + offset, mask=there, other=0.0),)
        if not SILU_MUL:
            residuals = residuals + (gl.load(residual_ptr + offset + 64, mask=there, other=0.0),)
    return residuals


@gluon.jit
def _linear_epilogue(sums, residuals, y_ptr, f0, F, M, SILU_MUL: gl.constexpr, MP: gl.constexpr):
    """Activation, residual, store."""
    outputs = sums
    if SILU_MUL:
        outputs = (sums[0] / (1.0 + gl.exp(-sums[0])) * sums[1],)
    offset, there = _outputs(f0, F, M, MP)
    for box in gl.static_range(len(outputs)):
        y = outputs[box]
        if len(residuals) > 0:
            y += residuals[box].to(gl.float32)
        gl.store(y_ptr + offset + 64 * box, y.to(y_ptr.dtype.element_ty), mask=there)


@gluon.jit(do_not_specialize=["M", "first"])
def _ring_linear_kernel(
    w_desc, x_desc, gain_desc, residual_ptr, y_ptr, partial_ptr, squares_ptr, counter_ptr, M, F, eps, first,
    K: gl.constexpr, SILU_MUL: gl.constexpr, SPLIT: gl.constexpr, CHUNK: gl.constexpr, S: gl.constexpr, MP: gl.constexpr,
    X_SCALE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """y[m, tile] = act(rmsnorm(x[m]) @ W[tile].T) + residual."""
    pdl_trigger(PDL)
    NORM: gl.constexpr = gain_desc is not None
    CHUNKS: gl.constexpr = K // SPLIT // CHUNK
    tile, part = gl.program_id(0) // SPLIT, gl.program_id(0) % SPLIT
    k0 = part * (CHUNKS * CHUNK)
    f0 = tile * (64 if SILU_MUL else 128)
    ring = _begin(w_desc, x_desc, gain_desc, tile, k0, first, S, PDL)
    if SPLIT == 1:  # behind x, and there long before the sums are
        residuals = _load_residuals(residual_ptr, f0, F, M, SILU_MUL, MP)
    sums, squares = _multiply(ring, w_desc, x_desc, gain_desc, tile, k0, CHUNKS, S, X_SCALE)
    if SPLIT == 1:
        _linear_epilogue(_own(sums, squares, eps, NORM, K, X_SCALE, MP), residuals, y_ptr, f0, F, M, SILU_MUL, MP)
    elif _arrive(sums, squares, partial_ptr, squares_ptr, counter_ptr, tile, part, NORM, SPLIT, MP):
        late = _load_residuals(residual_ptr, f0, F, M, SILU_MUL, MP)
        merged = _merge(ring, partial_ptr, squares_ptr, tile, eps, NORM, K, CHUNKS, S, SPLIT, MP, X_SCALE)
        _linear_epilogue(merged, late, y_ptr, f0, F, M, SILU_MUL, MP)


# ---------------------------------------------------------------- qkv


@gluon.jit
def load_of_heads(bias_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, head, pair, position, HQ: gl.constexpr, H: gl.constexpr):
    """What the epilogue takes beside sums: cos and sin [64, MP]; both boxes' biases, and gains of qk-norm, [64] each or ()."""
    biases = ()
    gains = ()
    if bias_ptr is not None:
        bias = bias_ptr + head * (2 * H) + pair
        biases = (gl.load(bias), gl.load(bias + H))
    if q_norm_ptr is not None:
        gain = gl.where(head < HQ, q_norm_ptr + pair, k_norm_ptr + pair)
        gains = (gl.load(gain), gl.load(gain + H))
    return rope_factors(cos_ptr, sin_ptr, pair, position, H), biases, gains


@gluon.jit
def qkv_epilogue(
    sums, of_heads, qk_eps, position, page, q_ptr, k_ptr, v_ptr, tile, head, pair, m, M, page_size,
    HQ: gl.constexpr, HKV: gl.constexpr, H: gl.constexpr,
):  # fmt: skip
    """Bias, qk-norm, RoPE; a query head to q, a key or value head to the row of the cache that is its position."""
    turn, biases, gains = of_heads
    cos, sin = turn
    a, b = sums
    if len(biases) > 0:
        a += biases[0].to(gl.float32)[:, None]
        b += biases[1].to(gl.float32)[:, None]
    if len(gains) > 0:
        if tile < HQ + HKV:  # which is the head, for there is but one
            factor = rms_factor(gl.sum(a * a + b * b, 0), 2 * H, qk_eps)[None, :]
            a *= factor * gains[0].to(gl.float32)[:, None]
            b *= factor * gains[1].to(gl.float32)[:, None]
    row = (page * HKV)[None, :] + ((head - HQ) % HKV)[:, None]
    cached = (row * page_size + (position % page_size)[None, :]) * (2 * H) + pair[:, None]
    query, turns = (head < HQ)[:, None], (head < HQ + HKV)[:, None]
    a, b = gl.where(turns, a * cos - b * sin, a), gl.where(turns, b * cos + a * sin, b)
    address = gl.where(turns, k_ptr + cached, v_ptr + cached)
    queries = q_ptr + (m[None, :] * HQ + head[:, None]) * (2 * H) + pair[:, None]
    mask, cached_mask = (m < M)[None, :], (m < M)[None, :] & (position >= 0)[None, :]
    if k_ptr.dtype == q_ptr.dtype:  # one store for all
        address, mask = gl.where(query, queries, address), gl.where(query, mask, cached_mask)
        gl.store(address, a.to(q_ptr.dtype.element_ty), mask=mask)
        gl.store(address + H, b.to(q_ptr.dtype.element_ty), mask=mask)
    else:
        gl.store(queries, a.to(q_ptr.dtype.element_ty), mask=mask & query)
        gl.store(queries + H, b.to(q_ptr.dtype.element_ty), mask=mask & query)
        gl.store(address, to_cache(a, k_ptr), mask=cached_mask & (query == 0))
        gl.store(address + H, to_cache(b, k_ptr), mask=cached_mask & (query == 0))


@gluon.jit(do_not_specialize=["M", "T", "P", "first"])
def _ring_qkv_kernel(
    w_desc, x_desc, gain_desc, bias_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, lengths_ptr, table_ptr, q_ptr, k_ptr, v_ptr,
    partial_ptr, squares_ptr, counter_ptr, M, T, P, eps, qk_eps, page_size, first,
    HQ: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr,
    K: gl.constexpr, SPLIT: gl.constexpr, CHUNK: gl.constexpr, S: gl.constexpr, MP: gl.constexpr,
    X_SCALE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """PER heads of queries, keys or values. qk-norm only where PER is 1."""
    pdl_trigger(PDL)
    NORM: gl.constexpr = gain_desc is not None
    CHUNKS: gl.constexpr = K // SPLIT // CHUNK
    Y: gl.constexpr = box_layout(64, MP, 4)
    H: gl.constexpr = D // 2
    PER: gl.constexpr = 64 // H
    gl.static_assert(q_norm_ptr is None or PER == 1)
    tile, part = gl.program_id(0) // SPLIT, gl.program_id(0) % SPLIT
    k0 = part * (CHUNKS * CHUNK)
    ring = _begin(w_desc, x_desc, gain_desc, tile * PER, k0, first, S, PDL)
    i, m = gl.arange(0, 64, gl.SliceLayout(1, Y)), gl.arange(0, MP, gl.SliceLayout(0, Y))
    head, pair = tile * PER + i // H, i % H
    position, page = token_positions(lengths_ptr, table_ptr, m, M, T, P, page_size)
    if SPLIT == 1:
        of_heads = load_of_heads(bias_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, head, pair, position, HQ, H)
    sums, squares = _multiply(ring, w_desc, x_desc, gain_desc, tile * PER, k0, CHUNKS, S, X_SCALE)
    if SPLIT == 1:
        own = _own(sums, squares, eps, NORM, K, X_SCALE, MP)
        qkv_epilogue(own, of_heads, qk_eps, position, page, q_ptr, k_ptr, v_ptr, tile, head, pair, m, M, page_size, HQ, HKV, H)
    elif _arrive(sums, squares, partial_ptr, squares_ptr, counter_ptr, tile, part, NORM, SPLIT, MP):
        late = load_of_heads(bias_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, head, pair, position, HQ, H)
        merged = _merge(ring, partial_ptr, squares_ptr, tile, eps, NORM, K, CHUNKS, S, SPLIT, MP, X_SCALE)
        qkv_epilogue(merged, late, qk_eps, position, page, q_ptr, k_ptr, v_ptr, tile, head, pair, m, M, page_size, HQ, HKV, H)


# ---------------------------------------------------------------- the launch


def described(t: torch.Tensor, shape: list[int], strides: list[int], box: list[int], swizzled: bool = True) -> TensorDescriptor:
    """A TMA descriptor of t's memory as a tensor of this shape, moved a box at a time, the rows of which may be swizzled."""
    swizzle = min(128, t.element_size() * box[-1]) if swizzled and len(box) > 1 else 0
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=8 * t.element_size(), rank=len(box))
    return TensorDescriptor(t, shape, strides, box, layout)


def _launch(kernel, x: torch.Tensor, w: Operand, norm, boxes: tuple[int, int, int], tile: Tile, *pointers, **arguments) -> None:
    """A kernel on x [M, K], W [N, K] and the norm's gain [K] or None, all contiguous and 16-bit: tile.chunk columns a stage,
    tile.stages of them, tile.split programs a tile. boxes: W's rows between the two boxes, between groups, and in a group."""
    (M, K), N, chunk, split = x.shape, w.rows, tile.chunk, tile.split
    apart, pitch, H = boxes
    if N % RING_ROWS or K % (split * chunk):
        raise ValueError(f"weight: found {N} x {K}, expected tiles of {RING_ROWS} rows and {split} times {chunk} columns")
    MP, tiles = ring_padded(M), N // RING_ROWS
    kernel[(tiles * split,)](
        described(w.weight, [2, N // (2 * H), H, K], [apart * K, pitch * K, K, 1], [2, 64 // H, H, chunk]),
        described(x, [M, K], [K, 1], [MP, chunk]),
        None if norm is None else described(norm, [K], [1], [chunk]),
        *pointers,
        M=M,
        first=min(tile.stages, K // split // chunk),
        K=K,
        SPLIT=split,
        CHUNK=chunk,
        S=tile.stages,
        MP=MP,
        X_SCALE=x_scale(x.dtype),
        num_warps=tile.warps,
        **arguments,
        **scratch(x, tiles * split, tile, MP, tiles),
        **launch_options(x),
    )


def launch_ring(x: torch.Tensor, w: Operand, norm, eps: float, silu_mul: bool, residual, y: torch.Tensor, tile: Tile) -> None:
    """Fills y [M, F] with act(rmsnorm(x) @ W.T) + residual: x [M, K], W [N, K], norm [K] or None, residual [M, F] or None."""
    boxes = (w.rows // 2, 64, 64) if silu_mul else (64, 128, 64)
    _launch(_ring_linear_kernel, x, w, norm, boxes, tile, residual, y, F=y.shape[1], eps=eps, SILU_MUL=silu_mul)


def tma_reads(*tensors: torch.Tensor | None) -> bool:
    """Whether descriptors can be made of these: their addresses are multiples of 16 bytes."""
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def ring_serves_qkv(head_dim: int, qk_norm: bool) -> bool:
    """Whether qkv's epilogue here can do what a call asks for: one head a tile or two, and qk-norm, which adds up all of a
    tile, only of one."""
    return head_dim == 128 or (head_dim == 64 and not qk_norm)


def launch_ring_qkv(
    x: torch.Tensor, w: Operand, bias, norm, eps: float, q_norm, k_norm, qk_eps: float, cos, sin, lengths, table,
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, page_size: int, num_kv_heads: int, tile: Tile,
) -> None:  # fmt: skip
    """Fills q [M, Hq, D] and appends to the caches: arguments as `qkv_rope_append` has them, where ring_serves_qkv."""
    _, Hq, D = q.shape
    _launch(
        _ring_qkv_kernel, x, w, norm, (D // 2, D, D // 2), tile,
        bias, q_norm, k_norm, cos, sin, lengths, table, q, k_cache, v_cache,
        T=x.shape[0] // lengths.numel(), P=table.shape[1], eps=eps, qk_eps=qk_eps, page_size=page_size,
        HQ=Hq, HKV=num_kv_heads, D=D,
    )  # fmt: skip
