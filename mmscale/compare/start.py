"""Find out which components of the variants have the same initial values, without creating weights.

Initial values are a function of seed, parameter name, shape and rule (``nn.init``). If a component has the same names,
shapes and rules in two models, its initial values are the same bits for every seed. A model on the meta device is
enough to compare them.
"""

from __future__ import annotations

import torch

from mmscale.compare.config import Comparison
from mmscale.models.build import build_unset
from mmscale.nn.init import value_rule
from mmscale.optim.schedule import component_of_parameters
from mmscale.run.config import RunConfig

InitRules = dict[str, dict[str, tuple[tuple[int, ...], tuple[float, float]]]]
"""Component -> parameter name -> (shape, rule)."""


def same_initial_values(comparison: Comparison) -> dict[str, dict[str, bool]]:
    """Return, by variant and component, whether its initial values are those of the first variant.

    If the first stage loads weights, components with equal rules load the same ones. A variant whose ``weights`` differ
    from the first variant's counts as different in all components.
    """
    first = comparison.variants[0].run
    expected = init_rules(first)
    found = {}
    for variant in comparison.variants:
        rules = init_rules(variant.run)
        same_source = variant.run.stages[0].weights == first.stages[0].weights
        found[variant.name] = {name: same_source and own == expected.get(name) for name, own in rules.items()}
    return found


def init_rules(run: RunConfig) -> InitRules:
    """Return what determines the initial values of the first stage's model, besides the seed."""
    with torch.device("meta"):
        model = build_unset(run.stage_model(0), attention="sdpa")
    owner = component_of_parameters(model, model.components())
    rules: InitRules = {}
    seen = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen:  # A tied parameter has the values of its first name.
                continue
            seen.add(parameter)
            full_name = f"{path}.{name}" if path else name
            shape = tuple(parameter.shape)
            rule = (shape, value_rule(module, full_name, shape))
            rules.setdefault(owner[full_name], {})[full_name] = rule
    return rules
