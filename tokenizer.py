"""The tokenizer: text to token ids and back.

Owns the three kinds that checkpoints bring, behind one interface: Llama 3's tiktoken ranks, SentencePiece (Llama 2, Mistral)
and tokenizer.json (Qwen, and nearly all others). Also detokenising as tokens arrive, and where control tokens may come from:
never from text, unless the caller says so; in a chat, only from the template (chat_template.py). Knows nothing of the model.
"""

import base64
import codecs
import contextlib
import functools
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
import tiktoken
import tokenizers

import chat_template
from checkpoint import read_json, read_small

# Tokens that end an answer wherever they exist: Llama 3, ChatML (Qwen), Llama 2 and Mistral
END_TOKENS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|im_end|>", "<|endoftext|>", "</s>")

# ---------------------------------------------------------------- the interface


class Tokenizer:
    """What every kind offers. A kind gives `_encode_text(text, at_start)`: the ids of a text without control tokens, `at_start`
    where nothing stands before it; and `_tokens`, the bytes of each ordinary token, or a `_text_bytes` of its own.

    vocab_size: one past the largest id; the model's may be larger (padding).
    bos_id: what stands before a text, or None where the checkpoint was trained without.
    eos_ids: ids that end an answer. special_tokens: the control tokens, name to id. template: the chat template, or None.
    """

    drops_first_space = False  # SentencePiece writes a text with a space before it, and takes it off again

    def _text_bytes(self, token_id: int) -> bytes | None:
        """The bytes of one ordinary token below vocab_size; None where there is none."""
        return self._tokens[token_id] if token_id < len(self._tokens) else None

    def _finish(
        self, text_size: int, special: dict[str, int], config: dict, vocab_size: int | None, prefix: list[int] | None = None
    ):
        """Settles what the kinds share. `text_size`: one past the largest id that ordinary text may get; `prefix`: the ids that
        the file itself puts before a text, None where it does not say."""
        if wrong := [name for name, i in special.items() if i < 0]:
            raise ValueError(f"{self.path}: token {wrong[0]!r:.100}: found id {special[wrong[0]]}, expected at least 0")
        if vocab_size is not None and text_size > vocab_size:
            raise ValueError(f"{self.path}: found {text_size} tokens, expected at most the model's vocabulary, {vocab_size}")
        self.special_tokens = {name: i for name, i in special.items() if name and (vocab_size is None or i < vocab_size)}
        self._special_names = {i: name for name, i in self.special_tokens.items()}
        self.vocab_size = max([text_size, *(i + 1 for i in self._special_names)])
        names = sorted(self.special_tokens, key=len, reverse=True)  # the longest match wins
        self._control = re.compile("(" + "|".join(map(re.escape, names)) + ")" if names else "((?!))")

        self.named_tokens = _named_tokens(config)  # bos_token, eos_token, ... as templates know them
        if "bos_token" not in config:
            likely = [*(self._special_names.get(i) for i in prefix or ()), "<|begin_of_text|>", "<s>"]
            bos = [name for name in likely if name in self.special_tokens]
            self.named_tokens |= {"bos_token": bos[0]} if bos else {}
        bos_id = self.special_tokens.get(self.named_tokens.get("bos_token"))
        adds_bos = config.get("add_bos_token")
        if adds_bos is None:
            adds_bos = prefix is None or bos_id in prefix
        self.bos_id = bos_id if adds_bos else None
        ends = [name for name in (self.named_tokens.get("eos_token"), *END_TOKENS) if name in self.special_tokens]
        self.eos_ids = tuple(dict.fromkeys(self.special_tokens[name] for name in ends))
        if "eos_token" not in config and ends:
            self.named_tokens["eos_token"] = ends[0]
        self.chat: chat_template.ChatTemplate | None = None

    @property
    def template(self) -> str | None:
        return self.chat.source if self.chat else None

    def encode(self, text: str, *, bos: bool = True, allowed_special: bool = False) -> list[int]:
        """Ids of a text, after the BOS if the tokenizer has one. `<|eot_id|>` in it is text unless `allowed_special`."""
        pieces = self._control.split(text) if allowed_special else [text]
        return [self.bos_id] * (bos and self.bos_id is not None) + self._encode_pieces(pieces)

    def encode_chat(self, messages: list[dict], add_generation_prompt: bool = True, **variables) -> list[int]:
        """Ids of a conversation. A BOS is there if the template writes it. What a message says never becomes a control token.

        `messages`: {"role", "content"} objects, plain JSON; `variables`: what else the template knows (tools, enable_thinking).
        """
        if self.chat is None:
            expected = "chat_template.jinja or one in tokenizer_config.json"
            raise ValueError(f"{self.path.parent}: found no chat template, expected {expected}")
        text, mark = self.chat.render(messages, add_generation_prompt, **variables)
        _check_unicode(text, f"{self.chat.name}, or a message: text")
        return self._encode_pieces([piece.replace(mark, "") for piece in self._control.split(text)])

    def _encode_pieces(self, pieces: list[str]) -> list[int]:
        """`pieces`: text, control token, text, ..., text. A text between two control tokens is encoded in one go."""
        ids = []
        for i, piece in enumerate(pieces):
            if i % 2:
                ids.append(self.special_tokens[piece])
            elif piece:
                _check_unicode(piece)
                ids += self._encode_text(piece, at_start=i == 0)
        return ids

    def token_bytes(self, token_id: int, skip_special: bool = True) -> bytes:
        """What one token adds to the text: UTF-8, of which a token may hold any part."""
        if token_id in self._special_names:
            return b"" if skip_special else self._special_names[token_id].encode()
        text = self._text_bytes(token_id) if 0 <= token_id < self.vocab_size else None
        if text is None:
            raise ValueError(f"{self.path}: found token id {token_id}, expected one of its {self.vocab_size}")
        return text

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids. Bytes that are not UTF-8 become U+FFFD. ValueError for an id that the tokenizer lacks."""
        text = b"".join(self.token_bytes(i, skip_special) for i in ids)
        return text[self.drops_first_space and text.startswith(b" ") :].decode("utf-8", "replace")


class TokenStream:
    """Detokenises as tokens arrive: what `push` and `finish` return adds up to the text of `decode`, wherever it is cut.

    A character whose bytes are spread over tokens is held back until its last one. `after` is what stands before (the prompt of
    a completion), so that SentencePiece's first space is dropped at the start of a text and kept everywhere else.
    """

    def __init__(self, tokenizer: Tokenizer, after: Iterable[int] = (), skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True
        for token_id in after:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The text that is now final, often one token's, sometimes none."""
        text = self._tokenizer.token_bytes(token_id, self._skip_special)
        if self._at_start and text:
            self._at_start = False
            text = text[self._tokenizer.drops_first_space and text.startswith(b" ") :]
        return self._utf8.decode(text)

    def finish(self) -> str:
        """What is left when no token will come: U+FFFD for a character that was cut off, else nothing."""
        return self._utf8.decode(b"", final=True)


