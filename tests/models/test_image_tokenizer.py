"""Sizes of the published image tokenizers, and inputs that a tokenizer refuses. Values: ``tests/hf``."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from mmscale.models.build import build_unset, build_weights, count_parameters
from mmscale.models.image_tokenizer import image_tokenizer_digest
from mmscale.models.image_tokenizer_model import ImageTokenizerModel
from mmscale.nn.init import initialise_
from tests.configs.files import CONFIGS, model_of
from tests.objectives.tokenizers import tokenizer_config


@pytest.mark.parametrize(("name", "total"), [("emu3-vq", 270_740_287), ("janus-vq", 71_883_403)])
def test_the_published_numbers_of_parameters(name: str, total: int) -> None:
    """Those of Emu3VQVAE and JanusVQVAE of transformers with the published sizes."""
    assert count_parameters(model_of(CONFIGS / "models" / f"{name}.yaml")).total == total


def small() -> ImageTokenizerModel:
    model = build_unset(tokenizer_config())
    assert isinstance(model, ImageTokenizerModel)
    initialise_(model, 1)
    return model


def test_images_and_tokens_that_do_not_fit_are_refused() -> None:
    tokenizer = small().image_tokenizer
    with pytest.raises(ValueError, match="images of 8 x 9 pixels: both sides must be multiples of the 2 pixels"):
        tokenizer.encode(torch.zeros(1, 3, 8, 9))
    assert tokenizer.encode(torch.zeros(1, 3, 8, 6)).shape == (1, 4, 3)
    for wrong in (-1, 24):
        tokens = torch.full((1, 2, 2), wrong)
        with pytest.raises(ValueError, match=f"tokens from {wrong} to {wrong}: the codebook has the numbers 0 to 23"):
            tokenizer.decode(tokens)


def test_weights_without_values_have_no_digest() -> None:
    hollow = build_weights(tokenizer_config())
    assert isinstance(hollow, ImageTokenizerModel)
    with pytest.raises(ValueError, match="only whole weights have a digest"):
        image_tokenizer_digest(hollow.image_tokenizer)
    assert image_tokenizer_digest(small().image_tokenizer) == image_tokenizer_digest(small().image_tokenizer)


def test_a_run_needs_images_of_whole_tokens() -> None:
    block = tokenizer_config().model_dump(mode="json")
    with pytest.raises(ValidationError, match="image_size=9: must be a multiple of the 2 pixels"):
        type(tokenizer_config()).model_validate({**block, "image_size": 9})
