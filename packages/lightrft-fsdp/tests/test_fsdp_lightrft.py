"""LightRFT's scripts run on FSDP2 as they are written."""

from pathlib import Path

import lightrft_checks
import pytest
from workers import Workers

pytestmark = lightrft_checks.pytestmark


@pytest.mark.parametrize("script", lightrft_checks.SCRIPTS)
@pytest.mark.parametrize("world", ["one", "two"])
def test_a_script_that_trains_with_rollouts(
    request: pytest.FixtureRequest, tmp_path: Path, world: str, script: str
) -> None:
    ranks: Workers = request.getfixturevalue(world)
    lightrft_checks.check_colocate(ranks.run, script, tmp_path, fsdp=True)


def test_a_script_whose_ranks_share_an_engine_that_one_of_them_holds(two: Workers, tmp_path: Path) -> None:
    shared = {"engine_tp_size": 2, "engine_type": "lightrft_scripts:LeaderEngine"}
    lightrft_checks.check_colocate(two.run, "GRPO", tmp_path, fsdp=True, **shared)


def test_a_script_that_trains_a_reward_model(two: Workers, tmp_path: Path) -> None:
    lightrft_checks.check_reward_model(two.run, tmp_path, fsdp=True)
