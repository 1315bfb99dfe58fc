"""Write the metadata that Megatron-Energon needs before it opens tars, as ``energon prepare`` would write it.

    .nv-meta/.info.json    samples of each shard
    .nv-meta/split.yaml    shards of train, val, test
    .nv-meta/dataset.yaml  type of sample, and the member or JSON field of each of its fields
    X.tar.idx              byte offset of each sample, then the end of the last one (uint64)

Not for: ``index.sqlite``, which Energon reads to join data sets by key; ``energon prepare`` writes it.
"""

from __future__ import annotations

import itertools
import json
import struct
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import yaml

from data_pipeline.errors import SampleError, ShardError
from data_pipeline.io.atomic import write_whole
from data_pipeline.io.json_member import parse_member
from data_pipeline.io.untrusted import open_regular
from data_pipeline.prepare.energon_source import META
from data_pipeline.shards.image_header import is_image
from data_pipeline.shards.media_kind import media_kind
from data_pipeline.shards.tar_members import split_name
from data_pipeline.shards.writer import padded

_MAX_IMAGE_NAMES = 16
_CAPTION = "json[caption],txt,json[captions][0]"
"""Alternatives in the order in which ``sample_reader.assemble`` looks for a caption."""


class SampleType(str, Enum):
    """Name of Energon's sample class."""

    CAPTIONING = "CaptioningSample"
    """One image and a caption."""
    TEXT = "TextSample"
    """A text."""
    CRUDE = "CrudeWebdataset"
    """Any other members, unchanged; the user's ``Cooker`` converts them to samples."""


@dataclass(frozen=True)
class EnergonShard:
    """Metadata of one tar.

    Attributes:
        num_samples: Number of samples in the tar.
        kind: The type that fits all of its samples.
        image_names: Extensions of their images in the original case.
    """

    num_samples: int
    kind: SampleType
    image_names: tuple[str, ...]


def index_for_energon(tar: Path) -> EnergonShard:
    """Write ``X.tar.idx`` next to a tar and return the tar's metadata. Contents of images are not checked.

    Raises:
        ShardError: the tar is damaged or holds no sample.
    """
    starts, end, kinds, names = list[int](), 0, set[SampleType](), set[str]()
    try:
        with open_regular(tar) as opened, tarfile.open(fileobj=opened, mode="r:") as file:
            for members in _samples(file):
                kinds.add(_kind_of(file, members))
                starts.append(min(member.offset for member in members.values()))
                names |= {ext for ext in members if is_image(ext.lower())}
                end = max(member.offset_data + padded(member.size) for member in members.values())
    except (tarfile.TarError, OSError) as error:
        raise ShardError(f"{tar}: {error}") from error
    if not starts:
        raise ShardError(f"{tar}: no sample in it")
    write_whole(tar.with_name(f"{tar.name}.idx"), struct.pack(f"<{len(starts) + 1}Q", *starts, end))
    return EnergonShard(len(starts), kinds.pop() if len(kinds) == 1 else SampleType.CRUDE, tuple(sorted(names)))


def _samples(file: tarfile.TarFile) -> Iterator[dict[str, tarfile.TarInfo]]:
    """Yield each sample's members by extension. The case is kept, because Energon does not lower it."""
    named = ((split_name(info.name.removeprefix("./")), info) for info in file if info.isfile())
    for key, group in itertools.groupby(((name[0], info) for name, info in named if name), key=lambda each: each[0]):
        yield {info.name.removeprefix("./")[len(key) + 1 :]: info for _, info in group}


def _kind_of(file: tarfile.TarFile, members: Mapping[str, tarfile.TarInfo]) -> SampleType:
    kinds = [kind for kind in (media_kind(ext.lower()) for ext in members) if kind is not None]
    images = kinds.count("image")
    # Energon's types have no sounds, and its videos need a cooker of the user.
    if images > 1 or len(kinds) > images or not _has_caption(file, members):
        return SampleType.CRUDE
    return SampleType.CAPTIONING if images else SampleType.TEXT


def _has_caption(file: tarfile.TarFile, members: Mapping[str, tarfile.TarInfo]) -> bool:
    """Whether ``_CAPTION`` finds a caption and the sample has no ``parts``."""
    fields: object = {}
    if "json" in members:
        content = file.extractfile(members["json"])
        try:
            fields = parse_member(content.read() if content else b"")
        except SampleError:
            return False
    if not isinstance(fields, dict) or "parts" in fields:
        return False
    captions = fields.get("captions")
    if "caption" in fields:
        return isinstance(fields["caption"], str)
    return "txt" in members or (isinstance(captions, list) and bool(captions) and isinstance(captions[0], str))


def write_energon_meta(folder: Path, shards: Mapping[str, EnergonShard], split: str) -> SampleType:
    """Write ``.nv-meta`` with all shards in one split.

    Args:
        folder: Folder of the tars.
        shards: Metadata of each tar, by its path relative to ``folder``, in order.
        split: ``train``, ``val`` or ``test``.

    Returns:
        The type that fits the samples of all shards.
    """
    kind = _common(list(shards.values()))
    dataset: dict[str, object] = {"sample_type": {"__module__": "megatron.energon", "__class__": kind.value}}
    if kind is SampleType.CRUDE:
        dataset = {"__module__": "megatron.energon", "__class__": kind.value}
    elif kind is SampleType.CAPTIONING:
        names = sorted({name for shard in shards.values() for name in shard.image_names})
        dataset["field_map"] = {"image": ",".join(names), "caption": _CAPTION}
    else:
        dataset["field_map"] = {"text": _CAPTION}
    parts: dict[str, list[str]] = {name: [] for name in ("train", "val", "test")}
    parts[split] = list(shards)
    meta = folder / META
    meta.mkdir(exist_ok=True)
    counts = {"shard_counts": {name: shard.num_samples for name, shard in shards.items()}}
    write_whole(meta / ".info.json", json.dumps(counts, indent=2).encode())
    write_whole(meta / "split.yaml", _yaml({"split_parts": parts, "exclude": []}))
    write_whole(meta / "dataset.yaml", _yaml(dataset))
    return kind


def _common(shards: Sequence[EnergonShard]) -> SampleType:
    kinds = {shard.kind for shard in shards}
    names = {name for shard in shards for name in shard.image_names}
    return kinds.pop() if len(kinds) == 1 and len(names) <= _MAX_IMAGE_NAMES else SampleType.CRUDE


def _yaml(value: object) -> bytes:
    return yaml.safe_dump(value, sort_keys=False).encode()
