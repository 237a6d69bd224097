"""Files from a stranger, by the thousand: a checkpoint's files, damaged or made hostile, are read as a user would read them.

    python tests/fuzz.py --minutes 10 [--target safetensors]      # one core; `nice -n 19` keeps it out of the way

What must hold of every input: it loads to something that works, or is refused by a ValueError or OSError of one line that names
the file. No other exception, no crash, no hang, no more memory than MEMORY_BYTES, no file written, no process left.
Each input is read in a forked child, so that a crash of a library is a finding and not the end. test_fuzz.py runs a share.
"""

import argparse
import base64
import collections
import contextlib
import ctypes
import io
import json
import os
import pickle
import random
import re
import resource
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would not survive the fork
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoints
import sentencepiece
import tokenizers
import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

import checkpoint
from chat_template import ChatTemplate
from generate import Engine
from model import ModelConfig
from sampling import SamplingParams
from tokenizer import TokenStream, load_tokenizer

TIME_SEC = 20.0  # for one input; most take milliseconds
MEMORY_BYTES = 3 * 2**29  # of address space, beyond what the imports take
TEMPLATE_SEC = 1.5
VOCAB = 600  # of the model that the tokenizers belong to
CONFIG = ModelConfig.from_dict(
    {
        **checkpoints.SIZES,
        "model_type": "llama",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "eos_token_id": [2],
        "bos_token_id": 1,
    }
)

# ---------------------------------------------------------------- inputs: JSON that is not what it should be

NUMBERS = [-(2**63), -1, 0, 1, 2, 3, 7, 2**16, 2**31 - 1, 2**31, 2**32, 2**48, 2**63, 2**64, 10**30, 10**400, 10**4200]
FLOATS = [-1.0, -0.0, 0.5, 1e-320, 1e-30, 1.5, 1e30, 1e308, float("inf"), float("nan")]
TEXTS = [
    "",
    " ",
    "\n",
    "a\nb",
    "\0",
    "\ud800",
    "\x1b[2J",
    "x" * 3000,
    "../x",
    "/etc/passwd",
    "default",
    "llama3",
    "yarn",
    "[",
    "\\p{L}",
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from(FLOATS),
    st.sampled_from(TEXTS),
    st.integers(),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TEXTS) | st.text(max_size=4), inner, max_size=3)
    ),
)


