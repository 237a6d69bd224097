"""Quantise a checkpoint: int8, int4 and fp8 weights by round to nearest, GPTQ or AWQ; activations stay as they are.

Owns the choice of codes and scales, and calibration. Does not know how kernels lay weights out (kernels/formats.py packs).

    python quantize.py --checkpoint_path IN --mode int4-gptq [--groupsize 128] [--output_dir OUT]

Works layer by layer: a layer is read, quantised with the activations that the quantised layers before it give, and written.
Letters: N rows (output features) and K columns (input features) of a weight, T tokens of a calibration window, H hidden size.
"""

import argparse
import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
import model as rooflama
from checkpoint import Source, tensor_specs
from convert_hf_checkpoint import check_least, finite_tensors, open_source, parse_device, report_errors, resolve, underscored
from kernels.formats import GROUP_SIZES, PackedFormat, Weight, decode, encode, fit_scale
from model import Layer, ModelConfig, PrefillStep, Transformer, rms_norm, rope_tables
from tokenizer import Tokenizer, load_tokenizer

CALIBRATION_FILE = Path(__file__).parent / "assets" / "calibration.txt"  # the start of the demo model's training text
MODES = {  # mode: format of the layers, method, format of the head by default
    "int8": ("int8", "rtn", "int8"),
    "fp8": ("fp8", "rtn", "fp8"),
    "int4": ("int4", "rtn", "int8"),
    "int4-gptq": ("int4", "gptq", "int8"),
    "int4-awq": ("int4", "awq", "int8"),
}
STAGES = ("attention.wqkv", "attention.wo", "feed_forward.w13", "feed_forward.w2")  # a layer's linears, as they run
SHRINKS = [1 - i / 40 for i in range(21)]  # of a group's range: what the search for a scale tries
AWQ_STEPS = 20  # exponents from 0 to 1 that the search for a channel's scale tries

# ---------------------------------------------------------------- what is to be done


@dataclass(frozen=True)
class Recipe:
    """How a model is quantised."""

    mode: str  # a key of MODES
    method: str  # rtn, gptq or awq
    layers: PackedFormat
    head: PackedFormat | None  # None leaves the head plain, or tied to the embedding
    search: bool = True  # rtn, int4: clipped ranges are tried; False takes each group's whole range
    percdamp: float = 0.01  # gptq: added to the Hessian's diagonal, as a part of its mean
    blocksize: int = 128  # gptq: columns whose later updates are gathered into one product

    def config(self, plain: ModelConfig) -> ModelConfig:
        """The quantised model's. A head with a format of its own is untied; the embedding stays plain."""
        tied = plain.tie_word_embeddings and self.head is None
        return dataclasses.replace(plain, layer_format=self.layers, head_format=self.head, tie_word_embeddings=tied)


def make_recipe(mode: str, config: ModelConfig, groupsize=128, asymmetric=False, head: str | None = None, **options) -> Recipe:
    """What a mode means for a model. head: int8, int4, fp8, "none" or None for the mode's own; options: the recipe's search,
    percdamp and blocksize. ValueError names the flag."""
    if mode not in MODES:
        raise ValueError(f"quantisation mode: found {mode!r}, expected one of {', '.join(MODES)}")
    if found := config.layer_format or config.head_format:
        raise ValueError(f"the checkpoint is quantised already: found {found}, expected plain weights")
    name, method, default_head = MODES[mode]
    if asymmetric and "int4" not in (name, head):
        raise ValueError(f"asymmetric: found with mode {mode}, expected an int4 mode")

    def fmt(name):
        if name == "int4":
            return PackedFormat("int4", groupsize, not asymmetric, config.dtype)
        return None if name == "none" else PackedFormat(name)

    recipe = Recipe(mode, method, fmt(name), fmt(head or default_head), **options)
    if not 0 < recipe.percdamp < 1:
        raise ValueError(f"percdamp: found {recipe.percdamp}, expected a number between 0 and 1")
    if recipe.blocksize < 1:
        raise ValueError(f"blocksize: found {recipe.blocksize}, expected at least 1")
    tensor_specs(recipe.config(config))  # refuses groups that do not fill a row
    return recipe


