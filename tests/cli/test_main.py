"""The command line as a whole: help, lazily imported verbs, exit codes, output."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import DataConfigError, SampleError
from mmscale.cli.console import console, emit, exit_code_of, print_table, progress, track
from mmscale.cli.main import VERBS, main
from mmscale.errors import ConfigError, MMScaleError

REPO = Path(__file__).resolve().parents[2]


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for verb in VERBS:
        assert f"  {verb.name} " in out
    assert "Example: mmscale" in out


def test_every_file_with_commands_is_a_verb() -> None:
    files = {path.stem for path in (REPO / "mmscale/cli").glob("*.py") if "app = typer.Typer(" in path.read_text()}
    verbs = {verb.name for verb in VERBS}
    assert {name for name in files - {"main"} if name.partition("_")[0] not in verbs} == set()
    assert verbs <= files
    for verb in VERBS:  # data_text.py holds further commands of the family in data.py.
        merged = {command.callback.__module__ for command in verb.load().registered_commands}
        assert merged == {f"mmscale.cli.{name}" for name in files if name.partition("_")[0] == verb.name}


def commands() -> list[list[str]]:
    found = []
    for verb in VERBS:
        app = verb.load()
        for command in app.registered_commands:
            name = command.name or command.callback.__name__.replace("_", "-")
            found.append([verb.name, name] if verb.family else [verb.name])
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_help_of_a_verb_ends_with_an_example_of_it(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    _, found, example = text.rpartition("Example: ")
    assert found
    assert example.startswith(" ".join(["mmscale", *words]))


@pytest.mark.parametrize("words", [["trian"], ["config", "shw"], ["config", "show"], ["--nope"], ["params", "--nope"]])
def test_wrong_use_is_2_without_a_traceback(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "Usage: mmscale" in err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mmscale ")


def test_the_installed_command_carries_the_exit_code(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "mmscale"), "config", "validate", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"mmscale: {tmp_path / 'none.yaml'}: no such file\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (MMScaleError("it failed"), 1, "mmscale: it failed\n"),
        (ConfigError("x.yaml:1 a=1: bad"), 2, "mmscale: x.yaml:1 a=1: bad\n"),
        (DataConfigError("lanes=0"), 2, "mmscale: lanes=0\n"),
        (SampleError("no image", shard="a.tar", key="7"), 1, "mmscale: a.tar/7: no image\n"),
        (KeyboardInterrupt(), 130, "mmscale: interrupted\n"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.jpg"), 1, "mmscale: a.jpg: no such file"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "mmscale: disk: No space left on device; free space, then start the same command again\n",
        ),
        (SystemExit(75), 75, ""),
        (SystemExit(None), 0, ""),
    ],
)
def test_exit_code_of(error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        raise error

    assert exit_code_of(run) == code
    err = capsys.readouterr().err
    assert err.startswith(said)
    assert "Traceback" not in err


def test_a_defect_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(lambda: [][1]) == 1  # type: ignore[func-returns-value]
    err = capsys.readouterr().err
    assert "IndexError" in err
    assert err.endswith("mmscale: this is a defect of mmscale, not of your input; please report the lines above\n")


def test_emit(capsys: pytest.CaptureFixture[str]) -> None:
    data = {"total": 1234567, "parts": {"a": 0.5, "name": "ü"}, "path": Path("x"), "none": None, "list": [1, 2]}
    emit(data, json=True)
    assert json.loads(capsys.readouterr().out) == {**data, "path": "x"}
    emit(data)
    assert capsys.readouterr().out.splitlines() == [
        "total       1,234,567",
        "parts.a     0.5",
        "parts.name  ü",
        "path        x",
        "none        null",
        "list        [1, 2]",
    ]


def test_progress_without_a_terminal_is_plain_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert not console.is_terminal
    assert list(track([1, 2, 3], "reading")) == [1, 2, 3]
    with progress("counting") as meter:
        meter.advance(5, note="a.tar")
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("reading: 3/3 in ")
    assert lines[1].startswith("counting: 5 in ")


def test_the_command_ends_with_its_code_whatever_reads_its_output(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mmscale.cli.main"]
    assert subprocess.run([*command, "config", "show", str(tmp_path / "no.yaml")], capture_output=True).returncode == 2
    with Path("/dev/full").open("w") as full:
        assert subprocess.run([*command, "--version"], stdout=full).returncode == 1
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*command, "--version"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert "Traceback" not in done.stderr


ROWS = [
    {"name": "step-1", "bytes": 12_345, "whole": True, "note": "[bold]"},
    {"name": "step-10", "bytes": None, "whole": False, "share": 0.25},
]


def test_rows_in_a_pipe_are_aligned_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(ROWS)
    assert capsys.readouterr().out.splitlines() == [
        "name      bytes  whole  note    share",
        "step-1   12,345  yes    [bold]      -",
        "step-10       -  no     -        0.25",
    ]
    print_table([])
    assert capsys.readouterr().out == ""


def test_rows_on_a_terminal_are_a_table_if_it_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    for columns, has_borders in (("100", True), ("30", False)):
        monkeypatch.setenv("COLUMNS", columns)
        print_table([{"checkpoint": row["name"], "bytes": row["bytes"], "note": row.get("note")} for row in ROWS])
        out = capsys.readouterr().out
        assert ("│" in out) == has_borders
        assert "[bold]" in out
        assert "whole" not in out
