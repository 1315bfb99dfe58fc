"""Models on a hub, a loopback server that speaks its endpoints: downloads, the cache without a network, uploads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmscale.cli.main import main
from tests.hf.hub_server import SHA, Hub, serve
from tests.hf.published_folders import save


def command(*words: str, hub: Hub, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own: the library reads its variables when it is imported."""
    variables = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_x",
        "HF_HUB_OFFLINE": "0",
        **environment,
    }
    variables.pop("HF_HUB_CACHE", None)
    words = ("checkpoint", *words)
    done = subprocess.run(
        [sys.executable, "-m", "mmscale.cli.main", *words], env=variables, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr
    return done


def test_a_name_is_downloaded_said_and_kept(tmp_path: Path) -> None:
    save("qwen2", tmp_path / "folder")
    with serve() as hub:
        files = {file.name: file.read_bytes() for file in (tmp_path / "folder").iterdir()}
        hub.files["org/tiny"] = {**files, "pytorch_model.bin": b"pickled", "extra.safetensors": b"", "README.md": b""}
        done = command("import", "hf://org/tiny", str(tmp_path / "run"), hub=hub, home=tmp_path / "home")
        assert done.returncode == 0, done.stderr
        assert f"downloading org/tiny from {hub.url} to {tmp_path / 'home'}" in done.stderr.replace("\n", "")
        assert sorted(hub.downloads) == sorted(files)  # Other formats of the weights stay on the hub.
        assert SHA in (tmp_path / "run/hf_files/files.json").read_text()


@pytest.mark.slow
def test_a_hub_that_cannot_give_the_model(tmp_path: Path) -> None:
    save("qwen2", tmp_path / "folder")
    with serve() as hub:
        hub.files["org/tiny"] = {file.name: file.read_bytes() for file in (tmp_path / "folder").iterdir()}
        done = command("import", "hf://org/tiny", str(tmp_path / "run"), hub=hub, home=tmp_path / "home")
        assert done.returncode == 0, done.stderr
        missing = command("import", "hf://org/other", str(tmp_path / "no"), hub=hub, home=tmp_path / "home")
        assert missing.returncode == 1
        assert f"org/other: no such model on {hub.url}, or you have no access to it" in missing.stderr
    again = ("import", "hf://org/tiny", str(tmp_path / "again"))
    done = command(*again, hub=hub, home=tmp_path / "home", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert "reading org/tiny from the cache" in done.stderr
    assert (tmp_path / "again/config.yaml").is_file()
    done = command(*again[:2], str(tmp_path / "no"), hub=hub, home=tmp_path / "nothing", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "has no complete copy; check the network, HF_ENDPOINT and HF_HUB_OFFLINE" in done.stderr


@pytest.mark.slow
def test_an_export_is_uploaded_privately(tmp_path: Path) -> None:
    save("qwen2", tmp_path / "folder")
    assert main(["checkpoint", "import", str(tmp_path / "folder"), str(tmp_path / "run"), "--from", "hf"]) == 0
    with serve() as hub:
        words = ("export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "hf", "--push", "org/mine")
        done = command(*words, hub=hub, home=tmp_path / "home")
        assert done.returncode == 0, done.stderr
        assert f"uploading {tmp_path / 'out'} to {hub.url}/org/mine" in done.stderr.replace("\n", "")
        assert hub.private == {"org/mine": True}
        assert hub.tokens == {"Bearer hf_x"}
        assert hub.files["org/mine"] == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["org/tiny", "{}"], 1, "org/tiny: no such folder; to download it from the hub, write hf://org/tiny"),
        (["none", "{}"], 1, "none: no such folder"),
        (["hf://tiny", "{}"], 2, "tiny: not the name of a model on a hub; write ORG/NAME"),
        (["hf://../../etc", "{}"], 2, "../../etc: not the name of a model on a hub; write ORG/NAME"),
        ([".", "{}", "--revision", "main"], 2, "--revision main: only for a model on a hub, hf://ORG/NAME"),
    ],
)
def test_names_that_are_none(
    words: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(tmp_path / "run") for word in words]
    assert main(["checkpoint", "import", *words, "--from", "hf"]) == code
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
