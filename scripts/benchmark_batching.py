"""Many prompts at once: how busy the slots are, against a static batch, and whether a killed run loses anything.

    python scripts/benchmark_batching.py continuous --random_weights llama-3.2-1b
    python scripts/benchmark_batching.py kill

continuous: random prompts of mixed lengths through `Engine.generate_many`, beside the same in static batches, sorted by prompt
length, through `Engine.generate`: the same engine, slots, kernels and session. Greedy, EOS ignored. Both begin with an empty
engine whose graphs are captured, and end with the last token.
kill: prompts through the command of a user, killed (-9) in the middle and begun again; the results are those of one whole run.
The last line of standard output is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmark import stamp

from convert_hf_checkpoint import check_least
from generate import DEMO, DTYPES, Decoder, Engine, Request, add_flag, default_device, device_of, synchronize
from sampling import SamplingParams

# ---------------------------------------------------------------- continuous against static


def mixed_requests(args: argparse.Namespace, vocab_size: int) -> list[Request]:
    """Prompts of random ids; both lengths uniform within their bounds."""
    generator = torch.Generator().manual_seed(args.seed)
    uniform = lambda low, high: torch.randint(low, high + 1, (args.prompts,), generator=generator).tolist()
    lengths = zip(uniform(args.min_in, args.max_in), uniform(args.min_out, args.max_out), strict=True)
    ids = lambda n: torch.randint(0, vocab_size, (n,), generator=generator).tolist()
    return [
        Request(ids(n), SamplingParams(max_new_tokens=out, ignore_eos=True), id=i) for i, (n, out) in enumerate(lengths)
    ]  # fmt: skip


def run_continuous(engine: Engine, requests: list[Request], slots: int) -> tuple[dict, dict]:
    """(figures, tokens by id) of one run of generate_many."""
    synchronize(engine.device)
    started = time.perf_counter()
    results = engine.generate_many(requests, slots)
    tokens = {request.id: outputs[0].tokens for request, outputs in results}
    total_sec = time.perf_counter() - started
    timing = results.timing
    busy = timing.queued_busy_steps / timing.queued_slot_steps if timing.queued_slot_steps else None
    return figures(tokens, total_sec, timing.steps) | {"busy_slots_until_queue_empty": busy}, tokens


def run_static(engine: Engine, requests: list[Request], slots: int) -> tuple[dict, dict]:
    """The same in batches of neighbours in length, each until its last sequence ends."""
    requests = sorted(requests, key=lambda request: len(request.prompt))
    synchronize(engine.device)
    started = time.perf_counter()
    tokens, steps, busy = {}, 0, 0
    for first in range(0, len(requests), slots):
        batch = requests[first : first + slots]
        outputs, timing = engine.generate([r.prompt for r in batch], [r.params for r in batch])
        tokens |= {r.id: out.tokens for r, out in zip(batch, outputs, strict=True)}
        steps, busy = steps + timing.steps, busy + timing.decode_tokens
    total_sec = time.perf_counter() - started
    return figures(tokens, total_sec, steps) | {"busy_slots": busy / (steps * slots)}, tokens


def figures(tokens: dict, total_sec: float, steps: int) -> dict:
    number = sum(map(len, tokens.values()))
    return {"total_sec": total_sec, "tokens": number, "tok_per_sec": number / total_sec, "steps": steps}


def continuous(args: argparse.Namespace) -> dict:
    options = {"decode_mode": args.decode_mode, "max_seq_len": args.max_in + args.max_out}
    dtype = DTYPES[args.dtype] if args.dtype else None
    if args.random_weights:
        engine = Engine.random(args.random_weights, args.device, dtype, **options)
    else:
        engine = Engine.load(DEMO, args.device, dtype, **options)
    requests = mixed_requests(args, engine.model.vocab_limit)
    ways = {"continuous": run_continuous, "static": run_static}
    few = sorted(requests, key=lambda r: r.params.max_new_tokens)[: 2 * args.slots]
    for way in ways.values():  # compiles, captures, warms up: twice the slots, so that some wait
        way(engine, few, args.slots)
    captured = lambda: engine.decoder.capture_sec + engine.prefiller.capture_sec
    capture_sec = captured()
    path = f"{engine.decoder.path}; prefill: {engine.prefiller.path}"
    print(f"warm, {capture_sec:.1f} s of it for graphs; path: {path}", file=sys.stderr)

    result, tokens = {}, {}
    for name, way in ways.items():
        runs = [way(engine, requests, args.slots) for _ in range(args.repeats)]
        runs.sort(key=lambda run: run[0]["tok_per_sec"])
        result[name], tokens[name] = runs[len(runs) // 2]
        result[name]["tok_per_sec_of_each_run"] = [run[0]["tok_per_sec"] for run in runs]
        for request in requests:  # a figure of wrong work would be none
            found, expected = len(tokens[name].get(request.id, ())), request.params.max_new_tokens
            if found != expected:
                raise ValueError(f"{name}, prompt {request.id}: found {found} tokens, expected {expected}")
    same = sum(tokens["continuous"][r.id] == tokens["static"][r.id] for r in requests)
    ratio = result["continuous"]["tok_per_sec"] / result["static"]["tok_per_sec"]
    print(f"{'':12}{'tok/s':>10}{'seconds':>10}{'steps':>8}{'busy slots':>12}", file=sys.stderr)
    for name, r in result.items():
        busy = r.get("busy_slots", r.get("busy_slots_until_queue_empty"))
        busy = f"{busy:.1%}" if busy is not None else "-"
        print(f"{name:12}{r['tok_per_sec']:10.0f}{r['total_sec']:10.2f}{r['steps']:8}{busy:>12}", file=sys.stderr)
    print(f"{ratio:.2f} times the tokens/s; {same} of {len(requests)} answers are the same to the last token", file=sys.stderr)
    shape = {name: getattr(args, name) for name in ("prompts", "slots", "min_in", "max_in", "min_out", "max_out", "seed")}
    return {
        "benchmark": "continuous", "model": args.random_weights or str(DEMO.relative_to(ROOT)), **shape, **result,
        "static_sorted_by": "prompt length", "ratio": ratio, "same_answers": same, "capture_sec": capture_sec,
        "captured_while_timed_sec": captured() - capture_sec, "path": path, **stamp(),
    }  # fmt: skip


# ---------------------------------------------------------------- killed and resumed


def kill(args: argparse.Namespace) -> dict:
    """ValueError: a result was lost, doubled or changed."""
    generator = torch.Generator().manual_seed(args.seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=generator))
    words = ("Speak", "again,", "thou", "noble", "lord", "of", "York;", "what", "news", "from", "Rome?")
    with tempfile.TemporaryDirectory() as directory:
        prompts, out, whole = (Path(directory) / f"{name}.jsonl" for name in ("prompts", "out", "whole"))
        with prompts.open("w") as file:
            for i in range(args.prompts):
                text = "ROMEO:\n" + " ".join(words[draw(0, len(words) - 1)] for _ in range(draw(0, 40)))
                print(json.dumps({"id": i, "prompt": text, "seed": i, "max_new_tokens": draw(1, args.max_out)}), file=file)
        base = [sys.executable, str(ROOT / "generate.py"), "--prompt_file", str(prompts), "--device", args.device]
        base += ["--dtype", args.dtype or "float32", "--output_file"]
        quiet = {"stderr": subprocess.DEVNULL}
        started = time.perf_counter()
        with subprocess.Popen([*base, str(out)], **quiet) as process:
            while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < args.prompts // 2):
                time.sleep(0.02)
            process.kill()
        had = out.read_bytes().count(b"\n")
        subprocess.run([*base, str(out)], check=True, **quiet)
        resumed_sec = time.perf_counter() - started
        started = time.perf_counter()
        subprocess.run([*base, str(whole)], check=True, **quiet)
        whole_sec = time.perf_counter() - started
        got, expected = ([json.loads(line) for line in path.read_text().splitlines()] for path in (out, whole))
    number = sum(len(o["tokens"]) for line in expected for o in line["outputs"])
    by_id = lambda lines: sorted(lines, key=lambda line: line["id"])
    if by_id(got) != by_id(expected) or [line["id"] for line in by_id(got)] != list(range(args.prompts)):
        raise ValueError(f"found {len(got)} results, expected the {args.prompts} of a run that was not killed")
    line = f"{args.prompts} prompts, {number} tokens: killed with {had} results, then {len(got)}, each once, as in a whole run"
    print(line, file=sys.stderr)
    return {"benchmark": "kill", "prompts": args.prompts, "max_out": args.max_out, "tokens": number, "results_when_killed": had,
            "results": len(got), "killed_and_resumed_sec": resumed_sec, "whole_sec": whole_sec,
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"), **stamp()}  # fmt: skip


# ---------------------------------------------------------------- command line


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("continuous", "tokens/s and busy slots against a static batch"), ("kill", "kill -9, and resume")):
        sub = commands.add_parser(name, help=text)
        flag = lambda name, sub=sub, **options: add_flag(sub, name, **options)
        flag("prompts", type=int, default=1024 if name == "continuous" else 1000)
        flag("max_out", type=int, default=512 if name == "continuous" else 40, help="new tokens of a prompt, at most")
        flag("seed", type=int, default=0)
        flag("device", default=default_device())
        flag("dtype", choices=DTYPES)
        flag("output", type=Path, help="append the JSON to this file")
        if name == "continuous":
            flag("random_weights", metavar="SHAPE", help="default: the demo model")
            flag("slots", type=int, default=64)
            flag("min_in", type=int, default=32, help="tokens of a prompt")
            flag("max_in", type=int, default=2048)
            flag("min_out", type=int, default=16)
            flag("repeats", type=int, default=1)
            flag("decode_mode", choices=Decoder.MODES, default="auto")
    args = parser.parse_args(argv)
    check_least(parser, args, prompts=1, slots=1, min_in=1, max_in=1, min_out=1, max_out=1, repeats=1)
    for name in ("in", "out"):
        low, high = getattr(args, f"min_{name}", 1), getattr(args, f"max_{name}", 1)
        if low > high:
            parser.error(f"--min_{name}: found {low}, expected at most --max_{name}, {high}")
    return args


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        device_of(args.device)
        result = {"continuous": continuous, "kill": kill}[args.command](args)
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    line = json.dumps(result)
    if args.output:
        with args.output.open("a") as file:
            file.write(line + "\n")
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
