"""What a clause is: a promise, programs that put it to the test, and the judgement of what was observed."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from hypothesis import strategies as st

from lightrft.conformance.reference import Family, Reference
from lightrft.conformance.values import decode

Level = Literal["MUST", "SHOULD"]
Operation = dict[str, Any]


class Violation(AssertionError):
    """A promise was not kept. Each clause has a class of its own below this one."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the contract is executed."""

    strategy: str
    """Registered name, or ``module:attribute``."""
    world: int
    device: str = "cpu"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of this certification, such as ``zero_stage``."""
    capabilities: frozenset[str] = frozenset()
    """What the strategy says that it can do beyond the contract."""
    grouped: bool = True
    """Whether ranks have a process group; FakeStrategy has none."""
    engine: str = "fake"
    """The rollout engine with which the clauses about rollouts are run."""
    language_model: str = "language"
    """The kind of language model that the engine can run."""
    sleep_levels: frozenset[int] = frozenset({1, 2})
    """Levels of sleep that the engine says that it has."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """Operations to run on every rank, in order; plain data."""

    operations: tuple[Operation, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 60.0
    """The deadline of the whole group."""
    seed: int = 0
    afterwards: "Program | None" = None
    """To be run then, by processes that know nothing of these."""

    def command(self, place: Place) -> dict[str, Any]:
        """As it is sent to a worker."""
        return {
            "program": {
                "strategy": place.strategy,
                "fixed": {"device": place.device, **place.settings},
                "settings": dict(self.settings),
                "operations": list(self.operations),
                "seed": self.seed,
            }
        }


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A program, and what every rank observed."""

    place: Place
    program: Program
    observations: Sequence[Sequence[Any]]
    """By rank, then by operation; decoded. None of a rank that was told to die."""
    afterwards: "Trial | None" = None

    _predicted: dict[Family, list[Any]] = field(default_factory=dict)

    def predicted(self, family: Family = "once") -> list[Any]:
        """What the reference says, by operation."""
        if family not in self._predicted:
            settings = {**self.place.settings, **self.program.settings}
            self._predicted[family] = Reference(self.place.world, family).run(settings, self.program.operations)
        return self._predicted[family]

    def each(self, do: str) -> Iterator[tuple[int, Operation, list[Any]]]:
        """Index, operation, and observations by rank, of every ``do``."""
        for index, operation in enumerate(self.program.operations):
            if operation["do"] == do:
                yield index, operation, [self.at(rank, index) for rank in range(self.place.world)]

    def at(self, rank: int, index: int) -> Any:
        """The observation of one operation on one rank; raises `Violation` where an earlier one failed."""
        seen = self.observations[rank]
        if index >= len(seen):
            last = len(seen) - 1
            failed = self.program.operations[last]["do"]
            raise UnexpectedError(f"rank {rank}: {failed} (operation {last}) raised {show_error(seen[last])}")
        operation = self.program.operations[index]
        if is_error(seen[index]) and not operation.get("may_fail"):
            raise UnexpectedError(
                f"rank {rank}: {operation['do']} (operation {index}) raised {show_error(seen[index])}"
            )
        return seen[index]

    def last(self, do: str) -> list[Any]:
        """The observations of the last ``do``, by rank."""
        return list(self.each(do))[-1][2]

    def last_of(self, do: str, number: int) -> list[Any]:
        """The observations of the ``number``-th ``do``, by rank."""
        return list(self.each(do))[number][2]


class UnexpectedError(Violation):
    """The code under test raised where it must not."""


