"""Speculative decoding measured: what is accepted, and what it brings.

    python scripts/speculate.py sweep         drafters, k and temperatures on a checkpoint (default: the demo pair)
    python scripts/speculate.py oracle        an 8B target and a draft of the 1B's shape, random weights, on a GPU

`oracle` sets the acceptance and keeps the cost: its drafter runs the draft model and then proposes the token that the target
was recorded to give, with probability alpha, else a wrong one. Every run's tokens are compared with plain decoding's before a
figure is printed. The last line of standard output is one JSON object; --output FILE writes it there too, a chart beside it.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import triton
from measure import stamp

import generate
from convert_hf_checkpoint import check_least
from generate import DTYPES, Engine, add_flag, default_device, fill_randomly, synchronize
from kernels import gumbel
from model import SHAPES, PrefillStep, Transformer
from sampling import SamplingParams
from speculative import ModelDrafter, NgramDrafter, SelfDrafter, expected_tokens

TINY = {"num_layers": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 2048}
PROMPTS = ["ROMEO:", "JULIET:\n", "First Citizen:\nBefore we", "To be, or not to be"]


def timed_run(engine: Engine, prompts: list, params: SamplingParams, expected=None, warm_up: bool = True):
    """(token lists, ms a token, Timing) of a run, after one that warms up. ValueError where its tokens are not `expected`."""
    for _ in range(1 + warm_up):
        outputs, timing = engine.generate(prompts, params)
    tokens = [o.tokens for o in outputs]
    if expected is not None and tokens != expected:
        at = [
            next((i for i, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), -1)
            for x, y in zip(tokens, expected, strict=True)
        ]
        raise ValueError(f"speculation: found other tokens than plain decoding's, first at {at} of each output")
    return tokens, timing.decode_sec / (len(tokens[0]) - 1) * 1e3, timing


# ---------------------------------------------------------------- sweep


def alpha_of(s: dict) -> float:
    """The chance that a draft stood where those before it did, from Speculator.statistics at a fixed k."""
    positions = s["acceptance_by_position"]
    return sum(positions) / (1 + sum(positions[:-1]))


def acceptances(target: Transformer, draft: Transformer, prompts: list, tokens: list, temperature: float, draws: int = 32):
    """(sum(min(p, q)), how often both choose alike under common noise), each the mean over the positions of outputs: the chance
    that one draft stands by rejection sampling, and by ours. At temperature 0 both are how often the choices are equal."""
    shared, alike = [], []
    for prompt, output in zip(prompts, tokens, strict=True):
        ids = torch.tensor(prompt + output[:-1], device=target.norm.weight.device)
        p, q = (m.logits(m(m.embed(ids), PrefillStep(len(ids))))[len(prompt) - 1 :] for m in (target, draft))
        position = torch.arange(len(p), device=p.device)
        if temperature == 0:
            shared.append((p.argmax(-1) == q.argmax(-1)).float())
            alike.append(shared[-1])
            continue
        p, q = p / temperature, q / temperature
        shared.append(torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1))
        for sample in range(draws):
            noise = gumbel(torch.zeros_like(position), torch.full_like(position, sample), position, p.shape[1])
            alike.append(((p + noise).argmax(-1) == (q + noise).argmax(-1)).float())
    return torch.cat(shared).mean().item(), torch.cat(alike).mean().item()


def sweep(args: argparse.Namespace) -> list[dict]:
    """A row a drafter, temperature and k."""
    dtype = DTYPES[args.dtype] if args.dtype else None
    engine = Engine.load(args.checkpoint_path, args.device, dtype, decode_mode="auto" if args.device == "cuda" else "eager")
    draft = Engine.load(args.draft_checkpoint_path, args.device, dtype).model
    makers = {"draft": lambda: ModelDrafter(draft), "ngram": NgramDrafter, "self": lambda: SelfDrafter(engine.model)}
    drafters = {name: makers[name]() for name in args.drafters}
    prompts = [engine.encode(p) for p in (args.prompts or PROMPTS)]
    rows = []
    print(" drafter temp.  k accepted tokens/round  alpha; one draft: sum-min, common noise    tok/s speed-up")
    for temperature in args.temperatures:
        params = SamplingParams(temperature=temperature, max_new_tokens=args.max_new_tokens, ignore_eos=True, seed=args.seed)
        engine.speculation = engine.speculator = engine.session = None
        expected, plain_ms, _ = timed_run(engine, prompts, params)
        for name, drafter in drafters.items():
            models = () if name == "ngram" else (engine.model, drafter.model)
            single = acceptances(*models, prompts, expected, temperature) if models else (None, None)
            for k in args.k:
                engine.speculate(drafter, k, adaptive=False)
                _, ms, timing = timed_run(engine, prompts, params, expected)
                s = timing.speculation
                row = s | {
                    "drafter": name, "temperature": temperature, "alpha": alpha_of(s), "ms_per_token": ms,
                    "rejection_sampling": single[0], "common_noise": single[1],
                    "plain_ms_per_token": plain_ms, "tok_per_sec": len(prompts) / ms * 1e3, "speedup": plain_ms / ms,
                }  # fmt: skip
                rows.append(row)
                print(
                    f"{name:>8} {temperature:5.1f} {k:2} {s['acceptance_rate']:8.1%} {s['acceptance_length']:12.2f} "
                    f"{row['alpha']:6.3f} {single[0] or math.nan:19.3f} {single[1] or math.nan:13.3f} "
                    f"{row['tok_per_sec']:8.1f} {row['speedup']:8.2f}",
                    flush=True,
                )
    return rows


# ---------------------------------------------------------------- oracle


class OracleDrafter(ModelDrafter):
    """Runs a draft model for its cost, and proposes what `proposals` [B, S] int32 holds for each position."""

    proposals: torch.Tensor

    def bind(self, target, history):
        super().bind(target, history)
        self.proposals = torch.zeros_like(history)

    def propose(self, k, kind, missed=1):
        drafts = super().propose(k, kind, missed)
        at = self.target.cache.lengths.long()[:, None] + torch.arange(k, device=drafts.device)
        return drafts.copy_(self.proposals.gather(1, at))

    def record(self, prompt: list[int], tokens: list[int], alpha: float) -> None:
        """Of these tokens the share alpha is proposed, drawn at random but counted exactly; wrong ones for the others."""
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(7))
        right = order.argsort() < round(alpha * len(tokens))
        tokens = torch.tensor(tokens)
        tokens = torch.where(right, tokens, (tokens + 1) % self.model.config.vocab_size)
        self.proposals[:, len(prompt) : len(prompt) + len(tokens)] = tokens.int()


@torch.no_grad()
def make_predictable(model: Transformer, period: int) -> None:
    """Random weights whose choice follows the last token by a wide margin, so that no rounding changes it: the embedding
    outweighs what the layers add, and the head's row of each token's successor resembles its embedding. Tokens repeat with
    `period`. Every byte is read, and every product made, as before."""
    generator = torch.Generator(model.norm.weight.device).manual_seed(1)
    weight = model.tok_embeddings.weight.normal_(0, 32, generator=generator)
    ids = torch.arange(len(weight), device=weight.device)
    successor = torch.minimum(ids // period * period + (ids + 1) % period, ids.max())
    model.head.weight[successor] = (weight / 32 * 0.02).to(weight.dtype)


def count_compilations() -> list[str]:
    """A list that grows by a name with each Triton kernel compiled from here on."""
    names: list[str] = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **fields: names.append(str(fields.get("repr", "kernel")))
    return names


def verify_times(engine: Engine, context: int, most: int, repeats: int) -> dict[int, float]:
    """ms of the target's forward of 1 to `most` tokens, choice and bookkeeping included, `context` tokens cached."""
    engine.speculate(NgramDrafter(), most - 1, adaptive=False)
    engine.prepare(1, engine.context)
    session, speculator = engine.session, engine.speculator
    times = {}
    for T in range(1, most + 1):
        session.retire()
        drafts = torch.zeros(1, T - 1, dtype=torch.int32, device=engine.device)
        work = speculator.ready(lambda drafts=drafts: speculator.verify(drafts, "greedy", False))
        best = []
        for _ in range(3):
            session.cache.lengths.fill_(context)
            session.limit.fill_(session.max_seq_len - 1)
            session.done.zero_()
            work()
            synchronize(engine.device)
            started = time.perf_counter()
            for _ in range(repeats):
                work()
            synchronize(engine.device)
            best.append((time.perf_counter() - started) / repeats * 1e3)
        times[T] = sorted(best)[1]
    session.retire()
    return times


