"""Imported Molmo gives the results of its published code, and an export restores the folder bit for bit.

transformers has no first-generation Molmo; the reference is ``tests/hf/molmo.py``. Differences are the largest in a
tensor over its largest value, in float32.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.batch import MultimodalBatch
from data_pipeline.config import DatasetConfig
from data_pipeline.document import Document
from data_pipeline.images.crops import resize
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.sample import ImagePart, Provenance, Sample
from mmscale.checkpoint.export import HuggingFace, export_weights
from mmscale.errors import CheckpointError
from mmscale.hf.forward_config import forward_config
from mmscale.hf.layouts import layout_of
from mmscale.models.build import media_spec
from mmscale.models.config import ModelConfig
from mmscale.models.generation import generate
from mmscale.models.sampling import SamplingConfig
from tests.data_pipeline.images.molmo_reference import COLUMN, END, START, prepare
from tests.data_pipeline.images.molmo_reference import PATCH as PLACE
from tests.data_pipeline.images.test_molmo_crops import LAYOUT, picture, png
from tests.hf.molmo import FAMILIES, MEAN, NEW, SIZES, STD, VOCAB, Example, Molmo, example, fill, save
from tests.hf.molmoe_keys import MOLMOE
from tests.hf.reference_models import imported, tensors_of
from tests.hf.test_published import shipped
from tests.hf.train_and_export import VOCABULARY, captions, train_and_export
from tests.models.reference_models import distance, gradient_distance, randomise, rounding_ratio
from tests.parity_table import Recorder

pytestmark = pytest.mark.parity
BOUND, GRADIENT_BOUND = 2e-6, 4e-6
PAIRS = [("what?", "a cat"), ("how many?", "3"), ("x", "yes, two of them")]
DOCUMENTS: list[tuple[list[tuple[int, int]], int]] = [  # Sizes of images, and number of annotations.
    ([(37, 23)], 1),
    ([], 1),
    ([(9, 41), (64, 31)], 1),
    ([(24, 24)], 3),
    ([(13, 90)], 2),
]


class Letters:
    """A tokenizer of letters whose image tokens are the model's new rows."""

    bos_id, eos_id, pad_id, fingerprint = 1, 2, 0, "letters"

    def __init__(self, table: int) -> None:
        self.ids = {START: table, END: table + 1, PLACE: table + 2, COLUMN: table + 3}
        self.image_id, self.vocab_size = self.ids[PLACE], table + NEW

    def special_id(self, name: str, field: str) -> int:
        return self.ids[{"<im_start>": START, "<im_end>": END, "<im_col>": COLUMN}[name]]

    def encode(self, text: str) -> list[int]:
        return [4 + ord(letter) % (VOCAB - 4) for letter in text]

    def decode(self, ids: Any) -> str:
        return str(ids)


LETTERS = Letters(VOCAB)


def document(
    config: ModelConfig, sizes: list[tuple[int, int]], annotations: int, letters: Letters = LETTERS
) -> Document:
    """Build a document with our data pipeline."""
    rule = {"kind": "molmo", "max_tiles": SIZES.most, "margin": SIZES.margin, "padding_of": "next_crop"}
    transforms = {"kind": "tiles", "tiling": rule, "interpolation": "bilinear", "layout": LAYOUT}
    dataset = {"name": "d", "manifest": "m", "template": {"kind": "annotations"}, "transforms": transforms}
    fields = {"annotations": [{"question": question, "answer": answer} for question, answer in PAIRS[-annotations:]]}
    parts = tuple(ImagePart(png(picture(*size)), "png") for size in sizes)
    builder = DocumentBuilder(DatasetConfig.model_validate(dataset), letters, media_spec(config))  # type: ignore[arg-type]
    return builder(Sample(parts, fields, Provenance("d", "s", "k", 0)))


def theirs_of(document: Document, sizes: list[tuple[int, int]], letters: Letters = LETTERS) -> Example:
    """Build their inputs: images from resized pixels on, with our resizing (rounded to bytes), and the same text."""
    images, ids = [], [letters.bos_id]
    for size in sizes:
        image = prepare(picture(*size), SIZES, lambda pixels, to: resize(pixels, to, "bilinear") / np.float32(255))
        images.append((len(ids), image))
        ids += [letters.ids[token] for token in image.tokens.tolist()]
    text = document.token_ids[len(ids) :].tolist()
    assert document.token_ids.tolist() == [*ids, *text]
    return example([*ids, *text], images, document.branches)


