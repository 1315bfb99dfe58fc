"""A lock on a folder: only one process at a time writes there, even if several machines share the folder.

    FOLDER/lock/kernel            a POSIX lock; the kernel releases it when the holder's process ends
    FOLDER/lock/claim-00000003    the record of the holder, which renews its modification time every 2 seconds

The newest claim belongs to the holder. A process acquires the lock by creating the next claim; the file system lets
only one process create it. A process tries this only if there is no claim, or if the last holder is known to be dead:

* The holder ran on this machine, and the kernel has released its lock.
* The holder was an earlier start of the same SLURM job; SLURM runs one instance of a job at a time.
* The claim was not renewed for 60 seconds while this process watched it. This rule compares no clocks of two machines,
  and does not need a file system that shares locks between machines.

A holder that was suspended for more than 60 seconds may find a newer claim, or its own claim missing. It then ends its
process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shlex
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, ValidationError

from data_pipeline.io.strict import StrictConfig
from data_pipeline.io.untrusted import open_regular, read_bytes, regular_descriptor
from mmscale.errors import LaunchError

BEAT_SECONDS = 2.0
EXPIRY_SECONDS = 60.0
"""A claim that is not renewed for this long belongs to a dead process. This does not apply to a claim of this machine
while another process holds the POSIX lock."""
DYING_SECONDS = 10.0
"""Longest time that a killed process of this machine needs to end: the kernel first frees its memory."""
POLL_SECONDS = 0.25
_CLAIM = re.compile(r"claim-(\d{8})")
_MAX_BYTES = 1 << 16
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of a file system without POSIX locks, for example Lustre mounted without ``flock``."""
_held: set[Path] = set()
"""Folders that this process holds. POSIX locks do not exclude a second lock of the same process."""


class Holder(StrictConfig):
    """The record of a claim.

    Attributes:
        machine: Boot id of the kernel; all containers of one machine have the same one.
        kernel_lock: Whether the holder also held the POSIX lock.
        slurm_job: Cluster and job id; empty outside SLURM.
        slurm_restart: Number of this start of the job, from 0.
    """

    host: str = Field(max_length=300)
    pid: int
    started: str = Field(max_length=300)
    command: str = Field(max_length=300)
    machine: str
    kernel_lock: bool
    slurm_job: str
    slurm_restart: int

    @classmethod
    def of_this_process(cls, kernel_lock: bool) -> Holder:
        """Return the record of this process."""
        job, restart = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            command=shlex.join(sys.argv)[:300],
            machine=_boot_id(),
            kernel_lock=kernel_lock,
            slurm_job=f"{os.environ.get('SLURM_CLUSTER_NAME', '')}/{job}" if job else "",
            slurm_restart=int(restart) if restart.isdigit() else 0,
        )

    @classmethod
    def parse(cls, text: bytes) -> Holder | None:
        """Parse the text of a claim file; return None if it is damaged or not written yet."""
        try:
            return cls.model_validate_json(text)
        except ValidationError:
            return None


class _Claim(NamedTuple):
    number: int
    modified_ns: int
    holder: Holder | None


_NO_CLAIM = _Claim(0, 0, None)


