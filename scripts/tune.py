"""Measures tiles for this GPU: each small-batch linear of a model, inside the model's own decode step.

    python scripts/tune.py llama-3.2-1b llama-3.1-8b --batch_size 1 --seconds 60
    python scripts/tune.py llama-3.1-8b --quantize int4

A kernel alone prefers other tiles than a chain of kernels that load their weights beside each other, so every candidate is
timed as part of whole steps, replayed from a CUDA graph; one operator changes at a time, and a better tile is kept at once.
Prints the entries to put into kernels/tiles.py (MEASURED; beyond 16 rows, where they beat cuBLAS, KERNEL_ROWS too), and writes
every measurement to --output as JSON lines.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import kernels
from decoding import decode_one_token
from generate import Engine, add_flag
from kernels._common import has_wgmma
from kernels.formats import Weight
from kernels.tiles import PLAIN_ROWS, Tile, candidate_tiles, fold_block, measured_rows, override_tiles, tile_for
from model import SHAPES
from quantize import MODES, make_recipe
from timing import floor_ms

MIN_GAIN = 0.999  # of the time before: less is noise
STEPS, REPLAYS = 4, 7  # steps of a graph; pairs of its replays, of which the median counts


def operators(config) -> list[tuple[str, int, int]]:
    """(op, N, K) of each linear of a decode step, those with the most weights first."""
    c = config
    ops = [
        ("qkv", c.q_size + 2 * c.kv_size, c.hidden_size),
        ("linear", c.hidden_size, c.q_size),
        ("silu_mul", 2 * c.intermediate_size, c.hidden_size),
        ("linear", c.hidden_size, c.intermediate_size),
        ("head", c.vocab_size, c.hidden_size),
    ]
    return sorted(ops, key=lambda o: -o[1] * o[2])


def quantized_config(shape: str, mode: str | None):
    """The configuration that a model of this shape has under a mode of quantize.py."""
    return make_recipe(mode, SHAPES[shape]).config(SHAPES[shape]) if mode else SHAPES[shape]


def packed_of(config, op: str):
    """The packed format of an operator's weight, or None."""
    return config.head_format if op == "head" else config.layer_format


