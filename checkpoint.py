"""The checkpoint: a directory that describes itself.

    config.json                          ModelConfig.to_dict() and "rooflama": {format_version, source, quantization}
    model-0000i-of-0000n.safetensors     the tensors, under the names of model.Transformer's state dict
    model.safetensors.index.json         which shard holds which tensor, where there is more than one shard
    tokenizer files, generation_config.json

Owns reading safetensors (every claim of a header is checked before anything is allocated), loading onto a device, and atomic
saving. Knows no other layout (convert_hf_checkpoint.py does) and no command line.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model import ModelConfig

FORMAT_VERSION = 1
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
STAGING_BYTES = 16 * 2**20  # of one reader; pinned where the destination is a GPU
READERS = 4  # threads: while some copy to the device, others read
GENERATION_CONFIG = "generation_config.json"
COMPANIONS = (  # copied along with the weights where present
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", GENERATION_CONFIG),
)
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SAFETENSORS_DTYPES = {
    **{"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool, "U8": torch.uint8},
    **{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64},
}
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class TensorInfo(NamedTuple):
    """Where a tensor lies on disk."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # of its bytes in the file

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class Piece(NamedTuple):
    """A stored tensor and the part of one of ours that it fills."""

    name: str  # in its own layout
    stored: TensorInfo | Tensor
    view: Callable[[Tensor], Tensor]  # our tensor -> that part, shaped as `stored`; contiguous where that is a TensorInfo


@dataclass
class Source:
    """A checkpoint opened and checked, nothing read yet."""

    directory: Path
    layout: str  # rooflama, huggingface or meta
    config: ModelConfig
    pieces: dict[str, list[Piece]]  # by our names
    notes: list[str] = field(default_factory=list)  # what a user should know: files ignored, embeddings untied


@dataclass
class LoadReport:
    bytes: int  # read from disk
    seconds: float
    notes: list[str]

    @property
    def gbps(self) -> float:
        return self.bytes / 1e9 / max(self.seconds, 1e-9)


# ---------------------------------------------------------------- reading and checking what a directory says


def read_json(path: Path) -> dict:
    """A JSON object. ValueError names the file."""
    refuse_placeholder(path)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: invalid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: found a JSON {type(value).__name__}, expected an object")
    return value


def refuse_placeholder(path: Path) -> None:
    """Downloads that went wrong leave a small text under the right name."""
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
        if size < 8 or length > MAX_HEADER_BYTES:
            raise ValueError(f"{path}: safetensors header: found {length} bytes in {size}, expected at most {MAX_HEADER_BYTES}")
        if 8 + length > size:
            raise ValueError(f"{path}: truncated: found {size} bytes, its header alone needs {8 + length}")
        try:
            header = json.loads(file.read(length))
            entries = [(name, *_parse_entry(entry)) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: safetensors header: malformed: {str(error)[:200]}") from None

    tensors, end = {}, 0  # tensors must fill the rest of the file: no hole, no overlap
    for name, dtype, shape, start, stop in sorted(entries, key=lambda entry: entry[3:]):
        num_bytes = math.prod(shape) * dtype.itemsize
        if start != end or stop - start != num_bytes:
            expected = f"[{end}, {end + num_bytes}]"
            raise ValueError(f"{path}: tensor {name}: data_offsets: found [{start}, {stop}], expected {expected}")
        tensors[name], end = TensorInfo(path, dtype, shape, 8 + length + start), stop
    if 8 + length + end != size:
        what = "truncated" if size < 8 + length + end else "bytes after the last tensor"
        raise ValueError(f"{path}: {what}: found {size} bytes, expected {8 + length + end}")
    return tensors


def _parse_entry(entry: dict) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"shape {shape} and data_offsets [{start}, {stop}] must be integers of at least 0")
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise ValueError(f"dtype: found {entry['dtype']!r}, expected one of {', '.join(SAFETENSORS_DTYPES)}")
    return SAFETENSORS_DTYPES[entry["dtype"]], shape, start, stop


