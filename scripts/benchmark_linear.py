"""Linear layers at decode batch sizes: this project's kernels on every weight format, beside cuBLAS and torch's int4 kernel.

    python scripts/benchmark_kernels.py linear --formats bf16 int8 fp8 int4 --rows 1 8 16 64
    python scripts/benchmark_kernels.py linear --widen     # packed weights made plain, for more rows than the kernels take
    TRITON_INTERPRET=1 python scripts/benchmark_kernels.py linear --shapes 64x256 --rows 1 5 --check_only    # without a GPU

Every kernel is checked against float64 first, then timed from a CUDA graph that goes through copies of the weight, so that none
is found in the L2 cache. TB/s (1e12) are of the weight's bytes: codes, scales and zeros.
"""

import argparse
import functools
import json
import math
import re
import sys

import torch
from benchmark import stamp
from benchmark_kernels import read_gbps, time_graph

from generate import add_flag
from kernels import MAX_ROWS, linear, pdl_disabled
from kernels.formats import PackedFormat, Weight, dequantize_tiled, unpack_int4

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096))  # Llama-3.1-8B, N x K
TOLERANCE = 2**-7  # of the norm: bf16 weights, x and result


def packed_format(name: str, groupsize: int, asymmetric: bool) -> PackedFormat | None:
    if name == "int4":
        return PackedFormat("int4", groupsize, not asymmetric, torch.bfloat16)
    return None if name == "bf16" else PackedFormat(name)


def make_weight(N: int, K: int, fmt: PackedFormat | None, device: str) -> Weight:
    """Random, as large as a trained one's."""
    weight = Weight(N, K, device=device)
    weight.weight.normal_(0.0, K**-0.5)
    return weight.round_to_nearest(fmt) if fmt else weight


def torch_int4(weight: Weight):
    """torch's int4 kernel (tinygemm) on the same symmetric codes, as x -> y."""
    codes = unpack_int4(weight.weight)
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8)
    scale = weight.scale.T.contiguous()
    scales = torch.stack([scale, torch.zeros_like(scale)], -1)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, weight.group_size, scales)


def check(name: str, y: torch.Tensor, exact: torch.Tensor) -> None:
    error = ((y.double() - exact).norm() / exact.norm()).item()
    if not error <= TOLERANCE:
        raise ValueError(f"{name}: found a relative error of {error:.2e}, expected at most {TOLERANCE:.2e}")


def candidates(N: int, K: int, fmt: PackedFormat | None, x: torch.Tensor, copies: int) -> tuple[dict[str, list], int]:
    """Every kernel by name, checked, as one call for each copy of the weight; and the weight's bytes."""
    weights = [make_weight(N, K, fmt, x.device.type) for _ in range(copies)]
    exact = x.double() @ weights[0].dequantized().double().T
    num_bytes = weights[0].num_bytes
    found = {}
    if x.is_cuda and fmt is None:
        found["cuBLAS"] = [functools.partial(torch.nn.functional.linear, x, w.weight) for w in weights]
    if x.is_cuda and fmt is not None and fmt.format == "int4" and fmt.symmetric:
        try:
            found["torch int4"] = [functools.partial(torch_int4(w), x) for w in weights]
        except (RuntimeError, NotImplementedError) as error:
            print(f"torch int4 left out: {str(error)[:100]}", file=sys.stderr)
    for w in weights:
        w.tile()
    found = {"ours": [functools.partial(linear, x, w) for w in weights]} | found
    for name, calls in found.items():
        check(f"{name}, {fmt or 'bf16'} {N} x {K}, {len(x)} rows", calls[0](), exact)
    return found, num_bytes


