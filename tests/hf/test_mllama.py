"""Imported Llama 3.2 Vision: packed documents compared with transformers, one document at a time.

All gates are open. Images come first, in the middle, last, in sequence or not at all, with 1 to 4 tiles of several
grids. RoPE is scaled, and documents are longer than the original context.

Measured worst cases in float32, relative to a tensor's largest value: 1.0e-6 in logits and losses, 2.3e-6 in gradients.
The gradient of a gate is one number in which sums over all rows nearly cancel. Ours and theirs differ by up to 5.0e-6,
but each is up to 6.0e-6 away from the gradient in float64, so gates are compared with float64. In bfloat16 our error is
0.77 of that of transformers.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.batch import MultimodalBatch
from mmscale.checkpoint.export import HuggingFace, export_weights
from mmscale.config import load
from mmscale.hf.forward_config import forward_config
from mmscale.hf.layouts import layout_of
from mmscale.models.build import build_model, media_spec
from mmscale.models.config import ModelConfig
from mmscale.models.generation import generate
from mmscale.models.multimodal import MultimodalModel
from tests.hf.mllama_reference import (
    DOCUMENTS,
    IMAGE,
    MAX_TILES,
    Picture,
    document,
    our_batch,
    reference_model,
    their_inputs,
)
from tests.hf.reference_models import import_reference, imported, loaded, tensors_of, their_gradients
from tests.hf.train_and_export import VOCABULARY, captions, train_and_export
from tests.models.reference_models import distance, rounding_ratio
from tests.parity_table import Recorder

pytestmark = pytest.mark.parity
FAMILY, AUTO_CLASS = "mllama", "AutoModelForImageTextToText"
BOUND, GRADIENT_BOUND, GATE_BOUND = 2e-6, 4e-6, 1e-5


def changed(model: MultimodalModel, **blocks: dict[str, Any]) -> MultimodalModel:
    """Return a model with the same weights and a changed configuration, ``{"connector": {...}}``, one level deep."""
    values = model.config.model_dump(mode="json")
    for name, changes in blocks.items():
        values[name] |= changes
    other = build_model(ModelConfig.model_validate(values), attention="sdpa", seed=None)
    other.load_state_dict(model.state_dict())
    return other.to(next(model.parameters()).dtype)


def as_transformers(model: MultimodalModel) -> MultimodalModel:
    return changed(model, connector={"unseen_text": "looks_ahead"})


def logits_of(model: MultimodalModel, names: list[str]) -> dict[str, Tensor]:
    """Return our logits of documents in one pack."""
    order = list(DOCUMENTS)
    documents = [document(DOCUMENTS[name], order.index(name)) for name in names]
    logits = model.head(model(our_batch(documents, media_spec(model.config))).hidden)
    return dict(zip(names, logits.split([each.num_tokens for each in documents]), strict=True))


def their_logits(theirs: Any) -> dict[str, Tensor]:
    """Return their logits, one document per call."""
    return {name: theirs(**their_inputs(parts, seed)).logits[0] for seed, (name, parts) in enumerate(DOCUMENTS.items())}


def joined(logits: dict[str, Tensor]) -> Tensor:
    return torch.cat(list(logits.values()))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_same_logits_loss_and_gradients(kv_heads: int, tmp_path: Path, parity: Recorder) -> None:
    theirs = reference_model(kv_heads=kv_heads)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = as_transformers(imported(tmp_path / "theirs", tmp_path / "run")[0])
    batch = our_batch([document(parts, n) for n, parts in enumerate(DOCUMENTS.values())], media_spec(ours.config))
    hidden = ours(batch).hidden
    expected, reference = their_loss(theirs, batch)
    parity(FAMILY, "logits", distance(ours.head(hidden), expected), BOUND)
    loss = ours.head(hidden, labels=batch.labels, loss_weights=batch.loss_weights)
    parity(FAMILY, "loss", distance(loss, reference), BOUND)
    loss.backward()
    reference.backward()
    gradients = their_gradients(theirs, tmp_path)
    truth = true_gradients(theirs, batch, tmp_path / "float64")
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        expected = gradients.pop(name)
        errors = [distance(parameter.grad, expected), distance(parameter.grad, truth[name])]
        print(f"{errors[0]:.1e}; from float64 {errors[1]:.1e}, theirs {distance(expected, truth[name]):.1e} {name}")
        if parameter.numel() > 1:
            parity(FAMILY, "gradients", errors[0], GRADIENT_BOUND)
        else:
            parity(FAMILY, "gradients of gates, from float64", errors[1], GATE_BOUND)
    assert not gradients


def their_loss(theirs: Any, batch: MultimodalBatch) -> tuple[Tensor, Tensor]:
    logits = joined(their_logits(theirs))
    return logits, (F.cross_entropy(logits, batch.labels, reduction="none") * batch.loss_weights).sum()


def true_gradients(theirs: Any, batch: MultimodalBatch, folder: Path) -> dict[str, Tensor]:
    """Return the gradients of transformers in float64, rounded to float32, by our names."""
    exact, carrier = copy.deepcopy(theirs).double(), copy.deepcopy(theirs)
    exact.zero_grad()
    their_loss(exact, batch)[1].backward()
    for mine, parameter in zip(carrier.parameters(), exact.parameters(), strict=True):
        mine.grad = None if parameter.grad is None else parameter.grad.float()
    return their_gradients(carrier, folder)


def test_packed_as_one_by_one(tmp_path: Path, parity: Recorder) -> None:
    """A pack needs an image: a document without one is packed with a dummy document."""
    reference_model().save_pretrained(tmp_path / "theirs")
    ours = as_transformers(imported(tmp_path / "theirs", tmp_path / "run")[0])
    together = logits_of(ours, list(DOCUMENTS))
    for name in DOCUMENTS:
        alone = logits_of(ours, [name] if name != "no image" else ["image last", name])
        parity(FAMILY, "a packed document against it alone", distance(together[name], alone[name]), BOUND)


@contextmanager
def meta_rule(theirs: Any) -> Iterator[None]:
    """Mask the attention of text before the first image, which transformers does not mask."""
    seen: dict[str, Tensor] = {}

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen["mask"] = kwargs["full_text_row_masked_out_mask"]

    def after(module: Any, args: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return output[0] * seen["mask"][:, 0], output[1]

    hooks = []
    for layer in theirs.model.language_model.layers:
        if hasattr(layer, "cross_attn"):
            hooks += [layer.register_forward_pre_hook(before, with_kwargs=True)]
            hooks += [layer.cross_attn.register_forward_hook(after)]
    yield
    for hook in hooks:
        hook.remove()


def test_text_before_the_first_image_is_silent_or_looks_ahead(tmp_path: Path, parity: Recorder) -> None:
    theirs = reference_model()
    ours = import_reference(theirs, tmp_path)
    quirk = their_logits(theirs)
    with meta_rule(theirs):
        expected = their_logits(theirs)
    found = logits_of(changed(ours, connector={"unseen_text": "silent"}), list(DOCUMENTS))
    parity(FAMILY, "logits, unseen text silent", distance(joined(found), joined(expected)), BOUND)
    for name, parts in DOCUMENTS.items():
        first = parts[0]
        if isinstance(first, Picture) or name == "no image":
            torch.testing.assert_close(expected[name], quirk[name])
            continue
        # Text before the image has the same logits as without an image.
        text = theirs(input_ids=their_inputs(parts, list(DOCUMENTS).index(name))["input_ids"][:, :first]).logits[0]
        parity(FAMILY, "logits, unseen text silent", distance(found[name][:first], text), BOUND)
        assert distance(text, quirk[name][:first]) > 1e-3


def test_without_absent_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parity: Recorder) -> None:
    """Compare with transformers under a mask that hides absent tiles and padding rows from all queries."""
    from transformers.models.mllama import modeling_mllama

    def mask(aspect_ratio_mask: Tensor, num_patches: int, target_length: int, dtype: torch.dtype) -> Tensor:
        shown = aspect_ratio_mask[:, :, None] * (torch.arange(target_length) < num_patches)
        return ((1 - shown.to(dtype)) * torch.finfo(dtype).min).flatten(1)[:, None, None]

    theirs = reference_model()
    ours = import_reference(theirs, tmp_path)
    published = their_logits(theirs)
    monkeypatch.setattr(modeling_mllama, "_prepare_aspect_ratio_attention_mask", mask)
    with meta_rule(theirs):
        expected = their_logits(theirs)
    tiles = {**ours.config.model_dump(mode="json")["vision"]["tiles"], "attend_absent": False}
    found = logits_of(changed(ours, vision={"tiles": tiles}, connector={"unseen_text": "silent"}), list(DOCUMENTS))
    parity(FAMILY, "logits, no absent tiles", distance(joined(found), joined(expected)), BOUND)
    assert distance(expected["image last"], published["image last"]) > 1e-3


def test_bfloat16_is_no_further_from_the_truth(tmp_path: Path, parity: Recorder) -> None:
    theirs = reference_model().bfloat16()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = as_transformers(imported(tmp_path / "theirs", tmp_path / "run")[0])
    truth = joined(their_logits(theirs.float()))
    theirs.bfloat16()
    mine = joined(logits_of(ours.bfloat16(), list(DOCUMENTS)))
    ratio = rounding_ratio([(mine.detach(), joined(their_logits(theirs)).detach(), truth.detach())])
    parity(FAMILY, "bfloat16, error over theirs", ratio, 1.0)


def test_export_restores_the_folder(tmp_path: Path) -> None:
    theirs = reference_model()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
    for name in ("chat_template.jinja", "tokenizer.json"):
        (tmp_path / "theirs" / name).write_text("{}")
    (tmp_path / "theirs" / "preprocessor_config.json").write_text('{"image_mean": 0.5, "image_std": 0.5}')
    _, checkpoint = imported(tmp_path / "theirs", tmp_path / "run")
    export_weights(checkpoint, tmp_path / "back", to=HuggingFace(tmp_path / "theirs"))
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = loaded(tmp_path / "back", AUTO_CLASS)
    reloaded = loaded(tmp_path / "theirs", AUTO_CLASS)
    assert again.config.to_dict() == {**reloaded.config.to_dict(), "_name_or_path": str(tmp_path / "back")}
    assert torch.equal(joined(their_logits(again)), joined(their_logits(theirs)))
    assert all((tmp_path / "back" / name).exists() for name in ("chat_template.jinja", "tokenizer.json"))

    # Without --like the family is found, and the processor's file is one that transformers reads.
    from transformers import AutoImageProcessor

    report = export_weights(checkpoint, tmp_path / "plain", to=HuggingFace())
    assert report.family == FAMILY
    assert torch.equal(joined(their_logits(loaded(tmp_path / "plain", AUTO_CLASS))), joined(their_logits(theirs)))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "plain")
    assert (processor.size["height"], processor.max_image_tiles, processor.resample) == (12, MAX_TILES, 2)


def test_names_of_modules_are_read_as_well_as_those_of_files(tmp_path: Path) -> None:
    theirs = reference_model()
    theirs.save_pretrained(tmp_path / "theirs")
    values = {name: parameter.detach().contiguous() for name, parameter in theirs.named_parameters()}
    assert not values.keys() & tensors_of(tmp_path / "theirs").keys()
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "config.json").write_text((tmp_path / "theirs" / "config.json").read_text())
    save_file(values, tmp_path / "modules" / "model.safetensors")
    first, _ = imported(tmp_path / "theirs", tmp_path / "run")
    second, _ = imported(tmp_path / "modules", tmp_path / "other run")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "models"
STRETCHED = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
PUBLISHED: dict[
    str, Any
] = {  # In the format of version 4 of transformers, whose nested objects contain sampling options too.
    "architectures": ["MllamaForConditionalGeneration"],
    "image_token_index": 128256,
    "model_type": "mllama",
    "text_config": {
        "_name_or_path": "",
        "add_cross_attention": False,
        "bos_token_id": 128000,
        "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
        "dropout": 0,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "length_penalty": 1.0,
        "max_length": 20,
        "max_position_embeddings": 131072,
        "model_type": "mllama_text_model",
        "num_attention_heads": 32,
        "num_beams": 1,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {**STRETCHED, "rope_type": "llama3"},
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {
        "attention_heads": 16,
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "image_size": 560,
        "intermediate_layers_indices": [3, 7, 15, 23, 30],
        "intermediate_size": 5120,
        "max_num_tiles": 4,
        "model_type": "mllama_vision_model",
        "norm_eps": 1e-05,
        "num_channels": 3,
        "num_global_layers": 8,
        "num_hidden_layers": 32,
        "patch_size": 14,
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        "top_p": 1.0,
        "vision_output_dim": 7680,
    },
}


def shipped(name: str) -> ModelConfig:
    return load(CONFIGS / f"{name}.yaml", [], ModelConfig).value


def test_the_published_configuration_is_the_shipped_one() -> None:
    imported_config = layout_of(FAMILY).model_config(PUBLISHED, "config.json")
    assert forward_config(imported_config) == forward_config(shipped("llama3.2-11b-vision"))


@pytest.mark.parametrize("name", ["llama3.2-11b-vision", "llama3.2-90b-vision-448"])
def test_names_and_shapes_at_full_size(name: str) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    layout, config = layout_of(FAMILY), shipped(name)
    values = {key: value for key, value in layout.config_values(config).items() if key != "preprocessor_config"}
    with torch.device("meta"):
        theirs = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**values))
        ours = build_model(config, attention="sdpa")
    expected = {layout.current_name(key): tuple(each.shape) for key, each in theirs.named_parameters()}
    stored = layout.hf_tensors(config, {key: each.shape for key, each in ours.named_parameters()})
    assert {key: tensor.shape for key, tensor in stored.items()} == expected


REFUSED = {
    "blocks elsewhere": ({"text_config": {"cross_attention_layers": [3, 9]}}, r"cross_attention_layers=\[3, 9\]"),
    "no blocks": (
        {"text_config": {"cross_attention_layers": []}},
        "a cross-attention block before every n-th",
    ),
    "other grids": ({"vision_config": {"supported_aspect_ratios": [[1, 1]]}}, "supported_aspect_ratios"),
    "another width": ({"vision_config": {"vision_output_dim": 1280}}, "vision_output_dim=1280"),
    "another norm": ({"vision_config": {"norm_eps": 1e-6}}, "norm_eps=1e-06"),
    "dropout": ({"text_config": {"dropout": 0.1}}, "dropout=0.1"),
    "a key that nobody knows": ({"vision_config": {"thumbnail": True}}, "thumbnail=True is not known"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_values_are_rejected(case: str) -> None:
    from mmscale.errors import CheckpointError

    changes, message = REFUSED[case]
    values = {**PUBLISHED, **{name: {**PUBLISHED[name], **block} for name, block in changes.items()}}
    with pytest.raises(CheckpointError, match=message):
        layout_of(FAMILY).model_config(values, "config.json")


def test_a_model_of_other_tiles_is_not_exported() -> None:
    from mmscale.errors import CheckpointError

    config = shipped("llama3.2-11b-vision").model_dump(mode="json")
    config["vision"]["tiles"]["attend_absent"] = False
    with pytest.raises(CheckpointError, match=re.escape("model.vision.tiles.attend_absent=False")):
        layout_of(FAMILY).config_values(ModelConfig.model_validate(config))


@pytest.mark.dist
def test_training_on_and_generating_in_transformers(tmp_path: Path) -> None:
    image_id = 4  # Id in the emoji tokenizer.
    theirs = reference_model(vocab=VOCABULARY, image=image_id)
    theirs.save_pretrained(tmp_path / "theirs")
    exported = train_and_export(
        tmp_path / "theirs",
        tmp_path,
        captions({"kind": "tiles", "tiling": {"kind": "llama"}, "interpolation": "bilinear"}),
        model={"connector": {"unseen_text": "looks_ahead"}},
    )
    parts = (2, Picture((2, 2), 1), 1)
    inputs = {name: values.clone() for name, values in their_inputs(parts).items()}
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = image_id
    end = VOCABULARY - 1  # An unlikely token, so that neither generation ends early.
    texts = loaded(exported, AUTO_CLASS).generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=end)
    ours = as_transformers(imported(exported, tmp_path / "again")[0])
    batch = our_batch([document(parts)], media_spec(ours.config))
    batch.token_ids[batch.token_ids == IMAGE] = image_id
    (tokens,) = generate(ours, batch, 6, eos_id=end)
    assert texts[0, inputs["input_ids"].shape[1] :].tolist() == tokens
    assert json.loads((exported / "config.json").read_text())["text_config"]["bos_token_id"] == 1
