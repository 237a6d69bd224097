"""Packed linears of 2 to 64 rows: the order of columns that they read, and (on a Hopper card) the rings themselves."""

import dataclasses
import itertools
import re
import sys

import pytest
import torch
import triton
import triton.language as tl
from test_folding import TINY, exact_x, random_model
from test_head import check_candidates, sampling
from test_linear import DEVICE, EPS, make_qkv, on_hopper, randn, wide
from test_packed import FP8, INT4, INT8, exact_weight, make
from tolerance import assert_within, unit_roundoff

import kernels
from decoding import Session, candidates
from kernels import _packed
from kernels._common import permute_columns, permuted
from kernels._matmul import Operand, fold_norm_ref, x_scale
from kernels._packed_ring import launch_packed_ring_head
from kernels.flash_decode import flash_decode
from kernels.formats import PackedFormat, Weight
from kernels.head import PARTIALS, head_ref
from kernels.linear import linear, linear_folding, linear_ref, qkv_rope_append, qkv_rope_append_ref
from kernels.tiles import (
    RING_LEAST,
    SHARED_BYTES,
    Tile,
    batch_invariant,
    candidate_tiles,
    choose_tile,
    override_tiles,
    packed_ring_bytes,
    packed_ring_tile,
    packed_tile,
    tile_for,
)
from model import SHAPES, DecodeStep, PackStep

BF16, FP16 = torch.bfloat16, torch.float16
ZEROS = PackedFormat("int4", 128, False, BF16)

# ---------------------------------------------------------------- the order of columns


@triton.jit
def _permuted_kernel(out_ptr, N: tl.constexpr):
    column = tl.arange(0, N)
    tl.store(out_ptr + permuted(column), column)


def test_both_say_the_same_order():
    out = torch.full((128,), -1, dtype=torch.int32, device=DEVICE)
    if DEVICE == "cuda" or kernels.runs_kernels(out):
        _permuted_kernel[(1,)](out, N=128)
        assert torch.equal(out, permute_columns(torch.arange(128, dtype=torch.int32, device=DEVICE)))
    x = torch.randn(3, 5, 96)
    assert torch.equal(permute_columns(permute_columns(x)), x)
    assert permute_columns(torch.arange(32))[:8].tolist() == [0, 1, 8, 9, 16, 17, 24, 25]


@pytest.mark.parametrize("fmt", [INT8, INT4], ids=str)
@pytest.mark.parametrize("M", [3, 12])
def test_linears_take_and_give_it(M, fmt):
    """Without a ring the columns of x are put back first. The numbers are the same, bit for bit."""
    x, weight, residual, gain = randn(M, 256, dtype=BF16), make(64, 256, fmt), randn(M, 64, dtype=BF16), randn(64, dtype=BF16)
    turned = permute_columns(x).contiguous()
    assert torch.equal(linear(turned, weight, residual=residual, x_permuted=True), linear(x, weight, residual=residual))
    gated = linear(x, weight, activation="silu_mul")
    assert torch.equal(linear(x, weight, activation="silu_mul", y_permuted=True), permute_columns(gated))
    both = linear(turned, weight, residual=residual, x_permuted=True, y_permuted=True)
    assert torch.equal(both, permute_columns(linear(x, weight, residual=residual)))
    y, folded = linear_folding(x, weight, residual=residual, gain=gain)
    y_turned, folded_turned = linear_folding(turned, weight, residual=residual, gain=gain, x_permuted=True)
    assert torch.equal(y_turned, y)
    assert torch.equal(folded_turned.squares, folded.squares)
    y_too, folded_too = linear_folding(x, weight, residual=residual, gain=gain, y_permuted=True)
    assert torch.equal(y, y_too)
    assert torch.equal(permute_columns(folded.scaled), folded_too.scaled)
    assert torch.equal(folded.squares, folded_too.squares)
    assert (folded.permuted, folded_too.permuted) == (False, True)
    reader = make(48, 64, INT8)
    assert torch.equal(linear(y, reader, norm=folded_too, eps=EPS), linear(y, reader, norm=folded, eps=EPS))
    draw = sampling([0.8] * M) | {"lengths": torch.ones(M, dtype=torch.int32, device=DEVICE)}
    both = [kernels.head(y, reader, norm=norm, eps=EPS, vocab_size=45, **draw) for norm in (folded, folded_too)]
    assert all(torch.equal(*pair) for pair in zip(*both, strict=True))


