"""Vision towers out of a folder of Hugging Face compute what the reference computes, and go back bit for bit.

Distances are the largest difference over the largest value. Measured worst cases: features 5.5e-7, gradients 1.3e-6. In
bfloat16 both are compared with float32: ours were off by 1.1e-2 at most, the reference by 1.0e-2.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmscale.checkpoint.export import HuggingFace, export_weights
from mmscale.checkpoint.foreign import import_folder
from mmscale.cli.main import main
from mmscale.errors import CheckpointError
from mmscale.hf.layouts import layout_of
from tests.hf.towers import TOWERS, features, images, normalised, ours_of, saved_twin
from tests.hf.twins import imported, tensors_of, their_gradients
from tests.models.twins import distance, randomise
from tests.parity_table import Recorder

pytestmark = pytest.mark.parity
BOUND, GRADIENT_BOUND, BF16_BOUND = 2e-6, 8e-6, 3e-2


def size_of(theirs: Any) -> tuple[int, int]:
    """Side of an image without the pixels that no patch holds, and of a patch."""
    patch = theirs.config.patch_size
    patch = patch if isinstance(patch, int) else patch[0]
    side = theirs.config.image_size
    side = side if isinstance(side, int) else side[0]
    return side // patch * patch, patch


@pytest.mark.parametrize("name", TOWERS)
def test_the_same_features_and_gradients(name: str, tmp_path: Path, parity: Recorder) -> None:
    theirs = saved_twin(name, tmp_path / "theirs")
    family = theirs.config.model_type
    ours, _ = imported(tmp_path / "theirs", tmp_path / "run")
    side, patch = size_of(theirs)
    pixels = images(side)
    values = normalised(pixels, name.partition(",")[0])
    found, expected = ours.vision(ours_of(pixels, patch)), features(theirs, values)
    parity(family, "features", distance(found, expected), BOUND)
    slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)) / 8
    found.backward(slope)
    expected.backward(slope)
    gradients = their_gradients(theirs, tmp_path)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for key, parameter in ours.named_parameters():
        scale = max(float(gradients[key].abs().max()), 1e-2 * largest)  # Of a key's bias: rounding alone.
        error = float((parameter.grad - gradients.pop(key)).abs().max()) / scale
        parity(family, "gradients", error, GRADIENT_BOUND)
    assert not gradients
    with torch.no_grad():
        rounded = ours.bfloat16().vision(ours_of(pixels, patch)), features(theirs.bfloat16(), values.bfloat16())
    print([distance(each.float(), expected) for each in rounded])
    parity(family, "features in bfloat16", distance(rounded[0].float(), expected), BF16_BOUND)


def whole(tensors: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """By the names of the layout, without what it knows to be of no use."""
    layout = layout_of(family)
    spelled = {layout.spelled(name): values for name, values in tensors.items()}
    return {name: values for name, values in spelled.items() if not layout.is_unused(name)}


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("like", [True, False])
def test_back_as_it_came(name: str, like: bool, tmp_path: Path) -> None:
    from transformers import AutoModel

    theirs = saved_twin(name, tmp_path / "theirs")
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


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_a_folder_of_both_towers_gives_the_vision_tower(kind: str, tmp_path: Path) -> None:
    import transformers

    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {**text, "image_size": 28, "patch_size": 14}
    config = getattr(transformers, f"{kind}Config")(
        text_config={**text, "vocab_size": 9, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        vision_config=vision,
    )
    theirs = getattr(transformers, f"{kind}Model")(config)
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "both")
    theirs.vision_model.save_pretrained(tmp_path / "alone")
    (ours, checkpoint), (alone, _) = (imported(tmp_path / of, tmp_path / f"run-{of}") for of in ("both", "alone"))
    assert ours.config == alone.config
    pairs = zip(ours.parameters(), alone.parameters(), strict=True)
    assert all(torch.equal(mine, other) for mine, other in pairs)
    with pytest.raises(CheckpointError, match="export the tower as"):
        export_weights(checkpoint, tmp_path / "back", to=HuggingFace(tmp_path / "both"))


def as_published(theirs: Any, folder: Path) -> dict[str, Tensor]:
    """A folder in the form of InternViT's authors, its names by another table than the one under test."""
    tensors: dict[str, Tensor] = {}
    for name, values in theirs.state_dict().items():
        name = name.replace("cls_token", "class_embedding").replace("position_embeddings", "position_embedding")
        name = name.replace("patch_embeddings.projection", "patch_embedding").replace(
            "encoder.layer.", "encoder.layers."
        )
        name = name.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2").replace("lambda_", "ls")
        name = name.replace(".attention.", ".attn.").replace("projection_layer", "proj")
        if not re.search(r"[qkv]_proj", name):
            tensors[name] = values.contiguous()
    for number, layer in enumerate(theirs.encoder.layer):
        attention = layer.attention
        for kind in ("weight", "bias")[: 1 + theirs.config.attention_bias]:
            parts = [getattr(getattr(attention, f"{part}_proj"), kind) for part in "qkv"]
            tensors[f"encoder.layers.{number}.attn.qkv.{kind}"] = torch.cat(parts).detach()
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
    theirs = saved_twin("internvl", tmp_path / "theirs")
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
def test_what_is_not_ours_is_refused(case: str, tmp_path: Path) -> None:
    name, keys, said = REFUSED[case]
    saved_twin(name, tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    with pytest.raises(CheckpointError, match=said):
        import_folder(tmp_path / "theirs", tmp_path / "run")


def test_a_run_takes_an_imported_tower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the commands of docs/import_export.md: a stage takes the tower, its positions resampled to the run's views."""
    saved_twin("clip", tmp_path / "clip")
    assert main(["checkpoint", "import", str(tmp_path / "clip"), str(tmp_path / "tower"), "--from", "hf"]) == 0
    capsys.readouterr()
    tower = {
        "patch_size": 7,
        "hidden_dim": 40,
        "num_layers": 2,
        "class_token": True,
        "pre_norm": True,
        "last_output": False,
        "post_norm": False,
        "feature_layers": [0, 1],  # As Molmo builds it.
        "attention": {"num_heads": 5, "qkv_bias": True, "out_bias": True},
        "mlp": {"hidden_dim": 64, "gated": False, "activation": "quick_gelu", "bias": True},
        "norm": {"kind": "layernorm"},
        "positions": {"kind": "learned", "grid": [5, 5]},
    }
    overrides = [
        *(f"run_dir={tmp_path / 'run'}", f"model.vision={json.dumps(tower)}", "data.datasets.0.transforms.size=35"),
        f"stages.0.weights=[{{checkpoint: {tmp_path / 'tower'}, components: [vision]}}]",
        *("stages.0.train=[connector]", "model.decoder.num_layers=4", "model.decoder.hidden_dim=24"),
        *("max_steps=1", "data.lanes=2", "data.workers=0", "evaluation={sets: [], captions: null}"),
    ]
    assert main(["train", "configs/quickstart.yaml", *overrides]) == 0
    said = capsys.readouterr()
    assert "vision.positions.position_embedding: resampled from 4x4 to 5x5 places" in said.out + said.err
    assert "only in the checkpoint, not used: vision.layers.2.* (16), vision.post_norm.* (2)" in said.out + said.err
