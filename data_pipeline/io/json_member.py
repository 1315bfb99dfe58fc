"""Parse the JSON member of a sample, and find the texts in it.

``shards.pages`` parses the parts of a page with their images, and ``text.templates`` turns samples into documents.
"""

from __future__ import annotations

from typing import Any

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.io.untrusted import UntrustedError, parse_json


def parse_member(content: bytes) -> Any:
    """Parse the JSON member of a sample with ``untrusted.parse_json``.

    Raises:
        SampleError: it is not valid UTF-8 or JSON, or exceeds the bounds of ``parse_json``.
    """
    try:
        return parse_json(content)
    except UntrustedError as error:
        raise SampleError(f"damaged JSON: {error}", kind=FaultKind.TEXT) from error


def all_texts(fields: Any) -> list[str]:
    """Return the texts of a page, or else ``captions`` and ``caption``; then those of dialogues and annotations.

    Texts in other fields, which ``template.field`` or ``template.answers`` may name, are not included.

    Raises:
        SampleError: the JSON is not an object, or a list or text in it has the wrong type.
    """
    if not isinstance(fields, dict):
        raise SampleError(f"the JSON holds a {type(fields).__name__}, expected an object", kind=FaultKind.TEXT)
    parts = fields.get("parts")
    if parts is not None and (not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts)):
        raise SampleError("parts must be a list of objects", kind=FaultKind.TEXT)
    for name, partner in _PAGES:
        if name in fields and partner in fields and not isinstance(fields[name], list):
            raise SampleError(f"{name} must be a list", kind=FaultKind.TEXT)
    captions = [] if fields.get("captions") is None else fields["captions"]
    if not isinstance(captions, list):
        raise SampleError("captions must be a list", kind=FaultKind.TEXT)
    found = page_texts(fields)
    if found is None:
        found = [*captions, *([fields["caption"]] if fields.get("caption") is not None else [])]
    found = [*found, *spoken_texts(fields)]
    if not all(isinstance(text, str) for text in found):
        raise SampleError("a caption or a text part is not a string", kind=FaultKind.TEXT)
    return found


_PAGES = (("texts", "images"), ("text_list", "image_info"))
"""(texts, images) fields of a page in the OBELICS and MMC4 formats."""


def page_texts(fields: dict[str, Any]) -> list[Any] | None:
    """Return the texts of a page without checking their types; None if the sample is not a page."""
    parts = fields.get("parts")
    if isinstance(parts, list):
        return [part["text"] for part in parts if isinstance(part, dict) and "text" in part]
    for name, partner in _PAGES:
        if partner in fields and isinstance(fields.get(name), list):
            return [text for text in fields[name] if text is not None]
    return None


PAIR = ("chosen", "rejected")
"""Fields of the answers of a preference pair."""


def check_pair(fields: dict[str, Any], chosen: str, rejected: str) -> None:
    """Check the answers of a preference pair.

    Args:
        fields: Fields of the sample.
        chosen: Field of the preferred answer.
        rejected: Field of the other answer.

    Raises:
        SampleError: an answer is missing or has no text, or both are equal.
    """
    for name in (chosen, rejected):
        texts = answer_texts(fields.get(name))
        if not texts or not isinstance(texts[-1], str) or not texts[-1].strip():
            raise SampleError(
                f"field {name!r} is {fields.get(name)!r:.80}, expected an answer: a text, or turns that end with it",
                kind=FaultKind.TEXT,
            )
    if answer_texts(fields[chosen]) == answer_texts(fields[rejected]):
        raise SampleError(f"{chosen} and {rejected} are equal, so the pair prefers nothing", kind=FaultKind.TEXT)


def answer_texts(answer: Any) -> list[Any]:
    """Return the texts of an answer, which is a text or a list of turns, without checking their types."""
    return _turns({"messages": answer}) if isinstance(answer, list) else [answer]


def _pair_texts(fields: dict[str, Any]) -> list[Any]:
    """Return the texts of prompt and answers of a preference pair; none for any other sample."""
    if not all(name in fields for name in PAIR):
        return []
    found = [text for name in ("prompt", *PAIR) for text in answer_texts(fields.get(name))]
    return [text for text in found if text is not None]


def spoken_texts(fields: dict[str, Any]) -> list[Any]:
    """Return the texts of a dialogue, of annotations and of a preference pair, without checking their types."""
    found = [*_turns(fields), *_pair_texts(fields)]
    annotations = fields.get("annotations")
    for entry in annotations if isinstance(annotations, list) else ():
        found += [entry] if isinstance(entry, str) else _turns(entry) or _values(entry)
    return found


def _turns(fields: Any) -> list[Any]:
    if not isinstance(fields, dict):
        return []
    lists = [fields.get(name) for name in ("messages", "conversations")]
    turns = [turn for turns in lists if isinstance(turns, list) for turn in turns if isinstance(turn, dict)]
    found: list[Any] = []
    for turn in turns:
        content = turn.get("content", turn.get("value"))
        items = content if isinstance(content, list) else [content]
        found += [item.get("text") if isinstance(item, dict) else item for item in items]
    return [text for text in found if text is not None]


def _values(entry: Any) -> list[str]:
    return [value for value in entry.values() if isinstance(value, str)] if isinstance(entry, dict) else []


def text_bytes_of(texts: dict[str, bytes]) -> int:
    """Count the UTF-8 bytes of a sample's text, in its ``txt`` and ``json`` members; damaged JSON counts as empty.

    A page counts its texts only. Other samples count ``txt``, dialogues, annotations, and the longest of ``captions``,
    else ``caption``.
    """
    total = len(texts.get("txt", b""))
    if "json" not in texts:
        return total
    try:
        fields = parse_member(texts["json"])
    except SampleError:
        return total
    if not isinstance(fields, dict):
        return total
    page, captions = page_texts(fields), fields.get("captions")
    if page is not None:
        return sum(map(_num_bytes, page))
    total += sum(map(_num_bytes, spoken_texts(fields)))
    if isinstance(captions, list):
        return total + max((_num_bytes(caption) for caption in captions), default=0)
    return total + _num_bytes(fields.get("caption"))


def _num_bytes(text: object) -> int:
    return len(text.encode(errors="replace")) if isinstance(text, str) else 0
