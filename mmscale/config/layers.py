"""Merge the layers of a configuration: base files, the file, then the overrides of the command line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from mmscale.config.tree import BASE_KEY, ConfigNode, Origin, checked_text, display, parse, read_file
from mmscale.errors import ConfigError

Keys = tuple[str, ...]
RUN_CONFIG = "config.yaml"
"""File of a run folder that holds the run's configuration."""


def read_layers(path: Path) -> ConfigNode:
    """Read a file and merge it over its base files, recursively.

    The key ``base`` of the file, or of a block in it, names the base file, relative to the file itself. Mappings are
    merged key by key. Lists and scalars of a file replace those of its base. The ``base`` of a block replaces the
    ``base`` that the same block has in a base of the file, with all values from there.

    A base may also be a run folder, which means the same block of its ``config.yaml``, or the whole file except for
    ``run_dir``.

    Raises:
        ConfigError: a file is missing or invalid, the chain of base files is circular, or a run folder's configuration
            lacks the block.
    """
    return _read(path, (path,), 0, frozenset())[0]


def _read(path: Path, chain: tuple[Path, ...], layer: int, replaced: frozenset[Keys]) -> tuple[ConfigNode, int]:
    """Return the merged file, and the next layer number.

    Args:
        path: The file.
        chain: The files whose ``base`` led to this file, ending with this file.
        layer: Lowest layer number. Each base has a higher number than those that it is merged over.
        replaced: Blocks whose ``base`` a file above this one replaces.
    """
    lower, entry = {}, read_file(path, chain)
    bases = dict(_bases(entry, ()))
    for keys, base in bases.items():
        if keys in replaced:
            lower[keys] = ConfigNode({}, base.origin)
            continue
        file = _base_path(path, base)
        if any(_same(file, earlier) for earlier in chain):
            raise ConfigError(f"{chain[0]}: its chain of '{BASE_KEY}:' files leads back to {file}")
        above = frozenset(key[len(keys) :] for key in {*bases, *replaced} if key[: len(keys)] == keys) - {()}
        tree, layer = _read(file, (*chain, file), layer, above)
        lower[keys] = _block_of_run(tree, keys, base) if _is_run(path, base) else tree
    return _merge_bases(lower, entry.on_layer(layer), ()), layer + 1


def _bases(entry: ConfigNode, keys: Keys) -> Iterator[tuple[Keys, ConfigNode]]:
    """Yield each ``base`` of the file and its blocks. In a block, only a string is a base file."""
    base = entry.child(BASE_KEY)
    if base is not None and (not keys or isinstance(base.value, str)):
        yield keys, base
    for key, child in _children(entry):
        yield from _bases(child, (*keys, key))


def _merge_bases(lower: dict[Keys, ConfigNode], entry: ConfigNode, keys: Keys) -> ConfigNode:
    """Merge ``entry`` and each block in it over the base of that block. ``lower`` holds the bases by path."""
    merged = {key: _merge_bases(lower, child, (*keys, key)) for key, child in _children(entry)}
    if isinstance(entry.value, list):
        return replace(entry, value=list(merged.values()))
    if not isinstance(entry.value, dict):
        return entry
    if keys not in lower:
        return replace(entry, value=merged)
    del merged[BASE_KEY]
    return merge(lower[keys], replace(entry, value=merged))


def _children(entry: ConfigNode) -> Iterable[tuple[str, ConfigNode]]:
    if isinstance(entry.value, dict):
        return entry.value.items()
    return [(str(number), item) for number, item in enumerate(entry.value)] if isinstance(entry.value, list) else ()


def _same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def _is_run(file: Path, base: ConfigNode) -> bool:
    return (file.parent / str(base.value)).is_dir()


def _block_of_run(tree: ConfigNode, keys: Keys, base: ConfigNode) -> ConfigNode:
    """Return the block at ``keys`` of a run's configuration; without keys, all of it except ``run_dir``.

    A new run must name its own folder: it would otherwise write into that of its base.
    """
    if not keys:
        assert isinstance(tree.value, dict)
        return replace(tree, value={key: child for key, child in tree.value.items() if key != "run_dir"})
    block: ConfigNode | None = tree
    for key in keys:
        block = None if block is None else block.child(key)
    if block is None or not isinstance(block.value, dict):
        raise ConfigError(
            f"{base.origin} {BASE_KEY}={base.value}: the {RUN_CONFIG} of this run has no block '{'.'.join(keys)}'"
        )
    return block


