"""The faults that a disk, a download or an attacker brings to a checkpoint: each injected for real, each refused in one line.

Numbers are those of the project's list of faults (1-17, 19-23).
"""

import contextlib
import fcntl
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import tempfile
import tracemalloc
import zipfile
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import pytest
import torch

import checkpoint
import convert_hf_checkpoint as convert


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """One good checkpoint in each layout, never modified."""
    root = tmp_path_factory.mktemp("originals")
    checkpoints.save_hf(root / "single")
    checkpoints.save_hf(root / "sharded", shard_size="20KB")
    checkpoints.save_hf(root / "tied", tie_word_embeddings=True)
    checkpoints.save_meta(root / "meta", checkpoints.hf_model(), num_shards=2)
    convert.convert(root / "single", root / "ours", progress=False)
    return root


@pytest.fixture
def copy(originals, tmp_path):
    return lambda name: Path(shutil.copytree(originals / name, tmp_path / name))


@pytest.fixture
def refused(capsys, tmp_path):
    """Converting fails with status 1 and one line with every mention; so does loading, where it should; nothing is left."""

    def check(directory, *mentions, flags=(), also_load=True):
        before = sorted(tmp_path.iterdir())
        out = tmp_path / "out"
        capsys.readouterr()
        assert convert.main(["--checkpoint_dir", str(directory), "--output_dir", str(out), *flags]) == 1
        stdout, stderr = capsys.readouterr()
        assert stdout == ""
        assert stderr.startswith("error: ")
        assert stderr.count("\n") == 1, stderr
        for mention in mentions:
            assert str(mention) in stderr, stderr
        if also_load:
            with pytest.raises((ValueError, OSError)) as error:
                convert.load(directory, progress=False)
            assert all(str(mention) in str(error.value) for mention in mentions), str(error.value)
        assert sorted(tmp_path.iterdir()) == before

    return check


