"""The bundled clips and speech: what is held out is not in training data, and two builds give equal bytes."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.io.checksums import sha256_of
from data_pipeline.sample import AudioPart, Sample, VideoPart
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.shards.video_file import VideoFile

OMNI = Path(__file__).resolve().parents[2] / "examples" / "omni"
OPPOSITE = {
    "moves left": "moves right",
    "moves up": "moves down",
    "turns left": "turns right",
    "shrinks": "grows",
    "vanishes": "appears",
}
OPPOSITE |= {second: first for first, second in OPPOSITE.items()}


def read(name: str) -> list[Sample]:
    return list(read_samples(OMNI / "shards" / f"{name}.manifest"))


def shown(sample: Sample) -> list[np.ndarray]:
    """Return the frames of a clip as integers."""
    (part,) = sample.parts
    assert isinstance(part, VideoPart)
    with VideoFile(part.data) as file:
        return [pixels.astype(int) for _, pixels in file.decode(range(file.num_frames))]


def test_what_is_committed_is_what_was_built() -> None:
    recorded = dict(reversed(line.split("  ")) for line in (OMNI / "SHA256SUMS").read_text().splitlines())
    assert {f"shards/{path.name}": sha256_of(path) for path in (OMNI / "shards").iterdir()} == recorded
    assert sum(path.stat().st_size for path in (OMNI / "shards").iterdir()) < 10e6


def test_styles_concepts_and_motions_of_clips_are_held_out() -> None:
    trained = [sample.fields for sample in read("clips")]
    styles = {fields["style"] for fields in trained}
    assert styles == {"twitter", "fluent-3d", "fluent-flat", "openmoji"}
    seen = {(fields["concept"], fields["motion"]) for fields in trained}
    for name, style_is_new, concept_is_new, count in [
        ("style", True, False, 192),
        ("concept", False, True, 128),
        ("both", True, True, 128),
    ]:
        held = [sample.fields for sample in read(f"clips-heldout-{name}")]
        assert len(held) == count
        assert {fields["style"] in styles for fields in held} == {not style_is_new}
        assert {fields["concept"] in {code for code, _ in seen} for fields in held} == {not concept_is_new}
        assert not seen & {(fields["concept"], fields["motion"]) for fields in held}
        assert {fields["motion"] for fields in held} == set(OPPOSITE)
        # No motion is much more frequent than another: its share of right answers cannot come from guessing.
        motions = [fields["motion"] for fields in held]
        assert max(motions.count(motion) for motion in OPPOSITE) < 0.2 * count


def test_opposite_motions_have_the_same_frames_in_opposite_order() -> None:
    held = {(one.fields["concept"], one.fields["motion"]): one for one in read("clips-heldout-style")}
    for (concept, motion), sample in list(held.items())[:20]:
        frames, back = shown(sample), shown(held[concept, OPPOSITE[motion]])[::-1]
        assert len(frames) == 8
        difference = np.mean([np.abs(a - b).mean() for a, b in zip(frames, back, strict=True)])
        apart = np.mean([np.abs(a - b).mean() for a, b in zip(frames, back[::-1], strict=True)])
        assert difference < 3.5, "only the codec makes a difference"
        assert apart > 2 * difference


def test_voices_and_texts_of_speech_are_held_out() -> None:
    trained = [sample.fields for sample in read("speech")]
    texts, voices = ({fields[key] for fields in trained} for key in ("transcript", "voice"))
    words = {word for text in texts for word in text.split()}
    for name, voice_is_new, text_is_new, count in [
        ("voice", True, False, 96),
        ("text", False, True, 77),
        ("both", True, True, 77),
    ]:
        held = read(f"speech-heldout-{name}")
        assert len(held) == len({sample.fields["transcript"] for sample in held}) == count
        for sample in held:
            text, (part,) = sample.fields["transcript"], sample.parts
            assert (sample.fields["voice"] not in voices) == voice_is_new
            assert (text not in texts) == text_is_new
            assert (int(hashlib.sha256(f"text:{text}".encode()).hexdigest()[:16], 16) < 0.15 * 2**64) == text_is_new
            assert set(text.split()) <= words
            assert isinstance(part, AudioPart)
            assert part.size is not None
            assert 0.5 < part.size.samples / part.size.rate < 1.6


@pytest.mark.parametrize(
    ("name", "mark", "answers"), [("clips", "<video>", ("name", "motion")), ("speech", "<audio>", ("transcript",))]
)
def test_dialogues_of_training_have_the_answers_of_the_fields(name: str, mark: str, answers: tuple[str, ...]) -> None:
    for sample in read(name):
        turns = sample.fields["messages"]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * len(answers)
        assert [turn["content"] for turn in turns[1::2]] == [sample.fields[answer] for answer in answers]
        assert [mark in turn["content"] for turn in turns[::2]] == [True] + [False] * (len(answers) - 1)
    assert not any("messages" in sample.fields for sample in read(f"{name}-heldout-both"))


def spoken(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
    """Return a sound that depends on voice and text, as espeak-ng writes it."""
    noise = np.random.default_rng(list(" ".join(command).encode())).normal(0, 2000, 9000).astype(np.int16)
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(22050)
        file.writeframes(noise.tobytes())
    return subprocess.CompletedProcess(command, 0, target.getvalue())


def test_two_builds_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(OMNI))
    for name in ("build", "omni_clips", "omni_speech"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import build  # type: ignore[import-not-found]
    import omni_speech  # type: ignore[import-not-found]

    monkeypatch.setattr(omni_speech.subprocess, "run", spoken)
    emoji = next(iter(read_samples(build.EMOJI / "heldout-both.manifest")))
    built = []
    for _ in range(2):
        clips = dict(build.clips([({"google": emoji}, "google")]))
        speech = dict(build.speech(["one two"], omni_speech.TRAIN_VOICES, 2))
        built.append({**clips, **speech})
    assert built[0] == built[1]
    assert len(built[0]) == 4
    assert len({members.get("ogg", members.get("webm")) for members in built[0].values()}) == 4
    for name in ("build", "omni_clips", "omni_speech"):
        sys.modules.pop(name, None)
