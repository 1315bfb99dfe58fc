"""The log-probabilities of a preference pair under its frozen reference model, as a field of the sample's JSON.

    {"reference_log_probs": {"model": "1a2b3c4d", "document": "89abcdef", "chosen": -12.5, "rejected": -14.0}}

``mmscale data reference`` writes it. It names the model and the document, because the values belong to both: a changed
template or tokenizer makes other documents, and joining data sets moves samples between manifests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from zlib_ng.zlib_ng import crc32

from data_pipeline.document import Document
from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.images.transforms import TransformConfig
from data_pipeline.io.strict import StrictConfig

FIELD = "reference_log_probs"
_ANSWERS = ("chosen", "rejected")
Further = Sequence[StrictConfig | None]


def reference_record(
    document: Document,
    transforms: TransformConfig,
    further: Further,
    log_probs: tuple[float, float],
    model: str,
) -> dict[str, Any]:
    """Return the value of the field.

    Args:
        document: The document of the pair.
        transforms: How its images become crops.
        further: How its videos and other media become values; None for those that it has no block for.
        log_probs: Log-probability of the chosen and of the rejected answer.
        model: Checksum of the reference model.
    """
    values = {name: float(np.float32(each)) for name, each in zip(_ANSWERS, log_probs, strict=True)}
    return {"model": model, "document": _checksum(document, transforms, further), **values}


def reference_log_probs(
    fields: Mapping[str, Any], document: Document, transforms: TransformConfig, further: Further, model: str
) -> tuple[float, float]:
    """Return the stored log-probabilities of the chosen and of the rejected answer.

    Args:
        fields: Fields of the sample, which may come from an untrusted source.
        document: The document of the pair.
        transforms: How its images become crops.
        further: How its videos and other media become values; None for those that it has no block for.
        model: Checksum of the reference model that they must come from.

    Raises:
        SampleError: they are missing or malformed, or belong to another model or another document.
    """
    record = fields.get(FIELD)
    again = "compute them with: mmscale data reference"
    if not isinstance(record, dict):
        raise SampleError(f"no log-probabilities of a reference model ({FIELD}); {again}", kind=FaultKind.TEXT)
    if record.get("model") != model:
        raise SampleError(
            f"its log-probabilities are of the reference model {record.get('model')!r:.20}, but "
            f"template.stored_reference names {model!r}; {again}",
            kind=FaultKind.TEXT,
        )
    if record.get("document") != _checksum(document, transforms, further):
        raise SampleError(
            "its stored log-probabilities are of another document: tokenizer, template, transforms or video have "
            f"changed, or the template draws a text at random; {again}",
            kind=FaultKind.TEXT,
        )
    chosen, rejected = (record.get(name) for name in _ANSWERS)
    if not isinstance(chosen, float) or not isinstance(rejected, float) or not np.isfinite([chosen, rejected]).all():
        raise SampleError(f"{FIELD} holds {chosen!r:.20} and {rejected!r:.20}, no two numbers", kind=FaultKind.TEXT)
    return chosen, rejected


def _checksum(document: Document, transforms: TransformConfig, further: Further) -> str:
    """Return the crc32 of everything that a document without augmentation is computed from, except its pixels."""
    columns = (document.token_ids, document.labels, document.loss_weights, document.position_ids)
    settings = [each.model_dump_json().encode() for each in further if each is not None]
    settings = [transforms.model_dump_json().encode(), *settings] if document.items or document.uncoded else []
    found = 0
    for part in (*(column.tobytes() for column in columns), *settings):
        found = crc32(part, found)
    return f"{found:08x}"
