"""Pools of forked processes that end with the command, also on Ctrl-C, SIGTERM and SIGKILL."""

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children, get_context
from multiprocessing.queues import SimpleQueue

PR_SET_PDEATHSIG = 1
"""Of prctl(2): the signal for this process when the thread that forked it ends."""


@contextmanager
def process_pool(jobs: int, on_start: Callable[[int], None] = lambda number: None) -> Iterator[ProcessPoolExecutor]:
    """A pool of ``jobs`` processes, which end after the body: when their running calls are done, or at once on Ctrl-C.

    They are forked, so that they need not import everything again: enter this before any threads start, in the main thread.
    Each first calls ``on_start`` with its number, from 0. The fork servers of processes that end at once end the workers.
    """
    context = get_context("fork")
    numbers: SimpleQueue[int] = context.SimpleQueue()
    for number in range(jobs):
        numbers.put(number)
    started = partial(_start, os.getpid(), numbers, on_start)
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=started) as pool:
        try:
            pool.submit(os.getpid).result()  # the first call starts all processes
            yield pool
        except KeyboardInterrupt:
            for process in active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _start(command: int, numbers: SimpleQueue[int], on_start: Callable[[int], None]) -> None:
    _end_with_command(command)
    on_start(numbers.get())


def _end_with_command(command: int) -> None:
    """End if the command is killed; leave the terminal's Ctrl-C, which this process gets too, to the command."""
    signal.signal(signal.SIGINT, lambda number, frame: None)  # SIG_IGN would be inherited by the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a pool never notices that its command is gone
    if os.getppid() != command:
        os._exit(1)
