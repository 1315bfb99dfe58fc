"""Imported LLaVA with a CLIP tower gives the results of transformers, and an export restores the folder bit for bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmscale.errors import CheckpointError
from mmscale.hf.layouts import layout_of
from mmscale.models.build import media_spec
from tests.hf.pages import (
    AUTO,
    BOS,
    EOS,
    PAD,
    Page,
    Seen,
    builder,
    load,
    normalised,
    odd_pages,
    save_tokenizer,
    written,
)
from tests.hf.reference_models import imported, loaded, tensors_of
from tests.hf.train_and_export import VOCABULARY, captions, train_and_export
from tests.models.reference_models import distance, randomise
from tests.parity_table import Recorder

pytestmark = pytest.mark.parity
BOUND, GRADIENT_BOUND = 2e-6, 8e-6
IMAGE = "<image>"
SIDE, PATCH = 28, 7
PIXELS = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
TRANSFORMS = {"kind": "fixed", "crop": "center"}
TWINS: dict[str, dict[str, Any]] = {
    "as 1.5": {},
    "three blocks' features, tied": {"vision_feature_layer": [-2, 1, -4], "tie_word_embeddings": True},
}


def reference_model(name: str = "as 1.5", seed: int = 0, vocabulary: int = 272) -> Any:
    """Return a tiny random model. The image token is 3, or 4 with the emoji tokenizer's vocabulary."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    sizes = {"intermediate_size": 128, "num_attention_heads": 4}
    config = LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **sizes,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
            **sizes,
        },
        image_token_index=4 if vocabulary == VOCABULARY else 3,
        image_seq_length=(SIDE // PATCH) ** 2,
        **TWINS[name],
    )
    model = LlavaForConditionalGeneration(config)
    randomise(model, seed)
    return model.eval()


def processor(tokenizer: Path) -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer), bos_token=BOS, eos_token=EOS, pad_token=PAD, additional_special_tokens=[IMAGE]
    )
    return LlavaProcessor(CLIPImageProcessor(**PIXELS), words, PATCH, "default", num_additional_image_tokens=1)


def seen(folder: Path, model: Any, pages: list[Page]) -> Seen:
    path = save_tokenizer(folder / "tokenizer.json", [IMAGE])
    theirs = processor(path)

    def process(page: Page) -> dict[str, Tensor]:
        text, pictures = written(page, IMAGE)
        return dict(theirs(text=[text], images=pictures or None, return_tensors="pt", add_special_tokens=False))

    return Seen.of(builder(load(path, IMAGE), media_spec(model.config), TRANSFORMS), process, pages)


def test_names_and_keys_of_the_first_files_are_understood(tmp_path: Path) -> None:
    """Before version 5 the tower's tensors had a further prefix, and keys with class defaults were left out."""
    theirs = reference_model()
    theirs.save_pretrained(tmp_path / "theirs")
    values = json.loads((tmp_path / "theirs/config.json").read_text())
    for key in ("vision_feature_layer", "vision_feature_select_strategy", "multimodal_projector_bias"):
        del values[key]
    values |= {"ignore_index": -100, "vocab_size": 272, "pad_token_id": 0}
    values["vision_config"] |= {"vocab_size": 32000}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps(values))
    tensors = tensors_of(tmp_path / "theirs")
    renamed = {key.replace("vision_tower.", "vision_tower.vision_model."): value for key, value in tensors.items()}
    save_file(renamed, tmp_path / "other/model.safetensors")
    ours, _ = imported(tmp_path / "theirs", tmp_path / "run")
    other, _ = imported(tmp_path / "other", tmp_path / "of other")
    assert other.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": -1}, "vision_feature_layer=-1 is not supported, only blocks before the last"),
        ({"vision_feature_layer": [-2, -9]}, "vision_feature_layer=[-2, -9] is not supported"),
        ({"vision_feature_layer": "last"}, "vision_feature_layer"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy='full'"),
    ],
)
def test_unsupported_features_are_rejected(change: dict[str, Any], message: str) -> None:
    values = {**json.loads(reference_model().config.to_json_string(use_diff=False)), **change}
    with pytest.raises(CheckpointError, match=re.escape(message) if "[" in message else message):
        layout_of("llava").model_config(values, "config.json")


def test_pictures_are_cut_as_theirs(tmp_path: Path, parity: Recorder) -> None:
    reference_model().save_pretrained(tmp_path / "theirs")
    ours, _ = imported(tmp_path / "theirs", tmp_path / "run")
    pages = seen(tmp_path, ours, odd_pages(30, 9, 150))  # Asserts equal token ids.
    for document, inputs in zip(pages.documents, pages.inputs, strict=True):
        values = torch.cat([torch.from_numpy(item.values) for item in document.items])
        expected = inputs["pixel_values"].unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5)
        error = distance(normalised(ours.config.vision, values), expected.reshape(len(values), -1))
        parity("llava", "pixels", error, BOUND)


@pytest.mark.slow
def test_trained_on_two_ranks_and_generated_from(tmp_path: Path) -> None:
    reference_model(vocabulary=VOCABULARY).save_pretrained(tmp_path / "theirs")
    folder = train_and_export(
        tmp_path / "theirs", tmp_path, captions(TRANSFORMS), idle=r"layers\.3\.|post_layernorm", max_tokens=128
    )
    again = loaded(folder, AUTO)
    inputs = {
        "input_ids": torch.tensor([[1, *[4] * 16, 9]]),
        "pixel_values": torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)),
    }
    ids = again.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ids.shape == (1, 23)
    assert ids[0, 18] == again(**inputs).logits[0, -1].argmax()
