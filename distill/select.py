"""Traces through named filters in a configured order, as a stream, every one of them kept or dropped for a counted reason."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from distill.decontaminate import Decontaminated, DecontaminatedConfig
from distill.dedup import (
    NearDuplicateQuestions,
    NearDuplicateQuestionsConfig,
    NearDuplicateTraces,
    NearDuplicateTracesConfig,
)
from distill.filters.at_most_k import AtMostK, AtMostKConfig
from distill.filters.base import Drop, Filter, Judged, Table
from distill.filters.quality import (
    Finished,
    FinishedConfig,
    LanguageConsistent,
    LanguageConsistentConfig,
    Length,
    LengthConfig,
    NoRepetition,
    NoRepetitionConfig,
    WellFormed,
    WellFormedConfig,
)
from distill.filters.verified import (
    Difficulty,
    DifficultyConfig,
    PassRates,
    Scorer,
    VerifiedCorrect,
    VerifiedCorrectConfig,
    check_verifier,
)
from distill.funnel import FilterCounts, Funnel, gathered
from distill.trace import KEPT, Trace, TraceWriter, read_traces, write_traces
from rollout.durable import replacing, write_json
from rollout.run import Observer, SilentObserver

KEPT_FILE, DROPPED_FILE, FUNNEL_FILE = "traces.parquet", "dropped.parquet", "funnel.json"
HITS_FILE = "decontamination.jsonl"
_WORK = "selecting"
_BATCH_TRACES = 256
_BATCH_CHARS = 16 << 20  # a batch of traces of 100k tokens each is a few dozen

FilterName = Literal[
    "verified_correct",
    "well_formed",
    "finished",
    "language_consistent",
    "no_repetition",
    "length",
    "decontaminated",
    "near_duplicate_questions",
    "near_duplicate_traces",
    "difficulty",
    "at_most_k",
]
FILTERS: tuple[FilterName, ...] = get_args(FilterName)


class SelectConfig(Table):
    """Which traces are kept: filters in their order, and a table of options for each."""

    order: tuple[FilterName, ...] = Field(
        default=tuple(name for name in FILTERS if name not in ("decontaminated", "difficulty")),
        description=f"filters in the order in which a trace goes through them, each at most once; all: {', '.join(FILTERS)}",
    )
    verified_correct: VerifiedCorrectConfig = Field(default_factory=VerifiedCorrectConfig, description="right answers")
    well_formed: WellFormedConfig = Field(default_factory=WellFormedConfig, description="one think block, one answer")
    finished: FinishedConfig = Field(default_factory=FinishedConfig, description="not cut off")
    language_consistent: LanguageConsistentConfig = Field(
        default_factory=LanguageConsistentConfig, description="one language"
    )
    no_repetition: NoRepetitionConfig = Field(default_factory=NoRepetitionConfig, description="no loops")
    length: LengthConfig = Field(default_factory=LengthConfig, description="bounds on the length")
    decontaminated: DecontaminatedConfig = Field(
        default_factory=DecontaminatedConfig, description="nothing of evaluation sets"
    )
    near_duplicate_questions: NearDuplicateQuestionsConfig = Field(
        default_factory=NearDuplicateQuestionsConfig, description="no question twice"
    )
    near_duplicate_traces: NearDuplicateTracesConfig = Field(
        default_factory=NearDuplicateTracesConfig, description="no trace of a question twice"
    )
    difficulty: DifficultyConfig = Field(default_factory=DifficultyConfig, description="neither too easy nor too hard")
    at_most_k: AtMostKConfig = Field(default_factory=AtMostKConfig, description="few traces of each question")

    @model_validator(mode="after")
    def _is_possible(self) -> SelectConfig:
        twice = [name for name, count in Counter(self.order).items() if count > 1]
        if twice:
            raise ValueError(f"order names {twice[0]} twice")
        if "decontaminated" in self.order and not self.decontaminated.sets:
            raise ValueError(
                "decontaminated needs evaluation sets: [select.decontaminated.sets.NAME] with path, columns"
            )
        if "difficulty" in self.order and self.difficulty.rates is None:
            before = self.order[: self.order.index("difficulty")]
            if "verified_correct" not in before:
                raise ValueError(
                    "difficulty by the teacher's pass rates needs verified_correct before it, or set its rates"
                )
        return self


@dataclass(frozen=True, kw_only=True)
class SelectionResult:
    """What `select` has written, in numbers."""

    num_in: int
    num_kept: int
    num_questions: int
    num_tokens: Sequence[int]
    """Lengths of the kept completions, ascending, as far as they are known."""
    teachers: Counter[tuple[str, str]]
    """Kept traces by (source, teacher)."""
    funnel: Funnel
    num_hits: int
    """Lines of decontamination.jsonl."""


@dataclass
class _Tally:
    """What is counted of the kept traces as they are written."""

    questions: set[str] = field(default_factory=set)
    num_tokens: list[int] = field(default_factory=list)
    teachers: Counter[tuple[str, str]] = field(default_factory=Counter)

    def counted(self, traces: Iterable[Trace]) -> Iterator[Trace]:
        for trace in traces:
            self.questions.add(trace.question_id)
            self.teachers[trace.source, trace.teacher] += 1
            if trace.num_tokens is not None:
                self.num_tokens.append(trace.num_tokens)
            yield trace


def select(
    traces: Iterable[Trace],
    config: SelectConfig,
    folder: Path,
    *,
    pool: Scorer | None = None,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    observer: Observer | None = None,
) -> SelectionResult:
    """Filter a stream of traces into `folder`: traces.parquet, dropped.parquet, decontamination.jsonl, and last funnel.json.

    The traces are read once; where a filter has to see all of them before it judges one, they wait on disk, under
    `selecting/`, which goes in the end. In memory is what filters remember (about 0.5 KiB a trace for near-duplicates
    and as much for at_most_k). `sources` says of each source how many `traces` it gave, and how many it `lost` of what
    was asked or read, by reason: the funnel's first stage. `pool` judges answers in place of one made from the config.
    Raises UserError for what the filters can't work with, `FunnelError` if the counts do not add up; what is there of
    an earlier call is replaced.
    """
    folder = Path(folder)
    work = folder / _WORK
    for stale in (KEPT_FILE, DROPPED_FILE, HITS_FILE, FUNNEL_FILE):
        (folder / stale).unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)
    tally = _Tally()
    with ExitStack() as stack:
        filters = make_filters(config, pool)
        for item in filters:
            stack.callback(item.close)
        dropped = TraceWriter(work / "dropped", rows_per_part=_BATCH_TRACES)
        run = _Run(filters, dropped, observer or SilentObserver())
        kept = run.through_passes(traces, work)
        num_kept = write_traces(folder / KEPT_FILE, tally.counted(kept))
        dropped.merge(folder / DROPPED_FILE)
    funnel = Funnel([*([] if sources is None else [gathered(sources)]), *run.counts])
    funnel.check(run.num_in if sources is None else funnel.filters[0].num_in, num_kept)
    hits = next((item.listed for item in filters if isinstance(item, Decontaminated)), None)
    if hits is not None:
        _write_hits(folder / HITS_FILE, hits)
    write_json(folder / FUNNEL_FILE, funnel.to_dict())
    shutil.rmtree(work, ignore_errors=True)
    return SelectionResult(
        num_in=run.num_in,
        num_kept=num_kept,
        num_questions=len(tally.questions),
        num_tokens=sorted(tally.num_tokens),
        teachers=tally.teachers,
        funnel=funnel,
        num_hits=len(hits or ()),
    )


def check_selection(config: SelectConfig) -> None:
    """UserError for what can be known to be missing before a trace is gathered: evaluation sets, rates, verifiers."""
    if "verified_correct" in config.order:
        check_verifier(config.verified_correct)
    make_filters(config.model_copy(update={"order": tuple(n for n in config.order if n != "verified_correct")}))


def make_filters(config: SelectConfig, pool: Scorer | None = None) -> list[Filter]:
    """The filters of `config.order`; UserError for files that can't be read and verifiers that there are not."""
    rates = PassRates()
    makers = {
        "well_formed": lambda: WellFormed(config.well_formed),
        "finished": lambda: Finished(config.finished),
        "language_consistent": lambda: LanguageConsistent(config.language_consistent),
        "no_repetition": lambda: NoRepetition(config.no_repetition),
        "length": lambda: Length(config.length),
        "decontaminated": lambda: Decontaminated(config.decontaminated),
        "near_duplicate_questions": lambda: NearDuplicateQuestions(config.near_duplicate_questions),
        "near_duplicate_traces": lambda: NearDuplicateTraces(config.near_duplicate_traces),
        "difficulty": lambda: Difficulty(config.difficulty, rates),
        "at_most_k": lambda: AtMostK(config.at_most_k),
        "verified_correct": lambda: VerifiedCorrect(config.verified_correct, rates, pool),
    }
    # The one that starts processes is made last, so that nothing has to be ended when another can't be made.
    made = {name: makers[name]() for name in sorted(config.order, key="verified_correct".__eq__)}
    return [made[name] for name in config.order]


