"""Chat templates: from a conversation to the text that a checkpoint was trained on.

Owns the built-in forms, the sandbox and its limits. Knows nothing of tokenizers: it is told which strings are control tokens.

A checkpoint's template is code from a stranger and so is the text that a user types. Two defences:
- The template runs in jinja2's immutable sandbox, in a child process (this file as a program) that is killed when its time is
  up, cannot take more than MEMORY_LIMIT_BYTES, and can open neither file nor socket, whatever gets out of the sandbox.
  A thread or a signal handler would wait for `{{ 9**(9**9) }}` to end.
- Whatever comes from the conversation is guarded: a mark, a character that occurs nowhere else, follows each character that
  could begin a control token. So only the template itself can write one, however it trims, splits or joins what it is given,
  and the text comes out whole once the marks are removed.
"""

import codecs
import contextlib
import functools
import json
import re
import resource
import subprocess
import sys
import threading
import weakref
from datetime import datetime

import jinja2.constants  # these two jinja2 itself would only import when it needs them, and then it cannot
import jinja2.debug  # noqa: F401
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

TIME_LIMIT_SEC = 5.0  # the child's start, 0.1 s, included; a template takes about a millisecond
MEMORY_LIMIT_BYTES = 2**30  # the child needs 30 MB
MAX_ANSWER = 2**24  # characters of JSON: ten times what fills a context of 128k tokens

# ---------------------------------------------------------------- the built-in forms

_TEXTS = """\
{%- for message in messages if message['content'] is not string %}
    {{- raise_exception('found content ' + message['content'] | default(none) | tojson | truncate(40) + ', expected a text') }}
{%- endfor %}
"""  # the forms below have no place for parts, calls and their answers

LLAMA3 = (
    _TEXTS
    + """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
)

CHATML = (
    _TEXTS
    + """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
)

_TURNS = (
    _TEXTS
    + """\
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else none %}
{%- for message in (messages if system is none else messages[1:]) %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) or message['role'] not in ('user', 'assistant') %}
        {{- raise_exception('roles must alternate user, assistant, ... after an optional system message') }}
    {%- endif %}
    {%- set content = SYSTEM + message['content'] if loop.first and system is not none else message['content'] %}
    {{- QUESTION if message['role'] == 'user' else ANSWER }}
{%- endfor %}
"""
)

LLAMA2 = (
    _TURNS.replace("SYSTEM", r"'<<SYS>>\n' + system + '\n<</SYS>>\n\n'")
    .replace("QUESTION", "bos_token + '[INST] ' + content | trim + ' [/INST]'")
    .replace("ANSWER", "' ' + content | trim + ' ' + eos_token")
)

MISTRAL = "{{- bos_token }}\n" + (
    _TURNS.replace("SYSTEM", r"system + '\n\n'")
    .replace("QUESTION", "'[INST] ' + content + ' [/INST]'")
    .replace("ANSWER", "' ' + content | trim + eos_token")
)


def built_in(control_tokens, model_type: str | None = None) -> tuple[str, str] | None:
    """(name, source) of the form that these control tokens belong to; `model_type` tells Mistral from Llama 2."""
    if "<|start_header_id|>" in control_tokens:
        return "the built-in Llama 3 template", LLAMA3
    if "<|im_start|>" in control_tokens:
        return "the built-in ChatML template", CHATML
    if "[INST]" in control_tokens:  # from v3 on [/INST] is a control token too, and no space stands before it
        return "the built-in Mistral template", MISTRAL.replace(" [/INST]", "[/INST]")
    if model_type == "mistral":
        return "the built-in Mistral template", MISTRAL
    if "<s>" in control_tokens:
        return "the built-in Llama 2 template", LLAMA2
    return None


# ---------------------------------------------------------------- rendering, in the child


class _Sandbox(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj, attribute):
        """At once: jinja2 itself only fails where the value is used, and prints nothing for it."""
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe")


class _Generation(Extension):
    """`{% generation %}` marks what transformers trains on; here it stands for its body."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _raise_exception(message):
    raise TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """jinja2's own filter escapes HTML; transformers replaces it by this one, and templates count on it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=8)
def _compile(source: str, control_tokens: tuple[str, ...]):
    """The template, and the pattern that finds what the guard must break: group 1 is what it must leave alone.

    A template may look for strings of its own in a message (Qwen3 splits at '</think>'). Those stay whole, unless one
    could be a part of a control token.
    """
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)

    first = {token[0] for token in control_tokens}
    constants = {c.value for c in environment.parse(source).find_all(nodes.Const) if isinstance(c.value, str)}

    def harmless(text):
        starts = [i for i, character in enumerate(text) if character in first]
        return starts and not any(
            token.startswith(text[i:]) or text.startswith(token, i) for i in starts for token in control_tokens
        )

    whole = sorted(filter(harmless, constants), key=len, reverse=True)
    alternatives = ["(" + "|".join(map(re.escape, whole)) + ")" if whole else "((?!))", *map(re.escape, sorted(first))]
    return environment.from_string(source), re.compile("|".join(alternatives))


