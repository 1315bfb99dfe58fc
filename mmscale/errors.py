"""Errors of mmscale.

MMScaleError
├── ConfigError        a configuration value is unknown, wrong or contradicts another; names file and line
├── UnsupportedError   the request is legal but this machine or build cannot do it; says what to install or change
├── CheckpointError    a checkpoint is missing, damaged, or of another model
│   └── DamagedError   its files are there and can be read, but they are not what was written
├── EngineError        training cannot go on (non-finite loss, world size that does not fit, lost peer)
└── LaunchError        a run could not be started or submitted
    └── RequestError   the launcher's options cannot work

Whatever a user, a file or another process can cause is one of these and reaches the command line as one sentence and an
exit code: 1 the thing failed, 2 wrong use. The data side has its own tree (``data_pipeline.errors``).
"""

from __future__ import annotations


class MMScaleError(Exception):
    """Root of the tree."""

    exit_code = 1


class ConfigError(MMScaleError):
    """A configuration is wrong: file, line, key, what was seen, what would be right."""

    exit_code = 2


class UnsupportedError(MMScaleError):
    """A legal request that this machine or build cannot serve; the message says what to do."""

    exit_code = 2


class CheckpointError(MMScaleError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class DamagedError(CheckpointError):
    """The files of a checkpoint are not what was written; an older checkpoint may do."""


class EngineError(MMScaleError):
    """Training cannot go on."""


class LaunchError(MMScaleError):
    """A run could not be started or submitted."""


class RequestError(LaunchError):
    """The options of a launcher are wrong: which one, what was seen, what would be right."""

    exit_code = 2
