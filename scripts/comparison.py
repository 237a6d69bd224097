"""Engines beside each other: the scenarios that are measured, and the tables of what came out.

Owns the order of a scenario's rows and what a table says; measures nothing. vLLM's figures on an H200 stand in a file, with
where they come from: they are shown beside ours where vLLM was not measured in the same run.
"""

import dataclasses
import json

from measure import ROOT, Row
from roofline import num, table

RIVAL_FILE = ROOT / "benchmarks" / "vllm_0.26.0_h200.json"
LENGTHS = [(128, 128), (2048, 128), (128, 2048), (2048, 2048)]  # (prompt, answer), the longest runs last
SCENARIOS = ("vllm-table", "grid", "padding")


def scenario_rows(name: str) -> list[Row]:
    """The rows of a scenario by importance: what a time limit cuts off comes last."""
    models = ("llama-3.2-1b", "llama-3.1-8b")
    if name == "vllm-table":
        fields = ("model", "batch_size", "prompt_len", "max_new_tokens", "quantize")
        rows = [Row(*(row[f] for f in fields)) for row in stored_rival()[1].values()]
        rows = [dataclasses.replace(r, activation_dtype="fp8" if r.quantize == "fp8" else "auto") for r in rows]  # as vLLM's
        small = lambda row: row.prompt_len <= 128 and row.max_new_tokens <= 128
        tier = lambda row: 3 if row.max_new_tokens > 128 else 2 if row.quantize else 0 if small(row) else 1
        return sorted(rows, key=lambda row: (tier(row), models.index(row.model), row.quantize or ""))
    if name == "grid":
        return [Row(m, b, *lengths) for lengths in LENGTHS for m in models for b in (1, 16, 64, 256)]
    padded = [(256, 0.3), (2048, 0.3), (4096, 0.0)]  # "padding"
    return [Row(m, b, n, 128, padding_ratio=ratio) for n, ratio in padded for m in models for b in (16, 64)]


def stored_rival() -> tuple[str, dict]:
    """Where the stored figures of vLLM come from, and its rows by `row_key`."""
    data = json.loads(RIVAL_FILE.read_text())
    fields = ("model", "quantize", "batch_size", "prompt_len", "max_new_tokens")
    return data["provenance"], {(*(row[f] for f in fields), 0.0, "auto"): row for row in data["rows"]}


def row_key(record: dict) -> tuple:
    """What is measured, whatever engine does it and however it multiplies."""
    fields = ("model", "mode", "batch_size", "prompt_len", "max_new_tokens", "padding_ratio", "kv_cache_dtype")
    return tuple(record[f] for f in fields)


def row_name(record: dict) -> str:
    return str(
        Row(**{f.name: record[f.name] for f in dataclasses.fields(Row) if f.name != "quantize"}, quantize=record["mode"])
    )


def label(record: dict) -> str:
    mode = record["decode_mode"]
    return record["engine"] + (f" {mode}" if mode not in (None, "auto") else "")


def comparison(records: list[dict]) -> str:
    """A line a row and engine, beside the floor and vLLM: measured in this run, or stored."""
    provenance, stored = stored_rival()
    done = [r for r in records if "skipped" not in r]
    here = {row_key(r): r for r in done if r["engine"] == "vllm"}
    cells, quoted = [], False
    for r in done:
        rival, mark = here.get(row_key(r)), ""
        if rival is None and "H200" in r.get("gpu", ""):
            rival, mark = stored.get(row_key(r)), "*"
            quoted = quoted or rival is not None
        beside = ["", "", ""]
        if rival and r["engine"] != "vllm":
            rate = rival["output_tok_per_sec"]
            beside = [num(rival["ttft_sec"] * 1e3) + mark, num(rate) + mark, f"{r['output_tok_per_sec'] / rate:.2f}"]
        floor = ["", ""]
        if "floor_ms" in r:
            floor = [num(r["floor_ms"]), f"{r['floor_ratio']:.2f}{' !' if r['floor_ratio'] > 2 else ''}"]
        shares = [f"{r[f]:.0%}" if f in r else "" for f in ("mbu", "mfu", "mfu_prefill")]
        times = [num(r["ttft_sec"] * 1e3), num(r["tpot_ms"]["mean"]), *floor]
        rates = [num(r["output_tok_per_sec"]), num(r["total_tok_per_sec"]), *shares, f"{r['peak_memory_bytes'] / 2**30:.1f}"]
        cells.append([row_name(r), label(r), *times, *rates, *beside])
    header = "row  engine  TTFT ms  TPOT ms  floor ms  x floor  output tok/s  total tok/s  MBU  MFU  prefill's  GiB"
    header += "  vLLM TTFT ms  vLLM tok/s  ratio"
    return (table(header, cells) if cells else "") + "\n".join(notes(records, provenance if quoted else None)) + "\n"


def notes(records: list[dict], provenance: str | None) -> list[str]:
    """What the table's reader must know, and what of it is not as it should be."""
    lines = [
        "Output tokens a second over the whole run, prefill included; total: prompt tokens counted too. Medians.",
        "floor: the sum over a step's kernels of max(bytes / bandwidth, FLOPs / peak); ! more than twice that.",
    ]
    lines += [f"* {provenance}"] if provenance else []
    done = [r for r in records if "skipped" not in r]
    names = lambda which: "; ".join(f"{label(r)} {row_name(r)}" for r in which) or "no row"
    ours = [r for r in done if r["host_ms_per_step"] is not None]
    if ours:
        slow = [r for r in ours if r["host_ms_per_step"] >= r["tpot_ms"]["mean"]]
        lines.append(f"Launching a step took the host as long as the step itself in: {names(slow)}.")
    lines.append(f"Compiled while timed: {names([r for r in done if r['compiled_while_timed']])}.")
    lines.append(f"Tokens that differed between runs: {names([r for r in done if not r['same_tokens_in_each_run']])}.")
    agree = [r["same_answers"] for r in done if "same_answers" in r]
    lines += [f"Greedy answers equal to those of the first engine: {min(agree):.0%}, the least of any row."] if agree else []
    skipped = [f"  {label(r)} {row_name(r)}: {r['skipped']}" for r in records if "skipped" in r]
    return lines + (["Not measured:", *skipped] if skipped else [])


def percentiles(records: list[dict]) -> str:
    rows = []
    for r in (r for r in records if "skipped" not in r):
        scaled = lambda values, factor: [num(values[p] * factor) for p in ("p50", "p90", "p99")]
        cells = [*scaled(r["ttft_sec_percentiles"], 1e3), *scaled(r["tpot_ms"], 1), *scaled(r["e2e_sec_percentiles"], 1e3)]
        loading = [num(r["load_sec"]), num(r["compile_sec"] or 0.0)]
        rows.append([row_name(r), label(r), *cells, *loading])
    names = "  ".join(f"{m} {p}" for m in ("TTFT ms", "TPOT", "E2E") for p in ("p50", "p90", "p99"))
    return table(f"row  engine  {names}  load s  compile s", rows)
