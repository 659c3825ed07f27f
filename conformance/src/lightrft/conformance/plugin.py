"""The pytest plugin: ``pytest --pyargs lightrft.conformance --strategy NAME`` runs one test per clause."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lightrft.conformance.profiles import PROFILES


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the command ``lightrft-conformance run``."""
    group = parser.getgroup("lightrft-conformance")
    group.addoption("--strategy", help="strategy to certify: a registered name, or module:attribute")
    group.addoption("--world-size", type=int, default=1, help="number of ranks")
    group.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="device of the models")
    group.addoption("--profile", default="ci", choices=list(PROFILES), help="how many programs to draw")
    group.addoption("--strategy-seed", type=int, default=0, help="seed for drawing programs")
    group.addoption(
        "--strategy-set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the strategy; may be repeated",
    )
    group.addoption("--expected-failures", type=Path, help="TOML file of expected failures")
    group.addoption("--conformance-report", type=Path, help="write a JSON report to this file")


@pytest.fixture(scope="session")
def certification(request: pytest.FixtureRequest) -> "Iterator[object]":
    """The running certification, with its workers and results."""
    from lightrft.conformance.certification import Certification, Report, in_order
    from lightrft.conformance.contract import CONTRACT
    from lightrft.conformance.judge import Unjudgeable
    from lightrft.conformance.requests import Request, impossible, setting

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
    problem = impossible(asked)
    if problem:
        pytest.exit(f"could not be judged: {problem}", returncode=2)
    with Certification(asked) as running:
        try:
            running.open()
        except Unjudgeable as error:
            pytest.exit(f"could not be judged: {error}", returncode=2)
        yield running
        path = option("--conformance-report")
        if path is not None:
            judged = [result.id for result in in_order(running.results)]
            partly = () if len(judged) == len(CONTRACT.ids) else judged
            asked = replace(asked, clauses=partly)
            report = Report(request=asked, identity=running.identity, results=in_order(running.results))
            path.write_text(json.dumps(report.to_json(), indent=1), encoding="utf-8")
