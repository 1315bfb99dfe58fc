"""Answers of text and drawings in one sequence, by a model whose codes are tokens of its vocabulary (Emu3).

    prompt --text--> mark of an image --size as text--> grid of codes, rows and marks enforced --text--> ... --> end

The model decides where an image begins, and how large it is unless the caller does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from data_pipeline.batch import MultimodalBatch
from data_pipeline.config import DataConfig
from data_pipeline.document import Document
from data_pipeline.images.drawn_images import DrawnImages
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.draft import Draft
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.sample import Provenance
from data_pipeline.text.tokenizer import Tokenizer, load_tokenizer
from mmscale.errors import ConfigError
from mmscale.evaluate.answers import prompt_document
from mmscale.evaluate.drawings import (
    MOST_PIXELS,
    Drawing,
    Size,
    check_model,
    decoder_of,
    drawing_dataset,
    grid_of,
    to_pixels,
    tokens_of,
)
from mmscale.models.generation import ImageGrid, draw, generate
from mmscale.models.image_tokenizer import ImageTokenizer
from mmscale.models.image_tokens import VocabularyImageTokensConfig
from mmscale.models.sampling import SamplingConfig

MOST_IMAGES = 16
"""Most drawings of an answer; the answer ends before another one."""
_MOST_SIZE_TOKENS = 16


def respond_with_drawings(
    model: nn.Module,
    data: DataConfig,
    drawing_data: DataConfig,
    spec: MediaSpec,
    prompt: str | None,
    *,
    size: Size | None = None,
    max_new_tokens: int = 512,
    sampling: SamplingConfig = SamplingConfig(temperature=1.0),
    guidance: float = 1.0,
    image_tokenizer: ImageTokenizer | None = None,
) -> list[str | Drawing]:
    """Answer a prompt with text and drawings. The model must be unsharded.

    Args:
        model: ``MultimodalModel`` in evaluation mode.
        data: Gives the tokenizer and the template of the prompt, as for ``respond``.
        drawing_data: Gives marks and ids of images, as for ``draw_images``.
        spec: Media that the model accepts.
        prompt: The prompt; None for the first prompt of the template.
        size: Height and width of every drawing in pixels; None for the size that the model writes, or the only one.
        max_new_tokens: Largest number of text tokens, all texts of the answer together.
        sampling: How tokens and codes are chosen.
        guidance: Scale of classifier-free guidance of the drawings.
        image_tokenizer: As for ``draw_images``.

    Returns:
        Texts without surrounding white space and drawings, in order, without empty texts.

    Raises:
        ConfigError: the model does not write both, an option does not fit, or the model wrote no valid size.
        SampleError: the prompt does not fit the template.
    """
    config = check_model(getattr(model, "config", None), sampling, guidance)
    decoder = decoder_of(model, image_tokenizer, sampling, guidance)
    if not isinstance(config.decoder.image_tokens, VocabularyImageTokensConfig):
        raise ConfigError(
            "this model has a head of its own for images (image_tokens.kind=separate), so its text cannot begin one; "
            "draw with --images N"
        )
    if spec.placement is not Placement.NONE:
        raise ConfigError("this model has a vision tower; answers with drawings need a model that has none")
    dataset, _ = drawing_dataset(drawing_data)
    tokenizer = load_tokenizer(data.tokenizer)
    images = DrawnImages(tokens_of(dataset), tokenizer)
    if "start" not in images.marks:
        raise ConfigError(f"data set {dataset.name}: image_tokens.start is null, so no text can begin an image")
    writes_size = size is None and images.config.grid is None and images.config.size is not None
    fixed = None if writes_size and "content" in images.marks else grid_of(dataset, size, decoder.stride)
    document, closing = prompt_document(data.prompts, tokenizer, spec, (), prompt)
    ends = [tokenizer.special_id(name, "template.special_tokens") for name in closing]
    dropped = DocumentBuilder(dataset, tokenizer, spec)
    writer = _Writer(model, spec, tokenizer, images, sampling, ends)
    tokens, parts, left = document.token_ids.tolist(), list[str | Drawing](), max_new_tokens
    while left > 0:
        new = writer.text(tokens, left, images.marks["start"])
        tokens, left = tokens + new, left - len(new)
        begins = bool(new) and new[-1] == images.marks["start"]
        if words := tokenizer.decode(new[:-1] if begins else new).strip():
            parts.append(words)
        number = sum(isinstance(part, Drawing) for part in parts)
        if not begins or number == MOST_IMAGES:
            break
        rows, columns = fixed or writer.size(tokens, decoder.stride)
        tokens += images.opening(rows, columns)[1:]
        grid = ImageGrid(rows, columns, next(iter(images.row_end), None))
        without = dropped.build_drawing_prompt("", rows, columns, drop_text=True).token_ids.tolist()
        batch = writer.batch([tokens] if guidance == 1 else [tokens, without])
        seeded = sampling.for_sequence(number)
        (codes,) = draw(model, batch, [grid], seeded, guidance=guidance)  # type: ignore[arg-type]
        parts.append(Drawing(to_pixels(decoder.decode(codes[None])[0]), codes.cpu().numpy()))
        for row in codes.tolist():
            tokens += [*images.code_ids[row].tolist(), *images.row_end]
        tokens += images.closing
    return parts


@dataclass(frozen=True)
class _Writer:
    """Continues sequences of one answer with text."""

    model: nn.Module
    spec: MediaSpec
    tokenizer: Tokenizer
    images: DrawnImages
    sampling: SamplingConfig
    ends: Sequence[int]

    def batch(self, sequences: Sequence[Sequence[int]]) -> MultimodalBatch:
        """Return one batch with the sequences as documents, and a dummy document at the end."""
        documents = list[Document]()
        for tokens in sequences:
            draft = Draft(self.spec)
            draft.add_tokens(tokens, 0.0)
            documents.append(draft.finish(Provenance("answer", "", "", 0)))
        pack = Pack((*documents, dummy_document(self.spec, self.tokenizer.pad_id)), lane=-1)
        return collate([pack], self.spec).to(next(self.model.parameters()).device)

    def text(self, tokens: Sequence[int], most: int, last: int) -> list[int]:
        """Return new tokens, at most ``most``, up to the end of the answer or to the token ``last``, included."""
        (new,) = generate(
            self.model,  # type: ignore[arg-type]
            self.batch([tokens]),
            most,
            self.tokenizer.eos_id,
            self.sampling.for_sequence(len(tokens)),
            stop_ids=self.ends,
            watch=lambda _, row: row[-1] == last,
        )
        return new

    def size(self, tokens: Sequence[int], stride: int) -> tuple[int, int]:
        """Return the rows and columns that the model writes after the first mark of an image.

        Raises:
            ConfigError: it writes no size, or one out of range.
        """
        new = self.text(tokens, _MOST_SIZE_TOKENS, self.images.marks["content"])
        written = self.tokenizer.decode(new)
        form = re.escape(str(self.images.config.size))
        form = form.replace(r"\{height\}", r"(?P<height>\d{1,5})").replace(r"\{width\}", r"(?P<width>\d{1,5})")
        found, most = re.fullmatch(form, written.strip()), MOST_PIXELS // stride
        grid = (int(found["height"]), int(found["width"])) if found else (0, 0)
        if not all(1 <= side <= most for side in grid):
            raise ConfigError(
                f"the model began an image and wrote {written[:60]!r} as its size, expected codes as "
                f"{self.images.config.size} up to {most}; give --size. Videos cannot be drawn"
            )
        return grid