# ---------------------------------------------------------------- calibration


def calibration_windows(text: str, tokenizer: Tokenizer, limit: int, seq_length: int) -> list[Tensor]:
    """At most `limit` windows [seq_length] of token ids, spread evenly over a text; each starts as a prompt would."""
    start = tokenizer.encode("", bos=True)
    ids, length = tokenizer.encode(text, bos=False), seq_length - len(start)
    count = min(limit, len(ids) // max(length, 1))
    if count < 1 or length < 1:
        raise ValueError(f"calibration text: found {len(ids)} tokens, expected at least one window of {seq_length}")
    firsts = [i * (len(ids) - length) // max(count - 1, 1) for i in range(count)]
    return [torch.tensor(start + ids[first : first + length]) for first in firsts]


def read_windows(path: Path, tokenizer: Tokenizer | None, config: ModelConfig, limit=128, seq_length=2048) -> list[Tensor]:
    """Calibration windows of a text file; seq_length is cut to the model's context. OSError, or ValueError naming the file."""
    if tokenizer is None:
        raise ValueError("calibration needs text: found no tokenizer beside the checkpoint, expected one")
    return calibration_windows(read_text(path), tokenizer, limit, min(seq_length, config.max_position_embeddings))


def read_text(path: Path) -> str:
    """A UTF-8 text file. OSError, or ValueError naming the file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: found byte {error.object[error.start]:#x} at {error.start}, expected UTF-8 text") from None


def stage_input(layer: Layer, stage: str, x: Tensor, rope) -> Tensor:
    """What linear `stage` of a layer multiplies, [T, K], where the layer is given x [T, H]."""
    attention, eps, step = layer.attention, layer.feed_forward.eps, PrefillStep(x.shape[0])
    if stage == "attention.wqkv":
        return rms_norm(x, layer.attention_norm.weight, eps)
    q, k, v = attention._project(x, layer.attention_norm.weight, rope, step.place()[0])
    attended = step.attend(attention.layer, q, k, v, attention.window, attention.scale).flatten(1)
    if stage == "attention.wo":
        return attended
    x = rooflama.linear(attended, attention.wo, residual=x.clone())  # which may be overwritten
    if stage == "feed_forward.w13":
        return rms_norm(x, layer.ffn_norm.weight, eps)
    return rooflama.linear(x, layer.feed_forward.w13, layer.ffn_norm.weight, eps, "silu_mul")


def measure(layer: Layer, stage: str, hidden: list[Tensor], rope) -> tuple[Tensor, Tensor]:
    """Of a linear's inputs x, all windows together: the mean of x x^T [K, K] (an output's squared error has it as its Hessian)
    and that of |x| [K]."""
    columns, device = layer.get_submodule(stage).in_features, hidden[0].device
    hessian, magnitude = torch.zeros(columns, columns, device=device), torch.zeros(columns, device=device)
    for window in hidden:
        x = stage_input(layer, stage, window, rope).float()
        hessian.addmm_(x.T, x)
        magnitude += x.abs().sum(0)
    count = sum(map(len, hidden))
    return hessian.div_(count), magnitude.div_(count)


# ---------------------------------------------------------------- quantisers


def search_scale(values: Tensor, fmt: PackedFormat, cost: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
    """Scale and zero [...] of groups [..., columns] whose rounding error [..., columns] has the least cost [...].

    Clipping a group's largest values lets the others be finer: ranges from all of it down to half are tried.
    """
    best = torch.inf
    scale, zero = fit_scale(values, fmt)
    for shrink in SHRINKS:
        new_scale, new_zero = fit_scale(values, fmt, shrink)
        new = cost(decode(encode(values, new_scale, new_zero, fmt), new_scale, new_zero, fmt) - values)
        better = new < best
        best, scale = torch.where(better, new, best), torch.where(better, new_scale, scale)
        zero = None if zero is None else torch.where(better, new_zero, zero)
    return scale, zero


def round_searched(weight: Weight, fmt: PackedFormat, hessian: Tensor | None = None) -> Weight:
    """Each value to the nearest code of ranges that are searched: for the least squared error, or with a Hessian [K, K] of the
    inputs, for the least squared error of a group's part of the outputs (AWQ's clipping)."""
    if fmt.format != "int4":  # clipping does not pay where a code is this fine
        return weight.round_to_nearest(fmt)
    groups = weight.dequantized().float().unflatten(1, (fmt.num_groups(weight.in_features), -1))
    cost = lambda error: error.square().sum(-1)
    if hessian is not None:
        size = groups.shape[-1]
        blocks = torch.stack([hessian[i : i + size, i : i + size] for i in range(0, len(hessian), size)])
        cost = lambda error: (torch.einsum("ngc,gcd->ngd", error, blocks) * error).sum(-1)
    scale, zero = search_scale(groups, fmt, cost)
    return weight.quantized(fmt, encode(groups, scale, zero, fmt).flatten(1), scale, zero)


def gptq(weight: Weight, hessian: Tensor, fmt: PackedFormat, percdamp: float = 0.01, blocksize: int = 128) -> Weight:
    """GPTQ (Frantar et al. 2022, algorithm 1): column by column, each one's rounding error is made up for by those to come.

    hessian [K, K]: mean of x x^T. ValueError where it is not positive definite in spite of the damping.
    """
    w, K = weight.dequantized().float().clone(), weight.in_features
    damped = hessian + torch.eye(K, device=w.device) * (percdamp * hessian.diagonal().mean())
    dead = hessian.diagonal() == 0  # inputs that are always 0: whatever their weights, nothing changes
    damped[dead, dead] = 1.0
    w[:, dead] = 0.0
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        inverse = torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError:
        raise ValueError(f"GPTQ: the inputs' Hessian is not positive definite: raise percdamp, {percdamp}") from None

    group = fmt.group_size or K
    block = -(-blocksize // group) * group if fmt.group_size else blocksize  # whole groups: a scale is fitted to updated values
    codes, scales, zeros = [], [], []
    for start in range(0, K, block):
        stop = min(start + block, K)
        part, factor, errors = w[:, start:stop], inverse[start:stop, start:stop], torch.empty_like(w[:, start:stop])
        for i in range(stop - start):
            if (first := start + i) % group == 0:
                scale, zero = search_scale(w[:, first : first + group], fmt, lambda error: error.square().sum(-1))
                scales.append(scale)
                zeros.append(zero)
            codes.append(encode(part[:, i : i + 1], scale, zero, fmt))
            errors[:, i] = (part[:, i] - decode(codes[-1], scale, zero, fmt)[:, 0]) / factor[i, i]
            part[:, i + 1 :] -= errors[:, i : i + 1] * factor[i, i + 1 :]
        w[:, stop:] -= errors @ inverse[start:stop, stop:]
    zero = None if fmt.symmetric else torch.stack(zeros, 1)
    return weight.quantized(fmt, torch.cat(codes, 1), torch.stack(scales, 1), zero)


def awq_scale(weight: Weight, hessian: Tensor, inputs: Tensor, columns: Tensor, fmt: PackedFormat) -> Tensor:
    """AWQ (Lin et al. 2023): the scale [K] of input channels that costs the outputs least.

    Weights are multiplied by it before they are rounded: channels with large inputs are rounded more finely. Tried are 1
    and inputs ** a / columns ** (1 - a) for a in [0, 1), of mean magnitudes of inputs and of weights' columns [K] (as AutoAWQ
    does; the paper has the inputs alone). hessian [K, K]: mean of x x^T.
    """
    w = weight.dequantized().float()
    best, chosen = float("inf"), None
    for i in range(-1, AWQ_STEPS):
        scale = torch.ones_like(inputs)
        if i >= 0:
            scale = inputs.clamp(min=1e-4) ** (i / AWQ_STEPS) / columns.clamp(min=1e-6) ** (1 - i / AWQ_STEPS)
            scale = scale / (scale.max() * scale.min()).sqrt()
        groups = (w * scale).unflatten(1, (fmt.num_groups(w.shape[1]), -1))
        fitted = fit_scale(groups, fmt)
        error = decode(encode(groups, *fitted, fmt), *fitted, fmt).flatten(1) / scale - w
        loss = (error @ hessian * error).sum().item()  # sum over outputs of the mean squared error
        if loss < best:
            best, chosen = loss, scale
    return chosen


def fold_scale(layer: Layer, stage: str, scale: Tensor) -> None:
    """Multiply a linear's columns by scale [K], and divide what gives their inputs: the layer computes what it did."""
    attention, mlp = layer.attention, layer.feed_forward
    weight = layer.get_submodule(stage)
    if stage in ("attention.wqkv", "feed_forward.w13"):
        gain = (layer.attention_norm if stage == "attention.wqkv" else layer.ffn_norm).weight
        old = gain.float().clone()
        gain.copy_(old / scale)
        scale = torch.where(gain == 0, 1.0, old / gain.float())  # as it was rounded
    elif stage == "attention.wo":
        c = attention.config
        of_v = scale.view(c.num_kv_heads, -1, c.head_dim)[:, 0].flatten()  # the query heads of a group share one
        rows = slice(c.q_size + c.kv_size, None)
        attention.wqkv.weight[rows].div_(of_v[:, None])
        if attention.wqkv.bias is not None:
            attention.wqkv.bias[rows].div_(of_v)
    else:
        mlp.w13.weight[weight.in_features :].div_(scale[:, None])
    weight.weight.mul_(scale)


