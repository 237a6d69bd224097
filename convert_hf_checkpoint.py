"""Any checkpoint, read as ours: Hugging Face safetensors, GPTQ, AWQ and FP8 among them, and Meta's consolidated.*.pth, from a
directory or the hub.

Owns the other layouts: their names, their order of weights, their packing, their configs. Knows nothing of inference.

    python convert_hf_checkpoint.py --checkpoint_dir IN --output_dir OUT [--dtype bfloat16]
    python convert_hf_checkpoint.py --checkpoint_dir IN --check
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import os
import pickle
import re
import resource
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
from checkpoint import Piece, Source, TensorInfo, check_tensors, expected_tensors, read_json, read_tensor, some, tensor_specs
from kernels.formats import GROUP_SIZES, PackedFormat, pack_int4, unpack_int4
from model import DTYPES, ModelConfig

IGNORED = re.compile(r".*rotary_emb\.(inv_freq|cos_cached|sin_cached)|rope\.freqs")  # computed, yet stored by old checkpoints

HF_NAMES = {  # ours -> theirs; several are stacked row-wise
    "tok_embeddings": ("model.embed_tokens",),
    "attention_norm": ("input_layernorm",),
    "attention.wqkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.q_norm": ("self_attn.q_norm",),
    "attention.k_norm": ("self_attn.k_norm",),
    "attention.wo": ("self_attn.o_proj",),
    "ffn_norm": ("post_attention_layernorm",),
    "feed_forward.w13": ("mlp.gate_proj", "mlp.up_proj"),
    "feed_forward.w2": ("mlp.down_proj",),
    "norm": ("model.norm",),
    "output": ("lm_head",),
}
LINEARS = ("attention.wqkv.weight", "attention.wo.weight", "feed_forward.w13.weight", "feed_forward.w2.weight")  # of a layer
META_NAMES = {  # Meta's other names are ours
    "attention.wqkv": ("attention.wq", "attention.wk", "attention.wv"),
    "feed_forward.w13": ("feed_forward.w1", "feed_forward.w3"),
}


# ---------------------------------------------------------------- opening


def load(directory: str | Path, device="cpu", dtype: torch.dtype | None = None, progress: bool = True) -> checkpoint.Loaded:
    """Any checkpoint, converted in memory while it is read: the state dict is in our names."""
    return checkpoint.load_source(open_source(directory), device, dtype, progress)


def open_source(directory: str | Path) -> Source:
    """Check a directory of any layout and say where each of our tensors comes from. ValueError or OSError names the fault."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: found no directory, expected a checkpoint's (scripts/prepare.sh owner/model makes one)")
    if not (directory / "config.json").exists():
        if (directory / "params.json").exists():
            return _open_meta(directory)
        if files := sorted(path.name for path in directory.glob("*.gguf")):
            raise ValueError(f"{directory}: found {some(files)}, supported: safetensors (GGUF is not read)")
    raw = read_json(directory / "config.json")
    return checkpoint.open_checkpoint(directory) if "rooflama" in raw else _open_hf(directory, raw)


def _stored_parts(config: ModelConfig, names: dict[str, tuple[str, ...]], layer_prefix: str) -> tuple[dict, dict]:
    """Of another layout: {our name: [(stored name, its rows in ours)]} and {stored name: its shape by the config}."""
    rows = {
        "attention.wqkv": (config.q_size, config.kv_size, config.kv_size),
        "feed_forward.w13": (config.intermediate_size, config.intermediate_size),
    }
    parts, shapes = {}, {}
    for name, shape in expected_tensors(config).items():
        layer, stem, kind = re.fullmatch(r"(layers\.\d+\.)?(.+)\.(weight|bias)", name).groups()
        parts[name], first = [], 0
        for part, count in zip(names.get(stem, (stem,)), rows.get(stem, shape[:1]), strict=True):
            stored = f"{layer_prefix + layer if layer else ''}{part}.{kind}"
            parts[name].append((stored, slice(first, first + count)))
            shapes[stored], first = (count, *shape[1:]), first + count
    return parts, shapes


# ---------------------------------------------------------------- Hugging Face


