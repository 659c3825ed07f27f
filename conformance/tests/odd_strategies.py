"""Strategies that treat their process badly, and are correct in everything else."""

import os
import sys
import time
from typing import Any

from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import strategy_around
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy
from lightrft.strategy.backend import TrainedModel
from lightrft.strategy.fake_strategy import FakeBackend
from lightrft.strategy.step.update import reduce_clip_and_step


@strategy_around
class Forks(FakeBackend):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        os.fork()  # and the child continues the program


@strategy_around
class PrintsAMillionLines(FakeBackend):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        for _ in range(1000):
            os.write(1, b"here is another line\n" * 1000)


@strategy_around
class ChangesDirectory(FakeBackend):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        os.chdir("/")


@strategy_around
class ReadsStandardInput(FakeBackend):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        sys.stdin.read()


@strategy_around
class ClosesEveryFile(FakeBackend):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.config.train_batch_size != 1:
            os.closerange(3, 4096)


@strategy_around
class ExitsInAStep(FakeBackend):
    @override
    def reduce(self, trained: TrainedModel) -> None:
        print("leaving", flush=True)
        os._exit(5)


@strategy_around
class KillsItself(FakeBackend):
    @override
    def reduce(self, trained: TrainedModel) -> None:
        os.kill(os.getpid(), 9)


@strategy_around
class ReturnsAnOddNorm(FakeBackend):
    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> Any:
        reduce_clip_and_step(self, trained, factor)
        return OddNumber(1.0)


class ReturnsNoStepResult(FakeStrategy):
    def optimizer_step(self, *arguments: Any, **options: Any) -> Any:  # type: ignore[misc]
        super().optimizer_step(*arguments, **options)


class ReturnsNoStepResultOnRank1(PlainStrategy):
    def optimizer_step(self, *arguments: Any, **options: Any) -> Any:  # type: ignore[misc]
        result = super().optimizer_step(*arguments, **options)
        return result if self.world.rank == 0 else None


class FlattensParameters(FakeStrategy):
    def full_parameters(self, *arguments: Any, **options: Any) -> Any:  # type: ignore[misc]
        for bucket in super().full_parameters(*arguments, **options):
            yield [(name, tensor.flatten()) for name, tensor in bucket]


class LacksAPackage(FakeStrategy):
    def optimizer_step(self, *arguments: Any, **options: Any) -> Any:  # type: ignore[misc]
        import a_package_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401


@strategy_around
class RaisesNoUnicode(FakeBackend):
    @override
    def reduce(self, trained: TrainedModel) -> None:
        raise ValueError("not a character: \udcff")


@strategy_around
class RaisesWithoutWords(FakeBackend):
    @override
    def reduce(self, trained: TrainedModel) -> None:
        raise NoWords


class NoWords(ValueError):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class OddNumber(complex):
    def __float__(self) -> float:
        return 1.0


@strategy_around
class Hangs(FakeBackend):
    @override
    def reduce(self, trained: TrainedModel) -> None:
        time.sleep(3600)


class CannotBeMade(FakeStrategy):
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        raise ValueError("there is no accelerator of the right colour")


class ExitsWhenMade(FakeStrategy):
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        print("out of licences", flush=True)
        os._exit(4)


class NoStrategy:
    pass
