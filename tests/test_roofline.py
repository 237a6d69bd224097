"""scripts/roofline.py: every formula against numbers worked by hand, and the bookkeeping against the model itself."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import timing
from kv_cache import KVCache
from model import SHAPES, ModelConfig, PackStep, Transformer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import roofline
from roofline import CARDS, Model, Work, decode, prefill

H200 = CARDS["h200"]
TINY = ModelConfig("llama", 96, 32, 48, 2, 4, 2, 8, 1e-5, 1e4, None, 256, False)


def of(name, body="bf16", head=None) -> Model:
    return Model(SHAPES[name], body, head or body)


def stage(prediction, name):
    return next(s for s in prediction.stages if s.name == name)


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    ("model", "gb", "floor_us"),
    [
        (of("llama-3.2-1b"), 2.472, 557),
        (of("llama-3.1-8b"), 15.01, 3380),
        (of("llama-3.1-8b", "int8"), 7.51, 1690),
        (of("llama-3.1-8b", "int4"), 3.87, 870),
        (of("llama-3.1-8b", "int4", "int8"), 4.125, 929),
        (of("llama-3.2-1b", "int4", "int8"), 0.765, 172),
    ],
)
def test_weights_of_a_step(model, gb, floor_us):
    """16 or 32 layers x (qkv + output + gate/up + down) + head, by hand; the floor is the bytes at 4.44 TB/s."""
    assert model.step_weight_bytes / 1e9 == pytest.approx(gb, rel=1e-3)
    assert model.step_weight_bytes / H200.bytes_per_sec * 1e6 == pytest.approx(floor_us, rel=3e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_bytes_agree_with_the_model_itself(name):
    """The engine's own count: its tensors on the meta device, its cache."""
    transformer = Transformer(SHAPES[name], device="meta")
    assert of(name).step_weight_bytes == timing.weight_bytes_per_step(transformer)
    everything = sum(t.numel() * t.element_size() for t in transformer.state_dict().values())
    assert of(name).resident_weight_bytes == everything
    assert of(name).kv_bytes_per_token * 3 * 16 == KVCache(SHAPES[name], 3, 16, device="meta").num_bytes


def test_kv_bytes_per_token():
    by_hand = {  # 2 (K and V) x layers x KV heads x head size x 2 bytes
        "llama-3.2-1b": 2 * 16 * 8 * 64 * 2,
        "llama-3.2-3b": 2 * 28 * 8 * 128 * 2,
        "llama-3.1-8b": 131072,
        "llama-3.1-70b": 2 * 80 * 8 * 128 * 2,
        "qwen2.5-7b": 2 * 28 * 4 * 128 * 2,
        "qwen3-8b": 2 * 36 * 8 * 128 * 2,
        "mistral-7b": 131072,
    }
    assert {name: of(name).kv_bytes_per_token for name in SHAPES} == by_hand


def test_fp8_cache():
    model = Model(SHAPES["llama-3.1-8b"], cache="fp8")
    assert model.kv_bytes_per_token == of("llama-3.1-8b").kv_bytes_per_token / 2
    assert roofline.largest_batch(H200, model, 8192) > 1.9 * roofline.largest_batch(H200, of("llama-3.1-8b"), 8192)


def test_formats():
    num_bytes = {name: weight.num_bytes(4, 256) for name, weight in roofline.FORMATS.items()}
    assert num_bytes == {"bf16": 2048, "int8": 1024 + 4 * 2, "int4": 512 + 4 * 2 * 2, "fp8": 1024 + 4 * 2}


# ---------------------------------------------------------------- work


def test_decode_attention():
    """8B, 4 sequences, 1000 tokens: K and V of all of them, and 4 D FLOPs for each query head and key."""
    attention = stage(roofline.predict(H200, of("llama-3.1-8b"), decode(4, 1000)), "attention")
    assert attention.kv_bytes == 4 * 1000 * 131072
    assert attention.flops == 4 * 128 * 32 * 4 * 1000 * 32
    assert attention.flops / attention.kv_bytes == 32 / 8  # heads for each KV head, at any batch
    assert attention.bound(H200) == "memory"


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize(("tokens", "context"), [(1, 1), (1, 9), (7, 7), (4, 9)])
def test_pairs_by_counting(tokens, context, window):
    seen = [{k for k in range(q + 1) if window is None or k > q - window} for q in range(context - tokens, context)]
    work = Work("prefill", 3, tokens, context)
    assert work.pairs(window) == sum(map(len, seen))
    assert work.cached(window) == len(set().union(*seen))


