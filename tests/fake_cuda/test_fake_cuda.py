"""Training steps of recipes on fake CUDA tensors: right devices and dtypes, no unpinned copy, few waits.

No GPU is needed. ``KNOWN`` lists every place where the host waits for the device, with the reason.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from tests.fake_cuda.recipes import ENGINE, FAST, PLAIN

REPO = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent

KNOWN = {
    ("float64", "objectives/router.py"): "sums over the step, a few numbers for each expert",
    ("float64", "nn/router.py grouped"): "the same sums",
    ("float64", "nn/codebook.py code_statistics"): "exact sums, so that codes do not depend on the number of ranks",
}
KNOWN_OF_THE_ENGINE = {
    ("waits", "engine/engine.py _global_means"): "once a step: loss, metrics and norms of all ranks",
    (
        "waits",
        "engine/engine.py <genexpr>",
    ): "once a microbatch, after the step's metrics: losses of documents, for logs",
    ("waits", "engine/row_updates.py all_reduce_sum_tensors"): "once a step, after the metrics: loads of the experts",
    ("waits", "engine/engine.py _update"): (
        "inside DeepSpeed's step: norm, and overflow in fp16; once a parameter at stage 0"
    ),
    ("waits", "optim/schedule.py global_norm"): "at stage 0 in fp32, instead of DeepSpeed's norm",
    (
        "waits",
        "engine/engine.py may_update",
    ): "once a step, before the update, which the detector of bad steps may reject",
    ("waits", "engine/engine.py train_step"): "the norm, once more, for the report",
    ("float64", "engine/engine.py _global_means"): "sums over the step, a few numbers",
    ("float64", "engine/engine.py <listcomp>"): "sums of the routers over the step, a few numbers a layer",
    ("float64", "engine/row_updates.py"): "the same sums",
    ("float64", "objectives/router.py"): "loads of the experts, counted over all ranks",
    ("float64", "mmscale/dist.py"): "the same loads, gathered",
    ("float64", "engine/engine.py _update"): "DeepSpeed's norms",
    ("uploads", "engine/engine.py _update"): "DeepSpeed's constants, once a group of parameters",
}
PLANTS = {
    "item": "planted.py item",
    "host_tensor": "at least two devices, cuda:0 and cpu",
    "upload": "planted.py upload",
    "unpinned": "planted.py unpinned",
    "host_index": "planted.py host_index",
    "float64": "planted.py float64",
    "strided_query": "q has stride 8 in its last dimension",
    "long_bounds": "cu_seqlens_q is torch.int64",
    "host_bounds": "cu_seqlens_q is on cpu",
    "float32_query": "q is torch.float32",
}

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or shutil.which("g++") is None, reason="needs g++, and a machine without CUDA"
)


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile ``shim.cpp`` against the installed torch."""
    output = tmp_path_factory.mktemp("shim") / "shim.so"
    libraries = Path(torch.__file__).parent / "lib"
    words = ["g++", "-std=c++20", "-fPIC", "-shared", str(HERE / "shim.cpp"), "-o", str(output)]
    words += [f"-I{path}" for path in include_paths()] + [f"-L{libraries}", "-lc10", "-ltorch_cpu"]
    subprocess.run(words, check=True, timeout=120)
    return output


def findings(program: str, *arguments: str | Path) -> list[dict[str, Any]]:
    words = [sys.executable, str(HERE / program), *map(str, arguments)]
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return results


def assert_known(result: dict[str, Any], recipe: str, listed: Mapping[tuple[str, str], str] = KNOWN) -> None:
    assert result["error"] == "", recipe
    unknown = [
        (kind, line, count)
        for kind, line, count in result["found"]
        if not any(kind == known and line.startswith(place) for known, place in listed)
    ]
    assert unknown == [], recipe


def test_a_step_on_cuda_waits_only_where_listed_and_planted_faults_are_found(shim: Path) -> None:
    """One process, because most of the time is the import of torch."""
    sound = [(f"configs/{name}.yaml engine.precision={precision}", kernel, "") for name, precision, kernel in FAST]
    planted = [("configs/recipes/llama3.2-1b.yaml", "flash", plant) for plant in PLANTS]
    results = findings("program.py", shim, json.dumps(sound + planted))
    for (recipe, _, _), result in zip(sound, results, strict=False):
        assert_known(result, recipe)
    for (plant, message), result in zip(PLANTS.items(), results[len(sound) :], strict=True):
        assert message in json.dumps(result), plant


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("half", [0, 1])
def test_a_step_of_the_engine_waits_only_where_listed(shim: Path, half: int) -> None:
    """DeepSpeed's wrappers on fake CUDA tensors, as rank 0 of a fake process group, up to and including the update."""
    entries = sorted((f"configs/{name}.yaml", *case) for name, cases in ENGINE.items() for case in cases)[half::2]
    entries.sort(key=lambda entry: entry[1])  # DeepSpeed's construction of sharded models leaves traces.
    results = findings("engine_program.py", shim, "2", json.dumps(entries))
    for entry, result in zip(entries, results, strict=True):
        assert_known(result, str(entry), KNOWN | KNOWN_OF_THE_ENGINE)
        assert result["applied"], entry
        assert any(line.startswith("engine/engine.py _global_means") for _, line, _ in result["found"]), (
            "it is observed"
        )


@pytest.mark.slow
def test_recipes_on_cuda(shim: Path) -> None:
    entries = [(f"configs/recipes/{name}.yaml", "flash", "") for name in PLAIN]
    for name, result in zip(PLAIN, findings("program.py", shim, json.dumps(entries)), strict=True):
        assert_known(result, name)
