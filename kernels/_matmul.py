# ruff: noqa: RUF005 (Triton knows no star in a tuple)
"""What the small-batch matmul kernels share: sums[n, m] = sum_k W[n, k] x[m, k] for 1 to MAX_ROWS rows m.

Owns: loading weight tiles before the dependency wait, multiplying by FMA or on the tensor cores, the RMSNorm prologue, the
merge of programs that share a tile, and what a launch needs. Knows no epilogue: linear.py and head.py add those.
Letters: M rows of x (MP padded to a power of two), N output features, K input features, R weight rows of a program's tile.

The RMSNorm costs no pass of its own: a program multiplies by x * norm and sums x^2 from the same loads; the factor
1 / sqrt(mean(x^2) + eps) is one number per row of x, applied to the finished sums. For packed weights, which leave little time
beside their bytes, the kernel that computes x does it instead (`FoldedNorm`), and only the factor is left to do.

FMA reads 16-bit weights and x as 32-bit words of two neighbouring columns, because a word is widened to two float32 by one
shift and one mask; K, k and CHUNK then count words. The tensor-core path counts elements.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels._common import (
    INTERPRETED,
    arrives_last,
    has_wgmma,
    hold,
    launch_options,
    num_sms,
    runs_kernels,
    zeroed_workspace,
)
from kernels.formats import PLAIN_FORMATS, UNIT_COLUMNS, Weight, dequantize_tiled, saturated
from kernels.tiles import MAX_ROWS, RING_LEAST, Tile, is_batch_invariant, kernel_rows, packed_shape, tile_for

MAX_GROUPS = 1 << 16  # of programs that share a tile, in one launch

# ---------------------------------------------------------------- loading


@triton.jit
def load_weights(w_ptr, rows, k, N, K, MASK_N: tl.constexpr, MASK_K: tl.constexpr, STREAM: tl.constexpr):
    """W[rows, k] as [R, CHUNK]; zero outside the matrix, which only MASK_N and MASK_K allow for."""
    address = w_ptr + rows.to(tl.int64)[:, None] * K + k[None, :]
    policy: tl.constexpr = "evict_first" if STREAM else ""
    if MASK_N and MASK_K:
        tile = tl.load(address, mask=(rows < N)[:, None] & (k < K)[None, :], other=0, eviction_policy=policy)
    elif MASK_N:
        tile = tl.load(address, mask=(rows < N)[:, None], other=0, eviction_policy=policy)
    elif MASK_K:
        tile = tl.load(address, mask=(k < K)[None, :], other=0, eviction_policy=policy)
    else:
        tile = tl.load(address, eviction_policy=policy)
    return tile


@triton.jit
def load_vector(ptr, k, K, MASK_K: tl.constexpr):
    """ptr[k] as [1, CHUNK]: the layout of a weight tile's row, so that no thread needs another's element."""
    if MASK_K:
        vector = tl.load(ptr + k[None, :], mask=(k < K)[None, :], other=0)
    else:
        vector = tl.load(ptr + k[None, :])
    return vector


@triton.jit
def preload(
    w_ptr, norm_ptr, rows, k0, N, K,
    CHUNK: tl.constexpr, PRELOAD: tl.constexpr, NORM: tl.constexpr, MASK_N: tl.constexpr, MASK_K: tl.constexpr,
    STREAM: tl.constexpr,
):  # fmt: skip
    """The first PRELOAD chunks of W[rows, k0:] and of the norm's weight, in registers: to be called before the wait."""
    tiles, norms = (), ()
    for c in tl.static_range(PRELOAD):
        tiles = tiles + (load_weights(w_ptr, rows, k0 + c * CHUNK + tl.arange(0, CHUNK), N, K, MASK_N, MASK_K, STREAM),)
    for c in tl.static_range(PRELOAD):
        if NORM:
            k = k0 + c * CHUNK + tl.arange(0, CHUNK)
            norms = norms + (load_vector(norm_ptr, k, K, MASK_K),)
    return tiles, norms


# ---------------------------------------------------------------- FMA


