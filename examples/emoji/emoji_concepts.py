"""Which concepts there are, what they are called, and which are for training.

A concept is an emoji's base code (``unified``, "1F34E"); skin-tone variants belong to their base. Its place in the
split is decided by the sha256 of that code alone, so it falls on the same side in every style and every language.
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
"""Folder of each unpacked package; ``npm pack`` names its archives so."""

PICTURES = {
    "twitter": ("img/twitter/64", "png"),
    "google": ("img/google/64", "png"),
    "fluent-3d": ("assets", "webp"),
    "fluent-flat": ("assets", "svg"),
    "openmoji": ("color/svg", "svg"),
}
"""Where each style keeps its pictures."""

LANGUAGES = ("de", "es", "fr", "it", "ja", "pt", "ru", "zh")
UNSEEN_SHARE = 0.1
NAMED_SHARE = 0.2
NUM_QUICK = 256
MAX_TAGS = 8

# A seventh of all pictures, and many differ by a shade or by the order of their stripes.
LEFT_OUT_GROUP = "flags"

QUICK_GROUPS = frozenset({"animals & nature", "food & drink", "travel & places", "activities", "objects"})
QUICK_SUBGROUPS = frozenset({"costumed & creatures", "body parts"})
# Pictures that differ in a detail only: clock faces, phases of the moon, four mailboxes.
NOT_QUICK = re.compile(r"o.clock|-thirty|moon|mailbox")


@dataclass(frozen=True)
class Concept:
    """One emoji with its texts and the picture file of every style."""

    code: str
    name: str
    group: str
    subgroup: str
    tags: tuple[str, ...]
    names: dict[str, str]
    pictures: dict[str, Path]

    @property
    def is_unseen(self) -> bool:
        """Never trained on, in no style and no language."""
        return share(self.code) < UNSEEN_SHARE

    @property
    def may_be_quick(self) -> bool:
        """Single and distinct enough for the quickstart: no sign, letter, face or person in a role."""
        fits = self.group in QUICK_GROUPS or self.subgroup in QUICK_SUBGROUPS
        return fits and NOT_QUICK.search(self.name) is None


def share(text: str) -> float:
    """A number in [0, 1) that only depends on ``text``: the first 8 bytes of its sha256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def normal(code: str) -> str:
    """Codes with and without variation selectors name the same picture."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def load_concepts(packages: Path) -> list[Concept]:
    """Every concept but the flags that has a label and a picture in all five styles, in the order of its code."""
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
    """The quickstart's concepts: of those that may be, the ``count`` trained ones with the lowest hash."""
    able = sorted(
        (concept.code for concept in concepts if concept.may_be_quick and not concept.is_unseen),
        key=share,
    )
    return frozenset(able[:count])


def _labels(path: Path) -> dict[str, Any]:
    return {normal(entry["hexcode"]): entry for entry in json.loads(path.read_text())}


def _check_names(concepts: list[Concept]) -> None:
    """A score that picks the right name among others needs names that are not shared."""
    owner: dict[str, str] = {}
    for concept in concepts:
        other = owner.setdefault(concept.name, concept.code)
        if other != concept.code:
            raise ValueError(f"{other} and {concept.code} are both called {concept.name!r}")
