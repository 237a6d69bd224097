"""The choice of a token under top-k, top-p and min-p, without sorting the vocabulary.

Owns `choose`: from the logits and their maximum to one candidate a row, in three small kernels. Knows neither how logits are
made nor what follows; head.py's `advance` takes the candidate.
Letters: B sequences, T query tokens a sequence, M = B * T rows (row r is token r % T of sequence r // T), V vocabulary.

A logit is kept by its distance below the row's largest, a whole number u of 2^-20: what is equal in u is equal here. A token's
mass is 2^40 exp(-distance / temperature), rounded to a whole number, so that sums do not depend on their order. The cuts, in
transformers' order, after the temperature:
    top-k   u is kept where fewer than k tokens have a smaller one: ties with the k-th are kept;
    top-p   of these, u is kept where the mass of smaller ones is below top_p of their whole mass: ties with the last are kept;
    min-p   u is kept where exp(-distance / temperature) >= min_p.
What is 64 or more below the largest is kept by a row that nothing cuts, and has no mass.

1. `_histogram_kernel` counts tokens and mass in bins of 2^-6.
2. `_candidates_kernel` finds the bins that the cuts go through. Better ones are kept for certain: the best token among those is
   found (logit / temperature + Gumbel noise, as in head.py). Tokens in those bins go to a list.
3. `_resolve_kernel` is done if no token of the list beats that best one. If one does, it finds the exact cut within the list.
A cut seldom goes through a bin that matters, so that the third is short nearly always, and exact always.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from kernels._common import launch_options, pdl_trigger, pdl_wait, runs_kernels, zeroed_workspace
from kernels._matmul import INTERPRETED, MAX_ROWS
from kernels._random import gumbel_ids, gumbel_ref, gumbel_tile, token_positions

UNIT = tl.constexpr(1 << 20)  # units in a distance of 1.0
LIMIT = tl.constexpr((64 << 20) - 1)  # units; farther is as far
BIN = tl.constexpr(1 << 14)  # units in a bin
BINS = tl.constexpr(1 << 12)
MASS = tl.constexpr(1 << 40)  # of the largest token; V < 2^22 of these fit int64
LIST = tl.constexpr(2048)  # ids in the list; a longer one is not kept: step 3 then looks through the whole vocabulary
BLOCK = tl.constexpr(1024)  # ids a program


# ---------------------------------------------------------------- reference


def cut_ref(logits, temperature, top_k, top_p, min_p) -> torch.Tensor:
    """Which logits [M, V] are kept, for temperature, top_k, top_p and min_p [M]; all where the temperature is 0."""
    limit, V = LIMIT.value, logits.shape[1]
    t, p, least = (parameter.unsqueeze(-1) for parameter in (torch.where(temperature > 0, temperature, 1.0), top_p, min_p))
    distance = (logits.max(dim=-1, keepdim=True).values - logits) * UNIT.value
    u = distance.nan_to_num(nan=limit).clamp(max=limit).long()
    mass = torch.where(u < limit, (torch.exp2(u.float() * (-math.log2(math.e) / UNIT.value) / t) * MASS.value).long(), 0)
    ordered, order = u.sort(dim=-1)
    u_k = torch.where((top_k > 0).unsqueeze(-1), ordered.gather(1, top_k.long().clamp(1, V).unsqueeze(-1) - 1), limit)
    cumulative = torch.where(ordered <= u_k, mass.gather(1, order), 0).cumsum(dim=-1)
    target = torch.ceil(p.double() * cumulative[:, -1:].double()).long()
    first = (cumulative < target).sum(dim=-1, keepdim=True).clamp(max=V - 1)
    u_p = torch.where(p < 1, ordered.gather(1, first), limit)
    u_min = torch.where(least > 0, -torch.log(least) * t * UNIT.value, limit)
    return ((u <= u_k) & (u <= u_p) & (u <= u_min)) | (temperature == 0).unsqueeze(-1)


def choose_ref(logits, temperature, seed, sample, lengths, top_k, top_p, min_p):
    """The candidate of each row as (value, id), [M] each."""
    sequence, position = token_positions(lengths, logits.shape[0])
    t, k, p, least = (parameter[sequence] for parameter in (temperature, top_k, top_p, min_p))
    noise = gumbel_ref(seed[sequence], sample[sequence], position, logits.shape[1])
    warm = logits / torch.where(t > 0, t, 1.0).unsqueeze(-1) + torch.where(t > 0, 1.0, 0.0).unsqueeze(-1) * noise
    value = torch.where(cut_ref(logits, t, k, p, least), warm, -math.inf)
    value = torch.where(logits.isnan().any(dim=-1, keepdim=True), math.inf, value)
    best = value.max(dim=-1).values
    return best, (value == best.unsqueeze(-1)).int().argmax(dim=-1).int()


# ---------------------------------------------------------------- kernels


@triton.jit
def _units(logits, largest):
    return tl.minimum((largest - logits) * UNIT, LIMIT).to(tl.int32)


@triton.jit
def _mass(u, temperature):
    exponent = -1.4426950408889634 / UNIT / temperature  # log2(e)
    return tl.where(u < LIMIT, (tl.exp2(u.to(tl.float32) * exponent) * MASS).to(tl.int64), 0)


@triton.jit
def _needed(mass, top_p):
    """The smallest whole number that is at least top_p * mass."""
    share = top_p.to(tl.float64) * mass.to(tl.float64)
    floor = share.to(tl.int64)
    return floor + (floor.to(tl.float64) < share).to(tl.int64)


@triton.jit
def _largest(max_ptr, row, P, P_BLOCK: tl.constexpr):
    """The row's largest logit; infinite where one is NaN."""
    p = tl.arange(0, P_BLOCK)
    value = tl.load(max_ptr + row * P + p, mask=p < P, other=float("-inf"))
    return tl.max(tl.where(value == value, value, float("inf")), 0)


