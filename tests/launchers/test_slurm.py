"""The batch script as text, and on a real SLURM cluster if there is one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from launchers import slurm
from launchers.restarts import RESTARTS_FILE
from launchers.slurm import Job, render, seconds_of, submit
from mmscale.checkpoint.manifest import MANIFEST
from mmscale.errors import LaunchError
from tests.slurm.cluster import Cluster

HERE = Path(__file__).parent
GOLDEN = HERE / "golden.sbatch"
PYTHON = sys.executable


def golden_job(folder: Path, **changes: object) -> Job:
    values: dict[str, object] = {
        "arguments": ("train", "configs/a run.yaml", "stages.0.steps=5"),
        "run_dir": folder / "my runs" / "first",
        "nodes": 2,
        "gpus_per_node": 4,
        "cpus_per_task": 6,
        "time": "4:00:00",
        "partition": "gpu",
        "account": "lab",
        "extra": ("--constraint=h100",),
        "setup": ("module load cuda",),
        "executable": ("/opt/mmscale/bin/python", "-m", "mmscale.cli.main"),
        "python": "/opt/mmscale/bin/python",
    }
    return Job(**{**values, **changes})  # type: ignore[arg-type]


def test_script_is_the_golden_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """To update: run ``UPDATE_GOLDEN=1 pytest tests/launchers/test_slurm.py`` and read the difference."""
    monkeypatch.setattr(slurm.Path, "cwd", lambda: Path("/home/user/mmscale"))
    script = render(golden_job(Path("/scratch"), health_check=True))
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(script)
    assert script == GOLDEN.read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"requeue": False},
        {"setup": ()},
        {"gpus_per_node": 0, "ranks_per_node": 3},
        {"arguments": ("train", "a'b $(x)")},
    ],
)
def test_script_is_legal_bash(tmp_path: Path, changes: dict[str, object]) -> None:
    script = render(golden_job(tmp_path, **changes))
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr
    words = changes.get("arguments", golden_job(tmp_path).arguments)
    (line,) = re.findall(r"^command=.*$", script, re.MULTILINE)
    echoed = subprocess.run(["bash", "-c", f'{line}\nprintf "%s\\n" "${{command[@]}}"'], text=True, capture_output=True)
    assert echoed.stdout.splitlines()[3:] == list(words)  # type: ignore[call-overload]


def test_requests() -> None:
    gpus = golden_job(Path("/s")).directives()
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--signal=USR1@180", "--requeue"} <= set(gpus)
    cpus = golden_job(Path("/s"), gpus_per_node=0, ranks_per_node=3, requeue=False).directives()
    assert "--ntasks-per-node=3" in cpus
    assert "--no-requeue" in cpus
    assert not any(line.startswith("--gpus") for line in cpus)


def test_one_job_name_a_run_folder(tmp_path: Path) -> None:
    """``--dependency=singleton`` compares names: jobs of one run must not overlap, nor wait for other runs."""
    first = golden_job(tmp_path / "a")
    assert first.name == golden_job(tmp_path / "a", nodes=1).name
    assert first.name != golden_job(tmp_path / "b").name


@pytest.mark.parametrize(
    "changes", [{"nodes": 0}, {"max_restarts": -1}, {"ranks_per_node": 2}, {"gpus_per_node": -1}, {"save_seconds": 0}]
)
def test_requests_that_cannot_be(tmp_path: Path, changes: dict[str, int]) -> None:
    with pytest.raises(LaunchError):
        golden_job(tmp_path, **changes)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5", 300),
        ("5:30", 360),
        ("4:00:00", 14_400),
        ("0:03:01", 240),
        ("2-0", 172_800),
        ("1-2:30", 95_400),
        ("1-00:00:01", 86_460),
        ("0", None),
        ("UNLIMITED", None),
        ("infinite", None),
    ],
)
def test_time_limits_in_every_notation_of_slurm(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["soon", "4h", "1:2:3:4", "1-", "-5", ""])
def test_no_time_limit(text: str) -> None:
    with pytest.raises(ValueError, match="expected minutes, minutes:seconds"):
        seconds_of(text)


@pytest.mark.parametrize(
    ("changes", "limit", "margin"),
    [
        ({"time": "3"}, 180, 180),
        ({"time": "2:00"}, 120, 180),
        ({"time": "0:02:00", "save_seconds": 10}, 120, 120),
        ({"time": "0-1", "save_seconds": 3600}, 3600, 3600),
        ({"extra": ("--time=1",)}, 60, 180),
        ({"extra": ("-t 1",)}, 60, 180),
        ({"extra": ("--time-min=2",)}, 120, 180),
        ({"extra": ("--qos=high --time=1",)}, 60, 180),
        ({"extra": ("--ti=2",)}, 120, 180),
        ({"extra": ("--qos=high -t '2'",)}, 120, 180),
        ({"extra": ("--time-m 2",)}, 120, 180),
    ],
)
def test_a_limit_within_the_margin_for_saving_is_refused(
    tmp_path: Path, changes: dict[str, object], limit: int, margin: int
) -> None:
    with pytest.raises(LaunchError, match=rf"is {limit} s, but the ranks save and stop {margin} s before"):
        golden_job(tmp_path, **changes)


def test_a_limit_beyond_the_margin_is_accepted(tmp_path: Path) -> None:
    assert golden_job(tmp_path, time="4").time == "4"
    assert golden_job(tmp_path, time="0").time == "0"


@pytest.mark.parametrize(
    "changes",
    [
        {"run_dir": Path("/s/a\n#SBATCH --uid=0")},
        {"account": "lab\ntouch /s/trail"},
        {"partition": "gpu\r"},
        {"extra": ("--qos=high\ntouch /s/trail",)},
        {"setup": ("module load cuda\ntouch /s/trail",)},
        {"run_dir": Path("/s/a\\b")},
        {"extra": ("touch /s/trail",)},
        {"time": "4:00:00\n"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_text_that_would_become_another_line_of_the_script_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(LaunchError, match=r"line break or control character|backslash|expected an option of sbatch"):
        golden_job(Path("/s"), **changes)


def run_script(folder: Path, job: Job, *, start: int = 0) -> subprocess.CompletedProcess[str]:
    """The script without SLURM: ``srun`` runs one task here. What ``scontrol`` changes is in ``scontrol.log``."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "srun").write_text('#!/usr/bin/env bash\nwhile [[ $1 == -* ]]; do echo "$1"; shift; done\nexec "$@"\n')
    (tools / "scontrol").write_text(
        f"#!/usr/bin/env bash\n[[ $1 == show ]] || echo \"$@\" >>'{folder}/scontrol.log'\n"
        "[[ $2 != hostnames ]] || echo n1\n"
    )
    (tools / "sleep").write_text("#!/usr/bin/env bash\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": str(start)}
    variables |= {"SLURM_PROCID": "0", "SLURMD_NODENAME": "n1"}
    (job.run_dir / "logs").mkdir(parents=True, exist_ok=True)
    return subprocess.run(
        ["bash", "-c", render(job)],
        env={**os.environ, **variables, "PATH": f"{tools}:{os.environ['PATH']}"},
        text=True,
        capture_output=True,
        check=False,
        timeout=60,
    )


