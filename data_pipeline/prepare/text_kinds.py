"""The kind of text that the rows of a source hold, and the same rows as dialogues, for a model with a chat format.

question, answer    user: image and question    assistant: answer
caption             user: image and a prompt    assistant: caption
messages, ...       unchanged
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.io.json_member import page_texts, parse_member
from data_pipeline.prepare.folders import CLASS
from data_pipeline.prepare.records import CAPTION, CAPTIONS, dump_json
from data_pipeline.prepare.rows import Members, RowReader, RowSource, SourceRow
from data_pipeline.sample import Provenance, Sample
from data_pipeline.shards.frame_list import VIDEOS, lists_frames
from data_pipeline.shards.media_kind import media_kind
from data_pipeline.shards.sample_reader import assemble
from data_pipeline.text.templates.base import media_of

MESSAGES = "messages"
QUESTIONS = ("question", "query", "instruction", "prompt")
ANSWERS = ("answer", "response", "output", "completion")
_INPUT = "input"
_NUM_EXAMPLES = 64


class TextKind(str, Enum):
    """The kind of text of a sample."""

    DIALOGUE = "dialogue"
    """Turns of user and assistant."""
    QUESTION = "question"
    """A question and its answer in fields of their own."""
    CAPTION = "caption"
    """A text about an image."""
    PAGE = "page"
    """Text and images in reading order."""
    ANNOTATIONS = "annotations"
    """Several texts about one image."""
    TEXT = "text"
    """A text without an image."""


@dataclass(frozen=True)
class Examples:
    """Contents of the first samples of a source.

    Attributes:
        kind: Kind of text of most of them.
        others: Number of samples of other kinds, or without a text.
        question, answer: Names of the fields of a question and its answer; empty for other kinds.
        all_have_images, have_images: Whether all, or any, of them have an image or a video.
        clips: Kinds of their other media: ``video``, ``audio``.
        is_class: Whether ``class`` holds the same text as ``caption``: the source is a folder of class folders.
        captions: The captions, in order.
    """

    kind: TextKind
    others: int
    question: str
    answer: str
    all_have_images: bool
    have_images: bool
    clips: frozenset[str]
    is_class: bool
    captions: tuple[str, ...]


def read_examples(source: RowSource) -> Examples:
    """Read the first 64 usable rows of a source.

    Raises:
        DataConfigError: no row is usable, or none has a text.
    """
    samples: list[Sample] = []
    reason = "it has no rows"
    for chunk in source.chunks():
        for found in source.reader.read(chunk):
            try:
                samples.append(_assembled(found))
            except SampleError as error:
                reason = f"row {chunk[0].number} or later: {error.reason}"
            if len(samples) == _NUM_EXAMPLES:
                return _summary(source, samples)
    if not samples:
        raise DataConfigError(f"{source.description}: no row can be used; {reason}")
    return _summary(source, samples)


def _assembled(found: Members | SampleError) -> Sample:
    if isinstance(found, SampleError):
        raise found
    return assemble(found, Provenance("", "", "", 0))


def _summary(source: RowSource, samples: Sequence[Sample]) -> Examples:
    media = [{part.kind for part in media_of(sample)} for sample in samples]
    kinds = [_kind_of(sample.fields, len(one)) for sample, one in zip(samples, media, strict=True)]
    known = Counter(kind for kind in kinds if kind is not None)
    if not known:
        raise DataConfigError(
            f"{source.description}: no sample has a text, so a model could learn nothing from it; put captions into "
            ".txt files with the names of the images, or each class into its own folder, or name the column with "
            "--column caption=NAME"
        )
    kind, count = known.most_common(1)[0]
    fields = next(sample.fields for sample, each in zip(samples, kinds, strict=True) if each is kind)
    question, answer = _question_of(fields) if kind is TextKind.QUESTION else ("", "")
    captions = tuple(str(sample.fields[CAPTION]) for sample in samples if isinstance(sample.fields.get(CAPTION), str))
    return Examples(
        kind=kind,
        others=len(samples) - count,
        question=question,
        answer=answer,
        all_have_images=all({"image", "video"} & one for one in media),
        have_images=any({"image", "video"} & one for one in media),
        clips=frozenset(kind for one in media for kind in one if kind != "image"),
        is_class=all(
            CLASS in sample.fields and sample.fields[CLASS] == sample.fields.get(CAPTION) for sample in samples
        ),
        captions=captions,
    )


def _kind_of(fields: Mapping[str, Any], num_media: int) -> TextKind | None:
    """Return the kind of text of a sample's fields; None without a text."""
    if any(isinstance(fields.get(name), list) and fields[name] for name in (MESSAGES, "conversations")):
        return TextKind.DIALOGUE
    if fields.get("annotations"):
        return TextKind.ANNOTATIONS
    if page_texts(dict(fields)) is not None:
        return TextKind.PAGE
    if all(_question_of(fields)):
        return TextKind.QUESTION
    if fields.get(CAPTION) or fields.get(CAPTIONS):
        return TextKind.CAPTION if num_media else TextKind.TEXT
    return None


