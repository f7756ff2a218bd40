"""A signal breaks work off, whatever handlers stand around it, and ends in one line that says what is saved."""

import os
import signal

import pytest

from wireframe.train.stopping import Stopped, StopRequest

LINE = "stopped while it was scored; the same command goes on from there"


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.fixture
def handlers():
    """Those of the process are the same afterwards."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_no_handler_for_bad_input_sees_the_signal(handlers, number):
    went_on = []
    with StopRequest() as request, pytest.raises(Stopped, match=f"^{LINE}$") as stopped, request.raising(LINE):
        try:
            send(number)
        except Exception as problem:
            went_on.append(problem)
        went_on.append("further")
    assert not went_on and request.asked
    assert stopped.value.exit_status == 4 and stopped.value.__suppress_context__


def test_a_second_sigterm_does_not_break_the_clean_up(handlers):
    cleaned = []
    with StopRequest() as request, pytest.raises(Stopped), request.raising(LINE):
        try:
            send()
        finally:
            send()
            cleaned.append(True)
    assert cleaned


def test_a_second_sigint_ends_the_process_at_once(handlers):
    with pytest.raises(KeyboardInterrupt), StopRequest() as request, request.raising(LINE):
        try:
            send()
        finally:
            send(signal.SIGINT)


def test_a_signal_that_was_swallowed_counts_all_the_same(handlers):
    with StopRequest() as request, pytest.raises(Stopped, match=LINE), request.raising(LINE):
        try:
            send()
        except BaseException:
            # As the interpreter does where a finaliser was running.
            pass


def test_a_fault_on_the_way_out_is_kept_as_the_cause(handlers):
    fault = OSError("full")
    with StopRequest() as request, pytest.raises(Stopped) as stopped, request.raising(LINE):
        try:
            send()
        finally:
            raise fault
    assert stopped.value.__cause__ is fault


def test_a_signal_before_the_block_keeps_it_from_beginning_and_after_it_nothing_is_raised(handlers):
    begun = []
    with StopRequest() as request:
        with request.raising(LINE):
            pass
        send()
        with pytest.raises(Stopped, match=LINE), request.raising(LINE):
            begun.append(True)
        send()
    assert not begun


def test_one_that_comes_while_the_block_is_left_is_turned_too(handlers, monkeypatch):
    with pytest.raises(Stopped, match=LINE), StopRequest() as request:
        block = request.raising(LINE)
        monkeypatch.setattr(type(block), "__exit__", lambda self, *_: send())
        with block:
            pass


def test_other_errors_pass(handlers):
    with StopRequest() as request, pytest.raises(OSError, match="full"), request.raising(LINE):
        raise OSError("full")
