"""Benchmarks of single kernels against the libraries' own: checked first, then timed from CUDA graphs with cold inputs.

    python scripts/benchmark_kernels.py attention --output attention.jsonl --chart attention.png   # the 30 points of the README
    python scripts/benchmark_kernels.py attention --head_size 128 --batch_size 1 16 --seq_n 1024 4096
    python scripts/benchmark_kernels.py attention --sweep --seconds 120 --output sweep.jsonl      # which launches are best
    python scripts/benchmark_kernels.py attention --sweep --points 128x256x192 128x1x32768
    python scripts/benchmark_kernels.py attention --sweep --in_step llama-3.2-1b --context 96 512 2048 --seconds 60
    python scripts/benchmark_kernels.py linear --formats int8 fp8 int4 --rows 1 16        # see benchmark_linear.py
    ncu --profile-from-start off python scripts/benchmark_kernels.py attention --use_ncu --batch_size 1 --seq_n 4096
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python scripts/benchmark_kernels.py sanitize
    python scripts/benchmark_kernels.py choose --output choose.jsonl           # what top-k and top-p add to the greedy choice
    python scripts/benchmark_kernels.py choose --in_step llama-3.2-1b --batch_size 1       # and to a step of this model

Bandwidth of attention is that of K and V alone, in GB/s (1e9), and as a share of what reading 4 GiB with a plain sum reaches.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmark import stamp

from convert_hf_checkpoint import report_errors
from generate import DTYPES, add_flag
from kernels import advance, choose, choose_and_advance, flash_decode, pdl_disabled
from kernels._common import num_sms, wgmma_device
from kernels._flash_ring import HEAD_SIZES as RING_HEAD_SIZES
from kernels._flash_ring import FlashRing
from kernels.choose import choose_ref
from kernels.flash_decode import Launch, choose_launch, flash_decode_ref, override_launch

BATCH_AND_LENGTH = [
    *((1, S) for S in (256, 512, 1024, 2048, 4096, 8192, 16384, 65536, 131072)),
    *((16, S) for S in (1024, 4096, 16384)),
    *((64, S) for S in (256, 1024, 4096)),
]
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10}  # of the norm: two roundings, of the weights and of the result

# --------------------------------------------------------------------------------------------------------------------------
# Timing
# --------------------------------------------------------------------------------------------------------------------------


def time_graph(calls: list[Callable], seconds: float = 0.05) -> float:
    """Median us of one call, over replays of a graph of all `calls`: at least 20 replays in about `seconds`, or 5 where those
    would take ten times that."""
    calls[0]()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def replay() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / len(calls)

    replay()
    once = replay() * len(calls) * 1e-6
    repeats = max(20, int(seconds / once)) if 20 * once < 10 * seconds else 5
    return statistics.median(replay() for _ in range(repeats))


def read_gbps() -> float:
    """The bandwidth at which this card reads 4 GiB."""
    x = torch.randint(2**62, (2**29,), device="cuda")
    return x.numel() * 8 / time_graph([x.sum] * 2, 0.1) / 1e3


# --------------------------------------------------------------------------------------------------------------------------
# Attention: points and inputs
# --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One decode attention: `batch` sequences of `length` cached tokens, one query token each."""

    head_dim: int
    batch: int
    length: int
    num_heads: int
    num_kv_heads: int
    dtype: torch.dtype

    @property
    def kv_bytes(self) -> int:
        return 2 * self.batch * self.num_kv_heads * self.length * self.head_dim * self.dtype.itemsize

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def __str__(self):
        return f"d {self.head_dim:>3}  {self.batch:>2} x {self.length:<6}"


@dataclass
class Inputs:
    q: torch.Tensor  # [B, Hq, D]
    k: torch.Tensor  # [B, Hkv, S, D]
    v: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor


def make_inputs(point: Point, sets: int) -> list[Inputs]:
    """Random inputs; lengths and table, which a step's layers share, are the same in all sets."""
    p = point
    lengths = torch.full((p.batch,), p.length, dtype=torch.int32, device="cuda")
    table = torch.arange(p.batch, dtype=torch.int32, device="cuda")[:, None]
    randn = lambda *size: torch.randn(*size, dtype=p.dtype, device="cuda")
    kv = (p.batch, p.num_kv_heads, p.length, p.head_dim)
    return [Inputs(randn(p.batch, p.num_heads, p.head_dim), randn(*kv), randn(*kv), lengths, table) for _ in range(sets)]


def number_of_sets(point: Point, flush: bool) -> int:
    """Enough that a set has left the L2 cache before its turn comes again."""
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(512, math.ceil(4 * cache_bytes / point.kv_bytes))) if flush else 1


def calls_of(run: Callable, inputs: list[Inputs]) -> list[Callable]:
    """Calls of one graph: every set in turn, eight calls at least."""
    rounds = math.ceil(8 / len(inputs))
    return [functools.partial(run, x) for _ in range(rounds) for x in inputs]


