"""What a model can do on a card, from first principles: the bytes, the FLOPs and the time of every stage of inference.

    python scripts/roofline.py llama-3.1-8b                              every card of the table, a line each
    python scripts/roofline.py llama-3.1-8b --gpu h200                   stage by stage: what bounds it, and by how much
    python scripts/roofline.py llama-3.1-8b --gpu h200 --double_batch    double the batch: does the time grow? (--measure: here)
    python scripts/roofline.py llama-3.1-8b --measured benchmarks/*.jsonl --plot roofline.png

The whole theory (the rest of this file is its bookkeeping):

1. FLOPs. A linear layer multiplies and adds once per weight and token: 2 N K for a weight [N, K] [1]. Attention multiplies each
   query head by every key that it sees and adds up as many values: 4 D a head and key [1]. Prefill sees T (T + 1) / 2 pairs;
   its last layer makes q, k and v of every token, and from there on works for the last one alone, which is all that is read.
2. Bytes. One step reads every weight once, however many tokens share the read. It reads K and V of every cached token of every
   sequence: 2 (K and V) x layers x Hkv x D x 2 bytes a token [2]. A stage's input and output rows are small beside these.
3. The roofline [3]. Memory and arithmetic work at the same time, so a stage takes max(bytes / bandwidth, FLOPs / peak). Its
   intensity is FLOPs / bytes; the ridge is peak / bandwidth (H200: 790 TFLOP/s / 4.44 TB/s = 178 FLOP a byte). Below the ridge
   a stage is memory-bound, above it compute-bound.
4. So decode is slow, and a batch is free: a linear's intensity is 2 B / (bytes of a weight), B FLOP a byte in bf16, and up to
   about 178 sequences on an H200 cost what one costs. Attention never gets there: every sequence brings K and V of its own, so
   its intensity stays at Hq / Hkv, 4 for most Llamas, for any batch. Prefill has thousands of tokens a weight: compute-bound.
5. Overhead. A kernel that has nothing to do still takes about 2 us, so stage time = max(...) + 2 us x kernels. Small models at
   batch 1 are bound by this: it is why this engine runs five kernels a layer in one CUDA graph.
6. Quantising divides the bytes, so it divides decode's time. Weight-only formats still multiply in bf16: prefill gains nothing.
   With --activation_dtype fp8, prompts' products with fp8 weights are at the card's fp8 peak, twice that of bf16.
7. Capacity. What weights leave of the memory, divided by a sequence's K and V, is the largest batch.

It leaves out: caches (the 60 MB L2 keeps nothing from step to step), the host, kernels that stop short of the roof, elementwise
kernels that do not overlap with products. So it is a bound; expect a good engine within 25% of it in decode. Norms, biases and
scales are counted, everything unquantised is 16 bits wide, and int4 has a 16-bit scale for every 128 weights.

[1] Kaplan et al. 2020, arXiv:2001.08361, section 2.1. [2] Pope et al. 2022, arXiv:2211.05102, section 2; Chen, "Transformer
Inference Arithmetic", 2022. [3] Williams, Waterman, Patterson 2009, CACM 52(4).
Letters: B sequences, T prompt tokens, S cached tokens, Hq/Hkv heads, D head size, N/K matmul sizes, V vocabulary.
1 GB = 1e9 bytes, 1 GiB = 2**30.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from checkpoint import read_json
from convert_hf_checkpoint import report_errors, underscored
from kernels import MAX_ROWS
from kv_cache import CACHE_DTYPES, bytes_per_row
from model import ACTIVATION_DTYPES, SHAPES, ModelConfig

KERNEL_SEC = 2e-6  # least time of a kernel in a CUDA graph: 1.7 us with programmatic dependent launch, 2.05 without (H200)
USABLE_MEMORY = 0.9  # of the card: the rest is the driver's, the CUDA context's and the largest activations'
TOLERANCE = 0.25  # measured / predicted may be this far from 1
MAX_BATCH = 4096  # the ridge is looked for up to here
MEASURED_TOKENS = 64  # that --measure has each sequence generate, half before and half behind --context
MEASURED_BATCH = 512  # --measure doubles up to here

# ---------------------------------------------------------------- cards


@dataclass(frozen=True)
class Card:
    """One GPU by its data sheet (dense, float32 accumulation), and what was measured on it (None: not yet)."""

    name: str
    device: str  # what torch.cuda.get_device_name says
    sheet_bf16_tflops: float  # fp16 is the same on every card here
    sheet_fp8_tflops: float | None  # None: no fp8 units, fp8 weights multiply in bf16
    memory_gib: float  # data sheets write GB, chips come in GiB
    sheet_gbps: float
    measured_bf16_tflops: float | None = None  # of a large matmul
    measured_gbps: float | None = None  # of reading a few GB once

    @property
    def bytes_per_sec(self) -> float:
        return (self.measured_gbps or self.sheet_gbps) * 1e9

    def flops_per_sec(self, math_format: str) -> float:
        """The peak that predictions use. fp8 was measured nowhere: its data sheet times bf16's measured share."""
        bf16 = self.measured_bf16_tflops or self.sheet_bf16_tflops
        if math_format == "fp8" and self.sheet_fp8_tflops:
            return self.sheet_fp8_tflops * bf16 / self.sheet_bf16_tflops * 1e12
        return bf16 * 1e12

    def describe(self) -> str:
        rate = lambda measured, sheet: f"{measured:g} measured, {sheet:g} data sheet" if measured else f"{sheet:g} data sheet"
        return (
            f"{self.name}: {rate(self.measured_gbps, self.sheet_gbps)} GB/s; "
            f"{rate(self.measured_bf16_tflops, self.sheet_bf16_tflops)} TFLOP/s bf16; {self.memory_gib:g} GiB; "
            f"ridge {self.flops_per_sec('bf16') / self.bytes_per_sec:.0f} FLOP/byte"
        )