def compile_tile(job) -> tuple | None:
    """In a process of its own: runs one operator with one tile, for the compiled kernels in Triton's cache: as it is where a
    norm is folded, too, where that may be."""
    shape, mode, rows, op, N, K, tile = job
    c = quantized_config(shape, mode)
    make = lambda *size, dtype=torch.bfloat16: torch.zeros(*size, dtype=dtype, device="cuda")
    x, norm = make(rows, K), make(K)
    weight = Weight(N, K, bias=op == "qkv" and c.qkv_bias, device="cuda", packed=packed_of(c, op))
    for tensor in weight.buffers():
        tensor.zero_()
    weight.tile()
    lengths = make(rows, dtype=torch.int32)
    norms, permuted = [norm], tile.ring and weight.packed is not None
    if kernels.folds_norm(c.layer_format, weight.packed):
        squares = make(rows, -(-K // fold_block(rows, c.layer_format, permuted)), dtype=torch.float32)
        norms.append(kernels.FoldedNorm(x, squares, permuted))
    if permuted:
        norms = norms[1:]  # no ring of packed weights does a norm itself
    try:
        with override_tiles({(op, N, K): tile}):
            for norm in norms:
                run_operator(op, c, x, weight, norm, lengths)
        torch.cuda.synchronize()
    except Exception as error:  # a tile that does not fit the card is a result, not a fault
        return (op, N, K, tile, f"{type(error).__name__}: {str(error)[:80]}")
    return None


def run_operator(op: str, c, x, weight: Weight, norm, lengths) -> None:
    """One linear of a decode step on rows x [M, K]; norm: its gain, or a FoldedNorm, which says whether x's columns are
    permuted; then so is what the next linear reads."""
    rows, N, make = len(x), weight.out_features, functools.partial(torch.zeros, device=x.device)
    permuted = isinstance(norm, kernels.FoldedNorm) and norm.permuted
    if op == "qkv":
        cache = make(rows, c.num_kv_heads, 64, c.head_dim, dtype=x.dtype)
        rope = make(64, c.head_dim // 2)
        qk = make(c.head_dim, dtype=x.dtype) if c.qk_norm else None
        kernels.qkv_rope_append(
            x, weight, norm=norm, eps=1e-5, q_norm=qk, k_norm=qk, qk_eps=1e-5, cos=rope, sin=rope, lengths=lengths,
            table=make(rows, 1, dtype=torch.int32), k_cache=cache, v_cache=cache.clone(),
            page_size=64, num_heads=c.num_heads, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim,
        )  # fmt: skip
    elif op == "head":
        kernels.head(x, weight, norm=norm, eps=1e-5, vocab_size=N, lengths=lengths)  # greedy, as the steps are that count
    elif op == "silu_mul":
        kernels.linear(x, weight, norm=norm, eps=1e-5, activation="silu_mul", y_permuted=permuted)
    elif isinstance(norm, kernels.FoldedNorm):
        order = {"x_permuted": permuted, "y_permuted": permuted}
        kernels.linear_folding(x, weight, residual=make(rows, N, dtype=x.dtype), gain=make(N, dtype=x.dtype), **order)
    else:
        kernels.linear(x, weight, residual=make(rows, N, dtype=x.dtype))


class StepTimer:
    """Times whole decode steps of a model under overridden tiles."""

    def __init__(self, shape: str, mode: str | None, batch_size: int, context: int):
        self.engine = Engine.random(shape, "cuda", mode=mode, max_seq_len=context + 512)
        self.engine.prepare(batch_size, context + 512)
        self.context = context
        ids = torch.randint(self.engine.model.vocab_limit, (batch_size,), generator=torch.Generator().manual_seed(0))
        self.x = self.engine.model.embed(ids.to("cuda"))  # a token of its own in each row: alike rows draw less power

    def rewind(self) -> None:
        session = self.engine.session
        session.cache.lengths.fill_(self.context)
        session.x.copy_(self.x)
        session.done.zero_()
        session.limit.fill_(session.max_seq_len - 1)

    def capture(self, kind: str = "greedy") -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """A graph of STEPS steps, and where its last one leaves the logits. `kind`: as for decode_one_token."""
        self.rewind()
        decode_one_token(self.engine.model, self.engine.session, kind)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(STEPS):
                logits = decode_one_token(self.engine.model, self.engine.session, kind)
        return graph, logits

    def us_per_step(self, tiles: dict) -> float:
        with override_tiles(tiles):
            graph, _ = self.capture()
        return self.time(graph)

    def time(self, graph: torch.cuda.CUDAGraph, replays: int = REPLAYS) -> float:
        """Median us of a step."""
        times = []
        self.rewind()
        graph.replay()
        for _ in range(replays):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            graph.replay()
            end.record()
            times.append((start, end))
        end.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in times) * 1e3 / (2 * STEPS)


def neighbours(tile: Tile, op: str) -> list[Tile]:
    """Moves that change how a tile's loads overlap with other kernels, not its shape."""
    if tile.ring:
        return []
    change = lambda **fields: dataclasses.replace(tile, **fields)
    moves = [change(stream=not tile.stream)]
    moves += [change(registers=r) for r in (None, 64, 96, 128, 168)]
    return [m for m in dict.fromkeys(moves) if m != tile]


def tune(shape: str, args, pool) -> None:
    config, rows, mode = quantized_config(shape, args.quantize), args.batch_size, args.quantize
    name = f"{shape} {mode or 'bf16'} batch {rows}"
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    rng = random.Random(args.seed)
    timer = StepTimer(shape, mode, rows, args.context)
    ops = operators(config)
    formats = {key: packed.format if (packed := packed_of(config, key[0])) else "bf16" for key in ops}
    rings = has_wgmma(timer.engine.session.cache.lengths)
    best = {key: tile_for(key[0], formats[key], rows, *key[1:], sms, rings) for key in ops}
    best_us = timer.us_per_step(best)
    floor = floor_ms(timer.engine, rows, args.context, 4.44e12) * 1e3
    print(f"{name}: {best_us:.1f} us a step with the present tiles; bytes at 4.44 TB/s: {floor:.1f}", flush=True)
    if rows > PLAIN_ROWS and "bf16" in formats.values():
        print(f"{name}: {timer.us_per_step({}):.1f} us with cuBLAS where kernels.tiles.KERNEL_ROWS has it", flush=True)
    failed: dict[tuple, str] = {}

    def try_all(jobs: list[tuple], seconds: float) -> None:
        nonlocal best_us
        faults = pool.map(compile_tile, [(shape, mode, rows, *key, tile) for key, tile in jobs])
        failed.update({fault[:4]: fault[4] for fault in faults if fault})  # all done: nothing else uses the GPU from here on
        deadline = time.perf_counter() + seconds
        for key, tile in jobs:
            if time.perf_counter() > deadline or (*key, tile) in failed:
                continue
            try:
                us = timer.us_per_step({**best, key: tile})
            except Exception as error:
                failed[(*key, tile)] = str(error)
                continue
            if args.output:
                record = {"model": shape, "format": formats[key], "rows": rows, "op": key[0], "N": key[1], "K": key[2]}
                record |= {"tile": repr(tile), "us": us}
                with args.output.open("a") as file:
                    file.write(json.dumps(record) + "\n")
            if us < best_us * MIN_GAIN and us < timer.us_per_step(best) * MIN_GAIN:  # still better, right after it
                best_us, best[key] = us, tile
                print(f"  {us:8.1f} us  {key[0]} {key[1]} x {key[2]}: {tile}", flush=True)

    for _ in range(args.rounds):
        jobs = []
        for key in best:  # shapes
            tiles = candidate_tiles(key[0], rows, *key[1:], formats[key])
            keep = {k: getattr(best[key], k) for k in ("stream", "registers")}
            tiles = [t if t.ring else dataclasses.replace(t, **keep) for t in tiles if rings or not t.ring]
            rng.shuffle(tiles)
            tiles.sort(key=lambda t: t.warps > 2 and not t.dot)  # small programs won most often
            jobs += [(i, key, t) for i, t in enumerate(tiles[: args.candidates])]
        jobs.sort(key=lambda job: job[0])  # the operators in turn, should the time not do for all
        try_all([job[1:] for job in jobs], 0.7 * args.seconds / args.rounds)
        try_all([(key, t) for key in best for t in neighbours(best[key], key[0])], 0.3 * args.seconds / args.rounds)  # overlaps
    print(
        f"{name}: {best_us:.1f} us a step, {floor / best_us:.1%} of 4.44 TB/s; {len(failed)} tiles failed",
        flush=True,
    )
    for error in sorted(set(failed.values()))[:3]:
        print(f"    {error}", flush=True)
    for (op, N, K), tile in best.items():
        changed = [f"{f.name}={v!r}" for f in dataclasses.fields(tile) if (v := getattr(tile, f.name)) != f.default]
        key = f'{sms}, "{formats[op, N, K]}", {measured_rows(rows)[0]}, "{op}", {N}, {K}'
        print(f"    ({key}): Tile({', '.join(changed)}),", flush=True)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shapes", nargs="+", choices=SHAPES)
    add_flag(parser, "quantize", choices=MODES, help="tune the model quantised so")
    add_flag(parser, "batch_size", type=int, default=1)
    add_flag(parser, "context", type=int, default=96, help="cached tokens a sequence")
    add_flag(parser, "seconds", type=float, default=60, help="of measuring, for each shape")
    add_flag(parser, "candidates", type=int, default=48, help="tiles tried for each operator")
    add_flag(parser, "rounds", type=int, default=2)
    add_flag(parser, "seed", type=int, default=0)
    add_flag(parser, "output", type=Path)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: found no CUDA GPU, expected one\n")
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 2), mp_context=context) as pool:
        for shape in args.shapes:
            tune(shape, args, pool)
    return 0


if __name__ == "__main__":
    sys.exit(main())
