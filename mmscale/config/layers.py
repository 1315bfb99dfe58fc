"""Stacks the layers of a configuration: base files, the file, then the overrides of the command line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from mmscale.config.tree import BASE_KEY, Entry, Origin, checked_text, parse, read_file, shown
from mmscale.errors import ConfigError

Keys = tuple[str, ...]


def read_layers(path: Path) -> Entry:
    """A file merged over the file that its ``base:`` key names (relative to the file itself), and so on down.

    A block may have a base of its own, whose content it then begins with. Mappings are merged key by key; lists and
    scalars of the upper file replace those of the lower one.

    Raises:
        ConfigError: a file is missing or broken, or the chain of bases is a circle.
    """
    return _read(path, (path,))[0]


def _read(path: Path, chain: tuple[Path, ...]) -> tuple[Entry, int]:
    """The merged file, and its layer: above those of all its bases."""
    lower = {}
    layer = 0
    for keys, base in _bases(read_file(path, 0, chain), ()):
        file = _base_path(path, base)
        if any(_same(file, earlier) for earlier in chain):
            raise ConfigError(f"{chain[0]}: its chain of '{BASE_KEY}:' files leads back to {file}")
        lower[keys], below = _read(file, (*chain, file))
        layer = max(layer, below + 1)
    return _over(lower, read_file(path, layer, chain), ()), layer


def _bases(entry: Entry, keys: Keys) -> Iterator[tuple[Keys, Entry]]:
    """The ``base`` of the file and of the blocks in it; deeper down a key of this name may be the block's own."""
    base = entry.child(BASE_KEY)
    if base is not None and (not keys or isinstance(base.value, str)):
        yield keys, base
    for key, child in _children(entry):
        yield from _bases(child, (*keys, key))


def _over(lower: dict[Keys, Entry], entry: Entry, keys: Keys) -> Entry:
    """``entry`` with each of its blocks merged over the base of that block."""
    below = {key: _over(lower, child, (*keys, key)) for key, child in _children(entry)}
    if isinstance(entry.value, list):
        return replace(entry, value=list(below.values()))
    if not isinstance(entry.value, dict):
        return entry
    if keys not in lower:
        return replace(entry, value=below)
    del below[BASE_KEY]
    return merge(lower[keys], replace(entry, value=below))


def _children(entry: Entry) -> Iterable[tuple[str, Entry]]:
    if isinstance(entry.value, dict):
        return entry.value.items()
    return [(str(number), item) for number, item in enumerate(entry.value)] if isinstance(entry.value, list) else ()


def _same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def _base_path(file: Path, base: Entry) -> Path:
    if not isinstance(base.value, str):
        raise ConfigError(f"{base.origin} {BASE_KEY}: must be the path of a YAML file")
    path = file.parent / base.value
    if path.is_dir():
        raise ConfigError(f"{base.origin} {BASE_KEY}={base.value}: a folder, expected a YAML file ({path})")
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
        ConfigError: no ``=``, an unreadable key or value, or a path through a scalar or past a list's end.
    """
    first_layer = max((leaf.origin.layer for leaf in root.leaves()), default=0) + 1
    for number, word in enumerate(overrides, start=1):
        key, equals, text = word.partition("=")
        name = f"override {number} ({shown(word)})"
        origin = Origin("override", name, first_layer + number)
        if not equals or not key or any(not part for part in key.split(".")):
            raise ConfigError(f"{name}: expected key=value, for example stages.0.steps=50")
        checked_text(key, origin)
        value = parse(text, partial(_constant, origin), name)
        root = _written(root, key.split("."), value, name)
    return root


def _constant(origin: Origin, _line: int) -> Origin:
    return origin


def _written(node: Entry, path: list[str], value: Entry, name: str) -> Entry:
    if not path:
        return _replacing(node, value)
    key, rest = path[0], path[1:]
    if isinstance(node.value, list):
        items = list(node.value)
        if not key.isdigit() or int(key) >= len(items):
            raise ConfigError(f"{name}: '{shown(key)}' is no item of a list of {len(items)} (numbered from 0)")
        items[int(key)] = _written(items[int(key)], rest, value, name)
        return replace(node, value=items)
    if node.value is not None and not isinstance(node.value, dict):
        raise ConfigError(f"{name}: '{shown(key)}' lies below {node.value!r:.80} ({node.origin}), not a block")
    if key.isdigit() and node.value is None:
        raise ConfigError(f"{name}: no list is written here; give the list whole, as [...]")
    entries = dict(node.value or {})
    below = entries.get(key, Entry(None, value.origin))
    entries[key] = _written(below, rest, value, name) if rest or key in entries else value
    return replace(node, value=entries)
