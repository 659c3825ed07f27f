"""Reads reports and certificates, and makes a certificate of reports."""

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from lightrft.conformance.certificates.certificate import (
    FAILED,
    Certificate,
    Clause,
    Code,
    Result,
    Run,
    Subject,
    Suite,
    Verdict,
    most_drawn,
    run_name,
)


class _Report(Run):
    """A report of `lightrft-conformance run` or ``run-engine``."""

    suite: str
    suite_digest: str
    contract: str
    strategy: Subject
    exit_code: int
    clauses: tuple["_ReportClause", ...]


class _ReportClause(Result):
    id: str
    level: Literal["MUST", "SHOULD"]
    text: str


def _as_list(content: object) -> object:
    return content if isinstance(content, list) else [content]


_REPORTS: TypeAdapter[list[_Report]] = TypeAdapter(Annotated[list[_Report], BeforeValidator(_as_list)])


def read(file: Path) -> Certificate:
    """Read a certificate. Raises ValueError if ``file`` cannot be read or is not a certificate in JSON."""
    return _parsed(TypeAdapter(Certificate), file, "a certificate in JSON", "Make it with --output NAME.json")


def combine(files: Sequence[Path]) -> Certificate:
    """Make the certificate of the reports in ``files``.

    Args:
        files: Reports, or lists of reports, of one strategy or engine at different world sizes or on different devices.

    Returns:
        The certificate.

    Raises:
        ValueError: A file cannot be read or is not a report, or the reports do not belong together.
    """
    reports = sorted(
        (report for file in files for report in _reports(file)), key=lambda report: (report.device, report.world_size)
    )
    if not reports:
        raise ValueError(f"expected at least one report, got none in {', '.join(map(str, files))}. Run the suite again")
    identified = [report for report in reports if report.strategy.digest]
    """A strategy that cannot be created has only a name."""
    _require_same("strategies", reports, lambda report: report.strategy.name)
    _require_same("settings", reports, lambda report: report.strategy.settings)
    _require_same("suite digests", reports, lambda report: report.suite_digest)
    _require_same("engines", identified, lambda report: getattr(report.strategy.engine, "class_name", None))
    _require_same("code digests", identified, lambda report: [code.digest for code in _codes(report)])
    _require_same("versions", identified, _versions)
    for run, same in groupby(reports, run_name):
        if len(list(same)) > 1:
            raise ValueError(f"expected one report for each run, got several of {run}. Leave out all but one")
    clauses = _clauses(reports)
    verdict = _verdict(reports)
    return Certificate(
        verdict=verdict,
        headline=_headline(verdict, reports, clauses),
        subject=(identified or reports)[0].strategy,
        suite=Suite(version=reports[0].suite, digest=reports[0].suite_digest, contract=reports[0].contract),
        runs=tuple(Run(**{name: getattr(report, name) for name in Run.model_fields}) for report in reports),
        clauses=clauses,
    )


def _reports(file: Path) -> list[_Report]:
    return _parsed(_REPORTS, file, "a report of lightrft-conformance", "Run the suite again")


Content = TypeVar("Content")


def _parsed(model: TypeAdapter[Content], file: Path, kind: str, remedy: str) -> Content:
    try:
        return model.validate_python(json.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        detail = error.errors()[0]
        names = detail["loc"][1:] if model is _REPORTS else detail["loc"]
        where = ".".join(map(str, names)) or "the file"
        reason = f"{where}: {detail['msg'].lower()}"
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, RecursionError) as error:
        reason = f"not valid JSON: {error}"
    raise ValueError(f"expected {kind}, got {file}: {reason}. {remedy}")


def _codes(report: _Report) -> list[Code]:
    """The strategy, and the engine if one was judged."""
    return [code for code in (report.strategy, report.strategy.engine) if code is not None]


def _versions(report: _Report) -> dict[str, str]:
    """Versions of the judged distributions and of their requirements, without what names a build, such as ``+cpu``."""
    versions = {
        name: version
        for code in _codes(report)
        for name, version in ({code.distribution: code.version} | code.requirements).items()
    }
    return {name: version.partition("+")[0] for name, version in versions.items()}


