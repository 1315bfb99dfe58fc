"""Errors of mmscale.

MMScaleError
├── ConfigError        a configuration value is unknown, wrong or contradicts another
├── UnsupportedError   this machine or build cannot do what the configuration requests; names the remedy
├── CheckpointError    a checkpoint is missing, damaged, or of another model
│   └── DamagedError   the files of a checkpoint can be read, but differ from what was written
├── EngineError        training cannot continue (bad steps, out of memory, lost rank)
└── LaunchError        a run could not be started or submitted
    └── RequestError   the launcher's options are wrong

An error that a user, a file or another process can cause is one of these. The command line prints it as one sentence
and exits with code 1 for a failure, or 2 for wrong use. ``data_pipeline.errors`` has the errors of the data pipeline.
"""

from __future__ import annotations


class MMScaleError(Exception):
    """Root of the tree."""

    exit_code = 1


class ConfigError(MMScaleError):
    """A configuration is wrong. A validation error has file, line, key, the value found and the value expected."""

    exit_code = 2


class UnsupportedError(MMScaleError):
    """This machine or build cannot do what the configuration requests. The message names the remedy."""

    exit_code = 2


class CheckpointError(MMScaleError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class DamagedError(CheckpointError):
    """The files of a checkpoint differ from what was written. An older checkpoint may be usable."""


class EngineError(MMScaleError):
    """Training cannot continue."""


class LaunchError(MMScaleError):
    """A run could not be started or submitted."""


class RequestError(LaunchError):
    """An option of a launcher is wrong. The message has the option, the value found and the value expected."""

    exit_code = 2