# ---------------------------------------------------------------- layer by layer


def quantize_layer(layer: Layer, recipe: Recipe, hidden: list[Tensor], rope) -> None:
    """Replace a layer's Weights. hidden: what calibration gives it, [T, H] a window; empty without calibration."""
    fmt, c = recipe.layers, layer.attention.config
    if recipe.method == "rtn":
        for stage in STAGES:
            weight = layer.get_submodule(stage)
            layer.set_submodule(stage, round_searched(weight, fmt) if recipe.search else weight.round_to_nearest(fmt))
    elif recipe.method == "gptq":
        for stage in STAGES:  # the inputs of a stage are those that the quantised stages before it give
            weight, (hessian, _) = layer.get_submodule(stage), measure(layer, stage, hidden, rope)
            layer.set_submodule(stage, gptq(weight, hessian, fmt, recipe.percdamp, recipe.blocksize))
    else:
        measured = {stage: measure(layer, stage, hidden, rope) for stage in STAGES}
        for stage, (hessian, magnitude) in measured.items():
            weight = layer.get_submodule(stage)
            magnitudes = [magnitude, weight.weight.float().abs().mean(0)]
            if stage == "attention.wo":  # the query heads of a group have one v to fold their scale into
                heads = [m.view(c.num_kv_heads, -1, c.head_dim) for m in magnitudes]
                magnitudes = [m.mean(1, keepdim=True).expand_as(m).flatten() for m in heads]
            scale = awq_scale(weight, hessian, *magnitudes, fmt)
            fold_scale(layer, stage, scale)
            hessian.div_(scale).div_(scale[:, None])  # of the inputs as they are now
        for stage, (hessian, _) in measured.items():
            layer.set_submodule(stage, round_searched(layer.get_submodule(stage), fmt, hessian))