def loaded(family: str, folder: Path) -> tuple[Molmo, Any]:
    theirs = Molmo(family)
    save(theirs, folder / "theirs")
    ours, _ = imported(folder / "theirs", folder / "run")
    return theirs, ours


def batch_of(documents: list[Document], config: ModelConfig) -> MultimodalBatch:
    return collate([Pack(tuple(documents), 0)], media_spec(config))


def gradients(theirs: Molmo, folder: Path) -> dict[str, Tensor]:
    """Return gradients by our names: save them as weights and import them. None becomes zeros (the unused block)."""
    save(theirs, folder / "gradients", lambda p: torch.zeros_like(p) if p.grad is None else p.grad)
    model, _ = imported(folder / "gradients", folder / "of gradients")
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits_loss_and_gradients(family: str, tmp_path: Path, parity: Recorder) -> None:
    """Five documents in one pack: odd sizes, two images, none, two and three annotations.

    Measured: logits 4.6e-7, loss 8.5e-8, gradients 1.7e-6.
    """
    theirs, ours = loaded(family, tmp_path)
    documents = [document(ours.config, *one) for one in DOCUMENTS]
    batch = batch_of(documents, ours.config)
    assert batch.branched is not None
    kinds = {item.content_area for one in documents for item in one.items}
    assert len(kinds) > 4
    expected = theirs([theirs_of(one, sizes) for one, (sizes, _) in zip(documents, DOCUMENTS, strict=True)])
    hidden = ours(batch).hidden
    logits = ours.head(hidden)
    parity("molmo", "logits", distance(logits, torch.cat(expected)), BOUND)
    loss = ours.head(hidden, labels=batch.labels, loss_weights=batch.loss_weights)
    losses = F.cross_entropy(torch.cat(expected), batch.labels, reduction="none", ignore_index=-100)
    reference = (losses * batch.loss_weights).sum()
    parity("molmo", "loss", distance(loss, reference), BOUND)
    loss.backward()
    reference.backward()
    wanted = gradients(theirs, tmp_path)
    source: Any = {name: SimpleNamespace(grad=values) for name, values in wanted.items()}
    parity("molmo", "gradients", gradient_distance(ours, source), GRADIENT_BOUND)
    idle = [name for name in wanted if name.startswith("vision.layers.3.")]
    assert idle
    assert not any(wanted[name].any() or ours.get_parameter(name).grad.any() for name in idle)
    # Packed documents give the same results as single ones.
    for one, (sizes, _), rows in zip(
        documents, DOCUMENTS, logits.split([one.num_tokens for one in documents]), strict=True
    ):
        if sizes:
            alone = ours.head(ours(batch_of([one], ours.config)).hidden)
            parity("molmo", "a packed document against it alone", distance(rows, alone), BOUND)


def test_in_bfloat16_no_farther_from_the_truth(tmp_path: Path, parity: Recorder) -> None:
    """Measured ratio 0.91."""
    config = loaded("qwen2", tmp_path)[1].config
    documents = [document(config, *one) for one in DOCUMENTS]
    examples = [theirs_of(one, sizes) for one, (sizes, _) in zip(documents, DOCUMENTS, strict=True)]

    @torch.no_grad()
    def one(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        theirs, folder = Molmo("qwen2"), tmp_path / str(seed)
        folder.mkdir()
        randomise(theirs, seed)
        theirs.bfloat16()
        save(theirs, folder / "theirs")
        ours, _ = imported(folder / "theirs", folder / "run")
        ours.bfloat16()
        logits = ours.head(ours(batch_of(documents, config)).hidden)
        return logits, torch.cat(theirs(examples)), torch.cat(theirs.float()(examples))

    ratio = rounding_ratio(one(seed) for seed in range(4))
    parity("molmo", "error of bfloat16, over the reference's", ratio, 1.1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
def test_export_restores_the_folder(family: str, number_format: Any, tmp_path: Path) -> None:
    theirs = Molmo(family)
    theirs = theirs.bfloat16() if number_format == "bf16" else theirs
    save(theirs, tmp_path / "theirs")
    _, checkpoint = imported(tmp_path / "theirs", tmp_path / "run")
    like = HuggingFace(tmp_path / "theirs")
    export_weights(checkpoint, tmp_path / "back", to=like, number_format=number_format, shard_bytes=20_000)
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert (values.dtype, values.shape) == (after[name].dtype, after[name].shape)
        assert torch.equal(values, after[name]), name
    old, new = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "back"))
    if family == "olmo2":
        old["num_key_value_heads"] = old["num_attention_heads"]  # Null in the file.
    assert {key: new.pop(key) for key in old} == old
    assert set(new) == {"dtype"}
    preprocessor = json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())
    assert (tuple(preprocessor["image_mean"]), tuple(preprocessor["image_std"])) == (MEAN, STD)


