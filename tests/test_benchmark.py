"""scripts/benchmark.py, measure.py, engines.py and explain.py: real runs of the demo model, and the bookkeeping by hand."""

import csv
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import benchmark
import benchmark_batching
import benchmark_kernels
import benchmark_prefill
import comparison
import explain
import measure
import roofline
import speculate
import tune
from explain import Span
from measure import Plan, Row, Worker, WorkerError

DEMO = os.path.relpath(Path(__file__).parent.parent / "assets" / "demo")
H200 = roofline.CARDS["h200"]
TINY = ["--dtype", "float32", "--device", "cpu"]


def run(capsys, *argv) -> tuple[int, str, str]:
    status = benchmark.main(list(map(str, argv)))
    return status, *capsys.readouterr()


# ---------------------------------------------------------------- engines beside each other


def test_engines_give_the_same_answers(capsys, tmp_path):
    """Both on the same prompts of mixed lengths, in float32: equal greedy tokens. What is not there is named."""
    pytest.importorskip("transformers")
    file = tmp_path / "runs.jsonl"
    names = ["rooflama", "transformers", "transformers-static", "gpt-fast"]
    shape = ["--batch-size", 3, "--prompt_len", 24, "--max_new_tokens", 12, "--padding_ratio", 0.25]
    engines = ["--engines", *names, "--decode_mode", "eager"]
    status, out, err = run(capsys, "latency", *TINY, *shape, *engines, "--output", file)
    assert status == 0
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [r["engine"] for r in records] == names
    assert records == json.loads(out.splitlines()[-1])["rows"]
    ours, theirs, static, absent = records
    assert theirs["same_answers"] == static["same_answers"] == 1.0
    assert absent["skipped"] == "--gpt_fast_dir: not given, expected a checkout of gpt-fast"
    assert "gpt-fast demo plain, batch 3, 24/12, padding 0.25: absent: --gpt_fast_dir" in err
    assert "Not measured:\n  gpt-fast" in out
    for r in (ours, theirs, static):
        assert len(r["e2e_sec_of_each_run"]) == 3
        assert r["e2e_sec"] == statistics.median(r["e2e_sec_of_each_run"])
        assert r["output_tok_per_sec"] == pytest.approx(36 / r["e2e_sec"])
        assert r["total_tok_per_sec"] == pytest.approx((36 + 54) / r["e2e_sec"])
        assert 0 < r["ttft_sec"] < r["e2e_sec"]
        assert r["tpot_ms"]["of"] == "steps"
        assert r["tpot_ms"]["p50"] <= r["tpot_ms"]["p90"] <= r["tpot_ms"]["p99"]
        assert r["same_tokens_in_each_run"]
        assert {"load_sec", "compile_sec", "peak_memory_bytes", "torch", "triton", "commit", "engine_version"} <= r.keys()
    assert theirs["engine_version"] != ours["engine_version"]


def test_records_are_read_by_the_roofline(tmp_path):
    """What measure writes of a quantised row is what roofline predicts, mixed lengths included."""
    row = Row("llama-3.1-8b", 16, 256, 128, "int4", 0.25, "fp8")
    record = {**dataclasses.asdict(row), "quantize": row.formats[0], "quantize_head": row.formats[1]}
    record |= {"engine": "rooflama", "gpu": "NVIDIA H200", "tpot_ms": {"mean": 2.0, "p50": 1.9}}
    read = roofline.parse_run(record, "here")
    assert read.predicted.sec == measure.predictions(row, H200)[0].sec
    assert read.measured_ms == 2.0
    assert "int4, head int8, fp8 cache" in read.label
    assert read.predicted.sec < measure.predictions(dataclasses.replace(row, kv_cache_dtype="auto"), H200)[0].sec


