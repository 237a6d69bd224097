"""Text from a model: prefill and the decode loop, streaming, stopping; the Python API and the command line.

Owns the run of a generation. Knows no file format: checkpoints come from convert_hf_checkpoint, text from tokenizer; what runs
on the device, and how it is launched, is decoding's.
Letters: T tokens of a prompt, H hidden size.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import checkpoint
import convert_hf_checkpoint
from decoding import (
    MAX_STOP_IDS,
    RING,
    STEPS_PER_GRAPH,
    Decoder,
    Session,
    StatusReader,
    check_mode,
    choose_token,
    decode_one_token,
    elapsed_sec,
    prefill,
)
from kv_cache import bytes_per_row
from model import DTYPES, SHAPES, Transformer
from sampling import KINDS, SamplingParams
from speculative import MAX_DRAFTS, Drafter, ModelDrafter, NgramDrafter, SelfDrafter, Speculator
from timing import BANDWIDTH, Timing, floor_ms, metrics, report, weight_bytes_per_step
from tokenizer import TokenStream, load_tokenizer

__all__ = [  # for the scripts, beside what is defined below
    "BANDWIDTH",
    "STEPS_PER_GRAPH",
    "Decoder",
    "decode_one_token",
    "floor_ms",
    "metrics",
    "weight_bytes_per_step",
]

DEMO = Path(__file__).parent / "assets" / "demo"
CHAT_TOKENS = 4096  # max_new_tokens of an answer in a conversation, unless told
LAUNCHES_AHEAD = 2  # graph launches in flight before the host reads the oldest one's tokens
WARM_UP_TOKENS = STEPS_PER_GRAPH + 2  # both sizes of graph
DRAFTS = 5  # of a round, unless told; gpt-fast's default
CHAT_ROWS = 8192  # cache rows that a conversation begins with, where the context is longer

# ---------------------------------------------------------------- the Python API


@dataclass
class TokenLogprob:
    """How likely the model found one token: natural logarithms of its distribution, before penalty, temperature and cuts."""

    token: int
    logprob: float
    top: list[tuple[int, float]]  # the likeliest tokens, best first


@dataclass
class Output:
    """What one prompt became."""

    tokens: list[int]  # without the prompt
    text: str | None  # None without a tokenizer
    finish_reason: str  # stop | length
    prompt_tokens: int
    logprobs: list[TokenLogprob] | None = None  # one a token, where SamplingParams.logprobs asks for them

    def to_dict(self) -> dict:
        """As `--json` gives it."""
        out = asdict(self)
        if self.logprobs is None:
            del out["logprobs"]
        return out


class Stream:
    """An iterator over the text of one answer, piece by piece. `close()` ends it early, as does the engine's next run."""

    def __init__(self, run: "_Run"):
        if len(run.texts) != 1:
            raise ValueError(f"n: found {len(run.texts)}, expected 1 where text is streamed")
        self._run, self._pieces = run, run.pieces()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)[1]

    def close(self) -> None:
        self._pieces.close()

    @property
    def output(self) -> Output:
        """What has come so far; all of it once the iterator has ended."""
        return self._run.outputs()[0]

    @property
    def timing(self) -> Timing:
        return self._run.timing


