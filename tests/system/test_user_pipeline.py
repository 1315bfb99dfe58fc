"""A run with a webdataset pipeline from user code resumes in the middle of an epoch."""

from __future__ import annotations

import pytest

from tests.system.conftest import MakeRun
from tests.system.test_resume import curve

WORDS = (
    "data.datasets=[{name: emoji, pipeline: 'examples.emoji.pipeline:train', template: {kind: caption, answers: "
    "['{name}']}, transforms: {kind: fixed, size: 32}}]",
    "checkpoint.every_steps=3",
)


@pytest.mark.resume
def test_a_resume_continues_bit_for_bit(fork_run: MakeRun) -> None:
    whole = fork_run("whole", 1, *WORDS, "max_steps=6")
    whole.finish()
    halves = fork_run("halves", 1, *WORDS, "max_steps=3")
    halves.finish()
    assert len(curve(halves)) == 3
    again = fork_run("halves", 1, *WORDS, "max_steps=6")
    assert "resuming from" in again.finish()
    assert curve(again) == curve(whole)