def test_activations_in_fp8():
    """A row of its own: another worker, a prefill predicted in less time, a name that says it; vLLM's row stays its rival."""
    plain = Row("llama-3.1-8b", 64, 128, 128, "fp8")
    row = dataclasses.replace(plain, activation_dtype="fp8")
    assert "x in fp8" in str(row)
    assert measure.loaded_as(row) != measure.loaded_as(plain)
    assert measure.setup_of("rooflama", "auto", row, [plain, row], Plan("cuda", "bfloat16", True)).activation_dtype == "fp8"
    (_, rounded), (_, before) = (measure.predictions(r, H200) for r in (row, plain))
    assert 0.5 * before.sec < rounded.sec < 0.6 * before.sec
    record = dataclasses.asdict(row) | {"mode": "fp8", "quantize": "fp8", "quantize_head": "fp8", "gpu": "NVIDIA H200"}
    assert comparison.row_key(record) in comparison.stored_rival()[1]
    assert comparison.row_name(record) == str(row)
    assert "x in fp8" in roofline.parse_run(record | {"tpot_ms": {"p50": 4.0}}, "here").label
    measure.check_row(row)
    for mode, found in ((None, "16 bits"), ("int8", "int8")):
        with pytest.raises(ValueError, match=f"--activation_dtype: found fp8 with weights in {found}, expected --quantize fp8"):
            measure.check_row(dataclasses.replace(row, quantize=mode))


def test_an_engine_that_fails_is_named(tmp_path):
    setup = measure.setup_of("rooflama", "eager", Row(DEMO, 1, 4, 4), [Row(DEMO, 1, 4, 4)], Plan("cpu", "float32", False))
    with pytest.raises(WorkerError, match="no/such") as failed:
        Worker(dataclasses.replace(setup, model="no/such"), time.monotonic() + 60)
    assert failed.value.kind == "failed"
    with pytest.raises(WorkerError, match="No module named 'generate'") as absent:
        Worker(dataclasses.replace(setup, engine="gpt-fast", gpt_fast_dir=str(tmp_path)), time.monotonic() + 60)
    assert absent.value.kind == "absent"
    with pytest.raises(WorkerError, match="time limit") as late:
        Worker(setup, time.monotonic() + 0.1)
    assert late.value.kind == "time"


def test_rows_that_do_not_fit_the_time_are_skipped():
    """Before they begin, when the roofline says so; and without a process when nothing is left."""
    said = []
    plan = Plan("cpu", "float32", False, deadline=time.monotonic())
    records = list(measure.measure("throughput", [Row(DEMO, 1, 4, 4)], [("rooflama", "auto")], plan, said.append))
    assert [r["skipped_kind"] for r in records] == ["time"]
    assert "0 s of the time limit are left" in said[0]
    row, plan = Row("llama-3.1-8b", 1, 128, 2048), Plan("cuda", "bfloat16", True, deadline=time.monotonic() + 20)
    with pytest.raises(WorkerError, match=r"needs about 3\d s"):  # 4 runs of 2047 steps of 3.7 ms, and 4 prompts
        measure.check_time(row, H200, plan, [])
    with pytest.raises(WorkerError, match=r"needs about 6\d s"):  # this engine has been twice as slow as the roofline
        measure.check_time(row, H200, plan, [2.0])


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize(("batch_size", "ratio"), [(1, 0.0), (2, 0.3), (5, 0.5), (64, 0.3), (16, 0.0)])
def test_mixed_lengths(batch_size, ratio):
    row = Row(DEMO, batch_size, 200, 8, padding_ratio=ratio)
    lens = row.prompt_lens()
    assert (len(lens), max(lens)) == (batch_size, 200)
    assert statistics.mean(lens) == pytest.approx(200 * (1 - ratio), abs=0.5)
    assert list(map(len, row.prompts(2048))) == lens
    assert row.prompts(2048) == row.prompts(2048)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "--batch_size: found 0, expected at least 1"),
        ({"batch_size": 99999999}, "--batch_size: found 99999999, expected at most 65,536"),
        ({"max_new_tokens": 1}, "--max_new_tokens: found 1, expected at least 2, for a decode step to time"),
        ({"padding_ratio": 0.6}, "--padding_ratio: found 0.6, expected 0 to 0.5"),
        ({"batch_size": 1, "padding_ratio": 0.3}, "--padding_ratio: found 0.3 at batch 1, expected 0"),
        ({"quantize": "int3"}, "--quantize: found 'int3', expected one of int8,"),
        ({"prompt_len": 1020}, r"found 1020 \+ 8, expected at most the context of 1024"),
    ],
)
def test_bad_rows_are_named(change, message):
    row = dataclasses.replace(Row(DEMO, 2, 16, 8), **change)
    with pytest.raises(ValueError, match=message):
        measure.check_row(row)


