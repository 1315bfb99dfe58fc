"""The wheel holds every file that the packages need, and the command works from it alone."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.test_house import REPO

PACKAGES = ("data_pipeline", "launchers", "mmscale")
pytestmark = pytest.mark.slow


def run(*words: str, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the tracked files with the setuptools of this environment."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    archive = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    for name in filter(None, archive.split("\0")):
        if name.split("/")[0] in (*PACKAGES, "benchmarks", "tests", "pyproject.toml", "README.md", "LICENSE"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPO / name).read_bytes())
    words = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source))
    output = run(sys.executable, *words, cwd=folder)
    assert "deprecat" not in output.lower()
    (found,) = folder.glob("*.whl")
    return found


def test_it_holds_the_packages_and_their_data_files_and_nothing_else(wheel: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-z", *PACKAGES], cwd=REPO, capture_output=True, text=True, check=True)
    tracked = set(filter(None, listed.stdout.split("\0")))
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == tracked
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert any(name.endswith(".jinja") for name in names)
    assert any(name.endswith(".js") for name in names)


def test_the_metadata_name_licence_python_and_readme(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    head, _, description = metadata.partition("\n\n")
    assert "\nLicense-Expression: Apache-2.0\n" in head
    assert "\nRequires-Python: >=3." in head
    assert "\nDescription-Content-Type: text/markdown" in head
    assert description.startswith("# mmscale")


def test_the_installed_command_works_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    """The environment has the wheel alone; a path file adds the installed packages of this one."""
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(others))
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(REPO / name)
    python = str(tmp_path / "venv/bin/python")
    place = run(
        python, "-c", "import mmscale, data_pipeline; print(mmscale.__file__, data_pipeline.__file__)", cwd=tmp_path
    )
    assert place.count(str(site)) == 2
    command = (python, "-c", "from mmscale.cli.main import entry; entry()")
    assert run(*command, "--version", cwd=tmp_path) == "mmscale 0.1.0\n"
    words = ("config", "validate", "configs/quickstart.yaml", "run_dir=runs/wheel")
    run(*command, *words, cwd=tmp_path)
    words = ("train", str(REPO / "tests/system/tiny.yaml"), "run_dir=runs/wheel", "max_steps=1")
    run(*command, *words, cwd=tmp_path)
    assert (tmp_path / "runs/wheel/report.html").stat().st_size > 10_000
