"""Read examples of the generated answers of a run, for the report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from data_pipeline.io.untrusted import parse_json, read_lines
from mmscale.evaluate.result import ANSWERS_FOLDER

_MOST_ROWS = 8
_MOST_CHARACTERS = 240
_MOST_LINE_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class AnswerRow:
    """One question; long texts are cut."""

    prompt: str
    answer: str
    references: str
    score: str


@dataclass(frozen=True)
class AnswerTable:
    """The first answers of a set of kind ``generation``."""

    name: str
    metric: str
    rows: list[AnswerRow]


class _Line(TypedDict):
    prompt: str | None
    answer: str
    references: list[str]
    score: float


_LINE = TypeAdapter(_Line)


def read_answer_tables(run_dir: Path, heldout: Mapping[str, Mapping[str, Any]]) -> list[AnswerTable]:
    """Return a table for each set of ``heldout`` (of ``result.json``) with a file of answers that can be read."""
    tables = []
    for name, held in heldout.items():
        if held.get("kind") == "generation" and _NAME.fullmatch(name):
            rows = _rows(run_dir / ANSWERS_FOLDER / f"{name}.jsonl")
            tables += [AnswerTable(name, held["metric"], rows)] if rows else []
    return tables


def _rows(path: Path) -> list[AnswerRow]:
    try:
        lines = list(islice(read_lines(path, most_bytes=_MOST_LINE_BYTES), _MOST_ROWS))
        return [_row(_LINE.validate_python(parse_json(line))) for line in lines]
    except (OSError, ValueError):  # Absent or damaged.
        return []


def _row(line: _Line) -> AnswerRow:
    references = " | ".join(dict.fromkeys(line["references"]))
    return AnswerRow(_cut(line["prompt"] or ""), _cut(line["answer"]), _cut(references), f"{100 * line['score']:.0f}")


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"
