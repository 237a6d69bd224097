"""linear and qkv_rope_append against float64: odd shapes, every kind of tile, memory that nobody may read or write."""

import itertools
import sys

import pytest
import torch
from tolerance import assert_within

from kernels._common import INTERPRET, has_wgmma
from kernels._matmul import Operand, tile_of
from kernels._ring import ring_serves_qkv
from kernels.formats import Weight
from kernels.linear import MAX_ROWS, linear, linear_ref, qkv_rope_append, qkv_rope_append_ref
from kernels.tiles import (
    FMA_MOST_ROWS,
    LEAST_ROWS,
    SHARED_BYTES,
    Tile,
    batch_invariant,
    candidate_tiles,
    choose_tile,
    kernel_rows,
    override_tiles,
    ring_bytes,
    ring_tile,
    tile_for,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5

FMA_TILES = [
    Tile(16, 1024, 4),  # K masked, all of it preloaded
    Tile(4, 64, 2, preload=3),  # K in many chunks, three in flight
    Tile(4, 128, 1, preload=1, stream=True),
    Tile(32, 64, 4, preload=2, split=3),  # N masked where it is no multiple; the last of three merges
    Tile(8, 64, 4, grid=1),  # a persistent grid, further tiles in the loop
    Tile(4, 256, 4, grid=2, stages=2),
]
DOT_TILES = [
    Tile(64, 64, 4, preload=2, dot=True, stages=3),
    Tile(16, 64, 4, preload=64, dot=True),  # everything preloaded
    Tile(32, 128, 4, preload=1, dot=True, split=4, stages=2),  # more parts of K than chunks of it
    Tile(128, 32, 8, preload=3, dot=True, split=2),
]


def randn(*size, dtype, scale=1.0):
    return (torch.randn(*size) * scale).to(dtype).to(DEVICE)


def make_weight(N, K, dtype, bias=False) -> Weight:
    weight = Weight(N, K, bias=bias, dtype=dtype, device=DEVICE)
    weight.weight.copy_(randn(N, K, dtype=dtype, scale=K**-0.5))
    if bias:
        weight.bias.copy_(randn(N, dtype=dtype))
    return weight


def wide(t):
    return t.double() if t is not None and t.is_floating_point() else t


def check_linear(M, N, K, dtype=torch.bfloat16, norm=True, bias=False, activation="none", residual=False, tile=None):
    weight, x = make_weight(N, K, dtype, bias), randn(M, K, dtype=dtype)
    nw = randn(K, dtype=dtype) if norm else None
    res = randn(M, N // 2 if activation == "silu_mul" else N, dtype=dtype) if residual else None
    op = "silu_mul" if activation == "silu_mul" else "linear"
    with override_tiles({op: tile} if tile else {}):
        y = linear(x, weight, norm=nw, eps=EPS, activation=activation, residual=res)
    assert y.dtype == dtype
    arguments = (x, weight.weight, weight.bias, nw, EPS, activation, res)
    exact = linear_ref(*(wide(a) if torch.is_tensor(a) else a for a in arguments))
    assert_within(y, linear_ref(*arguments), exact)
    return x, weight, nw, y


SHAPES = [(1, 64), (1, 3072), (2, 448), (4, 192), (5, 64), (16, 1024), (33, 192), (64, 448)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("M", "K"), SHAPES)
def test_linear(M, K, dtype):
    check_linear(M, 48, K, dtype, bias=True, residual=True)
    check_linear(M, 32, K, dtype, norm=False, activation="silu_mul")


@pytest.mark.parametrize("tile", FMA_TILES, ids=lambda t: f"{t.rows}x{t.chunk}-{t.preload}-{t.split}-{t.grid}")
def test_linear_fma_tiles(tile, few_sms):
    check_linear(1, 48, 448, tile=tile, bias=True, residual=True)
    check_linear(3, 80, 192, torch.float16, tile=tile, activation="silu_mul")


@pytest.mark.parametrize("tile", DOT_TILES, ids=lambda t: f"{t.rows}x{t.chunk}-{t.preload}-{t.split}")
def test_linear_dot_tiles(tile):
    check_linear(1, 48, 448, torch.float16, tile=tile, bias=True, residual=True)
    check_linear(20, 112, 192, tile=tile, activation="silu_mul", bias=True, residual=True)


on_hopper = pytest.mark.skipif(not has_wgmma(torch.empty(0, device=DEVICE)), reason="rings of shared memory need a Hopper card")


@on_hopper
@pytest.mark.parametrize("tile", [ring_tile(64, 2), ring_tile(64, 4, 2), ring_tile(128, 3, 3), ring_tile(128, 4)], ids=str)
def test_linear_rings(tile):
    """Rows behind x that nobody may read, few and many chunks, every padding; the same bits every time."""
    for M, dtype in itertools.product((1, 2, 5, 8, 16, 40, 64), (torch.bfloat16, torch.float16)):
        least = tile.chunk * tile.split
        check_linear(M, 384, 768, dtype, norm=False, residual=True, tile=tile)
        check_linear(M, 256, least, dtype, tile=tile)
        check_linear(M, 256, 8 * least, dtype, activation="silu_mul", tile=tile)
        check_linear(M, 256, 4 * least, dtype, norm=False, activation="silu_mul", residual=True, tile=tile)
        room = torch.full((M + 64, 768), float("nan"), dtype=dtype, device=DEVICE)
        room[:M] = randn(M, 768, dtype=dtype)
        weight = make_weight(128, 768, dtype)
        with override_tiles({"linear": tile}):
            first = linear(room[:M], weight)
            assert first.isfinite().all()
            assert all(torch.equal(linear(room[:M], weight), first) for _ in range(20))


def test_what_a_ring_cannot_do_goes_to_a_tile():
    """Other cards; of qkv other heads and caches."""
    x, w = torch.empty(8, 4096, dtype=torch.bfloat16), Operand(torch.empty(0), None, None, "plain", 4096)
    assert not tile_of("linear", x, w, rings=True).ring, "x is not on a Hopper card"
    assert choose_tile("linear", "bf16", 8, 4096, 4096, 132, rings=True).ring
    assert not choose_tile("linear", "bf16", 8, 4096, 4096, 132).ring
    assert choose_tile("linear", "bf16", 5, 3584, 18944, 132, rings=True) == ring_tile(128, 6, 4)
    assert choose_tile("silu_mul", "bf16", 16, 37888, 3584, 132, rings=True) == ring_tile(128, 4)
    for op, rows, N in (("linear", 8, 4160), ("linear", 24, 3584), ("linear", 2, 3584), ("head", 8, 128256)):
        assert not choose_tile(op, "bf16", rows, N, 3584, 132, rings=True).ring, (
            "rows of weight, of x; not an operator of rings"
        )
    with batch_invariant():
        assert not tile_for("linear", "bf16", 8, 4096, 4096, 132, rings=True).ring
    with override_tiles({"qkv": ring_tile(64, 4)}), pytest.raises(ValueError, match="found one for qkv, expected none"):
        tile_of("qkv", x, w, rings=True)
    assert ring_serves_qkv(128, True)
    assert ring_serves_qkv(64, False)
    assert not ring_serves_qkv(64, True)
    assert not ring_serves_qkv(96, False)


def test_rows_that_take_a_ring():
    """2 to 8 rows pad to 8, and take its tile; where no ring serves they take the one for 16."""
    tiles = {rows: choose_tile("qkv", "bf16", rows, 3072, 2048, 132, rings=True) for rows in (1, 2, 3, 8, 9, 16)}
    assert [rows for rows, tile in tiles.items() if tile.ring] == [2, 3, 8]
    assert choose_tile("qkv", "bf16", 8, 3072, 2048, 132) == tiles[16]


def test_float32_takes_the_reference():
    x, weight, norm, y = check_linear(3, 48, 128, torch.float32)
    assert torch.equal(y, linear_ref(x, weight.weight, None, norm, EPS))


def test_float16_does_not_overflow_before_the_norm_divides():
    """x * norm exceeds float16 where x / rms(x) * norm does not."""
    weight = make_weight(16, 64, torch.float16)
    x, norm = randn(8, 64, dtype=torch.float16, scale=3e3), randn(64, dtype=torch.float16, scale=30)
    y = linear(x, weight, norm=norm, eps=EPS)
    exact = linear_ref(x.double(), weight.weight.double(), None, norm.double(), EPS)
    assert_within(y, linear_ref(x, weight.weight, None, norm, EPS), exact)


def test_rows_are_independent_of_the_batch():
    """With batch_invariant, a row's result is bitwise the same alone and among others."""
    weight, x, norm = make_weight(80, 448, torch.float16), randn(40, 448, dtype=torch.float16), randn(448, dtype=torch.float16)
    with batch_invariant():
        together = linear(x, weight, norm=norm, eps=EPS)
        for rows in (slice(0, 1), slice(3, 8), slice(7, 40)):
            assert torch.equal(linear(x[rows], weight, norm=norm, eps=EPS), together[rows])


@pytest.mark.parametrize("M", [1, 5])
def test_any_number_of_rows(M):
    """A vocabulary of 32,001 or a layer of 201 features: no multiple of anything."""
    weight, x = make_weight(201, 192, torch.bfloat16), randn(M, 192, dtype=torch.bfloat16)
    exact = linear_ref(wide(x), wide(weight.weight))
    assert_within(linear(x, weight), linear_ref(x, weight.weight), exact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(MAX_ROWS + 1, 128)}, "x: found 65 rows, expected 1 to 64"),
        ({"x": torch.zeros(1, 192)}, r"found \(1, 192\) and \(32, 128\)"),
        ({"x": torch.zeros(1, 256)[:, ::2]}, "expected a contiguous tensor"),
        ({"norm": torch.ones(64)}, r"norm: found torch.float32 \[64\], expected torch.float32 \[128\]"),
        ({"norm": torch.ones(128).half()}, r"norm: found torch.float16 \[128\], expected torch.float32"),
        ({"activation": "gelu"}, "activation: found 'gelu'"),
        ({"residual": torch.ones(1, 16)}, r"residual: found torch.float32 \[1, 16\], expected torch.float32 \[1, 32\]"),
        (
            {"weight": Weight(32, 72, dtype=torch.float32), "x": torch.zeros(1, 72)},
            "found 32 x 72, expected a multiple of 64 columns",
        ),
    ],
)
def test_linear_refuses(change, message):
    arguments = {"x": torch.zeros(1, 128), "weight": Weight(32, 128, dtype=torch.float32), **change}
    with pytest.raises(ValueError, match=message):
        linear(arguments.pop("x"), arguments.pop("weight"), **arguments)


