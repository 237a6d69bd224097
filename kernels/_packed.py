# ruff: noqa: RUF005 (Triton knows no star in a tuple)
"""The inner loop for packed weights (int8, fp8, int4): sums[n, m] = sum_k W[n, k] x[m, k] on the tensor cores.

Owns reading the order that formats.py calls tiles, widening codes to 16-bit floats in registers, and multiplying, for any
number of rows m. Knows no epilogue. Letters as in _matmul.py, and: W warps, L = 32 W threads (thread g * 4 + t of a warp),
U units of columns, RB blocks of 16 weight rows a warp holds, SK warps that share those rows and split K, MB blocks of 8 rows
of x, S steps of 32 columns.

A thread loads 16 bytes of one weight row, and they are just the elements that an mma.m16n8k16 wants from that thread: no weight
goes through shared memory, no warp waits for another before the end. x comes the same way, from L1. Triton proves that for
itself: its conversions between the loads' layout and the dot's move nothing (tests/test_kernels_compile.py checks their terms).

Codes become floats two at a time, without a conversion instruction: the bits of a small integer, put under the exponent of 128
(1024 in float16), are that integer plus 128; what was added is then taken away, exactly. The scale of a group multiplies the
group's sum in float32, or, where there are many rows of x, its weights.
"""

import triton
import triton.language as tl

from kernels._common import INTERPRETED, NVIDIA

SUM_SCALED_BLOCKS = tl.constexpr(2)  # of 8 rows of x: beyond, scaling sums takes more instructions than scaling weights

# ---------------------------------------------------------------- codes to floats
# PTX for one 32-bit word; %s are the names of the type. Where PTX cannot run, `_codes` says the same in arithmetic.


def _two_formats(text: str, **values: tuple[str, str]) -> tuple:
    """The PTX for bfloat16 and for float16."""
    formats = []
    for i, name in enumerate(("bf16x2", "f16x2")):
        out = text.replace("TYPE", name)
        for key, pair in values.items():
            out = out.replace(key, pair[i])
        formats.append(tl.constexpr("{ .reg .b32 a, b, one; mov.b32 one, " + ("0x3f803f80", "0x3c003c00")[i] + ";" + out + "}"))
    return tuple(formats)


_INT4 = "".join(
    f"shr.u32 b, $4, {4 * p}; lop3.b32 a, b, 0x000f000f, BASE, 0xea; fma.rn.TYPE ${p}, a, one, $5;" for p in range(4)
)
_INT4_QUARTERS = ".reg .b32 power, high; mov.b32 one, QUARTER; mov.b32 power, POWER; shr.u32 high, $4, 8;" + "".join(
    f"lop3.b32 a, {word}, 0x000f000f, BASE, 0xea; fma.rn.TYPE ${p}, a, one, $5;"
    f"lop3.b32 b, {word}, 0x00f000f0, OTHER, 0xea; fma.rn.TYPE ${p + 1}, b, power, $6;"
    for p, word in ((0, "$4"), (2, "high"))
)
_INT8 = (
    "lop3.b32 a, $2, 0x807f807f, BASE, 0xea; lop3.b32 b, $2, 0x80008000, BASE, 0xae;"
    "fma.rn.TYPE $0, a, one, b;"
    "prmt.b32 $1, $2, $2, 0x2301;"
    "lop3.b32 a, $1, 0x807f807f, BASE, 0xea; lop3.b32 b, $1, 0x80008000, BASE, 0xae;"
    "fma.rn.TYPE $1, a, one, b;"
)
_FP8 = (
    "mov.b32 one, POWER;"
    "shr.u32 a, $2, SHIFT; and.b32 a, a, MASK; lop3.b32 a, $2, 0x80008000, a, 0xea; mov.b32 b, 0x80008000;"
    "fma.rn.TYPE $0, a, one, b;"
    "shl.b32 $1, $2, 8;"
    "shr.u32 a, $1, SHIFT; and.b32 a, a, MASK; lop3.b32 a, $1, 0x80008000, a, 0xea;"
    "fma.rn.TYPE $1, a, one, b;"
)
INT4_BF16, INT4_FP16 = _two_formats(_INT4, BASE=("0x43004300", "0x64006400"))
# A quarter of code less zero, in 9 instructions a word where that takes 11: the second and fourth codes stay where they are. As
# bfloat16 they are 2^-129 each (the numbers of exponents 0 and 1 are equally far apart), and 16 more than 1024 in float16. $5
# and $6 are added to the first and third, and to the second and fourth: _packed_ring.py has them.
INT4_QUARTERS_BF16, INT4_QUARTERS_FP16 = _two_formats(
    _INT4_QUARTERS, BASE=("0x43004300", "0x64006400"), OTHER=("0", "0x64006400"), QUARTER=("0x3e803e80", "0x34003400"),
    POWER=("0x7f007f00", "0x24002400"),
)  # fmt: skip
# From $5 to $6: from -(128 + zero) / 4 to -zero / 4, in float16 from -(1024 + zero) / 4 to -(64 + zero) / 4
OTHER_ZEROS_BF16, OTHER_ZEROS_FP16 = _two_formats(
    "mov.b32 a, ADDEND; fma.rn.TYPE $0, $1, one, a;", ADDEND=("0x42004200", "0x5b805b80")
)
INT8_BF16, INT8_FP16 = _two_formats(_INT8, BASE=("0x43004300", "0x64006400"))
# e4m3's exponent and mantissa in the place of a wider type's, times 2^120 (2^8): the difference of the exponents' biases
FP8_BF16, FP8_FP16 = _two_formats(_FP8, SHIFT=("4", "1"), MASK=("0x07f007f0", "0x3f803f80"), POWER=("0x7b807b80", "0x5c005c00"))
PRODUCT_BF16 = tl.constexpr("{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }")
PRODUCT_FP16 = tl.constexpr("{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.f16x2 $0, $1, $2, z; }")


