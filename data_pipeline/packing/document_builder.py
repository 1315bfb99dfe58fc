"""Sample to document: pieces, views and tokens become ids, labels, positions, slots and spans.

    bos | image: one placeholder a feature (embedded) or one anchor (attended), and its layout | text | ... | eos
    bos | text | eos    beside its one image, where the two are compared

Not for: several documents together (``packer``, ``collate``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from data_pipeline.document import IGNORE, Document, ImageExtent, MediaItem, Span
from data_pipeline.errors import DataConfigError, FaultKind, SampleError
from data_pipeline.images.image_tokens import Anchor, Features, ImageLayout, Run, Text
from data_pipeline.images.transforms import ImageTransform, Picture, TilesTransform, TransformConfig
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.order.randomness import Draws
from data_pipeline.sample import ImagePart, Provenance, Sample
from data_pipeline.shards.image_header import image_size
from data_pipeline.text.templates import BranchPiece, EndPiece, Piece, TemplateConfig, TextPiece, TokenPiece
from data_pipeline.text.templates.base import images_of, share_weights
from data_pipeline.text.tokenizer import Tokenizer, check_unicode

_NO_SLOTS = np.empty(0, dtype=np.int32)


@dataclass
class _Draft:
    """A document under construction: columns that grow by one token at a time.

    They are lists up to the end: a call of numpy takes longer than the few tokens of a caption.
    """

    spec: MediaSpec
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    """Of each token itself, not of the one before it as in the document."""
    weights: list[float] = field(default_factory=list)
    positions: list[npt.NDArray[np.int32]] = field(default_factory=list)
    next_position: int = 0
    items: list[MediaItem] = field(default_factory=list)
    images: list[ImageExtent] = field(default_factory=list)
    dest: list[npt.NDArray[np.int32]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    attended: tuple[int, ...] = ()
    """Attended items of the last image and of those just before it, without text between them."""
    branches: list[int] = field(default_factory=list)
    fork: int = 0
    """Position of the first token of every branch."""

    def add_tokens(self, ids: Sequence[int], weight: float) -> None:
        """Appends tokens of one loss weight; those of weight 0 are read only."""
        if self.spec.position_axes == 3:
            steps = np.arange(self.next_position, self.next_position + len(ids), dtype=np.int32)
            self.positions.append(np.repeat(steps[:, None], 3, axis=1))
        self.ids.extend(ids)
        self.labels.extend(ids if weight else [IGNORE] * len(ids))
        self.weights.extend([weight] * len(ids))
        self.next_position += len(ids)

    def begin_branch(self) -> None:
        """Begins a branch: its positions go on from where the first one began."""
        if not self.branches:
            self.fork = self.next_position
        self.branches.append(len(self.ids))
        self.next_position = self.fork

    def add_image(self, views: tuple[MediaItem, ...], image_id: int, layout: ImageLayout | None) -> None:
        """Appends the tokens of an image as it is laid out; none of them is learned, and of a pair there is none.

        Without a layout, an image is its features alone, or one anchor if none of them is embedded.

        Raises:
            SampleError: a view does not fit the model.
        """
        assert not self.branches, "an image in a branch would be attended by the branches after it"
        start, first_item, number = len(self.ids), len(self.items), len(self.images)
        counts = [view.num_features(self.spec) for view in views]  # Refuses attended grids too.
        if self.spec.placement is Placement.PAIR:
            self.items.extend(views)
            self.images.append(ImageExtent(start, first_item, start))
            return
        tagged = views if layout is None else layout.tagged(views, number)
        self.items.extend(replace(view, image=number) for view in tagged)
        if self.images and self.images[-1].stop < start:  # Text stands between the last image and this one.
            self.attended = ()
        self.attended += tuple(first_item + i for i, view in enumerate(views) if not view.embedded)
        slots = {i: np.empty(counts[i], dtype=np.int32) for i, view in enumerate(views) if view.embedded}
        runs: Iterable[Run]
        if layout is None:
            runs = [Features(i, 0, counts[i]) for i in slots] or [Anchor()]
        else:
            runs = layout.runs(views, number, self.spec)
        for run in runs:
            at = len(self.ids)
            # The tag of an attended view attends that view alone.
            attended = self.attended if not isinstance(run, Text) or run.view is None else (first_item + run.view,)
            if attended and (not self.spans or self.spans[-1].items != attended):
                self.spans.append(Span(at, attended))
            if isinstance(run, Features):
                slots[run.view][run.first : run.first + run.count] = np.arange(at, at + run.count)
            if isinstance(run, Features) and self.spec.position_axes == 3:
                self._add_features_on_three_axes(views[run.view], run.count, image_id)
            elif isinstance(run, Features):
                self.add_tokens((image_id,) * run.count, 0.0)
            else:
                self.add_tokens(run.ids if isinstance(run, Text) else (image_id,), 0.0)
        self.dest.extend(slots.values())
        self.images.append(ImageExtent(start, first_item, len(self.ids)))

    def _add_features_on_three_axes(self, view: MediaItem, count: int, image_id: int) -> None:
        # Each feature stands at its own (time, row, column); text goes on after the largest of them. Layouts do not
        # part the rows of a view on three axes, so ``count`` is all that it hands on.
        # Source: Qwen2-VL (arXiv 2409.12191), section 2.1, multimodal rotary position embedding.
        kept = view.kept
        sides = self.spec.feature_grid(view.grid) if kept is None else (view.grid[0], kept.height, kept.width)
        coordinates = np.indices(sides).reshape(3, -1).T.astype(np.int32)
        self.positions.append(coordinates + np.int32(self.next_position))
        self.next_position += max(sides)
        self.ids.extend([image_id] * count)
        self.labels.extend([IGNORE] * count)
        self.weights.extend([0.0] * count)

    def finish(self, origin: Provenance | None) -> Document:
        """The columns as arrays; labels are the ids one ahead."""
        length = len(self.ids)
        weights = [*self.weights[1:], 0.0]  # Of the token that is predicted.
        counted: Iterable[int] = ()
        if self.spec.position_axes == 1:  # Positions on one axis count, in every branch from the fork.
            starts = [*self.branches, length]
            counts = [range(self.fork, self.fork + end - start) for start, end in itertools.pairwise(starts)]
            counted = itertools.chain(range(starts[0]), *counts)
        columns = np.fromiter([*self.ids, *self.labels[1:], IGNORE, *counted], np.int32)
        spans = self.spans if self.spans and self.spans[0].start == 0 else [Span(0, ()), *self.spans]
        return Document(
            token_ids=columns[:length],
            labels=columns[length : 2 * length],
            loss_weights=np.fromiter(weights, np.float32, length),
            position_ids=columns[2 * length :] if self.spec.position_axes == 1 else np.concatenate(self.positions),
            items=tuple(self.items),
            dest=np.concatenate(self.dest) if len(self.dest) > 1 else (*self.dest, _NO_SLOTS)[0],
            spans=tuple(spans),
            provenance=origin,
            images=tuple(self.images),
            branches=tuple(self.branches),
        )


@dataclass(frozen=True)
class Outline:
    """A document that lacks its pixels.

    Attributes:
        document: All of it else; the values of its items are not written yet.
        pictures: Its images, which write them.
    """

    document: Document
    pictures: tuple[Picture, ...] = ()

    def __call__(self) -> Document:
        """The document with its pixels.

        Raises:
            SampleError: an image cannot be decoded.
        """
        try:
            for picture in self.pictures:
                picture.draw()
        except SampleError as error:
            origin = self.document.provenance
            raise error if origin is None else error.located(origin.shard, origin.key) from error
        return self.document


class DocumentConfig(Protocol):
    """The part of a data set's configuration that decides what its documents hold."""

    @property
    def template(self) -> TemplateConfig:
        """Which text is read and which is learned."""

    @property
    def transforms(self) -> TransformConfig:
        """How an image becomes crops."""


