"""The promises: a loop that keeps them is told so, and one that breaks a promise is told which."""

from collections.abc import Iterator
from pathlib import Path

import peer_loops
import pytest

from lightrft.conformance.peers import Result
from lightrft.conformance.peers import ranks as driver
from lightrft.conformance.peers.judge import judge_one
from lightrft.conformance.peers.promises import by_family
from lightrft.conformance.peers.ranks import Ranks

PROMISES = {promise.id: promise for family in by_family().values() for promise in family}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """One process, whose workers import what the tests do."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(Path(peer_loops.__file__).parent))
        with Ranks("peer_loops:Loop", 1) as opened:
            yield opened


def verdict(ranks: Ranks, loop: str, promise: str) -> Result:
    ranks.target = f"peer_loops:{loop}"
    return judge_one(PROMISES[promise], ranks)


@pytest.fixture(scope="module")
def results(ranks: Ranks) -> dict[str, Result]:
    """Of the loop that keeps the promises of one process."""
    return {promise: verdict(ranks, "Loop", promise) for promise in PROMISES}


def test_a_loop_that_keeps_every_promise_of_one_process_holds(results: dict[str, Result]) -> None:
    differing = [result for result in results.values() if result.verdict == "differs"]
    assert not differing


def test_what_is_not_offered_is_told_with_its_link_and_hides_nothing(results: dict[str, Result]) -> None:
    assert (results["reduce-types"].verdict, results["reduce-types"].link) == ("not offered", peer_loops.LINK)
    held = [result for result in results.values() if result.verdict == "holds"]
    assert len(held) >= 20


def test_promises_about_several_ranks_are_not_judged_on_one(results: dict[str, Result]) -> None:
    alone = [promise.id for promise in PROMISES.values() if promise.smallest_world > 1]
    assert alone
    assert {results[promise].verdict for promise in alone} == {"not offered"}


@pytest.mark.parametrize(
    ("loop", "promise", "said"),
    [
        ("Sums", "accumulation", "off"),
        ("TakesAll", "nan", "nan off"),
        ("Raises", "nan", "every update fails"),
        ("Raises", "unfrozen-later", "every update fails"),
        ("Careless", "flipped-bit", "flipped bit"),
        ("Careless", "pickles", "ran code from state"),
        ("Careless", "killed-save", "raised UnpicklingError"),
        ("Careless", "random-streams", "torch, numpy, python"),
        ("Forgets", "resume", "off"),
        ("Narrow", "parity", "has the shape (8,), expected (8, 4)"),
        ("Restarts", "resume-within-epoch", "expected the items"),
    ],
)
def test_a_loop_that_breaks_a_promise_differs(ranks: Ranks, loop: str, promise: str, said: str) -> None:
    result = verdict(ranks, loop, promise)
    assert result.verdict == "differs"
    assert said in result.detail


def test_a_loop_may_refuse_where_the_promise_says_so(ranks: Ranks) -> None:
    assert verdict(ranks, "Refuses", "nan").verdict == "holds"


def test_a_loop_that_hangs_differs(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "RUN_SECONDS", 3.0)
    monkeypatch.setattr(driver, "FIRST_SECONDS", 0.0)
    result = verdict(ranks, "Hangs", "parity")
    assert (result.verdict, "hung" in result.detail) == ("differs", True)


def test_damage_is_not_judged_where_an_intact_checkpoint_is_not_resumed(ranks: Ranks) -> None:
    result = verdict(ranks, "Forgets", "flipped-bit")
    assert result.verdict == "not judged"
    assert "without damage is not resumed: rank 0" in result.detail


def test_a_save_that_is_not_interrupted_is_not_judged(ranks: Ranks) -> None:
    result = verdict(ranks, "Postpones", "killed-save")
    assert (result.verdict, result.detail) == ("not judged", "the save ended before it was killed")
