"""gate_up against float64, what it leaves alone, where it is chosen, and that the model then calls it."""

import dataclasses
import sys

import pytest
import torch
from tolerance import assert_within

import kernels
import model
from kernels import batch_invariant, gate_up, pdl_disabled, rms_norm, takes_gate_up
from kernels._common import has_wgmma, num_sms
from kernels.formats import PackedFormat, Weight
from kernels.gate_up import MIN_ROWS, choose_ring, fits, gate_up_ref
from kernels.tiles import GATE_UP_ROWS, SHARED_BYTES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER = has_wgmma(torch.empty(0, device=DEVICE))
on_hopper = pytest.mark.skipif(not HOPPER, reason="gate_up's kernel needs a Hopper card")
N, K = 672, 1024  # three programs


def case(M, dtype=torch.bfloat16, n=N, k=K):
    """x, behind whose rows there is NaN, and a weight."""
    room = torch.full((M + 256, k), torch.nan, dtype=dtype, device=DEVICE)
    room[:M] = torch.randn(M, k)
    return room[:M], (torch.randn(n, k, device=DEVICE) * k**-0.5).to(dtype)


def plain(x, weight):
    """What the kernel stands for: a product, rounded, and silu_mul of it."""
    return kernels.silu_mul(torch.nn.functional.linear(x, weight))


# ---------------------------------------------------------------- anywhere


def test_rings_fit():
    for M in [*range(MIN_ROWS, 300), 8192]:
        ring = choose_ring(M)
        assert ring.rows >= M or ring.group, "one tile, or tiles in groups"
        assert ring.num_bytes <= SHARED_BYTES - 1024
        assert ring.stages >= 2


def test_shapes_it_can_do():
    assert fits(65, 28672, 4096)
    assert fits(8192, 448, 64)
    assert not any(fits(*shape) for shape in [(64, 448, 64), (128, 256, 64), (128, 448, 96)])


def test_measured_shapes_fit():
    assert all(fits(rows, n, k) for (_, n, k), spans in GATE_UP_ROWS.items() for span in spans for rows in span)


@on_hopper
def test_what_is_cublas_work(monkeypatch):
    """Other cards, other numbers of rows, packed weights, a bias, float32, and where no row may change another's result."""
    monkeypatch.setitem(GATE_UP_ROWS, (num_sms(), N, K), ((66, 80), (90, 100)))
    x, weight = torch.empty(100, K, dtype=torch.bfloat16, device=DEVICE), Weight(N, K)
    assert takes_gate_up(x, weight)
    assert takes_gate_up(x.half(), weight)
    assert not takes_gate_up(x.cpu(), weight)
    assert not takes_gate_up(x.float(), weight)
    assert not takes_gate_up(x[:64], weight)
    for rows in (65, 85, 101):
        assert not takes_gate_up(torch.cat([x, x])[:rows], weight), "not where it was measured to pay"
    assert not takes_gate_up(x, Weight(N, K, bias=True))
    assert not takes_gate_up(x, Weight(N, K, packed=PackedFormat("int8")))
    assert not takes_gate_up(x, Weight(2 * N, K)), "not measured"
    with batch_invariant():
        assert not takes_gate_up(x, weight)


def test_the_model_calls_it(monkeypatch):
    """In place of the product and silu_mul, after the norm."""
    x, w = case(70)
    weight, norm = Weight(N, K, dtype=x.dtype, device=DEVICE), torch.rand(K, device=DEVICE).to(x.dtype)
    weight.weight.copy_(w)
    monkeypatch.setattr(kernels, "takes_gate_up", lambda x, weight: True)
    y = model.linear(x, weight, norm, 1e-5, activation="silu_mul")
    assert torch.equal(y, gate_up(rms_norm(x, norm, 1e-5), w))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_operator(dtype):
    x, weight = case(65, dtype, 448, 128)
    assert_within(gate_up(x, weight), plain(x, weight), gate_up_ref(x.double(), weight.double()))
    torch.library.opcheck(torch.ops.rooflama.gate_up, (x, weight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w: (x[:64], w), r"found \[64, 128\] and \[448, 128\], expected \[65 or more, K\]"),
        (lambda x, w: (x, w[:446]), "multiple of 224"),
        (lambda x, w: (x[:, :64], w), r"found \[70, 64\] and"),
        (lambda x, w: (x.half(), w), "one dtype"),
        (lambda x, w: (x.T.contiguous().T, w), "both contiguous"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        gate_up(*change(*case(70, torch.bfloat16, 448, 128)))


# ---------------------------------------------------------------- on a Hopper card


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M", [65, 100, 128, 129, 200, 256, 300])
def test_ragged_rows(M, dtype, monkeypatch):
    """Against float64, with fewer chunks than stages and more; the same bits every time, and nothing behind y written."""
    room = torch.empty(M + 256, N // 2, dtype=dtype, device=DEVICE)
    for k in (64, 128, 192, 256, 1024, 4096):
        x, weight = case(M, dtype, N, k)
        room.fill_(torch.nan)
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["kernels.gate_up"], "_output", lambda x, weight: room[: len(x)])
            y = gate_up(x, weight).clone()
        assert room[M:].isnan().all()
        assert_within(y, plain(x, weight), gate_up_ref(x.double(), weight.double()))
        assert all(torch.equal(gate_up(x, weight), y) for _ in range(10))


@on_hopper
@pytest.mark.parametrize("group", [1, 2, 8])
@pytest.mark.parametrize("M", [257, 600, 2048, 2305])
def test_tiles_of_many_rows(M, group, monkeypatch):
    """More tiles of x than one, and than a group has: the bits of each tile alone, whatever the group; nothing behind y."""
    x, weight = case(M)
    expected = torch.cat([gate_up(torch.cat([rows, x])[:256], weight)[: len(rows)] for rows in x.split(256)])
    room = torch.full((M + 256, N // 2), torch.nan, dtype=x.dtype, device=DEVICE)
    ring = dataclasses.replace(choose_ring(M), group=group)
    monkeypatch.setattr(sys.modules["kernels.gate_up"], "choose_ring", lambda M: ring)
    monkeypatch.setattr(sys.modules["kernels.gate_up"], "_output", lambda x, weight: room[: len(x)])
    assert torch.equal(gate_up(x, weight), expected)
    assert room[M:].isnan().all()


@on_hopper
def test_extremes():
    """A gate that overflows exp, either way, and one NaN: in its row alone."""
    x, weight = case(130)
    x[3] *= 1000
    x[5, 7] = torch.nan
    y, exact = gate_up(x, weight), gate_up_ref(x.double(), weight.double())
    rest = torch.arange(130, device=DEVICE) != 5
    assert y[5].isnan().all()
    assert_within(y[rest], plain(x, weight)[rest], exact[rest])


@on_hopper
@pytest.mark.parametrize("M", [100, 256])
def test_early_launches_and_graphs(M):
    """Between kernels that start early, replayed from a CUDA graph: the bits of a launch by itself."""
    x, weight = case(M)
    norm = torch.rand(K, device=DEVICE).to(x.dtype)
    down = torch.randn(K, N // 2, device=DEVICE).to(x.dtype) / 16

    def layers():
        h = x
        for _ in range(4):
            h = torch.nn.functional.linear(gate_up(rms_norm(h, norm, 1e-5), weight), down)
        return h

    with pdl_disabled():
        alone = layers()
    assert alone.isfinite().all()
    assert torch.equal(layers(), alone)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layers()
    for _ in range(20):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, alone)
