"""Signals: waited for between steps, answered at once elsewhere, and left alone where they are not ours."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from lofi_fast.run.stop import SIGNALS, Stop, Stopped


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_for_the_end_of_the_step(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    stop, done = Stop(), []
    with pytest.raises(Stopped) as stopped, stop.on_signals(), stop.between_steps():
        assert not stop()
        send(number)
        assert stop()
        done.append("the step")
    assert done == ["the step"] and stopped.value.signal is number
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", SIGNALS)
def test_where_nothing_can_be_lost_a_signal_ends_the_run_at_once(number: signal.Signals) -> None:
    stop = Stop()
    with pytest.raises(Stopped), stop.on_signals():
        send(number)
        pytest.fail("it went on")


def test_a_second_interrupt_ends_the_run_at_once_and_a_second_terminate_does_not() -> None:
    stop, done = Stop(), []
    with pytest.raises(Stopped), stop.on_signals(), stop.between_steps():
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        done.append("after two SIGTERM")
        send(signal.SIGINT)
        done.append("after an interrupt")
    assert done == ["after two SIGTERM"]


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = Stop()
        with stop.on_signals(), stop.between_steps():
            send(signal.SIGHUP)
        assert not stop() and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_without_a_block_of_its_own_no_signal_is_touched() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    stop = Stop()
    with stop.between_steps():
        assert [signal.getsignal(number) for number in SIGNALS] == before
    assert not stop()


def test_outside_of_the_main_thread_signals_are_left_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        with Stop().on_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]
