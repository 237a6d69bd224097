"""Text from a model: the Python API (`Engine`) and the command line.

Owns what an engine is made of and when a session is made anew. Knows no file format: checkpoints come from
convert_hf_checkpoint, text from tokenizer; the loop behind every way to generate is runs', what runs on the device decoding's.
Letters: T tokens of a prompt, H hidden size.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import checkpoint
import convert_hf_checkpoint
from decoding import BUCKETS, STEPS_PER_GRAPH, Decoder, Session, check_mode, synchronize
from kernels import MAX_ROWS
from kernels.formats import Weight
from kv_cache import CACHE_DTYPES, bytes_per_row
from model import ACTIVATION_DTYPES, DTYPES, SHAPES, Scale, Transformer
from prefill import CHUNK_ROWS, GRAPH_ROWS, Prefiller
from runs import Output, Request, Run
from sampling import MAX_SAMPLES, SamplingParams
from speculative import MAX_DRAFTS, Drafter, ModelDrafter, NgramDrafter, SelfDrafter, Speculator
from timing import Timing, metrics, report, short
from tokenizer import load_tokenizer

DEMO = Path(__file__).parent / "assets" / "demo"
PROMPT = "ROMEO:"
CHAT_TOKENS = 4096  # max_new_tokens of an answer in a conversation, unless told
WARM_UP_TOKENS = STEPS_PER_GRAPH + 2  # both sizes of graph
DRAFTS = 5  # of a round, unless told; gpt-fast's default
CHAT_ROWS = 8192  # cache rows that a conversation begins with, where the context is longer

# ---------------------------------------------------------------- the Python API


class Live(Iterator):
    """What a run gives, as it comes. `close()` ends the run early, as does the engine's next one."""

    def __init__(self, run: Run, items: Iterator):
        self._run, self._items, self.timing = run, items, run.timing
        self.batch_size = run.batch_size  # sequences at once

    def __next__(self):
        return next(self._items)

    def close(self) -> None:
        self._items.close()


class Stream(Live):
    """The text of one answer, piece by piece."""

    def __init__(self, run: Run):
        if len(run.answers) != 1:
            raise ValueError(f"n: found {len(run.answers)}, expected 1 where text is streamed")
        super().__init__(run, (text for _, text in run.pieces() if text))

    @property
    def output(self) -> Output:
        """What has come so far; all of it once the iterator has ended."""
        return self._run.outputs()[0]


def _finished(run: Run) -> Iterator[tuple[Request, list[Output]]]:
    """(request, its outputs, one a sample), in the order in which they finish."""
    with contextlib.closing(run.pieces()) as pieces:
        for answer, _ in pieces:
            if all(sample.finish_reason for sample in answer.job.answers):
                outputs = run.outputs(answer.job)
                for sample in answer.job.answers:  # theirs alone from now on: many would fill the memory
                    sample.tokens, sample.logprobs, sample.text, sample.stream = [], None, "", None
                yield answer.job.request, outputs


