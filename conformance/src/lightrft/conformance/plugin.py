"""The pytest plugin: ``pytest --pyargs lightrft.conformance --strategy NAME``, one node a clause."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightrft.conformance.profiles import PROFILES


def pytest_addoption(parser: pytest.Parser) -> None:
    """The same choices as on the command line of ``lightrft-conformance``."""
    group = parser.getgroup("lightrft-conformance")
    group.addoption("--strategy", help="strategy to judge: a registered name, or module:attribute")
    group.addoption("--world-size", type=int, default=1, help="ranks")
    group.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where models live")
    group.addoption("--profile", default="ci", choices=list(PROFILES), help="how many programs are drawn")
    group.addoption("--strategy-seed", type=int, default=0, help="seed of the programs that are drawn")
    group.addoption(
        "--strategy-set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the strategy"
    )
    group.addoption("--expected-failures", type=Path, help="TOML file of expected failures")
    group.addoption("--conformance-report", type=Path, help="write the outcome as JSON")


@pytest.fixture(scope="session")
def certification(request: pytest.FixtureRequest) -> "Iterator[object]":
    """The workers, and what they have judged so far."""
    from lightrft.conformance.certification import Certification, Report, Request, in_order, setting
    from lightrft.conformance.judge import Unjudgeable

    option = request.config.getoption
    asked = Request(
        strategy=option("--strategy"),
        world=option("--world-size"),
        device=option("--device"),
        profile=option("--profile"),
        seed=option("--strategy-seed"),
        settings=dict(map(setting, option("--strategy-set"))),
        expectations=option("--expected-failures"),
    )
    with Certification(asked) as running:
        try:
            running.open()
        except Unjudgeable as error:
            pytest.exit(f"could not be judged: {error}", returncode=2)
        yield running
        path = option("--conformance-report")
        if path is not None:
            report = Report(request=asked, identity=running.identity, results=in_order(running.results))
            path.write_text(json.dumps(report.to_json(), indent=1), encoding="utf-8")
