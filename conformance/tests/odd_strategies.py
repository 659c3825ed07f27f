"""Strategies that treat the process that they run in badly, and are right in everything else."""

import os
import sys
import time
from typing import Any

from lightrft.strategy import FakeStrategy

# mypy: disable-error-code="misc"


class Forks(FakeStrategy):
    def _setup(self) -> None:
        os.fork()  # and the child goes on with the program


class PrintsAMillionLines(FakeStrategy):
    def _setup(self) -> None:
        for _ in range(1000):
            os.write(1, b"here is another line\n" * 1000)


class ChangesDirectory(FakeStrategy):
    def _setup(self) -> None:
        os.chdir("/")


class ReadsStandardInput(FakeStrategy):
    def _setup(self) -> None:
        sys.stdin.read()


class ClosesEveryFile(FakeStrategy):
    def _setup(self) -> None:
        if self.config.train_batch_size != 1:
            os.closerange(3, 4096)


class ExitsInAStep(FakeStrategy):
    def _update(self, trained: Any, factor: float) -> float:
        print("leaving", flush=True)
        os._exit(5)


class KillsItself(FakeStrategy):
    def _update(self, trained: Any, factor: float) -> float:
        os.kill(os.getpid(), 9)
        return 0.0


class ReturnsAnOddNorm(FakeStrategy):
    def _update(self, trained: Any, factor: float) -> Any:
        super()._update(trained, factor)
        return OddNumber(1.0)


class RaisesNoUnicode(FakeStrategy):
    def _update(self, trained: Any, factor: float) -> float:
        raise ValueError("not a character: \udcff")


class RaisesWithoutWords(FakeStrategy):
    def _update(self, trained: Any, factor: float) -> float:
        raise NoWords


class NoWords(ValueError):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class OddNumber(complex):
    def __float__(self) -> float:
        return 1.0


class Hangs(FakeStrategy):
    def _update(self, trained: Any, factor: float) -> float:
        time.sleep(3600)
        return 0.0


class CannotBeMade(FakeStrategy):
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        raise ValueError("there is no accelerator of the right colour")


class ExitsWhenMade(FakeStrategy):
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        print("out of licences", flush=True)
        os._exit(4)


class NoStrategy:
    pass
