"""A tiny random Llama 3.2 Vision of transformers, and documents as inputs of both implementations.

The inputs of transformers come from the functions of its processor. Spans and positions of our batch are constructed
here, independently of the data pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batch import MultimodalBatch
from data_pipeline.document import IGNORE, Document, ImageExtent, MediaItem, Span
from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing.collate import collate
from data_pipeline.packing.packer import Pack
from data_pipeline.sample import Provenance
from mmscale.hf.layouts.pixels import CLIP
from tests.models.reference_models import randomise

VOCAB = 120
IMAGE = VOCAB + 3
"""One of the eight ids after the vocabulary."""
SIDE, PATCH, MAX_TILES = 12, 4, 4
ROWS = (SIDE // PATCH) ** 2 + 1
"""Feature rows of a tile: 9 patches and the class token. transformers pads them by 6 rows to 16."""
STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # Shorter than the documents of the tests.
}


def reference_model(
    *, kv_heads: int = 2, vocab: int = VOCAB, image: int = IMAGE, side: int = SIDE, patch: int = PATCH
) -> Any:
    """Return a model whose gates, norms and biases are not 0 or 1, so that no error is hidden."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

    vision = MllamaVisionConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_global_layers=2,
        attention_heads=4,
        intermediate_size=48,
        vision_output_dim=32 * 3,
        image_size=side,
        patch_size=patch,
        max_num_tiles=MAX_TILES,
        intermediate_layers_indices=[0, 2],
    )
    text = MllamaTextConfig(
        vocab_size=vocab,
        hidden_size=64,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        intermediate_size=96,
        cross_attention_layers=[1, 4],
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        rope_parameters=STRETCHED,
    )
    model = MllamaForConditionalGeneration(
        MllamaConfig(vision_config=vision, text_config=text, image_token_index=image)
    )
    randomise(model)
    return model.eval()


@dataclass(frozen=True)
class Picture:
    """An image of ``grid`` (rows, columns) tiles."""

    grid: tuple[int, int]
    seed: int

    @property
    def tiles(self) -> Tensor:
        """uint8 ``(tiles, 3, SIDE, SIDE)``."""
        shape = (self.grid[0] * self.grid[1], 3, SIDE, SIDE)
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


Parts = tuple[Picture | int, ...]
"""A document: pictures and numbers of text tokens."""
DOCUMENTS: dict[str, Parts] = {
    "image first": (Picture((1, 2), 1), 20),
    "image in the middle": (4, Picture((2, 2), 2), 9),
    "image last": (6, Picture((1, 1), 3)),
    "no image": (23,),
    "several images": (2, Picture((1, 4), 4), Picture((3, 1), 5), 5, Picture((1, 1), 6), 3, Picture((2, 1), 7), 24),
}


def token_ids(parts: Parts, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    pieces = [
        torch.tensor([IMAGE]) if isinstance(part, Picture) else torch.randint(3, VOCAB, (part,), generator=generator)
        for part in parts
    ]
    return torch.cat(pieces)


def their_inputs(parts: Parts, seed: int = 0) -> dict[str, Tensor]:
    """Return the inputs of one document, as the processor builds them from pixels that are already cut into tiles."""
    from transformers.models.mllama import image_processing_mllama as images
    from transformers.models.mllama.processing_mllama import (
        convert_sparse_cross_attention_mask_to_dense,
        get_cross_attention_token_mask,
    )

    ids = token_ids(parts, seed)
    pictures = [part for part in parts if isinstance(part, Picture)]
    if not pictures:
        return {"input_ids": ids[None]}
    mean, std = (torch.tensor(each)[:, None, None] for each in CLIP)
    tiles = [(picture.tiles / 255 - mean) / std for picture in pictures]
    values, counts = images.pad_batches_and_tiles([tiles], MAX_TILES)
    ratios = [[picture.grid for picture in pictures]]
    mask = convert_sparse_cross_attention_mask_to_dense(
        [get_cross_attention_token_mask(ids.tolist(), IMAGE)], counts, MAX_TILES, len(ids)
    )
    return {
        "input_ids": ids[None],
        "pixel_values": values,
        "aspect_ratio_ids": images.convert_aspect_ratios_to_ids(ratios, MAX_TILES),
        "aspect_ratio_mask": images.build_aspect_ratio_mask(ratios, MAX_TILES),
        "cross_attention_mask": torch.from_numpy(mask),
    }


def document(parts: Parts, seed: int = 0) -> Document:
    """Return the same document for our model. Every next token except image tokens has a loss."""
    ids = token_ids(parts, seed).numpy().astype(np.int32)
    items, spans, images, run, at = list[MediaItem](), [Span(0, ())], list[ImageExtent](), tuple[int, ...](), 0
    for part in parts:
        if isinstance(part, int):
            run, at = (), at + part
            continue
        first = len(items)
        rows, columns = part.grid
        for number, tile in enumerate(part.tiles):
            place = (number // columns, number % columns)
            item = MediaItem(_patches(tile), GRID, False, cell=place, tiles=(rows, columns), image=len(images))
            items.append(item)
        images.append(ImageExtent(at, first, at + 1))
        run += tuple(range(first, len(items)))
        spans.append(Span(at, run))
        at += 1
    if len(spans) > 1 and spans[1].start == 0:
        del spans[0]
    following = np.append(ids[1:], np.int32(IGNORE))
    labels = np.where(following == IMAGE, np.int32(IGNORE), following)
    weights = np.where(labels == IGNORE, 0, 0.5 + (np.arange(len(ids)) % 3) / 2).astype(np.float32)
    positions, nowhere = np.arange(len(ids), dtype=np.int32), np.empty(0, dtype=np.int32)
    origin = Provenance("reference", "", "", seed)
    return Document(ids, labels, weights, positions, tuple(items), nowhere, tuple(spans), origin, tuple(images))


GRID = (1, SIDE // PATCH, SIDE // PATCH)


def _patches(tile: Tensor) -> np.ndarray:
    side = SIDE // PATCH
    cut = tile.view(3, side, PATCH, side, PATCH).permute(1, 3, 0, 2, 4)
    return cut.reshape(side * side, -1).numpy()


def our_batch(documents: list[Document], spec: MediaSpec) -> MultimodalBatch:
    return collate([Pack(tuple(documents), 0)], spec)
