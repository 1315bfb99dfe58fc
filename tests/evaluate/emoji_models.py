"""Tiny models and held-out sets of bundled emoji."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.config import DataConfig
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.sample import Sample
from data_pipeline.text.templates import TemplateConfig
from data_pipeline.text.tokenizer import load_tokenizer
from mmscale.dist import World
from mmscale.evaluate import EvaluationConfig, evaluate
from mmscale.models.build import build_model, media_spec
from mmscale.models.config import ModelConfig
from mmscale.models.multimodal import MultimodalModel

EMOJI = Path(__file__).resolve().parents[2] / "examples" / "emoji"
ALONE = World(0, 1, 0, torch.device("cpu"))


def data_config(transforms: dict[str, Any] | None = None) -> DataConfig:
    return DataConfig.model_validate(
        {
            "tokenizer": {"kind": "sentencepiece", "path": EMOJI / "tokenizer.model"},
            "datasets": [
                {
                    "name": "emoji",
                    "manifest": EMOJI / "shards" / "train-quick.manifest",
                    "template": {"kind": "caption", "prompts": ["name:"], "answers": [" {name}"]},
                    "transforms": transforms or {"kind": "fixed", "size": 16, "augment": {"shift": 0.3}},
                }
            ],
            "lanes": 1,
            "packing": {"max_tokens": 512},
        }
    )


def held_out(**changes: Any) -> dict[str, Any]:
    return {
        "name": "both",
        "manifest": EMOJI / "shards" / "heldout-both.manifest",
        "field": "name",
        "prompt": "name:",
        "template": " {value}",
        "choices": 4,
        "limit": 10,
        **changes,
    }


def evaluation(**changes: Any) -> EvaluationConfig:
    return EvaluationConfig.model_validate(
        {"sets": [held_out(**changes)], "tokens_per_forward": 96, "rows_per_head": 7}
    )


def tiny_model(kind: str = "cross_attention") -> Any:
    """Return a random model whose answers depend on the image by more than rounding."""
    connectors: dict[str, Any] = {
        "contrastive": {"kind": "contrastive", "dim": 16, "pool": "mean"},
        "embedding": {"kind": "embedding", "projector": {"kind": "mlp", "merge": 2, "norm": "after_merge"}},
        "cross_attention": {"kind": "cross_attention", "every": 1, "gate_init": 1.0},
        "hybrid": {
            "kind": "hybrid",
            "every": 1,
            "gate_init": 1.0,
            "projector": {"kind": "mlp", "merge": 2, "norm": "after_merge"},
        },
    }
    config = ModelConfig.model_validate(
        {
            "decoder": {
                "vocab_size": 2048,
                "hidden_dim": 32,
                "num_layers": 2,
                "attention": {"num_heads": 4},
                "mlp": {"kind": "dense", "hidden_dim": 48},
            },
            "vision": {
                "patch_size": 4,
                "hidden_dim": 24,
                "num_layers": 1,
                "attention": {"num_heads": 2},
                "mlp": {"kind": "dense", "hidden_dim": 32},
                "positions": {"kind": "rotary_2d"},
            },
            "connector": connectors[kind],
        }
    )
    model = build_model(config, seed=3).eval()
    if isinstance(model, MultimodalModel):
        with torch.no_grad():
            model.head.weight.mul_(20)
    return model


def score(world: World, **changes: Any) -> dict[str, Any]:
    """Return the result of one set for each kind of model, as plain values. Runs on every rank."""
    models = {kind: tiny_model(kind) for kind in ("cross_attention", "contrastive")}
    return {
        kind: asdict(evaluate(model, evaluation(**changes), data_config(), media_spec(model.config), world)["both"])
        for kind, model in models.items()
    }


def continued(model: MultimodalModel, data: DataConfig, template: TemplateConfig, sample: Sample, steps: int) -> str:
    """Return the greedy continuation of a prompt, with a whole forward pass for every token."""
    tokenizer, spec = load_tokenizer(data.tokenizer), media_spec(model.config)
    tokens: list[int] = []
    transforms = data.datasets[0].transforms.model_copy(update={"augment": None})
    while len(tokens) < steps:
        dataset = data.datasets[0].model_copy(update={"template": template, "transforms": transforms})
        document = DocumentBuilder(dataset, tokenizer, spec).build_prompt(sample)
        ids = np.concatenate([document.token_ids, np.array(tokens, dtype=np.int32)])
        positions = np.arange(len(ids), dtype=np.int32)
        longer = type(document)(
            token_ids=ids,
            labels=np.full(len(ids), -100, dtype=np.int32),
            loss_weights=np.zeros(len(ids), dtype=np.float32),
            position_ids=positions,
            items=document.items,
            scatter_index=document.scatter_index,
            spans=document.spans,
            provenance=document.provenance,
            images=document.images,
        )
        batch = collate([Pack((longer, dummy_document(spec, tokenizer.pad_id)), lane=0)], spec)
        with torch.no_grad():
            token = int(model.head(model(batch).hidden[len(ids) - 1 : len(ids)]).argmax())
        if token == tokenizer.eos_id:
            break
        tokens.append(token)
    return tokenizer.decode(tokens).strip()