# ---------------------------------------------------------------- qkv


def make_qkv(B, T, K, Hq, Hkv, D, lengths, dtype, bias=False, qk_norm=False, page_size=8, pages=3, cache=None) -> dict:
    """The arguments of qkv_rope_append: a cache full of NaN, its pages in random order."""
    shape, cache = (B * pages, Hkv, page_size, D), {"dtype": cache or dtype, "device": DEVICE}
    angle = torch.arange(page_size * pages)[:, None] * torch.rand(D // 2)
    return {
        "x": randn(B * T, K, dtype=dtype),
        "weight": make_weight((Hq + 2 * Hkv) * D, K, dtype, bias),
        "norm": randn(K, dtype=dtype),
        "eps": EPS,
        "q_norm": randn(D, dtype=dtype) if qk_norm else None,
        "k_norm": randn(D, dtype=dtype) if qk_norm else None,
        "qk_eps": 1e-6,
        "cos": angle.cos().to(DEVICE),
        "sin": angle.sin().to(DEVICE),
        "lengths": torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        "table": torch.randperm(B * pages, dtype=torch.int32).view(B, pages).to(DEVICE),
        "k_cache": torch.full(shape, float("nan"), **cache),
        "v_cache": torch.full(shape, float("nan"), **cache),
        "page_size": page_size,
        "num_heads": Hq,
        "num_kv_heads": Hkv,
        "head_dim": D,
    }


def qkv_reference(arguments: dict, convert) -> tuple:
    a = {name: convert(value) if torch.is_tensor(value) else value for name, value in arguments.items()}
    weight = a.pop("weight")
    a["k_cache"], a["v_cache"] = a["k_cache"].clone(), a["v_cache"].clone()
    q = qkv_rope_append_ref(weight=convert(weight.weight), bias=convert(weight.bias), **a)
    return q, a["k_cache"], a["v_cache"]


def check_qkv(tile=None, **shape):
    a = make_qkv(**shape)
    exact, working = qkv_reference(a, wide), qkv_reference(a, lambda t: t)
    with override_tiles({"qkv": tile} if tile else {}):
        q = qkv_rope_append(**a)
    assert_within(q, working[0], exact[0])
    B, T = shape["B"], shape["T"]
    written = torch.zeros(a["k_cache"].shape[0], a["page_size"], dtype=torch.bool)
    for b, t in itertools.product(range(B), range(T)):
        position = int(a["lengths"][b]) - T + t
        if position >= 0:
            written[a["table"][b, position // a["page_size"]], position % a["page_size"]] = True
    for got, work, true in zip((a["k_cache"], a["v_cache"]), working[1:], exact[1:], strict=True):
        got, work, true = (t.transpose(1, 2).cpu() for t in (got, work, true))
        assert got[~written].isnan().all(), "a row of the cache was written that holds no token of this step"
        if written.any():
            assert_within(got[written], work[written], true[written])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        {"B": 1, "T": 1, "K": 192, "Hq": 4, "Hkv": 2, "D": 16, "lengths": [7], "bias": True},
        {"B": 1, "T": 1, "K": 448, "Hq": 2, "Hkv": 2, "D": 48, "lengths": [24]},  # a head size that is no power of two
        {"B": 1, "T": 1, "K": 64, "Hq": 2, "Hkv": 1, "D": 32, "lengths": [9], "qk_norm": True},
        {"B": 3, "T": 1, "K": 192, "Hq": 3, "Hkv": 1, "D": 32, "lengths": [0, 3, 9], "qk_norm": True, "bias": True},
        {"B": 2, "T": 4, "K": 1024, "Hq": 2, "Hkv": 1, "D": 16, "lengths": [2, 17]},  # two positions below 0
        {"B": 3, "T": 11, "K": 64, "Hq": 4, "Hkv": 2, "D": 32, "lengths": [0, 11, 24], "bias": True},
        {"B": 64, "T": 1, "K": 64, "Hq": 2, "Hkv": 1, "D": 16, "lengths": [i % 25 for i in range(64)], "qk_norm": True},
        {"B": 2, "T": 1, "K": 64, "Hq": 2, "Hkv": 1, "D": 16, "lengths": [0, 0]},
    ],
    ids=lambda s: f"{s['B']}x{s['T']}-{s['K']}-{s['Hq']}:{s['Hkv']}x{s['D']}",
)
def test_qkv(shape, dtype):
    check_qkv(**shape, dtype=dtype)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(
    "tile",
    [
        Tile(4, 128, 1, preload=1),
        Tile(32, 128, 4, preload=2),  # the whole head in one program
        Tile(8, 64, 2, split=2),
        Tile(16, 64, 4, dot=True, split=3, preload=1, stages=2),
        Tile(64, 64, 4, dot=True),  # more rows than a head has
    ],
    ids=lambda t: f"{t.rows}x{t.chunk}-{t.split}-{t.dot}",
)
def test_qkv_tiles(tile, qk_norm):
    check_qkv(tile, B=2, T=2, K=192, Hq=2, Hkv=1, D=32, lengths=[5, 13], dtype=torch.float16, qk_norm=qk_norm)


def ring_qkv(B, T, D, tile, dtype, **more) -> dict:
    """A shape for a ring: of head size 64 a tile with a key's and a value's head; sequences that are absent, that begin before
    position 0, and that fill their pages."""
    lengths = [(0, T - 1, 24, 9 + T)[b % 4] for b in range(B)]
    heads = {"Hq": 2, "Hkv": 1} if D == 64 else {"Hq": 3, "Hkv": 2}
    return {"B": B, "T": T, "K": 3 * tile.chunk * tile.split, "D": D, "lengths": lengths, "dtype": dtype, **heads, **more}


RINGS_QKV = [ring_tile(64, 4), ring_tile(128, 2), ring_tile(64, 2, 2), ring_tile(128, 3, 4)]


@on_hopper
@pytest.mark.parametrize(
    ("D", "bias", "qk_norm"), [(64, False, False), (64, True, False), (128, True, False), (128, True, True)]
)
@pytest.mark.parametrize("tile", RINGS_QKV, ids=str)
def test_qkv_rings(tile, D, bias, qk_norm):
    """M of 2, 5, 8, 16, 40 and 64."""
    shapes = [(1, 2), (2, 1), (5, 1), (8, 1), (2, 4), (16, 1), (4, 4), (10, 4), (64, 1)]
    for (B, T), dtype in itertools.product(shapes, (torch.bfloat16, torch.float16)):
        check_qkv(tile, **ring_qkv(B, T, D, tile, dtype, bias=bias, qk_norm=qk_norm))


@on_hopper
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("tile", RINGS_QKV, ids=str)
def test_qkv_rings_are_repeatable(tile, D):
    """Rows behind x that nobody may read; the same bits every time, whichever of a tile's programs arrives last."""
    for M in (2, 5, 8, 16, 40):
        a = make_qkv(**ring_qkv(M, 1, D, tile, torch.bfloat16))
        room = torch.full((M + 64, a["x"].shape[1]), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        room[:M] = a["x"]
        results = []
        for _ in range(20):
            caches = {name: a[name].clone() for name in ("k_cache", "v_cache")}
            with override_tiles({"qkv": tile}):
                q = qkv_rope_append(**{**a, **caches, "x": room[:M]})
            assert q.isfinite().all()
            results.append([t.view(torch.int16) for t in (q, *caches.values())])
        assert all(torch.equal(first, other) for r in results for first, other in zip(results[0], r, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.zeros(2, dtype=torch.int64)}, r"lengths: found torch.int64 \[2\], expected int32"),
        ({"lengths": torch.zeros(3, dtype=torch.int32)}, r"B dividing 2 rows"),
        ({"table": torch.zeros(3, 1, dtype=torch.int32)}, r"table: found torch.int32 \[3, 1\], expected int32 \[2, P\]"),
        ({"k_cache": torch.zeros(2, 1, 9, 16)}, r"k_cache: found \[2, 1, 9, 16\], expected \[pages, 1, 8, 16\]"),
        ({"num_heads": 3}, r"expected \(3 \+ 2 \* 1\) heads of 16"),
        ({"q_norm": torch.ones(16)}, "expected both or neither"),
        ({"cos": torch.ones(9, 16)}, r"cos: found torch.float32 \[9, 16\], expected float32 \[max_positions, 8\]"),
    ],
)
def test_qkv_refuses(change, message):
    a = make_qkv(B=2, T=1, K=64, Hq=2, Hkv=1, D=16, lengths=[1, 2], dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        qkv_rope_append(**{**a, **change})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [None, Tile(8, 64, 2, split=2), Tile(16, 64, 4, dot=True)], ids=str)
