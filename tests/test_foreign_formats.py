"""Checkpoints that other projects have quantised: read as the very weights that they stand for, or refused by name.

The fixtures pack random codes by the published rules of each format, one code after another, and dequantise them by its formula
in float64; none of that is shared with what unpacks them.
"""

import dataclasses
import json
import re
import shutil

import checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import convert_hf_checkpoint as convert
from generate import Engine, SamplingParams
from kernels.formats import Weight
from model import PrefillStep

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8}
LINEAR = re.compile(r"model\.layers\.\d+\..*_proj\.weight")

# ---------------------------------------------------------------- packing, as published


def pack_rows(codes, bits):
    """int32 words along dimension 0: element p i + j of a column is bits j * `bits` and up of word i (AutoGPTQ, GPTQModel)."""
    step = 32 // bits
    words = torch.zeros(codes.shape[0] // step, codes.shape[1], dtype=torch.int64)
    for row in range(codes.shape[0]):
        words[row // step] |= codes[row].long() << bits * (row % step)
    return words.to(torch.int32)  # keeps the low 32 bits


def pack_columns(codes, bits, order=None):
    """The same along dimension 1; `order`: which of a word's columns its j-th place takes (AutoAWQ: 0 2 4 6 1 3 5 7)."""
    step = 32 // bits
    words = torch.zeros(codes.shape[0], codes.shape[1] // step, dtype=torch.int64)
    for word in range(words.shape[1]):
        for j, column in enumerate(order or range(step)):
            words[:, word] |= codes[:, word * step + column].long() << bits * j
    return words.to(torch.int32)


def gptq(rows, columns, dtype, *, bits=4, group_size=128, sym=True, form="gptq", draw):
    """Tensors of one linear, and the weight [rows, columns] in float64 that they stand for."""
    groups = columns // group_size if group_size > 0 else 1
    group = torch.arange(columns) // (columns // groups)
    codes, scales = draw(2**bits, columns, rows), (draw(1000, groups, rows) / 1000 * 0.02 + 0.001).to(dtype)
    zeros = torch.full((groups, rows), 2 ** (bits - 1)) if sym else draw(2**bits, groups, rows)
    qzeros = pack_columns(zeros, bits)
    if form == "gptq":  # as GPTQModel writes it: all codes of a word less one, by one subtraction
        qzeros = qzeros - sum(1 << bits * j for j in range(32 // bits))
    g_idx = group.to(torch.int32)
    tensors = {"qweight": pack_rows(codes, bits), "qzeros": qzeros, "scales": scales, "g_idx": g_idx}
    return tensors, ((codes - zeros[group]).double() * scales[group].double()).T


def awq(rows, columns, dtype, *, group_size=128, draw):
    group, groups = torch.arange(columns) // group_size, columns // group_size
    codes, zeros = draw(16, columns, rows), draw(16, groups, rows)
    scales = (draw(1000, groups, rows) / 1000 * 0.02 + 0.001).to(dtype)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {"qweight": pack_columns(codes, 4, order), "qzeros": pack_columns(zeros, 4, order), "scales": scales}
    return tensors, ((codes - zeros[group]).double() * scales[group].double()).T


def fp8(rows, columns, dtype, *, scale_shape="channel", scale_name="weight_scale", scale_dtype=torch.float32, draw):
    values = (draw(2001, rows, columns) / 1000 - 1).mul(448).to(torch.float8_e4m3fn)
    shape = {"channel": (rows, 1), "rows": (rows,), "tensor": (1,), "scalar": ()}[scale_shape]
    scale = (draw(1000, *shape) / 1000 * 1e-4 + 1e-5).to(scale_dtype)
    return {"weight": values, scale_name: scale}, values.double() * scale.double().reshape(-1, 1)


def pack_quantized(rows, columns, dtype, *, group_size=128, symmetric=True, draw):
    """Signed codes and zero points, each plus 8, in words along K and along N."""
    group, groups = torch.arange(columns) // group_size, columns // group_size
    codes, scales = draw(16, rows, columns) - 8, (draw(1000, rows, groups) / 1000 * 0.02 + 0.001).to(dtype)
    zeros = torch.zeros(rows, groups, dtype=torch.int64) if symmetric else draw(16, rows, groups) - 8
    shape = torch.tensor([rows, columns])
    tensors = {"weight_packed": pack_columns(codes + 8, 4), "weight_scale": scales, "weight_shape": shape}
    if not symmetric:
        tensors["weight_zero_point"] = pack_rows(zeros + 8, 4)
    return tensors, (codes - zeros[:, group]).double() * scales[:, group].double()


COMPRESSED = {
    "format": "float-quantized", "quantization_status": "compressed", "ignore": ["lm_head"], "kv_cache_scheme": None,
    "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": {"num_bits": 8, "dynamic": True}, "weights": {
        "num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False, "group_size": None}}},
}  # fmt: skip
PACKED = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True, "actorder": None}
GPTQ = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, "true_sequential": True}
AWQ = {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}


def pack_config(**changes):
    groups = {"group_0": {"targets": ["Linear"], "weights": PACKED | changes, "input_activations": None}}
    return {"quant_method": "compressed-tensors", **COMPRESSED, "format": "pack-quantized", "config_groups": groups}


def case(name, config, pack, layers, **options):
    return pytest.param(config, pack, options, layers, id=name)


CASES = [
    *(
        case(
            f"gptq-g{g}-{'sym' if sym else 'asym'}-{form}",
            {"quant_method": "gptq", **GPTQ, "group_size": g, "sym": sym, "checkpoint_format": form},
            gptq,
            f"int4 g{g}{'' if sym else ' asymmetric'}",
            group_size=g,
            sym=sym,
            form=form,
        )
        for g in (32, 64, 128)
        for sym in (True, False)
        for form in ("gptq", "gptq_v2")
    ),
    case("gptq-unnamed-v1", {"quant_method": "gptq", **GPTQ, "sym": False}, gptq, "int4 g128 asymmetric", sym=False),
    case("gptq-v2-called-v1", {"quant_method": "gptq", **GPTQ, "checkpoint_format": "gptq"}, gptq, "int4 g128", form="gptq_v2"),
    *(
        case(f"gptq-8-{form}", {"quant_method": "gptq", **GPTQ, "bits": 8, "group_size": -1, "checkpoint_format": form}, gptq,
             "int8", bits=8, group_size=-1, form=form)
        for form in ("gptq", "gptq_v2")
    ),
    *(
        case(f"awq-g{g}", {"quant_method": "awq", **AWQ, "group_size": g}, awq, f"int4 g{g} asymmetric", group_size=g)
        for g in (32, 64, 128)
    ),
    *(
        case(f"compressed-tensors-{shape}", {"quant_method": "compressed-tensors", **COMPRESSED}, fp8, "fp8", scale_shape=shape,
             scale_dtype=dtype)
        for shape, dtype in (("channel", torch.bfloat16), ("tensor", torch.float32))
    ),
    *(
        case(f"pack-quantized-g{g}{'' if symmetric else '-asymmetric'}", pack_config(group_size=g, symmetric=symmetric),
             pack_quantized, f"int4 g{g}{'' if symmetric else ' asymmetric'}", group_size=g, symmetric=symmetric)
        for g in (32, 64, 128)
        for symmetric in (True, False)
    ),
    case("fbgemm", {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}, fp8,
         "fp8"),
    case("fp8-tensor", {"quant_method": "fp8", "activation_scheme": "static"}, fp8, "fp8", scale_shape="scalar"),
    case("fp8-rows", {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None}, fp8, "fp8",
         scale_shape="rows"),
    case("fp8-inverse", {"quant_method": "fp8", "activation_scheme": "dynamic"}, fp8, "fp8", scale_shape="scalar",
         scale_name="weight_scale_inv"),
]  # fmt: skip


def quantised(directory, config, pack, options, dtype=torch.float16, family="llama", **changes):
    """Two checkpoints: DIRECTORY, a tiny model packed by `pack`, and DIRECTORY-plain, the same dequantised, in dtype."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda high, *shape: torch.randint(0, high, shape, generator=generator)
    checkpoints.hf_model(family, dtype, **SIZES | changes).save_pretrained(directory)
    packed, plain = {}, {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if LINEAR.fullmatch(name):
            tensors, value = pack(*tensor.shape, dtype, draw=draw, **options)
            packed |= {name.removesuffix("weight") + suffix: t.contiguous() for suffix, t in tensors.items()}
            plain[name] = value.float().to(dtype).contiguous()
        else:
            packed[name] = plain[name] = tensor
    other = directory.with_name(directory.name + "-plain")
    shutil.copytree(directory, other)
    save_file(packed, directory / "model.safetensors")
    save_file(plain, other / "model.safetensors")
    edit_config(directory, quantization_config=config)
    return directory, other


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory, changes):
    path = directory / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def dequantised(config, state):
    """A state dict with every packed weight as a plain tensor."""
    plain = dataclasses.replace(config, layer_format=None)
    out = {}
    for name, shape in checkpoint.expected_tensors(plain).items():
        stem = name.removesuffix("weight")
        if f"{stem}scale" in state:
            weight = Weight(*shape, dtype=config.dtype, packed=config.layer_format, device="meta")
            tensors = {part: state[stem + part] for part in ("weight", "scale", "zero") if stem + part in state}
            weight.load_state_dict(tensors, assign=True)
            out[name] = weight.dequantized()
        else:
            out[name] = state[name]
    return out


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


# ---------------------------------------------------------------- the same weights, bit for bit


@pytest.mark.parametrize(("config", "pack", "options", "layers"), CASES)
def test_weights_are_those_that_were_packed(tmp_path, config, pack, options, layers):
    """From the directory itself and from our copy of it: dequantised, every weight is the dequantised checkpoint's."""
    packed, plain = quantised(tmp_path / "packed", config, pack, options)
    convert.convert(packed, tmp_path / "ours", progress=False)
    _, expected, _ = convert.load(plain, progress=False)
    method = config["quant_method"]
    assert checkpoint.read_config(tmp_path / "ours")[1]["rooflama"]["quantization"]["method"] == method
    for directory in (packed, tmp_path / "ours"):
        found, state, _ = convert.load(directory, progress=False)
        assert str(found.layer_format) == layers
        assert found.head_format is None
        assert {name: (t.dtype, tuple(t.shape)) for name, t in state.items()} == dict(checkpoint.tensor_specs(found))
        assert_same(dequantised(found, state), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_families_and_dtypes(tmp_path, dtype, family):
    """Biases and head sizes of their own; scales in the model's dtype."""
    options = {"group_size": 64, "sym": False}
    packed, plain = quantised(tmp_path / "packed", {"quant_method": "gptq", **GPTQ, **options}, gptq, options, dtype, family)
    config, state, _ = convert.load(packed, progress=False)
    assert config.layer_format.scale_dtype == config.dtype == dtype
    assert_same(dequantised(config, state), convert.load(plain, progress=False)[1])


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_the_engine_gives_the_same_tokens(tmp_path, method):
    """As a user loads them, in float32 on a CPU: the packed model's logits are the dequantised copy's."""
    pack, options, config = {
        "gptq": (gptq, {"sym": False}, GPTQ | {"sym": False}),
        "awq": (awq, {}, AWQ),
        "fp8": (fp8, {}, {}),
    }[method]
    packed, plain = quantised(tmp_path / "packed", {"quant_method": method, **config}, pack, options, torch.float32)
    engines = [Engine.load(directory, "cpu") for directory in (packed, plain)]
    tokens = torch.randint(0, 96, (20,), generator=torch.Generator().manual_seed(0))
    logits = [e.model.logits(e.model(e.model.embed(tokens), PrefillStep(len(tokens)))) for e in engines]
    assert torch.equal(*logits)
    params = SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True)
    assert len({tuple(engine.generate([tokens.tolist()], params)[0][0].tokens) for engine in engines}) == 1


def test_scales_of_two_dtypes_are_kept_in_float32(tmp_path):
    packed, _ = quantised(tmp_path / "packed", {"quant_method": "gptq", **GPTQ}, gptq, {})
    name = "model.layers.1.mlp.down_proj.scales"
    scales = load_file(packed / "model.safetensors")[name]
    edit_tensors(packed, {name: scales.to(torch.bfloat16)})
    config, state, _ = convert.load(packed, progress=False)
    assert config.layer_format.scale_dtype == torch.float32
    assert torch.equal(state["layers.1.feed_forward.w2.scale"], scales.to(torch.bfloat16).T.float())


def test_several_shards_and_threads(tmp_path, monkeypatch):
    """Words that no chunk of a reader holds whole, in files of their own."""
    packed, plain = quantised(tmp_path / "packed", {"quant_method": "awq", **AWQ}, awq, {})
    monkeypatch.setattr(checkpoint, "STAGING_BYTES", 1000)
    tensors = load_file(packed / "model.safetensors")
    files = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    (packed / "model.safetensors").unlink()
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, packed / file)
    (packed / checkpoint.INDEX_NAME).write_text(json.dumps({"weight_map": files}))
    config, state, report = convert.load(packed, progress=False)
    assert_same(dequantised(config, state), convert.load(plain, progress=False)[1])
    assert report.bytes == sum(tensor.nbytes for tensor in tensors.values()), "each byte once"


def test_scales_of_activations_are_ignored_and_said(tmp_path):
    packed, plain = quantised(tmp_path / "packed", {"quant_method": "fp8"}, fp8, {})
    layer = "model.layers.0.self_attn"
    extra = [f"{layer}.q_proj.input_scale", f"{layer}.k_scale", f"{layer}.v_scale", "model.layers.1.mlp.up_proj.input_scale_ub"]
    edit_tensors(packed, {name: torch.ones(1) for name in extra})
    source = convert.open_source(packed)
    assert source.notes == ["ignored 4 scales of activations and cache: those are not quantised"]
    assert_same(dequantised(*convert.load(packed, progress=False)[:2]), convert.load(plain, progress=False)[1])


def test_biases_of_zeros_are_dropped(tmp_path, refused):
    """Old AutoGPTQ gave every linear one."""
    packed, plain = quantised(tmp_path / "packed", {"quant_method": "gptq", **GPTQ}, gptq, {})
    name = "model.layers.0.mlp.up_proj.bias"
    edit_tensors(packed, {name: torch.zeros(256)})
    assert_same(dequantised(*convert.load(packed, progress=False)[:2]), convert.load(plain, progress=False)[1])
    edit_tensors(packed, {name: torch.ones(256)})
    refused(packed, name, "found a bias")


# ---------------------------------------------------------------- what is refused


@pytest.fixture
def refused(capsys):
    """Both ways in end with one line that names these, before anything is written."""

    def check(directory, *named):
        output = directory.with_name("never")
        for arguments in (["--check"], ["--output_dir", str(output)]):
            capsys.readouterr()
            assert convert.main(["--checkpoint_dir", str(directory), *arguments]) == 1
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("error: ")
            assert all(part in line for part in named), line
            assert not output.exists()

    return check


MIXED = pack_config()
MIXED["config_groups"]["group_1"] = {"targets": ["re:.*down_proj"], "weights": PACKED | {"group_size": 32}}
BLOCKS = {
    **COMPRESSED,
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "block", "symmetric": True}}},
}
REFUSALS = [
    *(
        ({"quant_method": method}, f"quant_method: found {method!r}, supported: gptq, awq, fp8, fbgemm_fp8, compressed-tensors")
        for method in ("bitsandbytes", "mxfp4", "hqq", "aqlm", "modelopt", "gguf", None)
    ),
    ("gptq", "quant_method: found 'gptq'"),
    ({"quant_method": "gptq", **GPTQ, "desc_act": True}, "desc_act: found True, supported: False"),
    ({"quant_method": "gptq", **GPTQ, "bits": 3}, "bits: found 3, supported: 4, 8"),
    ({"quant_method": "gptq", **GPTQ, "bits": 2}, "bits: found 2"),
    ({"quant_method": "gptq", **GPTQ, "bits": 8}, "group_size: found 128, supported: -1"),
    ({"quant_method": "gptq", **GPTQ, "bits": 8, "group_size": -1, "sym": False}, "sym: found False, supported: True"),
    ({"quant_method": "gptq", **GPTQ, "group_size": 1024}, "group_size: found 1024, supported: 32, 64, 128"),
    ({"quant_method": "gptq", **GPTQ, "group_size": -1}, "group_size: found -1"),
    ({"quant_method": "gptq", **GPTQ, "checkpoint_format": "marlin"}, "found 'marlin', supported: gptq, gptq_v2"),
    ({"quant_method": "gptq", **GPTQ, "is_marlin_format": True}, "is_marlin_format: found True"),
    ({"quant_method": "gptq", **GPTQ, "dynamic": {"+:.*0.*": {"bits": 8}}}, "dynamic: found"),
    ({"quant_method": "gptq", **GPTQ, "pack_dtype": "int16"}, "pack_dtype: found 'int16'"),
    ({"quant_method": "awq", **AWQ, "version": "gemv"}, "version: found 'gemv', supported: gemm"),
    ({"quant_method": "awq", **AWQ, "bits": 8}, "bits: found 8, supported: 4"),
    ({"quant_method": "awq", **AWQ, "zero_point": False}, "zero_point: found False"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "weight_block_size: found [128, 128], supported: None"),
    ({"quant_method": "compressed-tensors", **COMPRESSED, "format": "nvfp4-pack-quantized"}, "format: found 'nvfp4-pack-"),
    (pack_config(num_bits=8), "group_0.weights.num_bits: found 8, supported: 4"),
    (pack_config(strategy="channel"), "group_0.weights.strategy: found 'channel', supported: group"),
    (MIXED, "whose weights are quantised in one way"),
    (pack_config(actorder="group"), "group_0.weights.actorder: found 'group', supported: None, static, weight"),
    ({"quant_method": "compressed-tensors", **BLOCKS}, "group_0.weights.strategy: found 'block', supported: channel, tensor"),
    ({"quant_method": "compressed-tensors", **COMPRESSED, "config_groups": {}}, "config_groups: found [], expected groups"),
    ({"quant_method": "compressed-tensors", **COMPRESSED, "config_groups": {"group_0": 7}}, "num_bits: found 7, supported: 8"),
    ({"quant_method": "compressed-tensors", **COMPRESSED, "sparsity_config": {"format": "sparse-24"}}, "sparse-24"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "named"), REFUSALS, ids=lambda value: value if isinstance(value, str) else "")
