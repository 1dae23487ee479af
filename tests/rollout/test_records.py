"""The records are frozen and keyword-only, and seeds come from content alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.records import Group, Sample, Task, seed_for
from verifiers.verdict import Verdict

SAMPLE = Sample(
    task_id="toy/0",
    sample_index=0,
    prompt_ids=(1, 2),
    completion_ids=(3,),
    rollout_logprobs=np.array([-0.5]),
    policy_versions=(0, 0),
    finish_reason="stop",
    completion_text="3",
)
TASK = Task(task_id="toy/0", prompt="1 + 2", answer=3)
LAW = settings(deadline=None, derandomize=True, max_examples=200)
PARTS = st.tuples(
    st.integers(0, 10**6),
    st.integers(-1, 10**6),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20),
    st.integers(0, 64),
)


@LAW
@given(PARTS, PARTS)
def test_seeds_are_31_bits_of_their_content(one: tuple[int, int, str, int], other: tuple[int, int, str, int]) -> None:
    assert 0 <= seed_for(*one) < 2**31
    assert seed_for(*one) == seed_for(*one)
    assert (seed_for(*one) == seed_for(*other)) == (one == other)


def test_seeds_never_change_between_versions() -> None:
    """A resumed run, and one that repeats a published one, draw the same numbers."""
    assert seed_for(0, 0, "toy/0", 0) == 2009951870
    assert seed_for(7, -1, "gsm8k/test/12", 15) == 438141790


def test_the_parts_of_a_seed_do_not_run_into_each_other() -> None:
    parts = [(1, 23, "4", 5), (12, 3, "4", 5), (1, 2, "34", 5), (1, 23, "", 45), (1, 23, "45", 0), (1, 23, "4", 50)]
    assert len({seed_for(*part) for part in parts}) == len(parts)


def test_the_seeds_of_a_run_hardly_ever_meet() -> None:
    seeds = [seed_for(0, step, f"t/{task}", i) for step in range(10) for task in range(40) for i in range(20)]
    assert len(seeds) - len(set(seeds)) <= 3  # 8000 of 2^31: 0.015 expected


@pytest.mark.parametrize("record", [TASK, SAMPLE, Group(task=TASK, samples=(SAMPLE,))])
def test_records_are_frozen_and_keyword_only(record: Any) -> None:
    first = dataclasses.fields(record)[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, first.name, "other")
    with pytest.raises(TypeError):
        type(record)("by position")


def test_verdict_and_advantage_are_filled_on_a_copy() -> None:
    verdict = Verdict(score=1.0, status="correct", reason="3 equals 3")
    filled = dataclasses.replace(SAMPLE, verdict=verdict, advantage=0.5)
    assert filled.verdict is verdict
    assert filled.advantage == 0.5
    assert (SAMPLE.verdict, SAMPLE.advantage) == (None, None)
    assert filled.rollout_logprobs is SAMPLE.rollout_logprobs


def test_tasks_do_not_share_their_metadata() -> None:
    assert TASK.metadata == {}
    assert TASK.verifier == ""
    assert Task(task_id="a", prompt="", answer=0).metadata is not TASK.metadata