CARDS = {  # the makers' data sheets and the Ada whitepaper, appendix A; the 4060: 24 SMs x 512 FLOP x 2.46 GHz, as a 4090's SMs
    "a100": Card("A100 80GB SXM", "NVIDIA A100-SXM4-80GB", 312, None, 80, 2039),
    "h100": Card("H100 SXM", "NVIDIA H100 80GB HBM3", 989.4, 1978.9, 80, 3350, measured_bf16_tflops=798),
    "h200": Card("H200", "NVIDIA H200", 989.4, 1978.9, 141, 4800, measured_bf16_tflops=790, measured_gbps=4440),
    "rtx4090": Card("RTX 4090", "NVIDIA GeForce RTX 4090", 165.2, 330.3, 24, 1008),
    "rtx4060": Card("RTX 4060", "NVIDIA GeForce RTX 4060", 30.2, 60.5, 8, 272),
    "l4": Card("L4", "NVIDIA L4", 121, 242.5, 24, 300),
    "mi300x": Card("MI300X", "AMD Instinct MI300X", 1307.4, 2614.9, 192, 5300),
}


def find_card(name: str, source: str = "--gpu") -> Card:
    """By its key, its name or its device name; case, spaces and dashes do not count."""
    plain = lambda text: "".join(filter(str.isalnum, text.lower()))
    for key, card in CARDS.items():
        if plain(name) in (key, plain(card.name), plain(card.device)):
            return card
    raise ValueError(f"{source}: found {name!r}, expected one of {', '.join(CARDS)}")


# ---------------------------------------------------------------- bytes and FLOPs


@dataclass(frozen=True)
class Format:
    """How a linear's weight is stored, and what it is multiplied in."""

    bytes_per_weight: float
    group_size: float = 0  # weights of a row that share a 16-bit scale; inf: the whole row; 0: no scale
    math: str = "bf16"

    def num_bytes(self, N: int, K: int) -> float:
        scales = max(1, K / self.group_size) if self.group_size else 0
        return N * K * self.bytes_per_weight + 2 * N * scales


FORMATS = {
    "bf16": Format(2),
    "int8": Format(1, math.inf),
    "int4": Format(0.5, 128),
    "fp8": Format(1, math.inf, "fp8"),
}


@dataclass(frozen=True)
class Model:
    """An architecture and the formats of its weights."""

    config: ModelConfig
    body: str = "bf16"  # of the layers' linears
    head: str = "bf16"
    cache: str = "auto"  # K and V, by the names of kv_cache.CACHE_DTYPES
    activations: str = "auto"  # x of prompts, of model.ACTIVATION_DTYPES: fp8 only with a body in fp8

    @property
    def kv_bytes_per_token(self) -> int:
        return bytes_per_row(self.config, CACHE_DTYPES[self.cache] or torch.bfloat16)

    @property
    def step_weight_bytes(self) -> float:
        """Weights that one decode step reads."""
        return sum(stage.weight_bytes for stage in stages(self, decode(1, 1)))

    @property
    def resident_weight_bytes(self) -> float:
        """Weights in memory: what a step reads, and the embedding table, in 16 bits, unless the head is the same one."""
        table_bytes = 2 * self.config.vocab_size * self.config.hidden_size
        return self.step_weight_bytes + (0 if self.config.tie_word_embeddings else table_bytes)


