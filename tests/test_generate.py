"""Generation: the decode paths, stopping, streaming, the command line and its errors."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import hf_model

import generate
from generate import DEMO, Engine
from model import PrefillStep
from runs import Answer
from sampling import SamplingParams
from tokenizer import TokenStream

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama3")
    hf_model("llama3").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engine(directory):
    return Engine.load(directory, "cpu", torch.float32, decode_mode="eager", max_seq_len=128)


def tokens_of(engine, prompt, **params):
    (out,), _ = engine.generate([prompt], SamplingParams(**{"max_new_tokens": 12, "ignore_eos": True} | params))
    return out.tokens


# ---------------------------------------------------------------- decode paths


def test_no_recompilation_after_warm_up(directory):
    """Prompt length, generated length, sampling values and stop ids may all change without compiling again."""
    engine = Engine.load(directory, "cpu", torch.float32, decode_mode="compile", compile_prefill=True, max_seq_len=128)
    expected = Engine.load(directory, "cpu", torch.float32, decode_mode="eager", max_seq_len=128)
    for n in (7, 13):  # the prefill is compiled for any length once it has seen two
        tokens_of(engine, list(range(n)), max_new_tokens=3)
    cases = [
        (list(range(5)), {"max_new_tokens": 4}),
        (list(range(40)), {"max_new_tokens": 20, "temperature": 0.7, "seed": 3}),
        (list(range(21)), {"max_new_tokens": 9, "temperature": 1.3, "top_k": 5, "top_p": 0.8, "min_p": 0.01}),
        (list(range(60, 90)), {"max_new_tokens": 30, "stop_token_ids": (5, 9)}),
    ]
    with torch.compiler.set_stance("fail_on_recompile"):
        got = [tokens_of(engine, prompt, **params) for prompt, params in cases]
    assert got == [tokens_of(expected, prompt, **params) for prompt, params in cases]


def test_the_compiled_step_copies_no_cache(directory):
    """Every buffer that Inductor's code for the decode step allocates is smaller than one layer's K."""
    from torch._inductor.utils import run_and_get_code

    engine = Engine.load(directory, "cpu", torch.float32, decode_mode="compile", max_seq_len=128)
    engine.prepare(1, 128)
    session = engine.session
    session.cache.lengths.fill_(3)
    torch.compiler.reset()
    _, (code,) = run_and_get_code(engine.decoder.step, engine.model, session, "greedy")
    k = session.cache.layer(0)[0]
    shape = str(tuple(k.shape))
    allocated = [line for line in code.splitlines() if "empty_strided" in line and shape in line and "=" in line]
    assert shape in code, "the code names the cache's shape somewhere, or this test looks for the wrong thing"
    assert not allocated, allocated
    assert "clone" not in code


def test_a_sequence_does_not_depend_on_its_neighbours(engine):
    prompts = [list(range(3, 3 + n)) for n in (4, 17, 9)]
    for params in ({}, {"temperature": 1.0, "seed": 11}, {"temperature": 0.9, "top_k": 20, "top_p": 0.9}):
        alone = [tokens_of(engine, p, **params) for p in prompts]
        together, _ = engine.generate(prompts, SamplingParams(max_new_tokens=12, ignore_eos=True, **params))
        assert [o.tokens for o in together] == alone


def test_embeddings_serve_as_a_prompt(engine):
    ids = [5, 9, 44, 3]
    assert tokens_of(engine, engine.model.embed(torch.tensor(ids))) == tokens_of(engine, ids)


@pytest.mark.parametrize("prompt", [torch.tensor([1, 2, 3]), torch.zeros(3, 7), torch.zeros(2, 64, dtype=torch.int64)])
def test_a_tensor_that_is_no_embedding_is_refused(engine, prompt):
    with pytest.raises(ValueError, match=r"prompt: found .*expected embeddings \[T, 64\]"):
        engine.generate([prompt])


def test_one_text_is_no_list_of_prompts(engine):
    with pytest.raises(ValueError, match="expected a list"):
        engine.generate("AB")


def test_a_mode_that_is_none_is_refused(engine):
    with pytest.raises(ValueError, match="decode_mode: found 'reduce_overhead', expected one of auto, eager"):
        Engine(engine.model, decode_mode="reduce_overhead")


def test_seed_and_sample_decide_the_draw(engine):
    params = SamplingParams(temperature=1.5, max_new_tokens=24, ignore_eos=True, seed=5)
    draw = lambda sample, p: engine.generate([[4, 5, 6]], p, sample=sample)[0][0].tokens
    assert draw(0, params) == draw(0, params)
    assert draw(0, params) != draw(1, params)
    assert draw(0, params) != draw(0, SamplingParams(temperature=1.5, max_new_tokens=24, ignore_eos=True, seed=6))


# ---------------------------------------------------------------- stopping


def test_stops_at_any_stop_id(engine):
    free = tokens_of(engine, [4, 5, 6], max_new_tokens=12)
    stop = free[4]
    (out,), _ = engine.generate([[4, 5, 6]], SamplingParams(max_new_tokens=12, ignore_eos=True, stop_token_ids=(198, stop)))
    assert out.tokens == free[: free.index(stop) + 1]
    assert out.finish_reason == "stop"


def test_finished_sequences_stay_finished(engine):
    """One of three stops early; the others are not disturbed, and it emits nothing more."""
    prompts = [[4, 5, 6], [7, 8], [9, 10, 11, 12]]
    free, _ = engine.generate(prompts, SamplingParams(max_new_tokens=16, ignore_eos=True))
    stop = free[1].tokens[2]
    params = [SamplingParams(max_new_tokens=16, ignore_eos=True, stop_token_ids=(stop,) if i == 1 else ()) for i in range(3)]
    got, _ = engine.generate(prompts, params)
    assert [o.tokens for o in got] == [free[0].tokens, free[1].tokens[: free[1].tokens.index(stop) + 1], free[2].tokens]
    assert [o.finish_reason for o in got] == ["length", "stop", "length"]


def test_the_context_ends_with_reason_length(engine):
    (out,), _ = engine.generate([list(range(100))], SamplingParams(max_new_tokens=500, ignore_eos=True))
    assert len(out.tokens) == 28  # 128 - 100
    assert out.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "no tokens"), (list(range(128)), "fewer than the context of 128"), ([4, 199], "token id 199")],
)
def test_a_prompt_that_cannot_run_is_refused(engine, prompt, message):
    with pytest.raises(ValueError, match=message):
        engine.generate([prompt], SamplingParams())


def test_nan_logits_stop_the_run(directory):
    engine = Engine.load(directory, "cpu", torch.float32, max_seq_len=128)
    engine.model.norm.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN at token 1 of output 0"):
        tokens_of(engine, [4, 5, 6])


class _Letters:
    """A tokenizer whose token i is chr(i)."""

    drops_first_space = False

    def token_bytes(self, i, skip_special=True):
        return bytes([i])


@pytest.mark.parametrize(
    ("stops", "text", "shown", "reason"),
    [
        (("END",), "one END two", "one ", "stop"),
        (("END",), "one EN", "one EN", None),
        (("ENDING", "ND"), "one END", "one E", "stop"),
        (("aab",), "aaaab", "aa", "stop"),
    ],
)
def test_stop_strings_over_tokens(stops, text, shown, reason):
    """Text that may still become a stop string is held back; text of and after one is never shown."""
    answer = Answer(SamplingParams(stop=stops), set(), TokenStream(_Letters()))
    pieces = []
    for byte in text.encode():
        if not answer.finish_reason:
            pieces.append(answer.push([byte]))
            assert not any(s in "".join(pieces) for s in stops)
    pieces.append(answer.finish())
    assert "".join(pieces) == answer.text == shown
    assert answer.finish_reason == reason


# ---------------------------------------------------------------- streaming


@pytest.fixture(scope="module")
def demo():
    return Engine.load(DEMO, "cpu", torch.float32)


def test_a_stream_gives_the_text_of_generate(demo):
    params = SamplingParams(temperature=0.9, seed=3, max_new_tokens=30)
    (out,), _ = demo.generate(["ROMEO:"], params)
    stream = demo.stream("ROMEO:", params)
    pieces = list(stream)
    assert len(pieces) > 10
    assert "".join(pieces) == out.text
    assert stream.output == out
    assert stream.timing.prefill_tokens == out.prompt_tokens


def test_a_stream_may_be_left_early(demo):
    stream = demo.stream("ROMEO:", SamplingParams(max_new_tokens=200))
    shown = next(stream) + next(stream)
    stream.close()
    assert next(stream, None) is None
    assert stream.output.text.startswith(shown)
    assert demo.session.done.tolist() == [1], "the device has nothing left to do"
    assert demo.session.cache.lengths.tolist() == [0]


def test_a_run_that_is_dropped_ends():
    """At once, by itself; left to the garbage collector of a process that ends, its tensors made PyTorch abort."""
    code = """