def _open_hf(directory: Path, raw: dict) -> Source:
    path = directory / "config.json"
    quantization = raw.get("quantization_config")
    packing = None if quantization is None else _read_packing(quantization, f"{path}: quantization_config")
    config = ModelConfig.from_dict(raw, str(path))
    if not any(directory.glob("*.safetensors")) and (pickles := sorted(f.name for f in directory.glob("pytorch_model*.bin"))):
        raise ValueError(f"{directory}: found {some(pickles)}, expected safetensors (pickled weights are not read)")
    found, notes = checkpoint.find_tensors(directory)
    found = {name: info for name, info in found.items() if not IGNORED.fullmatch(name)}

    head, embedding = found.get("lm_head.weight"), found.get("model.embed_tokens.weight")
    if head is None and raw.get("tie_word_embeddings") is None:
        config = dataclasses.replace(config, tie_word_embeddings=True)
        notes.append("no lm_head.weight: the output layer is tied to the embeddings")
    elif head and config.tie_word_embeddings:
        if embedding and _same_data(head, embedding):
            del found["lm_head.weight"]
        else:
            config = dataclasses.replace(config, tie_word_embeddings=False)
            notes.append(f"warning: {path}: tie_word_embeddings is true, lm_head.weight differs: the file's lm_head is used")
    if embedding and embedding.dtype != config.dtype and embedding.dtype in checkpoint.FLOAT_DTYPES.values():
        if raw.get("dtype") is None and raw.get("torch_dtype") is None:
            config = dataclasses.replace(config, dtype=embedding.dtype)
        else:
            notes.append(f"{path}: dtype is {config.dtype}, the weights are stored as {embedding.dtype}")

    parts, shapes = _stored_parts(config, HF_NAMES, "model.")

    def pieces(stored, suffix="", unpack=None):
        for part, rows in stored:
            part = part.removesuffix(".weight") + suffix if suffix else part
            yield Piece(part, found[part], lambda out, rows=rows: out[rows], unpack)

    if packing is None:
        check_tensors(found, shapes, directory)
        joined = {name: list(pieces(stored)) for name, stored in parts.items()}
        return Source(directory, "huggingface", config, joined, notes)

    linears = {name for name in parts if name.endswith(LINEARS)}
    packed = {part.removesuffix(".weight"): shapes[part] for name in linears for part, _ in parts[name]}
    packing = _check_packed(packing, found, packed, shapes, directory, notes)
    joined = {}
    for name, stored in parts.items():
        if name in linears:
            for part, (suffix, unpack) in packing.parts.items():
                joined[f"{name.removesuffix('weight')}{part}"] = list(pieces(stored, f".{suffix}", unpack))
        else:
            joined[name] = list(pieces(stored))
    config = dataclasses.replace(config, layer_format=packing.format)
    return Source(directory, f"huggingface ({packing.method})", config, joined, notes, {"method": packing.method})


def _same_data(a: TensorInfo, b: TensorInfo) -> bool:
    """Compared in pieces: whether they fit into memory is not known yet."""
    left, step = a.nbytes, 2**24
    with open(a.path, "rb") as file_a, open(b.path, "rb") as file_b:
        file_a.seek(a.start), file_b.seek(b.start)
        while left > 0 and file_a.read(min(step, left)) == file_b.read(min(step, left)):
            left -= step
    return left <= 0 and (a.dtype, a.shape) == (b.dtype, b.shape)


# ---------------------------------------------------------------- packed by others
# Formats of ours take theirs without loss, or the checkpoint is refused: every weight keeps its code, scale and zero point.
# Letters: N rows (output features), K columns (input features), G groups of columns that share a scale.

IGNORED_SCALES = re.compile(r".*\.([a-z]+_)?(input|output|activation|k|v)_scale(_ub)?")  # of activations and cache


@dataclass(frozen=True)
class Packing:
    """How another project stores a quantised linear."""

    method: str
    format: PackedFormat  # ours
    shapes: Callable[[int, int], dict[str, tuple[int, ...]]]  # N, K -> shape of each stored tensor, by the end of its name
    parts: dict[str, tuple[str, Callable[[Tensor], Tensor] | None]]  # tensor of ours: (its stored one, how it is unpacked)
    dtypes: dict[str, torch.dtype]  # of the stored tensors that are not plain floating point
    symmetric_words: tuple[int, ...] = ()  # GPTQ: what the words of qzeros may be, where all zero points are the same


