"""The adversarial loss of an image tokenizer, whose two players learn in one backward pass.

    images, detached reconstructions --discriminator--------> its own loss: gradients of its parameters
    reconstructions --discriminator, parameters detached----> adversarial term: gradient of the reconstructions
                                     MeasuredFork: gradient = that of the other terms + weight * that of this term

Neither loss has a gradient for the other player, so one backward pass computes the gradients of both, and one step of
the optimizer updates both from the same reconstructions and the same discriminator. LlamaGen's training does the same
with two optimizers: the discriminator's update reads the reconstructions from before the tokenizer's update. VQGAN
alternates and computes the reconstructions again.

The adaptive weight is the ratio of two gradient norms at the last layer of the decoder (VQGAN, equation 7). The ratio
of a step is known when its backward passes on all ranks are over. So each step uses the ratio of the step before: the
result then depends neither on the number of ranks nor on that of microbatches, and no pass is computed twice. The
published code computes another ratio for each rank. A ratio has no unit, so loss scales cancel.

Source: Esser et al. 2021, "Taming transformers" (VQGAN), section 3.1; Lim and Ye 2017, "Geometric GAN" (hinge);
Goodfellow et al. 2014, section 3 (non-saturating); Mescheder et al. 2018, "Which training methods for GANs do actually
converge?", section 2 (simultaneous and alternating updates).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from data_pipeline.io.strict import StrictConfig
from mmscale.nn.discriminator import PatchDiscriminator

_MOST_ADAPTIVE = 1e4
"""Largest adaptive weight, as in the published code of VQGAN."""

GameLoss = Literal["hinge", "non_saturating"]


class AdversarialConfig(StrictConfig):
    """An adversarial loss: a discriminator learns to tell reconstructions from images, and the tokenizer to mislead it.

    The model needs ``model.discriminator``, and ``train`` must contain ``discriminator``.
    """

    weight: float = Field(default=0.8, gt=0)
    """Coefficient of the adversarial term of the tokenizer, above 0 (VQGAN: 0.8; LlamaGen: 0.5, not adaptive)."""
    adaptive: bool = True
    """Multiply ``weight`` by the norm of the gradient of the terms of pixels (l1, l2, perceptual) divided by that of
    the adversarial term, both at the decoder's last layer in the step before, and at most 10,000. The first step of the
    discriminator measures the norms and has no adversarial term."""
    start_step: int = Field(default=0, ge=0, le=1 << 40)
    """Steps of training before the discriminator starts, counted over all stages of the run; at least 0. Until then
    neither player has an adversarial loss (LlamaGen: 20000). Its gradients are then 0, but the optimizer runs, as in
    VQGAN's code: weight decay applies, and ``warmup_steps`` counts from the beginning of the stage."""
    loss: GameLoss = "hinge"
    """``hinge``, or ``non_saturating`` (softplus)."""


def discriminator_losses(real: Tensor, fake: Tensor, loss: GameLoss) -> Tensor:
    """Return the discriminator's loss of each image, ``(N,)``: half for the image, half for its reconstruction.

    Args:
        real: Logits of the images, ``(N, 1, h, w)``.
        fake: Logits of the reconstructions, of the same shape.
        loss: Kind of loss.
    """
    if loss == "hinge":
        return 0.5 * (F.relu(1 - real) + F.relu(1 + fake)).flatten(1).mean(1)
    return 0.5 * (F.softplus(-real) + F.softplus(fake)).flatten(1).mean(1)


def generator_losses(fake: Tensor, loss: GameLoss) -> Tensor:
    """Return the adversarial term of each reconstruction, ``(N,)``, from its logits ``(N, 1, h, w)``."""
    return (-fake if loss == "hinge" else F.softplus(-fake)).flatten(1).mean(1)


class MeasuredFork(torch.autograd.Function):
    """Passes images to two losses. Measures the gradient of each loss at the convolution that made the images.

    The backward pass returns the sum of both gradients, the second one multiplied by ``weight``. It adds to ``sums``
    the gradient of the convolution's weight that each of the two alone would cause, ``weight`` left out.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, inputs: Tensor, weight: float, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images twice.

        Args:
            ctx: State for the backward pass.
            images: ``(N, channels, H, W)``.
            inputs: ``(N, C, H, W)``, inputs of the convolution of 3 x 3 with stride 1.
            weight: Of the second loss.
            sums: float64 ``(2, channels * C * 9)``. Mutated by the backward pass.
        """
        ctx.save_for_backward(inputs)
        ctx.weight, ctx.sums = weight, sums
        return images.view_as(images), images.view_as(images)

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor, None, None, None]:
        (inputs,) = ctx.saved_tensors
        shape = (first.shape[1], inputs.shape[1], 3, 3)
        for total, gradient in zip(ctx.sums, (first, second), strict=True):
            weights = conv2d_weight(inputs.float(), shape, gradient.float(), padding=1)
            total.add_(weights.flatten().double())
        return first + ctx.weight * second, None, None, None


