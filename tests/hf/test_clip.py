"""A CLIP folder with both towers: the same similarities, loss and gradients, and a bit-exact export.

Distances are the largest difference over the largest value. Measured worst cases: vectors 2.5e-7, logits 4.3e-7, loss
bit-exact, gradients 3.9e-6 (bias of a norm; both implementations are 3e-6 away from the gradient in float64).
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.batch import MultimodalBatch, Segments
from data_pipeline.config import DatasetConfig
from data_pipeline.packing.config import PackingConfig
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Budget
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.sample import ImagePart, Provenance, Sample
from data_pipeline.text.tokenizer import HuggingFaceTokenizerConfig, load_tokenizer
from mmscale.checkpoint.export import HuggingFace, export_weights
from mmscale.checkpoint.imports import import_folder
from mmscale.checkpoint.manifest import newest_of, read_manifest
from mmscale.checkpoint.warm_start import match
from mmscale.dist import World
from mmscale.errors import CheckpointError
from mmscale.hf.layouts import layout_for, layout_of
from mmscale.models.build import build_weights, media_spec
from mmscale.models.config import ModelConfig
from mmscale.objectives.contrastive import Contrastive
from tests.configs.files import CONFIGS, model_of
from tests.hf.reference_models import import_reference, imported, loaded, tensors_of, their_gradients
from tests.hf.towers import SIZES, images, normalised, ours_of
from tests.models.reference_models import distance, randomise, rounding_ratio
from tests.parity_table import Recorder

BOUND, GRADIENT_BOUND = 2e-6, 8e-6
SIDE, PATCH = 28, 7
BOS, EOS, VOCAB = 97, 98, 99
LENGTHS = [5, 12, 2, 9]
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "bos_token_id": BOS,
    "pad_token_id": EOS,
    "eos_token_id": EOS,
}


def reference_model(seed: int = 0, **text: Any) -> Any:
    """Return a CLIP whose towers have different widths, without parameters at 0 or 1."""
    from transformers import CLIPConfig, CLIPModel

    dim = {"projection_dim": 24}
    vision = {**SIZES, "image_size": SIDE, "num_hidden_layers": 2, **dim}
    config = CLIPConfig(text_config={**TEXT, **dim, **text}, vision_config=vision, **dim)
    model = CLIPModel(config).eval()
    randomise(model, seed)
    return model


def texts() -> list[Tensor]:
    """Return the token ids of each text, from the begin to the end token."""
    generator = torch.Generator().manual_seed(4)
    inner = (torch.randint(3, BOS, (length - 2,), generator=generator) for length in LENGTHS)
    return [torch.tensor([BOS, *ids.tolist(), EOS]) for ids in inner]


def theirs_of(model: Any, pixels: Tensor) -> Any:
    """Return their output for padded texts and the same number of images."""
    ids = torch.full((len(LENGTHS), max(LENGTHS)), EOS)
    for row, text in zip(ids, texts(), strict=True):
        row[: len(text)] = text
    return model(input_ids=ids, pixel_values=normalised(pixels, "clip").to(model.dtype), return_loss=True)


def batch_of(pixels: Tensor) -> MultimodalBatch:
    """Return the same pairs as a packed batch."""
    ids = torch.cat(texts())
    ones = torch.ones(len(ids))
    return MultimodalBatch(
        ids,
        ids,
        ones,
        torch.cat([torch.arange(length) for length in LENGTHS]),
        Segments.from_lengths(LENGTHS),
        ones.bool(),
        media={"image": ours_of(pixels, PATCH)},
        pairs=torch.arange(len(LENGTHS)).unsqueeze(1).expand(-1, 2),
        weight=float(len(LENGTHS)),
    )


@pytest.mark.parity
@pytest.mark.parametrize("text", [{}, {"hidden_act": "gelu", "eos_token_id": 2}], ids=["clip", "gelu, largest id"])
def test_the_same_similarities_loss_and_gradients(text: dict[str, Any], tmp_path: Path, parity: Recorder) -> None:
    theirs = reference_model(**text)
    ours = import_reference(theirs, tmp_path)
    pixels = images(SIDE, len(LENGTHS))
    batch, expected = batch_of(pixels), theirs_of(theirs, pixels)
    vectors = ours(batch)
    similarities = vectors.log_scale.exp() * vectors.images @ vectors.texts.T
    parity("clip", "image vectors", distance(vectors.images, expected.image_embeds), BOUND)
    parity("clip", "text vectors", distance(vectors.texts, expected.text_embeds), BOUND)
    parity("clip", "logits", distance(similarities, expected.logits_per_image), BOUND)
    parity("clip", "logits", distance(similarities.T, expected.logits_per_text), BOUND)
    objective = Contrastive(ours.config.connector, World(0, 1, 0, torch.device("cpu")))
    loss = objective(ours, batch).loss_sum / objective.weight(batch)
    parity("clip", "loss", distance(loss, expected.loss), BOUND)
    loss.backward()
    expected.loss.backward()
    gradients = their_gradients(theirs, tmp_path)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        scale = max(
            float(gradients[name].abs().max()), 1e-2 * largest
        )  # A key's bias has a gradient of rounding errors only.
        error = float((parameter.grad - gradients.pop(name)).abs().max()) / scale
        parity("clip", "gradients", error, GRADIENT_BOUND)
    assert not gradients


@pytest.mark.parity
def test_in_bfloat16_no_farther_from_the_truth(tmp_path: Path, parity: Recorder) -> None:
    """Compare vectors of images and texts. Measured ratio: 0.89, because we normalise vectors in float32."""

    @torch.no_grad()
    def one(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        theirs, folder, pixels = reference_model(seed).bfloat16(), tmp_path / str(seed), images(SIDE, len(LENGTHS))
        theirs.save_pretrained(folder / "theirs")
        ours, _ = imported(folder / "theirs", folder / "run")
        vectors, other = ours.bfloat16()(batch_of(pixels)), theirs_of(theirs, pixels)
        truth = theirs_of(theirs.float(), pixels)
        pairs = (vectors.images, vectors.texts), (other.image_embeds, other.text_embeds)
        return *map(torch.cat, pairs), torch.cat([truth.image_embeds, truth.text_embeds])

    parity("clip", "error of bfloat16, over theirs", rounding_ratio(one(seed) for seed in range(4)), 1.02)


def test_export_restores_the_folder(tmp_path: Path) -> None:
    """Export the whole model, and the vision tower alone from the same folder."""
    from transformers import CLIPVisionModel

    theirs = reference_model()
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    _, checkpoint = imported(tmp_path / "theirs", tmp_path / "run")
    report = export_weights(checkpoint, tmp_path / "back", to=HuggingFace(tmp_path / "theirs"))
    assert report.family == "clip"
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = loaded(tmp_path / "back", "AutoModel")
    config = loaded(tmp_path / "theirs", "AutoModel").config.to_dict()
    assert again.config.to_dict() == {**config, "_name_or_path": str(tmp_path / "back")}
    pixels = images(SIDE, len(LENGTHS))
    assert torch.equal(theirs_of(again, pixels).logits_per_image, theirs_of(theirs, pixels).logits_per_image)
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    processor = json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())
    assert processor["crop_size"] == {"height": SIDE, "width": SIDE}
    tower, info = CLIPVisionModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"]
    pairs = zip(tower.parameters(), theirs.vision_model.parameters(), strict=True)
    assert all(torch.equal(mine, other) for mine, other in pairs)


def test_without_a_folder_like_it_no_end_token_is_known(tmp_path: Path) -> None:
    """An export does not guess the end token: transformers fails until the user sets it."""
    theirs = reference_model()
    theirs.save_pretrained(tmp_path / "theirs")
    _, checkpoint = imported(tmp_path / "theirs", tmp_path / "run")
    assert export_weights(checkpoint, tmp_path / "back", to=HuggingFace()).family == "clip"
    again, pixels = loaded(tmp_path / "back", "AutoModel"), images(SIDE, len(LENGTHS))
    with pytest.raises(AttributeError):
        theirs_of(again, pixels)
    again.text_model.eos_token_id = EOS
    assert torch.equal(theirs_of(again, pixels).logits_per_image, theirs_of(theirs, pixels).logits_per_image)


def test_of_the_published_configuration_it_is_known() -> None:
    config = model_of(CONFIGS / "models" / "clip-vit-l-14-336-pair.yaml")
    values = layout_for(config).config_values(config)
    assert values["text_config"]["eos_token_id"] == 49407
    assert (values["logit_scale_init_value"], values["projection_dim"]) == (pytest.approx(2.6592, abs=1e-4), 768)


def test_longer_texts_than_those_of_the_folder_like_it(tmp_path: Path) -> None:
    """An export writes the model's own number of positions, though other families copy the context length."""
    for length in (12, 20):
        reference_model(max_position_embeddings=length).save_pretrained(tmp_path / f"of {length}")
    _, checkpoint = imported(tmp_path / "of 20", tmp_path / "run")
    export_weights(checkpoint, tmp_path / "back", to=HuggingFace(tmp_path / "of 12"))
    again = loaded(tmp_path / "back", "AutoModel")
    assert again.config.text_config.max_position_embeddings == 20
    assert again.config.text_config.pad_token_id == EOS


