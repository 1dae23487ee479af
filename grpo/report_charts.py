"""The curves of the report: metrics of every step in, inline SVG out, coloured by the page's light or dark theme."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 400
_SMOOTHING_STEPS = 7
_FONT_PX = 9.5
# matplotlib draws with these stand-ins; the SVG then names the page's variable in their place.
_THEME = {
    "#010101": "var(--ink-soft)",
    "#010102": "var(--grid)",
    "#010111": "var(--c1)",
    "#010112": "var(--c2)",
    "#010113": "var(--c3)",
    "#010114": "var(--c4)",
    "#010115": "var(--c5)",
    "#010116": "var(--c6)",
}
_INK, _GRID = "#010101", "#010102"
_COLOURS = {name: stand_in for stand_in, name in _THEME.items()}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric of a chart; `colour` is c1 to c6 of the page's theme; `points` marks single values, no line."""

    key: str
    label: str
    colour: str = "c1"
    points: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A small chart over steps: what it shows, how to read it, how to draw and write its values."""

    name: str
    title: str
    hint: str
    curves: tuple[Curve, ...]
    kind: Literal["lines", "stack"] = "lines"
    form: str = ".3g"
    is_log: bool = False
    is_share: bool = False


CHARTS = (
    Chart(
        name="reward",
        title="Reward",
        hint="Mean over the step's samples. What the policy is pushed to raise.",
        curves=(Curve(key="reward_mean", label="reward"),),
        form=".3f",
    ),
    Chart(
        name="accuracy",
        title="Accuracy",
        hint="Share of right answers among the samples trained on, and on held-out problems where measured.",
        curves=(
            Curve(key="accuracy", label="training samples"),
            Curve(key="eval_pass_at_1", label="held-out pass@1", colour="c2", points=True),
        ),
        form=".1%",
        is_share=True,
    ),
    Chart(
        name="length",
        title="Completion length",
        hint="Tokens. Falling to a few means giving up on reasoning; stuck at the limit means cut off.",
        curves=(
            Curve(key="completion_tokens_mean", label="mean"),
            Curve(key="completion_tokens_max", label="longest", colour="c5"),
        ),
        form=".1f",
    ),
    Chart(
        name="kl",
        title="KL to the reference",
        hint="k3 estimate, nats per token. Falls back when the reference is refreshed.",
        curves=(Curve(key="kl", label="KL"),),
        form=".2e",
    ),
    Chart(
        name="entropy",
        title="Entropy",
        hint="Nats per token. Near 0: no exploration is left.",
        curves=(Curve(key="entropy", label="entropy"),),
        form=".3f",
    ),
    Chart(
        name="clip",
        title="Clip fraction",
        hint="Share of tokens whose ratio left the clip range. Steadily above 20%: steps are too large.",
        curves=(Curve(key="clip_fraction", label="clipped"),),
        form=".2%",
    ),
    Chart(
        name="gap",
        title="Log-probability gap",
        hint="|learner - engine|, nats, log scale. The first number to read when a run goes wrong.",
        curves=(
            Curve(key="logprob_gap_mean", label="mean"),
            Curve(key="logprob_gap_max", label="largest", colour="c5"),
        ),
        form=".1e",
        is_log=True,
    ),
    Chart(
        name="speed",
        title="Tokens per second",
        hint="Completion tokens over the whole step's time.",
        curves=(Curve(key="tokens_per_s", label="tokens/s"),),
        form=",.0f",
    ),
    Chart(
        name="gradient",
        title="Gradient norm",
        hint="Before clipping. A spike that stays is a sign of divergence.",
        curves=(Curve(key="grad_norm", label="gradient norm"),),
        form=".2f",
    ),
)
TIME_CHART = Chart(
    name="time",
    title="Seconds per step, by stage",
    hint="",
    curves=(
        Curve(key="seconds_sampling", label="sampling", colour="c1"),
        Curve(key="seconds_scoring", label="scoring", colour="c2"),
        Curve(key="seconds_learning", label="learning", colour="c3"),
        Curve(key="seconds_sync", label="sync", colour="c4"),
        Curve(key="seconds_other", label="other", colour="c5"),
    ),
    kind="stack",
    form=".2f",
)
STATUS_CHART = Chart(
    name="status",
    title="Verdicts per step",
    hint="",
    curves=(
        Curve(key="status_correct", label="correct", colour="c3"),
        Curve(key="status_wrong", label="wrong", colour="c2"),
        Curve(key="status_unparsable", label="unparsable", colour="c4"),
        Curve(key="status_timeout", label="timeout", colour="c5"),
        Curve(key="status_error", label="error", colour="c6"),
    ),
    kind="stack",
    form=",.0f",
)


def series(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the lines that have a finite number under `key`, thinned to at most MAX_POINTS by means."""
    points = [(_finite(line.get("step")), _finite(line.get(key))) for line in metrics]
    known = [(step, value) for step, value in points if step is not None and value is not None]
    if not known:
        return np.empty(0), np.empty(0)
    table = np.array(known)
    if len(table) > MAX_POINTS:
        table = np.array([chunk.mean(axis=0) for chunk in np.array_split(table, MAX_POINTS)])
    return table[:, 0], table[:, 1]


