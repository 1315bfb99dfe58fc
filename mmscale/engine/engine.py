"""One optimizer step over the microbatches of all ranks.

    _global_weight      loss weights, summed over microbatches and ranks
    _forward_backward   microbatch --LossGraph--> loss sum --x W / global weight--> backward     (once per microbatch)
    _global_means       loss, metrics and the components' gradient norms of the whole step
    _update             norm of the whole gradient --> a rank rejects: nothing changes | clip, optimizer's step
    _rebalance          updates the biases of the experts' routers, if the model has any
    update_rows         writes the rows that the objective changes by a rule of its own (codes of a tokenizer)

The objective returns sums, and the engine divides once by the global weight. DeepSpeed's reduction divides by the world
size W, so the engine multiplies by W. The gradient is then that of the mean over all weighted tokens of the step, for
any number of ranks and microbatches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmscale.dist import World, all_reduce_sum, any_rank, is_peer_lost, peer_lost, start_deepspeed
from mmscale.engine.config import EngineConfig
from mmscale.engine.deepspeed_attributes import check_attributes
from mmscale.engine.ds_config import deepspeed_config, optimizer_clips
from mmscale.engine.expert_parallel import check_placement
from mmscale.engine.graph import (
    LossGraph,
    ObjectiveLike,
    RouterSums,
    SavedWeights,
    Undo,
    WholeStepObjective,
    encoders,
    gather_whole,
    prepare_step,
    read_gradients_in_place,
    recompute,
    weighted_means,
)
from mmscale.engine.optimizers.build import ShardAwareOptimizer, build_optimizer
from mmscale.engine.partition import Partition, square_sums
from mmscale.engine.precision import Precision, choose_precision, loss_scaler_state, set_loss_scaler_state
from mmscale.engine.row_updates import all_reduce_sum_tensors, update_rows
from mmscale.engine.step_clock import BACKWARD, FORWARD, OPTIMIZER, StepClock, StepSpans, watch_deepspeed
from mmscale.errors import EngineError
from mmscale.nn.expert_parallel import full_shape
from mmscale.nn.router import routers
from mmscale.optim.schedule import (
    ClippingMixin,
    Components,
    LearningRates,
    component_of_parameters,
    freeze,
    parameter_groups,
    trained_components,
)
from mmscale.optim.stages import StageConfig


@dataclass(frozen=True)
class StepReport:
    """The result of one optimizer step; equal on all ranks except ``document_losses`` and ``spans``.

    Attributes:
        loss: Weighted mean over all tokens of the step on all ranks; NaN or infinite if a loss was not finite.
        weight: Sum of the loss weights of the step over all ranks.
        grad_norm: L2 norm of the whole gradient before clipping; infinite if it was not finite.
        learning_rates: Learning rate of each trained component.
        applied: Whether weights changed. False if the gradient was not finite, the update was rejected, or the step had
            no loss weight.
        metrics: Weighted means of the objective's metrics.
        document_losses: Weighted loss sum of each document, for each microbatch of this rank.
        component_grad_norms: As ``grad_norm``, by trained component; empty unless requested.
        overflow: Whether the scaled gradient overflowed in fp16 although the loss was finite. The loss scale is then
            lowered, and the step is no sign of bad data.
        spans: Time and memory of the phases on this rank.
        router: Sums of the routers over the whole step; None for a model without experts.
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
    router: RouterSums | None = None


@dataclass(frozen=True)
class FrozenSource:
    """A checkpoint that holds values of frozen parameters.

    Attributes:
        path: Absolute path of its folder.
        checksum: Checksum of its manifest.
        ema: Whether the values are the averages of the weights there.
    """

    path: str
    checksum: str
    ema: bool


@dataclass(frozen=True)
class ComponentParameters:
    """Number of parameter values of a component: all, and the trained ones."""

    total: int
    trained: int


