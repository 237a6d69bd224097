"""The model against transformers, family by family, in float32."""

import pytest
import torch
from families import FAMILIES, hf_model

import convert_hf_checkpoint
from generate import Engine
from kv_cache import KVCache
from model import SHAPES, DecodeStep, ModelConfig, PackStep, PrefillStep
from sampling import SamplingParams

PROMPT = torch.tensor([1, 17, 45, 3, 99, 150, 8, 77, 30, 61, 5, 198])


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(a transformers model, its directory, our model loaded from it)."""
    reference = hf_model(request.param)
    directory = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(directory)
    return reference, directory, Engine.load(directory, "cpu", torch.float32).model


def hf_logits(reference, tokens):
    with torch.no_grad():
        return reference(tokens[None]).logits[0]


def full_forward(model, tokens):
    return model.logits(model(model.embed(tokens), PrefillStep(len(tokens))))


def test_logits_equal_transformers(pair):
    reference, _, model = pair
    tokens = torch.randint(0, 199, (90,), generator=torch.Generator().manual_seed(1))  # past windows and trained contexts
    assert (full_forward(model, tokens) - hf_logits(reference, tokens)).abs().max() < 1e-4


def test_prefill_and_decode_equal_a_full_forward(pair):
    """A prefill in two chunks, then one token at a time; the cache's unused rows hold NaN."""
    _, _, model = pair
    tokens = torch.randint(0, 199, (40,), generator=torch.Generator().manual_seed(2))
    cache = KVCache(model.config, 3, 64, dtype=torch.float32)
    for buffer in cache.buffers():
        if buffer.is_floating_point():
            buffer.fill_(torch.nan)
    slot = 2  # sequences 0 and 1 are absent
    got = []
    for start, stop in ((0, 9), (9, 25)):
        got.append(model.logits(model(model.embed(tokens[start:stop]), PackStep.of(cache, [(slot, stop - start, start)]))))
    for i in range(25, 40):
        cache.lengths[slot] = i + 1
        x = model.embed(torch.stack([tokens[0], tokens[0], tokens[i]]))
        got.append(model.logits(model(x, DecodeStep(cache))[slot:]))
    expected = full_forward(model, tokens)
    torch.testing.assert_close(torch.cat(got), expected, atol=2e-5, rtol=0)


def test_several_tokens_in_one_decode_step(pair):
    """What speculation's verification does: T tokens of each sequence, ragged lengths."""
    _, _, model = pair
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 199, (n,), generator=generator) for n in (12, 30)]
    cache = KVCache(model.config, 2, 64, dtype=torch.float32)
    for slot, tokens in enumerate(rows):
        model(model.embed(tokens[:-4]), PackStep.of(cache, [(slot, len(tokens) - 4, 0)]))
        cache.lengths[slot] = len(tokens)
    got = model.logits(model(model.embed(torch.cat([t[-4:] for t in rows])), DecodeStep(cache, 4)))
    expected = torch.cat([full_forward(model, t)[-4:] for t in rows])
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def test_a_sequence_shorter_than_the_step(pair):
    """Two tokens of a sequence in a step of four: the rows before its start write nothing, not even over its first row."""
    _, _, model = pair
    tokens = torch.tensor([7, 9])
    cache = KVCache(model.config, 1, 64, dtype=torch.float32)
    cache.lengths[0] = 2
    got = model.logits(model(model.embed(torch.tensor([3, 4, 7, 9])), DecodeStep(cache, 4)))[2:]
    torch.testing.assert_close(got, full_forward(model, tokens), atol=2e-5, rtol=0)


def test_greedy_tokens_equal_transformers(pair):
    reference, directory, _ = pair
    expected = reference.generate(PROMPT[None], max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    for mode in ("eager", "compile"):
        engine = Engine.load(directory, "cpu", torch.float32, decode_mode=mode, max_seq_len=128)
        (out,), _ = engine.generate([PROMPT.tolist()], SamplingParams(max_new_tokens=64, ignore_eos=True))
        assert out.tokens == expected[0, len(PROMPT) :].tolist(), mode
        assert out.finish_reason == "length"


def test_our_saved_copy_gives_identical_logits(pair, tmp_path):
    _, directory, model = pair
    assert (
        convert_hf_checkpoint.main(
            ["--checkpoint_dir", str(directory), "--output_dir", str(tmp_path / "ours"), "--dtype", "float32"]
        )
        == 0
    )
    copy = Engine.load(tmp_path / "ours", "cpu").model
    assert torch.equal(full_forward(copy, PROMPT), full_forward(model, PROMPT))


def test_config_round_trip(pair):
    _, _, model = pair
    assert ModelConfig.from_dict(model.config.to_dict()) == model.config
    for config in SHAPES.values():
        assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "original_max_position_embeddings"),
        ({"rope_parameters": None}, "rope_theta"),
        ({"attention_bias": True}, "attention_bias"),
        ({"dtype": "int3"}, "dtype"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"vocab_size": float("inf")}, "vocab_size"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "truncate": False}}, "truncate"),
    ],
)
def test_a_bad_config_is_refused_by_field(change, field):
    good = SHAPES["llama-3.2-1b"].to_dict()
    with pytest.raises(ValueError, match=rf"^some\.json: .*{field}.*found .*expected"):
        ModelConfig.from_dict(good | change, "some.json")


def test_old_style_rope_fields():
    new = SHAPES["llama-3.1-8b"].to_dict()
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    old |= {"rope_theta": 5e5, "torch_dtype": "bfloat16"}
    old["rope_scaling"] = {k: v for k, v in new["rope_parameters"].items() if k != "rope_theta"}
    assert ModelConfig.from_dict(old) == SHAPES["llama-3.1-8b"]
