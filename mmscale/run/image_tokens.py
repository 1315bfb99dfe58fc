"""The image tokenizer of a checkpoint, for the commands that encode and decode images as tokens."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataPipelineError
from data_pipeline.images.transforms import FixedTransform, TransformConfig
from data_pipeline.images.video import VideoConfig
from data_pipeline.io.strict import StrictConfig
from data_pipeline.loader.sample_source import with_image_tokenizer
from data_pipeline.shards.manifest import Manifest
from mmscale.checkpoint.load import load_weights
from mmscale.checkpoint.manifest import model_config_of, newest_of, read_manifest
from mmscale.config.layers import apply_overrides, read_layers
from mmscale.config.tree import DEFAULT, ConfigNode
from mmscale.config.validate import validate
from mmscale.errors import ConfigError
from mmscale.evaluate.drawings import drawing_dataset
from mmscale.models.build import build_unset
from mmscale.models.config import TokenizerConfig
from mmscale.models.image_tokenizer import ImageTokenizer, image_tokenizer_digest
from mmscale.models.image_tokenizer_model import ImageTokenizerModel
from mmscale.nn.image_blocks import batch_pixels
from mmscale.run.folder import CONFIG


def load_image_tokenizer(path: Path, device: str = "cpu", ema: bool | None = None) -> ImageTokenizerModel:
    """Return the image tokenizer of a checkpoint, frozen.

    Args:
        path: A run folder, whose newest checkpoint is taken, or one checkpoint.
        device: Where its weights are placed.
        ema: Whether to load averaged weights (EMA); None loads them if the checkpoint has them.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        ConfigError: the checkpoint is of another kind of model.
    """
    checkpoint = newest_of(path)
    manifest = read_manifest(checkpoint)
    with torch.random.fork_rng(devices=[]):  # A run that loads it to draw continues with the random state that it had.
        model = build_unset(model_config_of(manifest, checkpoint))
    if not isinstance(model, ImageTokenizerModel):
        raise ConfigError(f"{path}: its model is no image tokenizer (model.image_tokenizer); name the run of one")
    load_weights(model, checkpoint, ema=manifest.ema if ema is None else ema)
    return model.to(device).eval().requires_grad_(False)


def foreign_codes(data: DataConfig, path: Path, *, ema: bool) -> str | None:
    """Return why a model that gets its image tokenizer from a checkpoint cannot decode the codes of its data, or None.

    Compares the tokenizers that manifests and configuration name. Does nothing for the checkpoint of a larger model.

    Args:
        data: The data block of a stage.
        path: The checkpoint.
        ema: Whether the averaged weights of the checkpoint are loaded.

    Raises:
        CheckpointError: the checkpoint is damaged.
        DataPipelineError: a manifest is damaged.
    """
    encoders = {}
    for dataset in data.datasets:
        manifest = Manifest.open(dataset.manifest) if isinstance(dataset.manifest, Path) else None
        tokens = with_image_tokenizer(dataset, manifest).image_tokens
        if tokens is not None and tokens.tokenizer is not None:
            encoders[dataset.name] = tokens.tokenizer
    if not encoders or not isinstance(model_config_of(read_manifest(path), path), TokenizerConfig):
        return None
    found = image_tokenizer_digest(load_image_tokenizer(path, ema=ema).image_tokenizer)
    for name, encoder in encoders.items():
        if encoder != found:
            return (
                f"is the image tokenizer {found[:12]}..., but {encoder[:12]}... encoded the images of data set {name}; "
                "codes of different tokenizers mean different images, so encode the data again with: mmscale data "
                "encode"
            )
    return None


def tokenizer_of_data(path: Path, data: DataConfig, device: torch.device) -> ImageTokenizer:
    """Return the image tokenizer of a checkpoint, which must be the one that encoded the images of ``data``.

    Args:
        path: A run folder or one checkpoint.
        data: The data block of a run that draws.
        device: Where its weights are placed.

    Raises:
        CheckpointError, ConfigError: as ``load_image_tokenizer``; or it is another tokenizer, or it is unknown which
            one encoded the images.
    """
    tokenizer = load_image_tokenizer(path, str(device)).image_tokenizer
    dataset, _ = drawing_dataset(data)
    tokens, source = dataset.image_tokens, "image_tokens.tokenizer"
    expected = None if tokens is None else tokens.tokenizer
    if expected is None:
        source = str(dataset.manifest)
        with suppress(DataPipelineError):  # The data may be on another machine.
            expected = None if dataset.manifest is None else Manifest.open(dataset.manifest).image_tokenizer
    found = image_tokenizer_digest(tokenizer)
    if expected is None:
        raise ConfigError(
            f"{path}: it is unknown which image tokenizer encoded the images of data set {dataset.name}, because its "
            f"manifest {dataset.manifest} cannot be read or names none; set data.image_tokens.tokenizer in the "
            f"config.yaml of the run to its digest (this one: {found})"
        )
    if found != expected:
        raise ConfigError(
            f"{path}: is the image tokenizer {found[:12]}..., but {expected[:12]}... encoded the images of data set "
            f"{dataset.name} ({source}); codes of different tokenizers mean different images"
        )
    return tokenizer


@dataclass
class CheckpointEncoder:
    """Encodes images with the image tokenizer of a checkpoint: a ``GridEncoder``. Created by ``open``.

    A process loads the weights in its first call, and then computes with one thread: the sums of a convolution depend
    on the number of threads, and the codes must not depend on the number of processes.
    """

    checkpoint: Path
    device: str
    image_size: int
    """Side of the square images that the tokenizer was trained on, pixels."""
    stride: int
    frames_per_code: int
    codebook_size: int
    digest: str
    _tokenizer: ImageTokenizer | None = field(default=None, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path, device: str = "cpu") -> CheckpointEncoder:
        """Read the properties of the tokenizer.

        Raises:
            CheckpointError, ConfigError: as ``load_image_tokenizer``; or this machine has no such device.
        """
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # An AssertionError: torch was built without CUDA.
            raise ConfigError(f"device {device}: {str(error).partition(chr(10))[0]}") from error
        model = load_image_tokenizer(path)
        tokenizer, size = model.image_tokenizer, model.config.image_size
        digest = image_tokenizer_digest(tokenizer)
        sizes = (tokenizer.stride, tokenizer.temporal_factor, tokenizer.codebook_size)
        return cls(newest_of(path), device, size, *sizes, digest)

    @property
    def batch_pixels(self) -> int:
        """Largest number of pixels of a batch."""
        return batch_pixels(torch.device(self.device))

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.integer[Any]]:
        if self._tokenizer is None:
            torch.set_num_threads(1)
            torch.backends.cudnn.deterministic = True
            self._tokenizer = load_image_tokenizer(self.checkpoint, self.device).image_tokenizer
        pixels = torch.from_numpy(images).to(self.device).float() / 127.5 - 1
        is_clip = pixels.ndim == 5
        tokens = self._tokenizer.encode_clips(pixels)[:, 0] if is_clip else self._tokenizer.encode(pixels)
        codes: npt.NDArray[np.int64] = tokens.cpu().numpy()
        return codes


class _Chosen(StrictConfig):
    transforms: TransformConfig = FixedTransform()
    video: VideoConfig = VideoConfig()


def encoding_transforms(run: Path | None, given: str | None, image_size: int) -> TransformConfig:
    """Return the transforms of images before they are encoded, without augmentation.

    Args:
        run: Folder of the tokenizer's run, whose ``data.transforms`` are the default; None without one.
        given: Transforms as YAML, instead of the default.
        image_size: Size of ``kind: fixed`` where neither gives one.

    Raises:
        ConfigError: the transforms are invalid.
    """
    root = ConfigNode({}, DEFAULT)
    if given is not None:
        root = apply_overrides(root, [f"transforms={given}"])
    elif run is not None and (data := read_layers(run / CONFIG).child("data")) is not None:
        stored = data.child("transforms")
        root = root if stored is None or stored.value is None else ConfigNode({"transforms": stored}, DEFAULT)
    chosen, _ = validate(root, _Chosen, str(run) if given is None else "--transforms")
    transforms = chosen.transforms.model_copy(update={"augment": None})
    if isinstance(transforms, FixedTransform) and transforms.size is None:
        transforms = transforms.model_copy(update={"size": image_size})
    return transforms


def encoding_video(given: str | None) -> VideoConfig | None:
    """Return how videos are encoded, from YAML; None leaves them unencoded.

    Raises:
        ConfigError: it is invalid.
    """
    if given is None:
        return None
    chosen, _ = validate(apply_overrides(ConfigNode({}, DEFAULT), [f"video={given}"]), _Chosen, "--video")
    return chosen.video
