"""convert_hf_checkpoint.py: every layout gives the same tensors; Meta's params; the hub; the command line."""

import contextlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import checkpoints
import pytest
import torch

import checkpoint
import convert_hf_checkpoint as convert
from generate import Engine
from model import SHAPES, PrefillStep

ROOT = Path(__file__).resolve().parent.parent
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def unfused(config, state):
    """Our state dict under transformers' names, taken apart by hand."""
    out = {"model.embed_tokens.weight": state["tok_embeddings.weight"], "model.norm.weight": state["norm.weight"]}
    out["lm_head.weight"] = state["tok_embeddings.weight" if config.tie_word_embeddings else "output.weight"]
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        for kind in ["weight", "bias"] if config.qkv_bias else ["weight"]:
            qkv = state[f"{ours}attention.wqkv.{kind}"].split([config.q_size, config.kv_size, config.kv_size])
            out |= {f"{theirs}self_attn.{x}_proj.{kind}": part for x, part in zip("qkv", qkv, strict=True)}
        gate_up = state[f"{ours}feed_forward.w13.weight"].chunk(2)
        out |= {f"{theirs}mlp.{x}_proj.weight": part for x, part in zip(("gate", "up"), gate_up, strict=True)}
        names = {"attention.wo": "self_attn.o_proj", "feed_forward.w2": "mlp.down_proj", "attention_norm": "input_layernorm"}
        names["ffn_norm"] = "post_attention_layernorm"
        if config.qk_norm:
            names |= {f"attention.{x}_norm": f"self_attn.{x}_norm" for x in "qk"}
        out |= {f"{theirs}{name}.weight": state[f"{ours}{mine}.weight"] for mine, name in names.items()}
    return out


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout_gives_the_same_tensors(tmp_path, dtype, tied):
    model = checkpoints.hf_model(dtype=dtype, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    checkpoints.save_meta(tmp_path / "meta-1", model, 1)
    checkpoints.save_meta(tmp_path / "meta-2", model, 2)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    for name in ("single", "sharded", "meta-1", "meta-2"):
        out = tmp_path / f"{name}-ours"
        convert.convert(tmp_path / name, out, shard_bytes=30_000, progress=False)
        assert (out / checkpoint.INDEX_NAME).exists()
        for directory in (tmp_path / name, out):
            config, state, report = convert.load(directory, progress=False)
            assert config.tie_word_embeddings == tied
            assert config.dtype == dtype
            assert report.bytes == sum(tensor.nbytes for tensor in state.values())
            assert_same(unfused(config, state), dict(model.state_dict()))
            assert {n: tuple(t.shape) for n, t in state.items()} == checkpoint.expected_tensors(config)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout_gives_the_same_logits(tmp_path, dtype, tied):
    """Through the engine, as a user loads them: bit for bit the same."""
    hf = checkpoints.hf_model(dtype=dtype, tie_word_embeddings=tied)
    hf.save_pretrained(tmp_path / "single")
    hf.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    checkpoints.save_meta(tmp_path / "meta-1", hf, 1)
    checkpoints.save_meta(tmp_path / "meta-2", hf, 2)
    convert.convert(tmp_path / "sharded", tmp_path / "ours", progress=False)
    tokens = torch.randint(0, 96, (20,), generator=torch.Generator().manual_seed(0))
    logits = []
    for name in ("single", "sharded", "meta-1", "meta-2", "ours"):
        model = Engine.load(tmp_path / name, "cpu").model
        logits.append(model.logits(model(model.embed(tokens), PrefillStep(len(tokens)))))
    assert logits[0].isfinite().all()
    assert all(torch.equal(other, logits[0]) for other in logits[1:])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_families(tmp_path, family):
    model = checkpoints.hf_model(family)
    model.save_pretrained(tmp_path / "hf")
    convert.convert(tmp_path / "hf", tmp_path / "ours", progress=False)
    for directory in (tmp_path / "hf", tmp_path / "ours"):
        config, state, _ = convert.load(directory, progress=False)
        assert (config.model_type, config.qkv_bias, config.qk_norm) == (family, family == "qwen2", family == "qwen3")
        assert_same(unfused(config, state), dict(model.state_dict()))


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_dtype_is_converted_while_reading(tmp_path, layout):
    model = checkpoints.hf_model(dtype=torch.float32)
    save = {"hf": lambda at: model.save_pretrained(at), "meta": lambda at: checkpoints.save_meta(at, model, 2)}[layout]
    save(tmp_path / "in")
    convert.convert(tmp_path / "in", tmp_path / "out", torch.bfloat16, progress=False)
    for loaded in (convert.load(tmp_path / "in", dtype=torch.bfloat16, progress=False), convert.load(tmp_path / "out")):
        config, state, _ = loaded
        assert config.dtype == torch.bfloat16
        assert_same(unfused(config, state), dict(model.to(torch.bfloat16).state_dict()))


def test_dtype_of_a_config_without_one_is_the_file_s(tmp_path):
    checkpoints.save_hf(tmp_path / "hf", dtype=torch.float32)
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "dtype"}))
    assert convert.load(tmp_path / "hf", progress=False)[0].dtype == torch.float32


