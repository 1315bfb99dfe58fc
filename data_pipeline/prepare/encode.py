"""Add the token ids of images and videos to samples, as a source for new shards.

    members of a chunk --decode, resize--> images --encoder, batches of one size--> members and ``jpg.tokens``
    a video --frames, decode, resize--> groups of ``frames_per_code`` frames --encoder--> members and ``mp4.tokens``

Each group of frames is encoded alone, as in the published code of Emu3 (``autoencode.py``), so memory does not grow
with the length of a video beyond its chosen frames. How Emu3's training data were divided is not published.

The encoder is passed in, because the data side knows no model. ``computed`` runs it on whole chunks of stored samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from data_pipeline.document import MediaItem
from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.images.drawn_images import code_transform
from data_pipeline.images.transforms import ImageTransform, TransformConfig
from data_pipeline.images.video import VideoConfig, VideoTransform, frame_rate
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.prepare.computed import ComputedSource
from data_pipeline.prepare.reshard import ReshardSource
from data_pipeline.prepare.rows import Members
from data_pipeline.sample import ImagePart, Provenance, VideoPart
from data_pipeline.shards.image_header import is_image
from data_pipeline.shards.page_images import image_order
from data_pipeline.shards.sample_reader import assemble
from data_pipeline.shards.token_grid import GridTimes, encode_grid, grid_extension, is_grid
from data_pipeline.shards.video_file import is_video


class GridEncoder(Protocol):
    """An image tokenizer. Every worker process gets a pickled copy, so load the weights in the first call.

    Equal batches must give equal codes in every process.
    """

    @property
    def stride(self) -> int:
        """Pixels of a code, a side."""

    @property
    def frames_per_code(self) -> int:
        """Frames of a video that share a code; 1 if each frame is an image."""

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
        """Return the codes ``(N, H / stride, W / stride)``.

        Args:
            images: RGB images ``(N, 3, H, W)``, or groups of frames ``(N, frames_per_code, 3, H, W)``.
        """


class EncodedSource(ComputedSource):
    """Stored samples with the token ids of their images and videos: a ``RowSource``.

    A sample without them is not changed. Token ids that a sample already has are replaced.

    Args:
        samples: The samples.
        encoder: The image tokenizer.
        transforms: How an image is resized and cropped before it is encoded. Augmentation is not applied.
        video: Which frames of a video are encoded, and at which size; None makes a sample with a video a
            ``SampleError``.
        grids_only: Leave out the encoded images and videos and store their token ids alone.

    Raises:
        DataConfigError: the transforms do not fit the stride, or cut an image into several crops; or ``video`` has a
            field for tokens or tiles.
    """

    def __init__(
        self,
        samples: ReshardSource,
        encoder: GridEncoder,
        transforms: TransformConfig,
        video: VideoConfig | None = None,
        *,
        grids_only: bool = False,
    ) -> None:
        self.image_tokenizer = encoder.digest
        # Both raise before any process starts.
        code_transform(transforms, MediaSpec(code_size=encoder.stride))
        if video is not None:
            _video_transform(video, encoder)
        settings = f"{encoder.digest} {grids_only} {transforms.model_dump_json()}"
        super().__init__(
            samples,
            _GridEncoding(encoder, transforms, video, grids_only),
            settings if video is None else f"{settings} {video.model_dump_json()}",
            f"with token ids of {encoder.codebook_size:,} codes",
        )


@dataclass
class _GridEncoding:
    """Encodes the images and videos of a chunk: a ``ChunkProgram``."""

    encoder: GridEncoder
    transforms: TransformConfig
    video: VideoConfig | None
    grids_only: bool

    @cached_property
    def _transform(self) -> ImageTransform:
        return code_transform(self.transforms, MediaSpec(code_size=self.encoder.stride))

    @cached_property
    def _video_transform(self) -> VideoTransform:
        assert self.video is not None, "without it, a sample with a video is a bad sample"
        return _video_transform(self.video, self.encoder)

    def __call__(self, samples: Sequence[Members | SampleError], first: int) -> list[Members | SampleError]:
        results = list(samples)
        images: dict[tuple[int, ...], list[tuple[int, str, npt.NDArray[np.uint8]]]] = {}
        for number, members in enumerate(results):
            if isinstance(members, SampleError):
                continue
            try:
                found, videos = self._media(members)
                decoded = [(ext, self._decode(members[ext])) for ext in found]
                grids = {grid_extension(video.name): self._grid_of_video(video) for video in videos}
            except SampleError as error:
                results[number] = error
                continue
            is_media = {ext for ext in members if is_image(ext) or is_video(ext)} if self.grids_only else set()
            kept = {ext: content for ext, content in members.items() if not (is_grid(ext) or ext in is_media)}
            results[number] = {**kept, **grids}
            for ext, pixels in decoded:
                images.setdefault(pixels.shape, []).append((number, ext, pixels))
        for found_images in images.values():
            codes = self._codes([pixels for _, _, pixels in found_images])
            for (number, ext, _), grid in zip(found_images, codes, strict=True):
                members = results[number]
                assert not isinstance(members, SampleError), "its images were decoded"
                members[grid_extension(ext)] = encode_grid(grid, self.encoder.codebook_size, self.encoder.digest)
        return results

    def _media(self, members: Members) -> tuple[list[str], list[VideoPart]]:
        """Return the image members and the videos of a sample; a video that occurs twice is listed once.

        Raises:
            SampleError: the sample has a video and ``video`` is None; or one image is the first frame of a video, and
                also a part of its own or the first frame of a different video.
        """
        images = sorted(filter(is_image, members), key=image_order)
        # Only a JSON with this word can name frames; the others are not parsed.
        if not any(map(is_video, members)) and b'"video"' not in members.get("json", b""):
            return images, []
        parts = assemble(members, Provenance("", "", "", 0)).parts
        videos = [part for part in parts if isinstance(part, VideoPart)]
        if videos and self.video is None:
            raise SampleError(
                "the sample has a video; say which of its frames to encode with --video, or leave such samples out "
                "with --on-error skip"
            )
        if not videos:
            return images, []
        shown = {part.name for part in parts if isinstance(part, ImagePart)}
        if twice := sorted(shown.intersection(video.name for video in videos)):
            raise SampleError(f"{twice[0]} is an image and the first frame of a video, which cannot share a token grid")
        by_name = dict[str, VideoPart]()
        for video in videos:
            if by_name.setdefault(video.name, video).data != video.data:
                raise SampleError(f"{video.name} is the first frame of two videos, which cannot share a token grid")
        return [ext for ext in images if ext in shown], list(by_name.values())

    def _decode(self, data: bytes) -> npt.NDArray[np.uint8]:
        """Return the pixels ``(3, H, W)`` of an encoded image after the transforms."""
        (crop,) = self._transform(data)
        return _pixels(crop.values[None], crop.grid[1:], self.encoder.stride)[0]

    def _grid_of_video(self, video: VideoPart) -> bytes:
        """Return the token grid of a video. Memory holds its chosen frames, and one batch of them as images.

        Raises:
            SampleError: the video is damaged or does not fit the limits of ``video``.
        """
        task = self._video_transform.decode_task(video)
        task.decode()
        codes = np.stack([*self._codes(self._groups(task.item))])
        rate = task.count / task.size.num_frames * frame_rate(task.size)
        times = GridTimes(task.size.microseconds / 1e6, rate)
        return encode_grid(codes, self.encoder.codebook_size, self.encoder.digest, times)

    def _groups(self, item: MediaItem) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield each group of frames of a video that share codes, ``(frames_per_code, 3, H, W)``."""
        steps, rows, columns = item.grid
        per_code, num_codes = self.encoder.frames_per_code, rows * columns
        for step in range(steps):
            codes = slice(step * num_codes, (step + 1) * num_codes)
            first = item.values[codes][None]  # (frame, code, values of its square)
            if item.later_values is None:  # A single frame counts as that many equal frames.
                frames = np.repeat(first, per_code, axis=0)
            else:
                later = item.later_values[codes].reshape(num_codes, per_code - 1, -1)
                frames = np.concatenate([first, later.swapaxes(0, 1)])
            yield _pixels(frames, (rows, columns), self.encoder.stride)

    def _codes(self, pixels: Iterable[npt.NDArray[np.uint8]]) -> Iterator[npt.NDArray[np.integer[Any]]]:
        """Yield the codes of each of the images, or groups of frames, of one size."""
        batch = list[npt.NDArray[np.uint8]]()
        for each in pixels:
            batch.append(each)
            if len(batch) == max(1, self.encoder.batch_pixels // (each.size // 3)):
                yield from self.encoder(np.stack(batch))
                batch.clear()
        if batch:
            yield from self.encoder(np.stack(batch))


def _pixels(squares: npt.NDArray[np.uint8], grid: tuple[int, int], side: int) -> npt.NDArray[np.uint8]:
    """Return pixels ``(F, 3, H, W)`` of the squares of codes ``(F, P, values)``; P = rows * columns of ``grid``."""
    rows, columns = grid
    pixels = squares.reshape(-1, rows, columns, 3, side, side).transpose(0, 3, 1, 4, 2, 5)
    return pixels.reshape(-1, 3, rows * side, columns * side)


def _video_transform(config: VideoConfig, encoder: GridEncoder) -> VideoTransform:
    """Return the transform of the videos that a tokenizer encodes.

    Raises:
        DataConfigError: the configuration has a field that token ids have no use for.
    """
    for name in ("tiling", "scaled", "start", "end", "placeholder", "timestamps", "frame_break", "intro", "outro"):
        if getattr(config, name) is not None:
            raise DataConfigError(
                f"video.{name}: a token grid holds the codes of whole frames alone; leave it out, and name the tokens "
                "around a video in the run (data.image_tokens)"
            )
    spec = MediaSpec(Placement.EMBEDDING, patch_size=encoder.stride, frames_per_patch=encoder.frames_per_code)
    return VideoTransform(config, spec)
