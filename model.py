"""The model: what a Llama-shaped transformer is, in reading order.

Owns the configuration, RoPE and the layers. Knows nothing of checkpoints, quantisers or sampling.
Runs Llama 2, 3, 3.1, 3.2, 3.3, Mistral 7B, Qwen2.5 and Qwen3 (dense): they differ by switches on `ModelConfig`.
"""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import kernels
import kv_cache
from kernels.formats import PackedFormat, Weight, saturated
from kv_cache import KVCache

WORLD_SIZE = 1  # devices that share one model's weights

# ---------------------------------------------------------------- configuration

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
MAX_LAYERS = 10_000  # a hostile config must not make us list more
MAX_INTEGER = 2**31 - 1
MAX_NUMBER = 1e30  # of a real parameter: beyond any use, and float32 holds it
MAX_ROPE_BYTES = 2**29  # of cos and sin: a context of 2**20 at head size 128
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ACTIVATION_DTYPES = ("auto", "fp8")  # of x in a prompt's products; auto: the model's


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE's frequencies are stretched beyond the trained context (transformers' modeling_rope_utils names)."""

    type: str  # linear, llama3 or yarn
    factor: float
    original_max_position_embeddings: int | None = None  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: scales cos and sin; None = 0.1 ln(factor) + 1


@dataclass(frozen=True)
class ModelConfig:
    """One model's architecture, as its config.json gives it."""

    model_type: str  # one of MODEL_TYPES
    vocab_size: int  # rows of the embedding and the head, padding included
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int  # query heads
    num_kv_heads: int  # divides num_heads
    head_dim: int  # num_heads * head_dim need not equal hidden_size
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int  # the context
    tie_word_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each query and key head, before RoPE (Qwen3)
    sliding_window: int | None = None  # a token sees this many, itself included, in the layers below
    sliding_layers: tuple[bool, ...] = ()  # one a layer; empty = none
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    layer_format: PackedFormat | None = None  # of the layers' linear weights; None = plain, in dtype
    head_format: PackedFormat | None = None  # of the head's own weight (it has one where embeddings are not tied)

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def layer_window(self, layer: int) -> int | None:
        """The sliding window of one layer, or None where it sees the whole context."""
        return self.sliding_window if self.sliding_layers and self.sliding_layers[layer] else None

    @classmethod
    def from_dict(cls, hf: dict, source: str = "config.json") -> "ModelConfig":
        """From a config.json of transformers, old style or version 5. ValueError names the field and what was found."""
        return _parse_config(hf, source)

    def to_dict(self) -> dict:
        """The inverse of `from_dict`, in transformers-5 style, but for weight formats, which checkpoint.py writes."""
        rope = {"rope_theta": self.rope_theta, "rope_type": "default"}
        if self.rope_scaling:
            fields = {k: v for k, v in dataclasses.asdict(self.rope_scaling).items() if v is not None}
            rope.update(rope_type=fields.pop("type"), **fields)
        out = {
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "rope_parameters": rope,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "dtype": str(self.dtype).removeprefix("torch."),
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids),
        }
        if any(self.sliding_layers):
            out["sliding_window"] = self.sliding_window
            out["layer_types"] = ["sliding_attention" if s else "full_attention" for s in self.sliding_layers]
            if self.model_type.startswith("qwen"):
                out["use_sliding_window"] = True
        return out


