"""A loader over damaged data of every kind: each good sample occurs once per epoch, and other lanes are not
affected."""

from __future__ import annotations

import gc
import importlib
import json
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.config import DataConfig
from data_pipeline.document import Document
from data_pipeline.errors import (
    DataConfigError,
    DataPipelineError,
    FaultKind,
    ManifestError,
    SampleError,
    ShardError,
    StateError,
    TooManyFaultsError,
)
from data_pipeline.history.digest import step_digest
from data_pipeline.loader.loader import Loader, StepBatch
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.fault_policy import Skipped
from data_pipeline.order.state import LoaderState
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import SampleReader
from data_pipeline.text.tokenizer import HuggingFaceTokenizer
from tests.data_pipeline.conftest import Members, WriteSet, captioned, picture

pytestmark = pytest.mark.fault

NUM_SAMPLES = 120
SHARD_SAMPLES = 13
"""Number of samples of a shard of ``write_set``."""


def bomb(side: int) -> bytes:
    """Return a PNG of a hundred bytes whose header claims ``side * side`` pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def said(text: object) -> bytes:
    return json.dumps({"captions": [text]}).encode()


UNFORESEEN = "what nobody foresaw"


@pytest.fixture(autouse=True)
def fragile_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the tokenizer raise for one text, as any library may. Forked workers inherit the patch."""
    encode = HuggingFaceTokenizer.encode

    def fragile(tokenizer: HuggingFaceTokenizer, text: str) -> list[int]:
        if text == UNFORESEEN:
            raise RuntimeError("unforeseen")
        return encode(tokenizer, text)

    monkeypatch.setattr(HuggingFaceTokenizer, "encode", fragile)


DAMAGES: dict[FaultKind, list[Members]] = {
    FaultKind.DECODE: [
        {"png": picture(1)[:90]},
        {"png": b"junk"},
        {"png": b""},
        {"png": bomb(60_000)},
        {"png": picture(2, encoding="JPEG")[:300]},
        {"png": b"RIFF\x10\x00\x00\x00WEBPVP8 " + bytes(30)},
    ],
    FaultKind.TEXT: [
        {"json": b'{"captions": ['},
        {"json": b"[1, 2]"},
        {"json": b"[" * 100_000},
        {"json": b'{"captions": ["\xff\xfe"]}'},
        {"json": b"{}"},
        {"json": said("")},
        {"json": said(3)},
        {"json": b'{"captions": ["\\ud800"]}'},
        {"json": b'{"captions": [' + b"9" * 5000 + b"]}"},
        {"json": json.dumps({"captions": ["a"], "parts": [{"image": "7.png"}]}).encode()},
        {"json": json.dumps({"captions": ["a"], "parts": {"text": "a"}}).encode()},
    ],
    FaultKind.DOCUMENT: [{"json": said("far too long " * 30)}],
    FaultKind.UNEXPECTED: [{"json": said(UNFORESEEN)}],
}
"""Members that replace those of a good sample, by the expected kind of fault."""


