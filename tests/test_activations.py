"""Products of many rows with x in fp8: where the option is taken, what it changes, and what is refused."""

import dataclasses
import json

import pytest
import torch

import generate
from generate import Engine, fill_randomly
from model import SHAPES, Transformer
from prefill import Piece
from quantize import make_recipe
from sampling import SamplingParams

TINY = {
    "num_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
    "vocab_size": 128, "tie_word_embeddings": False,
}  # fmt: skip
LONG, SHORT = [int(i) % 100 for i in torch.arange(80) * 37], [5, 9, 77]


def make(mode, shape="qwen2.5-7b"):
    """A tiny model with biases, its weights five times the usual, so that tokens depend on them."""
    config = dataclasses.replace(SHAPES[shape], dtype=torch.float32, **TINY)
    model = Transformer(make_recipe(mode, config).config(config) if mode else config)
    fill_randomly(model)
    for layer in model.layers:
        for weight in (layer.attention.wqkv, layer.attention.wo, layer.feed_forward.w13, layer.feed_forward.w2):
            (weight.scale if mode else weight.weight).mul_(5)
    return model


@pytest.fixture(scope="module")
def model():
    return make("fp8")


def hidden(engine, prompt):
    """The hidden state of a prompt's last token, by the engine's own prefill."""
    engine.prepare(1, 128)
    with torch.no_grad():
        return engine.prefiller.run([Piece(0, prompt)]).double()


@pytest.mark.parametrize(("prompt", "is_rounded"), [(LONG, True), (LONG[:64], False), (SHORT, False)])
def test_long_prompts_are_rounded(model, prompt, is_rounded):
    """Only products of more than 64 rows; engines over one model take turns."""
    plain, rounded = (Engine(model, activation_dtype=name, max_seq_len=128) for name in ("auto", "fp8"))
    first, second, again = hidden(plain, prompt), hidden(rounded, prompt), hidden(plain, prompt)
    assert torch.equal(first, again)
    assert torch.equal(first, second) != is_rounded
    assert (first - second).norm() < 0.05 * first.norm()


def test_compiled_prefill_and_large_batches(model):
    """Compiled for all lengths, and in steps of 65 sequences: the tokens of the plain way."""
    params = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)
    prompts = [LONG[i:] for i in range(65)]
    outputs = []
    for options in ({}, {"compile_prefill": True, "decode_mode": "compile"}):
        engine = Engine(model, activation_dtype="fp8", max_seq_len=128, **options)
        outputs.append([out.tokens for out in engine.generate(prompts, params)[0]])
        assert ("compiled" in engine.path) == bool(options)
    assert outputs[0] == outputs[1]
    assert len({tuple(tokens) for tokens in outputs[0]}) > 1


def test_paths_say_it(model):
    for name, said in (("auto", False), ("fp8", True)):
        engine = Engine(model, activation_dtype=name, max_seq_len=128)
        for batch_size in (1, 65):
            engine.prepare(batch_size, 100)
            assert ("x in fp8 from 65 rows on" in engine.prefiller.path) == said
            assert ("x in fp8 from 65 rows on" in engine.path) == (said and batch_size == 65)


@pytest.mark.parametrize(("mode", "found"), [(None, "fp32"), ("int8", "int8")])
def test_other_weights_are_refused(mode, found):
    engine = Engine(make(mode, "llama-3.2-1b"), activation_dtype="fp8", max_seq_len=128)
    with pytest.raises(ValueError, match=f"activation_dtype: found fp8 with weights in {found}, expected fp8 weights"):
        engine.generate([SHORT], SamplingParams(max_new_tokens=2))


def test_other_options_are_refused(model):
    with pytest.raises(ValueError, match="activation_dtype: found 'int8', expected one of auto, fp8"):
        Engine(model, activation_dtype="int8")
    with pytest.raises(ValueError, match="batch_invariant: found with activation_dtype fp8, expected one of them"):
        Engine(model, activation_dtype="fp8", batch_invariant=True)


def test_command_line(capsys):
    flags = ["--prompt", "80", "--max_new_tokens", "3", "--device", "cpu", "--temperature", "0", "--max_seq_len", "128"]
    assert generate.main([*flags, "--json", "--quantize", "fp8", "--activation-dtype", "fp8"]) == 0
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "x in fp8" in out["metrics"]["prefill_path"]
    assert generate.main([*flags, "--activation_dtype", "fp8"]) == 1
    assert "error: activation_dtype: found fp8 with weights in bf16, expected fp8 weights" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        generate.main([*flags, "--activation_dtype", "int8"])
    assert error.value.code == 2
