"""kv_cache.py: a cache in fp8 is the plain one with every row rounded once, whoever writes and reads it."""

import dataclasses

import pytest
import torch

import generate
import model as rooflama
from generate import Engine, SamplingParams, fill_randomly
from kernels import _matmul
from kernels.formats import saturated
from kv_cache import KVCache
from model import SHAPES, DecodeStep, PackStep, Transformer
from timing import floor_ms, metrics, weight_bytes_per_step

FP8 = torch.float8_e4m3fn
TINY = {"num_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 199}


@pytest.fixture(scope="module")
def model():
    """Keys and values of about 2, so that no format of them is trivial."""
    config = dataclasses.replace(SHAPES["llama-3.2-1b"], head_dim=16, dtype=torch.float32, **TINY)
    model = Transformer(config)
    fill_randomly(model)
    for layer in model.layers:
        layer.attention.wqkv.weight.mul_(12)
        layer.attention.wo.weight.mul_(5)
    model.setup_rope(64)
    return model


def tokens_of(count):
    return torch.randint(0, 199, (count,), generator=torch.Generator().manual_seed(count))


def run(model, cache):
    """Logits of a prefill in two chunks and of decode steps of two tokens, beside an absent sequence."""
    tokens, slot, got = tokens_of(30), 1, []
    for start, stop in ((0, 9), (9, 20)):
        got.append(model(model.embed(tokens[start:stop]), PackStep.of(cache, [(slot, stop - start, start)])))
    for i in range(20, 30, 2):
        cache.lengths[slot] = i + 2
        got.append(model(model.embed(torch.cat([tokens[:2], tokens[i : i + 2]])), DecodeStep(cache, 2))[2:])
    return model.logits(torch.cat(got))


def poisoned(model, dtype):
    cache = KVCache(model.config, 2, 64, dtype=dtype)
    for layer in range(model.config.num_layers):
        for rows in cache.layer(layer):
            rows.fill_(torch.nan)
    return cache


def test_fp8_is_the_plain_cache_rounded(model, monkeypatch):
    """Bit for bit: the logits of an fp8 cache are those of a float32 one that holds each row as e4m3 has it."""
    cache = poisoned(model, FP8)
    got = run(model, cache)
    plain = run(model, poisoned(model, torch.float32))
    for module in (_matmul, rooflama):
        monkeypatch.setattr(module, "saturated", lambda values, dtype: saturated(values, FP8).to(dtype))
    rounded = poisoned(model, torch.float32)
    assert torch.equal(got, run(model, rounded))
    assert not torch.equal(got, plain)
    for layer in range(model.config.num_layers):
        for a, b in zip(cache.layer(layer), rounded.layer(layer), strict=True):
            assert torch.equal(a.float().nan_to_num(7.5), b.nan_to_num(7.5))
            assert a.float()[0].isnan().all(), "the absent sequence's rows were written"


def test_saturated():
    values = torch.tensor([447.0, 449.0, 1e6, -1e6, torch.inf, torch.nan, 17.0, 19.0, 2.0**-10 * 1.01])
    expected = torch.tensor([448.0, 448.0, 448.0, -448.0, 448.0, torch.nan, 16.0, 20.0, 2.0**-9])
    torch.testing.assert_close(saturated(values, FP8).float(), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(saturated(values[:3], torch.float32), values[:3])


def test_bytes(model):
    """A row takes half of bf16's bytes, in the cache, in the step's account and in the floor."""
    config = SHAPES["llama-3.1-8b"]
    assert KVCache(config, 2, 128, device="meta", dtype=FP8).num_bytes == 2 * 128 * 65536
    assert KVCache(config, 2, 128, device="meta").num_bytes == 2 * 128 * 131072
    assert KVCache(config, 2, 128, device="meta", spare=8).num_bytes == 2 * 136 * 131072
    bytes_per_step = {}
    for name, size in (("auto", 4), ("fp8", 1)):
        engine = Engine(model, max_seq_len=64, kv_cache_dtype=name)
        _, timing = engine.generate([tokens_of(8).tolist()], SamplingParams(max_new_tokens=5, temperature=0, ignore_eos=True))
        row = 2 * 2 * 2 * 16 * size
        assert engine.session.cache.num_bytes == 64 * row
        bytes_per_step[name] = metrics(engine, timing, 0.0)["bytes_per_step"] - timing.context_sum / timing.steps * row
        weights = weight_bytes_per_step(model)
        assert floor_ms(engine, 3, 100, 1e9) == pytest.approx((weights + 300 * row) / 1e6)
    assert bytes_per_step["auto"] == bytes_per_step["fp8"] == weights


def test_every_way_to_decode_gives_the_same_tokens(model):
    prompt, params = tokens_of(8).tolist(), SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True, n=2)
    options = {"max_seq_len": 32, "kv_cache_dtype": "fp8"}
    engines = [Engine(model, decode_mode=mode, **options) for mode in ("eager", "compile")]
    outputs = [engine.generate([prompt], params)[0] for engine in engines]
    assert [engine.decoder.capture_sec > 0 for engine in engines] == [False, True], "what torch.compile took"
    assert len({tuple(out.tokens) for outs in outputs for out in outs}) == 1, "two samples, two modes"


def test_command_line(capsys):
    flags = ["--max_new_tokens", "3", "--device", "cpu", "--temperature", "0", "--max_seq_len", "64"]
    assert generate.main([*flags, "--kv-cache-dtype", "fp8"]) == 0
    assert "KV cache: 1 x 64 tokens, 0.0000916 GiB of float8_e4m3fn" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        generate.main([*flags, "--kv_cache_dtype", "int8"])
    assert error.value.code == 2


def test_unknown_dtype(model):
    with pytest.raises(ValueError, match="kv_cache_dtype: found 'int8', expected one of auto, fp8"):
        Engine(model, kv_cache_dtype="int8")
