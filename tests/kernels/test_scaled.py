"""Products of many rows in fp8: x rounded, against float64, a tiled weight's codes, and the product against its reference."""

import dataclasses
import sys

import pytest
import torch
from tolerance import unit_roundoff

import kernels
from generate import fill_randomly
from kernels import scaled
from kernels._matmul import rms_norm_ref
from kernels.formats import PackedFormat, Weight
from kernels.rows import silu_mul_ref
from kernels.scaled import FP8, QuantizedRows, quantize_rows, scaled_linear, silu_mul_rows
from model import SHAPES, PrefillStep, Transformer
from quantize import make_recipe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 4096  # elements on either side of an operator's result
LEVELS = torch.arange(256, dtype=torch.uint8).view(FP8).double()
LEVELS = LEVELS[LEVELS.isfinite()].sort().values.to(DEVICE)  # what e4m3 can say
SLACK = 2.0**-19  # of a value, by float32's roundings: a handful of 2**-24, of an exponential and a sum of squares a few more


def randn(*size, dtype=torch.bfloat16):
    return torch.randn(*size, device=DEVICE).to(dtype)


@pytest.fixture
def guarded(monkeypatch):
    """Gives operators their codes and scales in the middle of NaN; the buffers that they lie in."""
    buffers, made = [], scaled._rows

    def middle(t):
        buffers.append(torch.full((t.numel() + 2 * GUARD,), torch.nan, device=t.device).to(t.dtype))
        return buffers[-1][GUARD : GUARD + t.numel()].view(t.shape)

    monkeypatch.setattr(scaled, "_rows", lambda *args, **options: tuple(map(middle, made(*args, **options))))
    yield buffers
    for buffer in buffers:
        assert buffer[:GUARD].float().isnan().all()
        assert buffer[-GUARD:].float().isnan().all()


def check(found: QuantizedRows, exact: torch.Tensor) -> None:
    """Codes are the levels nearest to exact / scale, but for float32's roundings; the scale takes the largest value to 448."""
    codes, scale = found.codes.double(), found.scale.double()
    assert codes.shape == exact.shape
    assert scale.shape == (len(exact), 1)
    assert codes.isfinite().all()
    largest = exact.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scale, torch.where(largest > 0, largest / 448, 1.0), rtol=SLACK, atol=0)
    assert (codes.abs().amax(-1)[largest[:, 0] > 0] == 448).all()
    values = exact / scale
    above = torch.searchsorted(LEVELS, values).clamp(1, len(LEVELS) - 1)
    nearest = torch.minimum((LEVELS[above] - values).abs(), (LEVELS[above - 1] - values).abs())
    assert ((codes - values).abs() <= nearest + SLACK * values.abs()).all()


SIZES = [(3, 192), (1, 2048), (2, 201), (5, 16), (70, 64)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_quantize_rows(shape, dtype, guarded):
    """Odd lengths; rows of very large and very small values, whose codes are those of the same row at another scale."""
    x = randn(*shape, dtype=dtype)
    x[-1] *= 2.0**-12 if dtype == torch.float16 else 2.0**-90
    x[0] *= 2.0**10
    check(quantize_rows(x), x.double())
    assert len(guarded) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_rms_norm_rows(shape, dtype, guarded):
    x, weight = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype)
    x[-1] *= 1e-4  # where eps counts
    check(quantize_rows(x, weight, 1e-5), rms_norm_ref(x.double(), weight.double(), 1e-5))
    assert len(guarded) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_silu_mul_rows(shape, dtype, guarded):
    x = randn(shape[0], 2 * shape[1], dtype=dtype) * 3
    check(silu_mul_rows(x), silu_mul_ref(x.double()))
    assert len(guarded) == 2


def test_zeros_and_tiny_values():
    """A row of zeros has scale 1; values so small that their scale would have no inverse become small codes, not NaN."""
    x = torch.zeros(3, 64, device=DEVICE)
    x[1, 5], x[2, 7] = 2.0**-125, -(2.0**-149)
    codes, scale = quantize_rows(x)
    assert scale.tolist() == [[1.0], [2.0**-126], [2.0**-126]]
    assert not codes[[0, 2]].float().any()
    assert codes[1, 5].item() == 2
    assert codes[1].float().count_nonzero() == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_so(bad):
    """A row with NaN or infinity gives NaN, all of it; its neighbours are as they would be without it."""
    weight = fp8_weight(32, 64)
    x = randn(3, 64)
    plain = scaled_linear(x, weight)
    x[1, 9] = bad
    gain = torch.ones(64, dtype=x.dtype, device=DEVICE)
    for rows in (quantize_rows(x), quantize_rows(x, gain, 1e-5), silu_mul_rows(torch.cat([x, x], dim=1))):
        assert rows.scale[:, 0].isnan().tolist() == [False, True, False]
    y = scaled_linear(x, weight)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], plain[[0, 2]])


