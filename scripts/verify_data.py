"""Audits the gold answers of a data set: which of them a verifier can read, with counts by status and examples."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from rollout.errors import UserError
from scripts.score import atomic, check_paths
from verifiers.pool import ScorePool, VerifierSpec
from verifiers.verdict import GoldAudit, GoldStatus

# Where data sets keep their gold answer, the first that a file's first row has; a dot goes into an object.
ANSWER_FIELDS = (
    "answer", "gold", "gold_answer", "ground_truth", "reward_model.ground_truth", "final_answer", "expected_answer",
    "target", "label", "gt", "solution",
)  # fmt: skip
PROMPT_FIELDS = ("prompt", "problem", "question", "query")
MAX_BLOCK_ROWS = 4096
MAX_FILE_BYTES = 2**30
SHOWN_CHARS = 100


class DataAuditError(UserError):
    """The data set, or the place to write to, is unusable; the message names the line, field or path."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One gold that is not `ok`: its row (from 1), the text, clipped, and why."""

    row: int
    answer: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class DataAudit:
    """What `verify_data` found: `counts` holds every status, `examples` the first few of each status but `ok`."""

    num_rows: int
    answer_field: str
    counts: Mapping[GoldStatus, int]
    examples: Mapping[GoldStatus, Sequence[Example]]
    num_not_audited: int

    def share(self, status: GoldStatus) -> float:
        """The share of the rows with `status`."""
        return self.counts[status] / self.num_rows


@dataclass(frozen=True)
class _GoldTask:
    """What a verifier's `prepare` may read of one row."""

    answer: Any
    prompt: Any
    metadata: Mapping[str, Any] = field(default_factory=dict)
    verifier: str = ""


def verify_data(
    path: Path,
    verifier: str,
    options: Mapping[str, Any] | None = None,
    examples: int = 5,
    out: Path | None = None,
    *,
    answer_field: str | None = None,
    num_workers: int = 2,
    timeout_s: float = 5.0,
) -> DataAudit:
    """Audit the gold answers of a JSONL, JSON or Parquet file with the verifier's `prepare`.

    The gold is in `answer_field`, or in the first of `ANSWER_FIELDS` that the first row has. With `out`, every row's
    audit is written there as JSONL (`row`, `answer`, `status`, `reason`, `parsed`), which appears only when it is
    complete. Golds of any status are a result, not an error: raises `DataAuditError` for an unusable file or field,
    `verifiers.VerifierLookupError`, and ValueError for bad numbers.
    """
    if examples < 0:
        raise ValueError(f"examples is {examples}; it must be 0 or more")
    out = check_paths(path, out) if out is not None else None
    rows = _rows(path)
    name = answer_field or _answer_field(path, rows)
    spec = VerifierSpec(verifier, verifier, options=options or {})
    with ScorePool([spec], num_workers, timeout_s) as pool:
        if out is None:
            return _audit(pool, rows, name, examples, [])
        with atomic(out) as stream:
            written: list[bytes] = []
            audit = _audit(pool, rows, name, examples, written)
            stream.writelines(written)
    return audit


