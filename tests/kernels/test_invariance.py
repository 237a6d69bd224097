"""A prompt's logits through the whole engine, bit for bit the same whatever shares its batch (`batch_invariant`)."""

import dataclasses

import pytest
import torch

import quantize
from generate import Engine, fill_randomly
from model import SHAPES, Transformer
from sampling import SamplingParams

pytestmark = pytest.mark.usefixtures("few_programs")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = {"num_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 100}
PARAMS = SamplingParams(max_new_tokens=2, ignore_eos=True, logprobs=0)
PROMPT = list(range(5, 22))


@pytest.fixture(scope="module")
def model():
    model = Transformer(dataclasses.replace(SHAPES["llama-3.2-1b"], **TINY), device=DEVICE)
    fill_randomly(model)
    return model


def logits_of(engine, neighbours):
    """Of PROMPT's second token, and its answer, with so many neighbours: samples of prompts of other lengths."""
    different = min(neighbours, 7)
    prompts = [[7 + i, *range(1, 1 + 5 * i % 12)] for i in range(different)]
    params = [dataclasses.replace(PARAMS, n=neighbours // different) for _ in prompts]
    (first, *others), _ = engine.generate([PROMPT, *prompts], [PARAMS, *params])
    assert len(others) == neighbours
    return engine.decoder.logits[0].clone(), first


@pytest.mark.parametrize("neighbours", [1, 7, 63])
def test_neighbours_change_no_bit(model, neighbours):
    """63 is all that the kernels' 64 rows leave; a 64th shares the batch once a row is free (below)."""
    engine = Engine(model, batch_invariant=True, max_seq_len=256)
    alone, answer = logits_of(engine, 0)
    together, same = logits_of(engine, neighbours)
    assert torch.equal(together, alone)
    assert same == answer, "tokens and log-probabilities"
    assert together.isfinite().all()
    if neighbours == 7:
        plain = Engine(model, max_seq_len=256)
        assert not torch.equal(logits_of(plain, 7)[0], logits_of(plain, 0)[0]), "else this test shows nothing"


def test_a_longer_neighbour_changes_no_bit(model):
    """A longer cache for the sake of another, other splits of attention: nothing of it may show."""
    alone, _ = logits_of(Engine(model, batch_invariant=True, max_seq_len=128), 0)
    together, _ = logits_of(Engine(model, batch_invariant=True, max_seq_len=8192), 1)
    assert torch.equal(together, alone)


def test_what_cannot_be_promised_is_refused(model):
    engine = Engine(model, batch_invariant=True, max_seq_len=64)
    with pytest.raises(ValueError, match=r"batch_invariant: found 65 sequences .*expected at most 64"):
        engine.generate([[1, 2]] * 65, PARAMS)
    plain = Transformer(dataclasses.replace(model.config, head_dim=32), device=DEVICE)
    plain.setup_rope(64)
    with pytest.raises(ValueError, match="batch_invariant: found 1 sequences"):
        Engine(plain, batch_invariant=True, max_seq_len=64).generate([[1, 2]], PARAMS)


@pytest.mark.parametrize("mode", ["int8", "fp8"])
def test_packed_weights_too(model, mode):
    packed = Transformer(quantize.make_recipe(mode, model.config).config(model.config), device=DEVICE)
    fill_randomly(packed)
    engine = Engine(packed, batch_invariant=True, max_seq_len=64)
    alone, answer = logits_of(engine, 0)
    together, same = logits_of(engine, 3)
    assert torch.equal(together, alone)
    assert same == answer
