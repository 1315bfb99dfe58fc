"""Template for dialogues: turns of named roles, of which the answers are learned.

    system: prefix, text, suffix | user: prefix, images and text, suffix | assistant: prefix, text, suffix, end | ...

A turn is ``{"role": ..., "content": ...}`` or, as in LLaVA's data, ``{"from": ..., "value": ...}``. A string content
refers to images by ``<image>`` (the next one) or ``<image-2>`` (the second). A list content refers to them by
``{"type": "image"}`` (the next one) or ``{"type": "image", "image": "0.png"}`` (by name); its items
``{"type": "text", "text": ...}`` are literal, so they can hold the word ``<image>``. Videos and sounds have the same
references with ``video`` and ``audio`` instead of ``image``, and numbers of their own. If no turn refers to any of
them, all come first in the first turn that is not the system's.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field, model_validator

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.io.strict import StrictConfig
from data_pipeline.order.randomness import Rng
from data_pipeline.sample import AudioPart, ImagePart, MediaPart, Sample
from data_pipeline.shards.pages import MAX_WEIGHT, weight_of
from data_pipeline.text.templates.base import (
    EndPiece,
    ImagesRule,
    LearnedText,
    Piece,
    TextPiece,
    TokenPiece,
    joined_texts,
    look_up,
    media_of,
    text,
)
from data_pipeline.text.templates.chat_formats import CHAT_FORMATS

SYSTEM, USER = "system", "user"
_MARKER = re.compile(r"<(image|video|audio)(?:-(\d+))?>")


class Role(StrictConfig):
    """Format and loss weight of the turns of a role."""

    prefix: str = ""
    """Text before the content of a turn. It is read, not learned."""
    prefix_before_image: str | None = None
    """Prefix of a turn that begins with an image; null for ``prefix`` (SmolVLM: ``User:`` instead of ``User: ``)."""
    lead: str = ""
    """Text between prefix and content that belongs to the answer: it has the content's weight, and a prompt ends before
    it. Formats whose prompt ends with ``ASSISTANT:`` and whose answer begins with a space have the space here."""
    suffix: str = ""
    """Text after the content of a turn, learned with the weight of the turn."""
    weight: float = Field(default=0.0, ge=0, le=MAX_WEIGHT)
    """Loss weight of each content token, 0 to 1e6; 0 is read, not learned. A ``weight`` in a turn multiplies it."""


@dataclass(frozen=True)
class _Reference:
    """A reference to an image, video or sound by its number from 1 or the name of its member; else to the next one."""

    kind: str
    """``image``, ``video`` or ``audio``."""
    number: int | None = None
    name: str | None = None


@dataclass(frozen=True)
class _Turn:
    role: str
    weight: float
    content: tuple[TextPiece | _Reference, ...]
    """Text pieces, whose weights multiply that of the turn, and references to media."""


class DialogueTemplate(LearnedText):
    """Turns of roles. The turns of roles with a weight above 0 are learned."""

    kind: Literal["dialogue"] = "dialogue"
    images: ImagesRule = "optional"
    """``required``: a dialogue without an image is a bad sample (fault kind ``no_image``). ``optional``: it is used."""
    field: str | None = None
    """Field with the list of turns. null: ``messages`` if the sample has it, else ``conversations``."""
    format: Literal["vicuna", "chatml", "llama3", "mistral", "gemma", "phi4"] | None = None
    """Chat format of a published model: default values of ``roles``, ``special_tokens``, ``end`` and ``strip``. null:
    Vicuna's ``USER: ... ASSISTANT: ...``, unless ``roles`` is set."""
    roles: dict[str, Role] = {name: Role(**role) for name, role in CHAT_FORMATS["vicuna"]["roles"].items()}  # noqa: RUF012
    """Format of each role, by name; at least one needs a weight above 0. This key replaces all roles of ``format``, and
    its ``special_tokens``."""
    aliases: dict[str, str] = {"human": USER, "gpt": "assistant"}  # noqa: RUF012  pydantic copies it
    """Other names of roles in the data: name to role."""
    special_tokens: tuple[str, ...] = ()
    """Names in prefixes and suffixes that are encoded as single tokens, such as ``<|im_start|>``. The content of a turn
    cannot produce them. Everything else in a prefix or suffix is plain text."""
    end: Literal["turn", "dialogue", "none"] = "turn"
    """Position of the tokenizer's end token: after each ``turn`` of a learned role, once at the end of the
    ``dialogue``, or ``none`` for formats whose suffix ends a turn."""
    strip: bool = False
    """Remove white space at the beginning and the end of each turn's content."""
    learn: Literal["all", "last"] = "all"
    """``all`` learns all turns of learned roles, ``last`` only the last one."""
    image_suffix: str = ""
    """Text after each image, read and not learned: a line break (InternVL, LLaVA). It is left out if the text after the
    image begins with it."""
    audio_prefix: str = ""
    """Text before each sound, read and not learned; ``{n}`` is its number in the dialogue, from 1 (Qwen2-Audio:
    ``Audio {n}: ``)."""
    audio_suffix: str = ""
    """Text after each sound, read and not learned: a line break (Qwen2-Audio)."""
    system: str | None = None
    """Content of a system turn for dialogues that do not begin with one. null adds none."""
    system_for: Literal["all", "text"] = "all"
    """Dialogues that get the turn ``system``: ``all``, or only those of ``text`` without images (Llama 3.2 Vision)."""
    joined: bool = False
    """Encode neighbouring texts of equal weight as one text, as the chat templates of ``transformers`` do. A tokenizer
    may join letters across the border of a prefix and a content, so the tokens can differ from those of the parts."""

    @property
    def requires_images(self) -> bool:
        return self.images == "required"

    @property
    def named_tokens(self) -> tuple[str, ...]:
        return self.special_tokens

    @model_validator(mode="before")
    @classmethod
    def _apply_format(cls, values: Any) -> Any:
        """Insert the values of ``format`` for keys that are not set. Custom roles need their own special tokens."""
        name = values.get("format") if isinstance(values, dict) else None
        if not isinstance(name, str) or name not in CHAT_FORMATS:
            return values
        defaults = CHAT_FORMATS[name]
        if "roles" in values:
            defaults = {key: value for key, value in defaults.items() if key != "special_tokens"}
        return {**defaults, **values}

    @model_validator(mode="after")
    def _check_roles(self) -> DialogueTemplate:
        if not any(role.weight for role in self.roles.values()):
            raise ValueError("roles: no role has a weight above 0, so nothing would be learned")
        absent = [name for name in self.aliases.values() if name not in self.roles]
        if absent and "aliases" in self.model_fields_set:
            raise ValueError(f"aliases: no role is called {absent[0]!r}; roles has {', '.join(self.roles)}")
        if self.system is not None and SYSTEM not in self.roles:
            raise ValueError("system: roles has no role 'system' for this turn")
        if "" in self.special_tokens:
            raise ValueError("special_tokens: a name is empty")
        written = "".join(f"{role.prefix}{role.prefix_before_image}{role.suffix}" for role in self.roles.values())
        unused = [name for name in self.special_tokens if name not in written]
        if unused:
            raise ValueError(f"special_tokens: {unused[0]!r} occurs in no prefix and no suffix")
        return self

    def pieces(self, sample: Sample, rng: Rng | None) -> list[Piece]:
        """Return the pieces of all turns, in order. Nothing is random.

        Raises:
            SampleError: a turn is malformed or has an unknown role, no turn is learned, or references and images do not
                match.
        """
        turns = self._turns(sample)
        learned = [number for number, turn in enumerate(turns) if self._weight(turn)]
        if not learned:
            raise SampleError("no turn of the dialogue is learned", kind=FaultKind.TEXT)
        not_learned = learned[:-1] if self.learn == "last" else []
        pieces, sounds = list[Piece](), itertools.count(1)
        weight = 0.0
        for number, (turn, content) in enumerate(zip(turns, _with_media(turns, sample), strict=True)):
            role = self.roles[turn.role]
            weight = 0.0 if number in not_learned else self._weight(turn)
            pieces += [*self._opening(role, content), *text(role.lead, weight)]
            for piece in self._spaced(content, sounds):
                pieces += text(piece.text, weight * piece.weight) if isinstance(piece, TextPiece) else [piece]
            pieces += self._marked(role.suffix, weight)
            if self.end == "turn" and role.weight:
                pieces.append(EndPiece(weight))
        if self.end == "dialogue":
            pieces.append(EndPiece(weight))
        return joined_texts(pieces) if self.joined else pieces

    def prompt(self, sample: Sample) -> list[Piece]:
        """Return the pieces before the last answer, and the prefix of the answering role."""
        turns = self._turns(sample)
        answers = [number for number, turn in enumerate(turns) if self.roles[turn.role].weight]
        # A dialogue that does not end with an answer is used completely.
        before = turns if not answers or answers[-1] < len(turns) - 1 else turns[: answers[-1]]
        pieces, sounds = list[Piece](), itertools.count(1)
        for turn, content in zip(before, _with_media(turns, sample), strict=False):
            role = self.roles[turn.role]
            pieces += [*self._opening(role, content), *text(role.lead)]
            for piece in self._spaced(content, sounds):
                pieces += text(piece.text) if isinstance(piece, TextPiece) else [piece]
            pieces += self._marked(role.suffix, 0.0)
            if self.end == "turn" and role.weight:
                pieces.append(EndPiece(0.0))
        answering = next(role for role in self.roles.values() if role.weight)
        pieces += self._marked(answering.prefix, 0.0)
        return joined_texts(pieces) if self.joined else pieces

    def question(self, words: str) -> dict[str, Any]:
        """Return the fields of a sample with one user turn ``words``, which may contain markers of media."""
        role = USER if USER in self.roles else next(name for name, role in self.roles.items() if not role.weight)
        return {self.field or "messages": [{"role": role, "content": words}]}

    @property
    def closing(self) -> tuple[str, ...]:
        """The first special token in the suffix of the first learned role, which ends an answer; empty without one."""
        answering = next(role for role in self.roles.values() if role.weight)
        names = [piece.name for piece in self._marked(answering.suffix, 0.0) if isinstance(piece, TokenPiece)]
        return tuple(names[:1])

    def _weight(self, turn: _Turn) -> float:
        return self.roles[turn.role].weight * turn.weight

    def _opening(self, role: Role, content: Sequence[TextPiece | MediaPart]) -> Iterator[TextPiece | TokenPiece]:
        """Return the prefix of a turn with this content."""
        begins_with_image = bool(content) and isinstance(content[0], ImagePart)
        other = role.prefix_before_image if begins_with_image else None
        return self._marked(role.prefix if other is None else other, 0.0)

    def _spaced(
        self, content: Sequence[TextPiece | MediaPart], sounds: Iterator[int]
    ) -> Iterator[TextPiece | MediaPart]:
        """Yield the content of a turn with the texts around its images and sounds; ``sounds`` numbers the latter."""
        for piece, after in itertools.zip_longest(content, content[1:]):
            if isinstance(piece, AudioPart):
                yield from text(self.audio_prefix.replace("{n}", str(next(sounds))))
                yield piece
                yield from text(self.audio_suffix)
                continue
            yield piece
            follows = isinstance(after, TextPiece) and after.text.startswith(self.image_suffix)
            if self.image_suffix and isinstance(piece, ImagePart) and not follows:
                yield TextPiece(self.image_suffix, 0.0)

    def _marked(self, affix: str, weight: float) -> Iterator[TextPiece | TokenPiece]:
        """Split a prefix or suffix into special tokens and text. Longer token names match first."""
        names = sorted(self.special_tokens, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, names))})", affix) if names else [affix]
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
        wants_system = self.system_for == "all" or not media_of(sample)
        if self.system is not None and wants_system and turns[0].role != SYSTEM:
            turns.insert(0, _Turn(SYSTEM, 1.0, (TextPiece(self.system, 1.0),)))
        return turns

    def _turn(self, number: int, item: Any) -> _Turn:
        if not isinstance(item, Mapping):
            raise SampleError(f"turn {number} is {item!r:.80}, expected an object", kind=FaultKind.TEXT)
        name = item.get("role", item.get("from"))
        role = self.aliases.get(name, name) if isinstance(name, str) else None
        if role not in self.roles:
            reason = f"turn {number} has the role {name!r:.80}; template.roles has {', '.join(self.roles)}"
            raise SampleError(reason, kind=FaultKind.TEXT)
        try:
            content = _parse_content(item.get("content", item.get("value")))
            if self.strip:
                content = _stripped(content)
            if not any(isinstance(piece, _Reference) or piece.text.strip() for piece in content):
                raise SampleError("the content is empty", kind=FaultKind.TEXT)
            return _Turn(role, weight_of(item), content)
        except SampleError as error:
            raise SampleError(f"turn {number} ({name}): {error.reason}", kind=FaultKind.TEXT) from error


