"""Imported vision towers give the results of transformers, and an export restores the folder bit for bit.

Distances are the largest difference over the largest value. Measured worst cases: features 5.5e-7, gradients 1.3e-6.
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
from mmscale.checkpoint.imports import import_folder
from mmscale.checkpoint.manifest import newest_of, read_manifest
from mmscale.checkpoint.warm_start import match
from mmscale.errors import CheckpointError
from mmscale.hf.layouts import layout_of
from mmscale.models.build import build_weights
from mmscale.models.config import ModelConfig
from tests.hf.reference_models import imported, tensors_of, their_gradients
from tests.hf.towers import (
    TOWERS,
    features,
    images,
    normalised,
    ours_of,
    published_places,
    reference_model,
    saved_reference,
)
from tests.models.reference_models import distance, randomise, rounding_ratio
from tests.parity_table import Recorder

pytestmark = pytest.mark.parity
BOUND, GRADIENT_BOUND = 2e-6, 8e-6


def size_of(theirs: Any) -> tuple[int, int]:
    """Return the side of an image that patches cover, and the side of a patch."""
    patch = theirs.config.patch_size
    patch = patch if isinstance(patch, int) else patch[0]
    side = theirs.config.image_size
    side = side if isinstance(side, int) else side[0]
    return side // patch * patch, patch


@pytest.mark.parametrize("name", TOWERS)
def test_the_same_features_and_gradients(name: str, tmp_path: Path, parity: Recorder) -> None:
    theirs = saved_reference(name, tmp_path / "theirs")
    family = theirs.config.model_type
    ours, _ = imported(tmp_path / "theirs", tmp_path / "run")
    side, patch = size_of(theirs)
    pixels = images(side)
    values = normalised(pixels, name.partition(",")[0])
    found, expected = ours.vision(ours_of(pixels, patch)), features(theirs, values)
    parity(family, "features", distance(found, expected), BOUND)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)) / 8
    found.backward(upstream)
    expected.backward(upstream)
    gradients = their_gradients(theirs, tmp_path)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for key, parameter in ours.named_parameters():
        scale = max(
            float(gradients[key].abs().max()), 1e-2 * largest
        )  # A key's bias has a gradient of rounding errors only.
        error = float((parameter.grad - gradients.pop(key)).abs().max()) / scale
        parity(family, "gradients", error, GRADIENT_BOUND)
    assert not gradients


@pytest.mark.parametrize("name", TOWERS)
def test_in_bfloat16_no_farther_from_the_truth(name: str, tmp_path: Path, parity: Recorder) -> None:
    """Measured: 0.998 to 1.0."""

    @torch.no_grad()
    def one(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        theirs, folder = reference_model(name, seed).bfloat16(), tmp_path / str(seed)
        theirs.save_pretrained(folder / "theirs")
        ours, _ = imported(folder / "theirs", folder / "run")
        side, patch = size_of(theirs)
        pixels = images(side)
        values = normalised(pixels, name.partition(",")[0])
        rounded = ours.bfloat16().vision(ours_of(pixels, patch)), features(theirs, values.bfloat16())
        return *rounded, features(theirs.float(), values)

    ratio = rounding_ratio(one(seed) for seed in range(4))
    parity(reference_model(name).config.model_type, "error of bfloat16, over theirs", ratio, 1.02)


def whole(tensors: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """Return the tensors by the names of the layout, without unused ones."""
    layout = layout_of(family)
    spelled = {layout.current_name(name): values for name, values in tensors.items()}
    return {name: values for name, values in spelled.items() if not layout.is_unused(name)}


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("like", [True, False])
def test_export_restores_the_folder(name: str, like: bool, tmp_path: Path) -> None:
    from transformers import AutoModel

    theirs = saved_reference(name, tmp_path / "theirs")
    family = theirs.config.model_type
    _, checkpoint = imported(tmp_path / "theirs", tmp_path / "run")
    report = export_weights(checkpoint, tmp_path / "back", to=HuggingFace(tmp_path / "theirs" if like else None))
    assert report.family == family
    before, after = whole(tensors_of(tmp_path / "theirs"), family), whole(tensors_of(tmp_path / "back"), family)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again, info = AutoModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert type(again) is type(theirs)
    assert not any(info[kind] for kind in info if kind != "error_msgs"), info
    values = normalised(images(size_of(theirs)[0]), name.partition(",")[0])
    assert torch.equal(features(again, values), features(theirs, values))


def test_a_folder_of_both_towers_gives_the_vision_tower(tmp_path: Path) -> None:
    """SigLIP only: a CLIP folder with both towers becomes a whole model (``test_clip.py``)."""
    from transformers import SiglipConfig, SiglipModel

    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    ends = {"vocab_size": 9, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**text, "image_size": 28, "patch_size": 14}
    theirs = SiglipModel(SiglipConfig(text_config={**text, **ends}, vision_config=vision))
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "both")
    theirs.vision_model.save_pretrained(tmp_path / "alone")
    (ours, checkpoint), (alone, _) = (imported(tmp_path / of, tmp_path / f"run-{of}") for of in ("both", "alone"))
    assert ours.config == alone.config
    pairs = zip(ours.parameters(), alone.parameters(), strict=True)
    assert all(torch.equal(mine, other) for mine, other in pairs)
    with pytest.raises(CheckpointError, match="export the vision tower as siglip_vision_model"):
        export_weights(checkpoint, tmp_path / "back", to=HuggingFace(tmp_path / "both"))


def as_published(theirs: Any, folder: Path) -> dict[str, Tensor]:
    """Write a folder in the format of InternViT's authors."""
    tensors = {name: torch.cat(parts).detach() for name, parts in published_places(theirs).items()}
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps")
    values = {key: getattr(theirs.config, key) for key in keys} | {
        "model_type": "intern_vit_6b",
        "architectures": ["InternVisionModel"],
        "auto_map": {"AutoModel": "a.B"},
        "image_size": 28,
        "patch_size": 7,
        "qkv_bias": theirs.config.attention_bias,
        "drop_path_rate": 0.1,
        "norm_type": theirs.config.norm_type,
        "qk_normalization": theirs.config.use_qk_norm,
        "dropout": 0.0,
        "initializer_factor": 0.1,
        "initializer_range": 1e-10,
        "use_flash_attn": True,
        "hidden_act": "gelu",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_internvit_as_its_authors_publish_it(tmp_path: Path) -> None:
    theirs = saved_reference("internvl", tmp_path / "theirs")
    published = as_published(theirs, tmp_path / "published")
    (one, _), (other, checkpoint) = (
        imported(tmp_path / form, tmp_path / f"run-{form}") for form in ("theirs", "published")
    )
    assert one.config == other.config
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(mine, same) for mine, same in pairs)
    assert export_weights(checkpoint, tmp_path / "readable", to=HuggingFace()).family == "internvl_vision"
    export_weights(checkpoint, tmp_path / "back", to=HuggingFace(tmp_path / "published"))
    back = tensors_of(tmp_path / "back")
    assert back.keys() == published.keys()
    assert all(torch.equal(back[name], published[name]) for name in back)


