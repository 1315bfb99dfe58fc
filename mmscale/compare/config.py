"""The configuration of a comparison: the file of a run with an additional ``compare`` block.

    base: ../quickstart.yaml      configuration that all variants share
    compare:                      variants, seeds, and the budget that is equal

    file --without ``compare``--> tree --overrides of each variant--> one ``RunConfig`` per variant

A variant is a list of ``key=value`` overrides, as on a command line. All variants are read before any of them is used,
and one error message lists the mistakes of all variants.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, model_validator

from data_pipeline.errors import DataPipelineError
from data_pipeline.io.strict import StrictConfig
from mmscale.config import Loaded, load_tree
from mmscale.config.layers import apply_overrides, read_layers
from mmscale.config.tree import ConfigNode
from mmscale.config.validate import validate
from mmscale.errors import ConfigError, MMScaleError
from mmscale.models.build import count_parameters
from mmscale.run.config import RunConfig, check_world
from mmscale.run.file_checks import check_files

BLOCK = "compare"


class EqualBudget(str, Enum):
    """Budget of a stage that is the same for every variant; the first variant sets it."""

    TOKENS = "tokens"
    """Learned tokens: text tokens with a loss. Image tokens do not count."""
    FLOPS = "flops"
    """Operations of forward and backward passes (``models.flops``), without recomputed activations."""


class VariantConfig(StrictConfig):
    """One variant."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Name on the page, and name of the variant's folder."""
    overrides: tuple[str, ...] = ()
    """``key=value`` overrides of the file, as on a command line."""


class CompareConfig(StrictConfig):
    """The ``compare`` block."""

    equal: EqualBudget = EqualBudget.TOKENS
    """Budget that all variants share: ``tokens`` or ``flops``. The first variant trains the configured steps of each
    stage. The steps of the others follow from its budget."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(min_length=1)
    """Each variant is trained once per seed, which replaces ``seed``. 0 to 2**32 - 1; they must differ. Confidence
    intervals need at least two."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Confidence level of the intervals over seeds, between 0 and 1."""
    plan_steps: int = Field(default=256, ge=1)
    """Largest number of steps per stage that are measured before training to plan the steps of each run. Later steps
    are assumed to hold as much as these on average."""
    variants: tuple[VariantConfig, ...] = Field(min_length=2)
    """Variants, at least two with different names. Differences are computed against the first."""

    @model_validator(mode="after")
    def _check_names(self) -> CompareConfig:
        for key, values in (("seeds", self.seeds), ("variants", tuple(each.name for each in self.variants))):
            if len(set(values)) != len(values):
                raise ValueError(f"{key} must differ, got {list(values)}")
        return self


class _File(StrictConfig):
    compare: CompareConfig


class ComparisonFile(RunConfig):
    """The keys of a comparison's file, for its JSON schema. ``read_comparison`` validates the variants one by one."""

    compare: CompareConfig
    """Variants, seeds, and the budget that all variants share."""


@dataclass(frozen=True)
class Variant:
    """One variant as a run config; ``run_dir``, ``seed`` and steps are still those of the file."""

    name: str
    overrides: tuple[str, ...]
    loaded: Loaded[RunConfig]

    @property
    def run(self) -> RunConfig:
        """The configuration."""
        return self.loaded.value


@dataclass(frozen=True)
class Comparison:
    """A comparison that was read and validated; ``check_comparison`` checks its files."""

    path: Path
    settings: CompareConfig
    variants: tuple[Variant, ...]

    @property
    def run_dir(self) -> Path:
        """Folder of the comparison; each run has a folder of its own in it."""
        return self.variants[0].run.run_dir

    @property
    def page_path(self) -> Path:
        """The HTML page."""
        return self.run_dir / "comparison.html"

    @property
    def json_path(self) -> Path:
        """The values of the page as JSON."""
        return self.run_dir / "comparison.json"


def read_comparison(path: Path, overrides: list[str]) -> Comparison:
    """Read a comparison with all its variants.

    Args:
        path: YAML file of a run with a ``compare`` block.
        overrides: ``key=value`` overrides of the file. The overrides of a variant take precedence over them.

    Raises:
        ConfigError: the file or a variant is invalid; the message lists the mistakes of all variants.
    """
    root = apply_overrides(read_layers(path), overrides)
    assert isinstance(root.value, dict)
    block = root.value.pop(BLOCK, None)
    if block is None:
        raise ConfigError(f"{path}: no `{BLOCK}` block, which lists seeds and variants; see docs/evaluation.md")
    settings = validate(ConfigNode({BLOCK: block}, root.origin), _File, str(path))[0].compare
    variants: list[Variant] = []
    complaints: list[str] = []
    for each in settings.variants:
        try:
            tree = apply_overrides(deepcopy(root), list(each.overrides))
            variants.append(Variant(each.name, each.overrides, load_tree(tree, RunConfig, str(path))))
        except ConfigError as error:
            complaints.append(f"variant {each.name}: {error}")
    complaints = complaints or list(filter(None, (_mismatch(variants[0], each) for each in variants)))
    if complaints:
        raise ConfigError("\n".join(complaints))
    return Comparison(path, settings, tuple(variants))


def _mismatch(first: Variant, other: Variant) -> str | None:
    """Return why a variant cannot be compared with the first one; None if it can."""
    a, b = first.run, other.run
    name = f"variant {other.name}"
    if b.max_steps is not None:
        return f"{name}: max_steps={b.max_steps}: a comparison plans the steps; set stages.*.steps of the first variant"
    if b.evaluation.best is not None and b.evaluation.best.stop_after is not None:
        stop_after = b.evaluation.best.stop_after
        return (
            f"{name}: evaluation.best.stop_after={stop_after}: all variants train for an equal budget; set it to null"
        )
    if a.run_dir != b.run_dir:
        return f"{name}: run_dir={b.run_dir}: must not be overridden: each variant gets a folder in {a.run_dir}"
    if a.evaluation != b.evaluation:
        return f"{name}: its evaluation block differs from that of {first.name}; the scores cannot be compared"
    if [stage.name for stage in a.stages] != [stage.name for stage in b.stages]:
        return f"{name}: has other stages than {first.name}; the budget is equal stage by stage"
    return None


def check_comparison(comparison: Comparison, ranks: int) -> None:
    """Check files, world size, weights and models of all variants. Reads texts of samples, but no weights or pixels.

    Raises:
        ConfigError: a variant fails a check; the message lists the problem of each failing variant.
    """
    complaints = []
    for variant in comparison.variants:
        try:
            check_files(variant.run)
            check_world(variant.run, ranks)
            _check_weights(variant.run)
            for number in range(len(variant.run.stages)):
                count_parameters(variant.run.stage_model(number))
        except (MMScaleError, DataPipelineError) as error:
            complaints.append(f"variant {variant.name}: {error}")
    if complaints:
        raise ConfigError("\n".join(complaints))


def _check_weights(run: RunConfig) -> None:
    if not any(stage.weights for stage in run.stages):
        return
    from mmscale.checkpoint import TrainState
    from mmscale.dist import World

    # This import loads the engine and takes seconds, so only comparisons that start from weights pay for it.
    from mmscale.run.stage_weights import check_stage_weights

    check_stage_weights(run, World(0, 1, 0, torch.device("cpu")), TrainState())
