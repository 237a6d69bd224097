"""The checkpoint: a directory that describes itself.

    config.json                          ModelConfig.to_dict() and "rooflama": {format_version, source, quantization}:
                                         null, or {layers, head: PackedFormat.to_dict() or null, method, and how it was done}
    model-0000i-of-0000n.safetensors     the tensors, under the names of model.Transformer's state dict
    model.safetensors.index.json         which shard holds which tensor, where there is more than one shard
    tokenizer files, generation_config.json

Owns reading safetensors (every claim of a header is checked before anything is allocated), loading onto a device, and atomic
saving. Knows no other layout (convert_hf_checkpoint.py does) and no command line.
"""

import contextlib
import dataclasses
import fcntl
import gc
import json
import math
import os
import re
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.formats import PackedFormat
from model import ModelConfig

FORMAT_VERSION = 1
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 8
MAX_NAME = 500  # characters of a tensor's name
STAGING_BYTES = 16 * 2**20  # of one reader; pinned where the destination is a GPU
READERS = 4  # threads: while some copy to the device, others read
COMPANIONS = (  # copied along with the weights where present
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)
FLOAT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # that weights may have
STORED_DTYPES = FLOAT_DTYPES | {  # that a file may hold beside them
    **{"F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool},
    **{"U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64},
}
DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
Shape = tuple[int, ...]


class TensorSpec(NamedTuple):
    """What a tensor of ours is."""

    dtype: torch.dtype
    shape: Shape

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class TensorInfo(NamedTuple):
    """Where a tensor lies on disk."""

    path: Path
    dtype: torch.dtype
    shape: Shape
    start: int  # of its bytes in the file

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class Piece(NamedTuple):
    """A stored tensor and the part of one of ours that it fills."""

    name: str  # in its own layout
    stored: TensorInfo | Tensor
    view: Callable[[Tensor], Tensor]  # our tensor -> that part, shaped as `stored`; contiguous where that is a TensorInfo
    unpack: Callable[[Tensor], Tensor] | None = None  # what is stored -> what goes there; None: as it is


@dataclass
class Source:
    """A checkpoint opened and checked, nothing read yet."""

    directory: Path
    layout: str  # rooflama, huggingface or meta
    config: ModelConfig
    pieces: dict[str, list[Piece]]  # by our names
    notes: list[str]  # what a user should know: files ignored, embeddings untied
    quantization: dict | None = None  # how packed weights were made: {"method": ..., ...}


class LoadReport(NamedTuple):
    bytes: int  # read from disk
    seconds: float
    gbps: float
    notes: list[str]


Loaded = tuple[ModelConfig, dict[str, Tensor], LoadReport]


# ---------------------------------------------------------------- what a directory says, checked


def read_json(path: Path) -> dict:
    """A JSON object. ValueError names the file."""
    return _parse_object(read_small(path), str(path))


def _parse_object(data: bytes, where: str) -> dict:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: invalid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: found a JSON {type(value).__name__}, expected an object")
    return value


def read_small(path: Path) -> bytes:
    """Any file but one with weights. ValueError: it is no regular file, a placeholder, or larger than such files are."""
    refuse_placeholder(path)
    if (size := path.stat().st_size) > MAX_HEADER_BYTES:
        raise ValueError(f"{path}: found {size} bytes, expected at most {MAX_HEADER_BYTES}")
    return path.read_bytes()


def refuse_placeholder(path: Path) -> None:
    """Downloads that went wrong leave a small text under the right name; a pipe or a device would be read for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path}: found a directory, pipe or device, expected a regular file")
    with open(path, "rb") as file:
        head = file.read(512)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: found a Git LFS pointer, expected the file itself (run `git lfs pull`)")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise ValueError(f"{path}: found an HTML page, expected the file itself (the download went wrong)")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file; what the header claims is checked against the file's real size."""
    refuse_placeholder(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path}: safetensors header: found {length} bytes, expected at most {MAX_HEADER_BYTES}")
        if size < 8 + length:
            raise ValueError(f"{path}: truncated: found {size} bytes, expected more than {8 + length}")
        header = _parse_object(file.read(length), f"{path}: safetensors header")
    header.pop("__metadata__", None)
    entries = [_parse_entry(path, name, entry) for name, entry in header.items()]

    tensors, end = {}, 0  # tensors must fill the rest of the file: no hole, no overlap
    for start, stop, name, dtype, shape in sorted(entries, key=lambda entry: entry[:2]):
        expected = [end, end + dtype.itemsize * math.prod(shape)]
        if [start, stop] != expected:
            raise ValueError(f"{path}: tensor {name}: data_offsets: found [{start}, {stop}], expected {expected}")
        tensors[name], end = TensorInfo(path, dtype, shape, 8 + length + start), stop
    if size != 8 + length + end:
        what = "truncated" if size < 8 + length + end else "bytes after the last tensor"
        raise ValueError(f"{path}: {what}: found {size} bytes, expected {8 + length + end}")
    return tensors


def _parse_entry(path: Path, name: str, entry) -> tuple[int, int, str, torch.dtype, Shape]:
    check_name(path, name)
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, stop]}:
            is_sane = len(shape) <= MAX_DIMENSIONS and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, stop))
            if dtype in STORED_DTYPES and is_sane:
                return start, stop, name, STORED_DTYPES[dtype], tuple(shape)
    known = f"dtype (one of {', '.join(STORED_DTYPES)}), shape and data_offsets (integers)"
    raise ValueError(f"{path}: tensor {name}: found {entry!r:.200}, expected {known}")


