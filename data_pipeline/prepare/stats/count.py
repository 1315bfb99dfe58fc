"""Compute statistics of a data set from its indexes and its texts. No image is decoded.

    shard --index--> sizes, aspect ratios, members, copies ----+
    shard --texts--> characters, tokens, languages, documents -+--> Tally --merge, shard after shard--> summary

With ``sample``, at most that many samples are counted, spread evenly over the data set by a fixed seed. Then every
share, and the rank of every quantile, is within ``share_error_95`` of the whole set's with 95 % certainty. Source:
Massart 1990, "The Tight Constant in the Dvoretzky-Kiefer-Wolfowitz Inequality", for samples drawn independently; an
even spread is at least as accurate. A process needs memory for the columns of one shard; copies need 64 MiB.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.config import DatasetConfig
from data_pipeline.errors import SampleError
from data_pipeline.io.ordered_pool import in_order
from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.prepare.stats.copies import CopyCount, image_keys
from data_pipeline.prepare.stats.histogram import Histogram
from data_pipeline.prepare.stats.languages import detect, has_identifier
from data_pipeline.prepare.stats.tally import MAX_EXAMPLES, PER_RATIO, Tally, count_names
from data_pipeline.sample import Sample, StoredFrames, TextPart, VideoPart
from data_pipeline.shards.audio_file import MAX_CHANNELS, MAX_RATE
from data_pipeline.shards.image_header import is_image
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.media_kind import media_kind
from data_pipeline.shards.sample_reader import SampleReader
from data_pipeline.storage.config import CacheConfig, StorageConfig
from data_pipeline.storage.location import Url
from data_pipeline.storage.storage import Storage
from data_pipeline.text.tokenizer import Tokenizer, TokenizerConfig, check_unicode, load_tokenizer

_LANGUAGES_OF = 1_000_000
"""Detect the language of at most about this many samples; in larger sets, of every n-th."""
_TINY_SIDE, _NARROW = 32, 8
_MAX_KINDS = 62
_MAX_SIDE = 1 << 31
"""Clip larger sides: such headers are wrong, and a product of two of them would overflow 64 bits."""
_MAX_SAMPLES = 1 << 50
"""Clip longer sounds, whose milliseconds would overflow 64 bits."""
_SEED = 0x5EED

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Training:
    """Settings of a run, by which tokens, patches and cost of its documents are counted."""

    dataset: DatasetConfig
    spec: MediaSpec
    max_tokens: int


@dataclass(frozen=True)
class CountTask:
    """One shard, and the rows of its samples to count; None counts all."""

    number: int
    rows: Indices | None = None


@dataclass(frozen=True)
class DatasetStatistics:
    """Result of ``count``.

    Attributes:
        summary: All statistics as a JSON object.
        tally: Counts and histograms.
        shards: Histogram of samples per shard.
    """

    summary: dict[str, Any]
    tally: Tally
    shards: Histogram


@dataclass(frozen=True)
class ManifestLocation:
    """A manifest's path or URL, and the settings for reading a remote one; None means those of the environment."""

    location: Path | Url
    storage: StorageConfig | None = None
    cache: CacheConfig | None = None

    def open(self) -> Manifest:
        """Open the manifest.

        Raises:
            ManifestError, StorageError: the manifest is missing or damaged, or a server fails.
        """
        is_configured = self.storage is not None or self.cache is not None
        return Manifest.open(self.location, Storage(self.storage, self.cache) if is_configured else None)


