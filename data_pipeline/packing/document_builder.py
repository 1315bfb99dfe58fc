"""Builds the document of a sample: token ids, labels, positions, token slots of features, and attention spans.

    bos | image: one placeholder per feature (embedded) or one anchor (attended), and its layout | text | ... | eos
    bos | text | eos    and one image without tokens, if the model compares image and text

Not for: several documents together (``packer``, ``collate``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeGuard

from data_pipeline.document import Document, MediaItem
from data_pipeline.errors import DataConfigError, FaultKind, SampleError
from data_pipeline.images.drawn_images import DrawnImages, ImageTokensConfig, code_transform
from data_pipeline.images.image_tokens import ImageLayout
from data_pipeline.images.transforms import ImageTransform, TransformConfig
from data_pipeline.images.video import VideoConfig, Videos
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.modality import DecodeTask, Film, ModalityConfig, ModalityInputs
from data_pipeline.order.randomness import Rng
from data_pipeline.packing.draft import Draft
from data_pipeline.packing.stored_reference import reference_log_probs
from data_pipeline.sample import ImagePart, MediaPart, Part, Provenance, Sample, TextPart, VideoPart
from data_pipeline.shards.image_header import image_size
from data_pipeline.text.templates import (
    BranchPiece,
    DialogueTemplate,
    DrawingTemplate,
    DrawnPiece,
    EndPiece,
    OpeningPiece,
    Piece,
    PreferenceTemplate,
    TemplateConfig,
    TextPiece,
    TokenPiece,
)
from data_pipeline.text.templates.base import joined_texts, media_of, share_weights, text
from data_pipeline.text.tokenizer import Tokenizer, check_unicode


@dataclass(frozen=True)
class DocumentPlan:
    """A document whose images, videos and sound are not decoded yet.

    Attributes:
        document: The document; the values of its items are not written yet.
        decode_tasks: The tasks that decode the media and write the values.
    """

    document: Document
    decode_tasks: tuple[DecodeTask, ...] = ()

    def __call__(self) -> Document:
        """Decode the media and return the document. Call it once.

        Raises:
            SampleError: an image, a video or a clip of sound cannot be decoded.
        """
        try:
            for task in self.decode_tasks:
                task.decode()
        except SampleError as error:
            origin = self.document.provenance
            raise error if origin is None else error.located(origin.shard, origin.key) from error
        return self.document


class DocumentConfig(Protocol):
    """The part of a data set's configuration that determines its documents."""

    @property
    def template(self) -> TemplateConfig:
        """How the texts and images of a sample form a document."""

    @property
    def transforms(self) -> TransformConfig:
        """How an image becomes crops."""

    @property
    def image_tokens(self) -> ImageTokensConfig | None:
        """How an image becomes tokens of the decoder; None: it does not."""

    @property
    def video(self) -> VideoConfig | None:
        """How a video becomes frames, patches and tokens; None: it does not."""

    @property
    def modalities(self) -> Mapping[str, ModalityConfig]:
        """How the inputs of further modalities become values and tokens, by name."""


