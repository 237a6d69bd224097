"""scripts/compare_steps.py: turns, medians and refusals; the steps themselves need a GPU."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import compare_steps

ROOT = Path(__file__).resolve().parent.parent
SERVER = """
import pathlib, sys
tree, step, log = pathlib.Path(sys.argv[2]), sys.argv[3], pathlib.Path(sys.argv[1])
times = iter({"a": [5, 9, 7], "b": [4, 3]}[tree.name])
print("ready", flush=True)
for _ in sys.stdin:
    with log.open("a") as file:
        file.write(tree.name)
    us = next(times, None)
    if us is None:
        sys.exit(3)
    print([us, 2 * us], flush=True)
"""


def test_trees_take_turns(tmp_path):
    (server := tmp_path / "server.py").write_text(SERVER)
    trees, log = [tmp_path / "a", tmp_path / "b"], tmp_path / "log"
    command = [sys.executable, str(server), str(log)]
    found = compare_steps.compare("llama-3.2-1b:1:160", trees, 2, command)
    assert found == [[7, 14], [3.5, 7]]
    assert log.read_text() == "abab"
    first, second = compare_steps.report("a step", trees, found).splitlines()
    assert "7.0 us a step in bursts,     14.0 sustained" in first
    assert second.endswith("(-50.0%, -50.0%)")
    with pytest.raises(RuntimeError, match="b: the process that times x ended, with status 3"):
        compare_steps.compare("x", trees, 3, command)


@pytest.mark.parametrize("text", ["llama-3.2-1b", "llama-3.2-1b:1", "llama-3.2-1b:0:9", "llama-3.2-1b:1:x", ":1:9", "a:1:2:3"])
def test_what_is_no_step(text, capsys):
    with pytest.raises(argparse.ArgumentTypeError, match="SHAPE"):
        compare_steps.parse_step(text)
    with pytest.raises(SystemExit):
        compare_steps.main(["--steps", text])
    assert f"--steps: found '{text}', expected SHAPE" in capsys.readouterr().err


def test_steps():
    assert compare_steps.parse_step("llama-3.1-8b/fp8:64:192") == ("llama-3.1-8b", "fp8", 64, 192)
    assert compare_steps.parse_step("llama-3.2-1b:1:160") == ("llama-3.2-1b", None, 1, 160)


def test_refusals(tmp_path, capsys):
    step = ["--steps", "llama-3.2-1b:1:160"]
    for argv, said in (
        ([*step, "--trees", str(tmp_path)], f"--trees: found {tmp_path}, expected a checkout"),
        ([*step, "--rounds", "0"], "--rounds: found 0, expected at least 1"),
        ([*step, "--trees", str(ROOT)], "found no CUDA GPU, expected one"),
    ):
        if "GPU" in said and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit):
            compare_steps.main(argv)
        assert said in capsys.readouterr().err
