"""Many prompts: rows and slots that change hands, and the files of the command."""

import contextlib
import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from families import hf_model

import batching
import generate
import runs
from decoding import BUCKETS, STEPS_PER_GRAPH, Decoder, decode_one_token
from generate import DEMO, Engine
from runs import Request, Run, steps_to_launch
from sampling import SamplingParams

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama3")
    hf_model("llama3").save_pretrained(path)
    return path


@pytest.fixture
def engine(directory):
    return Engine.load(directory, "cpu", torch.float32, max_seq_len=128)


def mixed_requests(number, seed=0, longest=40, **given):
    """Requests of random ids, lengths and sampling parameters."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=generator))
    ways = [{}, {"temperature": 0.9}, {"temperature": 1.1, "top_k": 20, "top_p": 0.9}, {"repetition_penalty": 1.3}]
    out = []
    for i in range(number):
        prompt = torch.randint(0, 190, (draw(1, longest),), generator=generator).tolist()
        params = {"max_new_tokens": draw(1, longest), "seed": i, "ignore_eos": True} | ways[i % len(ways)] | given
        out.append(Request(prompt, SamplingParams(**params), id=i))
    return out


def alone(engine, request):
    return engine.generate([request.prompt], request.params)[0]


class PretendGraph:
    """What a captured graph does, step by step."""

    def __init__(self, decoder, steps, *what):
        self.decoder, self.steps, self.what = decoder, steps, what

    def replay(self):
        for _ in range(self.steps):
            rows, kind, logprobs = self.what
            self.decoder.logits = decode_one_token(self.decoder.model, self.decoder.session, kind, logprobs, rows)


@pytest.fixture
def as_on_a_gpu(engine, monkeypatch):
    """An engine whose steps are launched as on a GPU: graphs of buckets of rows, read some launches behind."""

    def graph(self, *key):
        return self.graphs.setdefault(key, (PretendGraph(self, *key), None))

    monkeypatch.setattr(Decoder, "_graph", graph)
    init = Decoder.__init__
    monkeypatch.setattr(Decoder, "__init__", lambda self, *a: (init(self, *a), setattr(self, "mode", "graph"))[0])
    begin = Run.__init__
    monkeypatch.setattr(Run, "__init__", lambda self, *a, **k: (begin(self, *a, **k), setattr(self, "ahead", 2))[0])
    return engine


# ---------------------------------------------------------------- rows and slots


@pytest.mark.parametrize("way", ["engine", "as_on_a_gpu"])
def test_each_prompt_gets_the_tokens_it_gets_alone(way, directory, request):
    """Mixed lengths and parameters, more prompts than slots, chunked prefill; also read two launches behind."""
    engine = request.getfixturevalue(way)
    requests = mixed_requests(26)
    requests[5] = Request(requests[5].prompt, SamplingParams(max_new_tokens=9, n=3, temperature=1.0), id=5)
    requests[9] = Request(requests[9].prompt, SamplingParams(max_new_tokens=9, logprobs=2), id=9)
    results = engine.generate_many(requests, 5)
    got = {r.id: outputs for r, outputs in results}
    assert sorted(got) == list(range(26))
    assert results.batch_size == 5 == engine.session.batch_size
    single = Engine.load(directory, "cpu", torch.float32, max_seq_len=128)
    for r in requests:
        expected = alone(single, r)
        assert [o.tokens for o in got[r.id]] == [o.tokens for o in expected]
        assert [o.finish_reason for o in got[r.id]] == [o.finish_reason for o in expected]
        if r.params.logprobs:
            assert [e.token for e in got[r.id][0].logprobs] == expected[0].tokens
            for ours, theirs in zip(got[r.id][0].logprobs, expected[0].logprobs, strict=True):
                assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@pytest.mark.parametrize("way", ["engine", "as_on_a_gpu"])
def test_a_stop_frees_its_slot(way, request):
    """Stop ids end some early, by chance; their rows are taken by others and nothing is emitted past the stop."""
    engine = request.getfixturevalue(way)
    free = mixed_requests(14, seed=3, longest=24, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
    untouched = {r.id: outputs[0].tokens for r, outputs in engine.generate_many(free, 4)}
    stops = (3, 17, 60, 99, 120, 150, 171)
    stopped = [Request(r.prompt, SamplingParams(**vars(r.params) | {"stop_token_ids": stops}), id=r.id) for r in free]
    reasons = set()
    for r, (out,) in engine.generate_many(stopped, 4):
        end = next((i + 1 for i, token in enumerate(untouched[r.id]) if token in stops), None)
        assert out.tokens == untouched[r.id][:end]
        assert out.finish_reason == ("stop" if end else "length")
        reasons.add(out.finish_reason)
    assert reasons == {"stop", "length"}
    assert engine.session.cache.lengths.tolist() == [0] * 4
    assert engine.session.cache.table[:, 0].tolist() == list(range(4))


def test_a_long_prompt_does_not_stall_the_others(engine, monkeypatch):
    """It is prefilled in chunks, with steps of the others between them, and gets the tokens of one whole prefill."""
    long = Request(list(range(1, 101)), SamplingParams(max_new_tokens=5, ignore_eos=True), id="long")
    short = Request([5, 6], SamplingParams(max_new_tokens=30, ignore_eos=True), id="short")
    expected = {r.id: alone(engine, r)[0].tokens for r in (long, short)}
    monkeypatch.setattr(runs, "CHUNK", 16)
    events = []
    engine.prepare(2, 128)
    step, prefill = engine.decoder.run, Run._prefill

    def noted_prefill(run):
        before = run.timing.prefill_tokens
        admitted = prefill(run)
        events.append(run.timing.prefill_tokens - before)
        return admitted

    monkeypatch.setattr(Run, "_prefill", noted_prefill)
    monkeypatch.setattr(engine.decoder, "run", lambda *a, **k: events.append("step") or step(*a, **k))
    got = {r.id: outputs[0].tokens for r, outputs in engine.generate_many([short, long], 2)}
    assert got == expected
    assert events[:14] == [2 + 16, 16, "step", 16, "step", 16, "step", 16, "step", 16, "step", 4, "step", 0]


def test_sequences_move_together_when_none_waits(engine, monkeypatch):
    """The long one sits in the last row: steps shrink to one row, its K and V stay in their slot."""
    rows = []
    requests = [
        Request([i + 1, 7], SamplingParams(max_new_tokens=n, ignore_eos=True), id=i) for i, n in enumerate((3, 5, 2, 20))
    ]
    expected = [alone(engine, r)[0].tokens for r in requests]
    engine.prepare(4, 128)
    run = engine.decoder.run
    monkeypatch.setattr(engine.decoder, "run", lambda *a, **k: rows.append(k["rows"]) or run(*a, **k))
    got = {r.id: outputs[0].tokens for r, outputs in engine.generate_many(requests, 4)}
    assert [got[i] for i in range(4)] == expected
    assert rows == sorted(rows, reverse=True)
    assert (rows[0], rows[-1]) == (4, 1)
    assert engine.session.cached[3] == [4, 7, *expected[3][:-1]]


def test_a_session_serves_smaller_batches(engine):
    three, _ = engine.generate([[4, 5], [6], [7, 8]], SamplingParams(max_new_tokens=4))
    session = engine.session
    (one,), _ = engine.generate([[6]], SamplingParams(max_new_tokens=4))
    assert engine.session is session
    assert one.tokens == three[1].tokens


def test_rows_of_a_step(as_on_a_gpu):
    as_on_a_gpu.prepare(100, 64)
    decoder = as_on_a_gpu.decoder
    assert [decoder.rows_for(n) for n in (1, 2, 3, 5, 33, 64, 65, 100)] == [1, 2, 4, 8, 64, 64, 100, 100]
    assert list(BUCKETS) == sorted(BUCKETS)


def test_steps_of_a_launch():
    assert steps_to_launch([100, 7], waiting=False, most=STEPS_PER_GRAPH) == 8
    assert steps_to_launch([3, 2], waiting=False, most=8) == 3
    assert steps_to_launch([0, 0], waiting=False, most=8) == 0
    assert steps_to_launch([], waiting=True, most=8) == 0
    assert steps_to_launch([100, 7], waiting=True, most=8) == 2, "a stop is seen soon"
    assert steps_to_launch([100, 1, 0], waiting=True, most=8) == 1, "its row is free in the next step"
    assert steps_to_launch([100], waiting=True, most=1) == 1


@pytest.mark.parametrize("stops", [(), tuple(range(0, 190, 100))], ids=["to their lengths", "stops"])
def test_slots_are_busy_until_the_queue_empties(as_on_a_gpu, stops):
    """At least 90% of the slot-steps while prompts wait, read two launches behind, with lengths of 16 to 100."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(16, 101, (40,), generator=generator).tolist()
    params = {"temperature": 1.0, "ignore_eos": True, "stop_token_ids": stops}
    requests = [Request([i, 3], SamplingParams(max_new_tokens=n, seed=i, **params)) for i, n in enumerate(lengths)]
    results = as_on_a_gpu.generate_many(requests, 8)
    outputs = [out for _, (out,) in results]
    assert ("stop" in {out.finish_reason for out in outputs}) == bool(stops)
    timing = results.timing
    assert timing.queued_slot_steps > 1000
    assert timing.queued_busy_steps / timing.queued_slot_steps >= 0.9


