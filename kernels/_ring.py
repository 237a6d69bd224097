# ruff: noqa: RUF005 (Triton knows no star in a tuple)
"""Linears of 2 to 64 rows on Hopper: weights stream by TMA through a ring of shared memory, and wgmma multiplies from there.

Owns the kernel that `linear` launches for a tile with `ring` (tiles.py), written in Gluon, and its launch. Does not know the
model. Needs a GPU of compute capability 9.0: there is no interpreter for it, so tests compile it anywhere and run it on a card.
Letters: M rows of x, MP padded (wgmma's N: 8 for up to 8 rows), K input features, N weight rows, F output features, S stages.

A program owns two boxes of 64 weight rows (gate and up of the same 64 features, or 128 neighbouring rows) and K / SPLIT
columns. A stage of its ring holds both boxes, x and the norm's gain for CHUNK columns. Weights and gain, which no kernel
writes, are asked for before the dependency wait, x after it: up to 150 KB are on their way while the kernel before ends.
Both boxes are one TMA load: W is described as [2, N / 2, K] for SiLU x up, else as [N / 64, 64, K].
Loops over stages are not unrolled: their code would be 6 KB that every program fetches before its first load. Barriers, expects
and loads stand in an order to which Triton need not add barriers of its own.
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

from kernels._common import launch_options, pdl_trigger, pdl_wait, zeroed_workspace
from kernels._matmul import MAX_GROUPS, Operand, x_scale
from kernels.tiles import RING_ROWS, Tile, ring_padded

# ---------------------------------------------------------------- the kernel


@gluon.jit
def _expect_weights(w_desc, gain_desc, bar, pred):
    if gain_desc is not None:
        mbarrier.expect(bar, w_desc.block_type.nbytes + gain_desc.block_type.nbytes, pred=pred)
    else:
        mbarrier.expect(bar, w_desc.block_type.nbytes, pred=pred)


@gluon.jit
def _load_weights(w_desc, gain_desc, w_smem, gain_smem, bar, slot, box, k, pred):
    """Both boxes of W, and the gain, at column k into a stage."""
    tma.async_copy_global_to_shared(w_desc, [box[0], box[1], k], bar, w_smem.index(slot), pred=pred)
    if gain_desc is not None:
        tma.async_copy_global_to_shared(gain_desc, [k], bar, gain_smem.index(slot), pred=pred)


@gluon.jit
def _halves(sums, MP: gl.constexpr, LAYOUT: gl.constexpr):
    """The sums [64, MP] of the two boxes, of a program's [128, MP] in LAYOUT: in the same thread, nothing moves."""
    a, b = gl.split(gl.permute(gl.reshape(sums, [2, 64, MP]), (1, 2, 0)))
    return gl.convert_layout(a, LAYOUT, assert_trivial=True), gl.convert_layout(b, LAYOUT, assert_trivial=True)


@gluon.jit
def _outputs(f0, F, M, MP: gl.constexpr, LAYOUT: gl.constexpr):
    """Of 64 outputs' [64, MP] that begin at f0: offsets into y [M, F], and which are there."""
    f = f0 + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))[:, None]
    m = gl.arange(0, MP, gl.SliceLayout(0, LAYOUT))[None, :]
    return m * F + f, m < M


@gluon.jit
def _load_residual(residual_ptr, f0, F, M, MP: gl.constexpr, LAYOUT: gl.constexpr):
    if residual_ptr is not None:
        offset, there = _outputs(f0, F, M, MP, LAYOUT)
        residual = gl.load(residual_ptr + offset, mask=there, other=0.0)
    else:
        residual = None
    return residual


@gluon.jit
def _store(y, residual, y_ptr, f0, F, M, MP: gl.constexpr, LAYOUT: gl.constexpr):
    if residual is not None:
        y += residual.to(gl.float32)
    offset, there = _outputs(f0, F, M, MP, LAYOUT)
    gl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=there)


@gluon.jit
def _epilogue(a, b, residual_a, residual_b, y_ptr, f0, F, M, SILU_MUL: gl.constexpr, MP: gl.constexpr, LAYOUT: gl.constexpr):
    """Activation, residual, store."""
    if SILU_MUL:
        _store(a / (1.0 + gl.exp(-a)) * b, residual_a, y_ptr, f0, F, M, MP, LAYOUT)
    else:
        _store(a, residual_a, y_ptr, f0, F, M, MP, LAYOUT)
        _store(b, residual_b, y_ptr, f0 + 64, F, M, MP, LAYOUT)


