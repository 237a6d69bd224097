"""The kernels on packed weights: int8, fp8 and int4 against dequantise-then-matmul in float64, and every code by itself."""

import pytest
import torch
from test_head import head
from test_linear import DEVICE, EPS, make_qkv, randn, wide
from tolerance import assert_within

from kernels._matmul import Operand
from kernels.formats import PackedFormat, Weight, dequantize_tiled
from kernels.head import head_ref
from kernels.linear import linear, linear_ref, qkv_rope_append, qkv_rope_append_ref
from kernels.tiles import candidate_tiles, choose_tile, override_tiles, packed_shape, packed_tile

BF16, FP16 = torch.bfloat16, torch.float16
INT8, FP8 = PackedFormat("int8"), PackedFormat("fp8")
INT4 = PackedFormat("int4", 128, True, BF16)
FORMATS = [
    INT8,
    FP8,
    INT4,
    PackedFormat("int4", 128, False, FP16),
    PackedFormat("int4", 64, True, torch.float32),
    PackedFormat("int4", 32, False, BF16),
]


def make(N, K, fmt, dtype=BF16, bias=False) -> Weight:
    """A tiled weight whose zero points and scales differ from group to group."""
    weight = Weight(N, K, bias=bias, dtype=dtype, device=DEVICE)
    weight.weight.copy_(randn(N, K, dtype=dtype, scale=K**-0.5) * randn(N, 1, dtype=dtype).abs() + 0.02)
    if bias:
        weight.bias.copy_(randn(N, dtype=dtype))
    weight = weight.round_to_nearest(fmt)
    weight.tile()
    return weight


def exact_weight(w: Weight) -> torch.Tensor:
    """What the codes stand for, in float64, before any rounding to the model's dtype."""
    return dequantize_tiled(w.weight, w.scale, w.zero, w.format, w.out_features, w.in_features).double()


