"""End-to-end benchmarks through the same path that generate.py's user takes.

    python scripts/benchmark.py decode --random_weights llama-3.2-1b --explain

Greedy, EOS ignored, the prompt synthetic. The roofline comes first: the time that the step's bytes take at the card's measured
read bandwidth. The last line of standard output is one JSON object.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import generate
from generate import BANDWIDTH, DTYPES, STEPS_PER_GRAPH, Engine, add_flag, default_device, floor_ms, metrics
from kv_cache import CACHE_DTYPES
from sampling import SamplingParams


def output_of(*command: str) -> str | None:
    """What a command prints; None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def stamp() -> dict:
    """The machine and versions that a stored result carries. A commit with a `+` had uncommitted changes."""
    import triton

    commit = output_of("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") or os.environ.get("ROOFLAMA_COMMIT")
    if commit and output_of("git", "-C", str(ROOT), "status", "--porcelain"):
        commit += "+"
    out = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(), "commit": commit}
    if torch.cuda.is_available():
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        out |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "driver": driver}
    return out


def random_prompts(engine: Engine, batch_size: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    high = min(1024, engine.model.vocab_limit)
    return torch.randint(0, high, (batch_size, length), generator=generator).tolist()


def decode(args: argparse.Namespace) -> dict:
    """ms a step, percentiles and MBU of one model, batch size and length."""
    options = {"decode_mode": args.decode_mode, "max_seq_len": args.max_seq_len or args.prompt_len + args.max_new_tokens}
    options["kv_cache_dtype"] = args.kv_cache_dtype
    dtype = DTYPES[args.dtype] if args.dtype else None
    if args.random_weights:
        engine = Engine.random(args.random_weights, args.device, dtype, **options)
    else:
        engine = Engine.load(args.checkpoint_path, args.device, dtype, **options)
    prompts = random_prompts(engine, args.batch_size, args.prompt_len)
    sampling = {n: getattr(args, n) for n in ("temperature", "top_k", "top_p") if getattr(args, n) is not None}
    params = SamplingParams(max_new_tokens=args.max_new_tokens, ignore_eos=True, **sampling)

    bandwidths = BANDWIDTH.get(torch.cuda.get_device_name() if engine.device.type == "cuda" else "", (None, None))
    bandwidth = bandwidths[0] or bandwidths[1]
    context = args.prompt_len + args.max_new_tokens / 2
    floor = floor_ms(engine, args.batch_size, context, bandwidth) if bandwidth else None
    name = args.random_weights or args.checkpoint_path
    if floor:
        print(f"{name} batch {args.batch_size}: floor {floor:.3f} ms a step at {bandwidth / 1e9:.0f} GB/s", file=sys.stderr)

    engine.generate(prompts, params)  # compiles, captures, warms up
    runs = []
    for _ in range(args.repeats):
        _, timing = engine.generate(prompts, params)
        runs.append(metrics(engine, timing, 0.0))
    steps = [m["tpot_ms"]["p50"] for m in runs]
    if None in steps:
        raise ValueError(f"max_new_tokens: found {args.max_new_tokens}, expected at least 2, for a decode step to time")
    median = runs[steps.index(statistics.median_low(steps))]
    result = {
        "benchmark": "decode", "engine": "rooflama", "model": name, "batch_size": args.batch_size,
        "prompt_len": args.prompt_len, "max_new_tokens": args.max_new_tokens, "repeats": args.repeats,
        "floor_ms": floor, "ms_per_step_of_each_run": steps,
        "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p,
        **median, "capture_sec": engine.decoder.capture_sec, **stamp(),
    }  # fmt: skip
    ms = median["tpot_ms"]
    line = f"{name} batch {args.batch_size}, {args.prompt_len} in / {args.max_new_tokens} out: {ms['p50']:.4f} ms a step"
    line += f" (p90 {ms['p90']:.4f}, p99 {ms['p99']:.4f}), TTFT {median['ttft_sec'] * 1e3:.2f} ms"
    line += f", host {median['host_ms_per_step']:.4f} ms"
    if median.get("mbu"):
        line += (
            f", MBU {median['mbu']:.1%} of {median['mbu_divided_by_gbps']:.0f}, {median['mbu_datasheet']:.1%} of the data sheet"
        )
    print(line, file=sys.stderr)
    if args.explain:
        result["explain"] = explain(engine, params, prompts, floor)
    return result


def explain(engine: Engine, params: SamplingParams, prompts: list, floor: float | None) -> dict:
    """Where a step's time goes, from a trace of graph replays: per kernel class, and the time with no kernel running."""
    from torch.profiler import ProfilerActivity, profile

    if engine.device.type != "cuda":
        raise ValueError(f"--explain: found device {engine.device}, expected a CUDA device")
    engine.generate(prompts, params)
    session = engine.session
    session.cache.lengths.fill_(len(prompts[0]) + 1)
    session.done.zero_()
    session.limit.fill_(session.max_seq_len - 1)
    replays = min(4, (session.max_seq_len - len(prompts[0]) - 2) // STEPS_PER_GRAPH)
    if replays < 1:
        raise ValueError(f"--explain: found {params.max_new_tokens} new tokens, expected at least {STEPS_PER_GRAPH + 2}")
    steps = replays * STEPS_PER_GRAPH
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        engine.decoder.run(steps, params.kind)
        torch.cuda.synchronize()
    spans = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in profiler.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    )
    classes: dict[str, list[float]] = {}
    exposed: dict[str, float] = {}
    busy, reach = 0.0, spans[0][0]
    for start, end, name in spans:
        classes.setdefault(name, []).append(end - start)
        mine = max(0.0, end - max(start, reach))  # time in which this kernel alone kept the step from being over
        exposed[name] = exposed.get(name, 0.0) + mine
        busy += mine
        reach = max(reach, end)
    wall = reach - spans[0][0]
    print(f"{'us a step':>10} {'exposed':>9} {'calls':>7} {'us each':>8}  kernel", file=sys.stderr)
    rows = []
    for name, times in sorted(classes.items(), key=lambda kv: -exposed[kv[0]]):
        rows.append({"kernel": name, "us_per_step": sum(times) / steps, "exposed_us_per_step": exposed[name] / steps,
                     "calls_per_step": len(times) / steps, "us_each": statistics.median(times)})  # fmt: skip
        r = rows[-1]
        print(
            f"{r['us_per_step']:10.1f} {r['exposed_us_per_step']:9.1f} {r['calls_per_step']:7.1f} "
            f"{r['us_each']:8.2f}  {name[:90]}",
            file=sys.stderr,
        )
    gaps = (wall - busy) / steps
    print(
        f"{wall / steps:10.1f} us a step in all, {gaps:.1f} with no kernel running"
        + (f", floor {floor * 1e3:.1f}" if floor else ""),
        file=sys.stderr,
    )
    return {"kernels": rows, "us_per_step": wall / steps, "gap_us_per_step": gaps}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("decode", help="ms a step of one model, batch size and length")
    flag = lambda name, **options: add_flag(sub, name, **options)
    flag("random_weights", metavar="SHAPE")
    flag("checkpoint_path", type=Path, default=generate.DEMO)
    flag("prompt_len", type=int, default=32)
    flag("max_new_tokens", type=int, default=128)
    flag("batch_size", type=int, default=1)
    flag("repeats", type=int, default=5)
    flag("max_seq_len", type=int)
    flag("kv_cache_dtype", choices=CACHE_DTYPES, default="auto")
    flag("temperature", type=float)
    flag("top_k", type=int)
    flag("top_p", type=float)
    flag("decode_mode", choices=generate.Decoder.MODES, default="auto")
    flag("device", default=default_device())
    flag("dtype", choices=DTYPES)
    flag("explain", action="store_true", help="per kernel class: where each microsecond of a step goes")
    flag("output", type=Path, help="append the JSON to this file")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        result = decode(args)
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    line = json.dumps(result, default=str)
    if args.output:
        with args.output.open("a") as file:
            file.write(line + "\n")
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