def check_name(path: Path, name) -> None:
    """A tensor's name will stand in messages."""
    if not isinstance(name, str) or not name.isprintable() or len(name) > MAX_NAME:
        raise ValueError(f"{path}: tensor {name!r:.100}: expected a name of printable characters, at most {MAX_NAME}")


def find_tensors(directory: Path) -> tuple[dict[str, TensorInfo], list[str]]:
    """Every tensor of a directory's safetensors files, by name, and notes. The index, where there is one, decides."""
    index, weight_map = directory / INDEX_NAME, {}
    present = sorted(path.name for path in directory.glob("*.safetensors"))
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        files = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
        if not all(isinstance(file, str) and re.fullmatch(r"[\w.-]+\.safetensors", file) for file in files):
            raise ValueError(f"{index}: weight_map: expected an object of tensor: name of a .safetensors file beside the index")
        files = set(files)
        if missing := sorted(file for file in files if not (directory / file).exists()):
            raise ValueError(f"{index}: {len(missing)} of {len(files)} shards are missing: {some(missing)}")
    elif "model.safetensors" in present or len(present) == 1:
        files = {"model.safetensors"} if "model.safetensors" in present else set(present)
    else:
        raise ValueError(f"{directory}: found {some(present) or 'no weights'}, expected model.safetensors or {INDEX_NAME}")
    ignored = [file for file in present if file not in files]
    notes = [f"ignored {some(ignored)}: not in {INDEX_NAME if weight_map else some(files)}"] if ignored else []

    headers = {file: read_header(directory / file) for file in sorted(files)}
    for name, file in weight_map.items():
        check_name(index, name)
        if name not in headers[file]:
            where = next((other for other in headers if name in headers[other]), "no shard")
            raise ValueError(f"{index}: {name}: mapped to {file}, found in {where}")
    tensors = {name: info for header in headers.values() for name, info in header.items()}
    return tensors | {name: headers[file][name] for name, file in weight_map.items()}, notes


def check_tensors(
    found: dict[str, TensorInfo], expected: dict[str, Shape], directory: Path, dtypes: dict[str, torch.dtype] | None = None
) -> None:
    """Exactly the expected names, each with its shape and a plain floating-point dtype, or the one that `dtypes` asks for."""
    if missing := [name for name in expected if name not in found]:
        raise ValueError(f"{directory}: {len(missing)} of {len(expected)} tensors are missing: {some(missing)}")
    if extra := [name for name in found if name not in expected]:
        raise ValueError(f"{directory}: {len(extra)} tensors that the model does not have: {some(extra)}")
    for name, shape in expected.items():
        info = found[name]
        if info.shape != shape:
            raise ValueError(f"{info.path}: tensor {name}: shape: found {list(info.shape)}, expected {list(shape)}")
        allowed = [dtypes[name]] if dtypes and name in dtypes else FLOAT_DTYPES.values()
        if info.dtype not in allowed:
            known = some(DTYPE_NAMES[dtype] for dtype in allowed)
            raise ValueError(f"{info.path}: tensor {name}: dtype: found {DTYPE_NAMES[info.dtype]}, expected {known}")


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first few of many, for one line."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def read_config(directory: str | Path) -> tuple[ModelConfig, dict]:
    """config.json of a checkpoint in our format, parsed and as it stands."""
    path = Path(directory) / "config.json"
    raw = read_json(path)
    ours = raw.get("rooflama")
    if not isinstance(ours, dict):
        raise ValueError(f"{path}: rooflama: found {ours!r:.200}, expected an object (convert_hf_checkpoint.py makes one)")
    if (version := ours.get("format_version")) != FORMAT_VERSION:
        raise ValueError(f"{path}: rooflama.format_version: found {version!r:.200}, supported: {FORMAT_VERSION}")
    config = ModelConfig.from_dict(raw, str(path))
    if (quantization := ours.get("quantization")) is not None:
        config = _with_formats(config, quantization, f"{path}: rooflama.quantization")
    return config, raw