@triton.jit
def _draws(temperature, largest):
    """Whether the row draws: not if it is greedy, or is broken (`advance` will see the candidate that is infinite)."""
    return (temperature > 0) & (largest < float("inf")) & (largest > float("-inf"))


@triton.jit(do_not_specialize=["T"])
def _histogram_kernel(
    logits_ptr, max_ptr, temperature_ptr, top_k_ptr, top_p_ptr, count_ptr, mass_ptr, listed_ptr, T, V, P,
    P_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Adds a block's tokens and mass to the row's bins, which are zero before; empties the row's list."""
    pdl_trigger(PDL)
    row, block = tl.program_id(1), tl.program_id(0)
    temperature = tl.load(temperature_ptr + row // T)
    top_k, top_p = tl.load(top_k_ptr + row // T), tl.load(top_p_ptr + row // T)
    pdl_wait(PDL)

    ids = block * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row.to(tl.int64) * V + ids, mask=ids < V, other=float("-inf"))
    largest = _largest(max_ptr, row, P, P_BLOCK)
    if block == 0:
        tl.store(listed_ptr + row, 0)
    if _draws(temperature, largest) & ((top_k > 0) | (top_p < 1)):
        u = _units(logits, largest)
        mass, bins, near = _mass(u, temperature), u // BIN, u < LIMIT
        first, last = tl.min(tl.where(near, bins, BINS), 0), tl.max(tl.where(near, bins, -1), 0)
        if first == last:  # equal logits would queue for one address
            tl.atomic_add(count_ptr + row * BINS + first, tl.sum(near.to(tl.int32), 0), sem="relaxed")
            tl.atomic_add(mass_ptr + row * BINS + first, tl.sum(mass, 0), sem="relaxed")
        else:
            tl.atomic_add(count_ptr + row * BINS + bins, 1, mask=near, sem="relaxed")
            tl.atomic_add(mass_ptr + row * BINS + bins, mass, mask=near, sem="relaxed")


@triton.jit
def _combine_before(n_a, count_a, mass_a, upto_a, n_b, count_b, mass_b, upto_b):
    return n_a + n_b, tl.maximum(count_a, count_b), tl.maximum(mass_a, mass_b), tl.minimum(upto_a, upto_b)


@triton.jit
def _bins_before(before, counts, masses):
    """Of the bins before a cut: their number, the tokens and the mass in them; and the mass with the next one's.

    `counts` and `masses` are cumulative. One reduction, because each costs two barriers.
    """
    n, most = before.to(tl.int32), tl.where(before, 0x7FFFFFFFFFFFFFFF, masses)
    counts, masses = tl.where(before, counts, 0), tl.where(before, masses, 0)
    if INTERPRETED:  # the interpreter reduces a tuple one element at a time
        result = tl.sum(n, 0), tl.max(counts, 0), tl.max(masses, 0), tl.min(most, 0)
    else:
        result = tl.reduce((n, counts, masses, most), 0, _combine_before)
    return result


@triton.jit
def _find_cuts(counts, masses, top_k, top_p):
    """Where the cuts of top-k and top-p go through, from the bins' counts and masses; BINS for none:

    k's bin, k less the tokens before it, the mass before it; first and last bin that p's cut may be in, the mass before them.
    Until k's cut is known exactly, so is only within its bin the mass that top-p takes its share of.
    """
    counts, masses = tl.cumsum(counts, 0), tl.cumsum(masses, 0)
    k = tl.where(top_k > 0, top_k, 0x7FFFFFFF)
    k_bin, k_count, k_mass, most_mass = _bins_before(counts < k, counts, masses)
    p_first, _, p_mass, _ = _bins_before(masses < _needed(k_mass, top_p), counts, masses)
    p_last = tl.sum((masses < _needed(tl.where(k_bin < BINS, most_mass, k_mass), top_p)).to(tl.int32), 0)
    p_first, p_last = tl.where(top_p < 1, p_first, BINS), tl.where(top_p < 1, p_last, BINS)
    return k_bin, k - k_count, k_mass, p_first, p_last, p_mass


@triton.jit(do_not_specialize=["T"])
def _candidates_kernel(
    logits_ptr, max_ptr, temperature_ptr, seed_ptr, sample_ptr, lengths_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    count_ptr, mass_ptr, listed_ptr, list_ptr, cuts_ptr, best_ptr, best_id_ptr, T, V, P,
    P_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A block's best token among those kept for certain; those in a cut's bin go to the list. Block 0 stores the cuts."""
    pdl_trigger(PDL)
    row, block = tl.program_id(1), tl.program_id(0)
    sequence = row // T
    temperature, min_p = tl.load(temperature_ptr + sequence), tl.load(min_p_ptr + sequence)
    top_k, top_p = tl.load(top_k_ptr + sequence), tl.load(top_p_ptr + sequence)
    seed, sample = tl.load(seed_ptr + sequence), tl.load(sample_ptr + sequence)
    position = tl.load(lengths_ptr + sequence) - T + row % T + 1
    pdl_wait(PDL)

    ids = block * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row.to(tl.int64) * V + ids, mask=ids < V, other=float("-inf"))
    b = tl.arange(0, BINS)
    counts, masses = tl.load(count_ptr + row * BINS + b), tl.load(mass_ptr + row * BINS + b)
    largest = _largest(max_ptr, row, P, P_BLOCK)
    value, kept = logits, ids < V
    if _draws(temperature, largest):
        m = tl.arange(0, 1)
        noise = gumbel_tile(seed + m, sample + m, position + m, block * BLOCK, BLOCK, 1).reshape([BLOCK])
        value = logits / temperature + noise
        u = _units(logits, largest)
        kept &= u <= _min_p_units(min_p, temperature)
        if (top_k > 0) | (top_p < 1):
            k_bin, k_left, k_mass, p_first, p_last, p_mass = _find_cuts(counts, masses, top_k, top_p)
            bins = u // BIN
            kept &= (bins < k_bin) & (bins < p_first)
            listed = (u < LIMIT) & ((bins == k_bin) | ((bins >= p_first) & (bins <= p_last)))
            number = tl.sum(listed.to(tl.int32), 0)
            if number > 0:
                at = tl.atomic_add(listed_ptr + row, number, sem="relaxed") + tl.cumsum(listed.to(tl.int32), 0) - 1
                tl.store(list_ptr + row * LIST + at, ids, mask=listed & (at < LIST))
            if block == 0:
                cuts = cuts_ptr + row * 6
                tl.store(cuts, k_bin.to(tl.int64))
                tl.store(cuts + 1, k_left.to(tl.int64))
                tl.store(cuts + 2, k_mass)
                tl.store(cuts + 3, p_first.to(tl.int64))
                tl.store(cuts + 4, p_last.to(tl.int64))
                tl.store(cuts + 5, p_mass)
    value = tl.where(value == value, value, float("inf"))
    value = tl.where(kept, value, float("-inf"))
    best, index = tl.max(value, 0, return_indices=True)
    tl.store(best_ptr + row * tl.num_programs(0) + block, best)
    tl.store(best_id_ptr + row * tl.num_programs(0) + block, block * BLOCK + index)


@triton.jit
def _min_p_units(min_p, temperature):
    return tl.where(min_p > 0, -tl.log(tl.maximum(min_p, 1e-30)) * temperature * UNIT, LIMIT)


@triton.jit
def _read_list(the_list, start):
    """BLOCK tokens of a row's list from `start` on, or of the vocabulary where the list is too long: ids, logits, u."""
    logits_ptr, list_ptr, row, number, V, largest, _ = the_list
    i = start + tl.arange(0, BLOCK)
    ids = i
    if number <= LIST:
        ids = tl.load(list_ptr + row * LIST + i, mask=i < number, other=V)
    logits = tl.load(logits_ptr + row.to(tl.int64) * V + ids, mask=ids < V, other=float("-inf"))
    return ids, logits, _units(logits, largest)


@triton.jit
def _list_length(the_list):
    return tl.where(the_list[3] <= LIST, the_list[3], the_list[4])


@triton.jit
def _sum_list(the_list, first_bin, last_bin, most):
    """Of the listed tokens in these bins with u <= most: their number, their mass, the smallest and the largest u."""
    count, mass = 0, tl.zeros([], tl.int64)
    least_u, most_u = LIMIT, 0
    for start in tl.range(0, _list_length(the_list), BLOCK):
        _, _, u = _read_list(the_list, start)
        inside = (u < LIMIT) & (u // BIN >= first_bin) & (u // BIN <= last_bin) & (u <= most)
        count += tl.sum(inside.to(tl.int32), 0)
        mass += tl.sum(tl.where(inside, _mass(u, the_list[6]), 0), 0)
        least_u = tl.minimum(least_u, tl.min(tl.where(inside, u, LIMIT), 0))
        most_u = tl.maximum(most_u, tl.max(tl.where(inside, u, 0), 0))
    return count, mass, least_u, most_u


@triton.jit
def _cut_list(the_list, first_bin, last_bin, number, mass):
    """The smallest u of the listed tokens in these bins that `number` of them, and `mass` of theirs, reach."""
    _count, _mass, low, high = _sum_list(the_list, first_bin, last_bin, LIMIT)
    while low < high:
        middle = (low + high) // 2
        count, reached, _least, _most = _sum_list(the_list, first_bin, last_bin, middle)
        enough = (count >= number) & (reached >= mass)
        low, high = tl.where(enough, low, middle + 1), tl.where(enough, middle, high)
    return low


@triton.jit
def _best_listed(the_list, seed, sample, position, k_bin, p_first, p_last, most):
    """Of the listed tokens with u <= most: the largest value, and the lowest id that has it."""
    best, best_id = float("-inf"), 0x7FFFFFFF
    for start in tl.range(0, _list_length(the_list), BLOCK):
        ids, logits, u = _read_list(the_list, start)
        bins = u // BIN
        inside = (u < LIMIT) & ((bins == k_bin) | ((bins >= p_first) & (bins <= p_last))) & (u <= most)
        value = tl.where(inside, logits / the_list[6] + gumbel_ids(seed, sample, position, ids), float("-inf"))
        here = tl.max(value, 0)
        here_id = tl.min(tl.where(inside & (value == here), ids, 0x7FFFFFFF), 0)
        best, best_id = _better(best, best_id, here, here_id)
    return best, best_id


@triton.jit
def _better(value_a, id_a, value_b, id_b):
    """The larger value with its id; of equals, the lower id."""
    first = (value_a > value_b) | ((value_a == value_b) & (id_a < id_b))
    return tl.where(first, value_a, value_b), tl.where(first, id_a, id_b)


@triton.jit(do_not_specialize=["T", "blocks"])
def _resolve_kernel(
    logits_ptr, max_ptr, temperature_ptr, seed_ptr, sample_ptr, lengths_ptr, top_p_ptr, min_p_ptr,
    count_ptr, mass_ptr, listed_ptr, list_ptr, cuts_ptr, best_ptr, best_id_ptr, value_ptr, id_ptr, T, V, P, blocks,
    P_BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The row's candidate: the best of all blocks, unless a token of the list beats it and lies within the cuts."""
    pdl_trigger(PDL)
    row = tl.program_id(0)
    sequence = row // T
    temperature, min_p, top_p = (
        tl.load(temperature_ptr + sequence),
        tl.load(min_p_ptr + sequence),
        tl.load(top_p_ptr + sequence),
    )
    seed, sample = tl.load(seed_ptr + sequence), tl.load(sample_ptr + sequence)
    position = tl.load(lengths_ptr + sequence) - T + row % T + 1
    pdl_wait(PDL)

    number = tl.load(listed_ptr + row)
    i = tl.arange(0, BLOCKS)
    value = tl.load(best_ptr + row * blocks + i, mask=i < blocks, other=float("-inf"))
    ids = tl.load(best_id_ptr + row * blocks + i, mask=i < blocks, other=0x7FFFFFFF)
    best = tl.max(value, 0)
    best_id = tl.min(tl.where(value == best, ids, 0x7FFFFFFF), 0)
    b = tl.arange(0, BINS)  # for the next step's histogram
    tl.store(count_ptr + row * BINS + b, tl.zeros([BINS], tl.int32))
    tl.store(mass_ptr + row * BINS + b, tl.zeros([BINS], tl.int64))
    if number > 0:
        cuts = cuts_ptr + row * 6
        k_bin, k_left, mass = tl.load(cuts).to(tl.int32), tl.load(cuts + 1).to(tl.int32), tl.load(cuts + 2)
        p_first, p_last, p_mass = tl.load(cuts + 3).to(tl.int32), tl.load(cuts + 4).to(tl.int32), tl.load(cuts + 5)
        the_list = (logits_ptr, list_ptr, row, number, V, _largest(max_ptr, row, P, P_BLOCK), temperature)
        most = tl.minimum(_min_p_units(min_p, temperature), LIMIT).to(tl.int32)
        listed, _ = _best_listed(the_list, seed, sample, position, k_bin, p_first, p_last, most)
        if listed >= best:
            if k_bin < BINS:
                u_k = _cut_list(the_list, k_bin, k_bin, k_left, 0)
                _, added, _, _ = _sum_list(the_list, k_bin, k_bin, u_k)
                most = tl.minimum(most, u_k)
                mass += added
            if p_first < BINS:
                most = tl.minimum(most, _cut_list(the_list, p_first, p_last, 0, _needed(mass, top_p) - p_mass))
            listed, listed_id = _best_listed(the_list, seed, sample, position, k_bin, p_first, p_last, most)
            best, best_id = _better(best, best_id, listed, listed_id)
    tl.store(value_ptr + row, best)
    tl.store(id_ptr + row, best_id)


# ---------------------------------------------------------------- operator


def _check(logits, maxima, temperature, seed, sample, lengths, top_k, top_p, min_p):
    M, B = logits.shape[0], lengths.numel()
    if logits.dim() != 2 or logits.dtype != torch.float32 or not logits.is_contiguous() or not 1 <= M <= MAX_ROWS:
        raise ValueError(
            f"logits: found {logits.dtype} {list(logits.shape)}, expected float32 [1 to {MAX_ROWS}, V], contiguous"
        )
    if maxima.dim() != 2 or maxima.shape[0] != M or maxima.dtype != torch.float32 or not maxima.is_contiguous():
        raise ValueError(f"maxima: found {maxima.dtype} {list(maxima.shape)}, expected float32 [{M}, any number], contiguous")
    if lengths.dim() != 1 or M % B:
        raise ValueError(f"lengths: found {list(lengths.shape)}, expected [B], B dividing {M} rows")
    float32, int32 = torch.float32, torch.int32
    expected = {
        "temperature": (temperature, float32), "seed": (seed, torch.int64), "sample": (sample, int32),
        "lengths": (lengths, int32), "top_k": (top_k, int32), "top_p": (top_p, float32), "min_p": (min_p, float32),
    }  # fmt: skip
    for name, (t, dtype) in expected.items():
        if t.shape != (B,) or t.dtype != dtype:
            raise ValueError(f"{name}: found {t.dtype} {list(t.shape)}, expected {dtype} [{B}]")
    return logits.new_empty(M, 1), logits.new_empty(M, 1, dtype=torch.int32)


@torch.library.custom_op("rooflama::choose", mutates_args=())
def _choose(
    logits: torch.Tensor,
    maxima: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    sample: torch.Tensor,
    lengths: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    value, index = _check(logits, maxima, temperature, seed, sample, lengths, top_k, top_p, min_p)
    if not runs_kernels(logits):
        best, best_id = choose_ref(logits, temperature, seed, sample, lengths, top_k, top_p, min_p)
        value[:, 0], index[:, 0] = best, best_id
        return value, index
    (M, V), P = logits.shape, maxima.shape[1]
    T, blocks = M // lengths.numel(), triton.cdiv(V, BLOCK.value)
    make = functools.partial(torch.empty, device=logits.device, dtype=torch.int32)
    bins = MAX_ROWS * BINS.value
    counts = zeroed_workspace(logits.device, "histogram's counts", bins)
    masses = zeroed_workspace(logits.device, "histogram's masses", bins, torch.int64)
    listed, ids = make(M), make(M * LIST.value)
    best, best_id, cuts = make(M * blocks, dtype=torch.float32), make(M * blocks), make(M * 6, dtype=torch.int64)
    options = {"P_BLOCK": triton.next_power_of_2(P), "num_warps": 8, **launch_options(logits)}
    _histogram_kernel[(blocks, M)](
        logits, maxima, temperature, top_k, top_p, counts, masses, listed, T, V, P, **options
    )  # fmt: skip
    _candidates_kernel[(blocks, M)](
        logits, maxima, temperature, seed, sample, lengths, top_k, top_p, min_p,
        counts, masses, listed, ids, cuts, best, best_id, T, V, P, **options,
    )  # fmt: skip
    _resolve_kernel[(M,)](
        logits, maxima, temperature, seed, sample, lengths, top_p, min_p,
        counts, masses, listed, ids, cuts, best, best_id, value, index, T, V, P, blocks,
        BLOCKS=triton.next_power_of_2(blocks), **options,
    )  # fmt: skip
    return value, index


@_choose.register_fake
def _(logits, maxima, temperature, seed, sample, lengths, top_k, top_p, min_p):
    return _check(logits, maxima, temperature, seed, sample, lengths, top_k, top_p, min_p)


def choose(
    logits: torch.Tensor,
    maxima: torch.Tensor,
    *,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    sample: torch.Tensor,
    lengths: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's candidate (value [M, 1] float32, id [M, 1] int32), drawn from what top-k, top-p and min-p keep.

    logits [M, V] float32; maxima [M, any number], the largest of which is the row's largest logit, or infinite where a logit is
    NaN: what `head` returns beside its logits without a temperature. For each sequence [B]: temperature float32 (0 = greedy),
    seed int64, sample int32, lengths int32; top_k int32 (0 = off), top_p float32 (1 = off), min_p float32 (0 = off).
    The draw is the one that `head` makes with the same key, among fewer tokens. ValueError: a shape or dtype that does not fit.
    """
    return torch.ops.rooflama.choose(logits, maxima, temperature, seed, sample, lengths, top_k, top_p, min_p)
