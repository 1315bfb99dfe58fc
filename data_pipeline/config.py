"""The ``data`` block of a run's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from data_pipeline.audio.transform import AudioConfig
from data_pipeline.errors import DataConfigError
from data_pipeline.images.drawn_images import ImageTokensConfig
from data_pipeline.images.transforms import FixedTransform, TransformConfig
from data_pipeline.images.video import VideoConfig
from data_pipeline.io.strict import StrictConfig
from data_pipeline.modality import ModalityConfig
from data_pipeline.order.fault_policy import FaultConfig
from data_pipeline.order.lanes import OrderConfig, Schedule
from data_pipeline.packing.config import PackingConfig
from data_pipeline.shards.sample_reader import MAX_TEXT_BYTES
from data_pipeline.storage.config import CacheConfig, StorageConfig
from data_pipeline.storage.location import Location, Url
from data_pipeline.text.templates import CaptionTemplate, TemplateConfig
from data_pipeline.text.tokenizer import TokenizerConfig

ImportPath = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*(\.\w+)*$")]
"""``module:attr``: an attribute of a Python module."""


class WeightFrom(StrictConfig):
    """A weight of a data set that applies from a step on."""

    from_step: int = Field(ge=0)
    """First step with this weight, from 0. Steps count from the first step that uses this data block."""
    weight: float = Field(ge=0)
    """Share of the drawn samples, relative to the weights of the other data sets; 0 draws nothing."""


class DatasetConfig(StrictConfig):
    """One data set of the mixture."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Unique name of letters, digits and ``_.-``. The name is part of the seed of the order and the augmentation."""
    manifest: Location | None = None
    """Manifest written by ``mmscale data ingest`` or ``index``: a path, relative to the working directory, or a URL
    (``s3://``, ``gs://``, ``az://``, ``http://``, ``https://``). Paths of shards and indexes are relative to its
    folder. Give exactly one of ``manifest``, ``shards`` and ``pipeline``."""
    shards: tuple[str, ...] = ()
    """Tars without a manifest, each read from front to back: paths, URLs, or ``pipe:`` and a shell command. Braces are
    expanded (``part-{000..099}.tar``)."""
    pipeline: ImportPath | None = None
    """``module:attr`` of Python code that yields the samples: a webdataset pipeline, a list of its stages, another
    iterable of samples, or a function that returns one of these."""
    stages: tuple[ImportPath, ...] = ()
    """``module:attr`` of webdataset stages that process the samples of ``shards`` or ``pipeline``, in order. Not
    allowed with ``manifest``."""
    weight: Annotated[float, Field(gt=0)] | tuple[WeightFrom, ...] | None = None
    """Share of the drawn samples, relative to the weights of the other data sets. A list gives weights from a step on;
    before its first step the weight is 0. Null: 1, or the weight that follows from ``repeats``."""
    repeats: float | None = Field(default=None, gt=0)
    """Instead of ``weight``, with a manifest only: the weight is this factor times the number of samples. Data sets
    with equal ``repeats`` end their epochs together. Null: use ``weight``."""
    max_epochs: int | None = Field(default=None, ge=1)
    """Number of epochs after which the mixture drops the data set; null repeats it without end."""
    max_text_bytes: int = Field(default=MAX_TEXT_BYTES, ge=1)
    """Largest size of a ``txt`` or ``json`` member, in bytes. A larger member makes a bad sample (fault kind
    ``text``)."""
    template: TemplateConfig = CaptionTemplate()
    """How the texts and images of a sample form a document, and which of its text is learned. If the key is missing,
    ``data.template`` applies."""
    transforms: TransformConfig = FixedTransform()
    """How an image is resized, cropped and split into patches. If the key is missing, ``data.transforms`` applies."""
    image_tokens: ImageTokensConfig | None = None
    """How an image becomes tokens of the decoder: for template ``drawing``, and for models that read images as tokens
    instead of through a tower. null: it does not. If the key is missing, ``data.image_tokens`` applies."""
    video: VideoConfig | None = None
    """How a video becomes frames, patches and tokens. null: videos are ignored. If the key is missing,
    ``data.video`` applies."""
    audio: AudioConfig | None = None
    """How a sound becomes log-mel frames and tokens. null: sounds are ignored. If the key is missing, ``data.audio``
    applies."""

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
    def modalities(self) -> dict[str, ModalityConfig]:
        """The blocks of modalities besides images, by name; None is left out."""
        values = ((name, getattr(self, name, None)) for name in type(self).model_fields)
        return {name: value for name, value in values if isinstance(value, ModalityConfig)}

    @property
    def code(self) -> tuple[str, ...]:
        """Import paths of the Python code that the data set runs."""
        return (*([] if self.pipeline is None else [self.pipeline]), *self.stages)

    @property
    def indexed(self) -> Path | Url:
        """The manifest, for callers that need one.

        Raises:
            DataConfigError: the data set has shards or a pipeline instead.
        """
        if self.pipeline is not None:
            raise DataConfigError(f"data set {self.name}: this needs a manifest, and a pipeline has none")
        if self.manifest is None:
            raise DataConfigError(
                f"data set {self.name}: this needs a manifest, and the data set names its shards without one; "
                "make one with: mmscale data index SHARDS --manifest FILE"
            )
        return self.manifest

    def weight_changes(self, num_samples: int) -> list[tuple[int, float]]:
        """Return (first step, weight) pairs, ascending. ``num_samples`` turns ``repeats`` into a weight."""
        if isinstance(self.weight, tuple):
            return [(change.from_step, change.weight) for change in self.weight]
        if self.repeats is not None:
            return [(0, self.repeats * num_samples)]
        return [(0, 1.0 if self.weight is None else self.weight)]


