"""Requests through the rows of a session: prefill, decode steps, stops and text, with a free row taken by the next request.

Owns `Run`, the one loop behind every way to generate: which request has which row and slot, how many steps are launched at
once, and what came of each. Knows neither files nor flags; what runs on the device, and how it is launched, is decoding's.
Letters: T tokens of a prompt, H hidden size.
"""

import itertools
import math
import time
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from decoding import MAX_STOP_IDS, RING, STEPS_PER_GRAPH, elapsed_sec, synchronize
from prefill import Piece, upload
from sampling import KINDS, SamplingParams
from timing import Timing
from tokenizer import TokenStream

LAUNCHES_AHEAD = 2  # launches in flight before the host reads the oldest one's tokens
CHUNK = 2048  # prompt tokens between two launches of steps, about, where others wait for theirs
STEPS_WHILE_WAITING = 2  # of a launch while prompts wait: a row that met a stop idles until the host reads of it
# Steps left that are worth a new graph of fewer rows. Capturing took 0.15 to 1.4 s for the 1B on an H200, and 16 rows for 1
# cost it 0.18 ms a step (benchmarks/h200_decode.jsonl).
STEPS_WORTH_CAPTURE = 1024

# ---------------------------------------------------------------- what goes in and comes out


@dataclass(frozen=True)
class Request:
    """A prompt, and what is asked of it."""

    prompt: str | Sequence[int] | list[dict] | torch.Tensor  # text, ids, a conversation, or embeddings [T, H]
    params: SamplingParams
    id: str | int | None = None  # the caller's own
    source: str = ""  # where it came from, for errors


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


class Answer:
    """One sample of a request: its tokens, its text so far, and whether a stop was met."""

    def __init__(self, params: SamplingParams, stop_ids: set[int], stream: TokenStream | None):
        self.params, self.stop_ids, self.stream = params, stop_ids, stream
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self.read = 0  # tokens taken from the ring
        self.text = ""  # final
        self.held = ""  # may yet become a stop string
        self.finish_reason: str | None = None
        self.job: _Job | None = None
        self.length = 0  # of the prompt
        self.sample = 0  # its number among the prompt's
        self.index = 0  # among the answers of the run
        self.row = self.slot = -1  # of the session, while it has them
        self.steps_left = 0  # after so many it is surely done

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
        """What was still held back when the answer ended."""
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


@dataclass
class _Job:
    """A request on its way: its tokens, and an answer for each of its samples."""

    request: Request
    prompt: array | torch.Tensor
    answers: list[Answer]
    slot: int | None = None  # where the prompt is prefilled, the first sample's
    filled: int = 0  # tokens of the prompt in the cache
    hidden: torch.Tensor | None = None  # [1, H] of the last of these

    @property
    def ids(self) -> list[int]:
        """The prompt's tokens; none of embeddings."""
        return [] if isinstance(self.prompt, torch.Tensor) else list(self.prompt)


# ---------------------------------------------------------------- the loop


@dataclass
class _Launch:
    """What the host notes of steps that it has launched, and what they will have chosen."""

    status: torch.Tensor  # as Session.status has it
    stamp: torch.cuda.Event | float
    steps: int
    tokens: int  # the most that they may bring a sequence
    answers: list[Answer | None]  # by row
    queued: bool  # prompts were waiting


def steps_to_launch(left: list[int], waiting: bool, most: int) -> int:
    """Steps of the next launch. `left`: those after which each sequence is surely done; without a stop it is not done before.

    While prompts wait a launch ends where the first sequence does, so that its row is taken in the next step, and is short,
    since the host sees a stop only some launches later.
    """
    if waiting:
        return min(most, STEPS_WHILE_WAITING, min((n for n in left if n), default=0))
    return min(most, max(left, default=0))