def _with_formats(config: ModelConfig, quantization: dict, where: str) -> ModelConfig:
    if not isinstance(quantization, dict) or not {"layers", "head"} <= quantization.keys():
        raise ValueError(f"{where}: found {quantization!r:.200}, supported: null, or an object with layers and head")
    formats = {}
    for name in ("layers", "head"):
        try:
            formats[name] = quantization[name] and PackedFormat.from_dict(quantization[name])
        except ValueError as error:
            raise ValueError(f"{where}.{name}: {error}") from None
    if formats["head"] and config.tie_word_embeddings:
        raise ValueError(f"{where}.head: found {formats['head']}, supported: null (tie_word_embeddings is true)")
    return dataclasses.replace(config, layer_format=formats["layers"], head_format=formats["head"])


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Names and shapes of model.Transformer's state dict, in the order in which they are saved."""
    return {name: spec.shape for name, spec in tensor_specs(config).items()}


def tensor_specs(config: ModelConfig) -> dict[str, TensorSpec]:
    """Names, dtypes and shapes of model.Transformer's state dict, in the order in which they are saved."""
    hidden, inner, qkv = config.hidden_size, config.intermediate_size, config.q_size + 2 * config.kv_size

    def plain(*shape):
        return TensorSpec(config.dtype, shape)

    def weight(name, rows, columns, fmt):
        try:
            tensors = fmt.tensors(rows, columns) if fmt else {"weight": plain(rows, columns)}
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return {f"{name}.{part}": TensorSpec(*spec) for part, spec in tensors.items()}

    layer = {"attention_norm.weight": plain(hidden), **weight("attention.wqkv", qkv, hidden, config.layer_format)}
    if config.qkv_bias:
        layer["attention.wqkv.bias"] = plain(qkv)
    if config.qk_norm:
        layer |= {"attention.q_norm.weight": plain(config.head_dim), "attention.k_norm.weight": plain(config.head_dim)}
    layer |= weight("attention.wo", hidden, config.q_size, config.layer_format) | {"ffn_norm.weight": plain(hidden)}
    layer |= weight("feed_forward.w13", 2 * inner, hidden, config.layer_format)
    layer |= weight("feed_forward.w2", hidden, inner, config.layer_format)
    out = {"tok_embeddings.weight": plain(config.vocab_size, hidden)}
    out |= {f"layers.{i}.{name}": spec for i in range(config.num_layers) for name, spec in layer.items()}
    out["norm.weight"] = plain(hidden)
    if config.tie_word_embeddings:
        return out
    return out | weight("output", config.vocab_size, hidden, config.head_format)


GENERATION_FIELDS = {  # of generation_config.json: type, lowest, highest
    **{"do_sample": (bool, False, True), "temperature": (float, 0, 2), "top_k": (int, 0, 2**31 - 1)},
    **{"top_p": (float, 1e-9, 1), "min_p": (float, 0, 1), "repetition_penalty": (float, 1e-9, 1e9)},
}


def default_generation(directory: str | Path) -> dict:
    """The sampling defaults of generation_config.json, those that it has: GENERATION_FIELDS, and eos_token_id as a list."""
    path = Path(directory) / "generation_config.json"
    raw = read_json(path) if path.exists() else {}
    out = {name: raw[name] for name in GENERATION_FIELDS if raw.get(name) is not None}
    for name, value in out.items():
        kind, low, high = GENERATION_FIELDS[name]
        if type(value) not in (kind, int if kind is float else kind) or not low <= value <= high:
            raise ValueError(f"{path}: {name}: found {value!r:.200}, expected a {kind.__name__} in [{low}, {high}]")
    if (eos := raw.get("eos_token_id")) is not None:
        out["eos_token_id"] = eos if isinstance(eos, list) else [eos]
        if not all(type(token) is int and 0 <= token < 2**31 for token in out["eos_token_id"]):
            raise ValueError(f"{path}: eos_token_id: found {eos!r:.200}, expected a token id or a list of them")
    return out


