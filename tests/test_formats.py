"""kernels/formats.py: codes come back as packed, values as near as a format promises, and no format passes for another."""

import dataclasses
import itertools

import pytest
import torch

from kernels.formats import PackedFormat, Weight, decode, encode, fit_scale, pack_int4, unpack_int4
from kernels.linear import linear

FORMATS = [
    PackedFormat("int8"),
    PackedFormat("fp8"),
    *(PackedFormat("int4", g, s, torch.bfloat16) for g, s in itertools.product((32, 64, 128), (True, False))),
]
ids = lambda value: str(value) if isinstance(value, PackedFormat) else None


def random_weight(rows, columns, dtype=torch.float32, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = Weight(rows, columns, bias=bias, dtype=dtype)
    for tensor in weight.buffers():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.02 + 0.003)
    return weight


def random_codes(fmt, rows, columns, seed=0):
    """Every code of a format, in random order."""
    generator = torch.Generator().manual_seed(seed)
    low, high = {"int8": (-127, 128), "int4": (0, 16), "fp8": (0, 127)}[fmt.format]  # 127 and 255 are fp8's NaN
    codes = torch.randint(low, high, (rows, columns), generator=generator)
    if fmt.format == "fp8":
        return (codes + 128 * torch.randint(0, 2, codes.shape, generator=generator)).to(torch.uint8).view(torch.float8_e4m3fn)
    return codes.to(torch.int8 if fmt.format == "int8" else torch.uint8)


