"""Reading from an S3 server that is 30 ms away: samples per second, requests and bytes, beside webdataset.

    python -m benchmarks.remote --json

A SeaweedFS server runs on this machine behind a relay that lets every request wait 30 ms (``slow_link``). Four
shards hold 1,024 JPEGs of about 48 kB. Both readers run in this process, decode with the same function (to 32 px, so
that reading is what takes the time) and tokenise the captions. Ours is the whole loader with four lanes, no workers: in
random order, packed, with checksums and resume state; its cache is empty at first. The peer is a ``webdataset``
pipeline that streams each tar through ``curl`` and shuffles in a buffer of 1000.

    cold         the first epoch
    warm         the second epoch, from the disk cache; the peer has none and streams again
    speed        of the fastest of three epochs, from opening the loader to its last batch
    work         samples a core-second of that epoch: CPU time of this process and of curl
    requests     of the server, over the samples of an epoch
    bytes        from the server, headers and read-ahead beyond the epoch included, over the bytes of the samples' files

mosaicml-streaming is left out: it needs versions of other packages than this project's.
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

from benchmarks.figures import Case, main
from benchmarks.peers.job import photo
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
    """What an epoch took."""

    samples_per_second: float
    samples_per_core_second: float
    requests: int
    num_bytes: int


class _Seconds:
    """Time that passes, and CPU time of this process and of children that have ended."""

    def __init__(self) -> None:
        self._wall, self._cores = time.perf_counter(), _core_seconds()

    def rates(self, samples: int) -> tuple[float, float]:
        """Samples a second and a core-second since the beginning."""
        return samples / (time.perf_counter() - self._wall), samples / (_core_seconds() - self._cores)


def _core_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Place(NamedTuple):
    """Where the data lie."""

    link: SlowLink
    manifest: Manifest
    needed_bytes: int


@contextmanager
def served() -> Iterator[Place]:
    """The shards in a bucket behind the slow link, for this process and its children."""
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
        yield Place(link, manifest, needed)


def config(place: Place, cache: Path, block_size: int, keep: str) -> DataConfig:
    """A loader of the remote shards."""
    return DataConfig.model_validate(
        {
            "tokenizer": {"kind": "sentencepiece", "path": TOKENIZER},
            "datasets": [{"name": "photos", "manifest": f"{FOLDER}/photos.manifest", "transforms": TRANSFORM}],
            "lanes": LANES,
            "packing": {"max_tokens": 4096, "max_documents": BATCH},
            "order": {"block_size": block_size, "window_blocks": 2},
            "storage": {"endpoint": f"http://127.0.0.1:{place.link.port}", "allow_http": True},
            "cache": {"folder": cache, "keep": keep},
        }
    )


def ours(place: Place, cache: Path, block_size: int, keep: str = "all") -> Epoch:
    """An epoch of the loader, from opening it."""
    place.link.counts()
    done, seconds = 0, _Seconds()
    with Loader(config(place, cache, block_size, keep), SPEC, seed=1) as loader:
        while done < SAMPLES:
            done += next(loader).num_samples
        rates = seconds.rates(done)
    return Epoch(*rates, *place.link.counts())


def peer(place: Place) -> Epoch:
    """An epoch of a plain pipeline."""
    place.link.counts()
    tokenizer = load_tokenizer(SentencePieceTokenizerConfig(path=TOKENIZER))
    transform, rng = ImageTransform(FixedTransform.model_validate(TRANSFORM), SPEC), np.random.default_rng(1)
    signed = f"curl -s --fail --aws-sigv4 aws:amz:us-east-1:s3 --user {KEY}:{SECRET}"
    root = f"http://127.0.0.1:{place.link.port}/{FOLDER.partition('://')[2]}"
    names = [place.manifest.shard_path(number).name for number in range(place.manifest.num_shards)]

    def decode(sample: dict[str, Any]) -> tuple[np.ndarray, list[int]]:
        return transform(sample["jpg"], rng)[0].values, tokenizer.encode(sample["txt"].decode())

    done, seconds = 0, _Seconds()
    urls = [f"pipe:{signed} {root}/{name}" for name in names]
    stream = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False)
    for values, _ in stream.shuffle(SHUFFLE_BUFFER).map(decode).batched(BATCH, collation_fn=list_pair):
        done += len(values)
    assert done == SAMPLES, f"the pipeline gave {done} of {SAMPLES} samples"
    return Epoch(*seconds.rates(done), *place.link.counts())


def list_pair(samples: list[tuple[np.ndarray, list[int]]]) -> tuple[torch.Tensor, list[list[int]]]:
    """Stacks pixels."""
    return torch.from_numpy(np.stack([values for values, _ in samples])), [ids for _, ids in samples]


def measure() -> list[Case]:
    """All cases."""
    assert shutil.which("curl"), "webdataset streams through curl: install it"
    torch.set_num_threads(1)
    with served() as place, tempfile.TemporaryDirectory() as name:
        cache, cold, warm, streamed = Path(name), list[Epoch](), list[Epoch](), list[Epoch]()
        for repeat in range(REPEATS):  # In turns, so that other work on the machine meets all of them.
            streamed.append(peer(place))
            cold.append(ours(place, cache / f"main-{repeat}", 32))
            warm.append(ours(place, cache / f"main-{repeat}", 32))
        theirs = max(streamed)
        cases = _costs(place, "cold, block_size 32", max(cold), theirs)
        cases += _costs(place, "warm, block_size 32", max(warm), theirs)
        for block_size in (1, 8, 32):
            label = f"cold, block_size {block_size}, no pages kept"
            epochs = [ours(place, cache / f"{block_size}-{repeat}", block_size, "indexes") for repeat in range(REPEATS)]
            cases += _costs(place, label, max(epochs), theirs)
    return cases


def _costs(place: Place, label: str, mine: Epoch, theirs: Epoch) -> list[Case]:
    """Requests and bytes of an epoch."""
    requests = {"webdataset": round(theirs.requests / SAMPLES, 5)}
    read = {"webdataset": round(theirs.num_bytes / place.needed_bytes, 4)}
    speed = {"webdataset": round(theirs.samples_per_second, 1)}
    work = {"webdataset": round(theirs.samples_per_core_second, 1)}
    return [
        Case(f"{label}: speed", round(mine.samples_per_second, 1), speed, "samples/s", lower_is_better=False),
        Case(f"{label}: work", round(mine.samples_per_core_second, 1), work, "samples/core-s", lower_is_better=False),
        Case(f"{label}: requests", round(mine.requests / SAMPLES, 5), requests, "requests/sample"),
        Case(f"{label}: bytes", round(mine.num_bytes / place.needed_bytes, 6), read, "bytes read/needed"),
    ]


if __name__ == "__main__":
    main("remote", measure)
