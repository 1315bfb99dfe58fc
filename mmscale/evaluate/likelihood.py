"""Log-likelihood of a batch's labels, without computing logits for the whole batch at once."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipeline.batch import MultimodalBatch
from data_pipeline.document import IGNORE

RowIndices = npt.NDArray[np.int64]


class HasHidden(Protocol):
    """Output of a ``ScoredModel``."""

    @property
    def hidden(self) -> Tensor: ...


class ScoredModel(Protocol):
    """Interface of a model that can be scored; ``MultimodalModel`` has it, sharded or not."""

    def __call__(self, batch: MultimodalBatch) -> HasHidden: ...
    def with_codes(self, batch: MultimodalBatch) -> MultimodalBatch: ...
    @property
    def head(self) -> torch.nn.Module: ...


def by_segment(batch: MultimodalBatch, rows: RowIndices, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the sum of ``values`` over the rows of each segment, float64 ``(S,)``.

    Args:
        batch: The batch.
        rows: Row of each value.
        values: One value per row in ``rows``.
    """
    owner = np.searchsorted(np.array(batch.segments.bounds), rows, side="right") - 1
    sums = np.zeros(batch.segments.num)
    np.add.at(sums, owner, values)
    return sums


class LabelLikelihoods(NamedTuple):
    """Rows that have a label, log P(label) of each in nats, and whether no other token is likelier than the label."""

    rows: RowIndices
    values: npt.NDArray[np.float64]
    is_best: npt.NDArray[np.bool_]


@torch.no_grad()
def label_likelihoods(
    model: ScoredModel, batch: MultimodalBatch, *, rows_per_head: int, head_calls: int
) -> LabelLikelihoods:
    """Return the log-likelihood of each label of a batch.

    Args:
        model: Called once; its head is called exactly ``head_calls`` times. Under ZeRO-3 all ranks must call together.
        batch: Batch on the model's device. Images without codes are encoded first.
        rows_per_head: Rows per call of the head; bounds the memory of the logits.
        head_calls: At least labels / ``rows_per_head``. Must be the same on all ranks.
    """
    batch = batch if batch.uncoded is None else model.with_codes(batch)
    hidden = model(batch).hidden
    rows = torch.nonzero(batch.labels != IGNORE).squeeze(1)
    assert len(rows) <= rows_per_head * head_calls
    found, best = [], []
    for call in range(head_calls):
        part = rows[call * rows_per_head : (call + 1) * rows_per_head]
        values, is_best = _scores(model.head, hidden[part if len(part) else slice(0, 1)], batch.labels[part])
        if len(part):
            found.append(values.double())
            best.append(is_best)
    if not found:
        return LabelLikelihoods(rows.cpu().numpy(), np.empty(0), np.empty(0, dtype=np.bool_))
    return LabelLikelihoods(rows.cpu().numpy(), torch.cat(found).cpu().numpy(), torch.cat(best).cpu().numpy())


def _scores(head: torch.nn.Module, rows: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log P(label) of each row and whether no other token is likelier. Without labels, only call the head.

    A separate head of image tokens gives the scores of its own labels. It runs for every batch, as the other head does.
    """
    logits = head(rows).float()
    image: torch.nn.Module | None = getattr(head, "image", None)
    if image is None:
        return _label_scores(logits, labels)
    drawn = labels >= head.first_image_id  # type: ignore[operator]
    codes = (labels - head.first_image_id).masked_fill(~drawn, 0)  # type: ignore[operator]
    of_codes = _label_scores(image(rows).float(), codes)
    of_text = _label_scores(logits, labels.masked_fill(drawn, 0))
    return torch.where(drawn, of_codes[0], of_text[0]), torch.where(drawn, of_codes[1], of_text[1])


def _label_scores(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits[: len(labels)]
    chosen = logits.gather(1, labels[:, None]).squeeze(1)
    # Subtract the maximum before logsumexp: near a loss of zero the difference would otherwise lose precision.
    peak = logits.amax(1, keepdim=True)
    return (chosen - peak.squeeze(1)) - (logits - peak).logsumexp(1), chosen == peak.squeeze(1)
