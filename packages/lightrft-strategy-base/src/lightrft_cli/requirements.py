"""Whether the requirements of installed packages are met."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions, version

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version


@dataclass(frozen=True)
class UnmetRequirement:
    """A requirement that the environment does not meet."""

    package: str
    """The distribution that has this requirement."""
    requirement: str
    installed: str
    """The installed version, or "" if there is none."""

    @property
    def reason(self) -> str:
        """What was expected, and what is installed."""
        got = f"got {self.installed}" if self.installed else "it is not installed"
        return f"expected {self.requirement}, {got}"

    @property
    def remedy(self) -> str:
        """The command that installs what is required."""
        return f"pip install '{self.requirement}'"


def installed_version(name: str) -> str:
    """Return the version of an installed distribution, or ""."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def our_packages() -> list[Distribution]:
    """Return the installed packages of this project by name; of two of one name on sys.path, the first is imported."""
    by_name: dict[str, Distribution] = {}
    for installed in distributions():
        name = (installed.metadata.get_all("Name") or [""])[0]  # none if a package was removed in part
        if name.startswith("lightrft-"):
            by_name.setdefault(name, installed)
    return [by_name[name] for name in sorted(by_name)]


def unmet_requirements(installed: Distribution, extra: str = "") -> list[UnmetRequirement]:
    """Return what ``installed`` requires and the environment does not have.

    Args:
        installed: A distribution.
        extra: Check the requirements of this extra; if "", those of the distribution without extras.
    """
    required = _requirements_of(installed, extra)
    return [unmet for requirement in required if (unmet := _unmet(installed.name, requirement)) is not None]


def extras_in_use(installed: Distribution) -> list[str]:
    """Return the extras of which all requirements are installed, in any version."""
    extras: list[str] = installed.metadata.get_all("Provides-Extra") or []
    return [
        extra
        for extra in extras
        if (required := list(_requirements_of(installed, extra)))
        and all(installed_version(requirement.name) for requirement in required)
    ]


def missing_for(requirement: str) -> list[UnmetRequirement]:
    """Return what is missing for ``requirement``, such as "lightrft-engines[vllm]".

    An extra may have variants for other hardware, such as vllm-cpu for vllm; one of them suffices.
    """
    wanted = Requirement(requirement)
    try:
        installed = distribution(wanted.name)
    except PackageNotFoundError:
        return [UnmetRequirement(package=wanted.name, requirement=requirement, installed="")]
    missing = unmet_requirements(installed)
    for extra in wanted.extras:
        variants = [name for name in extras_in_use(installed) if name == extra or name.startswith(f"{extra}-")]
        missing += unmet_requirements(installed, next(iter(variants), extra))
    return missing


def _requirements_of(installed: Distribution, extra: str) -> Iterator[Requirement]:
    for text in installed.requires or ():
        requirement = Requirement(text)
        marker = requirement.marker
        without_extra = marker is None or marker.evaluate({"extra": ""})
        with_extra = marker is None or marker.evaluate({"extra": extra})
        if with_extra and (not extra or not without_extra):
            yield requirement


def _unmet(package: str, requirement: Requirement) -> UnmetRequirement | None:
    installed = installed_version(requirement.name)
    if installed and _fits(requirement, installed):
        return None
    requirement.marker = None
    return UnmetRequirement(package=package, requirement=str(requirement), installed=installed)


def _fits(requirement: Requirement, installed: str) -> bool:
    try:
        return requirement.specifier.contains(Version(installed), prereleases=True)
    except InvalidVersion:  # a build with a non-standard version: assume that it fits
        return True
