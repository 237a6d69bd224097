"""feed and accept: a round's rows and bookkeeping against their references and against plain steps, case by case."""

import math

import pytest
import torch

from kernels.accept import accept, accept_ref, feed, feed_ref
from kernels.formats import Weight
from kernels.head import advance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V, R = 40, 9
STATE = ("token", "ring", "cursor", "done", "flag", "lengths", "history", "tally")


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def make(k, P=7, B=9):
    """Candidates whose best are known, and the state of nine sequences as it is at a round's end, each with its own fate."""
    choice = torch.randint(1, V - 1, (B, k + 1), dtype=torch.int32)
    value, ids = torch.rand(B * (k + 1), P), torch.randint(0, V, (B * (k + 1), P), dtype=torch.int32)
    value[:, 3], ids[:, 3] = 2.0, choice.flatten()
    value[:, 5], ids[:, 5] = 2.0, V  # as good, with a higher id
    drafts = choice[:, :k].clone()
    stop = torch.full((B, 3), -1, dtype=torch.int32)
    limit, done, lengths = [99] * B, [0] * B, [5 + k] * B
    if k:
        drafts[1, k // 2] = 0  # rejected in the middle
        drafts[2, 0] = 0  # at once
    stop[3, 1] = choice[3, k // 2]  # a stop id within the round
    limit[4] = 5 + k // 2  # the limit within the round
    value.view(B, k + 1, P)[5, k, 0] = math.nan  # behind the last draft
    value.view(B, k + 1, P)[6, 0, 1] = math.inf
    done[7], lengths[8] = 1, 0
    cursor = torch.arange(B, dtype=torch.int32) * 2
    state = {
        "token": torch.arange(B, dtype=torch.int32), "ring": torch.full((B, R), -7, dtype=torch.int32), "cursor": cursor,
        "done": ints(*done), "flag": ints(*[0] * B), "lengths": ints(*lengths), "limit": ints(*limit), "stop_ids": stop,
        "history": torch.full((B, 32), -9, dtype=torch.int32), "tally": torch.zeros(B, 2, 9, dtype=torch.int32),
    }  # fmt: skip
    to = lambda t: t.to(DEVICE)
    return to(value), to(ids), to(drafts), {name: to(t) for name, t in state.items()}


@pytest.mark.parametrize("H", [8, 96, 3000])
@pytest.mark.parametrize("k", [0, 1, 5])
def test_feed_equals_its_reference(k, H):
    embedding = torch.randn(V, H).to(DEVICE, torch.bfloat16)
    token, drafts = torch.randint(0, V, (3,)), torch.randint(0, V, (3, k))
    token, drafts = (t.to(DEVICE, torch.int32) for t in (token, drafts))
    lengths, want = ints(7, 0, 31), ints(7, 0, 31)
    expected = feed_ref(token, drafts, want, embedding)
    assert torch.equal(feed(token, drafts, lengths, embedding), expected)
    assert lengths.tolist() == want.tolist() == [7 + k, 0, 31 + k]
    assert torch.equal(expected.view(3, k + 1, H)[:, 0], embedding[token])
    assert torch.equal(expected.view(3, k + 1, H)[:, 1:], embedding[drafts])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drafts": torch.zeros(2, 2, dtype=torch.int32)}, "drafts: found torch.int32 .2, 2., expected int32 .3, k."),
        ({"drafts": torch.zeros(2, 3, dtype=torch.int32).T}, "expected int32 .3, k., contiguous"),
        ({"token": torch.zeros(3)}, "token: found torch.float32 .3., expected int32 .3."),
        ({"lengths": torch.zeros(1, dtype=torch.int32)}, "lengths: found torch.int32 .1."),
        ({"embedding": torch.zeros(8)}, "embedding: found .8., expected .V, H."),
    ],
)
def test_what_cannot_be_fed_is_refused(change, message):
    arguments = {"token": ints(1, 2, 3), "drafts": torch.zeros(3, 2, dtype=torch.int32, device=DEVICE)}
    arguments |= {"lengths": ints(5, 5, 5), "embedding": torch.zeros(V, 8, device=DEVICE)}
    arguments |= {name: t.to(DEVICE) for name, t in change.items()}
    with pytest.raises(ValueError, match=message):
        feed(**arguments)