def test_vllm_table():
    """All of its rows, the most important first, each of them with a figure to stand beside."""
    rows = comparison.scenario_rows("vllm-table")
    provenance, stored = comparison.stored_rival()
    assert "measured separately" in provenance
    assert {(r.model, r.quantize, r.batch_size, r.prompt_len, r.max_new_tokens, 0.0, "auto") for r in rows} == set(stored)
    assert len(rows) == 20
    assert [(r.model[-2:], r.batch_size) for r in rows[:8]] == [(m, b) for m in ("1b", "8b") for b in (1, 16, 64, 256)]
    assert all(r.max_new_tokens == 2048 for r in rows[-4:])
    for row in rows:
        measure.check_row(row)


@pytest.mark.parametrize("name", comparison.SCENARIOS)
def test_scenarios(name):
    assert len(rows := comparison.scenario_rows(name)) == len(set(rows))


@pytest.mark.parametrize("most", [1, 48, 4096])
@pytest.mark.parametrize("guess", [0, 1, 7, 100, 10**6])
@pytest.mark.parametrize("limit", [0, 1, 3, 16, 100, 5000])
def test_largest_that_fits(guess, limit, most):
    powers = [2**i for i in range(13) if 2**i <= min(limit, most)]
    assert measure.largest_that_fits(lambda batch: batch <= limit, guess, most) == max(powers, default=0)


def test_largest_batch_is_measured_too(capsys, monkeypatch):
    """It asks a worker, which runs out of memory above 4."""

    class FakeWorker:
        alive, loaded = True, {"version": "", "load_sec": 1.0}

        def __init__(self, *_):
            pass

        def run(self, job, deadline):
            if len(job.prompts) > 4:
                raise WorkerError("OutOfMemoryError", "memory")
            each = {"e2e_sec": 1.0, "ttft_sec": 0.5, "step_ms": None, "host_ms": None}
            runs, tokens = [each] * job.timed_runs, [[0] * job.max_new_tokens] * len(job.prompts)
            out = {"compile_sec": 0.0, "runs": runs, "tokens": tokens, "same_tokens": True, "path": ""}
            return out | {"compiled_while_timed": 0, "peak_memory_bytes": 0}

        def close(self):
            pass

    monkeypatch.setattr(measure, "Worker", FakeWorker)
    status, out, err = run(capsys, "throughput", *TINY, "--batch_size", 1, "--max_batch", "--max_new_tokens", 2)
    assert status == 0
    assert "the largest power-of-two batch that fits is 4" in err
    assert [r["batch_size"] for r in json.loads(out.splitlines()[-1])["rows"]] == [1, 4]


# ---------------------------------------------------------------- metrics


def answer(e2e=(1.0, 3.0, 2.0), ttft=(0.1, 0.3, 0.2), step_ms=None) -> dict:
    runs = [{"e2e_sec": e, "ttft_sec": t, "step_ms": step_ms, "host_ms": 0.01} for e, t in zip(e2e, ttft, strict=True)]
    made = {"compile_sec": 4.0, "same_tokens": True, "compiled_while_timed": 0, "peak_memory_bytes": 2**30, "path": "graph"}
    return {"runs": runs, **made}


def test_metrics_by_hand():
    row = Row("llama-3.1-8b", 16, 128, 101)
    m = measure.summary(row, answer())
    assert (m["e2e_sec"], m["ttft_sec"]) == (2.0, 0.2)
    assert m["tpot_ms_of_each_run"] == pytest.approx([9.0, 27.0, 18.0])
    assert m["tpot_ms"] == {
        "p50": pytest.approx(18),
        "p90": pytest.approx(27),
        "p99": pytest.approx(27),
        "mean": pytest.approx(18),
        "of": "runs",
    }
    assert m["output_tok_per_sec"] == 16 * 101 / 2
    assert m["total_tok_per_sec"] == 16 * (101 + 128) / 2
    assert m["prefill_tok_per_sec"] == pytest.approx(16 * 128 / 0.2)
    assert m["decode_tok_per_sec"] == pytest.approx(16 * 100 / 1.8)
    steps = measure.summary(row, answer(step_ms=[1.0, 2.0, 3.0]))["tpot_ms"]
    assert (steps["p50"], steps["of"]) == (2.0, "steps")


