"""The decode loop's device side: the state of running sequences, one step of it, and the graphs that repeat it.

Owns `Session` (every buffer that a step reads or writes, at a fixed address), the stages `prefill` and `decode_one_token`, and
how the host launches steps (`Decoder`) and reads what they chose (`StatusReader`) without making the device wait. Knows neither
text nor prompts nor when a run is over.
Letters: B sequences, H hidden size, V vocabulary, R entries of the output ring, L log-probabilities kept of a token.
"""

import time
from collections import deque

import torch
from torch import nn

import kernels
from kv_cache import KVCache
from model import DecodeStep, PrefillStep, Transformer, fused
from sampling import KINDS, MAX_LOGPROBS, SamplingParams, SamplingState, choose, penalize

RING = 256  # tokens of a sequence that the device may be ahead of the host
MAX_STOP_IDS = 16
STEPS_PER_GRAPH = 8  # steps of one hand-captured graph: its launch costs the host about 10 us + 0.5 us a kernel node

# ---------------------------------------------------------------- device state


class Session(nn.Module):
    """The cache and every other buffer that decode steps of `batch_size` sequences read and write.

    `cached[row]` is the host's note of whose K and V the cache holds: the ids of rows 0, 1, ... of sequence `row`. `cache`: one
    that is there; `spare`: else, rows of the cache beyond max_seq_len.
    """

    def __init__(self, model: Transformer, batch_size: int, max_seq_len: int, spare: int = 0, cache: KVCache | None = None):
        super().__init__()
        config, weight = model.config, model.norm.weight
        device = weight.device
        self.batch_size, self.max_seq_len, self.num_layers, self.spare = batch_size, max_seq_len, config.num_layers, spare
        self.cache = cache or KVCache(config, batch_size, max_seq_len, device, weight.dtype, spare)
        self.cached: list[list[int]] = [[] for _ in range(batch_size)]
        self.sampling = SamplingState(batch_size, config.vocab_size, device)
        buffers = {
            "x": torch.zeros(batch_size, config.hidden_size, dtype=weight.dtype, device=device),  # the next step's input
            "token": torch.zeros(batch_size, dtype=torch.int32, device=device),  # the last one chosen
            "ring": torch.zeros(batch_size, RING, dtype=torch.int32, device=device),  # tokens, for the host
            "cursor": torch.zeros(batch_size, dtype=torch.int32, device=device),  # tokens written to the ring so far
            "done": torch.ones(batch_size, dtype=torch.int32, device=device),
            "nan": torch.zeros(batch_size, dtype=torch.int32, device=device),  # a logit was NaN
            "limit": torch.zeros(batch_size, dtype=torch.int32, device=device),  # cache rows that a sequence may fill
            "stop_ids": torch.full((batch_size, MAX_STOP_IDS), -1, dtype=torch.int32, device=device),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)
            torch._dynamo.mark_static_address(buffer)
        self.register_buffer("logprob_ids", None)  # [B, R, L] int32, beside the ring: the chosen token, then the likeliest
        self.register_buffer("logprobs", None)  # [B, R, L] float32, theirs

    def keep_logprobs(self, vocab_size: int) -> None:
        """Makes the buffers that `decode_one_token(..., logprobs=True)` writes."""
        if self.logprobs is None:
            shape = (self.batch_size, RING, 1 + min(MAX_LOGPROBS, vocab_size))
            self.logprob_ids = torch.zeros(shape, dtype=torch.int32, device=self.x.device)
            self.logprobs = torch.zeros(shape, dtype=torch.float32, device=self.x.device)
            torch._dynamo.mark_static_address(self.logprob_ids)
            torch._dynamo.mark_static_address(self.logprobs)

    def admit(self, row: int, length: int, params: SamplingParams, stop_ids: set[int], sample: int) -> None:
        """Sequence `row`, whose `length` tokens are in the cache, may choose its next one. Once idle, or a new session."""
        self.stop_ids[row] = torch.tensor(sorted(stop_ids) + [-1] * (MAX_STOP_IDS - len(stop_ids)), dtype=torch.int32)
        self.sampling.set(row, params, sample)
        self.limit[row] = min(length + params.max_new_tokens, self.max_seq_len) - 1
        self.cursor[row] = 0
        self.nan[row] = 0
        self.cache.lengths[row] = length
        self.done[row] = 0

    def retire(self, row: int | slice = slice(None)) -> None:
        """Sequence `row`, or every one, takes no further part in steps."""
        self.cache.lengths[row] = 0
        self.done[row] = 1

    def copy_rows(self, source: int, target: int, length: int) -> None:
        """Gives sequence `target` the first `length` cache rows of another."""
        for layer in range(self.num_layers):
            for cached in self.cache.layer(layer):
                cached[target, :, :length] = cached[source, :, :length]

    def status(self, logprobs: bool = False) -> torch.Tensor:
        """[B, R + 3] int32: what the host reads of a step: the ring, cursor, done and nan; then [R L] logprob_ids and [R L]
        logprobs, as the same bits, if asked for."""
        parts = [self.ring, self.cursor[:, None], self.done[:, None], self.nan[:, None]]
        if logprobs:
            parts += [self.logprob_ids.flatten(1), self.logprobs.view(torch.int32).flatten(1)]
        return torch.cat(parts, dim=1)