def test_what_cannot_run_is_refused_at_once(engine):
    with pytest.raises(ValueError, match="n: found 3 samples of a prompt, expected at most the batch size, 2"):
        engine.generate_many([Request([1], SamplingParams(n=3))], 2)
    with pytest.raises(ValueError, match="expected at most the batch size, 0"):
        engine.generate_many([Request([1], SamplingParams())], 0)
    with pytest.raises(ValueError, match="here, prompt: found 128 tokens, expected fewer than the context of 128"):
        engine.generate_many([Request([1], SamplingParams()), Request([1] * 128, SamplingParams(), source="here")], 2)


def test_results_may_be_left_early(engine):
    results = engine.generate_many(mixed_requests(9), 2)
    next(results)
    results.close()
    assert next(results, None) is None
    assert engine.session.done.tolist() == [1, 1]


def test_the_batch_size_follows_free_memory(engine, monkeypatch):
    fits = []
    for free in range(8 << 20, 48 << 20, 8 << 20):
        monkeypatch.setattr(Engine, "_free_bytes", lambda self, free=free: free)
        with contextlib.suppress(MemoryError):
            fits.append(engine.largest_batch(128))
    assert fits == sorted(fits)
    assert len({n for n in fits if n < BUCKETS[-1]}) > 1, fits
    monkeypatch.setattr(Engine, "_free_bytes", lambda self: 64 << 30)
    assert engine.largest_batch(128) == BUCKETS[-1]
    assert engine.generate_many(mixed_requests(3)).batch_size == 3
    monkeypatch.setattr(Engine, "_free_bytes", lambda self: 0)
    with pytest.raises(MemoryError, match="1 x 128 tokens"):
        Engine(engine.model, max_seq_len=128).largest_batch(128)


