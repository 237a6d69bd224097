"""choose: the kept tokens against a float64 sort, the choice against the reference, at flat, peaked and tied logits; and
choose_and_advance against the two."""

import math
import sys

import pytest
import torch

from kernels import choose as _loaded  # noqa: F401 (the module, below, is shadowed by the operator where that is exported)
from kernels._common import _workspaces
from kernels.formats import Weight
from kernels.head import advance

module = sys.modules["kernels.choose"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V = 3000  # three programs a row; above TILE: of tied logits the lists are read again


def logits_of(kind: str, rows: int = 2) -> torch.Tensor:
    torch.manual_seed(sum(map(ord, kind)))
    make = {
        "flat": lambda: torch.randn(rows, V),
        "peaked": lambda: torch.randn(rows, V) * 3 + 9 * (torch.arange(V) == 7),
        "equal": lambda: torch.zeros(rows, V),
        "tied": lambda: (torch.randn(rows, V) * 2).round(decimals=1),
        "far": lambda: torch.randn(rows, V) * 60,  # most of it beyond the bins
        "masked": lambda: torch.where(torch.arange(V) % 3 == 0, torch.randn(rows, V), -math.inf),
    }
    return make[kind]().to(DEVICE)


def parameters(rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0) -> dict:
    """The arguments of choose for each of `rows` sequences; a list gives each its own."""

    def each(value, dtype):
        return torch.tensor(value if isinstance(value, list) else [value] * rows, dtype=dtype, device=DEVICE)

    return {
        "temperature": each(temperature, torch.float32),
        "seed": torch.arange(rows, device=DEVICE) + seed,
        "sample": each(3, torch.int32),
        "lengths": each(7, torch.int32),
        "top_k": each(top_k, torch.int32),
        "top_p": each(top_p, torch.float32),
        "min_p": each(min_p, torch.float32),
    }


def maxima_of(logits):
    """What `head` gives beside its logits: NaN has become infinite."""
    return logits.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).unflatten(1, (4, -1)).amax(-1)


def kept_by_sorting(logits, temperature, top_k, top_p, min_p) -> torch.Tensor:
    """One row's kept tokens by the definition, in float64."""
    warm = logits.double() / temperature
    ordered = warm.sort(descending=True).values
    if top_k:
        ordered = torch.where(ordered >= ordered[min(top_k, V) - 1], ordered, -math.inf)
    probs = ordered.softmax(0)
    before = probs.cumsum(0) - probs
    kept = (ordered > -math.inf) & ((before < top_p) if top_p < 1 else True) & (probs >= min_p * probs[0])
    return warm >= ordered[kept].min()


CUTS = [
    {"top_p": 0.9},
    {"top_k": 50, "temperature": 0.7},
    {"top_k": 50, "top_p": 0.9, "temperature": 1.3},
    {"top_k": 5, "top_p": 0.5, "min_p": 0.1},
    {"min_p": 0.05},
    {"top_k": 1},
    {"top_k": V + 5, "top_p": 0.3},
    {},
    {"temperature": 0.0, "top_k": 5},
]


@pytest.mark.parametrize("kind", ["flat", "peaked", "equal", "tied", "masked"])
def test_cut_ref_is_the_definition(kind):
    logits = logits_of(kind, rows=1)
    for cut in CUTS[:-1]:
        a = parameters(1, **cut)
        kept = module.cut_ref(logits, *(a[n] for n in ("temperature", "top_k", "top_p", "min_p")))[0]
        options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **cut}
        want = kept_by_sorting(logits[0], **options)
        want |= (logits[0] == -math.inf) if kept.all() else False  # nothing is cut: what has no mass may stay
        wrong = kept != want
        # float32 and float64 may differ on tokens of one value, right at the cut
        assert logits[0][wrong].unique().numel() <= 1, f"{cut}: {int(wrong.sum())} of {int(want.sum())}"
        assert not wrong.any() or "top_p" in cut or "min_p" in cut


def check(logits, arguments):
    """The draws are the reference's, and the workspaces are left empty."""
    value, index = module.choose(logits, maxima_of(logits), **arguments)
    order = ("temperature", "seed", "sample", "lengths", "top_k", "top_p", "min_p")
    want, want_index = module.choose_ref(logits, *(arguments[n] for n in order))
    torch.testing.assert_close(value[:, 0], want, rtol=1e-5, atol=1e-5)
    assert torch.equal(index[:, 0], want_index)
    assert logits.gather(1, index.long()).isfinite().all()
    assert not any(workspace.any() for workspace in _workspaces.values())


