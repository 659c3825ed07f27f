"""The driver with workers that misbehave."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from lightrft.conformance.driver.fork_server import ForkServer
from lightrft.conformance.driver.worker_group import RankReport, WorkerGroup, launch_fork_server

HERE = {"PYTHONPATH": str(Path(__file__).parent)}
SHORT, LONG = 0.5, 60.0


@pytest.fixture(scope="module")
def group() -> Iterator[WorkerGroup]:
    with WorkerGroup(2, worker="odd_worker", environment=HERE, preloaded=()) as running:
        yield running


def told(group: WorkerGroup, *what: str, seconds: float = LONG) -> list[RankReport]:
    return group.run({"do": what}, seconds)


def states(reports: list[RankReport]) -> list[str]:
    return [report.state for report in reports]


def all_answer(group: WorkerGroup) -> bool:
    return states(told(group, "answer", "answer")) == ["answered", "answered"]


def test_answers_are_in_rank_order_whoever_answers_first(group: WorkerGroup) -> None:
    reports = told(group, "be late", "answer")
    assert [report.answer["rank"] for report in reports] == [0, 1]


def test_an_answer_to_an_earlier_program_is_no_answer_to_this_one(group: WorkerGroup) -> None:
    reports = told(group, "answer the last program", "answer")
    assert [report.answer["rank"] for report in reports] == [0, 1]


def test_a_lost_message_is_a_hang_and_the_next_program_runs(group: WorkerGroup) -> None:
    assert states(told(group, "answer", "say nothing", seconds=SHORT)) == ["answered", "hung"]
    assert all_answer(group)


def test_the_stack_of_a_hung_rank_says_where_it_is(group: WorkerGroup) -> None:
    reports = told(group, "hang", "answer", seconds=SHORT)
    assert reports[0].state == "hung"
    assert "wait_forever" in reports[0].detail


def test_a_stopped_rank_is_a_hang_although_it_cannot_say_where(group: WorkerGroup) -> None:
    assert all_answer(group)
    os.kill(group.pids[1], signal.SIGSTOP)
    reports = told(group, "answer", "answer", seconds=SHORT)
    assert states(reports) == ["answered", "hung"]
    assert "does not respond" in reports[1].detail


def test_a_rank_that_exits_is_reported_at_once_with_its_output(group: WorkerGroup) -> None:
    began = time.monotonic()
    reports = told(group, "answer", "exit")
    assert states(reports) == ["answered", "died"]
    assert "exited with status 3; last output: these are my last words" in reports[1].detail
    assert time.monotonic() - began < LONG / 2


def test_a_worker_that_is_killed_between_two_programs_is_replaced(group: WorkerGroup) -> None:
    assert all_answer(group)
    before = group.pids
    os.kill(before[0], signal.SIGKILL)
    assert group._workers[0].process.ended(LONG)
    assert all_answer(group)
    assert not set(before) & set(group.pids)


def test_a_killed_worker_is_distinguished_from_one_that_exits(group: WorkerGroup) -> None:
    assert all_answer(group)
    with subprocess.Popen(["sh", "-c", f"sleep 0.2; kill -9 {group.pids[0]}"]):
        reports = told(group, "hang", "answer")
    assert reports[0].killed and "was killed by SIGKILL" in reports[0].detail
    assert not told(group, "exit", "answer")[0].killed


@pytest.mark.parametrize("what", ["send garbage", "send half"])
@pytest.mark.parametrize("other", ["answer", "be late"])
def test_an_invalid_message_ends_the_worker(group: WorkerGroup, what: str, other: str) -> None:
    assert all_answer(group)
    assert states(told(group, other, what, seconds=2.0)) == ["answered", "died"]
    assert all_answer(group)


def test_a_flood_of_output_neither_blocks_nor_is_kept(group: WorkerGroup) -> None:
    assert states(told(group, "print", "print")) == ["answered", "answered"]
    assert "the end" in group._workers[0].tail()
    assert len(group._workers[0].tail()) < 10_000


def test_a_worker_that_cannot_start_is_reported() -> None:
    with WorkerGroup(1, worker="no_such_worker", preloaded=()) as group:
        (report,) = group.run({"do": ["answer"]}, LONG)
    assert report.state == "died"
    assert "No module named no_such_worker" in report.detail


def test_closing_twice_is_closing_once() -> None:
    group = WorkerGroup(1, worker="odd_worker", environment=HERE, preloaded=())
    assert states(group.run({"do": ["answer"]}, LONG)) == ["answered"]
    group.close()
    group.close()


DRIVER = """
import sys, time
from lightrft.conformance.driver.worker_group import WorkerGroup
group = WorkerGroup(2, worker="odd_worker", preloaded=())
group.run({"do": ["write", "answer"]}, 60)
print(group._directory, *group.pids, flush=True)
group.run({"do": ["hang", "hang"]}, 3600)
"""


def test_a_killed_driver_leaves_no_worker_and_no_file() -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, env={**os.environ, **HERE})
    assert driver.stdout is not None
    with driver.stdout:
        directory, *ids = driver.stdout.readline().decode().split()
    written, pids = Path(directory), [int(pid) for pid in ids]
    assert written.exists() and len(pids) == 2 and all(map(running, pids))
    driver.kill()
    driver.wait()
    assert all_ended(pids) and comes_true(lambda: not written.exists())


IMPORTING = """
import os, sys
from pathlib import Path
from lightrft.conformance.driver.fork_server import ForkServer
server = ForkServer.launch(["sleeps_when_imported"], dict(os.environ), Path(sys.argv[1]))
print(server.pid, flush=True)
sys.stdin.read()
"""


def test_a_killed_driver_leaves_no_fork_server_that_still_imports(tmp_path: Path) -> None:
    module, written = tmp_path / "sleeps_when_imported.py", tmp_path / "directory"
    module.write_text(f"import pathlib, time; pathlib.Path({str(written)!r}).mkdir(); time.sleep({LONG})\n")
    driver = subprocess.Popen(
        [sys.executable, "-c", IMPORTING, str(written)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert driver.stdout is not None and driver.stdin is not None
    with driver.stdout, driver.stdin:
        pid = int(driver.stdout.readline())
        assert comes_true(written.exists) and running(pid)
        driver.kill()
        driver.wait()
    assert all_ended([pid]) and not written.exists()


POOL = """
import multiprocessing, sys, time
from lightrft.conformance.process_pool import process_pool
with process_pool(2) as pool:
    pool.submit(time.monotonic).result()
    calls = [pool.submit(time.sleep, 100) for _ in range(2)]
    print(*[process.pid for process in multiprocessing.active_children()], flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_pool_ends_with_its_command(number: signal.Signals) -> None:
    command = subprocess.Popen(
        [sys.executable, "-c", POOL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert command.stdout is not None and command.stdin is not None
    with command.stdout, command.stdin:
        pids = [int(pid) for pid in command.stdout.readline().split()]
        assert len(pids) == 2 and all(map(running, pids))
        command.send_signal(number)
        try:
            command.wait(20)
        finally:
            command.kill()
            command.wait()
    assert all_ended(pids)


def comes_true(condition: Callable[[], bool]) -> bool:
    """Whether the condition holds within some seconds."""
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def all_ended(pids: Sequence[int]) -> bool:
    return comes_true(lambda: not any(map(running, pids)))


def running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_fork_server_is_replaced(group: WorkerGroup) -> None:
    assert all_answer(group)
    before = group._fork_servers[0].pid
    os.kill(before, signal.SIGKILL)
    assert states(told(group, "exit", "answer")) == ["died", "answered"]
    assert all_answer(group)
    assert group._fork_servers[0].pid != before


@pytest.fixture
def fork_server_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ForkServer:
    """A copy of a fork server that has ended."""
    monkeypatch.setenv("PYTHONPATH", HERE["PYTHONPATH"])
    original = launch_fork_server(("random",))
    copied = original.copy(tmp_path / "of-copy")
    original.close()
    assert original.ended and not copied.ended
    return copied


def test_a_copy_of_a_fork_server_outlives_it_and_ends_with_its_group(fork_server_copy: ForkServer) -> None:
    with WorkerGroup(1, worker="odd_worker", preloaded=(), fork_servers=[fork_server_copy]) as group:
        assert states(group.run({"do": ["write"]}, LONG)) == ["answered"]
        assert states(group.run({"do": ["exit"]}, LONG)) == ["died"]
        (report,) = group.run({"do": ["answer"]}, LONG)
        assert report.answer["parent"] == fork_server_copy.pid
    assert all_ended([fork_server_copy.pid]) and not fork_server_copy.directory.exists()


def test_a_copy_of_a_fork_server_that_was_killed_is_replaced(fork_server_copy: ForkServer) -> None:
    os.kill(fork_server_copy.pid, signal.SIGKILL)
    assert all_ended([fork_server_copy.pid])
    with WorkerGroup(1, worker="odd_worker", preloaded=(), fork_servers=[fork_server_copy]) as group:
        assert states(group.run({"do": ["answer"]}, LONG)) == ["answered"]


def test_a_copy_of_a_fork_server_that_nobody_has_ends_with_its_workers(fork_server_copy: ForkServer) -> None:
    group = WorkerGroup(1, worker="odd_worker", preloaded=(), fork_servers=[fork_server_copy])
    assert states(group.run({"do": ["write"]}, LONG)) == ["answered"]
    pids = [fork_server_copy.pid, *group.pids]
    fork_server_copy.release()
    assert all_ended(pids) and comes_true(lambda: not fork_server_copy.directory.exists())
    group.end_workers()


def test_ranks_differ_in_the_order_of_sets() -> None:
    with WorkerGroup(2, worker="odd_worker", environment=HERE, preloaded=("random", "numpy")) as group:
        first = group.run({"do": ["draw", "draw"]}, LONG)
        group.end_workers()
        again = group.run({"do": ["draw", "draw"]}, LONG)
    hashes = [[report.answer["hash"] for report in reports] for reports in (first, again)]
    assert hashes[0][0] != hashes[0][1]
    drawn = [report.answer["drawn"] for reports in (first, again) for report in reports]
    assert len(set(map(tuple, drawn))) == 4


def test_files_of_programs_are_removed_with_the_group() -> None:
    with WorkerGroup(1, worker="odd_worker", environment=HERE, preloaded=()) as group:
        assert states(group.run({"do": ["write"]}, LONG)) == ["answered"]
        (written,) = group._directory.iterdir()
        assert written.read_text() == "something"
    assert not group._directory.exists()


def test_groups_may_share_a_directory_which_is_their_owner_s_to_remove(tmp_path: Path) -> None:
    directory = tmp_path / "shared"
    for what in ("write", "answer"):
        with WorkerGroup(1, worker="odd_worker", environment=HERE, preloaded=(), directory=directory) as group:
            assert states(group.run({"do": [what]}, LONG)) == ["answered"]
        assert (directory / "file").read_text() == "something"
