"""The numbers of parameters of a model in one line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import nn

from mmscale.nn.expert_parallel import full_shape


def describe_parameters(components: Mapping[str, Iterable[nn.Parameter]]) -> str:
    """Return total and components: ``7,025,280 parameters: vision 2,696,640, decoder 4,328,640``.

    Counts whole parameters, also of a model that ZeRO-3 shards. Tied parameters count once.
    """
    counts = {name: sum(math.prod(full_shape(p)) for p in set(parameters)) for name, parameters in components.items()}
    listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return f"{sum(counts.values()):,} parameters: {listed}"
