"""Program that the ranks of ``test_rejected.py`` run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from mmscale.checkpoint import resume, save, verify
from mmscale.dist import World
from mmscale.errors import CheckpointError
from tests.checkpoint.programs import digest, state_of, train_on
from tests.checkpoint.toy_checkpoint import drop_tensor, rewrite
from tests.engine.programs import make_engine
from tests.engine.ranks import barrier


def resume_rejected(world: World, folder: str) -> dict[str, Any]:
    """Resume checkpoints that lack something. Return the error messages, and the cases that changed the engine."""
    engine = make_engine(world, zero=3)
    good = save(engine, state_of(world, 3), Path(folder) / "good")
    before = digest(engine, world)
    train_on(engine, world, 0, 1)
    moved = digest(engine, world)
    assert moved != before
    messages, changed = {}, []
    for what in ("moments", "buffers", "random state", "loader"):
        path = Path(folder) / what
        if world.is_main:
            shutil.copytree(good, path)
            _spoil(path, what)
        barrier(world)
        assert bool(verify(path)) == (what in ("random state", "loader")), "verify does not know the engine"
        random = torch.get_rng_state()
        try:
            resume(engine, path)
        except CheckpointError as error:
            messages[what] = str(error)
        if digest(engine, world) != moved or not torch.equal(random, torch.get_rng_state()):
            changed.append(what)
    engine.close()
    return {"messages": messages, "changed": changed}


def _spoil(path: Path, what: str) -> None:
    if what == "moments":
        for rank in range(2):
            drop_tensor(path, "decoder.blocks.0.up.weight|exp_avg", rank)
    elif what == "buffers":
        drop_tensor(path, "counts|buffer", 0, manifest=lambda values: values["buffers"].clear())
    elif what == "random state":
        rewrite(path, metadata=lambda values: values["random_state"].update(cpu="00ff"), rank=1)
    else:
        rewrite(path, metadata=lambda values: values.update(loader="{}"), rank=1)
