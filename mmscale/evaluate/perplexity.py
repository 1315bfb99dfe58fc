"""How well a model predicts held-out documents: the mean loss of what training would learn of them.

    samples --template, without draws--> documents, long ones cut --chunks--> ranks --log-likelihoods--> mean

Chunks and values do not depend on the number of ranks, see ``pairs``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.batch import MultimodalBatch
from data_pipeline.document import IGNORE, Document
from data_pipeline.errors import SampleError
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder, null_document
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.truncation import split
from data_pipeline.sample import Sample
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader
from data_pipeline.text.templates import TextPiece
from mmscale.dist import all_reduce_sum_list
from mmscale.evaluate.config import PerplexitySet
from mmscale.evaluate.heldout import Asked, document_builder, draw, template_of, together
from mmscale.evaluate.likelihood import by_segment, label_likelihoods
from mmscale.evaluate.pairs import dealt, stretches
from mmscale.evaluate.result import PerplexityResult


@dataclass(frozen=True)
class _Part:
    """A document that is scored, or a piece of one.

    Attributes:
        sample: Number of its sample in the manifest.
        piece: Which of the sample's pieces.
        size: Tokens and patches.
        labels: Tokens that are scored.
        weight: Sum of their weights.
    """

    sample: int
    piece: int
    size: int
    labels: int
    weight: float


class _Documents:
    """The documents of a set."""

    def __init__(self, reader: SampleReader, builder: DocumentBuilder, max_tokens: int) -> None:
        self._reader, self._builder, self._max_tokens = reader, builder, max_tokens

    def plan(self, samples: Sequence[int]) -> tuple[list[_Part], int]:
        """What is scored of the samples, and the bytes of its text; nothing is decoded.

        Raises:
            SampleError: a sample lacks what the template needs, or nothing to learn is left of it.
        """
        parts, num_bytes = [], 0
        for number in samples:
            sample = self._reader.read_outline(number)
            num_bytes += self._num_bytes(sample)
            for piece, document in enumerate(self._pieces(self._builder.measure(sample))):
                labels = int((document.labels != IGNORE).sum())
                weight = float(document.loss_weights.sum(dtype=np.float64))
                size = document.num_tokens + document.num_patches
                parts.append(_Part(number, piece, size, labels, weight))
        return parts, num_bytes

    def batch(self, parts: Sequence[_Part]) -> MultimodalBatch:
        """The documents of the parts, and one null document."""
        samples = dict.fromkeys(part.sample for part in parts)
        pieces = {number: self._pieces(self._builder(self._reader.read(number))) for number in samples}
        spec = self._builder.spec
        null = null_document(spec, self._builder.tokenizer.pad_id)
        return collate([Pack((*(pieces[part.sample][part.piece] for part in parts), null), lane=-1)], spec)

    def _pieces(self, document: Document) -> list[Document]:
        if document.num_tokens <= self._max_tokens:
            return [document]
        pieces = [one for one in split(document, self._fits) if one.loss_weights.any()]
        if not pieces:
            origin = document.provenance
            reason = f"{document.num_tokens} tokens, cut at {self._max_tokens}: nothing that is learned is left of it"
            raise SampleError(reason, shard=origin.shard if origin else "?", key=origin.key if origin else "?")
        return pieces

    def _fits(self, document: Document) -> bool:
        return document.num_tokens <= self._max_tokens

    def _num_bytes(self, sample: Sample) -> int:
        pieces = self._builder.dataset.template.pieces(sample, None)
        return sum(len(piece.text.encode()) for piece in pieces if isinstance(piece, TextPiece) and piece.weight)


def score_perplexity(asked: Asked, held: PerplexitySet) -> PerplexityResult:
    """Scores a set. All ranks must call.

    Raises:
        ConfigError: the set is empty.
        DataPipelineError: a sample is damaged or lacks what the template needs; every rank raises.
    """
    builder = document_builder(held, template_of(held), asked.data, asked.tokenizer, asked.spec)
    reader = SampleReader(Manifest.open(held.manifest), held.name)
    try:
        samples = draw(held, reader.manifest.num_samples)
        most = held.max_tokens or asked.data.packing.max_tokens
        documents = _Documents(reader, builder, min(most, asked.spec.max_document_tokens or most))
        parts, num_bytes = together(asked.world, held, lambda: documents.plan(samples))
        weighted, plain = _likelihoods(asked, held, documents, parts)
    finally:
        reader.close()
    return _result(parts, weighted, plain, num_bytes)


def _likelihoods(
    asked: Asked, held: PerplexitySet, documents: _Documents, parts: Sequence[_Part]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Of each part, weighted and plain; the same on every rank."""
    config, world = asked.config, asked.world
    chunks = list(stretches([part.size for part in parts], config.tokens_per_forward))
    most = max(sum(part.labels for part in parts[start:end]) for start, end in chunks)
    head_calls = -(-most // config.rows_per_head)
    values = np.zeros((2, len(parts)))
    for mine, (start, end) in dealt(chunks, world):
        chosen = parts[start:end]
        batch = together(world, held, lambda: documents.batch(chosen))  # noqa: B023  called at once
        weights = batch.loss_weights.double().numpy()
        batch = batch.to(world.device)
        rows, found = label_likelihoods(asked.model, batch, rows_per_head=config.rows_per_head, head_calls=head_calls)
        if mine:
            values[0, start:end] = by_segment(batch, rows, found * weights[rows])[: end - start]
            values[1, start:end] = by_segment(batch, rows, found)[: end - start]
    summed = np.array(all_reduce_sum_list(world, values.ravel().tolist())).reshape(values.shape)
    return summed[0], summed[1]


def _result(
    parts: Sequence[_Part],
    weighted: npt.NDArray[np.float64],
    plain: npt.NDArray[np.float64],
    num_bytes: int,
) -> PerplexityResult:
    losses: dict[int, float] = {}
    weights: dict[int, float] = {}
    for part, value in zip(parts, weighted.tolist(), strict=True):
        losses[part.sample] = losses.get(part.sample, 0.0) - value
        weights[part.sample] = weights.get(part.sample, 0.0) + part.weight
    n, weight = len(losses), sum(weights.values())
    loss = sum(losses.values()) / weight
    spread = sum((losses[sample] - loss * weights[sample]) ** 2 for sample in losses)
    return PerplexityResult(
        loss=loss,
        error=math.sqrt(spread * n / (n - 1)) / weight if n > 1 else 0.0,
        perplexity=math.exp(min(loss, 700.0)),  # The largest that a float holds is exp(709).
        bits_per_byte=-float(plain.sum()) / math.log(2) / num_bytes if num_bytes else None,
        tokens=sum(part.labels for part in parts),
        bytes=num_bytes,
        n=n,
    )