def edit_json(path, **changes):
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def edit_tensors(directory, changes):
    """Replace, add or (None) remove tensors of a single-file checkpoint."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, directory / "model.safetensors")
    return directory


# ---------------------------------------------------------------- files that are not what they claim


@pytest.mark.parametrize("name", ["single", "sharded", "ours"])
@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_01_truncated_shard(copy, refused, name, left):
    shard = sorted(copy(name).glob("*.safetensors"))[-1]
    size = shard.stat().st_size
    left = left if left >= 0 else size + left
    os.truncate(shard, left)
    refused(shard.parent, shard, "truncated", left, *([size] if left > 5000 else []))


def test_01_truncated_meta_shard(copy, refused):
    shard = copy("meta") / "consolidated.01.pth"
    os.truncate(shard, shard.stat().st_size // 2)
    refused(shard.parent, shard, "truncated")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 10**15])
def test_02_header_length(copy, refused, length):
    shard = checkpoints.write_safetensors(copy("single") / "model.safetensors", b"{}", length=length)
    tracemalloc.start()
    refused(shard.parent, shard, "safetensors header", length, 100_000_000)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_02_pipe_in_place_of_a_file(copy, refused, name):
    """It would be read for ever."""
    path = copy("single") / name
    path.unlink()
    os.mkfifo(path)
    refused(path.parent, path, "found a directory, pipe or device")


def test_02_a_terabyte_of_json(copy, refused):
    """Sparse: it takes no space, but whoever reads it would take a terabyte."""
    config = copy("single") / "config.json"
    os.truncate(config, 10**12)
    refused(config.parent, config, 10**12, 100_000_000)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2Jx", "\ud800", "x" * 501])
def test_03_names_that_would_speak_to_the_terminal(copy, refused, name):
    header = {name: {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}
    shard = checkpoints.write_safetensors(copy("single") / "model.safetensors", header, bytes(2))
    refused(shard.parent, shard, "expected a name of printable characters")


def test_03_shape_whose_product_takes_hours(copy, refused):
    header = {"a": {"dtype": "BF16", "shape": [10**4000] * 3000, "data_offsets": [0, 2]}}
    refused(checkpoints.write_safetensors(copy("single") / "model.safetensors", header, bytes(2)).parent, "tensor a: found")


@pytest.mark.parametrize(
    "offsets", [[0, 4], [2, 6], [6, 10], [1 << 62, (1 << 62) + 4], [8, 4], [-4, 0], [4.0, 8.0], ["4", "8"], [4]]
)
def test_03_offsets(copy, refused, offsets):
    """Overlapping, out of range, with a hole, backwards, or not offsets at all."""
    header = {name: {"dtype": "BF16", "shape": [2], "data_offsets": at} for name, at in (("a", [0, 4]), ("b", offsets))}
    shard = checkpoints.write_safetensors(copy("single") / "model.safetensors", header, bytes(8))
    refused(shard.parent, shard, "tensor b", "found", "expected")


@pytest.mark.parametrize("shape", [[3], [1 << 60], [-2], [True, 2], ["x"], 2, None, [[2]]])
def test_03_shape_against_its_bytes(copy, refused, shape):
    header = {"a": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 4]}}
    refused(checkpoints.write_safetensors(copy("single") / "model.safetensors", header, bytes(4)).parent, "model.safetensors")


HEADERS = [b"[" * 5000, b"\xff\xfe", b"[]", b"{", b'{"a": 1}', b'{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 2]}}']


@pytest.mark.parametrize("header", HEADERS)
def test_03_malformed_header(copy, refused, header):
    shard = checkpoints.write_safetensors(copy("single") / "model.safetensors", header, bytes(2))
    refused(shard.parent, shard, "safetensors header" if b"a" not in header else "tensor a: found")


def test_03_bytes_after_the_last_tensor(copy, refused):
    shard = copy("single") / "model.safetensors"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes() + b"more")
    refused(shard.parent, shard, size, size + 4)


def test_04_missing_shards(copy, refused):
    directory = copy("sharded")
    gone = sorted(directory.glob("*.safetensors"))[1:3]
    for shard in gone:
        shard.unlink()
    refused(directory, "2 of", gone[0].name, gone[1].name)


def test_04_missing_meta_shard(copy, refused):
    directory = copy("meta")
    (directory / "consolidated.00.pth").unlink()
    refused(directory, "consolidated.01.pth", "consolidated.00.pth")
    (directory / "consolidated.01.pth").rename(directory / "consolidated.00.pth")  # half of the model, numbered as all
    refused(directory, "wq", "shape", "[16, 32]", "[32, 32]")


def test_05_index_maps_to_the_wrong_shard(copy, refused):
    index = copy("sharded") / checkpoint.INDEX_NAME
    weight_map = json.loads(index.read_text())["weight_map"]
    name = "model.norm.weight"
    wrong = next(file for file in sorted(weight_map.values()) if file != weight_map[name])
    edit_json(index, weight_map=weight_map | {name: wrong})
    refused(index.parent, name, f"mapped to {wrong}", f"found in {weight_map[name]}")
    edit_json(index, weight_map=weight_map | {"model.extra.weight": wrong})
    refused(index.parent, "model.extra.weight", f"mapped to {wrong}", "found in no shard")


@pytest.mark.parametrize(
    "weight_map", [None, [], "x", {"a": 1}, {"a": "../model.safetensors"}, {"a": "/etc/passwd"}, {"a": ""}]
)
def test_05_hostile_index(copy, refused, weight_map):
    index = copy("sharded") / checkpoint.INDEX_NAME
    edit_json(index, weight_map=weight_map)
    refused(index.parent, index, "weight_map")


def test_06_stale_files_beside_an_index(copy, originals):
    directory = copy("sharded")
    (directory / "consolidated.safetensors").write_bytes(b"not even read")
    (directory / "model-00001-of-00099.safetensors").write_bytes(b"nor this")
    _, state, report = convert.load(directory, progress=False)
    assert report.notes == [
        f"ignored consolidated.safetensors, model-00001-of-00099.safetensors: not in {checkpoint.INDEX_NAME}"
    ]
    _, expected, _ = convert.load(originals / "single", progress=False)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_07_one_file_without_an_index(copy, refused):
    directory = copy("single")
    assert convert.load(directory, progress=False)[2].notes == []
    (directory / "model.safetensors").rename(directory / "weights.safetensors")
    assert convert.load(directory, progress=False)[2].notes == []
    shutil.copy(directory / "weights.safetensors", directory / "others.safetensors")
    refused(directory, "others.safetensors, weights.safetensors", checkpoint.INDEX_NAME)
    (directory / "weights.safetensors").unlink(), (directory / "others.safetensors").unlink()
    refused(directory, "no weights", "model.safetensors")
    (directory / "pytorch_model.bin").write_bytes(b"")
    refused(directory, "pytorch_model.bin", "expected safetensors")


# ---------------------------------------------------------------- tensors that are not the model's


def test_08_missing_tensors(copy, refused):
    names = ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight"]
    refused(edit_tensors(copy("single"), dict.fromkeys(names)), "2 of 21 tensors are missing", *names)


def test_08_missing_head_of_an_untied_model(copy, refused):
    refused(edit_tensors(copy("single"), {"lm_head.weight": None}), "1 of 21 tensors are missing", "lm_head.weight")


def test_09_extra_tensors(copy, refused):
    extra = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32), "model.layers.2.input_layernorm.weight": torch.zeros(32)}
    refused(edit_tensors(copy("single"), extra), "2 tensors that the model does not have", *extra)


def test_09_known_extra_tensors(copy, originals):
    directory = edit_tensors(copy("single"), {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    assert convert.load(directory, progress=False)[1].keys() == convert.load(originals / "single", progress=False)[1].keys()


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.1.self_attn.v_proj.weight", [32, 16], [16, 32]),
        ("model.embed_tokens.weight", [95, 32], [96, 32]),
        ("model.norm.weight", [32, 1], [32]),
    ],
)
def test_10_shape_differs_from_the_config(copy, refused, name, shape, expected):
    refused(edit_tensors(copy("single"), {name: torch.zeros(shape, dtype=torch.bfloat16)}), name, shape, expected)


def test_11_tied_without_a_head(copy):
    config, state, report = convert.load(copy("tied"), progress=False)
    assert config.tie_word_embeddings
    assert "output.weight" not in state
    assert report.notes == []


def test_11_tied_with_the_same_head(copy):
    directory = copy("tied")
    embeddings = convert.load(directory, progress=False)[1]["tok_embeddings.weight"]
    config, state, report = convert.load(edit_tensors(directory, {"lm_head.weight": embeddings.clone()}), progress=False)
    assert config.tie_word_embeddings
    assert "output.weight" not in state
    assert report.notes == []


def test_11_tied_with_a_different_head(copy, tmp_path, capsys):
    directory = copy("tied")
    head = convert.load(directory, progress=False)[1]["tok_embeddings.weight"].clone()
    head[-1, -1] += 1
    edit_tensors(directory, {"lm_head.weight": head})
    assert convert.main(["--checkpoint_dir", str(directory), "--output_dir", str(tmp_path / "out")]) == 0
    assert "warning: " in capsys.readouterr().err
    for config, state, _ in (convert.load(directory, progress=False), convert.load(tmp_path / "out")):
        assert not config.tie_word_embeddings
        assert torch.equal(state["output.weight"], head)


def test_11_no_head_and_no_word_about_tying(copy):
    directory = copy("tied")
    edit_json(directory / "config.json", tie_word_embeddings=None)
    config, _, report = convert.load(directory, progress=False)
    assert config.tie_word_embeddings
    assert "tied" in report.notes[0]


class Malicious:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))], ids=["zip", "plain"])
def test_12_malicious_pickle(copy, refused, tmp_path, save):
    path, mark = copy("meta") / "consolidated.01.pth", tmp_path / "mark"
    save({"norm.weight": torch.zeros(32), "x": Malicious(mark)}, path)
    refused(path.parent, path)
    assert not mark.exists()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False) if save is torch.save else pickle.loads(path.read_bytes())
    assert mark.exists(), "the pickle was harmless, the test shows nothing"


def test_12_pickle_of_something_else(copy, refused):
    path = copy("meta") / "consolidated.01.pth"
    torch.save([torch.zeros(2)], path)
    refused(path.parent, path, "found a pickled list", "dict of tensors")


def test_12_compressed_pickle(copy, refused):
    """A megabyte that becomes a gigabyte when it is read."""
    path = copy("meta") / "consolidated.01.pth"
    with zipfile.ZipFile(path) as original:
        members = {member.filename: original.read(member) for member in original.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name, data in members.items():
            bomb.writestr(name, data + bytes(10**9) if name.endswith("data.pkl") else data)
    assert path.stat().st_size < 2_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path.parent, path, "expected no compression")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(1, dtype=torch.bfloat16).expand(2**20, 2**20), "sparse, strided or empty"),
        (torch.zeros(4, 4, device="meta"), "sparse, strided or empty"),
        (torch.eye(4).to_sparse(), "sparse, strided or empty"),
        (torch.zeros(32, 32).T[:, :16], "sparse, strided or empty"),
    ],
    ids=["terabytes", "meta", "sparse", "transposed"],
)
def test_12_tensor_that_is_not_in_the_file(copy, refused, tensor, said):
    path = copy("meta") / "consolidated.01.pth"
    torch.save(torch.load(path) | {"norm.weight": tensor}, path)
    refused(path.parent, path, "norm.weight", said)


@pytest.mark.parametrize("name", [7, None, "a\nb"])
def test_12_name_that_is_none(copy, refused, name):
    path = copy("meta") / "consolidated.01.pth"
    torch.save(torch.load(path) | {name: torch.zeros(2)}, path)
    refused(path.parent, path, "expected a name")


LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a214614ab2935' * 4}\nsize 4976698672\n"
HTML = "<!DOCTYPE html>\n<html><head><title>Access denied</title></head></html>\n"


@pytest.mark.parametrize(("text", "said"), [(LFS, "Git LFS pointer"), (HTML, "HTML page"), ("\n <html>", "HTML page")])
@pytest.mark.parametrize("file", ["sharded/model-00002-of-*", "sharded/config.json", "sharded/*.index.json", "meta/*.00.pth"])
def test_13_placeholder(copy, refused, file, text, said):
    path = next(copy(file.split("/")[0]).glob(file.split("/")[1]))
    path.write_text(text)
    refused(path.parent, path, said)


# ---------------------------------------------------------------- configs


def test_14_config_missing_or_invalid(copy, refused):
    config = copy("single") / "config.json"
    for text in ("{", "", "[1]", "\x00", "[" * 100000):
        config.write_text(text)
        refused(config.parent, config)
    config.unlink()
    refused(config.parent, config)


CONFIGS = {
    "model_type": ["gpt2", None, 7],
    "hidden_size": [None, 0, -8, "32", 33.5, 10**400, float("nan"), ["x" * 9999]],
    "num_hidden_layers": [None, 0, 10**9],
    "rms_norm_eps": [10**400, float("inf"), -1.0],
    "eos_token_id": [2**40, -1, [1, "2"], True],
    "bos_token_id": ["1", 2**31],
    "head_dim": [2**20, 7],
    "num_key_value_heads": [3],
    "hidden_act": ["gelu"],
    "dtype": ["float8_e4m3fn"],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in CONFIGS for value in CONFIGS[field]])
def test_14_unsupported_config(copy, refused, field, value):
    config = copy("single") / "config.json"
    edit_json(config, **{field: value})
    refused(config.parent, config, field)


@pytest.mark.parametrize("field", ["dim", "n_layers", "n_heads", "norm_eps"])
def test_14_params_without_a_field(copy, refused, field):
    params = copy("meta") / "params.json"
    edit_json(params, **{field: None})
    refused(params.parent, params, field)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
ROPES = [  # changes of config.json, theta and type that they mean
    ({"rope_theta": 5e5}, 5e5, None),
    ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, None),
    ({"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}}, 5e5, "llama3"),
    ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, 5e5, "linear"),
    ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5, "rope_type": "llama3"}}, 5e5, "llama3"),
]


@pytest.mark.parametrize(("changes", "theta", "kind"), ROPES)
def test_15_rope(copy, changes, theta, kind, tmp_path):
    directory = copy("single")
    edit_json(directory / "config.json", **{"rope_parameters": None} | changes)
    convert.convert(directory, tmp_path / "out", progress=False)
    for config in (convert.open_source(directory).config, checkpoint.read_config(tmp_path / "out")[0]):
        assert config.rope_theta == theta
        assert (config.rope_scaling.type if config.rope_scaling else None) == kind


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_parameters": None}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "longrope"}}, "rope_parameters.rope_type"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": 1.0, "rope_type": "yarn", "factor": 2.0}}, "finite angles"),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 1e4, "rope_type": "llama3", "factor": 10**400}}, "factor"),
        ({"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0}}, "original_max_position_embeddings"),
    ],
)
def test_15_rope_refused(copy, refused, changes, named):
    config = copy("single") / "config.json"
    edit_json(config, **changes)
    refused(config.parent, config, named)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method: found 'bitsandbytes', supported: gptq, awq, fp8"),
        ({"bits": 2}, "bits: found 2, supported: 4, 8"),
        ({"desc_act": True}, "desc_act: found True, supported: False"),
    ],
)
def test_16_quantised_checkpoint(copy, refused, changes, named):
    config = copy("single") / "config.json"
    edit_json(config, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True} | changes)
    refused(config.parent, config, f"quantization_config.{named}")


def test_16_quantised_tensor(copy, refused):
    name = "model.layers.0.mlp.up_proj.weight"
    directory = edit_tensors(copy("single"), {name: torch.zeros(48, 32, dtype=torch.float8_e4m3fn)})
    refused(directory, name, "F8_E4M3", "BF16, F16, F32")


@pytest.mark.parametrize("changes", [{"quantization": {"format": "int3"}}, {"format_version": 99}, {"format_version": None}])
def test_16_our_format_of_another_version(copy, refused, changes):
    config = copy("ours") / "config.json"
    edit_json(config, rooflama=json.loads(config.read_text())["rooflama"] | changes)
    refused(config.parent, config, f"rooflama.{next(iter(changes))}", "supported")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_17_nan_in_weights(refused, tmp_path, layout, value):
    model = checkpoints.hf_model()
    model.model.layers[1].self_attn.k_proj.weight.data[-1, -1] = value
    if layout == "meta":
        refused(checkpoints.save_meta(tmp_path / "in", model, 2), "layers.1.attention.wk.weight", "NaN or Inf", also_load=False)
    else:
        model.save_pretrained(tmp_path / "in")
        name = "model.layers.1.self_attn.k_proj.weight"
        refused(tmp_path / "in", name, "NaN or Inf", also_load=False)
        assert convert.main(["--checkpoint_dir", str(tmp_path / "in"), "--check"]) == 1


def test_17_overflow_of_the_wanted_dtype(copy, refused):
    directory = edit_tensors(copy("single"), {"model.norm.weight": torch.full((32,), 1e6, dtype=torch.bfloat16)})
    refused(directory, "model.norm.weight", "float16", flags=["--dtype", "float16"], also_load=False)


# ---------------------------------------------------------------- writing


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@contextlib.contextmanager
def file_size_limit(num_bytes):
    """Writing beyond it fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 100, 20_000])
