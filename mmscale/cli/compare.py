"""``mmscale compare``: variants of one run, trained from one start on equal terms, and one page about them."""

from __future__ import annotations

from pathlib import Path

import typer

from mmscale.cli.console import console, emit

app = typer.Typer()

_STDERR = 2
"""Where the runs' words go: what is printed here is figures."""

_CONFIG = typer.Argument(help="A run's YAML file with a `compare` block: seeds and variants.", metavar="CONFIG")
_OVERRIDES = typer.Argument(
    None, help="Values that win over the file's, for example compare.seeds=[1].", metavar="[KEY=VALUE]..."
)


@app.command(epilog="Example: mmscale compare configs/compare/emoji-connectors.yaml --ranks 2")
def compare(
    config: Path = _CONFIG,
    overrides: list[str] = _OVERRIDES,
    ranks: int = typer.Option(
        1, min=1, help="Processes of each run, on this machine. The runs come one after the other."
    ),
    plan: bool = typer.Option(
        False, "--plan", help="Say what would be trained and write the file of each run; train nothing."
    ),
    json: bool = typer.Option(False, "--json", help="Print the figures (comparison.json) as one JSON object."),
) -> None:
    """Train variants of a run from one start on equal terms, over several seeds, and write one page about them.

    The page is RUN_DIR/comparison.html, written again after every run. The same command goes on after any end: finished
    runs are not repeated. Exit code 0: all runs are finished. 1: a run failed; the others went on. 75: asked to stop.
    """
    from launchers.local import launch
    from mmscale.cli.run_file import check_commands
    from mmscale.compare import (
        check_comparison,
        plan_trials,
        prepare,
        read_comparison,
        run_trials,
        write_comparison,
    )
    from mmscale.run.folder import hold_folder

    comparison = read_comparison(config, overrides or [])
    for variant in comparison.variants:
        check_commands(variant.loaded)
    check_comparison(comparison, ranks)
    with hold_folder(comparison.run_dir):
        trials = plan_trials(comparison, lambda name: console.print(f"measured {name}"))
        if plan:
            prepare(comparison, trials)
            emit({trial.name: trial.summary() for trial in trials}, json=json)
            return
        failures = run_trials(
            comparison,
            trials,
            start=lambda path, run_dir: launch(["train", str(path)], ranks, run_dir, stdout=_STDERR),
            note=console.print,
            done=lambda failures: write_comparison(comparison, trials, failures),
        )
        figures = write_comparison(comparison, trials, failures)
    if json:
        emit(figures, json=True)
    else:
        print(comparison.page)
    if failures:
        raise typer.Exit(1)
