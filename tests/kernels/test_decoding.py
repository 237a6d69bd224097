"""What a step adds to the kernels where penalty or log-probabilities are asked for: against the same in float32."""

import dataclasses

import pytest
import torch

from decoding import choose_in_kernels
from generate import Engine, fill_randomly
from model import SHAPES, PrefillStep, Transformer
from sampling import KINDS, SamplingParams, SamplingState, choose

pytestmark = pytest.mark.usefixtures("few_programs")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = {"num_layers": 1, "hidden_size": 128, "intermediate_size": 192, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 260}


def test_penalty_and_logprobs_through_the_kernels():
    model = Transformer(dataclasses.replace(SHAPES["llama-3.2-1b"], **TINY), device=DEVICE)
    fill_randomly(model)
    for name, weight in model.state_dict().items():
        if "norm" not in name:
            weight.mul_(5)
    engine = Engine(model, max_seq_len=64)
    prompt = [5, 9, 200, 77]
    params = [
        SamplingParams(max_new_tokens=3, repetition_penalty=1.5, logprobs=3, ignore_eos=True),
        SamplingParams(max_new_tokens=3, repetition_penalty=0.01, ignore_eos=True),
        SamplingParams(max_new_tokens=3, temperature=1.0, top_k=4, seed=1, ignore_eos=True),
    ]
    (first, second, third), _ = engine.generate([prompt] * 3, params)
    (alone,), _ = engine.generate([prompt], params[2])
    assert third.tokens == alone.tokens, "a penalised neighbour does not disturb a draw"
    # a penalty so small makes a seen token with a positive logit win
    assert all(token in {*prompt, *second.tokens[:i]} for i, token in enumerate(second.tokens))

    ids = torch.tensor(prompt + first.tokens, device=DEVICE)
    logits = model.logits(model(model.embed(ids), PrefillStep(len(ids))))[len(prompt) - 1 : -1]
    for i, (entry, row) in enumerate(zip(first.logprobs, logits, strict=True)):
        seen = torch.zeros_like(row, dtype=torch.bool)
        seen[ids[: len(prompt) + i]] = True
        penalized = torch.where(seen, torch.where(row < 0, row * 1.5, row / 1.5), row)
        assert penalized.max() - penalized[entry.token] < 0.05, "bfloat16 apart"
        logprobs = row.log_softmax(-1)
        assert entry.token == first.tokens[i]
        assert entry.logprob == pytest.approx(logprobs[entry.token].item(), abs=0.05)
        assert [v for _, v in entry.top] == pytest.approx(logprobs.topk(3).values.tolist(), abs=0.05)


def test_choices_of_many_rows():
    """More sequences than the kernels take at once, each with settings of its own, from the middle of a session."""
    B, V, rows = 75, 301, slice(3, 73)
    state = SamplingState(B, V, DEVICE)
    state.temperature.copy_(torch.arange(B) % 4 * 0.4)  # every fourth is greedy
    state.top_k.copy_(torch.arange(B) % 3 * 5)
    state.top_p.copy_(torch.where(torch.arange(B) % 5 == 0, 0.7, 1.0))
    state.seed.copy_(torch.arange(B) * 11)
    logits = torch.randn(B, V, device=DEVICE)[rows] * 3
    lengths = (torch.arange(70, dtype=torch.int32, device=DEVICE) + 5) % 40
    settings = {name: getattr(state, name)[rows] for name in KINDS["truncate"]}
    _, token = choose_in_kernels(logits, settings | {"lengths": lengths})
    _, expected = choose(logits, lengths, **settings)
    assert token.shape == (70, 1)
    assert torch.equal(token, expected)
