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

1. `_count_kernel` counts tokens in bins of distance / temperature, 2^-5 wide, and adds up their mass.
2. `_candidates_kernel` finds the bins that the cuts go through: k's from the counts; as the tokens of a bin differ by up to 3%
   in mass, p's is in one of a few bins. What is better is kept for certain. A block gives its best certain token (logit /
   temperature + Gumbel noise, as in head.py), its best token in those bins, and a list of all that are in them.
3. `_resolve_kernel` is done if a certain token is the best. If not, it finds the exact cut within the lists.
A cut seldom goes through a bin that matters, so that the third is short nearly always, and exact always.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from kernels._common import hold, launch_options, pdl_trigger, pdl_wait, runs_kernels, zeroed_workspace
from kernels._matmul import INTERPRETED, MAX_ROWS
from kernels._random import gumbel_ids, gumbel_ref, gumbel_tile, token_positions

UNIT = tl.constexpr(1 << 20)  # units in a distance of 1.0
LIMIT = tl.constexpr((64 << 20) - 1)  # units; farther is as far
MASS = tl.constexpr(1 << 40)  # of the largest token; V < 2^22 of these fit int64
BINS = tl.constexpr(512)  # the last one holds all that is too far for the others
WIDTH = tl.constexpr(2**-5)  # of a bin, in distance / temperature
SLACK = tl.constexpr(1e-4)  # of the whole mass: more than float32 loses on the way to a bin's bounds
NEVER = tl.constexpr(0x7FFFFFFF)
TILE = 2048  # listed tokens that the third kernel holds in registers


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


@triton.jit
def _bin(u, temperature):
    """Never smaller for a larger u."""
    return tl.minimum(u.to(tl.float32) * (1 / (WIDTH * UNIT) / temperature), BINS - 1).to(tl.int32)


