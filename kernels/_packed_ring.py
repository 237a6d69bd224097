# ruff: noqa: RUF005 (Triton knows no star in a tuple)
"""Linears of 2 to 64 rows on packed weights, on Hopper: a ring as in _ring.py, and wgmma with its first operand in registers.

Owns the kernels that `linear`, `linear_folding`, `qkv_rope_append` and `head` launch for packed weights with a ring tile
(tiles.py), written in Gluon, and their launch. Does not know the model. Needs a GPU of compute capability 9.0: there is no
interpreter for it, so tests compile it anywhere and run it on a card.
Letters as in _ring.py and _packed.py, and: ROWS weight rows of a program (16 for each of its W warps), in two boxes of HALF, of
the head in one; UC units of columns that are multiplied at once, SUB such products of a stage; V = N.

Codes come by TMA as they lie. A thread reads back its own 16 bytes of a half block (512 neighbouring bytes a warp), and they
are what wgmma wants of its first operand from that thread, but for an order of columns: thread t of a row's four has columns
8 t to 8 t + 7 of each 32, wgmma asks for 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of each 16. So it is x whose columns are permuted,
within each 32 (`_common.permuted`), and whoever writes x does that: nothing moves here between shared memory and the products.
Widened in order, codes would do with x as it is; but the kernels of one row would then load x four bytes at a time, which
took 6% of a step (LOG.md).

No warp waits for all others: each waits for a stage's bytes by itself, and arrives at a barrier when it has left the stage. One
thread waits for that and fills the stage again, while a product is under way. All this is PTX (_hopper.py).

While a product of 8-bit codes is under way this program widens nothing: where two share a multiprocessor, the other one does.
int4's products are a group's each, of quarters of codes (_packed.py), and their sums take its scale in float32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels._candidates import PARTIALS, load_draws, store_candidates, store_logits, with_noise
from kernels._common import arrives_last, best_of, launch_options, pdl_trigger, pdl_wait, permuted
from kernels._hopper import (
    LINE,
    arrive_expecting,
    arrive_warp,
    copy_box,
    fence_barriers,
    first_address,
    init_barrier,
    lane_number,
    mark_shared,
    not_unrolled,
    one_thread,
    wait_phase,
    warp_number,
)
from kernels._matmul import FoldedNorm, Operand, rms_factor, scratch, token_positions, x_scale
from kernels._packed import (
    FP8_BF16,
    FP8_FP16,
    INT4_QUARTERS_BF16,
    INT4_QUARTERS_FP16,
    INT8_BF16,
    INT8_FP16,
    OTHER_ZEROS_BF16,
    OTHER_ZEROS_FP16,
)
from kernels._random import gumbel_quads
from kernels._ring import (
    add_parts,
    box_layout,
    boxes,
    described,
    load_boxes,
    load_of_heads,
    qkv_epilogue,
    store_part,
    sums_layout,
)
from kernels.formats import UNIT_COLUMNS
from kernels.tiles import Tile, ring_padded

# ---------------------------------------------------------------- codes to floats


@gluon.constexpr_function
def _half_blocks(PER, HB, W):
    """Half block i of boxes [PER, HB]: its bits as coordinates; which of them are a thread's registers', and which a warp's."""
    bits = [[i // (PER * HB), i // HB % PER, i % HB, 0] for i in (1 << j for j in range(W.bit_length()))]  # 2 W half blocks
    warps = 1 + W.bit_length() - 1
    return [bits[0]] + bits[warps:], bits[1:warps]


@gluon.constexpr_function
def _words_layout(BOXES, PER, HB, UC, W):
    """Of a stage's codes [BOXES, PER, HB, UC * 128]: 16 bytes a thread, as they lie in wgmma's first operand."""
    mine, warps = _half_blocks(PER, HB, W)
    units = [[0, 0, 0, 128 << i] for i in range(UC.bit_length() - 1)]
    lanes = [[0, 0, 0, 4 << i] for i in range(5)]
    return gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [0, 0, 0, 2], mine[0]] + units + mine[1:], lanes, warps, [], [BOXES, PER, HB, UC * 128]
    )


@gluon.constexpr_function
def _groups_layout(BOXES, PER, HB, W):
    """Of int4's scales or zeros [BOXES, PER, HB, 8], a group's: where the codes of their rows are."""
    mine, warps = _half_blocks(PER, HB, W)
    lanes = [[0, 0, 0, 0], [0, 0, 0, 0]] + [[0, 0, 0, 1 << i] for i in range(3)]
    return gl.DistributedLinearLayout(mine, lanes, warps, [], [BOXES, PER, HB, 8])


@gluon.jit
def _halves(pair, DTYPE: gl.constexpr):
    """The two 16-bit floats of each 32-bit word, as a last dimension."""
    low = pair.to(gl.int16).to(DTYPE, bitcast=True)
    return gl.join(low, (pair >> 16).to(gl.int16).to(DTYPE, bitcast=True))