def test_qkv_into_fp8(tile, dtype):
    """Of float64's keys and values: the nearest e4m3, give or take what the same product errs in 16 bits; beyond 448, 448."""
    shape = {"B": 3, "T": 2, "K": 192, "Hq": 3, "Hkv": 1, "D": 32, "lengths": [0, 3, 9], "bias": True}
    a = make_qkv(**shape, dtype=dtype, qk_norm=dtype == torch.float16, cache=torch.float8_e4m3fn)
    for head, scale in ((3, 0.004), (4, 400.0)):  # keys (but for qk-norm) below, values beyond what e4m3 is exact for
        a["weight"].weight.view(5, -1)[head] *= scale
        a["weight"].bias.view(5, -1)[head] *= scale
    plain = a | {name: torch.full_like(a[name], float("nan"), dtype=dtype) for name in ("k_cache", "v_cache")}
    exact, working, rounded = qkv_reference(plain, wide), qkv_reference(plain, lambda t: t), qkv_reference(a, lambda t: t)
    with override_tiles({"qkv": tile} if tile else {}):
        q = qkv_rope_append(**a)
    assert_within(q, working[0], exact[0])
    for got, by_reference, work, true in zip((a["k_cache"], a["v_cache"]), rounded[1:], working[1:], exact[1:], strict=True):
        written, slack = true.isfinite(), 1.5 * (work.double() - true).nan_to_num().abs().max()
        true = true.clamp(-448, 448)
        bound = (true.abs() / 16).clamp(min=2.0**-10) + slack * (1 + 2**-4)
        for values in (got.double(), by_reference.double()):
            assert torch.equal(values.isfinite(), written), "a row of the cache was written that holds no token of this step"
            assert ((values - true).abs()[written] <= bound[written]).all()
    assert (exact[2].abs() > 448).any(), "else nothing saturates"


