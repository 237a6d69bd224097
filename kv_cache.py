"""The key/value cache: what earlier tokens left for later ones.

Owns per-layer K and V, the length of every sequence and the table that says where its rows are. Computes nothing.
Letters: B sequences, S rows a sequence may have, Hkv key/value heads, D head size.

The static cache is the paged cache with one page a sequence: `table[b, 0]` is the slot of sequence b, so that a slot can change
hands without a row being moved. Rows at or past a sequence's length are never read.

Rows are kept in the model's dtype, or in fp8: e4m3 without a scale, half the bytes of bf16. Three bits of mantissa err by up to
6% of a value, below 2**-6 by up to 2**-10; what exceeds 448 saturates. Whoever reads a row widens it.
"""

import copy

import torch
from torch import nn

CACHE_DTYPES = {"auto": None, "fp8": torch.float8_e4m3fn}  # by the names of `--kv_cache_dtype`; None: the model's


class KVCache(nn.Module):
    """Buffers with fixed addresses: compiled graphs and captured CUDA graphs hold on to them.

    k, v: one tensor a layer, [slots, Hkv, S, D]. lengths [B] int32: rows of sequence b that are valid once the running step has
    appended its own; 0 = no sequence here. table [B, 1] int32: the slot of sequence b. split_size: rows that attention takes
    at a time, where a sequence's result must not depend on the others. spare: rows beyond max_seq_len, which a round of
    speculation may write and nobody reads.
    """

    def __init__(
        self, config, batch_size: int, max_seq_len: int, device=None, dtype=None, split_size: int | None = None, spare: int = 0
    ):
        super().__init__()
        self.split_size = split_size
        if not 1 <= max_seq_len <= config.max_position_embeddings:
            raise ValueError(f"max_seq_len: found {max_seq_len}, expected 1 to the model's {config.max_position_embeddings}")
        if batch_size < 1:
            raise ValueError(f"batch_size: found {batch_size}, expected at least 1")
        dtype = dtype or config.dtype
        self.batch_size, self.max_seq_len = batch_size, max_seq_len
        self.bytes_per_row = bytes_per_row(config, dtype)
        shape = (batch_size, config.num_kv_heads, max_seq_len + spare, config.head_dim)
        for layer in range(config.num_layers):
            self.register_buffer(f"k{layer}", torch.zeros(shape, dtype=dtype, device=device))
            self.register_buffer(f"v{layer}", torch.zeros(shape, dtype=dtype, device=device))
        self.register_buffer("lengths", torch.zeros(batch_size, dtype=torch.int32, device=device))
        self.register_buffer("table", torch.arange(batch_size, dtype=torch.int32, device=device)[:, None].clone())
        for buffer in self.buffers():
            torch._dynamo.mark_static_address(buffer)  # else Inductor skips CUDA graphs for what mutates them

    @property
    def num_bytes(self) -> int:
        """Bytes of K and V, all layers, spare rows too."""
        return self.bytes_per_row * self.batch_size * self.k0.shape[2]

    def twin(self) -> "KVCache":
        """The same K and V with lengths and a table of its own: for a drafter, whose rows are then written again."""
        twin = copy.copy(self)
        twin._buffers = self._buffers | {name: self._buffers[name].clone() for name in ("lengths", "table")}
        return twin

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, [slots, Hkv, S, D] each."""
        return getattr(self, f"k{index}"), getattr(self, f"v{index}")


def as_rows(cache: torch.Tensor) -> torch.Tensor:
    """A layer's K or V [slots, Hkv, S, D] as a strided view [rows, Hkv, D]: slot s has rows s * Hkv * S .. s * Hkv * S + S.

    A token's heads stand S rows apart, and rows between two slots' are those of other heads.
    """
    slots, heads, rows, size = cache.shape
    return cache.as_strided((((slots - 1) * heads + 1) * rows, heads, size), (size, rows * size, 1))


def bytes_per_row(config, dtype=None) -> int:
    """Bytes of K and V, all layers, that one cached token takes."""
    return 2 * config.num_layers * config.kv_size * (dtype or config.dtype).itemsize
