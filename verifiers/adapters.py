"""Reward functions written for other libraries, taken as they are: `trl`, `verl` and `reasoning_gym`.

Each is named by the option `function`, `"package.module:function"`, and judges one completion at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from verifiers.calling import as_verdict, broken, run_async
from verifiers.extract import final_answer
from verifiers.registry import VerifierLookupError, import_object, register
from verifiers.verdict import Status, TaskLike, Verdict


def _function(path: Any) -> Callable[..., Any]:
    found = import_object(path) if isinstance(path, str) else path
    if not callable(found):
        raise ValueError(f'function is {path!r:.80}; it must be "package.module:function"')
    return found


def _parameters(function: Callable[..., Any]) -> tuple[set[str], set[str], bool]:
    """Names it takes, names it must be given, and whether it takes any other."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some callables written in C have no signature
        return set(), set(), True
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = {p.name for p in named if p.default is p.empty}
    return {p.name for p in named}, required, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    names, _, takes_any = _parameters(function)
    result = function(**{key: value for key, value in arguments.items() if takes_any or key in names})
    return run_async(result) if inspect.isawaitable(result) else result


def _check_correct_from(value: Any) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"correct_from is {value!r}; it must be a number")


def _scored(name: str, score: Any, correct_from: float, **more: Any) -> Verdict:
    """A number as Verdict: `correct` from `correct_from` up; anything else is an `error`."""
    verdict = as_verdict(name, score)
    if verdict.status == "error":
        return verdict
    status: Status = "correct" if verdict.score >= correct_from else "wrong"
    return Verdict(**{"score": verdict.score, "status": status, "reason": f"{name} returned {verdict.score:g}", **more})


@register("trl")
@dataclass(frozen=True)
class Trl:
    """A reward function of TRL: `f(prompts, completions, **columns) -> list[float | None]`, also async.

    It is called with lists of one: `prompts`, `completions`, the gold answer as the column `answer_column`, and every
    column of `task.metadata`. `completions` are strings, or with `messages` lists of one assistant message, as TRL gives
    them for chat data; then a text prompt is one user message too. None, TRL's "does not apply", is an `error` verdict,
    so that the sample gets no advantage. Token ids, trainer state and logging hooks are not there.
    """

    function: Any
    answer_column: str = "answer"
    messages: bool = False
    correct_from: float = 1.0
    _function: Callable[..., Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_correct_from(self.correct_from)
        function = _function(self.function)
        for name in ("completion_ids", "trainer_state"):
            if name in _parameters(function)[1]:
                raise ValueError(f"{self.function} needs {name}, which exists only inside TRL's trainer")
        object.__setattr__(self, "_function", function)

    def __call__(self, completion: str, task: TaskLike) -> Verdict:
        prompt, given = task.prompt, completion
        if self.messages:
            prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            given = [{"role": "assistant", "content": completion}]
        columns = {str(name): [value] for name, value in task.metadata.items()}
        columns |= {self.answer_column: [task.answer], "prompts": [prompt], "completions": [given]}
        rewards = _call(self._function, columns)
        name = str(self.function)
        if hasattr(rewards, "tolist"):
            rewards = rewards.tolist()
        if not isinstance(rewards, list | tuple) or len(rewards) != 1:
            return broken(f"{name} returned {rewards!r:.80} for one completion, not a list of one reward")
        if rewards[0] is None:
            return broken(f"{name} returned None: it does not apply to this sample")
        return _scored(name, rewards[0], self.correct_from)


@register("verl")
@dataclass(frozen=True)
class Verl:
    """verl's `compute_score(data_source, solution_str, ground_truth, extra_info) -> float | dict`, also async.

    `data_source` is the option, or the column of that name in `task.metadata`; `ground_truth` is the gold answer,
    `extra_info` the metadata's `extra_info`, or else all of the metadata. Of a dict `score` counts, its other numbers
    become parts, `pred` the extracted answer; its `acc`, if there, says whether it is `correct`, otherwise
    `correct_from` does.
    """

    function: Any
    data_source: str | None = None
    correct_from: float = 1.0
    _function: Callable[..., Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_correct_from(self.correct_from)
        object.__setattr__(self, "_function", _function(self.function))

    def __call__(self, completion: str, task: TaskLike) -> Verdict:
        metadata = task.metadata
        source = metadata.get("data_source") if self.data_source is None else self.data_source
        arguments = {
            "data_source": source,
            "solution_str": completion,
            "ground_truth": task.answer,
            "extra_info": metadata.get("extra_info", dict(metadata)),
        }
        result, name = _call(self._function, arguments), str(self.function)
        if not isinstance(result, Mapping):
            return _scored(name, result, self.correct_from)
        if "score" not in result:
            return broken(f"{name} returned a dict without 'score': {', '.join(map(str, result))[:80]}")
        parts = {str(key): float(value) for key, value in result.items() if key != "score" and isinstance(value, Real)}
        prediction = result.get("pred")
        more: dict[str, Any] = {"parts": parts, "extracted": None if prediction is None else str(prediction)}
        if "acc" in result:
            more["status"] = "correct" if result["acc"] else "wrong"
        return as_verdict(name, _scored(name, result["score"], self.correct_from, **more))


@register("reasoning_gym")
@dataclass(frozen=True)
class ReasoningGym:
    """reasoning-gym's `score_answer(answer, entry) -> float`, of the data set `dataset` or a `function` of your own.

    `dataset` is the option, or the metadata's `source_dataset`. The answer is what the completion states
    (`verifiers.extract.final_answer`), the entry is made of prompt, gold answer and metadata. Most data sets give partial
    credit; only 1 is `correct`. `partial_credit = false` makes less than 1 a 0.
    """

    dataset: str | None = None
    function: Any = None
    partial_credit: bool = True
    _functions: dict[str, Callable[..., Any]] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.dataset is not None and self.function is not None:
            raise ValueError("give one of dataset and function, not both")
        if self.function is not None:
            self._functions[""] = _function(self.function)
        elif self.dataset is not None:
            self._of(self.dataset)

    def __call__(self, completion: str, task: TaskLike) -> Verdict:
        name = "" if self.function is not None else self.dataset or task.metadata.get("source_dataset", "")
        if not name and self.function is None:
            return broken("reasoning_gym: the metadata has no source_dataset; set the option dataset")
        try:
            function = self._of(name)
        except VerifierLookupError as exc:
            return broken(str(exc))
        answer = final_answer(completion)
        if answer is None:
            return Verdict(score=0.0, status="unparsable", reason="no answer is stated after the thinking")
        entry = {"question": task.prompt, "answer": task.answer, "metadata": dict(task.metadata)}
        result = function(answer.strip(), entry)
        verdict = _scored(f"reasoning_gym {name}".strip(), result, 1.0, extracted=answer.strip())
        if verdict.status == "wrong" and not self.partial_credit:
            return Verdict(score=0.0, status="wrong", reason=verdict.reason, extracted=verdict.extracted)
        return verdict

    def _of(self, name: str) -> Callable[..., Any]:
        if name not in self._functions:
            lookup = import_object("reasoning_gym:get_score_answer_fn")
            try:
                self._functions[name] = lookup(name)
            except ValueError as exc:
                raise VerifierLookupError(f"reasoning_gym: {exc}") from exc
        return self._functions[name]
