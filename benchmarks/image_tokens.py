"""Compare image tokenizers and drawing with transformers: ``python -m benchmarks.image_tokens [--json]``.

    tokenizer   images to tokens, and tokens to images
    drawing     tokens of images that a decoder draws, with cached keys and values and guidance, against ``generate``
    files       JPEG files to tokens: ``mmscale data encode``, against a loop over the class of transformers

Both sides have the same weights (by the importer), dtype, threads and inputs, and take turns. Their tokens and images
are compared before the timing. A speed per core-second counts processor time of all processes, which other work on the
machine changes less than the wall time. The fastest turn of each side counts, because other work only adds time.
"""

from __future__ import annotations

import argparse
import io
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.families.drawing import DRAWERS, TOKENIZERS, Drawer, TokenizerPair, tokenizer_pair
from benchmarks.peers.job import photo
from benchmarks.report import Case, show
from data_pipeline.images.transforms import FixedTransform
from data_pipeline.prepare.encode import EncodedSource
from data_pipeline.prepare.ingest import ingest
from data_pipeline.prepare.reshard import NamedManifest, ReshardSource, Selection
from data_pipeline.sample import ImagePart
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.shards.token_grid import decode_grid
from data_pipeline.shards.writer import ShardWriter
from mmscale.models.sampling import SamplingConfig
from mmscale.run.image_tokens import CheckpointEncoder

PARTS = ("tokenizer", "drawing", "files")
Run = Callable[[], object]


@dataclass(frozen=True)
class SpeedRow:
    """Speeds of both sides on one piece of work.

    Attributes:
        case: The work with its sizes.
        unit: Counted things, for example ``images``.
        count: Number of them in one run.
        seconds: Wall seconds by side, one value a turn.
        core_seconds: The same in processor time.
    """

    case: str
    unit: str
    count: int
    seconds: dict[str, list[float]]
    core_seconds: dict[str, list[float]]

    def line(self) -> str:
        """Return the row for people."""
        return "\n".join(case.line() for case in self.cases())

    def cases(self) -> list[Case]:
        """Return the values for programs."""
        return [self._case(self.seconds, f"{self.unit}/s"), self._case(self.core_seconds, f"{self.unit}/core-s")]

    def _case(self, seconds: dict[str, list[float]], unit: str) -> Case:
        speeds = {name: self.count / min(times) for name, times in seconds.items()}
        return Case.from_sides(self.case, speeds, unit, lower_is_better=False)


def compare(case: str, unit: str, count: int, ours: Run, theirs: Run, turns: int) -> SpeedRow:
    """Measure both sides in turns. The caller has run both once."""
    sides = {"ours": ours, "transformers": theirs}
    row = SpeedRow(case, unit, count, {name: [] for name in sides}, {name: [] for name in sides})
    for _ in range(turns):
        for name, run in sides.items():
            cores, start = _core_seconds(), time.perf_counter()
            run()
            row.seconds[name].append(time.perf_counter() - start)
            row.core_seconds[name].append(_core_seconds() - cores)
    return row


def _core_seconds() -> float:
    """Return the processor time of this process and of its finished children, seconds."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measure_tokenizer(pair: TokenizerPair, images: int, side: int, turns: int) -> Iterator[SpeedRow]:
    """Yield the speeds of encoding and decoding.

    Raises:
        RuntimeError: tokens or images of the sides differ.
    """
    pixels = pictures(images, side)
    tokens = pair.check(pixels)
    case = f"{pair.name}, {images} images of {side} px"
    yield compare(
        f"{case}, encode",
        "images",
        images,
        lambda: pair.ours.encode(pixels),
        lambda: pair.their_tokens(pixels),
        turns,
    )
    yield compare(
        f"{case}, decode",
        "images",
        images,
        lambda: pair.ours.decode(tokens),
        lambda: pair.their_images(tokens),
        turns,
    )


def pictures(count: int, side: int) -> Tensor:
    """Return images ``(N, 3, H, W)`` in [-1, 1]: smooth colours with noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    smooth = F.interpolate(coarse, size=(side, side), mode="bilinear")
    return (smooth + 0.05 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1) * 2 - 1


