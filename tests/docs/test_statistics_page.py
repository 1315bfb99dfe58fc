"""The table of statistics in docs/data.md is what the command prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmscale.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_is_what_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = (ROOT / "docs" / "data.md").read_text().splitlines()
    command = next(i for i, line in enumerate(lines) if line.startswith("$ mmscale data stats"))
    capsys.readouterr()
    assert main(lines[command].split()[2:]) == 0
    assert capsys.readouterr().out.splitlines() == lines[command + 1 : lines.index("```", command)]
