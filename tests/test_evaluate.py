"""scripts/evaluate.py: figures that a person can check, both paths, and a divergence that sees what a perplexity may miss."""

import json
import math

import pytest
import torch

from generate import DEMO, Engine
from scripts import evaluate

TEXT = "ROMEO:\nWhat say you to my love? I would not have it so, my lord; the king is come to Rome.\n" * 8


@pytest.fixture(scope="module")
def engine():
    return Engine.load(DEMO, device="cpu", dtype=torch.float32, max_seq_len=32)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def test_score():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    other = torch.log(torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]))
    score = evaluate.Score()
    score.add(logits, torch.tensor([0, 1]), other)
    means = score.means(4)
    assert means["perplexity"] == pytest.approx(math.sqrt(1 / (0.5 * 0.8)))
    assert means["bits_per_byte"] == pytest.approx(-(math.log2(0.5) + math.log2(0.8)) / 4)
    assert means["kl"] == pytest.approx((0.25 * math.log(0.5) + 0.5 * math.log(2)) / 2), "reference || model"
    assert means["same_top"] == 0.5


def test_score_of_padding_rows():
    logits = torch.tensor([[0.0, 1.0, -math.inf]])
    score = evaluate.Score()
    score.add(logits, torch.tensor([1]), logits)
    assert score.means(1)["kl"] == 0


def test_windows(engine):
    windows, num_bytes = evaluate.cut_windows(engine, TEXT, 32, 100)
    assert windows.shape == (3, 33)
    assert (windows[:, 0] == engine.tokenizer.bos_id).all()
    scored = b"".join(engine.tokenizer.token_bytes(i) for i in windows[:, 1:].flatten().tolist())
    assert TEXT.encode().startswith(scored), "windows follow each other"
    assert num_bytes == len(scored)


