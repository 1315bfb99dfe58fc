"""What is compared: the file of a run with one more block.

    base: ../quickstart.yaml      everything that all variants share
    compare:                      what differs, from which seeds, and what is equal

    file --without ``compare``--> tree --overrides of each variant--> one ``RunConfig`` a variant

A variant says what differs by ``key=value``, as a command line does. All variants are read before anything is done with
one of them, and every mistake of every variant is told at once.
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
from mmscale.config.tree import Entry
from mmscale.config.validate import validate
from mmscale.errors import ConfigError, MMScaleError
from mmscale.models.build import count_parameters
from mmscale.run.config import RunConfig, check_files, check_world

BLOCK = "compare"


class Equal(str, Enum):
    """What every variant gets as much of as the first one, stage by stage."""

    TOKENS = "tokens"
    """Learned tokens: tokens of text that carry loss. The tokens of images count for nothing, wherever they stand."""
    FLOPS = "flops"
    """Operations of forward and backward (``models.flops``); what activation checkpointing repeats is left out."""


class VariantConfig(StrictConfig):
    """One thing that is compared."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Name on the page and of its folder."""
    overrides: tuple[str, ...] = ()
    """What differs from the file: ``key=value`` words, as on a command line."""


class CompareConfig(StrictConfig):
    """The ``compare`` block."""

    equal: Equal = Equal.TOKENS
    """``tokens`` or ``flops``. The first variant trains the steps that its stages say, and the others' steps follow."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(min_length=1)
    """Each variant is trained once from each; they take the place of ``seed``. Intervals need two or more."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Of the intervals over seeds."""
    plan_steps: int = Field(default=256, ge=1)
    """First steps of a stage that are measured, before anything is trained, to find the steps of each run; those behind
    them are taken to hold as much."""
    variants: tuple[VariantConfig, ...] = Field(min_length=2)
    """What is compared; differences are taken from the first."""

    @model_validator(mode="after")
    def _check_names(self) -> CompareConfig:
        for key, values in (("seeds", self.seeds), ("variants", tuple(each.name for each in self.variants))):
            if len(set(values)) != len(values):
                raise ValueError(f"{key} must differ, got {list(values)}")
        return self


class _File(StrictConfig):
    compare: CompareConfig


@dataclass(frozen=True)
class Variant:
    """One variant as a run; its ``run_dir``, ``seed`` and steps are still those of the file."""

    name: str
    overrides: tuple[str, ...]
    loaded: Loaded[RunConfig]

    @property
    def run(self) -> RunConfig:
        """The configuration."""
        return self.loaded.value


@dataclass(frozen=True)
class Comparison:
    """A comparison that was read and checked as far as that needs no disk."""

    path: Path
    settings: CompareConfig
    variants: tuple[Variant, ...]

    @property
    def run_dir(self) -> Path:
        """Folder of the comparison; each run has a folder of its own in it."""
        return self.variants[0].run.run_dir

    @property
    def page(self) -> Path:
        """The page."""
        return self.run_dir / "comparison.html"

    @property
    def figures(self) -> Path:
        """The figures of the page, for programs."""
        return self.run_dir / "comparison.json"


def read_comparison(path: Path, overrides: list[str]) -> Comparison:
    """Reads the file and every variant.

    Args:
        path: A YAML file of a run with a ``compare`` block.
        overrides: ``key=value`` words for the file; those of a variant win over them.

    Raises:
        ConfigError: all mistakes of the file or of all its variants.
    """
    root = apply_overrides(read_layers(path), overrides)
    assert isinstance(root.value, dict)
    block = root.value.pop(BLOCK, None)
    if block is None:
        raise ConfigError(f"{path}: no `{BLOCK}` block, which names seeds and variants; see docs/compare.md")
    settings = validate(Entry({BLOCK: block}, root.origin), _File, str(path))[0].compare
    variants: list[Variant] = []
    complaints: list[str] = []
    for each in settings.variants:
        try:
            tree = apply_overrides(deepcopy(root), list(each.overrides))
            variants.append(Variant(each.name, each.overrides, load_tree(tree, RunConfig, str(path))))
        except ConfigError as error:
            complaints.append(f"variant {each.name}: {error}")
    complaints = complaints or list(filter(None, (_unlike(variants[0], each) for each in variants)))
    if complaints:
        raise ConfigError("\n".join(complaints))
    return Comparison(path, settings, tuple(variants))


def _unlike(first: Variant, other: Variant) -> str | None:
    """Why a variant cannot stand beside the first one."""
    a, b = first.run, other.run
    name = f"variant {other.name}"
    if b.max_steps is not None:
        return f"{name}: max_steps={b.max_steps}: a comparison plans steps; set stages.*.steps of the first variant"
    if a.run_dir != b.run_dir:
        return f"{name}: run_dir={b.run_dir}: variants have folders of their own in the comparison's ({a.run_dir})"
    if a.evaluation != b.evaluation:
        return f"{name}: asks other questions than {first.name} (evaluation), so their scores do not compare"
    if [stage.name for stage in a.stages] != [stage.name for stage in b.stages]:
        return f"{name}: has other stages than {first.name}; what is equal is equal stage by stage"
    return None


def check_comparison(comparison: Comparison, ranks: int) -> None:
    """Checks what validation cannot know without the disk, for all variants. Nothing large is read.

    Raises:
        ConfigError: all complaints, each with the name of its variant.
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
    from mmscale.run.stage_weights import (
        check_stage_weights,
    )  # With it comes the engine: seconds that few comparisons need.

    check_stage_weights(run, World(0, 1, 0, torch.device("cpu")), TrainState())
