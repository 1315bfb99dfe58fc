"""What the rows of a ledger stand for: shard, key, text and pictures of samples.

    Row --manifest, index--> shard and key --shard, if it is there--> text as the model read it, thumbnails

Shard and key need the manifest and the sidecar index alone. A shard is opened only for the samples that are shown; if
it is gone, its rows say so. Not for: which rows a step has (``sample_log``, ``replay``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from braceexpand import braceexpand

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataPipelineError, LedgerError
from data_pipeline.history.replay import Replay
from data_pipeline.history.sample_log import Row
from data_pipeline.history.text_spans import Stretch, stretches
from data_pipeline.images.thumbnail import thumbnail
from data_pipeline.loader.front_to_back import sample_number, source_of
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.state import Drawn, LoaderState
from data_pipeline.sample import ImagePart
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader
from data_pipeline.shards.tar_stream import PIPE
from data_pipeline.storage.storage import Storage
from data_pipeline.text.tokenizer import Tokenizer, load_tokenizer

_SIDE = 144
"""Pixels of the longer side of a thumbnail."""
_MAX_HELD = 16


@dataclass(frozen=True)
class Shown:
    """A row and what it stands for.

    Attributes:
        row: The ledger's row.
        shard: Where the sample's shard lies; empty if nobody can say.
        key: Key inside the shard; empty without its index.
        stretches: The document as the model read it; None if it could not be read.
        thumbnails: Small pictures of the sample's images, as JPEG.
        notes: What could not be shown, and why.
    """

    row: Row
    shard: str = ""
    key: str = ""
    stretches: tuple[Stretch, ...] | None = None
    thumbnails: tuple[bytes, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The stretches in one line, images as ``[image]``."""
        words = ("[image]" if one.kind == "image" else one.text for one in self.stretches or ())
        return " ".join("".join(words).split())


