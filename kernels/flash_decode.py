"""Flash decoding: attention of a few query tokens per sequence over the KV cache, in one launch.

Owns the attention of a decode or verify step and the split of its work over the GPU. Knows neither the model nor who fills
the cache. Follows Flash-Decoding (Dao et al., 2023, https://pytorch.org/blog/flash-decoding): the cache rows of a sequence are
split over programs, each keeps a running softmax (fp32, base 2), and the last program of a (sequence, KV head) merges them.

The grid is fixed by the cache's capacity, so that a CUDA graph can hold it; what each program does follows the lengths on the
device: 100 tokens in a 128k cache cost what 100 tokens cost. Work is counted in *items*: one part of the rows of one
(sequence, KV head); a *unit* is such a part for every KV head. K and V are read once for all query heads of a KV head and all
query tokens (the M dimension of the dots).

Letters: B sequences, T query tokens a sequence, S cache rows, Hq/Hkv heads, G = Hq/Hkv, D head size, P pages a sequence,
M query rows (G * T, padded) and N cache rows of a tile.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels._common import (
    INTERPRET,
    INTERPRETED,
    Setting,
    arrives_last,
    hold,
    launch_options,
    num_sms,
    pdl_supported,
    pdl_trigger,
    pdl_wait,
    permute_columns,
    permuted,
    runs_kernels,
    zeroed_workspace,
)
from kernels._flash_ring import choose_flash_ring, flash_ring_serves, launch_flash_ring
from kernels._flash_split import FLOOR, MAX_COUNTERS, all_parts, find_part, first_row, parts_of, query_rows, second_unit

HEAD_SIZES = (64, 96, 128)  # others take the reference path
LOG2_E = math.log2(math.e)
MIN_ROWS = 128  # of a part: smaller ones pay more for their merge than they save


# --------------------------------------------------------------------------------------------------------------------------
# Reference
# --------------------------------------------------------------------------------------------------------------------------


def flash_decode_ref(q, k_cache, v_cache, lengths, table, *, scale, window=None, k_scale=None, v_scale=None):
    """`flash_decode` in plain PyTorch, for any dtype and head size; computes in fp32 (in fp64 for fp64 inputs)."""
    B, T, Hq, D = q.shape
    _, Hkv, page_size, _ = k_cache.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    if not q.is_cuda:  # reads only what is in use; on a GPU that would make the host wait
        longest = max(1, int(lengths.max()))
        table = table[:, : -(-longest // page_size)]
        if table.shape[1] == 1:
            k_cache, v_cache = k_cache[:, :, :longest], v_cache[:, :, :longest]

    def rows(cache, cache_scale):  # -> [B, Hkv, S, D]
        x = cache[table.long()].transpose(1, 2).reshape(B, Hkv, -1, D).to(dtype)
        x = x if cache_scale is None else x * cache_scale.to(dtype)[:, None, None]
        in_use = torch.arange(x.shape[2], device=x.device) < lengths[:, None]
        return x.masked_fill(~in_use[:, None, :, None], 0)  # rows past the length may hold NaN

    k, v = rows(k_cache, k_scale), rows(v_cache, v_scale)
    key = torch.arange(k.shape[2], device=q.device)
    position = lengths[:, None] - T + torch.arange(T, device=q.device)  # [B, T]
    visible = key <= position[:, :, None]  # [B, T, S]
    if window is not None:
        visible &= key > position[:, :, None] - window
    queries = q.to(dtype).view(B, T, Hkv, -1, D).permute(0, 2, 3, 1, 4)  # [B, Hkv, G, T, D]
    scores = queries @ k[:, :, None].transpose(-1, -2) * scale
    weights = scores.masked_fill(~visible[:, None, None], -math.inf).softmax(-1)
    weights = weights.masked_fill(~visible.any(-1)[:, None, None, :, None], 0)  # a token that sees nothing gets zeros
    return (weights @ v[:, :, None]).permute(0, 3, 1, 2, 4).reshape(B, T, Hq, D).to(q.dtype)


# --------------------------------------------------------------------------------------------------------------------------
# Kernel
# --------------------------------------------------------------------------------------------------------------------------


@triton.jit
def _row_offset(
    row, page, head, table_ptr, page_size, HKV: tl.constexpr, D: tl.constexpr, PAGED: tl.constexpr
):  # fmt: skip
    """Where in the cache a row of a sequence begins, whose pages are at table_ptr, the first of them `page`. 64 bits: a cache
    may hold more than 2**31 values."""
    if PAGED:
        page, row = tl.load(table_ptr + row // page_size), row % page_size
    return ((page * HKV + head).to(tl.int64) * page_size + row) * D


@triton.jit
def _split_rows(x, GROUPS: tl.constexpr):
    """[rows] -> [GROUPS, rows / GROUPS]; as it is for one group."""
    if GROUPS == 1:
        return x
    else:
        return tl.reshape(x, [GROUPS, x.shape[0] // GROUPS])


@triton.jit
def _load_k(start_ptr, keep, D: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, other):
    """Consecutive rows of K as columns, [(GROUPS,) COLUMNS, rows]: `other` in rows not kept, which are not touched."""
    row = _split_rows(tl.arange(0, keep.shape[0]), GROUPS)
    column = tl.arange(0, COLUMNS)[:, None]
    mask = tl.expand_dims(_split_rows(keep, GROUPS), -2)
    if COLUMNS != D:
        mask = mask & (column < D)
    return tl.load(start_ptr + tl.expand_dims(row, -2) * D + column, mask=mask, other=other)


@triton.jit
def _load_v(start_ptr, keep, D: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, other):
    """Consecutive rows of V, [(GROUPS,) rows, COLUMNS]: `other` in rows not kept, which are not touched."""
    row = _split_rows(tl.arange(0, keep.shape[0]), GROUPS)
    column = tl.arange(0, COLUMNS)
    mask = tl.expand_dims(_split_rows(keep, GROUPS), -1)
    if COLUMNS != D:
        mask = mask & (column < D)
    return tl.load(start_ptr + tl.expand_dims(row, -1) * D + column, mask=mask, other=other)


@triton.jit
def _dot(a, b, acc):
    """a @ b + acc. The interpreter takes bf16 for integers: there the operands, already rounded, go in as fp32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def _attend(q, k, v, row, position, window, qk_scale, top, total, acc, GROUPS: tl.constexpr, WINDOWED: tl.constexpr):
    """Takes the keys in cache rows `row` into the running softmax: `top` maximum, `total` sum, `acc` weighted values."""
    row = tl.expand_dims(_split_rows(row, GROUPS), -2)
    visible = row <= position[:, None]
    if WINDOWED:
        visible = visible & (row > position[:, None] - window)
    k, v = k.to(q.dtype), v.to(q.dtype)
    scores = _dot(q, k, tl.zeros(visible.shape, tl.float32)) * qk_scale  # [(GROUPS,) M, rows], base 2
    scores = tl.where(visible, scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, -1))
    decay = tl.exp2(top - new_top)
    weights = tl.exp2(scores - tl.expand_dims(new_top, -1))
    total = total * decay + tl.sum(weights, -1)
    acc = _dot(weights.to(q.dtype), v, acc * tl.expand_dims(decay, -1))
    return new_top, total, acc


