"""Counters in a program's shared memory, of which Triton gives a kernel no use: a histogram, and lists that grow.

On NVIDIA cards this is inline PTX: an atomic in shared memory takes a few cycles, where `tl.histogram` of so many bins looks at
each bin, and a list by `tl.cumsum` moves all of a tile between threads. Elsewhere, as in the interpreter, it is these two.
Each element of a tensor must be one thread's alone, as it is where there are at least as many elements as threads.
"""

import triton
import triton.language as tl

from kernels._common import NVIDIA

BINS = tl.constexpr(1024)
LISTS = tl.constexpr(3)
FEW = tl.constexpr(256)  # numbers that fit where the bins were
_QUADS = [f"{{r{4 * i}, r{4 * i + 1}, r{4 * i + 2}, r{4 * i + 3}}}" for i in range(16)]
_HOLD_64 = tl.constexpr(
    "{ .reg .pred p; .reg .u32 z, r<64>; mov.u32 z, %ctaid.z; setp.ne.u32 p, z, 7; @p bra none; "
    + " ".join(f"ld.volatile.shared.v4.u32 {quad}, [$1 + {16 * i}];" for i, quad in enumerate(_QUADS))
    + " ".join(f"st.volatile.shared.v4.u32 [$1 + {16 * i}], {quad};" for i, quad in enumerate(_QUADS))
    + " none: mov.u32 $0, 0; }"
)


@triton.jit
def open_bins():
    """Empty bins. On NVIDIA cards this is their address, behind which are the lengths of LISTS lists; once a kernel."""
    if NVIDIA:
        asm: tl.constexpr = "{ .shared .align 16 .b8 bins[4108]; mov.u32 $0, bins; }"
        bins = tl.inline_asm_elementwise(asm, "=r,r", [tl.full([], 0, tl.int32)], tl.int32, is_pure=False, pack=1)
        zero: tl.constexpr = "st.shared.u32 [$1], 0; mov.u32 $0, 0;"
        tl.inline_asm_elementwise(zero, "=r,r", [bins + 4 * tl.arange(0, BINS)], tl.int32, is_pure=False, pack=1)
        for i in tl.static_range(LISTS):
            tl.inline_asm_elementwise(zero, "=r,r", [bins + 4 * BINS + 4 * i], tl.int32, is_pure=False, pack=1)
        tl.debug_barrier()
    else:
        bins = tl.zeros([BINS], tl.int32)
    return bins


@triton.jit
def add_to_bins(bins, b, mask):
    """The bins with one more token in each bin of `b` where `mask`."""
    if NVIDIA:
        asm: tl.constexpr = "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p red.shared.add.u32 [$1], 1; mov.u32 $0, 0; }"
        tl.inline_asm_elementwise(asm, "=r,r,r", [bins + 4 * b, mask.to(tl.int32)], tl.int32, is_pure=False, pack=1)
    else:
        bins += tl.histogram(b, BINS, mask=mask)
    return bins


@triton.jit
def _read_shared(address):
    """What every thread has left there, on NVIDIA cards."""
    tl.debug_barrier()
    return tl.inline_asm_elementwise("ld.shared.u32 $0, [$1];", "=r,r", [address], tl.int32, is_pure=False, pack=1)


@triton.jit
def read_bins(bins):
    """The counts [BINS]."""
    if NVIDIA:
        bins = _read_shared(bins + 4 * tl.arange(0, BINS))
    return bins


@triton.jit
def open_list(bins, i: tl.constexpr):
    """The length of empty list i, of LISTS; on NVIDIA cards its address."""
    if NVIDIA:
        length = bins + 4 * BINS + 4 * i
    else:
        length = tl.full([], 0, tl.int32)
    return length


@triton.jit
def append(list_ptr, length, ids, mask):
    """Puts the ids where `mask` behind a list, in any order."""
    if NVIDIA:  # a scan and a store would each move all of it between threads
        asm: tl.constexpr = """{
        .reg .pred p; .reg .u32 place; .reg .u64 address;
        setp.ne.u32 p, $4, 0;
        @p atom.shared.add.u32 place, [$1], 1;
        @p mad.wide.u32 address, place, 4, $2;
        @p st.global.u32 [address], $3;
        mov.u32 $0, 0;
        }"""
        arguments = [length, list_ptr.to(tl.int64), ids, mask.to(tl.int32)]
        tl.inline_asm_elementwise(asm, "=r,r,l,r,r", arguments, tl.int32, is_pure=False, pack=1)
    else:
        rank = tl.cumsum(mask.to(tl.int32), 0)
        tl.store(list_ptr + length + rank - 1, ids, mask=mask)
        length += tl.sum(mask.to(tl.int32), 0)
    return length


@triton.jit
def read_length(length):
    """The list's length as a number; the list can be read from now on."""
    if NVIDIA:
        length = _read_shared(length)
    return length


@triton.jit
def open_few(bins):
    """No numbers yet, of at most FEW, where the bins were, which are lost; and how many these are, for `read_length`."""
    if NVIDIA:
        few, length = bins, bins + 4 * (BINS + LISTS - 1)
        tl.debug_barrier()  # behind what was read there
        tl.inline_asm_elementwise("st.shared.u32 [$1], 0; mov.u32 $0, 0;", "=r,r", [length], tl.int32, is_pure=False, pack=1)
        tl.debug_barrier()
    else:
        few, length = tl.zeros([FEW], tl.int32), tl.full([], 0, tl.int32)
    return few, length


@triton.jit
def add_few(few, length, numbers, mask):
    """Puts the numbers where `mask` behind the few, in any order. There must be room."""
    if NVIDIA:
        asm: tl.constexpr = """{
        .reg .pred p; .reg .u32 place;
        setp.ne.u32 p, $4, 0;
        @p atom.shared.add.u32 place, [$2], 1;
        @p mad.lo.u32 place, place, 4, $1;
        @p st.shared.u32 [place], $3;
        mov.u32 $0, 0;
        }"""
        arguments = [few, length, numbers, mask.to(tl.int32)]
        tl.inline_asm_elementwise(asm, "=r,r,r,r,r", arguments, tl.int32, is_pure=False, pack=1)
    else:
        rank = length + tl.cumsum(mask.to(tl.int32), 0) - 1
        here = mask[:, None] & (rank[:, None] == tl.arange(0, FEW)[None, :])
        few += tl.sum(tl.where(here, numbers[:, None], 0), 0)
        length += tl.sum(mask.to(tl.int32), 0)
    return few, length


@triton.jit
def read_few(few, length, i):
    """The numbers at `i`, below FEW; anything from `length` on, which `read_length` has given: it is read before they are."""
    if NVIDIA:  # pure: each layout reads for itself, in place of moving them between threads
        few = tl.inline_asm_elementwise(
            "ld.shared.u32 $0, [$1];", "=r,r,r", [few + 4 * i, length], tl.int32, is_pure=True, pack=1
        )
    else:
        few = tl.gather(few, i, 0)
    return few


@triton.jit
def take_registers(bins):
    """Has ptxas give a thread more than 64 registers: 16 warps of them are more than half of a multiprocessor's, so that none
    gets two programs. A branch that no launch takes, as none has an eighth plane of programs, holds 64 beside the stack's."""
    if NVIDIA:
        tl.inline_asm_elementwise(_HOLD_64, "=r,r", [bins], tl.int32, is_pure=False, pack=1)
