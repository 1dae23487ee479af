"""The `traces` run: sources into raw/, raw/ through the filters into traces.parquet, and every trace accounted for.

A run that is stopped or killed goes on: a source that is finished is not asked or read again, and of one that is not,
what it has on disk stays.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from distill.card import write_card
from distill.endpoint import api_key
from distill.imports import import_traces, source_files
from distill.select import DROPPED_FILE, KEPT_FILE, SelectConfig, SelectionResult, check_selection, select
from distill.teachers import ask_endpoint, questions, sample_engine
from distill.trace import (
    R1_COMPLETION,
    Form,
    Trace,
    TraceWriter,
    check_completion_template,
    count_traces,
    part_files,
    read_traces,
)
from distill.traces_config import EndpointSource, EngineSource, ImportSource, Source, TracesSource
from distill.unreadable import Unreadable
from rollout.durable import replacing, write_json
from rollout.errors import UserError
from rollout.interrupt import RunInterrupted, stop_on_signal
from rollout.run import Observer, RunRecord
from rollout.tokenizer import load_tokenizer
from rollout.toml_config import to_toml

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RAW, ERRORS, DONE = "raw", "errors.jsonl", "done.json"


class TracesError(RuntimeError):
    """The traces do not add up: a fault of the program, not of the data."""


class TracesConfig(BaseModel):
    """A run that gathers traces and selects among them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="name of the run")
    seed: int = Field(default=0, ge=0, description="seed of sampling and selection")
    run_dir: str = Field(default="runs/traces-{name}-{seed}", description="the run's folder")
    sources: dict[str, Source] = Field(description="where traces come from, by a name that each trace keeps")
    completion_template: Annotated[str, AfterValidator(check_completion_template)] = Field(
        default=R1_COMPLETION, description="the student's completion, with {reasoning} and {answer}"
    )
    tokenizer: Path | None = Field(
        default=None, description="folder of a tokenizer that counts completions whose source says no length"
    )
    rows_per_part: int = Field(default=1000, ge=1, description="rows of one part of raw/")
    select: SelectConfig = Field(default_factory=SelectConfig, description="the filters")

    @field_validator("sources")
    @classmethod
    def _named(cls, sources: dict[str, Source]) -> dict[str, Source]:
        if not sources:
            raise ValueError("name at least one source, as [sources.NAME]")
        for name in sources:
            if name.startswith(".") or not all(letter.isalnum() or letter in "._-" for letter in name):
                raise ValueError(f"{name!r} can't be a source's name: use letters, digits, '.', '_' and '-'")
        return sources

    @property
    def run_path(self) -> Path:
        """The run's folder."""
        return Path(self.run_dir.format(name=self.name, seed=self.seed))


def check_sources(config: TracesConfig) -> None:
    """UserError for what can be known to be missing before anything is read or paid for."""
    for name, source in config.sources.items():
        if isinstance(source, EngineSource):
            load_tokenizer(source.checkpoint)
            questions(name, source)
        elif isinstance(source, EndpointSource):
            api_key(source)
            questions(name, source)
        elif isinstance(source, ImportSource):
            source_files(source.path)
            if "length" in config.select.order and config.tokenizer is None and source.columns.num_tokens is None:
                raise UserError(
                    f"sources.{name} does not say how long its completions are, which the filter length needs: set "
                    "tokenizer to the folder of one (the student's), or leave length out of select.order"
                )
        elif not source.path.exists():
            raise UserError(f"{source.path}: there is no such file or folder (sources.{name}.path)")
    if config.tokenizer is not None:
        load_tokenizer(config.tokenizer)
    check_selection(config.select)


def make_traces(config: TracesConfig, record: RunRecord, observer: Observer) -> dict[str, Any]:
    """Gather, select, and return what summary.json says; the run's folder then holds the dataset and its card.

    Raises RunInterrupted when asked to stop while gathering, and EndpointError when an endpoint can't be asked.
    """
    began = time.monotonic()
    raw = record.run_dir / RAW
    with stop_on_signal() as stop:
        gathering = _Gathering(config, record, observer, stop)
        sources = {name: gathering.gather(name, source, raw / name) for name, source in config.sources.items()}
    _merge_errors(raw, list(config.sources), record.run_dir / ERRORS)
    observer.stage("select", f"{sum(source['traces'] for source in sources.values())} traces")
    traces = _raw_traces(raw, list(config.sources))
    try:
        result = select(traces, config.select, record.run_dir, sources=sources, observer=observer)
    except UserError as error:
        cure = f"What was gathered is kept: another run can select from it, with sources of kind 'traces' in {raw}."
        raise UserError(f"{error}\n{cure}") from error
    write_card(record.run_dir, config.name, result, facts=_facts(record.run_dir), config_toml=to_toml(config))
    summary = _summary(sources, result, record.run_dir) | {"wall_s": time.monotonic() - began}
    record.write_json("summary", summary)
    return summary


