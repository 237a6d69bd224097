"""SiLU(x @ gate.T) * (x @ up.T) of 65 rows or more in one kernel on Hopper, where tiles.py says so; else it is cuBLAS'.

Owns the operator, its Gluon kernel, and the choice of its ring. Does not know the model. Needs a GPU of compute capability
9.0: there is no interpreter for it, so tests compile it anywhere and run it on a card.
Letters: M rows of x, BM of a tile (128 or 256), K input features, N weight rows, F = N / 2 output features, S stages.

A program owns a tile of x, which up to 256 rows is all of it, and 224 rows of the weight: of 28,672, the 8B's, that makes 128
programs for 132 SMs, in one wave. 128 rows would take two; 256 (112 programs), and a thread has no registers for the sums. More
rows of x take a wave for each 256, of programs that share what they read in L2 (`_tile_of`). The 224 come as 14 groups of 8
rows of gate and the 8 of up that belong to them, by a 5-D TMA box: so both sums of an output are in one thread, which stores
one number in place of two.
Triton's tensors are of powers of two, wgmma's need not be: the products are inline PTX, which has 224 columns of sums as seven
tensors of 32, and reads x once for all of them, where Triton's own products would for each of three pieces.
PTX needs to know where in shared memory the ring is, which _hopper.py finds out.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from kernels._common import has_wgmma, launch_options, num_sms, pdl_trigger, pdl_wait, wgmma_device
from kernels._hopper import mark_shared, shared_address
from kernels._ring import described, tma_reads
from kernels.formats import Weight
from kernels.tiles import GATE_UP_ROWS, is_batch_invariant

PROGRAM_ROWS = 224  # of the weight
CHUNK = gl.constexpr(64)  # columns of a stage: a swizzled line of 128 bytes
MIN_ROWS = 65  # of x
DTYPES = (torch.bfloat16, torch.float16)

# ---------------------------------------------------------------- reference


def gate_up_ref(x, weight):
    """silu(gate) * up of gate, up = x @ weight.T: in float32 (float64 stays), rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    gate, up = (x.to(wide) @ weight.to(wide).T).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


# ---------------------------------------------------------------- the kernel


@gluon.constexpr_function
def _sums_layout(BM, columns):
    """Of sums [BM, columns]: wgmma's, a warpgroup's 64 rows behind the other's, both again 128 rows on."""
    return gl.NVMMADistributedLayout([3, 0], [8, 1], [16, columns, 16])


