"""Build the bundled clips and speech: videos of emoji that move, and spoken digits and names, as webdataset shards.

    python examples/omni/build.py              writes shards/ and SHA256SUMS
    python examples/omni/build.py --check      compares with SHA256SUMS, writes nothing

Equal shards of examples/emoji, and equal versions of PyAV and Pillow, give equal bytes of the clips. espeak-ng draws
random numbers for breathy voices, so of speech only texts, voices and lengths are compared. README.md in this folder
describes the content of each shard.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from omni_clips import OPPOSITES, encode_clip, frames
from omni_speech import HELDOUT_VOICES, TRAIN_VOICES, speak, transcripts, utterance
from PIL import Image

from data_pipeline.io.atomic import write_whole
from data_pipeline.io.checksums import differing_sums, sums_of
from data_pipeline.sample import AudioPart, Sample
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.text.templates.base import images_of

HERE = Path(__file__).resolve().parent
EMOJI = HERE.parent / "emoji" / "shards"
SUMS = HERE / "SHA256SUMS"

STYLES = ("twitter", "fluent-3d", "fluent-flat", "openmoji", "google")
"""Styles of examples/emoji. The last one is held out."""
NUM_CONCEPTS = 96
NUM_UNSEEN = 64
NUM_SPOKEN = 40
NUM_SEQUENCES = 120
HELDOUT_TEXTS = 0.15
"""Share of the texts that no training voice speaks."""
VOICES_PER_TEXT = 2
NUM_UNHEARD = 96
"""Training texts that the held-out voices speak."""

CLIP_TURNS = (("<video>\nWhat does it show?", "name"), ("How does it move?", "motion"))
SPEECH_TURNS = (("<audio>\nWhat is said?", "transcript"),)

Samples = Iterable[tuple[str, dict[str, bytes]]]
Pictures = dict[str, dict[str, Sample]]
"""Samples of examples/emoji by concept and style."""


def share(text: str) -> float:
    """Return a number in [0, 1) that depends only on the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def build(
    output: Path,
    num_concepts: int = NUM_CONCEPTS,
    num_unseen: int = NUM_UNSEEN,
    num_spoken: int = NUM_SPOKEN,
    num_sequences: int = NUM_SEQUENCES,
) -> None:
    """Write shards, indexes and manifests."""
    quick = pictures("train-quick", "heldout-style-quick")
    seen, unseen = first(quick, num_concepts), first(pictures("heldout-concept", "heldout-both"), num_unseen)
    styles = {code: STYLES[int((len(STYLES) - 1) * share("style:" + code))] for code in unseen}
    words = [each["twitter"].fields["name"] for each in first(quick, len(quick)).values()]
    texts = transcripts([word for word in words if word.isalpha()][:num_spoken], num_sequences, share)
    said = [text for text in texts if share("text:" + text) >= HELDOUT_TEXTS]
    unsaid = [text for text in texts if text not in said]
    unheard = sorted(said, key=lambda text: share("unheard:" + text))[:NUM_UNHEARD]
    sources: dict[str, Samples] = {
        "clips": with_turns(clips([(each, style) for each in seen.values() for style in STYLES[:-1]]), CLIP_TURNS),
        "clips-heldout-style": clips([(each, STYLES[-1]) for each in seen.values()]),
        "clips-heldout-concept": clips([(each, styles[code]) for code, each in unseen.items()]),
        "clips-heldout-both": clips([(each, STYLES[-1]) for each in unseen.values()]),
        "speech": with_turns(speech(said, TRAIN_VOICES, VOICES_PER_TEXT), SPEECH_TURNS),
        "speech-heldout-voice": speech(unheard, HELDOUT_VOICES),
        "speech-heldout-text": speech(unsaid, TRAIN_VOICES),
        "speech-heldout-both": speech(unsaid, HELDOUT_VOICES),
    }
    for name, samples in sources.items():
        with ShardWriter(output, name, max_samples=1024) as writer:
            for key, members in sorted(samples, key=lambda sample: share("order:" + sample[0])):
                writer.write(key, members)
        write_manifest(output / f"{name}.manifest", writer.shards)


