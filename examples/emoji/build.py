"""Build the bundled data set: emoji images in five styles as webdataset shards.

    python examples/emoji/build.py --packages examples/emoji/.npm --output examples/emoji/shards
    python examples/emoji/build.py --packages examples/emoji/.npm --check      compares with SHA256SUMS, writes nothing

Equal packages and equal encoder versions give equal bytes. README.md in this folder describes how to get the packages
and the content of each shard.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from emoji_concepts import Concept, load_concepts, quick_codes, share
from emoji_pictures import EXTENSION, encode_picture
from emoji_wording import dialogue, interleaved, page, record

from data_pipeline.io.atomic import write_whole
from data_pipeline.io.checksums import differing_sums, sums_of
from data_pipeline.prepare.choices import ModelType
from data_pipeline.prepare.tokenizer_training import train_sentencepiece
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.writer import ShardWriter

HERE = Path(__file__).resolve().parent
SUMS = HERE / "SHA256SUMS"

TRAIN_STYLES = ("twitter", "fluent-3d", "fluent-flat", "openmoji")
HELDOUT_STYLE = "google"
# Leave out fluent-flat beyond the quickstart: it redraws fluent-3d, so it adds the least for its size.
REST_STYLES = ("twitter", "fluent-3d", "openmoji")

SAMPLES_PER_SHARD = 512
PAGE_CONCEPTS = 8
NUM_DIALOGUES = 40
VOCAB_SIZE = 2048
# Encode rare Chinese and Japanese characters as bytes; otherwise they would take pieces that English words need.
CHARACTER_COVERAGE = 0.99

MANIFESTS = {
    "train-quick": ("train-quick",),
    "train": ("train-quick", "train-rest"),
    "train-text": ("train-text",),
    "train-interleaved": ("train-interleaved",),
    "train-dialogues": ("train-dialogues",),
    "heldout-style-quick": ("heldout-style-quick",),
    "heldout-style": ("heldout-style-quick", "heldout-style-rest"),
    "heldout-concept": ("heldout-concept",),
    "heldout-both": ("heldout-both",),
}
"""Shard prefixes of each manifest, by the manifest's name."""

Samples = Iterable[tuple[str, dict[str, bytes]]]


def build(packages: Path, output: Path, tokenizer: Path, num_quick: int, vocab_size: int = VOCAB_SIZE) -> None:
    """Write shards, indexes, manifests and the tokenizer."""
    concepts = load_concepts(packages)
    quick = quick_codes(concepts, num_quick)
    seen = [concept for concept in concepts if not concept.is_unseen]
    unseen = [concept for concept in concepts if concept.is_unseen]
    few = [concept for concept in seen if concept.code in quick]
    rest = [concept for concept in seen if concept.code not in quick]
    sources: dict[str, Samples] = {
        "train-quick": pictures(few, TRAIN_STYLES),
        "train-rest": pictures(rest, REST_STYLES),
        "train-text": pages(seen),
        "train-interleaved": series(few),
        "train-dialogues": dialogues(few),
        "heldout-style-quick": pictures(few, (HELDOUT_STYLE,)),
        "heldout-style-rest": pictures(rest, (HELDOUT_STYLE,)),
        "heldout-concept": pictures(unseen, TRAIN_STYLES),
        "heldout-both": pictures(unseen, (HELDOUT_STYLE,)),
    }
    shards = {}
    for prefix, samples in sources.items():
        with ShardWriter(output, prefix, max_samples=SAMPLES_PER_SHARD) as writer:
            for key, members in samples:
                writer.write(key, members)
        shards[prefix] = writer.shards
    for name, prefixes in MANIFESTS.items():
        write_manifest(output / f"{name}.manifest", [shard for prefix in prefixes for shard in shards[prefix]])
    trained = [output / f"{name}.manifest" for name in ("train", "train-text")]
    train_sentencepiece(
        trained, tokenizer, vocab_size, model_type=ModelType.UNIGRAM, character_coverage=CHARACTER_COVERAGE
    )


