"""Adapters of a model: which layers get one, and the operations that they add. The layer is ``mmscale.nn.adapters``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import nn

from data_pipeline.io.strict import StrictConfig
from mmscale.errors import ConfigError
from mmscale.nn.adapters import AdaptedLinear, adapter_parameters
from mmscale.nn.experts import Experts
from mmscale.nn.flops import Product, linear_product
from mmscale.nn.patch_embed import FramesProjection
from mmscale.nn.sizes import ShrunkTo, Width

COMPONENT = "adapters"
"""Name of the component that contains the parameters of all adapters."""
_VIDEO_PROJECTOR = "connector.video_projector."
"""Beginning of the paths of its layers. They are targets of ``connector``, and belong to ``video_connector``."""
Layers = Literal["all"] | tuple[Annotated[str, Field(min_length=1)], ...]


class TargetsConfig(StrictConfig):
    """The linear layers with an adapter, by component.

    A value is ``all``, or a list of names. A name selects each linear layer whose path ends with it: ``q_proj`` the
    query projections of all blocks, ``layers.3.mlp.up_proj`` one layer. Experts, embeddings and the head have none. A
    name that also selects weights of routed experts is an error.
    """

    vision: Layers = ()
    """Layers of the tower."""
    connector: Layers = ()
    """Layers of the projectors of images and videos, and of the cross-attention blocks."""
    audio: Layers = ()
    """Layers of the audio tower."""
    audio_connector: Layers = ()
    """Layers of the projector of sounds."""
    decoder: Layers = "all"
    """Layers of the decoder's blocks."""

    def of(self, component: str) -> Layers:
        """Return the names of one component, a field of this class."""
        names: Layers = getattr(self, component)
        return names


class AdaptersConfig(StrictConfig):
    """Low-rank adapters. Their parameters form the component ``adapters``; the layers' own weights keep their names."""

    kind: Literal["lora", "dora"] = "lora"
    """``lora``, or ``dora``, which also trains the length of each row of the weights."""
    rank: Annotated[Width, ShrunkTo(4)] = 8
    """Rank of the update of each layer."""
    alpha: float = Field(default=16.0, gt=0)
    """The update is multiplied by ``alpha / rank``."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout rate in training on the input of each update; above 0 only with targets in the decoder alone."""
    targets: TargetsConfig = TargetsConfig()
    """The layers with an adapter."""

    @model_validator(mode="after")
    def _consistent(self) -> AdaptersConfig:
        media = [name for name in TargetsConfig.model_fields if name != "decoder" and self.targets.of(name)]
        if self.dropout and media:
            raise ValueError(
                f"dropout={self.dropout}: a mask depends on the place of a token, and rows of images and sounds have "
                f"no such place; set dropout=0, or leave out targets.{' and targets.'.join(media)}"
            )
        if not media and not self.targets.decoder:
            raise ValueError("targets: no component has a target; set targets.decoder=all, or adapters=null")
        return self


def attach_adapters(model: nn.Module, config: AdaptersConfig) -> None:
    """Replace the target layers of a model by layers with adapters, in place. The parameters of the layers are kept.

    Raises:
        ConfigError: a target matches no linear layer, or weights of routed experts.
    """
    for path, layer in list(_targets(model, config.targets)):
        parent, _, name = path.rpartition(".")
        adapted = AdaptedLinear(layer, config.rank, config.alpha / config.rank, magnitude=config.kind == "dora")
        setattr(model.get_submodule(parent), name, adapted)


def _targets(model: nn.Module, targets: TargetsConfig) -> Iterator[tuple[str, nn.Linear]]:
    for component in TargetsConfig.model_fields:
        part = getattr(model, component, None)
        layers = {} if part is None else linear_layers(part)
        experts = [] if part is None else expert_paths(part)
        chosen = targets.of(component)
        if chosen == "all":
            if not layers:
                raise ConfigError(f"model.adapters.targets.{component}=all: the {component} has no linear layers")
            chosen = tuple(layers)
        wanted: set[str] = set()
        for name in chosen:
            matching = {path for path in layers if _selects(name, path)}
            if routed := [path for path in experts if _selects(name, path)]:
                raise ConfigError(_no_experts(component, name, routed, sorted(matching)))
            if not matching:
                raise ConfigError(_no_match(component, name, list(layers)))
            wanted |= matching
        yield from ((f"{component}.{path}", layer) for path, layer in layers.items() if path in wanted)


