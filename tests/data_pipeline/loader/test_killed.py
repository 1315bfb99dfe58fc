"""SIGKILL of a loader's worker or of all processes, over damaged data: a resume yields the same batches."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataPipelineError, TooManyFaultsError
from data_pipeline.history.digest import step_digest
from data_pipeline.loader.loader import Loader, LoaderState, StepBatch
from data_pipeline.media_spec import MediaSpec
from tests.data_pipeline.conftest import Members, WriteSet, captioned
from tests.engine.fork_server import Child, fork_program

pytestmark = [pytest.mark.fault, pytest.mark.resume]

NUM_SAMPLES = 150


def samples() -> list[Members]:
    """Write samples of which one in six is damaged."""
    bad: list[Members] = [{"png": b"junk"}, {"json": b"{"}, {"png": b""}, {"json": b'{"captions": [""]}'}]
    return [captioned(i) | (bad[i // 6 % 4] if i % 6 == 1 else {}) for i in range(NUM_SAMPLES)]


@pytest.fixture
def config(write_set: WriteSet, mixture_config: DataConfig) -> DataConfig:
    raw = mixture_config.model_dump()
    raw["datasets"] = [{"name": "only", "manifest": write_set("only", samples())}, *raw["datasets"][1:]]
    raw |= {"lanes": 4, "faults": {"on_error": "quarantine", "max_share": 0.9}, "prefetch": 1}
    return DataConfig.model_validate(raw)


def with_workers(config: DataConfig, workers: int) -> DataConfig:
    return config.model_copy(update={"workers": workers})


def line(step: StepBatch) -> str:
    """Return the values that must not change: the batch and the skipped samples."""
    return json.dumps([step_digest(list(step.microbatches)), [skip.record() for skip in step.skipped]])


def first_lines(config: DataConfig, spec: MediaSpec, count: int) -> list[str]:
    with Loader(config, spec, seed=3) as loader:
        return [line(next(loader)) for _ in range(count)]


def test_after_the_death_of_a_worker_a_resume_gives_the_same(config: DataConfig, hybrid_spec: MediaSpec) -> None:
    expected = first_lines(config, hybrid_spec, 30)
    assert any(json.loads(text)[1] for text in expected)
    found: list[str] = []
    state: LoaderState | None = None

    def take(loader: Loader, count: int) -> None:
        nonlocal state
        for _ in range(count):
            step = next(loader)
            found.append(line(step))
            state = LoaderState.from_json(step.state.to_json())

    for workers in (2, 1):
        with Loader(with_workers(config, workers), hybrid_spec, seed=3, state=state) as loader:
            take(loader, 6)
            victim = loader._workers.processes[workers - 1]  # type: ignore[union-attr]
            os.kill(victim.pid, signal.SIGKILL)
            with pytest.raises(
                DataPipelineError,
                match=r"loader worker \d exited without an error message.*Resume with fewer data\.workers",
            ):
                take(loader, 10)  # Items that the other workers had finished may still arrive.
    assert 12 <= len(found) < 30
    with Loader(config, hybrid_spec, seed=3, state=state) as loader:
        take(loader, 30 - len(found))
    assert found == expected


_PROGRAM = """
import os, sys, time
from pathlib import Path
from data_pipeline.config import DataConfig
from data_pipeline.loader.loader import Loader, LoaderState
from data_pipeline.media_spec import MediaSpec, Placement
from tests.data_pipeline.loader.test_killed import line

folder, count = Path(sys.argv[1]), int(sys.argv[2])
config = DataConfig.model_validate_json((folder / "data.json").read_text())
spec = MediaSpec(Placement.HYBRID, patch_size=8, fixed_grid=(2, 2))
saved = folder / "state.json"
state = LoaderState.from_json(saved.read_text()) if saved.exists() else None
with Loader(config, spec, seed=3, state=state) as loader:
    for step in loader:
        (folder / f"{step.step:04d}").write_text(line(step))
        (folder / "new").write_text(step.state.to_json())
        os.replace(folder / "new", saved)
        if step.step + 1 == count:
            break
        if step.step > 20 and count > 40:
            time.sleep(1)  # The test kills it here at the latest, however busy the machine is.
"""


def start(folder: Path, count: int) -> Child:
    """Start a loader that writes every step and its state to a file, in its own process group."""
    return fork_program(_PROGRAM, str(folder), str(count), log=folder.with_suffix(".log"))


def test_after_the_death_of_everything_a_resume_gives_the_same(
    config: DataConfig, hybrid_spec: MediaSpec, tmp_path: Path
) -> None:
    """Workers read ahead, so at any time some of them are in the middle of a pack."""
    count = 40
    expected = first_lines(config, hybrid_spec, count)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "data.json").write_text(with_workers(config, 2).model_dump_json())
    process = start(folder, 10**9)
    while not (folder / "0007").exists():
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert LoaderState.from_json((folder / "state.json").read_text()).step < count, "it was too fast to be killed"
    assert start(folder, count).wait() == 0
    assert [(folder / f"{step:04d}").read_text() for step in range(count)] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_gives_up_hands_on_what_it_had_left_out(
    config: DataConfig, hybrid_spec: MediaSpec, workers: int
) -> None:
    faults = {"max_share": 0.01, "share_window": 300}
    strict = DataConfig.model_validate(config.model_dump() | {"workers": workers, "faults": faults})
    reported = []
    with Loader(strict, hybrid_spec, seed=3) as loader:

        def to_the_end() -> None:
            for step in loader:
                reported.extend(step.skipped)

        with pytest.raises(TooManyFaultsError, match="4 of the last 300 samples") as end:
            to_the_end()
    reported.extend(end.value.skipped)
    lanes = [skip.lane for skip in reported]
    assert max(map(lanes.count, lanes)) == 3, "the fourth is in the message"
