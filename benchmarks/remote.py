"""Reading from an S3 server with 30 ms latency: samples per second, requests and bytes, compared with webdataset.

    python -m benchmarks.remote --json

A SeaweedFS server runs on this machine behind a relay that delays every request by 30 ms (``slow_link``). Four shards
contain 1,024 JPEGs of about 58 kB. Both readers run in this process, decode with the same function (to 32 px, so that
reading dominates) and tokenise the captions. Ours is the complete loader with four lanes and no workers: random order,
packing, checksums and resume state; its cache is empty at first. The peer is a ``webdataset`` pipeline that streams
each tar through ``curl`` and shuffles in a buffer of 1000.

    cold         the first epoch.
    warm         the second epoch, from the disk cache; the peer has no cache and streams again.
    speed        fastest of three epochs, from opening the loader to its last batch.
    work         samples per core-second of that epoch: CPU time of this process and of curl.
    requests     requests to the server, over the samples of an epoch.
    bytes        bytes from the server, headers and read-ahead beyond the epoch included, over the bytes of the samples

mosaicml-streaming is not included: it needs other package versions than this project.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset

from benchmarks.peers.job import photo
from benchmarks.report import Case, main
from benchmarks.servers import KEY, SECRET, s3_server
from benchmarks.slow_link import SlowLink, slow_link
from data_pipeline.config import DataConfig
from data_pipeline.images.transforms import FixedTransform, ImageTransform
from data_pipeline.loader.loader import Loader
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.shards.manifest import Manifest, write_manifest
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.storage.config import StorageConfig
from data_pipeline.storage.location import Url
from data_pipeline.storage.storage import Storage
from data_pipeline.text.tokenizer import SentencePieceTokenizerConfig, load_tokenizer

MILLISECONDS = 30
SAMPLES, PER_SHARD, SIDE = 1024, 256, 256
LANES, BATCH = 4, 16
SHUFFLE_BUFFER = 1000
REPEATS = 3
SPEC = MediaSpec(Placement.CROSS_ATTENTION, patch_size=8, fixed_grid=(4, 4))
TRANSFORM = {"kind": "fixed", "decode": "fast"}
TOKENIZER = Path("examples/emoji/tokenizer.model")
FOLDER = Url("s3://bench-data/photos")


class Epoch(NamedTuple):
    """Speed and cost of one epoch."""

    samples_per_second: float
    samples_per_core_second: float
    requests: int
    num_bytes: int


class _Seconds:
    """Stopwatch of wall time, and of CPU time of this process and its ended children."""

    def __init__(self) -> None:
        self._wall, self._cores = time.perf_counter(), _core_seconds()

    def rates(self, samples: int) -> tuple[float, float]:
        """Return samples per second and per core-second since the start."""
        return samples / (time.perf_counter() - self._wall), samples / (_core_seconds() - self._cores)


def _core_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class ServedShards(NamedTuple):
    """The shards on the server, behind the slow link."""

    link: SlowLink
    manifest: Manifest
    needed_bytes: int


@contextmanager
def served() -> Iterator[ServedShards]:
    """Serve the shards from a bucket behind the slow link, for this process and its children."""
    with tempfile.TemporaryDirectory() as name, s3_server() as port, slow_link(port, MILLISECONDS) as link:
        os.environ |= {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}
        with ShardWriter(Path(name), "photos", max_samples=PER_SHARD) as writer:
            for number in range(SAMPLES):
                writer.write(f"{number:06d}", {"jpg": photo(number, SIDE), "txt": b"a picture of nothing"})
        manifest = write_manifest(Path(name) / "photos.manifest", writer.shards)
        with Storage(StorageConfig(endpoint=f"http://127.0.0.1:{port}", allow_http=True)) as storage:
            for path in Path(name).iterdir():
                storage.store(FOLDER).write(FOLDER.child(path.name), path.read_bytes())
        needed = 0
        for shard in range(manifest.num_shards):
            index = manifest.open_index(shard)
            needed += sum(member.size for i in range(len(index)) for member in index.row(i).members)
        yield ServedShards(link, manifest, needed)


def config(served_shards: ServedShards, cache: Path, block_size: int, keep: str) -> DataConfig:
    """Return the config of a loader of the remote shards."""
    return DataConfig.model_validate(
        {
            "tokenizer": {"kind": "sentencepiece", "path": TOKENIZER},
            "datasets": [{"name": "photos", "manifest": f"{FOLDER}/photos.manifest", "transforms": TRANSFORM}],
            "lanes": LANES,
            "packing": {"max_tokens": 4096, "max_documents": BATCH},
            "order": {"block_size": block_size, "window_blocks": 2},
            "storage": {"endpoint": f"http://127.0.0.1:{served_shards.link.port}", "allow_http": True},
            "cache": {"folder": cache, "keep": keep},
        }
    )


def ours(served_shards: ServedShards, cache: Path, block_size: int, keep: str = "all") -> Epoch:
    """Measure an epoch of the loader, from opening it."""
    served_shards.link.counts()
    done, seconds = 0, _Seconds()
    with Loader(config(served_shards, cache, block_size, keep), SPEC, seed=1) as loader:
        while done < SAMPLES:
            done += next(loader).num_samples
        rates = seconds.rates(done)
    return Epoch(*rates, *served_shards.link.counts())


def peer(served_shards: ServedShards) -> Epoch:
    """Measure an epoch of the webdataset pipeline."""
    served_shards.link.counts()
    tokenizer = load_tokenizer(SentencePieceTokenizerConfig(path=TOKENIZER))
    transform, rng = ImageTransform(FixedTransform.model_validate(TRANSFORM), SPEC), np.random.default_rng(1)
    signed = f"curl -s --fail --aws-sigv4 aws:amz:us-east-1:s3 --user {KEY}:{SECRET}"
    root = f"http://127.0.0.1:{served_shards.link.port}/{FOLDER.partition('://')[2]}"
    names = [served_shards.manifest.shard_path(number).name for number in range(served_shards.manifest.num_shards)]

    def decode(sample: dict[str, Any]) -> tuple[np.ndarray, list[int]]:
        return transform(sample["jpg"], rng)[0].values, tokenizer.encode(sample["txt"].decode())

    done, seconds = 0, _Seconds()
    urls = [f"pipe:{signed} {root}/{name}" for name in names]
    stream = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False)
    for values, _ in stream.shuffle(SHUFFLE_BUFFER).map(decode).batched(BATCH, collation_fn=list_pair):
        done += len(values)
    assert done == SAMPLES, f"the pipeline gave {done} of {SAMPLES} samples"
    return Epoch(*seconds.rates(done), *served_shards.link.counts())


def list_pair(samples: list[tuple[np.ndarray, list[int]]]) -> tuple[torch.Tensor, list[list[int]]]:
    """Stack the pixels of a batch."""
    return torch.from_numpy(np.stack([values for values, _ in samples])), [ids for _, ids in samples]


def measure() -> list[Case]:
    """Return all cases."""
    assert shutil.which("curl"), "webdataset streams through curl: install it"
    torch.set_num_threads(1)
    with served() as served_shards, tempfile.TemporaryDirectory() as name:
        cache, cold, warm, streamed = Path(name), list[Epoch](), list[Epoch](), list[Epoch]()
        for repeat in range(REPEATS):  # Take turns, so that other load on the machine affects all readers.
            streamed.append(peer(served_shards))
            cold.append(ours(served_shards, cache / f"main-{repeat}", 32))
            warm.append(ours(served_shards, cache / f"main-{repeat}", 32))
        theirs = max(streamed)
        cases = _costs(served_shards, "cold, block_size 32", max(cold), theirs)
        cases += _costs(served_shards, "warm, block_size 32", max(warm), theirs)
        for block_size in (1, 8, 32):
            label = f"cold, block_size {block_size}, no pages kept"
            epochs = [
                ours(served_shards, cache / f"{block_size}-{repeat}", block_size, "indexes")
                for repeat in range(REPEATS)
            ]
            cases += _costs(served_shards, label, max(epochs), theirs)
    return cases


def _costs(served_shards: ServedShards, label: str, mine: Epoch, theirs: Epoch) -> list[Case]:
    """Return requests and bytes of an epoch."""
    requests = {"webdataset": round(theirs.requests / SAMPLES, 5)}
    read = {"webdataset": round(theirs.num_bytes / served_shards.needed_bytes, 4)}
    speed = {"webdataset": round(theirs.samples_per_second, 1)}
    work = {"webdataset": round(theirs.samples_per_core_second, 1)}
    return [
        Case(f"{label}: speed", round(mine.samples_per_second, 1), speed, "samples/s", lower_is_better=False),
        Case(f"{label}: work", round(mine.samples_per_core_second, 1), work, "samples/core-s", lower_is_better=False),
        Case(f"{label}: requests", round(mine.requests / SAMPLES, 5), requests, "requests/sample"),
        Case(f"{label}: bytes", round(mine.num_bytes / served_shards.needed_bytes, 6), read, "bytes read/needed"),
    ]


if __name__ == "__main__":
    main("remote", measure)
