"""Explain single keys of a configuration, and find keys by name, in the JSON schema of its class."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmscale.config.json_schema import BLOCK, Schema
from mmscale.config.schema import TAG
from mmscale.config.tree import BASE_KEY, display
from mmscale.errors import ConfigError

ITEM = "*"
"""Path component for any item of a list, or any key of a free mapping."""

_MISSING = object()


@dataclass(frozen=True)
class Explanation:
    """One key. A key that several variants of a block share with one meaning has one explanation.

    Attributes:
        key: Dotted path, with ``*`` for list items whose number was left out.
        kinds: The variants of the enclosing block that have this key; empty if the block has no variants.
        description: The string under the field.
        type: The type and the range in words.
        choices: Each legal value with its description, which may be empty.
        is_required: Whether the key has no default.
        default: The default; None if required.
        keys: The keys of a block with the first sentence of their descriptions, after the kinds that have the key if
            not all have it.
        variants: The kinds of a block, if it is a union.
    """

    key: str
    kinds: tuple[str, ...]
    description: str
    type: str
    choices: dict[str, str]
    is_required: bool
    default: Any
    keys: dict[str, str]
    variants: tuple[str, ...]


def explain(root: Schema, key: str) -> list[Explanation]:
    """Return the meanings of a key: one, or one for each group of variants that define the key differently.

    Args:
        root: The result of ``json_schema``.
        key: Dotted path. Items of lists are numbers or ``*``, and may be left out: ``stages.learning_rate``.

    Raises:
        ConfigError: there is no such key; names the nearest ones.
    """
    found: dict[tuple[Any, ...], Explanation] = {}
    for path, kind, node in _find(root, {"allOf": [root]}, key.split("."), (), ""):
        one = _explanation(root, path, kind, node)
        identity = (one.key, one.description, one.type, str(one.default))
        kinds = (*found[identity].kinds, *one.kinds) if identity in found else one.kinds
        found[identity] = Explanation(**{**vars(one), "kinds": tuple(dict.fromkeys(kinds))})
    if not found:
        raise ConfigError(f"{display(key)}: no such key{_hint(root, key)}")
    return list(found.values())


def keys_named(root: Schema, name: str) -> list[str]:
    """Return the paths of all keys whose path is ``name`` or ends with ``.name``; items of lists are ``*``."""
    wanted = tuple(ITEM if word.isdigit() else word for word in name.split("."))
    return [".".join(path) for path in all_keys(root) if path[-len(wanted) :] == wanted]


def all_keys(root: Schema) -> list[tuple[str, ...]]:
    """Return the paths of all keys, without those inside the overrides of stages, which repeat other blocks."""
    return list(dict.fromkeys(_paths(root, {"allOf": [root]}, ())))


def _paths(root: Schema, node: Schema, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for block in _alternatives(root, node):
        for name, child in block.get("properties", {}).items():
            if name != BASE_KEY:
                yield (*path, name)
                if BLOCK not in child:
                    yield from _paths(root, child, (*path, name))
        for inner in _items(block):
            yield from _paths(root, inner, (*path, ITEM))


def _alternatives(root: Schema, node: Schema) -> Iterator[Schema]:
    """Yield the schemas that a value may follow: references resolved, unions flattened."""
    if "$ref" in node:
        yield from _alternatives(root, root["$defs"][node["$ref"].rpartition("/")[2]])
    elif "allOf" in node:
        yield from _alternatives(root, node["allOf"][0])
    elif "anyOf" in node and "properties" not in node:
        for each in node["anyOf"]:
            yield from _alternatives(root, each)
    else:
        yield node


def _items(node: Schema) -> Iterator[Schema]:
    """Yield the schemas of the items of a list or of the values of a free mapping."""
    for name in ("items", "additionalProperties"):
        if isinstance(node.get(name), dict):
            yield node[name]
    yield from {str(item): item for item in node.get("prefixItems", ())}.values()


def _find(
    root: Schema, node: Schema, words: list[str], path: tuple[str, ...], kind: str
) -> Iterator[tuple[tuple[str, ...], str, Schema]]:
    """Yield the resolved path, the kind of the enclosing block, and the schema of every key that ``words`` name."""
    if not words:
        yield path, kind, node
        return
    for block in _alternatives(root, node):
        child = block.get("properties", {}).get(words[0])
        if child is not None:
            yield from _find(root, child, words[1:], (*path, words[0]), _kind_of(block))
            continue
        for inner in _items(block):
            is_item = words[0] == ITEM or words[0].isdigit() or block.get("type") == "object"
            rest, name = (words[1:], words[0]) if is_item else (words, ITEM)
            yield from _find(root, inner, rest, (*path, name), "")


def _kind_of(block: Schema) -> str:
    tag = block.get("properties", {}).get(TAG, {})
    return str(tag.get("const", tag.get("default", "")))


def _explanation(root: Schema, path: tuple[str, ...], kind: str, node: Schema) -> Explanation:
    options = list(_alternatives(root, node))
    blocks = [option for option in options if "properties" in option]
    choices: dict[str, str] = {}
    for option in options:
        texts = option.get("markdownEnumDescriptions") or [""] * len(option.get("enum", ()))
        choices |= dict(zip(map(display, option.get("enum", ())), texts, strict=True))
    default = node.get("default", _MISSING)
    return Explanation(
        key=".".join(path),
        kinds=(kind,) if kind else (),
        description=node.get("description") or options[0].get("description", ""),
        type=_type(root, node),
        choices=choices,
        is_required=default is _MISSING,
        default=None if default is _MISSING else default,
        keys=_keys(blocks),
        variants=tuple(filter(None, map(_kind_of, blocks))) if len(blocks) > 1 else (),
    )


def _keys(blocks: list[Schema]) -> dict[str, str]:
    texts: dict[str, str] = {}
    kinds: dict[str, list[str]] = {}
    for block in blocks:
        for name, child in block["properties"].items():
            if name != BASE_KEY:
                text = child.get("description", "selects the variant" if name == TAG else "")
                texts.setdefault(name, _first_sentence(text))
                kinds.setdefault(name, []).append(_kind_of(block))
    return {
        name: text if len(kinds[name]) == len(blocks) else f"({', '.join(kinds[name])}) {text}"
        for name, text in texts.items()
    }


def _first_sentence(text: str) -> str:
    return text.partition(". ")[0].rstrip(".")


_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
_FORMATS = {"path": "path", "path-or-url": "path or URL"}
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "greater than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
    "pattern": "matching {}",
}


def _type(root: Schema, node: Schema) -> str:
    return " or ".join(dict.fromkeys(_type_of(root, option) for option in _alternatives(root, node)))


def _type_of(root: Schema, node: Schema) -> str:
    if "enum" in node:
        return " | ".join(map(display, node["enum"]))
    if "const" in node:
        return display(node["const"])
    if "properties" in node:
        return "block"
    if node.get("type") == "array":
        inner = " or ".join(dict.fromkeys(_type(root, item) for item in _items(node))) or "anything"
        length = node.get("minItems")
        return f"list of {inner}" + (f" (at least {length})" if length and "prefixItems" not in node else "")
    if node.get("type") == "object":
        inner = " or ".join(_type(root, item) for item in _items(node)) or "anything"
        return f"mapping of names to {inner}"
    name = _FORMATS.get(node.get("format", ""), _TYPES.get(str(node.get("type")), "anything"))
    bounds = [text.format(node[bound]) for bound, text in _BOUNDS.items() if bound in node]
    return f"{name} ({', '.join(bounds)})" if bounds else name


def _hint(root: Schema, key: str) -> str:
    """Return the end of a message: keys with this name elsewhere, the nearest name, or the keys of the block."""
    words = key.split(".")
    paths = [".".join(path) for path in all_keys(root)]
    if elsewhere := [path for path in paths if path.rpartition(".")[2] == words[-1]]:
        return f"; keys of this name: {', '.join(elsewhere[:8])}"
    for number in range(len(words)):
        here = list(_find(root, {"allOf": [root]}, words[: number + 1], (), ""))
        if here:
            continue
        above = ".".join(words[:number])
        block = explain(root, above)[0].keys if above else _explanation(root, (), "", {"allOf": [root]}).keys
        near = difflib.get_close_matches(words[number], block, n=1, cutoff=0.6)
        if near:
            return f"; did you mean '{'.'.join([*words[:number], near[0]])}'?"
        near = difflib.get_close_matches(words[-1], {path.rpartition(".")[2] for path in paths}, n=1, cutoff=0.75)
        if near:
            named = [path for path in paths if path.rpartition(".")[2] == near[0]]
            return f"; did you mean {' or '.join(named[:4])}?"
        return f"; {above or 'the top level'} has {', '.join(block) or 'no keys'}"
    return ""
