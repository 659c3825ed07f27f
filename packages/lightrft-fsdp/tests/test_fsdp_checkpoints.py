"""Checkpoints of two ranks."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import fsdp_cases_checkpoints as cases
import pytest
import torch
from workers import Workers, started


@pytest.fixture(scope="module")
def three() -> Iterator[Workers]:
    """A world of three ranks."""
    yield from started(3)


@pytest.mark.parametrize("step", ["comparing", "assigning", "copying"])
def test_a_failure_on_one_rank_before_writing_raises_on_all(two: Workers, tmp_path: Path, step: str) -> None:
    first, second = two.run(cases.failing, step=step, path=str(tmp_path))
    assert second == "save_ckpt: no memory"
    assert "rank 1: CheckpointError: no memory" in first


def test_a_wrong_argument_on_one_rank_raises_on_all(two: Workers, tmp_path: Path) -> None:
    first, second = two.run(cases.named_on_one_rank, path=str(tmp_path))
    assert second.startswith("save_ckpt: expected a model or a dict of models, got None as model")
    assert second in first


def test_sigterm_on_one_rank_saves_on_all_and_the_run_can_be_resumed(two: Workers, tmp_path: Path) -> None:
    assert two.run(cases.terminated, path=str(tmp_path)) == [2, 2]
    assert (tmp_path / "global_step3").is_dir()
    wanted, _ = two.run(cases.went_on, path=str(tmp_path), done=0)
    got, _ = two.run(cases.went_on, path=str(tmp_path), done=3)
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


def in_turn(ranks: Sequence[Sequence[Sequence[int]]]) -> list[int]:
    """The samples in the order in which they were distributed, one to each rank per round."""
    return [sample for batches in zip(*ranks, strict=True) for turn in zip(*batches, strict=True) for sample in turn]


def test_other_numbers_of_ranks_see_what_is_left_in_the_same_order(
    one: Workers, two: Workers, three: Workers, tmp_path: Path
) -> None:
    begun = in_turn(two.run(cases.sample_order, path=str(tmp_path), first=3))
    left = in_turn(two.run(cases.sample_order, path=str(tmp_path)))
    assert sorted(begun + left) == list(range(48))
    assert begun + left != sorted(begun + left)
    for others in (one, three):
        assert in_turn(others.run(cases.sample_order, path=str(tmp_path))) == left