# --------------------------------------------------------------------------------------------------------------------------
# Attention: kernels. Each takes Inputs -> [B, Hq, D]
# --------------------------------------------------------------------------------------------------------------------------


def ours(x: Inputs, scale: float):
    return flash_decode(x.q[:, None], x.k, x.v, x.lengths, x.table, scale=scale)[:, 0]


def torch_grouped(x: Inputs, scale: float, backend: SDPBackend):
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(x.q[:, :, None], x.k, x.v, scale=scale, enable_gqa=True)[:, :, 0]


def torch_packed(x: Inputs, scale: float, backend: SDPBackend):
    """The query heads of a group as query tokens: the same result, since a single token needs no causal mask."""
    B, Hkv, _, D = x.k.shape
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(x.q.view(B, Hkv, -1, D), x.k, x.v, scale=scale).reshape(x.q.shape)


def fa2_package(x: Inputs, scale: float):
    from flash_attn import flash_attn_with_kvcache

    k, v = x.k.transpose(1, 2), x.v.transpose(1, 2)
    return flash_attn_with_kvcache(x.q[:, None], k, v, cache_seqlens=x.lengths, softmax_scale=scale)[:, 0]


def flashinfer_single(x: Inputs, scale: float):
    from flashinfer import single_decode_with_kv_cache

    if len(x.q) > 1:
        raise NotImplementedError("one sequence")
    return single_decode_with_kv_cache(x.q[0], x.k[0], x.v[0], kv_layout="HND", sm_scale=scale)[None]


