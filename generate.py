"""Text from a model: prefill, the decode step and its graphs, streaming, stopping; the Python API and the command line.

Owns the run of a generation. Knows no file format: checkpoints come from convert_hf_checkpoint, text from tokenizer.
Letters: B sequences, H hidden size, V vocabulary, R entries of the output ring.

Everything a decode step reads and writes lives on the device in buffers with fixed addresses (`Session`). The host launches
steps without waiting for their tokens and reads the output ring some steps behind.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

import checkpoint
import convert_hf_checkpoint
import kernels
from kv_cache import KVCache, bytes_per_row
from model import DTYPES, SHAPES, DecodeStep, PrefillStep, Transformer, fused
from sampling import SamplingParams, SamplingState, choose
from tokenizer import TokenStream, load_tokenizer

DEMO = Path(__file__).parent / "assets" / "demo"
RING = 256  # tokens of a sequence that the device may be ahead of the host
MAX_STOP_IDS = 16
STEPS_PER_GRAPH = 8  # steps of one hand-captured graph: its launch costs the host about 10 us + 0.5 us a kernel node
LAUNCHES_AHEAD = 2  # graph launches in flight before the host reads the oldest one's tokens

# Read bandwidth in bytes/s that MBU is divided by: (measured by a 4 GiB sum, data sheet). Others: no MBU.
BANDWIDTH = {"NVIDIA H200": (4.44e12, 4.8e12), "NVIDIA H100 80GB HBM3": (None, 3.35e12)}

# ---------------------------------------------------------------- device state


class Session(nn.Module):
    """The cache and every other buffer that decode steps of up to `batch_size` sequences read and write."""

    def __init__(self, model: Transformer, batch_size: int, max_seq_len: int):
        super().__init__()
        config, weight = model.config, model.norm.weight
        device = weight.device
        self.batch_size, self.max_seq_len = batch_size, max_seq_len
        self.cache = KVCache(config, batch_size, max_seq_len, device, weight.dtype)
        self.sampling = SamplingState(batch_size, device)
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

    def status(self) -> torch.Tensor:
        """[B, R + 3] int32: what the host reads of a step: the ring, cursor, done and nan."""
        return torch.cat([self.ring, self.cursor[:, None], self.done[:, None], self.nan[:, None]], dim=1)


# ---------------------------------------------------------------- stages


def prefill(model: Transformer, session: Session, row: int, x: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Embedded tokens x [n, H] of sequence `row` from position `start` on -> the last one's hidden state [1, H]."""
    return model(x, PrefillStep(x.shape[0], session.cache, row, start))[-1:]


def choose_token(model: Transformer, session: Session, hidden: torch.Tensor, rows: slice, kind: str) -> torch.Tensor:
    """Hidden states of sequences `rows` -> their next tokens, and everything that follows from them, in the session.

    The token goes to the ring, its embedding to `x`; lengths grow by one, or the sequence is done. `kind`: SamplingParams.kind,
    the most general among the sequences. Returns the logits [B, V].
    """
    s, lengths = session.sampling, session.cache.lengths[rows]
    draw = {} if kind == "greedy" else {n: getattr(s, n)[rows] for n in ("temperature", "seed", "sample")}
    if fused(hidden, model.head):
        logits, best, token = kernels.head(
            hidden,
            model.head,
            norm=model.norm.weight,
            eps=model.config.norm_eps,
            vocab_size=model.vocab_limit,
            lengths=lengths,
            **draw,
        )
    else:
        logits = model.logits(hidden)
    if kind == "truncate" or not fused(hidden, model.head):
        cuts = {n: getattr(s, n)[rows] for n in ("top_k", "top_p", "min_p")} if kind == "truncate" else {}
        best, token = choose(logits, lengths, **draw, **cuts)
    kernels.advance(
        best, token, embedding=model.tok_embeddings.weight, lengths=lengths, x=session.x[rows],
        token=session.token[rows], ring=session.ring[rows], cursor=session.cursor[rows], done=session.done[rows],
        flag=session.nan[rows], limit=session.limit[rows], stop_ids=session.stop_ids[rows],
    )  # fmt: skip
    return logits


