"""What every kernel file shares: where a kernel may run, and programmatic dependent launch.

Owns the one guarded place where NVIDIA-only calls stand (griddepcontrol, through Triton's gdc_*). Knows no kernel.

Programmatic dependent launch (PDL, Hopper and later): a kernel may start while the one before it still runs. It loads what
no running kernel writes (its weights), then `pdl_wait`s for everything before it. Two rules keep this exact:
every kernel of the chain waits before it reads anything that an earlier kernel of the step writes; and a kernel that writes
what a later one reads before its wait (lengths, tokens, cache rows) never triggers early: a step's last one, and the first of a
speculative round.
"""

import concurrent.futures
import contextlib
import functools
import os
import sys

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime.jit import JITFunction

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU, one program after another


class Setting:
    """What holds for the whole process, and otherwise within a `with` block. Not for concurrent use."""

    def __init__(self, value):
        self.value = value

    @contextlib.contextmanager
    def set_to(self, value):
        before, self.value = self.value, value
        try:
            yield
        finally:
            self.value = before


_pdl_enabled = Setting(True)

# For the ordering test: after triggering, every third program sleeps so long, so that what reads too early reads wrongly.
DELAY_NS = tl.constexpr(int(os.environ.get("ROOFLAMA_DELAY_NS", "0")))

INTERPRETED = tl.constexpr(INTERPRET)
NVIDIA = tl.constexpr(torch.version.hip is None and not INTERPRET)

AHEAD_BYTES = 16 << 20  # what memory can deliver until the next step's first kernel has started, and more


