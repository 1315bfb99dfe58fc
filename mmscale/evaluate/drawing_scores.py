"""Score drawings: a classifier names them, their vectors are compared with those of real images, copies are searched.

    samples --texts--> drawings --classifier--> vectors --names of blocks--> score, control
                           |                       +-----real images-------> Frechet distance, and its floor
                           +--pixels--training images--> nearest one, and that of real images

The control scores each drawing with the name of another one, as if the texts had been permuted. The values do not
depend on the number of ranks: the groups of texts that are drawn together do not, and each drawing has random numbers
of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from torch import nn

from data_pipeline.errors import DataPipelineError, FaultKind, SampleError
from data_pipeline.images.decode import Pixels, decode_image
from data_pipeline.io.atomic import as_utf8, write_whole
from data_pipeline.media_spec import MediaSpec
from data_pipeline.sample import ImagePart, Sample
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader
from data_pipeline.text.templates.base import fill
from mmscale.dist import World, all_reduce_sum_list, broadcast_bytes, gather_bytes
from mmscale.errors import ConfigError
from mmscale.evaluate.classifier import Classifier, as_sample, check_classifier
from mmscale.evaluate.config import DrawingSet
from mmscale.evaluate.drawings import (
    MOST_TOGETHER,
    DrawingContext,
    DrawingPrompts,
    Text,
    check_model,
    draw_images,
    drawing_dataset,
    pixels_of_a_code,
)
from mmscale.evaluate.heldout import EvaluationContext, ImageQuestions, call_on_all_ranks
from mmscale.evaluate.pairs import chunks_of_rank
from mmscale.evaluate.questions import QuestionBlock, Table, accuracies, make_blocks
from mmscale.evaluate.result import DrawingsResult, binomial_error
from mmscale.evaluate.similarity import Vectors
from mmscale.metrics.sample_images import encode_png

_COMPARED_SIDE = 32
"""Side of the images whose pixels are compared. Larger ones cost time and show no further copies."""
_MOST_PIXELS = 1 << 26
_SHOWN_SIDE = 256
"""Longest side of a training image that is written beside a drawing, pixels."""
_TRAIN_BLOCK = 512
"""Training images that are compared at once: 512 x 3072 values of 8 bytes are 12 MiB."""
_NEAR_QUANTILE = 0.05

Rows = npt.NDArray[np.float64]
"""Images as rows of pixel values from 0 to 255, ``(images, 3 * 32 * 32)``."""


class Nearest(NamedTuple):
    """The nearest training image of each of some images.

    Attributes:
        distances: float64 ``(images,)``, root of the mean squared difference of pixel values in [0, 1].
        numbers: int64 ``(images,)``, number of the nearest sample in the manifest.
    """

    distances: npt.NDArray[np.float64]
    numbers: npt.NDArray[np.int64]


@dataclass(frozen=True)
class NamedDrawings:
    """Drawings with the classifier's answers.

    Attributes:
        score: Share of drawings whose right name is the most similar of the block's candidates.
        control: The same share if each drawing is replaced by that of another sample of its block.
        said: The most similar candidate of each drawing.
        choices: Number of candidates.
    """

    score: float
    control: float
    said: list[str]
    choices: int


@dataclass(frozen=True)
class Copies:
    """The nearest training images of the drawings, and of real images of the set, which are no training images."""

    drawings: Nearest
    real: Nearest

    @classmethod
    def search(
        cls, world: World, held: DrawingSet, train: Path, drawings: Sequence[Pixels], real: Sequence[Sample]
    ) -> Copies:
        """Search the training images of ``train``. All ranks must call; see ``nearest_images``."""
        pixels = call_on_all_ranks(world, held, lambda: [*drawings, *map(first_image, real)])
        found = nearest_images(world, held, train, pixels, held.train_limit)
        n = len(drawings)
        return cls(Nearest(found.distances[:n], found.numbers[:n]), Nearest(found.distances[n:], found.numbers[n:]))

    @property
    def share(self) -> float:
        """Share of drawings that are nearer to a training image than 19 of 20 real images are."""
        return float(np.mean(self.drawings.distances <= np.quantile(self.real.distances, _NEAR_QUANTILE)))


def score_drawings(context: EvaluationContext, held: DrawingSet) -> DrawingsResult:
    """Draw and score one set, and write the drawings to ``context.answers_folder``. All ranks must call.

    Raises:
        ConfigError: the model draws no images, the classifier is missing or no contrastive model, or the set is too
            small.
        DataPipelineError: a file is missing or damaged, or cannot be written. Every rank raises.
    """
    world = context.world
    questions = call_on_all_ranks(world, held, lambda: ImageQuestions.read(held))
    blocks = make_blocks(questions.answers, questions.pool, held.choices, held.seed)
    newest = call_on_all_ranks(world, held, lambda: check_classifier(held.classifier))
    # The run of the classifier may be saving: all ranks load the checkpoint that rank 0 found.
    checkpoint = Path(broadcast_bytes(world, str(newest).encode()).decode())
    tokens = context.config.tokens_per_forward
    # Load it in each evaluation: 5 million parameters take 0.1 s (1 CPU thread), and training needs the memory between.
    classifier = call_on_all_ranks(
        world,
        held,
        lambda: Classifier.open(checkpoint, world, template=held.template, name=held.name, tokens_per_forward=tokens),
    )
    drawings = _draw(context, held, [_text(held, sample) for sample in questions.samples])
    real = call_on_all_ranks(world, held, lambda: _real_images(held, len(drawings)))
    names = sorted({name for block in blocks for name in block.candidates})
    of_images, of_names = classifier.vectors([*map(as_sample, drawings), *real], names)
    named = name_drawings(of_images[: len(drawings)], names, of_names, blocks)
    of_real, n = of_images[len(drawings) :], len(drawings)
    half = len(real) // 2
    near = None if held.train is None else Copies.search(world, held, held.train, drawings, real[:half])
    if context.answers_folder is not None:
        call_on_all_ranks(world, held, lambda: _write(context, held, questions, drawings, named.said, near))
    return DrawingsResult(
        score=named.score,
        control=named.control,
        chance=1 / named.choices,
        n=n,
        metric=f"{held.field} of drawings among {named.choices}",
        error=binomial_error(named.score, n),
        control_error=binomial_error(named.control, n),
        frechet=frechet_distance(of_images[:half], of_real[:half]),
        frechet_real=frechet_distance(of_real[half:], of_real[:half]),
        frechet_n=half,
        nearest=None if near is None else float(np.median(near.drawings.distances)),
        nearest_real=None if near is None else float(np.median(near.real.distances)),
        near_copies=None if near is None else near.share,
        classifier=classifier.digest,
    )


def name_drawings(
    of_images: Vectors, names: Sequence[str], of_names: Vectors, blocks: Sequence[QuestionBlock]
) -> NamedDrawings:
    """Choose the most similar name of each drawing.

    Args:
        of_images: Vectors of norm 1, ``(drawings, C)``.
        names: Names of ``of_names``.
        of_names: Vectors of norm 1, ``(names, C)``.
        blocks: The questions; each drawing is in exactly one block.
    """
    number_of = {name: number for number, name in enumerate(names)}
    tables: list[Table] = []
    said = [""] * len(of_images)
    for block in blocks:
        columns = of_names[[number_of[name] for name in block.candidates]]
        tables.append(of_images[list(block.samples)] @ columns.T)
        for sample, row in zip(block.samples, tables[-1], strict=True):
            said[sample] = block.candidates[int(row.argmax())]
    score, control = accuracies(tables, blocks)
    return NamedDrawings(score, control, said, len(blocks[0].candidates))


def frechet_distance(first: Vectors, second: Vectors) -> float:
    """Return the squared Frechet distance of two normal distributions that are fitted to two sets of vectors.

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` with means m and unbiased covariances C, in double precision. The
    trace of the root is the sum of the singular values of ``R1 R2^T``, where ``C = R^T R``. The value depends on the
    number of vectors: compare values with equal numbers only.

    Args:
        first: ``(n, C)``, n at least 2.
        second: ``(m, C)``, m at least 2.

    Source: Dowson and Landau 1982, "The Frechet distance between multivariate normal distributions"; Heusel et al.
    2017 (arXiv 1706.08500), equation 6, with the vectors of another classifier.
    """
    means, roots, trace = [], [], 0.0
    for vectors in (np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)):
        mean = vectors.mean(0)
        root = np.linalg.qr((vectors - mean) / np.sqrt(len(vectors) - 1)).R
        means.append(mean)
        roots.append(root)
        trace += float((root**2).sum())
    cross = float(np.linalg.norm(roots[0] @ roots[1].T, ord="nuc"))
    return max(0.0, float(((means[0] - means[1]) ** 2).sum()) + trace - 2 * cross)


def nearest_images(
    world: World, held: DrawingSet, train: Path, images: Sequence[Pixels], limit: int | None = None
) -> Nearest:
    """Return the nearest training image of each image, by pixels. All ranks must call; all get the same result.

    Images are compared as 32 x 32 pixels. Pixels are compared rather than vectors of the classifier: two pictures of
    one thing have near vectors, and only a copy has near pixels. Of equally near samples the first one is returned.

    Args:
        world: Ranks that share the training images.
        held: The set, for messages and the seed.
        train: Manifest of the training images. Of several images of a sample the first one is compared.
        images: uint8 ``(H, W, 3)`` each, at least one.
        limit: Largest number of training images, chosen at random.

    Raises:
        ConfigError: the manifest has no samples.
        DataPipelineError: a sample is damaged or has no image. Every rank raises.
    """
    asked = np.stack([_row(image) for image in images])

    def search() -> Rows:
        best = np.full((2, len(asked)), np.inf)  # Squared distances, and numbers of samples.
        with closing(SampleReader(Manifest.open(train), held.name)) as reader:
            mine = np.array_split(_chosen(held, train, reader.manifest.num_samples, limit), world.world_size)
            for start in range(0, len(mine[world.rank]), _TRAIN_BLOCK):
                numbers = mine[world.rank][start : start + _TRAIN_BLOCK]
                rows = np.stack([_row(first_image(reader.read(int(number)))) for number in numbers])
                # The values are integers below 2^53, so the sums are exact in any order.
                squares = (asked**2).sum(1)[:, None] + (rows**2).sum(1) - 2 * asked @ rows.T
                chosen = squares.argmin(1)
                found = np.stack([squares[np.arange(len(asked)), chosen], numbers[chosen].astype(np.float64)])
                best = np.where(found[0] < best[0], found, best)
        return best

    best = call_on_all_ranks(world, held, search)
    table = np.zeros((world.world_size, *best.shape))
    table[world.rank] = best
    table = np.array(all_reduce_sum_list(world, table.ravel().tolist())).reshape(table.shape)
    rank = table[:, 0].argmin(0)  # The first of equal ones: ranks have ascending samples.
    squares, numbers = table[rank, :, np.arange(len(asked))].T
    return Nearest(np.sqrt(squares / asked.shape[1]) / 255, numbers.astype(np.int64))


def check_drawing_set(held: DrawingSet, drawing: DrawingContext, spec: MediaSpec, model: object) -> None:
    """Check a set before a run starts: classifier, names, texts and their length, and some images.

    Args:
        held: The set.
        drawing: Data block and image tokenizers.
        spec: Gives the number of positions of the model.
        model: Configuration of the model.

    Raises:
        ConfigError: the set cannot be scored.
        DataPipelineError: a file is damaged.
    """
    own = check_model(model, held.sampling, held.guidance).image_tokenizer
    check_classifier(held.classifier)
    questions = ImageQuestions.read(held)
    make_blocks(questions.answers, questions.pool, held.choices, held.seed)
    _prompts(held, drawing, spec, None if own is None else own.stride).check(
        [_text(held, sample) for sample in questions.samples]
    )
    for image in _real_images(held, 2):
        first_image(image)
    if held.train is not None:
        with closing(SampleReader(Manifest.open(held.train), held.name)) as reader:
            first_image(reader.read(int(_chosen(held, held.train, reader.manifest.num_samples, 1)[0])))


def first_image(sample: Sample) -> Pixels:
    """Return the pixels of a sample's first image.

    Raises:
        SampleError: there is none, or it is damaged.
    """
    origin = sample.provenance
    image = next((part for part in sample.parts if isinstance(part, ImagePart) and part.data), None)
    try:
        if image is None:
            raise SampleError("no image to compare drawings with", kind=FaultKind.NO_IMAGE)
        return decode_image(image.data, max_pixels=_MOST_PIXELS)
    except SampleError as error:
        raise error.located(origin.shard, origin.key) from error


def _text(held: DrawingSet, sample: Sample) -> Text:
    """Return the text to draw for a sample, or its fields, which the template of training turns into a text."""
    return sample.fields if held.prompt is None else fill(held.prompt, sample.fields)


def _draw(context: EvaluationContext, held: DrawingSet, texts: Sequence[Text]) -> list[Pixels]:
    """Return a drawing of each text, the same on every rank. All ranks must call."""
    world, model = context.world, cast(nn.Module, context.model)
    drawing = context.drawing or DrawingContext(context.data)
    given = None if held.tokenizer is None else drawing.tokenizers.get(held.tokenizer)
    # Check all texts on every rank: one that raised alone would leave the others in a forward pass.
    stride = getattr(getattr(model, "image_tokenizer", None), "stride", None)
    call_on_all_ranks(world, held, lambda: _prompts(held, drawing, context.spec, stride).check(texts))
    count = min(held.batch_size or MOST_TOGETHER, len(texts))
    chunks = [(start, min(start + count, len(texts))) for start in range(0, len(texts), count)]
    own: dict[int, Pixels] = {}
    for is_own, (start, end) in chunks_of_rank(chunks, world):
        # Sharded ranks decode equally many drawings: the last chunk repeats its last text and ignores the drawings.
        chosen = [texts[min(number, end - 1)] for number in range(start, start + count)]
        drawings = draw_images(
            model,
            drawing.data,
            context.spec,
            chosen,
            size=held.size,
            sampling=held.sampling.for_sequence(start),
            guidance=held.guidance,
            batch_size=held.batch_size,
            image_tokenizer=given,
            device=world.device,
        )
        if is_own:
            own.update({start + number: drawing.pixels for number, drawing in enumerate(drawings[: end - start])})
    return _gathered(world, own, len(texts))


def _prompts(held: DrawingSet, drawing: DrawingContext, spec: MediaSpec, stride: int | None) -> DrawingPrompts:
    given = None if held.tokenizer is None else drawing.tokenizers.get(held.tokenizer)
    return DrawingPrompts.open(drawing.data, spec, held.size, pixels_of_a_code(stride, given))


def _gathered(world: World, own: Mapping[int, Pixels], count: int) -> list[Pixels]:
    """Return the drawings of all ranks in order; they have one size. All ranks must call."""
    shape = next(iter(own.values())).shape if own else ()
    header = json.dumps({"numbers": list(own), "shape": shape}).encode()
    parts = gather_bytes(world, b"\n".join([header, b"".join(image.tobytes() for image in own.values())]))
    found: dict[int, bytes] = {}  # Stays empty on ranks other than 0.
    for part in parts:
        line, _, values = part.partition(b"\n")
        read = json.loads(line)
        size = math.prod(read["shape"])
        shape = read["shape"] or shape
        found |= {number: values[k * size : (k + 1) * size] for k, number in enumerate(read["numbers"])}
    whole = broadcast_bytes(world, b"".join(found[number] for number in range(count)) if world.is_main else b"")
    sizes = json.loads(broadcast_bytes(world, json.dumps(shape).encode()))
    return list(np.frombuffer(whole, np.uint8).reshape(count, *sizes))


def _real_images(held: DrawingSet, num_drawings: int) -> list[Sample]:
    """Return twice as many real images of the set, chosen at random, as are compared with the drawings.

    Raises:
        ConfigError: the set has fewer than 4 samples, so that a half has no covariance.
    """
    with closing(SampleReader(Manifest.open(held.manifest), held.name)) as reader:
        n = reader.manifest.num_samples
        half = min(num_drawings, n // 2)
        if half < 2:
            raise ConfigError(
                f"{held.manifest} has {n} samples; the Frechet distance needs two halves of at least 2 real images"
            )
        order = np.random.default_rng([held.seed, n, 1]).permutation(n)[: 2 * half]
        return [reader.read(int(number)) for number in order]


def _chosen(held: DrawingSet, train: Path, num_samples: int, limit: int | None) -> npt.NDArray[np.int64]:
    """Return the numbers of the training images to compare with, ascending."""
    if not num_samples:
        raise ConfigError(f"train={train} has no samples")
    order = np.random.default_rng([held.seed, num_samples, 2]).permutation(num_samples)
    return np.sort(order[:limit])


def _row(image: Pixels) -> npt.NDArray[np.float64]:
    from PIL import Image

    side = (_COMPARED_SIDE, _COMPARED_SIDE)
    small = np.asarray(Image.fromarray(image).resize(side, Image.Resampling.BILINEAR))
    return small.astype(np.float64).reshape(-1)


def _write(
    context: EvaluationContext,
    held: DrawingSet,
    questions: ImageQuestions,
    drawings: Sequence[Pixels],
    said: Sequence[str],
    near: Copies | None,
) -> None:
    """Write one PNG per drawing and one of its nearest training image, then one JSON object per sample, on rank 0."""
    folder = context.answers_folder
    assert folder is not None
    if not context.world.is_main:
        return
    _, template = drawing_dataset((context.drawing or DrawingContext(context.data)).data)
    lines = []
    try:
        for number, drawing in enumerate(drawings):
            image = f"{held.name}/{number:04d}.png"
            write_whole(folder / image, encode_png(drawing), parents=True)
            sample, expected = questions.samples[number], questions.answers[number]
            text, origin = _text(held, sample), sample.provenance
            line: dict[str, Any] = {"shard": origin.shard, "key": origin.key}
            line |= {"prompt": text if isinstance(text, str) else template.text_to_draw(text), "drawing": image}
            lines.append(line | {"answer": said[number], "reference": expected})
        if near is not None:
            _write_nearest(folder, held, near.drawings, lines)
        text_lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in lines]
        write_whole(folder / f"{held.name}.jsonl", as_utf8("".join(text_lines)), parents=True)
    except OSError as error:
        raise DataPipelineError(f"{folder / held.name}: {error.strerror}") from error


def _write_nearest(folder: Path, held: DrawingSet, near: Nearest, lines: Sequence[dict[str, Any]]) -> None:
    """Write the nearest training image of each drawing, and add its entries to the drawing's line."""
    from PIL import Image

    assert held.train is not None
    with closing(SampleReader(Manifest.open(held.train), held.name)) as reader:
        for number, line in enumerate(lines):
            sample = reader.read(int(near.numbers[number]))
            shown = Image.fromarray(first_image(sample))
            shown.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
            image = f"{held.name}/{number:04d}-nearest.png"
            write_whole(folder / image, encode_png(np.asarray(shown)), parents=True)
            distance = float(near.distances[number])
            line.update(nearest=image, nearest_key=sample.provenance.key, distance=distance)
