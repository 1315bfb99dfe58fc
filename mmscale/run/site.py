"""The site file: how a cluster wants its jobs. One file serves all runs of a cluster.

The file is given by ``--site``, the variable ``MMSCALE_SITE``, or ``~/.config/mmscale/site.yaml``, in this order.
``launchers.slurm`` renders and checks the job. This module only reads the file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from data_pipeline.io.strict import StrictConfig
from mmscale.config import load_tree
from mmscale.config.layers import read_layers
from mmscale.config.tree import ConfigNode, display
from mmscale.errors import ConfigError

SITE_VARIABLE = "MMSCALE_SITE"
"""Environment variable with the path of the site file."""
_HOME_FILE = Path(".config/mmscale/site.yaml")


def _as_text(value: Any) -> Any:
    """Return a number as text: YAML reads ``time: 60`` and ``OMP_PLACES: 1`` as numbers."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


_Text = Annotated[str, BeforeValidator(_as_text), Field(min_length=1)]
_Value = Annotated[str, BeforeValidator(_as_text)]


class ContainerConfig(StrictConfig):
    """The container in which each rank runs. The batch script runs outside of it."""

    kind: Literal["pyxis", "apptainer"]
    """``pyxis``: the options ``--container-*`` of srun. ``apptainer``: the command ``apptainer exec``."""
    image: _Text
    """A file that all nodes can read, or a URI such as ``docker://nvcr.io#nvidia/pytorch:25.01-py3``."""
    mounts: tuple[_Text, ...] = ()
    """Folders of the machine to mount, each ``SOURCE``, ``SOURCE:TARGET`` or ``SOURCE:TARGET:FLAGS``. The run folder
    and the current folder are always mounted."""
    python: _Text = "python"
    """Python interpreter in the image that has mmscale installed."""
    options: tuple[_Text, ...] = ()
    """Further options of srun (Pyxis) or of ``apptainer exec``, for example ``--no-container-mount-home``."""


class SiteConfig(StrictConfig):
    """The options of ``mmscale launch slurm`` that are the same for all runs of a cluster.

    An option of the command line replaces the value of the file, and adds to its lists.
    """

    partition: _Text | None = None
    """SLURM partition; null for the default one."""
    account: _Text | None = None
    """Account to charge; null for the user's default."""
    qos: _Text | None = None
    """Quality of service; null for the default one."""
    constraint: _Text | None = None
    """Features that the nodes must have, for example ``h100``."""
    time: _Text | None = None
    """Time limit of each start in SLURM's notation, for example ``12:00:00``; null for the partition's default."""
    gpus_per_node: int | None = Field(default=None, ge=0, le=1024)
    """GPUs per machine, with one rank each; 0 or null trains on CPUs."""
    ranks_per_node: int | None = Field(default=None, ge=1, le=4096)
    """Ranks per machine in a CPU run; null for one."""
    cpus_per_task: int | None = Field(default=None, ge=1, le=4096)
    """CPU cores per rank, including its loader workers; null for the cluster's default."""
    requeue: bool | None = None
    """Whether the job requeues itself. Set it to false for a site that forbids this, and submit with ``--chain``."""
    health_check: bool | None = None
    """Whether to check the machines before training; null: yes, except for one machine with at most one GPU."""
    max_restarts: int | None = Field(default=None, ge=0, le=1000)
    """Most restarts in a row without a newer checkpoint; null for 3."""
    restart_delay_seconds: int | None = Field(default=None, ge=0, le=86400)
    """Delay in seconds of the first of these restarts; null for 120. It doubles with each one, up to an hour."""
    save_seconds: int | None = Field(default=None, ge=1, le=86400)
    """Seconds before the time limit at which the ranks save and stop; null for 180."""
    sbatch: tuple[_Text, ...] = ()
    """Further options of sbatch, one per item, for example ``--exclusive``."""
    modules: tuple[_Text, ...] = ()
    """Environment modules to load. The job ends if one cannot be loaded."""
    setup: tuple[_Text, ...] = ()
    """Shell lines that run on the first node before the ranks start."""
    environment: dict[str, _Value] = Field(default_factory=dict)
    """Environment variables of the ranks."""
    container: ContainerConfig | None = None
    """The container of the ranks; null to run them on the machine."""


@dataclass(frozen=True)
class Site:
    """A site file that was read: its values, and its lines."""

    value: SiteConfig
    _tree: ConfigNode | None

    def origin(self, key: str) -> str | None:
        """Return ``FILE:LINE KEY=VALUE`` for a key of the file, such as ``sbatch.0``; None if the file lacks it."""
        node = self._tree
        for word in key.split("."):
            node = None if node is None else node.child(word)
        if node is None or isinstance(node.value, dict | list):
            return None
        return f"{node.origin} {key}={display(node.value)}:"


def load_site(path: Path | None) -> Site:
    """Read the site file: ``path``, the one of ``MMSCALE_SITE``, or that of the home folder. It may be absent.

    Raises:
        ConfigError: the named file is missing, or a file is invalid; lists all errors, each with file, line, key and
            value.
    """
    named = os.environ.get(SITE_VARIABLE)
    if path is None and named:
        path = Path(named)
        if not path.is_file():
            raise ConfigError(f"{SITE_VARIABLE}={named}: no such file")
    if path is None and (home := Path.home() / _HOME_FILE).is_file():
        path = home
    if path is None:
        return Site(SiteConfig(), None)
    tree = read_layers(path)
    return Site(load_tree(tree, SiteConfig, str(path)).value, tree)
