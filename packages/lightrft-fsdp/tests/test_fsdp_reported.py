"""What users have reported of training libraries is right here, or refused by name."""

from pathlib import Path

import mistakes
import reported
import reported_around
from workers import Workers


def test_on_one_rank_and_on_two(one: Workers, two: Workers) -> None:
    for ranks in (one, two):
        for found in ranks.run(reported.outcomes, strategy="fsdp", deadline=600.0):
            assert reported.unexpected_outcomes(found, "fsdp") == []


def test_around_the_updates_on_one_rank_and_on_two(one: Workers, two: Workers, tmp_path: Path) -> None:
    for ranks in (one, two):
        path = str(tmp_path / str(ranks.size))
        for found in ranks.run(reported_around.outcomes, strategy="fsdp", path=path, deadline=600.0):
            assert list(reported_around.unexpected_outcomes(found, "fsdp")) == []


def test_mistakes_are_explained_on_every_rank(two: Workers, tmp_path: Path) -> None:
    first, second = two.run(mistakes.error_messages, strategy="fsdp", path=str(tmp_path), deadline=600.0)
    assert mistakes.incomplete_messages(first) == []
    for name, error in first.items():  # on rank 0; others may be told of its error
        assert second[name].partition(":")[0] == error.partition(":")[0]
