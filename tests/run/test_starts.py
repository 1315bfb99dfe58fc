"""Changes of the configuration at a start: rejected or printed for a finished run, printed and recorded else."""

from __future__ import annotations

import contextlib
import io
import subprocess
from pathlib import Path

import pytest

import launchers
from mmscale.cli.main import main
from mmscale.config import load
from mmscale.dist import World
from mmscale.io import software
from mmscale.report.build import build_report
from mmscale.report.starts import STARTS_FILE, StartRecord, add_start, read_starts
from mmscale.run.config import RunConfig
from tests.engine.ranks import ROOT, run_ranks

TINY = ROOT / "tests/system/tiny.yaml"


def commands(world: World, folder: str, starts: list[list[str]]) -> list[tuple[int, str]]:
    """Return exit code and error output of ``mmscale train`` for each start; only the last start may train.

    Before each start ``config validate`` must find the same problem, or none if the start finds none.
    """
    answers = []
    for words in starts:
        before = _run("config", "validate", str(TINY), f"run_dir={folder}", *words)
        answers.append(_run("train", str(TINY), f"run_dir={folder}", *words))
        code, text = answers[-1]
        assert before[0] == code, (before, answers[-1])
        if code:
            assert text[text.rindex("mmscale: ") :] in before[1], (before, answers[-1])
    return answers


def _run(*words: str) -> tuple[int, str]:
    with contextlib.redirect_stderr(io.StringIO()) as text:
        code = main(list(words))
    return code, text.getvalue()


def start(folder: Path, *starts: list[str]) -> list[tuple[int, str]]:
    arguments = {"folder": str(folder), "starts": list(starts)}
    (answers,) = run_ranks("tests.run.test_starts:commands", 1, arguments)
    return [(code, " ".join(text.split())) for code, text in answers]


@pytest.mark.resume
def test_a_start_says_what_it_changes_and_a_finished_run_refuses_what_it_cannot_honour(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ((code, text),) = start(folder, ["max_steps=2"])
    assert (code, "changed since" in text) == (0, False), text
    first = (folder / "config.yaml").read_bytes()
    same, seed, model, runs, fewer, scored, longer = start(
        folder,
        ["max_steps=2"],
        ["max_steps=2", "seed=3"],
        ["max_steps=1", "model.decoder.hidden_dim=96"],
        ["max_steps=2", "engine.micro_lanes=2", "stages.0.data={workers: 1}"],
        ["max_steps=1"],
        ["max_steps=2", "evaluation.tokens_per_forward=512"],
        ["max_steps=4", "stages.0.learning_rate.default=0.5"],
    )
    assert same[0] == 0
    assert (
        f"run_dir={folder} holds a finished run of 2 steps: nothing to do. Its report is {folder}/report.html."
        in same[1]
    )
    assert "raise max_steps or stages.*.steps. To train anew, give another run_dir" in same[1]
    assert seed[0] == 2
    assert seed[1].endswith("Different: seed: 1 -> 3")
    assert model[0] == 2
    assert "model.decoder.hidden_dim: 48 -> 96" in model[1]
    assert runs[0] == 0
    assert "Changed values without effect: engine.micro_lanes: 1 -> 2; stages.0.data.workers: null -> 1." in runs[1]
    assert fewer[0] == 0
    assert "without effect: max_steps: 2 -> 1" in fewer[1]
    assert scored[0] == 2
    assert "use `mmscale eval`" in scored[1]
    assert longer[0] == 0
    assert "changed since the last start: max_steps: 2 -> 4; stages.0.learning_rate.default: 0.0013 -> 0.5" in longer[1]
    second = (folder / "config.yaml").read_bytes()
    order, both, (code, text) = start(
        folder,
        ["max_steps=6", "data.packing.look_ahead=3"],
        ["max_steps=6", "data.packing.look_ahead=3", "model.decoder.hidden_dim=96"],
        ["max_steps=6", "model.decoder.tie_embeddings=true"],
    )
    assert (order[0], both[0]) == (1, 1)
    assert "does not fit this run: changed since: packing; put them back" in order[1]
    # Found before the engine is built, which would fail on the other model.
    assert "changed since: model.media, packing (model.media follows from the model block); put them back" in both[1]
    assert code == 1
    assert "changed since the last start: max_steps: 4 -> 6; model.decoder.tie_embeddings: false -> true" in text
    assert "is a checkpoint of another model" in text
    assert (folder / "config.yaml").read_bytes() == second, "a start that was refused is the run's configuration"
    one, two = read_starts(folder)
    assert (one.start, one.step, one.world_size, one.changed) == (1, 0, 1, {})
    assert (two.start, two.step, two.world_size) == (2, 2, 1)
    assert two.changed == {"max_steps": ("2", "4"), "stages.0.learning_rate.default": ("0.0013", "0.5")}
    assert [(folder / each.config).read_bytes() for each in (one, two)] == [first, second]
    assert load(folder / one.config, [], RunConfig).value.max_steps == 2
    assert one.code == two.code == software.source_digest()
    assert one.versions["mmscale"] == software.versions()["mmscale"]
    page = build_report(folder).read_text()
    assert "stages.0.learning_rate.default: 0.0013 → 0.5" in page
    assert two.code_name in page


def test_damaged_records_of_starts_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / STARTS_FILE
    path.parent.mkdir()
    good = (
        '{"start": 1, "time": "", "step": 0, "world_size": 1, "config": "starts/config-0001.yaml", "changed": {}, '
        '"versions": {}, "code": "", "commit": null, "commit_changed": null, "host": "", "pid": 1}'
    )
    outside = good.replace("starts/config-0001.yaml", "../../elsewhere.yaml")
    path.write_text(f"{good}\n{outside}\n{'[' * 100_000}\n{{}}\n{good[:50]}")
    assert [record.start for record in read_starts(tmp_path)] == [1]


def test_the_newest_starts_of_a_file_that_is_too_large_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(number: int) -> StartRecord:
        return StartRecord(
            start=number,
            time="",
            step=number,
            world_size=1,
            config="starts/config-0001.yaml",
            changed={},
            versions={},
            code="",
            commit=None,
            commit_changed=None,
            host="",
            pid=1,
        )

    add_start(tmp_path, record(1))
    monkeypatch.setattr("mmscale.report.starts._MOST_BYTES", 5 * (tmp_path / STARTS_FILE).stat().st_size // 2)
    for number in range(2, 7):
        add_start(tmp_path, record(number))
    assert [each.start for each in read_starts(tmp_path)] == [5, 6]
    assert launchers.STARTS_FILE == STARTS_FILE


def test_the_commit_is_that_of_a_checkout_which_tracks_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(software, "ROOT", tmp_path)
    for package in software.PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")

    def git(*words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    assert software.git_commit() is None, "an environment inside of another project's checkout"
    git("add", ".")
    git("commit", "-m", "one")
    found = software.git_commit()
    assert found is not None
    assert (len(found[0]), found[1]) == (40, False)
    digest = software.source_digest()
    (tmp_path / "mmscale/__init__.py").write_text("changed = True\n")
    assert software.git_commit() == (found[0], True)
    assert software.source_digest() != digest
