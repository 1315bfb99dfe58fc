"""Ranks with different values, code or files end before the first step, with a message about the differences."""

from __future__ import annotations

import shutil
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as torch_dist

import mmscale.run.rank_check
from mmscale.config import load
from mmscale.dist import World, check_device_types
from mmscale.errors import ConfigError, LaunchError
from mmscale.run.config import RunConfig
from mmscale.run.rank_check import check_ranks, compared_values
from mmscale.run.train import train
from tests.engine.ranks import ROOT, run_ranks

TINY = ROOT / "tests/system/tiny.yaml"


def check_each(world: World, folder: str, cases: list[list[str]]) -> list[str | None]:
    """Return this rank's errors if rank 1 has the overrides of each case, then its error of ``train``."""
    answers: list[str | None] = []
    run_dir = f"run_dir={folder}/run"
    for words in cases:
        config = load(TINY, [run_dir, *(words if world.rank else [])], RunConfig).value
        answers.append(complaint(lambda config=config: check_ranks(config, world)))  # type: ignore[misc]
    files, versions = mmscale.run.rank_check.source_files, mmscale.run.rank_check.versions
    config = load(TINY, [run_dir], RunConfig).value
    if world.rank:
        mmscale.run.rank_check.source_files = lambda: files() | {"mmscale/run/train.py": "0" * 64}
    answers.append(complaint(lambda: check_ranks(config, world)))
    mmscale.run.rank_check.source_files = files
    if world.rank:
        mmscale.run.rank_check.versions = lambda: versions() | {"torch": "1.0"}
    answers.append(complaint(lambda: check_ranks(config, world)))
    mmscale.run.rank_check.versions = versions
    words = ["max_steps=2", *(["engine.zero_stage=1"] if world.rank else [])]
    loaded = load(TINY, [run_dir, *words], RunConfig)
    answers.append(complaint(lambda: train(loaded)))
    return answers


def complaint(run: object) -> str | None:
    try:
        run()  # type: ignore[operator]
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.dist
def test_two_ranks_name_what_differs(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.model"
    shutil.copy(ROOT / "examples/emoji/tokenizer.model", tokenizer)
    manifest = tmp_path / "train.manifest"
    manifest.write_bytes((ROOT / "examples/emoji/shards/train-quick.manifest").read_bytes() + b"\0")
    long = ",".join(["prompt" * 200] * 5)
    cases: dict[tuple[str, ...], str | None] = {
        (): None,
        ("data.workers=1", "data.prefetch=7", f"data.cache.folder={tmp_path}"): None,
        (f"data.tokenizer.path={tokenizer}",): None,
        ("stages.0.learning_rate.default=0.5",): (
            "rank 1: stages.0.learning_rate.default is 0.5 here and 0.0013 on rank 0"
        ),
        ("checkpoint.every_steps=2",): "rank 1: checkpoint.every_steps is 2 here and 5 on rank 0",
        ("model.decoder.hidden_dim=96",): "rank 1: model.decoder.hidden_dim is 96 here and 48 on rank 0",
        ("max_steps=3",): "rank 1: max_steps is 3 here and null on rank 0",
        (f"data.datasets.0.manifest={manifest}",): "data.datasets.0.manifest is a file with sha256 ",
        ("stages.0.data={lanes: 8}",): "stages.0.data.lanes is 8 here and null on rank 0",
        (f"data.datasets.0.template.prompts=[{long}]", "seed=2", "engine.micro_lanes=2"): "rank 1: seed is 2",
    }
    expected = [
        *cases.values(),
        f"rank 1: source file mmscale/run/train.py is {'0' * 40}... here",
        "rank 1: version of torch is",
        "rank 1: engine.zero_stage is 1 here and 3 on rank 0",
    ]
    arguments = {"folder": str(tmp_path), "cases": [list(words) for words in cases]}
    answers = run_ranks("tests.run.test_rank_check:check_each", 2, arguments)
    assert answers[0] == answers[1]
    for words, sentence, answer in zip([*cases, "source", "torch", "train"], expected, answers[0], strict=True):
        assert (answer is None) == (sentence is None), (words, answer)
        if sentence is not None:
            assert sentence in answer, words
            assert answer.endswith("Start all ranks with the same command, code and files"), words
    assert not (tmp_path / "run").exists(), "a rank wrote into the run folder"


def test_every_local_file_of_a_configuration_is_compared_by_its_bytes(tmp_path: Path) -> None:
    exclude = tmp_path / "exclude.jsonl"
    exclude.write_text("")
    words = [f"stages.0.data={{faults: {{exclude: [{exclude}]}}}}", f"data.faults.exclude=[{exclude}]"]
    values = compared_values(load(ROOT / "configs/quickstart.yaml", words, RunConfig).value)
    files = {key for key, value in values.items() if "sha256" in value}
    assert files >= {
        "data.tokenizer.path",
        "data.datasets.0.manifest",
        "data.faults.exclude.0",
        "stages.0.data.faults.exclude.0",
        "evaluation.sets.0.manifest",
    }
    assert "source file data_pipeline/order/lanes.py" in values


def test_ranks_on_different_devices_end_before_they_would_hang() -> None:
    store = torch_dist.HashStore()
    store.set_timeout(timedelta(seconds=30))
    said: dict[int, str] = {}

    def join(rank: int, device: str) -> None:
        try:
            check_device_types(store, rank, 3, device)
        except LaunchError as error:
            said[rank] = str(error)

    ranks = [threading.Thread(target=join, args=each) for each in ((0, "cuda"), (1, "cuda"), (2, "cpu"))]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert sorted(said) == [0, 1, 2]
    assert set(said.values()) == {said[0]}
    assert said[0].startswith("rank 2 would train on cpu, rank 0 on cuda: check the driver")
