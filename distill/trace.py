"""`Trace`: one worked answer of a teacher with its provenance, its split into reasoning and answer, and its Parquet row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.durable import replacing
from rollout.errors import UserError
from verifiers.verdict import Verdict

Question = str | Sequence[Mapping[str, str]]
KEPT = "kept"
REASONING_SLOT, ANSWER_SLOT = "{reasoning}", "{answer}"
R1_COMPLETION = "<think>\n{reasoning}\n</think>\n\n{answer}"
"""The form of DeepSeek-R1's own answers."""
ROWS_PER_PART = 1000
_ROWS_PER_GROUP = 256  # rows of 100k tokens: what is in memory at once stays near 100 MB


class TraceError(RuntimeError):
    """A trace that can't be written or read; the message names which."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One answer of a teacher to one question; every mapping holds plain JSON values.

    `reasoning` is the text inside the think block and `answer_text` what follows it, both stripped; `completion` is what
    the student is to write. Where the teacher's text is not of that form, `fault` says why, and `completion` is that text
    as it came. `gold` is the known answer (JSON value, None without one) that `verifier` judges by; `source` the
    dataset, endpoint or engine; `sampling` how it was sampled (temperature, top_p, max_completion_tokens, seed,
    sample_index, as far as known); `finish_reason` "stop", "length", another word of the source's, or None; `num_tokens`
    the completion's length as its source or a tokenizer counted it. `filters` maps each filter that looked at the trace to
    "kept" or the reason for which it dropped it.
    """

    question_id: str
    question: Question
    reasoning: str
    answer_text: str
    completion: str
    fault: str | None = None
    gold: Any = None
    verifier: str | None = None
    teacher: str
    source: str
    sampling: Mapping[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None
    num_tokens: int | None = None
    verdict: Verdict | None = None
    filters: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sample_index(self) -> int:
        """Which of the teacher's answers to this question, from 0."""
        return int(self.sampling.get("sample_index", 0))

    @property
    def question_text(self) -> str:
        """The question as one text: of chat messages the contents, an empty line between them."""
        if isinstance(self.question, str):
            return self.question
        return "\n\n".join(message["content"] for message in self.question)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The question as chat messages: a text is one user message."""
        if isinstance(self.question, str):
            return [{"role": "user", "content": self.question}]
        return [dict(message) for message in self.question]


# --- a teacher's text ------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """A text taken apart; `fault` is why it is not one think block and then an answer, None where it is."""

    reasoning: str
    answer_text: str
    fault: str | None


def split_reasoning(text: str, open_tag: str = "<think>", close_tag: str = "</think>") -> Split:
    """What stands inside the think block and what follows it, both stripped.

    A missing `open_tag` with a `close_tag` is fine: many chat templates open the block in the prompt. A block that never
    closes is all reasoning and no answer.
    """
    stripped = text.strip()
    begins = stripped.startswith(open_tag)
    body = stripped[len(open_tag) :] if begins else stripped
    before, close, after = body.partition(close_tag)
    if not close:
        fault = "the think block never closes" if open_tag in stripped else "there is no think block"
        inside = begins or open_tag in stripped
        return Split(body.strip() if inside else "", "" if inside else stripped, fault)
    fault = _fault(before, after, open_tag, close_tag)
    return Split(before.strip(), after.strip(), fault)


def _fault(before: str, after: str, open_tag: str, close_tag: str) -> str | None:
    if more := before.count(close_tag) + after.count(close_tag):
        return f"{close_tag} occurs {more + 1} times"
    if open_tag in before or open_tag in after:
        return f"{open_tag} stands inside the text"
    if not before.strip():
        return "the reasoning is empty"
    return None if after.strip() else "there is no answer after the think block"


def check_completion_template(template: str) -> str:
    """`template` itself if it has `{reasoning}` and `{answer}` once each, in this order; otherwise ValueError."""
    if template.count(REASONING_SLOT) != 1 or template.count(ANSWER_SLOT) != 1:
        raise ValueError(f"must have {REASONING_SLOT} and {ANSWER_SLOT} once each")
    if template.index(REASONING_SLOT) > template.index(ANSWER_SLOT):
        raise ValueError(f"must have {REASONING_SLOT} before {ANSWER_SLOT}")
    return template


def render_completion(template: str, reasoning: str, answer_text: str) -> str:
    """The student's completion; the texts are put in as they are, braces included."""
    head, _, rest = template.partition(REASONING_SLOT)
    middle, _, tail = rest.partition(ANSWER_SLOT)
    return head + reasoning + middle + answer_text + tail


class Worked(NamedTuple):
    """A teacher's text as a trace has it."""

    reasoning: str
    answer_text: str
    completion: str
    fault: str | None


@dataclass(frozen=True, kw_only=True)
class Form:
    """The marks in a teacher's text, and the form in which the student is to write the same."""

    think_open: str = "<think>"
    think_close: str = "</think>"
    answer_open: str = ""
    answer_close: str = ""
    completion_template: str = R1_COMPLETION

    def of_text(self, text: str, *, inside: bool = False) -> Worked:
        """A whole text; `inside` where the prompt had opened the think block."""
        whole = valid_text(text)
        if inside and not whole.lstrip().startswith(self.think_open):
            whole = f"{self.think_open}\n{whole.lstrip()}"
        return self._worked(split_reasoning(whole, self.think_open, self.think_close), whole)

    def of_parts(self, reasoning: str, answer_text: str) -> Worked:
        """A text whose source gives reasoning and answer apart."""
        before, after = valid_text(reasoning), valid_text(answer_text)
        fault = _fault(before, after, self.think_open, self.think_close)
        closing = f"\n{self.think_close}\n\n{after.strip()}" if after.strip() else ""
        return self._worked(
            Split(before.strip(), after.strip(), fault), f"{self.think_open}\n{before.strip()}{closing}"
        )

    def _worked(self, split: Split, whole: str) -> Worked:
        reasoning, answer, fault = split
        if self.answer_open or self.answer_close:
            if fault is None and not (answer.startswith(self.answer_open) and answer.endswith(self.answer_close)):
                fault = f"the answer is not between {self.answer_open} and {self.answer_close}"
            answer = answer.removeprefix(self.answer_open).removesuffix(self.answer_close).strip()
            if fault is None and not answer:
                fault = "there is no answer after the think block"
        if fault is not None:
            return Worked(reasoning, answer, whole, fault)
        return Worked(reasoning, answer, render_completion(self.completion_template, reasoning, answer), None)


def valid_text(text: str) -> str:
    """`text` with lone surrogates, which JSON can escape but no file can hold, as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        # A pair that was escaped in two pieces becomes its character; what stays alone is replaced.
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


# --- rows ------------------------------------------------------------------------------------------------------------

_VERDICT = pa.struct(
    [
        ("score", pa.float64()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("extracted", pa.string()),
        ("parts", pa.string()),
        ("elapsed_s", pa.float64()),
    ]
)
TRACE_SCHEMA = pa.schema(
    [
        pa.field("question_id", pa.string(), nullable=False),
        pa.field("question", pa.large_string(), nullable=False),
        ("messages", pa.large_string()),
        pa.field("reasoning", pa.large_string(), nullable=False),
        pa.field("answer_text", pa.large_string(), nullable=False),
        pa.field("completion", pa.large_string(), nullable=False),
        ("fault", pa.string()),
        ("gold", pa.large_string()),
        ("verifier", pa.string()),
        pa.field("teacher", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        ("sampling", pa.string()),
        ("finish_reason", pa.string()),
        ("num_tokens", pa.int64()),
        ("verdict", _VERDICT),
        ("filters", pa.string()),
        ("metadata", pa.large_string()),
    ]
)
"""One row a trace; `gold`, `messages` (null for a plain question), `sampling`, `filters`, `metadata` and the verdict's
`parts` are JSON text."""

_JSON = ("gold", "sampling", "filters", "metadata")
_PLAIN = tuple(item.name for item in fields(Trace) if item.name not in (*_JSON, "question", "verdict"))


def to_row(trace: Trace) -> dict[str, Any]:
    """The Parquet row of a trace; TraceError for a value that JSON or UTF-8 can't hold."""
    try:
        is_text = isinstance(trace.question, str)
        row = {name: getattr(trace, name) for name in _PLAIN}
        row |= {name: None if (value := getattr(trace, name)) is None else json.dumps(value) for name in _JSON}
        row["question"] = trace.question_text
        row["messages"] = None if is_text else json.dumps([dict(message) for message in trace.messages])
        verdict = trace.verdict.to_dict() if trace.verdict else None
        row["verdict"] = verdict and verdict | {"parts": json.dumps(dict(verdict["parts"]))}
        for name in (*_PLAIN, "question"):
            if isinstance(row[name], str):
                row[name].encode()
    except (TypeError, ValueError) as error:
        raise TraceError(f"trace {trace.question_id!r} of {trace.source} can't be written: {error}") from error
    return row


def from_row(row: Mapping[str, Any]) -> Trace:
    """The trace of a row of `TRACE_SCHEMA`."""
    values: dict[str, Any] = {name: row[name] for name in _PLAIN}
    for name in _JSON:
        values[name] = None if row[name] is None else json.loads(row[name])
    values["question"] = row["question"] if row["messages"] is None else json.loads(row["messages"])
    verdict = row["verdict"]
    values["verdict"] = verdict and Verdict(**(verdict | {"parts": json.loads(verdict["parts"])}))
    return Trace(**values)


# --- files -----------------------------------------------------------------------------------------------------------


def read_traces(path: Path) -> Iterator[Trace]:
    """The traces of a Parquet file, or of a folder's `part-*.parquet` in order, as a stream; UserError if it has none."""
    path = Path(path)
    if path.is_dir():
        for part in part_files(path):
            yield from read_traces(part)
        return
    with _open(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS_PER_GROUP):
            for row in batch.to_pylist():
                yield from_row(row)


def count_traces(path: Path) -> int:
    """How many rows a file or folder of parts has, from its footers."""
    path = Path(path)
    if path.is_dir():
        return sum(map(count_traces, part_files(path)))
    with _open(path) as file:
        return file.metadata.num_rows


def _open(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: can't be read as traces (Parquet): {error}") from error
    if missing := [name for name in TRACE_SCHEMA.names if name not in file.schema_arrow.names]:
        file.close()
        raise UserError(f"{path}: this is not a file of traces, it has no column {', '.join(missing)}")
    return file


def part_files(folder: Path) -> list[Path]:
    """The parts in a folder, in order."""
    return sorted(Path(folder).glob("part-*.parquet"))


def write_traces(path: Path, traces: Iterable[Trace]) -> int:
    """Write a stream of traces as one Parquet file, whole or not at all, and return how many they were."""
    count = 0
    rows: list[dict[str, Any]] = []
    with replacing(Path(path)) as temporary, pq.ParquetWriter(temporary, TRACE_SCHEMA, compression="zstd") as writer:
        for trace in traces:
            rows.append(to_row(trace))
            count += 1
            if len(rows) == _ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(rows, schema=TRACE_SCHEMA))
                rows = []
        if rows or not count:
            writer.write_table(pa.Table.from_pylist(rows, schema=TRACE_SCHEMA))
    return count


class TraceWriter:
    """Writes traces in parts of `rows_per_part` rows into `folder`, each part whole or not at all, after those there.

    A context manager: where the block ends well, what is still waiting becomes the last part; where it fails, it is lost.
    `num_kept` is the number of rows on disk, from which a source that is read again in the same order goes on.
    """

    def __init__(self, folder: Path, rows_per_part: int = ROWS_PER_PART) -> None:
        self.folder, self.rows_per_part = Path(folder), rows_per_part
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink()
        self._num_parts = len(part_files(self.folder))
        self.num_kept = count_traces(self.folder)
        self._waiting: list[Trace] = []

    def write(self, trace: Trace) -> None:
        """Add a trace; it is on disk when its part is full, or after `flush`."""
        self._waiting.append(trace)
        if len(self._waiting) >= self.rows_per_part:
            self.flush()

    def flush(self, *, even_empty: bool = False) -> None:
        """Write what is waiting as a part, where nothing is an empty one if asked for."""
        if self._waiting or even_empty:
            self.num_kept += write_traces(self.folder / f"part-{self._num_parts:06d}.parquet", self._waiting)
            self._num_parts += 1
            self._waiting = []

    def merge(self, path: Path) -> int:
        """Write all parts as one file and return its number of rows."""
        self.flush()
        return write_traces(path, read_traces(self.folder))

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is None:
            self.flush()
