"""A list of deliberate mistakes: each ends in a message with place and remedy, and without a traceback."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mmscale.cli.main import main
from tests.checkpoint.toy_checkpoint import flip_byte, make_checkpoint
from tests.evaluate.texts import write_set
from tests.mistakes.cases import MANIFEST, MISTAKES, TINY, Mistake
from tests.system.conftest import REPO, Run

FILES = {
    "key.yaml": f"base: {REPO}/{TINY}\nrun_dir: x\nseeed: 3\n",
    "brackets.yaml": "seed: 1\nstages: [\n  {name: a\nmax_steps: 1\n",
    "tab.yaml": "data:\n\tlanes: 3\n",
    "twice.yaml": "seed: 1\nrun_dir: x\nseed: 2\n",
    "merge.yaml": "seed: 1\n<<: {seed: 2}\n",
    "empty.yaml": "",
    "list.yaml": "- 1\n",
    "no_base.yaml": "base: gone.yaml\n",
    "circle.yaml": "base: circle.yaml\n",
    "relative.yaml": f"base: {REPO}/{TINY}\ndata: {{datasets: [{{name: a, manifest: beside.manifest}}]}}\n",
    "beside.manifest": "",
    "rubbish.tar": "no tar",
    "hf/config.json": '{"model_type": "nothing", "architectures": ["Nothing"]}',
    "hf/model.safetensors": "",
    "full/model.safetensors": "",
    "empty_folder/.keep": "",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "first"
    words = ["train", TINY, f"run_dir={folder}", "max_steps=2", "sample_log.losses=false"]
    Run(folder, words, forked=True).finish()
    return folder


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory, run: Path) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "empty_folder/.keep").unlink()
    Image.new("RGB", (64, 64), "red").save(folder / "good.png")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:60])
    flip_byte(make_checkpoint(folder / "damaged/checkpoints"))
    shutil.copytree(run, folder / "cut")
    (folder / "cut/result.json").unlink()
    os.truncate(next((folder / "cut/checkpoints").glob("step-*2/*.safetensors")), 1000)
    write_set(folder / "shards", [{"name": name} for name in "abc"])
    shard = folder / "shards/part-00000.tar"
    shard.write_bytes(shard.read_bytes().replace(b'"b"', b'"x"'))
    return folder


@pytest.mark.fault
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake(
    mistake: Mistake, tmp: Path, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO)
    names = {"tmp": tmp, "run": run, "hf": tmp / "hf", "cwd": REPO}
    code = main(shlex.split(mistake.words.format(**names), posix=True))
    captured = capsys.readouterr()
    message = " ".join((captured.out + captured.err).split())
    if os.environ.get("SHOW"):
        print(f"\n#### {mistake.name} [{code}] {mistake.words}\n{captured.err.strip()}")
    assert "Traceback" not in captured.err
    assert code == mistake.code, captured
    assert mistake.place.format(**names) in message, captured
    assert mistake.remedy.format(**names) in message, captured


@pytest.mark.fault
def test_there_are_sixty() -> None:
    assert len({mistake.words for mistake in MISTAKES}) == len(MISTAKES) >= 60


@pytest.mark.fault
def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in: every sync of a written file fails as on a full disk."""
    monkeypatch.chdir(REPO)

    def fail(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    page = tmp_path / "stats.html"
    assert main(["data", "stats", MANIFEST, "--sample", "8", "--html", str(page)]) == 1
    err = capsys.readouterr().err
    assert "No space left on device; free space, then start the same command again" in err
    assert "Traceback" not in err
    assert not page.exists()


@pytest.mark.fault
def test_a_folder_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``config validate`` names the process that holds the folder, and changes nothing there."""
    monkeypatch.chdir(REPO)
    program = "import sys, pathlib, mmscale.io.lock as l; f = l.FolderLock(pathlib.Path(sys.argv[1])); f.attempt()"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{program}; print('held', flush=True); sys.stdin.read()", str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        before = sorted(path.name for path in tmp_path.rglob("*"))
        assert main(["config", "validate", TINY, f"run_dir={tmp_path}"]) == 0
        assert f"{tmp_path}: in use by process {holder.pid}" in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.rglob("*")) == before
    finally:
        holder.kill()
        holder.communicate()
    assert main(["config", "validate", TINY, f"run_dir={tmp_path}"]) == 0
    assert "in use" not in capsys.readouterr().err