def _selects(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def expert_paths(part: nn.Module) -> list[str]:
    """Return the paths of stacked experts in a component, and those of their weights. They can have no adapter."""
    stacks = [path for path, module in part.named_modules() if isinstance(module, Experts)]
    return [f"{path}{weight}" for path in stacks for weight in ("", ".gate_up_proj", ".down_proj")]


def linear_layers(part: nn.Module) -> dict[str, nn.Linear]:
    """Return the layers of a component that can have an adapter, by their path in it."""
    return {
        path: module
        for path, module in part.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, FramesProjection)
    }


def _no_experts(component: str, name: str, routed: Sequence[str], layers: Sequence[str]) -> str:
    longer = sorted({repr(".".join(path.split(".")[-2:])) for path in layers})
    remedy = f"select the other layers by {' and '.join(longer)}" if longer else f"leave out {name!r}"
    return (
        f"model.adapters.targets.{component}: {name!r} selects routed experts ({routed[0]}), which have no adapters; "
        f"{remedy}, or train the experts themselves: adapters=null and stages.N.train=[{component}]"
    )


def _no_match(component: str, name: str, layers: Sequence[str]) -> str:
    kinds = sorted({re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path) for path in layers})
    leaves = sorted({path.rpartition(".")[2] for path in layers})
    near = difflib.get_close_matches(name, [*leaves, *layers], 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    listed = f"it has {', '.join(kinds)}" if kinds else f"the model has no linear layers in its {component}"
    return f"model.adapters.targets.{component}: {name!r} matches no linear layer of the {component}{hint} ({listed})"


def with_adapters(model: nn.Module, parts: dict[str, list[nn.Parameter]]) -> dict[str, list[nn.Parameter]]:
    """Return the components of a model with the parameters of adapters moved to the component ``adapters``, if any."""
    mine = adapter_parameters(model)
    if not mine:
        return parts
    ids = {id(parameter) for parameter in mine}
    others = {name: [each for each in parameters if id(each) not in ids] for name, parameters in parts.items()}
    return {**others, COMPONENT: mine}


def adapter_products(path: str, layer: AdaptedLinear, *, learns: bool, flows: bool) -> list[Product]:
    """Return the operations that the adapter of one layer adds.

    Args:
        path: Path of the layer in the model.
        layer: The layer; may be on the meta device.
        learns: Whether the adapter is trained.
        flows: Whether the backward pass computes the gradient of the layer's input.
    """
    rows, rank = _rows(path), len(layer.lora_A)
    down, up = 2 * rank * layer.in_features, 2 * rank * layer.out_features
    found = [
        linear_product(rows, down, weights=learns, inputs=flows, again=down),
        linear_product(rows, up, weights=learns, inputs=learns or flows, again=up),
    ]
    if layer.magnitude is not None:  # The norm needs the update as a matrix, once in each pass.
        whole = 2 * layer.out_features * rank * layer.in_features
        found.append(Product("passes", whole, 0, whole if learns or flows else 0))
        if learns and path.endswith(".mlp.down_proj") and not path.startswith("connector."):
            # The gradient of the magnitude needs the last product of a block, which recomputation otherwise skips.
            found.append(Product(rows, 0, 0, 2 * layer.in_features * layer.out_features))
    return found


def component_of_layer(path: str) -> str:
    """Return the component that the weight of a layer with an adapter belongs to; ``path`` is that in the model."""
    return "video_connector" if path.startswith(_VIDEO_PROJECTOR) else path.partition(".")[0]


def _rows(path: str) -> str:
    """Return the count of the batch that the rows of a layer's input are proportional to.

    Layers of a projector are counted by features, also those of a projector that pools.
    """
    component, _, rest = path.partition(".")
    if path.startswith(_VIDEO_PROJECTOR):
        return "video.features"
    if component == "audio":
        return "audio.tower_rows"
    if component == "audio_connector":
        return "audio.features"
    if component == "decoder":
        return "token_rows"
    if component == "vision":
        return "patches" if rest.startswith("patch_embed.") else "tower_rows"
    if rest.startswith("blocks."):
        return "attended_rows" if rest.endswith(("k_proj", "v_proj")) else "token_rows"
    return "pairs" if rest in ("visual_projection", "text_projection") else "features"