def places(value, path=()):
    """The path of every value within a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))


def edited(document, edits):
    """The document after (place, what, value) edits: a value replaced, removed, or put beside."""
    document = json.loads(json.dumps(document))
    for number, what, value in edits:
        paths = list(places(document))
        *parents, last = paths[number % len(paths)] or (None,)
        if last is None:
            continue
        holder = document
        for key in parents:
            holder = holder[key]
        if what == "remove":
            del holder[last]
        elif what == "add" and isinstance(holder, dict):
            holder[value if isinstance(value, str) else str(value)[:50]] = holder[last]
        elif what == "add":
            holder.append(value)
        else:
            holder[last] = value
    return document


EDITS = st.lists(
    st.tuples(st.integers(0, 2**16), st.sampled_from(["replace", "replace", "replace", "remove", "add"]), VALUES),
    min_size=1,
    max_size=3,
)


def json_like(document) -> st.SearchStrategy[bytes]:
    """The document with a few values that do not belong there."""
    return EDITS.map(lambda edits: json.dumps(edited(document, edits)).encode())


def damaged(data: bytes, head: int | None = None) -> st.SearchStrategy[bytes]:
    """The bytes cut, overwritten, stretched, or as they are; mostly within the first `head`."""
    place = st.integers(0, min(head or len(data), len(data)))
    piece = st.one_of(
        st.binary(max_size=8), st.sampled_from([b"\xff" * 8, b"\0" * 64, b"[" * 3000, b"9" * 5000, b"\n", b'"', b"{", b"}"])
    )

    def apply(steps):
        out = data
        for what, at, new in steps:
            if what == "cut":
                out = out[:at]
            elif what == "drop":
                out = out[:at] + out[at + len(new) :]
            else:
                out = out[:at] + new + out[at + (len(new) if what == "overwrite" else 0) :]
        return out

    steps = st.tuples(st.sampled_from(["cut", "drop", "overwrite", "overwrite", "overwrite", "insert"]), place, piece)
    return st.lists(steps, max_size=4).map(apply)


# ---------------------------------------------------------------- inputs: the files


def save_ours(directory: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    specs = checkpoint.tensor_specs(CONFIG).items()
    tensors = ((n, torch.randn(s.shape, generator=generator).mul_(0.1).to(s.dtype)) for n, s in specs)
    checkpoint.save_checkpoint(directory, CONFIG, tensors, source="random", progress=False)
    (directory / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_p": 0.9, "do_sample": true, "eos_token_id": [1, 2]}'
    )
    return directory


def save_meta(directory: Path) -> dict[str, torch.Tensor]:
    directory.mkdir(parents=True)
    c = CONFIG
    shapes = {"tok_embeddings.weight": (c.vocab_size, c.hidden_size), "norm.weight": (c.hidden_size,)}
    for i in range(c.num_layers):
        rows = {"attention.wq": c.q_size, "attention.wk": c.kv_size, "attention.wv": c.kv_size, "attention.wo": c.hidden_size}
        rows |= {"feed_forward.w1": c.intermediate_size, "feed_forward.w3": c.intermediate_size}
        shapes |= {f"layers.{i}.{name}.weight": (count, c.hidden_size) for name, count in rows.items()}
        shapes[f"layers.{i}.feed_forward.w2.weight"] = (c.hidden_size, c.intermediate_size)
        shapes |= {f"layers.{i}.{name}.weight": (c.hidden_size,) for name in ("attention_norm", "ffn_norm")}
    return {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}


def saved(value, how=torch.save) -> bytes:
    buffer = io.BytesIO()
    how(value, buffer)
    return buffer.getvalue()


def byte_level(added=True) -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, "th", "the", "Ġthe", "Ġa"])}
    bpe = tokenizers.Tokenizer(models.BPE(vocab, [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "a")]))
    split = pre_tokenizers.Split(tokenizers.Regex(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder, bpe.normalizer = decoders.ByteLevel(), normalizers.NFC()
    bpe.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return bpe


def llama_like() -> tokenizers.Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "t", "h", "e", "th", "the", "▁the"]
    bpe = models.BPE(
        {p: i for i, p in enumerate(pieces)},
        [("t", "h"), ("th", "e"), ("▁", "the")],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    llama = tokenizers.Tokenizer(bpe)
    llama.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    llama.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    llama.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    llama.add_special_tokens(["<unk>", "<s>", "</s>"])
    return llama


def sentencepiece_model(kind: str) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog", "a the that those these 123"] * 20),
        model_writer=model, model_type=kind, vocab_size=300, byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
        normalization_rule_name="identity" if kind == "bpe" else "nmt_nfkc",
    )  # fmt: skip
    return model.getvalue()


NORMALIZERS = [
    {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"},
    {"type": "Replace", "pattern": {"Regex": "(a|e)*"}, "content": "the"},
    {"type": "Replace", "pattern": {"Regex": "(.+)+$"}, "content": ""},
    {"type": "Prepend", "prepend": "the"},
    *({"type": kind} for kind in ("NFKC", "NFD", "ByteLevel", "Nmt", "StripAccents")),
    {"type": "Strip", "strip_left": True, "strip_right": True},
]
TIKTOKEN = b"".join(
    base64.b64encode(t) + b" %d\n" % i for i, t in enumerate([*(bytes([b]) for b in range(256)), b"th", b"the", b" the"])
)
TOKENIZER_CONFIG = {
    "bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True, "legacy": False,
    "added_tokens_decoder": {"301": {"content": "<|eot_id|>"}, "302": {"content": "<image>"}},
    "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.role + m.content }}{% endfor %}",
}  # fmt: skip

EXPRESSIONS = [
    "messages", "messages[0].content", "messages[9].content", "bos_token", "none", "1", "9**9**9", "'x' * 10**9",
    "range(10**9)", "messages.__class__", "''.__class__.__mro__", "cycler.__init__.__globals__.os.system('touch MARK')",
    "lipsum.__globals__", "self._TemplateReference__context", "namespace(x=1)", "raise_exception('no')",
    "strftime_now('%s' * 99)", "messages | tojson", "messages | attr('__class__')", "dict(a=1) | xmlattr",
    "['a'] * 10**8 | length", "(1, 2, 3) | random", "'%999999999d' % 1", "'{0.__class__}'.format(1)",
    "'{:>999999999}'.format(1)", "messages | map(attribute='__class__') | list", "loop.index", "joiner()()",
    "messages | groupby('role')", "'a' | replace('', 'b' * 10**6)", "'a\\ud800'", "'\\x1b[2J'",
    "messages[0].content | indent(10**9)", "x.y.z", "'open' | attr('__globals__')", "config", "request", "messages.append(1)",
    "lipsum(n=10**6)", "'a' | center(10**9)",
]  # fmt: skip


OPERATORS = ("+", "~", "*", "**", "%", "==", "in", "and")
FILTERS = ("trim", "upper", "list", "length", "tojson", "string", "reverse", "sort", "join", "batch(2)", "first")
FRAGMENTS = (
    *("", "<s>", "text", "{%", "{{", "{# ", "{% endfor %}", "{% break %}"),
    *("{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% extends 'x' %}"),
)
BLOCKS = (  # around an expression E and a body B
    "{% for a in E %}B{% endfor %}",
    "{% for a in range(99) %}B{% endfor %}",
    "{% for a in range(99999) %}B{% endfor %}",
    "{% if E %}B{% endif %}",
    "{% set ns = E %}B{{ ns }}",
    "{% macro m() %}B{{ m() }}{% endmacro %}{{ m() }}",
    "{% generation %}B{% endgeneration %}",
)


def template_sources() -> st.SearchStrategy[str]:
    """Templates of what jinja2 has, put together without regard to sense."""
    expression = st.recursive(
        st.sampled_from(EXPRESSIONS),
        lambda e: st.one_of(
            st.tuples(e, st.sampled_from(OPERATORS), e).map(" ".join),
            st.tuples(e, st.sampled_from(FILTERS)).map(" | ".join),
            st.tuples(e, e).map(lambda pair: f"({pair[0]})[{pair[1]}]"),
            e.map(lambda x: f"[{x}, {x}]"),
        ),
        max_leaves=4,
    )

    def filled(parts):
        block, e, body = parts
        return re.sub("[EB]", lambda letter: e if letter[0] == "E" else body, block)

    return st.recursive(
        st.one_of(expression.map(lambda e: "{{ " + e + " }}"), st.sampled_from(FRAGMENTS), st.text(max_size=10)),
        lambda body: st.tuples(body, body).map("".join) | st.tuples(st.sampled_from(BLOCKS), expression, body).map(filled),
        max_leaves=5,
    )


class Hostile:
    """Pickles to a call that leaves a mark."""

    def __reduce__(self):
        return os.mkdir, ("MARK",)


# ---------------------------------------------------------------- reading an input, in the child


def read_checkpoint(directory: Path) -> None:
    """As generate.py does, up to a first token or two."""
    engine = Engine.load(directory, "cpu")
    with refusing_inputs():
        engine.generate([[1, 2]], SamplingParams(max_new_tokens=2))


def read_tokenizer(directory: Path) -> None:
    """Text goes in and comes out; ids are the model's."""
    tokenizer = load_tokenizer(directory, VOCAB)
    if tokenizer is None:
        return
    with refusing_inputs():
        ids = tokenizer.encode("the Quick <s> <|im_end|> fox\n 123 \u4e2d\U0001f600", allowed_special=True)
        ids += tokenizer.encode("", bos=True) + tokenizer.encode("a the", bos=False)
        if not all(0 <= i < VOCAB for i in ids):
            raise AssertionError(f"ids of text: found {ids}, expected 0 to {VOCAB - 1}")
        stream = TokenStream(tokenizer)
        assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)
    if tokenizer.chat and (directory / "tokenizer_config.json").exists():
        tokenizer.encode_chat([{"role": "user", "content": "a </s> b"}])


