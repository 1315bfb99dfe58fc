"""Drawing with caches, against one forward pass over the whole sequence for every token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from data_pipeline.media_spec import MediaSpec
from mmscale.evaluate.likelihood import label_likelihoods
from mmscale.models.build import build_model, media_spec
from mmscale.models.config import ModelConfig
from mmscale.models.generation import ImageGrid, draw
from mmscale.models.multimodal import MultimodalModel
from mmscale.models.sampling import SamplingConfig
from mmscale.optim.schedule import freeze
from mmscale.optim.stages import StageConfig
from tests.models.packs import Doc, image_document, pack, text_document
from tests.models.tiny import VOCAB, config, model

CODES, ROW_END = 9, 5
KINDS: dict[str, dict[str, Any]] = {
    "vocabulary": {"kind": "vocabulary", "first_id": VOCAB - CODES, "codes": CODES},
    "separate": {"kind": "separate", "codes": CODES, "code_dim": 3},
}
GRIDS = [ImageGrid(3, 2, ROW_END), ImageGrid(2, 4, ROW_END), ImageGrid(1, 3)]
PROMPTS = [text_document(seed, 3 + 2 * seed, VOCAB - CODES).tokens for seed in range(3)]
WITHOUT = [[0] * len(tokens) for tokens in PROMPTS]


def drawer(kind: str, connector: str | None = None) -> tuple[MultimodalModel, MediaSpec]:
    net = model(connector, image_tokens=KINDS[kind]).eval()
    return net, media_spec(net.config)


def documents(spec: MediaSpec, sequences: list[list[int]]) -> list[Doc]:
    """Return the documents, with a dummy document between them if the model has a tower."""
    docs = [Doc(list(tokens), spans=[(0, [])]) for tokens in sequences]
    if spec.needs_embedded:
        docs.insert(1, image_document(spec, 9, 1, [(2, 2)], VOCAB - CODES, dummy=True))
    return docs


@torch.no_grad()
def brute_force(
    net: MultimodalModel, spec: MediaSpec, number: int, guidance: float, sampling: SamplingConfig
) -> Tensor:
    """Draw image ``number`` alone: run the whole sequences anew for every code, and write out each rule."""
    grid, ids = GRIDS[number], net.config.decoder.image_ids
    generator = torch.Generator().manual_seed(sampling.seed + number)
    with_text, without = list(PROMPTS[number]), list(WITHOUT[number])
    codes: list[list[int]] = []
    for row in range(grid.rows):
        codes.append([])
        for _ in range(grid.columns):
            logits = []
            for tokens in (with_text, without):
                hidden = net(pack(documents(spec, [tokens]), spec)).hidden[len(tokens) - 1 : len(tokens)]
                whole = net.head(hidden) if net.head.image is None else net.head.image(hidden)
                logits.append(whole[0, ids.start :] if net.head.image is None else whole[0])
            guided = logits[1].log_softmax(0) + guidance * (logits[0].log_softmax(0) - logits[1].log_softmax(0))
            if sampling.temperature:
                guided = guided / sampling.temperature
                least = guided.sort(descending=True).values[(sampling.top_k or CODES) - 1]
                guided[guided < least] = -torch.inf
                code = int(torch.multinomial(guided.softmax(0), 1, generator=generator))
            else:
                code = int(guided.argmax())
            codes[-1].append(code)
            with_text.append(ids.start + code)
            without.append(ids.start + code)
        if grid.row_end is not None and row + 1 < grid.rows:
            with_text.append(grid.row_end)
            without.append(grid.row_end)
    return torch.tensor(codes)


@pytest.mark.parametrize(
    ("kind", "connector", "guidance", "sampling"),
    [
        ("vocabulary", None, 1.0, SamplingConfig()),
        ("vocabulary", None, 3.0, SamplingConfig(temperature=0.7, top_k=4, seed=5)),
        ("separate", None, 2.0, SamplingConfig()),
        ("separate", "embedding", 3.0, SamplingConfig(temperature=1.3, seed=2)),
    ],
)
def test_drawing_equals_a_full_forward_for_every_code(
    kind: str, connector: str | None, guidance: float, sampling: SamplingConfig
) -> None:
    net, spec = drawer(kind, connector)
    sequences = PROMPTS + (WITHOUT if guidance > 1 else [])
    images = draw(net, pack(documents(spec, sequences), spec), GRIDS, sampling, guidance=guidance)
    for number, image in enumerate(images):
        assert image.equal(brute_force(net, spec, number, guidance, sampling))
    assert len({code for image in images for code in image.flatten().tolist()}) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grids": []}, "at least one image"),
        ({"grids": [ImageGrid(2, 0)] * 3}, "at least one row and one column"),
        ({"guidance": 0.5}, "guidance=0.5: must be at least 1"),
        ({"guidance": 2.0}, "the batch has 3 documents; 3 images need 3 prompts and as many without text"),
        ({"grids": [ImageGrid(2, 2)]}, "the batch has 3 documents; 1 images need 1 prompts"),
        ({"sampling": SamplingConfig(repetition_penalty=1.1)}, "repetition_penalty=1.1: images repeat codes"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    net, spec = drawer("vocabulary")
    with pytest.raises(ValueError, match=message):
        draw(**{"model": net, "batch": pack(documents(spec, PROMPTS), spec), "grids": GRIDS, **change})


def test_a_model_without_image_tokens_draws_nothing() -> None:
    net = model(None).eval()
    with pytest.raises(ValueError, match="draws no images"):
        draw(net, pack(documents(media_spec(net.config), PROMPTS), media_spec(net.config)), GRIDS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_likelihood_of_a_code_is_that_of_its_head(kind: str) -> None:
    """The loss, which the tests of Hugging Face folders compare with transformers, is the negative sum of these."""
    net, spec = drawer(kind)
    ids = net.config.decoder.image_ids
    batch = pack(documents(spec, [[1, 7, ids[0], ids[3], ids[-1], 9], [4, ids[2], 2]]), spec)
    with torch.no_grad():
        found = label_likelihoods(net, batch, rows_per_head=4, head_calls=3)
        losses, ones = torch.zeros(9), (batch.labels >= 0).float()
        net.head(net(batch).hidden, labels=batch.labels, loss_weights=ones, row_losses=losses)
    assert found.values == pytest.approx(-losses[found.rows].numpy(), rel=1e-5)
    assert len(found.rows) == 7


TOKENIZER = {
    "kind": "vqgan",
    "base_dim": 4,
    "multipliers": [1, 1],
    "attention_levels": [],
    "latent_dim": 4,
    "codebook_size": CODES,
    "code_dim": 2,
    "norm_groups": 2,
}


def test_no_stage_trains_the_image_tokenizer() -> None:
    net = build_model(
        ModelConfig.model_validate(
            {**config(None, image_tokens=KINDS["separate"]).model_dump(), "image_tokenizer": TOKENIZER}
        )
    )
    freeze(net, net.components(), StageConfig(name="all", steps=1))
    frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in net.named_parameters() if name.startswith("image_tokenizer.")}
    tokenizer = net.train().image_tokenizer
    assert isinstance(tokenizer, torch.nn.Module)
    assert net.training
    assert not tokenizer.training


@pytest.mark.parametrize(
    ("tokens", "tokenizer", "message"),
    [
        (
            {**KINDS["vocabulary"], "first_id": VOCAB - 1},
            None,
            f"first_id={VOCAB - 1}: {CODES} codes need the ids",
        ),
        ({**KINDS["separate"], "codes": CODES + 1}, TOKENIZER, f"codebook_size={CODES}: must be the number of codes"),
        (None, TOKENIZER, "which is 0"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(tokens: Any, tokenizer: Any, message: str) -> None:
    block = {**config(None).model_dump(), "image_tokenizer": tokenizer}
    block["decoder"]["image_tokens"] = tokens
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate(block)