REFUSED = {
    "an activation": ("clip", {"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
    "no square": ("clip", {"image_size": [28, 14]}, r"image_size=\[28, 14\] is not supported, only squares"),
    "an unknown key": ("siglip", {"num_registers": 4}, "num_registers=4 is not known"),
    "no positions": ("internvl", {"use_absolute_position_embeddings": False}, "use_absolute_position_embeddings"),
    "another norm": ("internvl", {"norm_type": "batch_norm"}, "norm_type='batch_norm'"),
    "a norm of another kind": ("internvl", {"use_mean_pooling": False}, "adds a layer norm"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_values_are_rejected(case: str, tmp_path: Path) -> None:
    name, keys, message = REFUSED[case]
    saved_reference(name, tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    with pytest.raises(CheckpointError, match=message):
        import_folder(tmp_path / "theirs", tmp_path / "run")


def test_an_imported_tower_fits_in_part(tmp_path: Path) -> None:
    """Load it as a stage does: positions are resampled, and blocks that the model lacks are dropped."""
    saved_reference("clip", tmp_path / "clip")
    import_folder(tmp_path / "clip", tmp_path / "tower" / "checkpoints")
    tower = {
        "patch_size": 7,
        "hidden_dim": 40,
        "num_layers": 2,
        "class_token": True,
        "pre_norm": True,
        "last_output": False,
        "post_norm": False,
        "feature_layers": [0, 1],  # As in Molmo.
        "attention": {"num_heads": 5, "qkv_bias": True, "out_bias": True},
        "mlp": {"hidden_dim": 64, "gated": False, "activation": "quick_gelu", "bias": True},
        "norm": {"kind": "layernorm"},
        "positions": {"kind": "learned", "grid": [5, 5]},
    }
    decoder = {
        "vocab_size": 8,
        "hidden_dim": 16,
        "num_layers": 1,
        "attention": {"num_heads": 1},
        "mlp": {"kind": "dense", "hidden_dim": 8},
    }
    block = {"decoder": decoder, "vision": tower, "connector": {"kind": "embedding"}}
    model = build_weights(ModelConfig.model_validate(block))
    report = match(model, read_manifest(newest_of(tmp_path / "tower")), ["vision"])
    assert report.resampled == (("vision.positions.position_embedding", (4, 4), (5, 5)),)
    assert not report.mismatched
    assert {name.split(".")[1] for name in report.unused} == {"layers", "post_norm"}
    assert len(report.loaded) == len(list(model.vision.parameters())) - 1
