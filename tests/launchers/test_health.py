"""The health check of nodes: the decision, the check on this machine, and the script with stand-ins for SLURM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launchers import STOP_FILE
from launchers.health import NodeHealth, check_node, clock_problem, failing_nodes, read_reports
from launchers.restarts import STRIKES, End
from launchers.slurm import Job, JobError, render

REPO = Path(__file__).resolve().parents[2]


def report(node: str, speed: float = 100.0, *problems: str) -> NodeHealth:
    return NodeHealth(node, problems, speed, (1 << 33,), 1e9, 0.1)


def test_failing_nodes_are_named_with_their_reasons() -> None:
    nodes = ["n1", "n2", "n3", "n4", "n5"]
    reports = [report("n1"), report("n2", 49.0), report("n3", 51.0), report("n4", 100.0, "no space", "its clock")]
    assert failing_nodes(nodes, {each.node: each for each in reports}) == {
        "n2": "its slowest device multiplies matrices at 49% of the median speed",
        "n4": "no space; its clock",
        "n5": "did not answer in time",
    }
    assert failing_nodes(["a", "b"], {"a": report("a", 10.0), "b": report("b", 30.0)}).keys() == {"a"}
    assert failing_nodes(["a"], {"a": report("a", 1.0)}) == {}


@pytest.mark.parametrize(("seconds", "fails"), [(-5.1, True), (-4.9, False), (0, False), (299, False), (301, True)])
def test_a_clock_may_be_ahead_by_the_time_of_the_start(seconds: float, fails: bool) -> None:
    assert (clock_problem(seconds) is not None) == fails


def test_this_machine_is_healthy_and_the_faults_of_another_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = check_node("n1", tmp_path, time.time())
    assert found.problems == ()
    assert found.matmul_flops > 1e7
    assert found.storage_bytes_per_second > 0
    assert [*tmp_path.iterdir()] == []
    monkeypatch.setattr("launchers.health.os.urandom", lambda size: bytearray(size))
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"other")
    damaged = check_node("n1", tmp_path / "gone", time.time() + 60)
    assert [problem.split(": ")[-1] for problem in damaged.problems] == [
        "its clock is 60 s behind that of the first node",
        ["cannot be written and read", "No such file or directory"][-1],
    ]
    assert "the bytes read differ from those written" in check_node("n1", tmp_path, time.time()).problems[0]


def test_damaged_files_count_as_no_answer(tmp_path: Path) -> None:
    good = report("n1")
    texts = {"n1": json.dumps(asdict(good)), "n2": "{}", "n3": "[", "n4": json.dumps({**asdict(good), "problems": 3})}
    texts["n5"] = json.dumps(asdict(replace(good, matmul_flops=float("nan"))))
    for name, text in texts.items():
        (tmp_path / f"{name}.json").write_text(text)
    assert read_reports(tmp_path, [*texts, "n6"]) == {"n1": good}


def test_a_node_that_fails_the_check_is_excluded_at_once() -> None:
    reason, failed = End(1, unhealthy=["n2"]).cause()
    assert reason == "n2 failed the health check"
    assert failed.count("n2") == STRIKES


def script(
    tmp_path: Path, bad: str, spares: int, *, requeue: bool = True, during: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the script of a job of two nodes. ``srun`` writes a report for each node, with a problem for each in ``bad``.

    ``during`` is a shell command that ``srun`` runs after the check.
    """
    names = [f"n{number}" for number in range(1, 3 + spares)]
    for name in names:
        text = json.dumps(asdict(report(name, 100.0, *(["broken"] if name in bad.split() else []))))
        (tmp_path / f"{name}.report").write_text(text)
    tools = tmp_path / "tools"
    tools.mkdir()
    copies = "; ".join(f'cp {tmp_path}/{name}.report "$run_health/{name}.json"' for name in names)
    (tools / "srun").write_text(
        "#!/usr/bin/env bash\n"
        f"echo \"$MASTER_ADDR ${{*//$'\\n'/ }}\" >>{tmp_path}/srun.log\n"
        f'[[ "$*" == *launchers.health* ]] || {{ echo "{{}}" >{tmp_path}/result.json; exit 0; }}\n'
        f"run_health={tmp_path}/health/7-0\n{copies}\n{during}\n"
    )
    (tools / "scontrol").write_text(
        "#!/usr/bin/env bash\n"
        f"case \"$*\" in *hostnames*) printf '%s\\n' {' '.join(names)};;\n"
        '"show node -o n"?) echo "NodeName=x NodeAddr=addr-${*: -1} State=IDLE";;\n'
        '"show job"*) echo "JobId=7 Partition=p ExcNodeList=(null)";;\n'
        '"show partition"*) echo "PartitionName=p TotalNodes=9";;\n'
        f'requeue*|update*) echo "$@" >>{tmp_path}/scontrol.log;; esac\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    (tmp_path / "logs").mkdir()
    job = Job(("train",), tmp_path, nodes=2, spares=spares, health_check=True, ranks_per_node=3, requeue=requeue)
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-9]", "PYTHONPATH": str(REPO)}
    return subprocess.run(
        ["bash", "-c", render(job)],
        env={**os.environ, **variables, "PATH": f"{tools}:{os.environ['PATH']}"},
        text=True,
        capture_output=True,
        check=False,
        timeout=60,
    )