def _audit(
    pool: ScorePool, rows: Sequence[Mapping[str, Any]], name: str, limit: int, written: list[bytes]
) -> DataAudit:
    counts: Counter[GoldStatus] = Counter()
    examples: dict[GoldStatus, list[Example]] = {status: [] for status in get_args(GoldStatus) if status != "ok"}
    num_not_audited = 0
    for start in range(0, len(rows), MAX_BLOCK_ROWS):
        tasks = [_task(row, name) for row in rows[start : start + MAX_BLOCK_ROWS]]
        for number, (task, found) in enumerate(zip(tasks, _audits(pool, tasks), strict=True), start=start + 1):
            if found is None:
                num_not_audited += 1
                continue
            counts[found.status] += 1
            if found.status != "ok" and len(examples[found.status]) < limit:
                shown = Example(row=number, answer=_clip(task.answer), reason=found.reason)
                examples[found.status].append(shown)
            line = {"row": number, "answer": task.answer, **asdict(found)}
            written.append(json.dumps(line, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n")
    return DataAudit(
        num_rows=len(rows),
        answer_field=name,
        counts={status: counts[status] for status in get_args(GoldStatus)},
        examples=examples,
        num_not_audited=num_not_audited,
    )


def _audits(pool: ScorePool, tasks: Sequence[_GoldTask]) -> list[GoldAudit | None]:
    """`missing` where the row has no gold, which no verifier need be asked about."""
    asked = [task for task in tasks if task.answer is not None]
    answers = iter(pool.prepare(asked))
    empty = GoldAudit(status="missing", reason="the row has no gold answer")
    return [empty if task.answer is None else next(answers) for task in tasks]


def _task(row: Mapping[str, Any], name: str) -> _GoldTask:
    prompt = next((row[key] for key in PROMPT_FIELDS if key in row), "")
    metadata = row.get("metadata")
    return _GoldTask(_value(row, name), prompt, metadata if isinstance(metadata, Mapping) else row)


def _value(row: Mapping[str, Any], name: str) -> Any:
    """The row's gold; an answer in a list of one is that one."""
    value: Any = row
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _answer_field(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    for name in ANSWER_FIELDS:
        if _value(rows[0], name) is not None:
            return name
    columns = ", ".join(map(repr, rows[0]))[:300]
    raise DataAuditError(f"{path}: no field of its first row is known to hold a gold answer; say which of {columns}")


def _rows(path: Path) -> list[Mapping[str, Any]]:
    """All rows of the file; raises `DataAuditError`."""
    if not path.is_file():
        raise DataAuditError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise DataAuditError(f"{path} is larger than {MAX_FILE_BYTES // 2**30} GiB; audit it in parts")
    suffix = path.suffix.lower()
    rows = list(_parquet(path)) if suffix == ".parquet" else list(_json(path) if suffix == ".json" else _jsonl(path))
    if not rows:
        raise DataAuditError(f"{path} has no rows")
    return rows


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        yield from pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as exc:
        raise DataAuditError(f"{path} can't be read as Parquet: {exc}") from exc


def _json(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a JSON array, or of an object that holds one array; otherwise the file is read as JSONL."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        yield from _jsonl(path)
        return
    if isinstance(data, dict):
        lists = [value for value in data.values() if isinstance(value, list)]
        data = lists[0] if len(lists) == 1 else [data]
    if not isinstance(data, list):
        raise DataAuditError(f"{path} holds a {type(data).__name__}, not an array of objects")
    for number, row in enumerate(data, start=1):
        if not isinstance(row, dict):
            raise DataAuditError(f"{path}, entry {number}: a {type(row).__name__}, not an object")
        yield row


def _jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as exc:
                raise DataAuditError(f"{path}, line {number}: not JSON in UTF-8 ({exc})") from exc
            if not isinstance(row, dict):
                raise DataAuditError(f"{path}, line {number}: a {type(row).__name__}, not an object")
            yield row


def _clip(answer: Any) -> str:
    text = " ".join(str(answer).split())
    return text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS - 1]}…"


def audit_lines(audit: DataAudit) -> list[str]:
    """What was found, in lines for the terminal; statuses that did not occur are left out."""
    lines = [f"{audit.num_rows} rows, gold answers from `{audit.answer_field}`"]
    for status, count in audit.counts.items():
        if not count:
            continue
        lines.append(f"  {status:<16}{count:>8}  {audit.share(status):6.1%}")
        lines += [
            f"    row {example.row}: {example.answer}  ({example.reason})" for example in audit.examples.get(status, ())
        ]
    if audit.num_not_audited:
        lines.append(
            f"  {'not audited':<16}{audit.num_not_audited:>8}  the verifier has nothing to say of a gold answer"
        )
    return lines
