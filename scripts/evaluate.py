"""How good a model is: perplexity of a text through prefill and through the decode path, and how far it is from a reference.

    python scripts/evaluate.py --text FILE --checkpoint_path quantised1 quantised2 --reference original
    python scripts/evaluate.py --text FILE --reference original --quantize int8 fp8 int4-gptq --groupsize 64 128
    python scripts/evaluate.py --text FILE --reference original --kv_cache_dtype fp8
    python scripts/evaluate.py --text FILE --reference original --quantize fp8 --activation_dtype fp8

The text is cut into windows, each read from its start without what came before. The decode path reads them token by token, as
if each had been generated: the same kernels and graphs, the true token in the place of the chosen one (teacher forcing).
Models are compared token by token (paired), +- one standard error of the windows' mean differences; so are those of one format
among each other. A table, then one JSON object as the last line of standard output.
Letters: B windows of a batch, T tokens of a window, V vocabulary.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import kernels
import quantize
from convert_hf_checkpoint import check_least, report_errors, underscored
from generate import DEMO, DTYPES, Engine, default_device
from kernels.formats import GROUP_SIZES, PLAIN_FORMATS
from kv_cache import CACHE_DTYPES
from model import ACTIVATION_DTYPES, PrefillStep
from timing import weight_bytes_per_step


@dataclass
class Score:
    """Sums over scored tokens of a model's logits, beside a reference's."""

    tokens: int = 0
    nats: float = 0.0  # negative log-likelihood
    kl: float = 0.0  # KL divergence, reference || model, nats
    same: int = 0  # tokens where both have the same largest logit

    def add(self, logits: Tensor, targets: Tensor, reference: Tensor) -> float:
        """logits, reference [n, V]; targets [n]. Returns the mean negative log-likelihood of these."""
        ours, theirs = logits.double().log_softmax(-1), reference.double().log_softmax(-1)
        self.tokens += targets.numel()
        nats = F.nll_loss(ours, targets, reduction="sum").item()
        self.nats += nats
        real = torch.isfinite(theirs)  # padding rows of the vocabulary are -inf in both
        self.kl += torch.where(real, theirs.exp() * (theirs - ours), 0.0).sum().item()
        self.same += (ours.argmax(-1) == theirs.argmax(-1)).sum().item()
        return nats / targets.numel()

    def means(self, num_bytes: int | None) -> dict:
        """Per scored token; num_bytes: of their text."""
        return {
            "perplexity": math.exp(self.nats / self.tokens),
            "bits_per_byte": self.nats / math.log(2) / num_bytes if num_bytes else None,
            "kl": self.kl / self.tokens,
            "same_top": self.same / self.tokens,
        }


# ---------------------------------------------------------------- the two paths


def cut_windows(engine: Engine, text: str, length: int, max_tokens: int) -> tuple[Tensor, int]:
    """Windows [n, length + 1] of token ids, whose last `length` are scored, and the bytes of text that those stand for."""
    start = engine.tokenizer.encode("", bos=True)[:1]
    step = length + 1 - len(start)  # without a BOS, a window's first token is only read
    ids = engine.tokenizer.encode(text, bos=False)
    count = min(max_tokens // length, len(ids) // step)
    if count < 1:
        found = f"{len(ids)} tokens" if max_tokens >= length else f"max_tokens {max_tokens}"
        raise ValueError(f"text: found {found}, expected at least a window of {length}")
    windows = torch.tensor([start + ids[i * step : (i + 1) * step] for i in range(count)])
    num_bytes = sum(len(engine.tokenizer.token_bytes(i)) for i in windows[:, 1:].flatten().tolist())
    return windows.to(engine.device), num_bytes


@torch.inference_mode()
def prefill_logits(engine: Engine, tokens: Tensor) -> Tensor:
    """tokens [T] -> the logits after each, [T, V], all in one forward."""
    model = engine.model
    model.tile_weights()
    with kernels.rounding_activations(engine.rounds_prompts):
        hidden = model(model.embed(tokens), PrefillStep(tokens.numel()))
    return model.logits(hidden)


@torch.inference_mode()
def decode_logits(engine: Engine, tokens: Tensor) -> Iterator[Tensor]:
    """tokens [B, T] -> T times the logits after one more token of each, [B, V], by decode steps."""
    engine.prepare(*tokens.shape)
    session, rows = engine.session, len(tokens)
    session.done.zero_()
    session.nan.zero_()
    session.stop_ids.fill_(-1)
    session.limit.fill_(session.max_seq_len + 1)
    for t in range(tokens.shape[1]):
        session.cache.lengths.fill_(t + 1)
        session.x[:rows] = engine.model.embed(tokens[:, t])
        engine.decoder.run(1, rows=rows)
        yield engine.decoder.logits


def paired(nats: list[float], others: list[float]) -> dict:
    """The relative change of the perplexity from `others` to `nats`, window by window, and its standard error."""
    difference = torch.tensor(nats, dtype=torch.float64) - torch.tensor(others, dtype=torch.float64)
    change = math.exp(difference.mean())
    error = difference.std().item() / len(nats) ** 0.5 if len(nats) > 1 else math.nan
    return {"change": change - 1, "stderr": change * error, "windows": len(nats)}


def evaluate(engine: Engine, reference: Engine, windows: Tensor, num_bytes: int, batch_size: int) -> dict:
    """What a model makes of windows [n, T + 1], beside a reference's prefill."""
    prefill, decode, window_nats = Score(), Score(), []
    for batch in windows.split(batch_size):
        tokens, targets = batch[:, :-1], batch[:, 1:]
        expected = torch.stack([prefill_logits(reference, row) for row in tokens])
        for row, target, theirs in zip(tokens, targets, expected, strict=True):
            window_nats.append(prefill.add(prefill_logits(engine, row), target, theirs))
        for t, logits in enumerate(decode_logits(engine, tokens)):
            decode.add(logits, targets[:, t], expected[:, t])
    c = engine.model.config
    return {
        "layers": str(c.layer_format or engine.model.layers[0].attention.wqkv.format),
        "head": engine.model.head.format,
        "cache": PLAIN_FORMATS.get(engine.cache_dtype, "fp8"),
        "activation_dtype": engine.activation_dtype,
        "bytes_per_step": weight_bytes_per_step(engine.model),
        "tokens": prefill.tokens,
        "window_nats": window_nats,
        "prefill": prefill.means(num_bytes),
        "decode": decode.means(num_bytes),
    }


