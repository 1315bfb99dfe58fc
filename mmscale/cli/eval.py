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
_LM_EVAL = typer.Option(None, "--lm-eval", help="Run these tasks of lm-eval instead.", metavar="TASK[,TASK]")
_LMMS_EVAL = typer.Option(None, "--lmms-eval", help="Run these tasks of lmms-eval instead.", metavar="TASK[,TASK]")
_INCLUDE_PATH = typer.Option(
    None, "--include-path", help="Folder with further tasks of a harness. They may run Python code.", exists=True
)
_OVERRIDES = typer.Argument(None, help="Values that override the file's.", metavar="[KEY=VALUE]...")


@app.command("eval", epilog="Example: mmscale eval configs/quickstart.yaml run_dir=runs/first")
def evaluate_run(
    config: Path = _CONFIG,
    overrides: list[str] = _OVERRIDES,
    lm_eval: str = _LM_EVAL,
    lmms_eval: str = _LMMS_EVAL,
    limit: int = typer.Option(None, "--limit", min=1, help="Largest number of samples per task of a harness."),
    include_path: Path = _INCLUDE_PATH,
    chat: bool = typer.Option(False, "--chat", help="Ask lm-eval's tasks in the run's chat format."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object: checkpoint, and scores by held-out set."),
) -> None:
    """Score a trained model on held-out samples, or on tasks of lm-eval or lmms-eval.

    Loads the given or the newest checkpoint of the run and scores the sets of its evaluation block: answers to images
    with a control (images permuted among the samples), multiple-choice questions, perplexity of documents, generated
    answers and drawings, which it writes to RUN/answers.
    """
    from dataclasses import asdict

    from mmscale.cli.trained import load_trained, open_run, run_and_checkpoint
    from mmscale.config import load
    from mmscale.errors import ConfigError
    from mmscale.evaluate.result import ANSWERS_FOLDER, DrawingsResult, GenerationResult
    from mmscale.run.config import RunConfig
    from mmscale.run.evaluation import answerable, score_sets

    if lm_eval or lmms_eval:
        if lm_eval and lmms_eval:
            raise ConfigError("--lm-eval and --lmms-eval: run one harness at a time")
        if chat and lmms_eval:
            raise ConfigError(
                "--chat belongs to --lm-eval; lmms-eval's tasks are always asked in the run's chat format"
            )
        if overrides and config.is_dir():
            raise ConfigError(f"{overrides[0]}: the tasks of a harness use the run as it is; leave it out")
        harness_run = config if config.is_dir() else load(config, overrides or [], RunConfig).value.run_dir
        _run_harness(harness_run, lm_eval, lmms_eval, limit, include_path, chat=chat, json=json)
        return
    if limit is not None or include_path is not None or chat:
        raise ConfigError("--limit, --include-path and --chat belong to --lm-eval or --lmms-eval; add one of them")
    folder, checkpoint = run_and_checkpoint(config) or (None, None)
    run = (load(config, overrides or [], RunConfig) if folder is None else open_run(folder, overrides or ())).value
    if not run.evaluation.sets:
        raise ConfigError(f"{config}: evaluation.sets is empty: there is nothing to score")
    trained = load_trained(run, checkpoint)
    console.print(f"scoring {trained.checkpoint}")
    evaluation = answerable(run, trained.stage, run.evaluation, console.print)
    results = score_sets(run, trained.stage, trained.model, evaluation, trained.world)
    answers = run.run_dir / ANSWERS_FOLDER
    for name, result in results.items():
        if isinstance(result, GenerationResult | DrawingsResult):
            console.print(f"wrote {answers / name}.jsonl")
    scores = {name: asdict(result) for name, result in results.items()}
    if json:
        emit({"checkpoint": str(trained.checkpoint), "heldout": scores}, json=True)
        return
    print_table(
        [{"set": name} | {k: v for k, v in row.items() if not isinstance(v, dict)} for name, row in scores.items()]
    )


def _run_harness(
    run: Path,
    lm_eval: str | None,
    lmms_eval: str | None,
    limit: int | None,
    include_path: Path | None,
    *,
    chat: bool,
    json: bool,
) -> None:
    """Run tasks of one harness on a run folder or a checkpoint, and print the metrics."""
    from mmscale.errors import ConfigError

    tasks = [name for name in (lm_eval or lmms_eval or "").split(",") if name]
    extra = "lm-eval" if lm_eval else "lmms-eval"
    try:
        if lm_eval:
            from mmscale.harness.lm_eval_model import MMScaleLM, evaluate_tasks

            text_model = MMScaleLM(run)
            scores = evaluate_tasks(text_model, tasks, limit=limit, include_path=include_path, chat=chat)
            checkpoint = text_model.trained.checkpoint
        else:
            from mmscale.harness.lmms_eval_model import MMScaleLMM, evaluate_image_tasks

            image_model = MMScaleLMM(run)
            scores = evaluate_image_tasks(image_model, tasks, limit=limit, include_path=include_path)
            checkpoint = image_model.trained.checkpoint
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("lm_eval", "lmms_eval"):
            raise
        raise ConfigError(f"{extra} is not installed; install it with: pip install 'mmscale[{extra}]'") from error
    emit({"checkpoint": str(checkpoint), extra.replace("-", "_"): scores}, json=json)
