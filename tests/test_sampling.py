"""Sampling: parameters and their ranges, the cuts against transformers', distributions against exact probabilities."""

import dataclasses
import math

import pytest
import torch
from families import hf_model
from transformers.generation import logits_process as theirs

from decoding import RING
from generate import Engine
from model import ModelConfig, PrefillStep, Transformer
from sampling import KINDS, SAMPLING_FIELDS, SamplingParams, SamplingState, choose, penalize, sampling_fields, truncate

# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-1, math.nan, math.inf, 2.1, True, "hot"]),
        ("top_k", [-1, 1.5, True, 2**31]),
        ("top_p", [0, -0.1, 1.1, math.nan]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("repetition_penalty", [0, -1, math.nan, math.inf]),
        ("seed", [0.5, 2**63]),
        ("n", [0, 1.0]),
        ("logprobs", [-1, 21, True]),
        ("max_new_tokens", [0, 1.5]),
        ("stop", [("",), "END", (3,)]),
        ("stop_token_ids", [(-1,), ("a",)]),
        ("ignore_eos", [1, None]),
    ],
)
def test_ranges(field, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{field}: found .*, expected "):
            SamplingParams(**{field: value})


def test_kinds():
    kind = lambda **given: SamplingParams(**given).kind
    assert kind() == kind(top_k=5) == kind(temperature=1e-9) == "greedy"
    assert kind(temperature=1.0) == "draw"
    assert kind(temperature=1.0, top_k=1) == kind(temperature=1.0, top_p=0.9) == kind(temperature=1.0, min_p=0.1) == "truncate"
    assert kind(repetition_penalty=1.1) == "penalize"


# ---------------------------------------------------------------- the cuts, against transformers


def shapes_of_logits():
    random = torch.randn(8, 300, generator=torch.Generator().manual_seed(0)) * 3
    peaked = torch.full((1, 300), -4.0).index_fill(1, torch.tensor([17]), 30.0)
    padded = random[:2].clone().index_fill(1, torch.arange(280, 300), -math.inf)
    return {"random": random, "peaked": peaked, "flat": torch.zeros(1, 300), "tied": (random * 2).round() / 2, "padded": padded}


@pytest.mark.parametrize("name", shapes_of_logits())
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        *((1.0, k, 1.0, 0.0) for k in (1, 5, 299, 300, 1000)),
        *((1.0, 0, p, 0.0) for p in (1e-6, 0.3, 0.9, 0.999)),
        *((1.0, 0, 1.0, p) for p in (0.01, 0.5, 1.0)),
        *((0.3, 50, 0.9, 0.05), (1.7, 50, 0.9, 0.05), (1.0, 0, 1.0, 0.0)),
    ],
)
def test_cuts_are_those_of_transformers(name, temperature, top_k, top_p, min_p):
    """The same tokens are left. Only ties with the last token that top-p keeps are ours beyond theirs: theirs cuts them by
    the order in which its sort happens to put them."""
    logits = shapes_of_logits()[name]
    expected = theirs.TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits
    if top_k:
        expected = theirs.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = theirs.TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = theirs.MinPLogitsWarper(min_p)(None, expected)
    warm, of_all = logits / temperature, torch.ones(len(logits))
    got = truncate(warm, top_k * of_all.int(), top_p * of_all, min_p * of_all)
    kept, wanted = got > -math.inf, expected > -math.inf
    least = warm.masked_fill(~wanted, math.inf).amin(-1, keepdim=True)
    tied = (warm == least) if top_p < 1 else torch.zeros_like(kept)
    assert torch.equal(kept | tied, wanted | (tied & (logits > -math.inf)))
    assert not (wanted & ~kept).any()
    assert torch.equal(got[kept], warm[kept])


def test_cuts_differ_by_row():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    settings = [(3, 1.0, 0.0), (0, 0.5, 0.0), (0, 1.0, 0.3)]
    together = truncate(logits, *(torch.tensor(column) for column in zip(*settings, strict=True)))
    for row, (k, p, least) in enumerate(settings):
        alone = truncate(logits[row : row + 1], torch.tensor([k]), torch.tensor([p]), torch.tensor([least]))
        assert torch.equal(together[row], alone[0])


def test_no_cut_is_undone_by_rounding():
    """Sums of many probabilities stop short of 1 or pass it: the tail is neither let back in nor, without top-p, cut off."""
    logits = torch.randn(4, 128_256, generator=torch.Generator().manual_seed(2)) * 0.1
    off, one = torch.zeros(4, dtype=torch.int32), torch.ones(4)
    for k in (1, 50, 3001):
        assert (truncate(logits, off + k, one, 0 * one) > -math.inf).sum(-1).tolist() == [k] * 4
    assert torch.equal(truncate(logits, off, one, 0 * one), logits)


