"""Run the ranks of a SLURM job in a container, with Pyxis or Apptainer.

    pyxis       srun --container-image=IMAGE ... bash -c RANK rank python -m mmscale.cli.main ...
    apptainer   srun ... bash -c RANK rank apptainer exec ... IMAGE python -m mmscale.cli.main ...

Only the ranks run in the container. The batch script runs on the first node, because it needs ``srun`` and
``scontrol``. On sbatch, Pyxis options would put the script itself into the container.

Source: Pyxis' README (options of srun), Apptainer's user guide (``exec``, ``--nv``, ``APPTAINERENV_``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_URI = re.compile(r"[a-z][a-z0-9+.-]*://")
_DROPS_VARIABLES = ("-e", "--cleanenv", "-C", "--containall")
"""Options of Apptainer that remove the SLURM variables, from which a rank reads its number."""


@dataclass(frozen=True)
class Container:
    """The container of each rank.

    Attributes:
        kind: The program that starts it.
        image: A file, or a URI such as ``docker://nvcr.io#nvidia/pytorch:25.01-py3``.
        mounts: Folders of the machine in the container, each ``SOURCE``, ``SOURCE:TARGET`` or ``SOURCE:TARGET:FLAGS``.
        python: Python interpreter in the container that has mmscale.
        options: Further options of srun (Pyxis) or of ``apptainer exec``.
    """

    kind: Literal["pyxis", "apptainer"]
    image: str
    mounts: tuple[str, ...] = ()
    python: str = "python"
    options: tuple[str, ...] = ()

    @property
    def image_file(self) -> Path | None:
        """Path of the image; None if it is fetched from a registry."""
        if _URI.match(self.image):
            return None
        # Pyxis reads a word without a slash at its beginning as a name of a registry, except for a .sqsh file.
        is_path = self.kind == "apptainer" or self.image.startswith(("/", ".")) or self.image.endswith(".sqsh")
        return Path(self.image) if is_path else None

    def texts(self) -> list[tuple[str, str]]:
        """Return (attribute, text) of all values that are written to the batch script."""
        lists = (("mounts", self.mounts), ("options", self.options))
        return [
            ("image", self.image),
            ("python", self.python),
            *((f"{name}.{number}", text) for name, texts in lists for number, text in enumerate(texts)),
        ]

    def problems(self) -> list[tuple[str, str]]:
        """Return (attribute, sentence) for each value that cannot work on this machine."""
        found = []
        if (file := self.image_file) is not None and not file.exists():
            found.append(("image", f"{file}: no such file; give the path of an image, or a URI such as docker://..."))
        for number, mount in enumerate(self.mounts):
            source = Path(mount.partition(":")[0])
            if not source.is_absolute():
                found.append((f"mounts.{number}", f"{source}: a mount begins with an absolute path of the machine"))
            elif not source.exists():
                found.append((f"mounts.{number}", f"{source}: no such file or folder on this machine"))
        for number, option in enumerate(self.options):
            word = option.partition("=")[0]
            if not option.startswith("-"):
                found.append((f"options.{number}", f"{option}: expected an option, for example --writable-tmpfs"))
            elif self.kind == "apptainer" and word in _DROPS_VARIABLES:
                found.append(
                    (f"options.{number}", f"{option} removes the SLURM variables, so no rank would know its number")
                )
        return found

    def srun_options(self, folders: Iterable[Path], variables: Iterable[str]) -> list[str]:
        """Return the options of srun.

        Args:
            folders: Folders that each rank needs under the same path; the first one is the working folder.
            variables: Variables whose values must replace those of the image.
        """
        if self.kind != "pyxis":
            return []
        folders = list(folders)
        options = [f"--container-image={self.image}", f"--container-workdir={folders[0]}"]
        options.append(f"--container-mounts={','.join(self._all_mounts(folders))}")
        if names := ",".join(variables):
            options.append(f"--container-env={names}")
        return [*options, *self.options]

    def wrap(self, command: Sequence[str], folders: Iterable[Path], gpus: bool) -> list[str]:
        """Return the command of a rank; see ``srun_options``. ``gpus`` makes the GPUs visible to Apptainer."""
        if self.kind != "apptainer":
            return list(command)
        folders = list(folders)
        binds = [word for mount in self._all_mounts(folders) for word in ("--bind", mount)]
        nvidia = ["--nv"] if gpus and "--rocm" not in self.options and "--nvccli" not in self.options else []
        return ["apptainer", "exec", *nvidia, "--pwd", str(folders[0]), *binds, *self.options, self.image, *command]

    def exports(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Return the variables to export for a rank. Apptainer lets an image replace variables without its prefix."""
        if self.kind != "apptainer":
            return dict(environment)
        return {**environment, **{f"APPTAINERENV_{name}": value for name, value in environment.items()}}

    def _all_mounts(self, folders: Sequence[Path]) -> list[str]:
        """Return the mounts, and those of the needed folders that no mount contains."""
        targets = [Path((mount.split(":")[1:] or mount.split(":"))[0]) for mount in self.mounts]
        added: list[Path] = []
        for folder in folders:
            if not any(folder.is_relative_to(target) for target in [*targets, *added]):
                added.append(folder)
        return [*self.mounts, *(f"{folder}:{folder}" for folder in added)]
