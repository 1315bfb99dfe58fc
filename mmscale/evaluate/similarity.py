"""How near images and candidate texts are, of a model that compares them; the work dealt over the ranks.

    images, texts --side by side, one of each a document--> vectors of both --(sample, candidate) pairs--> dot products

Each image and each text is computed once, whatever the number of questions about it.

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
from data_pipeline.packing.document_builder import DocumentBuilder, null_document
from data_pipeline.packing.packer import Pack
from data_pipeline.sample import Sample
from data_pipeline.text.templates import CaptionTemplate
from data_pipeline.text.templates.base import fill
from mmscale.dist import all_reduce_sum_list
from mmscale.evaluate.config import HeldOutSet
from mmscale.evaluate.heldout import Asked, document_builder, together
from mmscale.evaluate.pairs import dealt, stretches
from mmscale.models.contrastive import ContrastiveModel

_TEMPLATE = CaptionTemplate(prompts=("{prompt}",), answers=("{answer}",))
"""Of texts that are filled in already: in training prompt and answer are tokenised apart."""
Rows = npt.NDArray[np.float64]


def similarities(asked: Asked, held: HeldOutSet, samples: Sequence[Sample], asks: Sequence[tuple[int, str]]) -> Rows:
    """Cosine of image and text of each ask, the same on every rank. All ranks must call.

    Args:
        asked: The model and the ranks.
        held: How a candidate is worded.
        samples: What ``asks`` numbers; each has one image.
        asks: Sample and candidate.

    Raises:
        DataPipelineError: a sample is damaged or has not exactly one image; every rank raises.
    """
    prompts = [fill(held.prompt, sample.fields) for sample in samples]
    worded = [(prompts[sample], held.template.format(value=candidate)) for sample, candidate in asks]
    places = {text: number for number, text in enumerate(dict.fromkeys(worded))}
    fields = [{"prompt": prompt, "answer": answer} for prompt, answer in places]
    # The shorter of both lists is filled up; what fills it up is not looked at.
    documents = [
        replace(samples[min(number, len(samples) - 1)], fields=fields[min(number, len(fields) - 1)])
        for number in range(max(len(samples), len(fields)))
    ]
    images, texts = _vectors(asked, held, documents)
    return np.array([images[sample] @ texts[places[text]] for (sample, _), text in zip(asks, worded, strict=True)])


def _vectors(asked: Asked, held: HeldOutSet, samples: Sequence[Sample]) -> tuple[Rows, Rows]:
    """Of the image and of the text of each sample."""
    model, world = cast(ContrastiveModel, asked.model), asked.world
    builder = document_builder(held, _TEMPLATE, asked.data, asked.tokenizer, asked.spec)
    sizes = together(world, held, lambda: [_size(builder, sample) for sample in samples])
    chunks = list(stretches(sizes, asked.config.tokens_per_forward))
    width = model.connector.dim
    values = np.zeros((2, len(samples), width))
    for mine, (start, end) in dealt(chunks, world):
        chosen = samples[start:end]
        documents = together(world, held, lambda: [builder(sample) for sample in chosen])  # noqa: B023  called at once
        null = null_document(asked.spec, asked.tokenizer.pad_id)
        batch = collate([Pack((*documents, null), lane=-1)], asked.spec).to(world.device)
        with torch.no_grad():
            vectors = model(batch)
        if mine:
            values[0, start:end] = vectors.images.double().cpu().numpy()
            values[1, start:end] = vectors.texts.double().cpu().numpy()
    images, texts = np.array(all_reduce_sum_list(world, values.ravel().tolist())).reshape(values.shape)
    return images, texts


def _size(builder: DocumentBuilder, sample: Sample) -> int:
    document = builder.measure(sample)
    return document.num_tokens + document.num_patches