def test_nan_survives_the_cuts():
    logits = torch.zeros(1, 9).index_fill(1, torch.tensor([4]), math.nan)
    one = torch.ones(1)
    best, _ = choose(logits, *(one.int(), one, one.long(), one.int(), one.int() * 3, one * 0.5, one * 0.1))
    assert best.isnan().all()


# ---------------------------------------------------------------- the draw


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> tuple[float, float]:
    """The statistic, and what it exceeds once in 30,000 (Wilson-Hilferty, z = 4). No count may be where no probability is."""
    possible = probs > 0
    assert counts[~possible].sum() == 0
    expected = probs[possible].double() * counts.sum()
    assert expected.min() > 5, "too few draws for a chi-square"
    df = possible.sum().item() - 1
    limit = df * (1 - 2 / (9 * df) + 4 * math.sqrt(2 / (9 * df))) ** 3
    return ((counts[possible] - expected) ** 2 / expected).sum().item(), limit


LOGITS = torch.tensor([0.3, -0.5, 1.4, 1.4, -2.0, 0.0, 0.9, -0.2])
SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 2.0, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.3, "min_p": 0.3},
    {"temperature": 0.9, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
]


def exact(logits, params):
    """Probabilities after temperature and cuts, in float64, from the definitions."""
    probs = (logits.double() / params.temperature).softmax(-1)
    order = probs.argsort(descending=True, stable=True).tolist()
    kept = [i for i in order if not params.top_k or probs[i] >= probs[order[min(params.top_k, len(order)) - 1]]]
    whole = probs[kept].sum()
    kept = [i for i in kept if sum(probs[j] for j in kept if probs[j] > probs[i]) < params.top_p * whole]
    kept = [i for i in kept if probs[i] >= params.min_p * probs[order[0]]]
    out = torch.zeros_like(probs)
    out[kept] = probs[kept] / probs[kept].sum()
    return out


@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_draws_follow_the_distribution(given):
    """20,000 draws at a vocabulary of eight: chi-square fits, and would not fit a temperature that is a quarter off."""
    params, n = SamplingParams(seed=11, **given), 20_000
    fields = sampling_fields(params)
    settings = [torch.tensor([fields[name]], dtype=SAMPLING_FIELDS[name]).expand(n) for name in KINDS["truncate"]]
    logits, position = LOGITS.expand(n, 8), torch.arange(n, dtype=torch.int32)
    counts = choose(logits, position, *settings)[1].flatten().bincount(minlength=8)
    statistic, limit = chi_square(counts, exact(LOGITS, params))
    assert statistic < limit
    warmer = torch.where(exact(LOGITS, params) > 0, (LOGITS * 0.75 / params.temperature).exp(), 0)
    statistic, limit = chi_square(counts, warmer / warmer.sum())
    assert statistic > limit


@pytest.mark.parametrize("mode", ["eager", "compile"])
def test_generated_tokens_follow_the_distribution(mode):
    """Through the whole step: a model that gives LOGITS whatever came before, 100 samples of 60 tokens."""
    config = ModelConfig("llama", 8, 64, 64, 1, 1, 1, 64, 1e-5, 1e4, None, 128, False, dtype=torch.float32)
    model = Transformer(config)
    for name, tensor in model.state_dict().items():
        tensor.fill_(1.0 if "norm" in name or "embeddings" in name else 0.0)
    model.output.weight.copy_(LOGITS[:, None] / 64)
    engine = Engine(model, decode_mode=mode, max_seq_len=128)
    for given in (SETTINGS[1], SETTINGS[5]):
        params = SamplingParams(seed=3, n=100, max_new_tokens=60, **given)
        outputs, _ = engine.generate([[1, 2, 3]], params)
        counts = torch.tensor([t for o in outputs for t in o.tokens]).bincount(minlength=8)
        statistic, limit = chi_square(counts, exact(LOGITS, params))
        assert statistic < limit, given


# ---------------------------------------------------------------- repetition penalty, logprobs, n


def test_penalty_is_that_of_transformers():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(3, 40, generator=generator) * 3
    ids = torch.randint(0, 40, (3, 12), generator=generator)
    state = SamplingState(3, 40)
    for row, penalty in enumerate((1.3, 0.7, 1.0)):
        state.repetition_penalty[row] = penalty
        state.see(row, torch.tensor([5]))  # forgotten by the next
        state.see(row, ids[row])
    got = penalize(logits, state.seen, state.repetition_penalty)
    for row, penalty in enumerate((1.3, 0.7, 1.0)):
        expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(ids[row : row + 1], logits[row : row + 1])
        torch.testing.assert_close(got[row], expected[0], rtol=1e-6, atol=0)
    assert not torch.equal(got[:2], logits[:2])
    assert torch.equal(got[2], logits[2])


