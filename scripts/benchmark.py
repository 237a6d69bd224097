"""End-to-end benchmarks through the path that a user takes: this engine alone, and beside others.

    python scripts/benchmark.py decode --random_weights llama-3.2-1b --explain         a decode step, and where its time goes
    python scripts/benchmark.py latency --random_weights llama-3.2-1b --engines rooflama transformers-static
    python scripts/benchmark.py throughput --scenario vllm-table --time_limit 480      every row of vLLM's table, and the ratio
    python scripts/benchmark.py sweep --random_weights llama-3.2-1b --max_batch        throughput against TPOT, batch 1 to 256
    python scripts/benchmark.py chat --checkpoint_path DIR --questions FILE            answers to a list of questions
    python scripts/benchmark.py report                                                 benchmarks/README.md from what is stored

Greedy, the prompts random ids, the same for every engine. `latency`, `throughput` and `sweep` measure every combination of
their lists, each engine in a process of its own; EOS is ignored; loading and compiling are reported, not counted. Tables go to
standard output, progress to stderr; the last line of standard output is one JSON object.
"""

import argparse
import contextlib
import csv
import dataclasses
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import comparison as tables
import measure
from engines import ENGINES, Job, compilations
from explain import explain, explain_table
from measure import Plan, Row, Worker, WorkerError, stamp
from roofline import load_config, num, table

import generate
from checkpoint import default_generation
from convert_hf_checkpoint import check_least, report_errors
from generate import DTYPES, Decoder, add_flag, default_device, metrics
from kv_cache import CACHE_DTYPES
from model import ACTIVATION_DTYPES, SHAPES
from quantize import MODES, read_text
from sampling import MAX_SAMPLES, SamplingParams
from tokenizer import load_tokenizer

DEMO = Path(os.path.relpath(generate.DEMO))  # as a stored result shall name it
MAX_BATCH = 4096
PROMPT_LEN = 32  # of decode, unless told
CHAT_TOKENS = 200

# ---------------------------------------------------------------- decode: one model in this process


def decode(args: argparse.Namespace) -> dict:
    """ms a step, percentiles and MBU of one model, batch size and length."""
    if args.context is not None:
        if args.context <= args.max_new_tokens:
            raise ValueError(f"--context: found {args.context}, expected more than --max_new_tokens, {args.max_new_tokens}")
        args.prompt_len = args.context - args.max_new_tokens
    elif args.prompt_len is None:
        args.prompt_len = PROMPT_LEN
    if args.explain and not args.device.startswith("cuda"):
        raise ValueError(f"--explain: found device {args.device}, expected a CUDA device")
    model, options = args.random_weights or str(args.checkpoint_path), (args.kv_cache_dtype, args.activation_dtype)
    row = Row(model, args.batch_size, args.prompt_len, args.max_new_tokens, args.quantize, 0.0, *options)
    measure.check_row(row)
    if args.cold:
        return cold_start(args, row)
    args.max_seq_len = args.max_seq_len or args.prompt_len + args.max_new_tokens
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(args.device)  # of models before this one
    engine = generate.load_engine(argparse.Namespace(**vars(generate.parse_args(["--compile"])) | vars(args)))
    prompts = row.prompts(engine.model.vocab_limit)
    sampling = {n: getattr(args, n) for n in ("top_k", "top_p") if getattr(args, n) is not None}
    params = SamplingParams(args.temperature, max_new_tokens=args.max_new_tokens, ignore_eos=True, **sampling)
    card = measure.card_of(args.device)
    predicted = measure.predictions(row, card)[0] if card else None
    if predicted:
        floor = f"floor {predicted.floor_sec * 1e3:.4f} ms a step, predicted {predicted.sec * 1e3:.4f}"
        print(f"{row}: {floor}; {card.describe()}", file=sys.stderr)
    result = {
        "benchmark": "decode", "engine": "rooflama", **dataclasses.asdict(row), "mode": args.quantize,
        "quantize": row.formats[0], "quantize_head": row.formats[1], "decode_mode": args.decode_mode, "repeats": args.repeats,
        "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p,
        **time_decoding(engine, prompts, params, args.repeats), **stamp(),
    }  # fmt: skip
    if card:
        mean = {"tpot_ms": {"mean": result["tpot_ms"]["p50"]}, "e2e_sec": result["e2e_sec"], "ttft_sec": result["ttft_sec"]}
        result |= measure.beside_roofline(row, mean, card)
    print(decode_text(row, result))
    if args.explain:
        result["explain"] = explain(engine, params, prompts, predicted)
        print("\n" + explain_table(result["explain"]))
    return result