@gluon.jit
def _arrive(sums, partial_ptr, counter_ptr, tile, part, SPLIT: gl.constexpr, MP: gl.constexpr, MMA: gl.constexpr):
    """Stores this program's sums as [m, row]; True in the program that arrives last, which also resets the counter."""
    r = gl.arange(0, 128, gl.SliceLayout(1, MMA))[:, None]
    m = gl.arange(0, MP, gl.SliceLayout(0, MMA))[None, :]
    gl.store(partial_ptr + (tile * SPLIT + part) * (128 * MP) + m * 128 + r, sums)
    tl.debug_barrier()  # every thread's part is stored before one thread's release
    last = gl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") == SPLIT - 1
    if last:
        gl.store(counter_ptr + tile, 0)
    return last


@gluon.jit
def _load_parts(partial_ptr, tile, box: gl.constexpr, SPLIT: gl.constexpr, MP: gl.constexpr, LAYOUT: gl.constexpr):
    """The SPLIT parts of a box's sums [64, MP]."""
    r = box * 64 + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))[:, None]
    m = gl.arange(0, MP, gl.SliceLayout(0, LAYOUT))[None, :]
    parts = ()
    for s in gl.static_range(SPLIT):  # other multiprocessors wrote these: never from L1
        address = partial_ptr + (tile * SPLIT + s) * (128 * MP) + m * 128 + r
        parts = parts + (gl.load(address, cache_modifier=".cg"),)
    return parts


@gluon.jit
def _add(parts):
    """In a fixed order."""
    total = parts[0]
    for s in gl.static_range(1, len(parts)):
        total += parts[s]
    return total


@gluon.jit
def _merge(partial_ptr, tile, bar, phase: gl.constexpr, SPLIT: gl.constexpr, MP: gl.constexpr, LAYOUT: gl.constexpr):
    """A tile's sums, [64, MP] of each box. `phase` of `bar` is over.

    ptxas, to save registers, would load a few parts, add them, and load the next ones, a trip to L2 each time. It moves
    nothing over a loop, though, and a wait is one: what stands before it is in flight at once, where there are registers.
    """
    parts_a = _load_parts(partial_ptr, tile, 0, SPLIT, MP, LAYOUT)
    parts_b = _load_parts(partial_ptr, tile, 1, SPLIT, MP, LAYOUT)
    if MP * SPLIT <= 128:
        mbarrier.wait(bar, phase)
    return _add(parts_a), _add(parts_b)


