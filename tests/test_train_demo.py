"""scripts/train_demo.py: the tokenizer's trainer, the windows, and the whole script on a few steps of minute models."""

import json
import sys
from pathlib import Path

import pytest
import tiktoken.load
import torch

import model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
pytest.importorskip("transformers")

import train_demo  # noqa: E402

NAMES = ("Romeo", "Juliet", "Mercutio", "Tybalt")
WORDS = ("what", "light", "through", "yonder", "window", "breaks", "it", "is", "the", "east", "and", "Juliet", "sun", "arise")


@pytest.fixture(scope="module")
def text() -> str:
    """About 30 KB of speeches, with a few characters of more than one byte."""
    draw = torch.Generator().manual_seed(0)

    def pick(words):
        return words[torch.randint(len(words), (1,), generator=draw)]

    speeches = (f"{pick(NAMES)}:\n{' '.join(pick(WORDS) for _ in range(20))}, we'll não 12345.\n\n" for _ in range(240))
    return "".join(speeches)


@pytest.fixture(scope="module")
def ranks(text) -> dict[bytes, int]:
    return train_demo.train_ranks(text, 320)


def test_ranks_are_complete_and_in_merge_order(ranks):
    """tiktoken needs all single bytes, and each longer token to be the join of two of lower rank."""
    assert sorted(ranks.values()) == list(range(320))
    assert {bytes([b]) for b in range(256)} == {token for token, rank in ranks.items() if rank < 256}
    for token, rank in ranks.items():
        if len(token) > 1:
            parts = ((token[:i], token[i:]) for i in range(1, len(token)))
            assert any(ranks.get(a, rank) < rank and ranks.get(b, rank) < rank for a, b in parts), token


def test_no_rank_joins_newlines_to_other_characters(ranks):
    assert [t for t in ranks if b"\n" in t and t.strip(b"\r\n")] == []


@pytest.mark.parametrize("other", ["", "ROMEO:", " \n\n\n x\r\n", "naïve 日本 🎭 1234567 don't!?\n"])
def test_encoding_round_trips(text, ranks, other):
    encoding = train_demo.make_encoding(ranks)
    for sample in (text, other):
        assert encoding.decode(encoding.encode_ordinary(sample)) == sample
    assert encoding.encode_single_token("<|begin_of_text|>") == len(ranks)


def test_tiktoken_encodes_as_the_tokenizers_library_does(text, ranks):
    """The merges that `tokenizers` needs are rebuilt from the ranks: all splits of a token into two ranked ones, by rank."""
    import tokenizers

    character_of = {byte: character for character, byte in train_demo._bytes_of_characters().items()}

    def characters(token: bytes) -> str:
        return "".join(character_of[b] for b in token)

    merges = []
    for token in sorted(ranks, key=ranks.get):
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        splits = [(a, b) for a, b in splits if a in ranks and b in ranks]
        merges += [(characters(a), characters(b)) for a, b in sorted(splits, key=lambda s: (ranks[s[0]], ranks[s[1]]))]
    other = tokenizers.Tokenizer(tokenizers.models.BPE({characters(t): r for t, r in ranks.items()}, merges))
    pieces = tokenizers.pre_tokenizers
    split = pieces.Split(tokenizers.Regex(train_demo.LLAMA3_SPLIT), "isolated")
    other.pre_tokenizer = pieces.Sequence([split, pieces.ByteLevel(add_prefix_space=False, use_regex=False)])
    assert train_demo.make_encoding(ranks).encode_ordinary(text) == other.encode(text).ids


def test_too_small_a_text_is_refused():
    with pytest.raises(ValueError, match="--vocab_size: the text yields"):
        train_demo.train_ranks("to be or not to be", 320)


def test_windows_start_anywhere_or_at_a_speech_after_bos(text, ranks):
    encoding = train_demo.make_encoding(ranks)
    data = train_demo.Text(text, encoding, torch.device("cpu"))
    torch.manual_seed(0)
    windows = data.windows(200, 16)
    assert windows.shape == (200, 17)
    at_speech = windows[:, 0] == data.bos
    assert 50 < at_speech.sum() < 150
    names = tuple(f"{name}:\n" for name in NAMES)
    for row in windows[at_speech].tolist():
        assert encoding.decode(row[1:]).startswith(names)
    assert not (windows[:, 1:] >= len(ranks)).any()


@pytest.mark.parametrize("extra", [0, 1, 7, 63])
def test_held_out_windows_score_each_token_once(text, ranks, extra):
    data = train_demo.Text(text, train_demo.make_encoding(ranks), torch.device("cpu"))
    data.tokens = data.tokens[: 256 + extra]
    windows, counted = train_demo.held_out_windows(data, 32)
    assert torch.equal(windows[:, 1:][counted], data.tokens)
    assert windows[0, 0] == data.bos


def test_script_trains_saves_and_reports(tmp_path, text, capsys):
    """Two steps of each model; the result is read by transformers and by the engine's own configuration, and has a card."""
    from transformers import LlamaForCausalLM

    source, output = tmp_path / "plays.txt", tmp_path / "demo"
    source.write_text(text)
    steps = ["--target_steps", "2", "--draft_steps", "2", "--vocab_size", "320"]
    for _ in range(2):  # the second run replaces the first's result
        train_demo.main([str(source), "--output_dir", str(output), "--tiny", "--device", "cpu", *steps])
    printed = capsys.readouterr()
    assert "target: " in printed.out
    assert "bits/byte" in printed.out
    assert "target: step 2/2" in printed.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo", "plays.txt"]  # nothing half-written beside it

    for directory, shape in ((output, train_demo.TINY.target), (output / "draft", train_demo.TINY.draft)):
        config = model.ModelConfig.from_dict(json.loads((directory / "config.json").read_text()))
        assert (config.vocab_size, config.num_layers, config.head_dim) == (320, shape.num_layers, 64)
        assert config.tie_word_embeddings
        assert config.rope_scaling.type == "llama3"
        assert config.dtype == torch.bfloat16
        reloaded = LlamaForCausalLM.from_pretrained(directory)
        assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
        assert all(p.isfinite().all() for p in reloaded.parameters())
        saved = tiktoken.load.load_tiktoken_bpe(str(directory / "tokenizer.model"))
        assert len(saved) == 320 - len(train_demo.SPECIAL_TOKENS) == config.bos_token_id
        named = json.loads((directory / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        assert [entry["content"] for entry in named.values()] == list(train_demo.SPECIAL_TOKENS)
        assert [int(i) for i in named] == list(range(len(saved), 320))

    card = (output / "README.md").read_text()
    for fact in ("held-out loss", "bits per byte", "Seed: 0", "public domain", f"torch {torch.__version__}", "ROMEO:"):
        assert fact in card
    assert str(tmp_path) not in card


def test_foreign_directory_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"holds 'thesis.txt', expected an empty directory"):
        train_demo.check_output(tmp_path)


def test_bad_input_gets_one_line(tmp_path, text):
    output = ["--output_dir", str(tmp_path / "demo"), "--tiny"]
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 ")
    with pytest.raises(SystemExit, match=r"latin.txt: byte 3 is 0xe9, expected UTF-8 text"):
        train_demo.main([str(tmp_path / "latin.txt"), *output])
    with pytest.raises(SystemExit, match=r"absent.txt"):
        train_demo.main([str(tmp_path / "absent.txt"), *output])
    with pytest.raises(SystemExit) as usage:
        train_demo.main([str(tmp_path / "latin.txt"), *output, "--vocab_size", "1000"])
    assert usage.value.code == 2
    assert not (tmp_path / "demo").exists()