def time_decoding(engine, prompts: list, params: SamplingParams, repeats: int) -> dict:
    """The metrics of the run with the median step, of so many; what came before it is compile_sec."""
    started = time.perf_counter()
    engine.generate(prompts, params)  # compiles, captures, warms up
    first_run_sec, compiled, captured = time.perf_counter() - started, compilations(), engine.decoder.capture_sec
    runs, e2e = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        _, timing = engine.generate(prompts, params)
        e2e.append(time.perf_counter() - started)
        runs.append(metrics(engine, timing, 0.0))
    steps = [m["tpot_ms"]["p50"] for m in runs]
    e2e_sec = statistics.median(e2e)
    return runs[steps.index(statistics.median_low(steps))] | {
        "ms_per_step_of_each_run": steps,
        "e2e_sec": e2e_sec,
        "compile_sec": max(0.0, first_run_sec - e2e_sec),
        "capture_sec": captured,
        "compiled_while_timed": compilations() - compiled + (engine.decoder.capture_sec > captured),
    }


def decode_text(row: Row, r: dict) -> str:
    ms, host = r["tpot_ms"], r["host_ms_per_step"]
    times = f"{ms['p50']:.4f} ms a step (p90 {ms['p90']:.4f}, p99 {ms['p99']:.4f})"
    lines = [f"{row}: {times}, TTFT {r['ttft_sec'] * 1e3:.2f} ms"]
    if "floor_ratio" in r:
        lines.append(
            f"MBU {r['mbu']:.1%} of {r['mbu_divided_by_gbps']:.0f} GB/s, {r['mbu_datasheet']:.1%} of the data sheet's; "
            f"{r['floor_ratio']:.2f} of the floor, {r['predicted_ratio']:.2f} of the prediction"
        )
    lines.append(f"host {host:.4f} ms a step: {'under' if host < ms['p50'] else 'NOT under'} the step's time; {r['path']}")
    lines.append(f"compiled or captured while timed: {r['compiled_while_timed'] or 'nothing'}")
    return "\n".join(lines)


def cold_start(args: argparse.Namespace, row: Row) -> dict:
    """Seconds from the start of a process to its first token, its caches of compiled code empty, and again when they are not.

    As generate.py does it: the weights, a warm-up that compiles and captures, then the prompt.
    """
    plan = plan_of(args, row.model)
    result = {"benchmark": "cold", "engine": "rooflama", **dataclasses.asdict(row), "dtype": plan.dtype, **stamp()}
    with tempfile.TemporaryDirectory() as cache:
        names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")
        environment = {name: str(Path(cache) / name) for name in names}
        for start in ("cold", "warm"):
            job = dataclasses.replace(measure.job_of(row, plan), warmup_runs=1, timed_runs=1)
            began = time.time()
            worker = Worker(measure.setup_of("rooflama", args.decode_mode, row, [row], plan), plan.deadline, environment)
            try:
                answer = worker.run(job, plan.deadline)
            finally:
                worker.close()
            seconds, load_sec = answer["first_token_at"] - began, worker.loaded["load_sec"]
            warmup_sec = answer["warmup_sec"][0]
            result[start] = {"first_token_sec": seconds, "load_sec": load_sec, "warmup_sec": warmup_sec}
            print(
                f"{row}, {start} caches: first token {seconds:.2f} s after the process began "
                f"(weights {load_sec:.2f} s, warm-up with compiling {warmup_sec:.2f} s)"
            )
    return result


# ---------------------------------------------------------------- latency, throughput, sweep: engines beside each other


def plan_of(args: argparse.Namespace, model: str) -> Plan:
    dtype = args.dtype or str(load_config(model).dtype).removeprefix("torch.")
    deadline = time.monotonic() + args.time_limit if getattr(args, "time_limit", None) is not None else float("inf")
    runs = [getattr(args, name, default) for name, default in (("warmup_runs", 1), ("timed_runs", 3))]
    gpt_fast = getattr(args, "gpt_fast_dir", None)
    return Plan(
        args.device, dtype, model in SHAPES, *runs, deadline, args.compile_prefill, gpt_fast and str(gpt_fast.resolve())
    )