@contextlib.contextmanager
def refusing_inputs():
    """What a user gives to a loaded model may be refused too; such an error names no file."""
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        raise Refused(str(error)) from None


class Refused(Exception):
    """One line, without a file."""


def read_template(directory: Path) -> None:
    source = (directory / "chat_template.jinja").read_text("utf-8", "surrogatepass")
    template = ChatTemplate(source, str(directory / "chat_template.jinja"), {"bos_token": "<s>"}, ["<s>", "</s>"], TEMPLATE_SEC)
    text, mark = template.render([{"role": "user", "content": "a <s> b"}])
    assert isinstance(text, str)
    assert len(mark) == 1


# ---------------------------------------------------------------- one input


class Target:
    """A directory, strategies for some of its files, and how it is read."""

    def __init__(self, read, base: Path, files: dict[str, st.SearchStrategy[bytes]]):
        self.read, self.base = read, base
        self.inputs = st.one_of([strategy.map(lambda data, name=name: {name: data}) for name, strategy in files.items()])


def targets(root: Path) -> dict[str, Target]:
    """Every target, its base directory made below `root`."""
    ours = save_ours(root / "ours")
    header, data = checkpoints.read_safetensors(ours / "model.safetensors")
    checkpoints.write_random_hf(root / "hf", CONFIG, shard_bytes=20_000)
    hf = json.loads((root / "hf" / "config.json").read_text())
    index = json.loads((root / "hf" / checkpoint.INDEX_NAME).read_text())
    scaled = hf | {"model_type": "mistral", "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}
    scaled["rope_parameters"] = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    meta = save_meta(root / "meta")
    (root / "meta" / "consolidated.00.pth").write_bytes(saved(meta))
    params = {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "norm_eps": 1e-5,
        "rope_theta": 1e4,
        "use_scaled_rope": True,
        "vocab_size": -1,
    }
    (root / "meta" / "params.json").write_text(json.dumps(params))

    def safetensors(header_bytes, length=None, tail=data):
        return struct.pack("<Q", len(header_bytes) if length is None else length) + header_bytes + tail

    whole = (ours / "model.safetensors").read_bytes()
    huge = st.sampled_from([0, 1, 7, 8, 2**31, 2**63, 2**64 - 1, 100_000_000, 100_000_001, len(whole), len(whole) - 8])
    headers = st.one_of(
        EDITS.map(lambda edits: safetensors(json.dumps(edited(header, edits)).encode())),
        st.tuples(EDITS, huge, st.binary(max_size=9)).map(
            lambda p: safetensors(json.dumps(edited(header, p[0])).encode(), p[1], p[2])
        ),
        damaged(whole, head=4000),
        damaged(whole),
        huge.map(lambda n: safetensors(b"{}", n, b"")),
    )

    tensor = st.one_of(
        st.sampled_from(list(meta.values())), VALUES, st.builds(torch.zeros, st.lists(st.integers(0, 40), max_size=3)),
        st.builds(lambda: torch.zeros(1).expand(2**20, 2**20)), st.builds(lambda: torch.eye(3).to_sparse()), st.builds(Hostile),
        st.builds(lambda: torch.zeros(4, 4, device="meta")), st.builds(lambda: torch.zeros(48, 32, dtype=torch.complex64)),
        st.builds(lambda: torch.nn.Parameter(torch.zeros(32))), st.builds(lambda: torch.zeros(32, 48).T),
    )  # fmt: skip
    changes = st.dictionaries(st.sampled_from(list(meta)) | SCALARS, tensor, max_size=2)
    pickled = st.one_of(
        changes.map(lambda c: saved(meta | c)),
        changes.map(lambda c: saved(c)),
        tensor.map(lambda t: saved(t, lambda value, file: pickle.dump(value, file))),
        damaged(saved(meta), head=3000),
        damaged(saved(meta)),
    )

    for name in ("byte-level", "llama-like", "tiktoken", "bpe", "unigram", "template"):
        (root / name).mkdir()
    (root / "tiktoken" / "tokenizer.model").write_bytes(TIKTOKEN)
    (root / "template" / "chat_template.jinja").write_text("{{ bos_token }}")
    for kind in ("bpe", "unigram"):
        (root / kind / "tokenizer.model").write_bytes(sentencepiece_model(kind))
    jsons = {}
    for name, made in (("byte-level", byte_level()), ("llama-like", llama_like())):
        (root / name / "tokenizer.json").write_text(made.to_str())
        jsons[name] = json.loads(made.to_str())
    config = json_like(TOKENIZER_CONFIG)

    def tokenizer_json(name):
        text = json.dumps(jsons[name]).encode()
        parts = {k: v for k, v in jsons[name].items() if k != "model"}  # where most places are ids of a vocabulary
        normalizing = st.lists(st.sampled_from(NORMALIZERS), max_size=40).map(
            lambda steps: json.dumps(jsons[name] | {"normalizer": {"type": "Sequence", "normalizers": steps}}).encode()
        )
        outside = EDITS.map(lambda edits: json.dumps(edited(parts, edits) | {"model": jsons[name]["model"]}).encode())
        return outside | json_like(jsons[name]) | damaged(text, head=1500) | normalizing

    def sp(kind):
        return damaged((root / kind / "tokenizer.model").read_bytes(), head=400) | damaged(
            (root / kind / "tokenizer.model").read_bytes()
        )

    scaled3 = hf | {"rope_parameters": {"rope_theta": 1e4} | llama3}
    quantised = [
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": True, "checkpoint_format": "gptq"},
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8}}},
        },
    ]
    foreign = st.one_of([json_like(hf | {"quantization_config": q}) for q in quantised])
    configs = foreign | json_like(hf) | json_like(scaled) | json_like(scaled3) | damaged(json.dumps(hf).encode())
    our_config = json_like(json.loads((ours / "config.json").read_text()))
    generation = json_like({"temperature": 0.6, "eos_token_id": [1, 2], "top_k": 5})
    template = template_sources().map(lambda source: source.encode("utf-8", "surrogatepass"))
    files = {
        "safetensors": (read_checkpoint, "ours", {"model.safetensors": headers}),
        "config": (read_checkpoint, "hf", {"config.json": configs, checkpoint.INDEX_NAME: json_like(index)}),
        "our config": (read_checkpoint, "ours", {"config.json": our_config, "generation_config.json": generation}),
        "meta": (read_checkpoint, "meta", {"consolidated.00.pth": pickled, "params.json": json_like(params)}),
        "tiktoken": (read_tokenizer, "tiktoken", {"tokenizer.model": damaged(TIKTOKEN), "tokenizer_config.json": config}),
        "sentencepiece bpe": (read_tokenizer, "bpe", {"tokenizer.model": sp("bpe"), "tokenizer_config.json": config}),
        "sentencepiece unigram": (read_tokenizer, "unigram", {"tokenizer.model": sp("unigram")}),
        "tokenizer.json byte-level": (
            *(read_tokenizer, "byte-level"),
            {"tokenizer.json": tokenizer_json("byte-level"), "tokenizer_config.json": config},
        ),
        "tokenizer.json llama-like": (read_tokenizer, "llama-like", {"tokenizer.json": tokenizer_json("llama-like")}),
        "template": (read_template, "template", {"chat_template.jinja": template}),
    }
    return {name: Target(read, root / base, strategies) for name, (read, base, strategies) in files.items()}