def test_mbu_mfu_and_floor_by_hand():
    """8B, batch 16, 128 + 50 tokens of context: weights and K and V over 18 ms and 4.44 TB/s."""
    row = Row("llama-3.1-8b", 16, 128, 101)
    m = measure.summary(row, answer())
    b = measure.beside_roofline(row, m, H200)
    num_bytes = 15.01e9 + 16 * 178 * 131072
    assert b["bytes_per_step"] == pytest.approx(num_bytes, rel=1e-3)
    assert b["mbu"] == pytest.approx(num_bytes / 18e-3 / 4.44e12, rel=1e-3)
    assert b["mbu_datasheet"] == pytest.approx(num_bytes / 18e-3 / 4.8e12, rel=1e-3)
    assert b["floor_ms"] == pytest.approx(num_bytes / 4.44e12 * 1e3, rel=0.02)
    assert b["floor_ratio"] == pytest.approx(18 / b["floor_ms"])
    flops = 2 * 7.5e9 * 16 * (128 + 100)  # of the weights alone, once a token; the head only once a prompt
    assert b["mfu"] == pytest.approx(flops / 2.0 / 790e12, rel=0.1)


def test_comparison_with_stored_figures():
    """Beside an H200's record stands vLLM's; a slow step and a skipped row are marked."""
    row = Row("llama-3.1-8b", 16, 128, 128)
    common = {"benchmark": "throughput", "engine": "rooflama", **dataclasses.asdict(row), "mode": None, "decode_mode": "auto"}
    metrics = measure.summary(row, answer())
    record = common | {"gpu": "NVIDIA H200"} | metrics | measure.beside_roofline(row, metrics, H200)
    text = comparison.comparison([record, common | {"engine": "vllm", "skipped": "vllm cannot be imported"}])
    assert "2,855*" in text
    assert f"{16 * 128 / 2 / 2855:.2f}" in text
    assert f"{record['floor_ratio']:.2f} !" in text
    assert "* vLLM 0.26.0" in text
    assert "vllm llama-3.1-8b plain, batch 16, 128/128: vllm cannot be imported" in text
    assert "70.00*" in text
    assert "Launching a step took the host as long as the step itself in: no row." in text
    assert "Compiled while timed: no row." in text
    bad = record | {"host_ms_per_step": 20.0, "compiled_while_timed": 1, "same_tokens_in_each_run": False}
    assert comparison.comparison([bad]).count(": rooflama llama-3.1-8b plain, batch 16, 128/128.") == 3
    padded = record | {"padding_ratio": 0.3}
    assert "2,855" not in comparison.comparison([padded])
    assert "2,855" not in comparison.comparison([record | {"kv_cache_dtype": "fp8"}])
    here = record | {"engine": "vllm", "output_tok_per_sec": 512.0, "decode_mode": None}
    text = comparison.comparison([record, here])
    assert "2,855" not in text
    assert "2.00" in text


# ---------------------------------------------------------------- explain

LAYER = ["_qkv_kernel", "_flash_decode_kernel", "_linear_kernel", "_linear_kernel", "_linear_kernel"]


def test_kernels_of_a_fused_step():
    stages = ["qkv", "attention", "wo", "gate/up", "down"]
    for choice in (["_choose_kernel", "_advance_kernel"], ["_choose_and_advance_kernel"]):
        classes = explain.classify([*LAYER, *LAYER, "_head_kernel", *choice])
        assert classes == [*stages, *stages, "head", *["choice/advance"] * len(choice)]
        assert [explain.is_advance(name) for name in choice] == [False] * (len(choice) - 1) + [True]


