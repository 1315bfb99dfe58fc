"""The samples of the rows of a sample log: shard, key, text and thumbnails.

    LogRow --manifest, index--> shard and key --shard, if available--> text as the model reads it, thumbnails

Shard and key of a sample are found in the manifest and the index of its shard. The shard itself is opened only to
describe a sample; if it is missing, the description has a note. Not for: the rows of a step (``sample_log``,
``replay``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from braceexpand import braceexpand

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataPipelineError, SampleLogError
from data_pipeline.history.replay import Replay
from data_pipeline.history.sample_log import LogRow
from data_pipeline.history.text_spans import TextSpan, text_spans
from data_pipeline.images.thumbnail import thumbnails
from data_pipeline.loader.front_to_back import sample_number, source_of
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.state import Drawn, LoaderState
from data_pipeline.sample import ImagePart, VideoPart
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader
from data_pipeline.shards.tar_stream import PIPE
from data_pipeline.storage.storage import Storage
from data_pipeline.text.templates.base import media_of
from data_pipeline.text.tokenizer import Tokenizer, load_tokenizer

_THUMBNAIL_SIDE = 144
"""Length of the longer side of a thumbnail, in pixels."""
_MAX_INDEXES = 16
"""Most indexes of shards that are cached."""


@dataclass(frozen=True)
class SampleDescription:
    """A row of a sample log and the sample that it refers to.

    Attributes:
        row: The row.
        shard: Path or URL of the sample's shard; empty if unknown.
        key: Key of the sample in the shard; empty if unknown.
        text_spans: The document as the model reads it; None if it could not be made.
        thumbnails: Thumbnails of the sample's images and of frames of its videos, as JPEG.
        notes: Reasons why something is missing, and differences from the row.
    """

    row: LogRow
    shard: str = ""
    key: str = ""
    text_spans: tuple[TextSpan, ...] | None = None
    thumbnails: tuple[bytes, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The text of the document in one line, with ``[image]``, ``[video]`` or ``[audio]`` for each input."""
        texts = (span.text if span.is_text else f"[{span.kind}]" for span in self.text_spans or ())
        return " ".join("".join(texts).split())


