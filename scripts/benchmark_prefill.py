"""Time to the first token, row by row of vLLM's table: prompts packed, the first tokens chosen and read by the host.

    python scripts/benchmark_prefill.py --output prefill.jsonl                 # both models, every row
    python scripts/benchmark_prefill.py --models llama-3.2-1b --rows 1x32 64x128 --explain

Random weights and prompts, greedy, through Engine.generate; loading, compiling and capturing are not in the time. First it is
checked that packs, with and without graphs, equal prompts alone. vLLM's figures are of 0.26.0 on an H200 (bf16, FA3, CUDA
graphs), measured apart. The last line of standard output is one JSON object.
"""

import argparse
import dataclasses
import json
import re
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import roofline
from benchmark import stamp

from generate import Engine, add_flag, default_device, fill_randomly
from kv_cache import KVCache
from model import SHAPES, PrefillStep, Transformer
from prefill import Piece, Prefiller
from sampling import SamplingParams

PEAK_TFLOPS = 790.0  # of a large bf16 matmul on an H200
VLLM_MS = {  # model: batch x prompt tokens: ms
    "llama-3.2-1b": {"1x32": None, "1x128": 5.5, "1x2048": 12, "16x128": 23, "16x2048": 126, "64x128": 44, "256x128": 139},
    "llama-3.1-8b": {"1x32": 9, "1x128": None, "1x2048": 49, "16x128": 70, "16x2048": 765, "64x128": 192, "256x128": 757},
}
RAGGED = [5, 700, 130, 1, 33, 64, 257, 12]  # what is checked: 1,202 rows, then the last six, which a graph takes
CHECKED_LAYERS = 4  # rounding grows with the layers, to 5% of the norm after the 8B's 32; a fault would show after one
TOLERANCE = 0.02  # of the norm of hidden states, bf16 products in another order


def check(engine: Engine) -> dict[str, float]:
    """Relative errors of packs' hidden states against prompts alone. ValueError where one is too large."""
    model, config = engine.model, engine.model.config
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, config.vocab_size, (n,), generator=generator).tolist() for n in RAGGED]
    alone = torch.cat([model(model.embed(torch.tensor(p, device=engine.device)), PrefillStep(len(p)))[-1:] for p in prompts])
    rows = max(RAGGED) + 8
    found = {}
    for name, graphs, chosen in (("pack", False, slice(None)), ("one", True, slice(1)), ("graph", True, slice(2, None))):
        cache = KVCache(config, len(prompts), rows, engine.device, model.norm.weight.dtype)
        prefiller = Prefiller(model, cache, graphs=graphs)
        slots = range(len(prompts))[::-1][chosen]
        pieces = [Piece(slot, ids) for slot, ids in zip(slots, prompts[chosen], strict=True)]
        found[name] = ((prefiller.run(pieces) - alone[chosen]).norm() / alone[chosen].norm()).item()
        cut = [len(p.tokens) // 2 for p in pieces]  # then the same from the cache, in two parts
        prefiller.run([Piece(p.slot, p.tokens[:n]) for p, n in zip(pieces, cut, strict=True) if n])
        rest = [Piece(p.slot, p.tokens[n:], n) for p, n in zip(pieces, cut, strict=True)]
        found[f"{name}, continued"] = ((prefiller.run(rest) - alone[chosen]).norm() / alone[chosen].norm()).item()
    wrong = {name: error for name, error in found.items() if not error <= TOLERANCE}
    if wrong:
        raise ValueError(f"packed prefill: found relative errors {wrong}, expected at most {TOLERANCE}")
    return found


def measure(engine: Engine, model: str, row: str, repeats: int) -> dict:
    """One row of the table."""
    batch, length = map(int, row.split("x"))
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, min(1024, engine.model.vocab_limit), (batch, length), generator=generator).tolist()
    params = SamplingParams(max_new_tokens=1, ignore_eos=True)
    _, first = engine.generate(prompts, params)
    engine.generate(prompts, params)
    seconds = [engine.generate(prompts, params)[1].ttft_sec for _ in range(repeats)]
    started = time.perf_counter()
    engine.prefiller.run([Piece(slot, ids) for slot, ids in enumerate(prompts)])
    launch_sec = time.perf_counter() - started
    ms = statistics.median(seconds) * 1e3
    work = roofline.stages(roofline.Model(engine.model.config), roofline.prefill(batch, length))
    tflops = sum(stage.flops for stage in work) / ms / 1e9
    vllm = VLLM_MS.get(model, {}).get(row)
    return {
        "model": model, "batch_size": batch, "prompt_len": length, "ttft_ms": ms, "least_ms": min(seconds) * 1e3,
        "most_ms": max(seconds) * 1e3, "launch_ms": launch_sec * 1e3, "capture_sec": first.compile_sec, "vllm_ms": vllm,
        "times_faster": vllm / ms if vllm else None, "tokens_per_sec": batch * length / ms * 1e3, "tflops": tflops,
        "share_of_790": tflops / PEAK_TFLOPS,
    }  # fmt: skip