SAVE = "mkdir -p checkpoints/step-00000002; echo > checkpoints/step-00000002/manifest.json"


@pytest.mark.parametrize(
    ("body", "code", "log", "changes"),
    [
        ("echo '{}' > result.json", 0, "finished", []),
        ("exit 0", 1, "the ranks ended with exit code 0; a restart cannot help", []),
        ("exit 2", 2, "rank 0 on n1 ended with exit code 2; a restart cannot help", []),
        (
            "exit 3",
            75,
            "rank 0 on n1 ended with exit code 3; requeued",
            ["requeue 7", "update JobId=7 StartTime=now+120"],
        ),
        ("kill -KILL $$", 75, "rank 0 on n1 was killed by SIGKILL", ["requeue 7", "update JobId=7 StartTime=now+120"]),
        (f"{SAVE}; exit 75", 75, "saved and stopped; requeued", ["requeue 7"]),
        ("exit 75", 75, "restart 1 of 3 without a newer", ["requeue 7", "update JobId=7 StartTime=now+120"]),
    ],
)
def test_the_end_of_the_ranks_decides_also_in_a_folder_that_holds_a_result(
    tmp_path: Path, body: str, code: int, log: str, changes: list[str]
) -> None:
    """A finished run can be extended. Only the ranks know whether there are more steps."""
    folder = tmp_path / "50% of %j"
    folder.mkdir()
    if "exit 0" not in body:
        (folder / "result.json").write_text('{"steps": 1}')
    executable = ("bash", "-c", f'cd "$0" && touch started; {body}')
    job = golden_job(tmp_path, run_dir=folder, arguments=(str(folder),), executable=executable, setup=(), python=PYTHON)
    done = run_script(tmp_path, job)
    assert (folder / "started").exists()
    assert done.returncode == code, done.stdout + done.stderr
    assert log in done.stdout
    assert "failed" not in done.stdout
    assert f"--output={tmp_path}/50%% of %%j/logs/slurm-%j-%t.log" in done.stdout
    made = tmp_path / "scontrol.log"
    assert (made.read_text().splitlines() if made.exists() else []) == changes


