"""The decode loop's device side: the state of running sequences, one step of it, and the graphs that repeat it.

Owns `Session` (every buffer that a step reads or writes, at a fixed address), the stages `choose_token` and `decode_one_token`,
and how the host launches steps (`Decoder`) and reads what they chose (`Session.status`) without making the device wait. Knows
neither text nor prompts nor when a run is over. A prompt is first run into the cache by a prefill.Prefiller; then its sequence
is admitted to a row, and `choose_token` takes the hidden state of its last token.
Letters: B sequences, H hidden size, V vocabulary, R entries of the output ring, L log-probabilities kept of a token.
"""

import struct
import time

import torch
from torch import nn

import kernels
from kernels.formats import Weight
from kv_cache import KVCache
from model import DecodeStep, Norm, Transformer, fused
from prefill import download, upload
from sampling import KINDS, MAX_LOGPROBS, SAMPLING_FIELDS, SamplingState, choose, penalize, sampling_fields

RING = 256  # tokens of a sequence that the device may be ahead of the host
MAX_STOP_IDS = 16
INVARIANT_SPLIT = 256  # cache rows that attention takes at a time where a sequence must not notice the others
STEPS_PER_GRAPH = 8  # steps of one hand-captured graph: its launch costs the host about 10 us + 0.5 us a kernel node
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # leading rows of a session that a step may be captured for
WAYS = {  # to run decode steps, by mode
    "eager": "step by step",
    "compile": "compiled by torch.compile",
    "reduce-overhead": "compiled by torch.compile, Inductor's CUDA graphs",
    "graph": f"CUDA graphs of {STEPS_PER_GRAPH} steps, captured by hand",
}

# What an admission sets of a row. All of it lies in one piece of memory, so that one scatter sets it.
ADMITTED = ("cursor", "done", "nan", "limit", "stop_ids", "lengths", "table", *SAMPLING_FIELDS)
LETTERS = {torch.int32: "i", torch.float32: "f", torch.int64: "q"}  # struct's

