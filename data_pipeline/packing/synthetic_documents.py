"""Documents made without a sample: the dummy document, and documents of given sizes for estimates and checks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipeline.document import Document, MediaItem
from data_pipeline.images.drawn_images import DrawnTokens
from data_pipeline.images.transforms import ImageTransform, TransformConfig
from data_pipeline.media_spec import Grid, MediaSpec, Placement
from data_pipeline.packing.draft import Draft
from data_pipeline.sample import Provenance


def example_document(
    transforms: TransformConfig,
    spec: MediaSpec,
    image_sizes: Sequence[tuple[int, int]],
    text_tokens: int,
    drawn: DrawnTokens | None = None,
    drawn_weight: float = 1.0,
    grids: Mapping[str, Sequence[Grid]] | None = None,
) -> Document:
    """Return a document of given sizes: images, items of other modalities, then learned text.

    It needs no sample, tokenizer or layout. Its token ids and pixels are meaningless. For estimates of a run whose data
    do not exist here.

    Args:
        transforms: How an image becomes crops.
        spec: The model's inputs.
        image_sizes: (height, width) of each image in pixels.
        text_tokens: Number of text tokens, at least 1.
        drawn: An image as tokens, after the text.
        drawn_weight: Loss weight of its codes.
        grids: Rows of values of the items of each further modality, by its name.

    Raises:
        DataConfigError: the transforms do not fit the model.
        SampleError: an image is too large, too small or too elongated.
    """
    draft = Draft(spec)
    if image_sizes:
        transform = ImageTransform(transforms, spec)
        for size in image_sizes:
            draft.add_image(transform.dry_run(size, None, len(image_sizes)), 0, None)
    _add_clips(draft, grids or {}, 0)
    draft.add_tokens((0,) * text_tokens, 1.0)
    if drawn is not None:
        draft.add_drawn(drawn, drawn_weight, 0.0)
    return draft.finish(Provenance("example", "", "", 0))


def dummy_document(spec: MediaSpec, pad_id: int) -> Document:
    """Return the smallest document that uses every module of the model. It has no labels, loss weights or provenance.

    ZeRO-3 gathers the parameters of a module on all ranks together, so a rank without images or without sound must
    still run its towers. It has one minimal item of every modality.
    An image tokenizer needs no image: one call for each batch gathers it (``ImageTokenizer.forward``).
    """
    draft = Draft(spec)
    if crops := _crops(spec, spec.minimal_grid):
        draft.add_image(crops, pad_id, None)
    if spec.videos is not None:
        draft.add_image((_video(spec, spec.videos.minimal_grid),), pad_id, None)
    _add_clips(draft, {name: [inputs.minimal_grid] for name, inputs in spec.modalities.items()}, pad_id)
    if not draft.ids:
        draft.add_tokens((pad_id,), 0.0)
    return draft.finish(None)


def plain_document(
    spec: MediaSpec,
    token_ids: Sequence[int],
    image_id: int,
    grids: Sequence[Grid],
    origin: Provenance,
    *,
    num_answers: int = 1,
    uncoded: Sequence[tuple[int, int]] = (),
    clips: Mapping[str, Sequence[Grid]] | None = None,
    videos: Sequence[Grid] = (),
) -> Document:
    """Return a document of black images and videos, silence and then tokens, made without a sample.

    Args:
        spec: The model's inputs.
        token_ids: The text after the images, at least two tokens. The model learns all but the first; of a pair, the
            weight is at the last token.
        image_id: Id of the placeholder of an image feature.
        grids: Patches of the crops of each image. An image has one crop for each role: embedded, attended or compared.
        origin: Its provenance.
        num_answers: 1 makes no branches; 2 makes a preference pair of at least four tokens.
        uncoded: Rows and columns of images as tokens, learned, whose codes the model computes.
        videos: Patches of each video, of a model that embeds them.
        clips: Rows of values of the items of each further modality, by its name; all values are 0.

    Raises:
        SampleError: a grid does not fit the model.
    """
    draft = Draft(spec)
    for grid in grids:
        draft.add_image(_crops(spec, grid), image_id, None)
    for grid in videos:
        draft.add_image((_video(spec, grid),), image_id, None)
    _add_clips(draft, clips or {}, image_id)
    for height, width in uncoded:
        pixels = np.zeros((height * width, spec.of_codes.patch_dim), np.uint8)
        codes = DrawnTokens(np.full(height * width, image_id, np.int32), np.ones(height * width, np.bool_))
        draft.add_drawn(codes, 1.0, 0.0, MediaItem(pixels, (1, height, width), embedded=True))
    draft.add_tokens(token_ids[:num_answers], 0.0)
    for answer in range(num_answers):
        if num_answers > 1:
            draft.begin_branch(repeats_last=True)
        draft.add_tokens(token_ids[num_answers + answer :: num_answers], 1.0)
    if spec.placement is Placement.PAIR:
        draft.weights = [0.0] * (len(draft.ids) - 1) + [1.0]
    return draft.finish(origin)


def _crops(spec: MediaSpec, grid: Grid) -> tuple[MediaItem, ...]:
    """Return one black crop for each kind of item that each batch needs; none for a text model."""
    values = np.zeros((math.prod(grid), spec.patch_dim), dtype=np.uint8)
    roles = [True] * spec.needs_embedded + [False] * spec.needs_unembedded
    return tuple(MediaItem(values, grid, embedded) for embedded in roles)


def _video(spec: MediaSpec, grid: Grid) -> MediaItem:
    """Return a black video. Each of its patches spans the same frames."""
    values = np.zeros((math.prod(grid), spec.patch_dim), dtype=np.uint8)
    return MediaItem(values, grid, embedded=True, is_video=True)


def _add_clips(draft: Draft, grids: Mapping[str, Sequence[Grid]], placeholder: int) -> None:
    """Append items of zeros, each as an input of its own."""
    for name, own in grids.items():
        inputs = draft.spec.modalities[name]
        for grid in own:
            values = np.zeros((math.prod(grid), inputs.patch_dim), inputs.dtype)
            draft.add_clip([MediaItem(values, grid, embedded=True, modality=name)], placeholder)
