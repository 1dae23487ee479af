"""The journal: what is read is what was written, bit for bit, or nothing."""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.engine import SamplingParams
from rollout.errors import UserError
from rollout.journal import Call, RolloutJournal
from rollout.records import Group, Sample, SamplingMask, Task
from tests.rollout.killing import killed_after
from verifiers.verdict import Verdict

CALL = Call(3, 1, seed=5, group_size=2, params=SamplingParams(stop_token_ids=(7, 9)), policy_version=4)
VERDICT = Verdict(
    score=1 / 3,
    status="correct",
    reason="é \ud800",
    extracted="133",
    parts={"accuracy": 0.1, "length": -0.0},
    elapsed_s=1e-7,
)


def make_groups(num_tasks: int = 2, **sample: Any) -> list[Group]:
    groups = []
    for number in range(num_tasks):
        task = Task(task_id=f"demo/{number}", prompt=f"question {number}", answer={"value": [number]})
        samples = tuple(make_sample(task.task_id, index, **sample) for index in range(CALL.group_size))
        groups.append(Group(task=task, samples=samples))
    return groups


def make_sample(task_id: str, index: int, **other: Any) -> Sample:
    values: dict[str, Any] = {
        "prompt_ids": (1, 2),
        "completion_ids": (5, 6, 7 + index),
        "rollout_logprobs": np.array([-0.1, -2.5, 0.0], np.float32),
        "policy_versions": (4, 4),
        "finish_reason": "stop",
        "completion_text": f"answer {index}",
        "verdict": VERDICT,
    }
    return Sample(task_id=task_id, sample_index=index, **(values | other))


