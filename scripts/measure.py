"""Rows of a benchmark, measured: prompts, workers with a time limit, and the record of what came out.

Owns the parent's side of engines.py and the fields of a stored record. A record carries the metrics of every engine in the same
names, the machine that it was measured on, and what roofline.py says the same row must take.
"""

import dataclasses
import json
import os
import platform
import queue
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import roofline
import torch
from engines import Job, Setup

from quantize import MODES
from sampling import MAX_SAMPLES

# ---------------------------------------------------------------- the machine


def output_of(*command: str) -> str | None:
    """What a command prints; None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def stamp() -> dict:
    """The machine and versions that a stored result carries. A commit with a `+` had uncommitted changes in its sources;
    ROOFLAMA_COMMIT names the commit of a copy."""
    import triton

    commit = os.environ.get("ROOFLAMA_COMMIT")
    if not commit and (commit := output_of("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")):
        commit += "+" * bool(output_of("git", "-C", str(ROOT), "status", "--porcelain", "--", "*.py"))
    out = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(), "commit": commit}
    if torch.cuda.is_available():
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        out |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "driver": driver}
    return out


def card_of(device: str) -> roofline.Card | None:
    """The device's row of roofline.CARDS; None: a CPU, or a GPU that is not there."""
    if not device.startswith("cuda"):
        return None
    try:
        return roofline.find_card(torch.cuda.get_device_name())
    except ValueError:
        return None


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """What one line of a table measures."""

    model: str  # a name in model.SHAPES, or a checkpoint directory
    batch_size: int
    prompt_len: int  # tokens of the longest prompt
    max_new_tokens: int
    quantize: str | None = None  # a mode of quantize.py
    padding_ratio: float = 0.0  # 1 - mean / longest prompt
    kv_cache_dtype: str = "auto"  # a key of kv_cache.CACHE_DTYPES
    activation_dtype: str = "auto"  # of model.ACTIVATION_DTYPES; vLLM rounds x with fp8 weights in any case

    def __str__(self) -> str:
        padding = f", padding {self.padding_ratio:g}" if self.padding_ratio else ""
        formats = roofline.formats_of(self.quantize or "plain", None, self.kv_cache_dtype, self.activation_dtype)
        return f"{Path(self.model).name} {formats}, batch {self.batch_size}, {self.prompt_len}/{self.max_new_tokens}{padding}"

    def prompt_lens(self) -> list[int]:
        """Of each sequence: evenly spread from (1 - 2 padding_ratio) of the longest up to it, in random order."""
        low, steps = 1 - 2 * self.padding_ratio, max(1, self.batch_size - 1)
        share = [1 - (1 - low) * i / steps for i in range(self.batch_size)]
        lens = [max(1, round(self.prompt_len * s)) for s in share]
        random.Random(0).shuffle(lens)
        return lens

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """The same random ids for every engine."""
        generator = random.Random(0)
        return [[generator.randrange(min(1024, vocab_size)) for _ in range(n)] for n in self.prompt_lens()]

    @property
    def formats(self) -> tuple[str, str]:
        """Of the layers' weights and the head's, by their names in roofline.FORMATS."""
        return (MODES[self.quantize][0], MODES[self.quantize][2]) if self.quantize else ("bf16", "bf16")

    @property
    def predicted_model(self) -> roofline.Model:
        return roofline.Model(roofline.load_config(self.model), *self.formats, self.kv_cache_dtype, self.activation_dtype)


def loaded_as(row: Row) -> tuple:
    """What rows have in common that one worker serves."""
    return row.model, row.quantize, row.kv_cache_dtype, row.activation_dtype


def check_row(row: Row) -> None:
    """ValueError names the flag."""
    for name in ("batch_size", "prompt_len"):
        if getattr(row, name) < 1:
            raise ValueError(f"--{name}: found {getattr(row, name)}, expected at least 1")
    if row.batch_size > MAX_SAMPLES:
        raise ValueError(f"--batch_size: found {row.batch_size}, expected at most {MAX_SAMPLES:,}")
    if row.max_new_tokens < 2:
        raise ValueError(f"--max_new_tokens: found {row.max_new_tokens}, expected at least 2, for a decode step to time")
    if not 0 <= row.padding_ratio <= 0.5:
        raise ValueError(f"--padding_ratio: found {row.padding_ratio:g}, expected 0 to 0.5")
    if row.padding_ratio and row.batch_size == 1:
        raise ValueError(f"--padding_ratio: found {row.padding_ratio:g} at batch 1, expected 0: one prompt is not padded")
    if row.quantize and row.quantize not in MODES:
        raise ValueError(f"--quantize: found {row.quantize!r}, expected one of {', '.join(MODES)}")
    config = roofline.load_config(row.model, "model")
    context = config.max_position_embeddings
    own = config.layer_format.format if config.layer_format else "16 bits"
    roofline.check_activations(row.activation_dtype, row.quantize or own)
    if row.prompt_len + row.max_new_tokens > context:
        found = f"{row.prompt_len} + {row.max_new_tokens}"
        raise ValueError(f"--prompt_len, --max_new_tokens: found {found}, expected at most the context of {context} together")


