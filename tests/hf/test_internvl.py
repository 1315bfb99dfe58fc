"""Imported InternVL gives the results of transformers, and an export restores the folder bit for bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.images.tilings import internvl_grid
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
IMAGE, START, END, VIDEO = "<IMG_CONTEXT>", "<img>", "</img>", "<video>"
SPECIAL = [IMAGE, START, END, VIDEO]  # Ids 3 to 6.
NAMED = {
    "context_image_token": IMAGE,
    "start_image_token": START,
    "end_image_token": END,
    "video_token": VIDEO,
}
"""Attributes of the published tokenizers."""
SIDE, PATCH, MOST = 28, 7, 6
PIXELS = {
    "size": {"height": SIDE, "width": SIDE},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "max_patches": MOST,
}
TRANSFORMS = {
    "kind": "tiles",
    "tiling": {"kind": "internvl", "max_tiles": MOST},
    "layout": {"start": START, "end": END},
}
TWINS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "as 3-1B": ({"model_type": "qwen2", "num_key_value_heads": 2}, {"attention_bias": True}, {}),
    "as 3-38B, tied": (
        {"model_type": "qwen2", "num_key_value_heads": 1},
        {"norm_type": "rms_norm", "use_qk_norm": True},
        {"tie_word_embeddings": True},
    ),
    "as 3.5, 4 x 4 patches": (
        {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 24},
        {},
        {"downsample_ratio": 0.25},
    ),
}


def reference_model(name: str = "as 3-1B", seed: int = 0, vocabulary: int = 272) -> Any:
    """Return a tiny random model. The image token is 3, or 4 with the emoji tokenizer's vocabulary."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    text, tower, more = TWINS[name]
    sizes = {"intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = InternVLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": 64,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            **sizes,
            **text,
        },
        vision_config={
            "hidden_size": 32,
            "image_size": [SIDE, SIDE],
            "patch_size": [PATCH, PATCH],
            **sizes,
            **tower,
        },
        image_token_id=4 if vocabulary == VOCABULARY else 3,
        **{"tie_word_embeddings": False, **more},
    )
    model = InternVLForConditionalGeneration(config)
    randomise(model, seed)
    return model.eval()


def processor(tokenizer: Path, features: int = 4) -> Any:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor, PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer), bos_token=BOS, eos_token=EOS, pad_token=PAD, extra_special_tokens=NAMED
    )
    return InternVLProcessor(GotOcr2ImageProcessor(**PIXELS), words, InternVLVideoProcessor(), features)


def seen(folder: Path, model: Any, pages: list[Page]) -> Seen:
    path = save_tokenizer(folder / "tokenizer.json", SPECIAL)
    theirs = processor(path, (SIDE // PATCH // model.config.connector.projector.merge) ** 2)

    def process(page: Page) -> dict[str, Tensor]:
        text, pictures = written(page, IMAGE)
        inputs = theirs(text=[text], images=pictures or None, return_tensors="pt", add_special_tokens=False)
        return {key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values") if key in inputs}

    return Seen.of(builder(load(path, IMAGE), media_spec(model.config), TRANSFORMS), process, pages)


def test_names_of_the_classes_and_keys_of_version_4_are_understood(tmp_path: Path) -> None:
    """Version 4 has no ``tie_word_embeddings`` at the top level and reads the one in ``text_config``."""
    theirs = reference_model()
    theirs.save_pretrained(tmp_path / "theirs")
    values = json.loads((tmp_path / "theirs/config.json").read_text())
    del values["tie_word_embeddings"], values["text_config"]["tie_word_embeddings"]
    values |= {"transformers_version": "4.52.0.dev0"}
    values["text_config"] |= {
        "rope_theta": values["text_config"].pop("rope_parameters")["rope_theta"],
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
    }
    values["vision_config"] |= {"initializer_factor": 0.1, "drop_path_rate": 0.1, "dropout": 0.0}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps(values))
    save_file(dict(theirs.named_parameters()), tmp_path / "other/model.safetensors")
    assert not tensors_of(tmp_path / "theirs").keys() & tensors_of(tmp_path / "other").keys()
    ours, _ = imported(tmp_path / "theirs", tmp_path / "run")
    other, _ = imported(tmp_path / "other", tmp_path / "of other")
    assert other.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("block", "change", "message"),
    [
        (None, {"vision_feature_layer": -2}, "vision_feature_layer=-2"),
        (None, {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy='full'"),
        (None, {"downsample_ratio": 0.3}, "downsample_ratio=0.3 is not supported, only 1, 0.5"),
        ("vision_config", {"hidden_dropout_prob": 0.1}, "hidden_dropout_prob=0.1"),
        ("text_config", {"model_type": "gemma"}, "model_type='gemma'"),
        ("text_config", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not known"),
    ],
)
def test_unsupported_values_are_rejected(block: str | None, change: dict[str, Any], message: str) -> None:
    values = json.loads(reference_model().config.to_json_string(use_diff=False))
    (values if block is None else values[block]).update(change)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        layout_of("internvl").model_config(values, "config.json")


def test_a_hundred_pictures_are_cut_and_placed_as_theirs(tmp_path: Path, parity: Recorder) -> None:
    """Compare the number, order and pixels of tiles, and the tokens, with several pictures and text between them."""
    reference_model().save_pretrained(tmp_path / "theirs")
    ours, _ = imported(tmp_path / "theirs", tmp_path / "run")
    pages = seen(tmp_path, ours, odd_pages(100, 4, 150))  # Asserts equal token ids.
    for document, inputs in zip(pages.documents, pages.inputs, strict=True):
        values = torch.cat([torch.from_numpy(item.values) for item in document.items])
        expected = inputs["pixel_values"].unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5)
        parity(
            "internvl",
            "pixels",
            distance(normalised(ours.config.vision, values), expected.reshape(len(values), -1)),
            BOUND,
        )


def test_grids_of_ten_thousand_sizes_are_theirs() -> None:
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    rng = np.random.default_rng(0)
    sizes = [
        *np.exp(rng.uniform(1, 9, (10_000, 2))).astype(int).tolist(),
        *((448 * r, 448 * c) for r in range(1, 13) for c in range(1, 13)),
    ]
    for height, width in sizes:
        columns, rows = get_optimal_tiled_canvas((height, width), (448, 448), 1, 12)
        assert internvl_grid((height, width), 448) == (rows, columns), (height, width)


@pytest.mark.slow
def test_trained_on_two_ranks_and_generated_from(tmp_path: Path) -> None:
    reference_model(vocabulary=VOCABULARY).save_pretrained(tmp_path / "theirs")
    transforms = {"kind": "tiles", "tiling": {"kind": "internvl", "max_tiles": 2}}
    again = loaded(train_and_export(tmp_path / "theirs", tmp_path, captions(transforms)), AUTO)
    inputs = {
        "input_ids": torch.tensor([[1, *[4] * 8, 9]]),
        "pixel_values": torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)),
    }
    ids = again.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ids.shape == (1, 15)
    assert ids[0, 10] == again(**inputs).logits[0, -1].argmax()
