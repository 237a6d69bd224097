"""What Gluon has no word for on Hopper: where in shared memory a buffer lies, and programs that write into each other's.

Owns inline PTX, the launch of a cluster, and how a multiprocessor shares its memory between L1 and shared memory. Does not know
what the programs compute. Needs a GPU of compute capability 9.0.

What PTX reads and writes, Triton does not see: buffers that it uses must be kept alive (`_keep_alive`) behind a barrier of all
warps, or the compiler's own shared memory may lie in them too early.

PTX needs addresses, and Triton does not say where it has put a buffer. A kernel finds out when it starts: it writes its address
into each 1,024 bytes of its shared memory, and reads the buffer's beginning.

In a cluster each program has an *inbox* in its shared memory, and a barrier there that counts the bytes which arrive. Sending
is st.async: no fence, no atomic, no trip through memory.
"""

import ctypes

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# ---------------------------------------------------------------- addresses

LINE = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))  # of buffers [lines, 32] of 32 bits, aligned to 1,024 bytes


@gluon.jit
def _issue(PTX: gl.constexpr, operands=None):
    """Instructions that give nothing, by all threads that come here; operands, 32 bits each, are $1 and on."""
    if operands is None:
        given = (gl.program_id(0),)  # Triton wants one
    else:
        given = operands
    constraints: gl.constexpr = "=r" + ",r" * len(given)
    gl.inline_asm_elementwise(PTX, constraints, given, gl.int32, is_pure=False, pack=1)


@gluon.jit
def mark_shared(num_warps: gl.constexpr):
    """Writes its address into each 1,024 bytes of the program's shared memory, whatever was there, barriers too. It has fewer
    than 256 of them."""
    mark: gl.constexpr = """{
    .reg .b32 at, size; .reg .pred there;
    shl.b32 at, $1, 10; mov.u32 size, %dynamic_smem_size; setp.lt.u32 there, at, size;
    mov.u32 size, global_smem; add.u32 at, at, size; @there st.shared.u32 [at], at; mov.u32 $0, 0;
    }"""
    thread = gl.arange(0, 256, gl.BlockedLayout([1], [32], [num_warps], [0]))
    _issue(mark, (thread,))
    tl.debug_barrier()


@gluon.jit
def shared_address(buffer, LAYOUT: gl.constexpr):
    """Where a buffer, aligned to 1,024 bytes, begins, as [1, 1]: what `mark_shared` wrote there."""
    return buffer._reinterpret(gl.int32, [1, 1], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])).load(LAYOUT)


@gluon.jit
def first_address(buffer):
    """`shared_address` as a scalar."""
    L: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [gl.num_warps(), 1], [1, 0])
    return gl.max(shared_address(buffer, L).reshape([1]), 0)


@gluon.constexpr_function
def _prefetching(kernel, parameters):
    return "".join(f"prefetch.param.tensormap [{kernel}_param_{i}]; " for i in parameters) + "mov.b32 $0, $1;"


@gluon.jit
def prefetch_descriptors(KERNEL: gl.constexpr, PARAMETERS: gl.constexpr):
    """TMA's descriptors among a kernel's parameters, by its name and their numbers in its PTX: else the first load waits for
    them, too. Triton passes a descriptor of two dimensions as five parameters."""
    _issue(_prefetching(KERNEL, PARAMETERS))


# ---------------------------------------------------------------- barriers and copies of single threads and warps
# Triton's own are the whole program's: it puts a barrier of all warps before a copy, and does not let a warp wait by itself.


@gluon.jit
def lane_number():
    asm: gl.constexpr = "mov.u32 $0, %laneid; // $1"
    return gl.inline_asm_elementwise(asm, "=r,r", [gl.program_id(0)], gl.int32, is_pure=True, pack=1)


@gluon.jit
def warp_number():
    """ptxas knows that all of a warp have the same."""
    asm: gl.constexpr = "mov.u32 $0, %tid.x; shr.u32 $0, $0, 5; shfl.sync.idx.b32 $0, $0, 0, 31, -1; // $1"
    return gl.inline_asm_elementwise(asm, "=&r,r", [gl.program_id(0)], gl.int32, is_pure=False, pack=1)


