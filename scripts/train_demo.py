"""Train the embedded default: a small Llama 3 and its draft model, from one text file, on one GPU in minutes.

Owns the tokenizer's training, the recipe, the two trainings and the model card. transformers' LlamaForCausalLM is the trainer.
The result is a plain Hugging Face directory (the target, with its draft in draft/), so nothing in the engine knows this script.

    python scripts/train_demo.py TEXT --output_dir assets/demo

Letters: B windows, T tokens of a window, N tokens of the text, V vocabulary.
"""

import argparse
import base64
import copy
import dataclasses
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

# ---------------------------------------------------------------- recipe

SIZE_LIMIT_BYTES = 16_000_000  # both models' weights: they live in git
HELD_OUT = 0.1  # the last tenth of the text
PROMPTS = ("ROMEO:", "JULIET:\n", "KING RICHARD II:", "First Citizen:\nBefore we", "To be, or not to be")


@dataclass(frozen=True)
class Shape:
    """A model's size. Heads are 64 wide; hidden and intermediate sizes are multiples of 128, as the kernels like them."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides the text and the seed."""

    target: Shape = Shape(256, 768, 6, 4, 2)
    draft: Shape = Shape(128, 256, 2, 2, 1)  # about a tenth of the target's weights, and so of its bytes per token
    vocab_size: int = 2048  # rows: byte-pair ranks, then len(SPECIAL_TOKENS) specials
    context: int = 1024  # every fourth step trains on windows this long
    window: int = 256  # the other steps'
    tokens_per_step: int = 16384
    target_steps: int = 3000
    draft_steps: int = 3000
    target_lr: float = 1e-3
    draft_lr: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    dropout: float = 0.3  # of embeddings, attention and MLP outputs, and attention weights: a few million weights, 1 MB of text
    ema_decay: float = 0.995  # the average of the weights is what is evaluated and kept
    evaluate_every: int = 100  # steps
    patience: int = 12  # evaluations without a better one before training stops early
    synthetic_rows: int = 2048  # texts that the target writes for its draft to learn from
    synthetic_tokens: int = 512  # in each
    sample_tokens: int = 160  # in each of the card's examples


TINY = Recipe(  # a check of every stage on a CPU in seconds; it learns nothing
    target=Shape(128, 256, 2, 2, 1),
    draft=Shape(128, 128, 1, 2, 1),
    vocab_size=512,
    context=64,
    window=32,
    tokens_per_step=256,
    target_steps=4,
    draft_steps=4,
    warmup_steps=1,
    evaluate_every=2,
    synthetic_rows=8,
    synthetic_tokens=32,
    sample_tokens=8,
)

# ---------------------------------------------------------------- tokenizer

LLAMA3_SPLIT = (  # llama-models, models/llama3/tokenizer.py
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (  # Llama 3's first 16 of 256, in its order
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 8)),
)


def train_ranks(text: str, num_ranks: int) -> dict[bytes, int]:
    """Byte-pair ranks of `text` for tiktoken: 256 single bytes, then the merges in the order in which they were learned.

    Newlines are kept apart from punctuation while learning, though Llama 3's split joins them: a prompt that ends in "ROMEO:"
    must not meet a model that has only ever seen ":\\n" as one token. ValueError if the text is too small for `num_ranks`.
    """
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    pieces = tokenizers.pre_tokenizers
    trained.pre_tokenizer = pieces.Sequence(
        [
            pieces.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated"),
            pieces.Split(tokenizers.Regex(r"[\r\n]+"), "isolated"),
            pieces.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=num_ranks, initial_alphabet=pieces.ByteLevel.alphabet(), show_progress=False, min_frequency=2
    )
    trained.train_from_iterator([text], trainer)
    byte_of = _bytes_of_characters()
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in trained.get_vocab().items()}
    if len(ranks) != num_ranks:
        raise ValueError(
            f"--vocab_size: the text yields {len(ranks)} ranks, expected {num_ranks}: give more text or fewer rows"
        )
    return ranks


