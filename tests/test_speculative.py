"""Speculation: its tokens are plain decoding's, whoever drafts, at every k, stop and end; estimates, metrics, refusals."""

import dataclasses
import itertools
import json
import math
import shutil

import pytest
import torch
from families import hf_model
from torch._subclasses.fake_tensor import FakeTensorMode

import generate
from generate import DEMO, Engine
from kv_cache import bytes_per_row
from model import PrefillStep, Transformer
from runs import Request, Run
from sampling import SamplingParams, truncate
from speculative import (
    Acceptance,
    Drafter,
    ModelDrafter,
    NgramDrafter,
    SelfDrafter,
    Speculator,
    best_k,
    expected_tokens,
    quantized_copy,
)
from timing import Timing

PROMPTS = [[4, 5, 6], list(range(7, 40)), [9, 10, 11, 9, 10, 11, 9, 10], [100]]


def copy_of(model: Transformer, noise: float = 0.0) -> Transformer:
    """The same weights, or some near them: a drafter that is right now and then."""
    copy = Transformer(model.config, dtype=model.norm.weight.dtype)
    generator = torch.Generator().manual_seed(1)
    copy.load_state_dict(
        {n: t + noise * t.std() * torch.randn(t.shape, generator=generator) for n, t in model.state_dict().items()}
    )
    copy.vocab_limit = model.vocab_limit
    return copy


class ConstantDrafter(Drafter):
    """Nearly always wrong."""

    name = "constant"

    def propose(self, k, kind, missed=1):
        return torch.full((self.target.batch_size, k), 77, dtype=torch.int32)


DRAFTERS = {
    "model": lambda model: ModelDrafter(copy_of(model, 0.2)),
    "ngram": lambda model: NgramDrafter(),
    "self": SelfDrafter,
    "constant": lambda model: ConstantDrafter(),
}


