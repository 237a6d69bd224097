"""Packs of prompts against the same prompts one by one, in float32; what a plan cuts; what is refused."""

import itertools
import sys

import pytest
import torch
from families import hf_model

import prefill
from generate import Engine
from kernels.flash_prefill import same_long_length
from kv_cache import KVCache
from model import PackStep, PrefillStep
from prefill import Piece, Prefiller, graph_bucket, plan

GENERATOR = torch.Generator().manual_seed(0)
PROMPTS = [torch.randint(0, 199, (n,), generator=GENERATOR).tolist() for n in (1, 37, 5, 64, 2)]
SLOTS = [4, 0, 5, 1, 3]  # slot 2 of six stays free


@pytest.fixture(scope="module", params=["llama3", "mistral-window", "qwen2-window", "qwen3"])  # GQA; windows; bias; qk-norm
def model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    hf_model(request.param).save_pretrained(directory)
    return Engine.load(directory, "cpu", torch.float32, max_seq_len=128).model


def poisoned(model) -> KVCache:
    """A cache full of NaN."""
    cache = KVCache(model.config, 6, 80, dtype=torch.float32)
    for buffer in cache.buffers():
        if buffer.is_floating_point():
            buffer.fill_(torch.nan)
    return cache


def expected_of(model) -> tuple[torch.Tensor, KVCache]:
    """Each prompt in a forward of its own, the hidden state of its last token without a cache."""
    cache = poisoned(model)
    hidden = []
    for slot, ids in zip(SLOTS, PROMPTS, strict=True):
        x = model.embed(torch.tensor(ids))
        model(x, PackStep.of(cache, [(slot, len(ids), 0)]))
        hidden.append(model(x, PrefillStep(len(ids)))[-1])
    return torch.stack(hidden), cache


def assert_same(model, found: tuple[torch.Tensor, KVCache]):
    """Hidden states and cache; what no prompt has written is still NaN."""
    hidden, cache = expected_of(model)
    torch.testing.assert_close(found[0], hidden, atol=2e-5, rtol=2e-5)
    for layer in range(model.config.num_layers):
        for a, b in zip(found[1].layer(layer), cache.layer(layer), strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5, equal_nan=True)
    assert cache.k0[2].isnan().all()
    assert cache.k0[0, :, 37:].isnan().all()


def test_a_pack_equals_one_by_one(model):
    cache = poisoned(model)
    pieces = [Piece(slot, ids) for slot, ids in zip(SLOTS, PROMPTS, strict=True)]
    assert_same(model, (Prefiller(model, cache).run(pieces), cache))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("started", [False, True])
