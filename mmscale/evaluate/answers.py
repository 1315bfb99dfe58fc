"""Generate text: answers to a user's prompt, images and videos, and captions of held-out images for the report.

prompt, image and video files --document as in training--> generate with a key-value cache --> text
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import nn

from data_pipeline.config import DataConfig, DatasetConfig
from data_pipeline.document import Document
from data_pipeline.errors import SampleError
from data_pipeline.images.decode import Pixels, decode_image
from data_pipeline.images.transforms import FixedTransform
from data_pipeline.io.missing import no_such_file
from data_pipeline.io.untrusted import UntrustedError, read_bytes
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.packing.synthetic_documents import dummy_document
from data_pipeline.prepare.folders import read_frames
from data_pipeline.sample import AudioPart, ImagePart, MediaPart, Provenance, Sample, TextPart, VideoPart
from data_pipeline.text.templates import LITERAL, CaptionTemplate, DialogueTemplate
from data_pipeline.text.templates.base import images_of
from data_pipeline.text.templates.dialogue import USER
from data_pipeline.text.tokenizer import Tokenizer, load_tokenizer
from mmscale.dist import World
from mmscale.errors import ConfigError, MMScaleError
from mmscale.evaluate import CaptionsConfig, EvaluationConfig, HeldOutSet
from mmscale.evaluate.generation import AnswerWriter
from mmscale.evaluate.heldout import ImageQuestions, PromptBuilder, reads_images
from mmscale.models.image_tokenizer import ImageTokenizer
from mmscale.models.sampling import SamplingConfig

if TYPE_CHECKING:
    from PIL import Image

_MOST_IMAGE_BYTES = 1 << 28
_MOST_CLIP_BYTES = 1 << 31
"""Largest size of a video or sound file."""
_MARK = re.compile(r"<(image|video|audio)(?:-(\d+))?>")
"""Marks a position in a prompt: of the next image, video or sound, or of the one with this number (from 1)."""
_THUMBNAIL_PIXELS = 256
"""Longest side of an image in the report, pixels."""


class CaptionedImage(NamedTuple):
    """A held-out image with its right answer and the generated caption, for ``save_captions``."""

    set: str
    pixels: Pixels
    expected: str
    generated: str


def respond(
    model: nn.Module,
    data: DataConfig,
    spec: MediaSpec,
    *,
    images: Sequence[Path | Image.Image] = (),
    videos: Sequence[Path] = (),
    sounds: Sequence[Path] = (),
    prompt: str | None = None,
    num: int = 1,
    max_new_tokens: int = 32,
    sampling: SamplingConfig = SamplingConfig(),
    stop: Sequence[str] = (),
    show: Callable[[str], None] | None = None,
) -> list[str]:
    """Generate answers to a prompt, with or without images. The model must be unsharded.

    Args:
        model: Model in evaluation mode, on the CPU or a CUDA device.
        data: Gives the tokenizer, and template and transform of the first data set.
        spec: Media that the model accepts.
        images: JPEG, PNG or WebP files, or pictures of Pillow.
        videos: MP4, WebM, Matroska or GIF files, or folders of frames, see ``read_frames``.
        sounds: WAV, FLAC, MP3, Ogg, Opus or M4A files.
        prompt: Text before the answer; in a dialogue the user's turn. ``<image>`` in it marks the position of the next
            image and ``<image-2>`` that of the second; ``<video>`` and ``<audio>`` are the same for videos and sounds.
            Without marks the images come first, then the videos, then the sounds. None for the first prompt of the
            template.
        num: Number of answers, sampled independently.
        max_new_tokens: Longest answer, tokens.
        sampling: How tokens are sampled.
        stop: An answer ends before the first of these texts.
        show: Called after each token with the first answer so far.

    Returns:
        The answers without surrounding white space.

    Raises:
        ConfigError: the model has no tower for these media or cannot generate text, the template needs an image or a
            prompt that is missing, or the prompt marks more media than given.
        SampleError: a file is not such an image, or an image has no position in the prompt.
        MMScaleError: a file cannot be read.
    """
    tokenizer = load_tokenizer(data.tokenizer)
    prompts, spec = _encoding(data.prompts, spec, model)
    document, closing = prompt_document(prompts, tokenizer, spec, images, prompt, videos, sounds)
    prompt_of = _Prompt(tokenizer, spec, document, closing)
    return prompt_of.answers(model, num, max_new_tokens, sampling, stop, show)


def prompt_document(
    prompts: DatasetConfig,
    tokenizer: Tokenizer,
    spec: MediaSpec,
    images: Sequence[Path | Image.Image],
    prompt: str | None,
    videos: Sequence[Path] = (),
    sounds: Sequence[Path] = (),
) -> tuple[Document, Sequence[str]]:
    """Return the document of a prompt, and the names of the tokens that end an answer besides the end token.

    Args:
        prompts: Template and transform of the prompt.
        tokenizer: Tokenizer of the text.

    The other arguments and the errors are those of ``respond``.
    """
    _require_text(spec)
    dataset, sample = _prompt_sample(prompts, images, videos, sounds, prompt, spec)
    document = DocumentBuilder(dataset, tokenizer, spec).build_prompt(sample)
    return document, dataset.template.closing


def _encoding(prompts: DatasetConfig, spec: MediaSpec, model: nn.Module) -> tuple[DatasetConfig, MediaSpec]:
    """Return the settings with which the model encodes images of files as tokens, if it has an image tokenizer."""
    tokens, tokenizer = prompts.image_tokens, getattr(model, "image_tokenizer", None)
    if tokens is None or tokens.ids is not None or not isinstance(tokenizer, ImageTokenizer):
        return prompts, spec
    if isinstance(prompts.transforms, FixedTransform) and prompts.transforms.size is None:
        return prompts, spec  # Nothing says how large an image of a file becomes.
    encoded = tokens.model_copy(update={"encoded": "in_step", "tokenizer": None})
    return prompts.model_copy(update={"image_tokens": encoded}), replace(spec, code_size=tokenizer.stride)


def _require_images(prompts: DatasetConfig, spec: MediaSpec) -> None:
    """Raise for a model that cannot read the images of files."""
    if spec.placement is not Placement.NONE or spec.code_size is not None:
        return
    if prompts.image_tokens is None:
        raise ConfigError("this model has no vision tower, so it cannot read images; leave them out")
    raise ConfigError(
        "this model reads images as tokens, and nothing can encode a file: its checkpoint has no image tokenizer "
        "(model.image_tokenizer), or the data set has no size (transforms.size); store token grids with: mmscale data "
        "encode, and score them with: mmscale eval"
    )


def _require_text(spec: MediaSpec) -> None:
    """Raise for a contrastive model, which cannot generate text."""
    if spec.placement is Placement.PAIR:
        raise ConfigError(
            "this model compares images with texts (connector.kind=contrastive) and cannot generate text; "
            "`mmscale eval` scores which text is nearest to an image"
        )


@dataclass(frozen=True)
class _Prompt:
    """A prompt: its document, and the names of the tokens that end an answer besides the end token."""

    tokenizer: Tokenizer
    spec: MediaSpec
    document: Document
    closing: Sequence[str]

    def answers(
        self,
        model: nn.Module,
        num: int,
        max_new_tokens: int,
        sampling: SamplingConfig,
        stop: Sequence[str],
        show: Callable[[str], None] | None,
    ) -> list[str]:
        """Generate ``num`` answers; see ``respond``."""
        tokenizer, dummy = self.tokenizer, dummy_document(self.spec, self.tokenizer.pad_id)
        batch = collate([Pack((*[self.document] * num, dummy), lane=-1)], self.spec)
        first = None if show is None else (lambda number, text: show(text) if number == 0 else None)
        writer = AnswerWriter(model, tokenizer, self.closing, stop, show=first)
        device = next(model.parameters()).device
        return [text.strip() for text in writer(batch.to(device), max_new_tokens, sampling)]


class Chat:
    """A conversation with a model. Each question gets the whole conversation as its prompt.

    Args:
        model: Model in evaluation mode, on the CPU or a CUDA device. It must be unsharded.
        data: Gives the tokenizer, and the chat format: the template of prompts, else ``data.template``.
        spec: Media that the model accepts.
        max_new_tokens: Longest answer, tokens.
        sampling: How tokens are sampled.

    Raises:
        ConfigError: the model cannot generate text, or the configuration has no chat format.
    """

    def __init__(
        self,
        model: nn.Module,
        data: DataConfig,
        spec: MediaSpec,
        *,
        max_new_tokens: int = 512,
        sampling: SamplingConfig = SamplingConfig(),
    ) -> None:
        _require_text(spec)
        prompts, spec = _encoding(data.prompts, spec, model)
        templates = [data.prompts.template.branch_template, data.template]
        template = next((one for one in templates if isinstance(one, DialogueTemplate)), None)
        if template is None:
            raise ConfigError(
                "this run has no chat format: neither its first data set nor data.template has kind: dialogue; use "
                "`mmscale generate`"
            )
        self._template = template.model_copy(update={"field": "messages"})
        self._model, self._spec = model, spec
        self._max_new_tokens, self._sampling = max_new_tokens, sampling
        self._tokenizer = load_tokenizer(data.tokenizer)
        self._prompts = prompts.model_copy(update={"template": self._template})
        self._builder = DocumentBuilder(self._prompts, self._tokenizer, spec)
        self._messages: list[dict[str, Any]] = []
        self._media: tuple[MediaPart, ...] = ()

    def ask(
        self,
        words: str,
        images: Sequence[Path] = (),
        show: Callable[[str], None] | None = None,
        videos: Sequence[Path] = (),
        sounds: Sequence[Path] = (),
    ) -> str:
        """Add a question and return the answer, which becomes part of the conversation.

        If this raises or is interrupted, the conversation is unchanged.

        Args:
            words: The question.
            images: JPEG, PNG or WebP files, which precede the words.
            show: Called after each token with the answer so far.
            videos: MP4, WebM, Matroska or GIF files, or folders of frames, between the images and the words.
            sounds: WAV, FLAC, MP3, Ogg, Opus or M4A files, after the videos.

        Raises:
            ConfigError: the model has no tower for these media, or the data set no block for them.
            SampleError: a file is not such an image, video or sound, or the conversation does not fit the template.
            MMScaleError: a file cannot be read.
        """
        _require_media(self._prompts, self._spec, images, videos, sounds)
        given = [part for part in _sample_from(images, videos, sounds).parts if not isinstance(part, TextPart)]
        shown = tuple(
            replace(part, name=f"{number}.{part.name.rpartition('.')[2]}")
            for number, part in enumerate(given, start=len(self._media))
        )
        names = [{"type": part.kind, part.kind: part.name} for part in shown]
        question = {"role": USER, "content": [*names, *([{"type": "text", "text": words}] if words else [])]}
        fields = {"messages": [*self._messages, question]}
        files = ", ".join(map(str, (*images, *videos, *sounds)))
        name = f"question {len(self._messages) // 2 + 1}{files and f' ({files})'}"
        origin = Provenance("chat", "the conversation", name, 0)
        document = self._builder.build_prompt(Sample((*self._media, *shown), fields, origin))
        prompt = _Prompt(self._tokenizer, self._spec, document, self._template.closing)
        (answer,) = prompt.answers(self._model, 1, self._max_new_tokens, self._sampling, (), show)
        answering = next(name for name, role in self._template.roles.items() if role.weight)
        if answer:  # A template has no empty turns. Without an answer, the question is forgotten.
            self._messages += [question, {"role": answering, "content": [{"type": "text", "text": answer}]}]
            self._media += shown
        return answer

    def reset(self) -> None:
        """Forget the conversation."""
        self._messages, self._media = [], ()


def _prompt_sample(
    dataset: DatasetConfig,
    images: Sequence[Path | Image.Image],
    videos: Sequence[Path],
    sounds: Sequence[Path],
    prompt: str | None,
    spec: MediaSpec,
) -> tuple[DatasetConfig, Sample]:
    """Return a sample with these media, and the data set whose template turns it into the prompt."""
    _require_media(dataset, spec, images, videos, sounds)
    template = dataset.template.branch_template
    sample = _sample_from(images, videos, sounds)
    if prompt is None and sample.parts and not template.takes_images:
        prompt = ""  # The template's own prompt would drop the images.
    if prompt is None:
        _check_prompt(dataset, sample)
        return dataset, sample
    _check_marks(prompt, {"image": len(images), "video": len(videos), "audio": len(sounds)})
    if (fields := template.question(prompt)) is None:
        template = LITERAL if prompt else CaptionTemplate()
        fields = template.question(prompt)
    if fields is not None:
        sample = replace(sample, fields=fields)
    return dataset.model_copy(update={"template": template}), sample


def _require_media(
    dataset: DatasetConfig,
    spec: MediaSpec,
    images: Sequence[Path | Image.Image],
    videos: Sequence[Path],
    sounds: Sequence[Path],
) -> None:
    """Raise for media that the model has no tower for, or the data set no block."""
    if images:
        _require_images(dataset, spec)
    if videos and spec.placement is Placement.NONE:
        raise ConfigError("this model has no vision tower, so it cannot read videos; leave them out")
    if videos and dataset.video is None:
        raise ConfigError("the first data set has no block video, which says how a video becomes frames (data.video)")
    if sounds and spec.audio is None:
        raise ConfigError("this model has no audio tower (model.audio), so it cannot hear; leave sounds out")
    if sounds and dataset.audio is None:
        raise ConfigError("the first data set has no block audio, which says how sound is read (data.audio)")


def _check_marks(prompt: str, given: Mapping[str, int]) -> None:
    """Require a file for each mark in a prompt. ``given``: number of files of each kind."""
    for kind, count in given.items():
        marks = [mark for mark in _MARK.finditer(prompt) if mark[1] == kind]
        if marks and not count:
            raise ConfigError(
                f"the prompt contains {marks[0][0]}, and no {kind} is given; add --{kind} FILE, or write the prompt "
                "without it"
            )
        numbers = [mark[2] for mark in marks]
        needed = max([numbers.count(None), *(int(number) for number in numbers if number)])
        if needed > count:
            raise ConfigError(
                f"the prompt refers to {kind} number {needed}, and --{kind} gives {count}; add --{kind} FILE, or "
                "write the prompt without that mark"
            )


def _check_prompt(dataset: DatasetConfig, sample: Sample) -> None:
    """Require an image or a prompt where the template of the training data has one."""
    if not sample.parts and dataset.template.takes_images:
        raise ConfigError(
            f"documents of data set {dataset.name} begin with an image or a question; give an image or a prompt"
        )
    try:
        dataset.template.prompt(sample)
    except SampleError as error:
        raise ConfigError(
            f"the prompt of data set {dataset.name} cannot be made for an image without fields ({error.reason}); give "
            "a prompt"
        ) from error


def _sample_from(images: Sequence[Path | Image.Image], videos: Sequence[Path], sounds: Sequence[Path] = ()) -> Sample:
    """Return a sample without fields with these media, named by number and extension as in a tar."""
    files = [one for one in (*images, *videos, *sounds) if isinstance(one, Path)]
    paths = files or [Path("picture" if images else "prompt")]
    origin = Provenance("file", str(paths[0].parent), ", ".join(path.name for path in paths), 0)
    parts: list[MediaPart] = [*_image_parts(images)]
    clips = [*((VideoPart, path) for path in videos), *((AudioPart, path) for path in sounds)]
    for number, (kind, path) in enumerate(clips, start=len(images)):
        if kind is VideoPart and path.is_dir():
            parts.append(_video_in_frames(path, number))
        else:
            parts.append(kind(_read(path, _MOST_CLIP_BYTES), f"{number}{path.suffix.lower()}"))
    return Sample(tuple(parts), {}, origin)


def _video_in_frames(folder: Path, number: int) -> VideoPart:
    try:
        frames, first = read_frames(folder, _MOST_CLIP_BYTES)
    except SampleError as error:
        raise MMScaleError(f"{folder}: {error.reason}") from error
    return VideoPart(frames, f"{number}.{first}")


def _image_parts(images: Sequence[Path | Image.Image]) -> tuple[ImagePart, ...]:
    """Read image files or encode images. Each part is named by number and extension."""
    parts = []
    for number, path in enumerate(images):
        if not isinstance(path, Path):
            encoded = io.BytesIO()
            path.convert("RGB").save(encoded, "PNG")
            parts.append(ImagePart(encoded.getvalue(), f"{number}.png"))
            continue
        data = _read(path, _MOST_IMAGE_BYTES)
        extension = path.suffix.lstrip(".").lower()
        parts.append(ImagePart(data, extension if len(images) == 1 else f"{number}.{extension}"))
    return tuple(parts)


def _read(path: Path, most_bytes: int) -> bytes:
    try:
        return read_bytes(path, most_bytes=most_bytes)
    except UntrustedError as error:
        raise MMScaleError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise MMScaleError(f"{path}: {no_such_file(path)}") from error
    except OSError as error:
        raise MMScaleError(f"{path}: {error.strerror}") from error


def caption_images(
    model: nn.Module, config: EvaluationConfig, data: DataConfig, spec: MediaSpec, world: World
) -> list[CaptionedImage]:
    """Generate captions of some images of each held-out set, for the report. All ranks must call.

    Every rank generates all captions in lock-step: for a few dozen images, sharing the work would not pay off.

    Returns:
        The same list on every rank. Empty if ``config.captions`` is null, if the model reads no images, or if it is
        contrastive. Samples without an encoded image are left out: those with token grids, videos or sounds alone.
    """
    captions = config.captions
    if captions is None or spec.placement is Placement.PAIR or not reads_images(data, spec):
        return []
    chosen = [held for held in config.image_sets if captions.sets is None or held.name in captions.sets]
    return [one for held in chosen for one in _caption_set(model, held, captions, data, spec, world)]


def _caption_set(
    model: nn.Module, held: HeldOutSet, captions: CaptionsConfig, data: DataConfig, spec: MediaSpec, world: World
) -> list[CaptionedImage]:
    tokenizer = load_tokenizer(data.tokenizer)
    questions = ImageQuestions.read(held, limit=captions.num_images)
    shown = [
        (sample, expected)
        for sample, expected in zip(questions.samples, questions.answers, strict=True)
        if any(part.data for part in images_of(sample)[:1])
    ]
    if not shown:
        return []
    samples = [sample for sample, _ in shown]
    prompts = PromptBuilder.of_images(held, data, tokenizer, spec, captions.prompt)(samples).to(world.device)
    texts = AnswerWriter(model, tokenizer, world=world)(prompts, captions.max_new_tokens, captions.sampling)
    return [
        CaptionedImage(held.name, _thumbnail(sample), expected, text.strip())
        for (sample, expected), text in zip(shown, texts, strict=True)
    ]


def _thumbnail(sample: Sample) -> Pixels:
    """Return the sample's first image without transforms, at most 256 pixels wide and high."""
    from PIL import Image

    image = next(part for part in sample.parts if isinstance(part, ImagePart))
    thumbnail = Image.fromarray(decode_image(image.data, max_pixels=1 << 26))
    thumbnail.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    return np.asarray(thumbnail, dtype=np.uint8)