@gluon.jit(do_not_specialize=["M", "first"])
def _ring_kernel(
    w_desc, x_desc, gain_desc, residual_ptr, y_ptr, partial_ptr, counter_ptr, M, F, eps, first,
    K: gl.constexpr, SILU_MUL: gl.constexpr, SPLIT: gl.constexpr, CHUNK: gl.constexpr, S: gl.constexpr, MP: gl.constexpr,
    X_SCALE: gl.constexpr, PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """y[m, tile] = act(rmsnorm(x[m]) @ W[tile].T) + residual. A norm only where SPLIT is 1.

    first: stages that are filled before the loop; not a constant, for LLVM would unroll the loops over it.
    """
    gl.static_assert(gain_desc is None or SPLIT == 1)
    DTYPE: gl.constexpr = w_desc.dtype
    CHUNKS: gl.constexpr = K // SPLIT // CHUNK
    ACROSS: gl.constexpr = 8 if MP >= 16 else 16  # lanes along the longer side of what a warp holds
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, MP, 16])
    X: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [num_warps, 1], [1, 0])  # of x: 16 bytes a thread
    Y: gl.constexpr = gl.BlockedLayout([64 // ACROSS, 1], [ACROSS, 32 // ACROSS], [1, num_warps], [0, 1])  # of outputs

    pdl_trigger(PDL)
    tile, part = gl.program_id(0) // SPLIT, gl.program_id(0) % SPLIT
    k0 = part * (CHUNKS * CHUNK)
    if SILU_MUL:
        f0 = 64 * tile
        box = (0, f0)
    else:
        f0 = 128 * tile
        box = (2 * tile, 0)

    w_smem = gl.allocate_shared_memory(DTYPE, [S, 2, 64, CHUNK], w_desc.layout)
    x_smem = gl.allocate_shared_memory(DTYPE, [S, MP, CHUNK], x_desc.layout)
    w_bars = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    x_bars = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    scaled_smem = None
    gain_smem = None
    if gain_desc is not None:
        scaled_smem = gl.allocate_shared_memory(DTYPE, [2, MP, CHUNK], x_desc.layout)
        gain_smem = gl.allocate_shared_memory(DTYPE, [S, CHUNK], gain_desc.layout)

    for i in range(first):  # a stage after the other, so that the first load is out at once
        w_bar, x_bar = w_bars.index(i), x_bars.index(i)
        mbarrier.init(w_bar, count=1)
        mbarrier.init(x_bar, count=1)
        fence_async_shared()
        _expect_weights(w_desc, gain_desc, w_bar, True)
        mbarrier.expect(x_bar, x_desc.block_type.nbytes)
        tl.debug_barrier()
        _load_weights(w_desc, gain_desc, w_smem, gain_smem, w_bar, i, box, k0 + i * CHUNK, True)
    pdl_wait(PDL)
    for i in range(first):
        tma.async_copy_global_to_shared(x_desc, [0, k0 + i * CHUNK], x_bars.index(i), x_smem.index(i))
    residual_a = None
    residual_b = None
    if SPLIT == 1:  # behind x, and there long before the sums are
        residual_a = _load_residual(residual_ptr, f0, F, M, MP, Y)
        if not SILU_MUL:
            residual_b = _load_residual(residual_ptr, f0 + 64, F, M, MP, Y)

    sums = gl.zeros([128, MP], gl.float32, MMA)
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
            operand.store((x * (gain * X_SCALE)[None, :]).to(DTYPE))
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
        _load_weights(w_desc, gain_desc, w_smem, gain_smem, w_bar, free, box, k, more)
        tma.async_copy_global_to_shared(x_desc, [0, k], x_bar, x_smem.index(free), pred=more)
        wraps = slot == S - 1
        phase = gl.where(wraps, phase ^ 1, phase)
        slot = gl.where(wraps, 0, slot + 1)
    sums = warpgroup_mma_wait(0, deps=(sums,))
    tl.debug_barrier()  # the compiler's own shared memory lies in the ring: not before every warp has multiplied

    if SPLIT == 1:
        a, b = _halves(gl.convert_layout(sums, Y), MP, Y)
        if gain_desc is not None:
            mean = gl.convert_layout(gl.sum(squares, 1), gl.SliceLayout(0, Y)) * (1.0 / K)
            factor = (gl.rsqrt(mean + eps) / X_SCALE)[None, :]
            a *= factor
            b *= factor
        _epilogue(a, b, residual_a, residual_b, y_ptr, f0, F, M, SILU_MUL, MP, Y)
    elif _arrive(sums, partial_ptr, counter_ptr, tile, part, SPLIT, MP, MMA):
        late_a = _load_residual(residual_ptr, f0, F, M, MP, Y)
        late_b = None
        if not SILU_MUL:
            late_b = _load_residual(residual_ptr, f0 + 64, F, M, MP, Y)
        FILLS: gl.constexpr = (CHUNKS + S - 1) // S  # of the first stage
        a, b = _merge(partial_ptr, tile, x_bars.index(0), (FILLS - 1) & 1, SPLIT, MP, Y)
        _epilogue(a, b, late_a, late_b, y_ptr, f0, F, M, SILU_MUL, MP, Y)


# ---------------------------------------------------------------- the launch


def _described(t: torch.Tensor, shape: list[int], box: list[int]) -> TensorDescriptor:
    """A TMA descriptor of contiguous memory as a tensor of this shape, read a box at a time."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    swizzle = 128 if len(shape) > 1 else 0
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=16, rank=len(shape))
    return TensorDescriptor(t, shape, strides, box, layout)


def launch_ring(x: torch.Tensor, w: Operand, norm, eps: float, silu_mul: bool, residual, y: torch.Tensor, tile: Tile) -> None:
    """Fills y [M, F] with act(rmsnorm(x) @ W.T) + residual: x [M, K] and W [N, K] contiguous, 16-bit, norm [K] or None,
    residual [M, F] or None. tile.chunk columns a stage, tile.stages of them, tile.split programs a tile."""
    (M, K), N, chunk, split = x.shape, w.rows, tile.chunk, tile.split
    if N % RING_ROWS or K % (split * chunk) or (norm is not None and split > 1):
        raise ValueError(f"weight: found {N} x {K}, expected tiles of {RING_ROWS} rows and {split} times {chunk} columns")
    MP, programs = ring_padded(M), N // RING_ROWS * split
    boxes = [2, N // 2, K] if silu_mul else [N // 64, 64, K]
    partial = counter = None
    if split > 1:
        partial = torch.empty(programs * RING_ROWS * MP, dtype=torch.float32, device=x.device)
        counter = zeroed_workspace(x.device, "counters of split matmuls", MAX_GROUPS)
    _ring_kernel[(programs,)](
        _described(w.weight, boxes, [2, 64, chunk]),
        _described(x, [M, K], [MP, chunk]),
        None if norm is None else _described(norm, [K], [chunk]),
        residual,
        y,
        partial,
        counter,
        M,
        y.shape[1],
        eps,
        min(tile.stages, K // split // chunk),
        K=K,
        SILU_MUL=silu_mul,
        SPLIT=split,
        CHUNK=chunk,
        S=tile.stages,
        MP=MP,
        X_SCALE=x_scale(x.dtype),
        num_warps=4,
        **launch_options(x),
    )