# ---------------------------------------------------------------- device state


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Session(nn.Module):
    """The cache and every other buffer that decode steps of up to `batch_size` sequences read and write.

    A row is a sequence's place in the buffers, a slot its place in the cache: `cache.table` says which slot a row has, so that
    a sequence may change its row and its K and V stay. Steps may run over the leading rows only. `spare`: as in KVCache;
    `cache`: one that is there, for a drafter that shares it.
    `cached[slot]` is the host's note of whose K and V a slot holds: the ids of its rows 0, 1, ...
    """

    def __init__(
        self,
        model: Transformer,
        batch_size: int,
        max_seq_len: int,
        cache_dtype: torch.dtype | None = None,
        batch_invariant=False,
        spare: int = 0,
        cache: KVCache | None = None,
    ):
        super().__init__()
        self.batch_invariant = batch_invariant  # what a sequence computes is the same, bit for bit, whatever the others are
        config, weight = model.config, model.norm.weight
        device = weight.device
        self.batch_size, self.max_seq_len, self.num_layers, self.spare = batch_size, max_seq_len, config.num_layers, spare
        split_size = INVARIANT_SPLIT if batch_invariant else None
        dtype = cache_dtype or weight.dtype
        self.cache = cache or KVCache(config, batch_size, max_seq_len, device, dtype, split_size, spare)
        self.cached: list[list[int]] = [[] for _ in range(batch_size)]
        self.sampling = SamplingState(batch_size, config.vocab_size, device)
        ints = lambda *shape, value=0: torch.full((batch_size, *shape), value, dtype=torch.int32, device=device)
        x = torch.zeros(batch_size, config.hidden_size, dtype=weight.dtype, device=device)
        self.register_buffer("x", x)  # the next step's input
        self.register_buffer("token", ints())  # the last one chosen
        self.register_buffer("ring", ints(RING))  # tokens, for the host
        self.register_buffer("cursor", ints())  # tokens written to the ring so far
        self.register_buffer("done", ints(value=1))
        self.register_buffer("nan", ints())  # a logit was NaN
        self.register_buffer("limit", ints())  # cache rows that a sequence may fill
        self.register_buffer("stop_ids", ints(MAX_STOP_IDS, value=-1))
        self._lay_out()
        for buffer in self.buffers():
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

    def _owner(self, name: str) -> nn.Module:
        """The module whose buffer has this name, of ADMITTED."""
        return next(module for module in (self, self.cache, self.sampling) if name in module._buffers)

    def _lay_out(self) -> None:
        """Gives the buffers of ADMITTED their places in one piece of memory.

        To torch they are strangers, each with a storage of its own (DLPack's doing): torch.compile refuses to write to views of
        one storage that differ in dtype.
        """
        owners = {name: self._owner(name) for name in ADMITTED}
        words = [-(-owner.get_buffer(name).nbytes // 256) * 64 for name, owner in owners.items()]  # aligned as allocations are
        self.memory = torch.zeros(sum(words), dtype=torch.int32, device=self.x.device)
        self.places: dict[str, tuple[int, str]] = {}  # of each buffer: its first word, and one row's struct
        first = 0
        for (name, owner), num_words in zip(owners.items(), words, strict=True):
            old = owner.get_buffer(name)
            new = self.memory[first : first + old.nbytes // 4].view(old.dtype).view(old.shape)
            setattr(owner, name, torch.from_dlpack(new).copy_(old))
            self.places[name] = first, f"{old[0].numel()}{LETTERS[old.dtype]}"
            first += num_words

    def admit(self, answers: list) -> None:
        """These sequences may choose their next token: one upload, one scatter, however many they are. Each has a `row`, its
        cache `slot`, the `length` of its prompt, `params`, `stop_ids` and `sample`, by which samples of a prompt differ."""
        index, words = [], []
        for a in answers:
            limit = min(a.length + a.params.max_new_tokens, self.max_seq_len) - 1
            fields = {"cursor": 0, "done": 0, "nan": 0, "limit": limit, "lengths": a.length, "table": a.slot}
            fields |= sampling_fields(a.params, a.sample)
            for name, (first, letters) in self.places.items():
                stops = [*a.stop_ids, *[-1] * (MAX_STOP_IDS - len(a.stop_ids))]
                packed = struct.pack(f"={letters}", *(stops if name == "stop_ids" else [fields[name]]))
                num_words = len(packed) // 4
                index += range(first + a.row * num_words, first + (a.row + 1) * num_words)
                words += struct.unpack(f"={num_words}i", packed)
        index, words = upload([index, words], torch.int64, self.memory.device)
        self.memory.index_copy_(0, index, words.int())

    def move(self, moves: list[tuple[int, int]]) -> None:
        """The sequence in row `source` goes on in row `target`, for each (source, target). Its K and V stay where they are."""
        source, target = upload(list(zip(*moves, strict=True)), torch.int64, self.x.device)
        of_steps = [self.x, self.token, self.ring, self.sampling.seen, self.logprob_ids, self.logprobs]
        for buffer in (*of_steps, *(self._owner(name).get_buffer(name) for name in ADMITTED)):
            if buffer is not None:
                buffer.index_copy_(0, target, buffer[source])
        self.cache.lengths.index_fill_(0, source, 0)
        self.done.index_fill_(0, source, 1)

    def retire(self, row: int | slice = slice(None)) -> None:
        """The sequence in `row`, or every one, takes no further part in steps."""
        self.cache.lengths[row] = 0
        self.done[row] = 1

    def clear(self) -> None:
        """Every row is free, and row i has slot i."""
        self.retire()
        torch.arange(self.batch_size, out=self.cache.table[:, 0])

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Gives one slot of the cache the first `length` rows of another."""
        for layer in range(self.num_layers):
            for cached in self.cache.layer(layer):
                cached[target, :, :length] = cached[source, :, :length]

    def status(self, rows: int, logprobs: bool) -> tuple:
        """What the host reads of a step's rows, as it will be after everything launched so far, and a timestamp, on a GPU the
        event to wait for. [rows, R + 3] int32: the ring, cursor, done and nan; then [R L] logprob_ids and [R L] logprobs, as
        the same bits, if asked for."""
        parts = [self.ring, self.cursor[:, None], self.done[:, None], self.nan[:, None]]
        if logprobs:
            parts += [self.logprob_ids.flatten(1), self.logprobs.view(torch.int32).flatten(1)]
        status = torch.cat([part[:rows] for part in parts], dim=1)
        if not status.is_cuda:
            return status, time.perf_counter()
        status = download(status)
        stamp = torch.cuda.Event(enable_timing=True)
        stamp.record()
        return status, stamp


# ---------------------------------------------------------------- stages


def settings_of(session: Session, kind: str, rows: slice) -> dict[str, torch.Tensor]:
    """The sampling parameters that a choice of this kind takes, of the sequences in `rows`."""
    return {name: getattr(session.sampling, name)[rows] for name in KINDS[kind]}


def candidates(
    model: Transformer, session: Session, hidden, rows: slice, kind: str, norm: Norm | None = None
) -> tuple[torch.Tensor, ...]:
    """Hidden states [B * T, H] of the last T tokens of the sequences in `rows` -> logits [B * T, V], and the candidates (value,
    id), [B * T, any number] each, among which `kernels.advance` or `kernels.accept` chooses. `kind` and `norm` as for
    choose_token."""
    lengths = session.cache.lengths[rows]
    settings = settings_of(session, kind, rows)
    history = {name: settings.pop(name) for name in ("seen", "repetition_penalty") if name in settings}
    if fused(hidden, model.head):
        norm, eps = model.norm.weight if norm is None else norm, model.config.norm_eps
        draw = settings if kind == "draw" else {}
        logits, best, token = kernels.head(
            hidden, model.head, norm=norm, eps=eps, vocab_size=model.vocab_limit, lengths=lengths, **draw
        )
        if kind == "truncate":
            best, token = kernels.choose(logits, best, lengths=lengths, **settings)
        elif kind == "penalize":
            best, token = choose_in_kernels(penalize(logits, **history), settings | {"lengths": lengths})
    else:
        logits = model.logits(hidden)
        penalized = penalize(logits, **history) if history else logits
        if settings and kernels.runs_kernels(logits):
            settings = settings_of(session, "truncate", rows)
        if len(hidden) > len(lengths):  # T tokens each
            sequence, position = kernels.token_positions(lengths, len(hidden))
            lengths, settings = position.int(), {name: setting[sequence] for name, setting in settings.items()}
        if not kernels.runs_kernels(logits):
            best, token = choose(penalized, lengths, **settings)
        elif settings:
            best, token = choose_in_kernels(penalized, settings | {"lengths": lengths})
        else:
            best, token = kernels.partial_argmax(penalized)
    return logits, best, token


def choose_token(
    model: Transformer, session: Session, hidden, rows: slice, kind: str, logprobs: bool = False, norm: Norm | None = None
) -> torch.Tensor:
    """Hidden states of the sequences in `rows` -> their next tokens, and everything that follows from them, in the session.

    The token goes to the ring, its embedding to `x`; lengths grow by one, or the sequence is done. `kind`: SamplingParams.kind,
    the most general among the sequences; `logprobs`: note them beside the ring; `norm`: the final norm where `Transformer.run`
    gave it along with these hidden states. Returns the logits [B, V].
    """
    cuts = kind == "truncate" and fused(hidden, model.head)  # then one kernel does all that is left to do
    logits, best, token = candidates(model, session, hidden, rows, "greedy" if cuts else kind, norm)
    slots = session.cursor[rows, None] % RING if logprobs else None  # where the token will be put
    first = model.layers[0].attention  # read next
    state = {
        "lengths": session.cache.lengths[rows], "token": session.token[rows], "ring": session.ring[rows],
        "cursor": session.cursor[rows], "done": session.done[rows], "flag": session.nan[rows], "limit": session.limit[rows],
        "stop_ids": session.stop_ids[rows], "embedding": model.tok_embeddings.weight, "x": session.x[rows], "ahead": first.wqkv,
    }  # fmt: skip
    if cuts:
        kernels.choose_and_advance(logits, best, **settings_of(session, kind, rows), **state, then=first.wo)
    else:
        kernels.advance(best, token, **state)
    if kind == "penalize":
        session.sampling.seen[rows].scatter_(1, session.token[rows, None].long(), True)
    if logprobs:
        note_logprobs(session, logits, rows, slots)
    return logits


def choose_in_kernels(logits, settings: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernels.choose` of any logits [B, V], with its settings [B] -> each one's (value, id), [B, 1] both."""
    return kernels.choose(logits, kernels.partial_argmax(logits)[0], **settings)


def note_logprobs(session: Session, logits: torch.Tensor, rows: slice, slots: torch.Tensor) -> None:
    """Entries `slots` [B, T] of each ring: the log-probabilities of the token there and of the likeliest, from its logits
    [B * T, V] as they are: before penalty, temperature and cuts."""
    logprobs, slots = logits.log_softmax(dim=-1).unflatten(0, slots.shape), slots.long()
    token = session.ring[rows].gather(1, slots)[..., None]
    top = logprobs.topk(session.logprobs.shape[2] - 1, dim=-1)
    entry = slots[..., None].expand(-1, -1, session.logprobs.shape[2])
    session.logprobs[rows].scatter_(1, entry, torch.cat([logprobs.gather(2, token.long()), top.values], dim=2))
    session.logprob_ids[rows].scatter_(1, entry, torch.cat([token, top.indices.int()], dim=2))


def decode_one_token(
    model: Transformer, session: Session, kind: str, logprobs: bool = False, rows: int | None = None
) -> torch.Tensor:
    """One step of the sequences in the session's leading `rows` (None: in all), in its buffers; returns the logits [rows, V]
    that the tokens were chosen from."""
    hidden, norm = model.run(session.x[:rows], DecodeStep(session.cache, rows=rows))
    return choose_token(model, session, hidden, slice(rows), kind, logprobs, norm)


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
    """Runs decode steps of a session in one of WAYS; `path` says which one, and whose kernels they are."""

    MODES = ("auto", *WAYS)

    def __init__(self, model: Transformer, session: Session, mode: str):
        self.model, self.session = model, session
        weights = [model.head, *(w for layer in model.layers for w in (layer.attention.wqkv, layer.feed_forward.w13))]
        self.plain = session.x.is_cuda and all(weight.packed is None for weight in weights)
        self.mode = mode = check_mode(mode, session.x.device)
        torch._dynamo.config.recompile_limit = 64  # of one function's compiled forms: each session of a process makes one
        options = {"compile": {}, "reduce-overhead": {"mode": "reduce-overhead"}, "graph": {"dynamic": False}}
        self.step = torch.compile(decode_one_token, fullgraph=True, **options[mode]) if mode in options else decode_one_token
        self.graphs: dict[tuple[int, int, str, bool], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self.logits: torch.Tensor | None = None  # [rows, V] of the step launched last
        self.pool = torch.cuda.graph_pool_handle() if mode == "graph" else None  # memory of all graphs, of prefill's too
        self.compiled: set[tuple[str, bool]] = set()  # what torch.compile has seen
        self.capture_sec = 0.0  # for graphs and compiling
        heads = model.config.head_dim in kernels.HEAD_SIZES
        if session.batch_invariant and not (heads and self.in_kernels(session.batch_size)):
            if not kernels.runs_kernels(session.x):
                raise ValueError(f"batch_invariant: found device {session.x.device}, expected a CUDA device")
            found = f"{session.batch_size} sequences of {session.x.dtype}"
            raise ValueError(f"batch_invariant: found {found}, expected at most {kernels.MAX_ROWS}, and a model in our kernels")

    def choose_token(self, *arguments) -> torch.Tensor:
        """The stage `choose_token` of this decoder's model and session."""
        with kernels.batch_invariant(self.session.batch_invariant):
            return choose_token(self.model, self.session, *arguments)

    def in_kernels(self, rows: int) -> bool:
        """Whether every linear of a step of so many rows is one of our kernels."""
        weights = [module for module in self.model.layers.modules() if isinstance(module, Weight)]
        with kernels.batch_invariant(self.session.batch_invariant):
            return fused(self.session.x[:rows], *weights, self.model.head)

    def serves(self, batch_size: int) -> bool:
        """Whether so many sequences can run in this session, at their own cost."""
        fixed = self.mode in ("compile", "reduce-overhead")
        return batch_size == self.session.batch_size if fixed else batch_size <= self.session.batch_size

    def rows_for(self, needed: int) -> int:
        """The leading rows that a step works on, where the first `needed` have sequences: as many, but graphs are captured for
        the sizes of BUCKETS, and what torch.compile compiles has one size."""
        if self.mode in ("compile", "reduce-overhead"):
            return self.session.batch_size
        if self.mode == "graph":
            needed = next((b for b in BUCKETS if b >= needed), needed)
        return min(needed, self.session.batch_size)

    def is_ready(self, rows: int, kind: str, logprobs: bool) -> bool:
        """Whether such steps run without a graph to be captured first."""
        return self.mode != "graph" or (STEPS_PER_GRAPH, rows, kind, logprobs) in self.graphs

    @property
    def path(self) -> str:
        in_kernels = self.in_kernels(self.session.batch_size)
        work = "Rooflama's kernels" if in_kernels else "cuBLAS and Rooflama's kernels" if self.plain else "plain PyTorch"
        head_dim = self.model.config.head_dim
        if self.session.x.is_cuda and head_dim not in kernels.HEAD_SIZES:
            work += f" (attention in plain PyTorch, slow: head size {head_dim}, the kernel has {kernels.HEAD_SIZES})"
        path = f"{self.mode}: {work}, {WAYS[self.mode]}"
        if self.mode == "graph":
            path += " (nothing between the kernels to compile)" if in_kernels or self.plain else " from the compiled step"
        return path

    def run(self, steps: int, kind: str = "greedy", logprobs: bool = False, rows: int | None = None) -> None:
        """Launches `steps` decode steps, as `decode_one_token` does them; returns before they have run. `rows`: as `rows_for`
        has it; None is the whole session."""
        rows = rows or self.session.batch_size
        with kernels.batch_invariant(self.session.batch_invariant):
            if self.mode == "graph":
                for n in [STEPS_PER_GRAPH] * (steps // STEPS_PER_GRAPH) + [1] * (steps % STEPS_PER_GRAPH):
                    graph, self.logits = self._graph(n, rows, kind, logprobs)
                    graph.replay()
                return
            some = None if rows == self.session.batch_size else rows
            for _ in range(steps):
                started = time.perf_counter()
                self.logits = self.step(self.model, self.session, kind, logprobs, some)
                if self.mode != "eager" and (kind, logprobs) not in self.compiled:
                    self.compiled.add((kind, logprobs))
                    self.capture_sec += time.perf_counter() - started

    def _graph(self, steps: int, rows: int, kind: str, logprobs: bool) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """The captured graph of so many steps and its last step's logits, made when first asked for. All share one pool."""
        key = (steps, rows, kind, logprobs)
        if key not in self.graphs:
            started = time.perf_counter()
            step = decode_one_token if self.plain or self.in_kernels(rows) else self.step
            work = lambda: step(self.model, self.session, kind, logprobs, rows)
            self._warm_up(work)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                for _ in range(steps):
                    logits = work()
            self.graphs[key] = graph, logits
            self.capture_sec += time.perf_counter() - started
        return self.graphs[key]

    def _warm_up(self, work) -> None:
        """Runs one step for what happens once (compiling, loading kernels), with every sequence absent: nothing is changed."""
        session = self.session
        state = [session.cache.lengths, session.done, session.x]
        state += [session.sampling.seen] if session.sampling.seen is not None else []
        saved = [t.clone() for t in state]
        session.retire()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in zip(state, saved, strict=True):
            tensor.copy_(value)


def elapsed_sec(earlier, later) -> float:
    """Between two timestamps of Session.status."""
    return later - earlier if isinstance(later, float) else earlier.elapsed_time(later) / 1e3