def oracle(args: argparse.Namespace) -> dict:
    """Measured speed-up beside the formula's for each alpha and k; t_verify; a useless drafter; text that repeats."""
    shapes = (SHAPES[args.target], SHAPES[args.draft])
    if args.tiny:
        shapes = tuple(
            dataclasses.replace(c, tie_word_embeddings=tied, **TINY) for c, tied in zip(shapes, (False, True), strict=True)
        )
    target, draft = (Transformer(c, device=args.device) for c in shapes)
    fill_randomly(target), fill_randomly(draft)
    make_predictable(target, args.period)
    n, mode = args.max_new_tokens, "auto" if args.device == "cuda" else "eager"
    engine = Engine(target, decode_mode=mode, max_seq_len=args.prompt_len + n)
    prompts, params = [list(range(args.prompt_len))], SamplingParams(max_new_tokens=n, ignore_eos=True)
    expected, plain_ms, _ = timed_run(engine, prompts, params)
    _, draft_ms, _ = timed_run(Engine(draft, decode_mode=mode, max_seq_len=args.prompt_len + n), prompts, params)
    print(f"plain {plain_ms:.3f} ms a token, draft {draft_ms:.3f}", flush=True)
    result = {"plain_ms": plain_ms, "draft_ms": draft_ms, "rows": []}

    result["verify_ms"] = verify = verify_times(engine, args.prompt_len + n // 2, max(args.k) + 1, repeats=10)
    print("verify ms (of plain) by tokens: " + ", ".join(f"{T}: {ms:.3f} ({ms / plain_ms:.2f})" for T, ms in verify.items()))

    compiled, drafter = count_compilations(), OracleDrafter(draft, "oracle")
    print(" k alpha tokens/round expected ms/token speed-up formula  share host us round us compiled")
    for k in args.k:
        engine.speculate(drafter, k, adaptive=False)
        engine.generate(prompts, params)  # captures
        for alpha in args.alphas:
            drafter.record(prompts[0], expected[0], alpha)
            before = len(compiled)
            _, ms, timing = timed_run(engine, prompts, params, expected)
            s = timing.speculation
            formula = expected_tokens(alpha, k) * plain_ms / (k * draft_ms + verify[k + 1])
            row = {
                "k": k, "alpha": alpha, "tokens_per_round": s["acceptance_length"], "expected": expected_tokens(alpha, k),
                "ms_per_token": ms, "speedup": plain_ms / ms, "formula": formula, "share_of_formula": plain_ms / ms / formula,
                "host_us_per_round": timing.host_sec / timing.steps * 1e6,
                "round_us": timing.decode_sec / timing.steps * 1e6, "compilations": len(compiled) - before,
            }  # fmt: skip
            result["rows"].append(row)
            print(
                "{:2} {:5.2f} {:12.3f} {:8.3f} {:8.3f} {:8.3f} {:7.3f} {:6.1%} {:7.0f} {:8.0f} {}".format(*row.values()),
                flush=True,
            )

    result["adaptive"] = []
    for alpha in (0.0, 0.7):
        engine.speculate(drafter, max(args.k), adaptive=True)
        engine.prepare(1, args.prompt_len + n)
        engine.speculator.prepare("greedy" if args.device == "cuda" else "truncate", False)
        drafter.record(prompts[0], expected[0], alpha)
        for known in (False, True):  # the first run does not know the drafter yet
            _, ms, timing = timed_run(engine, prompts, params, expected, warm_up=False)
            s = timing.speculation
            result["adaptive"].append(s | {"alpha": alpha, "known": known, "ms_per_token": ms, "speedup": plain_ms / ms})
            which = f"adaptive, alpha {alpha}{', known' if known else ''}"
            print(f"{which}: {plain_ms / ms:.3f} times plain, launches by k {s['launches_by_k']}", flush=True)

    k = min(4, max(args.k))
    engine.speculate(SelfDrafter(target), k, adaptive=False)
    _, ms, timing = timed_run(engine, prompts, params, expected)
    s = timing.speculation
    result["self"] = s | {"ms_per_token": ms, "speedup": plain_ms / ms}
    each, length = s["draft_ms"][k] / k, s["acceptance_length"]
    print(
        f"self in int4, k {k}: {each:.3f} ms a draft, {length:.2f} tokens a round, {plain_ms / ms:.2f} times plain", flush=True
    )
    print("  (this target is easier to guess than a trained one)")

    engine.speculate(NgramDrafter(), max(args.k), adaptive=False)
    _, ms, timing = timed_run(engine, prompts, params, expected)
    result["ngram"] = timing.speculation | {"ms_per_token": ms, "speedup": plain_ms / ms}
    length = timing.speculation["acceptance_length"]
    print(
        f"n-gram, k {max(args.k)}, text of period {args.period}: {plain_ms / ms:.2f} times plain, {length:.2f} tokens a round"
    )
    return result


# ---------------------------------------------------------------- charts and the command line


def chart_sweep(rows: list[dict], path: Path) -> None:
    from matplotlib import pyplot as plt

    temperatures = sorted({r["temperature"] for r in rows})
    figure, axes = plt.subplots(1, len(temperatures), figsize=(5 * len(temperatures), 4), squeeze=False, layout="constrained")
    for ax, temperature in zip(axes[0], temperatures, strict=True):
        here = [r for r in rows if r["temperature"] == temperature]
        for name in dict.fromkeys(r["drafter"] for r in here):
            ax.plot(
                *zip(*[(r["k"], r["tok_per_sec"]) for r in here if r["drafter"] == name], strict=True), marker="o", label=name
            )
        prompts = here[0]["tok_per_sec"] * here[0]["ms_per_token"]
        ax.axhline(prompts / here[0]["plain_ms_per_token"], color="grey", linestyle=":", label="plain decoding")
        ax.set(title=f"temperature {temperature}", xlabel="k, tokens drafted a round", ylabel="tokens/s", ylim=0)
        ax.legend()
    figure.savefig(path, dpi=110)


def chart_oracle(result: dict, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for color, alpha in enumerate(dict.fromkeys(r["alpha"] for r in result["rows"])):
        here = [r for r in result["rows"] if r["alpha"] == alpha]
        k = [r["k"] for r in here]
        left.plot(k, [r["speedup"] for r in here], f"C{color}o-", label=f"alpha {alpha}")
        left.plot(k, [r["formula"] for r in here], f"C{color}:")
    left.set(title="speed-up: measured, and the formula's (dotted)", xlabel="k, tokens drafted a round", ylim=0)
    left.legend()
    over = {T: ms / result["plain_ms"] for T, ms in result["verify_ms"].items()}
    right.plot(list(over), list(over.values()), "o-")
    right.set(title="verification over a plain step", xlabel="tokens verified", ylim=(0, 1.1 * max(over.values())))
    figure.savefig(path, dpi=110)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("sweep", "drafters, k and temperatures on a checkpoint"),
        ("oracle", "a set acceptance at a real cost"),
    ):
        sub = commands.add_parser(name, help=text)
        flag = lambda name, sub=sub, **options: add_flag(sub, name, **options)
        if name == "sweep":
            flag("checkpoint_path", type=Path, default=generate.DEMO)
            flag("draft_checkpoint_path", type=Path, default=generate.DEMO / "draft")
            flag("drafters", nargs="+", choices=("draft", "ngram", "self"), default=["draft", "ngram", "self"])
            flag("temperatures", nargs="+", type=float, default=[0.0, 0.8])
            flag("prompts", nargs="+", help="of one batch (default: four lines of Shakespeare)")
            flag("k", nargs="+", type=int, default=[1, 2, 3, 4, 6, 8])
            flag("max_new_tokens", type=int, default=128)
            flag("seed", type=int, default=1)
            flag("dtype", choices=DTYPES)
        else:
            flag("target", choices=SHAPES, default="llama-3.1-8b")
            flag("draft", choices=SHAPES, default="llama-3.2-1b")
            flag("tiny", action="store_true", help="both shapes cut down, to try this command without a GPU")
            flag("k", nargs="+", type=int, default=[1, 2, 4, 8])
            flag("alphas", nargs="+", type=float, default=[0.5, 0.7, 0.9])
            flag("prompt_len", type=int, default=32)
            flag("max_new_tokens", type=int, default=512)
            flag("period", type=int, default=64, help="tokens after which the target's text repeats")
        flag("device", default=default_device())
        flag("output", type=Path, help="write the JSON here, and a chart beside it")
    args = parser.parse_args(argv)
    check_least(parser, args, max_new_tokens=2, prompt_len=1, period=1)
    for alpha in getattr(args, "alphas", ()):
        if not 0 <= alpha <= 1:
            parser.error(f"--alphas: found {alpha:g}, expected 0 to 1")
    return args


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        generate.device_of(args.device)
        found = (sweep if args.command == "sweep" else oracle)(args)
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        result = {"benchmark": f"speculate {args.command}", "settings": settings, **stamp()}
        result |= found if isinstance(found, dict) else {"rows": found}
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + "\n")
            (chart_sweep if args.command == "sweep" else chart_oracle)(found, args.output.with_suffix(".png"))
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
