"""``same_initial_values`` is true for exactly the components whose initial values are equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmscale.compare import Comparison, read_comparison
from mmscale.compare.start import same_initial_values
from mmscale.models.build import build_model
from tests.compare.conftest import TINY


def first_values(comparison: Comparison, seed: int) -> list[dict[str, dict[str, torch.Tensor]]]:
    """Build the models; return the initial values of each variant by component and name."""
    found = []
    for variant in comparison.variants:
        model = build_model(variant.run.stage_model(0), seed=seed)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        found.append({c: {names[id(p)]: p.detach() for p in own} for c, own in model.components().items()})
    return found


@pytest.mark.parametrize("seed", [1, 7])
@pytest.mark.parametrize(
    "words",
    [
        [],
        ["model.decoder.tie_embeddings=true"],
        ["compare.variants.1.overrides=[model.decoder.init_std=0.02]"],
        ["compare.variants.1.overrides=[model.vision.hidden_dim=48]"],
        ["compare.variants.1.overrides=[model.decoder.num_layers=4]"],
    ],
)
def test_components_with_equal_initial_values_are_found(words: list[str], seed: int) -> None:
    comparison = read_comparison(TINY, words)
    found_equal = same_initial_values(comparison)
    first, *_ = built = first_values(comparison, seed)
    for variant, values in zip(comparison.variants, built, strict=True):
        for component, own in values.items():
            other = first[component]
            same = own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
            assert found_equal[variant.name][component] == same, (variant.name, component)


def test_connectors_share_decoder_and_tower() -> None:
    found_equal = same_initial_values(read_comparison(TINY, []))
    expected = {"vision": True, "decoder": True, "connector": False}
    assert found_equal == {"embedding": {**expected, "connector": True}, "cross": expected, "hybrid": expected}


def test_other_weights_are_another_start(tmp_path: Path) -> None:
    weights = f"stages=[{{name: all, steps: 6, weights: [{{checkpoint: {tmp_path}}}]}}]"
    assert same_initial_values(read_comparison(TINY, [weights]))["hybrid"]["decoder"]
    comparison = read_comparison(TINY, ['compare.variants.2.overrides=["' + weights.replace('"', "'") + '"]'])
    assert not any(same_initial_values(comparison)["hybrid"].values())
