"""Checkpoints of shared experts: any number of ranks reads them with any ``engine.expert_parallel``, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmscale.checkpoint import load_weights, read_manifest, verify
from mmscale.checkpoint.export import export_weights
from mmscale.models.build import build_model
from mmscale.models.config import ModelConfig
from tests.checkpoint.expert_programs import CASES
from tests.engine.ranks import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.resume]

PROGRAM = "tests.checkpoint.expert_programs"
LAYOUTS = {1: [1], 2: [2], 4: [2, 4]}
"""Values of ``expert_parallel`` by number of ranks."""


def assert_resumed(saved: dict[str, Any], answer: dict[str, Any], key: str, bitwise: bool) -> None:
    """Compare state, next loss and norm; ``bitwise`` if the ranks and ``expert_parallel`` are those of the save."""
    assert answer["state"] == saved["state"], key
    if bitwise:
        assert answer["next"] == saved["next"], key
    tolerance = 5e-3 if "bf16" in key else 2e-6
    assert answer["next"] == pytest.approx(saved["next"], rel=tolerance), key


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> dict[str, Any]:
    names = ["average", "frozen bf16"]
    found: dict[str, Any] = run_ranks(f"{PROGRAM}:there_and_back", 2, {"folder": str(folder), "names": names})[0]
    return found


def test_two_ranks_resume_shared_experts_as_gathered_ones_and_back(two_ranks: dict[str, Any]) -> None:
    for key, saved in two_ranks["saved"].items():
        name = key.partition("/")[2]
        assert_resumed(saved, two_ranks["there"][f"1/2/2/{name}"], name, bitwise=False)
        assert_resumed(saved, two_ranks["back"][f"2/2/1/{name}"], name, bitwise=True)


def test_a_checkpoint_of_shared_experts_is_an_ordinary_one(
    two_ranks: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    """Equal to the checkpoint that an engine with gathered experts wrote after it had resumed from the first one."""
    shared, gathered = (place / "average" / "step-00000002" for place in (folder / "2-2", folder / "again" / "2-1"))
    assert verify(shared) == verify(gathered) == []
    manifest = read_manifest(shared)
    assert manifest.parameters == read_manifest(gathered).parameters
    model = build_model(ModelConfig.model_validate(manifest.model_config_values), attention="sdpa", seed=None)
    weights = []
    for path, ema in ((shared, False), (gathered, False), (shared, True), (gathered, True)):
        load_weights(model, path, ema=ema)
        weights.append({name: values.clone() for name, values in model.named_parameters()})
    warm = torch.load(folder / "warm.pt")
    for name, values in weights[0].items():
        assert torch.equal(values, weights[1][name])
        assert torch.equal(values.view(-1), warm[name])
        assert torch.equal(weights[2][name], weights[3][name])
    assert two_ranks["complete"]
    assert not torch.equal(*(weights[i]["decoder.layers.1.mlp.experts.down_proj"] for i in (0, 2)))
    reports = [export_weights(path, tmp_path / name) for name, path in (("shared", shared), ("gathered", gathered))]
    contents = [(Path(report.folder) / report.files[0]).read_bytes() for report in reports]
    assert contents[0] == contents[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_layout_reads_what_every_layout_wrote(tmp_path: Path) -> None:
    arguments = {"folder": str(tmp_path), "names": [*CASES]}
    saved = {}
    for ranks, sizes in LAYOUTS.items():
        answers = run_ranks(f"{PROGRAM}:save_all", ranks, {**arguments, "sizes": sizes}, timeout=300)[0]
        saved |= {(ranks, key): answer for key, answer in answers.items()}
    pairs = [(ranks, size) for ranks, sizes in LAYOUTS.items() for size in sizes]
    for ranks, sizes in LAYOUTS.items():
        more = {"sizes": sizes, "saved": pairs}
        resumed = run_ranks(f"{PROGRAM}:resume_all", ranks, {**arguments, **more}, timeout=600)[0]
        assert len(resumed) == len(sizes) * len(pairs) * len(CASES)
        for key, answer in resumed.items():
            size, their_ranks, rest = key.split("/", 2)
            same = int(their_ranks) == ranks and rest.startswith(f"{size}/")
            assert_resumed(saved[int(their_ranks), rest], answer, f"{key}, resumed by {ranks} ranks", same)
