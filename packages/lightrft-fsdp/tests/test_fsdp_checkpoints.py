"""Checkpoints of two ranks."""

from pathlib import Path

import fsdp_cases_checkpoints as cases
import pytest
from workers import Workers


@pytest.mark.parametrize("step", ["comparing", "sharing", "copying"])
def test_what_fails_on_one_rank_before_it_is_written_every_rank_hears_of(
    two: Workers, tmp_path: Path, step: str
) -> None:
    first, second = two.run(cases.failing, step=step, path=str(tmp_path))
    assert second == "no memory"
    assert "rank 1: no memory" in first