def _base_path(file: Path, base: ConfigNode) -> Path:
    if not isinstance(base.value, str):
        raise ConfigError(f"{base.origin} {BASE_KEY}: must be the path of a YAML file or of a run folder")
    path = file.parent / base.value
    if path.is_dir():
        if not (path / RUN_CONFIG).is_file():
            raise ConfigError(
                f"{base.origin} {BASE_KEY}={base.value}: a folder without {RUN_CONFIG}, expected a YAML file or a run "
                f"folder ({path})"
            )
        return path / RUN_CONFIG
    if not path.is_file():
        raise ConfigError(f"{base.origin} {BASE_KEY}={base.value}: no such file ({path})")
    return path


def merge(lower: ConfigNode, upper: ConfigNode) -> ConfigNode:
    """Merge two trees. Mappings are merged key by key; otherwise ``upper`` replaces ``lower``."""
    if isinstance(lower.value, dict) and isinstance(upper.value, dict):
        value = dict(lower.value)
        for key, entry in upper.value.items():
            value[key] = merge(value[key], entry) if key in value else entry
        return ConfigNode(value, upper.origin)
    return _replace(lower, upper)


def _replace(old: ConfigNode, new: ConfigNode) -> ConfigNode:
    if isinstance(old.value, dict | list) or old.value == new.value:
        return new
    return replace(new, replaced=old.value)


def apply_overrides(root: ConfigNode, overrides: list[str]) -> ConfigNode:
    """Apply ``key=value`` words to the tree, in order.

    A key is a dotted path with list indices (``stages.0.steps``). A value is parsed as YAML and replaces the old one.
    Missing or null blocks on the path are created.

    Returns:
        The new tree; ``root`` is unchanged.

    Raises:
        ConfigError: a word has no ``=``, its key or value is invalid, or its path leads through a scalar, beyond the
            end of a list, or into a list that is missing or null.
    """
    first_layer = max((leaf.origin.layer for leaf in root.leaves()), default=0) + 1
    for number, word in enumerate(overrides, start=1):
        key, equals, text = word.partition("=")
        name = f"override {number} ({display(word)})"
        origin = Origin("override", name, first_layer + number)
        if not equals or not key or any(not part for part in key.split(".")):
            raise ConfigError(f"{name}: expected key=value, for example stages.0.steps=50")
        checked_text(key, origin)
        try:
            value = parse(text, partial(_constant, origin), name)
        except ConfigError as error:
            raise ConfigError(
                f"{error}; a shell splits words at blanks and removes quotes, so put the whole word in single quotes: "
                f"'{display(key)}=...'"
            ) from None
        root = _with_value(root, key.split("."), value, name)
    return root


def _constant(origin: Origin, _line: int) -> Origin:
    return origin


def _with_value(node: ConfigNode, path: list[str], value: ConfigNode, name: str) -> ConfigNode:
    if not path:
        return _replace(node, value)
    key, remaining = path[0], path[1:]
    if isinstance(node.value, list):
        items = list(node.value)
        if not key.isdigit() or int(key) >= len(items):
            raise ConfigError(
                f"{name}: '{display(key)}' is not an index of this list of {len(items)} items (numbered from 0)"
            )
        items[int(key)] = _with_value(items[int(key)], remaining, value, name)
        return replace(node, value=items)
    if node.value is not None and not isinstance(node.value, dict):
        raise ConfigError(
            f"{name}: '{display(key)}' is a key below {node.value!r:.80} ({node.origin}), which is not a block"
        )
    if key.isdigit() and node.value is None:
        raise ConfigError(f"{name}: the files have no list at this key; give the complete list, as [...]")
    entries = dict(node.value or {})
    child = entries.get(key, ConfigNode(None, value.origin))
    entries[key] = _with_value(child, remaining, value, name) if remaining or key in entries else value
    return replace(node, value=entries)
