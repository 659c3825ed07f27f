"""However a strategy misuses its process, the run ends with a verdict and a clear message."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightrft.conformance import cli
from lightrft.conformance.certification import Certification, certify
from lightrft.conformance.cli import app
from lightrft.conformance.contract import CONTRACT
from lightrft.conformance.driver import worker_group
from lightrft.conformance.driver.worker_group import WorkerGroup
from lightrft.conformance.judge import ClauseResult, Unjudgeable
from lightrft.conformance.requests import Request, impossible
from lightrft.conformance.saboteurs import runner

HERE = {"PYTHONPATH": str(Path(__file__).parent)}


@pytest.fixture(scope="module")
def group() -> Iterator[WorkerGroup]:
    with WorkerGroup(1, ranks=False, environment=HERE) as running:
        yield running


def judged(group: WorkerGroup, strategy: str, clause: str = "OPT-1") -> ClauseResult:
    certification = Certification(Request(strategy=strategy, profile="smoke"))
    certification.open(group)
    return certification.judge(CONTRACT[clause])


@pytest.mark.parametrize("name", ["Forks", "PrintsAMillionLines", "ChangesDirectory", "ReadsStandardInput"])
def test_bad_manners_of_a_strategy_are_no_defect(group: WorkerGroup, name: str) -> None:
    result = judged(group, f"odd_strategies:{name}")
    assert result.verdict == "pass", result.message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ExitsInAStep", "rank 0 exited with status 5; last output: leaving"),
        ("KillsItself", "rank 0 was killed by SIGKILL"),
        ("ReturnsAnOddNorm", "expected numbers, text, tensors"),
        ("ClosesEveryFile", "connection"),
        ("RaisesNoUnicode", "not a character: \\udcff"),
        ("RaisesWithoutWords", "no message: str() raised RuntimeError"),
        ("ReturnsNoStepResult", "a call returned something of the wrong type"),
        ("FlattensParameters", "expected the shape"),
    ],
)
def test_an_exception_that_ends_a_program_is_a_failure_with_a_message(
    group: WorkerGroup, name: str, words: str
) -> None:
    result = judged(group, f"odd_strategies:{name}")
    assert result.verdict == "fail"
    assert words in result.message
    assert "Traceback" not in result.message.splitlines()[0]


def test_a_step_that_never_ends_is_a_hang_and_the_stack_says_where(
    group: WorkerGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = WorkerGroup.run
    monkeypatch.setattr(
        WorkerGroup, "run", lambda self, command, seconds, *more: send(self, command, min(seconds, 3.0), *more)
    )
    result = judged(group, "odd_strategies:Hangs")
    assert result.verdict == "hang"
    assert "odd_strategies.py" in result.message and "in reduce" in result.message


def test_an_error_on_one_rank_is_the_verdict_before_the_others_miss_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_group, "GRACE_SECONDS", 1.0)
    with WorkerGroup(2, environment=HERE) as group:
        certification = Certification(Request(strategy="odd_strategies:ReturnsNoStepResultOnRank1", world=2))
        certification.open(group)
        result = certification.judge(CONTRACT["OPT-1"])
    assert result.verdict == "fail"
    assert "rank 1: step raised AttributeError" in result.message and "while rank 0 waited" in result.message
    assert result.examples == 1


def test_a_missing_package_is_no_verdict_and_says_how_to_install_it(group: WorkerGroup) -> None:
    result = judged(group, "odd_strategies:LacksAPackage")
    assert result.verdict == "error"
    assert "pip install 'a_package_that_nobody_has'" in result.message


def test_a_strategy_of_one_process_is_not_judged_on_two_ranks() -> None:
    report = certify(Request(strategy="fake", world=2, clauses=("LIFE-2",)))
    assert report.exit_code == 2
    assert "expected world size 1, because fake is one process, got 2" in report.unjudged
    assert "\n" not in report.unjudged
    assert not report.results


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("odd_strategies:CannotBeMade", "no accelerator of the right colour"),
        ("odd_strategies:ExitsWhenMade", "exited with status 4; last output: out of licences"),
        ("odd_strategies:NoStrategy", "expected a subclass of StrategyBase"),
        ("odd_strategies:Nothing", "odd_strategies:Nothing does not exist"),
        ("cannot_be_imported:Any", "No module named 'a_package_that_nobody_has'"),
        ("ends_when_imported:Any", "exited with status 6"),
        ("no_such_module:Any", "No module named 'no_such_module'"),
        ("fakee", "did you mean 'fake'"),
    ],
)
def test_a_strategy_that_cannot_be_created_is_not_judged_and_the_reason_is_given(
    group: WorkerGroup, target: str, words: str
) -> None:
    with pytest.raises(Unjudgeable, match=words.replace("'", ".")):
        judged(group, target)


def command(*arguments: str, **options: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "lightrft.conformance.cli", *arguments],
        capture_output=True, text=True, timeout=300, env={**os.environ, **HERE}, check=False, **options,  # type: ignore[call-overload]
    )  # fmt: skip


def no_room() -> None:
    """Let no file grow: what a full disk does to whoever writes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def test_a_full_disk_changes_no_verdict() -> None:
    done = command("run", "fake", "--profile=smoke", "--clause=OPT-1", "--clause=OPT-2", preexec_fn=no_room)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 pass" in done.stdout


def test_a_report_that_cannot_be_written_says_so() -> None:
    done = command("run", "fake", "--profile=smoke", "--clause=LIFE-2", "--report=/dev/full")
    assert done.returncode == 2
    assert done.stderr == "lightrft-conformance run: cannot write the report to /dev/full: No space left on device\n"


