"""Imported Qwen2-VL gives the results of transformers, and an export restores the folder bit for bit.

Measured worst cases: 7.0e-7 in logits, 2.6e-6 in gradients. Our gradients differ from float64 by at most 2.4e-6, theirs
by 1.8e-6. In bfloat16 our logits are 0.92 times as far from float32 as theirs (twelve seeds).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmscale.checkpoint.export import HuggingFace, export_weights
from mmscale.hf.layouts import pixels
from mmscale.models.build import media_spec
from mmscale.models.connectors.projector import merge_order
from tests.hf.pages import (
    AUTO,
    BOS,
    EOS,
    PAD,
    PAGES,
    Page,
    Seen,
    builder,
    load,
    normalised,
    odd_pages,
    save_tokenizer,
    written,
)
from tests.hf.reference_models import import_reference, imported, loaded
from tests.hf.train_and_export import VOCABULARY, captions, train_and_export
from tests.models.reference_models import distance, randomise
from tests.parity_table import Recorder

pytestmark = pytest.mark.parity
BOUND, GRADIENT_BOUND = 2e-6, 6e-6
IMAGE, START, END, VIDEO = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"
SPECIAL = [IMAGE, START, END, VIDEO]  # Ids 3 to 6.
PIXELS = {"min_pixels": 56 * 56, "max_pixels": 112 * 112}
LAYOUT = {"start": START, "end": END}
TWINS: dict[str, dict[str, Any]] = {
    "untied, two heads a key": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "tied, one key head": {"num_attention_heads": 4, "num_key_value_heads": 1, "tie": True},
    "six heads a key, as in 2B": {"num_attention_heads": 12, "num_key_value_heads": 2, "hidden_size": 96},
}


def reference_model(name: str = "untied, two heads a key", seed: int = 0, vocabulary: int = 272) -> Any:
    """Return a tiny random model. The image token is 3, or 4 with the emoji tokenizer's vocabulary."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    heads = dict(TWINS[name])
    tied = heads.pop("tie", False)
    width = heads.setdefault("hidden_size", 64)
    half = width // heads["num_attention_heads"] // 2
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [half // 4, half // 2 - half // 8, half - half // 4 - half // 2 + half // 8],
            },
            **heads,
        },
        vision_config={"depth": 3, "embed_dim": 32, "hidden_size": width, "num_heads": 2},
        image_token_id=4 if vocabulary == VOCABULARY else 3,
        vision_start_token_id=4,
        vision_end_token_id=5,
        video_token_id=6,
        tie_word_embeddings=tied,
    )
    model = Qwen2VLForConditionalGeneration(config)
    randomise(model, seed)
    return model.eval()


def processor(tokenizer: Path) -> Any:
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    words = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer), bos_token=BOS, eos_token=EOS, pad_token=PAD, additional_special_tokens=SPECIAL
    )
    return Qwen2VLProcessor(Qwen2VLImageProcessor(**PIXELS), words, Qwen2VLVideoProcessor())


def seen(folder: Path, model: Any, pages: list[Page]) -> Seen:
    path = save_tokenizer(folder / "tokenizer.json", SPECIAL)
    theirs = processor(path)

    def process(page: Page) -> dict[str, Tensor]:
        text, pictures = written(page, f"{START}{IMAGE}{END}")
        inputs = theirs(text=[text], images=pictures or None, return_tensors="pt", add_special_tokens=False)
        return dict(inputs)

    transforms = {"kind": "native", "layout": LAYOUT, **PIXELS}
    return Seen.of(builder(load(path, IMAGE), media_spec(model.config), transforms), process, pages)


def test_both_frames_learn_what_they_learn_there(tmp_path: Path, parity: Recorder) -> None:
    """Each half of the weight has its own values, so a wrong sum would change the logits above."""
    theirs = reference_model()
    weight = theirs.model.visual.patch_embed.proj.weight
    assert not torch.equal(weight[:, :, 0], weight[:, :, 1])
    ours = import_reference(theirs, tmp_path)
    pages = seen(tmp_path, ours, [PAGES["picture first"]])
    upstream = torch.randn(pages.documents[0].num_tokens, 272, generator=torch.Generator().manual_seed(2))
    pages.ours(ours).backward(upstream)
    pages.theirs(theirs).backward(upstream)
    gradient = ours.vision.patch_embed.projection.weight.grad.view(weight.shape)
    assert torch.equal(gradient[:, :, 0], gradient[:, :, 1])
    parity("qwen2_vl", "gradients", distance(gradient, weight.grad), GRADIENT_BOUND)


