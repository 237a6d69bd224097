"""rms_norm, fold_norm, silu_mul and rope_append against float64, and what they leave alone."""

import pytest
import torch
from tolerance import assert_within, unit_roundoff

import kernels.rows
from kernels import fold_norm, rms_norm, rope_append, silu_mul
from kernels._common import permute_columns
from kernels._matmul import fold_norm_ref, rms_norm_ref, x_scale
from kernels.rows import rope_append_ref, silu_mul_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*size, dtype=torch.bfloat16):
    return torch.randn(*size, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(3, 192), (1, 2048), (2, 5, 64), (0, 64)], ids=str)
def test_rms_norm(shape, dtype):
    x, weight = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype)
    if x.numel():
        x.view(-1, shape[-1])[-1] *= 1e-4  # where eps counts
        exact = rms_norm_ref(x.double(), weight.double(), 1e-5)
        assert_within(rms_norm(x, weight, 1e-5), rms_norm_ref(x, weight, 1e-5), exact)
    assert rms_norm(x, weight, 1e-5).shape == x.shape
    torch.library.opcheck(torch.ops.rooflama.rms_norm, (x, weight, 1e-5))


def poisoned(t):
    """t with NaN before and behind it in memory."""
    around = torch.full((t.numel() + 4096,), torch.nan, dtype=t.dtype, device=t.device)
    around[2048 : t.numel() + 2048] = t.flatten()
    return around[2048 : t.numel() + 2048].view(t.shape)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("M", "K"), [(1, 64), (2, 128), (3, 96), (5, 1056), (17, 3584), (33, 160), (64, 2048), (2, 16384), (4, 3000), (0, 64)]
)
def test_fold_norm(M, K, dtype, permuted):
    """One rounding, of gains that float16 would lose as of others; a row's bits are its own."""
    if permuted and K % 32:
        pytest.skip("no such order of columns")
    x, gain = randn(M, K, dtype=dtype) * 3, randn(K, dtype=dtype)
    gain[::5] *= 2.0**-13
    x, gain = poisoned(x), poisoned(gain)
    folded = fold_norm(x, gain, permuted)
    assert folded.permuted == permuted
    scaled, product = permute_columns(folded.scaled) if permuted else folded.scaled, x.double() * gain.double() * x_scale(dtype)
    assert ((scaled.double() - product).abs() <= unit_roundoff(dtype) * product.abs() + 2.0**-25).all()
    if DEVICE == "cuda" or dtype != torch.bfloat16:  # which the interpreter cuts off
        assert torch.equal(scaled, fold_norm_ref(x, gain, 64).scaled)
    exact = fold_norm_ref(x.double(), gain.double(), 64).squares.double()
    assert folded.squares.shape == exact.shape == (M, -(-K // 64))
    torch.testing.assert_close(folded.squares.double(), exact, rtol=1e-5, atol=0)
    for i in range(min(M, 2)):
        alone = fold_norm(x[i : i + 1], gain, permuted)
        assert torch.equal(alone.scaled[0], folded.scaled[i])
        assert torch.equal(alone.squares[0], folded.squares[i])
    torch.library.opcheck(torch.ops.rooflama.fold_norm, (x, gain, permuted))


def test_fold_norm_writes_its_own(monkeypatch):
    """Neither behind its last column nor behind its last row."""
    given = []

    def outputs(x, gain, permuted):
        (N, K), blocks = x.shape, -(-x.shape[1] // 64)
        given.append((torch.full((N + 2, K), 7.0).to(x), torch.full((N + 2, blocks), 7.0, device=x.device)))
        return kernels.FoldedNorm(*(t[1 : N + 1] for t in given[-1]), permuted)

    monkeypatch.setattr(kernels.rows, "_fold_norm_outputs", outputs)
    for M, K in ((1, 96), (3, 1120), (2, 2080)):
        kernels.rows._fold_norm._opoverload(randn(M, K), randn(K), True)
        for t in given[-1]:
            assert (t[[0, -1]] == 7).all()
            assert (t[1:-1] != 7).all()


@pytest.mark.parametrize(
    ("x", "gain", "permuted", "message"),
    [
        (torch.ones(64), torch.ones(64), False, r"x: found \[64\], expected \[N, K\]"),
        (torch.ones(2, 64), torch.ones(32), False, r"gain: found torch.float32 \[32\], expected torch.float32 \[64\]"),
        (torch.ones(2, 64), torch.ones(64).half(), False, r"gain: found torch.float16 \[64\], expected torch.float32 \[64\]"),
        (torch.ones(2, 48), torch.ones(48), True, "x: found 48 columns, expected a multiple of 32 where they are permuted"),
        (torch.ones(64, 2).T, torch.ones(64), False, r"x: found strides \(1, 2\), expected a contiguous tensor"),
    ],
)
def test_fold_norm_refuses(x, gain, permuted, message):
    with pytest.raises(ValueError, match=message):
        fold_norm(x, gain, permuted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(3, 2 * 96), (2, 2 * 1100), (0, 64)], ids=str)
def test_silu_mul(shape, dtype):
    x = randn(*shape, dtype=dtype) * 3
    if len(x):
        assert_within(silu_mul(x), silu_mul_ref(x), silu_mul_ref(x.double()))
    assert silu_mul(x).shape == (shape[0], shape[1] // 2)
    torch.library.opcheck(torch.ops.rooflama.silu_mul, (x,))


def case(Hq, Hkv, D, qk_norm, dtype):
    """Five rows in two of three slots, the last of them padding; caches full of NaN."""
    S = 16
    position = torch.tensor([0, 1, 15, 7, -1], dtype=torch.int32, device=DEVICE)
    slot = torch.tensor([2, 2, 2, 0, 0], dtype=torch.int32, device=DEVICE)
    angles = torch.rand(S, D // 2, device=DEVICE) * 6
    norms = [randn(D, dtype=dtype) if qk_norm else None for _ in range(2)]
    caches = [torch.full((3, Hkv, S, D), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)]
    qkv = randn(5, (Hq + 2 * Hkv) * D, dtype=dtype)
    return [qkv, angles.cos(), angles.sin(), position, slot, *caches, *norms, 1e-6, Hq]


def widened(arguments):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]


def test_an_fp8_cache_saturates():
    """The values of a cache in the model's dtype, each rounded to e4m3 or, beyond its range, its largest."""
    arguments = case(4, 2, 64, False, torch.bfloat16)
    arguments[0][:, ::7] *= 300
    names = ("cos", "sin", "position", "slot", "k_cache", "v_cache", "num_heads")
    given = dict(zip(names, [*arguments[1:7], 4], strict=True))
    narrow = given | {n: torch.zeros_like(given[n], dtype=torch.float8_e4m3fn) for n in ("k_cache", "v_cache")}
    rope_append(arguments[0], **given)
    rope_append(arguments[0], **narrow)
    for n in ("k_cache", "v_cache"):
        wide, found = given[n].nan_to_num().float(), narrow[n].float()
        assert wide.abs().max() > 448
        assert ((found - wide.clamp(-448, 448)).abs() <= wide.abs() / 15 + 2**-9).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("Hq", "Hkv", "D", "qk_norm"), [(4, 2, 64, False), (7, 1, 96, False), (6, 3, 32, True), (2, 2, 128, True)]
)
def test_rope_append(Hq, Hkv, D, qk_norm, dtype):
    """The rows written are the reference's; every other row of the cache is left alone."""
    names = ("cos", "sin", "position", "slot", "k_cache", "v_cache", "q_norm", "k_norm", "eps", "num_heads")
    got, working = case(Hq, Hkv, D, qk_norm, dtype), case(Hq, Hkv, D, qk_norm, dtype)
    working[:5], working[7:9] = got[:5], got[7:9]
    working[5], working[6] = got[5].clone(), got[6].clone()
    exact = [a.clone() if isinstance(a, torch.Tensor) else a for a in widened(working)]
    found = rope_append(got[0], **dict(zip(names, got[1:], strict=True)))
    plain, true = rope_append_ref(*working), rope_append_ref(*exact)
    for f, p, t in zip(found, plain, true, strict=True):
        assert_within(f, p, t)
    written = torch.zeros(3, 16, dtype=torch.bool, device=DEVICE)
    written[got[4][:4].long(), got[3][:4].long()] = True
    for f, p, t in zip(got[5:7], working[5:7], exact[5:7], strict=True):
        f, p, t = (c.transpose(1, 2) for c in (f, p, t))
        assert_within(f[written], p[written], t[written])
        assert f[~written].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rope_append_into_fp8(dtype):
    """The nearest e4m3 to float64's rows, but for what a rounding to 16 bits before it adds; beyond 448, 448."""
    got = case(4, 2, 64, False, dtype)
    got[0][:, 4 * 64 :].mul_(torch.logspace(-3, 3, 4 * 64, device=DEVICE).to(dtype))  # small keys, large values
    exact = widened(got)
    got[5:7] = [c.to(torch.float8_e4m3fn) for c in got[5:7]]
    rope_append_ref(*exact)
    names = ("cos", "sin", "position", "slot", "k_cache", "v_cache", "q_norm", "k_norm", "eps", "num_heads")
    rope_append(got[0], **dict(zip(names, got[1:], strict=True)))
    for f, t in zip(got[5:7], exact[5:7], strict=True):
        written, f, t = t.isfinite(), f.double(), t.clamp(-448, 448)
        assert torch.equal(f.isfinite(), written)
        bound = (t.abs() / 16).clamp(min=2.0**-10) + t.abs() * 2.0**-7 + 1e-6
        assert ((f - t).abs() <= bound)[written].all()
    assert (exact[6].nan_to_num().abs() > 448).any(), "else nothing saturates"


def test_rope_append_is_an_operator():
    arguments = case(4, 2, 64, True, torch.bfloat16)
    arguments[5:7] = [c.zero_() for c in arguments[5:7]]
    torch.library.opcheck(torch.ops.rooflama.rope_append, tuple(arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": torch.zeros(4, dtype=torch.int32)}, r"position: found torch.int32 \[4\], expected int32 \[5\]"),
        ({"slot": torch.zeros(5, dtype=torch.int64)}, r"slot: found torch.int64 \[5\], expected int32 \[5\]"),
        ({"num_heads": 5}, "qkv and caches: found .* expected"),
        ({"cos": torch.zeros(16, 64)}, r"cos: found \[16, 64\], expected 32 columns"),
    ],
)
def test_bad_arguments(change, message):
    qkv, cos, sin, position, slot, k_cache, v_cache, *_ = case(4, 2, 64, False, torch.float32)
    given = {"cos": cos, "sin": sin, "position": position, "slot": slot, "k_cache": k_cache, "v_cache": v_cache, "num_heads": 4}
    with pytest.raises(ValueError, match=message):
        rope_append(qkv, **given | change)
