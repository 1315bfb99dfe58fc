"""The base of every configuration class: frozen, and deaf to no key."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class StrictConfig(BaseModel):
    """A configuration block. Unknown keys are errors; values never change after validation.

    A field's documentation is the string under it: meaning, unit, legal range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
