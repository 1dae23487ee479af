"""From tasks to scored groups, with an engine that answers by rule."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.engine import Completion, SamplingParams
from rollout.errors import UserError
from rollout.journal import RolloutJournal
from rollout.records import Group, SamplingMask, Task, seed_for
from rollout.sampling import GroupStream, Prompter, StepRollout, sample_groups, score_groups
from rollout.tasks import TaskSource
from rollout.tokenizer import END, PAD, train_tokenizer
from verifiers.pool import ScorePool
from verifiers.verdict import Verdict

if TYPE_CHECKING:
    from torch import Tensor

pytest.importorskip("transformers")
TOKENIZER: Any = train_tokenizer(["Q: 12 + 34 A: <think>x</think>"], 300, "{{ messages[-1]['content'] }}!")
TASKS = [Task(task_id=f"toy/{i}", prompt=f"{i} + 1", answer=i + 1) for i in range(3)]


class EchoEngine:
    """Answers with its seed's last digit and the end token; remembers what it was asked."""

    name = "echo"

    def __init__(self) -> None:
        self.policy_version = 7
        self.calls: list[tuple[list[list[int]], SamplingParams, list[int]]] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        self.calls.append(([list(prompt) for prompt in prompts], params, list(seeds)))
        return [
            Completion(
                token_ids=[*ids(str(seed % 10)), TOKENIZER.eos_token_id],
                logprobs=[-0.5, -0.25],
                finish_reason="stop",
                policy_version=self.policy_version,
            )
            for seed in seeds
        ]

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        self.policy_version = version

    def close(self) -> None:
        pass


class ParityPool:
    """Correct where the completion's number is even."""

    def score(self, completions: Sequence[str], tasks: Sequence[Task]) -> list[Verdict]:
        return [
            Verdict(score=1.0 - int(text) % 2, status="wrong" if int(text) % 2 else "correct", reason=task.task_id)
            for text, task in zip(completions, tasks, strict=True)
        ]


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def prompter(template: str = "Q: {question} A:", max_model_len: int = 64, max_completion_tokens: int = 16) -> Prompter:
    return Prompter(TOKENIZER, template, max_model_len, max_completion_tokens)


def test_prompts_are_the_rendered_template() -> None:
    task = Task(task_id="t", prompt="12 + 3", answer=15)
    assert prompter().text(task) == "Q: 12 + 3 A:"
    assert prompter().ids(task) == tuple(ids("Q: 12 + 3 A:"))
    assert prompter("chat").text(task) == "12 + 3!"


def test_a_prompt_fits_to_the_last_token_and_not_beyond() -> None:
    task = Task(task_id="gsm8k/17", prompt="1 + 2", answer=3)
    length = len(prompter().ids(task))
    assert len(prompter(max_model_len=length + 16).ids(task)) == length
    with pytest.raises(UserError, match=rf"task gsm8k/17 has {length} tokens.*=16 .*max_model_len={length + 15}"):
        prompter(max_model_len=length + 15).ids(task)


def test_decoding_keeps_tags_and_drops_end_and_pad() -> None:
    text = "<think> é 12</think>\n<answer>3</answer>"
    assert prompter().decode(ids(text + END + PAD)) == text
    assert prompter().decode(ids(f"1{END}2")) == "12"
    assert prompter().decode([]) == ""


def test_tags_are_kept_even_by_a_tokenizer_that_calls_them_special() -> None:
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_tokens([AddedToken("<think>", special=True, normalized=False)])
    assert tokenizer.decode(ids("<think>1"), skip_special_tokens=True) == "1"
    assert Prompter(tokenizer, "plain", 64, 16).decode(ids(f"<think>1{END}")) == "<think>1"