@pytest.mark.parametrize("k", range(9))
def test_accept_equals_its_reference(k):
    value, ids, drafts, state = make(k)
    want = {name: t.clone() for name, t in state.items()}
    accept_ref(value, ids, drafts, **want)
    accept(value, ids, drafts, **state, ahead=Weight(256, 256, device=DEVICE))
    for name, t in state.items():
        assert torch.equal(t, want[name]), name


def test_every_fate():
    k = 4
    value, ids, drafts, state = make(k)
    choice = ids[:, 3].view(9, k + 1).tolist()
    accept(value, ids, drafts, **state)
    emitted = [5, 3, 1, choice[3].index(state["stop_ids"][3, 1].item()) + 1, 3, 4, 0, 0, 0]
    assert (state["cursor"] - 2 * torch.arange(9, device=DEVICE)).tolist() == emitted
    assert state["done"].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 0]
    assert state["flag"].tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0]
    assert state["lengths"].tolist() == [10, 8, 6, 0, 0, 0, 0, 5, 0]
    for b, n in enumerate(emitted):
        assert state["token"][b] == (choice[b][n - 1] if n else b)
        assert state["history"][b, 5 : 5 + n].tolist() == choice[b][:n]
        assert (state["history"][b] >= 0).sum() == n
        assert [state["ring"][b, (2 * b + i) % R].item() for i in range(n)] == choice[b][:n]
    drafted = [state["tally"][b, 0].tolist() for b in range(9)]
    kept = [state["tally"][b, 1].sum().item() for b in range(9)]
    assert drafted == [[1] * 5 + [0] * 4] * 7 + [[0] * 9] * 2
    assert kept == [1 + min(n, k) for n in (4, 2, 0, emitted[3], 3, 4, 0)] + [0, 0]


def test_without_drafts_it_is_a_plain_step():
    """k = 0 does to the state what `advance` does."""
    value, ids, drafts, state = make(0)
    plain = {name: t.clone() for name, t in state.items() if name not in ("history", "tally")}
    embedding = torch.zeros(V + 1, 8, dtype=torch.bfloat16, device=DEVICE)
    advance(value, ids, **plain, embedding=embedding, x=torch.zeros(9, 8, dtype=torch.bfloat16, device=DEVICE))
    accept(value, ids, drafts, **state)
    for name, t in plain.items():
        assert torch.equal(t, state[name]), name


def test_a_stop_ahead_of_a_nan_is_a_stop():
    value, ids, drafts, state = make(3)
    state["stop_ids"][5, 0] = ids[5 * 4 + 2, 3]  # the choice in front of the NaN
    accept(value, ids, drafts, **state)
    assert state["flag"][5] == 0
    assert state["done"][5] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drafts": torch.zeros(8, 2, dtype=torch.int32)}, "drafts: found torch.int32 .8, 2., expected int32 .9, k."),
        ({"drafts": torch.zeros(9, 3, dtype=torch.int32)}, "partial_max"),
        ({"cursor": torch.zeros(9)}, "cursor: found torch.float32"),
        ({"ring": torch.zeros(9, dtype=torch.int32)}, "ring: found"),
        ({"tally": torch.zeros(9, 2, 2, dtype=torch.int32)}, "tally: found"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    value, ids, drafts, state = make(2)
    arguments = {"drafts": drafts} | state | {name: t.to(DEVICE) for name, t in change.items()}
    with pytest.raises(ValueError, match=message):
        accept(value, ids, **arguments)


def test_opcheck():
    embedding = torch.randn(V, 8).to(DEVICE, torch.bfloat16)
    drafts = torch.zeros(2, 3, dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(torch.ops.rooflama.feed.default, (ints(1, 2), drafts, ints(5, 0), embedding))
    value, ids, drafts, state = make(2)
    order = ("token", "ring", "cursor", "done", "flag", "lengths", "limit", "stop_ids", "history", "tally")
    torch.library.opcheck(torch.ops.rooflama.accept.default, (value, ids, drafts, *(state[name] for name in order), None))
