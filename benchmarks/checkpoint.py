"""Time of a checkpoint compared with torch.distributed.checkpoint: ``python -m benchmarks.checkpoint --json``.

Each method saves the same tensors of one rank (masters, both moments) in turn and syncs every file:

    stall    time during which training is blocked
    durable  time from the start of the save until it is complete on the disk, without training meanwhile
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks.report import Case, main
from mmscale.checkpoint import Saver, TrainState
from mmscale.checkpoint.config import CheckpointConfig
from mmscale.checkpoint.share import share_of
from mmscale.dist import World, init_distributed, shutdown
from mmscale.engine.config import EngineConfig
from mmscale.engine.engine import Engine
from mmscale.models.build import build_model
from mmscale.models.config import ModelConfig
from mmscale.objectives.next_token import NextToken
from mmscale.optim.stages import StageConfig

LAYERS, DIM, VOCAB = 8, 512, 16384
REPEATS = 5

Times = tuple[float, float]
"""``stall`` and ``durable``, in seconds."""


def model() -> nn.Module:
    """Return a dense decoder of about 50 million parameters."""
    decoder = {
        "num_layers": LAYERS,
        "hidden_dim": DIM,
        "vocab_size": VOCAB,
        "attention": {"num_heads": 8},
        "mlp": {"kind": "dense", "hidden_dim": 4 * DIM},
    }
    return build_model(ModelConfig.model_validate({"decoder": decoder}))


def ours(engine: Engine, saver: Saver, step: int) -> Times:
    start = time.perf_counter()
    saver.save(engine, TrainState(step=step, stage_step=step))
    stall = time.perf_counter() - start
    saver.wait()
    return stall, time.perf_counter() - start


def torch_sync(state: dict[str, Tensor], folder: Path) -> Times:
    start = time.perf_counter()
    dcp.save(state, checkpoint_id=folder)
    seconds = time.perf_counter() - start
    return seconds, seconds


def torch_async(state: dict[str, Tensor], folder: Path, kind: AsyncCheckpointerType) -> Times:
    start = time.perf_counter()
    future = dcp.async_save(state, checkpoint_id=folder, async_checkpointer_type=kind)
    stall = time.perf_counter() - start
    future.result()  # type: ignore[union-attr]
    return stall, time.perf_counter() - start


def measure() -> list[Case]:
    warnings.filterwarnings("ignore")
    config = EngineConfig(device="cpu", precision="fp32")
    world = init_distributed(config)
    try:
        stage = StageConfig(name="all", steps=1000)
        engine = Engine(model(), NextToken(world=world), stage, config, world)
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            return _cases(engine, world, Path(folder))
    finally:
        shutdown(world)


def _cases(engine: Engine, world: World, folder: Path) -> list[Case]:
    share = share_of(engine, TrainState())
    state = dict(zip(share.metadata["tensors"], share.values, strict=True))
    keep = CheckpointConfig(keep_last=1)
    background = Saver(world, folder / "background", keep)
    waiting = Saver(world, folder / "waiting", keep.model_copy(update={"background": False}))
    ways: dict[str, Callable[[int], Times]] = {
        "ours": lambda n: ours(engine, background, n),
        "ours, waiting": lambda n: ours(engine, waiting, n),
        "torch save": lambda n: torch_sync(state, folder / f"sync-{n}"),
        "torch async_save": lambda n: torch_async(state, folder / f"thread-{n}", AsyncCheckpointerType.THREAD),
        "torch async_save, process": lambda n: torch_async(
            state, folder / f"process-{n}", AsyncCheckpointerType.PROCESS
        ),
    }
    times: dict[str, list[Times]] = {name: [] for name in ways}
    for number in range(1, REPEATS + 2):
        for turn in range(len(ways)):
            name, run = list(ways.items())[
                (turn + number) % len(ways)
            ]  # Rotate the order: a disk may be faster after a pause.
            os.sync()  # Write back the cache, so that no method pays for another one.
            seconds = run(number)
            if number > 1:  # The first turn starts processes and allocates memory.
                times[name].append(seconds)
    background.close()
    size = f"{sum(share.lengths) / 1e6:.0f} MB of fp32 masters and moments, one rank"
    cases = []
    for index, what in enumerate(("stall", "durable")):
        medians = {name: statistics.median(seconds[index] for seconds in all_) for name, all_ in times.items()}
        peers = {name: seconds for name, seconds in medians.items() if name != "ours"}
        cases.append(Case(f"{what}, {size}", medians["ours"], peers, "s"))
    return cases


if __name__ == "__main__":
    main("checkpoint", measure)
