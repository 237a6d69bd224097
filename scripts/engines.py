"""The engines that are compared, each in a process of its own: how long does greedy generation take from these prompts?

Run as a script this is the worker: it loads one engine and answers jobs, a line of JSON each way on stdin and stdout. The
parent's side is measure.py. Nothing of the project is imported before an engine asks for it: gpt-fast has a model.py too.

A worker's first line in is the setup (`Setup` as JSON), then one `Job` a line. Its first line out is {"load_sec", "version",
"path"}, then one object a job, as `run_job` gives it; anything that fails is {"error", "kind"}: `absent` (the engine cannot be
imported, or has no way to do this), `memory` or `failed`. What engines print goes to stderr.
"""

import contextlib
import gc
import itertools
import json
import os
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Setup:
    """What a worker loads."""

    engine: str  # a key of ENGINES
    model: str  # a name in model.SHAPES, or a checkpoint directory
    hf_config: dict  # its architecture, as a config.json of transformers
    random: bool  # random weights of the shape
    device: str
    dtype: str  # bfloat16, float16 or float32
    quantize: str | None = None  # a mode of quantize.py
    decode_mode: str = "auto"  # rooflama's
    compile_prefill: bool = False  # rooflama's
    gpt_fast_dir: str | None = None
    max_len: int = 4096  # of any prompt with its answer
    memory_share: float = 0.9  # of the GPU's that an engine may reserve which reserves it up front (vLLM)
    kv_cache_dtype: str = "auto"  # or fp8
    activation_dtype: str = "auto"  # or fp8; rooflama's

    @property
    def is_plain(self) -> bool:
        """Whether weights, cache and activations are in the model's dtype."""
        return not self.quantize and self.kv_cache_dtype == self.activation_dtype == "auto"


@dataclass
class Job:
    """One row of a benchmark."""

    prompts: list[list[int]]
    max_new_tokens: int
    stop_ids: list[int]  # of which the first met ends an answer; empty: EOS is ignored
    warmup_runs: int = 1
    timed_runs: int = 3
    cache_rows: int = 0  # a sequence's, where several jobs shall share a cache; 0: what this one needs


@dataclass
class Timed:
    """One run, from token ids to token ids."""

    tokens: list[list[int]]
    ttft_sec: float  # until the first token of every sequence
    step_ms: list[float] | None = None  # of each later token, where the engine lets it be seen
    host_ms_per_step: float | None = None  # what launching a step costs the host, where the engine counts it


class Absent(Exception):
    """The engine cannot do this here; the message is the reason."""


# ---------------------------------------------------------------- engines


class Rooflama:
    """This project's. A row has an engine of its own over the same weights, with a cache of the row's length."""

    def __init__(self, setup: Setup):
        sys.path.insert(0, str(ROOT))
        import generate
        from model import DTYPES

        self.generate = generate
        dtype = DTYPES[setup.dtype]
        if setup.random:
            self.model = generate.Engine.random(setup.model, setup.device, dtype, setup.quantize).model
        else:
            engine = generate.Engine.load(setup.model, setup.device, dtype)
            if setup.quantize:
                import quantize

                quantize.quantize_at_load(engine.model, setup.quantize, engine.tokenizer)
            self.model = engine.model
        names = ("decode_mode", "compile_prefill", "kv_cache_dtype", "activation_dtype")
        self.options = {name: getattr(setup, name) for name in names}
        self.engine = None

    @property
    def version(self) -> str:
        return ""  # the record's commit

    @property
    def path(self) -> str:
        return self.engine.decoder.path if self.engine else ""

    def prepare(self, job: Job) -> None:
        rows = job.cache_rows or max(map(len, job.prompts)) + job.max_new_tokens
        if self.engine is None or self.engine.max_seq_len != rows or not job.cache_rows:
            self.engine = None  # frees its cache first
            free_memory()
            self.engine = self.generate.Engine(self.model, max_seq_len=rows, **self.options)
        stop = {"stop_token_ids": tuple(job.stop_ids)} if job.stop_ids else {}
        self.params = self.generate.SamplingParams(temperature=0.0, max_new_tokens=job.max_new_tokens, ignore_eos=True, **stop)

    def run(self, job: Job) -> Timed:
        outputs, timing = self.engine.generate(job.prompts, self.params)
        host_ms = timing.host_sec / timing.steps * 1e3 if timing.steps else None
        return Timed([out.tokens for out in outputs], timing.ttft_sec, timing.step_ms, host_ms)


