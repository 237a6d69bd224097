"""The choice of a token under top-k, top-p and min-p, without sorting the vocabulary.

Owns `choose`: from the logits and their maximum to one candidate a row, in one kernel; and `choose_and_advance`, where the same
kernel ends the step, as head.py's `advance` does with a candidate. Does not know how logits are made.
Letters: B sequences, T query tokens a sequence, M = B * T rows (row r is token r % T of sequence r // T), V vocabulary,
G programs a row, K hidden size.

A logit is kept by its distance below the row's largest, a whole number u of 2^-20: what is equal in u is equal here. A token's
mass is 2^40 exp(-distance / temperature), rounded to a whole number, so that sums do not depend on their order. The cuts, in
transformers' order, after the temperature:
    top-k   u is kept where fewer than k tokens have a smaller one: ties with the k-th are kept;
    top-p   of these, u is kept where the mass of smaller ones is below top_p of their whole mass: ties with the last are kept;
    min-p   u is kept where exp(-distance / temperature) >= min_p.
What is 64 or more below the largest is kept by a row that nothing cuts, and has no mass.

Each program has a part of its row's tokens, and goes through it twice:
1. It counts them in bins of distance / temperature, 64 to an octave, and adds these counts, and their mass, to the row's.
   Barrier: the row's programs wait for each other.
2. It finds the bins that the cuts go through: k's from the counts; as the tokens of a bin differ in mass, p's is in one of a
   few bins. What is better is kept for certain. Its best certain token (logit / temperature + Gumbel noise, as in head.py), the
   value of its best token in those bins, and a list of all that are in them are left in memory. Where it has many tokens, and
   the cuts leave few, it first lists those few, and draws for them alone.
The row's last program to get there is done if a certain token is the best. If not, it finds the exact cut within the lists.
A cut seldom goes through a bin that matters, so that this is short nearly always, and exact always.

The barrier cannot hang. A row has several programs only where all programs of the launch fit on the card, one a multiprocessor.
The kernels before this one do not need it to finish; the one behind may start, with PDL, only after every program here has
triggered, and so has its place, or has ended; and the one behind that, not before the one behind has finished (_common.py).
"""

import math

import torch
import triton
import triton.language as tl

from kernels._advance import advance_ref, advance_sequence, check_advance, load_sequence
from kernels._common import (
    AHEAD_BYTES,
    INTERPRET,
    INTERPRETED,
    hold,
    launch_options,
    num_sms,
    pdl_trigger,
    pdl_wait,
    plan_prefetch,
    prefetch,
    prefetch_share,
    runs_kernels,
    zeroed_workspace,
)
from kernels._random import gumbel_ids, gumbel_ref, gumbel_tile, token_positions
from kernels._shared import (
    BINS,
    FEW,
    add_few,
    add_to_bins,
    append,
    open_bins,
    open_few,
    open_list,
    read_bins,
    read_few,
    read_length,
    take_registers,
)
from kernels.formats import Weight

UNIT = tl.constexpr(1 << 20)  # units in a distance of 1.0
LIMIT = tl.constexpr((64 << 20) - 1)  # units; farther is as far
MASS = tl.constexpr(1 << 40)  # of the largest token; V < 2^22 of these fit int64
MOST_MASS = tl.constexpr(1 << 62)
BIN_SHIFT = tl.constexpr(17)  # a float32's bits from here on tell its octave and which 64th of it
BIN_BASE = tl.constexpr((127 - 11) << 6)  # those bits of 2^-11, where the first bin ends; the last one begins just below 2^5
SLACK = tl.constexpr(1e-4)  # of the whole mass: more than float32 loses on the way to a bin's bounds
NEVER = tl.constexpr(0x7FFFFFFF)
LOWEST = tl.constexpr(-(1 << 63))
NEAR = tl.constexpr(8192)  # tokens of a row that a program may list before it draws for them
PART = tl.constexpr(5)  # numbers that a program leaves: see the end of the second pass
WARPS = 16
TILE = 2048  # listed tokens that are held in registers
# Of few tokens, a program is to start while some of head's still run on its multiprocessor: it takes few registers, though more
# than half (`take_registers`: of half, one multiprocessor got two programs and another none, which cost 2.5 us), and few KiB of
# shared memory (Triton 3.6 takes 8 bytes a listed token). 1.6 to 2.6 us a step of the 1B. With more than four tokens a thread
# the limit costs spills.
LEAN_TOKENS, LEAN_TILE, LEAN_REGISTERS = 4 * 32 * WARPS, 512, 72


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
    value = tl.load(max_ptr + row.to(tl.int64) * P + p, mask=p < P, other=float("-inf"))
    return tl.max(tl.where(value == value, value, float("inf")), 0)


