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

The small-batch kernels read packed weights in another order, tiles, which exists in memory only: `Weight.tile` makes it
once, in place. Rows go by eights (half blocks), columns by units of 64 (int8, fp8) or 128 (int4); the 32 threads of a warp hold
a unit of a half block as four 32-bit words each. Thread g * 4 + t has row g, and of columns 32 s to 32 s + 31 it has
32 s + 8 t + (0 to 7), which are the elements 4 kh + 2 b + kl below (kernels/_packed.py multiplies them in that order).

    weight        int32 [N / 8, units, 32, 4]; rows and columns that are no whole units hold zeros
    int4          word s: element e in bits 4 (e / 2) + 16 kl, e / 2 = 2 kh + b
    fp8           word 2 s + kh: the byte of element (b, kl) in bits 16 kl + 8 (1 - b)
    int8          the same places, but with sign and magnitude, magnitudes of b = 0 and b = 1 exchanged
    scale, zero   int4: [N / 8, units, 8, groups of a unit], zeros as int16 (Triton would lay out the dot for loads of bytes);
                  else as above
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

PLAIN_FORMATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
UNIT_COLUMNS = {"int8": 64, "fp8": 64, "int4": 128}  # of the kernels' order
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


# ---------------------------------------------------------------- the kernels' order


def tile_codes(codes: Tensor, format: str) -> Tensor:
    """Codes [N, K], as `encode` gives them -> int32 [N / 8, units, 32, 4], both rounded up."""
    (N, K), unit = codes.shape, UNIT_COLUMNS[format]
    bytes_ = torch.nn.functional.pad(codes.view(torch.uint8), (0, -K % unit, 0, -N % 8))
    e = bytes_.view(-(-N // 8), 8, -(-K // unit), unit // 32, 4, 2, 2, 2)  # n g u s t kh b kl
    if format == "int4":
        e = e.permute(0, 2, 1, 4, 3, 7, 5, 6)  # n u g t s kl kh b
        e = e[..., 0] | e[..., 1] << 4
    else:
        e = e.permute(0, 2, 1, 4, 3, 5, 7, 6)  # n u g t s kh kl b
        if format == "int8":
            sign, magnitude = e & 128, e.view(torch.int8).abs().view(torch.uint8)
            e = sign | magnitude.flip(-1)
        e = e.flip(-1)
    return e.reshape(e.shape[0], e.shape[1], 32, 16).view(torch.int32)


def untile_codes(tiled: Tensor, format: str, N: int, K: int) -> Tensor:
    """The inverse of `tile_codes`."""
    bytes_ = tiled.contiguous().view(torch.uint8)
    n, u = bytes_.shape[:2]
    if format == "int4":
        e = bytes_.view(n, u, 8, 4, 4, 2, 2)  # n u g t s kl kh
        e = torch.stack([e & 15, e >> 4], -1).permute(0, 2, 1, 4, 3, 6, 7, 5)
    else:
        e = bytes_.view(n, u, 8, 4, 2, 2, 2, 2)  # n u g t s kh kl b
        e = e.flip(-1)
        if format == "int8":
            sign, magnitude = e & 128, (e & 127).flip(-1).view(torch.int8)
            e = torch.where(sign > 0, -magnitude, magnitude).view(torch.uint8)
        e = e.permute(0, 2, 1, 4, 3, 5, 7, 6)
    codes = e.reshape(n * 8, -1)[:N, :K]
    return codes.contiguous().view(CODE_DTYPES[format])


def tile_groups(values: Tensor, group_size: int) -> Tensor:
    """int4's scales or zeros [N, G] -> [N / 8, units, 8, groups of a unit]; zeros where there is no weight."""
    (N, G), each = values.shape, UNIT_COLUMNS["int4"] // group_size
    padded = torch.nn.functional.pad(values, (0, -G % each, 0, -N % 8))
    return padded.view(-(-N // 8), 8, -1, each).transpose(1, 2).contiguous()


def untile_groups(tiled: Tensor, N: int, G: int) -> Tensor:
    """The inverse of `tile_groups`."""
    return tiled.transpose(1, 2).flatten(2).flatten(0, 1)[:N, :G]


def dequantize_tiled(weight: Tensor, scale: Tensor, zero: Tensor | None, format: str, N: int, K: int) -> Tensor:
    """The values [N, K], float32, of a packed weight in the kernels' order."""
    codes, group_size = untile_codes(weight, format, N, K), 0
    if format == "int4":
        group_size = UNIT_COLUMNS[format] // scale.shape[-1]
        scale = untile_groups(scale, N, K // group_size)
        zero = None if zero is None else untile_groups(zero, N, K // group_size)
    fmt = PackedFormat(format, group_size, zero is None, scale.dtype)
    return decode(codes.unflatten(1, (scale.shape[1], -1)), scale, zero, fmt).flatten(1)


# ---------------------------------------------------------------- the weight


class Weight(nn.Module):
    """A linear layer's weight [N, K] in one format, with what belongs to it. Quantising replaces Weights, not modules.

    Buffers: `weight`, `scale` and `zero` as the table above has them (None where a format has none), `bias` [N] or None; once
    `tiled`, in the kernels' order. `dtype` is the model's: of the bias, and of the plain weight that this one stands for.
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
        self.tiled = False
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
        """True where the small-batch kernels can read this weight."""
        return self.packed is None or self.tiled

    def tile(self) -> None:
        """Puts a packed weight into the kernels' order, in place, unless it is; a plain one stays. ValueError: a code that the
        kernels would misread."""
        if self.packed is None or self.tiled:
            return
        if self.format != "int4":
            wrong = (self.weight == -128) if self.format == "int8" else self.weight.float().isnan()
            if wrong.any():
                raise ValueError(
                    f"a weight of {self.packed}: found the code {self.weight[wrong][0]}, which stands for no number"
                )
        else:
            self.scale = tile_groups(self.scale, self.group_size)
            self.zero = self.zero if self.zero is None else tile_groups(self.zero.to(torch.int16), self.group_size)
        self.weight = tile_codes(unpack_int4(self.weight) if self.format == "int4" else self.weight, self.format)
        self.tiled = True

    def _save_to_state_dict(self, *rest):
        if self.tiled:
            raise ValueError("a weight in the kernels' order: found one in a state dict, expected it to be saved before `tile`")
        super()._save_to_state_dict(*rest)

    def dequantized(self) -> Tensor:
        """The weight as a plain [N, K] tensor in `dtype`."""
        if self.packed is None:
            return self.weight
        if self.tiled:
            tensors = self.weight, self.scale, self.zero
            shape = self.out_features, self.in_features
            return torch.ops.rooflama.dequantize(*tensors, self.format, *shape, self.dtype)  # dequantize.py: `dequantize_tiled`
        codes = unpack_int4(self.weight) if self.format == "int4" else self.weight
        values = decode(codes.unflatten(1, (self.scale.shape[1], -1)), self.scale, self.zero, self.packed)
        return values.flatten(1).to(self.dtype)

    def fp8_codes(self) -> Tensor:
        """The codes of an fp8 weight as a plain float8_e4m3fn [N, K] tensor."""
        if not self.tiled:
            return self.weight
        return torch.ops.rooflama.untile_fp8(self.weight, self.out_features, self.in_features)  # dequantize.py: `untile_codes`

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
