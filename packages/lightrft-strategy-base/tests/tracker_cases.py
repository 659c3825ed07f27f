"""Trackers that keep, refuse or wait with what they get."""

import threading
from collections.abc import Mapping
from typing import Any

from lightrft.strategy.telemetry.trackers import RunInfo


class InMemory:
    """Keeps what it gets. ``instances``: the trackers that were made."""

    instances: list["InMemory"] = []

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.instances.append(self)

    def start(self, run: RunInfo) -> None:
        self.calls.append(run)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.calls.append((dict(metrics), step, threading.current_thread().name))

    def close(self) -> None:
        self.calls.append("closed")


class FailsToStart(InMemory):
    def start(self, run: RunInfo) -> None:
        raise ConnectionError("no network")


class FailsToLog(InMemory):
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        super().log(metrics, step)
        if step < 2:
            raise OSError("disk full")


class Hangs(InMemory):
    released = threading.Event()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.released.wait()
        super().log(metrics, step)