def test_head_takes_it_by_reference():
    """Where no kernel runs: float32."""
    x, weight = randn(3, 64, dtype=torch.float32), make(48, 64, INT8, torch.float32)
    norm = fold_norm_ref(x, randn(64, dtype=torch.float32), 64)
    turned = kernels.FoldedNorm(permute_columns(norm.scaled).contiguous(), norm.squares, True)
    given = {"eps": EPS, "vocab_size": 48, "lengths": torch.ones(3, dtype=torch.int32, device=DEVICE)}
    both = [kernels.head(x, weight, norm=n, **given) for n in (norm, turned)]
    assert all(torch.equal(*pair) for pair in zip(*both, strict=True))


def run_ptx(text, dtype, *operands):
    """What the PTX of one word (_packed.py) leaves in its operands, as 32-bit numbers, by exact arithmetic."""

    def halves(word):
        return torch.tensor([word & 0xFFFF, word >> 16]).to(torch.uint16).view(dtype).double()

    values = {f"${i}": operand for i, operand in enumerate(operands)}
    for line in re.sub(r"\.reg[^;]*;", "", text.strip("{} ")).split(";")[:-1]:
        name, target, *sources = line.replace(",", " ").split()
        a, b, c, *_ = *(values.get(s) if s in values else int(s, 0) for s in sources), None, None
        if name == "lop3.b32":
            assert sources[3] == "0xea"
            a = a & b | c
        elif name == "shr.u32":
            a >>= b
        elif name.startswith("fma.rn"):
            exact = halves(a) * halves(b) + halves(c)
            assert torch.equal(exact.to(dtype).double(), exact), "nothing is rounded"
            low, high = exact.to(dtype).view(torch.uint16).tolist()
            a = low | high << 16
        else:
            assert name == "mov.b32"
        values[target] = a
    return [halves(values[f"${i}"]) for i, operand in enumerate(operands) if operand is None]


QUARTERS = {  # what is added to 128 or 1024 and a code, less the zero; to the other codes, of a zero of 8; and the PTX
    BF16: (0xC200, 0xC000, _packed.INT4_QUARTERS_BF16, _packed.OTHER_ZEROS_BF16),
    FP16: (0xDC00, 0xCC80, _packed.INT4_QUARTERS_FP16, _packed.OTHER_ZEROS_FP16),
}


@pytest.mark.parametrize("dtype", QUARTERS, ids=str)
def test_quarters_of_codes(dtype):
    """Of all codes and zeros, wherever in a word they are, with whatever beside them."""
    first, other_eight, of_codes, of_zero = QUARTERS[dtype]
    nibbles = torch.randint(0, 16, (16, 8), generator=torch.Generator().manual_seed(0))
    for zero, more in itertools.product(range(16), range(16)):
        codes = (nibbles[zero] + more) % 16  # each will have been every code
        word, z = sum(n << 4 * i for i, n in enumerate(codes.tolist())), (first | zero) * 0x10001
        (other,) = run_ptx(of_zero.value, dtype, None, z)
        (other,) = set(other.to(dtype).view(torch.uint16).tolist())
        assert zero != 8 or other == other_eight
        found = run_ptx(of_codes.value, dtype, None, None, None, None, word, z, other * 0x10001)
        assert torch.equal(torch.stack(found, 1).flatten(), (codes.double() - zero) / 4)


