"""Convert one record (a JSON object, a line of CSV, a row of Parquet) and its images to the members of a sample.

    path, caption, captions, other fields       images, then the caption; a path may be that of a video or sound
    video, fps, caption                         a video: a file, or frames (a folder or a list) with their rate
    image_base64, caption, ...                  the same, with the image in the record
    parts                                       text and images in reading order
    images, texts          (OBELICS)            two lists in reading order; at each position one of them is null
    messages or conversations (LLaVA), image    images, and the turns unchanged
    messages with {"type": "image", "image": F} the same, with the images taken out of the turns
    text_list, image_info  (MMC4)               each image before the text that it was matched with
    prompt, chosen, rejected, image             images, and the preference pair unchanged

Dialogues and pairs name videos and sounds like images: in ``video``, ``videos``, ``audio``, ``audios``, or in turns.

The result has one form: an image member ``jpg``, or ``0.jpg``, ``1.png``, ... for several, and a ``json`` with
``caption``, ``captions``, ``parts`` or the turns. An image's extension follows its content, not its name.
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.io.json_member import PAIR, all_texts, check_pair, parse_member
from data_pipeline.prepare.media_files import EXTENSION_OF_FORMAT, store_medium
from data_pipeline.prepare.rows import Members
from data_pipeline.shards.audio_file import audio_size
from data_pipeline.shards.frame_list import VIDEOS, lists_frames
from data_pipeline.shards.image_header import FORMAT_OF_EXTENSION, image_size, is_image
from data_pipeline.shards.interleaved import (
    IMAGE_BASE64,
    IMAGES,
    PARTS,
    from_base64,
    interleaved,
    list_of_objects,
    text_of,
)
from data_pipeline.shards.media_kind import MEDIA_FORMATS, MEDIA_KINDS, media_kind
from data_pipeline.shards.video_file import video_size

PATH, CAPTION, CAPTIONS = "path", "caption", "captions"
SPOKEN = frozenset({"messages", "conversations", "annotations", *PAIR})
"""Fields of dialogues, annotations and preference pairs."""
ANSWERS = frozenset({"answer", "answers", "response", "output", "completion"})
"""Fields of an answer to a question in another field. ``template.answers`` names them."""
DROPPED_IMAGES = "dropped_images"
CLIPS = ("video", "videos", "audio", "audios")
"""Fields of videos and sounds."""
RATES = ("fps", "sample_fps")
"""Fields with the frames for each second of a video in frames."""


@dataclass(frozen=True)
class FieldNames:
    """Renames and drops of a source's columns.

    Attributes:
        renamed: (new name, name in the source) pairs that the user asked for. The column must exist.
        dropped: Columns to leave out.
        guessed: Pairs as in ``renamed``, detected by ``column_names``. Rows without the column, or with a column of
            the new name, are left as they are.
    """

    renamed: tuple[tuple[str, str], ...] = ()
    dropped: tuple[str, ...] = ()
    guessed: tuple[tuple[str, str], ...] = ()

    def check(self, columns: Sequence[str], location: str) -> list[str]:
        """Return the columns under their new names.

        Args:
            columns: Column names of the source.
            location: Beginning of an error message.

        Raises:
            DataConfigError: a column to rename or drop does not exist, or two columns would have one name.
        """
        absent = [name for name in (*(old for _, old in self.renamed), *self.dropped) if name not in columns]
        if absent:
            raise DataConfigError(f"{location}: has no column {absent[0]!r}; it has {', '.join(columns)}")
        return list(self.apply(dict.fromkeys(columns), location))

    def apply(self, record: Mapping[str, Any], location: str = "") -> dict[str, Any]:
        """Return the record under its new names.

        Raises:
            SampleError: a field to rename is missing, or two fields would have one name.
            DataConfigError: the same, if ``location`` is given.
        """
        result = {name: value for name, value in record.items() if name not in self.dropped}
        for new, old in self.renamed:
            problem = None
            if old not in result:
                problem = f"has no field {old!r}"
            elif new in result and new != old:
                problem = f"has both {new!r} and {old!r}, which is to be renamed {new!r}: drop one of them"
            if problem is not None:
                raise DataConfigError(f"{location}: {problem}") if location else SampleError(f"the row {problem}")
            result[new] = result.pop(old)
        for new, old in self.guessed:
            if old in result and new not in result:
                result[new] = result.pop(old)
        return result


def members_from_record(record: Mapping[str, Any], load: Callable[[Any], bytes], lenient: bool = False) -> Members:
    """Return the members of the sample that a record describes.

    Args:
        record: The record's fields. None, NaN and empty strings count as absent, except an empty ``caption``.
        load: Returns a medium's bytes, given the record's reference to it: a path, bytes, or a dict of both.
        lenient: Leave unreadable media out of ``parts`` and store their count in the field ``dropped_images``.

    Raises:
        SampleError: a medium or a text is missing or damaged, the record has neither, or several fields name images.
    """
    fields = {key: value for key, value in record.items() if not _is_absent(value) or (key == CAPTION and value == "")}
    fields = interleaved(fields)
    references, is_list = _pop_media(fields)
    members: Members = {}
    if PARTS in fields:
        if references:
            raise SampleError("the row has both an image and parts: drop one of them")
        listed = list_of_objects(fields[PARTS])
        fields[PARTS] = _readable_parts(listed, members, load) if lenient else _parts(listed, members, load)
        if len(fields[PARTS]) < len(listed):
            fields[DROPPED_IMAGES] = len(listed) - len(fields[PARTS])
    elif references:
        rate, entries = next((fields[name] for name in RATES if name in fields), None), list[dict[str, Any]]()
        for number, (kind, reference, own) in enumerate(references):
            prefix = "" if len(references) == 1 and not is_list else f"{number}."
            entries.append(store_medium(kind, reference, prefix, members, load, rate if own is None else own))
        videos = [entry for entry in entries if "video" in entry]
        if any("fps" in entry for entry in videos):
            fields = {name: value for name, value in fields.items() if name not in RATES} | {VIDEOS: videos}
        if videos and not any("image" in entry for entry in entries):
            _mark_videos(fields)
    if isinstance(fields.get(CAPTIONS), str) and fields[CAPTIONS].lstrip().startswith("["):
        fields[CAPTIONS] = parse_member(fields[CAPTIONS].encode())
    if record.keys() >= {*PAIR}:  # Not ``fields``, which lacks an empty answer.
        check_pair(fields, *PAIR)
    if not any(all_texts(fields)) and not members and not (ANSWERS & fields.keys()):
        raise SampleError("neither an image (path) nor a text (caption, captions, parts)")
    members["json"] = dump_json(fields)
    return members


_Reference = tuple[str, Any, Any]
"""Kind of the field, reference, and the medium's own rate if it is a video in frames; None: the rate of the record."""