@triton.jit
def _add_softmax(top_a, total_a, top_b, total_b):
    top = tl.maximum(top_a, top_b)
    return top, total_a * tl.exp2(top_a - top) + total_b * tl.exp2(top_b - top)


@triton.jit
def _sum_groups(x, GROUPS: tl.constexpr):
    """[GROUPS, rows, columns] -> [rows, columns], in halves: one vectorised pass through shared memory each."""
    if GROUPS == 1:
        return tl.reshape(x, [x.shape[1], x.shape[2]])
    else:
        halves = tl.permute(tl.reshape(x, [2, GROUPS // 2, x.shape[1], x.shape[2]]), (1, 2, 3, 0))
        first, second = tl.split(halves)
        return _sum_groups(first + second, GROUPS // 2)


@triton.jit
def _store_out(out_ptr, acc, total, q_row, mask, D: tl.constexpr, PERMUTE: tl.constexpr):
    """Writes acc / total [rows, COLUMNS] to the query rows `q_row`; zeros where nothing was visible."""
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    column = tl.arange(0, acc.shape[1])
    if PERMUTE:
        column = permuted(column)
    tl.store(out_ptr + q_row.to(tl.int64)[:, None] * D + column[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _merge(
    partial_ptr,
    stats_ptr,
    unit,
    next_unit,
    head,
    tile,
    num_tiles,
    parts,
    mask,
    HKV: tl.constexpr,
    D: tl.constexpr,
    MERGED: tl.constexpr,
):
    """The sum of `parts` partial results, of `unit` and then from `next_unit` on, in order, MERGED at a time -> acc, total."""
    ROWS: tl.constexpr = mask.shape[0]
    COLUMNS: tl.constexpr = mask.shape[1]
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    top = tl.full([ROWS], FLOOR, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for part_begin in range(0, parts, MERGED):
        part = part_begin + tl.arange(0, MERGED)
        part_unit = tl.where(part == 0, unit, next_unit + part - 1)
        start = ((part_unit * HKV + head) * num_tiles + tile).to(tl.int64) * ROWS
        kept = (row >= 0)[:, None] & (part < parts)[None, :]  # [ROWS, MERGED]: in this order the sum stays within a thread
        stats = stats_ptr + start[None, :] * 2 + row[:, None]
        values = partial_ptr + (start[None, :] + row[:, None])[:, :, None] * D + column[None, None, :]
        # .cg: from L2, where the other multiprocessors' results are
        tops = tl.load(stats, mask=kept, other=FLOOR, cache_modifier=".cg")
        totals = tl.load(stats + ROWS, mask=kept, other=0.0, cache_modifier=".cg")
        accs = tl.load(values, mask=kept[:, :, None] & mask[:, None, :], other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(tops, 1))
        decay = tl.exp2(top - new_top)
        weights = tl.exp2(tops - new_top[:, None])
        total = total * decay + tl.sum(totals * weights, 1)
        acc = acc * decay[:, None] + tl.sum(accs * weights[:, :, None], 1)
        top = new_top
    return acc, total


@triton.jit(
    do_not_specialize=[
        "window",
        "batch",
        "table_width",
        "page_size",
        "max_parts",
        "spare_programs",
        "min_rows_log2",
    ]
)
def _flash_decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    table_ptr,
    k_scale_ptr,
    v_scale_ptr,
    out_ptr,
    partial_ptr,  # [items, M tiles, ROWS, D] fp32: weighted values
    stats_ptr,  # [items, M tiles, 2, ROWS] fp32: maximum and sum
    counter_ptr,  # [B, Hkv, M tiles], zero before and after every launch
    scale_log2,
    window,
    batch,
    table_width,
    page_size,
    max_parts,  # of a sequence, where there is only one
    spare_programs,  # beyond one for each (sequence, KV head)
    min_rows_log2,  # of a part, where there is more than one
    HKV: tl.constexpr,
    G: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,  # D, padded to a power of two
    SEQUENCES: tl.constexpr,  # B, padded to a power of two
    M: tl.constexpr,
    GROUPS: tl.constexpr,  # of cache rows within a tile, each with its own softmax: one a warp, or one in all
    ROWS: tl.constexpr,  # query rows of a tile that a partial result keeps, a power of two
    CHUNK: tl.constexpr,  # cache rows loaded before the wait, the first of a part; may be 0
    N: tl.constexpr,  # cache rows of a step of the loop after it
    SPLIT_ROWS: tl.constexpr,  # of every part, where that is fixed, else 0
    MERGED: tl.constexpr,
    STAGES: tl.constexpr,
    PAGED: tl.constexpr,
    WINDOWED: tl.constexpr,
    SCALED: tl.constexpr,
    EARLY: tl.constexpr,  # the rows that this step appends are read after the wait
    PERMUTE: tl.constexpr,  # the output's columns, for a packed linear
    PDL: tl.constexpr,
):
    pdl_trigger(PDL)
    tile, num_tiles = tl.program_id(1), tl.num_programs(1)
    ALIGNMENT: tl.constexpr = CHUNK if CHUNK > 0 else N
    split = (tl.arange(0, SEQUENCES), lengths_ptr, batch, window, max_parts, spare_programs, min_rows_log2)

    # Items go by units, each one for every KV head. A program does one; with splits of a fixed size, where the lengths decide
    # how many there are, as many as come.
    item_begin = tl.program_id(0)
    item_end, item_step = item_begin + 1, 1
    if SPLIT_ROWS > 0:
        of_all = all_parts(split, T, HKV, SEQUENCES, SPLIT_ROWS, ALIGNMENT, WINDOWED)
        item_end = tl.maximum(item_end, (batch + tl.sum(of_all - 1, 0)) * HKV)
        item_step = tl.num_programs(0)
    for item in tl.range(item_begin, item_end, item_step, num_stages=1):
        unit, head = item // HKV, item % HKV
        b, part = find_part(unit, split, T, HKV, SEQUENCES, SPLIT_ROWS, ALIGNMENT, WINDOWED)
        length = tl.load(lengths_ptr + b, mask=b < batch, other=0)
        page = tl.load(table_ptr + b * table_width, mask=b < batch, other=0)
        start = first_row(length, window, T, ALIGNMENT, WINDOWED)
        parts = parts_of(length - start, split, T, HKV, SEQUENCES, SPLIT_ROWS, ALIGNMENT, WINDOWED)
        if part >= parts:
            pdl_wait(PDL)  # an idle program waits too: the next kernel counts on it that all before has finished
        else:
            if SPLIT_ROWS > 0:
                begin = start + part * SPLIT_ROWS
                end = tl.minimum(begin + SPLIT_ROWS, length)
                next_block, block_step = begin + CHUNK, N
            else:  # each part has one chunk; then the blocks that remain go round
                begin, end = start + part * CHUNK, length
                next_block, block_step = start + parts * CHUNK + part * N, parts * N

            # The first chunk comes into registers before the wait, but for rows that this step appends.
            pages_ptr = table_ptr + b * table_width
            if CHUNK > 0:
                row = begin + tl.arange(0, CHUNK)
                offset = _row_offset(begin, page, head, pages_ptr, page_size, HKV, D, PAGED)
                before_wait = row < end
                if EARLY:
                    before_wait = before_wait & (row < length - T)
                k_first = _load_k(k_ptr + offset, before_wait, D, COLUMNS, GROUPS, 0.0)
                v_first = _load_v(v_ptr + offset, before_wait, D, COLUMNS, GROUPS, 0.0)
            qk_scale = scale_log2
            if SCALED:
                qk_scale *= tl.load(k_scale_ptr + head)

            pdl_wait(PDL)

            m = tile * M + tl.arange(0, M)
            q_row = query_rows(m, b, head, T, HKV, G)
            column = tl.arange(0, COLUMNS)
            q_mask = (m < G * T)[:, None] & (column < D)[None, :]
            q = tl.load(q_ptr + q_row.to(tl.int64)[:, None] * D + column[None, :], mask=q_mask, other=0.0)
            position = tl.where(m < G * T, length - T + m // G, -1)
            if EARLY and CHUNK > 0:
                after_wait = (row < end) & (row >= length - T)
                k_first = _load_k(k_ptr + offset, after_wait, D, COLUMNS, GROUPS, k_first)
                v_first = _load_v(v_ptr + offset, after_wait, D, COLUMNS, GROUPS, v_first)

            top, total, acc = tl.full([M], FLOOR, tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, COLUMNS], tl.float32)
            if GROUPS > 1:
                q = tl.broadcast_to(q[None], [GROUPS, M, COLUMNS])
                top, total = tl.broadcast_to(top[None], [GROUPS, M]), tl.broadcast_to(total[None], [GROUPS, M])
                acc = tl.broadcast_to(acc[None], [GROUPS, M, COLUMNS])
            for block in tl.range(next_block, end, block_step, num_stages=STAGES):  # a block is never in two pages
                block_offset = _row_offset(block, page, head, pages_ptr, page_size, HKV, D, PAGED)
                block_row = block + tl.arange(0, N)
                k = _load_k(k_ptr + block_offset, block_row < end, D, COLUMNS, GROUPS, 0.0)
                v = _load_v(v_ptr + block_offset, block_row < end, D, COLUMNS, GROUPS, 0.0)
                top, total, acc = _attend(q, k, v, block_row, position, window, qk_scale, top, total, acc, GROUPS, WINDOWED)
            if CHUNK > 0:  # it comes last: while it waits in registers the loop's loads are under way
                k, v = hold(k_first), hold(v_first)
                top, total, acc = _attend(q, k, v, row, position, window, qk_scale, top, total, acc, GROUPS, WINDOWED)
            if GROUPS > 1:
                group_top = top
                top, total = tl.reduce((group_top, total), 0, _add_softmax)
                acc = _sum_groups(acc * tl.exp2(group_top - top[None])[:, :, None], GROUPS)
            if SCALED:
                acc *= tl.load(v_scale_ptr + head)

            if parts == 1:
                _store_out(out_ptr, acc, total, q_row, q_mask, D, PERMUTE)
            else:
                place = (item * num_tiles + tile).to(tl.int64) * ROWS
                kept = tl.arange(0, M)
                tl.store(partial_ptr + (place + kept)[:, None] * D + column[None, :], acc, mask=q_mask)
                tl.store(stats_ptr + 2 * place + kept, top, mask=m < G * T)
                tl.store(stats_ptr + 2 * place + ROWS + kept, total, mask=m < G * T)
                if arrives_last(counter_ptr + (b * HKV + head) * num_tiles + tile, parts):
                    merged_m = tile * M + tl.arange(0, ROWS)
                    merged_mask = (merged_m < G * T)[:, None] & (column < D)[None, :]
                    next_unit = second_unit(b, split, T, HKV, SEQUENCES, SPLIT_ROWS, ALIGNMENT, WINDOWED)
                    merged_acc, merged_total = _merge(
                        partial_ptr, stats_ptr, b, next_unit, head, tile, num_tiles, parts, merged_mask, HKV, D, MERGED
                    )
                    merged_row = query_rows(merged_m, b, head, T, HKV, G)
                    _store_out(out_ptr, merged_acc, merged_total, merged_row, merged_mask, D, PERMUTE)


# --------------------------------------------------------------------------------------------------------------------------
# Launch
# --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """How one call is laid out. Rows are cache rows unless said otherwise."""

    programs: int  # programs for each tile of query rows
    query_rows: int  # M: query rows of a tile, at least 16 for the tensor cores
    query_tiles: int
    kept_rows: int  # query rows of a tile that a partial result keeps
    chunk_rows: int  # rows loaded before the dependency wait, the first of a part; may be 0
    block_rows: int  # N: rows of a step of the loop after it
    row_groups: int  # of rows within a tile, each with its own softmax
    min_rows: int  # a smaller part is not worth a merge; a power of two, at least chunk_rows
    split_rows: int  # rows of every part where the caller fixes them, else 0
    items: int  # the most items there can be: sizes the scratch memory
    merged: int  # partial results merged at a time
    warps: int
    stages: int
    max_registers: int | None = None  # a thread: fewer let more programs run on a multiprocessor


class _Shape(NamedTuple):
    """What of a launch was measured; fields as in Launch."""

    chunk_rows: int
    block_rows: int = 64
    row_groups: int = 1
    warps: int = 4
    stages: int = 3
    programs: int | None = None  # in all, but for pairs that are more; None: two a multiprocessor


def _measured_shape(pairs: int, columns: int, capacity: int, sms: int) -> _Shape:
    """For `pairs` of a sequence and a KV head with up to 16 query rows: the best of sweeps on an H200 (LOG.md), with head size
    128 inside whole steps.

    A kernel that runs alone chooses otherwise, because there no other one starts early: at head size 128 these launches fill
    the registers (a chunk of 64 rows, two stages) or the shared memory (five stages), so that no program of the next kernel
    fits beside them. Where one does, attention takes 10 to 15 us longer. At head size 64 blocks of 128 rows do so (a step of
    the 1B with 16 sequences: 831 to 820 us). A softmax for each warp's rows (row_groups) needs no
    exchange between warps, but takes registers that only head size 64 has.
    """
    few = pairs < sms // 2
    if pairs > 2 * sms:  # a program each; where sequences may differ by much, spare ones that long ones are split over
        spread = max(4 * sms, pairs) if capacity <= 4096 else pairs + 2 * sms
        if columns == 64:
            return _Shape(0, block_rows=32, warps=1, stages=3, programs=spread)
        if capacity > 1024:
            return _Shape(0, block_rows=32, warps=4, stages=3, programs=spread)
        return _Shape(0, block_rows=32, warps=1, stages=4 if pairs <= 8 * sms else 3, programs=spread)
    if columns == 128:
        if few:
            return _Shape(64, stages=2)
        if capacity < 1024:
            return _Shape(64)
        return _Shape(0, stages=5, programs=sms)
    if not few:
        if capacity < 1024:
            return _Shape(128, block_rows=128, row_groups=4)
        return _Shape(0, block_rows=32, warps=1, programs=4 * sms)
    if capacity <= 64 or capacity > 4096:
        return _Shape(64, row_groups=4)
    if capacity <= 1024:
        return _Shape(128, row_groups=4)
    return _Shape(128, stages=2)


@functools.cache
def choose_launch(
    *,
    batch: int,
    tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    capacity: int,
    page_size: int | None = None,
    split_size: int | None = None,
    sms: int = 132,
) -> Launch:
    """The launch for caches of `capacity` rows a sequence; `page_size` is None where a sequence has one page only.

    With `split_size` nothing that decides the numbers depends on the batch, or on the capacity that its longest member needs.
    """
    rows = num_heads // num_kv_heads * tokens
    columns = triton.next_power_of_2(head_dim)
    pairs = batch * num_kv_heads
    # K and V are read again for each tile of query rows: from L2, and only where they are short.
    small_tiles = split_size is None and capacity <= 4096 and pairs * -(-rows // 16) <= sms
    query_rows = 16 if small_tiles else min(64, max(16, triton.next_power_of_2(rows)))
    kept_rows = min(query_rows, triton.next_power_of_2(rows))
    if split_size is not None and (split_size < 1 or split_size % 128):
        raise ValueError(f"split_size: found {split_size}, expected a positive multiple of 128")
    if split_size is None and query_rows == 16:
        shape = _measured_shape(pairs, columns, capacity, sms)
    else:
        roomy = split_size is None and pairs < sms // 2 and 64 < capacity <= 4096
        shape = _Shape(128 if roomy else 64)
    if (page_size or 128) % 128:
        shape = shape._replace(chunk_rows=min(64, shape.chunk_rows), block_rows=min(64, shape.block_rows))
    if split_size is not None:
        items = pairs * max(1, -(-capacity // split_size))
        programs = min(items, 4 * sms)
    else:
        most_parts = max(1, capacity // MIN_ROWS)
        programs = items = max(pairs, min(pairs * most_parts, shape.programs or 2 * sms))
    return Launch(
        programs=programs,
        query_rows=query_rows,
        query_tiles=-(-rows // query_rows),
        kept_rows=kept_rows,
        chunk_rows=shape.chunk_rows,
        block_rows=shape.block_rows,
        row_groups=shape.row_groups,
        min_rows=MIN_ROWS,
        split_rows=split_size or 0,
        items=items,
        # All parts at a time, up to 64 KiB. Room for more than there are costs registers.
        merged=max(1, min(triton.next_power_of_2(-(-items // pairs)), 64, 16384 // (kept_rows * columns))),
        warps=shape.warps,
        stages=shape.stages + (page_size is not None),  # the page's number takes a stage of its own
    )


_overrides = Setting({})


def override_launch(**changes):
    """Every launch inside has these fields of Launch changed, or where it can has this `ring`, a FlashRing; without one none
    has. For measuring and for tests. Not for concurrent use."""
    return _overrides.set_to(changes)


def launch_flash_decode(
    q, k_cache, v_cache, lengths, table, launch: Launch, *, scale, window=None, k_scale=None, v_scale=None, permute=False
):
    """Runs the kernel as `launch` says."""
    B, T, Hq, D = q.shape
    _, Hkv, page_size, _ = k_cache.shape
    out = torch.empty_like(q)
    if B * Hkv * launch.query_tiles > MAX_COUNTERS:
        raise ValueError(f"flash_decode: found {B} x {Hkv} x {launch.query_tiles} tiles, expected at most {MAX_COUNTERS}")
    scratch = (launch.items, launch.query_tiles, launch.kept_rows)
    partial = torch.empty(*scratch, D, dtype=torch.float32, device=q.device)
    stats = torch.empty(*scratch, 2, dtype=torch.float32, device=q.device)
    _flash_decode_kernel[(launch.programs, launch.query_tiles)](
        q,
        k_cache,
        v_cache,
        lengths,
        table,
        k_scale,
        v_scale,
        out,
        partial,
        stats,
        zeroed_workspace(q.device, "counters of flash_decode", MAX_COUNTERS),
        scale * LOG2_E,
        window or 0,
        B,
        table.shape[1],
        page_size,
        launch.programs // Hkv,
        launch.programs - B * Hkv,
        launch.min_rows.bit_length() - 1,
        HKV=Hkv,
        G=Hq // Hkv,
        T=T,
        D=D,
        COLUMNS=triton.next_power_of_2(D),
        SEQUENCES=triton.next_power_of_2(B),
        M=launch.query_rows,
        GROUPS=launch.row_groups,
        ROWS=launch.kept_rows,
        CHUNK=launch.chunk_rows,
        N=launch.block_rows,
        SPLIT_ROWS=launch.split_rows,
        MERGED=launch.merged,
        STAGES=launch.stages,
        PAGED=table.shape[1] > 1,
        WINDOWED=window is not None,
        SCALED=k_scale is not None,
        EARLY=INTERPRET or pdl_supported(q),
        PERMUTE=permute,
        num_warps=launch.warps,
        maxnreg=launch.max_registers,
        **launch_options(q),
    )
    return out


# --------------------------------------------------------------------------------------------------------------------------
# Operator
# --------------------------------------------------------------------------------------------------------------------------


def _check(q, k_cache, v_cache, lengths, table, window, k_scale, v_scale, permute):
    B, _, Hq, D = q.shape
    _, Hkv, page_size, cache_D = k_cache.shape
    if k_cache.shape != v_cache.shape or cache_D != D or Hq % Hkv:
        raise ValueError(
            f"flash_decode: found q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}, "
            "expected q [B, T, Hq, D] and caches [pages, Hkv, page_size, D] with Hq a multiple of Hkv"
        )
    if not (q.is_contiguous() and k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("flash_decode: found q, k_cache or v_cache with strides of their own, expected contiguous tensors")
    if lengths.shape != (B,) or table.dim() != 2 or table.shape[0] != B:
        raise ValueError(
            f"flash_decode: found lengths {tuple(lengths.shape)}, table {tuple(table.shape)}, expected [{B}] and [{B}, P]"
        )
    if lengths.dtype != torch.int32 or table.dtype != torch.int32:
        raise ValueError(f"flash_decode: found lengths {lengths.dtype}, table {table.dtype}, expected int32")
    if table.shape[1] > 1 and page_size % 64:
        raise ValueError(f"flash_decode: found pages of {page_size} rows, expected a multiple of 64")
    if (k_scale is None) != (v_scale is None):
        raise ValueError("flash_decode: found one of k_scale and v_scale, expected both or neither")
    if k_scale is not None and (k_scale.shape != (Hkv,) or v_scale.shape != (Hkv,)):
        raise ValueError(f"flash_decode: found scales {tuple(k_scale.shape)}, {tuple(v_scale.shape)}, expected [{Hkv}]")
    if permute and D % 32:
        raise ValueError(f"flash_decode: found a head size of {D}, expected a multiple of 32 where columns are permuted")
    if window is not None and window < 1:
        raise ValueError(f"flash_decode: found window {window}, expected at least 1")


@torch.library.custom_op("rooflama::flash_decode", mutates_args=())
def _flash_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    table: torch.Tensor,
    scale: float,
    window: int | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    split_size: int | None,
    permute: bool,
) -> torch.Tensor:
    _check(q, k_cache, v_cache, lengths, table, window, k_scale, v_scale, permute)
    options = {"scale": scale, "window": window, "k_scale": k_scale, "v_scale": v_scale}
    B, T, Hq, D = q.shape
    if not runs_kernels(q) or D not in HEAD_SIZES or q.dtype not in (torch.bfloat16, torch.float16):
        out = flash_decode_ref(q, k_cache, v_cache, lengths, table, **options)
        return permute_columns(out) if permute else out
    _, Hkv, page_size, _ = k_cache.shape
    paged, sms = table.shape[1] > 1, num_sms(q.device.index or 0)
    if flash_ring_serves(q, k_cache, v_cache, table, k_scale, split_size):
        ring = choose_flash_ring(batch=B, tokens=T, num_kv_heads=Hkv, head_dim=D, capacity=page_size, sms=sms)
        ring = _overrides.value.get("ring") if _overrides.value else ring
        if ring is not None:
            at = {"scale_log2": scale * LOG2_E, "window": window, "permute": permute}
            return launch_flash_ring(q, k_cache, v_cache, lengths, table, ring, **at)
    launch = choose_launch(
        batch=B,
        tokens=T,
        num_heads=Hq,
        num_kv_heads=Hkv,
        head_dim=D,
        capacity=table.shape[1] * page_size,
        page_size=page_size if paged else None,
        split_size=split_size,
        sms=sms,
    )
    launch = replace(launch, **{name: value for name, value in _overrides.value.items() if name != "ring"})
    return launch_flash_decode(q, k_cache, v_cache, lengths, table, launch, permute=permute, **options)


@_flash_decode.register_fake
def _(q, k_cache, v_cache, lengths, table, scale, window, k_scale, v_scale, split_size, permute):
    _check(q, k_cache, v_cache, lengths, table, window, k_scale, v_scale, permute)
    return torch.empty_like(q)


def flash_decode(
    q, k_cache, v_cache, lengths, table, *, scale, window=None, k_scale=None, v_scale=None, split_size=None, permute=False
) -> torch.Tensor:
    """Attention of this step's tokens over the cache, this step's rows included: q [B, T, Hq, D] -> [B, T, Hq, D].

    k_cache, v_cache [pages, Hkv, page_size, D] in q's dtype or float8_e4m3fn; k_scale, v_scale [Hkv] float32 where not 1.
    lengths [B] int32: valid rows of each sequence, this step's T included, so that token t stands at lengths - T + t and sees
    the rows up to its own (with `window`: the last `window` of them). Length 0, and tokens at negative positions, give zeros.
    table [B, P] int32: position p is row p % page_size of page table[b, p // page_size].
    split_size: rows of a part, a multiple of 128, fixed so that a sequence's result does not depend on the batch around it.
    permute: the result's columns are in the order that the linear of `reads_permuted` wants.
    Raises ValueError where shapes or dtypes do not fit.
    """
    return _flash_decode(q, k_cache, v_cache, lengths, table, scale, window, k_scale, v_scale, split_size, permute)
