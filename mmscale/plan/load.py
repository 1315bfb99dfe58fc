"""The work of one pack: the counts that operations are proportional to, tokens, samples and bytes.

    the data exist here    replay the first steps of a few lanes, as the loader packs them, without decoding images
    they do not            packs filled with equal documents of an assumed size

Every count is a mean over packs, so it need not be a whole number.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.config import DataConfig, DatasetConfig
from data_pipeline.document import Document
from data_pipeline.errors import SampleError
from data_pipeline.history.replay import Replay
from data_pipeline.images.drawn_images import DrawnTokens, example_tokens
from data_pipeline.media_spec import IMAGE, Grid, MediaSpec, ModalitySpec, Placement
from data_pipeline.packing.collate import collate, join_nothing
from data_pipeline.packing.packer import Budget, Pack, PackUsage
from data_pipeline.packing.synthetic_documents import dummy_document, example_document
from data_pipeline.shards.manifest import Manifest
from mmscale.errors import ConfigError, MMScaleError
from mmscale.models.config import ModelConfig
from mmscale.models.flops import learned_counts
from mmscale.run.config import RunConfig
from mmscale.run.stage_teachers import teacher_models

_LANES, _STEPS = 4, 3
"""Lanes and steps of a replay. Twelve packs of the quickstart have the mean of all packs within 5 %."""
_IMAGE_TOKENS = 256
_CODE_PIXELS = 8
"""Assumed pixels of a code, a side, for stored token grids: those of Emu3. The data decide, and do not exist here."""


@dataclass(frozen=True)
class ExampleDocument:
    """The assumed size of a document, for data that do not exist here.

    A data set with the block of a further modality, such as ``audio``, has one typical item of it in each document.

    Attributes:
        tokens: Text tokens; None: 256 with an image or a sound, else enough to fill a pack.
        height, width: Size of its image in pixels; None: 768 and 1024, or a smaller image if no pack holds that one.
            Templates without images have none.
    """

    tokens: int | None = None
    height: int | None = None
    width: int | None = None

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of its image: the given one, or those to choose from, largest first."""
        if self.height is not None and self.width is not None:
            return [(self.height, self.width)]
        # Square ones too: rules that go by aspect alone, such as InternVL's, cut every other one into 4 x 3 tiles.
        return [(96 * side, columns * side) for columns in (128, 96) for side in range(8, 0, -1)]


@dataclass(frozen=True)
class StageLoad:
    """The mean pack of a stage.

    Attributes:
        counts: For the model and then for each teacher, its counts (``learned_counts``). ``passes`` is not included.
        tokens: Tokens without those of dummy documents.
        samples: Documents without dummy documents.
        sample_bytes: Mean bytes of a sample in its shard; None if the manifests do not exist here.
        shards: Number of shards; None likewise.
        available_samples: Samples of all data sets; None likewise.
        measured: Whether packs were replayed; False if they are assumed.
        source: One sentence on where the values come from.
    """

    counts: tuple[dict[str, float], ...]
    tokens: float
    samples: float
    sample_bytes: float | None
    shards: int | None
    available_samples: int | None
    measured: bool
    source: str


def stage_load(config: RunConfig, number: int, example: ExampleDocument | None = None) -> StageLoad:
    """Return the mean pack of a stage.

    Args:
        config: The run.
        number: The stage.
        example: Assume documents of this size, even if the data exist here. None: only if they do not.

    Raises:
        ConfigError: the image of ``example`` does not fit the transforms or a pack, or a teacher cannot be found.
        DataConfigError: the data do not fit the model.
        DataPipelineError: the data are damaged.
    """
    data, spec = config.stage_data(number), config.stage_media(number)
    manifests = _manifests(data)
    teachers, note = _teachers(config, number)
    models = [config.decoder_model(number), *teachers]
    packs = replay_packs(data, spec, config.seed) if example is None else []
    if packs:
        documents = [document for pack in packs for document in pack.documents]
        counts, tokens, samples = _mean_counts([documents], [1.0], models, spec, len(packs))
        source = f"replayed {len(packs)} packs"
    else:
        counts, tokens, samples, source = _assumed(data, spec, models, example or ExampleDocument())
    sample_bytes = shards = available = None
    if manifests is not None:
        sizes = [sum(each.shard_bytes(n) for n in range(each.num_shards)) / each.num_samples for each in manifests]
        shares = _shares(data.datasets, [each.num_samples for each in manifests])
        sample_bytes = sum(size * share for size, share in zip(sizes, shares, strict=True))
        shards = sum(each.num_shards for each in manifests)
        available = sum(each.num_samples for each in manifests)
    return StageLoad(counts, tokens, samples, sample_bytes, shards, available, bool(packs), source + note)


def has_data(data: DataConfig) -> bool:
    """Return whether this machine can read the data block: local manifests and the tokenizer exist."""
    return _manifests(data) is not None and data.tokenizer.path.exists()


