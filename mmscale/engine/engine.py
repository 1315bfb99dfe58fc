"""One optimizer step over the microbatches of all ranks.

    _global_weight      loss weights, summed over microbatches and ranks
    _forward_backward   microbatch --LossGraph--> loss sum --x W / global weight--> backward     (once per microbatch)
    _global_means       loss, metrics and the components' gradient norms of the whole step
    _update             norm of the whole gradient --> a rank refuses: nothing changes | clip, optimizer's step
    _rebalance          moves the biases of routers of experts, if the model has any

The objective gives sums; the global weight divides them once. DeepSpeed's reduction divides by W, so W multiplies: the
gradient is that of the mean over all weighted tokens of the step, at any number of ranks and microbatches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmscale.dist import World, all_reduce_sum, all_reduce_sum_list, any_rank, is_peer_lost, peer_lost, start_deepspeed
from mmscale.engine.config import EngineConfig
from mmscale.engine.ds_config import deepspeed_config, optimizer_clips
from mmscale.engine.gradient_norms import square_sums
from mmscale.engine.graph import LossGraph, ObjectiveLike, SavedWeights, SeesWholeStep, Undo, gather_whole, recompute
from mmscale.engine.loss_scaler import loss_scaler_state, set_loss_scaler_state
from mmscale.engine.optimizers.build import KnowsShards, build_optimizer
from mmscale.engine.partition import Partition
from mmscale.engine.precision import Precision, choose_precision
from mmscale.engine.step_clock import BACKWARD, FORWARD, OPTIMIZER, StepClock, StepSpans, watch_deepspeed
from mmscale.errors import EngineError
from mmscale.nn.moe import biased_routers
from mmscale.optim.schedule import (
    Clips,
    Components,
    LearningRates,
    component_of_parameters,
    freeze,
    full_shape,
    parameter_groups,
    trained_components,
)
from mmscale.optim.stages import StageConfig


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did; equal on all ranks but for ``document_losses`` and ``spans``.

    Attributes:
        loss: Weighted mean over all tokens of the step on all ranks; NaN or infinite if the step failed.
        weight: Sum of the loss weights of the step.
        grad_norm: L2 norm of the whole gradient before clipping; infinite if it was not finite.
        learning_rates: By trained component.
        applied: Whether weights changed. False for a gradient that is not finite, for a step that was refused, and for
            one without any weight.
        metrics: Weighted means of the objective's metrics.
        document_losses: Of each microbatch of this rank: the weighted loss sum of each document.
        component_grad_norms: As ``grad_norm``, by trained component; empty unless it was asked for.
        overflow: fp16: the scaled gradient did not fit. The scale falls; the step says nothing about its data.
        spans: Time and memory of the phases on this rank.
    """

    loss: float
    weight: float
    grad_norm: float
    learning_rates: dict[str, float]
    applied: bool
    metrics: dict[str, float] = field(default_factory=dict)
    document_losses: tuple[tuple[float, ...], ...] = ()
    component_grad_norms: dict[str, float] = field(default_factory=dict)
    overflow: bool = False
    spans: StepSpans = field(default_factory=StepSpans)


@dataclass(frozen=True)
class ComponentParameters:
    """Numbers of values: ``total`` and, of them, ``trained``."""

    total: int
    trained: int


