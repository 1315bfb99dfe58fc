"""docs/benchmarks.md has a section for every benchmark, and no command of a benchmark that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PAGE = (REPO / "docs/benchmarks.md").read_text()
SERVERS = {"servers", "slow_link"}
"""Programs that benchmarks start; they measure nothing."""


def test_the_page_has_a_command_of_every_benchmark() -> None:
    programs = {
        path.stem for path in (REPO / "benchmarks").glob("*.py") if 'if __name__ == "__main__":' in path.read_text()
    }
    assert set(re.findall(r"^(?:\$ )?python -m benchmarks\.(\w+)", PAGE, re.MULTILINE)) == programs - SERVERS


def test_links_within_the_page_lead_to_a_section() -> None:
    titles = re.findall(r"^##+ ([^\n]+)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= anchors