def test_19_write_fails(copy, originals, capsys, tmp_path, limit):
    old = copy("ours")
    before = contents(old)
    with file_size_limit(limit):
        assert convert.main(["--checkpoint_dir", str(originals / "sharded"), "--output_dir", str(old)]) == 1
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert "File too large" in stderr
    assert "model.safetensors" in stderr
    assert contents(old) == before
    assert list(tmp_path.iterdir()) == [old]


@contextlib.contextmanager
def small_disk(options):
    place = tempfile.mkdtemp()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True).returncode:
        os.rmdir(place)
        pytest.skip("cannot mount a tmpfs (needs root)")
    try:
        yield Path(place)
    finally:
        subprocess.run(["umount", place], check=True)
        os.rmdir(place)


@pytest.mark.parametrize("is_foreseen", [True, False])
def test_19_disk_full(originals, capsys, monkeypatch, is_foreseen):
    if not is_foreseen:  # another process fills the disk after we looked
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    num_bytes = sum(path.stat().st_size for path in (originals / "ours").iterdir())
    with small_disk(f"size={num_bytes * 3 // 2}") as disk:
        old = Path(shutil.copytree(originals / "ours", disk / "model"))
        before = contents(old)
        assert convert.main(["--checkpoint_dir", str(originals / "sharded"), "--output_dir", str(old)]) == 1
        stderr = capsys.readouterr().err
        assert stderr.count("\n") == 1
        assert ("GB free" if is_foreseen else "No space left on device") in stderr
        assert str(disk) in stderr
        assert contents(old) == before
        assert list(disk.iterdir()) == [old]