@triton.jit(do_not_specialize=["T"])
def _count_kernel(
    logits_ptr, max_ptr, temperature_ptr, top_k_ptr, top_p_ptr, count_ptr, total_ptr, largest_ptr, T, V, P,
    P_BLOCK: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Adds a block's tokens to the row's bins, and its mass in the last bin and in the others to two sums. All are zero before.

    The next kernel is let in after the wait, when the logits are final: it reads them without waiting.
    """
    row, block = tl.program_id(1), tl.program_id(0)
    temperature = tl.load(temperature_ptr + row // T)
    top_k, top_p = tl.load(top_k_ptr + row // T), tl.load(top_p_ptr + row // T)
    pdl_wait(PDL)
    pdl_trigger(PDL)

    ids = block * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row.to(tl.int64) * V + ids, mask=ids < V, other=float("-inf"))
    largest = _largest(max_ptr, row, P, P_BLOCK)
    if block == 0:
        tl.store(largest_ptr + row, largest)
    if _draws(temperature, largest) & ((top_k > 0) | (top_p < 1)):
        u = _units(logits, largest)
        bins, mass = _bin(u, temperature), _mass(u, temperature)
        near = bins < BINS - 1
        masses = tl.sum(tl.join(tl.where(near, mass, 0), tl.where(near, 0, mass)), 0)  # one reduction: each costs two barriers
        tl.atomic_add(total_ptr + row * 2 + tl.arange(0, 2), masses, sem="relaxed")
        counts = tl.histogram(bins, BINS, mask=u < LIMIT)
        tl.atomic_add(count_ptr + row * BINS + tl.arange(0, BINS), counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _combine_before(n_a, count_a, floor_a, upto_a, whole_a, n_b, count_b, floor_b, upto_b, whole_b):
    return (
        n_a + n_b, tl.maximum(count_a, count_b), tl.maximum(floor_a, floor_b), tl.minimum(upto_a, upto_b),
        tl.maximum(whole_a, whole_b),
    )  # fmt: skip


@triton.jit
def _bins_before(before, counts, floors):
    """Of the bins before a cut: their number, and the last of `counts` and `floors`; the next one's floor; and the very last.

    `counts` and `floors` are cumulative. One reduction, because each costs two barriers.
    """
    n, upto = before.to(tl.int32), tl.where(before, float("inf"), floors)
    counts, before_floors = tl.where(before, counts, 0), tl.where(before, floors, 0.0)
    if INTERPRETED:  # the interpreter reduces a tuple one element at a time
        result = tl.sum(n, 0), tl.max(counts, 0), tl.max(before_floors, 0), tl.min(upto, 0), tl.max(floors, 0)
    else:
        result = tl.reduce((n, counts, before_floors, upto, floors), 0, _combine_before)
    return result


@triton.jit
def _mass_bounds(floor, whole_floor, near):
    """The least and the most mass of the first bins, whose tokens have at least `floor`, those of all near bins `whole_floor`.

    A token has less than exp(WIDTH) times its bin's floor; and what all near bins hold, `near`, is known.
    """
    rest = whole_floor - floor
    ratio: tl.constexpr = 1.0317434074991028  # exp(WIDTH)
    return tl.maximum(floor, near - rest * ratio), tl.minimum(floor * ratio, near - rest)


@triton.jit
def _find_cuts(counts, near, far, top_k, top_p):
    """Where the cuts of top-k and top-p go through, from the bins' counts and the mass in the last bin and in the others:

    k's bin, k less the tokens before it; first and last bin that p's cut may be in. BINS where there is no cut.
    """
    b = tl.arange(0, BINS)
    floors = tl.where(
        b < BINS - 1, counts.to(tl.float32) * tl.exp2((b + 1).to(tl.float32) * (-1.4426950408889634 * WIDTH)), 0.0
    )
    counts, floors = tl.cumsum(counts, 0), tl.cumsum(floors, 0)
    k = tl.where(top_k > 0, top_k, NEVER)
    k_bin, k_count, floor, upto, whole_floor = _bins_before(counts < k, counts, floors)

    near, far = near.to(tl.float32) * (1 / MASS), far.to(tl.float32) * (1 / MASS)
    whole = near + far
    least, most = whole, whole  # of the tokens that top-k keeps
    if k_bin < BINS:
        least, _ = _mass_bounds(floor, whole_floor, near)
        if k_bin < BINS - 1:
            _, most = _mass_bounds(upto, whole_floor, near)
    at_least, at_most = _mass_bounds(floors, whole_floor, near)
    surely_before = at_most < top_p * least - SLACK * whole
    maybe_before = at_least < top_p * most + SLACK * whole
    both = tl.sum(surely_before.to(tl.int32) + maybe_before.to(tl.int32) * (2 * BINS), 0)
    p_first = tl.where(top_p < 1, tl.minimum(both % (2 * BINS), BINS - 1), BINS)
    p_last = tl.where(top_p < 1, tl.minimum(both // (2 * BINS), tl.minimum(k_bin, BINS - 1)), BINS)
    return k_bin, k - k_count, p_first, p_last


@triton.jit(do_not_specialize=["T"])
def _candidates_kernel(
    logits_ptr, temperature_ptr, seed_ptr, sample_ptr, lengths_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    count_ptr, total_ptr, largest_ptr, cuts_ptr, best_ptr, best_id_ptr, sums_ptr, list_ptr, T, V,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A block's best token among those kept for certain, and among those in a cut's bin, which it lists; its mass before
    k's and p's cut, with the list's length beside each. Block 0 stores the cuts."""
    pdl_trigger(PDL)
    row, block = tl.program_id(1), tl.program_id(0)
    slot = row * tl.num_programs(0) + block
    sequence = row // T
    temperature, min_p = tl.load(temperature_ptr + sequence), tl.load(min_p_ptr + sequence)
    top_k, top_p = tl.load(top_k_ptr + sequence), tl.load(top_p_ptr + sequence)
    seed, sample = tl.load(seed_ptr + sequence), tl.load(sample_ptr + sequence)
    position = tl.load(lengths_ptr + sequence) - T + row % T + 1
    ids = block * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row.to(tl.int64) * V + ids, mask=ids < V, other=float("-inf"))  # final: see _count_kernel
    m = tl.arange(0, 1)
    noise = hold(gumbel_tile(seed + m, sample + m, position + m, block * BLOCK, BLOCK, 1).reshape([BLOCK]))  # or it moves below
    pdl_wait(PDL)

    counts = tl.load(count_ptr + row * BINS + tl.arange(0, BINS))
    near, far = tl.load(total_ptr + row * 2), tl.load(total_ptr + row * 2 + 1)
    largest = tl.load(largest_ptr + row)
    value, kept, maybe = logits, ids < V, ids < 0
    if _draws(temperature, largest):
        value = logits / temperature + noise
        u = _units(logits, largest)
        if (top_k > 0) | (top_p < 1):
            k_bin, k_left, p_first, p_last = _find_cuts(counts, near, far, top_k, top_p)
            bins, mass = _bin(u, temperature), _mass(u, temperature)
            listed = (u < LIMIT) & ((bins == k_bin) | ((bins >= p_first) & (bins <= p_last)))
            before = tl.join(tl.where(bins < k_bin, mass, 0), tl.where(bins < p_first, mass, 0))
            numbers = tl.join(listed, listed).to(tl.int64)
            pair = tl.arange(0, 2)
            tl.store(sums_ptr + slot * 4 + pair[:, None] * 2 + pair[None, :], tl.sum(tl.join(before, numbers), 0))
            rank = tl.cumsum(listed.to(tl.int32), 0)
            tl.store(list_ptr + row.to(tl.int64) * V + block * BLOCK + rank - 1, ids, mask=listed)
            kept &= (u == 0) | ((bins < k_bin) & (bins < p_first))
            maybe = listed & (bins <= p_last) & (u > 0)
            if block == 0:
                tl.store(cuts_ptr + row * 4, k_bin)
                tl.store(cuts_ptr + row * 4 + 1, k_left)
                tl.store(cuts_ptr + row * 4 + 2, p_first)
                tl.store(cuts_ptr + row * 4 + 3, p_last)
        within = u <= _min_p_units(min_p, temperature)
        kept &= within
        maybe &= within
    value = tl.where(value == value, value, float("inf"))
    both = tl.join(tl.where(kept, value, float("-inf")), tl.where(maybe, value, float("-inf")))
    best, index = tl.max(both, 0, return_indices=True)
    tl.store(best_ptr + slot * 2 + tl.arange(0, 2), best)
    tl.store(best_id_ptr + slot * 2 + tl.arange(0, 2), block * BLOCK + index)


