"""flash_decode against float64: every shape of the work, ragged and empty sequences, memory that nobody may read.

Letters as in kernels/flash_decode.py.
"""

import itertools
import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch.library import opcheck

from kernels._common import INTERPRET, _workspaces, pdl_disabled, permute_columns, wgmma_device
from kernels._flash_ring import FlashRing, choose_flash_ring
from kernels._hopper import carveout_percent
from kernels.flash_decode import choose_launch, flash_decode, flash_decode_ref, override_launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# --------------------------------------------------------------------------------------------------------------------------
# Inputs and tolerance
# --------------------------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One step's inputs. Rows of the cache that are not in use hold NaN."""

    lengths: list[int]
    tokens: int = 1
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype | None = None
    pages: int = 1  # a sequence
    page_size: int = 1024
    sharpness: float = 1.0  # of the softmax
    window: int | None = None
    tensors: dict = field(init=False)

    def __post_init__(self):
        B, D, Hkv, spare = len(self.lengths), self.head_dim, self.num_kv_heads, 2
        q = torch.randn(B, self.tokens, self.num_heads, D) * self.sharpness
        k, v = torch.randn(2, B * self.pages + spare, Hkv, self.page_size, D)
        table = torch.randperm(B * self.pages + spare)[: B * self.pages].view(B, self.pages)
        in_use = torch.zeros(B * self.pages + spare, self.page_size, dtype=torch.bool)
        for pages, length in zip(table, self.lengths, strict=True):
            for i, page in enumerate(pages):
                in_use[page, : max(0, length - i * self.page_size)] = True
        hidden = ~in_use[:, None, :, None]
        cache_dtype = self.cache_dtype or self.dtype
        self.tensors = {
            "q": q.to(self.dtype),
            "k_cache": k.masked_fill(hidden, math.nan).to(cache_dtype),
            "v_cache": v.masked_fill(hidden, math.nan).to(cache_dtype),
            "lengths": torch.tensor(self.lengths, dtype=torch.int32),
            "table": table.to(torch.int32),
        }
        if cache_dtype == torch.float8_e4m3fn:
            self.tensors |= {"k_scale": torch.rand(Hkv) + 0.5, "v_scale": torch.rand(Hkv) + 0.5}
        self.tensors = {name: t.to(DEVICE) for name, t in self.tensors.items()}

    @property
    def options(self):
        return {"scale": self.head_dim**-0.5, "window": self.window}

    def run(self, **options):
        return flash_decode(**self.tensors, **self.options, **options)

    def check(self, out):
        assert out.dtype == self.dtype
        exact, bound = exact_and_bound(self.tensors, self.options)
        assert out.isfinite().all(), "found NaN or infinity"
        excess = ((out.double() - exact).abs() / bound).max().item()
        assert excess <= 1, f"error: found {excess:.2f} of the bound, expected at most 1"


def exact_and_bound(tensors, options):
    """The result in float64, and how far from it a kernel may be, element by element.

    With weights p, keys and values as given, and u the roundoff of q's dtype, w that of a float32 sum on tensor cores:
    - each score errs by (D + 4) w times the sum of |q k| (products and scaling), so each weight by that, relatively: S;
    - a weight is rounded to q's dtype before it meets V: u; below 2**-14 float16 has only the absolute 2**-25 left;
    - the sum over n keys adds n w, and the normaliser errs as the weights do;
    - the output is rounded once: u.
    All but the last are relative to A = sum p |v|, which is attention over |v|.
    """
    q, v_cache = tensors["q"], tensors["v_cache"].double()
    wide = {k: t.double() if t.is_floating_point() else t for k, t in tensors.items()}
    exact = flash_decode_ref(**wide, **options)
    absolute = flash_decode_ref(**(wide | {"v_cache": v_cache.abs()}), **options)
    T, D = q.shape[1], q.shape[3]
    keys = int(tensors["lengths"].max()) + T
    # The interpreter truncates to bfloat16: twice the error of rounding.
    u = torch.finfo(q.dtype).eps / (1 if INTERPRET and q.dtype == torch.bfloat16 else 2)
    w = 2.0**-22
    k_scale = tensors.get("k_scale", torch.ones(1, device=q.device)).max().item()
    largest_k = tensors["k_cache"].double().nan_to_num(0).norm(dim=-1).max() * k_scale
    score = (D + 4) * w * q.double().norm(dim=-1).max() * largest_k * options["scale"]  # Cauchy-Schwarz: sum |q k| <= |q| |k|
    tiny = keys * 2.0**-25 * v_cache.nan_to_num(0).abs().max() if q.dtype == torch.float16 else 0.0
    bound = 1.01 * (u * exact.abs() + (u + 2 * score + (keys + 8) * w) * absolute + tiny) + 1e-12
    return exact, bound