def _summary(sources: Mapping[str, Mapping[str, Any]], result: SelectionResult, run_dir: Path) -> dict[str, Any]:
    """Counts of the files themselves, which must add up."""
    summary = {
        "sources": sources,
        "num_raw": sum(source["traces"] for source in sources.values()),
        "num_lost": sum(sum(source["lost"].values()) for source in sources.values()),
        "num_kept": count_traces(run_dir / KEPT_FILE),
        "num_dropped": count_traces(run_dir / DROPPED_FILE),
        "num_questions": result.num_questions,
        "num_contaminations": result.num_hits,
    }
    if summary["num_raw"] != summary["num_kept"] + summary["num_dropped"]:
        raise TracesError(f"{run_dir}: {summary} does not add up: raw is not kept and dropped together")
    return summary


def _facts(run_dir: Path) -> dict[str, str]:
    """What the card says of the code that made the traces."""
    git = json.loads((run_dir / "git.json").read_text())
    versions = json.loads((run_dir / "versions.json").read_text())
    commit = git["commit"] or f"unknown ({git.get('reason')})"
    return {"commit": f"{commit}{' with changes' if git['dirty'] else ''}", "Python": versions["python"]}


def _raw_traces(raw: Path, names: list[str]) -> Iterator[Trace]:
    for name in names:
        yield from read_traces(raw / name)


def _merge_errors(raw: Path, names: list[str], path: Path) -> None:
    """All sources' losses in one file, as a stream."""
    with replacing(path) as temporary, temporary.open("wb") as merged:
        for name in names:
            with (raw / name / ERRORS).open("rb") as file:
                shutil.copyfileobj(file, merged)


class _Gathering:
    """The sources of one run, one after the other, into their folders below raw/."""

    def __init__(self, config: TracesConfig, record: RunRecord, observer: Observer, stop: threading.Event) -> None:
        self.config, self.record, self.observer, self.stop = config, record, observer, stop
        tokenizer = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
        self._count = _counter(tokenizer)

    def gather(self, name: str, source: Source, folder: Path) -> dict[str, Any]:
        """Its counts: traces, and what was lost by kind; from disk where it was finished before."""
        if (folder / DONE).exists():
            return json.loads((folder / DONE).read_text())
        self.observer.stage(f"gather {name}", source.kind)
        with Unreadable(folder / ERRORS, name) as losses:
            if isinstance(source, EngineSource):
                self._sample(name, source, folder, losses)
            else:
                self._write(folder, self._stream(name, source, folder, losses))
        counts = {"kind": source.kind, "traces": count_traces(folder), "lost": dict(losses.counts)}
        write_json(folder / DONE, counts)
        lost = ", ".join(f"{count} {kind}" for kind, count in counts["lost"].items())
        self.observer.message(
            f"{name}: {counts['traces']} traces{f'; lost: {lost} ({folder / ERRORS})' if lost else ''}"
        )
        return counts

    def _sample(self, name: str, source: EngineSource, folder: Path, losses: Unreadable) -> None:
        sample_engine(
            name,
            source,
            _form(source.tags.model_dump(), self.config),
            folder,
            losses,
            seed=self.config.seed,
            log_dir=self.record.log_path("engine").parent,
            stop=self.stop,
            observer=self.observer,
        )

    def _stream(
        self, name: str, source: EndpointSource | ImportSource | TracesSource, folder: Path, losses: Unreadable
    ) -> Iterator[Trace]:
        if isinstance(source, TracesSource):
            return (_taken_over(trace, name, source) for trace in read_traces(source.path))
        form = _form(source.tags.model_dump(), self.config)
        if isinstance(source, ImportSource):
            return import_traces(name, source, form, losses)
        return ask_endpoint(
            name, source, form, folder, losses, seed=self.config.seed, stop=self.stop, observer=self.observer
        )

    def _write(self, folder: Path, traces: Iterator[Trace]) -> None:
        """Parts of a stream that can be read again: those of a run that was stopped within it are not kept."""
        for part in part_files(folder):
            part.unlink()
        with TraceWriter(folder, self.config.rows_per_part) as writer:
            for number, trace in enumerate(traces):
                if self.stop.is_set():
                    raise RunInterrupted(f"stopped while writing {folder}, which is read again")
                writer.write(trace if trace.num_tokens is not None else self._count(trace))
                if number % 1000 == 999:
                    self.observer.stage(f"gather {folder.name}", f"{number + 1} traces")


def _form(tags: Mapping[str, str], config: TracesConfig) -> Form:
    return Form(**tags, completion_template=config.completion_template)


def _counter(tokenizer: PreTrainedTokenizerBase | None) -> Callable[[Trace], Trace]:
    """What gives a trace the length of its completion in tokens; without a tokenizer it stays unknown."""
    if tokenizer is None:
        return lambda trace: trace

    def count(trace: Trace) -> Trace:
        ids = tokenizer(trace.completion, add_special_tokens=False)["input_ids"]
        return replace(trace, num_tokens=len(ids))

    return count


def _taken_over(trace: Trace, name: str, source: TracesSource) -> Trace:
    """A trace of another run, with what that run's filters said forgotten."""
    verdict = trace.verdict if source.keep_verdicts else None
    metadata = {**trace.metadata, "earlier_source": trace.source}
    return replace(trace, source=name, filters={}, verdict=verdict, metadata=metadata)
