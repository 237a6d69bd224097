"""What a projection onto the vocabulary ends with, whichever kernel multiplies: logits stored, and each program's candidates.

Owns the end of `head`'s kernels (head.py, and _packed_ring.py in Gluon). Knows neither their loops nor their launch.
Letters: B sequences, T query tokens a sequence, M = B * T rows of x, MP padded M; N rows of the head's weight, R of a tile.

Nothing here makes a tensor of its own, for in Gluon each has a layout: rows, slots and m are the caller's.
"""

import triton
import triton.language as tl

PARTIALS = 4096  # candidates a row, whatever the tile: a program that has no candidate left to give fills up with -inf


@triton.jit
def load_draws(temperature_ptr, seed_ptr, sample_ptr, lengths_ptr, m, M, T):
    """Of each row of x, whose sequence has it: temperature, and what its draws depend on, (seed, sample, position)."""
    sequence = m // T
    real = m < M
    temperature = tl.load(temperature_ptr + sequence, mask=real, other=0.0)
    seed = tl.load(seed_ptr + sequence, mask=real, other=0)
    sample = tl.load(sample_ptr + sequence, mask=real, other=0)
    position = tl.load(lengths_ptr + sequence, mask=real, other=0) - T + m % T + 1
    return temperature, seed, sample, position


@triton.jit
def with_noise(logits, temperature, sampled, noise):
    """Logits [R, MP] / temperature [MP] + noise, whose largest is a draw, where `sampled`: the temperature is above 0."""
    return tl.where(sampled[None, :], logits / tl.where(sampled, temperature, 1.0)[None, :] + noise, logits)


@triton.jit
def store_logits(logits, logits_ptr, rows, m, M, N, vocab_size):
    """Stores one tile; returns it with -inf where there is no token."""
    logits = tl.where((rows < vocab_size)[:, None], logits, float("-inf"))
    address = logits_ptr + m.to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(address, logits, mask=(rows < N)[:, None] & (m < M)[None, :])
    return logits


@triton.jit
def store_candidates(best, best_id, max_ptr, id_ptr, m, M, slots, PARTIALS: tl.constexpr):
    """This program's candidate, and -inf in each num_programs-th slot after it, so that all PARTIALS are written.

    slots: 0, 1, ... to at least PARTIALS / num_programs.
    """
    slot = tl.program_id(0) + slots[:, None] * tl.num_programs(0)
    mine = slot == tl.program_id(0)
    mask = (slot < PARTIALS) & (m < M)[None, :]
    offset = m[None, :] * PARTIALS + slot
    tl.store(max_ptr + offset, tl.where(mine, best[None, :], float("-inf")), mask=mask)
    tl.store(id_ptr + offset, tl.where(mine, best_id[None, :], 0), mask=mask)
