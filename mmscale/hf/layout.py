"""What a family's file says: how its configuration and its tensors become ours, and back.

    config.json --to_model--> ModelConfig or TowerConfig --to_keys--> config.json
    decoder.layers.3.mlp.up_proj.weight  <--rows-->  model.layers.3.mlp.up_proj.weight

A family is one ``Layout``. Names are rewritten from the front by the first row that matches. Parameters of ours that
get the same foreign name are stored there one after another along the first dimension, or dealt in blocks of rows; that
is how a table of new tokens, or projections that others fuse, become one matrix, and how it is cut again.

A layout cannot lie about a configuration: what ``to_keys`` writes is read back by ``to_model`` and compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from data_pipeline.io.strict import first_fault
from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.read import PREPROCESSOR
from mmscale.models.config import AnyModelConfig, ModelConfig, TowerConfig
from mmscale.models.connector_config import MlpProjectorConfig
from mmscale.models.connectors.connector import FeatureConnectorBase
from mmscale.models.decoder import DecoderConfig
from mmscale.models.vision_config import VisionConfig

_SHOWN = 3


@dataclass(frozen=True)
class Axes:
    """The same values in another order.

    Attributes:
        sizes: Theirs, of a view of the tensor, or of the part that a row takes of it; one may be -1.
        order: Which of their axes each of ours is.
    """

    sizes: tuple[int, ...]
    order: tuple[int, ...]

    def to_ours(self, values: Tensor) -> Tensor:
        """A view of their values in the order of ours."""
        return values.reshape(self.sizes).permute(self.order)

    def to_theirs(self, values: Tensor) -> Tensor:
        """Our values, flat, in their order: ``(n,)``, a copy."""
        ours = values.view([self.sizes[axis] for axis in self.order])
        return ours.permute([self.order.index(axis) for axis in range(len(self.order))]).reshape(-1)


@dataclass(frozen=True)
class Row:
    """Where parameters of ours lie among theirs.

    Attributes:
        ours: Beginning of our name; ``{n}`` is any number, the same on both sides.
        theirs: Beginning of their name, which the rest of ours follows.
        shape: Of their tensor, where it has another one for the same values in the same order (a convolution over
            patches, an axis of length 1); a dimension may be -1.
        block: Rows of a block, where several parameters share a tensor in turn: a block of the first, a block of the
            second, ..., and again (queries, keys and values head by head). None: one after another.
        part: Order among the parameters that share a tensor; equal ones are in the model's order.
        axes: Of their values, where those are ordered otherwise (pixels of a patch channel by channel, or with the
            channels innermost). Not together with ``block``.
        zeros: Values behind each turn of the parameter that their tensor has and ours lacks: all zero (heads without
            effect, that make their number divisible). ``shape`` counts them.
    """

    ours: str
    theirs: str
    shape: tuple[int, ...] | None = None
    block: int | None = None
    part: int = 0
    axes: Axes | None = None
    zeros: int = 0


Rows = tuple[Row, ...]


def rows(*pairs: tuple[str, str]) -> Rows:
    """Rows that only rename."""
    return tuple(Row(ours, theirs) for ours, theirs in pairs)


def under(table: Rows, *, ours: tuple[str, str] = ("", ""), theirs: tuple[str, str] = ("", "")) -> Rows:
    """The rows of a part of a model in a larger one: ``(old, new)`` beginning on each side."""
    return tuple(
        replace(
            row,
            ours=ours[1] + row.ours.removeprefix(ours[0]),
            theirs=theirs[1] + row.theirs.removeprefix(theirs[0]),
        )
        for row in table
    )


@dataclass(frozen=True)
class Part:
    """A parameter of ours in a tensor of theirs."""

    name: str
    shape: tuple[int, ...]
    block: int | None = None
    axes: Axes | None = None
    zeros: int = 0


@dataclass(frozen=True)
class Stored:
    """A tensor of theirs, and what of ours lies in it.

    Attributes:
        name: Theirs.
        shape: Theirs.
        parts: In order.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @classmethod
    def alone(cls, name: str, shape: tuple[int, ...]) -> Stored:
        """A parameter under its own name."""
        return cls(name, shape, (Part(name, shape),))

    @property
    def rounds(self) -> int:
        """How often the parts take turns."""
        first = self.parts[0]
        return 1 if first.block is None else first.shape[0] // first.block

    def cut(self, values: Tensor) -> Iterator[tuple[str | None, Tensor]]:
        """Views of ``values``: of each parameter flat, rounds by values of a block, or with its axes exchanged; of its
        zeros, under None."""
        turns = values.reshape(self.rounds, -1)
        start = 0
        for part in self.parts:
            size = math.prod(part.shape) // self.rounds
            own = turns[0, start : start + size] if self.rounds == 1 else turns[:, start : start + size]
            yield part.name, own if part.axes is None else part.axes.to_ours(own)
            start += size
            if part.zeros:
                yield None, turns[:, start : start + part.zeros]
                start += part.zeros

    def ranges(self) -> Iterator[tuple[Part, int, int]]:
        """(part, first value of ours, behind the last) in the order of their values, ``axes`` and ``zeros`` apart."""
        for turn in range(self.rounds):
            for part in self.parts:
                size = math.prod(part.shape) // self.rounds
                yield part, turn * size, (turn + 1) * size