@pytest.fixture(autouse=True)
def untimed(monkeypatch):
    """Timing every kind of round takes longer than most tests, and what it gives depends on the machine."""
    monkeypatch.setattr(Speculator, "_time_ms", lambda self, work: 1.0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama3")
    hf_model("llama3").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def plain(directory):
    return Engine.load(directory, "cpu", torch.float32, max_seq_len=128)


def speculating(plain: Engine, drafter, k: int, adaptive: bool = False, **options) -> Engine:
    """An engine with the same weights that drafts."""
    engine = Engine(plain.model, plain.tokenizer, **{"max_seq_len": plain.max_seq_len} | options)
    engine.speculate(DRAFTERS[drafter](plain.model) if isinstance(drafter, str) else drafter, k, adaptive)
    return engine


def results(engine, prompts, params, **options):
    outputs, _ = engine.generate(prompts, params, **options)
    return [(o.tokens, o.text, o.finish_reason) for o in outputs]


# ---------------------------------------------------------------- the same tokens


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_tokens_are_those_of_plain_decoding(plain, drafter, batch):
    """Greedy and drawn, each k; sequences end after different numbers of tokens, one of them by a stop id."""
    prompts = PROMPTS[:batch]
    kinds = [{}, {"temperature": 0.9, "seed": 5}, {"temperature": 1.1, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "seed": 6}]
    kinds = [kinds[i % 3] for i in range(batch)]
    free = results(
        plain, prompts, [SamplingParams(max_new_tokens=14 + i, ignore_eos=True, **kind) for i, kind in enumerate(kinds)]
    )
    stop = free[0][0][9]
    params = [
        SamplingParams(max_new_tokens=14 + i, ignore_eos=True, stop_token_ids=() if i else (stop,), **kind)
        for i, kind in enumerate(kinds)
    ]
    want = results(plain, prompts, params)
    assert want[0][2] == "stop"
    for k in range(1, 9):
        engine = speculating(plain, drafter, k)
        assert results(engine, prompts, params) == want, f"k {k}"
        if k == 4:
            assert results(engine, prompts, params) == want, "again in the same session"


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_context_ends_within_a_round(plain, drafter):
    for k, length in itertools.product((1, 4, 8), (120, 123, 126)):
        prompt = list(range(length))
        want = results(plain, [prompt], SamplingParams(max_new_tokens=500, ignore_eos=True))
        assert len(want[0][0]) == 128 - length
        assert results(speculating(plain, drafter, k), [prompt], SamplingParams(max_new_tokens=500, ignore_eos=True)) == want


def test_the_model_own_context_ends_within_a_round(plain):
    """No cache row and no position is missing where the session is as long as the model's context."""
    params = SamplingParams(max_new_tokens=500, ignore_eos=True)
    prompt = [i % 199 for i in range(250)]
    want = results(Engine(plain.model), [prompt], params)
    assert results(speculating(plain, "model", 7, max_seq_len=None), [prompt], params) == want


@pytest.fixture(scope="module")
def demo():
    return Engine.load(DEMO, "cpu", torch.float32)


@pytest.fixture(scope="module")
def demo_draft():
    return Engine.load(DEMO / "draft", "cpu", torch.float32).model


def test_stop_strings_and_streams(demo, demo_draft):
    for stop, temperature in (("thee", 0.0), ("\n\nROMEO", 0.0), (",", 0.8)):
        params = SamplingParams(max_new_tokens=40, stop=(stop,), temperature=temperature, seed=2)
        want = results(demo, ["ROMEO:"], params)
        assert want[0][2] == "stop"
        engine = speculating(demo, ModelDrafter(demo_draft), 6)
        assert results(engine, ["ROMEO:"], params) == want
        assert "".join(engine.stream("ROMEO:", params)) == want[0][1]


def test_samples_of_one_prompt(plain):
    params = SamplingParams(max_new_tokens=12, n=3, temperature=1.2, ignore_eos=True)
    assert results(speculating(plain, "model", 3), [[4, 5, 6]], params, sample=2) == results(
        plain, [[4, 5, 6]], params, sample=2
    )


def test_requests_that_take_each_others_rows(plain):
    """Seven requests through two rows: a row's drafter begins anew with each."""
    kinds = [{}, {"temperature": 0.9, "seed": 5}]
    requests = [
        Request(PROMPTS[i % 4] + [i], SamplingParams(max_new_tokens=6 + 5 * (i % 3), ignore_eos=True, **kinds[i % 2]), id=i)
        for i in range(7)
    ]
    for drafter in ("model", "self", "ngram"):
        got = {r.id: outs[0].tokens for r, outs in speculating(plain, drafter, 3).generate_many(requests, batch_size=2)}
        want = {r.id: outs[0].tokens for r, outs in plain.generate_many(requests, batch_size=2)}
        assert got == want


def test_a_run_that_another_has_ended(plain):
    """Its last piece was given out when the other began: it ends with that, and does not take the other's tallies."""
    engine = speculating(plain, NgramDrafter(), 3)
    requests = [Request([1, 2, 3 + i], SamplingParams(max_new_tokens=8, ignore_eos=True)) for i in range(3)]
    first = engine.generate_many(requests, 1)
    next(first)
    assert len(list(engine.generate_many(requests, 1))) == 3
    with pytest.raises(RuntimeError, match="the engine has begun another run"):
        next(first)


def test_a_conversation_goes_on(plain):
    """The target's cache is kept from turn to turn, whatever rounds wrote behind its end."""
    params = SamplingParams(max_new_tokens=13, ignore_eos=True)
    for drafter in ("model", "self", "ngram"):
        engine, turns = speculating(plain, drafter, 4), []
        for _ in range(3):
            prompt = [token for turn in turns for token in turn] + [7, 8, 9]
            engine.prepare(1, 120)
            run = Run(engine, [Request(prompt, params)], continues=True)
            list(run.pieces())
            turns += [[7, 8, 9], run.outputs()[0].tokens]
            assert turns[-1] == results(plain, [prompt], params)[0][0]
        assert run.timing.kept_tokens > 25


def test_the_largest_batch_leaves_room_for_the_drafter(plain, monkeypatch):
    """A round's logits of k + 1 tokens, spare rows, and a draft model's cache; look-up has none, `self` shares the target's."""
    monkeypatch.setattr(Engine, "_free_bytes", lambda self: 2**25)
    sizes = {name: speculating(plain, name, 4).largest_batch(100) for name in DRAFTERS}
    none = Engine(plain.model, max_seq_len=plain.max_seq_len).largest_batch(100)
    row = bytes_per_row(plain.model.config, torch.float32)
    assert [DRAFTERS[name](plain.model).bytes_per_row for name in ("model", "ngram", "self")] == [row, 0, 0]
    assert sizes["model"] < sizes["ngram"] == sizes["self"] < none < 256


def test_logprobs(plain):
    params = SamplingParams(max_new_tokens=20, logprobs=3, temperature=0.7, ignore_eos=True)
    want, _ = plain.generate(PROMPTS[:2], params)
    got, _ = speculating(plain, "model", 4).generate(PROMPTS[:2], params)
    for ours, theirs in zip(got, want, strict=True):
        assert [entry.token for entry in ours.logprobs] == theirs.tokens
        for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
            assert [i for i, _ in a.top] == [i for i, _ in b.top]


def test_rows_past_a_length_are_never_read(plain):
    """Both caches full of NaN, as rejected drafts might leave them."""
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    engine = speculating(plain, "model", 5)
    engine.prepare(2, 60)
    for session in (engine.session, engine.speculator.drafter.session):
        for layer in range(session.num_layers):
            for cached in session.cache.layer(layer):
                cached.fill_(math.nan)
    assert results(engine, PROMPTS[:2], params) == results(plain, PROMPTS[:2], params)


def test_bf16_by_teacher_forcing(demo_draft):
    """In bf16 a verified row and a plain step may round apart: each token is, in float32 and by plain PyTorch, within twice
    bf16's error of the best one."""
    engine = Engine.load(DEMO, "cpu", torch.bfloat16)
    engine.speculate(ModelDrafter(demo_draft.to(torch.bfloat16)), 4, adaptive=False)
    (out,), _ = engine.generate(["ROMEO:"], SamplingParams(max_new_tokens=48, ignore_eos=True))
    demo_draft.to(torch.float32)
    ids = torch.tensor(engine.encode("ROMEO:") + out.tokens)
    logits = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = Engine.load(DEMO, "cpu", dtype).model
        logits[dtype] = model.logits(model(model.embed(ids), PrefillStep(len(ids))))[-49:-1]
    exact = logits[torch.float32]
    rounding = (logits[torch.bfloat16] - exact).abs().max()
    assert rounding < 0.1 * exact.std()
    assert (exact.max(dim=1).values - exact.gather(1, ids[-48:, None])[:, 0]).max() <= 2 * rounding


def test_drawn_tokens_follow_the_target(plain):
    """Chi-square of pairs of tokens, the second from a round, over 1,024 samples at a vocabulary of 12; the drafter's own
    distribution is another."""
    config = dataclasses.replace(plain.model.config, vocab_size=12, tie_word_embeddings=False)
    target, draft = Transformer(config, dtype=torch.float32), Transformer(config, dtype=torch.float32)
    for seed, model in enumerate((target, draft)):
        generate.fill_randomly(model, seed)
        model.output.weight.mul_(8)
    engine = Engine(target, max_seq_len=32)
    engine.speculate(ModelDrafter(draft), 2, adaptive=False)
    params = SamplingParams(temperature=0.9, top_k=9, max_new_tokens=3, n=64, ignore_eos=True)
    prompt, counts = [3, 1, 4], torch.zeros(12, 12, dtype=torch.float64)
    for call in range(16):
        outputs, timing = engine.generate([prompt], params, sample=64 * call)
        for out in outputs:
            counts[out.tokens[0], out.tokens[1]] += 1
    assert 0.05 < timing.speculation["acceptance_rate"] < 0.95, "a drafter that is always right or wrong would show little"

    def distribution(ids):
        logits = target.logits(target(target.embed(torch.tensor(ids)), PrefillStep(len(ids))))[-1:] / 0.9
        cut = truncate(logits, torch.tensor([9]), torch.tensor([1.0]), torch.tensor([0.0]))
        return cut.double().softmax(-1)[0]

    first = distribution(prompt)
    expected = torch.stack([p * distribution([*prompt, i]) for i, p in enumerate(first)]) * counts.sum()
    assert counts[expected == 0].sum() == 0, "top-k cuts here too"
    rare = expected < 5
    counts, expected = (torch.cat([t[~rare], t[rare].sum()[None]]) for t in (counts, expected))
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
    degrees = len(counts) - 1
    limit = degrees * (1 - 2 / (9 * degrees) + 4 * math.sqrt(2 / (9 * degrees))) ** 3  # 4 standard deviations
    assert degrees > 20
    assert statistic < limit, f"chi-square with {degrees} degrees of freedom: found {statistic:.1f}, expected below {limit:.1f}"


def test_a_round_asks_nothing_of_the_host(plain):
    """Fake tensors have no values: what reads one on the host, which a capture forbids, raises."""
    for drafter, kind in (("model", "truncate"), ("ngram", "greedy")):
        engine = speculating(plain, drafter, 2)
        engine.prepare(2, 60)
        with FakeTensorMode(allow_non_fake_inputs=True):
            engine.speculator.round(2, kind, False, missed=15)


def test_nan_ends_the_run_where_plain_decoding_ends(plain):
    model = copy_of(plain.model)
    engine = Engine(model, max_seq_len=128)
    free = results(engine, [[4, 5, 6]], SamplingParams(max_new_tokens=12, ignore_eos=True))[0][0]
    at = next(i for i in range(3, 12) if free[i] not in free[:i])
    model.tok_embeddings.weight[free[at]] = math.nan  # fed, it breaks all that follows; the head is tied: so does choosing it
    for drafter in (None, "ngram", "model"):
        engine = Engine(model, max_seq_len=128)
        if drafter:
            engine.speculate(DRAFTERS[drafter](plain.model), 4, adaptive=False)
        with pytest.raises(FloatingPointError, match="NaN at token 1 of output 0"):
            engine.generate([[4, 5, 6]], SamplingParams(max_new_tokens=12, ignore_eos=True))


# ---------------------------------------------------------------- acceptance and k


def test_a_twin_of_the_target_is_always_right(plain):
    for params in ({}, {"temperature": 1.0}):
        engine = speculating(plain, ModelDrafter(copy_of(plain.model)), 3)
        outputs, timing = engine.generate([[4, 5, 6]], SamplingParams(max_new_tokens=41, ignore_eos=True, **params))
        s = timing.speculation
        assert (s["rounds"], s["drafted"], s["accepted"], s["acceptance_length"]) == (10, 30, 30, 4.0)
        assert s["acceptance_by_position"] == [1.0, 1.0, 1.0]
        assert len(outputs[0].tokens) == 1 + 10 * 4


def test_text_that_repeats(plain):
    """N-gram drafts of a text of period 3 all stand, once it has been seen."""
    model = copy_of(plain.model)
    for layer in model.layers:  # what is left chooses by the last token alone
        layer.attention.wo.weight.zero_()
        layer.feed_forward.w2.weight.zero_()
    head = model.tok_embeddings.weight
    head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(0)))
    model.config = dataclasses.replace(model.config, tie_word_embeddings=False)
    successor = torch.arange(199)
    successor[[1, 2, 3]] = torch.tensor([3, 1, 2])  # the head's row of 3 answers to the embedding of 1, and so on
    output = type(model.tok_embeddings)(199, 64, dtype=torch.float32)
    output.weight.copy_(head[successor])
    model.output = output
    engine = Engine(model, max_seq_len=128)
    engine.speculate(NgramDrafter(), 5, adaptive=False)
    (out,), timing = engine.generate([[1]], SamplingParams(max_new_tokens=62, ignore_eos=True))
    assert out.tokens == [[2, 3, 1], [3, 1, 2]][out.tokens[0] == 3] * 20 + out.tokens[:2]
    assert timing.speculation["acceptance_length"] > 4.5


