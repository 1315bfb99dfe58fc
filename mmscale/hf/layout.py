"""Convert a family's configuration and tensor names to mmscale's and back.

    config.json --to_model--> AnyModelConfig --to_keys--> config.json
    decoder.layers.3.mlp.up_proj.weight  <--rules-->  model.layers.3.mlp.up_proj.weight

A family is one ``FamilyLayout``. The first ``NameRule`` whose prefix matches rewrites a parameter's name. Several
parameters may get the same Hugging Face name, for example fused projections or a table of new tokens. Their values are
then concatenated along the first dimension, or interleaved in blocks of rows. Conversely, one parameter may be stored
in several tensors: the stacked weights of experts, which published folders split by expert.

``config_values`` checks each export: ``to_model`` reads the output of ``to_keys``. The result must equal the exported
config in every value that changes the forward computation.

In this package "ours" is mmscale's name, shape or key, and "theirs" is the one in the Hugging Face folder.
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
from mmscale.hf.forward_config import differences, forward_config
from mmscale.hf.image_input import ImageInput, ImageSource
from mmscale.hf.keys import Keys, raise_unknown
from mmscale.hf.read import PREPROCESSOR
from mmscale.models.config import AnyModelConfig, AudioTowerConfig, ModelConfig, TokenizerConfig, TowerConfig

_MOST_DIFFERENCES = 3
"""Largest number of differences that an error message lists."""


@dataclass(frozen=True)
class Axes:
    """A permutation of axes between the two formats.

    Attributes:
        sizes: Shape that their values are viewed as before the permutation; one size may be -1.
        order: For each of our axes, the index of their axis.
    """

    sizes: tuple[int, ...]
    order: tuple[int, ...]

    def to_ours(self, values: Tensor) -> Tensor:
        """Return a view of their values with our order of axes."""
        return values.reshape(self.sizes).permute(self.order)

    def to_theirs(self, values: Tensor) -> Tensor:
        """Return our flat values in their order: ``(n,)``, a copy."""
        ours = values.view([self.sizes[axis] for axis in self.order])
        return ours.permute([self.order.index(axis) for axis in range(len(self.order))]).reshape(-1)


@dataclass(frozen=True)
class NameRule:
    """Map parameters with one prefix to tensors of the Hugging Face folder.

    Attributes:
        ours: Prefix of our name; ``{n}`` matches any number and is the same on both sides.
        theirs: Prefix of their name. The rest of our name is appended.
        shape: Shape of their tensor where it differs for the same values in the same order (a convolution over
            patches, an axis of length 1). One dimension may be -1.
        block: Rows per block where parameters that share a tensor are interleaved: a block of the first, a block of
            the second, ..., then the first again (queries, keys and values head by head). None to concatenate them.
        part: Position among the parameters that share a tensor; equal ones keep the model's order.
        axes: Permutation where their values have another order (pixels of a patch with channels innermost). Must not
            be combined with ``block`` (not checked).
        zeros: Number of zero values that follow each block (or the whole parameter) in their tensor and that ours
            lacks, such as dummy heads. ``shape`` must include them.
        slices: Ends of the names of the tensors that together hold one parameter; they follow ``theirs``. ``{e}`` is
            the index along our first dimension (the expert). The rows of each index are divided evenly among the
            names, in this order. Empty where one tensor holds the whole parameter. Must not be combined with the
            other fields (not checked).
        unit_rows: Whether an export scales each row of our parameter to length 1. An import does not change rows.
    """

    ours: str
    theirs: str
    shape: tuple[int, ...] | None = None
    block: int | None = None
    part: int = 0
    axes: Axes | None = None
    zeros: int = 0
    slices: tuple[str, ...] = ()
    unit_rows: bool = False

    def tensors(self, shape: tuple[int, ...]) -> Iterator[tuple[str, int, tuple[int, ...]]]:
        """Yield (end of their name, index of the first of our flat values, shape of these values) of each tensor.

        Args:
            shape: Shape of our parameter.
        """
        if not self.slices:
            yield "", 0, shape
            return
        own = (shape[1] // len(self.slices), *shape[2:])
        for expert in range(shape[0]):
            for number, end in enumerate(self.slices):
                yield end.format(e=expert), (expert * len(self.slices) + number) * math.prod(own), own


NameRules = tuple[NameRule, ...]


def renames(*pairs: tuple[str, str]) -> NameRules:
    """Return rules that only rename: one for each ``(ours, theirs)`` pair of prefixes."""
    return tuple(NameRule(ours, theirs) for ours, theirs in pairs)


def with_prefix(rules: NameRules, *, ours: tuple[str, str] = ("", ""), theirs: tuple[str, str] = ("", "")) -> NameRules:
    """Return a component's rules for a larger model: replace the prefix ``old`` by ``new`` in each name.

    Args:
        rules: Rules of the component.
        ours: ``(old, new)`` prefix of our names. ``new`` is also added to a name without ``old``.
        theirs: The same for their names.
    """
    return tuple(
        replace(
            rule,
            ours=ours[1] + rule.ours.removeprefix(ours[0]),
            theirs=theirs[1] + rule.theirs.removeprefix(theirs[0]),
        )
        for rule in rules
    )


@dataclass(frozen=True)
class TensorPart:
    """One of our parameters, or a consecutive range of its flat values, in an ``HfTensor``.

    Attributes:
        name: Name of the parameter.
        shape: Shape of the values in this tensor: that of the parameter, or that of the range.
        block: As in ``NameRule``.
        axes: As in ``NameRule``.
        zeros: As in ``NameRule``.
        start: Index of the first of these values in the flat parameter.
        unit_rows: As in ``NameRule``.
    """

    name: str
    shape: tuple[int, ...]
    block: int | None = None
    axes: Axes | None = None
    zeros: int = 0
    start: int = 0
    unit_rows: bool = False


@dataclass(frozen=True)
class HfTensor:
    """A tensor of the Hugging Face folder and the parameters stored in it.

    Attributes:
        name: Name in the folder.
        shape: Shape in the folder, ``zeros`` included.
        parts: Our parameters in storage order.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[TensorPart, ...]

    @classmethod
    def single(cls, name: str, shape: tuple[int, ...]) -> HfTensor:
        """Return the tensor of one parameter with our name and shape."""
        return cls(name, shape, (TensorPart(name, shape),))

    @property
    def num_turns(self) -> int:
        """Number of times that the parts alternate; 1 when they are concatenated."""
        first = self.parts[0]
        return 1 if first.block is None else first.shape[0] // first.block

    def split(self, values: Tensor) -> Iterator[tuple[TensorPart | None, Tensor]]:
        """Yield (part, view of ``values``) for each part, and (None, view) for its padding of zeros.

        The view of a part is flat for a single turn and ``(num_turns, values of a block)`` for several. With ``axes``
        it has our order of axes. The view of a padding is always ``(num_turns, zeros)``.
        """
        turns = values.reshape(self.num_turns, -1)
        start = 0
        for part in self.parts:
            size = math.prod(part.shape) // self.num_turns
            own = turns[0, start : start + size] if self.num_turns == 1 else turns[:, start : start + size]
            yield part, own if part.axes is None else part.axes.to_ours(own)
            start += size
            if part.zeros:
                yield None, turns[:, start : start + part.zeros]
                start += part.zeros

    def ranges(self) -> Iterator[tuple[TensorPart, int, int]]:
        """Yield (part, start, stop) in storage order: the range of the parameter's flat values that comes next.

        The caller applies ``axes`` and ``unit_rows``, and adds ``zeros``.
        """
        for turn in range(self.num_turns):
            for part in self.parts:
                size = math.prod(part.shape) // self.num_turns
                yield part, part.start + turn * size, part.start + (turn + 1) * size