def test_both_paths_agree_with_transformers(engine):
    import transformers

    hf = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    windows, num_bytes = evaluate.cut_windows(engine, TEXT, 32, 100)
    result = evaluate.evaluate(engine, engine, windows, num_bytes, batch_size=2)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(hf(windows[:, :-1]).logits.flatten(0, 1), windows[:, 1:].flatten())
    for path in ("prefill", "decode"):
        assert result[path]["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)
        assert result[path]["kl"] == pytest.approx(0, abs=1e-9)
        assert result[path]["same_top"] == 1


def test_a_wrong_decode_path_shows(engine, monkeypatch):
    """The decode figures come from decode steps: what breaks those changes them alone."""
    windows, num_bytes = evaluate.cut_windows(engine, TEXT, 32, 64)
    engine.prepare(2, 32)
    run = engine.decoder.run
    monkeypatch.setattr(engine.decoder, "run", lambda *a, **k: (engine.session.x.mul_(-1), run(*a, **k)))
    result = evaluate.evaluate(engine, engine, windows, num_bytes, batch_size=2)
    assert result["prefill"]["kl"] == 0
    assert result["decode"]["kl"] > 0.1


def test_command_line(text, capsys):
    flags = ["--window", "32", "--max_tokens", "64", "--device", "cpu", "--dtype", "float32"]
    assert evaluate.main(["--text", str(text), *flags, "--quantize", "int8", "int4", "--groupsize", "32", "64"]) == 0
    out = capsys.readouterr().out.splitlines()
    report = json.loads(out[-1])
    assert [(row["layers"], row["head"]) for row in report["rows"]] == [
        ("fp32", "fp32"), ("int8", "int8"), ("int4 g32", "int8"), ("int4 g64", "int8")
    ]  # fmt: skip
    assert len(out) == 2 + 4 + 1, "a table and a line of JSON"
    size = [row["bytes_per_step"] for row in report["rows"]]
    assert size[0] > size[1] > size[2] > size[3]
    kl = [row["prefill"]["kl"] for row in report["rows"]]
    assert kl[0] == 0 < kl[1] < kl[2] < kl[3]


def test_paired():
    """Windows that differ much among each other, and by little between two models: only the pairing shows it."""
    nats = torch.rand(400, dtype=torch.float64) * 10
    other = nats - 0.01 + torch.randn(400, dtype=torch.float64) * 0.02
    result = evaluate.paired(other.tolist(), nats.tolist())
    assert result["change"] == pytest.approx(math.expm1((other - nats).mean()), abs=1e-12)
    assert 0.0008 < result["stderr"] < 0.0012
    assert evaluate.paired([1.0, 3.0], [1.0, 3.0]) == {"change": 0, "stderr": 0, "windows": 2}


def test_quantisers_of_one_format_are_paired(text, capsys):
    flags = [
        "--window",
        "32",
        "--max_tokens",
        "96",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--quantize",
        "int4",
        "int4",
        "int8",
    ]
    assert evaluate.main(["--text", str(text), *flags]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert lines[-1] == "int4 against int4, int4 g128: perplexity +0.000% ± 0.000% over 3 windows"
    (pair,) = report["pairs"]
    assert pair["names"] == ["int4", "int4"]
    plain, int4, _, int8 = report["rows"]
    assert "paired" not in plain
    ratio = int4["prefill"]["perplexity"] / plain["prefill"]["perplexity"]
    assert int4["paired"]["change"] == pytest.approx(ratio - 1)
    assert int4["paired"]["stderr"] > int8["paired"]["stderr"] > 0


def test_fp8_cache(text, capsys):
    """A row of its own, whose decode path alone differs from the reference's, and by little."""
    flags = ["--window", "32", "--max_tokens", "64", "--device", "cpu", "--dtype", "float32", "--kv_cache_dtype", "fp8"]
    assert evaluate.main(["--text", str(text), *flags]) == 0
    plain, fp8 = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert (plain["cache"], fp8["cache"]) == ("fp32", "fp8")
    assert plain["prefill"] == fp8["prefill"]
    assert plain["decode"]["kl"] < 1e-6 < fp8["decode"]["kl"] < 0.02


def test_activations_in_fp8(text, capsys):
    """They change what prefill says, not decode steps; other weights are refused, and none at all."""
    flags = ["--text", str(text), "--window", "80", "--max_tokens", "80", "--device", "cpu", "--dtype", "float32", "--quantize"]
    both = []
    for name in ("auto", "fp8"):
        assert evaluate.main([*flags, "fp8", "--activation_dtype", name]) == 0
        lines = capsys.readouterr().out.splitlines()
        plain, fp8 = json.loads(lines[-1])["rows"]
        assert (plain["activation_dtype"], fp8["activation_dtype"]) == ("auto", name)
        assert ("| fp8, x fp8 |" in lines[3]) == (name == "fp8")
        both.append(fp8)
    assert both[0]["decode"] == both[1]["decode"]
    assert both[0]["prefill"]["kl"] != both[1]["prefill"]["kl"] < 0.01
    assert evaluate.main([*flags, "int8", "--activation_dtype", "fp8"]) == 1
    assert "found fp8 with weights in int8, expected fp8 weights" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit):
        evaluate.main([*flags[:-1], "--activation_dtype", "fp8"])
    assert "--activation_dtype: found fp8, expected --quantize fp8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [(["--window", "2000"], "2000"), (["--max_tokens", "3"], "max_tokens 3"), (["--reference", "/nowhere"], "/nowhere")],
)
def test_errors_are_one_line(text, capsys, flags, named):
    assert evaluate.main(["--text", str(text), "--device", "cpu", *flags]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert named in error


@pytest.mark.parametrize("flags", [["--groupsize", "32"], ["--asymmetric"], ["--no_search"], ["--quantize_head", "int8"]])
def test_flags_of_quantize_alone(text, capsys, flags):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--text", str(text), *flags])
    assert f"error: {flags[0]}: found without --quantize, expected both" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "named"), [(b"", "found 0 tokens, expected"), (b"caf\xe9", "found byte 0xe9 at 3, expected UTF-8")]
)
def test_a_text_that_is_none(tmp_path, capsys, content, named):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    assert evaluate.main(["--text", str(path), "--device", "cpu"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {path}: ")
    assert named in error
