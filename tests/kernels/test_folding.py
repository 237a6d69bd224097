"""A norm folded into the linear before it: what that linear leaves, what its readers make of it, and models through both."""

import dataclasses
import itertools

import pytest
import torch
from test_head import sampling
from test_linear import DEVICE, EPS, make_qkv, make_weight, randn, wide
from test_packed import FP8, INT4, INT8, exact_weight, make
from tolerance import assert_within, unit_roundoff

import kernels
import quantize
from decoding import Session, candidates
from generate import fill_randomly
from kernels._matmul import FoldedNorm, apply_norm_ref, fold_norm_ref, rms_norm_ref, x_scale
from kernels.formats import PackedFormat, Weight
from kernels.head import head, head_ref
from kernels.linear import linear, linear_folding, linear_ref, qkv_rope_append, qkv_rope_append_ref
from kernels.tiles import (
    MEASURED,
    Tile,
    candidate_tiles,
    choose_tile,
    fold_block,
    folds_norm,
    invariant_tile,
    override_tiles,
)
from model import SHAPES, DecodeStep, PrefillStep, Scale, Transformer

BF16, FP16 = torch.bfloat16, torch.float16
SMALL_INT4 = PackedFormat("int4", 32, False, BF16)
TINY = {"num_layers": 2, "hidden_size": 128, "intermediate_size": 128, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 96}


def any_weight(N, K, fmt, dtype, bias=False):
    return make(N, K, fmt, dtype, bias) if fmt else make_weight(N, K, dtype, bias)


def exact_of(weight):
    return exact_weight(weight) if weight.packed else weight.weight.double()


def folded_randn(M, K, block, dtype):
    """(x, gain, the FoldedNorm that a linear would leave of x)."""
    x, gain = randn(M, K, dtype=dtype, scale=3), randn(K, dtype=dtype)
    return x, gain, fold_norm_ref(x, gain, block)


def exact_x(folded):
    """The scaled x in float64, whose scale is 1."""
    return folded.scaled.double() / x_scale(folded.scaled.dtype)


# ---------------------------------------------------------------- the linear that folds