@dataclass(frozen=True)
class Work:
    """What one forward does: `tokens` new tokens of each of `sequences`, the last of which sees `context` tokens."""

    phase: str  # prefill or decode
    sequences: int  # B
    tokens: int  # a sequence: T in prefill, 1 in decode
    context: int  # S, this step's tokens included

    @property
    def rows(self) -> int:
        return self.sequences * self.tokens

    @property
    def last(self) -> "Work":
        """The same for the last token of each sequence alone."""
        return dataclasses.replace(self, tokens=1)

    def pairs(self, window: int | None) -> int:
        """Query and key pairs of one head and sequence: token t sees min(t, window) keys, itself included."""
        first = self.context - self.tokens + 1
        limit = min(window or self.context, self.context)
        growing = max(0, limit - first + 1)  # tokens that still see everything before them
        return growing * (first + limit) // 2 + (self.tokens - growing) * limit

    def cached(self, window: int | None) -> int:
        """Cached tokens of one sequence that are read."""
        return min(self.context, (window or self.context) + self.tokens - 1)


def decode(batch_size: int, context: int) -> Work:
    return Work("decode", batch_size, 1, context)


def prefill(batch_size: int, prompt_len: int) -> Work:
    return Work("prefill", batch_size, prompt_len, prompt_len)


@dataclass(frozen=True)
class Stage:
    """One stage of a forward, all layers together: what it moves and computes, and so how long a card takes for it."""

    name: str
    kernels: int
    weight_bytes: float
    kv_bytes: float
    activation_bytes: float  # its input and output rows
    flops: float
    math: str = "bf16"

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.kv_bytes + self.activation_bytes

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes

    @property
    def overhead_sec(self) -> float:
        return self.kernels * KERNEL_SEC

    def memory_sec(self, card: Card) -> float:
        return self.bytes / card.bytes_per_sec

    def compute_sec(self, card: Card) -> float:
        return self.flops / card.flops_per_sec(self.math)

    def roof_sec(self, card: Card) -> float:
        return max(self.memory_sec(card), self.compute_sec(card))

    def sec(self, card: Card) -> float:
        return self.roof_sec(card) + self.overhead_sec

    def bound(self, card: Card) -> str:
        sec = {"memory": self.memory_sec(card), "compute": self.compute_sec(card), "overhead": self.overhead_sec}
        return max(sec, key=sec.get)


def stages(model: Model, work: Work) -> list[Stage]:
    """The stages of one forward, in order."""
    c, L, H, F = model.config, model.config.num_layers, model.config.hidden_size, model.config.intermediate_size
    qkv, V = c.q_size + 2 * c.kv_size, c.vocab_size
    M, B = work.rows, work.sequences  # the head works on the last token of each sequence alone,
    works = [work] * (L - 1) + [work.last]  # and so does the last layer, once it has q, k and v
    rows = sum(each.rows for each in works)
    fused = work.phase == "decode" and M <= MAX_ROWS  # else norms, RoPE and SiLU are kernels beside the products
    vectors = H + qkv * c.qkv_bias + 2 * c.head_dim * c.qk_norm  # the norm, the biases, the qk-norms

    def linear(name, N, K, rows, layers, kernels, values, vectors=0, format_name=model.body):
        """rows: of all layers; values: numbers that go in and come out for each, 16 bits wide; vectors: 16-bit parameters
        beside the weight."""
        weight = FORMATS[format_name]
        weight_bytes, activation_bytes = weight.num_bytes(N, K) + 2 * vectors, 2 * rows * values
        flops = 2 * rows * N * K
        in_fp8 = model.activations == "fp8" and work.phase == "prefill" and name != "head"
        math_format = weight.math if in_fp8 else "bf16"
        return Stage(name, layers * kernels, layers * weight_bytes, 0, activation_bytes, flops, math_format)

    kv_bytes = B * sum(each.cached(c.layer_window(i)) for i, each in enumerate(works)) * model.kv_bytes_per_token / L
    attention_flops = 4 * c.q_size * B * sum(each.pairs(c.layer_window(i)) for i, each in enumerate(works))
    return [
        Stage("embedding", 1, 0, 0, 2 * M * 2 * H, 0),  # a row gathered for each token
        linear("qkv", qkv, H, L * M, L, 1 if fused else 3, H + qkv, vectors),
        Stage("attention", L, 0, kv_bytes, 2 * rows * 2 * c.q_size, attention_flops),
        linear("output", H, c.q_size, rows, L, 1, c.q_size + 2 * H),  # reads and writes the residual
        linear("gate/up", 2 * F, H, rows, L, 1 if fused else 3, H + F, H),
        linear("down", H, F, rows, L, 1, F + 2 * H),
        linear("head", V, H, B, 1, 1 if fused else 3, H + 2 * V, H, model.head),  # logits are 32 bits wide
    ]