@pytest.mark.parametrize(("body", "code"), [(f"{SAVE}; exit 3", 75), ("exit 3", 3), ("exit 75", 75)])
def test_the_script_works_where_python_fails(tmp_path: Path, body: str, code: int) -> None:
    """A restart then needs a newer checkpoint, so that the number of restarts stays bounded."""
    executable = ("bash", "-c", f'cd "$0" && {body}')
    job = golden_job(tmp_path, run_dir=tmp_path, arguments=(str(tmp_path),), executable=executable, setup=())
    done = run_script(tmp_path, job)
    assert done.returncode == code, done.stdout + done.stderr
    assert "launchers.restarts failed" in done.stdout
    made = tmp_path / "scontrol.log"
    assert (made.read_text() if made.exists() else "") == ("requeue 7\n" if "manifest" in body else "")


def test_a_job_without_requeue_ends_with_the_code_of_its_ranks(tmp_path: Path) -> None:
    executable = ("bash", "-c", "exit 3")
    job = golden_job(tmp_path, run_dir=tmp_path, arguments=(), executable=executable, setup=(), requeue=False)
    done = run_script(tmp_path, job)
    assert done.returncode == 3, done.stdout + done.stderr
    assert not (tmp_path / "scontrol.log").exists()


@pytest.mark.parametrize("made", [2, None], ids=["replaced", "none"])
def test_only_a_checkpoint_that_was_written_last_counts_as_newer(tmp_path: Path, made: int | None) -> None:
    """The script finds the new checkpoint despite a damaged one and a copy with a larger number."""
    folder = tmp_path / "run"
    for number, name in enumerate(["step-00000002", "step-00000010.damaged", "step-99", "step-00000011.partial"]):
        manifest = folder / "checkpoints" / name / MANIFEST
        manifest.parent.mkdir(parents=True)
        manifest.touch()
        os.utime(manifest, (1_000_000_000 - number, 1_000_000_000 - number))
    saved = f"checkpoints/step-{made:08d}" if made else "checkpoints/step-00000012.partial"
    executable = ("bash", "-c", f'cd "$0" && mkdir -p {saved} && echo > {saved}/{MANIFEST}; exit 75')
    job = golden_job(tmp_path, run_dir=folder, arguments=(str(folder),), executable=executable, setup=(), python=PYTHON)
    done = run_script(tmp_path, job)
    assert done.returncode == 75, done.stdout + done.stderr
    assert f"from {folder}/checkpoints/step-00000002\n" in done.stdout
    assert ("a newer checkpoint was saved" if made else "restart 1 of 3 without a newer") in done.stdout