def find_tensors(directory: Path) -> tuple[dict[str, TensorInfo], list[str]]:
    """Every tensor of a directory's safetensors files, by name, and notes. The index, where there is one, decides."""
    present = sorted(path.name for path in directory.glob("*.safetensors"))
    weight_map = None
    if (directory / INDEX_NAME).exists():
        index = directory / INDEX_NAME
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError(f"{index}: weight_map: found {type(weight_map).__name__}, expected an object of tensor: file name")
        files = sorted(set(weight_map.values()))
        if outside := [file for file in files if Path(file).name != file]:
            raise ValueError(f"{index}: weight_map: found {some(outside)}, expected names of files in the same directory")
        if missing := [file for file in files if not (directory / file).exists()]:
            raise ValueError(f"{index}: {len(missing)} of {len(files)} shards are missing: {some(missing)}")
    elif "model.safetensors" in present:
        files = ["model.safetensors"]
    elif len(present) == 1:
        files = present
    else:
        raise ValueError(f"{directory}: found {some(present) or 'no weights'}, expected model.safetensors or {INDEX_NAME}")
    ignored = [file for file in present if file not in files]
    notes = [f"ignored {some(ignored)}: not part of {INDEX_NAME if weight_map else files[0]}"] if ignored else []

    headers = {file: read_header(directory / file) for file in files}
    for name, file in (weight_map or {}).items():
        if name not in headers[file]:
            where = next((other for other in files if name in headers[other]), "no shard")
            raise ValueError(f"{directory / INDEX_NAME}: {name}: mapped to {file}, found in {where}")
    tensors = {name: info for header in headers.values() for name, info in header.items()}
    return tensors | {name: headers[file][name] for name, file in (weight_map or {}).items()}, notes


def check_tensors(found: dict[str, TensorInfo], expected: dict[str, tuple[int, ...]], directory: Path) -> None:
    """Exactly the expected names, each with its shape and a plain floating-point dtype."""
    if missing := [name for name in expected if name not in found]:
        raise ValueError(f"{directory}: {len(missing)} of {len(expected)} tensors are missing: {some(missing)}")
    if extra := [name for name in found if name not in expected]:
        raise ValueError(f"{directory}: {len(extra)} tensors that the model does not have: {some(extra)}")
    for name, shape in expected.items():
        info = found[name]
        if info.shape != tuple(shape):
            raise ValueError(
                f"{info.path}: tensor {name}: shape: found {list(info.shape)}, expected {list(shape)} by the config"
            )
        if info.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{info.path}: tensor {name}: dtype: found {DTYPE_NAMES[info.dtype]}, expected BF16, F16 or F32")


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
        raise ValueError(f"{path}: rooflama: found {ours!r}, expected an object (convert_hf_checkpoint.py makes one)")
    if ours.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: rooflama.format_version: found {ours.get('format_version')!r}, expected {FORMAT_VERSION}")
    if ours.get("quantization") is not None:
        raise ValueError(f"{path}: rooflama.quantization: found {ours['quantization']!r}, supported: none")
    return ModelConfig.from_dict(raw, str(path)), raw


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of model.Transformer's state dict, in the order in which they are saved."""
    hidden, inner, qkv = config.hidden_size, config.intermediate_size, config.q_size + 2 * config.kv_size
    layer = {"attention_norm.weight": (hidden,), "attention.wqkv.weight": (qkv, hidden)}
    if config.qkv_bias:
        layer["attention.wqkv.bias"] = (qkv,)
    if config.qk_norm:
        layer |= {"attention.q_norm.weight": (config.head_dim,), "attention.k_norm.weight": (config.head_dim,)}
    layer |= {"attention.wo.weight": (hidden, config.q_size), "ffn_norm.weight": (hidden,)}
    layer |= {"feed_forward.w13.weight": (2 * inner, hidden), "feed_forward.w2.weight": (hidden, inner)}
    out = {"tok_embeddings.weight": (config.vocab_size, hidden)}
    out |= {f"layers.{i}.{name}": shape for i in range(config.num_layers) for name, shape in layer.items()}
    out["norm.weight"] = (hidden,)
    return out if config.tie_word_embeddings else out | {"output.weight": (config.vocab_size, hidden)}


def _is_number(value, low, high) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_id(value) -> bool:
    return type(value) is int and value >= 0


GENERATION_FIELDS = {
    "do_sample": (lambda v: isinstance(v, bool), "true or false"),
    "temperature": (lambda v: _is_number(v, 0, 2), "a number in [0, 2]"),
    "top_k": (_is_id, "an integer of at least 0"),
    "top_p": (lambda v: _is_number(v, 0, 1) and v > 0, "a number in (0, 1]"),
    "min_p": (lambda v: _is_number(v, 0, 1), "a number in [0, 1]"),
    "repetition_penalty": (lambda v: _is_number(v, 0, sys.float_info.max) and v > 0, "a number above 0"),
    "eos_token_id": (lambda v: all(map(_is_id, v if isinstance(v, list) else [v])), "a token id or a list of them"),
}


def default_generation(directory: str | Path) -> dict:
    """The sampling defaults of generation_config.json, those that it has: GENERATION_FIELDS, eos_token_id always as a list."""
    path = Path(directory) / GENERATION_CONFIG
    raw = read_json(path) if path.exists() else {}
    out = {name: raw[name] for name in GENERATION_FIELDS if raw.get(name) is not None}
    for name, value in out.items():
        is_valid, expected = GENERATION_FIELDS[name]
        if not is_valid(value):
            raise ValueError(f"{path}: {name}: found {value!r}, expected {expected}")
    if isinstance(out.get("eos_token_id"), int):
        out["eos_token_id"] = [out["eos_token_id"]]
    return out