def count(
    location: Path | ManifestLocation,
    *,
    tokenizer: TokenizerConfig | None = None,
    training: Training | None = None,
    sample: int | None = None,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> DatasetStatistics:
    """Compute the statistics of one manifest's samples.

    Args:
        location: The manifest.
        tokenizer: Tokenizer for counting the tokens of texts; None does not count them.
        training: Settings for counting the documents of a run; needs ``tokenizer``. None does not count them.
        sample: Count at most this many samples, spread evenly. None, or a number that is not smaller, counts all.
        workers: Number of processes; 0 works in this one. The result is the same.
        progress: Called with the number of samples done since the last call.

    Raises:
        ManifestError: the manifest or an index is missing, damaged or stale.
        ShardError, StorageError: a shard is shorter than its index says, or a server fails.
        DataConfigError: the tokenizer cannot be loaded.
    """
    location = location if isinstance(location, ManifestLocation) else ManifestLocation(location)
    manifest = location.open()
    chosen = None if sample is None or sample >= manifest.num_samples else spread(manifest.num_samples, sample)
    num_looked_at = manifest.num_samples if chosen is None else len(chosen)
    work = CountWork(location, tokenizer, training, max(1, -(-num_looked_at // _LANGUAGES_OF)))
    tally, copies = Tally(), CopyCount()
    for part in in_order(work, _tasks(manifest, chosen), workers):
        copies.add(part.keys)
        tally.merge(part)
        if progress is not None:
            progress(part.num_samples)
    shards = Histogram()
    shards.add(np.diff(manifest.cu_samples))
    summary: dict[str, Any] = {
        "samples": manifest.num_samples,
        "shards": manifest.num_shards,
        "bytes": sum(manifest.shard_bytes(number) for number in range(manifest.num_shards)),
        "samples_per_shard": shards.summary(),
        "looked_at": tally.num_samples,
        "share_error_95": 0.0 if chosen is None else round(share_error(len(chosen)), 6),
        **tally.summary(),
        "languages_of_one_script_told_apart": has_identifier(),
    }
    if chosen is None:  # A subset would rarely contain both an image and its copy.
        summary["copies"] = copies.summary()
    return DatasetStatistics(summary, tally, shards)


def share_error(num_samples: int) -> float:
    """Return the half-width of a 95 % band around an empirical distribution function (Massart 1990)."""
    return min(1.0, math.sqrt(math.log(2 / 0.05) / (2 * num_samples)))


def spread(total: int, num: int) -> Indices:
    """Choose up to ``num`` different numbers of ``range(total)``, ascending, by a fixed seed.

    One point is drawn from each of ``num`` equal parts and rounded down. Two adjacent points may become one number, so
    the result can have fewer numbers: 950 for 1000 of 1500.
    """
    within = np.random.default_rng(_SEED).random(num)
    return np.unique(((np.arange(num) + within) * (total / num)).astype(np.int64).clip(0, max(total - 1, 0)))


def _tasks(manifest: Manifest, chosen: Indices | None) -> Iterator[CountTask]:
    if chosen is None:
        yield from (CountTask(number) for number in range(manifest.num_shards))
        return
    owner = np.searchsorted(manifest.cu_samples, chosen, side="right") - 1
    cuts = np.flatnonzero(np.diff(owner)) + 1
    for rows, numbers in zip(np.split(chosen, cuts), np.split(owner, cuts), strict=True):
        if len(rows):
            yield CountTask(int(numbers[0]), rows - int(manifest.cu_samples[numbers[0]]))


@dataclass(frozen=True)
class CountWork:
    """Counts a shard; run by worker processes (``ordered_pool.in_order``)."""

    location: ManifestLocation
    tokenizer: TokenizerConfig | None
    training: Training | None
    language_stride: int

    @cached_property
    def _manifest(self) -> Manifest:
        return self.location.open()

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        return None if self.tokenizer is None else load_tokenizer(self.tokenizer)

    @cached_property
    def _builder(self) -> DocumentBuilder | None:
        if self.training is None or self._tokenizer is None:
            return None
        return DocumentBuilder(self.training.dataset, self._tokenizer, self.training.spec)

    def __call__(self, task: CountTask) -> Iterator[Tally]:
        index = self._manifest.open_index(task.number)
        rows = np.arange(len(index)) if task.rows is None else task.rows
        tally = Tally(num_samples=len(rows))
        if len(rows):
            _count_members(index, rows, tally)
            reader = SampleReader(self._manifest, "stats", max_open=1)
            with contextlib.closing(reader):
                self._count_texts(reader, rows + int(self._manifest.cu_samples[task.number]), tally)
        yield tally

    def _count_texts(self, reader: SampleReader, indices: Indices, tally: Tally) -> None:
        characters, tokens = list[int](), list[int]()
        documents: dict[str, list[int]] = {"tokens": [], "patches": [], "cost": []}
        for index in indices.tolist():
            try:
                sample = reader.read_without_images(index)
                texts = _texts_of(sample)
            except SampleError as error:
                _record_unreadable(tally, error)
                continue
            _count_stored_frames(sample, tally)
            tally.odd["no_text"] += not any(texts)
            tally.odd["no_image"] += all(isinstance(part, TextPart) for part in sample.parts)
            characters += map(len, texts)
            if self._tokenizer is not None:
                tokens += (len(self._tokenizer.encode(text)) for text in texts)
                tally.odd["names_a_token"] += any(map(self._tokenizer.names_token, texts))
            if index % self.language_stride == 0:
                count_names(tally.languages, Counter(detect(text) for text in texts if text))
            self._dry_run(sample, documents, tally)
        tally.texts["characters"].add(characters)
        tally.texts["tokens"].add(tokens)
        for name, values in documents.items():
            tally.documents[name].add(values)

    def _dry_run(self, sample: Sample, documents: dict[str, list[int]], tally: Tally) -> None:
        if self._builder is None or self.training is None:
            return
        try:
            document = self._builder.dry_run(sample)
        except SampleError as error:
            _record_unreadable(tally, error)
            return
        documents["tokens"].append(document.num_tokens)
        documents["patches"].append(document.num_patches)
        documents["cost"].append(round(document.cost(self.training.spec)))
        tally.num_too_long += document.num_tokens > self.training.max_tokens


def _texts_of(sample: Sample) -> Sequence[str]:
    try:
        for text in sample.texts:
            check_unicode(text)
    except SampleError as error:
        raise error.located(sample.provenance.shard, sample.provenance.key) from error
    return sample.texts


def _record_unreadable(tally: Tally, error: SampleError) -> None:
    tally.refused[error.kind.value] += 1
    if len(tally.examples) < MAX_EXAMPLES:
        tally.examples.append(str(error))


def _count_members(index: ShardIndex, rows: Indices, tally: Tally) -> None:
    """Count the members of samples ``rows``, from the index."""
    cu_members = index.column("cu_members")
    counts = np.diff(cu_members)[rows]
    starts = np.concatenate([[0], np.cumsum(counts)])
    members = np.repeat(cu_members[rows] - starts[:-1], counts) + np.arange(starts[-1])
    ext = index.column("ext")[members]
    names, times = np.unique(ext, return_counts=True)
    count_names(tally.members, {index.extensions[n]: int(t) for n, t in zip(names, times, strict=True)})
    _count_kinds(index, ext, starts, tally)

    image = np.array([is_image(name) for name in index.extensions], bool)[ext]
    tally.samples["images"].add(np.add.reduceat(image.astype(np.int64), starts[:-1]))
    tally.samples["text_bytes"].add(index.column("text_bytes")[rows])
    image_members = members[image]
    width, height, size = (index.column(name)[image_members].astype(np.int64) for name in ("width", "height", "size"))
    tally.keys = image_keys(index.column("crc32")[image_members], size)
    tally.images["bytes"].add(size)
    good = (width > 0) & (height > 0)
    tally.odd["damaged_header"] += int((~good).sum())
    width, height = (np.minimum(side[good], _MAX_SIDE) for side in (width, height))
    tally.odd["side_below_32"] += int((np.minimum(width, height) < _TINY_SIDE).sum())
    tally.odd["side_8_times_the_other"] += int((np.maximum(width, height) >= _NARROW * np.minimum(width, height)).sum())
    for kind, count_clips in (("video", _count_videos), ("audio", _count_sounds)):
        count_clips(index, members[np.array([media_kind(name) == kind for name in index.extensions], bool)[ext]], tally)
    values = {
        "width": width,
        "height": height,
        "pixels": width * height,
        "aspect_ratio": np.rint(width / height * PER_RATIO),
    }
    for name, each in values.items():
        tally.images[name].add(each)


def _count_videos(index: ShardIndex, members: Indices, tally: Tally) -> None:
    """Count the videos among the members of a shard, from the index."""
    if not len(members):
        return
    tally.videos["bytes"].add(index.column("size")[members])
    found = {name: index.column(name)[members].astype(np.int64) for name in ("num_frames", "microseconds")}
    sides = {name: index.column(name)[members].astype(np.int64) for name in ("width", "height")}
    good = found["num_frames"] > 0
    tally.odd["damaged_video"] += int((~good).sum())
    tally.videos["frames"].add(found["num_frames"][good])
    tally.videos["seconds"].add(found["microseconds"][good] * PER_RATIO // 1_000_000)
    for name, side in sides.items():
        tally.videos[name].add(np.minimum(side[good], _MAX_SIDE))


def _count_stored_frames(sample: Sample, tally: Tally) -> None:
    """Count the videos of a sample that are stored as images, which the index does not list as videos."""
    for part in sample.parts:
        if isinstance(part, VideoPart) and isinstance(part.data, StoredFrames):
            if part.size is None or not part.size.num_frames:
                tally.odd["damaged_video"] += 1
                continue
            size = part.size
            values = [size.num_frames, size.microseconds * PER_RATIO // 1_000_000, size.width, size.height]
            for name, value in zip(("frames", "seconds", "width", "height"), values, strict=True):
                tally.videos[name].add([value])


def _count_sounds(index: ShardIndex, members: Indices, tally: Tally) -> None:
    """Count the sounds among the members of a shard, from the index."""
    if not len(members):
        return
    tally.sounds["bytes"].add(index.column("size")[members])
    samples, rate, channels = (index.column(name)[members].astype(np.int64) for name in ("samples", "rate", "channels"))
    good = (samples > 0) & (rate > 0)
    tally.odd["damaged_audio"] += int((~good).sum())
    tally.sounds["seconds"].add(np.minimum(samples[good], _MAX_SAMPLES) * PER_RATIO // rate[good])
    tally.sounds["rate"].add(np.minimum(rate[good], MAX_RATE))
    tally.sounds["channels"].add(np.minimum(channels[good], MAX_CHANNELS))


def _count_kinds(index: ShardIndex, ext: npt.NDArray[np.uint16], starts: Indices, tally: Tally) -> None:
    """Count samples by the set of their members' kinds. A kind is the last part of an extension."""
    kinds = sorted({name.rpartition(".")[2] for name in index.extensions})
    names = kinds[:_MAX_KINDS] + (["other"] if len(kinds) > _MAX_KINDS else [])
    bit = {kind: 1 << min(number, _MAX_KINDS) for number, kind in enumerate(kinds)}
    bits = np.array([bit[name.rpartition(".")[2]] for name in index.extensions], np.int64)[ext]
    sets, times = np.unique(np.bitwise_or.reduceat(bits, starts[:-1]), return_counts=True)
    for found, num in zip(sets.tolist(), times.tolist(), strict=True):
        count_names(tally.kinds, {"+".join(kind for i, kind in enumerate(names) if found >> i & 1): num})
