"""Checkpoints: whole or not there, verified on load, kept by rule, written beside training, safe from any kill."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from policy.atomic import CheckpointError
from rollout.checkpoints import CheckpointConfig, Checkpoints, latest_checkpoint, read_manifest, verify_checkpoint
from rollout.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
KEEP_ALL = CheckpointConfig(keep_last=100)


def writer(text: str = "weights") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_text(text)
        (folder / "optimizer").mkdir()
        (folder / "optimizer" / "0.distcp").write_text(text * 3)

    return write


def forbidden(folder: Path) -> None:
    pytest.fail(f"{folder} must not be written")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def opened(folder: Path, config: CheckpointConfig = KEEP_ALL) -> tuple[Checkpoints, list[str]]:
    said: list[str] = []
    return Checkpoints(folder, config, said.append), said


@pytest.mark.parametrize("background", [False, True])
def test_a_save_is_whole_verified_and_the_latest(tmp_path: Path, background: bool) -> None:
    checkpoints, said = opened(tmp_path / "checkpoints")
    saved: list[int] = []
    assert checkpoints.save(3, writer("a"), background=background, score=0.5, on_saved=saved.append)
    assert checkpoints.save(12, writer("b"), background=background)
    latest = checkpoints.latest()
    assert latest == tmp_path / "checkpoints" / "step-000012"
    assert latest == latest_checkpoint(tmp_path / "checkpoints")
    assert saved == [3]
    assert said == []
    manifest = verify_checkpoint(tmp_path / "checkpoints" / "step-000003")
    assert manifest is not None
    assert (manifest.step, manifest.score) == (3, 0.5)
    assert {name: size for name, (size, _) in manifest.files.items()} == {
        "model.safetensors": 1,
        "optimizer/0.distcp": 3,
    }
    checkpoints.close()


def test_a_step_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    checkpoints, _ = opened(tmp_path)
    checkpoints.save(1, writer(), background=True)
    assert not checkpoints.save(1, forbidden, background=True)
    assert (tmp_path / "step-000001" / "model.safetensors").read_text() == "weights"


def test_a_folder_that_never_became_whole_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "step-000001").mkdir()
    (tmp_path / "step-000001" / "model.safetensors").write_text("half")
    checkpoints, _ = opened(tmp_path)
    assert latest_checkpoint(tmp_path) is None
    assert checkpoints.save(1, writer(), background=False)
    assert verify_checkpoint(tmp_path / "step-000001") is not None


def test_saving_in_the_background_lets_the_caller_go_on_one_save_at_a_time(tmp_path: Path) -> None:
    checkpoints, _ = opened(tmp_path)
    go_on, events = threading.Event(), []

    def slow(folder: Path) -> None:
        assert go_on.wait(30)
        events.append("first written")
        writer()(folder)

    checkpoints.save(1, slow, background=True, on_saved=lambda step: events.append(f"saved {step}"))
    events.append("caller goes on")
    assert latest_checkpoint(tmp_path) is None
    threading.Timer(0.05, go_on.set).start()
    checkpoints.save(2, lambda folder: events.append("second begins"), background=True)
    checkpoints.wait()
    assert events == ["caller goes on", "first written", "saved 1", "second begins"]


class OurError(Exception):
    """What a writer may raise."""


def test_a_failure_in_the_background_comes_out_once_as_what_it_was(tmp_path: Path) -> None:
    checkpoints, _ = opened(tmp_path)
    failure = OurError("no luck")

    def fail(folder: Path) -> None:
        writer()(folder)
        raise failure

    checkpoints.save(1, fail, background=True)
    with pytest.raises(OurError) as raised:
        checkpoints.save(2, forbidden, background=True)
    assert raised.value is failure
    assert names(tmp_path) == []
    assert checkpoints.save(2, writer(), background=True)
    checkpoints.close()
    assert names(tmp_path) == ["step-000002"]


def test_check_raises_a_failure_without_the_next_save_and_waits_for_nothing(tmp_path: Path) -> None:
    checkpoints, _ = opened(tmp_path)
    go_on, gone = threading.Event(), threading.Event()

    def fail(folder: Path) -> None:
        assert go_on.wait(30)
        raise OurError("disk gone")

    checkpoints.save(1, fail, background=True)
    checkpoints.check()  # it is still being written
    assert checkpoints._pending is not None
    checkpoints._pending.add_done_callback(lambda _: gone.set())
    go_on.set()
    assert gone.wait(30)
    with pytest.raises(OurError):
        checkpoints.check()
    checkpoints.check()
    checkpoints.close()


def test_close_raises_what_went_wrong_but_never_hides_what_ended_the_run(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise OurError("disk gone")

    checkpoints, _ = opened(tmp_path)
    checkpoints.save(1, fail, background=True)
    with pytest.raises(OurError, match="disk gone"):
        checkpoints.close()

    checkpoints, said = opened(tmp_path)
    with pytest.raises(KeyError, match="of the run"), checkpoints:
        checkpoints.save(1, fail, background=True)
        raise KeyError("of the run")
    assert said == ["The last checkpoint was not written: disk gone"]


def test_too_little_space_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    checkpoints, _ = opened(tmp_path)
    with pytest.raises(CheckpointError, match="no space for"):
        checkpoints.save(1, forbidden, background=False, needed_bytes=2**60)
    assert names(tmp_path) == []


FILES = ("model.safetensors", "optimizer/0.distcp", "manifest.json")


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.sampled_from(FILES), st.sampled_from(["flip", "cut", "extend", "remove"]), st.data())
def test_any_damage_is_found_named_and_passed_over(file: str, damage: str, data: st.DataObject) -> None:
    """Whatever happens to one byte or the length of one file, the run goes on from the checkpoint before."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoints, said = opened(folder)
        for step in (1, 2):
            checkpoints.save(step, writer("some weights"), background=False)
        path = folder / "step-000002" / file
        content = bytearray(path.read_bytes())
        if damage == "flip":
            # In the manifest, inside of a digest: its layout and its unused spaces do not matter.
            low = content.index(b'"optimizer') - 20 if file == "manifest.json" else 0
            place = data.draw(st.integers(low, low + 5))
            content[place] ^= 1
        elif damage == "cut":
            del content[data.draw(st.integers(0, len(content) - 3)) :]
        else:
            content += b"!"
        path.write_bytes(content)
        if damage == "remove":
            path.unlink()
        assert checkpoints.latest() == folder / "step-000001"
        assert names(folder) == ["damaged-step-000002", "step-000001"]
        assert len(said) == 1
        assert str(folder / "step-000002") in said[0]
        assert "damaged-step-000002" in said[0]
        if file != "manifest.json":
            assert file in said[0]


