"""Every kernel compiles for a Hopper card, on a machine without one: what the interpreter accepts, the compiler may not.

A call of each operator is brought as far as its launch, with early launches on; that launch is compiled for sm_90.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

import kernels
from kernels import _common
from kernels._flash_ring import choose_flash_ring
from kernels.flash_decode import override_launch
from kernels.formats import PackedFormat, Weight
from kernels.scaled import quantize_rows, silu_mul_rows
from kernels.tiles import (
    MEASURED,
    SHARED_BYTES,
    Tile,
    choose_tile,
    fold_block,
    override_tiles,
    packed_ring_bytes,
    packed_ring_tile,
    ring_bytes,
    ring_tile,
)

pytestmark = pytest.mark.skipif(_common.INTERPRET, reason="TRITON_INTERPRET=1: nothing is compiled")

INT4 = [PackedFormat("int4", g, s, torch.bfloat16) for g, s in ((128, True), (128, False), (64, True), (32, False))]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def launches(monkeypatch):
    """Makes operators on CPU tensors launch their kernels, and records each launch in place of running it."""
    taken = []

    def record(self, *args, grid, warmup, **kwargs):
        taken.append((self, args, kwargs))

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", record)
    monkeypatch.setattr(_common, "INTERPRET", True)  # runs_kernels: on any device
    monkeypatch.setattr(_common, "pdl_supported", lambda x: True)
    monkeypatch.setattr(sys.modules["kernels.flash_decode"], "pdl_supported", lambda x: True)
    for module in ("kernels._matmul", "kernels.gate_up", "kernels._flash_ring"):
        monkeypatch.setattr(sys.modules[module], "has_wgmma", lambda x: True)
    return taken


def compile_for_hopper(kernel, args, kwargs):
    """Compiles one recorded launch with the types, constants and divisibilities that Triton finds in its arguments."""
    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    kwargs = {k: v for k, v in kwargs.items() if v is not None or k in kernel.arg_names} | {"debug": False}
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def test_cache_keys_do_not_depend_on_the_order_of_launches():
    """A kernel that a process has compiled is found by another one, which began with other kernels. The processes are forks of
    one that has only imported them, which takes longest."""
    script = (
        "import kernels, os, sys\n"
        "key = lambda name: getattr(sys.modules['kernels.' + name.split('.')[0]], name.split('.')[1]).cache_key\n"
        "for first in sys.argv[1:]:\n"
        "    if os.fork() == 0:\n"
        "        print([key(name) for name in [first, *sys.argv[1:4]]][1:])\n"
        "        sys.exit()\n"
        "    os.wait()"
    )
    first = ["head._head_kernel", "linear._linear_kernel", "linear._qkv_kernel", "choose._choose_kernel"]
    command = [sys.executable, "-c", script, *first]
    keys = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(keys) == len(first)
    assert len(set(keys)) == 1


def check(launches, count):
    assert len(launches) == count
    out = [compile_for_hopper(kernel, args, dict(kwargs)) for kernel, args, kwargs in launches]
    for compiled in out:
        assert "griddepcontrol.wait" in compiled.asm["ptx"], "every kernel of a step waits for the ones before it"
        assert compiled.metadata.shared <= SHARED_BYTES, "a launch would fail"
    return out


def assembler_says(compiled) -> str:
    """ptxas' remarks on a compiled kernel."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    command = [ptxas, "-arch=sm_90a", "-v", "-o", "/dev/null", "/dev/stdin"]
    return subprocess.run(command, input=compiled.asm["ptx"], capture_output=True, text=True, check=True).stderr


def empty(*size, dtype=torch.bfloat16):
    return torch.empty(*size, dtype=dtype)


