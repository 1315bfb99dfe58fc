"""NVLM-D in the format of its published folder, with 7 zero heads per block of the tower; NVLM-H from its parts.

The folder is built from parts of transformers (``tests.models.nvlm``) with a table of names that is independent of the
one under test.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from data_pipeline.packing.collate import collate
from data_pipeline.packing.packer import Pack
from data_pipeline.text.tokenizer import SentencePieceTokenizerConfig, load_tokenizer
from mmscale.checkpoint import load_weights
from mmscale.checkpoint.export import HuggingFace, export_weights
from mmscale.checkpoint.imports import import_folder
from mmscale.checkpoint.manifest import newest_of
from mmscale.cli.main import main
from mmscale.errors import CheckpointError
from mmscale.hf.forward_config import forward_config
from mmscale.hf.layouts import layout_for, layout_of
from mmscale.models.build import build_model, build_weights
from tests.hf.reference_models import imported, tensors_of
from tests.hf.test_published import shipped
from tests.hf.towers import published_places
from tests.hf.train_and_export import captions, train_and_export
from tests.models.nvlm import HEADS, SAMPLES, SIDE, TEXT, VISION, Nvlm, page_of
from tests.models.reference_models import distance
from tests.models.test_nvlm import TOKENIZER, both_models, by_our_names, documents, settings, tiles_of
from tests.parity_table import Recorder
from tests.system.conftest import Run

pytestmark = pytest.mark.parity
WIDTH, HEAD = VISION["hidden_size"], VISION["hidden_size"] // HEADS
ALL_HEADS = WIDTH + 7 * HEAD
TILES = {
    "kind": "tiles",
    "size": SIDE,
    "tiling": {"kind": "internvl", "max_tiles": 3},
    "layout": {
        "start": "<Image>",
        "end": "</Image>",
        "tile": "<tile_{n}>",
        "overview": "<tile_global_thumbnail>",
        "spell": True,
    },
}


def with_dummy_heads(name: str, values: Tensor) -> Tensor:
    """Append the published zeros after the heads of queries, keys and values."""
    if name.endswith("attn.qkv.weight"):
        parts = [torch.cat([part, torch.zeros(7 * HEAD, WIDTH)]) for part in values.chunk(3)]
        return torch.cat(parts)
    if name.endswith("attn.proj.weight"):
        return torch.cat([values, torch.zeros(WIDTH, 7 * HEAD)], dim=1)
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return torch.cat([values, torch.zeros(7 * HEAD)])
    return values


def without_dummy_heads(name: str, values: Tensor) -> Tensor:
    """Remove the dummy heads."""
    if name.endswith("attn.qkv.weight"):
        return torch.cat([part[:WIDTH] for part in values.chunk(3)])
    if name.endswith("attn.proj.weight"):
        return values[:, :WIDTH]
    return values[:WIDTH] if name.endswith(("q_norm.weight", "k_norm.weight")) else values


def configuration() -> dict[str, Any]:
    """Return the keys of the published file with the sizes of the reference model."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text = {key: value for key, value in TEXT.items() if key != "rope_parameters"}
    return {
        "architectures": ["NVLM_D"],
        "auto_map": {"AutoModel": "modeling_nvlm_d.NVLM_D_Model"},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": SIDE,
        "llm_config": {
            **text,
            "architectures": ["Qwen2ForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "mlp_bias": False,
            "model_type": "llama",
            "rope_scaling": {"factor": 3.0, "type": "dynamic"},
            "rope_theta": 1000000.0,
            "top_k": 1,
            "typical_p": 1.0,
            "use_bfloat16": True,
        },
        "max_dynamic_patch": 6,
        "min_dynamic_patch": 1,
        "model_type": "NVLM_D",
        "ps_version": "v2",
        "select_layer": -1,
        "template": "chatml",
        "torch_dtype": "bfloat16",
        "transformers_version": None,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": {
            **{key: VISION[key] for key in sizes},
            "architectures": ["InternVisionModel"],
            "drop_path_rate": 0.0,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "image_size": SIDE,
            "initializer_factor": 0.1,
            "initializer_range": 1e-10,
            "layer_norm_eps": 1e-06,
            "model_type": "intern_vit_6b",
            "norm_type": "rms_norm",
            "num_channels": 3,
            "patch_size": 7,
            "qk_normalization": True,
            "qkv_bias": False,
            "use_bfloat16": True,
            "use_flash_attn": True,
        },
    }


