"""JSON schema of a configuration class: the keys with descriptions, types, ranges, defaults and choices.

Editors complete and check YAML files with it; ``explain`` answers questions about single keys from it. The descriptions
are the strings under the fields.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Iterator
from enum import Enum
from functools import cache
from types import ModuleType
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from mmscale.config.tree import BASE_KEY

Schema = dict[str, Any]
_DEEPEST_LINE = 3
"""Depth of ``$defs / CLASS / properties / KEY``."""
BLOCK = "x-block"
"""Keyword of a field that overrides a block of the root: its value names the block, whose keys the field accepts."""
KIND_ALONE = "x-kind-alone"
"""Keyword of a union whose blocks may be written as their ``kind`` alone."""

_BASE = {
    "type": "string",
    "description": "A YAML file or a run folder, relative to this file, whose values this block replaces key by key.",
}


def json_schema(schema: type[BaseModel], *, is_complete: bool = True) -> Schema:
    """Return the JSON schema (draft 2020-12) of the YAML files of a configuration class.

    Every block may have the key ``base``. A base file can supply any key of the blocks below it. So the schema requires
    keys only in the root and in the items of lists, and only if they have no ``base``.

    Args:
        schema: Class of the root.
        is_complete: Whether the root requires its keys.
    """
    root: Schema = schema.model_json_schema(schema_generator=_Generator)
    blocks = dict(root["properties"])
    root = _edited(root, blocks)
    required = {name: found.pop("required", None) for name, found in root["$defs"].items()}
    for found in root["$defs"].values():
        if "properties" in found:
            found["properties"] = {BASE_KEY: _BASE, **found["properties"]}
    _require_in_items(root, required)
    needed = root.pop("required", None)
    root["properties"] = {BASE_KEY: _BASE, **root["properties"]}
    if is_complete and needed:
        root["anyOf"] = _unless_base(needed)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root}


def schema_text(value: Any, depth: int = 0) -> str:
    """Return a schema as JSON with one line per key of a block, so that a diff shows the keys that changed."""
    if not isinstance(value, dict) or not value or depth > _DEEPEST_LINE:
        return json.dumps(value, ensure_ascii=False)
    margin = " " * depth
    lines = (f"{margin} {json.dumps(key)}: {schema_text(each, depth + 1)}" for key, each in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{margin}}}"


class _Generator(GenerateJsonSchema):
    """Add the strings under the fields as descriptions."""

    def model_schema(self, schema: Any) -> Schema:
        found = super().model_schema(schema)
        documentation = attribute_docs(schema["cls"])
        for name, field in found.get("properties", {}).items():
            if text := documentation.get(name):
                field["description"] = text
        return found

    def enum_schema(self, schema: Any) -> Schema:
        found = super().enum_schema(schema)
        documentation = attribute_docs(schema["cls"])
        if documentation:  # A keyword of the YAML language server.
            found["markdownEnumDescriptions"] = [documentation.get(each.name, "") for each in schema["members"]]
        return found


def _edited(node: Any, blocks: Schema, *, names: bool = False) -> Any:
    """Return the schema without titles, with ``anyOf`` for unions, and with the keys of overridden blocks.

    ``oneOf`` would reject a block without ``kind`` whose keys fit several variants. Older editors ignore what is beside
    a ``$ref``, so it moves into ``allOf``. ``names`` is true for a mapping from keys of the configuration to schemas.
    """
    if isinstance(node, list):
        return [_edited(item, blocks) for item in node]
    if not isinstance(node, dict):
        return node
    if names:
        return {key: _edited(value, blocks) for key, value in node.items()}
    edited: Schema = {}
    for key, value in node.items():
        if key in ("title", "discriminator"):
            continue
        if key in ("default", "enum", "const"):
            edited[key] = value
        else:
            edited["anyOf" if key == "oneOf" else key] = _edited(value, blocks, names=key in ("properties", "$defs"))
    if KIND_ALONE in edited:
        edited["anyOf"] = [{"enum": sorted(node["discriminator"]["mapping"])}, *edited["anyOf"]]
    if BLOCK in edited:
        edited["anyOf"] = [_edited(blocks[edited[BLOCK]], {}), {"type": "null"}]
        edited.pop("type", None)
    if "$ref" in edited and len(edited) > 1:
        edited["allOf"] = [{"$ref": edited.pop("$ref")}]
    return edited


def _require_in_items(node: Any, required: dict[str, list[str] | None]) -> None:
    """Require keys of each item of a list, which no base file of an outer block can supply."""
    if isinstance(node, dict):
        if isinstance(node.get("items"), dict):
            node["items"] = _required(node["items"], required)
        for value in node.values():
            _require_in_items(value, required)
    elif isinstance(node, list):
        for value in node:
            _require_in_items(value, required)


def _required(item: Schema, required: dict[str, list[str] | None]) -> Schema:
    if "anyOf" in item:
        return {**item, "anyOf": [_required(each, required) for each in item["anyOf"]]}
    needed = required.get(item["$ref"].rpartition("/")[2]) if "$ref" in item else None
    return {"allOf": [item], "anyOf": _unless_base(needed)} if needed else item


def _unless_base(required: list[str]) -> list[Schema]:
    return [{"required": required}, {"required": [BASE_KEY]}]


def attribute_docs(owner: type) -> dict[str, str]:
    """Return the string under each attribute of a class and of its base classes, as one line each.

    ``use_attribute_docstrings`` of pydantic would read the source of every class whenever it is imported.
    """
    found: dict[str, str] = {}
    for each in reversed(owner.__mro__):
        module = sys.modules.get(each.__module__)
        if module is not None and issubclass(each, BaseModel | Enum) and each not in (BaseModel, Enum):
            found |= _docs_of_module(module).get(each.__qualname__, {})
    return found


@cache
def _docs_of_module(module: ModuleType) -> dict[str, dict[str, str]]:
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError):  # A class made at run time has no file.
        return {}
    return dict(_docs_of_classes(tree, ""))


def _docs_of_classes(body: ast.AST, prefix: str) -> Iterator[tuple[str, dict[str, str]]]:
    for node in ast.iter_child_nodes(body):
        if isinstance(node, ast.ClassDef):
            name = f"{prefix}{node.name}"
            yield name, dict(_attributes(node))
            yield from _docs_of_classes(node, f"{name}.")


def _attributes(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for statement, after in zip(node.body, node.body[1:], strict=False):
        target: ast.expr | None = None
        if isinstance(statement, ast.AnnAssign):
            target = statement.target
        elif isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target = statement.targets[0]
        text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
        if isinstance(target, ast.Name) and isinstance(text, str):
            yield target.id, " ".join(inspect.cleandoc(text).split())
