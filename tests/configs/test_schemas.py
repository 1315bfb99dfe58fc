"""The JSON schemas in configs/schema are current, describe every key, and accept exactly what the loader accepts."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mmscale.cli.config import SchemaName, schema_of
from mmscale.config import leaves, load
from mmscale.config.explain import explain
from mmscale.config.layers import read_layers
from mmscale.config.tree import plain, read_file
from mmscale.run.config import RunConfig
from tests.configs.files import CONFIGS, REPO

SCHEMAS = {name.value: CONFIGS / "schema" / f"{name.value}.json" for name in SchemaName}
YAMLS = [*sorted(CONFIGS.rglob("*.yaml")), REPO / "examples/documents/run.yaml"]


@cache
def checker(name: str) -> jsonschema.Draft202012Validator:
    schema = json.loads(SCHEMAS[name].read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_is_current(name: str) -> None:
    kept = json.loads(SCHEMAS[name].read_text(encoding="utf-8"))
    assert kept == schema_of(name), f"run: mmscale config schema {name} > configs/schema/{name}.json"


def schema_named_by(path: Path) -> str:
    """Return the name of the schema that an editor takes for a file: the one in the comment of its first line."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    mark, schema = first.split("$schema=")
    assert mark == "# yaml-language-server: "
    target = (path.parent / schema).resolve()
    return next(name for name, kept in SCHEMAS.items() if kept == target)


def test_shipped_files_follow_the_schema_that_they_name() -> None:
    checkers = {name: checker(name) for name in SCHEMAS}
    assert len(YAMLS) > 60
    for path in YAMLS:
        errors = list(checkers[schema_named_by(path)].iter_errors(plain(read_file(path, (path,)))))
        assert not errors, f"{path}: {errors[0].message}"


def test_merged_files_follow_the_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    for path in YAMLS:
        if schema_named_by(path) == "run":
            assert not list(checker("run").iter_errors(plain(read_layers(path)))), path


def quickstart(**changes: Any) -> dict[str, Any]:
    return {**plain(read_file(CONFIGS / "quickstart.yaml", ())), **changes}


@pytest.mark.parametrize(
    ("changes", "valid"),
    [
        ({}, True),
        ({"sed": 1}, False),
        ({"seed": -1}, False),
        ({"seed": "many"}, False),
        ({"engine": {"zero_stage": 4}}, False),
        ({"engine": {"zero_stage": 2, "base": "engine.yaml"}}, True),
        ({"metrics": {"trackers": ["mlflow", {"kind": "wandb", "mode": "offline"}]}}, True),
        ({"metrics": {"trackers": ["tensorbored"]}}, False),
        ({"stages": [{"steps": 3}]}, False),
        ({"stages": [{"base": "stage.yaml", "steps": 3}]}, True),
        ({"stages": [{"name": "a", "steps": 3, "learning_rate": 1e-3}]}, True),
        ({"stages": [{"name": "a", "steps": 3, "learning_rate": {"vision": 0}}]}, False),
        ({"stages": [{"name": "a", "steps": 3, "optimizer": {"weight_decay": 0.0}}]}, True),
        ({"stages": [{"name": "a", "steps": 3, "data": {"lanes": 3}}]}, True),
        ({"stages": [{"name": "a", "steps": 3, "data": {"lane": 3}}]}, False),
    ],
    ids=str,
)
def test_what_an_editor_marks(changes: dict[str, Any], valid: bool) -> None:
    assert (not list(checker("run").iter_errors(quickstart(**changes)))) == valid


def test_a_file_without_base_needs_the_keys_of_the_root() -> None:
    assert list(checker("run").iter_errors({"seed": 1}))
    assert not list(checker("run").iter_errors({"seed": 1, "base": "other.yaml"}))


def test_every_key_has_a_description() -> None:
    for name in SCHEMAS:
        schema = json.loads(SCHEMAS[name].read_text(encoding="utf-8"))
        for owner, block in [(name, schema), *schema["$defs"].items()]:
            for key, value in block.get("properties", {}).items():
                assert value.get("description") or key == "kind", f"{owner}.{key}"


def test_every_value_of_a_run_has_an_explanation() -> None:
    schema = schema_of("run")
    for path, value in leaves(load(CONFIGS / "recipes/emoji-stages.yaml", [], RunConfig).value):
        found = explain(schema, ".".join(path))
        assert any(_is_of(value, one.type) for one in found), (path, value, found)


def _is_of(value: Any, described: str) -> bool:
    """Whether the type in words admits the value; only the words for scalars are compared."""
    if value is None:
        return "null" in described
    if isinstance(value, bool):
        return "true or false" in described
    if isinstance(value, int | float):
        return "number" in described or str(value) in described
    if isinstance(value, str):
        return any(word in described for word in ("text", "path", value))
    return "list" in described or "mapping" in described
