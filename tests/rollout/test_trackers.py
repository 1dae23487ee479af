"""Trackers get what a run measured, and whatever they do, the run goes on."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout import trackers
from rollout.errors import UserError
from rollout.trackers import Opening, Trackers, check_trackers, flat_config, numbers, open_tracker


class Fake:
    """A tracker with accelerate's methods that keeps what it gets; `fail_in` names the method that raises `error`."""

    def __init__(self, opening: Opening, fail_in: str = "", error: BaseException | None = None) -> None:
        self.opening, self.fail_in, self.error = opening, fail_in, error or OSError("no network")
        self.calls: list[tuple[Any, ...]] = []
        self.threads: set[int] = set()

    def _call(self, name: str, *values: Any) -> None:
        self.threads.add(threading.get_ident())
        if name == self.fail_in:
            raise self.error
        self.calls.append((name, *values))

    def start(self) -> None:
        self._call("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._call("config", values)

    def log(self, values: dict[str, float], step: int) -> None:
        self._call("log", step, values)

    def finish(self) -> None:
        self._call("finish")


class Hanging(Fake):
    """A tracker that hangs in `log` until it is released."""

    released = threading.Event()

    def log(self, values: dict[str, float], step: int) -> None:
        self.released.wait(60)
        super().log(values, step)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What stands in for each tracker: a class or an exception by name; then the trackers that were made."""
    instead: dict[str, Any] = {}

    def fake(opening: Opening) -> Any:
        stand_in = instead.get(opening.name, Fake)
        if isinstance(stand_in, BaseException):
            raise stand_in
        instead[opening.name] = stand_in(opening)
        return instead[opening.name]

    monkeypatch.setattr(trackers, "open_tracker", fake)
    Hanging.released.clear()
    yield instead
    Hanging.released.set()


def opened(names: list[str], folder: Path, **options: Any) -> tuple[Trackers, list[str]]:
    said: list[str] = []
    return Trackers(names, "project", "run-0", folder, {"lr": 0.1, "a": {"b": None}}, said.append, **options), said


def test_every_tracker_gets_config_numbers_and_summary_in_order_from_one_thread(
    made: dict[str, Any], tmp_path: Path
) -> None:
    both, said = opened(["tensorboard", "mlflow"], tmp_path)
    for step in range(3):
        both.log(step, {"loss": step / 2, "skipped": 0, "bad": float("nan"), "text": "x", "none": None})
    both.close({"pass_at_1_after": 0.5, "verdict": "learning"})
    assert said == []
    for name in ("tensorboard", "mlflow"):
        assert made[name].calls == [
            ("start",),
            ("config", {"lr": 0.1}),
            ("log", 0, {"loss": 0.0, "skipped": 0}),
            ("log", 1, {"loss": 0.5, "skipped": 0}),
            ("log", 2, {"loss": 1.0, "skipped": 0}),
            ("log", 2, {"summary/pass_at_1_after": 0.5}),
            ("finish",),
        ]
        assert len(made[name].threads) == 1  # mlflow keeps its run by thread
        assert threading.get_ident() not in made[name].threads


@pytest.mark.parametrize("fail_in", ["start", "config", "log", "finish"])
@pytest.mark.parametrize("error", [OSError("no network"), ModuleNotFoundError("no module"), SystemExit(1)])
def test_one_that_fails_is_reported_once_and_left_out_the_other_goes_on(
    made: dict[str, Any], tmp_path: Path, fail_in: str, error: BaseException
) -> None:
    made["wandb"] = lambda opening: Fake(opening, fail_in, error)
    both, said = opened(["wandb", "trackio"], tmp_path)
    for step in range(5):
        both.log(step, {"loss": 1.0})
    both.close()
    assert len(said) == 1
    assert "wandb failed" in said[0]
    assert f"{type(error).__name__}: {error}" in said[0]
    assert [call[1] for call in made["trackio"].calls if call[0] == "log"] == [0, 1, 2, 3, 4]
    assert made["trackio"].calls[-1] == ("finish",)


def test_one_that_can_not_even_be_made_is_reported_once_however_long_the_run(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made["wandb"] = ImportError("wandb is broken")
    monkeypatch.setattr(trackers, "MAX_WAITING", 2)
    one, said = opened(["wandb"], tmp_path)
    while any(thread.name == "tracker-wandb" for thread in threading.enumerate()):
        time.sleep(0.01)
    for step in range(10):
        one.log(step, {"loss": 1.0})
    one.close()
    assert len(said) == 1
    assert "ImportError: wandb is broken" in said[0]


def test_messages_come_in_the_thread_of_the_run(made: dict[str, Any], tmp_path: Path) -> None:
    made["wandb"] = ImportError("broken")
    threads: list[int] = []
    one = Trackers(["wandb"], "p", "r", tmp_path, {}, lambda text: threads.append(threading.get_ident()))
    one.close()
    assert threads == [threading.get_ident()]


def test_a_hanging_tracker_holds_up_neither_the_run_nor_the_others(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "MAX_WAITING", 4)
    monkeypatch.setattr(trackers, "CLOSE_TIMEOUT_S", 1.0)
    made["wandb"] = Hanging
    both, said = opened(["wandb", "trackio"], tmp_path)
    deadline = time.monotonic() + 30
    for step in range(20):
        both.log(step, {"loss": 1.0})
        while len([call for call in getattr(made.get("trackio"), "calls", ()) if call[0] == "log"]) <= step:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    both.close()  # returns though the tracker hangs: the test's own timeout would tell
    assert len(said) == 2
    assert "wandb lies 4 entries behind" in said[0]
    assert "wandb did not finish in 1 s" in said[1]
    assert made["trackio"].calls[-1] == ("finish",)


def test_a_slow_tracker_catches_up(made: dict[str, Any], tmp_path: Path) -> None:
    made["wandb"] = Hanging
    one, said = opened(["wandb"], tmp_path)
    for step in range(50):
        one.log(step, {"loss": 1.0})
    threading.Timer(0.1, Hanging.released.set).start()
    one.close()
    assert said == []
    assert [call[1] for call in made["wandb"].calls if call[0] == "log"] == list(range(50))


def test_a_resumed_run_goes_on_under_its_id_and_does_not_store_its_config_again(
    made: dict[str, Any], tmp_path: Path
) -> None:
    ids = []
    for first_step in (0, 7):
        made.pop("wandb", None)
        one, _ = opened(["wandb"], tmp_path, first_step=first_step)
        one.close({"x": 1.0})
        opening = made["wandb"].opening
        assert (opening.first_step, opening.is_new) == (first_step, first_step == 0)
        assert (("config", {"lr": 0.1}) in made["wandb"].calls) == (first_step == 0)
        assert made["wandb"].calls[-2] == ("log", first_step, {"summary/x": 1.0})
        ids.append(opening.run_id)
    assert ids[0] == ids[1]
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": ids[0]}


@pytest.mark.parametrize("damage", ["{", "[]"])
def test_a_damaged_state_lets_the_trackers_begin_anew(made: dict[str, Any], tmp_path: Path, damage: str) -> None:
    (tmp_path / "trackers.json").write_text(damage)
    one, said = opened(["wandb"], tmp_path, first_step=7)
    one.close()
    assert len(said) == 1
    assert "trackers.json is damaged" in said[0]
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": made["wandb"].opening.run_id}


def test_a_folder_that_cannot_be_written_stops_no_run(made: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "trackers").write_text("a file")
    one, said = opened(["wandb"], tmp_path / "trackers")
    one.log(0, {"loss": 1.0})
    one.close()
    assert len(said) == 1
    assert "could not write" in said[0]
    assert ("log", 0, {"loss": 1.0}) in made["wandb"].calls


def test_no_trackers_leave_no_trace(tmp_path: Path) -> None:
    none, said = opened([], tmp_path / "trackers")
    none.log(0, {"loss": 1.0})
    none.close({"x": 1.0})
    assert said == []
    assert not (tmp_path / "trackers").exists()


def test_accelerate_is_asked_for_what_lets_a_run_go_on(tmp_path: Path) -> None:
    """The real classes, not started: nothing of the packages is needed for that."""
    fresh = Opening("wandb", "project", "run-0", tmp_path, "abc", 0, True)
    wandb = open_tracker(fresh)
    assert (wandb.run_name, wandb.init_kwargs["id"], wandb.init_kwargs["resume"]) == ("project", "abc", "allow")
    assert wandb.init_kwargs["name"] == "run-0"
    resumed = {"first_step": 7, "is_new": False}
    for opening, kwargs in ((fresh, {}), (Opening(**{**vars(fresh), **resumed}), {"purge_step": 7})):
        tensorboard = open_tracker(Opening(**{**vars(opening), "name": "tensorboard"}))
        assert (tensorboard.run_name, tensorboard.logging_dir_param) == ("tensorboard", tmp_path)
        assert tensorboard.init_kwargs == kwargs
    for opening, resume in ((fresh, "never"), (Opening(**{**vars(fresh), **resumed}), "allow")):
        trackio = open_tracker(Opening(**{**vars(opening), "name": "trackio"}))
        assert trackio.init_kwargs == {"name": "run-0", "resume": resume}


def test_a_missing_package_is_named_before_the_run_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"tensorboard"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in there else None)
    check_trackers([])
    check_trackers(["tensorboard"])
    with pytest.raises(UserError) as raised:
        check_trackers(["tensorboard", "wandb", "mlflow"])
    assert f"{sys.executable} -m pip install wandb mlflow" in str(raised.value)
    with pytest.raises(UserError, match="'comet' is not one of tensorboard, wandb, trackio, mlflow"):
        check_trackers(["comet"])


def test_every_tracker_of_the_config_is_known() -> None:
    from typing import get_args

    from rollout.trackers import TrackingConfig

    annotation = TrackingConfig.model_fields["trackers"].annotation
    assert set(get_args(get_args(annotation)[0])) == set(trackers.PACKAGES)


def test_numbers_are_flat_finite_and_well_named() -> None:
    import numpy

    given_ = {
        "loss": 1.5,
        "steps": 3,
        "done": True,
        "bad": float("inf"),
        "list": [1, 2],
        "pass@k": 0.5,
        "layer": {"0": {"load": numpy.float32(0.25)}, "name": "x"},
    }
    assert numbers(given_) == {"loss": 1.5, "steps": 3, "done": 1, "pass_k": 0.5, "layer/0/load": 0.25}


@settings(deadline=None, derandomize=True)
@given(
    st.recursive(
        st.floats() | st.text(max_size=3) | st.none() | st.integers(-(2**40), 2**40),
        lambda inner: st.dictionaries(st.text(max_size=4), inner, max_size=3),
    )
)
def test_whatever_is_measured_becomes_finite_numbers(value: Any) -> None:
    found = numbers({"m": value})
    assert all(isinstance(number, int | float) and abs(number) < float("inf") for number in found.values())


def test_a_config_is_flattened_to_plain_values() -> None:
    config = {"a": {"b": 1, "c": None, "d": [1, {"e": Path("x")}]}, "name": "run", "on": True}
    assert flat_config(config) == {"a.b": 1, "a.d": '[1, {"e": "x"}]', "name": "run", "on": True}


def test_tensorboard_reads_what_a_killed_and_resumed_run_wrote(tmp_path: Path) -> None:
    """The real tracker: steps that were done twice stand there once, with their later values."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the tensorboard package"
    )
    for first_step, value in ((0, 0.0), (0, 1.0), (2, 2.0)):  # the first one was killed before its first checkpoint
        real, said = opened(["tensorboard"], tmp_path, first_step=first_step)
        for step in range(first_step, first_step + 3):
            real.log(step, {"loss": value})
        real.close()
        assert said == []
        time.sleep(1.1)  # event files are named, and read, by the second
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]
