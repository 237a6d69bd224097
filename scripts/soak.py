"""The batch path for as long as you like: random requests, and what must hold of every one of them.

    python scripts/soak.py --minutes 60                                  # the demo model, float32, on a CPU
    python scripts/soak.py --minutes 10 --quantize int4 --kv_cache_dtype fp8 --speculate ngram
    python scripts/soak.py --minutes 10 --device cuda --dtype bfloat16 --batch_invariant --checkpoint_path DIR

Requests of mixed lengths, stops and samples go through Engine.generate_many at changing batch sizes; some runs are left in the
middle, some by the next run, some requests cannot run and must be refused at once. Checked: each request is answered once, with
the answer that it got at first, alone or not; no row or slot is lost; memory does not grow.
Answers are compared in float32 on a CPU, or with --batch_invariant on a GPU, but not with an fp8 cache: elsewhere neighbours
may change last bits.
"""

import argparse
import json
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from generate import DEMO, Engine, add_flag
from kv_cache import CACHE_DTYPES
from model import DTYPES
from quantize import MODES, quantize_at_load
from runs import Request
from sampling import SamplingParams
from speculative import NgramDrafter, SelfDrafter

SETTLED = 5  # rounds until memory has reached what it needs: every batch size and kind has been seen
GROWTH_BYTES = 64 * 2**20  # beyond that, noise of the allocator


class Violation(Exception):
    """An invariant that did not hold."""


