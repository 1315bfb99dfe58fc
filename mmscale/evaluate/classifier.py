"""A contrastive run as a classifier of images: which of some names is nearest to an image?

    RUN/config.yaml --tokenizer, transforms--+
    RUN/checkpoints/step-N --weights---------+--> Classifier: images, names --> vectors --> log-probabilities

Each rank holds the whole model: a classifier is small. The ranks share the images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from data_pipeline.config import DataConfig
from data_pipeline.images.decode import Pixels
from data_pipeline.io.strict import StrictConfig
from data_pipeline.sample import ImagePart, Provenance, Sample
from data_pipeline.text.tokenizer import load_tokenizer
from mmscale.checkpoint import load_weights
from mmscale.checkpoint.manifest import manifest_checksum, model_config_of, newest_of, read_manifest
from mmscale.config.layers import RUN_CONFIG, read_layers
from mmscale.config.tree import DEFAULT, ConfigNode
from mmscale.config.validate import validate
from mmscale.dist import World
from mmscale.errors import CheckpointError, ConfigError
from mmscale.evaluate.config import EvaluationConfig, HeldOutSet
from mmscale.evaluate.heldout import EvaluationContext
from mmscale.evaluate.similarity import Vectors, pair_vectors
from mmscale.metrics.sample_images import encode_png
from mmscale.models.build import build_model, media_spec
from mmscale.models.config import ModelConfig
from mmscale.models.connectors.contrastive import ContrastiveConnectorConfig
from mmscale.models.contrastive import ContrastiveModel


class _Run(StrictConfig):
    """The block of a run's ``config.yaml`` that a classifier needs."""

    data: DataConfig


@dataclass(frozen=True)
class Classifier:
    """Compares images with names by the vectors of a contrastive model. Created by ``open``.

    Attributes:
        context: The model, and the tokenizer and the transforms that it was trained with.
        held: Gives the format of a name, and the name for messages.
        digest: Checksum of the manifest of the checkpoint, 8 hexadecimal digits. It identifies all weights.
    """

    context: EvaluationContext
    held: HeldOutSet
    digest: str

    @classmethod
    def open(
        cls,
        path: Path,
        world: World,
        *,
        template: str = "{value}",
        name: str = "classifier",
        tokens_per_forward: int = 8192,
    ) -> Classifier:
        """Load the newest checkpoint of a run, or one checkpoint: its averaged weights (EMA) if it has them.

        Every rank loads the whole model onto its device and verifies the checkpoint.

        Args:
            path: Run folder, or a checkpoint in it, of a model with ``connector.kind=contrastive``. The block ``data``
                of the run's ``config.yaml`` gives the tokenizer, and the transforms of the first data set.
            world: Ranks that share the images.
            template: Format string of the text that is compared with an image; it contains ``{value}`` exactly once.
            name: Name for messages.
            tokens_per_forward: Largest number of tokens and patches in one forward pass.

        Raises:
            ConfigError: there is no checkpoint, or it is damaged; the model is not contrastive; or the folder of the
                run has no ``config.yaml``.
        """
        checkpoint, model_config = _contrastive(path)
        data = _data_of(path, checkpoint)
        with torch.random.fork_rng(devices=[]):  # Training continues with the random state that it had.
            model = build_model(model_config, seed=None)
        try:
            load_weights(model, checkpoint, ema=read_manifest(checkpoint).ema)
        except CheckpointError as error:
            raise ConfigError(f"classifier={path}: {error}") from error
        model = model.to(world.device).eval().requires_grad_(False)
        config = EvaluationConfig(tokens_per_forward=tokens_per_forward, captions=None)
        tokenizer, spec = load_tokenizer(data.tokenizer), media_spec(model_config)
        held = HeldOutSet(name=name, manifest=path, field="name", template=template)
        context = EvaluationContext(model, config, data, tokenizer, spec, world)  # type: ignore[arg-type]
        return cls(context, held, manifest_checksum(checkpoint))

    @property
    def scale(self) -> float:
        """The learned factor on similarities, at most ``connector.max_scale``."""
        model = cast(ContrastiveModel, self.context.model)
        most = cast(ContrastiveConnectorConfig, model.config.connector).max_scale
        return min(math.exp(float(model.connector.logit_scale)), most)

    def vectors(self, images: Sequence[Sample], names: Sequence[str]) -> tuple[Vectors, Vectors]:
        """Return the vectors of images and of names, float64 of norm 1, the same on every rank. All ranks must call.

        Args:
            images: Samples with one image each; at least one.
            names: Names; at least one.

        Returns:
            Arrays ``(images, C)`` and ``(names, C)``.

        Raises:
            DataPipelineError: an image is damaged, or a sample does not have exactly one. Every rank raises.
        """
        # A document needs an image and a text: repeat the last item of the shorter list and ignore its vectors.
        texts = [{"prompt": "", "answer": self.held.template.format(value=name)} for name in names]
        documents = [
            replace(images[min(number, len(images) - 1)], fields=texts[min(number, len(texts) - 1)])
            for number in range(max(len(images), len(texts)))
        ]
        of_images, of_names = pair_vectors(self.context, self.held, documents)
        return of_images[: len(images)], of_names[: len(names)]

    def name_vectors(self, names: Sequence[str]) -> Vectors:
        """Return the vectors of names, as ``vectors`` does; the image beside them is black. All ranks must call."""
        return self.vectors([as_sample(np.zeros((64, 64, 3), np.uint8))], names)[1]

    def name_log_probabilities(
        self,
        images: Sequence[Pixels],
        names: Sequence[str],
        candidates: Sequence[str],
        of_candidates: Vectors | None = None,
    ) -> npt.NDArray[np.float64]:
        """Return log P(right name | image) among ``candidates``, to rank drawings. All ranks must call.

        The probability is a softmax over the scaled similarities of the image with all candidates, as in training with
        ``connector.loss=softmax``.

        Args:
            images: uint8 ``(H, W, 3)`` each, of any size. Several drawings of one prompt are consecutive images.
            names: Right name of each image; each is one of ``candidates``.
            candidates: At least two different names.
            of_candidates: ``name_vectors(candidates)``, for a caller with several calls; None computes them.

        Returns:
            float64 ``(images,)``, nats, the same on every rank.

        Raises:
            ConfigError: a name is no candidate, a candidate is empty or repeated, or the lists differ in length.
        """
        missing = sorted(set(names) - set(candidates))
        if missing or len(names) != len(images):
            raise ConfigError(
                f"{len(images)} images and {len(names)} names, of which {missing[:3]} are no candidates; give each "
                "image one name, and list all names as candidates"
            )
        if len(set(candidates)) != len(candidates) or len(candidates) < 2 or not all(map(str.strip, candidates)):
            raise ConfigError(
                f"{len(candidates)} candidates: expected at least two different names, none of them empty"
            )
        if not images:
            return np.empty(0)
        of_names = self.name_vectors(candidates) if of_candidates is None else of_candidates
        of_images, _ = self.vectors([as_sample(image) for image in images], candidates[:1])
        logits = self.scale * of_images @ of_names.T
        number_of = {name: number for number, name in enumerate(candidates)}
        right = logits[np.arange(len(names)), [number_of[name] for name in names]]
        peak = logits.max(1)
        log_probabilities: npt.NDArray[np.float64] = right - peak - np.log(np.exp(logits - peak[:, None]).sum(1))
        return log_probabilities


