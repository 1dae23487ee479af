"""The dataset card of a selection: README.md with the funnel as a table and a plot, and where every trace is from."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distill.select import DROPPED_FILE, FUNNEL_FILE, HITS_FILE, KEPT_FILE, SelectionResult
from rollout.durable import write_bytes

if TYPE_CHECKING:
    from distill.funnel import Funnel

CARD, PLOT = "README.md", "funnel.svg"
_BAR, _LOST, _INK = "#3b6ea5", "#d9dee5", "#1f2328"
_MOST_REASONS = 40


def write_card(
    folder: Path, name: str, result: SelectionResult, *, facts: Mapping[str, str] | None = None, config_toml: str = ""
) -> Path:
    """Write README.md and funnel.svg beside the traces, and return the card's path.

    `facts` are further rows of its table "Made by", such as the commit; `config_toml` is printed in full.
    """
    folder = Path(folder)
    write_bytes(folder / PLOT, funnel_svg(result.funnel).encode())
    card = folder / CARD
    write_bytes(card, render_card(name, result, facts or {}, config_toml).encode("utf-8", "replace"))
    return card


def render_card(name: str, result: SelectionResult, facts: Mapping[str, str], config_toml: str) -> str:
    """The card's Markdown."""
    blocks = [
        _head(name, result),
        "## Funnel",
        "Every trace is in exactly one row's drops, or kept: in = kept + dropped, and what a row keeps reaches the next.",
        f"![traces left after each filter]({PLOT})",
        _funnel_table(result.funnel),
        "### Why traces were dropped",
        _reason_table(result.funnel),
        "### By source",
        _source_table(result.funnel),
        "## Made by",
        _made_by(result, facts),
        "## Columns",
        _COLUMNS,
    ]
    if config_toml:
        blocks += ["## Config", f"```toml\n{config_toml.strip()}\n```"]
    return "\n\n".join(block for block in blocks if block) + "\n"


def funnel_svg(funnel: Funnel) -> str:
    """Horizontal bars, one for what came in and one for what each filter left, as an SVG that is the same every time."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    labels = ["in", *(counts.name.replace("_", " ") for counts in funnel.filters)]
    num_in = funnel.filters[0].num_in if funnel.filters else 0
    left = [num_in, *(counts.num_kept for counts in funnel.filters)]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "funnel", "font.size": 9, "font.family": "sans-serif"}):
        figure = Figure(figsize=(7.0, 0.5 + 0.3 * len(labels)), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.barh(labels, [max(left)] * len(labels), color=_LOST, height=0.7)
        axes.barh(labels, left, color=_BAR, height=0.7)
        for index, number in enumerate(left):
            axes.text(max(left) * 1.01, index, f"{number:,}  {_share(number, num_in)}", va="center", color=_INK)
        axes.invert_yaxis()
        axes.set_xlim(0, max(1, max(left)) * 1.25)
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, colors=_INK)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _head(name: str, result: SelectionResult) -> str:
    lengths = result.num_tokens
    # A dataset viewer reads this block: the kept traces are the data, the dropped ones are not.
    lines = [
        f"---\npretty_name: {_quoted(name)}\nconfigs:\n- config_name: default\n  data_files: {KEPT_FILE}\n---",
        f"# {name}",
        f"{result.num_kept:,} worked answers to {result.num_questions:,} questions, selected from {result.num_in:,}.",
    ]
    if lengths:
        quantiles = ", ".join(
            f"{label} {lengths[round(share * (len(lengths) - 1))]:,}"
            for label, share in (("shortest", 0.0), ("median", 0.5), ("90 %", 0.9), ("longest", 1.0))
        )
        lines.append(f"Tokens of a completion: {quantiles}; {sum(lengths):,} in all.")
    lines.append(_contamination(result))
    return "\n\n".join(lines)


def _contamination(result: SelectionResult) -> str:
    if all(counts.name != "decontaminated" for counts in result.funnel.filters):
        return "**Not decontaminated**: no evaluation set was compared with it."
    return f"Decontaminated: {result.num_hits:,} hits, each with both texts, are in `{HITS_FILE}`."


def _funnel_table(funnel: Funnel) -> str:
    rows = [
        (counts.name, f"{counts.num_in:,}", f"{counts.dropped.total():,}", f"{counts.num_kept:,}", share)
        for counts in funnel.filters
        for share in [_share(counts.num_kept, counts.num_in)]
    ]
    return _table(("filter", "in", "dropped", "kept", "of those in"), rows)


def _reason_table(funnel: Funnel) -> str:
    reasons = [
        (counts.name, reason, number)
        for counts in funnel.filters
        for reason, number in sorted(counts.dropped.items(), key=lambda item: (-item[1], item[0]))
    ]
    if not reasons:
        return "None was."
    rows = [(name, reason, f"{number:,}") for name, reason, number in reasons[:_MOST_REASONS]]
    more = f"\n\nand {len(reasons) - _MOST_REASONS} more, in `{FUNNEL_FILE}`" if len(reasons) > _MOST_REASONS else ""
    return (
        _table(("filter", "reason", "traces"), rows, num_texts=2)
        + more
        + f"\n\nThe dropped traces themselves, each with its reason, are in `{DROPPED_FILE}`."
    )


def _source_table(funnel: Funnel) -> str:
    rows = []
    for source in funnel.sources:
        stages = funnel.of_source(source)
        num_in, num_kept = stages[0][1].num_in, stages[-1][1].num_kept
        lost = Counter({name: counts.dropped.total() for name, counts in stages})
        where = ", ".join(f"{name} {number:,}" for name, number in lost.most_common(3) if number)
        rows.append((source, f"{num_in:,}", f"{num_kept:,}", _share(num_kept, num_in), where or "-"))
    return _table(("source", "in", "kept", "share", "most dropped by"), rows)


def _made_by(result: SelectionResult, facts: Mapping[str, str]) -> str:
    rows = [
        (f"teacher of {source}", f"{teacher} ({number:,} traces)")
        for (source, teacher), number in sorted(result.teachers.items())
    ]
    return _table(("", ""), [*rows, *facts.items()], num_texts=2)


_COLUMNS = """\
`question`, `messages` (JSON, where the question is a chat), `reasoning`, `answer_text`, `completion` (what a student is to
write); `gold` (JSON) and `verdict` (score, status, reason, extracted answer); `teacher`, `source`, `sampling` (JSON),
`finish_reason`, `num_tokens`; `filters` (JSON: what each filter said of the trace), `metadata` (JSON: what the source
said)."""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], num_texts: int = 1) -> str:
    """A Markdown table whose columns after the first `num_texts` are aligned right."""
    rule = ["---" if index < num_texts else "---:" for index in range(len(head))]
    lines = [head, rule, *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text that stays within its cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
