"""What a run cost: the record of one, the metrics made of it, and the time that a step's bytes must take.

Owns the names and units of the metrics that users know, and the bandwidths they are divided by. Starts nothing.
"""

import math
import resource
import statistics
import sys
from dataclasses import dataclass, field

import torch

from kv_cache import bytes_per_row
from model import Transformer

# Read bandwidth in bytes/s that MBU is divided by: (measured by a 4 GiB sum, data sheet). Others: no MBU.
BANDWIDTH = {"NVIDIA H200": (4.44e12, 4.8e12), "NVIDIA H100 80GB HBM3": (None, 3.35e12)}


@dataclass
class Timing:
    """When things happened in one run of `Engine.generate`; seconds."""

    ttft_sec: float = 0.0  # until the first token of every sequence was chosen
    compile_sec: float = 0.0  # of that, not counted: capturing graphs that this run was the first to need
    prefill_tokens: int = 0  # run through the model
    kept_tokens: int = 0  # of the prompts, not run: the cache had them
    decode_sec: float = 0.0  # from then to the last step that the host read
    decode_tokens: int = 0  # emitted in that time, first tokens excluded
    step_ms: list[float] = field(default_factory=list)  # per step, each the mean of one launch
    host_sec: float = 0.0  # what launching cost the host
    context_sum: int = 0  # cached rows read, summed over steps and sequences
    steps: int = 0
    speculation: dict | None = None  # Speculator.statistics, where it drafted; step_ms is then of a token, steps are rounds
    queued_slot_steps: int = 0  # while prompts waited for a slot: slots, summed over steps
    queued_busy_steps: int = 0  # of these, slots whose sequence went on


def weight_bytes_per_step(model: Transformer) -> int:
    """Bytes of weights that one decode step reads: all but the embedding table, of which it reads a row a sequence."""
    total = sum(b.nbytes for name, b in model.named_buffers() if name not in ("cos", "sin"))
    return total if model.config.tie_word_embeddings else total - model.tok_embeddings.num_bytes


def bytes_per_step(engine, cached_rows: float) -> float:
    """Bytes that one decode step reads: all weights once, and the cached rows of all its sequences."""
    return weight_bytes_per_step(engine.model) + cached_rows * bytes_per_row(engine.model.config, engine.cache_dtype)


def floor_ms(engine, batch_size: int, context: float, bandwidth: float) -> float:
    """Time that these bytes take, with `context` rows a sequence, at `bandwidth` bytes/s."""
    return bytes_per_step(engine, batch_size * context) / bandwidth * 1e3


def metrics(engine, timing: Timing, compile_sec: float) -> dict:
    """The metrics of one run, as `--json` gives them."""
    steps_ms = sorted(timing.step_ms)
    quantile = lambda q: steps_ms[min(len(steps_ms) - 1, int(q * len(steps_ms)))] if steps_ms else None
    out = {
        "load_sec": engine.load_sec,
        "compile_sec": compile_sec + timing.compile_sec,
        "ttft_sec": timing.ttft_sec,
        "prefill_tok_per_sec": timing.prefill_tokens / timing.ttft_sec,
        "decode_tok_per_sec": timing.decode_tokens / timing.decode_sec if timing.decode_sec else None,
        "tpot_ms": {"p50": quantile(0.5), "p90": quantile(0.9), "p99": quantile(0.99)},
        "host_ms_per_step": timing.host_sec / timing.steps * 1e3 if timing.steps else None,
        "path": engine.path,
        "prefill_path": engine.prefiller.path,
    }
    if engine.device.type == "cuda":
        out["peak_memory_bytes"] = torch.cuda.max_memory_allocated(engine.device)
        out["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(engine.device)
    else:
        out["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if timing.speculation:  # of the bytes of a round, many are a drafter's
        out["speculation"] = timing.speculation
    elif timing.steps:
        out["bytes_per_step"] = bytes_per_step(engine, timing.context_sum / timing.steps)
        rate = out["bytes_per_step"] / (statistics.median(steps_ms) / 1e3)
        out["bandwidth_gbps"] = rate / 1e9
        name = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu"
        measured, datasheet = BANDWIDTH.get(name, (None, None))
        reachable = measured or datasheet
        out["mbu"] = reachable and rate / reachable
        out["mbu_divided_by_gbps"] = reachable and reachable / 1e9
        out["mbu_datasheet"] = datasheet and rate / datasheet
        out["device"] = name
    return out


def short(number: float) -> str:
    """Three significant digits, never as a power of ten."""
    digits = 2 - math.floor(math.log10(number)) if number > 0 else 0
    return f"{number:,.{max(0, digits)}f}"


def report(m: dict, timing: Timing) -> None:
    """The metrics of one run for a person, on stderr."""
    ms = m["tpot_ms"]
    text = (
        f"path: {m['path']}\nprefill: {m['prefill_path']}\n"
        f"load {m['load_sec']:.2f} s, compile {m['compile_sec']:.2f} s, time to first token {m['ttft_sec'] * 1e3:.1f} ms "
        f"({timing.prefill_tokens} prompt tokens, {m['prefill_tok_per_sec']:.0f} tok/s)\n"
    )
    if timing.steps:
        text += (
            f"decode {m['decode_tok_per_sec']:.1f} tok/s, {ms['p50']:.3f} ms a {'token' if timing.speculation else 'step'} "
            f"(p90 {ms['p90']:.3f}, p99 {ms['p99']:.3f}), "
            f"host {m['host_ms_per_step']:.3f} ms a {'launch' if timing.speculation else 'step'}\n"
        )
    if timing.speculation:
        text += describe_speculation(timing.speculation) + "\n"
    elif timing.steps:
        mbu = f", MBU {m['mbu']:.1%} of {m['mbu_divided_by_gbps']:.0f} GB/s ({m['device']})" if m["mbu"] else ""
        text += f"{short(m['bytes_per_step'] / 1e9)} GB a step at {short(m['bandwidth_gbps'])} GB/s{mbu}\n"
    print(f"{text}peak memory {m['peak_memory_bytes'] / 2**30:.2f} GiB", file=sys.stderr)


def describe_speculation(s: dict) -> str:
    """What Speculator.statistics says, in two lines."""
    percent = lambda share: "none" if share is None else f"{share:.1%}"
    text = f"speculation: {s['rounds']} rounds, {percent(s['acceptance_rate'])} of {s['drafted']} drafts accepted"
    if s["rounds"]:
        text += f", {s['acceptance_length']:.2f} tokens a round; by position "
        text += " ".join(map(percent, s["acceptance_by_position"]))
    launches = [f"k {k}: {n}" if k else f"plain steps and a round of one draft: {n}" for k, n in s["launches_by_k"].items()]
    text += "\nlaunches: " + ", ".join(launches)
    if s["switched_off"]:
        text += f"; switched off for the most part, {s['plain_steps']} plain steps"
    rounds = ", ".join(f"k {k}: {ms:.3f} + {s['verify_ms'][k]:.3f}" for k, ms in s["draft_ms"].items())
    text += f"; draft + verify ms {rounds}, plain {s['plain_ms']:.3f}"
    return text + (f"; {s['speedup']:.2f} times plain decoding" if s["speedup"] else "")
