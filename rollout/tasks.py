"""Task sources: dataset rows or generated problems as `Task`s, and which of them each step takes."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rollout.epoch_order import EpochOrder
from rollout.errors import UserError
from rollout.records import Task
from rollout.rows import Row, Rows, quoted, read_hf, read_jsonl, read_parquet

GENERATORS: Mapping[str, str] = {
    "arithmetic": "rollout.arithmetic:generate_tasks",
    "arithmetic_corpus": "rollout.arithmetic:generate_documents",
}
"""Built-in generators: `function(seed, split, start, count, **options) -> list[Task]`, imported when first used."""

ENDLESS = 2**31 - 1
"""The length of a generator without `max_rows`."""


class DataConfig(BaseModel):
    """Where tasks come from and how a row becomes one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Literal["jsonl", "parquet", "hf", "generator"] = Field(
        description="Kind of data: a JSONL file, Parquet (a file or a folder of them), a local Hugging Face dataset "
        "folder, or a built-in generator."
    )
    path: Path | None = Field(default=None, description="Local file or folder of the data; not for a generator.")
    name: str | None = Field(default=None, description="First part of every task_id; by default made from the path.")
    split: str = Field(
        default="train", description="Split of a Hugging Face dataset, or of a generator: 'train' or 'heldout'."
    )
    prompt_column: str = Field(
        default="question",
        description="Column with the question, a text or a list of {role, content}; 'a.b' reaches into a column.",
    )
    answer_column: str = Field(
        default="answer", description="Column with what the verifier needs; 'a.b' reaches into a column."
    )
    id_column: str | None = Field(
        default=None, description="Column with a unique row id for task_id; by default the row number."
    )
    metadata_columns: tuple[str, ...] = Field(
        default=(), description="Columns handed to the verifier as the task's metadata."
    )
    verifier_column: str | None = Field(
        default=None, description="Column with the name of the row's own verifier, for the verifier by_task."
    )
    answer_pattern: str | None = Field(
        default=None,
        description=r"Regular expression whose one group is the answer in its column; GSM8K: '####\s*(.+?)\s*$'.",
    )
    generator: str | None = Field(default=None, description="Name of the built-in generator, such as 'arithmetic'.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the generator.")
    max_rows: int | None = Field(
        default=None, ge=1, description="Use only the first so many rows, or generated problems."
    )
    shuffle_seed: int = Field(
        default=0,
        ge=0,
        description="Seed, beside the run's, of each epoch's order of rows; for a generator, of its numbered tasks.",
    )

    @field_validator("answer_pattern")
    @classmethod
    def _one_group(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        if groups != 1:
            raise ValueError(f"must have exactly one group, around the answer, and has {groups}")
        return pattern

    @model_validator(mode="after")
    def _fits_the_source(self) -> DataConfig:
        if self.source != "generator":
            if self.path is None:
                raise ValueError(f"source '{self.source}' needs a path")
            if self.generator is not None or self.options:
                raise ValueError(f"generator and options go with source 'generator', not '{self.source}'")
            if self.source != "hf" and self.split != "train":
                raise ValueError(f"a {self.source} file has no split {self.split!r}: give that split's file as path")
            return self
        if self.path is not None:
            raise ValueError("source 'generator' takes no path")
        if self.generator not in GENERATORS:
            raise ValueError(
                f"source 'generator' needs one of the generators {quoted(list(GENERATORS))}, not {self.generator!r}"
            )
        if self.split not in ("train", "heldout"):
            raise ValueError(f"a generator's split is 'train' or 'heldout', not {self.split!r}")
        return self


class TaskSource(Protocol):
    """Tasks by number, and the tasks of a step."""

    def __len__(self) -> int: ...

    def task(self, index: int) -> Task:
        """Task `index`, from 0; IndexError beyond the end."""
        ...

    def for_step(self, seed: int, step: int, num_prompts: int) -> list[Task]:
        """`num_prompts` different tasks, from `seed` and `step` (from 0) alone, so that a resumed run goes on alike."""
        ...


def load_tasks(config: DataConfig) -> TaskSource:
    """Open the data and check every row; UserError names the file, row and column of the first mistake."""
    if config.source == "generator":
        return GeneratedTasks(config)
    assert config.path is not None  # the config's own check
    path = config.path.expanduser()
    if config.source == "jsonl":
        rows = read_jsonl(path)
    else:
        rows = read_parquet(path) if config.source == "parquet" else read_hf(path, config.split)
    return DatasetTasks(config, rows, config.name or _dataset_name(path, config))


class DatasetTasks:
    """Tasks from a finite table: shuffled anew each epoch, every row once per epoch, no row twice in a step."""

    def __init__(self, config: DataConfig, rows: Rows, name: str) -> None:
        self._config, self._rows, self._name = config, rows, name
        self._length = min(len(rows), config.max_rows or len(rows))
        if not self._length:
            raise UserError(f"{config.path}: the dataset is empty")
        self._order = EpochOrder(self._length, config.shuffle_seed)
        self._check_rows()

    def __len__(self) -> int:
        return self._length

    def task(self, index: int) -> Task:
        """Task of row `index`."""
        if not 0 <= index < self._length:
            raise IndexError(f"task {index} of {self._length}")
        return self._to_task(index, self._rows.row(index))

    def for_step(self, seed: int, step: int, num_prompts: int) -> list[Task]:
        """The step's rows; UserError if the dataset has fewer than `num_prompts`."""
        return [self.task(index) for index in self._order.rows(seed, step, num_prompts)]

    def _check_rows(self) -> None:
        seen: dict[str, int] = {}
        for index, row in zip(range(self._length), self._rows, strict=False):
            task = self._to_task(index, row)
            if self._config.id_column and seen.setdefault(task.task_id, index) != index:
                first = self._rows.place(seen[task.task_id])
                raise UserError(f"{self._rows.place(index)}: the id of {task.task_id!r} is also that of {first}")

    def _to_task(self, index: int, row: Row) -> Task:
        config, place = self._config, self._rows.place(index)
        prompt = _value(row, config.prompt_column, "prompt_column", place)
        answer = _value(row, config.answer_column, "answer_column", place)
        row_id = index if config.id_column is None else _value(row, config.id_column, "id_column", place)
        verifier = "" if config.verifier_column is None else _verifier_name(row, config.verifier_column, place)
        return Task(
            task_id=f"{self._name}/{row_id}",
            prompt=_check_prompt(prompt, f"{place}, column {config.prompt_column!r}"),
            answer=_extract(answer, config.answer_pattern, f"{place}, column {config.answer_column!r}"),
            verifier=verifier,
            metadata={c: _value(row, c, "metadata_columns", place, nullable=True) for c in config.metadata_columns},
        )


def _verifier_name(row: Row, column: str, place: str) -> str:
    name = _value(row, column, "verifier_column", place, nullable=True)
    if name is not None and not isinstance(name, str):
        raise UserError(f"{place}, column {column!r}: a verifier's name is a text, not {type(name).__name__}")
    return name or ""


class GeneratedTasks:
    """Tasks from a built-in generator: fresh problems every step, or a fixed set of `max_rows`, used like a dataset."""

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        module, _, function = GENERATORS[config.generator or ""].partition(":")
        self._function: Callable[..., list[Task]] = getattr(importlib.import_module(module), function)
        self._check_options()
        self._order = None if config.max_rows is None else EpochOrder(config.max_rows, config.shuffle_seed)

    def __len__(self) -> int:
        return self._config.max_rows or ENDLESS

    def task(self, index: int) -> Task:
        """Problem `index` of the sequence that `shuffle_seed` defines."""
        if not 0 <= index < len(self):
            raise IndexError(f"task {index} of {len(self)}")
        return self._generate(self._config.shuffle_seed, index, 1)[0]

    def for_step(self, seed: int, step: int, num_prompts: int) -> list[Task]:
        """The step's problems: the next `num_prompts` of the sequence that `seed` defines, or of the fixed set."""
        if self._order is None:
            return self._generate(seed, step * num_prompts, num_prompts)
        return [self.task(index) for index in self._order.rows(seed, step, num_prompts)]

    def _generate(self, seed: int, start: int, count: int) -> list[Task]:
        return self._function(seed, self._config.split, start, count, **self._config.options)

    def _check_options(self) -> None:
        known = list(inspect.signature(self._function).parameters)[4:]
        for option in self._config.options:
            if option not in known:
                raise UserError(
                    f"generator {self._config.generator!r} has no option {option!r}; "
                    f"it has {quoted(known)}{_nearest(option, known)}"
                )
        try:
            self._generate(0, 0, 1)
        except (ValueError, TypeError) as error:
            raise UserError(f"generator {self._config.generator!r} does not take these options: {error}") from error


def _dataset_name(path: Path, config: DataConfig) -> str:
    full = path.resolve()
    if config.source == "hf":
        return f"{full.name}-{config.split}"
    return f"{full.parent.name}-{full.stem}" if full.parent.name else full.stem


def _value(row: Row, column: str, field: str, place: str, *, nullable: bool = False) -> Any:
    """The row's value of `column` (or of a path 'a.b' into one), which must be there."""
    value: Any = row
    parts = [column] if column in row else column.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(value, Mapping) or part not in value:
            there = list(value) if isinstance(value, Mapping) else []
            where = f" in {'.'.join(parts[:depth])!r}" if depth else ""
            raise UserError(
                f"{place}: no column {part!r}{where}; "
                f"the columns are {quoted(there)}{_nearest(part, there)} (see {field})"
            )
        value = value[part]
    if value is None and not nullable:
        raise UserError(f"{place}: column {column!r} is null (see {field})")
    return value


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _check_prompt(prompt: Any, place: str) -> str | list[Mapping[str, str]]:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UserError(f"{place}: the prompt is empty")
        return prompt
    is_chat = isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt)
    if not is_chat:
        raise UserError(f"{place}: a prompt is a text or a list of {{role, content}} texts, not {_short(prompt)}")
    return [{"role": message["role"], "content": message["content"]} for message in prompt]


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _extract(answer: Any, pattern: str | None, place: str) -> Any:
    if pattern is None:
        return answer
    if not isinstance(answer, str):
        raise UserError(f"{place}: answer_pattern needs a text, not {_short(answer)}")
    match = re.search(pattern, answer)
    if match is None or match[1] is None:
        raise UserError(f"{place}: the answer does not match answer_pattern {pattern!r}: {_short(answer)}")
    return match[1]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:38]} ... {text[-38:]}"
