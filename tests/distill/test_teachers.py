"""A checkpoint and an endpoint as teachers: what they say becomes traces with their provenance, once each."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill import teachers
from distill.teachers import GIVEN_UP, TOO_LONG, ask_endpoint, questions, sample_engine
from distill.trace import Form, Trace, part_files, read_traces
from distill.traces import TracesConfig, check_sources, make_traces
from distill.traces_config import EndpointSource, EngineSource
from distill.unreadable import Unreadable
from policy.checkpoint import save_policy
from policy.dense import DensePolicy
from policy.dense_config import DenseConfig
from rollout.errors import UserError
from rollout.interrupt import RunInterrupted
from rollout.records import seed_for
from rollout.run import RunRecord, SilentObserver
from rollout.tokenizer import train_tokenizer
from rollout.toml_config import to_toml
from tests.distill.endpoint_server import Answer, completion, running

SHAPE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
SUMS = {"source": "generator", "generator": "arithmetic"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random dense teacher with a tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = train_tokenizer(["What is 1 + 2? <think>3</think>"] * 3, 320, "{{ messages[-1].content }}")
    model = DensePolicy(DenseConfig.of_shape({**SHAPE, "vocab_size": len(tokenizer)}))
    model.reset_parameters(0)
    save_policy(model, folder)
    tokenizer.save_pretrained(folder)
    return folder


def engine_source(checkpoint: Path, **fields: Any) -> EngineSource:
    values = {
        "kind": "engine",
        "checkpoint": checkpoint,
        "template": "plain",
        "data": SUMS,
        "num_questions": 5,
        "num_samples": 2,
        "max_completion_tokens": 6,
        "num_questions_per_call": 2,
        "engine": {"kind": "torch", "placement": "in_process", "max_model_len": 120},
    }
    return EngineSource.model_validate(values | fields)


def sample(source: EngineSource, folder: Path, stop: threading.Event | None = None) -> Unreadable:
    with Unreadable(folder / "errors.jsonl", "big") as losses:
        sample_engine(
            "big",
            source,
            Form(),
            folder,
            losses,
            seed=3,
            log_dir=folder,
            stop=stop or threading.Event(),
            observer=SilentObserver(),
        )
    return losses


def test_a_checkpoint_is_sampled_with_its_provenance(checkpoint: Path, tmp_path: Path) -> None:
    source = engine_source(checkpoint, verifier="numeric", think_in_prompt=True)
    sample(source, tmp_path)
    traces = list(read_traces(tmp_path))
    tasks, _ = questions("big", source)
    assert [(trace.question_id, trace.sample_index) for trace in traces] == [
        (tasks.task(number).task_id, index) for number in range(5) for index in range(2)
    ]
    first = traces[0]
    assert (first.question, first.gold, first.verifier) == (tasks.task(0).prompt, tasks.task(0).answer, "numeric")
    assert (first.teacher, first.source) == (str(checkpoint), "big")
    assert first.sampling == {
        "temperature": 0.6,
        "top_p": 0.95,
        "max_completion_tokens": 6,
        "seed": seed_for(3, 0, first.question_id, 0),
        "sample_index": 0,
    }
    assert all(trace.num_tokens == 6 or trace.finish_reason == "stop" for trace in traces)
    assert all(trace.completion.startswith("<think>\n") for trace in traces)
    assert {trace.fault for trace in traces} == {"the think block never closes"}


def test_calls_that_are_done_are_not_sampled_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = engine_source(checkpoint)
    sample(source, tmp_path / "whole")
    original, asked = teachers.sample_groups, []

    def counting(engine: Any, prompter: Any, tasks: Any, *rest: Any) -> Any:
        asked.extend(task.task_id for task in tasks)
        if len(asked) == 4:
            stop.set()
        return original(engine, prompter, tasks, *rest)

    monkeypatch.setattr(teachers, "sample_groups", counting)
    stop = threading.Event()
    with pytest.raises(RunInterrupted, match="2 of 3 calls of big are kept"):
        sample(source, tmp_path / "cut", stop)
    assert len(part_files(tmp_path / "cut")) == 2
    sample(source, tmp_path / "cut")
    assert len(asked) == len(set(asked)) == 5
    assert list(read_traces(tmp_path / "cut")) == list(read_traces(tmp_path / "whole"))
    sample(source, tmp_path / "cut")
    assert len(asked) == 5


def test_questions_that_do_not_fit_are_lost_with_all_their_samples(checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "q.jsonl"
    data.write_text('{"question": "1+1?", "answer": "2"}\n{"question": "' + "why " * 200 + '", "answer": "2"}\n')
    source = engine_source(checkpoint, data={"source": "jsonl", "path": data, "name": "q"}, num_questions=None)
    for _ in range(2):  # counted again by a run that goes on
        losses = sample(source, tmp_path / "raw")
        assert losses.counts == {TOO_LONG: 2}
    assert [trace.question_id for trace in read_traces(tmp_path / "raw")] == ["q/0", "q/0"]


def test_another_teacher_in_the_same_place_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    sample(engine_source(checkpoint), tmp_path)
    (tmp_path / "teacher.json").write_text('{"model.safetensors": 1}\n')
    with pytest.raises(UserError, match="has changed since"):
        sample(engine_source(checkpoint), tmp_path)


def test_a_generator_without_an_end_needs_a_number(checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"sources\.big: the generator never ends: set num_questions"):
        questions("big", engine_source(checkpoint, num_questions=None))


def test_a_checkpoint_in_a_run_of_traces(checkpoint: Path, tmp_path: Path) -> None:
    source = engine_source(checkpoint)
    sample(source, tmp_path / "alone")
    lengths = {"order": ["length"], "length": {"min_tokens": 1, "max_tokens": 6}}
    config = TracesConfig(name="t", seed=3, run_dir=str(tmp_path / "run"), sources={"big": source}, select=lengths)
    check_sources(config)
    record = RunRecord.open(config.run_path, config.model_dump(mode="json"), to_toml(config), resume=False)
    with record:
        summary = make_traces(config, record, SilentObserver())
    assert summary["sources"] == {"big": {"kind": "engine", "traces": 10, "lost": {}}}
    kept = list(read_traces(tmp_path / "run" / "traces.parquet"))
    assert [trace.completion for trace in kept] == [trace.completion for trace in read_traces(tmp_path / "alone")]


# --- an endpoint -------------------------------------------------------------------------------------------------------


def endpoint_source(url: str, **fields: Any) -> EndpointSource:
    values = {
        "kind": "endpoint",
        "base_url": url,
        "model": "teacher",
        "data": SUMS,
        "num_questions": 3,
        "num_samples": 2,
        "num_concurrent": 2,
        "backoff_s": 0.01,
        "max_tries": 2,
    }
    return EndpointSource.model_validate(values | fields)


def asked(
    source: EndpointSource, folder: Path, observer: SilentObserver | None = None
) -> tuple[list[Trace], Unreadable]:
    with Unreadable(folder / "errors.jsonl", "far") as losses:
        traces: Iterator[Trace] = ask_endpoint(
            "far",
            source,
            Form(),
            folder,
            losses,
            seed=3,
            stop=threading.Event(),
            observer=observer or SilentObserver(),
        )
        return list(traces), losses


FORMS: dict[str, Callable[[], dict[str, Any]]] = {
    "inline": lambda: completion("<think>\nwhy\n</think>\n\n42"),
    "reasoning_content": lambda: completion("42", reasoning_content="why"),
    "reasoning": lambda: completion("42", reasoning="why"),
}


@pytest.mark.parametrize("form", FORMS)
def test_reasoning_inline_and_apart_give_the_same_trace(tmp_path: Path, form: str) -> None:
    with running(lambda body, number: FORMS[form]()) as server:
        traces, _ = asked(endpoint_source(server.url), tmp_path)
        seeds = {seed_for(3, 0, trace.question_id, trace.sample_index) for trace in traces}
        assert {body["seed"] for body in server.bodies} == {trace.sampling["seed"] for trace in traces} == seeds
        assert len(seeds) == 6
    assert [trace.sample_index for trace in traces] == [0, 1, 0, 1, 0, 1]
    assert {(trace.reasoning, trace.answer_text, trace.fault) for trace in traces} == {("why", "42", None)}
    assert {trace.completion for trace in traces} == {"<think>\nwhy\n</think>\n\n42"}
    assert {(trace.teacher, trace.num_tokens, trace.finish_reason) for trace in traces} == {("teacher-v2", 7, "stop")}


def test_what_is_asked_is_answered_or_lost(tmp_path: Path) -> None:
    source = endpoint_source("http://127.0.0.1:1/v1", max_failures_in_row=99)
    tasks, _ = questions("far", source)
    bad = tasks.task(1).prompt

    def script(body: dict[str, Any], number: int) -> Answer | dict[str, Any]:
        return Answer(b"no", 500) if body["messages"][0]["content"] == bad else completion("<think>a</think>b")

    with running(script) as server:
        traces, losses = asked(endpoint_source(server.url), tmp_path)
    assert losses.counts == {GIVEN_UP: 2}
    assert len(traces) + 2 == 3 * 2
    assert bad not in {trace.question for trace in traces}


def test_the_traces_do_not_depend_on_the_order_of_the_answers_or_on_a_kill(tmp_path: Path) -> None:
    def script(body: dict[str, Any], number: int) -> Answer:
        said = completion(f"<think>a</think>{body['messages'][0]['content']} {body['seed']}")
        return Answer(said, hangs=0.05 * (number % 2))

    with running(script) as server:
        source = endpoint_source(server.url)
        straight, _ = asked(source, tmp_path / "straight")
        child = os.fork()
        if child == 0:

            class Killing(SilentObserver):
                def step(self, step: int, num_steps: int, metrics: Any) -> None:
                    if step == 3:
                        os.kill(os.getpid(), signal.SIGKILL)

            asked(endpoint_source(server.url, num_concurrent=1), tmp_path / "killed", Killing())
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        before = len(server.bodies)
        again, _ = asked(source, tmp_path / "killed")
        assert len(server.bodies) - before == 3
    assert again == straight
