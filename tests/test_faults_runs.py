"""The faults that befall a run: prompts, limits, memory, output, repetition. Each injected for real, most from a command line.

Numbers are those of the project's list of faults (18, 24, 25, 28, 29, and those without one).
"""

import json
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
import torch

import chat
import generate
from chat_template import ChatTemplate
from generate import DEMO, Engine
from model import ModelConfig, Transformer
from runs import Request
from sampling import SamplingParams

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def demo():
    return Engine.load(DEMO, "cpu", torch.float32)


def run(*argv, script="generate.py", **options):
    command = [sys.executable, str(ROOT / script), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def refused(done, *words, status=1):
    """One line on stderr after what is said of loading; nothing on stdout."""
    assert done.returncode == status, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert all(word in last for word in words), last
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


# ---------------------------------------------------------------- prompts


def test_24_an_empty_prompt_is_the_bos_alone(demo):
    (out,), _ = demo.generate([""], SamplingParams(max_new_tokens=3, ignore_eos=True))
    assert (out.prompt_tokens, len(out.tokens)) == (1, 3)


def test_24_an_empty_prompt_without_a_bos_is_refused(demo, monkeypatch):
    monkeypatch.setattr(demo.tokenizer, "bos_id", None)
    with pytest.raises(ValueError, match="prompt: found no tokens, expected at least one"):
        demo.generate([""])


@pytest.mark.parametrize("prompt", ["9" * 5, "9" * 14, "9" * 5000])
def test_24_a_synthetic_prompt_beyond_the_context(prompt, capsys):
    """Of so many tokens that making them would take all memory; of so many digits that Python refuses to read them."""
    assert generate.main(["--device", "cpu", "--prompt", prompt]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"error: prompt: found {prompt[:20]} tokens, expected fewer than the context of 1024"


def test_25_a_prompt_that_is_no_unicode():
    refused(run("--device", "cpu", "--prompt", b"ab\xff"), "text: found the lone surrogate U+DCFF at character 2")


# ---------------------------------------------------------------- parameters


def test_28_top_k_beyond_the_vocabulary_is_all_of_it(demo):
    answers = [
        demo.generate(["A"], SamplingParams(temperature=1.0, top_k=k, max_new_tokens=8))[0][0].tokens for k in (0, 2**31 - 1)
    ]
    assert answers[0] == answers[1]


def test_28_a_stop_id_beyond_the_vocabulary(demo):
    with pytest.raises(ValueError, match=r"stop_token_ids: found 2048, expected 0 to 2047"):
        demo.generate(["A"], SamplingParams(stop_token_ids=(2048,)))


# ---------------------------------------------------------------- memory

LIMITED = """
import resource, sys
sys.path.insert(0, {root!r})
import generate
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + {more}, size + {more}))
sys.exit(generate.main({argv!r}))
"""


def limited(more, *argv):
    code = LIMITED.format(root=str(ROOT), more=more, argv=["--device", "cpu", *argv])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_29_no_memory_for_the_weights(tmp_path):
    """A model of 1 GiB, whose file is sparse, and 0.5 GiB to be had."""
    config = ModelConfig.from_dict(
        {**checkpoints.SIZES, "model_type": "llama", "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": True}
        | {"vocab_size": 2**24}
    )
    checkpoints.write_random_hf(tmp_path / "model", config, sparse=True)
    refused(
        limited(2**29, "--checkpoint_path", str(tmp_path / "model")), str(tmp_path / "model"), "need 1.00 GiB, free on cpu:"
    )


def test_29_no_memory_for_the_cache():
    done = limited(2**29, "--batch_size", "200")
    refused(done, "the KV cache of 200 x 1024 tokens needs", "GiB, free", "max_seq_len", "would fit")


def test_29_rope_tables_of_an_absurd_context():
    config = ModelConfig.from_dict(
        {**checkpoints.SIZES, "model_type": "llama", "rms_norm_eps": 1e-6, "rope_theta": 1e4}
        | {"max_position_embeddings": 2**31 - 1}
    )
    with pytest.raises(ValueError, match=r"max_seq_len: found 2147483647, expected at most \d+ \(RoPE tables of 0.5 GiB\)"):
        Engine(Transformer(config))
    assert Engine(Transformer(config), max_seq_len=64).context == 64


# ---------------------------------------------------------------- output


def test_full_disk_behind_the_output():
    """`> /dev/full`: said once, not again by Python at its exit, and the status is 1."""
    command = f"{sys.executable} {ROOT / 'generate.py'} --device cpu --max_new_tokens 5 > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    refused(done, "No space left on device")


def test_no_file_speaks_to_the_terminal(tmp_path, capsys):
    """Names and texts of files stand in messages; their control characters do not."""
    config = {**checkpoints.SIZES, "model_type": "\x1b[2J\x1b]0;owned\x07\nerror: none", "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert generate.main(["--device", "cpu", "--checkpoint_path", str(tmp_path)]) == 1
    stderr = capsys.readouterr().err
    assert "model_type: found" in stderr
    assert stderr.endswith("\n")
    assert stderr[:-1].isprintable()


def test_no_template_speaks_to_the_terminal(demo, capsys, monkeypatch):
    """In a conversation too, where errors are told between the answers."""
    source = "{{ raise_exception('\x1b]0;owned\x07\x1b[2J') }}"
    monkeypatch.setattr(demo.tokenizer, "chat", ChatTemplate(source, "chat_template.jinja", {}, ["<s>"]))
    chat.Chat(demo, SamplingParams(max_new_tokens=3)).handle("hello")
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: chat_template.jinja: TemplateError: ")
    assert stderr[:-1].isprintable()


def test_vocabularies_that_differ(tmp_path):
    """A tokenizer with more tokens than the model has rows would index beyond them."""
    from safetensors.torch import load_file, save_file

    for path in DEMO.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"model.embed_tokens.weight": embedding[:1000].clone()}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    with pytest.raises(ValueError, match=r"tokenizer\.model: found \d+ tokens, expected at most the model's vocabulary, 1000"):
        Engine.load(tmp_path, "cpu")


def test_a_run_that_was_ended_touches_nothing_of_the_next(demo):
    """Two answers of one run meet a stop string in one step; between them another run begins, in the same rows."""
    (free,), _ = demo.generate(["ROMEO:"], SamplingParams(max_new_tokens=40))
    stopped = SamplingParams(max_new_tokens=40, stop=(free.text[5:8],))
    results = demo.generate_many([Request("ROMEO:", stopped)] * 2, batch_size=2)
    next(results)
    following = demo.generate_many([Request("ROMEO:", SamplingParams(max_new_tokens=n)) for n in (1, 40)], batch_size=2)
    next(following)
    with pytest.raises(RuntimeError, match="the engine has begun another run"):
        next(results)
    ((_, (output,)),) = following
    assert output.tokens == free.tokens


# ---------------------------------------------------------------- repetition


def test_two_processes_give_the_same_tokens():
    """The same seed, machine and version: sampled and greedy, in processes of different hash seeds."""
    argv = ("--device", "cpu", "--temperature", "1.2", "--top_k", "50", "--seed", "7", "--max_new_tokens", "40", "--json")
    outputs = []
    for hash_seed in ("1", "2"):
        done = run(*argv, "--batch_size", "2", env={"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        outputs.append(json.loads(done.stdout.splitlines()[-1])["outputs"])
    assert outputs[0] == outputs[1]
    assert outputs[0][0]["tokens"] != outputs[0][1]["tokens"], "two samples of one seed"
