"""Compiles the small-batch kernels for Hopper on a machine without a GPU: what the interpreter accepts, the compiler may not.

Run as a program (the interpreter must be off): prints one JSON object a kernel: its name, registers, bytes of stack (spills).
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import kernels
from kernels.formats import Weight
from kernels.tiles import Tile, override_tiles

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}


def compile_launch(function: JITFunction, *args, num_warps=4, launch_pdl=False, maxnreg=None, **kwargs):
    """What a launch with these arguments would compile, specialised as Triton does."""
    values = dict(zip(function.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(function.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[i,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[i,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[parameter.name], constants[i,] = "constexpr", 1
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[i,] = [["tt.divisibility", 16]]
    options = {"num_warps": num_warps, "launch_pdl": launch_pdl, "maxnreg": maxnreg}
    kernel = triton.compile(ASTSource(function, signature, constants, attributes), target=TARGET, options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    print(json.dumps({"kernel": function.__name__, "registers": int(registers), "stack": int(stack)}), flush=True)


def launch_all():
    """One launch of every kernel for each kind of tile that changes its code."""
    dtype, K, N = torch.bfloat16, 1024, 2048
    x1, x16, norm = torch.ones(1, K, dtype=dtype), torch.ones(16, K, dtype=dtype), torch.ones(K, dtype=dtype)
    weight, ahead = Weight(N, K, bias=True, dtype=dtype), Weight(N, K, dtype=dtype)

    def ints(*size):
        return torch.ones(*size, dtype=torch.int32)

    for tile, x in [
        (Tile(4, 256, 1, preload=2, late=True, stream=True, prefetch=8, ahead=64), x1),
        (Tile(4, 1024, 4, grid=1, stages=2, prefetch=8), x1),
        (Tile(2, 512, 2, split=2), x1),
        (Tile(64, 128, 4, dot=True, preload=1, stages=3, prefetch=64, split=2), x16),
    ]:
        with override_tiles({"linear": tile, "silu_mul": tile}):
            kernels.linear(x, weight, norm=norm, eps=1e-5, activation="silu_mul", ahead=ahead)
            kernels.linear(x, ahead, residual=torch.ones(len(x), N, dtype=dtype))
    for tile, x, qk_norm in [
        (Tile(8, 512, 2), x1, None),
        (Tile(64, 128, 4, dot=True, split=2), x16, torch.ones(64, dtype=dtype)),
    ]:
        cache, rope, B = torch.ones(16, 8, 256, 64, dtype=dtype), torch.ones(512, 32), len(x)
        with override_tiles({"qkv": tile}):
            kernels.qkv_rope_append(
                x, weight, norm=norm, eps=1e-5, q_norm=qk_norm, k_norm=qk_norm, qk_eps=1e-6, cos=rope, sin=rope,
                lengths=ints(B), table=ints(B, 2), k_cache=cache, v_cache=cache,
                page_size=256, num_heads=16, num_kv_heads=8, head_dim=64, ahead=ahead,
            )  # fmt: skip
    draw = {"temperature": torch.ones(1), "seed": torch.ones(1, dtype=torch.int64), "sample": ints(1), "lengths": ints(1)}
    big = Weight(32768, K, dtype=dtype)
    for tile, sampling in [(Tile(4, 512, 2, stream=True), {"lengths": ints(1)}), (Tile(4, 512, 2, grid=4, prefetch=8), draw)]:
        with override_tiles({"head": tile}):
            logits, value, ids = kernels.head(x1, big, norm=norm, eps=1e-5, vocab_size=32000, **sampling)
    with override_tiles({"head": Tile(64, 128, 4, dot=True, preload=1, stages=3)}):
        kernels.head(x16, big, norm=norm, eps=1e-5, vocab_size=32000, **{n: t.expand(16).contiguous() for n, t in draw.items()})
    kernels.choose(logits, value, **draw, top_k=ints(1), top_p=torch.ones(1), min_p=torch.ones(1))
    state = {name: ints(1) for name in ("token", "cursor", "done", "flag", "lengths", "limit")}
    embedding = torch.ones(16, K, dtype=dtype)
    kernels.advance(value, ids, **state, ring=ints(1, 64), stop_ids=ints(1, 4), embedding=embedding, x=x1, ahead=ahead)


if __name__ == "__main__":
    JITFunction.__getitem__ = lambda function, grid: lambda *args, **kwargs: compile_launch(function, *args, **kwargs)
    for module in ("kernels._matmul", "kernels.choose"):
        sys.modules[module].runs_kernels = lambda x: True
    for module in ("kernels._matmul", "kernels.choose", "kernels.head"):
        sys.modules[module].launch_options = lambda x: {"PDL": True, "launch_pdl": True}
    for module in ("kernels._matmul", "kernels.linear", "kernels.head"):
        sys.modules[module].num_sms = lambda index=0: 132
    launch_all()