@dataclass(frozen=True)
class FamilyLayout:
    """A model family in Hugging Face's format.

    Attributes:
        model_type: ``model_type`` of the family's ``config.json``.
        architecture: Value that an export writes to ``architectures``.
        rules: Returns the name rules for one of our configs.
        to_model: Converts their keys to our config. It must read every key that changes the computation.
        to_keys: Converts our config to their keys, without ``model_type`` and ``architectures``. It may put the image
            processor's keys under ``preprocessor_config``.
        unused: Regular expressions of tensor names that an import may drop; each must match the whole name.
        aliases: (regular expression, replacement) from names in other versions of transformers to those in ``rules``.
        kind: Class of the configuration: of a whole model, of a tower alone, or of an image tokenizer alone.
        modules: (regular expression, replacement) from names in ``rules`` to those of the modules of ``auto_class`` in
            version 5 of transformers, where they differ.
        auto_class: Class of transformers that opens an export; None if transformers has none for this family.
        part: Key of the object in ``config.json`` with the keys of the model; None if the whole file has them. An
            export writes this object and takes the other keys from the folder of ``--like``, if any.
        images: Describes the images of a folder; None for a tower or a text model, see ``image_input``.
        sounds: Returns the values of ``data.audio`` for a folder; None for a family that takes no sound.
        stacked: As ``rules``, for the spelling that version 5 of transformers has in memory: one tensor for all
            experts of a layer. None for a family without experts or without such a spelling.
        buffers: Whether the folder holds the model's persistent buffers, too (stored means and variances).
        training_only: Regular expression of parameters and buffers that only training reads: an export leaves them out.
            It must match the whole name.
    """

    model_type: str
    architecture: str
    rules: Callable[[Any], NameRules]
    to_model: Callable[[Keys], AnyModelConfig]
    to_keys: Callable[[Any], dict[str, Any]]
    unused: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    kind: type[AnyModelConfig] = ModelConfig
    auto_class: str | None = "AutoModelForCausalLM"
    modules: tuple[tuple[str, str], ...] = ()
    part: str | None = None
    images: Callable[[ImageSource], ImageInput] | None = None
    sounds: Callable[[ImageSource], dict[str, Any]] | None = None
    stacked: Callable[[Any], NameRules] | None = None
    buffers: bool = False
    training_only: str | None = None

    def model_config(self, values: Mapping[str, Any], where: str) -> AnyModelConfig:
        """Convert the values of a ``config.json`` to our config.

        Args:
            values: As ``read_config`` returns them, with the image processor under ``preprocessor_config``.
            where: File, for messages.

        Raises:
            CheckpointError: a key is missing, wrong or unknown, or needs a computation that our models lack.
        """
        unread: list[str] = []
        keys = Keys(values, where, self.model_type, unread)
        try:
            config = self.to_model(keys)
        except ValidationError as error:
            raise CheckpointError(f"{where}: {first_fault(error)}") from error
        # Hostile values raise these: a size of 0 that is a divisor, a list where a number is expected, and so on.
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(
                f"{where}: a key has a value that no {self.model_type} has ({type(error).__name__}: {error!s:.200})"
            ) from error
        keys.raise_on_unread()
        raise_unknown(unread)
        return config

    def own_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of a ``config.json`` with those of ``part`` at the top level."""
        inner = values.get(self.part or "")
        return {**values, **(inner if isinstance(inner, Mapping) else {})}

    def config_values(self, config: AnyModelConfig) -> dict[str, Any]:
        """Convert our config to the values of ``config.json``, with the image processor under ``preprocessor_config``.

        Raises:
            CheckpointError: the family cannot express the config; the message names the first differences.
        """
        if not isinstance(config, self.kind):
            raise CheckpointError(f"{self.model_type} holds {_HELD[self.kind]}")
        values = {"model_type": self.model_type, "architectures": [self.architecture], **self.to_keys(config)}
        again = self.model_config(values, f"{self.model_type} configuration")
        if different := list(differences("model", forward_config(config), forward_config(again))):
            raise CheckpointError(f"{self.model_type} cannot express {'; '.join(different[:_MOST_DIFFERENCES])}")
        return values

    def with_keys_of(self, values: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``values`` with each key of another ``config.json`` that does not change the computation.

        The other file's value replaces that in ``values``. Keys in ``_NEVER_COPIED`` and keys with a leading ``_`` are
        not copied.

        Examples are token ids, the context length, an image size that is no multiple of the patch size, and a sliding
        window that is longer than the context.

        Args:
            values: As ``config_values`` returns them.
            other: Values of a ``config.json`` of the same family.
        """
        expected = forward_config(self.model_config(values, "exported configuration"))

        def same(candidate: dict[str, Any]) -> bool:
            try:
                return forward_config(self.model_config(candidate, "exported configuration")) == expected
            except CheckpointError:
                return False

        inner = values.get("text_config", {})
        if inner and "text_config" not in other:  # Files of version 4 may have the decoder's keys at the top level.
            top_level = {key: value for key, value in other.items() if not isinstance(value, Mapping)}
            values = _copy_neutral_keys(values, {"text_config": top_level}, same)
            other = {key: value for key, value in other.items() if key in values or key not in inner}
        return _copy_neutral_keys(values, other, same)

    def hf_tensors(
        self, config: AnyModelConfig, shapes: Mapping[str, Sequence[int]], *, stacked: bool = False
    ) -> dict[str, HfTensor]:
        """Return the tensors of the Hugging Face folder by their names.

        Args:
            config: Config of the model.
            shapes: Shapes of its parameters by our names, in the model's order.
            stacked: Whether one tensor holds all experts of a layer.

        Raises:
            CheckpointError: no rule matches a parameter, or the family has no spelling with stacked experts.
        """
        rules = self.stacked if stacked else self.rules
        if rules is None:
            raise CheckpointError(
                f"{self.model_type} has no spelling with stacked experts; leave out --stacked-experts"
            )
        applied = rules(config)
        found: dict[str, list[tuple[NameRule, TensorPart]]] = {}
        for name, shape in shapes.items():
            rule, theirs = self._match(applied, name)
            for end, start, own in rule.tensors(tuple(shape)):
                part = TensorPart(name, own, rule.block, rule.axes, rule.zeros, start, rule.unit_rows)
                found.setdefault(theirs + end, []).append((rule, part))
        return {theirs: _hf_tensor(theirs, parts) for theirs, parts in found.items()}

    def hf_name(self, config: AnyModelConfig, name: str) -> str:
        """Return the Hugging Face name of the one tensor that stores a parameter. Not for experts.

        Raises:
            CheckpointError: no rule matches the parameter.
        """
        return self._match(self.rules(config), name)[1]

    def _match(self, rules: NameRules, name: str) -> tuple[NameRule, str]:
        for rule in rules:
            if match := re.match(re.escape(rule.ours).replace(r"\{n\}", r"(?P<n>\d+)"), name):
                return rule, rule.theirs.format(**match.groupdict()) + name[match.end() :]
        raise CheckpointError(f"{name}: no name rule of {self.model_type} matches this parameter")

    def current_name(self, name: str) -> str:
        """Return the name that ``rules`` uses for a tensor name of any version. The first matching alias applies."""
        return _renamed(name, self.aliases)

    def module_name(self, name: str) -> str:
        """Return the name of a module in the class of transformers for its name in ``rules``."""
        return _renamed(name, self.modules)

    def is_unused(self, name: str) -> bool:
        """Return whether an import may drop this tensor of the folder."""
        return any(re.fullmatch(pattern, name) for pattern in self.unused)


