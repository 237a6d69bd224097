"""Speculative decoding: several tokens a round, each the one that plain decoding would have chosen.

Owns the drafters, the round (draft, verify, accept) and the choice of k, the number of drafts. Knows neither text nor prompts.
Letters: B sequences, k drafts, T query tokens of a sequence in one forward, S cache rows, H hidden size.

Every draw is the largest of logit / temperature + Gumbel noise, with noise keyed by (seed, sample, position): sampling.py. The
drafter draws with the very noise that the target will draw with, and a draft stands if it *is* the target's choice at its
position. So the output is plain decoding's, token by token, whatever drafts; the chance that a draft stands is that of two
distributions choosing alike under common noise (a Gumbel coupling: Daliri et al. 2024, arXiv:2408.07978), not far below the
sum(min(p, q)) that rejection sampling reaches (Leviathan et al. 2023, arXiv:2211.17192); LOG.md has both, measured.

A round runs wholly on the device: k drafts, one forward of T = k + 1 tokens, `kernels.accept`. The host reads the ring some
rounds behind, as in plain decoding, and chooses the next round's k from what it has read.
"""

import dataclasses
import time
from collections import Counter, deque
from collections.abc import Callable

import torch

import kernels
from decoding import RING, Session, candidates, choose_token, decode_one_token, note_logprobs
from kernels.formats import GROUP_SIZES, PackedFormat, Weight
from kv_cache import bytes_per_row
from model import DecodeStep, Scale, Transformer
from prefill import Piece, Prefiller, download
from timing import Timing

MAX_DRAFTS = 15  # flash_decode takes 16 query tokens
CATCH_UP = 16  # tokens of the forward in which a drafter that was switched off sees what it missed
MEMORY = 0.95  # weight of a trial in the estimate of acceptance, after one more: about 20 trials count
PRIOR = (2.8, 4.0)  # drafts kept, of drafts tried, before any was: 0.7

# ---------------------------------------------------------------- drafters


class Drafter:
    """Proposes tokens. The next kind (EAGLE heads, say) is a subclass: `propose`; `bind` and `admit` where it has a state."""

    name = "none"
    bytes_per_row = 0  # of a cache of its own, that one token takes
    reads_first: Weight | None = None  # of its weights, where it has any

    def bind(self, target: Session, history: torch.Tensor) -> None:
        """Makes the buffers to draft for a session's sequences. history [B, S] int32 has the token of each position, the last
        chosen one included, which the target has not seen: entry lengths - 1."""
        self.target, self.history = target, history

    def admit(self, row: int, prompt: list[int]) -> None:
        """Sequence `row` begins, with this prompt. Not captured."""

    def propose(self, k: int, kind: str, missed: int = 1) -> torch.Tensor:
        """Drafts [B, k] int32, contiguous, for the positions from lengths on. Captured in CUDA graphs: device work only.

        `kind` as for choose_token; `missed`: how many of the last tokens this drafter may not have seen, beside the last.
        """
        raise NotImplementedError


class NgramDrafter(Drafter):
    """What followed the same tokens the last time, in prompt or answer."""

    name = "ngram"

    def propose(self, k, kind, missed=1):
        return kernels.lookup(self.history, self.target.cache.lengths, k)


class ModelDrafter(Drafter):
    """A smaller model of the same vocabulary, with a cache of its own."""

    def __init__(self, model: Transformer, name: str = "draft model"):
        self.model, self.name = model, name
        self.bytes_per_row = bytes_per_row(model.config, model.norm.weight.dtype)
        self.reads_first = model.layers[0].attention.wqkv

    def bind(self, target, history):
        super().bind(target, history)
        self.model.tile_weights()
        self.session = Session(self.model, target.batch_size, target.max_seq_len, **self.cache_options(target))
        self.session.sampling = target.sampling  # the same noise
        self.session.limit.fill_(2**30)  # it neither stops nor ends
        self.prefiller = Prefiller(self.model, self.session.cache)

    def cache_options(self, target: Session) -> dict:
        return {"spare": target.spare}

    def admit(self, row, prompt):
        self.prefiller.run([Piece(row, prompt)])

    def propose(self, k, kind, missed=1):
        """The first forward takes the last token and those missed: of a round that kept every draft, the last was not fed."""
        session, T = self.session, missed + 1
        session.cache.lengths.copy_(self.target.cache.lengths)
        session.done.copy_(self.target.done)
        session.cursor.zero_()
        x = self.model.embed(last_tokens(self.history, session.cache.lengths, T).flatten())
        hidden = self.model(x, DecodeStep(session.cache, T)).unflatten(0, (-1, T))[:, -1].contiguous()
        choose_token(self.model, session, hidden, slice(None), kind)
        for _ in range(k - 1):
            decode_one_token(self.model, session, kind)
        return session.ring[:, :k].contiguous()