class DocumentBuilder:
    """Builds documents from the samples of one data set.

    Args:
        dataset: Template and transforms of the data set.
        tokenizer: The tokenizer.
        spec: The model's inputs.

    Raises:
        DataConfigError: the template, the transform or the layout does not fit the model, or the tokenizer lacks a
            token of the layout or the template.
    """

    def __init__(self, dataset: DocumentConfig, tokenizer: Tokenizer, spec: MediaSpec) -> None:
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.spec = spec
        # A template without images uses no transform, so the transform need not fit the model.
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
        if takes_images and spec.placement is not Placement.PAIR and tokenizer.image_id < 0:
            raise DataConfigError(
                "data.tokenizer.image_token is null, but the model reads images: name a token for them"
            )
        self._transform = ImageTransform(transforms, spec) if takes_images else None
        if dataset.template.draws and dataset.image_tokens is None:
            raise DataConfigError(
                f"template.kind={dataset.template.kind}: needs data.image_tokens, the ids of images in the decoder"
            )
        self._drawn = None if dataset.image_tokens is None else DrawnImages(dataset.image_tokens, tokenizer)
        self._draws_pixels = self._drawn is not None and self._drawn.config.encoded == "in_step"
        # Also without ``takes_images``: template drawing, which uses no tower. A tower's transform is not used here.
        uses_codes = dataset.template.draws or (dataset.template.takes_images and not takes_images)
        self._reads_codes = self._drawn is not None and uses_codes
        self._code_transform = code_transform(transforms, spec) if self._draws_pixels and uses_codes else None
        self._video = Videos(dataset.video, tokenizer, spec) if takes_images and dataset.video is not None else None
        self._configs = dataset.modalities if dataset.template.takes_images else {}
        given = [each.inputs(tokenizer, spec) for name, each in self._configs.items() if name in spec.modalities]
        self._modalities: dict[type, ModalityInputs] = {each.part_type: each for each in given}
        uses_images = takes_images or (self._drawn is not None and dataset.template.takes_images)
        uses_media = uses_images or bool(self._modalities)
        template = dataset.template
        self._stored_reference = template.stored_reference if isinstance(template, PreferenceTemplate) else None
        is_random = transforms.augment is not None or getattr(transforms, "crop", None) == "random"
        if self._stored_reference is not None and is_random and (self._transform or self._code_transform):
            raise DataConfigError(
                "template.stored_reference: a randomly cropped or augmented image differs from the one that the "
                "reference model read; set crop: center and augment: null in the transforms"
            )
        branch = template.branch_template
        if self._stored_reference is not None and isinstance(branch, DrawingTemplate) and len(branch.prompts) > 1:
            raise DataConfigError(
                "template.stored_reference: the reference model read one prompt, and each.prompts has "
                f"{len(branch.prompts)}, of which each epoch draws another; give one, or set stored_reference to null"
            )
        self._requires_images = uses_media and spec.placement is not Placement.PAIR and dataset.template.requires_images
        grids = () if self._transform is None else self._transform.grids
        layout = transforms.layout if takes_images else None
        self._layout = None if layout is None else ImageLayout.resolve(layout, tokenizer, spec, grids)
        names = dataset.template.named_tokens
        self._special = {name: tokenizer.special_id(name, "template.special_tokens") for name in names}
        if tokenizer.image_id in self._special.values():
            raise DataConfigError("template.special_tokens: the image token marks images; a template cannot use it")
        laid_out = layout.tokens(grids) if layout is not None else []
        self._reserved = self._special | {name: tokenizer.special_id(name, "transforms.layout") for name in laid_out}
        self._reserved |= {} if self._drawn is None else self._drawn.marks
        self._placeholders = {tokenizer.image_id, *(each.placeholder for each in given)}
        if self._video is not None:
            self._reserved |= self._video.reserved
            self._placeholders.add(self._video.placeholder)
        for each in given:
            self._reserved |= each.reserved
        has_turns, video = any(each.interleave_seconds is not None for each in given), dataset.video
        if has_turns and video is not None and (video.timestamps is not None or video.tiling or video.scaled):
            raise DataConfigError(
                "data.audio.interleave_seconds: excludes data.video.timestamps, tiling and scaled, because the order "
                "of their tokens among those of the sound is not defined; leave one out"
            )

    def __call__(self, sample: Sample, rng: Rng | None = None) -> Document:
        """Build a document with its pixels.

        Args:
            sample: The sample.
            rng: Draws captions, answers and augmentation; None uses the first ones and no augmentation.

        Raises:
            SampleError: the sample does not fit its template, an image is bad, or image tokens and features differ in
                number.
        """
        return self.plan(sample, rng)()

    def dry_run(self, sample: Sample, rng: Rng | None = None) -> Document:
        """Build a document without decoding its images. Only the pixels differ: they are black and take no memory.

        Image sizes come from ``ImagePart.size``, or from the image's header if that is None. Pass the same ``rng`` to
        get the same draws.

        Raises:
            SampleError: as for the document with pixels, except for damaged pixels, which only decoding finds.
        """
        return self.plan(sample, rng, pixels=False).document

    def build_prompt(self, sample: Sample) -> Document:
        """Build the document up to the start of the answer, without augmentation. None of its tokens is learned.

        Raises:
            SampleError: as for the whole document.
        """
        return self.plan(sample, prompt=True)()

    def dry_run_prompt(self, sample: Sample) -> Document:
        """As ``build_prompt``, without decoding images; see ``dry_run``."""
        return self.plan(sample, pixels=False, prompt=True).document

    def build_drawing_prompt(self, words: str, rows: int, columns: int, *, drop_text: bool = False) -> Document:
        """Build the document up to the first code of an image to draw. None of its tokens is learned.

        Args:
            words: The text before the image, see ``DrawingTemplate.text_to_draw``.
            rows: Rows of codes.
            columns: Columns of codes.
            drop_text: Replace the text as training does when it drops one, for classifier-free guidance.

        Raises:
            DataConfigError: the template is not of kind ``drawing``.
            SampleError: the text spells a mark.
        """
        template = self.dataset.template.branch_template
        if not isinstance(template, DrawingTemplate):
            raise DataConfigError(f"template.kind={self.dataset.template.kind}: draws no images; use drawing")
        pieces = template.drawing_prompt(words, rows, columns, drop_text=drop_text)
        return self._assemble(pieces, Sample((), {}, Provenance("prompt", "", words, 0)), None, pixels=False)()

    def plan(
        self, sample: Sample, rng: Rng | None = None, *, pixels: bool = True, prompt: bool = False
    ) -> DocumentPlan:
        """Build everything of a document except its pixels; calling the plan decodes them.

        Args:
            sample: The sample.
            rng: Draws captions, answers and augmentation; None uses the first ones and no augmentation.
            pixels: False makes a dry run, see ``dry_run``.
            prompt: True stops where the answer begins, see ``build_prompt``.

        Raises:
            SampleError: as for the document with pixels, except for damaged pixels.
        """
        template = self.dataset.template
        try:
            sample = self._without_unread(sample)
            if prompt:
                pieces = [replace(p, weight=0.0) if isinstance(p, TextPiece) else p for p in template.prompt(sample)]
            elif self._requires_images and not media_of(sample):
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

    def _assemble(
        self, pieces: Sequence[Piece | OpeningPiece], sample: Sample, rng: Rng | None, pixels: bool
    ) -> DocumentPlan:
        spec, tokenizer, draft = self.spec, self.tokenizer, Draft(self.spec)
        tasks: list[DecodeTask] | None = [] if pixels else None
        if tokenizer.bos_id is not None:
            draft.add_tokens((tokenizer.bos_id,), 0.0)
        num_images = sum(isinstance(piece, ImagePart) for piece in pieces)
        if spec.placement is Placement.PAIR and num_images != 1:
            raise SampleError(
                f"{num_images} images, but a pair is one image and one text (connector.kind=contrastive)",
                kind=FaultKind.DOCUMENT if num_images else FaultKind.NO_IMAGE,
            )
        for piece in self._with_parts_of_videos(pieces):
            if isinstance(piece, DrawnPiece) or self._is_coded(piece):
                # Without a vision tower, the model reads an image or a video as tokens.
                drawn = piece if isinstance(piece, DrawnPiece) else DrawnPiece(piece, 0.0, 0.0)
                self._add_drawn(draft, drawn, rng, tasks)
            elif isinstance(piece, ImagePart):
                assert self._transform is not None, "handled above"
                crops = _crops_of(self._transform, piece, rng, num_images, tasks)
                draft.add_image(crops, tokenizer.image_id, self._layout)
            elif isinstance(piece, VideoPart):
                assert self._video is not None, "no video is left without it"
                crops = _items_of(self._video, piece, tasks)
                draft.add_image(crops, self._video.placeholder, self._video.layout_of(piece))
            elif isinstance(piece, Film):
                self._add_film(draft, piece, tasks)
            elif (inputs := self._modalities.get(type(piece))) is not None:
                assert isinstance(piece, inputs.part_type), "the inputs are found by their type"
                draft.add_clip(_items_of(inputs, piece, tasks), inputs.placeholder, inputs.start, inputs.end)
            elif isinstance(piece, BranchPiece):
                draft.begin_branch(piece.repeats_last)
            elif isinstance(piece, EndPiece):
                draft.add_tokens((tokenizer.eos_id,), piece.weight)
            elif isinstance(piece, OpeningPiece):
                assert self._drawn is not None, "a template that draws has image tokens"
                draft.add_tokens(self._drawn.opening(piece.rows, piece.columns), 0.0)
            elif isinstance(piece, TokenPiece):
                draft.add_tokens((self._special[piece.name],), piece.weight)
            else:
                assert isinstance(piece, TextPiece), "media that nothing reads are left out before"
                ids = self._encode(piece.text)
                draft.add_tokens([tokenizer.pad_id] * len(ids) if piece.is_padding else ids, piece.weight)
        self._check(draft)
        rule = self.dataset.template.loss_weight
        if rule != "token":
            draft.weights = share_weights(draft.weights, draft.branches, rule).tolist()
        if spec.placement is Placement.PAIR:  # A pair counts once, whatever the length of its text.
            draft.weights = [0.0] * (len(draft.ids) - 1) + [1.0]
        document = draft.finish(sample.provenance)
        if self._stored_reference is not None and document.branches:
            further = (self.dataset.video, *self._configs.values())
            stored = reference_log_probs(
                sample.fields, document, self.dataset.transforms, further, self._stored_reference
            )
            document = replace(document, reference=stored)
        return DocumentPlan(document, tuple(tasks or ()))

    def _add_drawn(self, draft: Draft, drawn: DrawnPiece, rng: Rng | None, tasks: list[DecodeTask] | None) -> None:
        """Append an image or a video as tokens.

        Raises:
            SampleError: the model reads no images as tokens, or the image is bad.
        """
        if self._drawn is None:
            raise SampleError(f"image {drawn.image.name}, but the model has no image tower")
        if not self._draws_pixels or isinstance(drawn.image, VideoPart):
            draft.add_drawn(self._drawn.tokens(drawn.image), drawn.weight, drawn.mark_weight)
            return
        assert self._code_transform is not None, "every template with images as tokens has one"
        (crop,) = _crops_of(self._code_transform, drawn.image, rng, 1, tasks)
        tokens = self._drawn.uncoded_tokens(drawn.image.name, *crop.grid[1:])
        draft.add_drawn(tokens, drawn.weight, drawn.mark_weight, crop)

    def _add_film(self, draft: Draft, film: Film, tasks: list[DecodeTask] | None) -> None:
        """Append a video and its track in turns."""
        video, track = self._video, film.inputs
        assert video is not None, "only a video that is read has turns"
        assert track.interleave_seconds is not None, "only with it is there a film"
        (frames,) = _items_of(video, film.video, tasks)
        draft.add_interleaved(
            frames,
            _items_of(track, film.track, tasks),
            (video.placeholder, track.placeholder),
            (*video.start, *track.start),
            (*track.end, *video.end),
            track.interleave_seconds,
        )

    def _is_coded(self, piece: Piece | OpeningPiece | Film | Part) -> TypeGuard[ImagePart | VideoPart]:
        """Return whether the model reads an image or a video as tokens, instead of through a tower."""
        if isinstance(piece, VideoPart):
            return self._reads_codes and piece.grid is not None
        return isinstance(piece, ImagePart) and self._transform is None

    def _without_unread(self, sample: Sample) -> Sample:
        """Return the sample without the videos and other media that nothing here reads; images are kept.

        Raises:
            SampleError: the template requires media, and no other are left.
        """
        reads_videos = self._video is not None or any(each.reads_tracks for each in self._modalities.values())
        read = (TextPart, ImagePart, *([VideoPart] if reads_videos else []), *self._modalities)

        def is_read(part: Part) -> bool:
            return isinstance(part, read) or self._is_coded(part)

        rest = tuple(filter(is_read, sample.parts))
        if len(rest) == len(sample.parts):
            return sample
        if self._requires_images and all(isinstance(part, TextPart) for part in rest):
            unread = next(itertools.filterfalse(is_read, sample.parts))
            kind = type(unread).__name__.removesuffix("Part").lower()
            takes = self.spec.placement is not Placement.NONE if kind == "video" else kind in self.spec.modalities
            reason = f"the data set has no block {kind} (data.{kind})" if takes else f"the model takes no {kind}"
            if kind == "video" and self._reads_codes:
                reason = "it has no token grid; write token grids with: mmscale data encode --video"
            raise SampleError(f"it has {kind} and no image, but {reason}", kind=FaultKind.NO_IMAGE)
        return replace(sample, parts=rest)

    def _with_parts_of_videos(self, pieces: Iterable[Piece | OpeningPiece]) -> Sequence[Piece | OpeningPiece | Film]:
        """Return the pieces, with the texts around each video, and the tracks that modalities read after or within it.

        Raises:
            SampleError: nothing of a video is read: the data set has no block video, and the video has no track.
        """
        found = list[Piece | OpeningPiece | Film]()
        for piece in self._with_tracks(pieces):
            before = after = ""
            if isinstance(piece, VideoPart) and self._video is not None:
                before, after = self._video.texts_around(piece)
            found += [*text(before), piece, *text(after)]
        template = self.dataset.template.branch_template
        return joined_texts(found) if isinstance(template, DialogueTemplate) and template.joined else found

    def _with_tracks(self, pieces: Iterable[Piece | OpeningPiece]) -> Iterator[Piece | OpeningPiece | Film]:
        """Yield the pieces, with the tracks that modalities read after or within each video; raises as its caller."""
        for piece in pieces:
            if not isinstance(piece, VideoPart):
                yield piece
                continue
            tracks = [(inputs, inputs.track_of(piece)) for inputs in self._modalities.values()]
            found = [(inputs, track) for inputs, track in tracks if track is not None]
            turns = [Film(piece, track, inputs) for inputs, track in found if inputs.interleave_seconds is not None]
            if self._video is not None and turns:
                yield turns[0]
                found = [(inputs, track) for inputs, track in found if inputs is not turns[0].inputs]
            elif self._video is not None or self._is_coded(piece):
                yield piece
            elif not found:
                reason = f"the video {piece.name} has no sound track, and the data set has no block video (data.video)"
                raise SampleError(reason, kind=FaultKind.NO_IMAGE)
            yield from (track for _, track in found)

    def _encode(self, text: str) -> list[int]:
        """Return the ids of a text.

        Raises:
            SampleError: the text is not valid Unicode, or contains a special token of the template or the layout.
        """
        check_unicode(text)
        ids = self.tokenizer.encode(text)
        forged = [name for name, token_id in self._reserved.items() if token_id in ids]
        if not forged and self._drawn is not None and self._drawn.spelled_by(ids):
            forged = ["a code of an image"]
        if forged:
            raise SampleError(
                f"the text spells {forged[0]}, which this tokenizer encodes as that token; make it a special token of "
                "the tokenizer, so that text cannot produce it, or remove it from the text",
                kind=FaultKind.TEXT,
            )
        return ids

    def _check(self, draft: Draft) -> None:
        """Check that the model can use the document.

        Raises:
            SampleError: the document has no token, its image tokens and features differ in number, or a branch is empty
                or begins with learned text.
        """
        if not draft.ids:
            raise SampleError("it has no token: the sample is empty, and the tokenizer has no bos token")
        # The image of a pair has no token.
        if self.spec.placement is not Placement.PAIR:
            expected = draft.num_placeholders
            found = sum(map(draft.ids.count, self._placeholders))
            if found != expected:
                raise SampleError(
                    f"{found} image tokens, but its {len(draft.images) - len(draft.drawn)} images give {expected}: "
                    "does the text contain the image token?"
                )
        for start, end in itertools.pairwise([*draft.branches, len(draft.ids)]):
            if start == end or draft.weights[start] > 0:
                raise SampleError(
                    "a branch begins with learned text, but all branches follow the same token, which cannot predict "
                    "each of them: give its template a prompt",
                    kind=FaultKind.TEXT,
                )


def _crops_of(
    transform: ImageTransform, image: ImagePart, rng: Rng | None, count: int, tasks: list[DecodeTask] | None
) -> tuple[MediaItem, ...]:
    """Return the crops of an image, and append the task that decodes them to ``tasks``; None makes a dry run."""
    if tasks is None:
        size = image.size
        if size is None:
            header = image_size(image.data)
            size = header.height, header.width
        return transform.dry_run(size, rng, count)
    tasks.append(transform.decode_task(image.data, rng, image.size, count))
    return tasks[-1].crops


def _items_of(
    inputs: Videos | ModalityInputs, part: MediaPart, tasks: list[DecodeTask] | None
) -> tuple[MediaItem, ...]:
    """Return the items of a video or of another modality, as ``_crops_of``."""
    if tasks is None:
        return inputs.dry_run(part)
    tasks.append(inputs.decode_task(part))
    return tasks[-1].crops
