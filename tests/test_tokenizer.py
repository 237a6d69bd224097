"""Tokenizers against the libraries that define them: identical ids, exact round trip, streaming equal to the whole.

The real Llama 3 and Llama 2 tokenizers are read from ../shared/data where it exists; small ones of every kind are built here.
"""

import base64
import io
import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.tokenization_utils_base import generate_merges

from tokenizer import (
    LLAMA3_SPECIAL,
    LLAMA3_SPLIT,
    JsonTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    TokenStream,
    _chunks,
    load_tokenizer,
)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# ruff: noqa: RUF001  the characters are meant
TEXTS = {
    "english": "The quick brown fox, it's said, didn't jump over 12345 lazy dogs; we'll see... \"Why?\"",
    "german": "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich – für 3,50 €.",
    "russian": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "chinese": "敏捷的棕色狐狸跳过了懒狗。2024年，北京。",
    "japanese": "いろはにほへと ちりぬるを、カタカナと漢字。",
    "korean": "키스의 고유조건은 입술끼리 만나야 하고",
    "arabic": "نص حكيم له سر قاطع وذو شأن عظيم",
    "hindi": "ऋषियों को सताने वाले दुष्ट राक्षसों",
    "thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "emoji": "ok 👍🏽 family 👨‍👩‍👧‍👦 flag 🇩🇪 🏴󠁧󠁢󠁳󠁣󠁴󠁿 😀😃😄 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 🫠",
    "code": "def f(x):\n\tif x > 0:\n        return {'a': [1, 2_000], **x}  # ok\n\n\n#include <stdio.h>\r\nint main() {}\r\n",
    "markup": "<html><!-- x --> &amp; [INST] <<SYS>> </div> {{ x }} {% y %} \\u0041 \\",
    "spaces": "a  b   c    d\t\te \n \n\n f \u00a0 \u2003 \u3000 g\r\r\n",
    "first space": " a leading space",
    "first spaces": "   three of them",
    "last space": "a last space ",
    "only space": " ",
    "only newlines": "\n\n\n",
    "control characters": "a\x00b\x01\x1b[31m\x7f\x85\u200b\u2028\ufeff\ufffd\ufffe",
    "combining": "e\u0301 Z\u0351\u036b\u0343\u036a\u0302\u036b\u033d\u034f\u0334a\u0322l\u0328g",
    "numbers": "3.14159 1234567890 ١٢٣ ½ ² Ⅳ 1,000,000 0x1F",
    "contractions": "I'M you'Re he'S they'LL don'T 'sup ''tis",
    "long word": "Donaudampfschifffahrtsgesellschaft" * 9,
    "repeats": "!!!!!!!!!!???" + "=" * 100 + "ab" * 100 + "\u4e2d" * 50,
    "empty": "",
}
CORPUS = list(TEXTS.values()) * 3
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


# ---------------------------------------------------------------- tokenizers, real and small (test_chat_template.py has them)


def shared_file(name: str) -> Path:
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"needs {name} in {SHARED_DATA}")
    return path


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def byte_level_bpe(split: str, vocab_size: int = 500) -> tokenizers.Tokenizer:
    """A tokenizer.json as Qwen's or GPT-2's, trained on the texts above."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False))
    return bpe


def llama3_model(directory: Path, real: bool) -> Path:
    """A directory with tokenizer.model as Llama 3's, of 500 ranks unless `real`."""
    directory.mkdir(parents=True, exist_ok=True)
    if real:
        shutil.copy(shared_file("llama3-tokenizer.model"), directory / "tokenizer.model")
        return directory
    bpe = byte_level_bpe(LLAMA3_SPLIT)
    tokens = sorted(bpe.get_vocab(), key=bpe.token_to_id)
    to_byte = {c: b for b, c in transformers.convert_slow_tokenizer.bytes_to_unicode().items()}
    lines = [f"{base64.b64encode(bytes(to_byte[c] for c in token)).decode()} {i}\n" for i, token in enumerate(tokens)]
    (directory / "tokenizer.model").write_text("".join(lines))
    return directory


def llama2_model(directory: Path, real: bool) -> Path:
    """A directory with tokenizer.model as Llama 2's, of 480 pieces unless `real`."""
    directory.mkdir(parents=True, exist_ok=True)
    if real:
        shutil.copy(shared_file("llama2-tokenizer.model"), directory / "tokenizer.model")
        return directory
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in TEXTS.values() if text.isascii() for line in text.split("\n") * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,  # for all that is not ASCII
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return directory