# --------------------------------------------------------------------------------------------------------------------------
# The kernel
# --------------------------------------------------------------------------------------------------------------------------

CASES = {
    "one token": Case([1], page_size=64),
    "less than a chunk": Case([100], page_size=100),
    "a chunk and one": Case([129]),
    "two parts": Case([513], sharpness=8),
    "three parts": Case([1000], sharpness=0.02, dtype=torch.float16),
    "ragged": Case([700, 0, 1, 300], sharpness=4),
    "d96": Case([511, 64], head_dim=96, num_heads=10),
    "d128, group 7": Case([300, 1000], head_dim=128, num_heads=14),
    "group 1": Case([200, 77], num_heads=2, dtype=torch.float16),
    "group 16": Case([260], num_heads=16, num_kv_heads=1, head_dim=128),
    "two tokens": Case([600, 2, 0], tokens=2),
    "more tokens than rows": Case([3, 130], tokens=5, num_heads=6),
    "tokens in both parts' chunks": Case([514], tokens=4, num_heads=4),
    "32 query rows": Case([530, 40], tokens=8),
    "64 query rows": Case([530], tokens=16, head_dim=128, dtype=torch.float16),
    "three query tiles": Case([140], tokens=11, num_heads=16, num_kv_heads=1),
    "pages of 64": Case([600, 64, 65, 0], pages=16, page_size=64),
    "many pairs, pages of 64": Case([300] * 35 + [299], pages=5, page_size=64),
    "pages of 256": Case([1000, 257], pages=4, page_size=256, tokens=3),
    "window in one page": Case([900, 50, 0], window=130),
    "window over pages": Case([900, 300], window=100, tokens=4, pages=8, page_size=128),
    "window of one": Case([257], window=1),
    "many, one long": Case([i % 40 for i in range(100)] + [300] + [3] * 36, page_size=320),
    "fp8": Case([513, 7], cache_dtype=torch.float8_e4m3fn),
    "fp8, d128, paged": Case([300], cache_dtype=torch.float8_e4m3fn, head_dim=128, pages=8, page_size=64, dtype=torch.float16),
}


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name):
    case = CASES[name]
    case.check(case.run())
    assert not any(w.any() for w in _workspaces.values()), "the last program of a merge resets its counter"


@pytest.mark.parametrize("name", ["three parts", "ragged", "more tokens than rows", "pages of 64", "window over pages"])
def test_fixed_splits(name):
    CASES[name].check(CASES[name].run(split_size=128))