@gluon.jit
def one_thread(pred):
    """Where pred, which is all of a warp's or none's: True in one thread of the warp, each time the same. ptxas knows it for
    one, where it is asked for just before it is used, and copies need no loop over threads."""
    own = False
    if pred:
        asm: gl.constexpr = "{ .reg .pred own; elect.sync _|own, 0xffffffff; selp.b32 $0, 1, 0, own; } // $1"
        own = gl.inline_asm_elementwise(asm, "=r,r", [gl.program_id(0)], gl.int32, is_pure=False, pack=1) != 0
    return own


@gluon.jit
def not_unrolled():
    """First in a loop: ptxas is to leave it a loop. What a program runs once, it also has to fetch."""
    _issue('.pragma "nounroll"; mov.u32 $0, $1;')


@gluon.jit
def init_barrier(bar_at, count):
    """By one thread; before others come, fence_barriers() and a barrier of all warps."""
    _issue("mbarrier.init.shared::cta.b64 [$1], $2; mov.u32 $0, 0;", (bar_at, count))


@gluon.jit
def fence_barriers():
    """What this thread has initialized is there for copies, and for the cluster."""
    _issue("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta; mov.u32 $0, $1;")


@gluon.jit
def arrive_expecting(bar_at, num_bytes):
    """By one thread: it arrives, and copies are to bring so many bytes."""
    _issue("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $2; mov.u32 $0, 0;", (bar_at, num_bytes))


@gluon.jit
def wait_phase(bar_at, phase):
    """Each thread by itself, until the barrier's phase of this parity is over."""
    asm: gl.constexpr = """{
    .reg .pred done;
    again: mbarrier.try_wait.parity.shared::cta.b64 done, [$1], $2; @!done bra again;
    mov.u32 $0, 0;
    }"""
    _issue(asm, (bar_at, phase))


@gluon.jit
def arrive_warp(bar_at, lane, pred):
    """Where pred, which is all of a warp's or none's: the warp arrives, once, when all its lanes have come here."""
    asm: gl.constexpr = """{
    .reg .pred own;
    setp.ne.b32 own, $3, 0; setp.eq.and.u32 own, $2, 0, own;
    bar.warp.sync 0xffffffff; @own mbarrier.arrive.shared::cta.b64 _, [$1]; mov.u32 $0, 0;
    }"""
    _issue(asm, (bar_at, lane, pred.to(gl.int32)))


@gluon.constexpr_function
def _copying(kernel, parameter, rank):
    coordinates = ", ".join(f"${3 + i}" for i in range(rank))
    return (
        f"{{ .reg .b64 d; mov.b64 d, {kernel}_param_{parameter}; cvta.param.u64 d, d;"
        f"cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes [$1], [d, {{{coordinates}}}], [$2];"
        "mov.u32 $0, 0; }"
    )


@gluon.jit
def copy_box(KERNEL: gl.constexpr, PARAMETER: gl.constexpr, at, bar_at, coordinates):
    """By one thread: a box of what the kernel's parameter describes (see prefetch_descriptors), at coordinates of which the
    first is the last dimension's, to an address in shared memory."""
    asm: gl.constexpr = _copying(KERNEL, PARAMETER, len(coordinates))
    constraints: gl.constexpr = "=r,r,r" + ",r" * len(coordinates)
    gl.inline_asm_elementwise(asm, constraints, (at, bar_at) + coordinates, gl.int32, is_pure=False, pack=1)  # noqa: RUF005


# ---------------------------------------------------------------- clusters


@gluon.jit
def open_inbox(bar_at):
    """Makes a barrier for one arrival at the address, and tells the cluster that this program has begun."""
    asm: gl.constexpr = """{
    .reg .pred own; .reg .u32 thread;
    mov.u32 thread, %tid.x; setp.eq.u32 own, thread, 0;
    @own mbarrier.init.shared::cta.b64 [$1], 1;
    @own fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive.release.aligned; mov.u32 $0, 0;
    }"""
    _issue(asm, (bar_at,))


@gluon.jit
def wait_for_inboxes():
    """Until every program of the cluster has opened its own. Each of them must come here, once."""
    _issue("barrier.cluster.wait.acquire.aligned; mov.u32 $0, $1;")


