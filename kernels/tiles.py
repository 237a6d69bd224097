"""Tiles: how a small-batch matmul is cut into programs.

Owns the measured table, the fall-back rule behind it, and the override that a tuner uses. Knows no kernel.
Letters: M rows of x, N output features, K input features. `op` is one of OPS.
"""

import dataclasses
import itertools
from dataclasses import dataclass

from kernels._common import Setting
from kernels.formats import UNIT_COLUMNS

OPS = ("linear", "silu_mul", "qkv", "head")
LEAST_ROWS = {"linear": 1, "silu_mul": 2, "qkv": 2, "head": 4}  # pairs; four random words at a time
FMA_MOST_ROWS = 4  # of x: beyond, the products take more instructions than the bytes give time for
FMA_RULE_ROWS = 2  # of x: up to here the rule takes FMA
PLAIN_ROWS = 16  # of x: beyond, cuBLAS multiplies plain weights, but for KERNEL_ROWS
MAX_ROWS = 64  # of x: beyond, a matmul is no longer bound by the weights' bytes, and no kernel takes it
SHARED_BYTES = 227 * 1024  # shared memory a program may have (Hopper)
RING_BYTES = SHARED_BYTES - 1024  # less barriers, and what the compiler needs
RING_ROWS = 128  # weight rows of a program whose plain weights go through a ring (_ring.py)
RING_LEAST = {"int8": 2, "fp8": 2, "int4": 9}  # rows of x from which on packed weights go through a ring (_packed_ring.py)


def floor_power_of_two(n: int) -> int:
    return 1 << (max(n, 1).bit_length() - 1)


@dataclass(frozen=True)
class Tile:
    """One launch choice. A program computes `rows` output features from `chunk` columns at a time."""

    rows: int  # weight rows a program holds; gate and up, and the two halves of a RoPE pair, count as two
    chunk: int  # columns of one load step, a power of two; of packed weights all warps' units together
    warps: int
    preload: int = 64  # chunks (packed weights: a warp's units) loaded before the dependency wait, and kept in flight after it
    dot: bool = False  # multiply by tl.dot on the tensor cores; else by FMA, M <= FMA_MOST_ROWS
    split: int = 1  # programs that share one tile's K; the last to arrive merges
    stages: int = 1  # pipeline depth of the loads behind the preloaded ones
    grid: int = 0  # persistent programs per SM, each looping over its tiles (FMA only); 0 = one program a tile
    stream: bool = False  # mark weights evict-first, so that x and the norm's weight keep their place in L1
    padded: int = 16  # rows of x that a dot multiplies, at least; those that there are not count as zeros
    registers: int | None = None  # limit per thread: fewer lets the next kernel's programs become resident earlier
    ring: bool = False  # a ring of `stages` chunks in shared memory: plain weights (_ring.py) by RING_ROWS rows and 4 warps,
    # packed ones (_packed_ring.py) by 16 rows for each of 4 or 8 warps

    def __post_init__(self):
        for name in ("rows", "chunk", "warps"):
            value = getattr(self, name)
            assert value == floor_power_of_two(value), f"Tile.{name}: found {value}, expected a power of two"
        assert not (self.grid and (self.dot or self.split > 1)), "Tile.grid: a persistent grid takes neither dot nor split"
        shape = (self.rows, self.warps)
        assert not self.ring or (shape in ((RING_ROWS, 4), (128, 8), (64, 4)) and self.stages >= 2), (
            "Tile.ring: found other fields"
        )


def ring_tile(chunk: int, stages: int, split: int = 1) -> Tile:
    return Tile(RING_ROWS, chunk, 4, dot=True, split=split, stages=stages, ring=True)


