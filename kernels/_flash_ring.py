"""Flash decoding on Hopper: K and V stream by TMA through a ring of shared memory, and every warp attends to keys of its own.

Owns the kernel that `flash_decode` launches for a 16-bit cache of one page a sequence and up to 16 query rows a KV head,
written in Gluon, and the choice of its ring. Does not know the model. Needs a GPU of compute capability 9.0: there is no
interpreter for it, so tests compile it anywhere and run it on a card.
Letters: B sequences, T query tokens a sequence, S stages, HKV heads, G query heads a KV head, D head size, ROWS query rows
(G * T, padded to 8 or 16), N cache rows of a block, W warps, KEYS = N / W rows of a block that a warp has.

A warp keeps a running softmax of all query rows and its own keys of each block, and exchanges nothing with the others before
the end. By mma.sync, with keys as rows and queries as columns, eight at least: wgmma has 64 keys at least, and its four warps
would exchange maxima. Warps are added up through shared memory when a part is done. Then parts are merged:
- in a cluster, where there are few pairs of a sequence and a KV head and their caches are short: a pair is a cluster's, whose
  programs write shares of their outputs into each other's shared memory, and each adds up its own. Nothing goes through memory.
- else by the program that is done last, from memory, as flash_decode.py's do.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from kernels._common import (
    arrives_last,
    has_wgmma,
    launch_options,
    num_sms,
    pdl_trigger,
    pdl_wait,
    permuted,
    prefetch_share,
    zeroed_workspace,
)
from kernels._flash_split import FLOOR, MAX_COUNTERS, find_part, first_row, parts_of, query_rows, second_unit
from kernels._hopper import (
    LINE,
    expect_bytes,
    launch_clusters,
    leave_l1,
    mark_shared,
    open_inbox,
    prefetch_descriptors,
    receive,
    send,
    shared_address,
    wait_for_inboxes,
)
from kernels._ring import described, tma_reads

QUERY_ROWS = gl.constexpr(16)  # ROWS, at most
HEAD_SIZES = (64, 128)
DTYPES = (torch.bfloat16, torch.float16)

# ---------------------------------------------------------------- layouts (`x * 0 + y` gives y the shape of x, too)


@gluon.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@gluon.constexpr_function
def _mma_layout(W):
    """Of [W, keys or D, queries]: a warp has all rows and columns of its own."""
    return gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])


@gluon.constexpr_function
def _warps_layout(W, D):
    """Of [W, ROWS, D] to be added up over W: those in one thread, a warp's lanes beside each other in D, four values each."""
    across = 32 if D >= 128 else 16
    return gl.BlockedLayout([W, 1, 4], [1, 32 // across, across], [1, W, 1], [2, 1, 0])


@gluon.constexpr_function
def _parts_layout(C, R, D, W):
    """Of [C, R, D] to be added up over C: no sum goes from warp to warp."""
    along_r = min(R, W)
    columns = D // min(D, W // along_r)  # of a warp
    vector = 4 if columns >= 128 else 1
    lanes = min(32, columns // vector)
    values, threads = [max(1, C * lanes // 32), 1, vector], [32 // lanes, 1, lanes]
    return gl.BlockedLayout(values, threads, [1, along_r, W // along_r], [2, 1, 0])


# ---------------------------------------------------------------- the ring


@gluon.jit
def _load_block(k_desc, v_desc, ring, slot, row, pred):
    """N rows of K and V into a stage, whose barriers expect them."""
    k_smem, v_smem, k_bars, v_bars = ring
    tma.async_copy_global_to_shared(k_desc, [row, 0], k_bars.index(slot), k_smem.index(slot), pred=pred)
    tma.async_copy_global_to_shared(v_desc, [row, 0], v_bars.index(slot), v_smem.index(slot), pred=pred)


@gluon.jit
def _load_q(q_ptr, b, head, HALVES: gl.constexpr, W: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, T: gl.constexpr,
            HKV: gl.constexpr, G: gl.constexpr):  # fmt: skip
    """[W, D, ROWS], the same for each warp, where mma.sync wants it: no trip through shared memory. Or halves of D."""
    B: gl.constexpr = gl.DotOperandLayout(1, _mma_layout(W), 2)
    warp = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, B)))[:, None][:, :, None]
    column = gl.arange(0, D // HALVES, gl.SliceLayout(0, gl.SliceLayout(2, B)))[None, :][:, :, None]
    m = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(1, B)))[None, :][:, None, :]
    offset = warp * 0 + query_rows(m, b, head, T, HKV, G) * D + column
    mask = (m < G * T) & (offset >= 0)
    q = (gl.load(q_ptr + offset, mask=mask, other=0.0),)
    if HALVES == 2:
        q = q + (gl.load(q_ptr + offset + D // 2, mask=mask, other=0.0),)  # noqa: RUF005 (Triton knows no star in a tuple)
    return q


@gluon.jit
def _attend(
    q, ring, k_desc, v_desc, base, row, count, length, window, scale_log2,
    T: gl.constexpr, G: gl.constexpr, S: gl.constexpr, WINDOWED: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """`count` blocks from cache row `row` on -> maximum, sum [W, ROWS], weighted values [W, D, ROWS]. base: row 0 of the
    sequence. Keys are the rows of both products, queries their columns: there are as few as eight."""
    MMA: gl.constexpr = _mma_layout(W)
    N: gl.constexpr = k_desc.block_type.shape[0]
    D: gl.constexpr = k_desc.block_type.shape[1]
    ROWS: gl.constexpr = q[0].shape[2]
    KEYS: gl.constexpr = N // W
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    k_smem, v_smem, k_bars, v_bars = ring
    m = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(1, MMA)))
    position = gl.where(m < G * T, length - T + m // G, -1)[None, :][:, None, :]
    warp = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, MMA)))[:, None][:, :, None]
    key = row + warp * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, gl.SliceLayout(2, MMA)))[None, :][:, :, None]
    v_warp = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, A)))[:, None][:, :, None]
    v_key = row + v_warp * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, gl.SliceLayout(1, A)))[None, :][:, None, :]

    top = gl.full([W, ROWS], FLOOR, gl.float32, gl.SliceLayout(1, MMA))
    total = gl.zeros([W, ROWS], gl.float32, gl.SliceLayout(1, MMA))
    acc = gl.zeros([W, D, ROWS], gl.float32, MMA)
    slot = 0
    phase = 0
    for i in range(count):
        mbarrier.wait(k_bars.index(slot), phase)
        zeros = gl.zeros([W, KEYS, ROWS], gl.float32, MMA)
        k = k_smem.index(slot).reshape([W, KEYS, D]).load(A)
        if len(q) == 2:  # two sums, half as long to wait for
            k, k1 = gl.split(gl.permute(gl.reshape(k, [W, KEYS, 2, D // 2]), (0, 1, 3, 2)))
            k, k1 = gl.convert_layout(k, A, assert_trivial=True), gl.convert_layout(k1, A, assert_trivial=True)
            scores = mma_v2(k, q[0], zeros) + mma_v2(k1, q[1], zeros)
        else:
            scores = mma_v2(k, q[0], zeros)
        scores *= scale_log2
        visible = key + i * N <= position
        if WINDOWED:
            visible = visible & (key + i * N > position - window)
        scores = gl.where(visible, scores, -float("inf"))
        new_top = gl.maximum(top, gl.max(scores, 1))
        decay = gl.exp2(top - new_top)
        weights = gl.exp2(scores - new_top[:, None, :])
        total = total * decay + gl.sum(weights, 1)
        top = new_top
        weights = gl.convert_layout(weights.to(q[0].dtype), B)
        mbarrier.wait(v_bars.index(slot), phase)
        v = v_smem.index(slot).reshape([W, KEYS, D]).permute((0, 2, 1)).load(A)
        if row + (i + 1) * N > length:  # 0 x NaN: what is behind the end may be anything
            v = gl.where(v_key + i * N < length, v, 0.0)
        acc = mma_v2(v, weights, acc * decay[:, None, :])
        if i + S < count:
            mbarrier.expect(k_bars.index(slot), k_desc.block_type.nbytes)
            mbarrier.expect(v_bars.index(slot), v_desc.block_type.nbytes)
            tl.debug_barrier()  # every warp has read
            _load_block(k_desc, v_desc, ring, slot, base + row + (i + S) * N, True)
        wraps = slot == S - 1
        phase = gl.where(wraps, phase ^ 1, phase)
        slot = gl.where(wraps, 0, slot + 1)
    return top, total, acc


# ---------------------------------------------------------------- merging


@gluon.jit
def _add_parts(tops, totals, accs):
    """[C, R], [C, R], [C, R, D] -> [R], [R], [R, D], in a fixed order; the first two as the third has its rows."""
    top = gl.max(tops, 0)
    weights = gl.exp2(tops - top[None, :])
    acc = gl.sum(accs * weights[:, :, None], 0)
    ROW: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    total = gl.convert_layout(gl.sum(totals * weights, 0), ROW, assert_trivial=True)
    return gl.convert_layout(top, ROW, assert_trivial=True), total, acc


@gluon.jit
def _add_warps(top, total, acc):
    """Through shared memory, where the ring was -> maximum, sum [ROWS], weighted values [ROWS, D]."""
    W: gl.constexpr = acc.shape[0]
    D: gl.constexpr = acc.shape[1]
    ROWS: gl.constexpr = acc.shape[2]
    L: gl.constexpr = _warps_layout(W, D)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    # swizzled so that a warp's stores, eight neighbours in D of every other row, are in as many banks
    accs_smem = gl.allocate_shared_memory(gl.float32, [W, ROWS, D], gl.SwizzledSharedLayout(8, 2, 4, [2, 1, 0]))
    tops_smem = gl.allocate_shared_memory(gl.float32, [W, ROWS], PLAIN)
    totals_smem = gl.allocate_shared_memory(gl.float32, [W, ROWS], PLAIN)
    accs_smem.store(gl.permute(acc, (0, 2, 1)))
    tops_smem.store(top)
    totals_smem.store(total)
    tl.debug_barrier()
    return _add_parts(tops_smem.load(gl.SliceLayout(2, L)), totals_smem.load(gl.SliceLayout(2, L)), accs_smem.load(L))


@gluon.jit
def _store_out(
    out_ptr, acc, total, row, column, b, head,
    D: gl.constexpr, T: gl.constexpr, HKV: gl.constexpr, G: gl.constexpr, PERMUTE: gl.constexpr,
):  # fmt: skip
    """acc / total [rows, columns] of query rows `row`; zeros where nothing was visible."""
    out = acc / gl.where(total > 0, total, 1.0)[:, None]
    if PERMUTE:
        column = permuted(column)
    offset = query_rows(row, b, head, T, HKV, G)[:, None] * D + column[None, :]
    gl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=(row < G * T)[:, None] & (offset >= 0))


@gluon.jit
def _merge(
    partial_ptr, stats_ptr, first_unit, next_unit, head, parts,
    ROWS: gl.constexpr, D: gl.constexpr, HKV: gl.constexpr, MERGED: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """Adds up `parts` partial results, of `first_unit` and then from `next_unit` on, MERGED at a time -> sum [ROWS], weighted
    values [ROWS, D]."""
    row = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, L)))
    column = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, L)))
    of_values = (row * D)[None, :][:, :, None] + column[None, :][:, None, :]
    top = gl.full([ROWS], FLOOR, gl.float32, gl.SliceLayout(1, gl.SliceLayout(0, L)))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, gl.SliceLayout(0, L)))
    acc = gl.zeros([ROWS, D], gl.float32, gl.SliceLayout(0, L))
    for begin in range(0, parts, MERGED):
        part = begin + gl.arange(0, MERGED, gl.SliceLayout(1, gl.SliceLayout(2, L)))
        there = part < parts
        item = gl.where(part == 0, first_unit, next_unit + part - 1) * HKV + head
        stats = stats_ptr + (item * (2 * ROWS))[:, None] + row[None, :]
        values = partial_ptr + (item.to(gl.int64) * (ROWS * D))[:, None][:, :, None] + of_values
        # .cg: from L2, where the other multiprocessors' results are
        accs = gl.load(values, mask=there[:, None][:, :, None], other=0.0, cache_modifier=".cg")
        tops = gl.load(stats, mask=there[:, None], other=FLOOR, cache_modifier=".cg")
        totals = gl.load(stats + ROWS, mask=there[:, None], other=0.0, cache_modifier=".cg")
        more_top, more_total, more = _add_parts(tops, totals, accs)
        new_top = gl.maximum(top, more_top)
        decay, more_decay = gl.exp2(top - new_top), gl.exp2(more_top - new_top)
        total = total * decay + more_total * more_decay
        acc = acc * decay[:, None] + more * more_decay[:, None]
        top = new_top
    return total, acc