LITERAL = DialogueTemplate(roles={USER: Role(), "assistant": Role(weight=1.0)}, end="none")
"""Template without prefixes, suffixes and end: a prompt is used as it is, with media at their markers."""


def _parse_content(content: Any) -> tuple[TextPiece | _Reference, ...]:
    """Parse the content of a turn: a string with markers, or a list of texts and references."""
    if isinstance(content, str):
        return tuple(_split(content))
    if not isinstance(content, list):
        raise SampleError(f"the content is {content!r:.80}, expected a string or a list", kind=FaultKind.TEXT)
    found: list[TextPiece | _Reference] = []
    for item in content:
        match item:
            case {"type": "text", "text": str(words)}:
                found.append(TextPiece(words, weight_of(item)))
            case {"type": "image" | "video" | "audio" as kind}:
                name = item.get(kind)
                found.append(_Reference(kind, name=name if isinstance(name, str) else None))
            case _:
                expected = '{"type": "text", "text": ...}, {"type": "image"}, {"type": "video"} or {"type": "audio"}'
                reason = f"an item of the content is {item!r:.80}, expected {expected}"
                raise SampleError(reason, kind=FaultKind.TEXT)
    return tuple(found)


def _stripped(content: Sequence[TextPiece | _Reference]) -> tuple[TextPiece | _Reference, ...]:
    """Return the content without white space at its beginning and end; texts that become empty there are removed."""
    kept = list(content)
    for end, strip in ((0, str.lstrip), (-1, str.rstrip)):
        while kept and isinstance(piece := kept[end], TextPiece):
            kept[end] = replace(piece, text=strip(piece.text))
            if kept[end] != TextPiece("", piece.weight):
                break
            del kept[end]
    return tuple(kept)


