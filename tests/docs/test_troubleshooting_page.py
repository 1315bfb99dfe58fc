"""The messages that docs/troubleshooting.md lists are in the code, and each leads to a section of the page."""

from __future__ import annotations

import errno
import os
import re

import pytest

from tests.docs.conftest import REPO

PAGE = (REPO / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (`[^|]+`) \| \[[^\]]+\]\(#([^)]+)\) \|$", PAGE, re.MULTILINE)
_JOINT = re.compile(r'"\s*\n\s*f?"')  # Between the parts of a message that is longer than a line.
_OF_THE_SYSTEM = {os.strerror(errno.ENOSPC)}


def test_every_section_of_messages_is_listed() -> None:
    assert len(ROWS) >= 10


@pytest.mark.parametrize(("fragments", "anchor"), ROWS, ids=[anchor for _, anchor in ROWS])
def test_messages_are_in_the_code(fragments: str, anchor: str) -> None:
    sources = [
        path
        for package in ("data_pipeline", "mmscale", "launchers")
        for path in (REPO / package).rglob("*")
        if path.suffix in (".py", ".jinja")
    ]
    text = "\n".join(_JOINT.sub("", path.read_text(encoding="utf-8")) for path in sources)
    missing = {part for part in re.findall(r"`([^`]+)`", fragments) if part not in text}
    assert missing - _OF_THE_SYSTEM == set()
    titles = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