def decode_one_token(model: Transformer, session: Session, kind: str) -> torch.Tensor:
    """One step of every sequence of the session, in its buffers; returns the logits [B, V] that the tokens were chosen from."""
    hidden = model(session.x, DecodeStep(session.cache))
    return choose_token(model, session, hidden, slice(None), kind)


class Decoder:
    """Runs decode steps of a session in one of these ways; `path` says which one, and why.

    eager: step by step. compile: `torch.compile` (on a CPU, where there are no CUDA graphs). reduce-overhead: the same with
    Inductor's CUDA graphs. graph: CUDA graphs of several steps, captured by hand.
    """

    MODES = ("auto", "eager", "compile", "reduce-overhead", "graph")

    def __init__(self, model: Transformer, session: Session, mode: str):
        self.model, self.session = model, session
        on_gpu = session.x.is_cuda
        self.in_kernels = fused(session.x, model.head, *(layer.attention.wqkv for layer in model.layers))
        if mode == "auto":
            mode = "graph" if on_gpu else "compile"
        if mode in ("graph", "reduce-overhead") and not on_gpu:
            raise ValueError(f"decode mode: found {mode} on {session.x.device}, expected a CUDA device")
        self.mode = mode
        self.step = decode_one_token
        torch._dynamo.config.recompile_limit = 64  # of one function's compiled forms: each session of a process makes one
        if mode in ("compile", "reduce-overhead"):
            self.step = torch.compile(decode_one_token, fullgraph=True, mode="reduce-overhead" if on_gpu else None)
        elif mode == "graph" and not self.in_kernels:
            self.step = torch.compile(decode_one_token, fullgraph=True)
        self.graphs: dict[tuple[int, str], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self.logits: torch.Tensor | None = None  # [B, V] of the step launched last
        self.pool = None
        self.capture_sec = 0.0

    @property
    def path(self) -> str:
        work = "Rooflama's kernels" if self.in_kernels else "plain PyTorch"
        reason = {
            "eager": "step by step",
            "compile": "compiled by torch.compile",
            "reduce-overhead": "compiled by torch.compile, Inductor's CUDA graphs",
            "graph": f"CUDA graphs of {STEPS_PER_GRAPH} steps, captured by hand"
            + (" (nothing between the kernels to compile)" if self.in_kernels else " from the compiled step"),
        }[self.mode]
        return f"{self.mode}: {work}, {reason}"

    def run(self, steps: int, kind: str = "greedy") -> None:
        """Launches `steps` decode steps; returns before they have run."""
        if self.mode != "graph":
            for _ in range(steps):
                self.logits = self.step(self.model, self.session, kind)
            return
        while steps:
            n = STEPS_PER_GRAPH if steps >= STEPS_PER_GRAPH else 1
            graph, self.logits = self._graph(n, kind)
            graph.replay()
            steps -= n

    def _graph(self, steps: int, kind: str) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """The captured graph of so many steps and its last step's logits, made when first asked for. All share one pool."""
        key = (steps, kind)
        if key not in self.graphs:
            started = time.perf_counter()
            self._warm_up(kind)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                for _ in range(steps):
                    logits = self.step(self.model, self.session, kind)
            self.pool = graph.pool()
            self.graphs[key] = graph, logits
            self.capture_sec += time.perf_counter() - started
        return self.graphs[key]

    def _warm_up(self, kind: str) -> None:
        """Runs one step for what happens once (compiling, loading kernels), with every sequence absent: nothing is changed."""
        session = self.session
        state = (session.cache.lengths, session.done, session.x)
        saved = [t.clone() for t in state]
        session.cache.lengths.zero_()
        session.done.fill_(1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(self.model, session, kind)
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in zip(state, saved, strict=True):
            tensor.copy_(value)


class StatusReader:
    """Brings `Session.status` to the host without making it wait for the steps launched last."""

    def __init__(self, session: Session):
        self.session, self.on_gpu = session, session.x.is_cuda
        self.pending: deque = deque()

    def request(self, steps: int) -> None:
        """Asks for the status as it will be after everything launched so far, `steps` of it since the last request."""
        status, event = self.session.status(), None
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


# ---------------------------------------------------------------- the Python API


@dataclass
class Output:
    """What one prompt became."""

    tokens: list[int]  # without the prompt
    text: str | None  # None without a tokenizer
    finish_reason: str  # stop | length
    prompt_tokens: int


@dataclass
class Timing:
    """When things happened in one run of `Engine.generate`; seconds."""

    ttft_sec: float = 0.0  # until the first token of every sequence was chosen
    prefill_tokens: int = 0
    decode_sec: float = 0.0  # from then to the last step that the host read
    decode_tokens: int = 0  # emitted in that time, first tokens excluded
    step_ms: list[float] = field(default_factory=list)  # per step, each the mean of one launch
    host_sec: float = 0.0  # what launching cost the host
    context_sum: int = 0  # cached rows read, summed over steps and sequences
    steps: int = 0


class Engine:
    """A model ready to generate.

        engine = Engine.load("checkpoints/Llama-3.2-1B")
        outputs, timing = engine.generate(["Once upon a time"], SamplingParams(max_new_tokens=100))

    Prompts are text, lists of token ids, or embeddings [T, H].
    """

    def __init__(self, model: Transformer, tokenizer=None, *, decode_mode="eager", compile_prefill=False, max_seq_len=None):
        self.model, self.tokenizer = model, tokenizer
        self.decode_mode, self.max_seq_len = decode_mode, max_seq_len
        self.defaults: dict = {}  # sampling defaults of the checkpoint's generation_config.json
        self.stop_ids = set(model.config.eos_token_ids) | (set(tokenizer.eos_ids) if tokenizer else set())
        self.load_sec, self.load_notes = 0.0, []
        self.prefill = torch.compile(prefill, fullgraph=True, dynamic=True) if compile_prefill else prefill
        self.session: Session | None = None
        self.decoder: Decoder | None = None
        model.setup_rope(min(model.config.max_position_embeddings, max_seq_len or model.config.max_position_embeddings))

    @classmethod
    def load(cls, checkpoint_path, device=None, dtype=None, *, progress=False, **options) -> "Engine":
        """From a checkpoint directory, ours or an HF one. `dtype` overrides the checkpoint's; `options` as in __init__."""
        started = time.perf_counter()
        device = torch.device(device or default_device())
        directory = Path(checkpoint_path)
        config, tensors, report = convert_hf_checkpoint.load(directory, device, dtype, progress=progress)
        model = Transformer(config, device="meta", dtype=config.dtype)
        model.load_state_dict(tensors, strict=True, assign=True)
        tokenizer = load_tokenizer(directory, config.vocab_size, config.model_type)
        if tokenizer and tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"{directory}: the tokenizer: found {tokenizer.vocab_size} tokens, expected at most {config.vocab_size}"
            )
        engine = cls(model, tokenizer, **options)
        if tokenizer:
            model.vocab_limit = tokenizer.vocab_size
        defaults = checkpoint.default_generation(directory)
        engine.stop_ids |= set(defaults.pop("eos_token_id", ()))
        if not defaults.pop("do_sample", True):
            defaults = {"temperature": 0.0}
        fields = {f.name for f in dataclasses.fields(SamplingParams)}
        engine.defaults = {k: v for k, v in defaults.items() if k in fields}
        unused = [f"generation_config.json: {k} = {v} is not used" for k, v in defaults.items() if k not in fields]
        engine.load_sec, engine.load_notes = time.perf_counter() - started, [*report.notes, *unused]
        return engine

    @classmethod
    def random(cls, shape: str, device=None, dtype=None, **options) -> "Engine":
        """Random weights of a known shape (a key of model.SHAPES), made on the device."""
        if shape not in SHAPES:
            raise ValueError(f"random_weights: found {shape!r}, expected one of {', '.join(SHAPES)}")
        started = time.perf_counter()
        config = SHAPES[shape]
        model = Transformer(config, device=device or default_device(), dtype=dtype)
        fill_randomly(model)
        engine = cls(model, **options)
        synchronize(model.norm.weight.device)
        engine.load_sec = time.perf_counter() - started
        return engine

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def encode(self, prompt) -> list[int] | torch.Tensor:
        """A prompt as token ids (BOS in front of text, where the model has one), or embeddings as they are."""
        if isinstance(prompt, torch.Tensor):
            return prompt
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ValueError("prompt: found text, expected an integer or token ids (the checkpoint has no tokenizer)")
        return self.tokenizer.encode(prompt, bos=True)

    def generate(
        self,
        prompts: Sequence[str | list[int] | torch.Tensor],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        sample: int = 0,
        on_text: Callable[[int, str], None] | None = None,
    ) -> tuple[list[Output], Timing]:
        """Generates for every prompt at once. `on_text(i, text)` is given each piece of prompt i's text when it is final.

        ValueError: an empty prompt, or one that leaves no room in the context. FloatingPointError: the model gave NaN.
        """
        run = _Run(self, [self.encode(p) for p in prompts], params or self.params(), sample)
        for i, text in run.pieces():
            if on_text:
                on_text(i, text)
        return run.outputs(), run.timing

    def stream(self, prompt, params: SamplingParams | None = None, *, sample: int = 0) -> Iterator[str]:
        """The text of one prompt, piece by piece."""
        run = _Run(self, [self.encode(prompt)], params or self.params(), sample)
        with contextlib.closing(run.pieces()) as pieces:
            for _, text in pieces:
                yield text

    def params(self, **given) -> SamplingParams:
        """SamplingParams from the checkpoint's defaults, overridden by what is given (None = not given)."""
        return SamplingParams(**self.defaults | {k: v for k, v in given.items() if v is not None})

    def prepare(self, batch_size: int, length: int) -> None:
        """Makes a session for so many sequences of up to `length` tokens, unless the present one serves."""
        context = self.max_seq_len or self.model.config.max_position_embeddings
        s = self.session
        if s and s.batch_size == batch_size and s.max_seq_len >= min(length, context):
            return
        self.session = self.decoder = None  # frees the memory of the old one first
        rows = min(context, self.max_seq_len or -(-length // 1024) * 1024)  # whole thousands: few sessions for many lengths
        try:
            self.session = Session(self.model, batch_size, rows)
        except torch.cuda.OutOfMemoryError:
            raise MemoryError(self._no_room(batch_size, rows)) from None
        self.decoder = Decoder(self.model, self.session, self.decode_mode)

    def _no_room(self, batch_size: int, rows: int) -> str:
        each = bytes_per_row(self.model.config, self.model.norm.weight.dtype) * batch_size
        free = torch.cuda.mem_get_info(self.device)[0]
        return (
            f"the KV cache of {batch_size} x {rows} tokens needs {each * rows / 2**30:.2f} GiB, free {free / 2**30:.2f} GiB: "
            f"max_seq_len {max(0, int(free * 0.9) // each)} would fit"
        )


class _Run:
    """One call of Engine.generate: prefill every prompt, then decode until every sequence is done."""

    def __init__(self, engine: Engine, prompts: list, params, sample: int):
        self.engine, self.prompts, self.sample = engine, prompts, sample
        self.params = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        self.timing = Timing()
        context = engine.max_seq_len or engine.model.config.max_position_embeddings
        vocab = engine.model.config.vocab_size
        if not prompts or len(self.params) != len(prompts):
            raise ValueError(f"prompts: found {len(prompts)} with {len(self.params)} parameters, expected as many of each")
        for prompt in prompts:
            if len(prompt) == 0:
                raise ValueError("prompt: found no tokens, expected at least one")
            if len(prompt) >= context:
                raise ValueError(f"prompt: found {len(prompt)} tokens, expected fewer than the context of {context}")
            if not isinstance(prompt, torch.Tensor) and not all(0 <= t < vocab for t in prompt):
                raise ValueError(f"prompt: found token id {max(prompt)}, expected 0 to {vocab - 1}")
        for p in self.params:
            if any(i >= vocab for i in p.stop_token_ids):
                raise ValueError(f"stop_token_ids: found {max(p.stop_token_ids)}, expected 0 to {vocab - 1}")
        self.texts = [_Text(engine, p, prompt) for p, prompt in zip(self.params, prompts, strict=True)]
        engine.prepare(len(prompts), max(len(t) + p.max_new_tokens for t, p in zip(prompts, self.params, strict=True)))

    def pieces(self) -> Iterator[tuple[int, str]]:
        """Runs it all; yields (prompt index, text) as text becomes final."""
        engine, timing = self.engine, self.timing
        reader = StatusReader(engine.session)
        kind = max((p.kind for p in self.params), key=SamplingParams.KINDS.index)
        if engine.device.type == "cpu":
            kind = SamplingParams.KINDS[-1]  # the general one serves all: torch.compile compiles one step
        synchronize(engine.device)
        started = time.perf_counter()
        self._prefill(kind)
        reader.request(0)
        status, last, _ = reader.oldest()
        timing.ttft_sec = time.perf_counter() - started
        yield from self._emit(status)
        first_tokens = sum(len(t.tokens) for t in self.texts)
        decode_started, launched = last, 0
        most = max(p.max_new_tokens for p in self.params) - 1
        while launched < most and not all(t.finish_reason for t in self.texts):
            before = time.perf_counter()
            steps = min(STEPS_PER_GRAPH if engine.decoder.mode == "graph" else 1, most - launched)
            engine.decoder.run(steps, kind)
            reader.request(steps)
            timing.host_sec += time.perf_counter() - before
            launched += steps
            if len(reader.pending) > LAUNCHES_AHEAD * (1 if engine.device.type == "cuda" else 0):
                last = yield from self._read(reader, last)
        while reader.pending:
            last = yield from self._read(reader, last)
        timing.decode_sec = elapsed_sec(decode_started, last)
        timing.decode_tokens = sum(len(t.tokens) for t in self.texts) - first_tokens
        for i, text in enumerate(self.texts):
            if rest := text.finish():
                yield i, rest

    def _prefill(self, kind: str) -> None:
        engine, s = self.engine, self.engine.session
        model = engine.model
        s.cursor.zero_()
        s.nan.zero_()
        for row, (prompt, params) in enumerate(zip(self.prompts, self.params, strict=True)):
            n = len(prompt)
            stop = set(params.stop_token_ids) | (set() if params.ignore_eos else engine.stop_ids)
            if len(stop) > MAX_STOP_IDS:
                raise ValueError(f"stop_token_ids: found {len(stop)}, expected at most {MAX_STOP_IDS} with the model's own")
            s.stop_ids[row] = torch.tensor(sorted(stop) + [-1] * (MAX_STOP_IDS - len(stop)), dtype=torch.int32)
            s.sampling.set(row, params, self.sample)
            s.limit[row] = min(n + params.max_new_tokens, s.max_seq_len) - 1
            x = prompt if isinstance(prompt, torch.Tensor) else model.embed(torch.tensor(prompt, device=engine.device))
            hidden = engine.prefill(model, s, row, x.to(s.x.dtype))
            s.cache.lengths[row] = n
            s.done[row] = 0
            choose_token(model, s, hidden, slice(row, row + 1), kind)
            self.timing.prefill_tokens += n

    def _read(self, reader: StatusReader, last) -> Iterator[tuple[int, str]]:
        """Takes the oldest status; returns its timestamp."""
        status, stamp, steps = reader.oldest()
        timing = self.timing
        timing.steps += steps
        timing.step_ms += [elapsed_sec(last, stamp) / steps * 1e3] * steps
        going = [len(p) + len(t.tokens) for p, t in zip(self.prompts, self.texts, strict=True) if not t.finish_reason]
        timing.context_sum += steps * sum(going)
        yield from self._emit(status)
        return stamp

    def _emit(self, status: torch.Tensor) -> Iterator[tuple[int, str]]:
        ring, (cursor, done, nan) = status[:, :RING], status[:, RING:].T.tolist()
        for i, text in enumerate(self.texts):
            if nan[i]:
                raise FloatingPointError(f"the model's logits are NaN at token {len(text.tokens) + 1} of prompt {i}")
            if text.finish_reason:
                continue
            new = [int(ring[i, c % RING]) for c in range(text.read, cursor[i])]
            text.read = cursor[i]
            piece = text.push(new)
            if text.finish_reason and not done[i]:  # a stop string: only the host sees those
                self.engine.session.cache.lengths[i] = 0
                self.engine.session.done[i] = 1
            elif done[i] and not text.finish_reason:
                text.finish_reason = "length"
            if piece:
                yield i, piece

    def outputs(self) -> list[Output]:
        return [
            Output(t.tokens, t.text if self.engine.tokenizer else None, t.finish_reason or "length", len(p))
            for p, t in zip(self.prompts, self.texts, strict=True)
        ]


class _Text:
    """The growing answer to one prompt: its tokens, its text so far, and whether a stop was met."""

    def __init__(self, engine: Engine, params: SamplingParams, prompt: Sequence[int] | torch.Tensor = ()):
        self.params = params
        before = () if isinstance(prompt, torch.Tensor) else prompt
        self.stop_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else engine.stop_ids)
        self.stream = TokenStream(engine.tokenizer, before) if engine.tokenizer else None
        self.tokens: list[int] = []
        self.read = 0  # tokens taken from the ring
        self.text = ""  # final
        self.held = ""  # may yet become a stop string
        self.finish_reason: str | None = None

    def push(self, new: list[int]) -> str:
        """Adds tokens; returns the text that is final now. Tokens after a stop are dropped."""
        before = len(self.text)
        for token in new:
            self.tokens.append(token)
            if token in self.stop_ids:
                self.finish_reason = "stop"
            elif self.stream:
                self._add(self.stream.push(token))
            if self.finish_reason:
                break
        return self.text[before:]

    def finish(self) -> str:
        """What was still held back when the run ended."""
        before = len(self.text)
        if self.stream and self.held is not None:
            self._add(self.stream.finish())
            self.text += self.held
            self.held = ""
        return self.text[before:]

    def _add(self, piece: str) -> None:
        """Appends text, up to a stop string; holds back what may still become one."""
        self.held += piece
        found = [i for i in (self.held.find(s) for s in self.params.stop) if i >= 0]
        if found:
            self.text += self.held[: min(found)]
            self.held, self.stream, self.finish_reason = "", None, "stop"
            return
        keep = max((n for s in self.params.stop for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        self.text += self.held[: len(self.held) - keep]
        self.held = self.held[len(self.held) - keep :]


# ---------------------------------------------------------------- helpers


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def fill_randomly(model: Transformer, seed: int = 0) -> None:
    """Normal weights of deviation 0.02, gains of 1 +- 0.02: of a real model's size: zeros would run faster."""
    generator = torch.Generator(model.norm.weight.device).manual_seed(seed)
    for name, tensor in model.state_dict().items():
        tensor.normal_(1.0 if "norm" in name else 0.0, 0.02, generator=generator)


def weight_bytes_per_step(model: Transformer) -> int:
    """Bytes of weights that one decode step reads: all but the embedding table, of which it reads a row a sequence."""
    total = sum(b.numel() * b.element_size() for b in model.state_dict().values())
    return total if model.config.tie_word_embeddings else total - model.tok_embeddings.num_bytes


def floor_ms(engine: Engine, batch_size: int, context: float, bandwidth: float) -> float:
    """Time that a step's bytes take: all weights once, the cached rows of every sequence once."""
    kv = batch_size * context * bytes_per_row(engine.model.config, engine.model.norm.weight.dtype)
    return (weight_bytes_per_step(engine.model) + kv) / bandwidth * 1e3


def metrics(engine: Engine, timing: Timing, compile_sec: float) -> dict:
    """The metrics of one run, as `--json` gives them."""
    steps_ms = sorted(timing.step_ms)
    quantile = lambda q: steps_ms[min(len(steps_ms) - 1, int(q * len(steps_ms)))] if steps_ms else None
    out = {
        "load_sec": engine.load_sec,
        "compile_sec": compile_sec,
        "ttft_sec": timing.ttft_sec,
        "prefill_tok_per_sec": timing.prefill_tokens / timing.ttft_sec,
        "decode_tok_per_sec": timing.decode_tokens / timing.decode_sec if timing.decode_sec else None,
        "tpot_ms": {"p50": quantile(0.5), "p90": quantile(0.9), "p99": quantile(0.99)},
        "host_ms_per_step": timing.host_sec / timing.steps * 1e3 if timing.steps else None,
        "path": engine.decoder.path,
    }
    if engine.device.type == "cuda":
        out["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        out["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
    else:
        import resource

        out["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if timing.steps:
        config = engine.model.config
        kv_bytes = timing.context_sum / timing.steps * bytes_per_row(config, engine.model.norm.weight.dtype)
        rate = (weight_bytes_per_step(engine.model) + kv_bytes) / (statistics.median(steps_ms) / 1e3)
        out["bytes_per_step"] = weight_bytes_per_step(engine.model) + kv_bytes
        out["bandwidth_gbps"] = rate / 1e9
        name = torch.cuda.get_device_name() if engine.device.type == "cuda" else "cpu"
        measured, datasheet = BANDWIDTH.get(name, (None, None))
        out["mbu"] = rate / (measured or datasheet) if measured or datasheet else None
        out["mbu_divided_by_gbps"] = (measured or datasheet) / 1e9 if measured or datasheet else None
        out["mbu_datasheet"] = rate / datasheet if datasheet else None
        out["device"] = name
    return out


def report(m: dict, timing: Timing, out=sys.stderr) -> None:
    """The metrics of one run for a person."""
    ms = m["tpot_ms"]
    print(f"path: {m['path']}", file=out)
    print(
        f"load {m['load_sec']:.2f} s, compile {m['compile_sec']:.2f} s, time to first token {m['ttft_sec'] * 1e3:.1f} ms "
        f"({timing.prefill_tokens} prompt tokens, {m['prefill_tok_per_sec']:.0f} tok/s)",
        file=out,
    )
    if timing.steps:
        print(
            f"decode {m['decode_tok_per_sec']:.1f} tok/s, {ms['p50']:.3f} ms a step "
            f"(p90 {ms['p90']:.3f}, p99 {ms['p99']:.3f}), host {m['host_ms_per_step']:.3f} ms",
            file=out,
        )
        line = f"{m['bytes_per_step'] / 1e9:.3f} GB a step at {m['bandwidth_gbps']:.0f} GB/s"
        if m["mbu"]:
            line += f", MBU {m['mbu']:.1%} of {m['mbu_divided_by_gbps']:.0f} GB/s ({m['device']})"
        print(line, file=out)
    print(f"peak memory {m['peak_memory_bytes'] / 2**30:.2f} GiB", file=out)


# ---------------------------------------------------------------- command line


def add_flag(parser: argparse.ArgumentParser, name: str, **options) -> None:
    """A flag spelled with underscores (gpt-fast's habit) and with dashes."""
    names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    parser.add_argument(*names, dest=name, **options)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    flag = lambda name, **options: add_flag(parser, name, **options)
    flag(
        "checkpoint_path",
        type=Path,
        default=DEMO,
        help="a checkpoint directory, ours or Hugging Face's (default: the demo model)",
    )
    flag("random_weights", metavar="SHAPE", help=f"random weights instead of a checkpoint: {', '.join(SHAPES)}")
    flag("prompt", default="ROMEO:", help="text; an integer makes a synthetic prompt of so many tokens")
    flag("num_samples", type=int, default=1, help="samples, one after the other")
    flag("batch_size", type=int, default=1, help="copies of the prompt that are generated at once")
    flag("max_new_tokens", type=int, help="default 200")
    flag("temperature", type=float, help="0 is greedy (default: the checkpoint's, else 0.8)")
    flag("top_k", type=int, help="0 is off (default: the checkpoint's, else 200)")
    flag("top_p", type=float)
    flag("min_p", type=float)
    flag("seed", type=int, help="default 0")
    flag("stop", action="append", help="a string that ends the answer; may be given more than once")
    flag("ignore_eos", action="store_true", default=None, help="go on past the model's stop tokens")
    flag("compile", action="store_true", help="the fast decode path: CUDA graphs on a GPU, torch.compile on a CPU")
    flag("compile_prefill", action="store_true", help="compile the prefill too (for any prompt length)")
    flag(
        "decode_mode", choices=Decoder.MODES, help="force a way to run decode steps (default: auto with --compile, else eager)"
    )
    flag("max_seq_len", type=int, help="context: cache rows a sequence (default: what prompt and answer need)")
    flag("quantize", metavar="MODE", help="quantise at load: int8, fp8, int4, int4-gptq or int4-awq (see quantize.py)")
    flag("device", default=default_device())
    flag("dtype", choices=DTYPES, help="default: the checkpoint's")
    flag("profile", type=Path, metavar="FILE", help="write a trace of the last sample (chrome://tracing)")
    flag("json", action="store_true", help="one JSON object as the last line of standard output")
    flag("debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    for name in ("num_samples", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: found {getattr(args, name)}, expected at least 1")
    return args


def load_engine(args: argparse.Namespace) -> Engine:
    """The engine that the command line asks for."""
    dtype = DTYPES[args.dtype] if args.dtype else None
    mode = args.decode_mode or ("auto" if args.compile else "eager")
    options = {"decode_mode": mode, "compile_prefill": args.compile_prefill, "max_seq_len": args.max_seq_len}
    if args.quantize:
        import quantize

        if args.random_weights in SHAPES:
            return Engine(quantize.random_model(SHAPES[args.random_weights], args.quantize, args.device, dtype), **options)
    if args.random_weights:
        return Engine.random(args.random_weights, args.device, dtype, **options)
    engine = Engine.load(args.checkpoint_path, args.device, dtype, progress=True, **options)
    if args.quantize:
        quantize.quantize_at_load(engine.model, args.quantize, engine.tokenizer)
    return engine


def run(args: argparse.Namespace) -> None:
    engine = load_engine(args)
    for note in engine.load_notes:
        print(note, file=sys.stderr)
    given = {n: getattr(args, n) for n in ("temperature", "top_k", "top_p", "min_p", "seed", "max_new_tokens", "ignore_eos")}
    if engine.defaults:
        print(f"sampling defaults of the checkpoint: {engine.defaults}", file=sys.stderr)
    engine.defaults = {"temperature": 0.8, "top_k": 200} | engine.defaults
    params = engine.params(**given, stop=tuple(args.stop) if args.stop else None)
    prompt = args.prompt
    if prompt.isdecimal():
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(0, min(1024, engine.model.vocab_limit), (int(prompt),), generator=generator).tolist()
    prompts = [prompt] * args.batch_size

    compile_sec = 0.0
    if engine.decode_mode != "eager" or args.compile_prefill:
        started = time.perf_counter()
        engine.prepare(args.batch_size, len(engine.encode(prompt)) + params.max_new_tokens)
        engine.generate(prompts, dataclasses.replace(params, max_new_tokens=min(params.max_new_tokens, STEPS_PER_GRAPH + 2)))
        compile_sec = time.perf_counter() - started

    outputs, last = [], None
    stream = args.num_samples == args.batch_size == 1 and engine.tokenizer is not None
    on_text = (lambda _, text: print(text, end="", flush=True)) if stream else None
    for sample in range(args.num_samples):
        profiling = args.profile and sample == args.num_samples - 1
        with torch.profiler.profile() if profiling else contextlib.nullcontext() as profiler:
            new, timing = engine.generate(prompts, params, sample=sample, on_text=on_text)
        if profiling:
            profiler.export_chrome_trace(str(args.profile))
        outputs += new
        last = metrics(engine, timing, compile_sec)
        if not stream:
            for out in new:
                print(out.text if out.text is not None else " ".join(map(str, out.tokens)))
        else:
            print()
        report(last, timing)
    if args.json:
        print(json.dumps({"outputs": [asdict(o) for o in outputs], "metrics": last}))


def main(argv=None) -> int:
    """The command line. Exit status 0; 1 and one line on stderr for bad input; 2 for bad usage; 130 after Ctrl-C."""
    args = parse_args(argv)
    try:
        run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone: `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError, FloatingPointError, torch.cuda.OutOfMemoryError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