# ---------------------------------------------------------------- tiktoken ranks: Llama 3


# Llama 3's 256, as the published 3.1 checkpoints name them; 3.0 had reserved ones for eom_id, python_tag and the padding
LLAMA3_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
    "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
)  # fmt: skip
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHUNK_CHARS = 400_000  # tiktoken's regular expressions run out of stack on more: Meta's limits, and so Meta's ids
RUN_CHARS = 25_000  # the same, for characters in a row that are all white space or all not
_RUN = re.compile(r"\s+|\S+")


class TiktokenTokenizer(Tokenizer):
    """tokenizer.model as lines of `base64 rank`; the special tokens follow the ranks."""

    def __init__(self, data: bytes, path: Path, config: dict, vocab_size: int | None):
        self.path = path
        ranks = {}
        for number, line in enumerate(data.splitlines(), 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise ValueError(f"{path}: line {number}: found {line!r:.60}, expected base64 and a rank") from None
        if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
            raise ValueError(f"{path}: found {len(ranks)} ranks, expected 0, 1, 2, ... with each single byte among them")
        special = _added_tokens(path.parent, config) or {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL)}
        self._tokens = sorted(ranks, key=ranks.get)
        self._encoding = tiktoken.Encoding(path.name, pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={})
        self._finish(len(ranks), special, config, vocab_size)

    def _encode_text(self, text, at_start):
        return [i for chunk in _chunks(text) for i in self._encoding.encode_ordinary(chunk)]


def _chunks(text: str) -> Iterator[str]:
    for start in range(0, len(text), CHUNK_CHARS):
        chunk, begin = text[start : start + CHUNK_CHARS], 0
        for run in _RUN.finditer(chunk):
            for cut in range(run.start() + RUN_CHARS, run.end(), RUN_CHARS):
                yield chunk[begin:cut]
                begin = cut
        yield chunk[begin:]


# ---------------------------------------------------------------- SentencePiece: Llama 2, Mistral


