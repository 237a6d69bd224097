"""benchmarks/README.md and its charts, from the results stored beside it: `scripts/benchmark.py report`.

Owns no figure: each comes from a line of a .jsonl file there, predictions from roofline.py, and what only a person can know
from notes.md, which is copied in. Of several measurements of the same thing the last line counts.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from roofline import TOLERANCE, Run, formats_of, num, parse_run

ENGINE_BENCHMARKS = ("latency", "throughput", "sweep", "double_batch")
KINDS = (
    *ENGINE_BENCHMARKS, "decode", "cold", "chat", "attention", "choose", "linear", "widen", "prefill", "continuous", "kill",
    "speculate oracle", "speculate sweep",
)  # fmt: skip
RIVAL = "vllm_0.26.0_h200.json"
CHARTS = {
    "throughput_vs_tpot.png": "Output tokens a second against time per token as the batch grows (the number at each point)",
    "decode_vs_floor.png": "A decode step beside its floor and its prediction",
    "bandwidth_vs_length.png": "Attention of one token: bytes of K and V a second against the cache's length",
}


def read_records(directory: Path) -> list[dict]:
    """Every line of every .jsonl file there, with the `file` it stands in. ValueError names the line; or there is none."""
    records = []
    for path in sorted(directory.glob("*.jsonl")):
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:  # not JSON, or not UTF-8
                record = None
            if not isinstance(record, dict):
                raise ValueError(f"{path.name}:{number}: found {line[:40].decode(errors='replace')!r}, expected a JSON object")
            records.append(record | {"file": path.name, "where": f"{path.name}:{number}"})
    if not records:
        raise ValueError(f"{directory}: found no records, expected *.jsonl of benchmark.py")
    for record in records:
        kind = record.get("benchmark")
        if kind not in KINDS:
            raise ValueError(f"{record['where']}: benchmark: found {kind!r}, expected one of {', '.join(KINDS)}")
    return records


def last_of_each(records: list[dict]) -> list[dict]:
    """One record for each thing measured, the last, in the order of model, batch and lengths."""
    fields = ("benchmark", "engine", "model", "mode", "batch_size", "prompt_len", "max_new_tokens", "gpu")
    options = {
        "quantize": "bf16",
        "padding_ratio": 0.0,
        "kv_cache_dtype": "auto",
        "activation_dtype": "auto",
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "decode_mode": "auto",
    }
    key = lambda r: (*(r.get(f) for f in fields), *(r.get(f) or default for f, default in options.items()))
    latest = {key(record): record for record in records}
    order = lambda r: (r["model"], formats(r), r["prompt_len"], r["max_new_tokens"], r["batch_size"], r["engine"])
    return sorted(latest.values(), key=order)


def formats(record: dict) -> str:
    body, head = record.get("quantize") or "bf16", record.get("quantize_head")
    cache = record.get("kv_cache_dtype") or "auto"
    x = record.get("activation_dtype") or "auto"
    return formats_of(body, head, cache, x)


def run_of(record: dict) -> Run | None:
    """The record beside its prediction; None for a machine that is not in the table of cards."""
    return parse_run(record, record["where"]) if record.get("gpu") or record.get("device") not in (None, "cpu") else None


# ---------------------------------------------------------------- tables


def markdown(header: str, rows: list[list[str]]) -> str:
    names = header.split("  ")
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def shape(record: dict) -> list[str]:
    padding = f", padding {record['padding_ratio']:g}" if record.get("padding_ratio") else ""
    lengths = f"{record['prompt_len']}/{record['max_new_tokens']}{padding}"
    return [Path(record["model"]).name, formats(record), str(record["batch_size"]), lengths]


def label(record: dict) -> str:
    mode = record.get("decode_mode")
    return record["engine"] + (f" {mode}" if mode not in (None, "auto") else "")


def beside(run: Run | None, ms: float) -> list[str]:
    """Floor, how many times that, prediction, measured / predicted (marked where it is too far off)."""
    if run is None:
        return [""] * 4
    floor_ms, predicted_ms = run.predicted.floor_sec * 1e3, run.predicted.sec * 1e3
    return [num(floor_ms), f"{ms / floor_ms:.2f}", num(predicted_ms), f"{run.ratio:.2f}{' *' if run.is_off else ''}"]


def decode_table(records: list[dict]) -> str:
    rows = []
    for r in records:
        drawn = [f"{name} {r[name]:g}" for name in ("temperature", "top_k", "top_p") if r.get(name)]
        ms = r["tpot_ms"]
        percentiles = [num(ms["p50"]), f"{num(ms['p90'])}, {num(ms['p99'])}"]
        mbu = f"{r['mbu']:.1%}" if r.get("mbu") else ""
        host = num(r["host_ms_per_step"]) if r.get("host_ms_per_step") else ""
        rest = [mbu, num(r["ttft_sec"] * 1e3), host, r.get("commit") or ""]
        rows.append([*shape(r), ", ".join(drawn) or "greedy", *percentiles, *beside(run_of(r), ms["p50"]), *rest])
    names = "model  weights  batch  in/out  sampling  ms a step  p90, p99  floor ms  x floor  predicted ms  ratio"
    return markdown(names + "  MBU  TTFT ms  host ms  commit", rows)


def engine_table(records: list[dict], stored: dict) -> str:
    rows = []
    for r in records:
        run, ms = run_of(r), r["tpot_ms"]["mean"]
        key = (r["model"], r["mode"], r["batch_size"], r["prompt_len"], r["max_new_tokens"])
        alike = "H200" in r.get("gpu", "") and not r["padding_ratio"] and r.get("kv_cache_dtype", "auto") == "auto"
        rival = stored.get(key) if alike and r["engine"] == "rooflama" else None
        rate = r["output_tok_per_sec"]
        theirs = [num(rival["output_tok_per_sec"]), f"{rate / rival['output_tok_per_sec']:.2f}"] if rival else ["", ""]
        shares = [f"{r[f]:.0%}" if r.get(f) else "" for f in ("mbu", "mfu")]
        gib = f"{r['peak_memory_bytes'] / 2**30:.1f}"
        made = r.get("engine_version") or ""
        cells = [num(r["ttft_sec"] * 1e3), num(ms), *beside(run, ms), num(rate), num(r["total_tok_per_sec"]), *shares, gib]
        rows.append([*shape(r), label(r), *cells, *theirs, made])
    names = "model  weights  batch  in/out  engine  TTFT ms  TPOT ms  floor ms  x floor  predicted ms  ratio  output tok/s"
    return markdown(names + "  total tok/s  MBU  MFU  GiB  vLLM's tok/s  ratio to it  version", rows)


def skipped_list(records: list[dict]) -> str:
    lines = [f"- {label(r)}, {', '.join(shape(r))}: {r['skipped']}" for r in records]
    return "\n".join(lines) + "\n"


def off_list(records: list[dict], stored: list[dict]) -> str:
    """The runs that are too far from their prediction, with what their record says of it, or an older one that is `stored`."""
    runs = [(r, run) for r in records if (run := run_of(r))]
    off = [(r, run) for r, run in runs if run.is_off and r["engine"] == "rooflama"]
    text = f"{sum(not run.is_off for _, run in runs)} of {len(runs)} runs are within {TOLERANCE:.0%} of the prediction.\n"
    if off:
        text += "The others of this engine:\n\n"
    traces = {step_key(r): r for r in stored if "classes" in (r.get("explain") or {})}
    for r, run in off:
        traced = r if "classes" in (r.get("explain") or {}) else traces.get(step_key(r))
        text += f"- {', '.join(shape(r))}: {run.ratio:.2f} of the prediction; {why(r, run, traced)}\n"
    return text


def step_key(record: dict) -> tuple:
    """What decides which kernels a step runs: all but lengths."""
    return record["model"], record["mode"], record["batch_size"], record["engine"], record.get("kv_cache_dtype", "auto")


def why(record: dict, run: Run, traced: dict | None) -> str:
    """Where a run lost its time, as far as its own record says, or `traced`, one of steps like its own with a trace."""
    if traced:
        account = traced["explain"]
        whose = "" if traced is record else f"as {shape(traced)[-1]} at {traced.get('commit', 'an unknown commit')}, "
        over = {name: c["exposed_us_per_step"] - c.get("floor_us_per_step", 0.0) for name, c in account["classes"].items()}
        over["gaps"] = account["gap_us_per_step"]
        worst = sorted(over.items(), key=lambda item: -item[1])[:3]
        return f"{whose}over their floors: " + ", ".join(f"{name} by {num(us)} us" for name, us in worst)
    if (record.get("host_ms_per_step") or 0.0) > 0.8 * run.measured_ms:
        return f"the host takes {num(record['host_ms_per_step'])} ms to launch a step: the device waits for it"
    return f"its record has no trace (--explain); the path: {record.get('path', 'unknown')}"


def attention_records(records: list[dict]) -> list[dict]:
    """Those of scripts/benchmark_kernels.py attention, the last of each point."""
    mine = [r for r in records if r.get("benchmark") == "attention" and "seq_n" in r]
    latest = {(r["head_size"], r["batch_size"], r["seq_n"]): r for r in mine}
    return [latest[key] for key in sorted(latest)]


def attention_table(records: list[dict]) -> str:
    rows = []
    for r in records:
        us = [num(r["us"][name]) if name in r["us"] else "" for name in ("ours", "FA2", "cuDNN")]
        gbps, speedup = num(r["gbps"]["ours"]), f"{r['speedup']:.2f}" if r.get("speedup") else ""
        rows.append([f"{r['batch_size']} x {r['seq_n']}", str(r["head_size"]), *us, gbps, speedup, r.get("commit") or ""])
    return markdown("batch x length  head size  ours us  FA2 us  cuDNN us  ours GB/s  best rival / ours  commit", rows)


def speculation_text(records: list[dict]) -> str:
    """Of scripts/speculate.py oracle: what was measured beside the formula, and what a forward of several tokens costs."""
    text = ""
    for r in records:
        rows = [
            [str(x["k"]), f"{x['alpha']:g}", f"{x['tokens_per_round']:.2f}", num(x["ms_per_token"]), f"{x['speedup']:.2f}",
             f"{x['formula']:.2f}", f"{x['share_of_formula']:.1%}", num(x["round_us"]), num(x["host_us_per_round"])]
            for x in r["rows"]
        ]  # fmt: skip
        over = ", ".join(f"{tokens}: {ms / r['plain_ms']:.2f}" for tokens, ms in r["verify_ms"].items())
        adaptive = ", ".join(f"{a['alpha']:g}{' (known)' if a['known'] else ''}: {a['speedup']:.2f}" for a in r["adaptive"])
        text += (
            f"{r['settings']['target']}, drafts by {r['settings']['draft']}, which are right with chance alpha; {r['gpu']}, "
            f"{r['commit']}. A token alone takes {num(r['plain_ms'])} ms, a draft {num(r['draft_ms'])}.\n\n"
            + markdown("k  alpha  tokens a round  ms a token  speed-up  formula  share  round us  host us", rows)
            + f"\nVerification over a plain step, by tokens: {over}.\n"
            f"Speed-up with k chosen as it goes, by alpha: {adaptive}; by n-gram on text that repeats: "
            f"{r['ngram']['speedup']:.2f}.\n"
        )
    return text


def cold_table(records: list[dict]) -> str:
    rows = [
        [*shape(r), num(r["cold"]["first_token_sec"]), num(r["warm"]["first_token_sec"]), r.get("commit") or ""]
        for r in records
    ]
    return markdown("model  weights  batch  in/out  first token, cold s  warm s  commit", rows)


def chat_table(records: list[dict]) -> str:
    rows = []
    for r in records:
        for e in (e for e in r["engines"] if "skipped" not in e):
            cells = [
                num(e["ms_per_10_words"] or 0.0),
                num(e["ms_per_token"]),
                num(e["seconds"]),
                str(e["words"]),
                str(e["tokens"]),
            ]
            rows.append([Path(r["model"]).name, e["engine"], *cells, r.get("commit") or ""])
    return markdown("model  engine  ms per 10 words  ms per token  seconds  words  tokens  commit", rows)


def provenance_table(records: list[dict]) -> str:
    files: dict[str, list[dict]] = {}
    for record in records:
        files.setdefault(record["file"], []).append(record)
    unique = lambda mine, *names: ", ".join(sorted({str(r[n]) for r in mine for n in names if r.get(n)}))
    rows = []
    for file, mine in files.items():
        gpus = ", ".join(sorted({str(r.get("gpu") or r.get("metrics", {}).get("device") or r.get("device")) for r in mine}))
        rows.append([file, str(len(mine)), gpus, *(unique(mine, n) for n in ("torch", "triton", "driver", "commit"))])
    return markdown("file  lines  GPU  torch  triton  driver  commit", rows)


# ---------------------------------------------------------------- the page


def render(directory: Path) -> str:
    """The page's text."""
    records = read_records(directory)
    rival = json.loads((directory / RIVAL).read_text()) if (directory / RIVAL).exists() else {"rows": [], "provenance": ""}
    fields = ("model", "quantize", "batch_size", "prompt_len", "max_new_tokens")
    stored = {tuple(row[f] for f in fields): row for row in rival["rows"]}
    rival_note = f"\nvLLM's tok/s: {rival['provenance']}.\n" if stored else ""
    kind = lambda *names: [r for r in records if r.get("benchmark") in names]
    decoding = last_of_each([r for r in kind("decode") if "tpot_ms" in r])
    engines = last_of_each(kind(*ENGINE_BENCHMARKS))
    attention = attention_records(records)
    measured, skipped = ([r for r in engines if ("skipped" in r) == is_skipped] for is_skipped in (False, True))
    sections = [
        ("A decode step", decoding, lambda: decode_table(decoding)),
        ("Whole runs", measured, lambda: engine_table(measured, stored) + rival_note),
        ("Not measured", skipped, lambda: skipped_list(skipped)),
        ("Predicted and measured", decoding + measured, lambda: off_list(decoding + measured, records)),
        ("Questions and answers", kind("chat"), lambda: chat_table(kind("chat"))),
        ("From the start of a process", kind("cold"), lambda: cold_table(kind("cold"))),
        ("Attention of one token", attention, lambda: attention_table(attention)),
        ("Speculation", kind("speculate oracle"), lambda: speculation_text(kind("speculate oracle"))),
        ("Where it comes from", records, lambda: provenance_table(records)),
    ]
    text = (
        "# Stored results\n\n"
        "Made by `python scripts/benchmark.py report` from the files of this directory; edit those, or notes.md.\n"
        "Greedy and EOS ignored unless said otherwise; medians. Output tok/s: over the whole run, prefill included; total:\n"
        "prompt tokens counted too. Floor: the sum over a step's kernels of max(bytes / bandwidth, FLOPs / peak); predicted:\n"
        "with 2 us a kernel on top (`scripts/roofline.py`); ratio: measured / predicted, * where it is more than "
        f"{TOLERANCE:.0%}\noff. MBU: of the read bandwidth measured on one such card. GiB: peak allocated.\n"
    )
    for title, content, table in sections:
        if content:
            text += f"\n## {title}\n\n{table()}"
    charts = [f"![{caption}]({name})\n" for name, caption in CHARTS.items() if name in drawable(records)]
    if charts:
        text += "\n## Charts\n\n" + "\n".join(charts)
    if (directory / "notes.md").exists():
        text += "\n" + (directory / "notes.md").read_text()
    return text