def test_its_tower_goes_into_a_model_that_sees(tmp_path: Path) -> None:
    """There the class row is not a feature; the parameter names are the same."""
    reference_model().save_pretrained(tmp_path / "theirs")
    report = import_folder(tmp_path / "theirs", tmp_path / "run" / "checkpoints")
    decoder = {**report.model["decoder"], "hidden_dim": 16, "attention": {"num_heads": 2}}
    vision = {**report.model["vision"], "class_feature": False}
    block = {"decoder": decoder, "vision": vision, "connector": {"kind": "embedding"}}
    model = build_weights(ModelConfig.model_validate(block))
    loaded_part = match(model, read_manifest(newest_of(tmp_path / "run")), ["vision"])
    assert set(loaded_part.loaded) == {name for name, _ in model.named_parameters() if name.startswith("vision.")}
    assert not loaded_part.resampled + loaded_part.mismatched
    assert {name.split(".")[0] for name in loaded_part.unused} == {"connector", "decoder"}


def changed(folder: Path, block: str | None, **keys: Any) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text())
    (values if block is None else values[block]).update(keys)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("block", "keys", "message"),
    [
        ("text_config", {"hidden_act": "relu"}, "text_config: hidden_act='relu' is not supported"),
        ("text_config", {"attention_dropout": 0.1}, r"attention_dropout=0\.1 is not supported"),
        ("text_config", {"rotary": True}, "rotary=True is not known"),
        ("vision_config", {"registers": 4}, "registers=4 is not known"),
        (None, {"loss": "sigmoid"}, "loss='sigmoid' is not known"),
        (None, {"text_config": None}, "text_config is missing"),
        ("text_config", {"max_position_embeddings": 9}, r"position_embedding\.weight is \[12, 32\]"),
    ],
)
def test_unsupported_values_are_rejected(block: str | None, keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    reference_model().save_pretrained(tmp_path / "theirs")
    changed(tmp_path / "theirs", block, **keys)
    with pytest.raises(CheckpointError, match=message):
        import_folder(tmp_path / "theirs", tmp_path / "run")


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "loss": ({"connector": {"loss": "sigmoid"}}, r"model\.connector\.loss='sigmoid'"),
    "pool": (
        {"connector": {"pool": "mean"}, "vision": {"class_feature": False}},
        r"model\.vision\.class_feature=False",
    ),
    "rotations": ({"decoder": {"learned_positions": None, "rope": {}}}, r"decoder\.learned_positions"),
    "a gate": ({"decoder": {"mlp": {"kind": "dense", "hidden_dim": 48}}}, r"model\.decoder\.mlp\.gated=True"),
    "positions": (
        {"vision": {"positions": {"kind": "learned", "grid": [4, 3]}}},
        "need learned vision.positions on a square grid",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_models_that_clip_cannot_express_are_rejected(case: str, tmp_path: Path) -> None:
    changes, message = OTHERS[case]
    reference_model().save_pretrained(tmp_path / "theirs")
    model = import_folder(tmp_path / "theirs", tmp_path / "run").model
    assert layout_for(ModelConfig.model_validate(model)).model_type == "clip"
    config = ModelConfig.model_validate({**model, **{key: {**model[key], **change} for key, change in changes.items()}})
    with pytest.raises(CheckpointError, match=message):
        layout_of("clip").config_values(config)
    with pytest.raises(CheckpointError, match="no Hugging Face family can express this model"):
        layout_for(config)


WORDS = ["red</w>", "apple</w>", "photo</w>", "of</w>", "a</w>", "the</w>"]


def tokenizer(folder: Path) -> Any:
    """Return CLIP's tokenizer with all bytes, bytes at the end of a word, a few words, and two special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    pieces, merges = [*letters, *(f"{letter}</w>" for letter in letters)], []
    for word in WORDS:
        built, *rest = [*word.removesuffix("</w>")[:-1], f"{word.removesuffix('</w>')[-1]}</w>"]
        for piece in rest:
            merges.append((built, piece))
            built += piece
            pieces.append(built)
    vocabulary = {
        piece: number for number, piece in enumerate(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))
    }
    made = CLIPTokenizer(vocabulary, list(dict.fromkeys(merges)))
    made.save_pretrained(folder)
    return made


def test_its_tokenizer_gives_the_same_ids_and_cuts_them_alike(tmp_path: Path) -> None:
    """Texts of a pair are truncated to the model's number of positions."""
    theirs = tokenizer(tmp_path)
    names = {"bos_token": "<|startoftext|>"} | dict.fromkeys(("eos_token", "pad_token", "image_token"), "<|endoftext|>")
    ours = load_tokenizer(HuggingFaceTokenizerConfig(path=tmp_path / "tokenizer.json", **names))
    values = reference_model(vocab_size=ours.vocab_size).config.to_dict()
    spec = media_spec(layout_of("clip").model_config(values, "its"))
    dataset = {"name": "d", "manifest": "m", "template": {"kind": "caption", "prompts": [""], "answers": ["{text}"]}}
    builder = DocumentBuilder(DatasetConfig.model_validate(dataset), ours, spec)
    budget = Budget(PackingConfig(max_tokens=99, too_long="truncate"), spec, dummy_document(spec, ours.pad_id))
    picture = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE)).save(picture, "PNG")
    for text in ["A photo of a red apple", "the  APPLE's\n42", "Äpfel 🍎 été", "red", "of " * 30]:
        sample = Sample((ImagePart(picture.getvalue(), "png"),), {"text": text}, Provenance("d", "s", "k", 0))
        (document,) = budget.admit(builder(sample))
        expected = theirs(text, truncation=True, max_length=TEXT["max_position_embeddings"])["input_ids"]
        assert document.token_ids.tolist() == expected
    assert ours.decode(ours.encode("A photo  of 3 apples")) == "a photo of 3 apples"
    assert ours.eos_id not in ours.encode("red <|endoftext|> apple")