class SelfDrafter(ModelDrafter):
    """The target itself, its weights in int4 (the head in int8).

    It shares the target's cache: the rows that it writes are those that the round's verification writes again.
    """

    def __init__(self, target: Transformer):
        super().__init__(quantized_copy(target), "self (int4)")
        self.bytes_per_row = 0

    def bind(self, target, history):
        super().bind(target, history)
        self.session.cache.table = target.cache.table  # the target moves sequences between slots

    def cache_options(self, target):
        return {"cache": target.cache.twin()}

    def admit(self, row, prompt):
        pass

    def propose(self, k, kind, missed=1):
        return super().propose(k, kind, missed=0)


def last_tokens(history: torch.Tensor, lengths: torch.Tensor, T: int) -> torch.Tensor:
    """The last T of lengths [B] tokens of each history [B, S] -> [B, T]; anything where there are fewer."""
    at = lengths.long()[:, None] + torch.arange(-T, 0, device=lengths.device)
    return history.gather(1, at.clamp(min=0))


def quantized_copy(model: Transformer) -> Transformer:
    """The model with its layers rounded to int4 and its head to int8; embedding and norms are shared. ValueError: it is
    quantised already, or no group size divides its columns."""
    config = model.config
    if config.layer_format:
        raise ValueError(f"speculate: found self with weights in {config.layer_format}, expected plain weights")
    columns = {m.in_features for m in model.layers.modules() if isinstance(m, Weight)}
    sizes = [size for size in sorted(GROUP_SIZES["int4"], reverse=True) if not any(c % size for c in columns)]
    if not sizes:
        raise ValueError(f"speculate: found self with layers of {sorted(columns)} columns, expected multiples of 32")
    int4, int8 = PackedFormat("int4", sizes[0], scale_dtype=model.norm.weight.dtype), PackedFormat("int8")
    config = dataclasses.replace(config, layer_format=int4, head_format=int8, tie_word_embeddings=False)
    copy = Transformer(config, device="meta", dtype=model.norm.weight.dtype)
    for name, module in model.named_modules():
        if isinstance(module, Weight) and name.startswith("layers."):
            copy.set_submodule(name, module.round_to_nearest(int4))
        elif isinstance(module, (Weight, Scale)):
            copy.set_submodule(name, module)
    copy.output = model.head.round_to_nearest(int8)
    copy.vocab_limit, copy.cos, copy.sin = model.vocab_limit, model.cos, model.sin
    return copy


# ---------------------------------------------------------------- the choice of k


def expected_tokens(alpha: float, k: int) -> float:
    """Tokens of a round with k drafts, each of which stands with chance alpha where those before it do (arXiv:2211.17192)."""
    return sum(alpha**i for i in range(k + 1))


def best_k(alpha: float, round_ms: dict[int, float]) -> int:
    """Of the k that round_ms has a round's time for, the one that gives most tokens a second; 0 is plain decoding."""
    return max(round_ms, key=lambda k: expected_tokens(alpha, k) / round_ms[k])


class Acceptance:
    """A running estimate of alpha; older trials fade."""

    def __init__(self):
        self.kept, self.tried = PRIOR

    def add(self, kept: int, tried: int) -> None:
        fade = MEMORY**tried
        self.kept, self.tried = self.kept * fade + kept, self.tried * fade + tried

    @property
    def alpha(self) -> float:
        return self.kept / self.tried


# ---------------------------------------------------------------- rounds


