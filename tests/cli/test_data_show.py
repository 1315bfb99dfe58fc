"""``mmscale data show`` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmscale.cli.main import main

QUICKSTART = str(Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml")


def test_samples_of_a_run_are_shown_as_they_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", QUICKSTART, "--samples", "0:2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dataset"] == "emoji"
    assert [sample["sample"] for sample in found["samples"]] == [0, 1]
    for sample in found["samples"]:
        parts = sample["text_spans"]
        assert sum(part["num_tokens"] for part in parts) == sample["tokens"]
        assert [part["kind"] for part in parts][-1] == "learned"
        assert parts[-1]["text"].endswith("</s>")
    assert main(["data", "show", QUICKSTART, "--samples", "0:1", "--pictures", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["0-0.png"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sample 0 ")
    assert lines[-1].split()[0] == "learned"


def test_epochs_draw_other_texts(capsys: pytest.CaptureFixture[str]) -> None:
    shown = set()
    for epoch in range(12):
        assert main(["data", "show", QUICKSTART, "--samples", "0:1", "--epoch", str(epoch)]) == 0
        shown.add(capsys.readouterr().out)
    assert len(shown) == 2  # The name of the concept, or its group.


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["--dataset", "emojy"], "--dataset emojy: the configuration has emoji", 2),
        (["--samples", "0:1000000"], "--samples 0:1000000: emoji has", 2),
        (["--samples", "3"], "expected A:B", 2),
    ],
)
def test_mistakes_are_named(capsys: pytest.CaptureFixture[str], words: list[str], message: str, code: int) -> None:
    assert main(["data", "show", QUICKSTART, *words]) == code
    assert message in capsys.readouterr().err


@pytest.mark.fault
def test_a_bad_sample_is_listed_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "show", QUICKSTART, "data.datasets.0.transforms.max_image_pixels=10", "--samples", "0:2"]
    assert main(words) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  bad: ")[0].split()[1] for line in lines] == ["0", "1"]
    assert all("the limit is 10 pixels" in line for line in lines)
    assert main([*words, "--json"]) == 1
    assert "the limit is 10" in json.loads(capsys.readouterr().out)["samples"][1]["problem"]