class Transformers:
    """transformers' `generate`: with its default, growing cache, or with a static one and the decode step compiled."""

    def __init__(self, setup: Setup, static: bool = False):
        import torch
        import transformers

        self.torch, self.transformers, self.static, self.device = torch, transformers, static, setup.device
        if not setup.is_plain:
            raise Absent(f"quantize {setup.quantize}, cache {setup.kv_cache_dtype}: it has not these formats")
        dtype = getattr(torch, setup.dtype)
        if setup.random:
            config = transformers.AutoConfig.for_model(**setup.hf_config)
            with torch.device(setup.device):
                self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.normal_(1.0 if "norm" in name else 0.0, 0.02)
        else:
            try:
                model = transformers.AutoModelForCausalLM.from_pretrained(setup.model, dtype=dtype, local_files_only=True)
            except (OSError, ValueError, KeyError) as error:
                raise Absent(f"transformers cannot load {setup.model}: {first_line(error)}") from None
            self.model = model.to(setup.device)
        self.model.eval()
        self.model.generation_config = transformers.GenerationConfig()  # greedy, whatever the checkpoint prefers

    @property
    def version(self) -> str:
        return self.transformers.__version__

    @property
    def path(self) -> str:
        if not self.static:
            return "generate, default"
        return "generate, static cache, " + ("compiled" if self.device.startswith("cuda") else "not compiled (only on a GPU)")

    def prepare(self, job: Job) -> None:
        if not job.cache_rows:
            self.torch._dynamo.reset()  # else the shapes of earlier rows make the next compile a dynamic one
        longest = max(map(len, job.prompts))
        rows = [[0] * (longest - len(ids)) + ids for ids in job.prompts]  # padded on the left
        self.ids = self.torch.tensor(rows, device=self.device)
        lengths = self.torch.tensor([len(ids) for ids in job.prompts], device=self.device)
        self.mask = (self.torch.arange(longest, device=self.device) >= longest - lengths[:, None]).long()
        least = {} if job.stop_ids else {"min_new_tokens": job.max_new_tokens}
        self.options = {
            **{"max_new_tokens": job.max_new_tokens, "do_sample": False, "pad_token_id": 0, **least},
            **{"eos_token_id": job.stop_ids or None, "cache_implementation": "static" if self.static else None},
        }

    def run(self, job: Job) -> Timed:
        stamps = []

        def note(ids, scores, **_):  # called after each token
            stamps.append(timestamp(self.device))
            return self.torch.zeros(len(ids), dtype=self.torch.bool, device=ids.device)

        criteria = self.transformers.StoppingCriteriaList([note])
        started = timestamp(self.device)
        with self.torch.no_grad():
            out = self.model.generate(self.ids, attention_mask=self.mask, stopping_criteria=criteria, **self.options)
        tokens = [cut(row, job.stop_ids) for row in out[:, self.ids.shape[1] :].tolist()]
        elapsed = [elapsed_sec(started, stamp) for stamp in stamps]
        return Timed(tokens, elapsed[0], [(b - a) * 1e3 for a, b in itertools.pairwise(elapsed)])


class StaticTransformers(Transformers):
    def __init__(self, setup: Setup):
        super().__init__(setup, static=True)


class Vllm:
    """vLLM's offline `LLM.generate`. It shows no single steps: time to first token is that of a run of one token."""

    def __init__(self, setup: Setup):
        try:
            import vllm
        except Exception as error:  # a broken install fails in many ways: each is a reason to name
            raise Absent(f"vllm cannot be imported: {first_line(error)}") from None
        self.vllm = vllm
        if setup.quantize not in (None, "fp8"):
            raise Absent(f"quantize {setup.quantize}: it does not read this project's formats")
        if not setup.device.startswith("cuda"):
            raise Absent(f"vllm is measured on CUDA devices, found {setup.device}")
        model = setup.model
        if setup.random:
            self.directory = tempfile.TemporaryDirectory()
            model = self.directory.name
            architecture = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
            name = architecture[setup.hf_config["model_type"]] + "ForCausalLM"
            (Path(model) / "config.json").write_text(json.dumps(setup.hf_config | {"architectures": [name]}))
        self.llm = vllm.LLM(
            model, dtype=setup.dtype, quantization=setup.quantize, load_format="dummy" if setup.random else "auto",
            skip_tokenizer_init=True, max_model_len=setup.max_len, gpu_memory_utilization=setup.memory_share,
            enable_prefix_caching=False, kv_cache_dtype=setup.kv_cache_dtype,
        )  # fmt: skip

    @property
    def version(self) -> str:
        return self.vllm.__version__

    @property
    def path(self) -> str:
        return "LLM.generate, TTFT by runs of one token"

    def prepare(self, job: Job) -> None:
        options = {"stop_token_ids": job.stop_ids} if job.stop_ids else {}
        sampling = lambda n: self.vllm.SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False, **options)
        self.params, self.one = sampling(job.max_new_tokens), sampling(1)

    def run(self, job: Job) -> Timed:
        prompts = [{"prompt_token_ids": ids} for ids in job.prompts]
        outputs = self.llm.generate(prompts, self.params, use_tqdm=False)
        tokens = [list(out.outputs[0].token_ids) for out in outputs]
        return Timed(tokens, 0.0)

    def first_token_sec(self, job: Job) -> float:
        started = time.perf_counter()
        self.llm.generate([{"prompt_token_ids": ids} for ids in job.prompts], self.one, use_tqdm=False)
        return time.perf_counter() - started


