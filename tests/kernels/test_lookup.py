"""lookup: drafts from a sequence's own past, against the definition read out loud."""

import pytest
import torch

from kernels.lookup import LONGEST, lookup, lookup_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drafts_of(tokens: list[int], k: int) -> list[int]:
    """The definition: of the earlier positions with the longest common past the latest, and what followed it, over and over."""
    if not tokens:
        return [0] * k
    last = len(tokens) - 1

    def common(p):
        n = 0
        while n < LONGEST.value and n <= p and tokens[p - n] == tokens[last - n]:
            n += 1
        return n

    found = max(range(last), key=lambda p: (common(p), p), default=last - 1)
    follows = tokens[found + 1 :]
    return [follows[i % len(follows)] for i in range(k)]


@pytest.mark.parametrize("k", [1, 3, 8])
def test_drafts(k):
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, v, (n,), generator=generator).tolist() for v, n in ((3, 60), (9, 41), (500, 30), (2, 64))]
    texts += [[], [7], [7, 7], [1, 2, 3, 1, 2, 3, 1]]
    history = torch.full((len(texts), 64), 5, dtype=torch.int32)  # rows behind the length would match, and may not count
    for row, text in zip(history, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    history, lengths = history.to(DEVICE), torch.tensor([len(t) for t in texts], dtype=torch.int32, device=DEVICE)
    want = [drafts_of(text, k) for text in texts]
    assert lookup(history, lengths, k).tolist() == want
    assert lookup_ref(history, lengths, k).tolist() == want


def test_a_long_history():
    """More than one block of it; the match is in the first."""
    history = torch.arange(5000, dtype=torch.int32, device=DEVICE)[None]
    history[0, 4000] = 17
    lengths = torch.tensor([4001], dtype=torch.int32, device=DEVICE)
    assert lookup(history, lengths, 4).tolist() == [[18, 19, 20, 21]]


def test_what_does_not_fit_is_refused():
    history, lengths = torch.zeros(2, 8, dtype=torch.int32, device=DEVICE), torch.ones(2, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"history: found torch\.int64"):
        lookup(history.long(), lengths, 2)
    with pytest.raises(ValueError, match=r"lengths: found torch.int32 \[1\], expected int32 \[2\]"):
        lookup(history, lengths[:1], 2)


def test_opcheck():
    history, lengths = torch.zeros(2, 8, dtype=torch.int32, device=DEVICE), torch.ones(2, dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(torch.ops.rooflama.lookup.default, (history, lengths, 3))