def test_dtype_of_the_config_is_not_the_file_s(tmp_path):
    model = checkpoints.hf_model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    config, state, report = convert.load(tmp_path / "hf", progress=False)
    assert config.dtype == torch.bfloat16
    assert report.notes == [f"{path}: dtype is torch.bfloat16, the weights are stored as torch.float32"]
    assert_same(unfused(config, state), dict(model.to(torch.bfloat16).state_dict()))


# ---------------------------------------------------------------- Meta


def test_meta_llama2_embeddings_are_cut_along_the_width(tmp_path):
    model = checkpoints.hf_model()
    checkpoints.save_meta(tmp_path / "meta", model, 2)
    width = model.state_dict()["model.embed_tokens.weight"].chunk(2, dim=1)
    for i, half in enumerate(width):
        path = tmp_path / "meta" / f"consolidated.{i:02d}.pth"
        torch.save(torch.load(path) | {"tok_embeddings.weight": half.clone()}, path)
    config, state, _ = convert.load(tmp_path / "meta", progress=False)
    assert_same(unfused(config, state), dict(model.state_dict()))


@pytest.mark.parametrize(
    ("params", "context", "factor"),
    [
        ({}, 4096, None),
        ({"use_scaled_rope": False}, 4096, None),
        ({"use_scaled_rope": True}, 131072, 32.0),
        ({"use_scaled_rope": True, "rope_scaling_factor": 4.0}, 131072, 4.0),
    ],
)
def test_meta_rope(tmp_path, params, context, factor):
    source = convert.open_source(checkpoints.save_meta(tmp_path / "meta", checkpoints.hf_model(), **params))
    config = source.config
    assert config.max_position_embeddings == context
    assert any(str(context) in note for note in source.notes)
    if factor is None:
        assert config.rope_scaling is None
    else:
        scaling = config.rope_scaling
        assert (scaling.type, scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor) == ("llama3", factor, 1.0, 4.0)
        assert scaling.original_max_position_embeddings == 8192


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "llama-3.1-70b"])
def test_meta_params_of_the_released_models(tmp_path, name):
    """The config that follows from Meta's params.json is the one on the hub."""
    hub = SHAPES[name]
    heads = {"n_layers": hub.num_layers, "n_heads": hub.num_heads, "n_kv_heads": hub.num_kv_heads}
    rope = {"norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True, "vocab_size": 128256}
    (tmp_path / "params.json").write_text(json.dumps({"dim": hub.hidden_size} | heads | rope))
    tensors = {"tok_embeddings.weight": (hub.vocab_size, hub.hidden_size), "output.weight": (hub.vocab_size, hub.hidden_size)}
    tensors["layers.0.feed_forward.w1.weight"] = (hub.intermediate_size, hub.hidden_size)
    shard = {
        name: torch.empty(1, dtype=torch.bfloat16).fill_(i).expand(shape) for i, (name, shape) in enumerate(tensors.items())
    }
    if hub.tie_word_embeddings:
        del shard["output.weight"]
    config, _ = convert._meta_config(tmp_path / "params.json", [shard])
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.bos_token_id == 128000
    assert config == type(hub)(**vars(hub) | {"eos_token_ids": config.eos_token_ids, "bos_token_id": 128000})


def test_meta_head_equal_to_the_embeddings_is_tied(tmp_path):
    model = checkpoints.hf_model()
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    config, state, _ = convert.load(checkpoints.save_meta(tmp_path / "meta", model, 2), progress=False)
    assert config.tie_word_embeddings
    assert "output.weight" not in state


@pytest.mark.parametrize(
    ("params", "named"),
    [({"quantization_args": {"group_size": 32}}, "quantization_args"), ({"lora_args": {"rank": 16}}, "lora_args")],
)
def test_meta_variants_are_refused(tmp_path, params, named):
    with pytest.raises(ValueError, match=rf"params\.json: {named}: found .*, supported: none"):
        convert.open_source(checkpoints.save_meta(tmp_path / "meta", checkpoints.hf_model(), **params))


def test_meta_more_shards_than_kv_heads(tmp_path):
    with pytest.raises(ValueError, match="found 4 shards, expected a divisor of n_kv_heads, 2"):
        convert.open_source(checkpoints.save_meta(tmp_path / "meta", checkpoints.hf_model(), 4))


def test_meta_shards_that_do_not_fit_together(tmp_path):
    checkpoints.save_meta(tmp_path / "meta", checkpoints.hf_model(), 2)
    path = tmp_path / "meta" / "consolidated.01.pth"
    torch.save({name: tensor for name, tensor in torch.load(path).items() if name != "norm.weight"}, path)
    with pytest.raises(
        ValueError, match=r"consolidated.01.pth: tensor norm.weight: .* differ from those of consolidated.00.pth"
    ):
        convert.open_source(tmp_path / "meta")


# ---------------------------------------------------------------- the command line


def test_command_line(tmp_path, capsys):
    checkpoints.save_hf(tmp_path / "hf", shard_size="20KB")
    for name in ("tokenizer.model", "chat_template.jinja", "notes.txt"):
        (tmp_path / "hf" / name).write_text(name)
    capsys.readouterr()
    assert convert.main(["--checkpoint-dir", f"{tmp_path}/hf", "--output-dir", f"{tmp_path}/out", "--dtype=float32"]) == 0
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert re.search(r"read .*/hf: huggingface, llama, 2 layers, \d\.\d+ B parameters", stderr)
    assert re.search(r"wrote .*/out: float32, .* GB in .* s, .* GB/s, peak memory .* GB", stderr)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "chat_template.jinja"}
    config, raw = checkpoint.read_config(tmp_path / "out")
    assert config.dtype == torch.float32
    assert raw["rooflama"] == {"format_version": 1, "source": f"{tmp_path}/hf", "quantization": None}


