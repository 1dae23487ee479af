"""The room that programs run in: new namespaces around the fork server, then a private one around each program.

The fork server is process 1 of a process namespace of its own, so that killing "everybody" after a run leaves nobody,
and the kernel kills them all with it. Its root is an empty tmpfs, read-only, with the interpreter or the compilers
mounted into it read-only; no network but an interface that is down. Each program gets a fresh /tmp and no capability.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

from verifiers.code import kernel

NOBODY = 65534
_NAMESPACES = (
    kernel.CLONE_NEWNS
    | kernel.CLONE_NEWPID
    | kernel.CLONE_NEWNET
    | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWUTS
    | kernel.CLONE_NEWCGROUP
)
_DEVICES = ("null", "zero", "full", "random", "urandom")
_PLACES_FOR_A_ROOT = ("/mnt", "/media", "/srv", "/opt", "/var", "/run", "/tmp")
_ETC = {
    "passwd": f"nobody:x:{NOBODY}:{NOBODY}:nobody:/tmp:/bin/sh\n",
    "group": f"nogroup:x:{NOBODY}:\n",
    "hosts": "127.0.0.1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}


@dataclass(frozen=True)
class Layout:
    """What a program sees besides its own /tmp: host paths mounted read-only, and symbolic links (path -> target)."""

    binds: tuple[tuple[str, str], ...]
    links: tuple[tuple[str, str], ...]


def enter(layout: Layout) -> None:
    """Move this process's children into new namespaces and fork; only the child, process 1 there, returns.

    The parent waits for it and ends with it. As root the child becomes `nobody` before its user namespace is made, so
    that no process in the sandbox is root outside; otherwise it is whoever started it. Raises OSError.
    """
    is_root = os.geteuid() == 0
    if is_root:
        try:
            kernel.unshare(_NAMESPACES)
        except OSError:  # root without the right to: go the way of everybody else
            is_root = False
    if not is_root:
        uid, gid = os.geteuid(), os.getegid()
        kernel.unshare(kernel.CLONE_NEWUSER | _NAMESPACES)
        _map_to_nobody(uid, gid)
    own_pid = os.getpid()
    child = os.fork()
    if child:
        _await(child)
    kernel.die_with_parent(0)  # the parent has no number in here; its end also closes the control socket
    if os.getpid() != 1:
        raise OSError(1, f"the fork server became process {os.getpid()} (of {own_pid}), not 1, of its namespace")
    _build_root(layout)
    if is_root:
        _stop_being_root()
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    kernel.die_with_parent(0)


def _await(child: int) -> None:
    """Wait for the child and end as it did, without any exit handler."""
    for fd in range(3, 1024):
        with contextlib.suppress(OSError):
            os.close(fd)
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _map_to_nobody(uid: int, gid: int) -> None:
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
        fd = os.open(f"/proc/self/{name}", os.O_WRONLY)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def _stop_being_root() -> None:
    """Become nobody, and root only in a user namespace in which nothing but nobody exists."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # else /proc/self/uid_map belongs to root
    kernel.unshare(
        kernel.CLONE_NEWUSER
        | kernel.CLONE_NEWNS
        | kernel.CLONE_NEWNET
        | kernel.CLONE_NEWIPC
        | kernel.CLONE_NEWUTS
        | kernel.CLONE_NEWCGROUP
    )
    _map_to_nobody(NOBODY, NOBODY)


def _build_root(layout: Layout) -> None:
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    root = _place_for_root([source for source, _ in layout.binds])
    kernel.mount("tmpfs", root, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755,size=1m,nr_inodes=2000")
    for source, target in layout.binds:
        _bind(source, root + target)
    for path, target in layout.links:
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        os.symlink(target, root + path)
    for directory in ("/tmp", "/program", "/proc", "/dev", "/etc"):
        os.makedirs(root + directory, exist_ok=True)
    for name in _DEVICES:
        _touch(f"{root}/dev/{name}")
        kernel.mount(f"/dev/{name}", f"{root}/dev/{name}", None, kernel.MS_BIND)
    os.symlink("/tmp", root + "/dev/shm")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"{root}/dev/{name}")
    os.symlink("/proc/self/fd", root + "/dev/fd")
    for name, text in _ETC.items():
        with open(f"{root}/etc/{name}", "w") as stream:
            stream.write(text)
    # Some containers hide parts of /proc and so forbid a new one; programs do without it then.
    with contextlib.suppress(OSError):
        kernel.mount("proc", root + "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    kernel.pivot_root(root)
    kernel.set_mount_flags("/", kernel.MS_RDONLY, recursive=False)


def _place_for_root(sources: Sequence[str]) -> str:
    """An existing directory that hides none of the sources when something is mounted on it."""
    for place in _PLACES_FOR_A_ROOT:
        if os.path.isdir(place) and not any(source == place or source.startswith(f"{place}/") for source in sources):
            return place
    raise OSError(2, f"none of {', '.join(_PLACES_FOR_A_ROOT)} is free to mount the sandbox's root on")


def _touch(path: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        _touch(target)
    kernel.mount(source, target, None, kernel.MS_BIND | kernel.MS_REC)
    kernel.set_mount_flags(target, kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV, recursive=True)


def mount_work(size_mb: int) -> None:
    """A writable /program that lasts until `unmount_work`: where a compiler leaves what later runs execute."""
    flags = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("tmpfs", "/program", "tmpfs", flags, f"mode=755,size={size_mb}m,nr_inodes=4096")


def unmount_work() -> None:
    """Throw away /program and what is in it."""
    kernel.unmount("/program", kernel.MNT_DETACH)


def make_private(tmp_mb: int, num_files: int, has_work: bool, may_write_work: bool) -> None:
    """In a forked child: a mount and IPC namespace of its own with an empty /tmp, and /program read-only unless it may."""
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC)
    flags = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("tmpfs", "/tmp", "tmpfs", flags, f"mode=700,size={tmp_mb}m,nr_inodes={num_files}")
    if has_work and not may_write_work:
        kernel.set_mount_flags("/program", kernel.MS_RDONLY, recursive=False)
    os.chdir("/tmp")