def quantize_layers(
    config: ModelConfig, layers: Iterable[Layer], recipe: Recipe, hidden: list[Tensor], progress: bool
) -> Iterator[Layer]:
    """Quantise layers one after the other, as they come; hidden: the embedded calibration windows, used up."""
    if recipe.method != "rtn" and not hidden:
        raise ValueError(f"mode {recipe.mode}: found no calibration text, expected some (it needs a tokenizer)")
    rope = rope_tables(config, max(map(len, hidden)), hidden[0].device) if hidden else None
    layer_bytes = sum(spec.num_bytes for name, spec in tensor_specs(config).items() if name.startswith("layers.0."))
    with checkpoint.progress_line(f"quantize {recipe.mode}", layer_bytes * config.num_layers, progress) as add:
        for layer in layers:
            quantize_layer(layer, recipe, hidden, rope)
            for i, x in enumerate(hidden):
                hidden[i] = layer(x, rope, PrefillStep(x.shape[0]))
            add(layer_bytes)
            yield layer


@torch.no_grad()
def quantize_model(model: Transformer, mode: str, windows: list[Tensor] = (), progress: bool = False, **options) -> None:
    """Quantise a loaded model in place. windows: calibration token ids [T] each, for GPTQ and AWQ; options of make_recipe."""
    recipe = make_recipe(mode, model.config, **options)
    hidden = [model.embed(window.to(model.norm.weight.device)) for window in windows] if recipe.method != "rtn" else []
    for _ in quantize_layers(model.config, model.layers, recipe, hidden, progress):
        pass
    if recipe.head:
        model.output = round_searched(model.head, recipe.head)
    model.config = recipe.config(model.config)


