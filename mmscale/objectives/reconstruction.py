"""The losses of an image tokenizer: differences of pixels, and distances between latents and their codes.

    batch --model--> images, reconstructions, latents, codes --> loss of each image
                                                  \\--> counts and sums of the codes --engine, all ranks--> after_step

Source: van den Oord et al. 2017 (arXiv 1711.00937), equation 3; LlamaGen (arXiv 2406.06525), section 2.1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from data_pipeline.batch import MultimodalBatch
from data_pipeline.io.strict import StrictConfig
from mmscale.models.config import TokenizerConfig
from mmscale.models.image_tokenizer_model import ImageTokenizerModel
from mmscale.nn.codebook import code_statistics
from mmscale.objectives.outputs import ObjectiveOutput

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
        return None


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
    """Loss of each image: ``l1``, ``l2``, ``commitment`` and ``codebook`` terms.

    Args:
        config: Coefficients.
        model: The tokenizer that is trained.
    """

    teachers = ()

    def __init__(self, config: ReconstructionConfig, model: TokenizerConfig) -> None:
        self._config = config
        self._averaged = model.image_tokenizer.codebook_update == "ema"

    def weight(self, batch: MultimodalBatch) -> float:
        """Return the number of images: the divisor of ``loss_sum``. Does not run the model."""
        return float(len(batch.pairs))

    def __call__(self, model: ImageTokenizerModel, batch: MultimodalBatch) -> ObjectiveOutput:
        """Run the model on one microbatch and return the loss."""
        config, output = self._config, model(batch)
        latents, codes = (each.float() for each in (output.quantized.latents, output.quantized.codes))
        count = len(output.images)
        difference = (output.reconstructions.float() - output.images.float()).flatten(1)
        l1, l2 = difference.abs().mean(1), difference.square().mean(1)
        commitment = (latents - codes.detach()).square().reshape(count, -1).mean(1)
        losses = config.l1 * l1 + config.l2 * l2 + config.commitment * commitment
        if not self._averaged:
            losses = losses + config.codebook * (latents.detach() - codes).square().reshape(count, -1).mean(1)
        items, segments = batch.pairs.unbind(1)
        # Dummy images have weight 0: their modules run, and their gradients are zero.
        counted = losses.new_zeros(count).index_fill(0, items, 1.0)
        shown = (output.reconstructions.float().clamp(-1, 1) - output.images.float()).flatten(1).square().mean(1) / 4
        psnr = -10 * shown.clamp(min=_LEAST_ERROR).log10()
        sums = {"l1": l1, "l2": l2, "commitment": commitment, "psnr": psnr}
        documents = losses.detach().new_zeros(batch.segments.num)
        return ObjectiveOutput(
            losses @ counted,
            {name: values.detach() @ counted for name, values in sums.items()},
            documents.index_copy(0, segments, losses.detach().index_select(0, items)),
            statistics=code_statistics(
                output.quantized,
                model.image_tokenizer.codebook_size,
                counted.repeat_interleave(len(latents) // count),
            ),
        )

    def after_step(self, model: ImageTokenizerModel, statistics: Tensor, *, applied: bool) -> CodeChanges:
        """Return the metrics of the codes, and new values of some codes. Update the buffers of the codebook.

        Args:
            model: The model.
            statistics: Sum of ``ObjectiveOutput.statistics`` over all microbatches and ranks.
            applied: Whether the optimizer changed weights; if not, nothing changes here.
        """
        counts = statistics[:, 0].double()
        metrics = {"codebook_usage": float((counts > 0).double().mean()), "codebook_perplexity": _perplexity(counts)}
        codebook = model.image_tokenizer.codebook
        size = (model.image_tokenizer.codebook_size, statistics.shape[1] - 1)
        values, chosen = torch.zeros(size), torch.zeros(size[0], dtype=torch.bool)
        if applied:
            values, chosen = codebook.update(statistics, self._config.ema_decay, self._config.revive_after)
        return CodeChanges(metrics, "image_tokenizer.codebook.weight", values, chosen)


def _perplexity(counts: Tensor) -> float:
    """Return the exponential of the entropy of the codes: K if all are used equally, 1 if one is."""
    return float(torch.special.entr(counts / counts.sum().clamp(min=1)).sum().exp())