class FolderLock:
    """The lock of one folder. Call ``attempt`` until it returns None, and ``release`` in any case.

    Args:
        folder: Folder to lock; ``attempt`` creates it if it is missing. ``release`` removes a folder that did not exist
            before, if it contains only the lock and the file system has POSIX locks.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, folder / "lock"
        self._is_new = not folder.exists()
        self._handle: int | None = None
        self._watched: tuple[_Claim, float] | None = None
        self._number, self._record = 0, b""
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="folder-lock", daemon=True)

    def attempt(self) -> str | None:
        """Acquire the lock if it is free. While it returns a sentence, call it again after ``POLL_SECONDS``.

        Returns:
            None if this process now holds the lock. Otherwise a sentence about the holder, which may be dead.

        Raises:
            LaunchError: a running process holds the lock, or this process already holds it.
            OSError: the folder cannot be written.
        """
        if self._folder.resolve() in _held:
            raise LaunchError(f"{self._folder}: this process already holds the lock of the folder")
        kernel = self._lock_kernel()
        claim = self._newest()
        is_free = not claim.number and kernel is not False
        if (is_free or _is_dead(claim.holder, kernel)) and self._create(claim.number + 1, kernel):
            return None
        watched, since = self._watched = self._watched or (claim, time.monotonic())
        seconds = time.monotonic() - since
        is_here = kernel is False and (claim.holder is None or claim.holder.machine == _boot_id())
        if (claim.number and claim[:2] != watched[:2]) or (is_here and seconds > DYING_SECONDS):
            raise LaunchError(_in_use(self._folder, claim.holder))
        if not is_here and seconds > EXPIRY_SECONDS and self._create(claim.number + 1, kernel):
            return None
        return (
            f"{self._folder}: waiting up to {EXPIRY_SECONDS:.0f} s for a heartbeat of {describe_holder(claim.holder)}, "
            "which holds the lock of this folder or ended without releasing it"
        )

    def release(self) -> None:
        """Release the lock. Idempotent, and allowed if the lock was never acquired."""
        self._released.set()
        if self._number:
            self._thread.join(BEAT_SECONDS)
            with suppress(OSError):
                self._path(self._number).unlink()
                is_sure = (holder := Holder.parse(self._record)) is not None and holder.kernel_lock
                if self._is_new and is_sure and os.listdir(self._folder) == [self._lock.name]:
                    (self._lock / "kernel").unlink()
                    self._lock.rmdir()
                    self._folder.rmdir()
            _held.discard(self._folder.resolve())
            self._number = 0
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _lock_kernel(self) -> bool | None:
        """Try to acquire the POSIX lock. Return whether this process holds it; None if the file system has none."""
        path = self._lock / "kernel"
        while True:
            self._lock.mkdir(parents=True, exist_ok=True)
            try:
                self._handle = self._handle or regular_descriptor(path, os.O_RDWR | os.O_CREAT)
                if (has_lock := _lock_file(self._handle)) is not True:
                    return has_lock
                if os.path.samestat(os.fstat(self._handle), path.stat()):
                    return True
            except FileNotFoundError:  # The last holder removed its new, empty folder.
                pass
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None

    def _newest(self) -> _Claim:
        try:
            names = os.listdir(self._lock)
            number = max((int(match[1]) for name in names if (match := _CLAIM.fullmatch(name))), default=0)
            if not number:
                return _NO_CLAIM
            # Open the file: NFS then fetches its attributes from the server. stat alone may return cached ones.
            with open_regular(self._path(number)) as file:
                return _Claim(number, os.fstat(file.fileno()).st_mtime_ns, Holder.parse(file.read(_MAX_BYTES)))
        except FileNotFoundError:  # The holder has just released the lock.
            return _NO_CLAIM

    def _create(self, number: int, kernel: bool | None) -> bool:
        """Create a claim and start to renew it. Return False if another process was faster."""
        path, record = self._path(number), Holder.of_this_process(kernel is True).model_dump_json(indent=1).encode()
        try:
            with path.open("xb") as file:
                file.write(record)
        except FileExistsError:
            return False
        except OSError:
            path.unlink(missing_ok=True)
            raise
        claims = [(int(match[1]), name) for name in os.listdir(self._lock) if (match := _CLAIM.fullmatch(name))]
        if max(claims)[0] > number:
            path.unlink(missing_ok=True)
            return False
        for other, name in claims:
            if other < number:
                (self._lock / name).unlink(missing_ok=True)
        self._number, self._record = number, record
        _held.add(self._folder.resolve())
        self._thread.start()
        return True

    def _path(self, number: int) -> Path:
        return self._lock / f"claim-{number:08d}"

    def _beat(self) -> None:
        path = self._path(self._number)
        while not self._released.wait(BEAT_SECONDS):
            try:
                is_lost = read_bytes(path) != self._record or self._newest().number > self._number
                if not is_lost:
                    os.utime(path)
            except FileNotFoundError:
                is_lost = True
            except OSError:  # The file server may be unavailable for a moment.
                continue
            if is_lost and not self._released.is_set():
                print(
                    f"mmscale: {self._folder}: another process acquired or removed the lock of this folder while this "
                    "process held it; this process ends now and writes nothing more",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)


@dataclass(frozen=True)
class HeldLock:
    """A lock that a process holds, or held when its machine failed.

    Attributes:
        holder: The record of the claim; None if it cannot be read.
        is_here: Whether the holder runs on this machine. It then lives: the kernel releases the lock of a dead process.
        pid: Process of the holder on this machine, as the kernel knows it. None on another machine, in a container
            with its own process numbers, or if it is unknown.
        claim: Number and modification time of the claim, which a living holder renews every ``BEAT_SECONDS``.
    """

    holder: Holder | None
    is_here: bool
    pid: int | None
    claim: tuple[int, int]


def held_lock(folder: Path) -> HeldLock | None:
    """Return the lock of a folder if it is held; None if the folder is free. Changes nothing.

    A claim of another machine counts as held, because only watching it shows whether its holder lives.
    """
    if folder.resolve() in _held:  # Closing the file below would release this process's own lock.
        return HeldLock(Holder.of_this_process(True), True, os.getpid(), (0, 0))
    lock = FolderLock(folder)
    try:
        claim = lock._newest()
        handle = regular_descriptor(folder / "lock" / "kernel", os.O_RDWR)
    except OSError:
        return None
    try:
        kernel = _lock_file(handle)  # Closing the file releases the lock at once.
        pid = _pid_of_lock(handle) if kernel is False else None
    finally:
        os.close(handle)
    if (not claim.number and kernel is not False) or _is_dead(claim.holder, kernel):
        return None
    is_here = kernel is False and (claim.holder is None or claim.holder.machine == _boot_id())
    return HeldLock(claim.holder, is_here, pid if is_here else None, claim[:2])


def holder_of(folder: Path) -> str | None:
    """Return a sentence about the process that holds the lock of a folder; None if it is free. See ``held_lock``."""
    if folder.resolve() in _held:
        return f"{folder}: this process holds the lock of the folder"
    held = held_lock(folder)
    return None if held is None else _in_use(folder, held.holder)


def _pid_of_lock(handle: int) -> int | None:
    """Return the process that holds the POSIX lock of a file; None if it is unknown (Linux only)."""
    if sys.platform != "linux":
        return None
    layout = "hhlli"  # struct flock: type, whence, start, length, pid.
    try:
        found = fcntl.fcntl(handle, fcntl.F_GETLK, struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError:
        return None
    kind, *_, pid = struct.unpack(layout, found)
    return pid if kind != fcntl.F_UNLCK and pid > 0 else None


def _lock_file(handle: int) -> bool | None:
    """Acquire the POSIX lock of a file. Return False if another process has it, None if the file system has none."""
    try:
        # Not flock: forked children inherit it, so a worker that outlives a killed holder would keep the lock.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def _is_dead(holder: Holder | None, kernel: bool | None) -> bool:
    """Whether the process of a claim is known to be dead.

    Args:
        holder: Record of the claim; None if it cannot be read.
        kernel: Whether this process holds the POSIX lock; None if the file system has none.
    """
    if holder is None:
        return False
    if kernel and holder.kernel_lock and holder.machine == _boot_id():
        return True
    mine = Holder.of_this_process(kernel is True)
    return bool(mine.slurm_job) and mine.slurm_job == holder.slurm_job and mine.slurm_restart > holder.slurm_restart


def describe_holder(holder: Holder | None) -> str:
    """Return the process, machine, job and command of a holder as text for a person."""
    if holder is None:
        return "an unknown process"
    job = f", SLURM job {holder.slurm_job.rpartition('/')[2]}" if holder.slurm_job else ""
    text = f"process {holder.pid} on {holder.host}{job}, started {holder.started} ({holder.command})"
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _in_use(folder: Path, holder: Holder | None) -> str:
    stop = f" (kill {holder.pid} there)" if holder else ""
    return (
        f"{folder}: in use by {describe_holder(holder)}. Wait until that process ends, or stop it{stop}, or give "
        "another folder (run_dir=...); nothing in the folder was changed"
    )


def _boot_id() -> str:
    """Return the boot id of the running kernel, or the host name if the kernel has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
