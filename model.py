"""The model: what a Llama-shaped transformer is, in reading order.

Owns the configuration, RoPE and the layers. Knows nothing of checkpoints, quantisers or sampling.
Runs Llama 2, 3, 3.1, 3.2, 3.3, Mistral 7B, Qwen2.5 and Qwen3 (dense): they differ by switches on `ModelConfig`.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch

# ---------------------------------------------------------------- configuration

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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
        """From a config.json of transformers, old style or version 5. ValueError names `source`, the field and what was found."""
        return _parse_config(hf, source)

    def to_dict(self) -> dict:
        """The inverse of `from_dict`, in transformers-5 style."""
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
        raise ValueError(f"{source}: {field}: found {found!r}, expected {expected}")

    def number(field, kind=int, default=None, low=1):
        value = hf.get(field)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != kind(value) or value < low:
            fail(field, value, f"{'an integer' if kind is int else 'a number'} of at least {low}")
        return kind(value)

    def flag(field, default=False):
        value = hf.get(field, default)
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
    head_dim = number("head_dim", default=hidden_size // num_heads)
    if head_dim % 2:
        fail("head_dim", head_dim, "an even number")
    num_layers, vocab_size = number("num_hidden_layers"), number("vocab_size")
    max_positions = number("max_position_embeddings")

    dtype_name = str(hf.get("dtype") or hf.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if dtype_name not in DTYPES:
        fail("dtype", dtype_name, f"one of {', '.join(DTYPES)}")
    eos = hf.get("eos_token_id")
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in eos):
        fail("eos_token_id", eos, "an integer or a list of integers")

    theta, scaling = _parse_rope(hf, model_type, vocab_size, max_positions, fail)
    window, layers = _parse_window(hf, model_type, num_layers, number, flag, fail)
    return ModelConfig(
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
        bos_token_id=hf.get("bos_token_id"),
        eos_token_ids=tuple(eos),
        dtype=DTYPES[dtype_name],
    )


def _parse_rope(hf, model_type, vocab_size, max_positions, fail) -> tuple[float, RopeScaling | None]:
    """rope_theta and its scaling, from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling`."""
    name = "rope_parameters" if hf.get("rope_parameters") is not None else "rope_scaling"
    rope = hf.get(name) or {}
    if not isinstance(rope, dict):
        fail(name, rope, "an object")
    theta = rope.get("rope_theta", hf.get("rope_theta"))
    if theta is None and model_type == "llama" and vocab_size == 32000:
        theta = 10000.0  # Llama 2's config.json may predate the key
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < theta < math.inf:
        fail("rope_theta", theta, "a positive number (it is never guessed)")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind not in ("linear", "llama3", "yarn"):
        fail(f"{name}.rope_type", kind, "one of default, linear, llama3, yarn")

    def number(field, default=None):
        value = rope.get(field)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            fail(f"{name}.{field}", value, "a positive number")
        return value

    if kind == "yarn" and any(rope.get(k) is not None for k in ("mscale", "mscale_all_dim")):
        fail(f"{name}.mscale", rope.get("mscale"), "no such field (DeepSeek's variant of YaRN is not supported)")
    original = None if kind == "linear" else int(number("original_max_position_embeddings", max_positions if kind == "yarn" else None))
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
        if not isinstance(types, list) or len(types) != num_layers or set(types) - {"full_attention", "sliding_attention"}:
            fail("layer_types", types, f"{num_layers} of full_attention, sliding_attention")
        return window, tuple(t == "sliding_attention" for t in types)
    if model_type == "mistral":
        return window, (True,) * num_layers
    if model_type.startswith("qwen"):
        first = number("max_window_layers", low=0)
        return window, tuple(i >= first for i in range(num_layers))
    return None, ()  # llama has no such field


def _shape(model_type, vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, theta, context, tied=False, eps=1e-5, **more):
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
