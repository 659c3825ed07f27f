"""What a clause is: a promise, programs that test it, and a check of what was observed."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any, ClassVar, Literal, TypeGuard

import torch
from hypothesis import strategies as st

from lightrft.conformance.reference import Reference
from lightrft.conformance.reference_model import Averaging
from lightrft.conformance.values import Record as Record
from lightrft.conformance.values import decode

Level = Literal["MUST", "SHOULD"]
Operation = Record
"""One operation of a program: its name under "do", and its arguments."""
Settings = Mapping[str, Any]
"""Settings by name."""


class Violation(AssertionError):
    """A promise was not kept. Each clause has its own subclass."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the contract is executed on."""

    strategy: str
    """A registered name, or ``module:attribute``."""
    world: int
    device: str = "cpu"
    settings: Settings = field(default_factory=dict)
    """Settings of this certification, such as ``zero_stage``."""
    capabilities: frozenset[str] = frozenset()
    """What the strategy claims to support beyond the contract."""
    grouped: bool = True
    """Whether the ranks form a process group; FakeStrategy has none."""
    engine: str = "fake"
    """The rollout engine of the clauses about rollouts."""
    language_model: str = "language"
    """A kind of language model that the engine can run; see `models.KINDS`."""
    sleep_levels: frozenset[int] = frozenset({1, 2})
    """The sleep levels that the engine claims to support."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """Operations to run on every rank, in order, as plain data."""

    operations: tuple[Operation, ...]
    settings: Settings = field(default_factory=dict)
    seconds: float = 30.0
    """The deadline of the whole group, in seconds."""
    seed: int = 0
    afterwards: "Program | None" = None
    """A program to run afterwards, in new processes."""

    def command(self, target: Target) -> Record:
        """The program as it is sent to a worker."""
        return {
            "program": {
                "strategy": target.strategy,
                "fixed": {"device": target.device, **target.settings},
                "settings": dict(self.settings),
                "operations": list(self.operations),
                "seed": self.seed,
            }
        }

    def source(self, target: Target) -> str:
        """The program as Python code for `Clause.pinned_examples`, with its batch sizes for any world size."""
        settings = dict(self.settings)
        rows, total = settings.get("micro_train_batch_size"), settings.get("train_batch_size")
        parts = [f"operations={self.operations!r}"]
        if rows and total and total % (rows * target.world) == 0:
            del settings["micro_train_batch_size"], settings["train_batch_size"]
            parts.append(f"settings={{**{settings!r}, **geometry(target, {total // (rows * target.world)}, {rows})}}")
        else:
            parts.append(f"settings={settings!r}")
        parts += [
            f"{name}={getattr(self, name)}"
            for name in ("seconds", "seed")
            if getattr(self, name) != getattr(Program, name)
        ]
        return f"Program({', '.join(parts)})"


@dataclass(frozen=True, kw_only=True)
class Execution:
    """A program and the observations of every rank."""

    target: Target
    program: Program
    observations: Sequence[Sequence[Any]]
    """By rank, then by operation, decoded. Empty for a rank that the program ends."""
    afterwards: "Execution | None" = None

    _predicted: dict[Averaging, list[Any]] = field(default_factory=dict)

    def predicted(self, averaging: Averaging = "per update") -> list[Any]:
        """The predictions of the reference, by operation."""
        if averaging not in self._predicted:
            settings = {**self.target.settings, **self.program.settings}
            self._predicted[averaging] = Reference(self.target.world, averaging).run(settings, self.program.operations)
        return self._predicted[averaging]

    def each(self, do: str) -> Iterator[tuple[int, Operation, list[Any]]]:
        """Index, operation, and observations by rank, of every ``do``."""
        for index, operation in enumerate(self.program.operations):
            if operation["do"] == do:
                yield index, operation, [self.at(rank, index) for rank in range(self.target.world)]

    def at(self, rank: int, index: int) -> Any:
        """The observation of one operation on one rank. Raises `Violation` if this or an earlier operation failed."""
        seen = self.observations[rank]
        last = min(index, len(seen) - 1)
        operation = self.program.operations[last]
        if last < index or (is_error(seen[last]) and not operation.get("may_fail")):
            raise UnexpectedError(
                f"rank {rank}: {operation['do']} (operation {last}) raised {show_error(seen[last])}", seen[last]
            )
        return seen[index]

    def last(self, do: str) -> list[Any]:
        """The observations of the last ``do``, by rank."""
        return list(self.each(do))[-1][2]

    def last_of(self, do: str, number: int) -> list[Any]:
        """The observations of the ``number``-th ``do``, by rank."""
        return list(self.each(do))[number][2]


class UnexpectedError(Violation):
    """The code under test raised an error that the program does not expect."""

    def __init__(self, message: str, observed: Record) -> None:
        super().__init__(message)
        self.observed = observed
        """The record of the error."""


@dataclass(frozen=True, kw_only=True)
class Clause(ABC):
    """One promise of the contract. The docstring of a subclass is its text."""

    id: ClassVar[str]
    level: ClassVar[Level] = "MUST"
    smallest_world: ClassVar[int] = 1
    """The smallest world size at which the clause can fail."""
    capability: ClassVar[str | None] = None
    needs_cuda: ClassVar[bool] = False
    grouped_only: ClassVar[bool] = False
    """Whether the clause applies only to strategies with a process group."""
    ends_workers: ClassVar[bool] = False
    """Whether its programs end workers. Such clauses are judged last, because starting new workers takes time."""
    violation: ClassVar[type[Violation]] = Violation

    def __init_subclass__(cls) -> None:
        if "id" in vars(cls):
            cls.violation = type(f"{cls.__name__}Violated", (Violation,), {"__module__": cls.__module__})

    @property
    def text(self) -> str:
        """The promise."""
        return " ".join((type(self).__doc__ or "").split())

    @property
    def family(self) -> str:
        """CKPT of CKPT-2."""
        return self.id.partition("-")[0]

    @property
    def number(self) -> int:
        """2 of CKPT-2."""
        return int(self.id.partition("-")[2])

    @abstractmethod
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        """Programs known to test the promise. They always run, before any that are drawn."""

    def programs(self, target: Target) -> st.SearchStrategy[Program] | None:
        """A Hypothesis strategy that draws programs, or None if the pinned examples suffice."""
        return None

    @abstractmethod
    def check(self, execution: Execution) -> None:
        """Raise `violation`, through `require`, unless the promise was kept."""

    def require(self, holds: bool, message: str) -> None:
        """Raise this clause's own violation unless ``holds``."""
        if not holds:
            raise self.violation(message)

    def require_error(self, observed: Any, cls: str, *words: str, where: str) -> None:
        """Require ``observed`` to be an error of the class named ``cls``, with all ``words`` in its message."""
        self.require(is_error(observed), f"{where}: expected an error, got {show(observed)}")
        names = [name.rpartition(".")[2] for name in observed["error"]]
        self.require(cls in names, f"{where}: expected {cls}, got {show_error(observed)}")
        missing = [word for word in words if word.lower() not in observed["message"].lower()]
        self.require(not missing, f"{where}: expected {', '.join(missing)} in the message, got {observed['message']!r}")

    def require_same(self, expected: object, got: object, message: str) -> None:
        """Require two observations to be the `same`; ``message`` precedes a description of what differs."""
        mismatch = difference(expected, got)
        self.require(mismatch is None, f"{message}: {mismatch}")

    def require_same_on_all_ranks(self, execution: Execution, do: str) -> None:
        """Require all ranks to observe the same."""
        for index, _, seen in execution.each(do):
            for rank, other in enumerate(seen):
                self.require_same(
                    seen[0], other, f"{do} (operation {index}): expected rank {rank} to agree with rank 0"
                )


