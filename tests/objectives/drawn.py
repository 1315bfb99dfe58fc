"""Batches of documents with images as tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from data_pipeline.batch import MultimodalBatch
from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing.collate import collate
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import dummy_document, plain_document
from data_pipeline.sample import Provenance


def drawn_batch(decoder: Any, spec: MediaSpec) -> MultimodalBatch:
    """Return a batch in which half of the tokens are codes of images, with the dummy document.

    Args:
        decoder: Its configuration.
        spec: The inputs of its model.
    """
    rng, documents = np.random.default_rng(0), []
    for number in range(3):
        drawn = np.arange(12 + 5 * number) % 4 > 1
        codes = rng.integers(decoder.image_ids.start, decoder.image_ids.stop, len(drawn))
        ids = np.where(drawn, codes, rng.integers(4, decoder.image_ids.start, len(drawn)))
        document = plain_document(spec, ids.tolist(), 3, (), Provenance("d", "s", "k", number))
        documents.append(replace(document, drawn=drawn))
    return replace(collate([Pack((*documents, dummy_document(spec, 0)), 0)], spec), dropout_key=(0, 0))
