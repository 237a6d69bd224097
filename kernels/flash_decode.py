"""Flash decoding: attention of a few query tokens per sequence over the KV cache, in one launch.

Owns the attention of a decode or verify step and the split of its work over the GPU. Knows neither the model nor who fills
the cache. Follows Flash-Decoding (Dao et al., 2023, https://pytorch.org/blog/flash-decoding): the cache rows of a sequence are
split over programs, each keeps a running softmax (fp32, base 2), and the last program of a (sequence, KV head) to finish merges.

The grid is fixed by the cache's capacity, so that a CUDA graph can hold it; what each program does follows the lengths on the
device: 100 tokens in a 128k cache cost what 100 tokens cost. Work is counted in *items*: one part of the rows of one
(sequence, KV head). K and V are read once for all query heads of a KV head and all query tokens (the M dimension of the dots).

Letters: B sequences, T query tokens a sequence, S cache rows, Hq/Hkv heads, G = Hq/Hkv, D head size, P pages a sequence,
M query rows (G * T, padded) and N cache rows of a tile.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels._common import INTERPRET, launch_options, num_sms, pdl_supported, pdl_trigger, pdl_wait, runs_kernels

HEAD_SIZES = (64, 96, 128)  # others take the reference path
FLOOR = tl.constexpr(-1e30)  # a running maximum before any key: finite, so that FLOOR - FLOOR is 0 and not NaN
INTERPRETED = tl.constexpr(INTERPRET)
LOG2_E = math.log2(math.e)


# --------------------------------------------------------------------------------------------------------------------------
# Reference
# --------------------------------------------------------------------------------------------------------------------------


def flash_decode_ref(q, k_cache, v_cache, lengths, table, *, scale, window=None, k_scale=None, v_scale=None):
    """`flash_decode` in plain PyTorch, for any dtype and head size; computes in fp32 (in fp64 for fp64 inputs)."""
    B, T, Hq, D = q.shape
    _, Hkv, page_size, _ = k_cache.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    if not q.is_cuda:  # reads only the pages in use; on a GPU that would make the host wait
        table = table[:, : max(1, -(-int(lengths.max()) // page_size))]

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
def _first_key(length, window, T: tl.constexpr, N: tl.constexpr, WINDOWED: tl.constexpr):
    """The first cache row that any token of this step sees, rounded down to a whole block."""
    first = length * 0
    if WINDOWED:
        first = tl.maximum(length - T - window + 1, 0) // N * N
    return first


@triton.jit
def _num_parts(blocks, total_blocks, num_programs, MIN_BLOCKS: tl.constexpr, SPLIT_BLOCKS: tl.constexpr):
    """Parts that one (sequence, KV head) of `blocks` blocks is worked on in: its share of the programs, unless fixed."""
    if SPLIT_BLOCKS > 0:
        parts = tl.cdiv(blocks, SPLIT_BLOCKS)
    else:
        share = (blocks.to(tl.int64) * num_programs // tl.maximum(total_blocks, 1)).to(tl.int32)
        parts = tl.minimum(share, blocks // MIN_BLOCKS)
    return tl.maximum(parts, 1)


@triton.jit
def _load_rows(base, offsets, keep, D: tl.constexpr, COLUMNS: tl.constexpr, other):
    """Rows of K or V, [rows, COLUMNS]: `other` in rows that are not kept, which are never touched, and past the head size."""
    column = tl.arange(0, COLUMNS)
    mask = keep[:, None]
    if COLUMNS != D:
        mask = mask & (column < D)[None, :]
    return tl.load(base + offsets[:, None] + column[None, :], mask=mask, other=other)


@triton.jit
def _dot(a, b, acc):
    """a @ b + acc. The interpreter multiplies bf16 as if it were integers: there the operands, already rounded, go in as fp32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def _attend(q, k, v, key, position, window, qk_scale, top, total, acc, WINDOWED: tl.constexpr):
    """Takes one tile of keys [N] into the running softmax (`top` maximum, `total` sum, `acc` weighted values)."""
    scores = _dot(q, tl.trans(k.to(q.dtype)), tl.zeros([q.shape[0], k.shape[0]], tl.float32)) * qk_scale  # [M, N], base 2
    visible = key[None, :] <= position[:, None]
    if WINDOWED:
        visible = visible & (key[None, :] > position[:, None] - window)
    scores = tl.where(visible, scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    decay = tl.exp2(top - new_top)
    weights = tl.exp2(scores - new_top[:, None])
    total = total * decay + tl.sum(weights, 1)
    acc = _dot(weights.to(q.dtype), v.to(q.dtype), acc * decay[:, None])
    return new_top, total, acc


@triton.jit
def _flash_decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    table_ptr,
    k_scale_ptr,
    v_scale_ptr,
    out_ptr,
    partial_acc_ptr,  # [items, M tiles, ROWS, D] fp32
    partial_stats_ptr,  # [items, M tiles, 2, ROWS] fp32: running maximum and sum
    counter_ptr,  # [B * Hkv * M tiles], zero before and after every launch
    scale_log2,
    window,
    batch,
    table_width,
    page_size,
    HKV: tl.constexpr,
    G: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,  # D, padded to a power of two
    SEQUENCES: tl.constexpr,  # batch, padded to a power of two
    M: tl.constexpr,
    ROWS: tl.constexpr,  # query rows of a tile that are kept in a partial result, a power of two
    N: tl.constexpr,  # cache rows of a block
    FIRST: tl.constexpr,  # cache rows of the first tile, loaded before the wait
    MIN_BLOCKS: tl.constexpr,
    SPLIT_BLOCKS: tl.constexpr,
    MERGED: tl.constexpr,  # partial results merged at a time
    STAGES: tl.constexpr,
    PAGED: tl.constexpr,
    WINDOWED: tl.constexpr,
    SCALED: tl.constexpr,
    EARLY: tl.constexpr,  # rows of this step come after the wait
    PDL: tl.constexpr,
):
    pdl_trigger(PDL)
    num_programs = tl.num_programs(0)
    tile = tl.program_id(1)

    # Which items there are: every program finds the same answer from the lengths.
    sequence = tl.arange(0, SEQUENCES)
    in_batch = sequence < batch
    all_lengths = tl.load(lengths_ptr + sequence, mask=in_batch, other=0)
    all_blocks = tl.cdiv(all_lengths - _first_key(all_lengths, window, T, N, WINDOWED), N)
    total_blocks = tl.sum(all_blocks, 0) * HKV
    all_parts = _num_parts(all_blocks, total_blocks, num_programs, MIN_BLOCKS, SPLIT_BLOCKS)
    all_items = tl.where(in_batch, all_parts * HKV, 0)
    item_ends = tl.cumsum(all_items, 0)
    num_items = tl.sum(all_items, 0)

    row = tile * M + tl.arange(0, M)  # query row: token major, query head of the group minor
    in_group = row < G * T
    column = tl.arange(0, COLUMNS)
    in_head = column < D

    if tl.program_id(0) >= num_items:
        pdl_wait(PDL)  # an idle program waits too: the next kernel counts on it that all before has finished
    for item in tl.range(tl.program_id(0), num_items, num_programs, num_stages=1):
        # Which item this is.
        b = tl.sum((item_ends <= item).to(tl.int32), 0)
        length = tl.load(lengths_ptr + b)
        start = _first_key(length, window, T, N, WINDOWED)
        blocks = tl.cdiv(length - start, N)
        parts = _num_parts(blocks, total_blocks, num_programs, MIN_BLOCKS, SPLIT_BLOCKS)
        first_item = tl.sum(tl.where(sequence < b, all_items, 0), 0)
        head = (item - first_item) // parts
        part = (item - first_item) % parts
        if SPLIT_BLOCKS > 0:
            begin = start + part * SPLIT_BLOCKS * N
            end = tl.minimum(begin + SPLIT_BLOCKS * N, length)
        else:
            begin = start + (part.to(tl.int64) * blocks // parts).to(tl.int32) * N
            end = tl.minimum(start + ((part + 1).to(tl.int64) * blocks // parts).to(tl.int32) * N, length)

        # The first tile comes into registers before the wait, but for rows that this step appends. Page and head offsets are
        # 64-bit: a cache may hold more than 2**31 values.
        head_stride = page_size.to(tl.int64) * D
        page_stride = head_stride * HKV
        head_offset = head * head_stride
        table_row_ptr = table_ptr + b * table_width
        key = begin + tl.arange(0, FIRST)
        keep = key < end
        if PAGED:
            page = tl.load(table_row_ptr + key // page_size, mask=keep, other=0)
            offsets = page * page_stride + head_offset + key % page_size * D
            k_base, v_base = k_ptr, v_ptr
        else:
            base = tl.load(table_row_ptr) * page_stride + head_offset
            offsets = key * D
            k_base, v_base = k_ptr + base, v_ptr + base
        is_old = keep
        if EARLY:
            is_old = keep & (key < length - T)
        k_first = _load_rows(k_base, offsets, is_old, D, COLUMNS, 0.0)
        v_first = _load_rows(v_base, offsets, is_old, D, COLUMNS, 0.0)
        qk_scale = scale_log2
        if SCALED:
            qk_scale *= tl.load(k_scale_ptr + head)

        pdl_wait(PDL)

        token = row // G
        q_row = (b * T + token) * (HKV * G) + head * G + row % G  # also the output's row
        q_offsets = q_row.to(tl.int64)[:, None] * D + column[None, :]
        q_mask = in_group[:, None] & in_head[None, :]
        q = tl.load(q_ptr + q_offsets, mask=q_mask, other=0.0)
        if EARLY:
            if tl.minimum(begin + FIRST, end) > length - T:
                is_new = keep & (key >= length - T)
                k_first = _load_rows(k_base, offsets, is_new, D, COLUMNS, k_first)
                v_first = _load_rows(v_base, offsets, is_new, D, COLUMNS, v_first)

        position = tl.where(in_group, length - T + token, -1)
        top = tl.full([M], FLOOR, tl.float32)
        total = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, COLUMNS], tl.float32)
        for block_begin in tl.range(begin + FIRST, end, N, num_stages=STAGES):
            block_key = block_begin + tl.arange(0, N)
            if PAGED:  # a block never crosses a page
                page = tl.load(table_row_ptr + block_begin // page_size)
                block_base = page * page_stride + head_offset
                block_offsets = (block_begin % page_size + tl.arange(0, N)) * D
                k = _load_rows(k_ptr + block_base, block_offsets, block_key < end, D, COLUMNS, 0.0)
                v = _load_rows(v_ptr + block_base, block_offsets, block_key < end, D, COLUMNS, 0.0)
            else:
                k = _load_rows(k_base, block_key * D, block_key < end, D, COLUMNS, 0.0)
                v = _load_rows(v_base, block_key * D, block_key < end, D, COLUMNS, 0.0)
            top, total, acc = _attend(q, k, v, block_key, position, window, qk_scale, top, total, acc, WINDOWED)
        # The first tile comes last: the loop's loads are under way while it waits in registers.
        top, total, acc = _attend(q, k_first, v_first, key, position, window, qk_scale, top, total, acc, WINDOWED)
        if SCALED:
            acc *= tl.load(v_scale_ptr + head)

        if parts == 1:
            out = acc / tl.where(total > 0, total, 1.0)[:, None]  # nothing visible: zeros
            tl.store(out_ptr + q_offsets, out.to(out_ptr.dtype.element_ty), mask=q_mask)
        else:
            local = tl.arange(0, M)
            slot = (item * tl.num_programs(1) + tile).to(tl.int64)
            acc_offsets = (slot * ROWS + local)[:, None] * D + column[None, :]
            tl.store(partial_acc_ptr + acc_offsets, acc, mask=q_mask)
            tl.store(partial_stats_ptr + slot * 2 * ROWS + local, top, mask=in_group)
            tl.store(partial_stats_ptr + slot * 2 * ROWS + ROWS + local, total, mask=in_group)
            tl.debug_barrier()  # every thread's stores come before the one thread's release below
            counter = counter_ptr + (b * HKV + head) * tl.num_programs(1) + tile
            if tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1:
                tl.store(counter, 0)  # for the next launch
                _merge(
                    out_ptr,
                    partial_acc_ptr,
                    partial_stats_ptr,
                    item - part,
                    parts,
                    b,
                    head,
                    tile,
                    HKV,
                    G,
                    T,
                    D,
                    COLUMNS,
                    M,
                    ROWS,
                    MERGED,
                )


@triton.jit
def _merge(
    out_ptr,
    partial_acc_ptr,
    partial_stats_ptr,
    first_item,
    parts,
    b,
    head,
    tile,
    HKV: tl.constexpr,
    G: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    MERGED: tl.constexpr,
):
    """Merges the `parts` partial results from `first_item` on, in order, MERGED at a time, and writes the output."""
    local = tl.arange(0, ROWS)
    row = tile * M + local
    in_group = row < G * T
    column = tl.arange(0, COLUMNS)
    mask = in_group[:, None] & (column < D)[None, :]
    top = tl.full([ROWS], FLOOR, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for part_begin in range(0, parts, MERGED):
        part = part_begin + tl.arange(0, MERGED)
        slot = (first_item + part).to(tl.int64) * tl.num_programs(1) + tile
        kept = (part < parts)[:, None] & in_group[None, :]
        stats = partial_stats_ptr + (slot * 2 * ROWS)[:, None] + local[None, :]  # [MERGED, ROWS]
        offsets = ((slot * ROWS)[:, None] + local[None, :])[:, :, None] * D + column[None, None, :]
        # .cg: from L2, where other multiprocessors' results are
        tops = tl.load(stats, mask=kept, other=FLOOR, cache_modifier=".cg")
        totals = tl.load(stats + ROWS, mask=kept, other=0.0, cache_modifier=".cg")
        accs = tl.load(partial_acc_ptr + offsets, mask=kept[:, :, None] & mask[None, :, :], other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(tops, 0))
        decay = tl.exp2(top - new_top)
        weights = tl.exp2(tops - new_top[None, :])
        total = total * decay + tl.sum(totals * weights, 0)
        acc = acc * decay[:, None] + tl.sum(accs * weights[:, :, None], 0)
        top = new_top
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    q_row = (b * T + row // G) * (HKV * G) + head * G + row % G
    tl.store(out_ptr + q_row.to(tl.int64)[:, None] * D + column[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------------------------------------------
# Launch
# --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """How one call is laid out. Rows are cache rows unless said otherwise."""

    programs: int  # programs for each tile of query rows
    query_rows: int  # M: query rows of a tile, at least 16 for the tensor cores
    query_tiles: int
    block_rows: int  # N
    first_rows: int  # rows loaded before the dependency wait
    min_rows: int  # a part smaller than this is not worth a merge
    split_rows: int  # rows of every part where the caller fixes them, else 0
    items: int  # the most items there can be: sizes the scratch memory
    merged: int  # partial results merged at a time
    warps: int
    stages: int


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

    With `split_size` nothing that decides the numbers depends on the batch.
    """
    columns = triton.next_power_of_2(head_dim)
    rows = num_heads // num_kv_heads * tokens
    query_rows = min(64, max(16, triton.next_power_of_2(rows)))
    query_tiles = -(-rows // query_rows)
    block_rows = 64  # divides every page size allowed
    first_rows = min(128, max(block_rows, triton.next_power_of_2(capacity)))
    min_rows = max(256, block_rows)
    pairs = batch * num_kv_heads
    if split_size is not None:
        if split_size < 1 or split_size % block_rows:
            raise ValueError(f"split_size: found {split_size}, expected a positive multiple of {block_rows}")
        items = pairs * max(1, -(-capacity // split_size))
        programs = min(items, 4 * sms)
    else:
        # As many programs as run at once, or one for each (sequence, KV head) if those are more: the GPU's own scheduler
        # balances whole items better than a loop over them.
        useful = pairs * max(1, capacity // min_rows)
        programs = min(useful, max(4 * sms if pairs > sms else 2 * sms, pairs))
        items = programs + pairs
    # 64 KiB of partial results at a time: 128 registers of each of 128 threads.
    kept_rows = min(query_rows, triton.next_power_of_2(rows))
    merged = max(1, min(64, 16384 // (kept_rows * columns)))
    return Launch(
        programs=programs,
        query_rows=query_rows,
        query_tiles=query_tiles,
        block_rows=block_rows,
        first_rows=first_rows,
        min_rows=min_rows,
        split_rows=split_size or 0,
        items=items,
        merged=merged,
        warps=4,
        stages=3,
    )


MAX_COUNTERS = 65536  # (sequence, KV head, tile) triples of one call
_counters: dict[torch.device, torch.Tensor] = {}


def _zeroed_counters(device: torch.device) -> torch.Tensor:
    """This device's counters of finished parts: zero between launches, because the last program to finish resets its own.

    One buffer a device, so two streams must not run flash_decode at the same time.
    """
    if device not in _counters:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("flash_decode must run once on a device before a CUDA graph captures it")
        _counters[device] = torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)
    return _counters[device]


def launch_flash_decode(q, k_cache, v_cache, lengths, table, launch: Launch, *, scale, window, k_scale, v_scale):
    """Runs the kernel as `launch` says."""
    B, T, Hq, D = q.shape
    _, Hkv, page_size, _ = k_cache.shape
    out = torch.empty_like(q)
    rows = min(launch.query_rows, triton.next_power_of_2(Hq // Hkv * T))
    acc = torch.empty(launch.items, launch.query_tiles, rows, D, dtype=torch.float32, device=q.device)
    stats = torch.empty(launch.items, launch.query_tiles, 2, rows, dtype=torch.float32, device=q.device)
    _flash_decode_kernel[(launch.programs, launch.query_tiles)](
        q,
        k_cache,
        v_cache,
        lengths,
        table,
        k_scale,
        v_scale,
        out,
        acc,
        stats,
        _zeroed_counters(q.device),
        scale * LOG2_E,
        window or 0,
        B,
        table.shape[1],
        page_size,
        HKV=Hkv,
        G=Hq // Hkv,
        T=T,
        D=D,
        COLUMNS=triton.next_power_of_2(D),
        SEQUENCES=triton.next_power_of_2(B),
        M=launch.query_rows,
        ROWS=rows,
        N=launch.block_rows,
        FIRST=launch.first_rows,
        MIN_BLOCKS=launch.min_rows // launch.block_rows,
        SPLIT_BLOCKS=launch.split_rows // launch.block_rows,
        MERGED=launch.merged,
        STAGES=launch.stages,
        PAGED=table.shape[1] > 1,
        WINDOWED=window is not None,
        SCALED=k_scale is not None,
        EARLY=INTERPRET or pdl_supported(q),
        num_warps=launch.warps,
        **launch_options(q),
    )
    return out


# --------------------------------------------------------------------------------------------------------------------------
# Operator
# --------------------------------------------------------------------------------------------------------------------------


def _check(q, k_cache, v_cache, lengths, table, window, k_scale, v_scale):
    B, _, Hq, D = q.shape
    _, Hkv, page_size, cache_D = k_cache.shape
    if k_cache.shape != v_cache.shape or cache_D != D or Hq % Hkv:
        raise ValueError(
            f"flash_decode: found q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}, "
            "expected q [B, T, Hq, D] and caches [pages, Hkv, page_size, D] with Hq a multiple of Hkv"
        )
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
) -> torch.Tensor:
    _check(q, k_cache, v_cache, lengths, table, window, k_scale, v_scale)
    options = {"scale": scale, "window": window, "k_scale": k_scale, "v_scale": v_scale}
    B, T, Hq, D = q.shape
    if not runs_kernels(q) or D not in HEAD_SIZES or q.dtype not in (torch.bfloat16, torch.float16):
        return flash_decode_ref(q, k_cache, v_cache, lengths, table, **options)
    _, Hkv, page_size, _ = k_cache.shape
    paged = table.shape[1] > 1
    launch = choose_launch(
        batch=B,
        tokens=T,
        num_heads=Hq,
        num_kv_heads=Hkv,
        head_dim=D,
        capacity=table.shape[1] * page_size,
        page_size=page_size if paged else None,
        split_size=split_size,
        sms=num_sms(q.device.index or 0),
    )
    return launch_flash_decode(q, k_cache, v_cache, lengths, table, launch, **options)


@_flash_decode.register_fake
def _(q, k_cache, v_cache, lengths, table, scale, window, k_scale, v_scale, split_size):
    _check(q, k_cache, v_cache, lengths, table, window, k_scale, v_scale)
    return torch.empty_like(q)


def flash_decode(
    q, k_cache, v_cache, lengths, table, *, scale, window=None, k_scale=None, v_scale=None, split_size=None
) -> torch.Tensor:
    """Attention of this step's tokens over the cache, this step's rows included: q [B, T, Hq, D] -> [B, T, Hq, D].

    k_cache, v_cache [pages, Hkv, page_size, D] in q's dtype, or float8_e4m3fn with k_scale, v_scale [Hkv] float32.
    lengths [B] int32: valid rows of each sequence, this step's T included, so that token t stands at lengths - T + t and sees
    the rows up to its own (with `window`: the last `window` of them). Length 0, and tokens at negative positions, give zeros.
    table [B, P] int32: position p is row p % page_size of page table[b, p // page_size].
    split_size: rows of a part, a multiple of 64, fixed so that a sequence's result does not depend on the batch around it.
    Raises ValueError where shapes or dtypes do not fit.
    """
    return _flash_decode(q, k_cache, v_cache, lengths, table, scale, window, k_scale, v_scale, split_size)
