"""Compare tokenizers by language: tokens per word and per character, bytes per token, and share of byte tokens.

    (language, text) ... --fertility(tokenizers)--> one row per language, with the values of each tokenizer

A tokenizer trained on English splits other languages into more tokens, so the same content takes more of the context
and of the training budget. Texts are read once and not kept.

Source: Rust et al., "How Good is Your Tokenizer?" (arXiv 2012.15613), section 3: fertility is tokens per word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.io.untrusted import UntrustedError, parse_json, read_bytes, read_lines
from data_pipeline.prepare.stats.languages import detect, writes_spaces
from data_pipeline.sample import Sample, TextPart
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.text.tokenizer import check_unicode

_MOST_BYTES = 1 << 28
ALL = "all"
"""Name of the row over all texts."""


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer that need not have the special tokens of training, so that any file can be compared.

    Attributes:
        name: Name of the tokenizer in tables.
        encode: Encodes a text without bos and eos; the names of special tokens are encoded as ordinary text.
        byte_ids: Tokens of single bytes (byte fallback), or tokens with a part of a character (byte-level BPE).
        unknown_id: The token for text that cannot be encoded; -1 if there is none.
    """

    name: str
    encode: Callable[[str], list[int]]
    byte_ids: frozenset[int]
    unknown_id: int

    @classmethod
    def open(cls, path: Path, name: str = "") -> TextTokenizer:
        """Load a ``.json`` file with ``tokenizers``, or any other file as a SentencePiece model.

        Args:
            path: The file.
            name: Name in tables; empty means the file's stem.

        Raises:
            DataConfigError: the file is missing or cannot be loaded.
        """
        try:
            content = read_bytes(path, most_bytes=_MOST_BYTES)
        except UntrustedError as error:
            raise DataConfigError(f"tokenizer {path}: {error}") from error
        except OSError as error:
            raise DataConfigError(f"tokenizer {path}: cannot be read: {error.strerror}") from error
        if path.suffix == ".json":
            return cls(name or path.stem, *_open_json(path, content))
        return cls(name or path.stem, *_open_sentencepiece(path, content))


def _open_sentencepiece(path: Path, content: bytes) -> tuple[Callable[[str], list[int]], frozenset[int], int]:
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(content)
    except RuntimeError as error:
        raise DataConfigError(f"tokenizer {path}: not a SentencePiece model") from error
    return model.encode, frozenset(i for i in range(model.vocab_size()) if model.is_byte(i)), model.unk_id()


def _open_json(path: Path, content: bytes) -> tuple[Callable[[str], list[int]], frozenset[int], int]:
    try:
        model = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # The library raises bare Exception.
        raise DataConfigError(f"tokenizer {path}: not a tokenizer.json: {error}") from error
    model.encode_special_tokens = True
    vocabulary = model.get_vocab(with_added_tokens=False)
    try:
        settings = parse_json(content)["model"]
    except UntrustedError as error:
        raise DataConfigError(f"tokenizer {path}: {error}") from error
    if settings.get("byte_fallback"):
        byte_ids = frozenset(vocabulary[name] for name in _fallback_names() if name in vocabulary)
    elif '"ByteLevel"' in content.decode():
        byte_ids = frozenset(i for piece, i in vocabulary.items() if not _is_whole(piece))
    else:
        byte_ids = frozenset()
    unknown = settings.get("unk_token")
    if unknown is None and isinstance(settings.get("unk_id"), int):  # Unigram stores the id, not the name.
        unknown_id = settings["unk_id"]
    else:
        unknown_id = vocabulary.get(unknown, -1)

    def encode(text: str) -> list[int]:
        ids: list[int] = model.encode(text, add_special_tokens=False).ids
        return ids

    return encode, byte_ids, unknown_id


def _fallback_names() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of byte-level BPE represents.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), its published encoder:
    printable Latin-1 characters represent their own byte; the other bytes use code points from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()


def _is_whole(piece: str) -> bool:
    """Whether a byte-level piece consists of whole characters."""
    try:
        bytes(_BYTE_OF_CHARACTER[letter] for letter in piece).decode()
    except KeyError:  # Not a byte-level piece, for example the name of a special token.
        return True
    except UnicodeDecodeError:
        return False
    return True


@dataclass
class TextCounts:
    """Sums over texts of one language. ``tokens``, ``byte_tokens`` and ``unknown`` hold one number per tokenizer."""

    texts: int = 0
    words: int = 0
    characters: int = 0
    num_bytes: int = 0
    tokens: list[int] = field(default_factory=list)
    byte_tokens: list[int] = field(default_factory=list)
    unknown: list[int] = field(default_factory=list)