def pictures(concepts: list[Concept], styles: tuple[str, ...]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield a sample for each concept and style, in an order that is fixed by hash."""
    pairs = [(concept, style) for concept in concepts for style in styles]
    for concept, style in sorted(pairs, key=lambda pair: share(f"order:{pair[0].code}:{pair[1]}")):
        image = encode_picture(style, concept.pictures[style])
        yield f"{concept.code.lower()}-{style}", {EXTENSION[style]: image, "json": as_json(record(concept, style))}


def pages(concepts: list[Concept]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield text-only samples: pages of up to eight concepts of a subgroup."""
    sheets = list(chunks(concepts, lambda _: PAGE_CONCEPTS))
    for sheet in sorted(sheets, key=lambda sheet: share("page:" + sheet[0].code)):
        yield f"page-{sheet[0].code.lower()}", {"txt": page(sheet).encode()}


def series(concepts: list[Concept]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield samples with two to four images of a subgroup in one style, with text between them."""
    rows = [row for row in chunks(concepts, lambda code: 2 + int(3 * share("row:" + code))) if len(row) > 1]
    for row in sorted(rows, key=lambda row: share("series:" + row[0].code)):
        style = TRAIN_STYLES[int(len(TRAIN_STYLES) * share("style:" + row[0].code))]
        images = numbered_images(row, style)
        yield f"series-{row[0].code.lower()}", {**images, "json": as_json(interleaved(row, list(images)))}


def dialogues(concepts: list[Concept]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield questions and answers about one or two images of a subgroup in one style."""
    rows = chunks(concepts, lambda code: 1 + int(2 * share("talk:" + code)))
    for row in sorted(rows, key=lambda row: share("dialogue:" + row[0].code))[:NUM_DIALOGUES]:
        style = TRAIN_STYLES[int(len(TRAIN_STYLES) * share("painted:" + row[0].code))]
        members = {**numbered_images(row, style), "json": as_json(dialogue(row, style))}
        yield f"dialogue-{row[0].code.lower()}-{style}", members


def numbered_images(concepts: list[Concept], style: str) -> dict[str, bytes]:
    """Return the encoded images of concepts as members ``0.png``, ``1.png``, ..."""
    names = [f"{number}.{EXTENSION[style]}" for number in range(len(concepts))]
    return {name: encode_picture(style, concept.pictures[style]) for name, concept in zip(names, concepts, strict=True)}


def chunks(concepts: list[Concept], length: Callable[[str], int]) -> Iterator[list[Concept]]:
    """Yield chunks of concepts of one subgroup; ``length`` returns a chunk's size, given its first concept's code."""
    by_subgroup: dict[str, list[Concept]] = {}
    for concept in sorted(concepts, key=lambda concept: share("chunk:" + concept.code)):
        by_subgroup.setdefault(concept.subgroup, []).append(concept)
    for subgroup in sorted(by_subgroup):
        left = by_subgroup[subgroup]
        while left:
            count = length(left[0].code)
            yield left[:count]
            left = left[count:]


def as_json(fields: dict[str, object]) -> bytes:
    """Return compact JSON in UTF-8."""
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()


def sums(output: Path, tokenizer: Path) -> str:
    """Return lines as of ``sha256sum``, with paths relative to this folder."""
    shards = {f"shards/{path.name}": path for path in sorted(output.iterdir())}
    return sums_of({**shards, "tokenizer.model": tokenizer})


def check(packages: Path) -> int:
    """Build into a temporary folder and compare with SHA256SUMS; return 0 if every file is equal, else 1."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        build(packages, folder / "shards", folder / "tokenizer.model", num_quick=256)
        differences = differing_sums(sums(folder / "shards", folder / "tokenizer.model"), SUMS.read_text())
    print("\n".join([*differences, f"{len(differences)} differences"]))
    return 1 if differences else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder with the unpacked npm packages")
    parser.add_argument("--output", type=Path, default=HERE / "shards", help="folder for the shards")
    parser.add_argument("--check", action="store_true", help="build in a temporary folder, compare with SHA256SUMS")
    options = parser.parse_args()
    if options.check:
        return check(options.packages)
    for old in options.output.glob("*.tar*"):
        old.unlink()
    tokenizer = options.output.parent / "tokenizer.model"
    build(options.packages, options.output, tokenizer, num_quick=256)
    write_whole(SUMS, sums(options.output, tokenizer).encode())
    total = sum(path.stat().st_size for path in options.output.iterdir())
    print(f"{total / 1e6:.1f} MB in {options.output}; fingerprint {hashlib.sha256(SUMS.read_bytes()).hexdigest()[:16]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