def _pop_media(fields: dict[str, Any]) -> tuple[list[_Reference], bool]:
    """Remove the references to media from a record, and return them, and whether they were listed.

    Images come first, then videos, then sounds. ``fields`` gets new lists of turns; the record's own are not changed.
    """
    is_spoken = bool(SPOKEN & fields.keys())
    paths = _pop_images(fields)
    if IMAGE_BASE64 in fields:
        if paths is not None:
            raise SampleError(f"the row has both {PATH} and {IMAGE_BASE64}: drop one of them")
        paths = from_base64(fields.pop(IMAGE_BASE64))
    is_list = isinstance(paths, list | tuple)
    found: dict[str, list[_Reference]] = {
        "image": [
            ("image", path, None) for path in (paths if isinstance(paths, list | tuple) else [paths] if paths else [])
        ]
    }
    for kind in ("video", "audio"):
        # Beside an image, or on a page, a field of this name is an ordinary one unless there is a dialogue.
        takes = is_spoken or (not found["image"] and PARTS not in fields)
        one: Any = fields.pop(kind, None) if takes else None
        several: Any = fields.pop(f"{kind}s", None) if takes else None
        if isinstance(one, list | tuple) and (kind == "audio" or all(_names_video(each) for each in one)):
            one, several = None, [*one, *(several or ())]  # Else it lists the frames of one video.
        is_list = is_list or several is not None
        listed = several if isinstance(several, list | tuple) else [] if several is None else [several]
        found[kind] = [(kind, each, None) for each in [*([] if one is None else [one]), *listed]]
    if is_spoken:
        for kind, references in _pop_media_of_turns(fields, {kind for kind in found if not found[kind]}).items():
            found[kind] += references
            is_list = is_list or bool(references)
    return [reference for references in found.values() for reference in references], is_list


