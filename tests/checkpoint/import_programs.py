"""Programs that the ranks of the import tests run: engines that DeepSpeed saves, and engines that resume an import.

The expected values come from DeepSpeed's public functions, not from mmscale's partition.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from argparse import Namespace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from data_pipeline.loader.loader import Loader
from mmscale.checkpoint import TrainState, resume, save
from mmscale.config import load
from mmscale.dist import World, start_deepspeed
from mmscale.engine.engine import Engine
from mmscale.objectives.next_token import NextToken
from mmscale.run.config import RunConfig
from mmscale.run.train import build
from tests.checkpoint.programs import train_on
from tests.engine.programs import make_engine
from tests.engine.ranks import barrier
from tests.engine.toy import initialise_

Case = dict[str, Any]
_NOT_ENGINE = ("folder", "path", "universal", "exclude")


def _engine(world: World, case: Case) -> Engine:
    return make_engine(world, **{key: value for key, value in case.items() if key not in _NOT_ENGINE})


def truth(engine: Engine) -> dict[str, str]:
    """Return a hash of every unsharded master, moment, frozen weight and buffer, and the step counts."""
    found = {}
    optimizer = engine._deepspeed.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False  # mmscale's engine cleared the state that DeepSpeed had linked.
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.model.named_parameters():
        for kind, values in _values(engine, parameter).items():
            found[f"{name}|{kind}"] = hashlib.sha256(values.float().reshape(-1).numpy().tobytes()).hexdigest()
    for name, values in engine.model.named_buffers():
        found[f"{name}|buffer"] = hashlib.sha256(values.float().numpy().tobytes()).hexdigest()
    found["steps"] = str({int(state["step"]) for state in engine._deepspeed.basic_optimizer.state.values()})
    return found


def _values(engine: Engine, parameter: nn.Parameter) -> dict[str, Tensor]:
    if not parameter.requires_grad:
        sharded = [parameter] if hasattr(parameter, "ds_id") else []
        with deepspeed.zero.GatheredParameters(sharded) if sharded else contextlib.nullcontext():
            return {"frozen": parameter.detach().clone()}
    moments = ("exp_avg", "exp_avg_sq")
    if engine.config.zero_stage:
        states = {key: safe_get_full_optimizer_state(parameter, key) for key in moments}
        return {"master": safe_get_full_fp32_param(parameter), **states}
    optimizer = engine._deepspeed.optimizer
    master: Tensor = parameter
    if hasattr(optimizer, "fp32_groups"):
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        (master,) = (high for lows, highs in pairs for low, high in zip(lows, highs, strict=True) if low is parameter)
    state = engine._deepspeed.basic_optimizer.state[master]
    return {"master": master.detach(), **{key: state[key] for key in moments}}


def save_deepspeed(world: World, cases: list[Case], other: str) -> list[Any]:
    """Train three steps, let DeepSpeed save, convert to the universal format if requested, and train two more steps.

    The first answer is that of ``save_other`` with the folder ``other``.
    """
    answers: list[Any] = [save_other(world, other)]
    for case in cases:
        engine = _engine(world, case)
        train_on(engine, world, 0, 3)
        exclude = case.get("exclude", False)
        engine._deepspeed.save_checkpoint(case["folder"], tag="step3", exclude_frozen_parameters=exclude)
        barrier(world)
        path = Path(case["folder"]) / "step3"
        if world.is_main and case.get("universal"):
            convert(path, path.with_name("universal"))
        saved = truth(engine)
        answers.append({"path": str(path), "saved": saved, "after": train_on(engine, world, 3, 5)})
        engine.close()
    return answers


def convert(source: Path, target: Path) -> None:
    """Run DeepSpeed's converter to the universal format."""
    from deepspeed.checkpoint.ds_to_universal import main

    main(
        Namespace(
            input_folder=str(source),
            output_folder=str(target),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def resume_imported(world: World, cases: list[Case]) -> list[Any]:
    """Resume each case, hash the state that DeepSpeed has then, and train the same two steps."""
    answers = []
    for case in cases:
        engine = _engine(world, case)
        resume(engine, Path(case["path"]))
        restored = truth(engine)
        answers.append({"restored": restored, "after": train_on(engine, world, 3, 5)})
        engine.close()
    return answers


class Wrapped(nn.Module):
    """A module of another program: other names, no objective, a plain loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"eyes": nn.Linear(10, 12), "rest": nn.Linear(12, 5), "still": nn.Linear(12, 3)})

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net["rest"](self.net["eyes"](pixels)).square().sum()


def save_other(world: World, folder: str) -> dict[str, Any]:
    """Save a module without mmscale's engine: several sub-groups of ZeRO-3, a schedule and client state."""
    start_deepspeed(world)
    module = Wrapped()
    initialise_(module, lambda _: contextlib.nullcontext())
    module.net["still"].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    engine, _, _, _ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 3, "sub_group_size": 50, "stage3_param_persistence_threshold": 0},
        },
        dist_init_required=False,
    )
    for step in range(2):
        engine.backward(engine(torch.full((1, 10), 1.0 + step + world.rank)))
        engine.step()
    engine.save_checkpoint(folder, tag="other", client_state={"epoch": 4})
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            found[f"{name}|master"] = safe_get_full_fp32_param(parameter).reshape(-1).tolist()
            found[f"{name}|exp_avg"] = safe_get_full_optimizer_state(parameter, "exp_avg").reshape(-1).tolist()
        else:
            with deepspeed.zero.GatheredParameters([parameter]):
                found[f"{name}|frozen"] = parameter.detach().reshape(-1).tolist()
    groups = len(engine.optimizer.fp16_groups)
    engine.destroy()
    return {"values": found, "groups": groups}


def save_both(world: World, config: str, folder: str) -> str:
    """Train two steps of a real run; save the same engine with DeepSpeed and with mmscale."""
    run = load(config, [], RunConfig).value
    engine = Engine(build(run, world, 0), NextToken(world=world), run.stages[0], run.engine, world)
    data = run.stage_data(0)
    loader = Loader(data, run.media_spec, seed=1, rank=world.rank, world_size=world.world_size, micro_lanes=1)
    with contextlib.closing(loader):
        for batch in itertools.islice(loader, 2):
            engine.train_step(batch.microbatches)
    engine._deepspeed.save_checkpoint(str(Path(folder) / "theirs"))
    path = save(engine, TrainState(step=2, stage_step=2), Path(folder) / "ours")
    engine.close()
    return str(path)