def _split(words: str) -> Iterator[TextPiece | _Reference]:
    """Split a string content at its markers."""
    done = 0
    for match in _MARKER.finditer(words):
        yield from text(words[done : match.start()], 1.0)
        yield _Reference(match[1], number=None if match[2] is None else int(match[2]))
        done = match.end()
    yield from text(words[done:], 1.0)


def _with_media(turns: Sequence[_Turn], sample: Sample) -> list[list[TextPiece | MediaPart]]:
    """Return the content of each turn with its references replaced by images, videos and sounds.

    Raises:
        SampleError: a reference has no image, video or sound, or there are references but not to all of them.
    """
    media = media_of(sample)
    references = [piece for turn in turns for piece in turn.content if isinstance(piece, _Reference)]
    if not references and media:
        first = next((number for number, turn in enumerate(turns) if turn.role != SYSTEM), 0)
        return [[*(media if number == first else ()), *_resolve(turn, {})] for number, turn in enumerate(turns)]
    referenced = dict[str, Iterator[MediaPart]]()
    for kind in ("image", "video", "audio"):
        parts = [part for part in media if part.kind == kind]
        found = _referenced(kind, [one for one in references if one.kind == kind], parts)
        num_referenced = len({id(part) for part in found})
        if num_referenced < len(parts):
            raise SampleError(f"the dialogue shows {num_referenced} of {len(parts)} {kind}s", kind=FaultKind.TEXT)
        referenced[kind] = iter(found)
    return [_resolve(turn, referenced) for turn in turns]