def _bytes_of_characters() -> dict[str, int]:
    """The byte that each printable stand-in of byte-level BPE means (GPT-2's encoder.py, bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def make_encoding(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    specials = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding("demo", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=specials)


# ---------------------------------------------------------------- data


class Text:
    """A tokenised text on the device, from which training windows are drawn."""

    def __init__(self, text: str, encoding: tiktoken.Encoding, device: torch.device):
        ids = encoding.encode_ordinary(text)
        self.num_bytes = len(text.encode())
        self.tokens = torch.tensor(ids, device=device)  # [N]
        self.bos = encoding.encode_single_token("<|begin_of_text|>")
        self.speeches = torch.tensor(_speech_starts(ids, encoding), device=device)  # where a window may start with BOS

    def windows(self, count: int, length: int) -> Tensor:
        """[count, length + 1] random windows; about half start at a speech, with BOS in front, as a prompt does."""
        device, columns = self.tokens.device, torch.arange(length + 1, device=self.tokens.device)
        anywhere = torch.randint(len(self.tokens) - length, (count,), device=device)
        speech = self.speeches[torch.randint(len(self.speeches), (count,), device=device)] - 1  # BOS takes the place before it
        at_speech = (torch.rand(count, device=device) < 0.5) & (speech + length < len(self.tokens))
        start = torch.where(at_speech, speech, anywhere)
        windows = self.tokens[(start[:, None] + columns).clamp(min=0)]
        windows[:, 0] = torch.where(at_speech, self.bos, windows[:, 0])
        return windows


def _speech_starts(ids: list[int], encoding: tiktoken.Encoding) -> list[int]:
    """Indices of the tokens that follow a blank line, and the first."""
    starts, tail = [0], b""
    for i, token in enumerate(ids):
        if tail == b"\n\n":
            starts.append(i)
        tail = (tail + encoding.decode_single_token_bytes(token))[-2:]
    return starts


def split_text(path: Path) -> tuple[str, str]:
    """The text's training part and its held-out end. OSError if it cannot be read, ValueError if it is not UTF-8."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is {error.object[error.start]:#04x}, expected UTF-8 text") from None
    cut = int(len(text) * (1 - HELD_OUT))
    return text[:cut], text[cut:]


# ---------------------------------------------------------------- models


def make_model(shape: Shape, recipe: Recipe, bos: int, device: torch.device) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=64,
        max_position_embeddings=recipe.context,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": recipe.context // 8,
        },
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=bos + 1,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).to(device)


def num_parameters(model: LlamaForCausalLM) -> int:
    return sum(p.numel() for p in model.parameters())  # the tied head is not counted twice


