"""Cross-attention keys of text before the first image of its document, with ``connector.unseen_text: looks_ahead``.

transformers does not mask such text, so it attends to all images of the document, their absent tiles included. The
functions here add these keys. With ``unseen_text: silent``, such text attends to nothing and no keys are added.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
from jaxtyping import Int
from torch import Tensor

from data_pipeline.batch import MediaBlock, Segments
from mmscale.models.tiles import tiles_of_images
from mmscale.models.vision_config import AnyVisionConfig
from mmscale.nn.host import to_device


def absent_tile_rows(media: MediaBlock, vision: AnyVisionConfig, merge: int) -> list[int]:
    """Return the number of feature rows of each image's absent tiles; 0 if the tower does not compute them."""
    images = tiles_of_images(media.locations)
    if vision.tiles is None or not vision.tiles.attend_absent:
        return [0] * len(images)
    per_crop = features_per_crop(media, vision, merge)
    return [(vision.tiles.max_tiles - count) * per_crop[0] for _, count in images]


def lookahead_keys(
    media: MediaBlock, segments: Segments, vision: AnyVisionConfig, merge: int
) -> tuple[Int[Tensor, " A"], Segments]:
    """Return ``attended_index`` and ``span_keys`` of a batch, with keys for the spans before the first image.

    A span without keys attends to all rows that other spans of its document attend to, and to the absent tiles of the
    same images. Copies ``attended_index`` to the host, which waits for the device. No other field gives the
    images of a document, because in evaluation several documents may attend to the same image.

    Args:
        media: Spans of the batch, from the data pipeline.
        segments: Documents.
        vision: Configuration of the tower. The attended rows must be its features, then the tags, then the features of
            absent tiles.
        merge: ``merge`` of the projector.
    """
    keys, bounds = media.attended_index.cpu().numpy(), media.span_keys.bounds
    keys_of_spans = [keys[first:stop] for first, stop in itertools.pairwise(bounds)]
    starts = np.array(media.span_tokens.bounds[:-1])
    documents = np.searchsorted(np.array(segments.bounds), starts, side="right") - 1
    absent = _AbsentTileRows(media, vision, merge)
    filled = list[npt.NDArray[np.int64]]()
    for _, spans in itertools.groupby(range(len(keys_of_spans)), key=lambda span: documents[span]):
        document_keys = [keys_of_spans[span] for span in spans]
        attended = np.unique(np.concatenate(document_keys))
        all_keys = np.concatenate([attended, *absent.of_same_images(attended)])
        filled += [each if len(each) else all_keys for each in document_keys]
    lengths = Segments.from_lengths([len(each) for each in filled])
    device = media.attended_index.device
    attended_index = to_device(np.concatenate(filled), device)
    return attended_index, Segments(to_device(lengths.cu, device), lengths.bounds)


class _AbsentTileRows:
    """Indices of the feature rows of each image's absent tiles."""

    def __init__(self, media: MediaBlock, vision: AnyVisionConfig, merge: int) -> None:
        per_crop = features_per_crop(media, vision, merge)
        self.num_real = sum(per_crop)
        self.images = np.repeat([location.image for location in media.locations], per_crop)
        """Image of each feature row of an existing tile."""
        first = self.num_real + len(media.tag_ids)
        self.bounds = first + np.cumsum([0, *absent_tile_rows(media, vision, merge)])

    def of_same_images(self, rows: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """Return the absent rows of the images that ``rows`` belong to. Rows of tags belong to no image."""
        images = np.unique(self.images[rows[rows < self.num_real]])
        return [np.arange(*self.bounds[image : image + 2]) for image in images]


def features_per_crop(media: MediaBlock, vision: AnyVisionConfig, merge: int) -> list[int]:
    """Return the number of feature rows of each crop."""
    extra = int(vision.class_feature)
    return [time * (height * width // merge**2 + extra) for time, height, width in media.grids]
