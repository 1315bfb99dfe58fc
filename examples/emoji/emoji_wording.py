"""What is said about a concept: captions, text-only documents, and text between pictures."""

from __future__ import annotations

from typing import Any

from emoji_concepts import Concept, share

_NUMBERS = {2: "Two", 3: "Three", 4: "Four"}


def with_article(concept: Concept) -> str:
    """``a red apple``, ``an owl``, but ``grapes`` and ``information`` as they are."""
    name = concept.name
    last = name.split()[-1]
    plural = last.endswith("s") and not last.endswith(("ss", "us"))
    if concept.group == "symbols" or plural or not name[0].isalpha() or " with " in name or " in " in name:
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def captions(concept: Concept) -> list[str]:
    """The same fact in several wordings, the plain name first; other languages last."""
    name = concept.name
    worded = [name, with_article(concept), f"{concept.group}: {name}", f"{concept.subgroup}: {name}"]
    hints = sorted((tag for tag in concept.tags if tag not in name), key=lambda tag: share(concept.code + tag))[:3]
    if hints:
        worded.append(f"{name} ({', '.join(hints)})")
    worded += [f"{language}: {text}" for language, text in concept.names.items()]
    return list(dict.fromkeys(worded))


def record(concept: Concept, style: str) -> dict[str, Any]:
    """The JSON member of a picture."""
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
    """A line about a concept in a text-only document."""
    line = f"{with_article(concept)}: {', '.join(concept.tags) or concept.subgroup}."
    if concept.names:
        line += " " + "; ".join(f"{language}: {text}" for language, text in concept.names.items()) + "."
    return line


def page(concepts: list[Concept]) -> str:
    """A text-only document: concepts of one subgroup, a line each."""
    first = concepts[0]
    lines = [f"{first.subgroup} ({first.group})", *(definition(concept) for concept in concepts)]
    return "\n".join(lines)


def interleaved(concepts: list[Concept], members: list[str]) -> dict[str, Any]:
    """JSON of a document that shows several pictures of one subgroup with text between them."""
    parts: list[dict[str, str]] = [{"text": f"{_NUMBERS[len(concepts)]} of {concepts[0].subgroup}:\n"}]
    for concept, member in zip(concepts, members, strict=True):
        parts += [{"image": member}, {"text": f"{with_article(concept)}\n"}]
    return {"concepts": [concept.code for concept in concepts], "parts": parts}