def test_kernels_of_a_large_batch():
    """Products by cuBLAS, what is between them by Inductor; the last step's status goes to the host first."""
    layer = ["triton_red_fused_norm", "nvjet_tst_a", "triton_poi_rope", "_flash_decode_kernel", "nvjet_tst_b",
             "triton_red_fused_norm", "nvjet_tst_a", "triton_poi_silu", "sm90_xmma_gemm_bf16"]  # fmt: skip
    names = ["CatArrayBatchedCopy", "Memcpy DtoH (Device -> Pinned)", *layer, *layer]
    names += ["triton_red_fused_norm", "nvjet_tst_c", "triton_red_argmax", "_advance_kernel"]
    one, e = (
        ["elementwise", "qkv", "elementwise", "attention", "wo", "elementwise", "gate/up", "elementwise", "down"],
        "elementwise",
    )
    assert explain.classify(names) == ["status for the host"] * 2 + one * 2 + [e, "head", "choice/advance", "choice/advance"]


def test_kernels_of_256_rows():
    """gate/up by our kernel, SiLU in it; cuBLAS adds up the parts of its down projection by a kernel of its own."""
    layer = ["_rms_norm_kernel", "nvjet_qkv", "_rope_append_kernel", "_flash_ring_kernel", "nvjet_wo", "_rms_norm_kernel"]
    layer += ["_gate_up_kernel", "nvjet_down_splitK", "void cublasLt::splitKreduce_kernel<32, 16, int, float>"]
    e = "elementwise"
    stages = [e, "qkv", e, "attention", "wo", e, "gate/up", "down", "down"]
    names = [*layer, *layer, "_rms_norm_kernel", "nvjet_head", "_partial_argmax_kernel", "_advance_kernel"]
    assert explain.classify(names) == [*stages, *stages, e, "head", "choice/advance", "choice/advance"]


def test_products_are_known_by_their_names():
    """Every kernel of ours that multiplies, and no other."""
    sources = [path.read_text() for path in sorted((measure.ROOT / "kernels").glob("*.py"))]
    names = {name for source in sources for name in re.findall(r"^def (_\w+_kernel)", source, re.MULTILINE)}
    found = {name for name in names if explain.PRODUCT.search(name) or "_head_kernel" in name}
    others = "accept advance choose dequantize feed flash_decode flash_ring fold_norm lookup partial_argmax quantize_rows"
    others += " rms_norm rope_append silu_mul silu_mul_rows untile_fp8"
    assert names - found == {f"_{name}_kernel" for name in others.split()}


def test_exposed_time():
    """Two steps whose kernels overlap: exposed times and gaps add up to the whole."""
    step = [Span(0, 10, "_qkv_kernel"), Span(4, 16, "_flash_decode_kernel"), Span(6, 14, "_linear_kernel")]
    step += [Span(18, 25, "_head_kernel"), Span(20, 30, "_advance_kernel")]
    later = [Span(s.start + 32, s.end + 32, s.name) for s in step]
    began, steps = explain.split_steps([Span(-5, 0, "prompt"), Span(-1, 0, "_advance_kernel"), *step, *later], 2)
    out = explain.account(began, steps)
    exposed = {name: c["exposed_us_per_step"] for name, c in out["classes"].items()}
    assert exposed == {"qkv": 10, "attention": 6, "wo": 0, "head": 7, "choice/advance": 5}
    assert out["gap_us_per_step"] == (2 + 2 + 2) / 2
    assert out["us_per_step"] == (62 - 0) / 2
    assert sum(exposed.values()) + out["gap_us_per_step"] == out["us_per_step"]
    out["classes"]["head"]["floor_us_per_step"] = 4.0
    text = explain.explain_table(out)
    assert "gaps, no kernel running" in text
    assert "2 steps" in text
    with pytest.raises(RuntimeError, match="the trace has 3 steps, expected more than 3"):
        explain.split_steps([Span(-1, 0, "_advance_kernel"), *step, *later], 3)


# ---------------------------------------------------------------- commands


