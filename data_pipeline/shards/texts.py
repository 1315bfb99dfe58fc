"""All text that shards hold, for training a tokenizer and for statistics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.open_shard import open_shard


def all_texts(fields: Any) -> list[str]:
    """Every text of a JSON member that a template may show: of pages, dialogues and annotations, caption and captions.

    Raises:
        SampleError: the JSON is no object, or a text is no string.
    """
    if not isinstance(fields, dict):
        raise SampleError(f"the JSON holds a {type(fields).__name__}, expected an object", kind=FaultKind.TEXT)
    found = [*_page_texts(fields), *_turn_texts(fields)]
    annotations = fields.get("annotations")
    for entry in annotations if isinstance(annotations, list) else ():
        found += [entry] if isinstance(entry, str) else _turn_texts(entry) or _values(entry)
    if not all(isinstance(text, str) for text in found):
        raise SampleError("a caption or a text part is no string", kind=FaultKind.TEXT)
    return found


def _page_texts(fields: dict[str, Any]) -> list[Any]:
    """Texts of a page, or else captions."""
    parts = fields.get("parts")
    if parts is not None:
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise SampleError("parts must be a list of objects", kind=FaultKind.TEXT)
        return [part["text"] for part in parts if "text" in part]
    for name, partner in (("texts", "images"), ("text_list", "image_info")):  # OBELICS, MMC4.
        if name in fields and partner in fields:
            if not isinstance(fields[name], list):
                raise SampleError(f"{name} must be a list", kind=FaultKind.TEXT)
            return [text for text in fields[name] if text is not None]
    captions = fields.get("captions", [])
    if not isinstance(captions, list):
        raise SampleError("captions must be a list", kind=FaultKind.TEXT)
    return [*captions, *([fields["caption"]] if fields.get("caption") is not None else [])]


def _turn_texts(fields: Any) -> list[Any]:
    """What is said in a dialogue."""
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


def parse_json(content: bytes) -> Any:
    """A JSON member.

    Raises:
        SampleError: it is no JSON.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"damaged JSON: {error}", kind=FaultKind.TEXT) from error


def iterate_texts(manifest: Manifest) -> Iterator[list[str]]:
    """The texts of each sample in order; reads the text members only.

    Raises:
        ManifestError: a shard is missing or stale.
        ShardError: a shard is shorter than its index says.
        StorageError: a remote one cannot be read.
        SampleError: a text is no UTF-8 or a JSON is damaged; names shard and key.
    """
    for number in range(manifest.num_shards):
        shard = open_shard(manifest, number)
        try:
            for i in range(len(shard.index)):
                texts: list[str] = []
                for member in shard.index.members(i):
                    if member.ext in ("txt", "json"):
                        content = shard.read(member.offset, member.offset + member.size)
                        texts += _decoded(member.ext, content, str(shard.index.tar_path), shard.index.key(i))
                yield texts
        finally:
            shard.close()


def _decoded(ext: str, content: bytes, shard: str, key: str) -> list[str]:
    try:
        if ext == "json":
            return all_texts(parse_json(content))
        return [content.decode()]
    except UnicodeDecodeError as error:
        raise SampleError(f"the text is no UTF-8: {error}", shard=shard, key=key, kind=FaultKind.TEXT) from error
    except SampleError as error:
        raise error.located(shard, key) from error
