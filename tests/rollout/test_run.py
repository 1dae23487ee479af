"""The run folder: what it refuses, what it keeps, and that no crash or full disk costs what was there before."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rollout import durable, run
from rollout.durable import replacing, write_json
from rollout.errors import UserError
from rollout.provenance import git_state, versions
from rollout.records import Group, Sample, Task
from rollout.run import RunRecord, config_differences, read_metrics
from rollout.sample_table import Phase, read_samples
from tests.rollout.killing import killed_after
from verifiers.verdict import Verdict

ROOT = Path(__file__).resolve().parents[2]
TOML = 'name = "demo"\nseed = 0\n[grpo]\nkl_coef = 0.001\nclip = [0.2, 0.28]\n'


def open_run(folder: Path, toml: str = TOML, *, resume: bool = False) -> RunRecord:
    return RunRecord.open(folder, tomllib.loads(toml), toml, resume=resume)


def make_group(row: int, *, num_samples: int = 2, answer: Any = 133, text: str = "<answer>133</answer>") -> Group:
    task = Task(task_id=f"demo/{row}", prompt=f"question {row}", answer=answer)
    verdict = Verdict(score=1.2, status="correct", reason="133 is right", extracted="133", parts={"accuracy": 1.0})
    sample = Sample(
        task_id=task.task_id,
        sample_index=0,
        prompt_ids=(1, 2),
        completion_ids=(5, 6, 7),
        rollout_logprobs=np.zeros(3, np.float32),
        policy_versions=(3, 4),
        finish_reason="stop",
        completion_text=text,
        verdict=verdict,
        advantage=-0.5,
    )
    return Group(task=task, samples=tuple(replace(sample, sample_index=index) for index in range(num_samples)))


def write_step(record: RunRecord, step: int, phase: Phase = "train", **group: Any) -> None:
    record.write_samples(step, [make_group(step, **group)], phase, [f"prompt {step}"])


def steps_and_phases(rows: Sequence[Mapping[str, Any]]) -> set[tuple[int, str]]:
    return {(row["step"], row["phase"]) for row in rows}


def every_row(folder: Path) -> list[dict[str, Any]]:
    phases: tuple[Phase, ...] = ("eval_before", "train", "eval_after")
    return [row for phase in phases for row in read_samples(folder, phase)]


def all_rows(folder: Path) -> set[tuple[int, str]]:
    return steps_and_phases(every_row(folder))


@contextmanager
def disk_with(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond `num_bytes`: the kernel writes up to there and then fails, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_new_folder_says_what_it_runs_on(tmp_path: Path) -> None:
    with open_run(tmp_path / "runs" / "demo") as record:
        folder = record.run_dir
        assert (folder / "config.toml").read_text() == TOML
        found = json.loads((folder / "versions.json").read_text())
        assert found["python"] == ".".join(map(str, sys.version_info[:3]))
        assert found["packages"]["numpy"] == np.__version__
        assert found["cores"] == os.cpu_count()
        assert (folder / "git.json").exists()
        assert (folder / "git.diff").exists()
        assert record.command_to_resume == f"groupzero train {folder}/config.toml"
        assert record.log_path("vllm") == folder / "logs" / "vllm.log"
        assert (folder / "logs").is_dir()


def test_git_state_of_a_repository_with_changes(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "kept.py").write_text("x = 1\n")
    for command in (["init", "-q"], ["add", "kept.py"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert git_state(tmp_path) == (
        {"root": str(tmp_path.resolve()), "commit": commit, "dirty": False, "untracked": []},
        b"",
    )
    (tmp_path / "kept.py").write_text("x = 2\n")
    (tmp_path / "new.py").write_text("y\n")
    state, diff = git_state(tmp_path)
    assert state["dirty"] is True
    assert state["untracked"] == ["new.py"]
    assert b"-x = 1\n+x = 2\n" in diff


def test_git_state_without_a_repository_or_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    state, diff = git_state(tmp_path)
    assert state["commit"] is None
    assert "not a git repository" in state["reason"]
    assert diff.decode() == f"# no diff: {state['reason']}\n"
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path)[0] == {"commit": None, "dirty": None, "reason": "git is not installed"}
    assert versions()["gpus"] == []


def test_another_config_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    open_run(tmp_path / "demo").close()
    with pytest.raises(UserError) as caught:
        open_run(tmp_path / "demo", TOML.replace("0.001", "0.01").replace("seed = 0\n", "steps = 5\n"))
    text = str(caught.value)
    assert "seed: 0 -> (not set)" in text
    assert "grpo.kl_coef: 0.001 -> 0.01" in text
    assert "steps: (not set) -> 5" in text
    assert "another name" in text
    assert "seed=0 grpo.kl_coef=0.001 (leave out steps)" in text
    assert "removed without loss" in text
    assert "clip" not in text
    assert (tmp_path / "demo" / "config.toml").read_text() == TOML


def test_config_differences_compare_values_not_spelling() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "d": None, "e": "x"}
    assert config_differences(old, {"e": "x", "a": {"c": [1, 2], "b": 1.0}}) == []
    assert config_differences(old, {"a": {"b": 1, "c": [1]}, "e": "x"}) == [("a.c", [1, 2], [1])]


@pytest.mark.parametrize("resume", [False, True])
def test_the_same_config_goes_on_with_an_unfinished_run_and_a_finished_one_is_refused(
    tmp_path: Path, resume: bool
) -> None:
    folder = tmp_path / "demo"
    with open_run(folder) as record:
        assert not record.resumed
        record.record({"step": 0, "reward_mean": 0.5})
    first = (folder / "versions.json").read_bytes()
    for number in (1, 2):
        with open_run(folder, resume=resume) as record:
            assert record.resumed
            assert (folder / "resumes" / f"00{number}" / "versions.json").exists()
    assert (folder / "versions.json").read_bytes() == first
    assert read_metrics(folder) == [{"step": 0, "reward_mean": 0.5}]
    with open_run(folder, resume=resume) as record:
        record.write_json("summary", {"num_steps": 1})
    with pytest.raises(UserError, match=r"finished run; its report is .*demo/report\.html"):
        open_run(folder, resume=resume)


def test_resume_without_a_run_and_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run to resume in .*nowhere"):
        open_run(tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    with pytest.raises(UserError, match=r"isn't a run's folder.*cat\.jpg"):
        open_run(tmp_path / "photos")
    assert sorted(path.name for path in (tmp_path / "photos").iterdir()) == ["cat.jpg"]
    with pytest.raises(UserError, match="is a file"):
        open_run(tmp_path / "photos" / "cat.jpg")


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    code = (
        "import sys, time, tomllib; from pathlib import Path; from rollout.run import RunRecord\n"
        f"toml = {TOML!r}\n"
        f"record = RunRecord.open(Path({str(tmp_path / 'demo')!r}), tomllib.loads(toml), toml, resume=False)\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        with pytest.raises(UserError, match=rf"in use by another run \(pid {holder.pid} on "):
            open_run(tmp_path / "demo")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    open_run(tmp_path / "demo").close()


def test_the_same_process_is_refused_too_and_a_failed_open_frees_the_lock(tmp_path: Path) -> None:
    with open_run(tmp_path / "demo"), pytest.raises(UserError, match=rf"pid {os.getpid()} "):
        open_run(tmp_path / "demo")
    with pytest.raises(UserError, match="another config"):
        open_run(tmp_path / "demo", TOML + "x = 1\n")
    record = open_run(tmp_path / "demo")
    record.close()
    record.close()


def test_metrics_are_plain_json_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    with open_run(tmp_path / "demo") as record:
        record.record({"step": np.int64(0), "loss": float("nan"), "grad_norm": np.float32("inf"), "reward_mean": 0.5})
        record.record({"step": 1, "loss": np.float32(0.25), "eval_pass_at_1": None})
        lines = (tmp_path / "demo" / "metrics.jsonl").read_text().splitlines()
        first = json.loads(lines[0], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert first == {
            "step": 0,
            "loss": None,
            "grad_norm": None,
            "reward_mean": 0.5,
            "non_finite": {"loss": "nan", "grad_norm": "inf"},
        }
        assert read_metrics(record.run_dir)[1] == {"step": 1, "loss": 0.25, "eval_pass_at_1": None}
        with pytest.raises(TypeError, match="loss: a object can't be written"):
            record.record({"loss": object()})


def test_a_half_written_last_line_is_dropped_and_a_broken_one_before_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    with open_run(folder) as record:
        record.record({"step": 0})
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 1, "loss": 0.')
        assert read_metrics(folder) == [{"step": 0}]
    with open_run(folder, resume=True) as record:
        record.record({"step": 1})
        assert read_metrics(folder) == [{"step": 0}, {"step": 1}]
        (folder / "metrics.jsonl").write_text('{"step": 0}\nnonsense\n{"step": 1}\n')
        with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
            read_metrics(folder)
    assert read_metrics(tmp_path) == []


def test_samples_keep_every_column_through_the_merge(tmp_path: Path) -> None:
    with open_run(tmp_path / "demo") as record:
        write_step(record, 7, answer={"value": [1, 2]}, text="é \ud800 <b>")
        assert record.finish_samples() == tmp_path / "demo" / "samples.parquet"
        assert not (tmp_path / "demo" / "samples").exists()
        rows = pq.read_table(tmp_path / "demo" / "samples.parquet").to_pylist()
    assert rows[1] == {
        "step": 7,
        "phase": "train",
        "task_id": "demo/7",
        "sample_index": 1,
        "prompt": "prompt 7",
        "completion": "é ? <b>",
        "answer": '{"value": [1, 2]}',
        "score": 1.2,
        "status": "correct",
        "reason": "133 is right",
        "extracted": "133",
        "parts": '{"accuracy": 1.0}',
        "elapsed_s": 0.0,
        "advantage": -0.5,
        "used": True,
        "num_completion_tokens": 3,
        "finish_reason": "stop",
        "policy_version_first": 3,
        "policy_version_last": 4,
    }


def test_samples_that_were_not_learned_from_are_told_apart(tmp_path: Path) -> None:
    learned = make_group(0)
    left_out = replace(make_group(1), samples=tuple(replace(s, advantage=None) for s in make_group(1).samples))
    with open_run(tmp_path / "demo") as record:
        record.write_samples(0, [learned, left_out], "train", ["a", "b"])
        record.write_samples(0, [left_out], "eval_before", ["b"])
        record.finish_samples()
        train, before = read_samples(record.run_dir, "train"), read_samples(record.run_dir, "eval_before")
    assert [(row["task_id"], row["used"], row["advantage"]) for row in train] == [
        *[("demo/0", True, -0.5)] * 2,
        *[("demo/1", False, None)] * 2,
    ]
    assert [row["used"] for row in before] == [None, None]


def test_samples_of_a_step_written_again_replace_the_former(tmp_path: Path) -> None:
    with open_run(tmp_path / "demo") as record:
        write_step(record, 0, text="old")
        write_step(record, 0, text="new")
        record.finish_samples()
        write_step(record, 0, text="newest", num_samples=3)
        write_step(record, 1)
        assert [row["completion"] for row in read_samples(record.run_dir, "train") if row["step"] == 0] == [
            "newest"
        ] * 3
        record.finish_samples()
        rows = read_samples(record.run_dir, "train")
        assert [row["completion"] for row in rows if row["step"] == 0] == ["newest"] * 3
        assert len(rows) == 5


def test_a_crash_between_merge_and_clean_up_doubles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_run(tmp_path / "demo") as record:
        for step in range(3):
            write_step(record, step)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
            record.finish_samples()
        assert len(list((record.run_dir / "samples").glob("*.parquet"))) == 3
        assert len(read_samples(record.run_dir, "train")) == 6
        record.finish_samples()
        assert pq.read_table(record.run_dir / "samples.parquet").num_rows == 6


@pytest.mark.parametrize("merged", [False, True])
def test_truncate_forgets_what_is_done_again(tmp_path: Path, merged: bool) -> None:
    with open_run(tmp_path / "demo") as record:
        write_step(record, 0, "eval_before")
        for step in range(4):
            record.record({"step": step})
            write_step(record, step)
        write_step(record, 4, "eval_after")
        if merged:
            record.finish_samples()
        record.truncate(2)
        assert [line["step"] for line in read_metrics(record.run_dir)] == [0, 1]
        assert all_rows(record.run_dir) == {(0, "eval_before"), (0, "train"), (1, "train")}
        record.truncate(0)
        assert read_metrics(record.run_dir) == []
        assert all_rows(record.run_dir) == {(0, "eval_before")}
        write_step(record, 0)
        record.finish_samples()
        assert all_rows(record.run_dir) == {(0, "eval_before"), (0, "train")}


def test_a_run_without_samples_has_an_empty_table(tmp_path: Path) -> None:
    with open_run(tmp_path / "demo") as record:
        assert pq.read_table(record.finish_samples()).num_rows == 0


def test_wrong_calls_say_what_is_wrong(tmp_path: Path) -> None:
    with open_run(tmp_path / "demo") as record:
        with pytest.raises(ValueError, match="1 prompts for 2 groups"):
            record.write_samples(0, [make_group(0), make_group(1)], "train", ["only one"])
        with pytest.raises(ValueError, match="phase is one of train, eval_before, eval_after"):
            record.write_samples(0, [], "eval", [])  # pyright: ignore[reportArgumentType]


def test_a_full_disk_leaves_the_former_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"pass_at_1_after": 0.9})
    with disk_with(100), pytest.raises(UserError, match=r"could not write .*summary\.json"):
        write_json(path, {"text": "x" * 1000})
    assert json.loads(path.read_text()) == {"pass_at_1_after": 0.9}

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable.os, "fsync", no_space)
    with pytest.raises(UserError, match=r"No space left on device.*free some space"):
        write_json(path, {"pass_at_1_after": 0.1})
    assert json.loads(path.read_text()) == {"pass_at_1_after": 0.9}
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_a_full_disk_cuts_no_line_of_the_metrics(tmp_path: Path) -> None:
    with open_run(tmp_path / "demo") as record:
        record.record({"step": 0})
        size = (record.run_dir / "metrics.jsonl").stat().st_size
        with disk_with(size + 10), pytest.raises(UserError, match=r"could not write .*metrics\.jsonl"):
            record.record({"step": 1, "text": "x" * 100})
        assert (record.run_dir / "metrics.jsonl").read_text() == '{"step": 0}\n'
        record.record({"step": 1})
        assert [line["step"] for line in read_metrics(record.run_dir)] == [0, 1]


def test_a_full_disk_while_merging_keeps_the_parts_and_the_former_table(tmp_path: Path) -> None:
    with open_run(tmp_path / "demo") as record:
        write_step(record, 0)
        record.finish_samples()
        before = (record.run_dir / "samples.parquet").read_bytes()
        write_step(record, 1)
        with disk_with(2000), pytest.raises(UserError, match=r"could not write .*samples\.parquet"):
            record.finish_samples()
        assert (record.run_dir / "samples.parquet").read_bytes() == before
        assert all_rows(record.run_dir) == {(0, "train"), (1, "train")}
        assert pq.read_table(record.finish_samples()).num_rows == 4


def kill_everywhere(prepare: Callable[[Path], object], action: Callable[[Path], None], base: Path) -> Iterator[Path]:
    """The folders that are left when `action` is killed before each of the changes it makes to files."""
    for survives in range(300):
        folder = base / str(survives)
        prepare(folder)
        if not killed_after(survives, partial(action, folder)):
            return
        yield folder
    pytest.fail("the action never came to its end")


def test_a_start_that_was_killed_anywhere_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    count = 0
    for folder in kill_everywhere(lambda _: None, lambda folder: open_run(folder).close(), tmp_path):
        open_run(folder).close()
        assert (folder / "config.toml").read_text() == TOML
        assert {"versions.json", "git.json", "git.diff"} <= {path.name for path in folder.iterdir()}
        assert not list(folder.glob(".*.tmp"))
        count += 1
    assert count >= 12


def test_what_a_killed_process_was_writing_is_cleared_away(tmp_path: Path) -> None:
    with open_run(tmp_path / "demo") as record:
        write_step(record, 0)
    halves = [tmp_path / "demo" / name for name in (".summary.json.tmp", "samples/.00000001-train.parquet.tmp")]
    for half in halves:
        half.write_bytes(b"half")
    with open_run(tmp_path / "demo") as record:
        assert [half.exists() for half in halves] == [False, False]
        record.finish_samples()
        assert all_rows(record.run_dir) == {(0, "train")}
        assert not (record.run_dir / "samples").exists()


def test_steps_done_again_after_a_kill_anywhere_are_there_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's samples and metrics, the end of a run, and forgetting: killed in each, gone on with from step 1."""
    monkeypatch.setattr(run, "write_provenance", lambda folder, source: write_json(folder / "versions.json", {}))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # SIGKILL loses nothing that was written

    def life(folder: Path) -> None:
        with open_run(folder) as record:
            record.truncate(1)
            write_step(record, 1)
            record.record({"step": 1, "reward_mean": 0.25})
            record.finish_samples()

    begun = tmp_path / "begun"
    with open_run(begun) as record:
        write_step(record, 0, "eval_before")
        for step in range(3):
            if step == 2:
                record.finish_samples()
            write_step(record, step)
            record.record({"step": step, "reward_mean": 0.5})
    count = 0
    for folder in kill_everywhere(lambda folder: shutil.copytree(begun, folder), life, tmp_path):
        life(folder)
        assert read_metrics(folder) == [{"step": 0, "reward_mean": 0.5}, {"step": 1, "reward_mean": 0.25}]
        rows = [(row["step"], row["phase"], row["sample_index"]) for row in every_row(folder)]
        wanted = [(0, "eval_before"), (0, "train"), (1, "train")]
        assert sorted(rows) == [(*pair, index) for pair in wanted for index in range(2)]
        assert not (folder / "samples").exists()
        count += 1
    assert count >= 25


def test_metrics_cut_at_any_byte_keep_every_whole_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "write_provenance", lambda folder, source: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    folder = tmp_path / "demo"
    open_run(folder).close()
    line = '{"step": 0, "text": "é"}\n'.encode()
    for cut in range(3 * len(line) + 1):
        (folder / "metrics.jsonl").write_bytes((line * 3)[:cut])
        whole = (cut + 1) // len(line)  # the newline alone is no loss
        assert [metrics["step"] for metrics in read_metrics(folder)] == [0] * whole
        with open_run(folder) as record:
            record.record({"step": 9})
        assert [metrics["step"] for metrics in read_metrics(folder)] == [*[0] * whole, 9]


def test_an_interrupted_write_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
