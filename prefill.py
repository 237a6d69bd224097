"""Prefill: the tokens of prompts, packed into forwards, into the cache.

Owns how prompts are cut and packed, and how their forwards are launched (`Prefiller`). Knows neither text nor sampling nor when
a prompt should run: who calls decides what one call may cost.
Letters: P pieces of prompts, N rows of a pack, H hidden size.

A pack is one forward: the tokens of several prompts one after the other, without padding between them. Up to GRAPH_ROWS rows
launching it may take the host longer than running it takes the device; there it is padded to a bucket and replayed as a CUDA
graph.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import kernels
from kernels.flash_prefill import same_long_length
from kv_cache import KVCache
from model import PackStep, Transformer

CHUNK_ROWS = 8192  # of a forward: more would not make its products faster, and costs 86 KB a row (8B)
GRAPH_ROWS = 2048  # so many rows of the 1B are done sooner than a host launches their kernels, which takes it 13 to 29 ms
GRAPH_STEP = 256  # rows between two buckets, from 4 of it on; below, buckets are powers of two
GRAPH_PIECES = (1, 16, 64)  # buckets of P; attention launches programs for each


@dataclass(frozen=True)
class Piece:
    """New tokens of one sequence, ids or embeddings [n, H], from position `start` on; what is before it is in the slot."""

    slot: int  # of the cache
    tokens: Sequence[int] | torch.Tensor
    start: int = 0


def plan(counts: list[int], budget: int, alone: bool = False) -> list[list[tuple[int, int, int]]]:
    """Cuts pieces of so many tokens into packs of at most `budget` rows: (piece, begin, end) for each part of a pack, in order.

    Only a piece of more than `budget` tokens is cut; `alone`: a pack has parts of one piece only. Pure.
    """
    packs, room = [[]], budget
    for i, count in enumerate(counts):
        for begin in range(0, count, budget):
            end = min(begin + budget, count)
            if end - begin > room or (alone and packs[-1]):
                packs.append([])
                room = budget
            packs[-1].append((i, begin, end))
            room -= end - begin
    return packs


def upload(values, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Python numbers as a tensor on the device; the host does not wait for what runs there."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def download(tensor: torch.Tensor) -> torch.Tensor:
    """A copy for the host, which is not to be read before the device has come so far."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def graph_bucket(rows: int, pieces: int) -> tuple[int, int] | None:
    """(rows, pieces) of the smallest graph that takes so many; None where a pack runs without one. Pure."""
    if rows > GRAPH_ROWS or pieces > GRAPH_PIECES[-1]:
        return None
    padded = max(16, 1 << (rows - 1).bit_length()) if rows <= 4 * GRAPH_STEP else -(-rows // GRAPH_STEP) * GRAPH_STEP
    return padded, next(n for n in GRAPH_PIECES if n >= pieces)


def forward_pack(model: Transformer, cache: KVCache, x, slot, start, offsets, longest: int, fresh: bool):
    """Rows x [N, H] of a pack -> hidden states of its pieces' last tokens [P, H]; the rest as PackStep has it."""
    step = PackStep(cache, slot, start, offsets, num_rows=x.shape[0], longest=longest, fresh=fresh)
    return model(x, step, last_only=True)


class Prefiller:
    """Runs prompts into a cache; `path` says how.

    `graphs`: replay short packs as CUDA graphs, captured when first needed, with memory from `pool` (None: each its own).
    `compiled`: torch.compile the forward, once for all lengths, without kernels. `capture_sec`: what both took so far.
    `alone`: no two pieces share a forward, so that none changes another's result.
    """

    def __init__(
        self, model: Transformer, cache: KVCache, *, graphs=False, compiled=False, alone=False, rounds=False, pool=None
    ):
        self.model, self.cache, self.alone = model, cache, alone
        self.rounds = rounds  # x to fp8
        weight, head_dim = model.norm.weight, model.config.head_dim
        self.flash = kernels.flash_runs(weight.device, weight.dtype, head_dim)
        self.use_graphs = graphs and self.flash
        self.compiled = compiled and not kernels.runs_kernels(weight)
        self.forward: Callable = torch.compile(forward_pack, fullgraph=True, dynamic=True) if self.compiled else forward_pack
        self.graphs: dict[tuple[int, int, bool, int], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self.pool = pool
        self.compiled_for: set[bool] = set()  # values of `fresh` that torch.compile has seen
        self.capture_sec = 0.0
        self.side_stream = None  # of all warm-ups: what one frees, only its own stream can use again
        if self.use_graphs:
            self.make_buffers()

    def make_buffers(self) -> None:
        """What graphs read: the rows of a pack, and offsets, slots and starts of its pieces."""
        weight = self.model.norm.weight
        self.x = torch.zeros(GRAPH_ROWS, len(weight), dtype=weight.dtype, device=weight.device)
        self.index = torch.zeros(3, GRAPH_PIECES[-1] + 1, dtype=torch.int32, device=weight.device)

    @property
    def path(self) -> str:
        """How packs are run, for people."""
        attention = "/".join(sorted(kernels.attention_launched)) or "not yet run"
        launch = f"CUDA graphs up to {GRAPH_ROWS} rows" if self.use_graphs else "step by step"
        launch = "compiled by torch.compile" if self.compiled else launch
        rounds = ", x in fp8" if self.rounds else ""
        return f"packs of up to {CHUNK_ROWS} rows{rounds}, {launch}; attention kernels so far: {attention}"

    @torch.no_grad()
    def run(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Pieces of prompts, each in a slot of its own, into the cache -> the hidden state of each one's last token [P, H].

        Launches as many forwards as CHUNK_ROWS asks for, and returns before they have run. The cache's lengths and table are
        neither read nor written. ValueError: a piece without tokens, or beyond the cache.
        """
        for piece in pieces:
            end = piece.start + len(piece.tokens)
            if not piece.start < end <= self.cache.max_seq_len:
                found = f"rows {piece.start} to {end} of slot {piece.slot}"
                raise ValueError(f"prefill: found {found}, expected at least one, none beyond {self.cache.max_seq_len}")
        hidden = []
        for pack in plan([len(piece.tokens) for piece in pieces], CHUNK_ROWS, self.alone):
            parts = [Piece(pieces[i].slot, pieces[i].tokens[begin:end], pieces[i].start + begin) for i, begin, end in pack]
            with kernels.rounding_activations(self.rounds):
                out = self._run_pack(parts)
            whole = pack[-1][2] == len(pieces[pack[-1][0]].tokens)
            hidden.append(out if whole else out[:-1])  # only the last part can be of a piece that goes on
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden)

    def _run_pack(self, parts: list[Piece]) -> torch.Tensor:
        alike = [list(group) for _, group in itertools.groupby(parts, key=lambda part: part.start > 0)]
        if len(alike) > 1 and self.cache.k0.dtype.itemsize == 1:  # beside older rows, every piece would read its own rounded
            return torch.cat([self._run_pack(group) for group in alike])
        counts = [len(part.tokens) for part in parts]
        rows, fresh = sum(counts), not any(part.start for part in parts)
        bucket = graph_bucket(rows, len(parts)) if self.use_graphs else None
        P = bucket[1] if bucket else len(parts)
        offsets = [0, *itertools.accumulate(counts), *[rows] * (P - len(parts))]
        index = [offsets, [part.slot for part in parts], [part.start for part in parts]]
        index = upload([row + [0] * (P + 1 - len(row)) for row in index], torch.int32, self.cache.lengths.device)
        if not bucket:
            offsets, slot, start = index[0], *index[1:, :P]
            if self.compiled:  # torch.compile guards on where in its storage a view begins
                offsets, slot, start = (t.clone() for t in (offsets, slot, start))
            x = self._embed(parts)
            started = time.perf_counter()
            hidden = self.forward(self.model, self.cache, x, slot, start, offsets, max(counts), fresh)
            if self.compiled and fresh not in self.compiled_for:
                self.compiled_for.add(fresh)
                self.capture_sec += time.perf_counter() - started
            return hidden
        self.index[:, : P + 1].copy_(index)
        self.x[:rows].copy_(self._embed(parts))
        padded = rows < bucket[0] and same_long_length(*bucket, bucket[0])
        longest = bucket[0] - padded  # not cuDNN's then: it reads padding as it is, be it NaN
        graph, hidden = self._graph(*bucket, fresh, longest)
        graph.replay()
        return hidden[: len(parts)].clone()

    def _embed(self, parts: list[Piece]) -> torch.Tensor:
        """The rows of a pack [N, H]."""
        embedded = []
        for is_embedded, group in itertools.groupby(parts, key=lambda part: isinstance(part.tokens, torch.Tensor)):
            tokens = [part.tokens for part in group]
            if is_embedded:
                embedded += [rows.to(self.model.norm.weight) for rows in tokens]
            else:
                ids = list(itertools.chain.from_iterable(tokens))
                embedded.append(self.model.embed(upload(ids, torch.int32, self.cache.lengths.device)))
        return embedded[0] if len(embedded) == 1 else torch.cat(embedded)

    def _graph_arguments(self, rows: int, pieces: int, fresh: bool, longest: int) -> tuple:
        """Of `forward`: the buffers that such a graph reads."""
        offsets, slot, start = (row[: pieces + (i == 0)] for i, row in enumerate(self.index))
        return self.model, self.cache, self.x[:rows], slot, start, offsets, longest, fresh

    def _graph(self, rows: int, pieces: int, fresh: bool, longest: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """The graph of a pack of so many rows and pieces, which reads `x` and `index`, and its output [pieces, H]. fresh,
        longest: as PackStep has them."""
        key = (rows, pieces, fresh, longest)
        if key not in self.graphs:
            torch.cuda.synchronize()
            started = time.perf_counter()
            arguments = self._graph_arguments(*key)
            stream = self.side_stream = self.side_stream or torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # what happens once: kernels are loaded, cuBLAS finds its algorithms
                self.forward(*arguments)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                hidden = self.forward(*arguments)
            self.graphs[key] = graph, hidden
            torch.cuda.synchronize()
            self.capture_sec += time.perf_counter() - started
        return self.graphs[key]
