"""checkpoint.py: what is written is read back, whole, once, in any dtype; generation_config.json; the progress line."""

import dataclasses
import io
import json
import math
import os
import sys
import weakref

import checkpoints
import pytest
import torch

import checkpoint
import convert_hf_checkpoint
from model import SHAPES, ModelConfig

CONFIG = ModelConfig.from_dict(
    {**checkpoints.SIZES, "model_type": "qwen3", "head_dim": 16, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "dtype": "bfloat16"}
)


def random_state(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = checkpoint.expected_tensors(config)
    return {name: torch.randn(shape, generator=generator).to(config.dtype) for name, shape in shapes.items()}


def save(directory, config=CONFIG, state=None, **options):
    state = state or random_state(config)
    checkpoint.save_checkpoint(directory, config, state.items(), **{"source": "a test", "progress": False} | options)
    return state


# ---------------------------------------------------------------- format


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as the models' pages on the hub count them
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-8b", 8_190_735_360),
        ("mistral-7b", 7_248_023_552),
    ],
)
def test_expected_tensors_of_the_released_models(name, parameters):
    assert sum(math.prod(shape) for shape in checkpoint.expected_tensors(SHAPES[name]).values()) == parameters


@pytest.mark.parametrize("shard_bytes", [1, 10_000, 10**9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_round_trip(tmp_path, shard_bytes, dtype):
    from safetensors.torch import load_file

    config = dataclasses.replace(CONFIG, dtype=dtype)
    state = save(tmp_path / "out", config, shard_bytes=shard_bytes)
    again, loaded, report = convert_hf_checkpoint.load(tmp_path / "out", progress=False)
    assert again == config
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert report.bytes == sum(tensor.nbytes for tensor in state.values())
    assert report.gbps == pytest.approx(report.bytes / 1e9 / report.seconds)

    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == {1: len(state), 10**9: 1}.get(shard_bytes, len(files))
    others = {name: tensor for file in files for name, tensor in load_file(file).items()}  # the format's own library
    assert all(torch.equal(others[name], state[name]) for name in state)
    for file in files:
        assert (int.from_bytes(file.read_bytes()[:8], "little") + 8) % 8 == 0, "the data is not aligned"
    if len(files) > 1:
        index = json.loads((tmp_path / "out" / checkpoint.INDEX_NAME).read_text())
        assert index["metadata"]["total_size"] == report.bytes
        assert {(n, f) for n, f in index["weight_map"].items()} == {(n, f.name) for f in files for n in load_file(f)}
        assert all(file.stat().st_size < 30_000 for file in files)
    else:
        assert not (tmp_path / "out" / checkpoint.INDEX_NAME).exists()


def test_foreign_config_is_not_ours(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    with pytest.raises(ValueError, match=r"config\.json: rooflama: found None, expected an object"):
        checkpoint.open_checkpoint(tmp_path)


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("staging_bytes", [64, 1000 * 4, 2**24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_byte_is_read_once_in_chunks(tmp_path, monkeypatch, staging_bytes, dtype):
    state = save(tmp_path / "out", shard_bytes=10_000)
    monkeypatch.setattr(checkpoint, "STAGING_BYTES", staging_bytes)
    reads, preadv = [], os.preadv

    def counting(descriptor, buffers, offset):
        (buffer,) = buffers
        reads.append(preadv(descriptor, [buffer[:999]], offset))  # and a disk that gives less than it is asked for
        return reads[-1]

    monkeypatch.setattr(os, "preadv", counting)
    config, loaded, report = convert_hf_checkpoint.load(tmp_path / "out", dtype=dtype, progress=False)
    assert config.dtype == dtype
    assert all(torch.equal(loaded[name], state[name].to(dtype)) for name in state)
    assert sum(reads) == report.bytes == sum(tensor.nbytes for tensor in state.values())


def test_load_in_inference_mode(tmp_path):
    state = save(tmp_path / "out")
    with torch.inference_mode():
        _, loaded, _ = convert_hf_checkpoint.load(tmp_path / "out", dtype=torch.float32, progress=False)
    assert all(torch.equal(loaded[name], state[name].float()) and not loaded[name].is_inference() for name in state)


def test_file_that_shrinks_while_it_is_read(tmp_path):
    save(tmp_path / "out")
    source = checkpoint.open_checkpoint(tmp_path / "out")
    os.truncate(tmp_path / "out" / "model.safetensors", 30_000)
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated while it was read, at byte 30000"):
        checkpoint.load_source(source, progress=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("staging_bytes", [64, 2**24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_load_onto_a_gpu(tmp_path, monkeypatch, staging_bytes, dtype):
    """Also that a staging buffer is not overwritten while it is copied: many small chunks, several shards."""
    monkeypatch.setattr(checkpoint, "STAGING_BYTES", staging_bytes)
    config = dataclasses.replace(CONFIG, vocab_size=2**20 if staging_bytes > 64 else 96)
    state = save(tmp_path / "out", config, shard_bytes=20_000_000 if staging_bytes > 64 else 10_000)
    _, loaded, _ = convert_hf_checkpoint.load(tmp_path / "out", "cuda", dtype, progress=False)
    for name in state:
        assert loaded[name].is_cuda
        assert torch.equal(loaded[name].cpu(), state[name].to(dtype)), name


# ---------------------------------------------------------------- saving


def test_tensors_are_taken_one_at_a_time(tmp_path):
    """A generator's tensors are let go as they are written: peak memory does not grow with the model."""
    alive, most = set(), 0

    def tensors():
        nonlocal most
        for name, shape in checkpoint.expected_tensors(CONFIG).items():
            tensor = torch.zeros(shape, dtype=CONFIG.dtype)
            alive.add(name)
            weakref.finalize(tensor, alive.discard, name)
            most = max(most, len(alive))
            yield name, tensor

    checkpoint.save_checkpoint(tmp_path / "out", CONFIG, tensors(), source="", progress=False)
    assert most <= 2


NAMES = list(checkpoint.expected_tensors(CONFIG))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop(NAMES[-1]), f"found no more .*, expected {NAMES[-1]}"),
        (lambda state: state.update({"extra": torch.zeros(1)}), "tensor extra: found after the last"),
        (lambda state: state.update({NAMES[2]: state[NAMES[2]].float()}), f"found {NAMES[2]} torch.float32"),
        (lambda state: state.update({NAMES[2]: state[NAMES[2]].T}), f"found {NAMES[2]} .*, expected {NAMES[2]}"),
        (lambda state: state.update({NAMES[0]: state.pop(NAMES[0])}), f"found {NAMES[1]} .*, expected {NAMES[0]}"),
    ],
)
def test_other_tensors_than_the_config_s(tmp_path, change, said):
    state = random_state(CONFIG)
    change(state)
    with pytest.raises(ValueError, match=said):
        save(tmp_path / "out", state=state)
    assert list(tmp_path.iterdir()) == []


def test_replaces_a_checkpoint_whole(tmp_path):
    save(tmp_path / "out", shard_bytes=10_000)
    (tmp_path / "out" / "tokenizer.model").write_text("of the old one")
    (tmp_path / "out" / "notes.txt").write_text("a user's")
    with pytest.raises(ValueError, match=r"out: found notes\.txt, expected a new or empty directory"):
        save(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").unlink()
    save(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_companions(tmp_path):
    for name in ("tokenizer.json", "generation_config.json", "README.md"):
        (tmp_path / name).write_text(name)
    save(tmp_path / "deep" / "out", companions=tmp_path)
    assert (tmp_path / "deep" / "out" / "tokenizer.json").read_text() == "tokenizer.json"
    files = {path.name for path in (tmp_path / "deep" / "out").iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"}


# ---------------------------------------------------------------- generation_config.json


def test_default_generation(tmp_path):
    assert checkpoint.default_generation(tmp_path) == {}
    path = tmp_path / "generation_config.json"
    path.write_text(
        json.dumps({"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": [1, 2], "top_k": None, "x": 1})
    )
    expected = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": [1, 2]}
    assert checkpoint.default_generation(tmp_path) == expected
    path.write_text(json.dumps({"temperature": 0, "top_k": 20, "min_p": 0.0, "repetition_penalty": 1, "eos_token_id": 7}))
    expected = {"temperature": 0, "top_k": 20, "min_p": 0.0, "repetition_penalty": 1, "eos_token_id": [7]}
    assert checkpoint.default_generation(tmp_path) == expected


WRONG = {
    "temperature": [-0.1, 2.1, "1", True, math.nan, math.inf, [0.5]],
    "top_k": [-1, 1.5, True, "5"],
    "top_p": [0, -0.5, 1.01, math.nan, "x"],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, -1, math.inf],
    "do_sample": [1, "yes"],
    "eos_token_id": [-1, "2", 1.5, [1, None], True, {}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRONG for value in WRONG[name]])
def test_default_generation_out_of_range(tmp_path, name, value):
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(ValueError, match=rf"generation_config\.json: {name}: found .*, expected a"):
        checkpoint.default_generation(tmp_path)


# ---------------------------------------------------------------- progress


def test_progress_line(capsys, tmp_path):
    save(tmp_path / "out", shard_bytes=20_000, progress=True)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    convert_hf_checkpoint.load(tmp_path / "out", progress=True)
    lines = capsys.readouterr().err.splitlines()
    labels = [f"{what} {i}/{len(files)} {file} [" for what in ("save", "load") for i, file in enumerate(files, 1)]
    assert len(files) > 1
    assert len(lines) == len(labels)
    assert all(line.startswith(label) for line, label in zip(lines, labels, strict=True))
    assert all("#" * 24 in line and line.endswith(" GB/s") for line in lines)


def test_progress_line_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with checkpoint.progress_line("load 1/1 x", 4, True) as add:
        add(1)
    with pytest.raises(ValueError, match="stop"), checkpoint.progress_line("load 1/1 y", 4, True) as add:
        raise ValueError("stop")
    drawn = terminal.getvalue().split("\r")
    assert drawn[1].startswith("load 1/1 x [######..................]")
    assert drawn[2].endswith("GB/s\n")
    assert drawn[-1].endswith("\n"), "an error message must begin on a line of its own"
