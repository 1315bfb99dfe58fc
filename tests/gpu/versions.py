"""Versions of torch, CUDA, DeepSpeed and flash-attn that exist together: ``python -m tests.gpu.versions``.

Asks the package index that uv is configured with for the newest versions that pyproject.toml admits on Linux with CUDA,
flash-attn included. Nothing is installed, and no GPU is needed. Writes ``versions.txt`` with the date, and the command
in docs/gpu.md. The tests read the stored file, so they need no index.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from tests.gpu.listing import PAGE, REPO

STORED = Path(__file__).parent / "versions.txt"
NAMES = (
    "torch",
    "torchvision",
    "triton",
    "cuda-toolkit",
    "nvidia-nccl-cu13",
    "deepspeed",
    "flash-attn",
    "transformers",
)
BEGIN, END = "<!-- versions: python -m tests.gpu.versions -->", "<!-- end of the versions -->"
_COMMAND = "uv pip compile --python-version 3.12 --python-platform x86_64-manylinux_2_28 --extra hf --extra flash"


def resolve() -> dict[str, str]:
    """Return the versions of ``NAMES``.

    Raises:
        SystemExit: the index has no combination, or uv cannot reach it.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "resolved.txt"
        words = [*_COMMAND.split(), "--quiet", "--no-header", "--no-annotate", "pyproject.toml", "-o", str(output)]
        done = subprocess.run([sys.executable, "-m", *words], cwd=REPO, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"uv found no versions that exist together, or no index:\n{done.stderr}")
        return parsed(output.read_text(encoding="utf-8"))


def parsed(text: str) -> dict[str, str]:
    """Return the versions of ``NAMES`` in a list of requirements."""
    found = dict(re.findall(r"^([\w.-]+)(?:\[[^\]]*\])?==([^\s;]+)", text, re.MULTILINE))
    return {name: found[name] for name in NAMES if name in found}


def written(versions: dict[str, str], day: str) -> str:
    """Return the text of docs/gpu.md with these versions."""
    text = PAGE.read_text(encoding="utf-8")
    table = "\n".join(["| package | version |", "|---|---|", *(f"| {name} | {versions[name]} |" for name in versions)])
    install = (
        f"```console\n$ pip install torch=={versions['torch']} torchvision=={versions['torchvision']} "
        f"deepspeed=={versions['deepspeed']}\n$ pip install '.[hf]'\n"
        f"$ pip install --no-build-isolation flash-attn=={versions['flash-attn']}     # optional\n```"
    )
    block = f"{BEGIN}\nResolved on {day}:\n\n{table}\n\n{install}\n{END}"
    return f"{text.split(BEGIN)[0]}{block}{text.split(END)[1]}"


def main() -> None:
    day, versions = date.today().isoformat(), resolve()
    lines = [f"# {day}: {_COMMAND} pyproject.toml", *(f"{name}=={version}" for name, version in versions.items())]
    STORED.write_text("\n".join(lines) + "\n", encoding="utf-8")
    PAGE.write_text(written(versions, day), encoding="utf-8")


if __name__ == "__main__":
    main()