class DocumentBuilder:
    """Turns samples of one data set into documents.

    Args:
        dataset: Template and transforms of the data set.
        tokenizer: Text to ids.
        spec: What the model takes.

    Raises:
        DataConfigError: the transform or the layout does not fit the model, or the tokenizer lacks a token of the
            layout or the template.
    """

    def __init__(self, dataset: DocumentConfig, tokenizer: Tokenizer, spec: MediaSpec) -> None:
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.spec = spec
        # Texts alone have no image, so their transform need not fit the model.
        takes_images = spec.placement is not Placement.NONE and dataset.template.takes_images
        transforms = dataset.transforms
        if spec.placement is Placement.PAIR and dataset.template.no_pair is not None:
            raise DataConfigError(
                f"template.kind={dataset.template.kind}: gives {dataset.template.no_pair}, and the model "
                "(connector.kind=contrastive) compares one image with one text; use caption"
            )
        if spec.placement is Placement.PAIR and dataset.template.loss_weight != "token":
            raise DataConfigError(
                f"template.loss_weight={dataset.template.loss_weight}: each pair counts once (connector.kind="
                "contrastive); leave it out"
            )
        self._transform = ImageTransform(transforms, spec) if takes_images else None
        self._requires_images = (
            takes_images and spec.placement is not Placement.PAIR and dataset.template.requires_images
        )
        max_tiles = transforms.tiling.max_tiles if isinstance(transforms, TilesTransform) else 0
        layout = transforms.layout if takes_images else None
        self._layout = None if layout is None else ImageLayout.resolve(layout, tokenizer, spec, max_tiles)
        names = dataset.template.named_tokens
        self._special = {name: tokenizer.special_id(name, "template.special_tokens") for name in names}
        if tokenizer.image_id in self._special.values():
            raise DataConfigError("template.special_tokens: the image token is placed by images, never by a template")
        laid_out = layout.tokens(max_tiles) if layout is not None else []
        self._reserved = self._special | {name: tokenizer.special_id(name, "transforms.layout") for name in laid_out}

    def __call__(self, sample: Sample, rng: Draws | None = None) -> Document:
        """The whole document; ``rng`` draws answers and augmentation, None takes first answers and plain images.

        Raises:
            SampleError: the sample lacks what the template needs, an image is bad, or image tokens and features differ.
        """
        return self.outline(sample, rng)()

    def measure(self, sample: Sample, rng: Draws | None = None) -> Document:
        """The same document in everything but pixels, which are black and take no memory; nothing is decoded.

        Sizes come from ``ImagePart.size``, or from the header where that is None. What only decoding finds, damaged
        pixels, is not noticed here.

        Raises:
            SampleError: as the document itself would, save for damaged pixels.
        """
        return self.outline(sample, rng, pixels=False).document

    def build_prompt(self, sample: Sample) -> Document:
        """The document up to where the answer begins, without augmentation; nothing in it is learned.

        Raises:
            SampleError: as the document itself.
        """
        return self.outline(sample, prompt=True)()

    def measure_prompt(self, sample: Sample) -> Document:
        """The same in everything but pixels, as ``measure``."""
        return self.outline(sample, pixels=False, prompt=True).document

    def outline(
        self, sample: Sample, rng: Draws | None = None, *, pixels: bool = True, prompt: bool = False
    ) -> Outline:
        """The document before its images are decoded.

        Args:
            sample: The sample.
            rng: Draws answers and augmentation; None takes first answers and plain images.
            pixels: False measures only, see ``measure``.
            prompt: True stops where the answer begins, see ``build_prompt``.

        Raises:
            SampleError: as the document itself, save for damaged pixels.
        """
        template = self.dataset.template
        try:
            if prompt:
                pieces = [replace(p, weight=0.0) if isinstance(p, TextPiece) else p for p in template.prompt(sample)]
            elif self._requires_images and not images_of(sample):
                raise SampleError(
                    f"no image among its members, and template.images is required (kind {template.kind}); "
                    "set it to optional to learn the text alone",
                    kind=FaultKind.NO_IMAGE,
                )
            else:
                pieces = template.pieces(sample, rng)
            return self._assemble(pieces, sample, rng, pixels)
        except SampleError as error:
            raise error.located(sample.provenance.shard, sample.provenance.key) from error

    def _assemble(self, pieces: list[Piece], sample: Sample, rng: Draws | None, pixels: bool) -> Outline:
        spec, tokenizer, draft = self.spec, self.tokenizer, _Draft(self.spec)
        pictures = list[Picture]()
        if tokenizer.bos_id is not None:
            draft.add_tokens((tokenizer.bos_id,), 0.0)
        num_images = sum(isinstance(piece, ImagePart) for piece in pieces)
        if spec.placement is Placement.PAIR and num_images != 1:
            raise SampleError(
                f"{num_images} images, but a pair is one image and one text (connector.kind=contrastive)",
                kind=FaultKind.DOCUMENT if num_images else FaultKind.NO_IMAGE,
            )
        for piece in pieces:
            if isinstance(piece, ImagePart):
                if self._transform is None:
                    raise SampleError(f"image {piece.name}, but the model has no image tower")
                if pixels:
                    pictures.append(self._transform.outline(piece.data, rng, piece.size, num_images))
                    views = pictures[-1].views
                else:
                    views = self._transform.measure(piece.size or _shown_size(piece.data), rng, num_images)
                draft.add_image(views, tokenizer.image_id, self._layout)
            elif isinstance(piece, BranchPiece):
                draft.begin_branch()
            elif isinstance(piece, EndPiece):
                draft.add_tokens((tokenizer.eos_id,), piece.weight)
            elif isinstance(piece, TokenPiece):
                draft.add_tokens((self._special[piece.name],), piece.weight)
            else:
                draft.add_tokens(self._encode(piece.text), piece.weight)
        self._check(draft)
        rule = self.dataset.template.loss_weight
        if rule != "token":
            draft.weights = share_weights(draft.weights, draft.branches, rule).tolist()
        if spec.placement is Placement.PAIR:  # A pair counts once, whatever the length of its text.
            draft.weights = [0.0] * (len(draft.ids) - 1) + [1.0]
        return Outline(draft.finish(sample.provenance), tuple(pictures))

    def _encode(self, text: str) -> list[int]:
        """Ids of a text; none of them opens or closes a turn, or lays out an image."""
        check_unicode(text)
        ids = self.tokenizer.encode(text)
        forged = [name for name, token_id in self._reserved.items() if token_id in ids]
        if forged:
            raise SampleError(
                f"the text spells {forged[0]}, which this tokenizer takes for the token; make it a special token of "
                "the tokenizer, which is spelled out in text, or remove it from the text",
                kind=FaultKind.TEXT,
            )
        return ids

    def _check(self, draft: _Draft) -> None:
        """Refuses a document that the model could not learn from.

        Raises:
            SampleError: it has no token, its image tokens and features differ in number, or a branch begins with
                learned text.
        """
        if not draft.ids:
            raise SampleError("it has no token: nothing is in it, and the tokenizer has none to open a document with")
        # No token stands for the image of a pair, and CLIP's vocabulary has none that could.
        if self.spec.placement is not Placement.PAIR:
            # Each embedded feature has its token; an image without embedded views has one anchor.
            expected = sum(map(len, draft.dest)) or len(draft.images)
            found = draft.ids.count(self.tokenizer.image_id)
            if found != expected:
                raise SampleError(
                    f"{found} image tokens, but its {len(draft.images)} images give {expected}: "
                    "does the text spell the image token?"
                )
        for start, end in itertools.pairwise([*draft.branches, len(draft.ids)]):
            if start == end or draft.weights[start] > 0:
                raise SampleError(
                    "a branch begins with learned text, but all branches follow the same token, which cannot predict "
                    "each of them: give its template a prompt",
                    kind=FaultKind.TEXT,
                )


def _shown_size(data: bytes) -> tuple[int, int]:
    header = image_size(data)
    return header.height, header.width


def null_document(spec: MediaSpec, pad_id: int) -> Document:
    """The smallest document that uses every module that ``spec`` has: no label, no weight, never counted.

    ZeRO-3 gathers parameters module by module on all ranks together, so a rank without images must still run its tower.
    """
    height, width = spec.minimal_grid[1:]
    values = np.zeros((height * width, spec.patch_dim), dtype=np.uint8)
    draft = _Draft(spec)
    roles = [True] * spec.needs_embedded + [False] * spec.needs_apart
    if roles:
        views = tuple(MediaItem(values, spec.minimal_grid, embedded) for embedded in roles)
        draft.add_image(views, pad_id, None)
    if not draft.ids:
        draft.add_tokens((pad_id,), 0.0)
    return draft.finish(None)