@triton.jit
def _draws(temperature, largest):
    """Whether the row draws: not if it is greedy, or is broken (`advance` will see the candidate that is infinite)."""
    return (temperature > 0) & (largest < float("inf")) & (largest > float("-inf"))


@triton.jit
def _min_p_units(min_p, temperature):
    return tl.where(min_p > 0, -tl.log(tl.maximum(min_p, 1e-30)) * temperature * UNIT, LIMIT)


@triton.jit
def _key(value, ids):
    """A whole number: larger for a larger value, and of equal ones for a lower id."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & NEVER)).to(tl.int64) << 32) | (ids ^ NEVER)


@triton.jit
def _value_and_id(key):
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & NEVER)).to(tl.float32, bitcast=True), (key & NEVER).to(tl.int32) ^ NEVER


# Reductions of two tensors at once, as each costs two barriers; the interpreter would take a pair one element at a time


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _larger_of_pairs(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def _smaller_of_pairs(a, b, c, d):
    return tl.minimum(a, c), tl.minimum(b, d)


@triton.jit
def _sums(a, b, AXIS: tl.constexpr):
    if INTERPRETED:
        sums = tl.sum(a, AXIS), tl.sum(b, AXIS)
    else:
        sums = tl.reduce((a, b), AXIS, _add_pairs)
    return sums


@triton.jit
def _maxima(a, b):
    if INTERPRETED:
        maxima = tl.max(a, 0), tl.max(b, 0)
    else:
        maxima = tl.reduce((a, b), 0, _larger_of_pairs)
    return maxima


@triton.jit
def _minima(a, b):
    if INTERPRETED:
        minima = tl.min(a, 0), tl.min(b, 0)
    else:
        minima = tl.reduce((a, b), 0, _smaller_of_pairs)
    return minima


# Bins


@triton.jit
def _distance(u, temperature):
    """The logit's distance below the largest / temperature."""
    return u.to(tl.float32) * (1 / UNIT / temperature)


@triton.jit
def _bin(u, temperature):
    """Never smaller for a larger u."""
    bins = (_distance(u, temperature).to(tl.int32, bitcast=True) >> BIN_SHIFT) - BIN_BASE
    return tl.minimum(tl.maximum(bins, 0), BINS - 1)


@triton.jit
def _bin_start(b):
    """The `_distance` from which on bin b has its tokens."""
    start = ((b + BIN_BASE) << BIN_SHIFT).to(tl.float32, bitcast=True)
    return tl.where(b > 0, tl.where(b < BINS, start, float("inf")), 0.0)


# Cuts


@triton.jit
def _combine_bins(n_a, least_a, most_a, n_b, least_b, most_b):
    return n_a + n_b, least_a + least_b, most_a + most_b


@triton.jit
def _combine_before(n_a, count_a, least_a, most_a, n_b, count_b, least_b, most_b):
    return n_a + n_b, tl.maximum(count_a, count_b), tl.maximum(least_a, least_b), tl.minimum(most_a, most_b)


