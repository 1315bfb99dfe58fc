"""Images, tables and extra scalars on their way from a run to a tracker: one file for each message.

    training process --write_message--> RUN/trackers/KIND/outbox/000000000200-samples.json --take_messages--> tracker

The scalars of a step are not messages: the tracker's process reads them from ``metrics.jsonl``.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.io.atomic import as_utf8, write_whole
from data_pipeline.io.untrusted import read_json

MOST_WAITING = 64
"""Messages that may wait for a tracker. Later ones are dropped, so that a tracker that is down fills no disk."""
_NAME = re.compile(r"(\d{12})-([A-Za-z0-9_-]{1,80})\.json")


@dataclass(frozen=True)
class Image:
    """A picture as the bytes of a PNG file, with its caption."""

    png: bytes
    caption: str


@dataclass(frozen=True)
class Table:
    """Rows of values that JSON has, one value for each column."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass
class Record:
    """Values that a tracker gets for one step, by name."""

    step: int
    scalars: dict[str, float] = field(default_factory=dict)
    images: dict[str, Image] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)

    def add(self, other: Record) -> None:
        """Add the values of a record of the same or an earlier step."""
        self.scalars |= other.scalars
        self.images |= other.images
        self.tables |= other.tables

    def values(self, image_class: Callable[..., Any], table_class: Callable[..., Any]) -> dict[str, Any]:
        """Return all values by name, with images and tables in the classes of a tracker's package.

        Args:
            image_class: Takes a picture of Pillow and ``caption``.
            table_class: Takes ``columns`` and ``data``, lists.
        """
        from PIL import Image as Pillow

        values: dict[str, Any] = dict(self.scalars)
        for name, image in self.images.items():
            values[name] = image_class(Pillow.open(io.BytesIO(image.png)), caption=image.caption)
        for name, table in self.tables.items():
            values[name] = table_class(columns=list(table.columns), data=[list(row) for row in table.rows])
        return values


def write_message(outbox: Path, what: str, record: Record) -> bool:
    """Write a record as a message. Return False, and write nothing, if ``MOST_WAITING`` messages wait already.

    Args:
        outbox: Folder of the waiting messages; created if absent.
        what: Name of the message. A later message with the same step and name replaces it.
        record: The values.

    Raises:
        OSError: the file cannot be written.
    """
    if outbox.is_dir() and len(list(outbox.iterdir())) >= MOST_WAITING:
        return False
    content = {
        "step": record.step,
        "scalars": record.scalars,
        "images": {
            name: {"png": base64.b64encode(image.png).decode(), "caption": image.caption}
            for name, image in record.images.items()
        },
        "tables": {
            name: {"columns": list(table.columns), "rows": [list(row) for row in table.rows]}
            for name, table in record.tables.items()
        },
    }
    name = re.sub(r"[^A-Za-z0-9_-]", "_", what)[:80]
    text = json.dumps(content, ensure_ascii=False)
    write_whole(outbox / f"{record.step:012d}-{name}.json", as_utf8(text), parents=True)
    return True


@dataclass(frozen=True)
class Message:
    """A waiting message: its file, its name, and what it holds."""

    path: Path
    what: str
    record: Record


def read_messages(outbox: Path, last_step: int) -> list[Message]:
    """Return the messages of the steps up to ``last_step``, in order. A damaged message is removed and left out."""
    found = []
    for path in sorted(outbox.iterdir()) if outbox.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match is None or int(match[1]) > last_step:
            continue
        try:
            found.append(Message(path, match[2], _record(read_json(path))))
        except (ValueError, KeyError, TypeError, AttributeError):
            path.unlink(missing_ok=True)
    return found


def _record(content: Mapping[str, Any]) -> Record:
    return Record(
        int(content["step"]),
        {str(name): float(value) for name, value in content["scalars"].items()},
        {
            str(name): Image(base64.b64decode(image["png"]), str(image["caption"]))
            for name, image in content["images"].items()
        },
        {
            str(name): Table([str(column) for column in table["columns"]], [list(row) for row in table["rows"]])
            for name, table in content["tables"].items()
        },
    )
