"""Ranks that wait for orders: each side has its own processes, and the sides take turns at the processors.

    driver --order--> every rank of one side --answer--> driver

A side apart, because DeepSpeed's settings reach beyond one engine: the Trainer's replace ``torch.nn.functional.linear``
for the whole process.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.steps.batches import Pair, flatten, make_batches
from benchmarks.steps.theirs import LEARNING_RATE, TheirEngine
from benchmarks.steps.twins import fill_from, our_config, their_model, weights_for_ours
from mmscale.dist import World, all_reduce_sum_list, init_distributed, shutdown
from mmscale.engine.config import EngineConfig
from mmscale.optim.config import AdamWConfig
from mmscale.optim.stages import StageConfig

SIDES = ("ours", "hugging face")


def stage() -> StageConfig:
    """Our side's optimizer; ``theirs.py`` has the same numbers."""
    rates = {"default": LEARNING_RATE}
    optimizer = AdamWConfig(weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    return StageConfig(
        name="measured", steps=1000, learning_rate=rates, schedule="constant", optimizer=optimizer, clip=1.0
    )


class Rank:
    """One process of one side."""

    def __init__(self, side: str, world: World) -> None:
        self.side, self.world = side, world
        self._engine: Any = None
        self._pairs: list[Pair] = []
        self._weights: list[float] = []
        self._theirs: dict[bool, list[Any]] = {}

    def build(self, model: str, zero_stage: int, precision: str) -> None:
        """Makes model and engine anew; weights are those of Hugging Face's twin, on both sides."""
        from mmscale.engine.construct import construct
        from mmscale.engine.engine import Engine
        from mmscale.models.build import build_model
        from mmscale.objectives.next_token import NextToken

        if self._engine is not None:
            self._engine.close()
        theirs = their_model(model)
        if self.side != "ours":
            self._engine = TheirEngine(theirs, zero_stage, precision, self.world)
            return
        config = EngineConfig(zero_stage=zero_stage, precision=precision, device="cpu")
        fill = fill_from(weights_for_ours(theirs))
        ours = construct(lambda: build_model(our_config(model), seed=None), config, self.world, fill)
        self._engine = Engine(ours, NextToken(), stage(), config, self.world)

    def data(self, model: str, data: str, steps: int, max_tokens: int) -> dict[str, Any]:
        """Makes the batches of ``steps`` steps; tokens of each step over all ranks, and shares of padding."""
        world = self.world
        self._pairs = make_batches(model, data, world.rank, world.world_size, steps, max_tokens)
        self._weights = all_reduce_sum_list(world, [pair.weight for pair in self._pairs])
        self._theirs = {False: [pair.padded for pair in self._pairs]}
        if model == "dense":
            self._theirs[True] = [flatten(pair.packed) for pair in self._pairs]
        names = self._pairs[0].padding
        return {
            "tokens": all_reduce_sum_list(world, [pair.tokens for pair in self._pairs]),
            "padding": {name: statistics.mean(pair.padding[name] for pair in self._pairs) for name in names},
        }

    def step(self, index: int, flat: bool = False) -> dict[str, float]:
        """Seconds and loss of one step, from all ranks ready to all ranks done; CPU time of this rank's threads."""
        all_reduce_sum_list(self.world, [0.0])
        start, cpu_start = time.perf_counter(), time.process_time()
        if self.side == "ours":
            loss = self._engine.train_step([self._pairs[index].packed]).loss
        else:
            share = self._engine.train_step(self._theirs[flat][index], self._weights[index])
            loss = all_reduce_sum_list(self.world, [share])[0]
        cpu_seconds = time.process_time() - cpu_start
        all_reduce_sum_list(self.world, [0.0])
        return {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds, "loss": loss}


Make = Callable[[str, World], Any]
"""Makes what a process orders about: from the name of its side and its place."""


def serve(pipe: Connection, make: Make, side: str, rank: int, world_size: int, port: int, threads: int) -> None:
    """Runs orders until the pipe closes."""
    import torch

    sys.stdout = sys.stderr  # DeepSpeed narrates; the driver's output is for the figures.
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    world = init_distributed(EngineConfig(device="cpu"))
    torch.set_num_threads(threads)
    try:
        here = make(side, world)
        while True:
            try:
                name, arguments = pipe.recv()
            except EOFError:
                return
            pipe.send(getattr(here, name)(**arguments))
    except Exception:
        pipe.send(RuntimeError(f"{side}, rank {rank}:\n{traceback.format_exc()}"))
    finally:
        shutdown(world)


class Side:
    """The processes of one side, seen from the driver."""

    def __init__(self, side: str, world_size: int, threads: int, make: Make = Rank) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._pipes = []
        self._processes = []
        for rank in range(world_size):
            mine, its = context.Pipe()
            process = context.Process(
                target=serve, args=(its, make, side, rank, world_size, port, threads), daemon=True
            )
            process.start()
            its.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def order(self, name: str, **arguments: Any) -> Any:
        """Has every rank call ``name``; the answer of rank 0, as of ``end``.

        Raises:
            RuntimeError: a rank failed; its traceback.
        """
        self.begin(name, **arguments)
        return self.end()

    def begin(self, name: str, **arguments: Any) -> None:
        """Starts an order; ``end`` waits for it."""
        for pipe in self._pipes:
            pipe.send((name, arguments))

    def end(self) -> Any:
        """The answer of rank 0 to the last order."""
        answers = [pipe.recv() for pipe in self._pipes]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers[0]

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