class Turn(NamedTuple):
    """The adversarial losses of a microbatch.

    Attributes:
        reconstructions: The reconstructions, for the other terms of the loss.
        losses: ``(N,)``, the discriminator's loss and the weighted adversarial term of each image. Their values are not
            comparable with other terms: only their gradients count.
        metrics: Values of each image by name, ``(N,)`` each; none before the start.
        sums: float64, see ``MeasuredFork``; complete after the backward pass.
    """

    reconstructions: Tensor
    losses: Tensor
    metrics: dict[str, Tensor]
    sums: Tensor


class Adversarial:
    """Computes the adversarial losses.

    Args:
        config: Settings.
    """

    def __init__(self, config: AdversarialConfig) -> None:
        self._config = config

    def __call__(
        self, discriminator: PatchDiscriminator, images: Tensor, reconstructions: Tensor, last_inputs: Tensor
    ) -> Turn:
        """Return the losses of a microbatch.

        Before the start the discriminator runs on one image with weight 0, so that all its modules run.

        Args:
            discriminator: Waits or judges, depending on its ``steps``.
            images: ``(N, channels, H, W)``.
            reconstructions: Of the same shape.
            last_inputs: ``(N, C, H, W)``, inputs of the decoder's last convolution.
        """
        config, count = self._config, len(images)
        started = int(discriminator.steps) >= config.start_step
        weight = config.weight * (adaptive_weight(discriminator) if config.adaptive else 1.0)
        sums = reconstructions.new_zeros(2, images.shape[1] * last_inputs.shape[1] * 9, dtype=torch.float64)
        if not started:
            images, misleading = images[:1], reconstructions[:1]
        elif config.adaptive:
            reconstructions, misleading = MeasuredFork.apply(reconstructions, last_inputs.detach(), weight, sums)
        else:
            misleading = reconstructions * 1.0
        judged = torch.cat([images, misleading.detach()])
        real, fake = discriminator(judged, frozen=False).float().chunk(2)
        learned = discriminator_losses(real, fake, config.loss)
        misled = generator_losses(discriminator(misleading, frozen=True).float(), config.loss)
        if not started:
            return Turn(reconstructions, 0.0 * (learned + misled).expand(count), {}, sums)
        metrics = {
            "disc_real": real.detach().flatten(1).mean(1),
            "disc_fake": fake.detach().flatten(1).mean(1),
            "disc_loss": learned.detach(),
            "adversarial": misled.detach(),
        }
        # The fork has weighted the gradient of an adaptive term.
        return Turn(reconstructions, learned + (misled if config.adaptive else weight * misled), metrics, sums)

    def after_step(self, discriminator: PatchDiscriminator, sums: Tensor, *, applied: bool) -> dict[str, float]:
        """Keep the ratio of gradient norms of the step. Return the metrics of the whole step.

        Args:
            discriminator: Its ``adaptive_bits`` change if ``applied``. The caller counts its ``steps``.
            sums: ``Turn.sums``, added over all microbatches and ranks.
            applied: Whether the optimizer changed weights.
        """
        metrics = {}
        ratio = None
        if self._config.adaptive and int(discriminator.steps) >= self._config.start_step:
            pixels, misled = sums.norm(dim=1).tolist()
            ratio = min(pixels / misled, _MOST_ADAPTIVE) if misled else 0.0
            metrics["adaptive_weight"] = ratio
        if applied and ratio is not None:
            discriminator.adaptive_bits.copy_(torch.tensor(ratio, dtype=torch.float32).view(torch.int32))
        return metrics


def adaptive_weight(discriminator: PatchDiscriminator) -> float:
    """Return the ratio of gradient norms of the last step that measured it; 0 before the first."""
    return float(discriminator.adaptive_bits.cpu().view(torch.float32))


@contextmanager
def recorded_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Record the first argument of each call of ``module`` while the context is open."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()
