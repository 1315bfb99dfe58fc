"""Shell commands in a configuration that came with a run folder run only when the user asks for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmscale.cli.main import main

REPO = Path(__file__).resolve().parents[2]
TAR, OTHER = sorted((REPO / "examples/emoji/shards").glob("*.tar"))[:2]


@pytest.fixture
def trail(tmp_path: Path) -> Path:
    """The file that the command makes."""
    return tmp_path / "trail"


@pytest.fixture
def foreign(tmp_path: Path, trail: Path) -> Path:
    """``config.yaml`` of a run folder whose data set is a shell command, which braces hide."""
    folder = tmp_path / "foreign"
    (folder / "checkpoints").mkdir(parents=True)
    path = folder / "config.yaml"
    path.write_text(
        f"base: {REPO / 'tests/system/tiny.yaml'}\nrun_dir: {tmp_path / 'new'}\ndata:\n  datasets:\n"
        f"  - name: emoji\n    shards: ['{{pipe:echo 1 >> {trail}; cat {TAR},{OTHER}}}']\n"
        '    template: {kind: caption, answers: ["{name}"]}\n    transforms: {kind: fixed, size: 32}\n'
    )
    return path


@pytest.mark.parametrize(
    "words",
    [
        ["data", "digest", "{}", "--steps", "0:1"],
        ["train", "{}", "max_steps=1"],
        ["launch", "local", "{}", "--ranks", "2"],
        ["launch", "slurm", "{}", "--dry-run"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_a_command_that_came_with_a_run_folder_is_refused(
    words: list[str], foreign: Path, trail: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(foreign) for word in words]) == 2
    said = capsys.readouterr().err
    assert f"{foreign}:" in said
    assert "data.datasets.0.shards" in said
    assert "'echo" in said
    assert "--allow-commands" in said
    assert not trail.exists()


def test_a_file_based_on_it_is_refused_too(foreign: Path, trail: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"base: {foreign}\n")
    assert main(["data", "digest", str(mine), "--steps", "0:1"]) == 2
    assert not trail.exists()


def test_the_flag_a_copy_and_an_override_run_it(foreign: Path, trail: Path, tmp_path: Path) -> None:
    steps = ["--steps", "0:1"]
    assert main(["--allow-commands", "data", "digest", str(foreign), *steps]) == 0
    assert trail.exists()
    trail.unlink()
    copy = tmp_path / "read-and-trusted.yaml"
    copy.write_bytes(foreign.read_bytes())
    assert main(["data", "digest", str(copy), *steps]) == 0
    assert trail.exists()
    trail.unlink()
    override = f"data.datasets.0.shards=['pipe:touch {trail}; cat {TAR}']"
    assert main(["data", "digest", str(foreign), override, *steps]) == 0
    assert trail.exists()


def test_ranks_get_the_flag(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--allow-commands", "launch", "slurm", str(foreign), "--dry-run"]) == 0
    assert "mmscale.cli.main --allow-commands train" in capsys.readouterr().out
