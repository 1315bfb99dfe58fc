"""``mmscale plan``: memory, time and cost of a run on a cluster, before it starts."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mmscale.cli.console import console, emit, print_table

if TYPE_CHECKING:
    from mmscale.plan.plan import Plan, StagePlan
    from mmscale.run.config import RunConfig

app = typer.Typer()

_GIB = 1 << 30
_UNFIT = 1
"""Exit code of a run that does not fit."""


def _size(text: str | None) -> tuple[int, int] | None:
    """Return (width, height) of ``1024x768``."""
    if text is None:
        return None
    if not (match := re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)):
        raise typer.BadParameter(f"{text!r}: expected WIDTHxHEIGHT in pixels, for example 1024x768")
    return int(match[1]), int(match[2])


@app.command(epilog="Example: mmscale plan configs/recipes/mm1.5-7b.yaml --nodes 8 --gpus-per-node 8 --gpu h100")
def plan(
    config: Path = typer.Argument(help="A run's YAML file.", metavar="CONFIG"),
    overrides: list[str] = typer.Argument(
        None, help="Values that override the file's, for example engine.micro_lanes=2.", metavar="[KEY=VALUE]..."
    ),
    nodes: int = typer.Option(1, "--nodes", min=1, max=1 << 14, help="Nodes."),
    gpus_per_node: int = typer.Option(
        8, "--gpus-per-node", min=1, max=1024, help="GPUs of a node, or processes of a node with --gpu cpu."
    ),
    gpu: str | None = typer.Option(
        None,
        "--gpu",
        help="a100, h100 (the default), h200, b200, cpu or cuda (this machine), or a YAML file.",
    ),
    price: float | None = typer.Option(None, "--price", min=0, help="Price of a GPU for an hour."),
    gpu_hours_per_failure: float | None = typer.Option(
        None,
        "--gpu-hours-per-failure",
        min=0.001,
        help="GPU hours between failures; by default as for Llama 3: 50,700.",
    ),
    restart_minutes: float = typer.Option(
        10.0, "--restart-minutes", min=0, help="Minutes from a failure to the next step."
    ),
    write_gb: float | None = typer.Option(
        None, "--write-gb-per-second", min=0.001, help="GB/s that all nodes write to storage; by default 2 a node."
    ),
    document_tokens: int | None = typer.Option(
        None, "--document-tokens", min=1, help="Assume documents of this many text tokens instead of the data."
    ),
    image_size: str | None = typer.Option(
        None, "--image-size", help="Assume images of this size, WIDTHxHEIGHT, instead of the data.", metavar="SIZE"
    ),
    calibrate: bool = typer.Option(
        False,
        "--calibrate",
        help="Measure this machine with the model of CONFIG on --gpus-per-node processes, for later plans with "
        "--gpu cpu or cuda. --gpu FILE writes this YAML file instead.",
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Plan a run: does it fit, how fast is it, what does it cost, and what would help.

    Exit code 0: the run fits the cluster. 1: it does not; the output names the number that is too large. 2: wrong use.
    """
    from mmscale.cli.run_file import load_run
    from mmscale.plan.checkpoints import Failures
    from mmscale.plan.cluster import read_cluster
    from mmscale.plan.load import ExampleDocument
    from mmscale.plan.plan import Assumptions, make_plan

    size = _size(image_size)
    loaded = load_run(config, overrides or [])
    if calibrate:
        emit(_calibrate(loaded.value, gpu, gpus_per_node), json=json)
        return
    cluster = read_cluster(gpu or "h100", nodes, gpus_per_node, price)
    example = None
    if document_tokens is not None or size is not None:
        width, height = size or (None, None)
        example = ExampleDocument(document_tokens, height, width)
    failures = Failures(restart_seconds=60 * restart_minutes)
    if gpu_hours_per_failure is not None:
        failures = Failures(gpu_hours_per_failure, 60 * restart_minutes)
    written = None if write_gb is None else 1e9 * write_gb
    found = make_plan(loaded.value, cluster, Assumptions(example, failures, written))
    if json:
        emit(found.to_json(), json=True)
    else:
        _print(found)
    if not found.fits:
        raise typer.Exit(_UNFIT)