@gluon.jit
def _quarter_zeros(zeros, words, BF16: gl.constexpr):
    """Of int4's zeros [BOXES, PER, HB, 8], or 8 where there are None, what _packed.py adds to quarters of words' codes."""
    W: gl.constexpr = gl.num_warps()
    P: gl.constexpr = words.type.layout
    if zeros is None:
        eight: gl.constexpr = (0xC208 if BF16 else 0xDC08) * 0x10001 - (1 << 32)
        other_eight: gl.constexpr = (0xC000 if BF16 else 0xCC80) * 0x10001 - (1 << 32)
        z, other = gl.full(words.shape, eight, gl.int32, P), gl.full(words.shape, other_eight, gl.int32, P)
    else:
        z3 = gl.reshape(zeros.to(gl.int32), [W, 2, 8])
        z3 = gl.convert_layout(z3, gl.SliceLayout(2, gl.SliceLayout(4, gl.SliceLayout(5, P))), assert_trivial=True)
        z3 = (z3 | (0xC200 if BF16 else 0xDC00)) * 0x10001
        asm: gl.constexpr = OTHER_ZEROS_BF16 if BF16 else OTHER_ZEROS_FP16
        other3 = gl.inline_asm_elementwise(asm, "=r,r", [z3], dtype=gl.int32, is_pure=True, pack=1)
        z, other = z3[:, :, None, :, None, None], other3[:, :, None, :, None, None]
    return z, other


@gluon.jit
def _operand(words, zeros, FORMAT: gl.constexpr, UC: gl.constexpr, MP: gl.constexpr, DTYPE: gl.constexpr):
    """Codes as wgmma's first operand [ROWS, UC units], int4's divided by 4: words [BOXES, PER, HB, UC * 128]; int4's zeros or
    None."""
    W: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = 16 * W
    A: gl.constexpr = gl.DotOperandLayout(0, sums_layout(MP, W), 2)
    BF16: gl.constexpr = gl.bfloat16 == DTYPE
    if FORMAT == "int4":
        w = gl.reshape(words, [W, 2, UC, 8, 4, 4])  # block h u g t s
        z, other = _quarter_zeros(zeros, w, BF16)
        asm: gl.constexpr = INT4_QUARTERS_BF16 if BF16 else INT4_QUARTERS_FP16
        w, z = gl.broadcast(w, z)
        w, other = gl.broadcast(w, other)
        p = gl.inline_asm_elementwise(
            asm, "=&r,=&r,=&r,=&r,r,r,r", [w, z, other], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1
        )
        first = gl.join(_halves(p[0], DTYPE), _halves(p[1], DTYPE))
        both = gl.join(first, gl.join(_halves(p[2], DTYPE), _halves(p[3], DTYPE)))  # block h u g t s kl b kh
        out = gl.reshape(gl.permute(both, (0, 1, 3, 2, 5, 8, 7, 4, 6)), [ROWS, UC * 128])
    else:
        w = gl.reshape(words, [W, 2, UC, 8, 4, 2, 2])  # block h u g t s kh
        if FORMAT == "int8":
            asm: gl.constexpr = INT8_BF16 if BF16 else INT8_FP16
        else:
            asm: gl.constexpr = FP8_BF16 if BF16 else FP8_FP16
        p = gl.inline_asm_elementwise(asm, "=&r,=&r,r", [w], dtype=(gl.int32, gl.int32), is_pure=True, pack=1)
        both = gl.join(_halves(p[0], DTYPE), _halves(p[1], DTYPE))  # block h u g t s kh kl b
        out = gl.reshape(gl.permute(both, (0, 1, 3, 2, 5, 6, 8, 4, 7)), [ROWS, UC * 64])
    return gl.convert_layout(out, A, assert_trivial=True)


# ---------------------------------------------------------------- the ring


W_PARAMETER, X_PARAMETER, SCALE_PARAMETER, ZERO_PARAMETER = (gl.constexpr(i) for i in (0, 9, 14, 23))  # of PTX: _hopper.py
BAR_BYTES = gl.constexpr(32)  # of a stage's barriers: weights are there, x is there, every warp has left; and a gap


@gluon.constexpr_function
def _nbytes(desc):
    return 0 if desc is None else desc.block_type.nbytes


@gluon.jit
def _load_weights(
    ring, w_desc, scale_desc, zero_desc, slot, group, unit, S: gl.constexpr, SUB: gl.constexpr, KERNEL: gl.constexpr
):  # fmt: skip
    """A tile's boxes of W from `unit` on into a stage, and int4's scales and zeros. By one thread."""
    UC: gl.constexpr = w_desc.block_type.shape[3] // 128
    W_BYTES: gl.constexpr = _nbytes(w_desc)
    SCALE_BYTES: gl.constexpr = _nbytes(scale_desc)
    ZERO_BYTES: gl.constexpr = _nbytes(zero_desc)
    w_at, groups_at, bar = ring[4], ring[6], ring[7] + slot * BAR_BYTES
    arrive_expecting(bar, SUB * (W_BYTES + SCALE_BYTES + ZERO_BYTES))
    for u in gl.static_range(SUB):
        at = slot * SUB + u
        copy_box(KERNEL, W_PARAMETER, w_at + at * W_BYTES, bar, ((unit + u * UC) * 128, 0, group, 0))
        if scale_desc is not None:
            copy_box(KERNEL, SCALE_PARAMETER, groups_at + at * SCALE_BYTES, bar, ((unit + u) * 8, 0, group, 0))
        if zero_desc is not None:
            zero_at = groups_at + S * SUB * SCALE_BYTES + at * ZERO_BYTES
            copy_box(KERNEL, ZERO_PARAMETER, zero_at, bar, ((unit + u) * 8, 0, group, 0))