def test_the_published_configuration_of_molmoe_is_the_shipped_one() -> None:
    read = layout_of("molmo").model_config
    assert forward_config(read(MOLMOE, "config.json")) == forward_config(shipped("molmoe-1b"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope_impl": "cockatoo"}, "rope_impl='cockatoo' is not supported, only 'llama'"),
        ({"weight_tying": None}, "weight_tying=None is not supported, only False"),
        ({"moe_shared_expert": True}, "moe_shared_expert=True is not supported"),
        ({"sparsity": 2}, "sparsity=2 is not known"),
        ({"vision_backbone": {**MOLMOE["vision_backbone"], "image_num_pos": 9}}, "image_num_pos=9 is not .* 577"),
    ],
)
def test_other_keys_of_molmoe_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        layout_of("molmo").model_config({**MOLMOE, **keys}, "config.json")


@pytest.mark.dist
@pytest.mark.parametrize("family", ["qwen2", pytest.param("olmoe", marks=pytest.mark.slow)])
def test_trained_and_exported(family: str, tmp_path: Path) -> None:
    """After training on two ranks and export, the reference gives the same logits and generates the same tokens.

    Two parts are not trained: the last block of the tower, and new tokens, which the emoji tokenizer lacks.
    """
    theirs = Molmo(family, VOCABULARY)
    save(theirs, tmp_path / "theirs")
    tiling = {"kind": "molmo", "max_tiles": 2, "margin": 2, "padding_of": "next_crop"}
    transforms = {"kind": "tiles", "tiling": tiling, "interpolation": "bilinear"}
    out = train_and_export(
        tmp_path / "theirs", tmp_path, captions(transforms), idle=r"new_embedding$|resblocks\.3\.", max_tokens=160
    )
    again = Molmo(family, VOCABULARY)
    fill(again, tensors_of(out))
    ours, _ = imported(out, tmp_path / "again")
    letters = Letters(VOCABULARY)
    prompt = document(ours.config, [(40, 25)], 1, letters)
    length = prompt.token_ids.tolist().index(letters.eos_id) - len(PAIRS[-1][1])
    prompt = replace(
        prompt,
        **{name: getattr(prompt, name)[:length] for name in ("token_ids", "loss_weights", "position_ids")},
        labels=np.full(length, -100, np.int32),
    )
    batch = batch_of([prompt], ours.config)
    known = theirs_of(prompt, [(40, 25)], letters)
    with torch.no_grad():
        assert distance(ours.head(ours(batch).hidden), again([known])[0]) < BOUND
    # After twenty steps it would end every caption at once; a penalty on repeated tokens makes captions longer.
    for penalty in (1.0, 50.0):
        (generated,) = generate(ours, batch, 8, -1, SamplingConfig(repetition_penalty=penalty))
        assert generated == greedy(again, known, 8, penalty)
    assert len(set(generated)) == 8


def greedy(reference: Molmo, known: Example, count: int, penalty: float) -> list[int]:
    """Generate greedily with a full forward pass per token, and CTRL's repetition penalty."""
    for _ in range(count):
        with torch.no_grad():
            logits = reference([known])[0][-1]
        for old in {old for old in known.ids.tolist() if old < VOCABULARY}:
            logits[old] = logits[old] / penalty if logits[old] > 0 else logits[old] * penalty
        token = logits.argmax()
        grown = {
            "ids": torch.cat([known.ids, token.view(1)]),
            "subsegments": F.pad(known.subsegments, (0, 1), value=1),
            "positions": F.pad(known.positions, (0, 1), value=len(known.positions)),
        }
        known = replace(known, **grown)
    return known.ids[-count:].tolist()
