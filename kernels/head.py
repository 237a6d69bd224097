"""The end of a decode step: logits, the choice of a token, and the step's bookkeeping.

Owns `head` (RMSNorm + projection to float32 logits + the best candidate of every program: greedy, or Gumbel-max with a
temperature) and `advance` (the choice, stopping, the output ring, the next step's input). Does not know the model.
Letters: B sequences, T query tokens a sequence, M = B * T rows (row r is token r % T of sequence r // T), K hidden size,
V rows of the head's weight, P = PARTIALS candidates a row.

Sampling takes the largest of logit / temperature + Gumbel noise (_random.py). A NaN logit becomes an infinite candidate, so
that it reaches `advance` through any maximum and is flagged there.
"""

import math

import torch
import triton
import triton.language as tl

from kernels._advance import advance_ref, advance_sequence, check_advance, load_sequence
from kernels._candidates import PARTIALS, load_draws, store_candidates, store_logits, with_noise
from kernels._common import (
    best_candidate,
    best_of,
    launch_options,
    num_sms,
    pdl_trigger,
    pdl_wait,
    permute_columns,
    plan_prefetch,
    prefetch_share,
)
from kernels._matmul import (
    FoldedNorm,
    Operand,
    apply_norm_ref,
    check_matmul,
    fma_again,
    load_folded,
    matmul_arguments,
    multiply,
    norm_factor,
    preload,
    split_norm,
    tile_of,
    uses_kernel,
)
from kernels._packed import multiply_packed, preload_packed, unit_starts
from kernels._packed_ring import launch_packed_ring_head
from kernels._random import gumbel_ref, gumbel_tile, token_positions
from kernels._ring import tma_reads
from kernels.formats import Weight

# ---------------------------------------------------------------- reference


