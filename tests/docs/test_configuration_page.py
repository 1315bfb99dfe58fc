"""docs/configuration.md lists every key of the blocks that no other page describes, and names no key that is absent."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from mmscale.run.config import RunConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "configuration.md").read_text()
_ELSEWHERE = {"model", "evaluation", "transforms", "tiling", "checkpoint"}
"""Blocks whose keys docs/models.md, docs/evaluation.md and docs/checkpoints.md describe."""


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _classes(argument)


def _keys(schema: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[str]:
    """Yield the names of all fields of a configuration class and of the classes in it."""
    for name, field in schema.model_fields.items():
        yield name
        for inner in set(_classes(field.annotation)) - seen if name not in _ELSEWHERE else ():
            seen.add(inner)
            yield from _keys(inner, seen)


KEYS = sorted(set(_keys(RunConfig, set())))
QUOTED = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", PAGE))))


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_listed(key: str) -> None:
    assert key in QUOTED


def test_tables_name_no_absent_key() -> None:
    tables = re.findall(r"^\| key of `\w+[\w.*]*` .*?\n\n", PAGE, re.MULTILINE | re.DOTALL)
    assert len(tables) >= 4
    for table in tables:
        for cell in re.findall(r"^\| ([^|]*`[^|]*) \|", table, re.MULTILINE)[1:]:
            for path in re.findall(r"`([\w.]+)`", cell):
                assert path.rpartition(".")[2] in KEYS, path
