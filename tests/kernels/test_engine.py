"""The engine through the kernels, from prompt to tokens: what the parts' own tests cannot see is how they are wired."""

import dataclasses

import pytest
import torch

from generate import Engine, fill_randomly
from model import SHAPES, PrefillStep, Transformer
from sampling import SamplingParams

pytestmark = pytest.mark.usefixtures("few_programs")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = {"num_layers": 1, "hidden_size": 128, "intermediate_size": 192, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 301}


def test_fp8_cache():
    """The row that a decode step appends is the nearest e4m3 to the one of a bf16 cache, and attention reads it."""
    model = Transformer(dataclasses.replace(SHAPES["llama-3.2-1b"], **TINY), device=DEVICE)
    fill_randomly(model)
    model.layers[0].attention.wqkv.weight.mul_(10)
    prompt, caches, logits = [5, 9, 300, 77], [], []
    for name in ("auto", "fp8"):
        engine = Engine(model, decode_mode="eager", max_seq_len=16, kv_cache_dtype=name)
        engine.generate([prompt], SamplingParams(temperature=0, max_new_tokens=2))
        caches.append([rows[0, :, : len(prompt) + 1].double() for rows in engine.session.cache.layer(0)])
        logits.append(engine.decoder.logits)
    assert engine.session.cache.k0.dtype == torch.float8_e4m3fn
    for plain, fp8 in zip(*caches, strict=True):  # in a single layer, rows depend on tokens alone
        assert fp8.abs().sum(-1).all(), "a row was not written"
        bound = (plain.abs() / 16).clamp(min=2.0**-10) + plain.abs() * 2.0**-6  # and what bf16 rounds, or truncates, twice
        assert ((fp8 - plain).abs() <= bound).all()
    difference = (logits[0] - logits[1]).abs().nan_to_num().max()
    assert 0 < difference < 0.5 * logits[0][logits[0].isfinite()].std()


def test_tokens_follow_the_plain_model():
    """Greedy tokens of a bf16 model with qk-norm and an odd vocabulary: at each position the token that the kernels
    chose is, in plain float32, at most a rounding below the best."""
    model = Transformer(dataclasses.replace(SHAPES["qwen3-8b"], head_dim=64, **TINY), device=DEVICE)
    fill_randomly(model)
    for name, weight in model.state_dict().items():
        if "norm" not in name:
            weight.mul_(5)
    engine = Engine(model, decode_mode="eager", max_seq_len=64)
    prompt = [5, 9, 300, 77]
    (out,), _ = engine.generate([prompt], SamplingParams(max_new_tokens=3))
    assert len(out.tokens) == 3

    exact = Transformer(model.config, device=DEVICE, dtype=torch.float32)
    exact.load_state_dict({name: t.float() for name, t in model.state_dict().items()})
    exact.setup_rope(64)
    ids = torch.tensor(prompt + out.tokens, device=DEVICE)
    logits = exact.logits(exact(exact.embed(ids), PrefillStep(len(ids))))[len(prompt) - 1 : -1]
    chosen = logits.gather(1, ids[len(prompt) :, None])[:, 0]
    plain = model.logits(model(model.embed(ids), PrefillStep(len(ids))))[len(prompt) - 1 : -1]
    rounding = (plain - logits).abs().max()
    assert (logits.max(dim=1).values - chosen <= 2 * rounding).all()
    assert rounding < logits.std(), "else any token would do"

    (drawn,), _ = engine.generate([prompt], SamplingParams(temperature=1.0, top_k=1, max_new_tokens=2))
    assert drawn.tokens == out.tokens[:2], "top-k 1 is greedy"