# ---------------------------------------------------------------- loading


def load_checkpoint(directory: str | Path, device="cpu", dtype: torch.dtype | None = None, progress: bool = True):
    """A checkpoint of our format: (config, state dict on the device, LoadReport). `dtype` None keeps the checkpoint's."""
    return load_source(open_checkpoint(directory), device, dtype, progress)


def open_checkpoint(directory: str | Path) -> Source:
    directory = Path(directory)
    config, _ = read_config(directory)
    found, notes = find_tensors(directory)
    expected = expected_tensors(config)
    check_tensors(found, expected, directory)
    return Source(directory, "rooflama", config, {n: [Piece(n, found[n], lambda out: out)] for n in expected}, notes)


def load_source(source: Source, device="cpu", dtype: torch.dtype | None = None, progress: bool = True):
    """Allocate every tensor on the device and fill it: (config, state dict, LoadReport)."""
    began = time.perf_counter()
    config = dataclasses.replace(source.config, dtype=dtype or source.config.dtype)
    shapes = expected_tensors(config)
    state = {name: torch.empty(shape, dtype=config.dtype, device=device) for name, shape in shapes.items()}
    num_bytes = fill(source, state, progress)
    return config, state, LoadReport(num_bytes, time.perf_counter() - began, source.notes)


def fill(source: Source, tensors: dict[str, Tensor], progress: bool = True) -> int:
    """Fill tensors of ours, any dtype, any device, from a source; each stored byte is read once. Returns their number."""
    shards: dict[Path, list[tuple[TensorInfo, Tensor]]] = {}
    num_bytes = 0
    for name, out in tensors.items():
        for _, stored, view in source.pieces[name]:
            if isinstance(stored, TensorInfo):
                shards.setdefault(stored.path, []).append((stored, view(out).view(-1)))
            else:
                view(out).copy_(stored)
                num_bytes += stored.nbytes
    for number, (path, jobs) in enumerate(sorted(shards.items()), 1):
        shard_bytes = sum(info.num_bytes for info, _ in jobs)
        num_bytes += shard_bytes
        with Progress(f"load {number}/{len(shards)} {path.name}", shard_bytes, progress) as bar:
            _read_shard(path, jobs, bar)
    for device in {out.device for out in tensors.values() if out.is_cuda}:
        torch.cuda.synchronize(device)  # the last copies are still under way
    return num_bytes