@pytest.mark.usefixtures("few_programs")
@torch.no_grad()
def test_it_goes_from_kernel_to_kernel(monkeypatch):
    """A step in which every linear is given permuted columns: the same logits, bit for bit, as where none is and all norms are
    folded, the first as well."""
    config = dataclasses.replace(SHAPES["llama-3.2-1b"], tie_word_embeddings=False, **TINY)
    model = random_model(config, "int8")
    model.tile_weights(), model.setup_rope(16)
    x, asked = randn(17, config.hidden_size, dtype=BF16), []  # 17 rows: sums of squares by 64 columns either way
    norms = watch_first_norm(model, monkeypatch)

    def logits():
        session = Session(model, len(x), 16)
        session.cache.lengths.fill_(1)
        hidden, norm = model.run(x, DecodeStep(session.cache))
        return norm.permuted, candidates(model, session, hidden, slice(None), "greedy", norm)[0]

    with monkeypatch.context() as patch:
        patch.setattr("model.first_norm", lambda x, reader, step: kernels.fold_norm(x, reader.gain, permuted=False))
        in_order, expected = logits()
    monkeypatch.setattr(kernels, "reads_permuted", lambda op, x, weight: asked.append((op, weight)) or True)
    permuted, found = logits()
    assert (in_order, permuted) == (False, True)
    assert ("head", model.head) in asked
    assert asked[0] == ("qkv", model.layers[0].attention.wqkv)
    assert torch.equal(found, expected)
    assert [norm.permuted for norm in norms] == [False, True]


def watch_first_norm(model, monkeypatch):
    """A list of what the first layer is given as its norm."""
    norms, run = [], model.layers[0].run
    monkeypatch.setattr(model.layers[0], "run", lambda x, norm, *rest: norms.append(norm) or run(x, norm, *rest))
    return norms


@pytest.mark.usefixtures("few_programs")
@torch.no_grad()
def test_the_first_layers_norm(monkeypatch):
    """Folded in a step where its qkv goes through a ring, and nowhere else."""
    config = dataclasses.replace(SHAPES["llama-3.2-1b"], **TINY)
    model = random_model(config, "int8")
    model.tile_weights(), model.setup_rope(16)
    norms = watch_first_norm(model, monkeypatch)
    session = Session(model, 9, 16)
    session.cache.lengths.fill_(1)
    x, gain = randn(9, config.hidden_size, dtype=BF16), model.layers[0].attention_norm.weight

    def first(step=None, rows=9):
        model.run(x[:rows], step or DecodeStep(session.cache, rows=rows))
        return norms.pop()

    if DEVICE == "cpu":
        assert first() is gain, "on no other card"
    monkeypatch.setattr("kernels._matmul.has_wgmma", lambda x: True)
    monkeypatch.setattr("kernels._matmul._has_ring", lambda op, *_: op == "qkv")  # for who asks; no tile has one
    monkeypatch.setattr("kernels._matmul.tile_for", lambda *given: tile_for(*given[:6]))
    folded, want = first(), kernels.fold_norm(x, gain, permuted=True)
    assert folded.permuted
    assert torch.equal(folded.scaled, want.scaled)
    assert torch.equal(folded.squares, want.squares)
    assert first(rows=8) is gain, "not measured"
    assert first(PackStep.of(session.cache, [(0, 9, 0)])) is gain, "a prompt's qkv is another kernel"
    with batch_invariant():
        assert first() is gain
    monkeypatch.setattr("model.kernels.ring_serves_qkv", lambda *_: False)
    assert first() is gain, "heads of another size"


def test_what_cannot_be_permuted():
    with pytest.raises(ValueError, match="found 24 outputs, expected a multiple of 32 where columns are permuted"):
        linear(randn(2, 128, dtype=BF16), make(24, 128, INT8), y_permuted=True)


@pytest.mark.parametrize("D", [64, 128])
def test_qkv_takes_and_attention_gives_it(D):
    a = make_qkv(B=2, T=1, K=256, Hq=2, Hkv=1, D=D, lengths=[3, 9], dtype=BF16)
    a["weight"] = make(4 * D, 256, INT8)
    caches = {name: a[name].clone() for name in ("k_cache", "v_cache")}
    norm = kernels.FoldedNorm(*fold_norm_ref(a["x"], a["norm"], 64)[:2])
    q = qkv_rope_append(**a | {"norm": norm})
    turned = kernels.FoldedNorm(permute_columns(norm.scaled).contiguous(), norm.squares, True)
    assert torch.equal(qkv_rope_append(**a | caches | {"norm": turned}), q)
    assert all(torch.equal(caches[name].nan_to_num(), a[name].nan_to_num()) for name in caches)
    for lengths in ([9, 3], [24, 0]):  # one part, several, nothing to see
        arguments = (
            q.unsqueeze(1),
            *(caches[n].nan_to_num() for n in caches),
            torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        )
        out = flash_decode(*arguments, a["table"].new_tensor([[0], [1]]), scale=0.1)
        assert torch.equal(
            flash_decode(*arguments, a["table"].new_tensor([[0], [1]]), scale=0.1, permute=True), permute_columns(out)
        )
    odd = torch.zeros(1, 1, 1, 48, dtype=BF16), *(torch.zeros(1, 1, 8, 48, dtype=BF16),) * 2
    with pytest.raises(ValueError, match="found a head size of 48, expected a multiple of 32"):
        flash_decode(*odd, torch.ones(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32), scale=1.0, permute=True)