class GptFast:
    """gpt-fast, imported from a checkout: its own prefill and its compiled decode step, greedy by top_k 1."""

    def __init__(self, setup: Setup):
        if not setup.gpt_fast_dir:
            raise Absent("--gpt_fast_dir: not given, expected a checkout of gpt-fast")
        here = {str(ROOT), str(ROOT / "scripts")}
        sys.path[:] = [setup.gpt_fast_dir] + [p for p in sys.path if p and str(Path(p).resolve()) not in here]
        try:
            import generate
            import model
        except ImportError as error:
            raise Absent(f"{setup.gpt_fast_dir}: {first_line(error)}") from None
        if not Path(model.__file__).is_relative_to(Path(setup.gpt_fast_dir).resolve()) or not hasattr(model, "ModelArgs"):
            raise Absent(f"{setup.gpt_fast_dir}: found {model.__file__}, expected gpt-fast's model.py")
        if not setup.random:
            raise Absent("it reads checkpoints of its own format only: give --random_weights")
        if not setup.is_plain:
            raise Absent(f"quantize {setup.quantize}, cache {setup.kv_cache_dtype}: not compared here")
        import torch

        self.torch, self.lib, self.device, self.directory = torch, generate, setup.device, setup.gpt_fast_dir
        args = self._model_args(model, setup.hf_config)
        with torch.device(setup.device):
            self.model = model.Transformer(args).to(getattr(torch, setup.dtype)).eval()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.02)
        self.compiled = setup.device.startswith("cuda")
        if self.compiled:  # as its --compile does
            generate.decode_one_token = torch.compile(generate.decode_one_token, mode="reduce-overhead", fullgraph=True)

    @staticmethod
    def _model_args(model, c: dict):
        rope = c["rope_parameters"]
        if c["model_type"] not in ("llama", "mistral") or c["hidden_size"] != c["num_attention_heads"] * c["head_dim"]:
            raise Absent(f"it has no model of type {c['model_type']} with heads of {c['head_dim']}")
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return model.ModelArgs(
            block_size=c["max_position_embeddings"], vocab_size=c["vocab_size"], n_layer=c["num_hidden_layers"],
            n_head=c["num_attention_heads"], dim=c["hidden_size"], intermediate_size=c["intermediate_size"],
            n_local_heads=c["num_key_value_heads"], rope_base=rope["rope_theta"], norm_eps=c["rms_norm_eps"],
            rope_scaling={n: rope[n] for n in names} if rope["rope_type"] == "llama3" else None,
        )  # fmt: skip

    @property
    def version(self) -> str:
        import subprocess

        git = ["git", "-C", self.directory, "rev-parse", "--short", "HEAD"]
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()

    @property
    def path(self) -> str:
        return "decode_one_token " + ("compiled (reduce-overhead)" if self.compiled else "eager") + ", prefill eager"

    def prepare(self, job: Job) -> None:
        if len(set(map(len, job.prompts))) > 1:
            raise Absent("prompts of different lengths: it has no padding")
        if job.stop_ids:
            raise Absent("answers that end at EOS: its batch path has none")
        self.ids = self.torch.tensor(job.prompts, device=self.device, dtype=self.torch.int)
        self.model.max_batch_size = (
            self.model.max_seq_length
        ) = -1  # a cache of just this row's shape: it takes no smaller batch

    def run(self, job: Job) -> Timed:
        torch, lib, (batch_size, length) = self.torch, self.lib, self.ids.shape
        stamps = [timestamp(self.device)]
        with torch.no_grad():
            with torch.device(self.device):
                self.model.setup_caches(max_batch_size=batch_size, max_seq_length=length + job.max_new_tokens)
            first = lib.prefill(self.model, self.ids, torch.arange(length, device=self.device), top_k=1).clone()
            stamps.append(timestamp(self.device))
            more, _ = lib.decode_n_tokens(
                self.model, first.view(batch_size, -1), torch.tensor([length], device=self.device, dtype=torch.int),
                job.max_new_tokens - 1, callback=lambda _: stamps.append(timestamp(self.device)), top_k=1,
            )  # fmt: skip
        tokens = torch.cat([first.view(batch_size, 1), *(t.view(batch_size, 1) for t in more)], dim=1).tolist()
        elapsed = [elapsed_sec(stamps[0], stamp) for stamp in stamps[1:]]
        return Timed(tokens, elapsed[0], [(b - a) * 1e3 for a, b in itertools.pairwise(elapsed)])