from generate import DEMO, Engine
from runs import Request
from sampling import SamplingParams

def main():
    engine = Engine.load(DEMO, "cpu")
    requests = [Request([1, 2, 3], SamplingParams(max_new_tokens=5 + i)) for i in range(5)]
    results = engine.generate_many(requests, 3)
    next(results)
    del results
    assert engine.running is None and engine.session.done.all()
    results = engine.generate_many(requests, 3)
    next(results)

main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(generate.__file__).parent, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_stop_string_ends_a_sequence_on_the_device(demo):
    """Text up to it, no token after the one that completes it; a neighbour goes on."""
    free, _ = demo.generate(["ROMEO:"], SamplingParams(max_new_tokens=40))
    stop = free[0].text[20:26]
    params = [SamplingParams(max_new_tokens=40, stop=(stop,)), SamplingParams(max_new_tokens=40)]
    (stopped, other), _ = demo.generate(["ROMEO:", "ROMEO:"], params)
    assert stopped.text == free[0].text[: free[0].text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == free[0].tokens[: len(stopped.tokens)]
    assert stop in demo.tokenizer.decode(stopped.tokens)
    assert stop not in demo.tokenizer.decode(stopped.tokens[:-1])
    assert other.tokens == free[0].tokens


def test_a_character_that_was_cut_off_is_marked_at_the_end():
    """Bytes of an unfinished character are held back, and are U+FFFD once no more can come."""
    answer = Answer(SamplingParams(), set(), TokenStream(_Letters()))
    assert [answer.push([b]) for b in "é😀".encode()[:-1]] == ["", "é", "", "", ""]
    assert answer.finish() == "\ufffd"


# ---------------------------------------------------------------- the demo model and the command line


def test_golden_tokens_of_the_demo_model():
    """The exact 64 greedy tokens, float32 on a CPU; the smallest gap between first and second choice exceeds 1e-2."""
    golden = json.loads((Path(__file__).parent / "golden_demo.json").read_text())
    engine = Engine.load(DEMO, "cpu", torch.float32, decode_mode="eager")
    (out,), _ = engine.generate([golden["prompt"]], SamplingParams(max_new_tokens=64, ignore_eos=True))
    assert out.tokens == golden["tokens"]
    assert out.text == golden["text"]

    ids = torch.tensor(engine.encode(golden["prompt"]) + out.tokens)
    logits = engine.model.logits(engine.model(engine.model.embed(ids), PrefillStep(len(ids))))
    best = logits[-65:-1].topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-2


def run_cli(*argv, **options):
    command = [sys.executable, str(ROOT / "generate.py"), "--device", "cpu", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def test_json_is_the_last_line():
    done = run_cli("--prompt", "JULIET:", "--max-new-tokens", "9", "--temperature", "0", "--json")
    assert done.returncode == 0, done.stderr
    *text, last = done.stdout.splitlines()
    result = json.loads(last)
    (out,) = result["outputs"]
    assert set(out) == {"tokens", "text", "finish_reason", "prompt_tokens"}
    assert len(out["tokens"]) == 9
    assert "\n".join(text) == out["text"]
    wanted = {
        "load_sec",
        "compile_sec",
        "ttft_sec",
        "prefill_tok_per_sec",
        "decode_tok_per_sec",
        "tpot_ms",
        "peak_memory_bytes",
    }
    assert wanted <= set(result["metrics"])
    assert "path: eager" in done.stderr


def test_json_with_logprobs_of_several_samples(capsys):
    argv = ["--device", "cpu", "--batch_size", "2", "--num_samples", "2", "--max_new_tokens", "8", "--json", "--logprobs", "2"]
    assert generate.main([*argv, "--dtype", "float32", "--seed", "4", "--ignore_eos"]) == 0
    outputs = json.loads(capsys.readouterr().out.splitlines()[-1])["outputs"]
    assert len({tuple(out["tokens"]) for out in outputs}) == 4
    for out in outputs:
        assert [entry["token"] for entry in out["logprobs"]] == out["tokens"]
        assert all(len(entry["top"]) == 2 and entry["logprob"] <= entry["top"][0][1] <= 0 for entry in out["logprobs"])


def test_closed_output_ends_quietly():
    command = f"{sys.executable} {ROOT / 'generate.py'} --device cpu --max_new_tokens 900 --temperature 0 | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=300)
    assert len(done.stdout.splitlines()) == 1
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "decode" not in done.stderr, "it went on to the end although nobody read"


def test_ctrl_c_in_mid_stream_ends_with_130():
    command = [sys.executable, str(ROOT / "generate.py"), "--device", "cpu", "--max_new_tokens", "900", "--ignore_eos"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == "interrupted"
    assert b"Traceback" not in err


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["--temperature", "nan"], 1, ["temperature", "nan", "[0, 2]"]),
        (["--top_p", "0"], 1, ["top_p", "0.0", "(0, 1]"]),
        (["--num_samples", "0"], 2, ["--num_samples", "0", "at least 1"]),
        (["--random_weights", "llama-9"], 1, ["llama-9", "llama-3.2-1b"]),
        (["--checkpoint_path", "/nowhere"], 1, ["/nowhere: found no directory", "scripts/prepare.sh"]),
        (["--checkpoint_path", "meta-llama/Llama-3.2-1B"], 1, ["meta-llama/Llama-3.2-1B: found no directory"]),
        (["--decode_mode", "graph"], 1, ["graph", "CUDA"]),
        (["--frobnicate"], 2, ["--frobnicate"]),
        (["--max_seq_len", "0"], 1, ["max_seq_len", "0", "expected 1 to"]),
        (["--max_seq_len", "-5"], 1, ["max_seq_len", "-5"]),
        (["--device", "foo"], 1, ["device", "foo", "cpu"]),
        (["--top_k", "99999999999"], 1, ["top_k: found 99999999999, expected an integer from 0 (off) to 2,147,483,647"]),
        (
            ["--max_new_tokens", "0", "--random_weights", "llama-3.1-8b"],
            1,
            ["max_new_tokens: found 0, expected an integer"],
        ),
        (["--batch_size", "100000000"], 2, ["--batch_size: found 100000000, expected at most 65536"]),
        (["--checkpoint_path", str(ROOT / "tests")], 1, [f"{ROOT}/tests/config.json: found no such file"]),
        (["--prompt_file", "/no/such", "--output_file", "o"], 1, ["/no/such: found no directory /no"]),
        (["--prompt_file", str(ROOT), "--output_file", "o"], 1, [f"{ROOT}: found a directory, expected a file"]),
        (["--batch_invariant"], 1, ["batch_invariant: found device cpu, expected a CUDA device"]),
        (["--stop", ""], 1, ["stop: found ('',), expected strings, not empty"]),
        (["--profile", "/"], 2, ["--profile: found /, expected a file in a directory that is there"]),
        (["--profile", "/nowhere/trace.json"], 2, ["--profile: found /nowhere/trace.json, expected a file"]),
        (["--system", "Be brief."], 2, ["--system: found without --interactive, expected both"]),
        (["--logprobs", "2"], 2, ["--logprobs: found without --json, expected both"]),
        (["--prompt", "To be", "--interactive"], 2, ["--prompt: found with --prompt_file or --interactive"]),
        (["--checkpoint_path", ".", "--random_weights", "llama-3.2-1b"], 2, ["--checkpoint_path: found with --random_weights"]),
    ],
)
def test_bad_input_gets_one_line(argv, status, words, capsys, monkeypatch):
    try:
        got = generate.main(["--device", "cpu", *argv])
    except SystemExit as exit:
        got = exit.code
    err = capsys.readouterr().err
    assert got == status
    assert all(w in err.splitlines()[-1] for w in words), err
    assert "Traceback" not in err
