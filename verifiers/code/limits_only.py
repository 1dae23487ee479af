"""The weaker way to run programs where there are no namespaces: limits, no rights, a system-call filter, Landlock.

Nothing here hides the host's processes, and without Landlock (Linux 5.13) not its files either. What a run leaves in
its directory is deleted, but a fork server that is killed leaves the directory itself; the next one sweeps it up.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from verifiers.code import kernel, landlock

_PREFIX = "groupzero-code-"
_STARTING_S = 60.0  # a directory this young may belong to a server that has not locked it yet
_FIRST_UID, _NUM_UIDS = 60_000, 5_000


def make_directory() -> str:
    """A directory for one fork server, with `tmp` and `program` in it; those of dead servers are deleted on the way."""
    _sweep()
    directory = tempfile.mkdtemp(prefix=_PREFIX)
    for name in ("tmp", "program"):
        os.mkdir(f"{directory}/{name}")
    return directory


def _sweep() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                is_own = os.fstat(fd).st_uid == os.geteuid() and path.stat().st_ctime < time.time() - _STARTING_S
                if is_own:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)


class Fence:
    """What holds for the programs of one fork server; `hold` and `enter` are called in the server and in its children."""

    def __init__(self, directory: str, readable: Sequence[str]) -> None:
        self._directory = directory
        self._readable = list(readable)
        self._abi = landlock.version()
        # Held as long as this process lives, so that nobody sweeps its directory away.
        self._lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._uid = _FIRST_UID + os.getpid() % _NUM_UIDS if os.geteuid() == 0 else None
        self.num_others = 0 if self._uid is not None else _num_threads_of(os.geteuid())
        if self._uid is not None:
            os.chmod(directory, 0o711)
            for name in ("tmp", "program"):
                os.chown(f"{directory}/{name}", self._uid, self._uid)

    def enter(self, may_write_work: bool) -> None:
        """In a forked child: become somebody with no rights, who sees (with Landlock) only what programs need.

        As root that is a user of its own, who keeps the right to read what root reads if Landlock narrows it down.
        """
        kept = 0
        if self._uid is not None:
            kernel.prctl(kernel.PR_SET_KEEPCAPS, 1)
            os.setgroups([])
            os.setresgid(self._uid, self._uid, self._uid)
            os.setresuid(self._uid, self._uid, self._uid)
            kept = 1 << kernel.CAP_DAC_READ_SEARCH if self._abi else 0
        kernel.drop_capabilities(kept)
        if self._abi:
            work = f"{self._directory}/program"
            writable = [f"{self._directory}/tmp", "/dev/null", *([work] if may_write_work else [])]
            readable = [*self._readable, work, "/dev/zero", "/dev/random", "/dev/urandom", "/proc/self"]
            landlock.restrict(readable, writable)


def is_full(directory: str, num_files: int, size_mb: int) -> bool:
    """Whether there is more than that in a directory; looked at now and then, where nothing else limits it."""
    count = size = 0
    for root, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.lstat(f"{root}/{name}").st_size
        count += len(names) + 1
        if count > num_files or size > size_mb * 2**20:
            return True
    return False


def _num_threads_of(uid: int) -> int:
    """How many threads this user has: what a limit on their number starts from, as the kernel counts them all."""
    count = 0
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == uid:
                count += len(os.listdir(f"{entry.path}/task"))
    return count
