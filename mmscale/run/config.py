"""The configuration of a run: the blocks of all packages, and the checks that need more than one block or the disk.

A check of a single block is a validator of that block's class.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError, model_validator

from data_pipeline.config import DataConfig, DatasetConfig
from data_pipeline.errors import DataConfigError
from data_pipeline.io.missing import no_such_file
from data_pipeline.io.strict import StrictConfig, faults_of
from data_pipeline.loader.first_look import FirstLook, look_at
from data_pipeline.loader.front_to_back import expand_shards
from data_pipeline.loader.sample_source import with_image_tokenizer
from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing.config import PackingConfig
from data_pipeline.packing.document_builder import DocumentBuilder, dummy_document
from data_pipeline.packing.packer import Budget
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.manifest_check import reject_non_manifest
from data_pipeline.text.templates import PreferenceTemplate
from data_pipeline.text.tokenizer import Tokenizer, load_tokenizer
from mmscale.bad_steps.detector import BadStepsConfig, Policy
from mmscale.checkpoint.config import CheckpointConfig
from mmscale.checkpoint.upcycle import upcycling_problem
from mmscale.engine.config import EngineConfig
from mmscale.engine.expert_parallel import check_experts, check_ranks
from mmscale.errors import ConfigError
from mmscale.evaluate import EvaluationConfig, check_best, check_sets
from mmscale.metrics.config import MetricsConfig
from mmscale.metrics.sample_log import SampleLogConfig
from mmscale.metrics.trackers.config import check_trackers
from mmscale.models.build import check_adapters, media_spec
from mmscale.models.config import ModelConfig, TokenizerConfig, TrainedModelConfig
from mmscale.models.image_tokens import TOKENIZER
from mmscale.nn.moe import MoeConfig
from mmscale.objectives.reconstruction import ReconstructionConfig
from mmscale.optim.stages import ALL, StageConfig


class RunConfig(StrictConfig):
    """The configuration of a run."""

    run_dir: Path
    """Folder of the run: metrics, checkpoints, report. A run whose folder holds a checkpoint resumes from it."""
    seed: int = Field(default=1, ge=0, lt=2**32)
    """Seed of initial weights, data order, augmentation and dropout; from 0 to 2^32 - 1."""
    max_steps: int | None = Field(default=None, ge=1)
    """End the run after this many steps over all stages; at least 1, null runs every stage. Learning rate schedules
    still follow ``stages.*.steps``."""
    data: DataConfig
    """Tokenizer, data sets, packing and loading."""
    model: TrainedModelConfig
    """Decoder, vision tower and connector; or ``image_tokenizer`` and ``image_size``, to train an image tokenizer."""
    stages: tuple[StageConfig, ...]
    """The stages of the training, in order; each begins with the weights of the one before. Empty in a configuration
    that only describes a model, such as that of an imported one."""
    engine: EngineConfig = EngineConfig()
    """Precision, sharding over ranks, memory and messages."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are saved, and which are kept."""
    bad_steps: BadStepsConfig = BadStepsConfig()
    """Reaction to a step whose loss or gradient is not finite or is a spike."""
    metrics: MetricsConfig = MetricsConfig()
    """Values that are measured, and where they are written."""
    sample_log: SampleLogConfig = SampleLogConfig()
    """The list of each step's samples."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out sets and captions."""

    @model_validator(mode="before")
    @classmethod
    def _reject_other_files(cls, values: Any) -> Any:
        """Raise one sentence for the file of a model or a comparison, in which almost every key is an error."""
        if isinstance(values, dict) and "decoder" in values and "model" not in values:
            raise ValueError(
                "this is the file of a model, not of a run; a run names it as `model: {base: FILE}`, next to run_dir, "
                "data and stages; configs/quickstart.yaml is an example"
            )
        if isinstance(values, dict) and "compare" in values:
            raise ValueError("compare: this is the file of a comparison; run it with `mmscale compare`")
        return values

    @model_validator(mode="after")
    def _check_stages(self) -> RunConfig:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages.*.name: each stage needs a different name, got {names}")
        for number, stage in enumerate(self.stages):
            model = self.stage_model(number)  # Raises if an override is not valid.
            try:
                check_adapters(model)
            except ConfigError as error:
                raise ValueError(f"stages.{number} ({stage.name}): {error}") from error
            if not model.predicts_tokens:
                for key in ("z_loss", "distill", "preference"):
                    if value := getattr(stage, key):
                        place = f"stages.{number} ({stage.name}).{key}={value}"
                        raise ValueError(f"{place}: the model has no logits of tokens; leave it out")
            self._check_reconstruction(number, model)
            components = model.components
            named = {
                *stage.train,
                *stage.named_components,
                *(name for each in stage.weights for name in each.components),
            }
            if unknown := named - set(components) - {ALL}:
                raise ValueError(
                    f"stages.{number} ({stage.name}) names {sorted(unknown)}; this model has {sorted(components)}"
                )
            if TOKENIZER in stage.train:
                raise ValueError(
                    f"stages.{number} ({stage.name}).train names {TOKENIZER}: the data hold its codes, so a run that "
                    "draws cannot train it; train it before, in a run whose model is the image tokenizer alone"
                )
            problem = _preference_problem(stage, number, self.stage_data(number))  # Raises if an override is not valid.
            if problem is not None:
                raise ValueError(f"stages.{number} ({stage.name}).{problem}")
            if stage.upcycle and (problem := self._upcycling_problem(number)) is not None:
                raise ValueError(f"stages.{number} ({stage.name}).upcycle=true: {problem}")
        return self

    def _check_reconstruction(self, number: int, model: ModelConfig | TokenizerConfig) -> None:
        stage, place = self.stages[number], self._place(number)
        if not isinstance(model, TokenizerConfig):
            if stage.reconstruction is not None:
                raise ValueError(f"{place}.reconstruction: needs an image tokenizer as model; leave it out")
            return
        if stage.objective is not None:
            raise ValueError(f"{place}.objective: an image tokenizer has the losses of `reconstruction`; leave it out")
        problem = (stage.reconstruction or ReconstructionConfig()).problem(model, stage.train)
        if problem is not None:
            raise ValueError(f"{place}: {problem}")
        for key, value in (("sets", self.evaluation.sets), ("captions", self.evaluation.captions)):
            if value:
                raise ValueError(
                    f"evaluation.{key}: an image tokenizer answers nothing; set sets: [] and captions: null"
                )

    def _upcycling_problem(self, number: int) -> str | None:
        """Return why stage ``number`` cannot start its experts from dense feed-forwards; None if nothing is wrong yet.

        A checkpoint in ``weights`` is checked when the run starts.
        """
        stage, model = self.stages[number], self.stage_model(number)
        if isinstance(model, TokenizerConfig):
            return "an image tokenizer has no experts; leave out upcycle"
        decoder = model.decoder
        if not any(mlp.has_experts for mlp in decoder.block_mlps()):
            return "the decoder of this stage has no experts; set model.decoder.mlp.kind: moe, or leave out upcycle"
        if not stage.upcycles_previous:
            return None
        if number == 0:
            return "nothing is loaded; name the dense model: `weights: [{checkpoint: RUN}]`"
        before = self.decoder_model(number - 1).decoder
        pairs = zip(before.block_mlps(), decoder.block_mlps(), strict=False)
        problems = (upcycling_problem(dense, mlp) for dense, mlp in pairs if isinstance(mlp, MoeConfig))
        return next((f"model.decoder.mlp.{problem}" for problem in problems if problem), None)

    @model_validator(mode="after")
    def _check_expert_parallel(self) -> RunConfig:
        size = self.engine.expert_parallel
        for number in range(len(self.stages)) if size > 1 else ():
            model = self.stage_model(number)
            mlp = None if isinstance(model, TokenizerConfig) else model.decoder.mlp
            if not isinstance(mlp, MoeConfig):
                raise ValueError(
                    f"engine.expert_parallel={size}: the model of {self._place(number)} has no experts; set "
                    "engine.expert_parallel=1"
                )
            try:
                check_experts(size, mlp.num_experts)
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return self

    @model_validator(mode="after")
    def _check_roll_back(self) -> RunConfig:
        steps, keep = self.bad_steps.roll_back_steps, self.checkpoint
        if self.bad_steps.policy is Policy.ROLL_BACK and keep.every_steps is not None:
            most = (keep.keep_last - 1) * keep.every_steps + 1
            if steps > most:
                raise ValueError(
                    f"bad_steps.roll_back_steps={steps}: the run keeps checkpoints of at most {most} steps back, with "
                    f"checkpoint.every_steps={keep.every_steps} and keep_last={keep.keep_last}; raise one of these two"
                )
        return self

    @property
    def total_steps(self) -> int:
        """Steps of the whole run: the sum over all stages, at most ``max_steps``."""
        return min(sum(stage.steps for stage in self.stages), self.max_steps or 2**62)

    def stages_from(self, first: int) -> Iterator[tuple[int, StageConfig]]:
        """Yield number and stage of each stage from ``first`` on that begins before the run ends."""
        begin = 0
        for number, stage in enumerate(self.stages):
            if number >= first and begin < self.total_steps:
                yield number, stage
            begin += stage.steps

    @property
    def media_spec(self) -> MediaSpec:
        """The media specification of the ``model`` block without the overrides of stages; see ``stage_media``."""
        return media_spec(self.model)

    def stage_data(self, number: int) -> DataConfig:
        """Return the data block of stage ``number``: ``data`` with the stage's overrides.

        Mappings are merged, unless the override changes ``kind``. Lists are replaced.

        Raises:
            ValueError: the merged block is not valid, or the override sets a default of data sets without data sets.
        """
        override = self.stages[number].data or {}
        for key in ("template", "transforms"):
            if key in override and "datasets" not in override:
                raise ValueError(
                    f"{self._place(number)}.data.{key}: changes no data set, since those of data.datasets have theirs; "
                    f"give the stage its own data.datasets"
                )
        return _overridden(self.data, [override], f"{self._place(number)}.data")

    def decoder_model(self, number: int) -> ModelConfig:
        """Return ``stage_model``, for a command that needs a decoder of text.

        Raises:
            ConfigError: the model is an image tokenizer.
        """
        model = self.stage_model(number)
        if isinstance(model, TokenizerConfig):
            raise ConfigError("model.image_tokenizer: this command needs a model with a decoder of text")
        return model

    def stage_model(self, number: int) -> ModelConfig | TokenizerConfig:
        """Return the model of stage ``number``: ``model`` with the overrides of all stages up to this one, in order.

        Without stages, return ``model``.

        Raises:
            ValueError: the merged block is not valid.
        """
        if not self.stages:
            return self.model
        overrides = [stage.model for stage in self.stages[: number + 1]]
        return _overridden(self.model, overrides, f"{self._place(number)}.model")

    def stage_media(self, number: int) -> MediaSpec:
        """Return the media specification of the model of stage ``number``."""
        return media_spec(self.stage_model(number))

    def continues(self, number: int) -> bool:
        """Return whether stage ``number`` continues the previous stage's batches: same data block, same crops."""
        before = number - 1
        return (
            number > 0
            and self.stage_data(number) == self.stage_data(before)
            and self.stage_media(number) == self.stage_media(before)
        )

    def evaluation_data(self, number: int) -> DataConfig:
        """Return the data block to evaluate a model of stage ``number``: that of the last stage with an equal model.

        Without stages, return ``data``.
        """
        if not self.stages:
            return self.data
        model = self.stage_model(number)
        return self.stage_data(max(n for n in range(len(self.stages)) if self.stage_model(n) == model))

    def _place(self, number: int) -> str:
        return f"stages.{number} ({self.stages[number].name})"


