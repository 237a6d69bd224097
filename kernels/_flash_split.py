"""How the cache rows of a batch are split over the programs of one launch: what both kernels of flash_decode share.

Owns the rule, as device code that Triton and Gluon both compile. The grid is fixed by the cache's capacity, so that a CUDA
graph can hold it; what each program does follows the lengths on the device. Work is counted in *items*: one part of the rows of
one (sequence, KV head); a *unit* is such a part for every KV head.

`split`, how the work is, is a tuple: (sequence, lengths_ptr, batch, window, max_parts, spare_programs, min_rows_log2).
sequence: 0, 1, ... [SEQUENCES], of the batch padded to a power of two, in whatever layout the kernel has. max_parts: of a
sequence, where there is only one. spare_programs: beyond one for each (sequence, KV head). min_rows_log2: of a part, where
there is more than one.
"""

import triton
import triton.language as tl

FLOOR = tl.constexpr(-3e38)  # a running maximum before any key: finite, so that FLOOR - FLOOR is 0 and not NaN
MAX_COUNTERS = 65536  # of (sequence, KV head, tile of query rows): each counts the parts that are done


@triton.jit
def first_row(length, window, T: tl.constexpr, ALIGNMENT: tl.constexpr, WINDOWED: tl.constexpr):
    """The first cache row that a token of this step sees, rounded down."""
    if WINDOWED:
        return tl.maximum(length - T - window + 1, 0) // ALIGNMENT * ALIGNMENT
    else:
        return length * 0


@triton.jit
def _load_rows(split, T: tl.constexpr, ALIGNMENT: tl.constexpr, WINDOWED: tl.constexpr):
    """How many cache rows each sequence reads: [SEQUENCES], 0 past the batch."""
    sequence, lengths_ptr, batch, window, _, _, _ = split
    lengths = tl.load(lengths_ptr + sequence, mask=sequence < batch, other=0)
    return lengths - first_row(lengths, window, T, ALIGNMENT, WINDOWED)


@triton.jit
def _count_parts(rows, all_rows, split, HKV: tl.constexpr, SEQUENCES: tl.constexpr, SPLIT_ROWS: tl.constexpr):
    """Parts of a sequence that reads `rows`, at least one. all_rows: of the batch, each sequence's rounded up to 16."""
    _, _, _, _, max_parts, spare_programs, min_rows_log2 = split
    if SPLIT_ROWS > 0:
        parts = tl.cdiv(rows, SPLIT_ROWS)
    else:
        if SEQUENCES == 1:
            share = max_parts
        else:  # one part, and of the spare programs in proportion to the rows: never more parts than programs
            blocks, all_blocks = tl.cdiv(rows, 16).to(tl.uint32), (tl.maximum(all_rows, 16) // 16).to(tl.uint32)
            share = 1 + (blocks * spare_programs.to(tl.uint32) // (all_blocks * HKV)).to(tl.int32)
        parts = tl.minimum(share, rows >> min_rows_log2)
    return tl.maximum(parts, 1)


@triton.jit
def _sum_rows(rows):
    return tl.sum(tl.cdiv(rows, 16) * 16, 0)


@triton.jit
def parts_of(
    rows, split, T: tl.constexpr, HKV: tl.constexpr, SEQUENCES: tl.constexpr, SPLIT_ROWS: tl.constexpr,
    ALIGNMENT: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Parts of one sequence, which reads `rows`."""
    all_rows = rows * 0 + 2**28  # one part, whatever the others read
    if SPLIT_ROWS == 0 and SEQUENCES > 1:
        if (rows >> split[6] > 1) & (split[5] >= HKV):
            all_rows = _sum_rows(_load_rows(split, T, ALIGNMENT, WINDOWED))
    return _count_parts(rows, all_rows, split, HKV, SEQUENCES, SPLIT_ROWS)


@triton.jit
def all_parts(
    split, T: tl.constexpr, HKV: tl.constexpr, SEQUENCES: tl.constexpr, SPLIT_ROWS: tl.constexpr, ALIGNMENT: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """Parts of every sequence, [SEQUENCES]."""
    rows = _load_rows(split, T, ALIGNMENT, WINDOWED)
    return _count_parts(rows, _sum_rows(rows), split, HKV, SEQUENCES, SPLIT_ROWS)


@triton.jit
def find_part(
    unit, split, T: tl.constexpr, HKV: tl.constexpr, SEQUENCES: tl.constexpr, SPLIT_ROWS: tl.constexpr,
    ALIGNMENT: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """(sequence, part of it) of a unit of items. The sequence is past the batch where there is nothing to do.

    With 2, 1 and 3 parts, units 0 to 2 are part 0 of each sequence; unit 3 is part 1 of the first, 4 and 5 are parts 1 and 2 of
    the last. So part 0 finds its sequence without a look at the others.
    """
    batch = split[2]
    b, part = unit, unit * 0
    if SEQUENCES == 1:
        b, part = unit * 0, unit
    elif unit >= batch:
        parts = all_parts(split, T, HKV, SEQUENCES, SPLIT_ROWS, ALIGNMENT, WINDOWED)
        ends = tl.cumsum(parts - 1, 0)
        before = ends <= unit - batch
        b = tl.sum(before.to(tl.int32), 0)
        part = 1 + unit - batch - tl.max(tl.where(before, ends, 0), 0)
    return b, part


@triton.jit
def second_unit(
    b, split, T: tl.constexpr, HKV: tl.constexpr, SEQUENCES: tl.constexpr, SPLIT_ROWS: tl.constexpr, ALIGNMENT: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """The unit of part 1 of sequence b; part 2's is the next. Part 0's is b itself."""
    unit = b * 0 + 1
    if SEQUENCES > 1:
        parts = all_parts(split, T, HKV, SEQUENCES, SPLIT_ROWS, ALIGNMENT, WINDOWED)
        unit = split[2] + tl.sum(tl.where(split[0] < b, parts - 1, 0), 0)
    return unit


@triton.jit
def query_rows(m, b, head, T: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr):
    """Rows of q, and of the output, behind the rows m of a KV head's queries: token major, query head of the group minor."""
    return (b * T + m // G) * (HKV * G) + head * G + m % G
