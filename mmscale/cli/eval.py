"""``mmscale eval``: held-out scores of a trained model."""

from __future__ import annotations

from pathlib import Path

import typer

from mmscale.cli.console import console, emit, print_table

app = typer.Typer()

_CONFIG = typer.Argument(
    help="A run folder, one of its checkpoints, or a run's YAML file, whose run_dir holds the checkpoints.",
    metavar="CONFIG",
)
_OVERRIDES = typer.Argument(None, help="Values that override the file's.", metavar="[KEY=VALUE]...")


@app.command("eval", epilog="Example: mmscale eval configs/quickstart.yaml run_dir=runs/first")
def evaluate_run(
    config: Path = _CONFIG,
    overrides: list[str] = _OVERRIDES,
    json: bool = typer.Option(False, "--json", help="Print one JSON object: checkpoint, and scores by held-out set."),
) -> None:
    """Score a trained model on held-out samples.

    Loads the given or the newest checkpoint of the run and scores the sets of its evaluation block: answers to images
    with a control (images permuted among the samples), multiple-choice questions, perplexity of documents, and
    generated answers, which it writes to RUN/answers.
    """
    from dataclasses import asdict

    from mmscale.cli.trained import load_trained, open_run
    from mmscale.config import load
    from mmscale.errors import ConfigError
    from mmscale.evaluate import evaluate, unanswerable_sets
    from mmscale.evaluate.result import ANSWERS_FOLDER, GenerationResult
    from mmscale.run.config import RunConfig
    from mmscale.run.folder import CONFIG

    checkpoint = None
    if config.is_dir() and not (config / CONFIG).is_file() and (config.parent.parent / CONFIG).is_file():
        checkpoint, config = config, config.parent.parent
    is_folder = (config / CONFIG).is_file()
    run = (open_run(config, overrides or ()) if is_folder else load(config, overrides or [], RunConfig)).value
    if not run.evaluation.sets:
        raise ConfigError(f"{config}: evaluation.sets is empty: there is nothing to score")
    trained = load_trained(run, checkpoint)
    console.print(f"scoring {trained.checkpoint}")
    data, spec = run.evaluation_data(trained.stage), run.stage_media(trained.stage)
    if left_out := unanswerable_sets(run.evaluation, spec):
        console.print(f"not scored, because the model cannot answer them: {', '.join(held.name for held in left_out)}")
    answers = run.run_dir / ANSWERS_FOLDER
    results = evaluate(trained.model, run.evaluation, data, spec, trained.world, answers_folder=answers)
    for name, result in results.items():
        if isinstance(result, GenerationResult):
            console.print(f"wrote {answers / name}.jsonl")
    scores = {name: asdict(result) for name, result in results.items()}
    if json:
        emit({"checkpoint": str(trained.checkpoint), "heldout": scores}, json=True)
        return
    print_table(
        [{"set": name} | {k: v for k, v in row.items() if not isinstance(v, dict)} for name, row in scores.items()]
    )