def test_ids_beyond_the_vocabulary_become_replacement_characters() -> None:
    known = len(TOKENIZER)
    assert prompter().decode([known]) == "\ufffd"
    assert prompter().decode([*ids("12"), known, known + 5, *ids("é<think>"), 10**6]) == "12\ufffd\ufffdé<think>\ufffd"
    assert prompter().decode([*ids("é")[:1]]) == "\ufffd"  # half of a character


def test_groups_hold_their_own_samples_in_order() -> None:
    engine, params = EchoEngine(), SamplingParams(max_completion_tokens=16)
    groups = sample_groups(engine, prompter(), TASKS, params, 4, lambda task_id, index: int(task_id[-1]) * 4 + index)
    ((prompts, asked, seeds),) = engine.calls
    assert asked is params
    assert seeds == list(range(12))
    assert prompts == [list(prompter().ids(task)) for task in TASKS for _ in range(4)]
    for number, (group, task) in enumerate(zip(groups, TASKS, strict=True)):
        assert group.task is task
        for index, sample in enumerate(group.samples):
            assert (sample.task_id, sample.sample_index) == (task.task_id, index)
            assert sample.prompt_ids == prompter().ids(task)
            assert sample.completion_text == str((number * 4 + index) % 10)
            assert sample.completion_ids == (*ids(sample.completion_text), TOKENIZER.eos_token_id)
            assert sample.rollout_logprobs.dtype == np.float32
            assert sample.rollout_logprobs.tolist() == [-0.5, -0.25]
            assert sample.policy_versions == (7, 7)
            assert sample.finish_reason == "stop"
            assert sample.verdict is None
            assert sample.advantage is None


def test_a_prompt_that_is_too_long_is_refused_before_anything_is_sampled() -> None:
    engine = EchoEngine()
    long = Task(task_id="toy/long", prompt="1 " * 80, answer=0)
    with pytest.raises(UserError, match="toy/long"):
        sample_groups(engine, prompter(), [*TASKS, long], SamplingParams(), 2, lambda *_: 0)
    assert engine.calls == []


def test_each_sample_gets_its_own_verdict() -> None:
    groups = sample_groups(EchoEngine(), prompter(), TASKS, SamplingParams(), 3, lambda _, index: index)
    scored = score_groups(cast(ScorePool, ParityPool()), groups)
    for group in scored:
        verdicts = [sample.verdict for sample in group.samples]
        assert [verdict.status for verdict in verdicts if verdict] == ["correct", "wrong", "correct"]
        assert {verdict.reason for verdict in verdicts if verdict} == {group.task.task_id}
    assert all(sample.verdict is None for group in groups for sample in group.samples)


def test_a_verdict_that_is_there_stays() -> None:
    group, *_ = sample_groups(EchoEngine(), prompter(), TASKS, SamplingParams(), 2, lambda _, index: index)
    known = Verdict(score=7.0, status="correct", reason="known")
    group = replace(group, samples=(replace(group.samples[0], verdict=known), group.samples[1]))
    (scored,) = score_groups(cast(ScorePool, ParityPool()), [group])
    assert scored.samples[0].verdict is known
    assert scored.samples[1].verdict is not None
    assert scored.samples[1].verdict.status == "wrong"


def test_what_sampling_kept_and_where_tokens_went_comes_with_the_sample() -> None:
    mask = SamplingMask(np.array([0, 1, 3]), np.array([4, 1, 2], np.int32))
    routed = np.zeros((3, 1, 2), np.int16)

    class Engine(EchoEngine):
        def generate(
            self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
        ) -> list[Completion]:
            answers = super().generate(prompts, params, seeds)
            return [replace(answer, sampling_mask=mask, routed_experts=routed) for answer in answers]

    group, *_ = sample_groups(Engine(), prompter(), TASKS, SamplingParams(), 1, lambda *_: 0)
    assert group.samples[0].sampling_mask is mask
    assert group.samples[0].routed_experts is routed


class Source:
    """Tasks that say for which seed and draw they were asked."""

    def for_step(self, seed: int, step: int, count: int) -> list[Task]:
        return [Task(task_id=f"toy/{seed}-{step}-{i}", prompt="1 + 1", answer=2) for i in range(count)]


