"""head and advance: logits and candidates against float64, draws against Philox and the softmax, the step's bookkeeping."""

import math
import sys

import pytest
import torch
from tolerance import assert_within

from kernels._matmul import Operand
from kernels._random import gumbel_ref, philox_ref, token_positions
from kernels.formats import Weight
from kernels.head import ARGMAX_BLOCK, PARTIALS, advance, advance_ref, head, head_ref, partial_argmax
from kernels.tiles import Tile, override_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5


@pytest.fixture
def few_sms(monkeypatch):
    monkeypatch.setattr(sys.modules["kernels.head"], "num_sms", lambda index=0: 3)


def randn(*size, dtype=torch.float32, scale=1.0):
    return (torch.randn(*size) * scale).to(dtype).to(DEVICE)


def make(M, K, V, dtype=torch.bfloat16) -> tuple[torch.Tensor, Weight, torch.Tensor]:
    weight = Weight(V, K, dtype=dtype, device=DEVICE)
    weight.weight.copy_(randn(V, K, dtype=dtype, scale=3 * K**-0.5))
    return randn(M, K, dtype=dtype), weight, randn(K, dtype=dtype)


def sampling(temperature, seed=None) -> dict:
    B = len(temperature)
    return {
        "temperature": torch.tensor(temperature, dtype=torch.float32, device=DEVICE),
        "seed": torch.tensor(seed or range(2**40, 2**40 + B), dtype=torch.int64, device=DEVICE),
        "sample": torch.arange(B, dtype=torch.int32, device=DEVICE),
    }


def best(values, ids):
    """The choice that `advance` makes among candidates."""
    largest = values.max(dim=1, keepdim=True).values
    return largest.squeeze(1), torch.where(values == largest, ids, 2**31 - 1).min(dim=1).values


TILES = [
    (1, Tile(4, 64, 4)),
    (3, Tile(8, 128, 2, preload=1)),  # K masked
    (1, Tile(4, 64, 4, grid=2, stages=2)),  # further tiles in the loop
    (2, Tile(16, 64, 4, grid=1)),
    (3, Tile(64, 64, 4, dot=True, preload=1)),
    (20, Tile(32, 32, 4, dot=True, preload=2)),
]


