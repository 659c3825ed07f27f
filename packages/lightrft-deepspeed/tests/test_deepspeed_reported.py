"""What users have reported of training libraries is right here, or refused by name."""

from pathlib import Path

import mistakes
import pytest
import reported
import reported_around
from workers import Workers


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_on_two_ranks(two: Workers, stage: int) -> None:
    for found in two.run(reported.outcomes, strategy="deepspeed", zero_stage=stage, deadline=600.0):
        assert reported.unexpected_outcomes(found, f"zero{stage}") == []


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_around_the_updates_on_two_ranks(two: Workers, stage: int, tmp_path: Path) -> None:
    arguments = {"strategy": "deepspeed", "zero_stage": stage, "path": str(tmp_path)}
    for found in two.run(reported_around.outcomes, deadline=600.0, **arguments):
        assert list(reported_around.unexpected_outcomes(found, f"zero{stage}")) == []


def test_mistakes_are_explained_on_every_rank(two: Workers, tmp_path: Path) -> None:
    first, second = two.run(
        mistakes.error_messages, strategy="deepspeed", zero_stage=3, path=str(tmp_path), deadline=600.0
    )
    assert mistakes.incomplete_messages(first) == []
    for name, error in first.items():  # on rank 0; others may be told of its error
        assert second[name].partition(":")[0] == error.partition(":")[0]