def is_error(observed: object) -> TypeGuard[Record]:
    """Whether ``observed`` is the error of an operation."""
    return isinstance(observed, dict) and "error" in observed and "message" in observed


def show_error(observed: object) -> str:
    """An observed error as one line."""
    return f"{observed['error'][0].rpartition('.')[2]}: {observed['message']}" if is_error(observed) else show(observed)


def show(value: object, limit: int = 200) -> str:
    """A value as text of at most ``limit`` characters."""
    text = value if isinstance(value, str) else repr(_brief(value))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _brief(value: object) -> object:
    if isinstance(value, torch.Tensor):
        dtype, shape = str(value.dtype).removeprefix("torch."), "x".join(map(str, value.shape))
        return f"{dtype}[{shape}]: " + " ".join(map(str, value.flatten()[:4].tolist()))
    if isinstance(value, dict):
        return {key: _brief(item) for key, item in value.items()}
    return [_brief(item) for item in value] if isinstance(value, list) else value


def same(left: object, right: object) -> bool:
    """Equality of nested values: tensors bit for bit, with dtype and shape; NaN equals NaN."""
    if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        if not (isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)):
            return False
        same_type = left.dtype == right.dtype and left.shape == right.shape
        return same_type and left.numpy().tobytes() == right.numpy().tobytes()
    if isinstance(left, dict) and isinstance(right, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, float) and isinstance(right, float):
        return left == right or (left != left and right != right)
    return bool(left == right) and type(left) is type(right)


