"""From logits to tokens: the parameters a user gives, their checks, and the reference in plain PyTorch.

Owns `SamplingParams`, its device-side form and the reference sampler. Knows nothing of the model.
Order: temperature, then truncation (top-k, top-p, min-p), then one draw. Temperature 0 is greedy: the true
argmax, ties to the lowest id. A draw is the Gumbel-max of the truncated logits, its noise keyed by (seed, sample, position,
id): never by slot, batch or step, so that a prompt gets the same tokens whatever runs beside it.
Letters: B sequences, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from kernels import gumbel


@dataclass(frozen=True)
class SamplingParams:
    """What a user may ask of one prompt. ValueError names the parameter, what was found and what was expected."""

    temperature: float = 0.0  # 0 = greedy
    top_k: int = 0  # 0 = off; more than the vocabulary is clamped
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    max_new_tokens: int = 200
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        def check(name, ok, expected):
            if not ok:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected {expected}")

        def number(value):
            return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

        check("temperature", number(self.temperature) and 0 <= self.temperature <= 2, "a number in [0, 2]")
        check("top_k", isinstance(self.top_k, int) and self.top_k >= 0, "an integer of at least 0 (0 = off)")
        check("top_p", number(self.top_p) and 0 < self.top_p <= 1, "a number in (0, 1]")
        check("min_p", number(self.min_p) and 0 <= self.min_p <= 1, "a number in [0, 1]")
        check("seed", isinstance(self.seed, int) and -(2**63) <= self.seed < 2**63, "a 64-bit integer")
        check("max_new_tokens", isinstance(self.max_new_tokens, int) and self.max_new_tokens >= 1, "an integer of at least 1")
        check("stop", all(isinstance(s, str) and s for s in self.stop), "strings that are not empty")
        check("stop_token_ids", all(isinstance(i, int) and i >= 0 for i in self.stop_token_ids), "token ids")

    KINDS = ("greedy", "draw", "truncate")  # each does what those before it do

    @property
    def kind(self) -> str:
        """What the choice of a token takes: the largest logit; a draw from all of them; or from those that the cuts leave."""
        if self.temperature == 0:
            return "greedy"
        return "truncate" if self.top_k > 0 or self.top_p < 1 or self.min_p > 0 else "draw"


class SamplingState(nn.Module):
    """`SamplingParams` of B sequences as device buffers with fixed addresses."""

    def __init__(self, batch_size: int, device=None):
        super().__init__()
        fields = {"temperature": torch.float32, "top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32,
                  "seed": torch.int64, "sample": torch.int32}  # fmt: skip
        for name, dtype in fields.items():
            self.register_buffer(name, torch.zeros(batch_size, dtype=dtype, device=device))
            torch._dynamo.mark_static_address(getattr(self, name))

    def set(self, row: int, params: SamplingParams, sample: int = 0) -> None:
        """Gives sequence `row` its parameters; `sample` tells the draws of one prompt's samples apart."""
        for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
            getattr(self, name)[row] = getattr(params, name)
        self.sample[row] = sample


def truncate(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """logits [B, V] (temperature applied) -> the same with -inf for what top-k, then top-p, then min-p remove.

    Each cut is on the renormalised result of the one before, as in transformers; ties at a cut are kept.
    """
    vocab = logits.shape[-1]
    ordered = logits.sort(dim=-1, descending=True).values
    k = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab).long()[:, None]
    ordered = torch.where(ordered >= ordered.gather(1, k - 1), ordered, -math.inf)
    probs = ordered.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # mass ahead of each token: kept while it is below top_p
    kept = ((before < top_p[:, None]) & (probs >= min_p[:, None] * probs[:, :1])).sum(-1, keepdim=True).clamp(min=1)
    return torch.where(logits >= ordered.gather(1, kept - 1), logits, -math.inf)


def choose(
    logits, position, temperature=None, seed=None, sample=None, top_k=None, top_p=None, min_p=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [B, V] float32, position [B] that the chosen token will have -> (the winning value, its id int32), [B, 1] each.

    Greedy without a temperature, from the whole distribution without the cuts. A NaN logit gives a NaN value.
    """
    value = logits
    if temperature is not None:
        greedy = (temperature == 0)[:, None]
        warm = logits / torch.where(greedy, 1.0, temperature[:, None])
        if top_k is not None:
            warm = truncate(warm, top_k, top_p, min_p)
        value = torch.where(greedy, logits, warm + gumbel(seed, sample, position, logits.shape[-1]))
    best, token = value.max(dim=-1, keepdim=True)
    return best, token.int()
