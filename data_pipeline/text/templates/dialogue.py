"""Dialogues: turns of named roles, of which the answers are learned.

    system: prefix, text, suffix | user: prefix, images and text, suffix | assistant: prefix, text, suffix, end | ...

Turns are ``{"role": ..., "content": ...}`` or, as LLaVA stores them, ``{"from": ..., "value": ...}``. Images stand
where a turn says ``<image>`` (the next one) or ``<image-2>`` (the second); where it lists its content, at
``{"type": "image"}``; and if no turn says so, all of them in the first turn that is not the system's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field, model_validator

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.io.strict import StrictConfig
from data_pipeline.order.randomness import Draws
from data_pipeline.sample import ImagePart, Sample
from data_pipeline.shards.pages import MAX_WEIGHT, weight_of
from data_pipeline.text.templates.base import (
    EndPiece,
    ImagesRule,
    LearnedText,
    Piece,
    TextPiece,
    TokenPiece,
    images_of,
    look_up,
    text,
)
from data_pipeline.text.templates.chat_formats import CHAT_FORMATS

SYSTEM, USER = "system", "user"
_MARKER = re.compile(r"<image(?:-(\d+))?>")


class Role(StrictConfig):
    """How the turns of a role are written."""

    prefix: str = ""
    """Before what is said; read only."""
    suffix: str = ""
    """After what is said; learned with it."""
    weight: float = Field(default=0.0, ge=0, le=MAX_WEIGHT)
    """Loss weight of each token of what is said; 0 is read only. A turn with a ``weight`` of its own is multiplied."""


@dataclass(frozen=True)
class _Reference:
    """A place for an image: by number from 1, by the name of its member, or, with neither, for the next one."""

    number: int | None = None
    name: str | None = None


@dataclass(frozen=True)
class _Turn:
    role: str
    weight: float
    content: tuple[TextPiece | _Reference, ...]
    """Texts with their weight relative to the turn's."""


