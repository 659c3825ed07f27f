"""A certificate: what the reports of one strategy or engine say together.

Imports neither torch nor the contract, so it can show reports of other versions and machines.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from lightrft.conformance.families import by_family

SCHEMA_FILE: Final = Path(__file__).parents[1] / "certificate.schema.json"
"""The JSON schema of a certificate."""
Verdict = Literal["certified", "checked", "not certified", "not judged"]
FAILED: Final = ("fail", "hang", "error")
WORST_FIRST: Final = ("error", "hang", "fail", "xfail", "pass", "skip")
"""Verdicts on a clause, the one that decides over several runs first."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, populate_by_name=True)


class Code(_Model):
    """Code that was judged, and where it comes from."""

    class_name: str = Field("", alias="class")
    digest: str = ""
    """SHA-256 of the Python files of the packages that contain the class and its base classes."""
    distribution: str = ""
    version: str = ""
    requirements: dict[str, str] = {}
    """Installed versions of the distribution's requirements."""
    source: str = ""
    """Name and digest of the file, for code without a distribution."""


class Subject(Code):
    """The strategy that was judged, or that the engine was judged on."""

    name: str
    settings: dict[str, Any]
    capabilities: tuple[str, ...] = ()
    engine: Code | None = None


class Suite(_Model):
    """The suite that judged."""

    version: str
    digest: str
    """SHA-256 of its Python files."""
    contract: str
    """Version of the contract."""


class Environment(_Model):
    """Where and when a run took place."""

    date: str
    python: str
    platform: str
    processors: int
    gpus: int
    torch: str
    hypothesis: str


class Run(_Model):
    """One run of the suite."""

    world_size: int
    device: str
    profile: str
    seed: int
    selected: tuple[str, ...]
    """The clauses that were asked for by name; empty for the whole contract."""
    unjudged: str
    """Why the run gives no verdict; empty if it does."""
    environment: Environment
    reproduce: str
    """The command that repeats it."""


class Result(_Model):
    """The verdict of one run on one clause."""

    verdict: Literal["pass", "fail", "hang", "error", "skip", "xfail"]
    programs: int = Field(alias="examples")
    """Programs that ran."""
    drawn: int | None
    """How many of them were drawn; None if the clause draws none, or if a failure ended the search."""
    message: str
    reproduce: str
    """The command that repeats it."""


class Clause(_Model):
    """A clause, with its results by run. None for a run that did not judge it."""

    id: str
    level: Literal["MUST", "SHOULD"]
    text: str
    results: tuple[Result | None, ...]

    @property
    def verdict(self) -> str:
        """The verdict over all runs."""
        verdicts = {result.verdict for result in self.results if result is not None}
        return next(verdict for verdict in WORST_FIRST if verdict in verdicts)


class Certificate(_Model):
    """What the reports of one strategy or engine say together."""

    format: Literal[1] = 1
    verdict: Verdict
    headline: str
    """The verdict in one line, with what it is based on."""
    subject: Subject
    suite: Suite
    runs: tuple[Run, ...]
    """By device, then by world size."""
    clauses: tuple[Clause, ...]

    @property
    def title(self) -> str:
        """What was judged."""
        settings = ", ".join(f"{name}={value}" for name, value in self.subject.settings.items())
        name = self.subject.name + (f" ({settings})" if settings else "")
        engine = self.subject.engine
        return name if engine is None else f"{engine.class_name.rpartition('.')[2]} on {name}"

    @property
    def families(self) -> dict[str, list[Clause]]:
        """Clauses by the title of their family."""
        return by_family(self.clauses, lambda clause: clause.id)

    @property
    def basis(self) -> str:
        """How the clauses were tested."""
        drawing = sum(any(result is not None and result.drawn for result in clause.results) for clause in self.clauses)
        text = f"{sum(counts['programs'] for counts in self.counts)} programs ran. Each clause is tested with its pinned programs"
        if drawing:
            text += f"; for {drawing} of {len(self.clauses)} clauses, up to {most_drawn(self.clauses)} more are drawn"
        return f"{text}."

    @property
    def counts(self) -> list[Counter[str]]:
        """By run: how many clauses got which verdict, how many of these are failures, and how many programs ran."""
        return [
            _counts([result for clause in self.clauses if (result := clause.results[index]) is not None])
            for index in range(len(self.runs))
        ]

    def remarks(self, *verdicts: str) -> list[tuple[str, str, list[str]]]:
        """Messages of results with these verdicts: the first line, the runs it is about, and the clauses."""
        found = [
            (result.message.splitlines()[0], run_name(run), clause.id)
            for clause in self.clauses
            for run, result in zip(self.runs, clause.results, strict=True)
            if result is not None and result.verdict in verdicts and result.message
        ]
        by_clauses: dict[tuple[str, str], list[str]] = {}
        for message, run, clause_id in found:
            by_clauses.setdefault((message, run), []).append(clause_id)
        merged: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for (message, run), ids in by_clauses.items():
            merged.setdefault((message, tuple(ids)), []).append(run)
        return [(message, "; ".join(runs), list(ids)) for (message, ids), runs in merged.items()]


def _counts(results: Sequence[Result]) -> Counter[str]:
    verdicts = Counter[str](result.verdict for result in results)
    verdicts.update(
        programs=sum(result.programs for result in results), failures=sum(verdicts[name] for name in FAILED)
    )
    return verdicts


def run_name(run: Run) -> str:
    """A short name of a run: ``world size 2, cpu``."""
    return f"world size {run.world_size}, {run.device}"


def most_drawn(clauses: Sequence[Clause]) -> int:
    """The most programs that were drawn for a clause, in the run that drew the fewest."""
    runs = zip(*(clause.results for clause in clauses), strict=True)
    return min((max((result.drawn or 0 for result in run if result is not None), default=0) for run in runs), default=0)


def schema() -> str:
    """The JSON schema of a certificate, as text."""
    described = Certificate.model_json_schema(by_alias=True, mode="serialization")
    draft = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "LightRFT conformance certificate"}
    return json.dumps({**described, **draft}, indent=1) + "\n"
