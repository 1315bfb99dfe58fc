"""Prepare the data of a new run: shards, held-out samples, and a template that fits both."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.errors import DataConfigError
from data_pipeline.prepare.choices import OnError
from data_pipeline.prepare.heldout import hold_out
from data_pipeline.prepare.ingest import ingest
from data_pipeline.prepare.reshard import NamedManifest, ReshardSource, Selection
from data_pipeline.prepare.rows import RowSource
from data_pipeline.prepare.sources import SourceOptions, open_source
from data_pipeline.prepare.text_kinds import DialogueSource, Examples, TextKind, read_examples
from data_pipeline.prepare.tokenizer_training import train_sentencepiece
from data_pipeline.shards.manifest import Manifest
from mmscale.errors import ConfigError

MARKER = ".mmscale-init"
"""File in a folder of prepared data. ``--force`` removes only folders that have it."""
_MOST_HELD_OUT = 500
_ALLOWED = re.compile(r"a value <= (\d+)")
"""SentencePiece's message for a text that is too short for the vocabulary."""


class Meter(Protocol):
    """Progress of one task."""

    def advance(self, count: int = 1, note: str = "") -> None: ...


Progress = Callable[[str, int | None], AbstractContextManager[Meter]]
"""Displays the progress of a task, given its name and the number of its units."""


@dataclass(frozen=True)
class DataRequest:
    """The user's wishes for the data.

    Attributes:
        source: The data set: any source of ``mmscale data ingest``, or a manifest.
        folder: Folder for shards, held-out samples and tokenizer.
        options: How the source is read.
        prompt: The user's words about an image with a caption, for models with a chat format.
        heldout: Number of samples to hold out; None chooses it.
        force: Replace an older folder of prepared data.
    """

    source: Path
    folder: Path
    options: SourceOptions
    prompt: str
    heldout: int | None
    force: bool


@dataclass(frozen=True)
class PreparedData:
    """Data that is ready for training.

    Attributes:
        name: Name of the data set.
        description: How the source was read.
        manifest: All samples.
        heldout: Manifest of the held-out samples.
        excluded: List of the held-out samples, which training must exclude.
        num_samples, num_heldout: Samples for training, and held-out ones.
        num_skipped: Unusable rows of the source.
        examples: What the samples hold.
        is_dialogue: Whether the stored samples are dialogues.
    """

    name: str
    description: str
    manifest: Path
    heldout: Path
    excluded: Path
    num_samples: int
    num_heldout: int
    num_skipped: int
    examples: Examples
    is_dialogue: bool


def prepare_data(
    request: DataRequest, spoken: frozenset[TextKind], *, reads_images: bool, hears: bool, progress: Progress
) -> PreparedData:
    """Ingest the source and hold samples out. A manifest is used as it is, unless its text must become dialogues.

    Args:
        request: The data.
        spoken: Kinds of text that become dialogues.
        reads_images: Whether the model has a vision tower.
        hears: Whether it has an audio tower.
        progress: Displays the progress.

    Raises:
        ConfigError: the folder of an earlier ``init`` exists, there are too few samples, or they have images or
            sounds that the model cannot read.
        DataPipelineError: the source cannot be read, or no row is usable.
    """
    source, name = request.source, dataset_name(request.source)
    is_manifest = source.name.endswith(".manifest")
    opened: RowSource = (
        ReshardSource([NamedManifest(name, source)], Selection())
        if is_manifest
        else open_source(source, request.options)
    )
    examples = read_examples(opened)
    description = opened.description
    converts = examples.kind in spoken
    if examples.have_images and not reads_images:
        raise ConfigError(
            f"{source}: the samples have images, and the model has no vision tower: choose a model with one"
        )
    if "audio" in examples.clips and not hears:
        raise ConfigError(
            f"{source}: the samples have sounds, and the model has no audio tower: choose a model with one"
        )
    _make_folder(request.folder, request.force)
    try:
        if is_manifest and not converts:
            return _hold_out(request, name, source, description, examples)
        rows = DialogueSource(opened, request.prompt) if converts else opened
        with progress("ingest", rows.count()) as meter:
            report = ingest(rows, request.folder, name, on_error=OnError.SKIP, progress=meter.advance)
        prepared = _hold_out(request, name, report.manifest, description, examples)
        is_dialogue = converts or prepared.is_dialogue
        return replace(prepared, num_skipped=report.num_skipped, is_dialogue=is_dialogue)
    except BaseException:
        shutil.rmtree(request.folder)
        raise