def quantize_at_load(model: Transformer, mode: str, tokenizer: Tokenizer | None, progress: bool = True) -> None:
    """What `generate.py --quantize MODE` does: everything by default."""
    windows = []
    if mode in MODES and MODES[mode][1] != "rtn":
        windows = read_windows(CALIBRATION_FILE, tokenizer, model.config)
    quantize_model(model, mode, windows, progress)


def quantize_checkpoint(
    source: Source, output: Path, recipe: Recipe, windows: list[Tensor] = (), device="cpu", about=None, name="", progress=True
) -> int:
    """Write a quantised copy of a plain checkpoint, read layer by layer; returns the bytes of its tensors.

    about: what config.json shall say of the quantisation beside method, mode and formats. name: kept as the source.
    """
    about = {"method": recipe.method, "mode": recipe.mode} | (about or {})
    options = {"source": name or str(source.directory), "companions": source.directory, "quantization": about}
    windows = windows if recipe.method != "rtn" else []
    with contextlib.closing(_quantized_tensors(source, recipe, windows, torch.device(device), progress)) as tensors:
        return checkpoint.save_checkpoint(output, recipe.config(source.config), tensors, progress=False, **options)


@torch.no_grad()
def _quantized_tensors(source: Source, recipe: Recipe, windows, device, progress) -> Iterator[tuple[str, Tensor]]:
    """A quantised checkpoint's tensors in their order; the device holds one layer and the calibration's activations."""
    config, stream = source.config, finite_tensors(source, source.config.dtype)
    names = list(tensor_specs(recipe.config(config)))
    name, embedding = next(stream)
    yield name, embedding
    hidden = [embedding[window].to(device) for window in windows]

    def read_layers():
        for i in range(config.num_layers):
            layer = Layer(config, i, device="meta", dtype=config.dtype)
            tensors = itertools.islice(stream, len(layer.state_dict()))
            state = {name.removeprefix(f"layers.{i}."): tensor.to(device) for name, tensor in tensors}
            layer.load_state_dict(state, assign=True)
            yield layer

    for i, layer in enumerate(quantize_layers(config, read_layers(), recipe, hidden, progress)):
        state = {f"layers.{i}.{name}": tensor for name, tensor in layer.state_dict().items()}
        yield from ((name, state[name].cpu()) for name in names if name in state)
    yield next(stream)  # the final norm
    if config.tie_word_embeddings and recipe.head is None:
        return
    head = Weight(config.vocab_size, config.hidden_size, device="meta", dtype=config.dtype)
    plain = embedding if config.tie_word_embeddings else next(stream)[1]
    head.load_state_dict({"weight": plain.to(device)}, assign=True)
    if recipe.head:
        head = round_searched(head, recipe.head)
    yield from ((f"output.{name}", tensor.cpu()) for name, tensor in head.state_dict().items())


# ---------------------------------------------------------------- command line


