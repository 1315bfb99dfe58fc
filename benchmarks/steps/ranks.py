"""Worker ranks of each side: every side has its own processes, and the sides take turns on the CPU.

    driver --command--> every rank of one side --result--> driver

The sides need separate processes, because DeepSpeed's settings affect a whole process: those of the Trainer replace
``torch.nn.functional.linear``.
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

from benchmarks.steps.batches import BatchPair, flatten, make_batches
from benchmarks.steps.reference_models import fill_from, our_config, their_model, weights_for_ours
from benchmarks.steps.theirs import LEARNING_RATE, TheirEngine
from mmscale.dist import World, all_reduce_sum_list, init_distributed, shutdown
from mmscale.engine.config import EngineConfig
from mmscale.optim.config import AdamWConfig
from mmscale.optim.stages import StageConfig

SIDES = ("ours", "hugging face")


def stage() -> StageConfig:
    """Return our side's stage; ``theirs.py`` has the same optimizer settings."""
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
        self._pairs: list[BatchPair] = []
        self._weights: list[float] = []
        self._theirs: dict[bool, list[Any]] = {}

    def build(self, model: str, zero_stage: int, precision: str) -> None:
        """Build model and engine. Both sides get the weights of the Hugging Face model."""
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
        buckets = {"gather_bucket_elements": 0, "reduce_bucket_elements": 1_000_000} if zero_stage == 3 else {}
        config = EngineConfig(zero_stage=zero_stage, precision=precision, device="cpu", **buckets)
        fill = fill_from(weights_for_ours(theirs))
        ours = construct(lambda: build_model(our_config(model), seed=None), config, self.world, fill)
        objective = NextToken(world=self.world)
        self._engine = Engine(ours, objective, stage(), config, self.world)

    def data(self, model: str, data: str, steps: int, max_tokens: int) -> dict[str, Any]:
        """Build the batches of ``steps`` steps; return tokens of each step over all ranks, and shares of padding."""
        world = self.world
        self._pairs = make_batches(model, data, world.rank, world.world_size, steps, max_tokens)
        self._weights = all_reduce_sum_list(world, [pair.weight for pair in self._pairs])
        self._theirs = {False: [pair.padded for pair in self._pairs]}
        if model != "mllama":
            self._theirs[True] = [flatten(pair.packed) for pair in self._pairs]
        names = self._pairs[0].padding
        return {
            "tokens": all_reduce_sum_list(world, [pair.tokens for pair in self._pairs]),
            "padding": {name: statistics.mean(pair.padding[name] for pair in self._pairs) for name in names},
        }

    def step(self, index: int, flat: bool = False) -> dict[str, float]:
        """Run one step; return its loss, its seconds between two barriers, and the CPU time of this rank's threads."""
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
"""Called with (name of the side, world): return the object whose methods the rank runs."""


def serve(pipe: Connection, make: Make, side: str, rank: int, world_size: int, port: int, threads: int) -> None:
    """Run commands until the pipe closes."""
    import torch

    sys.stdout = sys.stderr  # DeepSpeed logs to stdout, which is reserved for the results.
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
    """The driver's handle of the processes of one side."""

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
        """Run ``name`` on every rank and return the result of rank 0.

        Raises:
            RuntimeError: a rank failed; the message has its traceback.
        """
        self.begin(name, **arguments)
        return self.end()

    def begin(self, name: str, **arguments: Any) -> None:
        """Start a command; ``end`` waits for it."""
        for pipe in self._pipes:
            pipe.send((name, arguments))

    def end(self) -> Any:
        """Wait for the last command and return the result of rank 0."""
        answers = [pipe.recv() for pipe in self._pipes]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers[0]

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