@pytest.mark.parametrize("V", [5, ARGMAX_BLOCK, 2 * ARGMAX_BLOCK + 77])
def test_partial_argmax(V):
    """Of equal logits the lowest id, whichever block they are in; -inf everywhere; NaN wins, as infinity."""
    logits = randn(6, V)
    logits[1, [V // 2, V - 1]] = 9.0
    logits[2] = -math.inf
    logits[3, V - 2] = math.nan
    logits[4] = 1.0
    logits[5, 3:] = -math.inf
    values, ids = best(*partial_argmax(logits))
    wide = logits.nan_to_num(nan=math.inf, neginf=-math.inf)
    assert torch.equal(values, wide.max(dim=1).values)
    expected = [int((row == row.max()).nonzero()[0]) for row in wide.cpu()]
    assert ids.tolist() == expected
    torch.library.opcheck(torch.ops.rooflama.partial_argmax.default, (logits,))
    with pytest.raises(ValueError, match=r"logits: found torch.float16 \[6, .*expected float32"):
        partial_argmax(logits.half())


def check_candidates(logits, values, ids, lengths, temperature=None, seed=None, sample=None):
    """They must be right for the kernel's own logits, draw by draw."""
    want = logits
    if temperature is not None:
        sequence, position = token_positions(lengths, len(logits))
        noise = gumbel_ref(seed[sequence], sample[sequence], position, logits.shape[1])
        warm = temperature[sequence, None]
        want = torch.where(warm > 0, logits / warm.clamp(min=1e-6) + noise, logits)
    largest, chosen = best(values, ids)
    torch.testing.assert_close(largest, want.max(dim=1).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(want.gather(1, chosen[:, None].long()).squeeze(1), largest, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [None, 0.0, 0.8, "mixed"])
@pytest.mark.parametrize(("M", "tile"), TILES, ids=lambda t: f"{t.rows}-{t.grid}-{t.dot}" if isinstance(t, Tile) else str(t))
def test_head(M, tile, temperature, few_sms):
    K, V, vocab_size = 192, 207, 203  # as a fine-tune with added tokens may have
    x, weight, norm = make(M, K, V)
    lengths = torch.arange(1, M + 1, dtype=torch.int32, device=DEVICE)
    t = [[0.0, 0.7, 1.3][i % 3] if temperature == "mixed" else temperature for i in range(M)]
    draw = sampling(t) if temperature is not None else {}
    with override_tiles({"head": tile}):
        logits, values, ids = head(x, weight, norm=norm, eps=EPS, vocab_size=vocab_size, lengths=lengths, **draw)
    arguments = (draw.get("temperature"), draw.get("seed"), draw.get("sample"), lengths)
    exact, _, _ = head_ref(x.double(), weight.weight.double(), norm.double(), EPS, vocab_size, *arguments)
    assert (logits[:, vocab_size:] == -math.inf).all()
    working = torch.nn.functional.linear(
        (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS) * norm).to(x.dtype), weight.weight
    )
    assert_within(logits[:, :vocab_size], working[:, :vocab_size], exact[:, :vocab_size].double())
    check_candidates(logits, values, ids, lengths, **draw)


def test_philox_known_answers():
    """The test vectors of Random123 (kat_vectors, philox4x32 10 rounds), with our key in 64 bits."""
    ones = 0xFFFFFFFF
    cases = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, (low, high), want in cases:
        key = low | high << 32
        key = torch.tensor(key - (1 << 64) if key >= 1 << 63 else key)
        assert tuple(int(w) for w in philox_ref(key, [torch.tensor(c) for c in counter])) == want


def test_ties_go_to_the_lowest_id():
    """Equal rows of the weight, in one tile, in two tiles of one program, and in two programs."""
    for rows in ((4, 5), (5, 40), (100, 11, 150)):
        x, weight, norm = make(1, 64, 160)
        weight.weight[list(rows)] = (x[0] * norm).sign()  # the largest logit that there is
        lengths = torch.ones(1, dtype=torch.int32, device=DEVICE)
        with override_tiles({"head": Tile(4, 64, 4, grid=1)}), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules["kernels.head"], "num_sms", lambda index=0: 3)
            _, values, ids = head(x, weight, norm=norm, eps=EPS, vocab_size=160, lengths=lengths)
        assert best(values, ids)[1].tolist() == [min(rows)]


def test_choices_follow_the_softmax():
    """Chi-square of 4000 draws over a vocabulary of 16, at two temperatures; keys differ by position, sample or seed."""
    V, K, draws = 16, 64, 4000
    x, weight, norm = make(1, K, V, torch.float32)
    logits = head_ref(x, weight.weight, norm, EPS, V, None, None, None, torch.ones(1, dtype=torch.int32))[0]
    logits = logits * 2 / logits.std()
    for temperature in (0.7, 1.5):
        i = torch.arange(draws)
        noise = gumbel_ref(i % 10, i // 10 % 20, i // 200, V).to(logits.device)
        counts = torch.bincount((logits / temperature + noise).argmax(dim=1), minlength=V).double()
        expected = torch.softmax(logits[0].double() / temperature, 0) * draws
        rare = expected < 5  # pooled, as the test asks for
        counts, expected = (torch.cat([t[~rare], t[rare].sum()[None]]) for t in (counts, expected))
        statistic = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
        degrees = len(counts) - 1
        # Wilson and Hilferty's approximation; 4 standard deviations: one run in 30,000, and the seed is fixed
        limit = degrees * (1 - 2 / (9 * degrees) + 4 * math.sqrt(2 / (9 * degrees))) ** 3
        assert statistic < limit, (
            f"chi-square with {degrees} degrees of freedom: found {statistic:.1f}, expected below {limit:.1f}"
        )


def test_a_draw_depends_on_its_key_only():
    """The same (seed, sample, position) draws the same token in any slot of any batch, alone or with T = 2 query tokens."""
    x, weight, norm = make(1, 64, 96)
    x = x.expand(6, 64).contiguous()

    def choices(rows, lengths, seeds, samples):
        draw = sampling([1.0] * len(seeds), seeds)
        draw["sample"] = torch.tensor(samples, dtype=torch.int32, device=DEVICE)
        lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        with override_tiles({"head": Tile(32, 64, 4, dot=True)}):  # so that the logits are the same, too
            _, values, ids = head(x[:rows], weight, norm=norm, eps=EPS, vocab_size=96, lengths=lengths, **draw)
        return best(values, ids)[0].tolist()

    alone = choices(1, [9], [5], [1])[0]
    batch = choices(4, [3, 9, 9, 9], [5, 5, 6, 5], [1, 1, 1, 2])
    assert math.isclose(batch[1], alone, rel_tol=1e-5)
    assert all(not math.isclose(v, alone, rel_tol=1e-3) for v in (batch[0], batch[2], batch[3]))
    two_tokens = choices(6, [7, 9, 4], [1, 5, 2], [1, 1, 1])  # rows 2 and 3 choose for positions 8 and 9
    assert math.isclose(two_tokens[3], alone, rel_tol=1e-5)


@pytest.mark.parametrize("temperature", [None, 0.0, 1.0])
@pytest.mark.parametrize("tile", [Tile(4, 64, 4), Tile(32, 64, 4, dot=True)], ids=["fma", "dot"])
def test_nan_reaches_the_candidates(tile, temperature):
    x, weight, norm = make(2, 64, 160)
    weight.weight[77] = math.nan
    draw = {} if temperature is None else sampling([temperature] * 2)
    lengths = torch.ones(2, dtype=torch.int32, device=DEVICE)
    with override_tiles({"head": tile}):
        logits, values, ids = head(x, weight, norm=norm, eps=EPS, vocab_size=160, lengths=lengths, **draw)
    assert logits[:, 77].isnan().all()
    assert (best(values, ids)[0] == math.inf).all()


# ---------------------------------------------------------------- advance


def make_state(P=PARTIALS, V=96, K=80, R=5):
    """Seven sequences: plain, at its limit, NaN, nothing possible, a stop token, done, absent."""

    def ints(*values):
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    value, ids = randn(7, P), torch.randint(0, V, (7, P), dtype=torch.int32).to(DEVICE)
    value[0, P // 2], ids[0, P // 2] = 9.0, 36
    value[1, 5] = value[1, P - 1] = 9.0
    ids[1, 5], ids[1, P - 1] = 50, 20
    value[2, 7], value[3] = math.inf, -math.inf
    value[4, 3], ids[4, 3] = 9.0, 11
    stop = torch.full((7, 3), -1, dtype=torch.int32, device=DEVICE)
    stop[4, 1] = 11
    state = {
        "token": ints(0, 1, 2, 3, 4, 5, 6), "cursor": ints(0, 4, 5, 6, 7, 13, 2), "done": ints(0, 0, 0, 0, 0, 1, 0),
        "flag": ints(0, 0, 0, 0, 0, 0, 0), "lengths": ints(3, 4, 5, 6, 7, 8, 0), "limit": ints(4, 4, 99, 99, 99, 99, 99),
        "stop_ids": stop, "ring": torch.full((7, R), -7, dtype=torch.int32, device=DEVICE),
        "embedding": randn(V, K, dtype=torch.bfloat16), "x": randn(7, K, dtype=torch.bfloat16),
    }  # fmt: skip
    return value, ids, state


@pytest.mark.parametrize("P", [PARTIALS, 20])
def test_advance(P):
    value, ids, state = make_state(P)
    ahead = make(1, 64, 48)[1]  # changes nothing
    want = {name: t.clone() for name, t in state.items()}
    advance_ref(value, ids, **want)
    advance(value, ids, **state, ahead=ahead)
    for name, t in state.items():
        assert torch.equal(t, want[name]), name
    assert state["token"].tolist() == [36, 20, 2, 3, 11, 5, 6]
    assert state["cursor"].tolist() == [1, 5, 5, 6, 8, 13, 2]
    assert state["done"].tolist() == [0, 1, 1, 1, 1, 1, 0]
    assert state["flag"].tolist() == [0, 0, 1, 1, 0, 0, 0]
    assert state["lengths"].tolist() == [4, 0, 0, 0, 0, 8, 0]
    ring = torch.full((7, 5), -7)
    ring[0, 0], ring[1, 4], ring[4, 2] = 36, 20, 11
    assert torch.equal(state["ring"].cpu().long(), ring)
    assert torch.equal(state["x"], state["embedding"][state["token"].long()])


def test_advance_flags_a_candidate_that_is_nan():
    value, ids, state = make_state(20)
    value[0, 3] = math.nan
    advance(value, ids, **state)
    assert state["flag"].tolist() == [1, 0, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token": torch.zeros(7)}, r"token: found torch.float32 \[7\], expected int32 \[7\]"),
        ({"ring": torch.zeros(6, 5, dtype=torch.int32)}, r"ring: found torch.int32 \[6, 5\], expected int32 \[7, at least 1\]"),
        ({"x": torch.zeros(7, 81).bfloat16()}, r"x: found torch.bfloat16 \[7, 81\], expected torch.bfloat16 \[7, 80\]"),
    ],
)
def test_advance_refuses(change, message):
    value, ids, state = make_state(20)
    with pytest.raises(ValueError, match=message):
        advance(value, ids, **{**state, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 97}, "vocab_size: found 97, expected 1 to the weight's 96 rows"),
        ({"lengths": torch.ones(1)}, r"lengths: found torch.float32 \[1\]"),
        ({"seed": None}, r"seed: found None, expected torch.int64 \[1\]"),
        ({"temperature": torch.ones(2)}, r"temperature: found .*\[2\].*, expected torch.float32 \[1\]"),
    ],
)
def test_head_refuses(change, message):
    x, weight, norm = make(1, 64, 96, torch.float32)
    arguments = {"vocab_size": 96, "lengths": torch.ones(1, dtype=torch.int32), **sampling([1.0]), **change}
    with pytest.raises(ValueError, match=message):
        head(x, weight, norm=norm, eps=EPS, **arguments)


