"""A model without a tower reads images as tokens: from stored grids, or encoded by its own tokenizer."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.sample import ImagePart
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.writer import ShardWriter
from mmscale.errors import ConfigError
from mmscale.evaluate import EvaluationConfig, check_sets, evaluate, unanswerable_sets
from mmscale.evaluate.answers import caption_images, respond
from mmscale.models.build import build_model, media_spec
from mmscale.models.multimodal import MultimodalModel
from tests.data_pipeline.conftest import picture
from tests.data_pipeline.conftest import tokenizer_path as tokenizer_path
from tests.evaluate.emoji_models import ALONE
from tests.models.encoders import SEED, dataset, samples, settings

NAMES = ["red fox", "dog", "sun", "bee", "pea", "car"]
CAPTION = {"kind": "caption", "prompts": ["name:"], "answers": ["{name}"]}


@pytest.fixture(scope="module")
def net() -> MultimodalModel:
    model = build_model(settings("vocabulary"), seed=SEED).eval()
    assert isinstance(model, MultimodalModel)
    return model


@pytest.fixture(scope="module")
def manifest(net: MultimodalModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held-out")
    assert net.image_tokenizer is not None
    with ShardWriter(folder, "a") as writer:
        for name, sample in zip(NAMES, samples(net.image_tokenizer, len(NAMES)), strict=True):
            (part,) = sample.parts
            assert isinstance(part, ImagePart)
            assert part.grid is not None
            members = {"png": part.data, "png.tokens": part.grid, "json": json.dumps({"name": name}).encode()}
            writer.write(name.replace(" ", "_"), members)
    write_manifest(folder / "a.manifest", writer.shards)
    return folder / "a.manifest"


def data(tokenizer_path: Path, **tokens: Any) -> DataConfig:
    one = dataset("vocabulary", **tokens).model_copy(update={"manifest": Path("x")})
    block = {"tokenizer": {"kind": "tokenizers", "path": tokenizer_path}, "lanes": 1}
    return DataConfig.model_validate({**block, "datasets": [one.model_dump()], "packing": {"max_tokens": 64}})


def test_held_out_values_with_encoded_images_are_those_of_stored_codes(
    net: MultimodalModel, manifest: Path, tokenizer_path: Path
) -> None:
    common = {"manifest": manifest}
    sets = [
        {"name": "which", "field": "name", "choices": 3, "prompt": "name:", **common},
        {"name": "drawn", "kind": "perplexity", "template": {"kind": "drawing", "prompts": ["{name}"]}, **common},
        {"name": "read", "kind": "perplexity", "template": CAPTION, **common},
    ]
    block = {"sets": sets, "captions": {"num_images": 2, "max_new_tokens": 3}, "tokens_per_forward": 64}
    config = EvaluationConfig.model_validate(block)
    found = {}
    for encoded in ("stored", "in_step"):
        inputs, spec = data(tokenizer_path, encoded=encoded), media_spec(net.config, encodes=encoded == "in_step")
        check_sets(config, inputs, spec)
        assert unanswerable_sets(config, spec, inputs) == ()
        scores = {name: asdict(result) for name, result in evaluate(net, config, inputs, spec, ALONE).items()}
        captions = [(each.expected, each.generated) for each in caption_images(net, config, inputs, spec, ALONE)]
        assert len(captions) == 2
        found[encoded] = (scores, captions)
    (stored, captions), (ours, own_captions) = found["stored"], found["in_step"]
    assert own_captions == captions
    assert ours.keys() == stored.keys() == {"which", "drawn", "read"}
    for name, expected in stored.items():
        numbers = {key: value for key, value in expected.items() if isinstance(value, int | float)}
        assert {key: ours[name][key] for key in numbers} == pytest.approx(numbers, rel=1e-5), name
    blind = data(tokenizer_path).model_copy(update={"image_tokens": None, "datasets": ()})
    assert [held.name for held in unanswerable_sets(config, media_spec(net.config), blind)] == ["which"]


def test_a_file_is_encoded_by_the_models_own_tokenizer(
    net: MultimodalModel, tokenizer_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(picture(1, 8, 6))
    (tmp_path / "b.png").write_bytes(picture(2, 8, 6))
    spec = media_spec(net.config)
    for encoded in ("stored", "in_step"):
        inputs = data(tokenizer_path, encoded=encoded)
        first, second = (
            respond(net, inputs, spec, images=[tmp_path / name], prompt="x", max_new_tokens=6)
            for name in ("a.png", "b.png")
        )
        assert first == respond(net, inputs, spec, images=[tmp_path / "a.png"], prompt="x", max_new_tokens=6)
        assert first != second
    without = build_model(settings("vocabulary").model_copy(update={"image_tokenizer": None}), seed=SEED).eval()
    with pytest.raises(ConfigError, match="nothing can encode a file: its checkpoint has no image tokenizer"):
        respond(without, data(tokenizer_path), spec, images=[tmp_path / "a.png"], prompt="x")
