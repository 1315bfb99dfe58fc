"""The program of each simulated rank: every stage of the run, with different batches on every rank.

    for each stage:  model -> engine -> (warm start) -> steps with adversarial batches -> evaluation -> checkpoint
    at full depth:   model -> engine -> two steps in which each kind of batch occurs

The functions are those of a real run: ``construct``, ``Engine``, ``evaluate``, ``checkpoint.save`` and ``warm_start``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from mmscale import checkpoint
from mmscale.check.batches import BatchMaker
from mmscale.check.recorder import CallRecorder
from mmscale.checkpoint import TrainState
from mmscale.dist import World, init_distributed
from mmscale.engine.engine import Engine
from mmscale.engine.partition import own_range
from mmscale.evaluate import EvaluationConfig, evaluate
from mmscale.models.build import AnyModel, TrainedModel, media_spec
from mmscale.models.config import TokenizerConfig
from mmscale.models.multimodal import MultimodalModel
from mmscale.objectives.choice import choose_objective
from mmscale.objectives.teacher import Teacher
from mmscale.optim.stages import DistillConfig
from mmscale.run.config import RunConfig
from mmscale.run.train import build

_FEW_IDS = 16
"""Token ids of the documents of an image tokenizer, which reads no text."""


@dataclass(frozen=True)
class Step:
    """One step of the check, equal on all ranks except for the batches.

    Attributes:
        kinds: For each rank the kinds of its microbatches.
        component_norms: Whether to report the gradient norm of each component.
        rejects: Whether the last rank rejects the update.
    """

    kinds: tuple[tuple[str, ...], ...]
    component_norms: bool = False
    rejects: bool = False


def make_steps(kinds: tuple[str, ...], world_size: int) -> Iterator[Step]:
    """Yield the steps of a stage.

    Each kind of batch meets the next one in the same step on a neighbouring rank, so if all steps are equal on all
    ranks, so are all kinds. Steps with one and with two microbatches alternate. In the last steps one rank has a loss
    that is not finite, one rank rejects the update, one rank alone has data, and no rank has data.
    """
    usual, dummy = kinds[0], "dummy packs only"
    for step in range(len(kinds)):
        microbatches = 1 + step % 2
        yield Step(
            tuple(
                tuple(kinds[(step + rank + 2 * microbatch) % len(kinds)] for microbatch in range(microbatches))
                for rank in range(world_size)
            ),
            component_norms=step == 1,
        )
    others = ((usual,),) * (world_size - 1)
    yield Step((*others, ("loss not finite",)))
    yield Step((*others, (usual,)), rejects=True)
    yield Step(((dummy,),) * (world_size - 1) + ((usual,),))
    yield Step(((dummy, dummy),) * world_size)


def make_few_steps(kinds: tuple[str, ...], world_size: int) -> Iterator[Step]:
    """Yield two steps in which each kind of batch occurs, with different kinds on neighbouring ranks.

    DeepSpeed records the order of the modules in the first step, and fetches weights ahead in the second one.
    """
    slots = [
        tuple(kinds[(first + rank) % len(kinds)] for rank in range(world_size))
        for first in range(0, len(kinds), world_size)
    ]
    yield Step(tuple((kind,) for kind in slots[0]))
    yield Step(tuple(zip(*(slots[1:] or slots), strict=True)))


@dataclass(frozen=True)
class RankProgram:
    """The program of a simulated rank.

    Attributes:
        config: The shrunk run.
        distill: The teachers of each stage of the real run.
        evaluations: The held-out sets of each stage; None if the run does not evaluate after its steps.
        folder: Folder for checkpoints.
        encodes: Whether the model encodes images as tokens in each step of the real run, for each stage.
        stages: Numbers of the stages to run.
        at_full_depth: Whether the model has all blocks of a deep model. Its stages make two steps and no checkpoint.
    """

    config: RunConfig
    distill: tuple[tuple[DistillConfig, ...], ...]
    evaluations: tuple[EvaluationConfig | None, ...]
    folder: Path
    encodes: tuple[bool, ...]
    stages: tuple[int, ...]
    at_full_depth: bool = False

    def __call__(self, rank: int, recorder: CallRecorder) -> None:
        """Run the stages as rank ``rank``."""
        world = init_distributed(self.config.engine)
        latest: Path | None = None
        state = TrainState()
        for number in self.stages:
            state = TrainState(step=state.step, stage_index=number)
            latest, state = self._stage(world, recorder, state, latest)

    def _stage(
        self, world: World, recorder: CallRecorder, state: TrainState, latest: Path | None
    ) -> tuple[Path | None, TrainState]:
        config, number = self.config, state.stage_index
        stage = config.stages[number]
        recorder.where = where = f"stage {stage.name}" + (" at full depth" if self.at_full_depth else "")
        model = self._build(world, number)
        recorder.name_parts(model)
        teachers = [
            Teacher(cast(MultimodalModel, self._build(world, number)), source.weight, source.temperature)
            for source in self.distill[number]
        ]
        architecture = config.stage_model(number)
        objective = choose_objective(architecture, stage, world, teachers)
        with closing(Engine(cast(nn.Module, model), objective, stage, config.engine, world)) as engine:
            if latest is not None:
                recorder.where = f"{where}, warm start"
                checkpoint.warm_start(engine, latest, upcycle=stage.upcycles_previous)
            spec = media_spec(architecture, encodes=self.encodes[number])
            answers = 1 if stage.preference is None else 2
            vocabulary = _FEW_IDS if isinstance(architecture, TokenizerConfig) else architecture.decoder.vocab_size
            batches = BatchMaker(spec, vocabulary, config.seed, answers)
            make = make_few_steps if self.at_full_depth else make_steps
            for index, step in enumerate(make(batches.kinds, world.world_size)):
                kinds = step.kinds[world.rank]
                recorder.where = f"{where}, step {index + 1}, batch: {' + '.join(kinds)}"
                engine.train_step(
                    [batches.make(kind, index, world.rank + lane) for lane, kind in enumerate(kinds)],
                    self._reason(world) if step.rejects else lambda loss, norm: None,
                    component_norms=step.component_norms,
                )
            if self.at_full_depth:
                return None, state
            steps = index + 1
            evaluation = self.evaluations[number]
            if evaluation is not None:
                recorder.where = f"{where}, evaluation after step {steps}"
                with engine.inference(ema=stage.ema is not None) as scored:
                    evaluate(cast(AnyModel, scored), evaluation, config.evaluation_data(number), spec, world)
            state = TrainState(step=state.step + steps, stage_index=number, stage_step=steps)
            recorder.where = f"{where}, checkpoint of step {steps}"
            return checkpoint.save(engine, state, self.folder / "checkpoints"), state

    def _build(self, world: World, number: int) -> TrainedModel:
        model = build(self.config, world, number)
        clear_padding(model, world)
        return model

    @staticmethod
    def _reason(world: World) -> Any:
        return lambda loss, norm: "chosen by the check" if world.rank == world.world_size - 1 else None


def clear_padding(model: nn.Module, world: World) -> None:
    """Set the values of shards beyond the end of their parameters to 0.

    DeepSpeed leaves them uninitialised, and the fake group repeats them where a real gather has the values of other
    ranks. Memory that is not a number would then reach the loss.
    """
    for parameter in model.parameters():
        shard: Any = getattr(parameter, "ds_tensor", None)
        if shard is not None:
            start, stop = own_range(parameter, world)
            shard.data.view(-1)[stop - start :].zero_()