def killed_while_converting(directory, out, name, call):
    """Convert in a child that kills itself (SIGKILL) on entering the `call`-th call of a function of os."""
    child = os.fork()
    if child == 0:
        original, calls = getattr(os, name), iter(range(1, call))

        def deadly(*args):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        try:
            setattr(os, name, deadly)
            convert.convert(directory, out, shard_bytes=20_000, progress=False)
        finally:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the child was to be killed, it exited with {os.WEXITSTATUS(status)}"
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize(("name", "call"), [("preadv", 1), ("fsync", 1), ("fsync", 3), ("rename", 1)])
def test_20_killed_in_the_middle(originals, tmp_path, name, call):
    out = tmp_path / "out"
    killed_while_converting(originals / "single", out, name, call)
    assert not out.exists()
    assert any(tmp_path.iterdir()), "the child left nothing, so it was not killed in the middle"
    convert.convert(originals / "single", out, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert convert.load(out, progress=False)[0].num_layers == 2


@pytest.mark.parametrize("call", [1, 2])
def test_20_killed_while_replacing(copy, originals, tmp_path, call):
    old = copy("ours")
    before = contents(old)
    killed_while_converting(originals / "single", old, "rename", call)
    assert old.exists() == (call == 1)  # the second kill falls between the two renames
    with pytest.raises(ValueError, match="found no more"):  # even an attempt that fails brings the old one back
        checkpoint.save_checkpoint(old, checkpoint.read_config(originals / "ours")[0], [], source="", progress=False)
    assert contents(old) == before
    convert.convert(originals / "tied", old, progress=False)
    assert list(tmp_path.iterdir()) == [old]
    assert checkpoint.read_config(old)[0].tie_word_embeddings


def test_20_interrupted(originals, tmp_path, monkeypatch):
    def interrupt(source, dtype):
        yield from list(real(source, dtype))[:3]
        raise KeyboardInterrupt

    real = convert.finite_tensors
    monkeypatch.setattr(convert, "finite_tensors", interrupt)
    out = tmp_path / "out"
    assert convert.main(["--checkpoint_dir", str(originals / "single"), "--output_dir", str(out)]) == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["single", "ours"])