class Engine:
    """A model ready to generate.

        engine = Engine.load("checkpoints/Llama-3.2-1B")
        outputs, timing = engine.generate(["Once upon a time"], SamplingParams(max_new_tokens=100))

    Prompts are text, lists of token ids, conversations ({"role", "content"} objects, for the checkpoint's template), or
    embeddings [T, H]. One run at a time: a new one ends the one before.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer=None,
        *,
        decode_mode="eager",
        compile_prefill=False,
        max_seq_len=None,
        kv_cache_dtype="auto",
        activation_dtype="auto",
        batch_invariant=False,
    ):
        context = model.config.max_position_embeddings
        if max_seq_len is not None and not 1 <= max_seq_len <= context:
            raise ValueError(f"max_seq_len: found {max_seq_len}, expected 1 to the model's context, {context}")
        if kv_cache_dtype not in CACHE_DTYPES:
            raise ValueError(f"kv_cache_dtype: found {kv_cache_dtype!r}, expected one of {', '.join(CACHE_DTYPES)}")
        if activation_dtype not in ACTIVATION_DTYPES:
            raise ValueError(f"activation_dtype: found {activation_dtype!r}, expected one of {', '.join(ACTIVATION_DTYPES)}")
        if batch_invariant and activation_dtype != "auto":  # PyTorch picks algorithms by the number of rows
            raise ValueError("batch_invariant: found with activation_dtype fp8, expected one of them")
        check_mode(decode_mode, model.norm.weight.device)
        self.model, self.tokenizer = model, tokenizer
        self.decode_mode, self.max_seq_len, self.batch_invariant = decode_mode, max_seq_len, batch_invariant
        self.cache_dtype = CACHE_DTYPES[kv_cache_dtype] or model.norm.weight.dtype
        self.activation_dtype = activation_dtype
        self.defaults: dict = {}  # sampling defaults of the checkpoint's generation_config.json
        self.stop_ids = set(model.config.eos_token_ids) | (set(tokenizer.eos_ids) if tokenizer else set())
        self.load_sec, self.load_notes = 0.0, []
        self.compile_prefill = compile_prefill
        self.session: Session | None = None
        self.decoder: Decoder | None = None
        self.prefiller: Prefiller | None = None
        self.running: Run | None = None  # whose sequences the session holds
        self.speculation: dict | None = None  # what `speculate` was asked for
        self.speculator: Speculator | None = None  # of the present session
        model.setup_rope(max_seq_len or context, MAX_DRAFTS)

    @classmethod
    def load(cls, checkpoint_path, device=None, dtype=None, *, progress=False, **options) -> "Engine":
        """From a checkpoint directory, ours or an HF one. `dtype` overrides the checkpoint's; `options` as in __init__."""
        started = time.perf_counter()
        device = device_of(device)
        directory = Path(checkpoint_path)
        config, tensors, report = convert_hf_checkpoint.load(directory, device, dtype, progress=progress)
        model = Transformer(config, device="meta", dtype=config.dtype)
        model.load_state_dict(tensors, strict=True, assign=True)
        tokenizer = load_tokenizer(directory, config.vocab_size, config.model_type)
        engine = cls(model, tokenizer, **options)
        if tokenizer:
            model.vocab_limit = tokenizer.vocab_size
        defaults = checkpoint.default_generation(directory)
        engine.stop_ids |= set(defaults.pop("eos_token_id", ()))
        engine.defaults = defaults if defaults.pop("do_sample", True) else {"temperature": 0.0}
        engine.load_sec, engine.load_notes = time.perf_counter() - started, report.notes
        return engine

    @classmethod
    def random(cls, shape: str, device=None, dtype=None, mode: str | None = None, **options) -> "Engine":
        """Random weights of a known shape (a key of model.SHAPES), made on the device; quantised where a mode is given."""
        if shape not in SHAPES:
            raise ValueError(f"random_weights: found {shape!r}, expected one of {', '.join(SHAPES)}")
        started = time.perf_counter()
        config = dataclasses.replace(SHAPES[shape], dtype=dtype or SHAPES[shape].dtype)
        if mode:
            import quantize

            config = quantize.make_recipe(mode, config).config(config)
        model = Transformer(config, device=device_of(device))
        fill_randomly(model)
        engine = cls(model, **options)
        synchronize(model.norm.weight.device)
        engine.load_sec = time.perf_counter() - started
        return engine

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.max_seq_len or self.model.config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def path(self) -> str:
        """How the present session's tokens are made, for people."""
        return (self.speculator or self.decoder).path

    def encode(self, prompt) -> list[int] | torch.Tensor:
        """A prompt as token ids (BOS in front of text, where the model has one), or embeddings as they are."""
        if isinstance(prompt, torch.Tensor):
            width = self.model.config.hidden_size
            if prompt.dim() != 2 or prompt.shape[1] != width or not prompt.is_floating_point():
                raise ValueError(f"prompt: found {prompt.dtype} {list(prompt.shape)}, expected embeddings [T, {width}]")
            return prompt
        is_chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], dict)
        if not isinstance(prompt, str) and not is_chat:
            return list(prompt)
        if self.tokenizer is None:
            raise ValueError("prompt: found text, expected an integer or token ids (the checkpoint has no tokenizer)")
        return self.tokenizer.encode_chat(prompt) if is_chat else self.tokenizer.encode(prompt, bos=True)

    def generate(
        self,
        prompts: Sequence[str | list[int] | list[dict] | torch.Tensor],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        sample: int = 0,
        on_text: Callable[[int, str], None] | None = None,
    ) -> tuple[list[Output], Timing]:
        """Generates for every prompt at once, with parameters for all or for each. Gives an output a sample: `params.n` for the
        first prompt, and so on. `on_text(i, text)` is given each piece of output i's text when it is final.

        `sample`: the number of the first sample, for more of them later. ValueError: an empty prompt, or one that leaves no
        room in the context. FloatingPointError: the model gave NaN.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts: found one text, expected a list of prompts")
        each = [params or self.params()] * len(prompts) if not isinstance(params, Sequence) else params
        if len(each) != len(prompts):
            raise ValueError(f"prompts: found {len(prompts)} with {len(each)} parameters, expected as many of each")
        run = Run(self, list(map(Request, prompts, each)), sample=sample)
        for answer, text in run.pieces():
            if on_text and text:
                on_text(answer.index, text)
        return run.outputs(), run.timing

    def generate_many(self, requests: Sequence[Request], batch_size: int | None = None) -> Live:
        """Generates for any number of requests, up to `batch_size` samples at once: what ends makes room for the next.

            for request, outputs in engine.generate_many([Request("To be", SamplingParams(temperature=0.8), id=1), ...]):

        They come in the order in which they finish, with an output a sample. Each gets what it would get alone. `batch_size`:
        None takes the largest for which there is memory, at most 256. ValueError, at once: a request that cannot run, named by
        its `source`. FloatingPointError: the model gave NaN.
        """
        run = Run(self, requests, rows=self.largest_batch if batch_size is None else batch_size, chunked=True)
        return Live(run, _finished(run))

    def stream(self, prompt, params: SamplingParams | None = None, *, sample: int = 0) -> Stream:
        """The text of one prompt, piece by piece. ValueError as for `generate`, at once."""
        return Stream(Run(self, [Request(prompt, params or self.params())], sample=sample))

    def chat(self, messages: list[dict], params: SamplingParams | None = None, *, sample: int = 0, **variables) -> Stream:
        """The answer to a conversation of {"role", "content"} objects, piece by piece; `variables` as in encode_chat.

        What the conversation shares with the session's last run stays in the cache: only tokens from the first difference on
        are prefilled. ValueError: no chat template, or a conversation that fills the context.
        """
        if self.tokenizer is None:
            raise ValueError("chat: found a checkpoint without a tokenizer, expected one with a chat template")
        prompt = self.tokenizer.encode_chat(messages, **variables)
        params = params or self.params()
        rows = CHAT_ROWS
        while rows < len(prompt) + params.max_new_tokens:
            rows *= 2  # a cache that is outgrown is prefilled anew: let that be seldom
        self.prepare(1, rows)
        return Stream(Run(self, [Request(prompt, params)], sample=sample, continues=True))

    def params(self, **given) -> SamplingParams:
        """SamplingParams from the checkpoint's defaults, overridden by what is given (None = not given)."""
        return SamplingParams(**self.defaults | {k: v for k, v in given.items() if v is not None})

    @property
    def rounds_prompts(self) -> bool:
        """Whether products of prompts round x to fp8. ValueError: the weights do not go with that."""
        if self.activation_dtype == "fp8":
            self.model.check_rounding()
        return self.activation_dtype == "fp8"

    def prepare(self, batch_size: int, length: int) -> None:
        """Makes a session for up to so many sequences of up to `length` tokens, unless the present one serves.
        ValueError as for `rounds_prompts`."""
        self.model.tile_weights()
        rounds = self.rounds_prompts
        s = self.session
        serves = s and s.max_seq_len >= min(length, self.context) and self.decoder.serves(batch_size)
        if serves and (not self.speculation or s.batch_size == batch_size):  # a round works on all rows
            return
        self.session = self.decoder = self.prefiller = self.speculator = None  # frees the memory of the old one first
        rows = self._session_rows(length)
        with checkpoint.out_of_memory_suppressed():
            spare = MAX_DRAFTS if self.speculation else 0
            session = Session(self.model, batch_size, rows, self.cache_dtype, self.batch_invariant, spare)
            if self.speculation:
                self.speculator = Speculator(self.model, session, **self.speculation)
            self.session = session
        if self.session is None:
            raise MemoryError(self._no_room(batch_size, rows))
        self.decoder = Decoder(self.model, self.session, self.decode_mode)
        graphs = self.compile_prefill or self.decoder.mode == "graph"
        options = {"graphs": graphs, "compiled": self.compile_prefill, "alone": self.batch_invariant, "rounds": rounds}
        self.prefiller = Prefiller(self.model, self.session.cache, pool=self.decoder.pool, **options)

    def speculate(self, drafter: Drafter, k: int = DRAFTS, adaptive: bool = True) -> None:
        """From now on runs draft up to k tokens a round; what they give stays the same (speculative.py). `adaptive` lowers k,
        down to none, where that is faster. ValueError: a k, a draft model or a mode that does not fit."""
        if not 1 <= k <= MAX_DRAFTS:
            raise ValueError(f"speculate_k: found {k}, expected 1 to {MAX_DRAFTS}")
        if self.decode_mode not in ("auto", "eager", "graph"):
            raise ValueError(f"decode_mode: found {self.decode_mode} with speculation, expected auto, eager or graph")
        if self.batch_invariant:  # how many tokens a round feeds follows what all sequences accept
            raise ValueError("batch_invariant: found with speculation, expected one of them")
        if isinstance(drafter, ModelDrafter):
            found, expected = drafter.model.vocab_limit, self.model.vocab_limit
            if found != expected:
                raise ValueError(f"the draft model's vocabulary: found {found} tokens, expected the target's {expected}")
            if (found := drafter.model.config.max_position_embeddings) < self.context:
                raise ValueError(f"the draft model's context: found {found}, expected at least {self.context} (max_seq_len)")
            drafter.model.setup_rope(self.context, MAX_DRAFTS)
        mode = "graph" if check_mode(self.decode_mode, self.device) == "graph" else "eager"
        self.speculation = {"drafter": drafter, "k": k, "adaptive": adaptive, "mode": mode}
        self.session = self.decoder = self.prefiller = self.speculator = None

    def _session_rows(self, length: int) -> int:
        """Cache rows a sequence of a new session: few sessions for many lengths."""
        return self.max_seq_len or min(self.context, -(-length // 1024) * 1024)

    def largest_batch(self, length: int) -> int:
        """How many sequences of up to `length` tokens fit into free memory, beside what a step and a prefill need."""
        c, size, rows = self.model.config, self.model.norm.weight.itemsize, self._session_rows(length)
        free = self._free_bytes() + (self.session.cache.num_bytes if self.session else 0)
        packed = CHUNK_ROWS + (GRAPH_ROWS if self.device.type == "cuda" else 0)  # rows; graphs keep theirs
        prefill = packed * (5 * c.hidden_size + 3 * c.q_size + 3 * c.intermediate_size) * size
        step = c.vocab_size * 4 * 4 + 4 * c.intermediate_size * size  # logits, as they are and as they are cut
        row = bytes_per_row(c, self.cache_dtype)
        each = rows * row + step
        if asked := self.speculation:  # k + 1 tokens a step, spare rows, and a drafter's cache
            each = (rows + MAX_DRAFTS) * (row + asked["drafter"].bytes_per_row) + (asked["k"] + 1) * step
        fits = int(free * 0.9 - prefill) // each
        if fits < 1:
            raise MemoryError(self._no_room(1, rows))
        return min(fits, MAX_ROWS if self.batch_invariant else BUCKETS[-1])

    def _free_bytes(self) -> int:
        """Memory of the device that can be had; of a computer's, half."""
        free = checkpoint.free_bytes(self.device)
        return free // 2 if self.device.type == "cpu" else free

    def _no_room(self, batch_size: int, rows: int) -> str:
        each = bytes_per_row(self.model.config, self.cache_dtype) * batch_size
        free = self._free_bytes()
        return (
            f"the KV cache of {batch_size} x {rows} tokens needs {each * rows / 2**30:.2f} GiB, free {free / 2**30:.2f} GiB: "
            f"max_seq_len {max(0, int(free * 0.9) // each)} would fit"
        )


# ---------------------------------------------------------------- helpers


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_of(name: str | torch.device | None) -> torch.device:
    """A device that is there; None is the default. ValueError names it."""
    return convert_hf_checkpoint.parse_device(str(name or default_device()))


@torch.no_grad()
def fill_randomly(model: Transformer, seed: int = 0) -> None:
    """Normal weights of deviation 0.02, gains of 1 +- 0.02: of a real model's size: zeros would run faster. Weights that are to
    be packed are packed one by one: never is more than one of them plain."""
    device = model.norm.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        if isinstance(module, Scale):
            module.weight.normal_(1.0, 0.02, generator=generator)
        elif isinstance(module, Weight):
            shape, options = (module.out_features, module.in_features), {"dtype": module.dtype, "device": device}
            plain = Weight(*shape, bias=module.bias is not None, **options) if module.packed else module
            for tensor in plain.buffers():
                tensor.normal_(0.0, 0.02, generator=generator)
            if module.packed:
                module.load_state_dict(plain.round_to_nearest(module.packed).state_dict())


# ---------------------------------------------------------------- command line


def add_flag(parser: argparse.ArgumentParser, name: str, **options) -> None:
    """A flag spelled with underscores (gpt-fast's habit) and with dashes."""
    names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    parser.add_argument(*names, dest=name, **options)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    flag = lambda name, **options: add_flag(parser, name, **options)
    flag("checkpoint_path", type=Path, help="a directory, ours or Hugging Face's (default: the demo model)")
    flag("random_weights", metavar="SHAPE", help=f"random weights instead of a checkpoint: {', '.join(SHAPES)}")
    flag("prompt", help=f"text (default: {PROMPT}); an integer makes a synthetic prompt of so many tokens")
    flag("num_samples", type=int, default=1, help="samples, one after the other")
    flag("prompt_file", type=Path, help="many prompts, one JSON object a line (see batching.py), in place of --prompt")
    flag("output_file", type=Path, help="of --prompt_file: results, as they finish; what it has already is not done again")
    flag("batch_size", type=int, help="samples at once: num_samples times so many (default 1); of --prompt_file, what fits")
    flag("interactive", action="store_true", help="a conversation in the terminal; /help in it says more")
    flag("system", metavar="TEXT", help="the system message of the conversation")
    flag("max_new_tokens", type=int, help=f"default 200; {CHAT_TOKENS} in a conversation")
    flag("temperature", type=float, help="0 is greedy (default: the checkpoint's, else 0.8)")
    flag("top_k", type=int, help="0 is off (default: the checkpoint's, else 200)")
    flag("top_p", type=float)
    flag("min_p", type=float)
    flag("repetition_penalty", type=float)
    flag("seed", type=int, help="default 0")
    flag("stop", action="append", help="a string that ends the answer; may be given more than once")
    flag("logprobs", type=int, metavar="N", help="with --json: each token's log-probability, and the N likeliest tokens")
    flag("ignore_eos", action="store_true", default=None, help="go on past the model's stop tokens")
    flag("compile", action="store_true", help="the fast decode path: CUDA graphs on a GPU, torch.compile on a CPU")
    flag("compile_prefill", action="store_true", help="the fast prefill too: CUDA graphs, on a CPU torch.compile")
    flag("decode_mode", choices=Decoder.MODES, help="how to run decode steps (default: auto with --compile, else eager)")
    flag("batch_invariant", action="store_true", help="the same tokens for a prompt whatever shares its batch; slower")
    flag("draft_checkpoint_path", type=Path, help="speculate with this smaller model of the same vocabulary")
    flag("speculate", choices=("ngram", "self"), help="speculate without one: by look-up in the text, or the model in int4")
    flag("speculate_k", type=int, help=f"the most tokens drafted at once (default {DRAFTS}); fewer where that is faster")
    flag("max_seq_len", type=int, help="context: cache rows a sequence (default: the next 1,024 from what is needed)")
    flag("kv_cache_dtype", choices=CACHE_DTYPES, default="auto", help="fp8: half the bytes (default: the model's dtype)")
    flag("activation_dtype", choices=ACTIVATION_DTYPES, default="auto", help="of x in prompts' products with fp8 weights")
    flag("quantize", metavar="MODE", help="quantise at load: int8, fp8, int4, int4-gptq or int4-awq (see quantize.py)")
    flag("device", default=default_device())
    flag("dtype", choices=DTYPES, help="default: the checkpoint's")
    flag("profile", type=Path, metavar="FILE", help="write a trace of the last sample (chrome://tracing)")
    flag("json", action="store_true", help="one JSON object as the last line of standard output")
    flag("debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    for name, most in (("num_samples", MAX_SAMPLES), ("batch_size", sys.maxsize if args.prompt_file else MAX_SAMPLES)):
        if (number := getattr(args, name)) is not None and not 1 <= number <= most:
            parser.error(f"--{name}: found {number}, expected {'at least 1' if number < 1 else f'at most {most}'}")
    if args.interactive and (args.json or args.profile or args.num_samples * (args.batch_size or 1) > 1):
        parser.error("--interactive: found with --json, --profile, --num_samples or --batch_size, expected none of them")
    if bool(args.prompt_file) != bool(args.output_file):
        parser.error("--prompt_file, --output_file: found one of them, expected both")
    if args.prompt_file and (args.interactive or args.num_samples > 1 or args.profile):
        parser.error("--prompt_file: found with --interactive, --num_samples or --profile, expected none of them")
    without_use = (
        ("prompt", args.prompt_file or args.interactive, "with --prompt_file or --interactive, expected one of them"),
        ("checkpoint_path", args.random_weights, "with --random_weights, expected one of them"),
        ("system", not args.interactive, "without --interactive, expected both"),
        ("logprobs", not (args.json or args.prompt_file), "without --json, expected both"),
    )
    for name, is_useless, found in without_use:
        if is_useless and getattr(args, name) is not None:
            parser.error(f"--{name}: found {found}")
    if args.profile and (args.profile.is_dir() or not args.profile.absolute().parent.is_dir()):
        parser.error(f"--profile: found {args.profile}, expected a file in a directory that is there")
    args.prompt = PROMPT if args.prompt is None else args.prompt
    args.checkpoint_path = args.checkpoint_path or DEMO
    if args.speculate and args.draft_checkpoint_path:
        parser.error("--speculate: found with --draft_checkpoint_path, expected one of them")
    if args.speculate_k is not None and not (args.speculate or args.draft_checkpoint_path):
        parser.error("--speculate_k: found without a drafter, expected --draft_checkpoint_path or --speculate")
    return args


def load_engine(args: argparse.Namespace) -> Engine:
    """The engine that the command line asks for."""
    dtype = DTYPES.get(args.dtype)
    names = ("compile_prefill", "max_seq_len", "kv_cache_dtype", "activation_dtype", "batch_invariant")
    options = {name: getattr(args, name) for name in names}
    options["decode_mode"] = args.decode_mode or ("auto" if args.compile else "eager")
    if args.random_weights:
        return Engine.random(args.random_weights, args.device, dtype, args.quantize, **options)
    engine = Engine.load(args.checkpoint_path, args.device, dtype, progress=True, **options)
    if args.quantize:
        import quantize

        started = time.perf_counter()
        quantize.quantize_at_load(engine.model, args.quantize, engine.tokenizer)
        synchronize(engine.device)
        engine.load_sec += time.perf_counter() - started
    return engine


def set_up_speculation(args: argparse.Namespace, engine: Engine) -> None:
    """The drafter that the command line asks for, if any."""
    if args.draft_checkpoint_path:
        draft = Engine.load(args.draft_checkpoint_path, args.device, DTYPES.get(args.dtype), progress=True)
        if engine.tokenizer and draft.tokenizer:
            for i in range(min(e.tokenizer.vocab_size for e in (engine, draft))):
                found, expected = (e.tokenizer.token_bytes(i, skip_special=False) for e in (draft, engine))
                if found != expected:
                    where = f"{args.draft_checkpoint_path}: token {i}"
                    raise ValueError(f"{where}: found {found}, expected the target's {expected}")
        drafter = ModelDrafter(draft.model, f"draft model {args.draft_checkpoint_path.name}")
    elif args.speculate:
        drafter = NgramDrafter() if args.speculate == "ngram" else SelfDrafter(engine.model)
    else:
        return
    engine.speculate(drafter, DRAFTS if args.speculate_k is None else args.speculate_k)


def sampling_flags(args: argparse.Namespace) -> dict:
    """What the command line asks for. ValueError: a parameter that does not fit."""
    fields = {f.name for f in dataclasses.fields(SamplingParams)}
    given = {name: value for name, value in vars(args).items() if name in fields and value is not None}
    given["stop"] = tuple(args.stop or ())
    if args.interactive:
        given.setdefault("max_new_tokens", CHAT_TOKENS)
    SamplingParams(**given, n=1 if args.prompt_file else args.batch_size or 1)
    return given


def sampling_params(given: dict, engine: Engine) -> SamplingParams:
    """What the command line asks for, else the checkpoint's defaults, else gpt-fast's; says which the checkpoint's are."""
    if engine.defaults:
        print(f"sampling defaults of the checkpoint: {engine.defaults}", file=sys.stderr)
    engine.defaults = {"temperature": 0.8, "top_k": 200} | engine.defaults
    return engine.params(**given)


def run(args: argparse.Namespace, engine: Engine, params: SamplingParams) -> None:
    """Generates the samples of one prompt and prints them."""
    batch_size = args.batch_size or 1
    params = dataclasses.replace(params, n=batch_size)
    prompt = args.prompt
    if prompt.isdecimal():
        if len(prompt) > 9 or int(prompt) >= engine.context:
            raise ValueError(f"prompt: found {prompt:.20} tokens, expected fewer than the context of {engine.context}")
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(0, min(1024, engine.model.vocab_limit), (int(prompt),), generator=generator).tolist()

    compile_sec = 0.0
    if engine.decode_mode != "eager" or args.compile_prefill:
        started = time.perf_counter()
        engine.prepare(batch_size, len(engine.encode(prompt)) + params.max_new_tokens)
        engine.generate([prompt], dataclasses.replace(params, max_new_tokens=min(params.max_new_tokens, WARM_UP_TOKENS)))
        compile_sec = time.perf_counter() - started

    outputs, last = [], None
    streams = args.num_samples == batch_size == 1 and engine.tokenizer is not None
    on_text = (lambda _, text: print(text, end="", flush=True)) if streams else None
    for i in range(args.num_samples):
        profiling = args.profile and i == args.num_samples - 1
        with torch.profiler.profile() if profiling else contextlib.nullcontext() as profiler:
            new, timing = engine.generate([prompt], params, sample=i * batch_size, on_text=on_text)
        if profiling:
            profiler.export_chrome_trace(str(args.profile))
        outputs += new
        last = metrics(engine, timing, compile_sec)
        for out in new:
            text = out.text if out.text is not None else " ".join(map(str, out.tokens))
            print("" if streams else text, flush=True)
        if i == 0:
            cache = engine.session.cache
            gib, dtype = short(cache.num_bytes / 2**30), str(engine.cache_dtype).removeprefix("torch.")
            print(f"KV cache: {cache.batch_size} x {cache.max_seq_len} tokens, {gib} GiB of {dtype}", file=sys.stderr)
        report(last, timing)
    if args.json:
        print(json.dumps({"outputs": [o.to_dict() for o in outputs], "metrics": last}))


def dispatch(args: argparse.Namespace) -> None:
    """What the command line asks for: one prompt, many, or a conversation."""
    given = sampling_flags(args)  # a mistake there is told before anything is loaded
    engine = load_engine(args)
    for note in engine.load_notes:
        print(convert_hf_checkpoint.one_line(note), file=sys.stderr)
    set_up_speculation(args, engine)
    params = sampling_params(given, engine)
    if args.interactive:
        import chat

        chat.converse(engine, params, args.system)
    elif args.prompt_file:
        import batching

        result = batching.run(engine, params, args.prompt_file, args.output_file, args.batch_size)
        if args.json:
            print(json.dumps({"metrics": result}))
    else:
        run(args, engine, params)


def main(argv=None) -> int:
    """The command line. Exit status 0; 1 and one line on stderr for bad input; 2 for bad usage; 130 after Ctrl-C."""
    args = parse_args(argv)
    return convert_hf_checkpoint.report_errors(lambda: dispatch(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
