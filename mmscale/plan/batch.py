"""The largest microbatch that a stage is likely to meet, as shapes.

    the data exist here    the packs of ``load.replay_packs``
    they do not            one pack of equal documents: those of ``load.example_documents`` with the highest cost

The pack with the highest cost, ``micro_lanes`` times, is the microbatch. Text fills the room that it leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from data_pipeline.batch import MultimodalBatch, map_batch
from data_pipeline.config import DataConfig
from data_pipeline.document import Document
from data_pipeline.errors import DataPipelineError
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.collate import collate
from data_pipeline.packing.packer import Budget, Pack, PackUsage
from data_pipeline.packing.synthetic_documents import dummy_document, example_document
from mmscale.plan.load import ExampleDocument, example_documents, replay_packs


def largest_batch(
    data: DataConfig, spec: MediaSpec, micro_lanes: int, seed: int, example: ExampleDocument | None = None
) -> MultimodalBatch:
    """Return the largest microbatch on the meta device.

    Args:
        data: The data block of the stage.
        spec: The inputs of the stage's model.
        micro_lanes: Packs of a microbatch.
        seed: Seed of the run.
        example: Assume documents of this size, even if the data exist here. None: only if they do not.

    Raises:
        ConfigError: see ``example_documents``.
    """
    try:
        packs = replay_packs(data, spec, seed) if example is None else []
    except (DataPipelineError, OSError):  # The memory does not depend on them; ``stage_load`` reports the error.
        packs = []
    budget = Budget(data.packing, spec, dummy_document(spec, 0))
    if packs:
        chosen = list(max(packs, key=lambda pack: sum(each.cost(spec) for each in pack.documents)).documents)
    else:
        assumed = example_documents(data, spec, example or ExampleDocument())
        chosen = _full(budget, spec, max(assumed, key=lambda each: each.cost(spec) / each.num_tokens))
    documents = (*chosen, *_text(budget, data, spec, [each for each in chosen if not each.is_dummy]))

    def join(arrays: Sequence[npt.NDArray[Any]]) -> torch.Tensor:
        dtype = torch.from_numpy(np.empty(0, arrays[0].dtype)).dtype
        return torch.empty(sum(map(len, arrays)), arrays[0].shape[1], dtype=dtype, device="meta")

    batch = collate([Pack(documents, lane) for lane in range(micro_lanes)], spec, join)
    # The pack with the highest cost need not have the most tokens with loss: assume that all have.
    return replace(batch.to("meta"), dropout_key=(0, 0), learned=None)


def tensor_bytes(batch: MultimodalBatch) -> int:
    """Return the bytes of the tensors of a batch."""
    sizes: list[int] = []
    map_batch(batch, torch.Tensor, lambda tensor: sizes.append(tensor.nbytes))
    return sum(sizes)


def _full(budget: Budget, spec: MediaSpec, document: Document) -> list[Document]:
    """Return as many copies of ``document`` as fit into a pack, at least one, and the dummy document if needed."""
    one = PackUsage.of_document(document, spec)
    used, documents = one, [document]
    while (more := budget.join(used, one)) is not None:
        used = more
        documents.append(document)
    return [*documents, budget.dummy] if budget.needs_dummy(used) else documents


def _text(budget: Budget, data: DataConfig, spec: MediaSpec, documents: list[Document]) -> Iterator[Document]:
    """Yield documents of text that fill a pack of ``documents``."""
    used = PackUsage()
    for document in documents:
        used = budget.join(used, PackUsage.of_document(document, spec)) or used
    room = 0 if spec.placement is Placement.PAIR else budget.config.max_tokens - used.tokens
    while room > 0:
        text = example_document(data.prompts.transforms, spec, [], min(room, spec.max_document_tokens or room))
        more = budget.join(used, PackUsage.of_document(text, spec))
        if more is None:
            room -= max(1, room // 64)  # The dummy document and the largest cost leave less room.
            continue
        used = more
        room = budget.config.max_tokens - used.tokens
        yield text