def _names_video(reference: Any) -> bool:
    return isinstance(reference, str) and media_kind(reference.lower()) == "video"


def _pop_images(fields: dict[str, Any]) -> Any:
    """Remove and return the reference to the images: ``path``, or in a dialogue also ``image`` or ``images``."""
    names = (PATH, "image", IMAGES) if SPOKEN & fields.keys() else (PATH,)
    given = [name for name in names if name in fields]
    if len(given) > 1:
        raise SampleError(f"the row names its images in {' and in '.join(given)}; keep one (--drop {given[-1]})")
    return fields.pop(given[0]) if given else None


def _pop_media_of_turns(fields: dict[str, Any], kinds: Collection[str]) -> dict[str, list[_Reference]]:
    """Remove the references to files of these kinds from the contents of turns, and return them in order.

    ``{"type": "image", "image": "a.jpg"}`` (also ``path`` or ``url``) and ``{"type": "image_url", "image_url": {"url":
    ...}}`` become ``{"type": "image"}``; videos and sounds alike. A video in frames may have its own ``fps``, or
    ``sample_fps``, as in the data of Qwen2-VL.
    """
    found = {kind: list[_Reference]() for kind in kinds}

    def without_reference(item: Any) -> Any:
        named = item.get("type") if isinstance(item, Mapping) else None
        kind = named.removesuffix("_url") if isinstance(named, str) else ""
        if kind not in found:
            return item
        nested = item.get(f"{kind}_url")
        references = [item.get(name) for name in (kind, PATH, "url")]
        references.append(nested.get("url") if isinstance(nested, Mapping) else nested)
        rate = next((item[name] for name in RATES if item.get(name) is not None), None)
        found[kind].extend([(kind, reference, rate) for reference in references if reference is not None][:1])
        return {"type": kind}

    for name in ("messages", "conversations", "prompt"):
        turns = fields.get(name)
        if isinstance(turns, list):
            fields[name] = [
                {**turn, "content": [without_reference(item) for item in turn["content"]]}
                if isinstance(turn, Mapping) and isinstance(turn.get("content"), list)
                else turn
                for turn in turns
            ]
    return found


def _mark_videos(fields: dict[str, Any]) -> None:
    """Write ``<video>`` for ``<image>`` in turns of a record without images, as LLaVA-Video marks its videos."""
    for name in ("messages", "conversations"):
        turns: Any = fields.get(name)
        if not isinstance(turns, list) or any("<video" in str(turn) for turn in turns):
            continue
        fields[name] = [
            {key: text.replace("<image>", "<video>") if isinstance(text, str) else text for key, text in turn.items()}
            if isinstance(turn, dict)
            else turn
            for turn in turns
        ]


def _parts(listed: list[dict[str, Any]], members: Members, load: Callable[[Any], bytes]) -> list[dict[str, str]]:
    return [_part(part, members, load) for part in listed]


def _readable_parts(
    listed: list[dict[str, Any]], members: Members, load: Callable[[Any], bytes]
) -> list[dict[str, str]]:
    parts = []
    for part in listed:
        try:
            parts.append(_part(part, members, load))
        except SampleError:
            if all(part.get(kind) is None for kind in MEDIA_KINDS):
                raise
    return parts


def _part(part: Mapping[str, Any], members: Members, load: Callable[[Any], bytes]) -> dict[str, Any]:
    given = {key: value for key, value in part.items() if value is not None}
    if "text" in given and set(given) <= {"text", "weight"}:
        return {**given, "text": text_of(given["text"], "text")}
    kind = next((name for name in MEDIA_KINDS if set(given) in ({name}, {name, "fps"})), None)
    if kind is None or ("fps" in given and kind != "video"):
        raise SampleError(
            f"a part has the fields {sorted(given)}; expected text (and maybe its weight), or image alone, or "
            "audio, or video (and fps if it is in frames)"
        )
    entry = store_medium(kind, given[kind], f"{len(members)}.", members, load, given.get("fps"))
    if kind not in entry:
        raise SampleError(f"a part names the {kind} {given[kind]!r:.80}, which is of kind {next(iter(entry))}")
    return entry