def largest_batch(card: Card, model: Model, context: int) -> int:
    """Sequences of `context` tokens whose K, V and float32 logits fit beside the weights; 0: none does."""
    free_bytes = USABLE_MEMORY * card.memory_gib * 2**30 - model.resident_weight_bytes
    return max(0, int(free_bytes // (context * model.kv_bytes_per_token + 4 * model.config.vocab_size)))


# ---------------------------------------------------------------- time


@dataclass(frozen=True)
class Prediction:
    """One forward on one card. Stages run one after the other, so everything is a sum over them."""

    card: Card
    work: Work
    stages: tuple[Stage, ...]

    @property
    def flops(self) -> float:
        return sum(stage.flops for stage in self.stages)

    @property
    def intensity(self) -> float:
        return self.flops / sum(stage.bytes for stage in self.stages)

    @property
    def floor_sec(self) -> float:
        """Without overhead: the sum of max(bytes / bandwidth, FLOPs / peak)."""
        return sum(stage.roof_sec(self.card) for stage in self.stages)

    @property
    def sec(self) -> float:
        return sum(stage.sec(self.card) for stage in self.stages)

    @property
    def tokens_per_sec(self) -> float:
        """New tokens in decode, prompt tokens in prefill."""
        return self.work.rows / self.sec

    @property
    def shares(self) -> dict[str, float]:
        """How much of the time goes to memory-bound roofs, to compute-bound roofs, and to kernels as such."""
        limits = [(stage.memory_sec(self.card), stage.compute_sec(self.card)) for stage in self.stages]
        memory_sec = sum(memory for memory, compute in limits if memory >= compute)
        compute_sec = sum(compute for memory, compute in limits if memory < compute)
        total_sec = self.sec
        overhead = 1 - (memory_sec + compute_sec) / total_sec
        return {"memory": memory_sec / total_sec, "compute": compute_sec / total_sec, "overhead": overhead}

    @property
    def bound(self) -> str:
        shares = self.shares
        return max(shares, key=shares.get)


def predict(card: Card, model: Model, work: Work) -> Prediction:
    return Prediction(card, work, tuple(stages(model, work)))


def doubling(card: Card, model: Model, context: int) -> list[Prediction]:
    """Decode steps of batch 1, 2, 4, ... 1024."""
    return [predict(card, model, decode(2**i, context)) for i in range(11)]


def ridge_batch(card: Card, model: Model, context: int) -> tuple[int | None, int | None]:
    """The smallest batch at which decode's linears, and the whole step, are compute-bound; None: not up to MAX_BATCH."""
    linears = step = None
    for batch in range(1, MAX_BATCH + 1):
        prediction = predict(card, model, decode(batch, context))
        products = [stage for stage in prediction.stages if stage.weight_bytes]
        if linears is None and sum(s.compute_sec(card) for s in products) >= sum(s.memory_sec(card) for s in products):
            linears = batch
        if step is None and prediction.bound == "compute":
            step = batch
        if linears and step:
            break
    return linears, step


# ---------------------------------------------------------------- measured runs


@dataclass(frozen=True)
class Run:
    """One measured run of scripts/benchmark.py beside its prediction, at the context of the middle of its decode."""

    label: str
    batch_size: int
    prompt_len: int
    max_new_tokens: int
    measured_ms: float  # a decode step: TPOT, the median of the runs
    predicted: Prediction

    @property
    def ratio(self) -> float:
        return self.measured_ms / (self.predicted.sec * 1e3)

    @property
    def is_off(self) -> bool:
        return abs(self.ratio - 1) > TOLERANCE


def read_runs(path: Path, card: Card | None) -> list[Run]:
    """The runs of a JSONL file that have a TPOT (others are counted on stderr). `card` serves lines that name no device."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:  # not JSON, or not UTF-8
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: found {line[:40].decode(errors='replace')!r}, expected a JSON object")
        rows.append((row, f"{path}:{number}"))
    runs = [parse_run(row, where, card) for row, where in rows if "tpot_ms" in row]
    if len(runs) < len(rows):
        print(f"{path}: {len(rows) - len(runs)} lines have no tpot_ms and are left out", file=sys.stderr)
    return runs


def parse_run(row: dict, where: str, card: Card | None = None) -> Run:
    """A record of scripts/benchmark.py, or one of another engine in its form. ValueError names the field, at `where`."""

    def require(field, value, ok, expected):
        if not ok:
            raise ValueError(f"{where}: {field}: found {value!r}, expected {expected}")
        return value

    def count(field):
        value = row.get(field)
        return require(field, value, type(value) is int and value > 0, "a positive integer")

    def format_name(field, default):
        name = row.get(field) or default
        return require(field, name, isinstance(name, str) and name in FORMATS, f"one of {', '.join(FORMATS)}")

    batch_size, prompt_len, max_new_tokens = map(count, ("batch_size", "prompt_len", "max_new_tokens"))
    times = row["tpot_ms"] if isinstance(row["tpot_ms"], dict) else {}
    field = "mean" if "mean" in times else "p50"  # the mean of a run is known of every engine, percentiles of some
    ms = times.get(field)
    require(f"tpot_ms.{field}", ms, type(ms) in (int, float) and 0 < ms < math.inf, "milliseconds")
    padding = row.get("padding_ratio") or 0.0
    require("padding_ratio", padding, type(padding) in (int, float) and 0 <= padding < 1, "a number from 0 to 1")
    if device := row.get("device") or row.get("gpu"):
        card = find_card(str(device), f"{where}: device")
    require("device", device, card, "a GPU of the table, on the line or as --gpu")
    config = load_config(str(row.get("model")), f"{where}: model")
    body = format_name("quantize", "bf16")
    head = format_name("quantize_head", body)
    cache = row.get("kv_cache_dtype") or "auto"
    require("kv_cache_dtype", cache, isinstance(cache, str) and cache in CACHE_DTYPES, f"one of {', '.join(CACHE_DTYPES)}")
    x = row.get("activation_dtype") or "auto"
    require("activation_dtype", x, x in ACTIVATION_DTYPES, f"one of {', '.join(ACTIVATION_DTYPES)}")
    label = f"{row.get('engine', 'rooflama')} {Path(row['model']).name} {formats_of(body, head, cache, x)}"
    context = round(prompt_len * (1 - padding)) + max_new_tokens // 2
    predicted = predict(card, Model(config, body, head, cache, x), decode(batch_size, context))
    return Run(label, batch_size, prompt_len, max_new_tokens, ms, predicted)


def formats_of(body: str, head: str | None, cache: str, x: str) -> str:
    """For people: of the layers' weights, and of the head's, the cache and a prompt's x what does not go without saying."""
    text = body + (f", head {head}" if head and head != body else "")
    return text + (f", {cache} cache" if cache != "auto" else "") + (f", x in {x}" if x != "auto" else "")


def check_activations(dtype: str, body: str) -> None:
    """ValueError: x is to be in fp8 beside weights that are not."""
    if dtype == "fp8" and body != "fp8":
        raise ValueError(f"--activation_dtype: found fp8 with weights in {body}, expected --quantize fp8 with it")


def load_config(name: str, source: str = "MODEL") -> ModelConfig:
    """A shape that the project knows by name, or the config.json of a checkpoint directory."""
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name) / "config.json"
    if not path.exists():
        raise ValueError(f"{source}: found {name!r}, expected a directory with a config.json or one of {', '.join(SHAPES)}")
    return ModelConfig.from_dict(read_json(path), str(path))


# ---------------------------------------------------------------- what is printed


def num(value: float) -> str:
    """Four significant digits, without an exponent, at most three decimals."""
    digits = 3 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(3, max(0, digits))}f}"


