"""Teachers that are asked: a checkpoint through the engines, or an endpoint; what they wrote becomes raw `Trace`s."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.answers import AnswerJournal, Reply, Request
from distill.endpoint import Tally, ask_all, make_request
from distill.trace import Form, Question, Trace, TraceWriter, Worked, part_files, valid_text
from distill.traces_config import EndpointSource, EngineSource, TeacherConfig
from distill.unreadable import Unreadable
from rollout.cluster import running_engines
from rollout.durable import write_json
from rollout.engine import SamplingParams
from rollout.errors import UserError
from rollout.interrupt import RunInterrupted
from rollout.records import Sample, Task, seed_for
from rollout.run import Observer
from rollout.sampling import Prompter, sample_groups
from rollout.tasks import ENDLESS, TaskSource, load_tasks
from rollout.tokenizer import load_tokenizer, stop_ids

TOO_LONG = "prompt too long"
GIVEN_UP = "request given up"
TEACHER = "teacher.json"
_STEP = 0  # the step that seeds of a teacher's samples are made of


def questions(name: str, source: TeacherConfig) -> tuple[TaskSource, int]:
    """The tasks of a teacher and how many of them it is asked; UserError for an endless generator without a number."""
    tasks = load_tasks(source.data)
    if source.num_questions is None and len(tasks) >= ENDLESS:
        raise UserError(f"sources.{name}: the generator never ends: set num_questions")
    return tasks, min(len(tasks), source.num_questions or len(tasks))


# --- a checkpoint ------------------------------------------------------------------------------------------------------


def sample_engine(
    name: str,
    source: EngineSource,
    form: Form,
    folder: Path,
    losses: Unreadable,
    *,
    seed: int,
    log_dir: Path,
    stop: threading.Event,
    observer: Observer,
) -> None:
    """Write the teacher's traces into `folder`, a part for each call of the engines; calls whose part is there are done.

    RunInterrupted after a whole call when `stop` is set; questions that don't fit the context go to `losses`.
    """
    tasks, count = questions(name, source)
    _same_teacher(folder, source.checkpoint)
    tokenizer = load_tokenizer(source.checkpoint)
    prompter = Prompter(tokenizer, source.template, source.engine.max_model_len, source.max_completion_tokens)
    params = SamplingParams(
        temperature=source.temperature,
        top_p=source.top_p,
        max_completion_tokens=source.max_completion_tokens,
        stop_token_ids=stop_ids(tokenizer),
    )
    size = source.num_questions_per_call
    calls = [range(start, min(start + size, count)) for start in range(0, count, size)]
    writer = TraceWriter(folder, rows_per_part=size * source.num_samples + 1)
    num_done = len(part_files(folder))
    for call in calls[:num_done]:
        _fitting(prompter, tasks, call, source.num_samples, losses)
    if num_done == len(calls):
        return

    def seed_of(task_id: str, index: int) -> int:
        return seed_for(seed, _STEP, task_id, index)

    with running_engines(source.engine, source.checkpoint, log_dir, seed=seed) as engine:
        for number, call in enumerate(calls[num_done:], start=num_done):
            if stop.is_set():
                raise RunInterrupted(f"stopped; {number} of {len(calls)} calls of {name} are kept")
            fitting = _fitting(prompter, tasks, call, source.num_samples, losses)
            groups = sample_groups(engine, prompter, fitting, params, source.num_samples, seed_of) if fitting else []
            for group in groups:
                for sample in group.samples:
                    writer.write(_engine_trace(name, source, form, group.task, sample, seed_of))
            writer.flush(even_empty=True)
            lengths = [len(sample.completion_ids) for group in groups for sample in group.samples]
            observer.step(number + 1, len(calls), {"completion_tokens_mean": sum(lengths) / max(1, len(lengths))})


def _fitting(prompter: Prompter, tasks: TaskSource, call: range, num_samples: int, losses: Unreadable) -> list[Task]:
    """The tasks of a call whose prompt fits; the others are lost with all their samples."""
    fitting = []
    for index in call:
        task = _valid(tasks.task(index))
        try:
            prompter.ids(task)
        except UserError as error:
            losses.add(TOO_LONG, task.task_id, str(error), num_samples)
        else:
            fitting.append(task)
    return fitting


def _engine_trace(
    name: str, source: EngineSource, form: Form, task: Task, sample: Sample, seed_of: Callable[[str, int], int]
) -> Trace:
    worked = form.of_text(sample.completion_text, inside=source.think_in_prompt)
    return _trace(
        name,
        source,
        task,
        worked,
        teacher=str(source.checkpoint),
        seed=seed_of(task.task_id, sample.sample_index),
        sample_index=sample.sample_index,
        finish_reason=sample.finish_reason,
        num_tokens=len(sample.completion_ids),
    )


def _same_teacher(folder: Path, checkpoint: Path) -> None:
    """UserError where the parts in `folder` are of a checkpoint with other files; remembers them at the first call."""
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: there is no such checkpoint folder")
    files = {path.name: path.stat().st_size for path in sorted(checkpoint.iterdir()) if path.is_file()}
    path = folder / TEACHER
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, files)
    elif json.loads(path.read_text()) != files:
        raise UserError(f"{checkpoint} has changed since {folder} was begun: give this run another name to begin anew.")


# --- an endpoint -------------------------------------------------------------------------------------------------------


def ask_endpoint(
    name: str,
    source: EndpointSource,
    form: Form,
    folder: Path,
    losses: Unreadable,
    *,
    seed: int,
    stop: threading.Event,
    observer: Observer,
) -> Iterator[Trace]:
    """Ask what `folder`/answers.jsonl does not hold yet, then yield all traces in the order of the questions.

    RunInterrupted when `stop` is set, EndpointError when the endpoint can't be asked any more: in both cases what was
    answered is kept. Requests that were given up go to `losses`.
    """
    tasks, count = questions(name, source)
    total = count * source.num_samples
    journal = AnswerJournal(folder / "answers.jsonl")
    num_before = len(journal)
    if num_before:
        observer.message(f"{name}: {num_before} answers are there from before and are not asked for again")

    def progress(tally: Tally) -> None:
        done = min(num_before + tally.num_answered + len(tally.failures), total)
        observer.step(done, total, {"tries": tally.num_tries})

    requests = (request for _, request in _requests(source, tasks, count, seed))
    tally = ask_all(source, requests, journal, seed=seed, stop=stop, progress=progress)
    if stop.is_set():
        raise RunInterrupted(f"stopped; {len(journal)} of {total} answers of {name} are kept")
    if tally.num_unread:
        observer.message(
            f"{name}: {tally.num_unread} tries ended without a usable reply; the server may charge for them"
        )
    for failure in tally.failures:
        losses.add(GIVEN_UP, f"{failure.question_id}, sample {failure.sample_index}", failure.reason)
    for task, request in _requests(source, tasks, count, seed):
        if request.key in journal:
            yield _endpoint_trace(name, source, form, task, request, journal.read(request.key))


def _requests(source: EndpointSource, tasks: TaskSource, count: int, seed: int) -> Iterator[tuple[Task, Request]]:
    for index in range(count):
        task = _valid(tasks.task(index))
        messages = [{"role": "user", "content": task.prompt}] if isinstance(task.prompt, str) else task.prompt
        for sample in range(source.num_samples):
            own_seed = seed_for(seed, _STEP, task.task_id, sample)
            yield task, make_request(source, task.task_id, messages, sample, own_seed)


def _endpoint_trace(name: str, source: EndpointSource, form: Form, task: Task, request: Request, reply: Reply) -> Trace:
    whole = reply.reasoning is None
    worked = form.of_text(reply.content) if whole else form.of_parts(reply.reasoning or "", reply.content)
    return _trace(
        name,
        source,
        task,
        worked,
        teacher=reply.model or source.model,
        seed=request.body.get("seed"),
        sample_index=request.sample_index,
        finish_reason=reply.finish_reason,
        num_tokens=reply.num_tokens,
        metadata={"reply_id": reply.reply_id, "base_url": source.base_url},
    )


# --- both --------------------------------------------------------------------------------------------------------------


def _trace(
    name: str,
    source: TeacherConfig,
    task: Task,
    worked: Worked,
    *,
    teacher: str,
    seed: int | None,
    sample_index: int,
    finish_reason: str | None,
    num_tokens: int | None,
    metadata: Mapping[str, Any] | None = None,
) -> Trace:
    sampling = {
        "temperature": source.temperature,
        "top_p": source.top_p,
        "max_completion_tokens": source.max_completion_tokens,
        "seed": seed,
        "sample_index": sample_index,
    }
    return Trace(
        question_id=task.task_id,
        question=task.prompt,
        **worked._asdict(),
        gold=task.answer,
        verifier=source.verifier or task.verifier or None,
        teacher=teacher,
        source=name,
        sampling=sampling,
        finish_reason=finish_reason,
        num_tokens=num_tokens,
        metadata={**task.metadata, **(metadata or {})},
    )


def _valid(task: Task) -> Task:
    """The task with a question that can be sent and written."""
    prompt: Question = task.prompt
    if isinstance(prompt, str):
        return replace(task, prompt=valid_text(prompt))
    messages: Sequence[Mapping[str, str]] = prompt
    return replace(task, prompt=[{**message, "content": valid_text(message["content"])} for message in messages])