def test_sliding_layers_read_no_more_than_their_window():
    config = dataclasses.replace(SHAPES["mistral-7b"], sliding_window=4096, sliding_layers=(True,) * 16 + (False,) * 16)
    attention = stage(roofline.predict(H200, Model(config), decode(1, 10000)), "attention")
    assert attention.kv_bytes == (16 * 4096 + 16 * 10000) * 2 * 1024 * 2


def test_flops_agree_with_the_model_itself():
    """torch counts the products of a real prefill; the head is asked for one position of each sequence."""
    transformer = Transformer(TINY)
    for weight in transformer.state_dict().values():
        weight.normal_()
    transformer.setup_rope(24)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        step = PackStep.of(KVCache(TINY, 1, 24), [(0, 24, 0)])
        transformer.logits(transformer(transformer.embed(torch.arange(24)), step, last_only=True))
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    products = [s for s in roofline.stages(Model(TINY), prefill(1, 24)) if s.weight_bytes]
    assert sum(s.flops for s in products) == counted > 0


def test_prefill_flops_by_hand():
    """8B, 2048 tokens: 2 FLOPs a weight and token, half of the square of attention's pairs; the head, and what the last layer
    does behind q, k and v, once."""
    prediction = roofline.predict(H200, of("llama-3.1-8b"), prefill(1, 2048))
    qkv, behind, head = 6144 * 4096, 4096 * 4096 + 28672 * 4096 + 4096 * 14336, 128256 * 4096
    rows, pairs = 31 * 2048 + 1, 31 * 2048 * 2049 // 2 + 2048
    assert prediction.flops == 2 * (32 * 2048 * qkv + rows * behind + head) + 4 * 4096 * pairs
    assert prediction.bound == "compute"
    kernels = 32 * (3 + 1 + 1 + 3 + 1) + 1 + 3
    head_sec = 2 * head / 4.44e12  # one position: memory-bound
    assert prediction.sec == pytest.approx(prediction.flops / 790e12 + head_sec + kernels * 2e-6, rel=1e-3)


# ---------------------------------------------------------------- time


def test_time_of_a_step_by_hand():
    """1B, batch 1: 16 x 5 kernels, the head and the embedding at 2 us each, on top of the bytes."""
    prediction = roofline.predict(H200, of("llama-3.2-1b"), decode(1, 100))
    assert sum(s.kernels for s in prediction.stages) == 82
    bytes_sec = (2.4716e9 + 100 * 32768) / 4.44e12
    assert prediction.floor_sec == pytest.approx(bytes_sec, rel=2e-3)
    assert prediction.sec == pytest.approx(bytes_sec + 82 * 2e-6, rel=2e-3)
    assert stage(prediction, "attention").bound(H200) == "overhead"
    assert prediction.bound == stage(prediction, "gate/up").bound(H200) == "memory"
    assert sum(prediction.shares.values()) == pytest.approx(1)


def test_what_is_known_of_the_h200():
    """A proof of five kernels a layer in one CUDA graph decoded in 722 us (1B) and 3.87 ms (8B)."""
    for name, measured_ms in (("llama-3.2-1b", 0.722), ("llama-3.1-8b", 3.87)):
        assert roofline.predict(H200, of(name), decode(1, 105)).sec * 1e3 == pytest.approx(measured_ms, rel=0.05)


def test_formats_change_decode_and_not_prefill():
    at = lambda body: [roofline.predict(H200, of("llama-3.1-8b", body), work(1, 1024)) for work in (decode, prefill)]
    bf16, int4, fp8 = at("bf16"), at("int4"), at("fp8")
    assert int4[0].floor_sec < 0.3 * bf16[0].floor_sec
    assert stage(int4[1], "gate/up").sec(H200) == stage(bf16[1], "gate/up").sec(H200)
    assert stage(fp8[1], "gate/up").compute_sec(H200) == stage(bf16[1], "gate/up").compute_sec(H200)