def stream(
    engine: EchoEngine | None = None,
    *,
    pool: Any = None,
    num_prompts: int = 4,
    group_size: int = 2,
    seed: int = 5,
    num_prompts_per_call: int | None = None,
    journal: RolloutJournal | None = None,
    is_informative: Callable[[Group], bool] | None = None,
    max_draws: int = 1,
) -> GroupStream:
    return GroupStream(
        engine or EchoEngine(),
        cast(TaskSource, Source()),
        prompter(),
        cast(ScorePool, pool or ParityPool()),
        lambda step: SamplingParams(max_completion_tokens=step + 1),
        num_prompts=num_prompts,
        group_size=group_size,
        seed=seed,
        num_prompts_per_call=num_prompts_per_call,
        journal=journal,
        is_informative=is_informative,
        max_draws=max_draws,
    )


def contents(groups: Sequence[Group]) -> list[tuple]:
    return [
        (
            group.task.task_id,
            sample.sample_index,
            sample.completion_ids,
            sample.rollout_logprobs.tobytes(),
            sample.verdict,
        )
        for group in groups
        for sample in group.samples
    ]


def everything(rollout: StepRollout) -> tuple:
    return contents(rollout.groups), contents(rollout.uninformative), rollout.first_draw, rollout.num_draws


def task_ids(groups: Sequence[Group]) -> list[str]:
    return [group.task.task_id for group in groups]


def test_a_step_of_the_stream_depends_on_seed_and_step_alone() -> None:
    engine = EchoEngine()
    first = stream(engine)
    rollout = first.next_groups(3)
    assert task_ids(rollout.groups) == [f"toy/5-3-{i}" for i in range(4)]
    assert (rollout.first_draw, rollout.num_draws, rollout.num_reused, rollout.uninformative) == (3, 1, 0, [])
    ((_, params, seeds),) = engine.calls
    assert params.max_completion_tokens == 4  # of the step
    assert seeds == [seed_for(5, 3, f"toy/5-3-{task}", index) for task in range(4) for index in range(2)]
    assert all(sample.verdict is not None for group in rollout.groups for sample in group.samples)
    assert everything(stream().next_groups(3)) == everything(rollout)
    following = first.next_groups(4)
    assert following.first_draw == 4
    assert not set(engine.calls[1][2]) & set(seeds)
    assert contents(stream(seed=6).next_groups(3).groups) != contents(rollout.groups)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
def test_calls_of_any_size_give_the_same_groups(size: int) -> None:
    engine = EchoEngine()
    rollout = stream(engine, num_prompts_per_call=size).next_groups(3)
    assert everything(rollout) == everything(stream().next_groups(3))
    assert [len(prompts) for prompts, *_ in engine.calls] == [2 * min(size, 4 - begin) for begin in range(0, 4, size)]


def test_a_call_is_scored_while_the_next_one_samples() -> None:
    sampling_again = threading.Event()

    class Engine(EchoEngine):
        def generate(
            self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
        ) -> list[Completion]:
            if self.calls:
                sampling_again.set()
            return super().generate(prompts, params, seeds)

    class Pool(ParityPool):
        def score(self, completions: Sequence[str], tasks: Sequence[Task]) -> list[Verdict]:
            assert sampling_again.wait(30), "the second call waits for the first one's verdicts"
            return super().score(completions, tasks)

    assert len(stream(Engine(), pool=Pool(), num_prompts_per_call=2).next_groups(0).groups) == 4


