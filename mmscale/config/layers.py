"""Stacks the layers of a configuration: base files, the file, then the overrides of the command line."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from mmscale.config.tree import BASE_KEY, Entry, Origin, parse, read_file
from mmscale.errors import ConfigError


def read_layers(path: Path) -> Entry:
    """A file merged over the file that its ``base:`` key names (relative to the file itself), and so on down.

    Mappings are merged key by key; lists and scalars of the upper file replace those of the lower one.

    Raises:
        ConfigError: a file is missing or broken, or the chain of bases is a circle.
    """
    chain: list[tuple[Path, Entry | None]] = []
    current: Path | None = path
    while current is not None:
        if any(_same(current, earlier) for earlier, _ in chain):
            raise ConfigError(f"{path}: its chain of '{BASE_KEY}:' files leads back to {current}")
        base = read_file(current, 0).child(BASE_KEY)
        chain.append((current, base))
        current = None if base is None else _base_path(current, base)
    merged: Entry | None = None
    for layer, (file, _) in enumerate(reversed(chain)):
        entry = read_file(file, layer)
        assert isinstance(entry.value, dict)
        entry.value.pop(BASE_KEY, None)
        merged = entry if merged is None else merge(merged, entry)
    assert merged is not None
    return merged


def _same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def _base_path(file: Path, base: Entry) -> Path:
    if not isinstance(base.value, str):
        raise ConfigError(f"{base.origin} {BASE_KEY}: must be the path of a YAML file")
    path = file.parent / base.value
    if not path.is_file():
        raise ConfigError(f"{base.origin} {BASE_KEY}={base.value}: no such file ({path})")
    return path


def merge(lower: Entry, upper: Entry) -> Entry:
    """``upper`` wins; mappings are merged key by key."""
    if isinstance(lower.value, dict) and isinstance(upper.value, dict):
        value = dict(lower.value)
        for key, entry in upper.value.items():
            value[key] = merge(value[key], entry) if key in value else entry
        return Entry(value, upper.origin)
    return _replacing(lower, upper)


def _replacing(old: Entry, new: Entry) -> Entry:
    if isinstance(old.value, dict | list) or old.value == new.value:
        return new
    return replace(new, replaced=old.value)


def apply_overrides(root: Entry, overrides: list[str]) -> Entry:
    """Writes ``key=value`` words into the tree, in order.

    A key is a dotted path with list indices (``stages.0.steps``). A value is read as YAML and replaces what stood
    there; blocks on the way that are missing or null are created.

    Raises:
        ConfigError: no ``=``, an unreadable value, or a path through a scalar or past a list's end.
    """
    first_layer = max((leaf.origin.layer for leaf in root.leaves()), default=0) + 1
    for number, word in enumerate(overrides, start=1):
        key, equals, text = word.partition("=")
        origin = Origin("override", f"override {number} ({word})", first_layer + number)
        if not equals or not key or any(not part for part in key.split(".")):
            raise ConfigError(f"override {number} ({word}): expected key=value, for example stages.0.steps=50")
        value = parse(text, partial(_constant, origin), f"override {number} ({word})")
        root = _written(root, key.split("."), value, word, number)
    return root


def _constant(origin: Origin, _line: int) -> Origin:
    return origin


def _written(node: Entry, path: list[str], value: Entry, word: str, number: int) -> Entry:
    if not path:
        return _replacing(node, value)
    key, rest = path[0], path[1:]
    if isinstance(node.value, list):
        items = list(node.value)
        if not key.isdigit() or int(key) >= len(items):
            raise ConfigError(
                f"override {number} ({word}): '{key}' is no item of a list of {len(items)} (numbered from 0)"
            )
        items[int(key)] = _written(items[int(key)], rest, value, word, number)
        return replace(node, value=items)
    if node.value is not None and not isinstance(node.value, dict):
        raise ConfigError(f"override {number} ({word}): '{key}' lies below {node.value!r} ({node.origin}), not a block")
    if key.isdigit() and node.value is None:
        raise ConfigError(f"override {number} ({word}): no list is written here; give the list whole, as [...]")
    entries = dict(node.value or {})
    below = entries.get(key, Entry(None, value.origin))
    entries[key] = _written(below, rest, value, word, number) if rest or key in entries else value
    return replace(node, value=entries)