def test_activations_in_fp8():
    """A prompt's products in the layers are at the fp8 peak, where there is one; a step's, and the head's, are not."""
    model = Model(SHAPES["llama-3.1-8b"], "fp8", "fp8", activations="fp8")
    for name in ("qkv", "output", "gate/up", "down", "head"):
        for card, factor in ((H200, 1 if name == "head" else 2), (CARDS["a100"], 1)):
            plain, rounded = (
                stage(roofline.predict(card, m, prefill(1, 1024)), name).compute_sec(card)
                for m in (of("llama-3.1-8b", "fp8"), model)
            )
            assert rounded == pytest.approx(plain / factor, rel=1e-3)
    step = decode(64, 128)
    assert roofline.predict(H200, model, step).sec == roofline.predict(H200, of("llama-3.1-8b", "fp8"), step).sec
    with pytest.raises(ValueError, match="--activation_dtype: found fp8 with weights in int4, expected --quantize fp8"):
        roofline.run(roofline.parse_args(["llama-3.1-8b", "--quantize", "int4", "--activation_dtype", "fp8"]))


def test_ridge():
    """The linears turn where 2 B FLOPs meet `bytes a weight` at 178 FLOP a byte, a little later for the rows they move."""
    for body, rule in (("bf16", 178), ("int8", 89)):
        linears, step = roofline.ridge_batch(H200, of("llama-3.1-8b", body), 128)
        assert rule <= linears <= 1.1 * rule
        assert roofline.predict(H200, of("llama-3.1-8b", body), decode(step, 128)).bound == "compute"
        assert roofline.predict(H200, of("llama-3.1-8b", body), decode(step - 1, 128)).bound != "compute"
    linears, step = roofline.ridge_batch(H200, of("llama-3.1-8b"), 8192)
    assert linears  # K and V of 8192 tokens a sequence weigh more than the products, at any batch
    assert step is None


def test_largest_batch_by_hand():
    """8B on an H200: (0.9 x 141 GiB - 16.06 GB) / (2048 x 131072 bytes of K and V + 128256 logits of 4 bytes)."""
    assert roofline.largest_batch(H200, of("llama-3.1-8b"), 2048) == int(
        (0.9 * 141 * 2**30 - 16.06e9) / (2048 * 131072 + 513024)
    )
    assert roofline.largest_batch(CARDS["rtx4060"], of("llama-3.1-8b"), 1) == 0
    assert roofline.largest_batch(CARDS["rtx4060"], of("llama-3.1-8b", "int4", "int8"), 2048) > 0


# ---------------------------------------------------------------- cards


def test_cards_are_found_by_key_name_and_device():
    for key, card in CARDS.items():
        assert {roofline.find_card(n) for n in (key, key.upper(), card.name, card.device)} == {card}
    assert roofline.find_card("RTX-4090").name == "RTX 4090"
    with pytest.raises(ValueError, match=r"--gpu: found 'NVIDIA L40S', expected one of a100, .*mi300x"):
        roofline.find_card("NVIDIA L40S")


def test_cards_agree_with_the_engine():
    for device, (measured, sheet) in timing.BANDWIDTH.items():
        card = roofline.find_card(device)
        assert card.sheet_gbps * 1e9 == sheet
        assert card.bytes_per_sec == (measured or sheet)


# ---------------------------------------------------------------- measured runs

ROW = {
    "model": "llama-3.2-1b", "batch_size": 1, "prompt_len": 32, "max_new_tokens": 128,
    "tpot_ms": {"p50": 0.75}, "device": "NVIDIA H200",
}  # fmt: skip


