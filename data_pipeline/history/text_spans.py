"""A document in the words of a person: which tokens are read, which are learned and how much, where images stand.

Not for: the page of a data set (``stats``), what a step was fed (``mmscale data trace``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from data_pipeline.document import IGNORE, Document, MediaItem
from data_pipeline.media_spec import MediaSpec
from data_pipeline.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens of one kind.

    Attributes:
        kind: ``read``, ``learned``, or ``image``.
        num_tokens: How many.
        weight: Loss weight of each of them; 0 unless they are learned.
        text: What they say, special tokens by their names; of an image its views.
        branch: Number of its branch from 1; 0 for what all branches share, and for documents without any.
    """

    kind: Literal["read", "learned", "image"]
    num_tokens: int
    weight: float
    text: str
    branch: int = 0


def stretches(document: Document, tokenizer: Tokenizer, spec: MediaSpec) -> list[Stretch]:
    """The document from its first token to its last."""
    weights = _weights(document)
    images = iter(_images(document, spec))
    found: list[Stretch] = []
    for start, stop, number in _pieces(document):
        is_image = any(image.start == start and image.stop == stop for image in document.images)
        if is_image:
            found.append(Stretch("image", stop - start, 0.0, next(images), number))
            continue
        for weight, run in itertools.groupby(range(start, stop), key=lambda token: float(weights[token])):
            tokens = list(run)
            text = spell(document.token_ids[tokens].tolist(), tokenizer)
            found.append(Stretch("learned" if weight else "read", len(tokens), weight, text, number))
    return found


def spell(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of tokens; those that are no text by their names."""
    said = [bool(tokenizer.decode([token_id])) for token_id in ids]
    words = []
    for is_text, run in itertools.groupby(range(len(ids)), key=said.__getitem__):
        of_run = [ids[i] for i in run]
        words.append(tokenizer.decode(of_run) if is_text else "".join(map(tokenizer.name_of, of_run)))
    return "".join(words)


def _weights(document: Document) -> npt.NDArray[np.float32]:
    """How much each token weighs where it is predicted, at the token before it."""
    learned = np.where(document.labels != IGNORE, document.loss_weights, 0)
    return np.concatenate([np.zeros(1, np.float32), learned[:-1]]).astype(np.float32)


def _pieces(document: Document) -> Iterator[tuple[int, int, int]]:
    """(first token, token behind the last, number of its branch) of every image and of the text between."""
    edges = {0, document.num_tokens, *document.branches}
    for image in document.images:
        edges |= {image.start, image.stop}
    for start, stop in itertools.pairwise(sorted(edges)):
        yield start, stop, sum(branch <= start for branch in document.branches)


def _images(document: Document, spec: MediaSpec) -> Iterator[str]:
    firsts = [*(image.first_item for image in document.images), len(document.items)]
    for number, (first, stop) in enumerate(itertools.pairwise(firsts), start=1):
        views = [_view(item, spec) for item in document.items[first:stop]]
        counts = [(view, len(list(run))) for view, run in itertools.groupby(views)]
        yield f"image {number}: " + "; ".join(f"{count} x {view}" if count > 1 else view for view, count in counts)


def _view(item: MediaItem, spec: MediaSpec) -> str:
    _, height, width = item.grid
    role = "embedded" if item.embedded else "attended"
    return f"{height}x{width} patches, {item.num_features(spec)} features {role}"
