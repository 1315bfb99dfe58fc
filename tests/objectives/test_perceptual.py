"""The perceptual loss against hooks on a whole tower, and in a run on several ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmscale.checkpoint.manifest import read_manifest
from mmscale.models.build import TowerAlone, build_unset
from mmscale.models.config import TowerConfig
from mmscale.models.vision import VisionConfig
from mmscale.nn.init import initialise_
from mmscale.objectives.perceptual import PerceptualTower, packed_patches, resize, shortened, tower_problem
from tests.models.reference_models import distance
from tests.objectives.test_reconstruction import run_cases
from tests.objectives.tokenizers import GAME

CONFIG: dict[str, Any] = {
    "patch_size": 4,
    "hidden_dim": 16,
    "num_layers": 3,
    "attention": {"num_heads": 2},
    "mlp": {"hidden_dim": 24, "gated": False},
    "positions": {"kind": "learned", "grid": [3, 3]},
    "class_token": True,
}


def tower_of(config: TowerConfig, seed: int = 3) -> TowerAlone:
    tower = build_unset(config)
    assert isinstance(tower, TowerAlone)
    initialise_(tower, seed)
    return tower


@pytest.mark.parametrize("layers", [(0, 2), (1,)])
def test_the_distance_is_that_of_the_outputs_of_the_blocks(layers: tuple[int, ...]) -> None:
    whole = TowerConfig(vision=VisionConfig.model_validate(CONFIG))
    tower, outputs = tower_of(whole), {}
    alone = tower_of(shortened(whole.vision, layers))
    names = alone.load_state_dict(tower.state_dict(), strict=False)
    assert not names.missing_keys
    perceptual = PerceptualTower(alone, 12)
    images = 2 * torch.rand(2, 3, 12, 12) - 1
    reconstructions = torch.randn(2, 3, 12, 12, requires_grad=True)
    found = perceptual(images, reconstructions)
    (gradient,) = torch.autograd.grad(found.sum(), reconstructions)

    # The truth: hooks on the blocks of the whole tower, which reads each image alone.
    for number in layers:
        tower.vision.layers[number].register_forward_hook(
            lambda _, inputs, output, number=number: outputs.__setitem__(number, output[0])
        )

    def features(image: Tensor) -> list[Tensor]:
        rows = [image[:, r : r + 4, c : c + 4].flatten() for r in range(0, 12, 4) for c in range(0, 12, 4)]
        tower.vision(packed_patches((torch.stack(rows) + 1) * 127.5, [(1, 3, 3)]))
        return [outputs[number][1:] / outputs[number][1:].norm(dim=1, keepdim=True) for number in layers]

    expected = []
    for image, other in zip(images, reconstructions, strict=True):
        pairs = zip(features(image), features(other), strict=True)
        expected.append(sum((a.detach() - b).square().sum(1).mean() for a, b in pairs))
    assert distance(found, torch.stack(expected)) < 1e-5
    assert distance(gradient, torch.autograd.grad(sum(expected), reconstructions)[0]) < 1e-4
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in perceptual.parameters())


def test_the_tower_reads_bytes_and_floats_alike() -> None:
    tower = tower_of(TowerConfig(vision=VisionConfig.model_validate(CONFIG)))
    values = torch.randint(0, 256, (9, 48), dtype=torch.uint8)
    media = packed_patches(values.float(), [(1, 3, 3)])
    assert torch.equal(tower.vision(media), tower.vision(replace(media, values=values)))


@pytest.mark.parametrize(("before", "after"), [(12, 8), (8, 12), (9, 4)])
def test_resizing_is_that_of_interpolate(before: int, after: int) -> None:
    images = torch.randn(2, 3, before, before + 2)
    truth = F.interpolate(images, (after, after + 1), mode="bilinear", antialias=True)
    assert distance(resize(images, after, after + 1), truth) < 1e-5


def test_towers_that_cannot_compare_are_named() -> None:
    tower = VisionConfig.model_validate(CONFIG)
    assert tower_problem(tower, (2,), 3) is None
    assert "blocks of the tower have the numbers 0 to 2" in str(tower_problem(tower, (3,), 3))
    assert "reads 3 channels" in str(tower_problem(tower, (0,), 1))


@pytest.mark.slow
@pytest.mark.dist
def test_training_is_equal_on_two_ranks_and_needs_no_tower_of_its_own(tmp_path: Path) -> None:
    game = {"discriminator": GAME, "codebook_update": "ema"}
    losses = {"perceptual": {"tower": "none", "layers": [0, 2]}, "discriminator": {}}
    case = {"config": game, "losses": losses, "tower": CONFIG, "steps": 3}
    (alone,) = run_cases(1, case)
    (together,) = run_cases(2, {**case, "save_at": 3, "folder": str(tmp_path)})
    for one, other in zip(alone["curve"], together["curve"], strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
    assert "perceptual" in alone["names"]
    manifest = read_manifest(next(tmp_path.glob("step-*")))
    assert not [name for name in manifest.parameters if "vision" in name], "a checkpoint holds no frozen tower"