@gluon.jit
def _open_inboxes(SHARE: gl.constexpr, C: gl.constexpr, D: gl.constexpr, W: gl.constexpr):
    """Room for the shares that C programs will send -> values [C, SHARE], their maxima and sums [2, C, R] with the barrier
    behind them, and where these three are. SHARE: numbers of the output that one program adds up, in R rows of at most D."""
    L: gl.constexpr = gl.SliceLayout(0, _warps_layout(W, D))
    MAXIMA: gl.constexpr = 4 * C * (SHARE // min(SHARE, D))  # bytes
    values = gl.allocate_shared_memory(gl.float32, [C * SHARE // 32, 32], LINE)
    LINES: gl.constexpr = (2 * MAXIMA + 16 + 1023) // 1024 * 8
    stats = gl.allocate_shared_memory(gl.float32, [LINES, 32], LINE)
    mark_shared(W)
    values_at = shared_address(values, L)
    stats_at = shared_address(stats, L)
    tl.debug_barrier()  # the barrier may lie on another's mark
    bar_at = gl.max(stats_at.reshape([1]), 0) + 2 * MAXIMA
    open_inbox(bar_at)
    return values, stats, values_at, stats_at, bar_at


@gluon.jit
def _exchange(
    inbox, top, total, acc, row, column, part, parts, SHARE: gl.constexpr, C: gl.constexpr, D: gl.constexpr, W: gl.constexpr
):
    """Every program of the cluster gets its share of all parts' results -> sum [R], weighted values [R, columns]."""
    values, stats, values_at, stats_at, bar_at = inbox
    WIDE: gl.constexpr = min(SHARE, D)
    R: gl.constexpr = SHARE // WIDE
    ROWS: gl.constexpr = acc.shape[0]
    OWN: gl.constexpr = gl.SliceLayout(0, _warps_layout(W, D))
    wait_for_inboxes()
    expect_bytes(bar_at, parts * (4 * SHARE + 8 * R))
    if part < parts:
        flat = row[:, None] * D + column[None, :]
        rank, place = flat // SHARE, flat % SHARE
        top_at = stats_at + (part * R + place // WIDE) * 4
        zeros = gl.zeros([ROWS, D], gl.float32, OWN)
        send(
            acc, zeros + top[:, None], zeros + total[:, None], rank, values_at + (part * SHARE + place) * 4,
            top_at, top_at + 4 * C * R, (place % WIDE == 0).to(gl.int32), stats_at + 8 * C * R + rank * 0,
        )  # fmt: skip
    receive(bar_at)
    L: gl.constexpr = _parts_layout(C, R, WIDE, W)
    there = (gl.arange(0, C, gl.SliceLayout(1, gl.SliceLayout(2, L))) < parts)[:, None]
    accs = values._reinterpret(gl.float32, [C, R, WIDE], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])).load(L)
    both = stats._reinterpret(gl.float32, [2, C, R], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    tops = gl.where(there, both.index(0).load(gl.SliceLayout(2, L)), FLOOR)
    totals = gl.where(there, both.index(1).load(gl.SliceLayout(2, L)), 0.0)
    _, total, acc = _add_parts(tops, totals, gl.where(there[:, :, None], accs, 0.0))
    return total, acc


# ---------------------------------------------------------------- the kernel


@gluon.jit(do_not_specialize=["window", "batch", "page_size", "max_parts", "spare_programs"])
def _flash_ring_kernel(
    k_desc, v_desc, q_ptr, k_ptr, v_ptr, lengths_ptr, table_ptr, out_ptr,
    partial_ptr,  # [items, ROWS, D] fp32: weighted values; not in a cluster
    stats_ptr,  # [items, 2, ROWS] fp32: maximum and sum
    counter_ptr,  # [B, Hkv], zero before and after every launch
    scale_log2, window, batch, page_size, max_parts, spare_programs,
    HKV: gl.constexpr, G: gl.constexpr, T: gl.constexpr, SEQUENCES: gl.constexpr, ROWS: gl.constexpr, S: gl.constexpr,
    LATE: gl.constexpr,
    SPLIT: gl.constexpr,  # a sequence may have several parts, merged by the last
    CLUSTER: gl.constexpr,  # programs of a (sequence, KV head) that merge within their cluster; or 0
    MERGED: gl.constexpr, WINDOWED: gl.constexpr, PERMUTE: gl.constexpr, PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    if not LATE:
        pdl_trigger(PDL)
    prefetch_descriptors("_flash_ring_kernel", (0, 5))
    N: gl.constexpr = k_desc.block_type.shape[0]
    D: gl.constexpr = k_desc.block_type.shape[1]
    W: gl.constexpr = num_warps
    DTYPE: gl.constexpr = k_desc.dtype
    OWN: gl.constexpr = gl.SliceLayout(0, _warps_layout(W, D))
    SHARE: gl.constexpr = ROWS * D // max(CLUSTER, 1)
    sequence = gl.arange(0, SEQUENCES, gl.BlockedLayout([1], [32], [W], [0]))
    split = (sequence, lengths_ptr, batch, window, max_parts, spare_programs, _log2(N))
    item = gl.program_id(0)
    if SPLIT:
        head = item % HKV
        b, part = find_part(item // HKV, split, T, HKV, SEQUENCES, 0, N, WINDOWED)
        length, page = gl.load(lengths_ptr + b, mask=b < batch, other=0), gl.load(table_ptr + b, mask=b < batch, other=0)
    else:
        pair, part = item // max(CLUSTER, 1), item % max(CLUSTER, 1)
        b, head = pair // HKV, pair % HKV
        length, page = gl.load(lengths_ptr + b), gl.load(table_ptr + b)

    k_smem = gl.allocate_shared_memory(DTYPE, [S, N, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(DTYPE, [S, N, D], v_desc.layout)
    k_bars = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    v_bars = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    ring = (k_smem, v_smem, k_bars, v_bars)
    if CLUSTER:
        inbox = _open_inboxes(SHARE, CLUSTER, D, W)
    for i in gl.static_range(S):  # while the length is on its way; behind the inboxes, whose marks are everywhere
        mbarrier.init(k_bars.index(i), count=1)
        mbarrier.init(v_bars.index(i), count=1)
    fence_async_shared()
    tl.debug_barrier()

    start = first_row(length, window, T, N, WINDOWED)
    blocks = (length - start + N - 1) >> _log2(N)
    if CLUSTER:
        parts = gl.maximum(gl.minimum(blocks, CLUSTER), 1)
        first_block = gl.where(blocks < CLUSTER, part, part * blocks >> _log2(CLUSTER))
        end_block = gl.where(blocks < CLUSTER, gl.minimum(part + 1, blocks), (part + 1) * blocks >> _log2(CLUSTER))
    elif SPLIT:
        parts = parts_of(length - start, split, T, HKV, SEQUENCES, 0, N, WINDOWED)
        first_block = ((part * blocks).to(gl.uint32) // parts.to(gl.uint32)).to(gl.int32)
        end_block = (((part + 1) * blocks).to(gl.uint32) // parts.to(gl.uint32)).to(gl.int32)
    else:
        parts, first_block, end_block = 1, 0, blocks
    count = gl.where(part < parts, end_block - first_block, 0)
    row = start + first_block * N
    base = (page * HKV + head) * page_size
    first = gl.minimum(count, S)  # blocks to fill the ring with
    ready = first  # those of them without a row that this step appends: no kernel writes them now
    if PDL:
        ready = gl.minimum(gl.maximum((length - T - row) >> _log2(N), 0), first)
    for i in range(first):
        mbarrier.expect(k_bars.index(i), k_desc.block_type.nbytes)
        mbarrier.expect(v_bars.index(i), v_desc.block_type.nbytes)
        _load_block(k_desc, v_desc, ring, i, base + row + i * N, i < ready)
    if PDL:
        if ready < first:  # these wait, but not for memory
            late = row + ready * N
            offset = (base + late).to(gl.int64) * D
            late_bytes = gl.minimum((first - ready) * N, length - late) * (2 * D)
            prefetch_share(k_ptr + offset, late_bytes, item * 0, 1, PDL)
            prefetch_share(v_ptr + offset, late_bytes, item * 0, 1, PDL)
    pdl_wait(PDL)  # an idle program waits too: the next kernel counts on it that all before has finished
    if PDL:
        for i in range(ready, first):
            _load_block(k_desc, v_desc, ring, i, base + row + i * N, True)

    if LATE:
        if count <= S:
            pdl_trigger(PDL)
    if CLUSTER or part < parts:
        HALVES: gl.constexpr = 2 if D == 128 and N // W == 16 else 1
        q = _load_q(q_ptr, b, head, HALVES, W, ROWS, D, T, HKV, G)
        top, total, acc = _attend(q, ring, k_desc, v_desc, base, row, count, length, window, scale_log2, T, G, S, WINDOWED, W)
        if LATE:
            if count > S:
                pdl_trigger(PDL)
        top, total, acc = _add_warps(top, total, acc)
        m = gl.arange(0, ROWS, gl.SliceLayout(1, OWN))
        column = gl.arange(0, D, gl.SliceLayout(0, OWN))
        if not (SPLIT or CLUSTER):  # known when compiling: no code to merge with
            _store_out(out_ptr, acc, total, m, column, b, head, D, T, HKV, G, PERMUTE)
        elif parts == 1:
            if part == 0:
                _store_out(out_ptr, acc, total, m, column, b, head, D, T, HKV, G, PERMUTE)
            if CLUSTER:
                wait_for_inboxes()
        elif CLUSTER:
            all_total, all_acc = _exchange(inbox, top, total, acc, m, column, part, parts, SHARE, CLUSTER, D, W)
            OF_ALL: gl.constexpr = all_acc.type.layout
            my_m = part * SHARE // D + gl.arange(0, all_acc.shape[0], gl.SliceLayout(1, OF_ALL))
            my_column = part * SHARE % D + gl.arange(0, all_acc.shape[1], gl.SliceLayout(0, OF_ALL))
            _store_out(out_ptr, all_acc, all_total, my_m, my_column, b, head, D, T, HKV, G, PERMUTE)
        else:
            values = partial_ptr + item.to(gl.int64) * (ROWS * D) + m[:, None] * D + column[None, :]
            gl.store(values, acc)
            gl.store(stats_ptr + item * (2 * ROWS) + m, top)
            gl.store(stats_ptr + item * (2 * ROWS) + ROWS + m, total)
            if arrives_last(counter_ptr + b * HKV + head, parts):
                L: gl.constexpr = _parts_layout(MERGED, ROWS, D, W)
                next_unit = second_unit(b, split, T, HKV, SEQUENCES, 0, N, WINDOWED)
                all_total, all_acc = _merge(partial_ptr, stats_ptr, b, next_unit, head, parts, ROWS, D, HKV, MERGED, L)
                all_m = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(0, L)))
                all_columns = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(0, L)))
                _store_out(out_ptr, all_acc, all_total, all_m, all_columns, b, head, D, T, HKV, G, PERMUTE)


# ---------------------------------------------------------------- launch


@dataclass(frozen=True)
class FlashRing:
    """How one call is laid out."""

    block_rows: int  # N: at least 16 a warp
    stages: int
    warps: int
    programs: int  # of all pairs of a sequence and a KV head; of clusters, those in one
    cluster: bool = False  # a pair's programs are a cluster
    late: bool = False  # the next kernel may start behind the wait: at once if the ring holds all blocks, else after the last
    leaves_l1: bool = False  # to kernels beside it, which stream through it: _hopper.leave_l1


@functools.cache
def choose_flash_ring(
    *, batch: int, tokens: int, num_kv_heads: int, head_dim: int, capacity: int, sms: int = 132
) -> FlashRing | None:
    """The ring for caches of `capacity` rows a sequence, by whole steps on an H200 with lengths alike (LOG.md).

    None: flash_decode.py's kernel takes no more of a step, or nothing else was tried: where one sequence of few rows has a
    small head size, or more KV heads than clusters are laid out for; in batches of 5 to 8 pairs a multiprocessor, and in larger
    ones of the small head size.
    """
    pairs = max(batch * num_kv_heads, 1)
    rows = 8192 // head_dim  # 16 KiB of K
    most = 1 << (64 // pairs).bit_length() - 1 if pairs <= 32 else 0  # programs of a pair in a cluster: 64 in all
    long = capacity > 4096  # then one sequence may be much longer than the others: there are programs to split it over
    if batch * tokens == 1:  # beside linears of one row
        if capacity > 8192 and pairs < sms // 2:
            return FlashRing(rows, 3, 4, programs=sms - sms % pairs, late=True, leaves_l1=True)
        if (head_dim == 64 and capacity < 512) or most < 2:
            return None
        return FlashRing(rows, 3, 4, programs=min(most, 16), cluster=True, late=True, leaves_l1=True)
    if most >= 4 and capacity <= 8192:
        return FlashRing(rows, 6, 4, programs=min(most, 8), cluster=True)
    if pairs <= sms:
        if long:
            even = 2 * sms - 2 * sms % pairs  # the same number for each pair, unless that leaves out many
            return FlashRing(rows, 3, 4, programs=even if 20 * even >= 19 * 2 * sms else 2 * sms)
        return FlashRing(rows, 2 if head_dim == 64 and capacity <= 1024 else 4, 4, programs=sms)
    if pairs <= 2 * sms:
        return FlashRing(rows, 3, 4, programs=pairs + sms if long else 2 * sms)
    if pairs <= 4 * sms:  # four a multiprocessor
        return FlashRing(rows // 2, 3, 2, programs=pairs + (2 * sms if long else 0))
    if head_dim == 128 and pairs > 8 * sms:
        return FlashRing(rows // 2, 2, 2, programs=pairs + (2 * sms if long else 0))
    return None


def flash_ring_serves(q, k_cache, v_cache, table, k_scale, split_size) -> bool:
    """Whether the kernel can do what a call of flash_decode asks for, on this card."""
    B, T, Hq, D = q.shape
    Hkv = k_cache.shape[1]
    plain = k_cache.dtype == q.dtype and q.dtype in DTYPES and k_scale is None and split_size is None and table.shape[1] == 1
    fits = D in HEAD_SIZES and Hq // Hkv * T <= QUERY_ROWS.value and B * Hkv <= MAX_COUNTERS and k_cache.numel() // D < 2**31
    return plain and fits and has_wgmma(q) and tma_reads(k_cache, v_cache)


def launch_flash_ring(q, k_cache, v_cache, lengths, table, ring: FlashRing, *, scale_log2, window=None, permute=False):
    """Runs the kernel as `ring` says. scale_log2: of scores, for powers of two."""
    B, T, Hq, D = q.shape
    pages, HKV, page_size, _ = k_cache.shape
    rows = 8 if Hq // HKV * T <= 8 else QUERY_ROWS.value
    out = torch.empty_like(q)
    pairs = B * HKV
    assert ring.block_rows >= 16 * ring.warps, "the least that tensor cores take"
    assert not ring.cluster or (ring.warps == 4 and ring.programs in (2, 4, 8, 16)), "shares are laid out for these"
    programs = max(ring.programs, pairs) if not ring.cluster and ring.programs >= pairs + HKV else pairs
    split = programs > pairs
    partial = torch.empty(programs * rows * D if split else 0, dtype=torch.float32, device=q.device)
    stats = torch.empty(programs * 2 * rows if split else 0, dtype=torch.float32, device=q.device)
    view, box = [pages * HKV * page_size, D], [ring.block_rows, D]
    arguments = (
        described(k_cache, view, [D, 1], box), described(v_cache, view, [D, 1], box), q, k_cache, v_cache, lengths, table,
        out, partial, stats,
        zeroed_workspace(q.device, "counters of flash_decode", MAX_COUNTERS),
        scale_log2, window or 0, B, page_size, programs // HKV, programs - pairs,
    )  # fmt: skip
    options = {
        "HKV": HKV,
        "G": Hq // HKV,
        "T": T,
        "SEQUENCES": triton.next_power_of_2(B),
        "ROWS": rows,
        "S": ring.stages,
        "LATE": ring.late,
        "SPLIT": split,
        "CLUSTER": ring.programs if ring.cluster else 0,
        # All parts at a time, as far as registers reach.
        "MERGED": max(1, min(triton.next_power_of_2(1 + (programs - pairs) // HKV), 32 * ring.warps // rows)),
        "WINDOWED": window is not None,
        "PERMUTE": permute,
        "num_warps": ring.warps,
        **launch_options(q),
    }
    if ring.cluster:
        compiled = launch_clusters(_flash_ring_kernel, pairs, ring.programs, arguments, options)
    else:
        compiled = _flash_ring_kernel[(programs,)](*arguments, **options)
    if ring.leaves_l1:
        grid = pairs * ring.programs if ring.cluster else programs
        leave_l1(compiled, -(-grid // num_sms(q.device.index or 0)))
    return out