LAUNCHES = {
    "small chunks, many parts": {"chunk_rows": 64, "min_rows": 64, "merged": 2},
    "a large chunk": {"chunk_rows": 256, "block_rows": 128, "min_rows": 256},
    "one softmax": {"row_groups": 1},
    "no chunk": {"chunk_rows": 0, "row_groups": 1, "block_rows": 32},
    "one warp without a chunk": {"chunk_rows": 0, "row_groups": 1, "block_rows": 16, "warps": 1, "min_rows": 64},
    "two warps": {"row_groups": 2, "warps": 2, "block_rows": 32, "chunk_rows": 64, "min_rows": 128},
    "eight warps": {"row_groups": 8, "warps": 8, "block_rows": 128, "chunk_rows": 128},
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches(name):
    paged = Case([300, 256, 0, 700, 257], tokens=2, head_dim=128, pages=3, page_size=256)
    for case in (Case([700, 3, 0]), paged, Case([900, 5], window=130, tokens=3)):
        with override_launch(**LAUNCHES[name], programs=37, items=37):
            case.check(case.run())


def test_zeros_where_nothing_is_visible():
    out = Case([0, 2, 5], tokens=4).run()
    assert not out[0].any(), "an empty sequence"
    assert not out[1, :2].any(), "tokens at negative positions"
    assert out[1, 2:].any(-1).all()
    assert out[2].any(-1).all()


def test_nan_inside_a_sequence_is_not_hidden():
    case = Case([300, 40])
    case.tensors["v_cache"][case.tensors["table"][0, 0].item(), :, 17] = math.nan
    out = case.run()
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_a_fixed_split_does_not_depend_on_the_batch():
    """A sequence's result is bitwise the same alone and among others, whatever their lengths."""
    case = Case([700, 130, 999], tokens=2)
    together = case.run(split_size=256)
    for b in range(3):
        alone = {n: t[b : b + 1] if n in ("q", "lengths", "table") else t for n, t in case.tensors.items()}
        assert torch.equal(flash_decode(**alone, **case.options, split_size=256)[0], together[b])


def test_the_result_is_the_same_each_time():
    case = Case([1000, 700])
    assert torch.equal(case.run(), case.run())


# --------------------------------------------------------------------------------------------------------------------------
# The launch
# --------------------------------------------------------------------------------------------------------------------------

POINTS = [
    {"batch": B, "tokens": T, "num_heads": Hkv * G, "num_kv_heads": Hkv, "head_dim": D, "capacity": S, "page_size": page_size}
    for B, T, (Hkv, G), D, S, page_size in itertools.product(
        (1, 3, 16, 64, 300), (1, 5, 16), ((8, 4), (2, 7), (1, 16)), (64, 96, 128), (64, 500, 4096, 131072), (None, 64, 128, 192)
    )
]


def test_launch_covers_the_work():
    for point in POINTS:
        launch = choose_launch(**point)
        pairs, rows = point["batch"] * point["num_kv_heads"], point["num_heads"] // point["num_kv_heads"] * point["tokens"]
        assert launch.programs >= pairs, "one item at least for each (sequence, KV head)"
        assert launch.items >= launch.programs
        assert launch.query_rows * launch.query_tiles >= rows
        assert launch.query_rows >= 16, "the least that tensor cores take"
        assert launch.min_rows % max(launch.chunk_rows, launch.block_rows) == 0
        assert launch.chunk_rows % launch.block_rows == 0
        assert point["page_size"] is None or point["page_size"] % launch.block_rows == 0, "a block is never in two pages"
        assert launch.block_rows // launch.row_groups >= 16, "the least that tensor cores take as the inner dimension"
        assert launch.row_groups in (1, launch.warps)


def test_launch_follows_the_capacity():
    point = {"batch": 1, "tokens": 1, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
    programs = [choose_launch(**point, capacity=S).programs for S in (128, 1024, 4096, 16384, 131072)]
    assert programs[0] == 8, "no split where there is nothing to split"
    assert programs == sorted(programs)
    assert programs[-1] >= 132, "a long cache uses every multiprocessor"


def test_rings_fit():
    """Into shared memory and registers, for every batch and capacity; clusters of a size that can be launched."""
    batches, heads, capacities = (1, 2, 3, 4, 8, 12, 16, 24, 64, 300), (1, 2, 4, 8), (64, 1000, 8192, 2**20)
    for B, T, Hkv, D, S in itertools.product(batches, (1, 4), heads, (64, 128), capacities):
        ring = choose_flash_ring(batch=B, tokens=T, num_kv_heads=Hkv, head_dim=D, capacity=S)
        if ring is None:
            assert B * T == 1 or B * Hkv > 264
            continue
        assert 4 * ring.stages * ring.block_rows * D <= 200 * 1024
        assert ring.block_rows >= 16 * ring.warps, "the least that tensor cores take"
        assert ring.block_rows <= 256, "the most rows that TMA takes"
        assert ring.programs in (2, 4, 8, 16) if ring.cluster else ring.programs >= B * Hkv
        spare = ring.programs - B * Hkv
        assert ring.cluster or S <= 4096 or spare >= min(132, B * Hkv), "a long one among short ones can be split"
        assert not ring.cluster or ring.warps == 4


def test_carveout():
    """A percent beyond a size that a multiprocessor can have, which the driver takes for the next one."""
    assert carveout_percent(0, 1) == 4, "beyond 8 of 228 KiB"
    assert carveout_percent(103 * 1024, 1) == 58, "beyond 132"
    assert carveout_percent(103 * 1024, 2) == 100
    assert carveout_percent(227 * 1024, 1) == 100
    assert carveout_percent(34 * 1024, 4) == 72, "beyond 164"
    assert carveout_percent(34 * 1024, 16) == 100, "not all at once"


def test_launch_with_fixed_splits_ignores_the_batch():
    def numeric(launch):  # what a sequence's numbers depend on
        return replace(launch, programs=0, items=0)

    for point in POINTS:
        fixed = [choose_launch(**(point | {"batch": B}), split_size=512) for B in (1, 8, 100)]
        assert numeric(fixed[0]) == numeric(fixed[1]) == numeric(fixed[2])


# --------------------------------------------------------------------------------------------------------------------------
# The operator
# --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [32, 64, 80])
def test_reference_path(head_dim):
    """float32, and head sizes without a kernel."""
    dtype = torch.float32 if head_dim == 64 else torch.bfloat16
    case = Case([40, 0, 3], tokens=2, head_dim=head_dim, dtype=dtype, page_size=64)
    assert torch.equal(case.run(), flash_decode_ref(**case.tensors, **case.options))


def test_opcheck_and_compile():
    case = Case([150, 1, 0], tokens=2, page_size=192)
    t = case.tensors
    args = (*t.values(), case.options["scale"], None, None, None, None, True)
    opcheck(torch.ops.rooflama.flash_decode, args)

    @torch.compile(fullgraph=True)
    def step(q, k_cache, v_cache, lengths, table):
        return flash_decode(q * 2, k_cache, v_cache, lengths, table, scale=0.1).flatten(2) + 1

    expected = flash_decode(t["q"] * 2, *list(t.values())[1:], scale=0.1).flatten(2) + 1
    assert torch.equal(step(**t), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.tensor([1])}, "int32"),
        ({"lengths": torch.tensor([1, 2], dtype=torch.int32)}, "lengths"),
        ({"table": torch.zeros(2, 1, dtype=torch.int32)}, "table"),
        ({"q": torch.zeros(1, 1, 7, 64, dtype=torch.bfloat16)}, "multiple of Hkv"),
        ({"k_cache": torch.zeros(3, 2, 64, 32, dtype=torch.bfloat16)}, "caches"),
        ({"table": torch.zeros(1, 2, dtype=torch.int32)}, "multiple of 64"),
        ({"k_scale": torch.ones(2)}, "both or neither"),
        ({"k_scale": torch.ones(3), "v_scale": torch.ones(3)}, "scales"),
        ({"window": 0}, "window"),
        ({"split_size": 100}, "split_size"),
        ({"q": torch.zeros(1, 1, 64, 8, dtype=torch.bfloat16).transpose(2, 3)}, "contiguous"),
    ],
)
def test_bad_input(change, message):
    case = Case([3], page_size=100)
    with pytest.raises(ValueError, match=message):
        flash_decode(**(case.tensors | case.options | change))