def test_best_k():
    costs = {8: 9.0, 4: 6.5, 2: 5.2, 1: 4.6, 0: 4.0}
    assert [best_k(alpha, costs) for alpha in (0.0, 0.1, 0.3, 0.6, 0.9, 1.0)] == [0, 0, 1, 2, 8, 8]
    assert expected_tokens(0.5, 3) == 1.875
    assert expected_tokens(1.0, 3) == 4


def test_the_estimate_follows_what_happens():
    acceptance = Acceptance()
    for _ in range(60):
        acceptance.add(1, 2)
    assert acceptance.alpha == pytest.approx(0.5, abs=0.05)
    for _ in range(40):
        acceptance.add(0, 1)
    assert acceptance.alpha < 0.1
    for _ in range(20):
        acceptance.add(4, 4)
    assert acceptance.alpha > 0.9


def test_times_are_of_the_kind_that_ran(plain, monkeypatch):
    """A session that has drawn since it chose greedily still has the greedy rounds' times."""
    times = itertools.count(1)
    monkeypatch.setattr(Speculator, "_time_ms", lambda self, work: float(next(times)))
    engine = speculating(plain, "ngram", 2, adaptive=True)
    engine.prepare(1, 16)
    told = []
    for kind in ("greedy", "draw", "greedy"):
        engine.speculator.begin(kind, logprobs=False)
        statistics = engine.speculator.statistics(Timing(), 0)
        told.append([statistics[name] for name in ("draft_ms", "verify_ms", "plain_ms")])
    assert told[0] == told[2] != told[1]


