"""Measure this machine for ``mmscale plan``: rates of its devices and of the messages between them.

    products, experts, attention    at the sizes of the model of CONFIG, forward and backward
    memory                          a large copy, and torch's fused AdamW
    messages                        the collectives of the ZeRO stage: a small and a large one
    host                            steps of two tiny models that differ only in their number of blocks
    steps                           of CONFIG's model with few blocks, each with another batch. Computation takes longer
                                    there than alone, with cold caches: the ratio divides all shares.

One process for each device measures, all at the same time, because processes of one machine share its processors,
memory and links. The slowest value of all ranks counts. One machine cannot measure the network between machines: its
values are those of a preset, for you to edit.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from pydantic import ValidationError
from torch import Tensor, nn

from data_pipeline.batch import MultimodalBatch, Segments
from data_pipeline.errors import out_of_memory
from data_pipeline.loader.loader import Loader
from data_pipeline.media_spec import IMAGE, MediaSpec
from data_pipeline.packing.collate import collate
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import example_document
from mmscale.dist import (
    World,
    all_reduce_sum_list,
    device_type,
    init_distributed,
    shutdown,
    start_deepspeed,
)
from mmscale.engine.construct import construct
from mmscale.engine.engine import Engine
from mmscale.engine.precision import choose_precision
from mmscale.errors import ConfigError, EngineError, UnsupportedError
from mmscale.init.machine import free_host_memory
from mmscale.metrics.peaks import peak_of
from mmscale.models.build import build_model, build_weights
from mmscale.models.config import ModelConfig
from mmscale.models.flops import learned_counts
from mmscale.nn.attention_backends import num_pairs, resolve_backend, varlen_attention
from mmscale.nn.experts import Experts
from mmscale.nn.init import initialise_
from mmscale.nn.moe import MoeConfig
from mmscale.objectives.choice import choose_objective
from mmscale.plan.cluster import PRESETS, Accelerator, Cluster, write_accelerator
from mmscale.plan.load import ExampleDocument, StageLoad, example_documents, has_data
from mmscale.plan.step_time import step_time
from mmscale.run.config import RunConfig, check_world

_REPEATS, _STEPS = 4, 5
_MOST_ROWS = 4096
_COPY_BYTES, _ADAM_VALUES = 1 << 27, 1 << 22
_SMALL, _LARGE = 1 << 10, 1 << 22
"""Values of the two messages."""
_FEW, _MANY = 2, 8
"""Blocks of the two tiny models."""
_ELEMENTWISE_SHARE = 0.7
"""``memory_share`` before the steps correct it: that of a preset."""
_COMPUTE_SHARES = ("matmul_share", "expert_share", "attention_share", "memory_share")
_LEAST_RATIO = 0.1
"""No computation is ten times as fast in a step as alone: the planned time of other parts is wrong then."""
_FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_ADAM_BYTES = 28
"""AdamW reads gradient, master and two moments, and writes the last three, in float32."""


def calibrate(config: RunConfig, ranks: int, path: Path, log: Callable[[str], object]) -> Accelerator:
    """Measure this machine with the model and data of stage 0 of a run, and write the result as YAML.

    Args:
        config: The run.
        ranks: Number of processes: one for each GPU, or any number on a CPU.
        path: The file to write.
        log: Called with the name of each measurement before it starts.

    Raises:
        UnsupportedError: this machine has fewer GPUs.
        ConfigError: the run does not fit this number of ranks.
        EngineError: a process ended with an error.
    """
    check_world(config, ranks)
    if device_type(config.engine.device) == "cuda" and ranks > torch.cuda.device_count():
        raise UnsupportedError(
            f"--gpus-per-node {ranks}: this machine has {torch.cuda.device_count()} GPUs; measure with at most as many"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context, pipes, processes = multiprocessing.get_context("spawn"), [], []
    for rank in range(ranks):
        mine, its = context.Pipe()
        arguments = (its, config.model_dump(mode="json"), rank, ranks, port)
        processes.append(context.Process(target=_measure_in_process, args=arguments, daemon=True))
        processes[-1].start()
        its.close()
        pipes.append(mine)
    try:
        found = _receive(pipes[0], log)
    finally:
        for process in processes:
            process.join(20)
            if process.is_alive():
                process.kill()
    device = Accelerator.model_validate(found)
    write_accelerator(path, device)
    return device


def _receive(pipe: Connection, log: Callable[[str], object]) -> dict[str, Any]:
    """Return the values of rank 0."""
    while True:
        try:
            kind, value = pipe.recv()
        except EOFError:
            kind, value = "error", "a process ended without an error message; is memory full?"
        if kind == "found":
            result: dict[str, Any] = value
            return result
        if kind == "error":
            raise EngineError(f"--calibrate: {value}")
        log(f"measure {value}")


def _measure_in_process(pipe: Connection, config: dict[str, Any], rank: int, ranks: int, port: int) -> None:
    sys.stdout = sys.stderr  # DeepSpeed logs to stdout, which is reserved for the result.
    names = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    try:
        run = RunConfig.model_validate(config)
        world = init_distributed(run.engine)
        start_deepspeed(world)
        measured = Measurement(run, world, lambda name: pipe.send(("log", name)) if rank == 0 else None).measure()
        pipe.send(("found", measured))
        shutdown(world)
    except Exception as error:  # The parent prints it; a traceback of another process would help nobody.
        reason = out_of_memory(error)
        pipe.send(("error", f"out of memory ({reason})" if reason else f"{type(error).__name__}: {error}"))


@dataclass
class Measurement:
    """The measurements of one rank. All ranks must make the same calls.

    Attributes:
        config: The run.
        world: The ranks.
        log: Called with the name of each measurement before it starts.
        now: Clock in seconds. The clock of this process's processor time ignores other programs, and waits.
    """

    config: RunConfig
    world: World
    log: Callable[[str], object]
    now: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        self.precision = choose_precision(self.config.engine, self.world.device)
        self.dtype, self.device = self.precision.dtype, self.world.device
        self.model = self.config.decoder_model(0)
        self.steps = self._steps(self.config)

    def measure(self) -> dict[str, Any]:
        """Return the fields of ``Accelerator``."""
        cuda = self.device.type == "cuda"
        self.log("products")
        rate, best = self._product_rates()
        known = {kind: peak_of(self.device, kind).flops or 0.0 for kind in (torch.float32, self.dtype)}
        peak = known[self.dtype] = max(known[self.dtype], best)
        found: dict[str, Any] = {
            "name": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "device": self.device.type,
            "peak_flops": {_FORMATS[kind]: flops for kind, flops in known.items() if flops},
            "memory_bytes": self._memory_bytes(),
            "matmul_share": min(1.0, rate / peak),
            "overlap": 0.9 if cuda else 0.0,
        }
        found["expert_share"] = min(1.0, self._expert_rate() / peak) if self._experts else found["matmul_share"]
        self.log("attention")
        found["attention_share"] = min(1.0, self._attention_rate() / peak)
        self.log("memory")
        found |= self._memory_rates()
        self.log("messages")
        found |= self._message_rates()
        self.log("host")
        found |= self._host_seconds(found["node_latency_seconds"] * math.log2(self.world.world_size))
        self.log("steps of a few blocks")
        found["source"] = (
            f"measured by mmscale plan --calibrate on {self.world.world_size} ranks with "
            f"{torch.get_num_threads()} threads each; network: not measured"
        )
        found["memory_share"] = _ELEMENTWISE_SHARE
        slower = self._slower_in_steps(Accelerator.model_validate(found))
        return found | {name: min(1.0, found[name] / slower) for name in _COMPUTE_SHARES}

    @property
    def _experts(self) -> MoeConfig | None:
        mlp = self.model.decoder.mlp
        return mlp if isinstance(mlp, MoeConfig) else None

    @property
    def _rows(self) -> int:
        """Token rows of a microbatch, at most ``_MOST_ROWS``."""
        return min(_MOST_ROWS, self.steps[0][0].segments.total)

    def _memory_bytes(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.get_device_properties(self.device).total_memory)
        return max(1, free_host_memory() // self.world.world_size)

    def _seconds(self, run: Callable[[], object], repeats: int = _REPEATS) -> list[float]:
        """Return the seconds of each run after one warm-up. All ranks start each run together."""
        times = []
        for _ in range(repeats + 1):
            all_reduce_sum_list(self.world, [0.0])
            self._synchronise()
            start = self.now()
            run()
            self._synchronise()
            times.append(self.now() - start)
        return times[1:]

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _slowest(self, seconds: float) -> float:
        """Return the largest value of all ranks."""
        size, rank = self.world.world_size, self.world.rank
        return max(all_reduce_sum_list(self.world, [seconds * (rank == each) for each in range(size)]))

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype).mul_(0.05).requires_grad_()

    def _product_rates(self) -> tuple[float, float]:
        """Return operations per second of all linear layers, forward and backward, and those of the fastest one."""
        weights = build_weights(self.model)
        media = self.steps[0][0].media
        rows_of = {name: min(_MOST_ROWS, block.items.total) for name, block in media.items()}
        rows_of["vision"] = rows_of.pop(IMAGE, 0)
        # By part, not by rows: ranks have other rows, and each rank must measure equally often.
        shapes = Counter[tuple[str, int, int]]()
        for name, module in weights.named_modules():
            if isinstance(module, nn.Linear):
                part = name.partition(".")[0]
                shapes[(part if part in rows_of else "", module.in_features, module.out_features)] += 1
        flops = seconds = best = 0.0
        for (part, inner, outer), count in shapes.items():
            if rows := rows_of.get(part, self._rows):
                inputs, weight = self._random(rows, inner), self._random(outer, inner)
                once = self._slowest(
                    min(self._seconds(partial(_forward_backward, nn.functional.linear, inputs, weight)))
                )
                work = 6 * rows * inner * outer
                flops, seconds, best = flops + count * work, seconds + count * once, max(best, work / once)
        return (flops / seconds, best) if seconds else (1e9, 1e9)

    def _expert_rate(self) -> float:
        """Return operations per second of routed experts with balanced rows."""
        mlp, dim = self._experts, self.model.decoder.hidden_dim
        assert mlp is not None, "only called for a model with experts"
        local = mlp.num_experts // self.config.engine.expert_parallel
        experts = Experts(dim, local, mlp.experts_per_token, mlp.expert_dim, mlp.activation).to(self.device, self.dtype)
        each = max(1, self._rows * mlp.experts_per_token // local)
        rows, weights = self._random(each * local, dim), self._random(each * local)
        counts = torch.full((local,), each, device=self.device)
        once = min(self._seconds(partial(_forward_backward, experts, rows, weights, counts)))
        return 18 * each * local * dim * mlp.expert_dim / self._slowest(once)

    def _attention_rate(self) -> float:
        """Return operations per second of the attention of decoder and tower, without the masked half of causal one."""
        decoder, vision, batch = self.model.decoder, self.model.vision, self.steps[0][0]
        kinds = [(decoder.hidden_dim, decoder.attention, batch.segments, True, decoder.num_layers)]
        if vision is not None and vision.kind == "transformer":
            kinds.append((vision.hidden_dim, vision.attention, batch.media["image"].items, False, vision.num_layers))
        backend = resolve_backend(self.config.engine.attention, self.dtype)
        flops = seconds = 0.0
        for dim, attention, segments, causal, layers in kinds:
            on_device = Segments(segments.cu.to(self.device), segments.bounds)
            heads = (attention.num_heads, attention.kv_heads, attention.kv_heads)
            inputs = [self._random(segments.total, number, attention.resolved_head_dim(dim)) for number in heads]
            options = {"query_segments": on_device, "key_segments": on_device, "causal": causal, "backend": backend}
            once = self._slowest(min(self._seconds(partial(_forward_backward, varlen_attention, *inputs, **options))))
            pairs = num_pairs(segments, segments) / (2 if causal else 1)
            flops, seconds = flops + layers * 3 * attention.flops_per_pair(dim) * pairs, seconds + layers * once
        return flops / seconds

    def _memory_rates(self) -> dict[str, float]:
        source = torch.ones(_COPY_BYTES // 4, device=self.device)
        target = torch.empty_like(source)
        bandwidth = 2 * _COPY_BYTES / self._slowest(min(self._seconds(lambda: target.copy_(source))))
        parameter = nn.Parameter(torch.zeros(_ADAM_VALUES, device=self.device))
        parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.AdamW([parameter], fused=True)
        update = _ADAM_BYTES * _ADAM_VALUES / self._slowest(min(self._seconds(optimizer.step)))
        host, host_memory = bandwidth / 2, bandwidth
        if self.device.type == "cuda":
            pinned = torch.empty(_COPY_BYTES // 4, pin_memory=True)
            other = torch.empty_like(pinned)
            host = _COPY_BYTES / self._slowest(min(self._seconds(lambda: pinned.copy_(source, non_blocking=True))))
            host_memory = 2 * _COPY_BYTES / self._slowest(min(self._seconds(lambda: other.copy_(pinned))))
        return {
            "memory_bandwidth": bandwidth,
            "optimizer_share": min(1.0, update / bandwidth),
            "host_bandwidth": host,
            "host_memory_bandwidth": host_memory,
        }

    def _message_rates(self) -> dict[str, float]:
        """Return bandwidth and latency of the collectives of the ZeRO stage; those of a preset with one rank."""
        usual = PRESETS["h100"]() if self.device.type == "cuda" else None
        network, delay = (usual.network_bandwidth, usual.network_latency_seconds) if usual else (1e9, 200e-6)
        ranks = self.world.world_size
        found = {"link_share": 1.0, "network_bandwidth": network, "network_latency_seconds": delay}
        if ranks == 1:
            return {**found, "node_bandwidth": 1e9, "node_latency_seconds": 0.0}
        times = []
        for values in (_SMALL, _LARGE):
            whole = torch.ones(values, device=self.device)
            part = torch.ones(values // ranks, device=self.device)
            runs: list[Callable[[], object]] = [partial(torch_dist.all_reduce, whole)]
            if self.config.engine.zero_stage == 3:
                runs = [
                    partial(torch_dist.all_gather_into_tensor, whole[: len(part) * ranks], part),
                    partial(torch_dist.reduce_scatter_tensor, part, whole[: len(part) * ranks]),
                ]
            times.append(sum(self._slowest(min(self._seconds(run))) for run in runs) / len(runs))
        factor = 1 if self.config.engine.zero_stage == 3 else 2
        sent = factor * 4 * (_LARGE - _SMALL) * (ranks - 1) / ranks
        bandwidth = sent / max(1e-6, times[1] - times[0])
        return {**found, "node_bandwidth": bandwidth, "node_latency_seconds": times[0] / math.log2(ranks)}

    def _host_seconds(self, latency: float) -> dict[str, float]:
        """Return the host's time of a block and of a step: from two models whose computation takes no time."""
        times = []
        for blocks in (_FEW, _MANY):
            sizes = {"vocab_size": 64, "hidden_dim": 16, "num_layers": blocks, "attention": {"num_heads": 2}}
            model = ModelConfig.model_validate({"decoder": {**sizes, "mlp": {"kind": "dense", "hidden_dim": 16}}})
            document = example_document(self.config.data.prompts.transforms, MediaSpec(), [], 16)
            batch = collate([Pack((document,), 0)], MediaSpec())
            times.append(self._step_seconds(model, [[batch]], {"expert_parallel": 1}, train=("all",)))
        unit = (times[1] - times[0]) / (_MANY - _FEW)
        step = times[0] - (_FEW + 2) * unit
        messages = 2 * latency if self.device.type == "cpu" else 0.0  # Counted as traffic.
        return {"unit_seconds": max(0.0, unit - messages), "step_seconds": max(0.0, step)}

    def _slower_in_steps(self, device: Accelerator) -> float:
        """Return the time of computation in steps of the model with few blocks, divided by the planned one."""
        config = _shallow(self.config)
        model, steps = config.decoder_model(0), self._steps(config)
        measured = self._step_seconds(model, steps, {}, train=config.stages[0].train)
        counts, packs = Counter[str](), 0
        for batch in itertools.chain(*steps):
            counts.update(learned_counts(model, batch))
            packs += config.engine.micro_lanes
        mean = {name: count / packs for name, count in counts.items() if name != "passes"}
        load = StageLoad((mean,), 0.0, 0.0, None, None, None, True, "measured")
        lanes = packs // len(steps) * self.world.world_size
        config = config.model_copy(update={"data": config.data.model_copy(update={"lanes": lanes})})
        planned = step_time(config, 0, load, Cluster(1, self.world.world_size, device), self.precision.name)
        compute = planned.products + planned.attention + planned.memory_bound
        return max(_LEAST_RATIO, 1 + (measured - planned.seconds) / compute)

    def _step_seconds(
        self, model: ModelConfig, steps: list[list[MultimodalBatch]], engine: dict[str, Any], train: tuple[str, ...]
    ) -> float:
        """Return the median time of a step of an engine, which takes the microbatches of ``steps`` in turn."""
        config = self.config.engine.model_copy(update=engine)
        stage = self.config.stages[0].model_copy(update={"train": train, "learning_rate": {"default": 1e-6}})
        stage = stage.model_copy(
            update={"warmup_steps": 0, "clip": 1.0, "ema": None, "distill": (), "preference": None}
        )
        build = partial(build_model, model, attention=config.attention, seed=None, dtype=self.dtype)
        built = construct(build, config, self.world, partial(initialise_, seed=0))
        objective = choose_objective(model, stage, self.world, ())
        trained = Engine(built, objective, stage, config, self.world)
        on_device = [[replace(each.to(self.device), dropout_key=(0, 0)) for each in step] for step in steps]
        waiting = itertools.cycle(on_device)
        times = self._seconds(lambda: trained.train_step(next(waiting)), _STEPS)
        trained.close()
        return self._slowest(statistics.median(times[1:]))

    def _steps(self, config: RunConfig) -> list[list[MultimodalBatch]]:
        """Return at most two microbatches of each of the first steps of this rank."""
        data, spec = config.stage_data(0), config.stage_media(0)
        micro = config.engine.micro_lanes
        if has_data(data):
            rank, size = self.world.rank, self.world.world_size
            fewer = data.model_copy(update={"workers": 0})
            loader = Loader(fewer, spec, seed=config.seed, rank=rank, world_size=size, micro_lanes=micro)
            with closing(loader):
                return [list(step.microbatches)[:2] for step in itertools.islice(loader, _STEPS + 1)]
        document = max(example_documents(data, spec, ExampleDocument()), key=lambda each: each.cost(spec))
        limit = data.packing.max_documents or data.packing.max_tokens
        count = max(1, min(limit, data.packing.max_tokens // document.num_tokens))
        return [[collate([Pack((document,) * count, lane) for lane in range(micro)], spec)]]


def _forward_backward(run: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> None:
    output = run(*inputs, **options)
    output.backward(torch.ones_like(output))


def _shallow(config: RunConfig) -> RunConfig:
    """Return the run with the fewest blocks that still have every kind of block."""
    for tries in _fewer_blocks(config.decoder_model(0)):
        try:
            model = ModelConfig.model_validate(tries)
            stage = config.stages[0].model_copy(update={"model": None})
            return config.model_copy(update={"model": model, "stages": (stage,)})
        except (ValidationError, ConfigError):  # For example feature_layers that name a later block.
            continue
    return config


def _fewer_blocks(model: ModelConfig) -> Iterable[dict[str, Any]]:
    """Yield smaller models: with few blocks in decoder and tower, then in the decoder alone."""
    values = model.model_dump()
    every = [2, values["decoder"]["mlp"].get("every", 1) + values["decoder"]["mlp"].get("dense_first", 0)]
    every.append((values.get("connector") or {}).get("every") or 1)
    blocks = min(model.decoder.num_layers, max(every))
    fewer = {**values, "decoder": {**values["decoder"], "num_layers": blocks}}
    if values.get("vision") and "num_layers" in values["vision"]:
        yield {**fewer, "vision": {**values["vision"], "num_layers": min(2, values["vision"]["num_layers"])}}
    yield fewer