class Run:
    """One call of Engine.generate, stream, chat or generate_many: requests into rows, until all have their answers.

    `rows`: sequences at once, or a function of the longest one's length that gives them (None: a row for every sample).
    `chunked`: prompts are prefilled while others are decoded, not all of them first. ValueError: a request that cannot run.
    """

    def __init__(self, engine, requests: Sequence[Request], *, rows=None, sample=0, continues=False, chunked=False):
        self.engine, self.continues = engine, continues
        self.waiting = jobs = deque(map(self._job, requests))
        if not jobs:
            raise ValueError("prompts: found none, expected at least one")
        self.answers: list[Answer] = []
        for job in jobs:
            for number, answer in enumerate(job.answers, sample):
                answer.job, answer.length, answer.sample, answer.index = job, len(job.prompt), number, len(self.answers)
                self.answers.append(answer)
        longest = max(answer.length + answer.params.max_new_tokens for answer in self.answers)
        rows = rows(longest) if callable(rows) else rows
        self.batch_size = len(self.answers) if rows is None else min(rows, len(self.answers))
        if (most := max(len(job.answers) for job in jobs)) > self.batch_size:
            raise ValueError(f"n: found {most} samples of a prompt, expected at most the batch size, {self.batch_size}")
        # a prompt that is cut elsewhere gets other last bits
        self.prefill_tokens = CHUNK if chunked or engine.batch_invariant else math.inf
        self.timing = Timing()
        self.rows: list[Answer | None] = [None] * self.batch_size
        self.free_slots = list(range(self.batch_size))
        engine.prepare(self.batch_size, longest)
        if any(answer.logprobs is not None for answer in self.answers):
            engine.session.keep_logprobs(engine.model.vocab_limit)
        self.pending: deque[_Launch] = deque()
        self.ahead = LAUNCHES_AHEAD if engine.device.type == "cuda" else 0
        engine.running = self

    def _job(self, request: Request) -> _Job:
        stop_ids = set(request.params.stop_token_ids) | (set() if request.params.ignore_eos else self.engine.stop_ids)
        try:
            prompt = self.engine.encode(request.prompt)
            self._check(prompt, request.params, len(stop_ids))
        except ValueError as error:
            if not request.source:
                raise
            raise ValueError(f"{request.source}, {error}") from None
        are_ids = not isinstance(prompt, torch.Tensor)
        is_chat = self.continues or (are_ids and isinstance(next(iter(request.prompt), None), dict))
        tokenizer = self.engine.tokenizer
        before = prompt if are_ids and not is_chat else ()  # an answer in a conversation is a text of its own
        streams = [TokenStream(tokenizer, before) if tokenizer else None for _ in range(request.params.n)]
        answers = [Answer(request.params, stop_ids, stream) for stream in streams]
        return _Job(request, array("i", prompt) if are_ids else prompt, answers)

    def _check(self, prompt: list[int] | torch.Tensor, params: SamplingParams, num_stop_ids: int) -> None:
        context, vocab = self.engine.context, self.engine.model.config.vocab_size
        if len(prompt) == 0:
            raise ValueError("prompt: found no tokens, expected at least one")
        if len(prompt) >= context:
            raise ValueError(f"prompt: found {len(prompt)} tokens, expected fewer than the context of {context}")
        if not isinstance(prompt, torch.Tensor):
            for token in prompt:
                if not 0 <= token < vocab:
                    raise ValueError(f"prompt: found token id {token}, expected 0 to {vocab - 1}")
        if any(i >= vocab for i in params.stop_token_ids):
            raise ValueError(f"stop_token_ids: found {max(params.stop_token_ids)}, expected 0 to {vocab - 1}")
        if num_stop_ids > MAX_STOP_IDS:
            raise ValueError(f"stop_token_ids: found {num_stop_ids}, expected at most {MAX_STOP_IDS} with the model's own")
        if self.engine.speculation and isinstance(prompt, torch.Tensor):
            raise ValueError("prompt: found embeddings with speculation, expected text or token ids")
        if self.engine.speculation and params.repetition_penalty != 1:
            raise ValueError(f"repetition_penalty: found {params.repetition_penalty} with speculation, expected 1")

    def pieces(self) -> Iterator[tuple[Answer, str]]:
        """Runs it all; yields text as it becomes final, and every answer when it ends."""
        engine = self.engine
        try:
            yield from self._decode()
        finally:  # also after Ctrl-C or close(): what the device is still doing then is of no consequence
            if engine.running is self:
                engine.running = None
                for answer in filter(None, self.rows):
                    self._free(answer)
                engine.session.clear()

    def outputs(self, job: _Job | None = None) -> list[Output]:
        """What has come so far of one job, or of all."""
        has_text = self.engine.tokenizer is not None
        return [
            Output(a.tokens, a.text if has_text else None, a.finish_reason or "length", a.length, a.logprobs)
            for a in (job.answers if job else self.answers)
        ]

    def _check_running(self) -> None:
        if self.engine.running is not self:
            raise RuntimeError("the engine has begun another run, which ended this one")

    def _decode(self) -> Iterator[tuple[Answer, str]]:
        self._check_running()
        timing, speculator = self.timing, self.engine.speculator
        if speculator:
            speculator.begin(*self._what(self.answers))
        synchronize(self.engine.device)
        started, captured = time.perf_counter(), self.engine.prefiller.capture_sec
        self._prefill()
        self._request(0, 0)
        launch = self._oldest()
        self.last = launch.stamp
        timing.compile_sec = self.engine.prefiller.capture_sec - captured
        timing.ttft_sec = time.perf_counter() - started - timing.compile_sec
        yield from self._emit(launch)
        while any(self.rows) or self.waiting or self.pending:
            self._check_running()
            admitted = self._prefill()
            before = time.perf_counter()
            steps, tokens = self._launch_round(speculator) if speculator else self._launch()
            if steps or admitted:
                self._request(steps, tokens)
            if self.waiting:
                for answer in filter(None, self.rows):
                    if not answer.steps_left:  # its last tokens are in the status just asked for
                        self._free(answer)
            timing.host_sec += time.perf_counter() - before
            while self.pending and (len(self.pending) > self.ahead or not steps):
                yield from self._read()
        if speculator:
            longest = max(len(answer.tokens) for answer in self.answers)  # many prompts: answers that were given out have none
            timing.speculation = speculator.statistics(timing, max(longest - 1, timing.decode_tokens // self.batch_size))

    # ------------------------------------------------------------ into rows

    def _prefill(self) -> bool:
        """Fills the cache with waiting prompts, about `prefill_tokens` of them, and admits those that are complete: whether
        there were any. A prompt is prefilled once for all of its samples."""
        engine, session, tokens, jobs, pieces = self.engine, self.engine.session, 0, [], []
        while self.waiting and tokens < self.prefill_tokens:
            job = self.waiting[0]
            if job.slot is None:
                if len(self.free_slots) < len(job.answers):
                    break
                self._begin(job)
            end = min(len(job.prompt), job.filled + self.prefill_tokens)  # cut where others have no say
            pieces.append(Piece(job.slot, job.prompt[job.filled : end], job.filled))
            jobs.append(job)
            tokens += end - job.filled
            job.filled = end
            if end == len(job.prompt):
                self.waiting.popleft()
        if pieces:
            hidden = engine.prefiller.run(pieces)
            for job, last in zip(jobs, hidden.split(1), strict=True):
                session.cached[job.slot], job.hidden = job.ids[: job.filled], last
        self.timing.prefill_tokens += tokens
        complete = [job for job in jobs if job.filled == len(job.prompt)]
        if complete:
            self._admit(complete)
        return bool(complete)

    def _begin(self, job: _Job) -> None:
        """Gives a request its slots. Where it continues what its slot holds, only what differs is left to prefill."""
        for answer in job.answers:
            answer.slot = self.free_slots.pop(0)
        job.slot, cached = job.answers[0].slot, self.engine.session.cached
        if self.continues:
            job.filled = _shared(cached[job.slot], job.ids[:-1])  # at least one token must run
            self.timing.kept_tokens += job.filled
        cached[job.slot] = cached[job.slot][: job.filled]

    def _admit(self, jobs: list[_Job]) -> None:
        """Requests whose prompts are in the cache get rows, and every sample its first token."""
        engine, session = self.engine, self.engine.session
        answers = [answer for job in jobs for answer in job.answers]
        free_rows = [row for row, answer in enumerate(self.rows) if answer is None]
        for row, answer in zip(free_rows, answers, strict=False):
            if answer.slot != answer.job.slot:
                session.copy_slot(answer.job.slot, answer.slot, answer.length)
                session.cached[answer.slot] = answer.job.ids
            answer.steps_left = min(answer.params.max_new_tokens, session.max_seq_len - answer.length) - 1
            answer.row, self.rows[row] = row, answer
        session.admit(answers)
        for answer in answers:
            if answer.params.kind == "penalize":
                session.sampling.see(answer.row, upload(answer.job.ids, torch.int64, engine.device))
        # one choice for each stretch of neighbouring rows
        for _, group in itertools.groupby(enumerate(answers), key=lambda pair: pair[1].row - pair[0]):
            group = [answer for _, answer in group]
            hidden = torch.cat([answer.job.hidden for answer in group])
            rows = slice(group[0].row, group[-1].row + 1)
            engine.decoder.choose_token(hidden, rows, *self._what(group))
        if engine.speculator:
            for answer in answers:
                engine.speculator.admit(answer.row, answer.job.ids)

    def _free(self, answer: Answer) -> None:
        """Its row and its slot may be taken by another. The slot keeps what is known to be in it."""
        self.rows[answer.row] = None
        self.free_slots = sorted([*self.free_slots, answer.slot])
        if not isinstance(answer.job.prompt, torch.Tensor):  # the last token's K and V may not have been written
            self.engine.session.cached[answer.slot] = answer.job.ids + answer.tokens[:-1]

    # ------------------------------------------------------------ steps

    def _what(self, answers: list[Answer]) -> tuple[str, bool]:
        """The kind of choice that a step of these answers takes, and whether log-probabilities are kept."""
        kinds = {answer.params.kind for answer in answers}
        if self.engine.device.type == "cpu":  # one kind for all without a state of their own: torch.compile compiles one step
            kinds.add("truncate")
        return max(kinds, key=list(KINDS).index), any(answer.logprobs is not None for answer in answers)

    def _launch(self) -> tuple[int, int]:
        """Launches decode steps of all rows; returns how many, and the most tokens that they bring a sequence."""
        decoder, answers = self.engine.decoder, [answer for answer in self.rows if answer]
        most = STEPS_PER_GRAPH if decoder.mode == "graph" else 1
        steps = steps_to_launch([answer.steps_left for answer in answers], bool(self.waiting), most)
        if steps:
            what = self._what(answers)
            if not self.waiting:
                self._draw_together(answers, what)
            decoder.run(steps, *what, rows=self._rows())
            for answer in answers:
                answer.steps_left = max(0, answer.steps_left - steps)
        return steps, steps

    def _launch_round(self, speculator) -> tuple[int, int]:
        """Launches a round of speculation of all rows, unless those before it may have brought all that is asked for; returns
        as `_launch`. `steps_left` stays as it was at first: a round says only afterwards how many tokens it brought."""
        left = (answer.steps_left + 1 - max(1, len(answer.tokens)) for answer in self.rows if answer)
        if sum(launch.tokens for launch in self.pending) >= max(left, default=0):
            return 0, 0
        return 1, speculator.launch()

    def _reach(self) -> int:
        """Leading rows that have all sequences, at least one."""
        return max((row + 1 for row, answer in enumerate(self.rows) if answer), default=1)

    def _rows(self) -> int:
        """Leading rows that a step works on: those with sequences, and those that waiting prompts are about to take."""
        return self.engine.decoder.rows_for(min(self.batch_size, self._reach() + len(self.waiting)))

    def _draw_together(self, answers: list[Answer], what: tuple[str, bool]) -> None:
        """Moves sequences into the first rows, where steps of fewer rows can then do and pay."""
        decoder, few = self.engine.decoder, self.engine.decoder.rows_for(len(answers))
        pays = decoder.is_ready(few, *what) or max(answer.steps_left for answer in answers) >= STEPS_WORTH_CAPTURE
        if few >= self._rows() or not pays:
            return
        free = (row for row in range(len(answers)) if self.rows[row] is None)
        moves = [(answer, answer.row, next(free)) for answer in answers if answer.row >= len(answers)]
        self.engine.session.move([(source, target) for _, source, target in moves])
        for answer, source, target in moves:
            self.rows[source], self.rows[target], answer.row = None, answer, target

    # ------------------------------------------------------------ out of rows

    def _request(self, steps: int, tokens: int) -> None:
        """Asks for what the device will have chosen after everything that was launched, `steps` since the last request."""
        answers = self.rows[: self._reach()]
        status, stamp = self.engine.session.status(len(answers), any(a.logprobs is not None for a in answers if a))
        self.pending.append(_Launch(status, stamp, steps, tokens, answers, bool(self.waiting)))

    def _oldest(self) -> _Launch:
        """The launch whose status comes next; waits for it."""
        launch = self.pending.popleft()
        if self.engine.device.type == "cuda":
            launch.stamp.synchronize()
        return launch

    def _read(self) -> Iterator[tuple[Answer, str]]:
        """Takes the oldest status."""
        launch = self._oldest()
        timing, steps, elapsed = self.timing, launch.steps, elapsed_sec(self.last, launch.stamp)
        self.last = launch.stamp
        timing.steps += steps
        timing.step_ms += [elapsed / steps * 1e3] * steps if steps else []
        timing.decode_sec += elapsed
        going = [a for a in launch.answers if a and not a.finish_reason]
        timing.context_sum += steps * sum(a.length + len(a.tokens) for a in going)
        timing.queued_slot_steps += steps * self.batch_size * launch.queued
        before = timing.decode_tokens
        yield from self._emit(launch)
        if self.engine.speculator and steps:
            self._check_running()  # else the tallies are another's
            self.engine.speculator.observe()
            timing.step_ms[-1] *= len(going) / max(1, timing.decode_tokens - before)  # of a token

    def _emit(self, launch: _Launch) -> Iterator[tuple[Answer, str]]:
        """Takes over the tokens that are new in a launch's status."""
        status = launch.status
        ring, (cursor, done, nan) = status[:, :RING].numpy(), status[:, RING : RING + 3].T.tolist()
        for row, answer in enumerate(launch.answers):
            self._check_running()  # whoever took the last piece may have begun another run: the rows are its own now
            if answer is None or answer.finish_reason:
                continue
            if nan[row]:
                name = answer.job.request.source or f"output {answer.index}"
                raise FloatingPointError(f"the model's logits are NaN at token {len(answer.tokens) + 1} of {name}")
            entries = [c % RING for c in range(answer.read, cursor[row])]
            answer.read = cursor[row]
            before = len(answer.tokens)
            piece = answer.push(ring[row, entries].tolist())
            taken, is_first = len(answer.tokens) - before, before == 0  # a stop drops the rest; the first is the prefill's
            self.timing.decode_tokens += taken - is_first
            self.timing.queued_busy_steps += (len(entries) - is_first) * launch.queued
            if answer.logprobs is not None:
                answer.logprobs += _logprobs(status[row], entries[:taken], answer.params.logprobs)
            if done[row] and not answer.finish_reason:
                answer.finish_reason = "length"
            if answer.finish_reason:
                piece += answer.finish()
                if self.rows[answer.row] is answer:
                    if not done[row]:  # a stop string: only the host sees those
                        self.engine.session.retire(answer.row)
                    self._free(answer)
            if piece or answer.finish_reason:
                yield answer, piece


def _shared(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _logprobs(status: torch.Tensor, entries: list[int], top: int) -> list[TokenLogprob]:
    """Those of ring entries, from one sequence's status."""
    ids, values = status[RING + 3 :].view(2, RING, -1)[:, entries]
    rows = zip(ids.tolist(), values.contiguous().view(torch.float32).tolist(), strict=True)
    return [TokenLogprob(i[0], v[0], list(zip(i[1 : top + 1], v[1 : top + 1], strict=True))) for i, v in rows]
