"""Score the units of the larger model on calibration data, and measure the loss of a model on held-out documents.

Runs in one process, on the GPU if there is one, one batch at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from data_pipeline.batch import MultimodalBatch
from data_pipeline.loader.loader import Loader
from data_pipeline.text.tokenizer import load_tokenizer
from mmscale.checkpoint import load_weights, read_manifest
from mmscale.dist import World
from mmscale.errors import CheckpointError, ConfigError
from mmscale.evaluate import PerplexitySet, evaluate
from mmscale.evaluate.result import PerplexityResult
from mmscale.models.build import build_model, media_spec
from mmscale.models.config import ModelConfig
from mmscale.models.multimodal import MultimodalModel
from mmscale.prune.activations import scores_of_activations
from mmscale.prune.scores import Scores
from mmscale.run.config import RunConfig


@dataclass(frozen=True)
class Calibration:
    """Calibration data.

    Attributes:
        run: Run whose ``data`` block gives the batches, from its first step. Its held-out sets of kind ``perplexity``
            are scored before and after pruning. Its model and stages are not used.
        batches: Number of calibration batches. Each batch is a pack of one lane.
    """

    run: RunConfig
    batches: int

    def check(self, config: ModelConfig) -> None:
        """Check that the tokenizer of the data fits a model.

        Raises:
            ConfigError: the tokenizer has more ids than the model.
        """
        tokens = load_tokenizer(self.run.data.tokenizer).vocab_size
        if tokens > config.decoder.num_ids:
            raise ConfigError(
                f"the calibration data's tokenizer has {tokens} ids, but the source has only {config.decoder.num_ids}: "
                "give the tokenizer that the source was trained with (data.tokenizer)"
            )

    def scores(self, model: MultimodalModel) -> tuple[Scores, int]:
        """Score every unit of the decoder. Return the scores and the number of tokens over which they are means.

        Raises:
            ConfigError: the data have no valid token.
            DataPipelineError: the data are missing or damaged.
        """
        device = next(model.parameters()).device
        batches = islice(_batches(self.run, model.config), self.batches)
        return scores_of_activations(model, (batch.to(device) for batch in batches))

    def losses(self, model: MultimodalModel) -> dict[str, float]:
        """Return the mean loss on each held-out set; empty for a model with vision, because only its decoder is pruned.

        Raises:
            ConfigError: a set cannot be scored as configured.
            DataPipelineError: a file is missing or damaged.
        """
        if model.config.vision is not None:
            return {}
        chosen = tuple(held for held in self.run.evaluation.sets if isinstance(held, PerplexitySet))
        evaluation = self.run.evaluation.model_copy(update={"sets": chosen})
        world = World(0, 1, 0, next(model.parameters()).device)
        results = evaluate(model, evaluation, self.run.data, media_spec(model.config), world)
        return {name: result.loss for name, result in results.items() if isinstance(result, PerplexityResult)}


def load_model(path: Path, config: ModelConfig) -> MultimodalModel:
    """Load the model of a checkpoint in evaluation mode, bf16 if its run was, else fp32; the EMA weights if it has any.

    Raises:
        CheckpointError: the checkpoint is damaged, of another model, or of a contrastive model.
    """
    manifest = read_manifest(path)
    dtype, usual = torch.bfloat16 if manifest.precision == "bf16" else torch.float32, torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # Building the model first and casting it later would hold it in memory twice.
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = build_model(config, seed=None, dtype=dtype)
    finally:
        torch.set_default_dtype(usual)
    if not isinstance(model, MultimodalModel):
        raise CheckpointError(
            f"{path} holds a contrastive model, which predicts no tokens; prune it by its weights (without --data)"
        )
    load_weights(model, path, ema=manifest.ema)
    return model.eval()


def _batches(run: RunConfig, config: ModelConfig) -> Iterator[MultimodalBatch]:
    data = run.data.model_copy(update={"workers": 0})  # A worker process costs more than it saves for few batches.
    with Loader(data, media_spec(config), seed=run.seed) as loader:
        for step in loader:
            if not step.num_samples and step.exhausted:
                return
            yield from step.microbatches