def reference_values(weight):
    """The table at the top of formats.py, one value after another, in Python floats."""
    fmt, group = weight.packed, weight.packed.group_size or weight.in_features
    out = torch.empty(weight.out_features, weight.in_features, dtype=torch.float64)
    for n, k in itertools.product(range(weight.out_features), range(weight.in_features)):
        if fmt.format == "int4":
            byte = int(weight.weight[n, k // 2])
            zero = 8 if weight.zero is None else int(weight.zero[n, k // group])
            code = (byte >> 4 if k % 2 else byte & 15) - zero
        else:
            code = float(weight.weight[n, k])
        out[n, k] = code * float(weight.scale[n, k // group])
    return out


# ---------------------------------------------------------------- packing


def test_int4_bytes():
    packed = pack_int4(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8))
    assert packed.tolist() == [[0x21, 0x0F]], "the even column belongs in the low nibble"


def test_int4_round_trip_of_every_byte():
    packed = torch.arange(256, dtype=torch.uint8).view(4, 64)
    assert torch.equal(pack_int4(unpack_int4(packed)), packed)
    codes = torch.randint(0, 16, (7, 96), dtype=torch.uint8)
    assert torch.equal(unpack_int4(pack_int4(codes)), codes)


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_codes_come_back(fmt):
    """Values that a scale and zero stand for exactly are encoded as the codes that they came from."""
    codes = random_codes(fmt, 5, 256).unflatten(1, (fmt.num_groups(256), -1))
    scale = torch.rand(codes.shape[:2]).add(0.5).to(fmt.scale_dtype)
    zero = None if fmt.symmetric else torch.randint(0, 16, scale.shape).to(torch.uint8)
    again = encode(decode(codes, scale, zero, fmt), scale, zero, fmt)
    assert again.dtype == codes.dtype
    assert torch.equal(again.float(), codes.float())  # fp8 has two zeros


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_dequantized_is_what_the_table_says(fmt):
    rows, columns = 3, 256
    scale = torch.rand(rows, fmt.num_groups(columns)).add(0.01).to(fmt.scale_dtype)
    zero = None if fmt.symmetric else torch.randint(0, 17, scale.shape).to(torch.uint8)
    weight = random_weight(rows, columns).quantized(fmt, random_codes(fmt, rows, columns), scale, zero)
    values = weight.dequantized()
    assert values.dtype == torch.float32
    assert torch.equal(values, reference_values(weight).float())


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rounding_is_within_half_a_step(fmt, dtype):
    plain = random_weight(48, 256, dtype)
    packed = plain.round_to_nearest(fmt)
    assert packed.dtype == packed.dequantized().dtype == dtype
    error = (packed.dequantized().double() - plain.weight.double()).abs()
    scale = packed.scale.double().repeat_interleave(256 // packed.scale.shape[1], 1)
    if fmt.format == "fp8":  # a mantissa of three bits: 2^-4 of the value, or half of the smallest step
        bound = torch.maximum(plain.weight.double().abs() / 16, scale * 2**-10)
    else:  # half a step, a zero point's rounding, and at the ends of int4's range its scale's rounding (7.5 steps are 7 + 0.5)
        steps = 7.5 if fmt.symmetric else 15
        bound = scale * (
            0.5 + (not fmt.symmetric) * 0.5 + (fmt.format == "int4") * steps * torch.finfo(fmt.scale_dtype).eps / 2
        )
    slack = plain.weight.double().abs() * torch.finfo(dtype).eps + scale * 2**-14
    assert (error <= bound + slack).all()


def test_groups_of_zeros_and_constants():
    for fmt in FORMATS:
        plain = Weight(2, 128, dtype=torch.float32)
        plain.weight.copy_(torch.tensor([[0.0], [0.25]]).expand(2, 128))
        values = plain.round_to_nearest(fmt).dequantized()
        assert (values[0] == 0).all()
        assert torch.allclose(values[1], torch.tensor(0.25), rtol=0.08), fmt


def test_scale_is_rounded_before_codes_are_chosen():
    values = torch.randn(4, 2, 64)
    scale, _ = fit_scale(values, fmt := PackedFormat("int4", 64, True, torch.bfloat16))
    assert scale.dtype == torch.bfloat16
    nearest = (values / scale.float()[..., None]).round().clamp(-8, 7) + 8
    assert torch.equal(encode(values, scale, None, fmt), nearest.to(torch.uint8))


# ---------------------------------------------------------------- what a Weight promises


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
@pytest.mark.parametrize("rows", [1, 3, 64, 100])
def test_product_against_float64(fmt, rows):
    """What the model computes with a packed weight, against the table in float64."""
    import model

    weight = random_weight(24, 128, bias=True).round_to_nearest(fmt)
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows))
    exact = x.double() @ reference_values(weight).T + weight.bias.double()
    bound = 128 * torch.finfo(torch.float32).eps * (x.double().abs() @ reference_values(weight).T.abs() + 1)
    assert ((model.linear(x, weight).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_bytes_and_shapes(fmt):
    weight = random_weight(48, 256, bias=True).round_to_nearest(fmt)
    groups = 48 * fmt.num_groups(256)
    expected = 48 * 256 // (2 if fmt.format == "int4" else 1) + groups * fmt.scale_dtype.itemsize + 48 * 4
    assert weight.num_bytes == expected + (0 if fmt.symmetric else groups)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in weight.state_dict().items() if name != "bias"} == fmt.tensors(
        48, 256
    )
    assert (weight.format, weight.group_size, weight.in_kernels) == (fmt.format, fmt.group_size, False)


def test_no_format_passes_for_another():
    """Each format's tensors are refused as any other's, whoever puts them into a Weight."""
    for one, other in itertools.permutations(FORMATS, 2):
        source = random_weight(48, 256).round_to_nearest(one)
        codes = unpack_int4(source.weight) if one.format == "int4" else source.weight
        with pytest.raises(ValueError, match=r"(weight|scale|zero) of .*: found .*, expected "):
            source.quantized(other, codes, source.scale, source.zero)
        for assign in (False, True):
            with pytest.raises((RuntimeError, ValueError)):
                Weight(48, 256, packed=other).load_state_dict(source.state_dict(), strict=True, assign=assign)


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_kernels_refuse_what_they_do_not_read(fmt):
    weight = random_weight(48, 256, torch.bfloat16).round_to_nearest(fmt)
    with pytest.raises(ValueError, match="weight"):
        linear(torch.zeros(1, 256, dtype=torch.bfloat16), weight)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"format": "int3"}, "format of 'int3': found 'int3'"),
        ({"format": "int4", "group_size": 48}, "group_size of 'int4': found 48, supported: 32, 64, 128"),
        ({"format": "int8", "group_size": 128}, "group_size of 'int8': found 128"),
        ({"format": "fp8", "symmetric": False}, "symmetric of 'fp8': found False"),
        ({"format": "int8", "scale_dtype": torch.bfloat16}, "scale_dtype of 'int8': found torch.bfloat16"),
        ({"format": "int4", "group_size": 32, "scale_dtype": torch.int8}, "scale_dtype of 'int4': found torch.int8"),
    ],
)
def test_formats_that_are_none(fields, named):
    with pytest.raises(ValueError, match=named):
        PackedFormat(**fields)


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_json(fmt):
    fields = fmt.to_dict()
    assert PackedFormat.from_dict(fields) == fmt
    for name in fields:
        with pytest.raises(ValueError, match="found"):
            PackedFormat.from_dict({k: v for k, v in fields.items() if k != name})
        with pytest.raises(ValueError, match=name):
            PackedFormat.from_dict(fields | {name: None})
    with pytest.raises(ValueError, match="bits"):
        PackedFormat.from_dict(fields | {"bits": 4})


def test_groups_that_do_not_fill_a_row():
    with pytest.raises(ValueError, match="found 96 columns, expected a multiple of the group size, 64"):
        Weight(16, 96, packed=PackedFormat("int4", 64, True, torch.bfloat16))


def test_dataclass_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FORMATS[0].group_size = 32