def line_of(r: dict) -> str:
    vllm = f"{r['vllm_ms']:7.1f} {r['times_faster']:6.2f}x" if r["vllm_ms"] else f"{'-':>7} {'-':>7}"
    return (
        f"{r['model']:>13} {r['batch_size']:>4} x {r['prompt_len']:<5} {r['ttft_ms']:8.2f} {r['least_ms']:8.2f} {vllm} "
        f"{r['launch_ms']:8.2f} {r['tokens_per_sec']:10.0f} {r['tflops']:7.1f} {r['share_of_790']:6.1%}"
    )


HEADER = "        model  batch x in  TTFT ms    least vLLM ms  faster   launch   tokens/s TFLOP/s of 790"


def explain(engine: Engine, row: str) -> list[dict]:
    """Device time of one prefill by kernel, the longest first; printed."""
    from torch.profiler import ProfilerActivity, profile

    batch, length = map(int, row.split("x"))
    pieces = [Piece(slot, [7] * length) for slot in range(batch)]
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        engine.prefiller.run(pieces)
        torch.cuda.synchronize()
    spans = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    by_name: dict[str, list[float]] = {}
    for e in spans:
        by_name.setdefault(e.name, []).append(e.time_range.end - e.time_range.start)
    wall = max(e.time_range.end for e in spans) - min(e.time_range.start for e in spans)
    rows = [{"kernel": n, "calls": len(t), "ms": sum(t) / 1e3} for n, t in by_name.items()]
    rows.sort(key=lambda r: -r["ms"])
    busy = sum(r["ms"] for r in rows)
    print(f"{row}: {wall / 1e3:.2f} ms from first to last kernel, {busy:.2f} ms of kernels", file=sys.stderr)
    for r in rows[:14]:
        print(f"{r['ms']:9.3f} ms {r['ms'] / busy:6.1%} {r['calls']:>5} x  {r['kernel'][:100]}", file=sys.stderr)
    return rows


def row_name(text: str) -> str:
    """A row as the table spells it."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected BATCHxTOKENS, as 16x128")
    return text


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = lambda name, **options: add_flag(parser, name, **options)
    flag("models", nargs="+", choices=SHAPES, default=list(VLLM_MS), metavar="SHAPE")
    flag("rows", nargs="+", type=row_name, metavar="BATCHxTOKENS", help="default: vLLM's table")
    flag("repeats", type=int, default=5)
    flag("cudnn_tokens", type=int, help="length from which cuDNN's attention is taken where prompts are alike; 0 = never")
    flag("explain", action="store_true", help="device time by kernel, of each row")
    flag("device", default=default_device())
    flag("layers", type=int, help="only so many layers of the shape, for a trial: no figure of these counts")
    flag("output", type=Path, help="append the JSON to this file")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.cudnn_tokens is not None:
        sys.modules["kernels.flash_prefill"].CUDNN_TOKENS = args.cudnn_tokens or 1 << 30
    results = []
    try:
        print(HEADER)
        for model in args.models:
            errors = check(engine_of(model, args.layers or CHECKED_LAYERS, args.device))
            engine = engine_of(model, args.layers, args.device)
            print(f"{model}: relative errors {', '.join(f'{k} {v:.4f}' for k, v in errors.items())}", file=sys.stderr)
            for row in args.rows or VLLM_MS.get(model, {}):
                results.append(measure(engine, model, row, args.repeats))
                print(line_of(results[-1]), flush=True)
                if args.explain:
                    results[-1]["kernels"] = explain(engine, row)
            print(f"{model}: {engine.prefiller.path}", file=sys.stderr)
            del engine
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    line = json.dumps({"benchmark": "prefill", "rows": results, "layers": args.layers, **stamp()}, default=str)
    if args.output:
        with args.output.open("a") as file:
            file.write(line + "\n")
    print(line)
    return 0


def engine_of(shape: str, layers: int | None, device: str) -> Engine:
    """Random weights of the shape, or of its first layers; on a GPU with graphs."""
    config = dataclasses.replace(SHAPES[shape], num_layers=layers or SHAPES[shape].num_layers)
    model = Transformer(config, device=device)
    fill_randomly(model)
    return Engine(model, decode_mode="graph" if device.startswith("cuda") else "eager")


if __name__ == "__main__":
    sys.exit(main())