class DialogueTemplate(LearnedText):
    """Turns of roles; what a role with a weight says is learned."""

    kind: Literal["dialogue"] = "dialogue"
    images: ImagesRule = "optional"
    """``required``: a dialogue without an image is a bad sample (fault kind ``no_image``)."""
    field: str | None = None
    """The list of turns; null: the field ``messages`` if the sample has it, else ``conversations``."""
    format: Literal["vicuna", "chatml", "llama3", "mistral", "gemma", "phi4"] | None = None
    """How a published model writes turns: ``roles``, ``special_tokens``, ``end`` and ``strip`` as far as they are not
    given. Null: Vicuna's ``USER: ... ASSISTANT: ...``, unless ``roles`` are given."""
    roles: dict[str, Role] = {name: Role(**role) for name, role in CHAT_FORMATS["vicuna"]["roles"].items()}  # noqa: RUF012
    """How each role is written. Given, it replaces all roles of the format."""
    aliases: dict[str, str] = {"human": USER, "gpt": "assistant"}  # noqa: RUF012  pydantic copies it
    """Other names of roles."""
    special_tokens: tuple[str, ...] = ()
    """Names in prefixes and suffixes that are tokens of the tokenizer, such as ``<|im_start|>``; what is said never
    gives them, however it is spelled. All else in a prefix is plain text."""
    end: Literal["turn", "dialogue", "none"] = "turn"
    """Where the tokenizer's end token stands: after each turn of a learned role, once at the end, or nowhere, for
    formats whose suffix says it."""
    strip: bool = False
    """Leave out white space before and after what is said."""
    learn: Literal["all", "last"] = "all"
    """All turns of the learned roles, or the last of them only."""
    system: str | None = None
    """A system turn for dialogues without one."""

    @property
    def requires_images(self) -> bool:
        return self.images == "required"

    @property
    def named_tokens(self) -> tuple[str, ...]:
        return self.special_tokens

    @model_validator(mode="before")
    @classmethod
    def _take_format(cls, values: Any) -> Any:
        """Writes the format out, key by key; roles of one's own have special tokens of their own."""
        name = values.get("format") if isinstance(values, dict) else None
        if not isinstance(name, str) or name not in CHAT_FORMATS:
            return values
        taken = CHAT_FORMATS[name]
        if "roles" in values:
            taken = {key: value for key, value in taken.items() if key != "special_tokens"}
        return {**taken, **values}

    @model_validator(mode="after")
    def _check_roles(self) -> DialogueTemplate:
        if not any(role.weight for role in self.roles.values()):
            raise ValueError("roles: none has a weight above 0, so nothing would be learned")
        absent = [name for name in self.aliases.values() if name not in self.roles]
        if absent and "aliases" in self.model_fields_set:
            raise ValueError(f"aliases: no role is called {absent[0]!r}; roles has {', '.join(self.roles)}")
        if self.system is not None and SYSTEM not in self.roles:
            raise ValueError("system: roles has no role 'system' to say it")
        if "" in self.special_tokens:
            raise ValueError("special_tokens: a name is empty")
        written = "".join(role.prefix + role.suffix for role in self.roles.values())
        unused = [name for name in self.special_tokens if name not in written]
        if unused:
            raise ValueError(f"special_tokens: {unused[0]!r} stands in no prefix and no suffix")
        return self

    def pieces(self, sample: Sample, rng: Draws | None) -> list[Piece]:
        """Turn after turn.

        Raises:
            SampleError: a turn is malformed or of no known role, nothing is learned, or images and places for them
                differ.
        """
        turns = self._turns(sample)
        learned = [number for number, turn in enumerate(turns) if self._weight(turn)]
        if not learned:
            raise SampleError("no turn of the dialogue is learned", kind=FaultKind.TEXT)
        forgotten = learned[:-1] if self.learn == "last" else []
        pieces: list[Piece] = []
        weight = 0.0
        for number, (turn, content) in enumerate(zip(turns, _placed(turns, sample), strict=True)):
            role = self.roles[turn.role]
            weight = 0.0 if number in forgotten else self._weight(turn)
            pieces += self._marked(role.prefix, 0.0)
            for piece in content:
                pieces += [piece] if isinstance(piece, ImagePart) else text(piece.text, weight * piece.weight)
            pieces += self._marked(role.suffix, weight)
            if self.end == "turn" and role.weight:
                pieces.append(EndPiece(weight))
        return [*pieces, EndPiece(weight)] if self.end == "dialogue" else pieces

    def prompt(self, sample: Sample) -> list[Piece]:
        """Everything before the last answer, and the prefix that asks for it."""
        turns = self._turns(sample)
        answers = [number for number, turn in enumerate(turns) if self.roles[turn.role].weight]
        kept = turns if not answers or answers[-1] < len(turns) - 1 else turns[: answers[-1]]
        pieces: list[Piece] = []
        for turn, content in zip(kept, _placed(turns, sample), strict=False):
            role = self.roles[turn.role]
            said = [one for piece in content for one in ([piece] if isinstance(piece, ImagePart) else text(piece.text))]
            pieces += [*self._marked(role.prefix, 0.0), *said, *self._marked(role.suffix, 0.0)]
            if self.end == "turn" and role.weight:
                pieces.append(EndPiece(0.0))
        asked = next(role for role in self.roles.values() if role.weight)
        return [*pieces, *self._marked(asked.prefix, 0.0)]

    def question(self, words: str) -> dict[str, Any]:
        """Fields of a sample whose prompt asks ``words``, with images where they say ``<image>``."""
        role = USER if USER in self.roles else next(name for name, role in self.roles.items() if not role.weight)
        return {self.field or "messages": [{"role": role, "content": words}]}

    @property
    def closing(self) -> tuple[str, ...]:
        """The special token, if any, that comes first behind what a learned role says: it ends an answer."""
        asked = next(role for role in self.roles.values() if role.weight)
        names = [piece.name for piece in self._marked(asked.suffix, 0.0) if isinstance(piece, TokenPiece)]
        return tuple(names[:1])

    def _weight(self, turn: _Turn) -> float:
        return self.roles[turn.role].weight * turn.weight

    def _marked(self, written: str, weight: float) -> Iterator[TextPiece | TokenPiece]:
        """Text with its special tokens; a longer name wins."""
        names = sorted(self.special_tokens, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, names))})", written) if names else [written]
        for part in parts:
            if part in names:
                yield TokenPiece(part, weight)
            elif part:
                yield TextPiece(part, weight)

    def _turns(self, sample: Sample) -> list[_Turn]:
        name = self.field or ("conversations" if sample.fields.get("messages") is None else "messages")
        listed = look_up(name, sample.fields)
        if not isinstance(listed, list) or not listed:
            raise SampleError(f"field {name!r} is {listed!r:.80}, expected a list of turns", kind=FaultKind.TEXT)
        turns = [self._turn(number, item) for number, item in enumerate(listed, start=1)]
        if self.system is not None and turns[0].role != SYSTEM:
            turns.insert(0, _Turn(SYSTEM, 1.0, (TextPiece(self.system, 1.0),)))
        return turns

    def _turn(self, number: int, item: Any) -> _Turn:
        if not isinstance(item, Mapping):
            raise SampleError(f"turn {number} is {item!r:.80}, expected an object", kind=FaultKind.TEXT)
        name = item.get("role", item.get("from"))
        role = self.aliases.get(name, name) if isinstance(name, str) else None
        if role not in self.roles:
            reason = f"turn {number} is of the role {name!r:.80}; template.roles has {', '.join(self.roles)}"
            raise SampleError(reason, kind=FaultKind.TEXT)
        try:
            content = _content(item.get("content", item.get("value")))
            if self.strip:
                content = _stripped(content)
            if not any(isinstance(piece, _Reference) or piece.text.strip() for piece in content):
                raise SampleError("nothing is said", kind=FaultKind.TEXT)
            return _Turn(role, weight_of(item), content)
        except SampleError as error:
            raise SampleError(f"turn {number} ({name}): {error.reason}", kind=FaultKind.TEXT) from error


