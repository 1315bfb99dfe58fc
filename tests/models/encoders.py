"""Models that encode images in each step, the same batches with stored codes, and training steps on real ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_pipeline.batch import MultimodalBatch
from data_pipeline.config import DatasetConfig
from data_pipeline.document import Document
from data_pipeline.images.drawn_images import code_transform
from data_pipeline.images.transforms import NativeTransform
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.randomness import SampleRng
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.sample import ImagePart, Provenance, Sample
from data_pipeline.shards.token_grid import encode_grid
from data_pipeline.text.tokenizer import HuggingFaceTokenizerConfig, load_tokenizer
from mmscale.dist import World
from mmscale.engine.config import EngineConfig
from mmscale.engine.construct import construct
from mmscale.engine.engine import Engine
from mmscale.models.build import build_model, media_spec
from mmscale.models.config import ModelConfig
from mmscale.models.image_tokenizer import ImageTokenizer
from mmscale.models.multimodal import MultimodalModel
from mmscale.nn.image_blocks import images_of_patches
from mmscale.nn.init import initialise_
from mmscale.objectives.next_token import NextToken
from mmscale.optim.stages import StageConfig
from tests.data_pipeline.conftest import picture
from tests.models.tiny import config

TEXT_IDS, CODES, SEED = 260, 9, 3
TOKENIZERS: dict[str, dict[str, Any]] = {
    "separate": {"kind": "vqgan", "latent_dim": 4},
    "vocabulary": {"kind": "movqgan", "latent_dim": 4, "temporal_factor": 2},
}
TOKENS: dict[str, dict[str, Any]] = {
    "separate": {"kind": "separate", "codes": CODES, "code_dim": 3},
    "vocabulary": {"kind": "vocabulary", "first_id": TEXT_IDS, "codes": CODES},
}
SIZES = [(8, 6), (6, 6), (4, 10), (8, 6)]
"""Width and height of the images, which differ so that one batch has several grids."""


def settings(kind: str) -> ModelConfig:
    """Return a model with a tower and separate tokens (as Janus), or without a tower (as Emu3)."""
    tower = "embedding" if kind == "separate" else None
    vocab = TEXT_IDS if kind == "separate" else TEXT_IDS + CODES
    block = config(tower, vocab_size=vocab, image_tokens=TOKENS[kind]).model_dump()
    sizes = {"base_dim": 4, "multipliers": [1, 1], "blocks_per_level": 1, "attention_levels": [1], "norm_groups": 2}
    block["image_tokenizer"] = {**sizes, "codebook_size": CODES, "code_dim": 4, **TOKENIZERS[kind]}
    return ModelConfig.model_validate(block)


def dataset(kind: str, **tokens: Any) -> DatasetConfig:
    marks = {"codebook_size": CODES, "first_id": TEXT_IDS, "row_end": "<s>" if kind == "vocabulary" else None}
    return DatasetConfig.model_validate(
        {
            "name": "x",
            "manifest": "x",
            "template": {"kind": "drawing", "image_weight": 0.5, "caption_last": 0.5},
            "transforms": {"kind": "native", "min_pixels": 4},
            "image_tokens": {**marks, **tokens},
        }
    )


def samples(tokenizer: ImageTokenizer, count: int) -> list[Sample]:
    """Return samples with pictures and with the token grids that the tokenizer computes of each picture alone."""
    found = []
    transform = code_transform(NativeTransform(min_pixels=4), MediaSpec(code_size=tokenizer.stride))
    for number in range(count):
        image = picture(number, *SIZES[number % len(SIZES)])
        (crop,) = transform(image)
        pixels = images_of_patches(torch.from_numpy(crop.values), crop.grid[1:], 3, tokenizer.stride)
        codes = tokenizer.encode(pixels)[0].numpy()
        part = ImagePart(image, "png", None, encode_grid(codes, CODES, "ab" * 32))
        found.append(Sample((part,), {"caption": f"it {number}"}, Provenance("x", "s", f"k{number}", number)))
    return found


def documents(kind: str, tokenizer_path: Path, encoded: str, made: list[Sample]) -> tuple[list[Document], MediaSpec]:
    spec = media_spec(settings(kind), encodes=encoded == "in_step")
    text = load_tokenizer(HuggingFaceTokenizerConfig(path=tokenizer_path))
    build = DocumentBuilder(dataset(kind, encoded=encoded), text, spec)
    return [build(sample, SampleRng(1, sample.provenance.index, 0)) for sample in made], spec


def batch(found: list[Document], spec: MediaSpec, lane: int = 0) -> MultimodalBatch:
    """Return the documents as the pack of a lane, with the dummy document that it may need."""
    return collate([Pack((*found, dummy_document(spec, 0)), lane)], spec)


def run(world: World, kind: str, tokenizer_path: str) -> list[dict[str, float]]:
    """Return the metrics of two steps under ZeRO-3; the last two of four lanes have no image."""
    config = settings(kind)
    options = EngineConfig(
        zero_stage=3,
        device="cpu",
        precision="fp32",
        timeout_seconds=60,
        persistent_parameter_elements=0,
        activation_checkpointing=kind == "separate",
    )
    whole = build_model(config, seed=SEED)
    assert isinstance(whole, MultimodalModel)
    assert whole.image_tokenizer is not None
    found, spec = documents(kind, Path(tokenizer_path), "in_step", samples(whole.image_tokenizer, 6))
    model = construct(partial(build_model, config, seed=None), options, world, partial(initialise_, seed=SEED))
    learned = [name for name in config.components if name != "image_tokenizer"]
    stage = StageConfig.model_validate({"name": "all", "steps": 2, "train": learned, "learning_rate": 1e-2})
    engine = Engine(model, NextToken(world=world), stage, options, world)
    lanes = range(world.rank, 4, world.world_size)
    reports = []
    for step in range(2):
        mine = [found[3 * step : 3 * step + 2], found[3 * step + 2 : 3 * step + 3], [], []]
        report = engine.train_step([batch(mine[lane], spec, lane) for lane in lanes])
        reports.append({"loss": report.loss, "norm": report.grad_norm, **report.metrics})
    engine.close()
    return reports
