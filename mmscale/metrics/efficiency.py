"""What a step computes and how well it uses the devices, as figures of its line in ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmscale.dist import World
from mmscale.engine.engine import Engine, StepReport
from mmscale.metrics.peaks import Peak, peak_of


def device_peak(engine: Engine, override: float | None) -> Peak:
    """The peak of one rank's device in the engine's precision. ``override``: ``metrics.peak_flops``."""
    return peak_of(engine.world.device, engine.precision.dtype, override)


def step_flops(engine: Engine, microbatches: Sequence[Any]) -> list[float]:
    """Model's and hardware's operations of this rank's microbatches (still on the host), teachers' included."""
    model: Any = engine.model
    recompute = engine.config.activation_checkpointing
    counts = [model.training_flops(part, engine.trained_components, recompute=recompute) for part in microbatches]
    counts += [teacher.flops(part) for teacher in engine.teachers for part in microbatches]
    return [float(sum(count.model for count in counts)), float(sum(count.hardware for count in counts))]


def flop_figures(flops: Sequence[float]) -> dict[str, int]:
    """``model_flops`` and ``hardware_flops`` of a step; ``flops`` are sums over all ranks."""
    return {"model_flops": int(flops[0]), "hardware_flops": int(flops[1])}


def ideal_seconds(flops: Sequence[float], peak: Peak, world: World) -> float | None:
    """What a step would take if every device did nothing but the model's operations, at its peak; None without one."""
    return flops[0] / (world.world_size * peak.flops) if peak.flops else None


def span_figures(report: StepReport) -> dict[str, float | int]:
    """Time and memory of the phases on this rank, and the components' gradient norms if they were asked for."""
    seconds = {f"{name}_seconds": value for name, value in report.spans.seconds.items()}
    peaks = {f"{name}_peak_bytes": value for name, value in report.spans.peak_bytes.items()}
    return seconds | peaks | {f"grad_norm/{name}": norm for name, norm in report.component_grad_norms.items()}