@gluon.constexpr_function
def _product(BM, dtype):
    """PTX that multiplies a stage: a warpgroup's wgmmas of m64n224k16, BM / 128 times CHUNK / 16 of them.

    Operands are a thread's numbers of 7 tensors of sums [BM, 32], one tensor after the other, then x's and w's addresses. A
    row of 128 bytes is a swizzled line, 8 of them a pattern, the next pattern right behind.
    """
    per, row_bytes, dtype = BM // 8, 128, "bf16" if dtype == gl.bfloat16 else "f16"
    descriptor = f"{1 << 62 | 8 * row_bytes // 16 << 32:#x}"  # swizzled lines of 128 bytes; a pattern's bytes, in 16s
    lines = [
        "{ .reg .b32 group, at; .reg .b64 x0, w0, x, w; .reg .pred yes;",
        "setp.eq.u32 yes, 0, 0; mov.u32 group, %tid.x; shr.u32 group, group, 7;",
        f"mad.lo.u32 at, group, {64 * row_bytes}, ${14 * per}; shr.u32 at, at, 4; shfl.sync.idx.b32 at, at, 0, 31, -1;",
        f"cvt.u64.u32 x0, at; or.b64 x0, x0, {descriptor};",
        f"shr.u32 at, ${15 * per}, 4; shfl.sync.idx.b32 at, at, 0, 31, -1; cvt.u64.u32 w0, at; or.b64 w0, w0, {descriptor};",
        "wgmma.fence.sync.aligned;",
    ]
    for half in range(BM // 128):
        sums = ", ".join(f"${tensor * per + half * 16 + i}" for tensor in range(7) for i in range(16))
        for k in range(CHUNK.value // 16):
            lines.append(f"add.u64 x, x0, {half * 8 * row_bytes + 2 * k}; add.u64 w, w0, {2 * k};")
            lines.append(f"wgmma.mma_async.sync.aligned.m64n224k16.f32.{dtype}.{dtype} {{{sums}}}, x, w, yes, 1, 1, 0, 0;")
    return "\n".join([*lines, "wgmma.commit_group.sync.aligned; }"])


@gluon.constexpr_function
def _product_operands(BM):
    per = BM // 8
    return ",".join(["=f"] * (7 * per) + [str(i) for i in range(7 * per)] + ["r"] * (2 * per))


@gluon.jit
def _join(a, b):
    """Two [BM, w] beside each other: nothing moves."""
    BM: gl.constexpr = a.shape[0]
    COLUMNS: gl.constexpr = 2 * a.shape[1]
    both = gl.reshape(gl.permute(gl.join(a, b), (0, 2, 1)), [BM, COLUMNS])
    return gl.convert_layout(both, _sums_layout(BM, COLUMNS), assert_trivial=True)


@gluon.jit
def _tile_of(row_tiles, GROUP: gl.constexpr):
    """A program's tile of x and of the weight. GROUP tiles of x meet all of the weight before the next do, each tile of the
    weight all of them in turn: what runs at the same time reads few tiles of either. GROUP 0: there is one tile of x."""
    if GROUP == 0:
        m = 0
        n = gl.program_id(0)
    else:
        tiles = gl.num_programs(0) // row_tiles  # of the weight
        first = gl.program_id(0) // (GROUP * tiles) * GROUP
        inside = gl.program_id(0) - first * tiles
        together = gl.minimum(GROUP, row_tiles - first)
        m = first + inside % together
        n = inside // together
    return m, n


@gluon.jit
def _finish(sums, y_smem, y_desc, m0, f0):
    """silu(gate) * up of sums [BM, groups of 8 of each], to y's rows m0 and columns f0 on.

    By the exp and reciprocal of the special function unit: without range checks, for an infinite exp is a sigmoid of 0.
    """
    BM: gl.constexpr = y_desc.block_type.shape[0]
    COLUMNS: gl.constexpr = y_desc.block_type.shape[1]
    gate, up = gl.split(gl.permute(gl.reshape(sums, [BM, COLUMNS // 8, 2, 8]), (0, 1, 3, 2)))
    exp = gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [gate * -1.4426950408889634], gl.float32, True, 1)
    sigmoid = gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + exp], gl.float32, True, 1)
    y = gl.reshape(gate * sigmoid * up, [BM, COLUMNS]).to(y_desc.dtype)
    y_smem.store(gl.convert_layout(y, _sums_layout(BM, COLUMNS), assert_trivial=True))
    fence_async_shared()
    tl.debug_barrier()
    tma.async_copy_shared_to_global(y_desc, [m0, f0], y_smem)


@gluon.jit(do_not_specialize=["row_tiles", "first"])
def _gate_up_kernel(
    w_desc, x_desc, y0_desc, y1_desc, y2_desc, row_tiles, first,
    K: gl.constexpr, S: gl.constexpr, GROUP: gl.constexpr, PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """y [BM of M, 112 of F], stored in pieces of 64, 32 and 16 columns. first: stages filled before the loop, no constant, for
    LLVM would unroll the loops over it."""
    pdl_trigger(PDL)
    BM: gl.constexpr = x_desc.block_type.shape[0]
    CHUNKS: gl.constexpr = K // CHUNK
    DTYPE: gl.constexpr = x_desc.dtype
    PIECE: gl.constexpr = _sums_layout(BM, 32)
    PTX: gl.constexpr = _product(BM, DTYPE)
    OPERANDS: gl.constexpr = _product_operands(BM)
    row_tile, tile = _tile_of(row_tiles, GROUP)
    m0 = row_tile * BM

    x_smem = gl.allocate_shared_memory(DTYPE, [S, BM, CHUNK], x_desc.layout)
    w_smem = gl.allocate_shared_memory(DTYPE, [S, 1, 16, 2, 8, CHUNK], w_desc.layout)  # 14 groups, and zeros
    x_bars = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    w_bars = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    mark_shared(num_warps)
    zeros = gl.zeros([BM, 32], gl.int32, PIECE)
    x_at = zeros + shared_address(x_smem, PIECE)
    w_at = zeros + shared_address(w_smem, PIECE)
    fence_async_shared()  # else Triton would put one before each load of the loop
    tl.debug_barrier()

    for i in range(first):  # a stage after the other, so that the first load is out at once
        mbarrier.init(w_bars.index(i), count=1)
        mbarrier.init(x_bars.index(i), count=1)
        fence_async_shared()
        mbarrier.expect(w_bars.index(i), w_desc.block_type.nbytes)
        mbarrier.expect(x_bars.index(i), x_desc.block_type.nbytes)
        tl.debug_barrier()
        tma.async_copy_global_to_shared(w_desc, [tile, 0, 0, 0, i * CHUNK], w_bars.index(i), w_smem.index(i))
    pdl_wait(PDL)
    for i in range(first):
        tma.async_copy_global_to_shared(x_desc, [m0, i * CHUNK], x_bars.index(i), x_smem.index(i))

    s0 = gl.zeros([BM, 32], gl.float32, PIECE)
    s1, s2, s3, s4, s5, s6 = s0, s0, s0, s0, s0, s0
    slot = 0
    phase = 0
    for c in range(CHUNKS):
        mbarrier.wait(x_bars.index(slot), phase)
        mbarrier.wait(w_bars.index(slot), phase)
        s0, s1, s2, s3, s4, s5, s6 = gl.inline_asm_elementwise(
            PTX, OPERANDS,
            [s0, s1, s2, s3, s4, s5, s6, x_at + slot * (2 * BM * CHUNK), w_at + slot * (512 * CHUNK)],
            dtype=(gl.float32, gl.float32, gl.float32, gl.float32, gl.float32, gl.float32, gl.float32),
            is_pure=False, pack=BM // 8,
        )  # fmt: skip
        s0, s1, s2, s3, s4, s5, s6 = warpgroup_mma_wait(1, deps=(s0, s1, s2, s3, s4, s5, s6))  # c - 1 has been multiplied
        free = gl.where(slot == 0, S - 1, slot - 1)
        more = (c >= 1) & (c < CHUNKS - S + 1)
        k = (c + S - 1) * CHUNK
        mbarrier.expect(w_bars.index(free), w_desc.block_type.nbytes, pred=more)
        mbarrier.expect(x_bars.index(free), x_desc.block_type.nbytes, pred=more)
        tl.debug_barrier()  # by every warp
        tma.async_copy_global_to_shared(w_desc, [tile, 0, 0, 0, k], w_bars.index(free), w_smem.index(free), pred=more)
        tma.async_copy_global_to_shared(x_desc, [m0, k], x_bars.index(free), x_smem.index(free), pred=more)
        wraps = slot == S - 1
        phase = gl.where(wraps, phase ^ 1, phase)
        slot = gl.where(wraps, 0, slot + 1)
    s0, s1, s2, s3, s4, s5, s6 = warpgroup_mma_wait(0, deps=(s0, s1, s2, s3, s4, s5, s6))
    tl.debug_barrier()  # what follows lies in the ring: not before every warp has multiplied
    w_smem._keep_alive()  # Triton does not see that PTX reads them
    x_smem._keep_alive()

    y0 = gl.allocate_shared_memory(DTYPE, y0_desc.block_type.shape, y0_desc.layout)
    y1 = gl.allocate_shared_memory(DTYPE, y1_desc.block_type.shape, y1_desc.layout)
    y2 = gl.allocate_shared_memory(DTYPE, y2_desc.block_type.shape, y2_desc.layout)
    _finish(_join(_join(s0, s1), _join(s2, s3)), y0, y0_desc, m0, tile * 112)
    _finish(_join(s4, s5), y1, y1_desc, m0, tile * 112 + 64)
    _finish(s6, y2, y2_desc, m0, tile * 112 + 96)
    tma.store_wait(0)
    y0._keep_alive()  # the stores read them until now: none may lie in another
    y1._keep_alive()
    y2._keep_alive()


# ---------------------------------------------------------------- choosing


@dataclass(frozen=True)
class Ring:
    rows: int  # of x in a tile: 128 or 256
    stages: int  # of 64 columns
    group: int = 0  # tiles of x that meet the whole weight together; 0: there is but one

    @property
    def num_bytes(self) -> int:
        """Shared memory, but for barriers: the weight's 14 groups of 16 rows lie in room for 16."""
        return 2 * self.stages * CHUNK.value * (self.rows + 256)


def choose_ring(M: int) -> Ring:
    """For M rows of x: what fits into shared memory."""
    if M <= 128:
        return Ring(128, 4)
    return Ring(256, 3, group=0 if M <= 256 else 8)  # 8: 132 programs read 17 MB of x and 30 of the weight, of 50 MB of L2


def fits(M: int, N: int, K: int) -> bool:
    """Whether the kernel can multiply x [M, K] by a weight [N, K]: fewer rows of x would be padded to 128."""
    return MIN_ROWS <= M and N % PROGRAM_ROWS == 0 and K % CHUNK.value == 0


@torch.compiler.assume_constant_result
def _measured(N: int, K: int, device: int) -> tuple[tuple[int, int], ...]:
    return GATE_UP_ROWS.get((num_sms(device), N, K), ()) if wgmma_device(device) else ()


def takes_gate_up(x: torch.Tensor, weight: Weight) -> bool:
    """Whether `gate_up` is right for x [M, K] and this weight, and faster than cuBLAS and `silu_mul`."""
    plain = weight.packed is None and weight.bias is None and x.dtype in DTYPES
    if not plain or not x.is_cuda or is_batch_invariant():
        return False
    M, N, K = x.shape[0], weight.out_features, weight.in_features
    return any(least <= M <= most and fits(M, N, K) for least, most in _measured(N, K, x.device.index or 0))


# ---------------------------------------------------------------- operator


def _output(x, weight):
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or not fits(len(x), *weight.shape):
        raise ValueError(
            f"x and weight: found {list(x.shape)} and {list(weight.shape)}, expected [{MIN_ROWS} or more, K] and "
            f"[multiple of {PROGRAM_ROWS}, K], K a multiple of 64"
        )
    if x.dtype != weight.dtype or not (x.is_contiguous() and weight.is_contiguous()):
        raise ValueError(f"x and weight: found {x.dtype} and {weight.dtype}, expected one dtype, both contiguous")
    return x.new_empty(x.shape[0], weight.shape[0] // 2)


@torch.library.custom_op("rooflama::gate_up", mutates_args=())
def _gate_up(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = _output(x, weight)
    if not has_wgmma(x) or x.dtype not in DTYPES:
        return gate_up_ref(x, weight)
    if not tma_reads(x, weight):
        raise ValueError("x and weight: found an address that is no multiple of 16 bytes, expected one, for TMA")
    (M, F), K, ring = y.shape, x.shape[1], choose_ring(len(x))
    row_tiles = triton.cdiv(M, ring.rows)
    groups, boxes = [F // 112, 14, 2, 8, K], [1, 16, 2, 8, CHUNK.value]  # gate, up; 8 rows each
    _gate_up_kernel[(row_tiles * (F // 112),)](
        described(weight, groups, [112 * K, 8 * K, F * K, K, 1], boxes),
        described(x, [M, K], [K, 1], [ring.rows, CHUNK.value]),
        *(described(y, [M, F], [F, 1], [ring.rows, columns]) for columns in (64, 32, 16)),
        row_tiles,
        min(ring.stages, K // CHUNK.value),
        K=K,
        S=ring.stages,
        GROUP=ring.group,
        num_warps=8,
        **launch_options(x),
    )
    return y


@_gate_up.register_fake
def _(x, weight):
    return _output(x, weight)


def gate_up(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up [M, F] in x.dtype, where [gate, up] = x @ weight.T, summed in float32 and rounded once.

    x [M, K] of 65 rows or more, weight [2 F, K], gate's rows before up's, both contiguous; F a multiple of 112, K of 64.
    ValueError: a shape or dtype that does not fit. Pays where `takes_gate_up` says so.
    """
    return torch.ops.rooflama.gate_up(x, weight)
