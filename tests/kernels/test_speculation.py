"""Rounds of speculation through the kernels, from prompt to tokens."""

import dataclasses

import pytest
import torch

from generate import Engine, fill_randomly
from model import SHAPES, PrefillStep, Transformer
from sampling import SamplingParams
from speculative import ModelDrafter, NgramDrafter, Speculator

pytestmark = pytest.mark.usefixtures("few_programs")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = {"num_layers": 1, "hidden_size": 128, "intermediate_size": 192, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 260}


@pytest.mark.parametrize(("params", "drafter"), [({}, "twin"), ({"temperature": 0.7, "top_k": 3}, "ngram")], ids=str)
def test_tokens_follow_the_plain_model(params, drafter, monkeypatch):
    """Of a bf16 model and its twin: the twin's drafts stand, and each greedy token is, in plain float32, at most a rounding
    below the best; a draw within top-k 3 is one of the three."""
    monkeypatch.setattr(Speculator, "_time_ms", lambda self, work: 1.0)
    model = Transformer(dataclasses.replace(SHAPES["llama-3.2-1b"], **TINY), device=DEVICE)
    fill_randomly(model)
    for name, weight in model.state_dict().items():
        if "norm" not in name:
            weight.mul_(5)
    engine = Engine(model, max_seq_len=64)
    engine.speculate(ModelDrafter(model) if drafter == "twin" else NgramDrafter(), 2, adaptive=False)
    prompts = [[5, 9, 200, 77]] if drafter == "twin" else [[5, 9, 200, 77], [8, 8, 8]]
    outputs, timing = engine.generate(prompts, SamplingParams(max_new_tokens=4, ignore_eos=True, **params))
    assert drafter != "twin" or timing.speculation["acceptance_length"] > 2

    exact = Transformer(model.config, device=DEVICE, dtype=torch.float32)
    exact.load_state_dict({name: t.float() for name, t in model.state_dict().items()})
    exact.setup_rope(64)
    for prompt, out in zip(prompts, outputs, strict=True):
        assert len(out.tokens) == 4
        ids = torch.tensor(prompt + out.tokens, device=DEVICE)
        plain, logits = (m.logits(m(m.embed(ids), PrefillStep(len(ids))))[len(prompt) - 1 : -1] for m in (model, exact))
        rounding = (plain - logits).abs().max()
        assert rounding < logits.std(), "else any token would do"
        bound = logits.topk(3 if params else 1, dim=1).values[:, -1]
        assert (bound - logits.gather(1, ids[len(prompt) :, None])[:, 0] <= 2 * rounding).all()