def rivals() -> dict[str, list[Callable]]:
    """By name, the ways to call each rival; the fastest that works counts."""
    found = {}
    for name, backend in (("FA2", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
        found[name] = [functools.partial(f, backend=backend) for f in (torch_grouped, torch_packed)]
    for name, package, function in (("flash-attn", "flash_attn", fa2_package), ("FlashInfer", "flashinfer", flashinfer_single)):
        with contextlib.suppress(ImportError):
            __import__(package)
            found[name] = [function]
    return found


def check(name: str, run: Callable, x: Inputs, point: Point, exact: torch.Tensor) -> None:
    error = ((run(x).double() - exact).norm() / exact.norm()).item()
    if not error <= TOLERANCE[point.dtype]:
        raise ValueError(f"{name} at {point}: found a relative error of {error:.2e}, expected {TOLERANCE[point.dtype]:.2e}")


def exact_result(x: Inputs, point: Point) -> torch.Tensor:
    """In float64, a sequence at a time: [B, Hq, D]."""
    rows = []
    for b in range(point.batch):
        q, k, v = (t[b : b + 1].double() for t in (x.q[:, None], x.k, x.v))
        rows.append(flash_decode_ref(q, k, v, x.lengths[b : b + 1], x.table[:1], scale=point.scale)[:, 0])
    return torch.cat(rows)


def kernels_of(point: Point, x: Inputs, exact: torch.Tensor) -> dict[str, list[Callable]]:
    """Every kernel that runs here, checked, ours first. A wrong one ends the run; a rival that refuses is left out."""
    found = {"ours": [functools.partial(ours, scale=point.scale)]}
    check("ours", found["ours"][0], x, point, exact)
    for name, ways in rivals().items():
        for way in ways:
            way = functools.partial(way, scale=point.scale)
            with contextlib.suppress(RuntimeError, NotImplementedError):  # a back end that refuses this shape
                check(name, way, x, point, exact)
                found.setdefault(name, []).append(way)
    return found


# --------------------------------------------------------------------------------------------------------------------------
# Attention: the comparison
# --------------------------------------------------------------------------------------------------------------------------


def compare(point: Point, args, bandwidth: float) -> dict:
    inputs = make_inputs(point, number_of_sets(point, not args.dont_flush_gpu_cache))
    with pdl_disabled():  # alone, a repeat of the kernel would otherwise begin inside the one before it
        found = kernels_of(point, inputs[0], exact_result(inputs[0], point))
        us = {name: min(time_graph(calls_of(way, inputs)) for way in ways) for name, ways in found.items()}
    gbps = {name: point.kv_bytes / t / 1e3 for name, t in us.items()}
    best = min((n for n in us if n != "ours"), key=us.get)
    speedup = us[best] / us["ours"]
    needed = 1.3 if point.batch == 1 and point.length <= 4096 else 0.99 if gbps[best] > 0.9 * bandwidth else 1.0
    return {
        "benchmark": "attention", "head_size": point.head_dim, "batch_size": point.batch, "seq_n": point.length,
        "q_num_heads": point.num_heads, "kv_num_heads": point.num_kv_heads, "dtype": str(point.dtype).removeprefix("torch."),
        "kv_bytes": point.kv_bytes, "us": us, "gbps": gbps, "read_gbps": bandwidth, "sets": len(inputs),
        "best_rival": best, "speedup": speedup, "meets_the_aim": speedup >= needed,
    }  # fmt: skip


def line_of(point: Point, r: dict) -> str:
    parts = [f"{point} {point.kv_bytes / 1e6:7.1f} MB"]
    for name, us in r["us"].items():
        parts.append(f"{name} {us:7.2f} us {r['gbps'][name]:5.0f} GB/s {r['gbps'][name] / r['read_gbps']:4.0%}")
    return " | ".join([*parts, f"{r['speedup']:.2f}x{'' if r['meets_the_aim'] else '  misses'}"])


def draw(results: list[dict], path: Path) -> None:
    """Bandwidth against length, a panel for each head size and batch size."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no chart: matplotlib is not installed", file=sys.stderr)
        return
    panels = sorted({(r["head_size"], r["batch_size"]) for r in results})
    rows, columns = len({d for d, _ in panels}), len({b for _, b in panels})
    figure, axes = plt.subplots(rows, columns, figsize=(4.5 * columns, 3.2 * rows), squeeze=False, layout="constrained")
    unused = list(axes.flat)
    for d, b in panels:
        here = sorted((r for r in results if (r["head_size"], r["batch_size"]) == (d, b)), key=lambda r: r["seq_n"])
        ax = unused.pop(0)
        for name in dict.fromkeys(n for r in here for n in r["gbps"]):
            points = [(r["seq_n"], r["gbps"][name] / 1e3) for r in here if name in r["gbps"]]
            ax.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        ax.axhline(here[0]["read_gbps"] / 1e3, color="grey", linestyle=":", linewidth=1)
        ax.set(xscale="log", xlabel="cached tokens", ylabel="TB/s of K and V", title=f"head size {d}, batch {b}", ylim=0)
        ax.set_xticks([r["seq_n"] for r in here], [f"{r['seq_n'] / 1024:g}k" for r in here], fontsize=7)
        ax.minorticks_off()
        ax.legend(fontsize=7)
    for ax in unused:
        ax.remove()
    figure.savefig(path, dpi=130)


def run_comparison(points: list[Point], args) -> None:
    bandwidth = read_gbps()
    print(f"{torch.cuda.get_device_name()}: reads {bandwidth:.0f} GB/s", flush=True)
    results, versions = [], stamp()
    for point in points:
        result = compare(point, args, bandwidth)
        results.append(result)
        print(line_of(point, result), flush=True)
        if args.output:
            with args.output.open("a") as file:
                file.write(json.dumps(result | versions) + "\n")
    met = sum(r["meets_the_aim"] for r in results)
    print(
        f"{met} of {len(results)} points meet the aim: faster than the best rival (within 1% where that reads at over 90% "
        "of the bandwidth), 1.3 times at batch 1 up to 4096 tokens"
    )
    if args.chart:
        draw(results, args.chart)


def run_for_ncu(points: list[Point]) -> None:
    """Each kernel once between the profiler's marks, after a run that compiles it and a sweep of the cache."""
    sweep = torch.empty(2**28, dtype=torch.int8, device="cuda")
    with pdl_disabled():
        for point in points:
            (x,) = make_inputs(point, 1)
            found = kernels_of(point, x, exact_result(x, point))
            for name, ways in found.items():
                print(f"{point}: {name}", flush=True)
                sweep.zero_()
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                ways[0](x)
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()


# --------------------------------------------------------------------------------------------------------------------------
# Attention: which launches are best
# --------------------------------------------------------------------------------------------------------------------------

SWEEP_POINTS = [
    *((D, B, S) for D in (64, 128) for B, S in BATCH_AND_LENGTH),
    *((128, 256, 192), (128, 64, 192), (128, 1, 32768), (64, 256, 192), (64, 16, 128), (128, 16, 128)),
]
COMPILED = ("chunk_rows", "block_rows", "row_groups", "warps", "stages", "max_registers")  # fields that need a compilation
# Of a ring (FlashRing): 8 KiB of K or V a block, stages, warps, programs, whether those are a cluster of one pair's; whether
# the next kernel starts late, and whether L1 is left to it (what a kernel was once asked to leave it leaves from then on).
FEW_RINGS = [
    *((2, 3, 4, programs, programs == 8, True, True) for programs in (8, 128)),
    *((2, stages, 4, programs, True) for programs, stages in ((8, 3), (8, 6), (16, 3), (4, 3), (4, 6), (2, 6))),
    *((2, stages, 4, programs, False) for stages, programs in ((6, 132), (3, 132), (3, 264))),
    (4, 3, 8, 132, False),
]
MANY_RINGS = [
    *((1, stages, 2, programs, False) for stages in (2, 3, 4) for programs in (1, 264)),
    *((2, stages, 4, programs, False) for stages, programs in ((2, 1), (3, 1), (6, 132), (3, 264))),
    (2, 3, 4, 2, True),
    (4, 3, 8, 132, False),
]
# Values of those, then the most programs a multiprocessor that rows are split over. What a program holds (its chunk in
# registers, 4 * (stages - 1) * block_rows * head size bytes in shared memory) decides how many run on a multiprocessor.
SHORT = [  # one sequence of less than 4096 rows: the way to the first byte and the merge
    *((64, 64, groups, 4, 2, None, 2) for groups in (1, 4)),
    *((128, 64, 1, warps, 2, None, 2) for warps in (4, 8)),
    (128, 64, 4, 4, 3, None, 2),
    (128, 128, 8, 8, 2, None, 2),
    *((64, 32, groups, 2, 2, None, 2) for groups in (1, 2)),
    (0, 64, 1, 4, 3, None, 2),
    (32, 32, 1, 2, 3, None, 4),
]
LONG = [  # one sequence: even shares, bytes in flight
    *((64, 64, 1, 4, stages, None, 2) for stages in (2, 3, 4)),
    *((64, 64, 4, 4, 3, registers, 2) for registers in (None, 168)),
    *((0, 64, 1, 4, stages, None, per_sm) for stages, per_sm in ((3, 3), (4, 2), (5, 1))),
    *((0, 64, 4, 4, 3, None, per_sm) for per_sm in (2, 3)),
    *((0, 32, 1, 4, stages, None, per_sm) for stages, per_sm in ((4, 4), (5, 3))),
    *((32, block, 1, 4, stages, None, 3) for block, stages in ((64, 3), (32, 4))),
    *((64, 128, 1, 8, stages, None, 1) for stages in (3, 4)),
    (0, 128, 1, 8, 3, None, 1),
]
MANY = [  # batches: programs on a multiprocessor
    *((64, 64, 1, 4, stages, None, 2) for stages in (2, 3)),
    (64, 64, 4, 4, 3, 128, 4),
    (32, 32, 1, 4, 3, 128, 4),
    *((0, 64, 1, 4, stages, None, per_sm) for stages, per_sm in ((2, 4), (3, 3), (3, 2), (4, 2))),
    *((0, 32, 1, 4, stages, None, per_sm) for stages, per_sm in ((3, 4), (4, 4), (4, 2), (5, 3))),
    *((0, 32, 1, 2, stages, None, 4) for stages in (3, 4)),
    *((0, block, 1, 1, stages, None, 4) for block, stages in ((32, 3), (16, 4))),
    (0, 64, 1, 2, 3, None, 4),
    (0, 64, 4, 4, 3, None, 3),
    *((0, block, 1, warps, stages, None, 1) for block, warps, stages in ((64, 4, 5), (128, 8, 3))),
]


def sweep_point(text: str) -> tuple[int, int, int]:
    """'128x16x1024' -> head size, batch, length."""
    try:
        D, B, S = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected head size x batch x length, such as 128x16x1024") from None
    return D, B, S


def candidates(point: Point, launch: Launch, capacity: int, sms: int) -> list[dict]:
    """The launches to try beside the present one, as changes of it: other shapes, then the present shape split otherwise."""
    pairs = point.batch * point.num_kv_heads

    def split(min_rows: int, per_sm: int) -> dict:
        programs = max(pairs, min(pairs * (capacity // min_rows), per_sm * sms))
        return {"min_rows": min_rows, "programs": programs, "items": programs}

    found = []
    for *shape, per_sm in MANY if point.batch > 1 else SHORT if capacity < 4096 else SHORT[:4] + LONG:
        fields = dict(zip(COMPILED, shape, strict=True))
        if launch.query_rows == 16 or fields["row_groups"] == 1:
            found.append(fields | split(max(launch.min_rows, fields["chunk_rows"]), per_sm))
    for min_rows, per_sm in ((launch.min_rows, 1), (launch.min_rows, 3), (2 * launch.min_rows, 2), (4 * launch.min_rows, 2)):
        found.append(split(min_rows, per_sm))
    same = lambda fields: all(getattr(launch, name) == value for name, value in fields.items())
    found = [fields for i, fields in enumerate(found) if fields not in found[:i] and not same(fields)]
    if not wgmma_device(0):
        return found
    rings = []
    if point.head_dim in RING_HEAD_SIZES and point.num_heads // point.num_kv_heads <= 16:
        for blocks, *fields in MANY_RINGS if point.batch > 4 else FEW_RINGS:
            rings.append({"ring": FlashRing(4096 * blocks // point.head_dim, *fields)})
    return [*rings, {"ring": None}, *found]


def launch_of(point: Point, capacity: int | None = None) -> Launch:
    return choose_launch(
        batch=point.batch,
        tokens=1,
        num_heads=point.num_heads,
        num_kv_heads=point.num_kv_heads,
        head_dim=point.head_dim,
        capacity=capacity or point.length,
        sms=num_sms(),
    )


def shape_of(fields: dict) -> dict:
    return {name: fields[name] for name in ("ring", *COMPILED) if name in fields}


def compile_shape(job: tuple[Point, dict, int, bool]) -> tuple | None:
    """In a process of its own: one run at a small length, for the compiled kernel in Triton's cache. What fails comes back."""
    point, shape, merged, pdl = job
    try:
        (x,) = make_inputs(replace(point, length=512), 1)
        more = {} if "ring" in shape else {"min_rows": 256, "merged": merged}
        with contextlib.nullcontext() if pdl else pdl_disabled(), override_launch(**shape, **more):
            ours(x, point.scale)
        torch.cuda.synchronize()
    except Exception as error:  # too much shared memory, say: a result, not a fault
        return job, f"{type(error).__name__}: {str(error)[:80]}"
    return None


def compile_launches(launches: dict[Point, list[dict]], merged: Callable, pdl: bool) -> dict[Point, list[dict]]:
    """The launches that run, by point; all are compiled at once, on every core."""
    started = time.perf_counter()
    # Of the length, a kernel knows only how many parts it merges at a time.
    job = lambda point, fields: (replace(point, length=0), shape_of(fields), merged(point), pdl)
    jobs = []
    for point, found in launches.items():
        jobs += [job(point, fields) for fields in [{}, *found] if job(point, fields) not in jobs]
    workers = max(1, (os.cpu_count() or 2) - 2)
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        failed = [f for f in pool.map(compile_shape, jobs, chunksize=2) if f]
    print(f"{len(jobs)} kernels compiled in {time.perf_counter() - started:.0f} s, {len(failed)} do not fit", flush=True)
    for error in sorted({error for _, error in failed})[:3]:
        print(f"    {error}", flush=True)
    unfit = [job for job, _ in failed]
    return {point: [f for f in found if job(point, f) not in unfit] for point, found in launches.items()}


def search(launches: list[dict], measure: Callable, deadline: float) -> list[tuple[float, dict]]:
    """(us, fields), best first. The present launch, {}, is measured before the others and after them."""
    results = []
    for fields in [{}, *launches, {}]:
        if not fields or time.perf_counter() < deadline:
            try:
                results.append((measure(fields), fields))
            except (RuntimeError, ValueError) as error:  # one wrong launch does not cost the others' measurements
                print(f"    {fields}: {error}", file=sys.stderr, flush=True)
    return sorted(results, key=lambda r: r[0])


def report(title: str, results: list[tuple[float, dict]], rivals: dict[str, float], output: Path | None, record: dict) -> None:
    present = next(us for us, fields in results if not fields)
    beside = "".join(f", {name} {us:.2f}" for name, us in rivals.items())
    print(f"{title}: present {present:.2f} us{beside}; best of {len(results) - 1}:", flush=True)
    for us, fields in results[:4]:
        print(f"    {us:.2f} us  " + " ".join(f"{k}={v}" for k, v in fields.items() if k != "items"), flush=True)
    if output:
        with output.open("a") as file:
            for us, fields in results:
                fields = fields | ({"ring": asdict(fields["ring"])} if fields.get("ring") else {})
                file.write(json.dumps(record | {"us": us, "launch": fields, "rivals_us": rivals}) + "\n")


def sweep_alone(points: list[Point], args) -> None:
    """The best launches of the kernel alone, without PDL: what the comparison times."""
    launches = {p: candidates(p, launch_of(p), p.length, num_sms()) for p in points}
    launches = compile_launches(launches, lambda p: launch_of(p).merged, pdl=False)
    started = time.perf_counter()
    for i, point in enumerate(points):
        inputs = make_inputs(point, number_of_sets(point, not args.dont_flush_gpu_cache))
        exact = exact_result(inputs[0], point)
        ways = kernels_of(point, inputs[0], exact)
        (run,) = ways.pop("ours")

        def measure(fields, point=point, inputs=inputs, run=run, exact=exact):
            with override_launch(**fields):
                check(f"ours, {fields}", run, inputs[0], point, exact)
                return time_graph(calls_of(run, inputs), 0.004)

        with pdl_disabled():
            others = {name: min(time_graph(calls_of(f, inputs), 0.004) for f in found) for name, found in ways.items()}
            found = search(launches[point], measure, started + args.seconds * (i + 1) / len(points))
        record = {"sweep": "alone", "head_size": point.head_dim, "batch_size": point.batch, "seq_n": point.length}
        report(str(point), found, others, args.output, record)


def sweep_in_step(args) -> None:
    """The best launches within a model's decode step, with PDL: where a kernel's loads overlap with its neighbours'."""
    from tune import StepTimer

    from model import SHAPES

    c = SHAPES[args.in_step]
    points = [
        Point(c.head_dim, B, S, c.num_heads, c.num_kv_heads, DTYPES["bfloat16"]) for B in args.batch_size for S in args.context
    ]
    capacity = lambda p: p.length + 512  # of StepTimer's cache
    launches = {p: candidates(p, launch_of(p, capacity(p)), capacity(p), num_sms()) for p in points}
    launches = compile_launches(launches, lambda p: launch_of(p, capacity(p)).merged, pdl=True)
    started = time.perf_counter()
    for i, point in enumerate(points):
        timer = StepTimer(args.in_step, None, point.batch, point.length)

        def measure(fields, timer=timer):
            with override_launch(**fields):
                return timer.us_per_step({})

        found = search(launches[point], measure, started + args.seconds * (i + 1) / len(points))
        record = {"sweep": args.in_step, "batch_size": point.batch, "context": point.length}
        report(f"{args.in_step} batch {point.batch} at {point.length} tokens", found, {}, args.output, record)
        del timer, measure
        torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------------------------------------
# The choice of a token: what its cuts add to a step's end
# --------------------------------------------------------------------------------------------------------------------------

CUTS = {"top-k 200": {"top_k": 200}, "top-p 0.9": {"top_p": 0.9}, "both": {"top_k": 200, "top_p": 0.9}}
LOGITS = {  # V -> one row's logits
    "flat": lambda V: 0.1 * torch.randn(V),  # random weights', narrowed
    "normal": torch.randn,
    "peaked": lambda V: (2 * torch.randn(V)).index_fill_(0, torch.tensor([V // 2]), 25.0),
    "zipf": lambda V: -1.1 * torch.log(1.0 + torch.randperm(V)) + 0.1 * torch.randn(V),  # natural text's
}
PEAKED_STD = 6.0  # of logits: then a few tokens have nearly all of the mass
CANDIDATES = 4096  # of a row, as the head gives them


def choice_arguments(kind: str, B: int, V: int, device: str) -> tuple[dict, dict]:
    """The arguments of `advance`, and those of `choose` without its cuts, on rows of such logits."""
    torch.manual_seed(0)
    logits = torch.stack([LOGITS[kind](V) for _ in range(B)])
    per_candidate = math.ceil(V / CANDIDATES)
    padded = torch.nn.functional.pad(logits, (0, CANDIDATES * per_candidate - V), value=-math.inf)
    best, index = padded.view(B, CANDIDATES, per_candidate).max(dim=-1)
    index += torch.arange(CANDIDATES) * per_candidate
    state = {name: torch.zeros(B, dtype=torch.int32) for name in ("token", "cursor", "done", "flag")}
    advanced = {
        "partial_max": best, "partial_id": index.int(), **state, "lengths": torch.full((B,), 9, dtype=torch.int32),
        "limit": torch.full((B,), 2**30, dtype=torch.int32), "ring": torch.zeros(B, 256, dtype=torch.int32),
        "stop_ids": torch.full((B, 16), -1, dtype=torch.int32),
        "embedding": torch.zeros(V, 2048, dtype=torch.bfloat16), "x": torch.zeros(B, 2048, dtype=torch.bfloat16),
    }  # fmt: skip
    advanced = {name: t.to(device) for name, t in advanced.items()}
    chosen = {
        "logits": logits.to(device), "maxima": advanced["partial_max"], "lengths": advanced["lengths"],
        "temperature": torch.full((B,), 0.8, device=device), "seed": torch.arange(B, device=device),
        "sample": torch.zeros(B, dtype=torch.int32, device=device),
    }  # fmt: skip
    return advanced, chosen


def cut_arguments(B: int, device: str, top_k: int = 0, top_p: float = 1.0) -> dict:
    return {
        "top_k": torch.full((B,), top_k, dtype=torch.int32, device=device),
        "top_p": torch.full((B,), top_p, device=device),
        "min_p": torch.zeros(B, device=device),
    }


def check_choice(name: str, chosen: dict, draws: int, device: str = "cuda") -> None:
    """At so many positions: the reference's tokens, or others whose values are equal to float32's rounding."""
    for position in range(1, draws + 1):
        arguments = chosen | {"lengths": torch.full_like(chosen["lengths"], position)}
        value, index = (t.to(arguments["logits"].device) for t in choose(**{key: t.to(device) for key, t in arguments.items()}))
        reference = {key: t for key, t in arguments.items() if key != "maxima"}
        want, want_index = choose_ref(**reference)
        wrong = (index[:, 0] != want_index) & ((value[:, 0] - want).abs() > 1e-4)
        if wrong.any():
            raise ValueError(
                f"choose, {name}, position {position}: {int(wrong.sum())} of {len(wrong)} tokens differ from choose_ref's"
            )


def choose_cost(args) -> None:
    """The end of a step, greedy and with cuts: us from graphs with PDL, in which every draw has a position of its own."""
    if args.in_step:
        return choose_in_step(args)
    versions = stamp()
    for B, kind in itertools.product(args.batch_size, LOGITS):
        advanced, chosen = choice_arguments(kind, B, args.vocab_size, "cuda")
        greedy = time_graph([functools.partial(advance, **advanced)] * 32)
        parts = [f"batch {B:>2}  {kind:<6} greedy {greedy:6.2f} us"]
        for name, cut in CUTS.items():
            arguments = chosen | cut_arguments(B, "cuda", **cut)
            check_choice(f"{kind}, {name}", arguments, 8 if B == 1 else 2)

            both = {name: t for name, t in advanced.items() if not name.startswith("partial_")} | arguments
            added = time_graph([functools.partial(choose_and_advance, **both)] * 32) - greedy
            check_choice(f"{kind}, {name}, after graphs", arguments, 1)  # each launch has left its workspaces empty
            parts.append(f"{name} +{added:6.2f} us")
            record = {
                "benchmark": "choose",
                "logits": kind,
                "batch_size": B,
                "cut": name,
                "greedy_us": greedy,
                "added_us": added,
            }
            if args.output:
                with args.output.open("a") as file:
                    file.write(json.dumps(record | {"vocab_size": args.vocab_size} | versions) + "\n")
        print(" | ".join(parts), flush=True)


def choose_in_step(args) -> None:
    """What cuts add to whole decode steps of a model, us: replays of graphs of greedy and of cut steps in turn, each added time
    the median of differences within a round. Logits: flat, as random weights give them, and peaked, of PEAKED_STD."""
    from tune import StepTimer

    versions = stamp()
    for B in args.batch_size:
        timer = StepTimer(args.in_step, None, B, 96)
        sampling, norm = timer.engine.session.sampling, timer.engine.model.norm.weight
        (greedy, logits), (cut, _) = timer.capture("greedy"), timer.capture("truncate")
        for kind in ("flat", "peaked"):
            if kind == "peaked":
                norm.data *= PEAKED_STD / logits.float().std()
            timer.time(greedy, 1)
            spread = logits.float().std().item()
            rounds, added = [], {name: [] for name in CUTS}
            for _ in range(args.rounds):
                sampling.temperature.zero_()
                rounds.append(timer.time(greedy, 3))
                for name, settings in CUTS.items():
                    sampling.temperature.fill_(0.8)
                    sampling.top_k.fill_(settings.get("top_k", 0))
                    sampling.top_p.fill_(settings.get("top_p", 1.0))
                    added[name].append(timer.time(cut, 3) - rounds[-1])
            us = {name: statistics.median(times) for name, times in added.items()}
            parts = [f"{args.in_step} batch {B:>2}  {kind:<6} (std {spread:.2f}) greedy {statistics.median(rounds):7.2f} us"]
            print(" | ".join([*parts, *(f"{name} +{t:5.2f} us" for name, t in us.items())]), flush=True)
            for name, t in us.items():
                record = {"benchmark": "choose", "in_step": args.in_step, "logits": kind, "logits_std": spread, "batch_size": B}
                record |= {"cut": name, "greedy_us": statistics.median(rounds), "added_us": t} | versions
                if args.output:
                    with args.output.open("a") as file:
                        file.write(json.dumps(record) + "\n")


# --------------------------------------------------------------------------------------------------------------------------
# For compute-sanitizer
# --------------------------------------------------------------------------------------------------------------------------


def sanitize(device: str = "cuda") -> None:
    """Small launches of attention and choice, without a graph: inputs and references on the CPU, so that little else runs.

    Every way through the kernels: one part and many, merges, pages, a window, lists. Twice each, for the same result.
    """
    torch.manual_seed(0)
    lengths = torch.tensor([700, 0, 1, 1100], dtype=torch.int32)
    cluster, last = FlashRing(64, 3, 4, programs=8, cluster=True), FlashRing(64, 3, 4, programs=37)
    for head_dim, tokens, page_size, options, ring in [
        (64, 1, 1152, {}, None), (64, 1, 128, {}, None), (128, 1, 1152, {}, None), (96, 2, 128, {}, None),
        (64, 1, 128, {"window": 130}, None), (128, 4, 1152, {"split_size": 128}, None), (64, 16, 1152, {}, None),
        (128, 1, 1152, {}, cluster), (64, 4, 1152, {"window": 130}, cluster), (128, 1, 1152, {}, last), (64, 4, 1152, {}, last),
    ]:  # fmt: skip
        pages = 1152 // page_size
        table = torch.randperm(4 * pages).view(4, pages).int()
        q = torch.randn(4, tokens, 8, head_dim).bfloat16()
        k, v = (torch.randn(4 * pages, 2, page_size, head_dim).bfloat16() for _ in range(2))
        tensors = [q, k, v, lengths, table]
        settings = {"scale": head_dim**-0.5, **options}
        with override_launch(ring=ring):
            results = [flash_decode(*(t.to(device) for t in tensors), **settings).cpu() for _ in range(2)]
        settings.pop("split_size", None)
        exact = flash_decode_ref(*(t.double() if t.is_floating_point() else t for t in tensors), **settings)
        name = f"flash_decode, head size {head_dim}, {tokens} tokens, pages of {page_size}, {options}, {ring}"
        error = ((results[0].double() - exact).norm() / exact.norm()).item()
        if not error <= TOLERANCE[torch.bfloat16] or not torch.equal(*results):
            raise ValueError(f"{name}: found a relative error of {error:.1e}, or two results that differ")
        print(f"{name}: {error:.1e}", flush=True)
    for B, kind, (cut_name, cut) in itertools.product((1, 5, 64), LOGITS, CUTS.items()):
        _, chosen = choice_arguments(kind, B, 9000, "cpu")
        name = f"choose, batch {B}, {kind}, {cut_name}"
        check_choice(name, chosen | cut_arguments(B, "cpu", **cut), 2, device)
        print(f"{name}: right", flush=True)


# --------------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------------


def attention(args) -> None:
    torch.manual_seed(0)
    if args.sweep and args.in_step:
        args.batch_size = args.batch_size or [1]
        return sweep_in_step(args)
    pairs = BATCH_AND_LENGTH
    if args.batch_size or args.seq_n:
        pairs = list(itertools.product(args.batch_size or [1], args.seq_n or sorted({S for _, S in BATCH_AND_LENGTH})))
    heads = (args.q_num_heads, args.kv_num_heads)
    sizes = [(D, B, S) for D in args.head_size for B, S in pairs]
    if args.points or (args.sweep and not (args.batch_size or args.seq_n)):
        sizes = args.points or SWEEP_POINTS
    points = [Point(*size, *heads, DTYPES[args.dtype]) for size in sizes]
    if args.use_ncu:
        run_for_ncu(points)
    elif args.sweep:
        sweep_alone(points, args)
    else:
        run_comparison(points, args)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("attention", help="flash_decode, one query token")
    p.set_defaults(run=attention)
    flag = lambda name, **options: add_flag(p, name, **options)
    flag("head_size", type=int, nargs="+", default=[64, 128])
    flag("q_num_heads", type=int, default=32)
    flag("kv_num_heads", type=int, default=8)
    flag("batch_size", type=int, nargs="+", help="without this and --seq_n: 15 pairs of the two")
    flag("seq_n", type=int, nargs="+", help="cached tokens of every sequence")
    flag("points", type=sweep_point, nargs="+", metavar="DxBxS", help="head size, batch, cached tokens, in place of the above")
    flag("dtype", choices=["bfloat16", "float16"], default="bfloat16")
    flag("dont_flush_gpu_cache", action="store_true", help="one input set, warm in the L2 cache")
    flag("use_ncu", action="store_true", help="run each kernel once, for ncu --profile-from-start off")
    flag("output", type=Path, help="append a JSON line for each point")
    flag("chart", type=Path, help="write a PNG of bandwidth against length")
    flag("sweep", action="store_true", help="try launches instead of comparing")
    flag("seconds", type=float, default=120, help="of measuring, for a whole sweep")
    flag("in_step", metavar="MODEL", help="with --sweep: within this model's decode step, such as llama-3.2-1b")
    flag("context", type=int, nargs="+", default=[96, 512, 2048], help="with --in_step: cached tokens")
    p = commands.add_parser("choose", help="top-k and top-p against the greedy choice")
    p.set_defaults(run=choose_cost)
    flag("batch_size", type=int, nargs="+", default=[1, 16, 64])
    flag("vocab_size", type=int, default=128256)
    flag("in_step", metavar="MODEL", help="within this model's decode step, such as llama-3.2-1b, in place of alone")
    flag("rounds", type=int, default=40, help="with --in_step: of measuring everything once")
    flag("output", type=Path, help="append a JSON line for each point")
    p = commands.add_parser("sanitize", help="small launches of every kind, checked: to run under compute-sanitizer")
    p.set_defaults(run=lambda args: sanitize())
    import benchmark_linear  # which takes its timing from here

    p = commands.add_parser("linear", help="one linear layer in every weight format, beside cuBLAS and torch's int4")
    benchmark_linear.add_flags(p)
    p.set_defaults(run=benchmark_linear.run)
    add_flag(p, "output", type=Path, help="append a JSON line for each point")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    if not torch.cuda.is_available() and not getattr(args, "check_only", False):
        print("benchmark_kernels.py: found no CUDA GPU, expected one", file=sys.stderr)
        return 2
    return report_errors(lambda: args.run(args), debug=False)


if __name__ == "__main__":
    sys.exit(main())
