"""Tiny models that draw, and their data blocks: Emu3's marks in the vocabulary, and Janus' separate head."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from data_pipeline.config import DataConfig
from data_pipeline.document import Document
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.token_grid import encode_grid
from data_pipeline.shards.writer import ShardWriter
from mmscale.models.build import build_model
from mmscale.models.config import ModelConfig
from mmscale.models.image_tokenizer import build_image_tokenizer, image_tokenizer_digest
from mmscale.models.multimodal import MultimodalModel
from tests.evaluate.emoji_models import EMOJI

Kind = Literal["vocabulary", "separate"]
CODES, STRIDE, VOCAB = 24, 2, 2048
FIRST = {"vocabulary": VOCAB, "separate": VOCAB + CODES}
"""Id of code 0. The vocabulary of both models has rows for the codes."""
START, CONTENT, ROW_END, FRAME_END, END = (f"<0x0{number}>" for number in range(1, 6))
MARKS: dict[str, dict[str, Any]] = {
    "vocabulary": {
        "start": START,
        "size": "{height}*{width}",
        "content": CONTENT,
        "row_end": ROW_END,
        "frame_end": FRAME_END,
        "end": END,
    },
    "separate": {"start": START, "end": END, "grid": [3, 3]},
}
TEMPLATES: dict[str, dict[str, Any]] = {
    "vocabulary": {"text_dropout": 0.1},
    "separate": {"prompts": ["User: {caption}\n\nAssistant:"], "text_dropout": 0.1, "dropped_text": "pad"},
}
IMAGE_TOKENIZER = {
    "kind": "vqgan",
    "base_dim": 4,
    "multipliers": [1, 1],
    "blocks_per_level": 1,
    "attention_levels": [],
    "latent_dim": 4,
    "codebook_size": CODES,
    "code_dim": 2,
    "norm_groups": 2,
}


def model_block(kind: Kind) -> dict[str, Any]:
    tokens = {"vocabulary": {"first_id": VOCAB}, "separate": {"code_dim": 4}}[kind]
    return {
        "decoder": {
            "vocab_size": VOCAB + CODES,
            "hidden_dim": 32,
            "num_layers": 2,
            "attention": {"num_heads": 4},
            "mlp": {"kind": "dense", "hidden_dim": 48},
            "image_tokens": {"kind": kind, "codes": CODES, **tokens},
        },
        "image_tokenizer": IMAGE_TOKENIZER,
    }


def dataset_block(kind: Kind, manifest: object = "none.manifest", **template: Any) -> dict[str, Any]:
    return {
        "name": "drawn",
        "manifest": manifest,
        "template": {"kind": "drawing", **TEMPLATES[kind], **template},
        "image_tokens": {"codebook_size": CODES, "first_id": FIRST[kind], **MARKS[kind]},
    }


def drawing_data(kind: Kind, **template: Any) -> DataConfig:
    return DataConfig.model_validate(
        {
            "tokenizer": {"kind": "sentencepiece", "path": EMOJI / "tokenizer.model"},
            "datasets": [dataset_block(kind, **template)],
            "lanes": 1,
            "packing": {"max_tokens": 128},
        }
    )


def drawing_model(kind: Kind, **changes: Any) -> MultimodalModel:
    """Return a random model whose codes depend on the text by more than rounding."""
    net = build_model(ModelConfig.model_validate({**model_block(kind), **changes}), seed=3).eval()
    assert isinstance(net, MultimodalModel)
    with torch.no_grad():
        (net.head.weight if net.head.image is None else net.head.image.weight).mul_(20)
    return net


def with_tokens(document: Document, ids: list[int]) -> Document:
    """Return a document of these tokens in place of those of ``document``."""
    count = len(ids)
    return replace(
        document,
        token_ids=np.array(ids, np.int32),
        labels=np.full(count, -100, np.int32),
        loss_weights=np.zeros(count, np.float32),
        position_ids=np.arange(count, dtype=np.int32),
    )


def write_codes(folder: Path, digest: str = "ab" * 32, rows: int = 3, columns: int = 3) -> Path:
    """Write a shard of six named images as codes; return its manifest."""
    with ShardWriter(folder, "drawn") as writer:
        for number, name in enumerate(("fox", "moon", "cat", "tree", "star", "apple")):
            codes = np.random.default_rng(number).integers(0, CODES, (rows, columns))
            fields = json.dumps({"caption": name, "name": name}).encode()
            writer.write(name, {"json": fields, "png.tokens": encode_grid(codes, CODES, digest)})
    manifest = folder / "drawn.manifest"
    write_manifest(manifest, writer.shards, digest)
    return manifest


def drawing_run(folder: Path, kind: Kind, **changes: Any) -> Path:
    """Write shards of six images and the file of a run that draws them; return the file. The run has four steps."""
    tokenizer = build_image_tokenizer(ModelConfig.model_validate(model_block(kind)).image_tokenizer)  # type: ignore[arg-type]
    manifest = write_codes(folder / "shards", image_tokenizer_digest(tokenizer))
    block: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "data": {
            "tokenizer": {"kind": "sentencepiece", "path": str(EMOJI / "tokenizer.model")},
            "datasets": [dataset_block(kind, str(manifest))],
            "lanes": 2,
            "packing": {"max_tokens": 64},
        },
        "model": model_block(kind),
        "stages": [{"name": "draw", "steps": 4, "train": ["all"], "learning_rate": 0.01}],
        "engine": {"zero_stage": 3, "precision": "fp32", "timeout_seconds": 60},
        "checkpoint": {"every_steps": 2},
        "evaluation": {
            "captions": None,
            "every_steps": 2,
            "sets": [{"name": "held", "kind": "perplexity", "manifest": str(manifest), "limit": 4}],
            "drawings": {
                "prompts": ["fox", "the <moon>"],
                "sets": ["held"],
                "num_images": 1,
                "guidance": 2.0,
                "sampling": {"temperature": 1.0, "seed": 7},
                **({"size": 6} if kind == "vocabulary" else {}),
            },
        },
        **changes,
    }
    path = folder / "drawing.yaml"
    path.write_text(json.dumps(block))
    return path