def _read_shard(path: Path, jobs: list[tuple[TensorInfo, Tensor]], bar: "Progress") -> None:
    """Flat destinations of one file, in the file's order, cut into chunks that READERS threads work through."""
    local = threading.local()

    def read_chunk(chunk):
        out, dtype, offset = chunk
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
    for info, out in sorted(jobs, key=lambda job: job[0].start):
        step = STAGING_BYTES // info.dtype.itemsize
        for first in range(0, out.numel(), step):
            chunks.append((out[first : first + step], info.dtype, info.start + first * info.dtype.itemsize))
    with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(READERS) as pool:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        for num_bytes in pool.map(read_chunk, chunks):
            bar.add(num_bytes)


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
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] | None = None,
    quantization: dict | None = None,
    companions: str | Path | None = None,
    shard_bytes: int = 5_000_000_000,
    progress: bool = True,
) -> int:
    """Write a checkpoint that appears whole or not at all; returns the bytes of its tensors.

    tensors: (name, tensor) in the order of `layout`, taken one at a time, so that a generator needs memory for one only.
    layout: name -> (dtype, shape); None = `expected_tensors(config)` in config.dtype.
    source: where the weights come from, kept in config.json. companions: a directory to copy tokenizer files from.
    ValueError: the tensors are not those of the layout, `directory` holds something else, or another process is writing it.
    """
    if layout is None:
        layout = {name: (config.dtype, shape) for name, shape in expected_tensors(config).items()}
    shards: list[dict] = [{}]
    for name, (dtype, shape) in layout.items():
        if shards[-1] and _num_bytes(shards[-1]) + _num_bytes({name: (dtype, shape)}) > shard_bytes:
            shards.append({})
        shards[-1][name] = (dtype, shape)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = files if len(files) > 1 else ["model.safetensors"]
    total = sum(map(_num_bytes, shards))

    with atomic_directory(Path(directory), total) as temporary:
        stream = iter(tensors)
        for number, (file, shard) in enumerate(zip(files, shards, strict=True), 1):
            with Progress(f"save {number}/{len(files)} {file}", _num_bytes(shard), progress) as bar:
                _write_shard(temporary / file, shard, stream, bar)
        if (extra := next(stream, None)) is not None:
            raise ValueError(f"{directory}: tensor {extra[0]} is not in the layout")
        if len(files) > 1:
            weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
            _write_json(temporary / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
        about = {"format_version": FORMAT_VERSION, "source": source, "quantization": quantization}
        _write_json(temporary / "config.json", config.to_dict() | {"rooflama": about})
        for name in COMPANIONS if companions else ():
            if (Path(companions) / name).is_file():
                _write_file(temporary / name, [(Path(companions) / name).read_bytes()])
    return total


def _num_bytes(layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())


def _write_shard(path: Path, layout: dict, stream: Iterator[tuple[str, Tensor]], bar: "Progress") -> None:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + _num_bytes({name: (dtype, shape)})
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # so that the data is aligned

    def blocks():
        yield len(head).to_bytes(8, "little") + head
        for name, (dtype, shape) in layout.items():
            got, tensor = next(stream, ("nothing", torch.empty(0)))
            if (got, tensor.dtype, tuple(tensor.shape)) != (name, dtype, tuple(shape)):
                found, expected = f"{got} {tensor.dtype} {list(tensor.shape)}", f"{name} {dtype} {list(shape)}"
                raise ValueError(f"{path.name}: found tensor {found}, expected {expected}")
            yield memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
            bar.add(tensor.nbytes)

    _write_file(path, blocks())


def _write_json(path: Path, value: dict) -> None:
    _write_file(path, [(json.dumps(value, indent=2) + "\n").encode()])


def _write_file(path: Path, blocks: Iterable[bytes | memoryview]) -> None:
    """Write and flush to the disk; an error names the file."""
    try:
        with open(path, "wb") as file:
            for block in blocks:
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def atomic_directory(final: Path, num_bytes: int = 0) -> Iterator[Path]:
    """A temporary sibling of `final` that takes its place when the block succeeds and is removed when it fails.

    A checkpoint of ours that is already there is replaced, and stays intact on failure. One writer at a time holds a lock;
    what a killed writer left is cleared by the next. `num_bytes` is what the block will write: refused if the disk is too full.
    """
    final = Path(os.path.realpath(final))
    temporary, previous, lock = (final.with_name(f".{final.name}.{what}") for what in ("partial", "previous", "lock"))

    def restore():  # `previous` exists only between the two renames below, or where a run was killed there
        if previous.exists():
            os.rename(previous, final) if not final.exists() else shutil.rmtree(previous)

    final.parent.mkdir(parents=True, exist_ok=True)
    with _locked(lock, final):
        restore()
        _check_replaceable(final)
        if temporary.exists():
            shutil.rmtree(temporary)
        free = shutil.disk_usage(final.parent).free
        if free < num_bytes:
            raise OSError(f"{final}: needs {num_bytes / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free")
        try:
            temporary.mkdir()
            yield temporary
            _fsync_directory(temporary)
            if final.exists():
                os.rename(final, previous)
            os.rename(temporary, final)
            _fsync_directory(final.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            restore()


@contextlib.contextmanager
def _locked(lock: Path, final: Path) -> Iterator[None]:
    with open(lock, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it when its holder dies
        except BlockingIOError:
            raise ValueError(f"{final}: another process is writing here (it holds the lock {lock})") from None
        if os.fstat(file.fileno()).st_nlink == 0:
            raise ValueError(f"{final}: another process has just written here; run again")  # its lock file is gone by now
        try:
            yield
        finally:
            lock.unlink()


def _check_replaceable(final: Path) -> None:
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    try:
        read_config(final)
    except (OSError, ValueError):
        raise ValueError(f"{final}: holds something else; expected a new or empty directory, or a checkpoint of ours") from None


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- progress


class Progress:
    """One line a shard on stderr: redrawn on a terminal, printed once at its end elsewhere."""

    def __init__(self, label: str, total_bytes: int, show: bool):
        self.label, self.total_bytes, self.show = label, total_bytes, show
        self.done_bytes, self.began, self.drawn = 0, time.perf_counter(), 0.0

    def add(self, num_bytes: int) -> None:
        self.done_bytes += num_bytes
        if self.show and sys.stderr.isatty() and time.perf_counter() - self.drawn > 0.1:
            self.drawn = time.perf_counter()
            self._draw("\r", "")

    def _draw(self, start: str, end: str) -> None:
        cells = 24 * self.done_bytes // max(self.total_bytes, 1)
        gbps = self.done_bytes / 1e9 / max(time.perf_counter() - self.began, 1e-9)
        bar = "#" * cells + "." * (24 - cells)
        print(
            f"{start}{self.label} [{bar}] {self.done_bytes / 1e9:.2f} GB, {gbps:.2f} GB/s", end=end, file=sys.stderr, flush=True
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self.show:
            self._draw("\r" if sys.stderr.isatty() else "", "\n")
