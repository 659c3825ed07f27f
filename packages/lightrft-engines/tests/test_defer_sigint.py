"""Ctrl-C is deferred, and not lost."""

import signal
import threading

import pytest

from lightrft.engines.vllm.defer_sigint import defer_sigint


@pytest.fixture(autouse=True)
def handler():
    """Python's own handler, which a background process does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_a_deferred_sigint_is_raised_at_the_end_of_the_body(handler):
    done = []

    def body():
        with defer_sigint():
            signal.raise_signal(signal.SIGINT)
            done.append("all")
        done.append("more")

    with pytest.raises(KeyboardInterrupt):
        body()
    assert done == ["all"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_deferred_sigint_is_raised_where_the_body_delivers_it(handler):
    done = []

    def body():
        with defer_sigint() as deliver:
            deliver()
            signal.raise_signal(signal.SIGINT)
            done.append("some")
            deliver()
            done.append("all")

    with pytest.raises(KeyboardInterrupt):
        body()
    assert done == ["some"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_nothing_is_deferred_in_another_thread(handler):
    def body():
        with defer_sigint() as deliver:
            deliver()
            assert signal.getsignal(signal.SIGINT) is handler

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