def render(source: str, variables: dict, named_tokens: dict[str, str], control_tokens: list[str]) -> tuple[str, str]:
    """The rendered text and the mark that guards it.

    `variables` (messages, add_generation_prompt, tools, ...) is plain JSON and guarded; `named_tokens` (bos_token, ...) is not.
    A control token in the text is one only where no mark is inside; then remove the marks. Raises what the template raises.
    """
    template, risky = _compile(source, tuple(control_tokens))
    taken = json.dumps([source, variables])
    mark = next(c for c in map(chr, range(0xE000, 0xF900)) if json.dumps(c)[1:-1] not in taken)

    def guard(value):
        if isinstance(value, str):
            return risky.sub(lambda match: match[0] if match[1] else match[0] + mark, value)
        if isinstance(value, list):
            return [guard(v) for v in value]
        if isinstance(value, dict):
            return {guard(k): guard(v) for k, v in value.items()}
        return value

    text = template.render({**named_tokens, "tools": None, "documents": None, **guard(variables)})
    return text.replace(json.dumps(mark)[1:-1], mark), mark  # tojson(ensure_ascii=true) has escaped the marks


def restrict():
    """From here on this process takes little memory, and opens and writes nothing new."""
    datetime.now().strftime("%c")  # reads the time zone; what else reads a file at its first use follows
    for encoding in ("unicode_escape", "idna", "latin-1", "utf-16", "utf-32"):
        codecs.lookup(encoding)
    with contextlib.suppress(Exception):  # also what an error looks up
        _compile("{% for a in b %}{{ a['\\n'] | tojson | trim }}{% endfor %}", ("<s>",))[0].render(b=[{}, 1])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))  # of new ones; those that are open stay


def _serve():
    """One JSON request a line in, one JSON answer a line out, until the input ends."""
    restrict()
    for line in sys.stdin:
        try:
            answer = json.dumps({"rendered": render(**json.loads(line))})
        except Exception as error:
            answer = json.dumps({"error": f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")})
        print(answer, flush=True)


# ---------------------------------------------------------------- the template, in the parent


class ChatTemplate:
    """One template and the child that renders it: started at the first use (0.1 s), kept for the next ones."""

    def __init__(self, source: str, name: str, named_tokens: dict[str, str], control_tokens, time_limit_sec=TIME_LIMIT_SEC):
        self.source = source
        self.name = name  # as errors call it
        self.time_limit_sec = time_limit_sec
        self._fixed = {"source": source, "named_tokens": named_tokens, "control_tokens": list(control_tokens)}
        self._child = None
        self._stop = None
        self._lock = threading.Lock()

    def render(self, messages: list[dict], add_generation_prompt: bool = True, **variables) -> tuple[str, str]:
        """(text, mark), see `render`. ValueError if the messages are no conversation, or the template fails or is stopped."""
        whole = lambda m: isinstance(m, dict) and isinstance(m.get("role"), str) and ("content" in m or "tool_calls" in m)
        if not isinstance(messages, list) or not messages or not all(map(whole, messages)):
            found = next((m for m in messages if not whole(m)), messages) if isinstance(messages, list) else messages
            raise ValueError(f"messages: found {found!r:.80}, expected a list of one or more objects with role and content")
        variables |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            request = json.dumps({**self._fixed, "variables": variables})
        except (TypeError, ValueError) as error:
            raise ValueError(f"messages: found {error}, expected plain JSON") from None
        answer = self._ask(request)
        if "error" in answer:
            raise ValueError(f"{self.name}: {answer['error']}")
        return tuple(answer["rendered"])

    def _ask(self, request: str) -> dict:
        with self._lock:
            if self._child is None:
                self._start()
            late = threading.Event()
            timer = threading.Timer(self.time_limit_sec, lambda: (late.set(), self._child.kill()))
            timer.start()
            line = ""
            try:
                with contextlib.suppress(BrokenPipeError):  # the child has died: said below
                    self._child.stdin.write(request + "\n")
                    self._child.stdin.flush()
                line = self._child.stdout.readline(MAX_ANSWER)
            finally:
                timer.cancel()
                timer.join()
                answered = line.endswith("\n") and not late.is_set()
                if not answered:  # or interrupted: what the child may still say must not answer the next question
                    self._stop()
                    self._child = None
        if not answered:
            found = f"no end after {self.time_limit_sec:g} s" if late.is_set() else "that its process died"
            found = f"more than {MAX_ANSWER} characters" if len(line) == MAX_ANSWER else found
            raise ValueError(f"{self.name}: found {found}, expected a template that renders")
        return json.loads(line)

    def _start(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        command = [sys.executable, "-P", __file__]
        self._child = subprocess.Popen(command, **pipes, start_new_session=True)  # Ctrl-C in the terminal is not meant for it
        self._stop = weakref.finalize(self, _end, self._child)


def _end(child: subprocess.Popen):
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        with contextlib.suppress(BrokenPipeError):  # it died before it had read all
            pipe.close()


if __name__ == "__main__":
    _serve()
