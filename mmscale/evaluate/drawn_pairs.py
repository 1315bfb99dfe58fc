"""Make preference pairs of a model's own drawings: several drawings of each text, ranked by a classifier.

    fields of a stored sample --model, N drawings--> codes and pixels --classifier, name of the sample-->
        best and worst drawing --> ``0.png``, ``1.png`` with their token grids, and the fields ``chosen``, ``rejected``

Source: Emu3 (arXiv 2409.18869), section 2.4.2: several drawings of each prompt, the best and the worst of which form a
pair; people rank them there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.config import DataConfig
from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.media_spec import MediaSpec
from data_pipeline.prepare.choices import OnError
from data_pipeline.prepare.rows import Members
from data_pipeline.sample import Provenance
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader, assemble
from data_pipeline.shards.token_grid import encode_grid, grid_extension
from data_pipeline.text.templates.base import look_up
from mmscale.errors import ConfigError
from mmscale.evaluate.classifier import Classifier
from mmscale.evaluate.drawings import FREE, Drawing, Size, draw_images, drawing_dataset
from mmscale.evaluate.similarity import Vectors
from mmscale.metrics.sample_images import encode_png
from mmscale.models.image_tokenizer import ImageTokenizer, image_tokenizer_digest
from mmscale.models.multimodal import MultimodalModel
from mmscale.models.sampling import SamplingConfig

_CHOSEN, _REJECTED = "0.png", "1.png"
_BATCH_IMAGES = 64
_MOST_NAMES = 10_000
"""Largest number of names that the classifier chooses among."""


def names_of(manifests: Sequence[Path], field: str, on_error: OnError) -> tuple[str, ...]:
    """Return the different values of a field in all samples of data sets, in order of their first occurrence.

    Args:
        manifests: The data sets.
        field: The field, or a path to it.
        on_error: ``skip`` passes over a sample without such a text, which ``DrawnPairs`` finds unusable too.

    Raises:
        ConfigError: there are fewer than two, or too many to choose among.
        SampleError: a sample has no such text, and ``on_error`` is ``fail``.
    """
    found, skipped = dict[str, None](), 0
    for manifest in manifests:
        with closing(SampleReader(Manifest.open(manifest), manifest.stem)) as reader:
            for number in range(reader.manifest.num_samples):
                try:
                    name = _name_of(reader.read_without_images(number).fields, field)
                except SampleError:
                    if on_error is OnError.FAIL:
                        raise
                    skipped += 1
                    continue
                found[name] = None
                if len(found) > _MOST_NAMES:
                    raise ConfigError(f"{manifest}: more than {_MOST_NAMES:,} values of the field {field!r}; use fewer")
    if len(found) < 2:
        without = f", and {skipped} samples have none" if skipped else ""
        raise ConfigError(
            f"the only {field} of a sample is {', '.join(found) or 'missing'}{without}; a classifier needs at least two"
        )
    return tuple(found)


def _name_of(fields: dict[str, Any], field: str) -> str:
    name = look_up(field, fields)
    if not isinstance(name, str) or not name.strip():
        raise SampleError(f"field {field!r} is {name!r:.80}, expected a text", kind=FaultKind.TEXT)
    return name


@dataclass
class DrawnPairs:
    """Replaces the images of stored samples by the best and the worst of several drawings: a ``ChunkProgram``.

    The seeds of a chunk begin at ``sampling.seed + (first - 1) * num``, with ``first`` the number of its first row.

    Attributes:
        model: Draws; in evaluation mode.
        tokenizer: Image tokenizer of the model's codes.
        data: Data block of its run, with the template of its drawings.
        spec: Media that the model accepts.
        classifier: Ranks the drawings.
        names: The names among which it finds that of a sample.
        field: Field with the name of a sample.
        num: Drawings of each text, at least 2.
        size: As for ``draw_images``.
        guidance: As for ``draw_images``.
        sampling: As for ``draw_images``.
    """

    model: MultimodalModel
    tokenizer: ImageTokenizer
    data: DataConfig
    spec: MediaSpec
    classifier: Classifier
    names: tuple[str, ...]
    field: str
    num: int
    size: Size | None = None
    guidance: float = 1.0
    sampling: SamplingConfig = FREE

    @property
    def settings(self) -> str:
        """Everything besides the samples and the model's weights that determines the pairs."""
        dataset, template = drawing_dataset(self.data)
        prompts = f"{self.data.tokenizer} {template} {dataset.image_tokens}"
        parts = (self.image_tokenizer, self.classifier.digest, self.classifier.held.template, self.names, self.field)
        return f"{prompts} {parts} {self.num} {self.size} {self.guidance} {self.sampling}"

    @cached_property
    def vectors_of_names(self) -> Vectors:
        """Vectors of ``names``. Cached, because all chunks compare with the same names."""
        return self.classifier.name_vectors(self.names)

    @cached_property
    def image_tokenizer(self) -> str:
        """SHA-256 of the image tokenizer. Cached, because it reads all weights."""
        return image_tokenizer_digest(self.tokenizer)

    def __call__(self, samples: Sequence[Members | SampleError], first: int) -> list[Members | SampleError]:
        read = [self._fields(each) for each in samples]
        texts = [fields for fields in read if isinstance(fields, dict) for _ in range(self.num)]
        drawings = draw_images(
            self.model,
            self.data,
            self.spec,
            texts,
            size=self.size,
            sampling=self.sampling.for_sequence((first - 1) * self.num),
            guidance=self.guidance,
            batch_size=_BATCH_IMAGES,
            image_tokenizer=self.tokenizer,
        )
        scores = self.classifier.name_log_probabilities(
            [drawing.pixels for drawing in drawings],
            [_name_of(fields, self.field) for fields in texts],
            self.names,
            self.vectors_of_names if texts else None,
        )
        groups = iter(range(0, len(texts), self.num))
        return [
            each if isinstance(each, SampleError) else self._pair(each, drawings, scores, next(groups)) for each in read
        ]

    def _fields(self, members: Members | SampleError) -> dict[str, Any] | SampleError:
        """Return the fields of a sample that has a name and a text to draw, or why it is unusable."""
        if isinstance(members, SampleError):
            return members
        _, template = drawing_dataset(self.data)
        try:
            texts = {ext: content for ext, content in members.items() if ext in ("json", "txt")}
            fields = assemble(texts, Provenance("pairs", "", "", 0)).fields
            _name_of(fields, self.field)
            template.text_to_draw(fields)
        except SampleError as error:
            return error
        return fields

    def _pair(
        self, fields: dict[str, Any], drawings: Sequence[Drawing], scores: npt.NDArray[np.float64], start: int
    ) -> Members | SampleError:
        """Return the pair of a sample, whose drawings begin at ``start``."""
        own = scores[start : start + self.num]
        best, worst = start + int(own.argmax()), start + int(own.argmin())
        chosen, rejected = drawings[best], drawings[worst]
        if np.array_equal(chosen.codes, rejected.codes):
            return SampleError(f"its {self.num} drawings are equal, so no pair can be made of them")
        pair = {
            "chosen": _CHOSEN,
            "rejected": _REJECTED,
            "chosen_score": float(scores[best]),
            "rejected_score": float(scores[worst]),
        }
        members = {"json": json.dumps(fields | pair, ensure_ascii=False).encode()}
        for name, drawing in ((_CHOSEN, chosen), (_REJECTED, rejected)):
            members[name] = encode_png(drawing.pixels)
            members[grid_extension(name)] = encode_grid(
                drawing.codes, self.tokenizer.codebook_size, self.image_tokenizer
            )
        return members
