"""From logits to tokens: the parameters a user gives, their checks, and the reference in plain PyTorch.

Owns `SamplingParams`, its device-side form and the reference sampler. Knows nothing of the model.
Order: repetition penalty, temperature, truncation (top-k, top-p, min-p), then one draw. Temperature 0 is greedy: the true
argmax, ties to the lowest id. A draw is the Gumbel-max of the truncated logits, its noise keyed by (seed, sample, position,
id): never by slot, batch or step. So what runs beside a prompt changes no draw; on a GPU it can still change the last bits of
its logits, since tiles follow the number of rows.
Letters: B sequences, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from kernels import gumbel

MAX_LOGPROBS = 20
MAX_SAMPLES = 65536  # of a prompt
MIN_TEMPERATURE = 1e-5  # below it logits / temperature leaves float32's range, and the draw is the largest logit anyway

# What a choice can take, each kind all that those before it do, and the state of SamplingState that it reads: the largest
# logit; a draw from all of them; from those that the cuts leave; with a penalty on what was there before.
KINDS = {"greedy": (), "draw": ("temperature", "seed", "sample")}
KINDS["truncate"] = (*KINDS["draw"], "top_k", "top_p", "min_p")
KINDS["penalize"] = (*KINDS["truncate"], "repetition_penalty", "seen")


@dataclass(frozen=True)
class SamplingParams:
    """What a user may ask of one prompt. ValueError names the parameter, what was found and what was expected."""

    temperature: float = 0.0  # 0 = greedy
    top_k: int = 0  # 0 = off; more than the vocabulary is clamped
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # divides (multiplies, below 0) the logits of tokens in the prompt and the answer
    seed: int = 0
    n: int = 1  # samples of the prompt, generated side by side
    logprobs: int | None = None  # keep each token's log-probability and those of so many likeliest ones
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

        def integer(value, low, high=2**31 - 1):
            return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

        check("temperature", number(self.temperature) and 0 <= self.temperature <= 2, "a number in [0, 2]")
        check("top_k", integer(self.top_k, 0), "an integer from 0 (off) to 2,147,483,647")
        check("top_p", number(self.top_p) and 0 < self.top_p <= 1, "a number in (0, 1]")
        check("min_p", number(self.min_p) and 0 <= self.min_p <= 1, "a number in [0, 1]")
        check("repetition_penalty", number(self.repetition_penalty) and self.repetition_penalty > 0, "a number above 0")
        check("seed", integer(self.seed, -(2**63), 2**63 - 1), "a 64-bit integer")
        check("n", integer(self.n, 1, MAX_SAMPLES), f"an integer from 1 to {MAX_SAMPLES:,}")
        check("logprobs", self.logprobs is None or integer(self.logprobs, 0, MAX_LOGPROBS), f"0 to {MAX_LOGPROBS}, or None")
        check("max_new_tokens", integer(self.max_new_tokens, 1), "an integer from 1 to 2,147,483,647")
        check("stop", not isinstance(self.stop, str) and all(isinstance(s, str) and s for s in self.stop), "strings, not empty")
        check("stop_token_ids", all(integer(i, 0) for i in self.stop_token_ids), "token ids")
        check("ignore_eos", isinstance(self.ignore_eos, bool), "true or false")

    @property
    def kind(self) -> str:
        """What the choice of a token takes, one of KINDS."""
        if self.repetition_penalty != 1:
            return "penalize"
        if self.temperature < MIN_TEMPERATURE:
            return "greedy"
        return "truncate" if self.top_k > 0 or self.top_p < 1 or self.min_p > 0 else "draw"


SAMPLING_FIELDS = {"temperature": torch.float32, "top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32,
                   "repetition_penalty": torch.float32, "seed": torch.int64, "sample": torch.int32}  # fmt: skip


def sampling_fields(params: SamplingParams, sample: int = 0) -> dict[str, float]:
    """What the buffers of SamplingState hold for one sequence; `sample` tells the draws of one prompt's samples apart."""
    fields = {name: getattr(params, name) for name in SAMPLING_FIELDS if name != "sample"}
    return fields | {"sample": sample, "temperature": params.temperature if params.temperature >= MIN_TEMPERATURE else 0}


class SamplingState(nn.Module):
    """`sampling_fields` of B sequences as device buffers with fixed addresses, and the tokens that each has seen."""

    def __init__(self, batch_size: int, vocab_size: int, device=None):
        super().__init__()
        self.batch_size, self.vocab_size = batch_size, vocab_size
        for name, dtype in SAMPLING_FIELDS.items():
            self.register_buffer(name, torch.zeros(batch_size, dtype=dtype, device=device))
        self.register_buffer("seen", None)  # [B, V] bool

    def see(self, row: int, tokens: torch.Tensor) -> None:
        """Sequence `row` has seen these tokens [n] int64 and no others. Makes `seen`, which only the kind "penalize" reads."""
        if self.seen is None:
            self.seen = torch.zeros(self.batch_size, self.vocab_size, dtype=torch.bool, device=self.seed.device)
            torch._dynamo.mark_static_address(self.seen)
        self.seen[row] = False
        self.seen[row].index_fill_(0, tokens, True)


def penalize(logits: torch.Tensor, seen: torch.Tensor, repetition_penalty: torch.Tensor) -> torch.Tensor:
    """logits [B, V], those of tokens in `seen` [B, V] divided by the penalty [B], or multiplied where they are negative (CTRL,
    arXiv:1909.05858, as transformers has it)."""
    penalty = repetition_penalty[:, None]
    inverse = penalty.double().reciprocal().float()  # a division in float32 is rounded as a compiler likes, a product is not
    return torch.where(seen, logits * torch.where(logits < 0, penalty, inverse), logits)


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
    kept = (before < top_p[:, None]) | (top_p[:, None] >= 1)  # rounding may take the sum to 1 before the last token
    kept &= (probs >= min_p[:, None] * probs[:, :1]) & (ordered > -math.inf)
    least = ordered.gather(1, kept.sum(-1, keepdim=True).clamp(min=1) - 1)
    return torch.where(logits < least, -math.inf, logits)  # NaN stays


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