def places(theirs: Nvlm) -> dict[str, list[nn.Parameter]]:
    """Return parameters of the composition by their published names."""
    tower = published_places(theirs.vision_model)
    others = {"mlp1": theirs.mlp1, "language_model": theirs.language_model}
    return {
        **{f"vision_model.{name}": parts for name, parts in tower.items()},
        **{f"{part}.{name}": [values] for part, module in others.items() for name, values in module.named_parameters()},
    }


def published(theirs: Nvlm, folder: Path, **keys: Any) -> dict[str, Tensor]:
    """Write the composition as a folder."""
    tensors = {name: with_dummy_heads(name, torch.cat(parts).detach()) for name, parts in places(theirs).items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**configuration(), **keys}))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def load_back(theirs: Nvlm, folder: Path) -> None:
    """Load the tensors of a folder into the composition; assert that none is missing or unexpected."""
    tensors = tensors_of(folder)
    for name, parts in places(theirs).items():
        values = without_dummy_heads(name, tensors.pop(name))
        for part, piece in zip(parts, values.chunk(len(parts)), strict=True):
            part.data.copy_(piece)
    assert not tensors


def test_in_and_out_bit_for_bit(tmp_path: Path) -> None:
    ours, theirs = both_models("d")
    tensors = published(theirs, tmp_path / "published")
    again, checkpoint = imported(tmp_path / "published", tmp_path / "run")
    assert forward_config(again.config) == forward_config(ours.config)
    mine = dict(ours.named_parameters())
    assert all(torch.equal(values, mine[name]) for name, values in again.named_parameters())
    for number, like in enumerate((HuggingFace(), HuggingFace(tmp_path / "published"))):
        assert export_weights(checkpoint, tmp_path / f"back-{number}", to=like).family == "NVLM_D"
        back = tensors_of(tmp_path / f"back-{number}")
        assert back.keys() == tensors.keys()
        assert all(torch.equal(back[name], tensors[name]) for name in back)