def test_unsupported_configs_are_named(tmp_path, refused, config, named):
    directory = tmp_path / "hf"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    refused(directory, "config.json: quantization_config.", named)


def test_gguf_is_named(tmp_path, refused):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "hf", "model-Q4_K_M.gguf", "GGUF is not read")


TENSORS = [
    (gptq, {}, "mlp.down_proj.g_idx", lambda t: t.flip(0), "desc_act"),
    (gptq, {}, "self_attn.q_proj.qzeros", lambda t: t + 1, "sym is true"),
    (gptq, {}, "mlp.up_proj.qweight", lambda t: None, "missing"),
    (gptq, {}, "mlp.up_proj.qweight", lambda t: t.T.contiguous(), "shape"),
    (gptq, {}, "mlp.up_proj.scales", lambda t: t * torch.nan, "NaN"),
    (awq, {}, "mlp.up_proj.qzeros", lambda t: t.float(), "dtype"),
    (fp8, {}, "mlp.up_proj.weight", lambda t: t.view(torch.uint8).bitwise_or(127).view(t.dtype), "NaN"),
    (fp8, {}, "mlp.up_proj.weight", lambda t: t.to(torch.float8_e5m2), "dtype: found F8_E5M2, expected F8_E4M3"),
    (fp8, {}, "mlp.up_proj.weight", lambda t: t.half(), "1 of 14 linears of the layers are not quantised"),
    (fp8, {}, "mlp.up_proj.weight_scale", lambda t: t[:2].repeat(1, 2), "shape: found [2, 2], expected [256, 1]"),
]


@pytest.mark.parametrize(("pack", "options", "name", "change", "named"), TENSORS)
def test_wrong_tensors_are_named(tmp_path, refused, pack, options, name, change, named):
    config = {gptq: {"quant_method": "gptq", **GPTQ}, awq: {"quant_method": "awq", **AWQ}, fp8: {"quant_method": "fp8"}}[pack]
    packed, _ = quantised(tmp_path / "packed", config, pack, options)
    name = f"model.layers.1.{name}"
    edit_tensors(packed, {name: change(load_file(packed / "model.safetensors")[name])})
    refused(packed, name.removesuffix(".weight"), named)


def test_quantised_again_is_refused(tmp_path, capsys):
    import quantize

    packed, _ = quantised(tmp_path / "packed", {"quant_method": "gptq", **GPTQ}, gptq, {})
    assert quantize.main(["--checkpoint_path", str(packed), "--mode", "int8"]) == 1
    assert "quantised already" in capsys.readouterr().err


def test_a_value_of_any_length_is_cut():
    with pytest.raises(ValueError, match=r"quantization_config\.bits: found 'xxx") as error:
        convert._field({"bits": "x" * 5000}, "config.json: quantization_config", "bits", (4, 8))
    assert len(str(error.value)) < 300