def bits(groups: Sequence[Group]) -> list[Any]:
    """Everything in the groups, arrays as their type, shape and bytes."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return str(value.dtype), value.shape, value.tobytes()
        return tuple(plain(item) for item in value) if isinstance(value, tuple) else value

    return [
        (group.task, [{key: plain(value) for key, value in vars(s).items()} for s in group.samples]) for group in groups
    ]


def journal(folder: Path) -> tuple[RolloutJournal, list[str]]:
    messages: list[str] = []
    return RolloutJournal(folder, messages.append), messages


def write(folder: Path, groups: Sequence[Group], call: Call = CALL) -> None:
    own, _ = journal(folder)
    own.write_samples(call, groups)
    own.write_verdicts(call, groups)


def tasks_of(groups: Sequence[Group]) -> list[Task]:
    return [group.task for group in groups]


@st.composite
def samples(draw: st.DrawFn, task_id: str, index: int) -> Sample:
    length = draw(st.integers(0, 5))
    raw = draw(st.binary(min_size=4 * length, max_size=4 * length))  # any float32: NaNs with their payload, -0.0, inf
    ids = st.lists(st.integers(0, 2**31 - 1), min_size=length, max_size=length).map(tuple)
    masks = st.builds(
        SamplingMask,
        st.lists(st.integers(0, 2**62), max_size=4).map(lambda values: np.array(values, np.int64)),
        st.lists(st.integers(0, 2**31 - 1), max_size=4).map(lambda values: np.array(values, np.int32)),
    )
    shape = (length, draw(st.integers(0, 2)), 2)
    routed = draw(st.none() | st.sampled_from(["int16", "int32", "uint8"]))
    return make_sample(
        task_id,
        index,
        prompt_ids=draw(st.lists(st.integers(0, 2**31 - 1), max_size=3).map(tuple)),
        completion_ids=draw(ids),
        rollout_logprobs=np.frombuffer(raw, np.float32),
        policy_versions=draw(st.tuples(st.integers(0, 9), st.integers(0, 9))),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        completion_text=draw(st.text(st.characters(exclude_categories=()))),
        sampling_mask=draw(st.none() | masks),
        routed_experts=None if routed is None else np.arange(np.prod(shape)).astype(routed).reshape(shape),
        num_draft_tokens=draw(st.integers(0, 9)),
        num_accepted_tokens=draw(st.integers(0, 9)),
        verdict=draw(st.none() | st.just(VERDICT)),
    )


@settings(deadline=None, derandomize=True, max_examples=40)
@given(data=st.data())
def test_what_is_read_is_what_was_written(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    groups = [
        replace(group, samples=tuple(data.draw(samples(s.task_id, s.sample_index)) for s in group.samples))
        for group in make_groups()
    ]
    folder = tmp_path_factory.mktemp("journal")
    write(folder, groups)
    own, messages = journal(folder)
    read = own.read(CALL, tasks_of(groups))
    assert messages == []
    assert read is not None
    assert bits(read) == bits(groups)


def test_samples_without_verdicts_come_back_without(tmp_path: Path) -> None:
    groups = make_groups()
    own, messages = journal(tmp_path)
    assert own.read(CALL, tasks_of(groups)) is None
    own.write_samples(CALL, groups)
    read = own.read(CALL, tasks_of(groups))
    assert read is not None
    assert [sample.verdict for group in read for sample in group.samples] == [None] * 4
    assert messages == []


@pytest.mark.parametrize("status", ["correct", "wrong", "unparsable", "error", "timeout"])
def test_verdicts_of_a_verifier_that_failed_are_not_kept(tmp_path: Path, status: Any) -> None:
    verdict = replace(VERDICT, status=status)
    groups = make_groups(verdict=verdict)
    write(tmp_path, groups)
    read = journal(tmp_path)[0].read(CALL, tasks_of(groups))
    assert read is not None
    kept = None if status in ("error", "timeout") else verdict
    assert [sample.verdict for group in read for sample in group.samples] == [kept] * 4


def test_verdicts_of_other_completions_are_not_used(tmp_path: Path) -> None:
    write(tmp_path, make_groups())
    own, messages = journal(tmp_path)
    anew = make_groups(completion_text="drawn anew")
    own.write_samples(CALL, anew)  # and killed before these were scored
    read = own.read(CALL, tasks_of(anew))
    assert read is not None
    assert [(s.completion_text, s.verdict) for group in read for s in group.samples] == [("drawn anew", None)] * 4
    assert ["samples are scored again: it is of another call (completions)" in text for text in messages] == [True]


@pytest.mark.parametrize("kind", ["samples", "verdicts"])
def test_damage_anywhere_is_seen_and_told(tmp_path: Path, kind: str) -> None:
    groups = make_groups()
    write(tmp_path, groups)
    (path,) = tmp_path.glob(f"*.{kind}")
    whole = path.read_bytes()
    places = [*range(0, len(whole), 37), len(whole) - 1]
    damaged = [whole[:place] for place in places]
    damaged += [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in places]
    for data in [*damaged, b"", whole + b"x", b"\0" * len(whole)]:
        path.write_bytes(data)
        own, messages = journal(tmp_path)
        read = own.read(CALL, tasks_of(groups))
        assert [str(path) in text for text in messages] == [True]
        if kind == "samples":
            assert read is None
        else:
            assert read is not None
            assert [sample.verdict for group in read for sample in group.samples] == [None] * 4
    path.write_bytes(whole)
    read = journal(tmp_path)[0].read(CALL, tasks_of(groups))
    assert read is not None
    assert bits(read) == bits(groups)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 6}, "seed 5 -> 6"),
        ({"group_size": 1}, "group_size 2 -> 1"),
        ({"policy_version": 5}, "policy_version 4 -> 5"),
        ({"params": SamplingParams(temperature=0.9, stop_token_ids=(7, 9))}, "'temperature': 1.0"),
        ({"draw": 8}, "draw 3 -> 8"),
        ({"number": 0}, "number 1 -> 0"),
    ],
)
def test_a_file_of_another_call_is_not_used(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    groups = make_groups()
    write(tmp_path, groups)
    other = replace(CALL, **change)
    (path,) = tmp_path.glob("*.samples")
    foreign = tmp_path / f"draw-{other.draw:08d}-call-{other.number:05d}.samples"
    if foreign != path:
        path.rename(foreign)
    own, messages = journal(tmp_path)
    assert own.read(other, tasks_of(groups)) is None
    assert [named in text for text in messages] == [True], messages


def test_a_file_of_other_tasks_is_not_used(tmp_path: Path) -> None:
    groups = make_groups()
    write(tmp_path, groups)
    tasks = tasks_of(groups)
    changed = [replace(tasks[1], answer=0), replace(tasks[1], task_id="demo/2"), replace(tasks[1], metadata={"a": 1})]
    for other in ([tasks[0], task] for task in changed):
        own, messages = journal(tmp_path)
        assert own.read(CALL, other) is None
        assert ["another call (tasks)" in text for text in messages] == [True]
    assert journal(tmp_path)[0].read(CALL, [tasks[1], tasks[0]]) is None
    assert journal(tmp_path)[0].read(CALL, tasks) is not None


def test_pruning_removes_earlier_draws_alone(tmp_path: Path) -> None:
    groups = make_groups()
    calls = [replace(CALL, draw=draw, number=number) for draw in (9, 10, 11) for number in range(2)]
    for call in calls:
        write(tmp_path, groups, call)
    own, _ = journal(tmp_path)
    own.prune(10)
    there = [own.read(call, tasks_of(groups)) is not None for call in calls]
    assert there == [False, False, True, True, True, True]
    assert len(list(tmp_path.iterdir())) == 8
    (tmp_path / "draw-copy").write_text("somebody's")
    own.prune(10)
    own.remove()
    assert not tmp_path.exists()
    own.prune(99)
    own.write_samples(CALL, groups)
    assert own.read(CALL, tasks_of(groups)) is not None


def test_what_a_killed_process_was_writing_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".draw-00000003-call-00001.samples.tmp").write_bytes(b"half")
    journal(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_that_keeps_what_was_there(tmp_path: Path) -> None:
    groups = make_groups()
    write(tmp_path, groups)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(UserError, match=r"could not write .*\.samples"):
            journal(tmp_path)[0].write_samples(CALL, make_groups(completion_text=os.urandom(999).hex()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    read = journal(tmp_path)[0].read(CALL, tasks_of(groups))
    assert read is not None
    assert bits(read) == bits(groups)


def test_a_kill_while_writing_leaves_the_whole_call_or_nothing(tmp_path: Path) -> None:
    """The process dies before each of its system calls that change the folder, one after the other."""
    groups, unscored = make_groups(), make_groups(verdict=None)
    found = []
    for survives in range(20):
        folder = tmp_path / str(survives)
        if killed_after(survives, partial(write, folder, groups)):
            own, messages = journal(folder)
            read = own.read(CALL, tasks_of(groups))
            assert messages == []
            assert read is None or bits(read) in (bits(groups), bits(unscored))
            found.append(None if read is None else read[0].samples[0].verdict)
        else:
            break
    else:
        pytest.fail("the writer never came to its end")
    assert bits(journal(folder)[0].read(CALL, tasks_of(groups)) or []) == bits(groups)
    assert len(found) >= 6
    assert VERDICT in found
