"""Keys for text that stands before the first image of its document, where it is to attend to what comes later.

transformers leaves such rows without a mask, so they attend to everything that the call was given: all images of the
document, and the tiles that these do not have. Nothing here is needed otherwise (``connector.unseen_text: silent``).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from torch import Tensor

from data_pipeline.batch import MediaBlock, Segments
from mmscale.models.config import CrossAttentionConnectorConfig, ModelConfig, UnseenText, VisionConfig
from mmscale.models.tiles import tiles_of_images


def looks_ahead(config: object) -> bool:
    """Whether a connector wants this."""
    return isinstance(config, CrossAttentionConnectorConfig) and config.unseen_text is UnseenText.LOOKS_AHEAD


def absent_features(config: ModelConfig) -> bool:
    """Whether the tower has to hand on features of absent tiles."""
    tiles = None if config.vision is None else config.vision.tiles
    return tiles is not None and tiles.attend_absent and looks_ahead(config.connector)


def num_absent_rows(media: MediaBlock, vision: VisionConfig, merge: int) -> list[int]:
    """Feature rows of the absent tiles of each image."""
    images = tiles_of_images(media.places)
    if vision.tiles is None or not vision.tiles.attend_absent:
        return [0] * len(images)
    per_view = _rows_of_views(media, vision, merge)
    return [(vision.tiles.max_tiles - count) * per_view[0] for _, count in images]


def with_unseen_text(
    media: MediaBlock, segments: Segments, vision: VisionConfig, merge: int
) -> tuple[Int[Tensor, " A"], Segments]:
    """Keys and their partition into the spans of ``media``, those of text before the first image filled in.

    Args:
        media: Spans as the data side made them.
        segments: Documents.
        vision: Of the tower that made the features, with those of absent tiles behind all others.
        merge: Of the projector.
    """
    by_document = _rows_of_documents(media, segments.num, vision, merge)
    starts = np.array(media.span_tokens.bounds[:-1])
    document_of = np.searchsorted(np.array(segments.bounds), starts, side="right") - 1
    # A span takes its own keys, or rows that are put behind those of all spans.
    order, lengths, extra = list[npt.NDArray[np.int64]](), list[int](), list[npt.NDArray[np.int64]]()
    end = media.span_keys.total
    for span, document in enumerate(document_of):
        first, stop = media.span_keys.bounds[span : span + 2]
        if first == stop:
            extra.append(by_document[document])
            first, stop = end, end + len(extra[-1])
            end = stop
        order.append(np.arange(first, stop))
        lengths.append(stop - first)
    device = media.keys.device
    added, index = (torch.from_numpy(np.concatenate([*rows, _NONE])).to(device) for rows in (extra, order))
    spans = Segments.from_lengths(lengths)
    keys = torch.cat([media.keys, added]).index_select(0, index)
    return keys, Segments(spans.cu.to(device), spans.bounds)


_NONE = np.empty(0, dtype=np.int64)


def _rows_of_views(media: MediaBlock, vision: VisionConfig, merge: int) -> list[int]:
    extra = int(vision.class_feature)
    return [time * (height * width // merge**2 + extra) for time, height, width in media.grids]


def _rows_of_documents(
    media: MediaBlock, num_documents: int, vision: VisionConfig, merge: int
) -> list[npt.NDArray[np.int64]]:
    """All feature rows of each document: those of its views, and those of the tiles that its images lack."""
    rows: list[list[npt.NDArray[np.int64]]] = [[_NONE] for _ in range(num_documents)]
    first = 0
    for place, count in zip(media.places, _rows_of_views(media, vision, merge), strict=True):
        rows[place.segment].append(np.arange(first, first + count))
        first += count
    documents = {place.image: place.segment for place in media.places}
    for image, count in enumerate(num_absent_rows(media, vision, merge)):
        rows[documents[image]].append(np.arange(first, first + count))
        first += count
    return [np.concatenate(each) for each in rows]
