"""Checkpoints for tests: tiny models of every family, written by transformers or in Meta's layout; one of true size for timing.

python tests/checkpoints.py llama-3.1-8b /tmp/random-8b     a random Hugging Face checkpoint in bf16, in 5 GB shards
"""

import itertools
import json
import math
import struct
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from convert_hf_checkpoint import HF_NAMES, _stored_parts
from model import SHAPES

SIZES = {  # every dimension different from every other, so that a mix-up shows
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64},
}


def hf_model(family="llama", dtype=torch.bfloat16, seed=0, **changes):
    """A random tiny model of transformers, its norms and biases not left at one and zero."""
    import transformers

    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    extra = {"head_dim": 16} if family == "qwen3" else {}
    config = getattr(transformers, f"{name}Config")(**SIZES | extra | changes)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        parameter.data.normal_(0.1, 0.3)
    return model.to(dtype).eval()


def save_hf(directory: Path, shard_size="1GB", **options) -> Path:
    model = hf_model(**options)
    model.save_pretrained(directory, max_shard_size=shard_size)
    return directory


def save_meta(directory: Path, model, num_shards=1, **params) -> Path:
    """The same weights as Meta would have released them: q and k interleaved, every matrix cut for tensor parallelism."""
    state, c = model.state_dict(), model.config

    def interleave(weight, heads):
        return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    tensors = {
        "tok_embeddings.weight": (state["model.embed_tokens.weight"], 0),
        "norm.weight": (state["model.norm.weight"], None),
    }
    if not c.tie_word_embeddings:
        tensors["output.weight"] = (state["lm_head.weight"], 0)
    for i in range(c.num_hidden_layers):
        hf, meta = f"model.layers.{i}.", f"layers.{i}."
        q, k = (state[hf + f"self_attn.{x}_proj.weight"] for x in "qk")
        tensors[meta + "attention.wq.weight"] = (interleave(q, c.num_attention_heads), 0)
        tensors[meta + "attention.wk.weight"] = (interleave(k, c.num_key_value_heads), 0)
        for ours, theirs, dim in (
            *(("attention.wv", "self_attn.v_proj", 0), ("attention.wo", "self_attn.o_proj", 1)),
            *(("feed_forward.w1", "mlp.gate_proj", 0), ("feed_forward.w3", "mlp.up_proj", 0)),
            *(("feed_forward.w2", "mlp.down_proj", 1), ("attention_norm", "input_layernorm", None)),
            ("ffn_norm", "post_attention_layernorm", None),
        ):
            tensors[f"{meta}{ours}.weight"] = (state[f"{hf}{theirs}.weight"], dim)
    directory.mkdir(parents=True)
    for shard in range(num_shards):
        part = {n: t.clone() if d is None else t.chunk(num_shards, d)[shard].clone() for n, (t, d) in tensors.items()}
        torch.save(part | {"rope.freqs": torch.ones(4)}, directory / f"consolidated.{shard:02d}.pth")
    params = {
        **{"dim": c.hidden_size, "n_layers": c.num_hidden_layers, "n_heads": c.num_attention_heads, "vocab_size": -1},
        **{"n_kv_heads": c.num_key_value_heads, "norm_eps": c.rms_norm_eps, "rope_theta": 10000.0, "multiple_of": 256},
    } | params
    (directory / "params.json").write_text(json.dumps(params))
    return directory


def write_safetensors(path: Path, header: dict | bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A file of the format, or one that only claims to be."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head) if length is None else length) + head + data)
    return path


def read_safetensors(path: Path) -> tuple[dict, bytes]:
    """The header and the data of a small file."""
    blob = path.read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    return json.loads(blob[8 : 8 + length]), blob[8 + length :]


def write_random_hf(directory: Path, config, shard_bytes=5_000_000_000, sparse=False) -> None:
    """A Hugging Face checkpoint in bf16 of any size, from a few MB of memory: one random block over and over, or (`sparse`)
    zeros that take no disk."""
    block = torch.empty(2**22, dtype=torch.bfloat16).normal_(0, 0.02).view(torch.uint8).numpy()
    _, shapes = _stored_parts(config, HF_NAMES, "model.")
    shards, weight_map = [{}], {}
    for name, shape in shapes.items():
        if 2 * sum(map(math.prod, [*shards[-1].values(), shape])) > shard_bytes:
            shards.append({})
        shards[-1][name] = shape
    directory.mkdir(parents=True)
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        ends = [0, *itertools.accumulate(2 * math.prod(shape) for shape in shard.values())]
        header = {n: {"dtype": "BF16", "shape": s, "data_offsets": ends[j : j + 2]} for j, (n, s) in enumerate(shard.items())}
        write_safetensors(directory / file, header)
        with open(directory / file, "ab") as out:
            if sparse:
                out.truncate(out.tell() + ends[-1])
            for start in range(0, 0 if sparse else ends[-1], len(block)):
                out.write(block[: ends[-1] - start])
        weight_map |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config.to_dict()))


if __name__ == "__main__":
    write_random_hf(Path(sys.argv[2]), SHAPES[sys.argv[1]])