LITERAL = DialogueTemplate(roles={USER: Role(), "assistant": Role(weight=1.0)}, end="none")
"""Nothing but what is said: a prompt as it stands, with images where it says ``<image>``."""


def _content(content: Any) -> tuple[TextPiece | _Reference, ...]:
    """What a turn says: a string with markers, or a list of texts and images."""
    if isinstance(content, str):
        return tuple(_split(content))
    if not isinstance(content, list):
        raise SampleError(f"it says {content!r:.80}, expected a string or a list", kind=FaultKind.TEXT)
    found: list[TextPiece | _Reference] = []
    for item in content:
        match item:
            case {"type": "text", "text": str(words)}:
                found.append(TextPiece(words, weight_of(item)))
            case {"type": "image", "image": str(name)}:
                found.append(_Reference(name=name))
            case {"type": "image"}:
                found.append(_Reference())
            case _:
                reason = f'it says {item!r:.80}, expected {{"type": "text", "text": ...}} or {{"type": "image"}}'
                raise SampleError(reason, kind=FaultKind.TEXT)
    return tuple(found)


def _stripped(content: Sequence[TextPiece | _Reference]) -> tuple[TextPiece | _Reference, ...]:
    """The content without white space at either end; a text that holds nothing else goes."""
    kept = list(content)
    for place, strip in ((0, str.lstrip), (-1, str.rstrip)):
        while kept and isinstance(piece := kept[place], TextPiece):
            kept[place] = replace(piece, text=strip(piece.text))
            if kept[place] != TextPiece("", piece.weight):
                break
            del kept[place]
    return tuple(kept)


def _split(words: str) -> Iterator[TextPiece | _Reference]:
    done = 0
    for match in _MARKER.finditer(words):
        yield from text(words[done : match.start()], 1.0)
        yield _Reference(number=None if match[1] is None else int(match[1]))
        done = match.end()
    yield from text(words[done:], 1.0)


def _placed(turns: Sequence[_Turn], sample: Sample) -> list[list[TextPiece | ImagePart]]:
    """What each turn says, its images in their places.

    Raises:
        SampleError: an image has no place, or a place no image.
    """
    images = images_of(sample)
    references = [piece for turn in turns for piece in turn.content if isinstance(piece, _Reference)]
    if not references and images:
        first = next((number for number, turn in enumerate(turns) if turn.role != SYSTEM), 0)
        return [[*(images if number == first else ()), *_said(turn, iter(()))] for number, turn in enumerate(turns)]
    chosen = _chosen(references, images)
    order = iter(chosen)
    placed = [_said(turn, order) for turn in turns]
    if len({id(image) for image in chosen}) < len(images):
        raise SampleError(f"the dialogue shows {len(chosen)} of {len(images)} images", kind=FaultKind.TEXT)
    return placed


def _said(turn: _Turn, images: Iterator[ImagePart]) -> list[TextPiece | ImagePart]:
    return [piece if isinstance(piece, TextPiece) else next(images) for piece in turn.content]


def _chosen(references: Sequence[_Reference], images: Sequence[ImagePart]) -> list[ImagePart]:
    """The image of each place."""
    if len({(one.number is None, one.name is None) for one in references}) > 1:
        reason = "images are shown by number or name in one place and in order in another; use one way"
        raise SampleError(reason, kind=FaultKind.TEXT)
    by_name = {image.name: image for image in images}
    chosen = []
    for place, one in enumerate(references, start=1):
        if one.name is not None:
            image = by_name.get(one.name.lower())
        else:
            number = place if one.number is None else one.number
            image = images[number - 1] if 1 <= number <= len(images) else None
        if image is None:
            asked = one.name or f"number {place if one.number is None else one.number}"
            raise SampleError(
                f"the dialogue shows image {asked}, and the sample has {len(images)}: {', '.join(by_name) or 'none'}",
                kind=FaultKind.TEXT,
            )
        chosen.append(image)
    return chosen