# ---------------------------------------------------------------- the command

SPEAKERS = ("ROMEO", "JULIET", "KING RICHARD II", "First Citizen", "DUKE OF YORK")


def write_prompts(path, number, longest=12):
    lines = []
    for i in range(number):
        prompt = f"{SPEAKERS[i % 5]}:\n" + "Speak, " * (i % 7)
        lines.append({"id": i, "prompt": prompt, "max_new_tokens": 1 + i * 5 % longest, "seed": i})
        if i % 3 == 0:
            lines[-1]["temperature"] = 0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def command(tmp_path, *more):
    files = ["--prompt_file", str(tmp_path / "prompts.jsonl"), "--output_file", str(tmp_path / "out.jsonl")]
    return ["--device", "cpu", "--dtype", "float32", "--ignore_eos", *files, *more]


def results_of(tmp_path):
    text = (tmp_path / "out.jsonl").read_bytes()
    assert not text or text.endswith(b"\n")
    return [json.loads(line) for line in text.splitlines()]


def start(*argv):
    process = [sys.executable, str(ROOT / "generate.py"), *argv]
    return subprocess.Popen(process, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_lines(path, number):
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < number:
        assert time.monotonic() < deadline, "no results"
        time.sleep(0.01)


def test_killed_and_resumed_nothing_is_lost_or_doubled(tmp_path, capsys):
    """kill -9 in the middle, a torn last line, and the same command again: the results of one that was not disturbed."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", 90)
    out = tmp_path / "out.jsonl"
    with start(*command(tmp_path, "--batch_size", "6")) as process:
        wait_for_lines(out, 20)
        process.send_signal(signal.SIGKILL)
    kept = out.read_bytes().count(b"\n")
    assert 20 <= kept < 90
    with open(out, "a") as file:
        file.write('{"id": 89, "outputs": [{"tok')
    assert generate.main(command(tmp_path, "--json")) == 0
    printed, err = capsys.readouterr()
    assert json.loads(printed.splitlines()[-1])["metrics"]["prompts"] == 90 - kept
    assert f"has {kept} of 90 results, {90 - kept} are left" in err
    assert f"{90 - kept}/{90 - kept} prompts" in err
    assert "the largest that fits" in err
    got = results_of(tmp_path)
    assert sorted(line["id"] for line in got) == list(range(90))
    engine = Engine.load(DEMO, "cpu", torch.float32)
    defaults = {"temperature": 0.8, "top_k": 200, "ignore_eos": True} | engine.defaults
    for line in got[::9]:
        prompt = dict(prompts[line["id"]])
        params = defaults | {k: v for k, v in prompt.items() if k not in ("id", "prompt")}
        (expected,), _ = engine.generate([prompt["prompt"]], SamplingParams(**params))
        assert line["outputs"] == [expected.to_dict()]
    assert generate.main(command(tmp_path)) == 0
    assert "0 are left" in capsys.readouterr().err
    assert results_of(tmp_path) == got


def test_ctrl_c_leaves_whole_results(tmp_path):
    write_prompts(tmp_path / "prompts.jsonl", 400)
    with start(*command(tmp_path, "--batch_size", "4")) as process:
        wait_for_lines(tmp_path / "out.jsonl", 5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    number = len(results_of(tmp_path))
    assert 5 <= number < 400
    assert err.splitlines()[-3:] == [
        f"{tmp_path / 'out.jsonl'}: has {number} of 400 results; the same command goes on",
        "",
        "interrupted",
    ]


def test_a_full_disk_is_one_line_and_costs_nothing(tmp_path, capsys):
    """The write that does not fit is taken back; with room the same command goes on."""
    write_prompts(tmp_path / "prompts.jsonl", 12)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1200, before[1]))
    try:
        assert generate.main(command(tmp_path)) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert str(tmp_path / "out.jsonl") in last
    assert 0 < len(results_of(tmp_path)) < 12
    assert generate.main(command(tmp_path)) == 0
    assert sorted(line["id"] for line in results_of(tmp_path)) == list(range(12))


def test_one_writer(tmp_path, capsys):
    write_prompts(tmp_path / "prompts.jsonl", 2)
    with batching.ResultFile.open(tmp_path / "out.jsonl", {0, 1}):
        assert generate.main(command(tmp_path)) == 1
    assert "another process is writing here" in capsys.readouterr().err.splitlines()[-1]


def test_conversations_samples_and_token_ids(directory, tmp_path):
    """A line's own parameters; ids without a tokenizer."""
    lines = [
        {"id": "ids", "prompt": [5, 6, 7], "max_new_tokens": 4, "n": 2, "temperature": 1.5},
        {"id": 7, "prompt": [1], "logprobs": 1, "stop_token_ids": [3], "max_new_tokens": 2},
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert generate.main([*command(tmp_path), "--checkpoint_path", str(directory)]) == 0
    got = {line["id"]: line["outputs"] for line in results_of(tmp_path)}
    first, second = got["ids"]
    assert first["tokens"] != second["tokens"]
    assert first["text"] is None
    assert len(got[7][0]["logprobs"]) == len(got[7][0]["tokens"])

    messages = [{"role": "user", "content": "Hi"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"id": 0, "messages": messages, "stop": ["x"]}))
    (request,) = batching.read_requests(tmp_path / "chat.jsonl", SamplingParams())
    assert request.prompt == messages
    assert request.params.stop == ("x",)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["line 2", "'{'", "JSON object"]),
        ("[1]", ["line 2", "JSON object"]),
        ("\xff", ["line 2", "found byte 0xff at 0, expected UTF-8"]),
        ("[" * 100_000, ["line 2", "JSON object"]),
        ('{"prompt": "a"}', ["line 2", "id: found nothing"]),
        ('{"id": true, "prompt": "a"}', ["line 2", "id: found True"]),
        ('{"id": "first", "prompt": "a"}', ["line 2", "id: found 'first', which line 1 has"]),
        ('{"id": 2}', ["line 2", "prompt: found nothing"]),
        ('{"id": 2, "prompt": [1, "a"]}', ["line 2", "prompt: found [1, 'a']"]),
        ('{"id": 2, "prompt": "a", "messages": []}', ["line 2", "prompt: found 'a', expected none"]),
        ('{"id": 2, "messages": []}', ["line 2", "messages: found []"]),
        ('{"id": 2, "messages": ["hi"]}', ["line 2", "messages: found ['hi']"]),
        ('{"id": 2, "prompt": "a", "prompt": "b"}', ["line 2, prompt: found twice, expected once"]),
        ('{"id": 2, "prompt": "a", "temprature": 1}', ["line 2", "temprature: found 1", "sampling parameter"]),
        ('{"id": 2, "prompt": "a", "temperature": 9}', ["line 2", "temperature: found 9", "[0, 2]"]),
        ('{"id": 2, "prompt": "a", "temperature": NaN}', ["line 2", "temperature: found nan"]),
        ('{"id": 2, "prompt": "a", "stop": "x"}', ["line 2", "stop: found 'x', expected a list"]),
        ('{"id": 2, "prompt": "a", "stop_token_ids": 5}', ["line 2", "stop_token_ids: found 5, expected a list"]),
        ('{"id": 2, "prompt": "a", "max_new_tokens": 1.5}', ["line 2", "max_new_tokens: found 1.5"]),
    ],
)
def test_a_malformed_line_is_named(line, words, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"id": "first", "prompt": "a"}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match="line 2") as caught:
        batching.read_requests(path, SamplingParams())
    message = str(caught.value)
    assert all(word in message for word in [str(path), *words]), message
    assert len(message.splitlines()) == 1


