"""Read a Hugging Face configuration and reject keys that were not read.

A key that the importer ignores may change the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.io.strict import LARGEST_INT
from mmscale.errors import CheckpointError
from mmscale.hf.class_defaults import CLASS_DEFAULTS

REQUIRED: Any = object()
_IGNORED = {
    *("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"),
    *("use_cache", "transformers_version", "init_std"),
    *("image_token_id", "image_token_index", "image_seq_length", "video_token_id"),
    *("vision_token_id", "vision_start_token_id", "vision_end_token_id"),
    *("model_type", "architectures", "dtype", "torch_dtype", "task_specific_params", "problem_type"),
    *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder"),
    *("id2label", "label2id", "pretraining_tp", "name_or_path", "sep_token_id", "decoder_start_token_id"),
    # Sampling options. Files from 2022 have them in vision towers, too.
    *("temperature", "top_k", "top_p", "typical_p", "num_beams", "num_beam_groups", "num_return_sequences"),
    *("min_length", "max_length", "length_penalty", "repetition_penalty", "diversity_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
}
"""Keys that do not change the forward computation in any family."""


class Keys:
    """The keys of one JSON object; it records which keys were read.

    Args:
        values: The object.
        where: File and position in the file, for messages.
        family: ``model_type`` whose class defaults replace missing keys; None for no defaults. A key that is null
            stays null.
        unread: List that ``raise_on_unread`` extends instead of raising, shared with the objects in this one. None to
            raise.

    Attributes:
        given: The object without defaults.
        values: The object with the class defaults.
        read_keys: Keys that were read; ``raise_on_unread`` accepts them.
    """

    def __init__(
        self, values: Mapping[str, Any], where: str, family: str | None = None, unread: list[str] | None = None
    ) -> None:
        self.given, self.where, self.unread = values, where, unread
        self.values = {**CLASS_DEFAULTS.get(family or "", {}), **values}
        self.read_keys: set[str] = set()

    def with_defaults(self, family: str) -> Keys:
        """Return the same object with the class defaults of ``family``. Both share one set of read keys."""
        filled = Keys(self.given, self.where, family, self.unread)
        filled.read_keys = self.read_keys
        return filled

    def read(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """Return the value of a key and mark the key as read. A null counts as missing.

        Args:
            key: Key to read.
            kind: Expected type. With ``float`` an int is accepted and converted.
            default: Returned when the key is missing; without it the key is required.

        Raises:
            CheckpointError: the key is missing and has no default, the value is not a ``kind``, or a number is not
                finite or above ``LARGEST_INT`` in magnitude.
        """
        self.read_keys.add(key)
        value = self.values.get(key)
        if value is None:
            if default is REQUIRED:
                raise CheckpointError(f"{self.where}: {key} is missing")
            return default
        if type(value) in (int, float) and not abs(value) <= LARGEST_INT:  # Also true for NaN.
            raise CheckpointError(f"{self.where}: {key}={value!r:.40} is no finite number within ±{LARGEST_INT:g}")
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise CheckpointError(f"{self.where}: {key}={value!r:.80} must be of type {kind.__name__}")
        return value

    def positive_int(self, key: str, most: int = LARGEST_INT, default: Any = REQUIRED) -> int:
        """Return an integer from 1 to ``most``. Use it for values that become divisors or loop bounds.

        Raises:
            CheckpointError: as ``read``, or the value is out of range.
        """
        value: int = self.read(key, int, default)
        if not 1 <= value <= most:
            bound = "at least 1" if most == LARGEST_INT else f"between 1 and {most}"
            raise CheckpointError(f"{self.describe(key)} must be {bound}")
        return value

    def optional_object(self, key: str, family: str | None = None) -> Keys | None:
        """Return the object under a key with the class defaults of ``family``; None if the key is missing."""
        return None if self.read(key, dict, None) is None else self.required_object(key, family)

    def required_object(self, key: str, family: str | None = None) -> Keys:
        """Return the object under a required key with the class defaults of ``family``.

        Raises:
            CheckpointError: the key is missing or is not an object.
        """
        return Keys(self.read(key, dict), f"{self.where}: {key}", family, self.unread)

    def must_be(self, key: str, *allowed: object) -> None:
        """Mark a key as read and require one of the ``allowed`` values.

        A null passes, and so does a missing key without a class default.

        Raises:
            CheckpointError: the key has another value; the message names the first allowed one.
        """
        self.read_keys.add(key)
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise CheckpointError(f"{self.describe(key)} is not supported, only {allowed[0]!r}")

    def describe(self, key: str) -> str:
        """Return position and value of a key, for messages."""
        default = "" if key in self.given else " (the class default, since the key is missing)"
        return f"{self.where}: {key}={self.values.get(key)!r:.80}{default}"

    def raise_on_unread(self) -> None:
        """Require that every key of the object was read; with a shared list, add the others to it.

        Keys in ``_IGNORED``, keys with a leading ``_`` and the values null, false, 0, ``[]`` and ``{}`` pass.

        Raises:
            CheckpointError: keys were not read, and there is no shared list; the message names all of them.
        """
        ignored = self.read_keys | _IGNORED
        found = [
            f"{self.where}: {key}={value!r:.80}"
            for key, value in self.given.items()
            if key not in ignored and not key.startswith("_") and value not in (None, False, [], {})
        ]
        if self.unread is not None:
            self.unread.extend(found)
        else:
            raise_unknown(found)


def raise_unknown(keys: list[str]) -> None:
    """Raise if ``keys``, each with its position and value, is not empty.

    Raises:
        CheckpointError: it is not; the message names all of them.
    """
    if len(keys) == 1:
        raise CheckpointError(
            f"{keys[0]} is not known for this family; if it does not change what the model computes, remove it"
        )
    if keys:
        lines = "".join(f"\n  {key} is not known for this family" for key in keys)
        raise CheckpointError(
            f"{len(keys)} unknown keys; remove those that do not change what the model computes:{lines}"
        )
