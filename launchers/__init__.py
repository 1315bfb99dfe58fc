"""Start ``mmscale`` on several ranks: on this machine as child processes, or on a cluster through SLURM.

The launchers depend on the command line, its exit codes and the files of a run folder, but not on models, data or the
engine.
"""

EXIT_FINISHED = 0
EXIT_STOPPED = 75
"""The run saved and stopped, on a signal or before the deadline. The same command resumes it. (EX_TEMPFAIL.)"""
EXIT_HUNG = 76
"""The watchdog of a rank ended a run that hung."""

RESULT_FILE = "result.json"
"""The result file of a run folder. A run that ended with exit code 0 has one."""
STOP_FILE = "logs/stop-requested"
"""Marker in a run folder: the user stopped the run, so no job of it starts or is requeued. A submission removes it."""