def add_dropout(model: LlamaForCausalLM, rate: float) -> None:
    """Dropout where GPT-2 has it; Llama's own code has it on attention weights only."""

    def drop(module, _inputs, output):
        return F.dropout(output, rate, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = rate
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def autocast(device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def logits_of(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Float32 logits [B, T, V] of tokens [B, T]."""
    return model(tokens, use_cache=False).logits.float()


@torch.no_grad()
def generate(model: LlamaForCausalLM, prompt: Tensor, new_tokens: int, temperature: float = 0.0) -> tuple[Tensor, Tensor]:
    """Continue prompt [B, T]: tokens [B, new_tokens], and each step's smallest gap between first and second logit [new_tokens].

    Special tokens are never chosen: the text has none.
    """
    tokens, cache, chosen, gaps = prompt, None, [], []
    num_ranks = model.config.vocab_size - len(SPECIAL_TOKENS)
    for _ in range(new_tokens):
        output = model(tokens, past_key_values=cache, use_cache=True)
        logits, cache = output.logits[:, -1, :num_ranks].float(), output.past_key_values
        first, second = logits.topk(2).values.unbind(-1)
        gaps.append((first - second).min())
        if temperature:
            tokens = torch.multinomial((logits / temperature).softmax(-1), 1)
        else:
            tokens = logits.argmax(-1, keepdim=True)
        chosen.append(tokens)
    return torch.cat(chosen, dim=1), torch.stack(gaps)


# ---------------------------------------------------------------- evaluation


def held_out_windows(text: Text, length: int) -> tuple[Tensor, Tensor]:
    """Windows [B, T + 1] over the whole text, BOS in front, and which of their targets [B, T] count.

    Each token is scored exactly once, after at least T / 2 tokens of context (but for the text's first T).
    """
    bos = torch.tensor([text.bos], device=text.tokens.device)
    stream = torch.cat([bos, text.tokens])
    if len(stream) < length + 1:
        raise ValueError(f"the held-out text has {len(text.tokens)} tokens, expected at least {length}: give more text")
    starts = [*range(0, len(stream) - length - 1, length // 2), len(stream) - length - 1]
    windows = torch.stack([stream[s : s + length + 1] for s in starts])
    counted, scored = torch.zeros(len(starts), length, dtype=torch.bool), 1  # stream[0] is BOS: given, not scored
    for row, start in enumerate(starts):
        counted[row, scored - start - 1 :] = True
        scored = start + length + 1
    return windows, counted.to(stream.device)


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, windows: Tensor, counted: Tensor, other: LlamaForCausalLM | None = None
) -> dict[str, float]:
    """Held-out `loss` in nats per token. With the target as `other` also `kl` to it in nats, `agreement` of greedy choices, and
    `overlap`, the mass that both distributions share (how often the target would accept a draft at temperature 1).
    """
    sums = dict.fromkeys(("loss",) if other is None else ("loss", "kl", "agreement", "overlap"), 0.0)
    for rows, mask in zip(windows.split(32), counted.split(32), strict=True):
        log_q = logits_of(model, rows[:, :-1])[mask].log_softmax(-1)  # [counted tokens, V]
        log_p = None if other is None else logits_of(other, rows[:, :-1])[mask].log_softmax(-1)
        sums["loss"] += F.nll_loss(log_q, rows[:, 1:][mask], reduction="sum").item()
        if log_p is not None:
            sums["kl"] += F.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
            sums["agreement"] += (log_q.argmax(-1) == log_p.argmax(-1)).sum().item()
            sums["overlap"] += torch.minimum(log_q.exp(), log_p.exp()).sum().item()
    return {name: total / counted.sum().item() for name, total in sums.items()}


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Outcome:
    """A finished training."""

    model: LlamaForCausalLM  # the averaged weights that did best
    steps: int  # made in all
    best_step: int
    seconds: float


def train(
    name: str,
    model: LlamaForCausalLM,
    windows_at: Callable[[int], Tensor],
    loss_of: Callable[[LlamaForCausalLM, Tensor], Tensor],
    score_of: Callable[[LlamaForCausalLM], float],
    recipe: Recipe,
    steps: int,
    lr: float,
    deadline_sec: float,
) -> Outcome:
    """AdamW with a cosine to zero, ended by `steps` or by the deadline (time.monotonic), whichever comes first.

    `score_of` judges the moving average of the weights; the best one is returned.
    """
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=model.device.type == "cuda")
    weights, average = list(model.parameters()), copy.deepcopy(model).eval()
    averaged = list(average.parameters())
    best_score, best_step, best = math.inf, 0, None
    begin_sec = time.monotonic()
    for step in range(1, steps + 1):
        elapsed = (time.monotonic() - begin_sec) / max(deadline_sec - begin_sec, 1e-3)
        progress = min(max(step / steps, elapsed), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(step / recipe.warmup_steps, 0.5 + 0.5 * math.cos(math.pi * progress))
        model.train()
        with autocast(model.device):
            loss = loss_of(model, windows_at(step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(recipe.ema_decay, step / (step + 10))  # an early average must not remember the random start
            torch._foreach_lerp_(averaged, weights, 1 - decay)
        last = step == steps or progress == 1.0
        if last or step % recipe.evaluate_every == 0:
            with autocast(model.device):
                score = score_of(average)
            if not math.isfinite(score):
                raise ValueError(
                    f"{name}: held-out loss {score} at step {step}, expected a finite one: lower its learning rate"
                )
            if score < best_score:
                best_score, best_step, best = score, step, [p.detach().clone() for p in averaged]
            now = time.monotonic() - begin_sec
            say(
                f"{name}: step {step}/{steps}, {now:.1f} s, loss {loss.item():.4f}, held-out {score:.4f}, best {best_score:.4f}"
            )
            if last or step - best_step >= recipe.patience * recipe.evaluate_every:
                break
    with torch.no_grad():
        torch._foreach_copy_(averaged, best)
    return Outcome(average, step, best_step, time.monotonic() - begin_sec)


def window_length(recipe: Recipe, step: int) -> int:
    return recipe.context if step % 4 == 0 else recipe.window


def train_target(text: Text, held_out, recipe: Recipe, device: torch.device, deadline_sec: float) -> Outcome:
    model = make_model(recipe.target, recipe, text.bos, device)
    add_dropout(model, recipe.dropout)

    def windows_at(step: int) -> Tensor:
        length = window_length(recipe, step)
        return text.windows(recipe.tokens_per_step // length, length)

    def loss_of(model, windows: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(model, windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def score_of(model) -> float:
        return evaluate(model, *held_out)["loss"]

    return train("target", model, windows_at, loss_of, score_of, recipe, recipe.target_steps, recipe.target_lr, deadline_sec)


def train_draft(target: LlamaForCausalLM, text: Text, held_out, recipe: Recipe, device, deadline_sec: float) -> Outcome:
    """Distil the draft: it learns the target's distribution, half on the text and half on what the target itself writes,
    as that is what it will have to predict.
    """
    begin_sec = time.monotonic()
    start = torch.full((recipe.synthetic_rows, 1), text.bos, device=device)
    with autocast(device):
        written, _ = generate(target, start, recipe.synthetic_tokens, temperature=1.0)
    written = torch.cat([start, written], dim=1)  # [rows, tokens + 1]
    say(f"draft: the target wrote {written.numel()} tokens in {time.monotonic() - begin_sec:.1f} s")

    def windows_at(step: int) -> Tensor:
        if step % 2:
            return written[torch.randint(len(written), (recipe.tokens_per_step // recipe.synthetic_tokens,), device=device)]
        length = window_length(recipe, step)
        return text.windows(recipe.tokens_per_step // length, length)

    def loss_of(model, windows: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = logits_of(target, windows[:, :-1]).log_softmax(-1).flatten(0, 1)
        return F.kl_div(
            logits_of(model, windows[:, :-1]).log_softmax(-1).flatten(0, 1), wanted, log_target=True, reduction="batchmean"
        )

    def score_of(model) -> float:
        return evaluate(model, *held_out, other=target)["kl"]

    model = make_model(recipe.draft, recipe, text.bos, device)
    return train("draft", model, windows_at, loss_of, score_of, recipe, recipe.draft_steps, recipe.draft_lr, deadline_sec)


# ---------------------------------------------------------------- saving


def save_checkpoint(directory: Path, model: LlamaForCausalLM, ranks: dict[bytes, int]) -> None:
    """A Hugging Face directory: config.json, model.safetensors in bfloat16, the tokenizer, generation_config.json."""
    model = copy.deepcopy(model).to(torch.bfloat16)
    model.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)  # the writer makes it private
    bos, eos = model.config.bos_token_id, model.config.eos_token_id
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in sorted(ranks.items(), key=lambda item: item[1]))
    (directory / "tokenizer.model").write_text("".join(lines))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[1],
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_position_embeddings,
        "added_tokens_decoder": {
            str(len(ranks) + i): {
                "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True,
            }
            for i, token in enumerate(SPECIAL_TOKENS)
        },
    }  # fmt: skip
    _write_json(directory / "tokenizer_config.json", tokenizer_config)
    # A model this small repeats itself when greedy: by default it samples.
    generation = {"bos_token_id": bos, "eos_token_id": [eos], "do_sample": True, "temperature": 0.8, "top_k": 100}
    _write_json(directory / "generation_config.json", generation)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def check_output(output: Path) -> None:
    """ValueError if `output` holds anything that this script did not write: it is replaced as a whole."""
    ours = {"config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json", "generation_config.json"}
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output_dir: {output} is a file, expected a directory")
    found = {p.name for p in output.iterdir()} - ours - {"README.md", "draft"} if output.is_dir() else set()
    if found:
        raise ValueError(f"--output_dir: {output} holds {sorted(found)[0]!r}, expected an empty directory or a former result")


def publish(staging: Path, output: Path) -> None:
    """Put the finished `staging` in the place of `output`."""
    former = output.with_name(output.name + ".former")
    shutil.rmtree(former, ignore_errors=True)
    if output.exists():
        os.replace(output, former)
    os.replace(staging, output)
    shutil.rmtree(former, ignore_errors=True)


# ---------------------------------------------------------------- model card


@dataclass(frozen=True)
class Report:
    """One saved model, as measured after it was read back."""

    shape: Shape
    parameters: int
    outcome: Outcome
    measured: dict[str, float]  # evaluate()'s
    bits_per_byte: float


def measure(directory: Path, shape: Shape, outcome: Outcome, held_out, held_out_text: Text, device, other=None):
    """Read a saved checkpoint back: the model in float32 of its bfloat16 weights, and its Report."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).to(device).eval()
    measured = evaluate(model, *held_out, other=other)
    bits_per_byte = measured["loss"] / math.log(2) * len(held_out_text.tokens) / held_out_text.num_bytes
    return model, Report(shape, num_parameters(model), outcome, measured, bits_per_byte)


def make_samples(target: LlamaForCausalLM, encoding: tiktoken.Encoding, recipe: Recipe, device) -> str:
    """Markdown: what the target writes after each prompt, greedy and at temperature 0.8."""
    parts = []
    for prompt in PROMPTS:
        ids = encoding.encode_ordinary(prompt)
        tokens = torch.tensor([[target.config.bos_token_id, *ids]], device=device)
        for title, temperature in (("greedy", 0.0), ("temperature 0.8", 0.8)):
            written, gaps = generate(target, tokens, recipe.sample_tokens, temperature)
            text = encoding.decode([*ids, *written[0].tolist()])
            note = "" if temperature else f" (smallest gap between first and second logit in 64 tokens: {gaps[:64].min():.4f})"
            parts.append(f"Prompt `{prompt!r}`, {title}{note}:\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def make_card(target: Report, draft: Report, recipe: Recipe, facts: dict[str, str], samples: str) -> str:
    def row(name: str, value: Callable[[Report], str]) -> str:
        return f"| {name} | {value(target)} | {value(draft)} |"

    def training(report: Report) -> str:
        return f"{report.outcome.steps} (kept: {report.outcome.best_step}), {report.outcome.seconds:.0f} s"

    table = "\n".join(
        [
            "| | target (this directory) | draft (`draft/`) |",
            "|---|---|---|",
            row("parameters (head tied to the embedding)", lambda r: f"{r.parameters:,}"),
            row("layers", lambda r: str(r.shape.num_layers)),
            row("hidden size, intermediate size", lambda r: f"{r.shape.hidden_size}, {r.shape.intermediate_size}"),
            row("query heads, KV heads (each 64 wide)", lambda r: f"{r.shape.num_heads}, {r.shape.num_kv_heads}"),
            row("steps, training time", training),
            row("**held-out loss**, nats per token", lambda r: f"**{r.measured['loss']:.4f}**"),
            row("**held-out loss**, bits per byte", lambda r: f"**{r.bits_per_byte:.4f}**"),
        ]
    )
    figures = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    num_specials, num_ranks = len(SPECIAL_TOKENS), recipe.vocab_size - len(SPECIAL_TOKENS)
    return f"""# Rooflama's demo model

A small Llama 3 and a draft model for it, trained from scratch by `scripts/train_demo.py`, so that the engine can be tried
without downloading anything. It writes imitation Shakespeare and knows nothing else.

{table}

Both: RMSNorm (eps 1e-5), SwiGLU, RoPE with theta 500000 and llama3 scaling (factor 8, original context {recipe.context // 8}),
context {recipe.context}, tied embeddings, bfloat16 weights. Losses are of the weights as saved, read back and run in float32.

## Tokenizer

`tokenizer.model` holds byte-level BPE ranks in tiktoken's format, learned from the training part with Llama 3's split. Its
first {num_specials} special tokens follow the {num_ranks} ranks: {recipe.vocab_size} rows. No rank joins a newline to
anything but newlines, so that a prompt may end in `ROMEO:`.

## Training

{figures}
- Target: cross-entropy; AdamW, peak learning rate {recipe.target_lr:g}, {recipe.warmup_steps} warm-up steps, cosine to zero,
  weight decay {recipe.weight_decay:g}, dropout {recipe.dropout:g}, {recipe.tokens_per_step} tokens a step in windows of
  {recipe.window} and {recipe.context}, about half of them starting at a speech with `<|begin_of_text|>` in front.
- Draft: distilled from the target (KL divergence), half on the training part and half on {recipe.synthetic_rows} texts of
  {recipe.synthetic_tokens} tokens that the target wrote; peak learning rate {recipe.draft_lr:g}, no dropout.
- Kept: the moving average of the weights (decay {recipe.ema_decay:g}) that did best on the held-out part, looked at every
  {recipe.evaluate_every} steps. So the held-out part chose the checkpoint, and its figures flatter slightly.
- Each held-out token is scored once, after at least half a window of context.
- Draft against target on the held-out part: the same greedy choice at {draft.measured["agreement"]:.1%} of the tokens; the
  distributions share {draft.measured["overlap"]:.1%} of their mass (how often one drafted token is accepted at temperature 1).

## Limits

It was never shown `<|end_of_text|>`: it does not end by itself. The other special tokens are untrained. Greedy text soon
repeats itself, so generation_config.json asks for sampling.

## Examples

{samples}
## Licence

Tiny Shakespeare (github.com/karpathy/char-rnn, `data/tinyshakespeare/input.txt`) is in the public domain. The weights come with
the project, under its Apache-2.0 licence.
"""


# ---------------------------------------------------------------- command line


def run(
    text_path: Path, output: Path, recipe: Recipe, seed: int, max_minutes: float, device: torch.device
) -> tuple[Report, Report]:
    """The whole training. Writes `output`, prints held-out losses and examples, and returns (target's, draft's) reports."""
    begin_sec, budget_sec = time.monotonic(), 60 * max_minutes
    check_output(output)
    torch.manual_seed(seed)
    training_text, held_out_text = split_text(text_path)
    ranks = train_ranks(training_text, recipe.vocab_size - len(SPECIAL_TOKENS))
    encoding = make_encoding(ranks)
    text, rest = Text(training_text, encoding, device), Text(held_out_text, encoding, device)
    if len(text.tokens) <= recipe.context:
        raise ValueError(f"{text_path}: its training part has {len(text.tokens)} tokens, expected more than {recipe.context}")
    held_out = held_out_windows(rest, min(512, recipe.context))
    elapsed_sec = time.monotonic() - begin_sec
    say(f"{len(ranks)} ranks; {len(text.tokens)} training and {len(rest.tokens)} held-out tokens, {elapsed_sec:.1f} s")
    sizes = [
        2 * num_parameters(make_model(shape, recipe, text.bos, torch.device("meta"))) for shape in (recipe.target, recipe.draft)
    ]
    if sum(sizes) >= SIZE_LIMIT_BYTES:
        raise ValueError(f"the two models take {sum(sizes)} bytes, expected fewer than {SIZE_LIMIT_BYTES}")

    # The shares leave a tenth for reading back and the examples.
    target = train_target(text, held_out, recipe, device, begin_sec + 0.62 * budget_sec)
    draft = train_draft(target.model, text, held_out, recipe, device, begin_sec + 0.9 * budget_sec)

    staging = output.with_name(output.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        save_checkpoint(staging, target.model, ranks)
        save_checkpoint(staging / "draft", draft.model, ranks)
        target_model, target_report = measure(staging, recipe.target, target, held_out, rest, device)
        _, draft_report = measure(staging / "draft", recipe.draft, draft, held_out, rest, device, other=target_model)
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none (CPU)"
        facts = {
            "Data": f"`{text_path.name}`, {text.num_bytes + rest.num_bytes:,} bytes; the last {HELD_OUT:.0%} is held out",
            "Tokens": f"{len(text.tokens):,} for training, {len(rest.tokens):,} held out",
            "Seed": str(seed),
            "GPU": gpu,
            "Versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        }
        samples = make_samples(target_model, encoding, recipe, device)
        (staging / "README.md").write_text(make_card(target_report, draft_report, recipe, facts, samples))
        publish(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(samples)
    for name, report in (("target", target_report), ("draft", draft_report)):
        figures = ", ".join(f"{key} {value:.4f}" for key, value in report.measured.items())
        print(f"{name}: {report.parameters} parameters, held-out {figures}, bits/byte {report.bits_per_byte:.4f}", flush=True)
    say(f"wrote {output} in {time.monotonic() - begin_sec:.1f} s")
    return target_report, draft_report


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the embedded demo model and its draft model from a text file.")
    parser.add_argument("text", type=Path, help="UTF-8 text to learn from")
    parser.add_argument("--output_dir", type=Path, required=True, help="replaced as a whole when training is done")
    parser.add_argument("--max_minutes", type=float, default=4.0, help="time for everything, 62%% of it the target's")
    parser.add_argument("--vocab_size", type=int, help="rows, specials included; a multiple of 64")
    parser.add_argument("--num_layers", type=int, help="of the target")
    parser.add_argument("--dropout", type=float, help="of the target")
    parser.add_argument("--target_steps", type=int)
    parser.add_argument("--draft_steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a few steps of minute models: a check, not a training")
    args = parser.parse_args(arguments)

    recipe = TINY if args.tiny else Recipe()
    given = {name: getattr(args, name) for name in ("vocab_size", "dropout", "target_steps", "draft_steps")}
    recipe = dataclasses.replace(recipe, **{name: value for name, value in given.items() if value is not None})
    if args.num_layers is not None:
        recipe = dataclasses.replace(recipe, target=dataclasses.replace(recipe.target, num_layers=args.num_layers))
    smallest = 256 + len(SPECIAL_TOKENS)
    if recipe.vocab_size % 64 or recipe.vocab_size < smallest:
        parser.error(f"--vocab_size: found {recipe.vocab_size}, expected a multiple of 64 of at least {smallest}")
    if not 0 <= recipe.dropout < 1:
        parser.error(f"--dropout: found {recipe.dropout}, expected 0 or more and less than 1")
    for name in ("target_steps", "draft_steps"):
        if getattr(recipe, name) < 1:
            parser.error(f"--{name}: found {getattr(recipe, name)}, expected at least 1")
    if recipe.target.num_layers < 1:
        parser.error(f"--num_layers: found {recipe.target.num_layers}, expected at least 1")
    if not args.max_minutes > 0:
        parser.error(f"--max_minutes: found {args.max_minutes}, expected a positive number")
    try:
        run(args.text, args.output_dir, recipe, args.seed, args.max_minutes, torch.device(args.device))
    except (ValueError, OSError) as error:
        sys.exit(f"train_demo.py: {error}")


if __name__ == "__main__":
    main()
