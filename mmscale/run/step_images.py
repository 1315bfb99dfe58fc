"""The images that a run shows during training: those of the batch, or the reconstructions of an image tokenizer.

A tokenizer always reconstructs the same images, so that its progress shows: the first ones of the stage's data, read as
one lane and without augmentation. Rank 0 reads them. All ranks run the model, as ZeRO-3 requires.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batch import MultimodalBatch
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataConfigError, DataPipelineError
from data_pipeline.loader.loader import Loader
from data_pipeline.text.tokenizer import load_tokenizer
from mmscale.dist import World, raise_on_any_rank
from mmscale.engine.engine import Engine
from mmscale.evaluate.drawings import to_pixels
from mmscale.metrics.run_log import NullLog, RunLog
from mmscale.metrics.sample_images import CaptionedImage, Pixels, batch_images
from mmscale.models.config import TokenizerConfig
from mmscale.models.image_tokenizer_model import ImageTokenizerModel, images_of
from mmscale.report.drawings import save_drawings
from mmscale.run.config import RunConfig

_MOST_BATCHES = 16
"""Packs of a lane that are searched for images."""
_GAP = 4
"""White rows between an image and its reconstruction."""


class StepImages:
    """Shows images of the steps of one stage. All ranks must create one and make the same calls.

    Args:
        config: The run.
        world: This rank.
        log: Receives the images.
        stage: Number of the stage.
    """

    def __init__(self, config: RunConfig, world: World, log: RunLog | NullLog, stage: int) -> None:
        self._config, self._world, self._log, self._stage = config, world, log, stage
        self._spec, self._data = config.stage_media(stage), config.stage_data(stage)
        self._model = config.stage_model(stage)
        self._decode = load_tokenizer(self._data.tokenizer).decode
        self._images: Tensor | None = None

    def show(self, engine: Engine, step: int, batch: MultimodalBatch) -> None:
        """Show images of a step if ``metrics.images_every`` asks for it. All ranks must call.

        The last step of the run also shows reconstructions.

        Args:
            engine: Reconstructs.
            step: A finished step.
            batch: The first microbatch of this rank, for models that reconstruct nothing.

        Raises:
            DataConfigError: the data of a tokenizer cannot be read, or have no image. Every rank raises.
            MMScaleError: a file cannot be written.
        """
        if not isinstance(self._model, TokenizerConfig):
            self._log.images(step, functools.partial(batch_images, batch, self._spec, self._decode))
            return
        every = self._config.metrics.images_every
        if every is None or not (step == 1 or step % every == 0 or step == self._config.total_steps):
            return
        self._log.pause()
        if self._images is None:
            self._images = self._first_images(self._model)
        with engine.inference(ema=engine.stage.ema is not None) as model:
            assert isinstance(model, ImageTokenizerModel)
            dtype = model.image_tokenizer.decoder.conv_out.weight.dtype
            shown = model.reconstruct(self._images.to(self._world.device, dtype)).reconstructions
        if self._world.is_main:
            pairs = zip(map(to_pixels, self._images), map(to_pixels, shown), strict=True)
            captioned = [
                CaptionedImage(_one_above_the_other(*pair), f"image {number}: original above, reconstruction below")
                for number, pair in enumerate(pairs, 1)
            ]
            save_drawings(self._config.run_dir, step, [(each.caption, each.pixels) for each in captioned])
            self._log.drawings(step, captioned)
        self._log.pause("evaluation")

    def _first_images(self, model: TokenizerConfig) -> Tensor:
        """Return the fixed images, ``(N, channels, H, W)`` in [-1, 1]; on ranks other than 0 one black image."""
        images, problem = torch.full((1, model.image_tokenizer.channels, *2 * (model.image_size,)), -1.0), None
        if self._world.is_main:
            try:
                images = self._read(model)
            except DataPipelineError as error:
                problem = f"images to reconstruct (metrics.images_every): {error}"
        raise_on_any_rank(self._world, problem, DataConfigError)
        return images

    def _read(self, model: TokenizerConfig) -> Tensor:
        wanted, found = self._config.metrics.num_images, list[Tensor]()
        with Loader(_plain(self._data), self._spec, seed=self._config.seed) as loader:
            for _, batch in zip(range(_MOST_BATCHES), loader, strict=False):
                for microbatch in batch.microbatches:
                    items = microbatch.pairs[:, 0]
                    found += images_of(microbatch.media["image"], model).index_select(0, items)
                if len(found) >= wanted or batch.exhausted:
                    break
        if not found:
            raise DataConfigError(f"the first {_MOST_BATCHES} packs have no document with exactly one image")
        return torch.stack(found[:wanted])


def _plain(data: DataConfig) -> DataConfig:
    """Return the data as one lane without workers and augmentation."""
    plain = tuple(
        dataset.model_copy(update={"transforms": dataset.transforms.model_copy(update={"augment": None})})
        for dataset in data.datasets
    )
    return data.model_copy(update={"datasets": plain, "lanes": 1, "workers": 0})


def _one_above_the_other(above: Pixels, below: Pixels) -> Pixels:
    gap = np.full((_GAP, *above.shape[1:]), 255, dtype=np.uint8)
    return np.concatenate([above, gap, below])
