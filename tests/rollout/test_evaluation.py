"""pass@1, pass@k and majority@k against counting by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.engine import Completion, SamplingParams
from rollout.evaluation import EVAL_STEP, evaluate, is_correct, majority_at_k, pass_at_k
from rollout.records import Sample, Task, seed_for
from rollout.sampling import Prompter
from verifiers.pool import ScorePool
from verifiers.verdict import Status, Verdict

if TYPE_CHECKING:
    from torch import Tensor


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(correct: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(correct)))
    subsets = list(combinations(correct, k))
    expected = sum(map(any, subsets)) / len(subsets)
    assert pass_at_k(len(correct), sum(correct), k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_at_its_ends() -> None:
    assert pass_at_k(16, 0, 8) == 0.0
    assert pass_at_k(16, 16, 8) == 1.0
    assert pass_at_k(16, 4, 1) == 0.25
    assert pass_at_k(1000, 1, 1000) == 1.0
    assert pass_at_k(2000, 3, 64) == pytest.approx(0.0930, abs=1e-4)  # no overflow in the binomials


@pytest.mark.parametrize("k", [0, 5, -1])
def test_pass_at_k_needs_k_samples(k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} can't be estimated from 4 samples"):
        pass_at_k(4, 2, k)


def sample(mark: str) -> Sample:
    """`+` correct, `+x` correct and written x, `-` no answer, `!` a failed verifier, anything else a wrong answer."""
    status: Status = "correct" if mark[0] == "+" else {"-": "unparsable", "!": "error"}.get(mark, "wrong")  # type: ignore[assignment]
    extracted = None if mark in "-!" else mark
    return Sample(
        task_id="t",
        sample_index=0,
        prompt_ids=(1,),
        completion_ids=(2,),
        rollout_logprobs=np.zeros(1),
        policy_versions=(0, 0),
        finish_reason="stop",
        completion_text="",
        verdict=Verdict(score=0.0, status=status, reason="", extracted=extracted),
    )


@pytest.mark.parametrize(
    ("marks", "k", "expected"),
    [
        ("+ + 7", 3, 1.0),
        ("+ 7 7", 3, 0.0),
        ("+ 7 7 + +", 5, 1.0),
        ("+1,200 +1200 7 7 +1200.0", 5, 1.0),  # correct however it is written
        ("+ 7", 2, 1.0),  # a tie: the one that came first
        ("7 +", 2, 0.0),
        ("7 8 + 9", 4, 0.0),
        ("8 + + 8", 4, 0.0),
        ("- - - +", 4, 1.0),  # no answer is no vote
        ("! ! 7 -", 4, 0.0),
        ("- - -", 3, 0.0),  # nobody votes
        ("+ + 7 7 7 +", 3, 0.5),  # two runs of three
        ("+ + 7 7 7", 3, 1.0),  # the rest after the last whole run does not count
        ("+ 7 7 +", 1, 0.5),
    ],
)
def test_majorities_by_hand(marks: str, k: int, expected: float) -> None:
    assert majority_at_k([sample(mark) for mark in marks.split()], k) == expected


def test_only_the_status_makes_a_sample_correct() -> None:
    assert is_correct(sample("+"))
    assert not any(is_correct(sample(mark)) for mark in "7-!")


class ScriptedEngine:
    """Answers task i's sample by a script; at temperature 0 with the first character of the greedy script."""

    name = "scripted"
    policy_version = 0

    def __init__(self, scripts: list[str], greedy: str) -> None:
        self.scripts, self.greedy = scripts, greedy
        self.calls: list[tuple[SamplingParams, list[int]]] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        self.calls.append((params, list(seeds)))
        script = self.greedy if params.temperature == 0 else "".join(self.scripts)
        assert len(prompts) == len(seeds) == len(script)
        # One token per answer, and one more for a wrong one.
        tokens = [[ord(c)] if c == "1" else [ord(c), 0] for c in script]
        return [
            Completion(token_ids=ids, logprobs=[-1.0] * len(ids), finish_reason="stop", policy_version=0)
            for ids in tokens
        ]

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None: ...

    def close(self) -> None: ...


class OnePool:
    """ "1" is correct, "?" has no answer, any other character is a wrong answer."""

    def score(self, completions: Sequence[str], tasks: Sequence[Task]) -> list[Verdict]:
        statuses: dict[str, Status] = {"1": "correct", "?": "unparsable"}
        return [
            Verdict(score=0, status=statuses.get(c, "wrong"), reason="", extracted=None if c == "?" else c)
            for c in completions
        ]


class Characters:
    """A tokenizer of characters by code point; id 0 is the end."""

    eos_token_id = pad_token_id = 0
    chat_template = None

    def __len__(self) -> int:
        return 256

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    def decode(self, ids: Sequence[int], **_: bool) -> str:
        return "".join(map(chr, ids))


TASKS = [Task(task_id=f"held/{i}", prompt=f"q{i}", answer=1) for i in range(3)]
SCRIPTS = ["1177", "2222", "?31?"]


def measure(engine: ScriptedEngine, *, greedy: bool = True, seed: int = 4):
    prompter = Prompter(cast(SimpleNamespace, Characters()), "plain", 64, 8)  # type: ignore[arg-type]
    params = SamplingParams(temperature=0.7, top_p=0.9, max_completion_tokens=8, stop_token_ids=(0,))
    pool = cast(ScorePool, OnePool())
    return evaluate(engine, prompter, pool, TASKS, params, num_samples=4, k=2, seed=seed, greedy=greedy)


def test_the_means_are_those_counted_by_hand() -> None:
    result, groups = measure(ScriptedEngine(SCRIPTS, "1?1"))
    assert result.pass_at_1 == pytest.approx(3 / 12)
    assert result.pass_at_k == pytest.approx((5 / 6 + 0 + 3 / 6) / 3)
    assert result.majority_at_k == pytest.approx((1 / 2 + 0 + 1 / 2) / 3)
    assert result.greedy == pytest.approx(2 / 3)
    assert (result.k, result.num_problems, result.num_samples) == (2, 3, 4)
    assert result.completion_tokens_mean == pytest.approx((3 * 1 + 9 * 2) / 12)
    assert ["".join(s.completion_text for s in group.samples) for group in groups] == SCRIPTS
    assert [group.task for group in groups] == TASKS
    assert result.to_dict()["pass_at_1"] == result.pass_at_1


def test_seeds_are_of_a_step_that_no_training_has_and_come_again() -> None:
    engine, again, other = (ScriptedEngine(SCRIPTS, "111") for _ in range(3))
    measure(engine)
    measure(again)
    measure(other, seed=5)
    expected = [seed_for(4, EVAL_STEP, f"held/{task}", index) for task in range(3) for index in range(4)]
    assert EVAL_STEP < 0
    assert engine.calls[0][1] == expected
    assert again.calls == engine.calls
    assert not set(other.calls[0][1]) & set(expected)


def test_greedy_takes_one_sample_at_temperature_zero_only_if_asked_for() -> None:
    engine = ScriptedEngine(SCRIPTS, "111")
    measure(engine)
    assert [params.temperature for params, _ in engine.calls] == [0.7, 0.0]
    best, seeds = engine.calls[1]
    assert (best.max_completion_tokens, best.stop_token_ids, len(seeds)) == (8, (0,), 3)
    without = ScriptedEngine(SCRIPTS, "111")
    result, _ = measure(without, greedy=False)
    assert result.greedy is None
    assert len(without.calls) == 1