def table(header: str, rows: list[list[str]]) -> str:
    """Columns under the names in `header` (two spaces apart), as wide as their cells; all but the first to the right."""
    cells = [header.split("  "), *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        row[:] = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
    return "\n".join("  ".join(row).rstrip() for row in cells) + "\n"


def stage_table(p: Prediction) -> str:
    """One forward, stage by stage."""
    rows = []
    for s in p.stages:
        us = [num(sec * 1e6) for sec in (s.memory_sec(p.card), s.compute_sec(p.card), s.overhead_sec, s.sec(p.card))]
        rows.append([s.name, str(s.kernels), num(s.bytes / 1e6), num(s.flops / 1e9), num(s.intensity), *us, s.bound(p.card)])
    tokens = f"{p.work.context} tokens of context" if p.work.phase == "decode" else f"{p.work.tokens} tokens each"
    shares = ", ".join(f"{name} {share:.0%}" for name, share in p.shares.items())
    times = f"{num(p.sec * 1e3)} ms ({num(p.floor_sec * 1e3)} without overhead), {num(p.tokens_per_sec)} tokens/s"
    verdict = f"{num(p.intensity)} FLOP/byte, {p.bound}-bound ({shares})"
    header = "stage  kernels  MB  GFLOP  FLOP/byte  memory us  compute us  overhead us  us  bound"
    return f"{p.work.phase}, batch {p.work.sequences}, {tokens}: {times}, {verdict}\n{table(header, rows)}"


def card_table(rows: list[tuple[Prediction, Prediction, int]]) -> str:
    """A line for each card and batch: decode, prefill, the largest batch that fits."""
    cells = []
    for step, prompt, largest in rows:
        roofs = [num(step.card.bytes_per_sec / 1e9), num(step.card.flops_per_sec("bf16") / 1e12)]
        decoding = [str(step.work.sequences), num(step.sec * 1e3), num(step.tokens_per_sec), step.bound]
        prefilling = [num(prompt.sec * 1e3), num(prompt.tokens_per_sec), prompt.bound]
        fits = str(largest) + ("" if step.work.sequences <= largest else " (too small)")
        cells.append([step.card.name, *roofs, *decoding, *prefilling, fits])
    header = "card  GB/s  TFLOP/s  batch  ms a step  tokens/s  decode is  TTFT ms  prompt tok/s  prefill is  largest batch"
    return table(header, cells)


def double_batch_table(predictions: list[Prediction], largest: int, linears: int | None, step: int | None, measured) -> str:
    """Double the batch: does the time grow? `measured`: batch -> ms a step, where it was."""
    rows, before_sec = [], None
    for p in predictions:
        growth = f"x {p.sec / before_sec:.2f}" if before_sec else ""
        shares = [f"{share:.0%}" for share in p.shares.values()]
        fits = "yes" if p.work.sequences <= largest else "no"
        ms, before_ms = measured.get(p.work.sequences), measured.get(p.work.sequences // 2)
        beside = [num(ms) if ms else "", f"x {ms / before_ms:.2f}" if ms and before_ms else ""] if measured else []
        rows.append([str(p.work.sequences), num(p.sec * 1e3), growth, num(p.tokens_per_sec), *shares, p.bound, fits, *beside])
        before_sec = p.sec
    measured_names = "  measured ms  grows" if measured else ""
    never = f"at no batch up to {MAX_BATCH}: each sequence brings K and V of its own to read"
    return (
        table("batch  ms a step  time grows  tokens/s  memory  compute  overhead  bound  fits" + measured_names, rows)
        + f"Compute-bound: the linears {f'from batch {linears} on' if linears else f'at no batch up to {MAX_BATCH}'}, "
        f"the whole step {f'from batch {step} on' if step else never}. Memory holds {largest}.\n"
    )


def run_table(runs: list[Run]) -> str:
    """Predicted beside measured; runs more than 25% off are marked."""
    rows = []
    for run in runs:
        p, shape = run.predicted, f"{run.prompt_len}/{run.max_new_tokens}"
        ms = [num(p.floor_sec * 1e3), num(p.sec * 1e3), num(run.measured_ms)]
        mark = " *" if run.is_off else "  "
        rows.append([run.label, p.card.name, str(run.batch_size), shape, *ms, f"{run.ratio:.2f}{mark}", p.bound])
    close = sum(not run.is_off for run in runs)
    return (
        table("run  card  batch  in/out  floor ms  predicted ms  measured ms  ratio  bound", rows)
        + f"{close} of {len(runs)} within {TOLERANCE:.0%} of the prediction; * marks the others\n"
    )


def new_figure(path: Path):
    """An empty figure that can be saved as `path`. ValueError: it cannot, or there is no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot: found no matplotlib, expected it to be installed (pip install matplotlib)") from None
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    suffixes = [f".{name}" for name in figure.canvas.get_supported_filetypes()]
    if path.is_dir() or not path.absolute().parent.is_dir() or path.suffix.lower() not in suffixes:
        expected = f"a file that ends in {', '.join(suffixes)}, in a directory that is there"
        raise ValueError(f"--plot: found {path}, expected {expected}")
    return figure


def plot(figure, cards: list[Card], curve: list[Prediction], prompt: Prediction, title: str, runs: list[Run]) -> None:
    """The roofline chart: intensity against achieved FLOP/s. `curve`: decode steps of growing batch."""
    axes = figure.add_subplot(
        xscale="log", yscale="log", xlabel="arithmetic intensity, FLOP/byte", ylabel="FLOP/s", title=title
    )
    low, high = 0.5, 5000  # FLOP/byte
    maths = {stage.math for p in [*curve, *(run.predicted for run in runs)] for stage in p.stages}
    for i, card in enumerate(cards):
        roofs = [("bf16", "-", card.flops_per_sec("bf16"), card.bytes_per_sec)]
        if card.measured_bf16_tflops or card.measured_gbps:
            roofs.append(("bf16, data sheet", ":", card.sheet_bf16_tflops * 1e12, card.sheet_gbps * 1e9))
        if "fp8" in maths and card.sheet_fp8_tflops:
            roofs.append(("fp8", "--", card.flops_per_sec("fp8"), card.bytes_per_sec))
        for name, line, peak, rate in roofs:
            axes.plot([low, peak / rate, high], [low * rate, peak, peak], f"C{i}{line}", label=f"{card.name} {name}")
    place = lambda p, sec: (p.intensity, p.flops / sec)
    axes.plot(*zip(*(place(p, p.sec) for p in curve), strict=True), "k.-", linewidth=0.7, label="predicted decode, by batch")
    for p in curve:
        axes.annotate(str(p.work.sequences), place(p, p.sec), (3, -10), textcoords="offset points", fontsize=7)
    axes.plot(*place(prompt, prompt.sec), "k*", label=f"predicted prefill of {prompt.work.tokens} tokens")
    for i, label in enumerate(dict.fromkeys(run.label for run in runs)):
        mine, marker = [run for run in runs if run.label == label], f"C{(i + len(cards)) % 10}{'oDs^v'[i % 5]}"
        measured = [place(run.predicted, run.measured_ms / 1e3) for run in mine]
        axes.plot(*zip(*(place(run.predicted, run.predicted.sec) for run in mine), strict=True), marker, fillstyle="none")
        axes.plot(*zip(*measured, strict=True), marker, label=label)
        for run, point in zip(mine, measured, strict=True):
            text = f"{run.batch_size}{' *' if run.is_off else ''}"
            axes.annotate(text, point, (6, -4), textcoords="offset points", fontsize=7)
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(which="both", linewidth=0.3)


def as_dict(p: Prediction) -> dict:
    out = {"card": p.card.name, **dataclasses.asdict(p.work), "ms": p.sec * 1e3, "floor_ms": p.floor_sec * 1e3}
    out |= {name: getattr(p, name) for name in ("tokens_per_sec", "bound", "flops", "intensity", "shares")}
    times = lambda s: {"intensity": s.intensity, "us": s.sec(p.card) * 1e6, "bound": s.bound(p.card)}
    return out | {"stages": [dataclasses.asdict(stage) | times(stage) for stage in p.stages]}


# ---------------------------------------------------------------- command line


def positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a positive integer")
    return int(text)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help=f"a checkpoint directory, or one of {', '.join(SHAPES)}")
    parser.add_argument("--gpu", help=f"one of {', '.join(CARDS)} (default: a line for each)")
    parser.add_argument("--batch_size", type=positive, nargs="+", default=[1])
    parser.add_argument("--context", type=positive, help="tokens a decode step sees of each sequence (default: up to 2048)")
    parser.add_argument("--prompt_len", type=positive, help="tokens of each prompt (default: the context)")
    parser.add_argument("--quantize", choices=FORMATS, default="bf16", help="the layers' weights")
    parser.add_argument("--quantize_head", choices=FORMATS, help="the head's weight (default: as the layers')")
    parser.add_argument("--kv_cache_dtype", choices=CACHE_DTYPES, default="auto", help="of K and V (default: 16 bits)")
    parser.add_argument("--activation_dtype", choices=ACTIVATION_DTYPES, default="auto", help="of x in prompts' products")
    parser.add_argument("--double_batch", action="store_true", help="double the batch: does the time grow?")
    parser.add_argument(
        "--measured", type=Path, nargs="+", metavar="FILE.jsonl", help="runs of scripts/benchmark.py beside their predictions"
    )
    parser.add_argument("--measure", action="store_true", help="with --double_batch: measure it too, on this machine's GPU")
    parser.add_argument("--time_limit", type=float, default=300, metavar="SEC", help="of --measure (default 300)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="the roofline chart, with the measured runs on it")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    if args.measure and not (args.double_batch and args.gpu):
        parser.error("--measure: found alone, expected it with --double_batch and --gpu")
    return args


def as_json(args: argparse.Namespace, model: Model, pairs: list, largest: dict, ridges: dict, runs: list[Run], measured) -> str:
    beside = lambda r: {"run": r.label, "measured_ms": r.measured_ms, "ratio": r.ratio, "is_off": r.is_off}
    return json.dumps({
        "model": args.model, "quantize": model.body, "quantize_head": model.head,
        "step_weight_bytes": model.step_weight_bytes, "resident_weight_bytes": model.resident_weight_bytes,
        "kv_bytes_per_token": model.kv_bytes_per_token,
        "largest_batch": {card.name: batch for card, batch in largest.items()},
        "predictions": [as_dict(p) for pair in pairs for p in pair],
        "ridge_batch": {card.name: {"linears": linears, "step": step} for card, (linears, step) in ridges.items()},
        "double_batch": [as_dict(p) for card in ridges for p in doubling(card, model, args.context)],
        "measured_double_batch_ms": measured,
        "runs": [beside(r) | as_dict(r.predicted) for r in runs],
    })  # fmt: skip


def measure_doubling(args: argparse.Namespace, card: Card, model: Model) -> dict[int, float]:
    """Batch -> ms a decode step on this machine's GPU, for the batches of `doubling` that fit the card and the time limit."""
    import measure  # which imports this module

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if measure.card_of(device) != measure.roofline.find_card(card.name):
        found = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
        raise ValueError(f"--measure: found {found}, expected {card.device}")
    half, most = MEASURED_TOKENS // 2, min(MEASURED_BATCH, largest_batch(card, model, args.context + MEASURED_TOKENS))
    if args.context <= half:
        raise ValueError(f"--context: found {args.context}, expected more than {half} to measure")
    modes = {("bf16", "bf16"): None, ("int8", "int8"): "int8", ("fp8", "fp8"): "fp8", ("int4", "int8"): "int4"}
    if (model.body, model.head) not in modes:
        raise ValueError(
            f"--quantize_head: found {model.head} with {model.body}, expected int8 with int4, else the same to measure"
        )
    mode = modes[model.body, model.head]
    batches = [2**i for i in range(most.bit_length())]
    options = {"kv_cache_dtype": model.cache, "activation_dtype": model.activations}
    rows = [measure.Row(args.model, b, args.context - half, MEASURED_TOKENS, mode, **options) for b in batches]
    dtype = str(load_config(args.model).dtype).removeprefix("torch.")
    plan = measure.Plan(device, dtype, args.model in SHAPES, deadline=time.monotonic() + args.time_limit)
    say = lambda text: print(text, file=sys.stderr, flush=True)
    records = measure.measure("double_batch", rows, [("rooflama", "auto")], plan, say)
    return {record["batch_size"]: record["tpot_ms"]["mean"] for record in records if "tpot_ms" in record}


def run(args: argparse.Namespace) -> None:
    config = load_config(args.model)
    check_activations(args.activation_dtype, args.quantize)
    model = Model(config, args.quantize, args.quantize_head or args.quantize, args.kv_cache_dtype, args.activation_dtype)
    args.context = args.context or min(2048, config.max_position_embeddings - (MEASURED_TOKENS // 2 if args.measure else 0))
    context, prompt_len = args.context, args.prompt_len or args.context
    for flag, length in (("--context", context), ("--prompt_len", prompt_len)):
        if length > config.max_position_embeddings:
            raise ValueError(f"{flag}: found {length}, expected 1 to the model's {config.max_position_embeddings}")
    chosen = find_card(args.gpu) if args.gpu else None
    figure = new_figure(args.plot) if args.plot else None  # what cannot be drawn is known before anything is measured
    cards = [chosen] if chosen else list(CARDS.values())
    runs = [run for path in args.measured or () for run in read_runs(path, chosen)]
    measured = measure_doubling(args, chosen, model) if args.measure else {}

    both = lambda card, batch: (predict(card, model, decode(batch, context)), predict(card, model, prefill(batch, prompt_len)))
    pairs = [both(card, batch) for card in cards for batch in args.batch_size]
    largest = {card: largest_batch(card, model, context) for card in cards}
    ridges = {card: ridge_batch(card, model, context) for card in cards} if args.double_batch else {}
    if args.plot:
        shown = list(dict.fromkeys(r.predicted.card for r in runs)) or cards
        title = f"{args.model} {args.quantize}, {context} tokens of context, on {shown[0].name}"
        title += "\nmeasured runs: filled, their predictions: hollow, * more than 25% apart" if runs else ""
        plot(figure, shown, doubling(shown[0], model, context), both(shown[0], 1)[1], title, runs)
        figure.savefig(args.plot, dpi=150)
        print(f"wrote {args.plot}", file=sys.stderr)
    if args.json:
        print(as_json(args, model, pairs, largest, ridges, runs, measured))
        return

    gb = [num(count / 1e9) for count in (model.resident_weight_bytes, model.step_weight_bytes)]
    kv = f"{model.kv_bytes_per_token:,} bytes of K and V a token, {context} tokens of context"
    print(f"{args.model}, {model.body}, head {model.head}: {gb[0]} GB of weights in memory, {gb[1]} GB read a step; {kv}\n")
    if chosen:
        print(f"{chosen.describe()}; the largest batch that fits is {largest[chosen]}\n")
        print(*(stage_table(p) for pair in pairs for p in pair), sep="\n")
    else:
        print(card_table([(step, prompt, largest[step.card]) for step, prompt in pairs]))
    for card, ridge in ridges.items():
        print(f"{card.name}: double the batch: does the time grow?")
        print(double_batch_table(doubling(card, model, context), largest[card], *ridge, measured))
    if args.measured:
        print(run_table(runs))


def main(argv: list[str] | None = None) -> int:
    args = parse_args(underscored(sys.argv[1:] if argv is None else argv))
    return report_errors(lambda: run(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
