"""The configuration of a run: the blocks of all packages, and the checks that need more than one block or the disk.

A check of a single block is a validator of that block's class.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError, model_validator

from data_pipeline.config import DataConfig
from data_pipeline.io.strict import StrictConfig, faults_of
from data_pipeline.media_spec import MediaSpec
from data_pipeline.text.templates import PreferenceTemplate
from mmscale.bad_steps.detector import BadStepsConfig, Policy
from mmscale.checkpoint.config import CheckpointConfig
from mmscale.checkpoint.upcycle import upcycling_problem
from mmscale.engine.config import EngineConfig
from mmscale.engine.expert_parallel import check_experts, check_ranks
from mmscale.errors import ConfigError
from mmscale.evaluate import EvaluationConfig
from mmscale.metrics.config import MetricsConfig
from mmscale.metrics.sample_log import SampleLogConfig
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
        evaluation = self.evaluation
        blocks = {"sets": evaluation.sets, "captions": evaluation.captions, "drawings": evaluation.drawings}
        for key, value in blocks.items():
            if value:
                raise ValueError(
                    f"evaluation.{key}: an image tokenizer answers nothing; set sets: [] and captions: null, and leave "
                    "drawings out"
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
        return _media(self.model, self.data)

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

    def stored_reference(self, number: int) -> str | None:
        """Return the checksum of the reference model of stage ``number`` whose log-probabilities its data hold."""
        template = self.stage_data(number).datasets[0].template if self.stages[number].preference else None
        return template.stored_reference if isinstance(template, PreferenceTemplate) else None

    def decoder_model(self, number: int) -> ModelConfig:
        """Return ``stage_model``, for a command that needs a decoder of text.

        Raises:
            ConfigError: the model is an image tokenizer.
        """
        model = self.stage_model(number)
        if isinstance(model, TokenizerConfig):
            raise ConfigError(
                "model.image_tokenizer: this command needs a model with a decoder of text; an image tokenizer alone "
                "can be trained, checked, compared, reported and exported, and encodes data (mmscale data encode)"
            )
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
        """Return the media specification of the model of stage ``number``, for the data of that stage."""
        return _media(self.stage_model(number), self.stage_data(number) if self.stages else self.data)

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

    def drawing_data(self, number: int) -> DataConfig:
        """Return the data block to draw with a model of stage ``number``.

        It is that of the last stage up to this one with a data set that draws, else ``evaluation_data``: later stages
        may no longer draw.
        """
        blocks = (self.stage_data(stage) for stage in range(number, -1, -1) if self.stages)
        drawing = (data for data in blocks if any(dataset.template.draws for dataset in data.datasets))
        return next(drawing, None) or self.evaluation_data(number)

    def _place(self, number: int) -> str:
        return f"stages.{number} ({self.stages[number].name})"


def _media(model: ModelConfig | TokenizerConfig, data: DataConfig) -> MediaSpec:
    tokens = [dataset.image_tokens for dataset in (*data.datasets, data.prompts)]
    return media_spec(model, encodes=any(each is not None and each.encoded == "in_step" for each in tokens))


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
    stored = {getattr(dataset.template, "stored_reference", None) for dataset in data.datasets}
    if len(stored) > 1:
        return "data.datasets.*.template.stored_reference: all data sets of the stage need the same value"
    if stage.preference.reference == "none" and stored != {None}:
        return (
            "preference.reference=none: the loss would ignore the stored log-probabilities; name their reference "
            "model, or leave out template.stored_reference"
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