def test_the_first_files_hold_the_same_model(tmp_path: Path) -> None:
    """Before version 4.52 there was no ``text_config``; later versions wrote the classes' own names."""
    theirs = reference_model("tied, one key head")
    theirs.save_pretrained(tmp_path / "new")
    values = json.loads((tmp_path / "new/config.json").read_text())
    text = values.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {
        **{
            key: value for key, value in text.items() if key not in ("model_type", "layer_types", "tie_word_embeddings")
        },
        **values,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "vision_token_id": 7,
    }
    for key in ("in_channels", "rope_parameters", "hidden_act", "model_type"):
        flat["vision_config"].pop(key)
    flat["vision_config"] |= {"in_chans": 3, "spatial_patch_size": 14}
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text(json.dumps(flat))
    save_file(dict(theirs.named_parameters()), tmp_path / "old/model.safetensors")
    new, checkpoint = imported(tmp_path / "new", tmp_path / "of new")
    old, _ = imported(tmp_path / "old", tmp_path / "of old")
    assert old.config == new.config
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
    # An export with --like the old folder has the new format and the old ids.
    export_weights(checkpoint, tmp_path / "back", to=HuggingFace(tmp_path / "old"))
    again = loaded(tmp_path / "back", AUTO)
    config = again.config
    assert (config.text_config.eos_token_id, config.image_token_id, config.vision_end_token_id) == (2, 3, 5)
    assert config.text_config.max_position_embeddings == 512
    pages = seen(tmp_path, new, [PAGES["several"]])
    with torch.no_grad():
        assert torch.equal(pages.theirs(again), pages.theirs(theirs))


def test_mean_and_deviation_are_those_of_the_processor(tmp_path: Path) -> None:
    reference_model().save_pretrained(tmp_path / "theirs")
    processor(save_tokenizer(tmp_path / "t/tokenizer.json", SPECIAL)).image_processor.save_pretrained(
        tmp_path / "theirs"
    )
    written_down = tmp_path / "theirs/preprocessor_config.json"
    written_down.write_text(json.dumps(json.loads(written_down.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    ours, checkpoint = imported(tmp_path / "theirs", tmp_path / "run")
    assert ours.config.vision.mean == (0.1, 0.2, 0.3)
    assert ours.config.vision.std == pixels.CLIP[1]
    export_weights(checkpoint, tmp_path / "back", to=HuggingFace())
    from transformers import AutoImageProcessor

    again = AutoImageProcessor.from_pretrained(tmp_path / "back")
    assert type(again).__name__ == "Qwen2VLImageProcessor"
    assert list(again.image_mean) == [0.1, 0.2, 0.3]
    assert (again.patch_size, again.temporal_patch_size, again.merge_size) == (14, 2, 2)


def test_a_hundred_pictures_are_cut_and_placed_as_theirs(tmp_path: Path, parity: Recorder) -> None:
    """Compare sizes, pixels, order of patches, placeholders and positions, with text between several pictures."""
    theirs = reference_model()
    ours = import_reference(theirs, tmp_path)
    pages = seen(tmp_path, ours, odd_pages(100, 14, 190))  # Asserts equal token ids.
    for document, inputs in zip(pages.documents, pages.inputs, strict=True):
        grids = inputs["image_grid_thw"]
        assert [list(item.grid) for item in document.items] == grids.tolist()
        values = torch.cat([torch.from_numpy(item.values) for item in document.items])
        order = torch.from_numpy(merge_order([item.grid for item in document.items], 2))
        expected = inputs["pixel_values"].view(len(values), 3, 2, -1)
        assert torch.equal(expected[:, :, 0], expected[:, :, 1])
        mine = normalised(ours.config.vision, values)[order]
        parity("qwen2_vl", "pixels", distance(mine, expected[:, :, 0].flatten(1)), BOUND)
        positions, _ = theirs.model.get_rope_index(
            inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], image_grid_thw=grids
        )
        assert document.position_ids.T.tolist() == positions[:, 0].tolist()


def test_trained_on_two_ranks_and_generated_from(tmp_path: Path) -> None:
    theirs = reference_model(vocabulary=VOCABULARY)
    theirs.save_pretrained(tmp_path / "theirs")
    transforms = {"kind": "native", "min_pixels": 28 * 28, "max_pixels": 56 * 56}
    again = loaded(train_and_export(tmp_path / "theirs", tmp_path, captions(transforms)), AUTO)
    inputs = {
        "input_ids": torch.tensor([[1, *[4] * 4, 9]]),
        "mm_token_type_ids": torch.tensor([[0, *[1] * 4, 0]]),
        "pixel_values": torch.randn(16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(1)),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    ids = again.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ids.shape == (1, 11)
    logits = again(**inputs).logits
    assert ids[0, 6] == logits[0, -1].argmax()
