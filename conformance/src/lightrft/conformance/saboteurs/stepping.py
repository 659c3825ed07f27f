"""A strategy whose optimizer_step is easy to bend, for saboteurs to derive from."""

from typing import Any

from lightrft.strategy import FakeStrategy, StepResult

# mypy: disable-error-code="misc"


class Stepping(FakeStrategy):
    """A strategy whose optimizer_step is easy to bend."""

    def optimizer_step(
        self, optimizer: Any, model: Any, scheduler: Any = None, name: str = "model", *, boundary: Any = None
    ) -> Any:
        return self.bent(optimizer, model, scheduler, boundary)

    def bent(self, optimizer: Any, model: Any, scheduler: Any, boundary: Any) -> Any:
        """The step as it is."""
        return self.straight(optimizer, model, scheduler, boundary)

    def straight(self, optimizer: Any, model: Any, scheduler: Any, boundary: Any) -> StepResult:
        """The step as it should be."""
        return super().optimizer_step(optimizer, model, scheduler, boundary=boundary)