@pytest.fixture(scope="module")
def hf():
    return hf_model("llama3")


@pytest.fixture(scope="module")
def directory(hf, tmp_path_factory):
    path = tmp_path_factory.mktemp("llama3")
    hf.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engine(directory):
    return Engine.load(directory, "cpu", torch.float32, max_seq_len=128)


@pytest.mark.parametrize("mode", ["eager", "compile"])
def test_greedy_with_a_penalty_gives_the_tokens_of_transformers(mode, hf, directory):
    prompt = [4, 5, 6, 4, 77, 90]
    options = {"do_sample": False, "max_new_tokens": 24, "min_new_tokens": 24, "pad_token_id": 0}
    expected = hf.generate(torch.tensor([prompt]), repetition_penalty=1.5, **options)[0, len(prompt) :].tolist()
    assert expected != hf.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    engine = Engine.load(directory, "cpu", torch.float32, decode_mode=mode, max_seq_len=128)
    engine.stop_ids = set()
    for _ in range(2):  # what one run saw does not reach the next
        (out,), _ = engine.generate([prompt], SamplingParams(max_new_tokens=24, repetition_penalty=1.5, logprobs=3))
        assert out.tokens == expected
        check_logprobs(engine, prompt, out, 3)


def check_logprobs(engine, prompt, out, top):
    """Against one forward over prompt and answer."""
    ids = torch.tensor(prompt + out.tokens)
    expected = engine.model.logits(engine.model(engine.model.embed(ids), PrefillStep(len(ids))))
    expected = expected[len(prompt) - 1 : -1].log_softmax(-1)
    assert [entry.token for entry in out.logprobs] == out.tokens
    for entry, row in zip(out.logprobs, expected, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token].item(), abs=1e-4)
        best = row.topk(top).values.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best, abs=1e-4)
        assert [row[token].item() for token, _ in entry.top] == pytest.approx(best, abs=1e-4)


def test_each_prompt_has_its_own_parameters(engine):
    prompts = [list(range(3, 3 + n)) for n in (4, 17, 9, 6)]
    params = [
        SamplingParams(max_new_tokens=12, ignore_eos=True, **given)
        for given in (
            {"repetition_penalty": 1.8},
            {"temperature": 1.0, "seed": 7},
            {},
            {"temperature": 1.2, "top_k": 9, "top_p": 0.8, "logprobs": 3, "seed": 9},
        )
    ]
    together, _ = engine.generate(prompts, params)
    alone = [engine.generate([prompt], p)[0][0] for prompt, p in zip(prompts, params, strict=True)]
    assert [o.tokens for o in together] == [o.tokens for o in alone]
    assert [o.logprobs is None for o in together] == [True, True, True, False]
    assert together[3].logprobs[5].token == alone[3].logprobs[5].token


def test_logprobs_are_of_the_raw_distribution(tmp_path):
    """Although penalty, temperature and cuts are on; more tokens than the ring holds."""
    hf_model("llama3", max_position_embeddings=512).save_pretrained(tmp_path)
    engine = Engine.load(tmp_path, "cpu", torch.float32)
    given = {"temperature": 1.5, "top_k": 40, "repetition_penalty": 1.2, "seed": 2, "ignore_eos": True}
    (out,), _ = engine.generate([[4, 5, 6]], SamplingParams(logprobs=4, max_new_tokens=RING + 40, **given))
    assert len(out.tokens) == RING + 40
    check_logprobs(engine, [4, 5, 6], out, 4)
    (none,), _ = engine.generate([[4, 5, 6]], SamplingParams(logprobs=0, max_new_tokens=5, **given))
    assert [entry.top for entry in none.logprobs] == [[]] * 5
    (off,), _ = engine.generate([[4, 5, 6]], SamplingParams(max_new_tokens=5, **given))
    assert "logprobs" not in off.to_dict()
    assert off.tokens == none.tokens == out.tokens[:5]


def test_n_samples_are_those_that_come_one_by_one(engine):
    prompts = [[4, 5, 6], [7, 8, 9, 10]]
    params = [SamplingParams(temperature=1.2, n=n, seed=1, max_new_tokens=10, ignore_eos=True) for n in (3, 2)]
    outputs, timing = engine.generate(prompts, params)
    expected = [
        engine.generate([prompt], dataclasses.replace(p, n=1), sample=sample)[0][0].tokens
        for prompt, p in zip(prompts, params, strict=True)
        for sample in range(p.n)
    ]
    assert [o.tokens for o in outputs] == expected
    assert len({tuple(t) for t in expected}) == 5
    assert timing.prefill_tokens == 7, "a prompt is prefilled once for all of its samples"
    with pytest.raises(ValueError, match="n: found 3, expected 1"):
        engine.stream(prompts[0], params[0])