class Soak:
    """An engine, the random requests that it is given, and the answers so far by request."""

    def __init__(self, engine: Engine, seed: int, compares: bool, most_tokens: int = 24):
        self.engine, self.random, self.compares, self.most_tokens = engine, random.Random(seed), compares, most_tokens
        self.pool = [self.request(i) for i in range(40)]
        self.answers: dict[int, list] = {}
        self.counts: Counter = Counter()
        self.memory: list[int] = []  # bytes after each round

    def request(self, i: int) -> Request:
        """Any prompt of 1 to 150 tokens, any way to choose, any way to stop."""
        pick = self.random
        prompt = [pick.randrange(self.engine.model.vocab_limit) for _ in range(pick.choice([1, 2, 7, 30, 64, 65, 150]))]
        params = SamplingParams(
            temperature=pick.choice([0.0, 0.0, 0.7, 1.5]),
            top_k=pick.choice([0, 0, 1, 40]),
            top_p=pick.choice([1.0, 1.0, 0.8]),
            repetition_penalty=pick.choice([1.0] if self.engine.speculation else [1.0, 1.0, 1.0, 1.3]),
            seed=pick.randrange(2**40),
            n=pick.choice([1, 1, 1, 2, 3]),
            max_new_tokens=pick.randint(1, self.most_tokens),
            stop=pick.choice([(), (), ("e",), (" the", "\n\n")]) if self.engine.tokenizer else (),
            stop_token_ids=tuple(pick.sample(range(self.engine.model.vocab_limit), pick.choice([0, 0, 3]))),
            ignore_eos=pick.random() < 0.3,
        )
        return Request(prompt, params, id=i, source=f"request {i}")

    def round(self) -> None:
        """One of the things that can happen to an engine, then the check that nothing of it is left."""
        what = self.random.choices(["whole", "left", "overtaken", "refused", "alone"], [6, 2, 1, 1, 2])[0]
        requests = [self.random.choice(self.pool) for _ in range(self.random.choice([1, 3, 10, 25]))]
        getattr(self, f"_{what}")(requests)
        self.counts[f"runs {what}"] += 1
        self._check_idle()
        self.memory.append(used_bytes(self.engine.device))

    def _results(self, requests):
        return self.engine.generate_many(requests, batch_size=self.random.choice([3, 4, 8, 16]))

    def _whole(self, requests) -> None:
        seen = Counter()
        for request, outputs in self._results(requests):
            seen[request.id] += 1
            self._check(request, outputs)
        if seen != Counter(request.id for request in requests):
            raise Violation(f"requests {sorted(r.id for r in requests)}: answered {dict(seen)} times")

    def _left(self, requests) -> None:
        results = self._results(requests)
        for request, outputs in results:
            self._check(request, outputs)
            if self.random.random() < 0.4:
                break
        results.close()
        if next(results, None) is not None:
            raise Violation("a run that was closed goes on")

    def _overtaken(self, requests) -> None:
        first = self._results(requests)
        next(first)
        self._whole(requests[:3])
        try:
            next(first)
        except (RuntimeError, StopIteration):
            return
        if len(requests) > 1:
            raise Violation("a run goes on that another has ended")

    def _refused(self, requests) -> None:
        bad = Request([self.engine.model.config.vocab_size], SamplingParams(), source="line 7")
        try:
            self._results([*requests, bad])
        except ValueError as error:
            if not str(error).startswith("line 7, prompt: found token id"):
                raise Violation(f"a bad request: {error}") from None
            return
        raise Violation("a bad request was taken")

    def _alone(self, requests) -> None:
        request = requests[0]
        outputs, _ = self.engine.generate([request.prompt], request.params)
        self._check(request, outputs)

    def _check(self, request: Request, outputs: list) -> None:
        p = request.params
        self.counts["answers"] += len(outputs)
        self.counts["tokens"] += sum(len(out.tokens) for out in outputs)
        if len(outputs) != p.n:
            raise Violation(f"request {request.id}: found {len(outputs)} answers, expected {p.n}")
        for out in outputs:
            full = len(out.tokens) == p.max_new_tokens
            if not 1 <= len(out.tokens) <= p.max_new_tokens or (out.finish_reason == "length" and not full):
                raise Violation(f"request {request.id}: {len(out.tokens)} tokens, reason {out.finish_reason}, of {p}")
        got = [(out.tokens, out.text, out.finish_reason) for out in outputs]
        if self.compares and self.answers.setdefault(request.id, got) != got:
            raise Violation(f"request {request.id}: found {got}, the first time {self.answers[request.id]}")

    def _check_idle(self) -> None:
        session = self.engine.session
        if self.engine.running is not None or session is None:
            raise Violation("a run is still noted, or the session is gone")
        if session.cache.lengths.any() or not session.done.all():
            raise Violation(f"rows were lost: lengths {session.cache.lengths.tolist()}, done {session.done.tolist()}")
        if session.cache.table[:, 0].tolist() != list(range(session.batch_size)):
            raise Violation(f"slots were lost: {session.cache.table[:, 0].tolist()}")

    @property
    def growth_bytes(self) -> int:
        """Of memory since it had settled: the least of the last rounds against the most of the first."""
        rounds = max(SETTLED, len(self.memory) // 4)
        return max(0, min(self.memory[-SETTLED:]) - max(self.memory[:rounds]))


def used_bytes(device: torch.device) -> int:
    """Resident memory of this process, or what its tensors take of a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def soak(engine: Engine, minutes: float, seed: int, compares: bool) -> dict:
    """Runs rounds until the time is up. Violation: what did not hold, with the seed that shows it again."""
    state, began, rounds = Soak(engine, seed, compares), time.monotonic(), 0
    while time.monotonic() - began < 60 * minutes:
        try:
            state.round()
        except Violation as violation:
            raise Violation(f"round {rounds} of seed {seed}: {violation}") from None
        rounds += 1
        if rounds % 200 == 0:
            print(f"{time.monotonic() - began:.0f} s, {rounds} runs, {dict(state.counts)}", file=sys.stderr)
    if state.growth_bytes > GROWTH_BYTES:
        raise Violation(f"seed {seed}: memory grew by {state.growth_bytes / 2**20:.0f} MiB in {rounds} runs")
    return {
        "minutes": round((time.monotonic() - began) / 60, 2),
        "runs": rounds,
        "growth_mib": round(state.growth_bytes / 2**20, 1),
        "requests_compared": len(state.answers),
        "seed": seed,
        **state.counts,
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_flag(parser, "minutes", type=float, default=60)
    add_flag(parser, "seed", type=int, default=0)
    add_flag(parser, "checkpoint_path", type=Path, default=DEMO)
    add_flag(parser, "device", default="cpu")
    add_flag(parser, "dtype", choices=DTYPES, default="float32")
    add_flag(parser, "decode_mode", default="eager")
    add_flag(parser, "max_seq_len", type=int, default=256)
    add_flag(parser, "batch_invariant", action="store_true")
    add_flag(parser, "quantize", choices=MODES, help="quantise the weights first")
    add_flag(parser, "kv_cache_dtype", choices=CACHE_DTYPES, default="auto")
    add_flag(parser, "speculate", choices=("ngram", "self"))
    add_flag(parser, "speculate_k", type=int, default=4)
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"--minutes: found {args.minutes}, expected a positive number")
    options = {name: getattr(args, name) for name in ("decode_mode", "max_seq_len", "kv_cache_dtype", "batch_invariant")}
    # rounding to fp8 makes a last bit that a neighbour changed into 6% of a value, once in a while
    compares = args.kv_cache_dtype != "fp8" and (args.batch_invariant or args.dtype == "float32")
    try:
        engine = Engine.load(args.checkpoint_path, args.device, DTYPES[args.dtype], **options)
        if args.quantize:
            quantize_at_load(engine.model, args.quantize, engine.tokenizer)
        if args.speculate:
            engine.speculate(NgramDrafter() if args.speculate == "ngram" else SelfDrafter(engine.model), args.speculate_k)
        result = soak(engine, args.minutes, args.seed, compares)
    except (Violation, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
