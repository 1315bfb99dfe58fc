"""Shell commands in a configuration that came with a run folder run only if the user allows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmscale.cli.main import main

REPO = Path(__file__).resolve().parents[2]
TAR, OTHER = sorted((REPO / "examples/emoji/shards").glob("*.tar"))[:2]


@pytest.fixture
def trail(tmp_path: Path) -> Path:
    """The file that the command creates."""
    return tmp_path / "trail"


@pytest.fixture
def shared_config(tmp_path: Path, trail: Path) -> Path:
    """``config.yaml`` of a run folder whose data set is a shell command inside a brace expression."""
    folder = tmp_path / "shared"
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
    words: list[str], shared_config: Path, trail: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(shared_config) for word in words]) == 2
    said = capsys.readouterr().err
    assert f"{shared_config}:" in said
    assert "data.datasets.0.shards" in said
    assert "'echo" in said
    assert "--allow-commands" in said
    assert not trail.exists()


@pytest.mark.parametrize("source", ["pipeline: {}:train", "shards: [{tar}]\n    stages: ['{}:train']"])
def test_python_code_that_came_with_a_run_folder_is_refused(
    source: str,
    shared_config: Path,
    trail: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = f"code_of_a_run_{tmp_path.name}".replace("-", "_")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{module}.py").write_text(
        f"open({str(trail)!r}, 'w').close()\nimport webdataset as wds\n"
        f"train = wds.WebDataset({str(TAR)!r}, shardshuffle=False)\n"
    )
    text = shared_config.read_text()
    before, _, after = text.partition("    shards: ")
    shared_config.write_text(f"{before}    {source.format(module, tar=TAR)}\n{after.partition(chr(10))[2]}")
    steps = ["data", "digest", str(shared_config), "--steps", "0:1"]
    for words in (
        steps,
        ["train", str(shared_config), "max_steps=1"],
        ["launch", "slurm", str(shared_config), "--dry-run"],
    ):
        assert main(words) == 2
        said = capsys.readouterr().err.replace("\n", " ")
        assert f"data.datasets.0.{'stages' if 'stages' in source else 'pipeline'}" in said
        assert f"would run the Python code '{module}:train'" in said
        assert "--allow-commands" in said
    main(["config", "validate", str(shared_config)])
    assert not trail.exists()
    if source.startswith("pipeline"):
        assert main(["--allow-commands", *steps]) == 0
        assert trail.exists()


def test_a_file_based_on_it_is_refused_too(shared_config: Path, trail: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"base: {shared_config}\n")
    assert main(["data", "digest", str(mine), "--steps", "0:1"]) == 2
    assert not trail.exists()


@pytest.mark.parametrize(
    ("named", "moved", "traces"),
    [
        ("config.yaml", "base.yaml", ["checkpoints"]),
        ("config.yaml", "a/b/base.yaml", ["checkpoints"]),
        ("config.yaml", "../elsewhere/base.yaml", ["checkpoints"]),
        ("starts/config-0001.yaml", "starts/config-0001.yaml", ["starts"]),
        *(("config.yaml", "config.yaml", [name]) for name in ("starts", "lock", "faults", "heartbeats", "logs")),
    ],
)
def test_every_file_of_a_run_folder_and_its_bases_are_refused(
    shared_config: Path, trail: Path, named: str, moved: str, traces: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shared_config.parent
    (folder / "checkpoints").rmdir()
    for name in traces:
        (folder / name).mkdir()
    target = folder / moved
    target.parent.mkdir(parents=True, exist_ok=True)
    shared_config.rename(target)
    if not shared_config.exists():
        shared_config.write_text(f"base: {moved}\n")
    assert main(["data", "digest", str(folder / named), "--steps", "0:1"]) == 2
    assert f"came with the run folder {folder.resolve()} and" in capsys.readouterr().err.replace("\n", " ")
    assert not trail.exists()


def test_an_override_of_another_source_does_not_hide_the_command(
    shared_config: Path, trail: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared_config.write_text(shared_config.read_text().replace("}']", "}', other.tar]"))
    assert main(["data", "digest", str(shared_config), f"data.datasets.0.shards.1={TAR}", "--steps", "0:1"]) == 2
    assert "--allow-commands" in capsys.readouterr().err
    assert not trail.exists()


def test_the_flag_a_copy_and_an_override_run_it(shared_config: Path, trail: Path, tmp_path: Path) -> None:
    steps = ["--steps", "0:1"]
    assert main(["--allow-commands", "data", "digest", str(shared_config), *steps]) == 0
    assert trail.exists()
    trail.unlink()
    copy = tmp_path / "read-and-trusted.yaml"
    copy.write_bytes(shared_config.read_bytes())
    assert main(["data", "digest", str(copy), *steps]) == 0
    assert trail.exists()
    trail.unlink()
    override = f"data.datasets.0.shards=['pipe:touch {trail}; cat {TAR}']"
    assert main(["data", "digest", str(shared_config), override, *steps]) == 0
    assert trail.exists()


def test_ranks_get_the_flag(shared_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--allow-commands", "launch", "slurm", str(shared_config), "--dry-run"]) == 0
    assert "mmscale.cli.main --allow-commands train" in capsys.readouterr().out