class _Run:
    """One selection under way: traces in batches through the filters of each pass."""

    def __init__(self, filters: Sequence[Filter], dropped: TraceWriter, observer: Observer) -> None:
        self.counts = [FilterCounts(item.name) for item in filters]
        self.num_in = 0
        self._filters, self._dropped, self._observer = filters, dropped, observer

    def through_passes(self, traces: Iterable[Trace], work: Path) -> Iterator[Trace]:
        """The kept traces; a pass ends before each filter that waits."""
        waiting = [index for index, item in enumerate(self._filters) if item.waits]
        stream: Iterable[Trace] = self._admitted(traces)
        start = 0
        for number, end in enumerate(waiting, start=1):
            path = work / f"pass-{number}.parquet"
            write_traces(path, self._shown(self._pass(stream, start, end, number), self._filters[end]))
            stream, start = read_traces(path), end
        yield from self._pass(stream, start, len(self._filters), len(waiting) + 1)

    def _admitted(self, traces: Iterable[Trace]) -> Iterator[Trace]:
        for trace in traces:
            for item in self._filters:
                item.admit(trace)
            self.num_in += 1
            yield trace

    @staticmethod
    def _shown(traces: Iterable[Trace], waiting: Filter) -> Iterator[Trace]:
        for trace in traces:
            waiting.see(trace)
            yield trace

    def _pass(self, traces: Iterable[Trace], start: int, end: int, number: int) -> Iterator[Trace]:
        num_read = num_kept = 0
        for batch in _batches(traces):
            num_read += len(batch)
            for index in range(start, end):
                batch = self._judged(index, batch)
            num_kept += len(batch)
            self._observer.stage(f"select, pass {number}", f"{num_read} traces read, {num_kept} kept")
            yield from batch

    def _judged(self, index: int, batch: Sequence[Trace]) -> list[Trace]:
        """Those of the batch that a filter keeps; the others are counted and go to dropped.parquet."""
        item = self._filters[index]
        kept: list[Trace] = []
        for judged in item.judge(batch) if batch else ():
            trace = _with_word(judged, item.name)
            self.counts[index].count(trace.source, judged.drop.reason if judged.drop else None)
            if judged.drop is None:
                kept.append(trace)
            else:
                self._dropped.write(trace)
        return kept


def _with_word(judged: Judged, name: str) -> Trace:
    word = KEPT if judged.drop is None else _encodable(judged.drop)
    return replace(judged.trace, filters={**judged.trace.filters, name: word})


def _encodable(drop: Drop) -> str:
    return str(drop).encode("utf-8", "replace").decode()


def _batches(traces: Iterable[Trace]) -> Iterator[list[Trace]]:
    batch: list[Trace] = []
    num_chars = 0
    for trace in traces:
        batch.append(trace)
        num_chars += len(trace.completion)
        if len(batch) == _BATCH_TRACES or num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _write_hits(path: Path, hits: Sequence[dict[str, Any]]) -> None:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", errors="replace") as file:
        for hit in hits:
            file.write(json.dumps(hit, ensure_ascii=False) + "\n")
