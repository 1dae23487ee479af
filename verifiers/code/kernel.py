"""The Linux system calls that the sandbox needs and that Python does not offer; every failure is an OSError."""

from __future__ import annotations

import ctypes
import os
import platform

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWTIME = 0x10000000, 0x20000000, 0x40000000, 0x80
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 4, 22
PR_SET_KEEPCAPS, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 8, 36, 38, 47
CAP_DAC_READ_SEARCH = 2
SECCOMP_MODE_FILTER = 2

# Numbers by machine: (x86_64, aarch64).
_NUMBERS = {
    "pivot_root": (155, 41),
    "capset": (126, 91),
    "mount_setattr": (442, 442),
    "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
}
MACHINE = platform.machine()
_COLUMN = {"x86_64": 0, "aarch64": 1}.get(MACHINE)
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(name: str, *arguments: int | bytes | ctypes.Array | ctypes._CData | None) -> int:
    """A system call by name; its result."""
    if _COLUMN is None:
        raise OSError(38, f"{name}: its number on {MACHINE} is not known here")
    values = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _checked(_libc.syscall(ctypes.c_long(_NUMBERS[name][_COLUMN]), *values), name)


def unshare(flags: int) -> None:
    """Leave the namespaces named by CLONE_NEW* for new ones."""
    _checked(_libc.unshare(ctypes.c_int(flags)), f"unshare({flags:#x})")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """mount(2)."""
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    result = _libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])
    _checked(result, f"mount {kind or source} on {target}")


def unmount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _checked(_libc.umount2(os.fsencode(target), ctypes.c_int(flags)), f"umount {target}")


def set_mount_flags(target: str, flags: int, recursive: bool) -> None:
    """Add MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC (the same bits as MOUNT_ATTR_*) to the mount at `target`."""
    attributes = (ctypes.c_uint64 * 4)(flags, 0, 0, 0)
    at_fdcwd, at_recursive = -100, 0x8000
    syscall("mount_setattr", at_fdcwd, os.fsencode(target), at_recursive if recursive else 0, attributes, 32)


def pivot_root(new_root: str) -> None:
    """Make `new_root` (a mount) the root, and let go of the old one with all that is mounted below it."""
    os.chdir(new_root)
    syscall("pivot_root", b".", b".")
    unmount(".", MNT_DETACH)
    os.chdir("/")


def prctl(option: int, argument: int | ctypes._CData, *more: int) -> None:
    """prctl(2)."""
    value = ctypes.c_ulong(argument) if isinstance(argument, int) else argument
    rest = [ctypes.c_ulong(number) for number in (*more, 0, 0, 0)[:3]]
    _checked(_libc.prctl(ctypes.c_int(option), value, *rest), f"prctl({option})")


def drop_capabilities(kept: int = 0) -> None:
    """Give up every capability for good, but those in the bit mask `kept`, which what is executed keeps, too."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    version_3 = 0x20080522
    header = (ctypes.c_uint32 * 2)(version_3, 0)
    syscall("capset", header, (ctypes.c_uint32 * 6)(kept, kept, kept, 0, 0, 0))
    for number in range(32):
        if kept >> number & 1:
            prctl(PR_CAP_AMBIENT, 2, number)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends; at once if it has ended already."""
    prctl(PR_SET_PDEATHSIG, 9)
    if parent_pid and os.getppid() != parent_pid:
        os._exit(1)
