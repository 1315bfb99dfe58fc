"""Load the concepts, with their names and images, and split them into training and held-out concepts.

A concept is an emoji's base code (``unified``, "1F34E"); skin-tone variants belong to their base. The sha256 of the
code decides whether a concept is held out, so it is held out in every style and every language.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = {
    "twitter": "emoji-datasource-twitter-16.0.0",
    "google": "emoji-datasource-google-16.0.0",
    "labels": "emojibase-data-17.0.0",
    "fluent-3d": "lobehub-fluent-emoji-3d-1.1.0",
    "fluent-flat": "lobehub-fluent-emoji-flat-1.1.0",
    "openmoji": "openmoji-17.0.0",
}
"""Folder of each unpacked package, named as the archive that ``npm pack`` writes."""

PICTURES = {
    "twitter": ("img/twitter/64", "png"),
    "google": ("img/google/64", "png"),
    "fluent-3d": ("assets", "webp"),
    "fluent-flat": ("assets", "svg"),
    "openmoji": ("color/svg", "svg"),
}
"""Folder and extension of the images of each style."""

LANGUAGES = ("de", "es", "fr", "it", "ja", "pt", "ru", "zh")
UNSEEN_SHARE = 0.1
NAMED_SHARE = 0.2
NUM_QUICK = 256
MAX_TAGS = 8

# Flags are a seventh of all images, and many differ only by a shade or by the order of their stripes.
LEFT_OUT_GROUP = "flags"

QUICK_GROUPS = frozenset({"animals & nature", "food & drink", "travel & places", "activities", "objects"})
QUICK_SUBGROUPS = frozenset({"costumed & creatures", "body parts"})
# Images that differ only in a detail: clock faces, phases of the moon, four mailboxes.
NOT_QUICK = re.compile(r"o.clock|-thirty|moon|mailbox")


@dataclass(frozen=True)
class Concept:
    """One emoji with its texts and its image file in every style."""

    code: str
    name: str
    group: str
    subgroup: str
    tags: tuple[str, ...]
    names: dict[str, str]
    pictures: dict[str, Path]

    @property
    def is_unseen(self) -> bool:
        """Whether the concept is held out from training, in every style and language."""
        return share(self.code) < UNSEEN_SHARE

    @property
    def may_be_quick(self) -> bool:
        """Whether the quickstart may use the concept: a distinct object, not a sign, letter, face or role."""
        fits = self.group in QUICK_GROUPS or self.subgroup in QUICK_SUBGROUPS
        return fits and NOT_QUICK.search(self.name) is None


def share(text: str) -> float:
    """Return a number in [0, 1) that depends only on ``text``: the first 8 bytes of its sha256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def normal(code: str) -> str:
    """Return a code without variation selectors, which do not change the image."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def load_concepts(packages: Path) -> list[Concept]:
    """Return all concepts, except flags, with a label and an image in all five styles, sorted by code."""
    listing = json.loads((packages / PACKAGES["twitter"] / "emoji.json").read_text())
    labels_folder = packages / PACKAGES["labels"]
    labels = _labels(labels_folder / "en" / "data.json")
    messages = json.loads((labels_folder / "en" / "messages.json").read_text())
    groups = {entry["order"]: entry["message"].lower() for entry in messages["groups"]}
    subgroups = {entry["order"]: entry["message"].lower() for entry in messages["subgroups"]}
    others = {language: _labels(labels_folder / language / "data.json") for language in LANGUAGES}
    pictures = {
        style: {normal(path.stem): path for path in sorted((packages / PACKAGES[style] / folder).glob(f"*.{ext}"))}
        for style, (folder, ext) in PICTURES.items()
    }
    concepts = []
    for code in sorted(entry["unified"] for entry in listing if entry["category"] != "Component"):
        plain = normal(code)
        if plain not in labels or any(plain not in files for files in pictures.values()):
            continue
        label = labels[plain]
        if groups[label["group"]] == LEFT_OUT_GROUP:
            continue
        named = share("names:" + code) < NAMED_SHARE
        concepts.append(
            Concept(
                code=code,
                name=label["label"].lower(),
                group=groups[label["group"]],
                subgroup=subgroups[label["subgroup"]],
                tags=tuple(label.get("tags", ()))[:MAX_TAGS],
                names={lang: known[plain]["label"] for lang, known in others.items() if named and plain in known},
                pictures={style: files[plain] for style, files in pictures.items()},
            )
        )
    _check_names(concepts)
    return concepts


def quick_codes(concepts: list[Concept], count: int = NUM_QUICK) -> frozenset[str]:
    """Return the codes of the quickstart: the ``count`` eligible training concepts with the lowest hash."""
    eligible = sorted(
        (concept.code for concept in concepts if concept.may_be_quick and not concept.is_unseen),
        key=share,
    )
    return frozenset(eligible[:count])


def _labels(path: Path) -> dict[str, Any]:
    return {normal(entry["hexcode"]): entry for entry in json.loads(path.read_text())}


def _check_names(concepts: list[Concept]) -> None:
    """Raise ValueError if two concepts have one name: the evaluation chooses the right name among others."""
    owner: dict[str, str] = {}
    for concept in concepts:
        other = owner.setdefault(concept.name, concept.code)
        if other != concept.code:
            raise ValueError(f"{other} and {concept.code} are both called {concept.name!r}")