class SampleCatalog:
    """Finds and describes the samples of a data block.

    Args:
        config: The data block.
        spec: The model's inputs.
        seed: Seed of the run.
        state: State of the loader when the rows were written; methods raise SampleLogError for a data set whose
            manifest has changed since. None: no such check.

    Manifests, indexes, shards and the tokenizer are opened at first use, so a missing one affects only the methods that
    need it.
    """

    def __init__(self, config: DataConfig, spec: MediaSpec, seed: int, state: LoaderState | None = None) -> None:
        self._config, self._spec, self._seed, self._state = config, spec, seed, state
        self._names = [dataset.name for dataset in config.datasets]
        self._indexed = {d.name: d.indexed for d in config.datasets if d.manifest is not None}
        # ``expand_shards`` would raise for missing files.
        self._streamed = {
            d.name: [*chain(*map(braceexpand, d.shards))] for d in config.datasets if d.shards and not d.code
        }
        self._code = {d.name: ", ".join(d.code) for d in config.datasets if d.code}
        self._storage = Storage(config.storage, config.cache)
        self._readers: dict[str, SampleReader] = {}
        self._indexes: dict[tuple[str, int], ShardIndex] = {}

    @cached_property
    def _replay(self) -> Replay:
        if self._code:  # A run folder, with its configuration, may come from somebody else.
            raise SampleLogError(
                f"not shown: `data trace` runs no Python code, and the data set {min(self._code)} needs its own code"
            )
        return Replay(self._config, self._spec, self._seed, lanes=())

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._config.tokenizer)

    def _reader(self, dataset: str) -> SampleReader:
        if dataset not in self._readers:
            manifest = Manifest.open(self._indexed[dataset], self._storage)
            if self._state is not None and self._state.changed({f"{dataset}.manifest": manifest.fingerprint}):
                raise SampleLogError(
                    f"{manifest.path} changed since this step was logged: its numbers mean other samples now"
                )
            self._readers[dataset] = SampleReader(manifest, dataset)
        return self._readers[dataset]

    @property
    def sizes(self) -> dict[str, int]:
        """Number of samples of each data set with a manifest.

        Raises:
            ManifestError, StorageError: a manifest is missing or damaged.
            SampleLogError: a manifest has changed since the rows were written.
        """
        return {name: self._reader(name).manifest.num_samples for name in self._indexed}

    def where(self, dataset: str, sample: int) -> tuple[str, str]:
        """Return shard and key of a sample, from manifest and index; the tar is not needed.

        Without an index the key is the sample's row in its shard, for example ``#17``. For a data set with the user's
        code the result is the code's import path and the number of the sample.

        Raises:
            SampleLogError: the configuration has no such data set or sample, or the manifest has changed.
            DataConfigError: a data set of plain tars has fewer shards than the sample's number requires.
            ManifestError, StorageError: the manifest is missing or damaged; or the index is missing, damaged, or not
                the one that the manifest names.
        """
        if dataset in self._code:
            return self._code[dataset], f"#{sample}"
        if dataset in self._streamed:  # The key is unknown until the shard is read up to the sample.
            return source_of(self._streamed[dataset], sample)
        number, row = self._manifest(dataset, sample).locate(sample)
        return self.shard(dataset, sample), self._index(dataset, number).row(row).key

    def shard(self, dataset: str, sample: int) -> str:
        """Return the shard of a sample, from the manifest; the index is not needed.

        Raises:
            SampleLogError: as ``where``.
        """
        if dataset in self._code or dataset in self._streamed:
            return self.where(dataset, sample)[0]
        manifest = self._manifest(dataset, sample)
        return str(manifest.shard_location(manifest.locate(sample)[0]))

    def find(self, shard: str, key: str) -> Iterator[tuple[str, int]]:
        """Yield data set and number of the samples with a key in the shards with a name or path.

        Args:
            shard: Name, full path or URL of the shard, or the end of its path.
            key: Key of the sample.

        Raises:
            ManifestError, StorageError: a manifest, or the index of such a shard, is missing or damaged.
            SampleLogError: a manifest has changed.
        """
        for dataset in self._indexed:
            manifest = self._reader(dataset).manifest
            for number in manifest.find_shards(shard.rpartition("/")[2]):
                path = str(manifest.shard_location(number))
                if path == shard or path.endswith(f"/{shard}"):
                    index = self._index(dataset, number)
                    rows = (row for row in range(len(index)) if index.row(row).key == key)
                    yield from ((dataset, int(manifest.cu_samples[number]) + row) for row in rows)

    def find_streamed(self, shard: str, key: str) -> Iterator[tuple[str, int]]:
        """As ``find``, for shards without an index; the key is the sample's row in the shard, for example ``#17``.

        Raises:
            SampleLogError: there is such a shard, and the key is not of this form.
        """
        for dataset, sources in self._streamed.items():
            for number, source in enumerate(sources):
                if source == shard or source.endswith(f"/{shard}"):
                    if not (key.startswith("#") and key[1:].isdecimal()):
                        raise SampleLogError(
                            f"{source} has no index: give the number of the sample in the shard, such as {source}/#0 "
                            "for the first"
                        )
                    yield dataset, sample_number(number, int(key[1:]))

    def describe(self, row: LogRow, max_thumbnails: int = 0) -> SampleDescription:
        """Describe the sample of a row, as far as possible. A ``DataPipelineError`` becomes a note."""
        shard, key, notes = "", "", list[str]()
        try:
            shard = self.shard(row.dataset, row.sample)
            shard, key = self.where(row.dataset, row.sample)
            if shard.startswith(PIPE):
                raise SampleLogError("not shown: its shard is the output of a command, and `data trace` runs none")
            document = self._replay.document(Drawn(self._names.index(row.dataset), row.epoch, row.sample, row.part))
            if row.dataset in self._streamed and document.provenance is not None:
                key = document.provenance.key
            if row.tokens and document.num_tokens != row.tokens:
                notes.append(f"it had {row.tokens} tokens in this step and has {document.num_tokens} now")
            spans = tuple(text_spans(document, self._tokenizer, self._spec))
            thumbnails = self._thumbnails(row, max_thumbnails) if max_thumbnails and document.num_images else []
        except DataPipelineError as error:
            return SampleDescription(row, shard, key, notes=(str(error),))
        return SampleDescription(row, shard, key, spans, tuple(thumbnails), tuple(notes))

    def _thumbnails(self, row: LogRow, limit: int) -> list[bytes]:
        if row.dataset in self._streamed:
            return []  # They would require another pass over the shard.
        sample = self._reader(row.dataset).read(row.sample, row.epoch)
        images = [part for part in media_of(sample) if isinstance(part, ImagePart | VideoPart)]
        return [each for part in images[:limit] for each in thumbnails(part, _THUMBNAIL_SIDE)][:limit]

    def _manifest(self, dataset: str, sample: int) -> Manifest:
        if dataset not in self._indexed:
            raise SampleLogError(f"this step used a data set {dataset}, which the run's config.yaml no longer has")
        manifest = self._reader(dataset).manifest
        if sample >= manifest.num_samples:
            raise SampleLogError(f"{manifest.path} has no sample {sample}: it has {manifest.num_samples} samples")
        return manifest

    def _index(self, dataset: str, number: int) -> ShardIndex:
        if (dataset, number) not in self._indexes:
            self._indexes = dict(list(self._indexes.items())[1 - _MAX_INDEXES :])
            self._indexes[dataset, number] = self._reader(dataset).manifest.read_index(number)
        return self._indexes[dataset, number]

    def close(self) -> None:
        """Close all shards."""
        for reader in self._readers.values():
            reader.close()
