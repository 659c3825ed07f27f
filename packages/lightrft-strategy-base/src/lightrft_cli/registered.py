"""`lightrft strategies` and `lightrft engines`: registered names, their packages, and whether they can be imported."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from lightrft_cli.errors import require_our_packages
from lightrft_cli.output import Json, Row, print_rows


@dataclass(frozen=True)
class Registered:
    """A strategy or an engine that is installed, or that this project provides."""

    name: str
    package: str
    version: str
    """"" if its package is not installed."""
    problem: str = ""
    """Why it cannot be used; "" if it can."""
    broken: bool = False
    """Whether everything that it needs is installed, but it cannot be used."""
    remedy: str = ""
    """The command that installs what it needs."""

    @property
    def row(self) -> Row:
        """As one row of the listing."""
        return {
            "name": self.name, "package": self.package, "version": self.version,
            "status": self.problem or "importable", "install": self.remedy,
        }  # fmt: skip


def strategies(as_json: Json = False) -> None:
    """List the registered strategies.

    Shows the package, the version, and whether each can be imported, which is tried in a separate process."""
    require_our_packages()
    from lightrft.config.packages import STRATEGIES

    print_rows([each.row for each in registered(STRATEGIES)], as_json=as_json)


def engines(as_json: Json = False) -> None:
    """List the registered rollout engines.

    Shows the package, the version, and whether each can be imported, which is tried in a separate process."""
    require_our_packages()
    from lightrft.config.packages import ENGINES

    print_rows([each.row for each in registered(ENGINES)], as_json=as_json)


def registered(group: str) -> list[Registered]:
    """Return everything that is registered in ``group`` or that this project provides for it, sorted by name.

    Args:
        group: A group of entry points, `lightrft.config.packages.STRATEGIES` or ``ENGINES``.
    """
    from lightrft.config.packages import PACKAGES
    from lightrft_cli.imports import import_errors
    from lightrft_cli.requirements import installed_version, missing_for

    points = {point.name: point for point in entry_points(group=group)}
    known = {name: requirement for (of, name), requirement in PACKAGES.items() if of == group}
    requirements = {name: _package(point) for name, point in points.items()} | known
    missing = {name: missing_for(requirement) for name, requirement in requirements.items()}
    problems = {name: "; ".join(unmet.reason for unmet in missing[name]) for name in requirements}
    ready = [name for name in points if not missing[name]]
    for name, error in zip(ready, import_errors([points[name] for name in ready]), strict=True):
        problems[name] = f"cannot be imported: {error}" if error else ""
    return [
        Registered(
            name=name,
            package=requirement.partition("[")[0],
            version=installed_version(requirement.partition("[")[0]),
            problem=problems[name],
            broken=bool(problems[name]) and all(unmet.installed for unmet in missing[name]),
            remedy=f"pip install '{requirement}'" if problems[name] else "",
        )
        for name, requirement in sorted(requirements.items())
    ]


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value.partition(".")[0]