_HELD = {
    ModelConfig: "models",
    TowerConfig: "vision towers alone",
    AudioTowerConfig: "audio towers alone",
    TokenizerConfig: "image tokenizers alone",
}
"""Content of a family's folders, by ``FamilyLayout.kind``."""
_NEVER_COPIED = {
    *("model_type", "architectures", "dtype", "torch_dtype", "name_or_path", PREPROCESSOR),
    # With two of them in a file, readers differ in the one that they use.
    *("rope_theta", "rope_scaling", "rope_parameters"),
    # SigLIP's pooling head and the parts of Qwen2.5-Omni that speak are not exported.
    *("vision_use_head", "enable_audio_output"),
}
"""Keys that ``with_keys_of`` does not copy."""
_COPIED_WHOLE = {"vocabulary_map"}
"""Objects that ``with_keys_of`` copies as one value: they have an entry for each token."""


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    """Apply the first pattern that matches."""
    for pattern, replacement in table:
        name, changed = re.subn(pattern, replacement, name)
        if changed:
            break
    return name


def _copy_neutral_keys(
    values: dict[str, Any], other: Mapping[str, Any], same: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Return ``values`` with each key of ``other`` for which ``same`` returns true; nested objects key by key."""
    found = dict(values)

    def fits(key: str, value: Any) -> bool:
        return same({**found, key: value})

    for key in [key for key in other if key not in _NEVER_COPIED and not key.startswith("_")]:
        mine, theirs = found.get(key), other[key]
        if isinstance(mine, dict) and isinstance(theirs, Mapping) and key not in _COPIED_WHOLE:
            found[key] = _copy_neutral_keys(mine, theirs, partial(fits, key))
        elif (key not in found or (theirs is not None and mine != theirs)) and fits(key, theirs):
            found[key] = theirs
    return found


def _hf_tensor(name: str, matches: list[tuple[NameRule, TensorPart]]) -> HfTensor:
    matches = sorted(matches, key=lambda match: match[0].part)
    parts = tuple(part for _, part in matches)
    first = parts[0].shape
    shape = first if len(parts) == 1 else (sum(part.shape[0] for part in parts), *first[1:])
    if (wanted := matches[0][0].shape) is not None:
        open_size = math.prod(shape) // abs(math.prod(wanted))
        shape = tuple(open_size if size == -1 else size for size in wanted)
    return HfTensor(name, shape, parts)