@dataclass(frozen=True)
class Layout:
    """A family of models of Hugging Face's transformers.

    Attributes:
        model_type: By which its ``config.json`` is recognised.
        architecture: Class that the exported folder asks for.
        rows: Of a configuration of ours: where each parameter lies.
        to_model: Our configuration; must read every key that matters.
        to_keys: The keys of theirs, ``model_type`` and ``architectures`` apart.
        unused: Names (regular expressions) of tensors that old files hold and nobody needs.
        spellings: (regular expression, replacement): names of other versions to those of ``rows``.
        kind: Whether it holds models or towers alone.
        auto_class: Class of transformers that opens what is exported; None if it has none for this family.
    """

    model_type: str
    architecture: str
    rows: Callable[[Any], Rows]
    to_model: Callable[[Keys], AnyModelConfig]
    to_keys: Callable[[Any], dict[str, Any]]
    unused: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()
    kind: type[ModelConfig] | type[TowerConfig] = ModelConfig
    auto_class: str | None = "AutoModelForCausalLM"

    def model_config(self, values: Mapping[str, Any], where: str) -> AnyModelConfig:
        """Our configuration of a ``config.json``, which may hold ``preprocessor_config``.

        Raises:
            CheckpointError: it asks for something that our models do not compute.
        """
        keys = Keys(values, where, self.model_type)
        try:
            config = self.to_model(keys)
        except ValidationError as error:
            raise CheckpointError(f"{where}: {first_fault(error)}") from error
        # A size of 0 that others are divided by, a list where each item has to be a number, and the like.
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(
                f"{where}: a key has a value that no {self.model_type} has ({type(error).__name__}: {error!s:.200})"
            ) from error
        keys.finish()
        return config

    def config_values(self, config: AnyModelConfig) -> dict[str, Any]:
        """A ``config.json`` of our configuration, and under ``preprocessor_config`` what the file of that name says.

        Raises:
            CheckpointError: the family has no words for it; names the first differences.
        """
        if not isinstance(config, self.kind):
            held = "models" if self.kind is ModelConfig else "vision towers alone"
            raise CheckpointError(f"{self.model_type} holds {held}")
        values = {"model_type": self.model_type, "architectures": [self.architecture], **self.to_keys(config)}
        again = self.model_config(values, f"{self.model_type} configuration")
        if different := list(_differences("model", computed(config), computed(again))):
            raise CheckpointError(f"{self.model_type} has no words for {'; '.join(different[:_SHOWN])}")
        return values

    def like(self, values: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
        """``values`` with each key of another ``config.json`` of the family that leaves the model as it is.

        These are token ids, the length of the context, and what is read the same in several forms: an image size that
        is no multiple of the patch, a window that hides nothing.

        Args:
            values: As ``config_values`` gives them.
            other: The other file.
        """
        expected = computed(self.model_config(values, "exported configuration"))

        def same(candidate: dict[str, Any]) -> bool:
            try:
                return computed(self.model_config(candidate, "exported configuration")) == expected
            except CheckpointError:
                return False

        inner = values.get("text_config", {})
        if inner and "text_config" not in other:  # Files of version 4 may have its keys beside the others.
            beside = {key: value for key, value in other.items() if not isinstance(value, Mapping)}
            values = _taken(values, {"text_config": beside}, same)
            other = {key: value for key, value in other.items() if key in values or key not in inner}
        return _taken(values, other, same)

    def stored(self, config: AnyModelConfig, shapes: Mapping[str, Sequence[int]]) -> dict[str, Stored]:
        """Their tensors, by their names.

        Args:
            config: Of the model.
            shapes: Of its parameters, by our names, in the model's order.

        Raises:
            CheckpointError: a parameter has no place.
        """
        table = self.rows(config)
        found: dict[str, list[tuple[Row, Part]]] = {}
        for name, shape in shapes.items():
            row, theirs = self._place(table, name)
            part = Part(name, tuple(shape), row.block, row.axes, row.zeros)
            found.setdefault(theirs, []).append((row, part))
        return {theirs: _stored(theirs, places) for theirs, places in found.items()}

    def stored_name(self, config: AnyModelConfig, name: str) -> str:
        """Their name of a parameter of ours.

        Raises:
            CheckpointError: it has no place.
        """
        return self._place(self.rows(config), name)[1]

    def _place(self, table: Rows, name: str) -> tuple[Row, str]:
        for row in table:
            if match := re.match(re.escape(row.ours).replace(r"\{n\}", r"(?P<n>\d+)"), name):
                return row, row.theirs.format(**match.groupdict()) + name[match.end() :]
        raise CheckpointError(f"{name}: the layout of {self.model_type} has no place for it")

    def spelled(self, name: str) -> str:
        """A name of theirs as ``rows`` has it."""
        for pattern, replacement in self.spellings:
            name, changed = re.subn(pattern, replacement, name)
            if changed:
                break
        return name

    def is_unused(self, name: str) -> bool:
        """Whether a tensor of theirs is known to be of no use."""
        return any(re.fullmatch(pattern, name) for pattern in self.unused)


_KEPT = {
    *("model_type", "architectures", "dtype", "torch_dtype", "name_or_path", PREPROCESSOR),
    # One of them may hide another one from this reader and not from others.
    *("rope_theta", "rope_scaling", "rope_parameters"),
    "vision_use_head",  # SigLIP's pooling head is not exported, whatever the other folder holds.
}
"""Keys that an export never takes from a folder like it."""


def _taken(values: dict[str, Any], other: Mapping[str, Any], same: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """``values`` with the keys of ``other``, one by one and block by block, with which it is the ``same``."""
    found = dict(values)

    def fits(key: str, value: Any) -> bool:
        return same({**found, key: value})

    for key in [key for key in other if key not in _KEPT and not key.startswith("_")]:
        mine, theirs = found.get(key), other[key]
        if isinstance(mine, dict) and isinstance(theirs, Mapping):
            found[key] = _taken(mine, theirs, partial(fits, key))
        elif (key not in found or (theirs is not None and mine != theirs)) and fits(key, theirs):
            found[key] = theirs
    return found


def _stored(name: str, places: list[tuple[Row, Part]]) -> Stored:
    places = sorted(places, key=lambda place: place[0].part)
    parts = tuple(part for _, part in places)
    first = parts[0].shape
    shape = first if len(parts) == 1 else (sum(part.shape[0] for part in parts), *first[1:])
    if (wanted := places[0][0].shape) is not None:
        open_size = math.prod(shape) // abs(math.prod(wanted))
        shape = tuple(open_size if size == -1 else size for size in wanted)
    return Stored(name, shape, parts)


def computed(config: AnyModelConfig) -> dict[str, Any]:
    """What of a configuration decides what its weights compute, with defaults filled in and all tokens in one table."""
    values = config.model_dump(mode="json")
    if isinstance(config.vision, VisionConfig):
        _fill_attention(values["vision"], config.vision)
        values["vision"]["layer_scale"] = config.vision.layer_scale is not None
        del values["vision"]["init_std"]
        for gate in ("gate_init", "global_gate_init"):
            (values["vision"]["tiles"] or {}).pop(gate, None)
    if not isinstance(config, ModelConfig):
        return values
    decoder, block = config.decoder, values["decoder"]
    block["vocab_size"] = decoder.num_ids
    _fill_attention(block, decoder)
    # Otherwise ids are read that have no logit; in a contrastive model no id has one.
    if not config.predicts_tokens or decoder.predicted_rows == decoder.num_ids - decoder.vocab_size:
        del block["extra_tokens"]
    del block["dropout"], block["dropout_rows"], block["init_std"]  # Of training, and of its beginning.
    if config.connector is not None:
        # Weights go with either value of ``unseen_text``; transformers has one of them only.
        for name in (*config.connector.training_fields, "unseen_text"):
            values["connector"].pop(name, None)
    projector = config.connector.projector if isinstance(config.connector, FeatureConnectorBase) else None
    if isinstance(projector, MlpProjectorConfig):
        values["connector"]["projector"]["hidden_dim"] = projector.hidden_dim or decoder.hidden_dim
    return values


def _fill_attention(block: dict[str, Any], config: DecoderConfig | VisionConfig) -> None:
    attention = config.attention
    block["attention"]["num_kv_heads"] = attention.kv_heads
    block["attention"]["head_dim"] = attention.resolved_head_dim(config.hidden_dim)
    block["attention"]["qk_norm_config"] = (attention.qk_norm_config or config.norm).model_dump(mode="json")
    if block["attention"]["qk_norm"] == "none":
        del block["attention"]["qk_norm_config"]


def _differences(path: str, ours: Any, theirs: Any) -> Iterator[str]:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            yield from _differences(f"{path}.{key}", ours.get(key), theirs.get(key))
    elif ours != theirs:
        yield f"{path}={ours!r} (only {theirs!r})"