def limit_child() -> None:
    """No file may be written, little memory taken."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))


def read_in_child(target: Target, directory: Path) -> tuple[str, str]:
    """What reading the directory came to, as one of loaded, refused, failed, and what was said."""
    answer, end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(answer)
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1), os.dup2(quiet, 2)
            torch.set_num_threads(1)  # the threads of the parent's pool did not survive the fork: to wait for them has no end
            limit_child()
            os.write(end, json.dumps(outcome(target, directory)).encode()[:60_000])
        finally:
            os._exit(0)
    os.close(end)
    try:
        is_ready = select.select([answer], [], [], TIME_SEC)[0]
        said = b"".join(iter(lambda: os.read(answer, 2**16), b"")) if is_ready else b""
    finally:
        os.close(answer)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    left = reap_orphans()
    if not is_ready:
        return "failed", f"no end after {TIME_SEC:g} s"
    if not said:
        return "failed", f"the process died of signal {os.WTERMSIG(status) if os.WIFSIGNALED(status) else '?'}"
    if left:
        return "failed", f"{left} processes left behind"
    return tuple(json.loads(said))


def outcome(target: Target, directory: Path) -> tuple[str, str]:
    os.chdir(directory)
    try:
        target.read(directory)
    except (ValueError, OSError, Refused) as error:
        said = str(error)
        ok = len(said.splitlines()) == 1 and said.isprintable() and len(said) < 1000 and "File too large" not in said
        named = str(directory) in said or said.startswith("the built-in ")  # template, which is no file
        ok = ok and ("expected" in said or "NaN" in said if isinstance(error, Refused) else named)
        return "refused" if ok else "failed", f"{type(error).__name__}: {said[:2000]}" + (
            "" if ok else "\n" + traceback.format_exc()[-3000:]
        )
    except BaseException as error:
        return "failed", f"{type(error).__name__}: {error}"[:1000] + "\n" + traceback.format_exc()[-3000:]
    return "loaded", ""


def adopt_orphans() -> None:
    """Processes that a child leaves behind become ours (PR_SET_CHILD_SUBREAPER), so that they can be counted."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def reap_orphans(patience_sec: float = 2.0) -> int:
    """Waits for what a child has left behind; ends and counts what does not end by itself."""
    end, left = time.monotonic() + patience_sec, 0
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return left
        if pid == 0:
            if time.monotonic() > end:
                for pid in map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()):
                    os.kill(pid, signal.SIGKILL)
                    left += 1
                end = time.monotonic() + patience_sec
            time.sleep(0.002)


