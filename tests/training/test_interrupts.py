"""Signals inside one process; tests/cli/test_interrupts.py sends them to real ones."""

from __future__ import annotations

import signal
import threading

import pytest

from i3lm.errors import Interrupted
from i3lm.training.interrupts import StopOnSignal


@pytest.fixture(autouse=True)
def _handlers_are_put_back():
    started_with = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    after = {number: signal.getsignal(number) for number in before}
    signal.signal(signal.SIGINT, started_with)
    assert before == after


def test_signals_are_counted_and_handlers_put_back():
    with StopOnSignal(lambda line: None) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        with pytest.raises(SystemExit) as caught:
            signal.raise_signal(signal.SIGTERM)
        assert caught.value.code == 143
    with StopOnSignal(lambda line: None):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopOnSignal(pytest.fail) as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_signals_alone():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with StopOnSignal(pytest.fail):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_run_that_was_done_anyway_is_not_interrupted():
    stop = StopOnSignal(pytest.fail)
    stop.check(5, 10)
    stop.received = signal.SIGTERM
    stop.check(10, 10)
    message = r"^stopped by SIGTERM at step 5 of 10, which is saved; give .* --resume to go on$"
    with pytest.raises(Interrupted, match=message) as caught:
        stop.check(5, 10)
    assert caught.value.number == 15
