"""The losses of an image tokenizer: of pixels, of features, of codes, and of a discriminator.

    batch --model--> images, reconstructions, latents, codes --> loss of each image
                                                  \\--> counts and sums of the codes --engine, all ranks--> after_step

Source: van den Oord et al. 2017 (arXiv 1711.00937), equation 3; LlamaGen (arXiv 2406.06525), section 2.1. The losses of
features and of a discriminator have modules of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from data_pipeline.batch import MultimodalBatch
from data_pipeline.io.strict import StrictConfig
from mmscale.models.config import TokenizerConfig
from mmscale.models.image_tokenizer_model import ImageTokenizerModel, Reconstruction
from mmscale.nn.codebook import code_statistics
from mmscale.objectives.adversarial import Adversarial, AdversarialConfig, recorded_inputs
from mmscale.objectives.base import ObjectiveOutput
from mmscale.objectives.perceptual import PerceptualConfig, PerceptualTower

_LEAST_ERROR = 1e-10
"""Smallest mean squared error of an image in the PSNR, which is then 100 dB."""


class ReconstructionConfig(StrictConfig):
    """Losses of an image tokenizer. Pixels are in [-1, 1]; each term is a mean over an image."""

    l1: float = Field(default=0.0, ge=0)
    """Coefficient of the absolute difference of pixels; 0 for none."""
    l2: float = Field(default=1.0, ge=0)
    """Coefficient of the squared difference of pixels; 0 for none."""
    commitment: float = Field(default=0.25, ge=0)
    """Coefficient of the squared distance of a latent to its code, whose gradient moves the latent."""
    codebook: float = Field(default=1.0, ge=0)
    """Coefficient of the same distance with a gradient that moves the code. Not used with ``codebook_update: ema``."""
    ema_decay: float = Field(default=0.99, gt=0, lt=1)
    """Decay per step of the moving averages with ``codebook_update: ema``; above 0 and below 1."""
    revive_after: int | None = Field(default=None, ge=1)
    """Replace a code that no latent has chosen for this many steps by one near a busy code; null: never. Needs
    ``image_tokenizer.idle_counts: true``."""
    discriminator: AdversarialConfig | None = None
    """Adversarial loss of ``model.discriminator``; null for none."""
    perceptual: PerceptualConfig | None = None
    """Distance of features in a frozen vision tower; null for none."""

    def problem(self, model: TokenizerConfig, trained: tuple[str, ...]) -> str | None:
        """Return why a stage that trains these components cannot train the tokenizer with these losses, or None."""
        tokenizer = model.image_tokenizer
        if getattr(tokenizer, "normalized_codes", None) == "decoding":
            return (
                "model.image_tokenizer.normalized_codes=decoding: the search and the decoder would read different "
                "codes; train with always or never"
            )
        if tokenizer.codebook_update == "ema" and {"all", "codebook"} & set(trained):
            return "image_tokenizer.codebook_update=ema: no optimizer trains the codes; set train: [encoder, decoder]"
        if self.revive_after is not None and not tokenizer.idle_counts:
            return f"reconstruction.revive_after={self.revive_after}: set model.image_tokenizer.idle_counts: true"
        if not self.l1 and not self.l2:
            return "reconstruction: l1 and l2 are both 0, so the decoder would learn nothing"
        return self._discriminator_problem(model, bool({"all", "discriminator"} & set(trained)))

    def _discriminator_problem(self, model: TokenizerConfig, trained: bool) -> str | None:
        """Return why the discriminator cannot be trained, or None; ``trained``: whether ``train`` contains it."""
        if self.discriminator is None:
            if trained and model.discriminator is not None:
                return "train contains discriminator, which has no loss: set reconstruction.discriminator: {}"
            return None
        if model.discriminator is None:
            return "reconstruction.discriminator: the model has no discriminator; set model.discriminator: {}"
        return None if trained else "reconstruction.discriminator: add discriminator to train, so that it learns"


class CodeChanges(NamedTuple):
    """What a step changes besides the optimizer.

    Attributes:
        metrics: Metrics of the whole step.
        parameter: Name of the parameter whose rows are written.
        values: float32, shape of the parameter.
        chosen: bool, one for each row: whether it is written.
    """

    metrics: dict[str, float]
    parameter: str
    values: Tensor
    chosen: Tensor


class Reconstruct:
    """Loss of each image: ``l1``, ``l2``, ``commitment``, ``codebook``, perceptual and adversarial terms.

    The value of the loss leaves out the discriminator's loss and the adversarial term, whose gradients it includes:
    their values do not measure progress, and their start would look like a loss spike.

    Args:
        config: Coefficients.
        model: The tokenizer that is trained.
        teachers: The tower of ``config.perceptual``; empty without one.
    """

    def __init__(
        self, config: ReconstructionConfig, model: TokenizerConfig, teachers: Sequence[PerceptualTower] = ()
    ) -> None:
        if len(teachers) != (config.perceptual is not None):
            raise ValueError(f"reconstruction.perceptual={config.perceptual}: {len(teachers)} towers were loaded")
        self._config, self.teachers = config, tuple(teachers)
        self._averaged = model.image_tokenizer.codebook_update == "ema"
        self._adversarial = None if config.discriminator is None else Adversarial(config.discriminator)

    def weight(self, batch: MultimodalBatch) -> float:
        """Return the number of images: the divisor of ``loss_sum``. Does not run the model."""
        return float(len(batch.pairs))

    def __call__(self, model: ImageTokenizerModel, batch: MultimodalBatch) -> ObjectiveOutput:
        """Run the model on one microbatch and return the loss."""
        with recorded_inputs(model.image_tokenizer.decoder.conv_out) as last_inputs:
            output = model(batch)
        count = len(output.images)
        items, segments = batch.pairs.unbind(1)
        # Dummy images have weight 0: their modules run, and their gradients are zero.
        counted = torch.zeros(count, device=output.images.device).index_fill(0, items, 1.0)
        tokens = counted.repeat_interleave(len(output.quantized.tokens) // count)
        statistics = [code_statistics(output.quantized, model.image_tokenizer.codebook_size, tokens)]
        reconstructions, turn = output.reconstructions, None
        if self._adversarial is not None:
            assert model.discriminator is not None, "the configuration was checked"
            turn = self._adversarial(model.discriminator, output.images, reconstructions, last_inputs[0])
            reconstructions = turn.reconstructions
        losses, metrics = self._losses(output, reconstructions.float())
        loss_sum = losses @ counted
        if turn is not None:
            statistics.append(turn.sums)
            metrics |= turn.metrics
            game = turn.losses @ counted
            loss_sum = loss_sum + (game - game.detach())
        documents = losses.detach().new_zeros(batch.segments.num)
        return ObjectiveOutput(
            loss_sum,
            {name: values.detach() @ counted for name, values in metrics.items()},
            documents.index_copy(0, segments, losses.detach().index_select(0, items)),
            statistics=tuple(statistics),
        )

    def _losses(self, output: Reconstruction, reconstructions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each image and the values of its terms, ``(N,)`` each, without adversarial terms."""
        config, count = self._config, len(output.images)
        latents, codes = (each.float() for each in (output.quantized.latents, output.quantized.codes))
        difference = (reconstructions - output.images.float()).flatten(1)
        l1, l2 = difference.abs().mean(1), difference.square().mean(1)
        commitment = (latents - codes.detach()).square().reshape(count, -1).mean(1)
        losses = config.l1 * l1 + config.l2 * l2 + config.commitment * commitment
        if not self._averaged:
            losses = losses + config.codebook * (latents.detach() - codes).square().reshape(count, -1).mean(1)
        shown = (reconstructions.clamp(-1, 1) - output.images.float()).flatten(1).square().mean(1) / 4
        psnr = -10 * shown.clamp(min=_LEAST_ERROR).log10()
        metrics = {"l1": l1, "l2": l2, "commitment": commitment, "psnr": psnr}
        if config.perceptual is not None:
            metrics["perceptual"] = self.teachers[0](output.images, reconstructions)
            losses = losses + config.perceptual.weight * metrics["perceptual"]
        return losses, metrics

    def after_step(self, model: ImageTokenizerModel, statistics: Sequence[Tensor], *, applied: bool) -> CodeChanges:
        """Return the metrics of the codes, and new values of some codes. Update the buffers of the model.

        Args:
            model: The model.
            statistics: Sum of ``ObjectiveOutput.statistics`` over all microbatches and ranks.
            applied: Whether the optimizer changed weights; if not, nothing changes here.
        """
        codes, codebook = statistics[0], model.image_tokenizer.codebook
        counts = codes[:, 0].double()
        metrics = {"codebook_usage": float((counts > 0).double().mean()), "codebook_perplexity": _perplexity(counts)}
        if self._adversarial is not None:
            assert model.discriminator is not None
            metrics |= self._adversarial.after_step(model.discriminator, statistics[1], applied=applied)
        if applied and model.discriminator is not None:
            model.discriminator.steps += 1  # Also in a stage without an adversarial loss.
        size = (model.image_tokenizer.codebook_size, codes.shape[1] - 1)
        values, chosen = torch.zeros(size), torch.zeros(size[0], dtype=torch.bool)
        if applied:
            values, chosen = codebook.update(codes, self._config.ema_decay, self._config.revive_after)
        return CodeChanges(metrics, "image_tokenizer.codebook.weight", values, chosen)


def _perplexity(counts: Tensor) -> float:
    """Return the exponential of the entropy of the codes: K if all are used equally, 1 if one is."""
    return float(torch.special.entr(counts / counts.sum().clamp(min=1)).sum().exp())