@pytest.fixture
def costs(monkeypatch):
    """Rounds that cost what those of a large target and a small draft do."""
    prepare = Speculator.prepare

    def prepared(self, kind, logprobs):
        prepare(self, kind, logprobs)
        self.round_ms[kind] = {k: 4.0 + 0.7 * k for k in self.choices} | {0: 4.05}

    monkeypatch.setattr(Speculator, "prepare", prepared)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_useless_drafter_is_switched_off(plain, costs, batch):
    params = SamplingParams(max_new_tokens=80, ignore_eos=True)
    engine = speculating(plain, "constant", 8, adaptive=True)
    assert results(engine, PROMPTS[:batch], params) == results(plain, PROMPTS[:batch], params)
    s = engine.generate(PROMPTS[:batch], params)[1].speculation  # what was learnt of the drafter is kept
    assert s["switched_off"]
    assert set(s["launches_by_k"]) == {0}
    assert s["plain_steps"] >= 14 * s["rounds"] > 0


def test_a_good_drafter_gets_the_largest_k(plain, costs):
    params = SamplingParams(max_new_tokens=80, ignore_eos=True)
    engine = speculating(plain, ModelDrafter(copy_of(plain.model)), 8, adaptive=True)
    assert results(engine, PROMPTS, params) == results(plain, PROMPTS, params)
    s = engine.generate(PROMPTS, params)[1].speculation
    assert not s["switched_off"]
    assert set(s["launches_by_k"]) == {8}