def written(path: Path, *rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_measured_runs(tmp_path, capsys):
    vllm = ROW | {"engine": "vllm", "tpot_ms": {"p50": 1.647}}
    int8 = ROW | {"quantize": "int8", "device": None, "gpu": None}
    file = written(tmp_path / "runs.jsonl", ROW, "", vllm, int8, {"benchmark": "chat"})
    runs = roofline.read_runs(file, CARDS["h100"])
    assert "1 lines have no tpot_ms" in capsys.readouterr().err
    assert [r.predicted.card.name for r in runs] == ["H200", "H200", "H100 SXM"]
    assert runs[0].predicted == roofline.predict(H200, of("llama-3.2-1b"), decode(1, 32 + 64))
    assert runs[2].predicted.stages == tuple(roofline.stages(of("llama-3.2-1b", "int8"), decode(1, 96)))
    assert runs[0].ratio == pytest.approx(0.75 / (runs[0].predicted.sec * 1e3))
    assert [r.is_off for r in runs] == [False, True, True]
    text = roofline.run_table(runs)
    assert text.count("*") == 3  # two runs and the legend
    assert "vllm llama-3.2-1b bf16" in text
    assert "1 of 3 within 25%" in text


def test_mixed_lengths_and_means(tmp_path):
    """A run of mixed prompts is predicted at their mean length; the mean of a run counts before its median step."""
    mixed = ROW | {"prompt_len": 100, "padding_ratio": 0.3, "tpot_ms": {"p50": 0.7, "mean": 0.8}}
    (read,) = roofline.read_runs(written(tmp_path / "runs.jsonl", mixed), None)
    assert read.predicted == roofline.predict(H200, of("llama-3.2-1b"), decode(1, 70 + 64))
    assert read.measured_ms == 0.8


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"runs.jsonl:2: found '\{', expected a JSON object"),
        ("[1]", r"runs.jsonl:2: found '\[1\]', expected a JSON object"),
        (ROW | {"batch_size": 0}, r"runs.jsonl:2: batch_size: found 0, expected a positive integer"),
        (ROW | {"prompt_len": None}, r"runs.jsonl:2: prompt_len: found None"),
        (ROW | {"tpot_ms": {"p50": None}}, r"runs.jsonl:2: tpot_ms.p50: found None, expected milliseconds"),
        (ROW | {"tpot_ms": 3}, r"runs.jsonl:2: tpot_ms.p50: found None"),
        (ROW | {"model": "gpt-9"}, r"runs.jsonl:2: model: found 'gpt-9', expected a directory with a config.json or one of"),
        (ROW | {"quantize": ["int4"]}, r"runs.jsonl:2: quantize: found \['int4'\], expected one of bf16, int8, int4, fp8"),
        (ROW | {"kv_cache_dtype": "fp4"}, r"runs.jsonl:2: kv_cache_dtype: found 'fp4', expected one of auto, fp8"),
        (ROW | {"device": "GeForce 256"}, r"runs.jsonl:2: device: found 'GeForce 256', expected one of a100"),
        (ROW | {"device": None}, r"runs.jsonl:2: device: found None, expected a GPU of the table, on the line or as --gpu"),
    ],
)
def test_bad_runs_are_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        roofline.read_runs(written(tmp_path / "runs.jsonl", ROW, row), None)


def test_num():
    values = {0: "0", 1234567: "1,234,567", 12.3456: "12.35", 0.0012: "0.001", -3.46: "-3.460"}
    assert {v: roofline.num(v) for v in values} == values


# ---------------------------------------------------------------- command line


def run(capsys, *argv) -> tuple[int, str, str]:
    status = roofline.main(list(map(str, argv)))
    return status, *capsys.readouterr()


def test_tables(capsys):
    status, out, _ = run(capsys, "llama-3.1-8b", "--batch-size", "1", "16")
    assert status == 0
    assert all(out.count(f"\n{card.name} ") == 2 for card in CARDS.values())
    assert "(too small)" in out
    status, out, _ = run(capsys, "llama-3.1-8b", "--gpu", "H200", "--double_batch", "--context", 128)
    assert status == 0
    assert all(out.count(f"\n{s.name} ") == 2 for s in roofline.stages(of("llama-3.1-8b"), decode(1, 1)))
    assert "the linears from batch 189 on, the whole step from batch 191 on" in out
    assert "\n1024 " in out


