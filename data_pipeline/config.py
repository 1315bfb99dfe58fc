"""The ``data`` block of a run: composes the configurations of the parts of the data side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from data_pipeline.errors import DataConfigError
from data_pipeline.images.transforms import FixedTransform, TransformConfig
from data_pipeline.io.strict import StrictConfig
from data_pipeline.order.config import OrderConfig
from data_pipeline.order.fault_policy import FaultConfig
from data_pipeline.order.lanes import Schedule
from data_pipeline.packing.config import PackingConfig
from data_pipeline.shards.sample_reader import MAX_TEXT_BYTES
from data_pipeline.storage.config import CacheConfig, StorageConfig
from data_pipeline.storage.location import Location, Url
from data_pipeline.text.templates import CaptionTemplate, TemplateConfig
from data_pipeline.text.tokenizer import TokenizerConfig

ImportPath = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*(\.\w+)*$")]
"""``module:attr``: an attribute of a Python module."""


class WeightFrom(StrictConfig):
    """A weight that holds from a step on."""

    from_step: int = Field(ge=0)
    """First step of it, counted from where this data block is first used."""
    weight: float = Field(ge=0)
    """Share of the draws, relative to the other data sets; 0 draws nothing."""


class DatasetConfig(StrictConfig):
    """One data set of the mixture."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Unique name of letters, digits, ``_.-``; a part of the seed of its order and its augmentation."""
    manifest: Location | None = None
    """Manifest written by ``mmscale data ingest`` or ``index``: a path, relative to the working directory, or a URL
    (``s3://``, ``gs://``, ``az://``, ``http://``, ``https://``). Shards and indexes lie where it lies."""
    shards: tuple[str, ...] = ()
    """Instead of a manifest: tars to stream from front to back, paths, URLs or ``pipe:`` and a shell command, with
    braces (``part-{000..099}.tar``)."""
    pipeline: ImportPath | None = None
    """Instead of a manifest or shards: ``module:attr``, a webdataset pipeline, a list of its stages, another iterable
    of samples, or a function that returns one of these."""
    stages: tuple[ImportPath, ...] = ()
    """``module:attr`` of webdataset stages that the samples of ``shards`` or ``pipeline`` go through, in order."""
    weight: Annotated[float, Field(gt=0)] | tuple[WeightFrom, ...] | None = None
    """Share of the draws, relative to the other data sets; or a list of weights, each from a step on (before the first
    it is 0). Null: 1, or what ``repeats`` says."""
    repeats: float | None = Field(default=None, gt=0)
    """Instead of ``weight``: a weight of the number of samples times this, so that data sets with ``repeats`` 1 end
    their epochs together."""
    max_epochs: int | None = Field(default=None, ge=1)
    """Epochs after which the data set is left out of the mixture; null repeats it for ever."""
    max_text_bytes: int = Field(default=MAX_TEXT_BYTES, ge=1)
    """Largest ``txt`` or ``json`` member, bytes. A larger one is a bad sample (fault kind ``text``)."""
    template: TemplateConfig = CaptionTemplate()
    """Which text is read and which is learned."""
    transforms: TransformConfig = FixedTransform()
    """How an image becomes views."""

    @model_validator(mode="after")
    def _check_source(self) -> DatasetConfig:
        if sum(map(bool, (self.manifest, self.shards, self.pipeline))) != 1:
            raise ValueError(f"data set {self.name}: give either a manifest or shards or a pipeline")
        if self.manifest is not None and self.stages:
            raise ValueError(f"data set {self.name}: stages need shards or a pipeline; a manifest is read by index")
        if self.manifest is None and self.repeats is not None:
            raise ValueError(f"data set {self.name}: repeats needs a manifest, which counts samples; give a weight")
        return self

    @model_validator(mode="after")
    def _check_weight(self) -> DatasetConfig:
        if self.repeats is not None and self.weight is not None:
            raise ValueError("weight and repeats exclude each other")
        if isinstance(self.weight, tuple):
            steps = [change.from_step for change in self.weight]
            if not steps or steps != sorted(set(steps)):
                raise ValueError(f"weight: expected weights with ascending from_step, got from_step {steps}")
        return self

    @property
    def code(self) -> tuple[str, ...]:
        """Import paths of the Python code that the data set runs."""
        return (*([] if self.pipeline is None else [self.pipeline]), *self.stages)

    @property
    def indexed(self) -> Path | Url:
        """The manifest, for what cannot do without.

        Raises:
            DataConfigError: its shards are streamed without one.
        """
        if self.pipeline is not None:
            raise DataConfigError(f"data set {self.name}: a pipeline has no index, which this needs")
        if self.manifest is None:
            raise DataConfigError(
                f"data set {self.name}: its shards have no index, which this needs; "
                "make one with: mmscale data index SHARDS --manifest FILE"
            )
        return self.manifest

    def weight_changes(self, num_samples: int) -> list[tuple[int, float]]:
        """(first step, weight), ascending; ``num_samples`` are those of the data set."""
        if isinstance(self.weight, tuple):
            return [(change.from_step, change.weight) for change in self.weight]
        if self.repeats is not None:
            return [(0, self.repeats * num_samples)]
        return [(0, 1.0 if self.weight is None else self.weight)]


class DataConfig(StrictConfig):
    """Everything that decides what the model is fed."""

    tokenizer: TokenizerConfig
    """Text to ids."""
    datasets: tuple[DatasetConfig, ...] = Field(min_length=1)
    """The mixture."""
    lanes: int = Field(ge=1, le=1 << 20)
    """Rows of the global batch: each holds one pack a step, whatever the number of ranks."""
    packing: PackingConfig
    """Budgets of a pack."""
    order: OrderConfig = OrderConfig()
    """Shuffling."""
    workers: int = Field(default=0, ge=0, le=1024)
    """Worker processes of each rank, never more than its lanes; 0 loads between steps, images in two threads. Never
    changes the order."""
    prefetch: int = Field(default=2, ge=1, le=1024)
    """Steps that each worker is ahead. Never changes the order."""
    storage: StorageConfig = StorageConfig()
    """How remote data are read. Never changes the order."""
    cache: CacheConfig = CacheConfig()
    """The disk cache of remote data. Never changes the order."""
    faults: FaultConfig = FaultConfig()
    """What happens to bad samples."""

    @model_validator(mode="after")
    def _check_names(self) -> DataConfig:
        names = [dataset.name for dataset in self.datasets]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"data set names must differ; used twice: {', '.join(twice)}")
        schedule = Schedule.of([dataset.weight_changes(num_samples=1) for dataset in self.datasets])
        for start, weights in zip(schedule.starts, schedule.weights, strict=True):
            if not any(weights):
                raise ValueError(f"no data set has a weight above 0 from step {start} on")
        return self
