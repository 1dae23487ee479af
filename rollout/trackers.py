"""Metrics to TensorBoard, Weights & Biases, trackio or mlflow, by accelerate's trackers; none of them can stop a run.

Each tracker lives in a thread of its own behind a bounded queue, so one that hangs holds up neither the run nor the
others. What a tracker needs to go on where a killed run left off is kept in `<folder>/trackers.json`.
"""

from __future__ import annotations

import importlib.util
import json
import math
import queue
import re
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rollout.durable import write_json
from rollout.errors import UserError

# The package that each tracker needs beside accelerate.
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
STATE = "trackers.json"
MAX_WAITING = 1000  # entries that a slow tracker may lie behind
CLOSE_TIMEOUT_S = 20.0
_NOT_IN_A_NAME = re.compile(r"[^\w\-. :/]")  # mlflow refuses anything else in a metric's name


class TrackingConfig(BaseModel):
    """Where metrics go beside metrics.jsonl; a tracker that fails is reported once and left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = Field(
        default=(), description="trackers, each a package to be installed beside groupzero"
    )
    project: str = Field(default="groupzero", min_length=1, description="project or experiment the run is filed under")


def check_trackers(names: Sequence[str]) -> None:
    """UserError for a tracker that groupzero does not know, or whose package is not installed."""
    for name in names:
        if name not in PACKAGES:
            raise UserError(f"tracking.trackers: {name!r} is not one of {', '.join(PACKAGES)}.")
    if missing := [name for name in names if importlib.util.find_spec(PACKAGES[name]) is None]:
        packages = " ".join(PACKAGES[name] for name in missing)
        raise UserError(
            f"tracking.trackers names {', '.join(missing)}, and the package is not installed. Install it with\n"
            f"  {sys.executable} -m pip install {packages}\nor take it out of tracking.trackers."
        )


class Trackers:
    """The trackers of one run; with no names it does nothing, and accelerate is not imported."""

    def __init__(
        self,
        names: Sequence[str],
        project: str,
        run_name: str,
        folder: Path,
        config: Mapping[str, Any],
        message: Callable[[str], None],
        *,
        first_step: int = 0,
    ) -> None:
        """Start them. `folder` is for their files, `first_step` the step that a resumed run goes on from.

        `message`, called by `log` and `close` in their caller's thread, hears once of a tracker that failed or lags.
        """
        self._message = message
        self._notices: deque[str] = deque()
        self._last_step = first_step
        self._trackers: list[_Thread] = []
        if not names:
            return
        from accelerate import PartialState

        PartialState()  # accelerate's trackers ask it whether they are the main process; made here, by one thread
        state = self._state(folder)
        is_new = not state
        for name in names:
            state.setdefault(name, uuid.uuid4().hex)
        try:
            write_json(folder / STATE, state)
        except UserError as error:
            message(f"A resumed run will begin anew in its trackers: {error}")
        values = flat_config(config) if is_new else {}
        for name in names:
            opening = Opening(name, project, run_name, folder, state[name], first_step, is_new)
            self._trackers.append(_Thread(opening, values, self._notices.append))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Hand the finite numbers among a step's metrics to every tracker; returns at once."""
        self._last_step = step
        values = numbers(metrics)
        for tracker in self._trackers:
            tracker.put(step, values)
        self._say()

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """Send the summary's numbers as `summary/...`, then wait at most `CLOSE_TIMEOUT_S` for all trackers together."""
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for tracker in self._trackers:
            if summary is not None:
                tracker.put(self._last_step, {f"summary/{key}": value for key, value in numbers(summary).items()})
            tracker.end()
        for tracker in self._trackers:
            tracker.join(max(0.0, deadline - time.monotonic()))
        self._trackers = []
        self._say()

    def _state(self, folder: Path) -> dict[str, str]:
        """The ids that earlier processes of the run used; {} at its beginning, and where they can't be read."""
        path = folder / STATE
        try:
            return {str(name): str(value) for name, value in json.loads(path.read_bytes()).items()}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, AttributeError) as error:
            self._message(f"{path} is damaged ({error}): the trackers begin anew.")
            return {}

    def _say(self) -> None:
        while self._notices:
            self._message(self._notices.popleft())


@dataclass(frozen=True)
class Opening:
    """Which tracker to open, and as what; `is_new` is false for a run that another process began."""

    name: str
    project: str
    run_name: str
    folder: Path
    run_id: str
    first_step: int
    is_new: bool


