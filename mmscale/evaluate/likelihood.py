"""Log-likelihood of a batch's learned tokens, without logits of the whole batch."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipeline.batch import MultimodalBatch
from data_pipeline.document import IGNORE

Rows = npt.NDArray[np.int64]


class HasHidden(Protocol):
    """What the model returns."""

    @property
    def hidden(self) -> Tensor: ...


class ScoredModel(Protocol):
    """What scoring needs of a model; ``MultimodalModel`` has it, sharded or not."""

    def __call__(self, batch: MultimodalBatch) -> HasHidden: ...
    @property
    def head(self) -> torch.nn.Module: ...


def log_likelihoods(
    model: ScoredModel, batch: MultimodalBatch, *, rows_per_head: int, head_calls: int
) -> npt.NDArray[np.float64]:
    """Sum of log P(label) over the labels of each segment, natural logarithm; arguments as ``label_likelihoods``.

    Returns:
        float64 ``(S,)``; 0 for a segment without labels.
    """
    rows, found = label_likelihoods(model, batch, rows_per_head=rows_per_head, head_calls=head_calls)
    return by_segment(batch, rows, found)


def by_segment(batch: MultimodalBatch, rows: Rows, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sums of values, one for each of these rows of a batch, over the rows of each segment; float64 ``(S,)``."""
    owner = np.searchsorted(np.array(batch.segments.bounds), rows, side="right") - 1
    sums = np.zeros(batch.segments.num)
    np.add.at(sums, owner, values)
    return sums


@torch.no_grad()
def label_likelihoods(
    model: ScoredModel, batch: MultimodalBatch, *, rows_per_head: int, head_calls: int
) -> tuple[Rows, npt.NDArray[np.float64]]:
    """The rows that have a label, and log P(label) of each, natural logarithm.

    Args:
        model: Called once; its head is called exactly ``head_calls`` times. Under ZeRO-3 all ranks must call together.
        batch: On the model's device.
        rows_per_head: Rows that are multiplied with the vocabulary at a time.
        head_calls: At least labels / ``rows_per_head``; the same on all ranks, whatever their batches hold.
    """
    hidden = model(batch).hidden
    rows = torch.nonzero(batch.labels != IGNORE).squeeze(1)
    assert len(rows) <= rows_per_head * head_calls
    found = []
    for call in range(head_calls):
        part = rows[call * rows_per_head : (call + 1) * rows_per_head]
        logits = model.head(hidden[part if len(part) else slice(0, 1)]).float()
        if len(part):
            chosen = logits.gather(1, batch.labels[part, None]).squeeze(1)
            peak = logits.amax(1, keepdim=True)  # First: near a loss of zero it equals the chosen logit.
            found.append(((chosen - peak.squeeze(1)) - (logits - peak).logsumexp(1)).double())
    return rows.cpu().numpy(), torch.cat(found).cpu().numpy() if found else np.empty(0)