_converted: dict[bytes, tokenizers.Tokenizer] = {}  # converting the real one takes a second


def transformers_llama3(directory: Path):
    """transformers' own conversion of tiktoken ranks, with the post-processor of the published tokenizer.json."""
    path, bos = directory / "tokenizer.model", LLAMA3_SPECIAL[0]
    ranks = path.read_bytes()
    if ranks not in _converted:
        _converted[ranks] = TikTokenConverter(str(path), extra_special_tokens=list(LLAMA3_SPECIAL)).converted()
        special_tokens = [(bos, _converted[ranks].token_to_id(bos))]
        _converted[ranks].post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=special_tokens)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=_converted[ranks], bos_token=bos, eos_token="<|eot_id|>")


def sentencepiece_bpe(directory: Path) -> dict:
    """Vocabulary and merges of a tokenizer.model, in the order of the scores as in the published tokenizer.json."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    scores = {piece: pieces.get_score(i) for piece, i in vocabulary.items()}
    return {"vocab": vocabulary, "merges": generate_merges(vocabulary, scores)}


def transformers_llama2(directory: Path):
    """The published tokenizer.json of Llama 2 and Mistral v0.1: a space before each text between control tokens."""
    bpe = models.BPE(**sentencepiece_bpe(directory), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    llama = tokenizers.Tokenizer(bpe)
    llama.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    llama.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    llama.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=llama, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def transformers_mistral3(directory: Path):
    """Mistral v0.3's: [INST] is a control token, and SentencePiece's space is added at the start only."""
    mistral = transformers.LlamaTokenizer(**sentencepiece_bpe(directory), legacy=False, add_bos_token=True)
    mistral.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]"]})
    return mistral


def transformers_qwen():
    """A byte-level BPE with Qwen's regular expression, normaliser and added tokens."""
    bpe = byte_level_bpe(QWEN_SPLIT)
    bpe.normalizer = normalizers.NFC()
    bpe.add_tokens([AddedToken(t, normalized=False, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    bpe.add_tokens([AddedToken(t, normalized=False, special=False) for t in ("<think>", "</think>")])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@pytest.fixture(scope="module", params=["small", "real"])
def llama3_directory(request, tmp_path_factory):
    return llama3_model(tmp_path_factory.mktemp("llama3"), real=request.param == "real")


@pytest.fixture(scope="module", params=["small", "real"])
def llama2_directory(request, tmp_path_factory):
    return llama2_model(tmp_path_factory.mktemp("llama2"), real=request.param == "real")


@pytest.fixture(scope="module")
def llama3(llama3_directory):
    return load_tokenizer(llama3_directory)


@pytest.fixture(scope="module")
def llama2(llama2_directory):
    return load_tokenizer(llama2_directory)


@pytest.fixture(scope="module")
def qwen_reference():
    return transformers_qwen()


@pytest.fixture(scope="module")
def qwen(qwen_reference, tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen")
    qwen_reference.save_pretrained(directory)
    return load_tokenizer(directory)


@pytest.fixture(scope="module", params=["llama3", "llama2", "qwen"])
def small(request, tmp_path_factory):
    """A small tokenizer of each kind, for what does not depend on a reference."""
    if request.param == "qwen":
        return request.getfixturevalue("qwen")
    make = {"llama3": llama3_model, "llama2": llama2_model}[request.param]
    return load_tokenizer(make(tmp_path_factory.mktemp(request.param), real=False))


# ---------------------------------------------------------------- identical ids, exact round trip


def check_stream(tokenizer, ids):
    """Streaming gives the same text as `decode`, from the start and from every later position."""
    whole = tokenizer.decode(ids)
    for split in range(len(ids) + 1):
        before = TokenStream(tokenizer)
        head = "".join(map(before.push, ids[:split]))
        after = TokenStream(tokenizer, after=ids[:split])
        tail = "".join(map(after.push, ids[split:])) + after.finish()
        assert head + tail == whole, split
        assert head + before.finish() == tokenizer.decode(ids[:split]), split


def test_llama3_equals_tiktoken_and_transformers(llama3, llama3_directory, tmp_path):
    ranks = dict(line.split() for line in (llama3_directory / "tokenizer.model").read_bytes().splitlines())
    reference = tiktoken.Encoding(
        "reference",
        pat_str=LLAMA3_SPLIT,
        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in ranks.items()},
        special_tokens=llama3.special_tokens,
    )
    converted = transformers_llama3(llama3_directory)
    converted.save_pretrained(tmp_path)
    from_json = load_tokenizer(tmp_path)
    assert isinstance(llama3, TiktokenTokenizer)
    assert isinstance(from_json, JsonTokenizer)
    assert from_json.special_tokens == llama3.special_tokens
    assert (from_json.vocab_size, from_json.bos_id) == (llama3.vocab_size, llama3.bos_id)
    assert set(from_json.eos_ids) == set(llama3.eos_ids)
    for name, text in TEXTS.items():
        ids = llama3.encode(text)
        assert ids[1:] == reference.encode_ordinary(text), name
        assert ids == converted.encode(text) == from_json.encode(text), name
        assert llama3.decode(ids) == from_json.decode(ids) == text, name
        assert llama3.decode(ids, skip_special=False) == reference.decode(ids) == converted.decode(ids), name
        check_stream(llama3, ids)
        check_stream(from_json, ids)


def test_llama2_equals_sentencepiece_and_transformers(llama2, llama2_directory, tmp_path):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(llama2_directory / "tokenizer.model"))
    converted = transformers_llama2(llama2_directory)
    converted.save_pretrained(tmp_path)
    from_json = load_tokenizer(tmp_path)
    assert isinstance(llama2, SentencePieceTokenizer)
    assert isinstance(from_json, JsonTokenizer)
    assert from_json.special_tokens == llama2.special_tokens
    assert (from_json.vocab_size, from_json.bos_id, from_json.eos_ids) == (llama2.vocab_size, 1, (2,))
    assert (llama2.bos_id, llama2.eos_ids) == (1, (2,))
    for name, text in TEXTS.items():
        ids = llama2.encode(text)
        assert ids[1:] == reference.encode(text), name
        assert ids == converted.encode(text) == from_json.encode(text), name
        assert llama2.decode(ids) == from_json.decode(ids) == reference.decode(ids) == text, name
        assert llama2.decode(ids, skip_special=False) == converted.decode(ids), name
        check_stream(llama2, ids)
        check_stream(from_json, ids)


def test_transformers_5_class_for_llama2_agrees(llama2, llama2_directory):
    """LlamaTokenizer of transformers 5 differs from SentencePiece where a text begins with a space; elsewhere it must not."""
    reference = transformers.LlamaTokenizer(**sentencepiece_bpe(llama2_directory), legacy=True)
    for name, text in TEXTS.items():
        if not text.startswith(" "):
            assert llama2.encode(text, bos=False) == reference.encode(text, add_special_tokens=False), name


def test_qwen_equals_tokenizers(qwen, qwen_reference):
    assert isinstance(qwen, JsonTokenizer)
    assert qwen.bos_id is None
    assert qwen.eos_ids == tuple(qwen.special_tokens[name] for name in ("<|im_end|>", "<|endoftext|>"))
    assert set(qwen.special_tokens) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    assert qwen.vocab_size == len(qwen_reference)
    for name, text in {**TEXTS, "thinking": "<think>\nwell\n</think> yes"}.items():
        ids = qwen.encode(text)
        assert ids == qwen_reference.encode(text), name
        assert qwen.decode(ids) == qwen_reference.decode(ids), name
        if name != "combining":  # the normaliser composes it
            assert qwen.decode(ids) == text, name
        check_stream(qwen, ids)


def test_a_long_real_text(tmp_path):
    text = shared_file("wikitext2-test.txt").read_text("utf-8")[:300_000]
    for make, reference in ((llama3_model, transformers_llama3), (llama2_model, transformers_llama2)):
        directory = make(tmp_path / make.__name__, real=True)
        tokenizer = load_tokenizer(directory)
        # transformers takes the text's many <unk> for a token of Llama 2's
        assert tokenizer.encode(text, allowed_special=True) == reference(directory).encode(text)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        stream = TokenStream(tokenizer)
        assert "".join(map(stream.push, ids)) + stream.finish() == text


def test_special_tokens_of_llama3(llama3):
    first = llama3.vocab_size - 256
    assert first in (128000, 500)
    assert list(llama3.special_tokens.values()) == list(range(first, first + 256))
    places = {
        "<|begin_of_text|>": 0,
        "<|end_of_text|>": 1,
        "<|finetune_right_pad_id|>": 4,
        "<|start_header_id|>": 6,
        "<|eom_id|>": 8,
    }
    places |= {"<|end_header_id|>": 7, "<|eot_id|>": 9, "<|python_tag|>": 10, "<|reserved_special_token_247|>": 255}
    assert {name: llama3.special_tokens[name] - first for name in places} == places
    assert llama3.bos_id == first
    assert sorted(i - first for i in llama3.eos_ids) == [1, 8, 9]


def test_allowed_special_equals_transformers(llama3, llama3_directory):
    reference = transformers_llama3(llama3_directory)
    text = "<|begin_of_text|>a <|eot_id|> b<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<|eot_id"
    assert llama3.encode(text, bos=False, allowed_special=True) == reference.encode(text, add_special_tokens=False)
    assert llama3.decode(llama3.encode(text, bos=False, allowed_special=True), skip_special=False) == text


def test_legacy_false_adds_no_space_after_a_control_token(llama2_directory, tmp_path):
    shutil.copy(llama2_directory / "tokenizer.model", tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"legacy": False})
    reference = transformers.LlamaTokenizer(**sentencepiece_bpe(tmp_path), legacy=False)
    text = "one two<s>three four</s> five"
    expected = reference.encode(text, add_special_tokens=False)
    assert load_tokenizer(tmp_path).encode(text, bos=False, allowed_special=True) == expected
    reference.save_pretrained(tmp_path)
    from_json = load_tokenizer(tmp_path)
    assert isinstance(from_json, JsonTokenizer)
    assert from_json.encode(text, bos=False, allowed_special=True) == expected


# ---------------------------------------------------------------- streaming


def test_nothing_is_shown_of_half_a_character(small):
    for character in "é€👍🏴":
        ids = small.encode(character, bos=False)
        stream = TokenStream(small)
        pushed = [stream.push(i) for i in ids]
        assert "".join(pushed) == character
        assert stream.finish() == ""
        assert "�" not in "".join(pushed)
    cut = small.encode("👍", bos=False)[:-1]
    assert len(cut) >= 1, "the emoji must be spread over tokens for this test to say anything"
    stream = TokenStream(small)
    assert [stream.push(i) for i in cut] == [""] * len(cut)
    assert stream.finish() == "�"


def test_real_llama_tokenizers_split_an_emoji(tmp_path):
    for make, name in ((llama3_model, "3"), (llama2_model, "2")):
        tokenizer = load_tokenizer(make(tmp_path / name, real=True))
        ids = tokenizer.encode("🫠", bos=False)
        assert len(ids) > 1
        stream = TokenStream(tokenizer)
        assert [stream.push(i) for i in ids][-1] == "🫠"
        check_stream(tokenizer, ids)


def test_any_ids_stream_as_they_decode(small):
    """Bytes that are no UTF-8, control tokens in the middle, first spaces anywhere."""
    generator = random.Random(0)
    for _ in range(60):
        ids = [generator.randrange(small.vocab_size) for _ in range(generator.randrange(1, 25))]
        check_stream(small, ids)
        for skip_special in (True, False):
            stream = TokenStream(small, skip_special=skip_special)
            assert "".join(map(stream.push, ids)) + stream.finish() == small.decode(ids, skip_special=skip_special)


def test_the_first_space_of_sentencepiece(tmp_path):
    tokenizer = load_tokenizer(llama2_model(tmp_path, real=False))
    prompt, answer = tokenizer.encode("over the"), tokenizer.encode("lazy", bos=False)
    assert tokenizer.decode(answer) == "lazy"
    alone, continued, after_bos = (
        TokenStream(tokenizer),
        TokenStream(tokenizer, after=prompt),
        TokenStream(tokenizer, after=[1]),
    )
    assert "".join(map(alone.push, answer)) == "lazy"
    assert "".join(map(continued.push, answer)) == " lazy"
    assert "".join(map(after_bos.push, answer)) == "lazy"
    assert tokenizer.decode(prompt + answer) == "over the lazy"


# ---------------------------------------------------------------- faults


def reference_chunks(text):
    """Meta's rule, said plainly: at most 400,000 characters, and in them at most 25,000 in a row of one sort."""
    for start in range(0, len(text), 400_000):
        chunk, run = "", 0
        for character in text[start : start + 400_000]:
            run = run + 1 if chunk and chunk[-1].isspace() == character.isspace() else 1
            if run > 25_000:
                yield chunk
                chunk, run = "", 1
            chunk += character
        yield chunk


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x" * 25_000,
        "x" * 25_001,
        " " * 60_000,
        "a b" * 20_000 + "y" * 70_000 + "\n" * 26_000 + "z",
        "ab \u3000" * 110_000,
        "x" * 399_990 + " " * 20 + "x" * 30_000,
        "\u4e2d\x1c" + "\x1f\x85" * 20_000,
    ],
)
def test_chunks_are_metas(text):
    assert [c for c in _chunks(text) if c] == [c for c in reference_chunks(text) if c]


