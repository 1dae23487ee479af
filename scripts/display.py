"""What a run shows while it works: a live panel on a terminal, plain lines anywhere else."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

# (key, label, how to write it) in the order shown; a step shows those that it has.
METRICS: tuple[tuple[str, str, str], ...] = (
    ("reward_mean", "reward", ".3f"),
    ("accuracy", "accuracy", ".1%"),
    ("eval_pass_at_1", "held-out pass@1", ".1%"),
    ("completion_tokens_mean", "length", ".1f"),
    ("kl", "KL", ".2e"),
    ("entropy", "entropy", ".3f"),
    ("logprob_gap_mean", "logprob gap", ".1e"),
    ("tokens_per_s", "tokens/s", ",.0f"),
    ("loss", "loss", ".4f"),
    ("lr", "learning rate", ".1e"),
)
STAGES: tuple[tuple[str, str], ...] = (
    ("seconds_sampling", "sampling"),
    ("seconds_scoring", "scoring"),
    ("seconds_learning", "learning"),
    ("seconds_sync", "sync"),
    ("seconds_other", "other"),
)
TROUBLE: tuple[tuple[str, str], ...] = (
    ("skipped", "step skipped"),
    ("status_error", "verifier errors"),
    ("status_timeout", "verifier timeouts"),
)
# The first of these that a stage has is drawn over time; a share runs from 0 to 1, a loss from its least to its most.
TRACED = ("accuracy", "eval_pass_at_1", "loss")
MAX_LINES_PER_S = 1.0


class Display:
    """Shows stages and steps on `stream`, live where it is a terminal; an `Observer`, best used in a `with` block."""

    def __init__(self, stream: TextIO | None = None, *, live: bool | None = None, width: int | None = None) -> None:
        """`live` None: live when `stream` (default: standard output) is a terminal that can move its cursor."""
        self._stream = stream or sys.stdout
        dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
        self._is_live = (self._stream.isatty() and not dumb) if live is None else live
        self._console = Console(file=self._stream, force_terminal=self._is_live, width=width, highlight=False)
        self._live: Live | None = None
        self._closed = False
        # Guards the state against the thread that redraws; never held while printing, which takes that thread's locks.
        self._state = threading.Lock()
        self._started = time.monotonic()
        self._last_line = -1e9
        self._pending: str | None = None
        self._ascii = not (self._console.encoding or "").lower().startswith("utf")
        self._reset("", "")

    def stage(self, name: str, detail: str = "") -> None:
        """Begin a stage, closing the former with one line that stays; the same name again only changes the detail."""
        if name == self._name:
            self._detail = detail
        else:
            self._end_stage()
            with self._state:
                self._reset(name, detail)
        if not self._is_live:
            self._print(f"[{self._clock()}] {name}{': ' if detail else ''}{detail}")
        elif self._live is None and not self._closed:
            self._live = Live(
                self, console=self._console, refresh_per_second=4, transient=True, get_renderable=lambda: self
            )
            atexit.register(self.close)
            self._live.start()

    def step(self, step: int, num_steps: int, metrics: Mapping[str, Any]) -> None:
        """`step` of `num_steps` steps are done (1 after the first); unknown metrics and None are left out."""
        now = time.monotonic()
        with self._state:
            if self._step:
                self._intervals.append((now - self._last_step_at) / max(step - self._step, 1))
            # A held-out accuracy comes every few steps only: the last one stays in sight.
            kept = {key: self._metrics[key] for key in ("eval_pass_at_1",) if key in self._metrics}
            self._last_step_at, self._step, self._num_steps, self._metrics = now, step, num_steps, kept | dict(metrics)
            for key in TRACED:
                if (value := _number(metrics, key)) is not None:
                    self._traces.setdefault(key, []).append(value)
        if self._is_live:
            return
        self._pending = self._line()
        remarkable = step >= num_steps or step == 1 or "eval_pass_at_1" in metrics or _trouble(metrics)
        if remarkable or now - self._last_line >= 1 / MAX_LINES_PER_S:
            self._print(self._pending)

    def message(self, text: str) -> None:
        """Print `text` where it stays, above the live part."""
        if self._is_live:
            self._console.print(text, markup=False, soft_wrap=True)
        else:
            self._flush()
            self._print(text)

    def close(self) -> None:
        """End the live part, leaving the cursor visible and the last stage's line; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._end_stage(failed=sys.exc_info()[0] is not None)
        if self._live is not None:
            self._live.stop()
            self._live = None
            atexit.unregister(self.close)

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __rich__(self) -> RenderableType:
        """The live part, made for the console's present width and height."""
        with self._state:
            return self._render()

    def _render(self) -> RenderableType:
        width = self._console.width
        head = Text(no_wrap=True, overflow="ellipsis")
        head.append(self._name or "starting", style="bold cyan")
        head.append(f"  {self._detail}" if self._detail else "", style="dim")
        rows: list[RenderableType] = [head, self._bar(width)]
        cells = self._cells()
        # A live part taller than the terminal can't be redrawn in place: leave the panel out.
        if cells and self._console.height >= 14:
            rows.append(self._panel(cells, width))
        return Group(*rows)

    def _reset(self, name: str, detail: str) -> None:
        self._name, self._detail = name, detail
        self._stage_started = self._last_step_at = time.monotonic()
        self._step = self._num_steps = 0
        self._metrics: Mapping[str, Any] = {}
        self._traces: dict[str, list[float]] = {}
        self._intervals: deque[float] = deque(maxlen=20)

    def _end_stage(self, *, failed: bool = False) -> None:
        self._flush()
        if not self._is_live or not self._name:
            return
        good, bad = ("- ", "x ") if self._ascii else ("✓ ", "✗ ")
        text = Text(bad, style="red") if failed else Text(good, style="green")
        text.append(self._name, style="bold")
        text.append(f"  {_duration(time.monotonic() - self._stage_started)}", style="default")
        if self._num_steps:
            text.append(f"  {self._step}/{self._num_steps} steps", style="dim")
        shares = [key for key in TRACED if key != "loss" and key in self._metrics]
        for label, value in self._cells(shares or ["loss"]):
            text.append(f"  {label} {value}", style="dim")
        self._console.print(text, soft_wrap=True)

    def _seconds_left(self) -> float | None:
        if not self._intervals or self._step >= self._num_steps:
            return None
        per_step = sum(self._intervals) / len(self._intervals)
        return max(per_step * (self._num_steps - self._step) - (time.monotonic() - self._last_step_at), 0)

    def _bar(self, width: int) -> RenderableType:
        spent = _duration(time.monotonic() - self._stage_started)
        if not self._num_steps:
            return Text(f"{spent}", style="dim")
        left = self._seconds_left()
        text = f" {self._step}/{self._num_steps}  {spent}" + (f"  {_duration(left)} left" if left is not None else "")
        grid = Table.grid(expand=False)
        bar = ProgressBar(total=self._num_steps, completed=self._step, width=max(min(width - len(text) - 1, 60), 8))
        grid.add_row(bar, Text(text, no_wrap=True))
        return grid

    def _cells(self, only: Sequence[str] | None = None) -> list[tuple[str, str]]:
        known = [metric for metric in METRICS if only is None or metric[0] in only]
        values = ((label, _number(self._metrics, key), form) for key, label, form in known)
        return [(label, format(value, form)) for label, value, form in values if value is not None]

    def _panel(self, cells: Sequence[tuple[str, str]], width: int) -> RenderableType:
        columns = 3 if width >= 90 else 2 if width >= 56 else 1
        grid = Table.grid(padding=(0, 1), expand=True)
        for _ in range(columns):
            grid.add_column(no_wrap=True, overflow="ellipsis", style="dim")
            grid.add_column(no_wrap=True, justify="right", style="bold", min_width=9)
            grid.add_column(min_width=1)
        for start in range(0, len(cells), columns):
            grid.add_row(*(part for label, value in cells[start : start + columns] for part in (label, value, "")))
        rows: list[RenderableType] = [grid]
        if seconds := self._seconds_by_stage():
            rows.append(Text.assemble(("s/step  ", "dim"), seconds))
        if trace := self._trace(max(width - 32, 10)):
            rows.append(trace)
        if trouble := _trouble(self._metrics):
            rows.append(Text(trouble, style="bold red", no_wrap=True, overflow="ellipsis"))
        return Panel(Group(*rows), border_style="dim", width=min(width, 110), padding=(0, 1))

    def _seconds_by_stage(self) -> str:
        values = [(label, _number(self._metrics, key)) for key, label in STAGES]
        parts = [f"{label}\N{NO-BREAK SPACE}{value:.2f}" for label, value in values if value is not None]
        total = _number(self._metrics, "seconds_total")
        return "  ".join(([f"{total:.2f}"] if total is not None else []) + parts)

    def _trace(self, width: int) -> Text | None:
        key = next((key for key in TRACED if len(self._traces.get(key, ())) > 1), None)
        if key is None:
            return None
        values = self._traces[key]
        low, high = (min(values), max(values)) if key == "loss" else (0.0, 1.0)
        _, label, form = next(metric for metric in METRICS if metric[0] == key)
        text = Text(no_wrap=True, overflow="crop")
        text.append(f"{label}  ", style="dim")
        text.append(sparkline(values, width, low, high, ascii_only=self._ascii), style="green")
        text.append(f"  {values[-1]:{form}}", style="bold")
        return text

    def _line(self) -> str:
        parts = [f"step {self._step}/{self._num_steps}"]
        left_out = {"lr", "loss"} if "accuracy" in self._metrics else {"lr"}
        parts += [f"{label} {value}" for label, value in self._cells([m[0] for m in METRICS if m[0] not in left_out])]
        total = _number(self._metrics, "seconds_total")
        parts += [f"{total:.2f} s/step"] if total is not None else []
        left = self._seconds_left()
        parts += [f"{_duration(left)} left"] if left is not None else []
        parts += [text] if (text := _trouble(self._metrics)) else []
        return " | ".join(parts)

    def _flush(self) -> None:
        if self._pending is not None:
            self._print(self._pending)

    def _print(self, text: str) -> None:
        self._pending = None
        self._last_line = time.monotonic()
        print(text, file=self._stream, flush=True)

    def _clock(self) -> str:
        return _duration(time.monotonic() - self._started)


def sparkline(values: Sequence[float], width: int, low: float, high: float, *, ascii_only: bool = False) -> str:
    """`values` between `low` and `high` as at most `width` characters, each the mean of an equal share of them."""
    levels = "_.-=+*#@" if ascii_only else "▁▂▃▄▅▆▇█"
    count = min(width, len(values))
    bounds = [round(index * len(values) / count) for index in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(bounds)]
    scale = (len(levels) - 1) / (high - low) if high > low else 0.0
    return "".join(levels[min(max(round((mean - low) * scale), 0), len(levels) - 1)] for mean in means)


def _number(metrics: Mapping[str, Any], key: str) -> float | None:
    value = metrics.get(key)
    return float(value) if value is not None else None


def _trouble(metrics: Mapping[str, Any]) -> str:
    found = [(label, _number(metrics, key)) for key, label in TROUBLE]
    return ", ".join(label if label == "step skipped" else f"{label}: {value:.0f}" for label, value in found if value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
