"""Widening of tiled weights: bit for bit what PyTorch's arithmetic says, and no byte beside the result."""

import dataclasses
import sys
import weakref

import pytest
import torch
from test_packed import BF16, FORMATS, FP16, INT4, INT8, make

import kernels
from generate import fill_randomly
from kernels.formats import PackedFormat, Weight, dequantize_tiled
from model import SHAPES, PrefillStep, Transformer
from speculative import quantized_copy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 4096  # elements on either side of a result


@pytest.fixture
def guarded(monkeypatch):
    """Gives the operator results in the middle of NaN; the buffers that they lie in."""
    buffers, module = [], sys.modules["kernels.dequantize"]
    checked = module._plain

    def middle(*args):
        out = checked(*args)
        buffers.append(out.new_full((out.numel() + 2 * GUARD,), torch.nan))
        return buffers[-1][GUARD:-GUARD].view(out.shape)

    monkeypatch.setattr(module, "_plain", middle)
    return buffers


def by_torch(w: Weight) -> torch.Tensor:
    return dequantize_tiled(w.weight, w.scale, w.zero, w.format, w.out_features, w.in_features).to(w.dtype)


def check(weight: Weight, buffers) -> None:
    found, expected = weight.dequantized(), by_torch(weight)
    assert found.isfinite().all()
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))  # -0 is not 0 here
    (buffer,) = buffers
    assert buffer[:GUARD].isnan().all()
    assert buffer[-GUARD:].isnan().all()
    buffers.clear()


@pytest.mark.parametrize("fmt", [*FORMATS, PackedFormat("int4", 32, True, torch.float32)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_odd_shapes(fmt, dtype, guarded):
    """Rows that are no half block; columns that are no unit, no warp's work or more than a program's."""
    for N, K in ((8, 128), (13, 128), (3, 1408)):
        check(make(N, K, fmt, dtype), guarded)
    if fmt.group_size < 128:
        check(make(9, 192, fmt, dtype), guarded)
    if fmt.group_size == 0:
        check(make(5, 201, fmt, dtype), guarded)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_code_and_zero(fmt, guarded):
    """Each code in each place of a thread, both signs of scales, results that are subnormal."""
    generator, N, K = torch.Generator().manual_seed(0), 16, 512
    codes = torch.arange(N * K).view(N, K) * 7 % 256
    wrong = {"int8": (128,), "fp8": (127, 255)}.get(fmt.format, ())  # no numbers: `tile` refuses them
    codes = torch.where(torch.isin(codes, torch.tensor(wrong)), 0, codes).to(torch.uint8)
    codes = codes & 15 if fmt.format == "int4" else codes.view(torch.int8 if fmt.format == "int8" else torch.float8_e4m3fn)
    scale = torch.randn(N, fmt.num_groups(K), generator=generator)
    scale[::5] *= 2.0**-23
    if DEVICE == "cuda" or fmt.scale_dtype == torch.float32:  # the interpreter misreads a subnormal bfloat16
        scale[1::5] *= 2.0**-127
    scale = scale.to(fmt.scale_dtype)
    zero = None if fmt.symmetric else torch.randint(0, 16, scale.shape, generator=generator).to(torch.uint8)
    for dtype in (BF16, FP16):
        weight = Weight(N, K, dtype=dtype).quantized(fmt, codes, scale, zero).to(DEVICE)
        stored = weight.dequantized()
        weight.tile()
        check(weight, guarded)
        assert torch.equal(weight.dequantized(), stored)
        guarded.clear()


def test_float32_takes_the_reference():
    weight = make(24, 128, INT4, torch.float32)
    assert torch.equal(weight.dequantized(), by_torch(weight))


def test_one_widened_weight_at_a_time(monkeypatch):
    """A forward of many rows: when a weight is widened, those before it are gone."""
    tiny = {"num_layers": 2, "hidden_size": 128, "intermediate_size": 192, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 64}
    plain = Transformer(dataclasses.replace(SHAPES["llama-3.2-1b"], **tiny), device=DEVICE)
    fill_randomly(plain)
    model = quantized_copy(plain)
    model.tile_weights()
    model.setup_rope(128)
    widened, dequantized = [], Weight.dequantized

    def counted(weight):
        assert all(earlier() is None for earlier in widened), "an earlier weight is still there"
        out = dequantized(weight)
        widened.append(weakref.ref(out))
        return out

    monkeypatch.setattr(Weight, "dequantized", counted)
    monkeypatch.setattr(kernels, "MAX_ROWS", 16)
    x = model.embed(torch.arange(17, device=DEVICE))
    with torch.no_grad():
        assert model.logits(model(x, PrefillStep(len(x)))).isfinite().all()
    assert len(widened) == 2 * 4 + 1


def test_what_does_not_fit_is_refused():
    weight = make(24, 256, INT4)
    op, rest = torch.ops.rooflama.dequantize, (weight.scale, weight.zero, "int4", 24, 256, BF16)
    with pytest.raises(ValueError, match=r"weight: found torch.int32 \[2, 2, 32, 4\], expected int32 \[3, 2, 32, 4\]"):
        op(weight.weight[:2], *rest)
    with pytest.raises(ValueError, match="weight: found strides"):
        op(weight.weight.mT.contiguous().mT, *rest)
    with pytest.raises(ValueError, match=r"scale: found \[3, 2, 8, 1\], expected \[24, 1\]"):
        op(weight.weight.repeat(1, 2, 1, 1), weight.scale, None, "int8", 24, 256, BF16)


@pytest.mark.parametrize("fmt", [INT8, PackedFormat("int4", 32, False, BF16)], ids=str)
def test_opcheck(fmt):
    weight = make(24, 256, fmt)
    arguments = weight.weight, weight.scale, weight.zero, fmt.format, 24, 256, BF16
    torch.library.opcheck(torch.ops.rooflama.dequantize.default, arguments)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_cuda_graph():
    """Captured between products, as a step has it: each result may take the memory of the one before."""
    weights = [make(1024, 1024, fmt) for fmt in FORMATS]
    x = torch.randn(128, 1024, device=DEVICE).to(BF16)
    expected = [x @ by_torch(w).T for w in weights]
    weights[0].dequantized()
    x @ x.T
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [x @ w.dequantized().T for w in weights]
    for _ in range(100):
        graph.replay()
        for y, exact in zip(found, expected, strict=True):
            assert torch.equal(y, exact)
