"""The key/value cache: what earlier tokens left for later ones.

Owns per-layer K and V, the length of every sequence and the table that says where its rows are. Knows nothing of attention.
Letters: B sequences, S rows a sequence may have, Hkv key/value heads, D head size.

The static cache is the paged cache with one page a sequence: `table[b, 0]` is the slot of sequence b, so that a slot can change
hands without a row being moved. Rows at or past a sequence's length are never read.
"""

import copy

import torch
from torch import nn


class KVCache(nn.Module):
    """Buffers with fixed addresses: compiled graphs and captured CUDA graphs hold on to them.

    k, v: one tensor a layer, [slots, Hkv, S, D], S = max_seq_len + spare: a round of speculation may write `spare` rows past a
    sequence's end, which nobody reads. lengths [B] int32: rows of sequence b that are valid once the running step has
    appended its own; 0 = no sequence here. table [B, 1] int32: the slot of sequence b.
    """

    def __init__(self, config, batch_size: int, max_seq_len: int, device=None, dtype=None, spare: int = 0):
        super().__init__()
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
        """Bytes of K and V, all layers."""
        return self.bytes_per_row * self.batch_size * self.max_seq_len

    def twin(self) -> "KVCache":
        """The same K, V and table with lengths of its own: for a drafter, whose rows are then written again."""
        twin = copy.copy(self)
        twin._buffers = self._buffers | {"lengths": torch.zeros_like(self.lengths)}
        torch._dynamo.mark_static_address(twin.lengths)
        return twin

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, [slots, Hkv, S, D] each."""
        return getattr(self, f"k{index}"), getattr(self, f"v{index}")


def append(cache: torch.Tensor, rows: torch.Tensor, slot: int, start: int) -> None:
    """Writes rows [n, Hkv, D] of one sequence into its slot of a layer's K or V, from position `start` on."""
    cache[slot].narrow(1, start, rows.shape[0]).copy_(rows.transpose(0, 1))


def bytes_per_row(config, dtype=None) -> int:
    """Bytes of K and V, all layers, that one cached token takes."""
    return 2 * config.num_layers * config.kv_size * (dtype or config.dtype).itemsize
