"""Both ends of a speculative round: what is fed to the target, and which drafted tokens stand.

Owns `feed`, which begins a round, and `accept`, which ends it as head.py's `advance` does a plain step. Knows neither drafters
nor the model.
Letters: B sequences, k drafts and T = k + 1 query tokens a sequence, M = B * T rows (row r is token r % T of sequence r // T),
P candidates a row, R entries of the output ring, S entries of the history, H hidden size.

Row r of a sequence is the target's own choice of the token behind the r-th one fed, drawn with the key of its position. Drafted
token r stands where it equals that choice and all before it stand; the first choice that differs, or the one behind the last
draft, is the round's own token. So a round emits what plain decoding would emit, whoever drafted.

1. `_choose_kernel` finds each row's best candidate. 2. `_accept_kernel` does the rest, one program a sequence.
"""

import torch
import triton
import triton.language as tl

from kernels._common import (
    best_candidate,
    check_int32,
    copy_row,
    launch_options,
    pdl_trigger,
    pdl_wait,
    plan_prefetch,
    prefetch_share,
    runs_kernels,
)
from kernels.formats import Weight

# ---------------------------------------------------------------- reference


def feed_ref(token, drafts, lengths, embedding):
    """The arguments as in `feed`."""
    lengths.add_(lengths.clamp(max=1), alpha=drafts.shape[1])
    return embedding[torch.cat([token[:, None], drafts], dim=1).flatten().long()]


def accept_ref(partial_max, partial_id, drafts, token, ring, cursor, done, flag, lengths, limit, stop_ids, history, tally):
    """The arguments as in `accept`."""
    B, k = drafts.shape
    value = partial_max.masked_fill(partial_max.isnan(), torch.inf)
    best = value.max(dim=-1, keepdim=True).values
    choice = torch.where(value == best, partial_id, 2**31 - 1).min(dim=-1).values.view(B, k + 1)
    column = torch.arange(k + 1, device=token.device)

    def first(condition):  # its first column, beyond all where there is none
        return torch.where(condition, column, k + 2).min(dim=-1).values

    active = (done == 0) & (lengths > 0)
    before = lengths - torch.where(lengths > 0, k, 0)  # as the round began
    finite = best.view(B, k + 1).isfinite()
    accepted = first(torch.cat([(choice[:, :k] != drafts) | ~finite[:, :k], torch.ones_like(finite[:, :1])], dim=1))
    broken_at = first(~finite)
    stop_at = first((choice[:, :, None] == stop_ids[:, None]).any(dim=-1) & finite)
    room = limit - before + 1
    emitted = torch.stack([accepted + 1, broken_at, stop_at + 1, room]).min(dim=0).values.clamp(min=0)
    over = (emitted == stop_at + 1) | (emitted == room)
    broken = active & (emitted == broken_at) & ~over
    stopped = active & (broken | over)
    emitted = torch.where(active, emitted, 0)

    taken = column < emitted[:, None]
    last = choice.gather(1, (emitted - 1).clamp(min=0)[:, None].long()).squeeze(1)
    token.copy_(torch.where(emitted > 0, last, token))
    for buffer, start in ((ring, cursor), (history, before)):
        at = (start[:, None] + column).long() % buffer.shape[1]
        buffer.scatter_(1, at, torch.where(taken, choice, buffer.gather(1, at)))
    cursor.add_(emitted)
    flag.copy_(torch.where(broken, 1, flag))
    done.copy_(torch.where(stopped, 1, done))
    lengths.copy_(torch.where(stopped, 0, before + emitted))
    place = torch.arange(tally.shape[2], device=token.device)
    counts = torch.stack([torch.full_like(accepted, k), torch.minimum(accepted, emitted)], dim=1)
    tally.add_(((place <= counts[:, :, None]) & active[:, None, None]).int())


