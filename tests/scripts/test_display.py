"""The display: plain lines where nobody can move a cursor, a panel that fits and leaves no trace where one can."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rollout.run import Observer, SilentObserver
from scripts import display as display_module
from scripts.display import Display, sparkline

ROOT = Path(__file__).resolve().parents[2]
METRICS: dict[str, Any] = {
    "reward_mean": 0.512,
    "accuracy": 0.314,
    "completion_tokens_mean": 41.26,
    "kl": 0.00123,
    "entropy": 0.51,
    "logprob_gap_mean": 7e-4,
    "tokens_per_s": 9512.3,
    "loss": 0.0123,
    "seconds_sampling": 0.44,
    "seconds_learning": 0.71,
    "seconds_total": 1.24,
    "skipped": 0,
    "unheard_of": 3,
}


class Clock:
    """A clock that moves only when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(display_module.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_plain_lines_have_values_and_no_ansi(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    with Display(out) as display:
        display.stage("GRPO", "16 prompts x 16 samples")
        for step in range(1, 4):
            clock.now += 2.0
            display.step(step, 3, METRICS)
        display.message("kept [bold]checkpoint[/bold]")
    lines = out.getvalue().splitlines()
    values = (
        "reward 0.512 | accuracy 31.4% | length 41.3 | KL 1.23e-03 | entropy 0.510 | logprob gap 7.0e-04"
        " | tokens/s 9,512 | 1.24 s/step"
    )
    assert lines == [
        "[0:00] GRPO: 16 prompts x 16 samples",
        f"step 1/3 | {values}",
        f"step 2/3 | {values} | 0:02 left",
        f"step 3/3 | {values}",
        "kept [bold]checkpoint[/bold]",
    ]
    assert "\x1b" not in out.getvalue()
    assert "\r" not in out.getvalue()


def test_plain_lines_come_at_most_once_a_second_and_the_last_one_always(clock: Clock) -> None:
    out = io.StringIO()
    with Display(out) as display:
        display.stage("base model")
        for step in range(1, 96):
            clock.now += 0.1
            display.step(step, 1000, {"loss": 3.0 / step, "tokens_per_s": 30000.0})
        display.stage("start")
    steps = [int(number) for number in re.findall(r"step (\d+)/1000", out.getvalue())]
    assert steps[0] == 1
    assert steps[-1] == 95
    assert 9 <= len(steps) <= 11
    assert out.getvalue().splitlines()[-1].endswith("] start")


def test_trouble_and_held_out_accuracy_are_never_left_out(clock: Clock) -> None:
    out = io.StringIO()
    display = Display(out)
    display.stage("GRPO")
    display.step(1, 9, METRICS)
    display.step(2, 9, METRICS | {"skipped": 1})
    display.step(3, 9, METRICS | {"status_error": 2, "status_timeout": 1})
    display.step(4, 9, METRICS | {"eval_pass_at_1": 0.75})
    display.step(5, 9, METRICS)
    text = out.getvalue()
    assert text.count("step skipped") == 1
    assert "verifier errors: 2, verifier timeouts: 1" in text
    assert "step 4/9" in text
    assert "held-out pass@1 75.0%" in text
    assert "step 5/9" not in text
    display.close()
    assert "step 5/9" in out.getvalue()


def test_missing_and_null_metrics_are_left_out(clock: Clock) -> None:
    out = io.StringIO()
    with Display(out) as display:
        display.stage("base model")
        display.step(1, 5, {"loss": None, "tokens_per_s": 100.0})
    assert out.getvalue().splitlines()[1] == "step 1/5 | tokens/s 100"


def render(
    width: int, height: int, metrics: dict[str, Any], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The live part as lines of text, for a terminal of `width` x `height`, after four steps of two seconds."""
    monkeypatch.setenv("LINES", str(height))
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    display = Display(stream, live=True, width=width)
    monkeypatch.setattr(display_module.Live, "start", lambda self: None)
    display.stage("GRPO", "a long description that has to be cut off on a narrow terminal, surely, for it is long")
    for step in range(1, 5):
        clock.now += 2.0
        display.step(step, 60, metrics | {"accuracy": step / 4})
    with display._console.capture() as captured:
        display._console.print(display)
    return [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in captured.get().splitlines()]


@pytest.mark.parametrize("width", [30, 60, 80, 140])
def test_the_live_part_fits_any_width(width: int, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = render(width, 24, METRICS, clock, monkeypatch)
    assert all(len(line) <= width for line in lines)
    assert len(lines) <= 20
    assert lines[0].startswith("GRPO  a long")


def test_the_live_part_shows_progress_values_and_history(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(render(100, 24, METRICS, clock, monkeypatch))
    assert "4/60  0:08  1:52 left" in text
    for part in ("reward", "0.512", "100.0%", "41.3", "1.23e-03", "7.0e-04", "9,512", "sampling\xa00.44", "▃▅▆█"):
        assert part in text
    assert "step skipped" not in text
    assert "step skipped" in "\n".join(render(100, 24, METRICS | {"skipped": 1}, clock, monkeypatch))


def test_a_low_terminal_gets_the_bar_alone(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = render(80, 8, METRICS, clock, monkeypatch)
    assert len(lines) == 2
    assert "4/60" in lines[1]


def test_sparkline_means_and_bounds() -> None:
    assert sparkline([0.0, 1.0], 10, 0.0, 1.0) == "▁█"
    assert sparkline([0.0, 1.0, 0.0, 1.0], 2, 0.0, 1.0, ascii_only=True) in ("++", "==")
    assert sparkline([5.0] * 3, 10, 5.0, 5.0) == "▁▁▁"
    assert sparkline([-3.0, 9.0], 10, 0.0, 1.0) == "▁█"
    assert len(sparkline([0.5] * 1000, 40, 0.0, 1.0)) == 40


def run_in_terminal(body: str, *, interrupt_after: str | None = None) -> tuple[str, int]:
    """What a program prints to an 80-column pseudo-terminal, and its exit status; Ctrl-C once a text has appeared."""
    # A shell's background job ignores Ctrl-C, and its children with it.
    listen = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code = f"from scripts.display import Display\nimport time\n{listen}{body}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=side, stdout=side, stderr=side, env=environment, start_new_session=True
    )
    os.close(side)
    output = b""
    while select.select([main], [], [], 30)[0]:
        try:
            chunk = os.read(main, 65536)
        except OSError:
            break
        if not chunk:
            break
        output += chunk
        if interrupt_after is not None and interrupt_after.encode() in output:
            process.send_signal(2)
            interrupt_after = None
    os.close(main)
    return output.decode(), process.wait(30)


@pytest.mark.parametrize(
    ("ending", "interrupt_after", "last"),
    [
        ("", None, "✓ GRPO"),
        ("    raise RuntimeError('boom')\n", None, "RuntimeError: boom"),
        ("    time.sleep(60)\n", "3/9", "KeyboardInterrupt"),
    ],
)
def test_the_terminal_is_left_clean(ending: str, interrupt_after: str | None, last: str) -> None:
    body = (
        "with Display() as d:\n    d.stage('GRPO', 'detail')\n"
        "    for i in range(1, 4):\n        d.step(i, 9, {'accuracy': i / 9})\n        time.sleep(0.05)\n" + ending
    )
    output, _ = run_in_terminal(body, interrupt_after=interrupt_after)
    assert "\x1b[?25l" in output
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output)
    assert last in text[text.rindex("✗ GRPO" if ending else "✓ GRPO") :]
    assert "\x1b[?1049h" not in output


def test_a_program_that_forgets_to_close_leaves_the_cursor_visible() -> None:
    output, status = run_in_terminal(
        "d = Display()\nd.stage('GRPO')\nd.step(1, 9, {'accuracy': 0.5})\nraise SystemExit(3)"
    )
    assert status == 3
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")


def test_both_observers_have_the_four_methods() -> None:
    observers: list[Observer] = [SilentObserver(), Display(io.StringIO())]
    for observer in observers:
        observer.stage("a")
        observer.step(1, 2, {})
        observer.message("b")
        observer.close()
        observer.close()
