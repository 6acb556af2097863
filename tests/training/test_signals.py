"""Interruption, with real signals sent to this process and to a real child."""

import os
import signal
import subprocess
import sys

import pytest

from gac.training import signals
from gac.training.signals import Interrupted, Interruption


@pytest.mark.parametrize(("number", "exit_status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_batch_in_hand_is_finished_before_the_stop(number: signal.Signals, exit_status: int) -> None:
    finished = []

    def consume(interruption: Interruption) -> None:
        for batch in interruption.watch(range(5)):
            if batch == 2:
                os.kill(os.getpid(), number)
            finished.append(batch)

    with Interruption() as interruption, pytest.raises(Interrupted, match=number.name) as error:
        consume(interruption)
    assert finished == [0, 1, 2]
    assert error.value.exit_status == exit_status


def test_a_signal_during_the_last_batch_counts() -> None:
    with Interruption() as interruption:
        batches = interruption.watch([0])
        assert next(batches) == 0
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            next(batches)


def test_without_a_signal_all_batches_come() -> None:
    with Interruption() as interruption:
        assert list(interruption.watch("abc")) == ["a", "b", "c"]


def test_the_handlers_of_before_are_back_afterwards() -> None:
    before = [signal.getsignal(number) for number in Interruption.SIGNALS]
    with Interruption():
        assert [signal.getsignal(number) for number in Interruption.SIGNALS] != before
    assert [signal.getsignal(number) for number in Interruption.SIGNALS] == before


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_a_signal_ends_the_process_at_once_and_sigterm_does_not(first: signal.Signals) -> None:
    # Loads only the module's file: importing the package takes seconds.
    program = f"""
import importlib.util, os, signal, time
spec = importlib.util.spec_from_file_location("signals", {signals.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
with module.Interruption() as interruption:
    for number in (signal.{first.name}, signal.SIGTERM, signal.SIGTERM):
        os.kill(os.getpid(), number)
        print(interruption.received, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as child:
        assert [int(child.stdout.readline()) for _ in range(3)] == [first, signal.SIGTERM, signal.SIGTERM]
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=10) == -signal.SIGINT


def test_processes_with_fewer_batches_wait_for_the_others_and_their_signals() -> None:
    heard = iter([(0, 1), (0, 1), (0, 1), (signal.SIGINT, 1)])
    said = []

    def largest(*mine: float) -> tuple[float, ...]:
        said.append(mine)
        return next(heard)

    interruption, taken = Interruption(largest), []
    with pytest.raises(Interrupted, match="SIGINT"):
        taken.extend(interruption.watch("a"))
    assert said == [(0, True), (0, True), (0, False), (0, False)]


def test_further_signals_may_change_nothing() -> None:
    with Interruption(second_kills=False) as interruption:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert interruption.received == signal.SIGTERM
