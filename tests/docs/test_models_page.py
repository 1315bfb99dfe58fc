"""The published recipes of docs/models.md: each is a legal transform that gives the published crops and features."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from data_pipeline.images.transforms import ImageTransform, TransformConfig
from data_pipeline.media_spec import MediaSpec, Placement, SquarePooling

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text()
SECTION = PAGE.split("### What each published model uses\n")[1]
RECIPES: dict[str, Any] = yaml.safe_load(re.findall(r"^```yaml\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)[0])
ANY = Placement.EMBEDDING
HALVED = SquarePooling(2, pads_columns=True)


@pytest.mark.parametrize(
    ("model", "spec", "size", "features"),
    [
        # 24 x 24 patches of an image of 336 pixels.
        ("LLaVA-1.5", MediaSpec(ANY, 14, fixed_grid=(24, 24)), (480, 640), [576]),
        # 256 features a tile (InternVL, NVLM): 1 x 2 tiles and the overview.
        ("InternVL 1.5, 3", MediaSpec(ANY, 14, 2, fixed_grid=(32, 32)), (448, 896), [256] * 3),
        ("NVLM-D", MediaSpec(ANY, 14, 2, fixed_grid=(32, 32)), (448, 896), [256] * 3),
        ("NVLM-X", MediaSpec(Placement.CROSS_ATTENTION, 14, 2, fixed_grid=(32, 32)), (448, 896), [256] * 3),
        ("NVLM-H", MediaSpec(Placement.HYBRID, 14, 2, fixed_grid=(32, 32)), (448, 896), [256] * 3),
        # 40 x 40 patches a tile of 560 px.
        ("Llama 3.2 Vision", MediaSpec(Placement.CROSS_ATTENTION, 14, fixed_grid=(40, 40)), (1000, 1000), [1600] * 4),
        # 144 features of the overview; 2 x 2 crops keep 10 x 10 of their 12 x 12.
        ("Molmo", MediaSpec(ANY, 14, 2, fixed_grid=(24, 24)), (560, 560), [144] + [100] * 4),
        # 64 features a tile of 512 px: 2 x 4 tiles and the overview.
        ("SmolVLM", MediaSpec(ANY, 16, 4, fixed_grid=(32, 32)), (1024, 2048), [64] * 9),
        # 182 = 13 x 14 features a crop: 1 x 2 tiles and the overview.
        ("Baichuan-Omni", MediaSpec(ANY, 14, fixed_grid=(27, 27), pooling=HALVED), (378, 756), [182] * 3),
        # 144 tokens an image, whatever its patches.
        ("MM1.5", MediaSpec(ANY, 14, fixed_grid=(48, 48), pooled_side=12), (1344, 1344), [144] * 5),
        # 64 features for 224 x 224 pixels: the paper, section 2.1.
        ("Qwen2-VL, 2.5-VL", MediaSpec(ANY, 14, 2), (224, 224), [64]),
        ("Qwen2.5-Omni", MediaSpec(ANY, 14, 2), (224, 224), [64]),
        ("Pixtral", MediaSpec(ANY, 16), (1024, 512), [64 * 32]),
        # 256 queries at 980 pixels.
        ("Aria", MediaSpec(ANY, 14, query_sizes=((35, 128), (70, 256))), (700, 900), [256]),
        ("Fuyu-8B", MediaSpec(ANY, 30), (300, 310), [10 * 11]),
    ],
)
def test_recipe(model: str, spec: MediaSpec, size: tuple[int, int], features: list[int]) -> None:
    transform = ImageTransform(TypeAdapter(TransformConfig).validate_python(RECIPES[model]), spec)
    assert [crop.num_features(spec) for crop in transform.dry_run(size)] == features


def test_every_recipe_is_tested() -> None:
    (mark,) = test_recipe.pytestmark  # type: ignore[attr-defined]
    assert {case[0] for case in mark.args[1]} == set(RECIPES)