def _preference_problem(stage: StageConfig, number: int, data: DataConfig) -> str | None:
    """Return why the loss of a stage does not fit its data or the weights that it begins with; None if it does."""
    pairs = [isinstance(dataset.template, PreferenceTemplate) for dataset in data.datasets]
    if stage.preference is None:
        if any(pairs) and stage.objective is None:
            return (
                "preference: missing, and a data set has a template of kind preference, whose rejected answers the "
                "next-token loss would learn"
            )
        return None
    if not all(pairs):
        return (
            f"preference: data set {data.datasets[pairs.index(False)].name} has another template; every data set of "
            "the stage needs template.kind=preference"
        )
    if data.packing.too_long != "error":
        return (
            f"data.packing.too_long={data.packing.too_long}: a cut pair has lost an answer; set error, which skips "
            "pairs that no pack can hold"
        )
    whole = [source.components == (ALL,) for source in stage.weights]
    if stage.preference.reference == "start" and (whole != [True] if number == 0 or whole else False):
        return (
            "preference.reference=start: needs one checkpoint with the weights of the beginning; give `weights` one "
            "entry for all components, or name the reference: a checkpoint, or none"
        )
    return None


C = TypeVar("C", bound=StrictConfig)


def _overridden(block: C, overrides: list[dict[str, Any] | None], place: str) -> C:
    if not any(overrides):
        return block
    merged = block.model_dump()
    for each in overrides:
        merged = _merged(merged, each or {})
    try:
        return type(block).model_validate(merged)
    except ValidationError as error:
        raise ValueError("; ".join(faults_of(error, merged, place))) from error


