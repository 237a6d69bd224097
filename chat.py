"""A conversation in the terminal: `generate.py --interactive`.

Owns the history, the commands and what the terminal shows. Knows neither templates nor caches: `Engine.chat` takes the messages
and runs only what is new in them. Answers go to stdout, everything else to stderr, so that a pipe gets the answers alone.
"""

import contextlib
import dataclasses
import json
import sys

from generate import WARM_UP_TOKENS, Engine, Stream
from sampling import SamplingParams

SETTINGS = [field.name for field in dataclasses.fields(SamplingParams) if field.name not in ("n", "logprobs")]
LISTS = ("stop", "stop_token_ids")
HELP = f"""\
/help            this
/clear           forget the conversation (the system message stays)
/regen           answer the last message again, with another draw
/stats           tokens and times of the last answer
/set key=value   change one of {", ".join(SETTINGS)};
                 alone: show them all
/exit            or Ctrl-D: leave
Ctrl-C ends an answer. A line that begins with a space is never a command."""


def say(text: str) -> None:
    """A line to the person, not part of an answer. It may quote a template's error, or what was typed."""
    print(printable(text), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Text that cannot command a terminal: control characters other than newline and tab become U+FFFD."""
    return "".join(c if c in "\n\t" or not (c < " " or "\x7f" <= c <= "\x9f") else "\ufffd" for c in text)


class Chat:
    """The history and the settings of one conversation. Each command is a method: it takes what follows its name."""

    def __init__(self, engine: Engine, params: SamplingParams, system: str | None = None):
        self.engine, self.params = engine, params
        self.system = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict] = []  # user, assistant, user, ...
        self.last: Stream | None = None  # the answer given last
        self.draws = 0  # of the last message: each /regen takes another

    def handle(self, line: str) -> None:
        """Does what one line asks. EOFError: the person wants to leave."""
        if not line.startswith("/"):
            if line.strip():
                self.ask(line)
            return
        name, _, rest = line[1:].partition(" ")
        command = getattr(self, f"command_{name.strip()}", None)
        if command is None:
            say(f"unknown command {line.split()[0]}: /help lists them")
        else:
            command(rest.strip())

    # ------------------------------------------------------------ answers

    def ask(self, text: str) -> None:
        """Adds a message to the conversation, and its answer, as far as it came."""
        self.draws = 0
        self.answer([*self.turns, {"role": "user", "content": text}])

    def answer(self, turns: list[dict]) -> None:
        """Answers the last of `turns`. They become the history unless they cannot be answered."""
        try:
            self.last = self.engine.chat(self.system + turns, self.params, sample=self.draws)
        except ValueError as error:
            say(f"error: {error}; the conversation stays as it was (/clear begins anew)")
            return
        shown, note, clean = "", None, printable if sys.stdout.isatty() else str
        try:
            with contextlib.closing(self.last):
                for piece in self.last:
                    shown += piece
                    print(clean(piece), end="", flush=True)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise  # a script's lines: nobody is there to go on
            note = "interrupted"
        except FloatingPointError as error:
            note = f"error: {error}"
        print(flush=True)
        self.turns = [*turns, {"role": "assistant", "content": shown}]
        out = self.last.output
        if note is None and out.finish_reason == "length":
            full = out.prompt_tokens + len(out.tokens) >= self.engine.context
            context = f"the context of {self.engine.context} tokens is full: /clear begins anew"
            note = context if full else f"ended by max_new_tokens={self.params.max_new_tokens}"
        if note:
            say(f"[{note}]")

    # ------------------------------------------------------------ commands

    def command_help(self, _: str) -> None:
        say(HELP)

    def command_clear(self, _: str) -> None:
        self.turns, self.last = [], None
        say("the conversation is forgotten")

    def command_regen(self, _: str) -> None:
        if not self.turns:
            say("/regen: found no answer yet, expected a conversation")
            return
        self.draws += 1
        self.answer(self.turns[:-1])

    def command_stats(self, _: str) -> None:
        if self.last is None:
            say("/stats: found no answer yet, expected a conversation")
            return
        out, timing = self.last.output, self.last.timing
        used = out.prompt_tokens + len(out.tokens)
        rate = f", {timing.decode_tokens / timing.decode_sec:.1f} tok/s" if timing.decode_sec else ""
        say(
            f"prompt {out.prompt_tokens} tokens: {timing.kept_tokens} kept, {timing.prefill_tokens} prefilled; "
            f"first token after {timing.ttft_sec * 1e3:.1f} ms; {len(out.tokens)} tokens{rate}; "
            f"context {used} of {self.engine.context}"
        )

    def command_set(self, assignment: str) -> None:
        key, _, text = (part.strip() for part in assignment.partition("="))
        key = key.replace("-", "_")
        if not assignment:
            say(", ".join(f"{key}={json.dumps(getattr(self.params, key))}" for key in SETTINGS))
        elif key not in SETTINGS or not text:
            say(f"/set: found {assignment}, expected key=value with one of {', '.join(SETTINGS)}")
        else:
            try:
                self.params = dataclasses.replace(self.params, **{key: _parse(key, text)})
            except (TypeError, ValueError) as error:
                say(f"/set: {error}")

    def command_exit(self, _: str) -> None:
        raise EOFError


def _parse(key: str, text: str):
    """A value as JSON, or text as it stands; one thing for a list is a list of one."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if key not in LISTS:
        return value
    return tuple(value) if isinstance(value, list) else (str(value) if key == "stop" else value,)


# ---------------------------------------------------------------- the terminal


def converse(engine: Engine, params: SamplingParams, system: str | None = None) -> None:
    """Reads lines and answers them until the input ends. ValueError: the checkpoint cannot chat."""
    chat = Chat(engine, params, system)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() its line editing and history)
    sys.stdin.reconfigure(errors="replace")
    _check(chat)
    say("/help lists the commands, Ctrl-C ends an answer, Ctrl-D the conversation")
    while True:
        try:
            chat.handle(input("> ") if interactive else input())
        except KeyboardInterrupt:  # with no answer to end: an empty line, as in a shell
            if not sys.stdin.isatty():
                raise
            say("")
        except EOFError:
            break
    if interactive:
        say("")


def _check(chat: Chat) -> None:
    """Fails now rather than at the first message; compiles what there is to compile, and says what it is."""
    engine = chat.engine
    compiles = engine.decode_mode != "eager"
    limit = min(WARM_UP_TOKENS if compiles else 1, chat.params.max_new_tokens)
    params = dataclasses.replace(chat.params, max_new_tokens=limit)
    for text in ("Hello", "Good morning") if compiles else ("Hello",):  # the second one is prefilled from within the cache
        for _ in engine.chat([*chat.system, {"role": "user", "content": text}], params):
            pass
    say(f"path: {engine.path}")
    say(f"template: {engine.tokenizer.chat.name}; context: {engine.context} tokens")


if __name__ == "__main__":
    sys.exit("chat.py: a module, expected python generate.py --interactive")
