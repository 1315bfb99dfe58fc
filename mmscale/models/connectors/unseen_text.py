"""Keys for text that stands before the first image of its document, where it is to attend to what comes later.

transformers leaves such rows without a mask, so they attend to everything that the call was given: all images of the
document, and the tiles that these do not have. Nothing here is needed otherwise (``connector.unseen_text: silent``).
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from torch import Tensor

from data_pipeline.batch import MediaBlock, Segments
from mmscale.models.tiles import tiles_of_images
from mmscale.models.vision_config import AnyVisionConfig


def num_absent_rows(media: MediaBlock, vision: AnyVisionConfig, merge: int) -> list[int]:
    """Feature rows of the absent tiles of each image."""
    images = tiles_of_images(media.places)
    if vision.tiles is None or not vision.tiles.attend_absent:
        return [0] * len(images)
    per_view = rows_of_views(media, vision, merge)
    return [(vision.tiles.max_tiles - count) * per_view[0] for _, count in images]


def with_unseen_text(
    media: MediaBlock, segments: Segments, vision: AnyVisionConfig, merge: int
) -> tuple[Int[Tensor, " A"], Segments]:
    """Keys and their partition into the spans of ``media``, those of text before the first image filled in.

    Reads the keys on the host, for which a device is waited for: which images a document has stands there alone, since
    evaluation lets several documents attend the same one.

    Args:
        media: Spans as the data side made them.
        segments: Documents.
        vision: Of the tower that made the features, with those of absent tiles behind all others and behind tags.
        merge: Of the projector.
    """
    keys, bounds = media.keys.cpu().numpy(), media.span_keys.bounds
    of_span = [keys[first:stop] for first, stop in itertools.pairwise(bounds)]
    starts = np.array(media.span_tokens.bounds[:-1])
    documents = np.searchsorted(np.array(segments.bounds), starts, side="right") - 1
    absent = _AbsentRows(media, vision, merge)
    filled = list[npt.NDArray[np.int64]]()
    for _, spans in itertools.groupby(range(len(of_span)), key=lambda span: documents[span]):
        own = [of_span[span] for span in spans]
        seen = np.unique(np.concatenate(own))
        everything = np.concatenate([seen, *absent.of(seen)])
        filled += [each if len(each) else everything for each in own]
    lengths = Segments.from_lengths([len(each) for each in filled])
    device = media.keys.device
    all_keys = torch.from_numpy(np.concatenate(filled)).to(device)
    return all_keys, Segments(lengths.cu.to(device), lengths.bounds)


class _AbsentRows:
    """Feature rows of absent tiles, by the images that they belong to."""

    def __init__(self, media: MediaBlock, vision: AnyVisionConfig, merge: int) -> None:
        per_view = rows_of_views(media, vision, merge)
        self.num_real = sum(per_view)
        self.images = np.repeat([place.image for place in media.places], per_view)
        """Image of each feature row of a tile that there is."""
        first = self.num_real + len(media.tag_ids)
        self.bounds = first + np.cumsum([0, *num_absent_rows(media, vision, merge)])

    def of(self, rows: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """Those of the images that ``rows`` belong to; rows of tags belong to none."""
        images = np.unique(self.images[rows[rows < self.num_real]])
        return [np.arange(*self.bounds[image : image + 2]) for image in images]


def rows_of_views(media: MediaBlock, vision: AnyVisionConfig, merge: int) -> list[int]:
    """Feature rows of each view."""
    extra = int(vision.class_feature)
    return [time * (height * width // merge**2 + extra) for time, height, width in media.grids]