def test_doubling_is_measured(capsys, monkeypatch):
    """Beside the prediction stand the measured steps and their growth; batches that were skipped stay empty."""
    import measure

    asked = []

    def fake(benchmark, rows, engines, plan, say):
        asked.extend(rows)
        yield from ({"batch_size": row.batch_size, "tpot_ms": {"mean": 1.0 + row.batch_size}} for row in rows[:3])
        yield {"batch_size": 8, "skipped": "no time"}

    monkeypatch.setattr(measure, "card_of", lambda device: H200)
    monkeypatch.setattr(measure, "measure", fake)
    argv = ["llama-3.1-8b", "--gpu", "h200", "--double_batch", "--measure", "--context", 256]
    status, out, _ = run(capsys, *argv, "--quantize", "int4", "--quantize_head", "int8")
    assert status == 0
    assert [row.batch_size for row in asked] == [2**i for i in range(10)]
    assert {(row.prompt_len, row.max_new_tokens, row.quantize) for row in asked} == {(224, 64, "int4")}
    rows = [line.split() for line in out.split("does the time grow?")[1].splitlines()]
    assert [row[-3:] for row in rows if row and row[0] in ("2", "4")] == [["3.000", "x", "1.50"], ["5.000", "x", "1.67"]]
    assert next(row for row in rows if row and row[0] == "8")[-1] == "yes"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_measuring_needs_the_gpu(capsys):
    status, out, err = run(capsys, "llama-3.1-8b", "--gpu", "h200", "--double_batch", "--measure")
    assert (status, out, err) == (1, "", "error: --measure: found no GPU, expected NVIDIA H200\n")
    with pytest.raises(SystemExit, match="2"):
        roofline.main(["llama-3.1-8b", "--double_batch", "--measure"])
    assert "--measure: found alone, expected it with --double_batch and --gpu" in capsys.readouterr().err


def test_a_checkpoint_directory(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    status, out, _ = run(capsys, tmp_path, "--gpu", "l4", "--json")
    result = json.loads(out.splitlines()[-1])
    assert [p["context"] for p in result["predictions"]] == [256, 256], "the model's, shorter than the default"
    assert status == 0
    assert result["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 2
    assert [p["phase"] for p in result["predictions"]] == ["decode", "prefill"]
    assert result["predictions"][0]["bound"] == "overhead"


def test_chart_and_json(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    file = written(tmp_path / "runs.jsonl", ROW, ROW | {"quantize": "fp8"})
    chart = tmp_path / "chart.png"
    status, out, err = run(capsys, "llama-3.2-1b", "--measured", file, file, "--plot", chart, "--json", "--double_batch")
    result = json.loads(out.splitlines()[-1])
    assert (status, chart.read_bytes()[:4]) == (0, b"\x89PNG")
    assert f"wrote {chart}" in err
    assert [r["measured_ms"] for r in result["runs"]] == [0.75] * 4
    assert len(result["double_batch"]) == 11 * len(CARDS)
    assert set(result["ridge_batch"]["H200"]) == {"linears", "step"}


def test_no_matplotlib(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, err = run(capsys, "llama-3.2-1b", "--plot", tmp_path / "chart.png")
    assert (status, out) == (1, "")
    assert err == "error: --plot: found no matplotlib, expected it to be installed (pip install matplotlib)\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["gpt-9"], "error: MODEL: found 'gpt-9', expected a directory with a config.json or one of llama-3.2-1b,"),
        (["llama-3.2-1b", "--gpu", "4080"], "error: --gpu: found '4080', expected one of a100,"),
        (["llama-3.2-1b", "--context", "131073"], "error: --context: found 131073, expected 1 to the model's 131072"),
        (["llama-3.2-1b", "--measured", "/no/such.jsonl"], "/no/such.jsonl"),
        (["llama-3.2-1b", "--plot", "/"], "error: --plot: found /, expected a file that ends in ."),
        (["llama-3.2-1b", "--plot", "/no/such"], "error: --plot: found /no/such, expected a file that ends in ."),
        (["llama-3.2-1b", "--plot", "/no/such.txt"], "error: --plot: found /no/such.txt, expected a file that ends in ."),
    ],
)
def test_bad_flags_are_named(capsys, argv, message):
    if "--plot" in argv:
        pytest.importorskip("matplotlib")
    status, out, err = run(capsys, *argv)
    assert (status, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1


def test_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        roofline.main(["llama-3.2-1b", "--batch_size", "0"])
    assert "--batch_size: found '0', expected a positive integer" in capsys.readouterr().err
