"""Build the bundled text data: dialogues, questions, pages and preference pairs from the texts of the emoji data set.

    python examples/text/build.py --output examples/text

Equal shards of examples/emoji give equal bytes. README.md in this folder describes the data sets.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.prepare.choices import ModelType
from data_pipeline.prepare.tokenizer_training import train_sentencepiece
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.shards.writer import ShardWriter

EMOJI = Path(__file__).resolve().parents[1] / "emoji" / "shards"
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
HELD_OUT_SHARE = 0.2
CONCEPTS_PER_TALK = 3
NUM_CHOICES = 4
NUM_PAIRS = 256
VOCAB_SIZE = 2048

Fields = dict[str, Any]


def share(text: str) -> float:
    """Return a number in [0, 1) that depends only on the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def concepts(name: str) -> list[Fields]:
    """Return the concepts of an emoji manifest, each once, in an order that is fixed by hash."""
    found = {sample.fields["concept"]: sample.fields for sample in read_samples(EMOJI / f"{name}.manifest")}
    return sorted(found.values(), key=lambda fields: share(f"text:{fields['concept']}"))


def group_question(fields: Fields) -> str:
    """Return the question whose answer is the concept's group."""
    return f"Which group is {fields['name']} in?"


def turns(fields: Fields) -> Iterator[tuple[str, str]]:
    """Yield (question, answer) pairs about a concept."""
    yield group_question(fields), fields["group"]
    yield f"What kind of thing is {fields['name']}?", fields["subgroup"]
    if fields["tags"]:
        yield f"Which words go with {fields['name']}?", ", ".join(fields["tags"])


def talks(listed: Sequence[Fields]) -> Iterator[tuple[str, Fields]]:
    """Yield dialogues about three concepts each, with their questions mixed; the last one may have fewer concepts."""
    for start in range(0, len(listed), CONCEPTS_PER_TALK):
        several = listed[start : start + CONCEPTS_PER_TALK]
        asked = sorted((turn for fields in several for turn in turns(fields)), key=lambda turn: share(turn[0]))
        messages = [
            {"role": role, "content": words}
            for turn in asked
            for role, words in zip(("user", "assistant"), turn, strict=True)
        ]
        yield several[0]["concept"].lower(), {"messages": messages}


def questions(listed: Sequence[Fields], groups: Sequence[str]) -> Iterator[tuple[str, Fields]]:
    """Yield the question for each concept's group, with four groups to choose from."""
    for fields in listed:
        key, right = fields["concept"], fields["group"]
        others = sorted((group for group in groups if group != right), key=lambda group: share(f"{key}:{group}"))
        choices = sorted([right, *others[: NUM_CHOICES - 1]], key=lambda group: share(f"{group}:{key}"))
        yield key.lower(), {"question": group_question(fields), "choices": choices, "answer": choices.index(right)}


def pairs(listed: Sequence[Fields], groups: Sequence[str]) -> Iterator[tuple[str, Fields]]:
    """Yield preference pairs: the question for a concept's group, that group, and a wrong group to reject."""
    for fields in listed:
        key, right = fields["concept"], fields["group"]
        wrong = min((group for group in groups if group != right), key=lambda group: share(f"pair:{key}:{group}"))
        yield key.lower(), {"prompt": group_question(fields), "chosen": right, "rejected": wrong}


def pages(listed: Sequence[Fields]) -> Iterator[tuple[str, Fields]]:
    """Yield a page for each subgroup, in the form of the emoji data's pages."""
    for subgroup in sorted({fields["subgroup"] for fields in listed}):
        own = [fields for fields in listed if fields["subgroup"] == subgroup]
        lines = [f"{fields['name']}: {', '.join(fields['tags']) or subgroup}." for fields in own]
        yield own[0]["concept"].lower(), {"caption": "\n".join([f"{subgroup} ({own[0]['group']})", *lines])}


def write(folder: Path, name: str, rows: Iterable[tuple[str, Fields]]) -> Path:
    """Write one data set and return the path of its manifest."""
    with ShardWriter(folder, name, max_samples=1024) as writer:
        for key, fields in rows:
            writer.write(key, {"json": json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()})
    write_manifest(folder / f"{name}.manifest", writer.shards)
    return folder / f"{name}.manifest"


def build(output: Path) -> list[Path]:
    """Write shards, indexes and manifests; return the manifests for training the tokenizer."""
    seen, unseen = concepts("train"), concepts("heldout-concept")
    groups = sorted({fields["group"] for fields in seen})
    asked = [fields for fields in seen if share(f"held-out:{fields['concept']}") < HELD_OUT_SHARE]
    taught = [fields for fields in seen if fields not in asked]
    talked = write(output / "shards", "talks", talks(taught))
    write(output / "shards", "talks-heldout", talks(asked))
    write(output / "shards", "questions-heldout", questions(asked, groups))
    write(output / "shards", "pages-heldout", pages(unseen))
    write(output / "shards", "pairs", pairs(taught[:NUM_PAIRS], groups))
    write(output / "shards", "pairs-heldout", pairs(asked[: NUM_PAIRS // 2], groups))
    return [EMOJI / "train-text.manifest", talked]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent)
    folder = parser.parse_args().output
    manifests = build(folder)
    train_sentencepiece(
        manifests,
        folder / "tokenizer.model",
        VOCAB_SIZE,
        model_type=ModelType.UNIGRAM,
        character_coverage=0.99,
        special_tokens=CHAT_TOKENS,
    )
