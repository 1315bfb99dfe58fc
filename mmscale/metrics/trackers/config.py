"""The experiment trackers of a run: the blocks of ``metrics.trackers``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from data_pipeline.io.strict import StrictConfig
from mmscale.errors import ConfigError


class TrackerBase(StrictConfig):
    """The settings that every tracker has."""

    project: str = Field(default="mmscale", min_length=1)
    """Project in the tracker; MLflow calls it an experiment."""
    name: str | None = None
    """Name of the run in the tracker; null: the name of the run folder."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""


class WandbConfig(TrackerBase):
    """Weights & Biases. The key comes from ``WANDB_API_KEY`` or ``wandb login``, the server from ``WANDB_BASE_URL``."""

    kind: Literal["wandb"] = "wandb"
    entity: str | None = None
    """Team or user that owns the project; null: the default of your account."""
    mode: Literal["online", "offline"] | None = None
    """``offline`` writes into the run folder alone, for ``wandb sync``; null: ``WANDB_MODE``, else online."""


class MlflowConfig(TrackerBase):
    """MLflow."""

    kind: Literal["mlflow"] = "mlflow"
    tracking_uri: str | None = None
    """Server or database; null: ``MLFLOW_TRACKING_URI``, else an SQLite database in ``RUN/trackers/mlflow``."""


class TrackioConfig(TrackerBase):
    """Trackio."""

    kind: Literal["trackio"] = "trackio"
    space: str | None = None
    """Hugging Face Space that gets the metrics; null: ``TRACKIO_SPACE_ID``, else trackio's local database."""


def _block(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


TrackerConfig = Annotated[
    Annotated[WandbConfig | MlflowConfig | TrackioConfig, Field(discriminator="kind")],
    BeforeValidator(_block),
    Field(json_schema_extra={"x-kind-alone": True}),
]


def check_trackers(trackers: Sequence[TrackerConfig]) -> None:
    """Check that the packages of the trackers are installed, without importing them.

    Raises:
        ConfigError: a package is missing; the message gives the command that installs it.
    """
    for number, tracker in enumerate(trackers):
        modules: list[str] = [tracker.kind]
        if isinstance(tracker, MlflowConfig):
            uri = tracker.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:"
            modules += ["sqlalchemy"] if uri.startswith("sqlite:") else []
        for module in modules:
            if find_spec(module) is None:
                raise ConfigError(
                    f"metrics.trackers.{number}={tracker.kind}: the package {module} is not installed; install it "
                    f"with: pip install 'mmscale[{tracker.kind}]', or remove the tracker"
                )