def head_ref(x, weight, norm, eps, vocab_size, temperature, seed, sample, lengths, squares=None):
    """Logits [M, V] float32, and each row's best candidate as (value, id), [M] each."""
    h = apply_norm_ref(x, norm, squares, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = weight.split(8192)  # widened a slice at a time: the whole would take gigabytes
    logits = torch.cat([torch.nn.functional.linear(h.to(wide), w.to(wide)) for w in rows], dim=-1).to(torch.float32)
    logits[:, vocab_size:] = -math.inf
    value = logits
    if temperature is not None:
        sequence, position = token_positions(lengths, x.shape[0])
        t = temperature[sequence, None]
        noise = gumbel_ref(seed[sequence], sample[sequence], position, weight.shape[0])
        value = torch.where(t > 0, logits / torch.where(t > 0, t, 1.0) + noise, logits)
    value = value.masked_fill(value.isnan(), math.inf)
    best = value.max(dim=-1, keepdim=True).values
    index = torch.arange(weight.shape[0], device=x.device).expand_as(value)
    return logits, best.squeeze(-1), index.masked_fill(value != best, weight.shape[0]).min(dim=-1).values.int()


# ---------------------------------------------------------------- kernels


@triton.jit
def _candidates(logits, ids, first_id, temperature, seed, sample, position, R: tl.constexpr, MP: tl.constexpr):
    """Each row's best (value [MP], id [MP]) of the logits [R, MP]."""
    value = logits
    if temperature is not None:
        if tl.max(temperature, 0) > 0:
            sampled = temperature > 0
            value = with_noise(logits, temperature, sampled, gumbel_tile(seed, sample, position, first_id, R, MP))
    return best_of(value, ids[:, None])


@triton.jit(do_not_specialize=["M", "T"])
def _head_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, norm_ptr, folded_ptr, logits_ptr, max_ptr, id_ptr, temperature_ptr, seed_ptr, sample_ptr,
    lengths_ptr,
    M, T, N, K, columns, eps, vocab_size,
    PARTIALS: tl.constexpr, SLOTS: tl.constexpr, FOLDED: tl.constexpr,
    DTYPE: tl.constexpr, DOT: tl.constexpr, M_FMA: tl.constexpr, MP: tl.constexpr, R: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, PRELOAD: tl.constexpr, STAGES: tl.constexpr, LOOPS: tl.constexpr,
    MASK_N: tl.constexpr, MASK_K: tl.constexpr, STREAM: tl.constexpr, X_SCALE: tl.constexpr,
    FORMAT: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr, BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Logits and best candidate of tile program_id, and of each num_programs-th tile after it where LOOPS."""
    pdl_trigger(PDL)
    pid, programs = tl.program_id(0), tl.num_programs(0)
    m, r = tl.arange(0, MP), tl.arange(0, R)
    rows = pid * R + r
    NORM: tl.constexpr = norm_ptr is not None
    PACKED: tl.constexpr = FORMAT != "plain"
    if PACKED:
        starts, left = unit_starts(pid * (R // 8), 0, 0, columns, tl.cdiv(N, 8), WARPS, PARTS, BLOCKS, CHUNKS, False, MASK_N)
        tiles = preload_packed(w_ptr, scale_ptr, zero_ptr, starts, left, PARTS, GROUPS, PRELOAD, MASK_K, STREAM)
    else:
        tiles, norms = preload(w_ptr, norm_ptr, rows, 0, N, columns, CHUNK, PRELOAD, NORM, MASK_N, MASK_K, STREAM)
    if temperature_ptr is not None:  # the host writes these between steps, never during one
        temperature, seed, sample, position = load_draws(temperature_ptr, seed_ptr, sample_ptr, lengths_ptr, m, M, T)
    else:
        temperature: tl.constexpr = None
        seed, sample, position = m, m, m
    pdl_wait(PDL)

    folded = load_folded(folded_ptr, M, FOLDED, 1 if M_FMA == 1 else MP)
    if PACKED:
        sums, squares = multiply_packed(
            tiles, x_ptr, w_ptr, norm_ptr, scale_ptr, zero_ptr, starts, left, (rows,), 0, N, K, M,
            FORMAT, GROUPS, WARPS, PARTS, BLOCKS, MP, CHUNKS, PRELOAD, False, M_FMA == 1, NORM, MASK_N, MASK_K, STREAM,
            X_SCALE, DTYPE,
        )  # fmt: skip
    else:
        sums, squares, widened = multiply(
            tiles, norms, x_ptr, w_ptr, norm_ptr, rows, 0, N, columns, M, None, False, DOT, M_FMA, MP, R,
            CHUNK, CHUNKS, PRELOAD, STAGES, NORM, MASK_N, MASK_K, STREAM, X_SCALE, DTYPE,
        )  # fmt: skip
    factor = norm_factor(squares, folded, K, eps, NORM, FOLDED, X_SCALE)
    logits = store_logits(sums[0] * factor, logits_ptr, rows, m, M, N, vocab_size)
    best, best_id = _candidates(logits, rows, pid * R, temperature, seed, sample, position, R, MP)
    if LOOPS:
        for tile in tl.range(pid + programs, tl.cdiv(N, R), programs, num_stages=STAGES):
            rows = tile * R + r
            more = fma_again(widened, w_ptr, rows, N, columns, M_FMA, MP, CHUNK, CHUNKS, MASK_N, MASK_K, STREAM, DTYPE)
            logits = store_logits(more * factor, logits_ptr, rows, m, M, N, vocab_size)
            value, value_id = _candidates(logits, rows, tile * R, temperature, seed, sample, position, R, MP)
            best_id = tl.where(value > best, value_id, best_id)  # an equal one came earlier, with a lower id
            best = tl.maximum(best, value)
    store_candidates(best, best_id, max_ptr, id_ptr, m, M, tl.arange(0, SLOTS), PARTIALS)


@triton.jit
def _partial_argmax_kernel(logits_ptr, max_ptr, id_ptr, V, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The best of BLOCK logits of row program_id(0)."""
    pdl_trigger(PDL)
    row, part = tl.program_id(0), tl.program_id(1)
    ids = part * BLOCK + tl.arange(0, BLOCK)
    pdl_wait(PDL)
    value = tl.load(logits_ptr + row.to(tl.int64) * V + ids, mask=ids < V, other=float("-inf"))
    best, best_id = best_of(value, ids)
    out = row * tl.num_programs(1) + part
    tl.store(max_ptr + out, best)
    tl.store(id_ptr + out, best_id)


@triton.jit
def _advance_kernel(
    max_ptr, id_ptr, token_ptr, ring_ptr, cursor_ptr, done_ptr, flag_ptr, lengths_ptr, limit_ptr, stop_ptr,
    embedding_ptr, x_ptr, ahead_ptr, sequences, partials, ring_size, stops, K, ahead_bytes,
    PARTIALS: tl.constexpr, STOPS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a sequence. Never triggers early: what it writes is final before any kernel of the next step starts.

    Memory would idle meanwhile: the programs behind the sequences' bring the weight that the next step reads first into L2.
    """
    b = tl.program_id(0)
    if b < sequences:
        sequence = load_sequence(b, token_ptr, cursor_ptr, done_ptr, lengths_ptr, limit_ptr, stop_ptr, stops, STOPS)
        pdl_wait(PDL)
        best, chosen = best_candidate(max_ptr, id_ptr, b, partials, PARTIALS)
        advance_sequence(
            b, best, chosen, sequence, token_ptr, ring_ptr, cursor_ptr, done_ptr, flag_ptr, lengths_ptr, embedding_ptr, x_ptr,
            ring_size, K, BLOCK,
        )  # fmt: skip
    else:
        pdl_wait(PDL)
        prefetch_share(ahead_ptr, ahead_bytes, b - sequences, tl.num_programs(0) - sequences, PDL)


# ---------------------------------------------------------------- operators


def _head_outputs(x, w: Operand, norm, squares, vocab_size, temperature, seed, sample, lengths):
    check_matmul(x, w, None, norm, squares)
    M, V = x.shape[0], w.rows
    if not 1 <= vocab_size <= V:
        raise ValueError(f"vocab_size: found {vocab_size}, expected 1 to the weight's {V} rows")
    B = lengths.numel()
    if lengths.dtype != torch.int32 or lengths.dim() != 1 or M % B:
        raise ValueError(f"lengths: found {lengths.dtype} {list(lengths.shape)}, expected int32 [B], B dividing {M} rows")
    for name, t, dtype in (
        ("temperature", temperature, torch.float32),
        ("seed", seed, torch.int64),
        ("sample", sample, torch.int32),
    ):
        if (t is None) != (temperature is None) or (t is not None and (t.dtype != dtype or t.shape != (B,))):
            raise ValueError(f"{name}: found {t if t is None else (t.dtype, list(t.shape))}, expected {dtype} [{B}]")
    return (
        x.new_empty(M, V, dtype=torch.float32),
        x.new_empty(M, PARTIALS, dtype=torch.float32),
        x.new_empty(M, PARTIALS, dtype=torch.int32),
    )


@torch.library.custom_op("rooflama::head", mutates_args=())
def _head(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    format: str,
    rows: int,
    norm: torch.Tensor | None,
    squares: torch.Tensor | None,
    eps: float,
    vocab_size: int,
    temperature: torch.Tensor | None,
    seed: torch.Tensor | None,
    sample: torch.Tensor | None,
    lengths: torch.Tensor,
    x_permuted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    w = Operand(weight, scale, zero, format, rows)
    logits, partial_max, partial_id = _head_outputs(x, w, norm, squares, vocab_size, temperature, seed, sample, lengths)
    if not uses_kernel(x):
        x = permute_columns(x) if x_permuted else x
        logits, best, best_id = head_ref(x, w.plain(x), norm, eps, vocab_size, temperature, seed, sample, lengths, squares)
        partial_max.fill_(-math.inf)[:, 0] = best
        partial_id.zero_()[:, 0] = best_id
        return logits, partial_max, partial_id
    M, V = logits.shape
    rings = w.is_packed and x_permuted and norm is None
    tile = tile_of("head", x, w, rings=rings and tma_reads(x, w.weight, w.scale, w.zero))
    if tile.ring:
        launch_packed_ring_head(
            x, w, squares, eps, vocab_size, temperature, seed, sample, lengths, logits, partial_max, partial_id, tile
        )
        return logits, partial_max, partial_id
    if x_permuted:
        x = permute_columns(x)
    arguments, options = matmul_arguments(tile, x, w, norm, squares)
    count = triton.cdiv(V, tile.rows)
    programs = min(count, tile.grid * num_sms(x.device.index or 0) or PARTIALS, PARTIALS)
    assert tile.rows % 4 == 0, f"Tile.rows: found {tile.rows}, expected a multiple of 4 (random bits come by fours)"
    assert programs == count or not tile.dot, f"Tile.rows: found {tile.rows}, expected at least {V / PARTIALS:.0f} with dot"
    if programs < count:
        arguments["PRELOAD"] = arguments["CHUNKS"]  # further tiles use x as the first one widened it
    _head_kernel[(programs,)](
        logits_ptr=logits,
        max_ptr=partial_max,
        id_ptr=partial_id,
        temperature_ptr=temperature,
        seed_ptr=seed,
        sample_ptr=sample,
        lengths_ptr=lengths,
        T=M // lengths.numel(),
        eps=eps,
        vocab_size=vocab_size,
        PARTIALS=PARTIALS,
        SLOTS=triton.next_power_of_2(triton.cdiv(PARTIALS, programs)),
        LOOPS=programs < count,
        **arguments,
        **options,
    )
    return logits, partial_max, partial_id


@_head.register_fake
def _(x, weight, scale, zero, format, rows, norm, squares, eps, vocab_size, temperature, seed, sample, lengths, x_permuted):
    w = Operand(weight, scale, zero, format, rows)
    return _head_outputs(x, w, norm, squares, vocab_size, temperature, seed, sample, lengths)


def head(
    x: torch.Tensor,
    weight: Weight,
    *,
    norm: torch.Tensor | FoldedNorm,
    eps: float,
    vocab_size: int,
    lengths: torch.Tensor,
    temperature: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    sample: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rmsnorm(x) @ weight.T, and the candidates among which `advance` chooses.

    x [M, K]; weight [V, K]; norm: the gain [K], or x's FoldedNorm; lengths [B] int32. temperature [B] float32 (0 = greedy),
    seed [B] int64 and sample [B] int32, or all None: greedy throughout. Returns logits [M, V] float32 (-inf at and above
    vocab_size), and candidates as (value [M, P] float32, id [M, P] int32): the one of largest value, and of these the one of
    lowest id, is the choice.
    ValueError: a shape or dtype that does not fit.
    """
    x, gain, squares, x_permuted = split_norm(x, norm)
    return torch.ops.rooflama.head(
        x, *Operand.of(weight), gain, squares, eps, vocab_size, temperature, seed, sample, lengths, x_permuted
    )


ARGMAX_BLOCK = 4096


def _argmax_outputs(logits):
    if logits.dim() != 2 or logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(f"logits: found {logits.dtype} {list(logits.shape)}, expected float32 [M, V], contiguous")
    parts = triton.cdiv(logits.shape[1], ARGMAX_BLOCK)
    return logits.new_empty(len(logits), parts), logits.new_empty(len(logits), parts, dtype=torch.int32)


@torch.library.custom_op("rooflama::partial_argmax", mutates_args=())
def partial_argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The greedy candidates of logits [M, V] float32, as `head` gives them: (value [M, P], id [M, P] int32), each the best of
    ARGMAX_BLOCK neighbours. On a GPU, or under the interpreter. ValueError: another dtype or shape."""
    best, ids = _argmax_outputs(logits)
    _partial_argmax_kernel[best.shape](
        logits, best, ids, logits.shape[1], BLOCK=ARGMAX_BLOCK, num_warps=4, **launch_options(logits)
    )
    return best, ids


@partial_argmax.register_fake
def _(logits):
    return _argmax_outputs(logits)


@torch.library.custom_op("rooflama::advance", mutates_args=("token", "ring", "cursor", "done", "flag", "lengths", "x"))
def _advance(
    partial_max: torch.Tensor,
    partial_id: torch.Tensor,
    token: torch.Tensor,
    ring: torch.Tensor,
    cursor: torch.Tensor,
    done: torch.Tensor,
    flag: torch.Tensor,
    lengths: torch.Tensor,
    limit: torch.Tensor,
    stop_ids: torch.Tensor,
    embedding: torch.Tensor,
    x: torch.Tensor,
    ahead: torch.Tensor | None,
) -> None:
    check_advance(partial_max, partial_id, token, ring, cursor, done, flag, lengths, limit, stop_ids, embedding, x)
    if not uses_kernel(x):
        advance_ref(partial_max, partial_id, token, ring, cursor, done, flag, lengths, limit, stop_ids, embedding, x)
        return
    helpers, ahead_bytes = plan_prefetch(ahead)
    _advance_kernel[(token.numel() + helpers,)](
        partial_max, partial_id, token, ring, cursor, done, flag, lengths, limit, stop_ids, embedding, x, ahead,
        token.numel(), partial_max.shape[1], ring.shape[1], stop_ids.shape[1], x.shape[1],
        ahead_bytes, PARTIALS=triton.next_power_of_2(partial_max.shape[1]), STOPS=triton.next_power_of_2(stop_ids.shape[1]),
        BLOCK=min(4096, triton.next_power_of_2(x.shape[1])), num_warps=8, **launch_options(x),
    )  # fmt: skip


@_advance.register_fake
def _(partial_max, partial_id, token, ring, cursor, done, flag, lengths, limit, stop_ids, embedding, x, ahead):
    check_advance(partial_max, partial_id, token, ring, cursor, done, flag, lengths, limit, stop_ids, embedding, x)


def advance(
    partial_max: torch.Tensor,
    partial_id: torch.Tensor,
    *,
    token: torch.Tensor,
    ring: torch.Tensor,
    cursor: torch.Tensor,
    done: torch.Tensor,
    flag: torch.Tensor,
    lengths: torch.Tensor,
    limit: torch.Tensor,
    stop_ids: torch.Tensor,
    embedding: torch.Tensor,
    x: torch.Tensor,
    ahead: Weight | None = None,
) -> None:
    """Chooses each sequence's token and moves it on by one; the last kernel of a step, one query token a sequence.

    Of the candidates [B, any number] the largest wins, of equals the lowest id. All state is int32 [B] and changed in place:
    token, ring [B, R] at cursor % R, cursor, done, flag, lengths; limit and stop_ids [B, any number, padded with -1] are read.
    A sequence that is done, or has length 0, is left alone. One whose token is in stop_ids, or whose length + 1 exceeds
    limit (the rows of the cache that it may use), is done: its length becomes 0, which ends its work. Where a logit is NaN or
    infinite, flag becomes 1, nothing is emitted and the sequence is done.
    x [B, K] receives the embedding's row of each token. `ahead` is the weight that the next step reads first: some of it may be
    brought into L2 meanwhile. It changes no result.
    ValueError: a shape or dtype that does not fit.
    """
    torch.ops.rooflama.advance(
        partial_max, partial_id, token, ring, cursor, done, flag, lengths, limit, stop_ids, embedding, x,
        None if ahead is None else ahead.weight,
    )  # fmt: skip
