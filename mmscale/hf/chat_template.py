"""Convert the chat template of a Hugging Face folder to a ``dialogue`` template.

    probe conversations --chat_render--> texts --compare--> prefix, lead and suffix of each role --check--> template

A chat template is a program; ours is a few strings. The strings follow from the texts between the known contents of the
probe conversations. The result is accepted only if it writes every probe conversation as the program does. No Jinja
runs after the import.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_pipeline.errors import SampleError
from data_pipeline.sample import AudioPart, ImagePart, MediaPart, Provenance, Sample, VideoPart
from data_pipeline.text.templates import DialogueTemplate, EndPiece, TextPiece, TokenPiece
from data_pipeline.text.templates.chat_formats import CHAT_FORMATS

_SECONDS = 30
_USER, _ANSWER, _SECOND, _LAST, _SYSTEM = "Kdxuqa", "Kdxaqa", "Kdxuqb", "Kdxaqb", "Kdxsqa"
"""Contents of the probe conversations. No template contains these words."""
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class ChatFormat:
    """Result of ``derive_format``.

    Attributes:
        template: Values of a ``dialogue`` template; None if the chat template cannot be expressed.
        begins: Whether rendered conversations begin with the tokenizer's begin token.
        notes: A sentence for each difference from the chat template.
    """

    template: dict[str, Any] | None
    begins: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Probe:
    """A conversation and what the chat template makes of it.

    Attributes:
        messages: The turns.
        prompt: Whether it ends with the beginning of an answer.
        text: The rendered text; None if the template raised.
        error: Message of the template if it raised.
        about: What the probe tests beyond plain turns, a key of ``_NOTES``; empty for nothing.
    """

    messages: Messages
    prompt: bool
    about: str = ""
    text: str | None = None
    error: str = ""

    @property
    def media(self) -> tuple[MediaPart, ...]:
        """The images, videos and sounds of the conversation."""
        contents = [item for turn in self.messages for item in turn["content"] if isinstance(turn["content"], list)]
        parts: dict[str, type[ImagePart | VideoPart | AudioPart]] = {
            "image": ImagePart,
            "video": VideoPart,
            "audio": AudioPart,
        }
        kinds = [item["type"] for item in contents if item["type"] in parts]
        return tuple(parts[kind](b"", f"{number}.{kind}") for number, kind in enumerate(kinds))


@dataclass(frozen=True)
class _Names:
    """Names of the tokenizer: begin, end and all added tokens; the texts of an image, video and sound in a rendered
    conversation."""

    begin: str
    end: str
    added: tuple[str, ...]
    image: str | None
    special: Mapping[str, str] = field(default_factory=dict)
    video: str | None = None
    sound: str | None = None


class _CannotExpressError(Exception):
    """The chat template does something that a ``dialogue`` template cannot."""


def derive_format(
    source: str,
    names: Mapping[str, str],
    added_tokens: Sequence[str],
    image: str | None = None,
    video: str | None = None,
    sound: str | None = None,
) -> ChatFormat:
    """Return the dialogue template that writes conversations as a chat template does.

    Args:
        source: The chat template, a Jinja program. It is rendered in a process with limited time and memory.
        names: Special tokens of the tokenizer: ``bos_token``, ``eos_token`` and others.
        added_tokens: Names that the tokenizer finds in any text and encodes as one token.
        image: Text that the chat template writes for an image; None for a model without images.
        video: Text that it writes for a video; None for a model without videos.
        sound: The tokens that it writes for a sound; None for a model that takes no sound.
    """
    known = _Names(names.get("bos_token", ""), names.get("eos_token", ""), tuple(added_tokens), image, names)
    known = replace(known, video=video, sound=sound)
    now = datetime.now()
    reasons: list[str] = []
    kinds = [kind for kind, written in (("image", image), ("audio", sound)) if written]
    for listed in (True, False) if kinds else (False, True):
        try:
            probes = _rendered(source, known, _probes(listed, kinds, with_videos=video is not None), now)
            found = _derive(probes, known)
        except _CannotExpressError as error:
            reasons.append(str(error))
            continue
        if "strftime_now" in source:
            later = _rendered(source, known, [_Probe(p.messages, p.prompt) for p in probes], now + timedelta(days=400))
            if [probe.text for probe in later] != [probe.text for probe in probes]:
                dated = (
                    f"the chat template writes the current date; the template keeps that of the import, {now:%d %b %Y}"
                )
                return ChatFormat(found.template, found.begins, (*found.notes, dated))
        return found
    return ChatFormat(None, notes=(f"the chat template cannot be expressed as a dialogue template: {reasons[0]}",))


def _probes(listed: bool, kinds: Sequence[str], with_videos: bool) -> list[_Probe]:
    """Return the conversations.

    Args:
        listed: Whether contents are lists of texts, images and sounds; else they are strings.
        kinds: Types of the items besides text: ``image``, ``audio``.
        with_videos: Whether there are videos, too.
    """

    def content(words: str, count: int = 0, last: bool = False, kind: str = "image") -> Any:
        if not listed:
            return words
        text, shown = [{"type": "text", "text": words}], [{"type": kind}] * count
        return [*text, *shown] if last else [*shown, *text]

    def turns(*contents: Any, system: bool = False) -> Messages:
        roles = [*(["system"] if system else []), *(["user", "assistant"] * len(contents))]
        return [{"role": role, "content": one} for role, one in zip(roles, contents, strict=False)]

    u, a, b, z, s = (content(words) for words in (_USER, _ANSWER, _SECOND, _LAST, _SYSTEM))
    found = [
        _Probe(turns(u), False),
        _Probe(turns(u), True),
        _Probe(turns(u, a), False, "end"),
        _Probe(turns(u, a, b), True),
        _Probe(turns(u, a, b, z), False, "end"),
        _Probe(turns(u, a, b, z, u), True),
        _Probe(turns(s, u, system=True), True, "system"),
        _Probe(turns(s, u, a, b, system=True), True, "system"),
        _Probe(turns(content(f"  {_USER} {_ANSWER}\n")), True, "space"),
        _Probe(turns(u, content(f" \n{_ANSWER}  "), b), True, "space"),
    ]
    for kind in kinds if listed else ():
        shown, later = content(_USER, 1, kind=kind), content(_SECOND, 1, kind=kind)
        found += [
            _Probe(turns(shown), True, kind),
            _Probe(turns(shown, a, b), True, kind),
            _Probe(turns(u, a, later), True, kind),
            _Probe(turns(content(_USER, 2, kind=kind), a, later), True, kind),
            _Probe(turns(s, shown, system=True), True, "system"),
            _Probe(turns(content(_USER, 1, last=True, kind=kind)), True, "order" if kind == "image" else kind),
        ]
    if with_videos and listed:
        video, picture, words = {"type": "video"}, {"type": "image"}, {"type": "text", "text": _USER}
        found += [
            _Probe(turns([video, words]), True, "video"),
            _Probe(turns([video, words], a, b), True, "video"),
            _Probe(turns([picture, video, words], a, [video, *content(_SECOND)]), True, "video"),
        ]
    return found


def _rendered(source: str, names: _Names, probes: list[_Probe], now: datetime) -> list[_Probe]:
    task = {
        "template": source,
        "names": dict(names.special),
        "now": now.isoformat(),
        "conversations": [{"messages": probe.messages, "prompt": probe.prompt} for probe in probes],
    }
    command = [sys.executable, "-I", str(Path(__file__).with_name("chat_render.py"))]
    try:
        done = subprocess.run(
            command, input=json.dumps(task).encode(), capture_output=True, timeout=_SECONDS, check=True
        )
    except (subprocess.SubprocessError, OSError) as error:
        raise _CannotExpressError(
            f"it cannot be rendered in {_SECONDS} seconds and 1 GiB ({type(error).__name__})"
        ) from error
    results = json.loads(done.stdout)
    return [
        _Probe(probe.messages, probe.prompt, probe.about, one.get("text"), one.get("error", ""))
        for probe, one in zip(probes, results, strict=True)
    ]


def _derive(probes: list[_Probe], names: _Names) -> ChatFormat:
    """Return the simplest template that passes.

    Raises:
        _CannotExpressError: no template writes the plain conversations as the chat template does.
    """
    if missing := next((probe for probe in probes if probe.text is None and probe.about in ("", "end")), None):
        raise _CannotExpressError(missing.error)
    reason, passed = "", list[ChatFormat]()
    for begins in (True, False) if names.begin and (probes[0].text or "").startswith(names.begin) else (False,):
        try:
            values = _strings(probes, names, begins)
        except _CannotExpressError as error:
            reason = reason or str(error)
            continue
        values |= _around_images(probes, values, names, begins) | _around_sounds(probes, names)
        found = _best(_candidates(values, names), probes, names, begins)
        passed += [] if found is None else [found]
        reason = reason or "its text does not follow from the roles and contents of the turns alone"
    if not passed:
        raise _CannotExpressError(reason)
    return min(passed, key=lambda one: len(one.notes))


def _strings(probes: list[_Probe], names: _Names, begins: bool) -> dict[str, Any]:
    """Return ``roles``, ``system`` and ``end``, from the texts between the contents."""
    texts = [(probe.text or "").removeprefix(names.begin if begins else "") for probe in probes]
    ends, asks = _between(texts[0], (_USER,)), _between(texts[1], (_USER,))
    head, to_answer, to_user, again, tail = _between(texts[4], (_USER, _ANSWER, _SECOND, _LAST))
    # Qwen 3 writes an empty block of thoughts before the last answer only; the probes then fail as "end".
    if not (to_answer.startswith(asks[1]) and again.startswith(asks[1])):
        raise _CannotExpressError("what it writes before an answer differs from the prompt of an answer")
    if not to_user.startswith(tail):
        raise _CannotExpressError("the end of an answer depends on its position")
    prefix, closing = to_user[len(tail) :], tail
    if not head.endswith(prefix):  # OLMo 2 writes a line break after each answer but the last.
        prefix = next(prefix[start:] for start in range(len(prefix) + 1) if head.endswith(prefix[start:]))
        closing = to_user.removesuffix(prefix)
    if not prefix and head:
        raise _CannotExpressError("what it writes before the first question differs from that before later ones")
    default = head.removesuffix(prefix)
    after = ends[1] if asks[1].startswith(ends[1]) else ""
    by_turn = bool(names.end) and closing.endswith(names.end)
    roles: dict[str, Any] = {
        "user": {"prefix": prefix, "suffix": after},
        "assistant": {
            "prefix": asks[1][len(after) :],
            "lead": to_answer[len(asks[1]) :],
            "suffix": closing.removesuffix(names.end) if by_turn else closing,
            "weight": 1.0,
        },
    }
    values: dict[str, Any] = {"roles": roles, "end": "turn" if by_turn else "none"}
    system = next(probe for probe in probes if probe.about == "system")
    before = between = None
    if system.text is not None and _SYSTEM in system.text:
        before, between, *_ = _between(system.text.removeprefix(names.begin if begins else ""), (_SYSTEM, _USER))
    if before is not None and between is not None and between.endswith(prefix):
        after_system = between[: len(between) - len(prefix)]
        roles["system"] = {"prefix": before, "suffix": after_system}
        if default:
            if not (default.startswith(before) and default[len(before) :].endswith(after_system)):
                raise _CannotExpressError("its own beginning of a conversation is no system turn")
            values["system"] = default[len(before) : len(default) - len(after_system)]
    elif default:
        roles["system"] = {"prefix": default}
        values["system"] = ""
    return values


def _around_images(probes: list[_Probe], values: Mapping[str, Any], names: _Names, begins: bool) -> dict[str, Any]:
    """Return ``image_suffix`` and ``prefix_before_image``: the texts around the image of a turn that begins with one.

    Empty if the chat template writes no such text, or no image.
    """
    shown = next((probe.text for probe in probes if probe.about == "image"), None)
    if shown is None or not names.image:
        return {}
    before, image, rest = shown.removeprefix(names.begin if begins else "").partition(names.image)
    suffix, question, _ = rest.partition(_USER)
    if not image or not question:
        return {}
    system = values.get("system")
    opening = ""
    if system is not None:
        turn = values["roles"]["system"]
        opening = f"{turn.get('prefix', '')}{system}{turn.get('suffix', '')}"
    prefix = before.removeprefix(opening)
    return {
        **({"image_suffix": suffix} if suffix else {}),
        **({"prefix_before_image": prefix} if prefix != values["roles"]["user"]["prefix"] else {}),
    }


def _around_sounds(probes: list[_Probe], names: _Names) -> dict[str, Any]:
    """Return ``audio_prefix`` and ``audio_suffix``, from a turn that begins with two sounds.

    Empty if the chat template writes no such text, or no sound.
    """
    heard = next((probe.text for probe in probes if sum(isinstance(part, AudioPart) for part in probe.media) > 1), None)
    parts = [] if heard is None or not names.sound else heard.partition(_USER)[0].split(names.sound)
    if len(parts) != 3:  # Before, between and after the two.
        return {}
    _, between, suffix = parts
    prefix = between.removeprefix(suffix).replace("2", "{n}")
    values = {"audio_prefix": prefix, "audio_suffix": suffix}
    return {key: value for key, value in values.items() if value}


def _between(text: str, words: Sequence[str]) -> list[str]:
    """Return the texts around ``words``, each of which must occur once, in this order."""
    parts, rest = [], text
    for word in words:
        before, found, rest = rest.partition(word)
        if not found or word in rest:
            raise _CannotExpressError("it does not write the contents of the turns once and in order")
        parts.append(before)
    return [*parts, rest]


def _candidates(values: dict[str, Any], names: _Names) -> Iterator[dict[str, Any]]:
    """Yield templates to try: the chat formats that we know by name, then the derived strings."""
    shared: dict[str, Any] = {key: values[key] for key in _SHARED if key in values}
    roles: dict[str, dict[str, Any]] = {
        name: {key: text for key, text in values["roles"][name].items() if text}
        for name in ("system", "user", "assistant")
        if name in values["roles"]
    }
    if "prefix_before_image" in values:
        roles["user"]["prefix_before_image"] = values["prefix_before_image"]
    plain: list[dict[str, Any]] = [{"format": name} for name in CHAT_FORMATS]
    for one in (*plain, {"roles": roles, "end": values["end"]}):
        for strip in (False, True):
            for dialogues in ("all", "text") if names.image and "system" in values else ("all",):
                more = {
                    **({"strip": True} if strip else {}),
                    **({"system_for": dialogues} if dialogues != "all" else {}),
                }
                yield {"kind": "dialogue", **one, **shared, **more, "joined": True}


def _best(candidates: Iterable[dict[str, Any]], probes: list[_Probe], names: _Names, begins: bool) -> ChatFormat | None:
    """Return the first candidate with the fewest kinds of probes that it fails; None if none passes the plain ones."""
    best: tuple[int, ChatFormat] | None = None
    for values in candidates:
        template = _with_special_tokens(values, names)
        if template is None:
            continue
        # The first probe has no answer, so no document is made of it.
        failed = {probe.about for probe in probes[1:] if not _passes(template[1], probe, names, begins)}
        if "" in failed:
            continue
        if best is None or len(failed) < best[0]:
            notes = tuple(note for about, note in _NOTES.items() if about in failed)
            best = (len(failed), ChatFormat(template[0], begins, notes))
        if not failed:
            break
    return None if best is None else best[1]


_SHARED = ("system", "image_suffix", "audio_prefix", "audio_suffix")
"""Derived fields that every candidate has."""
_NOTES = {
    "end": "a conversation that ends with an answer has other text around it here than in the chat template",
    "system": "the chat template writes a system turn in a way that the template here cannot; do not use system turns",
    "space": "the chat template treats white space around the text of a turn in another way than the template here",
    "image": "the chat template places images in another way than the template here",
    "video": "the chat template places videos in another way than the template here",
    "audio": "the chat template places sounds in another way than the template here",
    "order": "the chat template moves an image that follows the text of its turn",
}


def _with_special_tokens(values: dict[str, Any], names: _Names) -> tuple[dict[str, Any], DialogueTemplate] | None:
    """Return the values with the added tokens in their strings as ``special_tokens``; None if they are not valid.

    A known format is valid only if its special tokens are those that the tokenizer finds in its strings.
    """
    try:
        template = DialogueTemplate.model_validate(values)
    except ValidationError:
        return None
    found = tuple(_tokens_in("\0".join(t for r in template.roles.values() for t in (r.prefix, r.suffix)), names.added))
    if any(name in role.lead for role in template.roles.values() for name in names.added):
        return None
    if "format" in values:
        return (values, template) if set(template.special_tokens) == set(found) else None
    whole = {**values, **({"special_tokens": list(found)} if found else {})}
    return whole, DialogueTemplate.model_validate(whole)


def _tokens_in(text: str, names: Iterable[str]) -> list[str]:
    """Return the names that a tokenizer finds in a text, where longer names match first."""
    found = []
    for name in sorted(filter(None, names), key=len, reverse=True):
        if name in text:
            found.append(name)
            text = text.replace(name, "\0")
    return found


def _passes(template: DialogueTemplate, probe: _Probe, names: _Names, begins: bool) -> bool:
    """Return whether the template writes the conversation as the chat template does, or both reject it."""
    sample = Sample(probe.media, {"messages": probe.messages}, Provenance("chat template", "", "", 0))
    try:
        pieces = template.prompt(sample) if probe.prompt else template.pieces(sample, None)
    except SampleError:
        return probe.text is None
    text = names.begin if begins else ""
    for piece in pieces:
        if isinstance(piece, TextPiece):
            text += piece.text
        elif isinstance(piece, TokenPiece):
            text += piece.name
        elif isinstance(piece, EndPiece):
            text += names.end
        elif isinstance(piece, ImagePart):
            text += names.image or ""
        elif isinstance(piece, VideoPart):
            text += names.video or ""
        elif isinstance(piece, AudioPart):
            text += names.sound or ""
    return text == probe.text
