"""Every sample of a run on disk: one Parquet part per step and phase while it runs, one `samples.parquet` after."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from rollout.durable import jsonable, replacing
from rollout.errors import UserError
from rollout.records import Group, Sample

if TYPE_CHECKING:
    import pyarrow as pa

Phase = Literal["train", "eval_before", "eval_after"]
MERGED = "samples.parquet"
PARTS = "samples"


def schema() -> pa.Schema:
    """The columns: `answer` and `parts` are JSON text; verdict columns are null for a sample that wasn't scored.

    `used` is whether a training sample was given to the learner, null for evaluations: those of a step that were not, as
    their group told nothing, have no advantage.
    """
    import pyarrow as pa

    text, number, index = pa.string(), pa.float64(), pa.int64()
    return pa.schema(
        [
            ("step", index),
            ("phase", text),
            ("task_id", text),
            ("sample_index", index),
            ("prompt", text),
            ("completion", text),
            ("answer", text),
            ("score", number),
            ("status", text),
            ("reason", text),
            ("extracted", text),
            ("parts", text),
            ("elapsed_s", number),
            ("advantage", number),
            ("used", pa.bool_()),
            ("num_completion_tokens", index),
            ("finish_reason", text),
            ("policy_version_first", index),
            ("policy_version_last", index),
        ]
    )


def write_part(run_dir: Path, step: int, groups: Sequence[Group], phase: Phase, prompts: Sequence[str]) -> Path:
    """Write all samples of one step and phase, `prompts` being one text per group; replaces an earlier write."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if phase not in get_args(Phase):
        raise ValueError(f"phase is one of {', '.join(get_args(Phase))}, not {phase!r}")
    if len(prompts) != len(groups):
        raise ValueError(f"write_samples: {len(prompts)} prompts for {len(groups)} groups; there is one per group")
    rows = [
        _row(step, phase, group, sample, prompt)
        for group, prompt in zip(groups, prompts, strict=True)
        for sample in group.samples
    ]
    path = run_dir / PARTS / f"{step:08d}-{phase}.parquet"
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema()), temporary, compression="zstd")
    return path


def merge_parts(run_dir: Path) -> Path:
    """Merge the parts into `samples.parquet`, one part in memory at a time; parts go once the merged file is on disk.

    Rows already merged stay, but for those of a step and phase that a part holds again.
    """
    import pyarrow as pa

    merged, parts = run_dir / MERGED, _parts(run_dir)
    if parts or not merged.exists():
        try:
            _rewrite(merged, _tables(run_dir))
        except pa.ArrowInvalid as error:
            raise UserError(f"{error} Remove that file, and resume: its samples are lost.") from error
        for part in parts:
            part.unlink()
    if (run_dir / PARTS).is_dir() and not any((run_dir / PARTS).iterdir()):
        (run_dir / PARTS).rmdir()
    return merged


def truncate_samples(run_dir: Path, step: int) -> None:
    """Remove every sample at or beyond `step`, in parts and in the merged file, but for phase `eval_before`."""
    for part in _parts(run_dir):
        part_step, phase = _part_key(part)
        if part_step >= step and phase != "eval_before":
            part.unlink()
    merged = run_dir / MERGED
    if merged.exists():
        _rewrite(merged, _filtered(merged, lambda row_step, phase: row_step < step or phase == "eval_before"))


def read_samples(run_dir: Path, phase: Phase) -> list[dict[str, Any]]:
    """All rows of one phase, as dicts by column, from a finished or an unfinished run."""
    rows: list[dict[str, Any]] = []
    for table in _tables(run_dir, phase):
        rows.extend(table.to_pylist())
    return rows


def _row(step: int, phase: Phase, group: Group, sample: Sample, prompt: str) -> dict[str, Any]:
    verdict = sample.verdict
    return {
        "step": step,
        "phase": phase,
        "task_id": sample.task_id,
        "sample_index": sample.sample_index,
        "prompt": _clean(prompt),
        "completion": _clean(sample.completion_text),
        "answer": _clean(json.dumps(jsonable(group.task.answer, "answer"), ensure_ascii=False)),
        "score": None if verdict is None else float(verdict.score),
        "status": None if verdict is None else verdict.status,
        "reason": None if verdict is None else _clean(verdict.reason),
        "extracted": None if verdict is None or verdict.extracted is None else _clean(verdict.extracted),
        "parts": None if verdict is None else json.dumps(jsonable(verdict.parts, "parts")),
        "elapsed_s": None if verdict is None else verdict.elapsed_s,
        "advantage": None if sample.advantage is None else float(sample.advantage),
        "used": sample.advantage is not None if phase == "train" else None,
        "num_completion_tokens": len(sample.completion_ids),
        "finish_reason": sample.finish_reason,
        "policy_version_first": sample.policy_versions[0],
        "policy_version_last": sample.policy_versions[1],
    }


def _clean(text: str) -> str:
    # A lone surrogate, legal in JSON data, has no UTF-8 and would fail the whole part.
    return text.encode("utf-8", "replace").decode("utf-8")


def _parts(run_dir: Path) -> list[Path]:
    return sorted(path for path in (run_dir / PARTS).glob("*.parquet") if not path.name.startswith("."))


def _part_key(part: Path) -> tuple[int, str]:
    step, _, phase = part.stem.partition("-")
    return int(step), phase


def _tables(run_dir: Path, phase: Phase | None = None) -> Iterator[pa.Table]:
    import pyarrow.parquet as pq

    parts = {_part_key(part): part for part in _parts(run_dir)}
    merged = run_dir / MERGED
    if merged.exists():
        # Where a crash between merge and clean-up left both, or a step was done again, the part counts.
        yield from _filtered(
            merged, lambda step, row_phase: (step, row_phase) not in parts and phase in (None, row_phase)
        )
    for (_, part_phase), part in parts.items():
        if phase in (None, part_phase):
            yield pq.read_table(part)


def _filtered(merged: Path, keep: Callable[[int, str], bool]) -> Iterator[pa.Table]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(merged) as file:
            for index in range(file.num_row_groups):
                keys = file.read_row_group(index, columns=["step", "phase"])
                pairs = zip(keys["step"].to_pylist(), keys["phase"].to_pylist(), strict=True)
                mask = [keep(step, phase) for step, phase in pairs]
                if any(mask):
                    table = file.read_row_group(index)
                    yield table if all(mask) else table.filter(pa.array(mask))
    except pa.ArrowInvalid as error:
        raise UserError(f"{merged} is damaged ({error}); move it away, the rest of the run is intact.") from error


def _rewrite(merged: Path, tables: Iterator[pa.Table]) -> None:
    import pyarrow.parquet as pq

    with replacing(merged) as temporary, pq.ParquetWriter(temporary, schema(), compression="zstd") as writer:
        for table in tables:
            if table.num_rows:
                writer.write_table(_with_all_columns(table), row_group_size=table.num_rows)


def _with_all_columns(table: pa.Table) -> pa.Table:
    """The table in today's columns, null where it was written before there was one."""
    import pyarrow as pa

    columns = [
        table[field.name] if field.name in table.column_names else pa.nulls(table.num_rows, field.type)
        for field in schema()
    ]
    return pa.table(columns, schema=schema())