class SentencePieceTokenizer(Tokenizer):
    """tokenizer.model as a SentencePiece protobuf; the tokens that tokenizer_config.json adds are control tokens."""

    def __init__(self, data: bytes, path: Path, config: dict, vocab_size: int | None):
        self.path = path
        self._pieces = _load_sentencepiece(data, path)
        self._inner_pieces = self._pieces  # for text after a control token: with a space before it as well, as Meta has it
        self._tokens, first = self._read_pieces()
        self.drops_first_space = first.startswith("▁")
        if config.get("legacy") is False and self.drops_first_space:
            self._inner_pieces = _load_sentencepiece(data, path)
            self._inner_pieces.override_normalizer_spec(add_dummy_prefix=False)
        sp = self._pieces
        special = {sp.id_to_piece(i): i for i in range(len(self._tokens)) if sp.is_control(i) or sp.is_unknown(i)}
        self._finish(len(self._tokens), special | _added_tokens(path.parent, config), config, vocab_size)

    def _read_pieces(self) -> tuple[list[bytes], str]:
        """The bytes of every token, and the piece that a text's first letter becomes."""
        sp, tokens = self._pieces, []
        try:
            for i in range(sp.vocab_size()):
                piece = sp.id_to_piece(i)
                tokens.append(bytes([int(piece[1:-1], 16)]) if sp.is_byte(i) else piece.replace("▁", " ").encode())
            return tokens, sp.encode_as_pieces("a")[0]
        except (ValueError, IndexError) as error:
            raise ValueError(f"{self.path}: piece {len(tokens)}: {error!r:.100}, expected pieces of UTF-8 or bytes") from None

    def _encode_text(self, text, at_start):
        return (self._pieces if at_start else self._inner_pieces).encode(text)


def _load_sentencepiece(data: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.load_from_serialized_proto(data)
    except (RuntimeError, UnicodeDecodeError):  # the latter where it quotes a broken piece
        raise ValueError(f"{path}: found {data[:40]!r}, expected Llama 3's tiktoken ranks or a SentencePiece model") from None
    return pieces


# ---------------------------------------------------------------- tokenizer.json: Qwen, and nearly all others


class JsonTokenizer(Tokenizer):
    """tokenizer.json through the `tokenizers` library, byte-level or SentencePiece-like. An added token is a control token if
    it is marked special; others (Qwen3's <think>) are vocabulary, and text becomes them wherever it comes from."""

    def __init__(self, data: bytes, path: Path, config: dict, vocab_size: int | None):
        self.path = path
        self._named = _named_tokens(config)
        self._tokenizer = self._load(data)
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        self._added = {i: token.content.encode() for i, token in added.items() if not token.special}
        text_ids = set(self._tokenizer.get_vocab().values()) - set(special.values())
        self._check_growth()
        self._read_decoder()
        with self._naming_the_file():
            prefix = self._tokenizer.encode("").ids
        self._finish(max(text_ids, default=-1) + 1, special, config, vocab_size, prefix)

    def _load(self, data: bytes) -> tokenizers.Tokenizer:
        with self._naming_the_file(data[:40]):
            tokenizer = tokenizers.Tokenizer.from_buffer(data)
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        named = [name for name in self._named.values() if name not in known and tokenizer.token_to_id(name) is not None]
        tokenizer.add_special_tokens(named)  # an eos_token is a control token even where the file forgot to mark it
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # as text, that is: control tokens are ours to find
        return tokenizer

    @contextlib.contextmanager
    def _naming_the_file(self, found: bytes = b"a step"):
        """For calls of the library: it raises nothing narrower than Exception, and where it stumbles over itself, wider."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            found = f"{found!r} ({str(error)!r:.200})"
            raise ValueError(f"{self.path}: found {found}, expected the tokenizers library's JSON") from None

    def _check_growth(self):
        """Thirty steps that each double a text would make gigabytes of one letter."""
        parts = [part for part in (self._tokenizer.normalizer, self._tokenizer.pre_tokenizer) if part]
        growth = sum(math.log2(times) for part in parts for times in _growth(json.loads(part.__getstate__())))
        if growth > math.log2(MAX_GROWTH):
            found = f"steps that make a text 2**{growth:.0f} times longer"
            raise ValueError(f"{self.path}: normalizer, pre_tokenizer: found {found}, expected at most {MAX_GROWTH} times")

    def _read_decoder(self):
        decoder = json.loads(self._tokenizer.decoder.__getstate__()) if self._tokenizer.decoder else {}
        steps = {step["type"]: step for step in decoder.get("decoders", [decoder]) if "type" in step}
        known = {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
        if not steps or set(steps) - known:
            raise ValueError(f"{self.path}: decoder: found {sorted(steps)}, expected ByteLevel, or some of {sorted(known)}")
        self._byte_level = "ByteLevel" in steps
        self._byte_fallback = "ByteFallback" in steps
        self.drops_first_space = "Strip" in steps or steps.get("Metaspace", {}).get("prepend_scheme", "never") != "never"

    @functools.cached_property
    def _inner(self) -> tokenizers.Tokenizer:
        """For text after a control token: the library adds SentencePiece's space by position where the file says 'first'."""
        before = self._tokenizer.to_str()
        inner = before.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
        return self._tokenizer if inner == before else self._load(inner.encode())

    def _encode_text(self, text, at_start):
        with self._naming_the_file():
            return (self._tokenizer if at_start else self._inner).encode(text, add_special_tokens=False).ids

    def _text_bytes(self, token_id):
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._added:
            return self._added.get(token_id)
        if self._byte_level:
            return b"".join(_BYTE_OF.get(c) or c.encode() for c in token)
        if self._byte_fallback and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[1:-1], 16)])
        return token.replace("▁", " ").encode()


