"""Two checkouts of this repository beside each other: a decode step of each, timed in turn on the same card.

    git worktree add /tmp/before HEAD~1
    python scripts/compare_steps.py --trees /tmp/before . --steps llama-3.1-8b/fp8:64:192 llama-3.2-1b:1:160

A step is SHAPE[/QUANTIZATION]:ROWS:CONTEXT, its weights random, as scripts/tune.py has it. Every tree loads it in a process of
its own; then they take turns, since cards of a kind differ by more than most changes are worth. Each turn times a *burst* (what
tune.py sees) and, after half a second of steps without a pause, a *sustained* second: of many rows a card runs at its power
limit, where the clock falls, and what takes less energy is faster than bursts say.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def parse_step(text: str) -> tuple[str, str | None, int, int]:
    """'llama-3.1-8b/fp8:64:192' -> shape, quantization, rows, context."""
    try:
        model, rows, context = text.split(":")
        shape, _, mode = model.partition("/")
        found = shape, mode or None, int(rows), int(context)
    except ValueError:
        found = ("", None, 0, 0)
    if not found[0] or min(found[2:]) < 1:
        raise argparse.ArgumentTypeError(
            f"found {text!r}, expected SHAPE[/QUANTIZATION]:ROWS:CONTEXT, such as llama-3.1-8b:1:160"
        )
    return found


def serve(tree: Path, step: tuple) -> None:
    """In a process of its own: says when it is ready, then times the step whenever it is told to."""
    sys.path[:0] = [str(tree), str(tree / "scripts")]
    from tune import STEPS, StepTimer  # the tree's own

    timer = StepTimer(*step)
    graph, _ = timer.capture()
    timer.time(graph)

    def sustained(seconds: float) -> float:
        """us a step."""
        start, before, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        began, steps = time.perf_counter(), 0
        start.record()
        while time.perf_counter() - began < seconds:
            before.synchronize()  # the host is one round ahead, no more
            before.record()
            timer.rewind()
            for _ in range(12):
                graph.replay()
            steps += 12 * STEPS
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / steps

    print("ready", flush=True)
    for _ in sys.stdin:
        timer.time(graph, 3)
        burst = timer.time(graph, 9)
        sustained(0.5)
        print(json.dumps([burst, sustained(1.0)]), flush=True)


def compare(step: str, trees: list[Path], rounds: int, command: list[str]) -> list[list[float]]:
    """[burst, sustained] of each tree, us: medians of so many turns. RuntimeError: a process that ends.

    command: what serves a step; the tree and the step follow.
    """
    workers = [
        subprocess.Popen([*command, str(tree), step], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for tree in trees
    ]

    def answer(i: int) -> str:
        if not (line := workers[i].stdout.readline()):
            raise RuntimeError(f"{trees[i]}: the process that times {step} ended, with status {workers[i].wait()}")
        return line

    try:
        for i in range(len(workers)):
            answer(i)
        turns: list[list] = [[] for _ in workers]
        for _ in range(rounds):
            for i, worker in enumerate(workers):
                worker.stdin.write("\n")
                worker.stdin.flush()
                turns[i].append(json.loads(answer(i)))
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    return [[statistics.median(times) for times in zip(*mine, strict=True)] for mine in turns]


def report(step: str, trees: list[Path], found: list[list[float]]) -> str:
    """A line a tree, beside the first."""
    lines = []
    for tree, (burst, sustained) in zip(trees, found, strict=True):
        beside = f"({burst / found[0][0] - 1:+.1%}, {sustained / found[0][1] - 1:+.1%})" if tree != trees[0] else ""
        lines.append(f"{step}: {burst:8.1f} us a step in bursts, {sustained:8.1f} sustained  {tree} {beside}".rstrip())
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--trees", nargs="+", type=Path, default=[ROOT], help="checkouts; the first is what others are compared with"
    )
    parser.add_argument("--steps", nargs="+", required=True, metavar="SHAPE[/QUANTIZATION]:ROWS:CONTEXT")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each tree, of which the median counts")
    args = parser.parse_args(argv)
    for step in args.steps:
        try:
            parse_step(step)
        except argparse.ArgumentTypeError as error:
            parser.error(f"--steps: {error}")
    for tree in args.trees:
        if not (tree / "scripts" / "tune.py").is_file():
            parser.error(f"--trees: found {tree}, expected a checkout of this repository")
    if args.rounds < 1:
        parser.error(f"--rounds: found {args.rounds}, expected at least 1")
    if not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: found no CUDA GPU, expected one\n")
    trees = [tree.resolve() for tree in args.trees]
    for step in args.steps:
        try:
            found = compare(step, trees, args.rounds, [sys.executable, __file__, "--serve"])
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(report(step, trees, found), flush=True)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]), parse_step(sys.argv[3]))
    else:
        sys.exit(main())
