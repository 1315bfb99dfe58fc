"""Read examples of the generated answers and of the scored drawings of a run, for the report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from data_pipeline.io.untrusted import parse_json, read_lines
from mmscale.evaluate.answer_media import MOST_PARTS, ShownMedia
from mmscale.evaluate.result import ANSWERS_FOLDER
from mmscale.report.captions import data_url

_MOST_ROWS = 8
_MOST_TILES = 16
_MOST_CHARACTERS = 240
_MOST_LINE_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class PlayedMedia:
    """An image, video or sound of a question.

    Attributes:
        kind: ``image``, ``video`` or ``audio``.
        url: Data URL; empty if there is no file that can be read. A GIF is an image.
        frames: Data URL of frames of a video in a row; empty without.
    """

    kind: str
    url: str
    frames: str


@dataclass(frozen=True)
class AnswerRow:
    """One question; long texts are cut."""

    prompt: str
    answer: str
    references: str
    score: str
    media: list[PlayedMedia]


@dataclass(frozen=True)
class AnswerTable:
    """The first answers of a set of kind ``generation``."""

    name: str
    metric: str
    rows: list[AnswerRow]


@dataclass(frozen=True)
class DrawingTile:
    """A scored drawing and its nearest training image.

    Attributes:
        drawing: Data URL; empty if the file cannot be read.
        nearest: Data URL; empty if the file cannot be read, or without training images.
        expected: The right name.
        said: The classifier's name.
        distance: Distance of the two images, such as ``0.151``; empty without training images.
    """

    drawing: str
    nearest: str
    expected: str
    said: str
    distance: str


@dataclass(frozen=True)
class DrawingGallery:
    """The first drawings of a set of kind ``drawings``."""

    name: str
    tiles: list[DrawingTile]


class _Line(TypedDict):
    prompt: str | None
    answer: str
    references: list[str]
    score: float
    media: NotRequired[list[ShownMedia]]


class _DrawingLine(TypedDict):
    drawing: str
    answer: str
    reference: str
    nearest: NotRequired[str]
    distance: NotRequired[float]


_LINE = TypeAdapter(_Line)
_DRAWING_LINE = TypeAdapter(_DrawingLine)


def read_answer_tables(run_dir: Path, heldout: Mapping[str, Mapping[str, Any]]) -> list[AnswerTable]:
    """Return a table for each set of ``heldout`` (of ``result.json``) with a file of answers that can be read."""
    tables = []
    for name, held in heldout.items():
        if held.get("kind") == "generation" and _NAME.fullmatch(name):
            rows = _rows(run_dir, run_dir / ANSWERS_FOLDER / f"{name}.jsonl")
            tables += [AnswerTable(name, held["metric"], rows)] if rows else []
    return tables


def read_drawing_galleries(run_dir: Path, heldout: Mapping[str, Mapping[str, Any]]) -> list[DrawingGallery]:
    """Return the drawings of each set of ``heldout`` (of ``result.json``) with a file of drawings that can be read."""
    galleries = []
    for name, held in heldout.items():
        if held.get("kind") == "drawings" and _NAME.fullmatch(name):
            tiles = _tiles(run_dir, run_dir / ANSWERS_FOLDER / f"{name}.jsonl")
            galleries += [DrawingGallery(name, tiles)] if tiles else []
    return galleries


def asked_file(run_dir: Path, name: str, kind: str) -> tuple[str | None, Path] | None:
    """Return prompt and file of the first question of a set that is about one image, video or sound.

    Args:
        run_dir: The run folder.
        name: Name of a set of kind ``generation``.
        kind: ``image``, ``video`` or ``audio``.

    Returns:
        None if no such question has a copied file.
    """
    for line in _lines(run_dir / ANSWERS_FOLDER / f"{name}.jsonl"):
        media = line.get("media", [])
        if [shown["kind"] for shown in media] == [kind] and "file" in media[0]:
            path = run_dir / ANSWERS_FOLDER / media[0]["file"]
            if path.is_file():
                return line["prompt"], path
    return None


def _tiles(run_dir: Path, path: Path) -> list[DrawingTile]:
    try:
        lines = islice(read_lines(path, most_bytes=_MOST_LINE_BYTES), _MOST_TILES)
        return [_tile(run_dir, _DRAWING_LINE.validate_python(parse_json(line))) for line in lines]
    except (OSError, ValueError):  # Absent or damaged.
        return []


def _tile(run_dir: Path, line: _DrawingLine) -> DrawingTile:
    near, distance = line.get("nearest", ""), line.get("distance")
    return DrawingTile(
        drawing=data_url(run_dir, f"{ANSWERS_FOLDER}/{line['drawing']}"),
        nearest=data_url(run_dir, f"{ANSWERS_FOLDER}/{near}") if near else "",
        expected=_cut(line["reference"]),
        said=_cut(line["answer"]),
        distance="" if distance is None else f"{distance:.3f}",
    )


def _rows(run_dir: Path, path: Path) -> list[AnswerRow]:
    return [_row(run_dir, line) for line in _lines(path)]


def _lines(path: Path) -> list[_Line]:
    try:
        lines = list(islice(read_lines(path, most_bytes=_MOST_LINE_BYTES), _MOST_ROWS))
        return [_LINE.validate_python(parse_json(line)) for line in lines]
    except (OSError, ValueError):  # Absent or damaged.
        return []


def _row(run_dir: Path, line: _Line) -> AnswerRow:
    return AnswerRow(
        prompt=_cut(line["prompt"] or ""),
        answer=_cut(line["answer"]),
        references=_cut(" | ".join(dict.fromkeys(line["references"]))),
        score=f"{100 * line['score']:.0f}",
        media=[_played(run_dir, shown) for shown in line.get("media", [])[:MOST_PARTS]],
    )


def _played(run_dir: Path, shown: ShownMedia) -> PlayedMedia:
    url, frames = (
        data_url(run_dir, f"{ANSWERS_FOLDER}/{name}") if name else ""
        for name in (shown.get("file", ""), shown.get("frames", ""))
    )
    return PlayedMedia(url[len("data:") :].partition("/")[0] if url else shown["kind"], url, frames)


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"
