"""Landlock (Linux 5.13): a file-system and network fence that needs no namespaces; used where there are none."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

from verifiers.code import kernel

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | (1 << 14)
_PATH_BENEATH = 1


def version() -> int:
    """The ABI version that the kernel offers, 0 if none."""
    try:
        return kernel.syscall("landlock_create_ruleset", None, 0, 1)
    except OSError:
        return 0


def restrict(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Fence this process in: it reads and executes below `readable`, does anything below `writable`, and no TCP.

    Paths that do not exist are left out. `no_new_privs` must be set; raises OSError where the kernel has no Landlock.
    """
    abi = version()
    if not abi:
        raise OSError(38, "this kernel has no Landlock")
    file_rights = (1 << (13 + (abi >= 2) + (abi >= 3) + (abi >= 5))) - 1
    tcp, scopes = (3 if abi >= 4 else 0), (3 if abi >= 6 else 0)
    attributes = (ctypes.c_uint64 * 3)(file_rights, tcp, scopes)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = kernel.syscall("landlock_create_ruleset", attributes, size, 0)
    try:
        for paths, rights in ((readable, _READ), (writable, file_rights)):
            for path in paths:
                _allow(ruleset, path, rights & file_rights)
        kernel.syscall("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(path):
            rights &= _FILE_RIGHTS
        rule = ctypes.create_string_buffer(rights.to_bytes(8, "little") + fd.to_bytes(4, "little"), 12)
        kernel.syscall("landlock_add_rule", ruleset, _PATH_BENEATH, rule, 0)
    finally:
        os.close(fd)