def tiled(N, K, packed=None, bias=False, dtype=torch.bfloat16) -> Weight:
    """A weight in the kernels' order, of memory that nobody has touched: a large one takes neither memory nor time."""
    weight = Weight(N, K, bias=bias, packed=packed, dtype=dtype)
    if packed:
        few = Weight(8, K, packed=packed)
        few.weight.zero_()  # `tile` looks for codes that stand for no number
        few.tile()
        for name in ("weight", "scale", "zero"):
            if (rows := getattr(few, name)) is not None:  # of each, or of every eight
                setattr(weight, name, rows.new_empty(-(-N // 8) if len(rows) == 1 else N, *rows.shape[1:]))
        weight.tiled = True
    return weight


def test_a_weight_that_nobody_touched_is_laid_out_as_one_that_was_tiled():
    for packed in (PackedFormat("int8"), PackedFormat("fp8"), *INT4):
        weight = Weight(201, 512, packed=packed, bias=True)
        weight.weight.zero_()
        weight.tile()
        empty = tiled(201, 512, packed, bias=True)
        layouts = [[(n, t.dtype, t.shape, t.stride()) for n, t in w.named_buffers()] for w in (weight, empty)]
        assert layouts[0] == layouts[1]
        assert weight.tiled == empty.tiled


def call(op, N, K, M=1, head_dim=64, qk_norm=False, bias=False, cache_dtype=torch.bfloat16, packed=None, fold=False):
    """The operator `op` of tiles.OPS at a shape, on memory that nothing reads; `fold`: as it is where norms are folded, and
    columns permuted where that is wanted."""
    x, norm = empty(M, K), empty(K)
    weight = tiled(N, K, packed, bias)
    permuted = fold and kernels.reads_permuted(op, x, weight)
    if fold:
        blocks = -(-K // fold_block(M, packed, permuted))
        norm = kernels.FoldedNorm(x, empty(M, blocks, dtype=torch.float32), permuted)
    lengths = empty(M, dtype=torch.int32)
    if op == "linear" and fold:
        kernels.linear_folding(x, weight, residual=empty(M, N), gain=empty(N), x_permuted=permuted, y_permuted=permuted)
    elif op == "linear":
        kernels.linear(x, weight, residual=empty(M, N))
    elif op == "silu_mul":
        kernels.linear(x, weight, norm=norm, eps=1e-5, activation="silu_mul", y_permuted=permuted)
    elif op == "head":
        kernels.head(x, weight, norm=norm, eps=1e-5, vocab_size=N, lengths=lengths)
    else:
        heads, kv_heads = N // head_dim, N // head_dim // 6
        cache = empty(M, kv_heads, 128, head_dim, dtype=cache_dtype)
        rope, qk = empty(128, head_dim // 2, dtype=torch.float32), empty(head_dim)
        kernels.qkv_rope_append(
            x, weight, norm=norm, eps=1e-5, q_norm=qk if qk_norm else None, k_norm=qk if qk_norm else None, qk_eps=1e-6,
            cos=rope, sin=rope, lengths=lengths, table=empty(M, 1, dtype=torch.int32), k_cache=cache, v_cache=cache.clone(),
            page_size=128, num_heads=heads - 2 * kv_heads, num_kv_heads=kv_heads, head_dim=head_dim,
        )  # fmt: skip


@pytest.mark.parametrize(("sms", "fmt", "M", "op", "N", "K"), MEASURED, ids=str)
def test_measured_tiles(launches, sms, fmt, M, op, N, K):
    packed = {"bf16": None, "int4": INT4[0], "fp8": PackedFormat("fp8"), "int8": PackedFormat("int8")}[fmt]
    call(op, N, K, M, head_dim=64 if K == 2048 else 128, packed=packed, fold=packed is not None)
    check(launches, 1)
    assert ("ring" in launches[0][0].__name__) == MEASURED[sms, fmt, M, op, N, K].ring


@pytest.mark.parametrize(("N", "K"), [(6144, 4096), (3072, 2048), (5120, 3072), (4608, 3584)])
def test_a_short_prompt(launches, N, K):
    """Its qkv is a linear with a norm, of 16 rows: no tile but one that can have both a norm and split K."""
    kernels.linear(empty(16, K), Weight(N, K), norm=empty(K), eps=1e-5)
    (compiled,) = check(launches, 1)
    assert launches[0][0].__name__ == "_ring_linear_kernel"
    assert compiled.metadata.shared <= ring_bytes(choose_tile("linear", "bf16", 16, N, K, 132, rings=True), 16) + 1024


@pytest.mark.parametrize("M", [8, 40, 64])
@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(("head_dim", "bias", "qk_norm"), [(64, True, False), (128, False, False), (128, True, True)])
def test_qkv_rings(launches, head_dim, bias, qk_norm, M, cache):
    for tile in (ring_tile(64, 6), ring_tile(64, 6, 2)):
        with override_tiles({"qkv": tile}):
            call("qkv", 12 * head_dim, 2048, M, head_dim=head_dim, bias=bias, qk_norm=qk_norm, cache_dtype=cache)
    check(launches, 2)


def loop_of_products(compiled, tmp_path) -> str:
    """The machine code of the loop that multiplies: from the label to the branch back to it that wgmmas stand between."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    code = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True).stdout
    loops = []
    for label in re.findall(r"^(\.L_x_\d+):", code, re.MULTILINE):
        begin = code.index(f"\n{label}:")
        end = code.find(f"BRA `({label})", begin)
        loops += [code[begin:end]] if "HGMMA" in code[begin : max(begin, end)] else []
    return min(loops, key=len)


def check_loop(compiled, tmp_path):
    """Of a packed ring: no warp waits for all others, no code passes through shared memory again or from thread to thread; and
    copies are told of the kernel's descriptors by their names."""
    loop, ptx = loop_of_products(compiled, tmp_path), compiled.asm["ptx"]
    assert loop.count("TRYWAIT") == 3, "for weights, for x, and before a stage is filled again"
    assert loop.count("WARPSYNC.ALL") == 1, "before a warp says that it has left a stage"
    assert not re.search(r"SHFL|STS|BAR\.SYNC|FENCE|MEMBAR|CCTL", loop)
    descriptors = re.findall(r"\.param \.align 64 \.b8 (\w+)\[128\]", ptx)
    assert set(descriptors) == set(re.findall(r"mov\.b64 d, (\w+);", ptx))


PACKED_RINGS = [
    ("linear", 4096, 4096, 16, PackedFormat("int8"), {}),
    ("linear", 4096, 14336, 40, INT4[1], {}),
    ("silu_mul", 28672, 4096, 32, INT4[0], {}),
    ("silu_mul", 28672, 4096, 64, PackedFormat("fp8"), {}),
    ("qkv", 3072, 2048, 9, PackedFormat("fp8"), {"head_dim": 64, "bias": True}),
    ("qkv", 6144, 4096, 64, INT4[0], {"head_dim": 128, "bias": True, "qk_norm": True}),
    ("qkv", 6144, 4096, 16, PackedFormat("int8"), {"head_dim": 128, "cache_dtype": torch.float8_e4m3fn}),
]


@pytest.mark.parametrize(("op", "N", "K", "M", "packed", "more"), PACKED_RINGS, ids=str)
def test_packed_rings(launches, tmp_path, op, N, K, M, packed, more):
    """By the rule: no spill; of 8-bit codes room for as many programs on a multiprocessor as it counts on; and between shared
    memory and the products no code passes through shared memory again, or from thread to thread."""
    call(op, N, K, M, packed=packed, fold=True, **more)
    (compiled,) = check(launches, 1)
    assert launches[0][0].__name__.startswith("_packed_ring")
    tile = choose_tile(op, packed.format, M, N, K, 132, rings=True)
    assert compiled.metadata.shared + 1024 <= packed_ring_bytes(tile, packed.format, M)
    remarks = assembler_says(compiled)
    registers, each = int(re.search(r"Used (\d+) registers", remarks)[1]), min(2, -(-N // tile.rows * tile.split // 132))
    assert "0 bytes spill stores" in remarks
    assert "serialized" not in remarks
    assert packed.format == "int4" or registers * 32 * tile.warps * each <= 65536
    check_loop(compiled, tmp_path)


def call_packed_head(packed, V, K, M, drawn, T=1, dtype=torch.bfloat16, permuted=True):
    """`head` on a packed weight as a step has it: a folded norm, by blocks of 64 columns."""
    x, lengths = empty(M, K, dtype=dtype), empty(M // T, dtype=torch.int32)
    draw = {"temperature": empty(M // T, dtype=torch.float32), "seed": empty(M // T, dtype=torch.int64), "sample": lengths}
    weight = tiled(V, K, packed, dtype=dtype)
    norm = kernels.FoldedNorm(x, empty(M, K // 64, dtype=torch.float32), permuted)
    kernels.head(x, weight, norm=norm, eps=1e-5, vocab_size=V, lengths=lengths, **(draw if drawn else {}))


HEAD_RINGS = [  # format, V, K, M, T: the 8B's; vocabularies that end within a tile, or even a block; int4's
    ("fp8", 128256, 4096, 16, 1), ("int8", 128256, 4096, 64, 1), ("int8", 32001, 4096, 16, 4), ("fp8", 32001, 2048, 64, 1),
    ("fp8", 151936, 4096, 33, 3), ("int8", 152064, 3584, 9, 1), ("int4", 128256, 4096, 16, 1), ("int4", 128256, 4096, 64, 1),
]  # fmt: skip


@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
@pytest.mark.parametrize(("fmt", "V", "K", "M", "T"), HEAD_RINGS, ids=str)
def test_packed_head_rings(launches, tmp_path, fmt, V, K, M, T, drawn):
    """Two programs fit on a multiprocessor, by registers and shared memory, and nothing is spilled for it; logits go out 16
    bytes a thread where rows of them are aligned."""
    packed = INT4[0] if fmt == "int4" else PackedFormat(fmt)
    call_packed_head(packed, V, K, M, drawn, T)
    (compiled,) = check(launches, 1)
    ptx, remarks = compiled.asm["ptx"], assembler_says(compiled)
    assert launches[0][0].__name__ == "_packed_ring_head_kernel"
    assert compiled.metadata.num_warps == 8
    assert ".maxnreg 128" in ptx
    check_loop(compiled, tmp_path)
    assert "0 bytes spill stores" in remarks
    assert "serialized" not in remarks
    assert 2 * (compiled.metadata.shared + 1024) <= SHARED_BYTES + 1024, "1 KB a program is the card's own"
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == (0 if V % 16 else max(16, 1 << (M - 1).bit_length()) // 8)
    assert ptx.count("griddepcontrol.launch_dependents") == 1


def test_what_the_heads_ring_cannot_do(launches):
    """Columns in order, a single row or a shape without a tile: the other kernel, x put in order. A split K: refused."""
    call_packed_head(PackedFormat("int8"), 1000, 4096, 16, drawn=False, permuted=False)
    call_packed_head(PackedFormat("int8"), 1000, 4096, 1, drawn=False)
    call_packed_head(PackedFormat("int8"), 1000, 192, 16, drawn=True)
    with kernels.batch_invariant():
        call_packed_head(PackedFormat("fp8"), 1000, 4096, 16, drawn=False)
    with override_tiles({"head": Tile(64, 256, 4, preload=1, dot=True)}):
        call_packed_head(PackedFormat("fp8"), 1000, 4096, 16, drawn=False)
    assert [kernel.__name__ for kernel, *_ in launches] == 5 * ["_head_kernel"]
    for rows in (2, 8):
        with override_tiles({"head": packed_ring_tile(128, 128, 5, registers=128)}):
            call_packed_head(PackedFormat("int8"), 1000, 4096, rows, drawn=True)
    assert [kernel.__name__ for kernel, *_ in launches[5:]] == 2 * ["_packed_ring_head_kernel"]
    with override_tiles({"head": packed_ring_tile(128, 128, 5, 2)}), pytest.raises(ValueError, match=r"Tile\.split: found 2"):
        call_packed_head(PackedFormat("int8"), 1000, 4096, 16, drawn=False)
    check(launches, 7)


def test_a_packed_ring_folds_by_blocks_of_64(launches):
    """Sums of squares are by blocks of 16 for fewer rows than int4 has rings for: an override's ring is refused there."""
    weight = tiled(256, 4096, INT4[0])
    for rows, refused in ((8, True), (9, False)):
        given = {"residual": empty(rows, 256), "gain": empty(256), "x_permuted": True, "y_permuted": True}
        with override_tiles({"linear": packed_ring_tile(64, 128, 4)}):
            if refused:
                with pytest.raises(ValueError, match="squares: found 16 blocks of 256 features, expected blocks of 64"):
                    kernels.linear_folding(empty(rows, 4096), weight, **given)
            else:
                kernels.linear_folding(empty(rows, 4096), weight, **given)
    assert [kernel.__name__ for kernel, *_ in launches] == ["_packed_ring_linear_kernel"]


def test_what_a_ring_cannot_do(launches):
    """The same shape with a bias, a folded norm, an odd address; with half heads, qk-norm of two heads a tile."""
    x, odd, weight = empty(5, 4096), empty(5 * 4096 + 1)[1:].view(5, 4096), Weight(4096, 4096)
    kernels.linear(x, Weight(4096, 4096, bias=True))
    kernels.linear(x, weight, norm=kernels.FoldedNorm(x, empty(5, 64, dtype=torch.float32)))
    kernels.linear(odd, weight)
    kernels.linear(x, weight)
    assert [kernel.__name__ for kernel, *_ in launches] == 3 * ["_linear_kernel"] + ["_ring_linear_kernel"]
    launches.clear()
    for arguments in ({"head_dim": 32}, {"head_dim": 64, "qk_norm": True}, {}):
        call("qkv", 6144, 4096, 8, **{"head_dim": 128, **arguments})
    assert [kernel.__name__ for kernel, *_ in launches] == 2 * ["_qkv_kernel"] + ["_ring_qkv_kernel"]


@pytest.mark.parametrize(("op", "M"), [("linear", 1), ("silu_mul", 16), ("qkv", 1), ("head", 16)])
def test_the_next_kernel_may_start_at_once(launches, op, M):
    """In every program once, before its wait: which stands twice in a ring's, whose code before the wait LLVM splits in two."""
    call(op, 1536, 512, M)
    (compiled,) = check(launches, 1)
    ptx, ring = compiled.asm["ptx"], launches[0][0].__name__.startswith("_ring")
    assert ptx.count("griddepcontrol.launch_dependents") == 1
    assert ptx.count("griddepcontrol.wait") == 1 + ring
    assert ptx.index("griddepcontrol.launch_dependents") < ptx.index("griddepcontrol.wait")


@pytest.mark.parametrize(
    ("op", "N", "K"),
    [("qkv", 6144, 4096), ("linear", 4096, 14336), ("silu_mul", 28672, 4096), ("linear", 2048, 2048), ("head", 128256, 4096)],
)
def test_rules_of_batch_invariance(launches, op, N, K):
    with kernels.batch_invariant():
        call(op, N, K, 7, head_dim=128)
    check(launches, 1)


@pytest.mark.parametrize("M", [2, 5, 16, 64])
@pytest.mark.parametrize(
    ("op", "N", "K"), [("qkv", 3072, 2048), ("linear", 2048, 2048), ("silu_mul", 1024, 3584), ("head", 4096, 192)]
)
def test_rules(launches, op, N, K, M):
    call(op, N, K, M)
    check(launches, 1)


@pytest.mark.parametrize(
    ("op", "N", "K", "M", "tile"),
    [
        ("silu_mul", 16384, 2048, 1, Tile(8, 2048, 8, grid=6, stages=2)),
        ("linear", 2048, 8192, 16, Tile(64, 128, 4, dot=True, split=2, preload=1, stages=3)),
        ("linear", 2048, 2048, 1, Tile(2, 1024, 4, stream=True)),
        ("silu_mul", 16384, 2048, 1, Tile(2, 256, 1, stream=True, registers=128)),
        ("head", 128256, 2048, 1, Tile(8, 1024, 4, grid=4, stages=2)),
        ("linear", 201, 192, 3, Tile(4, 64, 1)),
    ],
    ids=str,
)
def test_tiles_that_a_tuner_may_try(launches, op, N, K, M, tile):
    with override_tiles({op: tile}):
        call(op, N, K, M)
    check(launches, 1)


@pytest.mark.parametrize("packed", [PackedFormat("int8"), PackedFormat("fp8"), *INT4], ids=str)
@pytest.mark.parametrize(("op", "N", "K", "M"), [("silu_mul", 512, 512, 1), ("linear", 512, 896, 12)])
def test_packed(launches, op, N, K, M, packed):
    """No weight passes through shared memory or another thread on its way to the tensor cores."""
    call(op, N, K, M, head_dim=128, packed=packed)
    (compiled,) = check(launches, 1)
    assert set(re.findall(r"kWidth = (\d+)", compiled.asm["ttgir"])) == {"4"}, "formats.py's order is that of such a dot"
    if op == "linear":
        assert "shfl" not in compiled.asm["ptx"]


@pytest.mark.parametrize("packed", [PackedFormat("int8"), PackedFormat("fp8"), *INT4], ids=str)
def test_widening(launches, packed):
    """Codes are loaded and floats stored 16 bytes at a time, and no thread needs another's."""
    weight = tiled(4096, 1024, packed)
    weight.dequantized()
    (compiled,) = check(launches, 1)
    assert "v4.b32" in compiled.asm["ptx"]
    assert set(re.findall(r"st\.global\S*", compiled.asm["ptx"])) == {"st.global.v4.b32"}
    assert not re.search("shfl|bar.sync|st.shared", compiled.asm["ptx"])


def test_packed_head_and_qk_norm(launches):
    call("head", 1000, 256, 3, packed=PackedFormat("int8"))
    call("qkv", 1536, 256, 2, head_dim=128, qk_norm=True, bias=True, packed=INT4[0])
    call("qkv", 768, 512, 40, head_dim=128, packed=PackedFormat("fp8"))
    call("linear", 512, 512, 40, packed=INT4[1])
    check(launches, 4)


FOLDING = [
    (1, "qkv", 768, 512, INT4[0]), (1, "silu_mul", 512, 512, INT4[1]), (1, "linear", 512, 896, INT4[0]),
    (8, "head", 1000, 512, PackedFormat("int8")), (40, "linear", 512, 896, PackedFormat("fp8")),
    (40, "silu_mul", 512, 512, PackedFormat("fp8")),
]  # fmt: skip


@pytest.mark.parametrize(("M", "op", "N", "K", "packed"), FOLDING, ids=str)
def test_folded_norms(launches, M, op, N, K, packed):
    call(op, N, K, M, head_dim=128, packed=packed, fold=True)
    check(launches, 1)


def test_qk_norm_and_bias(launches):
    call("qkv", 6144, 1024, head_dim=128, qk_norm=True)
    call("qkv", 768, 896, head_dim=128, bias=True)
    check(launches, 2)


@pytest.mark.parametrize(("Hq", "Hkv", "head_dim"), [(32, 8, 64), (32, 8, 128), (28, 4, 128), (64, 8, 128), (24, 8, 96)])
def test_between_the_products(launches, Hq, Hkv, head_dim):
    """The kernels of a forward of many rows."""
    N, K = 300, Hq * head_dim
    kernels.rms_norm(empty(N, K), empty(K), 1e-5)
    kernels.silu_mul(empty(N, 7 * K))
    place, rope, cache = (
        empty(N, dtype=torch.int32), empty(512, head_dim // 2, dtype=torch.float32), empty(4, Hkv, 512, head_dim)
    )  # fmt: skip
    for norm in (None, empty(head_dim)):
        kernels.rope_append(
            empty(N, (Hq + 2 * Hkv) * head_dim), cos=rope, sin=rope, position=place, slot=place, k_cache=cache,
            v_cache=cache.clone(), q_norm=norm, k_norm=norm, eps=1e-6, num_heads=Hq,
        )  # fmt: skip
    check(launches, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(("M", "K"), [(2, 2048), (64, 4096), (16, 3584), (64, 8192)])
def test_fold_norm(launches, M, K, permuted, dtype):
    """16 bytes a thread are loaded, the gain before the wait and x behind it; what is stored goes as words, at least."""
    kernels.fold_norm(empty(M, K, dtype=dtype), empty(K, dtype=dtype), permuted)
    (compiled,) = check(launches, 1)
    ptx = compiled.asm["ptx"]
    before, behind = ptx.split("griddepcontrol.wait")
    assert "griddepcontrol.launch_dependents" in before
    assert re.findall(r"ld\.global\S*", before) == re.findall(r"ld\.global\S*", behind) == ["ld.global.v4.b32"]
    stores = re.findall(r"st\.global\S*", behind)
    assert len(stores) == (5 if permuted else 2)
    assert all(re.search("b32", store) for store in stores)


@pytest.mark.parametrize("K", [4096, 3584, 8192])
def test_rounding_of_rows(launches, K):
    """Rows of the 8B, Qwen2.5 7B and the 70B, and what their feed-forwards make: loaded 16 bytes at a time, nothing spilled."""
    F = {4096: 14336, 3584: 18944, 8192: 28672}[K]
    quantize_rows(empty(300, K))
    quantize_rows(empty(300, K), empty(K), 1e-5)
    silu_mul_rows(empty(300, 2 * F))
    for compiled in check(launches, 3):
        assert "cvt.rn.satfinite.e4m3x2.f32" in compiled.asm["ptx"]
        assert set(re.findall(r"ld\.global\S*", compiled.asm["ptx"])) == {"ld.global.v4.b32"}
        assert re.search(r"st\.global\.v[24]\.b32", compiled.asm["ptx"])
        assert "0 bytes spill stores" in assembler_says(compiled)


def test_fp8_codes(launches):
    """A lane's bytes are put in order by one instruction a word; 8 bytes at a time come and go."""
    tiled(4096, 1024, PackedFormat("fp8")).fp8_codes()
    (compiled,) = check(launches, 1)
    ptx = compiled.asm["ptx"]
    assert set(re.findall(r"[sl][td]\.global\S*", ptx)) == {"ld.global.v2.b32", "st.global.v2.b32"}
    assert not re.search("shfl|bar.sync|st.shared", ptx)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M", [65, 256, 8192])
def test_gate_up(launches, M, dtype):
    """Sums stay in registers, and the products follow each other without a wait; where the ring lies is read, not assumed."""
    kernels.gate_up(empty(M, 4096, dtype=dtype), empty(28672, 4096, dtype=dtype))
    (compiled,) = check(launches, 1)
    ptx, remarks = compiled.asm["ptx"], assembler_says(compiled)
    kind = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    assert ptx.count(f"m64n224k16.f32.{kind}.{kind}") == (8 if M > 128 else 4)
    assert "0 bytes spill stores" in remarks
    assert "serialized" not in remarks
    start, loop = ptx.index("st.shared.u32 [at], at"), ptx.index("mbarrier.init")
    assert ptx[start:loop].count("ld.shared.b32") == 2, "one for each part of the ring"


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("B", "T", "capacity"), [(1, 1, 256), (1, 1, 65536), (64, 1, 1024), (256, 1, 1024), (1, 8, 1024)])
def test_flash_decode(launches, head_dim, B, T, capacity):
    cache = empty(B, 8, capacity, head_dim)
    lengths, table = empty(B, dtype=torch.int32), empty(B, 1, dtype=torch.int32)
    with override_launch(ring=None):
        kernels.flash_decode(empty(B, T, 32, head_dim), cache, cache, lengths, table, scale=0.1)
    check(launches, 1)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("B", "T", "G", "capacity", "dtype"),
    [
        *((1, 1, 4, capacity, torch.bfloat16) for capacity in (256, 8192, 65536)),
        (1, 5, 2, 1024, torch.bfloat16),
        *((B, 1, 4, capacity, torch.bfloat16) for B in (2, 4, 16, 24) for capacity in (1024, 16384)),
        (2, 4, 4, 1024, torch.float16),
        *((64, 1, 4, capacity, torch.bfloat16) for capacity in (1024, 16384)),
        (256, 1, 4, 1024, torch.bfloat16),
        (3, 2, 7, 16384, torch.float16),
    ],
)
def test_flash_ring(launches, head_dim, B, T, G, capacity, dtype, window):
    """Nothing is spilled but a few words; as many programs on a multiprocessor as the rule counts on."""
    cache = empty(B, 8, capacity, head_dim, dtype=dtype)
    lengths, table = empty(B, dtype=torch.int32), empty(B, 1, dtype=torch.int32)
    kernels.flash_decode(empty(B, T, 8 * G, head_dim, dtype=dtype), cache, cache, lengths, table, scale=0.1, window=window)
    ring = choose_flash_ring(batch=B, tokens=T, num_kv_heads=8, head_dim=head_dim, capacity=capacity)
    if ring is None:
        check(launches, 1)
        return
    assert {kernel.__name__ for kernel, _, _ in launches} == {"_flash_ring_kernel"}
    compiled = check(launches[-1:], 1)[0]  # of clusters the first is the warm-up
    descriptors = re.findall(r"\.param \.align 64 \.b8 (\w+)\[128\]", compiled.asm["ptx"])
    assert descriptors == re.findall(r"prefetch\.param\.tensormap \[(\w+)\]", compiled.asm["ptx"]), "what the kernel calls them"
    remarks = assembler_says(compiled)
    assert int(re.search(r"(\d+) bytes spill stores", remarks)[1]) <= 24
    registers = int(re.search(r"Used (\d+) registers", remarks)[1])
    each = 1 if ring.stages * ring.block_rows * head_dim > 24576 else 2 if ring.warps == 4 else 4
    assert each * (compiled.metadata.shared + 1024) <= SHARED_BYTES + 1024
    assert each * 32 * ring.warps * -(-registers // 8) * 8 <= 65536


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("B", "capacity"), [(1, 256), (1, 65536), (64, 1024)])
def test_fp8_cache(launches, head_dim, B, capacity):
    """Rows are appended in e4m3, as the card rounds them, and read back."""
    fp8 = torch.float8_e4m3fn
    call("qkv", 48 * head_dim, 1024, M=B, head_dim=head_dim, cache_dtype=fp8)
    cache = empty(B, 8, capacity, head_dim, dtype=fp8)
    lengths, table = empty(B, dtype=torch.int32), empty(B, 1, dtype=torch.int32)
    kernels.flash_decode(empty(B, 1, 32, head_dim), cache, cache, lengths, table, scale=0.1)
    (kernel, args, kwargs), _ = launches
    assert "cvt.rn.satfinite.e4m3x2.f32" in compile_for_hopper(kernel, args, dict(kwargs)).asm["ptx"]
    check(launches, 2)


def choice_arguments(M, K):
    """Of `choose`, and what `advance` takes beside them."""
    integers = {n: empty(M, dtype=torch.int32) for n in ("sample", "lengths", "top_k")}
    floats = {n: empty(M, dtype=torch.float32) for n in ("temperature", "top_p", "min_p")}
    state = {n: empty(M, dtype=torch.int32) for n in ("token", "cursor", "done", "flag", "limit")}
    state |= {"ring": empty(M, 256, dtype=torch.int32), "stop_ids": empty(M, 16, dtype=torch.int32)}
    return {"seed": empty(M, dtype=torch.int64), **integers, **floats}, state | {"embedding": empty(9, K), "x": empty(M, K)}


def test_choose_then_advance(launches):
    settings, state = choice_arguments(2, 256)
    best, ids = empty(2, 4096, dtype=torch.float32), empty(2, 4096, dtype=torch.int32)
    kernels.advance(best, ids, lengths=settings["lengths"], **state, ahead=Weight(256, 256))
    kernels.choose(empty(2, 128256, dtype=torch.float32), best, **settings)
    kernels.partial_argmax(empty(100, 128256, dtype=torch.float32))
    advance, choose, _ = check(launches, 3)
    assert "cp.async.bulk.prefetch.L2" in advance.asm["ptx"]
    assert "griddepcontrol.launch_dependents" not in advance.asm["ptx"], "the next step reads lengths before it waits"
    assert choose.metadata.name == "_choose_kernel"
    assert choose.asm["ptx"].count("griddepcontrol.launch_dependents") == 1


@pytest.mark.parametrize(
    ("M", "V", "K"), [(1, 128256, 2048), (1, 128256, 4096), (2, 128256, 2048), (1, 151936, 896), (16, 128256, 2048)]
)
def test_choose_and_advance(launches, M, V, K):
    """Nothing is spilled, though the sequence's state is held in registers throughout."""
    settings, state = choice_arguments(M, K)
    logits, maxima = empty(M, V, dtype=torch.float32), empty(M, 4096, dtype=torch.float32)
    kernels.choose_and_advance(logits, maxima, **settings, **state, ahead=Weight(256, 256), then=Weight(256, 256))
    (compiled,) = check(launches, 1)
    ptx = compiled.asm["ptx"]
    assert compiled.metadata.name == "_choose_and_advance_kernel", "a trace knows the end of a step by it"
    assert "griddepcontrol.launch_dependents" not in ptx, "the next step reads lengths before it waits"
    assert ptx.count("cp.async.bulk.prefetch.L2") == 2
    assert "prefetch.global.L2 [" in ptx
    remarks = assembler_says(compiled)
    assert "0 bytes spill stores" in remarks
    registers = int(re.search(r"Used (\d+) registers", remarks)[1])
    assert registers > 64, "two programs would share a multiprocessor, and another would have none"
    assert registers <= 72 or M > 2, "a program would not start beside head's"


@pytest.mark.parametrize("M", [1, 3, 16, 64])
def test_bins_in_shared_memory(launches, M):
    """They are declared once; each thread adds its own tokens, and puts them on lists, with one atomic each."""
    kernels.choose(*(empty(M, n, dtype=torch.float32) for n in (128256, 4096)), **choice_arguments(M, 256)[0])
    ((_, _, options),) = launches
    (compiled,) = check(launches, 1)
    ptx = compiled.asm["ptx"]
    assert ptx.count(".b8 bins[4108]") == 1
    tokens = options["BLOCK"] // (32 * options["num_warps"])
    assert ptx.count("red.shared.add.u32") == tokens
    assert ptx.count("mad.wide.u32 address, place") == tokens * (2 if options["TILES"] > 1 else 1)
    listed = options["PROGRAMS"] * options["COLUMNS"] // (32 * options["num_warps"])
    assert listed * 32 * options["num_warps"] == options["PROGRAMS"] * options["COLUMNS"]
    assert ptx.count("mad.lo.u32 place, place") == listed


def test_accept_and_lookup(launches):
    integers = {n: empty(2, dtype=torch.int32) for n in ("token", "cursor", "done", "flag", "lengths", "limit")}
    histories = empty(2, 1024, dtype=torch.int32)
    for k in (0, 1, 4, 15):
        best, ids = empty(2 * (k + 1), 4096, dtype=torch.float32), empty(2 * (k + 1), 4096, dtype=torch.int32)
        kernels.accept(
            best, ids, empty(2, k, dtype=torch.int32), ring=empty(2, 256, dtype=torch.int32),
            stop_ids=empty(2, 16, dtype=torch.int32), history=histories, tally=empty(2, 2, 16, dtype=torch.int32),
            ahead=Weight(256, 256), **integers,
        )  # fmt: skip
        kernels.lookup(histories, integers["lengths"], max(k, 1))
        kernels.feed(integers["token"], empty(2, k, dtype=torch.int32), integers["lengths"], empty(64, 4096))
    first, *compiled = check(launches, 16)
    assert "cp.async.bulk.prefetch.L2" in first.asm["ptx"]
    for last in compiled[0::4] + compiled[2::4]:  # accept's second kernel, and feed
        assert "griddepcontrol.launch_dependents" not in last.asm["ptx"], "the next kernel reads lengths before it waits"
