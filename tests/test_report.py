"""scripts/report.py: the page says what the stored results say, and nothing else."""

import itertools
import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import report
from roofline import num

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
RECORD = {
    "benchmark": "throughput", "engine": "rooflama", "model": "llama-3.1-8b", "mode": None, "quantize": "bf16",
    "quantize_head": "bf16", "batch_size": 16, "prompt_len": 128, "max_new_tokens": 128, "padding_ratio": 0.0,
    "decode_mode": "auto", "gpu": "NVIDIA H200", "torch": "2.11.0", "commit": "abc1234", "engine_version": "abc1234",
    "ttft_sec": 0.05, "tpot_ms": {"mean": 4.0, "p50": 3.9, "p90": 4.1, "p99": 4.2}, "e2e_sec": 0.56,
    "output_tok_per_sec": 3657.0, "total_tok_per_sec": 7314.0, "mbu": 0.85, "mfu": 0.1, "peak_memory_bytes": 2**34,
    "host_ms_per_step": 0.02, "path": "graph: Rooflama's kernels",
}  # fmt: skip


def stored(directory: Path, *records: dict) -> Path:
    (directory / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (directory / report.RIVAL).write_text((BENCHMARKS / report.RIVAL).read_text())
    return directory


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_page_is_what_the_command_makes():
    """python scripts/benchmark.py report"""
    assert (BENCHMARKS / "README.md").read_text() == report.render(BENCHMARKS)
    for chart in report.drawable(report.read_records(BENCHMARKS)):
        assert (BENCHMARKS / chart).read_bytes()[:4] == b"\x89PNG"


def test_the_readme_quotes_stored_results():
    """Every figure in bold type of README's tables of speed is a stored one, rounded as it is there."""
    kept = set()
    for r in report.read_records(BENCHMARKS):
        figures = [*(r.get("tpot_ms") or {}).values(), r.get("output_tok_per_sec")]
        figures = [f for f in figures if type(f) in (int, float)]
        kept |= {f"{f:,.{digits}f}" for f in figures for digits in range(4)}
    speed = (ROOT / "README.md").read_text().split("## Speed\n")[1].split("\n## ")[0]
    bold = [f for row in speed.splitlines() if row.startswith("|") for f in re.findall(r"\*\*([\d.,]+)\*\*", row)]
    assert bold
    assert [f for f in bold if f not in kept] == []


def test_the_readme_quotes_rivals_as_they_are_stored():
    """gpt-fast's and vLLM's columns of the tables of batch 1."""
    kept = set()
    for name in ("rivals_batch1_h200.json", report.RIVAL):
        for row in json.loads((BENCHMARKS / name).read_text())["rows"]:
            ms = row.get("ms_per_token", row.get("ms_per_step"))
            kept |= {f"{ms:.{digits}f}" for digits in (2, 3)}
    lines = (ROOT / "README.md").read_text().splitlines()
    tables = [i for i, line in enumerate(lines) if line.startswith("|") and "gpt-fast" in line]
    found = []
    for i in tables:
        for row in itertools.takewhile(lambda line: line.startswith("|"), lines[i + 2 :]):
            found += re.findall(r"[\d.]+", " ".join(row.split("|")[-3:-1]))
    assert len(found) > 8
    assert [f for f in found if f not in kept] == []


def test_speculation(tmp_path):
    """Each row of the oracle beside the formula; what verification costs over a plain step."""
    row = {"k": 2, "alpha": 0.7, "tokens_per_round": 2.17, "ms_per_token": 2.534, "speedup": 1.451, "formula": 1.5,
           "share_of_formula": 0.9673, "round_us": 5486.0, "host_us_per_round": 190.0}  # fmt: skip
    record = {
        "benchmark": "speculate oracle", "gpu": "NVIDIA H200", "commit": "abc1234", "plain_ms": 4.0, "draft_ms": 0.5,
        "settings": {"target": "llama-3.1-8b", "draft": "llama-3.2-1b"}, "verify_ms": {"1": 4.0, "8": 4.6}, "rows": [row],
        "adaptive": [{"alpha": 0.0, "known": True, "speedup": 0.951}], "ngram": {"speedup": 5.29},
    }  # fmt: skip
    text = section(report.render(stored(tmp_path, record)), "Speculation")
    assert "| 2 | 0.7 | 2.17 | 2.534 | 1.45 | 1.50 | 96.7% | 5,486 | 190.0 |" in text
    assert "1: 1.00, 8: 1.15." in text
    assert "0 (known): 0.95; by n-gram on text that repeats: 5.29." in text


def test_whole_runs(tmp_path):
    """The row beside vLLM's; measured again, the last line counts; what was skipped says why."""
    old = RECORD | {"output_tok_per_sec": 1.0}
    skipped = {f: v for f, v in RECORD.items() if f not in ("tpot_ms", "ttft_sec")} | {"engine": "vllm", "skipped": "no vllm"}
    text = report.render(stored(tmp_path, old, RECORD, skipped))
    rows = [line for line in section(text, "Whole runs").splitlines() if line.startswith("| llama")]
    assert len(rows) == 1
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    assert cells[:5] == ["llama-3.1-8b", "bf16", "16", "128/128", "rooflama"]
    assert {"50.00", "4.000", "3,657", "7,314", "85%", "16.0", "2,855", "1.28", "abc1234"} <= set(cells)
    assert "- vllm, llama-3.1-8b, bf16, 16, 128/128: no vllm" in section(text, "Not measured")
    assert "measured separately" in text
    assert "| runs.jsonl | 3 | NVIDIA H200 | 2.11.0 |  |  | abc1234 |" in text


def test_far_from_the_prediction(tmp_path):
    """More than 25% off is marked, with what the record knows of it: its trace, its host, or nothing."""
    slow = RECORD | {"tpot_ms": {"mean": 8.0, "p50": 8.0, "p90": 8.0, "p99": 8.0}}
    text = section(report.render(stored(tmp_path, slow)), "Predicted and measured")
    assert "0 of 1 runs are within 25%" in text
    assert "its record has no trace (--explain); the path: graph: Rooflama's kernels" in text
    text = section(report.render(stored(tmp_path, slow | {"host_ms_per_step": 7.5})), "Predicted and measured")
    assert "the host takes 7.500 ms to launch a step" in text
    classes = {"qkv": {"exposed_us_per_step": 900.0, "floor_us_per_step": 400.0}, "head": {"exposed_us_per_step": 10.0}}
    traced = slow | {"benchmark": "decode", "explain": {"classes": classes, "gap_us_per_step": 70.0}}
    text = section(report.render(stored(tmp_path, traced)), "Predicted and measured")
    assert "; over their floors: qkv by 500.0 us, gaps by 70.00 us, head by 10.00 us" in text
    lines = section(report.render(stored(tmp_path, slow, traced | {"prompt_len": 32})), "Predicted and measured").splitlines()
    assert sum("; as 32/128 at abc1234, over their floors: qkv by 500.0 us" in line for line in lines) == 1
    later = traced | {"prompt_len": 32, "explain": {"classes": {}, "gap_us_per_step": 1.0}}
    lines = section(report.render(stored(tmp_path, traced, later)), "Predicted and measured").splitlines()
    (own,) = [line for line in lines if ", 128/128: " in line]
    assert "; over their floors: qkv by 500.0 us" in own, "a trace of its own comes before a later one"
    other = traced | {"batch_size": 17}
    assert "as 128/128" not in section(report.render(stored(tmp_path, slow, other)), "Predicted and measured")


def test_a_machine_without_a_card(tmp_path):
    """A CPU's record has no prediction and no rival."""
    cpu = {f: v for f, v in RECORD.items() if f not in ("gpu", "mbu", "mfu")}
    row = next(line for line in report.render(stored(tmp_path, cpu)).splitlines() if line.startswith("| llama"))
    assert "2,855" not in row
    assert num(4.0) in row


def test_charts_and_other_tables(tmp_path):
    pytest.importorskip("matplotlib")
    batches = [RECORD | {"batch_size": b, "output_tok_per_sec": 200.0 * b} for b in (1, 16, 64)]
    decode = RECORD | {"benchmark": "decode", "temperature": 0.8}
    engine = {"engine": "rooflama", "ms_per_10_words": 50.0, "ms_per_token": 4.0, "seconds": 9.0, "words": 7, "tokens": 12}
    chat = {"benchmark": "chat", "model": "some/demo", "engines": [engine, {"engine": "vllm", "skipped": "no"}]}
    cold = RECORD | {"benchmark": "cold", "cold": {"first_token_sec": 31.5}, "warm": {"first_token_sec": 9.25}}
    del cold["tpot_ms"]
    directory = stored(tmp_path, *batches, decode, chat, cold)
    (directory / "notes.md").write_text("## Notes\n\nBy hand.\n")
    report.write(directory)
    text = (directory / "README.md").read_text()
    assert {p.name for p in directory.glob("*.png")} == {"throughput_vs_tpot.png", "decode_vs_floor.png"}
    assert all(f"({p.name})" in text for p in directory.glob("*.png"))
    assert "| demo | rooflama | 50.00 | 4.000 | 9.000 | 7 | 12 |" in text
    assert "| 31.50 | 9.250 | abc1234 |" in text
    assert "temperature 0.8" in section(text, "A decode step")
    assert text.endswith("By hand.\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}\n[1]\n", r"runs.jsonl:2: found '\[1\]', expected a JSON object"),
        (b'\n"\xff"', "runs.jsonl:2: found '\"\ufffd\"', expected a JSON object"),
        (b'{"benchmark": "decode"}\n{"a": 1}', "runs.jsonl:2: benchmark: found None, expected one of latency, throughput,"),
        (b'{"benchmark": ["decode"]}', r"runs.jsonl:1: benchmark: found \['decode'\], expected one of"),
        (b"\n", "found no records, expected \\*.jsonl of benchmark.py"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, message):
    (tmp_path / "runs.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        report.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["runs.jsonl"]