@gluon.jit
def expect_bytes(bar_at, num_bytes):
    """Of all senders together. They may have begun."""
    asm: gl.constexpr = """{
    .reg .pred own; .reg .u32 thread;
    mov.u32 thread, %tid.x; setp.eq.u32 own, thread, 0;
    @own mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $2; mov.u32 $0, 0;
    }"""
    _issue(asm, (bar_at, num_bytes))


@gluon.jit
def receive(bar_at):
    """Until what `expect_bytes` asked for has come."""
    asm: gl.constexpr = """{
    .reg .pred done;
    again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [$1], 0; @!done bra again;
    mov.u32 $0, 0;
    }"""
    _issue(asm, (bar_at,))


@gluon.jit
def send(value, top, total, rank, value_at, top_at, total_at, begins, bar_at):
    """32-bit numbers to the inbox of the cluster's program `rank`, four neighbouring values at a time, and where the first of
    them has `begins`, its `top` and `total`. All of one layout; addresses are the sender's own, as inboxes lie alike."""
    asm: gl.constexpr = """{
    .reg .b32 at, bar; .reg .pred begins;
    mapa.shared::cluster.u32 bar, $36, $16; mapa.shared::cluster.u32 at, $20, $16;
    st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [at], {$4, $5, $6, $7}, [bar];
    setp.ne.b32 begins, $32, 0;
    mapa.shared::cluster.u32 at, $24, $16;
    @begins st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [at], $8, [bar];
    mapa.shared::cluster.u32 at, $28, $16;
    @begins st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [at], $12, [bar];
    mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;
    }"""
    operands = [
        value.to(gl.int32, bitcast=True), top.to(gl.int32, bitcast=True), total.to(gl.int32, bitcast=True), rank,
        value_at, top_at, total_at, begins, bar_at,
    ]  # fmt: skip
    constraints: gl.constexpr = "=r,=r,=r,=r," + "r," * 35 + "r"
    gl.inline_asm_elementwise(asm, constraints, operands, gl.int32, is_pure=False, pack=4)


def launch_clusters(kernel, clusters: int, size: int, arguments: tuple, options: dict):
    """Launches `clusters` clusters of `size` programs (2 to 16), program_id(0) % size being a program's rank in its cluster.

    The kernel is compiled as for programs alone: with Triton's own `num_ctas` each tensor would be spread over the cluster.
    What the launcher makes of a compiled kernel it takes from (warps, programs of a cluster, shared memory) beside it. To look
    that up for each launch costs eager calls some microseconds, and CUDA graphs nothing.
    """
    compiled = kernel.warmup(*arguments, grid=(1,), **options)
    if compiled is not None:
        warps, _, shared = compiled.packed_metadata
        compiled.packed_metadata = (warps, size, shared)
    return kernel[(clusters,)](*arguments, **options)


# ---------------------------------------------------------------- L1 and shared memory

SHARED_KIB = (0, 8, 16, 32, 64, 100, 132, 164, 196, 228)  # that a multiprocessor can have; L1 has the rest of 256


def carveout_percent(num_bytes: int, programs: int) -> int:
    """Of 228 KiB, the first whole percent beyond what holds so many programs, each `num_bytes` of shared memory and 1 KiB
    beside; or all. The driver takes the next size up: 164 KiB for 58%, which is what was measured (LOG.md)."""
    needed = programs * (num_bytes + 1024)
    return -(-next((kib for kib in SHARED_KIB if kib * 1024 >= needed), 228) * 100 // 228)


_carveouts: dict[int, int] = {}  # what a function of the driver was last told


def _set_carveout(function: int, percent: int) -> None:
    if _carveouts.get(function) != percent:
        preferred = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT; only a hint: an error is no matter
        ctypes.CDLL("libcuda.so.1").cuFuncSetAttribute(ctypes.c_void_p(function), preferred, percent)
        _carveouts[function] = percent


def leave_l1(compiled, programs: int) -> None:
    """A hint to the driver: no more shared memory on a multiprocessor than so many programs of this kernel need, from its next
    launch on. Left alone it is all there can be, and a kernel beside it, which streams through L1, has 28 KiB for what it has
    asked for (LOG.md). `compiled`: what a launch has returned; None where nothing was launched."""
    if compiled is not None:
        _set_carveout(compiled.function, carveout_percent(compiled.metadata.shared, programs))
