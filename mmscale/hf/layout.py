"""What a family's file says: how its configuration and its names become ours, and back.

    config.json --to_model--> ModelConfig --to_keys--> config.json
    decoder.layers.3.mlp.up_proj.weight  <--names-->  model.layers.3.mlp.up_proj.weight

A family is one ``Layout``. Names are rewritten from the front by the first row that matches. Parameters of ours that
get the same foreign name are stored there one after another, along the first dimension; that is how a table of new
tokens, or projections that others fuse, become one matrix, and how it is cut again.

A layout cannot lie about a configuration: what ``to_keys`` writes is read back by ``to_model`` and compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.models.config import ModelConfig

_SHOWN = 3


@dataclass(frozen=True)
class Layout:
    """A family of models of Hugging Face's transformers.

    Attributes:
        model_type: By which its ``config.json`` is recognised.
        architecture: Class that the exported folder asks for.
        names: Rows (beginning of our name, beginning of theirs); ``{n}`` is any number, the same on both sides.
        to_model: Our configuration; must read every key that matters.
        to_keys: The keys of theirs, ``model_type`` and ``architectures`` apart.
        unused: Names (regular expressions) of tensors that old files hold and nobody needs.
    """

    model_type: str
    architecture: str
    names: tuple[tuple[str, str], ...]
    to_model: Callable[[Keys], ModelConfig]
    to_keys: Callable[[ModelConfig], dict[str, Any]]
    unused: tuple[str, ...] = ()

    def model_config(self, values: Mapping[str, Any], where: str) -> ModelConfig:
        """Our configuration of a ``config.json``.

        Raises:
            CheckpointError: it asks for something that our models do not compute.
        """
        keys = Keys(values, where)
        try:
            config = self.to_model(keys)
        except ValidationError as error:
            raise CheckpointError(f"{where}: {error.errors()[0]['msg']}") from error
        keys.finish()
        return config

    def config_values(self, config: ModelConfig) -> dict[str, Any]:
        """A ``config.json`` of our configuration.

        Raises:
            CheckpointError: the family has no words for it; names the first differences.
        """
        values = {"model_type": self.model_type, "architectures": [self.architecture], **self.to_keys(config)}
        again = self.model_config(values, f"{self.model_type} configuration")
        if different := list(_differences("model", computed(config), computed(again))):
            raise CheckpointError(f"{self.model_type} has no words for {'; '.join(different[:_SHOWN])}")
        return values

    def stored_name(self, name: str) -> str:
        """Their name of a parameter of ours.

        Raises:
            CheckpointError: no row matches.
        """
        for ours, theirs in self.names:
            if found := re.match(re.escape(ours).replace(r"\{n\}", r"(?P<n>\d+)"), name):
                return theirs.format(**found.groupdict()) + name[found.end() :]
        raise CheckpointError(f"{name}: the layout of {self.model_type} has no place for it")

    def joined(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Their name -> the parameters of ours that lie in it, one after another."""
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self.stored_name(name), []).append(name)
        return found

    def is_unused(self, name: str) -> bool:
        """Whether a tensor of theirs is known to be of no use."""
        return any(re.fullmatch(pattern, name) for pattern in self.unused)


def computed(config: ModelConfig) -> dict[str, Any]:
    """What of a configuration decides what its weights compute, with defaults filled in and all tokens in one table."""
    values = config.model_dump(mode="json")
    decoder, block = config.decoder, values["decoder"]
    block["vocab_size"] = decoder.num_ids
    block["attention"]["num_kv_heads"] = decoder.attention.kv_heads
    block["attention"]["head_dim"] = decoder.attention.resolved_head_dim(decoder.hidden_dim)
    block["attention"]["qk_norm_config"] = (decoder.attention.qk_norm_config or decoder.norm).model_dump(mode="json")
    if block["attention"]["qk_norm"] == "none":
        del block["attention"]["qk_norm_config"]
    if decoder.predicted_rows == decoder.num_ids - decoder.vocab_size:  # Else ids are read that have no logit.
        del block["extra_tokens"]
    del block["dropout"], block["init_std"]  # Of training, and of its beginning.
    return values


def _differences(path: str, ours: Any, theirs: Any) -> Iterator[str]:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            yield from _differences(f"{path}.{key}", ours.get(key), theirs.get(key))
    elif ours != theirs:
        yield f"{path}={ours!r} (only {theirs!r})"
