"""Steps that succeed on all ranks or raise on all: an error on one rank is the same error on every rank."""

from collections.abc import Callable
from typing import Any, TypeVar

from lightrft.config import LightRFTError, StrategyError, errors
from lightrft.strategy.distributed.collectives import Collectives

Result = TypeVar("Result")
_KINDS = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, LightRFTError)
}


class Agreement:
    """The steps of one call. Every rank makes the same ones in the same order."""

    def __init__(self, collectives: Collectives, call: str, rank: int) -> None:
        self._collectives, self._call, self.rank = collectives, call, rank

    def alike(self, value: Any) -> None:
        """Raise `StrategyError` on every rank unless all pass an equal ``value``."""
        self._collectives.agree(self._call, value)

    def everywhere(self, doing: str, step: Callable[[], Any]) -> list[Any]:
        """Do ``step`` on every rank; its results, JSON values, by rank.

        Where it raises on some ranks, these raise the error, and the others one of its kind that quotes it.
        ``step`` must not wait for another rank.
        """
        result: Any = None
        error: Exception | None = None
        try:
            result = step()
        except Exception as raised:  # noqa: BLE001 - carried to the other ranks, then raised again
            error = raised
        failed = None if error is None else [type(error).__name__, str(error)]
        answers = self._collectives.exchange(f"{self._call}: {doing}", [result, failed])
        if error is not None:
            raise error
        failures = [(rank, *it) for rank, (_, it) in enumerate(answers) if it is not None]
        if failures:
            kind = _KINDS.get(failures[0][1], StrategyError)
            raise kind(f"{self._call}: " + "; ".join(f"rank {rank}: {text}" for rank, _, text in failures))
        return [value for value, _ in answers]

    def here(self, doing: str, step: Callable[[], Result]) -> Result:
        """Do ``step`` on every rank, like `everywhere`; its result on this one, of any type."""
        results: list[Result] = []
        self.everywhere(doing, lambda: results.append(step()))
        return results[0]

    def on_rank_0(self, doing: str, step: Callable[[], Any]) -> Any:
        """Do ``step`` on rank 0 alone; its result, a JSON value, on every rank."""
        return self.everywhere(doing, lambda: step() if self.rank == 0 else None)[0]