def test_a_batch_size_of_a_prompt_file_is_no_number_of_samples(capsys):
    """It is how many go at once, at most; beyond the number of prompts it has no effect."""
    argv = ["--prompt_file", "in.jsonl", "--output_file", "out.jsonl", "--batch_size", "100000"]
    assert generate.sampling_flags(generate.parse_args(argv)) == {"stop": ()}
    with pytest.raises(SystemExit, match="2"):
        generate.parse_args(argv[-2:])
    assert "--batch_size: found 100000, expected at most 65536" in capsys.readouterr().err


def test_errors_of_the_command(tmp_path, capsys):
    def last(*argv, status=1):
        try:
            got = generate.main(list(argv))
        except SystemExit as exit:
            got = exit.code
        assert got == status
        return capsys.readouterr().err.splitlines()[-1]

    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    assert "expected both" in last("--prompt_file", str(prompts), status=2)
    assert "expected none of them" in last(*command(tmp_path, "--num_samples", "2"), status=2)
    assert str(prompts) in last(*command(tmp_path))
    prompts.write_text("\n")
    assert "found no prompts" in last(*command(tmp_path))
    prompts.write_text('{"id": 1, "prompt": [1, 9999]}\n')
    assert f"{prompts}, line 1, prompt: found token id 9999" in last(*command(tmp_path))
    assert not out.exists(), "nothing had begun"
    assert "the prompt file, expected another" in last(*command(tmp_path), "--output_file", str(prompts))
    assert prompts.read_text() == '{"id": 1, "prompt": [1, 9999]}\n'
    out.write_text('{"id": 2, "outputs": []}\n')
    assert f"{out}, line 1, id: found 2, expected one of the prompts'" in last(*command(tmp_path))
    out.write_text('broken\n{"id": 1, "outputs": []}\n')
    assert f"{out}, line 1: found" in last(*command(tmp_path))
    assert out.read_text() == 'broken\n{"id": 1, "outputs": []}\n', "what is not ours stays"
