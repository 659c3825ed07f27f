"""Ranks that share sequences: training and generation at each stage."""

import ds_cases_sequences as cases
import pytest
import sequences
from workers import Workers

pytestmark = sequences.of_version_5


@pytest.mark.parametrize(
    ("stage", "kind"),
    [(0, "plain"), (1, "adapter"), (2, "recomputed"), (2, "reentrant"), (3, "recomputed"), (3, "adapter")],
)
def test_ranks_that_share_sequences_train_as_plain_torch(two: Workers, stage: int, kind: str) -> None:
    sequences.assert_alike(two.run(cases.trained, kind=kind, zero_stage=stage), kind, 1, cases.MAX_NORM)


@pytest.mark.parametrize("stage", [0, 3])
def test_ranks_that_share_sequences_generate_alike_and_leave_the_model_as_it_was(two: Workers, stage: int) -> None:
    for wanted, got, attention in two.run(cases.generated, zero_stage=stage):
        assert got == wanted
        assert attention == "sdpa"


@pytest.mark.parametrize("what", ["no mask", "no positions", "loss of a slice", "loss of a slice, recomputed"])
def test_a_mistake_with_shared_sequences_is_explained_on_every_rank(two: Workers, what: str) -> None:
    _, kind, words = sequences.MISTAKES[what]
    for got, message in two.run(cases.mistaken, what=what, zero_stage=3):
        assert got == kind, message
        assert [word for word in words if word not in message] == [], message