def open_tracker(opening: Opening) -> Any:
    """One of accelerate's trackers, made so that a resumed run goes on in the same place, and not yet started."""
    from accelerate import tracking

    name, folder = opening.name, opening.folder
    if name == "tensorboard":
        # Steps that a resumed run does again replace those that were written before it was killed.
        again = {} if opening.is_new else {"purge_step": opening.first_step}
        return tracking.TensorBoardTracker("tensorboard", folder, **again)
    if name == "wandb":
        return tracking.WandBTracker(
            opening.project, name=opening.run_name, id=opening.run_id, resume="allow", dir=str(folder)
        )
    if name == "trackio":
        resume = "never" if opening.is_new else "allow"  # it goes by the name, which another run may have had
        return tracking.TrackioTracker(opening.project, name=opening.run_name, resume=resume)
    return _mlflow(opening)


def _mlflow(opening: Opening) -> Any:
    """mlflow gives out its own ids: the run is found again by a tag."""
    import mlflow
    from accelerate import tracking

    tag = {"groupzero.run": opening.run_id}
    mine = f"tags.`groupzero.run` = '{opening.run_id}'"
    found = mlflow.search_runs(search_all_experiments=True, filter_string=mine, output_format="list")
    run_id = found[0].info.run_id if found else None
    return tracking.MLflowTracker(opening.project, run_id=run_id, run_name=opening.run_name, tags=tag)


class _Thread:
    """One tracker, in a thread that ends with the process whatever the tracker is waiting for."""

    def __init__(self, opening: Opening, config: Mapping[str, Any], notice: Callable[[str], None]) -> None:
        self._opening, self._config, self._notice = opening, config, notice
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(MAX_WAITING)
        self._failed = threading.Event()
        self._ending = threading.Event()
        self._num_lost = 0
        self._thread = threading.Thread(target=self._run, name=f"tracker-{opening.name}", daemon=True)
        self._thread.start()

    def put(self, step: int, values: dict[str, float]) -> None:
        """Queue an entry; lost, with a notice the first time, when too many are waiting."""
        if self._failed.is_set():
            return
        try:
            self._queue.put_nowait((step, values))
        except queue.Full:
            if not self._num_lost:
                self._notice(
                    f"The tracker {self._opening.name} lies {MAX_WAITING} entries behind: from step {step} on it misses "
                    "those that don't fit. All of them are in metrics.jsonl."
                )
            self._num_lost += 1

    def end(self) -> None:
        """Ask the thread to finish once the queue is empty."""
        self._ending.set()
        try:
            self._queue.put_nowait(None)  # wakes it; with a full queue it is awake
        except queue.Full:
            return

    def join(self, timeout_s: float) -> None:
        """Wait for the end, at most so long."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._notice(
                f"The tracker {self._opening.name} did not finish in {CLOSE_TIMEOUT_S:g} s and is left behind; what it had "
                "not sent yet may be missing there. All of it is in metrics.jsonl."
            )

    def _run(self) -> None:
        try:
            tracker = open_tracker(self._opening)
            tracker.start()
            if self._config:
                tracker.store_init_configuration(dict(self._config))
            while not (self._ending.is_set() and self._queue.empty()):
                entry = self._queue.get()
                if entry is not None:
                    tracker.log(entry[1], step=entry[0])
            tracker.finish()
        except (Exception, SystemExit) as error:  # noqa: BLE001  (packages of others, and reported)
            self._failed.set()
            self._notice(
                f"The tracker {self._opening.name} failed and is left out from here on "
                f"({type(error).__name__}: {error}). The run goes on, and metrics.jsonl has everything."
            )


def numbers(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers by name, those of inner mappings as `outer/inner`; truth values are 0 and 1."""
    found: dict[str, float] = {}
    for key, value in metrics.items():
        name = prefix + _NOT_IN_A_NAME.sub("_", str(key))
        if isinstance(value, Mapping):
            found |= numbers(value, f"{name}/")
        elif isinstance(value, Real) and math.isfinite(value):
            found[name] = int(value) if isinstance(value, bool | int) else float(value)
    return found


def flat_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """A config by dotted names; what is no truth value, number or text is written as JSON, and what is not set left out."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flat_config(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = (
                value if isinstance(value, bool | int | float | str) else json.dumps(value, default=str)
            )
    return flat
