"""Imported Janus reads and draws as in transformers, and an export restores the folder bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmscale.models.build import media_spec
from mmscale.models.generation import ImageGrid, draw
from mmscale.models.sampling import SamplingConfig
from tests.hf.reference_models import assert_restored, import_reference, their_gradients, trained_parameters
from tests.models.packs import IMAGE_ID, Doc, image_document, pack
from tests.models.reference_models import distance, randomise
from tests.parity_table import Recorder

pytestmark = pytest.mark.parity
BOUND, GRADIENT_BOUND = 2e-6, 8e-6
VOCAB, CODES, SIDE, PATCH = 120, 64, 32, 16


def reference_model(seed: int = 0, *, tied: bool = False) -> Any:
    """Return a tiny random model."""
    from transformers import (
        JanusConfig,
        JanusForConditionalGeneration,
        JanusVisionConfig,
        JanusVQVAEConfig,
        LlamaConfig,
    )

    text = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    tower = JanusVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=64,
        num_image_tokens=(SIDE // PATCH) ** 2,
    )
    drawing = JanusVQVAEConfig(
        num_embeddings=CODES,
        latent_channels=32,
        base_channels=32,
        channel_multiplier=(1, 1, 1, 1, 2),
        num_res_blocks=1,
        projection_dim=64,
        image_token_embed_dim=64,
    )
    config = JanusConfig(
        vision_config=tower, vq_config=drawing, text_config=text, image_token_id=IMAGE_ID, tie_word_embeddings=tied
    )
    model = JanusForConditionalGeneration(config)
    randomise(model, seed)
    return model.eval()


def their_hidden(theirs: Any, doc: Doc) -> Tensor:
    """Return the rows before the heads. Codes have the ids from ``VOCAB``."""
    ids = torch.tensor(doc.tokens)
    drawn = ids >= VOCAB
    rows = theirs.get_input_embeddings()(ids.masked_fill(drawn, 0))
    codes = theirs.prepare_embeddings_for_image_generation(ids[drawn] - VOCAB)
    rows = rows.index_copy(0, drawn.nonzero().squeeze(1), codes)
    for grid, _, patches in doc.crops:
        pixels = patches.view(*grid[1:], 3, PATCH, PATCH).permute(2, 0, 3, 1, 4).reshape(1, 3, SIDE, SIDE)
        features = theirs.model.get_image_features(pixels / 127.5 - 1).pooler_output[0]
        rows = rows.index_copy(0, torch.tensor(doc.scatter_index), features)
    return theirs.model.language_model(inputs_embeds=rows[None]).last_hidden_state[0]


def documents(spec: Any) -> list[Doc]:
    """Return a document that reads an image, two that draw one, and one that does both."""
    codes = torch.randint(VOCAB, VOCAB + CODES, (3, 4), generator=torch.Generator().manual_seed(1)).tolist()
    read, both = (image_document(spec, seed, 5, [(2, 2)], VOCAB) for seed in (1, 2))
    both.tokens += [9, *codes[0], 10]
    drawn = [Doc([1, 11, 12, 13, *each, 14, 2], spans=[(0, [])]) for each in codes[1:]]
    return [read, *drawn, both]


@pytest.mark.parametrize("tied", [False, True])
def test_the_same_logits_loss_and_gradients(tied: bool, tmp_path: Path, parity: Recorder) -> None:
    theirs = reference_model(tied=tied)
    ours = import_reference(theirs, tmp_path)
    assert ours.config.decoder.image_ids == range(VOCAB, VOCAB + CODES)
    spec = media_spec(ours.config)
    docs = documents(spec)
    batch = pack(docs, spec)
    hidden = ours(batch).hidden
    rows = torch.cat([their_hidden(theirs, doc) for doc in docs])
    text, codes = theirs.lm_head(rows), theirs.model.generation_head(rows)
    parity("janus", "logits", distance(ours.head(hidden), text), BOUND)
    parity("janus", "logits of codes", distance(ours.head.image(hidden), codes), BOUND)
    drawn = batch.labels >= VOCAB
    weights = torch.where(drawn, 0.75, 1.0) * batch.loss_weights
    row_losses = torch.zeros_like(weights)
    loss = ours.head(hidden, labels=batch.labels, loss_weights=weights, row_losses=row_losses)
    expected = torch.where(
        drawn,
        F.cross_entropy(codes, (batch.labels - VOCAB).clamp(min=0), reduction="none"),
        F.cross_entropy(text, batch.labels.masked_fill(drawn, -100), reduction="none", ignore_index=-100),
    )
    parity("janus", "loss", distance(row_losses, expected * weights), BOUND)
    parity("janus", "loss", distance(loss, (expected * weights).sum()), BOUND)
    loss.backward()
    (expected * weights).sum().backward()
    gradients = their_gradients(theirs, tmp_path)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in trained_parameters(ours):
        gradient = gradients.pop(name)
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        parity("janus", "gradients", float((parameter.grad - gradient).abs().max()) / scale, GRADIENT_BOUND)
    assert all(name.startswith("image_tokenizer.") for name in gradients)
    for doc, own in zip(docs, hidden.split([len(doc.tokens) for doc in docs]), strict=True):
        filler = [] if doc.crops else [docs[0]]
        alone = ours(pack([doc, *filler], spec)).hidden[: len(doc.tokens)]
        parity("janus", "a packed document against it alone", distance(alone, own), BOUND)


@pytest.mark.parametrize("tied", [False, True])
def test_export_restores_the_folder(tied: bool, tmp_path: Path) -> None:
    assert_restored(reference_model(tied=tied), tmp_path)


def test_drawn_codes_are_those_of_their_generate(tmp_path: Path) -> None:
    """With guidance, they replace all but the first token and the beginning of the image by padding."""
    theirs, begin = reference_model(2), 11
    ours = import_reference(theirs, tmp_path)
    prompts = [[1, 12, 13, 40, begin], [1, 60, 61, 62, begin]]
    theirs.generation_config.update(bos_token_id=1, pad_token_id=0)
    theirs.generation_config.generation_kwargs = {"boi_token_id": begin}
    ids = torch.tensor(prompts)
    options = {"generation_mode": "image", "guidance_scale": 3.0, "do_sample": False}
    expected = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    spec = media_spec(ours.config)
    without = [[1, 0, 0, 0, begin]] * 2
    docs = [Doc(tokens, spans=[(0, [])]) for tokens in [*prompts, *without]]
    docs.append(image_document(spec, 1, 1, [(2, 2)], VOCAB, dummy=True))
    images = draw(ours.eval(), pack(docs, spec), [ImageGrid(2, 2)] * 2, SamplingConfig(), guidance=3.0)
    assert torch.stack(images).flatten(1).equal(expected)
    assert len(set(expected.flatten().tolist())) > 2
