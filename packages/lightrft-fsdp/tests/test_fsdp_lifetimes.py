"""Beginning and ending: what a lifetime leaves behind, and what happens where a rank is lost."""

import os

import fsdp_cases_lifetimes as cases
import pytest
from traces import added
from workers import Workers, WorkersError


def test_repeated_lifetimes_leak_nothing(two: Workers) -> None:
    two.run(cases.lives, sizes=(-1, 1))  # the first time round torch starts what it keeps
    for first, *others in two.run(cases.lives, sizes=(-1, 1, 2, -1, 1)):
        assert first["process group"] is False
        assert [added(first, later) for later in others] == [{}] * len(others)


@pytest.mark.parametrize("call", ["forward", "backward", "optimizer_step"])
def test_a_missing_rank_is_an_error_that_names_the_call(two: Workers, call: str) -> None:
    (message, seconds), _ = two.run(cases.left_alone, call=call)
    assert message.startswith(f"{call}: rank 0 of 2 waited for another rank")
    assert seconds < 4.5
    two.run(cases.lives, sizes=(-1,))  # a new lifetime is sound


def test_a_killed_rank_is_an_error_that_names_the_call_on_the_others() -> None:
    workers = Workers(2)
    workers.run(os.getpid)
    try:
        with pytest.raises(WorkersError) as caught:
            workers.run(cases.killed_in_a_step, deadline=60)
    finally:
        workers.stop()
    rank_0, _, rank_1 = str(caught.value).partition("rank 1:\n")
    assert rank_1 == "the process ended"
    assert "StrategyError: optimizer_step: rank 0 of 2" in rank_0