def _question_of(fields: Mapping[str, Any]) -> tuple[str, str]:
    """Return the names of the fields with a question and its answer; an empty name for each that is missing."""

    def first(names: Sequence[str]) -> str:
        return next((name for name in names if isinstance(fields.get(name), str) and fields[name].strip()), "")

    return first(QUESTIONS), first(ANSWERS)


class DialogueSource:
    """Rows of another source as dialogues.

    Args:
        source: The other source.
        prompt: The user's words about an image that has a caption.
    """

    def __init__(self, source: RowSource, prompt: str) -> None:
        self._source = source
        self.reader = _DialogueReader(source.reader, prompt)
        self.description = f"{source.description}, as dialogues"

    def chunks(self) -> Iterator[Sequence[SourceRow]]:
        return self._source.chunks()

    def count(self) -> int | None:
        return self._source.count()

    def digest(self) -> str:
        return hashlib.sha256(f"{self._source.digest()} {self.reader.prompt!a}".encode()).hexdigest()


@dataclass(frozen=True)
class _DialogueReader:
    reader: RowReader
    prompt: str

    def read(self, rows: Sequence[SourceRow]) -> Iterator[Members | SampleError]:
        for members in self.reader.read(rows):
            try:
                yield members if isinstance(members, SampleError) else self._as_dialogue(members)
            except SampleError as error:
                yield error

    def _as_dialogue(self, members: Members) -> Members:
        """Return members whose JSON has ``messages``. Pages and annotations are returned unchanged.

        Raises:
            SampleError: there is no text.
        """
        sample = assemble(members, Provenance("", "", "", 0))
        fields, media = sample.fields, media_of(sample)
        kind = _kind_of(fields, len(media))
        if kind is TextKind.QUESTION:
            asked, answered = _question_of(fields)
            question, answer = fields[asked], fields[answered]
            if asked == "instruction" and isinstance(fields.get(_INPUT), str) and fields[_INPUT].strip():
                question = f"{question}\n{fields[_INPUT]}"
        elif kind is TextKind.CAPTION:
            captions = fields.get(CAPTIONS) or [fields.get(CAPTION)]
            question, answer = self.prompt, captions[0]
        elif kind is None:
            raise SampleError("neither a caption, nor a question and an answer, nor turns of a dialogue")
        else:
            return members
        marks = [f"<{part.kind}>" for part in media]
        marked = question if any(mark[:-1] in question for mark in marks) else f"{''.join(marks)}{question}"
        turns = [{"role": "user", "content": marked}, {"role": "assistant", "content": answer}]
        stored = {ext: content for ext, content in members.items() if media_kind(ext) is not None}
        listed = parse_member(members["json"]) if "json" in members else {}
        if lists_frames(listed):  # ``assemble`` removes them from the fields.
            fields[VIDEOS] = listed[VIDEOS]
        return {**stored, "json": dump_json({**fields, MESSAGES: turns})}
