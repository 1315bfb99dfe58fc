"""The largest microbatch that a stage is likely to meet, as shapes.

    the data exist here    the packs of the first steps of a few lanes, as the loader makes them, without decoding
    they do not            one pack of equal documents: one crop and 64 tokens of text, or text alone

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
from data_pipeline.document import Document, Span
from data_pipeline.errors import DataPipelineError
from data_pipeline.history.replay import Replay
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import dummy_document
from data_pipeline.packing.packer import Budget, Pack, PackUsage
from data_pipeline.sample import Provenance

_LANES, _STEPS = 4, 4
_TEXT_TOKENS = 64


def largest_batch(data: DataConfig, spec: MediaSpec, micro_lanes: int, seed: int) -> MultimodalBatch:
    """Return the largest microbatch on the meta device.

    Args:
        data: The data block of the stage.
        spec: The inputs of the stage's model.
        micro_lanes: Packs of a microbatch.
        seed: Seed of the run.
    """
    try:
        replay = Replay(data, spec, seed, lanes=range(min(_LANES, data.lanes)), give_up=True)
        packs = [list(pack.documents) for _ in range(_STEPS) for pack in replay.next_packs().values()]
    except (DataPipelineError, OSError):
        packs = [[]]
    budget = Budget(data.packing, spec, dummy_document(spec, 0))
    pack = max(packs, key=lambda documents: sum(document.cost(spec) for document in documents))
    documents = (*pack, *_filling(budget, spec, [document for document in pack if not document.is_dummy]))

    def join(arrays: Sequence[npt.NDArray[np.uint8]]) -> torch.Tensor:
        return torch.empty(sum(map(len, arrays)), spec.patch_dim, dtype=torch.uint8, device="meta")

    batch = collate([Pack(documents, lane) for lane in range(micro_lanes)], spec, join)
    return replace(batch.to("meta"), dropout_key=(0, 0))


def tensor_bytes(batch: MultimodalBatch) -> int:
    """Return the bytes of the tensors of a batch."""
    sizes: list[int] = []
    map_batch(batch, torch.Tensor, lambda tensor: sizes.append(tensor.nbytes))
    return sum(sizes)


def _filling(budget: Budget, spec: MediaSpec, documents: list[Document]) -> Iterator[Document]:
    """Yield documents that fill a pack of ``documents``: with images if it is empty, then text."""
    usage: PackUsage | None = PackUsage()
    for document in documents:
        usage = budget.join(usage or PackUsage(), PackUsage.of_document(document, spec))
    used = usage or PackUsage()
    if not documents and spec.placement is not Placement.NONE:
        image = _image(spec)
        while (more := budget.join(used, PackUsage.of_document(image, spec))) is not None:
            used = more
            yield image
    room = 0 if spec.placement is Placement.PAIR else budget.config.max_tokens - used.tokens
    while room > 0:
        text = _text(min(room, spec.max_document_tokens or room), spec)
        more = budget.join(used, PackUsage.of_document(text, spec))
        if more is None:
            room -= max(1, room // 64)  # The dummy document and the largest cost leave less room.
            continue
        used = more
        room = budget.config.max_tokens - used.tokens
        yield text
    if not documents and budget.needs_dummy(used):
        yield budget.dummy


def _text(tokens: int, spec: MediaSpec) -> Document:
    """Return a document of text whose tokens all carry loss."""
    ids = np.zeros(tokens, dtype=np.int32)
    shape = (tokens,) if spec.position_axes == 1 else (tokens, spec.position_axes)
    weights = np.ones(tokens, dtype=np.float32)
    slots = np.empty(0, dtype=np.int32)
    origin = Provenance("planned", "", "", 0)
    return Document(ids, ids, weights, np.zeros(shape, dtype=np.int32), (), slots, (Span(0, ()),), origin)


def _image(spec: MediaSpec) -> Document:
    """Return a document of one crop and ``_TEXT_TOKENS`` tokens of text."""
    image, text = dummy_document(spec, 0), _text(_TEXT_TOKENS, spec)
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(image, name), getattr(text, name)])
        for name in ("token_ids", "labels", "loss_weights", "position_ids")
    }
    return replace(image, **columns, provenance=text.provenance)