# ---------------------------------------------------------------- workers


class WorkerError(Exception):
    """What a worker reported; `kind` as in engines.py, or `time`: the limit came first."""

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind


class Worker:
    """One engine in a process of its own. WorkerError where it fails or is late."""

    def __init__(self, setup: Setup, deadline: float, environment: dict | None = None):
        self.setup = setup
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - its stderr, shown where it fails; closed by close()
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "engines.py")],
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log, "text": True},
            env=os.environ | (environment or {}),
            start_new_session=True,
        )
        self.lines: queue.Queue = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.loaded = self._ask(dataclasses.asdict(setup), deadline)
        except WorkerError:
            self.close()
            raise

    def run(self, job: Job, deadline: float) -> dict:
        """As engines.run_job gives it."""
        return self._ask(dataclasses.asdict(job), deadline)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        """Ends it, and what it started."""
        if self.alive:
            os.killpg(self.process.pid, 9)
        self.process.wait()
        self.log.close()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def _ask(self, message: dict, deadline: float) -> dict:
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=max(0.0, min(deadline - time.monotonic(), threading.TIMEOUT_MAX)))
        except queue.Empty:
            self.close()
            raise WorkerError("not done within the time limit", "time") from None
        except BrokenPipeError:
            line = None
        if line is None:
            status = self.process.wait()
            tail = self._tail()
            self.close()
            raise WorkerError(f"the process ended with status {status}: {tail}", "failed")
        answer = json.loads(line)
        if "error" in answer:
            if answer["kind"] == "failed":
                print(self._tail(2000), file=sys.stderr)
            raise WorkerError(answer["error"], answer["kind"])
        return answer

    def _tail(self, size: int = 300) -> str:
        end = self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, end - size))
        text = self.log.read().decode(errors="replace").strip()
        return text if size > 300 else " ".join(text.split())


# ---------------------------------------------------------------- records


