"""Draw images from texts, for a user and for the report.

    text --document as in training, up to the first code--> ``draw`` --codes--> image tokenizer --> pixels

Not for: the choice of codes (``mmscale.models.generation``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor, nn

from data_pipeline.batch import MultimodalBatch
from data_pipeline.config import DataConfig, DatasetConfig
from data_pipeline.document import Document
from data_pipeline.images.drawn_images import DrawnImages, ImageTokensConfig
from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.text.templates import DrawingTemplate
from data_pipeline.text.tokenizer import load_tokenizer
from mmscale.errors import ConfigError
from mmscale.metrics.sample_images import Pixels
from mmscale.models.config import ModelConfig
from mmscale.models.generation import ImageGrid, draw
from mmscale.models.image_tokenizer import ImageTokenizer
from mmscale.models.sampling import SamplingConfig

MOST_PIXELS = 8192
"""Longest side of a drawing, pixels."""
MOST_TOGETHER = 16
"""Images that are drawn together without a ``batch_size``, if they have few codes."""
_MOST_TOKENS = 1 << 16
FREE = SamplingConfig(temperature=1.0)
"""Draw each code from its whole distribution. The most likely code each time gives flat images."""

Text = str | Mapping[str, Any]
"""The text of a drawing, or the fields of a sample that its template turns into one."""
Size = int | tuple[int, int]
"""Side of a square image, or height and width, in pixels."""


@dataclass(frozen=True)
class Drawing:
    """A drawn image.

    Attributes:
        pixels: uint8 ``(height, width, 3)``.
        codes: int64 ``(rows, columns)``, the codes of the image tokenizer.
    """

    pixels: Pixels
    codes: npt.NDArray[np.int64]


@dataclass(frozen=True)
class DrawingContext:
    """Inputs of a drawing besides the model and the text.

    Attributes:
        data: Data block whose first data set that draws gives template and image tokens.
        tokenizers: Image tokenizers that are no part of the model, by the path that the configuration names.
    """

    data: DataConfig
    tokenizers: Mapping[Path, ImageTokenizer] = field(default_factory=dict)


def draw_images(
    model: nn.Module,
    data: DataConfig,
    spec: MediaSpec,
    texts: Sequence[Text],
    *,
    size: Size | None = None,
    sampling: SamplingConfig = FREE,
    guidance: float = 1.0,
    batch_size: int | None = None,
    image_tokenizer: ImageTokenizer | None = None,
    device: torch.device | None = None,
) -> list[Drawing]:
    """Draw one image for each text.

    Image i uses random numbers of seed ``sampling.seed + i`` alone, so it does not depend on the images beside it,
    except for rounding. If ZeRO-3 shards the model, all ranks must call with equally many texts and one size.

    Args:
        model: ``MultimodalModel`` or an engine's ``model``, in evaluation mode.
        data: Gives the tokenizer. Its first data set with ``template.kind: drawing``, or with pairs of such, gives
            template and image tokens.
        spec: Media that the model accepts.
        texts: One text for each image. If the template's first prompt has one field, a text fills this field;
            otherwise the text replaces the prompt. A mapping gives the fields themselves.
        size: Height and width in pixels. None for the size that ``image_tokens.grid`` gives.
        sampling: How codes are chosen.
        guidance: Scale of classifier-free guidance, at least 1; 1 for none. The document without the text is that of
            ``template.text_dropout``.
        batch_size: Images drawn together; guidance doubles the sequences. None for 16, or fewer if their sequences
            would have more than 65,536 tokens: the cache of a model of 8 billion parameters has about 9 GB for them.
        image_tokenizer: Decodes the codes. None for the tokenizer that is part of the model.
        device: Device of the model's computation; None for that of its parameters.

    Raises:
        ConfigError: the model draws no images or has no image tokenizer, no data set draws, or an option is out of
            range.
        SampleError: a text is empty or spells a mark, or a field is missing.
    """
    decoder = decoder_of(model, image_tokenizer, sampling, guidance)
    prompts = DrawingPrompts.open(data, spec, size, decoder.stride)
    prompts.check(texts)
    device = device or next(model.parameters()).device
    longest = prompts.grid.num_steps * (1 if guidance == 1 else 2)
    batch_size = batch_size or max(1, min(MOST_TOGETHER, _MOST_TOKENS // longest))
    drawings = list[Drawing]()
    for start in range(0, len(texts), batch_size):
        chosen = texts[start : start + batch_size]
        codes = draw(
            model,  # type: ignore[arg-type]
            prompts.batch(chosen, with_dropped=guidance != 1).to(device),
            [prompts.grid] * len(chosen),
            sampling.for_sequence(start),
            guidance=guidance,
        )
        drawings += [Drawing(to_pixels(decoder.decode(each[None])[0]), each.cpu().numpy()) for each in codes]
    return drawings


@dataclass(frozen=True)
class DrawingPrompts:
    """Builds the documents of texts up to the first code of images of one size, as in training.

    Attributes:
        grid: Rows and columns of the codes.
        template: Template of the texts.
        builder: Builds the documents.
    """

    grid: ImageGrid
    template: DrawingTemplate
    builder: DocumentBuilder

    @classmethod
    def open(cls, data: DataConfig, spec: MediaSpec, size: Size | None, stride: int) -> DrawingPrompts:
        """Return the prompts of the first data set of ``data`` that draws.

        Args:
            data: The data block.
            spec: Media that the model accepts.
            size: Height and width in pixels; None for the size that ``image_tokens.grid`` gives.
            stride: Pixels of a code, a side.

        Raises:
            ConfigError: no data set draws, or the size does not fit.
            DataConfigError: a mark is no token of the tokenizer.
        """
        dataset, template = drawing_dataset(data)
        rows, columns = grid_of(dataset, size, stride)
        tokenizer = load_tokenizer(data.tokenizer)
        row_end = DrawnImages(tokens_of(dataset), tokenizer).row_end
        grid = ImageGrid(rows, columns, row_end[0] if row_end else None)
        return cls(grid, template, DocumentBuilder(dataset, tokenizer, spec))

    def words(self, text: Text) -> str:
        """Return the text of an image as the model reads it."""
        return self.template.text_to_draw(text)

    def batch(self, texts: Sequence[Text], *, with_dropped: bool = False) -> MultimodalBatch:
        """Return the documents in order, then with ``with_dropped`` those without the texts, then a dummy document."""
        documents = self._documents(texts) + (self._documents(texts, drop_text=True) if with_dropped else [])
        spec, tokenizer = self.builder.spec, self.builder.tokenizer
        return collate([Pack((*documents, dummy_document(spec, tokenizer.pad_id)), lane=-1)], spec)

    def check(self, texts: Sequence[Text]) -> None:
        """Check that the model can draw all texts.

        Raises:
            ConfigError: a text with its codes exceeds the positions of the model.
            SampleError: a text is empty or spells a mark, or a field is missing.
        """
        most, grid = self.builder.spec.max_document_tokens, self.grid
        longest = max((each.num_tokens for each in self._documents(texts)), default=0) + grid.num_steps
        if most is not None and longest > most:
            raise ConfigError(
                f"a text with {grid.rows}x{grid.columns} codes needs {longest} positions, and the model has {most}; "
                "choose a smaller size"
            )

    def _documents(self, texts: Sequence[Text], *, drop_text: bool = False) -> list[Document]:
        rows, columns = self.grid.rows, self.grid.columns
        build = self.builder.build_drawing_prompt
        return [build(self.words(text), rows, columns, drop_text=drop_text) for text in texts]


def check_model(config: object, sampling: SamplingConfig, guidance: float) -> ModelConfig:
    """Return the configuration of a model if the model draws with these options.

    Raises:
        ConfigError: it does not.
    """
    if not isinstance(config, ModelConfig) or not config.decoder.image_ids:
        raise ConfigError("this model draws no images: its configuration has no model.decoder.image_tokens")
    if not math.isfinite(guidance) or guidance < 1:
        raise ConfigError(f"guidance {guidance:g}: must be at least 1, which is no guidance")
    if sampling.repetition_penalty != 1:
        raise ConfigError(f"repetition penalty {sampling.repetition_penalty:g}: images repeat codes; leave it at 1")
    return config


def pixels_of_a_code(own: int | None, given: ImageTokenizer | None) -> int:
    """Return the side of a code in pixels, if exactly one image tokenizer can decode the codes.

    Args:
        own: Stride of the image tokenizer that is part of the model; None if it has none.
        given: The image tokenizer that the configuration names.

    Raises:
        ConfigError: there is none, or there are two.
    """
    if own is not None and given is not None:
        raise ConfigError("the model has an image tokenizer already (model.image_tokenizer); leave tokenizer out")
    if own is None and given is None:
        raise ConfigError(
            "the model has no image tokenizer (model.image_tokenizer); set tokenizer to the run of the one that "
            "encoded the data"
        )
    return given.stride if given is not None else own  # type: ignore[return-value]


def decoder_of(
    model: nn.Module, given: ImageTokenizer | None, sampling: SamplingConfig, guidance: float
) -> ImageTokenizer:
    """Return the tokenizer that decodes the model's codes.

    Raises:
        ConfigError: there is none or one of another size, the model draws no images, or an option is out of range.
    """
    config = check_model(getattr(model, "config", None), sampling, guidance)
    decoder = given if given is not None else getattr(model, "image_tokenizer", None)
    if not isinstance(decoder, ImageTokenizer):
        raise ConfigError(
            "this model has no image tokenizer to turn codes into pixels (model.image_tokenizer is null); name the run "
            "of the tokenizer that encoded its data (--tokenizer RUN)"
        )
    if decoder.codebook_size != len(config.decoder.image_ids):
        raise ConfigError(
            f"the image tokenizer has {decoder.codebook_size} codes, and the model draws with "
            f"{len(config.decoder.image_ids)}; use the tokenizer that encoded the model's data"
        )
    return decoder


def drawing_dataset(data: DataConfig) -> tuple[DatasetConfig, DrawingTemplate]:
    """Return the first data set that draws, and its template.

    Raises:
        ConfigError: none does.
    """
    datasets = data.datasets or (data.prompts,)
    for dataset in datasets:
        template = dataset.template.branch_template
        if isinstance(template, DrawingTemplate) and template.caption_last < 1:
            return dataset, template
    raise ConfigError(
        "no data set of this run has a text before an image to draw (template.kind: drawing, with caption_last below "
        "1), so it is unknown how a text to draw begins; run with such a data set"
    )


def tokens_of(dataset: DatasetConfig) -> ImageTokensConfig:
    if dataset.image_tokens is None:
        raise ConfigError(f"data set {dataset.name}: image_tokens is null, so the marks of images are unknown")
    return dataset.image_tokens


def grid_of(dataset: DatasetConfig, size: Size | None, stride: int) -> tuple[int, int]:
    """Return rows and columns of the codes of an image.

    Raises:
        ConfigError: the size is missing, out of range, no multiple of ``stride``, or not the one that was trained.
    """
    trained = tokens_of(dataset).grid
    if size is None:
        if trained is None:
            raise ConfigError(
                f"give a size: data set {dataset.name} has images of several (image_tokens.grid is null). A size in "
                f"pixels is a multiple of {stride}: --size {stride * 16}"
            )
        return trained
    height, width = size if isinstance(size, tuple) else (size, size)
    if not all(1 <= side <= MOST_PIXELS and side % stride == 0 for side in (height, width)):
        raise ConfigError(
            f"size {height}x{width}: both sides must be multiples of the {stride} pixels of a code, at most "
            f"{MOST_PIXELS}"
        )
    grid = height // stride, width // stride
    if trained is not None and grid != trained:
        raise ConfigError(
            f"size {height}x{width}: the model draws {stride * trained[0]}x{stride * trained[1]} pixels "
            f"(image_tokens.grid of data set {dataset.name}); leave the size out"
        )
    return grid


def to_pixels(image: Float[Tensor, "channels H W"]) -> Pixels:
    """Return an image of values in [-1, 1] as uint8 ``(H, W, 3)``.

    Values outside are clamped. A single channel is repeated three times.
    """
    values = ((image.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    return np.ascontiguousarray(np.repeat(values, 3, axis=2) if values.shape[2] == 1 else values[:, :, :3])
