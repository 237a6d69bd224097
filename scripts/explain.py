"""Where a decode step's time goes, from a trace of a real run: per class of kernels, beside what their bytes must take.

Kernels overlap (each is launched while the one before it still runs), so their durations add up to more than the step. What is
counted is exposed time: of each kernel the time from when everything before it was over, or from its own start if that was
later, until its end. Exposed times and gaps (no kernel running) add up to the step exactly.
"""

import dataclasses
import itertools
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from roofline import Prediction, num, table

from generate import STEPS_PER_GRAPH, Engine
from sampling import SamplingParams

GRAPHS_TRACED = 6  # launches of a graph, the first of which is left out: it waited for the prompt
STAGES = {"qkv": "qkv", "attention": "attention", "output": "wo", "gate/up": "gate/up", "down": "down", "head": "head"}
ATTENTION = re.compile("flash|fmha|attention", re.IGNORECASE)
PRODUCT = re.compile("linear|qkv|gate_up|gemm|gemv|nvjet|matmul|cutlass|_mm_|xmma", re.IGNORECASE)
PRODUCTS_SUM = re.compile("splitKreduce")  # cuBLAS' second kernel of a product
FOR_THE_HOST = re.compile("^Memcpy DtoH|CatArray|Memcpy.*Device -> Pinned")


@dataclass(frozen=True)
class Span:
    """One kernel or copy on the device; microseconds."""

    start: float
    end: float
    name: str


def is_advance(name: str) -> bool:
    """The kernel that ends every step."""
    return "advance" in name


def classify(names: list[str]) -> list[str]:
    """The class of each kernel of one step, in their order.

    A product is known by its place: before the first attention qkv, after each one wo, gate/up, down, and then the next layer's
    qkv, or the head. Behind the head everything is the choice of the token.
    """
    attentions = [i for i, name in enumerate(names) if ATTENTION.search(name)]
    first, last = (attentions[0], attentions[-1]) if attentions else (0, -1)
    out, products = [], 0
    for i, name in enumerate(names):
        if FOR_THE_HOST.search(name):
            out.append("status for the host")
        elif is_advance(name) or (i > last and "head" in out):
            out.append("choice/advance")
        elif i in attentions:
            out.append("attention")
            products = 0
        elif "_head_kernel" in name:
            out.append("head")
        elif out and PRODUCTS_SUM.search(name):
            out.append(out[-1])
        elif not PRODUCT.search(name):
            out.append("elementwise")
        elif i < first:
            out.append("qkv")
        else:
            products += 1
            after = {1: "wo", 2: "gate/up", 3: "down"}
            out.append(after.get(products, "head" if i > last else "qkv"))
    return out


def split_steps(spans: list[Span], steps: int) -> tuple[float, list[list[Span]]]:
    """The last `steps` decode steps of a trace, and when the one before them was over. RuntimeError: there are not so many."""
    ends = [i for i, span in enumerate(spans) if is_advance(span.name)]
    if len(ends) <= steps:
        raise RuntimeError(f"the trace has {len(ends)} steps, expected more than {steps}")
    bounds = ends[-steps - 1 :]
    return spans[bounds[0]].end, [spans[a + 1 : b + 1] for a, b in itertools.pairwise(bounds)]


def account(began: float, steps: list[list[Span]]) -> dict:
    """{"us_per_step", "gap_us_per_step", "classes": [...], "kernels": [...]}: exposed and total time of each."""
    exposed: dict[tuple[str, str], list[float]] = {}
    total: dict[tuple[str, str], list[float]] = {}
    reach, gap = began, 0.0
    for step in steps:
        for span, kind in zip(step, classify([span.name for span in step]), strict=True):
            gap += max(0.0, span.start - reach)
            key = (kind, span.name)
            exposed.setdefault(key, []).append(max(0.0, span.end - max(span.start, reach)))
            total.setdefault(key, []).append(span.end - span.start)
            reach = max(reach, span.end)
    n = len(steps)
    kernels = [
        {"class": kind, "kernel": name, "exposed_us_per_step": sum(exposed[kind, name]) / n,
         "us_per_step": sum(times) / n, "calls_per_step": len(times) / n, "us_each": statistics.median(times)}
        for (kind, name), times in total.items()
    ]  # fmt: skip
    kernels.sort(key=lambda row: -row["exposed_us_per_step"])
    classes = {}
    for row in kernels:
        mine = classes.setdefault(row["class"], {"exposed_us_per_step": 0.0, "us_per_step": 0.0, "calls_per_step": 0.0})
        for field in mine:
            mine[field] += row[field]
    return {"us_per_step": (reach - began) / n, "gap_us_per_step": gap / n, "steps": n, "classes": classes, "kernels": kernels}


def trace(engine: Engine, params: SamplingParams, prompts: list) -> tuple[float, list[list[Span]]]:
    """The device's timeline of decode steps of a run that a user would start. ValueError: no GPU, or an answer too short."""
    from torch.profiler import ProfilerActivity, profile

    if engine.device.type != "cuda":
        raise ValueError(f"--explain: found device {engine.device}, expected a CUDA device")
    if params.max_new_tokens < 2 * STEPS_PER_GRAPH + 1:
        raise ValueError(f"--explain: found {params.max_new_tokens} new tokens, expected at least {2 * STEPS_PER_GRAPH + 1}")
    tokens = 1 + STEPS_PER_GRAPH * min(GRAPHS_TRACED, (params.max_new_tokens - 1) // STEPS_PER_GRAPH)
    params = dataclasses.replace(params, max_new_tokens=tokens)
    engine.generate(prompts, params)  # as it will be: nothing is captured or compiled under the profiler
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        engine.generate(prompts, params)
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    spans = [Span(e.time_range.start, e.time_range.end, e.name) for e in profiler.events() if e.device_type == on_device]
    spans.sort(key=lambda span: (span.start, span.end))
    return split_steps(spans, tokens - 1 - STEPS_PER_GRAPH)


def explain(engine: Engine, params: SamplingParams, prompts: list, predicted: Prediction | None) -> dict:
    """The account of a run's steps, each class beside its floor where the card is known."""
    out = account(*trace(engine, params, prompts))
    if predicted:
        for stage in predicted.stages:
            if stage.name in STAGES and STAGES[stage.name] in out["classes"]:
                out["classes"][STAGES[stage.name]]["floor_us_per_step"] = stage.roof_sec(predicted.card) * 1e6
    return out


def explain_table(account: dict) -> str:
    rows = []
    for name, c in sorted(account["classes"].items(), key=lambda item: -item[1]["exposed_us_per_step"]):
        floor = c.get("floor_us_per_step", 0.0)
        over = num(c["exposed_us_per_step"] - floor)
        rows.append([name, num(c["calls_per_step"]), num(c["us_per_step"]), num(c["exposed_us_per_step"]), num(floor), over])
    gap, whole = account["gap_us_per_step"], account["us_per_step"]
    floor = sum(c.get("floor_us_per_step", 0.0) for c in account["classes"].values())
    rows += [["gaps, no kernel running", "", "", num(gap), num(0), num(gap)]]
    rows += [["the step", "", "", num(whole), num(floor), num(whole - floor)]]
    kernels = [
        [k["class"], num(k["calls_per_step"]), num(k["us_each"]), num(k["exposed_us_per_step"]), k["kernel"][:70]]
        for k in account["kernels"]
    ]
    return (
        table("class  calls  us, overlapping  us, exposed  floor us  over it", rows)
        + f"\n{account['steps']} steps; exposed: from the end of all earlier kernels to its own end\n\n"
        + table("class  calls  us each  us, exposed  kernel", kernels)
    )