@triton.jit
def _min_p_units(min_p, temperature):
    return tl.where(min_p > 0, -tl.log(tl.maximum(min_p, 1e-30)) * temperature * UNIT, LIMIT)


@triton.jit
def _read_lists(lists, start, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """COLUMNS tokens of each block's list from `start` on: ids, logits, u; LIMIT where there is none."""
    logits_ptr, list_ptr, numbers, largest, _ = lists
    column = start + tl.arange(0, COLUMNS)[None, :]
    there = column < numbers[:, None]
    ids = tl.load(list_ptr + tl.arange(0, numbers.shape[0])[:, None] * BLOCK + column, mask=there, other=0)
    logits = tl.load(logits_ptr + ids, mask=there, other=float("-inf"))
    return ids, logits, _units(logits, largest)


@triton.jit
def _combine_sums(count_a, mass_a, least_a, most_a, count_b, mass_b, least_b, most_b):
    return count_a + count_b, mass_a + mass_b, tl.minimum(least_a, least_b), tl.maximum(most_a, most_b)


@triton.jit
def _sum_tile(u, first_bin, last_bin, most, temperature):
    """Of the tokens in these bins with u <= most: their number, their mass, the smallest and the largest u."""
    bins, u = _bin(u, temperature).ravel(), u.ravel()
    inside = (u < LIMIT) & (bins >= first_bin) & (bins <= last_bin) & (u <= most)
    count, mass = inside.to(tl.int32), tl.where(inside, _mass(u, temperature), 0)
    least_u, most_u = tl.where(inside, u, LIMIT), tl.where(inside, u, 0)
    if INTERPRETED:
        result = tl.sum(count, 0), tl.sum(mass, 0), tl.min(least_u, 0), tl.max(most_u, 0)
    else:
        result = tl.reduce((count, mass, least_u, most_u), 0, _combine_sums)
    return result


@triton.jit
def _sum_lists(lists, first_u, first_bin, last_bin, most, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """`_sum_tile` of the whole lists, the first tile of which is in registers."""
    count, mass, least_u, most_u = _sum_tile(first_u, first_bin, last_bin, most, lists[4])
    for start in tl.range(COLUMNS, tl.max(lists[2], 0), COLUMNS):
        _, _, u = _read_lists(lists, start, COLUMNS, BLOCK)
        more = _sum_tile(u, first_bin, last_bin, most, lists[4])
        count, mass = count + more[0], mass + more[1]
        least_u, most_u = tl.minimum(least_u, more[2]), tl.maximum(most_u, more[3])
    return count, mass, least_u, most_u


@triton.jit
def _cut_lists(lists, first_u, first_bin, last_bin, number, mass, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest u of the listed tokens in these bins that `number` and `mass` of theirs reach, and the mass up to it."""
    _count, upto, low, high = _sum_lists(lists, first_u, first_bin, last_bin, LIMIT, COLUMNS, BLOCK)
    while low < high:
        middle = (low + high) // 2
        count, reached, _least, _most = _sum_lists(lists, first_u, first_bin, last_bin, middle, COLUMNS, BLOCK)
        enough = (count >= number) & (reached >= mass)
        low, high, upto = tl.where(enough, low, middle + 1), tl.where(enough, middle, high), tl.where(enough, reached, upto)
    return low, upto


@triton.jit
def _best_listed(lists, seed, sample, position, most, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Of the listed tokens with u <= most: the largest value, and the lowest id that has it."""
    best, best_id = float("-inf"), NEVER
    for start in tl.range(0, tl.max(lists[2], 0), COLUMNS):
        ids, logits, u = _read_lists(lists, start, COLUMNS, BLOCK)
        value = logits / lists[4] + gumbel_ids(seed, sample, position, ids)
        value = tl.where((u < LIMIT) & (u <= most), value, float("-inf")).ravel()
        here = tl.max(value, 0)
        here_id = tl.min(tl.where(value == here, ids.ravel(), NEVER), 0)
        best, best_id = _better(best, best_id, here, here_id)
    return best, best_id


@triton.jit
def _better(value_a, id_a, value_b, id_b):
    """The larger value with its id; of equals, the lower id."""
    first = (value_a > value_b) | ((value_a == value_b) & (id_a < id_b))
    return tl.where(first, value_a, value_b), tl.where(first, id_a, id_b)


@triton.jit(do_not_specialize=["T", "blocks"])
def _resolve_kernel(
    logits_ptr, temperature_ptr, seed_ptr, sample_ptr, lengths_ptr, top_p_ptr, min_p_ptr,
    count_ptr, total_ptr, largest_ptr, cuts_ptr, best_ptr, best_id_ptr, sums_ptr, list_ptr,
    value_ptr, id_ptr, T, V, blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The row's candidate: the best certain one, unless a listed token beats it and lies within the cuts. Empties the bins."""
    pdl_trigger(PDL)
    row = tl.program_id(0)
    sequence = row // T
    temperature, min_p = tl.load(temperature_ptr + sequence), tl.load(min_p_ptr + sequence)
    top_p, seed, sample = tl.load(top_p_ptr + sequence), tl.load(seed_ptr + sequence), tl.load(sample_ptr + sequence)
    position = tl.load(lengths_ptr + sequence) - T + row % T + 1
    i = tl.arange(0, BLOCKS)
    slot, mask = row * blocks + i, i < blocks
    pdl_wait(PDL)

    value = tl.load(best_ptr + slot * 2, mask=mask, other=float("-inf"))
    listed = tl.max(tl.load(best_ptr + slot * 2 + 1, mask=mask, other=float("-inf")), 0)
    ids = tl.load(best_id_ptr + slot * 2, mask=mask, other=NEVER)
    tl.store(count_ptr + row * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))  # for the next step
    tl.store(total_ptr + row * 2 + tl.arange(0, 2), tl.zeros([2], tl.int64))
    best = tl.max(value, 0)
    best_id = tl.min(tl.where(value == best, ids, NEVER), 0)
    if (listed >= best) & (listed > float("-inf")):
        k_bin, k_left = tl.load(cuts_ptr + row * 4), tl.load(cuts_ptr + row * 4 + 1)
        p_first, p_last = tl.load(cuts_ptr + row * 4 + 2), tl.load(cuts_ptr + row * 4 + 3)
        mass = tl.sum(tl.load(sums_ptr + slot * 4, mask=mask, other=0), 0)
        p_mass = tl.sum(tl.load(sums_ptr + slot * 4 + 2, mask=mask, other=0), 0)
        numbers = tl.load(sums_ptr + slot * 4 + 1, mask=mask, other=0).to(tl.int32)
        start = row.to(tl.int64) * V
        lists = (logits_ptr + start, list_ptr + start, numbers, tl.load(largest_ptr + row), temperature)
        _ids, _logits, first_u = _read_lists(lists, 0, COLUMNS, BLOCK)
        most = tl.minimum(_min_p_units(min_p, temperature), LIMIT).to(tl.int32)
        for cut in tl.range(0, 2):  # top-k's, then top-p's
            first, last = tl.where(cut == 0, k_bin, p_first), tl.where(cut == 0, k_bin, p_last)
            if first < BINS:
                number, needed = tl.where(cut == 0, k_left, 0), tl.where(cut == 0, 0, _needed(mass, top_p) - p_mass)
                u, upto = _cut_lists(lists, first_u, first, last, number, needed, COLUMNS, BLOCK)
                most = tl.minimum(most, u)
                mass += upto  # of no use after the second
        listed, listed_id = _best_listed(lists, seed, sample, position, most, COLUMNS, BLOCK)
        best, best_id = _better(best, best_id, listed, listed_id)
    tl.store(value_ptr + row, best)
    tl.store(id_ptr + row, best_id)


# ---------------------------------------------------------------- operator


def block_size(rows: int) -> int:
    """Ids a program. Many rows fill the card with fewer programs, each of which reads all of its row's maxima."""
    return 1024 if rows <= 4 else 4096


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
    T, block = M // lengths.numel(), block_size(M)
    blocks = triton.cdiv(V, block)
    count_blocks = triton.next_power_of_2(blocks)
    make = functools.partial(torch.empty, device=logits.device, dtype=torch.int32)
    counts = zeroed_workspace(logits.device, "counts of choose", MAX_ROWS * BINS.value)
    totals = zeroed_workspace(logits.device, "masses of choose", MAX_ROWS * 2, torch.int64)
    largest, cuts, lists = make(M, dtype=torch.float32), make(M, 4), make(M, V)
    best, best_id = make(M, blocks, 2, dtype=torch.float32), make(M, blocks, 2)
    sums = make(M, blocks, 2, 2, dtype=torch.int64)
    options = {"BLOCK": block, "num_warps": 8, **launch_options(logits)}
    _count_kernel[(blocks, M)](
        logits, maxima, temperature, top_k, top_p, counts, totals, largest, T, V, P,
        P_BLOCK=triton.next_power_of_2(P), **options,
    )  # fmt: skip
    _candidates_kernel[(blocks, M)](
        logits, temperature, seed, sample, lengths, top_k, top_p, min_p,
        counts, totals, largest, cuts, best, best_id, sums, lists, T, V, **options,
    )  # fmt: skip
    _resolve_kernel[(M,)](
        logits, temperature, seed, sample, lengths, top_p, min_p,
        counts, totals, largest, cuts, best, best_id, sums, lists, value, index, T, V, blocks,
        BLOCKS=count_blocks, COLUMNS=max(1, TILE // count_blocks), **options,
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
