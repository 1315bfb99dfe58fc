"""Find the control tokens of a vocabulary, which user text must not produce.

A tokenizer matches its added tokens (``tokenizers``) and user-defined pieces (SentencePiece) in any text. This matching
can be disabled only for tokens that are marked as special, and published files leave many tokens of a chat format
unmarked. A caption that contains ``<|im_start|>`` would then open a turn. ``tokenizer`` spells out control tokens.
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
"""HTML tags. Gemma's vocabulary has tokens for them, which occur in the text of web pages."""
_USER_DEFINED = 4
_VARINT, _LENGTH_DELIMITED = 0, 2
_FIXED_BYTES = {1: 8, 5: 4}


def is_control(name: str) -> bool:
    """Return whether a token name looks like a format marker (``<...>`` or ``[...]``), and not like an HTML tag."""
    return _MARKUP.fullmatch(name) is not None and _HTML.fullmatch(name) is None


def control_tokens(matched: dict[int, str], text_tokens: Sequence[str], tokenizer: object) -> dict[int, str]:
    """Return the tokens that user text must not produce: name by id.

    Args:
        matched: Tokens that the tokenizer matches in text, without those that are marked as special.
        text_tokens: Names that user text may produce; ``*`` matches any characters.
        tokenizer: Path of the tokenizer, for messages.

    Raises:
        DataConfigError: one of ``text_tokens`` matches no control token.
    """
    found = {token_id: name for token_id, name in matched.items() if is_control(name)}
    allowed: set[int] = set()
    for pattern in text_tokens:
        wanted = re.compile(re.escape(pattern).replace(r"\*", ".*"))
        named = {token_id for token_id, name in found.items() if wanted.fullmatch(name)}
        if not named:
            names = ", ".join(list(found.values())[:8]) or "none"
            raise DataConfigError(
                f"text_tokens: {pattern!r} matches no control token of tokenizer {tokenizer}; "
                f"its control tokens are: {names}"
            )
        allowed |= named
    return {token_id: name for token_id, name in found.items() if token_id not in allowed}


def any_of(names: Collection[str]) -> re.Pattern[str] | None:
    """Return a pattern that matches any of the names, the longest first; None without names."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True)))) if names else None


def user_defined_pieces(model: bytes) -> dict[int, str]:
    """Return the user-defined pieces of a SentencePiece model, which it matches in any text: name by id.

    Args:
        model: Content of the model file. SentencePiece must have loaded it without an error.

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
    """Yield (field number, value) of a protobuf message; stop at damaged data."""
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
    """Decode a varint (7 bits per byte, lowest first); return it and the offset after it."""
    value = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            break
    return value, at
