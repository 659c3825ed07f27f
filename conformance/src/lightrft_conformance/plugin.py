"""The entry point of the pytest plugin, which pytest imports in every run, also in a clone of LightRFT."""

from lightrft_cli.adoption import hiding_package

_HIDDEN = hiding_package()
pytest_plugins = [] if _HIDDEN else ["lightrft.conformance.plugin"]


def pytest_report_header() -> str | None:
    """Say why the options of the plugin are missing."""
    return f"lightrft-conformance is inactive: {_HIDDEN}" if _HIDDEN else None