@pytest.mark.parametrize("batch", [1, 4])
def test_a_drafter_that_was_off_catches_up(plain, costs, batch):
    """A twin of the target, switched off by force: each look at it finds its draft right, so its cache has what it missed."""
    params = SamplingParams(max_new_tokens=75, ignore_eos=True)
    engine = speculating(plain, ModelDrafter(copy_of(plain.model)), 4, adaptive=True)
    engine.prepare(batch, 120)
    engine.speculator.acceptance.kept = 0.0
    engine.speculator.acceptance.tried = 20.0
    for session in (engine.session, engine.speculator.drafter.session):
        for layer in range(session.num_layers):
            for cached in session.cache.layer(layer):
                cached.fill_(math.nan)
    outputs, timing = engine.generate(PROMPTS[:batch], params)
    assert [o.tokens for o in outputs] == [tokens for tokens, _, _ in results(plain, PROMPTS[:batch], params)]
    s = timing.speculation
    assert s["acceptance_by_position"][0] == 1.0
    assert s["launches_by_k"][0] >= (4 if batch == 1 else 1)
    if batch == 4:  # four sequences tell more of it: it is switched on again
        assert s["launches_by_k"][4] > 0


# ---------------------------------------------------------------- the demo pair, the command line, refusals


@pytest.mark.parametrize(("temperature", "least"), [(0.0, 0.7), (0.8, 0.6)])
def test_the_demo_pair(demo, demo_draft, temperature, least):
    params = SamplingParams(max_new_tokens=48, temperature=temperature, ignore_eos=True, seed=1)
    engine = speculating(demo, ModelDrafter(demo_draft), 2)
    prompts = ["ROMEO:", "First Citizen:\nBefore we"]
    outputs, timing = engine.generate(prompts, params)
    assert [o.tokens for o in outputs] == [o.tokens for o in demo.generate(prompts, params)[0]]
    assert timing.speculation["acceptance_rate"] > least