def validated_members(members: Members) -> Members:
    """Check members and return them; an image whose content differs from its extension is renamed.

    Raises:
        SampleError: an image header, a video, a sound, a text or JSON is damaged, ``parts`` name an absent image, two
            images would have one name, or there is neither a medium nor a ``.txt`` or ``.json``. A JSON without a text
            does not raise.
    """
    names = {ext: _name_by_content(ext, content) for ext, content in members.items() if is_image(ext)}
    result = {names.get(ext, ext): content for ext, content in members.items()}
    if len(result) < len(members):
        raise SampleError(f"two of the members {sorted(members)} hold the same format and would have one name")
    clips = [ext for ext in members if media_kind(ext) in ("video", "audio")]
    for ext in clips:
        try:
            _ = video_size(members[ext]) if media_kind(ext) == "video" else audio_size(members[ext])
        except SampleError as error:
            raise SampleError(f".{ext}: {error.reason}") from error
    if "txt" in members:
        check_utf8(members["txt"])
    if "json" in members:
        fields = parse_member(members["json"])
        all_texts(fields)
        if rename_images(fields, names):
            result["json"] = dump_json(fields)
    if not names and not clips and "txt" not in members and "json" not in members:
        raise SampleError(f"neither {MEDIA_FORMATS} nor .txt or .json among {sorted(members)}")
    return result


def _name_by_content(ext: str, content: bytes) -> str:
    try:
        found = image_size(content).format
    except SampleError as error:
        raise SampleError(f".{ext}: {error.reason}") from error
    stem, dot, kind = ext.rpartition(".")
    return ext if FORMAT_OF_EXTENSION[kind] is found else f"{stem}{dot}{EXTENSION_OF_FORMAT[found]}"


def rename_images(fields: dict[str, Any], names: Mapping[str, str]) -> bool:
    """Correct, in place, the parts and frames that name an image by its old extension; return whether one changed.

    Args:
        fields: Content of the JSON member.
        names: New extension of each image member, by its old one.

    Raises:
        SampleError: the JSON names an image that is no member.
    """

    def renamed(name: Any) -> str:
        if not isinstance(name, str) or name.lower() not in names:
            raise SampleError(f"the JSON names the image {name!r:.80}, the sample has {sorted(names)[:64]}")
        new = names[name.lower()]
        return name if new == name.lower() else new

    changed = False
    for part in [*(fields.get(PARTS) or ()), *(fields[VIDEOS] if lists_frames(fields) else ())]:
        for kind in ("image", "video"):
            if not isinstance(part, dict) or kind not in part or (kind == "video" and not isinstance(part[kind], list)):
                continue
            old = part[kind]
            new = [renamed(name) for name in old] if isinstance(old, list) else renamed(old)
            part[kind], changed = new, changed or new != old
    return changed


def check_utf8(content: bytes) -> str:
    """Return the text of a ``txt`` member.

    Raises:
        SampleError: the bytes are not UTF-8.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise SampleError(f"the text is not UTF-8: {error}") from error


def dump_json(fields: Mapping[str, Any]) -> bytes:
    """Return a JSON member. Dates become ISO strings, decimals strings, and NaN and infinities null.

    Raises:
        SampleError: a field holds a value that JSON cannot hold, such as bytes.
    """
    try:
        return _dumps(fields)
    except (TypeError, ValueError):  # Rare, so the search for the field at fault may be slow.
        fields = _without_nan(fields)
    for name, value in fields.items():
        try:
            _dumps(value)
        except (TypeError, ValueError) as error:
            remedy = f"leave it out (--drop {name}), or if it is an image, video or sound, --column path={name}"
            raise SampleError(f"the field {name!r} cannot become JSON: {error}; {remedy}") from error
    return _dumps(fields)


def _dumps(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_as_json)
    return text.encode()


def _as_json(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time):  # datetime is a date.
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise TypeError(f"it holds a {type(value).__name__}")


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return [_without_nan(inner) for inner in value] if isinstance(value, list | tuple) else value


def _is_absent(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))
