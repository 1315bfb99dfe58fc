"""A small held-out set of made-up samples and its tokenizer, so that the check can evaluate without the run's data.

The set has an odd number of samples, so the ranks get different numbers of them.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.text.tokenizer import IMAGE_TOKEN
from mmscale.evaluate import EvaluationConfig

_NAMES = ("grinning face", "dog", "red apple")
_VOCABULARY = 300
_SIDE = 64
_IMAGES, _TEXTS, _TOKENIZER = "images.manifest", "texts.manifest", "tokenizer.model"


def write_held_out(folder: Path) -> None:
    """Write the samples with and without images, their manifests, and the tokenizer into ``folder``."""
    from PIL import Image

    with ShardWriter(folder, "images") as images, ShardWriter(folder, "texts") as texts:
        for number, name in enumerate(_NAMES):
            pixels = np.random.default_rng(number).integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)
            image = io.BytesIO()
            Image.fromarray(pixels).save(image, "PNG")
            fields = {"name": name, "question": f"What is it? {name}", "choices": list(_NAMES), "answer": number % 3}
            members = {"json": json.dumps(fields).encode()}
            texts.write(str(number), members)
            images.write(str(number), {**members, "png": image.getvalue()})
    for name, writer in ((_IMAGES, images), (_TEXTS, texts)):
        write_manifest(folder / name, writer.shards)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*_NAMES, "What is it?"] * 4),
        model_writer=model,
        vocab_size=_VOCABULARY,
        hard_vocab_limit=False,
        byte_fallback=True,
        model_type="bpe",
        pad_id=3,
        user_defined_symbols=[IMAGE_TOKEN],
        minloglevel=2,
    )
    (folder / _TOKENIZER).write_bytes(model.getvalue())


def tokenizer_block(folder: Path) -> dict[str, Any]:
    """Return the ``data.tokenizer`` block of the tokenizer in ``folder``."""
    return {"kind": "sentencepiece", "path": folder / _TOKENIZER}


def evaluation_block(folder: Path, spec: MediaSpec) -> EvaluationConfig:
    """Return held-out sets of the kinds that a model with these inputs can answer, without drawings.

    Drawings need the run of a classifier.
    """
    common = {"manifest": folder / (_TEXTS if spec.placement is Placement.NONE else _IMAGES)}
    sets: list[dict[str, Any]] = []
    if spec.placement is not Placement.NONE:
        sets.append({"name": "images", "field": "name", "choices": None, **common})
    if spec.placement is not Placement.PAIR:
        template = {"kind": "caption", "images": "optional", "answers": ["{name}"]}
        sets.append({"name": "perplexity", "kind": "perplexity", "template": template, **common})
        sets.append({"name": "choice", "kind": "choice", **common})
        sets.append({"name": "generation", "kind": "generation", "answers": "name", "max_new_tokens": 3, **common})
    return EvaluationConfig.model_validate({"sets": sets, "captions": None, "tokens_per_forward": 64})
