"""The weaker way to run programs where there are no namespaces: limits, no rights, a system-call filter, Landlock.

Nothing here hides the host's processes, and without Landlock (Linux 5.13) not its files either. What a run leaves in
its directory is deleted, but a fork server that is killed leaves the directory itself; the next one sweeps it up.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from verifiers.code import kernel, landlock

_PREFIX = "groupzero-code-"
_STARTING_S = 60.0  # a directory this young may belong to a server that has not locked it yet
_FIRST_UID, _NUM_UIDS = 60_000, 5_000


def make_directory(packages: Sequence[str]) -> str:
    """A directory for one fork server: `tmp`, `program`, and `packages` with links to those Python packages.

    Directories of dead servers are deleted on the way.
    """
    _sweep()
    directory = tempfile.mkdtemp(prefix=_PREFIX)
    try:
        for name in ("tmp", "program", "packages"):
            os.mkdir(f"{directory}/{name}")
        for path in packages:
            os.symlink(path, f"{directory}/packages/{os.path.basename(path)}")
    except OSError:
        delete(directory)
        raise
    return directory


def detach() -> None:
    """Leave the starter's session and family, so that the end of this process is not the first thing of its end.

    The closed control socket tells this process to kill what it runs and to delete its directory. If it were killed,
    or stopped, together with its starter, programs would go on running: no namespace ends with it here.
    """
    if os.fork():
        os._exit(0)
    os.setsid()


def delete(path: str) -> None:
    """Delete a directory with all that is in it, however deep and locked that is."""
    with contextlib.suppress(OSError):
        os.chmod(path, 0o700)
        empty_directory(path)
        os.rmdir(path)


def empty_directory(path: str) -> None:
    """Delete all that is in a directory, whatever its modes; a missing one is made.

    What is in a folder in it is moved up, so that no depth is too deep and the work grows with the number of files only.
    """
    os.makedirs(path, exist_ok=True)
    top, prefix, count = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW), os.urandom(8).hex(), 0
    try:
        while entries := list(os.scandir(top)):
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.name, dir_fd=top)
                    continue
                with _unlocked(entry.name, top) as folder:
                    for inner in list(os.scandir(folder)):
                        if inner.is_dir(follow_symlinks=False):
                            if os.geteuid():  # else it can be moved whatever its mode
                                os.chmod(inner.name, 0o700, dir_fd=folder)
                            os.rename(inner.name, f"{prefix}-{count}", src_dir_fd=folder, dst_dir_fd=top)
                            count += 1
                        else:
                            os.unlink(inner.name, dir_fd=folder)
                os.rmdir(entry.name, dir_fd=top)
    finally:
        os.close(top)


@contextlib.contextmanager
def _unlocked(name: str, parent: int) -> Iterator[int]:
    if os.geteuid():
        os.chmod(name, 0o700, dir_fd=parent)
    folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    try:
        yield folder
    finally:
        os.close(folder)


def _sweep() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                is_own = os.fstat(fd).st_uid == os.geteuid() and path.stat().st_ctime < time.time() - _STARTING_S
                if is_own:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    delete(str(path))
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
        self._uid = self._own_user(_FIRST_UID + os.getpid() % _NUM_UIDS) if os.geteuid() == 0 else None
        self.num_others = 0 if self._uid is not None else _num_threads_of(os.geteuid())

    def _own_user(self, uid: int) -> int | None:
        """Give the directory to that user; None where root may not (a container that knows no other users)."""
        try:
            for name in ("tmp", "program"):
                os.chown(f"{self._directory}/{name}", uid, uid)
        except OSError:
            return None
        os.chmod(self._directory, 0o711)
        return uid

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
            readable = [
                *self._readable,
                work,
                f"{self._directory}/packages",
                "/dev/zero",
                "/dev/random",
                "/dev/urandom",
                "/proc/self",
            ]
            landlock.restrict(readable, writable)


def is_full(directory: str, num_files: int, size_mb: int) -> bool:
    """Whether there is more than that in a directory; looked at now and then, where nothing else limits it."""
    count = size = 0
    folders = [directory]
    while folders:
        try:
            entries = list(os.scandir(folders.pop()))
        except FileNotFoundError:
            continue
        except OSError:  # nested too deeply for a path, or locked
            return True
        for entry in entries:
            with contextlib.suppress(OSError):
                size += entry.stat(follow_symlinks=False).st_size
        folders += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        count += len(entries)
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