@gluon.jit
def _load_x(ring, x_desc, slot, k, SUB: gl.constexpr, KERNEL: gl.constexpr):
    """x from column k on into a stage, 64 columns a box. By one thread."""
    MP: gl.constexpr = x_desc.block_type.shape[0]
    BOXES: gl.constexpr = SUB * x_desc.block_type.shape[1] // 64
    bar = ring[7] + slot * BAR_BYTES + 8
    for i in gl.static_range(BOXES):
        copy_box(KERNEL, X_PARAMETER, ring[5] + (slot * BOXES + i) * (128 * MP), bar, (k + 64 * i, 0))


@gluon.jit
def _begin(
    w_desc, x_desc, scale_desc, zero_desc, group, unit0, first,
    S: gl.constexpr, SUB: gl.constexpr, PDL: gl.constexpr, KERNEL: gl.constexpr,
):  # fmt: skip
    """A ring whose first stages are on their way: weights, and behind the dependency wait x. group: of W's, the first.

    first: stages that are filled; not a constant, for LLVM would unroll the loops over it.
    """
    W: gl.constexpr = gl.num_warps()
    MP: gl.constexpr = x_desc.block_type.shape[0]
    COLUMNS: gl.constexpr = x_desc.block_type.shape[1]
    BOXES: gl.constexpr = w_desc.block_type.shape[0]
    PER: gl.constexpr = w_desc.block_type.shape[1]
    HB: gl.constexpr = w_desc.block_type.shape[2]
    UC: gl.constexpr = w_desc.block_type.shape[3] // 128
    SCALES: gl.constexpr = S * SUB * _nbytes(scale_desc)
    OTHERS: gl.constexpr = SCALES + S * SUB * _nbytes(zero_desc)
    gl.static_assert(
        x_desc.layout.swizzle_byte_width == 128 and _nbytes(scale_desc) % 128 == 0 and _nbytes(zero_desc) % 128 == 0
    )
    w_lines = gl.allocate_shared_memory(gl.int32, [S * SUB * _nbytes(w_desc) // 128, 32], LINE)
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [S * SUB, MP, COLUMNS], x_desc.layout)
    lines = gl.allocate_shared_memory(gl.int32, [OTHERS // 128 + (S * BAR_BYTES + 127) // 128, 32], LINE)
    w_smem = w_lines._reinterpret(w_desc.dtype, [S * SUB, BOXES, PER, HB, UC * 128], w_desc.layout)
    scale_smem, zero_smem = w_smem, w_smem  # where there are none: a tuple takes no None
    if scale_desc is not None:
        scale_smem = lines._reinterpret(scale_desc.dtype, [S * SUB, BOXES, PER, HB, 8], scale_desc.layout)
    if zero_desc is not None:  # behind the scales
        ALL: gl.constexpr = OTHERS // _nbytes(zero_desc)
        zero_smem = lines._reinterpret(zero_desc.dtype, [ALL, BOXES, PER, HB, 8], zero_desc.layout)
    mark_shared(W)
    w_at, x_at, groups_at = first_address(w_lines), first_address(x_smem), first_address(lines)
    fence_async_shared()  # copies overwrite marks
    tl.debug_barrier()
    bars_at = groups_at + OTHERS
    ring = (w_smem, x_smem, scale_smem, zero_smem, w_at, x_at, groups_at, bars_at, w_lines, lines)
    if one_thread(warp_number() == 0):
        for i in gl.static_range(S):
            init_barrier(bars_at + i * BAR_BYTES, 1)
            init_barrier(bars_at + i * BAR_BYTES + 8, 1)
            init_barrier(bars_at + i * BAR_BYTES + 16, W)
        fence_barriers()
        for i in range(first):
            not_unrolled()
            _load_weights(ring, w_desc, scale_desc, zero_desc, i, group, unit0 + i * (SUB * UC), S, SUB, KERNEL)
    tl.debug_barrier()  # barriers are there
    pdl_wait(PDL)
    if one_thread(warp_number() == 0):
        for i in range(first):
            not_unrolled()
            arrive_expecting(bars_at + i * BAR_BYTES + 8, SUB * _nbytes(x_desc))
            _load_x(ring, x_desc, i, unit0 // UC * COLUMNS + i * (SUB * COLUMNS), SUB, KERNEL)
    return ring


@gluon.jit
def _multiply(
    ring, w_desc, x_desc, scale_desc, zero_desc, group, unit0,
    FORMAT: gl.constexpr, CHUNKS: gl.constexpr, S: gl.constexpr, SUB: gl.constexpr, KERNEL: gl.constexpr,
):  # fmt: skip
    """Of a program's CHUNKS stages the sums [ROWS, MP]: of int4 scaled, of 8-bit codes yet without their rows' scales.

    No warp waits for all others: each waits for the stage that it reads, and says when it has left it; one thread, which fills
    a stage again, waits for that, when it has set off the product behind it.
    """
    w_smem, x_smem, scale_smem, zero_smem, bars_at = ring[0], ring[1], ring[2], ring[3], ring[7]
    W: gl.constexpr = gl.num_warps()
    MP: gl.constexpr = x_desc.block_type.shape[0]
    COLUMNS: gl.constexpr = x_desc.block_type.shape[1]
    BOXES: gl.constexpr = w_desc.block_type.shape[0]
    PER: gl.constexpr = w_desc.block_type.shape[1]
    HB: gl.constexpr = w_desc.block_type.shape[2]
    UC: gl.constexpr = w_desc.block_type.shape[3] // 128
    MMA: gl.constexpr = sums_layout(MP, W)
    WORDS: gl.constexpr = _words_layout(BOXES, PER, HB, UC, W)
    GROUPS: gl.constexpr = _groups_layout(BOXES, PER, HB, W)
    BY_GROUPS: gl.constexpr = scale_desc is not None
    lane = lane_number()
    warp = warp_number()
    sums = gl.zeros([16 * W, MP], gl.float32, MMA)
    slot = 0
    phase = 0
    for c in range(CHUNKS):
        bar = bars_at + slot * BAR_BYTES
        wait_phase(bar, phase)
        part_before, scale_before = sums, sums  # not carried from stage to stage: ptxas would multiply one k16 at a time
        for u in gl.static_range(SUB):
            at = slot * SUB + u
            zeros = None
            if zero_desc is not None:
                zeros = zero_smem.index(S * SUB * _nbytes(scale_desc) // _nbytes(zero_desc) + at).load(GROUPS)
            w = _operand(w_smem.index(at).load(WORDS), zeros, FORMAT, UC, MP, x_desc.dtype)
            if BY_GROUPS:
                scale = gl.reshape(scale_smem.index(at).load(GROUPS), [16 * W])
                scale = gl.convert_layout(scale, gl.SliceLayout(1, MMA), assert_trivial=True).to(gl.float32)
            if u == 0:
                wait_phase(bar + 8, phase)
            operand = x_smem.index(at).permute((1, 0))
            if BY_GROUPS:
                nothing = gl.zeros([16 * W, MP], gl.float32, MMA)
                part = warpgroup_mma(w, operand, nothing, use_acc=False, is_async=True)
                if u > 0:  # the product before this one
                    done = warpgroup_mma_wait(1, deps=(part_before,))
                    sums += done * scale_before[:, None]
                part_before, scale_before = part, scale
            else:
                sums = warpgroup_mma(w, operand, sums, is_async=True)
        if one_thread((warp == 0) & (c >= 1) & (c <= CHUNKS - S)):  # chunk c - 1's stage is for chunk c - 1 + S
            free = gl.where(slot == 0, S - 1, slot - 1)
            wait_phase(bars_at + free * BAR_BYTES + 16, gl.where(slot == 0, phase ^ 1, phase))
            unit = unit0 + (c + S - 1) * (SUB * UC)
            _load_weights(ring, w_desc, scale_desc, zero_desc, free, group, unit, S, SUB, KERNEL)
            arrive_expecting(bars_at + free * BAR_BYTES + 8, SUB * _nbytes(x_desc))
            _load_x(ring, x_desc, free, unit // UC * COLUMNS, SUB, KERNEL)
        if BY_GROUPS:
            done = warpgroup_mma_wait(0, deps=(part_before,))
            sums += done * scale_before[:, None]
        else:  # the next codes are to be widened into the registers that this product reads
            sums = warpgroup_mma_wait(0, deps=(sums,))
        arrive_warp(bar + 16, lane, c < CHUNKS - S)
        wraps = slot == S - 1
        phase = gl.where(wraps, phase ^ 1, phase)
        slot = gl.where(wraps, 0, slot + 1)
    tl.debug_barrier()  # the compiler's own shared memory lies in the ring: not before every warp has multiplied
    ring[8]._keep_alive()  # nor does Triton see that copies write here
    x_smem._keep_alive()
    ring[9]._keep_alive()
    if BY_GROUPS:
        sums *= 4.0  # of quarters: exactly
    return sums


@gluon.jit
def _merge(partial_ptr, tile, SPLIT: gl.constexpr, HALF: gl.constexpr, MP: gl.constexpr):
    """A tile's sums, [HALF, MP] of each box, from what its programs have stored."""
    parts_a, parts_b = load_boxes(partial_ptr, tile, SPLIT, HALF, MP)
    return add_parts(parts_a), add_parts(parts_b)


@gluon.jit
def _load_squares(folded_ptr, M, FOLDED: gl.constexpr, MP: gl.constexpr):
    """The squares of a FoldedNorm; () where there is none."""
    folded = ()
    if FOLDED > 0:
        BLOCKS: gl.constexpr = triton.next_power_of_2(FOLDED)
        L: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [gl.num_warps(), 1], [1, 0])
        m = gl.minimum(gl.arange(0, MP, gl.SliceLayout(1, L)), M - 1)[:, None]
        block = gl.arange(0, BLOCKS, gl.SliceLayout(0, L))[None, :]
        folded = (gl.load(folded_ptr + m * FOLDED + block, mask=block < FOLDED, other=0.0),)
    return folded


@gluon.jit
def _norm_factor(folded, eps, K: gl.constexpr, X_SCALE: gl.constexpr, LAYOUT: gl.constexpr):
    """Of squares that are there, what sums [N, MP] in this layout are to be multiplied by, [1, MP]."""
    factor = rms_factor(gl.sum(folded[0], 1), K, eps) / X_SCALE
    return gl.convert_layout(factor, gl.SliceLayout(0, LAYOUT))[None, :]


@gluon.jit
def _load_factors(scale_ptr, folded_ptr, first, second, M, FOLDED: gl.constexpr, MP: gl.constexpr):
    """The scales of both boxes' rows `first` and `second`, and the squares of a FoldedNorm; () where there are none."""
    scales = ()
    if scale_ptr is not None:
        scales = (gl.load(scale_ptr + first), gl.load(scale_ptr + second))
    return scales, _load_squares(folded_ptr, M, FOLDED, MP)


@gluon.jit
def _scaled(sums, factors, eps, K: gl.constexpr, X_SCALE: gl.constexpr):
    """Both boxes' sums by their rows' scales and the factors of their columns' norm."""
    scales, folded = factors
    a, b = sums
    Y: gl.constexpr = a.type.layout
    if len(scales) > 0:
        a, b = a * scales[0][:, None], b * scales[1][:, None]
    if len(folded) > 0:
        factor = _norm_factor(folded, eps, K, X_SCALE, Y)
        a, b = a * factor, b * factor
    return a, b


# ---------------------------------------------------------------- linear


@gluon.jit
def _load_residuals(residual_ptr, gain_ptr, f, F, M, SILU_MUL: gl.constexpr, HALF: gl.constexpr, MP: gl.constexpr):
    """Of the first box's outputs, and where the second one has its own of those; and the gain of a norm to be folded; () where
    there are none."""
    m = gl.arange(0, MP, gl.SliceLayout(0, box_layout(HALF, MP, gl.num_warps())))[None, :]
    residuals, gains = (), ()
    if residual_ptr is not None:
        offset = m * F + f[:, None]
        residuals = (gl.load(residual_ptr + offset, mask=m < M, other=0.0),)
        if not SILU_MUL:
            residuals = residuals + (gl.load(residual_ptr + offset + HALF, mask=m < M, other=0.0),)
    if gain_ptr is not None:
        gains = (gl.load(gain_ptr + f), gl.load(gain_ptr + f + HALF))
    return residuals, gains


@gluon.jit
def _linear_epilogue(
    sums, loaded, y_ptr, scaled_ptr, sum_ptr, f, F, M,
    SILU_MUL: gl.constexpr, PERMUTE: gl.constexpr, HALF: gl.constexpr, MP: gl.constexpr, X_SCALE: gl.constexpr,
):  # fmt: skip
    """Activation, residual, store; and where there is a gain, what FoldedNorm has of the tile. PERMUTE: the columns of that, or
    else of y, for the packed linear that reads it."""
    residuals, gains = loaded
    DTYPE: gl.constexpr = y_ptr.dtype.element_ty
    m = gl.arange(0, MP, gl.SliceLayout(0, box_layout(HALF, MP, gl.num_warps())))
    there, row = (m < M)[None, :], m[None, :] * F
    outputs, squares = sums, ()
    if SILU_MUL:
        outputs = (sums[0] / (1.0 + gl.exp(-sums[0])) * sums[1],)
    for box in gl.static_range(len(outputs)):
        feature, y = f + HALF * box, outputs[box]
        next_feature = permuted(feature) if PERMUTE else feature
        if len(residuals) > 0:
            y += residuals[box].to(gl.float32)
        y = y.to(DTYPE)
        if len(gains) == 0:
            gl.store(y_ptr + row + next_feature[:, None], y, mask=there)
        else:
            gl.store(y_ptr + row + feature[:, None], y, mask=there)
            wide = y.to(gl.float32)
            scaled = (wide * (gains[box].to(gl.float32) * X_SCALE)[:, None]).to(DTYPE)
            gl.store(scaled_ptr + row + next_feature[:, None], scaled, mask=there)
            squares = squares + (gl.sum(wide * wide, 0),)
    if len(gains) > 0:  # blocks of 64 features
        block = sum_ptr + m * (F // 64) + gl.min(f, 0) // 64
        if HALF == 64:
            gl.store(block, squares[0], mask=m < M)
            gl.store(block + 1, squares[1], mask=m < M)
        else:
            gl.store(block, squares[0] + squares[1], mask=m < M)


@gluon.jit(do_not_specialize=["M", "first"])
def _packed_ring_linear_kernel(
    w_desc, x_desc, scale_desc, zero_desc, scale_ptr, folded_ptr, residual_ptr, y_ptr, gain_ptr, scaled_ptr, sum_ptr,
    partial_ptr, counter_ptr, M, F, eps, first,
    K: gl.constexpr, FORMAT: gl.constexpr, SILU_MUL: gl.constexpr, PERMUTE: gl.constexpr, FOLDED: gl.constexpr,
    SPLIT: gl.constexpr, SUB: gl.constexpr, S: gl.constexpr, MP: gl.constexpr, X_SCALE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """y[m, tile] = act(factor[m] * (x[m] @ W[tile].T)) + residual; with a gain, y's FoldedNorm. x's columns are permuted."""
    KERNEL: gl.constexpr = "_packed_ring_linear_kernel"
    pdl_trigger(PDL)
    HALF: gl.constexpr = 8 * gl.num_warps()
    UC: gl.constexpr = w_desc.block_type.shape[3] // 128
    CHUNKS: gl.constexpr = K // SPLIT // (x_desc.block_type.shape[1] * SUB)
    tile, part = gl.program_id(0) // SPLIT, gl.program_id(0) % SPLIT
    unit0 = part * (CHUNKS * SUB * UC)
    f = tile * (HALF if SILU_MUL else 2 * HALF) + gl.arange(0, HALF, gl.SliceLayout(1, box_layout(HALF, MP, gl.num_warps())))
    second = f + (F if SILU_MUL else HALF)
    ring = _begin(w_desc, x_desc, scale_desc, zero_desc, tile, unit0, first, S, SUB, PDL, KERNEL)
    if SPLIT == 1:  # behind x, and there long before the sums are
        factors = _load_factors(scale_ptr, folded_ptr, f, second, M, FOLDED, MP)
        loaded = _load_residuals(residual_ptr, gain_ptr, f, F, M, SILU_MUL, HALF, MP)
    sums = _multiply(ring, w_desc, x_desc, scale_desc, zero_desc, tile, unit0, FORMAT, CHUNKS, S, SUB, KERNEL)
    if SPLIT == 1:
        scaled = _scaled(boxes(sums), factors, eps, K, X_SCALE)
        _linear_epilogue(scaled, loaded, y_ptr, scaled_ptr, sum_ptr, f, F, M, SILU_MUL, PERMUTE, HALF, MP, X_SCALE)
    else:
        store_part(sums, partial_ptr, tile, part, SPLIT)
        if arrives_last(counter_ptr + tile, SPLIT):
            late_factors = _load_factors(scale_ptr, folded_ptr, f, second, M, FOLDED, MP)
            late = _load_residuals(residual_ptr, gain_ptr, f, F, M, SILU_MUL, HALF, MP)
            merged = _scaled(_merge(partial_ptr, tile, SPLIT, HALF, MP), late_factors, eps, K, X_SCALE)
            _linear_epilogue(merged, late, y_ptr, scaled_ptr, sum_ptr, f, F, M, SILU_MUL, PERMUTE, HALF, MP, X_SCALE)


# ---------------------------------------------------------------- qkv


@gluon.jit(do_not_specialize=["M", "T", "P", "first"])
def _packed_ring_qkv_kernel(
    w_desc, x_desc, scale_desc, zero_desc, scale_ptr, folded_ptr, bias_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr,
    lengths_ptr, table_ptr, q_ptr, k_ptr, v_ptr, partial_ptr, counter_ptr, M, T, P, eps, qk_eps, page_size, first,
    HQ: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr,
    K: gl.constexpr, FORMAT: gl.constexpr, FOLDED: gl.constexpr,
    SPLIT: gl.constexpr, SUB: gl.constexpr, S: gl.constexpr, MP: gl.constexpr, X_SCALE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """PER heads of queries, keys or values. qk-norm only where PER is 1. x's columns are permuted."""
    KERNEL: gl.constexpr = "_packed_ring_qkv_kernel"
    pdl_trigger(PDL)
    UC: gl.constexpr = w_desc.block_type.shape[3] // 128
    CHUNKS: gl.constexpr = K // SPLIT // (x_desc.block_type.shape[1] * SUB)
    Y: gl.constexpr = box_layout(64, MP, gl.num_warps())
    H: gl.constexpr = D // 2
    PER: gl.constexpr = 64 // H
    gl.static_assert(q_norm_ptr is None or PER == 1)
    tile, part = gl.program_id(0) // SPLIT, gl.program_id(0) % SPLIT
    unit0 = part * (CHUNKS * SUB * UC)
    ring = _begin(w_desc, x_desc, scale_desc, zero_desc, tile * PER, unit0, first, S, SUB, PDL, KERNEL)
    i, m = gl.arange(0, 64, gl.SliceLayout(1, Y)), gl.arange(0, MP, gl.SliceLayout(0, Y))
    head, pair = tile * PER + i // H, i % H
    position, page = token_positions(lengths_ptr, table_ptr, m, M, T, P, page_size)
    n = head * D + pair
    if SPLIT == 1:
        factors = _load_factors(scale_ptr, folded_ptr, n, n + H, M, FOLDED, MP)
        of_heads = load_of_heads(bias_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, head, pair, position, HQ, H)
    sums = _multiply(ring, w_desc, x_desc, scale_desc, zero_desc, tile * PER, unit0, FORMAT, CHUNKS, S, SUB, KERNEL)
    if SPLIT == 1:
        scaled = _scaled(boxes(sums), factors, eps, K, X_SCALE)
        qkv_epilogue(
            scaled, of_heads, qk_eps, position, page, q_ptr, k_ptr, v_ptr, tile, head, pair, m, M, page_size, HQ, HKV, H
        )
    else:
        store_part(sums, partial_ptr, tile, part, SPLIT)
        if arrives_last(counter_ptr + tile, SPLIT):
            late_factors = _load_factors(scale_ptr, folded_ptr, n, n + H, M, FOLDED, MP)
            late = load_of_heads(bias_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, head, pair, position, HQ, H)
            merged = _scaled(_merge(partial_ptr, tile, SPLIT, 64, MP), late_factors, eps, K, X_SCALE)
            qkv_epilogue(
                merged, late, qk_eps, position, page, q_ptr, k_ptr, v_ptr, tile, head, pair, m, M, page_size, HQ, HKV, H
            )


# ---------------------------------------------------------------- head


@gluon.constexpr_function
def _ids_layout(EACH, MP, W):
    """Of logits [16 * W, MP], with EACH 4: the ids whose random bits come together are in one thread, all of a row of x in one
    warp. With EACH 1, of the quads of ids [4 * W, MP]: where their ids are."""
    across = 2 if MP >= 2 * W else 1  # lanes along the rows of x
    return gl.BlockedLayout([EACH, 1], [32 // across, across], [1, W], [0, 1])


@gluon.jit(do_not_specialize=["M", "T", "first"])
def _packed_ring_head_kernel(
    w_desc, x_desc, scale_desc, zero_desc, scale_ptr, folded_ptr, temperature_ptr, seed_ptr, sample_ptr, lengths_ptr,
    logits_ptr, max_ptr, id_ptr, partial_ptr, counter_ptr, M, T, V, eps, vocab_size, first,
    PARTIALS: gl.constexpr, SLOTS: gl.constexpr,
    K: gl.constexpr, FORMAT: gl.constexpr, FOLDED: gl.constexpr,
    SPLIT: gl.constexpr, SUB: gl.constexpr, S: gl.constexpr, MP: gl.constexpr, X_SCALE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Logits and best candidate of ROWS rows of the vocabulary, which may end among them. x's columns are permuted."""
    KERNEL: gl.constexpr = "_packed_ring_head_kernel"
    pdl_trigger(PDL)
    gl.static_assert(SPLIT == 1)
    W: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = 16 * W
    CHUNKS: gl.constexpr = K // (x_desc.block_type.shape[1] * SUB)
    Y: gl.constexpr = _ids_layout(4, MP, W)
    QUADS: gl.constexpr = _ids_layout(1, MP, W)
    tile = gl.program_id(0)
    group = tile * (ROWS // 8)
    ring = _begin(w_desc, x_desc, scale_desc, zero_desc, group, 0, first, S, SUB, PDL, KERNEL)
    m, rows = gl.arange(0, MP, gl.SliceLayout(0, Y)), tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, Y))
    if scale_ptr is not None:  # behind x, and there long before the sums are
        scale = gl.load(scale_ptr + rows, mask=rows < V, other=0.0)
    if MP <= 32:  # beyond, the loop has no registers to spare
        folded = _load_squares(folded_ptr, M, FOLDED, MP)
    sums = _multiply(ring, w_desc, x_desc, scale_desc, zero_desc, group, 0, FORMAT, CHUNKS, S, SUB, KERNEL)
    if MP > 32:
        folded = _load_squares(folded_ptr, M, FOLDED, MP)
    logits = gl.convert_layout(sums, Y)
    if scale_ptr is not None:
        logits *= scale[:, None]
    if FOLDED > 0:
        logits *= _norm_factor(folded, eps, K, X_SCALE, Y)
    logits = store_logits(logits, logits_ptr, rows, m, M, V, vocab_size)
    value = logits
    if temperature_ptr is not None:
        drawn = gl.arange(0, MP, gl.SliceLayout(0, QUADS))
        temperature, seed, sample, position = load_draws(temperature_ptr, seed_ptr, sample_ptr, lengths_ptr, drawn, M, T)
        if gl.max(temperature, 0) > 0:
            quads = tile * (ROWS // 4) + gl.arange(0, ROWS // 4, gl.SliceLayout(1, QUADS))
            noise = gumbel_quads(seed, sample, position, quads, gl.zeros([ROWS // 4, MP], gl.uint32, QUADS))
            warm = gl.convert_layout(temperature, gl.SliceLayout(0, Y), assert_trivial=True)
            value = with_noise(logits, warm, warm > 0, gl.convert_layout(noise, Y, assert_trivial=True))
    best, best_id = best_of(value, rows[:, None])
    store_candidates(best, best_id, max_ptr, id_ptr, m, M, gl.arange(0, SLOTS, gl.SliceLayout(1, Y)), PARTIALS)


# ---------------------------------------------------------------- the launch


class Boxes(NamedTuple):
    """W, in blocks of 8 rows, as a tensor of three dimensions of which a tile is a box."""

    counts: list[int]
    apart: list[int]  # blocks from an index to the next
    box: list[int]

    @classmethod
    def pairs(cls, rows: int, tile: Tile, apart: int, pitch: int, H: int) -> "Boxes":
        """Two boxes a tile; the rows between the two, between groups, and in a group. ValueError: tiles do not fit."""
        if rows % tile.rows:
            raise ValueError(f"weight: found {rows} rows, expected tiles of {tile.rows}")
        return cls([2, rows // (2 * H), H // 8], [apart // 8, pitch // 8, 1], [2, tile.rows // 2 // H, H // 8])


def _launch(kernel, x: torch.Tensor, w: Operand, squares, boxes: Boxes, tile: Tile, **arguments) -> None:
    """A kernel on x [M, K], its columns permuted, and W [N, K]: tile.chunk columns a stage, tile.stages of them, tile.split
    programs a tile."""
    (M, K), N, U, split, unit = x.shape, w.rows, w.weight.shape[1], tile.split, UNIT_COLUMNS[w.format]
    int4 = w.format == "int4"
    units, sub = (1, tile.chunk // unit) if int4 else (tile.chunk // unit, 1)
    if K % (split * tile.chunk) or U * unit != K or tile.rows != 16 * tile.warps:
        raise ValueError(f"weight: found {N} x {K}, expected tiles of {tile.rows} rows and {split} times {tile.chunk} columns")
    if int4 and w.scale.shape[-1] != 1:
        raise ValueError(f"weight: found {w.scale.shape[-1]} groups in {unit} columns, expected 1")
    if units > 2:
        raise ValueError(f"Tile.chunk: found {tile.chunk}, expected {2 * unit} at most: a TMA box's 256 words a row")
    MP, tiles, chunks = ring_padded(M), -(-N // tile.rows), K // split // tile.chunk
    stages = min(tile.stages, chunks - 1)  # with nothing to refill ptxas 12.8 crashes
    if stages < 2:
        raise ValueError(f"weight: found {chunks} chunks of columns a program, expected at least 3")

    def boxed(t: torch.Tensor, width: int, most: int):
        """A tile's boxes of t [N / 8, U, width]."""
        strides = [blocks * U * width for blocks in boxes.apart]
        return described(t, [*boxes.counts, U * width], [*strides, 1], [*boxes.box, most * width], swizzled=False)

    kernel[(tiles * split,)](
        boxed(w.weight, 128, units),
        described(x, [M, K], [K, 1], [MP, units * unit]),
        boxed(w.scale, 8, 1) if int4 else None,
        None if w.zero is None else boxed(w.zero, 8, 1),
        None if int4 else w.scale,
        squares,
        **arguments,
        M=M,
        first=stages,
        K=K,
        FORMAT=w.format,
        FOLDED=0 if squares is None else squares.shape[1],
        SPLIT=split,
        SUB=sub,
        S=stages,
        MP=MP,
        X_SCALE=x_scale(x.dtype),
        num_warps=tile.warps,
        **({"maxnreg": tile.registers} if tile.registers else {}),
        **scratch(x, tiles * split, tile, MP, tiles, squares=False),
        **launch_options(x),
    )


def described_by(w: Operand) -> tuple:
    """What of a weight is read through TMA descriptors."""
    return w[:3] if w.format == "int4" else w[:1]


def launch_packed_ring(
    x: torch.Tensor, w: Operand, squares, eps: float, silu_mul: bool, residual, y: torch.Tensor, y_permuted: bool, tile: Tile,
    gain=None, folded: FoldedNorm | None = None,
) -> None:  # fmt: skip
    """Fills y [M, F] with act(norm(x) @ W.T) + residual, and of a `gain` the FoldedNorm `folded` of y, by blocks of 64.

    x [M, K], its columns permuted; a FoldedNorm's where there are `squares`. y_permuted: so are those of y, or with
    a `gain` of folded.scaled. ValueError: `folded` has other blocks.
    """
    if folded is not None and 64 * folded.squares.shape[1] != y.shape[1]:
        raise ValueError(f"squares: found {folded.squares.shape[1]} blocks of {y.shape[1]} features, expected blocks of 64")
    half = tile.rows // 2
    boxes = Boxes.pairs(w.rows, tile, *((w.rows // 2, half) if silu_mul else (half, tile.rows)), half)
    _launch(
        _packed_ring_linear_kernel, x, w, squares, boxes, tile,
        residual_ptr=residual, y_ptr=y, gain_ptr=gain, scaled_ptr=folded and folded.scaled, sum_ptr=folded and folded.squares,
        F=y.shape[1], eps=eps, SILU_MUL=silu_mul, PERMUTE=y_permuted,
    )  # fmt: skip


def launch_packed_ring_qkv(
    x: torch.Tensor, w: Operand, bias, squares, eps: float, q_norm, k_norm, qk_eps: float, cos, sin, lengths, table,
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, page_size: int, num_kv_heads: int, tile: Tile,
) -> None:  # fmt: skip
    """Fills q [M, Hq, D] and appends to the caches: arguments as `qkv_rope_append` has them, x's columns permuted."""
    _, Hq, D = q.shape
    _launch(
        _packed_ring_qkv_kernel, x, w, squares, Boxes.pairs(w.rows, tile, D // 2, D, D // 2), tile,
        bias_ptr=bias, q_norm_ptr=q_norm, k_norm_ptr=k_norm, cos_ptr=cos, sin_ptr=sin, lengths_ptr=lengths, table_ptr=table,
        q_ptr=q, k_ptr=k_cache, v_ptr=v_cache, T=x.shape[0] // lengths.numel(), P=table.shape[1], eps=eps, qk_eps=qk_eps,
        page_size=page_size, HQ=Hq, HKV=num_kv_heads, D=D,
    )  # fmt: skip


def launch_packed_ring_head(
    x: torch.Tensor, w: Operand, squares, eps: float, vocab_size: int, temperature, seed, sample, lengths,
    logits: torch.Tensor, best: torch.Tensor, best_id: torch.Tensor, tile: Tile,
) -> None:  # fmt: skip
    """Fills logits [M, V] and the candidates [M, PARTIALS]: arguments as `head` has them, x's columns permuted."""
    if tile.split > 1:
        raise ValueError(f"Tile.split: found {tile.split}, expected 1 of head")
    blocks, programs = w.weight.shape[0], triton.cdiv(w.rows, tile.rows)
    _launch(
        _packed_ring_head_kernel, x, w, squares, Boxes([1, blocks, 1], [blocks, 1, 1], [1, tile.rows // 8, 1]), tile,
        temperature_ptr=temperature, seed_ptr=seed, sample_ptr=sample, lengths_ptr=lengths,
        logits_ptr=logits, max_ptr=best, id_ptr=best_id, T=x.shape[0] // lengths.numel(), V=w.rows, eps=eps,
        vocab_size=vocab_size, PARTIALS=PARTIALS, SLOTS=triton.next_power_of_2(triton.cdiv(PARTIALS, programs)),
    )  # fmt: skip