# ---------------------------------------------------------------- loading


def open_checkpoint(directory: Path) -> Source:
    """A checkpoint of our format."""
    config, raw = read_config(directory)
    found, notes = find_tensors(directory)
    specs, plain = tensor_specs(config), tensor_specs(dataclasses.replace(config, layer_format=None, head_format=None))
    # Those of packed weights are as they are stored: codes and scales mean nothing in another dtype.
    dtypes = {name: spec.dtype for name, spec in specs.items() if spec != plain.get(name)}
    check_tensors(found, expected_tensors(config), directory, dtypes)
    pieces = {name: [Piece(name, found[name], lambda out: out)] for name in specs}
    return Source(directory, "rooflama", config, pieces, notes, raw["rooflama"].get("quantization"))


@torch.inference_mode(False)  # which the reading threads, not having inherited it, could not write to
def load_source(source: Source, device="cpu", dtype: torch.dtype | None = None, progress: bool = True) -> Loaded:
    """A state dict on the device, in `dtype`; None keeps the checkpoint's."""
    began = time.perf_counter()
    config = dataclasses.replace(source.config, dtype=dtype or source.config.dtype)
    specs = tensor_specs(config)
    state = None
    with out_of_memory_suppressed():
        state = {name: torch.empty(spec.shape, dtype=spec.dtype, device=device) for name, spec in specs.items()}
    if state is None:
        needed, free = _num_bytes(specs) / 2**30, free_bytes(torch.device(device)) / 2**30
        raise MemoryError(f"{source.directory}: the weights need {needed:.2f} GiB, free on {device}: {free:.2f} GiB")
    num_bytes = fill(source, state, progress)
    seconds = time.perf_counter() - began
    return config, state, LoadReport(num_bytes, seconds, num_bytes / 1e9 / seconds, source.notes)


@contextlib.contextmanager
def out_of_memory_suppressed() -> Iterator[None]:
    """Ends the block where an allocation fails, on a GPU or in a computer's memory; what was allocated in it is free again."""
    try:
        yield
    except RuntimeError as error:
        if not any(said in str(error) for said in ("out of memory", "can't allocate memory")):
            raise


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nobody holds."""
    if device.type == "cpu":
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    gc.collect()
    with out_of_memory_suppressed():
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return 0  # so little that CUDA itself cannot start


def fill(source: Source, tensors: dict[str, Tensor], progress: bool = True) -> int:
    """Fill tensors of ours, any dtype, any device, from a source; each stored byte is read once. Returns their number."""
    shards: dict[Path, list[tuple[Piece, Tensor]]] = {}
    for name, out in tensors.items():
        for piece in source.pieces[name]:
            if isinstance(piece.stored, TensorInfo):
                shards.setdefault(piece.stored.path, []).append((piece, piece.view(out)))
            else:
                piece.view(out).copy_(piece.stored)
    for number, (path, parts) in enumerate(sorted(shards.items()), 1):
        shard_bytes = sum(piece.stored.nbytes for piece, _ in parts)
        with progress_line(f"load {number}/{len(shards)} {path.name}", shard_bytes, progress) as add:
            direct = [(p.stored.start, p.stored.dtype, part.view(-1)) for p, part in parts if p.unpack is None]
            _read_shard(path, direct, add)
            for piece, part in parts:  # one at a time: each needs its stored form in memory as well
                if piece.unpack is not None:
                    part.copy_(piece.unpack(read_tensor(piece.stored, part.device, add)))
    for device in {out.device for out in tensors.values() if out.is_cuda}:
        torch.cuda.synchronize(device)  # the last copies are still under way
    return sum(piece.stored.nbytes for name in tensors for piece in source.pieces[name])


def read_tensor(info: TensorInfo, device="cpu", add: Callable[[int], None] = lambda num_bytes: None) -> Tensor:
    """One tensor as it is stored. `add` is called with the bytes just read."""
    out = torch.empty(info.shape, dtype=info.dtype, device=device)
    _read_shard(info.path, [(info.start, info.dtype, out.view(-1))], add)
    return out


def _read_shard(path: Path, jobs: list[tuple[int, torch.dtype, Tensor]], add: Callable[[int], None]) -> None:
    """Fill flat tensors from (their place in the file, stored dtype), in the file's order, in chunks, by READERS threads."""
    local = threading.local()

    def read_chunk(offset, dtype, out):
        if out.device.type == "cpu" and out.dtype == dtype:
            _read_exactly(file.fileno(), out, offset, path)  # no second copy
            return out.nbytes
        if not hasattr(local, "staging"):
            local.staging, local.copied = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=out.is_cuda), None
        if local.copied:
            local.copied.synchronize()  # the previous chunk has left the buffer
        staged = local.staging[: out.numel() * dtype.itemsize].view(dtype)
        _read_exactly(file.fileno(), staged, offset, path)
        moved = staged if out.dtype == dtype else staged.to(out.device, non_blocking=True)  # converted where it will live
        out.copy_(moved, non_blocking=True)
        if out.is_cuda:
            local.copied = torch.cuda.current_stream(out.device).record_event()
        return staged.nbytes

    chunks = []
    for start, dtype, out in sorted(jobs, key=lambda job: job[0]):
        step = STAGING_BYTES // dtype.itemsize
        for first in range(0, out.numel(), step):
            chunks.append((start + first * dtype.itemsize, dtype, out[first : first + step]))
    with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(READERS) as pool:
        for num_bytes in pool.map(lambda chunk: read_chunk(*chunk), chunks):
            add(num_bytes)