def widen(args, N: int, K: int, fmt: PackedFormat, bandwidth: float | None, versions: dict) -> None:
    """Our kernel and PyTorch, which must agree bit for bit; bytes are those of the codes read and of the values written."""
    weight = make_weight(N, K, fmt, "cuda" if torch.cuda.is_available() else "cpu")
    num_bytes = weight.num_bytes + 2 * N * K
    weight.tile()
    tensors = weight.weight, weight.scale, weight.zero, weight.format, N, K
    calls = {"ours": weight.dequantized, "PyTorch": lambda: dequantize_tiled(*tensors).to(weight.dtype)}
    if not torch.equal(*(call().view(torch.int16) for call in calls.values())):
        raise ValueError(f"widening {fmt} {N} x {K}: found other bits than PyTorch's")
    if bandwidth is None:
        print(f"{N}x{K} {fmt} widened: right", flush=True)
        return
    with pdl_disabled():
        us = {who: time_graph([call] * 4) for who, call in calls.items()}
    text = "  ".join(f"{who} {t:8.2f} us {num_bytes / t / 1e6:5.2f} TB/s" for who, t in us.items())
    print(f"{f'{N}x{K}':>12} {fmt!s:16} widened  floor {num_bytes / bandwidth / 1e3:7.2f} us  {text}", flush=True)
    if args.output:
        record = {"benchmark": "widen", "N": N, "K": K, "format": str(fmt), "us": us, "bytes": num_bytes}
        with args.output.open("a") as file:
            file.write(json.dumps(record | {"read_gbps": bandwidth} | versions) + "\n")


def run(args) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    bandwidth, versions = None, {}
    if not args.check_only:
        bandwidth, versions = read_gbps(), stamp()
        print(f"{torch.cuda.get_device_name()}: reads {bandwidth / 1e3:.2f} TB/s", flush=True)
    for N, K in args.shapes:
        shape = f"{N}x{K}"
        for name in args.formats:
            fmt = packed_format(name, args.groupsize, args.asymmetric)
            if args.widen:
                if fmt:
                    widen(args, N, K, fmt, bandwidth, versions)
                continue
            num_bytes = N * K * {"bf16": 2, "int4": 0.5}.get(name, 1)
            copies = 1 if args.check_only else max(2, math.ceil(4 * 60e6 / num_bytes))
            for rows in args.rows:
                x = torch.randn(rows, K, device=device).to(torch.bfloat16)
                with pdl_disabled():  # alone, a repeat of the kernel would otherwise begin inside the one before it
                    found, num_bytes = candidates(N, K, fmt, x, copies)
                    if args.check_only:
                        print(f"{shape} {fmt or 'bf16'} {rows} rows: right", flush=True)
                        continue
                    us = {who: time_graph(calls * math.ceil(8 / copies)) for who, calls in found.items()}
                text = "  ".join(f"{who} {t:7.2f} us {num_bytes / t / 1e6:5.2f} TB/s" for who, t in us.items())
                floor = f"bytes {num_bytes / bandwidth / 1e3:6.2f} us"
                print(f"{shape:>12} {fmt or 'bf16'!s:16} {rows:>3} rows  {floor}  {text}", flush=True)
                if args.output:
                    record = {"benchmark": "linear", "N": N, "K": K, "format": str(fmt or "bf16"), "rows": rows, "us": us}
                    record |= {"weight_bytes": num_bytes, "read_gbps": bandwidth, "copies": copies} | versions
                    with args.output.open("a") as file:
                        file.write(json.dumps(record) + "\n")


def linear_shape(text: str) -> tuple[int, int]:
    """'4096x14336' -> N, K."""
    match = re.fullmatch("([1-9][0-9]*)x([1-9][0-9]*)", text)
    if not match or int(match[2]) % 64:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected N x K, K a multiple of 64, such as 4096x14336")
    return int(match[1]), int(match[2])


def row_count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MAX_ROWS:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected 1 to {MAX_ROWS}")
    return int(text)


def add_flags(parser) -> None:
    flag = lambda name, **options: add_flag(parser, name, **options)
    flag("shapes", type=linear_shape, nargs="+", default=SHAPES, metavar="NxK")
    flag("formats", nargs="+", choices=("bf16", "int8", "fp8", "int4"), default=["bf16", "int8", "fp8", "int4"])
    flag("groupsize", type=int, choices=(32, 64, 128), default=128)
    flag("asymmetric", action="store_true", help="int4 with zero points")
    flag("rows", type=row_count, nargs="+", default=[1, 8, 16, 64])
    flag("widen", action="store_true", help="time what makes a packed weight plain, in place of products")
    flag("check_only", action="store_true", help="no timing; runs anywhere")