class Samples:
    """The samples of a data block.

    Args:
        config: The data block.
        spec: What the model takes.
        seed: Seed of the run.
        state: Of the loader when the rows were written: a manifest that is another one now names other samples.

    What is missing, a manifest, an index, a shard, the tokenizer, is missed when it is asked for, and not before.
    """

    def __init__(self, config: DataConfig, spec: MediaSpec, seed: int, state: LoaderState | None = None) -> None:
        self._config, self._spec, self._seed, self._state = config, spec, seed, state
        self._names = [dataset.name for dataset in config.datasets]
        self._indexed = {d.name: d.indexed for d in config.datasets if d.manifest is not None}
        # Their files need not be there.
        self._streamed = {
            d.name: [*chain(*map(braceexpand, d.shards))] for d in config.datasets if d.shards and not d.code
        }
        self._code = {d.name: ", ".join(d.code) for d in config.datasets if d.code}
        self._storage = Storage(config.storage, config.cache)
        self._readers: dict[str, SampleReader] = {}
        self._indexes: dict[tuple[str, int], ShardIndex] = {}

    @cached_property
    def _replay(self) -> Replay:
        if self._code:  # The configuration may have come with a run folder.
            raise LedgerError(f"a trace runs no Python code, and the data set {min(self._code)} is such code")
        return Replay(self._config, self._spec, self._seed, lanes=())

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._config.tokenizer)

    def _reader(self, dataset: str) -> SampleReader:
        if dataset not in self._readers:
            manifest = Manifest.open(self._indexed[dataset], self._storage)
            if self._state is not None and self._state.changed({f"{dataset}.manifest": manifest.fingerprint}):
                raise LedgerError(f"{manifest.path} changed since this was written down: it names other samples now")
            self._readers[dataset] = SampleReader(manifest, dataset)
        return self._readers[dataset]

    @property
    def sizes(self) -> dict[str, int]:
        """Samples of each data set with a manifest.

        Raises:
            ManifestError, StorageError: one is missing or damaged.
        """
        return {name: self._reader(name).manifest.num_samples for name in self._indexed}

    def where(self, dataset: str, sample: int) -> tuple[str, str]:
        """Shard and key, from manifest and index; the tar itself may be gone. Of a streamed sample its number in the
        shard stands for the key.

        Raises:
            LedgerError: the configuration has no such data set, or its manifest is another one now.
            ManifestError: the index is missing, damaged, or another one than the manifest knows.
        """
        if dataset in self._code:
            return self._code[dataset], f"#{sample}"
        if dataset in self._streamed:  # Its key takes reading the shard up to it.
            return source_of(self._streamed[dataset], sample)
        number, row = self._manifest(dataset, sample).locate(sample)
        return self.shard(dataset, sample), self._index(dataset, number).row(row).key

    def shard(self, dataset: str, sample: int) -> str:
        """The shard alone, from the manifest.

        Raises:
            LedgerError: as ``where``.
        """
        if dataset in self._code or dataset in self._streamed:
            return self.where(dataset, sample)[0]
        manifest = self._manifest(dataset, sample)
        return str(manifest.shard_location(manifest.locate(sample)[0]))

    def find(self, shard: str, key: str) -> Iterator[tuple[str, int]]:
        """Data set and number of the samples with this key in a shard of this name or path.

        Raises:
            ManifestError: the index of such a shard is missing or damaged.
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
        """The same of data sets without an index, whose samples are named by their place: ``#17`` for a key.

        Raises:
            LedgerError: such a shard is there, and the key is no place.
        """
        for dataset, sources in self._streamed.items():
            for number, source in enumerate(sources):
                if source == shard or source.endswith(f"/{shard}"):
                    if not (key.startswith("#") and key[1:].isdecimal()):
                        raise LedgerError(
                            f"{source} has no index: name its samples by their place, {source}/#0 the first"
                        )
                    yield dataset, sample_number(number, int(key[1:]))

    def show(self, row: Row, max_thumbnails: int = 0) -> Shown:
        """Whatever can be said of a row; never fails for what is missing."""
        shard, key, notes = "", "", list[str]()
        try:
            shard = self.shard(row.dataset, row.sample)
            shard, key = self.where(row.dataset, row.sample)
            if shard.startswith(PIPE):
                raise LedgerError("it comes out of a command, and a trace runs none")
            document = self._replay.document(Drawn(self._names.index(row.dataset), row.epoch, row.sample, row.part))
            if row.dataset in self._streamed and document.provenance is not None:
                key = document.provenance.key
            if row.tokens and document.num_tokens != row.tokens:
                notes.append(f"it had {row.tokens} tokens then and has {document.num_tokens} now")
            words = tuple(stretches(document, self._tokenizer, self._spec))
            pictures = self._thumbnails(row, max_thumbnails) if max_thumbnails and document.num_images else []
        except DataPipelineError as error:
            return Shown(row, shard, key, notes=(str(error),))
        return Shown(row, shard, key, words, tuple(pictures), tuple(notes))

    def _thumbnails(self, row: Row, limit: int) -> list[bytes]:
        if row.dataset in self._streamed:
            return []  # That would be another pass over the shard.
        sample = self._reader(row.dataset).read(row.sample, row.epoch)
        images = [part for part in sample.parts if isinstance(part, ImagePart)]
        return [thumbnail(part.data, _SIDE) for part in images[:limit]]

    def _manifest(self, dataset: str, sample: int) -> Manifest:
        if dataset not in self._indexed:
            raise LedgerError(f"the run's config.yaml has no data set {dataset} (it had one when this step was done)")
        manifest = self._reader(dataset).manifest
        if sample >= manifest.num_samples:
            raise LedgerError(f"{manifest.path} has {manifest.num_samples} samples, and no sample {sample}")
        return manifest

    def _index(self, dataset: str, number: int) -> ShardIndex:
        if (dataset, number) not in self._indexes:
            self._indexes = dict(list(self._indexes.items())[1 - _MAX_HELD :])
            self._indexes[dataset, number] = self._reader(dataset).manifest.read_index(number)
        return self._indexes[dataset, number]

    def close(self) -> None:
        """Closes every shard."""
        for reader in self._readers.values():
            reader.close()