def _hold_out(request: DataRequest, name: str, manifest: Path, description: str, examples: Examples) -> PreparedData:
    total = Manifest.open(manifest).num_samples
    count = request.heldout or min(_MOST_HELD_OUT, max(total // 10, min(20, total // 5)))
    if not 1 <= count < total:
        raise ConfigError(
            f"{request.source}: {total} samples, of which {count} would be held out; training needs more samples, or "
            "give a smaller --heldout"
        )
    excluded = hold_out(manifest, name, count, request.folder)
    return PreparedData(
        name=name,
        description=description,
        manifest=manifest,
        heldout=request.folder / "heldout.manifest",
        excluded=excluded,
        num_samples=total - count,
        num_heldout=count,
        num_skipped=0,
        examples=examples,
        is_dialogue=examples.kind is TextKind.DIALOGUE,
    )


def dataset_name(source: Path) -> str:
    """Return a valid name of a data set for a source."""
    stem = source.resolve().name.partition(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-") or "data"


def _make_folder(folder: Path, force: bool) -> None:
    """Create the folder. An older one is removed if ``force`` is set and ``init`` made it.

    Raises:
        ConfigError: it exists.
    """
    if folder.exists():
        ours = (folder / MARKER).is_file()
        if not ours or not force:
            remedy = "--force makes it anew" if ours else "it is not from `mmscale init`: choose another --output"
            raise ConfigError(f"{folder}: exists already; {remedy}")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).write_text("Folder of `mmscale init`: shards, held-out samples, tokenizer.\n")


def template_of(data: PreparedData) -> dict[str, Any]:
    """Return a template for the data set and a model without a chat format."""
    examples = data.examples
    if data.is_dialogue:
        return {"kind": "dialogue"}
    optional = {} if examples.all_have_images else {"images": "optional"}
    match examples.kind:
        case TextKind.QUESTION:
            question, answer = examples.question, examples.answer
            prompt = f"Question: {{{question}}}\nAnswer:"
            return {"kind": "caption", **optional, "prompts": [prompt], "answers": [f" {{{answer}}}"]}
        case TextKind.CAPTION:
            return {"kind": "caption", **optional}
        case TextKind.PAGE:
            return {"kind": "interleaved"}
        case TextKind.ANNOTATIONS:
            each = {"kind": "caption", "prompts": ["{question} "], "answers": ["{answer}"]}
            return {"kind": "annotations", "each": each}
    return {"kind": "text"}


def image_choices(data: PreparedData) -> int | None:
    """Return the number of different captions if they are few enough to be answers of a multiple choice; else None."""
    captions = Counter(data.examples.captions)
    if data.examples.kind is not TextKind.CAPTION or data.is_dialogue or not data.examples.all_have_images:
        return None
    repeated = len(captions) <= len(data.examples.captions) // 2
    return len(captions) if len(captions) >= 2 and (repeated or data.examples.is_class) else None


def train_tokenizer(data: PreparedData, folder: Path, most: int, progress: Progress) -> tuple[Path, int]:
    """Train a SentencePiece model on the texts, with as many pieces as they allow.

    Returns:
        The file, and its number of pieces: at most ``most``.

    Raises:
        DataConfigError: there is no text.
    """
    path, size = folder / "tokenizer.model", most
    while True:
        try:
            with progress(f"tokenizer of {size} pieces", None):
                trained = train_sentencepiece([data.manifest], path, size)
            return path, trained.vocab_size
        except DataConfigError as error:
            allowed = _ALLOWED.search(str(error))
            if allowed is None or int(allowed[1]) >= size:
                raise
            size = int(allowed[1])
