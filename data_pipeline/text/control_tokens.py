"""Which tokens of a vocabulary steer a model and must never come out of a text.

A tokenizer matches its added tokens (``tokenizers``) and user-defined pieces (SentencePiece) in any text. Tokens that
are marked as special can be switched off there; others cannot, and published files leave many of a chat format's
tokens unmarked. A caption that says ``<|im_start|>`` would then open a turn. Not for: spelling them out
(``tokenizer``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from data_pipeline.errors import DataConfigError

_MARKUP = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")
_HTML = re.compile(
    r"</?(?:a|b|blockquote|br|caption|code|div|em|h[1-6]|hr|i|img|li|ol|p|pre|s|span|strong|sub|sup|table|tbody|td|tfoot"
    r"|th|thead|tr|u|ul)>"
)
"""Gemma's vocabulary has such tokens for the text of web pages."""
_USER_DEFINED = 4
_VARINT, _LENGTH_DELIMITED = 0, 2
_FIXED_BYTES = {1: 8, 5: 4}


def is_control(name: str) -> bool:
    """Whether a token that text can match looks like a mark of a format, and not like a word or a tag of HTML."""
    return _MARKUP.fullmatch(name) is not None and _HTML.fullmatch(name) is None


def control_tokens(matched: dict[int, str], text_tokens: Sequence[str], tokenizer: object) -> dict[int, str]:
    """The tokens to keep out of texts: id to name.

    Args:
        matched: Tokens that the tokenizer matches in texts, without those that are marked as special.
        text_tokens: Names that texts may give all the same; ``*`` stands for any letters.
        tokenizer: Its file, for messages.

    Raises:
        DataConfigError: one of ``text_tokens`` names none of them.
    """
    found = {token_id: name for token_id, name in matched.items() if is_control(name)}
    allowed: set[int] = set()
    for pattern in text_tokens:
        wanted = re.compile(re.escape(pattern).replace(r"\*", ".*"))
        named = {token_id for token_id, name in found.items() if wanted.fullmatch(name)}
        if not named:
            shown = ", ".join(list(found.values())[:8]) or "none"
            raise DataConfigError(
                f"text_tokens: {pattern!r} names no token that tokenizer {tokenizer} keeps out of texts; "
                f"those are: {shown}"
            )
        allowed |= named
    return {token_id: name for token_id, name in found.items() if token_id not in allowed}


def any_of(names: Collection[str]) -> re.Pattern[str] | None:
    """A pattern that finds any of the names in a text; None without names."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True)))) if names else None


def user_defined_pieces(model: bytes) -> dict[int, str]:
    """The pieces of a SentencePiece model that it matches in any text: id to name.

    Args:
        model: The file's bytes, which SentencePiece has loaded.

    Source: sentencepiece_model.proto: ``ModelProto.pieces`` is field 1, its ``piece`` 1 and ``type`` 3.
    """
    found: dict[int, str] = {}
    pieces = (value for number, value in _fields(model) if number == 1 and isinstance(value, bytes))
    for piece_id, piece in enumerate(pieces):
        fields = dict(_fields(piece))
        name = fields.get(1)
        if fields.get(3) == _USER_DEFINED and isinstance(name, bytes):
            found[piece_id] = name.decode(errors="replace")
    return found


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message; a damaged rest is left out."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if kind == _LENGTH_DELIMITED:
            size, at = _varint(message, at)
        elif kind in _FIXED_BYTES:
            size = _FIXED_BYTES[kind]
        else:
            return
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and the byte after it."""
    value = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            break
    return value, at