# ---------------------------------------------------------------- tiles

LINEARS = [
    ("qkv", 6144, 4096), ("linear", 4096, 14336), ("silu_mul", 28672, 4096), ("linear", 2048, 2048), ("silu_mul", 16384, 2048),
    ("linear", 3584, 18944), ("linear", 8192, 28672), ("linear", 4096, 11008), ("head", 128256, 4096), ("head", 152064, 3584),
    ("head", 32001, 2048),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fmt", "rows"), [(f, r) for f, least in RING_LEAST.items() for r in (2, 8, 9, 16, 32, 64) if r >= least]
)
@pytest.mark.parametrize(("op", "N", "K"), LINEARS)
def test_choice_and_candidates_fit(op, N, K, rows, fmt):
    chosen = choose_tile(op, fmt, rows, N, K, 132, rings=True)
    tiles = [tile for tile in candidate_tiles(op, rows, N, K, fmt) if tile.ring]
    assert chosen.ring
    assert len(tiles) >= 3
    for tile in [chosen, *tiles]:
        assert tile.rows == 16 * tile.warps
        assert N % tile.rows == 0 or op == "head"
        assert K % (tile.chunk * tile.split) == 0
        assert K // (tile.chunk * tile.split) > 2, "a ring of one stage would wait for itself"
        assert packed_ring_bytes(tile, fmt, rows) <= SHARED_BYTES
        assert tile.split == 1 or op not in ("silu_mul", "head")
        assert op != "head" or (tile.rows, tile.registers) == (128, 128)


def test_who_reads_permuted_columns(monkeypatch):
    """By rows, format, card and shape; never where results shall not depend on the batch."""
    x = torch.empty(16, 4096, dtype=BF16)
    weight = Weight(4096, 4096, packed=FP8, device="meta")
    weight.tiled = True
    assert not kernels.reads_permuted("linear", x, weight), "not on a Hopper card"
    monkeypatch.setattr("kernels._matmul.has_wgmma", lambda x: True)
    monkeypatch.setattr("kernels._matmul.num_sms", lambda device: 132)
    assert kernels.reads_permuted("linear", x, weight)
    assert kernels.reads_permuted("qkv", x[:9], weight)
    head = Weight(128256, 4096, packed=INT8, device="meta")
    head.tiled = True
    assert kernels.reads_permuted("head", x, head)
    for tile, expected in ((packed_ring_tile(128, 64, 4, registers=128), True), (Tile(64, 256, 4, preload=4, dot=True), False)):
        with override_tiles({"head": tile}):
            assert kernels.reads_permuted("head", x, head) == expected
    assert not choose_tile("head", "int8", 16, 4097 * 128, 4096, 132, rings=True).ring, "more programs than candidates"
    assert not choose_tile("linear", "int4", 8, 4096, 14336, 132, rings=True).ring, "16 rows have one"
    for op, rows in itertools.product(("linear", "head"), (x[:1], torch.empty(65, 4096, dtype=BF16), x.float())):
        assert not kernels.reads_permuted(op, rows, weight), (op, rows.shape)
    with batch_invariant():
        assert not kernels.reads_permuted("linear", x, weight)
        assert not kernels.reads_permuted("head", x, head)
        assert not tile_for("linear", "fp8", 16, 4096, 4096, 132, rings=True).ring
    for other in (
        Weight(4096, 4096, device="meta"),
        Weight(4096, 4096, packed=PackedFormat("int4", 64, True, BF16), device="meta"),
    ):
        other.tiled = True
        assert not kernels.reads_permuted("linear", x, other), "plain; groups that are no unit"