def _merged(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    if overrides.get("kind", base.get("kind")) != base.get("kind"):
        return overrides  # Another variant, which does not have the keys of this one.
    merged = dict(base)
    for key, value in overrides.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def require_training(config: RunConfig) -> None:
    """Check that the configuration describes a training run, and not only a model.

    Raises:
        ConfigError: there is no stage, or a stage has no data set.
    """
    remedy = (
        f"this configuration describes a model, for `mmscale generate`, `chat` and `eval`. To train the model, write a "
        f"file that begins with `base: {config.run_dir}` and has run_dir, data.datasets and stages"
    )
    if not config.stages:
        raise ConfigError(f"stages: empty; {remedy}")
    for number, stage in enumerate(config.stages):
        if not config.stage_data(number).datasets:
            raise ConfigError(f"data.datasets: empty in stage {stage.name}; {remedy}")


def check_files(config: RunConfig) -> list[str]:
    """Check the configuration against the files that it names. Reads the text of some samples, and decodes no image.

    Returns:
        Warnings: one sentence for each stage whose model has a vision tower and whose samples have no image.

    Raises:
        ConfigError: ``run_dir`` cannot be created, a manifest is missing, or there is no stage or no data set.
        ConfigError: the package of a tracker is not installed.
        ConfigError: the tokenizer has more ids than the model has embeddings.
        ConfigError: a stage that trains the tower or the connector has no image, or a held-out set does not fit its
            configuration.
        DataConfigError: a streamed shard is missing, the tokenizer cannot be loaded, the transforms do not fit the
            model of a stage, or a data set has no usable sample.
        DataPipelineError: a manifest or a held-out sample is damaged.
    """
    require_training(config)
    _check_run_dir(config.run_dir)
    check_trackers(config.metrics.trackers)
    notes = []
    for number, stage in enumerate(config.stages):
        data, model = config.stage_data(number), config.stage_model(number)
        place = f"stages.{number}.data" if stage.data else "data"
        for index, dataset in enumerate(data.datasets):
            expand_shards(dataset.shards)
            if isinstance(dataset.manifest, Path):
                key = f"{place if 'datasets' in (stage.data or {}) else 'data'}.datasets.{index}.manifest"
                if not dataset.manifest.exists():
                    raise ConfigError(
                        f"{key}={dataset.manifest}: {no_such_file(dataset.manifest)}; "
                        f"make it with `mmscale data ingest` or `mmscale data index`"
                    )
                reject_non_manifest(dataset.manifest, str(dataset.manifest), key)
        try:
            tokenizer = load_tokenizer(data.tokenizer)
        except DataConfigError as error:
            key = f"{place if 'tokenizer' in (stage.data or {}) else 'data'}.tokenizer.path"
            raise DataConfigError(f"{key}={data.tokenizer.path}: {error}") from error
        tokens, rows = tokenizer.vocab_size, 0 if isinstance(model, TokenizerConfig) else model.decoder.num_ids
        if not isinstance(model, TokenizerConfig) and tokens > rows:
            extra = model.decoder.extra_tokens
            read = f"{rows}" if extra is None else f"{rows - extra.rows}, extra_tokens.rows={extra.rows}"
            raise ConfigError(
                f"model.decoder.vocab_size={read}: the tokenizer of stage {stage.name} has {tokens} ids; "
                f"set at least {tokens} rows"
            )
        looks = [_look_at(dataset, data.packing, tokenizer, model, stage) for dataset in data.datasets]
        if model.vision is not None and not any(look is None or look.holds_images for look in looks):
            notes.append(_without_images(config, number))
    _check_evaluation(config)
    return notes


def _check_evaluation(config: RunConfig) -> None:
    """Check the held-out sets for the model at the end, and if they are scored during training, of each stage."""
    reached = [number for number, _ in config.stages_from(0)]
    check_best(config.evaluation, config.stage_media(reached[-1]))
    checked: list[object] = []
    for number in reversed(reached):
        data, spec = config.evaluation_data(number), config.stage_media(number)
        for block, is_scored in (
            (config.evaluation, number == reached[-1]),
            (config.evaluation.during_training, config.evaluation.every_steps is not None),
        ):
            if is_scored and (block, data, spec) not in checked:
                checked.append((block, data, spec))
                check_sets(block, data, spec)


def _check_run_dir(run_dir: Path) -> None:
    """Create and remove a folder in the nearest existing parent of ``run_dir``: mode bits alone are not sufficient."""
    path = Path(os.path.abspath(run_dir))
    parent = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not os.path.isdir(parent):
        raise ConfigError(f"run_dir={run_dir}: {parent} is not a folder; set a folder that no other run uses")
    try:
        with tempfile.TemporaryDirectory(prefix=".mmscale-", dir=parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"run_dir={run_dir}: cannot create a folder in {parent} ({error.strerror}); choose a folder with write "
            "permission"
        ) from error


def _look_at(
    dataset: DatasetConfig,
    packing: PackingConfig,
    tokenizer: Tokenizer,
    model: ModelConfig | TokenizerConfig,
    stage: StageConfig,
) -> FirstLook | None:
    """Inspect some samples of a data set. Return None for a streamed or remote one, which takes longer to read."""
    try:
        spec = media_spec(model)
        if isinstance(dataset.manifest, Path):
            dataset = with_image_tokenizer(dataset, Manifest.open(dataset.manifest))
        builder = DocumentBuilder(dataset, tokenizer, spec)
        budget = Budget(packing, spec, dummy_document(spec, tokenizer.pad_id))
        if not isinstance(dataset.manifest, Path):
            return None
        look = look_at(dataset, builder, budget)
    except DataConfigError as error:
        raise DataConfigError(f"stage {stage.name}, data set {dataset.name}: {error}") from error
    if look.unusable == look.looked_at:
        raise DataConfigError(
            f"stage {stage.name}, data set {dataset.name}: none of the {look.looked_at} inspected samples can be used; "
            f"the first: {look.reason}"
        )
    if isinstance(model, TokenizerConfig):
        return look
    _check_image_ids(dataset, model, stage)
    logits = model.decoder.vocab_size + model.decoder.predicted_rows
    if model.predicts_tokens and look.highest_label >= logits and look.highest_label not in model.decoder.image_ids:
        raise ConfigError(
            f"model.decoder.extra_tokens.predicted=false: stage {stage.name}, data set {dataset.name} teaches "
            f"token {look.highest_label}, and the model has logits for the ids below {logits}; set predicted: true, or "
            "learn no such token"
        )
    return look


def _check_image_ids(dataset: DatasetConfig, model: ModelConfig, stage: StageConfig) -> None:
    """Require that the codes of a data set's images have the ids that the decoder gives them."""
    tokens, decoder = dataset.image_tokens, model.decoder
    if tokens is None:
        return
    first, where = tokens.first_id, f"stage {stage.name}, data set {dataset.name}"
    ids = tokens.ids or (() if first is None else range(first, first + tokens.codebook_size))
    if decoder.image_tokens is not None and list(ids) != list(decoder.image_ids):
        raise ConfigError(
            f"image_tokens: {where} uses other ids for the codes of images than model.decoder.image_tokens; set "
            f"first_id={decoder.image_ids.start} and codebook_size={len(decoder.image_ids)}"
        )
    if decoder.image_tokens is None and tokens.num_ids > decoder.num_ids:
        raise ConfigError(
            f"model.decoder.vocab_size={decoder.num_ids}: {where} uses the ids up to {tokens.num_ids - 1} for codes "
            f"of images (image_tokens); set at least {tokens.num_ids} rows, or model.decoder.image_tokens"
        )


def _without_images(config: RunConfig, number: int) -> str:
    stage = config.stages[number]
    names = ", ".join(dataset.name for dataset in config.stage_data(number).datasets)
    what = f"stages.{number} ({stage.name}): the model has a vision tower, and no image was found in its data ({names})"
    trained = [name for name in ("vision", "connector") if name in stage.train or ALL in stage.train]
    if trained:
        raise ConfigError(
            f"{what}, so {' and '.join(trained)} would learn nothing; add data with images, "
            "or remove both from stages.*.train, or set model.vision and model.connector to null"
        )
    return what


def check_world(config: RunConfig, world_size: int) -> None:
    """Check that every one of ``world_size`` ranks gets a lane in every stage, and an equal part of the experts.

    Raises:
        ConfigError: a rank would get no sample, or ``engine.expert_parallel`` does not divide ``world_size``.
    """
    check_ranks(config.engine.expert_parallel, world_size)
    for number in range(len(config.stages)):
        lanes = config.stage_data(number).lanes
        if world_size > lanes:
            raise ConfigError(
                f"world size {world_size} does not fit data.lanes={lanes}: {world_size - lanes} ranks would get "
                f"no sample; start at most {lanes} ranks or set data.lanes to {world_size} or more"
            )
