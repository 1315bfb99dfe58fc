"""The frozen reference model of a preference stage, for the command that stores its log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data_pipeline.document import Document
from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing.collate import collate
from data_pipeline.packing.packer import Pack
from mmscale.checkpoint.load import load_weights
from mmscale.checkpoint.manifest import model_config_of, newest_of, read_manifest
from mmscale.engine.precision import choose_precision
from mmscale.errors import ConfigError
from mmscale.models.build import build_unset
from mmscale.models.multimodal import MultimodalModel
from mmscale.nn.attention_backends import AttentionChoice
from mmscale.objectives.preference import answer_log_probs, pair_places
from mmscale.run.config import RunConfig
from mmscale.run.folder import CHECKPOINTS
from mmscale.run.stage_teachers import reference_checksum, reference_is_previous, reference_source, unfit


def preference_stage(config: RunConfig, name: str | None) -> int:
    """Return the number of the stage called ``name``, or of the only stage with ``preference``.

    Raises:
        ConfigError: there is no such stage, it has no preference loss or no reference, or there are several.
    """
    found = [n for n, each in enumerate(config.stages) if each.preference and name in (None, each.name)]
    if len(found) != 1:
        stages = ", ".join(each.name for each in config.stages if each.preference)
        if not stages:
            raise ConfigError("no stage has the block preference; give the configuration of a run that has one")
        raise ConfigError(f"--stage{f' {name}' if name else ''}: the stages with preference are {stages}; name one")
    preference = config.stages[found[0]].preference
    assert preference is not None, "selected above"
    if preference.reference == "none":
        raise ConfigError(f"stages.{found[0]}.preference.reference=none: the loss has no reference model")
    return found[0]


@dataclass
class CheckpointReference:
    """Computes the log-probabilities of pairs with the weights of a checkpoint: a ``ReferenceModel``.

    A process loads the weights in its first call, and then computes with one thread: sums depend on the number of
    threads, and the values must not depend on the number of processes.
    """

    checkpoint: Path
    ema: bool
    checksum: str
    device: str
    dtype: torch.dtype
    attention: AttentionChoice
    spec: MediaSpec
    max_tokens: int
    """Largest number of tokens of a batch."""
    _model: MultimodalModel | None = field(default=None, repr=False, compare=False)

    @classmethod
    def open(cls, config: RunConfig, stage: int, device: str) -> CheckpointReference:
        """Find and check the reference model of a stage. Reads no weights.

        If the reference is the end of the stage before, the run's newest checkpoint must be that end.

        Raises:
            CheckpointError: there is no checkpoint.
            ConfigError: the model does not fit the stage, the run's newest checkpoint is not the end of the stage
                before, or this machine has no such device.
        """
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # An AssertionError: torch was built without CUDA.
            raise ConfigError(f"device {device}: {str(error).partition(chr(10))[0]}") from error
        (source,) = reference_source(config, stage)
        is_previous = reference_is_previous(config, stage)
        path = newest_of(config.run_dir / CHECKPOINTS if is_previous else source.checkpoint)
        manifest = read_manifest(path)
        reason = unfit(manifest, path, config.decoder_model(stage), source, distills=False)
        end = (stage - 1, config.stages[stage - 1].steps)
        if is_previous and (manifest.state.stage_index, manifest.state.stage_step) != end:
            begun = config.stages[manifest.state.stage_index].name
            reason = (
                f"it is step {manifest.state.stage_step} of stage {begun}, and "
                f"the reference is the end of stage {config.stages[stage - 1].name}; let the run save there first "
                f"(max_steps={sum(each.steps for each in config.stages[:stage])})"
            )
        if reason is not None:
            raise ConfigError(f"stages.{stage}.preference.reference={path}: {reason}")
        return cls(
            path,
            source.ema,
            reference_checksum(path, source.ema),
            device,
            choose_precision(config.engine, torch.device(device)).dtype,
            config.engine.attention,
            config.stage_media(stage),
            config.stage_data(stage).packing.max_tokens,
        )

    def __call__(self, documents: Sequence[Document]) -> list[tuple[float, float]]:
        if self._model is None:
            torch.set_num_threads(1)
            self._model = self._load()
        found, batch, tokens = list[tuple[float, float]](), list[Document](), 0
        for document in documents:
            if batch and tokens + document.num_tokens > self.max_tokens:
                found += self._log_probs(batch)
                batch, tokens = [], 0
            batch.append(document)
            tokens += document.num_tokens
        return found + (self._log_probs(batch) if batch else [])

    def _load(self) -> MultimodalModel:
        model = build_unset(
            model_config_of(read_manifest(self.checkpoint), self.checkpoint), attention=self.attention, dtype=self.dtype
        )
        assert isinstance(model, MultimodalModel), "``unfit`` has checked the model"
        model.to(self.dtype)
        load_weights(model, self.checkpoint, ema=self.ema)
        return model.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def _log_probs(self, documents: list[Document]) -> list[tuple[float, float]]:
        assert self._model is not None, "loaded by the caller"
        batch = collate([Pack(tuple(documents), 0)], self.spec)
        places = pair_places(batch)
        batch = self._model.with_codes(batch.to(self.device))
        values = answer_log_probs(self._model, self._model(batch).hidden, batch).tolist()
        return [(values[a], values[b]) for a, b in zip(places.chosen, places.rejected, strict=True)]