def test_a_ring_is_not_for_columns_in_order():
    """Nor for other cards: an override is for those that can have it."""
    x, weight = randn(3, 256, dtype=BF16), make(64, 256, INT8)
    expected = linear(x, weight)
    with override_tiles({"linear": packed_ring_tile(64, 128, 2)}):
        assert torch.equal(linear(x, weight), expected)


# ---------------------------------------------------------------- the rings

TILES = {
    "int8": [packed_ring_tile(*t) for t in ((64, 64, 4), (128, 128, 3, 2), (64, 128, 9, 4), (128, 64, 2))],
    "int4": [packed_ring_tile(*t) for t in ((64, 128, 4), (128, 256, 3, 2), (64, 256, 5, 4), (128, 128, 2))],
}
TILES["fp8"] = TILES["int8"]
RINGS = [(fmt, tile) for fmt in (INT8, FP8, INT4, ZEROS) for tile in TILES[fmt.format]]
ROWS = (2, 8, 9, 16, 21, 40, 64)


def poisoned(t: torch.Tensor) -> torch.Tensor:
    """t with rows of NaN before and behind it in memory (of fp8's NaN, where t is codes)."""
    fill = float("nan") if t.is_floating_point() else 0x7F7F7F7F >> 8 * (4 - t.element_size())
    around = torch.full((len(t) + 200, *t.shape[1:]), fill, dtype=t.dtype, device=t.device)
    around[4 : len(t) + 4] = t
    return around[4 : len(t) + 4]


@on_hopper
@pytest.mark.parametrize(("fmt", "tile"), RINGS, ids=str)
def test_rings(fmt, tile):
    """Against float64, with and without a FoldedNorm; what is folded next; the same bits every time."""
    K = tile.chunk * tile.split * max(4, tile.stages + 1)
    least = RING_LEAST[fmt.format]  # below, sums of squares are by blocks of 16
    for M, dtype in itertools.product([m for m in ROWS if m >= least], (BF16, FP16)):
        x, weight = randn(M, K, dtype=dtype), make(256, K, fmt, dtype)
        gain, residual = randn(256, dtype=dtype), randn(M, 256, dtype=dtype, scale=3)
        with override_tiles({"linear": tile}):
            given = {"residual": residual, "gain": gain, "x_permuted": True, "y_permuted": True}
            runs = [linear_folding(poisoned(permute_columns(x)), weight, **given) for _ in range(4)]
            y, folded = runs[0]
            assert torch.equal(y, linear(permute_columns(x).contiguous(), weight, residual=residual, x_permuted=True))
        for again, folded_again in runs[1:]:
            assert torch.equal(again, y)
            assert torch.equal(folded_again.scaled, folded.scaled)
            assert torch.equal(folded_again.squares, folded.squares)
        rest = (None, None, 0.0, "none")
        exact = linear_ref(x.double(), exact_weight(weight), *rest, residual.double())
        assert_within(y, linear_ref(x, weight.dequantized(), *rest, residual), exact)
        product, scaled = y.double() * gain.double() * x_scale(dtype), permute_columns(folded.scaled).double()
        assert ((scaled - product).abs() <= unit_roundoff(dtype) * product.abs() + 2.0**-24).all()
        torch.testing.assert_close(
            folded.squares.double(), y.double().square().unflatten(1, (-1, 64)).sum(-1), rtol=1e-5, atol=0
        )


