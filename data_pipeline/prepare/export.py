"""Write a data set as plain tars for other tools, without index and manifest, under the old or img2dataset's names.

    manifest --shard by shard, in several processes--> FOLDER/X.tar ...  [+ Energon's metadata]

Every shard is one task, so neither the number of processes nor a kill changes a byte of the result. Tars are written
atomically: a tar under its final name is complete, and the same command writes the missing ones. For other shard sizes
or another order run ``reshard`` first.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataConfigError, SampleError, ShardError
from data_pipeline.io.atomic import replacing, write_whole
from data_pipeline.io.checksums import holds
from data_pipeline.io.ordered_pool import in_order
from data_pipeline.io.untrusted import open_regular
from data_pipeline.prepare.choices import ExportTarget, Split, TarNaming
from data_pipeline.prepare.energon_export import EnergonShard, index_for_energon, write_energon_meta
from data_pipeline.prepare.energon_source import META
from data_pipeline.prepare.records import CAPTION, dump_json
from data_pipeline.prepare.reshard import NamedManifest, StoredSampleReader
from data_pipeline.prepare.rows import Members, SourceRow
from data_pipeline.sample import ImagePart, Provenance, TextPart
from data_pipeline.shards.image_header import is_image
from data_pipeline.shards.interleaved import PARTS
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import assemble
from data_pipeline.shards.writer import encode_sample, end_of_tar
from data_pipeline.storage.location import local_path

_PLAN = ".mmscale-export.json"
_COPIED_AT_ONCE = 8 << 20
_SHARD_DIGITS = 5
_MIN_SAMPLE_DIGITS = 4
"""img2dataset's number of digits at its default of 10,000 samples per shard."""
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class TarExportReport:
    """Counts of an export.

    Attributes:
        num_shards: Tars of the data set.
        num_samples: Samples in them.
        num_resumed: Tars that an earlier, interrupted export had already written.
        sample_type: Energon's type of the samples; None for other readers.
    """

    num_shards: int
    num_samples: int
    num_resumed: int
    sample_type: str | None