def rows_of(args: argparse.Namespace) -> list[Row]:
    if getattr(args, "scenario", None):
        return tables.scenario_rows(args.scenario)
    models = args.random_weights or list(map(str, args.checkpoint_path))
    formats = (args.quantize or [None], args.kv_cache_dtype, args.activation_dtype)
    lists = (models, args.prompt_len, args.max_new_tokens, args.padding_ratio, *formats, args.batch_size)
    return [Row(m, b, t, n, q, ratio, kv, x) for m, t, n, ratio, q, kv, x, b in itertools.product(*lists)]


def engines_of(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(engine, decode mode): this project's once for each mode."""
    return [(name, mode) for name in args.engines for mode in (args.decode_mode if name == "rooflama" else ["auto"])]


def compare(args: argparse.Namespace) -> list[dict]:
    """Measures rows on engines; appends records as they come; prints the tables."""
    rows = rows_of(args)
    for row in rows:
        measure.check_row(row)
    plan = plan_of(args, rows[0].model)
    engines = engines_of(args)
    say = lambda text: print(text, file=sys.stderr, flush=True)
    if args.max_batch:
        rows = with_largest(rows, engines[0], plan, args.max_batch, say)
    records, first = [], {}
    for record in measure.measure(args.command, rows, engines, plan, say):
        tokens = record.pop("tokens", None)
        if tokens and not record["random_weights"]:  # the same weights: greedy answers agree
            theirs = first.setdefault((*tables.row_key(record), record["activation_dtype"]), tokens)
            record["same_answers"] = sum(a == b for a, b in zip(tokens, theirs, strict=True)) / len(tokens)
        if "skipped" not in record:
            rate = f"{record['output_tok_per_sec']:.1f} tok/s out, {record['e2e_sec']:.3f} s"
            say(f"{tables.label(record)} {tables.row_name(record)}: {rate}")
        append(args.output, record)
        records.append(record)
    print(tables.comparison(records))
    if args.command == "latency":
        print(tables.percentiles(records))
    return records


def with_largest(rows: list[Row], engine: tuple[str, str], plan: Plan, most: int, say) -> list[Row]:
    """The rows, and each shape at the largest batch that fits; model by model, so that each has the card to itself."""
    shapes = dict.fromkeys(dataclasses.replace(row, batch_size=1, padding_ratio=0.0) for row in rows)
    for shape in shapes:
        try:
            largest = measure.max_batch(shape, engine, plan, most)
        except WorkerError as error:
            say(f"{shape}: the largest batch was not found: {error}")
            continue
        say(f"{shape}: the largest power-of-two batch that fits is {largest}")
        rows = [*rows, *([dataclasses.replace(shape, batch_size=largest)] if largest else [])]
    return sorted(dict.fromkeys(rows), key=lambda row: tuple(name or "" for name in measure.loaded_as(row)))


# ---------------------------------------------------------------- chat


def chat(args: argparse.Namespace) -> dict:
    """Every question of a file to every engine; a CSV row each, but for the first, which warms up."""
    directory = Path(args.checkpoint_path)
    questions = [line.strip() for line in read_text(args.questions).splitlines() if line.strip()]
    if len(questions) < 2:
        raise ValueError(f"{args.questions}: found {len(questions)} questions, expected at least 2: the first one warms up")
    config = load_config(str(directory))
    tokenizer = load_tokenizer(directory, config.vocab_size, config.model_type)
    if tokenizer is None:
        raise ValueError(f"{directory}: found no tokenizer, expected one for --questions")
    if tokenizer.template:
        prompts = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in questions]
    else:
        prompts = [tokenizer.encode(text) for text in questions]
    stop = {*config.eos_token_ids, *tokenizer.eos_ids, *default_generation(directory).get("eos_token_id", ())}
    row = Row(str(directory), 1, max(map(len, prompts)), args.max_new_tokens, args.quantize)
    measure.check_row(row)
    plan, totals = plan_of(args, row.model), []
    with args.csv.open("w", newline="") if args.csv else contextlib.nullcontext(sys.stdout) as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["engine", "model", "seconds", "words", "answer"])
        for name, mode in engines_of(args):
            total = {"engine": name, "questions": 0, "seconds": 0.0, "words": 0, "tokens": 0}
            try:
                for seconds, ids in answers(name, mode, row, prompts, sorted(stop), plan):
                    text = tokenizer.decode([token for token in ids if token not in stop])
                    words = len(text.split())
                    out.writerow([name, directory.name, f"{seconds:.4f}", words, text])
                    for field, more in (("questions", 1), ("seconds", seconds), ("words", words), ("tokens", len(ids))):
                        total[field] += more
            except WorkerError as error:
                print(f"{name}: {'absent' if error.kind == 'absent' else 'ended'}: {error}", file=sys.stderr)
                totals.append({"engine": name, "skipped": str(error)})
                continue
            ms = total["seconds"] * 1e3
            each = {
                "ms_per_10_words": 10 * ms / total["words"] if total["words"] else None,
                "ms_per_token": ms / total["tokens"],
            }
            totals.append(total | each)
    fields = ("ms_per_10_words", "ms_per_token", "seconds", "words", "tokens")
    rows = [[t["engine"], *(num(t[f]) if t[f] else "" for f in fields)] for t in totals if "skipped" not in t]
    print(table("engine  ms per 10 words  ms per token  seconds  words  tokens", rows))
    return {"benchmark": "chat", "model": row.model, "mode": args.quantize, "dtype": plan.dtype, "engines": totals, **stamp()}