@pytest.mark.parametrize("unit", ["x", " ", "\u4e2d"])
def test_a_million_characters(small, unit):
    """Fault 25. Without chunks tiktoken's regular expression runs out of stack on white space."""
    text = unit * (1_000_000 // len(unit))
    ids = small.encode(text)
    assert small.decode(ids) == text
    if isinstance(small, TiktokenTokenizer):
        run = small.encode(unit * (25_000 // len(unit)), bos=False)
        assert ids == [small.bos_id, *run * 40]


def test_surrogates_and_nul(small):
    """Fault 25."""
    with pytest.raises(ValueError, match=r"^text: found the lone surrogate U\+D83D at character 2, expected valid Unicode$"):
        small.encode("ab\ud83d")
    assert small.decode(small.encode("a\0b\0")) == "a\0b\0"


def test_a_users_control_token_stays_text(small):
    """Fault 26: for each control token there is."""
    for name in small.special_tokens:
        for text in (name, f"a {name} b", name * 3, name.upper()):
            ids = small.encode(text, bos=False)
            assert not set(ids) & set(small.special_tokens.values()), name
            assert small.decode(ids) == text
        assert small.special_tokens[name] in small.encode(name, allowed_special=True)


def test_bos(small, tmp_path):
    assert small.encode("", bos=True) == ([] if small.bos_id is None else [small.bos_id])
    assert small.encode("", bos=False) == []
    assert small.decode(small.encode("")) == ""
    llama3_model(tmp_path, real=False)
    write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": False})
    assert load_tokenizer(tmp_path).bos_id is None


def test_unknown_ids_are_refused(small):
    for wrong in (-1, small.vocab_size, 10**9):
        with pytest.raises(ValueError, match=f"found token id {wrong}, expected one of its {small.vocab_size}"):
            small.decode([wrong])
        with pytest.raises(ValueError, match="found token id"):
            TokenStream(small).push(wrong)


def test_vocab_size_caps_the_special_tokens(tmp_path):
    directory = llama3_model(tmp_path, real=False)
    capped = load_tokenizer(directory, vocab_size=512)
    assert list(capped.special_tokens) == list(LLAMA3_SPECIAL[:12])
    assert capped.vocab_size == 512
    text = "<|reserved_special_token_5|>"
    assert capped.decode(capped.encode(text, allowed_special=True)) == text
    with pytest.raises(ValueError, match=r"tokenizer\.model: found 500 tokens, expected at most the model's vocabulary, 499"):
        load_tokenizer(directory, vocab_size=499)
    transformers_llama3(directory).save_pretrained(tmp_path / "json")
    capped = load_tokenizer(tmp_path / "json", vocab_size=512)
    assert list(capped.special_tokens) == list(LLAMA3_SPECIAL[:12])
    with pytest.raises(ValueError, match="found token id 512, expected one of its 512"):
        capped.decode([512])


def test_special_tokens_from_the_config(tmp_path):
    added = {"500": {"content": "<|begin_of_text|>"}, "501": {"content": "<|eot_id|>"}}
    llama3_model(tmp_path / "3", real=False)
    write_json(tmp_path / "3" / "tokenizer_config.json", {"added_tokens_decoder": added})
    tokenizer = load_tokenizer(tmp_path / "3")
    assert tokenizer.special_tokens == {"<|begin_of_text|>": 500, "<|eot_id|>": 501}
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (500, (501,), 502)
    added["502"] = {"content": "<|eot_id|><|eot_id|>"}
    write_json(tmp_path / "3" / "tokenizer_config.json", {"added_tokens_decoder": added})
    ids = load_tokenizer(tmp_path / "3").encode("<|eot_id|>" * 3, bos=False, allowed_special=True)
    assert ids == [502, 501], "the longest match wins"
    llama2_model(tmp_path / "2", real=False)
    config = {"added_tokens_decoder": {"480": {"content": "<image>"}}, "eos_token": {"content": "<image>"}}
    write_json(tmp_path / "2" / "tokenizer_config.json", config)
    tokenizer = load_tokenizer(tmp_path / "2")
    assert tokenizer.encode("a<image>", bos=False, allowed_special=True)[-1] == 480
    assert (tokenizer.eos_ids, tokenizer.vocab_size) == ((480, 2), 481)
    write_json(tmp_path / "2" / "tokenizer_config.json", {"added_tokens_decoder": {"x": 1}})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: added_tokens_decoder: expected"):
        load_tokenizer(tmp_path / "2")


def test_an_eos_token_is_a_control_token_though_the_file_does_not_say_so(tmp_path):
    bpe = byte_level_bpe(QWEN_SPLIT)
    bpe.add_tokens([AddedToken("<|end|>", normalized=False, special=False)])
    bpe.enable_truncation(4)
    bpe.enable_padding(length=8)
    bpe.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<|end|>"})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_ids == (500,)
    text = "a text <|end|> that goes on"
    assert 500 not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text, "a file's truncation and padding are not for us"


def test_no_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path) is None


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2183982\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"", "found b'', expected Llama 3's tiktoken ranks or a SentencePiece model"),
        ("tokenizer.model", POINTER, "found a Git LFS pointer, expected the file itself"),
        ("tokenizer.model", b"<!DOCTYPE html><html>", "found an HTML page, expected the file itself"),
        ("tokenizer.model", b"\x0a\xff\xff\xff\xff", "expected Llama 3's tiktoken"),
        ("tokenizer.model", b"IQ== 0\nIg==\n", "line 2: found b'Ig==', expected base64 and a rank"),
        ("tokenizer.model", b"IQ== 0\nI*g= 1\n", r"line 2: found b'I\*g= 1', expected base64 and a rank"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "found 2 ranks, expected 0, 1, 2, ... with each single byte among them"),
        ("tokenizer.json", b'{"model": ', "found b'.*expected the tokenizers library's JSON"),
        ("tokenizer.json", POINTER, "found a Git LFS pointer, expected the file itself"),
        ("tokenizer_config.json", b"[1]", "found a JSON list, expected an object"),
        ("tokenizer_config.json", b"\xff", "invalid JSON"),
        ("tokenizer_config.json", b"[" * 100_000, "invalid JSON"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"-5": {"content": "x"}}}', "token 'x': found id -5, expected"),
        ("chat_template.jinja", b"a\xffb", "byte 1: invalid start byte, expected UTF-8"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    if name in ("tokenizer_config.json", "chat_template.jinja"):
        llama3_model(tmp_path, real=False)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(error.value).startswith(str(tmp_path))
    assert name in str(error.value) or "token 'x'" in message
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "steps",
    [
        [normalizers.Replace("e", "ee")] * 30,
        [normalizers.Sequence([normalizers.Prepend("ab")] * 20)],
        [normalizers.Replace(tokenizers.Regex("."), "x" * 100)],
        [normalizers.ByteLevel()] * 30,
    ],
    ids=["replace", "prepend", "one", "bytes"],
)
def test_a_normalizer_that_explodes_is_refused(tmp_path, steps):
    """Thirty steps that each double an "e": a prompt of one letter would take all memory."""
    bpe = byte_level_bpe(QWEN_SPLIT)
    bpe.normalizer = normalizers.Sequence(steps)
    bpe.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json: normalizer, pre_tokenizer: found steps that make a text 2\*\*\d+"):
        load_tokenizer(tmp_path)


def test_an_unknown_decoder_is_refused(tmp_path):
    words = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json: decoder: found \['WordPiece'\], expected ByteLevel"):
        load_tokenizer(tmp_path)