# ---------------------------------------------------------------- command line


def engines(args: argparse.Namespace, options: dict) -> Iterator[tuple[str, Engine]]:
    """(name, engine) of everything to evaluate beside the reference, loaded one at a time."""
    if options["kv_cache_dtype"] != "auto":
        yield str(args.reference), Engine.load(args.reference, **options | {"activation_dtype": "auto"})
    for path in args.checkpoint_path or []:
        yield str(path), Engine.load(path, **options)
    for mode in args.quantize or []:
        is_int4, is_calibrated = mode.startswith("int4"), quantize.MODES[mode][1] != "rtn"
        for groupsize in args.groupsize if is_int4 else [128]:
            engine, windows = Engine.load(args.reference, **options), []
            if is_calibrated:
                limits = (args.calibration_limit, args.calibration_seq_length)
                windows = quantize.read_windows(args.calibration_file, engine.tokenizer, engine.model.config, *limits)
            how = {"groupsize": groupsize, "asymmetric": args.asymmetric and is_int4, "head": args.quantize_head}
            how["search"] = args.search
            quantize.quantize_model(engine.model, mode, windows, progress=True, **how)
            yield mode, engine


def table(rows: list[dict]) -> str:
    """One line a model; perplexities with their distance from the reference's prefill."""
    base = rows[0]["prefill"]["perplexity"]
    head = ("model", "layers", "head", "cache", "MB a step", "perplexity", "bits/byte", "KL", "same top")
    head += ("decode: perplexity", "KL", "same top")
    cells = [head]
    for row in rows:
        layers = row["layers"] + (", x fp8" if row["activation_dtype"] == "fp8" else "")
        line = [row["name"], layers, row["head"], row["cache"], f"{row['bytes_per_step'] / 1e6:.3f}"]
        for path in ("prefill", "decode"):
            p = row[path]
            bits = [f"{p['bits_per_byte']:.4f}"] if path == "prefill" else []
            error = f" ± {row['paired']['stderr']:.2%}" if path == "prefill" and "paired" in row else ""
            change = f"{p['perplexity']:.4f} ({p['perplexity'] / base - 1:+.2%}{error})"
            line += [change, *bits, f"{p['kl']:.6f}", f"{p['same_top']:.2%}"]
        cells.append(line)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    flag = parser.add_argument
    flag("--text", type=Path, required=True, help="a UTF-8 text file")
    flag("--skip", type=float, default=0.0, help="part of the text that is left out at its start (0.9: the last tenth is read)")
    flag("--reference", type=Path, default=DEMO, help="a plain checkpoint (default: the demo model); it is the first row")
    flag("--checkpoint_path", type=Path, nargs="+", help="checkpoints to evaluate beside it")
    flag("--quantize", nargs="+", choices=quantize.MODES, metavar="MODE", help="quantise the reference in memory, so")
    flag("--groupsize", type=int, nargs="+", choices=GROUP_SIZES["int4"], help="of --quantize int4 (default 128)")
    flag("--asymmetric", action="store_true", help="of --quantize int4")
    flag("--no_search", dest="search", action="store_false", help="of --quantize int4")
    flag("--quantize_head", choices=("int8", "int4", "fp8", "none"), help="of --quantize")
    of_calibration = "of --quantize int4-gptq and int4-awq, as in quantize.py"
    for name, kind in (("file", Path), ("limit", int), ("seq_length", int)):
        flag(f"--calibration_{name}", type=kind, help=of_calibration)
    flag("--kv_cache_dtype", choices=CACHE_DTYPES, default="auto", help="of all but the first row; prefill reads no cache")
    where = "of x in prefill, of --checkpoint_path's and --quantize's rows: all of fp8"
    flag("--activation_dtype", choices=ACTIVATION_DTYPES, default="auto", help=where)
    flag("--window", type=int, default=512, help="tokens of a window")
    flag("--max_tokens", type=int, default=2**31, help="tokens scored at most")
    flag("--batch_size", type=int, default=8, help="windows at once in the decode path")
    flag("--compile", action="store_true", help="the fast decode path, as in generate.py")
    flag("--device", default=default_device())
    flag("--dtype", choices=DTYPES, help="default: the checkpoint's")
    flag("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(underscored(argv))
    check_least(parser, args, window=1, max_tokens=1, batch_size=1)
    calibration = ("calibration_file", "calibration_limit", "calibration_seq_length")
    of_quantize = {name: getattr(args, name) for name in ("groupsize", "asymmetric", "quantize_head", *calibration)}
    for name, given in (of_quantize | {"no_search": not args.search}).items():
        if given and not args.quantize:
            parser.error(f"--{name}: found without --quantize, expected both")
    for name in calibration:
        if getattr(args, name) is None:
            setattr(args, name, quantize.OPTIONS[name][0])
        elif not set(args.quantize) & set(quantize.CALIBRATED):
            parser.error(
                f"--{name}: found with --quantize {' '.join(args.quantize)}, expected int4-gptq or int4-awq among them"
            )
    args.groupsize = args.groupsize or [128]
    if args.activation_dtype != "auto" and not (args.quantize or args.checkpoint_path):
        parser.error(f"--activation_dtype: found {args.activation_dtype}, expected --quantize fp8 or --checkpoint_path with it")
    if not 0 <= args.skip < 1:
        parser.error(f"--skip: found {args.skip}, expected a number from 0 to below 1")
    return args


def run(args: argparse.Namespace) -> None:
    options = {"device": args.device, "dtype": DTYPES.get(args.dtype), "decode_mode": "auto" if args.compile else "eager"}
    options["max_seq_len"] = args.window  # no more of the cache than is read
    others = options | {"kv_cache_dtype": args.kv_cache_dtype, "activation_dtype": args.activation_dtype}
    text = quantize.read_text(args.text)
    reference = Engine.load(args.reference, **options)
    if reference.tokenizer is None:
        raise ValueError(f"{args.reference}: found no tokenizer, expected one")
    try:
        windows, num_bytes = cut_windows(reference, text[int(len(text) * args.skip) :], args.window, args.max_tokens)
    except ValueError as error:
        raise ValueError(f"{args.text}: {error}") from None
    rows = []
    for name, engine in itertools.chain([(str(args.reference), reference)], engines(args, others)):
        rows.append({"name": name} | evaluate(engine, reference, windows, num_bytes, args.batch_size))
        print(f"{name}: perplexity {rows[-1]['prefill']['perplexity']:.4f}", file=sys.stderr)
    pairs = []
    for a, b in itertools.combinations(rows, 2):
        result = paired(b["window_nats"], a["window_nats"])
        if a is rows[0]:
            b["paired"] = result
        elif a["layers"] == b["layers"]:
            pairs.append({"names": [b["name"], a["name"]], "layers": a["layers"]} | result)
    print(table(rows))
    for p in pairs:
        what = f"perplexity {p['change']:+.3%} ± {p['stderr']:.3%} over {p['windows']} windows"
        print(f"{p['names'][0]} against {p['names'][1]}, {p['layers']}: {what}")
    for row in rows:
        del row["window_nats"]
    out = {"text": str(args.text), "window": args.window, "scored_bytes": num_bytes, "rows": rows, "pairs": pairs}
    print(json.dumps(out))


def main(argv: list[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    return report_errors(lambda: run(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