@triton.jit
def _find_cuts(counts, whole, top_k, top_p):
    """Where the cuts of top-k and top-p go through, from the bins' counts and the whole mass:

    k's bin, k less the tokens before it; first and last bin that p's cut may be in. BINS where there is no cut. Then the last
    bin of all these, and the tokens up to it.
    """
    b, whole = tl.arange(0, BINS), whole.to(tl.float32) * (1 / MASS)
    least = counts.to(tl.float32) * tl.exp2(_bin_start(b + 1) * -1.4426950408889634)
    most = counts.to(tl.float32) * tl.exp2(_bin_start(b) * -1.4426950408889634)
    all_least, all_most = _sums(least, most, 0)
    if INTERPRETED:  # the interpreter takes a tuple one element at a time
        n, least, most = tl.cumsum(counts, 0), tl.cumsum(least, 0), tl.cumsum(most, 0)
    else:  # at once: each costs two barriers
        n, least, most = tl.associative_scan((counts, least, most), 0, _combine_bins)
    least, most = tl.maximum(least, whole - (all_most - most)), tl.minimum(most, whole - (all_least - least))

    k = tl.where(top_k > 0, top_k, NEVER)
    before = n < k
    one, count = before.to(tl.int32), tl.where(before, n, 0)
    least_before, most_upto = tl.where(before, least, 0.0), tl.where(before, whole, most)
    if INTERPRETED:
        k_bin, k_count = tl.sum(one, 0), tl.max(count, 0)
        kept_least, kept_most = tl.max(least_before, 0), tl.min(most_upto, 0)
    else:
        k_bin, k_count, kept_least, kept_most = tl.reduce((one, count, least_before, most_upto), 0, _combine_before)

    surely_before = most < top_p * kept_least - SLACK * whole
    maybe_before = least < top_p * kept_most + SLACK * whole
    both = tl.sum(surely_before.to(tl.int32) + maybe_before.to(tl.int32) * (2 * BINS), 0)
    p_first = tl.where(top_p < 1, tl.minimum(both % (2 * BINS), BINS - 1), BINS)
    p_last = tl.where(top_p < 1, tl.minimum(both // (2 * BINS), tl.minimum(k_bin, BINS - 1)), BINS)
    last = tl.maximum(tl.where(k_bin < BINS, k_bin, -1), tl.where(top_p < 1, p_last, -1))
    last = tl.where(last < 0, BINS, last)
    return k_bin, k - k_count, p_first, p_last, last, tl.max(tl.where(b <= last, n, 0), 0)


# Lists: (logits, ids, the lists' lengths, the row's largest logit, temperature, the longest list's length)


@triton.jit
def _read_lists(lists, start, COLUMNS: tl.constexpr, SPAN: tl.constexpr):
    """A tile: COLUMNS tokens of each program's list from `start` on: ids, logits, u; LIMIT where there is none."""
    logits_ptr, list_ptr, numbers, largest, _temperature, _longest = lists
    i = tl.arange(0, numbers.shape[0])
    column = start + i % COLUMNS
    there = column < numbers
    ids = tl.load(list_ptr + i // COLUMNS * SPAN + column, mask=there, other=0)
    logits = tl.load(logits_ptr + ids, mask=there, other=float("-inf"))
    return ids, logits, _units(logits, largest)


@triton.jit
def _inside(u, least, most, first_bin, last_bin, temperature):
    bins = _bin(u, temperature)
    return (u < LIMIT) & (u >= least) & (u <= most) & (bins >= first_bin) & (bins <= last_bin)


@triton.jit
def _combine_sums(count_a, mass_a, least_a, most_a, count_b, mass_b, least_b, most_b):
    return count_a + count_b, mass_a + mass_b, tl.minimum(least_a, least_b), tl.maximum(most_a, most_b)


@triton.jit
def _sum_tile(u, first_bin, last_bin, most, temperature):
    """Of the tokens in these bins with u <= most: their number, their mass, the smallest and the largest u."""
    inside = _inside(u, 0, most, first_bin, last_bin, temperature)
    count, mass = inside.to(tl.int32), tl.where(inside, _mass(u, temperature), 0)
    least_u, most_u = tl.where(inside, u, LIMIT), tl.where(inside, u, 0)
    if INTERPRETED:
        result = tl.sum(count, 0), tl.sum(mass, 0), tl.min(least_u, 0), tl.max(most_u, 0)
    else:
        result = tl.reduce((count, mass, least_u, most_u), 0, _combine_sums)
    return result


@triton.jit
def _sum_lists(lists, first_bin, last_bin, most, COLUMNS: tl.constexpr, SPAN: tl.constexpr):
    """`_sum_tile` of the whole lists."""
    count, mass = tl.full([], 0, tl.int32), tl.full([], 0, tl.int64)
    least_u, most_u = tl.full([], LIMIT, tl.int32), tl.full([], 0, tl.int32)
    for start in tl.range(0, lists[5], COLUMNS):
        _, _, u = _read_lists(lists, start, COLUMNS, SPAN)
        more = _sum_tile(u, first_bin, last_bin, most, lists[4])
        count, mass = count + more[0], mass + more[1]
        least_u, most_u = tl.minimum(least_u, more[2]), tl.maximum(most_u, more[3])
    return count, mass, least_u, most_u


@triton.jit
def _cut_few(few, length, number, mass, temperature):
    """The smallest of the first `length` u in `few` that `number` and `mass` of them reach, and the mass up to it. Each u is
    compared with each, ABREAST at a time: a step of a search would cost a reduction, which takes longer than all of this."""
    ABREAST: tl.constexpr = 8
    i = tl.arange(0, FEW)
    own = read_few(few, length, i)
    count, upto = tl.zeros([FEW, ABREAST], tl.int32), tl.zeros([FEW, ABREAST], tl.int64)
    for start in tl.range(0, length, ABREAST):
        j = start + tl.arange(0, ABREAST)
        other = tl.where(j < length, read_few(few, length, j), LIMIT)
        reached = other[None, :] <= own[:, None]
        count += reached.to(tl.int32)
        upto += tl.where(reached, _mass(other, temperature)[None, :], 0)
    count, upto = _sums(count, upto, 1)
    enough = (i < length) & (count >= number) & (upto >= mass)
    return _minima(tl.where(enough, own, LIMIT), tl.where(enough, upto, MOST_MASS))


@triton.jit
def _cut_lists(lists, bins, first_bin, last_bin, number, mass, COLUMNS: tl.constexpr, SPAN: tl.constexpr):
    """The smallest u of the listed tokens in these bins that `number` and `mass` of theirs reach, and the mass up to it."""
    left = tl.sum(lists[2], 0) // COLUMNS
    low, high, before = tl.full([], 0, tl.int32), tl.full([], LIMIT, tl.int32), tl.full([], 0, tl.int32)
    upto, mass_before = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    if left > FEW:
        left, upto, low, high = _sum_lists(lists, first_bin, last_bin, LIMIT, COLUMNS, SPAN)
    while (left > FEW) & (low < high):  # until it is one of few, or equal ones: `left` are from low to high, `before` below
        middle = (low + high) // 2
        count, reached, _least, _most = _sum_lists(lists, first_bin, last_bin, middle, COLUMNS, SPAN)
        enough = (count >= number) & (reached >= mass)
        left = tl.where(enough, count - before, left + before - count)
        before, mass_before = tl.where(enough, before, count), tl.where(enough, mass_before, reached)
        low, high, upto = tl.where(enough, low, middle + 1), tl.where(enough, middle, high), tl.where(enough, reached, upto)
    if left <= FEW:
        few, length = open_few(bins)
        for start in tl.range(0, lists[5], COLUMNS):
            _, _, u = _read_lists(lists, start, COLUMNS, SPAN)
            few, length = add_few(few, length, u, _inside(u, low, high, first_bin, last_bin, lists[4]))
        low, upto = _cut_few(few, read_length(length), number - before, mass - mass_before, lists[4])
        upto += mass_before
    return low, upto


@triton.jit
def _best_listed(lists, seed, sample, position, most, COLUMNS: tl.constexpr, SPAN: tl.constexpr):
    """The key of the best of the listed tokens with u <= most."""
    best = tl.full([], LOWEST, tl.int64)
    for start in tl.range(0, lists[5], COLUMNS):
        ids, logits, u = _read_lists(lists, start, COLUMNS, SPAN)
        value = logits / lists[4] + gumbel_ids(seed, sample, position, ids)
        best = tl.maximum(best, tl.max(_key(tl.where((u < LIMIT) & (u <= most), value, float("-inf")), ids), 0))
    return best


@triton.jit
def _resolve(
    logits_ptr, list_ptr, part_ptr, programs, bins, embedding_ptr, K,
    largest, temperature, seed, sample, position, top_p, within, whole, k_bin, k_left, p_first, p_last,
    PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The row's candidate: the best certain one, unless a listed token beats it and lies within the cuts."""
    of = tl.arange(0, PROGRAMS * COLUMNS) // COLUMNS
    numbers = tl.load(part_ptr + of * PART + 4, mask=of < programs, other=0).to(tl.int32)  # arrives with the others
    part_ptr += tl.arange(0, PROGRAMS) * PART
    there = tl.arange(0, PROGRAMS) < programs
    best, listed = _maxima(tl.load(part_ptr, mask=there, other=LOWEST), tl.load(part_ptr + 1, mask=there, other=LOWEST))
    if listed > best:
        _prefetch_embedding(listed, embedding_ptr, K, PDL)
        lists = (logits_ptr, list_ptr, numbers, largest, temperature, tl.max(numbers, 0))
        most, mass = tl.minimum(within, LIMIT).to(tl.int32), whole  # mass: what top-k keeps
        k_mass, p_mass = tl.load(part_ptr + 2, mask=there, other=0), tl.load(part_ptr + 3, mask=there, other=0)
        k_before, p_before = _sums(k_mass, p_mass, 0)  # of no use where top-p is off
        first_cut, cuts = tl.where(k_bin < BINS, 0, 1), tl.where(p_first < BINS, 2, 1)
        for cut in tl.range(first_cut, cuts, disable_licm=True):  # k's, p's; what is moved out of it would take registers
            number, needed = tl.where(cut == 0, k_left, 0), tl.where(cut == 0, 0, _needed(mass, top_p) - p_before)
            first_bin, last_bin = tl.where(cut == 0, k_bin, p_first), tl.where(cut == 0, k_bin, p_last)
            u, upto = _cut_lists(lists, bins, first_bin, last_bin, number, needed, COLUMNS, SPAN)
            most, mass = tl.minimum(most, u), upto + k_before
        best = tl.maximum(best, _best_listed(lists, seed, sample, position, most, COLUMNS, SPAN))
    return _value_and_id(best)


# The kernel


@triton.jit
def _arrive(arrived_ptr):
    """Says that what this program has stored is there; how many arrived before."""
    tl.debug_barrier()  # every thread's stores come before the one thread's release
    return tl.atomic_add(arrived_ptr, 1, sem="acq_rel")


@triton.jit
def _load_tile(logits_ptr, ids, V):
    return tl.load(logits_ptr + ids, mask=ids < V, other=float("-inf"))


@triton.jit
def _prefetch_embedding(key, embedding_ptr, K, PDL: tl.constexpr):
    """Brings the embedding of a key's token into L2. It is read at once where it is chosen, and would take 0.8 us to come."""
    if embedding_ptr is not None:
        value, token = _value_and_id(key)
        if value > float("-inf"):
            SECTOR: tl.constexpr = 256 // embedding_ptr.dtype.element_ty.primitive_bitwidth  # columns in 32 bytes
            sector = tl.minimum(tl.arange(0, 512) * SECTOR, K - 1)  # the first 16 KB
            prefetch(embedding_ptr + token.to(tl.int64) * K + sector, PDL)


@triton.jit
def _noise(seed, sample, position, first_id, BLOCK: tl.constexpr):
    m = tl.arange(0, 1)
    return gumbel_tile(seed + m, sample + m, position + m, first_id, BLOCK, 1).reshape([BLOCK])


def _name(specialization) -> str:
    """Tells the two kernels apart in a trace: the one that advances ends a step."""
    return "_choose_kernel" if "x_ptr" in specialization.constants else "_choose_and_advance_kernel"


@triton.jit(do_not_specialize=["T"], repr=_name)
def _choose_kernel(
    logits_ptr, max_ptr, temperature_ptr, seed_ptr, sample_ptr, lengths_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    count_ptr, whole_ptr, arrived_ptr, part_ptr, lists_ptr, near_ptr, value_ptr, id_ptr,
    token_ptr, ring_ptr, cursor_ptr, done_ptr, flag_ptr, limit_ptr, stop_ptr, embedding_ptr, x_ptr, ahead_ptr, then_ptr,
    T, V, P, ring_size, stops, K, ahead_bytes, then_bytes,
    P_BLOCK: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr,
    STOPS: tl.constexpr, K_BLOCK: tl.constexpr, PASSES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (g, row) has SPAN tokens from g * SPAN on, BLOCK at a time. The workspaces count, whole and arrived are zero
    before and after. PASSES is 0 for both passes; 1 or 2 for one of them, where programs run one after another.

    The candidate goes to value and id; or, where x is given, to the row's sequence, in the step's last kernel: that one never
    triggers early (_advance.py), and row = sequence."""
    ADVANCES: tl.constexpr = x_ptr is not None
    if not ADVANCES:
        pdl_trigger(PDL)
    row, g, programs = tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    SPAN: tl.constexpr = TILES * BLOCK
    sequence = row // T
    temperature, min_p = tl.load(temperature_ptr + sequence), tl.load(min_p_ptr + sequence)
    top_k, top_p = tl.load(top_k_ptr + sequence), tl.load(top_p_ptr + sequence)
    seed, sample = tl.load(seed_ptr + sequence), tl.load(sample_ptr + sequence)
    position = tl.load(lengths_ptr + sequence) - T + row % T + 1
    first_id, b = g * SPAN, tl.arange(0, BINS)
    logits_ptr, lists_ptr = logits_ptr + row.to(tl.int64) * V, lists_ptr + row.to(tl.int64) * V
    list_ptr = lists_ptr + first_id
    count_ptr, whole_ptr, arrived_ptr = count_ptr + row * BINS, whole_ptr + row, arrived_ptr + row
    part_ptr += row * programs * PART
    near_ptr += (row * programs + g) * NEAR
    if TILES == 1:  # the only tile: its noise is drawn before the wait, and it stays in registers
        noise = hold(_noise(seed, sample, position, first_id, BLOCK))
    filled = open_bins()
    if ADVANCES:
        state = load_sequence(row, token_ptr, cursor_ptr, done_ptr, lengths_ptr, limit_ptr, stop_ptr, stops, STOPS)
    pdl_wait(PDL)

    if TILES == 1:
        logits = _load_tile(logits_ptr, first_id + tl.arange(0, BLOCK), V)
        tl.debug_barrier()  # ptxas else moves this load behind the maximum
    prefetch_share(ahead_ptr, ahead_bytes, row * programs + g, tl.num_programs(1) * programs, PDL)
    prefetch_share(then_ptr, then_bytes, row * programs + g, tl.num_programs(1) * programs, PDL)
    largest = _largest(max_ptr, row, P, P_BLOCK)
    draws = _draws(temperature, largest)
    cuts = draws & ((top_k > 0) | (top_p < 1))
    if PASSES != 2:
        if cuts:
            mass = tl.zeros([BLOCK], tl.int64)
            for start in tl.range(first_id, first_id + SPAN, BLOCK, num_stages=4):
                if TILES > 1:
                    logits = _load_tile(logits_ptr, start + tl.arange(0, BLOCK), V)
                u = _units(logits, largest)
                filled = add_to_bins(filled, _bin(u, temperature), u < LIMIT)
                mass += _mass(u, temperature)
            counts = read_bins(filled)
            tl.atomic_add(count_ptr + b, counts, mask=counts > 0, sem="relaxed")
            tl.atomic_add(whole_ptr, tl.sum(mass, 0), sem="relaxed")
    if PASSES == 0:
        arrived = _arrive(arrived_ptr) + 1
        while arrived < programs:
            arrived = tl.atomic_add(arrived_ptr, 0, sem="acquire")
    if PASSES != 1:
        k_bin, k_left, p_first, p_last, last, tokens = BINS, NEVER, BINS, BINS, BINS, NEVER
        whole = tl.full([], 0, tl.int64)
        if cuts:
            whole = tl.load(whole_ptr)
            k_bin, k_left, p_first, p_last, last, tokens = _find_cuts(tl.load(count_ptr + b), whole, top_k, top_p)
        few, left = False, SPAN
        if TILES > 1:
            few = tokens <= NEAR  # that the cuts may leave: the rest of the work is on a list of them
            left = tl.full([], SPAN, tl.int32)
            if few:
                near, end = open_list(filled, 1), _bin_start(last + 1)
                for start in tl.range(first_id, first_id + SPAN, BLOCK, num_stages=4):
                    ids = start + tl.arange(0, BLOCK)
                    u = _units(_load_tile(logits_ptr, ids, V), largest)
                    near = append(near_ptr, near, ids, (u < LIMIT) & (_distance(u, temperature) < end))
                left = read_length(near)

        within = _min_p_units(min_p, temperature)
        best, best_listed = tl.full([BLOCK], float("-inf"), tl.float32), tl.full([BLOCK], float("-inf"), tl.float32)
        best_id, listed_id, length = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32), open_list(filled, 0)
        k_mass, p_mass = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)  # before the cuts
        for start in tl.range(0, left, BLOCK):
            i = start + tl.arange(0, BLOCK)
            ids = first_id + i
            if TILES > 1:
                if few:
                    ids = tl.load(near_ptr + i, mask=i < left, other=V)
                logits = _load_tile(logits_ptr, ids, V)
            value, certain, maybe = logits, ids < V, ids < 0
            if draws:
                if TILES > 1:  # behind the load, whose time this takes
                    if few:
                        noise = gumbel_ids(seed, sample, position, ids)
                    else:
                        noise = _noise(seed, sample, position, first_id + start, BLOCK)
                value = logits / temperature + noise
                u = _units(logits, largest)
                if cuts:
                    bins = _bin(u, temperature)
                    listed = (u < LIMIT) & ((bins == k_bin) | ((bins >= p_first) & (bins <= p_last)))
                    length = append(list_ptr, length, ids, listed)
                    certain &= (u == 0) | ((bins < k_bin) & (bins < p_first))
                    maybe = listed & (bins <= p_last) & (u > 0)
                    if top_p < 1:
                        mass = _mass(u, temperature)
                        k_mass += tl.where(bins < k_bin, mass, 0)
                        p_mass += tl.where(bins < p_first, mass, 0)
                certain &= u <= within
                maybe &= u <= within
            value = tl.where(value == value, value, float("inf"))
            better = certain & ((value > best) | ((value == best) & (ids < best_id)))  # lists have no order
            best, best_id = tl.where(better, value, best), tl.where(better, ids, best_id)
            better = maybe & ((value > best_listed) | ((value == best_listed) & (ids < listed_id)))
            best_listed, listed_id = tl.where(better, value, best_listed), tl.where(better, ids, listed_id)

        mine = part_ptr + g * PART
        best_key, listed_key = _maxima(_key(best, best_id), _key(best_listed, listed_id))
        _prefetch_embedding(best_key, embedding_ptr, K, PDL)
        tl.store(mine, best_key)
        tl.store(mine + 1, listed_key)
        if top_p < 1:
            all_k_mass, all_p_mass = _sums(k_mass, p_mass, 0)
            tl.store(mine + 2, all_k_mass)
            tl.store(mine + 3, all_p_mass)
        tl.store(mine + 4, read_length(length).to(tl.int64))
        passes: tl.constexpr = 2 if PASSES == 0 else 1
        if _arrive(arrived_ptr) == passes * programs - 1:
            tl.store(arrived_ptr, 0)  # for the next launch
            tl.store(whole_ptr, tl.full([], 0, tl.int64))
            tl.store(count_ptr + b, tl.zeros([BINS], tl.int32))
            value, chosen = _resolve(
                logits_ptr, lists_ptr, part_ptr, programs, filled, embedding_ptr, K,
                largest, temperature, seed, sample, position, top_p, within, whole, k_bin, k_left, p_first, p_last,
                PROGRAMS, COLUMNS, SPAN, PDL,
            )  # fmt: skip
            if ADVANCES:
                advance_sequence(
                    row, value, chosen, state, token_ptr, ring_ptr, cursor_ptr, done_ptr, flag_ptr, lengths_ptr, embedding_ptr,
                    x_ptr, ring_size, K, K_BLOCK,
                )  # fmt: skip
            else:
                tl.store(value_ptr + row, value)
                tl.store(id_ptr + row, chosen)
        else:
            take_registers(filled)


# ---------------------------------------------------------------- operator


def launch_shape(rows: int, V: int, sms: int) -> tuple[int, int, int]:
    """(Ids a tile, tiles a program, programs a row): all programs together are at most `sms`, or one a row."""
    programs = max(1, sms // rows)
    block = next((b for b in (1024, 2048, 4096) if triton.cdiv(V, b) <= programs), 2048)
    tiles = triton.cdiv(triton.cdiv(V, block), programs)
    return block, tiles, triton.cdiv(V, tiles * block)


def _check(logits, maxima, temperature, seed, sample, lengths, top_k, top_p, min_p):
    M, B = logits.shape[0], lengths.numel()
    if logits.dim() != 2 or logits.dtype != torch.float32 or not logits.is_contiguous() or M < 1:
        raise ValueError(f"logits: found {logits.dtype} {list(logits.shape)}, expected float32 [at least 1, V], contiguous")
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


def _launch(logits, maxima, settings, candidate=(None, None), state=(None,) * 9, ahead=None, then=None):
    """The kernel, with the arguments of `choose` in `settings`; `state`: token, ring, cursor, done, flag, limit, stop_ids,
    embedding and x of `advance`."""
    (M, V), P, lengths = logits.shape, maxima.shape[1], settings[3]
    _token, ring, _cursor, _done, _flag, _limit, stop_ids, _embedding, x = state
    ring_size, stops, K = (1 if t is None else t.shape[1] for t in (ring, stop_ids, x))
    block, tiles, programs = launch_shape(M, V, num_sms(logits.device.index or 0))
    (_, ahead_bytes), (_, then_bytes) = plan_prefetch(ahead), plan_prefetch(then)
    lean = block * tiles <= LEAN_TOKENS
    capacity = max(64, triton.next_power_of_2(M))
    counts = zeroed_workspace(logits.device, f"counts of choose, {capacity} rows", capacity * BINS.value)
    whole = zeroed_workspace(logits.device, f"masses of choose, {capacity} rows", capacity, torch.int64)
    arrived = zeroed_workspace(logits.device, f"arrivals of choose, {capacity} rows", capacity)
    parts = logits.new_empty(M, programs, PART.value, dtype=torch.int64)
    lists, near = (logits.new_empty(size, dtype=torch.int32) for size in (M * V, M * programs * NEAR.value))
    for passes in (1, 2) if INTERPRET and programs > 1 else (0,):
        _choose_kernel[(programs, M)](
            logits, maxima, *settings, counts, whole, arrived, parts, lists, near, *candidate, *state, ahead, then,
            M // lengths.numel(), V, P, ring_size, stops, K, ahead_bytes, min(then_bytes, AHEAD_BYTES - ahead_bytes),
            P_BLOCK=triton.next_power_of_2(P), BLOCK=block, TILES=tiles, PROGRAMS=triton.next_power_of_2(programs),
            COLUMNS=max(1, (LEAN_TILE if lean else TILE) // triton.next_power_of_2(programs)),
            STOPS=triton.next_power_of_2(stops), K_BLOCK=min(4096, triton.next_power_of_2(K)), PASSES=passes,
            num_warps=WARPS, **({"maxnreg": LEAN_REGISTERS} if lean else {}), **launch_options(logits),
        )  # fmt: skip


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
    settings = (temperature, seed, sample, lengths, top_k, top_p, min_p)
    value, index = _check(logits, maxima, *settings)
    if runs_kernels(logits):
        _launch(logits, maxima, settings, (value, index))
    else:
        value[:, 0], index[:, 0] = choose_ref(logits, *settings)
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


def _check_both(logits, maxima, settings, state):
    token, ring, cursor, done, flag, limit, stop_ids, embedding, x = state
    candidate = _check(logits, maxima, *settings)
    check_advance(*candidate, token, ring, cursor, done, flag, settings[3], limit, stop_ids, embedding, x)


@torch.library.custom_op(
    "rooflama::choose_and_advance", mutates_args=("lengths", "token", "ring", "cursor", "done", "flag", "x")
)
def _choose_and_advance(
    logits: torch.Tensor,
    maxima: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    sample: torch.Tensor,
    lengths: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    token: torch.Tensor,
    ring: torch.Tensor,
    cursor: torch.Tensor,
    done: torch.Tensor,
    flag: torch.Tensor,
    limit: torch.Tensor,
    stop_ids: torch.Tensor,
    embedding: torch.Tensor,
    x: torch.Tensor,
    ahead: torch.Tensor | None,
    then: torch.Tensor | None,
) -> None:
    settings = (temperature, seed, sample, lengths, top_k, top_p, min_p)
    state = (token, ring, cursor, done, flag, limit, stop_ids, embedding, x)
    _check_both(logits, maxima, settings, state)
    if runs_kernels(logits):
        _launch(logits, maxima, settings, state=state, ahead=ahead, then=then)
    else:
        value, index = (t.unsqueeze(1) for t in choose_ref(logits, *settings))
        advance_ref(value, index, token, ring, cursor, done, flag, lengths, limit, stop_ids, embedding, x)


@_choose_and_advance.register_fake
def _(logits, maxima, *arguments):
    _check_both(logits, maxima, arguments[:7], arguments[7:16])


def choose_and_advance(
    logits: torch.Tensor,
    maxima: torch.Tensor,
    *,
    ahead: Weight | None = None,
    then: Weight | None = None,
    **arguments: torch.Tensor,
) -> None:
    """`choose`, and `advance` with its candidates, in one kernel, whose launch is saved: the last one of a step.

    One query token a sequence: logits [B, V]. `arguments`: all others of both, by name. `ahead` and `then` are the weights that
    the next step reads first and second. ValueError: a shape or dtype that does not fit.
    """
    ahead, then = None if ahead is None else ahead.weight, None if then is None else then.weight
    torch.ops.rooflama.choose_and_advance(logits, maxima, **arguments, ahead=ahead, then=then)