ENGINES = {
    "rooflama": Rooflama,
    "transformers": Transformers,
    "transformers-static": StaticTransformers,
    "vllm": Vllm,
    "gpt-fast": GptFast,
}

# ---------------------------------------------------------------- one job


def run_job(engine, job: Job, device: str) -> dict:
    """Warm-ups, then timed runs: {"compile_sec", "first_run_sec", "runs": [{"e2e_sec", "ttft_sec", ...}], "tokens",
    "same_tokens", "compiled_while_timed", "first_token_at", "path" and the peak memory}.

    compile_sec: what the first warm-up took beyond a timed run. first_token_at: the time (time.time()) of the first timed one.
    """
    import torch

    engine.prepare(job)
    reset_peak_memory(device)
    warm_ups, runs, tokens, same, first_token_at = [], [], None, True, None
    for _ in range(job.warmup_runs):
        started = time.perf_counter()
        engine.run(job)
        warm_ups.append(time.perf_counter() - started)
    compiled = compilations()
    for _ in range(job.timed_runs):
        at, started = time.time(), time.perf_counter()
        timed = engine.run(job)
        synchronize(device)
        e2e_sec = time.perf_counter() - started
        ttft_sec = engine.first_token_sec(job) if hasattr(engine, "first_token_sec") else timed.ttft_sec
        first_token_at = first_token_at or at + ttft_sec
        if not job.stop_ids and any(len(answer) != job.max_new_tokens for answer in timed.tokens):
            found = sorted({len(answer) for answer in timed.tokens})
            raise ValueError(f"answers: found {found} tokens, expected {job.max_new_tokens} of each prompt")
        runs.append({"e2e_sec": e2e_sec, "ttft_sec": ttft_sec, "step_ms": timed.step_ms, "host_ms": timed.host_ms_per_step})
        same = same and tokens in (None, timed.tokens)
        tokens = timed.tokens
    median = sorted(run["e2e_sec"] for run in runs)[len(runs) // 2]
    out = {
        "compile_sec": max(0.0, warm_ups[0] - median) if warm_ups else None,
        "warmup_sec": warm_ups, "runs": runs, "tokens": tokens, "same_tokens": same, "path": engine.path,
        "compiled_while_timed": compilations() - compiled, "first_token_at": first_token_at,
    }  # fmt: skip
    if device.startswith("cuda"):
        out["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        out["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
    else:
        out["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return out


def compilations() -> int:
    """Graphs that torch.compile has made in this process so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def cut(tokens: list[int], stop_ids: list[int]) -> list[int]:
    """Up to the first stop token, itself included."""
    end = next((i for i, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return tokens[: end + 1]


def timestamp(device: str):
    """Now, in the device's own time where it is a GPU: nothing waits for it."""
    if not device.startswith("cuda"):
        return time.perf_counter()
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed_sec(earlier, later) -> float:
    if isinstance(later, float):
        return later - earlier
    later.synchronize()
    return earlier.elapsed_time(later) / 1e3


def synchronize(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def reset_peak_memory(device: str) -> None:
    import torch

    free_memory()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- the worker


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0] or type(error).__name__


@contextlib.contextmanager
def reported(send):
    """Sends what goes wrong inside as {"error", "kind"}, and lets the worker go on."""
    try:
        yield
    except Absent as error:
        send({"error": str(error), "kind": "absent"})
    except ImportError as error:
        send({"error": first_line(error), "kind": "absent"})
    except Exception as error:  # whatever an engine throws: the row fails, by name, and the next one is tried
        kind = "memory" if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" else "failed"
        if kind == "failed":
            import traceback

            traceback.print_exc()
        send({"error": f"{type(error).__name__}: {first_line(error)}", "kind": kind})


def main() -> None:
    if len(sys.argv) > 1 or sys.stdin.isatty() or not (setup := sys.stdin.readline()):
        sys.exit("usage: scripts/engines.py < JOBS, a Setup and then Jobs as JSON lines: the worker of scripts/benchmark.py")
    out = os.fdopen(os.dup(1), "w")  # ours alone; whatever else is printed goes to stderr
    os.dup2(2, 1)
    sys.path.remove(str(ROOT / "scripts"))  # where Python put it: its evaluate.py is not the one that libraries look for

    def send(message: dict) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    setup = Setup(**json.loads(setup))
    engine = None
    with reported(send):
        started = time.perf_counter()
        engine = ENGINES[setup.engine](setup)
        synchronize(setup.device)
        send({"load_sec": time.perf_counter() - started, "version": engine.version})
    if engine is None:
        return
    for line in sys.stdin:
        with reported(send):
            send(run_job(engine, Job(**json.loads(line)), setup.device))
        free_memory()


if __name__ == "__main__":
    main()
