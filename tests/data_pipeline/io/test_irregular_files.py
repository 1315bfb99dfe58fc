"""A FIFO in place of a shard, a source or a list raises an error with its name, and no reader blocks on it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import DataPipelineError
from data_pipeline.io.checksums import holds, sha256_of
from data_pipeline.prepare.choices import SourceKind
from data_pipeline.prepare.energon_export import index_for_energon
from data_pipeline.prepare.export import export
from data_pipeline.prepare.tars import TarReader, TarSource, open_tars
from data_pipeline.prepare.verify import verify_shard
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import LocalShard
from tests.data_pipeline.conftest import WriteSet

_TAR = "part-00000.tar"


def _first_row(source: TarSource) -> None:
    ((row,),) = source.chunks()
    assert isinstance(row.reference, DataPipelineError)
    raise row.reference


def _packed(folder: Path) -> None:
    (folder / _TAR).rename(folder / "packed.tar.gz")
    _first_row(open_tars(folder, SourceKind.WEBDATASET, guess=False, split="train"))


def _damage(tar: Path) -> None:
    report = verify_shard(tar)
    raise DataPipelineError("; ".join(damage.detail for damage in report.damages))


_READERS: dict[str, Callable[[Path], object]] = {
    "shard": lambda folder: LocalShard(folder / _TAR, ShardIndex.read(folder / _TAR)),
    "index": lambda folder: ShardIndex.open(folder / _TAR),
    "verify": lambda folder: _damage(folder / _TAR),
    "digest": lambda folder: sha256_of(folder / _TAR),
    "plan": lambda folder: holds(folder / _TAR, b"{}"),
    "manifest": lambda folder: Manifest.open(folder / _TAR),
    "plain tars": lambda folder: _first_row(open_tars(folder, SourceKind.WEBDATASET, guess=False, split="train")),
    "packed tars": _packed,
    "members": lambda folder: TarReader((folder / _TAR,), dict).raw((0, (("txt", (0, 1)),))),
    "energon": lambda folder: index_for_energon(folder / _TAR),
    "export": lambda folder: export(folder / "set.manifest", folder / "out"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("read", _READERS.values(), ids=_READERS)
def test_a_fifo_is_refused(write_set: WriteSet, read: Callable[[Path], object]) -> None:
    folder = write_set("set", [{"txt": b"text"}]).parent
    tar = folder / _TAR
    tar.unlink()
    os.mkfifo(tar)
    with pytest.raises((DataPipelineError, OSError)) as raised:
        read(folder)
    shown = f"{getattr(raised.value, 'filename', None)}: {raised.value}"  # As the command line prints the message.
    assert "not a regular file" in shown
    assert "part-00000" in shown or "packed.tar.gz" in shown


def test_a_fifo_among_parquet_files_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.parquet")
    command = [
        sys.executable,
        "-m",
        "mmscale.cli.main",
        "data",
        "ingest",
        str(tmp_path),
        "--output",
        str(tmp_path / "out"),
    ]
    # In a separate process, because no signal interrupts pyarrow while it blocks.
    ended = subprocess.run([*command, "--from", "parquet"], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert f"{tmp_path / 'x.parquet'}: not a readable Parquet file: not a regular file" in ended.stderr