def _calibrate(run: RunConfig, file: str | None, ranks: int) -> dict[str, Any]:
    """Measure this machine, and write ``file`` or the file of this machine. Return the rates."""
    from mmscale.dist import device_type
    from mmscale.plan.calibrate import calibrate
    from mmscale.plan.cluster import calibrated_file, is_file

    if file is not None and not is_file(file):
        raise typer.BadParameter(
            f"{file!r}: --calibrate measures this machine; leave it out, or give the YAML file to write",
            param_hint="--gpu",
        )
    path = calibrated_file(device_type(run.engine.device), ranks) if file is None else Path(file)
    device = calibrate(run, ranks, path, console.print)
    return {"file": str(path), **device.model_dump(exclude_none=True)}


def _print(plan: Plan) -> None:
    """Print the stages, the memory of the largest one, the time of the longest one, and the program."""
    print_table([_stage_row(stage) for stage in plan.stages])
    print()
    memory, capacity = plan.largest.memory, plan.cluster.accelerator.memory_bytes
    heading = f"memory of a rank in {plan.largest.name} ({memory.moment})"
    rows = [{heading: name, "GiB": size / _GIB} for name, size in memory.parts.items()]
    rows += [
        {heading: "overhead (context, NCCL)", "GiB": memory.overhead_bytes / _GIB},
        {heading: "sum", "GiB": plan.largest.rank_bytes / _GIB},
        {heading: f"{plan.cluster.accelerator.name} has", "GiB": capacity / _GIB},
        {heading: "activations with recomputation", "GiB": memory.activations_with_checkpointing / _GIB},
        {heading: "activations without recomputation", "GiB": memory.activations_without_checkpointing / _GIB},
    ]
    print_table([*rows, *([{heading: "host", "GiB": memory.host_bytes / _GIB}] if memory.host_bytes else [])])
    print()
    longest = max(plan.stages, key=lambda stage: stage.steps * stage.time.seconds)
    print_table(
        [
            {f"seconds of a step in {longest.name}": name.replace("_", " "), "s": seconds}
            for name, seconds in (*longest.time.parts().items(), ("sum", longest.time.seconds))
        ]
    )
    print()
    for name, text in _program(plan).items():
        print(f"{name:<22}{text}")
    for limit in plan.limits:
        print(f"does not fit: {limit}")


def _stage_row(stage: StagePlan) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "steps": stage.steps,
        "tokens a step": round(stage.step_tokens),
        "s a step": stage.time.seconds,
        "days": stage.steps * stage.time.seconds / 86_400,
        "GiB a rank": stage.rank_bytes / _GIB,
        "work": stage.load.source,
    }


def _program(plan: Plan) -> dict[str, str]:
    """Return the lines about the whole program."""
    saved, data = plan.checkpoint, plan.to_json()
    read = data["storage"]["bytes_per_second"]
    shards = [stage.load.shards for stage in plan.stages]
    lines = {
        "cluster": f"{plan.cluster.describe()}, {plan.precision}; {plan.cluster.accelerator.source}",
        "speed": f"{plan.tokens_per_second:,.0f} tokens/s, {plan.tokens_per_second / plan.cluster.ranks:,.0f} a GPU, "
        f"{plan.mfu:.1%} of the peak",
        "program": f"{plan.days:,.1f} days, {plan.gpu_hours:,.0f} GPU hours, goodput {saved.goodput:.1%}"
        if math.isfinite(plan.days)
        else "does not end: failures come faster than checkpoints",
        "cost": "give --price" if plan.cost is None else f"{plan.cost:,.0f}",
        "checkpoint": f"{saved.bytes / 1e9:,.1f} GB every {saved.every_steps:,} steps (checkpoint.every_steps); a save "
        f"stops training for {saved.save_seconds:.1f} s; a failure every {saved.mean_hours:,.1f} h",
        "storage": "unknown: the manifests of the data are not on this machine"
        if read is None
        else f"{read / 1e6:,.1f} MB/s from {sum(n or 0 for n in shards):,} shards, "
        f"{data['storage']['write_bytes_per_second'] / 1e6:,.1f} MB/s of checkpoints",
        "smallest cluster": "none that this configuration allows"
        if plan.smallest is None
        else plan.smallest.describe(),
    }
    if not plan.knobs:
        lines["what would help"] = "no single key that was tried"
    for number, knob in enumerate(plan.knobs):
        fits = "" if knob.fits else ", still too large"
        lines["what would help" if number == 0 else "  or"] = (
            f"{knob.change}: {knob.speedup:.2f} times the speed, {knob.per_rank_bytes / _GIB:.1f} GiB a rank{fits}"
        )
    return lines
