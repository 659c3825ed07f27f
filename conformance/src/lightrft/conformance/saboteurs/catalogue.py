"""What a saboteur is, and the list of them all."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lightrft.conformance.judge import Verdict

Kind = TypeVar("Kind", bound=type)


@dataclass(frozen=True, kw_only=True)
class Saboteur:
    """A defect, and the clause that must find it."""

    name: str
    target: str
    """``module:attribute`` of the class."""
    defect: str
    clause: str
    """Empty for a control, which has no defect."""
    verdict: Verdict = "fail"
    world: int = 1
    engine: bool = False
    """An engine, generating for FakeStrategy, rather than a strategy."""
    settings: Mapping[str, Any] = field(default_factory=dict)


_all: dict[str, Saboteur] = {}


def saboteur(
    clause: str, *, world: int = 1, verdict: Verdict = "fail", engine: bool = False, **settings: Any
) -> Callable[[Kind], Kind]:
    """Register a class, whose docstring says what is wrong with it."""

    def register(kind: Kind) -> Kind:
        name = kind.__name__
        if name in _all:
            raise ValueError(f"two saboteurs named {name}")
        _all[name] = Saboteur(
            name=name, target=f"{kind.__module__}:{name}", defect=" ".join((kind.__doc__ or "").split()), clause=clause,
            verdict=verdict, world=world, engine=engine, settings=settings,
        )  # fmt: skip
        return kind

    return register


def control(*, world: int = 1, **settings: Any) -> Callable[[Kind], Kind]:
    """Register a class that looks odd and keeps every promise."""
    return saboteur("", world=world, **settings)


def corpus() -> list[Saboteur]:
    """All saboteurs and controls."""
    from lightrft.conformance.saboteurs import (  # noqa: F401 - they register themselves
        checkpoints,
        collectives,
        complaints,
        controls,
        corners,
        corners_of_state,
        data,
        engines,
        exporting,
        life,
        media,
        misuse,
        optimizers,
        preparing,
        rollouts,
        skips,
        updates,
    )

    return list(_all.values())


def saboteurs() -> Iterator[Saboteur]:
    """Those with a defect."""
    return (it for it in corpus() if it.clause)
