"""The first signal asks a run to stop, the second insists, and afterwards everything is as it was."""

from __future__ import annotations

import signal
import threading

import pytest

from rollout.interrupt import RunInterrupted, stop_on_signal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_interrupts(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with stop_on_signal() as stop:
        assert not stop.is_set()
        signal.raise_signal(number)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_exception_inside_restores_the_handlers() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), stop_on_signal():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_nothing_is_caught() -> None:
    seen: list[tuple[bool, bool]] = []

    def work() -> None:
        before = signal.getsignal(signal.SIGINT)
        with stop_on_signal() as stop:
            seen.append((signal.getsignal(signal.SIGINT) is before, stop.is_set()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(True, False)]


def test_a_saved_run_ends_like_an_interrupted_one() -> None:
    with pytest.raises(KeyboardInterrupt, match="groupzero train"):
        raise RunInterrupted("go on with: groupzero train")
