"""Every ``bash`` block of the README and of docs/ works when pasted in the repository's root, on bundled data.

The README's block starts after ``make quickstart``, the pages' blocks in an activated environment, as after the README.
On pages, ``mmscale`` forks from one process; the README's block starts the installed script. Blocks for a cluster, a
GPU or long runs are fenced as ``console`` and are not run.
"""

from __future__ import annotations

import re

import pytest

from mmscale.cli import data
from tests.docs.conftest import ACTIVATE, REPO, paste

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks() -> list[object]:
    found = []
    for page in PAGES:
        text = page.read_text() if page.exists() else ""
        for match in _BLOCK.finditer(text):
            line = text.count("\n", 0, match.start()) + 2
            found.append(pytest.param(match[1], id=f"{page.relative_to(REPO)}:{line}"))
    return found


@pytest.mark.slow  # All pages together take ten minutes.
@pytest.mark.parametrize("block", blocks())
def test_block(block: str, request: pytest.FixtureRequest) -> None:
    paste(block, request.getfixturevalue("checkout" if ACTIVATE in block else "quick_checkout"))


def test_the_readme_activates_the_environment_itself() -> None:
    """Before the first block the reader has only run make, so the block must activate the environment."""
    first = _BLOCK.search((REPO / "README.md").read_text())
    assert first is not None
    assert first[1].startswith(f"{ACTIVATE}\n")


def test_pages_name_no_missing_page() -> None:
    """Links between pages and to files of the repository have existing targets."""
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(REPO)} links to {target}"


def test_the_table_of_data_verbs_is_complete() -> None:
    table = re.search(
        r"^\| `mmscale data` \|.*?\n\n", (REPO / "docs" / "data.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert table is not None
    listed = re.findall(r"^\| `(\w+)` \|", table[0], re.MULTILINE)
    names = [command.name or command.callback.__name__ for command in data.app.registered_commands if command.callback]
    assert sorted(listed) == sorted(names)
