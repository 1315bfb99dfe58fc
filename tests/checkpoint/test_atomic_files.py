"""Files of a checkpoint: the safetensors library reads them, and no write or removal leaves a partial file visible."""

from __future__ import annotations

import io
import json
import os
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.io.atomic import sync
from data_pipeline.io.checksums import crc32_of
from mmscale.checkpoint.manifest import RankMetadata
from mmscale.checkpoint.share import RankShare, TensorPiece, flat_bytes
from mmscale.io import files
from mmscale.io.files import remove_folder, write_share

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8]


def pieces() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {str(dtype): (torch.randn(7, 3) * 50).to(dtype) for dtype in DTYPES}
    return tensors | {
        "bool": torch.tensor([True, False]),
        "empty": torch.empty(0),
        "scalar": torch.tensor(3.5),
        "a view|exp_avg": torch.arange(20.0)[3:9],
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "needs grad": torch.ones(2, requires_grad=True),
    }


def test_the_library_reads_every_written_file(tmp_path: Path) -> None:
    tensors = pieces()
    share = RankShare.of(3, [TensorPiece(key, 5, values) for key, values in tensors.items()], None, {})
    tensor_file, metadata_file = write_share(tmp_path, share.names, share.header, share.metadata, share.bytes_of())
    path = tmp_path / "rank-00003.safetensors"
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, values in tensors.items():
        assert read[name].dtype == values.dtype
        assert torch.equal(read[name], values.detach().flatten())  # A range of a parameter is flat.
    assert tensor_file.bytes == path.stat().st_size
    assert tensor_file.crc32 == zlib.crc32(path.read_bytes()) == crc32_of(path)
    text = (tmp_path / "rank-00003.json").read_bytes()
    assert (metadata_file.bytes, metadata_file.crc32) == (len(text), zlib.crc32(text))
    for name, entry in RankMetadata.model_validate(json.loads(text)).tensors.items():
        values = tensors[name]
        raw = path.read_bytes()[entry.offset : entry.offset + values.nbytes]
        assert raw == flat_bytes(values).numpy().tobytes()
        assert (entry.start, entry.stop, entry.crc32) == (5, 5 + values.numel(), zlib.crc32(raw))


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.safetensors"
    path.write_text("mine")
    share = RankShare.of(0, [TensorPiece("a|master", 0, torch.ones(1))], None, {})
    with pytest.raises(FileExistsError):
        write_share(tmp_path, share.names, share.header, share.metadata, share.bytes_of())
    assert path.read_text() == "mine"


class ThreeBytes(io.FileIO):
    """A file that writes at most three bytes at a time."""

    def write(self, data: object) -> int:
        return super().write(bytes(data)[:3])  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("chunk", [1, 4, 5, 100])
def test_a_disk_that_takes_a_part_gets_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(files, "_CHUNK_BYTES", chunk)
    parts = [b"0123456789", b"", b"abcde", b"x"]
    path, whole = tmp_path / "file", b"".join(parts)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, mode, buffering: ThreeBytes(self, mode))
        written = files.write_file(path, map(memoryview, parts))
    assert path.read_bytes() == whole
    assert written == (len(whole), zlib.crc32(whole))
    assert crc32_of(path) == files.checksum_of(memoryview(whole)) == zlib.crc32(whole)
    assert files.checksum_of(memoryview(b"")) == 0


def test_a_folder_that_is_half_removed_does_not_look_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step-00000005"
    for each in (path, path / "inner"):
        each.mkdir()

    def interrupted(folder: Path) -> None:
        raise OSError(13, "Permission denied", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(OSError, match="Permission denied"):
            remove_folder(path)
    assert [each.name for each in tmp_path.iterdir()] == ["step-00000005.partial"]
    (tmp_path / "step-00000005.partial").rename(path)
    remove_folder(path)
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_is_synced_is_closed_again(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/fd"))
    for _ in range(3):
        sync(tmp_path)
    assert set(os.listdir("/dev/fd")) <= before