def _read_exactly(descriptor: int, out: Tensor, offset: int, path: Path) -> None:
    buffer = memoryview(out.view(torch.uint8).numpy())
    while buffer:
        count = os.preadv(descriptor, [buffer], offset)
        if count == 0:
            raise ValueError(f"{path}: truncated while it was read, at byte {offset}")
        buffer, offset = buffer[count:], offset + count


# ---------------------------------------------------------------- saving


def save_checkpoint(
    directory: str | Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    source: str,
    companions: str | Path | None = None,
    shard_bytes: int = 5_000_000_000,
    progress: bool = True,
    quantization: dict | None = None,
) -> int:
    """Write a checkpoint that appears whole or not at all; returns the bytes of its tensors.

    tensors: (name, tensor) as `tensor_specs(config)` lists them; taken one at a time, so that a generator needs memory for one
    only. source: where they come from, for config.json. companions: the input, with tokenizer files. quantization: how the
    weights that config says are packed were made, for config.json; one without "method" is refused when there are such.
    ValueError: other tensors than expected; `directory` is the input, holds something else than a checkpoint, or is being
    written.
    """
    if companions and Path(directory).resolve() == Path(companions).resolve():
        raise ValueError(f"{directory}: the output is the input; expected another directory")
    about = {"format_version": FORMAT_VERSION, "source": source, "quantization": None}
    if config.layer_format or config.head_format:
        formats = {"layers": config.layer_format, "head": config.head_format}
        if "method" not in (quantization or {}):
            raise ValueError(f"quantization: found {quantization}, expected an object with a method")
        about["quantization"] = quantization | {name: fmt and fmt.to_dict() for name, fmt in formats.items()}
    shards: list[dict[str, TensorSpec]] = [{}]
    for name, spec in tensor_specs(config).items():
        if shards[-1] and _num_bytes({**shards[-1], name: spec}) > shard_bytes:
            shards.append({})
        shards[-1][name] = spec
    total, count = sum(map(_num_bytes, shards)), len(shards)
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else ["model.safetensors"]

    with atomic_directory(Path(directory), total) as temporary:
        stream = iter(tensors)
        for number, (file, shard) in enumerate(zip(files, shards, strict=True), 1):
            with progress_line(f"save {number}/{count} {file}", _num_bytes(shard), progress) as add:
                _write_file(temporary / file, _shard_blocks(shard, stream, add))
        if (extra := next(stream, None)) is not None:
            raise ValueError(f"{directory}: tensor {extra[0]}: found after the last, expected none")
        if count > 1:
            weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
            _write_json(temporary / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _write_json(temporary / "config.json", config.to_dict() | {"rooflama": about})
        for path in [Path(companions) / name for name in COMPANIONS] if companions else ():
            if path.is_file():
                _write_file(temporary / path.name, [read_small(path)])
    return total


def _num_bytes(specs: dict[str, TensorSpec]) -> int:
    return sum(spec.num_bytes for spec in specs.values())


def _shard_blocks(specs: dict[str, TensorSpec], stream: Iterator[tuple[str, Tensor]], add: Callable) -> Iterator:
    """A safetensors file in blocks: its header, then each tensor as it comes."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, spec in specs.items():
        start, end = end, end + spec.num_bytes
        header[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # so that the data is aligned
    yield len(head).to_bytes(8, "little") + head
    for name, spec in specs.items():
        got, tensor = next(stream, ("no more", torch.empty(0)))
        if (got, tensor.dtype, tuple(tensor.shape)) != (name, *spec):
            found = f"{got} {tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"tensors to save: found {found}, expected {name} {spec.dtype} {list(spec.shape)}")
        yield memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        add(tensor.nbytes)


def _write_json(path: Path, value: dict) -> None:
    _write_file(path, [(json.dumps(value, indent=2) + "\n").encode()])


def _write_file(path: Path, blocks: Iterable[bytes | memoryview]) -> None:
    try:
        with open(path, "wb") as file:
            file.writelines(blocks)
        _flush_to_disk(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file
        raise


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_directory(final: Path, num_bytes: int = 0) -> Iterator[Path]:
    """A temporary sibling of `final` that takes its place when the block succeeds and is removed when it fails.

    A checkpoint of ours that is already there is replaced, and stays intact on failure. One writer at a time holds a lock;
    what a killed writer left is cleared by the next. `num_bytes` is what the block will write: refused if the disk is too full.
    """
    final = Path(os.path.realpath(final))
    temporary, previous, lock = (final.with_name(f".{final.name}.{what}") for what in ("partial", "previous", "lock"))

    def settle():  # `previous` exists between the two renames below, or where a run was killed there
        if previous.exists():
            shutil.rmtree(previous) if final.exists() else os.rename(previous, final)

    final.parent.mkdir(parents=True, exist_ok=True)
    with _locked(lock, final):
        settle()
        if final.exists():
            _check_replaceable(final)
        if temporary.exists():
            shutil.rmtree(temporary)
        if (free := shutil.disk_usage(final.parent).free) < num_bytes:
            raise OSError(f"{final}: needs {num_bytes / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free")
        try:
            temporary.mkdir()
            yield temporary
            _flush_to_disk(temporary)
            if final.exists():
                os.rename(final, previous)
            os.rename(temporary, final)
            _flush_to_disk(final.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            settle()


def _check_replaceable(final: Path) -> None:
    """Replacing removes what is there: only a checkpoint of ours, without anything that somebody else put beside it."""
    ours = {"config.json", INDEX_NAME, *COMPANIONS}
    others = [path.name for path in final.iterdir() if path.name not in ours and not path.match("model*.safetensors")]
    if others or (any(final.iterdir()) and "rooflama" not in read_json(final / "config.json")):
        found = some(others) or "another checkpoint"
        raise ValueError(f"{final}: found {found}, expected a new or empty directory, or nothing but a checkpoint of ours")


@contextlib.contextmanager
def _locked(lock: Path, final: Path) -> Iterator[None]:
    with open(lock, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it when its holder dies
        except BlockingIOError:
            raise ValueError(f"{final}: another process is writing here: it holds the lock {lock}") from None
        if os.fstat(file.fileno()).st_nlink == 0:  # its holder was just finishing
            raise ValueError(f"{final}: another process has just written here: it held the lock {lock}")
        try:
            yield
        finally:
            lock.unlink()


@contextlib.contextmanager
def progress_line(label: str, total_bytes: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the bytes just done. One line on stderr: redrawn on a terminal, elsewhere printed once."""
    began, drawn, done, start = time.perf_counter(), 0.0, 0, "\r" if sys.stderr.isatty() else ""

    def draw(end):
        gbps = done / 1e9 / max(time.perf_counter() - began, 1e-9)
        bar = ("#" * (24 * done // max(total_bytes, 1))).ljust(24, ".")
        print(f"{start}{label} [{bar}] {done / 1e9:.2f} GB, {gbps:.2f} GB/s", end=end, file=sys.stderr, flush=True)

    def add(num_bytes):
        nonlocal done, drawn
        done += num_bytes
        if show and start and time.perf_counter() - drawn > 0.1:
            drawn = time.perf_counter()
            draw("")

    is_done = False
    try:
        yield add
        is_done = True
    finally:
        if show and (is_done or start):  # a failure leaves the terminal on a new line, and says nothing elsewhere
            draw("\n")