class Engine:
    """A model ready to generate.

        engine = Engine.load("checkpoints/Llama-3.2-1B")
        outputs, timing = engine.generate(["Once upon a time"], SamplingParams(max_new_tokens=100))

    Prompts are text, lists of token ids, or embeddings [T, H]. One run at a time: a new one ends the one before.
    """

    def __init__(self, model: Transformer, tokenizer=None, *, decode_mode="eager", compile_prefill=False, max_seq_len=None):
        context = model.config.max_position_embeddings
        if max_seq_len is not None and not 1 <= max_seq_len <= context:
            raise ValueError(f"max_seq_len: found {max_seq_len}, expected 1 to the model's context, {context}")
        check_mode(decode_mode, model.norm.weight.device)
        self.model, self.tokenizer = model, tokenizer
        self.decode_mode, self.max_seq_len = decode_mode, max_seq_len
        self.defaults: dict = {}  # sampling defaults of the checkpoint's generation_config.json
        self.stop_ids = set(model.config.eos_token_ids) | (set(tokenizer.eos_ids) if tokenizer else set())
        self.load_sec, self.load_notes = 0.0, []
        self.prefill = torch.compile(prefill, fullgraph=True, dynamic=True) if compile_prefill else prefill
        self.session: Session | None = None
        self.decoder: Decoder | None = None
        self.running: _Run | None = None  # whose sequences the session holds
        self.speculation: dict | None = None  # what `speculate` was asked for
        self.speculator: Speculator | None = None  # of the present session
        model.setup_rope((max_seq_len or context) + MAX_DRAFTS)

    @classmethod
    def load(cls, checkpoint_path, device=None, dtype=None, *, progress=False, **options) -> "Engine":
        """From a checkpoint directory, ours or an HF one. `dtype` overrides the checkpoint's; `options` as in __init__."""
        started = time.perf_counter()
        device = parse_device(device)
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
        model = Transformer(config, device=parse_device(device), dtype=dtype)
        fill_randomly(model)
        engine = cls(model, **options)
        synchronize(model.norm.weight.device)
        engine.load_sec = time.perf_counter() - started
        return engine

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.max_seq_len or self.model.config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def stop_ids_of(self, params: SamplingParams) -> set[int]:
        """The ids that end an answer."""
        return set(params.stop_token_ids) | (set() if params.ignore_eos else self.stop_ids)

    def encode(self, prompt) -> list[int] | torch.Tensor:
        """A prompt as token ids (BOS in front of text, where the model has one), or embeddings as they are."""
        if isinstance(prompt, torch.Tensor):
            width = self.model.config.hidden_size
            if prompt.dim() != 2 or prompt.shape[1] != width or not prompt.is_floating_point():
                raise ValueError(f"prompt: found {prompt.dtype} {list(prompt.shape)}, expected embeddings [T, {width}]")
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
        """Generates for every prompt at once, with parameters for all or for each. Gives an output a sample: `params.n` for the
        first prompt, and so on. `on_text(i, text)` is given each piece of output i's text when it is final.

        `sample`: the number of the first sample, for more of them later. ValueError: an empty prompt, or one that leaves no
        room in the context. FloatingPointError: the model gave NaN.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts: found one text, expected a list of prompts")
        run = _Run(self, [self.encode(p) for p in prompts], params or self.params(), sample)
        for i, text in run.pieces():
            if on_text:
                on_text(i, text)
        return run.outputs(), run.timing

    def stream(self, prompt, params: SamplingParams | None = None, *, sample: int = 0) -> Stream:
        """The text of one prompt, piece by piece. ValueError as for `generate`, at once."""
        return Stream(_Run(self, [self.encode(prompt)], params or self.params(), sample))

    def chat(self, messages: list[dict], params: SamplingParams | None = None, *, sample: int = 0, **variables) -> Stream:
        """The answer to a conversation of {"role", "content"} objects, piece by piece; `variables` as in encode_chat.

        What the conversation shares with the session's last run stays in the cache: only tokens from the first difference on
        are prefilled. ValueError: no chat template, or a conversation that fills the context.
        """
        if self.tokenizer is None:
            raise ValueError("chat: found a checkpoint without a tokenizer, expected one with a chat template")
        prompt = self.tokenizer.encode_chat(messages, **variables)
        params = params or self.params()
        rows = CHAT_ROWS
        while rows < len(prompt) + params.max_new_tokens:
            rows *= 2  # a cache that is outgrown is prefilled anew: let that be seldom
        self.prepare(1, rows)
        return Stream(_Run(self, [prompt], params, sample, continues=True))

    def params(self, **given) -> SamplingParams:
        """SamplingParams from the checkpoint's defaults, overridden by what is given (None = not given)."""
        return SamplingParams(**self.defaults | {k: v for k, v in given.items() if v is not None})

    def prepare(self, batch_size: int, length: int) -> None:
        """Makes a session for so many sequences of up to `length` tokens, unless the present one serves."""
        s = self.session
        if s and s.batch_size == batch_size and s.max_seq_len >= min(length, self.context):
            return
        self.session = self.decoder = self.speculator = None  # frees the memory of the old one first
        whole = -(-length // 1024) * 1024  # few sessions for many lengths
        rows = self.max_seq_len or min(self.context, whole)
        with contextlib.suppress(torch.cuda.OutOfMemoryError):  # what it had allocated is freed when the exception is gone
            session = Session(self.model, batch_size, rows, spare=MAX_DRAFTS if self.speculation else 0)
            if self.speculation:
                self.speculator = Speculator(self.model, session, **self.speculation)
            self.session = session
        if self.session is None:
            raise MemoryError(self._no_room(batch_size, rows))
        self.decoder = Decoder(self.model, self.session, self.decode_mode)

    def speculate(self, drafter: Drafter, k: int = DRAFTS, adaptive: bool = True) -> None:
        """From now on runs draft up to k tokens a round; what they give stays the same (speculative.py). `adaptive` lowers k,
        down to none, where that is faster. ValueError: a k, a draft model or a decode_mode that does not fit."""
        device, mode = self.device.type, self.decode_mode
        if not 1 <= k <= MAX_DRAFTS:
            raise ValueError(f"speculate_k: found {k}, expected 1 to {MAX_DRAFTS}")
        if mode not in ("auto", "eager", "graph"):
            raise ValueError(f"decode_mode: found {mode} with speculation, expected auto, eager or graph")
        if isinstance(drafter, ModelDrafter):
            draft = drafter.model
            if draft.vocab_limit != self.model.vocab_limit:
                found, expected = draft.vocab_limit, self.model.vocab_limit
                raise ValueError(f"the draft model's vocabulary: found {found} tokens, expected the target's {expected}")
            if draft.config.max_position_embeddings < self.context:
                found = draft.config.max_position_embeddings
                raise ValueError(f"the draft model's context: found {found}, expected at least {self.context} (max_seq_len)")
            draft.setup_rope(self.context + MAX_DRAFTS)
        mode = "graph" if mode == "graph" or (mode == "auto" and device == "cuda") else "eager"
        self.speculation = {"drafter": drafter, "k": k, "adaptive": adaptive, "mode": mode}
        self.session = self.decoder = self.speculator = None

    def _no_room(self, batch_size: int, rows: int) -> str:
        each = bytes_per_row(self.model.config, self.model.norm.weight.dtype) * batch_size
        gc.collect()
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(self.device)[0]
        return (
            f"the KV cache of {batch_size} x {rows} tokens needs {each * rows / 2**30:.2f} GiB, free {free / 2**30:.2f} GiB: "
            f"max_seq_len {max(0, int(free * 0.9) // each)} would fit"
        )


class _Run:
    """One call of Engine.generate, stream or chat: prefill every prompt, then decode until every sequence is done."""

    def __init__(self, engine: Engine, prompts: list, params, sample: int, continues: bool = False):
        self.engine, self.first_sample, self.continues = engine, sample, continues
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if not prompts or len(each) != len(prompts):
            raise ValueError(f"prompts: found {len(prompts)} with {len(each)} parameters, expected as many of each")
        for prompt, p in zip(prompts, each, strict=True):
            self._check(prompt, p)
        self.requests = list(zip(prompts, each, strict=True))
        # a sequence of the session for each sample of each prompt
        self.texts = [self._text(prompt, p) for prompt, p in self.requests for _ in range(p.n)]
        self.prompt_tokens = [len(prompt) for prompt, p in self.requests for _ in range(p.n)]
        self.timing = Timing()
        self.kind = max((p.kind for p in each), key=list(KINDS).index)
        if engine.device.type == "cpu":  # one kind for all that take no state of their own: torch.compile compiles one step
            self.kind = max(self.kind, "truncate", key=list(KINDS).index)
        self.logprobs = any(p.logprobs is not None for p in each)
        engine.prepare(len(self.texts), max(len(prompt) + p.max_new_tokens for prompt, p in self.requests))
        engine.running = self

    def _check(self, prompt: list[int] | torch.Tensor, params: SamplingParams) -> None:
        context, vocab = self.engine.context, self.engine.model.config.vocab_size
        if len(prompt) == 0:
            raise ValueError("prompt: found no tokens, expected at least one")
        if len(prompt) >= context:
            raise ValueError(f"prompt: found {len(prompt)} tokens, expected fewer than the context of {context}")
        if not isinstance(prompt, torch.Tensor) and not all(0 <= t < vocab for t in prompt):
            raise ValueError(f"prompt: found token id {max(prompt)}, expected 0 to {vocab - 1}")
        if any(i >= vocab for i in params.stop_token_ids):
            raise ValueError(f"stop_token_ids: found {max(params.stop_token_ids)}, expected 0 to {vocab - 1}")
        if (number := len(self.engine.stop_ids_of(params))) > MAX_STOP_IDS:
            raise ValueError(f"stop_token_ids: found {number}, expected at most {MAX_STOP_IDS} with the model's own")
        if self.engine.speculation and isinstance(prompt, torch.Tensor):
            raise ValueError("prompt: found embeddings with speculation, expected text or token ids")
        if self.engine.speculation and params.repetition_penalty != 1:
            raise ValueError(f"repetition_penalty: found {params.repetition_penalty} with speculation, expected 1")

    def _text(self, prompt: list[int] | torch.Tensor, params: SamplingParams) -> "_Text":
        tokenizer = self.engine.tokenizer
        alone = self.continues or isinstance(prompt, torch.Tensor)  # an answer in a chat is a text of its own
        stream = TokenStream(tokenizer, () if alone else prompt) if tokenizer else None
        return _Text(params, self.engine.stop_ids_of(params), stream)

    def pieces(self) -> Iterator[tuple[int, str]]:
        """Runs it all; yields (output index, text) as text becomes final."""
        engine = self.engine
        try:
            yield from self._decode()
            for i, text in enumerate(self.texts):
                if rest := text.finish():
                    yield i, rest
        finally:  # also after Ctrl-C or close(): what the device is still doing then is of no consequence
            if engine.running is self:
                engine.running = None
                engine.session.retire()
                for row, text in enumerate(self.texts):
                    if engine.session.cached[row]:  # the last token's K and V may not have been written
                        engine.session.cached[row] = engine.session.cached[row] + text.tokens[:-1]

    def _check_running(self) -> None:
        if self.engine.running is not self:
            raise RuntimeError("the engine has begun another run, which ended this one")

    def _decode(self) -> Iterator[tuple[int, str]]:
        self._check_running()
        engine, session, timing = self.engine, self.engine.session, self.timing
        if self.logprobs:
            session.keep_logprobs(engine.model.vocab_limit)
        if engine.speculator:
            engine.speculator.prepare(self.kind, self.logprobs)
            engine.speculator.begin()
        reader = StatusReader(session, self.logprobs)
        synchronize(engine.device)
        started = time.perf_counter()
        self._prefill()
        reader.request(0)
        status, last, _ = reader.oldest()
        timing.ttft_sec = time.perf_counter() - started
        yield from self._emit(status)
        if engine.speculator:
            yield from self._speculate(engine.speculator, reader, last)
            return
        launched, most = 0, max(p.max_new_tokens for _, p in self.requests) - 1
        ahead = LAUNCHES_AHEAD if engine.device.type == "cuda" else 0
        while launched < most and not all(t.finish_reason for t in self.texts):
            self._check_running()
            before = time.perf_counter()
            steps = min(STEPS_PER_GRAPH if engine.decoder.mode == "graph" else 1, most - launched)
            engine.decoder.run(steps, self.kind, self.logprobs)
            reader.request(steps)
            timing.host_sec += time.perf_counter() - before
            launched += steps
            if len(reader.pending) > ahead:
                last = yield from self._read(reader, last)
        while reader.pending:
            last = yield from self._read(reader, last)

    def _speculate(self, speculator: Speculator, reader: StatusReader, last) -> Iterator[tuple[int, str]]:
        """Rounds until every sequence is done. None is launched that those before it may make needless."""
        timing, in_flight = self.timing, deque()  # the most tokens that each launch may bring
        ahead = LAUNCHES_AHEAD if self.engine.device.type == "cuda" else 0
        while going := [t for t in self.texts if not t.finish_reason]:
            self._check_running()
            if len(in_flight) <= ahead and sum(in_flight) < max(t.params.max_new_tokens - len(t.tokens) for t in going):
                before = time.perf_counter()
                in_flight.append(speculator.launch(self.kind, self.logprobs))
                reader.request(1)
                timing.host_sec += time.perf_counter() - before
                continue
            tokens = sum(len(t.tokens) for t in going)
            last = yield from self._read(reader, last)
            timing.step_ms[-1] /= max(1, (sum(len(t.tokens) for t in going) - tokens) / len(going))  # of a token
            in_flight.popleft()
            speculator.observe()
        timing.speculation = speculator.statistics(self.kind)
        if timing.decode_sec:
            steps = max(len(t.tokens) for t in self.texts) - 1
            timing.speculation["speedup"] = steps * speculator.plain_ms / 1e3 / timing.decode_sec

    def _prefill(self) -> None:
        """Fills the cache with every prompt, once for all of its samples, and chooses each sample's first token."""
        engine, session, row = self.engine, self.engine.session, 0
        for prompt, params in self.requests:
            ids = None if isinstance(prompt, torch.Tensor) else prompt
            kept = _shared(session.cached[row], ids[:-1]) if self.continues else 0  # at least one token must run
            session.cached[row] = session.cached[row][:kept]
            x = prompt if ids is None else engine.model.embed(torch.tensor(ids[kept:], device=engine.device))
            hidden = engine.prefill(engine.model, session, row, x.to(session.x.dtype), kept)
            for i in range(params.n):
                if i:
                    session.copy_rows(row, row + i, len(prompt))
                session.cached[row + i] = ids or []
                session.admit(row + i, len(prompt), params, engine.stop_ids_of(params), self.first_sample + i)
                if self.kind == "penalize":
                    session.sampling.see(row + i, ids or [])
                choose_token(engine.model, session, hidden, slice(row + i, row + i + 1), self.kind, self.logprobs)
                if engine.speculator:
                    engine.speculator.admit(row + i, ids)
            row += params.n
            self.timing.prefill_tokens += len(prompt) - kept
            self.timing.kept_tokens += kept

    def _read(self, reader: StatusReader, last) -> Iterator[tuple[int, str]]:
        """Takes the oldest status, whose predecessor has the timestamp `last`; returns its own."""
        status, stamp, steps = reader.oldest()
        timing = self.timing
        timing.steps += steps
        timing.step_ms += [elapsed_sec(last, stamp) / steps * 1e3] * steps
        timing.decode_sec += elapsed_sec(last, stamp)
        going = [n + len(t.tokens) for n, t in zip(self.prompt_tokens, self.texts, strict=True) if not t.finish_reason]
        timing.context_sum += steps * sum(going)
        before = sum(len(t.tokens) for t in self.texts)
        yield from self._emit(status)
        timing.decode_tokens += sum(len(t.tokens) for t in self.texts) - before
        return stamp

    def _emit(self, status: torch.Tensor) -> Iterator[tuple[int, str]]:
        """Takes over the tokens that are new in a status (Session.status)."""
        session = self.engine.session
        ring, (cursor, done, nan) = status[:, :RING], status[:, RING : RING + 3].T.tolist()
        for i, text in enumerate(self.texts):
            if nan[i]:
                raise FloatingPointError(f"the model's logits are NaN at token {len(text.tokens) + 1} of output {i}")
            if text.finish_reason:
                continue
            entries = [c % RING for c in range(text.read, cursor[i])]
            text.read = cursor[i]
            before = len(text.tokens)
            piece = text.push(ring[i, entries].tolist())
            if text.logprobs is not None:
                taken = len(text.tokens) - before  # a stop drops the rest
                text.logprobs += _logprobs(status[i], entries[:taken], text.params.logprobs)
            if text.finish_reason and not done[i]:  # a stop string: only the host sees those
                session.retire(i)
            elif done[i] and not text.finish_reason:
                text.finish_reason = "length"
            if piece:
                yield i, piece

    def outputs(self) -> list[Output]:
        has_text = self.engine.tokenizer is not None
        return [
            Output(t.tokens, t.text if has_text else None, t.finish_reason or "length", n, t.logprobs)
            for n, t in zip(self.prompt_tokens, self.texts, strict=True)
        ]


def _shared(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _logprobs(status: torch.Tensor, entries: list[int], top: int) -> list[TokenLogprob]:
    """Those of ring entries, from one sequence's status."""
    ids, values = status[RING + 3 :].view(2, RING, -1)[:, entries]
    rows = zip(ids.tolist(), values.contiguous().view(torch.float32).tolist(), strict=True)
    return [TokenLogprob(i[0], v[0], list(zip(i[1 : top + 1], v[1 : top + 1], strict=True))) for i, v in rows]


class _Text:
    """The growing answer to one prompt: its tokens, its text so far, and whether a stop was met."""

    def __init__(self, params: SamplingParams, stop_ids: set[int], stream: TokenStream | None):
        self.params, self.stop_ids, self.stream = params, stop_ids, stream
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
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
        if self.stream:
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


def parse_device(name: str | torch.device | None) -> torch.device:
    """A device that is there; None is the default. ValueError names it."""
    try:
        device = torch.device(name or default_device())
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device: found {str(name)!r}, expected cpu" + (" or cuda" if torch.cuda.is_available() else ""))
    return device


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def fill_randomly(model: Transformer, seed: int = 0) -> None:
    """Normal weights of deviation 0.02, gains of 1 +- 0.02: of a real model's size: zeros would run faster."""
    generator = torch.Generator(model.norm.weight.device).manual_seed(seed)
    for name, tensor in model.state_dict().items():
        tensor.normal_(1.0 if "norm" in name else 0.0, 0.02, generator=generator)


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
    flag("batch_size", type=int, default=1, help="of these, how many are generated at once (num_samples times)")
    flag("interactive", action="store_true", help="a conversation in the terminal; /help in it says more")
    flag("system", metavar="TEXT", help="the system message of the conversation")
    flag("max_new_tokens", type=int, help=f"default 200; {CHAT_TOKENS} in a conversation")
    flag("temperature", type=float, help="0 is greedy (default: the checkpoint's, else 0.8)")
    flag("top_k", type=int, help="0 is off (default: the checkpoint's, else 200)")
    flag("top_p", type=float)
    flag("min_p", type=float)
    flag("repetition_penalty", type=float)
    flag("seed", type=int, help="default 0")
    flag("stop", action="append", help="a string that ends the answer; may be given more than once")
    flag("logprobs", type=int, metavar="N", help="with --json: each token's log-probability, and the N likeliest tokens")
    flag("ignore_eos", action="store_true", default=None, help="go on past the model's stop tokens")
    flag("compile", action="store_true", help="the fast decode path: CUDA graphs on a GPU, torch.compile on a CPU")
    flag("compile_prefill", action="store_true", help="compile the prefill too (for any prompt length)")
    flag(
        "decode_mode", choices=Decoder.MODES, help="force a way to run decode steps (default: auto with --compile, else eager)"
    )
    flag("draft_checkpoint_path", type=Path, help="speculate with this smaller model of the same vocabulary")
    flag("speculate", choices=("ngram", "self"), help="speculate without one: by look-up in the text, or the model in int4")
    flag(
        "speculate_k", type=int, help=f"the most tokens that are drafted at once (default {DRAFTS}); fewer where that is faster"
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
    if args.interactive and (args.json or args.num_samples * args.batch_size > 1):
        parser.error("--interactive: found with --json, --num_samples or --batch_size, expected none of them")
    if args.speculate and args.draft_checkpoint_path:
        parser.error("--speculate: found with --draft_checkpoint_path, expected one of them")
    if args.speculate_k is not None and not (args.speculate or args.draft_checkpoint_path):
        parser.error("--speculate_k: found without a drafter, expected --draft_checkpoint_path or --speculate")
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


def set_up_speculation(args: argparse.Namespace, engine: Engine) -> None:
    """The drafter that the command line asks for, if any."""
    if args.draft_checkpoint_path:
        dtype = DTYPES[args.dtype] if args.dtype else None
        draft = Engine.load(args.draft_checkpoint_path, args.device, dtype, progress=True)
        if engine.tokenizer and draft.tokenizer:
            pairs = ((e.tokenizer.token_bytes(i, False) for i in range(e.tokenizer.vocab_size)) for e in (engine, draft))
            if i := next((i for i, (ours, its) in enumerate(zip(*pairs, strict=False)) if ours != its), None):
                raise ValueError(
                    f"{args.draft_checkpoint_path}: token {i}: found another text, expected the target's vocabulary"
                )
        drafter = ModelDrafter(draft.model, f"draft model {args.draft_checkpoint_path.name}")
    elif args.speculate:
        drafter = NgramDrafter() if args.speculate == "ngram" else SelfDrafter(engine.model)
    else:
        return
    engine.speculate(drafter, DRAFTS if args.speculate_k is None else args.speculate_k)


def sampling_params(args: argparse.Namespace, engine: Engine) -> SamplingParams:
    """What the command line asks for, else the checkpoint's defaults, else gpt-fast's; says which the checkpoint's are."""
    if engine.defaults:
        print(f"sampling defaults of the checkpoint: {engine.defaults}", file=sys.stderr)
    engine.defaults = {"temperature": 0.8, "top_k": 200} | engine.defaults
    fields = {f.name for f in dataclasses.fields(SamplingParams)}
    given = {name: value for name, value in vars(args).items() if name in fields and value is not None}
    given["stop"] = tuple(args.stop or ())
    if args.interactive:
        given.setdefault("max_new_tokens", CHAT_TOKENS)
    return engine.params(**given)


def run(args: argparse.Namespace, engine: Engine, params: SamplingParams) -> None:
    """Generates the samples of one prompt and prints them."""
    params = dataclasses.replace(params, n=args.batch_size)
    prompt = args.prompt
    if prompt.isdecimal():
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(0, min(1024, engine.model.vocab_limit), (int(prompt),), generator=generator).tolist()

    compile_sec = 0.0
    if engine.decode_mode != "eager" or args.compile_prefill:
        started = time.perf_counter()
        engine.prepare(args.batch_size, len(engine.encode(prompt)) + params.max_new_tokens)
        engine.generate([prompt], dataclasses.replace(params, max_new_tokens=min(params.max_new_tokens, WARM_UP_TOKENS)))
        compile_sec = time.perf_counter() - started

    outputs, last = [], None
    streams = args.num_samples == args.batch_size == 1 and engine.tokenizer is not None
    on_text = (lambda _, text: print(text, end="", flush=True)) if streams else None
    for i in range(args.num_samples):
        profiling = args.profile and i == args.num_samples - 1
        with torch.profiler.profile() if profiling else contextlib.nullcontext() as profiler:
            new, timing = engine.generate([prompt], params, sample=i * args.batch_size, on_text=on_text)
        if profiling:
            profiler.export_chrome_trace(str(args.profile))
        outputs += new
        last = metrics(engine, timing, compile_sec)
        if i == 0:
            cache = engine.session.cache
            gib = cache.num_bytes / 2**30
            print(f"KV cache: {cache.batch_size} x {cache.max_seq_len} tokens, {gib:.2f} GiB", file=sys.stderr)
        if streams:
            print()
        else:
            for out in new:
                print(out.text if out.text is not None else " ".join(map(str, out.tokens)))
        report(last, timing)
    if args.json:
        print(json.dumps({"outputs": [o.to_dict() for o in outputs], "metrics": last}))


def main(argv=None) -> int:
    """The command line. Exit status 0; 1 and one line on stderr for bad input; 2 for bad usage; 130 after Ctrl-C."""
    args = parse_args(argv)
    try:
        engine = load_engine(args)
        for note in engine.load_notes:
            print(note, file=sys.stderr)
        set_up_speculation(args, engine)
        params = sampling_params(args, engine)
        if args.interactive:
            import chat

            chat.converse(engine, params, args.system)
        else:
            run(args, engine, params)
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
