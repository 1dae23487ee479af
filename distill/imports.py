"""Published traces: rows of JSONL or Parquet, streamed, each broken one named by its line, as `Trace`s by a column map."""

from __future__ import annotations

import difflib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, AnyStr, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from distill.trace import Form, Question, Trace, Worked, valid_text
from distill.traces_config import ColumnsConfig, ImportSource
from distill.unreadable import Unreadable
from rollout.errors import UserError

BROKEN_ROW = "broken row"
BROKEN_ANSWER = "broken answer"
ROWS_PER_BATCH = 64  # rows of 100k tokens are half a megabyte each
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
_MARKS = {b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


class RowError(ValueError):
    """A row, or an answer in it, that can't be used; the message says why."""


class Place(NamedTuple):
    """Where a row stands, and its number among all rows of the source, from 0."""

    text: str
    number: int


def import_traces(name: str, source: ImportSource, form: Form, losses: Unreadable) -> Iterator[Trace]:
    """The traces of a source in the order of its rows; what is broken goes to `losses`, or is a UserError.

    A source all of whose rows are broken is a UserError too: its column map does not fit.
    """
    seen: Counter[str] = Counter()
    num_traces = 0
    for place, row in read_rows(source, losses):
        try:
            traces = list(_traces(name, source, form, row, place, losses))
        except RowError as error:
            _broken(source, losses, BROKEN_ROW, place.text, str(error))
            continue
        for trace in traces:
            if source.columns.id:  # rows with one id are answers to one question
                trace = _renumbered(trace, seen)
            num_traces += 1
            yield trace
    if not num_traces and losses.first is not None:
        raise UserError(
            f"{source.path}: no row could be read; the first: {losses.first}. Does sources.{name}.columns fit?"
        )


def _broken(source: ImportSource, losses: Unreadable, kind: str, place: str, reason: str, count: int = 1) -> None:
    if source.on_broken == "stop":
        raise UserError(f"{place}: {reason}. Mend it, or skip such rows with on_broken='skip'.")
    losses.add(kind, place, reason, count)


def _renumbered(trace: Trace, seen: Counter[str]) -> Trace:
    index = seen[trace.question_id]
    seen[trace.question_id] += 1
    return replace(trace, sampling={**trace.sampling, "sample_index": index})


# --- rows ------------------------------------------------------------------------------------------------------------


def read_rows(source: ImportSource, losses: Unreadable) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """Every row that is a row, with its place; memory is bounded by the longest line or by a batch of rows."""
    index = 0
    for path in source_files(source.path):
        rows = _parquet_rows if path.suffix == ".parquet" else _jsonl_rows
        for where, count, row in rows(path, source):
            if source.max_rows is not None and index >= source.max_rows:
                return
            if isinstance(row, RowError):
                _broken(source, losses, BROKEN_ROW, where, str(row), count)
            else:
                yield Place(where, index), row
            index += count


def source_files(path: Path) -> list[Path]:
    """The data files of a path in order; UserError where there are none."""
    path = path.expanduser()
    if path.is_dir():
        files = sorted(file for ending in ("*.parquet", "*.jsonl") for file in path.rglob(ending))
        if not files:
            raise UserError(f"{path}: the folder has no .parquet or .jsonl file")
        return files
    if not path.is_file():
        raise UserError(f"{path}: there is no such file or folder (from {Path.cwd()}): download the data there first")
    return [path]


_Row = tuple[str, int, Mapping[str, Any] | RowError]


def _jsonl_rows(path: Path, source: ImportSource) -> Iterator[_Row]:
    for number, line in _lines(path, source):
        if isinstance(line, RowError):
            yield f"{path}, line {number}", 1, line
        elif line.strip():
            yield f"{path}, line {number}", 1, _parse(line)


def _parse(line: str) -> Mapping[str, Any] | RowError:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return RowError(f"not valid JSON: {error}")
    if not isinstance(row, dict):
        return RowError(f"a {type(row).__name__} where a JSON object is needed")
    return row


def _lines(path: Path, source: ImportSource) -> Iterator[tuple[int, str | RowError]]:
    """Numbered lines from 1 as text; one that is too long or not valid in its encodings is an error."""
    limit = source.max_line_bytes
    with path.open("rb") as file:
        head = file.read(4)
        mark = next((encoding for mark, encoding in _MARKS.items() if head.startswith(mark)), None)
        encoding = mark or source.encoding
        file.seek(0)
        if "\n".encode(encoding) != b"\n":  # UTF-16 and UTF-32, where a byte does not tell the end of a line
            text = io.TextIOWrapper(file, encoding=encoding, errors="replace", newline="\n")
            lines = (
                RowError(f"longer than max_line_bytes={limit}") if line is None else line
                for line in _limited(text, "\n", limit)
            )
            yield from enumerate(lines, start=1)
            return
        for number, line in enumerate(_limited(file, b"\n", limit), start=1):
            if line is None:
                yield number, RowError(f"longer than max_line_bytes={limit}")
            else:
                yield number, _decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, source)