def percentiles(values: list[float]) -> dict:
    """{"p50", "p90", "p99"}, each one of the values."""
    ordered = sorted(values)
    return {f"p{q}": ordered[min(len(ordered) - 1, q * len(ordered) // 100)] for q in (50, 90, 99)}


def summary(row: Row, answer: dict) -> dict:
    """The metrics of a row from what its worker measured: medians over the timed runs, and every run's own.

    TPOT is (end to end - time to first token) / (tokens - 1); its percentiles are those of single steps where the engine shows
    them, else of the runs' means.
    """
    runs, n = answer["runs"], row.max_new_tokens
    e2e = [run["e2e_sec"] for run in runs]
    ttft = [run["ttft_sec"] for run in runs]
    tpot = [(run["e2e_sec"] - run["ttft_sec"]) / (n - 1) * 1e3 for run in runs]
    steps = [ms for run in runs for ms in run["step_ms"] or []]
    e2e_sec, ttft_sec, prompt_tokens = statistics.median(e2e), statistics.median(ttft), sum(row.prompt_lens())
    new_tokens = row.batch_size * n
    hosts = [run["host_ms"] for run in runs if run["host_ms"] is not None]
    out = {
        "compile_sec": answer["compile_sec"], "ttft_sec": ttft_sec, "e2e_sec": e2e_sec,
        "tpot_ms": percentiles(steps or tpot) | {"mean": statistics.median(tpot), "of": "steps" if steps else "runs"},
        "e2e_sec_percentiles": percentiles(e2e), "ttft_sec_percentiles": percentiles(ttft),
        "output_tok_per_sec": new_tokens / e2e_sec, "total_tok_per_sec": (new_tokens + prompt_tokens) / e2e_sec,
        "prefill_tok_per_sec": prompt_tokens / ttft_sec,
        "decode_tok_per_sec": row.batch_size * (n - 1) / (e2e_sec - ttft_sec),
        "host_ms_per_step": statistics.median(hosts) if hosts else None,
        "e2e_sec_of_each_run": e2e, "ttft_sec_of_each_run": ttft, "tpot_ms_of_each_run": tpot,
        "same_tokens_in_each_run": answer["same_tokens"], "compiled_while_timed": answer["compiled_while_timed"],
        "peak_memory_bytes": answer["peak_memory_bytes"], "peak_reserved_bytes": answer.get("peak_reserved_bytes"),
        "path": answer["path"],
    }  # fmt: skip
    return out


def predictions(row: Row, card: roofline.Card) -> tuple[roofline.Prediction, roofline.Prediction]:
    """Of a decode step in the middle of the answer, and of the prefill, at the mean prompt length."""
    model = row.predicted_model
    mean_len = round(statistics.mean(row.prompt_lens()))
    step = roofline.decode(row.batch_size, mean_len + row.max_new_tokens // 2)
    return roofline.predict(card, model, step), roofline.predict(card, model, roofline.prefill(row.batch_size, mean_len))


def beside_roofline(row: Row, metrics: dict, card: roofline.Card) -> dict:
    """MBU, MFU, and how far the row is from its floor: the sum over kernels of max(bytes / bandwidth, FLOPs / peak)."""
    step, prompt = predictions(row, card)
    step_sec = metrics["tpot_ms"]["mean"] / 1e3
    step_bytes = sum(stage.weight_bytes + stage.kv_bytes for stage in step.stages)
    peak = card.flops_per_sec("bf16")
    flops = prompt.flops + step.flops * (row.max_new_tokens - 1)
    return {
        "bytes_per_step": step_bytes,
        "mbu": step_bytes / step_sec / card.bytes_per_sec, "mbu_divided_by_gbps": card.bytes_per_sec / 1e9,
        "mbu_datasheet": step_bytes / step_sec / (card.sheet_gbps * 1e9),
        "mfu": flops / metrics["e2e_sec"] / peak, "mfu_decode": step.flops / step_sec / peak,
        "mfu_prefill": prompt.flops / metrics["ttft_sec"] / peak, "mfu_divided_by_tflops": peak / 1e12,
        "floor_ms": step.floor_sec * 1e3, "floor_ratio": step_sec / step.floor_sec,
        "predicted_ms": step.sec * 1e3, "predicted_ratio": step_sec / step.sec, "predicted_bound": step.bound,
        "prefill_floor_sec": prompt.floor_sec, "predicted_ttft_sec": prompt.sec,
    }  # fmt: skip


# ---------------------------------------------------------------- the whole table


@dataclass
class Plan:
    """How rows are measured."""

    device: str
    dtype: str
    random: bool
    warmup_runs: int = 1
    timed_runs: int = 3
    deadline: float = float("inf")  # of time.monotonic()
    compile_prefill: bool = False
    gpt_fast_dir: str | None = None


def measure(benchmark: str, rows: list[Row], engines: list[tuple[str, str]], plan: Plan, say: Callable) -> Iterator[dict]:
    """A record a row and engine, engine by engine in the order of the rows; also for what could not be measured, which has
    `skipped` with the reason in place of metrics. `engines`: (name, decode mode); the mode is rooflama's alone.

    Each model of an engine is loaded once, by a process that lives until the last of its rows.
    """
    card, machine = card_of(plan.device), stamp()
    for name, mode in engines:
        described = name if mode == "auto" else f"{name} {mode}"
        workers: dict[tuple, Worker] = {}
        absent: dict[tuple, WorkerError] = {}
        slowness: list[float] = []  # measured / roofline time of this engine's rows
        try:
            for i, row in enumerate(rows):
                key = loaded_as(row)
                record = {"benchmark": benchmark, "engine": name, **dataclasses.asdict(row), "mode": row.quantize}
                record |= {"quantize": row.formats[0], "quantize_head": row.formats[1], "dtype": plan.dtype}
                record |= {"random_weights": plan.random, "decode_mode": mode if name == "rooflama" else None}
                record |= {"warmup_runs": plan.warmup_runs, "timed_runs": plan.timed_runs, "greedy": True, "ignore_eos": True}
                try:
                    if key in absent:
                        raise absent[key]
                    check_time(row, card, plan, slowness)
                    if key not in workers or not workers[key].alive:
                        workers[key] = Worker(setup_of(name, mode, row, rows, plan), plan.deadline)
                    answer = workers[key].run(job_of(row, plan), plan.deadline)
                except WorkerError as error:
                    if error.kind != "time" and key not in workers:
                        absent[key] = error  # it does not load: not tried again for each row
                    record |= {"skipped": str(error), "skipped_kind": error.kind}
                    if error.kind == "failed" and key in workers:
                        workers.pop(key).close()  # a CUDA error would stay with it: the next row gets a new one
                    say(f"{described} {row}: {'absent' if error.kind == 'absent' else 'skipped'}: {error}")
                else:
                    loaded = workers[key].loaded
                    record |= {"engine_version": loaded["version"] or machine["commit"], "load_sec": loaded["load_sec"]}
                    record |= (metrics := summary(row, answer))
                    if card:
                        record |= beside_roofline(row, metrics, card)
                        slowness.append(record["e2e_sec"] / roofline_sec(row, card))
                    record["tokens"] = answer["tokens"]
                yield record | machine
                if key in workers and key not in set(map(loaded_as, rows[i + 1 :])):
                    workers.pop(key).close()
        finally:
            for worker in workers.values():
                worker.close()


def roofline_sec(row: Row, card: roofline.Card) -> float:
    """What one run of a row would take at the predicted speed."""
    step, prompt = predictions(row, card)
    return prompt.sec + step.sec * (row.max_new_tokens - 1)


def check_time(row: Row, card: roofline.Card | None, plan: Plan, slowness: list[float]) -> None:
    left = plan.deadline - time.monotonic()
    factor = statistics.median(slowness) if slowness else 1.0
    runs = plan.warmup_runs + plan.timed_runs
    need = runs * roofline_sec(row, card) * factor if card else 0.0
    if left <= max(0.0, need):
        raise WorkerError(f"needs about {need:.0f} s, {max(0.0, left):.0f} s of the time limit are left", "time")


def setup_of(engine: str, mode: str, row: Row, rows: list[Row], plan: Plan) -> Setup:
    config = roofline.load_config(row.model)
    mine = [r for r in rows if loaded_as(r) == loaded_as(row)]
    models = len(set(map(loaded_as, rows)))
    return Setup(
        engine, row.model, config.to_dict(), plan.random, plan.device, plan.dtype, row.quantize, mode,
        plan.compile_prefill, plan.gpt_fast_dir, max(r.prompt_len + r.max_new_tokens for r in mine), 0.9 / models,
        row.kv_cache_dtype, row.activation_dtype,
    )  # fmt: skip


def job_of(row: Row, plan: Plan) -> Job:
    prompts = row.prompts(roofline.load_config(row.model).vocab_size)
    return Job(prompts, row.max_new_tokens, [], plan.warmup_runs, plan.timed_runs)


# ---------------------------------------------------------------- the largest batch


def largest_that_fits(fits: Callable[[int], bool], guess: int, most: int) -> int:
    """The largest power of two up to `most` for which `fits` holds, which is asked near `guess` first; 0: not even 1."""
    batch = 1
    while batch * 2 <= min(guess, most):
        batch *= 2
    if fits(batch):
        while batch * 2 <= most and fits(batch * 2):
            batch *= 2
        return batch
    while batch > 1:
        batch //= 2
        if fits(batch):
            return batch
    return 0


def max_batch(row: Row, engine: tuple[str, str], plan: Plan, most: int) -> int:
    """The largest power-of-two batch of a row that an engine runs without running out of memory, by trying."""
    card = card_of(plan.device)
    guess = most
    if card:
        guess = roofline.largest_batch(card, row.predicted_model, row.prompt_len + row.max_new_tokens)
    once = dataclasses.replace(plan, warmup_runs=0, timed_runs=1)
    worker = Worker(setup_of(*engine, row, [row], plan), plan.deadline)

    def fits(batch_size: int) -> bool:
        nonlocal worker
        short = dataclasses.replace(row, batch_size=batch_size)
        if not worker.alive:
            worker = Worker(setup_of(*engine, row, [row], plan), plan.deadline)
        try:
            worker.run(job_of(short, once), plan.deadline)
        except WorkerError as error:
            if error.kind == "memory":
                return False
            raise
        return True

    try:
        return largest_that_fits(fits, guess, most)
    finally:
        worker.close()
