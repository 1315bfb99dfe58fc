"""Cosine similarity of images and candidate texts for contrastive models, computed in parallel by all ranks.

    images, texts --one of each per document--> vectors of both --(sample, candidate) pairs--> dot products

Each image and each text is encoded once, however many pairs contain it.

Source: CLIP (arXiv 2103.00020), section 3.1.2 (zero-shot classification).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.sample import Sample
from data_pipeline.text.templates import CaptionTemplate
from data_pipeline.text.templates.base import fill
from mmscale.dist import all_reduce_sum_list
from mmscale.evaluate.config import HeldOutSet
from mmscale.evaluate.heldout import EvaluationContext, call_on_all_ranks, document_builder
from mmscale.evaluate.pairs import chunk_ranges, chunks_of_rank
from mmscale.models.contrastive import ContrastiveModel

PAIR_TEMPLATE = CaptionTemplate(prompts=("{prompt}",), answers=("{answer}",))
"""Template for texts that are already formatted. Prompt and answer are separate: training tokenises them separately."""
Vectors = npt.NDArray[np.float64]


def similarities(
    context: EvaluationContext, held: HeldOutSet, samples: Sequence[Sample], requests: Sequence[tuple[int, str]]
) -> Vectors:
    """Return the cosine of image and text of each request, the same on every rank. All ranks must call.

    Args:
        context: Model, settings and ranks.
        held: Gives the prompt and the format of a candidate.
        samples: Samples that ``requests`` indexes; each has one image.
        requests: (index of the sample, candidate).

    Raises:
        DataPipelineError: a sample is damaged or does not have exactly one image. Every rank raises.
    """
    prompts = [fill(held.prompt, sample.fields) for sample in samples]
    texts = [(prompts[sample], held.template.format(value=candidate)) for sample, candidate in requests]
    number_of = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    fields = [{"prompt": prompt, "answer": answer} for prompt, answer in number_of]
    # A document needs an image and a text: repeat the last item of the shorter list and ignore its vectors.
    documents = [
        replace(samples[min(number, len(samples) - 1)], fields=fields[min(number, len(fields) - 1)])
        for number in range(max(len(samples), len(fields)))
    ]
    image_vectors, text_vectors = pair_vectors(context, held, documents)
    return np.array(
        [
            image_vectors[sample] @ text_vectors[number_of[text]]
            for (sample, _), text in zip(requests, texts, strict=True)
        ]
    )


def pair_vectors(context: EvaluationContext, held: HeldOutSet, samples: Sequence[Sample]) -> tuple[Vectors, Vectors]:
    """Return the vectors of the image and of the text of each sample, both ``(samples, dim)``. All ranks must call.

    The samples have the fields ``prompt`` and ``answer``.

    Raises:
        DataPipelineError: a sample is damaged or does not have exactly one image. Every rank raises.
    """
    model, world = cast(ContrastiveModel, context.model), context.world
    builder = document_builder(held, PAIR_TEMPLATE, context.data, context.tokenizer, context.spec)
    sizes = call_on_all_ranks(world, held, lambda: [_size(builder, sample) for sample in samples])
    chunks = list(chunk_ranges(sizes, context.config.tokens_per_forward))
    width = model.connector.dim
    values = np.zeros((2, len(samples), width))
    for is_own, (start, end) in chunks_of_rank(chunks, world):
        chosen = samples[start:end]
        documents = call_on_all_ranks(world, held, lambda: [builder(sample) for sample in chosen])  # noqa: B023  called at once
        dummy = dummy_document(context.spec, context.tokenizer.pad_id)
        batch = collate([Pack((*documents, dummy), lane=-1)], context.spec).to(world.device)
        with torch.no_grad():
            vectors = model(batch)
        if is_own:
            values[0, start:end] = vectors.images.double().cpu().numpy()
            values[1, start:end] = vectors.texts.double().cpu().numpy()
    images, texts = np.array(all_reduce_sum_list(world, values.ravel().tolist())).reshape(values.shape)
    return images, texts


def _size(builder: DocumentBuilder, sample: Sample) -> int:
    document = builder.dry_run(sample)
    return document.num_tokens + document.num_patches
