"""Folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class CheckpointError(RuntimeError):
    """A checkpoint that can't be read or written; the message names the folder and what is wrong with it."""


def check_space(folder: Path, needed_bytes: int, of: Path) -> None:
    """CheckpointError when the disk of `folder` has fewer than `needed_bytes` free for writing `of`."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise CheckpointError(f"no space for {of}: {needed_bytes / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free")


@contextmanager
def atomic_folder(folder: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well and vanishes when it doesn't.

    Raises CheckpointError when fewer than `needed_bytes` are free, or when writing fails; what was at `folder` before
    stays whole until the new one is on disk.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    check_space(folder.parent, needed_bytes, folder)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
        _replace(folder, temporary)
        _flush(folder.parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save reports a failed write as a RuntimeError of its archive writer.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        raise CheckpointError(
            f"writing {folder} failed: {error}. Earlier checkpoints are whole; free some space or choose another disk."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a file or a folder's list of names is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(folder: Path, temporary: Path) -> None:
    """Put `temporary` in the place of `folder`, which comes back if that fails."""
    replaced = folder.parent / f".{folder.name}.{os.getpid()}.old"
    if folder.exists():
        folder.rename(replaced)
    try:
        temporary.rename(folder)
    except BaseException:
        if replaced.exists():
            replaced.rename(folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