@triton.jit
def widen(words, DTYPE: tl.constexpr):
    """The two 16-bit floats of each 32-bit word as float32: even columns, odd columns."""
    if tl.bfloat16 == DTYPE:  # a bfloat16 is the upper half of a float32
        even = (words << 16).to(tl.float32, bitcast=True)
        odd = (words & -65536).to(tl.float32, bitcast=True)
    else:
        even = words.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        odd = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return even, odd


@triton.jit
def fma(
    tiles, norms, x_ptr, w_ptr, norm_ptr, rows, k0, N, K, addend,
    M: tl.constexpr, MP: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, PRELOAD: tl.constexpr,
    NORM: tl.constexpr, MASK_N: tl.constexpr, MASK_K: tl.constexpr, STREAM: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Multiplies W[rows, k0 : k0 + CHUNKS * CHUNK] by the M rows of x; `tiles` and `norms` are preloaded. Plus `addend`.

    Returns the sums [R, MP], the sums of x^2 [1, MP], and the widened x * norm of every chunk and row, for `fma_again`.
    Reducing both sums at once would save barriers, but it shuffles the squares once for each row: 658.8 us a step of the 1B
    against 645.2.
    """
    xs = ()
    for c in tl.static_range(PRELOAD):
        for m in tl.static_range(M):
            xs = xs + (load_vector(x_ptr + m * K, k0 + c * CHUNK + tl.arange(0, CHUNK), K, MASK_K),)
    sums, squares, widened = _zeros(rows.shape[0], M, CHUNK), _zeros(1, M, CHUNK), ()
    for c in tl.static_range(CHUNKS):
        if c + PRELOAD < CHUNKS:  # as many chunks stay in flight as were preloaded
            k = k0 + (c + PRELOAD) * CHUNK + tl.arange(0, CHUNK)
            tiles = tiles + (load_weights(w_ptr, rows, k, N, K, MASK_N, MASK_K, STREAM),)
            if NORM:
                norms = norms + (load_vector(norm_ptr, k, K, MASK_K),)
            for m in tl.static_range(M):
                xs = xs + (load_vector(x_ptr + m * K, k, K, MASK_K),)
        next_squares = ()
        for m in tl.static_range(M):
            x_even, x_odd = widen(xs[c * M + m], DTYPE)
            if NORM:
                next_squares = next_squares + (squares[m] + x_even * x_even + x_odd * x_odd,)
                norm_even, norm_odd = widen(norms[c], DTYPE)
                x_even *= norm_even
                x_odd *= norm_odd
            widened = widened + ((x_even, x_odd),)
        if NORM:
            squares = next_squares
        sums = _add_products(sums, tiles[c], widened, c, M, DTYPE)
    if addend is not None:
        sums = (sums[0] + tl.where((tl.arange(0, CHUNK) == 0)[None, :], addend, 0.0),)
    return _columns(sums, M, MP), _columns(squares, M, MP), widened


@triton.jit
def fma_again(
    widened, w_ptr, rows, N, K,
    M: tl.constexpr, MP: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    MASK_N: tl.constexpr, MASK_K: tl.constexpr, STREAM: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The sums [R, MP] of a further tile, from the x that `fma` returned."""
    tiles, sums = (), _zeros(rows.shape[0], M, CHUNK)
    for c in tl.static_range(CHUNKS):
        tiles = tiles + (load_weights(w_ptr, rows, c * CHUNK + tl.arange(0, CHUNK), N, K, MASK_N, MASK_K, STREAM),)
    for c in tl.static_range(CHUNKS):
        sums = _add_products(sums, tiles[c], widened, c, M, DTYPE)
    return _columns(sums, M, MP)


@triton.jit
def _zeros(R: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr):
    """A sum [R, CHUNK] for each row of x: columns are added up last, when the loads are over."""
    sums = ()
    for _ in tl.static_range(M):
        sums = sums + (tl.zeros([R, CHUNK], tl.float32),)
    return sums


@triton.jit
def _add_products(sums, tile, widened, c: tl.constexpr, M: tl.constexpr, DTYPE: tl.constexpr):
    """Adds chunk c's products to the sums of M rows of x."""
    w_even, w_odd = widen(tile, DTYPE)
    added = ()
    for m in tl.static_range(M):
        x_even, x_odd = widened[c * M + m]
        added = added + (sums[m] + w_even * x_even + w_odd * x_odd,)
    return added


@triton.jit
def _columns(sums, M: tl.constexpr, MP: tl.constexpr):
    """Adds up the columns of M sums [R, CHUNK] and sets the results side by side: [R, MP]."""
    if MP == 1:
        out = tl.sum(sums[0], 1)[:, None]
    else:
        m = tl.arange(0, MP)[None, :]
        out = tl.zeros([sums[0].shape[0], MP], tl.float32)
        for i in tl.static_range(M):
            out = tl.where(m == i, tl.sum(sums[i], 1)[:, None], out)
    return out


# ---------------------------------------------------------------- the RMSNorm's factor


@triton.jit
def rms_factor(squares, K, eps):
    """1 / sqrt(mean(x^2) + eps) from the sums of x^2 over K columns."""
    return tl.rsqrt(squares * (1.0 / K) + eps)


@triton.jit
def load_folded(folded_ptr, M, FOLDED: tl.constexpr, ROWS: tl.constexpr):
    """A FoldedNorm's squares [ROWS, FOLDED padded], where there is one; of many rows their sums [ROWS, 1], for the registers'
    sake. To be called right after the wait, so that they are there when the sums of products are."""
    if FOLDED > 0:
        m = tl.minimum(tl.arange(0, ROWS), M - 1)
        p = tl.arange(0, triton.next_power_of_2(FOLDED))
        folded = tl.load(folded_ptr + m[:, None] * FOLDED + p[None, :], mask=(p < FOLDED)[None, :], other=0)
        if ROWS > 16:
            folded = tl.sum(folded, 1)[:, None]
    else:
        folded = 0.0
    return folded


@triton.jit
def norm_factor(squares, folded, K, eps, NORM: tl.constexpr, FOLDED: tl.constexpr, X_SCALE: tl.constexpr):
    """What the sums are still to be multiplied by, [1, MP] or [1, 1]: from `folded` where FOLDED, from `squares` where NORM."""
    if FOLDED > 0:
        factor = rms_factor(tl.sum(folded, 1)[None, :], K, eps) * (1 / X_SCALE)
    elif NORM:
        factor = rms_factor(squares, K, eps) * (1 / X_SCALE)
    else:
        factor = 1.0
    return factor


# ---------------------------------------------------------------- what RoPE and the cache need


@triton.jit
def token_positions(lengths_ptr, table_ptr, m, M, T, P, page_size):
    """Position and cache page of each row of x; a position below 0 where there is nothing to append."""
    sequence = m // T
    position = tl.load(lengths_ptr + sequence, mask=m < M, other=0) - T + m % T
    page = tl.load(table_ptr + sequence * P + position // page_size, mask=(m < M) & (position >= 0), other=0)
    return position, page.to(tl.int64)


@triton.jit
def rope_factors(cos_ptr, sin_ptr, pair, position, HALF: tl.constexpr):
    """cos and sin [pairs, MP]."""
    offset = tl.maximum(position, 0)[None, :] * HALF + pair[:, None]
    return tl.load(cos_ptr + offset), tl.load(sin_ptr + offset)


# ---------------------------------------------------------------- programs that share a tile


@triton.jit
def arrive(
    sums, squares, partial_ptr, squares_ptr, counter_ptr, group, part,
    PARTS: tl.constexpr, R: tl.constexpr, MP: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Stores this program's part of its group: `sums`, a tuple of [R, MP]. True in the last to arrive, which merges."""
    r, m = tl.arange(0, R), tl.arange(0, MP)
    program = group * PARTS + part
    for i in tl.static_range(len(sums)):
        tl.store(partial_ptr + (program * len(sums) + i) * (R * MP) + r[:, None] * MP + m[None, :], sums[i])
    if NORM:
        tl.store(squares_ptr + program * MP + m, tl.max(squares, 0))  # its rows are equal
    return arrives_last(counter_ptr + group, PARTS)


@triton.jit
def merge(
    partial_ptr, squares_ptr, group,
    S: tl.constexpr, TILES: tl.constexpr, SPLIT: tl.constexpr, R: tl.constexpr, MP: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """A group's sums, a tuple of S [TILES * R, MP], and sums of squares [1, MP]: the splits of K added in a fixed order."""
    row, m = tl.arange(0, TILES * R), tl.arange(0, MP)
    first = group * (TILES * SPLIT)
    squares = tl.zeros([1, MP], tl.float32)
    if NORM:
        for s in tl.static_range(SPLIT):  # other SMs wrote these: never from L1
            squares += tl.load(squares_ptr + (first + s) * MP + m[None, :], cache_modifier=".cg")
    sums = ()
    for i in tl.static_range(S):
        total = tl.zeros([TILES * R, MP], tl.float32)
        for s in tl.static_range(SPLIT):
            program = first + row // R * SPLIT + s
            address = partial_ptr + ((program * S + i) * (R * MP) + row % R * MP)[:, None] + m[None, :]
            total += tl.load(address, cache_modifier=".cg")
        sums = sums + (total,)
    return sums, squares


# ---------------------------------------------------------------- the tensor cores


@triton.jit
def dot(
    tiles, norms, x_ptr, w_ptr, norm_ptr, rows, k0, N, K, M,
    MP: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, PRELOAD: tl.constexpr, STAGES: tl.constexpr,
    NORM: tl.constexpr, MASK_N: tl.constexpr, MASK_K: tl.constexpr, STREAM: tl.constexpr, X_SCALE: tl.constexpr,
):  # fmt: skip
    """`fma` by tl.dot, weights as the large operand: the sums [R, MP] of X_SCALE * x * norm, and the sums of x^2 [1, MP]."""
    SQUARES: tl.constexpr = CHUNK // 8  # a thread loads 8 neighbours: summing those first needs no other thread
    sums = tl.zeros([R, MP], tl.float32)
    squares = tl.zeros([MP, SQUARES], tl.float32)
    xs = ()
    for c in tl.static_range(PRELOAD):  # all in flight at once: no load may pass the barriers that a dot brings
        xs = xs + (_load_rows(x_ptr, k0 + c * CHUNK + tl.arange(0, CHUNK), M, K, MP, MASK_K),)
    # What is preloaded comes first; of many rows it comes last, so that the loop's loads are not behind it.
    if MP <= 16:
        for c in tl.static_range(PRELOAD):
            sums, squares = _add_chunk(tiles[c], xs[c], norms[c] if NORM else None, sums, squares, X_SCALE)
    for c in tl.range(PRELOAD, CHUNKS, num_stages=STAGES):
        k = k0 + c * CHUNK + tl.arange(0, CHUNK)
        tile = load_weights(w_ptr, rows, k, N, K, MASK_N, MASK_K, STREAM)
        x = _load_rows(x_ptr, k, M, K, MP, MASK_K)
        norm = load_vector(norm_ptr, k, K, MASK_K) if NORM else None
        sums, squares = _add_chunk(tile, x, norm, sums, squares, X_SCALE)
    if MP > 16:
        for c in tl.static_range(PRELOAD):
            sums, squares = _add_chunk(tiles[c], hold(xs[c]), norms[c] if NORM else None, sums, squares, X_SCALE)
    return sums, tl.sum(squares, 1)[None, :]


@triton.jit
def _add_chunk(w, x, norm, sums, squares, X_SCALE: tl.constexpr):
    """Adds a chunk's w [R, CHUNK] @ (x [MP, CHUNK] * norm * X_SCALE).T to sums, and of a norm x^2 to squares."""
    if norm is not None:
        squares += _sum_squares(x, squares.shape[0], squares.shape[1])
        x = (x.to(tl.float32) * (norm.to(tl.float32) * X_SCALE)).to(x.dtype)
    return _dot(w, x, sums), squares


@triton.jit
def _dot(w, x, sums):
    """sums + w @ x.T"""
    if INTERPRETED:  # where bit patterns of bfloat16 would be multiplied
        w, x = w.to(tl.float32), x.to(tl.float32)
    return tl.dot(w, tl.trans(x), sums)


@triton.jit
def _load_rows(x_ptr, k, M, K, MP: tl.constexpr, MASK_K: tl.constexpr):
    """x[:, k] as [MP, CHUNK], zero below row M."""
    m = tl.arange(0, MP)
    mask = (m < M)[:, None]
    if MASK_K:
        mask = mask & (k < K)[None, :]
    return tl.load(x_ptr + m[:, None] * K + k[None, :], mask=mask, other=0)


@triton.jit
def _sum_squares(x, MP: tl.constexpr, SQUARES: tl.constexpr):
    x = x.to(tl.float32).reshape([MP, SQUARES, 8])
    return tl.sum(x * x, 2)


@triton.jit
def interleave(rows_a, rows_b, R: tl.constexpr):
    """The rows of a tile that holds pairs: row j is member j % 2 of pair j // 2."""
    return tl.join(rows_a, rows_b).reshape([R])


@triton.jit
def members(sums, PAIRS: tl.constexpr, R: tl.constexpr, MP: tl.constexpr):
    """A tile's sums [R, MP] as a tuple: the two members of its PAIRS, [R / 2, MP] each, or itself alone."""
    if PAIRS:
        a, b = tl.split(sums.reshape([R // 2, 2, MP]).permute(0, 2, 1))
        out = (a, b)
    else:
        out = (sums,)
    return out


@triton.jit
def multiply(
    tiles, norms, x_ptr, w_ptr, norm_ptr, rows, k0, N, K, M, addend,
    PAIRS: tl.constexpr, DOT: tl.constexpr, M_FMA: tl.constexpr, MP: tl.constexpr, R: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, PRELOAD: tl.constexpr, STAGES: tl.constexpr,
    NORM: tl.constexpr, MASK_N: tl.constexpr, MASK_K: tl.constexpr, STREAM: tl.constexpr,
    X_SCALE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """By tl.dot or by FMA: the sums as `members` gives them; the sums of x^2 [1, MP]; x for `fma_again`.

    addend [R, 1] (FMA, M = 1), or None: what the sums begin with.
    """
    if DOT:
        sums, squares = dot(
            tiles, norms, x_ptr, w_ptr, norm_ptr, rows, k0, N, K, M,
            MP, R, CHUNK, CHUNKS, PRELOAD, STAGES, NORM, MASK_N, MASK_K, STREAM, X_SCALE,
        )  # fmt: skip
        widened = ()
    else:
        sums, squares, widened = fma(
            tiles, norms, x_ptr, w_ptr, norm_ptr, rows, k0, N, K, addend,
            M_FMA, MP, CHUNK, CHUNKS, PRELOAD, NORM, MASK_N, MASK_K, STREAM, DTYPE,
        )  # fmt: skip
    return members(sums, PAIRS, R, MP), squares, widened


# ---------------------------------------------------------------- launching


def uses_kernel(x: torch.Tensor) -> bool:
    """Whether x goes through a Triton kernel: 16-bit on a GPU or under the interpreter."""
    return runs_kernels(x) and x.dtype in (torch.bfloat16, torch.float16)


class Operand(NamedTuple):
    """A weight as an operator takes it: packed ones in the kernels' order (formats.py)."""

    weight: torch.Tensor
    scale: torch.Tensor | None
    zero: torch.Tensor | None
    format: str
    rows: int  # N

    @classmethod
    def of(cls, weight: Weight) -> "Operand":
        """ValueError: a packed weight that was not tiled."""
        if not weight.in_kernels:
            raise ValueError(f"weight: found {weight.packed} as it is stored, expected it in the kernels' order (Weight.tile)")
        return cls(weight.weight, weight.scale, weight.zero, weight.format, weight.out_features)

    @property
    def is_packed(self) -> bool:
        return self.format in UNIT_COLUMNS

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """[N, K] in x's dtype."""
        if not self.is_packed:
            return self.weight
        return dequantize_tiled(self.weight, self.scale, self.zero, self.format, self.rows, x.shape[1]).to(x.dtype)


class FoldedNorm(NamedTuple):
    """What an RMSNorm of x [M, K] comes to, but for a factor a row: made by the kernel that made x (or rows.fold_norm), for
    those that read it."""

    scaled: torch.Tensor  # [M, K]: x times the norm's gain and x_scale
    squares: torch.Tensor  # [M, P] float32: the sums of x^2 over blocks of columns
    permuted: bool = False  # whether the columns of `scaled` are permuted, as some packed linears want them (_packed_ring.py)


def x_scale(dtype: torch.dtype) -> float:
    """x times a norm's gain, before the division by the root mean square, must not overflow float16."""
    return 1.0 / 64 if dtype == torch.float16 else 1.0


def split_norm(x: torch.Tensor, norm: torch.Tensor | FoldedNorm | None, x_permuted: bool = False) -> tuple:
    """(x, norm, squares, x_permuted) as the operators take them: of a FoldedNorm, x is the scaled one."""
    return (norm.scaled, None, *norm[1:]) if isinstance(norm, FoldedNorm) else (x, norm, None, x_permuted)


def fold_norm_ref(x, gain, block):
    """`FoldedNorm` of x [M, K], with sums over `block` columns each."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    blocks = torch.nn.functional.pad(wide.square(), (0, -x.shape[1] % block)).unflatten(1, (-1, block))
    return FoldedNorm((wide * (gain.to(wide.dtype) * x_scale(x.dtype))).to(x.dtype), blocks.sum(-1).to(torch.float32))


def apply_norm_ref(x, norm, squares, eps):
    """What is multiplied: x after its RMSNorm, of which all but a factor may be done; x itself without one."""
    if squares is None:
        return x if norm is None else rms_norm_ref(x, norm, eps)
    factor = torch.rsqrt(squares.sum(-1, keepdim=True) / x.shape[1] + eps) / x_scale(x.dtype)
    return (x.to(torch.promote_types(x.dtype, torch.float32)) * factor).to(x.dtype)


@torch.compiler.assume_constant_result
def _kernel_rows(N: int, K: int, device: int) -> int:
    return kernel_rows(N, K, num_sms(device))


@torch.compiler.assume_constant_result
def _has_ring(op: str, fmt: str, rows: int, N: int, K: int, device: int) -> bool:
    return tile_for(op, fmt, rows, N, K, num_sms(device), rings=True).ring


def reads_permuted(op: str, x: torch.Tensor, weight: Weight) -> bool:
    """Whether `op`, the linear that reads x [M, K] or what comes of it, wants its columns permuted: up to 64 rows of a packed
    weight, on Hopper. Whoever writes x can do that at no cost."""
    rows = x.shape[0]
    if weight.packed is None or not weight.in_kernels or is_batch_invariant():
        return False
    if not RING_LEAST[weight.format] <= rows <= MAX_ROWS:
        return False
    if not has_wgmma(x) or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    if weight.group_size not in (0, UNIT_COLUMNS["int4"]) or (weight.bias is not None and op != "qkv"):
        return False
    padded = 8 if rows <= 8 else 16 if rows <= 16 else 32 if rows <= 32 else 64  # a constant to torch.compile, whatever rows is
    return _has_ring(op, weight.format, padded, weight.out_features, weight.in_features, x.device.index or 0)


def beats_cublas(x: torch.Tensor, weight: Weight) -> bool:
    """Whether the kernels multiply x [M, K] by a plain weight faster than cuBLAS does."""
    return x.shape[0] <= _kernel_rows(weight.out_features, weight.in_features, x.device.index or 0)


def tile_of(op: str, x: torch.Tensor, w: Operand, rings: bool = False) -> Tile:
    """The tile of x @ weight.T; with a ring only if `rings`, and on the one kind of card that has what it takes. ValueError: it
    has a ring nevertheless, by an override."""
    (M, K), sms, rings = x.shape, num_sms(x.device.index or 0), rings and has_wgmma(x)
    tile = tile_for(op, w.format if w.is_packed else PLAIN_FORMATS[x.dtype], M, w.rows, K, sms, rings)
    if tile.ring and not rings:
        raise ValueError(f"Tile.ring: found one for {op}, expected none on this card or with these arguments")
    return tile


def rms_norm_ref(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 (float64 stays), rounded once to x.dtype."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rotate_ref(x, cos, sin):
    """x [N, heads, D] turned by cos and sin [N, 1, D / 2] (rotate-half), in float32 (float64 stays), rounded once."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def append_ref(caches, news, page, row, position):
    """Each of news [N, heads, D] into row `row` of page `page` [N] of its cache [pages, heads, S, D]. Never waits for the host.

    Where the position is below 0 there is nothing to append: such a row repeats the write of one that has a position, so that
    no two writes to one place differ; where none has, what was there is written again.
    """
    present = position >= 0
    source = torch.where(present, torch.arange(len(present), device=present.device), present.int().argmax())
    page, row = page[source], row[source]
    for cache, new in zip(caches, news, strict=True):
        rows = torch.where(present.any(), new[source], cache[page, :, row].to(new.dtype))
        cache[page, :, row] = saturated(rows, cache.dtype)


def check_matmul(x, w: Operand, bias, norm, squares=None):
    """The operands that every operator here shares."""
    weight, N = w.weight, w.rows
    if x.dim() != 2:
        raise ValueError(f"x: found {tuple(x.shape)}, expected [M, K]")
    M, K = x.shape
    shape, dtype = (N, K), x.dtype
    if w.is_packed:
        shape, dtype = (-(-N // 8), -(-K // UNIT_COLUMNS[w.format]), 32, 4), torch.int32
    if weight.shape != shape:
        raise ValueError(f"x and weight: found {tuple(x.shape)} and {tuple(weight.shape)}, expected [M, K] and {list(shape)}")
    if not 1 <= M <= MAX_ROWS:
        raise ValueError(f"x: found {M} rows, expected 1 to {MAX_ROWS}")
    if K % 64:
        raise ValueError(f"weight: found {N} x {K}, expected a multiple of 64 columns")
    for name, t, t_dtype, size in (("weight", weight, dtype, None), ("bias", bias, x.dtype, N), ("norm", norm, x.dtype, K)):
        if t is not None and (t.dtype != t_dtype or (size is not None and t.shape != (size,))):
            expected = f"{t_dtype}" if size is None else f"{t_dtype} [{size}]"
            raise ValueError(f"{name}: found {t.dtype} {list(t.shape)}, expected {expected}")
    if squares is not None and (
        norm is not None or squares.dim() != 2 or squares.shape[0] != M or squares.dtype != torch.float32
    ):
        found = f"{squares.dtype} {list(squares.shape)}{' and a norm' if norm is not None else ''}"
        raise ValueError(f"squares: found {found}, expected float32 [{M}, P] and no norm")
    for name, t in (("x", x), ("weight", weight), ("scale", w.scale), ("zero", w.zero), ("squares", squares)):
        if t is not None and not t.is_contiguous():
            raise ValueError(f"{name}: found strides {t.stride()}, expected a contiguous tensor")


def matmul_arguments(tile: Tile, x, w: Operand, norm, squares) -> tuple[dict, dict]:
    """What every kernel built on these loops is launched with: (arguments, Triton's own options)."""
    arguments = _packed_arguments(tile, x, w) if w.is_packed else _plain_arguments(tile, x, w)
    arguments |= {
        "norm_ptr": norm if norm is None or tile.dot else norm.view(torch.int32),
        "folded_ptr": squares,
        "FOLDED": 0 if squares is None else squares.shape[1],
        "X_SCALE": x_scale(x.dtype) if tile.dot or squares is not None else 1.0,
        "DTYPE": {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[x.dtype],
    }
    options = {"num_warps": tile.warps, **({"maxnreg": tile.registers} if tile.registers else {}), **launch_options(x)}
    return arguments, options


def _plain_arguments(tile: Tile, x, w: Operand) -> dict:
    (M, K), N, weight = x.shape, w.rows, w.weight
    words = 1 if tile.dot else 2  # columns in an element of the kernel's pointers
    columns, chunk = K // words, max(16, tile.chunk // words)
    chunks = triton.cdiv(triton.cdiv(columns, chunk), tile.split)
    return {
        "x_ptr": x if tile.dot else x.view(torch.int32),
        "w_ptr": weight if tile.dot else weight.view(torch.int32),
        "M": M,
        "N": N,
        "K": K,
        "columns": columns,
        "DOT": tile.dot,
        "M_FMA": 0 if tile.dot else M,
        "MP": max(tile.padded, triton.next_power_of_2(M)) if tile.dot else triton.next_power_of_2(M),
        "R": tile.rows,
        "CHUNK": chunk,
        "CHUNKS": chunks,
        "PRELOAD": chunks if tile.grid else min(tile.preload, chunks),
        "STAGES": tile.stages,
        "MASK_N": N % tile.rows != 0,
        "MASK_K": chunk * chunks * tile.split != columns,
        "STREAM": tile.stream,
        "scale_ptr": None,
        "zero_ptr": None,
        "FORMAT": "plain",
        "GROUPS": 0,
        "WARPS": tile.warps,
        "PARTS": 1,
        "BLOCKS": 1,
    }


def _packed_arguments(tile: Tile, x, w: Operand) -> dict:
    """Of a kernel on a packed weight: `columns` counts units, CHUNK the units of a step of all warps, CHUNKS the steps."""
    (M, K), units = x.shape, w.weight.shape[1]
    parts, blocks = packed_shape(tile, w.format)
    steps = triton.cdiv(units, parts * tile.split)
    preload = min(tile.preload, steps)
    steps = triton.cdiv(steps, preload) * preload
    every = tile.padded == MAX_ROWS  # whatever M is, the same program
    return {
        "x_ptr": x,
        "w_ptr": w.weight,
        "scale_ptr": w.scale,
        "zero_ptr": w.zero,
        "M": M,
        "N": w.rows,
        "K": K,
        "columns": units,
        "DOT": True,
        "M_FMA": int(M == 1 and not every),
        "MP": tile.padded if every else max(8, triton.next_power_of_2(M)),
        "R": tile.rows,
        "CHUNK": parts,
        "CHUNKS": steps,
        "PRELOAD": preload,
        "STAGES": 1,
        "MASK_N": w.rows % tile.rows != 0,
        "MASK_K": parts * steps * tile.split * UNIT_COLUMNS[w.format] != K,
        "STREAM": tile.stream,
        "FORMAT": w.format,
        "GROUPS": w.scale.shape[-1] if w.format == "int4" else 0,
        "WARPS": tile.warps,
        "PARTS": parts,
        "BLOCKS": blocks,
    }


def scratch(x, programs: int, tile: Tile, MP: int, groups: int, squares: bool = True) -> dict:
    """Memory through which the programs of a group meet: sums, those of x^2 (if `squares`) and a counter; nothing where each is
    alone."""
    if groups > MAX_GROUPS and groups != programs:
        raise ValueError(f"a split matmul: found {groups} groups of programs, expected at most {MAX_GROUPS}")

    def floats(each: int) -> torch.Tensor | None:
        return None if groups == programs else torch.empty(programs * each, dtype=torch.float32, device=x.device)

    counter = None if groups == programs else zeroed_workspace(x.device, "counters of split matmuls", MAX_GROUPS)
    memory = {"partial_ptr": floats(tile.rows * MP), "counter_ptr": counter}
    return memory | ({"squares_ptr": floats(MP)} if squares else {})