def test_damage_twice_over_keeps_both(tmp_path: Path) -> None:
    for _ in range(2):
        checkpoints, _ = opened(tmp_path)
        checkpoints.save(1, writer(), background=False)
        (tmp_path / "step-000001" / "model.safetensors").write_text("other!!")
        assert checkpoints.latest() is None
    assert names(tmp_path) == ["damaged-step-000001", "damaged-step-000001-2"]


def test_a_newer_format_is_neither_damage_nor_passed_over(tmp_path: Path) -> None:
    checkpoints, _ = opened(tmp_path)
    checkpoints.save(1, writer(), background=False)
    path = tmp_path / "step-000001" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(UserError, match="format 2"):
        checkpoints.latest()
    assert names(tmp_path) == ["step-000001"]


scores = st.one_of(st.none(), st.integers(0, 3).map(float), st.just(float("nan")))


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    st.lists(scores, min_size=1, max_size=7),
    st.integers(1, 3),
    st.sampled_from([0, 2, 3]),
    st.booleans(),
    st.booleans(),
)
def test_what_is_kept(results: list[float | None], last: int, every: int, best: bool, background: bool) -> None:
    """The newest, every so many, and the best so far at each save; the first of equal scores, and NaN is none."""
    config = CheckpointConfig(keep_last=last, keep_every=every, keep_best=best)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoints, said = opened(folder, config)
        expected: list[int] = []
        for step, score in enumerate(results, start=1):
            checkpoints.save(step, lambda folder: None, background=background, score=score)
            expected.append(step)
            kept = set(expected[-last:]) | {s for s in expected if every and s % every == 0}
            judged = [s for s in expected if results[s - 1] is not None and results[s - 1] == results[s - 1]]
            if best and judged:
                kept.add(max(judged, key=lambda s: (results[s - 1], -s)))
            expected = sorted(kept)
            checkpoints.wait()
            assert names(folder) == [f"step-{s:06d}" for s in expected]
        assert said == []


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    checkpoints, _ = opened(tmp_path, CheckpointConfig(keep_last=1))
    for step in (999_999, 1_000_000):
        checkpoints.save(step, writer(), background=False)
    assert names(tmp_path) == ["step-1000000"]


