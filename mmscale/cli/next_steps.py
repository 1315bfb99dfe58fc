"""The commands that a user may want after a finished run: only those that its model and its data allow."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_pipeline.config import DataConfig
    from mmscale.run.config import RunConfig


def next_steps(config: RunConfig) -> list[tuple[str, str]]:
    """Return (command, what it does) for a finished run, in the order of use.

    Every command can be pasted into a shell.
    """
    from data_pipeline.text.templates import DialogueTemplate
    from mmscale.errors import CheckpointError
    from mmscale.hf.layouts import layout_for
    from mmscale.models.config import ModelConfig
    from mmscale.report.captions import IMAGES_FOLDER

    stage = max(number for number, _ in config.stages_from(0))
    model, data, run = config.stage_model(stage), config.evaluation_data(stage), shlex.quote(str(config.run_dir))
    steps = []
    if model.predicts_tokens:
        image = config.run_dir / IMAGES_FOLDER / "0000.png"
        if model.vision is not None and image.is_file():
            steps.append((f"mmscale generate {run} --image {shlex.quote(str(image))}", "answer about an image"))
        elif model.vision is None:
            steps.append((f"mmscale generate {run} --prompt 'Once'", "continue a text"))
        steps += _questions(config, data)
        if any(isinstance(dataset.template.branch_template, DialogueTemplate) for dataset in data.datasets):
            steps.append((f"mmscale chat {run}", "talk with the model"))
    drawings = config.evaluation.drawings
    if drawings is not None and drawings.prompts and isinstance(model, ModelConfig) and model.decoder.image_ids:
        words = [run, "--prompt", shlex.quote(drawings.prompts[0]), "--images", "4"]
        words += [] if drawings.size is None else ["--size", str(drawings.size)]
        words += [] if drawings.guidance == 1 else ["--guidance", f"{drawings.guidance:g}"]
        words += [] if drawings.tokenizer is None else ["--tokenizer", shlex.quote(str(drawings.tokenizer))]
        words += ["--output", shlex.quote(str(config.run_dir / "drawn"))]
        steps.append((f"mmscale generate {' '.join(words)}", "draw"))
    if config.evaluation.sets:
        steps.append((f"mmscale eval {run}", "score the held-out sets again"))
    export = f"mmscale checkpoint export {run} {shlex.quote(f'{config.run_dir}-exported')}"
    try:
        layout_for(model.model_copy(update={"adapters": None}))  # An export merges them.
    except CheckpointError:
        steps.append((export, "write the weights as safetensors"))
    else:
        steps.append((f"{export} --to hf", "write a folder that transformers loads"))
    return [*steps, (f"mmscale report {run}", f"write {config.run_dir / 'report.html'} again")]


def _questions(config: RunConfig, data: DataConfig) -> list[tuple[str, str]]:
    """Return a question about a video and one about a sound, as the held-out sets ask them."""
    from mmscale.evaluate.config import GenerationSet
    from mmscale.report.answers import asked_file

    names = [held.name for held in config.evaluation.sets if isinstance(held, GenerationSet)]
    found = []
    for kind, what in (("video", "a video"), ("audio", "a sound")):
        asked = next(filter(None, (asked_file(config.run_dir, name, kind) for name in names)), None)
        if asked is not None and getattr(data.prompts, kind) is not None:  # Otherwise, `generate` cannot read it.
            prompt, path = asked
            words = [str(config.run_dir), f"--{kind}", str(path), *(["--prompt", prompt] if prompt is not None else [])]
            found.append((f"mmscale generate {shlex.join(words)}", f"answer about {what}"))
    return found


def format_next_steps(steps: list[tuple[str, str]]) -> str:
    """Return the lines for the terminal: each command on its own line, with what it does above it."""
    return "\n".join(["What next:", *(f"  # {what}\n  {command}" for command, what in steps)])