@pytest.mark.fault
def test_without_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="no sbatch here"):
        submit(golden_job(tmp_path))


@pytest.fixture
def run_dir(cluster: Cluster, tmp_path: Path) -> Path:
    """A folder that all nodes of the cluster share."""
    return tmp_path


def start(run_dir: Path, mode: str, **changes: object) -> str:
    executable = (sys.executable, str(HERE / "slurm_stand_in.py"))
    return submit(Job(arguments=(str(run_dir), mode), run_dir=run_dir, nodes=2, executable=executable, **changes))[0][0]  # type: ignore[arg-type]


def state(number: str) -> dict[str, str]:
    shown = subprocess.run(["scontrol", "show", "job", number, "-o"], capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"(\w+)=(\S*)", shown))


def wait(condition: Callable[[], bool], number: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "\n".join(f"{name}={value}" for name, value in state(number).items())
        time.sleep(0.3)


def tell(number: str) -> None:
    """Send USR1 to every process of every step, as ``--signal`` does before the time limit."""
    subprocess.run(["scancel", "--signal=USR1", number], check=True)


@pytest.mark.slurm
def test_two_nodes_stop_requeue_and_finish(run_dir: Path) -> None:
    number = start(run_dir, "train")
    wait(lambda: all((run_dir / f"start-0-rank-{rank}").exists() for rank in (0, 1)), number)
    time.sleep(1)
    (host0, tasks0, local0, address0, port0), (host1, *others) = [
        (run_dir / f"start-0-rank-{rank}").read_text().split() for rank in (0, 1)
    ]
    assert host0 != host1
    assert others == [tasks0, local0, address0, port0] == ["2", "0", address0, str(20000 + int(number) % 20000)]
    assert re.fullmatch(r"[\d.]+", address0)

    tell(number)
    wait(lambda: state(number)["Restarts"] == "1" and state(number)["JobState"] == "PENDING", number)
    assert all((run_dir / f"closed-0-rank-{rank}").exists() for rank in (0, 1))
    wait(lambda: state(number)["JobState"] == "COMPLETED", number)
    assert (run_dir / "start-1-rank-1").exists()
    assert (run_dir / "result.json").exists()
    assert "rank 1 of start 1" in (run_dir / "logs" / f"slurm-{number}-1.log").read_text()

    again = start(run_dir, "train")
    wait(lambda: state(again)["JobState"] == "COMPLETED", again)
    assert "finished" in (run_dir / "logs" / f"slurm-{again}.log").read_text()


@pytest.mark.slurm
def test_a_spare_node_replaces_one_that_fails_its_health_check(run_dir: Path) -> None:
    """The Python of the job is a stand-in that fails on the first node, as on a machine with a broken disk."""
    python = run_dir / "python"
    python.write_text(f'#!/usr/bin/env bash\n[[ "$3 $SLURMD_NODENAME" != "node n1" ]] || exit 1\nexec {PYTHON} "$@"\n')
    python.chmod(0o755)
    number = start(run_dir, "finish", spares=1, health_check=True, python=str(python))
    wait(lambda: state(number)["JobState"] in ("COMPLETED", "FAILED"), number)
    log = (run_dir / "logs" / f"slurm-{number}.log").read_text()
    assert "health check: n1: did not answer in time" in log
    assert "nodes n2,n3 passed the health check; failing: n1" in log
    assert state(number)["JobState"] == "COMPLETED", log
    lines = [(run_dir / f"start-0-rank-{rank}").read_text().split() for rank in (0, 1)]
    assert [line[0] for line in lines] == ["n2", "n3"]
    assert {(tasks, address) for _, tasks, _, address, _ in lines} == {("2", "127.0.1.2")}


@pytest.mark.slurm
def test_a_folder_whose_name_looks_like_a_pattern_is_one_folder(run_dir: Path) -> None:
    folder = run_dir / "50% of %j, 'a' \"b\" #1 $HOME ü"
    folder.mkdir()
    number = start(folder, "finish")
    wait(lambda: state(number)["JobState"] == "COMPLETED", number)
    assert [path.name for path in run_dir.iterdir()] == [folder.name]
    logs = {f"slurm-{number}.log", *(f"slurm-{number}-{rank}.log" for rank in (0, 1))}
    assert logs <= {path.name for path in (folder / "logs").iterdir()}


@pytest.mark.slurm
def test_a_stop_without_progress_is_not_requeued_for_ever(run_dir: Path) -> None:
    number = start(run_dir, "stuck", max_restarts=0)
    wait(lambda: all((run_dir / f"start-0-rank-{rank}").exists() for rank in (0, 1)), number)
    time.sleep(1)
    tell(number)
    wait(lambda: state(number)["JobState"] == "FAILED", number)
    assert "saved and stopped; failure 1 in a row without" in (run_dir / "logs" / f"slurm-{number}.log").read_text()


@pytest.mark.slurm
def test_no_requeue_stops_with_75(run_dir: Path) -> None:
    number = start(run_dir, "train", requeue=False)
    wait(lambda: all((run_dir / f"start-0-rank-{rank}").exists() for rank in (0, 1)), number)
    time.sleep(1)
    tell(number)
    wait(lambda: state(number)["JobState"] == "FAILED", number)
    assert state(number)["ExitCode"] == "75:0"


@pytest.mark.slurm
def test_the_tasks_of_an_array_continue_one_run(run_dir: Path, cluster: Cluster) -> None:
    number = start(run_dir, "train", requeue=False, extra=("--array=1-2%1",))
    wait(lambda: all((run_dir / f"start-0-rank-{rank}").exists() for rank in (0, 1)), number)
    time.sleep(1)
    tell(f"{number}_1")

    def states() -> list[str]:
        return re.findall(r"JobState=(\w+)", cluster.call("scontrol", "show", "job", number, "-o"))

    wait(lambda: sorted(states()) == ["COMPLETED", "FAILED"], number)
    said = "".join(path.read_text() for path in (run_dir / "logs").glob("slurm-[0-9]*.log"))
    assert "saved and stopped; submit the same command again to resume" in said
    assert f"from {run_dir}/checkpoints/step-00000001\n" in said


@pytest.mark.slurm
def test_wrong_use_ends_the_job(run_dir: Path) -> None:
    number = start(run_dir, "refuse")
    wait(lambda: state(number)["JobState"] == "FAILED", number)
    assert (state(number)["Requeue"], state(number)["Restarts"], state(number)["ExitCode"]) == ("1", "0", "2:0")
    assert "exit code 2; a restart cannot help" in (run_dir / "logs" / f"slurm-{number}.log").read_text()


@pytest.mark.slurm
def test_a_node_whose_rank_is_killed_twice_is_excluded(run_dir: Path, cluster: Cluster) -> None:
    """The ranks fail on one node. After two failures the job leaves it, and finishes."""
    (run_dir / "bad-node").write_text("n2")
    number = start(run_dir, "bad-node")

    def finished() -> bool:
        values = state(number)
        start = values["StartTime"]  # Unknown until SLURM has planned it.
        if start[0].isdigit() and datetime.fromisoformat(start) > datetime.now() + timedelta(seconds=30):
            # Skip the back-off, but give the script of the last start the time to end.
            cluster.call("scontrol", "update", f"JobId={number}", "StartTime=now+5")
        return values["JobState"] == "COMPLETED"

    wait(finished, number)
    assert (state(number)["ExcNodeList"], state(number)["NodeList"]) == ("n2", "n[1,3]")
    records = [json.loads(line) for line in (run_dir / RESTARTS_FILE).read_text().splitlines()]
    ends = [(record["failed"], record["exclude"]) for record in records if record["event"] == "end"]
    assert ends == [(["n2"], "-"), (["n2"], "n2")]
