"""From tasks to scored groups, with an engine that answers by rule."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

from rollout.engine import Completion, SamplingParams
from rollout.errors import UserError
from rollout.records import Task, seed_for
from rollout.sampling import GroupStream, Prompter, sample_groups, score_groups
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


class Source:
    """Tasks that say for which seed and step they were asked."""

    def for_step(self, seed: int, step: int, count: int) -> list[Task]:
        return [Task(task_id=f"toy/{seed}-{step}-{i}", prompt="1 + 1", answer=2) for i in range(count)]


def test_a_step_of_the_stream_depends_on_seed_and_step_alone() -> None:
    def stream(seed: int) -> tuple[GroupStream, EchoEngine]:
        engine = EchoEngine()
        pool, source = cast(ScorePool, ParityPool()), cast(TaskSource, Source())
        return GroupStream(engine, source, prompter(), pool, SamplingParams(), 2, seed), engine

    first, engine = stream(5)
    groups = first.next_groups(3, 2)
    assert [group.task.task_id for group in groups] == ["toy/5-3-0", "toy/5-3-1"]
    assert engine.calls[0][2] == [seed_for(5, 3, f"toy/5-3-{task}", index) for task in range(2) for index in range(2)]
    assert all(sample.verdict is not None for group in groups for sample in group.samples)
    assert first.seconds_sampling >= 0
    assert first.seconds_scoring >= 0
    resumed, again = stream(5)
    resumed.next_groups(3, 2)
    first.next_groups(4, 2)
    other, different = stream(6)
    other.next_groups(3, 2)
    assert again.calls[0] == engine.calls[0]
    assert not set(engine.calls[1][2]) & set(engine.calls[0][2])
    assert not set(different.calls[0][2]) & set(engine.calls[0][2])
