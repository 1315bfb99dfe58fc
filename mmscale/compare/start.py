"""Whether variants begin alike: a proof by rules, without a weight.

First values are a function of seed, name, shape and rule (``nn.init``). So two models whose component has the same
names, shapes and rules begin with the same bits in it from every seed, and that can be seen on the meta device.
"""

from __future__ import annotations

import torch

from mmscale.compare.config import Comparison
from mmscale.models.build import build_model
from mmscale.nn.init import value_rule
from mmscale.optim.schedule import component_of_parameters
from mmscale.run.config import RunConfig

Rules = dict[str, dict[str, tuple[tuple[int, ...], tuple[float, float]]]]
"""By component and name of the parameter: its shape and its rule."""


def alike(comparison: Comparison) -> dict[str, dict[str, bool]]:
    """By variant and component: whether it begins with the values that the first variant begins with.

    Where a first stage takes weights from elsewhere, all that is alike takes the same; variants that take other
    weights than the first are alike in nothing.
    """
    first = comparison.variants[0].run
    expected = first_rules(first)
    found = {}
    for variant in comparison.variants:
        rules = first_rules(variant.run)
        same_source = variant.run.stages[0].weights == first.stages[0].weights
        found[variant.name] = {name: same_source and own == expected.get(name) for name, own in rules.items()}
    return found


def first_rules(run: RunConfig) -> Rules:
    """What the first values of the first stage's model follow from, besides the seed."""
    with torch.device("meta"):
        model = build_model(run.stage_model(0), attention="sdpa")
    owner = component_of_parameters(model, model.components())
    rules: Rules = {}
    seen = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen:  # Tied: it has the values of its first name.
                continue
            seen.add(parameter)
            full_name = f"{path}.{name}" if path else name
            shape = tuple(parameter.shape)
            rule = (shape, value_rule(module, full_name, shape))
            rules.setdefault(owner[full_name], {})[full_name] = rule
    return rules
