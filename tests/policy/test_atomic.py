"""Folders that are written whole or not at all."""

from __future__ import annotations

import errno
import resource
import shutil
import signal
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from policy.atomic import CheckpointError, atomic_folder
from policy.checkpoint import save_policy
from tests.policy.builders import tiny_policy

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The checkpoint of `tiny_policy()`."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_policy(tiny_policy(), folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_appears_when_its_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    with atomic_folder(target) as temporary:
        (temporary / "a").write_text("1")
        assert not target.exists()
    assert contents(tmp_path) == {"deep/folder/a": b"1"}
    with atomic_folder(target) as temporary:
        (temporary / "b").write_text("2")
        assert contents(target) == {"a": b"1"}
    assert contents(tmp_path) == {"deep/folder/b": b"2"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ZeroDivisionError("no"), ZeroDivisionError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("a bug, not a full disk"), RuntimeError),
        (OSError(errno.ENOSPC, "No space left on device"), CheckpointError),
    ],
)
def test_an_exception_leaves_the_earlier_folder_whole(
    saved: Path, raised: BaseException, expected: type[BaseException]
) -> None:
    before = contents(saved)
    with pytest.raises(expected) as caught, atomic_folder(saved) as temporary:
        (temporary / "config.json").write_text("half")
        raise raised
    assert contents(saved) == before
    assert list(saved.parent.iterdir()) == [saved]
    assert (type(caught.value) is CheckpointError) == (expected is CheckpointError)
    if expected is CheckpointError:
        assert "No space left on device" in str(caught.value)
        assert str(saved) in str(caught.value)


def test_a_disk_that_fills_up_while_weights_are_written(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(saved)

    def full(file: BinaryIO, *_: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("policy.checkpoint_write._write_source", full)
    with pytest.raises(CheckpointError, match="No space left on device"), atomic_folder(saved) as temporary:
        save_policy(tiny_policy(seed=1), temporary)
    assert contents(saved) == before
    assert list(saved.parent.iterdir()) == [saved]


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """A real failure of the operating system, in the middle of a file, for every writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("writer", ["safetensors", "torch.save"])
def test_a_write_that_the_system_refuses_is_a_clear_error(saved: Path, writer: str) -> None:
    before = contents(saved)
    model = tiny_policy(seed=1)
    with no_file_above(40_000), pytest.raises(CheckpointError, match=r"writing .*checkpoint failed"):  # noqa: SIM117
        with atomic_folder(saved) as temporary:
            if writer == "safetensors":
                save_policy(model, temporary)
            else:
                torch.save(model.state_dict(), temporary / "learner.pt")
    assert contents(saved) == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_failed_replacement_puts_the_earlier_folder_back(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename = contents(saved), Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(CheckpointError, match="Input/output error"), atomic_folder(saved) as temporary:
        (temporary / "config.json").write_text("new")
    assert contents(saved) == before
    assert list(saved.parent.iterdir()) == [saved]


def test_too_little_space_is_refused_before_anything_is_written(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**30, 2**30 - 2**20, 2**20))
    with pytest.raises(CheckpointError, match=r"no space for .*checkpoint: 3 MiB needed, 1 MiB free"):  # noqa: SIM117
        with atomic_folder(saved, needed_bytes=3 * 2**20):
            pytest.fail("the block must not run")
    assert list(saved.parent.iterdir()) == [saved]
    with atomic_folder(saved, needed_bytes=2**20) as temporary:
        (temporary / "a").touch()
    assert contents(saved) == {"a": b""}