def measure_drawing(drawer: Drawer, turns: int) -> SpeedRow:
    """Return the speed of drawing.

    Raises:
        RuntimeError: greedy codes of the sides differ from the beginning.
    """
    drawer.check()  # Also the first, unmeasured turn.
    sampling = SamplingConfig(temperature=1.0, top_k=drawer.top_k)
    case = f"{drawer.name}, {drawer.images} images of {drawer.side} x {drawer.side} tokens, guidance"
    count = drawer.images * drawer.num_steps
    return compare(case, "tokens", count, lambda: drawer.draw(sampling), drawer.their_draw(sampling), turns)


def measure_files(pair: TokenizerPair, images: int, side: int, jobs: int, turns: int) -> SpeedRow:
    """Return the speed from JPEG files to stored tokens.

    Ours reads shards, writes shards, and computes with one thread in each of ``jobs`` processes, whose start counts.
    Theirs is one process with ``jobs`` threads. It has the files in memory and keeps the tokens there.

    Raises:
        RuntimeError: more than one token in a hundred differs.
    """
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [photo(number, side, side) for number in range(images)]
        with ShardWriter(folder / "in", "photos") as writer:
            for number, data in enumerate(files):
                writer.write(f"{number:06d}", {"jpg": data, "txt": b"a photo"})
        write_manifest(folder / "in" / "photos.manifest", writer.shards)
        pair.save(folder / "run")
        outputs: list[Path] = []

        def ours() -> None:
            encoder = CheckpointEncoder.open(folder / "run")
            samples = ReshardSource([NamedManifest("photos", folder / "in" / "photos.manifest")], Selection())
            source = EncodedSource(samples, encoder, FixedTransform(size=side), grids_only=True)
            outputs.append(folder / f"out-{len(outputs)}")
            ingest(source, outputs[-1], "tokens", workers=jobs if jobs > 1 else 0, image_tokenizer=encoder.digest)

        def theirs() -> Tensor:
            torch.set_num_threads(jobs)
            batches = (files[first : first + pair.batch] for first in range(0, images, pair.batch))
            return torch.cat([pair.their_tokens(torch.stack([_pixels(data) for data in batch])) for batch in batches])

        ours()
        stored = [
            torch.from_numpy(decode_grid(part.grid, part.name).codes)
            for sample in read_samples(outputs[0] / "tokens.manifest")
            for part in sample.parts
            if isinstance(part, ImagePart) and part.grid is not None
        ]
        pair.require_equal(torch.stack(stored).long(), theirs())
        case = f"{pair.name}, {images} JPEG files of {side} px, jobs: {jobs}"
        row = compare(case, "images", images, ours, theirs, turns)
    torch.set_num_threads(threads)
    return row


def _pixels(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1


def measure(options: argparse.Namespace) -> Iterator[SpeedRow]:
    """Yield the rows of the requested parts."""
    torch.set_num_threads(options.threads)
    if "tokenizer" in options.parts:
        for name in TOKENIZERS:
            yield from measure_tokenizer(
                tokenizer_pair(name, options.side), options.images, options.side, options.turns
            )
    if "drawing" in options.parts:
        for build in DRAWERS.values():
            yield measure_drawing(build(options.drawn, options.grid), options.turns)
    if "files" in options.parts:
        for jobs in options.jobs:
            pair = tokenizer_pair("JanusVQVAE", options.side)
            yield measure_files(pair, options.files, options.side, jobs, options.file_turns)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.image_tokens", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--side", type=int, default=128, help="pixels of an image, a side; a multiple of 16")
    parser.add_argument("--images", type=int, default=2, help="images of a batch")
    parser.add_argument("--drawn", type=int, default=4, help="drawn images")
    parser.add_argument("--grid", type=int, default=8, help="tokens of a drawn image, a side")
    parser.add_argument("--files", type=int, default=128, help="JPEG files")
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2], help="processes that encode files")
    parser.add_argument("--turns", type=int, default=4, help="measured turns of tokenizers and drawing")
    parser.add_argument("--file-turns", type=int, default=1, help="measured turns of files")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    return parser.parse_args(words)


if __name__ == "__main__":
    options = arguments()
    settings = {"threads": options.threads, "turns": options.turns}
    show("image_tokens", lambda: measure(options), options.json, settings)