def drawable(records: list[dict]) -> set[str]:
    """The charts that there is something to draw on."""
    batches = {r["batch_size"] for r in records if r.get("benchmark") in ENGINE_BENCHMARKS and "tpot_ms" in r}
    kinds = {r.get("benchmark") for r in records}
    wanted = {"throughput_vs_tpot.png": len(batches) > 1, "decode_vs_floor.png": "decode" in kinds}
    wanted["bandwidth_vs_length.png"] = bool(attention_records(records))
    return {name for name, there in wanted.items() if there}


def write(directory: Path) -> None:
    """README.md and the charts. ValueError: a line that is no record; no matplotlib."""
    records = read_records(directory)
    text = render(directory)
    for name in sorted(drawable(records)):
        DRAW[name](directory / name, records, directory)
        print(f"wrote {directory / name}", file=sys.stderr)
    (directory / "README.md").write_text(text)
    print(f"wrote {directory / 'README.md'}", file=sys.stderr)


# ---------------------------------------------------------------- charts


def new_axes(title: str, **options):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("report: found no matplotlib, expected it to be installed (pip install matplotlib)") from None
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.add_subplot(title=title, **options)
    axes.grid(which="both", linewidth=0.3)
    return figure, axes


def draw_throughput(path: Path, records: list[dict], directory: Path) -> None:
    figure, axes = new_axes(
        CHARTS[path.name], xscale="log", yscale="log", xlabel="ms per token (TPOT)", ylabel="output tokens/s over the whole run"
    )
    lines: dict[tuple[str, str], dict[int, tuple[float, float]]] = {}  # (engine, shape): its points by batch
    for r in last_of_each([r for r in records if r.get("benchmark") in ENGINE_BENCHMARKS and "tpot_ms" in r]):
        model, weights, _, lengths = shape(r)
        mine = lines.setdefault((label(r), f"{model} {weights} {lengths}"), {})
        mine[r["batch_size"]] = r["tpot_ms"]["mean"], r["output_tok_per_sec"]
    if (directory / RIVAL).exists():
        for r in json.loads((directory / RIVAL).read_text())["rows"]:
            name = f"{r['model']} {r['quantize'] or 'bf16'} {r['prompt_len']}/{r['max_new_tokens']}"
            lines.setdefault(("vLLM 0.26.0, stored,", name), {})[r["batch_size"]] = r["ms_per_step"], r["output_tok_per_sec"]
    engines, shapes = (list(dict.fromkeys(names)) for names in zip(*lines, strict=True))
    for (engine, name), points in lines.items():
        if len(points) > 1:
            style = f"C{shapes.index(name) % 10}{'osD^v'[engines.index(engine) % 5]}{'--' if 'stored' in engine else '-'}"
            axes.plot(*zip(*(points[batch] for batch in sorted(points)), strict=True), style, label=f"{engine} {name}")
            for batch, point in points.items():
                axes.annotate(str(batch), point, (5, 4), textcoords="offset points", fontsize=7)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def draw_decode(path: Path, records: list[dict], _: Path) -> None:
    """Bars in units of the floor: models of any size on one scale."""
    mine = [r for r in last_of_each([r for r in records if r.get("benchmark") == "decode" and "tpot_ms" in r]) if run_of(r)]
    figure, axes = new_axes(CHARTS[path.name], ylabel="times the floor")
    for i, r in enumerate(mine):
        run, ms = run_of(r), r["tpot_ms"]["p50"]
        floor_ms = run.predicted.floor_sec * 1e3
        label = {"label": "measured"} if i == 0 else {}
        axes.bar(i, ms / floor_ms, width=0.6, color="C0", **label)
        axes.annotate(f"{num(ms)} ms", (i, ms / floor_ms), (0, 2), textcoords="offset points", ha="center", fontsize=7)
        label = {"label": "predicted"} if i == 0 else {}
        axes.plot([i - 0.35, i + 0.35], [run.predicted.sec * 1e3 / floor_ms] * 2, "C1-", linewidth=2, **label)
    axes.axhline(1, color="k", linewidth=1, label="floor")
    drawn = lambda r: "" if not r.get("temperature") else "\nsampled"
    names = [f"{' '.join(shape(r)[:2])}\nbatch {r['batch_size']}, {shape(r)[3]}{drawn(r)}" for r in mine]
    axes.set_xticks(range(len(mine)), names, rotation=60, ha="right", fontsize=7)
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_bandwidth(path: Path, records: list[dict], _: Path) -> None:
    mine = attention_records(records)
    sizes = sorted({r["head_size"] for r in mine})
    figure, axes = new_axes(CHARTS[path.name], xscale="log", xlabel="tokens in the cache of each sequence", ylabel="GB/s")
    for i, (size, batch) in enumerate((s, b) for s in sizes for b in sorted({r["batch_size"] for r in mine})):
        points = sorted((r["seq_n"], r["gbps"]) for r in mine if (r["head_size"], r["batch_size"]) == (size, batch))
        for name, line in (("ours", "-o"), ("cuDNN", ":x")):
            there = [(n, gbps[name]) for n, gbps in points if name in gbps]
            if there:
                axes.plot(*zip(*there, strict=True), f"C{i % 10}{line}", label=f"{name}, head size {size}, batch {batch}")
    axes.axhline(4440, color="k", linewidth=0.8, label="4,440 GB/s, read bandwidth of an H200")
    axes.set_xscale("log", base=2)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


DRAW = {
    "throughput_vs_tpot.png": draw_throughput,
    "decode_vs_floor.png": draw_decode,
    "bandwidth_vs_length.png": draw_bandwidth,
}