@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_resampling_goes_on_until_enough_is_informative_and_not_a_call_further(data: st.DataObject) -> None:
    num_prompts, size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    max_draws, first_draw = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3))
    informative = data.draw(st.lists(st.booleans(), min_size=num_prompts * max_draws, max_size=num_prompts * max_draws))
    slow = data.draw(st.lists(st.booleans(), min_size=20, max_size=20))
    ids_of_draws = [
        f"toy/5-{draw}-{i}" for draw in range(first_draw, first_draw + max_draws) for i in range(num_prompts)
    ]
    is_informative = dict(zip(ids_of_draws, informative, strict=True))

    class Pool(ParityPool):
        def score(self, completions: Sequence[str], tasks: Sequence[Task]) -> list[Verdict]:
            time.sleep(0.002 * slow.pop())
            return super().score(completions, tasks)

    # What the law says, one call after the other.
    sampled: list[str] = []
    for draw in range(max_draws):
        for begin in range(0, num_prompts, size):
            if sum(is_informative[task_id] for task_id in sampled) < num_prompts:
                end = min(begin + size, num_prompts)
                sampled += ids_of_draws[draw * num_prompts + begin : draw * num_prompts + end]
    chosen = [task_id for task_id in sampled if is_informative[task_id]][:num_prompts]

    own = stream(
        pool=Pool(),
        num_prompts=num_prompts,
        num_prompts_per_call=size,
        is_informative=lambda group: is_informative[group.task.task_id],
        max_draws=max_draws,
    )
    own.load_state_dict({"next_draw": first_draw})
    rollout = own.next_groups(17)
    assert task_ids(rollout.groups) == chosen
    assert task_ids(rollout.uninformative) == [task_id for task_id in sampled if task_id not in chosen]
    last_draw = int(sampled[-1].split("-")[1])
    assert (rollout.first_draw, rollout.num_draws) == (first_draw, last_draw - first_draw + 1)
    assert own.state_dict(18) == {"next_draw": last_draw + 1}


def test_a_step_done_again_takes_its_own_draws_and_the_next_one_others() -> None:
    def odd(group: Group) -> bool:
        return group.task.task_id.endswith(("1", "3"))

    own = stream(is_informative=odd, max_draws=3)
    first = own.next_groups(8)
    assert (first.first_draw, first.num_draws) == (0, 2)
    assert own.state_dict(8) == {"next_draw": 0}
    assert own.state_dict(9) == {"next_draw": 2}
    assert everything(own.next_groups(8)) == everything(first)
    second = own.next_groups(9)
    assert (second.first_draw, second.num_draws) == (2, 2)
    resumed = stream(is_informative=odd, max_draws=3)
    resumed.load_state_dict({"next_draw": 2})
    assert everything(resumed.next_groups(9)) == everything(second)


class FailingEngine(EchoEngine):
    """Ends in an error on its call `fails_at` (from 0)."""

    def __init__(self, fails_at: int, error: BaseException) -> None:
        super().__init__()
        self.fails_at, self.error = fails_at, error

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        if len(self.calls) == self.fails_at:
            raise self.error
        return super().generate(prompts, params, seeds)


def test_an_engine_that_fails_leaves_no_thread_and_the_state_as_it_was() -> None:
    own = stream(FailingEngine(2, RuntimeError("no memory")), num_prompts_per_call=1, is_informative=lambda _: True)
    with pytest.raises(RuntimeError, match="no memory"):
        own.next_groups(0)
    assert own.state_dict(0) == {"next_draw": 0}
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("scoring")] == []


def test_an_error_of_the_scoring_thread_comes_out_before_the_next_call() -> None:
    failed = threading.Event()

    class Pool:
        def score(self, completions: Sequence[str], tasks: Sequence[Task]) -> list[Verdict]:
            failed.set()
            raise ValueError("the pool is closed")

    class Engine(EchoEngine):
        def generate(
            self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
        ) -> list[Completion]:
            answers = super().generate(prompts, params, seeds)
            if len(self.calls) >= 2:
                assert failed.wait(30)
                time.sleep(0.05)  # from there until the thread has handed its error over
            return answers

    engine = Engine()
    with pytest.raises(ValueError, match="the pool is closed"):
        stream(engine, pool=Pool(), num_prompts_per_call=1).next_groups(0)
    assert len(engine.calls) < 4


