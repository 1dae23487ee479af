"""A run's checkpoints: written whole or not at all, while training goes on, with a manifest that tells damage on load.

A checkpoint is the folder `step-NNNNNN`, the state before that step. Only the process that holds the run's lock makes a
`Checkpoints`; whoever else looks (`groupzero eval`, `groupzero export`) uses the functions.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from pydantic import BaseModel, ConfigDict, Field

from policy.atomic import CheckpointError, atomic_folder
from rollout.errors import UserError

LEARNER_STATE = "learner.pt"
MANIFEST = "manifest.json"
FORMAT = 1
_STEP = re.compile(r"step-(\d{6,})")


class CheckpointConfig(BaseModel):
    """What is kept for resuming and for use."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    every_steps: int = Field(default=20, ge=1, description="a checkpoint every so many steps, and one at the end")
    keep_last: int = Field(default=2, ge=1, description="how many of the newest are kept")
    keep_every: int = Field(default=0, ge=0, description="keep those of every so many steps for good; 0: none")
    keep_best: bool = Field(
        default=False, description="keep the one with the best held-out pass@1 (needs eval.every_steps)"
    )
    asynchronous: bool = Field(
        default=True,
        description="write to disk while training goes on, from a copy in memory; ranks and bfloat16 wait for it",
    )


@dataclass(frozen=True)
class Manifest:
    """What a whole checkpoint holds: [size in bytes, blake2b in hexadecimal] of each file by its path in the folder."""

    step: int
    score: float | None
    files: dict[str, tuple[int, str]]
    format: int = FORMAT


class Checkpoints:
    """The checkpoints folder of one run; a context manager that waits for what is still being written."""

    def __init__(self, folder: Path, config: CheckpointConfig, message: Callable[[str], None]) -> None:
        """Take the folder into use, removing what killed processes left half written or half removed."""
        self.folder, self._config, self._message = folder, config, message
        self._notices: deque[str] = deque()  # of the writing thread, said by the caller's at the next `wait`
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        for pattern in (".step-*.tmp", ".step-*.old", ".removed-*"):
            for leftover in folder.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        *,
        background: bool,
        needed_bytes: int = 0,
        score: float | None = None,
        on_saved: Callable[[int], None] | None = None,
    ) -> bool:
        """Write `step-NNNNNN` by `write(folder)`, add the manifest, and remove what the config doesn't keep.

        `background` does so in a thread, one save at a time: the next one waits, and raises what went wrong in it. Then
        `write` must work from a copy of the state. `on_saved(step)` is called in the same thread once the folder is there.
        `score` (the higher the better) is what `keep_best` goes by. False, and nothing done, where the step is there.
        """
        self.wait()
        folder = self.folder / f"step-{step:06d}"
        if is_whole(folder):
            return False

        def run() -> None:
            with atomic_folder(folder, needed_bytes) as temporary:
                write(temporary)
                _write_manifest(temporary, step, score)
            if on_saved is not None:
                on_saved(step)
            self._remove_old()

        if background:
            self._pending = self._writer.submit(run)
        else:
            run()
            self.wait()
        return True

    def wait(self) -> None:
        """Wait for the save in the background; what went wrong in it is raised here, once."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        finally:
            while self._notices:
                self._message(self._notices.popleft())

    def check(self) -> None:
        """As `wait`, where the save in the background has ended; nothing while it goes on."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def latest(self) -> Path | None:
        """The newest checkpoint that is what its manifest says, None without one.

        A damaged one is named in a message, put aside as `damaged-step-NNNNNN`, and passed over.
        """
        self.wait()
        for folder in reversed(_named(self.folder)):
            try:
                if verify_checkpoint(folder) is None:
                    self._message(f"{folder} has no {MANIFEST}, so only the form of its files could be checked.")
            except CheckpointError as error:
                aside = _put_aside(folder)
                self._message(f"{error}. It is passed over, and kept as {aside}.")
                continue
            return folder
        return None

    def close(self) -> None:
        """Wait for the save in the background and end the thread; raises as `wait` does."""
        self._writer.shutdown(wait=True)
        self.wait()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        self._writer.shutdown(wait=True)
        if self._pending is not None and (failure := self._pending.exception()) is not None:
            self._message(f"The last checkpoint was not written: {failure}")  # what ends the run is `error`

    def _remove_old(self) -> None:
        """Remove the checkpoints that the config doesn't keep; one that can't be removed is named in a notice."""
        for folder in _unwanted(step_folders(self.folder), self._config):
            removed = folder.with_name(f".removed-{folder.name}")
            try:
                folder.rename(removed)  # first, so that a kill while removing leaves nothing that looks whole
                shutil.rmtree(removed)
            except OSError as error:
                self._notices.append(f"The old checkpoint {folder} could not be removed: {error}")