def check_classifier(path: Path) -> Path:
    """Return the checkpoint that ``Classifier.open`` would load, after checking that its run is contrastive.

    Reads no weights.

    Raises:
        ConfigError: as ``Classifier.open``; files of weights are not verified.
    """
    checkpoint, _ = _contrastive(path)
    load_tokenizer(_data_of(path, checkpoint).tokenizer)
    return checkpoint


def as_sample(image: Pixels) -> Sample:
    """Return a sample with one image, PNG of uint8 ``(H, W, 3)``."""
    return Sample((ImagePart(encode_png(image), "png"),), {}, Provenance("drawings", "drawings", "?", 0))


def _contrastive(path: Path) -> tuple[Path, ModelConfig]:
    """Return the checkpoint that ``path`` means, and the configuration of its contrastive model."""
    try:
        checkpoint = newest_of(path)
        config = model_config_of(read_manifest(checkpoint), checkpoint)
    except CheckpointError as error:
        raise ConfigError(f"classifier={path}: {error}; train one with configs/recipes/emoji-contrast.yaml") from error
    connector = config.connector if isinstance(config, ModelConfig) else None
    if not isinstance(config, ModelConfig) or not isinstance(connector, ContrastiveConnectorConfig):
        kind = "none" if connector is None else connector.kind
        raise ConfigError(
            f"classifier={path}: its model does not compare images with texts (connector.kind={kind}); name a run with "
            "connector.kind=contrastive, such as one of configs/recipes/emoji-contrast.yaml"
        )
    return checkpoint, config


def _data_of(path: Path, checkpoint: Path) -> DataConfig:
    """Return the block ``data`` of the run of a checkpoint, with paths relative to the working directory."""
    run = next((each for each in (path, *checkpoint.absolute().parents[:2]) if (each / RUN_CONFIG).is_file()), None)
    if run is None:
        raise ConfigError(
            f"classifier={path}: no {RUN_CONFIG} beside the checkpoint, so its tokenizer and transforms are unknown; "
            "name a run folder or RUN/checkpoints/step-N"
        )
    block = read_layers(run / RUN_CONFIG).child("data")
    root = ConfigNode({} if block is None else {"data": block}, DEFAULT)
    return validate(root, _Run, str(run / RUN_CONFIG))[0].data