@on_hopper
@pytest.mark.parametrize(("fmt", "tile"), [r for r in RINGS if r[1].rows == 128], ids=str)
def test_gated_rings(fmt, tile):
    K = tile.chunk * tile.split * max(4, tile.stages + 1)
    for M, dtype, permute in itertools.product(ROWS, (BF16, FP16), (False, True)):
        weight, x = make(256, K, fmt, dtype), randn(M, K, dtype=dtype)
        folded = fold_norm_ref(x, randn(K, dtype=dtype), 64)
        norm = kernels.FoldedNorm(poisoned(permute_columns(folded.scaled)), folded.squares, True)
        with override_tiles({"silu_mul": tile}):
            y = linear(torch.full_like(x, torch.nan), weight, norm=norm, eps=EPS, activation="silu_mul", y_permuted=permute)
            residual = randn(M, 128, dtype=dtype)
            summed = linear(x, weight, norm=norm, eps=EPS, activation="silu_mul", residual=residual)
        rest = (None, None, EPS, "silu_mul", None)
        exact = linear_ref(exact_x(folded), exact_weight(weight), *rest, folded.squares.double())
        working = linear_ref(folded.scaled, weight.dequantized(), *rest, folded.squares)
        assert_within(summed, working + residual, exact + residual.double())
        assert_within(permute_columns(y) if permute else y, working, exact)


@on_hopper
@pytest.mark.parametrize(("D", "qk_norm", "bias"), [(64, False, True), (128, True, False), (128, False, True)])
@pytest.mark.parametrize(
    ("fmt", "tile"), [(FP8, packed_ring_tile(128, 128, 3, 2)), (ZEROS, packed_ring_tile(128, 256, 3))], ids=str
)
@pytest.mark.parametrize("cache", [BF16, torch.float8_e4m3fn], ids=str)
def test_qkv_rings(fmt, tile, D, qk_norm, bias, cache):
    lengths = [7, 0, 3, 24, 1, 9, 2, 16, 5, 11, 23]
    K = 2048
    a = make_qkv(B=11, T=2, K=K, Hq=4, Hkv=2, D=D, lengths=lengths, dtype=BF16, qk_norm=qk_norm, cache=cache)
    weight = make(8 * D, K, fmt, bias=bias)
    folded = fold_norm_ref(a.pop("x"), a.pop("norm"), 64)
    caches = {name: a.pop(name) for name in ("k_cache", "v_cache")}
    mine = {name: t.clone() for name, t in caches.items()}
    a.pop("weight")
    norm = kernels.FoldedNorm(poisoned(permute_columns(folded.scaled)), folded.squares, True)
    with override_tiles({"qkv": tile}):
        q = qkv_rope_append(torch.full_like(folded.scaled, torch.nan), weight, norm=norm, **a, **mine)
    results = []
    for dense, convert in ((weight.dequantized(), lambda t: t), (exact_weight(weight), wide)):
        call = {k: convert(v) if torch.is_tensor(v) else v for k, v in a.items()}
        stored = {name: (t.clone() if cache == BF16 or convert is not wide else t.double()) for name, t in caches.items()}
        exact_q = qkv_rope_append_ref(
            convert(folded.scaled), dense, convert(weight.bias), None, squares=convert(folded.squares), **call, **stored
        )
        results.append((exact_q, *stored.values()))
    for actual, working, exact in zip((q, *mine.values()), *results, strict=True):
        exact, working = exact.double(), working.double()
        written = exact.isfinite()
        assert torch.equal(actual.double().isfinite(), written)
        if actual.dtype == torch.float8_e4m3fn:
            torch.testing.assert_close(actual.double()[written], exact[written], rtol=2.0**-3, atol=2.0**-6)
        else:
            assert_within(actual[written], working[written], exact[written])


@on_hopper
@pytest.mark.parametrize("fmt", [INT8, FP8, INT4, ZEROS], ids=str)
def test_every_code(fmt):
    """A single 1 in x brings out one column of the weight, bit for bit: no row or column is in another's place."""
    generator, (N, K) = torch.Generator().manual_seed(0), (128, 512)
    if fmt.format == "int4":
        codes = torch.randint(0, 16, (N, K), generator=generator).to(torch.uint8)
    else:
        codes = torch.arange(N * K).view(N, K).to(torch.uint8)
        for bad in (128,) if fmt == INT8 else (127, 255):
            codes[codes == bad] = 0
        codes = codes.view(torch.int8 if fmt == INT8 else torch.float8_e4m3fn)
    scale = torch.rand(N, fmt.num_groups(K), generator=generator).add(0.5).to(fmt.scale_dtype)
    zero = None if fmt.symmetric else torch.randint(0, 16, scale.shape, generator=generator).to(torch.uint8)
    weight = Weight(N, K, dtype=FP16).quantized(fmt, codes, scale, zero).to(DEVICE)
    expected = weight.dequantized()
    weight.tile()
    unit = 128 if fmt.format == "int4" else 64
    for rows, x in itertools.product((64, 128), torch.eye(K, dtype=FP16, device=DEVICE).chunk(8)):
        with override_tiles({"linear": packed_ring_tile(rows, unit, 2)}):
            assert torch.equal(linear(permute_columns(x).contiguous(), weight, x_permuted=True), x @ expected.T)