def test_the_copy_in_int4_is_near(plain):
    ids = torch.arange(40)
    step = PrefillStep(40)
    logits = [m.logits(m(m.embed(ids), step)) for m in (plain.model, quantized_copy(plain.model))]
    assert (logits[0] - logits[1]).norm() < 0.5 * logits[0].norm()
    assert (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean() >= 0.4


def test_the_command_line(capsys, monkeypatch):
    monkeypatch.undo()  # rounds are timed
    argv = ["--device", "cpu", "--dtype", "float32", "--temperature", "0", "--max_new_tokens", "16", "--json"]
    texts, metrics = [], []
    for more in ([], ["--speculate", "ngram", "--speculate_k", "3"], ["--draft-checkpoint-path", str(DEMO / "draft")]):
        assert generate.main([*argv, *more]) == 0
        captured = capsys.readouterr()
        result = json.loads(captured.out.splitlines()[-1])
        texts.append(result["outputs"])
        metrics.append(result["metrics"])
    assert texts[1] == texts[2] == texts[0]
    assert "speculation" not in metrics[0]
    assert metrics[1]["speculation"]["k"] == 3
    s = metrics[2]["speculation"]
    assert s["drafter"] == "draft model draft"
    assert {"acceptance_rate", "acceptance_length", "acceptance_by_position", "draft_ms", "verify_ms", "speedup"} <= set(s)
    assert "drafts accepted" in captured.err


def test_a_prompt_file_says_who_drafts(tmp_path, capsys):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"id": 1, "prompt": "To be", "max_new_tokens": 4}\n')
    files = ["--prompt_file", str(prompts), "--output_file", str(out)]
    assert generate.main(["--device", "cpu", "--speculate", "ngram", "--batch_size", "1", *files]) == 0
    assert "path: speculation: ngram" in capsys.readouterr().err
    assert len(json.loads(out.read_text())["outputs"][0]["tokens"]) == 4


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["--speculate", "ngram", "--speculate_k", "16"], 1, ["speculate_k", "16", "1 to 15"]),
        (["--speculate_k", "4"], 2, ["--speculate_k", "--draft_checkpoint_path"]),
        (["--speculate", "eagle"], 2, ["--speculate", "eagle", "ngram"]),
        (["--speculate", "self", "--draft_checkpoint_path", "x"], 2, ["--speculate", "one of them"]),
        (["--speculate", "ngram", "--decode_mode", "compile"], 1, ["decode_mode", "compile", "eager"]),
        (["--speculate", "ngram", "--batch_invariant"], 1, ["batch_invariant", "speculation", "one of them"]),
        (["--speculate", "ngram", "--repetition_penalty", "1.2"], 1, ["repetition_penalty", "1.2", "speculation"]),
        (["--speculate", "self", "--quantize", "int8"], 1, ["self", "int8", "plain weights"]),
        (["--draft_checkpoint_path", "/nowhere"], 1, ["/nowhere"]),
    ],
)
def test_bad_usage_gets_one_line(argv, status, words, capsys):
    try:
        got = generate.main(["--device", "cpu", *argv])
    except SystemExit as exit:
        got = exit.code
    err = capsys.readouterr().err
    assert got == status
    assert all(w in err.splitlines()[-1] for w in words), err
    assert "Traceback" not in err


def test_a_draft_model_of_other_tokens_is_refused(tmp_path, capsys):
    draft = shutil.copytree(DEMO / "draft", tmp_path / "draft")
    ranks = [line.split() for line in (draft / "tokenizer.model").read_text().splitlines()]
    ranks[0][0], ranks[1][0] = ranks[1][0], ranks[0][0]
    (draft / "tokenizer.model").write_text("".join(f"{token} {rank}\n" for token, rank in ranks))
    assert generate.main(["--device", "cpu", "--draft_checkpoint_path", str(draft)]) == 1
    assert f"{draft}: token 0: found " in capsys.readouterr().err.splitlines()[-1]


def test_a_draft_model_that_does_not_fit_is_refused(plain, directory, demo_draft):
    engine = Engine.load(directory, "cpu", torch.float32)
    with pytest.raises(ValueError, match="draft model's vocabulary: found 2048 tokens, expected the target's 199"):
        engine.speculate(ModelDrafter(demo_draft))
    short = Transformer(dataclasses.replace(plain.model.config, max_position_embeddings=64), dtype=torch.float32)
    with pytest.raises(ValueError, match="draft model's context: found 64, expected at least 256"):
        engine.speculate(ModelDrafter(short))
    engine.speculate(NgramDrafter())
    with pytest.raises(ValueError, match="embeddings with speculation"):
        engine.generate([torch.zeros(3, 64)])