@dataclass(frozen=True, kw_only=True)
class Clause(ABC):
    """One promise of the contract. The docstring of a subclass is its text."""

    id: ClassVar[str]
    level: ClassVar[Level] = "MUST"
    smallest_world: ClassVar[int] = 1
    """World size from which it has teeth."""
    capability: ClassVar[str | None] = None
    needs_cuda: ClassVar[bool] = False
    grouped_only: ClassVar[bool] = False
    """Speaks of process groups, and says nothing of a strategy without one."""
    ends_workers: ClassVar[bool] = False
    """Its programs end a worker, and what comes after them has to wait for new ones: it comes last."""
    violation: ClassVar[type[Violation]] = Violation

    def __init_subclass__(cls) -> None:
        if "id" in vars(cls):
            cls.violation = type(f"{cls.__name__}Violated", (Violation,), {"__module__": cls.__module__})

    @property
    def text(self) -> str:
        """The promise."""
        return " ".join((type(self).__doc__ or "").split())

    @abstractmethod
    def witnesses(self, place: Place) -> Sequence[Program]:
        """Programs that are known to reach what the promise is about; always run, first."""

    def programs(self, place: Place) -> st.SearchStrategy[Program] | None:
        """Programs to search for a violation in, or None where the witnesses are all there is."""
        return None

    @abstractmethod
    def check(self, trial: Trial) -> None:
        """Raise `violation`, by way of `require`, unless the promise was kept."""

    def require(self, holds: bool, message: str) -> None:
        """Raise this clause's own violation unless ``holds``."""
        if not holds:
            raise self.violation(message)

    def require_error(self, observed: Any, kind: str, *words: str, where: str) -> None:
        """Require that ``observed`` is an error of ``kind`` (a class name) whose message has all ``words``."""
        self.require(is_error(observed), f"{where}: nothing was raised; got {show(observed)}")
        names = [name.rpartition(".")[2] for name in observed["error"]]
        self.require(kind in names, f"{where}: raised {show_error(observed)}; wanted {kind}")
        missing = [word for word in words if word.lower() not in observed["message"].lower()]
        self.require(not missing, f"{where}: the message says nothing of {', '.join(missing)}: {observed['message']}")

    def require_alike(self, trial: Trial, do: str) -> None:
        """Require that all ranks observed the same."""
        for index, _, seen in trial.each(do):
            for rank, other in enumerate(seen):
                self.require(
                    same(other, seen[0]),
                    f"{do} (operation {index}): rank {rank} got {show(other)}, rank 0 {show(seen[0])}",
                )


def is_error(observed: Any) -> bool:
    """Whether an operation raised."""
    return isinstance(observed, dict) and "error" in observed and "message" in observed


def show_error(observed: Any) -> str:
    """An observed error in a line."""
    return f"{observed['error'][0].rpartition('.')[2]}: {observed['message']}" if is_error(observed) else show(observed)


def show(value: Any, limit: int = 200) -> str:
    """A value, short enough to read."""
    text = value if isinstance(value, str) else repr(_brief(value))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _brief(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        kind, shape = str(value.dtype).removeprefix("torch."), "x".join(map(str, value.shape))
        return f"{kind}[{shape}]: " + " ".join(f"{number:.6g}" for number in value.flatten()[:4].tolist())
    if isinstance(value, dict):
        return {key: _brief(item) for key, item in value.items()}
    return [_brief(item) for item in value] if isinstance(value, list) else value


def same(left: Any, right: Any) -> bool:
    """Equality of nested values, tensors bit for bit with their dtype and shape; NaN equals itself."""
    if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        if not (isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)):
            return False
        alike = left.dtype == right.dtype and left.shape == right.shape
        return alike and left.numpy().tobytes() == right.numpy().tobytes()
    if isinstance(left, dict) and isinstance(right, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, float) and isinstance(right, float):
        return left == right or (left != left and right != right)
    return bool(left == right) and type(left) is type(right)


def decoded(answers: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The observations of all ranks, decoded."""
    return [[decode(observation) for observation in answer["observations"]] for answer in answers]


class Registry:
    """All clauses, by id, in the order of the contract."""

    def __init__(self) -> None:
        self._clauses: dict[str, Clause] = {}

    def add(self, kind: type[Clause]) -> type[Clause]:
        """Register a clause class."""
        if kind.id in self._clauses:
            raise ValueError(f"two clauses with the id {kind.id}")
        self._clauses[kind.id] = kind()
        return kind

    def __iter__(self) -> Iterator[Clause]:
        return iter(self._clauses.values())

    def __getitem__(self, clause_id: str) -> Clause:
        return self._clauses[clause_id]

    @cached_property
    def ids(self) -> list[str]:
        return list(self._clauses)


CONTRACT = Registry()
