"""The losses of an image tokenizer, and its training on several ranks, with a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmscale.models.build import build_unset
from mmscale.models.image_tokenizer_model import ImageTokenizerModel, image_flops, images_of
from mmscale.nn.init import initialise_
from mmscale.objectives.reconstruction import Reconstruct, ReconstructionConfig
from mmscale.run.config import RunConfig
from tests.engine.ranks import run_ranks
from tests.hf.reference_models import imported
from tests.models.reference_models import distance
from tests.objectives.tokenizers import GAME, LANES, lane_batch, tokenizer_config

EMA = {"config": {"codebook_update": "ema"}, "losses": {"l1": 1.0, "ema_decay": 0.8, "revive_after": 2}}
GRADIENT = {"config": {"normalized_codes": "always"}, "losses": {"revive_after": 2}}


def fresh(**changes: Any) -> ImageTokenizerModel:
    model = build_unset(tokenizer_config(**changes))
    assert isinstance(model, ImageTokenizerModel)
    initialise_(model, 5)
    return model


def test_the_terms_of_the_loss_by_their_definition() -> None:
    model = fresh()
    config = ReconstructionConfig(l1=0.5, l2=2.0, commitment=0.25, codebook=0.75)
    batch = lane_batch(model.config, 0, 0)
    output = Reconstruct(config, model.config)(model, batch)
    output.loss_sum.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    expected = 0.0
    tokenizer = model.image_tokenizer
    for image in images_of(batch.media["image"], model.config):
        latents = tokenizer.latents(image[None])
        codes = tokenizer.codes_of(tokenizer.encode(image[None]))
        pixels = tokenizer.images_of(latents + (codes - latents).detach())[0] - image
        loss = 0.5 * pixels.abs().mean() + 2 * pixels.square().mean()
        loss = loss + 0.25 * F.mse_loss(latents, codes.detach()) + 0.75 * F.mse_loss(codes, latents.detach())
        loss.backward()
        expected += loss.item()
    assert output.loss_sum.item() == pytest.approx(expected, rel=1e-5)
    assert output.document_losses.sum().item() == pytest.approx(expected, rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in model.named_parameters():  # A key's bias has a gradient of rounding errors only.
        assert float((gradients[name] - parameter.grad).abs().max()) < 1e-5 * largest, name


def test_the_losses_of_codes_are_those_of_transformers(tmp_path: Path) -> None:
    """JanusVQVAE weights the codebook term by 0.25, and the commitment by 1."""
    from tests.hf.test_image_tokenizers import pictures, reference_tokenizer

    theirs = reference_tokenizer("JanusVQVAE", tmp_path / "theirs")
    ours = imported(tmp_path / "theirs", tmp_path / "run")[0]
    ours.image_tokenizer.codebook.normalized = "never"  # As their encoder computes.
    images = pictures(2, 3, 8, 8)
    quantized = ours.reconstruct(images).quantized
    commitment = F.mse_loss(quantized.latents, quantized.codes.detach())
    mine = commitment + 0.25 * F.mse_loss(quantized.codes, quantized.latents.detach())
    loss = theirs.encode(images).embedding_loss
    assert mine.item() == pytest.approx(loss.item(), rel=1e-5)
    mine.backward()
    loss.backward()
    assert distance(ours.image_tokenizer.codebook.weight.grad, theirs.quantize.embedding.weight.grad) < 1e-5
    assert distance(ours.image_tokenizer.encoder.conv_in.weight.grad, theirs.encoder.conv_in.weight.grad) < 2e-5


@pytest.mark.parametrize("start_step", [None, 0, 9])
def test_a_dummy_image_runs_every_module_and_has_no_gradient(start_step: int | None) -> None:
    model = fresh(discriminator=None if start_step is None else GAME)
    game = {} if start_step is None else {"discriminator": {"start_step": start_step}}
    objective = Reconstruct(ReconstructionConfig.model_validate(game), model.config)
    batch = lane_batch(model.config, 0, 0, dummy=True)
    output = objective(model, batch)
    output.loss_sum.backward()
    assert objective.weight(batch) == 0
    assert output.statistics
    assert not any(sums.any() for sums in output.statistics)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("game", [None, GAME])
def test_operations_are_those_that_torch_counts(game: dict[str, Any] | None) -> None:
    model = fresh(discriminator=game)
    batch = lane_batch(model.config, 0, 0)
    losses = ReconstructionConfig.model_validate({"discriminator": None if game is None else {"adaptive": False}})
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        Reconstruct(losses, model.config)(model, batch).loss_sum.backward()
    counted = image_flops(model.config, frozenset(model.config.components))
    assert 2 * (counted.forward + counted.backward) == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert 0 < counted.recomputed < counted.forward


def run_cases(ranks: int, *cases: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what rank 0 reports of each case."""
    found: list[dict[str, Any]] = run_ranks("tests.objectives.tokenizers:train_cases", ranks, {"cases": list(cases)})[0]
    return found