UNJUDGEABLE = {
    "run nosuch": "nosuch could not be judged: there is no strategy 'nosuch'; registered names: ",
    "run cannot_be_imported:Any": "No module named 'a_package_that_nobody_has'",
    "run os:getcwd": "os:getcwd could not be judged: strategy 'os:getcwd': expected a subclass of StrategyBase",
    "run odd_strategies:CannotBeMade": "judged: rank 0: the strategy cannot be created: ValueError: there is no accelerator",
    "run fake --world-size 2": "expected world size 1, because fake is one process, got 2. Use --world-size 1",
    "run fake --set strategy=fsdp": "--set: expected a setting that has no option of its own, got strategy=fsdp. Use the ",
    "run fake --set device=cuda": "--set: expected a setting that has no option of its own, got device=cuda. Use --device",
    "run fake --clause NO-1": "unknown clauses: NO-1; `lightrft-conformance clauses` lists them",
    "run fake --set nosuch=1": "fake could not be judged: StrategyConfig: 'nosuch' is not a setting",
    "run-engine nosuch": "nosuch could not be judged: there is no engine 'nosuch'; registered names: fake",
}


@pytest.mark.parametrize("line", UNJUDGEABLE)
def test_what_cannot_be_judged_is_one_line_on_stderr_and_exit_code_2(line: str) -> None:
    done = command(*line.split(), "--profile=smoke")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"lightrft-conformance {line.split()[0]}: ") and UNJUDGEABLE[line] in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_setting_without_a_value_is_exit_code_2() -> None:
    done = command("run", "fake", "--set=bf16")
    assert done.returncode == 2
    assert "NAME=VALUE" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("run", "'strategies'"),
        ("runs", "'runs'"),
        ("run fake --profile long", "smoke, ci, certify, nightly, got 'long'"),
        ("run fake --device tpu", "cpu or cuda, got 'tpu'"),
        ("run fake --world-size two", "'--world-size'"),
        ("run fake --seed one", "'--seed'"),
        ("run fake --seed one", "got 'one'"),
        ("run fake --set bf16", "NAME=VALUE"),
        ("run fake --expected missing.toml", "missing.toml"),
        ("run fake --report missing/report.json", "missing/report.json"),
        ("run fake --report /proc/report.json", "expected a file that this user can write, got '/proc/report.json'"),
        ("certificate x.json --output /proc/x.md", "expected a file that this user can write, got '/proc/x.md'"),
        ("run-engine", "'engine'"),
        ("certificate missing.json", "missing.json"),
        (f"certificate {__file__}", "expected a report"),
        ("saboteurs --profile long", "got 'long'"),
        ("saboteurs --only Nobody", "Nobody"),
    ],
)
def test_an_invalid_command_line_is_one_line_and_exit_code_2(
    line: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        app(line.split())
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.err.count("\n") == 1 and words in printed.err
    assert not printed.out


def test_several_strategies_give_a_list_of_reports_and_no_common_certificate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    with pytest.raises(SystemExit) as ended:
        app(["run", "fake", "nobody:Nothing", "--profile=smoke", "--clause=LIFE-2", f"--report={report}"])
    assert ended.value.code == 2
    assert [one["strategy"]["name"] for one in json.loads(report.read_text())] == ["fake", "nobody:Nothing"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        app(["certificate", str(report)])
    printed = capsys.readouterr()
    assert ended.value.code == 2 and not printed.out
    assert printed.err.count("\n") == 1 and "different strategies: fake" in printed.err


def test_a_file_of_expected_failures_that_cannot_be_read_is_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "expected.toml").write_text("not toml [")
    done = command("run", "fake", f"--expected={tmp_path / 'expected.toml'}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "cannot read the file of expected failures" in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("run fsdp --world-size 0", "expected 1 to 256 ranks, which all run on this machine, got 0"),
        ("run fsdp --world-size 257", "expected 1 to 256 ranks, which all run on this machine, got 257"),
        ("run-engine fake --world-size 257", "expected 1 to 256 ranks, which all run on this machine, got 257"),
        ("run fake --jobs 257", "expected 1 to 256 processes, got 257"),
        ("run fsdp --world-size 129 --jobs 2", "expected at most 256 processes, got --jobs 2 with --world-size 129"),
        ("saboteurs --jobs 257", "expected 1 to 256 processes, got 257"),
        ("saboteurs --seeds 0", "expected at least one seed, got 0"),
        ("saboteurs --seed=-1", "expected a number from 0, got -1"),
        ("run fake --seed=-1", "expected a number from 0, got -1"),
    ],
)
def test_a_number_out_of_range_is_refused_before_anything_starts(
    line: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*args: object, **more: object) -> None:
        raise AssertionError("the command would have started processes")

    monkeypatch.setattr(cli, "_run", start)
    monkeypatch.setattr(runner, "run_corpus", start)
    with pytest.raises(SystemExit) as ended:
        app(line.split())
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (2, "")
    assert printed.err.count("\n") == 1 and words in printed.err


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (
            Request(strategy="some:Strategy", world=257),
            "expected a world size from 1 to 256, because all ranks run here, got 257",
        ),
        (Request(strategy="fake", world=2), "expected world size 1, because fake is one process, got 2"),
        (Request(strategy="fake", seed=-1), "expected a seed from 0, got -1"),
        (Request(strategy="fake", world=1), ""),
        (Request(strategy="some:Strategy", world=256), ""),
    ],
)
def test_a_request_is_refused_for_its_numbers(request_: Request, words: str) -> None:
    assert impossible(request_).startswith(words) and bool(impossible(request_)) == bool(words)
