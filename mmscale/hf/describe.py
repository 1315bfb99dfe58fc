"""Describe the data of a Hugging Face folder: tokenizer, template and transforms as blocks of ``data``.

tokenizer files --tokenizer_files--> data.tokenizer
chat template --chat_template--> data.template
image and video processor --family layout--> data.transforms, data.video
feature extractor --family layout--> data.audio
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data_pipeline.images.transforms import TransformConfig
from data_pipeline.images.video import VideoConfig
from data_pipeline.io.strict import first_fault
from mmscale.errors import CheckpointError
from mmscale.hf.chat_template import derive_format
from mmscale.hf.image_input import ImageInput, ImageSource
from mmscale.hf.layout import FamilyLayout
from mmscale.hf.layouts import pixels
from mmscale.hf.read import CONFIG, read_processor
from mmscale.hf.tokenizer_files import TokenizerFiles, read_tokenizer
from mmscale.models.config import AnyModelConfig, ModelConfig

_TRANSFORMS: TypeAdapter[Any] = TypeAdapter(TransformConfig)


@dataclass(frozen=True)
class FolderData:
    """The data of a folder.

    Attributes:
        tokenizer: Values of ``data.tokenizer``; None if the folder has no tokenizer that can be read.
        template: Values of ``data.template``; None for a vision tower.
        transforms: Values of ``data.transforms``; None for a model without images.
        video: Values of ``data.video``; None for a model that reads no videos here.
        audio: Values of ``data.audio``; None for a model that takes no sound.
        context: Largest number of positions that ``config.json`` names; None if it names none.
        notes: A sentence for each difference from the folder's tokenizer, chat template or processor.
    """

    tokenizer: dict[str, Any] | None
    template: dict[str, Any] | None
    transforms: dict[str, Any] | None
    context: int | None = None
    notes: tuple[str, ...] = ()
    video: dict[str, Any] | None = None
    audio: dict[str, Any] | None = None


def describe_folder(
    folder: Path, layout: FamilyLayout, config: AnyModelConfig, values: Mapping[str, Any]
) -> FolderData:
    """Return the data of a folder.

    Args:
        folder: A Hugging Face folder.
        layout: Layout of its family.
        config: Our configuration of its model.
        values: As ``read_config`` returns them.

    Raises:
        CheckpointError: a file is damaged, or no transform of mmscale does what the image processor does.
    """
    images: ImageInput | None = None
    values = layout.own_values(values)
    source = ImageSource(config, values, read_processor(folder), str(folder / CONFIG))
    if config.vision is not None:
        images = _images(layout, source)
    sounds = None if layout.sounds is None else layout.sounds(source)
    transforms = None if images is None else images.transforms
    if not isinstance(config, ModelConfig):
        return FolderData(None, None, transforms, notes=() if images is None else images.notes)
    text = values.get("text_config") if isinstance(values.get("text_config"), Mapping) else {}
    assert isinstance(text, Mapping)
    context = text.get("max_position_embeddings", values.get("max_position_embeddings"))
    found = FolderData(
        None,
        (None if images is None else images.template)
        or {"kind": "text" if images is None and sounds is None else "interleaved"},
        transforms,
        context if type(context) is int else None,
        () if images is None else images.notes,
        audio=sounds,
    )
    try:
        return _with_text(found, read_tokenizer(folder, {**text, **values}), config, images, {**text, **values})
    except CheckpointError as error:
        return replace(found, notes=(*found.notes, str(error)))


def _images(layout: FamilyLayout, source: ImageSource) -> ImageInput:
    """Return the images of a family, with valid transforms.

    Raises:
        CheckpointError: the image processor has a value that the family does not know.
    """
    try:
        images = (layout.images or pixels.fixed_images)(source)
        _TRANSFORMS.validate_python(images.transforms)
        if images.video is not None:
            VideoConfig.model_validate(images.video)
    except ValidationError as error:
        raise CheckpointError(f"{source.where}: the image processor: {first_fault(error)}") from error
    # Hostile values raise these, such as a number where an object is expected.
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise CheckpointError(
            f"{source.where}: the image processor has a value that is not known: {error!s:.200}"
        ) from error
    return images


def _with_text(
    found: FolderData, files: TokenizerFiles, config: ModelConfig, images: ImageInput | None, ids: Mapping[str, Any]
) -> FolderData:
    """Return the data with tokenizer and template.

    Raises:
        CheckpointError: a special token is missing.
    """
    begin, template, notes = files.adds_begin, found.template, found.notes
    missing = [name for name in (found.audio or {}).values() if files.id_of(name) is None]
    if missing:
        raise CheckpointError(f"{files.path} has no token {missing[0]!r} for sounds; add it to the tokenizer")
    image_token, video = None, None if images is None else images.video
    if video is not None:
        tokens = VideoConfig.model_validate(video)
        special = [name for key in ("start", "end", "placeholder") for name in tokens.names_of(key)]
        video = None if any(files.id_of(name) is None for name in special) else video
    if images is not None and config.predicts_tokens:
        image_token = files.image_token(ids, images.tokens)
    if files.chat_template is not None and config.predicts_tokens:
        marker = None if image_token is None or images is None else f"{images.before}{image_token}{images.after}"
        shown = heard = None
        if images is not None and video is not None:
            whole = f"{video['start']}{video['placeholder']}{video['end']}" if "placeholder" in video else None
            shown = images.video_mark or whole
        if found.audio is not None:
            heard = f"{found.audio['start']}{found.audio['placeholder']}{found.audio['end']}"
        chat = derive_format(files.chat_template, files.names, files.added_tokens, marker, shown, heard)
        notes += chat.notes
        if chat.template is not None:
            # The processors of ``transformers`` let the tokenizer add its begin token; chats of text do not.
            template, begin = chat.template, chat.begins or (images is not None and files.adds_begin)
    if images is not None and images.begin is not None:
        begin = images.begin
    return replace(
        found,
        video=video,
        tokenizer=files.block(begin=begin, image_token=image_token),
        template=template,
        transforms=_with_spelled_tags(found.transforms, files),
        notes=notes,
    )


def _with_spelled_tags(transforms: dict[str, Any] | None, files: TokenizerFiles) -> dict[str, Any] | None:
    """Return the transforms with ``spell: tags`` if the tags of tiles are no tokens of the tokenizer (Idefics3 8B)."""
    layout = (transforms or {}).get("layout") or {}
    overview = layout.get("overview")
    if overview is None or layout.get("spell") or files.id_of(overview) is not None:
        return transforms
    return {**(transforms or {}), "layout": {**layout, "spell": "tags"}}