# ---------------------------------------------------------------- the head's

HEAD_TILES = {
    "int8": [packed_ring_tile(*t, registers=128) for t in ((128, 128, 5), (128, 64, 3))],
    "int4": [packed_ring_tile(*t, registers=128) for t in ((128, 256, 4), (128, 128, 3))],
}
HEAD_TILES["fp8"] = HEAD_TILES["int8"]
HEAD_RINGS = [(fmt, tile) for fmt in (INT8, FP8, INT4, ZEROS) for tile in HEAD_TILES[fmt.format]]
HEADS = [  # M, T, K, V, vocab_size: every padding, one token a sequence and several, vocabularies that end anywhere in a tile
    (2, 1, 2048, 1024, 1024), (8, 2, 1024, 2044, 2040), (9, 3, 2048, 1999, 1990), (16, 1, 4096, 2056, 2049),
    (21, 1, 1024, 131, 130), (32, 4, 1024, 127, 127), (40, 8, 1536, 2111, 2111), (64, 1, 2048, 2047, 2000),
]  # fmt: skip


@pytest.fixture
def rings_run(monkeypatch):
    """Counts the launches of the head's ring."""
    module, calls = sys.modules["kernels.head"], []
    launch = module.launch_packed_ring_head
    monkeypatch.setattr(module, "launch_packed_ring_head", lambda *arguments: calls.append(1) or launch(*arguments))
    return calls


def permuted_norm(x, gain):
    """(a FoldedNorm with its columns in order, the same with them permuted)."""
    folded = fold_norm_ref(x, gain, 64)
    return folded, kernels.FoldedNorm(poisoned(permute_columns(folded.scaled)), folded.squares, True)