class DataConfig(StrictConfig):
    """The training data: tokenizer, data sets, packing, order, and how they are read."""

    tokenizer: TokenizerConfig
    """The tokenizer."""
    template: TemplateConfig | None = None
    """Template of data sets that set none, and of prompts if there is no data set. null: ``caption``."""
    transforms: TransformConfig | None = None
    """Transforms of data sets that set none, and of images if there is no data set. null: ``fixed``."""
    image_tokens: ImageTokensConfig | None = None
    """Image tokens of data sets that set none, and of prompts if there is no data set. null: none."""
    video: VideoConfig | None = None
    """Videos of data sets that set none, and of prompts if there is no data set. null: none."""
    audio: AudioConfig | None = None
    """Sounds of data sets that set none, and of prompts if there is no data set. null: none."""
    datasets: tuple[DatasetConfig, ...]
    """The data sets of the mixture. May be empty in a configuration that only describes a model."""
    lanes: int = Field(ge=1, le=1 << 20)
    """Rows of the global batch. Each row holds one pack per step, whatever the number of ranks; at least one row per
    rank."""
    packing: PackingConfig
    """How documents are packed."""
    order: OrderConfig = OrderConfig()
    """How samples are shuffled."""
    workers: int = Field(default=0, ge=0, le=1024)
    """Worker processes of each rank; at most one per lane of the rank is started. With 0 the training process loads the
    data between steps and decodes images in two threads. Does not change the order."""
    prefetch: int = Field(default=2, ge=1, le=1024)
    """Steps that each worker prepares ahead. Does not change the order."""
    storage: StorageConfig = StorageConfig()
    """How remote data are read. Does not change the order."""
    cache: CacheConfig = CacheConfig()
    """The disk cache of remote data. Does not change the order."""
    faults: FaultConfig = FaultConfig()
    """How bad samples and lost shards are treated."""

    @model_validator(mode="after")
    def _check_names(self) -> DataConfig:
        names = [dataset.name for dataset in self.datasets]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"data set names must be unique; used more than once: {', '.join(twice)}")
        if not names:
            return self
        schedule = Schedule.from_changes([dataset.weight_changes(num_samples=1) for dataset in self.datasets])
        for start, weights in zip(schedule.starts, schedule.weights, strict=True):
            if not any(weights):
                raise ValueError(f"no data set has a weight above 0 from step {start} on")
        return self

    @model_validator(mode="after")
    def _fill_datasets(self) -> DataConfig:
        """Apply the fields that data sets have too, such as ``template`` and ``video``, to those without them."""
        names = type(self).model_fields.keys() & DatasetConfig.model_fields.keys()
        defaults = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        filled = tuple(
            dataset.model_copy(update={name: defaults[name] for name in defaults.keys() - dataset.model_fields_set})
            for dataset in self.datasets
        )
        object.__setattr__(self, "datasets", filled)  # Instances are frozen.
        return self

    @property
    def prompts(self) -> DatasetConfig:
        """Template and transforms of a user's prompt: those of the first data set, else the defaults of this block.

        Without data sets, the result has no source and cannot be read.
        """
        if self.datasets:
            return self.datasets[0]
        return DatasetConfig.model_construct(
            name="prompts",
            template=self.template or CaptionTemplate(),
            transforms=self.transforms or FixedTransform(),
            image_tokens=self.image_tokens,
            video=self.video,
            audio=self.audio,
        )