def _limited(file: IO[AnyStr], newline: AnyStr, limit: int) -> Iterator[AnyStr | None]:
    """The lines of a file, None for each that is longer than `limit`, which is passed over piece by piece."""
    while line := file.readline(limit + 1):
        if line.endswith(newline) or len(line) <= limit:
            yield line
            continue
        while (piece := file.readline(limit)) and not piece.endswith(newline):
            pass
        yield None


def _decode(line: bytes, source: ImportSource) -> str | RowError:
    try:
        return line.decode(source.encoding)
    except UnicodeDecodeError as error:
        if source.fallback_encoding is not None:
            return line.decode(source.fallback_encoding, "replace")
        return RowError(
            f"not valid {source.encoding} at byte {error.start}; is it in another encoding (fallback_encoding)?"
        )


def _parquet_rows(path: Path, source: ImportSource) -> Iterator[_Row]:
    try:
        file = pq.ParquetFile(path, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        yield str(path), 1, RowError(f"not a Parquet file: {error}")
        return
    with file:
        columns = _columns_of(source.columns, file.schema_arrow.names, path)
        first = 0
        for group in range(file.num_row_groups):
            end, done = first + file.metadata.row_group(group).num_rows, first
            try:
                for batch in file.iter_batches(ROWS_PER_BATCH, row_groups=[group], columns=columns):
                    for row in batch.to_pylist():
                        yield f"{path}, row {done}", 1, row
                        done += 1
            except (OSError, pa.ArrowException) as error:
                yield f"{path}, rows {done} to {end - 1}", end - done, RowError(f"damaged Parquet: {error}")
            first = end


def _columns_of(columns: ColumnsConfig, there: list[str], path: Path) -> list[str]:
    """The top-level columns that the map needs; UserError for one that the file does not have."""
    needed: list[str] = []
    for field, value in columns.model_dump().items():
        if field in ("role_key", "content_key", "gold_pattern"):
            continue
        for name in [value] if isinstance(value, str) else value or ():
            top = name if name in there else name.split(".")[0]
            if top not in there:
                near = difflib.get_close_matches(top, there, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UserError(f"{path}: no column {top!r} (columns.{field}); it has {', '.join(there)}{hint}")
            needed.append(top)
    return list(dict.fromkeys(needed))


# --- from a row to traces ----------------------------------------------------------------------------------------------


def _traces(
    name: str, source: ImportSource, form: Form, row: Mapping[str, Any], place: Place, losses: Unreadable
) -> Iterator[Trace]:
    columns = source.columns
    question, answers = _question_and_answers(columns, row)
    if not answers:
        raise RowError("it has no answer")
    shared = {
        "question_id": f"{name}/{place.number if columns.id is None else _value(row, columns.id)}",
        "question": question,
        "gold": _gold(columns, row),
        "verifier": source.verifier,
        "teacher": source.teacher,
        "source": name,
    }
    metadata = {column: _plain(_value(row, column, missing_ok=True)) for column in columns.metadata}
    count = len(answers)
    for index, answer in enumerate(answers):
        worked = _worked(form, answer)
        if isinstance(worked, RowError):
            _broken(source, losses, BROKEN_ANSWER, f"{place.text}, answer {index}", str(worked))
            continue
        own = {column: _plain(_of_answer(row, column, index, count)) for column in columns.answer_metadata}
        finish = _of_answer(row, columns.finish_reason, index, count)
        num_tokens = _of_answer(row, columns.num_tokens, index, count)
        yield Trace(
            **shared,
            **worked._asdict(),
            sampling={**source.sampling, "sample_index": index},
            finish_reason=finish if isinstance(finish, str) else None,
            num_tokens=int(num_tokens) if isinstance(num_tokens, int | float) and math.isfinite(num_tokens) else None,
            metadata=metadata | own,
        )


Answer = str | tuple[str, str] | RowError
"""A whole text, or reasoning and answer apart."""


def _worked(form: Form, answer: Answer) -> Worked | RowError:
    if isinstance(answer, RowError):
        return answer
    return form.of_text(answer) if isinstance(answer, str) else form.of_parts(*answer)


def _question_and_answers(columns: ColumnsConfig, row: Mapping[str, Any]) -> tuple[Question, list[Answer]]:
    if columns.messages is not None:
        *before, last = _messages(columns, _value(row, columns.messages), columns.messages)
        if last["role"] != "assistant":
            raise RowError(f"the last message is of {last['role']!r}, not of the assistant")
        apart = last.get("reasoning")
        answers: list[Answer] = [(apart, last["content"]) if apart else last["content"]]
    else:
        asked = _value(row, columns.question or "")
        before = [{"role": "user", "content": asked}] if isinstance(asked, str) else None
        before = before or _messages(columns, asked, columns.question or "")
        answers = _answers(columns, row)
    if columns.system is not None and (system := _value(row, columns.system, missing_ok=True)):
        before = [{"role": "system", "content": _text(system, columns.system)}, *before]
    asked = [{"role": message["role"], "content": valid_text(message["content"])} for message in before]
    if not any(message["role"] == "user" and message["content"].strip() for message in asked):
        raise RowError("it has no question")
    return (asked[0]["content"] if len(asked) == 1 else asked), answers


def _answers(columns: ColumnsConfig, row: Mapping[str, Any]) -> list[Answer]:
    if columns.completion is not None:
        return [_text_or_error(text, columns.completion) for text in _as_list(_value(row, columns.completion))]
    reasonings = _as_list(_value(row, columns.reasoning or ""))
    texts = _as_list(_value(row, columns.answer_text or ""))
    if len(reasonings) != len(texts):
        raise RowError(f"{len(reasonings)} texts in {columns.reasoning!r}, but {len(texts)} in {columns.answer_text!r}")
    answers: list[Answer] = []
    for reasoning, text in zip(reasonings, texts, strict=True):
        pair = (_text_or_error(reasoning, columns.reasoning or ""), _text_or_error(text, columns.answer_text or ""))
        wrong = next((part for part in pair if isinstance(part, RowError)), None)
        answers.append(wrong or (str(pair[0]), str(pair[1])))
    return answers


def _messages(columns: ColumnsConfig, value: Any, column: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise RowError(f"column {column!r} is not a list of messages")
    messages = []
    for number, message in enumerate(value):
        role = message.get(columns.role_key) if isinstance(message, Mapping) else None
        content = message.get(columns.content_key) if isinstance(message, Mapping) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise RowError(
                f"message {number} of {column!r} has no text {columns.role_key!r} and {columns.content_key!r}"
            )
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        own = {"reasoning": reasoning} if isinstance(reasoning, str) else {}
        messages.append({"role": _ROLES.get(role, role), "content": content} | own)
    return messages


def _gold(columns: ColumnsConfig, row: Mapping[str, Any]) -> Any:
    if columns.gold is None:
        return None
    gold = _plain(_value(row, columns.gold, missing_ok=True))
    if gold is None or columns.gold_pattern is None:
        return gold
    match = re.search(columns.gold_pattern, _text(gold, columns.gold))
    if match is None or match[1] is None:
        raise RowError(f"column {columns.gold!r} does not match gold_pattern")
    return match[1]


def _value(row: Mapping[str, Any], column: str, *, missing_ok: bool = False) -> Any:
    """The row's value of a column or of a path 'a.b' into one."""
    value: Any = row
    for part in [column] if column in row else column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            if missing_ok:
                return None
            raise RowError(f"no column {column!r}; it has {', '.join(map(str, row))}")
        value = value[part]
    if value is None and not missing_ok:
        raise RowError(f"column {column!r} is null")
    return value


def _of_answer(row: Mapping[str, Any], column: str | None, index: int, count: int) -> Any:
    """The value of a column for one of `count` answers: of a list its own, anything else holds for all."""
    value = None if column is None else _value(row, column, missing_ok=True)
    if isinstance(value, list):
        return value[index] if len(value) == count else None
    return value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"column {column!r} holds a {type(value).__name__}, not text")
    return value


def _text_or_error(value: Any, column: str) -> str | RowError:
    return value if isinstance(value, str) else RowError(f"column {column!r} holds a {type(value).__name__}, not text")


def _plain(value: Any) -> Any:
    """A value as JSON has it; dates and the like as text."""
    return json.loads(json.dumps(value, default=str))
