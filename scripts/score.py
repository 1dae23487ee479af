"""Scores the rows of a JSONL file: every row comes back in order with a `verdict` beside its columns."""

from __future__ import annotations

import codecs
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, get_args

from rollout.errors import UserError
from verifiers.pool import ScorePool, VerifierSpec
from verifiers.verdict import Status, Verdict

MAX_BLOCK_ROWS = 2048
MAX_BLOCK_BYTES = 2**25


class ScoreFileError(UserError):
    """The file to score, or the place to write to, is unusable; the message names the line or path."""


@dataclass(frozen=True, kw_only=True)
class ScoreSummary:
    """What `score_file` did: `counts` holds every status, `mean_score` is over all rows, `seconds` is wall time."""

    num_rows: int
    counts: Mapping[Status, int]
    mean_score: float
    seconds: float
    rows_per_s: float
    worker_restarts: int


@dataclass(frozen=True)
class _Row:
    """One line of the input: its bytes as they stand, and what the verifier reads of it."""

    line: bytes
    columns: Mapping[str, Any]
    completion: str
    prompt: Any
    answer: Any
    metadata: Mapping[str, Any] = field(default_factory=dict)
    verifier: str = ""


def parse_options(settings: Sequence[str]) -> dict[str, Any]:
    """The options of a verifier from `key=value` texts; a value is JSON, and what is not JSON is the text itself.

    Raises UserError for a text without `=`, and for a key given twice.
    """
    options: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise UserError(f"--option {setting!r}: write it as key=value, for instance --option threshold=0.9")
        if key in options:
            raise UserError(f"--option {key!r} is given twice")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def score_file(
    path: Path,
    verifier: str,
    out: Path,
    num_workers: int,
    timeout_s: float,
    options: Mapping[str, Any] | None = None,
) -> ScoreSummary:
    """Score the JSONL file `path` with one verifier and write `out`, which appears only when it is complete.

    Rows have `completion` and `answer`, optionally `prompt`, `metadata`, and the name of their own `verifier`, which
    `by_task` goes by. All lines are checked before the first is scored; only one block of rows is in memory at a time.
    A row's own `verdict` column, if it has one, is replaced. Raises `ScoreFileError`, `verifiers.VerifierLookupError`,
    or ValueError for bad `num_workers` or `timeout_s`.
    """
    out = check_paths(path, out)
    counts: Counter[Status] = Counter()
    total = 0.0
    spec = VerifierSpec(verifier, verifier, options=options or {})
    with ScorePool([spec], num_workers, timeout_s) as pool:
        if sum(1 for _ in _rows(path)) == 0:
            raise ScoreFileError(f"{path} has no rows to score")
        start = time.perf_counter()
        with atomic(out) as stream:
            for block in _blocks(_rows(path)):
                verdicts = pool.score([row.completion for row in block], block)
                stream.writelines(_scored_line(row, verdict) for row, verdict in zip(block, verdicts, strict=True))
                counts.update(verdict.status for verdict in verdicts)
                total += sum(verdict.score for verdict in verdicts)
        seconds = time.perf_counter() - start
        restarts = pool.counters["worker_restarts"]
    num_rows = counts.total()
    return ScoreSummary(
        num_rows=num_rows,
        counts={status: counts[status] for status in get_args(Status)},
        mean_score=total / num_rows,
        seconds=seconds,
        rows_per_s=num_rows / seconds,
        worker_restarts=restarts,
    )


def check_paths(path: Path, out: Path) -> Path:
    """`out` with links resolved, so that replacing it keeps the link."""
    if not path.is_file():
        raise ScoreFileError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    out = out.resolve()
    if not out.parent.is_dir():
        raise ScoreFileError(f"can't write {out}: the folder {out.parent} does not exist")
    if out.exists():
        if not out.is_file():
            raise ScoreFileError(f"can't write {out}: it exists and is not a regular file")
        if out.samefile(path):
            raise ScoreFileError(f"the output {out} is the input; write to another file")
    return out


def _rows(path: Path) -> Iterator[_Row]:
    """The rows of the file one by one, blank lines left out; raises `ScoreFileError` at the first bad one."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            body = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
            if body:
                try:
                    yield _parse(body)
                except (ValueError, RecursionError) as exc:
                    raise ScoreFileError(f"{path}, line {number}: {exc}") from exc


@contextmanager
def _numbers_of_any_length() -> Iterator[None]:
    digits = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(digits)


def _parse(line: bytes) -> _Row:
    """One row; raises ValueError or RecursionError with what is wrong about it."""
    try:
        with _numbers_of_any_length():  # a program's expected output may be longer than Python reads by default
            columns = json.loads(line.decode())
    except ValueError as exc:
        raise ValueError(f"not JSON in UTF-8 ({exc})") from exc
    if not isinstance(columns, dict):
        raise ValueError(f"a {type(columns).__name__}, not a JSON object with `completion` and `answer`")
    for name in ("completion", "answer"):
        if columns.get(name) is None:
            raise ValueError(f"the row has no `{name}`; its columns are {', '.join(map(repr, columns))}"[:400])
    if not isinstance(columns["completion"], str):
        raise ValueError(f"`completion` is a {type(columns['completion']).__name__}, not text")
    metadata = columns.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError(f"`metadata` is a {type(metadata).__name__}, not an object")
    verifier = columns.get("verifier")
    if verifier is not None and not isinstance(verifier, str):
        raise ValueError(f"`verifier` is a {type(verifier).__name__}, not a name")
    prompt, answer = columns.get("prompt"), columns["answer"]
    return _Row(line, columns, columns["completion"], prompt, answer, metadata or {}, verifier or "")


def _blocks(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    """The rows in lists of bounded length and bounded bytes."""
    block: list[_Row] = []
    size = 0
    for row in rows:
        block.append(row)
        size += len(row.line)
        if len(block) >= MAX_BLOCK_ROWS or size >= MAX_BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def _scored_line(row: _Row, verdict: Verdict) -> bytes:
    """The row's own bytes with the verdict put in at the end, so that no other column changes by a digit."""
    if "verdict" in row.columns:
        return json.dumps({**row.columns, "verdict": verdict.to_dict()}).encode() + b"\n"
    return row.line[:-1].rstrip() + b', "verdict": ' + json.dumps(verdict.to_dict()).encode() + b"}\n"


@contextmanager
def atomic(out: Path) -> Iterator[BinaryIO]:
    """A file that becomes `out` when the block ends well, and vanishes otherwise."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
