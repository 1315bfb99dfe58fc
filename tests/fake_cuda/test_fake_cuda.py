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

REPO = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent

KNOWN = {
    ("waits", "nn/cross_entropy.py linear_cross_entropy"): (
        "once a microbatch: the logits of rows without loss, often most rows, are not computed"
    ),
    ("waits", "objectives/contrastive.py _gather"): "once a step: the scale learns only below its limit",
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
    ("waits", "engine/engine.py _update"): "inside DeepSpeed's step: norms and overflow, once a parameter at stage 0",
    ("waits", "engine/engine.py update_if_allowed"): "a step whose norm is not finite must not be applied",
    ("waits", "engine/engine.py train_step"): "the norm, once more, for the report",
    ("float64", "engine/engine.py _global_means"): "sums over the step, a few numbers",
    ("float64", "engine/engine.py _update"): "DeepSpeed's norms",
    ("uploads", "engine/engine.py _update"): "DeepSpeed's constants, once a group of parameters",
}
RECIPES = ("llama3.2-11b-vision", "qwen2-vl-2b", "nvlm-h-72b", "molmo-7b-d", "aria", "emu3-8b", "janus-1.3b")
SMALL = ("emoji-contrast", "emoji-vq", "emoji-preferences", "emoji-grow", "emoji-draw", "pixtral-12b", "llama3.2-1b")
PLANTS = {
    "item": "planted.py item",
    "host_tensor": "at least two devices, cuda:0 and cpu",
    "upload": "planted.py upload",
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


def findings(shim: Path, entries: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    words = [sys.executable, str(HERE / "program.py"), str(shim), json.dumps(entries)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
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
    sound = [
        ("configs/quickstart.yaml engine.precision=fp16", "flash", ""),
        ("configs/recipes/emoji-moe.yaml", "torch_varlen", ""),
    ]
    planted = [("configs/recipes/llama3.2-1b.yaml", "flash", plant) for plant in PLANTS]
    results = findings(shim, sound + planted)
    for (recipe, _, _), result in zip(sound, results, strict=False):
        assert_known(result, recipe)
        assert result["found"], "the observer sees the operations"
    for (plant, message), result in zip(PLANTS.items(), results[len(sound) :], strict=True):
        assert message in json.dumps(result), plant


@pytest.mark.slow
@pytest.mark.parametrize(("size", "zero_stage", "precision"), [(2, 3, "bf16"), (2, 2, "fp16"), (1, 0, "bf16")])
def test_a_step_of_the_engine_waits_only_where_listed(shim: Path, size: int, zero_stage: int, precision: str) -> None:
    """DeepSpeed's wrappers on fake CUDA tensors, as rank 0 of a fake process group."""
    words = [str(shim), str(REPO / "configs/quickstart.yaml"), str(size), str(zero_stage), precision]
    done = subprocess.run(
        [sys.executable, str(HERE / "engine_program.py"), *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=REPO,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    # In fp16 DeepSpeed reads a count of overflows, for which a fake tensor has no value: 1 skips the update.
    assert result["applied"] == (precision != "fp16")
    assert_known({"error": "", **result}, f"stage {zero_stage}", KNOWN | KNOWN_OF_THE_ENGINE)
    assert any(line.startswith("engine/engine.py _update") for _, line, _ in result["found"]), "DeepSpeed is observed"


@pytest.mark.slow
@pytest.mark.parametrize("recipes", [RECIPES[:4], RECIPES[4:], SMALL], ids=["towers", "others", "small"])
def test_recipes_on_cuda(shim: Path, recipes: tuple[str, ...]) -> None:
    entries = [(f"configs/recipes/{name}.yaml", "flash", "") for name in recipes]
    for name, result in zip(recipes, findings(shim, entries), strict=True):
        assert_known(result, name)