def test_decode(capsys, tmp_path):
    file = tmp_path / "runs.jsonl"
    lengths = ["--context", 24, "--max_new_tokens", 8, "--repeats", 2]
    status, out, _ = run(capsys, "decode", *TINY, *lengths, "--decode_mode", "eager", "--output", file)
    result = json.loads(out.splitlines()[-1])
    assert status == 0
    assert json.loads(file.read_text()) == result
    assert (result["prompt_len"], result["batch_size"], result["quantize"]) == (16, 1, "bf16")
    assert result["compiled_while_timed"] == 0
    assert "compiled or captured while timed: nothing" in out
    assert f"{result['tpot_ms']['p50']:.4f} ms a step" in out
    status, _, err = run(capsys, "decode", *TINY, *lengths, "--decode_mode", "eager", "--explain")
    assert (status, err.splitlines()[-1]) == (1, "error: --explain: found device cpu, expected a CUDA device")


def test_chat(capsys, tmp_path):
    """The first question warms up; the answers are those of generate, without the stop token."""
    from generate import Engine, SamplingParams

    questions, answers = tmp_path / "questions.txt", tmp_path / "answers.csv"
    questions.write_text("ROMEO:\n\nJULIET:\nTo be, or\n")
    argv = [
        "--questions",
        questions,
        "--csv",
        answers,
        "--max_new_tokens",
        12,
        "--decode_mode",
        "eager",
        "--engines",
        "rooflama",
        "gpt-fast",
    ]
    status, out, err = run(capsys, "chat", *TINY, *argv)
    result = json.loads(out.splitlines()[-1])
    assert status == 0
    rows = list(csv.DictReader(answers.open(newline="")))
    assert [r["engine"] for r in rows] == ["rooflama", "rooflama"]
    engine = Engine.load(DEMO, "cpu")
    outputs, _ = engine.generate(["JULIET:", "To be, or"], SamplingParams(temperature=0.0, max_new_tokens=12))
    assert [r["answer"] for r in rows] != ["", ""]
    assert [int(r["words"]) for r in rows] == [len(r["answer"].split()) for r in rows]
    ours = result["engines"][0]
    assert ours["ms_per_10_words"] == pytest.approx(10 * ours["seconds"] * 1e3 / ours["words"])
    assert ours["ms_per_token"] == pytest.approx(ours["seconds"] * 1e3 / ours["tokens"])
    assert ours["tokens"] == sum(len(o.tokens) for o in outputs)
    assert "gpt-fast: absent: --gpt_fast_dir: not given" in err


SHAPE, EXPECTED_SHAPE = ["--random_weights", "llama-3.2-1b"], "expected N x K, K a multiple of 64, such as 4096x14336"


@pytest.mark.parametrize(
    ("script", "argv", "message"),
    [
        (benchmark, ["latency", "--timed_runs", "2"], "--timed_runs: found 2, expected at least 3"),
        (benchmark, ["sweep", "--warmup_runs", "0"], "--warmup_runs: found 0, expected at least 1"),
        (benchmark, ["decode", "--repeats", "0"], "--repeats: found 0, expected at least 1"),
        (benchmark, ["throughput", "--engines", "llama.cpp"], "invalid choice: 'llama.cpp'"),
        (benchmark, ["sweep", "--max_batch", "99999999"], "--max_batch: found 99999999, expected 1 to 65,536"),
        (benchmark, ["decode", "--context", "64", "--prompt_len", "32"], "--prompt_len: found with --context, expected one of"),
        *(
            (benchmark, [name, *SHAPE, "--checkpoint_path", DEMO], "--checkpoint_path: found with --random_weights, expected")
            for name in ("decode", "latency", "throughput", "sweep")
        ),
        *(
            (benchmark_kernels, ["linear", "--shapes", shape], f"--shapes: found '{shape}', {EXPECTED_SHAPE}")
            for shape in ("banana", "0x0", "128x100")
        ),
        (benchmark_kernels, ["linear", "--rows", "0"], "--rows: found '0', expected 1 to 64"),
        (benchmark_kernels, ["linear", "--rows", "-3"], "--rows: found '-3', expected 1 to 64"),
        (speculate, ["sweep", "--max_new_tokens", "1"], "--max_new_tokens: found 1, expected at least 2"),
        (speculate, ["oracle", "--period", "0"], "--period: found 0, expected at least 1"),
        (speculate, ["oracle", "--alphas", "nan"], "--alphas: found nan, expected 0 to 1"),
        (speculate, ["oracle", "--alphas", "0.5", "2"], "--alphas: found 2, expected 0 to 1"),
        (benchmark_batching, ["kill", "--prompts", "0"], "--prompts: found 0, expected at least 1"),
        (benchmark_batching, ["continuous", "--max_in", "8"], "--min_in: found 32, expected at most --max_in, 8"),
    ],
)
def test_usage(capsys, script, argv, message):
    with pytest.raises(SystemExit, match="2"):
        script.main(argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], []])
