"""The same documents in two formats: packed by our loader, and padded as by Hugging Face's collator.

    mixed   pages of text, 30 to 700 tokens; for mllama captioned pictures, and pages of two to four pictures
    equal   the same tokens and pictures, cut into documents of equal length: no padding

Batches are built before the timing starts. ``benchmarks.loader`` times the loader.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.steps.reference_models import PATCH, SIDE, our_config
from data_pipeline.batch import MultimodalBatch
from data_pipeline.config import DataConfig
from data_pipeline.document import IGNORE, Document, ImageExtent, MediaItem, Span
from data_pipeline.loader.loader import Loader
from data_pipeline.media_spec import IMAGE, MediaSpec
from data_pipeline.packing.collate import collate
from data_pipeline.packing.packer import Pack
from data_pipeline.sample import Provenance
from mmscale.models.build import media_spec

SHARDS = Path("examples/emoji/shards")
DATA = ("mixed", "equal")
EQUAL = {"dense": 256, "olmoe": 256, "active": 256, "mllama": 32}
"""Tokens per document of ``equal``."""
_KEYS = SIDE * SIDE


@dataclass(frozen=True)
class BatchPair:
    """One microbatch of one rank in both formats.

    Attributes:
        packed: Our batch.
        padded: Arguments of a Hugging Face model, without ``num_items_in_batch``.
        tokens: Useful tokens, that is, tokens of the documents.
        weight: Number of learned tokens.
        padding: Share of padding in token rows and in crops for the tower, for ours and theirs.
    """

    packed: MultimodalBatch
    padded: dict[str, Tensor]
    tokens: int
    weight: float
    padding: dict[str, float]


def data_config(model: str, lanes: int, max_tokens: int) -> DataConfig:
    """Return the loader's configuration of ``mixed``."""
    images = {"transforms": {"kind": "fixed", "size": PATCH * SIDE}}
    text = [{"name": "text", "manifest": SHARDS / "train-text.manifest", "template": {"kind": "text"}}]
    pictures = [
        {"name": "pairs", "manifest": SHARDS / "train-quick.manifest", "template": {"kind": "caption"}, **images},
        {
            "name": "pages",
            "manifest": SHARDS / "train-interleaved.manifest",
            "template": {"kind": "interleaved"},
            **images,
        },
    ]
    return DataConfig.model_validate(
        {
            "tokenizer": {"kind": "sentencepiece", "path": "examples/emoji/tokenizer.model"},
            "datasets": pictures if model == "mllama" else text,
            "lanes": lanes,
            "packing": {"max_tokens": max_tokens, "look_ahead": 4},
            "order": {"block_size": 4, "window_blocks": 32},
        }
    )


def make_batches(model: str, data: str, rank: int, world_size: int, steps: int, max_tokens: int) -> list[BatchPair]:
    """Return ``steps`` microbatches of ``rank``, each of at most ``max_tokens`` tokens."""
    spec = media_spec(our_config(model))
    config = data_config(model, world_size, max_tokens)
    with closing(Loader(config, spec, seed=1, rank=rank, world_size=world_size)) as loader:
        packed: Iterator[MultimodalBatch] = (batch.microbatches[0] for batch in loader)
        if data == "equal":
            packed = _cut_equal(packed, spec, EQUAL[model], max_tokens)
        return [_pair(next(packed)) for _ in range(steps)]


def _pair(packed: MultimodalBatch) -> BatchPair:
    padded = pad(packed)
    weight, tokens = packed.weight, packed.num_tokens
    padding = {"ours": 1 - tokens / packed.segments.total, "hugging face": 1 - tokens / padded["input_ids"].numel()}
    if packed.media:
        shown = sum(len(crops) for crops, _ in _images(packed))
        padding["ours, images"] = 1 - shown / packed.media[IMAGE].items.num
        padding["hugging face, images"] = 1 - shown / padded["aspect_ratio_ids"].numel()
    return BatchPair(packed, padded, tokens, weight, padding)


def _cut_equal(
    packed: Iterator[MultimodalBatch], spec: MediaSpec, length: int, max_tokens: int
) -> Iterator[MultimodalBatch]:
    """Cut the stream of tokens into documents of ``length``, with a picture before the second token for ``mllama``."""
    tokens: list[int] = []
    pictures: list[np.ndarray] = []
    while True:
        documents: list[Document] = []
        while len(documents) < max_tokens // length:
            if len(tokens) < length or (spec.needs_attended and not pictures):
                batch = next(packed)
                tokens += batch.token_ids[batch.valid].tolist()
                pictures += (
                    np.split(batch.media[IMAGE].values.numpy(), batch.media[IMAGE].items.num) if batch.media else []
                )
                continue
            ids = np.array(tokens[:length], dtype=np.int32)
            del tokens[:length]
            documents.append(_document(ids, pictures.pop() if spec.needs_attended else None))
        yield collate([Pack(tuple(documents), 0)], spec)