def test_no_rows():
    x = randn(0, 64)
    for rows in (quantize_rows(x), quantize_rows(x, randn(64), 1e-5)):
        assert (rows.codes.shape, rows.scale.shape) == ((0, 64), (0, 1))
    assert silu_mul_rows(x).codes.shape == (0, 32)


# ---------------------------------------------------------------- the weight's codes


def fp8_weight(N, K, bias=False, dtype=torch.bfloat16) -> Weight:
    plain = Weight(N, K, bias=bias, dtype=dtype, device=DEVICE)
    for tensor in plain.buffers():
        tensor.normal_(0, 0.1)
    return plain.round_to_nearest(PackedFormat("fp8"))


@pytest.mark.parametrize(("N", "K"), [(8, 64), (16, 16), (13, 100), (40, 1408), (3, 4)])
def test_codes_of_a_tiled_weight(N, K, monkeypatch):
    """Every code but NaN, in every place; and not a byte beside them."""
    codes = (torch.arange(N * K, device=DEVICE).view(N, K) * 7 % 256).to(torch.uint8)
    codes = torch.where((codes & 127) == 127, 0, codes)
    weight = fp8_weight(N, K).quantized(PackedFormat("fp8"), codes.view(FP8), torch.ones(N, 1, device=DEVICE))
    buffer, module = torch.full((N * K + 2 * GUARD,), 127, dtype=torch.uint8, device=DEVICE), sys.modules["kernels.dequantize"]
    assert weight.fp8_codes() is weight.weight
    weight.tile()
    monkeypatch.setattr(module, "_codes", lambda *_: buffer[GUARD:-GUARD].view(FP8).view(N, K))
    assert torch.equal(weight.fp8_codes().view(torch.uint8), codes)
    assert (buffer[:GUARD] == 127).all()
    assert (buffer[-GUARD:] == 127).all()


# ---------------------------------------------------------------- the product


def by_hand(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """The product of x, rounded, and the weight's values, in float64."""
    codes, scale = scaled.quantize_rows_ref(x)
    return (codes.double() * scale.double()) @ (weight.fp8_codes().double() * weight.scale.double()).T


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("M", "N", "K"), [(65, 48, 64), (130, 272, 512), (1, 16, 16), (70, 32, 14336)])
def test_product(M, N, K, bias, tiled):
    """Within what the sums' own precision allows: float32, or on a card 13 bits of mantissa for each partial sum."""
    weight, x, residual = fp8_weight(N, K, bias), randn(M, K), randn(M, N)
    if tiled:
        weight.tile()
    product = by_hand(x, weight)
    magnitudes = x.double().norm(dim=1, keepdim=True) * weight.dequantized().double().norm(dim=1)
    sums = (2.0**-13 if DEVICE == "cuda" else 2.0**-20) * magnitudes
    exact = product + weight.bias.double() if bias else product
    added, before = exact + residual.double(), residual.clone()
    for y, steps in (
        (scaled_linear(x, weight), [product, exact]),
        (scaled_linear(x, weight, residual=residual), [product, exact, added]),
    ):
        allowed = sums + 2 * unit_roundoff(torch.bfloat16) * sum(step.abs() for step in steps)
        assert ((y.double() - steps[-1]).abs() <= allowed).all()
    assert torch.equal(residual, before), "of few rows it may be a graph's input, which the graph's warm-up must not change"


def test_norm_and_activation():
    """The norm and SiLU x up, each fused with the rounding behind it, give what the parts give."""
    w13, x, gain = fp8_weight(192, 64), randn(66, 64), randn(64)
    normed = rms_norm_ref(x.double(), gain.double(), 1e-5).float()
    hidden = silu_mul_ref(by_hand(normed, w13))
    plain = scaled_linear(x, w13, norm=gain, eps=1e-5, activation="silu_mul")
    rounded = scaled_linear(x, w13, norm=gain, eps=1e-5, activation="silu_mul", y_rounded=True)
    assert isinstance(rounded, QuantizedRows)
    for found, limit in ((plain.double(), 0.01), (rounded.codes.double() * rounded.scale, 0.05)):
        assert (found - hidden).norm() < limit * hidden.norm()


