"""Files that survive a crash: replacing a file as a whole, locking a folder, JSON that every reader takes."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rollout.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that takes the place of `path`, synced to disk, when the block ends well.

    When the block or the disk fails, the former `path` stays whole and the temporary file goes; an OSError comes out
    as a UserError that names `path` and the cause.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with suppress(OSError):  # what went wrong above is what to say
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` as a whole."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON, non-finite floats as null."""
    write_bytes(path, (json.dumps(jsonable(value), indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace"))


def append_line(path: Path, line: str) -> None:
    """Append `line` and a newline in one write; when the disk fails, the file is cut back to what it was."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            data = line.encode("utf-8", "replace") + b"\n"
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> UserError:
    """The UserError for a write to `path` that failed."""
    cure = "check the folder and its permissions"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        cure = "free some space there (or point the run at another disk)"
    cause = error.strerror or str(error)
    return UserError(f"could not write {path}: {cause}. What was there before is whole; {cure}, then resume the run.")


def jsonable(value: Any, where: str = "value") -> Any:
    """`value` as plain JSON values: arrays and tensors as lists, non-finite floats as None; TypeError names where."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return jsonable(value.tolist(), where)
    raise TypeError(f"{where}: a {type(value).__name__} can't be written as JSON")


class FolderLock:
    """An advisory lock on `<folder>/.lock` with the holder's pid and host inside; it ends with the process."""

    def __init__(self, folder: Path) -> None:
        """Take the lock, or raise UserError naming the process that has it."""
        path = folder / ".lock"
        try:
            self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise write_error(path, error) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        except BlockingIOError as error:
            holder = _holder(self._descriptor)
            os.close(self._descriptor)
            raise UserError(
                f"{folder} is in use by another run ({holder}). Wait for it, stop it, or give this run another name."
            ) from error
        except OSError as error:
            os.close(self._descriptor)
            raise write_error(path, error) from error

    def release(self) -> None:
        """Free the lock; a second call does nothing."""
        if self._descriptor is not None:
            # The file stays: removing it would let two later runs lock two different files of the same name.
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"pid {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "its pid is unknown"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
