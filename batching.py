"""Many prompts from a file: `generate.py --prompt_file prompts.jsonl --output_file out.jsonl`.

Owns the two files and the progress line; `Engine.generate_many` does the work. Each line of the prompt file is an object:

    {"id": 1, "prompt": "To be"}                                  text, or a list of token ids
    {"id": "b", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0.5, "stop": ["\\n"]}

`id` is a text or a whole number, of its own; every field of SamplingParams may stand beside it. The output has a line for each,
in the order in which they finish: {"id", "outputs": one a sample, as `--json` gives them}.

The same command goes on after whatever ended it. A line is written whole, at once: it survives the death of the process. What
cannot be written whole is taken back. The disk is told to keep it (fsync) when the run ends, so a power failure may cost more.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from generate import Engine, Output, Request
from sampling import SamplingParams
from timing import short

PARAMETERS = {f.name for f in dataclasses.fields(SamplingParams)}
LISTS = ("stop", "stop_token_ids")

# ---------------------------------------------------------------- the prompt file


def read_requests(path: Path, defaults: SamplingParams) -> list[Request]:
    """The requests of a prompt file; `defaults` for what a line leaves out. ValueError names file, line and field."""
    requests, lines = [], {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            source = f"{path}, line {number}"
            fields = _parse(line, source)
            try:
                request = _request(fields, defaults, source)
            except ValueError as error:
                raise ValueError(f"{source}, {error}") from None
            if (first := lines.setdefault(request.id, number)) != number:
                raise ValueError(f"{source}, id: found {request.id!r}, which line {first} has, expected one of its own")
            requests.append(request)
    if not requests:
        raise ValueError(f"{path}: found no prompts, expected one a line")
    return requests


def _parse(line: bytes, source: str) -> dict:
    twice = []

    def keep(pairs):
        twice.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return dict(pairs)

    try:
        fields = json.loads(line.decode("utf-8-sig"), object_pairs_hook=keep)
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: found byte {line[error.start]:#04x} at {error.start}, expected UTF-8") from None
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ValueError(f"{source}: found {line.strip()[:40]!r}, expected a JSON object")
    if twice:
        raise ValueError(f"{source}, {twice[0][:40]}: found twice, expected once")
    return fields


def _request(fields: dict, defaults: SamplingParams, source: str) -> Request:
    def check(name, ok, expected):
        if not ok:
            found = repr(fields[name])[:80] if name in fields else "nothing"
            raise ValueError(f"{name}: found {found}, expected {expected}")

    for name in fields:
        check(name, name in PARAMETERS | {"id", "prompt", "messages"}, "id, prompt, messages or a sampling parameter")
    check("id", type(fields.get("id")) in (str, int), "a text or a whole number")
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if messages is None:
        ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
        check("prompt", isinstance(prompt, str) or ids, "text or token ids (or messages in its place)")
    else:
        check("prompt", prompt is None, "none beside messages")
        objects = isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
        check("messages", objects, 'a list of {"role", "content"} objects')
    given = {name: value for name, value in fields.items() if name in PARAMETERS}
    for name in LISTS:
        if name in given:
            check(name, isinstance(given[name], list), "a list")
            given[name] = tuple(given[name])
    return Request(messages or prompt, dataclasses.replace(defaults, **given), fields["id"], source)


# ---------------------------------------------------------------- the output file


class ResultFile:
    """The output file, locked for one writer. `done`: the ids whose results it has."""

    def __init__(self, path: Path, file, ids: set):
        """Reads what `file`, opened to read and append, has for `ids`, and takes back a last line that is not whole."""
        self.path, self.file, self.done = path, file, set()
        self.num_bytes = 0  # of whole lines
        file.seek(0)
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break  # the writer was killed in the middle of it
            fields = _parse(line, f"{path}, line {number}")
            if not isinstance(fields.get("id"), (str, int)) or fields["id"] not in ids or fields["id"] in self.done:
                expected = "one of the prompts', once: is it the output of another prompt file?"
                raise ValueError(f"{path}, line {number}, id: found {fields.get('id')!r}, expected {expected}")
            self.done.add(fields["id"])
            self.num_bytes += len(line)
        os.ftruncate(file.fileno(), self.num_bytes)

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, ids: set) -> Iterator["ResultFile"]:
        """A new file, or one to go on with. ValueError: another process writes it, or it is not the output for these ids."""
        new = not path.exists()
        with open(path, "a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it when its holder dies
            except BlockingIOError:
                raise ValueError(f"{path}: another process is writing here") from None
            try:
                yield cls(path, file, ids)
            except ValueError:
                if new and not os.fstat(file.fileno()).st_size:
                    path.unlink()  # the prompts were refused: as if nothing had begun
                raise
            finally:
                os.fsync(file.fileno())

    def write(self, request: Request, outputs: list[Output]) -> None:
        """Adds the results of one request, or nothing. OSError: no room."""
        line = json.dumps({"id": request.id, "outputs": [output.to_dict() for output in outputs]}).encode() + b"\n"
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self.file.fileno(), rest) :]
        except BaseException as error:
            os.ftruncate(self.file.fileno(), self.num_bytes)
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            raise
        self.num_bytes += len(line)
        self.done.add(request.id)


# ---------------------------------------------------------------- the command


class Progress:
    """How far it is, on stderr: a line that is drawn again in a terminal, else one every ten seconds."""

    def __init__(self, total: int):
        self.total, self.finished, self.tokens = total, 0, 0
        self.started = self.shown = time.perf_counter()
        self.live = sys.stderr.isatty()

    def add(self, outputs: list[Output]) -> None:
        self.finished += 1
        self.tokens += sum(len(output.tokens) for output in outputs)
        if time.perf_counter() - self.shown >= (0.1 if self.live else 10):
            self.show()

    def show(self, end: bool = False) -> None:
        self.shown = time.perf_counter()
        elapsed = max(self.shown - self.started, 1e-9)
        bar = "#" * (24 * self.finished // self.total)
        line = f"[{bar:24}] {self.finished}/{self.total} prompts, {self.tokens / elapsed:,.0f} tok/s"
        if self.finished and not end:
            seconds = round(elapsed * (self.total - self.finished) / self.finished)
            line += f", {seconds // 60}:{seconds % 60:02} to go"
        print(f"\r{line:79}" if self.live else line, end="" if self.live and not end else "\n", file=sys.stderr, flush=True)


def run(engine: Engine, params: SamplingParams, prompt_file: Path, output_file: Path, batch_size: int | None) -> dict:
    """Answers what the output file lacks of the prompt file; returns metrics. ValueError, OSError: one of the files."""
    requests = read_requests(prompt_file, params)
    if output_file.exists() and output_file.samefile(prompt_file):
        raise ValueError(f"output_file: found {output_file}, the prompt file, expected another")
    with ResultFile.open(output_file, {request.id for request in requests}) as file:
        say = lambda text: print(text, file=sys.stderr)
        stands = lambda: f"{output_file}: has {len(file.done)} of {len(requests)} results"
        todo = [request for request in requests if request.id not in file.done]
        if file.done:
            say(f"{stands()}, {len(todo)} are left")
        if not todo:
            return {}
        results, progress = engine.generate_many(todo, batch_size), Progress(len(todo))
        cache, why = engine.session.cache, "" if batch_size else " (the largest that fits, and is of use)"
        size = f"{cache.batch_size} x {cache.max_seq_len} tokens, {short(cache.num_bytes / 2**30)} GiB"
        say(f"batch size {results.batch_size}{why}; KV cache: {size}\npath: {engine.path}")
        try:
            for request, outputs in results:
                file.write(request, outputs)
                progress.add(outputs)
        except KeyboardInterrupt:
            say(f"\n{stands()}; the same command goes on")
            raise
        finally:
            results.close()
        progress.show(end=True)
    timing = results.timing
    total_sec = time.perf_counter() - progress.started
    capture_sec = sum(part.capture_sec for part in (engine.decoder, engine.prefiller, engine.speculator) if part)
    busy = timing.queued_busy_steps / timing.queued_slot_steps if timing.queued_slot_steps else None
    waited = f"slots {busy:.1%} busy while prompts waited" if busy else "no prompt waited for a slot"
    say(f"{progress.tokens:,} tokens in {total_sec:.1f} s; {waited}; compiling and graphs took {capture_sec:.1f} s of it")
    out = {"prompts": len(todo), "tokens": progress.tokens, "total_sec": total_sec, "tok_per_sec": progress.tokens / total_sec}
    return out | {"batch_size": results.batch_size, "capture_sec": capture_sec, "busy_slots": busy}
