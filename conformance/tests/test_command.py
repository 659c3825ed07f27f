"""The command `lightrft-conformance` and the pytest plugin, also where a clone of LightRFT hides the suite."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


def test_help_imports_neither_torch_nor_the_contract() -> None:
    code = (
        "import sys, atexit; from lightrft.conformance.cli import app\n"
        "atexit.register(lambda: print({'torch', 'hypothesis', 'rich', 'lightrft.conformance.contract'} & set(sys.modules)))\n"
        "app(['--help'], prog_name='lightrft-conformance')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *help_lines, imported = done.stdout.splitlines()
    assert imported == "set()"
    assert any(line.split()[:1] == ["run-engine"] for line in help_lines)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """As a clone of LightRFT hides the namespace: a package `lightrft` with an ``__init__.py``."""
    files = {"lightrft/__init__.py": "", "lightrft/trainer/__init__.py": "", "test_own.py": "def test_own(): pass\n"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def _run_in(clone: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(clone)}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=clone, env=environment)


def test_a_clone_that_hides_the_suite_is_named_with_the_remedy(clone: Path) -> None:
    done = _run_in(clone, Path(sys.executable).with_name("lightrft-conformance"), "clauses")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"lightrft-conformance: the clone of LightRFT in {clone} hides the packages of this layer. "
        f"Run: lightrft adopt {clone}\n"
    )


def test_pytest_runs_in_a_clone_without_the_plugin(clone: Path) -> None:
    done = _run_in(clone, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_own.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"lightrft-conformance is inactive: the clone of LightRFT in {clone}" in done.stdout
    assert "1 passed" in done.stdout


def test_pytest_has_the_options_of_the_plugin(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--help"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "--strategy-set=NAME=VALUE" in done.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_is_one_line_and_reports_what_was_judged(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    report = tmp_path / "report.json"
    program = Path(sys.executable).with_name("lightrft-conformance")
    with subprocess.Popen(
        [program, "run", "fake", "--profile=smoke", f"--report={report}"], cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as command:  # fmt: skip
        assert command.stdout is not None
        command.stdout.readline()
        command.send_signal(number)
        printed, errors = command.communicate(timeout=60)
    shown = 1 + len(printed.splitlines())
    written = json.loads(report.read_text(encoding="utf-8"))
    assert command.returncode == code
    assert errors == (
        f"lightrft-conformance: interrupted by {number.name}; fake {written['unjudged']}; their report is {report}\n"
    )
    judged = len(written["clauses"])
    assert judged - shown in (0, 1)  # the signal may come between a verdict and its line
    assert written["unjudged"].startswith(f"was interrupted after {judged} of ")
    assert written["exit_code"] == 2
