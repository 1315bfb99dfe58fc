"""Validate a merged tree. Error messages name file, line, key and value."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from data_pipeline.errors import DataPipelineError
from data_pipeline.io.strict import reason_of
from mmscale.config.schema import TAG, model_at
from mmscale.config.tree import ConfigNode, display, plain
from mmscale.errors import ConfigError, MMScaleError

S = TypeVar("S", bound=BaseModel)
_Path = tuple[str, ...]
_HEAD = re.compile(r"(?P<key>[a-z_][a-z_0-9]*(?:\.[a-z_0-9]+)*)=(?P<value>[^:;, ]*): ")


def validate(root: ConfigNode, schema: type[S], name: str) -> tuple[S, list[str]]:
    """Return the validated value, and a sentence for each key that was dropped.

    A key is dropped if it belongs to the variant of a block whose ``kind`` a later layer has changed.

    Args:
        root: The merged tree, mutated: dropped keys are removed.
        schema: Class of the root.
        name: Name of the file in messages.

    Raises:
        ConfigError: lists all validation errors.
    """
    notes: list[str] = []
    while True:
        try:
            return schema.model_validate(plain(root)), notes
        except ValidationError as error:
            dropped = _drop_unused_keys(root, error)
            if dropped:
                notes += dropped
                continue
            raise ConfigError(_report(root, schema, error, name)) from None
        except (MMScaleError, DataPipelineError) as error:
            raise ConfigError(f"{name}: {error}") from None


def _drop_unused_keys(root: ConfigNode, error: ValidationError) -> list[str]:
    """Remove the keys of files that belong to a variant which a later layer replaced by another ``kind``."""
    notes = []
    for detail in error.errors(include_url=False, include_context=False):
        if detail["type"] != "extra_forbidden":
            continue
        path = _data_path(root, detail["loc"])
        block = _entry_at(root, path[:-1])
        tag, unused = block.child(TAG), block.child(path[-1])
        if tag is None or unused is None or tag.replaced is None:
            continue
        if all(leaf.origin.kind == "file" and leaf.origin.layer < tag.origin.layer for leaf in unused.leaves()):
            assert isinstance(block.value, dict)
            del block.value[path[-1]]
            notes.append(
                f"{unused.origin} {'.'.join(path)}: dropped, {TAG}={tag.value} ({tag.origin}) has no such key; "
                f"it belongs to {TAG}={tag.replaced}"
            )
    return notes


def _entry_at(root: ConfigNode, path: Iterable[str]) -> ConfigNode:
    entry = root
    for key in path:
        child = entry.child(key)
        if child is None:
            return entry
        entry = child
    return entry


def _data_path(root: ConfigNode, loc: tuple[int | str, ...]) -> _Path:
    """Return the path of an error in the tree: pydantic's location without the names of union members.

    A word names a union member if the block has ``kind: word``, or if the word is neither a key nor the last word.
    """
    path: list[str] = []
    entry: ConfigNode | None = root
    words = [str(word) for word in loc]
    for index, word in enumerate(words):
        tag = entry.child(TAG) if entry is not None else None
        if tag is not None and str(tag.value) == word and index > 0:
            continue
        child = entry.child(word) if entry is not None else None
        if child is not None:
            path.append(word)
            entry = child
        elif index + 1 == len(words) and entry is not None and isinstance(entry.value, dict):
            path.append(word)
    return tuple(path)


def _report(root: ConfigNode, schema: type[BaseModel], error: ValidationError, name: str) -> str:
    reasons: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False):
        if _is_secondary(root, detail):
            continue
        subject, reason = _describe_error(root, schema, detail, name)
        reasons.setdefault(subject, []).append(reason)  # A value that matches no union member has a reason for each.
    lines = [f"{subject}: {' or '.join(dict.fromkeys(several))}" for subject, several in reasons.items()]
    if len(lines) == 1:
        return lines[0]
    return f"{len(lines)} errors in the configuration:\n" + "\n".join(f"  {line}" for line in lines)


def _is_secondary(root: ConfigNode, detail: Any) -> bool:
    """Whether a "too short" error only repeats an item's error: pydantic counts only the valid items of a tuple."""
    if detail["type"] != "too_short":
        return False
    items = _entry_at(root, _data_path(root, detail["loc"])).value
    return isinstance(items, list) and len(items) != detail["ctx"]["actual_length"]