def assert_equal_training(one: dict[str, Any], other: dict[str, Any]) -> None:
    for key in ("curve", "codes"):
        assert torch.allclose(torch.tensor(one[key]), torch.tensor(other[key]), rtol=1e-3, atol=1e-4), key
    idle = "image_tokenizer.codebook.idle_steps"
    assert one["buffers"][idle] == other["buffers"][idle]


@pytest.mark.dist
@pytest.mark.resume
def test_codes_are_equal_on_two_ranks_and_after_a_resume(tmp_path: Path) -> None:
    alone = run_cases(1, EMA, GRADIENT)
    together = run_cases(2, {**EMA, "save_at": 3, "folder": str(tmp_path)}, GRADIENT)
    for one, other in zip(alone, together, strict=True):
        assert_equal_training(one, other)
        usage = one["names"].index("codebook_usage") + 2
        assert one["curve"][-1][usage] > one["curve"][0][usage], "no idle code was revived"
    (resumed,) = run_cases(2, {**EMA, "resume_from": str(next(tmp_path.glob("step-*")))})
    assert resumed["curve"] == together[0]["curve"][3:]
    assert (resumed["codes"], resumed["buffers"]) == (together[0]["codes"], together[0]["buffers"])


@pytest.mark.dist
@pytest.mark.slow
def test_codes_are_equal_on_four_ranks_and_at_every_zero_stage() -> None:
    game = {**EMA, "config": {**EMA["config"], "discriminator": GAME}}
    kinds = (EMA, GRADIENT, {**game, "losses": {**EMA["losses"], "discriminator": {}}})
    alone = run_cases(1, *kinds)
    for one, other in zip(alone, run_cases(LANES, *kinds), strict=True):
        assert_equal_training(one, other)
    stages = run_cases(2, *({**kind, "zero": zero} for zero in (0, 1, 2) for kind in kinds))
    for one, other in zip(3 * alone, stages, strict=True):
        assert_equal_training(one, other)


RUN: dict[str, Any] = {
    "run_dir": "runs/a",
    "data": {
        "tokenizer": {"kind": "sentencepiece", "path": "a"},
        "datasets": [],
        "lanes": 1,
        "packing": {"max_tokens": 64},
    },
    "evaluation": {"sets": [], "captions": None},
}
REFUSED = {
    "trained averages": ({"codebook_update": "ema"}, {}, "no optimizer trains the codes"),
    "no counts": (
        {"idle_counts": False},
        {"reconstruction": {"revive_after": 3}},
        "set model.image_tokenizer.idle_counts",
    ),
    "two tables": ({"normalized_codes": "decoding"}, {}, "train with always or never"),
    "no loss": ({}, {"reconstruction": {"l2": 0}}, "l1 and l2 are both 0"),
    "a loss of tokens": ({}, {"z_loss": 1e-4}, "the model has no logits of tokens"),
    "experts": ({}, {"upcycle": True}, "an image tokenizer has no experts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_do_not_fit_are_refused(case: str) -> None:
    tokenizer, stage, message = REFUSED[case]
    model = tokenizer_config(**tokenizer).model_dump(mode="json")
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate({**RUN, "model": model, "stages": [{"name": "a", "steps": 1, **stage}]})


def test_losses_of_images_need_an_image_tokenizer() -> None:
    decoder = {
        "vocab_size": 8,
        "hidden_dim": 8,
        "num_layers": 1,
        "attention": {"num_heads": 1},
        "mlp": {"kind": "dense", "hidden_dim": 8},
    }
    stage = {"name": "a", "steps": 1, "reconstruction": {}}
    with pytest.raises(ValidationError, match="reconstruction: needs an image tokenizer"):
        RunConfig.model_validate({**RUN, "model": {"decoder": decoder}, "stages": [stage]})