def test_removing_begins_with_the_name_and_is_ended_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, said = opened(tmp_path, CheckpointConfig(keep_last=1))
    checkpoints.save(1, writer(), background=True)
    checkpoints.wait()
    with monkeypatch.context() as patch:
        real = shutil.rmtree

        def refuse(path: Path, ignore_errors: bool = False) -> None:
            if ".removed" in str(path):
                raise OSError("busy")
            real(path, ignore_errors=ignore_errors)

        patch.setattr(shutil, "rmtree", refuse)
        checkpoints.save(2, writer(), background=True)
        checkpoints.wait()
    assert len(said) == 1
    assert "step-000001 could not be removed: busy" in said[0]
    assert names(tmp_path) == [".removed-step-000001", "step-000002"]
    (tmp_path / ".step-000003.123.tmp").mkdir()
    opened(tmp_path)
    assert names(tmp_path) == ["step-000002"]


def legacy(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    save_file({"a": torch.arange(100.0)}, folder / "model.safetensors")
    torch.save({"step": 1, "m": torch.arange(1000.0)}, folder / "learner.pt")


def test_a_checkpoint_without_manifest_is_taken_with_a_message(tmp_path: Path) -> None:
    legacy(tmp_path / "step-000001")
    checkpoints, said = opened(tmp_path)
    assert checkpoints.latest() == tmp_path / "step-000001"
    assert len(said) == 1
    assert "no manifest.json" in said[0]
    assert not checkpoints.save(1, forbidden, background=False)


@pytest.mark.parametrize("file", ["model.safetensors", "learner.pt"])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_one_without_manifest_is_passed_over(tmp_path: Path, file: str, damage: str) -> None:
    legacy(tmp_path / "step-000001")
    path = tmp_path / "step-000001" / file
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[-20:]
    else:
        content[9 if file == "model.safetensors" else len(content) // 2] ^= 255
    path.write_bytes(content)
    checkpoints, said = opened(tmp_path)
    assert checkpoints.latest() is None
    assert names(tmp_path) == ["damaged-step-000001"]
    assert len(said) == 1
    assert file in said[0]


KILLED = """
    import sys
    from functools import partial
    from pathlib import Path
    from types import SimpleNamespace

    from rollout.checkpoints import Checkpoints

    def write(folder, step):
        for i in range(6):
            (folder / f"part-{i}").write_bytes(bytes([step % 256]) * 20_000)

    config = SimpleNamespace(keep_last=2, keep_every=0, keep_best=True)
    checkpoints = Checkpoints(Path(sys.argv[1]), config, print)
    latest = checkpoints.latest()
    first = 0 if latest is None else int(latest.name[5:])
    print("begin", first, flush=True)
    for step in range(first + 1, 100_000):
        said = partial(print, "saved", flush=True)
        checkpoints.save(step, partial(write, step=step), background=step % 2 == 0, on_saved=said)
"""


def test_a_kill_at_any_moment_loses_nothing_that_was_saved(tmp_path: Path) -> None:
    chance, saved = random.Random(0), 0
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert process.stdout is not None
        assert process.stdout.readline().split() == ["begin", str(saved)]
        lines = [process.stdout.readline() for _ in range(chance.randint(0, 2))]
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        said = [line.split() for line in [*lines, *process.communicate()[0].splitlines()]]
        assert all(words[0] == "saved" for words in said)
        told = int(said[-1][1]) if said else saved
        newest = latest_checkpoint(tmp_path)
        reached = 0 if newest is None else int(newest.name[5:])
        assert reached in (told, told + 1)  # the kill may fall between the folder's appearance and the word of it
        saved = reached
        if newest is not None:
            assert read_manifest(newest).step == reached
            assert verify_checkpoint(newest) is not None
            assert {path.read_bytes() for path in newest.glob("part-*")} == {bytes([reached % 256]) * 20_000}
    assert saved > 3
    _, said = opened(tmp_path)
    assert said == []
    assert all(name.startswith("step-") for name in names(tmp_path))
    assert len(names(tmp_path)) <= 3  # two, and one that a kill kept from being removed
