"""The site of `make docs`: every page in the navigation, no broken link, all public names, nothing from the network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.conftest import REPO

_LOADED = re.compile(r"""<(?:script|link rel="stylesheet"|img)[^>]*?(?:src|href)="(https?://[^"]+)""")


def test_navigation_names_each_page_once() -> None:
    named = re.findall(r"^ +- [^:\n]+: (\S+\.md)$", (REPO / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(str(page.relative_to(REPO / "docs")) for page in (REPO / "docs").rglob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built in strict mode: MkDocs fails on a broken link or anchor and on a page outside the navigation."""
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)],
        cwd=REPO,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_api_pages_show_every_public_name(site: Path) -> None:
    page = (site / "api" / "data_pipeline.html").read_text()
    for name in ("OrderedSamples", "PackedBatches", "open_loader", "open_samples"):
        assert f'id="data_pipeline.{name}"' in page
    titles = {path.stem for path in (site / "api").iterdir()}
    assert {"mmscale.checkpoint", "mmscale.compare", "mmscale.config", "mmscale.evaluate", "mmscale.prune"} <= titles


@pytest.mark.slow
def test_pages_load_nothing_from_the_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    assert {path.name: found for path in pages if (found := _LOADED.findall(path.read_text()))} == {}


@pytest.mark.slow
def test_search_finds_pages_and_public_names(site: Path) -> None:
    docs = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    places = {entry["location"].partition("#")[0] for entry in docs}
    assert {"first_run.html", "troubleshooting.html", "api/mmscale.checkpoint.html"} <= places


@pytest.mark.slow
def test_links_to_repository_files_become_paths(site: Path) -> None:
    for page in site.glob("*.html"):
        assert 'href="../' not in page.read_text().replace('href=".."', ""), page.name
