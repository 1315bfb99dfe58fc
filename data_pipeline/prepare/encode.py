"""Add the token ids of images to samples, as a source for new shards.

    rows of ``reshard`` --chunk of rows--> members --decode, resize--> images --encoder, batches of one size-->
        members and ``jpg.tokens`` --> ``ingest``

The encoder is passed in, because the data side knows no model. A chunk is always encoded as a whole, even if a resumed
ingest needs only its last rows. The batches of the encoder therefore depend on the source alone, and neither the number
of processes nor an interruption changes a bit of the result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.images.transforms import ImageTransform, ScaledTransform, TilesTransform, TransformConfig
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.prepare.reshard import ReshardSource
from data_pipeline.prepare.rows import Members, RowReader, SourceRow
from data_pipeline.shards.image_header import is_image
from data_pipeline.shards.page_images import image_order
from data_pipeline.shards.token_grid import encode_grid, grid_extension, is_grid

_BATCH_PIXELS = 1 << 21
"""Largest number of pixels in a batch of the encoder; one larger image is a batch of its own."""


class GridEncoder(Protocol):
    """An image tokenizer. Every worker process gets a pickled copy, so load the weights in the first call.

    Equal batches must give equal codes in every process.
    """

    @property
    def stride(self) -> int:
        """Pixels of a code, a side."""

    @property
    def codebook_size(self) -> int:
        """Number of codes."""

    @property
    def digest(self) -> str:
        """SHA-256 of everything that determines the codes, hexadecimal."""

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.integer[Any]]:
        """Return the codes ``(N, H / stride, W / stride)`` of RGB images ``(N, 3, H, W)``."""


class EncodedSource:
    """Stored samples with the token ids of their images: a ``RowSource``.

    A sample without images is not changed. Token ids that a sample already has are replaced.

    Args:
        samples: The samples.
        encoder: The image tokenizer.
        transforms: How an image is resized and cropped before it is encoded. Augmentation is not applied.
        grids_only: Leave out the encoded images and store their token ids alone.

    Raises:
        DataConfigError: the transforms do not fit the stride, or cut an image into several crops.
    """

    def __init__(
        self, samples: ReshardSource, encoder: GridEncoder, transforms: TransformConfig, *, grids_only: bool = False
    ) -> None:
        splits = isinstance(transforms, ScaledTransform) and transforms.split is not None
        if isinstance(transforms, TilesTransform) or splits:
            raise DataConfigError(
                f"transforms.kind={transforms.kind}: cuts an image into several crops, but token ids are of one image; "
                "use fixed or native"
            )
        self._samples = samples
        self.image_tokenizer = encoder.digest
        self.reader: RowReader = _GridReader(samples.reader, encoder, transforms, grids_only)
        ImageTransform(transforms, _spec_of(encoder))  # Raises before any process starts.
        settings = f"{encoder.digest} {grids_only} {transforms.model_dump_json()}"
        self._digest = hashlib.sha256(f"{samples.digest()} {settings}".encode()).hexdigest()
        self.description = f"{samples.description}, with token ids of {encoder.codebook_size:,} codes"

    def chunks(self) -> Iterator[Sequence[SourceRow]]:
        for chunk in self._samples.chunks():
            whole = tuple(chunk)
            yield [SourceRow(row.number, row.key, (whole, position)) for position, row in enumerate(whole)]

    def count(self) -> int | None:
        return self._samples.count()

    def digest(self) -> str:
        return self._digest


@dataclass
class _GridReader:
    """Reads the samples of a chunk and encodes their images. Every process has its own copy."""

    source: RowReader
    encoder: GridEncoder
    transforms: TransformConfig
    grids_only: bool
    _transform: ImageTransform | None = field(default=None, repr=False)

    def read(self, rows: Sequence[SourceRow]) -> Iterator[Members | SampleError]:
        chunk, first = rows[0].reference  # The rows of one chunk, consecutive.
        yield from self._encode(chunk)[first : first + len(rows)]

    def _encode(self, chunk: Sequence[SourceRow]) -> list[Members | SampleError]:
        results = list(self.source.read(chunk))
        images: dict[tuple[int, ...], list[tuple[int, str, npt.NDArray[np.uint8]]]] = {}
        for number, members in enumerate(results):
            if isinstance(members, SampleError):
                continue
            try:
                decoded = [
                    (ext, self._decode(members[ext])) for ext in sorted(filter(is_image, members), key=image_order)
                ]
            except SampleError as error:
                results[number] = error
                continue
            dropped = {ext for ext in members if is_grid(ext) or (self.grids_only and is_image(ext))}
            results[number] = {ext: content for ext, content in members.items() if ext not in dropped}
            for ext, pixels in decoded:
                images.setdefault(pixels.shape, []).append((number, ext, pixels))
        for shape, found in images.items():
            size = max(1, _BATCH_PIXELS // (shape[1] * shape[2]))
            for first in range(0, len(found), size):
                batch = found[first : first + size]
                grids = self.encoder(np.stack([pixels for _, _, pixels in batch]))
                for (number, ext, _), codes in zip(batch, grids, strict=True):
                    members = results[number]
                    assert not isinstance(members, SampleError), "its images were decoded"
                    members[grid_extension(ext)] = encode_grid(codes, self.encoder.codebook_size, self.encoder.digest)
        return results

    def _decode(self, data: bytes) -> npt.NDArray[np.uint8]:
        """Return the pixels ``(3, H, W)`` of an encoded image after the transforms."""
        spec = _spec_of(self.encoder)
        if self._transform is None:
            self._transform = ImageTransform(self.transforms, spec)
        (crop,) = self._transform(data)
        _, height, width = crop.grid
        side = spec.patch_size
        patches = crop.values.reshape(height, width, spec.channels, side, side)
        return patches.transpose(2, 0, 3, 1, 4).reshape(spec.channels, height * side, width * side)


def _spec_of(encoder: GridEncoder) -> MediaSpec:
    """Return the inputs of a model whose patches are the squares of pixels of one code."""
    return MediaSpec(Placement.EMBEDDING, patch_size=encoder.stride)
