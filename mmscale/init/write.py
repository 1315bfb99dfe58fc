"""Compose, check and write the file of a new run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.config import DataConfig, DatasetConfig
from data_pipeline.errors import DataConfigError, DataPipelineError
from data_pipeline.images.video import VideoConfig, VideoTransform
from data_pipeline.io.atomic import write_whole
from data_pipeline.packing.config import PackingConfig
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.prepare.text_kinds import TextKind
from data_pipeline.text.tokenizer import (
    SentencePieceTokenizerConfig,
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
)
from mmscale.config import load
from mmscale.engine.config import EngineConfig
from mmscale.engine.precision import Precision, choose_precision
from mmscale.errors import ConfigError
from mmscale.evaluate import EvaluationConfig, check_sets
from mmscale.init.data import (
    DataRequest,
    PreparedData,
    Progress,
    image_choices,
    prepare_data,
    template_of,
    train_tokenizer,
)
from mmscale.init.machine import GIB, Machine
from mmscale.init.memory import MemoryModel, memory_model
from mmscale.init.model import StartingModel
from mmscale.init.sizes import DocumentSizes, Sizes, choose_sizes, measure_documents
from mmscale.init.text import CommentedYaml, compact
from mmscale.models.adapters import COMPONENT, AdaptersConfig
from mmscale.models.build import media_spec
from mmscale.models.config import ModelConfig
from mmscale.models.image_tokens import TOKENIZER
from mmscale.run.config import RunConfig
from mmscale.run.file_checks import check_files
from mmscale.run.stage_weights import check_initial_weights

HELD_OUT, CHOICE = "heldout", "choice"
_MOST_PIECES = 32_000
_LARGE = 100_000_000
_NATIVE_PIXELS = 448 * 448
_MOST_CHOICES = 20
_FRAMES = 8


@dataclass(frozen=True)
class RunRequest:
    """The user's wishes for the run.

    Attributes:
        output: The file to write.
        run_dir: Folder of the run.
        data: The data.
        adapters: ``lora`` or ``dora``; None trains the weights themselves.
        steps: Number of optimizer steps; None computes it from ``epochs``.
        epochs: Passes over the data.
    """

    output: Path
    run_dir: Path
    data: DataRequest
    adapters: str | None
    steps: int | None
    epochs: float


@dataclass(frozen=True)
class InitReport:
    """Result of ``write_run``.

    Attributes:
        file: The run file.
        run: Its configuration.
        data: The data.
        sizes: The sizes that were chosen.
        machine: The machine that they were chosen for.
        notes: Warnings of the checks.
    """

    file: Path
    run: RunConfig
    data: PreparedData
    sizes: Sizes
    machine: Machine
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Plan:
    """Everything that the text of the file needs."""

    request: RunRequest
    start: StartingModel
    model: ModelConfig
    data: PreparedData
    tokenizer: TokenizerConfig
    template: dict[str, Any] | None
    """Template of the data set; None: inherited from the base."""
    transforms: dict[str, Any] | None
    clips: dict[str, dict[str, Any]]
    """Blocks ``video`` and ``audio`` of the data set, without those that are inherited from the base."""
    machine: Machine
    precision: Precision
    memory: MemoryModel
    documents: DocumentSizes
    sizes: Sizes
    train: tuple[str, ...]
    choice: dict[str, Any] | None
    """A held-out set that asks which caption belongs to an image; None if the captions are no fixed answers."""


def write_run(request: RunRequest, start: StartingModel, machine: Machine, progress: Progress) -> InitReport:
    """Prepare the data, choose the sizes, and write the file if it passes the checks of ``config validate``.

    Args:
        request: The run.
        start: Its model.
        machine: The machine that will train it.
        progress: Displays the progress of long tasks.

    Raises:
        ConfigError: the model does not fit this machine or this data, or ``run_dir`` cannot be created.
        DataPipelineError: the data cannot be used.
    """
    chat = start.trained is not None and start.trained.template.kind == "dialogue"
    spoken = {TextKind.QUESTION} if start.trained is None else {TextKind.QUESTION, TextKind.CAPTION} if chat else set()
    data = prepare_data(
        request.data,
        frozenset(spoken),
        reads_images=start.config.vision is not None,
        hears=start.config.audio is not None,
        progress=progress,
    )
    written = False
    try:
        plan = _plan(request, start, machine, data, chat, progress)
        write_whole(request.output, _text(plan).encode())
        written = True
        loaded = load(request.output, [], RunConfig)
        notes = check_files(loaded.value)
        check_initial_weights(loaded)
    except BaseException:
        shutil.rmtree(request.data.folder)
        if written:
            request.output.unlink()
        raise
    return InitReport(request.output, loaded.value, data, plan.sizes, machine, tuple(notes))


def _plan(
    request: RunRequest, start: StartingModel, machine: Machine, data: PreparedData, chat: bool, progress: Progress
) -> _Plan:
    model, tokenizer_config = start.config, None
    if start.trained is not None:
        tokenizer_config = start.trained.tokenizer
    else:
        most = min(_MOST_PIECES, model.decoder.vocab_size)
        path, size = train_tokenizer(data, request.data.folder, most, progress)
        tokenizer_config = SentencePieceTokenizerConfig(path=_shown(path))
        decoder = model.decoder.model_copy(update={"vocab_size": -(-size // 64) * 64})
        model = model.model_copy(update={"decoder": decoder})
    if request.adapters is not None:
        adapters = AdaptersConfig(kind=request.adapters, rank=16, alpha=32)
        model = model.model_copy(update={"adapters": adapters})
    tokenizer = load_tokenizer(tokenizer_config)
    template = template_of(data)
    if chat and data.is_dialogue:
        assert start.trained is not None
        template = compact(start.trained.template)
    transforms = _transforms(data, start, model, template, tokenizer)
    clips = _clips(data, start, model)
    dataset = _dataset(data, template, transforms, clips)
    documents = measure_documents(dataset, tokenizer, media_spec(model))
    train = _trained_components(request, start, model, data)
    precision = choose_precision(EngineConfig(), machine.torch_device)
    memory = memory_model(model, frozenset(train), precision.dtype.itemsize, machine.device)
    # A tenth of an epoch at most, so that a small data set still gives some steps.
    most = 16 if start.trained is not None else 64
    wanted = max(1, min(most, max(4, data.num_samples // 40), data.num_samples))
    sizes = choose_sizes(machine, memory, documents, data.num_samples, wanted, request.epochs, request.steps)
    inherited = start.trained.defaults if start.trained is not None and not start.trained.has_stages else frozenset()
    return _Plan(
        request=request,
        start=start,
        model=model,
        data=data,
        tokenizer=tokenizer_config,
        template=None if chat and data.is_dialogue and "template" in inherited else template,
        transforms=None if "transforms" in inherited else transforms,
        clips={name: block for name, block in clips.items() if name not in inherited},
        machine=machine,
        precision=precision,
        memory=memory,
        documents=documents,
        sizes=sizes,
        train=train,
        choice=_choice(data, dataset, tokenizer_config, model, sizes),
    )


def _choice(
    data: PreparedData, dataset: DatasetConfig, tokenizer: TokenizerConfig, model: ModelConfig, sizes: Sizes
) -> dict[str, Any] | None:
    """Return a set of kind ``images``, if its check passes.

    Raises:
        ConfigError: the model is contrastive, which has no other set, and the check does not pass.
    """
    distinct = image_choices(data) or (data.num_heldout if not model.predicts_tokens else 0)
    if model.vision is None or not distinct:
        return None
    found = {
        "manifest": str(_shown(data.heldout)),
        "field": "caption",
        "choices": None if distinct <= _MOST_CHOICES else _MOST_CHOICES,
    }
    config = EvaluationConfig.model_validate({"sets": [{"name": CHOICE, **found}]})
    packing = {"max_tokens": sizes.max_tokens}
    block = DataConfig(tokenizer=tokenizer, datasets=(dataset,), lanes=1, packing=PackingConfig.model_validate(packing))
    try:
        check_sets(config, block, media_spec(model))
    except (ConfigError, DataPipelineError):
        if not model.predicts_tokens:
            raise
        return None
    return found


def _dataset(
    data: PreparedData,
    template: dict[str, Any],
    transforms: dict[str, Any] | None,
    clips: dict[str, dict[str, Any]],
) -> DatasetConfig:
    values = {"name": data.name, "manifest": data.manifest, "template": template}
    return DatasetConfig.model_validate(values | clips | ({} if transforms is None else {"transforms": transforms}))


def _clips(data: PreparedData, start: StartingModel, model: ModelConfig) -> dict[str, dict[str, Any]]:
    """Return the blocks ``video`` and ``audio`` for the data: those of the base, else eight frames, and the defaults.

    Raises:
        ConfigError: the model takes no videos.
    """
    blocks: dict[str, dict[str, Any]] = {}
    names = set(data.examples.clips)
    if "video" in names and start.trained is not None and start.trained.audio is not None:
        names |= {"audio"} if start.trained.audio.from_video else set()  # The sound tracks of the videos.
    for name in sorted(names):
        base = getattr(start.trained, name, None)
        blocks[name] = compact(base) if base is not None else _video(start, model) if name == "video" else {}
    return blocks


def _video(start: StartingModel, model: ModelConfig) -> dict[str, Any]:
    """Return a block for eight frames of each video. Raises ``ConfigError`` if the model takes no videos."""
    frames = {"kind": "uniform", "num_frames": _FRAMES}
    spec = media_spec(model)
    pixels = {} if spec.fixed_grid is not None else {"min_pixels": spec.size_multiple**2, "max_pixels": _NATIVE_PIXELS}
    try:
        VideoTransform(VideoConfig.model_validate({"frames": frames, **pixels}), spec)
    except DataConfigError as error:
        raise ConfigError(f"{start.name}: the samples have videos, but {error}") from error
    return {"frames": frames, **pixels}


def _transforms(
    data: PreparedData, start: StartingModel, model: ModelConfig, template: dict[str, Any], tokenizer: Tokenizer
) -> dict[str, Any] | None:
    """Return the transforms of the base, else the simplest ones that the model accepts; None without images.

    Raises:
        ConfigError: the model accepts none of them.
    """
    if start.trained is not None and (model.vision is not None or data.examples.have_images):
        return compact(start.trained.transforms)
    if model.vision is None or not (data.examples.have_images or data.examples.clips):
        return None
    spec, reasons = media_spec(model), []
    side = None if spec.fixed_grid is None else spec.fixed_grid[0] * spec.patch_size
    candidates: Sequence[dict[str, Any]] = (
        *([{"kind": "scaled", "longer": spec.largest_side}] if spec.largest_side is not None else ()),
        *([{"kind": "fixed", "size": side}] if side is not None else ()),
        {"kind": "native", "max_pixels": _NATIVE_PIXELS},
        {"kind": "tiles", "size": side, "tiling": {"kind": "llama"}},
        {"kind": "tiles", "size": side, "tiling": {"kind": "internvl"}},
        {"kind": "tiles", "size": side, "tiling": {"kind": "molmo"}},
    )
    for candidate in candidates:
        try:
            DocumentBuilder(_dataset(data, template, candidate, {}), tokenizer, spec)
            return candidate
        except DataConfigError as error:
            reasons.append(str(error))
    raise ConfigError(
        f"{start.name}: init knows no transforms for this vision tower ({reasons[0]}); take those of its recipe in "
        "configs/recipes, or docs/models.md"
    )


def _trained_components(
    request: RunRequest, start: StartingModel, model: ModelConfig, data: PreparedData
) -> tuple[str, ...]:
    if request.adapters is not None:
        return (COMPONENT,)
    if not data.examples.have_images and model.vision is not None and model.predicts_tokens:
        heard = ("audio", "audio_connector") if "audio" in data.examples.clips else ()
        return ("decoder", *(name for name in heard if name in model.components))
    if start.trained is None or model.vision is None or not model.predicts_tokens:
        return ("all",)
    return tuple(name for name in model.components if name not in ("vision", TOKENIZER))


def _shown(path: Path) -> Path:
    """Return a path relative to the working directory if it is inside of it."""
    absolute = Path(os.path.abspath(path))
    return absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute


def _text(plan: _Plan) -> str:
    out, start = CommentedYaml(), plan.start
    how = _way(plan)
    out.comment(f"{how} of {start.name} on {plan.data.name}: {plan.data.description}.")
    out.comment(
        f"Sizes for {plan.machine.name} with {plan.machine.memory_bytes / GIB:.1f} GiB free. Written by `mmscale "
        "init`: change what you like."
    )
    folder = Path(os.path.abspath(plan.request.output)).parent
    if start.trained is not None and not start.trained.has_stages:
        base = os.path.relpath(start.trained.folder, folder)
        out.value(0, "base", base, "relative to this file: its model, tokenizer, template and transforms")
    out.value(0, "run_dir", str(plan.request.run_dir), "checkpoints, metrics and report of this run; must be new")
    out.value(0, "seed", 1, "order of the samples, and random first values")
    out.blank()
    _write_data(out, plan)
    out.blank()
    _write_model(out, plan, folder)
    _write_stage(out, plan)
    out.blank()
    _write_engine(out, plan)
    out.blank()
    _write_evaluation(out, plan)
    return out.text()


def _way(plan: _Plan) -> str:
    if plan.start.trained is None:
        return "Training from random values"
    adapters = plan.model.adapters
    trained = "all trained weights" if adapters is None else {"lora": "LoRA", "dora": "DoRA"}[adapters.kind]
    return f"Fine-tune ({trained})"


def _write_data(out: CommentedYaml, plan: _Plan) -> None:
    data, sizes, start = plan.data, plan.sizes, plan.start
    out.block(0, "data")
    if start.trained is None:
        out.value(
            1,
            "tokenizer",
            compact(plan.tokenizer),
            "trained on these samples",
        )
    elif start.trained.has_stages:
        folder = Path(os.path.abspath(plan.request.output)).parent
        base = os.path.relpath(start.trained.folder, folder)
        out.value(1, "tokenizer", {"base": base}, "that of the weights; relative to this file")
    out.block(1, "datasets")
    out.value(2, "- name", data.name)
    total = data.num_samples + data.num_heldout
    out.value(3, "manifest", str(_shown(data.manifest)), f"{total:,} samples; made by `mmscale data ingest` or init")
    if plan.template is not None:
        out.value(3, "template", plan.template, "what is read and what is learned: `mmscale data show`")
    if plan.transforms is not None:
        out.value(3, "transforms", plan.transforms, "how an image becomes patches")
    for kind, block in plan.clips.items():
        out.value(3, kind, block, f"how a {'sound' if kind == 'audio' else kind} becomes tokens: docs/{kind}.md")
    out.value(
        1,
        "faults",
        {"exclude": [str(_shown(data.excluded))]},
        f"the {data.num_heldout} held-out samples, which training must not see",
    )
    plural = "pack" if sizes.lanes == 1 else "packs"
    out.value(
        1,
        "lanes",
        sizes.lanes,
        f"{plural} of a step: {sizes.step_samples} samples a step, on {plan.machine.ranks} rank(s)",
    )
    out.block(1, "packing")
    documents = plan.documents
    out.value(
        2,
        "max_tokens",
        sizes.max_tokens,
        f"a sample has {documents.mean_tokens:.0f} tokens on average, at most {documents.longest_tokens}",
    )
    out.value(2, "max_documents", sizes.documents, "samples of a pack: bounds memory")
    out.value(2, "too_long", "truncate", "cut a longer sample instead of leaving it out")
    out.value(1, "workers", sizes.workers, f"processes of a rank that load data; {plan.machine.cores} cores here")


def _write_model(out: CommentedYaml, plan: _Plan, folder: Path) -> None:
    start = plan.start
    based = start.trained is None or start.trained.has_stages
    if not based and plan.model.adapters is None:
        return
    out.block(0, "model")
    if start.trained is None:
        assert start.file is not None
        out.value(1, "base", os.path.relpath(start.file, folder), "relative to this file")
        reason = "rows of the embedding: the tokenizer's pieces, rounded up to a multiple of 64"
        out.value(1, "decoder", {"vocab_size": plan.model.decoder.vocab_size}, reason)
    elif start.trained.has_stages:
        out.value(1, "base", os.path.relpath(start.trained.folder, folder), "relative to this file")
    if plan.model.adapters is not None:
        adapters = plan.model.adapters
        values = {"kind": adapters.kind, "rank": adapters.rank, "alpha": adapters.alpha, "targets": {"decoder": "all"}}
        share = plan.memory.trained / plan.memory.total
        out.value(1, "adapters", values, f"{plan.memory.trained:,} values, {share:.1%} of the model")
    out.blank()


def _write_stage(out: CommentedYaml, plan: _Plan) -> None:
    sizes, trained = plan.sizes, plan.start.trained
    rate, reason = 1e-3, "usual for a small model from random values"
    if plan.model.adapters is not None:
        rate, reason = 1e-4, "usual for adapters; 1e-5 would hardly move them"
    elif trained is not None:
        rate, reason = 1e-5, "usual for trained weights; more would damage what they know"
    elif plan.memory.total >= _LARGE:
        rate, reason = 3e-4, "usual for a large model from random values"
    out.block(0, "stages")
    out.value(1, "- name", "tune" if trained is not None else "train")
    epochs = sizes.steps * sizes.step_samples / plan.data.num_samples
    out.value(2, "steps", sizes.steps, f"about {epochs:.1f} passes over {plan.data.num_samples:,} samples")
    if trained is not None:
        out.value(2, "weights", [{"checkpoint": str(_shown(trained.folder))}], "the newest checkpoint of this folder")
    frozen = [name for name in plan.model.components if name not in plan.train and plan.train != ("all",)]
    out.value(2, "train", list(plan.train), f"{', '.join(frozen)}: frozen" if frozen else "every component")
    out.value(2, "learning_rate", {"default": rate}, reason)
    out.value(2, "schedule", "cosine", "the last step has a tenth of the peak")
    out.value(2, "warmup_steps", max(1, sizes.steps // 20), "5 % of the steps")
    decay, reason = (0.0, "no weight decay: it would pull trained weights towards 0")
    if trained is None:
        decay, reason = (0.1, "weight decay keeps weights small")
    out.value(2, "optimizer", {"kind": "adamw", "weight_decay": decay}, reason)
    out.value(2, "clip", 1.0, "largest gradient norm")


def _write_engine(out: CommentedYaml, plan: _Plan) -> None:
    sizes, machine = plan.sizes, plan.machine
    estimate = f"about {sizes.rank_bytes / GIB:.1f} of {machine.memory_bytes / GIB:.1f} GiB of memory for each rank"
    out.block(0, "engine", f"{estimate}, estimated")
    shards = {1: "optimizer state", 2: "optimizer state and gradients", 3: "weights too"}[sizes.zero_stage]
    reason = "the lowest stage that fits" if machine.ranks > 1 else "one rank: nothing to share"
    out.value(1, "zero_stage", sizes.zero_stage, f"ranks share {shards}; {reason}")
    out.value(1, "precision", "auto", f"{plan.precision.name} here ({plan.precision.reason})")
    out.value(1, "micro_lanes", sizes.micro_lanes, "packs that a rank computes at once: as many as fit")
    reason = "needed to fit" if sizes.recompute else "not needed: true saves memory and takes a third more time"
    out.value(1, "activation_checkpointing", sizes.recompute, reason)
    out.blank()
    out.block(0, "checkpoint")
    out.value(1, "every_steps", max(1, -(-sizes.steps // 4)), "a killed run loses at most a quarter of its steps")
    out.value(1, "keep_last", 2, "newest checkpoints to keep; the best one is kept as well")
    if not sizes.background:
        out.value(1, "background", False, "a copy for writing in the background would not fit")


def _write_evaluation(out: CommentedYaml, plan: _Plan) -> None:
    data, heldout = plan.data, str(_shown(plan.data.heldout))
    out.block(0, "evaluation")
    out.value(1, "every_steps", max(1, plan.sizes.steps // 10), "ten times during the training, and at the end")
    out.block(1, "sets")
    if plan.model.predicts_tokens:
        out.value(2, "- name", HELD_OUT, "how well the model predicts samples that it has not seen")
        out.value(3, "kind", "perplexity")
        out.value(3, "manifest", heldout, f"{data.num_heldout} samples")
    if plan.choice is not None:
        out.value(2, "- name", CHOICE, "which caption belongs to the image")
        for key, value in plan.choice.items():
            out.value(3, key, value, "candidates; null: every caption that occurs" if key == "choices" else "")
    metric = f"{HELD_OUT}.loss" if plan.model.predicts_tokens else f"{CHOICE}.score"
    out.value(1, "best", {"metric": metric}, "its checkpoint is kept: RUN/checkpoints/best")