def _read_packing(quantization, where: str) -> Packing:
    """What config.json says of it. ValueError names the field that is not supported."""
    readers = {"gptq": _gptq, "awq": _awq, "fp8": _fp8, "fbgemm_fp8": _fp8, "compressed-tensors": _compressed_tensors}
    return readers[_field(quantization, where, "quant_method", tuple(readers))](quantization, where)


def _field(fields, where: str, name: str, supported: tuple, default=None):
    found = fields.get(name, default) if isinstance(fields, dict) else fields
    if not isinstance(fields, dict) or found not in supported:
        raise ValueError(f"{where}.{name}: found {found!r:.200}, supported: {', '.join(map(str, supported))}")
    return found


def _gptq(quantization: dict, where: str) -> Packing:
    """AutoGPTQ's and GPTQModel's: qweight int32 [K / p, N], p codes a word, the first in the lowest bits; qzeros [G, N / p]."""
    bits = _field(quantization, where, "bits", (4, 8))
    symmetric = bool(_field(quantization, where, "sym", (True, False) if bits == 4 else (True,), True))
    group_size = _field(quantization, where, "group_size", GROUP_SIZES["int4"] if bits == 4 else (-1,))
    _field(quantization, where, "desc_act", (False,), False)
    _field(quantization, where, "is_marlin_format", (False,), False)
    _field(quantization, where, "pack_dtype", ("int32",), "int32")
    _field(quantization, where, "dynamic", (None, {}))
    name = "checkpoint_format" if quantization.get("checkpoint_format") else "format"
    is_v1 = _field(quantization, where, name, ("gptq", "gptq_v2"), "gptq") == "gptq"
    codes = 32 // bits  # of a word

    def shapes(rows, columns):
        groups = columns // group_size if bits == 4 else 1
        return {"qweight": (columns // codes, rows), "qzeros": (groups, rows // codes), "scales": (groups, rows)}

    def weight(qweight):  # a word's bytes are what our packing has: nothing but their order changes
        packed = qweight.unsqueeze(-1).view(torch.uint8).transpose(0, 1).flatten(1)
        return packed if bits == 4 else (packed ^ 128).view(torch.int8)

    def zero(qzeros):  # "gptq" was written less one in every code, as one subtraction of words: GPTQModel adds it so, too
        words = qzeros + 0x11111111 if is_v1 else qzeros
        return unpack_int4(words.view(torch.uint8)).T

    parts = {"weight": ("qweight", weight), "scale": ("scales", lambda scales: scales.T)}
    if symmetric:  # some write the second form under the first's name; both are the middle code
        words = (0x77777777, 0x88888888 - 2**32) if bits == 4 else (0x7F7F7F7F, 0x80808080 - 2**32)
    else:
        parts["zero"], words = ("qzeros", zero), ()
    fmt = PackedFormat("int4", group_size, symmetric) if bits == 4 else PackedFormat("int8")
    return Packing("gptq", fmt, shapes, parts, dict.fromkeys(("qweight", "qzeros"), torch.int32), words)


def _awq(quantization: dict, where: str) -> Packing:
    """AutoAWQ's GEMM layout: qweight int32 [K, N / 8], qzeros [G, N / 8], a word's outputs in the order 0 2 4 6 1 3 5 7."""
    _field(quantization, where, "bits", (4,))
    _field(quantization, where, "zero_point", (True,), True)
    group_size = _field(quantization, where, "group_size", GROUP_SIZES["int4"])
    name = "version" if quantization.get("version") else "format"
    _field({name: str(quantization.get(name, "gemm")).lower()}, where, name, ("gemm",))

    def shapes(rows, columns):
        groups = columns // group_size
        return {"qweight": (columns, rows // 8), "qzeros": (groups, rows // 8), "scales": (groups, rows)}

    def codes(words):
        return unpack_int4(words.view(torch.uint8)).unflatten(1, (-1, 2, 4)).transpose(2, 3).flatten(1).T

    parts = {"weight": ("qweight", lambda words: pack_int4(codes(words))), "scale": ("scales", lambda scales: scales.T)}
    fmt = PackedFormat("int4", group_size, symmetric=False)
    return Packing("awq", fmt, shapes, parts | {"zero": ("qzeros", codes)}, dict.fromkeys(("qweight", "qzeros"), torch.int32))


def _fp8(quantization: dict, where: str) -> Packing:
    """Weights in e4m3 [N, K] beside a scale a row, or one of the whole tensor, which becomes that of each row."""
    _field(quantization, where, "weight_block_size", (None,))
    parts = {"weight": ("weight", None), "scale": ("weight_scale", lambda scale: scale.float().reshape(-1, 1))}
    shapes = lambda rows, columns: {"weight": (rows, columns), "weight_scale": (rows, 1)}
    return Packing(quantization["quant_method"], PackedFormat("fp8"), shapes, parts, {"weight": torch.float8_e4m3fn})


def _compressed_tensors(quantization: dict, where: str) -> Packing:
    """llm-compressor's: float-quantized, as `_fp8`; pack-quantized, int32 [N, K / 8], signed codes plus 8, the first lowest."""
    is_fp8 = _field(quantization, where, "format", ("float-quantized", "pack-quantized")) == "float-quantized"
    _field(quantization.get("sparsity_config") or {}, f"{where}.sparsity_config", "format", ("dense",), "dense")
    supported = {"num_bits": (8,), "type": ("float",), "symmetric": (True,), "strategy": ("channel", "tensor")}
    if not is_fp8:
        supported = {"num_bits": (4,), "type": ("int",), "symmetric": (True, False), "strategy": ("group",)}
        supported |= {"group_size": GROUP_SIZES["int4"], "actorder": (None, "static", "weight")}
    groups, schemes = quantization.get("config_groups"), []
    for name, group in groups.items() if isinstance(groups, dict) else ():
        weights, place = group.get("weights") if isinstance(group, dict) else group, f"{where}.config_groups.{name}.weights"
        scheme = {field: _field(weights, place, field, values) for field, values in supported.items()}
        schemes.append(scheme | {"actorder": None})
    if not schemes or any(scheme != schemes[0] for scheme in schemes):
        raise ValueError(f"{where}.config_groups: found {schemes}, expected groups whose weights are quantised in one way")
    if is_fp8:
        return _fp8(quantization, where)
    symmetric, group_size = bool(schemes[0]["symmetric"]), schemes[0]["group_size"]

    def shapes(rows, columns):
        out = {"weight_packed": (rows, columns // 8), "weight_scale": (rows, columns // group_size)}
        return out if symmetric else out | {"weight_zero_point": (rows // 8, columns // group_size)}

    parts = {"weight": ("weight_packed", lambda words: words.view(torch.uint8)), "scale": ("weight_scale", None)}
    if not symmetric:  # eight rows a word
        parts["zero"] = ("weight_zero_point", lambda words: unpack_int4(words.T.contiguous().view(torch.uint8)).T)
    dtypes = dict.fromkeys(("weight_packed", "weight_zero_point"), torch.int32)
    return Packing("compressed-tensors", PackedFormat("int4", group_size, symmetric), shapes, parts, dtypes)


def _check_packed(packing: Packing, found: dict, packed: dict, shapes: dict, directory: Path, notes: list[str]) -> Packing:
    """Check every tensor of a quantised checkpoint; returns the packing with what only they say of it: their scales' dtype.

    found: all tensors, from which those that mean nothing here are taken; packed: shape [N, K] of each quantised linear;
    shapes: of all tensors, were the checkpoint plain.
    """
    if plain := [name for name in packed if f"{name}.weight" in found and found[f"{name}.weight"].dtype in DTYPES.values()]:
        raise ValueError(f"{directory}: {len(plain)} of {len(packed)} linears of the layers are not quantised: {some(plain)}")
    if ignored := [name for name in found if IGNORED_SCALES.fullmatch(name)]:
        notes.append(f"ignored {len(ignored)} scales of activations and cache: those are not quantised")
    for name in ignored:
        del found[name]
    expected = {name: shape for name, shape in shapes.items() if name.removesuffix(".weight") not in packed}
    dtypes = {}
    for name, (rows, columns) in packed.items():
        stored = packing.shapes(rows, columns)
        _drop_needless(packing, found, name, columns, shapes)
        info = found.get(f"{name}.weight_scale") if packing.format.format == "fp8" else None
        if info and info.shape in ((), (1,), (1, 1), (rows,)):
            stored["weight_scale"] = info.shape
        expected |= {f"{name}.{suffix}": shape for suffix, shape in stored.items()}
        dtypes |= {f"{name}.{suffix}": dtype for suffix, dtype in packing.dtypes.items()}
    check_tensors(found, expected, directory, dtypes)
    for name in packed if packing.symmetric_words else ():
        words, info = torch.tensor(packing.symmetric_words, dtype=torch.int32), found[f"{name}.qzeros"]
        if not torch.isin(read_tensor(info), words).all():
            wrong = "found other zero points than the middle code, but sym is true"
            raise ValueError(f"{info.path}: tensor {name}.qzeros: {wrong}")
    if packing.format.format != "int4":
        return packing
    scale_dtypes = {found[f"{name}.{packing.parts['scale'][0]}"].dtype for name in packed}
    scale_dtype = scale_dtypes.pop() if len(scale_dtypes) == 1 else torch.float32  # which holds all others
    return dataclasses.replace(packing, format=dataclasses.replace(packing.format, scale_dtype=scale_dtype))


def _drop_needless(packing: Packing, found: dict, name: str, columns: int, shapes: dict) -> None:
    """Take from `found` what some writers store beside a quantised linear although it says nothing; refuse it where it does."""
    if f"{name}.weight_scale_inv" in found:  # the same by another name
        found[f"{name}.weight_scale"] = found.pop(f"{name}.weight_scale_inv")
    if (info := found.pop(f"{name}.g_idx", None)) is not None:
        groups = torch.arange(columns) // (packing.format.group_size or columns)
        if info.shape != (columns,) or not torch.equal(read_tensor(info).long(), groups):
            raise ValueError(f"{info.path}: tensor {name}.g_idx: found columns out of order (desc_act), expected them in order")
    found.pop(f"{name}.weight_shape", None)  # which the config says, too
    bias = f"{name}.bias"
    if bias in found and bias not in shapes:
        info = found.pop(bias)
        if read_tensor(info).any():
            raise ValueError(f"{info.path}: tensor {bias}: found a bias, expected none, or zeros")


# ---------------------------------------------------------------- Meta


def _open_meta(directory: Path) -> Source:
    paths = sorted(directory.glob("consolidated.*.pth"))
    expected = [directory / f"consolidated.{i:02d}.pth" for i in range(len(paths))]
    if not paths or paths != expected:
        found = some(path.name for path in paths) or "none"
        raise ValueError(f"{directory}: shards: found {found}, expected consolidated.00.pth, consolidated.01.pth, ...")
    shards = [_read_pickle(path) for path in paths]
    for path, shard in zip(paths, shards, strict=True):
        for name, tensor in shards[0].items():
            if name not in shard or shard[name].shape != tensor.shape or shard.keys() - shards[0].keys():
                raise ValueError(f"{path}: tensor {name}: names and shapes differ from those of {paths[0].name}")
    config, notes = _meta_config(directory / "params.json", shards)
    if config.num_kv_heads % len(shards):
        raise ValueError(f"{directory}: found {len(shards)} shards, expected a divisor of n_kv_heads, {config.num_kv_heads}")

    found = {}
    for name, tensor in shards[0].items():
        shape = list(tensor.shape)
        if len(shape) == 2:
            shape[_joined_dim(name, tensor, config)] *= len(shards)
        found[name] = TensorInfo(paths[0], tensor.dtype, tuple(shape), 0)
    if config.tie_word_embeddings:
        found.pop("output.weight", None)
    parts, shapes = _stored_parts(config, META_NAMES, "")
    check_tensors(found, shapes, directory)

    def pieces(part, rows):
        heads = {"wq": config.num_heads, "wk": config.num_kv_heads}.get(part.split(".")[-2], 0) // len(shards)
        for i, shard in enumerate(shards if shards[0][part].dim() == 2 else shards[:1]):  # norms are in every shard
            yield _meta_piece(part, shard[part], rows, _joined_dim(part, shard[part], config), i, heads)

    joined = {name: [piece for part in stored for piece in pieces(*part)] for name, stored in parts.items()}
    return Source(directory, "meta", config, joined, notes)


def _joined_dim(name: str, tensor: Tensor, config: ModelConfig) -> int:
    """The dimension along which Meta's shards of a tensor are joined."""
    if name == "tok_embeddings.weight":
        return 0 if tensor.shape[-1] == config.hidden_size else 1  # Llama 3 splits the vocabulary, Llama 2 the width
    return 1 if name.endswith(("attention.wo.weight", "feed_forward.w2.weight")) else 0


def _meta_piece(name: str, tensor: Tensor, rows: slice, dim: int, index: int, heads: int) -> Piece:
    """One shard's part. Meta rotates neighbouring rows of q and k (interleaved), we rotate halves of a head."""

    def view(out):
        size = tensor.shape[dim]
        out = out[rows].narrow(dim, index * size, size)
        return out.view(heads, 2, -1, out.shape[1]) if heads else out

    stored = tensor.view(heads, -1, 2, tensor.shape[1]).transpose(1, 2) if heads else tensor
    return Piece(name, stored, view)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """A .pth file, mapped, not read. Only tensors are unpickled, and only such as lie in the file as they are."""
    checkpoint.refuse_placeholder(path)
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ValueError(f"{path}: truncated, or not a .pth file: {error}") from None
    size = path.stat().st_size
    if claimed > size:  # compressed: a megabyte can become gigabytes
        raise ValueError(f"{path}: found members of {claimed} bytes in a file of {size}, expected no compression")
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {culprit[1]!r:.200}" if culprit else f"{str(error)!r:.200}"
        raise ValueError(f"{path}: refused: {what}; expected a pickle of nothing but tensors") from None
    except Exception as error:  # the reader of a broken file may stumble anywhere
        raise ValueError(f"{path}: truncated, or not a .pth file: {error!r:.200}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path}: found a pickled {type(tensors).__name__}, expected a dict of tensors")
    for name, tensor in tensors.items():
        checkpoint.check_name(path, name)
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"{path}: tensor {name}: found a sparse, strided or empty one, expected all of its values")
    if (claimed := sum(tensor.nbytes for tensor in tensors.values())) > 2 * size:  # tied embeddings count twice
        raise ValueError(f"{path}: found tensors of {claimed} bytes in a file of {size}, expected at most as many")
    return {name: tensor for name, tensor in tensors.items() if not IGNORED.fullmatch(name)}


def _meta_config(path: Path, shards: list[dict[str, Tensor]]) -> tuple[ModelConfig, list[str]]:
    """params.json says less than a config.json: sizes are completed from the tensors, the rest from what Meta released."""
    params, first = read_json(path), shards[0]
    for name in ("dim", "n_layers", "n_heads", "norm_eps"):
        if not isinstance(params.get(name), int | float):
            raise ValueError(f"{path}: {name}: found {params.get(name)!r:.200}, expected a number")
    if not isinstance(params.get("rope_scaling_factor"), int | float | None):
        raise ValueError(f"{path}: rope_scaling_factor: found {params['rope_scaling_factor']!r:.200}, expected a number")
    for name in ("quantization_args", "lora_args"):
        if params.get(name) is not None:
            raise ValueError(f"{path}: {name}: found {params[name]!r:.200}, supported: none")
    needed = ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight")
    if missing := [name for name in needed if name not in first or first[name].dim() != 2]:
        raise ValueError(f"{path.parent}: tensors are missing, or no matrices: {some(missing)}")

    embedding, dim = first["tok_embeddings.weight"], params["dim"]
    is_tied = "output.weight" not in first or all(torch.equal(s["output.weight"], s["tok_embeddings.weight"]) for s in shards)
    vocab_size = embedding.shape[0] * (len(shards) if embedding.shape[1] == dim else 1)
    is_llama3, is_long = vocab_size >= 128256, bool(params.get("use_scaled_rope"))
    hf = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": dim,
        "intermediate_size": first["layers.0.feed_forward.w1.weight"].shape[0] * len(shards),
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads"),
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": params.get("rope_theta"),
        "max_position_embeddings": 131072 if is_long else 8192 if is_llama3 else 4096,
        "tie_word_embeddings": is_tied,
        "bos_token_id": 128000 if is_llama3 else 1,
        "eos_token_id": [128001, 128008, 128009] if is_llama3 else [2],
        "dtype": str(embedding.dtype),
    }  # fmt: skip
    notes = [f"{path.name} has no context length: {hf['max_position_embeddings']} positions, as Meta released"]
    if is_long:
        # Meta's code (llama-models) scales by 8 for every size; on the hub its 1B and 3B (Llama 3.2) have 32, the others 8.
        factor = params.get("rope_scaling_factor") or (32.0 if dim <= 3072 else 8.0)
        hf["rope_scaling"] = {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": 8192}
        hf["rope_scaling"] |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        notes.append(f"{path.name}: use_scaled_rope: llama3 RoPE scaling by {factor:g}, as the hub has for this size")
    return ModelConfig.from_dict(hf, str(path)), notes


# ---------------------------------------------------------------- the hub


def resolve(name: str, revision: str | None = None) -> Path:
    """A directory as it is, or a hub name (owner/model), downloaded into the hub's cache."""
    if Path(name).is_dir():
        if revision:
            raise ValueError(f"revision: found {revision!r} with the directory {name}, expected a hub name like owner/model")
        return Path(name)
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"{name}: expected a directory, or a hub name like owner/model")
    return download(name, revision)


def download(repo: str, revision: str | None = None, token: str | None = None) -> Path:
    """Fetch a repository's weights, config and tokenizer into the hub's cache (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE hold)."""
    from huggingface_hub import constants, errors, snapshot_download

    where = f"{repo}@{revision or 'main'}"
    fetch = functools.partial(snapshot_download, repo, revision=revision, token=token)
    try:
        wanted = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "merges.txt"]
        path = Path(fetch(allow_patterns=wanted, ignore_patterns=["original/*", "consolidated*"]))
        return path if any(path.glob("*.safetensors")) else Path(fetch(allow_patterns=["*.pth", "*.json", "tokenizer*"]))
    except errors.GatedRepoError:
        page = f"https://huggingface.co/{repo}"
        raise ValueError(f"{where}: gated: accept its licence at {page} and set HF_TOKEN to a token of that account") from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{where}: no such revision") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"{where}: no such directory, and no such repository on the hub unless private (HF_TOKEN)") from None
    except errors.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"the hub does not answer ({error.__cause__})"
        raise ConnectionError(f"{where}: {why}, and the cache, {constants.HF_HUB_CACHE} (HF_HOME), does not hold it") from None
    except (OSError, ValueError):
        raise  # a full disk, an answer of the hub, a malformed name: they say so themselves
    except Exception as error:  # whatever the network library raises
        raise ConnectionError(f"{where}: download failed: {error}") from error


# ---------------------------------------------------------------- converting and checking


def finite_tensors(source: Source, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Our tensors on the CPU, one at a time. ValueError names a stored tensor that holds NaN or Inf."""
    for name, spec in tensor_specs(dataclasses.replace(source.config, dtype=dtype)).items():
        out = torch.empty(spec.shape, dtype=spec.dtype)
        checkpoint.fill(source, {name: out}, progress=False)
        for piece in source.pieces[name]:
            values = piece.view(out)
            if values.dtype == torch.float8_e4m3fn:  # whose NaN has every bit set but the sign
                bad = (values.view(torch.uint8) & 127 == 127).any()
            else:
                bad = not torch.stack(torch.aminmax(values)).isfinite().all()  # aminmax passes NaN on
            if bad:
                raise ValueError(f"{source.directory}: tensor {piece.name}: NaN or Inf among its values (as {dtype})")
        yield name, out


def _one_ahead(items: Iterator) -> Iterator:
    """Makes the next item in a thread while the caller uses this one: reading goes on while we write."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(next, items, None)
        while (item := ahead.result()) is not None:
            ahead = pool.submit(next, items, None)
            yield item


def convert(directory: Path, output: Path, dtype: torch.dtype | None = None, name: str = "", **options) -> tuple[Source, int]:
    """Write any checkpoint as one of ours; returns what was read and the bytes written.

    `name` is kept as its source, the directory by default; options go to save_checkpoint.
    """
    source = open_source(directory)
    config = dataclasses.replace(source.config, dtype=dtype or source.config.dtype)
    tensors = _one_ahead(finite_tensors(source, config.dtype))
    name = name or str(directory)
    options |= {"source": name, "companions": directory, "quantization": source.quantization}
    return source, checkpoint.save_checkpoint(output, config, tensors, **options)


# ---------------------------------------------------------------- command line


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint_dir", required=True, help="a directory, or a hub name like owner/model")
    parser.add_argument("--output_dir", help="where our checkpoint is written")
    parser.add_argument("--dtype", choices=DTYPES, help="the checkpoint's own by default")
    parser.add_argument("--revision", help="of the hub's repository: a branch, tag or commit")
    parser.add_argument("--check", action="store_true", help="read everything, write nothing: present, shaped, finite")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(underscored(argv))
    if args.check == bool(args.output_dir):
        parser.error("expected either --output_dir or --check")
    return args


def underscored(argv: list[str]) -> list[str]:
    """Flags written with dashes, as the parsers spell them."""
    return [re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), arg) for arg in argv]


def check_least(parser: argparse.ArgumentParser, args: argparse.Namespace, **least: int) -> None:
    """Ends the program where a number of the command line, one that this command has, is less than the least of its name."""
    for name, number in least.items():
        if (found := getattr(args, name, number)) < number:
            parser.error(f"--{name}: found {found}, expected at least {number}")


def parse_device(name: str) -> torch.device:
    """A device that is there. ValueError names it."""
    count = torch.cuda.device_count()
    devices = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if name not in devices:
        raise ValueError(f"device: found {name!r}, expected {' or '.join(devices)}")
    return torch.device(name)


def run(args: argparse.Namespace) -> None:
    directory, dtype = resolve(args.checkpoint_dir, args.revision), DTYPES.get(args.dtype)
    began = time.perf_counter()
    if args.check:
        source = open_source(directory)
        num_bytes = sum(tensor.nbytes for _, tensor in finite_tensors(source, dtype or source.config.dtype))
        done = f"checked {len(source.pieces)} tensors: present, shaped, finite"
    else:
        source, num_bytes = convert(directory, Path(args.output_dir), dtype, args.checkpoint_dir)
        done = f"wrote {args.output_dir}: {str(dtype or source.config.dtype).removeprefix('torch.')}"
    sec, peak_bytes = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    config = source.config
    plain = dataclasses.replace(config, layer_format=None, head_format=None)
    parameters = sum(map(math.prod, expected_tensors(plain).values()))
    what = f"{source.layout}, {config.model_type}, {config.num_layers} layers, {parameters / 1e9:.3f} B parameters"
    speed = f"{num_bytes / 1e9:.2f} GB in {sec:.1f} s, {num_bytes / 1e9 / sec:.2f} GB/s, peak memory {peak_bytes / 1e9:.2f} GB"
    print(*source.notes, f"read {directory}: {what}", f"{done}, {speed}", sep="\n", file=sys.stderr)


def report_errors(work: Callable[[], None], debug: bool) -> int:
    """The exit status: 0; 1 after one line on stderr, or, to debug, a traceback; 130 after Ctrl-C."""
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone: `| head -1`
        end_output()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError, FloatingPointError, torch.cuda.OutOfMemoryError) as error:
        if debug:
            raise
        print("error:", one_line(error), file=sys.stderr)
        end_output()
        return 1
    return 0


def end_output() -> None:
    """Writes what is left of the output; where that fails (a closed pipe, a full disk), Python must not try again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(error: BaseException | str) -> str:
    """What an error says, whoever raised it: one line, in which no file can command the terminal."""
    text = str(error)
    if isinstance(error, OSError) and isinstance(error.filename, (str, Path)):
        with contextlib.suppress(OSError):  # where we may not even look
            text = _found(error)
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def _found(error: OSError) -> str:
    """What the system's commonest complaints of a path come from, in the words of all other messages."""
    path = Path(error.filename)
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{path}: found no such file" if path.parent.is_dir() else f"{path}: found no directory {path.parent}"
    if isinstance(error, IsADirectoryError):
        return f"{path}: found a directory, expected a file"
    file = next((parent for parent in (path, *path.parents) if parent.is_file()), None)
    if isinstance(error, (NotADirectoryError, FileExistsError)) and file:
        return f"{file}: found a file, expected a directory"
    return str(error)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    return report_errors(lambda: run(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