def _resolve(turn: _Turn, referenced: Mapping[str, Iterator[MediaPart]]) -> list[TextPiece | MediaPart]:
    """Return the content of a turn, with each reference replaced by the next part of its kind in ``referenced``."""
    return [piece if isinstance(piece, TextPiece) else next(referenced[piece.kind]) for piece in turn.content]


def _referenced(kind: str, references: Sequence[_Reference], parts: Sequence[MediaPart]) -> list[MediaPart]:
    """Return the part of each reference of one kind."""
    if len({(one.number is None, one.name is None) for one in references}) > 1:
        reason = (
            f"some {kind} references have a number or a name and others have another form; use one form in a dialogue"
        )
        raise SampleError(reason, kind=FaultKind.TEXT)
    by_name = {part.name: part for part in parts}
    referenced = []
    for position, one in enumerate(references, start=1):
        if one.name is not None:
            part = by_name.get(one.name.lower())
        else:
            number = position if one.number is None else one.number
            part = parts[number - 1] if 1 <= number <= len(parts) else None
        if part is None:
            wanted = one.name or f"number {position if one.number is None else one.number}"
            literal = f"; to write <{kind}> as text, give the content as a list: [{{type: text, text: ...}}]"
            raise SampleError(
                f"the dialogue shows {kind} {wanted}, and the sample has {len(parts)}: {', '.join(by_name) or 'none'}"
                f"{'' if one.name else literal}",
                kind=FaultKind.TEXT,
            )
        referenced.append(part)
    return referenced