class Engine:
    """A model being trained through one stage.

    Args:
        model: Bare model with ``components()`` and ``checkpoint_units()``, the same weights on every rank; whole, or
            sharded by ``mmscale.engine.construct``.
        objective: Gives loss sum, weight and metrics.
        stage: What is trained and how.
        config: How the machines are used.
        world: This rank.

    Attributes:
        model: Usable under ``inference()`` for forward passes and generation, all ranks in lock-step.
        precision: The number format that was chosen, with the reason.
        stage_step: Steps of the stage that were taken, applied or not; the schedules' clock. ``resume`` sets it.
        clock: Measures the phases of steps, and tells who wants to know which one is entered.
        teachers: Frozen models that the objective runs; they are in no checkpoint and no count of parameters.

    Raises:
        ConfigError: the stage trains a component that the model lacks.
        UnsupportedError: the precision cannot be computed here.
    """

    def __init__(
        self, model: nn.Module, objective: ObjectiveLike, stage: StageConfig, config: EngineConfig, world: World
    ) -> None:
        start_deepspeed(world)
        watch_deepspeed()
        self.model = model
        self.stage = stage
        self.config = config
        self.world = world
        self.precision: Precision = choose_precision(config, world.device)
        self.stage_step = 0
        self.clock = StepClock(world.device)
        self._objective = objective
        self.teachers: Sequence[Any] = objective.teachers
        components: Components = model.components()  # type: ignore[operator]
        freeze(model, components, stage)
        self.trained_components = trained_components(components, stage)
        self._learning_rates = LearningRates(stage, self.trained_components)
        clips = {name: stage.component_clip(name) for name in self.trained_components}
        self._clips = {name: clip for name, clip in clips.items() if clip}
        self._owner = component_of_parameters(model, components)
        self.parameter_counts = _count(model, self._owner)
        units: list[nn.Module] = list(model.checkpoint_units())  # type: ignore[operator]
        self._undo: list[Undo] = self._arrange(units)
        self._deepspeed = self._start(components)
        self._saving: Callable[[], AbstractContextManager[Any]] = nullcontext
        if config.zero_stage == 3:
            self._saving = saved = SavedWeights(model, units)
            self._undo.append(saved.close)
        self.partition = Partition(model, self._deepspeed, config.zero_stage, world, averaged=stage.ema is not None)
        self._prepare_optimizer()
        self._routers = biased_routers(model)

    def _arrange(self, units: list[nn.Module]) -> list[Undo]:
        undo = [recompute(units)] if self.config.activation_checkpointing else []
        together = [*units, *(unit for teacher in self.teachers for unit in teacher.units())]
        return [*undo, gather_whole(together)] if self.config.zero_stage == 3 else undo

    def _prepare_optimizer(self) -> None:
        optimizer = self._deepspeed.basic_optimizer
        # DeepSpeed may have stepped with zero gradients to allocate its state; the step count must start at 0.
        optimizer.state.clear()
        if isinstance(optimizer, KnowsShards):
            optimizer.attach(self.partition.masters, self.world)
        self.partition.ensure_state()

    def _start(self, components: Components) -> Any:
        import deepspeed

        graph = LossGraph(self.model, self._objective)
        if self.config.zero_stage < 3:
            graph.to(self.world.device)
        optimizer = build_optimizer(
            parameter_groups(self.model, components, self.stage),
            self.stage,
            clip_here=optimizer_clips(self.config, self.precision),
        )
        engine, *_ = deepspeed.initialize(
            model=graph,
            optimizer=optimizer,
            config=deepspeed_config(
                self.config,
                self.precision,
                clip=self.stage.whole_clip,
                device_type=self.world.device.type,
            ),
            dist_init_required=False,
        )
        engine.train()
        return engine

    def train_step(
        self,
        microbatches: Sequence[Any],
        why_refuse: Callable[[float, float], str | None] | None = None,
        *,
        component_norms: bool = False,
    ) -> StepReport:
        """Run forward, backward and the optimizer's step over ``microbatches``. All ranks must call, with equally many.

        Args:
            microbatches: This rank's part of the step.
            why_refuse: Called with loss and gradient norm of the whole step before the update. If it returns a reason
                on any rank, weights, moments and step counts of all ranks stay as they are. It is not called if the
                norm is not finite: DeepSpeed refuses such a step by itself.
            component_norms: Also report the gradient norm of each component, for one more pass over the gradient, which
                a stage that clips each component makes anyway. The same on all ranks.

        Raises:
            EngineError: ranks disagree about the number of microbatches, or a peer is lost.
        """
        rates = self._learning_rates.at(self.stage_step)
        self.stage_step += 1
        weight = self._global_weight(microbatches)
        if weight == 0:
            # Null packs only: there is nothing to learn, and decay alone must not move the weights.
            return StepReport(0.0, 0.0, 0.0, rates, applied=False, spans=self.clock.pop_spans())
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = rates[group["component"]]
        try:
            if isinstance(self._objective, SeesWholeStep):
                with self.clock.phase(FORWARD), self.inference() as model:
                    microbatches = self._objective.prepare(model, microbatches)
            sums, losses = self._forward_backward(microbatches, self.world.world_size / weight)
            squares = self._square_sums() if component_norms or self._clips else {}
            loss, metrics, norms = self._global_means(sums, weight, squares)
            refused = self._update(loss, norms, why_refuse)
        except RuntimeError as error:
            if is_peer_lost(error):
                raise peer_lost(self.world, error) from error
            raise
        finite = bool(self._deepspeed.was_step_applied())
        applied = finite and not refused
        if self._routers:
            self._rebalance(applied)
        if applied and self.stage.ema and self.partition.optimizer_steps() % self.stage.ema.every_steps == 0:
            self.partition.update_average(self.stage.ema.decay)
        return StepReport(
            loss=loss,
            weight=weight,
            grad_norm=float(self._deepspeed.get_global_grad_norm() or 0.0) if finite else math.inf,
            learning_rates=rates,
            applied=applied,
            metrics=metrics,
            document_losses=tuple(tuple(part.tolist()) for part in losses),
            component_grad_norms=norms if component_norms else {},
            overflow=self.precision.name == "fp16" and not finite and math.isfinite(loss),
            spans=self.clock.pop_spans(),
        )

    def _update(
        self, loss: float, norms: dict[str, float], why_refuse: Callable[[float, float], str | None] | None
    ) -> bool:
        """Let DeepSpeed make the optimizer's step. Return whether a rank refused it.

        DeepSpeed computes the norm of the whole gradient inside its own ``step`` and calls the client optimizer right
        after, once for each group of parameters (at stage 3 for each sub-group). So ``may_update`` runs in front of the
        client optimizer. If the optimizer does nothing, masters, moments and step counts stay as they are, and rounding
        the masters and gathering the weights afterwards gives the same weights again. At stage 0 in fp32 DeepSpeed has
        no wrapper; there the optimizer computes the norm (``optim.schedule.Clips``) and calls ``may_update`` itself.

        Components are clipped here too: at every stage, format and place of the optimizer's state, ``grad`` of what is
        in the client optimizer's groups now is the averaged fp32 gradient without loss scale. It is read once and
        dropped, and each group belongs to one component.

        All wrappers of DeepSpeed 0.19 set ``_global_grad_norm``, the same on all ranks, before they step the optimizer.
        """
        optimizer = self._deepspeed.basic_optimizer
        update = optimizer.step
        refused: bool | None = None

        def may_update(norm: float) -> bool:
            nonlocal refused
            if refused is None:
                refused = False
                if why_refuse is not None:
                    with self.clock.communicating():
                        refused = any_rank(self.world, why_refuse(loss, norm) is not None)
            if refused:
                return False
            for group in optimizer.param_groups:
                gradients = [values.grad for values in group["params"] if values.grad is not None]
                clip = self._clips.get(group["component"])
                factor = 1.0 if clip is None else min(1.0, clip / (norms[group["component"]] + 1e-6))
                if gradients and factor != 1.0:
                    torch._foreach_mul_(gradients, factor)
            return True

        def update_if_allowed(*arguments: Any, **options: Any) -> Any:
            if may_update(float(self._deepspeed.optimizer._global_grad_norm)):
                return update(*arguments, **options)
            return None

        name, hook = ("may_update", may_update) if isinstance(optimizer, Clips) else ("step", update_if_allowed)
        before = getattr(optimizer, name)
        setattr(optimizer, name, hook)
        try:
            with self.clock.phase(OPTIMIZER):
                self._deepspeed.step()
        finally:
            setattr(optimizer, name, before)
        return bool(refused)

    def _rebalance(self, applied: bool) -> None:
        """Moves the biases of routers by the loads of all microbatches and ranks; forgets these for a refused step."""
        loads = torch.stack([router.load for router in self._routers])
        with self.clock.communicating():
            whole = all_reduce_sum_list(self.world, loads.flatten().tolist())
        for router, load in zip(self._routers, torch.tensor(whole).view(loads.shape), strict=True):
            if applied:
                router.rebalance(load.to(loads))
            router.load.zero_()

    def _forward_backward(
        self, microbatches: Sequence[Any], scale: float
    ) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        """Run forward and backward. The gradient is complete and reduced after the last microbatch.

        The loss is multiplied by ``scale``. A loss that is not finite is multiplied by NaN instead: then the gradient
        is NaN, its norm is NaN on every rank, and all ranks refuse the step without a message and without waiting for
        the device.

        Returns:
            For each microbatch the sums of loss and metrics, and the losses of its documents.
        """
        sums: list[dict[str, Tensor]] = []
        documents: list[Tensor] = []
        for index, microbatch in enumerate(microbatches):
            self._deepspeed.set_gradient_accumulation_boundary(index == len(microbatches) - 1)
            with self.clock.phase(FORWARD), self._saving():
                loss_sum, metrics, losses = self._deepspeed(microbatch.to(self.world.device, non_blocking=True))
            sums.append({"loss": loss_sum.detach(), **metrics})
            documents.append(losses)
            with self.clock.phase(BACKWARD):
                factor = torch.where(torch.isfinite(loss_sum.detach()), scale, math.nan).to(loss_sum.dtype)
                self._deepspeed.backward(loss_sum * factor, scale_wrt_gas=False)
            if index < len(microbatches) - 1:
                self._deepspeed.step()  # Not at the boundary: it only counts.
        return sums, documents

    def _square_sums(self) -> dict[str, float]:
        """This rank's share of the components' squared gradient norms."""
        names, stage = self.trained_components, self.config.zero_stage
        with self.clock.phase(OPTIMIZER):
            return square_sums(self.model, self._owner, names, self._deepspeed.optimizer, stage, self.world)

    def _global_weight(self, microbatches: Sequence[Any]) -> float:
        count = len(microbatches)
        mine = math.fsum(self._objective.weight(microbatch) for microbatch in microbatches)
        with self.clock.communicating():
            sums = all_reduce_sum(self.world, {"weight": mine, "count": count, "count_squared": count * count})
        # Counts are equal exactly where Cauchy-Schwarz holds with equality; no second message needed.
        if sums["count"] ** 2 != self.world.world_size * sums["count_squared"] or not count:
            raise EngineError(
                f"rank {self.world.rank} has {count} microbatches, all {self.world.world_size} ranks "
                f"{int(sums['count'])}: every rank needs the same number, at least one; null packs fill up"
            )
        return sums["weight"]

    def _global_means(
        self, sums: list[dict[str, Tensor]], weight: float, squares: dict[str, float]
    ) -> tuple[float, dict[str, float], dict[str, float]]:
        """Reduce the sums of all microbatches and ranks in one message.

        Returns:
            Loss and metrics as weighted means, and the gradient norm of each component in ``squares``, infinite where
            a gradient was not finite.
        """
        names = sorted(sums[0])
        local = torch.stack([torch.stack([part[name].double() for name in names]) for part in sums]).sum(0).tolist()
        mine = dict(zip(names, local, strict=True)) | {f"grad_square/{name}": value for name, value in squares.items()}
        with self.clock.communicating():
            whole = all_reduce_sum(self.world, mine)
        means = {name: whole[name] / weight for name in names}
        squares = {name: whole[f"grad_square/{name}"] for name in squares}
        norms = {name: math.sqrt(value) if math.isfinite(value) else math.inf for name, value in squares.items()}
        return means.pop("loss"), means, norms

    @contextmanager
    def inference(self, *, ema: bool = False) -> Iterator[nn.Module]:
        """The model in evaluation mode without gradients; training goes on undisturbed afterwards.

        All ranks must run the same module calls in lock-step: under ZeRO-3 each call gathers weights.

        Args:
            ema: Compute with the averaged weights.

        Raises:
            EngineError: the stage keeps no average.
        """
        if ema and self.stage.ema is None:
            raise EngineError(f"stage {self.stage.name} keeps no average of its weights; set stages.*.ema")
        self.model.eval()
        if ema:
            self.partition.swap_average()
        try:
            with torch.no_grad():
                yield self.model
        finally:
            if ema:
                self.partition.swap_average()
            self.model.train()

    def loss_scaler_state(self) -> dict[str, float] | None:
        """fp16: the scale of the loss and what its next change depends on; None in other formats."""
        return loss_scaler_state(self._deepspeed.optimizer)

    def set_loss_scaler_state(self, state: dict[str, float] | None) -> None:
        """Puts back what ``loss_scaler_state`` gave."""
        set_loss_scaler_state(self._deepspeed.optimizer, state)

    def close(self) -> None:
        """Takes DeepSpeed's hooks off the model and frees the moments. The next stage builds a model of its own."""
        for undo in reversed(self._undo):
            undo()
        self._deepspeed.destroy()
        self._deepspeed.basic_optimizer.state.clear()


def _count(model: nn.Module, owner: dict[str, str]) -> dict[str, ComponentParameters]:
    counts: dict[str, ComponentParameters] = {}
    for name, parameter in model.named_parameters():
        old = counts.get(owner[name], ComponentParameters(0, 0))
        numel = math.prod(full_shape(parameter))
        counts[owner[name]] = ComponentParameters(old.total + numel, old.trained + numel * parameter.requires_grad)
    return counts