def pictures(*names: str) -> Pictures:
    """Return the samples of manifests of examples/emoji."""
    found: Pictures = {}
    for name in names:
        for sample in read_samples(EMOJI / f"{name}.manifest"):
            found.setdefault(sample.fields["concept"], {})[sample.fields["style"]] = sample
    return found


def first(found: Pictures, count: int) -> Pictures:
    """Return the concepts with the lowest hash."""
    return {code: found[code] for code in sorted(found, key=lambda code: share("omni:" + code))[:count]}


def clips(drawn: Sequence[tuple[dict[str, Sample], str]]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield two clips with opposite motions for each concept and style.

    The five styles of a concept have five different pairs of motions.
    """
    for by_style, style in drawn:
        fields = by_style[style].fields
        code, number = fields["concept"], STYLES.index(style)
        picture = Image.open(io.BytesIO(images_of(by_style[style])[0].data))
        pair = OPPOSITES[(int(len(OPPOSITES) * share("motion:" + code)) + number) % len(OPPOSITES)]
        for motion in pair:
            # Both clips of a pair have the same frames, so they have one path.
            shift = (share(f"x:{code}:{style}"), share(f"y:{code}:{style}"))
            kept = {name: fields[name] for name in ("concept", "name", "group", "style")}
            members = {"webm": encode_clip(frames(picture, motion, shift)), "json": as_json({**kept, "motion": motion})}
            yield f"{code.lower()}-{style}-{motion.replace(' ', '-')}", members


def speech(texts: Sequence[str], voices: Sequence[str], count: int = 1) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield each text in ``count`` of the voices."""
    for text in texts:
        for voice in sorted(voices, key=lambda voice: share(f"{voice}:{text}"))[:count]:
            sound = speak(utterance(text, voice, share))
            key = f"{text.replace(' ', '-')}-{voice.replace('+', '-')}"
            yield key, {"ogg": sound, "json": as_json({"transcript": text, "voice": voice})}


def with_turns(samples: Samples, turns: Sequence[tuple[str, str]]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the samples with a dialogue; ``turns`` are questions, each with the field that has its answer."""
    for key, members in samples:
        fields = json.loads(members["json"])
        messages = [
            {"role": role, "content": words}
            for question, field in turns
            for role, words in (("user", question), ("assistant", fields[field]))
        ]
        yield key, {**members, "json": as_json({**fields, "messages": messages})}


def as_json(fields: dict[str, object]) -> bytes:
    """Return compact JSON in UTF-8."""
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()


def sums(output: Path) -> str:
    """Return lines as of ``sha256sum``, with paths relative to this folder."""
    return sums_of({f"shards/{path.name}": path for path in sorted(output.iterdir())})


def said_in(manifest: Path) -> list[tuple[str, dict[str, object], object]]:
    """Return key, fields and length of each utterance of a manifest."""
    found = [(sample.provenance.key, sample.fields, sample.parts[0]) for sample in read_samples(manifest)]
    return [(key, fields, part.size) for key, fields, part in found if isinstance(part, AudioPart)]


def check() -> int:
    """Build into a temporary folder and compare with what is stored; return 0 if all is equal, else 1."""
    with tempfile.TemporaryDirectory() as scratch:
        build(Path(scratch))
        lines = differing_sums(sums(Path(scratch)), SUMS.read_text())
        differences = [line for line in lines if "  shards/speech" not in line]
        for manifest in sorted(Path(scratch).glob("speech*.manifest")):
            if said_in(manifest) != said_in(HERE / "shards" / manifest.name):
                differences.append(f"other texts, voices or lengths: {manifest.name}")
    print("\n".join([*differences, f"{len(differences)} differences"]))
    return 1 if differences else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "shards", help="folder for the shards")
    parser.add_argument("--check", action="store_true", help="build in a temporary folder, compare with SHA256SUMS")
    options = parser.parse_args()
    if options.check:
        return check()
    for old in [*options.output.glob("*.tar*"), *options.output.glob("*.manifest")]:
        old.unlink()
    build(options.output)
    if options.output == HERE / "shards":
        write_whole(SUMS, sums(options.output).encode())
    print(f"{sum(path.stat().st_size for path in options.output.iterdir()) / 1e6:.1f} MB in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
