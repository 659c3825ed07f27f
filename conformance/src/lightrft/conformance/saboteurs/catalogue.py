"""What a saboteur is, and how a class becomes one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightrft.conformance.judge import Verdict
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import EngineBase, FakeStrategy
from lightrft.strategy.backend import ReplicatedBackend
from lightrft.strategy.fake_strategy import FakeBackend


@dataclass(frozen=True, kw_only=True)
class Saboteur:
    """A defect, and the clause that must find it."""

    name: str
    target: str
    """``module:attribute`` of the strategy or engine."""
    defect: str
    clause: str
    """Empty for a control, which has no defect."""
    verdict: Verdict = "fail"
    world: int = 1
    engine: bool = False
    """An engine, generating for FakeStrategy, rather than a strategy."""
    settings: Mapping[str, Any] = field(default_factory=dict)


registered: dict[str, Saboteur] = {}


def saboteur(clause: str, *, world: int = 1, verdict: Verdict = "fail", **settings: object) -> Callable[[type], type]:
    """Register a defective strategy, backend or engine. Its docstring says what is wrong with it.

    The name of a backend then means the strategy around it; see `strategy_around`.
    """

    def register(defective: type) -> type:
        name = defective.__name__
        if name in registered:
            raise ValueError(f"two saboteurs named {name}")
        registered[name] = Saboteur(
            name=name, target=f"{defective.__module__}:{name}", defect=" ".join((defective.__doc__ or "").split()),
            clause=clause, verdict=verdict, world=world, engine=issubclass(defective, EngineBase), settings=settings,
        )  # fmt: skip
        return strategy_around(defective) if issubclass(defective, ReplicatedBackend) else defective

    return register


def control(*, world: int = 1, **settings: Any) -> Callable[[type], type]:
    """Register a class that looks odd and meets the whole contract."""
    return saboteur("", world=world, **settings)


def strategy_around(backend: type[ReplicatedBackend]) -> type:
    """Return a strategy with this backend and its name: a FakeStrategy for a FakeBackend, else a PlainStrategy."""
    base = FakeStrategy if issubclass(backend, FakeBackend) else PlainStrategy
    return type(backend.__name__, (base,), {"backend_class": backend, "__module__": backend.__module__})
