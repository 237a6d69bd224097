"""Packs through the kernels, padded as a graph's are: what the padding must not touch, and what the prompts' rows must be."""

import dataclasses
import sys

import pytest
import torch

import kernels
import quantize
from generate import fill_randomly
from kv_cache import KVCache
from model import SHAPES, DecodeStep, PackStep, Transformer
from prefill import Piece, Prefiller

pytestmark = pytest.mark.usefixtures("few_programs")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = {"num_layers": 1, "hidden_size": 128, "intermediate_size": 192, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 301}
PROMPTS = [list(range(10, 17)), [3], list(range(100, 105)), list(range(60, 84))]


class Replayed:
    """A graph's stand-in: runs its forward anew."""

    def __init__(self, run):
        self.replay = run


class Padded(Prefiller):
    """Takes the way of graphs, without capturing them: they need a GPU."""

    def __init__(self, model, cache):
        super().__init__(model, cache)
        self.use_graphs = True
        self.make_buffers()
        self.x.fill_(torch.nan)  # what is behind the prompts may be anything
        self.buckets = []

    def _graph(self, rows, pieces, fresh, longest):
        self.buckets.append((rows, pieces, fresh))
        hidden = torch.empty(pieces, self.x.shape[1], dtype=self.x.dtype, device=DEVICE)
        return Replayed(lambda: hidden.copy_(self.forward(*self._graph_arguments(rows, pieces, fresh, longest)))), hidden


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def model(request):
    config = dataclasses.replace(SHAPES["qwen3-8b"], head_dim=64, dtype=request.param, **TINY)
    model = Transformer(config, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, weight in model.state_dict().items():
        weight.normal_(1.0 if "norm" in name else 0.0, 0.1, generator=generator)
    model.setup_rope(64)
    return model


def poisoned(model) -> KVCache:
    cache = KVCache(model.config, 5, 64, DEVICE, model.config.dtype)
    for buffer in cache.buffers():
        if buffer.is_floating_point():
            buffer.fill_(torch.nan)
    return cache


def close(model, found, expected):
    tolerance = 1e-5 if model.config.dtype == torch.float32 else 0.02
    assert (found - expected).norm() <= tolerance * expected.norm()


def test_padding_goes_nowhere(model):
    """A single prompt, a ragged pack, and one that goes on: the same hidden states and cache as packs without padding."""
    caches = [poisoned(model) for _ in range(2)]
    padded, plain = Padded(model, caches[0]), Prefiller(model, caches[1])
    packs = [
        [Piece(3, PROMPTS[0])],
        [Piece(0, PROMPTS[1]), Piece(4, PROMPTS[2]), Piece(1, PROMPTS[3][:9])],
        [Piece(1, PROMPTS[3][9:], 9), Piece(3, [5, 6, 7], 7)],
    ]
    for pack in packs:
        close(model, padded.run(pack), plain.run(pack))
    assert padded.buckets == [(16, 1, True), (16, 16, True), (32, 16, False)]
    for a, b in zip(caches[0].layer(0), caches[1].layer(0), strict=True):
        assert torch.equal(a.isnan(), b.isnan()), "rows that no token has"
        close(model, a.nan_to_num(), b.nan_to_num())


def check_last_rows(model, pieces: int, tokens_each: int, started: bool):
    """What a forward gives at the pieces' last rows, where nothing else is computed from there on. The embeddings stay."""
    caches = [KVCache(model.config, 20, 32, DEVICE, model.config.dtype) for _ in range(2)]
    x, found = model.embed(torch.arange(pieces * tokens_each, device=DEVICE) * 7 % 300), []
    before = x.clone()
    for cache, last_only in zip(caches, (False, True), strict=True):
        if started:
            Prefiller(model, cache).run([Piece(slot, range(slot % 3 + 1)) for slot in range(pieces)])
        step = PackStep.of(cache, [(slot, tokens_each, started * (slot % 3 + 1)) for slot in range(pieces)])
        found.append(model(x, step, last_only))
    assert torch.equal(x, before)
    close(model, found[1], found[0][step.last])
    for all_rows, last_rows in zip(caches[0].buffers(), caches[1].buffers(), strict=True):
        assert torch.equal(all_rows, last_rows), "k and v of every row"


@pytest.mark.parametrize(
    ("ours", "pieces", "tokens_each", "started"),
    [(True, 3, 9, True), (True, 20, 2, False), (False, 3, 9, False), (False, 20, 2, True), (False, 20, 1, True)],
)
def test_last_rows_alone(model, monkeypatch, ours, pieces, tokens_each, started):
    """Many rows, or few after many, by our kernels or by cuBLAS, which adds in place."""
    most = kernels.MAX_ROWS if ours else kernels.PLAIN_ROWS
    monkeypatch.setattr(sys.modules["kernels._matmul"], "kernel_rows", lambda N, K, sms: most)
    check_last_rows(model, pieces, tokens_each, started)


@pytest.mark.parametrize(("pieces", "tokens_each"), [(12, 3), (5, 14)])
def test_last_rows_alone_of_packed_weights(pieces, tokens_each):
    """Other rows than the layer's first product has, and so other kernels, and another order of columns on a Hopper card."""
    config = dataclasses.replace(SHAPES["llama-3.2-1b"], **TINY | {"num_layers": 2})
    model = Transformer(quantize.make_recipe("int8", config).config(config), device=DEVICE)
    fill_randomly(model)
    model.tile_weights()
    model.setup_rope(64)
    check_last_rows(model, pieces, tokens_each, True)


@pytest.mark.parametrize("ours", [(), ("qkv", "down"), ("wo", "gate/up"), ("qkv", "wo", "gate/up", "down")], ids=str)
def test_a_step_of_many_rows_equals_prefill(model, monkeypatch, ours):
    """Decode beyond PLAIN_ROWS: 20 sequences, some absent, through cuBLAS' place and the kernels between the products, or
    through the fused kernels: each layer as it is faster."""
    shapes = {"qkv": (512, 128), "wo": (128, 256), "gate/up": (384, 128), "down": (128, 192)}
    rows = {shapes[name]: kernels.MAX_ROWS for name in ours}
    monkeypatch.setattr(sys.modules["kernels._matmul"], "kernel_rows", lambda N, K, sms: rows.get((N, K), kernels.PLAIN_ROWS))
    tokens = torch.arange(20, device=DEVICE) % 300
    cache = KVCache(model.config, 20, 16, DEVICE, model.config.dtype)
    Prefiller(model, cache).run([Piece(slot, [int(t) + 1]) for slot, t in enumerate(tokens)])
    cache.lengths.fill_(2)
    cache.lengths[::9] = 0
    got = model(model.embed(tokens), DecodeStep(cache))
    expected = KVCache(model.config, 20, 16, DEVICE, model.config.dtype)
    both = torch.stack([tokens + 1, tokens], dim=1).flatten()
    hidden = model(model.embed(both), PackStep.of(expected, [(slot, 2, 0) for slot in range(20)]))[1::2]
    present = cache.lengths > 0
    close(model, got[present], hidden[present])
    assert (cache.k0[~present, :, 1] == 0).all(), "an absent sequence appends nothing"
    close(model, cache.k0[present], expected.k0[present])
