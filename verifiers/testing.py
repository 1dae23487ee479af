"""`check`: the laws that every verifier must keep, tried on yours in processes that can be killed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verifiers.hostile import hostile_texts
from verifiers.pool import ScorePool, VerifierSpec
from verifiers.registry import BUILT_IN
from verifiers.verdict import TaskLike, Verdict
from verifiers.worker import resident_bytes

LAWS: Mapping[str, str] = {
    "gold": "the right answer is correct and scores 1",
    "audit": "prepare calls the golds ok",
    "wrong": "a wrong answer is not correct",
    "other": "the right answer of a task with another gold is not correct",
    "junk": "hostile text is not correct and scores 0 or less",
    "no_error": "no text makes it raise, crash or return something that is no verdict",
    "time": "no text takes longer than the deadline",
    "deterministic": "the same sample gets the same verdict again, also in another process",
    "memory": "its memory does not grow",
}
MAX_SHOWN = 5
MAX_OTHERS = 200
NUM_REPEATS = 1000
MAX_LEAK_MB = 50
MAX_GOLD_CHARS = 200
Pair = tuple[str, TaskLike]


@dataclass(frozen=True)
class Law:
    """One law: how many samples it was tried on, and what broke it."""

    name: str
    num_tried: int
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What `check` found; as text a table with the first faults of every broken law."""

    verifier: str
    laws: tuple[Law, ...]

    @property
    def broken(self) -> tuple[Law, ...]:
        """The laws that do not hold."""
        return tuple(law for law in self.laws if law.faults)

    def __str__(self) -> str:
        lines = [f"verifier {self.verifier}: {len(self.broken)} of {len(self.laws)} laws broken"]
        for law in self.laws:
            state = f"BROKEN {len(law.faults)}x" if law.faults else "ok" if law.num_tried else "not tried"
            lines.append(f"  {law.name:<14}{state:<12}{law.num_tried:>6} samples   {LAWS[law.name]}")
            lines += [f"      {fault}" for fault in law.faults[:MAX_SHOWN]]
        return "\n".join(lines)


def check(
    verifier: Any,
    tasks_with_golds: Sequence[Pair | TaskLike],
    wrong: Sequence[Pair] = (),
    *,
    options: Mapping[str, Any] | None = None,
    skip: Iterable[str] = (),
    timeout_s: float = 5.0,
    memory_limit_mb: int = 1024,
    max_growth_mb: int = 300,
    strict: bool = True,
) -> Report:
    """Try the `LAWS` on a verifier; AssertionError with the report as its text if one is broken (`strict`).

    `verifier` is a known name, `"package.module:attribute"`, or a function, class or dataclass instance that can be
    imported under its own name. `tasks_with_golds` are pairs of a completion that must be right and its task; a task by
    itself stands for the completion `<think>..</think><answer>{its answer}</answer>`. `wrong` are pairs of a completion
    that must not be right and its task. `skip` names laws that don't apply, such as "junk" for a verifier of lengths.
    """
    pairs = [each if isinstance(each, tuple) else (_stating(each.answer), each) for each in tasks_with_golds]
    if not pairs:
        raise ValueError("check needs at least one task with its gold")
    unknown = sorted(set(skip) - set(LAWS))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no law; they are: {', '.join(LAWS)}")
    name, given = _named(verifier, options)
    groups: dict[str, list[Pair]] = {
        "gold": pairs,
        "wrong": list(wrong),
        "other": _others(pairs),
        "junk": list(_junk(pairs)),
    }
    samples = [(law, *pair) for law, group in groups.items() for pair in group]
    spec = VerifierSpec("verifier", name, options=given)
    with ScorePool([spec], 2, timeout_s, memory_limit_mb, max_growth_mb=max_growth_mb) as pool:
        tasks = [task for _, task in pairs]
        audits = pool.prepare(tasks)
        first = pool.score([text for _, text, _ in samples], [task for _, _, task in samples])
        backwards = samples[::-1]
        again = pool.score([text for _, text, _ in backwards], [task for _, _, task in backwards])[::-1]
        leaked_mb = _growth_mb(pool, pairs)
        growths = pool.health.recycles.get("memory growth", 0)
        out_of_memory = pool.health.restarts.get("out of memory", 0)
    faults = _faults(samples, first, again, timeout_s)
    faults["audit"] = [
        f"gold {_clip(task.answer)}: {audit.status}, {audit.reason}"
        for audit, task in zip(audits, tasks, strict=True)
        if audit is not None and audit.status != "ok"
    ]
    if leaked_mb > MAX_LEAK_MB:
        faults["memory"].append(f"{NUM_REPEATS} right answers left {leaked_mb:.0f} MB in its processes")
    if growths:
        faults["memory"].append(f"a worker grew by more than {max_growth_mb} MB, {growths} time(s)")
    if out_of_memory:
        faults["memory"].append(f"a worker ran out of its {memory_limit_mb} MB, {out_of_memory} time(s)")
    tried = {law: len(group) for law, group in groups.items()} | {"audit": sum(audit is not None for audit in audits)}
    laws = [Law(law, tried.get(law, len(samples)), tuple(faults[law])) for law in LAWS if law not in set(skip)]
    report = Report(name, tuple(laws))
    if strict and report.broken:
        raise AssertionError(str(report))
    return report


