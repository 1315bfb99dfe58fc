"""Checkpoints of the toy model, written without an engine, and functions that damage them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from zlib_ng.zlib_ng import crc32

from mmscale.checkpoint.imports.write import manifest_of_weights, new_share, write_checkpoint
from mmscale.checkpoint.manifest import MANIFEST, Manifest, rank_files, read_manifest, seal
from mmscale.checkpoint.share import TensorPiece, persistent_buffers
from mmscale.dist import World
from mmscale.hf.tensor_file import file_header
from tests.engine.toy import ToyModel, toy_model

ALONE = World(0, 1, 0, torch.device("cpu"))
TENSORS, META = rank_files(0)
KINDS = ("master", "exp_avg", "exp_avg_sq")


def make_checkpoint(directory: Path, step: int = 3, model: ToyModel | None = None) -> Path:
    """Write ``directory/step-N`` as one rank: masters and moments of all parameters, and the buffer."""
    model = model or toy_model()
    pieces = []
    for name, parameter in model.named_parameters():
        values = parameter.detach().reshape(-1)
        pieces += [TensorPiece(f"{name}|{kind}", 0, values if kind == "master" else values.square()) for kind in KINDS]
    buffers = persistent_buffers(model)
    pieces += [TensorPiece(f"{name}|buffer", 0, values, whole=True) for name, values in buffers.items()]
    empty = manifest_of_weights(model, "fp32", "all", {}).model_dump()
    for entry in empty["parameters"].values():
        entry["trained"] = True
    empty["state"] |= {"step": step, "stage_step": step}
    empty["buffers"] = {name: tuple(values.shape) for name, values in buffers.items()}
    return write_checkpoint(directory, Manifest.model_validate(empty), [new_share(0, pieces, directory)])


def flip_byte(path: Path, rank: int = 0) -> None:
    """Change one byte of the last tensor of a checkpoint, and no file size."""
    file = path / rank_files(rank)[0]
    data = bytearray(file.read_bytes())
    data[-2] ^= 0x55
    file.write_bytes(data)


Change = Callable[[dict[str, Any]], object]


def rewrite(
    path: Path,
    header: Change | None = None,
    metadata: Change | None = None,
    manifest: Change | None = None,
    rank: int = 0,
) -> None:
    """Change header, metadata or manifest of a checkpoint, and update all checksums and sizes."""
    names = rank_files(rank)
    file = path / names[0]
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if header is not None:
        listed = json.loads(data[8 : 8 + length])
        header(listed)
        text = json.dumps(listed, separators=(",", ":")).encode()
        assert len(text) <= length, "the values must not move"
        file.write_bytes(data[:8] + text.ljust(length) + data[8 + length :])
    if metadata is not None:
        record = json.loads((path / names[1]).read_text())
        metadata(record)
        (path / names[1]).write_text(json.dumps(record))
    values = read_manifest(path).model_dump()
    if manifest is not None:
        manifest(values)
    for name in names:
        text = (path / name).read_bytes()
        values["files"][name] = {"bytes": len(text), "crc32": crc32(text)}
    (path / MANIFEST).write_text(seal(Manifest.model_validate(values)))


def drop_tensor(path: Path, key: str, rank: int, manifest: Change | None = None) -> None:
    """Remove a tensor from the file of one rank, as if no rank had saved it. Does nothing if it is not there."""
    names = rank_files(rank)
    kept = load_file(path / names[0])
    metadata = json.loads((path / names[1]).read_text())
    if key not in kept:
        return
    del metadata["tensors"][key]
    header = file_header((name, kept[name].dtype, kept[name].shape) for name in metadata["tensors"])
    data = header
    for name, entry in metadata["tensors"].items():
        entry["offset"] = len(data)
        data += kept[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    (path / names[0]).write_bytes(data)
    rewrite(path, metadata=lambda record: record.update(metadata), manifest=manifest, rank=rank)


def set_value(path: Path, key: str, index: int, value: float) -> None:
    """Write one value of a float32 tensor, and update all checksums."""
    offset = json.loads((path / META).read_text())["tensors"][key]["offset"] + 4 * index
    data = bytearray((path / TENSORS).read_bytes())
    data[offset : offset + 4] = torch.tensor([value]).numpy().tobytes()
    (path / TENSORS).write_bytes(data)
    rewrite(path)