def test_21_output_is_input(copy, capsys, tmp_path, name):
    directory = copy(name)
    before = contents(directory)
    link = tmp_path / "link"
    link.symlink_to(directory)
    for out in (f"{directory}", f"{directory}/", f"{directory}/../{name}", f"{link}"):
        assert convert.main(["--checkpoint_dir", str(directory), "--output_dir", out]) == 1
        assert "the output is the input" in capsys.readouterr().err
    assert contents(directory) == before


@pytest.mark.parametrize(
    ("holds", "said"), [("thesis.txt", "found thesis.txt"), ("hf", "found another checkpoint"), ("file", "")]
)
def test_21_output_holds_something_else(copy, originals, capsys, tmp_path, holds, said):
    out = copy("single") if holds == "hf" else tmp_path / "out"
    if holds == "thesis.txt":
        out.mkdir()
        (out / holds).write_text("precious")
    elif holds == "file":
        out.write_text("precious")
    before = out.read_text() if holds == "file" else contents(out)
    assert convert.main(["--checkpoint_dir", str(originals / "sharded"), "--output_dir", str(out)]) == 1
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert f"{out}" in stderr
    assert said in stderr
    assert before == (out.read_text() if holds == "file" else contents(out))
    assert list(tmp_path.iterdir()) == [out]


