"""``mmscale checkpoint``: list, verify, export, import and prune checkpoints."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mmscale.cli.checkpoint_peft import export_peft, import_peft
from mmscale.cli.console import console, emit, print_table

if TYPE_CHECKING:
    from mmscale.checkpoint.imports import ImportTarget
    from mmscale.prune import PruneReport

app = typer.Typer()

_FOLDER = typer.Argument(help="A run folder, its checkpoints folder, or one checkpoint.", metavar="PATH")
_JSON = typer.Option(False, "--json", help="Print one JSON object.")


class Weights(str, Enum):
    """Values of ``--weights``."""

    master = "master"
    ema = "ema"


class NumberFormat(str, Enum):
    """Values of ``--format``."""

    fp32 = "fp32"
    bf16 = "bf16"


class ImportFormat(str, Enum):
    """Values of ``--from``."""

    deepspeed = "deepspeed"
    hf = "hf"
    peft = "peft"


class ExportFormat(str, Enum):
    """Values of ``--to``."""

    mmscale = "mmscale"
    hf = "hf"
    peft = "peft"


@app.command("list", epilog="Example: mmscale checkpoint list runs/quickstart")
def list_(path: Path = _FOLDER, json: bool = _JSON) -> None:
    """List checkpoints, oldest first: step, stage, ranks, size, age, and whether all files are complete.

    A run resumes from the newest complete one ("newest_whole"), and keeps the one with the best held-out value ("best")
    if evaluation.best is set. Damaged checkpoints that a run has set aside (step-N.damaged) come last.
    """
    from mmscale.checkpoint.manifest import (
        MANIFEST,
        best_step,
        checkpoints_of,
        list_set_aside,
        missing_or_truncated,
        read_manifest,
    )
    from mmscale.errors import CheckpointError

    rows: list[dict[str, object]] = []
    folders = checkpoints_of(path)
    best: int | None = None
    for folder in folders:
        try:
            manifest = read_manifest(folder)
        except CheckpointError as error:
            rows.append({"name": folder.name, "whole": False, "problem": str(error)})
            continue
        problem = missing_or_truncated(folder, manifest)
        if problem is None:
            best = best_step(manifest.state.extra)
        row = {
            "name": folder.name,
            "step": manifest.state.step,
            "stage": manifest.stage,
            "stage_step": manifest.state.stage_step,
            "world_size": manifest.world_size,
            "zero_stage": manifest.zero_stage,
            "precision": manifest.precision,
            "bytes": sum(entry.bytes for entry in manifest.files.values()),
            "age_seconds": round(time.time() - (folder / MANIFEST).stat().st_mtime),
            "whole": problem is None,
        }
        if manifest.bases:
            row["frozen_weights_in"] = ", ".join(base.path for base in manifest.bases)
        rows.append(row if problem is None else row | {"problem": problem})
    whole = [row for row in rows if row["whole"]]
    for row in rows:
        row["newest_whole"] = row is (whole[-1] if whole else None)
        row["best"] = best is not None and row.get("step") == best
    if folders != [path]:
        rows += [
            {
                "name": folder.name,
                "whole": False,
                "set_aside": True,
                "problem": f"rejected by a run; find the reason with `mmscale checkpoint verify {folder}`",
            }
            for folder in list_set_aside(folders[0].parent)
        ]
    if json:
        emit({"checkpoints": rows}, json=True)
        return
    _print_checkpoints(rows)


def _print_checkpoints(rows: list[dict[str, Any]]) -> None:
    from mmscale.metrics.format import format_count, format_seconds

    print_table(
        [
            {
                "name": row["name"],
                "stage": row.get("stage"),
                "ranks": row.get("world_size"),
                "ZeRO": row.get("zero_stage"),
                "precision": row.get("precision"),
                "size": f"{format_count(row['bytes'])}B" if "bytes" in row else None,
                "age": format_seconds(row["age_seconds"]) if "age_seconds" in row else None,
                "state": row.get("problem") or ", ".join(["whole", *_marks(row)]),
            }
            | ({"frozen weights in": row["frozen_weights_in"]} if "frozen_weights_in" in row else {})
            for row in rows
        ]
    )


def _marks(row: dict[str, Any]) -> list[str]:
    return ["the newest"] * row["newest_whole"] + ["the best"] * row["best"]


@app.command(epilog="Example: mmscale checkpoint verify runs/quickstart")
def verify(path: Path = _FOLDER, json: bool = _JSON) -> None:
    """Verify every byte of checkpoints. Exit code 1 if one is damaged.

    Checks sizes and checksums, that headers and manifest agree, that no value is NaN or infinite, and that the ranks'
    shards cover each parameter. A checkpoint that was set aside is read only if PATH names it.
    """
    from mmscale.checkpoint.manifest import checkpoints_of
    from mmscale.checkpoint.reshard import verify as find_problems
    from mmscale.cli.console import progress

    folders = checkpoints_of(path)
    results: dict[str, list[str]] = {}
    with progress("verify", total=len(folders)) as meter:
        for folder in folders:
            results[folder.name] = find_problems(folder)
            meter.advance(note=folder.name)
    if json:
        emit({"checkpoints": results}, json=True)
    else:
        emit({name: "; ".join(problems) or "good" for name, problems in results.items()})
    bad = [name for name, problems in results.items() if problems]
    if bad:
        console.print(f"{len(bad)} of {len(results)} checkpoints are damaged: {', '.join(bad)}", style="red")
        console.print("a run resumes from an older, good one with checkpoint.on_damage=previous", highlight=False)
        raise typer.Exit(1)


@app.command(epilog="Example: mmscale checkpoint export runs/quickstart exported")
def export(
    path: Path = _FOLDER,
    folder: Path = typer.Argument(help="New folder for the files.", metavar="FOLDER"),
    weights: Weights = typer.Option(Weights.master, help="The trained weights, or their moving average (EMA)."),
    number_format: NumberFormat = typer.Option(
        NumberFormat.fp32, "--format", help="Number format of the parameters; fp32 is exact."
    ),
    shard_bytes: int = typer.Option(5_000_000_000, min=1, help="Largest size of a file, bytes."),
    to: ExportFormat = typer.Option(
        ExportFormat.mmscale,
        help="Parameter names and configuration of mmscale, those that transformers loads (hf), or the adapters alone "
        "for peft.",
    ),
    merge: bool = typer.Option(
        True, "--merge/--no-merge", help="Merge adapters into the weights; --no-merge keeps both, with mmscale's names."
    ),
    like: Path | None = typer.Option(
        None,
        help="With --to hf or peft: a Hugging Face folder that gives model family and token ids, with hf also "
        "tokenizer and processor; by default the folder that the run's model was imported from.",
    ),
    stacked_experts: bool = typer.Option(
        False,
        "--stacked-experts",
        help="With --to hf: write one tensor for all experts of a layer, as version 5 of transformers has them in "
        "memory, instead of one for each expert, as published folders have them.",
    ),
    push: str | None = typer.Option(
        None, metavar="ORG/NAME", help="With --to hf: upload FOLDER to the hub; a new repository is private."
    ),
    json: bool = _JSON,
) -> None:
    """Export the unsharded weights as safetensors files with an index that Hugging Face's tools read.

    Exports the newest complete checkpoint of PATH, or the one that PATH names, after verifying every byte.
    """
    from mmscale.checkpoint.export import HuggingFace, export_weights
    from mmscale.checkpoint.manifest import newest_of
    from mmscale.cli.trained import imported_files, own_tokenizer
    from mmscale.errors import ConfigError
    from mmscale.hf.hub import check_name, push_folder

    if like is not None and to is ExportFormat.mmscale:
        raise ConfigError("--like goes with --to hf and --to peft")
    if to is not ExportFormat.hf and (push is not None or stacked_experts):
        raise ConfigError(f"{'--stacked-experts' if push is None else '--push'} goes with --to hf")
    if not merge and to is not ExportFormat.mmscale:
        raise ConfigError("--no-merge goes with mmscale's own names; --to peft exports the adapters alone")
    if push is not None:
        check_name(push)
    if like is None and to is not ExportFormat.mmscale:
        like = imported_files(path)
    if to is ExportFormat.peft:
        export_peft(newest_of(path), folder, weights.value, number_format.value, like, json=json)
        return
    with tempfile.TemporaryDirectory() as temporary:
        files = own_tokenizer(path, Path(temporary)) if to is ExportFormat.hf and like is None else ()
        report = export_weights(
            newest_of(path),
            folder,
            weights=weights.value,
            number_format=number_format.value,
            shard_bytes=shard_bytes,
            to=HuggingFace(like, files, stacked_experts) if to is ExportFormat.hf else None,
            merge=merge,
        )
    pushed = {} if push is None else {"pushed": push_folder(folder, push, _say)}
    emit({**asdict(report), **pushed}, json=json)


@app.command("import", epilog="Example: mmscale checkpoint import old/global_step40 runs/new --config runs/new.yaml")
def import_(
    source: str = typer.Argument(
        help="A DeepSpeed checkpoint (ZeRO stage 0-3, or universal), a Hugging Face folder, hf://ORG/NAME for a model "
        "on the hub, or adapters of peft.",
        metavar="SOURCE",
    ),
    run: Path = typer.Argument(help="A run folder; the checkpoint is added to its checkpoints.", metavar="RUN"),
    source_format: ImportFormat = typer.Option(ImportFormat.deepspeed, "--from", help="Format of SOURCE."),
    config: Path | None = typer.Option(
        None, help="YAML file of the run that will resume; names, shapes and stage are checked against it."
    ),
    stage: str | None = typer.Option(None, help="Name of the stage, if several of CONFIG train the same parameters."),
    rename: list[str] = typer.Option(
        [],
        help="Replace the prefix OLD of parameter names by NEW; repeatable.",
        metavar="OLD=NEW",
    ),
    base: Path | None = typer.Option(None, help="With --from peft: run or checkpoint of the model without adapters."),
    revision: str | None = typer.Option(None, help="With hf://ORG/NAME: branch, tag or commit."),
    json: bool = _JSON,
) -> None:
    """Import a DeepSpeed or Hugging Face checkpoint as a checkpoint of mmscale.

    From DeepSpeed: weights, moments, step counts, frozen weights and buffers. The output lists the values that the
    files do not contain (the position in the data, random state) or that are not imported. With --config the run can
    resume from the checkpoint; without it only its weights can be used.

    From Hugging Face (--from hf): the weights, the files of tokenizer and processor, and RUN/config.yaml with model,
    tokenizer, chat format and transforms. RUN works with generate, chat and eval, and as the base of a run.

    From peft (--from peft --base BASE): adapters of the model in BASE. The checkpoint names BASE for all other weights.
    """
    from mmscale.checkpoint.imports import import_checkpoint
    from mmscale.errors import ConfigError
    from mmscale.run.folder import CHECKPOINTS, hold_folder

    if (base is None) == (source_format is ImportFormat.peft):
        raise ConfigError("--base goes with --from peft, which needs it: a run or checkpoint of the base model")
    is_hf = source_format is ImportFormat.hf or source.startswith("hf://")
    if (is_hf or base is not None) and (config is not None or stage is not None or rename):
        raise ConfigError("--config, --stage and --rename are for DeepSpeed's checkpoints, not for --from hf or peft")
    if base is not None:
        if revision is not None:
            raise ConfigError("--revision goes with a model on the hub, hf://ORG/NAME")
        import_peft(Path(source), base, run, json=json)
        return
    if is_hf:
        _import_hf(source, revision, run, json)
        return
    if revision is not None:
        raise ConfigError("--revision is for a model on the hub, hf://ORG/NAME")
    if wrong := [rule for rule in rename if "=" not in rule]:
        raise ConfigError(f"--rename {wrong[0]}: expected OLD=NEW, for example --rename net.=")
    renames = dict(rule.split("=", 1) for rule in rename)
    target = None if config is None else _import_target(config, stage)
    with hold_folder(run):
        report = import_checkpoint(Path(source), run / CHECKPOINTS, target, renames=renames or None, stage=stage)
    emit(asdict(report), json=json)


def _say(sentence: str) -> None:
    console.print(sentence, markup=False)


def _import_hf(source: str, revision: str | None, run: Path, json: bool) -> None:
    """Import a Hugging Face folder and print what RUN is good for."""
    from mmscale.cli.console import warn
    from mmscale.hf.hub import local_folder
    from mmscale.run.imported import import_run

    done = import_run(local_folder(source, revision, _say), run)
    report = done.report
    warn(report.data.notes)
    if json:
        emit({**asdict(report), "config": str(done.config)}, json=True)
        return
    emit(
        {
            "family": report.family,
            "parameters": report.parameters,
            "precision": report.precision,
            "checkpoint": report.checkpoint,
            "config": str(done.config),
            "left_out": list(report.left_out),
        }
    )
    if done.is_whole and report.model["connector"] is not None and report.model["connector"]["kind"] == "contrastive":
        console.print(f"next: in a run file `base: {run}`, and mmscale eval with it", markup=False)
    elif done.is_whole:
        console.print(
            f"next: mmscale chat {run}   or, to train it, a run file that begins with `base: {run}`", markup=False
        )
    else:
        block = f"base: {run}" if "decoder" in report.model else f"vision: {{base: {run}}}"
        console.print(f"next: in a run file `model: {{{block}}}`, with weights from {run}", markup=False)


def _import_target(config: Path, stage: str | None) -> ImportTarget:
    """Return the run that the checkpoint is for: its model, on the meta device, and its stages.

    Raises:
        ConfigError: ``stage`` is None and the stages have different models. An unknown name is not checked here.
    """

    from mmscale.checkpoint.imports import ImportTarget
    from mmscale.config import load
    from mmscale.errors import ConfigError
    from mmscale.models.build import build_weights
    from mmscale.run.config import RunConfig

    run = load(config, [], RunConfig).value
    models = [run.stage_model(number) for number, each in enumerate(run.stages) if stage in (None, each.name)]
    if any(model != models[0] for model in models):
        raise ConfigError(f"{config}: its stages have different models; choose the stage that resumes with --stage")
    return ImportTarget(build_weights(models[0] if models else run.model), run.stages)


@app.command(
    epilog="Example: mmscale checkpoint prune runs/llama3.1-8b configs/models/llama3.2-1b.yaml runs/llama3.1-8b-pruned"
)
def prune(
    source: Path = typer.Argument(help="A run folder, or one checkpoint.", metavar="SOURCE"),
    model: Path = typer.Argument(help="YAML file of the smaller model (decoder:), or of a run of it.", metavar="MODEL"),
    run: Path = typer.Argument(help="A run folder; the checkpoint is added to its checkpoints.", metavar="RUN"),
    data: Path | None = typer.Option(
        None,
        help="YAML file of a run. Importance is measured on its data; its held-out document sets are scored before and "
        "after.",
    ),
    batches: int = typer.Option(
        64, min=1, help="With --data: number of calibration batches, each one pack of one lane."
    ),
    json: bool = _JSON,
) -> None:
    """Prune a decoder to a smaller one: fewer blocks, channels, heads, neurons.

    The most important parts are kept. Importance is measured by activations with --data, else by the weights alone. The
    result has weights only, for use as initial weights of a stage (stages.N.weights).
    """
    from mmscale.cli.run_file import load_run
    from mmscale.config import load_tree
    from mmscale.config.layers import read_layers
    from mmscale.models.config import ModelConfig
    from mmscale.prune import Calibration, prune_checkpoint
    from mmscale.run.folder import CHECKPOINTS, hold_folder

    root = read_layers(model)
    target = load_tree(root.child("model") or root, ModelConfig, str(model))  # A run's file has it under "model".
    calibration = None if data is None else Calibration(load_run(data, []).value, batches)
    with hold_folder(run):
        report = prune_checkpoint(source, target, run / CHECKPOINTS, calibration)
    if json:
        emit(asdict(report), json=True)
    else:
        _print_prune_report(report)


def _print_prune_report(report: PruneReport) -> None:
    """Print a table of sizes and losses, then the other values."""
    values = {axis: (size, report.after[axis]) for axis, size in report.before.items()}
    values["parameters"] = (report.parameters_before, report.parameters_after)
    losses = {f"loss on {name}": (loss, report.losses_after[name]) for name, loss in report.losses_before.items()}
    print_table([{"": name, "source": a, "result": b} for name, (a, b) in {**values, **losses}.items()])
    others = ("checkpoint", "source", "importance", "tokens", "blocks", "left_out")
    emit({name: getattr(report, name) for name in others})