MAX_GROWTH = 64  # of a text before it is cut into tokens; SentencePiece's form has 2, bytes as letters 2


def _growth(step: dict) -> Iterator[int]:
    """How many times longer each step of a normalizer or pre_tokenizer can make a text."""
    kind = step.get("type")
    if kind == "Sequence":
        for inner in step.get("normalizers") or step.get("pretokenizers") or ():
            yield from _growth(inner)
    elif kind in ("Replace", "Prepend"):
        yield 1 + len(step.get("prepend") or "") if kind == "Prepend" else max(1, len(step.get("content") or ""))
    elif kind in ("ByteLevel", "Metaspace"):
        yield 2
    elif kind == "Precompiled":
        yield 8


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's printable character for each byte: itself where it is printable, else the next one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): bytes([b]) for b in printable} | {chr(0x100 + n): bytes([b]) for n, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()

# ---------------------------------------------------------------- from a directory


def load_tokenizer(directory: str | Path, vocab_size: int | None = None, model_type: str | None = None) -> Tokenizer | None:
    """The tokenizer of a checkpoint, its kind told by its content; None where it has no tokenizer.json and no tokenizer.model.

    `vocab_size`: the model's; special tokens past it do not exist. `model_type`: config.json's, which helps to choose a chat
    template for a checkpoint without one. ValueError names the file.
    """
    directory = Path(directory)
    config_path = directory / "tokenizer_config.json"
    config = read_json(config_path) if config_path.exists() else {}
    path = directory / "tokenizer.json"
    if not path.exists():
        path = directory / "tokenizer.model"
    if not path.exists():
        return None
    data = read_small(path)
    if path.suffix == ".json":
        kind = JsonTokenizer
    else:
        kind = TiktokenTokenizer if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data) else SentencePieceTokenizer
    tokenizer = kind(data, path, config, vocab_size)

    source = _checkpoint_template(directory, config) or chat_template.built_in(tokenizer.special_tokens, model_type)
    if source:
        name, text = source
        tokenizer.chat = chat_template.ChatTemplate(text, name, tokenizer.named_tokens, tokenizer.special_tokens)
    return tokenizer


def _checkpoint_template(directory: Path, config: dict) -> tuple[str, str] | None:
    """(name, source) of the checkpoint's own template. tokenizer_config.json may hold several, by name."""
    path = directory / "chat_template.jinja"
    if path.exists():
        try:
            return str(path), read_small(path).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: byte {error.start}: {error.reason}, expected UTF-8") from None
    path, template = directory / "tokenizer_config.json", config.get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{path}: chat_template: found {type(template).__name__}, expected a string or a list with a default")
    return None if template is None else (f"{path}: chat_template", template)


def _named_tokens(config: dict) -> dict[str, str]:
    """bos_token, eos_token, ... of tokenizer_config.json, each a string or an object with `content`."""
    named = {key: value.get("content") if isinstance(value, dict) else value for key, value in config.items()}
    return {key: value for key, value in named.items() if key.endswith("_token") and isinstance(value, str)}


def _added_tokens(directory: Path, config: dict) -> dict[str, int]:
    """Tokens beside those of tokenizer.model, from tokenizer_config.json."""
    try:
        return {str(token["content"]): int(i) for i, token in config.get("added_tokens_decoder", {}).items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        path = directory / "tokenizer_config.json"
        raise ValueError(f"{path}: added_tokens_decoder: expected an object of ids, each with its content") from None


def _check_unicode(text: str, where: str = "text"):
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise ValueError(f"{where}: found the lone surrogate {found}, expected valid Unicode") from None
