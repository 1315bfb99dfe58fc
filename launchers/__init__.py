"""Starts ``mmscale`` on several ranks: on this machine as child processes, on a cluster through SLURM.

Knows the command line it runs, its exit codes and the files of a run folder; no model, no data, no engine.
"""

EXIT_FINISHED = 0
EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: saved on a signal or at the deadline and left; the same command goes on from there."""
EXIT_HUNG = 76
"""The watchdog of a rank ended a run in which nothing moved any more."""

RESULT_FILE = "result.json"
"""Written last into a run folder; a run that ended with exit code 0 has one."""