# ---------------------------------------------------------------- operators


def operator_arguments(dtype):
    """(operator, its positional arguments) for opcheck."""
    a = make_qkv(B=2, T=2, K=64, Hq=2, Hkv=1, D=16, lengths=[2, 7], dtype=dtype, bias=True, qk_norm=True)
    weight = a.pop("weight")
    a["k_cache"].zero_(), a["v_cache"].zero_()
    qkv = (a["x"], *Operand.of(weight), weight.bias, a["norm"], None, *list(a.values())[2:])
    w, x, res = make_weight(32, 64, dtype, True), randn(3, 64, dtype=dtype), randn(3, 16, dtype=dtype)
    gain, squares = randn(64, dtype=dtype), torch.rand(3, 2, device=DEVICE)
    yield torch.ops.rooflama.qkv_rope_append.default, (*qkv, False)
    yield torch.ops.rooflama.linear.default, (x, *Operand.of(w), w.bias, gain, None, EPS, "silu_mul", res, False, False)
    yield torch.ops.rooflama.linear.default, (x, *Operand.of(w), None, None, squares, EPS, "none", None, True, True)
    w = make_weight(72, 64, dtype)
    yield (
        torch.ops.rooflama.linear_folding.default,
        (x, *Operand.of(w), None, randn(3, 72, dtype=dtype), w.weight[0].repeat(2)[:72], 16, False, False),
    )