def test_a_spare_replaces_a_failing_node(tmp_path: Path) -> None:
    done = script(tmp_path, "n1", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "health check: n1: broken" in done.stderr
    assert "nodes n2,n3 passed the health check; failing: n1" in done.stdout
    check, ranks = (tmp_path / "srun.log").read_text().splitlines()
    assert "--nodes=3 --ntasks=3 --ntasks-per-node=1" in check
    assert ranks.startswith("addr-n2 ")
    assert "--nodes=2 --ntasks=6 --nodelist=n2,n3" in ranks
    assert not (tmp_path / "scontrol.log").exists()


def test_without_a_spare_the_job_is_requeued_without_the_node(tmp_path: Path) -> None:
    done = script(tmp_path, "n2", 0)
    assert done.returncode == 75, done.stdout + done.stderr
    assert "n2 failed the health check; requeued" in done.stdout
    assert len((tmp_path / "srun.log").read_text().splitlines()) == 1, "no rank was started"
    changes = (tmp_path / "scontrol.log").read_text().splitlines()
    assert changes == ["requeue 7", "update JobId=7 StartTime=now+120 ExcNodeList=n2"]


def test_without_requeue_the_job_ends_with_the_name(tmp_path: Path) -> None:
    done = script(tmp_path, "n2", 0, requeue=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "fewer than 2 nodes passed the health check; failing: n2" in done.stdout


def test_if_all_nodes_fail_none_is_blamed(tmp_path: Path) -> None:
    """The cause is common to them, and other nodes would fail in the same way."""
    done = script(tmp_path, "n1 n2", 0)
    assert done.returncode == 75, done.stdout + done.stderr
    assert "n1, n2 failed the health check; requeued (restart 1 of 3" in done.stdout
    assert (tmp_path / "scontrol.log").read_text().splitlines() == ["requeue 7", "update JobId=7 StartTime=now+120"]


def test_a_check_without_answers_says_where_to_look(tmp_path: Path) -> None:
    done = script(tmp_path, "", 0, during='rm "$run_health"/*')
    assert done.returncode == 75, done.stdout + done.stderr
    assert "health check: no node answered; the logs slurm-JOB-health-TASK.log say why\n" in done.stderr


def test_a_stop_during_the_check_ends_the_job(tmp_path: Path) -> None:
    done = script(tmp_path, "n1 n2", 0, during=f"touch {tmp_path / STOP_FILE}")
    assert done.returncode == 75, done.stdout + done.stderr
    assert "mmscale launch stop ended this run" in done.stdout
    assert not (tmp_path / "scontrol.log").exists()
    assert len((tmp_path / "srun.log").read_text().splitlines()) == 1, "no rank was started"


def test_signals_for_the_ranks_do_not_end_the_check(tmp_path: Path) -> None:
    code = (
        "import os\nfrom launchers import health\n"
        "def check(node, folder, clock):\n"
        f"    for number in ({signal.SIGUSR1:d}, {signal.SIGTERM:d}):\n        os.kill(os.getpid(), number)\n"
        "    return health.NodeHealth(node, (), 1.0, (1,), 1.0, 0.0)\n"
        "health.check_node = check\nhealth.main()"
    )
    words = [sys.executable, "-c", code, "node", str(tmp_path), "--clock", "0"]
    subprocess.run(words, env={**os.environ, "SLURMD_NODENAME": "n1", "PYTHONPATH": str(REPO)}, check=True, timeout=60)
    assert read_reports(tmp_path, ["n1"]).keys() == {"n1"}


def test_spares_ask_for_more_nodes_and_need_the_check(tmp_path: Path) -> None:
    assert "--nodes=5" in Job(("train",), tmp_path, nodes=3, spares=2, health_check=True).directives()
    with pytest.raises(JobError, match="--spares 1: expected 0 or more, and the health check on"):
        Job(("train",), tmp_path, spares=1, python=sys.executable)