def test_opcheck():
    """Without the tests that compare numbers: on a CPU, PyTorch cannot compare those of e4m3."""
    x, weight = randn(5, 64), fp8_weight(48, 64, bias=True)
    ops, which = torch.ops.rooflama, ("test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.quantize_rows, (x, None, 0.0), test_utils=which)
    torch.library.opcheck(ops.quantize_rows, (x, randn(64), 1e-5), test_utils=which)
    torch.library.opcheck(ops.silu_mul_rows, (x,), test_utils=which)
    torch.library.opcheck(ops.scaled_mm, (*quantize_rows(x), weight.weight, weight.scale, torch.bfloat16), test_utils=which)
    weight.tile()
    torch.library.opcheck(ops.untile_fp8, (weight.weight, 48, 64), test_utils=which)


def test_what_does_not_fit_is_refused():
    ops, x, weight = torch.ops.rooflama, randn(5, 64), fp8_weight(48, 64)
    rows = quantize_rows(x)
    with pytest.raises(ValueError, match=r"x: found \[5, 63\], expected \[N, 2 F\]"):
        silu_mul_rows(randn(5, 63))
    with pytest.raises(ValueError, match="x: found strides"):
        ops.quantize_rows(x.T, None, 0.0)
    with pytest.raises(ValueError, match=r"weight: found \[32\], expected \[64\]"):
        quantize_rows(x, randn(32), 1e-5)
    with pytest.raises(ValueError, match=r"scale: found torch.float32 \[1, 5\], expected torch.float32 \[5, 1\]"):
        ops.scaled_mm(rows.codes, rows.scale.T, weight.weight, weight.scale, torch.bfloat16)
    with pytest.raises(ValueError, match=r"weight: found \[40, 64\], expected multiples of 16"):
        ops.scaled_mm(*rows, weight.weight[:40], weight.scale[:40], torch.bfloat16)
    with pytest.raises(ValueError, match="columns: found 66, expected a multiple of 4"):
        ops.untile_fp8(weight.weight, 48, 66)
    with pytest.raises(ValueError, match=r"weight: found torch.float8_e4m3fn \[48, 64\], expected int32"):
        ops.untile_fp8(weight.weight, 48, 64)


# ---------------------------------------------------------------- in the model

TINY = {"num_layers": 2, "hidden_size": 128, "intermediate_size": 192, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 64}


@pytest.mark.parametrize("shape", ["llama-3.2-1b", "qwen2.5-7b", "qwen3-8b"])
@pytest.mark.parametrize("rows", [3, 65])
def test_forward(shape, rows, monkeypatch):
    """All four products of a layer are rounded where that is asked for, x once each; the result is near the plain one's."""
    config = dataclasses.replace(SHAPES[shape], head_dim=32, tie_word_embeddings=False, **TINY)
    model = Transformer(make_recipe("fp8", config).config(config), device=DEVICE)
    fill_randomly(model)
    model.tile_weights()
    model.setup_rope(128)
    x = model.embed(torch.arange(rows, device=DEVICE) % 64)
    products, real = [], kernels.scaled.scaled_linear
    monkeypatch.setattr(kernels, "scaled_linear", lambda x, *a, **k: (products.append(type(x)), real(x, *a, **k))[1])
    outputs = []
    for enabled in (False, True):
        with torch.no_grad(), kernels.rounding_activations(enabled):
            outputs.append(model(x, PrefillStep(rows)).double())
    plain, rounded = outputs
    layer = [torch.Tensor, torch.Tensor, torch.Tensor, QuantizedRows]  # qkv, output, gate/up, down
    assert products == layer * 2
    assert 0.01 * plain.norm() < (plain - rounded).norm() < 0.15 * plain.norm(), (
        "e4m3 errs by 2.6% RMS, in each of eight products"
    )


def test_sizes_that_cublas_does_not_take():
    """A feed-forward of 200: w13 is rounded, w2 is not, and is given what it takes."""
    config = dataclasses.replace(SHAPES["llama-3.2-1b"], **TINY | {"intermediate_size": 200})
    model = Transformer(make_recipe("fp8", config).config(config), device=DEVICE)
    fill_randomly(model)
    x, ffn = randn(65, 128), model.layers[0].feed_forward
    ffn.w2.scale *= 20  # else what bf16 rounds of the residual is more
    assert not kernels.takes_scaled(ffn.w13), "outside of such a block"
    with torch.no_grad():
        with kernels.rounding_activations():
            assert kernels.takes_scaled(ffn.w13)
            assert not kernels.takes_scaled(ffn.w2)
            y, _ = ffn(x.clone(), model.layers[0].ffn_norm.weight, model.layers[0].reader)
        plain, _ = ffn(x.clone(), model.layers[0].ffn_norm.weight, model.layers[0].reader)
    assert 0 < (y - plain).norm() < 0.05 * (plain - x).norm()
