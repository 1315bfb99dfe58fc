"""Programs that the ranks of the checkpoint tests run."""

from __future__ import annotations

import hashlib
import math
import os
import random
import resource
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data_pipeline.order.state import LoaderState
from mmscale.checkpoint import (
    Saver,
    TrainState,
    choose,
    find_latest,
    list_checkpoints,
    resume,
    save,
    verify,
    warm_start,
)
from mmscale.checkpoint.config import CheckpointConfig
from mmscale.checkpoint.share import persistent_buffers
from mmscale.dist import World
from mmscale.engine.engine import Engine
from mmscale.errors import CheckpointError
from mmscale.nn.expert_parallel import full_shape
from tests.checkpoint.dying_writer import sitecustomize
from tests.data_pipeline.lane_states import toy_lane
from tests.engine.programs import lanes_of, make_engine
from tests.engine.ranks import barrier

Case = dict[str, Any]
_NOT_ENGINE = ("folder", "steps", "path", "stepped", "background")


def state_of(world: World, step: int) -> TrainState:
    lanes = {lane: toy_lane(step, lane) for lane in range(world.rank, 4, world.world_size)}
    return TrainState(step, 0, step, 10 * step, step, LoaderState("toy:1", step, lanes), {"note": "x"})


def digest(engine: Engine, world: World) -> str:
    """Return one hash of masters, optimizer state, frozen weights, buffers and step count. All ranks must call."""
    total = hashlib.sha256(str(engine.partition.optimizer_steps()).encode())
    whole: dict[str, torch.Tensor] = {}
    for name, parameter in engine.model.named_parameters():
        numel = math.prod(full_shape(parameter))
        for kind in ("weights", *(engine.partition.kinds(name) if parameter.requires_grad else ())):
            whole[f"{name}|{kind}"] = torch.zeros(numel)
    for owned in engine.partition.owned():
        for kind, values in {"weights": owned.master, **owned.moments}.items():
            whole[f"{owned.name}|{kind}"][owned.start : owned.stop] += values.float()
    buffers = persistent_buffers(engine.model)
    for key, values in sorted({**engine.partition.whole_state(), **buffers}.items()):
        total.update(key.encode() + values.double().numpy().tobytes())
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
    """Train ``steps``, save, and train two more steps: the reference, a run without interruption."""
    answers = []
    for case in cases:
        engine = _engine(world, case)
        before = train_on(engine, world, 0, case.get("steps", 3))
        state, folder = state_of(world, case.get("steps", 3)), Path(case["folder"])
        saver = Saver(world, folder, CheckpointConfig(keep_last=9))
        if case.get("background"):
            saver.save(engine, state)
        else:
            save(engine, state, folder)
        saved = digest(engine, world)
        after = train_on(engine, world, case.get("steps", 3), case.get("steps", 3) + 2)
        saver.wait()
        saver.close()
        path = find_latest(folder)
        answers.append(
            {"path": str(path), "saved": saved, "before": before, "after": after, "end": digest(engine, world)}
        )
        engine.close()
    return answers


def resume_cases(world: World, cases: list[Case]) -> list[Any]:
    """Resume each case, and train the same two steps."""
    answers = []
    for case in cases:
        engine = _engine(world, case)
        if case.get("stepped"):
            train_on(engine, world, 7, 9)
        state = resume(engine, Path(case["path"]))
        restored = digest(engine, world)
        after = train_on(engine, world, state.step, state.step + 2)
        lanes = {} if state.loader is None else {str(lane): each.faults for lane, each in state.loader.lanes.items()}
        answers.append({"restored": restored, "after": after, "end": digest(engine, world), "lanes": lanes})
        engine.close()
    return answers


def warm_start_case(world: World, case: Case, path: str) -> Any:
    """Load only the weights into a new engine, and train one step."""
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
    """Return the error message of ``action``; None if it succeeds."""
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
    """Save step 3, then step 4 in forks. The n-th fork dies at its n-th file operation, until one succeeds.

    Returns, for each process, the newest checkpoint afterwards and its problems.
    """
    folder = Path(directory)
    engine = _engine(world, {"zero": 3})
    train_on(engine, world, 0, 1)
    save(engine, state_of(world, 3), folder)
    found = []
    for number in range(1, 200):
        child = os.fork()
        if child == 0:
            sitecustomize.die_at_event(number, directory)
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


def writers_killed_at_every_event(world: World, directory: str) -> Any:
    """Save step 3, then step 4 in the background. The n-th writer dies at its n-th file operation, until one succeeds.

    Returns, for each writer, the newest checkpoint afterwards, its problems, and the error message of the run.
    """
    folder = Path(directory)
    engine = make_engine(world, zero=3)
    train_on(engine, world, 0, 1)
    save(engine, state_of(world, 3), folder)
    os.environ |= {"PYTHONPATH": str(Path(sitecustomize.__file__).parent), "DIE_BELOW": directory}
    found = []
    for number in range(1, 200):
        os.environ["DIE_AT_EVENT"] = str(number)
        saver = Saver(world, folder, CheckpointConfig(keep_last=2))
        message = None
        try:
            saver.save(engine, state_of(world, 4))
            saver.wait()
        except CheckpointError as error:
            message = str(error)
        saver.close()
        latest = find_latest(folder)
        assert latest is not None
        found.append([latest.name, verify(latest), message])
        if message is None:
            break
        shutil.rmtree(folder / "step-00000004", ignore_errors=True)
    return {"found": found, "names": sorted(path.name for path in folder.iterdir())}