def _require_same(what: str, reports: Sequence[_Report], value_of: Callable[[_Report], object]) -> None:
    for report in reports[1:]:
        expected, got = _where_different(value_of(reports[0]), value_of(report))
        if expected != got:
            raise ValueError(
                f"expected reports of one strategy and suite, got different {what}: {expected} at {run_name(reports[0])}, "
                f"and {got} at {run_name(report)}. Run the suite again for one of them"
            )


def _where_different(first: object, second: object) -> tuple[object, object]:
    """Both values; of dicts, only the items that differ."""
    if not isinstance(first, dict) or not isinstance(second, dict):
        return first, second
    names = [name for name in first | second if first.get(name) != second.get(name)]
    return {name: first.get(name) for name in names}, {name: second.get(name) for name in names}


def _clauses(reports: Sequence[_Report]) -> tuple[Clause, ...]:
    by_id = [{clause.id: clause for clause in report.clauses} for report in reports]
    every = {clause.id: clause for report in reports for clause in report.clauses}
    return tuple(
        Clause(
            id=clause.id, level=clause.level, text=clause.text, results=tuple(_result(run.get(clause.id)) for run in by_id)
        )
        for clause in every.values()
    )  # fmt: skip


def _result(clause: _ReportClause | None) -> Result | None:
    return None if clause is None else Result(**{name: getattr(clause, name) for name in Result.model_fields})


def _verdict(reports: Sequence[_Report]) -> Verdict:
    if any(report.exit_code == 2 for report in reports):
        return "not judged"
    if any(report.exit_code for report in reports):
        return "not certified"
    if not all(map(_judged, reports)):
        return "not judged"
    partly = any(report.profile == "smoke" or report.selected for report in reports)
    return "checked" if partly else "certified"


def _judged(report: _Report) -> bool:
    """Whether the run judged any clause: whether there is one that it did not skip."""
    return any(clause.verdict != "skip" for clause in report.clauses)


def _headline(verdict: Verdict, reports: Sequence[_Report], clauses: Sequence[Clause]) -> str:
    runs = " and ".join(
        f"world size{'s' if len(on) > 1 else ''} {_listed(report.world_size for report in on)}"
        + (f" on {device}" if device != "cpu" else "")
        for device, on in ((device, list(on)) for device, on in groupby(reports, lambda report: report.device))
    )
    failed = [clause.id for clause in clauses if clause.verdict in FAILED and clause.level == "MUST"]
    if verdict == "not judged":
        return f"Could not be judged: {_reason(reports, clauses)}"
    if verdict == "not certified":
        return f"Not certified: {runs}, {_listed(failed)} {'does' if len(failed) == 1 else 'do'} not hold"
    parts = [f"{verdict.capitalize()}: {runs}", _how_much(reports, clauses)]
    expected = [clause.id for clause in clauses if clause.verdict == "xfail"]
    parts += [f"except {_listed(expected)}, expected to fail"] if expected else []
    return ", ".join(parts)


def _reason(reports: Sequence[_Report], clauses: Sequence[Clause]) -> str:
    """Why there is no verdict."""
    unjudged = next((report.unjudged.strip() for report in reports if report.unjudged.strip()), "")
    errors = [clause.id for clause in clauses if clause.verdict == "error"]
    if unjudged or errors:
        return unjudged.partition("\n")[0] or _listed(errors)
    return f"no clause was judged at {_listed(run_name(report) for report in reports if not _judged(report))}"


def _how_much(reports: Sequence[_Report], clauses: Sequence[Clause]) -> str:
    """What the verdict is based on: clauses, profile and programs."""
    selected = {clause for report in reports for clause in report.selected}
    if selected:
        return f"only {_listed(sorted(selected))}"
    profiles = sorted({report.profile for report in reports})
    drawn = most_drawn(clauses)
    programs = f"up to {drawn} programs drawn per clause" if drawn else "pinned programs only"
    return f"profile{'s' if len(profiles) > 1 else ''} {_listed(profiles)}, {programs}"


def _listed(items: Iterable[object]) -> str:
    words = list(map(str, items))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""
