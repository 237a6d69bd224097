"""Weight formats: how a linear layer's weight is packed, and the `Weight` that carries it.

Owns packing and unpacking, on disk and in memory. Knows neither the model nor the kernels that read a format.
Letters: N rows (output features), K columns (input features), G groups of columns that share a scale.

    format            weight                          scale                     zero
    bf16 fp16 fp32    [N, K] in that dtype            -                         -
    int8              int8 [N, K]                     float32 [N, 1]            -
    fp8               float8_e4m3fn [N, K]            float32 [N, 1]            -
    int4              uint8 [N, K / 2], two codes     [N, G], any plain dtype   uint8 [N, G], or none where symmetric: 8

A weight is (code - zero) * scale, computed in float32 and rounded once to the model's dtype; int8 and fp8 have no zero. Our
quantisers leave int8's -128 out, converted checkpoints may have it. An int4 code is 0 to 15; a byte holds column 2i in its low
nibble and column 2i + 1 in its high one.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

PLAIN_FORMATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
KERNEL_FORMATS = frozenset(PLAIN_FORMATS.values())  # what the small-batch kernels read; others are dequantised for PyTorch
SCALE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
GROUP_SIZES = {"int8": (0,), "fp8": (0,), "int4": (32, 64, 128)}  # 0: a whole row shares a scale
CODE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}
LARGEST = {"int8": 127.0, "fp8": 448.0, "int4": 7.5}  # the code of a group's largest value, where symmetric


@dataclass(frozen=True)
class PackedFormat:
    """A format with fewer bits than the model's dtype. ValueError: not one of the table above."""

    format: str  # int8, fp8 or int4
    group_size: int = 0  # columns that share a scale; 0 = all of a row
    symmetric: bool = True  # else every group has a zero point (int4 only)
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self):
        def check(field, expected: Iterable):
            if getattr(self, field) not in (expected := list(expected)):
                names = ", ".join(map(str, expected))
                raise ValueError(f"{field} of {self.format!r:.50}: found {getattr(self, field)!r:.200}, supported: {names}")

        check("format", GROUP_SIZES)
        check("group_size", GROUP_SIZES[self.format])
        check("symmetric", [True, False] if self.format == "int4" else [True])
        check("scale_dtype", SCALE_DTYPES.values() if self.format == "int4" else [torch.float32])

    def __str__(self) -> str:
        return f"{self.format}{f' g{self.group_size}' if self.group_size else ''}{'' if self.symmetric else ' asymmetric'}"

    def to_dict(self) -> dict:
        return asdict(self) | {"scale_dtype": str(self.scale_dtype).removeprefix("torch.")}

    @classmethod
    def from_dict(cls, fields: dict) -> "PackedFormat":
        """The inverse of `to_dict`. ValueError names the field that is missing, unknown or wrong."""
        names = ("format", "group_size", "symmetric", "scale_dtype")
        if not isinstance(fields, dict) or set(fields) != set(names):
            raise ValueError(f"found {fields!r:.200}, supported: an object of {', '.join(names)}")
        for name, kind in zip(names, (str, int, bool, str), strict=True):
            if type(fields[name]) is not kind:
                raise ValueError(f"{name}: found {fields[name]!r:.200}, supported: {kind.__name__}")
        scale_dtype = fields["scale_dtype"]
        return cls(**fields | {"scale_dtype": SCALE_DTYPES.get(scale_dtype, scale_dtype)})

    def num_groups(self, columns: int) -> int:
        """G. ValueError where the groups do not fill a row."""
        if columns % (self.group_size or columns):
            raise ValueError(f"found {columns} columns, expected a multiple of the group size, {self.group_size}")
        return columns // (self.group_size or columns)

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[torch.dtype, tuple[int, int]]]:
        """dtype and shape of each tensor of a weight [rows, columns]."""
        groups = (rows, self.num_groups(columns))
        out = {
            "weight": (CODE_DTYPES[self.format], (rows, columns // 2 if self.format == "int4" else columns)),
            "scale": (self.scale_dtype, groups),
        }
        return out if self.symmetric else out | {"zero": (torch.uint8, groups)}


# ---------------------------------------------------------------- values and codes


def pack_int4(codes: Tensor) -> Tensor:
    """Codes 0 to 15, uint8 [N, K] -> [N, K / 2]: even columns in the low nibbles, odd ones in the high."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


def fit_scale(values: Tensor, fmt: PackedFormat, shrink: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point, [...] each, of groups of values [..., columns]: the range that they span, times `shrink`.

    The scale is rounded as it will be stored; that of a group of zeros is 1. zero is None where the format is symmetric.
    """
    if fmt.symmetric:
        scale, zero = values.abs().amax(-1) * (shrink / LARGEST[fmt.format]), None
    else:
        low, high = values.amin(-1).clamp(max=0) * shrink, values.amax(-1).clamp(min=0) * shrink
        scale = (high - low) / 15
    scale = scale.float().clamp(max=torch.finfo(fmt.scale_dtype).max).to(fmt.scale_dtype)
    scale = torch.where(scale > 0, scale, 1.0)
    if not fmt.symmetric:
        zero = (-low / scale.float()).round().clamp(0, 15).to(torch.uint8)
    return scale, zero


def saturated(values: Tensor, dtype: torch.dtype) -> Tensor:
    """values in dtype; what is beyond the range of e4m3 becomes its largest value, +-448, where PyTorch makes NaN of it."""
    if dtype == torch.float8_e4m3fn:
        values = values.clamp(-LARGEST["fp8"], LARGEST["fp8"])
    return values.to(dtype)


def encode(values: Tensor, scale: Tensor, zero: Tensor | None, fmt: PackedFormat) -> Tensor:
    """The nearest codes of values [..., columns] with scale and zero [...]; what the codes do not reach is clipped."""
    codes = values.float() / scale.float()[..., None]
    if fmt.format == "fp8":
        return saturated(codes, torch.float8_e4m3fn)
    if fmt.format == "int8":
        return codes.round().clamp(-127, 127).to(torch.int8)
    return (codes.round() + (8 if zero is None else zero[..., None].float())).clamp(0, 15).to(torch.uint8)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, fmt: PackedFormat) -> Tensor:
    """Codes [..., columns] with scale and zero [...] -> the values that they stand for, float32."""
    values = codes.float()
    if fmt.format == "int4":
        values = values - (8.0 if zero is None else zero.float()[..., None])
    return values * scale.float()[..., None]


# ---------------------------------------------------------------- the weight


class Weight(nn.Module):
    """A linear layer's weight [N, K] in one format, with what belongs to it. Quantising replaces Weights, not modules.

    Buffers: `weight`, `scale` and `zero` as the table above has them (None where a format has none), `bias` [N] or None.
    `dtype` is the model's: of the bias, and of the plain weight that this one stands for.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        bias: bool = False,
        dtype=torch.bfloat16,
        device=None,
        packed: PackedFormat | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features, self.dtype, self.packed = out_features, in_features, dtype, packed
        self.format = packed.format if packed else PLAIN_FORMATS[dtype]
        self.group_size = packed.group_size if packed else 0
        shape = (out_features, in_features)
        tensors = packed.tensors(*shape) if packed else {"weight": (dtype, shape)}
        for name in ("weight", "scale", "zero"):
            stored_dtype, stored_shape = tensors.get(name, (None, None))
            empty = stored_shape and torch.empty(stored_shape, dtype=stored_dtype, device=device)
            self.register_buffer(name, empty)
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    def _load_from_state_dict(self, state, prefix, *rest):
        """PyTorch would cast codes to another format's dtype, or assign them as they are: both give other weights, silently."""
        for name, buffer in self.named_buffers():
            found = state.get(prefix + name)
            if self.packed and name != "bias" and found is not None and found.dtype != buffer.dtype:
                raise ValueError(f"{prefix}{name}: found {found.dtype}, expected {buffer.dtype} for {self.packed}")
        super()._load_from_state_dict(state, prefix, *rest)

    @property
    def num_bytes(self) -> int:
        """Bytes that one pass over this weight reads."""
        return sum(t.numel() * t.element_size() for t in self.buffers())

    @property
    def in_kernels(self) -> bool:
        """True where the small-batch kernels read this format."""
        return self.format in KERNEL_FORMATS

    def dequantized(self) -> Tensor:
        """The weight as a plain [N, K] tensor in `dtype`."""
        if self.packed is None:
            return self.weight
        codes = unpack_int4(self.weight) if self.format == "int4" else self.weight
        values = decode(codes.unflatten(1, (self.scale.shape[1], -1)), self.scale, self.zero, self.packed)
        return values.flatten(1).to(self.dtype)

    def quantized(self, fmt: PackedFormat, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> "Weight":
        """This weight in another format: codes [N, K] as `encode` gives them, scale and zero [N, G]; the bias is kept."""
        if codes.dtype != CODE_DTYPES[fmt.format]:
            raise ValueError(f"weight of {fmt}: found {codes.dtype} codes, expected {CODE_DTYPES[fmt.format]}")
        where = {"bias": self.bias is not None, "dtype": self.dtype, "packed": fmt}
        out = Weight(self.out_features, self.in_features, device="meta", **where)
        state = {"weight": pack_int4(codes) if fmt.format == "int4" else codes, "scale": scale, "zero": zero, "bias": self.bias}
        for name, tensor in state.items():
            found, expected = ((t.dtype, list(t.shape)) if t is not None else None for t in (tensor, getattr(out, name)))
            if found != expected:
                raise ValueError(f"{name} of {fmt}: found {found}, expected {expected}")
        state = {name: tensor for name, tensor in state.items() if tensor is not None}
        out.load_state_dict(state, strict=True, assign=True)
        return out

    def round_to_nearest(self, fmt: PackedFormat) -> "Weight":
        """This weight in another format, each value rounded to the nearest code: the plainest quantiser."""
        groups = self.dequantized().unflatten(1, (fmt.num_groups(self.in_features), -1))
        scale, zero = fit_scale(groups, fmt)
        return self.quantized(fmt, encode(groups, scale, zero, fmt).flatten(1), scale, zero)

    def extra_repr(self) -> str:
        return f"{self.out_features} x {self.in_features}, {self.packed or self.format}, bias={self.bias is not None}"