def check_linear(M, N, K, fmt, dtype=BF16, norm=True, bias=False, activation="none", residual=False, tile=None):
    weight, x = make(N, K, fmt, dtype, bias), randn(M, K, dtype=dtype)
    nw = randn(K, dtype=dtype) if norm else None
    res = randn(M, N // 2 if activation == "silu_mul" else N, dtype=dtype) if residual else None
    with override_tiles({"silu_mul" if activation == "silu_mul" else "linear": tile} if tile else {}):
        y = linear(x, weight, norm=nw, eps=EPS, activation=activation, residual=res)
    rest = (weight.bias, nw, EPS, activation, res)
    exact = linear_ref(wide(x), exact_weight(weight), *(wide(a) if torch.is_tensor(a) else a for a in rest))
    assert_within(y, linear_ref(x, weight.dequantized(), *rest), exact)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("M", [1, 5, 16, 33])
def test_rows(M, fmt):
    check_linear(M, 48, 128, fmt, norm=False, bias=True, residual=True)
    if M < 16:
        check_linear(M, 32, 256, fmt, FP16, activation="silu_mul")


@pytest.mark.parametrize("M", [2, 8, 21, 64])
def test_more_rows(M):
    check_linear(M, 48, 128, INT8)
    check_linear(M, 48, 128, INT4)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize(("N", "K"), [(73, 128), (16, 640)])
def test_odd_shapes(N, K, fmt):
    """Rows that fill no tile; columns that no number of warps divides."""
    check_linear(1, N, K, fmt, bias=True)


@pytest.mark.parametrize("fmt", [INT8, FP8, PackedFormat("int4", 64, False, BF16)], ids=str)
def test_columns_that_fill_no_unit(fmt):
    check_linear(2, 48, 192, fmt, residual=True)
    check_linear(1, 32, 448, fmt, activation="silu_mul")


TILES = {  # rows, warps that split K, warps, units in flight, programs that split K
    "all preloaded": (16, 4, 4, 8, 1),
    "a loop, two blocks a warp": (32, 1, 1, 1, 1),
    "a loop, two in flight": (64, 2, 4, 2, 1),
    "programs merge": (32, 2, 4, 1, 3),
    "four blocks a warp": (64, 4, 4, 1, 1),
    "no warp splits K": (128, 1, 8, 2, 2),
}


@pytest.mark.parametrize("fmt", [INT8, PackedFormat("int4", 32, False, BF16)], ids=str)
@pytest.mark.parametrize("name", TILES)
def test_tiles(name, fmt):
    rows, parts, warps, preload, split = TILES[name]
    tile = packed_tile(fmt.format, rows, parts, warps, preload, 512, split)
    if name == "no warp splits K":
        check_linear(6, rows, 512, fmt, tile=tile, activation="silu_mul")
    else:
        check_linear(1, 40, 512, fmt, tile=tile, bias=True, residual=True)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_code(fmt):
    """A single 1 in x brings out one column of the weight: bit for bit what `dequantized` says, wherever it stands."""
    generator, N, K = torch.Generator().manual_seed(0), 16, 128
    plain = Weight(N, K, dtype=FP16)
    if fmt.format == "int4":
        codes = torch.randint(0, 16, (N, K), generator=generator).to(torch.uint8)
    else:
        codes = torch.arange(N * K).view(N, K).to(torch.uint8)
        codes[codes == (128 if fmt.format == "int8" else 127)] = 0
        codes[codes == (128 if fmt.format == "int8" else 255)] = 0
        codes = codes.view(torch.int8 if fmt.format == "int8" else torch.float8_e4m3fn)
    scale = torch.rand(N, fmt.num_groups(K), generator=generator).add(0.5).to(fmt.scale_dtype)
    zero = None if fmt.symmetric else torch.randint(0, 16, scale.shape, generator=generator).to(torch.uint8)
    weight = plain.quantized(fmt, codes, scale, zero).to(DEVICE)
    expected = weight.dequantized()
    weight.tile()
    for x in torch.eye(K, dtype=FP16, device=DEVICE).chunk(2):
        assert torch.equal(linear(x, weight), x @ expected.T)


@pytest.mark.parametrize(
    ("fmt", "qk_norm", "lengths"),
    [*((fmt, True, [3, 9]) for fmt in FORMATS), *((fmt, False, [7]) for fmt in (FP8, FORMATS[-1]))],
    ids=str,
)
def test_qkv(fmt, qk_norm, lengths):
    a = make_qkv(B=len(lengths), T=1, K=256, Hq=4, Hkv=2, D=32, lengths=lengths, dtype=BF16, bias=True, qk_norm=qk_norm)
    a["weight"] = make(256, 256, fmt, bias=True)
    caches = {name: a[name].clone() for name in ("k_cache", "v_cache")}
    q = qkv_rope_append(**a)
    arguments = {k: v for k, v in a.items() if k != "weight"}
    bias, results = a["weight"].bias, []
    for dense, convert in ((a["weight"].dequantized(), lambda t: t), (exact_weight(a["weight"]), wide)):
        call = {k: convert(v) if torch.is_tensor(v) else v for k, v in (arguments | caches).items()}
        call |= {name: call[name].clone() for name in caches}
        exact_q = qkv_rope_append_ref(call.pop("x"), dense, convert(bias), **call)
        results.append((exact_q, *(call[name] for name in caches)))
    for actual, working, exact in zip((q, a["k_cache"], a["v_cache"]), *results, strict=True):
        written = exact.isfinite()
        assert torch.equal(actual.isfinite(), written)
        assert_within(actual[written], working[written], exact[written])


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize(("M", "V"), [(1, 96), (3, 205), (20, 64)])
def test_head(M, V, fmt):
    """With a vocabulary that is padded, and no multiple of anything."""
    weight, x, norm = make(V, 128, fmt, FP16), randn(M, 128, dtype=FP16), randn(128, dtype=FP16)
    lengths = torch.ones(M, dtype=torch.int32, device=DEVICE)
    logits, value, index = head(x, weight, norm=norm, eps=EPS, vocab_size=V - 3, lengths=lengths)
    rest = (V - 3, None, None, None, lengths)
    exact, *_ = head_ref(wide(x), exact_weight(weight), norm.double(), EPS, *rest)
    working = head_ref(x, weight.dequantized(), norm, EPS, *rest)[0]
    assert_within(logits[:, : V - 3], working[:, : V - 3], exact[:, : V - 3].double())
    assert (logits[:, V - 3 :] == -torch.inf).all()
    chosen = index.gather(1, value.argmax(1, keepdim=True)).squeeze(1).long()
    assert torch.equal(chosen, logits.argmax(1))


def test_float32_takes_the_reference():
    weight, x = make(32, 128, INT4, torch.float32), randn(3, 128, dtype=torch.float32)
    assert torch.equal(linear(x, weight), linear_ref(x, weight.dequantized()))


def test_opcheck():
    weight, x = make(64, 256, INT4, bias=True), randn(3, 256, dtype=BF16)
    arguments = (x, *Operand.of(weight), weight.bias, randn(256, dtype=BF16), None, EPS, "silu_mul", None, False, True)
    torch.library.opcheck(torch.ops.rooflama.linear.default, arguments)


def test_codes_that_stand_for_no_number():
    plain = Weight(8, 64, dtype=BF16)
    scale = torch.ones(8, 1)
    for fmt, code in ((INT8, -128), (FP8, 127)):
        codes = torch.zeros(8, 64, dtype=torch.int8)
        codes[3, 5] = code
        codes = codes if fmt == INT8 else codes.view(torch.float8_e4m3fn)
        with pytest.raises(ValueError, match=f"a weight of {fmt}: found the code"):
            plain.quantized(fmt, codes, scale).tile()


def test_a_tiled_weight_is_not_saved():
    with pytest.raises(ValueError, match="expected it to be saved before"):
        make(16, 128, INT4).state_dict()


# ---------------------------------------------------------------- tiles


@pytest.mark.parametrize("fmt", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("rows", [1, 8, 16, 17, 64])
@pytest.mark.parametrize(
    ("op", "N", "K"),
    [("qkv", 3072, 2048), ("linear", 4096, 14336), ("silu_mul", 37888, 3584), ("linear", 3584, 18944), ("head", 152064, 3584)],
)
def test_choice_and_candidates_fit(op, N, K, rows, fmt):
    """Warps and rows come out even, no weight waits for registers, and a tuner has a choice."""
    chosen = choose_tile(op, fmt, rows, N, K, 132)
    tiles = candidate_tiles(op, rows, N, K, fmt)
    assert len(tiles) > 10
    for tile in [chosen, *(tile for tile in tiles if not tile.ring)]:
        parts, blocks = packed_shape(tile, fmt)
        assert tile.dot
        assert tile.rows * parts == 16 * blocks * tile.warps
        weights = 8 * tile.preload * blocks  # registers of a thread, beside sums, addresses and x
        assert weights * tile.warps <= 16 * 64, "half of an SM's registers"
        assert weights <= 128
        assert op != "head" or 4096 * tile.rows >= N