def test_21_output_is_an_empty_directory(originals, tmp_path):
    (tmp_path / "out").mkdir()
    convert.convert(originals / "single", tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "config.json").exists()


def test_22_two_writers(originals, tmp_path, capsys):
    out = tmp_path / "out"
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:

        def slow(source, dtype):
            for i, tensor in enumerate(real(source, dtype)):
                if i == 3:
                    os.write(ready[1], b"x")
                    os.read(go[0], 1)
                yield tensor

        try:
            real, convert.finite_tensors = convert.finite_tensors, slow
            convert.convert(originals / "single", out, progress=False)
            os._exit(0)
        finally:
            os._exit(99)
    try:
        os.read(ready[0], 1)
        assert convert.main(["--checkpoint_dir", str(originals / "tied"), "--output_dir", str(out)]) == 1
        stderr = capsys.readouterr().err
        assert stderr.count("\n") == 1
        assert "another process is writing here: it holds the lock" in stderr
        assert not out.exists()
    finally:
        os.write(go[1], b"x")
        status = os.waitpid(child, 0)[1]
        for end in (*ready, *go):
            os.close(end)
    assert status == 0
    assert not convert.load(out, progress=False)[0].tie_word_embeddings
    assert list(tmp_path.iterdir()) == [out]


def test_22_lock_of_a_finished_writer(originals, tmp_path, monkeypatch):
    """The first writer removes its lock file between the second one's open and flock: a third could lock a new file."""
    real = fcntl.flock

    def flock(file, how):
        os.unlink(file.name)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ValueError, match="another process has just written here"):
        convert.convert(originals / "single", tmp_path / "out", progress=False)