def _describe_error(root: ConfigNode, schema: type[BaseModel], detail: Any, name: str) -> tuple[str, str]:
    """Return the subject of an error of pydantic (location, key and value) and its reason."""
    path = _data_path(root, detail["loc"])
    kind = detail["type"]
    if kind == "value_error" and path and _child_at(root, path) is None:
        model = model_at(schema, plain(root), path[:-1])
        if model is None or path[-1] not in model.model_fields:
            path = path[:-1]  # The last word names a union member; the block omits its ``kind``.
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        path = (*path, TAG)
    reason = _reason(root, schema, path, detail)
    if kind == "value_error":
        block = _entry_at(root, path)
        path, reason = _named_key(root, path, reason)
        if _entry_at(root, path).origin.kind == "file":
            reason += _override_notes(block, reason)
    entry = _entry_at(root, path)
    location = name if entry is root else str(entry.origin)
    subject = ".".join(display(key) for key in path)
    if entry is not root and not isinstance(entry.value, dict | list) and kind != "missing":
        subject += f"={display(entry.value)}"
    return f"{location} {subject}".rstrip(), reason


def _named_key(root: ConfigNode, block: _Path, reason: str) -> tuple[_Path, str]:
    """Return the path of the key that an error message of a block names first, and the rest of the message.

    A validator of a block may check values several levels below it: ``attention.num_heads=3: must ...``. If the tree
    has that key at its path, or once below the block, the error is reported at the line of the key.
    """
    match = _HEAD.match(reason)
    if match is None:
        return block, reason
    named = tuple(match["key"].split("."))
    inside = _entry_at(root, block)
    found = [named] if _child_at(inside, named) else [path for path in _paths(inside) if path[-len(named) :] == named]
    if len(found) > 1:  # Several blocks have this key: choose by the value.
        found = [path for path in found if str(_entry_at(inside, path).value) == match["value"]]
    if len(found) != 1:
        return block, reason
    return (*block, *found[0]), reason[match.end() :]


def _child_at(entry: ConfigNode | None, path: _Path) -> ConfigNode | None:
    for key in path:
        entry = None if entry is None else entry.child(key)
    return entry


def _paths(entry: ConfigNode) -> Iterator[_Path]:
    """Yield the paths of all keys below an entry, without lists."""
    if isinstance(entry.value, dict):
        for key, child in entry.value.items():
            yield (key,)
            yield from ((key, *rest) for rest in _paths(child))


def _override_notes(block: ConfigNode, reason: str) -> str:
    """Name the values in ``reason`` that come from the command line, because one of them may be the actual mistake."""
    words = set(re.findall(r"[\w.+-]*\w", reason))
    quoted = [
        f"{display(leaf.value)} comes from {leaf.origin}"
        for leaf in block.leaves()
        if leaf.origin.kind == "override" and type(leaf.value) in (int, float, str) and display(leaf.value) in words
    ]
    return "".join(f"; {each}" for each in dict.fromkeys(quoted))


_RENAMED = {"ledger": "sample_log", "view_start": "crop_start", "view_end": "crop_end"}
"""Keys of earlier versions and their present names."""


def _reason(root: ConfigNode, schema: type[BaseModel], path: _Path, detail: Any) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        if path[-1] in _RENAMED:
            return f"renamed: write '{_RENAMED[path[-1]]}'"
        model = model_at(schema, plain(root), path[:-1])
        return f"unknown key{_nearest(path[-1], [] if model is None else list(model.model_fields))}"
    if kind == "union_tag_not_found":
        return "required, and missing: it selects the variant of this block"
    value = str(_entry_at(root, path).value)
    if kind == "union_tag_invalid":
        return f"unknown variant{_nearest(value, _quoted(context['expected_tags']))}"
    if kind in ("literal_error", "enum"):
        return f"not one of the choices{_nearest(value, _quoted(context['expected']))}"
    return reason_of(detail)


def _quoted(listing: str) -> list[str]:
    """Split the choices in a message of pydantic: ``'a', 'b' or 'c'``, ``0, 1 or 2``."""
    return re.findall(r"'([^']*)'", listing) or re.split(r", | or ", listing)


def _nearest(word: str, candidates: list[str]) -> str:
    near = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known here: {', '.join(candidates)}" if candidates else ""