def _manifests(data: DataConfig) -> list[Manifest] | None:
    """Return the manifests of all data sets; None if one is remote, missing or not used."""
    paths = [dataset.manifest for dataset in data.datasets]
    found = [path for path in paths if isinstance(path, Path) and path.exists()]
    return [Manifest.open(path) for path in found] if found and len(found) == len(paths) else None


def _teachers(config: RunConfig, number: int) -> tuple[list[ModelConfig], str]:
    try:
        return list(teacher_models(config, number)), ""
    except MMScaleError as error:
        return [], f"; the teachers are not counted ({error})"


def replay_packs(data: DataConfig, spec: MediaSpec, seed: int) -> list[Pack]:
    """Return the packs of the first steps of a few lanes, with their dummy documents. Empty without the data.

    Raises:
        DataPipelineError: the data are damaged, or do not fit the model.
    """
    if not has_data(data):
        return []
    replay = Replay(data, spec, seed, lanes=range(min(_LANES, data.lanes)), give_up=True)
    return [pack for _ in range(_STEPS) for pack in replay.next_packs().values()]


def example_documents(data: DataConfig, spec: MediaSpec, example: ExampleDocument) -> list[Document]:
    """Return one document of each data set with the size of ``example``, cut to what a pack holds.

    An image as tokens has the rows and columns of ``image_tokens.grid``. Without this setting they follow from the size
    of ``example``. If ``example`` has no size, an image that no pack could hold is assumed to be reduced. So is a
    typical sound.

    Raises:
        ConfigError: the image of ``example`` does not fit the transforms, or a document cannot hold this image, an
            image of ``image_tokens.grid`` or the smallest sound.
    """
    budget = Budget(data.packing, spec, dummy_document(spec, 0))
    room = data.packing.max_tokens - budget.dummy.num_tokens
    longest = min(room, spec.max_document_tokens or room)
    takes_images = spec.needs_embedded or spec.needs_unembedded
    documents = []
    for dataset in data.datasets:
        images: list[tuple[int, int]] = []
        room_for_text = longest
        if takes_images and dataset.template.takes_images:
            size, room_for_text = _example_size(dataset, budget, example)
            images = [size]
        heard_names = [name for name in dataset.modalities if name in spec.modalities and dataset.template.takes_images]
        most = (longest - 1) // max(1, len(heard_names))
        clips = {name: [_example_clip(name, spec.modalities[name], most)] for name in heard_names}
        drawn = _example_image(dataset, spec, example, longest - min(_IMAGE_TOKENS, longest // 4))
        heard = sum(spec.modalities[name].num_features(grid) for name, grids in clips.items() for grid in grids)
        room_for_text = max(1, room_for_text - heard) - (0 if drawn is None else len(drawn.ids))
        if drawn is not None and room_for_text < 1:
            raise ConfigError(
                f"data set {dataset.name}: an image has {len(drawn.ids)} tokens, and a document has at most {longest}; "
                "increase data.packing.max_tokens, or reduce the image (image_tokens.grid; of a plan --image-size)"
            )
        has_media = images or clips or drawn is not None
        tokens = example.tokens or (min(_IMAGE_TOKENS, room_for_text) if has_media else room_for_text)
        tokens, weight = min(tokens, room_for_text), float(dataset.template.draws)
        documents.append(example_document(dataset.transforms, spec, images, tokens, drawn, weight, clips))
    return documents


def _example_size(dataset: DatasetConfig, budget: Budget, example: ExampleDocument) -> tuple[tuple[int, int], int]:
    """Return height and width of the largest image of ``example`` that fits into a pack with a token of text.

    Returns also the number of text tokens that a document has room for beside it, at least 1.

    Raises:
        ConfigError: no image fits, or the transforms accept none.
    """
    refused: ConfigError | None = None
    spec = budget.spec
    for height, width in example.image_sizes:
        try:
            (document,) = budget.admit(example_document(dataset.transforms, spec, [(height, width)], 1))
        except SampleError as error:
            refused = refused or ConfigError(f"data set {dataset.name}, image of {width}x{height}: {error.reason}")
            continue
        room = budget.config.max_tokens + 1 - document.num_tokens
        if budget.needs_dummy(PackUsage.of_document(document, spec)):
            room -= budget.dummy.num_tokens
        if spec.max_document_tokens is not None:  # Positions, not tokens: an image may take fewer.
            room = min(room, spec.max_document_tokens - int(document.position_ids.max()))
        return (height, width), room
    assert refused is not None, "an example has a size"
    raise refused


def _example_clip(name: str, inputs: ModalitySpec, most: int) -> Grid:
    """Return the grid of a typical item, or of the largest one with its proportions that has at most ``most`` features.

    Raises:
        ConfigError: the smallest item has more features.
    """
    grid, least = inputs.typical_grid, inputs.minimal_grid
    while (features := inputs.num_features(grid)) > most:
        if grid == least:
            raise ConfigError(
                f"data.{name}: the smallest {inputs.noun} has {features} tokens, and a document has room for {most}; "
                "increase data.packing.max_tokens"
            )
        time, height, width = (
            max(low, min(side - 1, side * most // features)) for side, low in zip(grid, least, strict=True)
        )
        grid = (time, height, width)
    return grid


def _example_image(dataset: DatasetConfig, spec: MediaSpec, example: ExampleDocument, most: int) -> DrawnTokens | None:
    """Return the image as tokens of a document; None if documents have none.

    Without ``image_tokens.grid`` and a size in ``example`` it has at most ``most`` tokens.
    """
    config, template = dataset.image_tokens, dataset.template
    if config is None or not (template.draws or (template.takes_images and spec.placement is Placement.NONE)):
        return None
    if config.grid is not None:
        return example_tokens(config, *config.grid)
    stride = _CODE_PIXELS if config.encoded == "stored" else spec.of_codes.patch_size
    sizes = example.image_sizes
    height, width = (max(1, side // stride) for side in sizes[0])
    drawn = example_tokens(config, height, width)
    while len(sizes) > 1 and len(drawn.ids) > most and height * width > 1:
        scale = math.sqrt(most / len(drawn.ids))
        height, width = (max(1, min(side - (side > 1), int(side * scale))) for side in (height, width))
        drawn = example_tokens(config, height, width)
    return drawn


def _assumed(
    data: DataConfig, spec: MediaSpec, models: Sequence[ModelConfig], example: ExampleDocument
) -> tuple[tuple[dict[str, float], ...], float, float, str]:
    packing, documents = data.packing, example_documents(data, spec, example)
    shares = _shares(data.datasets, [1] * len(documents))
    mean_tokens, mean_cost = (
        sum(share * value for share, value in zip(shares, values, strict=True))
        for values in ([each.num_tokens for each in documents], [each.cost(spec) for each in documents])
    )
    fitting = [packing.max_tokens / mean_tokens, packing.max_documents or packing.max_tokens]
    fitting += [] if packing.max_cost is None else [packing.max_cost / mean_cost]
    per_pack = max(1.0, min(fitting))
    counts, tokens_of_one, _ = _mean_counts([[each] for each in documents], shares, models, spec, 1)
    scaled = tuple({name: value * per_pack for name, value in count.items()} for count in counts)
    what = f"{mean_tokens:,.0f} tokens"
    kinds = {item.modality for each in documents for item in each.items}
    of_drawn = zip(data.datasets, documents, strict=True)
    drawn = {each.image_tokens.grid for each, made in of_drawn if made.drawn is not None and each.image_tokens}
    (height, width), *smaller = example.image_sizes
    has_pixels = IMAGE in kinds or None in drawn
    notes = [f"image of {'up to ' if smaller else ''}{width}x{height} pixels"] if has_pixels else []
    notes += [f"image of {grid[1]}x{grid[0]} codes" for grid in drawn if grid is not None]
    notes += [f"{name} of {spec.modalities[name].typical_grid[0]} rows" for name in sorted(kinds - {IMAGE})]
    what += f" ({', '.join(notes)})" if notes else ""
    source = f"assumed: {per_pack:,.1f} documents of {what} in a pack"
    return scaled, min(tokens_of_one * per_pack, packing.max_tokens), per_pack, source


def _mean_counts(
    groups: Sequence[Sequence[Document]],
    shares: Sequence[float],
    models: Sequence[ModelConfig],
    spec: MediaSpec,
    packs: int,
) -> tuple[tuple[dict[str, float], ...], float, float]:
    """Return the counts of each model, the tokens and the samples, weighted by ``shares`` and divided by ``packs``."""
    totals = [Counter[str]() for _ in models]
    tokens = samples = 0.0
    for documents, share in zip(groups, shares, strict=True):
        batch = collate([Pack(tuple(documents), 0)], spec, join_nothing)
        for model, total in zip(models, totals, strict=True):
            for name, count in learned_counts(model, batch).items():
                total[name] += share * count / packs  # type: ignore[assignment]  # A mean.
        tokens += share * batch.num_tokens / packs
        samples += share * batch.num_samples / packs
    return (
        tuple({name: count for name, count in total.items() if name != "passes"} for total in totals),
        tokens,
        samples,
    )


def _shares(datasets: Sequence[DatasetConfig], num_samples: Sequence[int]) -> list[float]:
    """Return the share of each data set in the drawn samples of the first step."""
    weights = [each.weight_changes(count)[0][1] for each, count in zip(datasets, num_samples, strict=True)]
    return [weight / sum(weights) for weight in weights]