# ---------------------------------------------------------------- stages


def prefill(model: Transformer, session: Session, row: int, x: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Embedded tokens x [n, H] of sequence `row` from position `start` on -> the last one's hidden state [1, H]."""
    return model(x, PrefillStep(x.shape[0], session.cache, row, start))[-1:]


def candidates(model: Transformer, session: Session, hidden, rows: slice, kind: str) -> tuple[torch.Tensor, ...]:
    """Hidden states [B * T, H] of the last T tokens of sequences `rows` -> logits [B * T, V], and the candidates (value, id),
    [B * T, any number] each, among which `kernels.advance` or `kernels.accept` chooses. `kind` as for choose_token."""
    lengths = session.cache.lengths[rows]
    settings = {name: getattr(session.sampling, name)[rows] for name in KINDS[kind]}
    history = {name: settings.pop(name) for name in ("seen", "repetition_penalty") if name in settings}
    if fused(hidden, model.head):
        norm, eps = model.norm.weight, model.config.norm_eps
        draw = settings if kind == "draw" else {}
        logits, best, token = kernels.head(
            hidden, model.head, norm=norm, eps=eps, vocab_size=model.vocab_limit, lengths=lengths, **draw
        )
        if kind == "truncate":
            best, token = kernels.choose(logits, best, lengths=lengths, **settings)
        elif kind == "penalize":
            penalized = penalize(logits, **history)
            best, token = kernels.choose(penalized, penalized.amax(dim=-1, keepdim=True), lengths=lengths, **settings)
    else:
        logits = model.logits(hidden)
        sequence, position = kernels.token_positions(lengths, hidden.shape[0])
        settings = {name: setting[sequence] for name, setting in settings.items()}
        best, token = choose(penalize(logits, **history) if history else logits, position, **settings)
    return logits, best, token


def choose_token(model: Transformer, session: Session, hidden, rows: slice, kind: str, logprobs: bool = False) -> torch.Tensor:
    """Hidden states of sequences `rows` -> their next tokens, and everything that follows from them, in the session.

    The token goes to the ring, its embedding to `x`; lengths grow by one, or the sequence is done. `kind`: SamplingParams.kind,
    the most general among the sequences; `logprobs`: note them beside the ring. Returns the logits [B, V].
    """
    logits, best, token = candidates(model, session, hidden, rows, kind)
    lengths = session.cache.lengths[rows]
    slots = session.cursor[rows, None] % RING if logprobs else None  # where `advance` puts the token
    kernels.advance(
        best, token, embedding=model.tok_embeddings.weight, lengths=lengths, x=session.x[rows],
        token=session.token[rows], ring=session.ring[rows], cursor=session.cursor[rows], done=session.done[rows],
        flag=session.nan[rows], limit=session.limit[rows], stop_ids=session.stop_ids[rows],
        ahead=model.layers[0].attention.wqkv,
    )  # fmt: skip
    if kind == "penalize":
        session.sampling.seen[rows].scatter_(1, session.token[rows, None].long(), True)
    if logprobs:
        note_logprobs(session, logits, rows, slots)
    return logits


def note_logprobs(session: Session, logits: torch.Tensor, rows: slice, slots: torch.Tensor) -> None:
    """Entries `slots` [B, T] of each ring: the log-probabilities of the token there and of the likeliest, from its logits
    [B * T, V] as they are: before penalty, temperature and cuts."""
    logprobs, slots = logits.log_softmax(dim=-1).unflatten(0, slots.shape), slots.long()
    token = session.ring[rows].gather(1, slots)[..., None]
    top = logprobs.topk(session.logprobs.shape[2] - 1, dim=-1)
    entry = slots[..., None].expand(-1, -1, session.logprobs.shape[2])
    session.logprobs[rows].scatter_(1, entry, torch.cat([logprobs.gather(2, token.long()), top.values], dim=2))
    session.logprob_ids[rows].scatter_(1, entry, torch.cat([token, top.indices.int()], dim=2))


def decode_one_token(model: Transformer, session: Session, kind: str, logprobs: bool = False) -> torch.Tensor:
    """One step of every sequence of the session, in its buffers; returns the logits [B, V] that the tokens were chosen from."""
    hidden = model(session.x, DecodeStep(session.cache))
    return choose_token(model, session, hidden, slice(None), kind, logprobs)


def check_mode(mode: str, device: torch.device) -> str:
    """The way to run decode steps that a mode of Decoder.MODES means on a device."""
    if mode not in Decoder.MODES:
        raise ValueError(f"decode_mode: found {mode!r}, expected one of {', '.join(Decoder.MODES)}")
    if mode == "auto":
        return "graph" if device.type == "cuda" else "compile"
    if mode in ("graph", "reduce-overhead") and device.type != "cuda":
        raise ValueError(f"decode_mode: found {mode} on {device}, expected a CUDA device")
    return mode


class Decoder:
    """Runs decode steps of a session in one of these ways; `path` says which one, and why.

    eager: step by step. compile: `torch.compile`, without CUDA graphs. reduce-overhead: the same with Inductor's CUDA graphs.
    graph: CUDA graphs of several steps, captured by hand.
    """

    MODES = ("auto", "eager", "compile", "reduce-overhead", "graph")

    def __init__(self, model: Transformer, session: Session, mode: str):
        self.model, self.session = model, session
        self.in_kernels = fused(session.x, model.head, *(layer.attention.wqkv for layer in model.layers))
        self.mode = mode = check_mode(mode, session.x.device)
        self.step = decode_one_token
        torch._dynamo.config.recompile_limit = 64  # of one function's compiled forms: each session of a process makes one
        if mode in ("compile", "reduce-overhead"):
            self.step = torch.compile(decode_one_token, fullgraph=True, mode=None if mode == "compile" else mode)
        elif mode == "graph" and not self.in_kernels:
            self.step = torch.compile(decode_one_token, fullgraph=True)
        self.graphs: dict[tuple[int, str, bool], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self.logits: torch.Tensor | None = None  # [B, V] of the step launched last
        self.pool = None
        self.capture_sec = 0.0

    @property
    def path(self) -> str:
        work = "Rooflama's kernels" if self.in_kernels else "plain PyTorch"
        head_dim = self.model.config.head_dim
        if self.session.x.is_cuda and head_dim not in kernels.HEAD_SIZES:
            work += f" (attention in plain PyTorch, slow: head size {head_dim}, the kernel has {kernels.HEAD_SIZES})"
        reason = {
            "eager": "step by step",
            "compile": "compiled by torch.compile",
            "reduce-overhead": "compiled by torch.compile, Inductor's CUDA graphs",
            "graph": f"CUDA graphs of {STEPS_PER_GRAPH} steps, captured by hand"
            + (" (nothing between the kernels to compile)" if self.in_kernels else " from the compiled step"),
        }[self.mode]
        return f"{self.mode}: {work}, {reason}"

    def run(self, steps: int, kind: str = "greedy", logprobs: bool = False) -> None:
        """Launches `steps` decode steps, as `decode_one_token` does them; returns before they have run."""
        if self.mode != "graph":
            for _ in range(steps):
                self.logits = self.step(self.model, self.session, kind, logprobs)
            return
        while steps:
            n = STEPS_PER_GRAPH if steps >= STEPS_PER_GRAPH else 1
            graph, self.logits = self._graph(n, kind, logprobs)
            graph.replay()
            steps -= n

    def _graph(self, steps: int, kind: str, logprobs: bool) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """The captured graph of so many steps and its last step's logits, made when first asked for. All share one pool."""
        key = (steps, kind, logprobs)
        if key not in self.graphs:
            started = time.perf_counter()
            self._warm_up(kind, logprobs)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                for _ in range(steps):
                    logits = self.step(self.model, self.session, kind, logprobs)
            self.pool = graph.pool()
            self.graphs[key] = graph, logits
            self.capture_sec += time.perf_counter() - started
        return self.graphs[key]

    def _warm_up(self, kind: str, logprobs: bool) -> None:
        """Runs one step for what happens once (compiling, loading kernels), with every sequence absent: nothing is changed."""
        session = self.session
        state = [session.cache.lengths, session.done, session.x]
        state += [session.sampling.seen] if session.sampling.seen is not None else []
        saved = [t.clone() for t in state]
        session.cache.lengths.zero_()
        session.done.fill_(1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(self.model, session, kind, logprobs)
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in zip(state, saved, strict=True):
            tensor.copy_(value)


class StatusReader:
    """Brings `Session.status` to the host without making it wait for the steps launched last."""

    def __init__(self, session: Session, logprobs: bool = False):
        self.session, self.on_gpu, self.logprobs = session, session.x.is_cuda, logprobs
        self.pending: deque = deque()

    def request(self, steps: int) -> None:
        """Asks for the status as it will be after everything launched so far, `steps` of it since the last request."""
        status, event = self.session.status(self.logprobs), None
        if self.on_gpu:
            status = torch.empty(status.shape, dtype=status.dtype, pin_memory=True).copy_(status, non_blocking=True)
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.pending.append((status, event, steps, time.perf_counter()))

    def oldest(self) -> tuple[torch.Tensor, object, int]:
        """(status, timestamp, steps) of the oldest request; waits for it."""
        status, event, steps, now = self.pending.popleft()
        if event is None:
            return status, now, steps
        event.synchronize()
        return status, event, steps


def elapsed_sec(earlier, later) -> float:
    """Between two timestamps of a StatusReader."""
    return later - earlier if isinstance(later, float) else earlier.elapsed_time(later) / 1e3