def test_stopping_at_once_does_not_wait_for_verdicts() -> None:
    stopped = threading.Event()

    class Pool(ParityPool):
        def score(self, completions: Sequence[str], tasks: Sequence[Task]) -> list[Verdict]:
            assert stopped.wait(30)
            return super().score(completions, tasks)

    with pytest.raises(KeyboardInterrupt):
        stream(FailingEngine(1, KeyboardInterrupt()), pool=Pool(), num_prompts_per_call=2).next_groups(0)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("scoring")]
    stopped.set()


def no_messages(text: str) -> None:
    pytest.fail(text)


@pytest.mark.parametrize("fails_at", range(4))
def test_finished_calls_of_a_broken_step_are_used(tmp_path: Path, fails_at: int) -> None:
    broken = FailingEngine(fails_at, RuntimeError("killed"))
    with pytest.raises(RuntimeError, match="killed"):
        stream(broken, num_prompts_per_call=1, journal=RolloutJournal(tmp_path, no_messages)).next_groups(3)
    engine = EchoEngine()
    rollout = stream(engine, num_prompts_per_call=1, journal=RolloutJournal(tmp_path, no_messages)).next_groups(3)
    assert everything(rollout) == everything(stream().next_groups(3))
    assert len(engine.calls) == 4 - fails_at
    assert rollout.num_reused == 2 * fails_at
    again = EchoEngine()
    repeated = stream(again, num_prompts_per_call=1, journal=RolloutJournal(tmp_path, no_messages)).next_groups(3)
    assert again.calls == []
    assert repeated.num_reused == 8
    assert everything(repeated) == everything(rollout)


def test_samples_outlive_a_run_that_was_killed_while_it_scored(tmp_path: Path) -> None:
    class Broken:
        def score(self, completions: Sequence[str], tasks: Sequence[Task]) -> list[Verdict]:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        stream(pool=Broken(), journal=RolloutJournal(tmp_path, no_messages)).next_groups(3)
    engine = EchoEngine()
    rollout = stream(engine, journal=RolloutJournal(tmp_path, no_messages)).next_groups(3)
    assert engine.calls == []
    assert everything(rollout) == everything(stream().next_groups(3))


def test_a_verifier_that_failed_is_asked_again_and_no_other_sample(tmp_path: Path) -> None:
    class Failing(ParityPool):
        def score(self, completions: Sequence[str], tasks: Sequence[Task]) -> list[Verdict]:
            verdicts = super().score(completions, tasks)
            failed = (replace(verdicts[1], status="error"), replace(verdicts[2], status="timeout"))
            return [verdicts[0], *failed, *verdicts[3:]]

    class Counting(ParityPool):
        asked = 0

        def score(self, completions: Sequence[str], tasks: Sequence[Task]) -> list[Verdict]:
            self.asked += len(completions)
            return super().score(completions, tasks)

    stream(pool=Failing(), journal=RolloutJournal(tmp_path, no_messages)).next_groups(3)
    pool = Counting()
    rollout = stream(pool=pool, journal=RolloutJournal(tmp_path, no_messages)).next_groups(3)
    assert pool.asked == 2
    assert everything(rollout) == everything(stream().next_groups(3))


def test_a_journal_of_other_weights_is_not_used(tmp_path: Path) -> None:
    stream(journal=RolloutJournal(tmp_path, no_messages)).next_groups(3)
    engine, messages = EchoEngine(), []
    engine.policy_version = 8
    rollout = stream(engine, journal=RolloutJournal(tmp_path, messages.append)).next_groups(3)
    assert len(engine.calls) == 1
    assert rollout.num_reused == 0
    assert ["policy_version 7 -> 8" in message for message in messages] == [True]
    assert rollout.groups[0].samples[0].policy_versions == (8, 8)
