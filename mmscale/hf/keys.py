"""A foreign configuration of which every key must be accounted for: a key that nobody reads may change the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.io.strict import LARGEST_INT
from mmscale.errors import CheckpointError
from mmscale.hf.class_defaults import CLASS_DEFAULTS

REQUIRED: Any = object()
_HARMLESS = {
    *("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"),
    *("use_cache", "transformers_version"),
    *("image_token_id", "image_token_index", "image_seq_length", "video_token_id"),
    *("vision_token_id", "vision_start_token_id", "vision_end_token_id"),
    *("model_type", "architectures", "dtype", "torch_dtype", "task_specific_params", "problem_type"),
    *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder"),
    *("id2label", "label2id", "pretraining_tp", "name_or_path", "sep_token_id", "decoder_start_token_id"),
    # How to sample text, which files of 2022 say of towers, too.
    *("temperature", "top_k", "top_p", "typical_p", "num_beams", "num_beam_groups", "num_return_sequences"),
    *("min_length", "max_length", "length_penalty", "repetition_penalty", "diversity_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
}
"""Keys of every family that say nothing about what the weights compute."""


class Keys:
    """The keys of one JSON object.

    Args:
        values: The object.
        where: File, and place in it, for messages.
        family: ``model_type`` whose class defaults stand for the keys that the object leaves out; None for none. A
            key that is null stays null.

    Attributes:
        given: The object.
        values: The object with the class defaults.
        read: Keys that somebody asked for.
    """

    def __init__(self, values: Mapping[str, Any], where: str, family: str | None = None) -> None:
        self.given, self.where = values, where
        self.values = {**CLASS_DEFAULTS.get(family or "", {}), **values}
        self.read: set[str] = set()

    def filled(self, family: str) -> Keys:
        """The same object with the class defaults of ``family``; a key that is read there is read here."""
        again = Keys(self.given, self.where, family)
        again.read = self.read
        return again

    def take(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """The value of a key; null is as if it were absent.

        Raises:
            CheckpointError: it is missing and has no default, or is not a ``kind``; an int serves as a float.
        """
        self.read.add(key)
        value = self.values.get(key)
        if value is None:
            if default is REQUIRED:
                raise CheckpointError(f"{self.where}: {key} is missing")
            return default
        if type(value) in (int, float) and not abs(value) <= LARGEST_INT:  # NaN is not.
            raise CheckpointError(f"{self.where}: {key}={value!r:.40} is no finite number within ±{LARGEST_INT:g}")
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise CheckpointError(f"{self.where}: {key}={value!r:.80} must be of type {kind.__name__}")
        return value

    def size(self, key: str, most: int = LARGEST_INT, default: Any = REQUIRED) -> int:
        """A number of things. Take it so before dividing by it or counting up to it.

        Raises:
            CheckpointError: as ``take``, or it is below 1 or above ``most``.
        """
        value: int = self.take(key, int, default)
        if not 1 <= value <= most:
            bound = "at least 1" if most == LARGEST_INT else f"between 1 and {most}"
            raise CheckpointError(f"{self.said(key)} must be {bound}")
        return value

    def block(self, key: str, family: str | None = None) -> Keys | None:
        """The object under a key, with the class defaults of ``family``."""
        return None if self.take(key, dict, None) is None else self.needed(key, family)

    def needed(self, key: str, family: str | None = None) -> Keys:
        """The object under a key that must be there, with the class defaults of ``family``.

        Raises:
            CheckpointError: it is missing.
        """
        return Keys(self.take(key, dict), f"{self.where}: {key}", family)

    def must_be(self, key: str, *allowed: object) -> None:
        """Refuses other values than those that the model can have; null and absence are allowed.

        Raises:
            CheckpointError: it has another one.
        """
        self.read.add(key)
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise CheckpointError(f"{self.said(key)} is not supported, only {allowed[0]!r}")

    def said(self, key: str) -> str:
        """Place and value of a key, for messages."""
        default = "" if key in self.given else " (the class default, since the key is missing)"
        return f"{self.where}: {key}={self.values.get(key)!r:.80}{default}"

    def finish(self) -> None:
        """Complains of keys that nobody asked for.

        Raises:
            CheckpointError: there are some.
        """
        ignored = self.read | _HARMLESS
        odd = [
            k
            for k, v in self.given.items()
            if k not in ignored and not k.startswith("_") and v not in (None, False, [], {})
        ]
        if odd:
            raise CheckpointError(
                f"{self.where}: {odd[0]}={self.given[odd[0]]!r:.80} is not known for this family; if it does not "
                "change what the model computes, remove it"
            )
