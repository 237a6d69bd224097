"""Attention of packed sequences against float64, from packed keys and from a cache; what the choice of a kernel rests on."""

import sys

import pytest
import torch
from tolerance import assert_within

import kv_cache
from kernels.flash_prefill import CUDNN_TOKENS, flash_prefill, same_long_length

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.2


def index(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def attention(q, k, v, window):
    """One sequence, q [n, Hq, D], k and v [m, Hkv, D]; its last query stands at its last key."""
    n, m, group = len(q), len(k), q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    i, j = torch.arange(m - n, m, device=DEVICE)[:, None], torch.arange(m, device=DEVICE)
    seen = (j <= i) & (j > i - (window or m))
    scores = torch.einsum("nhd,mhd->hnm", q, k) * SCALE
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize(("Hq", "Hkv", "D"), [(4, 4, 64), (6, 2, 128), (7, 1, 96)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_packed_sequences(Hq, Hkv, D, window, dtype):
    """Ragged, one of them without a row; k and v as strided as they come from a fused projection."""
    counts = [5, 1, 0, 33, 1]
    q, kv = (torch.randn(sum(counts), h, D, device=DEVICE).to(dtype) for h in (Hq, 2 * Hkv))
    k, v = kv.split([Hkv, Hkv], dim=1)
    first = index(0, 5, 6, 6, 39, 40)
    found = flash_prefill(q, k, v, first, first, longest=33, scale=SCALE, window=window)
    rows = [slice(a, b) for a, b in zip(first.tolist(), first.tolist()[1:], strict=False)]
    working, exact = (
        torch.cat([attention(q.to(t)[r], k.to(t)[r], v.to(t)[r], window) for r in rows]) for t in (dtype, torch.float64)
    )
    assert_within(found, working, exact)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("block", [4, 512])
def test_from_a_cache(window, block, monkeypatch):
    """Sequences in slots in any order; rows behind their lengths and other slots hold NaN; q has rows behind the last."""
    monkeypatch.setattr(sys.modules["kernels.flash_prefill"], "QUERY_BLOCK", block)
    Hq, Hkv, D, S = 6, 2, 64, 48
    counts, lengths, slots = [5, 1, 20], [25, 48, 20], [3, 0, 2]
    caches = [torch.full((5, Hkv, S, D), torch.nan, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    for cache in caches:
        for slot, length in zip(slots, lengths, strict=True):
            cache[slot, :, :length] = torch.randn(Hkv, length, D, device=DEVICE)
    q = torch.randn(30, Hq, D, device=DEVICE).bfloat16()
    k_first = index(*(slot * Hkv * S for slot in slots), 0)
    k, v = (kv_cache.as_rows(c) for c in caches)
    found = flash_prefill(q, k, v, index(0, 5, 6, 26), k_first, index(*lengths), longest=30, scale=SCALE, window=window)
    begin = 0
    for count, length, slot in zip(counts, lengths, slots, strict=True):
        keys, values = (c[slot, :, :length].transpose(0, 1) for c in caches)
        rows = slice(begin, begin + count)
        working = attention(q[rows], keys, values, window)
        assert_within(found[rows], working, attention(q[rows].double(), keys.double(), values.double(), window))
        begin += count


def test_rows_of_a_cache():
    cache = torch.randn(3, 2, 5, 4)
    rows = kv_cache.as_rows(cache)
    for slot in range(3):
        assert torch.equal(rows[slot * 10 : slot * 10 + 5], cache[slot].transpose(0, 1))
    assert rows.data_ptr() == cache.data_ptr()


def test_it_is_an_operator():
    q, k = torch.randn(6, 4, 64, device=DEVICE), torch.randn(6, 2, 64, device=DEVICE)
    first = index(0, 2, 6)
    torch.library.opcheck(torch.ops.rooflama.flash_prefill, (q, k, k, first, first, None, 4, 0.1, None))


def test_which_packs_are_worth_a_plan():
    assert same_long_length(4 * CUDNN_TOKENS, 4, CUDNN_TOKENS)
    assert not same_long_length(4 * CUDNN_TOKENS - 1, 4, CUDNN_TOKENS), "ragged"
    assert not same_long_length(CUDNN_TOKENS + 1, 1, CUDNN_TOKENS + 1), "a plan for every length"
    assert not same_long_length(64 * 128, 64, 128), "short"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(6, 3, 64)}, r"k and v: found \[6, 3, 64\].*, heads dividing 4"),
        ({"q_first": torch.zeros(3, dtype=torch.int64)}, r"q_first: found torch.int64 \[3\], expected int32 \[3\]"),
        ({"k_lengths": torch.zeros(3, dtype=torch.int32)}, r"k_lengths: found torch.int32 \[3\], expected int32 \[2\]"),
        ({"window": 0}, "window: found 0, expected at least 1"),
    ],
)
def test_bad_arguments(change, message):
    first, k = torch.tensor([0, 2, 6], dtype=torch.int32), torch.zeros(6, 2, 64)
    given = {"q": torch.zeros(6, 4, 64), "k": k, "v": k, "q_first": first, "k_first": first, "longest": 4, "scale": 1.0}
    if "k" in change:
        given["v"] = change["k"]
    with pytest.raises(ValueError, match=message):
        flash_prefill(**given | change)