def packed_ring_tile(rows: int, chunk: int, stages: int, split: int = 1, registers: int | None = None) -> Tile:
    return Tile(rows, chunk, rows // 16, dot=True, split=split, stages=stages, ring=True, registers=registers)


# ---------------------------------------------------------------- the measured table

# By (SMs, format, rows of x as `measured_rows` has them, op, N, K). One H200 (132 SMs), by scripts/tune.py: inside whole decode
# steps, because a kernel alone chooses larger tiles than a chain of kernels that preload beside each other.
MEASURED = {
    # Llama-3.2-1B, 1 row: 634.9 us a step
    (132, "bf16", 1, "qkv", 3072, 2048): Tile(4, 1024, 2, preload=1, registers=128),
    (132, "bf16", 1, "linear", 2048, 2048): Tile(2, 256, 1, preload=8, registers=128),
    (132, "bf16", 1, "silu_mul", 16384, 2048): Tile(4, 1024, 2, preload=2, grid=8, stages=2),
    (132, "bf16", 1, "linear", 2048, 8192): Tile(8, 1024, 4, preload=4),
    (132, "bf16", 1, "head", 128256, 2048): Tile(4, 256, 1, preload=4, stream=True),
    # 8 rows: without rings 813.4, with qkv's last 721.2; 16: 824.8, 774.1 (with qkv's 780.8)
    (132, "bf16", 8, "qkv", 3072, 2048): ring_tile(256, 2, 4),
    (132, "bf16", 8, "linear", 2048, 2048): ring_tile(128, 5, 4),
    (132, "bf16", 8, "silu_mul", 16384, 2048): ring_tile(64, 12),
    (132, "bf16", 8, "linear", 2048, 8192): ring_tile(128, 6, 8),
    (132, "bf16", 16, "qkv", 3072, 2048): Tile(64, 512, 4, preload=1, dot=True, split=4),
    (132, "bf16", 16, "linear", 2048, 2048): ring_tile(128, 4, 4),
    (132, "bf16", 16, "silu_mul", 16384, 2048): ring_tile(64, 12),
    (132, "bf16", 16, "linear", 2048, 8192): ring_tile(64, 8, 8),
    (132, "bf16", 16, "head", 128256, 2048): Tile(128, 128, 8, preload=2, dot=True, stages=3, stream=True),
    (132, "bf16", 64, "silu_mul", 16384, 2048): ring_tile(64, 8),  # by cuBLAS 1149.7, so 1103.8
    (132, "bf16", 64, "qkv", 3072, 2048): ring_tile(128, 4, 4),  # by cuBLAS 1092.9, so 1069.2
    # Llama-3.2-3B: 1700.1
    (132, "bf16", 1, "qkv", 5120, 3072): Tile(4, 256, 1, preload=3),
    (132, "bf16", 1, "linear", 3072, 3072): Tile(2, 512, 1, preload=3, registers=96),
    (132, "bf16", 1, "silu_mul", 16384, 3072): Tile(16, 512, 2, preload=2),
    (132, "bf16", 1, "linear", 3072, 8192): Tile(2, 1024, 4, preload=8),
    (132, "bf16", 1, "head", 128256, 3072): Tile(4, 1024, 4, preload=4, stream=True),
    # Llama-3.1-8B: 3690.5; on another card 3730.5, and 3713.4 with the qkv and linear of today
    (132, "bf16", 1, "qkv", 6144, 4096): Tile(8, 1024, 2, preload=2, stream=True),
    (132, "bf16", 1, "linear", 4096, 4096): Tile(1, 512, 1, preload=2, registers=96),
    (132, "bf16", 1, "silu_mul", 28672, 4096): Tile(2, 256, 1, preload=16, stream=True),
    (132, "bf16", 1, "linear", 4096, 14336): Tile(1, 2048, 16, preload=3),
    (132, "bf16", 1, "head", 128256, 4096): Tile(8, 1024, 8, grid=2, stages=2),
    # without rings, with rings but for qkv, and with all: 8 rows 4064.1, 3942.6, 3869.1; 16 rows 4106.2, 4059.5, 3969.4;
    # without and with: 32 rows 4404.9, 4335.2; 64 rows 4772.8, 4733.3
    (132, "bf16", 8, "qkv", 6144, 4096): ring_tile(128, 6, 2),
    (132, "bf16", 8, "linear", 4096, 4096): ring_tile(64, 8, 4),
    (132, "bf16", 8, "silu_mul", 28672, 4096): ring_tile(128, 4),
    (132, "bf16", 8, "linear", 4096, 14336): ring_tile(128, 5, 4),
    (132, "bf16", 16, "qkv", 6144, 4096): ring_tile(128, 6, 2),
    (132, "bf16", 16, "linear", 4096, 4096): ring_tile(64, 12, 4),
    (132, "bf16", 16, "silu_mul", 28672, 4096): ring_tile(128, 4),
    (132, "bf16", 16, "linear", 4096, 14336): ring_tile(128, 5, 4),
    (132, "bf16", 16, "head", 128256, 4096): Tile(128, 128, 8, preload=1, dot=True, stages=4),
    (132, "bf16", 32, "linear", 4096, 4096): ring_tile(64, 8, 4),
    (132, "bf16", 32, "silu_mul", 28672, 4096): ring_tile(128, 4),
    (132, "bf16", 32, "linear", 4096, 14336): ring_tile(128, 4, 4),
    (132, "bf16", 64, "silu_mul", 28672, 4096): ring_tile(128, 4),
    (132, "bf16", 64, "qkv", 6144, 4096): ring_tile(128, 4, 2),  # by cuBLAS 4854.4, so 4771.4
    # packed, Llama-3.1-8B, 1 row: int8 2374.8 by the rule of old, 2148.8 so; fp8 2339.8 and 2190.8; int4 1619.5 and 1481.5
    (132, "int8", 1, "qkv", 6144, 4096): Tile(16, 256, 4, preload=8, dot=True),
    (132, "int8", 1, "linear", 4096, 4096): Tile(16, 512, 8, preload=8, dot=True, registers=96),
    (132, "int8", 1, "silu_mul", 28672, 4096): Tile(32, 256, 4, preload=4, dot=True, registers=128),
    (132, "int8", 1, "linear", 4096, 14336): Tile(16, 1024, 16, preload=2, dot=True),
    (132, "fp8", 1, "qkv", 6144, 4096): Tile(16, 256, 4, preload=8, dot=True),
    (132, "fp8", 1, "linear", 4096, 4096): Tile(16, 512, 8, preload=8, dot=True, registers=96),
    (132, "fp8", 1, "silu_mul", 28672, 4096): Tile(32, 256, 4, preload=4, dot=True, stream=True, registers=128),
    (132, "fp8", 1, "linear", 4096, 14336): Tile(16, 512, 8, preload=7, dot=True, registers=112),
    (132, "int4", 1, "qkv", 6144, 4096): Tile(32, 512, 4, preload=8, dot=True),
    (132, "int4", 1, "linear", 4096, 4096): Tile(32, 1024, 8, preload=4, dot=True),
    (132, "int4", 1, "silu_mul", 28672, 4096): Tile(64, 256, 4, preload=2, dot=True),
    (132, "int4", 1, "linear", 4096, 14336): Tile(16, 2048, 16, preload=1, dot=True),
    # Llama-3.2-1B, 1 row: fp8 575.3 and 488.6, int4 423.9 and 374.7
    (132, "fp8", 1, "qkv", 3072, 2048): Tile(32, 512, 8, preload=4, dot=True),
    (132, "fp8", 1, "linear", 2048, 2048): Tile(16, 512, 8, preload=4, dot=True),
    (132, "fp8", 1, "silu_mul", 16384, 2048): Tile(32, 256, 4, preload=8, dot=True),
    (132, "fp8", 1, "linear", 2048, 8192): Tile(16, 1024, 16, preload=8, dot=True),
    (132, "int4", 1, "qkv", 3072, 2048): Tile(16, 1024, 8, preload=2, dot=True),
    (132, "int4", 1, "linear", 2048, 2048): Tile(16, 1024, 8, preload=2, dot=True),
    (132, "int4", 1, "silu_mul", 16384, 2048): Tile(32, 512, 4, preload=4, dot=True, registers=128),
    (132, "int4", 1, "linear", 2048, 8192): Tile(16, 2048, 16, preload=4, dot=True),
    # Llama-3.1-8B through rings: without them, by the rule, and so: fp8 64 rows 7937, 3889, 3827; int4 16 rows 2707, 2202,
    # 2110; 64 rows 7949, 3552, 3503; fp8 8 rows 2770, 2598, 2466, and int4 1815, 2028, 1961, so that it has none there. Since
    # warps wait by themselves: fp8 16 rows 2496.4 by the rule, 2472.3 so; int4 16 rows 1752.7, 1691.4 by a wider gate/up.
    (132, "fp8", 8, "qkv", 6144, 4096): packed_ring_tile(128, 128, 6, 4),
    (132, "fp8", 8, "linear", 4096, 4096): packed_ring_tile(128, 128, 7, 4),
    (132, "fp8", 8, "silu_mul", 28672, 4096): packed_ring_tile(128, 128, 6),
    (132, "fp8", 8, "linear", 4096, 14336): packed_ring_tile(128, 128, 6, 8),
    (132, "fp8", 16, "linear", 4096, 14336): packed_ring_tile(128, 128, 5, 8),
    (132, "fp8", 64, "qkv", 6144, 4096): packed_ring_tile(128, 128, 6, 2),
    (132, "fp8", 64, "linear", 4096, 4096): packed_ring_tile(64, 128, 4, 4),
    (132, "fp8", 64, "silu_mul", 28672, 4096): packed_ring_tile(128, 128, 3, registers=128),
    (132, "fp8", 64, "linear", 4096, 14336): packed_ring_tile(64, 128, 4, 4),
    (132, "int4", 16, "qkv", 6144, 4096): packed_ring_tile(128, 256, 3, 4),
    (132, "int4", 16, "linear", 4096, 4096): packed_ring_tile(64, 256, 7, 2),
    (132, "int4", 16, "silu_mul", 28672, 4096): packed_ring_tile(128, 256, 4),
    (132, "int4", 16, "linear", 4096, 14336): packed_ring_tile(64, 256, 3, 8),
    (132, "int4", 64, "qkv", 6144, 4096): packed_ring_tile(128, 128, 9, 2),
    (132, "int4", 64, "linear", 4096, 4096): packed_ring_tile(64, 128, 5, 4),
    (132, "int4", 64, "silu_mul", 28672, 4096): packed_ring_tile(128, 128, 4, registers=128),  # two a multiprocessor
    (132, "int4", 64, "linear", 4096, 14336): packed_ring_tile(64, 128, 5, 4),
    # Qwen3-8B: 3837.7, with a qkv of Tile(8, 1024, 2, preload=1)
    (132, "bf16", 1, "silu_mul", 24576, 4096): Tile(8, 1024, 2, preload=1, stream=True),
    (132, "bf16", 1, "linear", 4096, 12288): Tile(1, 2048, 8, stream=True),
    (132, "bf16", 1, "head", 151936, 4096): Tile(4, 1024, 4, preload=4),
    # Qwen2.5-7B: 3398.0
    (132, "bf16", 1, "qkv", 4608, 3584): Tile(2, 256, 1, preload=4),
    (132, "bf16", 1, "linear", 3584, 3584): Tile(4, 512, 1, preload=4),
    (132, "bf16", 1, "silu_mul", 37888, 3584): Tile(4, 256, 1, preload=7, stream=True),
    (132, "bf16", 1, "linear", 3584, 18944): Tile(1, 2048, 8, stream=True),
    (132, "bf16", 1, "head", 152064, 3584): Tile(4, 1024, 4, preload=4, registers=168),
}


# By (SMs, N, K): up to so many rows of x the kernels multiply plain weights faster than cuBLAS. Measured in whole steps before
# there were rings, us (cuBLAS): at 32 rows the 1B 974.8 (1071.7), the 8B 4412 (4728); at 64, mixed so, 1104 (1120) and 4687
# (4917). At 64 rows the kernels took longer for the 3B, 3164 (2617), Qwen2.5-7B, 6030 (4583), and Qwen3-8B, 5172 (4961). Since
# then, with a token of its own in each row, wo of the 1B at 64 rows: 1129.5 (1149.7), and gate/up and qkv as above;
# Qwen3-8B's and Mistral's qkv have the 8B's shape, and are not measured at 64 rows.
KERNEL_ROWS = {
    (132, 128256, 2048): 32,
    **dict.fromkeys([(132, 3072, 2048), (132, 2048, 2048), (132, 16384, 2048), (132, 2048, 8192)], 64),
    **dict.fromkeys([(132, 6144, 4096), (132, 4096, 4096), (132, 28672, 4096), (132, 4096, 14336), (132, 128256, 4096)], 64),
}

# By (SMs, N, K): from how many to how many rows of x one kernel for gate/up and SiLU x up (gate_up.py) takes less time than
# cuBLAS and silu_mul do. One H200, random data, us a call: 65 rows 66.7 (65.5), 96 rows 62.2 (66.9), 128 rows 62.1 (72.1);
# padded to 256: 136 rows 97.4 (71.2), 192 rows 83.4 (84.1), 224 rows 87.0 (92.4), 256 rows 88.3 (101.3). A prefill's, by half
# seconds of nothing else: 512 rows 180.6 (193.7), 2,048 rows 700 (766), 8,192 rows 2,794 (2,950). Between those by what padding
# to 256 costs: up to 1,536 rows where it is less than 128.
GATE_UP_ROWS = {
    (132, 28672, 4096): ((80, 128), (193, 256), *((n - 127, n) for n in (512, 768, 1024, 1280, 1536)), (1537, 8192)),
}

# ---------------------------------------------------------------- choosing


def choose_tile(op: str, fmt: str, rows: int, N: int, K: int, sms: int, rings: bool = False) -> Tile:
    """The tile for `rows` rows of x: the measured one where there is one, else the rule; with a ring only if `rings`. Pure."""
    assert op in OPS, f"op: found {op!r}, expected one of {', '.join(OPS)}"
    alike = {"fp16": "bf16", "int8": "fp8"}  # the same bytes in the same order
    rings = rings and rows >= RING_LEAST.get(fmt, 0)  # the tile for 16 rows may have one that 8 are not to have
    for name, padded in itertools.product((fmt, alike.get(fmt)), measured_rows(rows)):
        measured = MEASURED.get((sms, name, padded, op, N, K))
        if measured is not None and (rings or not measured.ring):
            return measured
    if fmt in UNIT_COLUMNS:
        return (rings and _packed_ring_rule(op, fmt, rows, N, K, sms)) or _packed_rule(op, fmt, rows, N, K, sms)
    if rows <= FMA_RULE_ROWS:
        return _fma_rule(op, N, K, sms)
    return (rings and rows <= PLAIN_ROWS and _ring_rule(op, rows, N, K, sms)) or _dot_rule(op, rows, N, K, sms)


def kernel_rows(N: int, K: int, sms: int) -> int:
    """Rows of x up to which plain weights [N, K] are for the kernels; beyond, for cuBLAS. An overridden tile is to be used."""
    if any(key[1:] == (N, K) for key in _overrides.value if isinstance(key, tuple)):
        return MAX_ROWS
    return KERNEL_ROWS.get((sms, N, K), PLAIN_ROWS)


def folds_norm(*formats) -> bool:
    """Whether an RMSNorm between two linears is folded into the first one's kernel: where both weights are packed.

    formats: of the two weights, None for plain ones. By FMA a norm is free, from loads before the wait; at 16 rows plain
    weights lose in wo and down more than they gain in qkv and gate/up (a step of the 1B on an H200: 840.3 us, without 829.6).
    """
    return all(fmt is not None for fmt in formats)


def fold_block(rows: int, fmt, ring: bool = False) -> int:
    """Output features behind one sum of squares of a folded norm, for a first weight in this format: few enough that every tile
    computes whole blocks. A ring's tiles have 64 at least."""
    return 16 if fmt is not None and rows <= 16 and not (is_batch_invariant() or ring) else 64


def measured_rows(rows: int) -> tuple[int, ...]:
    """The rows under which a tile for `rows` rows of x may stand in the table, the nearest first: a tile for up to 16 rows
    serves 3 as well."""
    if rows <= FMA_RULE_ROWS:
        return (1,) if rows == 1 else (rows, 8)
    return (8, 16) if rows <= 8 else (1 << (rows - 1).bit_length(),)


def ring_padded(rows: int) -> int:
    """Rows of x that a ring's kernel multiplies: a power of two from 8 on."""
    return max(8, 1 << (rows - 1).bit_length())


def invariant_tile(op: str, fmt: str, N: int, K: int, sms: int) -> Tile:
    """The tile that serves every number of rows alike, so that a row's result does not depend on its neighbours.

    Padding to all 64 rows makes the program itself the same: with fewer, the compiler would add up in another order.
    """
    tile = _packed_rule(op, fmt, 64, N, K, sms) if fmt in UNIT_COLUMNS else _dot_rule(op, 64, N, K, sms)
    return dataclasses.replace(tile, padded=64)


def _fma_rule(op: str, N: int, K: int, sms: int) -> Tile:
    """32 KiB of weights a program over 4 warps: 64 registers of loads a thread, several programs an SM."""
    warps = 8 if K > 8192 else 4
    chunk = fma_chunk(K, warps)
    rows = max(LEAST_ROWS[op], min(8, floor_power_of_two(16384 // K)))
    while rows > LEAST_ROWS[op] and N // rows < 2 * sms:  # at least two programs an SM, for their loads to overlap
        rows //= 2
    return Tile(rows, chunk, warps, preload=max(1, 4096 * warps // (rows * chunk)))


def _split(op: str, programs: int, wanted: float, most: int, shares: int) -> int:
    """How many programs share a tile's K, so that there are `wanted` of them: a power of two up to `most` and to `shares`."""
    split = 1
    while op != "head" and split < most and programs * split < wanted and shares >= 2 * split:
        split *= 2
    return split


def _dot_rule(op: str, rows: int, N: int, K: int, sms: int) -> Tile:
    """128 weight rows a program, because every program reads x again; K split until nearly every SM has a program. Where that
    leaves a program few columns, 64 rows, and all of them before the wait."""
    if rows > PLAIN_ROWS:
        return _many_rows_rule(op, N, K, sms)
    chunk = power_divisor(K, 128)
    for height in (128, 64):
        split = _split(op, -(-N // height), 0.9 * sms, 8, K // (2 * chunk))
        strip = K // split  # columns of one program
        if height == 128 and strip >= 1024:
            preload, stages = (1, 4) if split == 1 else (3, 3)
            return Tile(height, chunk, 8, preload=preload, dot=True, split=split, stages=stages)
    if strip <= 512 and strip == floor_power_of_two(strip):
        return Tile(height, strip, 4, preload=1, dot=True, split=split)
    return Tile(height, chunk, 4, preload=1, dot=True, split=split, stages=4)


def _ring_rule(op: str, rows: int, N: int, K: int, sms: int) -> Tile | None:
    """All of shared memory for one program a multiprocessor, if need be by splitting K; 150 KB where a multiprocessor takes
    one program after another, so that the next one's shared memory is free earlier."""
    if op not in ("linear", "silu_mul") or N % RING_ROWS:
        return None
    splits = (1,) if op == "silu_mul" else (8, 4, 2, 1)
    for split, stages in itertools.product(splits, (6, 5, 4)):
        tile, programs = ring_tile(128, stages, split), N // RING_ROWS * split
        alone = programs <= sms and (split == 1 or 512 * split <= K)
        fits = K % (128 * split) == 0 and ring_bytes(tile, rows) <= RING_BYTES
        if fits and (alone or (split == 1 and stages == 4)):
            return tile
    return None


def _packed_ring_rule(op: str, fmt: str, rows: int, N: int, K: int, sms: int) -> Tile | None:
    """Two programs a multiprocessor, so that one widens codes while the other's are multiplied. (int4's registers leave room
    for one where x has more than 16 rows; that took no longer.) With more than 32 rows, one for each multiprocessor where that
    makes all run at once: x then weighs as much as the codes, and every program reads it. As many stages as there is room
    for."""
    height, widest = 64 if op == "linear" else 128, 2 * UNIT_COLUMNS[fmt]
    programs = -(-N // height)
    if K % widest or (programs > 4096 if op == "head" else N % height):
        return None
    most = sms if rows > 32 else 2 * sms
    found = []
    for chunk in (widest, widest // 2):
        split = 1
        while op in ("linear", "qkv") and split < 4 and 2 * split * programs <= most and K % (2 * split * chunk) == 0:
            split *= 2
        each, registers = 1 if programs * split <= sms else 2, 128 if op == "head" else None
        found.append(_deepest_packed_ring(fmt, rows, K, height, chunk, split, each, registers))
    return max((tile for tile in found if tile and tile.stages > 2), key=lambda tile: tile.split, default=None)


def _many_rows_rule(op: str, N: int, K: int, sms: int) -> Tile:
    """Rows of x that weigh as much as the weights, and that every program reads again: the tallest tile that gives 70% of the
    multiprocessors a program, if need be by splitting K (tiles and share as measured for the 8B)."""
    tall = power_divisor(K, 64)
    tiles = (
        Tile(256, tall, 8, preload=1, dot=True, stages=4),
        Tile(128, tall, 8, preload=2, dot=True, split=2, stages=5),
        Tile(64, power_divisor(K, 128), 4, preload=1, dot=True, split=8, stages=5),
    )
    for tile in tiles:
        programs = -(-N // tile.rows)
        split = _split(op, programs, 0.7 * sms, tile.split, K // (2 * tile.chunk))
        if programs * split >= 0.7 * sms:
            break
    return dataclasses.replace(tile, split=split)


def _packed_rule(op: str, fmt: str, rows: int, N: int, K: int, sms: int) -> Tile:
    """Up to 16 rows of x: two blocks of 16 weight rows a program, K split over its warps. Beyond, and from 9 on for a large
    weight, x weighs more than the weights: 128 weight rows share what a program reads of it."""
    unit = UNIT_COLUMNS[fmt]
    units = -(-K // unit)
    if rows > 16:
        split = _split(op, -(-N // 128), sms, 4, units // 4)
        return packed_tile(fmt, 128, 1, 4, 1, K, split)
    if rows > 8 and op != "head" and 128 * sms <= N:
        return packed_tile(fmt, 128, 4, 8, 2, K)
    if op == "head" and N > 32 * 4096:
        height = 64
    else:
        height = 32 if 32 * sms <= N else 16
    programs = N // height
    few, many = rows <= 8 and programs < 2 * sms, programs >= 4 * sms
    if few and units >= 64:  # long rows: all of a multiprocessor's registers for one program, or half where two shall run
        alone = programs <= sms
        return packed_tile(fmt, height, 16, 16, 8 if alone else 1 if fmt == "int4" else 2, K)
    warps = 4 if many or units < 16 else 8
    if few:
        preload = 8
    else:
        preload = 2 if fmt == "int4" or rows > 8 else 4
    registers = 128 if many and rows == 1 and op != "head" else None  # four programs a multiprocessor
    return packed_tile(fmt, height, warps, warps, preload, K, registers=registers)


def packed_tile(fmt: str, rows: int, parts: int, warps: int, preload: int, K: int, split: int = 1, **more) -> Tile:
    """A tile for packed weights: `parts` of the warps share rows and split K; `preload` units a warp at most, a divisor of
    all that it passes."""
    steps = -(-K // (UNIT_COLUMNS[fmt] * parts * split))
    preload = next(p for p in range(min(preload, steps), 0, -1) if steps % p == 0)
    return Tile(rows, UNIT_COLUMNS[fmt] * parts, warps, preload, dot=True, split=split, **more)


def packed_shape(tile: Tile, fmt: str) -> tuple[int, int]:
    """How a program's warps share a packed tile: (warps that split K between them, blocks of 16 rows a warp)."""
    parts = min(tile.warps, max(tile.chunk // UNIT_COLUMNS[fmt], 16 * tile.warps // tile.rows))
    return parts, tile.rows * parts // (16 * tile.warps)


def candidate_tiles(op: str, rows: int, N: int, K: int, fmt: str = "bf16") -> list[Tile]:
    """The tiles worth measuring for one shape inside the whole step."""
    packed = fmt if fmt in UNIT_COLUMNS else None
    tiles = (
        _packed_ring_candidates(op, fmt, rows, N, K) + _packed_candidates(op, fmt, rows, N, K)
        if packed
        else _ring_candidates(op, rows, N, K) + _fma_candidates(op, rows, N, K) + _dot_candidates(op, rows, N, K)
    )
    if op == "linear" and folds_norm(packed):
        tiles = [t for t in tiles if t.rows % fold_block(rows, packed) == 0]
    return tiles


def ring_bytes(tile: Tile, M: int) -> int:
    """Shared memory of a ring's program: weights, x and a norm's gain, and x times the gain twice."""
    MP = ring_padded(M)
    return 2 * tile.chunk * (tile.stages * (RING_ROWS + MP + 1) + 2 * MP)


def _packed_stage_bytes(fmt: str, M: int, rows: int, chunk: int) -> int:
    """Of a packed ring's stage: codes, x, int4's scales and zeros."""
    units = chunk // UNIT_COLUMNS[fmt]
    return 64 * rows * units + 2 * chunk * ring_padded(M) + (6 * rows * units if fmt == "int4" else 0)


PACKED_RING_SPARE = 2048  # bytes of shared memory beside the stages, for the compiler and the card


def packed_ring_bytes(tile: Tile, fmt: str, M: int) -> int:
    """Shared memory of a packed ring's program."""
    return tile.stages * _packed_stage_bytes(fmt, M, tile.rows, tile.chunk) + PACKED_RING_SPARE


def _deepest_packed_ring(
    fmt: str, M: int, K: int, rows: int, chunk: int, split: int, each: int, registers: int | None
) -> Tile | None:
    """The tile with as many stages, up to 16, as `each` programs have room for on a multiprocessor, and a chunk more to be
    filled again; None where that makes less than two."""
    room = (SHARED_BYTES // each - PACKED_RING_SPARE) // _packed_stage_bytes(fmt, M, rows, chunk)
    stages = min(16, room, K // (split * chunk) - 1)
    return packed_ring_tile(rows, chunk, stages, split, registers) if stages >= 2 else None


def _packed_ring_candidates(op: str, fmt: str, M: int, N: int, K: int) -> list[Tile]:
    if RING_LEAST[fmt] > M:
        return []
    tiles = []
    for height, each, units, split in itertools.product((64, 128), (1, 2, 4), (1, 2), (1, 2, 4, 8)):
        chunk = units * UNIT_COLUMNS[fmt]
        tile = _deepest_packed_ring(fmt, M, K, height, chunk, split, each, 128 if op == "head" else None)
        whole = K % (split * chunk) == 0 and (split == 1 or op not in ("silu_mul", "head"))
        if op == "head":  # whose last tile need not be whole
            fits = -(-N // height) <= 4096
        else:
            fits = N % height == 0 and N // height * split <= 1024
        if tile and whole and fits and (op == "linear" or height == 128):
            tiles.append(tile)
    return tiles


def _ring_candidates(op: str, M: int, N: int, K: int) -> list[Tile]:
    if M == 1 or op == "head" or N % RING_ROWS:
        return []
    tiles = [
        ring_tile(chunk, stages, split)
        for (chunk, stages), split in itertools.product(
            ((64, 8), (64, 10), (64, 12), (128, 4), (128, 5), (128, 6), (256, 2), (256, 3)),
            (1,) if op == "silu_mul" else (1, 2, 4, 8),
        )
        if K % (chunk * split) == 0
    ]
    return [tile for tile in tiles if ring_bytes(tile, M) <= RING_BYTES]


def _fma_candidates(op: str, M: int, N: int, K: int) -> list[Tile]:
    if M > FMA_MOST_ROWS:
        return []
    tiles = []
    for rows, warps, steps in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16), (1, 2)):
        chunk = fma_chunk(K, warps * steps)
        chunks = -(-K // chunk)
        if rows < LEAST_ROWS[op] or N % rows or rows * M > 16 or chunk < 256 * warps * steps:
            continue
        for preload in {chunks, -(-chunks // 2), -(-chunks // 4)}:
            if 8 <= rows * chunk * preload // (64 * warps) <= 128:  # registers of a thread
                tiles.append(Tile(rows, chunk, warps, preload))
    whole = [t for t in tiles if t.preload * t.chunk >= K and t.rows * t.chunk * t.preload // (64 * t.warps) <= 64]
    if op in ("silu_mul", "head"):
        tiles += [
            dataclasses.replace(t, grid=grid, stages=stages)
            for t in whole
            for grid, stages in itertools.product((2, 4, 6, 8), (1, 2))
            if N // t.rows > 2 * grid * 100
        ]
    if op == "linear" and K >= 4096:
        tiles += [dataclasses.replace(t, split=2) for t in tiles if t.preload * t.chunk * 2 >= K and not t.grid]
    return tiles


def _dot_candidates(op: str, M: int, N: int, K: int) -> list[Tile]:
    if M == 1:
        return []
    tiles = []
    for (rows, warps), split in itertools.product(((64, 4), (64, 8), (128, 8), (256, 8)), (1, 2, 4, 7, 8)):
        if K % (64 * split) or (split > 1 and (op == "head" or N // rows * split > 1024)):
            continue
        strip = K // split
        for chunk in (64, 128, 256, 512):
            chunks = -(-strip // chunk)
            tile_bytes = (rows + max(16, M)) * chunk * 2
            for preload, stages in itertools.product((1, 2, 3), (1, 3, 4, 5)):
                waits = chunks > preload  # a loop behind the preloaded chunks, for which stages count
                if strip % chunk or preload > chunks or (stages > 1) != waits or rows * chunk * preload // (64 * warps) > 96:
                    continue
                if tile_bytes * (preload + (stages if waits else 0)) <= SHARED_BYTES:
                    tiles.append(Tile(rows, chunk, warps, preload, dot=True, split=split, stages=stages))
    return tiles


def _packed_candidates(op: str, fmt: str, M: int, N: int, K: int) -> list[Tile]:
    tiles = []
    splits = (1,) if op == "head" else (1, 2, 4)
    for rows, warps, parts, preload, split in itertools.product(
        (16, 32, 64, 128), (1, 2, 4, 8, 16), (1, 2, 4, 8, 16), (1, 2, 3, 4, 6, 7, 8), splits
    ):
        blocks = rows * parts // (16 * warps)
        steps = -(-K // (UNIT_COLUMNS[fmt] * parts * split))
        registers = 8 * blocks * preload + 4 * blocks * -(-M // 8)  # of a thread, for weights in flight and sums
        if parts > warps or not 1 <= blocks <= 4 or (op == "head" and 4096 * rows < N):
            continue
        if registers > (64 if warps == 16 else 160):  # spills are ruinous, and slow to compile
            continue
        if steps % preload or N // rows * split > 2**15 or (split > 1 and steps < 2):
            continue
        tiles.append(Tile(rows, UNIT_COLUMNS[fmt] * parts, warps, preload, dot=True, split=split))
    return tiles


def power_divisor(K: int, most: int) -> int:
    """The largest power of two, at most `most`, that divides K."""
    return min(K & -K, most)


def fma_chunk(K: int, warps: int) -> int:
    """Columns of a step in which each thread of `warps` loads 16 bytes of a row: then x has the weights' layout.

    The last chunk is masked where this does not divide K, which costs instructions but no bytes.
    """
    return min(256 * warps, 1 << (K - 1).bit_length())


# ---------------------------------------------------------------- overriding

_overrides = Setting({})
_batch_invariant = Setting(False)


def override_tiles(tiles: dict):
    """Within, an op uses `tiles[op, N, K]`, else `tiles[op]`, else its own choice. For tuners; not for concurrent use."""
    return _overrides.set_to({**_overrides.value, **tiles})


def is_batch_invariant() -> bool:
    return _batch_invariant.value


def batch_invariant(enabled: bool = True):
    """Within, tiles do not depend on the number of rows: a row's result is the same in every batch, at some cost in speed."""
    return _batch_invariant.set_to(enabled)


def tile_for(op: str, fmt: str, rows: int, N: int, K: int, sms: int, rings: bool = False) -> Tile:
    """What a kernel asks: the override, the batch-invariant tile, or the choice; with a ring only if `rings`. A packed weight's
    ring by an override is for those that can have it: the first layer's qkv cannot."""
    tile = _overrides.value.get((op, N, K), _overrides.value.get(op))
    if tile is not None and (rings or not tile.ring or fmt not in UNIT_COLUMNS):
        return tile
    return invariant_tile(op, fmt, N, K, sms) if is_batch_invariant() else choose_tile(op, fmt, rows, N, K, sms, rings)
