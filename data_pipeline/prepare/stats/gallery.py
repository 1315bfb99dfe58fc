"""A few samples of a data set as people look at them: small pictures and text. Not for: figures (``count``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import SampleError
from data_pipeline.images.thumbnail import thumbnail
from data_pipeline.prepare.stats.count import spread
from data_pipeline.prepare.stats.languages import detect
from data_pipeline.sample import ImagePart
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader

_SIDE = 208
_MAX_PICTURES = 4
_MAX_CHARACTERS = 400


@dataclass(frozen=True)
class Shown:
    """One sample.

    Attributes:
        index: Its place in the manifest.
        shard: Name of the shard.
        key: Its key.
        pictures: JPEG bytes, at most four.
        num_images: Images that it has.
        size: Width and height of the first image; None without one.
        texts: Its texts, cut where they are long.
        languages: Language of each.
        problem: What could not be read or decoded; empty if nothing.
    """

    index: int
    shard: str
    key: str
    pictures: tuple[bytes, ...] = ()
    num_images: int = 0
    size: tuple[int, int] | None = None
    texts: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    problem: str = ""


def gallery(manifest: Manifest, num: int) -> Iterator[Shown]:
    """``num`` samples, spread evenly over the manifest, always the same ones.

    Raises:
        ManifestError, ShardError, StorageError: an index or a shard is missing or damaged, or a server fails.
    """
    with closing(SampleReader(manifest, "stats", max_open=1)) as reader:
        for index in spread(manifest.num_samples, min(num, manifest.num_samples)).tolist():
            shard, key = reader.where(index)
            yield _shown(reader, index, Path(shard).name, key)


def _shown(reader: SampleReader, index: int, shard: str, key: str) -> Shown:
    try:
        sample = reader.read(index)
    except SampleError as error:
        return Shown(index, shard, key, problem=error.reason)
    images = [part for part in sample.parts if isinstance(part, ImagePart)]
    pictures, problem = list[bytes](), ""
    for image in images[:_MAX_PICTURES]:
        try:
            pictures.append(thumbnail(image.data, _SIDE))
        except SampleError as error:
            problem = problem or f"{image.name}: {error.reason}"
    size = images[0].size if images else None
    return Shown(
        index,
        shard,
        key,
        tuple(pictures),
        len(images),
        None if size is None else (size[1], size[0]),
        tuple(text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}…" for text in sample.texts),
        tuple(dict.fromkeys(detect(text) for text in sample.texts)),
        problem,
    )
