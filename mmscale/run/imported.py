"""Import a Hugging Face folder as a run folder that works at once: weights, files and configuration.

    RUN/checkpoints/step-00000000    the weights
    RUN/hf_files/                    tokenizer and processor files, with their checksums
    RUN/config.yaml                  model, tokenizer, template, transforms, video and audio

``mmscale generate``, ``chat`` and ``eval`` read the folder, and a run that trains the model names it as its ``base``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_pipeline.io.atomic import write_whole
from data_pipeline.io.strict import first_fault
from mmscale.checkpoint.imports import DescribedFolder, HfImportReport, import_weights
from mmscale.config import to_yaml
from mmscale.errors import CheckpointError
from mmscale.hf.kept_files import HF_FILES, keep_files
from mmscale.run.config import RunConfig
from mmscale.run.folder import CHECKPOINTS, CONFIG, hold_folder

_MOST_TOKENS = 8192
"""Largest ``data.packing.max_tokens`` of an imported model. The whole context of a model may need too much memory."""


@dataclass(frozen=True)
class ImportedRun:
    """Result of ``import_run``.

    Attributes:
        report: Result of the import of the weights.
        config: The configuration file.
        is_whole: Whether the file is the configuration of a run. A vision tower or a folder without a tokenizer gives
            blocks of one.
    """

    report: HfImportReport
    config: Path
    is_whole: bool


def import_run(source: Path, run: Path) -> ImportedRun:
    """Write a run folder from a Hugging Face folder. Checks the configuration before it copies the weights.

    Raises:
        CheckpointError: see ``import_folder``. Also if ``run`` already has a configuration, or the folder's values are
            no valid configuration.
        LaunchError: another process works in ``run``.
    """
    config = run / CONFIG
    if config.exists():
        raise CheckpointError(f"{config} already exists: {run} holds another run; import into a new folder")
    with hold_folder(run):
        described = DescribedFolder.read(source)
        values = _values(described, run)
        is_whole = described.data.tokenizer is not None
        if is_whole:
            try:
                RunConfig.model_validate(values)
            except ValidationError as error:
                raise CheckpointError(f"{source}: no configuration for it: {first_fault(error, values)}") from error
        report = import_weights(described, run / CHECKPOINTS)
        keep_files(source, run, map(Path, report.beside))
        head = (
            f"# The {report.family} model that was imported from {report.source}\n"
            "# To train it, write a file that begins with `base:` and the path of this folder.\n"
        )
        write_whole(config, (head + to_yaml(values)).encode())
    return ImportedRun(report, config, is_whole)


def _values(described: DescribedFolder, run: Path) -> dict[str, Any]:
    """Return the configuration, or the blocks that are known."""
    model, data = described.config.model_dump(mode="json"), described.data
    blocks = {name: getattr(data, name) for name in ("template", "transforms", "video", "audio")}
    known: dict[str, Any] = {name: block for name, block in blocks.items() if block is not None}
    if data.tokenizer is None:
        return {"model": model, "data": known}
    tokenizer = {**data.tokenizer, "path": str(run / HF_FILES / Path(data.tokenizer["path"]).name)}
    packing: dict[str, Any] = {"max_tokens": min(data.context or _MOST_TOKENS, _MOST_TOKENS)}
    if model["decoder"]["learned_positions"] is not None:
        packing |= {"max_tokens": _MOST_TOKENS, "too_long": "truncate"}
    return {
        "run_dir": str(run),
        "model": model,
        "data": {"tokenizer": tokenizer, **known, "datasets": [], "lanes": 1, "packing": packing},
        "stages": [],
    }
