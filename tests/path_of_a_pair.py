"""List the files and functions that one image-text pair passes through in a training step.

    python -m tests.path_of_a_pair             # the quickstart, one rank, no workers
    python -m tests.path_of_a_pair --json

Two runs are profiled that differ by one step. A function is on the path if it is called more often in the longer run.
Code that runs after the last step (the save, the result) is not counted. Functions are listed in the order of their
first call. Comprehensions belong to the function that contains them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

REPO = Path(__file__).resolve().parents[1]
STEPS = 4
OVERRIDES = (
    "data.workers=0",
    "metrics.tensorboard=false",
    "metrics.images_every=null",
    "metrics.plain_line_seconds=3600",
    "checkpoint.every_steps=1000",
    "evaluation.sets=[]",
)
_INLINE = ("<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>", "<module>")


def count_calls(steps: int) -> dict[str, int]:
    """Train the quickstart in a new process. Return calls by ``file:function``, in the order of the first call."""
    with tempfile.TemporaryDirectory(prefix="path-of-a-pair-") as folder:
        output = Path(folder) / "calls.json"
        command = [sys.executable, "-m", "tests.path_of_a_pair", "--count", str(steps), "--output", str(output)]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the profiled run ended with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
        calls: dict[str, int] = json.loads(output.read_text())
        return calls


def path_of_a_pair() -> list[str]:
    """``file:function`` of each function that a step more calls more often, in the order of the first call."""
    shorter, longer = count_calls(STEPS), count_calls(STEPS + 1)
    return [name for name, calls in longer.items() if calls > shorter.get(name, 0)]


def _profile(steps: int, output: Path) -> None:
    from mmscale.checkpoint.background import Saver
    from mmscale.config import load
    from mmscale.run.config import RunConfig
    from mmscale.run.train import train

    calls: dict[CodeType, int] = {}
    save = Saver.save.__code__

    def record(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            calls[frame.f_code] = calls.get(frame.f_code, 0) + 1
            if frame.f_code is save:  # After the last step. The end of a run is not a part of a step.
                sys.setprofile(None)

    def record_decoding(frame: FrameType, event: str, argument: Any) -> None:
        # Other threads beat by the clock, so the number of their calls says nothing about a step.
        if threading.current_thread().name.startswith("decode"):
            record(frame, event, argument)

    overrides = [f"run_dir={output.parent / 'run'}", f"max_steps={steps}", *OVERRIDES]
    loaded = load(REPO / "configs/quickstart.yaml", overrides, RunConfig)
    threading.setprofile(record_decoding)
    sys.setprofile(record)
    try:
        train(loaded)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    named: dict[str, int] = {}
    for code, number in calls.items():
        file = Path(code.co_filename)
        ours = file.is_relative_to(REPO / "mmscale") or file.is_relative_to(REPO / "data_pipeline")
        if ours and code.co_name not in _INLINE:
            name = f"{file.relative_to(REPO)}:{getattr(code, 'co_qualname', code.co_name)}"
            named[name] = named.get(name, 0) + number
    output.write_text(json.dumps(named))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.count is not None:
        _profile(arguments.count, arguments.output)
        return
    path = path_of_a_pair()
    files = list(dict.fromkeys(name.partition(":")[0] for name in path))
    if arguments.json:
        print(json.dumps({"files": len(files), "functions": len(path), "path": path}, indent=1))
        return
    for file in files:
        print(file)
        for name in path:
            if name.partition(":")[0] == file:
                print(f"    {name.partition(':')[2]}")
    print(f"{len(files)} files, {len(path)} functions")


if __name__ == "__main__":
    main()