def _document(ids: np.ndarray, picture: np.ndarray | None) -> Document:
    labels = np.append(ids[1:], np.int32(IGNORE))
    weights = (labels != IGNORE).astype(np.float32)
    places = np.arange(len(ids), dtype=np.int32)
    origin = Provenance("equal", "", "", 0)
    nothing = np.empty(0, dtype=np.int32)
    if picture is None:
        return Document(ids, labels, weights, places, (), nothing, (Span(0, ()),), origin)
    item = MediaItem(picture, (1, SIDE, SIDE), embedded=False)
    spans = (Span(0, ()), Span(1, (0,)))
    return Document(ids, labels, weights, places, (item,), nothing, spans, origin, images=(ImageExtent(1, 0, 2),))


def pad(packed: MultimodalBatch) -> dict[str, Tensor]:
    """Return the documents as rows, padded at the end to the longest document and to the most images.

    Source: transformers' ``DataCollatorForSeq2Seq`` (labels too) and ``MllamaImageProcessor`` (images and masks).
    """
    bounds = packed.segments.bounds
    real = [number for number, origin in enumerate(packed.provenance) if origin is not None]
    rows = [packed.token_ids[bounds[i] : bounds[i + 1]] for i in real]
    # Their labels are unshifted; the model shifts them.
    learned = [packed.labels[bounds[i] : bounds[i + 1]].masked_fill(~_learned(packed, i), IGNORE) for i in real]
    labels = [torch.cat([row.new_full((1,), IGNORE), row[:-1]]) for row in learned]
    batch = {
        "input_ids": pad_sequence(rows, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }
    return batch | (_padded_images(packed, batch["input_ids"].shape[1]) if packed.media else {})


def flatten(packed: MultimodalBatch) -> dict[str, Tensor]:
    """Concatenate the documents in a single row; positions that restart at 0 separate them.

    Source: transformers' ``DataCollatorWithFlattening``.
    """
    batch = pad(packed)
    keep = batch["attention_mask"].bool()
    places = batch["attention_mask"].cumsum(1) - 1
    return {
        "input_ids": batch["input_ids"][keep][None],
        "labels": batch["labels"][keep][None],
        "position_ids": places[keep][None],
    }


def _learned(packed: MultimodalBatch, segment: int) -> Tensor:
    bounds = packed.segments.bounds
    return packed.loss_weights[bounds[segment] : bounds[segment + 1]] > 0


def _images(packed: MultimodalBatch) -> list[tuple[list[int], list[tuple[int, list[int]]]]]:
    """Return, for each real document, its crops and (first token, attended crops) of its spans."""
    media, bounds = packed.media[IMAGE], packed.segments.bounds
    documents: list[tuple[list[int], list[tuple[int, list[int]]]]] = [([], []) for _ in range(packed.segments.num)]
    features = (media.attended_index // _KEYS).tolist()
    for span, start in enumerate(media.span_tokens.bounds[:-1]):
        segment = int(np.searchsorted(bounds, start, side="right")) - 1
        seen = sorted(set(features[media.span_keys.bounds[span] : media.span_keys.bounds[span + 1]]))
        documents[segment][0].extend(item for item in seen if item not in documents[segment][0])
        documents[segment][1].append((start - bounds[segment], seen))
    return [found for found, origin in zip(documents, packed.provenance, strict=True) if origin is not None]


def _padded_images(packed: MultimodalBatch, longest: int) -> dict[str, Tensor]:
    media, documents = packed.media[IMAGE], _images(packed)
    most = max(1, *(len(crops) for crops, _ in documents))
    side = PATCH * SIDE
    pictures = media.values.view(-1, SIDE, SIDE, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, side, side)
    pixels = torch.zeros(len(documents), most, 1, 3, side, side)
    ids = torch.zeros(len(documents), most, dtype=torch.int64)
    mask = torch.zeros(len(documents), longest, most, 1, dtype=torch.int64)
    lengths = [b - a for a, b in zip(packed.segments.bounds, packed.segments.bounds[1:], strict=False)]
    real = [n for n, origin in zip(lengths, packed.provenance, strict=True) if origin is not None]
    for row, ((crops, spans), length) in enumerate(zip(documents, real, strict=True)):
        pixels[row, : len(crops), 0] = (pictures[crops].float() / 255 - 0.5) / 0.5
        ids[row, : len(crops)] = 1
        ends = [start for start, _ in spans[1:]] + [length]
        for (start, seen), end in zip(spans, ends, strict=True):
            mask[row, start:end, [crops.index(item) for item in seen]] = 1
    return {
        "pixel_values": pixels,
        "aspect_ratio_ids": ids,
        "aspect_ratio_mask": torch.ones(len(documents), most, 1, dtype=torch.int64),
        "cross_attention_mask": mask,
    }
