"""A readable form of a document: its text and images in spans, with the loss weight of each span.

Not for: statistics of a data set (``prepare/stats``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.document import IGNORE, Document, MediaItem
from data_pipeline.media_spec import IMAGE, MediaSpec
from data_pipeline.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextSpan:
    """Consecutive tokens of one kind, weight and branch.

    Attributes:
        kind: ``read`` (without loss), ``learned``, ``image``, ``video``, or another modality such as ``audio``.
        num_tokens: Number of tokens.
        weight: Loss weight of each token; 0 unless they are learned. An image as tokens has their mean, marks included.
        text: Text of the tokens, with the names of special tokens; for other inputs a description of their items.
        branch: Number of the branch, from 1; 0 for the shared prefix and for documents without branches.
    """

    kind: str
    num_tokens: int
    weight: float
    text: str
    branch: int = 0

    @property
    def is_text(self) -> bool:
        """Whether ``text`` is a text, not the description of an input."""
        return self.kind in ("read", "learned")


def text_spans(document: Document, tokenizer: Tokenizer, spec: MediaSpec) -> list[TextSpan]:
    """Return the spans of a document in order; together they cover all tokens."""
    weights = _weights(document)
    images = iter(_images(document, spec))
    found: list[TextSpan] = []
    for start, stop, number in _pieces(document):
        is_image = any(image.start == start and image.stop == stop for image in document.images)
        if is_image:
            kind, description = next(images)
            found.append(TextSpan(kind, stop - start, float(weights[start:stop].mean()), description, number))
            continue
        for weight, group in itertools.groupby(range(start, stop), key=lambda token: float(weights[token])):
            tokens = list(group)
            text = decode_with_names(document.token_ids[tokens].tolist(), tokenizer)
            found.append(TextSpan("learned" if weight else "read", len(tokens), weight, text, number))
    return found


def decode_with_names(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the text of tokens, with the names of tokens that decode to no text."""
    has_text = [bool(tokenizer.decode([token_id])) for token_id in ids]
    parts = []
    for is_text, group in itertools.groupby(range(len(ids)), key=has_text.__getitem__):
        group_ids = [ids[i] for i in group]
        parts.append(tokenizer.decode(group_ids) if is_text else "".join(map(tokenizer.name_of, group_ids)))
    return "".join(parts)


def _weights(document: Document) -> npt.NDArray[np.float32]:
    """Return the loss weight of each token as a label; the document stores it one position earlier."""
    learned = np.where(document.labels != IGNORE, document.loss_weights, 0)
    return np.concatenate([np.zeros(1, np.float32), learned[:-1]]).astype(np.float32)


def _pieces(document: Document) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, number of the branch) of every image and of the text between images and branches."""
    edges = {0, document.num_tokens, *document.branches}
    for image in document.images:
        edges |= {image.start, image.stop}
    for start, stop in itertools.pairwise(sorted(edges)):
        yield start, stop, sum(branch <= start for branch in document.branches)


def _images(document: Document, spec: MediaSpec) -> Iterator[tuple[str, str]]:
    """Yield kind and description of every image, video, or input of another modality."""
    firsts = [*(image.first_item for image in document.images), len(document.items)]
    for number, (image, stop) in enumerate(zip(document.images, firsts[1:], strict=True), start=1):
        items = document.items[image.first_item : stop]
        crops = [_describe_crop(item, spec) for item in items]
        kind = "video" if image.is_video else items[0].modality if items else IMAGE
        counts = [(crop, len(list(group))) for crop, group in itertools.groupby(crops or ["tokens"])]
        yield (
            kind,
            f"{kind} {number}: " + "; ".join(f"{count} x {crop}" if count > 1 else crop for crop, count in counts),
        )


def _is_moving(item: MediaItem) -> bool:
    return item.grid[0] > 1 or item.later_values is not None


def _describe_crop(item: MediaItem, spec: MediaSpec) -> str:
    time, height, width = item.grid
    if item.modality != IMAGE:
        return f"{len(item.values)} frames, {item.num_features(spec)} features"
    role = "embedded" if item.embedded else "attended"
    frames = f"{time} times " if _is_moving(item) else ""
    return f"{frames}{height}x{width} patches, {item.num_features(spec)} features {role}"