def test_the_last_layer_works_for_last_tokens_alone(model, dtype, started):
    """What all rows give, at those rows, and the same cache; the feed-forward of the last layer has no other row."""
    caches = [KVCache(model.config, 6, 80, dtype=dtype) for _ in range(2)]
    starts = [20 * (started and len(ids) > 20) for ids in PROMPTS]
    pieces = [(slot, len(ids) - start, start) for slot, ids, start in zip(SLOTS, PROMPTS, starts, strict=True)]
    x = model.embed(torch.tensor([t for ids, start in zip(PROMPTS, starts, strict=True) for t in ids[start:]]))
    found, counts = [], []
    hook = model.layers[-1].feed_forward.register_forward_pre_hook(lambda module, inputs: counts.append(len(inputs[0])))
    for cache, last_only in zip(caches, (False, True), strict=True):
        begun = [Piece(slot, ids[:start]) for slot, ids, start in zip(SLOTS, PROMPTS, starts, strict=True) if start]
        if begun:
            Prefiller(model, cache).run(begun)
        counts.clear()
        step = PackStep.of(cache, pieces)
        found.append(model(x, step, last_only))
    hook.remove()
    assert counts == [len(PROMPTS)], "of the second forward"
    torch.testing.assert_close(found[1], found[0][step.last], atol=2e-5, rtol=2e-5)
    for a, b in zip(caches[0].buffers(), caches[1].buffers(), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_alone_no_piece_shares_a_forward(model):
    prefiller, packs = Prefiller(model, poisoned(model), alone=True), []
    run_pack = prefiller._run_pack
    prefiller._run_pack = lambda parts: packs.append(len(parts)) or run_pack(parts)
    prefiller.run([Piece(slot, ids) for slot, ids in zip(SLOTS, PROMPTS, strict=True)])
    assert packs == [1] * len(PROMPTS)


def test_what_shares_a_pack_rounds_nothing(model):
    """A prompt reads its own rows as they are, and older ones as an fp8 cache has them, whatever is beside it."""
    together, alone = (KVCache(model.config, 3, 80, dtype=torch.float8_e4m3fn) for _ in range(2))
    pieces = [Piece(0, PROMPTS[1]), Piece(1, PROMPTS[3][20:], 20), Piece(2, PROMPTS[2])]
    for cache in (together, alone):
        Prefiller(model, cache).run([Piece(1, PROMPTS[3][:20])])
    expected = torch.cat([Prefiller(model, alone).run([piece]) for piece in pieces])
    torch.testing.assert_close(Prefiller(model, together).run(pieces), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("rows", [1, 7, 16, 40])
def test_chunks_equal_the_whole(model, monkeypatch, rows):
    """Prompts longer than a forward may be are continued from the cache, beside others that begin."""
    monkeypatch.setattr(prefill, "CHUNK_ROWS", rows)
    cache = poisoned(model)
    pieces = [Piece(slot, ids) for slot, ids in zip(SLOTS, PROMPTS, strict=True)]
    assert_same(model, (Prefiller(model, cache).run(pieces), cache))


def test_parts_given_by_the_caller(model):
    """The first call brings some prompts, and the beginning of others; the second the rest."""
    cache = poisoned(model)
    prefiller = Prefiller(model, cache)
    prefiller.run([Piece(SLOTS[1], PROMPTS[1][:20]), Piece(SLOTS[3], PROMPTS[3][:1])])
    rest = [0, 20, 0, 1, 0]
    pieces = [Piece(slot, ids[start:], start) for slot, ids, start in zip(SLOTS, PROMPTS, rest, strict=True)]
    assert_same(model, (prefiller.run(pieces), cache))


def test_a_long_mask_is_cut(model, monkeypatch):
    """Queries over older keys, a few at a time."""
    monkeypatch.setattr(sys.modules["kernels.flash_prefill"], "QUERY_BLOCK", 9)
    test_parts_given_by_the_caller(model)


def test_embeddings_beside_ids(model):
    cache = poisoned(model)
    given = [model.embed(torch.tensor(ids)) if i in (1, 2, 4) else ids for i, ids in enumerate(PROMPTS)]
    before = given[1].clone()
    pieces = [Piece(slot, tokens) for slot, tokens in zip(SLOTS, given, strict=True)]
    assert_same(model, (Prefiller(model, cache).run(pieces), cache))
    assert torch.equal(given[1], before), "a caller's embeddings are his own"


def test_compiled_once_for_all_packs(tmp_path):
    hf_model("llama3", num_hidden_layers=1).save_pretrained(tmp_path)
    model = Engine.load(tmp_path, "cpu", torch.float32, max_seq_len=128).model
    eager, compiled = (Prefiller(model, poisoned(model), compiled=c) for c in (False, True))
    packs = [[0, 1], [1, 3, 4], [3, 2, 0, 1], [4, 1], [1, 2, 3]]
    for n, pack in enumerate(packs):
        pieces = [Piece(SLOTS[i], PROMPTS[i]) for i in pack]
        stance = "default" if n < 2 else "fail_on_recompile"
        with torch.compiler.set_stance(stance):
            torch.testing.assert_close(compiled.run(pieces), eager.run(pieces), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("piece", "found"),
    [
        (Piece(1, []), "rows 0 to 0 of slot 1"),
        (Piece(0, [1, 2], 79), "rows 79 to 81 of slot 0"),
        (Piece(2, [3], 90), "rows 90"),
    ],
)
def test_a_piece_that_does_not_fit_is_refused(model, piece, found):
    with pytest.raises(ValueError, match=f"^prefill: found {found}.*expected at least one, none beyond 80"):
        Prefiller(model, KVCache(model.config, 3, 80, dtype=torch.float32)).run([Piece(0, [1, 2]), piece])


def test_samples_of_several_prompts(tmp_path):
    """Several prompts, several samples of each, at once: the first tokens are chosen together, and are those of runs alone."""
    from sampling import SamplingParams

    hf_model("llama3").save_pretrained(tmp_path)
    engine = Engine.load(tmp_path, "cpu", torch.float32, max_seq_len=128)
    params = [SamplingParams(temperature=0.9, seed=i, n=i % 2 + 1, max_new_tokens=3, ignore_eos=True) for i in range(5)]
    together, _ = engine.generate(PROMPTS, params)
    alone = [out for ids, p in zip(PROMPTS, params, strict=True) for out in engine.generate([ids], [p])[0]]
    assert [out.tokens for out in together] == [out.tokens for out in alone]


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize(
    ("counts", "packs"),
    [
        ([3], [[(0, 0, 3)]]),
        ([4, 4, 4], [[(0, 0, 4), (1, 0, 4)], [(2, 0, 4)]]),
        ([5, 4], [[(0, 0, 5)], [(1, 0, 4)]]),  # a prompt that fits a pack is not cut
        ([20, 3], [[(0, 0, 8)], [(0, 8, 16)], [(0, 16, 20), (1, 0, 3)]]),
        ([2, 9], [[(0, 0, 2)], [(1, 0, 8)], [(1, 8, 9)]]),
    ],
)
def test_plan(counts, packs):
    assert plan(counts, 8) == packs


def test_plans_cover_every_token_once():
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        counts = torch.randint(1, 40, (seed % 7 + 1,), generator=generator).tolist()
        packs = plan(counts, 16)
        assert all(0 < sum(end - begin for _, begin, end in pack) <= 16 for pack in packs)
        parts = [part for pack in packs for part in pack]
        for i, count in enumerate(counts):
            mine = [(begin, end) for piece, begin, end in parts if piece == i]
            assert mine[0][0] == 0
            assert mine[-1][1] == count
            assert all(a[1] == b[0] for a, b in itertools.pairwise(mine))
        unfinished = [pack[:-1] for pack in packs]
        assert all(end == counts[i] for pack in unfinished for i, _, end in pack), "only a pack's last part goes on"


def test_cudnn_is_given_no_padding(model):
    """It reads rows behind a prompt as they are, be they NaN, which would meet a weight of 0."""
    prefiller = Prefiller(model, poisoned(model))
    prefiller.use_graphs = True
    prefiller.make_buffers()
    prefiller._embed = lambda parts: torch.zeros(sum(len(p.tokens) for p in parts), prefiller.x.shape[1])
    asked = []

    def graph(*key):
        *_, offsets, longest, _ = prefiller._graph_arguments(*key)
        asked.append((key[0], len(offsets) - 1, longest))
        raise StopIteration

    prefiller._graph = graph
    for counts in ([2048], [2047], [1900], [1280], [1100, 900]):
        with pytest.raises(StopIteration):
            prefiller._run_pack([Piece(slot, [0] * n) for slot, n in enumerate(counts)])
        rows, pieces, longest = asked[-1]
        assert longest >= max(counts)
        assert same_long_length(rows, pieces, longest) == (counts == [2048])


def test_graph_buckets():
    assert graph_bucket(1, 1) == (16, 1)
    assert graph_bucket(16, 2) == (16, 16)
    assert graph_bucket(17, 1) == (32, 1)
    assert graph_bucket(1024, 17) == (1024, 64)
    assert graph_bucket(1025, 1) == (1280, 1)
    assert graph_bucket(2048, 16) == (2048, 16)
    assert graph_bucket(2049, 1) is None
    assert graph_bucket(200, 65) is None