CALIBRATED = tuple(mode for mode, (_, method, _) in MODES.items() if method != "rtn")
OPTIONS = {  # flags with a default that not every mode has a use for: (default, modes)
    "groupsize": (128, ("int4", *CALIBRATED)),
    "calibration_file": (CALIBRATION_FILE, CALIBRATED),
    "calibration_limit": (128, CALIBRATED),
    "calibration_seq_length": (2048, CALIBRATED),
    "percdamp": (0.01, ("int4-gptq",)),
    "blocksize": (128, ("int4-gptq",)),
}


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    flag = parser.add_argument
    flag("--checkpoint_path", required=True, help="a directory of any layout, or a hub name like owner/model")
    flag("--output_dir", type=Path, help="default: beside the checkpoint, its name with the mode and the label behind")
    flag("--mode", "-q", choices=MODES, default="int8", help="format of the layers, and the quantiser (default int8)")
    flag("--groupsize", type=int, choices=GROUP_SIZES["int4"], help="int4: columns that share a scale (default 128)")
    flag("--asymmetric", action="store_true", help="int4: with zero points")
    flag("--no_search", dest="search", action="store_false", help="mode int4: do not look for better ranges than the whole")
    flag("--quantize_head", choices=("int8", "int4", "fp8", "none"), help="default: fp8 for mode fp8, else int8")
    flag("--calibration_file", type=Path, help="int4-gptq, int4-awq: text (default: the start of the demo model's)")
    flag("--calibration_limit", type=int, help="likewise: windows of text at most (default 128)")
    flag("--calibration_seq_length", type=int, help="likewise: tokens of a window, the model's context at most (default 2048)")
    flag("--percdamp", type=float, help="int4-gptq: damping of the Hessian (default 0.01)")
    flag("--blocksize", type=int, help="int4-gptq: columns of a block (default 128)")
    flag("--label", default="", help="put at the end of the output's name and into its config.json")
    flag("--revision", help="of the hub's repository: a branch, tag or commit")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flag("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(underscored(argv))
    if not args.search and args.mode != "int4":
        parser.error(f"--no_search: found with mode {args.mode}, expected int4")
    for name, (default, modes) in OPTIONS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.mode not in modes and not (name == "groupsize" and args.quantize_head == "int4"):
            parser.error(f"--{name}: found with mode {args.mode}, expected {' or '.join(modes)}")
    check_least(parser, args, calibration_limit=1, calibration_seq_length=1)
    if "/" in args.label:
        parser.error(f"--label: found {args.label!r}, expected the end of a directory's name, without /")
    return args


def run(args: argparse.Namespace) -> None:
    device = parse_device(args.device)
    directory = resolve(args.checkpoint_path, args.revision)
    source = open_source(directory)
    options = {"groupsize": args.groupsize, "asymmetric": args.asymmetric, "head": args.quantize_head, "search": args.search}
    recipe = make_recipe(args.mode, source.config, **options, percdamp=args.percdamp, blocksize=args.blocksize)
    about, windows = {"label": args.label}, []
    if recipe.method != "rtn":
        limits = (args.calibration_limit, args.calibration_seq_length)
        tokenizer = load_tokenizer(directory, source.config.vocab_size, source.config.model_type)
        windows = read_windows(args.calibration_file, tokenizer, source.config, *limits)
        about["calibration"] = {"file": args.calibration_file.name, "windows": len(windows), "seq_length": len(windows[0])}
    if recipe.method == "gptq":
        about |= {"percdamp": args.percdamp, "blocksize": args.blocksize}
    output = args.output_dir or Path(f"{directory.resolve()}-{args.mode}{args.label}")
    num_bytes = quantize_checkpoint(source, output, recipe, windows, device, about, args.checkpoint_path)
    plain_bytes = sum(spec.num_bytes for spec in tensor_specs(source.config).values())
    what = f"layers {recipe.layers} ({recipe.method}), head {recipe.head or 'plain'}"
    done = f"wrote {output}: {what}, {num_bytes / 1e9:.3f} GB ({plain_bytes / 1e9:.3f} GB before)"
    print(*source.notes, done, sep="\n", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    return report_errors(lambda: run(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