def test_usage_of_the_worker(argv):
    worker = [sys.executable, str(Path(benchmark.__file__).with_name("engines.py")), *argv]
    done = subprocess.run(worker, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("usage: scripts/engines.py < JOBS")


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        *((benchmark, [name]) for name in ("decode", "latency")),
        (benchmark, ["chat", "--questions", __file__]),
        (speculate, ["oracle", "--tiny"]),
        (benchmark_batching, ["kill"]),
    ],
)
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "banana"])
def test_no_such_device(capsys, monkeypatch, script, argv, device):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert script.main([*argv, "--device", device]) == 1
    assert capsys.readouterr() == ("", f"error: device: found {device!r}, expected cpu\n")


def test_a_shape_that_a_format_cannot_have(capsys):
    argv = ["linear", "--check_only", "--shapes", "128x192", "--rows", "1", "--formats", "int4"]
    assert benchmark_kernels.main(argv) == 1
    assert capsys.readouterr().err == "error: found 192 columns, expected a multiple of the group size, 128\n"


def test_no_time_measures_nothing(capsys):
    status, out, err = run(capsys, "throughput", *TINY, "--batch_size", 1, "--time_limit", 0)
    assert status == 0
    assert "skipped" in json.loads(out.splitlines()[-1])["rows"][0], err


def test_rows_of_the_prefill_benchmark(capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark_prefill.main(["--rows", "16x128", "axb"])
    assert "--rows: found 'axb', expected BATCHxTOKENS" in capsys.readouterr().err


def test_tuning_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        tune.main(["llama-3.2-1b"])
    assert capsys.readouterr().err.endswith("found no CUDA GPU, expected one\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["decode", "--max_new_tokens", "1"], "error: --max_new_tokens: found 1, expected at least 2"),
        (["decode", "--context", "0"], "error: --context: found 0, expected more than --max_new_tokens, 128"),
        (
            ["latency", "--random_weights", "gpt-9"],
            "error: model: found 'gpt-9', expected a directory with a config.json or one of",
        ),
        (["chat", "--questions", "/no/such"], "/no/such"),
        (["chat", "--questions", f"{DEMO}/model.safetensors"], "model.safetensors: found byte"),
        (["latency", "--output", "/no/such/file"], "/no/such/file"),
    ],
)
def test_bad_flags_are_named(capsys, argv, message):
    status, out, err = run(capsys, *argv)
    assert (status, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1


def test_everything_measured_again(tmp_path):
    """measure_all.sh: each command is one that the script it names takes; of parts that there are not, nothing is run."""
    script, files = Path(__file__).resolve().parent.parent / "scripts" / "measure_all.sh", tmp_path / "again"

    def commands(*parts):
        done = subprocess.run(
            ["bash", script, files, *parts], env=os.environ | {"PYTHON": "echo"}, capture_output=True, text=True
        )
        return done.returncode, [line.split() for line in done.stdout.splitlines()], done.stderr

    status, every, _ = commands()
    assert status == 0
    assert len(every) == 12 + 1 + 10 + 1 + 1 + 1
    for name, *argv in every:
        if name == "scripts/benchmark.py":
            args = benchmark.parse_args(argv)
        else:
            assert name == "scripts/benchmark_kernels.py"
            args = benchmark_kernels.parse_args(argv)
        assert args.output.parent == files
    assert commands("cold", "choose")[1] == [c for c in every if "--cold" in c or c[1] == "choose"]
    assert commands("cold", "everything") == (2, [], commands("everything")[2])
    assert "usage: scripts/measure_all.sh DIRECTORY [decode cold" in commands("everything")[2]
