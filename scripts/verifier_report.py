"""`groupzero verifier-report`: what a run's verifiers said, and which verdicts a person should look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, get_args

from rollout.durable import write_bytes
from rollout.errors import UserError
from rollout.run import CONFIG
from rollout.sample_table import MERGED, PARTS, Phase, read_samples
from scripts.judgements import Disagreement, check_judgements, judge
from scripts.verifier_suspects import Suspect, find_suspects, gold_of
from verifiers.calling import STATUSES

REPORT = "verifier-report.html"
NUM_SHOWN = 20
NUM_SLOWEST = 10
NUM_REASONS = 5
TEXT_CHARS = 3000


@dataclass(frozen=True)
class VerifierReport:
    """What the report holds, each count over the samples of one phase or of all."""

    statuses: dict[str, Counter[str]]
    failures: Counter[str]
    slowest: list[dict[str, Any]]
    suspects: list[Suspect]

    @property
    def rules(self) -> Counter[tuple[str, str]]:
        """Number of suspects by (side, rule)."""
        return Counter((suspect.side, suspect.rule) for suspect in self.suspects)


def build_report(run: Path) -> VerifierReport:
    """Read a run's samples, finished or not; UserError for a folder without any."""
    if not (run / CONFIG).exists():
        raise UserError(f"{run} isn't a run's folder: it has no {CONFIG}.")
    if not (run / MERGED).exists() and not (run / PARTS).is_dir():
        raise UserError(f"{run} has no samples yet: the report needs at least one finished step.")
    statuses: dict[str, Counter[str]] = {}
    failures: Counter[str] = Counter()
    suspects: list[Suspect] = []
    timed: list[dict[str, Any]] = []
    for phase in get_args(Phase):
        rows = [row for row in read_samples(run, phase) if row["status"] is not None]
        if not rows:
            continue
        statuses[phase] = Counter(row["status"] for row in rows)
        failures.update(row["reason"] for row in rows if row["status"] in ("error", "timeout"))
        suspects += find_suspects(rows)
        timed = sorted([*timed, *(row for row in rows if row.get("elapsed_s"))], key=lambda row: -row["elapsed_s"])
        timed = timed[:NUM_SLOWEST]
    return VerifierReport(statuses, failures, timed, suspects)


def run_verifier_report(
    run: Path,
    *,
    judging: bool = False,
    checking: bool = False,
    ask: Callable[[str], str] = input,
    show: Callable[[str], None] = print,
) -> int:
    """What the command does; the exit status: 1 if a judged case is decided otherwise now, else 0."""
    if checking:
        count, found = check_judgements(run)
        show("\n".join(_check_lines(count, found)))
        return 1 if found else 0
    report = build_report(run)
    path = run / REPORT
    write_bytes(path, _page(run, report).encode())
    show("\n".join([*_lines(report), f"report: {path}"]))
    if judging:
        count = judge(run, report.suspects, ask, show)
        show(f"{count} judged; try the verifier on all judged cases with `groupzero verifier-report {run} --check`")
    return 0


def _lines(report: VerifierReport) -> list[str]:
    lines = [f"{'phase':<13}{'samples':>9}" + "".join(f"{status:>12}" for status in STATUSES)]
    for phase, counts in report.statuses.items():
        shares = "".join(f"{counts[status] / counts.total():>12.1%}" for status in STATUSES)
        lines.append(f"{phase:<13}{counts.total():>9}{shares}")
    for reason, count in report.failures.most_common(NUM_REASONS):
        lines.append(f"  failed {count} times: {reason[:100]}")
    if report.slowest:
        row = report.slowest[0]
        lines.append(f"slowest call: {row['elapsed_s']:.2f} s ({row['status']}, task {row['task_id']})")
    for title, side in (
        ("right answers called wrong, perhaps", "false_negative"),
        ("unearned rewards, perhaps", "hack"),
    ):
        lines.append(f"{title}: {sum(count for (s, _), count in report.rules.items() if s == side)}")
        lines += [f"  {rule:<22}{count:>6}" for (s, rule), count in report.rules.most_common() if s == side]
    return lines


def _check_lines(count: int, found: Sequence[Disagreement]) -> list[str]:
    lines = [f"{count} judged cases, {len(found)} decided otherwise"]
    for each in found:
        judgement, verdict = each.judgement, each.verdict
        lines.append(
            f"  step {judgement.step}, {judgement.phase}, task {judgement.task_id}, sample {judgement.sample_index}: "
            f"a person says {judgement.expected}, the verifier {verdict.status} ({verdict.reason[:120]})"
        )
    return lines


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}"
    "table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f5f5f5;"
    "padding:.6rem;border-radius:4px}details{margin:.6rem 0}summary{cursor:pointer}"
)


def _page(run: Path, report: VerifierReport) -> str:
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>Verifiers of {escape(run.name)}</title><style>{_STYLE}</style>",
        f"<h1>Verifiers of {escape(run.name)}</h1>",
        _status_table(report),
    ]
    if report.failures:
        parts.append("<h2>Failures</h2>")
        parts.append(_table(["times", "reason"], [[n, r[:300]] for r, n in report.failures.most_common(NUM_REASONS)]))
    parts.append("<h2>Slowest calls</h2>")
    rows = [[f"{row['elapsed_s']:.3f} s", row["status"], row["task_id"], row["reason"][:200]] for row in report.slowest]
    no_times = "<p>This run kept no times with its samples.</p>"
    parts.append(_table(["time", "status", "task", "reason"], rows) if rows else no_times)
    for side, title, what in (
        (
            "false_negative",
            "Right answers called wrong, perhaps",
            "not correct by the verifier, but a looser reading is",
        ),
        ("hack", "Unearned rewards, perhaps", "correct by the verifier, but suspicious"),
    ):
        parts.append(f"<h2>{title}</h2><p>Samples that are {what}. Judge them with <code>--judge</code>.</p>")
        parts += _suspects([suspect for suspect in report.suspects if suspect.side == side])
    return "\n".join(parts)


def _status_table(report: VerifierReport) -> str:
    rows = [
        [phase, counts.total(), *(f"{counts[status] / counts.total():.1%}" for status in STATUSES)]
        for phase, counts in report.statuses.items()
    ]
    return _table(["phase", "samples", *STATUSES], rows)


def _suspects(suspects: Sequence[Suspect]) -> list[str]:
    by_rule: dict[str, list[Suspect]] = {}
    for suspect in suspects:
        by_rule.setdefault(suspect.rule, []).append(suspect)
    parts = [] if suspects else ["<p>None.</p>"]
    for rule, found in by_rule.items():
        parts.append(f"<h3>{escape(rule)}: {len(found)}</h3>")
        parts += [_suspect(suspect) for suspect in found[:NUM_SHOWN]]
        if len(found) > NUM_SHOWN:
            parts.append(f"<p>and {len(found) - NUM_SHOWN} more</p>")
    return parts


def _suspect(suspect: Suspect) -> str:
    row = suspect.row
    text = row["completion"]
    shown = text if len(text) <= TEXT_CHARS else f"…{text[-TEXT_CHARS:]}"
    return (
        f"<details><summary>step {row['step']}, {row['phase']}, task {escape(row['task_id'])}: {escape(suspect.why)}"
        f"</summary><p>{row['status']}, score {row['score']:g}: {escape(row['reason'][:500])}<br>"
        f"gold: <code>{escape(str(gold_of(row))[:500])}</code></p>"
        f"<pre>{escape(row['prompt'][-TEXT_CHARS:])}</pre><pre>{escape(shown)}</pre></details>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    top = "".join(f"<th>{escape(title)}</th>" for title in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"