def _unwanted(folders: list[Path], config: CheckpointConfig) -> Iterator[Path]:
    """Those of the whole checkpoints, oldest first, that no rule of the config keeps."""
    kept = set(folders[-config.keep_last :])
    if config.keep_every:
        kept |= {folder for folder in folders if _step_of(folder) % config.keep_every == 0}
    scored = [(score, folder) for folder in folders if (score := _score_of(folder)) is not None]
    if config.keep_best and scored:
        kept.add(max(scored, key=lambda entry: entry[0])[1])  # the first of equals
    return (folder for folder in folders if folder not in kept)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a run's checkpoints folder, its files not verified; None if there is none."""
    whole = step_folders(folder)
    return whole[-1] if whole else None


def step_folders(folder: Path) -> list[Path]:
    """The whole checkpoints in a run's checkpoints folder by step; their files are not looked into."""
    return [path for path in _named(folder) if is_whole(path)]


def _named(folder: Path) -> list[Path]:
    """All folders with a checkpoint's name, by step."""
    return sorted((path for path in folder.glob("step-*") if _STEP.fullmatch(path.name)), key=_step_of)


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint's writing came to its end; that its files are sound is for `verify_checkpoint` to say."""
    return (folder / MANIFEST).is_file() or (folder / LEARNER_STATE).is_file()


def verify_checkpoint(folder: Path) -> Manifest | None:
    """Compare each file with the manifest, which is returned; CheckpointError names the file and what is wrong with it.

    None for a checkpoint without a manifest, as earlier versions wrote them: there the weights' headers and the archive
    of the learner's state are checked, not the weights' values.
    """
    if not (folder / MANIFEST).is_file():
        _check_form(folder)
        return None
    manifest = read_manifest(folder)
    for name, (size, digest) in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} is damaged: {name} is missing")
        try:
            found, is_same = path.stat().st_size, _digest(path) == digest
        except OSError as error:
            raise CheckpointError(f"{folder} is damaged: {name} can't be read ({error})") from error
        if found != size:
            raise CheckpointError(f"{folder} is damaged: {name} has {found} bytes instead of {size}")
        if not is_same:
            raise CheckpointError(f"{folder} is damaged: the content of {name} is not what was written")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, its files not looked at; CheckpointError for one that can't be read.

    One that a newer groupzero wrote is a UserError: it is not damaged, and must not be passed over.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_bytes())
        if values["format"] > FORMAT:
            raise UserError(
                f"{path} is of format {values['format']}, and this groupzero reads up to {FORMAT}: use the newer one."
            )
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in values["files"].items()}
        score = values["score"]
        return Manifest(int(values["step"]), None if score is None else float(score), files, values["format"])
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} is damaged: {MANIFEST} is no manifest ({error!r})") from error


def _write_manifest(folder: Path, step: int, score: float | None) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): (path.stat().st_size, _digest(path)) for path in paths}
    finite = score if score is not None and math.isfinite(score) else None
    (folder / MANIFEST).write_text(json.dumps(asdict(Manifest(step, finite, files)), indent=1) + "\n")


def _check_form(folder: Path) -> None:
    """CheckpointError when the weights' files are cut off or mixed, or the learner's state is no sound archive."""
    from policy.checkpoint_read import read_headers

    read_headers(folder)
    path = folder / LEARNER_STATE
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{folder} is damaged: {LEARNER_STATE} can't be read ({error})") from error
    if bad is not None:
        raise CheckpointError(f"{folder} is damaged: {bad} in {LEARNER_STATE} is not what was written")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _put_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that nothing takes it for a good one, and return its new place."""
    places = [folder.with_name(f"damaged-{folder.name}{suffix}") for suffix in ("", *(f"-{i}" for i in range(2, 1000)))]
    aside = next(place for place in places if not place.exists())
    folder.rename(aside)
    return aside


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _score_of(folder: Path) -> float | None:
    """The score a checkpoint was saved with; None without a manifest that says one."""
    try:
        return read_manifest(folder).score
    except CheckpointError:
        return None
