"""Attention of prompts: causal, over packed sequences, without padding.

Owns the choice among torch's own attention kernels, and the operator around it. Knows neither the model nor the cache.
Letters: N rows of q, P sequences, Hq/Hkv heads, D head size, R rows of k and v.

Sequence p has rows q_first[p] .. q_first[p + 1] of q, and its keys are rows k_first[p] .. k_first[p] + k_lengths[p] of k; its
last query stands at its last key. Rows are addressed by strides, so that k may be a whole KV cache (kv_cache.as_rows), and
sequences may begin anywhere in it.

    cudnn   prompts of one length, long enough to be worth a plan for that length; Hopper's instructions
    flash   everything else on a GPU in 16 bits: FlashAttention-2 with cumulative lengths; lengths stay on the device
    sdpa    no GPU, float32, or a head size that the others refuse: a sequence at a time; its lengths come to the host
"""

import functools

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

CUDNN_TOKENS = 2048  # cuDNN makes a plan for each length that it meets: only for lengths from here on, in steps of
CUDNN_STEP = 128
launched: set[str] = set()  # the names of those that this process has launched, for reports
QUERY_BLOCK = 512  # queries that share a mask in `sdpa`: bounds its memory


def _cudnn(q, k, v, count: int, scale: float) -> torch.Tensor:
    """`count` sequences of one length, all their keys fresh."""
    q, k, v = (t.unflatten(0, (count, -1)).transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


def _flash(q, k, v, q_first, k_first, k_lengths, longest: int, scale: float, window: int | None) -> torch.Tensor:
    """Rows of q behind the last sequence's stay as the allocator left them."""
    return torch.ops.aten._flash_attention_forward(
        q, k, v, q_first, k_first,
        max(2, longest),  # at 1 it would take every sequence to have a row
        longest if k_lengths is None else k.shape[0],  # no more than a bound
        0.0, True, False,
        scale=scale, window_size_left=-1 if window is None else window - 1, window_size_right=0, seqused_k=k_lengths,
    )[0]  # fmt: skip


def flash_prefill_ref(q, k, v, q_first, k_first, k_lengths, scale: float, window: int | None) -> torch.Tensor:
    """A sequence at a time; with a window or older keys, QUERY_BLOCK queries at a time."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    bounds = q_first.tolist()
    lengths = q_first.diff() if k_lengths is None else k_lengths
    options = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    for begin, end, first, length in zip(bounds, bounds[1:], k_first.tolist(), lengths.tolist(), strict=False):
        count = end - begin
        block = count if window is None and count == length else QUERY_BLOCK
        for at in range(0, count, max(1, block)):
            stop = min(at + block, count)
            low = 0 if window is None else max(0, length - count + at - window + 1)  # keys that some query of the block sees
            high = length - count + stop
            keys, values = (t[first + low : first + high].transpose(0, 1)[None] for t in (k, v))
            mask = None
            if block != count:
                i = torch.arange(length - count + at, high, device=q.device)[:, None]
                j = torch.arange(low, high, device=q.device)
                mask = (j <= i) if window is None else (j <= i) & (j > i - window)
            queries = q[begin + at : begin + stop].transpose(0, 1)[None]
            part = scaled_dot_product_attention(queries, keys, values, mask, is_causal=mask is None, **options)
            out[begin + at : begin + stop] = part[0].transpose(0, 1)
    return out


# ---------------------------------------------------------------- choosing


@functools.cache
def flash_runs(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """True where `flash` takes this head size: it is asked, with sequences that begin anywhere, some without a row."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    q, k = (torch.zeros(rows, 1, head_dim, dtype=dtype, device=device) for rows in (4, 64))
    q_first, k_first, k_lengths = (torch.tensor(t, dtype=torch.int32, device=device) for t in ([0, 4, 4], [32, 0, 0], [9, 0]))
    try:
        return bool(_flash(q, k, k, q_first, k_first, k_lengths, 4, 1.0, None).eq(0).all())
    except RuntimeError:
        return False


@functools.cache
def cudnn_runs(device: torch.device, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """True where `cudnn` takes these heads."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    q, k = (torch.zeros(CUDNN_STEP, heads, head_dim, dtype=dtype, device=device) for heads in (num_heads, num_kv_heads))
    try:
        return bool(_cudnn(q, k, k, 1, 1.0).eq(0).all())
    except RuntimeError:
        return False


def same_long_length(num_rows: int, count: int, longest: int) -> bool:
    """True for `count` sequences of one length that cuDNN has a plan for, or may make one. Pure."""
    return num_rows == count * longest and longest >= CUDNN_TOKENS and longest % CUDNN_STEP == 0


def attention_kernel(q, num_kv_heads: int, count: int, longest: int, *, plain: bool) -> str:
    """Which one takes q [N, Hq, D] of `count` sequences: cudnn, flash or sdpa. plain: keys as many as queries, no window."""
    N, Hq, D = q.shape
    if plain and same_long_length(N, count, longest) and cudnn_runs(q.device, q.dtype, Hq, num_kv_heads, D):
        return "cudnn"
    return "flash" if flash_runs(q.device, q.dtype, D) else "sdpa"


# ---------------------------------------------------------------- operator


def _check(q, k, v, q_first, k_first, k_lengths, longest, window):
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 3 or t.shape[2] != q.shape[2] or t.dtype != q.dtype or t.stride(2) != 1:
            raise ValueError(f"{name}: found {t.dtype} {list(t.shape)}, expected {q.dtype} [rows, heads, D], D contiguous")
    if k.shape != v.shape or q.shape[1] % k.shape[1]:
        raise ValueError(f"k and v: found {list(k.shape)}, {list(v.shape)}, expected one shape, heads dividing {q.shape[1]}")
    size = q_first.shape[0]
    for name, t, rows in (("q_first", q_first, size), ("k_first", k_first, size), ("k_lengths", k_lengths, size - 1)):
        if t is not None and (t.shape != (rows,) or t.dtype != torch.int32 or not t.is_contiguous()):
            raise ValueError(f"{name}: found {t.dtype} {list(t.shape)}, expected int32 [{rows}], contiguous")
    if window is not None and window < 1:
        raise ValueError(f"window: found {window}, expected at least 1")


@torch.library.custom_op("rooflama::flash_prefill", mutates_args=())
def _flash_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_first: torch.Tensor,
    k_first: torch.Tensor,
    k_lengths: torch.Tensor | None,
    longest: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    _check(q, k, v, q_first, k_first, k_lengths, longest, window)
    count = q_first.shape[0] - 1
    kernel = attention_kernel(q, k.shape[1], count, longest, plain=k_lengths is None and window is None)
    launched.add(kernel)
    if kernel == "cudnn":
        return _cudnn(q, k, v, count, scale).contiguous()
    if kernel == "flash":
        return _flash(q, k, v, q_first, k_first, k_lengths, longest, scale, window)
    return flash_prefill_ref(q, k, v, q_first, k_first, k_lengths, scale, window)


@_flash_prefill.register_fake
def _(q, k, v, q_first, k_first, k_lengths, longest, scale, window):
    return q.new_empty(q.shape)


def flash_prefill(q, k, v, q_first, k_first, k_lengths=None, *, longest: int, scale: float, window=None) -> torch.Tensor:
    """Causal attention of packed sequences: q [N, Hq, D] over k, v [R, Hkv, D] -> [N, Hq, D].

    q_first, k_first [P + 1] int32, the first of which ends with the number of rows that count (rows of q behind it give
    anything); k_lengths [P] int32, None where keys are as many as queries and k_first is q_first. longest: the most queries of
    a sequence, or more. window: a query sees so many keys, its own included. ValueError: a shape or dtype that does not fit.
    """
    return _flash_prefill(q, k, v, q_first, k_first, k_lengths, longest, scale, window)