@triton.jit
def _pairs(words, zero, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Pairs of 16-bit floats, as int32 words: of int4 words their four; of int8 and fp8 their two.

    zero: int4's, as a pair of floats -(128 + zero), for each word.
    """
    BF16: tl.constexpr = tl.bfloat16 == DTYPE
    if FORMAT == "int4":
        asm: tl.constexpr = INT4_BF16 if BF16 else INT4_FP16
        words, zero = tl.broadcast(words, zero)
        pairs = tl.inline_asm_elementwise(
            asm, "=&r,=&r,=&r,=&r,r,r", [words, zero], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
        )
    elif FORMAT == "int8":
        asm: tl.constexpr = INT8_BF16 if BF16 else INT8_FP16
        pairs = tl.inline_asm_elementwise(asm, "=&r,=&r,r", [words], dtype=(tl.int32, tl.int32), is_pure=True, pack=1)
    else:
        asm: tl.constexpr = FP8_BF16 if BF16 else FP8_FP16
        pairs = tl.inline_asm_elementwise(asm, "=&r,=&r,r", [words], dtype=(tl.int32, tl.int32), is_pure=True, pack=1)
    return pairs


@triton.jit
def _code(words, zero, p: tl.constexpr, kl: tl.constexpr, FORMAT: tl.constexpr):
    """Member kl of pair p of each word as float32, by plain arithmetic."""
    if FORMAT == "int4":
        value = (((words >> (4 * p + 16 * kl)) & 15) - zero).to(tl.float32)
    elif FORMAT == "int8":
        magnitude = ((words >> (16 * kl + 8 * p)) & 127).to(tl.float32)
        value = tl.where((words >> (16 * kl + 15 - 8 * p)) & 1 == 1, -magnitude, magnitude)
    else:
        byte = (words >> (16 * kl + 8 - 8 * p)) & 255
        exponent, mantissa = (byte >> 3) & 15, (byte & 7).to(tl.float32)
        value = tl.where(exponent == 0, mantissa * 2.0**-9, (mantissa + 8.0) * tl.exp2(exponent.to(tl.float32) - 10.0))
        value *= tl.where(byte >= 128, -1.0, 1.0)  # the interpreter's -0.0 is 0.0
    return value


@triton.jit
def _zero_word(zero, DTYPE: tl.constexpr):
    """int4's zero points as `_pairs` takes them: -(128 + zero) twice, or -(1024 + zero) in float16."""
    if INTERPRETED:
        out = zero
    else:
        out = (zero | (0xC300 if tl.bfloat16 == DTYPE else 0xE400)) * 0x10001
    return out


@triton.jit
def _halves(words, zero, pairs, p: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """The two floats of pair p of each word, as a last dimension kl."""
    if INTERPRETED:
        out = tl.join(_code(words, zero, p, 0, FORMAT), _code(words, zero, p, 1, FORMAT))
    else:
        low = pairs[p].to(tl.int16).to(DTYPE, bitcast=True)
        out = tl.join(low, (pairs[p] >> 16).to(tl.int16).to(DTYPE, bitcast=True))
    return out


@triton.jit
def _floats(words, zero, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """The codes of int32 words as floats [L, S, kl, b, kh]: words are [L, S], or [L, S, kh] of int8 and fp8; zero [L, 1]."""
    if INTERPRETED:
        pairs = ()
    else:
        pairs = _pairs(words, zero, FORMAT, DTYPE)
    first = tl.join(_halves(words, zero, pairs, 0, FORMAT, DTYPE), _halves(words, zero, pairs, 1, FORMAT, DTYPE))
    if FORMAT == "int4":
        out = tl.join(
            first, tl.join(_halves(words, zero, pairs, 2, FORMAT, DTYPE), _halves(words, zero, pairs, 3, FORMAT, DTYPE))
        )
    else:
        out = first.permute(0, 1, 3, 4, 2)
    return out


@triton.jit
def _product(a, b, DTYPE: tl.constexpr):
    """a * b of 16-bit floats, rounded once, two an instruction."""
    if NVIDIA:
        asm: tl.constexpr = PRODUCT_BF16 if tl.bfloat16 == DTYPE else PRODUCT_FP16
        a, b = tl.broadcast(a, b)
        out = tl.inline_asm_elementwise(asm, "=r,r,r", [a, b], dtype=a.dtype, is_pure=True, pack=2)
    else:
        out = (a.to(tl.float32) * b.to(tl.float32)).to(DTYPE)
    return out


# ---------------------------------------------------------------- loading


@triton.jit
def unit_starts(
    first_half, half_offset, first_unit, U, halves, W: tl.constexpr, SK: tl.constexpr, RB: tl.constexpr,
    STEPS: tl.constexpr, PAIRS: tl.constexpr, MASK_N: tl.constexpr,
):  # fmt: skip
    """For the two half blocks (8 rows) of each of a warp's RB blocks: where its first unit lies in [N8, U], int64 [L]. And how
    many units from there on are this warp's to pass, STEPS of its own, [L].

    Halves lie side by side; or, where a tile holds PAIRS, the second members' lie `half_offset` behind the first members'.
    """
    warp = tl.arange(0, W * 32) // 32
    block = warp // SK * RB
    starts = ()
    for i in tl.static_range(2 * RB):
        if PAIRS:
            half = first_half + block + i // 2 + i % 2 * half_offset
        else:
            half = first_half + (block + i // 2) * 2 + i % 2
        if MASK_N:
            half = tl.minimum(half, halves - 1)
        starts = starts + (half.to(tl.int64) * U + first_unit + warp % SK,)
    return starts, tl.minimum(U - first_unit, STEPS * SK) - warp % SK


@triton.jit
def _load_part(ptr, offset, mask, MASK_K: tl.constexpr, STREAM: tl.constexpr):
    policy: tl.constexpr = "evict_first" if STREAM else ""
    if MASK_K:
        out = tl.load(ptr + offset, mask=mask, other=0, eviction_policy=policy)
    else:
        out = tl.load(ptr + offset, eviction_policy=policy)
    return out


@triton.jit
def load_unit(
    w_ptr, scale_ptr, zero_ptr, starts, units, left, GROUPS: tl.constexpr, MASK_K: tl.constexpr, STREAM: tl.constexpr
):  # fmt: skip
    """The unit that lies `units` behind each start: words [L, 4], and int4's scales and zeros [L, GROUPS], one after the other.

    left: units from a start on that are there, [L].
    """
    L: tl.constexpr = left.shape[0]
    lane = tl.arange(0, L) % 32
    mask = (units < left)[:, None]
    loaded = ()
    for i in tl.static_range(len(starts)):
        words = (starts[i] * 128 + lane * 4)[:, None] + tl.arange(0, 4)[None, :]
        loaded = loaded + (_load_part(w_ptr + units * 128, words, mask, MASK_K, STREAM),)
        if scale_ptr is not None and GROUPS > 0:
            groups = ((starts[i] * 8 + lane // 4) * GROUPS)[:, None] + tl.arange(0, GROUPS)[None, :]
            loaded = loaded + (_load_part(scale_ptr + units * (8 * GROUPS), groups, mask, MASK_K, False),)
            if zero_ptr is not None:
                loaded = loaded + (_load_part(zero_ptr + units * (8 * GROUPS), groups, mask, MASK_K, False),)
    return loaded


@triton.jit
def preload_packed(
    w_ptr, scale_ptr, zero_ptr, starts, left,
    SK: tl.constexpr, GROUPS: tl.constexpr, PRELOAD: tl.constexpr, MASK_K: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """The first PRELOAD units of every warp, in registers, one flat tuple: to be called before the wait."""
    tiles = ()
    for c in tl.static_range(PRELOAD):
        tiles = tiles + load_unit(w_ptr, scale_ptr, zero_ptr, starts, c * SK, left, GROUPS, MASK_K, STREAM)
    return tiles


@triton.jit
def _load_x(x_ptr, k, row, K, MASK_K: tl.constexpr):
    """x[row, k : k + 8] of every thread: [L, 8]. Each thread's columns are all there or none."""
    address = (x_ptr + row * K + k)[:, None] + tl.arange(0, 8)[None, :]
    if MASK_K:
        x = tl.load(address, mask=(k < K)[:, None], other=0)
    else:
        x = tl.load(address)
    return x


# ---------------------------------------------------------------- multiplying


@triton.jit
def pieces(t, COUNT: tl.constexpr):
    """[L, 4] or [L, COUNT] cut into COUNT pieces of neighbouring columns, [L, columns] each."""
    L: tl.constexpr = t.shape[0]
    S: tl.constexpr = t.shape[1] // COUNT
    if COUNT == 1:
        out = (t,)
    elif COUNT == 2:
        a, b = tl.split(t.reshape([L, 2, S]).permute(0, 2, 1))
        out = (a, b)
    else:
        even, odd = tl.split(t.reshape([L, 2, 2]))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        out = (a[:, None], b[:, None], c[:, None], d[:, None])
    return out


@triton.jit
def _weight_operand(first, second, W: tl.constexpr):
    """Rows g and g + 8 of each thread, [L, S, kl, b, kh] each, as the large operand of a dot [W, 16, 32 * S]."""
    S: tl.constexpr = first.shape[1]
    both = tl.join(first, second).reshape([W, 8, 4, S, 2, 2, 2, 2])  # W g t s kl b kh h
    return both.permute(0, 7, 1, 3, 5, 2, 6, 4).reshape([W, 16, 32 * S])


@triton.jit
def _x_operand(x, W: tl.constexpr):
    """x [L, 8, S] of each thread as the small operand of a dot [W, 32 * S, 8]; k in the order of `_weight_operand`."""
    S: tl.constexpr = x.shape[2]
    return x.reshape([W, 8, 4, 2, 2, 2, S]).permute(0, 6, 4, 2, 3, 5, 1).reshape([W, 32 * S, 8])  # W g t kh b kl s


@triton.jit
def _of_rows(first, second, W: tl.constexpr):
    """A number for row g and one for row g + 8 of each thread, [L, 1] each, for sums [W, 16, 8]."""
    both = tl.join(first, second).reshape([W, 8, 4, 2])  # W g t h
    return both[:, :, :, :, None].broadcast_to([W, 8, 4, 2, 2]).permute(0, 3, 1, 2, 4).reshape([W, 16, 8])


@triton.jit
def _zero_sums(W: tl.constexpr, COUNT: tl.constexpr):
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([W, 16, 8], tl.float32),)
    return sums


@triton.jit
def weight_rows(words, scale, zero, FORMAT: tl.constexpr, SCALE_WEIGHTS: tl.constexpr, DTYPE: tl.constexpr):
    """One half block's piece as floats [L, S, kl, b, kh]; times its group's scale [L, 1] where SCALE_WEIGHTS."""
    if FORMAT == "int4":
        out = _floats(words, _zero_word(zero, DTYPE), FORMAT, DTYPE)
        if SCALE_WEIGHTS:
            out = _product(out, scale[:, :, None, None, None], DTYPE)
            if INTERPRETED:
                out = out.to(tl.float32)
    else:
        out = _floats(words.reshape([words.shape[0], words.shape[1] // 2, 2]), zero, FORMAT, DTYPE)
    return out


@triton.jit
def _multiply_unit(
    sums, loaded, x_ptr, norm_ptr, k, M, K,
    FORMAT: tl.constexpr, GROUPS: tl.constexpr, HAS_ZERO: tl.constexpr, SCALE_SUMS: tl.constexpr, W: tl.constexpr,
    RB: tl.constexpr, MB: tl.constexpr, NORM: tl.constexpr, MASK_K: tl.constexpr, X_SCALE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Adds one unit's products to the RB * MB sums [W, 16, 8], a piece (one group of int4) at a time. k [L]: each thread's
    first column."""
    PIECES: tl.constexpr = GROUPS if FORMAT == "int4" else 1
    STEPS: tl.constexpr = (4 if FORMAT == "int4" else 2) // PIECES  # of 32 columns, in a piece
    EACH: tl.constexpr = len(loaded) // (2 * RB)  # tensors of a half block
    words, scales, zeros = (), (), ()  # by half block and piece
    for i in tl.static_range(2 * RB):
        words = words + pieces(loaded[i * EACH], PIECES)
        if FORMAT == "int4":
            scales = scales + pieces(loaded[i * EACH + 1], PIECES)
        if HAS_ZERO:
            zeros = zeros + pieces(loaded[i * EACH + 2].to(tl.int32), PIECES)
        else:
            for _ in tl.static_range(PIECES):
                zeros = zeros + (tl.full([W * 32, 1], 8, tl.int32),)
            if FORMAT != "int4":
                scales = zeros
    row = tl.arange(0, W * 32) % 32 // 4
    for piece in tl.static_range(PIECES):
        column = k + piece * (32 * STEPS)
        norms = ()
        if NORM:
            for s in tl.static_range(STEPS):
                norms = norms + (_load_x(norm_ptr, column + 32 * s, 0, K, MASK_K),)
            norm = _stack(norms, 0, 1, STEPS)
            if X_SCALE != 1.0:
                norm = (norm.to(tl.float32) * X_SCALE).to(DTYPE)
        operands = ()
        for j in tl.static_range(MB):
            xs = ()
            for s in tl.static_range(STEPS):
                xs = xs + (_load_x(x_ptr, column + 32 * s, tl.minimum(8 * j + row, M - 1), K, MASK_K),)
            x = _stack(xs, 0, 1, STEPS)
            if NORM:
                x = _product(x, norm, DTYPE)
            if INTERPRETED:
                x = x.to(tl.float32)
            operands = operands + (_x_operand(x, W),)
        added = ()
        for r in tl.static_range(RB):
            first = weight_rows(words[2 * r * PIECES + piece], scales[2 * r * PIECES + piece], zeros[2 * r * PIECES + piece],
                                 FORMAT, not SCALE_SUMS, DTYPE)  # fmt: skip
            second = weight_rows(words[(2 * r + 1) * PIECES + piece], scales[(2 * r + 1) * PIECES + piece],
                                  zeros[(2 * r + 1) * PIECES + piece], FORMAT, not SCALE_SUMS, DTYPE)  # fmt: skip
            w = _weight_operand(first, second, W)
            if SCALE_SUMS:
                scale = _of_rows(
                    scales[2 * r * PIECES + piece].to(tl.float32), scales[(2 * r + 1) * PIECES + piece].to(tl.float32), W
                )
            for j in tl.static_range(MB):
                if SCALE_SUMS:
                    added = added + (sums[r * MB + j] + tl.dot(w, operands[j]) * scale,)
                else:
                    added = added + (tl.dot(w, operands[j], sums[r * MB + j]),)
        sums = added
    return sums


@triton.jit
def _stack(parts, first: tl.constexpr, step: tl.constexpr, COUNT: tl.constexpr):
    """parts[first], parts[first + step], ... as one tensor, whose last dimension counts them."""
    if COUNT == 1:
        out = tl.expand_dims(parts[first], -1)
    else:
        even = _stack(parts, first, 2 * step, COUNT // 2)
        odd = _stack(parts, first + step, 2 * step, COUNT // 2)
        out = tl.join(even, odd)
        out = out.reshape(out.shape[:-2] + [COUNT])
    return out


@triton.jit
def _gather_sums(
    sums, W: tl.constexpr, SK: tl.constexpr, RB: tl.constexpr, MB: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    """All warps' RB * MB sums as `multiply` gives them: a tuple of [R, 8 * MB], or of the two members of pairs."""
    RW: tl.constexpr = W // SK
    blocks = ()
    for r in tl.static_range(RB):
        block = _stack(sums, r * MB, 1, MB).permute(0, 1, 3, 2).reshape([RW, SK, 16, 8 * MB])
        blocks = blocks + (tl.sum(block, 1),)
    tile = _stack(blocks, 0, 1, RB).permute(0, 3, 1, 2)  # RW RB 16 MP
    if PAIRS:
        a, b = tl.split(tile.reshape([RW * RB, 2, 8, 8 * MB]).permute(0, 2, 3, 1))
        out = (a.reshape([RW * RB * 8, 8 * MB]), b.reshape([RW * RB * 8, 8 * MB]))
    else:
        out = (tile.reshape([RW * RB * 16, 8 * MB]),)
    return out


@triton.jit
def _sum_squares(x_ptr, k0, columns, M, K, W: tl.constexpr, MP: tl.constexpr, ONE: tl.constexpr):
    """Sums of x[:, k0 : k0 + columns]^2: [1, MP], or [1, 1] where there is ONE row. A turn's loads are in flight at once."""
    ROWS: tl.constexpr = 1 if ONE else MP
    CHUNK: tl.constexpr = W * 32 * (64 if ROWS <= 16 else 128) // ROWS
    m = tl.minimum(tl.arange(0, ROWS), M - 1)
    end = tl.minimum(k0 + columns, K)
    squares = tl.zeros([ROWS], tl.float32)
    for start in tl.range(k0, end, CHUNK, num_stages=1):
        k = start + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=(k < end)[None, :], other=0).to(tl.float32)
        squares += tl.sum(x * x, 1)
    return squares[None, :]


@triton.jit
def _row_scales(scale_ptr, rows, N, MASK_N: tl.constexpr):
    """int8's and fp8's scales of each vector of rows."""
    scales = ()
    for i in tl.static_range(len(rows)):
        if MASK_N:
            scales = scales + (tl.load(scale_ptr + rows[i], mask=rows[i] < N, other=0),)
        else:
            scales = scales + (tl.load(scale_ptr + rows[i]),)
    return scales


@triton.jit
def multiply_packed(
    tiles, x_ptr, w_ptr, norm_ptr, scale_ptr, zero_ptr, starts, left, rows, first_unit, N, K, M,
    FORMAT: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr, SK: tl.constexpr, RB: tl.constexpr, MP: tl.constexpr,
    STEPS: tl.constexpr, PRELOAD: tl.constexpr, PAIRS: tl.constexpr, ONE: tl.constexpr, NORM: tl.constexpr,
    MASK_N: tl.constexpr, MASK_K: tl.constexpr, STREAM: tl.constexpr, X_SCALE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`multiply` for packed weights: the scaled sums, and the sums of x^2 [1, MP] (or [1, 1]) of this program's columns.

    Warp w takes every SK-th unit, from first_unit + w % SK on, STEPS of them, of which `tiles` are preloaded; as many stay in
    flight. rows: the weight rows of the sums, for the scales of int8 and fp8.
    """
    UNIT: tl.constexpr = 128 if FORMAT == "int4" else 64
    MB: tl.constexpr = MP // 8
    SCALE_SUMS: tl.constexpr = FORMAT == "int4" and (MB <= SUM_SCALED_BLOCKS or scale_ptr.dtype.element_ty != DTYPE)
    HAS_ZERO: tl.constexpr = zero_ptr is not None
    EACH: tl.constexpr = len(tiles) // PRELOAD
    lane = tl.arange(0, W * 32)
    k = (first_unit + lane // 32 % SK) * UNIT + lane % 4 * 8
    if FORMAT != "int4" and MB <= 2:  # beside x, not when the sums wait for them; with more rows, registers are scarce
        scales = _row_scales(scale_ptr, rows, N, MASK_N)
    squares = tl.zeros([1, 1], tl.float32)
    if NORM:
        squares = _sum_squares(x_ptr, first_unit * UNIT, STEPS * SK * UNIT, M, K, W, MP, ONE)
    sums = _zero_sums(W, RB * MB)
    for c in tl.range(0, STEPS, PRELOAD, num_stages=1):
        following = ()
        for j in tl.static_range(PRELOAD):
            sums = _multiply_unit(
                sums, tiles[j * EACH : (j + 1) * EACH], x_ptr, norm_ptr, k + (c + j) * (SK * UNIT), M, K,
                FORMAT, GROUPS, HAS_ZERO, SCALE_SUMS, W, RB, MB, NORM, MASK_K, X_SCALE, DTYPE,
            )  # fmt: skip
            if STEPS > PRELOAD:
                following = following + load_unit(
                    w_ptr, scale_ptr, zero_ptr, starts, (c + j + PRELOAD) * SK, left, GROUPS, True, STREAM
                )
        if STEPS > PRELOAD:
            tiles = following
    gathered = _gather_sums(sums, W, SK, RB, MB, PAIRS)
    if FORMAT != "int4":
        if MB > 2:
            scales = _row_scales(scale_ptr, rows, N, MASK_N)
        scaled = ()
        for i in tl.static_range(len(gathered)):
            scaled = scaled + (gathered[i] * scales[i][:, None],)
        gathered = scaled
    return gathered, squares