def damaged_samples(every: int = 5) -> tuple[list[Members], dict[int, FaultKind]]:
    """Return samples of which one in ``every`` is damaged, and the kind of fault of each damaged sample."""
    kinds = [(kind, members) for kind, several in DAMAGES.items() for members in several]
    samples, wrong = [], {}
    for number in range(NUM_SAMPLES):
        members = captioned(number)
        if number % every == 2:
            kind, damage = kinds[number // every % len(kinds)]
            members, wrong[number] = members | damage, kind
        samples.append(members)
    return samples, wrong


MakeConfig = Callable[..., DataConfig]


@pytest.fixture
def config_of(write_set: WriteSet, mixture_config: DataConfig) -> MakeConfig:
    """Write samples, and return the configuration of a run over two epochs. Keywords set the fault policy."""

    def make(samples: Sequence[Members], workers: int = 0, **faults: object) -> DataConfig:
        dataset = {
            "name": "only",
            "manifest": write_set("only", samples),
            "max_epochs": 2,
            "transforms": {"kind": "fixed", "augment": {"shift": 0.1, "flip": 0.5}},
        }
        return DataConfig.model_validate(
            mixture_config.model_dump()
            | {
                "datasets": [dataset],
                "lanes": 4,
                "packing": {"max_tokens": 90, "look_ahead": 3},
                "order": {"block_size": 3, "window_blocks": 2},
                "workers": workers,
                "faults": {"max_share": 0.9} | faults,
            }
        )

    return make


def epochs(config: DataConfig, spec: MediaSpec) -> tuple[list[tuple[int, int]], list[Skipped]]:
    """Return (epoch, sample) of every document and of every skipped sample until all data sets are exhausted."""
    found: list[tuple[int, int]] = []
    skipped: list[Skipped] = []
    with Loader(config, spec, seed=1) as loader:
        for step in loader:
            found += [(o.epoch, o.index) for m in step.microbatches for o in m.provenance if o is not None]
            skipped += step.skipped
            if step.exhausted:
                return found, skipped
    raise AssertionError("unreachable")


def test_a_bad_sample_leaves_nothing_behind_but_its_complaint(config_of: MakeConfig, hybrid_spec: MediaSpec) -> None:
    """A traceback would keep the packs under construction, with their pixels, in memory."""
    importlib.import_module("torchvision.io")  # Imported later, it would create a reference cycle with its callers.
    gc.collect()
    before = {id(thing) for thing in gc.get_objects() if type(thing) is Document}  # Earlier tests may have left some.
    gc.disable()  # The memory must be freed without a garbage collection.
    try:
        found, skipped = epochs(config_of(damaged_samples()[0]), hybrid_spec)
        assert len(skipped) > 40
        left = [thing for thing in gc.get_objects() if type(thing) is Document and id(thing) not in before]
        assert len(found) > 100
        assert not left
    finally:
        gc.enable()


def twice(samples: Iterator[int] | Sequence[int]) -> Counter[tuple[int, int]]:
    return Counter((epoch, sample) for sample in samples for epoch in range(2))


@pytest.mark.parametrize("workers", [0, 2])
def test_exactly_the_good_samples_arrive_once_an_epoch(
    config_of: MakeConfig, hybrid_spec: MediaSpec, workers: int
) -> None:
    samples, wrong = damaged_samples()
    config = config_of(samples, workers)
    rotten = rot(config, [i for i in range(NUM_SAMPLES) if i % 11 == 0 and i not in wrong])
    found, skipped = epochs(config, hybrid_spec)
    assert Counter(found) == twice([i for i in range(NUM_SAMPLES) if i not in wrong and i not in rotten])
    assert Counter((skip.epoch, skip.index) for skip in skipped) == twice([*wrong, *rotten])
    kinds = wrong | dict.fromkeys(rotten, FaultKind.CHECKSUM)
    assert {skip.index: skip.kind for skip in skipped} == kinds
    assert set(kinds.values()) == {FaultKind.CHECKSUM, *DAMAGES}, "every kind should occur"
    assert all(skip.key == f"{skip.index:06d}" for skip in skipped)
    assert all(Path(skip.shard).name == f"part-{skip.index // SHARD_SAMPLES:05d}.tar" for skip in skipped)


def rot(config: DataConfig, samples: Sequence[int]) -> list[int]:
    """Flip a byte in a member of each of ``samples``, without updating index and manifest."""
    manifest = Manifest.open(config.datasets[0].manifest)
    rng = np.random.default_rng(7)
    for sample in samples:
        number, row = manifest.locate(sample)
        index = manifest.open_index(number)
        members = index.row(row).members
        member = members[int(rng.integers(len(members)))]
        times = index.tar_path.stat()
        with index.tar_path.open("r+b") as file:
            file.seek(member.offset + int(rng.integers(member.size)))
            (byte,) = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ int(rng.integers(1, 256))]))
        # Bit rot does not change the modification time.
        os.utime(index.tar_path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return list(samples)


class Played:
    """Simulate the ranks of a run in one process, with the quarantine lists that a run would write."""

    def __init__(self, config: DataConfig, spec: MediaSpec, folder: Path, world_size: int) -> None:
        self.config, self.spec, self.folder, self.world_size = config, spec, folder, world_size
        self.loaders = self._open(None)
        self.skipped: list[tuple[int, Skipped]] = []

    def _open(self, state: LoaderState | None) -> list[Loader]:
        lists = sorted(self.folder.glob("*.jsonl")) if self.folder.is_dir() else []
        options: dict[str, Any] = {"seed": 1, "world_size": self.world_size, "state": state, "quarantine": lists}
        return [Loader(self.config, self.spec, rank=rank, **options) for rank in range(self.world_size)]

    def step(self) -> list[StepBatch]:
        batches = [next(loader) for loader in self.loaders]
        for rank, batch in enumerate(batches):
            self.skipped += [(batch.step, skip) for skip in batch.skipped]
            with (self.folder / f"{rank}.jsonl").open("a") as file:
                for skip in batch.skipped:
                    file.write(json.dumps(skip.record()) + "\n")
        return batches

    def resume(self, batches: list[StepBatch]) -> None:
        self.close()
        self.loaders = self._open(LoaderState.merge([batch.state for batch in batches]))

    def close(self) -> None:
        for loader in self.loaders:
            loader.close()


def play(
    config: DataConfig, spec: MediaSpec, folder: Path, world_size: int = 1, resume_at: int | None = None
) -> tuple[list[str], list[tuple[int, Skipped]]]:
    """Return the digest of each step of two epochs, and the samples skipped in each step."""
    folder.mkdir()
    played = Played(config, spec, folder, world_size)
    digests: list[str] = []
    batches: list[StepBatch] = []
    try:
        while not batches or not all(batch.exhausted for batch in batches):
            if resume_at is not None and len(digests) == resume_at:
                played.resume(batches)
            batches = played.step()
            digests.append(step_digest([micro for batch in batches for micro in batch.microbatches]))
    finally:
        played.close()
    return digests, sorted(played.skipped, key=lambda item: (item[0], item[1].lane))


def test_a_quarantine_list_that_grows_moves_nothing_at_any_number_of_ranks_and_workers_and_any_resume(
    config_of: MakeConfig, hybrid_spec: MediaSpec, tmp_path: Path
) -> None:
    samples, wrong = damaged_samples()
    moody = [i for i in range(NUM_SAMPLES) if i % 9 == 4 and i not in wrong]
    for number in moody:  # Good or bad, depending on the draws of the epoch.
        samples[number] = samples[number] | {"json": b'{"captions": ["", "fine"]}'}
    config = config_of(samples, on_error="quarantine")
    plain, skipped = play(config, hybrid_spec, tmp_path / "plain")
    times = Counter((skip.epoch, skip.index) for _, skip in skipped)
    assert times == twice(list(wrong)) + Counter((e, i) for e, i in times if i in moody)
    turned = {i for e, i in times if e == 0 and i in moody} - {i for e, i in times if e == 1 and i in moody}
    assert turned, "some samples should be bad in the first epoch and good in the second"
    middle = len(plain) * 2 // 3
    for number, (world_size, workers, resume_at) in enumerate(
        [(2, 0, None), (1, 2, None), (2, 2, middle), (1, 0, middle), (1, 2, 5)]
    ):
        again = config.model_copy(update={"workers": workers})
        digests, faults = play(again, hybrid_spec, tmp_path / str(number), world_size, resume_at)
        assert digests == plain, (world_size, workers, resume_at)
        assert faults == skipped, (world_size, workers, resume_at)
    merely_skipped = DataConfig.model_validate(config.model_dump() | {"faults": {"max_share": 0.9}})
    assert play(merely_skipped, hybrid_spec, tmp_path / "skip")[0] == plain


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Count the reads of each sample."""
    counts: Counter[int] = Counter()
    read = SampleReader.read

    def counting(self: SampleReader, sample_index: int, *others: int) -> Any:
        counts[sample_index] += 1
        return read(self, sample_index, *others)

    monkeypatch.setattr(SampleReader, "read", counting)
    return counts


def test_a_quarantined_sample_is_not_tried_again_where_that_is_futile(
    config_of: MakeConfig, hybrid_spec: MediaSpec, tmp_path: Path, tries: Counter[int]
) -> None:
    samples, wrong = damaged_samples()
    config = config_of(samples, on_error="quarantine")
    futile = {sample for sample, kind in wrong.items() if kind is FaultKind.DECODE}
    _, skipped = play(config, hybrid_spec, tmp_path / "once")
    assert {sample: tries[sample] for sample in wrong} == {sample: 1 if sample in futile else 2 for sample in wrong}
    assert {(skip.index, skip.epoch) for _, skip in skipped if skip.recalled} == {(sample, 1) for sample in futile}
    tries.clear()
    with Loader(config, hybrid_spec, seed=1, quarantine=[tmp_path / "once" / "0.jsonl"]) as loader:
        while not next(loader).exhausted:
            pass
    assert not any(tries[sample] for sample in futile), "the list of a run is read when it goes on"


def test_a_torn_or_foreign_line_of_a_quarantine_list_costs_time_only(
    config_of: MakeConfig, hybrid_spec: MediaSpec, tmp_path: Path
) -> None:
    samples, _ = damaged_samples()
    config = config_of(samples, on_error="quarantine")
    plain, _ = play(config, hybrid_spec, tmp_path / "plain")
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes(b'{"dataset": "only", "ind\n[]\n\xff\n{"dataset": "only", "index": 1, "kind": "text"')
    with Loader(config, hybrid_spec, seed=1, quarantine=[torn]) as loader:
        assert step_digest(list(next(loader).microbatches)) == plain[0]


def test_a_list_that_is_excluded_leaves_its_samples_out_from_the_start_and_is_part_of_the_run(
    config_of: MakeConfig, hybrid_spec: MediaSpec, tmp_path: Path, tries: Counter[int]
) -> None:
    samples, wrong = damaged_samples()
    config = config_of(samples, on_error="quarantine")
    play(config, hybrid_spec, tmp_path / "first")
    tries.clear()
    excluding = config_of(samples, on_error="fail", exclude=[tmp_path / "first" / "0.jsonl"])
    found, skipped = epochs(excluding, hybrid_spec)
    assert Counter(found) == twice([i for i in range(NUM_SAMPLES) if i not in wrong])
    assert {skip.kind for skip in skipped} == {FaultKind.EXCLUDED}
    assert not set(wrong) & set(tries)
    state = next(Loader(config, hybrid_spec, seed=1)).state
    with pytest.raises(StateError, match=r"changed since: faults\.exclude"):
        Loader(excluding, hybrid_spec, seed=1, state=state)


def test_lists_that_cannot_be_excluded_are_refused(
    config_of: MakeConfig, hybrid_spec: MediaSpec, tmp_path: Path
) -> None:
    samples = [captioned(i) for i in range(20)]
    path = tmp_path / "list.jsonl"

    def first(lines: list[object]) -> StepBatch:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return next(Loader(config_of(samples, exclude=[path]), hybrid_spec, seed=1))

    with pytest.raises(DataConfigError, match="cannot be read"):
        next(Loader(config_of(samples, exclude=[path]), hybrid_spec, seed=1))
    with pytest.raises(DataConfigError, match=r"list\.jsonl:1 is no line"):
        first([{"dataset": "only"}])
    with pytest.raises(DataConfigError, match="names every sample"):
        first([{"dataset": "only", "index": i, "key": f"{i:06d}"} for i in range(20)])
    with pytest.raises(DataConfigError, match="another key: it was made for another manifest"):
        first([{"dataset": "only", "index": i, "key": f"{i + 1:06d}"} for i in range(19)])


def lose(tar: Path) -> None:
    tar.unlink()


def cut(tar: Path) -> None:
    os.truncate(tar, tar.stat().st_size // 2)


def lose_index(tar: Path) -> None:
    Path(f"{tar}.index").unlink()


def spoil_index(tar: Path) -> None:
    Path(f"{tar}.index").write_bytes(b"junk" * 100)


def become_a_folder(tar: Path) -> None:
    tar.unlink()
    tar.mkdir()


LOSSES = [lose, cut, lose_index, spoil_index, become_a_folder]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_shard_ends_the_run_or_is_left_out_whole(
    config_of: MakeConfig, hybrid_spec: MediaSpec, loss: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [captioned(i) for i in range(NUM_SAMPLES)]
    config = config_of(samples)
    loss(Path(config.datasets[0].manifest).parent / "part-00003.tar")
    with pytest.raises((ManifestError, ShardError), match="part-00003"):
        epochs(config, hybrid_spec)
    opened: Counter[int] = Counter()
    open_index = Manifest.open_index

    def counting(self: Manifest, shard_number: int) -> Any:
        opened[shard_number] += 1
        return open_index(self, shard_number)

    monkeypatch.setattr(Manifest, "open_index", counting)
    survivor = DataConfig.model_validate(config.model_dump() | {"faults": {"shard": "skip", "max_consecutive": 2}})
    found, skipped = epochs(survivor, hybrid_spec)
    gone = range(3 * SHARD_SAMPLES, 4 * SHARD_SAMPLES)
    assert Counter(found) == twice([i for i in range(NUM_SAMPLES) if i not in gone])
    assert Counter((skip.epoch, skip.index) for skip in skipped) == twice(gone)
    assert {skip.kind for skip in skipped} == {FaultKind.SHARD}
    assert opened[3] <= 2, "a lost shard is tried once more when it fails, and then left alone"


def test_lost_shards_move_nothing_at_any_number_of_ranks_and_workers_and_any_resume(
    config_of: MakeConfig, hybrid_spec: MediaSpec, tmp_path: Path
) -> None:
    config = config_of([captioned(i) for i in range(NUM_SAMPLES)], shard="skip")
    lose(Path(config.datasets[0].manifest).parent / "part-00001.tar")
    plain, skipped = play(config, hybrid_spec, tmp_path / "plain")
    for number, (world_size, workers, resume_at) in enumerate([(2, 0, None), (1, 2, 4), (2, 2, 9)]):
        again = config.model_copy(update={"workers": workers})
        assert play(again, hybrid_spec, tmp_path / str(number), world_size, resume_at) == (plain, skipped)


def test_a_shard_that_is_cut_while_it_is_open_is_lost_from_there_on(
    config_of: MakeConfig, hybrid_spec: MediaSpec
) -> None:
    config = config_of([captioned(i) for i in range(NUM_SAMPLES)], shard="skip")
    tars = sorted(Path(config.datasets[0].manifest).parent.glob("*.tar"))
    with Loader(config, hybrid_spec, seed=1) as loader:
        first = next(loader)
        keys = [Path(o.shard) for m in first.microbatches for o in m.provenance if o is not None]
        os.truncate(keys[0], 600)
        steps = [first, next(loader)]
        while not steps[-1].exhausted:
            steps.append(next(loader))
    skipped = [skip for step in steps for skip in step.skipped]
    number = tars.index(keys[0])
    gone = set(range(number * SHARD_SAMPLES, (number + 1) * SHARD_SAMPLES))
    assert {skip.index for skip in skipped if skip.epoch == 1} == gone
    assert {skip.index for skip in skipped} <= gone


def test_a_shard_with_one_unreadable_sample_loses_that_one(
    config_of: MakeConfig, hybrid_spec: MediaSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of([captioned(i) for i in range(NUM_SAMPLES)], shard="skip")
    read = SampleReader.read

    def failing(self: SampleReader, sample_index: int, *others: int) -> Any:
        if sample_index == 40:
            raise ShardError("reading bytes 1-2 failed: Input/output error")
        return read(self, sample_index, *others)

    monkeypatch.setattr(SampleReader, "read", failing)
    found, skipped = epochs(config, hybrid_spec)
    assert Counter(found) == twice([i for i in range(NUM_SAMPLES) if i != 40])
    assert [(skip.index, skip.key, skip.kind) for skip in skipped] == [(40, "000040", FaultKind.SHARD)] * 2


def test_too_many_lost_shards_end_the_run(config_of: MakeConfig, hybrid_spec: MediaSpec) -> None:
    config = config_of([captioned(i) for i in range(NUM_SAMPLES)], shard="skip", max_share=0.25)
    folder = Path(config.datasets[0].manifest).parent
    for number in range(3):
        lose(folder / f"part-{number:05d}.tar")
    with pytest.raises(TooManyFaultsError, match=r"3 of the 10 shards .* 39 of 120 samples .*max_share=0\.25"):
        epochs(config, hybrid_spec)


def test_a_data_set_of_one_shard_that_is_lost_ends_the_run_whatever_the_share(
    config_of: MakeConfig, hybrid_spec: MediaSpec
) -> None:
    config = config_of([captioned(i) for i in range(8)], shard="skip", max_share=1)
    lose(Path(config.datasets[0].manifest).parent / "part-00000.tar")
    with pytest.raises(TooManyFaultsError, match="1 of the 1 shards"):
        next(Loader(config, hybrid_spec, seed=1))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", list(DAMAGES))
def test_under_fail_each_kind_ends_the_run_and_names_the_sample(
    config_of: MakeConfig, hybrid_spec: MediaSpec, kind: FaultKind, workers: int
) -> None:
    samples = [captioned(i) for i in range(16)]
    samples[5] = samples[5] | DAMAGES[kind][0]
    config = config_of(samples, workers, **{kind.value: "fail"})
    with pytest.raises(SampleError, match=r"part-00000\.tar/000005: ") as raised:
        epochs(config, hybrid_spec)
    assert raised.value.kind is kind
    assert isinstance(raised.value, DataPipelineError)
