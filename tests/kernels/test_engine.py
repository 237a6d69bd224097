"""The engine through the kernels, from prompt to tokens: what the parts' own tests cannot see is how they are wired."""

import dataclasses

import torch

from generate import Engine, fill_randomly
from model import SHAPES, PrefillStep, Transformer
from sampling import SamplingParams

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = {"num_layers": 1, "hidden_size": 128, "intermediate_size": 192, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 301}


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