def fertility(
    texts: Iterable[tuple[str, str]],
    compared: Sequence[TextTokenizer],
    progress: Callable[[int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Count texts and tokens per language.

    Args:
        texts: (language, text) pairs; read once.
        compared: The tokenizers, with different names.
        progress: Called with 1 after each text.

    Returns:
        A row for each language, by number of texts, largest first; the row ``all`` is last. A row holds ``texts``,
        ``words`` (None if the language does not separate words by spaces), ``characters``, ``bytes``, and
        ``tokenizers``: name to ``tokens``, ``per_word``, ``per_character``, ``bytes_per_token``, ``byte_share`` (share
        of tokens in ``byte_ids``) and ``unknown_share``. In the row ``all``, ``words`` is None if one language does not
        separate words by spaces.

    Raises:
        DataConfigError: there is no text, or two tokenizers have the same name.
    """
    names = [tokenizer.name for tokenizer in compared]
    if len(set(names)) != len(names):
        raise DataConfigError(f"tokenizers must have different names, got {', '.join(names)}")
    counts: dict[str, TextCounts] = {}
    for language, text in texts:
        count = counts.setdefault(language, _zero(len(compared)))
        _add(count, text, compared)
        if progress is not None:
            progress(1)
    if not counts:
        raise DataConfigError("no text to count: check the name of the field (--field)")
    order = sorted(counts, key=lambda language: (-counts[language].texts, language))
    rows = {language: _language_row(counts[language], names, writes_spaces(language)) for language in order}
    spaced = all(writes_spaces(language) for language in counts)
    return {**rows, ALL: _language_row(_sum(list(counts.values()), len(compared)), names, spaced)}


def _zero(num_tokenizers: int) -> TextCounts:
    return TextCounts(tokens=[0] * num_tokenizers, byte_tokens=[0] * num_tokenizers, unknown=[0] * num_tokenizers)


def _add(count: TextCounts, text: str, compared: Sequence[TextTokenizer]) -> None:
    count.texts += 1
    count.words += len(text.split())
    count.characters += len(text)
    count.num_bytes += len(text.encode(errors="replace"))
    for number, tokenizer in enumerate(compared):
        ids = tokenizer.encode(text)
        count.tokens[number] += len(ids)
        count.byte_tokens[number] += sum(i in tokenizer.byte_ids for i in ids)
        count.unknown[number] += ids.count(tokenizer.unknown_id)


def _sum(counts: Sequence[TextCounts], num_tokenizers: int) -> TextCounts:
    total = _zero(num_tokenizers)
    for count in counts:
        for name in ("texts", "words", "characters", "num_bytes"):
            setattr(total, name, getattr(total, name) + getattr(count, name))
        for name in ("tokens", "byte_tokens", "unknown"):
            setattr(total, name, [a + b for a, b in zip(getattr(total, name), getattr(count, name), strict=True)])
    return total


def _language_row(count: TextCounts, names: Sequence[str], spaced: bool) -> dict[str, Any]:
    columns = zip(names, count.tokens, count.byte_tokens, count.unknown, strict=True)
    return {
        "texts": count.texts,
        "words": count.words if spaced else None,
        "characters": count.characters,
        "bytes": count.num_bytes,
        "tokenizers": {
            name: {
                "tokens": tokens,
                "per_word": _ratio(tokens, count.words) if spaced else None,
                "per_character": _ratio(tokens, count.characters),
                "bytes_per_token": _ratio(count.num_bytes, tokens),
                "byte_share": _ratio(byte_tokens, tokens),
                "unknown_share": _ratio(unknown, tokens),
            }
            for name, tokens, byte_tokens, unknown in columns
        },
    }


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def texts_of_manifests(
    manifests: Sequence[Path], field_name: str = "", language_field: str = ""
) -> Iterator[tuple[str, str]]:
    """Yield the (language, text) pairs of samples.

    Args:
        manifests: The manifests, read in order.
        field_name: Field to read; dots select nested fields. An object maps languages to texts, ``{"de": "Apfel"}``; a
            text or a list of texts has the sample's language. Samples without the field are skipped. Empty reads the
            captions, or else the text parts, of the sample.
        language_field: Field with the sample's language. Empty, or absent in a sample: the language is detected.

    Raises:
        SampleError: a sample is damaged, or the field holds something other than texts.
    """
    for path in manifests:
        for sample in read_samples(path):
            stated = _find(sample.fields, language_field) if language_field else None
            for language, text in _texts_of_sample(sample, field_name):
                if text:
                    yield language or (stated if isinstance(stated, str) and stated else detect(text)), text


def _texts_of_sample(sample: Sample, field_name: str) -> Iterator[tuple[str, str]]:
    """Yield (language, text); the language is empty unless the field is an object of languages."""
    if field_name:
        value = _find(sample.fields, field_name)
    else:
        value = sample.fields.get("captions") or [part.text for part in sample.parts if isinstance(part, TextPart)]
    by_language = value if isinstance(value, Mapping) else {"": value}
    for language, value in by_language.items():
        texts = value if isinstance(value, list) else [] if value is None else [value]
        for text in texts:
            if not isinstance(text, str):
                origin = sample.provenance
                reason = f"field {field_name or 'captions'!r} holds {text!r:.80}, expected texts"
                raise SampleError(reason, shard=origin.shard, key=origin.key)
            try:
                check_unicode(text)
            except SampleError as error:
                raise error.located(sample.provenance.shard, sample.provenance.key) from error
            yield str(language), text


def _find(fields: Mapping[str, Any], name: str) -> Any:
    value: Any = fields
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def texts_of_file(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the (language, text) pairs of a file.

    A ``.jsonl`` has an object with ``text`` and, if known, ``lang`` in each line; any other file has one text per line.
    Without ``lang`` the language is detected.

    Raises:
        DataConfigError: the file is missing or not UTF-8, or a line is malformed; that error names the line.
    """
    try:
        for number, content in enumerate(read_lines(path), 1):
            line = content.decode()
            if line.strip():
                yield (
                    _line(line, f"{path}:{number}") if path.suffix == ".jsonl" else (detect(line), line.rstrip("\r\n"))
                )
    except OSError as error:
        raise DataConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataConfigError(f"{path}: not UTF-8: {error}") from error
    except UntrustedError as error:
        raise DataConfigError(f"{path}: {error}") from error


def _line(line: str, location: str) -> tuple[str, str]:
    try:
        value = parse_json(line)
    except UntrustedError as error:
        raise DataConfigError(f"{location}: {error}") from error
    match value:
        case {"text": str(text)}:
            try:
                check_unicode(text)
            except SampleError as error:
                raise DataConfigError(f"{location}: {error.reason}") from error
            language = value.get("lang")
            return language if isinstance(language, str) else detect(text), text
    raise DataConfigError(f'{location}: expected {{"text": "...", "lang": "..."}}, lang may be absent')
