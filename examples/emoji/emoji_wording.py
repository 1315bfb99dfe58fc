"""Write the texts about concepts: captions, text-only documents, text between images, and dialogues."""

from __future__ import annotations

from typing import Any

from emoji_concepts import Concept, share

_NUMBERS = {2: "Two", 3: "Three", 4: "Four"}


def with_article(concept: Concept) -> str:
    """Return the name with its article, ``a red apple`` or ``an owl``; plurals and symbols have none."""
    name = concept.name
    last = name.split()[-1]
    plural = last.endswith("s") and not last.endswith(("ss", "us"))
    if concept.group == "symbols" or plural or not name[0].isalpha() or " with " in name or " in " in name:
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def captions(concept: Concept) -> list[str]:
    """Return captions of a concept in several wordings: the plain name first, other languages last."""
    name = concept.name
    worded = [name, with_article(concept), f"{concept.group}: {name}", f"{concept.subgroup}: {name}"]
    hints = sorted((tag for tag in concept.tags if tag not in name), key=lambda tag: share(concept.code + tag))[:3]
    if hints:
        worded.append(f"{name} ({', '.join(hints)})")
    worded += [f"{language}: {text}" for language, text in concept.names.items()]
    return list(dict.fromkeys(worded))


def record(concept: Concept, style: str) -> dict[str, Any]:
    """Return the fields of an image's JSON member."""
    fields: dict[str, Any] = {
        "concept": concept.code,
        "name": concept.name,
        "group": concept.group,
        "subgroup": concept.subgroup,
        "style": style,
        "tags": list(concept.tags),
        "captions": captions(concept),
    }
    if concept.names:
        fields["names"] = concept.names
    return fields


def definition(concept: Concept) -> str:
    """Return the line about a concept in a text-only document."""
    line = f"{with_article(concept)}: {', '.join(concept.tags) or concept.subgroup}."
    if concept.names:
        line += " " + "; ".join(f"{language}: {text}" for language, text in concept.names.items()) + "."
    return line


def page(concepts: list[Concept]) -> str:
    """Return a text-only document: one line for each concept of a subgroup."""
    first = concepts[0]
    lines = [f"{first.subgroup} ({first.group})", *(definition(concept) for concept in concepts)]
    return "\n".join(lines)


def interleaved(concepts: list[Concept], members: list[str]) -> dict[str, Any]:
    """Return the JSON of a document of several images of one subgroup with text between them."""
    parts: list[dict[str, str]] = [{"text": f"{_NUMBERS[len(concepts)]} of {concepts[0].subgroup}:\n"}]
    for concept, member in zip(concepts, members, strict=True):
        parts += [{"image": member}, {"text": f"{with_article(concept)}\n"}]
    return {"concepts": [concept.code for concept in concepts], "parts": parts}


def dialogue(concepts: list[Concept], style: str) -> dict[str, Any]:
    """Return the JSON of a dialogue about each image, and of dialogues of one question about all of them."""
    asked = []
    for number, concept in enumerate(concepts):
        asked.append(("<image>\nAnd this?" if number else "<image>\nWhat is this?", with_article(concept)))
        asked.append(("Which words go with it?", ", ".join(concept.tags) or concept.subgroup))
    names = " and ".join(map(with_article, concepts))
    alone = [("What do you see?", names), ("Which group?", concepts[0].group), ("What kind?", concepts[0].subgroup)]
    return {
        "concepts": [concept.code for concept in concepts],
        "style": style,
        "messages": [turn for pair in asked for turn in turns(*pair)],
        "annotations": [{"messages": turns(*pair)} for pair in alone],
    }


def turns(question: str, answer: str) -> list[dict[str, str]]:
    """Return a question of the user and the answer of the assistant as turns."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
