"""The commands that a finished run proposes are valid, and those that its model cannot run are absent."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from mmscale.cli.main import VERBS, build_app, main
from mmscale.cli.next_steps import format_next_steps, next_steps
from mmscale.config import load
from mmscale.run.config import RunConfig
from tests.system.conftest import TINY

REPO = Path(__file__).resolve().parents[2]
NAMES = {verb.name for verb in VERBS}


def config(name: str, run: Path) -> RunConfig:
    return load(REPO / "configs" / name, [f"run_dir='{run}'"], RunConfig).value


@pytest.mark.parametrize("name", ["quickstart.yaml", "recipes/emoji-contrast.yaml", "recipes/emoji-text.yaml"])
def test_only_commands_that_fit_the_model(name: str, tmp_path: Path) -> None:
    run = tmp_path / "first ü"
    image = run / "report/images/0000.png"
    image.parent.mkdir(parents=True)
    image.touch()
    steps = next_steps(config(name, run))
    verbs = [shlex.split(command)[1] for command, _ in steps]
    assert ("generate" in verbs) == ("contrast" not in name)
    assert ("chat" in verbs) == ("text" in name)
    for command, _ in steps:
        program, verb, *words = shlex.split(command)
        assert program == "mmscale"
        assert verb in NAMES
        parser: Any = typer.main.get_command(build_app(verb)).commands[verb]
        arguments = words
        if hasattr(parser, "commands"):
            parser, arguments = parser.commands[words[0]], words[1:]
        parser.make_context(verb, arguments)  # Raises for an unknown option and for a missing argument.
        assert str(run) in shlex.split(command)[3 if verb == "checkpoint" else 2]
    text = format_next_steps(steps)
    assert all(f"\n  {command}" in text for command, _ in steps)


def test_questions_about_clips_are_those_of_the_held_out_sets(tmp_path: Path) -> None:
    omni = config("recipes/emoji-omni.yaml", tmp_path)
    assert not any("--video" in command or "--audio" in command for command, _ in next_steps(omni))
    files = {"clip-words": ("video", "clip words/00000-0.webm"), "speech-voice": ("audio", "speech-voice/00000-0.ogg")}
    for name, (kind, file) in files.items():
        (tmp_path / "answers" / file).parent.mkdir(parents=True)
        (tmp_path / "answers" / file).touch()
        answer = {"prompt": "it's:", "answer": "", "references": ["x"], "score": 0.0}
        lines = [{**answer, "media": [{"kind": "image"}]}, {**answer, "media": [{"kind": kind, "file": file}]}]
        (tmp_path / "answers" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = [shlex.split(command)[3:] for command, what in next_steps(omni) if what.startswith("answer about")]
    assert found == [
        [f"--{kind}", str(tmp_path / "answers" / file), "--prompt", "it's:"] for kind, file in files.values()
    ]


def test_a_dialogue_can_be_continued(tmp_path: Path) -> None:
    words = [f"run_dir={tmp_path}", "data.datasets.0.template={kind: dialogue}"]
    dialogue = load(REPO / "configs/recipes/emoji-text.yaml", words, RunConfig).value
    assert any("mmscale chat" in command for command, _ in next_steps(dialogue))


@pytest.mark.slow
def test_every_proposed_command_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "first ü"
    words = ["train", str(TINY), f"run_dir='{run}'", "max_steps=1", "evaluation.captions={num_images: 2}"]
    manifest = "examples/emoji/shards/heldout-style-quick.manifest"
    sets = f"evaluation.sets=[{{name: style, manifest: {manifest}, field: name, choices: 5, limit: 8}}]"
    monkeypatch.chdir(REPO)
    assert main([*words, sets]) == 0
    proposed = capsys.readouterr().err.partition("What next:\n")[2].splitlines()
    commands = [shlex.split(line)[1:] for line in proposed if line.startswith("  mmscale ")]
    assert [command[0] for command in commands] == ["generate", "eval", "checkpoint", "report"]
    for command in commands:
        assert main(command) == 0, capsys.readouterr().err
