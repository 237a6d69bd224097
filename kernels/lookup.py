"""N-gram look-up: how a sequence went on the last time that it was where it is now.

Owns `lookup`, the drafter that needs no model (prompt look-up decoding, github.com/apoorvumang/prompt-lookup-decoding).
Letters: B sequences, S entries of the history, L length of a sequence, k drafts, N = LONGEST tokens compared.

Of the earlier positions whose token is the last one, that with the longest common past (up to N tokens) is taken, and of equals
the latest, p. Drafts are what followed it, and behind the sequence's end the same again: what repeats with period L - 1 - p.
"""

import torch
import triton
import triton.language as tl

from kernels._common import launch_options, pdl_wait, runs_kernels

LONGEST = tl.constexpr(4)
BLOCK = tl.constexpr(2048)

# ---------------------------------------------------------------- reference


def lookup_ref(history: torch.Tensor, lengths: torch.Tensor, k: int) -> torch.Tensor:
    """The arguments as in `lookup`."""
    S = history.shape[1]
    p, last = torch.arange(S, device=history.device), lengths[:, None].long() - 1
    alike, score = torch.ones_like(history, dtype=torch.bool), torch.zeros_like(history)
    for n in range(LONGEST.value):
        shifted = history.roll(n, dims=1)  # entry p holds the token at p - n
        alike = alike & (shifted == history.gather(1, (last - n).clamp(min=0))) & (p >= n) & (last >= n)
        score += alike.int()
    key = torch.where(p < last, score * S + p, -1)
    found = key.max(dim=1, keepdim=True).values % S
    found = torch.where(last > 0, found, last - 1)  # no earlier position: the only token again
    i = torch.arange(k, device=history.device)
    drafts = history.gather(1, (found + 1 + i % (last - found).clamp(min=1)).clamp(min=0))
    return torch.where(lengths[:, None] > 0, drafts, 0)


# ---------------------------------------------------------------- kernel


@triton.jit(do_not_specialize=["k"])
def _lookup_kernel(history_ptr, lengths_ptr, drafts_ptr, S, k, KP: tl.constexpr, PDL: tl.constexpr):
    """One program a sequence; what it reads, a round before has written, and the drafts are read by what waits for it."""
    b = tl.program_id(0)
    pdl_wait(PDL)
    last = tl.load(lengths_ptr + b) - 1
    history = history_ptr + b.to(tl.int64) * S
    best = last - 1  # the last token again
    for start in tl.range(0, last, BLOCK):
        p = start + tl.arange(0, BLOCK)
        alike = p < last
        score = tl.zeros([BLOCK], tl.int32)
        for n in tl.static_range(LONGEST):
            token = tl.load(history + last - n, mask=last >= n, other=-1)
            alike = alike & (tl.load(history + p - n, mask=alike & (p >= n), other=-2) == token)
            score += alike.to(tl.int32)
        best = tl.maximum(best, tl.max(tl.where(p < last, score * S + p, -1), 0))
    found = tl.where(last > 0, best % S, last - 1)
    i = tl.arange(0, KP)
    at = found + 1 + i % tl.maximum(last - found, 1)
    drafts = tl.load(history + at, mask=(i < k) & (last >= 0), other=0)
    tl.store(drafts_ptr + b * k + i, drafts, mask=i < k)


# ---------------------------------------------------------------- operator


def _drafts(history, lengths, k):
    if history.dim() != 2 or history.dtype != torch.int32 or not history.is_contiguous() or history.shape[1] >= 2**28:
        raise ValueError(f"history: found {history.dtype} {list(history.shape)}, expected int32 [B, S below 2^28], contiguous")
    if lengths.shape != (history.shape[0],) or lengths.dtype != torch.int32:
        raise ValueError(f"lengths: found {lengths.dtype} {list(lengths.shape)}, expected int32 [{history.shape[0]}]")
    return history.new_empty(history.shape[0], k)


@torch.library.custom_op("rooflama::lookup", mutates_args=())
def _lookup(history: torch.Tensor, lengths: torch.Tensor, k: int) -> torch.Tensor:
    drafts = _drafts(history, lengths, k)
    if not runs_kernels(history):
        return lookup_ref(history, lengths, k)
    _lookup_kernel[(history.shape[0],)](
        history, lengths, drafts, history.shape[1], k, KP=triton.next_power_of_2(k), num_warps=8, **launch_options(history)
    )  # fmt: skip
    return drafts


@_lookup.register_fake
def _(history, lengths, k):
    return _drafts(history, lengths, k)


def lookup(history: torch.Tensor, lengths: torch.Tensor, k: int) -> torch.Tensor:
    """Drafts [B, k] int32 for histories [B, S] int32, the token of each position, of which lengths [B] int32 are there.

    Length 0 gives zeros. ValueError: a shape or dtype that does not fit.
    """
    return torch.ops.rooflama.lookup(history, lengths, k)
