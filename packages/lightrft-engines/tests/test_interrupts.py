"""Ctrl-C is put off, and not lost."""

import signal
import threading

import pytest

from lightrft.engines.vllm.interrupts import put_off


@pytest.fixture(autouse=True)
def handler():
    """Python's own, which a process in the background has not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_it_comes_at_the_end_of_the_body(handler):
    done = []

    def body():
        with put_off():
            signal.raise_signal(signal.SIGINT)
            done.append("all")
        done.append("more")

    with pytest.raises(KeyboardInterrupt):
        body()
    assert done == ["all"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_it_comes_where_the_body_lets_it(handler):
    done = []

    def body():
        with put_off() as deliver:
            deliver()
            signal.raise_signal(signal.SIGINT)
            done.append("some")
            deliver()
            done.append("all")

    with pytest.raises(KeyboardInterrupt):
        body()
    assert done == ["some"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_nothing_is_put_off_in_another_thread(handler):
    def body():
        with put_off() as deliver:
            deliver()
            assert signal.getsignal(signal.SIGINT) is handler

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
