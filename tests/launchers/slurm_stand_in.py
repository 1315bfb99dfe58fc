"""Replaces one rank under ``srun``: saves and stops on a signal, and finishes if it finds a checkpoint."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

folder, mode = Path(sys.argv[1]), sys.argv[2]
rank, start = os.environ["SLURM_PROCID"], os.environ.get("SLURM_RESTART_COUNT", "0")
stopped: list[int] = []
signal.signal(signal.SIGUSR1, lambda number, _frame: stopped.append(number))
names = ("SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "MASTER_ADDR", "MASTER_PORT")
(folder / f"start-{start}-rank-{rank}").write_text(
    " ".join([os.environ["SLURMD_NODENAME"], *(os.environ[name] for name in names)])
)
print(f"rank {rank} of start {start}", flush=True)

checkpoint = folder / "checkpoints" / "step-00000001"
if mode == "refuse":
    sys.exit(2)
if mode == "bad-node" and os.environ["SLURMD_NODENAME"] == (folder / "bad-node").read_text():
    os.kill(os.getpid(), signal.SIGKILL)
if checkpoint.exists() or mode == "finish" or (mode == "bad-node" and start == "2"):
    if rank == "0":
        (folder / "result.json").write_text("{}")
    sys.exit(0)
while not stopped:
    time.sleep(0.1)
if rank == "0" and mode != "stuck":
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
time.sleep(int(rank) * 2)  # Rank N takes 2 N seconds to close. The exit of the first rank must not kill the others.
(folder / f"closed-{start}-rank-{rank}").touch()
sys.exit(75)
