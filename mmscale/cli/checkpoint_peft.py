"""``mmscale checkpoint export --to peft`` and ``import --from peft``."""

from __future__ import annotations

import os
from dataclasses import asdict
from json import dumps
from pathlib import Path

from mmscale.cli.console import emit


def export_peft(
    checkpoint: Path, folder: Path, weights: str, number_format: str, like: Path | None, *, json: bool
) -> None:
    """Write the adapters of a checkpoint into a folder for peft, and print the report."""
    import torch

    from mmscale.checkpoint.peft_folder import export_adapters

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[number_format]
    emit(asdict(export_adapters(checkpoint, folder, ema=weights == "ema", dtype=dtype, like=like)), json=json)


def import_peft(source: Path, base: Path, run: Path, *, json: bool) -> None:
    """Import adapters of peft as a checkpoint of ``run``, and print the report.

    Also write ``run/config.yaml`` if ``base`` belongs to a run with one and ``run`` has none.
    """
    from data_pipeline.io.atomic import write_whole
    from mmscale.checkpoint.manifest import newest_of
    from mmscale.checkpoint.peft_folder import import_adapters
    from mmscale.run.folder import CHECKPOINTS, CONFIG, hold_folder

    newest = newest_of(base)
    with hold_folder(run):
        report = import_adapters(source, newest, run / CHECKPOINTS)
        owner = newest.absolute().parent.parent
        if (owner / CONFIG).is_file() and not (run / CONFIG).exists():
            values = {"base": os.path.relpath(owner, run), "run_dir": str(run), "model": {"adapters": report.adapters}}
            lines = (f"{key}: {dumps(value)}\n" for key, value in values.items())  # A JSON value is also YAML.
            write_whole(run / CONFIG, "".join(lines).encode())
    emit(asdict(report), json=json)