def test_opcheck():
    x, weight, norm = make(2, 64, 96)
    draw = sampling([0.0, 1.0])
    lengths = torch.ones(2, dtype=torch.int32, device=DEVICE)
    with override_tiles({"head": Tile(32, 64, 4)}):
        for permuted in (False, True):
            arguments = (x, *Operand.of(weight), norm, None, EPS, 90, *draw.values(), lengths, permuted)
            torch.library.opcheck(torch.ops.rooflama.head.default, arguments)
    value, ids, state = make_state(20)
    order = ("token", "ring", "cursor", "done", "flag", "lengths", "limit", "stop_ids", "embedding", "x")
    torch.library.opcheck(torch.ops.rooflama.advance.default, (value, ids, *(state[name] for name in order), None))


def test_compiled_whole():
    """Two steps' ends inside torch.compile(fullgraph=True): the state that `advance` changes is what eager leaves."""
    x, weight, norm = make(7, 64, 96, torch.float16)
    _, _, state = make_state(20, K=x.shape[1])
    state["embedding"], state["x"] = state["embedding"].half(), x

    def end_of_step(state):
        _, values, ids = head(state["x"], weight, norm=norm, eps=EPS, vocab_size=96, lengths=state["lengths"])
        advance(values, ids, **state)

    results = []
    for run in (end_of_step, torch.compile(end_of_step, fullgraph=True, backend="aot_eager")):
        copy = {name: t.clone() for name, t in state.items()}
        run(copy), run(copy)
        results.append(copy)
    for name, t in results[0].items():
        assert torch.equal(t, results[1][name]), name
    assert results[0]["cursor"][0] == state["cursor"][0] + 2
    assert results[0]["done"][0] == 1  # the second step reached its limit