def answers(name: str, mode: str, row: Row, prompts: list[list[int]], stop: list[int], plan: Plan):
    """(seconds, tokens) of an engine's answer to every prompt but the first; one cache serves them all."""
    worker = Worker(measure.setup_of(name, mode, row, [row], plan), plan.deadline)
    try:
        for i, prompt in enumerate(prompts):
            job = Job([prompt], row.max_new_tokens, stop, 0, 1, row.prompt_len + row.max_new_tokens)
            answer = worker.run(job, plan.deadline)
            if i:
                yield answer["runs"][0]["e2e_sec"], answer["tokens"][0]
    finally:
        worker.close()


# ---------------------------------------------------------------- command line


def append(path: Path | None, record: dict) -> None:
    if path:
        with path.open("a") as file:
            file.write(json.dumps(record, default=str) + "\n")


def add_common(sub: argparse.ArgumentParser) -> None:
    flag = lambda name, **options: add_flag(sub, name, **options)
    flag("device", default=default_device())
    flag("dtype", choices=DTYPES, help="default: the checkpoint's")
    flag("compile_prefill", action="store_true", help="rooflama: compile the prefill too")
    flag("output", type=Path, help="append the JSON to this file, a line a record")
    flag("debug", action="store_true", help="show tracebacks")


def add_decode(sub: argparse.ArgumentParser) -> None:
    flag = lambda name, **options: add_flag(sub, name, **options)
    flag("random_weights", metavar="SHAPE")
    flag("checkpoint_path", type=Path, default=DEMO)
    flag("prompt_len", type=int, help=f"default {PROMPT_LEN}")
    flag("context", type=int, metavar="N", help="a prompt so long that prompt and answer are N tokens")
    flag("max_new_tokens", type=int, default=128)
    flag("batch_size", type=int, default=1)
    flag("repeats", type=int, default=5)
    flag("max_seq_len", type=int)
    flag("temperature", type=float, default=0.0)
    flag("top_k", type=int)
    flag("top_p", type=float)
    flag("quantize", choices=MODES)
    flag("kv_cache_dtype", choices=CACHE_DTYPES, default="auto")
    flag("activation_dtype", choices=ACTIVATION_DTYPES, default="auto")
    flag("decode_mode", choices=Decoder.MODES, default="auto")
    flag("explain", action="store_true", help="per class of kernels: where each microsecond of a step goes")
    flag("cold", action="store_true", help="time to the first token of a new process, its compile caches empty, and filled")


