"""Adversarial microbatches: what one rank may get while the others get something else.

The packs follow the rules of the loader: a pack without an item that the model needs gets the dummy document, and a
rank without data gets dummy packs. Not for: the values that a model computes. All images are black.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from data_pipeline.batch import LearnedRows, MultimodalBatch
from data_pipeline.document import IGNORE, Document
from data_pipeline.media_spec import Grid, MediaSpec, Placement
from data_pipeline.packing.collate import collate
from data_pipeline.packing.config import PackingConfig
from data_pipeline.packing.packer import Budget, Pack, PackUsage
from data_pipeline.packing.synthetic_documents import dummy_document, plain_document
from data_pipeline.sample import Provenance

_FIRST_ID, _PAD_ID, _IMAGE_ID = 4, 0, 3
_LONG, _SHORT = 24, 5
"""Tokens of a document. The number does not affect the sequence of collectives, except through experts."""


@dataclass(frozen=True)
class BatchMaker:
    """Makes the microbatches of a model.

    Attributes:
        spec: The model's inputs.
        vocab_size: Largest token id + 1.
        seed: Seed of the run, for dropout masks.
        num_answers: Branches of a document: 2 for preference pairs, 1 for documents without branches.
    """

    spec: MediaSpec
    vocab_size: int
    seed: int
    num_answers: int = 1

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the microbatches that the model can get."""
        kinds = ["text and image", "no image", "images only", "one expert", "dummy packs only", "no loss", "one token"]
        if not self._takes_images:
            kinds = [kind for kind in kinds if "image" not in kind] + ["text"]
        kinds += [f"{name} only" for name in self.spec.modalities]
        kinds += ["all modalities"] if self.spec.modalities else []
        if self.spec.placement is Placement.PAIR:  # Every document of a pair has an image.
            kinds = ["one pair", "many pairs", "one expert", "dummy packs only"]
        return (*kinds, "videos only") if self.spec.videos is not None else tuple(kinds)

    @property
    def _takes_images(self) -> bool:
        return self.spec.placement is not Placement.NONE or self.spec.code_size is not None

    def make(self, kind: str, step: int, lane: int) -> MultimodalBatch:
        """Return a microbatch with one pack.

        Args:
            kind: One of ``kinds``, or ``loss not finite``.
            step: Step of the run, for dropout masks.
            lane: Lane of the pack.
        """
        numbers = itertools.count()
        origin = lambda: Provenance("check", "check.tar", str(number := next(numbers)), number)  # noqa: E731
        documents = self._documents(kind, np.random.default_rng([step, lane]), origin)
        dummy = dummy_document(self.spec, _PAD_ID)
        usage = PackUsage()
        for document in documents:
            more = PackUsage.of_document(document, self.spec)
            usage = usage._replace(documents=usage.documents + 1, kinds=usage.kinds | more.kinds)
        budget = Budget(PackingConfig(max_tokens=1 << 30), self.spec, dummy)
        if not documents:
            pack = Pack((dummy,), lane=-1)
        else:
            pack = Pack((*documents, dummy) if budget.needs_dummy(usage) else tuple(documents), lane)
        batch = replace(collate([pack], self.spec), dropout_key=(self.seed, step))
        if kind == "no loss":
            nothing = LearnedRows(*torch.empty(2, 0, dtype=torch.int64))
            batch = replace(batch, loss_weights=torch.zeros_like(batch.loss_weights), weight=0.0, learned=nothing)
        elif kind == "loss not finite":
            batch = replace(batch, loss_weights=batch.loss_weights.where(batch.labels == IGNORE, math.nan))
        return batch

    def _documents(self, kind: str, rng: np.random.Generator, origin: Callable[[], Provenance]) -> list[Document]:
        def text(
            length: int,
            images: int = 0,
            *,
            one_id: bool = False,
            videos: Sequence[Grid] = (),
            clips: Mapping[str, int] | None = None,
        ) -> Document:
            most = self.spec.max_document_tokens
            length = length if most is None else max(2, min(length, most // 2))
            length = length if self.num_answers == 1 else max(length, 2 + self.num_answers)
            ids = rng.integers(_FIRST_ID, self.vocab_size, length).tolist()
            ids = [ids[0]] * length if one_id else ids
            grids = [self._grid(number) for number in range(images)]
            # Ranks then encode different numbers of images, and of different sizes.
            uncoded = [(1 + number, 2) for number in range(images if self.spec.code_size is not None else 0)]
            grids = [] if self.spec.placement is Placement.NONE else grids
            return plain_document(
                self.spec,
                ids,
                _IMAGE_ID,
                grids,
                origin(),
                num_answers=self.num_answers,
                uncoded=uncoded,
                clips={name: [self._clip(name, n) for n in range(count)] for name, count in (clips or {}).items()},
                videos=videos,
            )

        image = int(self._takes_images)
        pair = int(self.spec.placement is Placement.PAIR)
        names = tuple(self.spec.modalities)
        if kind.removesuffix(" only") in names:
            name = kind.removesuffix(" only")
            return [text(_SHORT, clips={name: 2}), text(_SHORT, clips={name: 3})]
        if kind == "all modalities":
            return [text(_SHORT, image, clips=dict.fromkeys(names, 1)), text(_LONG, clips=dict.fromkeys(names, 2))]
        match kind:
            case "dummy packs only":
                return []
            case "no image" | "text":
                return [text(_LONG), text(_SHORT)]
            case "videos only":
                assert self.spec.videos is not None, "one of the kinds"
                _, height, width = self.spec.videos.minimal_grid
                return [text(_SHORT, videos=[(1, height, width), (2, height, width)])]
            case "images only":
                return [text(_SHORT, 2), text(_SHORT, 3)]
            case "one expert":  # Equal tokens have equal hidden states, so each block sends them to the same experts.
                return [text(_LONG, pair, one_id=True)]
            case "one token":
                return [text(2, pair)]
            case "many pairs":
                return [text(_SHORT, 1), text(_LONG, 1), text(_SHORT, 1)]
            case "one pair":
                return [text(_LONG, 1)]
        return [text(_LONG, pair), text(_SHORT, image)]

    def _clip(self, modality: str, number: int) -> Grid:
        """Return the grid of an item: the smallest one, or for odd numbers a typical one if the model takes it."""
        inputs, most = self.spec.modalities[modality], self.spec.max_document_tokens
        fits = most is None or inputs.num_features(inputs.typical_grid) < most // 4
        return inputs.typical_grid if number % 2 and fits else inputs.minimal_grid

    def _grid(self, number: int) -> Grid:
        """Return the grid of an image: the smallest one, or for odd numbers a larger one if the model takes it."""
        time, height, width = self.spec.minimal_grid
        sizes = self.spec.query_sizes
        larger = (time, 2 * height, 2 * width)
        fits = self.spec.fixed_grid is None and (not sizes or max(larger) <= sizes[-1][0])
        most = self.spec.max_document_tokens
        fits = fits and (most is None or self.spec.num_features(larger) < most // 4)
        return larger if number % 2 and fits else (time, height, width)