def missing(metrics: Sequence[Mapping[str, Any]], chart: Chart) -> list[str]:
    """Labels of the chart's curves without a single value."""
    return [curve.label for curve in chart.curves if not len(series(metrics, curve.key)[1])]


def draw(metrics: Sequence[Mapping[str, Any]], chart: Chart, *, width: float = 4.6, height: float = 2.1) -> str | None:
    """The chart as an `<svg>` element of `width` x `height` inches at most, or None when no curve of it has a value."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    if len(missing(metrics, chart)) == len(chart.curves):
        return None
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.name, "font.size": _FONT_PX, "axes.linewidth": 0.7}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        every = [values for curve in chart.curves if len(values := series(metrics, curve.key)[1])]
        # An engine that agrees with the learner exactly has gaps of 0, for which a log scale has no place.
        is_log = chart.is_log and all(values.max() > 0 for values in every)
        _dress(axes, chart, is_log)
        if chart.kind == "stack":
            _stack(axes, metrics, chart)
        else:
            _lines(axes, metrics, chart, is_log)
        if not is_log and not chart.is_share:
            axes.set_ylim(*_limits(axes.get_ylim(), min(float(values.min()) for values in every)))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), chart)


def _dress(axes: Axes, chart: Chart, is_log: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.tick_params(colors=_INK, length=0)
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    if is_log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        return
    axes.yaxis.set_major_locator(MaxNLocator(4))
    if chart.form.endswith("%"):
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3%}".rstrip("0%").rstrip(".") + "%"))
    if chart.is_share:
        axes.set_ylim(-0.02, 1.02)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))


def _lines(axes: Axes, metrics: Sequence[Mapping[str, Any]], chart: Chart, is_log: bool) -> None:
    for curve in chart.curves:
        steps, values = series(metrics, curve.key)
        if is_log:
            steps, values = steps[values > 0], values[values > 0]
        if not len(values):
            continue
        colour = _COLOURS[f"var(--{curve.colour})"]
        if curve.points or len(values) < 3:
            axes.plot(steps, values, color=colour, marker="o", markersize=4.5, linewidth=1, linestyle=":")
        elif len(values) < 3 * _SMOOTHING_STEPS:
            axes.plot(steps, values, color=colour, linewidth=1.7)
        else:
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.45)
            axes.plot(steps, _smooth(values), color=colour, linewidth=1.7)


def _stack(axes: Axes, metrics: Sequence[Mapping[str, Any]], chart: Chart) -> None:
    steps = next(steps for curve in chart.curves if len(steps := series(metrics, curve.key)[0]))
    floor = np.zeros(len(steps))
    for curve in chart.curves:
        known, values = series(metrics, curve.key)
        if not len(known):
            continue
        top = floor + np.interp(steps, known, values)
        colour = _COLOURS[f"var(--{curve.colour})"]
        axes.fill_between(steps, floor, top, color=colour, alpha=0.85, linewidth=0)
        if len(steps) == 1:
            axes.bar(steps, top - floor, bottom=floor, width=0.5, color=colour, alpha=0.85)
        floor = top


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean whose window shrinks at both ends."""
    half = _SMOOTHING_STEPS // 2
    return np.array([values[max(i - half, 0) : i + half + 1].mean() for i in range(len(values))])


def _limits(limits: tuple[float, float], least: float) -> tuple[float, float]:
    """From 0 where no value is negative, so that noise around a steady value looks like what it is."""
    low, high = limits
    return (0.0, high if high > 0 else 1.0) if least >= 0 else (low, high)


def _inline(document: str, chart: Chart) -> str:
    """The `<svg>` element alone, with ids of its own, the page's colours and font, and a title for screen readers."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{chart.name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{chart.name}-", svg)
    svg = re.sub(r'href="#', f'href="#{chart.name}-', svg)
    for stand_in, variable in _THEME.items():
        svg = svg.replace(stand_in, variable)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", svg)
    svg = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{chart.title}">', svg, count=1)
    return svg.strip()


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
