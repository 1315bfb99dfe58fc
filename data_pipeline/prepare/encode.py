"""Add the token ids of images to samples, as a source for new shards.

    members of a chunk --decode, resize--> images --encoder, batches of one size--> members and ``jpg.tokens``

The encoder is passed in, because the data side knows no model. ``computed`` runs it on whole chunks of stored samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import SampleError
from data_pipeline.images.transforms import ImageTransform, TransformConfig
from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing.document_builder import code_transform
from data_pipeline.prepare.computed import ComputedSource
from data_pipeline.prepare.reshard import ReshardSource
from data_pipeline.prepare.rows import Members
from data_pipeline.sample import Provenance, VideoPart
from data_pipeline.shards.image_header import is_image
from data_pipeline.shards.page_images import image_order
from data_pipeline.shards.sample_reader import assemble
from data_pipeline.shards.token_grid import encode_grid, grid_extension, is_grid
from data_pipeline.shards.video_file import is_video


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
    def batch_pixels(self) -> int:
        """Largest number of pixels of a batch, at least 1; one larger image is a batch of its own."""

    @property
    def digest(self) -> str:
        """SHA-256 of everything that determines the codes, hexadecimal."""

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.integer[Any]]:
        """Return the codes ``(N, H / stride, W / stride)`` of RGB images ``(N, 3, H, W)``."""


class EncodedSource(ComputedSource):
    """Stored samples with the token ids of their images: a ``RowSource``.

    A sample without images is not changed, and one with a video is a ``SampleError``. Token ids that a sample already
    has are replaced.

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
        self.image_tokenizer = encoder.digest
        code_transform(transforms, _spec_of(encoder))  # Raises before any process starts.
        super().__init__(
            samples,
            _GridEncoding(encoder, transforms, grids_only),
            f"{encoder.digest} {grids_only} {transforms.model_dump_json()}",
            f"with token ids of {encoder.codebook_size:,} codes",
        )


@dataclass
class _GridEncoding:
    """Encodes the images of a chunk: a ``ChunkProgram``."""

    encoder: GridEncoder
    transforms: TransformConfig
    grids_only: bool
    _transform: ImageTransform | None = field(default=None, repr=False)

    def __call__(self, samples: Sequence[Members | SampleError], first: int) -> list[Members | SampleError]:
        results = list(samples)
        images: dict[tuple[int, ...], list[tuple[int, str, npt.NDArray[np.uint8]]]] = {}
        for number, members in enumerate(results):
            if isinstance(members, SampleError):
                continue
            try:
                _check_no_videos(members)
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
            size = max(1, self.encoder.batch_pixels // (shape[1] * shape[2]))
            for start in range(0, len(found), size):
                batch = found[start : start + size]
                grids = self.encoder(np.stack([pixels for _, _, pixels in batch]))
                for (number, ext, _), codes in zip(batch, grids, strict=True):
                    members = results[number]
                    assert not isinstance(members, SampleError), "its images were decoded"
                    members[grid_extension(ext)] = encode_grid(codes, self.encoder.codebook_size, self.encoder.digest)
        return results

    def _decode(self, data: bytes) -> npt.NDArray[np.uint8]:
        """Return the pixels ``(3, H, W)`` of an encoded image after the transforms."""
        if self._transform is None:
            self._transform = code_transform(self.transforms, _spec_of(self.encoder))
        spec = self._transform.spec
        (crop,) = self._transform(data)
        _, height, width = crop.grid
        side = spec.patch_size
        patches = crop.values.reshape(height, width, spec.channels, side, side)
        return patches.transpose(2, 0, 3, 1, 4).reshape(spec.channels, height * side, width * side)


def _check_no_videos(members: Members) -> None:
    """Raise ``SampleError`` if a sample has a video, whose token ids shards cannot hold."""
    # Only a JSON with this word can name frames; the others are not parsed.
    in_frames = b'"video"' in members.get("json", b"") and any(
        isinstance(part, VideoPart) for part in assemble(members, Provenance("", "", "", 0)).parts
    )
    if in_frames or any(map(is_video, members)):
        raise SampleError(
            "the sample has a video, and shards hold the token ids of images alone; leave such samples out with "
            "--on-error skip"
        )


def _spec_of(encoder: GridEncoder) -> MediaSpec:
    return MediaSpec(code_size=encoder.stride)
