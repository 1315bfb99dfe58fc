"""Read a few samples of a data set for a person to look at: thumbnails and texts. Not for: statistics (``count``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import SampleError
from data_pipeline.images.thumbnail import thumbnails
from data_pipeline.prepare.stats.count import spread
from data_pipeline.prepare.stats.languages import detect
from data_pipeline.sample import ImagePart, VideoPart
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader
from data_pipeline.text.templates.base import media_of

_SIDE = 208
_MAX_THUMBNAILS = 4
_MAX_CHARACTERS = 400


@dataclass(frozen=True)
class GallerySample:
    """One sample to display.

    Attributes:
        index: Number of the sample in the manifest.
        shard: File name of its shard.
        key: Key of the sample.
        thumbnails: JPEG bytes of its first images, at most four; of a video, of four frames.
        num_images: Number of images and videos in the sample.
        size: Width and height of the first image, pixels; None without one.
        texts: The sample's texts, each cut after 400 characters.
        languages: Languages of the texts, without repetition.
        problem: Why the sample, or one of its first four images, cannot be read; empty if nothing is wrong.
    """

    index: int
    shard: str
    key: str
    thumbnails: tuple[bytes, ...] = ()
    num_images: int = 0
    size: tuple[int, int] | None = None
    texts: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    problem: str = ""


def gallery(manifest: Manifest, num: int) -> Iterator[GallerySample]:
    """Yield at most ``num`` samples spread evenly over the manifest (``spread``); the same ones on every call.

    Raises:
        ManifestError, ShardError, StorageError: an index or a shard is missing or damaged, or a server fails.
    """
    with closing(SampleReader(manifest, "stats", max_open=1)) as reader:
        for index in spread(manifest.num_samples, min(num, manifest.num_samples)).tolist():
            shard, key = reader.where(index)
            yield _gallery_sample(reader, index, Path(shard).name, key)


def _gallery_sample(reader: SampleReader, index: int, shard: str, key: str) -> GallerySample:
    try:
        sample = reader.read(index)
    except SampleError as error:
        return GallerySample(index, shard, key, problem=error.reason)
    images = [part for part in media_of(sample) if isinstance(part, ImagePart | VideoPart)]
    shown, problem = list[bytes](), ""
    for image in images[:_MAX_THUMBNAILS]:
        try:
            shown += thumbnails(image, _SIDE, _MAX_THUMBNAILS)
        except SampleError as error:
            problem = problem or f"{image.name}: {error.reason}"
    size = images[0].size[-2:] if images and images[0].size is not None else None
    return GallerySample(
        index,
        shard,
        key,
        tuple(shown[:_MAX_THUMBNAILS]),
        len(images),
        None if size is None else (size[1], size[0]),
        tuple(text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}…" for text in sample.texts),
        tuple(dict.fromkeys(detect(text) for text in sample.texts)),
        problem,
    )
