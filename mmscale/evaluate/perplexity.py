"""Perplexity: a model's mean loss on the tokens of held-out documents that training would learn.

    samples --template, without randomness--> documents, long ones cut --chunks--> ranks --log-likelihoods--> mean

Chunks and values do not depend on the number of ranks; see ``pairs``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.batch import MultimodalBatch
from data_pipeline.config import DataConfig
from data_pipeline.document import IGNORE, Document
from data_pipeline.errors import SampleError
from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.packing.truncation import split
from data_pipeline.sample import Sample
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader
from data_pipeline.text.templates import TextPiece
from data_pipeline.text.tokenizer import Tokenizer
from mmscale.dist import all_reduce_sum_list
from mmscale.evaluate.config import PerplexitySet
from mmscale.evaluate.heldout import EvaluationContext, call_on_all_ranks, document_builder, draw_samples, template_of
from mmscale.evaluate.likelihood import by_segment, label_likelihoods
from mmscale.evaluate.pairs import chunk_ranges, chunks_of_rank
from mmscale.evaluate.result import PerplexityResult


@dataclass(frozen=True)
class _Part:
    """A document to score, or one piece of a document that was cut.

    Attributes:
        sample: Number of its sample in the manifest.
        piece: Index among the pieces of the sample.
        size: Number of tokens and patches.
        labels: Number of tokens with a label.
        weight: Sum of their loss weights.
    """

    sample: int
    piece: int
    size: int
    labels: int
    weight: float


class Documents:
    """The documents of a set."""

    def __init__(self, reader: SampleReader, builder: DocumentBuilder, max_tokens: int) -> None:
        self._reader, self._builder, self._max_tokens = reader, builder, max_tokens

    @classmethod
    def of(
        cls, held: PerplexitySet, data: DataConfig, tokenizer: Tokenizer, spec: MediaSpec, reader: SampleReader
    ) -> Documents:
        """Return the documents of a set whose samples ``reader`` reads.

        Raises:
            DataConfigError: as ``document_builder``.
        """
        builder = document_builder(held, template_of(held), data, tokenizer, spec)
        most = held.max_tokens or data.packing.max_tokens
        return cls(reader, builder, min(most, spec.max_document_tokens or most))

    def plan(self, samples: Sequence[int]) -> tuple[list[_Part], int]:
        """Return the parts to score and the number of bytes of learned text. No image is decoded.

        Raises:
            SampleError: a sample lacks a field of the template, or no learned token is left after cutting.
        """
        parts, num_bytes = [], 0
        for number in samples:
            sample = self._reader.read_without_images(number)
            whole = self._builder.dry_run(sample)  # Before the bytes are counted: its errors name the sample.
            num_bytes += self._num_bytes(sample)
            for piece, document in enumerate(self._pieces(whole)):
                labels = int((document.labels != IGNORE).sum())
                weight = float(document.loss_weights.sum(dtype=np.float64))
                size = document.num_tokens + document.num_patches
                parts.append(_Part(number, piece, size, labels, weight))
        return parts, num_bytes

    def batch(self, parts: Sequence[_Part]) -> MultimodalBatch:
        """Return one batch with the documents of the parts, in order, and a dummy document at the end."""
        samples = dict.fromkeys(part.sample for part in parts)
        pieces = {number: self._pieces(self._builder(self._reader.read(number))) for number in samples}
        spec = self._builder.spec
        dummy = dummy_document(spec, self._builder.tokenizer.pad_id)
        return collate([Pack((*(pieces[part.sample][part.piece] for part in parts), dummy), lane=-1)], spec)

    def _pieces(self, document: Document) -> list[Document]:
        if document.num_tokens <= self._max_tokens:
            return [document]
        pieces = [one for one in split(document, self._fits) if one.loss_weights.any()]
        if not pieces:
            origin = document.provenance
            reason = f"{document.num_tokens} tokens, cut at {self._max_tokens}: no learned token is left"
            raise SampleError(reason, shard=origin.shard if origin else "?", key=origin.key if origin else "?")
        return pieces

    def _fits(self, document: Document) -> bool:
        return document.num_tokens <= self._max_tokens

    def _num_bytes(self, sample: Sample) -> int:
        pieces = self._builder.dataset.template.pieces(sample, None)
        return sum(len(piece.text.encode()) for piece in pieces if isinstance(piece, TextPiece) and piece.weight)


def score_perplexity(context: EvaluationContext, held: PerplexitySet) -> PerplexityResult:
    """Score one set. All ranks must call.

    Raises:
        ConfigError: the set is empty.
        DataPipelineError: a sample is damaged or lacks a field of the template. Every rank raises.
    """
    reader = SampleReader(Manifest.open(held.manifest), held.name)
    try:
        samples = draw_samples(held, reader.manifest.num_samples)
        documents = Documents.of(held, context.data, context.tokenizer, context.spec, reader)
        parts, num_bytes = call_on_all_ranks(context.world, held, lambda: documents.plan(samples))
        weighted, plain = _likelihoods(context, held, documents, parts)
    finally:
        reader.close()
    return _result(parts, weighted, plain, num_bytes)


def _likelihoods(
    context: EvaluationContext, held: PerplexitySet, documents: Documents, parts: Sequence[_Part]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the weighted and the unweighted log-likelihood of each part, the same on every rank."""
    config, world = context.config, context.world
    chunks = list(chunk_ranges([part.size for part in parts], config.tokens_per_forward))
    most = max(sum(part.labels for part in parts[start:end]) for start, end in chunks)
    head_calls = -(-most // config.rows_per_head)
    values = np.zeros((2, len(parts)))
    for is_own, (start, end) in chunks_of_rank(chunks, world):
        chosen = parts[start:end]
        batch = call_on_all_ranks(world, held, lambda: documents.batch(chosen))  # noqa: B023  called at once
        weights = batch.loss_weights.double().numpy()
        batch = batch.to(world.device)
        rows, found, _ = label_likelihoods(
            context.model, batch, rows_per_head=config.rows_per_head, head_calls=head_calls
        )
        if is_own:
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
        perplexity=math.exp(min(loss, 700.0)),  # exp overflows above 709.
        bits_per_byte=-float(plain.sum()) / math.log(2) / num_bytes if num_bytes else None,
        tokens=sum(part.labels for part in parts),
        bytes=num_bytes,
        n=n,
    )
