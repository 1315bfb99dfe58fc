"""Our writer of safetensors against the library's reader."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmscale.checkpoint.durable import crc32_of, write_tensors

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8]


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {str(dtype): (torch.randn(7, 3) * 50).to(dtype) for dtype in DTYPES}
    tensors |= {
        "bool": torch.tensor([True, False]),
        "empty": torch.empty(0),
        "scalar": torch.tensor(3.5),
        "a view|exp_avg": torch.arange(20.0)[3:9],
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "needs grad": torch.ones(2, requires_grad=True),
    }
    path = tmp_path / "x.safetensors"
    entry = write_tensors(path, tensors.items())
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, values in tensors.items():
        assert read[name].dtype == values.dtype
        assert torch.equal(read[name], values.detach())
    assert entry.bytes == path.stat().st_size
    assert entry.crc32 == zlib.crc32(path.read_bytes()) == crc32_of(path)


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        write_tensors(path, [("a", torch.ones(1))])
    assert path.read_text() == "mine"