def test_the_published_configuration_is_the_shipped_one() -> None:
    sizes = {
        "vision_config": {
            "hidden_size": 3200,
            "image_size": 448,
            "intermediate_size": 12800,
            "num_attention_heads": 25,
            "num_hidden_layers": 45,
            "patch_size": 14,
        },
        "llm_config": {
            "hidden_size": 8192,
            "intermediate_size": 29568,
            "num_attention_heads": 64,
            "num_hidden_layers": 80,
            "num_key_value_heads": 8,
            "vocab_size": 152064,
        },
    }
    values = configuration()
    values |= {name: {**values[name], **block} for name, block in sizes.items()} | {"force_image_size": 448}
    config = layout_of("NVLM_D").model_config(values, "config.json")
    assert forward_config(config) == forward_config(shipped("nvlm-d-72b"))
    shapes = {name: tuple(p.shape) for name, p in build_weights(config).named_parameters()}
    stored = layout_of("NVLM_D").hf_tensors(config, shapes)
    # Number of values in the published files, as listed on the hub.
    assert sum(math.prod(tensor.shape) for tensor in stored.values()) == 79_379_593_344


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an older pixel shuffle": ({"ps_version": "v1"}, "ps_version must be 'v2'"),
    "an earlier layer": ({"select_layer": -2}, "select_layer=-2"),
    "other tiles": ({"force_image_size": 224}, "force_image_size=224"),
    "another decoder": ({"llm_config": {"architectures": ["LlamaForCausalLM"]}}, "LlamaForCausalLM"),
    "an unknown key": ({"moe_config": {"num_experts": 4}}, "moe_config"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_values_are_rejected(case: str, tmp_path: Path) -> None:
    keys, message = REFUSED[case]
    published(both_models("d")[1], tmp_path / "published", **keys)
    with pytest.raises(CheckpointError, match=message):
        import_folder(tmp_path / "published", tmp_path / "run")


def test_dummy_heads_with_values_are_refused(tmp_path: Path) -> None:
    tensors = published(both_models("d")[1], tmp_path / "published")
    tensors["vision_model.encoder.layers.1.attn.proj.weight"][3, -1] = 1e-3
    save_file(tensors, tmp_path / "published" / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.attn\.proj\.weight has nonzero values where this family has zeros"
    ):
        import_folder(tmp_path / "published", tmp_path / "run")


@pytest.mark.parametrize("kind", ["x", "h"])
def test_models_with_cross_attention_have_no_folder(kind: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="NVIDIA published no folder of NVLM-X and NVLM-H"):
        layout_for(settings(kind))


def test_a_run_begins_from_internvit_and_qwen2(tmp_path: Path) -> None:
    """Run the commands of docs/import_export.md for NVLM-H, whose tags are among the cross-attention keys."""
    _, theirs = both_models("h")
    for part, name in ((theirs.vision_model, "internvit"), (theirs.language_model, "qwen2")):
        part.save_pretrained(tmp_path / name)  # type: ignore[operator]
        assert main(["checkpoint", "import", str(tmp_path / name), str(tmp_path / f"run-{name}"), "--from", "hf"]) == 0
    transforms = {**TILES, "layout": {**TILES["layout"], "attended_tags": "keys"}}
    sources = [
        {"checkpoint": str(tmp_path / f"run-{name}"), "components": [component]}
        for name, component in (("internvit", "vision"), ("qwen2", "decoder"))
    ]
    overrides = {
        "run_dir": tmp_path / "run",
        "model": settings("h").model_dump_json(),
        "data.datasets.0.transforms": json.dumps(transforms),
        "stages.0.weights": json.dumps(sources),
        "stages.0.train": "[connector]",
        "evaluation": "{sets: [], captions: null}",
        "engine.precision": "fp32",
        "max_steps": 1,
        "data.lanes": 2,
        "data.workers": 0,
    }
    words = ["train", "configs/quickstart.yaml", *(f"{key}={value}" for key, value in overrides.items())]
    took = [line for line in Run(tmp_path / "run", words, forked=True).finish().splitlines() if "loaded: " in line]
    assert ["vision.*" in took[0], "decoder.*" in took[1]] == [True, True]
    checkpoint = newest_of(tmp_path / "run")
    ours = build_model(settings("h"), attention="sdpa", seed=None)
    load_weights(ours, checkpoint)
    expected = by_our_names(theirs, ours, lambda parameter: parameter.detach())
    for name, values in ours.named_parameters():
        assert torch.equal(values, expected[name]) or name.startswith("connector."), name


@pytest.mark.dist
def test_trained_by_two_ranks_and_given_back(tmp_path: Path, parity: Recorder) -> None:
    """The composition with the exported tensors gives the outputs of our trained model."""
    _, theirs = both_models("d")
    published(theirs, tmp_path / "published")
    exported = train_and_export(tmp_path / "published", tmp_path, captions(TILES), max_tokens=96)
    load_back(theirs, exported)
    ours, _ = imported(exported, tmp_path / "again")
    tokenizer = load_tokenizer(SentencePieceTokenizerConfig(path=TOKENIZER))
    spec, made = documents("d", tokenizer)
    logits = ours.head(ours(collate([Pack(tuple(made), 0)], spec)).hidden)
    pages = [page_of(parts, "d", tokenizer, tokenizer.image_id) for parts in SAMPLES]
    expected = [theirs(page, tiles_of(document)) for page, document in zip(pages, made, strict=True)]
    parity("NVLM_D", "logits after training", distance(logits, torch.cat(expected)), 5e-6)
