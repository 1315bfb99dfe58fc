"""The state of fp16's dynamic loss scale, as plain numbers. Attributes as read in DeepSpeed 0.19, stages 1 to 3."""

from __future__ import annotations

from typing import Any

_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def loss_scaler_state(optimizer: Any) -> dict[str, float] | None:
    """Return scale and counters of a DeepSpeed optimizer wrapper; None if the loss is not scaled dynamically."""
    scaler = getattr(optimizer, "loss_scaler", None)
    if scaler is None or not scaler.dynamic:
        return None
    return {name: float(getattr(scaler, name)) for name in _FIELDS}


def set_loss_scaler_state(optimizer: Any, state: dict[str, float] | None) -> None:
    """Restore what ``loss_scaler_state`` returned. Does nothing without a state or without dynamic scaling."""
    if state is None or loss_scaler_state(optimizer) is None:
        return
    for name in _FIELDS:
        setattr(optimizer.loss_scaler, name, state[name] if name == "cur_scale" else int(state[name]))