@pytest.mark.parametrize("kind", ["flat", "peaked", "equal", "tied", "far", "masked"])
def test_choose(kind):
    """Every draw is the reference's, for several keys."""
    for i, cut in enumerate(CUTS):
        check(logits_of(kind), parameters(2, **cut, seed=1000 * i))


def test_each_row_has_its_own_cuts():
    """Greedy, uncut and cut rows in one batch, two query tokens a sequence, give what each gives alone."""
    logits = logits_of("flat", rows=6)
    a = parameters(3, temperature=[0.0, 1.0, 0.8], top_k=[5, 0, 7], top_p=[0.5, 1.0, 0.6])
    value, index = module.choose(logits, maxima_of(logits), **a)
    assert index[:2, 0].tolist() == logits[:2].argmax(dim=1).tolist()
    for row in range(6):
        alone = {name: t[row // 2 : row // 2 + 1].clone() for name, t in a.items()}
        alone["lengths"] -= 1 - row % 2  # T = 1: the same position
        one = slice(row, row + 1)
        alone_value, alone_index = module.choose(logits[one].clone(), maxima_of(logits[one]), **alone)
        assert (value[row], index[row]) == (alone_value[0], alone_index[0])


def test_the_choice_is_a_draw_from_what_is_kept():
    """120 draws with top_k = 4: only the 4, each about as often as the softmax says."""
    row = logits_of("flat", rows=1)[:, :256]
    logits = row.expand(60, 256).contiguous()
    counts = torch.zeros(256)
    for i in range(2):
        _, index = module.choose(logits, logits, **parameters(60, top_k=4, seed=60 * i))
        counts += torch.bincount(index[:, 0].cpu(), minlength=256)
    top = row[0].topk(4)
    assert counts.nonzero().squeeze(1).sort().values.tolist() == top.indices.sort().values.tolist()
    expected = top.values.softmax(0).cpu() * 120
    statistic = ((counts[top.indices.cpu()] - expected) ** 2 / expected).sum()
    assert statistic < 23.0, f"chi-square with 3 degrees of freedom: found {statistic:.1f}, expected below 23.0 (p = 4e-5)"


def test_broken_logits_stay_broken():
    logits = logits_of("flat", rows=3)
    logits[0, 77], logits[1, 5] = math.nan, math.inf
    value, _ = module.choose(logits, maxima_of(logits), **parameters(3, top_k=5, top_p=0.9))
    assert value[:2, 0].tolist() == [math.inf] * 2
    assert value[2, 0].isfinite()


def test_choose_refuses():
    logits = logits_of("flat")
    for change, message in [
        ({"top_k": torch.zeros(2)}, r"top_k: found torch.float32 \[2\], expected torch.int32 \[2\]"),
        ({"lengths": torch.zeros(3, dtype=torch.int32)}, "B dividing 2 rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            module.choose(logits, maxima_of(logits), **{**parameters(2), **change})
    with pytest.raises(ValueError, match=r"logits: found torch\.float64"):
        module.choose(logits.double(), maxima_of(logits), **parameters(2))


def test_opcheck():
    logits = logits_of("peaked", rows=1)
    a = parameters(1, top_k=5)
    order = ("temperature", "seed", "sample", "lengths", "top_k", "top_p", "min_p")
    torch.library.opcheck(torch.ops.rooflama.choose.default, (logits, maxima_of(logits), *(a[n] for n in order)))


# ---------------------------------------------------------------- choose_and_advance


def sequences(lengths) -> dict:
    """What `advance` changes and reads, beside the lengths."""
    B = len(lengths)
    token, cursor, flag, ring = (torch.randint(0, 99, (B, n), dtype=torch.int32).to(DEVICE) for n in (1, 1, 1, 5))
    return {
        "token": token[:, 0], "cursor": cursor[:, 0], "flag": flag[:, 0] % 2, "ring": ring, "limit": lengths + 40,
        "done": torch.zeros_like(lengths), "stop_ids": torch.full((B, 3), -1, dtype=torch.int32, device=DEVICE),
        "embedding": torch.randn(V, 80, device=DEVICE).bfloat16(), "x": torch.randn(B, 80, device=DEVICE).bfloat16(),
    }  # fmt: skip


def check_both(logits, arguments, state, steps=2):
    """So many steps leave the state that `choose` and then `advance` leave, and empty workspaces."""
    both, apart = ({name: t.clone() for name, t in (arguments | state).items()} for _ in range(2))
    weights = Weight(24, 64, device=DEVICE), Weight(16, 64, device=DEVICE)  # change nothing
    for _ in range(steps):
        module.choose_and_advance(logits, maxima_of(logits), **both, ahead=weights[0], then=weights[1])
        candidates = module.choose(logits, maxima_of(logits), **{name: apart[name] for name in arguments})
        advance(*candidates, **{name: apart[name] for name in ("lengths", *state)})
        for name, t in both.items():
            assert torch.equal(t, apart[name]), name
    assert not any(workspace.any() for workspace in _workspaces.values())
    return both


@pytest.mark.parametrize("cut", [cut for cut in CUTS if len(cut) != 1 or "top_p" in cut], ids=str)
def test_choose_and_advance(cut):
    """Plain rows, flat and tied, one at its limit, one whose token stops it, one done, one absent, three that are broken."""
    logits = torch.cat([logits_of("flat", 5), logits_of("tied", 5)])
    logits[7, 77], logits[8, 5], logits[9] = math.nan, math.inf, -math.inf
    a = parameters(10, **cut, seed=5)
    a["lengths"] += torch.arange(10, device=DEVICE, dtype=torch.int32)
    a["temperature"][6] = 0.0
    state = sequences(a["lengths"])
    _, index = module.choose(logits, maxima_of(logits), **a)
    state["limit"][1], state["stop_ids"][2, 1], state["done"][3], a["lengths"][4] = a["lengths"][1], index[2, 0], 1, 0
    found = check_both(logits, a, state)
    assert found["done"].nonzero().squeeze(1).tolist() == [1, 2, 3, 7, 8, 9]
    assert (found["cursor"] - state["cursor"]).tolist() == [2, 1, 1, 0, 0, 2, 2, 0, 0, 0]
    assert found["flag"][7:].tolist() == [1, 1, 1]
    assert found["lengths"].tolist() == [9, 0, 0, 10, 0, 14, 15, 0, 0, 0]


@pytest.mark.parametrize("sms", [1, 4])
def test_choose_and_advance_in_programs_of_several_tiles(monkeypatch, sms):
    monkeypatch.setattr(module, "num_sms", lambda index: sms)
    a = parameters(2, top_k=[50, 0], top_p=[0.9, 0.95])
    state = sequences(a["lengths"]) | {"embedding": torch.randn(9000, 80, device=DEVICE).bfloat16()}
    check_both(torch.randn(2, 9000, device=DEVICE), a, state, steps=1)


def test_choose_and_advance_checks():
    logits, a = logits_of("peaked"), parameters(2, top_k=5)
    state = sequences(a["lengths"])
    names = ("temperature", "seed", "sample", "lengths", "top_k", "top_p", "min_p", "token", "ring", "cursor", "done", "flag",
             "limit", "stop_ids", "embedding", "x")  # fmt: skip
    arguments = (logits, maxima_of(logits), *((a | state)[name] for name in names), None, None)
    torch.library.opcheck(torch.ops.rooflama.choose_and_advance.default, arguments)
    with pytest.raises(ValueError, match=r"partial_max: found \[4, 1\], \[4, 1\], expected two of \[2, P\]"):
        module.choose_and_advance(logits_of("peaked", 4), maxima_of(logits_of("peaked", 4)), **a, **state)


def test_lists_longer_than_a_tile(monkeypatch):
    """Listed tokens that do not fit the registers are read again: the choice is the same."""
    monkeypatch.setattr(module, "TILE", 512)
    logits = logits_of("flat") * 0.0001  # all tokens are in a few bins
    for seed in range(2):
        check(logits, parameters(2, top_k=900, top_p=0.8, seed=seed))


@pytest.mark.parametrize("sms", [1, 4])
def test_programs_of_several_tiles(monkeypatch, sms):
    """Few tokens are listed before they are drawn for, many are not; a row has one program, or two."""
    monkeypatch.setattr(module, "num_sms", lambda index: sms)
    torch.manual_seed(sms)
    logits = torch.randn(2, 9000, device=DEVICE) * torch.tensor([[0.1], [3.0]], device=DEVICE)
    assert module.launch_shape(2, 9000, sms)[1] == (5 if sms == 1 else 3)
    for cut in [{"top_k": 50}, {"top_p": 0.9}, {"top_p": 0.99}, {"top_k": 40, "top_p": 0.9, "min_p": 0.01}, {}]:
        check(logits, parameters(2, **cut))
    check(torch.zeros_like(logits), parameters(2, top_p=0.9))
    check(logits, parameters(2, temperature=0.0, top_k=5))
    check(logits * 1e-3, parameters(2, temperature=100.0, top_k=5000, top_p=0.95))


def test_mass_beyond_the_cut_counts(monkeypatch):
    """A token, 300 that share a bin, and 8,700 far below that have a third of the mass: half of it ends within the bin."""
    monkeypatch.setattr(module, "num_sms", lambda index: 8)
    torch.manual_seed(0)
    distance = torch.cat([torch.zeros(1), 2.01 + 1e-3 * torch.rand(300), torch.full((8699,), 6.0)])
    logits = 10 - distance[torch.randperm(9000)].repeat(8, 1).to(DEVICE)
    for cut in [{"top_p": 0.5}, {"top_p": 0.5, "top_k": 250}]:
        check(logits, parameters(8, **cut))


FEW = module.FEW.value


@pytest.mark.parametrize("sms", [2, 10])  # a row has one program of three tiles, or five of one
@pytest.mark.parametrize(("number", "steps", "width"), [
    (12, 0, 1e-3), (60, 9, 1e-3), (FEW, 0, 1e-3), (FEW + 1, 0, 1e-3), (1000, 0, 1e-3),  # few, and those to search among
    (60, 1, 1e-3), (1000, 1, 1e-3), (1000, 3, 1e-3), (1000, 100, 1e-3),  # all equal; more than few that are; groups of ten
    (60, 0, 0.2), (1000, 0, 0.2),  # top-p's bins are several
])  # fmt: skip
def test_cuts_within_a_bin(monkeypatch, number, steps, width, sms):
    """A token, `number` 0.5 below it, and the rest 12: each cut is among these `number`, which share a bin of 1/128, or are in
    26. The cut is the reference's, and matters: without it others would be chosen."""
    monkeypatch.setattr(module, "num_sms", lambda index: sms)
    torch.manual_seed(number)
    u = torch.rand(number)
    distance = torch.cat(
        [torch.zeros(1), 0.51 + width * ((u * steps).floor() / steps if steps else u), torch.full((4499 - number,), 12.0)]
    )
    logits = 10 - distance[torch.randperm(4500)].repeat(2, 1).to(DEVICE)
    order = ("temperature", "seed", "sample", "lengths", "top_k", "top_p", "min_p")
    cuts = [{"top_k": number // 2}, {"top_p": 0.5}, {"top_k": number // 2, "top_p": 0.6}, {"top_k": number, "top_p": 0.6}]
    chosen = {}
    for top_k, top_p in [(c.get("top_k", 0), c.get("top_p", 1.0)) for c in [{"top_k": number + 1}, *cuts]]:
        arguments = parameters(2, top_k=top_k, top_p=top_p, seed=2)
        check(logits, arguments)
        chosen[top_k, top_p] = module.choose_ref(logits, *(arguments[n] for n in order))[1].long().unsqueeze(1)
    uncut, *cut = chosen.values()
    assert all((logits.gather(1, index) < 9.8).any() for index in cut), "a listed token is chosen"
    assert steps == 1 or sum((index != uncut).sum().item() for index in cut) > 2, "a listed token that is better is cut"


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 64, 100, 132, 256])
@pytest.mark.parametrize("V", [260, 32000, 128256, 151936])
def test_launch_shape(rows, V):
    """Every token has a program, and all programs a multiprocessor of their own, or a row just one."""
    block, tiles, programs = module.launch_shape(rows, V, 132)
    assert block * tiles * programs >= V > block * tiles * (programs - 1)
    assert programs == 1 or rows * programs <= 132
