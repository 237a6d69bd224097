"""A share of tests/fuzz.py for every run of the tests: a fixed seed, some twenty seconds."""

import os
import subprocess
import time

import fuzz
import pytest
from fuzz import Fuzzer

INPUTS = {"template": 12}  # of a target; others get more, being faster


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    return Fuzzer(tmp_path_factory.mktemp("fuzz"))


TARGETS = (
    *("safetensors", "config", "our config", "meta", "tiktoken", "sentencepiece bpe", "sentencepiece unigram"),
    *("tokenizer.json byte-level", "tokenizer.json llama-like", "template"),
)


def test_every_target_is_here(fuzzer):
    assert tuple(fuzzer.targets) == TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_files_are_read_or_refused(fuzzer, name):
    fuzzer.run(name, INPUTS.get(name, 40), seed=7)
    failed = [f"{said}\n{files}"[:3000] for target, said, files in fuzzer.failures if target == name]
    assert not failed, failed[0]
    counts = fuzzer.counts[name]
    assert counts["loaded"], "else nothing was tested but refusals"
    assert counts["refused"], "else the inputs were harmless"


def test_the_harness_sees_what_it_looks_for(fuzzer):
    """A reader that crashes, raises, hangs, takes memory, writes a file or leaves a process behind is found out."""
    faults = {
        "signal 11": lambda directory: os.kill(os.getpid(), 11),
        "KeyError": lambda directory: {}["a"],
        "ValueError": lambda directory: int("x"),
        "no end after": lambda directory: time.sleep(60),
        "MemoryError": lambda directory: bytearray(2 * fuzz.MEMORY_BYTES),
        "files were written": lambda directory: (directory / "new").touch(),
        "1 processes left": lambda directory: subprocess.Popen(["sleep", "60"]),
    }
    target = fuzzer.targets["template"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuzz, "TIME_SEC", 0.5)
        for what, read in faults.items():
            patch.setattr(target, "read", read)
            assert what in fuzzer.try_one("template", {}), what
