"""Finding duplicates: hashing images, near pairs of hashes, and time and memory of a whole search.

    python -m benchmarks.dedup --json

Copies are the emoji of the quickstart at half their size and as JPEGs of quality 50. Icons with large areas of one
colour are the hard case. Seconds are CPU seconds on one core.

    hashing       a 512-pixel JPEG, compared with the ImageHash package
    near pairs    random 64-bit hashes; a tenth have copies that differ in a few bits. The peer compares all pairs with
                  numpy; for many hashes its time is extrapolated from few.
    whole search  a fresh process over stored random hashes, 10,000 per shard. Memory is the process's peak without
                  mapped files, minus interpreter and imports. The search sorts a million hashes at a time, so that the
                  growth with the set is visible.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.report import Case, main
from data_pipeline.images.decode import decode_image
from data_pipeline.io.columns import pack_strings, write_columns
from data_pipeline.prepare.dedup import search as near
from data_pipeline.prepare.dedup.find import DedupOptions, NamedSet, Search
from data_pipeline.prepare.dedup.phash import perceptual_hash
from data_pipeline.prepare.dedup.search import BlockPlan, NearWork
from data_pipeline.prepare.dedup.signatures import SIGNATURE_FORMAT, Criterion, State, signature, signature_path
from data_pipeline.sample import ImagePart, Sample
from data_pipeline.shards.manifest import MANIFEST_FORMAT, Manifest
from data_pipeline.shards.sample_reader import read_samples

EMOJI = Path("examples/emoji/shards/train-quick.manifest")
HASHES = (10**5, 10**6, 10**7)
COMPARED_ALL = 20_000
DISTANCE = 4
SAMPLES_PER_SHARD = 10_000
SEARCHED = (10**6, 10**7)
_BYTES_LIMIT = 64.0
"""Limit in bytes per sample: a node with 64 GB can then search 10^9 samples."""


def cpu_seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the least CPU time of ``repeats`` runs after one warm-up run."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def hashing() -> Case:
    """Return images hashed per second."""
    small = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize((512, 512), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    data = out.getvalue()
    sample = Sample((ImagePart(data, "jpg"),))

    def ours() -> None:
        for _ in range(50):
            signature(sample, Criterion.PERCEPTUAL, 10**8)

    def theirs() -> None:
        import imagehash

        for _ in range(50):
            imagehash.phash(Image.open(io.BytesIO(data)))

    rates = [round(50 / cpu_seconds(run, 3), 1) for run in (ours, theirs)]
    return Case("perceptual hash of a JPEG", rates[0], {"ImageHash": rates[1]}, "images/s", lower_is_better=False)


def copies() -> list[Case]:
    """Return the share of altered emoji that are found, and the pairs of distinct emoji that are equally near."""
    import imagehash

    found: dict[str, tuple[list[int], list[int]]] = {"ours": ([], []), "ImageHash": ([], [])}
    for sample in read_samples(EMOJI):
        part = sample.parts[0]
        assert isinstance(part, ImagePart), "an emoji has an image"
        image = Image.fromarray(decode_image(part.data, max_pixels=10**7))
        out = io.BytesIO()
        image.resize((image.width // 2, image.height // 2)).save(out, "JPEG", quality=50)
        for place, each in enumerate((image, Image.open(out).convert("RGB"))):
            found["ours"][place].append(perceptual_hash(np.asarray(each)) or 0)
            found["ImageHash"][place].append(int(str(imagehash.phash(each)), 16))
    shares: dict[tuple[str, int], float] = {}
    pairs: dict[tuple[str, int], float] = {}
    for name, (first, second) in found.items():
        values = np.array(first, np.uint64)
        differing = np.bitwise_count(values ^ np.array(second, np.uint64))
        between = np.bitwise_count(values[:, None] ^ values[None, :])[np.triu_indices(len(values), 1)]
        for distance in (0, 2, 4, 8):
            shares[name, distance] = round(float((differing <= distance).mean()), 3)
            pairs[name, distance] = int((between <= distance).sum())
    cases = []
    for distance in (0, 2, 4, 8):
        of = {"ImageHash": shares["ImageHash", distance]}
        name = f"copies of emoji within {distance} bits"
        cases.append(Case(name, shares["ours", distance], of, "of all", lower_is_better=False))
    for distance in (0, 2, 4, 8):
        name, theirs = f"pairs of different emoji within {distance} bits", {"ImageHash": pairs["ImageHash", distance]}
        cases.append(Case(name, pairs["ours", distance], theirs, f"of {len(between):,}"))
    return cases


def hashes(num: int) -> npt.NDArray[np.uint64]:
    """Return distinct random hashes in random order; a tenth are copies of others with one to four bits changed."""
    draw = np.random.default_rng(num)
    values = draw.integers(0, 2**64, num, np.uint64)
    copies = num // 10
    flips = np.bitwise_or.reduce(np.uint64(1) << draw.integers(0, 64, (copies, DISTANCE), np.uint64), axis=1)
    values[:copies] = values[copies : 2 * copies] ^ flips
    return np.asarray(draw.permutation(np.unique(values)))


def near_pairs(num: int, folder: Path, all_with_all: float) -> Case:
    """Return seconds to find all near pairs. ``all_with_all`` is the seconds that one comparison takes."""
    values = hashes(num)
    np.save(folder / "values.npy", values)
    work = NearWork(folder / "values.npy", BlockPlan.of(len(values), DISTANCE), DISTANCE)
    start = time.process_time()
    found = sum(len(piece.pairs) for task in work.tasks(len(values)) for piece in work(task))
    seconds = time.process_time() - start
    if found < num // 10 * 0.99:
        raise RuntimeError(f"{found} pairs of {num // 10}")
    name = f"pairs of {num:,} hashes within {DISTANCE} bits"
    return Case(name, round(seconds, 2), {"all with all": round(all_with_all * num * num / 2, 1)}, "s")


def seconds_of_comparing() -> float:
    """Return seconds per comparison when all pairs are compared."""
    values = hashes(COMPARED_ALL)

    def run() -> None:
        for row in range(0, len(values), 64):
            (np.bitwise_count(values[row : row + 64, None] ^ values[None, row:]) <= DISTANCE).any()

    return cpu_seconds(run, 1) / (len(values) ** 2 / 2)


def write_hashed_set(folder: Path, num_samples: int) -> None:
    """Write a manifest of shards that do not exist, and random signatures of their samples."""
    num_shards = num_samples // SAMPLES_PER_SHARD
    path_bytes, cu_path_bytes = pack_strings(f"part-{number:07d}.tar" for number in range(num_shards))
    digests = np.random.default_rng(0).integers(0, 256, (num_shards, 32), np.uint8)
    arrays = {
        "cu_samples": np.arange(num_shards + 1, dtype=np.int64) * SAMPLES_PER_SHARD,
        "path_bytes": path_bytes,
        "cu_path_bytes": cu_path_bytes,
        "tar_bytes": np.full(num_shards, 10**9, np.int64),
        "tar_sha256": digests,
    }
    write_columns(folder / "x.manifest", arrays, {"format": MANIFEST_FORMAT, "fingerprint": "synthetic"})
    draw = np.random.default_rng(1)
    for digest in digests:
        for criterion in (Criterion.EXACT, Criterion.PERCEPTUAL):
            path = signature_path(folder / "signatures", bytes(digest).hex(), criterion, DedupOptions().max_pixels)
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = (SAMPLES_PER_SHARD, criterion.num_words)
            columns = {
                "key": draw.integers(0, 2**64, shape, np.uint64),
                "state": np.full(SAMPLES_PER_SHARD, State.COMPARED, np.uint8),
                "pixels": np.full(SAMPLES_PER_SHARD, 512 * 512, np.int64),
            }
            write_columns(path, columns, {"format": SIGNATURE_FORMAT})


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def search(folder: Path) -> None:
    """Search and print seconds and bytes; runs in a separate process."""
    near.ROWS_AT_ONCE = 10**6
    before, most = anonymous_bytes(), [0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            most[0] = max(most[0], anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.process_time()
    sets = [NamedSet("x", Manifest.open(folder / "x.manifest"))]
    (folder / "search").mkdir()
    whole = Search(sets, 0, DedupOptions(), folder / "signatures", folder / "search", workers=0)
    for criterion in DedupOptions().criteria:
        whole.run(criterion)
    seconds = time.process_time() - start
    done.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "bytes": most[0] - before}))


def whole_search(num_samples: int) -> list[Case]:
    """Return the time of a search and, for the largest set, the memory per sample."""
    with tempfile.TemporaryDirectory() as folder:
        write_hashed_set(Path(folder), num_samples)
        command = [sys.executable, "-m", "benchmarks.dedup", "--search", folder]
        figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    name = f"search of {num_samples:,} samples"
    cases = [Case(f"{name}, time", round(figures["seconds"], 1), {"limit": num_samples / 50_000}, "s")]
    if num_samples == max(SEARCHED):  # For fewer samples, constant memory dominates.
        each = round(figures["bytes"] / num_samples, 1)
        cases.append(Case(f"{name}, memory", each, {"limit": _BYTES_LIMIT}, "bytes a sample"))
    return cases


def measure() -> list[Case]:
    """Return all cases."""
    cases = [hashing(), *copies()]
    comparing = seconds_of_comparing()
    with tempfile.TemporaryDirectory() as folder:
        cases += [near_pairs(num, Path(folder), comparing) for num in HASHES]
    return [*cases, *(case for num in SEARCHED for case in whole_search(num))]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--search"]:
        search(Path(sys.argv[2]))
    else:
        main("dedup", measure)