class Fuzzer:
    """Runs inputs of targets and counts what becomes of them."""

    def __init__(self, root: Path):
        adopt_orphans()
        self.root, self.targets = root, targets(root / "bases")
        self.counts = {name: collections.Counter() for name in self.targets}
        self.failures: list[tuple[str, str, dict[str, bytes]]] = []
        for target in self.targets.values():
            target.read(target.base)  # what is imported and compiled at the first use: once, not in every child

    def try_one(self, name: str, files: dict[str, bytes]) -> str:
        """None, or what is wrong with what the input came to."""
        target = self.targets[name]
        with tempfile.TemporaryDirectory(dir=self.root) as place:
            directory = Path(place) / "in"
            directory.mkdir()
            for path in target.base.iterdir():
                if path.name not in files:
                    os.link(path, directory / path.name)
            for file, data in files.items():
                (directory / file).write_bytes(data)
            before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
            kind, said = read_in_child(target, directory)
            if {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} != before:
                kind, said = "failed", f"files were written: {sorted(path.name for path in directory.iterdir())}"
        self.counts[name][kind] += 1
        return said if kind == "failed" else ""

    def run(self, name: str, examples: int, seed: int, until: float = float("inf"), keep: Path | None = None) -> None:
        """So many inputs of a target; failures are noted, one for each last line of what was said."""
        known = {said.splitlines()[0][:60] for _, said, _ in self.failures}

        @hypothesis_seed(seed)
        @settings(
            max_examples=examples, database=None, deadline=None, phases=[Phase.generate], verbosity=Verbosity.quiet,
            suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
        )  # fmt: skip
        @given(self.targets[name].inputs)
        def run(files):
            if time.monotonic() > until:
                return
            if (said := self.try_one(name, files)) and said.splitlines()[0][:60] not in known:
                known.add(said.splitlines()[0][:60])
                self.failures.append((name, said, files))
                if keep:
                    place = keep / f"{len(self.failures):03d}-{name.replace(' ', '-')}"
                    place.mkdir(parents=True)
                    (place / "what.txt").write_text(said)
                    for file, data in files.items():
                        (place / file).write_bytes(data)

        run()

    def report(self, seconds: float) -> str:
        lines = [f"{'target':28} {'inputs':>8} {'loaded':>8} {'refused':>8} {'failed':>8}"]
        for name, counts in self.counts.items():
            lines.append(f"{name:28} {counts.total():8} {counts['loaded']:8} {counts['refused']:8} {counts['failed']:8}")
        total = sum(self.counts.values(), collections.Counter())
        lines.append(f"{'all':28} {total.total():8} {total['loaded']:8} {total['refused']:8} {total['failed']:8}")
        return "\n".join([*lines, f"{seconds:.0f} s, {len(self.failures)} kinds of failure"])


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--target", action="append", help="one of them (default: all, in turn); may be given more than once")
    parser.add_argument("--seed", type=int, help="default: another each time")
    parser.add_argument("--keep", type=Path, help="a directory for the inputs that fail")
    args = parser.parse_args(argv)
    began, until = time.monotonic(), time.monotonic() + 60 * args.minutes
    seeds = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as root:
        fuzzer = Fuzzer(Path(root))
        if unknown := set(args.target or ()) - set(fuzzer.targets):
            parser.error(f"--target: found {', '.join(unknown)}, expected some of {', '.join(fuzzer.targets)}")
        while time.monotonic() < until:
            for name in args.target or fuzzer.targets:
                if time.monotonic() < until:
                    fuzzer.run(name, 20 if name == "template" else 100, seeds.getrandbits(32), until, args.keep)
    for name, said, _ in fuzzer.failures:
        print(f"---- {name}: {said}\n")
    print(fuzzer.report(time.monotonic() - began))
    return bool(fuzzer.failures)


if __name__ == "__main__":
    sys.exit(main())