class Speculator:
    """Runs the rounds of one session: the counterpart of decoding.Decoder.

    k: the most drafts of a round. `adaptive` chooses among k, k / 2, ..., 1 and none at all, by what has been accepted so far
    and by what each costs here, timed once. mode: eager, or graph: each kind of round is one captured CUDA graph.
    """

    def __init__(self, model: Transformer, session: Session, drafter: Drafter, k: int, adaptive: bool, mode: str):
        self.model, self.session, self.drafter, self.k, self.adaptive, self.mode = model, session, drafter, k, adaptive, mode
        B, device = session.batch_size, session.x.device
        self.history = torch.zeros(B, session.max_seq_len + session.spare, dtype=torch.int32, device=device)
        # [b, 0, j]: rounds of sequence b with at least j drafts (j = 0: all rounds and plain steps); [b, 1, j]: where j stood
        self.tally = torch.zeros(B, 2, max(k, 1) + 1, dtype=torch.int32, device=device)
        self.choices = [k >> i for i in range(k.bit_length())] if adaptive else [k]
        self.acceptance = Acceptance()
        self.work: dict[tuple, Callable[[], None]] = {}  # by (k, kind, logprobs): what a launch does
        self.round_ms: dict[str, dict[int, float]] = {}  # by kind and k; k = 0: a plain token, the drafter's looks included
        self.draft_ms: dict[str, dict[int, float]] = {}  # by kind and k: of a round, what its drafts take
        self.plain_ms: dict[str, float] = {}  # by kind: a plain token, without a drafter
        self.pool = None
        self.capture_sec = 0.0
        drafter.bind(session, self.history)

    @property
    def path(self) -> str:
        how = "chosen from " + ", ".join(map(str, [*self.choices, 0])) if self.adaptive else "fixed"
        launched = "a CUDA graph a round, captured by hand" if self.mode == "graph" else "step by step"
        return f"speculation: {self.drafter.name}, k {self.k if not self.adaptive else how}; {self.mode}: {launched}"

    # -- what runs on the device

    def verify(self, drafts: torch.Tensor, kind: str, logprobs: bool) -> None:
        """The target's choices behind the last token and each of drafts [B, k], and all that follows from them."""
        session, k = self.session, drafts.shape[1]
        reads_first = self.drafter.reads_first if k else None  # the next plain step drafts nothing
        lengths = session.cache.lengths
        x = kernels.feed(session.token, drafts, lengths, self.model.tok_embeddings.weight)
        hidden, norm = self.model.run(x, DecodeStep(session.cache, k + 1))
        logits, best, choice = candidates(self.model, session, hidden, slice(None), kind, norm)
        slots = session.cursor[:, None] + torch.arange(k + 1, device=lengths.device) if logprobs else None
        kernels.accept(
            best, choice, drafts, token=session.token, ring=session.ring, cursor=session.cursor, done=session.done,
            flag=session.nan, lengths=lengths, limit=session.limit, stop_ids=session.stop_ids, history=self.history,
            tally=self.tally, ahead=reads_first or self.model.layers[0].attention.wqkv,
        )  # fmt: skip
        if logprobs:
            note_logprobs(session, logits, slice(None), slots % RING)

    def round(self, k: int, kind: str, logprobs: bool, missed: int = 1) -> None:
        """One round with k drafts."""
        self.verify(self.drafter.propose(k, kind, missed), kind, logprobs)

    def plain(self, kind: str, logprobs: bool) -> None:
        """As many plain steps as the drafter can catch up with, and a round with one draft, to see if it has become better.

        The draft that the round before may have kept was not fed to the drafter either: one step less than it has tokens.
        """
        for _ in range(CATCH_UP - 2):
            self.verify(self.session.ring[:, :0].contiguous(), kind, logprobs)
        self.round(1, kind, logprobs, missed=CATCH_UP - 1)

    # -- what the host does

    def begin(self, kind: str, logprobs: bool) -> None:
        """A new run, whose choices take `kind`: counts from zero. What is known of acceptance stays."""
        self.prepare(kind, logprobs)
        self.what = kind, logprobs
        self.tally.zero_()
        self.seen = torch.zeros(self.tally.shape[1:], dtype=torch.int32)
        self.launches: Counter[int] = Counter()
        self.pending: deque = deque()

    def admit(self, row: int, prompt: list[int]) -> None:
        """Sequence `row` has this prompt in the target's cache, and its first token chosen."""
        self.history[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int32)
        self.history[row, len(prompt)] = self.session.token[row]
        self.drafter.admit(row, prompt)

    def prepare(self, kind: str, logprobs: bool) -> None:
        """Captures and times all rounds of a kind, once, with nobody in the session."""
        if (self.k, kind, logprobs) in self.work:
            return
        started = time.perf_counter()
        self.session.retire()
        self._capture(kind, logprobs)
        self.capture_sec += time.perf_counter() - started

    def _capture(self, kind: str, logprobs: bool) -> None:
        works = {k: lambda k=k: self.round(k, kind, logprobs) for k in self.choices}
        if self.adaptive:
            works[0] = lambda: self.plain(kind, logprobs)
        round_ms, draft_ms = {}, {}
        for k, work in works.items():
            self.work[k, kind, logprobs] = work = self.ready(work)
            round_ms[k] = self._time_ms(work) / (1 if k else CATCH_UP - 1)
            if k:
                draft_ms[k] = self._time_ms(self.ready(lambda k=k: self.drafter.propose(k, kind)))
        none = self.session.ring[:, :0].contiguous()
        self.plain_ms[kind] = self._time_ms(self.ready(lambda: self.verify(none, kind, logprobs)))
        self.round_ms[kind], self.draft_ms[kind] = round_ms, draft_ms

    def ready(self, work: Callable[[], None]) -> Callable[[], None]:
        """`work`, captured where that is the mode, after one run for what happens once. All graphs share one pool."""
        if self.mode == "eager":
            return work
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            work()
        self.pool = graph.pool()
        return graph.replay

    def _time_ms(self, work: Callable[[], None]) -> float:
        """The least of three runs, after one for what happens once."""
        times = []
        for _ in range(4):
            started = time.perf_counter()
            work()
            if self.session.x.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times[1:]) * 1e3

    def launch(self) -> int:
        """Launches the round that should pay most; returns before it has run. Gives the most tokens that a sequence may get."""
        k = best_k(self.acceptance.alpha, self.round_ms[self.what[0]]) if self.adaptive else self.k
        self.work[k, *self.what]()
        self.launches[k] += 1
        self.pending.append((max(k, 1), download(self.tally.sum(dim=0, dtype=torch.int32))))
        return k + 1 if k else CATCH_UP

    def observe(self) -> None:
        """Learns from the oldest launch that has not been looked at; the caller knows that it is over."""
        k, tally = self.pending.popleft()
        new, self.seen = tally - self.seen, tally
        drafted, kept = new
        tried = drafted[1] + kept[1:k].sum()  # a draft is tried where the one before it stood; the first always
        self.acceptance.add(int(kept[1:].sum()), int(tried))

    def statistics(self, timing: Timing, steps_without: int) -> dict:
        """What the rounds of this run came to. Times are of the rounds as they were timed once, with empty caches; so is the
        plain step, of which the run would have taken `steps_without`."""
        drafted, kept = self.seen.tolist()
        rounds, steps = drafted[1], drafted[0]
        share = lambda a, b: a / b if b else None
        kind = self.what[0]
        round_ms, draft_ms, plain_ms = self.round_ms[kind], self.draft_ms[kind], self.plain_ms[kind]
        return {
            "drafter": self.drafter.name,
            "k": self.k,
            "adaptive": self.adaptive,
            "rounds": rounds,
            "plain_steps": steps - rounds,
            "drafted": sum(drafted[1:]),
            "accepted": sum(kept[1:]),
            "acceptance_rate": share(sum(kept[1:]), sum(drafted[1:])),
            "acceptance_length": 1 + sum(kept[1:]) / rounds if rounds else None,
            "acceptance_by_position": [share(a, b) for a, b in zip(kept[1:], drafted[1:], strict=True)],
            "launches_by_k": dict(sorted(self.launches.items())),
            "switched_off": steps - rounds > rounds,
            "draft_ms": draft_ms,
            "verify_ms": {k: round_ms[k] - ms for k, ms in draft_ms.items()},
            "plain_ms": plain_ms,
            "speedup": share(steps_without * plain_ms / 1e3, timing.decode_sec),
        }