def draws(M, T, temperature):
    """lengths, and what a head that draws is given."""
    lengths = torch.arange(T, T + M // T, dtype=torch.int32, device=DEVICE)
    t = [[0.0, 0.7, 1.3][i % 3] if temperature == "mixed" else temperature for i in range(M // T)]
    return {"lengths": lengths} | ({} if temperature is None else sampling(t))


@on_hopper
@pytest.mark.parametrize("temperature", [None, 0.0, 0.8, "mixed"])
@pytest.mark.parametrize(("fmt", "tile"), HEAD_RINGS, ids=str)
def test_head_rings(fmt, tile, temperature, rings_run):
    """Logits against float64, candidates against those logits; the same bits every time; NaN around all that is read."""
    for M, T, K, V, vocab_size in HEADS:
        dtype = FP16 if M in (9, 40) else BF16
        x, weight = randn(M, K, dtype=dtype), make(V, K, fmt, dtype)
        folded, norm = permuted_norm(x, randn(K, dtype=dtype))
        given = draws(M, T, temperature)
        rest = (None, EPS, vocab_size, None, None, None, given["lengths"])
        exact = head_ref(exact_x(folded), exact_weight(weight), *rest, folded.squares.double())[0]
        working = head_ref(folded.scaled, weight.dequantized(), *rest, folded.squares)[0]
        for name in ("weight", "scale", "zero"):
            tensor = getattr(weight, name)
            setattr(weight, name, None if tensor is None else poisoned(tensor))
        rings_run.clear()
        with override_tiles({"head": tile}):
            runs = [
                kernels.head(torch.full_like(x, torch.nan), weight, norm=norm, eps=EPS, vocab_size=vocab_size, **given)
                for _ in range(3)
            ]
        assert len(rings_run) == 3
        logits, values, ids = runs[0]
        assert (logits[:, vocab_size:] == -torch.inf).all()
        assert_within(logits[:, :vocab_size], working[:, :vocab_size], exact[:, :vocab_size].double())
        check_candidates(logits, values, ids, **given)
        assert not values.isnan().any(), "every slot is written"
        for again in runs[1:]:
            assert all(torch.equal(*pair) for pair in zip(again, runs[0], strict=True))


@on_hopper
@pytest.mark.parametrize("temperature", [None, 1.0, "mixed"])
@pytest.mark.parametrize("fmt", [INT8, FP8, INT4], ids=str)
def test_rings_choose_as_tiles_do(fmt, temperature, rings_run):
    """Integers, whose sums are exact and often equal: the logits and candidates of the other kernel, in the same slots."""
    K, V, generator = 1024, 5000, torch.Generator().manual_seed(0)
    values = torch.randint(-1, 2, (V, K), generator=generator)
    codes = {"int8": values.to(torch.int8), "fp8": values.float().to(torch.float8_e4m3fn), "int4": (values + 8).to(torch.uint8)}
    scale = torch.ones(V, fmt.num_groups(K), dtype=fmt.scale_dtype)
    weight = Weight(V, K).quantized(fmt, codes[fmt.format], scale).to(DEVICE)
    weight.tile()
    tile = HEAD_TILES[fmt.format][0]
    for M, T in ((3, 1), (12, 3), (16, 1), (33, 1), (64, 4)):
        x = torch.randint(-1, 2, (M, K), generator=generator).to(BF16).to(DEVICE)
        _, norm = permuted_norm(x, torch.ones(K, dtype=BF16, device=DEVICE))
        given, results = draws(M, T, temperature), []
        for chosen in (tile, packed_tile(fmt.format, 128, 1, 4, 1, K)):
            with override_tiles({"head": chosen}):
                results.append(kernels.head(x, weight, norm=norm, eps=EPS, vocab_size=V - 3, **given))
        (logits, best, ids), (other_logits, other_best, other_ids) = results
        torch.testing.assert_close(logits, other_logits, rtol=1e-6, atol=0)
        torch.testing.assert_close(best, other_best, rtol=1e-5, atol=1e-5)
        assert torch.equal(best == -torch.inf, other_best == -torch.inf), "the same slots"
        assert torch.equal(ids, other_ids)
    assert len(rings_run) == 5


@on_hopper
def test_head_rings_write_their_own():
    """No more logits or candidates than there are rows of x and of the vocabulary."""
    for M, V in ((9, 1999), (16, 1024), (40, 131)):
        x, weight = randn(M, 1024, dtype=BF16), make(V, 1024, FP8)
        _, norm = permuted_norm(x, randn(1024, dtype=BF16))
        lengths = torch.ones(M, dtype=torch.int32, device=DEVICE)
        logits, best = (torch.full((M + 64, n), 7.0, device=DEVICE) for n in (V, PARTIALS))
        ids = torch.full((M + 64, PARTIALS), 7, dtype=torch.int32, device=DEVICE)
        launch_packed_ring_head(
            norm.scaled, Operand.of(weight), norm.squares, EPS, V, None, None, None, lengths,
            logits[32 : M + 32], best[32 : M + 32], ids[32 : M + 32], HEAD_TILES["fp8"][0],
        )  # fmt: skip
        for t in (logits, best, ids):
            assert (t[:32] == 7).all()
            assert (t[M + 32 :] == 7).all()
        assert (best[32 : M + 32] != 7).all()
        assert torch.equal(ids[32 : M + 32].gather(1, best[32 : M + 32].argmax(1, True))[:, 0], logits[32 : M + 32].argmax(1))


@on_hopper
@pytest.mark.parametrize("temperature", [None, 1.0])
def test_nan_reaches_the_candidates(temperature):
    x, weight = randn(9, 1024, dtype=BF16), make(160, 1024, INT8)
    weight.scale[77] = torch.nan
    _, norm = permuted_norm(x, randn(1024, dtype=BF16))
    with override_tiles({"head": HEAD_TILES["int8"][0]}):
        logits, values, _ = kernels.head(x, weight, norm=norm, eps=EPS, vocab_size=160, **draws(9, 1, temperature))
    assert logits[:, 77].isnan().all()
    assert (values.max(1).values == torch.inf).all()