@pytest.mark.parametrize("name", ["hf", "meta", "ours"])
def test_check(tmp_path, capsys, name):
    model = checkpoints.hf_model()
    model.save_pretrained(tmp_path / "hf")
    checkpoints.save_meta(tmp_path / "meta", model)
    convert.convert(tmp_path / "hf", tmp_path / "ours", progress=False)
    before = sorted(tmp_path.rglob("*"))
    assert convert.main(["--checkpoint_dir", f"{tmp_path}/{name}", "--check"]) == 0
    assert "checked 15 tensors" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


USAGE_ERRORS = ["", "--checkpoint_dir x", "--checkpoint_dir x --check --output_dir y", "--check --checkpoint_dir x --nonsense"]


@pytest.mark.parametrize("arguments", [*USAGE_ERRORS, "--checkpoint_dir x --output_dir y --dtype int3"])
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        convert.main(arguments.split())
    assert error.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(FileNotFoundError):
        convert.main(["--checkpoint_dir", str(tmp_path), "--check", "--debug"])


@pytest.mark.parametrize("name", ["/nowhere/at/all", "file.txt", "not a name"])
def test_neither_directory_nor_hub_name(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("")
    assert convert.main(["--checkpoint_dir", name, "--check"]) == 1
    assert capsys.readouterr().err == f"error: {name}: expected a directory, or a hub name like owner/model\n"


# ---------------------------------------------------------------- the hub, played by a server on this machine

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serves repositories owner/NAME from tmp_path/hub/NAME; any token but "good" is turned away from owner/gated."""
    from huggingface_hub import constants

    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in (headers | {"Content-Length": len(body)}).items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            requests.append(self.path)
            route = re.fullmatch(r"/(?:api/models/)?owner/(\w+)/(?:revision|resolve|tree)/([^/?]+)/?([^?]*).*", self.path)
            if route is None:
                return self.answer(404)
            name, revision, file = route.groups()
            directory = tmp_path / "hub" / name
            if name == "gated" and self.headers.get("Authorization") != "Bearer good":
                self.answer(401, b"{}", X_Error_Code="GatedRepo", X_Error_Message="Access to model owner/gated is restricted.")
            elif name == "broken":
                self.answer(500, b"oh\nno")
            elif not directory.exists():
                self.answer(401, b"{}", X_Error_Code="RepoNotFound")
            elif revision not in ("main", COMMIT):
                self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
            elif file:
                body = (directory / file).read_bytes()
                self.answer(200, body, ETag=f'"{hash(body):x}"', X_Repo_Commit=COMMIT)
            else:
                paths = [path for path in directory.rglob("*") if path.is_file()]
                files = [{"rfilename": str(path.relative_to(directory)), "size": path.stat().st_size} for path in paths]
                files = [file | {"type": "file", "path": file["rfilename"], "oid": file["rfilename"]} for file in files]
                about = {"id": f"owner/{name}", "sha": COMMIT, "siblings": files}
                self.answer(200, json.dumps(files if "/tree/" in self.path else about).encode())

        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", here)  # HF_ENDPOINT is read when the library is imported
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", here + template[template.index("/{repo_id}") :])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield requests
    server.shutdown()
    server.server_close()


def test_hub_name(hub, tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants

    model = checkpoints.hf_model()
    repo = tmp_path / "hub" / "tiny"
    model.save_pretrained(repo, max_shard_size="20KB")
    (repo / "original").mkdir()
    for unwanted in ("consolidated.safetensors", "original/consolidated.00.pth", "pytorch_model.bin", "README.md"):
        (repo / unwanted).write_bytes(b"x")
    assert convert.main(["--checkpoint_dir", "owner/tiny", "--output_dir", str(tmp_path / "out")]) == 0
    config, state, _ = convert.load(tmp_path / "out", progress=False)
    assert_same(unfused(config, state), dict(model.state_dict()))
    assert not any(re.search(r"consolidated|pytorch_model|README", request) for request in hub)
    assert checkpoint.read_config(tmp_path / "out")[1]["rooflama"]["source"] == "owner/tiny"

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    requests = len(hub)
    capsys.readouterr()
    assert convert.main(["--checkpoint_dir", "owner/tiny", "--check"]) == 0
    assert convert.main(["--checkpoint_dir", "owner/other", "--check"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        f"error: owner/other@main: HF_HUB_OFFLINE is set, and the cache, {tmp_path}/cache (HF_HOME), does not"
    )
    assert len(hub) == requests


def test_hub_repository_of_meta_files(hub, tmp_path):
    checkpoints.save_meta(tmp_path / "hub" / "meta", checkpoints.hf_model(), 2)
    assert convert.main(["--checkpoint_dir", "owner/meta", "--check"]) == 0


def test_hub_token(hub, tmp_path, monkeypatch):
    checkpoints.save_hf(tmp_path / "hub" / "gated")
    monkeypatch.setenv("HF_TOKEN", "good")
    assert convert.main(["--checkpoint_dir", "owner/gated", "--check"]) == 0


@pytest.mark.parametrize(
    ("repo", "revision", "said"),
    [
        ("gated", "main", "gated: accept its licence at https://huggingface.co/owner/gated and set HF_TOKEN"),
        ("absent", "main", "no such directory, and no such repository on the hub unless private (HF_TOKEN)"),
        ("tiny", "v9", "no such revision"),
        ("broken", "main", "500"),
    ],
)
def test_hub_refusals(hub, tmp_path, capsys, repo, revision, said):
    (tmp_path / "hub" / "tiny").mkdir(parents=True)
    assert convert.main(["--checkpoint_dir", f"owner/{repo}", "--check", "--revision", revision]) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert said in stderr


def test_hub_out_of_reach(hub, capsys, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert convert.main(["--checkpoint_dir", "owner/tiny", "--check"]) == 1
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert "the hub does not answer" in stderr


def test_scripts(hub, tmp_path, capsys):
    """download.py in this process; prepare.sh as a user runs it, offline, from the cache that download.py filled."""
    checkpoints.save_hf(tmp_path / "hub" / "tiny")
    sys.path.insert(0, str(ROOT / "scripts"))
    with contextlib.ExitStack() as stack:
        stack.callback(sys.path.remove, str(ROOT / "scripts"))
        import download
    capsys.readouterr()
    assert download.main(["owner/tiny", "--revision=main"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert (path / "config.json").exists()
    assert download.main(["owner/gated"]) == 1
    assert "gated" in capsys.readouterr().err
    for name in ("", "a/b/c"):
        assert download.main([name]) == 1
        assert capsys.readouterr().err == f"error: repo: found {name!r}, expected owner/model\n"

    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHON": sys.executable}
    command = ["bash", ROOT / "scripts" / "prepare.sh"]
    prepare = {"env": environment | {"CHECKPOINTS": str(tmp_path / "made")}, "capture_output": True, "text": True}
    assert subprocess.run(command, **prepare).returncode == 2
    done = subprocess.run([*command, "owner/tiny", "--dtype", "float32"], **prepare)
    assert done.returncode == 0, done.stderr
    assert convert.load(tmp_path / "made" / "owner" / "tiny", progress=False)[0].dtype == torch.float32
    refused = subprocess.run([*command, "owner/nothing"], **prepare)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: owner/nothing@main: HF_HUB_OFFLINE is set")
    assert refused.stderr.count("\n") == 1
