"""Start ``mmscale`` on several ranks: on this machine as child processes, or on a cluster through SLURM.

The launchers depend on the command line, its exit codes and the files of a run folder, but not on models, data or the
engine.
"""

EXIT_FINISHED = 0
EXIT_WRONG_USE = 2
"""The configuration or the command line is wrong, or this machine cannot serve it. The same command fails again."""
EXIT_STOPPED = 75
"""The run saved and stopped, on a signal or before the deadline. The same command resumes it. (EX_TEMPFAIL.)"""
EXIT_HUNG = 76
"""The watchdog of a rank ended a run that hung."""

RESULT_FILE = "result.json"
"""The result file of a run folder. A run that ended with exit code 0 has one."""
STOP_FILE = "logs/stop-requested"
"""Marker in a run folder: the user stopped the run, so no job of it starts or is requeued. A submission removes it."""
STARTS_FILE = "starts/starts.jsonl"
"""A line for each start of a run that has the lock of the run folder."""
VERDICT_FILE = "heartbeats/verdict.json"
"""Written by the watchdog that ends a run: ``silent_nodes`` are the nodes with ranks that did not run."""
