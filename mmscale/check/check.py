"""Prove before a run that all its ranks make the same collectives in the same order.

    run's configuration --shrunk--> program of a rank --simulated ranks--> first difference, or none

Ranks that make different collectives wait for each other for ever. This happens if a rank's data decide which modules
run: a batch without images, an expert without rows, a rank without data. The check runs the real step of every stage,
an evaluation and a checkpoint on simulated ranks, each with different batches. The model has the depth and all parts of
the run's model, but small widths.

To save time, a model of more than 32 blocks is checked in two passes: all of this with the few blocks of a smoke-test
model, then two steps of every stage with all blocks.

Not for: hangs that the network, a dead process or the loader cause, and differences that only occur with certain sizes,
values or data. The loader gives all ranks the same number of microbatches by construction.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from mmscale.check.held_out import evaluation_block, tokenizer_block, write_held_out
from mmscale.check.program import RankProgram, make_steps
from mmscale.check.ranks import Difference, compare_ranks
from mmscale.check.recorder import Call
from mmscale.dist import prepare_deepspeed
from mmscale.errors import EngineError
from mmscale.evaluate import EvaluationConfig
from mmscale.models.config import TokenizerConfig
from mmscale.run.config import RunConfig
from mmscale.run.stage_teachers import teacher_sources
from mmscale.shrink.run import shrink_run

_DEEP = 32
"""Most blocks of a model that is checked in one pass."""
_MOST_RANKS = 64
"""Above it, ranks reduce small values along a tree (``mmscale.dist``), where they send different messages by design."""
_RATES = {"learning_rate", "schedule", "warmup_steps", "min_learning_rate"}
_EQUAL_FIELDS = {"name", "steps", "data", "weights", "model", *_RATES}
"""Fields of a stage that do not change which modules run in a step. The model itself is compared as a whole."""
# DeepSpeed would import torch._dynamo inside a dispatch mode, where the import fails.
_LIBRARIES = ("torch._dynamo", "deepspeed.comm", "deepspeed.ops", "deepspeed.runtime.zero.stage3", "torchvision.io")


@dataclass(frozen=True)
class CheckReport:
    """The result of a check.

    Attributes:
        ranks: Number of simulated ranks.
        stages: Names of the stages.
        collectives: Number of collectives of a rank that were equal on all ranks.
        difference: The first difference; None if there is none.
    """

    ranks: int
    stages: tuple[str, ...]
    collectives: int
    difference: Difference | None

    @property
    def ok(self) -> bool:
        """Whether all ranks made the same collectives."""
        return self.difference is None

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        found = self.difference
        sides = None
        if found is not None:
            sides = [
                {"rank": rank, "call": None if call is None else call._asdict(), "error": error}
                for rank, call, error in zip(found.ranks, found.calls, found.errors, strict=True)
            ]
        return {
            "ok": self.ok,
            "ranks": self.ranks,
            "stages": list(self.stages),
            "collectives": self.collectives,
            "difference": sides,
        }

    def __str__(self) -> str:
        if self.difference is None:
            return (
                f"all {self.ranks} simulated ranks make the same {self.collectives:,} collectives "
                f"(stages: {', '.join(self.stages)})"
            )
        lines = [f"the ranks of this run would hang: collective {self.difference.number + 1:,} differs"]
        sides = zip(self.difference.ranks, self.difference.calls, self.difference.errors, strict=True)
        return "\n".join([*lines, *(f"  {_side(*side)}" for side in sides)])


def _side(rank: int, call: Call | None, error: str) -> str:
    if call is None:
        return f"rank {rank} makes no further collective" + (f"; it raised {error}" if error else "")
    return f"rank {rank} calls {call} ({call.where})"


def check_run(config: RunConfig, *, ranks: int | None = None) -> CheckReport:
    """Simulate the ranks of a run. The process must not have a process group.

    Args:
        config: The run. Its data are not read.
        ranks: Number of simulated ranks, 2 to 64; None for 2, or twice ``engine.expert_parallel`` (at most 2).

    Raises:
        EngineError: all ranks raise the same error, or ``ranks`` is too large.
    """
    parallel = min(config.engine.expert_parallel, 2)
    ranks = ranks or 2 * parallel
    if ranks > _MOST_RANKS:
        raise EngineError(f"ranks={ranks}: the check simulates at most {_MOST_RANKS} ranks; use fewer")
    prepare_deepspeed("cpu")
    with tempfile.TemporaryDirectory(prefix="mmscale-check-") as name:
        folder = Path(name)
        write_held_out(folder)
        is_deep = _num_blocks(config) > _DEEP
        program = _program(config, folder, ranks, parallel, keep_depth=not is_deep)
        _import_libraries()
        collectives, difference = compare_ranks(program, ranks)
        if is_deep and difference is None:
            program = _at_full_depth(_program(config, folder, ranks, parallel, keep_depth=True))
            more, difference = compare_ranks(program, ranks)
            difference = difference and replace(difference, number=difference.number + collectives)
            collectives += more
    stages = tuple(stage.name for _, stage in program.config.stages_from(0))
    return CheckReport(ranks, stages, collectives, difference)


def _num_blocks(config: RunConfig) -> int:
    """Return the largest number of blocks of the model of any stage."""
    models = [config.stage_model(number) for number, _ in config.stages_from(0)]
    return max(
        2 * len(model.image_tokenizer.multipliers) + 2  # The levels and the middle of encoder and decoder.
        if isinstance(model, TokenizerConfig)
        else model.decoder.num_layers + getattr(model.vision, "num_layers", 0)
        for model in models
    )


def _at_full_depth(program: RankProgram) -> RankProgram:
    """Return the short program of a deep model. It trains stages with equal modules once."""
    config = program.config
    first: dict[str, int] = {}
    for number in program.stages:
        stage = config.stages[number].model_dump_json(exclude=_EQUAL_FIELDS)
        distill = [each.model_dump_json() for each in program.distill[number]]
        first.setdefault(f"{stage} {config.stage_model(number).model_dump_json()} {distill}", number)
    return replace(program, stages=tuple(first.values()), at_full_depth=True)


def _program(config: RunConfig, folder: Path, ranks: int, parallel: int, *, keep_depth: bool) -> RankProgram:
    """Return the program of each rank for a small copy of the run."""
    most = max(len(tuple(make_steps(("",) * 8, ranks))), 1)
    small = shrink_run(config, steps=most, lanes=ranks, keep_depth=keep_depth)
    engine = {
        "device": "cpu",
        # On GPUs ``auto`` is bf16. fp16 needs a GPU; bf16 takes the same path through DeepSpeed.
        "precision": "fp32" if config.engine.precision == "fp32" else "bf16",
        "expert_parallel": parallel,
    }
    block = small.model_dump()
    block["engine"] |= engine
    tokenizer = tokenizer_block(folder)
    block["data"]["tokenizer"] = tokenizer
    for stage in block["stages"]:
        if stage["data"] is not None:
            stage["data"]["tokenizer"] = tokenizer
    small = RunConfig.model_validate(block)
    numbers = [number for number, _ in small.stages_from(0)]
    evaluations: list[EvaluationConfig | None] = []
    for number in numbers:
        is_scored = number == numbers[-1] or config.evaluation.every_steps is not None
        is_scored = is_scored and not isinstance(small.stage_model(number), TokenizerConfig)
        evaluations.append(evaluation_block(folder, small.stage_media(number)) if is_scored else None)
    distill = tuple(teacher_sources(config, number) for number in range(len(config.stages)))
    encodes = tuple(config.stage_media(number).code_size is not None for number in range(len(config.stages)))
    return RankProgram(small, distill, tuple(evaluations), folder, encodes, tuple(numbers))


def _import_libraries() -> None:
    """Import what the ranks need before they are forked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _LIBRARIES:
            import_module(name)