def test_23_read_only_disk(originals, capsys):
    with small_disk("size=1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert convert.main(["--checkpoint_dir", str(originals / "single"), "--output_dir", str(disk / "out")]) == 1
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert "Read-only file system" in stderr
    assert str(disk / ".out.lock") in stderr


@contextlib.contextmanager
def no_privileges():
    """Permissions do not bind root: become nobody for a while."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.mark.parametrize("denied", ["weights", "config", "directory", "output"])
def test_23_no_permission(originals, capsys, denied):
    root = Path(tempfile.mkdtemp())  # tmp_path lies below a directory that only its owner may enter
    try:
        root.chmod(0o755)
        directory = Path(shutil.copytree(originals / "single", root / "in"))
        for path in directory.iterdir():
            path.chmod(0o644)
        (root / "open").mkdir()
        (root / "open").chmod(0o777)
        out = root / ("out" if denied == "output" else "open/out")
        path = {"weights": directory / "model.safetensors", "config": directory / "config.json"}.get(denied, directory)
        (root if denied == "output" else path).chmod(0o555 if denied == "output" else 0)
        with no_privileges():
            assert convert.main(["--checkpoint_dir", str(directory), "--output_dir", str(out)]) == 1
        stderr = capsys.readouterr().err
        assert stderr.count("\n") == 1
        assert "Permission denied" in stderr
        assert str(root / ".out.lock" if denied == "output" else path) in stderr
        assert not out.exists()
    finally:
        (root / "in").chmod(0o755)
        root.chmod(0o755)
        shutil.rmtree(root)