def export(
    manifest_path: str | Path,
    output: str | Path,
    *,
    naming: TarNaming = TarNaming.KEEP,
    reader: ExportTarget = ExportTarget.WEBDATASET,
    split: Split = Split.TRAIN,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> TarExportReport:
    """Write the tars of a data set into a folder.

    Args:
        manifest_path: The data set's manifest, a local file.
        output: Folder for the tars; created if missing.
        naming: Names of tars, samples and members.
        reader: Program that will read the tars; for Energon its metadata is written too.
        split: Energon's split for the data set.
        workers: Number of processes; 0 works in this one. The result does not depend on it.
        progress: Called with the number of samples stored since the last call.

    Raises:
        DataConfigError: ``output`` holds a finished export, or an unfinished one of another data set or naming; or the
            manifest is remote.
        SampleError: a sample does not match its checksum, or does not fit ``naming``.
        ShardError: a tar's bytes are not those that the manifest recorded.
        WorkerError: a process died; finished tars stay.
        OSError: the disk is full; finished tars stay.
    """
    output, manifest = local_path(output, "export writes"), Manifest.open(manifest_path)
    source = manifest.file  # Raises for a remote manifest.
    targets = [_target(manifest, number, naming) for number in range(manifest.num_shards)]
    plan = {"manifest": manifest.fingerprint, "naming": naming.value}
    _resume(output, targets, json.dumps(plan, indent=1) + "\n")
    done = {number for number, target in enumerate(targets) if (output / target).exists()}
    counts = (manifest.cu_samples[1:] - manifest.cu_samples[:-1]).tolist()
    if progress is not None:
        progress(sum(counts[number] for number in done))
    left = [number for number in range(manifest.num_shards) if number not in done]
    digits = max(_MIN_SAMPLE_DIGITS, len(str(max(counts, default=1) - 1)))
    for number in in_order(_ShardExporter(source, output, naming, digits), left, workers):
        if progress is not None:
            progress(counts[number])
    kind = None
    if reader is ExportTarget.ENERGON:
        indexed = in_order(_index_for_energon, [output / target for target in targets], workers)
        kind = write_energon_meta(output, dict(zip(targets, indexed, strict=True)), split.value).value
    (output / _PLAN).unlink()
    return TarExportReport(manifest.num_shards, manifest.num_samples, len(done), kind)


def _target(manifest: Manifest, number: int, naming: TarNaming) -> str:
    """Return the path of a tar relative to the output folder."""
    if naming is TarNaming.IMG2DATASET:
        return f"{number:0{_SHARD_DIGITS}d}.tar"
    return manifest.shard_path(number).relative_to(manifest.file.parent).as_posix()


def _resume(output: Path, targets: list[str], wanted: str) -> None:
    plan = output / _PLAN
    if plan.exists():
        if not holds(plan, wanted.encode()) and any(output.rglob("*.tar")):
            raise DataConfigError(
                f"{output}: holds an unfinished export of other data or with other names; finish that export, or "
                "choose another folder"
            )
    else:
        found = next((name for name in (*targets, META) if (output / name).exists()), None)
        if found is not None:
            raise DataConfigError(f"{output / found} exists already; remove it, or choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    write_whole(plan, wanted.encode())


def _index_for_energon(tar: Path) -> Iterator[EnergonShard]:
    yield index_for_energon(tar)


@dataclass(frozen=True)
class _ShardExporter:
    """Task of a worker process: write one shard, then yield its number."""

    manifest: Path
    output: Path
    naming: TarNaming
    digits: int

    def __call__(self, number: int) -> Iterator[int]:
        manifest = Manifest.open(self.manifest)
        target = self.output / _target(manifest, number, self.naming)
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as file:
            file.writelines((self._copied if self.naming is TarNaming.KEEP else self._renamed)(manifest, number))
        yield number

    def _copied(self, manifest: Manifest, number: int) -> Iterator[bytes]:
        tar, digest = manifest.shard_path(number), hashlib.sha256()
        try:
            file = open_regular(tar)
        except OSError as error:
            raise ShardError(f"{tar}: cannot be read: {error.strerror}") from error
        with file:
            while piece := file.read(_COPIED_AT_ONCE):
                digest.update(piece)
                yield piece
        if digest.hexdigest() != manifest.shard_sha256(number):
            raise ShardError(
                f"{tar}: its sha256 differs from that in {self.manifest}; find the damage with mmscale data verify"
            )

    def _renamed(self, manifest: Manifest, number: int) -> Iterator[bytes]:
        index = manifest.open_index(number)
        start, reader = int(manifest.cu_samples[number]), StoredSampleReader((NamedManifest("", self.manifest),))
        size = 0
        for first in range(0, len(index), _ROWS_AT_ONCE):
            numbers = range(first, min(len(index), first + _ROWS_AT_ONCE))
            rows = [SourceRow(n, index.row(n).key, (0, start + n)) for n in numbers]
            for row, members in zip(rows, reader.read(rows), strict=True):
                origin = {"shard": str(index.tar_path), "key": row.key}
                if isinstance(members, SampleError):
                    raise members.located(**origin)
                key = f"{number:0{_SHARD_DIGITS}d}{row.number:0{self.digits}d}"
                try:
                    data = encode_sample(key, to_img2dataset(members, key, row.key)).data
                except SampleError as error:
                    raise error.located(**origin) from error
                size += len(data)
                yield data
        yield end_of_tar(size)


def to_img2dataset(members: Members, key: str, source_key: str) -> Members:
    """Return members as img2dataset writes them: the image, its caption as ``txt``, and a ``json`` with key and status.

    Args:
        members: Members of a sample of one image and one caption after it.
        key: The sample's new key.
        source_key: Its old key; stored as ``source_key`` if it differs and the JSON has no such field.

    Raises:
        SampleError: the sample is not one image with one caption after it.
    """
    sample = assemble(members, Provenance("", "", "", 0))
    match sample.parts:
        case [ImagePart(data=image, name=name), TextPart(text=caption)]:
            pass
        case _:
            found = Counter("text" if isinstance(part, TextPart) else part.kind for part in sample.parts)
            counts = ", ".join(f"{count} of kind {kind}" for kind, count in found.items()) or "no part"
            raise SampleError(
                f"{counts}: the names of img2dataset are for one image followed by one caption; use --naming keep"
            )
    fields = {field: value for field, value in sample.fields.items() if field != PARTS}
    record = {**fields, CAPTION: caption, "key": key, "status": "success", "error_message": None}
    if source_key != key:
        record.setdefault("source_key", source_key)
    others = {ext: content for ext, content in members.items() if not is_image(ext) and ext not in ("txt", "json")}
    return {**others, name.rpartition(".")[2]: image, "txt": caption.encode(), "json": dump_json(record)}