def check_folding(M, N, K, fmt=None, dtype=BF16, bias=False, tile=None):
    weight, x = any_weight(N, K, fmt, dtype, bias), randn(M, K, dtype=dtype)
    residual, gain = randn(M, N, dtype=dtype, scale=3), randn(N, dtype=dtype)
    with override_tiles({"linear": tile} if tile else {}):
        y, folded = linear_folding(x, weight, residual=residual, gain=gain)
        assert torch.equal(y, linear(x, weight, residual=residual)), "the sum itself is not changed"
    product = y.double() * gain.double() * x_scale(dtype)
    assert folded.scaled.dtype == dtype
    assert ((folded.scaled.double() - product).abs() <= unit_roundoff(dtype) * product.abs() + 2.0**-24).all()
    block = fold_block(M, fmt)
    exact = fold_norm_ref(y.double(), gain.double(), block).squares.double()
    assert folded.squares.shape == exact.shape
    torch.testing.assert_close(folded.squares.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("fmt", [None, INT8, FP8, SMALL_INT4], ids=str)
@pytest.mark.parametrize("M", [3, 16, 64])
def test_folding(M, fmt, dtype):
    """Features that are no multiple of a tile, nor of a block."""
    check_folding(M, 72 if M < 64 else 200, 192 if fmt != SMALL_INT4 else 128, fmt, dtype, bias=M == 3)


@pytest.mark.parametrize("fmt", [INT8, FP8, INT4, SMALL_INT4], ids=str)
def test_one_row_of_packed_weights(fmt):
    check_folding(1, 73, 256, fmt)


TILES = [
    (None, Tile(64, 64, 4, preload=1, dot=True, split=3, stages=2)),
    (None, Tile(128, 32, 8, preload=2, dot=True)),
    (INT8, Tile(32, 128, 4, preload=1, dot=True, split=2)),
    (INT8, Tile(64, 64, 4, preload=3, dot=True)),
]


@pytest.mark.parametrize(("fmt", "tile"), TILES, ids=str)
def test_tiles(fmt, tile):
    """A program alone, and the last of those that split K; one block a tile, and several."""
    check_folding(5, 136, 192, fmt, tile=tile)


def test_a_tile_of_part_of_a_block_is_refused():
    with pytest.raises(ValueError, match=r"Tile\.rows: found 32, expected a multiple of 64"):
        check_folding(5, 128, 64, tile=Tile(32, 64, 4, dot=True))


# ---------------------------------------------------------------- the operators that read


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("fmt", [None, INT8, SMALL_INT4], ids=str)
@pytest.mark.parametrize(("M", "activation"), [(1, "silu_mul"), (5, "none"), (16, "silu_mul"), (40, "none")])
def test_linear_reads(M, activation, fmt, dtype):
    """Against float64 from the same scaled x and squares. Plain weights go by FMA at one row: nobody folds for it, but may."""
    weight = any_weight(48, 384, fmt, dtype, bias=True)
    x, gain, folded = folded_randn(M, 384, 16, dtype)
    y = linear(torch.full_like(x, torch.nan), weight, norm=folded, eps=EPS, activation=activation)
    rest = (None, EPS, activation, None)
    exact = linear_ref(exact_x(folded), exact_of(weight), wide(weight.bias), *rest, wide(folded.squares))
    working = linear_ref(folded.scaled, weight.dequantized(), weight.bias, *rest, folded.squares)
    assert_within(y, working, exact)
    whole = linear_ref(wide(x), exact_of(weight), wide(weight.bias), wide(gain), EPS, activation)
    torch.testing.assert_close(exact, whole, rtol=0.05, atol=0.05 * whole.abs().max().item())


def test_split_and_pipelined_tiles_read():
    for tile in (Tile(32, 64, 4, preload=1, dot=True, split=3, stages=2), Tile(16, 32, 4, preload=1, dot=True, stages=3)):
        weight, (_, _, folded) = make_weight(80, 448, BF16), folded_randn(6, 448, 64, BF16)
        with override_tiles({"linear": tile}):
            y = linear(folded.scaled, weight, norm=folded, eps=EPS)
        exact = linear_ref(exact_x(folded), wide(weight.weight), eps=EPS, squares=wide(folded.squares))
        assert_within(y, linear_ref(folded.scaled, weight.weight, eps=EPS, squares=folded.squares), exact)


@pytest.mark.parametrize(
    ("fmt", "shape"),
    [
        (None, {"B": 3, "T": 1, "K": 192, "Hq": 3, "Hkv": 1, "D": 32, "lengths": [0, 3, 9], "qk_norm": True, "bias": True}),
        (None, {"B": 2, "T": 11, "K": 64, "Hq": 2, "Hkv": 2, "D": 48, "lengths": [9, 24]}),
        (INT8, {"B": 1, "T": 1, "K": 256, "Hq": 4, "Hkv": 2, "D": 32, "lengths": [7], "qk_norm": True}),
        (SMALL_INT4, {"B": 2, "T": 3, "K": 256, "Hq": 4, "Hkv": 2, "D": 32, "lengths": [2, 9], "bias": True}),
    ],
    ids=lambda v: f"{v['B']}x{v['T']}" if isinstance(v, dict) else str(v),
)
def test_qkv_reads(fmt, shape):
    a = make_qkv(**shape, dtype=FP16)
    K, N = shape["K"], a["weight"].out_features
    a["weight"] = any_weight(N, K, fmt, FP16, shape.get("bias", False))
    _, _, folded = folded_randn(shape["B"] * shape["T"], K, 16, FP16)
    results = []
    for convert, x, matrix in (
        (lambda t: t, folded.scaled, a["weight"].dequantized()),
        (wide, exact_x(folded), exact_of(a["weight"])),
    ):
        b = {k: convert(v) if torch.is_tensor(v) else v for k, v in a.items() if k not in ("weight", "norm", "x")}
        b["k_cache"], b["v_cache"] = b["k_cache"].clone(), b["v_cache"].clone()
        q = qkv_rope_append_ref(x, matrix, convert(a["weight"].bias), None, squares=convert(folded.squares), **b)
        results.append((q, b["k_cache"], b["v_cache"]))
    q = qkv_rope_append(**a | {"x": torch.full_like(folded.scaled, torch.nan), "norm": folded})
    for actual, working, exact in zip((q, a["k_cache"], a["v_cache"]), *results, strict=True):
        written = exact.isfinite()
        assert torch.equal(actual.isfinite(), written)
        assert_within(actual[written], working[written], exact[written])


@pytest.mark.parametrize("fmt", [None, INT8], ids=str)
@pytest.mark.parametrize("M", [1, 3, 20])
def test_head_reads(M, fmt):
    weight, (x, _, folded) = any_weight(96, 192, fmt, FP16), folded_randn(M, 192, 64, FP16)
    lengths, draw = torch.ones(M, dtype=torch.int32, device=DEVICE), sampling([0.0] * M)
    logits, *_ = head(torch.full_like(x, torch.nan), weight, norm=folded, eps=EPS, vocab_size=90, lengths=lengths, **draw)
    rest = (None, EPS, 90, None, None, None, lengths)
    exact = head_ref(exact_x(folded), exact_of(weight), *rest, wide(folded.squares))[0]
    working = head_ref(folded.scaled, weight.dequantized(), *rest, folded.squares)[0]
    assert_within(logits[:, :90], working[:, :90], exact[:, :90].double())


def test_float16_does_not_overflow():
    """y * gain exceeds float16 where its RMSNorm does not."""
    weight, residual = make_weight(64, 64, FP16), randn(8, 64, dtype=FP16, scale=3e3)
    gain, reader = randn(64, dtype=FP16, scale=30), make_weight(32, 64, FP16)
    y, folded = linear_folding(randn(8, 64, dtype=FP16), weight, residual=residual, gain=gain)
    z = linear(y, reader, norm=folded, eps=EPS)
    arguments = (y, reader.weight, None, gain)
    assert_within(z, linear_ref(*arguments, EPS), linear_ref(*map(wide, arguments), EPS))


def test_float32_takes_the_reference():
    weight, x, gain = make_weight(72, 64, torch.float32), randn(3, 64, dtype=torch.float32), randn(72, dtype=torch.float32)
    residual = randn(3, 72, dtype=torch.float32)
    y, folded = linear_folding(x, weight, residual=residual, gain=gain)
    assert torch.equal(y, linear_ref(x, weight.weight, residual=residual))
    h = apply_norm_ref(folded.scaled, None, folded.squares, EPS)
    torch.testing.assert_close(h, rms_norm_ref(y, gain, EPS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gain": torch.ones(32)}, r"gain: found torch.float32 \[32\], expected torch.float32 \[64\]"),
        ({"residual": torch.ones(1, 32)}, r"residual: found torch.float32 \[1, 32\]"),
    ],
)
def test_linear_folding_refuses(change, message):
    arguments = {"residual": torch.ones(1, 64), "gain": torch.ones(64), **change}
    with pytest.raises(ValueError, match=message):
        linear_folding(torch.ones(1, 64), make_weight(64, 64, torch.float32).cpu(), **arguments)


@pytest.mark.parametrize(
    "squares", [torch.ones(2, 1), torch.ones(1, 1).double(), torch.ones(1)], ids=lambda t: str(list(t.shape))
)
def test_readers_refuse(squares):
    x, weight = torch.ones(1, 64), make_weight(64, 64, torch.float32).cpu()
    with pytest.raises(ValueError, match=r"squares: found .*, expected float32 \[1, P\] and no norm"):
        linear(x, weight, norm=FoldedNorm(x, squares), eps=EPS)


@pytest.mark.parametrize("fmt", [None, INT4], ids=str)
def test_rows_are_independent_of_the_batch(fmt):
    """With batch_invariant, from one linear's inputs to the next one's outputs, a row is bitwise the same in every batch."""
    first, second = any_weight(192, 128, fmt, FP16), any_weight(48, 192 if fmt is None else 256, fmt, FP16)
    if fmt:
        first = any_weight(256, 128, fmt, FP16)
    N = first.out_features
    x, residual, gain = randn(40, 128, dtype=FP16), randn(40, N, dtype=FP16), randn(N, dtype=FP16)

    def both(rows):
        y, folded = linear_folding(x[rows], first, residual=residual[rows], gain=gain)
        return y, folded.scaled, folded.squares, linear(y, second, norm=folded, eps=EPS)

    with kernels.batch_invariant():
        together = both(slice(None))
        for rows in (slice(0, 1), slice(3, 8), slice(7, 40)):
            for part, whole in zip(both(rows), together, strict=True):
                assert torch.equal(part, whole[rows])


# ---------------------------------------------------------------- where it is done


def test_every_tile_computes_whole_blocks():
    """As the rule, the table and a tuner choose: where a norm is folded, tiles of `linear` compute whole blocks."""
    assert not folds_norm(None, "int8")
    assert not folds_norm("int8", None)
    shapes = [(2048, 2048), (4096, 14336), (8192, 28672), (3584, 18944), (72, 192)]
    for fmt, rows, (N, K) in itertools.product(("int8", "int4"), (1, 2, 3, 16, 17, 64), shapes):
        assert folds_norm(fmt, fmt)
        chosen = choose_tile("linear", fmt, rows, N, K, 132)
        for tile in (chosen, *candidate_tiles("linear", rows, N, K, fmt)):
            assert tile.rows % fold_block(rows, fmt) == 0, (tile, fmt, rows, N, K)
        with kernels.batch_invariant():
            assert invariant_tile("linear", fmt, N, K, 132).rows % fold_block(rows, fmt) == 0
    for (_, fmt, rows, op, *_), tile in MEASURED.items():
        assert fmt == "bf16" or op != "linear" or tile.rows % fold_block(rows, fmt) == 0


def random_model(config, mode):
    model = Transformer(quantize.make_recipe(mode, config).config(config) if mode else config, device=DEVICE)
    fill_randomly(model)
    return model


@pytest.mark.parametrize(
    ("mode", "layers", "rows", "plain_head", "folds"),
    [
        (None, 3, 5, True, 0),
        ("int8", 3, 5, False, 6),
        ("int8", 1, 1, True, 1),  # the head goes by FMA, and takes the gain
        ("int4", 1, 1, False, 2),
    ],
)
@pytest.mark.usefixtures("few_programs")
@torch.no_grad()
def test_a_step(mode, layers, rows, plain_head, folds, monkeypatch):
    """Logits of a decode step err no more than they do where no norm is folded."""
    config = dataclasses.replace(SHAPES["llama-3.2-1b"], tie_word_embeddings=False, **TINY | {"num_layers": layers})
    model = random_model(config, mode)
    if plain_head:
        model.output = make_weight(config.vocab_size, config.hidden_size, BF16)
    exact = Transformer(config, device=DEVICE, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, Weight):
            exact.get_submodule(name).weight.copy_(module.dequantized())
        elif isinstance(module, Scale):
            module.weight.copy_(randn(*module.weight.shape, dtype=BF16))
            exact.get_submodule(name).weight.copy_(module.weight)
    model.tile_weights()
    model.setup_rope(16), exact.setup_rope(16)
    calls = []
    monkeypatch.setattr(kernels, "linear_folding", lambda *a, **k: calls.append(a) or linear_folding(*a, **k))
    x = randn(rows, config.hidden_size, dtype=BF16)

    def logits():
        session = Session(model, rows, 16)
        session.cache.lengths.fill_(1)
        hidden, norm = model.run(x, DecodeStep(session.cache))
        return candidates(model, session, hidden, slice(None), "greedy", norm)[0]

    found = logits()
    assert len(calls) == folds
    monkeypatch.setattr(kernels, "folds_norm", lambda *a: False)
    unfolded = logits()
    assert len(calls) == folds
    alone = [exact.logits(exact(x[i : i + 1].float(), PrefillStep(1))) for i in range(rows)]
    assert_within(found, unfolded, torch.cat(alone).double())


@pytest.mark.usefixtures("few_programs")
def test_a_shortened_model(monkeypatch):
    """The last layer that there is folds the final norm, whichever it is."""
    config = dataclasses.replace(SHAPES["llama-3.2-1b"], tie_word_embeddings=False, **TINY)
    model = random_model(config, "int8")
    model.tile_weights(), model.setup_rope(16)
    del model.layers[1:]
    session = Session(model, 1, 16)
    session.cache.lengths.fill_(1)
    x, norm = model.run(session.x + 1, DecodeStep(session.cache))
    assert torch.equal(model(session.x + 1, DecodeStep(session.cache)), x)
    want = fold_norm_ref(x, model.norm.weight, 16)
    assert_within(norm.scaled, want.scaled, x.double() * model.norm.weight.double())
    torch.testing.assert_close(norm.squares, want.squares)
