"""``mmscale compare``: train variants of one run under equal conditions, and write a page that compares them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mmscale.cli.console import console, emit, print_table

if TYPE_CHECKING:
    from mmscale.compare import Trial

app = typer.Typer()

_STDERR = 2
"""File descriptor for the runs' output, because stdout is for the results."""

_CONFIG = typer.Argument(help="A run's YAML file with a `compare` block: seeds and variants.", metavar="CONFIG")
_OVERRIDES = typer.Argument(
    None, help="Values that override the file's, for example compare.seeds=[1].", metavar="[KEY=VALUE]..."
)


@app.command(epilog="Example: mmscale compare configs/compare/emoji-connectors.yaml --ranks 2")
def compare(
    config: Path = _CONFIG,
    overrides: list[str] = _OVERRIDES,
    ranks: int = typer.Option(
        1, min=1, help="Ranks of each run, on this machine. The runs are trained one after the other."
    ),
    plan: bool = typer.Option(
        False, "--plan", help="Print the planned runs and write the configuration of each; train nothing."
    ),
    json: bool = typer.Option(False, "--json", help="Print the results (comparison.json) as one JSON object."),
) -> None:
    """Train variants of a run under equal conditions, over several seeds, and write one page that compares them.

    The page is RUN_DIR/comparison.html, written again after every run. Run the same command again to continue: finished
    runs are not repeated. Exit code 0: all runs are finished. 1: a run failed; the others were trained. 75: stopped by
    a signal.
    """
    from launchers.local import launch
    from mmscale.compare import (
        check_comparison,
        plan_trials,
        prepare,
        read_comparison,
        run_trials,
        write_comparison,
    )
    from mmscale.config.trust import check_commands
    from mmscale.run.folder import hold_folder

    comparison = read_comparison(config, overrides or [])
    for variant in comparison.variants:
        check_commands(variant.loaded)
    check_comparison(comparison, ranks)
    with hold_folder(comparison.run_dir):
        trials = plan_trials(comparison, lambda name: console.print(f"measured {name}"))
        if plan:
            prepare(comparison, trials)
            _print_plan(trials, json)
            return
        failures = run_trials(
            comparison,
            trials,
            start=lambda path, run_dir: launch(["train", str(path)], ranks, run_dir, stdout=_STDERR),
            log=console.print,
            on_run_end=lambda failures: write_comparison(comparison, trials, failures),
        )
        results = write_comparison(comparison, trials, failures)
    if json:
        emit(results, json=True)
    else:
        print(comparison.page_path)
    if failures:
        raise typer.Exit(1)


def _print_plan(trials: list[Trial], json: bool) -> None:
    """Print one row for each stage of each run."""
    if json:
        emit({trial.name: trial.summary() for trial in trials}, json=True)
        return
    from mmscale.metrics.format import format_count

    print_table(
        [
            {
                "variant": trial.variant,
                "seed": trial.seed,
                "stage": stage.name,
                "steps": plan.steps,
                "samples": plan.samples,
                "learned tokens": plan.learned_tokens,
                "operations": format_count(plan.flops),
            }
            for trial in trials
            for stage, plan in zip(trial.config.stages, trial.stages, strict=True)
        ]
    )
