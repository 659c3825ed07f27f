"""Metrics of several ranks."""

import json
from pathlib import Path

import fsdp_cases_trackers as cases
import pytest
from workers import Workers


@pytest.mark.parametrize(("denominators", "loss"), [([None, None], 2.5), ([1.0, 4.0], 1.0), ([0.0, 5.0], 1.0)])
def test_rank_0_writes_the_loss_of_all_ranks(
    two: Workers, tmp_path: Path, denominators: list[float | None], loss: float
) -> None:
    got = two.run(cases.losses_of_an_update, folder=str(tmp_path), denominators=denominators)
    assert got == [[None, loss]] * 2
    first, second = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (first["step"], first["model/loss"], first["rank"], first["loss"]) == (1, loss, 0, 2.0)
    assert (second["step"], second["alone"]) == (2, 1)


def test_ranks_may_have_other_names_for_a_run(two: Workers, tmp_path: Path) -> None:
    two.run(cases.log_under_a_name_of_each_rank, folder=str(tmp_path))
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.jsonl")] == [Path("0/metrics.jsonl")]


def test_every_rank_refuses_what_cannot_be_written(two: Workers, tmp_path: Path) -> None:
    for metric, tracker in two.run(cases.refusals, folder=str(tmp_path)):
        assert "log: expected 'reward' to be a number or a tensor of one number, got str ('high')" in metric
        assert "there is no tracker 'nowhere'" in tracker
