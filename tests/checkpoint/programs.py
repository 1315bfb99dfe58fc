"""What the ranks of the checkpoint tests run."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from data_pipeline.state import LoaderState
from mmscale.checkpoint import TrainState, find_latest, resume, save, verify, warm_start
from mmscale.dist import World
from mmscale.engine.engine import Engine
from mmscale.errors import CheckpointError
from tests.engine.programs import lanes_of, make_engine

Case = dict[str, Any]
_NOT_ENGINE = ("folder", "steps", "path", "stepped")


def state_of(world: World, step: int) -> TrainState:
    lanes = {lane: [step, lane] for lane in range(world.rank, 4, world.world_size)}
    return TrainState(step, 0, step, 10 * step, step, LoaderState("toy:1", step, lanes), {"note": "x"})


def digest(engine: Engine, world: World) -> str:
    """Hash over masters, what is kept beside them, and frozen weights, from all ranks; and the step count."""
    total = hashlib.sha256(str(engine.partition.optimizer_steps()).encode())
    whole: dict[str, torch.Tensor] = {}
    for name, parameter in engine.model.named_parameters():
        numel = int(torch.Size(getattr(parameter, "ds_shape", parameter.shape)).numel())
        for kind in ("weights", *(engine.partition.kinds(name) if parameter.requires_grad else ())):
            whole[f"{name}|{kind}"] = torch.zeros(numel)
    for owned in engine.partition.owned():
        for kind, values in {"weights": owned.master, **owned.moments}.items():
            whole[f"{owned.name}|{kind}"][owned.start : owned.stop] += values.float()
    for key, values in sorted(engine.partition.whole_state().items()):
        total.update(key.encode() + values.numpy().tobytes())
    for key in sorted(whole):
        if world.world_size > 1:
            torch.distributed.all_reduce(whole[key])
        total.update(key.encode() + whole[key].numpy().tobytes())
    return total.hexdigest()


def train_on(engine: Engine, world: World, first: int, last: int) -> list[list[float]]:
    reports = [engine.train_step(lanes_of(world, step)) for step in range(first, last)]
    return [[report.loss, report.grad_norm] for report in reports]


def _engine(world: World, case: Case) -> Engine:
    return make_engine(world, **{key: value for key, value in case.items() if key not in _NOT_ENGINE})


def save_cases(world: World, cases: list[Case]) -> list[Any]:
    """Trains ``steps``, saves, trains two more; what a run without interruption looks like."""
    answers = []
    for case in cases:
        engine = _engine(world, case)
        before = train_on(engine, world, 0, case.get("steps", 3))
        path = save(engine, state_of(world, case.get("steps", 3)), Path(case["folder"]))
        saved = digest(engine, world)
        after = train_on(engine, world, case.get("steps", 3), case.get("steps", 3) + 2)
        answers.append(
            {"path": str(path), "saved": saved, "before": before, "after": after, "end": digest(engine, world)}
        )
        engine.close()
    return answers


def resume_cases(world: World, cases: list[Case]) -> list[Any]:
    """Resumes each case and trains the same two steps."""
    answers = []
    for case in cases:
        engine = _engine(world, case)
        if case.get("stepped"):
            train_on(engine, world, 7, 9)
        state = resume(engine, Path(case["path"]))
        restored = digest(engine, world)
        after = train_on(engine, world, state.step, state.step + 2)
        lanes = {} if state.loader is None else {str(k): v for k, v in state.loader.lanes.items()}
        answers.append({"restored": restored, "after": after, "end": digest(engine, world), "lanes": lanes})
        engine.close()
    return answers


def warm_start_case(world: World, case: Case, path: str) -> Any:
    """Weights only into a new engine."""
    engine = _engine(world, case)
    report = warm_start(engine, Path(path))
    weights = {}
    for owned in engine.partition.owned():
        weights[f"{owned.name}:{owned.start}"] = owned.master.float().tolist()
    with engine.inference() as model:
        model(lanes_of(world, 0)[0])
    answer = {
        "report": [report.loaded, report.missing, report.unused, report.mismatched],
        "steps": engine.partition.optimizer_steps(),
        "weights": weights,
        "after": train_on(engine, world, 0, 1),
    }
    engine.close()
    return answer


def complaints(world: World, case: Case, path: str, action: str, directory: str = "") -> Any:
    """The sentence that ``action`` fails with."""
    engine = _engine(world, case)
    try:
        if action == "resume":
            resume(engine, Path(path))
        elif action == "warm_start":
            warm_start(engine, Path(path))
        else:
            save(engine, state_of(world, 5), Path(directory))
    except CheckpointError as error:
        return str(error)
    return None


def killed_at_every_event(world: World, directory: str) -> Any:
    """Saves step 4 after step 3 in forked writers; the n-th dies at its n-th touch of the disk, until one lives.

    Returns, for each death, the step that is found afterwards and what is wrong with it.
    """
    folder = Path(directory)
    engine = _engine(world, {"zero": 3})
    train_on(engine, world, 0, 1)
    save(engine, state_of(world, 3), folder)
    found = []
    for number in range(1, 200):
        child = os.fork()
        if child == 0:
            _die_at_event(number, folder)
            save(engine, state_of(world, 4), folder)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        latest = find_latest(folder)
        assert latest is not None
        found.append([latest.name, verify(latest)])
        if os.WIFEXITED(status):
            break
        shutil.rmtree(folder / "step-00000004", ignore_errors=True)
    save(engine, state_of(world, 5), folder)
    return {"found": found, "names": sorted(path.name for path in folder.iterdir())}


def _die_at_event(number: int, folder: Path) -> None:
    """Lets this process kill itself at the ``number``-th audited file operation or sync below ``folder``."""
    left = number

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        touches = event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "sync")
        if touches and (event == "sync" or str(arguments[0]).startswith(str(folder))):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    sync = os.fsync

    def counted_sync(handle: int) -> None:
        count("sync", ())
        sync(handle)
        count("sync", ())

    os.fsync = counted_sync


def disk_full(world: World, directory: str, limit_bytes: int | None, limited_rank: int) -> Any:
    """Saves step 3, then fails to save step 4 (a file size limit on one rank, or a full disk below ``directory``)."""
    folder = Path(directory)
    engine = _engine(world, {"zero": 3})
    train_on(engine, world, 0, 1)
    save(engine, state_of(world, 3), folder)
    good = digest(engine, world)
    said = []
    if world.rank == limited_rank and limit_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
    try:
        save(engine, state_of(world, 4), folder)
    except CheckpointError as error:
        said.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    names = sorted(path.name for path in folder.iterdir())
    latest = find_latest(folder)
    assert latest is not None
    fresh = _engine(world, {"zero": 3})
    resume(fresh, latest)
    return {"said": said, "names": names, "problems": verify(latest), "same": digest(fresh, world) == good}