def _parse_config(hf: dict, source: str) -> ModelConfig:
    def fail(field, found, expected):
        raise ValueError(f"{source}: {field}: found {found!r:.200}, expected {expected}")

    def number(field, kind=int, default=None, low=1, high=MAX_INTEGER):
        value = hf.get(field)
        value = default if value is None else value
        real = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
        if not real or value != kind(value):
            fail(field, value, f"{'an integer' if kind is int else 'a number'} from {low} to {high}")
        return kind(value)

    def ids(field):
        value = hf.get(field)
        value = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and 0 <= i <= MAX_INTEGER for i in value):
            fail(field, hf[field], "a token id or a list of them")
        return tuple(value)

    def flag(field, default=False):
        value = default if hf.get(field) is None else hf[field]
        if not isinstance(value, bool):
            fail(field, value, "true or false")
        return value

    if not isinstance(hf, dict):
        fail("the file", type(hf).__name__, "a JSON object")
    model_type = hf.get("model_type")
    if model_type not in MODEL_TYPES:
        fail("model_type", model_type, f"one of {', '.join(MODEL_TYPES)}")
    if hf.get("hidden_act", "silu") != "silu":
        fail("hidden_act", hf["hidden_act"], "'silu'")
    for field in ("attention_bias", "mlp_bias"):
        if flag(field):
            fail(field, True, "false (biases are supported on Qwen2's q, k and v only)")
    if hf.get("partial_rotary_factor", 1.0) != 1.0:
        fail("partial_rotary_factor", hf["partial_rotary_factor"], "1.0")

    hidden_size, num_heads = number("hidden_size"), number("num_attention_heads")
    num_kv_heads = number("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        fail("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads, {num_heads}")
    if hf.get("head_dim") is None and hidden_size % num_heads:
        fail("hidden_size", hidden_size, f"a multiple of num_attention_heads, {num_heads}, or an explicit head_dim")
    head_dim = number("head_dim", default=hidden_size // num_heads, high=2**16)
    if head_dim % 2:
        fail("head_dim", head_dim, "an even number")
    num_layers, vocab_size = number("num_hidden_layers", high=MAX_LAYERS), number("vocab_size")
    max_positions = number("max_position_embeddings")

    dtype_name = str(hf.get("dtype") or hf.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if dtype_name not in DTYPES:
        fail("dtype", dtype_name, f"one of {', '.join(DTYPES)}")
    theta, scaling = _parse_rope(hf, model_type, vocab_size, max_positions, fail)
    window, layers = _parse_window(hf, model_type, num_layers, number, flag, fail)
    config = ModelConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=number("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=number("rms_norm_eps", float, low=0.0),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=max_positions,
        tie_word_embeddings=flag("tie_word_embeddings"),
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
        sliding_window=window,
        sliding_layers=layers,
        bos_token_id=next(iter(ids("bos_token_id")), None),
        eos_token_ids=ids("eos_token_id"),
        dtype=DTYPES[dtype_name],
    )
    try:
        is_finite = all(table.isfinite().all() for table in rope_tables(config, 2, "cpu"))
    except (ArithmeticError, ValueError):
        is_finite = False
    if not is_finite:
        fail("rope_parameters", {"rope_theta": theta, "scaling": scaling}, "numbers that give finite angles")
    return config


def _parse_rope(hf, model_type, vocab_size, max_positions, fail) -> tuple[float, RopeScaling | None]:
    """rope_theta and its scaling, from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling`."""
    name = "rope_parameters" if hf.get("rope_parameters") is not None else "rope_scaling"
    rope = hf.get(name) or {}
    if not isinstance(rope, dict):
        fail(name, rope, "an object")
    theta = rope.get("rope_theta", hf.get("rope_theta"))
    if theta is None and model_type == "llama" and vocab_size == 32000:
        theta = 10000.0  # Llama 2's config.json may predate the key
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < theta <= MAX_NUMBER:
        fail("rope_theta", theta, "a positive number (it is never guessed)")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind not in ("linear", "llama3", "yarn"):
        fail(f"{name}.rope_type", kind, "one of default, linear, llama3, yarn")

    def number(field, default=None):
        value = rope.get(field)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MAX_NUMBER:
            fail(f"{name}.{field}", value, "a positive number")
        return value

    if kind == "yarn" and any(rope.get(k) is not None for k in ("mscale", "mscale_all_dim")):
        fail(f"{name}.mscale", rope.get("mscale"), "no such field (DeepSeek's variant of YaRN is not supported)")
    if kind == "yarn" and rope.get("truncate", True) is not True:
        fail(f"{name}.truncate", rope["truncate"], "true")
    original = (
        None if kind == "linear" else int(number("original_max_position_embeddings", max_positions if kind == "yarn" else None))
    )
    scaling = {"type": kind, "factor": float(number("factor")), "original_max_position_embeddings": original}
    if kind == "llama3":
        scaling |= {f: float(number(f)) for f in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        scaling |= {"beta_fast": float(number("beta_fast", 32.0)), "beta_slow": float(number("beta_slow", 1.0))}
        if rope.get("attention_factor") is not None:
            scaling["attention_factor"] = float(number("attention_factor"))
    return float(theta), RopeScaling(**scaling)


def _parse_window(hf, model_type, num_layers, number, flag, fail) -> tuple[int | None, tuple[bool, ...]]:
    """The sliding window and which layers have it: `layer_types`, else Mistral: all, Qwen: from max_window_layers on."""
    if hf.get("sliding_window") is None or (model_type.startswith("qwen") and not flag("use_sliding_window")):
        return None, ()
    window = number("sliding_window")
    types = hf.get("layer_types")
    if types is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != num_layers or any(t not in known for t in types):
            fail("layer_types", types, f"{num_layers} of {', '.join(known)}")
        return window, tuple(t == "sliding_attention" for t in types)
    if model_type == "mistral":
        return window, (True,) * num_layers
    if model_type.startswith("qwen"):
        first = number("max_window_layers", low=0)
        return window, tuple(i >= first for i in range(num_layers))
    return None, ()  # llama has no such field


def _shape(
    model_type, vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, theta, context, tied=False, eps=1e-5, **more
):
    rope3 = RopeScaling("llama3", more.pop("llama3"), 8192) if "llama3" in more else None
    return ModelConfig(
        model_type, vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, eps, theta, rope3, context, tied, **more
    )  # fmt: skip


SHAPES = {  # the shapes that --random_weights makes, from the models' public config.json
    "llama-3.2-1b": _shape("llama", 128256, 2048, 8192, 16, 32, 8, 64, 5e5, 131072, True, llama3=32.0),
    "llama-3.2-3b": _shape("llama", 128256, 3072, 8192, 28, 24, 8, 128, 5e5, 131072, True, llama3=32.0),
    "llama-3.1-8b": _shape("llama", 128256, 4096, 14336, 32, 32, 8, 128, 5e5, 131072, llama3=8.0),
    "llama-3.1-70b": _shape("llama", 128256, 8192, 28672, 80, 64, 8, 128, 5e5, 131072, llama3=8.0),
    "qwen2.5-7b": _shape("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, 1e6, 32768, eps=1e-6, qkv_bias=True),
    "qwen3-8b": _shape("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, 1e6, 40960, eps=1e-6, qk_norm=True),
    "mistral-7b": _shape("mistral", 32768, 4096, 14336, 32, 32, 8, 128, 1e6, 32768),
}

# ---------------------------------------------------------------- RoPE


def rope_tables(config: ModelConfig, length: int, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, D/2] float32, scalings applied (the formulas of transformers' modeling_rope_utils)."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    inv_freq = 1.0 / config.rope_theta**half
    amplitude = 1.0
    if scaling := config.rope_scaling:
        if scaling.type == "linear":
            inv_freq = inv_freq / scaling.factor
        elif scaling.type == "llama3":
            inv_freq = _llama3_frequencies(inv_freq, scaling)
        else:
            inv_freq = _yarn_frequencies(inv_freq, scaling, config)
            amplitude = scaling.attention_factor or 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * inv_freq.to(device)
    return angles.cos() * amplitude, angles.sin() * amplitude


def _llama3_frequencies(inv_freq: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / inv_freq
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    context = scaling.original_max_position_embeddings
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq
    scaled = torch.where(wavelength > context / low, inv_freq / scaling.factor, between)
    return torch.where(wavelength < context / high, inv_freq, scaled)


def _yarn_frequencies(inv_freq: torch.Tensor, scaling: RopeScaling, config: ModelConfig) -> torch.Tensor:
    """YaRN (arXiv:2309.00071): frequencies that turn fewer than beta_slow times in the trained context are stretched, those
    that turn more than beta_fast times kept, with a linear ramp between."""
    dim, base, context = config.head_dim, config.rope_theta, scaling.original_max_position_embeddings

    def dimension_of(rotations):
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension_of(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension_of(scaling.beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return inv_freq / scaling.factor * ramp + inv_freq * (1 - ramp)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates x [N, heads, D] by cos, sin [N, D/2]: element i turns with element i + D/2 (rotate-half)."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


# ---------------------------------------------------------------- operations on rows
# Few rows (a decode step): one fused kernel a linear layer. Many: cuBLAS, and a kernel between its products, or one kernel for
# gate/up and SiLU x up. 17 to 64 rows: what is faster for each layer. Of a prompt, with fp8 weights, where that is asked for
# (`kernels.rounding_activations`): x is rounded to fp8 as well. No GPU: plain PyTorch, for Inductor.
# Letters: N rows (tokens) of one forward, B sequences, T tokens of each (N = B * T), H hidden size, F intermediate size.
#
# An RMSNorm is no layer of its own here: it is done by the linear that reads it. So hidden states x travel with a `norm`: the
# gain [H], and the reader does all of it; or a FoldedNorm, where the linear that made x has multiplied the gain in and summed
# squares, which leaves the reader one factor a row. To do that, a linear must know who reads it next: its Reader. Before the
# first linear there is none: `first_norm`.

Norm = torch.Tensor | kernels.FoldedNorm


class Reader(NamedTuple):
    """The linear that reads the hidden states next, through an RMSNorm of this gain [H]."""

    gain: torch.Tensor
    weight: Weight
    op: str | None  # one of kernels.tiles.OPS; None where its kernel takes columns in order whatever the weight


def fused(x: torch.Tensor, *weights: Weight) -> bool:
    """True where the rows of x [N, H] go through the small-batch kernels: few of them, 16-bit, on a GPU, and weights in formats
    that the kernels read."""
    if any(map(kernels.takes_scaled, weights)) or not kernels.runs_kernels(x):
        return False
    if x.shape[0] > kernels.MAX_ROWS or x.dtype == torch.float32 or x.shape[1] % 64:
        return False
    packed = any(weight.packed for weight in weights)  # cuBLAS would have them unpacked first
    ours = packed or kernels.is_batch_invariant() or all(kernels.beats_cublas(x, weight) for weight in weights)
    return ours and all(weight.in_kernels for weight in weights)


def many(x: torch.Tensor) -> bool:
    """True where cuBLAS may multiply the rows of x [N, K], with kernels between its products."""
    return kernels.runs_kernels(x) and x.shape[0] > kernels.PLAIN_ROWS


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension: statistics and product in float32, one rounding to x's dtype."""
    if kernels.runs_kernels(x):
        return kernels.rms_norm(x, weight, eps)
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def linear(
    x, weight, norm: Norm | None = None, eps=0.0, activation="none", residual=None, x_permuted=False, y_permuted=False,
    y_rounded=False,
) -> torch.Tensor | kernels.QuantizedRows:  # fmt: skip
    """x [N, K] -> [N, out]: RMSNorm (if `norm`; a FoldedNorm only where `fused`), product, bias, SiLU x up (if activation is
    "silu_mul"), plus residual. x_permuted, y_permuted: the order of columns, as kernels.linear has it; only where `fused`.

    x may be in fp8 already: what a linear before it gave that was told so by `y_rounded` (only where `takes_scaled`).
    `residual`, of many rows, may be overwritten with the result.
    """
    if kernels.takes_scaled(weight):
        options = {"activation": activation, "residual": residual, "y_rounded": y_rounded}
        return kernels.scaled_linear(x, weight, norm=norm, eps=eps, **options)
    if fused(x, weight):
        options = {"activation": activation, "residual": residual, "x_permuted": x_permuted, "y_permuted": y_permuted}
        return kernels.linear(x, weight, norm=norm, eps=eps, **options)
    assert not x_permuted, "columns out of order, for a product that takes them in order"
    assert not y_permuted, "columns in order, for one that takes them out of order"
    if norm is not None:
        x = rms_norm(x, norm, eps)
    if residual is not None and many(x) and weight.bias is None:  # the sum is the product's epilogue
        return residual.addmm_(x, weight.dequantized().T)
    if activation == "silu_mul" and residual is None and kernels.takes_gate_up(x, weight):
        return kernels.gate_up(x, weight.weight)
    y = F.linear(x, weight.dequantized(), weight.bias)
    if activation == "silu_mul":
        if kernels.runs_kernels(x):
            return kernels.silu_mul(y)
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if residual is None else residual + y


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """Where the partial sums of sharded weights will meet, before the residual is added. One device: nothing to do."""
    return x


# ---------------------------------------------------------------- steps: which rows a forward works on


class DecodeStep:
    """T new tokens for each of the cache's B sequences; everything is read from the cache's buffers on the device."""

    def __init__(self, cache: KVCache, tokens_each: int = 1, rows: int | None = None):
        self.cache, self.tokens_each = cache, tokens_each  # tokens_each: T
        self.lengths, self.table = cache.lengths[:rows], cache.table[:rows]  # rows: only the first so many sequences
        self._place = None

    def place(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Position and cache slot of each row, int32 [B * T] both; the position is negative where a sequence is absent."""
        if self._place is None:
            t = torch.arange(self.tokens_each, dtype=torch.int32, device=self.lengths.device) - self.tokens_each
            position = (self.lengths[:, None] + t).flatten()
            slot = self.table[:, 0].repeat_interleave(self.tokens_each, output_size=len(position))
            self._place = position, slot
        return self._place

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v [N, Hkv, D] into the cache; nothing where a sequence is absent."""
        position, slot = self.place()
        kernels.append_ref(self.cache.layer(layer), (k, v), slot, position.clamp(min=0), position)

    def attend(self, layer: int, q, k, v, window: int | None, scale: float, permute: bool = False) -> torch.Tensor:
        """q [N, Hq, D] over each sequence's cached rows -> [N, Hq, D]; the new rows' k and v are among them."""
        k, v = self.cache.layer(layer)
        q = q.view(-1, self.tokens_each, *q.shape[1:])
        options = {"scale": scale, "window": window, "split_size": self.cache.split_size, "permute": permute}
        return kernels.flash_decode(q, k, v, self.lengths, self.table, **options).flatten(0, 1)


class PackStep:
    """Pieces of P prompts, packed: the rows of a forward are one piece's tokens, then the next's, without padding between.

    slot, start [P] int32: the cache slot that a piece goes to, and the position of its first token; offsets [P + 1] int32: its
    first row, the next one's being its end. Rows behind the last piece are computed and go nowhere. longest: the tokens of a
    piece, or more. fresh: every start is 0, there are no older rows to attend to. last [P] int32: the row of each piece's last
    token; padding pieces repeat the pack's last row, and what comes of it is dropped.
    """

    def __init__(self, cache: KVCache, slot, start, offsets, *, num_rows: int, longest: int, fresh: bool):
        self.cache, self.longest, self.offsets = cache, longest, offsets
        row = torch.arange(num_rows, dtype=torch.int32, device=offsets.device)
        piece = (torch.searchsorted(offsets, row, right=True, out_int32=True) - 1).clamp(max=len(start) - 1)
        position = torch.where(row < offsets[-1], row - offsets[piece] + start[piece], -1)
        self._place = position, slot[piece]
        self.fresh, self.last = fresh, offsets[1:] - 1
        self.k_first, self.k_lengths = offsets, start + offsets.diff()
        self.widened = slot if cache.k0.dtype.itemsize == 1 else None  # slots whose rows attention cannot read as they are
        if not fresh:  # where in kv_cache.as_rows a slot begins
            first = slot if self.widened is None else torch.arange(len(slot), dtype=torch.int32, device=slot.device)
            first = first * math.prod(cache.k0.shape[1:3])
            self.k_first = torch.cat([first, first[:1]])

    @classmethod
    def of(cls, cache: KVCache, pieces: list[tuple[int, int, int]]) -> "PackStep":
        """From (slot, number of tokens, start) of each piece, on the host."""
        slots, counts, starts = zip(*pieces, strict=True)
        parts = slots, starts, [0, *itertools.accumulate(counts)]
        slot, start, offsets = (torch.tensor(p, dtype=torch.int32, device=cache.lengths.device) for p in parts)
        return cls(cache, slot, start, offsets, num_rows=sum(counts), longest=max(counts), fresh=not any(starts))

    def place(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Position and cache slot of each row, int32 [N] both; the position is -1 where a row is padding."""
        return self._place

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v [N, Hkv, D] into the cache. Without padding: the kernels' `rope_append` takes that."""
        position, slot = self.place()
        for cached, new in zip(self.cache.layer(layer), (k, v), strict=True):
            cached[slot, :, position] = saturated(new, cached.dtype)

    def attend(self, layer: int, q, k, v, window: int | None, scale: float, last_only: bool = False) -> torch.Tensor:
        """q [N, Hq, D] -> [N, Hq, D]; k and v [N, Hkv, D] are the new rows'. last_only: q is of the rows `last`, [P, Hq, D]."""
        if not self.fresh:
            k, v = self.cache.layer(layer)
            if self.widened is not None:
                k, v = k[self.widened].to(q.dtype), v[self.widened].to(q.dtype)
            k, v = kv_cache.as_rows(k), kv_cache.as_rows(v)
        if last_only:  # a query each, over the same keys
            ends, longest = torch.arange(len(self.offsets), dtype=torch.int32, device=q.device), 1
        else:
            ends, longest = self.offsets, self.longest
        lengths = None if self.fresh and not last_only else self.k_lengths
        return kernels.flash_prefill(q, k, v, ends, self.k_first, lengths, longest=longest, scale=scale, window=window)


@dataclass(frozen=True)
class PrefillStep:
    """A whole text in one forward, without a cache: what calibration and evaluation run."""

    num_tokens: int

    def place(self) -> tuple[slice, None]:
        """The positions, and no slot."""
        return slice(0, self.num_tokens), None

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Nothing to keep."""

    def attend(self, layer: int, q, k, v, window: int | None, scale: float) -> torch.Tensor:
        """q [N, Hq, D], k and v [N, Hkv, D] -> [N, Hq, D]."""
        ends = torch.arange(0, 2 * self.num_tokens, self.num_tokens, dtype=torch.int32, device=q.device)
        return kernels.flash_prefill(q, k, v, ends, ends, longest=self.num_tokens, scale=scale, window=window)


Step = DecodeStep | PackStep | PrefillStep

# ---------------------------------------------------------------- the transformer


class Attention(nn.Module):
    """Grouped-query attention: q, k and v from one product, RoPE, the cache, the output projection."""

    def __init__(self, config: ModelConfig, layer: int, **where):
        super().__init__()
        self.config, self.layer = config, layer
        self.window, self.scale = config.layer_window(layer), config.head_dim**-0.5
        qkv_size, linear = config.q_size + 2 * config.kv_size, where | {"packed": config.layer_format}
        self.wqkv = Weight(qkv_size, config.hidden_size, bias=config.qkv_bias, **linear)
        self.wo = Weight(config.hidden_size, config.q_size, **linear)
        self.q_norm = Scale(config.head_dim, **where) if config.qk_norm else None
        self.k_norm = Scale(config.head_dim, **where) if config.qk_norm else None

    def forward(
        self, x: torch.Tensor, norm: Norm, rope, step: Step, reader: Reader, last_only: bool = False
    ) -> tuple[torch.Tensor, Norm]:
        """x [N, H] -> x + attention(norm(x)) [N, H], and its reader's norm. last_only: of the rows step.last alone, [P, H] for
        P pieces; k and v of all rows still go to the cache."""
        c = self.config
        if fused(x, self.wqkv) and isinstance(step, DecodeStep):  # a few rows: all of it in one kernel, k and v to the cache
            k_cache, v_cache = step.cache.layer(self.layer)
            q = kernels.qkv_rope_append(
                x, self.wqkv, norm=norm, eps=c.norm_eps, qk_eps=c.norm_eps,
                q_norm=self.q_norm and self.q_norm.weight, k_norm=self.k_norm and self.k_norm.weight,
                cos=rope[0], sin=rope[1], lengths=step.lengths, table=step.table, k_cache=k_cache, v_cache=v_cache,
                page_size=k_cache.shape[2], num_heads=c.num_heads, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim,
            )  # fmt: skip
            k = v = None
        elif kernels.runs_kernels(x) and not isinstance(step, PrefillStep):  # many rows, or a prompt's: one more kernel
            qkv = linear(x, self.wqkv, norm=norm, eps=c.norm_eps)
            (position, slot), (k_cache, v_cache) = step.place(), step.cache.layer(self.layer)
            q, k = kernels.rope_append(
                qkv, cos=rope[0], sin=rope[1], position=position, slot=slot, k_cache=k_cache, v_cache=v_cache,
                q_norm=self.q_norm and self.q_norm.weight, k_norm=self.k_norm and self.k_norm.weight, eps=c.norm_eps,
                num_heads=c.num_heads,
            )  # fmt: skip
            v = qkv[:, c.q_size + c.kv_size :].unflatten(1, (-1, c.head_dim))
        else:  # plain PyTorch: on a CPU, or a text without a cache
            q, k, v = self._project(x, norm, rope, step.place()[0])
            step.append(self.layer, k, v)
        permutes = isinstance(step, DecodeStep) and c.head_dim % 32 == 0 and kernels.reads_permuted("linear", q, self.wo)
        options = {"permute": True} if permutes else {}
        if last_only:
            x, q, options = x[step.last], q[step.last], {"last_only": True}
        attended = step.attend(self.layer, q, k, v, self.window, self.scale, **options)
        return add_projection(x, attended.flatten(1), self.wo, reader, x_permuted=permutes)

    def _project(self, x, norm, rope, positions):
        """q [N, Hq, D], k and v [N, Hkv, D] in plain PyTorch, normed and rotated."""
        c = self.config
        qkv = linear(x, self.wqkv, norm=norm, eps=c.norm_eps).unflatten(1, (-1, c.head_dim))
        q, k, v = qkv.split([c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
        if self.q_norm is not None:
            q, k = rms_norm(q, self.q_norm.weight, c.norm_eps), rms_norm(k, self.k_norm.weight, c.norm_eps)
        if not isinstance(positions, slice):
            positions = positions.clamp(min=0)
        cos, sin = rope[0][positions], rope[1][positions]
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x), gate and up fused into w13."""

    def __init__(self, config: ModelConfig, **where):
        super().__init__()
        self.eps = config.norm_eps
        self.w13 = Weight(2 * config.intermediate_size, config.hidden_size, packed=config.layer_format, **where)
        self.w2 = Weight(config.hidden_size, config.intermediate_size, packed=config.layer_format, **where)

    def forward(self, x: torch.Tensor, norm: Norm, reader: Reader) -> tuple[torch.Tensor, Norm]:
        """x [N, H] -> x + feed_forward(norm(x)) [N, H], and its reader's norm."""
        rounds = kernels.takes_scaled(self.w2)
        permuted = not (rounds or kernels.takes_scaled(self.w13)) and kernels.reads_permuted("linear", x, self.w2)
        order = {"y_permuted": permuted, "y_rounded": rounds}
        hidden = linear(x, self.w13, norm=norm, eps=self.eps, activation="silu_mul", **order)
        return add_projection(x, hidden, self.w2, reader, x_permuted=permuted)


def add_projection(residual, x, weight: Weight, reader: Reader, x_permuted: bool) -> tuple[torch.Tensor, Norm]:
    """residual + all_reduce(x @ weight.T), and its reader's norm. On one device the sum is the kernel's own epilogue, and so is
    the norm, where the reader's kernel would have to repeat it in every program."""
    if WORLD_SIZE > 1:
        return residual + all_reduce(linear(x, weight, x_permuted=x_permuted)), reader.gain
    folds = kernels.folds_norm(weight.packed, reader.weight.packed)
    if folds and fused(residual, reader.weight) and fused(x, weight):
        y_permuted = reader.op is not None and kernels.reads_permuted(reader.op, residual, reader.weight)
        order = {"x_permuted": x_permuted, "y_permuted": y_permuted}
        return kernels.linear_folding(x, weight, residual=residual, gain=reader.gain, **order)
    return linear(x, weight, residual=residual, x_permuted=x_permuted), reader.gain


def first_norm(x: torch.Tensor, reader: Reader, step: Step) -> Norm:
    """The norm of x [N, H] as it enters the layers: the gain, but where its reader goes through a ring of packed weights, which
    takes nothing but a FoldedNorm. 8B in fp8, 64 rows: that qkv took 40 us without a ring, the other layers' 17 each (H200; at
    up to 8 rows not measured)."""
    gain, weight, op = reader
    pays = isinstance(step, DecodeStep) and x.shape[0] > 8 and op is not None
    if pays and fused(x, weight) and kernels.folds_norm(weight.packed) and kernels.reads_permuted(op, x, weight):
        return kernels.fold_norm(x, gain, permuted=True)
    return gain


class Scale(nn.Module):
    """The gain of an RMSNorm."""

    def __init__(self, size: int, dtype=torch.bfloat16, device=None):
        super().__init__()
        self.register_buffer("weight", torch.empty(size, dtype=dtype, device=device))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, **where):
        super().__init__()
        self.attention_norm = Scale(config.hidden_size, **where)
        self.attention = Attention(config, layer, **where)
        self.ffn_norm = Scale(config.hidden_size, **where)
        self.feed_forward = FeedForward(config, **where)

    @property
    def reader(self) -> Reader:
        config = self.attention.config
        op = "qkv" if kernels.ring_serves_qkv(config.head_dim, config.qk_norm) else None
        return Reader(self.attention_norm.weight, self.attention.wqkv, op)

    def forward(self, x: torch.Tensor, rope, step: Step) -> torch.Tensor:
        """x [N, H] -> [N, H]: this layer alone, whoever reads it."""
        return self.run(x, self.reader.gain, rope, step, self.reader)[0]

    def run(
        self, x: torch.Tensor, norm: Norm, rope, step: Step, reader: Reader, last_only: bool = False
    ) -> tuple[torch.Tensor, Norm]:
        """x [N, H] and this layer's first norm -> x [N, H] (last_only: [P, H]), and its reader's norm."""
        ffn_reader = Reader(self.ffn_norm.weight, self.feed_forward.w13, "silu_mul")
        x, norm = self.attention(x, norm, rope, step, ffn_reader, last_only)
        return self.feed_forward(x, norm, reader)


class Transformer(nn.Module):
    """Embedding, layers, final norm and head. Tensors [N, H]: the rows of one step, whatever sequences they belong to."""

    def __init__(self, config: ModelConfig, device=None, dtype=None):
        super().__init__()
        where = {"device": device, "dtype": dtype or config.dtype}
        self.config = config
        self.tok_embeddings = Weight(config.vocab_size, config.hidden_size, **where)
        self.layers = nn.ModuleList(Layer(config, i, **where) for i in range(config.num_layers))
        self.norm = Scale(config.hidden_size, **where)
        if not config.tie_word_embeddings:
            self.output = Weight(config.vocab_size, config.hidden_size, packed=config.head_format, **where)
        self.vocab_limit = config.vocab_size  # ids from here on are padding: never sampled
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)

    @property
    def head(self) -> Weight:
        """The output projection [V, H]; the embedding itself where they are tied."""
        return self.tok_embeddings if self.config.tie_word_embeddings else self.output

    def tile_weights(self) -> None:
        """Puts packed weights into the order that the small-batch kernels read, where those run. Call before the first step."""
        if kernels.runs_kernels(self.norm.weight):
            for module in self.modules():
                if isinstance(module, Weight):
                    module.tile()

    def check_rounding(self) -> None:
        """ValueError: weights or a device whose products cannot round x to fp8."""
        if (found := self.layers[0].attention.wqkv.format) != "fp8":  # all linears of the layers have one format
            raise ValueError(f"activation_dtype: found fp8 with weights in {found}, expected fp8 weights (--quantize fp8)")
        device, dtype = self.norm.weight.device, self.norm.weight.dtype
        if not kernels.scaled_runs(device, dtype):
            found = f"{str(dtype).removeprefix('torch.')} on {device}"
            raise ValueError(f"activation_dtype: found fp8 with {found}, expected bfloat16 and a card with fp8 units")

    def setup_rope(self, length: int, spare: int = 0) -> None:
        """Builds the RoPE tables for positions below `length`, and `spare` more. Call once, before the first forward.
        ValueError: too many."""
        if length > (most := MAX_ROPE_BYTES // (self.config.head_dim * 4)):
            raise ValueError(f"max_seq_len: found {length}, expected at most {most} (RoPE tables of 0.5 GiB)")
        self.cos, self.sin = rope_tables(self.config, length + spare, self.norm.weight.device)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [N] -> [N, H]."""
        return F.embedding(tokens, self.tok_embeddings.weight)

    def forward(self, x: torch.Tensor, step: Step, last_only: bool = False) -> torch.Tensor:
        """x [N, H], embedded tokens (or any embeddings) -> hidden states [N, H] before the final norm.

        last_only, of a PackStep: of each piece's last token alone, [P, H]. Of the others the last layer makes k and v, no more.
        """
        return self.run(x, step, last_only)[0]

    def run(self, x: torch.Tensor, step: Step, last_only: bool = False) -> tuple[torch.Tensor, Norm]:
        """What `forward` gives, and the final norm, as `linear` takes it."""
        assert isinstance(step, PackStep) or not last_only, "pieces have a last token"
        x = x.clone() if many(x) else x  # products will be added to it in place
        readers = [*(layer.reader for layer in self.layers), Reader(self.norm.weight, self.head, "head")]
        norm = first_norm(x, readers[0], step)
        for layer, reader in zip(self.layers, readers[1:], strict=True):
            x, norm = layer.run(x, norm, (self.cos, self.sin), step, reader, last_only and layer is self.layers[-1])
        return x, norm

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states [N, H] -> logits [N, V] float32, -inf for padding rows of the vocabulary."""
        x, weight = rms_norm(x, self.norm.weight, self.config.norm_eps), self.head.dequantized()
        if x.is_cuda and x.dtype != torch.float32:
            logits = torch.mm(
                x, weight.T, out_dtype=torch.float32
            )  # bf16 logits would make ties that a greedy choice trips over
        else:
            logits = F.linear(x, weight).float()
        logits[:, self.vocab_limit :] = -math.inf
        return logits