def difference(expected: object, got: object, name: str = "") -> str | None:
    """Describe the first difference of nested values: its name, and both values in full. None if they are the `same`."""
    if same(expected, got):
        return None
    label = f"{name}: " if name else ""
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in expected.keys() & got.keys() if list(expected) != list(got) else expected:
            if not same(expected[key], got[key]):
                return difference(expected[key], got[key], f"{name} {key}".lstrip())
        return f"{label}expected the names {list(expected)}, got {list(got)}"
    if isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        index = next(i for i, pair in enumerate(zip(expected, got, strict=True)) if not same(*pair))
        return difference(expected[index], got[index], f"{name}[{index}]")
    if isinstance(expected, torch.Tensor) and isinstance(got, torch.Tensor):
        return label + _difference_of_tensors(expected, got)
    return f"{label}expected {show(expected)}, got {show(got)}"


def _difference_of_tensors(expected: torch.Tensor, got: torch.Tensor) -> str:
    if expected.dtype != got.dtype or expected.shape != got.shape:
        forms = [f"{tensor.dtype}{tuple(tensor.shape)}" for tensor in (expected, got)]
        return f"expected {forms[0]}, got {forms[1]}"
    one, other = expected.flatten().double(), got.flatten().double()
    differing = torch.nonzero((one != other) & ~(one.isnan() & other.isnan())).flatten()
    if not differing.numel():
        return f"the bits differ: expected {show(expected)}, got {show(got)}"
    gaps = (one - other).abs()[differing]
    worst = int(differing[gaps.nan_to_num(torch.inf).argmax()])
    at = [int(index) for index in torch.unravel_index(torch.tensor(worst), expected.shape)]
    values = expected.flatten()[worst].item(), got.flatten()[worst].item()
    return (
        f"{differing.numel()} of {one.numel()} elements differ, most at {at}: expected {values[0]!r}, got {values[1]!r}"
    )


def decoded(answers: Sequence[Record]) -> list[list[Any]]:
    """The observations of all ranks, decoded."""
    return [[decode(observation) for observation in answer["observations"]] for answer in answers]


class Registry:
    """All clauses by id, sorted by family and number."""

    def __init__(self) -> None:
        self._clauses: dict[str, Clause] = {}

    def add(self, cls: type[Clause]) -> type[Clause]:
        """Register a clause class."""
        if cls.id in self._clauses:
            raise ValueError(f"Registry.add: two clauses have the id {cls.id}")
        self._clauses[cls.id] = cls()
        return cls

    def __iter__(self) -> Iterator[Clause]:
        return iter(sorted(self._clauses.values(), key=attrgetter("family", "number")))

    def __getitem__(self, clause_id: str) -> Clause:
        return self._clauses[clause_id]

    @cached_property
    def ids(self) -> list[str]:
        return [clause.id for clause in self]


CONTRACT = Registry()