def _faults(
    samples: Sequence[tuple[str, str, TaskLike]], first: Sequence[Verdict], again: Sequence[Verdict], timeout_s: float
) -> dict[str, list[str]]:
    faults: dict[str, list[str]] = {law: [] for law in LAWS}
    for (law, text, task), verdict, second in zip(samples, first, again, strict=True):
        shown = (
            f"{_clip(text)} for gold {_clip(task.answer)}: {verdict.status} {verdict.score:g}, {_clip(verdict.reason)}"
        )
        if verdict.status == "timeout" and verdict.elapsed_s >= timeout_s:  # it may say so itself, in time
            faults["time"].append(shown)
        elif verdict.status == "error":
            faults["no_error"].append(shown)
        elif law == "gold":
            if verdict.status != "correct" or verdict.score != 1:
                faults[law].append(shown)
        elif verdict.status == "correct" or (law == "junk" and verdict.score > 0):
            faults[law].append(shown)
        if "timeout" not in (verdict.status, second.status) and _content(verdict) != _content(second):
            faults["deterministic"].append(f"{shown}; then {second.status} {second.score:g}, {_clip(second.reason)}")
    return faults


def _content(verdict: Verdict) -> tuple[Any, ...]:
    return verdict.score, verdict.status, verdict.extracted, dict(verdict.parts)


def _others(pairs: Sequence[Pair]) -> list[Pair]:
    """Every right answer with the tasks of other golds, the first `MAX_OTHERS` of them."""
    others = []
    for shift in range(1, len(pairs)):
        for index, (text, task) in enumerate(pairs):
            other = pairs[(index + shift) % len(pairs)][1]
            if other.answer != task.answer:
                others.append((text, other))
            if len(others) == MAX_OTHERS:
                return others
    return others


def _junk(pairs: Sequence[Pair]) -> Iterator[Pair]:
    """The hostile texts with the tasks in turn, but for texts that happen to say the gold."""
    for index, text in enumerate(hostile_texts()):
        task = pairs[index % len(pairs)][1]
        if len(text) > MAX_GOLD_CHARS or str(task.answer) not in text:
            yield text, task


def _growth_mb(pool: ScorePool, pairs: Sequence[Pair]) -> float:
    """By how much the workers' memory grows over many more right answers; 0 if one was replaced meanwhile."""
    before = {pid: resident_bytes(pid) for pid in pool.worker_pids}
    repeated = [pairs[index % len(pairs)] for index in range(NUM_REPEATS)]
    pool.score([text for text, _ in repeated], [task for _, task in repeated])
    after = {pid: resident_bytes(pid) for pid in pool.worker_pids}
    return (sum(after.values()) - sum(before.values())) / 2**20 if before.keys() == after.keys() else 0.0


def _named(verifier: Any, options: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """The name or path under which a worker finds the verifier, and its options."""
    given = dict(options or {})
    if isinstance(verifier, str):
        return verifier, given
    found = verifier
    if dataclasses.is_dataclass(verifier) and not isinstance(verifier, type):
        found = type(verifier)
        given = {f.name: getattr(verifier, f.name) for f in dataclasses.fields(verifier) if f.init} | given
    path = f"{getattr(found, '__module__', None)}:{getattr(found, '__qualname__', None)}"
    if not re.fullmatch(r"[\w.]+:\w+", path):
        raise ValueError(f'{verifier!r:.80} can\'t be found by name; pass "package.module:attribute"')
    return next((name for name, home in BUILT_IN.items() if home == path), path), given


def _stating(answer: Any) -> str:
    return f"<think>I work it out.</think>\n<answer>{answer}</answer>"


def _clip(value: Any, limit: int = 70) -> str:
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else f"{text[:limit]}…"
