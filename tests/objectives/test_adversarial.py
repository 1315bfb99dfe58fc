"""The adversarial loss of an image tokenizer: against formulas, and on several ranks with a resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mmscale.models.build import build_unset
from mmscale.models.config import TokenizerConfig
from mmscale.models.image_tokenizer_model import ImageTokenizerModel
from mmscale.nn.discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from mmscale.nn.init import initialise_
from mmscale.objectives.adversarial import discriminator_losses, generator_losses
from mmscale.objectives.reconstruction import Reconstruct, ReconstructionConfig
from tests.models.reference_models import distance
from tests.objectives.test_reconstruction import run_cases
from tests.objectives.tokenizers import GAME, lane_batch, tokenizer_config

LOSSES: dict[str, Any] = {"l1": 1.0, "l2": 0.5}


def fresh() -> ImageTokenizerModel:
    model = build_unset(tokenizer_config(discriminator=GAME))
    assert isinstance(model, ImageTokenizerModel)
    initialise_(model, 5)
    return model


def gradients_of(model: ImageTokenizerModel, losses: dict[str, Any], batches: list[Any]) -> dict[str, Tensor]:
    """Return the gradients of the losses of all batches, and let the objective finish the step."""
    model.zero_grad()
    objective = Reconstruct(ReconstructionConfig.model_validate(losses), model.config)
    outputs = [objective(model, batch) for batch in batches]
    for output in outputs:
        output.loss_sum.backward()
    sums = [torch.stack(parts).sum(0) for parts in zip(*(output.statistics for output in outputs), strict=True)]
    objective.after_step(model, sums, applied=True)
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("loss", ["hinge", "non_saturating"])
def test_losses_of_logits_by_their_definition(loss: Any) -> None:
    real, fake = 2 * torch.randn(2, 3, 1, 2, 2)

    def term(logit: float, sign: int) -> float:
        return max(0.0, 1 - sign * logit) if loss == "hinge" else math.log(1 + math.exp(-sign * logit))

    found, misled = discriminator_losses(real, fake, loss), generator_losses(fake, loss)
    for image in range(3):
        ones, zeros = real[image].flatten().tolist(), fake[image].flatten().tolist()
        expected = sum(0.5 * term(a, 1) + 0.5 * term(b, -1) for a, b in zip(ones, zeros, strict=True)) / 4
        assert found[image].item() == pytest.approx(expected, rel=1e-5)
        fooled = sum(-b if loss == "hinge" else term(b, 1) for b in zeros) / 4
        assert misled[image].item() == pytest.approx(fooled, rel=1e-5)


def test_each_player_gets_the_gradient_of_its_own_loss() -> None:
    """The truth: two backward passes of two losses, as two optimizers would take them."""
    model, batch = fresh(), lane_batch(tokenizer_config(discriminator=GAME), 0, 0)
    game = {"weight": 0.7, "adaptive": False, "loss": "non_saturating"}
    found = gradients_of(model, {**LOSSES, "discriminator": game}, [batch])
    expected = gradients_of(model, LOSSES, [batch])
    assert not any("discriminator" in name for name in expected)

    discriminator = model.discriminator
    assert discriminator is not None
    output = model(batch)
    parts = [parameter for name, parameter in model.named_parameters() if name in expected]
    misled = generator_losses(discriminator(output.reconstructions, frozen=False), "non_saturating").sum()
    added = torch.autograd.grad(misled, parts, retain_graph=True, allow_unused=True)
    judged = (discriminator(each, frozen=False) for each in (output.images, output.reconstructions.detach()))
    own = torch.autograd.grad(discriminator_losses(*judged, "non_saturating").sum(), list(discriminator.parameters()))
    for (name, gradient), more in zip(expected.items(), added, strict=True):
        whole = gradient if more is None else gradient + 0.7 * more
        assert torch.allclose(found[name], whole, rtol=1e-4, atol=1e-5), name
    for (name, _), gradient in zip(discriminator.named_parameters(), own, strict=True):
        assert distance(found[f"discriminator.{name}"], gradient) < 1e-5, name


def test_the_adaptive_weight_is_the_ratio_of_the_last_step() -> None:
    model = fresh()
    batches = [lane_batch(model.config, 0, lane) for lane in range(2)]
    adaptive = {**LOSSES, "discriminator": {"weight": 0.7}}
    first = gradients_of(model, adaptive, batches)
    for name, gradient in gradients_of(fresh(), LOSSES, batches).items():
        assert torch.equal(first[name], gradient), f"the first step only measures: {name}"

    # The truth: gradients of both losses of the whole step with respect to the weight of the last layer.
    discriminator, last = model.discriminator, model.image_tokenizer.decoder.conv_out.weight
    assert discriminator is not None
    pixels, misled = torch.zeros(()), torch.zeros(())
    for batch in batches:
        output = model(batch)
        difference = output.reconstructions - output.images
        pixels = pixels + (difference.abs() + 0.5 * difference.square()).flatten(1).mean(1).sum()
        misled = misled + generator_losses(discriminator(output.reconstructions, frozen=False), "hinge").sum()
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (pixels, misled)]
    ratio = float(norms[0] / norms[1])
    assert float(discriminator.adaptive_bits.view(torch.float32)) == pytest.approx(ratio, rel=1e-5)

    second = gradients_of(model, adaptive, batches)
    fixed = {**LOSSES, "discriminator": {"weight": 0.7 * ratio, "adaptive": False}}
    for name, gradient in gradients_of(fresh(), fixed, batches).items():
        assert torch.allclose(second[name], gradient, rtol=1e-4, atol=1e-5), name


def test_nothing_of_the_game_counts_before_its_start() -> None:
    model = fresh()
    losses = {**LOSSES, "discriminator": {"start_step": 2, "adaptive": False}}
    batch = lane_batch(model.config, 0, 0)
    plain = gradients_of(fresh(), LOSSES, [batch])
    for step in range(3):
        found = gradients_of(model, losses if step else LOSSES, [batch])  # A stage without the loss counts, too.
        moves = any(gradient.any() for name, gradient in found.items() if "discriminator" in name)
        assert moves == (step == 2)
        same = all(torch.equal(found[name], gradient) for name, gradient in plain.items())
        assert same == (step < 2)


def test_a_logit_sees_34_pixels_a_side_with_two_halvings(monkeypatch: pytest.MonkeyPatch) -> None:
    discriminator = PatchDiscriminator(PatchDiscriminatorConfig(base_dim=4, halvings=2, norm_groups=2), 3)
    initialise_(discriminator, 1)
    monkeypatch.setattr("torch.nn.functional.group_norm", lambda hidden, *_: hidden)  # It sees the whole image.
    image = torch.ones(1, 3, 96, 96, requires_grad=True)
    discriminator(image, frozen=False)[0, 0, 11, 11].backward()
    assert image.grad is not None
    rows = image.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == 34


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.resume
def test_both_players_are_equal_on_two_ranks_and_after_resumes_on_others(tmp_path: Path) -> None:
    losses = {"l1": 1.0, "ema_decay": 0.8, "revive_after": 2, "discriminator": {"start_step": 1}}
    case = {"config": {"codebook_update": "ema", "discriminator": GAME}, "losses": losses, "steps": 6}
    (alone,) = run_cases(1, case)
    (together,) = run_cases(2, {**case, "save_at": 3, "folder": str(tmp_path)})
    assert len(alone["curve"][0]) < len(alone["curve"][1]), "the start adds metrics"
    for one, other in zip(alone["curve"], together["curve"], strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
    saved = str(next(tmp_path.glob("step-*")))
    (resumed,) = run_cases(2, {**case, "resume_from": saved})
    assert resumed["curve"] == together["curve"][3:]
    assert (resumed["codes"], resumed["buffers"]) == (together["codes"], together["buffers"])
    # From two ranks to one, and from one to three: the state is the same, bit for bit.
    copy = {**case, "steps": 3, "save_at": 3, "folder": str(tmp_path / "alone"), "resume_from": saved}
    (at_one,) = run_cases(1, copy)
    (at_three,) = run_cases(3, {**case, "steps": 3, "resume_from": str(tmp_path / "alone" / "step-00000003")})
    for moved in (at_one, at_three):
        assert moved["state"] == together["state"] != ""
        assert moved["buffers"]["discriminator.steps"] == 3


REFUSED = {
    "no discriminator": (None, {"discriminator": {}}, ("all",), "set model.discriminator"),
    "frozen": (GAME, {"discriminator": {}}, ("encoder", "decoder"), "add discriminator to train"),
    "no loss": (GAME, {}, ("all",), "which has no loss"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_do_not_fit_are_refused(case: str) -> None:
    game, losses, trained, message = REFUSED[case]
    problem = ReconstructionConfig.model_validate(losses).problem(tokenizer_config(discriminator=game), trained)
    assert problem is not None
    assert message in problem


def test_an_image_without_a_patch_is_refused() -> None:
    values = tokenizer_config().model_dump(mode="json") | {"discriminator": {}}
    with pytest.raises(ValidationError, match="needs images of at least 24 pixels"):
        TokenizerConfig.model_validate(values)
