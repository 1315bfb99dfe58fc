"""Containers: the words of srun and Apptainer, and values that cannot work."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launchers.container import Container
from launchers.slurm import Job, JobError, render

FOLDERS = [Path("/home/me/code"), Path("/scratch/run")]


def test_pyxis_options_belong_to_srun_and_keep_the_command() -> None:
    container = Container("pyxis", "docker://nvcr.io#nvidia/pytorch:25.01-py3", ("/data:/data:ro",), options=("--x",))
    assert container.srun_options(FOLDERS, ["NCCL_DEBUG", "A"]) == [
        "--container-image=docker://nvcr.io#nvidia/pytorch:25.01-py3",
        "--container-workdir=/home/me/code",
        "--container-mounts=/data:/data:ro,/home/me/code:/home/me/code,/scratch/run:/scratch/run",
        "--container-env=NCCL_DEBUG,A",
        "--x",
    ]
    assert container.wrap(["python", "x"], FOLDERS, gpus=True) == ["python", "x"]


def test_apptainer_wraps_the_command_and_mounts_what_no_mount_contains() -> None:
    container = Container("apptainer", "/images/a.sif", ("/home", "/lustre/s:/scratch"))
    assert container.srun_options(FOLDERS, ["A"]) == []
    binds = ["--bind", "/home", "--bind", "/lustre/s:/scratch"]
    command = ["apptainer", "exec", "--nv", "--pwd", "/home/me/code", *binds, "/images/a.sif", "python", "x"]
    assert container.wrap(["python", "x"], FOLDERS, gpus=True) == command
    assert "--nv" not in container.wrap(["python", "x"], FOLDERS, gpus=False)
    assert container.exports({"A": "1"}) == {"A": "1", "APPTAINERENV_A": "1"}


@pytest.mark.parametrize(
    ("kind", "image", "file"),
    [
        ("pyxis", "ubuntu:24.04", None),
        ("pyxis", "docker://nvcr.io#nvidia/pytorch:25.01-py3", None),
        ("pyxis", "image.sqsh", Path("image.sqsh")),
        ("pyxis", "/images/a", Path("/images/a")),
        ("apptainer", "ubuntu", Path("ubuntu")),
        ("apptainer", "oras://registry/a", None),
    ],
)
def test_which_images_are_files(kind: str, image: str, file: Path | None) -> None:
    assert Container(kind, image).image_file == file  # type: ignore[arg-type]


def test_every_problem_of_a_container_is_found_before_submission(tmp_path: Path) -> None:
    container = Container("apptainer", str(tmp_path / "gone.sif"), ("data", "/nowhere-here:/x"), options=("-e", "nv"))
    with pytest.raises(JobError) as caught:
        Job(("train",), tmp_path, container=container)
    assert [problem.key for problem in caught.value.problems] == [
        *("container.image", "container.mounts.0", "container.mounts.1", "container.options.0", "container.options.1"),
    ]


@pytest.mark.parametrize("kind", ["pyxis", "apptainer"])
def test_the_script_outside_the_container_starts_the_rank_inside(tmp_path: Path, kind: str) -> None:
    """``srun`` and ``apptainer`` print their words here; ``#`` and blanks must arrive unchanged."""
    image = tmp_path / "an image#1.sqsh"
    image.touch()
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text('#!/bin/bash\nwhile [[ $1 == -* ]]; do echo "srun $1"; shift; done\nexec "$@"\n')
    (tools / "apptainer").write_text(
        '#!/bin/bash\nprintf "apptainer %s\\n" "$@"; while [[ $1 != inside ]]; do shift; done\nexec "$@"\n'
    )
    (tools / "inside").write_text('#!/bin/bash\necho "inside $A"; exit 3\n')
    (tools / "module").write_text('#!/bin/bash\necho "module $*"\n')
    (tools / "scontrol").write_text("#!/bin/bash\ntrue\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    run_dir = tmp_path / "run"
    (run_dir / "logs").mkdir(parents=True)
    container = Container(kind, str(image), python="inside")  # type: ignore[arg-type]
    job = Job(("train",), run_dir, container=container, modules=("cuda/12",), environment={"A": "b c#d"}, requeue=False)
    script = render(job)
    assert not [line for line in script.splitlines() if line.startswith("#SBATCH") and "container" in line]
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_PROCID": "0"}
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, **variables, "PATH": f"{tools}:{os.environ['PATH']}"},
        text=True,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 3, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert {"module load cuda/12", "inside b c#d"} <= set(lines)
    assert (f"srun --container-image={image}" if kind == "pyxis" else f"apptainer {image}") in lines
