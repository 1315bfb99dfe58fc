"""Start-up, memory and look-ups of the sample order for manifests of a thousand to a million shards.

    python -m benchmarks.order_scale --json

The manifests are synthetic: columns without tars, 10,000 samples per shard.

    start     open the manifest, create the orders of the 64 lanes of a rank and find the first shard of each
    look-up   from a sample number to its shard and row
    resume    create an order far inside an epoch and find the next sample
    ``find``  from a sample to its lane and cursor
    memory    memory of a fresh process without interpreter and imports: private, resident, and after all look-ups

Peers: webdataset's lists of shards, numpy's permutation of all samples if it fits into a gibibyte, or a stated limit.
Microseconds are CPU time, except those for writing a manifest: wall time per shard, with links to one real shard.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.report import Case, main
from data_pipeline.io.columns import pack_strings, write_columns
from data_pipeline.order.lanes import LaneOrder
from data_pipeline.order.state import Cursor
from data_pipeline.shards.index import index_path
from data_pipeline.shards.manifest import MANIFEST_FORMAT, Manifest, write_manifest
from data_pipeline.shards.writer import ShardWriter

SHARDS = (10**3, 10**4, 10**5, 10**6)
SAMPLES_PER_SHARD = 10_000
LANES, RANKS = 512, 8
BLOCK_SIZE, WINDOW_BLOCKS = 16, 8
WORKERS = 4
LOOKUPS = 2_000
MOST_PERMUTED = 2**27
WRITTEN = (10**3, 10**4, 10**5)

Figures = dict[str, float]


def write_synthetic(path: Path, num_shards: int) -> None:
    """Write a manifest of shards that do not exist."""
    path_bytes, cu_path_bytes = pack_strings(f"shards/part-{number:07d}.tar" for number in range(num_shards))
    arrays = {
        "cu_samples": np.arange(num_shards + 1, dtype=np.int64) * SAMPLES_PER_SHARD,
        "path_bytes": path_bytes,
        "cu_path_bytes": cu_path_bytes,
        "tar_bytes": np.full(num_shards, 10**9, np.int64),
        "tar_sha256": np.random.default_rng(0).integers(0, 256, (num_shards, 32), np.uint8),
    }
    write_columns(path, arrays, {"format": MANIFEST_FORMAT, "fingerprint": "synthetic"})


def memory_mib() -> Figures:
    """Return the resident memory of this process: in total, and not shared with other processes."""
    found = {"Rss": 0, "Private_Clean": 0, "Private_Dirty": 0}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, kibibytes = line.split()[:2]
        if name[:-1] in found:
            found[name[:-1]] = int(kibibytes)
    return {"resident": found["Rss"] / 1024, "private": (found["Private_Clean"] + found["Private_Dirty"]) / 1024}


def _microseconds(run: Callable[[int], object], repeats: int) -> float:
    start = time.process_time()  # CPU time is least affected by other load.
    for number in range(repeats):
        run(number)
    return (time.process_time() - start) / repeats * 1e6


def _ours(path: Path) -> Figures:
    """Measure start, look-ups, and memory before and after; runs in a separate process."""
    before, start = memory_mib(), time.perf_counter()
    manifest = Manifest.open(path)
    lanes = range(0, LANES, RANKS)
    orders = [LaneOrder(manifest.num_samples, BLOCK_SIZE, WINDOW_BLOCKS, 1, lane, LANES) for lane in lanes]
    cursors = [Cursor()] * len(orders)
    for order, cursor in zip(orders, cursors, strict=True):
        manifest.shard_path(manifest.locate(order.resolve(cursor)[0].sample)[0])
    figures = {"start": time.perf_counter() - start}
    figures |= {name: mib - before[name] for name, mib in memory_mib().items()}

    samples = np.random.default_rng(1).integers(0, manifest.num_samples, LOOKUPS).tolist()
    figures["look-up"] = _microseconds(lambda i: manifest.shard_path(manifest.locate(samples[i])[0]), LOOKUPS)
    lane = orders[-1]
    deep = (
        manifest.num_samples // BLOCK_SIZE // LANES // WINDOW_BLOCKS * 9 // 10
    )  # Number of windows in 90 % of an epoch.

    def resume(number: int) -> tuple[int, int]:
        order = LaneOrder(manifest.num_samples, BLOCK_SIZE, WINDOW_BLOCKS, 1, number % LANES, LANES)
        return manifest.locate(order.resolve(Cursor(7, deep, 77))[0].sample)

    figures["resume"] = _microseconds(resume, LOOKUPS)
    figures["find"] = _microseconds(lambda i: lane.find(samples[i], 7), LOOKUPS)
    cursor = Cursor(7, deep // 2, 0)

    def following(_: int) -> None:
        nonlocal cursor
        cursor = lane.resolve(cursor)[1]

    figures["next"] = _microseconds(following, 50 * LOOKUPS)
    figures |= {f"{name} later": mib - before[name] for name, mib in memory_mib().items()}
    return figures


def hold(path: str) -> None:
    """Read the column that finds shards, and print how much of it is shared while other workers run."""
    manifest = Manifest.open(path)
    int(manifest.cu_samples.sum())
    print("ready", flush=True)
    sys.stdin.readline()
    mapped, inside = {"Rss": 0, "Shared_Clean": 0}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, rest = line.split(maxsplit=1)
        if "-" in name:
            inside = rest.endswith(path)
        elif inside and name[:-1] in mapped:
            mapped[name[:-1]] += int(rest.split()[0])
    print(json.dumps({"mapped": mapped["Rss"] / 1024, "shared": mapped["Shared_Clean"] / 1024}), flush=True)
    sys.stdin.read()
    del manifest


def _webdataset(path: Path, kind: str) -> Figures:
    import webdataset

    urls = f"shards/part-{{0000000..{Manifest.open(path).num_shards - 1:07d}}}.tar"
    before, start = memory_mib(), time.perf_counter()
    shards = webdataset.SimpleShardList(urls) if kind == "simple" else webdataset.ResampledShards(urls)
    next(iter(shards))
    figures = {"start": time.perf_counter() - start}
    return figures | {name: mib - before[name] for name, mib in memory_mib().items()}


def _permutation(path: Path) -> Figures:
    num_samples = Manifest.open(path).num_samples
    before, start = memory_mib(), time.perf_counter()
    order = np.random.default_rng(1).permutation(num_samples)
    figures = {"start": time.perf_counter() - start}
    assert len(order) == num_samples
    return figures | {name: mib - before[name] for name, mib in memory_mib().items()}


def _written(folder: Path, num_shards: int) -> Figures:
    """Measure writing a manifest whose shards are links to one shard."""
    shards = (folder / f"part-{number:07d}.tar" for number in range(num_shards))
    before, start = memory_mib(), time.perf_counter()
    assert write_manifest(folder / "all.manifest", shards).num_shards == num_shards
    seconds = time.perf_counter() - start
    return {"microseconds": seconds / num_shards * 1e6, "private": memory_mib()["private"] - before["private"]}


def child(what: str, path: str, *arguments: str) -> None:
    """Run one measurement in a fresh process and print its values as JSON."""
    measured: dict[str, Callable[[], Figures]] = {
        "ours": lambda: _ours(Path(path)),
        "webdataset": lambda: _webdataset(Path(path), arguments[0]),
        "permutation": lambda: _permutation(Path(path)),
        "written": lambda: _written(Path(path), int(arguments[0])),
    }
    print(json.dumps(measured[what]()))


def _command(function: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", f"from benchmarks.order_scale import {function}; {function}(*{arguments!r})"]


def _fresh(*arguments: str) -> Figures:
    done = subprocess.run(
        _command("child", *arguments), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True
    )
    figures: Figures = json.loads(done.stdout)
    return figures


def _order_cases(path: Path, num_shards: int) -> list[Case]:
    ours = _fresh("ours", str(path))
    peers = {
        "webdataset SimpleShardList": _fresh("webdataset", str(path), "simple"),
        "webdataset ResampledShards": _fresh("webdataset", str(path), "resampled"),
    }
    if num_shards * SAMPLES_PER_SHARD <= MOST_PERMUTED:
        peers["numpy permutation"] = _fresh("permutation", str(path))
    limits = {"start": (2.0, "s"), "private": (64.0, "MiB"), "resident": (64.0, "MiB")}
    name = f"{num_shards:,} shards"
    cases = []
    for figure, (limit, unit) in limits.items():
        others = {peer: round(figures[figure], 3) for peer, figures in peers.items()}
        cases.append(Case(f"{name}, {figure}", round(ours[figure], 4), {"limit": limit, **others}, unit))
    for figure in ("private later", "resident later"):
        cases.append(Case(f"{name}, {figure}", round(ours[figure], 2), {"limit": 64.0}, "MiB"))
    for figure in ("look-up", "resume", "find"):
        cases.append(Case(f"{name}, {figure}", round(ours[figure], 2), {"limit": 1000.0}, "us"))
    return [*cases, Case(f"{name}, next of a lane", round(ours["next"], 2), {"limit": 10.0}, "us")]


def _sharing_cases(path: Path) -> list[Case]:
    workers = [
        subprocess.Popen(_command("hold", str(path)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(WORKERS)
    ]
    for worker in workers:
        _line(worker)  # Now all workers hold their pages.
    found = [json.loads(_line(worker, "measure\n")) for worker in workers]
    for worker in workers:
        worker.communicate()  # End the workers last: an ended one would no longer share pages.
    least = min(found, key=lambda figures: figures["shared"])
    case = f"{WORKERS} workers that map one manifest, shared of a worker's pages"
    peers = {"mapped": round(least["mapped"], 2)}
    return [Case(case, round(least["shared"], 2), peers, "MiB", lower_is_better=False)]


def _line(worker: subprocess.Popen[str], order: str = "") -> str:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(order)
    worker.stdin.flush()
    return worker.stdout.readline()


def _writing_cases(folder: Path) -> list[Case]:
    with ShardWriter(folder, "one") as writer:
        writer.write("key", {"txt": b"a text"})
    (shard,) = writer.shards
    cases, done = [], 0
    for num_shards in WRITTEN:
        for number in range(done, num_shards):
            link = folder / f"part-{number:07d}.tar"
            link.symlink_to(shard)
            index_path(link).symlink_to(index_path(shard))
        done = num_shards
        figures = _fresh("written", str(folder), str(num_shards))
        name = f"write a manifest of {num_shards:,} shards"
        cases.append(Case(f"{name}, a shard", round(figures["microseconds"], 1), {"limit": 1000.0}, "us"))
        cases.append(Case(f"{name}, private", round(figures["private"], 1), {"limit": 512.0}, "MiB"))
    return cases


def measure() -> list[Case]:
    """Return all cases."""
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for num_shards in SHARDS:
            path = Path(folder) / f"{num_shards}.manifest"
            write_synthetic(path, num_shards)
            cases += _order_cases(path, num_shards)
        cases += _sharing_cases(path)
    with tempfile.TemporaryDirectory() as folder:
        cases += _writing_cases(Path(folder))
    return cases


if __name__ == "__main__":
    main("order_scale", measure)
