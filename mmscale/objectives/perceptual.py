"""The perceptual loss of an image tokenizer: distances between features of a frozen vision tower.

    images, reconstructions --resize, patches--> tower --outputs of some blocks, scaled to length 1--> squared distances

The loss is LPIPS with a tower that the user names instead of VGG, and without the learned weights of its channels.

Source: Zhang et al. 2018, "The unreasonable effectiveness of deep features as a perceptual metric" (LPIPS), equation 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.batch import MediaBlock, MultimodalBatch, Segments
from data_pipeline.io.strict import StrictConfig
from mmscale.models.build import TowerAlone, build_weights
from mmscale.models.config import TowerConfig
from mmscale.models.flops import TrainingFlops
from mmscale.models.vision import VisionConfig
from mmscale.nn.host import to_device


class PerceptualConfig(StrictConfig):
    """A perceptual loss: reconstructions must have the features of their images in a frozen vision tower."""

    tower: Path
    """A checkpoint folder (``RUN/checkpoints/step-N``), or a run folder for its newest complete checkpoint, of a vision
    tower or of a model that has one. Import a Hugging Face folder first: ``mmscale checkpoint import``."""
    layers: tuple[Annotated[int, Field(ge=0, le=1 << 12)], ...] = Field(min_length=1)
    """Blocks whose outputs are compared, counted from 0. Blocks after the last of them are not built."""
    weight: float = Field(default=1.0, gt=0)
    """Coefficient of the loss, above 0. The loss of an image is at most 4 for each layer."""
    ema: bool = False
    """Load the moving averages instead of the weights, for parameters with an average in the checkpoint. The checkpoint
    must contain averages."""

    @model_validator(mode="after")
    def _check(self) -> PerceptualConfig:
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers={list(self.layers)} names a block twice")
        return self


def tower_problem(tower: VisionConfig, layers: Sequence[int], channels: int) -> str | None:
    """Return why a tower cannot compare images of ``channels`` channels at ``layers``, or None."""
    if tower.channels != channels:
        return f"the tower reads {tower.channels} channels, and images have {channels}"
    if tower.tiles is not None:
        return "the tower reads images as several tiles; name a tower without vision.tiles"
    if max(layers) >= tower.num_layers:
        return f"layers={list(layers)}: the blocks of the tower have the numbers 0 to {tower.num_layers - 1}"
    return None


def shortened(tower: VisionConfig, layers: Sequence[int]) -> TowerConfig:
    """Return the tower up to the last of ``layers``, whose features are the outputs of ``layers``."""
    changes = {
        "num_layers": max(layers) + 1,
        "feature_layers": tuple(layers),
        "feature_order": "layers",
        "last_output": False,
        "idle_layers": 0,
        "post_norm": False,
        "idle_norm": False,
        "class_feature": False,
    }
    return TowerConfig(vision=VisionConfig.model_validate(tower.model_dump() | changes))


class PerceptualTower(nn.Module):
    """A frozen tower that compares images.

    Args:
        tower: As ``shortened`` describes it. Mutated: none of its parameters requires a gradient afterwards.
        image_size: Pixels of a side of the images.
    """

    def __init__(self, tower: TowerAlone, image_size: int) -> None:
        super().__init__()
        assert isinstance(tower.config, TowerConfig)
        self.vision = tower.vision.requires_grad_(requires_grad=False)
        self.config = tower.config.vision
        self._image_size = image_size
        size, grid = self.config.patch_size, self.config.fixed_grid
        self._grid = grid or (max(1, round(image_size / size)),) * 2

    def forward(
        self, images: Float[Tensor, "N channels H W"], reconstructions: Float[Tensor, "N channels H W"]
    ) -> Float[Tensor, " N"]:
        """Return the distance of each reconstruction to its image, with a gradient to the reconstruction.

        For each layer it is the squared difference of the features, summed over channels and averaged over patches. The
        layers are added. Images are resized to the tower's grid; without a fixed grid, to the nearest multiple of a
        patch.

        Args:
            images: Values in [-1, 1].
            reconstructions: The same; values outside of [-1, 1] are not clamped.
        """
        with torch.no_grad():
            expected = self._features(images)
        difference = (self._features(reconstructions) - expected).square()
        return difference.sum((1, 3)).mean(1)

    def _features(self, images: Tensor) -> Float[Tensor, "N L patches D"]:
        """Return the outputs of the layers, each feature of length 1."""
        config, count, (rows, columns) = self.config, len(images), self._grid
        side = config.patch_size
        pixels = resize(images.float(), rows * side, columns * side) * 127.5 + 127.5
        patches = pixels.view(count, config.channels, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)
        features = self.vision(packed_patches(patches.flatten(3).flatten(0, 2), [(1, rows, columns)] * count))
        layers = features.float().view(count, rows * columns, -1, config.hidden_dim)
        return F.normalize(layers, dim=-1, eps=1e-10).transpose(1, 2)

    def units(self) -> Sequence[nn.Module]:
        """Return the blocks whose parameters ZeRO-3 should gather together."""
        return self.vision.blocks()

    def flops(self, batch: MultimodalBatch) -> TrainingFlops:
        """Return the operations of a microbatch: two forward passes, and the gradient of the reconstructions."""
        forward, backward = _image_flops(self.config.model_dump_json(), self._image_size)
        count = batch.media["image"].items.num
        return TrainingFlops(count * forward, count * backward, 0)


def resize(images: Float[Tensor, "N channels H W"], height: int, width: int) -> Tensor:
    """Return the images in another size, with antialiasing, as two matrix products.

    The gradient of ``interpolate`` is not deterministic on CUDA; that of a matrix product is.
    """
    if images.shape[-2:] == (height, width):
        return images
    rows, columns = (
        to_device(_interpolation(before, after), images.device)
        for before, after in ((images.shape[-2], height), (images.shape[-1], width))
    )
    return rows @ images @ columns.t()


@lru_cache(maxsize=16)
def _interpolation(before: int, after: int) -> Tensor:
    """Return the matrix ``(after, before)`` of bilinear interpolation with antialiasing along one axis."""
    one = torch.eye(before, device="cpu")[None, None]
    return F.interpolate(one, size=(after, before), mode="bilinear", antialias=True)[0, 0]


def packed_patches(patches: Tensor, grids: list[tuple[int, int, int]]) -> MediaBlock:
    """Return a block for a tower. Its patches are float, 0 to 255; nothing reads its features by index."""
    device, none = patches.device, Segments.from_lengths([])
    items = Segments.from_lengths([rows * columns for _, rows, columns in grids])
    empty = torch.empty(0, dtype=torch.int64, device=device)
    items = Segments(to_device(items.cu, device), items.bounds)
    grid = to_device(torch.tensor(grids, dtype=torch.int32), device)
    return MediaBlock(patches, grid, tuple(grids), items, empty, empty, empty, none, none)


@lru_cache(maxsize=16)
def _image_flops(config: str, image_size: int) -> tuple[int, int]:
    """Return the operations of one image, forward and backward; torch counts them on the meta device."""
    alone = build_weights(TowerConfig(vision=VisionConfig.model_validate_json(config)))
    assert isinstance(alone, TowerAlone)
    tower = PerceptualTower(alone, image_size)
    shape = (1, tower.config.channels, image_size, image_size)
    images, reconstructions = (torch.empty(shape, device="meta") for _ in range(2))
    with FlopCounterMode(display=False) as forward:
        loss = tower(images, reconstructions.requires_grad_())
    with FlopCounterMode(display=False) as backward:
        loss.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()
