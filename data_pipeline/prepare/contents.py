"""Check that a member's bytes match its extension: media decode, texts are UTF-8, JSON has its fields.

Every decode is bounded: for an image or video by the size in its header, for a sound by a largest number of samples,
for a text by its length. Not for: comparing the bytes with the index (``verify``).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from data_pipeline.errors import SampleError
from data_pipeline.images.decode import decode_image
from data_pipeline.io.json_member import PAIR, all_texts, check_pair, page_texts, parse_member, spoken_texts
from data_pipeline.sample import Provenance, Sample
from data_pipeline.shards.audio_file import audio_size, is_audio
from data_pipeline.shards.damage import Problem
from data_pipeline.shards.frame_list import frame_members
from data_pipeline.shards.image_header import FORMAT_OF_EXTENSION, image_size, is_image, known_format
from data_pipeline.shards.index import is_compressed
from data_pipeline.shards.media_kind import MEDIA_KINDS
from data_pipeline.shards.page_images import image_member
from data_pipeline.shards.pages import pop_page_parts, weight_of
from data_pipeline.shards.sample_reader import MAX_TEXT_BYTES, assemble
from data_pipeline.shards.token_grid import decode_grid, is_grid, with_encoded_media
from data_pipeline.shards.video_file import VideoFile, is_video
from data_pipeline.text.templates import CaptionTemplate, DialogueTemplate, Role
from data_pipeline.text.templates.caption import check_answer

_BYTES_PER_PIXEL = 8
"""Bytes of the largest PNG pixel: four channels of 16 bits. No real image file exceeds its raw pixels by much."""
_MOST_METADATA_BYTES = 1 << 24
_DEFAULT = DialogueTemplate()

Finding = tuple[Problem, str]


def check_member(
    ext: str, content: memoryview, siblings: Collection[str], max_pixels: int, key: str
) -> Iterator[Finding]:
    """Yield every problem of one member's bytes.

    Args:
        ext: The member's extension, lower case.
        content: The member's bytes. They are copied only after their size is checked.
        siblings: Extensions of all members of the sample.
        max_pixels: An image or a video frame with more pixels is a problem and is not decoded.
        key: The sample's key; an interleaved document may name its images by it.
    """
    if is_image(ext):
        yield from _check_image(ext, content, max_pixels)
    elif is_video(ext):
        yield from _check_video(ext, content, max_pixels)
    elif is_audio(ext):
        yield from _check_audio(ext, content)
    elif is_grid(ext):
        yield from _check_grid(ext, content)
    elif ext == "txt":
        yield from _check_text(ext, content)
    elif ext == "json":
        yield from _check_json(ext, content, siblings, key)


def check_sample(texts: Mapping[str, bytes], siblings: Collection[str], key: str) -> Iterator[Finding]:
    """Yield the problem for which the loader would skip the whole sample, found by the loader's own code.

    A run's roles, prompts and field names are unknown here. A role of the default template gets its default weight; any
    other role of a dialogue counts as learned (weight 1).

    Args:
        texts: Bytes of the sample's ``txt`` and ``json``; ``check_member`` must have found no problem in them.
        siblings: Extensions of all members of the sample.
        key: The sample's key.
    """
    packed = next(filter(is_compressed, siblings), None)
    try:
        sample = assemble({**dict.fromkeys(siblings, b""), **texts}, Provenance("", "", key, 0))
        _check_fields(sample)
    except SampleError as error:
        yield Problem.TEXT if packed is None else Problem.EXTENSION, error.reason


def _check_fields(sample: Sample) -> None:
    """Run the checks of document building that do not depend on a run's configuration.

    Raises:
        SampleError: a caption is null or empty and there is no other text, a turn is malformed, a dialogue has no
            learned turn, a loss weight is invalid, or the answers of a pair are equal or missing.
    """
    fields = sample.fields
    if {"caption", "captions"} & fields.keys() and page_texts(fields) is None and not spoken_texts(fields):
        for answer in CaptionTemplate().stored_answers(sample):
            check_answer(answer)
    for name in ("messages", "conversations"):
        if fields.get(name) is not None:
            _dialogue_of(frozenset(_roles(fields[name])), name).pieces(sample, None)
    if fields.keys() >= {*PAIR}:
        check_pair(fields, *PAIR)
    entries = fields.get("annotations")
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict):
            weight_of(entry)
            for turn in itertools.chain(*(entry.get(name) or () for name in ("messages", "conversations"))):
                if isinstance(turn, dict):
                    weight_of(turn)


def _roles(turns: Any) -> Iterator[str]:
    for turn in turns if isinstance(turns, list) else ():
        name = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        if isinstance(name, str):
            yield name


@functools.lru_cache(maxsize=64)
def _dialogue_of(roles: frozenset[str], field: str) -> DialogueTemplate:
    weights = {name: role.weight for name, role in _DEFAULT.roles.items()}
    weights |= {alias: weights[name] for alias, name in _DEFAULT.aliases.items()}
    all_roles = {name: Role(weight=weights.get(name, 1.0)) for name in sorted(roles | weights.keys())}
    return DialogueTemplate(roles=all_roles, aliases={}, field=field, end="none")


def _check_image(ext: str, content: memoryview, max_pixels: int) -> Iterator[Finding]:
    expected = FORMAT_OF_EXTENSION[ext.rpartition(".")[2]]
    found = known_format(content)
    if found is None:
        start = bytes(content[:8]).hex(" ") or "nothing"
        yield Problem.EXTENSION, f".{ext} holds no {expected.value}: it starts with {start}"
        return
    if found is not expected:
        yield Problem.RENAMED, f".{ext} holds a {found.value}, not a {expected.value}"
    try:
        size = image_size(content)
        if size.width * size.height > max_pixels:
            yield Problem.BOMB, f".{ext} claims {size.width}x{size.height} pixels, the limit is {max_pixels}"
            return
        most_bytes = _MOST_METADATA_BYTES + _BYTES_PER_PIXEL * size.width * size.height
        if len(content) > most_bytes:
            yield Problem.BOMB, f".{ext} takes {len(content)} bytes for {size.width}x{size.height} pixels"
            return
        decode_image(bytes(content), max_pixels=max_pixels)
    except SampleError as error:
        yield Problem.IMAGE, f".{ext}: {error.reason}"


def _check_video(ext: str, content: memoryview, max_pixels: int) -> Iterator[Finding]:
    """Decode all frames, one at a time."""
    try:
        with VideoFile(content, max_pixels) as file:
            for _ in file.decode(range(file.num_frames)):
                pass
    except SampleError as error:
        yield Problem.VIDEO, f".{ext}: {error.reason}"


def _check_frames(part: Mapping[str, Any], members: Collection[str], key: str) -> Iterator[Finding]:
    try:
        frame_members(part, members, key)
    except SampleError as error:
        yield Problem.PARTNER, error.reason


def _check_audio(ext: str, content: memoryview) -> Iterator[Finding]:
    """Decode the sound, block by block."""
    try:
        audio_size(content)
    except SampleError as error:
        yield Problem.AUDIO, f".{ext}: {error.reason}"


def _check_grid(ext: str, content: memoryview) -> Iterator[Finding]:
    try:
        decode_grid(bytes(content), ext)
    except SampleError as error:
        yield Problem.TOKENS, error.reason


def _check_text(ext: str, content: memoryview) -> Iterator[Finding]:
    if len(content) > MAX_TEXT_BYTES:
        yield Problem.BOMB, f".{ext} has {len(content)} bytes, the limit is {MAX_TEXT_BYTES}"
        return
    try:
        bytes(content).decode()
    except UnicodeDecodeError as error:
        yield Problem.TEXT, f".{ext}: {error}"


def _check_json(ext: str, content: memoryview, siblings: Collection[str], key: str) -> Iterator[Finding]:
    broken = list(_check_text(ext, content))
    if broken:
        yield from broken
        return
    try:
        fields = parse_member(bytes(content))
        for text in all_texts(fields):
            text.encode()
    except SampleError as error:
        yield Problem.TEXT, f".{ext}: {error.reason}"
        return
    except UnicodeEncodeError as error:  # A lone UTF-16 surrogate, written \\ud800.
        yield Problem.TEXT, f".{ext}: {error}"
        return
    members = with_encoded_media(dict.fromkeys(siblings, b""))
    for part in fields.get("parts") or ():
        for kind, is_kind in MEDIA_KINDS.items():
            name = part.get(kind)
            if kind == "video" and isinstance(name, list):
                yield from _check_frames(part, members, key)
            elif name is not None and (not isinstance(name, str) or image_member(name, members, key, is_kind) is None):
                yield Problem.PARTNER, f"the JSON names the {kind} {name!r}, which is absent"
        if not any(part.get(kind) is not None for kind in MEDIA_KINDS) and "text" not in part:
            yield Problem.TEXT, f"a part with neither text nor image nor video nor audio: {part!r:.80}"
    if fields.get("parts") is None:
        try:
            pop_page_parts(fields, members, {}, key)
        except SampleError as error:  # An OBELICS or MMC4 document whose images are missing.
            yield Problem.PARTNER, f".{ext}: {error.reason}"