def busy(world: World, directory: str, when_busy: str) -> Any:
    """Save step 4 while the writer of step 3 is stopped by a signal."""
    folder = Path(directory)
    engine = make_engine(world, zero=3)
    notes: list[str] = []
    saver = Saver(world, folder, CheckpointConfig(when_busy=when_busy, keep_last=9), notes.append)  # type: ignore[arg-type]
    saver.save(engine, state_of(world, 2), last=True)
    assert saver._writer is not None
    writer = saver._writer.pid
    os.kill(writer, signal.SIGSTOP)
    saver.save(engine, state_of(world, 3))
    first = digest(engine, world)
    train_on(engine, world, 0, 1)
    for _ in range(3):
        saver.poll()
    before = [path.name for path in list_checkpoints(folder)]
    threading.Timer(0.5, os.kill, (writer, signal.SIGCONT)).start()
    saver.save(engine, state_of(world, 4))
    saver.wait()
    names = [path.name for path in list_checkpoints(folder)]
    saver.close()
    fresh = make_engine(world, zero=3)
    resume(fresh, folder / "step-00000003")
    same = digest(fresh, world) == first
    return {
        "before": before,
        "names": names,
        "notes": notes,
        "same": same,
        "gone": not Path(f"/proc/{writer}").exists(),
    }


def fuzz(world: World, directory: str, count: int) -> Any:
    """Damage a checkpoint in ``count`` ways, one at a time. Return those that ``resume`` noticed late or never."""
    folder = Path(directory)
    engine = make_engine(world, zero=3)
    train_on(engine, world, 0, 1)
    path = save(engine, state_of(world, 3), folder)
    other = make_engine(world, zero=3)
    before = digest(other, world)
    missed, complaints_heard = [], set()
    for number in range(count):
        what, undo = damage(path, random.Random(number))
        try:
            resume(other, path)
            missed.append(f"{number} {what}: not noticed")
        except CheckpointError as error:
            complaints_heard.add(str(error).replace(directory, "")[:60])
        undo()
        if digest(other, world) != before:
            missed.append(f"{number} {what}: after values had changed")
            break
    resume(other, path)
    return {
        "missed": missed,
        "complaints": sorted(complaints_heard),
        "good": digest(other, world) == digest(engine, world),
    }


def damage(path: Path, draw: random.Random) -> tuple[str, Callable[[], object]]:
    """Damage one random file of a checkpoint. Return a description, and a function that restores the file."""
    file = draw.choice(sorted(path.iterdir()))
    good = file.read_bytes()
    place = draw.randrange(len(good))
    bad = bytearray(good)
    kind = draw.choice(["bit", "byte", "cut", "longer", "zeros", "lost", "swapped", "digit"])
    if kind == "bit":
        bad[place] ^= 1 << draw.randrange(8)
    elif kind == "byte":
        bad[place] = (bad[place] + draw.randrange(1, 256)) % 256
    elif kind == "cut":
        del bad[place:]
    elif kind == "longer":
        bad[place:place] = b"0"
    elif kind == "zeros":
        bad[place : place + 64] = bytes(len(bad[place : place + 64]))
    elif kind == "swapped":
        other = draw.randrange(len(good))
        bad[place], bad[other] = bad[other], bad[place]
    elif kind == "digit":
        digits = [index for index, byte in enumerate(good) if 48 <= byte < 57]
        bad[draw.choice(digits)] += 1
    if bad == good and kind != "lost":  # The damage had no effect, for example zeros over zeros.
        bad[place] ^= 1
    file.unlink()
    if kind != "lost":
        file.write_bytes(bad)
    return f"{kind} at {place} of {file.name}", lambda: file.write_bytes(good)


def chosen(world: World, directory: str, on_damage: str) -> Any:
    """Return the choice of ``choose`` when the newest checkpoint is damaged."""
    folder = Path(directory)
    engine = make_engine(world, zero=3)
    for step in (3, 4):
        save(engine, state_of(world, step), folder)
    if world.is_main:
        file = folder / "step-00000004" / "rank-00001.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    barrier(world)
    notes: list[str] = []
    try:
        path = choose(world, folder, CheckpointConfig(on_damage=on_damage), notes.append)  # type: ignore[arg-type]
    except CheckpointError as error:
        return [str(error), notes]
    return [None if path is None else path.name, notes]


def disk_full(
    world: World, directory: str, limit_bytes: int | None, limited_rank: int, background: bool = False
) -> Any:
    """Save step 3, then fail to save step 4 (a file size limit on one rank, or a full disk below ``directory``)."""
    folder = Path(directory)
    engine = _engine(world, {"zero": 3})
    train_on(engine, world, 0, 1)
    save(engine, state_of(world, 3), folder)
    good = digest(engine, world)
    messages = []
    if world.rank == limited_rank and limit_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
    try:
        if background:
            saver = Saver(world, folder, CheckpointConfig())
            saver.save(engine, state_of(world, 4))
            while saver.poll() is None:
                train_on(engine, world, 1, 2)
        save(engine, state_of(world, 4), folder)
    except CheckpointError as error:
        messages.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    names = sorted(path.name for path in folder.iterdir())
    latest = find_latest(folder)
    assert latest is not None
    fresh = _engine(world, {"zero": 3})
    resume(fresh, latest)
    return {"messages": messages, "names": names, "problems": verify(latest), "same": digest(fresh, world) == good}
