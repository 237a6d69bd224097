"""scripts/soak.py: a while of it on the demo model, and that it sees what it looks for."""

import sys
from pathlib import Path

import pytest
import torch

from generate import DEMO, Engine

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import soak

sys.path.pop(0)


@pytest.fixture(scope="module")
def engine():
    return Engine.load(DEMO, "cpu", torch.float32, max_seq_len=256)


@pytest.mark.parametrize("minutes", ["-1", "0", "nan"])
def test_no_time_is_no_soak(minutes, capsys):
    with pytest.raises(SystemExit, match="2"):
        soak.main(["--minutes", minutes])
    assert "--minutes: found" in capsys.readouterr().err


def test_forty_seconds(engine):
    result = soak.soak(engine, 40 / 60, seed=1, compares=True)
    assert result["answers"] > 50
    assert result["requests_compared"] > 10


def test_with_speculation_and_packed_weights(capsys):
    assert soak.main(["--minutes", "0.1", "--quantize", "int8", "--kv_cache_dtype", "fp8", "--speculate", "ngram"]) == 0
    assert '"answers": ' in capsys.readouterr().out
    assert soak.main(["--minutes", "0.1", "--quantize", "int8", "--speculate", "self"]) == 1
    assert "speculate: found self with weights in int8" in capsys.readouterr().err


def lose_a_slot(session, lengths=None):
    session.retire()
    session.cache.table[0] = 1


def leave_a_row(session):
    session.cache.lengths[0] = 5


@pytest.mark.parametrize(("clear", "said"), [(lose_a_slot, "slots were lost"), (leave_a_row, "rows were lost")])
def test_a_leak_is_seen(engine, monkeypatch, clear, said):
    state = soak.Soak(engine, seed=2, compares=True)
    with monkeypatch.context() as patch:
        patch.setattr("decoding.Session.clear", clear)
        with pytest.raises(soak.Violation, match=said):
            state.round()
    engine.session.clear()


def test_an_answer_that_changes_is_seen(engine):
    state = soak.Soak(engine, seed=2, compares=True)
    state._alone([state.pool[0]])
    state.answers[0][0][0].append(7)
    with pytest.raises(soak.Violation, match=r"request 0: found .*, the first time"):
        state._whole([state.pool[0]])
    assert soak.Soak(engine, seed=2, compares=False).pool[0] == state.pool[0], "a seed gives the same requests"


def test_growing_memory_is_seen(engine):
    state = soak.Soak(engine, seed=2, compares=True)
    state.memory = [10**9] * 8 + [10**9 + 2**20] * 20
    assert state.growth_bytes == 2**20
    state.memory = [10**9 + 2**30, *[10**9] * 27]
    assert state.growth_bytes == 0, "it gave memory back"
