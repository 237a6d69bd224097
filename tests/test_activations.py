"""Prompts' products with x in fp8: where the option is taken, what it changes, and what is refused."""

import dataclasses
import json

import pytest
import torch

import generate
from generate import Engine, fill_randomly
from model import SHAPES, Transformer
from prefill import Piece
from quantize import make_recipe
from runs import Request
from sampling import SamplingParams
from speculative import NgramDrafter

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


@pytest.mark.parametrize("prompt", [LONG, SHORT])
def test_prompts_are_rounded(model, prompt):
    """However long; engines over one model take turns. e4m3 errs by 2.6% RMS, in each of eight products."""
    plain, rounded = (Engine(model, activation_dtype=name, max_seq_len=128) for name in ("auto", "fp8"))
    first, second, again = hidden(plain, prompt), hidden(rounded, prompt), hidden(plain, prompt)
    assert torch.equal(first, again)
    assert 0.01 * first.norm() < (first - second).norm() < 0.15 * first.norm()


PARAMS = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)


def test_steps_are_not(model):
    """From the same cache, they are those of the plain way, whatever their number of rows."""
    engines = [Engine(model, activation_dtype=name, max_seq_len=128) for name in ("auto", "fp8")]
    for engine in engines:
        engine.generate([LONG[i:] for i in range(65)], PARAMS)
    session, other = (engine.session for engine in engines)
    for layer in range(model.config.num_layers):
        for mine, theirs in zip(session.cache.layer(layer), other.cache.layer(layer), strict=True):
            mine.copy_(theirs)
    session.cache.lengths.copy_(other.cache.lengths)
    session.x.copy_(other.x)
    for engine in engines:
        engine.session.done.zero_()
        engine.decoder.run(1, rows=65)
    assert torch.equal(engines[0].decoder.logits, engines[1].decoder.logits)


def test_neither_neighbours_nor_drafts_change_a_token(model):
    """Rows are rounded each by itself, and in prompts only: tokens are those of each prompt alone, and of plain steps."""
    engine = Engine(model, activation_dtype="fp8", max_seq_len=128)
    prompts = [LONG[i : i + 20 + i] for i in range(16)]
    alone = [engine.generate([prompt], PARAMS)[0][0].tokens for prompt in prompts]
    assert [out.tokens for out in engine.generate(prompts, PARAMS)[0]] == alone
    results = engine.generate_many([Request(prompt, PARAMS, id=i) for i, prompt in enumerate(prompts)], 16)
    assert {request.id: outputs[0].tokens for request, outputs in results} == dict(enumerate(alone))
    engine.speculate(NgramDrafter(), 5, adaptive=False)
    assert [out.tokens for out in engine.generate(prompts, PARAMS)[0]] == alone
    assert len({tuple(tokens) for tokens in alone}) > 1


def test_engines_over_one_model_at_once(model):
    """Each rounds as it was asked to, also where the other's run comes between."""
    engine, other = (Engine(model, activation_dtype=name, max_seq_len=128) for name in ("fp8", "auto"))
    requests = [Request(LONG[i:], PARAMS, id=i) for i in range(4)]
    expected = {request.id: outputs[0].tokens for request, outputs in engine.generate_many(requests, 1)}
    found = {}
    for request, outputs in engine.generate_many(requests, 1):
        found[request.id] = outputs[0].tokens
        other.generate([SHORT], PARAMS)
    assert found == expected


def test_compiled_prefill(model):
    """For all lengths: the tokens of the plain way."""
    prompts = [LONG[i:] for i in range(65)]
    outputs = []
    for options in ({}, {"compile_prefill": True, "decode_mode": "compile"}):
        engine = Engine(model, activation_dtype="fp8", max_seq_len=128, **options)
        outputs.append([out.tokens for out in engine.generate(prompts, PARAMS)[0]])
        assert ("compiled" in engine.path) == bool(options)
    assert outputs[0] == outputs[1]
    assert len({tuple(tokens) for tokens in outputs[0]}) > 1


def test_paths_say_it(model):
    for name, said in (("auto", False), ("fp8", True)):
        engine = Engine(model, activation_dtype=name, max_seq_len=128)
        engine.prepare(1, 100)
        assert ("x in fp8" in engine.prefiller.path) == said


@pytest.mark.parametrize(("mode", "found"), [(None, "fp32"), ("int8", "int8")])
def test_other_weights_are_refused(mode, found):
    engine = Engine(make(mode, "llama-3.2-1b"), activation_dtype="fp8", max_seq_len=128)
    with pytest.raises(
        ValueError, match=f"activation_dtype: found fp8 with weights in {found}, expected fp8 weights \\(--quantize fp8\\)"
    ):
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
