"""Random draws that depend on their key alone: Philox-4x32-10 (Salmon et al. 2011), turned into Gumbel noise.

Owns the generator, on the device and as its reference. Knows neither logits nor sequences.
Letters: M rows of logits, V vocabulary; R ids of a tile, MP padded M.

Adding to each logit / temperature a Gumbel draw and taking the largest draws from the softmax exactly (Gumbel 1954; Maddison et
al. 2014, "A* sampling"). The draw of token `id` is lane id % 4 of the Philox block with the key `seed` and the counter
(id // 4, position, sample, 0), where position is the one that the chosen token will have: never slot, batch or step.
"""

import torch
import triton
import triton.language as tl

# ---------------------------------------------------------------- reference


def philox_ref(key: torch.Tensor, counter: list[torch.Tensor]) -> list[torch.Tensor]:
    """Four words of 32 random bits, as int64. `key` int64, `counter` four of 32 bits."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = (c.long() & mask for c in counter)
    k0, k1 = key & mask, (key >> 32) & mask
    for _ in range(10):
        product0, product2 = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # 64 bits: the sign bit is one of them
        c0, c1 = ((product2 >> 32) & mask) ^ c1 ^ k0, product2 & mask
        c2, c3 = ((product0 >> 32) & mask) ^ c3 ^ k1, product0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return [c0, c1, c2, c3]


def gumbel_ref(seed, sample, position, V: int) -> torch.Tensor:
    """The Gumbel draws [M, V] float32 for seed, sample and position [M]."""
    quad = torch.arange((V + 3) // 4, device=seed.device)[None, :]
    counter = torch.broadcast_tensors(quad, position[:, None], sample[:, None], torch.zeros_like(quad))
    bits = torch.stack(philox_ref(seed[:, None].long(), counter), dim=-1).flatten(1)[:, :V]
    uniform = ((bits.double() + 0.5) * 2.0**-32).float()
    return -torch.log(-torch.log1p(-uniform))


def token_positions(lengths: torch.Tensor, M: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequence of each of M rows, and the position that the token chosen by it will have."""
    T = M // lengths.numel()
    row = torch.arange(M, device=lengths.device)
    return row // T, lengths[row // T] - T + row % T + 1


# ---------------------------------------------------------------- on the device


@triton.jit
def _to_gumbel(bits):
    uniform = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32; in (0, 1]
    # -log(1 - u), whose series keeps the small ones exact: they are the large draws, which decide
    series = uniform * (1.0 + uniform * (0.5 + uniform * (1.0 / 3 + uniform * 0.25)))
    return -tl.log(tl.where(uniform < 0.01, series, -tl.log(1.0 - uniform)))


@triton.jit
def gumbel_quads(seed, sample, position, quads, zero):
    """The Gumbel draws [R, MP] of the ids 4 * q to 4 * q + 3 of each of `quads` [R / 4], for the keys [MP] of each row.

    zero: uint32 [R / 4, MP], for in Gluon a tensor is made with a layout. A quad's draws are made where its q is.
    """
    quad = zero + quads.to(tl.uint32)[:, None]
    c1, c2 = zero + position.to(tl.uint32)[None, :], zero + sample.to(tl.uint32)[None, :]
    a, b, c, d = tl.philox(seed[None, :], quad, c1, c2, zero)
    return _to_gumbel(tl.join(tl.join(a, c), tl.join(b, d)).permute(0, 2, 3, 1).reshape([4 * zero.shape[0], zero.shape[1]]))


@triton.jit
def gumbel_tile(seed, sample, position, first_id, R: tl.constexpr, MP: tl.constexpr):
    """The Gumbel draws [R, MP] of ids first_id to first_id + R, both multiples of 4, for the keys [MP] of each row."""
    zero = tl.zeros([R // 4, MP], tl.uint32)
    return gumbel_quads(seed, sample, position, first_id // 4 + tl.arange(0, R // 4), zero)


@triton.jit
def gumbel_ids(seed, sample, position, ids):
    """The Gumbel draws of any ids, for one key."""
    quad = (ids // 4).to(tl.uint32)
    zero = quad * 0
    a, b, c, d = tl.philox(seed, quad, zero + position.to(tl.uint32), zero + sample.to(tl.uint32), zero)
    lane = ids % 4
    return _to_gumbel(tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d)))