# ---------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["T"])
def _feed_kernel(
    token_ptr, drafts_ptr, lengths_ptr, embedding_ptr, x_ptr, T, H, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Row program_id of x. Never triggers early: the next kernel reads the lengths before it waits."""
    row = tl.program_id(0)
    b, t = row // T, row % T
    pdl_wait(PDL)
    if t == 0:
        token = tl.load(token_ptr + b)
        length = tl.load(lengths_ptr + b)
        tl.store(lengths_ptr + b, length + tl.where(length > 0, T - 1, 0))
    else:
        token = tl.load(drafts_ptr + b * (T - 1) + t - 1)
    copy_row(embedding_ptr + token.to(tl.int64) * H, x_ptr + row * H, H, BLOCK)


@triton.jit(do_not_specialize=["M"])
def _choose_kernel(
    max_ptr, id_ptr, best_ptr, choice_ptr, ahead_ptr, M, partials, ahead_bytes, PARTIALS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """The best candidate of row program_id. Memory idles now: the programs behind the rows' bring into L2 what the next round
    reads first."""
    pdl_trigger(PDL)
    row = tl.program_id(0)
    pdl_wait(PDL)
    if row < M:
        best, choice = best_candidate(max_ptr, id_ptr, row, partials, PARTIALS)
        tl.store(best_ptr + row, best)
        tl.store(choice_ptr + row, choice)
    else:
        prefetch_share(ahead_ptr, ahead_bytes, row - M, tl.num_programs(0) - M, PDL)


@triton.jit(do_not_specialize=["T"])
def _accept_kernel(
    best_ptr, choice_ptr, drafts_ptr, token_ptr, ring_ptr, cursor_ptr, done_ptr, flag_ptr, lengths_ptr, limit_ptr, stop_ptr,
    history_ptr, tally_ptr, T, ring_size, stops, history_size, tally_size,
    TP: tl.constexpr, STOPS: tl.constexpr, TALLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a sequence. Never triggers early: what it writes is final before any kernel of the next round starts."""
    b = tl.program_id(0)
    t, s, j = tl.arange(0, TP), tl.arange(0, STOPS), tl.arange(0, TALLY)
    pdl_wait(PDL)
    length, done, cursor = tl.load(lengths_ptr + b), tl.load(done_ptr + b), tl.load(cursor_ptr + b)
    limit, before = tl.load(limit_ptr + b), tl.load(token_ptr + b)
    stop = tl.load(stop_ptr + b * stops + s, mask=s < stops, other=-1)
    best = tl.load(best_ptr + b * T + t, mask=t < T, other=0.0)
    choice = tl.load(choice_ptr + b * T + t, mask=t < T, other=-2)
    draft = tl.load(drafts_ptr + b * (T - 1) + t, mask=t < T - 1, other=-3)

    active = (done == 0) & (length > 0)
    length -= tl.where(length > 0, T - 1, 0)  # as the round began
    finite = (best > float("-inf")) & (best < float("inf"))
    stops_at = finite & (tl.max((choice[:, None] == stop[None, :]).to(tl.int32), 1) > 0)
    accepted = tl.min(tl.where((choice != draft) | (finite == 0), t, 2 * TP), 0)
    broken_at = tl.min(tl.where(finite, 2 * TP, t), 0)
    stop_at = tl.min(tl.where(stops_at, t, 2 * TP), 0)
    room = limit - length + 1
    emitted = tl.minimum(tl.minimum(accepted + 1, broken_at), tl.minimum(stop_at + 1, room))
    emitted = tl.maximum(emitted, 0)
    over = (emitted == stop_at + 1) | (emitted == room)
    broken = active & (emitted == broken_at) & (over == 0)
    stopped = active & (broken | over)
    emitted = tl.where(active, emitted, 0)

    taken = t < emitted
    token = tl.sum(tl.where(t == emitted - 1, choice, 0), 0)
    tl.store(token_ptr + b, tl.where(emitted > 0, token, before))
    tl.store(ring_ptr + b * ring_size + (cursor + t) % ring_size, choice, mask=taken)
    tl.store(history_ptr + b.to(tl.int64) * history_size + length + t, choice, mask=taken)
    tl.store(cursor_ptr + b, cursor + emitted)
    tl.store(flag_ptr + b, 1, mask=broken)
    tl.store(done_ptr + b, 1, mask=stopped)
    tl.store(lengths_ptr + b, tl.where(stopped, 0, length + emitted))
    counts = tally_ptr + b * 2 * tally_size + j
    real = active & (j < tally_size)
    tl.store(counts, tl.load(counts, mask=real) + 1, mask=real & (j < T))
    counts += tally_size
    tl.store(counts, tl.load(counts, mask=real) + 1, mask=real & (j <= tl.minimum(accepted, emitted)))


# ---------------------------------------------------------------- operators


def _check_drafts(drafts, B):
    if drafts.dim() != 2 or drafts.shape[0] != B or drafts.dtype != torch.int32 or not drafts.is_contiguous():
        raise ValueError(f"drafts: found {drafts.dtype} {list(drafts.shape)}, expected int32 [{B}, k], contiguous")


def _fed(token, drafts, lengths, embedding):
    """x [M, H], not filled."""
    B = token.numel()
    _check_drafts(drafts, B)
    check_int32(B, token=token, lengths=lengths)
    if embedding.dim() != 2 or not embedding.is_contiguous():
        raise ValueError(f"embedding: found {list(embedding.shape)}, expected [V, H], contiguous")
    return embedding.new_empty(B * (drafts.shape[1] + 1), embedding.shape[1])


@torch.library.custom_op("rooflama::feed", mutates_args=("lengths",))
def feed(token: torch.Tensor, drafts: torch.Tensor, lengths: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """Begins a round: each sequence's last token [B] and its drafts [B, k], int32, as rows of embedding [V, H] -> [M, H].

    lengths [B] int32 grow by the k rows that the drafts take in the cache, but for sequences that are absent (0).
    ValueError: a shape or dtype that does not fit.
    """
    x = _fed(token, drafts, lengths, embedding)
    if not runs_kernels(x):
        return feed_ref(token, drafts, lengths, embedding)
    (M, H), T = x.shape, drafts.shape[1] + 1
    block = min(2048, triton.next_power_of_2(H))
    _feed_kernel[(M,)](token, drafts, lengths, embedding, x, T, H, BLOCK=block, num_warps=4, **launch_options(x))
    return x


@feed.register_fake
def _(token, drafts, lengths, embedding):
    return _fed(token, drafts, lengths, embedding)


def _check(partial_max, partial_id, drafts, token, ring, cursor, done, flag, lengths, limit, stop_ids, history, tally):
    B = token.numel()
    _check_drafts(drafts, B)
    M = B * (drafts.shape[1] + 1)
    if partial_max.dim() != 2 or partial_max.shape[0] != M or partial_id.shape != partial_max.shape:
        raise ValueError(f"partial_max: found {list(partial_max.shape)}, {list(partial_id.shape)}, expected two of [{M}, P]")
    check_int32(B, token=token, cursor=cursor, done=done, flag=flag, lengths=lengths, limit=limit)
    for name, t in (("ring", ring), ("stop_ids", stop_ids), ("history", history)):
        if t.dim() != 2 or t.shape[0] != B or t.shape[1] < 1 or t.dtype != torch.int32:
            raise ValueError(f"{name}: found {t.dtype} {list(t.shape)}, expected int32 [{B}, at least 1]")
    if tally.dim() != 3 or tally.shape[:2] != (B, 2) or tally.shape[2] <= drafts.shape[1] or tally.dtype != torch.int32:
        raise ValueError(f"tally: found {tally.dtype} {list(tally.shape)}, expected int32 [{B}, 2, above {drafts.shape[1]}]")


@torch.library.custom_op(
    "rooflama::accept", mutates_args=("token", "ring", "cursor", "done", "flag", "lengths", "history", "tally")
)
def _accept(
    partial_max: torch.Tensor,
    partial_id: torch.Tensor,
    drafts: torch.Tensor,
    token: torch.Tensor,
    ring: torch.Tensor,
    cursor: torch.Tensor,
    done: torch.Tensor,
    flag: torch.Tensor,
    lengths: torch.Tensor,
    limit: torch.Tensor,
    stop_ids: torch.Tensor,
    history: torch.Tensor,
    tally: torch.Tensor,
    ahead: torch.Tensor | None,
) -> None:
    state = (token, ring, cursor, done, flag, lengths, limit, stop_ids, history, tally)
    _check(partial_max, partial_id, drafts, *state)
    if not runs_kernels(partial_max):
        accept_ref(partial_max, partial_id, drafts, *state)
        return
    (M, P), T = partial_max.shape, drafts.shape[1] + 1
    best, choice = partial_max.new_empty(M), partial_id.new_empty(M)
    options = launch_options(partial_max)
    helpers, ahead_bytes = plan_prefetch(ahead)
    _choose_kernel[(M + helpers,)](
        partial_max, partial_id, best, choice, ahead, M, P, ahead_bytes, PARTIALS=triton.next_power_of_2(P), num_warps=8,
        **options,
    )  # fmt: skip
    _accept_kernel[(token.numel(),)](
        best, choice, drafts, *state, T, ring.shape[1], stop_ids.shape[1], history.shape[1], tally.shape[2],
        TP=triton.next_power_of_2(T), STOPS=triton.next_power_of_2(stop_ids.shape[1]),
        TALLY=triton.next_power_of_2(tally.shape[2]), num_warps=1, **options,
    )  # fmt: skip


@_accept.register_fake
def _(partial_max, partial_id, drafts, token, ring, cursor, done, flag, lengths, limit, stop_ids, history, tally, ahead):
    _check(partial_max, partial_id, drafts, token, ring, cursor, done, flag, lengths, limit, stop_ids, history, tally)


def accept(
    partial_max: torch.Tensor,
    partial_id: torch.Tensor,
    drafts: torch.Tensor,
    *,
    token: torch.Tensor,
    ring: torch.Tensor,
    cursor: torch.Tensor,
    done: torch.Tensor,
    flag: torch.Tensor,
    lengths: torch.Tensor,
    limit: torch.Tensor,
    stop_ids: torch.Tensor,
    history: torch.Tensor,
    tally: torch.Tensor,
    ahead: Weight | None = None,
) -> None:
    """Ends a round that fed each sequence its last token and drafts [B, k] int32; the last kernels of a round.

    Candidates [B * (k + 1), P] as for `advance`: of each row the largest wins, of equals the lowest id. A sequence emits the
    drafts that equal its choices, up to the first that does not, and one choice more. All state is int32 and changed in place:
    token, cursor, done, flag, lengths [B]; ring [B, R] from cursor % R on; history [B, S], the token of each position, from the
    round's first new one on. limit and stop_ids [B, any number, padded with -1] are read.
    lengths counts the k + 1 rows that the round fed (0: absent); it becomes that of the tokens that stand, the last one's row
    included, which the next round appends. A sequence that is done, or absent, is left alone. One that reaches a stop id, or a
    length above limit, is done there: what the round chose behind it is dropped, and its length becomes 0. Where a logit is NaN
    or infinite, flag becomes 1, nothing is emitted from there on and the sequence is done.
    tally [B, 2, above k] counts: entry [b, 0, i] rounds with at least i drafts, [b, 1, i] those that kept at least i of them.
    `ahead` is the weight that the next round reads first: as for `advance`.
    ValueError: a shape or dtype that does not fit.
    """
    torch.ops.rooflama.accept(
        partial_max, partial_id, drafts, token, ring, cursor, done, flag, lengths, limit, stop_ids, history, tally,
        None if ahead is None else ahead.weight,
    )  # fmt: skip