def test_opcheck():
    with override_tiles({"qkv": Tile(16, 64, 4), "silu_mul": Tile(32, 64, 4), "linear": Tile(32, 64, 4)}):  # few programs
        for operator, arguments in operator_arguments(torch.float16):
            torch.library.opcheck(operator, arguments)


def test_compiled_whole():
    """Inside torch.compile(fullgraph=True) the operators are opaque and their mutations are kept."""
    a = make_qkv(B=1, T=1, K=64, Hq=2, Hkv=1, D=16, lengths=[5], dtype=torch.float16)
    w13, w2 = (
        make_weight(64, 64, torch.float16),
        make_weight(32, 64, torch.float16),
    )
    a["k_cache"].zero_(), a["v_cache"].zero_()

    def step(x, k_cache, v_cache):
        q = qkv_rope_append(**{**a, "x": x, "k_cache": k_cache, "v_cache": v_cache})
        h = linear(x, w13, norm=a["norm"], eps=EPS, residual=x)
        return q.flatten(1) * 2, linear(h, w2, activation="silu_mul")

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        k, v = a["k_cache"].clone(), a["v_cache"].clone()
        results.append((*run(a["x"], k, v), k, v))
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))
    assert results[0][2].any()


# ---------------------------------------------------------------- tiles


@pytest.mark.parametrize("op", ["linear", "silu_mul", "qkv", "head"])
@pytest.mark.parametrize("sms", [16, 132])
def test_choose_tile_fits(op, sms):
    """Every shape of the families: the preloaded tile leaves registers for the rest, and nearly every SM gets work (on 132 SMs
    128 programs were faster than 256)."""
    for rows, (N, K) in itertools.product(
        (1, 2, 4, 5, 16, 64), [(3072, 2048), (2048, 8192), (37888, 3584), (3584, 18944), (128256, 4096), (64, 64), (448, 192)]
    ):
        tile = choose_tile(op, "bf16", rows, N, K, sms)
        words_a_thread = tile.rows * min(tile.chunk * tile.preload, K * 2) // (64 * tile.warps)
        assert words_a_thread <= 160, (tile, rows, N, K)
        assert tile.dot == (rows > 2)
        assert op != "head" or tile.rows % 4 == 0
        if N * K > 1 << 22 and op != "head":
            programs = min(tile.grid * sms, N // tile.rows) if tile.grid else -(-N // tile.rows) * tile.split
            assert programs >= (0.9 if rows <= 16 else 0.7) * sms, (tile, rows, N, K)


@pytest.mark.parametrize("rows", [1, 2, 4, 16, 64])
@pytest.mark.parametrize(
    ("op", "N", "K"), [("qkv", 3072, 2048), ("linear", 4096, 14336), ("silu_mul", 37888, 3584), ("head", 128256, 4096)]
)
def test_candidates_fit(op, N, K, rows):
    """A tuner gets a choice for every shape, and nothing that the kernels refuse."""
    tiles = candidate_tiles(op, rows, N, K)
    assert len(tiles) == len(set(tiles)) > 3
    for tile in tiles:
        assert tile.rows >= LEAST_ROWS[op]
        assert tile.dot or rows <= FMA_MOST_ROWS
        assert not tile.ring or ring_bytes(tile, rows) <= SHARED_BYTES
        assert tile.ring or not tile.dot or (tile.rows + max(16, rows)) * tile.chunk * 2 * tile.preload <= SHARED_BYTES
        assert tile.dot or tile.preload * tile.chunk >= K or not tile.grid


def test_which_rows_are_for_the_kernels():
    assert [kernel_rows(*shape, 132) for shape in ((3072, 3072), (128256, 2048), (28672, 4096))] == [16, 32, 64]
    assert kernel_rows(28672, 4096, 108) == 16, "another card was not measured"
    with override_tiles({("head", 128256, 2048): Tile(64, 64, 4, dot=True)}):  # a tuner's: it must not time cuBLAS
        assert [kernel_rows(*shape, 132) for shape in ((128256, 2048), (3072, 3072))] == [64, 16]


def test_override_goes_back():
    before = choose_tile("linear", "bf16", 1, 2048, 2048, 132)
    with override_tiles({"linear": Tile(2, 64, 1)}), override_tiles({("linear", 32, 64): Tile(4, 64, 1)}):
        pass
    assert choose_tile("linear", "bf16", 1, 2048, 2048, 132) == before


@pytest.mark.skipif(not INTERPRET, reason="shows that under TRITON_INTERPRET=1 these tests run kernels, not references")
def test_kernels_are_what_is_tested(monkeypatch):
    monkeypatch.setattr(sys.modules["kernels.linear"], "linear_ref", None)
    assert linear(randn(1, 64, dtype=torch.float16), make_weight(16, 64, torch.float16)).shape == (1, 16)