# --------------------------------------------------------------------------------------------------------------------------
# On a GPU
# --------------------------------------------------------------------------------------------------------------------------


def gpu_case(i):
    """One of 60: every head size, group, number of tokens and dtype, with lengths, pages and windows in turn."""
    shapes = list(itertools.product((64, 96, 128), (1, 4, 5, 8, 16), (1, 3, 16, 1)))
    D, G, T = shapes[i]
    lengths = [[4093], [17, 0, 2048, 1, 777], [300] * 40, [9000, 5]][i % 4]
    capacity = -(-max(lengths) // 192) * 192
    return Case(
        lengths,
        tokens=T,
        num_heads=4 * G,
        num_kv_heads=4,
        head_dim=D,
        dtype=(torch.bfloat16, torch.float16)[i % 2],
        sharpness=(0.05, 1, 10)[i % 3],
        window=(None, None, 500)[i % 3],
        cache_dtype=torch.float8_e4m3fn if i % 5 == 4 else None,
        pages=capacity // 192 if i % 3 == 0 else 1,
        page_size=192 if i % 3 == 0 else capacity,
    )


def check_twice(case):
    out = case.run()
    case.check(out)
    with pdl_disabled():
        assert torch.equal(case.run(), out), "early launches change nothing"


RINGS = {  # blocks of so many times 8 KiB of K, and the rest of a FlashRing
    "cluster of 8": (2, {"stages": 3, "warps": 4, "programs": 8, "cluster": True}),
    "cluster of 16": (2, {"stages": 3, "warps": 4, "programs": 16, "cluster": True}),
    "cluster of 4": (2, {"stages": 2, "warps": 4, "programs": 4, "cluster": True}),
    "cluster of 2": (2, {"stages": 6, "warps": 4, "programs": 2, "cluster": True}),
    "one each": (2, {"stages": 3, "warps": 4, "programs": 1}),
    "a program a multiprocessor": (2, {"stages": 6, "warps": 4, "programs": 132, "late": True}),
    "eight warps": (4, {"stages": 3, "warps": 8, "programs": 37}),
    "two warps": (1, {"stages": 2, "warps": 2, "programs": 400}),
}
RING_LENGTHS = [[1], [64], [129, 0], [700, 3, 0, 64], [4097], [1000, 63, 9001], [i % 40 for i in range(50)] + [2000] + [3] * 20]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
class TestOnGpu:
    @pytest.mark.parametrize("i", range(0, 60, 4), ids=lambda i: f"{i}-{i + 3}")
    def test_grid(self, i):
        for case in map(gpu_case, range(i, i + 4)):
            check_twice(case)
            with override_launch(ring=None):
                check_twice(case)
        case.check(case.run(split_size=128))
        assert not any(w.any() for w in _workspaces.values())

    @pytest.mark.skipif(not (torch.cuda.is_available() and wgmma_device(0)), reason="needs a Hopper GPU")
    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize("name", RINGS)
    def test_rings(self, name, head_dim):
        blocks, fields = RINGS[name]
        ring = FlashRing(block_rows=blocks * 8192 // head_dim // 2, **fields)
        shapes = [(4, 1, None), (4, 4, 300), (7, 1, None), (1, 1, 100), (2, 3, None)]
        for i, lengths in enumerate(RING_LENGTHS):
            B = len(lengths)
            for G, T, window in (shapes[i % 5], shapes[(i + 3) % 5]):
                Hkv = 1 if B > 4 else 8 if i % 2 else 2
                case = Case(
                    lengths,
                    tokens=T,
                    num_heads=Hkv * G,
                    num_kv_heads=Hkv,
                    head_dim=head_dim,
                    dtype=(torch.bfloat16, torch.float16)[i % 2],
                    sharpness=(0.05, 1, 10)[i % 3],
                    window=window,
                    page_size=max(lengths) + 3,
                )
                with override_launch(ring=ring):
                    check_twice(case)
                    if window is None:
                        assert torch.equal(case.run(permute=True), permute_columns(case.run()))
        assert not any(w.any() for w in _workspaces.values()), "the last program of a merge resets its counter"

    def test_cuda_graph_follows_the_lengths(self):
        case = Case([4000, 900, 1], page_size=4096)
        case.run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = [case.run() for _ in range(3)]
        for lengths in ([4000, 900, 1], [0, 4000, 511], [1, 2, 3], [3999, 3000, 129]):
            case.tensors["lengths"].copy_(torch.tensor(lengths))
            for tensor in (case.tensors["k_cache"], case.tensors["v_cache"]):
                tensor.nan_to_num_(0.5)
            graph.replay()
            for out in outs:
                case.check(out)
                assert torch.equal(out, case.run())

    def test_offsets_past_32_bits(self):
        pages = 2**31 // (2 * 8192 * 128) + 2
        k_cache, v_cache = torch.empty(2, pages, 2, 8192, 128, dtype=torch.bfloat16, device="cuda")
        case = Case([700], head_dim=128, page_size=8192)
        page = case.tensors["table"].item()
        k_cache[-1], v_cache[-1] = case.tensors["k_cache"][page], case.tensors["v_cache"][page]
        table = torch.full((1, 1), pages - 1, dtype=torch.int32, device="cuda")
        moved = case.tensors | {"k_cache": k_cache, "v_cache": v_cache, "table": table}
        assert torch.equal(flash_decode(**moved, **case.options), case.run())

    def test_repeats_are_bitwise_equal(self):
        """A race in the merge would show as a result that changes."""
        case = Case([3000, 4093, 700], head_dim=128, page_size=4096)
        first = case.run()
        for _ in range(500):
            assert torch.equal(case.run(), first)