class Engine:
    """A model being trained through one stage.

    Args:
        model: Bare model with ``components()`` and ``checkpoint_units()``, built by ``mmscale.engine.construct``, with
            the same weights on every rank.
        objective: Returns loss sum, weight and metrics.
        stage: The trained components and their schedule.
        config: The ``engine`` block.
        world: This rank.

    Attributes:
        model: For forward passes and generation under ``inference()``. All ranks must make the same calls.
        precision: The chosen number format, with the reason.
        stage_step: Steps taken in this stage, applied or not. The schedules depend on it. ``checkpoint.resume`` sets
            it.
        clock: Measures the phases of steps.
        teachers: Frozen models that the objective runs. Checkpoints and parameter counts do not include them.
        frozen_sources: For parameters that are equal to those of a checkpoint as long as they are frozen: that
            checkpoint, by name. Checkpoints of this engine name it instead of storing the values. The functions of
            ``mmscale.checkpoint`` set it; equal on all ranks.

    Raises:
        ConfigError: the stage trains a component that the model lacks, or ``expert_parallel`` is above 1 and the model
            has no experts.
        UnsupportedError: this machine cannot compute in the configured precision, or this torch lacks the optimizer.
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
        self.frozen_sources: dict[str, FrozenSource] = {}
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
        gathered = [*units, *(unit for teacher in self.teachers for unit in teacher.units()), *encoders(self.model)]
        self._undo: list[Undo] = self._arrange(units, gathered)
        self._deepspeed = self._start(components)
        self._saving: Callable[[], AbstractContextManager[Any]] = nullcontext
        if config.zero_stage == 3:
            self._saving = saved = SavedWeights(model, gathered)
            self._undo += [saved.close, read_gradients_in_place(self._deepspeed.optimizer)]
        self.partition = Partition(model, self._deepspeed, config.zero_stage, world, averaged=stage.ema is not None)
        self._prepare_optimizer()
        self._routers = routers(model)
        self._biased_blocks = [
            block for block, each in enumerate(self._routers) if each.config.bias_rate and each.weight.requires_grad
        ]

    def __repr__(self) -> str:
        return (
            f"Engine(stage {self.stage.name}, step {self.stage_step}: trains {', '.join(self.trained_components)}; "
            f"ZeRO {self.config.zero_stage}, {self.precision.name}, rank {self.world.rank} of {self.world.world_size}; "
            f"{self.model!r})"
        )

    def _arrange(self, units: list[nn.Module], gathered: list[nn.Module]) -> list[Undo]:
        undo = [recompute(units)] if self.config.activation_checkpointing else []
        return [*undo, gather_whole(gathered)] if self.config.zero_stage == 3 else undo

    def _prepare_optimizer(self) -> None:
        optimizer = self._deepspeed.basic_optimizer
        # DeepSpeed may have stepped with zero gradients to allocate the state. The step count must start at 0.
        optimizer.state.clear()
        if isinstance(optimizer, ShardAwareOptimizer):
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
        check_attributes(engine, self.model, self.config.zero_stage, deepspeed.__version__)
        check_placement(engine, self.model, self.config.expert_parallel, deepspeed.__version__)
        engine.train()
        return engine

    def train_step(
        self,
        microbatches: Sequence[Any],
        rejection_reason: Callable[[float, float], str | None] | None = None,
        *,
        component_norms: bool = False,
    ) -> StepReport:
        """Run forward, backward and the optimizer's step. All ranks must call, with the same number of microbatches.

        Args:
            microbatches: This rank's part of the step.
            rejection_reason: Called with loss and gradient norm of the whole step before the update. If it returns a
                reason on any rank, no rank changes weights, moments or step counts. Pass it on all ranks or on none.
                It is not called if the norm is not finite: such an update is always skipped.
            component_norms: Whether to report the gradient norm of each component; must be equal on all ranks. This
                costs a pass over the gradient, except in a stage that clips each component and makes this pass anyway.

        Raises:
            EngineError: ranks have different numbers of microbatches, or another rank is lost.
        """
        rates = self._learning_rates.at(self.stage_step)
        self.stage_step += 1
        weight = self._global_weight(microbatches)
        if weight == 0:
            # All packs are dummy packs or carry no loss. Skip the update: weight decay alone must not change weights.
            return StepReport(0.0, 0.0, 0.0, rates, applied=False, spans=self.clock.pop_spans())
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = rates[group["component"]]
        try:
            with self.clock.phase(FORWARD):
                microbatches = prepare_step(self.model, self._objective, microbatches, self.world.device)
            sums, losses, routed, statistics = self._forward_backward(microbatches, self.world.world_size / weight)
            squares = self._square_sums() if component_norms or self._clips else {}
            loss, metrics, norms = self._global_means(sums, weight, squares)
            router = self._global_router_sums(routed) if routed else None
            rejected = self._update(loss, norms, rejection_reason)
        except RuntimeError as error:
            if is_peer_lost(error):
                raise peer_lost(self.world, error) from error
            raise
        finite = bool(self._deepspeed.was_step_applied())
        applied = finite and not rejected
        if applied and self._biased_blocks:
            self._rebalance(router)
        if statistics:
            metrics |= update_rows(self, self._objective, statistics, applied=applied)
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
            router=router,
        )

    def runs_forward_twice(self, num_microbatches: int) -> bool:
        """Return whether a step runs the model on all microbatches first, without gradients."""
        objective = self._objective
        return isinstance(objective, WholeStepObjective) and objective.prepare_runs(self.model, num_microbatches)

    def _update(
        self, loss: float, norms: dict[str, float], rejection_reason: Callable[[float, float], str | None] | None
    ) -> bool:
        """Let DeepSpeed make the optimizer's step. Return whether a rank rejected the update.

        DeepSpeed computes the norm of the whole gradient inside its ``step``. It then calls the client optimizer once
        for each group of parameters, and at stage 3 for each sub-group. All wrappers of DeepSpeed 0.19 set
        ``_global_grad_norm`` before that call, to the same value on all ranks. So this method temporarily replaces the
        client optimizer's ``step`` by one that calls ``may_update`` first.

        If the optimizer does nothing, masters, moments and step counts are unchanged. DeepSpeed then rounds the
        unchanged masters and gathers the same weights again. At stage 0 in fp32 DeepSpeed has no wrapper: the optimizer
        computes the norm (``optim.schedule.ClippingMixin``) and calls ``may_update`` itself.

        ``may_update`` also clips each component. At every stage, format and offload setting, ``grad`` of the parameters
        in the client optimizer's groups is at that point the averaged fp32 gradient without loss scale. The optimizer
        reads it once, and each group belongs to one component.
        """
        optimizer = self._deepspeed.basic_optimizer
        update = optimizer.step
        rejected: bool | None = None

        def may_update(norm: float | Tensor) -> bool:
            nonlocal rejected
            if rejected is None:
                rejected = False
                if rejection_reason is not None:
                    with self.clock.communicating():
                        rejected = any_rank(self.world, rejection_reason(loss, float(norm)) is not None)
            if rejected:
                return False
            for group in optimizer.param_groups:
                gradients = [values.grad for values in group["params"] if values.grad is not None]
                clip = self._clips.get(group["component"])
                factor = 1.0 if clip is None else min(1.0, clip / (norms[group["component"]] + 1e-6))
                if gradients and factor != 1.0:
                    torch._foreach_mul_(gradients, factor)
            return True

        def update_if_allowed(*arguments: Any, **options: Any) -> Any:
            if may_update(self._deepspeed.optimizer._global_grad_norm):
                return update(*arguments, **options)
            return None

        name, hook = ("may_update", may_update) if isinstance(optimizer, ClippingMixin) else ("step", update_if_allowed)
        before = getattr(optimizer, name)
        setattr(optimizer, name, hook)
        try:
            with self.clock.phase(OPTIMIZER):
                self._deepspeed.step()
        finally:
            setattr(optimizer, name, before)
        return bool(rejected)

    def _rebalance(self, sums: RouterSums | None) -> None:
        """Update the routers' biases by the loads of the step."""
        if sums is None:
            raise EngineError(
                "decoder.mlp.bias_rate: the objective returns no sums of the routers, by which their biases move; "
                "return ObjectiveOutput(..., router=output.router) with the model's output"
            )
        for block in self._biased_blocks:
            router = self._routers[block]
            router.rebalance(sums.load[block].sum(0))

    def _global_router_sums(self, routed: list[RouterSums]) -> RouterSums:
        """Add the routers' sums of all microbatches, at least one, and ranks in one message."""
        own = [torch.stack(parts).double().sum(0) for parts in zip(*routed, strict=True)]
        with self.clock.communicating():
            load, entropy, dropped = all_reduce_sum_tensors(self.world, own)
        return RouterSums(load.long(), entropy, dropped.long())

    def _forward_backward(
        self, microbatches: Sequence[Any], scale: float
    ) -> tuple[list[dict[str, Tensor]], list[Tensor], list[RouterSums], list[tuple[Tensor, ...]]]:
        """Run forward and backward. The gradient is complete and reduced after the last microbatch.

        The loss is multiplied by ``scale``. A loss that is not finite is multiplied by NaN instead. The gradient norm
        is then NaN on every rank, and all ranks skip the update, without a further message or synchronisation with the
        device.

        Returns:
            For each microbatch the sums of loss and metrics, and the losses of its documents; for a model with experts
            also the sums of its routers; and the objective's statistics, if any.
        """
        sums: list[dict[str, Tensor]] = []
        documents: list[Tensor] = []
        routed: list[RouterSums] = []
        statistics: list[tuple[Tensor, ...]] = []
        for index, microbatch in enumerate(microbatches):
            self._deepspeed.set_gradient_accumulation_boundary(index == len(microbatches) - 1)
            with self.clock.phase(FORWARD), self._saving():
                outputs = self._deepspeed(microbatch.to(self.world.device, non_blocking=True))
            loss_sum, metrics, losses, router, counted = outputs
            sums.append({"loss": loss_sum.detach(), **metrics})
            documents.append(losses)
            if router is not None:
                routed.append(router)
            if counted:
                statistics.append(counted)
            with self.clock.phase(BACKWARD):
                factor = torch.where(torch.isfinite(loss_sum.detach()), scale, math.nan).to(loss_sum.dtype)
                self._deepspeed.backward(loss_sum * factor, scale_wrt_gas=False)
            if index < len(microbatches) - 1:
                self._deepspeed.step()  # Before the accumulation boundary DeepSpeed only counts the call.
        return sums, documents, routed, statistics

    def _square_sums(self) -> dict[str, float]:
        """Return this rank's part of the components' squared gradient norms."""
        names, stage = self.trained_components, self.config.zero_stage
        with self.clock.phase(OPTIMIZER):
            return square_sums(self.model, self._owner, names, self._deepspeed.optimizer, stage, self.world)

    def _global_weight(self, microbatches: Sequence[Any]) -> float:
        count = len(microbatches)
        mine = math.fsum(self._objective.weight(microbatch) for microbatch in microbatches)
        with self.clock.communicating():
            sums = all_reduce_sum(self.world, {"weight": mine, "count": count, "count_squared": count * count})
        # By Cauchy-Schwarz, sum(n)^2 = W * sum(n^2) only if all counts n are equal. This needs no second message.
        if sums["count"] ** 2 != self.world.world_size * sums["count_squared"] or not count:
            raise EngineError(
                f"rank {self.world.rank} has {count} microbatches, all {self.world.world_size} ranks "
                f"{int(sums['count'])}: every rank needs the same number, at least one; dummy packs fill up"
            )
        return sums["weight"]

    def _global_means(
        self, sums: list[dict[str, Tensor]], weight: float, squares: dict[str, float]
    ) -> tuple[float, dict[str, float], dict[str, float]]:
        """Reduce the sums of all microbatches and ranks in one message.

        Returns:
            The loss and the metrics as weighted means, and the gradient norm of each component in ``squares``, infinite
            if the component's gradient was not finite.
        """
        names = sorted(sums[0])
        local = torch.stack([torch.stack([part[name].double() for name in names]) for part in sums]).sum(0).tolist()
        mine = dict(zip(names, local, strict=True)) | {f"grad_square/{name}": value for name, value in squares.items()}
        with self.clock.communicating():
            whole = all_reduce_sum(self.world, mine)
        means = weighted_means({name: whole[name] for name in names}, weight)
        squares = {name: whole[f"grad_square/{name}"] for name in squares}
        norms = {name: math.sqrt(value) if math.isfinite(value) else math.inf for name, value in squares.items()}
        return means.pop("loss"), means, norms

    @contextmanager
    def inference(self, *, ema: bool = False) -> Iterator[nn.Module]:
        """Yield the model in evaluation mode without gradients. Restore training mode at the end.

        All ranks must make the same module calls in the same order: under ZeRO-3 each call gathers weights.

        Args:
            ema: Whether to compute with the averaged weights.

        Raises:
            EngineError: ``ema`` is true and the stage keeps no average.
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
        """Return the state of fp16's dynamic loss scale; None in other formats."""
        return loss_scaler_state(self._deepspeed.optimizer)

    def set_loss_scaler_state(self, state: dict[str, float] | None) -> None:
        """Restore what ``loss_scaler_state`` returned."""
        set_loss_scaler_state(self._deepspeed.optimizer, state)

    def close(self) -> None:
        """Remove DeepSpeed's hooks from the model and free the moments. The engine is unusable afterwards."""
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