def add_engines(sub: argparse.ArgumentParser) -> None:
    flag = lambda name, **options: add_flag(sub, name, **options)
    flag("engines", nargs="+", choices=ENGINES, default=["rooflama"])
    flag("decode_mode", nargs="+", choices=Decoder.MODES, default=["auto"], help="rooflama's; each is measured")
    flag("gpt_fast_dir", type=Path, help="a checkout of gpt-fast, imported from there")
    flag("time_limit", type=float, metavar="SEC", help="rows that do not fit are skipped, and said so")


def add_compare(sub: argparse.ArgumentParser, batches: list[int]) -> None:
    flag = lambda name, **options: add_flag(sub, name, **options)
    flag("random_weights", nargs="+", metavar="SHAPE")
    flag("checkpoint_path", nargs="+", type=Path, default=[DEMO])
    flag("batch_size", nargs="+", type=int, default=batches)
    flag("prompt_len", nargs="+", type=int, default=[128])
    flag("max_new_tokens", nargs="+", type=int, default=[128])
    flag(
        "padding_ratio",
        nargs="+",
        type=float,
        default=[0.0],
        help="prompts of mixed lengths, on average (1 - this) of the longest",
    )
    flag("quantize", nargs="+", choices=MODES)
    flag("kv_cache_dtype", nargs="+", choices=CACHE_DTYPES, default=["auto"])
    flag("activation_dtype", nargs="+", choices=ACTIVATION_DTYPES, default=["auto"], help="rooflama's")
    flag(
        "max_batch", nargs="?", type=int, const=MAX_BATCH, help="also the largest power-of-two batch that fits (up to this one)"
    )
    flag("warmup_runs", type=int, default=1)
    flag("timed_runs", type=int, default=3)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    add = lambda name, text: commands.add_parser(name, help=text, allow_abbrev=False)
    sub = add("decode", "ms a step of one model, batch size and length")
    add_decode(sub)
    add_common(sub)
    for name, text, batches in (
        ("latency", "time to first token, per token, and end to end, with percentiles", [1]),
        ("throughput", "output tokens a second over the whole run, prefill included", [1, 16, 64, 256]),
        ("sweep", "throughput against TPOT as concurrency grows", [2**i for i in range(9)]),
    ):
        sub = add(name, text)
        add_compare(sub, batches)
        add_engines(sub)
        add_common(sub)
        if name == "throughput":
            add_flag(sub, "scenario", choices=tables.SCENARIOS, help="rows by name, in place of the lists")
    sub = add("chat", "a file of questions, a CSV row each")
    add_flag(sub, "checkpoint_path", type=Path, default=DEMO)
    add_flag(sub, "questions", type=Path, required=True, help="one a line; the first warms up")
    add_flag(sub, "max_new_tokens", type=int, default=CHAT_TOKENS)
    add_flag(sub, "quantize", choices=MODES)
    add_flag(sub, "csv", type=Path, help="write the rows here (default: standard output)")
    add_engines(sub)
    add_common(sub)
    sub = add("report", "benchmarks/README.md and its charts, from the results stored there")
    add_flag(sub, "directory", type=Path, default=ROOT / "benchmarks")
    add_flag(sub, "debug", action="store_true")
    args = parser.parse_args(argv)
    check_least(parser, args, timed_runs=3, warmup_runs=1, repeats=1)
    if (most := getattr(args, "max_batch", None)) is not None and not 1 <= most <= MAX_SAMPLES:
        parser.error(f"--max_batch: found {most}, expected 1 to {MAX_SAMPLES:,}")
    default = commands.choices[args.command].get_default
    for name, other in (("checkpoint_path", "random_weights"), ("prompt_len", "context")):
        if getattr(args, other, None) is not None and getattr(args, name) is not default(name):
            parser.error(f"--{name}: found with --{other}, expected one of them")
    return args


def run(args: argparse.Namespace) -> None:
    if getattr(args, "output", None):
        args.output.open("a").close()  # where it cannot be written, that is known before anything is measured
    if args.command == "report":
        import report

        report.write(args.directory)
        return
    generate.device_of(args.device)
    if args.command in ("decode", "chat"):
        result = decode(args) if args.command == "decode" else chat(args)
        append(args.output, result)
    else:
        result = {"benchmark": args.command, "rows": compare(args)}
    print(json.dumps(result, default=str))


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        return report_errors(lambda: run(args), args.debug)
    except (MemoryError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
