"""From the tree to a validated value; every complaint names file, line, key and value."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from data_pipeline.errors import DataPipelineError
from data_pipeline.io.strict import reason_of
from mmscale.config.schema import TAG, model_at
from mmscale.config.tree import Entry, plain, shown
from mmscale.errors import ConfigError, MMScaleError

S = TypeVar("S", bound=BaseModel)
_Path = tuple[str, ...]
_HEAD = re.compile(r"(?P<key>[a-z_][a-z_0-9]*(?:\.[a-z_0-9]+)*)=(?P<value>[^:;, ]*): ")


def validate(root: Entry, schema: type[S], name: str) -> tuple[S, list[str]]:
    """The value, and a note for each key that a switched ``kind`` left without a meaning.

    Args:
        root: The merged tree; keys that are dropped are removed from it.
        schema: Class of the root.
        name: How the file is called in messages.

    Raises:
        ConfigError: lists every error, not the first alone.
    """
    notes: list[str] = []
    while True:
        try:
            return schema.model_validate(plain(root)), notes
        except ValidationError as error:
            dropped = _drop_orphans(root, error)
            if dropped:
                notes += dropped
                continue
            raise ConfigError(_report(root, schema, error, name)) from None
        except (MMScaleError, DataPipelineError) as error:
            raise ConfigError(f"{name}: {error}") from None


def _drop_orphans(root: Entry, error: ValidationError) -> list[str]:
    """Removes keys from a file that belonged to the union member which a later layer switched away from."""
    notes = []
    for detail in error.errors(include_url=False, include_context=False):
        if detail["type"] != "extra_forbidden":
            continue
        path = _data_path(root, detail["loc"])
        block = _entry_at(root, path[:-1])
        tag, orphan = block.child(TAG), block.child(path[-1])
        if tag is None or orphan is None or tag.replaced is None:
            continue
        if all(leaf.origin.kind == "file" and leaf.origin.layer < tag.origin.layer for leaf in orphan.leaves()):
            assert isinstance(block.value, dict)
            del block.value[path[-1]]
            notes.append(
                f"{orphan.origin} {'.'.join(path)}: dropped, {TAG}={tag.value} ({tag.origin}) has no such key, "
                f"{TAG}={tag.replaced} had"
            )
    return notes


def _entry_at(root: Entry, path: Iterable[str]) -> Entry:
    entry = root
    for key in path:
        child = entry.child(key)
        if child is None:
            return entry
        entry = child
    return entry


def _data_path(root: Entry, loc: tuple[int | str, ...]) -> _Path:
    """pydantic's location without the names of union members that it weaves in.

    A word is such a name if the block says ``kind: word``, or if it is no key here and something follows it.
    """
    path: list[str] = []
    entry: Entry | None = root
    words = [str(word) for word in loc]
    for index, word in enumerate(words):
        tag = entry.child(TAG) if entry is not None else None
        if tag is not None and str(tag.value) == word and index + 1 <= len(words) and index > 0:
            continue
        child = entry.child(word) if entry is not None else None
        if child is not None:
            path.append(word)
            entry = child
        elif index + 1 == len(words) and entry is not None and isinstance(entry.value, dict):
            path.append(word)
    return tuple(path)


def _report(root: Entry, schema: type[BaseModel], error: ValidationError, name: str) -> str:
    reasons: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False):
        if _is_echo(root, detail):
            continue
        what, reason = _complaint(root, schema, detail, name)
        reasons.setdefault(what, []).append(reason)  # A value that fits no member of a union has a reason for each.
    lines = [f"{what}: {' or '.join(dict.fromkeys(several))}" for what, several in reasons.items()]
    if len(lines) == 1:
        return lines[0]
    return f"{len(lines)} errors in the configuration:\n" + "\n".join(f"  {line}" for line in lines)


def _is_echo(root: Entry, detail: Any) -> bool:
    """pydantic counts only the good items of a tuple: one wrong item also makes the tuple "too short"."""
    if detail["type"] != "too_short":
        return False
    items = _entry_at(root, _data_path(root, detail["loc"])).value
    return isinstance(items, list) and len(items) != detail["ctx"]["actual_length"]


def _complaint(root: Entry, schema: type[BaseModel], detail: Any, name: str) -> tuple[str, str]:
    path = _data_path(root, detail["loc"])
    kind = detail["type"]
    if kind == "value_error" and path and _child_at(root, path) is None:
        model = model_at(schema, plain(root), path[:-1])
        if model is None or path[-1] not in model.model_fields:
            path = path[:-1]  # The name of a union member, of a block that leaves its kind out.
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        path = (*path, TAG)
    reason = _reason(root, schema, path, detail)
    if kind == "value_error":
        block = _entry_at(root, path)
        path, reason = _blamed(root, path, reason)
        if _entry_at(root, path).origin.kind == "file":
            reason += _overrides_in(block, reason)
    entry = _entry_at(root, path)
    place = name if entry is root else str(entry.origin)
    what = ".".join(shown(key) for key in path)
    if entry is not root and not isinstance(entry.value, dict | list) and kind != "missing":
        what += f"={shown(entry.value)}"
    return f"{place} {what}".rstrip(), reason


def _blamed(root: Entry, block: _Path, reason: str) -> tuple[_Path, str]:
    """The key that a rule of a block names at the head of its sentence (``attention.num_heads=3: must ...``).

    A rule may see values several blocks down, such as the heads of an attention in a decoder. Where the key is in the
    file, at its path or at one place only below the block, the complaint names that line instead of the block's.
    """
    match = _HEAD.match(reason)
    if match is None:
        return block, reason
    named = tuple(match["key"].split("."))
    inside = _entry_at(root, block)
    below = [named] if _child_at(inside, named) else [path for path in _paths(inside) if path[-len(named) :] == named]
    if len(below) > 1:  # The same key in several blocks: the value tells which.
        below = [path for path in below if str(_entry_at(inside, path).value) == match["value"]]
    if len(below) != 1:
        return block, reason
    return (*block, *below[0]), reason[match.end() :]


def _child_at(entry: Entry | None, path: _Path) -> Entry | None:
    for key in path:
        entry = None if entry is None else entry.child(key)
    return entry


def _paths(entry: Entry) -> Iterator[_Path]:
    """Paths of all keys below an entry."""
    if isinstance(entry.value, dict):
        for key, child in entry.value.items():
            yield (key,)
            yield from ((key, *rest) for rest in _paths(child))


def _overrides_in(block: Entry, reason: str) -> str:
    """Which values that the reason quotes come from the command line: the blamed key may be right without them."""
    words = set(re.findall(r"[\w.+-]*\w", reason))
    quoted = [
        f"{shown(leaf.value)} comes from {leaf.origin}"
        for leaf in block.leaves()
        if leaf.origin.kind == "override" and type(leaf.value) in (int, float, str) and shown(leaf.value) in words
    ]
    return "".join(f"; {each}" for each in dict.fromkeys(quoted))


def _reason(root: Entry, schema: type[BaseModel], path: _Path, detail: Any) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        model = model_at(schema, plain(root), path[:-1])
        return f"unknown key{_nearest(path[-1], [] if model is None else list(model.model_fields))}"
    if kind == "union_tag_not_found":
        return "required, and missing: it says which variant this block is"
    value = str(_entry_at(root, path).value)
    if kind == "union_tag_invalid":
        return f"unknown variant{_nearest(value, _quoted(context['expected_tags']))}"
    if kind in ("literal_error", "enum"):
        return f"not one of the choices{_nearest(value, _quoted(context['expected']))}"
    return reason_of(detail)


def _quoted(listing: str) -> list[str]:
    """Members of pydantic's enumerations: ``'a', 'b' or 'c'``, ``0, 1 or 2``."""
    return re.findall(r"'([^']*)'", listing) or re.split(r", | or ", listing)


def _nearest(word: str, candidates: list[str]) -> str:
    near = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known here: {', '.join(candidates)}" if candidates else ""
