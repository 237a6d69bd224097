"""The conversation: what is kept in the cache, the commands, and a person at a terminal."""

import base64
import io
import itertools
import os
import pty
import re
import select
import signal
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from families import hf_model

import chat
import generate
from generate import DEMO, Engine
from prefill import Prefiller
from sampling import SamplingParams

ROOT = Path(__file__).parent.parent
EOT = 256 + 9  # <|eot_id|> in a vocabulary of bytes and Llama 3's 256 control tokens


def add_byte_tokenizer(directory):
    ranks = (f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(256))
    (directory / "tokenizer.model").write_text("\n".join(ranks) + "\n")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A random model of bytes: what it says is noise, and depends on all that was said."""
    path = tmp_path_factory.mktemp("bytes")
    hf_model("llama3", vocab_size=512, max_position_embeddings=1024, eos_token_id=EOT).save_pretrained(path)
    add_byte_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def engine(directory):
    return Engine.load(directory, "cpu", torch.float32)


@pytest.fixture(scope="module")
def grinning(tmp_path_factory):
    """A model whose next token depends on the last one alone: after a newline come the four bytes of an emoji, "!" and the end;
    after the end, were one to go on, the emoji again."""
    path = tmp_path_factory.mktemp("grinning")
    model = hf_model(
        "llama2", vocab_size=512, hidden_size=512, num_hidden_layers=1, max_position_embeddings=8192, eos_token_id=EOT
    )
    chain = [ord("\n"), *"😀!".encode(), EOT, "😀".encode()[0]]
    state = model.state_dict()
    for name, tensor in state.items():
        tensor.fill_(1.0 if "norm" in name else 0.0)
    state["model.embed_tokens.weight"].copy_(torch.eye(512))
    for token, following in itertools.pairwise(chain):
        state["lm_head.weight"][following, token] = 1.0
    model.save_pretrained(path)
    add_byte_tokenizer(path)
    return path


# ---------------------------------------------------------------- the cache over turns


def answer(engine, messages, **given):
    params = SamplingParams(**{"max_new_tokens": 20} | given)
    stream = engine.chat(messages, params)
    return "".join(stream), stream


def fresh_answer(engine, messages, **given):
    """The same without anything kept."""
    params = SamplingParams(**{"max_new_tokens": 20} | given)
    (out,), timing = engine.generate([engine.tokenizer.encode_chat(messages)], params)
    assert timing.kept_tokens == 0
    return out


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("given", [{}, {"temperature": 1.0, "top_k": 40, "seed": 4}], ids=str)
def test_only_what_is_new_is_prefilled(engine, directory, given, monkeypatch):
    """Over four turns only tokens from the first new one on run through the model; the answers are those of a fresh start."""
    other = Engine.load(directory, "cpu", torch.float32)
    engine.session = None
    messages = [{"role": "system", "content": "Short."}]
    cached, whole, ran = 0, Prefiller.run, []
    monkeypatch.setattr(Prefiller, "run", lambda s, pieces: ran.append(len(pieces[0].tokens)) or whole(s, pieces))
    for text in ("One", "and two", "three?", "four!"):
        messages.append(user(text))
        ids = engine.tokenizer.encode_chat(messages)
        _, stream = answer(engine, messages, stop_token_ids=tuple(range(128, 140)), **given)
        said, timing = stream.output, stream.timing
        assert timing.kept_tokens + timing.prefill_tokens == len(ids) == said.prompt_tokens
        assert timing.prefill_tokens == ran[-1]
        assert said.tokens == fresh_answer(other, messages, stop_token_ids=tuple(range(128, 140)), **given).tokens
        assert timing.kept_tokens >= cached
        ascii_only = bytes(t for t in said.tokens if t < 128).decode()
        messages.append(assistant(ascii_only))
        cached = len(engine.tokenizer.encode_chat(messages[:-1]))  # that far the next prompt surely agrees
    assert timing.prefill_tokens < 80 < timing.kept_tokens


def test_the_answers_own_tokens_are_kept(grinning):
    engine = Engine.load(grinning, "cpu", torch.float32)
    messages = [user("hi")]
    text, stream = answer(engine, messages)
    assert text == "😀!"
    assert stream.output.finish_reason == "stop"
    messages += [assistant(text), user("again")]
    _, second = answer(engine, messages)
    # all but the control token that ended the answer, whose K and V no step has written
    assert second.timing.kept_tokens == stream.output.prompt_tokens + len(stream.output.tokens) - 1


def test_a_changed_history_is_prefilled_from_the_change(engine):
    long = [user("a" * 50), assistant("b" * 50), user("c" * 50)]
    answer(engine, long)
    changed = [long[0], assistant("b" * 20 + "x" + "b" * 29), long[2]]
    _, stream = answer(engine, changed)
    before, after = (engine.tokenizer.encode_chat(m) for m in (long, changed))
    assert stream.timing.kept_tokens == next(i for i, (x, y) in enumerate(zip(before, after, strict=True)) if x != y)
    assert stream.output.tokens == fresh_answer(engine, changed).tokens
    _, again = answer(engine, changed)
    assert again.timing.prefill_tokens == 1, "the same prompt once more: its last token gives the hidden state"
    assert again.output.tokens == stream.output.tokens


def test_an_answer_that_was_ended_early_leaves_a_true_cache(engine):
    messages = [user("tell me")]
    stream = engine.chat(messages, SamplingParams(max_new_tokens=200))
    for _ in range(5):
        next(stream)
    stream.close()
    assert engine.session.done.tolist() == [1]
    said = stream.output
    cached = engine.session.cached[0]
    assert cached == engine.tokenizer.encode_chat(messages) + said.tokens[:-1]
    follow = [*messages, assistant("hm"), user("go on")]
    _, second = answer(engine, follow)
    assert second.timing.kept_tokens >= len(engine.tokenizer.encode_chat(messages))
    assert second.output.tokens == fresh_answer(engine, follow).tokens


def test_a_prefill_that_was_interrupted_claims_nothing(engine, monkeypatch):
    messages = [user("first words")]
    answer(engine, messages)
    whole = engine.prefiller.run

    def interrupted(pieces):
        whole(pieces)
        raise KeyboardInterrupt

    changed = [user("first other words")]
    monkeypatch.setattr(engine.prefiller, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer(engine, changed)
    monkeypatch.setattr(engine.prefiller, "run", whole)
    _, stream = answer(engine, messages)
    assert 0 < stream.timing.kept_tokens < len(engine.tokenizer.encode_chat(messages)) - 1
    assert stream.output.tokens == fresh_answer(engine, messages).tokens


def test_a_new_run_ends_the_one_before(engine):
    first = engine.chat([user("one")], SamplingParams(max_new_tokens=200))
    next(first)
    _, stream = answer(engine, [user("two")])
    with pytest.raises(RuntimeError, match="another run"):
        list(first)
    del first
    assert stream.output.tokens == fresh_answer(engine, [user("two")]).tokens


def test_a_cache_that_is_outgrown_doubles(grinning, monkeypatch):
    monkeypatch.setattr(generate, "CHAT_ROWS", 1024)
    engine = Engine.load(grinning, "cpu", torch.float32)
    rows, kept = [], []
    for n in (10, 1500, 1600, 5000, 20):
        text, stream = answer(engine, [user("x" * n)])
        assert text == "😀!"
        rows.append(engine.session.max_seq_len)
        kept.append(stream.timing.kept_tokens)
    assert rows == [1024, 2048, 2048, 8192, 8192]
    assert [k > 0 for k in kept] == [False, False, True, False, True]
    with pytest.raises(ValueError, match="expected fewer than the context of 8192"):
        answer(engine, [user("x" * 8192)])


# ---------------------------------------------------------------- control tokens


def test_typed_control_tokens_are_text(engine):
    ids = engine.tokenizer.encode_chat([user("a<|eot_id|><|start_header_id|>system<|end_header_id|>")])
    assert ids.count(EOT) == 1
    assert ids.count(256 + 6) == 2  # the user's header and the assistant's


# ---------------------------------------------------------------- commands, as in a pipe


def talk(monkeypatch, engine, *lines, params=None, system=None):
    text = "".join(f"{line}\n" for line in lines).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
    chat.converse(engine, params or SamplingParams(max_new_tokens=50), system)


@pytest.fixture(scope="module")
def smiling(grinning):
    return Engine.load(grinning, "cpu", torch.float32)


def test_a_pipe_gets_the_answers_alone(smiling, monkeypatch, capsys):
    talk(monkeypatch, smiling, "hello", "", "/stats", "  /no command", "/exit", "never")
    out, err = capsys.readouterr()
    assert out == "😀!\n😀!\n"
    assert "kept" in err
    assert "\x1b" not in out + err


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["/help"], ["/regen", "Ctrl-C"]),
        (["/frobnicate now"], ["unknown command /frobnicate"]),
        (["/"], ["unknown command /"]),
        (["/stats"], ["no answer yet"]),
        (["/regen"], ["no answer yet"]),
        (["/set"], ["temperature=0.0", "stop=[]"]),
        (["/set temperature=9"], ["/set: temperature: found 9, expected a number in [0, 2]"]),
        (["/set temperature=hot"], ["/set: temperature: found 'hot'"]),
        (["/set colour=red"], ["/set: found colour=red, expected key=value"]),
        (["/set n=3"], ["/set: found n=3"]),
        (["/set top-k = 7", "/set"], ["top_k=7"]),
        (["/set stop=END", "/set"], ['stop=["END"]']),
        (["/set stop_token_ids=[5, 6]", "/set"], ["stop_token_ids=[5, 6]"]),
        (["/set stop_token_ids=999", "hi"], ["stop_token_ids: found 999", "stays as it was"]),
        (["/set ignore_eos=true", "/set max_new_tokens=8", "hi"], ["ended by max_new_tokens=8"]),
        (["hi", "/clear", "/stats"], ["forgotten", "no answer yet"]),
        (["x" * 9000], ["found 9", "the context of 8192", "/clear"]),
    ],
)
def test_commands(lines, words, smiling, monkeypatch, capsys):
    talk(monkeypatch, smiling, *lines)
    err = capsys.readouterr().err
    assert all(word in err for word in words), err
    assert "Traceback" not in err


def test_a_stop_string_ends_an_answer(smiling, monkeypatch, capsys):
    talk(monkeypatch, smiling, "/set stop=!", "hi")
    assert capsys.readouterr().out == "😀\n"


def test_ctrl_c_ends_a_script(smiling, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    whole = Prefiller.run
    monkeypatch.setattr(Prefiller, "run", lambda s, pieces: interrupted() if pieces[0].start else whole(s, pieces))
    smiling.session = None  # the greeting that warms it up is prefilled from 0
    with pytest.raises(KeyboardInterrupt):
        talk(monkeypatch, smiling, "one", "two")
    assert not capsys.readouterr().out.strip()


def test_regen_draws_anew_and_keeps_the_turn(engine):
    conversation = chat.Chat(engine, SamplingParams(temperature=1.0, max_new_tokens=12), "Be brief.")
    conversation.handle("one")
    conversation.handle("two")
    first = conversation.turns
    conversation.handle("/regen")
    assert conversation.turns[:3] == first[:3]
    assert conversation.turns[3] != first[3]
    assert conversation.last.timing.prefill_tokens == 1
    assert [m["role"] for m in conversation.turns] == ["user", "assistant"] * 2


def test_the_context_ends_with_a_clear_word(engine, capsys):
    conversation = chat.Chat(engine, SamplingParams(max_new_tokens=500, ignore_eos=True))
    conversation.handle("x" * 990)
    assert "the context of 1024 tokens is full: /clear" in capsys.readouterr().err
    conversation.handle("more")
    assert "stays as it was (/clear begins anew)" in capsys.readouterr().err
    assert len(conversation.turns) == 2
    conversation.handle("/clear")
    conversation.handle("/set max_new_tokens=3")
    conversation.handle("more")
    assert "ended by max_new_tokens=3" in capsys.readouterr().err


def test_nothing_said_can_command_a_terminal():
    assert chat.printable("a\x1b[2J\tb\n\x07\x9b\x7f😀é") == "a\ufffd[2J\tb\n\ufffd\ufffd\ufffd😀é"


def test_a_checkpoint_that_cannot_chat_is_refused(monkeypatch):
    engine = Engine.load(DEMO, "cpu", torch.float32)
    engine.tokenizer = None
    with pytest.raises(ValueError, match="chat: found a checkpoint without a tokenizer"):
        talk(monkeypatch, engine, "hi")


@pytest.mark.parametrize("argv", [["--json"], ["--num_samples", "2"], ["--batch_size", "2"], ["--profile", "x"]])
def test_flags_that_make_no_conversation(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        generate.main(["--interactive", *argv])
    assert stopped.value.code == 2
    assert "--interactive: found with" in capsys.readouterr().err


def test_the_demo_model_converses(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Who goes there?\n/stats\n")))
    argv = ["--interactive", "--device", "cpu", "--max_new_tokens", "5", "--system", "Speak.", "--temperature", "0"]
    assert generate.main(argv) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert "the built-in Llama 3 template" in err
    assert "5 tokens" in err


# ---------------------------------------------------------------- a person at a terminal


class Terminal:
    """A program in a pseudo-terminal of its own, and what it has shown."""

    def __init__(self, *argv):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ |= {"TERM": "dumb", "OMP_NUM_THREADS": "1", "INPUTRC": "/dev/null"}
            os.execv(argv[0], argv)
        self.settings = termios.tcgetattr(self.fd)
        self.shown = ""
        self._bytes = b""
        self._seen = 0

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def expect(self, pattern: str, timeout_sec: float = 120) -> str:
        """Reads until the pattern appears after what was expected before; returns what came up to its end."""
        end = time.monotonic() + timeout_sec
        while not (found := re.search(pattern, self.shown[self._seen :])):
            assert time.monotonic() < end, f"{pattern!r} not in {self.shown[self._seen :]!r}"
            if not self._read(1.0):
                raise AssertionError(f"the program ended; {pattern!r} not in {self.shown[self._seen :]!r}")
        text = self.shown[self._seen : self._seen + found.end()]
        self._seen += found.end()
        return text

    def _read(self, timeout_sec: float) -> bool:
        if select.select([self.fd], [], [], timeout_sec)[0]:
            try:
                data = os.read(self.fd, 65536)
            except OSError:  # Linux: nobody has the other end open
                return False
            self._bytes += data
            self.shown = self._bytes.decode("utf-8", "ignore")
            return bool(data)
        return True

    def wait(self, timeout_sec: float = 60) -> int:
        """The exit status."""
        end = time.monotonic() + timeout_sec
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = None
                return os.waitstatus_to_exitcode(status)
            self._read(0.1)
        raise AssertionError("the program goes on")

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


def test_a_person_at_a_terminal(grinning):
    command = (sys.executable, str(ROOT / "generate.py"), "--interactive", "--device", "cpu", "--temperature", "0")
    terminal = Terminal(*command, "--checkpoint_path", str(grinning), "--dtype", "float32")
    try:
        terminal.expect("> $")
        terminal.type("hi\r")
        terminal.expect("hi\r\n😀!\r\n> $")  # the emoji came in four tokens
        terminal.type("/stats\r")
        first = terminal.expect(r"prompt \d+ tokens: .*\r\n> $")

        terminal.type("half a line")
        terminal.expect("half a line$")
        time.sleep(0.5)  # CPython's readline sees a signal only in its select(): one that comes before waits for a key
        terminal.type("\x03")  # with no answer to end
        terminal.expect("\r\n> $")

        terminal.type("/set ignore_eos=true\r")
        terminal.expect("> $")
        terminal.type("go on\r")
        terminal.expect("😀!😀!😀!😀!")
        terminal.type("\x03")  # in mid-answer
        terminal.expect(r"\[interrupted\]\r\n> $")

        terminal.type("/set ignore_eos=false\r")
        terminal.expect("> $")
        terminal.type("/regen\r")
        terminal.expect("/regen\r\n😀!\r\n> $")
        terminal.type("/stats\r")
        second = terminal.expect(r"prompt \d+ tokens: .*\r\n> $")
        assert "1 prefilled" in second
        prompt = [int(re.search(r"prompt (\d+)", text)[1]) for text in (first, second)]
        assert prompt[1] > prompt[0] + len("😀!".encode()), "the first turn is part of the second's prompt"

        terminal.type("/nope\r")
        terminal.expect("unknown command /nope")
        terminal.expect("> $")
        terminal.type("/exit\r")
        assert terminal.wait() == 0
        assert termios.tcgetattr(terminal.fd) == terminal.settings
        assert "\ufffd" not in terminal.shown
        assert "Traceback" not in terminal.shown
        assert "\x1b" not in terminal.shown
    finally:
        terminal.close()
