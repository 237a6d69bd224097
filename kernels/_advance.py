"""What follows from a chosen token: stopping, the output ring, the next step's input.

Owns one sequence's share of it, for the kernels that end a step: head.py's `advance` and choose.py's `choose_and_advance`. Such
a kernel never triggers early: what it writes is final before any kernel of the next step starts.
"""

import torch
import triton
import triton.language as tl

from kernels._common import check_int32, copy_row


def advance_ref(partial_max, partial_id, token, ring, cursor, done, flag, lengths, limit, stop_ids, embedding, x):
    """One step of every sequence's bookkeeping; the arguments as in head.py's `advance`."""
    best = partial_max.max(dim=-1, keepdim=True).values
    chosen = torch.where(partial_max == best, partial_id, embedding.shape[0]).min(dim=-1).values
    active = (done == 0) & (lengths > 0)
    broken = active & ~best.squeeze(-1).isfinite()
    emits = active & ~broken
    token.copy_(torch.where(emits, chosen, token))
    slot = (cursor % ring.shape[1]).long().unsqueeze(-1)
    ring.scatter_(1, slot, torch.where(emits.unsqueeze(-1), token.unsqueeze(-1), ring.gather(1, slot)))
    cursor.add_(emits.int())
    stops = broken | (emits & ((stop_ids == token.unsqueeze(-1)).any(dim=-1) | (lengths + 1 > limit)))
    flag.copy_(torch.where(broken, 1, flag))
    done.copy_(torch.where(stops, 1, done))
    lengths.copy_(torch.where(stops, 0, lengths + emits.int()))
    x.copy_(embedding[token.long()])


@triton.jit
def load_sequence(b, token_ptr, cursor_ptr, done_ptr, lengths_ptr, limit_ptr, stop_ptr, stops, STOPS: tl.constexpr):
    """Where sequence b stands. What writes it never triggers early, so that it can be read before the wait."""
    length, done, cursor = tl.load(lengths_ptr + b), tl.load(done_ptr + b), tl.load(cursor_ptr + b)
    limit, before = tl.load(limit_ptr + b), tl.load(token_ptr + b)
    s = tl.arange(0, STOPS)
    return length, done, cursor, limit, before, tl.load(stop_ptr + b * stops + s, mask=s < stops, other=-1)


@triton.jit
def advance_sequence(
    b, best, chosen, sequence, token_ptr, ring_ptr, cursor_ptr, done_ptr, flag_ptr, lengths_ptr, embedding_ptr, x_ptr,
    ring_size, K, BLOCK: tl.constexpr,
):  # fmt: skip
    """All that follows from the candidate of sequence b, which stands as `load_sequence` has it."""
    length, done, cursor, limit, before, stop = sequence
    active = (done == 0) & (length > 0)
    broken = active & ((best == float("inf")) | (best == float("-inf")))
    emits = active & (broken == 0)
    token = tl.where(emits, chosen, before)
    copy_row(embedding_ptr + token.to(tl.int64) * K, x_ptr + b * K, K, BLOCK)
    stops_here = (length + 1 > limit) | (tl.max((stop == token).to(tl.int32), 0) > 0)
    stopped = broken | (emits & stops_here)
    tl.store(token_ptr + b, token)
    tl.store(ring_ptr + b * ring_size + cursor % ring_size, token, mask=emits)
    tl.store(cursor_ptr + b, cursor + 1, mask=emits)
    tl.store(flag_ptr + b, 1, mask=broken)
    tl.store(done_ptr + b, 1, mask=stopped)
    tl.store(lengths_ptr + b, tl.where(stopped, 0, length + 1), mask=active)


def check_advance(partial_max, partial_id, token, ring, cursor, done, flag, lengths, limit, stop_ids, embedding, x):
    B = token.numel()
    if partial_max.dim() != 2 or partial_max.shape[0] != B or partial_id.shape != partial_max.shape:
        raise ValueError(f"partial_max: found {list(partial_max.shape)}, {list(partial_id.shape)}, expected two of [{B}, P]")
    check_int32(B, token=token, cursor=cursor, done=done, flag=flag, lengths=lengths, limit=limit)
    for name, t in (("ring", ring), ("stop_ids", stop_ids)):
        if t.dim() != 2 or t.shape[0] != B or t.shape[1] < 1 or t.dtype != torch.int32:
            raise ValueError(f"{name}: found {t.dtype} {list(t.shape)}, expected int32 [{B}, at least 1]")
    if x.shape != (B, embedding.shape[1]) or x.dtype != embedding.dtype:
        raise ValueError(f"x: found {x.dtype} {list(x.shape)}, expected {embedding.dtype} [{B}, {embedding.shape[1]}]")
