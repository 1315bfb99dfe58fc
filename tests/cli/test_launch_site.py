"""The site file of ``mmscale launch slurm``: all errors at once with file and line, and options that replace values."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmscale.cli.main import main

REPO = Path(__file__).resolve().parents[2]
TINY = str(REPO / "tests/system/tiny.yaml")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site file to write; no SLURM, and no site file of the user."""
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setattr("launchers.cluster.shutil.which", lambda _name: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MMSCALE_SITE", raising=False)
    return tmp_path / "site.yaml"


def launch(site: Path, *words: str) -> int:
    return main(["launch", "slurm", TINY, f"run_dir={site.parent / 'run'}", "--dry-run", *words])


def test_options_replace_values_and_add_to_lists(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site.write_text("partition: a\nqos: high\ntime: 60\nsbatch: [--exclusive]\nsetup: [one]\nenvironment: {A: 1}\n")
    words = ["--partition", "b", "--sbatch=--mem=0", "--setup", "two", "--chain", "2", "--after", "12"]
    assert launch(site, "--site", str(site), *words) == 0
    script = capsys.readouterr().out
    for line in ("partition=b", "qos=high", "time=60", "exclusive", "mem=0", "no-requeue"):
        assert f"#SBATCH --{line}\n" in script
    assert "#SBATCH --dependency=singleton,afterany:12\n" in script
    assert "export A=1\none\ntwo\n" in script


@pytest.mark.parametrize(
    ("words", "in_file", "is_checked"),
    [
        ([], "", False),
        (["--gpus-per-node", "1"], "", False),
        (["--gpus-per-node", "2"], "", True),
        (["--nodes", "2"], "", True),
        (["--nodes", "2", "--no-health-check"], "", False),
        (["--nodes", "2"], "health_check: false", False),
        (["--nodes", "1"], "health_check: true", True),
        (["--nodes", "2", "--spares", "1"], "health_check: false", True),
    ],
)
def test_nodes_are_checked_by_default(
    site: Path, capsys: pytest.CaptureFixture[str], words: list[str], in_file: str, is_checked: bool
) -> None:
    site.write_text(f"account: lab\n{in_file}\n")
    assert launch(site, "--site", str(site), *words) == 0
    assert ("launchers.health" in capsys.readouterr().out) == is_checked


def test_limits_of_restarts_are_keys_of_the_site(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site.write_text("max_restarts: 7\nrestart_delay_seconds: 30\n")
    assert launch(site, "--site", str(site)) == 0
    assert "--max-restarts 7 --delay 30 " in capsys.readouterr().out
    assert launch(site, "--site", str(site), "--max-restarts", "0", "--restart-delay-seconds", "0") == 0
    assert "--max-restarts 0 --delay 0 " in capsys.readouterr().out


def test_the_site_file_is_found(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = site.parent / ".config/mmscale/site.yaml"
    home.parent.mkdir(parents=True)
    home.write_text("account: home\n")
    site.write_text("account: named\n")
    assert launch(site) == 0
    assert "#SBATCH --account=home\n" in capsys.readouterr().out
    monkeypatch.setenv("MMSCALE_SITE", str(site))
    assert launch(site) == 0
    assert "#SBATCH --account=named\n" in capsys.readouterr().out
    monkeypatch.setenv("MMSCALE_SITE", str(site.parent / "gone"))
    assert launch(site) == 2
    assert "gone: no such file" in capsys.readouterr().err


def test_wrong_keys_are_all_reported_with_their_lines(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site.write_text("partiton: a\ngpus_per_node: -1\ncontainer: {kind: pyxi, image: x}\n")
    assert launch(site, "--site", str(site)) == 2
    said = capsys.readouterr().err
    assert f"{site}:1 partiton=a: unknown key; did you mean 'partition'?" in said
    assert f"{site}:2 gpus_per_node=-1: must be at least 0" in said
    assert f"{site}:3 container.kind=pyxi: not one of the choices; did you mean 'pyxis'?" in said


def test_wrong_values_are_all_reported_with_their_lines(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site.write_text(
        "time: soon\nenvironment:\n  RANK: 0\nsbatch:\n  - --qos=a\n  - oops\n"
        "container:\n  kind: apptainer\n  image: gone.sif\n  options:\n  - --cleanenv\n"
    )
    assert launch(site, "--site", str(site), "--sbatch=--container-image=x") == 2
    said = capsys.readouterr().err
    assert "6 errors in the job" in said
    for line in (
        "1 time=soon: expected minutes",
        "3 environment.RANK=0: the batch script",
        "6 sbatch.1=oops: expected",
    ):
        assert f"{site}:{line}" in said
    assert f"{site}:9 container.image=gone.sif: gone.sif: no such file" in said
    assert f"{site}:11 container.options.0=--cleanenv: --cleanenv removes" in said
    assert "--sbatch=--container-image=x: the batch script itself would run in the container" in said
    assert not (site.parent / "run").exists()


def test_an_option_that_replaces_a_wrong_value_is_named_itself(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site.write_text("time: 1:00:00\n")
    assert launch(site, "--site", str(site), "--time", "1") == 2
    said = capsys.readouterr().err
    assert "--time 1: the limit is 60 s" in said
    assert str(site) not in said


def test_what_the_cluster_lacks_is_reported_with_the_other_errors(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = site.parent / "tools"
    tools.mkdir()
    (tools / "scontrol").write_text("#!/bin/bash\necho 'PartitionName=gpu Default=YES MaxTime=1:00:00'\n")
    (tools / "sinfo").write_text("#!/bin/bash\necho 'gpu|1|8|gpu:2'\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/bin:/usr/bin")
    monkeypatch.setattr("launchers.cluster.shutil.which", lambda name: name)
    site.write_text("partition: gpu\ntime: 2:00:00\ncpus_per_task: 9\nsbatch: [oops]\n")
    assert launch(site, "--site", str(site)) == 2
    said = capsys.readouterr().err
    assert f"{site}:2 time=2:00:00: partition gpu allows at most 1:00:00" in said
    assert f"{site}:3 cpus_per_task=9: the ranks of a node need 1 x 9 = 9 cores" in said
    assert f"{site}:4 sbatch.0=oops" in said


def test_the_shipped_example_is_valid(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--site", str(REPO / "configs/site/example.yaml"), "--gpus-per-node", "2"]
    assert launch(site, *words) == 0, capsys.readouterr().err
