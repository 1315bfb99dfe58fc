"""A file or folder that is no manifest raises an error with its kind and the command that creates a manifest."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline.errors import ManifestError
from data_pipeline.prepare.verify import jobs_of
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.manifest import Manifest
from mmscale.config import load
from mmscale.run.config import RunConfig
from mmscale.run.file_checks import check_files

SHARDS = Path(__file__).parents[3] / "examples/emoji/shards"
TAR = SHARDS / "heldout-both-00000.tar"

pytestmark = pytest.mark.fault


def contents(folder: Path) -> dict[str, tuple[bytes, str, str]]:
    """Return content, expected kind and part of the expected remedy of each file."""
    pq.write_table(pa.table({"caption": ["x"]}), folder / "x.parquet")
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    return {
        "tar": (TAR.read_bytes(), "this is a tar", "mmscale data index"),
        "gzip": (gzip.compress(TAR.read_bytes()[:2000]), "compressed with gzip", "mmscale data ingest"),
        "json": (json.dumps({"shards": ["a.tar"]}, indent=1).encode(), "this is JSON", "mmscale data ingest"),
        "jsonl": (b'["a"]\n', "this is JSON", "mmscale data ingest"),
        "parquet": ((folder / "x.parquet").read_bytes(), "a Parquet file", "mmscale data ingest"),
        "yaml": ("data:\n  datasets: [{name: é}]\n".encode(), "this is YAML", "data.datasets"),
        "image": (picture.getvalue(), "this is an image", "mmscale data ingest"),
    }


def test_a_file_of_another_kind_is_called_by_its_name(tmp_path: Path) -> None:
    for name, (content, kind, remedy) in contents(tmp_path).items():
        path = tmp_path / f"{name}.manifest"
        path.write_bytes(content)
        with pytest.raises(ManifestError, match=rf"{name}\.manifest: this is .*expected a manifest") as caught:
            Manifest.open(path)
        assert kind in str(caught.value)
        assert remedy in str(caught.value)


def test_a_folder_is_called_a_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "tars").mkdir()
    shutil.copy(TAR, tmp_path / "tars")
    remedies = {
        tmp_path / "empty": "mmscale data ingest",
        tmp_path / "tars": r"mmscale data index",
        SHARDS: r"it contains ",
    }
    for folder, remedy in remedies.items():
        for use in (Manifest.open, jobs_of):
            with pytest.raises(ManifestError, match=rf"this is a folder, expected a manifest.*; .*{remedy}"):
                use(folder)


def test_a_configuration_names_the_key() -> None:
    for given, kind in ((SHARDS, "a folder"), (TAR, "a tar")):
        overrides = [f"data.datasets.0.manifest={given}"]
        config = load(Path("configs/quickstart.yaml"), overrides, RunConfig).value
        with pytest.raises(ManifestError, match=rf"data\.datasets\.0\.manifest={given}: this is {kind}"):
            check_files(config)


def test_a_damaged_manifest_stays_a_damaged_manifest(tmp_path: Path) -> None:
    content = bytearray((SHARDS / "heldout-both.manifest").read_bytes())
    content[20] ^= 1
    (tmp_path / "x.manifest").write_bytes(content)
    with pytest.raises(ManifestError, match="damaged mmscale-manifest-1"):
        Manifest.open(tmp_path / "x.manifest")


def test_a_tar_that_was_cut_is_truncated_and_one_that_was_replaced_is_stale(tmp_path: Path) -> None:
    tar = Path(shutil.copy(TAR, tmp_path / TAR.name))
    shutil.copy(TAR.with_name(f"{TAR.name}.index"), tmp_path)
    whole = tar.read_bytes()
    for end in (30_000, 512, 0):
        tar.write_bytes(whole[:end])
        with pytest.raises(ManifestError, match=rf"truncated: ends at byte {end} .* made for {len(whole)} bytes; copy"):
            ShardIndex.open(tar)
    for other in (whole[:20480] + bytes(1024), whole + bytes(512)):
        tar.write_bytes(other)
        with pytest.raises(ManifestError, match="its index is stale"):
            ShardIndex.open(tar)
