"""Every number of every configuration class rejects NaN, infinities, -1, 0 and 1e18, or is listed here as legal."""

from __future__ import annotations

import importlib
import math
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

import data_pipeline
import mmscale
from data_pipeline.io.strict import StrictConfig
from mmscale.config import load
from mmscale.errors import ConfigError
from mmscale.run.config import RunConfig

ROOT = Path(__file__).parents[2]
_BAD = (math.nan, math.inf, -math.inf, -1, 0, 10**18)


def _classes(base: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for each in base.__subclasses__():
        yield each
        yield from _classes(each)


def _every_class() -> set[type[BaseModel]]:
    for package in (data_pipeline, mmscale):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:  # A module for an optional package, such as a harness.
                if str(error.name).partition(".")[0] in ("mmscale", "data_pipeline"):
                    raise
    ours = {each for each in _classes(StrictConfig) if each.__module__.split(".")[0] in ("mmscale", "data_pipeline")}
    return {each for each in ours if not each.__name__.startswith("_")}


def _instances(value: Any) -> Iterator[BaseModel]:
    if isinstance(value, BaseModel):
        yield value
        for name in type(value).model_fields:
            yield from _instances(getattr(value, name))
    elif isinstance(value, dict):
        for item in value.values():
            yield from _instances(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _instances(item)


def _paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of the numbers in a plain value; of a list only the first item."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield path
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _paths_of(item, (*path, key))
    elif isinstance(value, list | tuple) and value:
        yield from _paths_of(value[0], (*path, 0))


def _with(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _with(value[path[0]], path[1:], new)
    return copy


_ZERO = """
Accelerator.overlap Accelerator.node_latency_seconds Accelerator.network_latency_seconds Accelerator.unit_seconds
Accelerator.step_seconds Accelerator.price_per_hour SiteConfig.gpus_per_node
SiteConfig.max_restarts SiteConfig.restart_delay_seconds
AdafactorConfig.weight_decay AdafactorConfig.beta2_decay AdafactorConfig.min_scale AdamWConfig.weight_decay
AdversarialConfig.start_step PerceptualConfig.layers
AdamWConfig.betas AdaptersConfig.dropout AugmentConfig.shift AugmentConfig.flip AugmentConfig.brightness
AugmentConfig.contrast
AugmentConfig.saturation BestConfig.min_delta CaptionTemplate.text_dropout ChoiceSet.seed CompareConfig.seeds
CrossAttentionConnectorConfig.gate_init DataConfig.workers DecoderConfig.attention_dropout DecoderConfig.dropout
DrawingTemplate.text_weight
DrawingTemplate.image_weight DrawingTemplate.mark_weight DrawingTemplate.caption_last DrawingTemplate.text_dropout
EngineConfig.zero_stage
AudioModalityConfig.idle_rows
AudioConfig.min_seconds AudioConfig.silence_peak AudioConfig.max_clipped ConvGmlpProjectorConfig.norm_eps
EngineConfig.gather_bucket_elements EngineConfig.persistent_parameter_elements EngineConfig.live_parameter_elements
DrawingSet.seed GenerationSet.seed HeldOutSet.seed HybridConnectorConfig.gate_init ImageTokensConfig.first_id
InterleavedTemplate.text_dropout
LinearProjectorConfig.norm_eps
MetricsConfig.smoothing MlpProjectorConfig.norm_eps MoeConfig.shared_dim MoeConfig.balance_coefficient
MoeConfig.z_coefficient MoeConfig.bias_rate MoeConfig.dense_first MoeConfig.jitter MoeConfig.expert_dropout
MuonConfig.weight_decay MuonConfig.momentum MuonConfig.betas
NormConfig.eps PatchesConfig.mean PerplexitySet.seed Role.weight ReconstructionConfig.l1 ReconstructionConfig.l2
ReconstructionConfig.commitment ReconstructionConfig.codebook RunConfig.seed SamplingConfig.temperature
PreferenceConfig.label_smoothing PreferenceConfig.next_token
SamplingConfig.min_p SamplingConfig.seed StageConfig.warmup_steps StageConfig.min_learning_rate StageConfig.z_loss
StageConfig.clip StorageConfig.retry_seconds StorageConfig.gap_bytes StorageConfig.read_ahead_bytes
TimesChoice.seconds TrimmedChoice.skip_seconds
MovqganConfig.attention_levels TilesConfig.global_layers TilesConfig.gate_init TilesConfig.global_gate_init
VisionConfig.mean VocabularyImageTokensConfig.first_id VqganConfig.attention_levels
VisionConfig.layer_scale VisionConfig.feature_layers VisionConfig.idle_layers WeightFrom.weight WeightFrom.from_step
WindowsConfig.frame_layers
"""
_NEGATIVE = """
AdafactorConfig.beta2_decay CrossAttentionConnectorConfig.gate_init HybridConnectorConfig.gate_init PatchesConfig.mean
SamplingConfig.seed TilesConfig.gate_init TilesConfig.global_gate_init VisionConfig.mean VisionConfig.layer_scale
"""
_LARGE = """
AdafactorConfig.weight_decay AdafactorConfig.min_scale AdafactorConfig.update_clip AdamWConfig.weight_decay
AdversarialConfig.weight PerceptualConfig.weight
AdamWConfig.eps AdaptersConfig.alpha BadStepsConfig.loss_deviations BadStepsConfig.norm_deviations BestConfig.min_delta
ContrastiveConnectorConfig.max_scale
CrossAttentionConnectorConfig.gate_init DatasetConfig.weight DatasetConfig.repeats DecoderConfig.init_std
DistillConfig.temperature HybridConnectorConfig.gate_init LinearScaling.factor Llama3Scaling.factor
Llama3Scaling.high_freq_factor MetricsConfig.peak_flops MoeConfig.balance_coefficient MoeConfig.z_coefficient
MoeConfig.bias_rate MoeConfig.scale MoeConfig.capacity_factor MuonConfig.weight_decay MuonConfig.eps
NativeTransform.max_aspect PackingConfig.max_cost PatchesConfig.mean PatchesConfig.std ReconstructionConfig.l1
ReconstructionConfig.l2 ReconstructionConfig.commitment ReconstructionConfig.codebook RopeConfig.theta
Rotary2dConfig.theta SamplingConfig.temperature PreferenceConfig.beta PreferenceConfig.next_token
SamplingConfig.repetition_penalty StageConfig.learning_rate StageConfig.z_loss StageConfig.clip TilesConfig.gate_init
TilesConfig.global_gate_init VideoConfig.max_aspect VisionConfig.mean VisionConfig.std VisionConfig.layer_scale
VisionConfig.init_std WhisperConfig.init_std
WeightFrom.weight YarnScaling.factor YarnScaling.beta_fast YarnScaling.attention_factor
"""
_LEGAL = {0: set(_ZERO.split()), -1: set(_NEGATIVE.split()), 10**18: set(_LARGE.split())}

_MORE: dict[str, dict[str, Any]] = {
    "Accelerator": {
        "name": "a",
        "device": "cpu",
        "source": "a",
        "peak_flops": {"fp32": 1e11},
        "memory_bytes": 1 << 33,
        "memory_bandwidth": 1e10,
        "node_bandwidth": 1e9,
        "network_bandwidth": 1e9,
    },
    "AdaptersConfig": {"dropout": 0.1},
    "AdversarialConfig": {},
    "AnnotationsTemplate": {"max_annotations": 2},
    "AudioConfig": {"from_video": True, "interleave_seconds": 2},
    "ConvGmlpProjectorConfig": {"kind": "conv_gmlp"},
    "FramesConfig": {"kind": "frames"},
    "BestConfig": {"metric": "a/score", "stop_after": 2},
    "ConvPoolConfig": {"kind": "conv_pool", "conv_dim": 8, "hidden_dim": 8},
    "CompareConfig": {"seeds": [1], "variants": [{"name": "a"}, {"name": "b"}]},
    "DrawingsConfig": {"prompts": ["a"], "size": 32},
    "DatasetConfig": {"name": "a", "manifest": "a"},  # Without weight, which excludes repeats.
    "DrawingSet": {
        "kind": "drawings",
        "name": "a",
        "manifest": "a",
        "field": "a",
        "classifier": "a",
        "train": "a",
        "train_limit": 2,
        "size": 8,
        "limit": 2,
    },
    "DrawingTemplate": {"kind": "drawing", "caption_last": 0.5, "text_dropout": 0.1},
    "ImageTokensConfig": {"codebook_size": 1, "first_id": 7, "grid": [2, 3]},
    "GenerationSet": {"kind": "generation", "name": "a", "manifest": "a", "limit": 2},
    "LinearScaling": {"kind": "linear", "factor": 2.0},
    "Idefics3Tiling": {"kind": "idefics3"},
    "MeanPoolConfig": {"kind": "mean_pool", "hidden_dim": 8},
    "Mm15Tiling": {},
    "MovqganConfig": {
        "base_dim": 32,
        "multipliers": [1, 2],
        "attention_levels": [1],
        "latent_dim": 4,
        "codebook_size": 8,
        "code_dim": 4,
    },
    "ModelFile": {
        "decoder": {
            "vocab_size": 8,
            "hidden_dim": 8,
            "num_layers": 1,
            "attention": {"num_heads": 1},
            "mlp": {"kind": "dense", "hidden_dim": 8},
        }
    },
    "PatchDiscriminatorConfig": {},
    "PerceptualConfig": {"tower": "a", "layers": [1]},
    "MostPixelsSplit": {"kind": "most_pixels"},
    "MoeConfig": {"num_experts": 4, "experts_per_token": 2, "expert_dim": 8, "shared_dim": 8},
    "SiteConfig": {
        "gpus_per_node": 8,
        "ranks_per_node": 2,
        "cpus_per_task": 4,
        "save_seconds": 180,
        "max_restarts": 3,
        "restart_delay_seconds": 120,
    },
    "RateChoice": {"kind": "rate"},
    "ScaledFrames": {},
    "TimesChoice": {"kind": "times", "seconds": [1.0]},
    "TrimmedChoice": {"kind": "trimmed"},
    "UniformChoice": {"kind": "uniform"},
    "VideoConfig": {"max_tokens": 100, "tiling": {"kind": "mm1_5"}, "tile_size": 32},
    "WhisperConfig": {
        "kind": "whisper",
        "hidden_dim": 8,
        "num_layers": 1,
        "attention": {"num_heads": 1},
        "mlp": {"kind": "dense", "hidden_dim": 8},
    },
    "YarnScaling": {"kind": "yarn", "factor": 2.0, "original_context": 64},
    "WeightFrom": {"from_step": 1, "weight": 1.0},
}
"""Example values of classes that no shipped configuration uses."""
_WITHOUT_NUMBERS = {"ComparisonFile", "LearnedText", "DroppableText", "TowerConfig", "VariantConfig"}
_WITHOUT_NUMBERS |= {
    "TemplateBase",
    "ProjectorBase",
    "ConnectorBase",
    "FeatureConnectorBase",
    "CrossAttentionConnectorBase",
    "TowerBase",
    "TargetsConfig",
    "TrackerBase",
    "TrackioConfig",
    "WandbConfig",
    "MlflowConfig",
    "MlpBase",
    "RouterConfig",
    "ObjectiveBase",
    "ContainerConfig",
    "ModalityConfig",
    "ModalityBase",
    "ModalityTowerBase",
    "AudioTowerBase",
    "AudioTowerConfig",
    "AudioTowerBlock",
}
"""Base classes, and classes without numbers of their own."""
_RECORDS = {"Best", "Holder", "Manifest", "RankMetadata", "RollBack", "RunOutcome", "SavedState", "StartRecord"}
"""Classes of files that a run writes and validates."""
_FREE = {"StageConfig.data", "StageConfig.model"}
"""Overrides of other blocks, which are validated after the merge."""


def _examples() -> dict[str, BaseModel]:
    """Return, for each class, the instance with the most numbers in the shipped configurations."""
    files = [*sorted((ROOT / "configs/recipes").glob("*.yaml")), *sorted((ROOT / "tests/system").glob("*.yaml"))]
    found: dict[str, BaseModel] = {}
    for file in files:
        if "run_dir" not in file.read_text() and "base" not in file.read_text():
            continue
        run = load(file, [], RunConfig).value
        for each in _instances([run, *(run.stage_model(number) for number in range(len(run.stages)))]):
            known = found.get(type(each).__name__)
            if known is None or len(list(_paths_of(each.model_dump()))) > len(list(_paths_of(known.model_dump()))):
                found[type(each).__name__] = each
    return found


def _fields(example: BaseModel) -> Iterator[tuple[str, list[tuple[Any, ...]]]]:
    """Yield each field of ``example`` that has or may have numbers, with the paths of these numbers."""
    plain = example.model_dump()
    for name, field in type(example).model_fields.items():
        value = getattr(example, name)
        inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
        if inner and isinstance(inner[0], BaseModel):
            continue
        may = value is None and any(word in str(field.annotation) for word in ("int", "float"))
        paths = [()] if may else list(_paths_of(plain[name]))
        if paths and f"{type(example).__name__}.{name}" not in _FREE:
            yield name, paths


@pytest.mark.long
def test_every_number_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    examples, classes = _examples(), {each.__name__: each for each in _every_class()}
    examples |= {name: classes[name].model_validate(values) for name, values in _MORE.items()}
    assert classes.keys() - examples.keys() == _WITHOUT_NUMBERS | _RECORDS, "give an example of a new class here"
    accepted: dict[Any, set[str]] = {0: set(), -1: set(), 10**18: set()}
    for name, example in examples.items():
        for field, paths in _fields(example):
            for path in paths:
                for bad in _BAD:
                    changed = _with(example.model_dump(), (field, *path), bad)
                    try:
                        type(example).model_validate(changed)
                    except ValidationError:
                        continue
                    assert bad in accepted, f"{name}.{field} accepts {bad}"
                    accepted[bad].add(f"{name}.{field}")
    for bad, legal in _LEGAL.items():
        assert accepted[bad] == legal


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.decoder.rope.theta=.nan", "finite number"),
        ("model.decoder.num_layers=1000000000", "must be at most 4096"),
        ("model.vision.patch_size=0", "greater than 0"),
        ("model.decoder.rope.fraction=0.01", "rope.fraction=0.01: rotates 0 of 32 channels of a head"),
        ("model.decoder.hidden_dim=99999999", "must be at most 1048576"),
        ("stages.0.learning_rate.default=.inf", "finite number"),
        ("stages.0.steps=99999999999999999999", "within"),
        ("model.decoder.attention.num_heads=5", "num_heads=5: must divide the width 192"),
        ("model.vision.attention.num_heads=5", "num_heads=5: must divide the width"),
        ("model.connector.attention={num_heads: 5}", "num_heads=5: must divide the width 192"),
        ("stages.0.weights=[{checkpoint: a, components: []}]", "give at least one"),
        ("stages.0.train=[]", "give at least one"),
    ],
)
def test_an_error_names_its_own_key(override: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=re.escape(override)) as caught:
        load("configs/quickstart.yaml", [override], RunConfig)
    assert message in str(caught.value)


def test_an_error_in_a_file_names_the_override_that_it_contradicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as caught:
        load("configs/quickstart.yaml", ["model.decoder.hidden_dim=1048575"], RunConfig)
    message = "must divide the width 1048575, or set head_dim; 1048575 comes from override 1 (model.decoder.hidden_dim="
    assert message in str(caught.value)