@triton.jit
def pdl_trigger(PDL: tl.constexpr):
    """Lets the next kernel of the stream start early. PDL is False under the interpreter and before Hopper."""
    if PDL:
        gdc_launch_dependents()
    if DELAY_NS > 0:
        if tl.program_id(0) % 3 == 1:
            tl.inline_asm_elementwise(
                "nanosleep.u32 $1; mov.u32 $0, 0;",
                "=r,r",
                [tl.program_id(0) * 0 + DELAY_NS],  # not tl.full, which Gluon gives a layout
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Waits until every earlier kernel of the stream has finished and its writes can be seen."""
    if PDL:
        gdc_wait()


@triton.jit
def hold(x):
    """Keeps `x`, loaded 8- or 16-bit values, in registers up to here. Triton sends a dot's operand, or what changes its layout,
    through shared memory right behind its load; other loads in between would not be issued until `x` has arrived."""
    if NVIDIA:
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=32 // x.dtype.primitive_bitwidth
        )
    return x


@triton.jit
def to_cache(values, cache_ptr):
    """float32 values in the KV cache's dtype; what is beyond the range of e4m3 becomes its largest value."""
    if cache_ptr.dtype.element_ty == tl.float8e4nv:
        values = tl.clamp(values, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        if INTERPRETED:  # its cast halves what rounds up to a power of two: the rounding is done here, to 4 bits or 2**-9
            wide = values * (2.0**20 + 1)
            values = tl.where(tl.abs(values) < 2.0**-6, (values + 24576.0) - 24576.0, wide - (wide - values))
    return values.to(cache_ptr.dtype.element_ty)


@triton.jit
def permuted(column):
    """Where a column of x goes within its 32, as _packed_ring.py wants them: word (two columns) 4 t + j to 4 j + t."""
    word = column % 32 // 2
    return column // 32 * 32 + word % 4 * 8 + word // 4 * 2 + column % 2


@triton.jit
def prefetch(pointers, PDL: tl.constexpr):
    """Brings what they point to into L2. A hint, which changes no result."""
    if PDL:
        asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
        tl.inline_asm_elementwise(asm, "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def prefetch_share(ahead_ptr, ahead_bytes, helper, helpers, PDL: tl.constexpr):
    """Brings this helper's share of the `ahead_bytes` at ahead_ptr into L2. A hint, which changes no result."""
    if PDL and ahead_ptr is not None:
        share = ahead_bytes // helpers // 128 * 128
        if share > 0:
            tl.inline_asm_elementwise(
                """{
                .reg .pred own; .reg .u32 thread;
                mov.u32 thread, %tid.x;
                setp.eq.u32 own, thread, 0;
                @own cp.async.bulk.prefetch.L2.global [$1], $2;
                mov.u32 $0, 0;
                }""",
                "=r,l,r",
                [ahead_ptr.to(tl.int64) + helper.to(tl.int64) * share, share],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


@triton.jit
def arrives_last(counter_ptr, number):
    """Says that what this program has stored is there: True in the last of `number` programs to do so, which sets the counter
    back to zero, so that no kernel has to. To be called after the wait."""
    tl.debug_barrier()  # every thread's stores come before the one thread's release
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == number - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def best_of(value, ids):
    """The largest value along the first axis, and of equal ones the lowest id. NaN must not lose: it counts as infinity."""
    value = tl.where(value == value, value, float("inf"))
    top = tl.max(value, 0, keep_dims=True)
    return tl.max(value, 0), tl.min(tl.where(value == top, ids, 0x7FFFFFFF), 0)


@triton.jit
def best_candidate(max_ptr, id_ptr, row, partials, PARTIALS: tl.constexpr):
    """(value, id) of the best of a row's `partials` candidates."""
    p = tl.arange(0, PARTIALS)
    value = tl.load(max_ptr + row * partials + p, mask=p < partials, other=float("-inf"))
    ids = tl.load(id_ptr + row * partials + p, mask=p < partials, other=0x7FFFFFFF)
    return best_of(value, ids)


@triton.jit
def copy_row(source_ptr, target_ptr, K, BLOCK: tl.constexpr):
    """K values, BLOCK at a time."""
    k = tl.arange(0, BLOCK)
    for k0 in tl.range(0, K, BLOCK):
        row = tl.load(source_ptr + k0 + k, mask=k0 + k < K)
        tl.store(target_ptr + k0 + k, row, mask=k0 + k < K)


def check_int32(size: int, **tensors: torch.Tensor) -> None:
    """ValueError: one that is not int32 [size]."""
    for name, t in tensors.items():
        if t.shape != (size,) or t.dtype != torch.int32:
            raise ValueError(f"{name}: found {t.dtype} {list(t.shape)}, expected int32 [{size}]")


def runs_kernels(x: torch.Tensor) -> bool:
    """True where `x` is worked on by Triton kernels: on a GPU, or anywhere under TRITON_INTERPRET=1."""
    return x.is_cuda or INTERPRET


@functools.cache
def capability(index: int) -> tuple[int, int]:
    """Compute capability of an NVIDIA card; (0, 0) of any other."""
    return torch.cuda.get_device_capability(index) if torch.version.hip is None else (0, 0)


@torch.compiler.assume_constant_result
def wgmma_device(index: int) -> bool:
    """True of a Hopper card: the products that read shared memory by themselves (wgmma) went with it."""
    return not INTERPRET and capability(index) == (9, 0)


def has_wgmma(x: torch.Tensor) -> bool:
    """True on a Hopper card."""
    return x.is_cuda and wgmma_device(x.device.index or 0)


def pdl_supported(x: torch.Tensor) -> bool:
    """True where kernels on `x`'s device are launched with programmatic dependent launch."""
    return _pdl_enabled.value and x.is_cuda and not INTERPRET and capability(x.device.index or 0) >= (9, 0)


def launch_options(x: torch.Tensor) -> dict:
    """Keyword arguments for a launch on `x`'s device: `kernel[grid](..., **launch_options(x))` sets PDL and launch_pdl."""
    return {"PDL": True, "launch_pdl": True} if pdl_supported(x) else {"PDL": False}


def pdl_disabled():
    """Launches everything inside without PDL: what the ordering tests compare with. Not for concurrent use."""
    return _pdl_enabled.set_to(False)


def fix_cache_keys(package: str) -> None:
    """Has Triton compute the keys of a package's functions now, in one order.

    A function's key, under which its compiled forms are cached, counts a callee's constants only where the callee's own key is
    there already (Triton 3.6 and 3.7, DependenciesFinder._update_hash). Left to the order of launches, a process that begins
    with another kernel would compile again what the cache has. All of them take 40 ms.
    """
    if INTERPRET:
        return
    for name in sorted(name for name in sys.modules if name.startswith(f"{package}.")):
        for function in vars(sys.modules[name]).values():
            if isinstance(function, JITFunction):
                _ = function.cache_key


def permute_columns(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] with its columns as `permuted` has them; K a multiple of 32. Its own inverse."""
    return x.unflatten(-1, (-1, 4, 4, 2)).transpose(-3, -2).flatten(-4)


_workspaces: dict[tuple, torch.Tensor] = {}


def zeroed_workspace(device: torch.device, name: str, size: int, dtype=torch.int32) -> torch.Tensor:
    """Memory [size] that is zero between launches, because the kernels that use it put the zeros back: counters, histograms.

    One a device and name, so two streams must not run the same operator at once. A thread of its own allocates it: were the
    current thread about to record a graph, the memory would belong to that graph's private pool.
    RuntimeError: a CUDA graph is being captured and the operator has not run before.
    """
    key = (device, name)
    if key not in _workspaces:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"the {name} must be there before a CUDA graph is captured: run the operator once")

        def allocate():
            _workspaces[key] = torch.zeros(size, dtype=dtype, device=device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(allocate).result()
    return _workspaces[key]


@functools.cache
def num_sms(index: int = 0) -> int:
    """Multiprocessors of CUDA device `index`; 132 (an H100 or H200) where there is none, so that tile choices can be tested."""
    return torch.cuda.get_device_properties(index).multi_processor_count if torch.cuda.is_available() else 132


def plan_prefetch(ahead: torch.Tensor | None) -> tuple[int, int]:
    """Of the weight that the next step reads first: (programs that help, bytes that they bring into L2)."""
    if ahead is None:
        return 0, 0
    return num_sms(ahead.device.index or 0), min(AHEAD_BYTES, ahead.numel() * ahead.element_size())
