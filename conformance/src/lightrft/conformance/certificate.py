"""Certificates: what the reports of one strategy or engine say together, as data, Markdown, HTML and a badge.

Reads reports only, and imports neither torch nor the contract, so it can show reports of other versions and machines.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import jinja2
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from lightrft.conformance.families import by_family

SCHEMA_FILE: Final = Path(__file__).with_name("certificate.schema.json")
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


# Building


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
    except ValueError as error:
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
    programs = f"up to {drawn} programs drawn a clause" if drawn else "pinned programs only"
    return f"profile{'s' if len(profiles) > 1 else ''} {_listed(profiles)}, {programs}"


def most_drawn(clauses: Sequence[Clause]) -> int:
    """The most programs that were drawn for a clause, in the run that drew the fewest."""
    runs = zip(*(clause.results for clause in clauses), strict=True)
    return min((max((result.drawn or 0 for result in run if result is not None), default=0) for run in runs), default=0)


def _listed(items: Iterable[object]) -> str:
    words = list(map(str, items))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


# Rendering


def markdown_text(text: str) -> str:
    """One line of Markdown, also for cells of tables, without HTML, links and images; code and emphasis stay."""
    return re.sub(r"[&<|\\]|(?<=\])[(\[]", lambda match: f"&#{ord(match[0])};", " ".join(text.split()))


class _Markdown(str):
    """Text that is Markdown already."""


def _code(text: str) -> _Markdown:
    """A code span, also for cells of tables."""
    fence = "`" * (1 + _longest_fence(text))
    padding = " " if len(fence) > 1 else ""
    return _Markdown(f"{fence}{padding}{' '.join(text.split()).replace('|', chr(92) + '|')}{padding}{fence}")


def _code_block(lines: Iterable[str]) -> _Markdown:
    text = "\n".join(lines)
    fence = "`" * max(3, 1 + _longest_fence(text))
    return _Markdown(f"{fence}\n{text}\n{fence}")


def _longest_fence(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _finalized(value: object) -> object:
    """Escape what a template of Markdown inserts, except the results of filters for code."""
    return value if isinstance(value, _Markdown) else markdown_text(str(value))


_NO_TEXT: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Control characters and others that XML and HTML cannot contain, not even escaped."""


def _rendered(template: str, certificate: Certificate) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lightrft.conformance"),
        autoescape=not template.endswith(".md"),
        finalize=_finalized if template.endswith(".md") else None,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"code": _code, "code_block": _code_block, "run_name": run_name, "text_width": _text_width}
    text = environment.get_template(template).render(
        certificate=certificate,
        badge=badge_text(certificate),
        origin=_origin,
        failed=certificate.remarks(*FAILED),
        expected=certificate.remarks("xfail"),
        notes=certificate.remarks("skip", "pass"),
    )
    return _NO_TEXT.sub("", text)


def _origin(code: Code) -> str:
    """The distribution and its version, or the source file of code without a distribution."""
    if not code.distribution:
        return f"no distribution; {code.source or 'unknown source'}"
    needs = ", ".join(f"{name} {version}" for name, version in code.requirements.items())
    return f"{code.distribution} {code.version}" + (f" (with {needs})" if needs else "")


def badge_text(certificate: Certificate) -> str:
    """The right half of the badge."""
    worlds = sorted({run.world_size for run in certificate.runs})
    devices = sorted({run.device for run in certificate.runs} - {"cpu"})
    exceptions = sum(clause.verdict == "xfail" for clause in certificate.clauses)
    verdict = f"LightRFT {certificate.verdict}"
    if exceptions and certificate.verdict in ("certified", "checked"):
        verdict += f", {exceptions} exception{'s' if exceptions > 1 else ''}"
    return " · ".join([verdict, f"{'rank' if worlds == [1] else 'ranks'} {', '.join(map(str, worlds))}", *devices])


def _text_width(text: str) -> int:
    """The approximate width of ``text`` in 11 px Verdana, to which the badge stretches it."""
    return round(sum(3.9 if character in "ijl,.:|()[]'· tfr" else 7.0 for character in text))


FORMATS: Final[dict[str, Callable[[Certificate], str]]] = {
    ".md": partial(_rendered, "certificate.md"),
    ".html": partial(_rendered, "certificate.html"),
    ".svg": partial(_rendered, "badge.svg"),
    ".json": lambda certificate: certificate.model_dump_json(indent=1, by_alias=True) + "\n",
}
"""Renders a certificate, by the suffix of the file."""


def schema() -> str:
    """The JSON schema of a certificate, as text."""
    described = Certificate.model_json_schema(by_alias=True, mode="serialization")
    draft = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "LightRFT conformance certificate"}
    return json.dumps({**described, **draft}, indent=1) + "\n"
